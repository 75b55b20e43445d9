//! Runs the cells of `tests/compose/cells`, so that they count and are reported like any other
//! test. They need Docker and the images that `scripts/up` builds; `scripts/test` sees to both.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

fn run(cell: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compose/run");
    let status = Command::new(script)
        .arg(cell)
        .status()
        .unwrap_or_else(|error| panic!("cannot start {script}: {error}"));
    assert!(status.success(), "{cell}: see the output above");
}

macro_rules! cells {
    ($($name:ident),* $(,)?) => {
        const CELLS: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            #[ignore = "needs Docker and the lab: scripts/test"]
            fn $name() {
                run(stringify!($name));
            }
        )*
    };
}

// `scripts/test e2e --list` in the same order.
cells! {
    gateway_stops_fast_and_cleanly,
    gateway_restart_gives_its_clients_back,
    gateway_that_was_killed_gives_its_clients_back,
    two_gateways_in_a_site_the_other_one_takes_over_when_one_stops,
    two_gateways_in_a_site_the_other_one_takes_over_when_one_dies,
    traces_reach_the_collector,
    host_without_tun_says_so,
    host_without_net_admin_says_so,
    host_with_nothing_at_all_says_so,
    host_that_does_not_forward_ipv4_says_so_and_is_mended_live,
    host_that_does_not_forward_ipv6_serves_ipv4_and_says_so,
    host_without_ipv6_serves_ipv4_and_says_so,
    container_with_a_read_only_root_serves,
    container_of_another_user_says_why_it_has_no_rights,
    container_leaves_root_and_keeps_net_admin_alone,
    container_without_setuid_stays_root_and_says_so,
    container_of_64_mebibytes_carries_load_without_being_killed,
    direct_path_carries_ipv4_and_ipv6,
    nat_that_keeps_ports_on_both_sides_leaves_the_path_direct,
    nat_symmetric_at_the_client_needs_one_relay,
    nat_symmetric_at_the_gateway_needs_one_relay,
    nat_symmetric_on_both_sides_needs_two_relays,
    outside_with_ipv4_alone_reaches_ipv6_resources,
    outside_with_ipv6_alone_reaches_ipv4_resources,
    outside_with_an_mtu_of_1280_carries_full_packets,
    loss_of_two_percent_slows_but_damages_nothing,
    direct_path_that_is_blocked_is_left_and_taken_again,
    roaming_client_router_that_forgets_its_mappings,
    roaming_client_router_that_gets_another_address,
    roaming_client_that_moves_to_another_network,
    roaming_client_in_the_gateways_own_network,
    roaming_client_with_a_symmetric_nat_on_its_way_to_a_direct_path,
    transfer_survives_a_portal_restart,
    portal_outage_leaves_the_gateway_healthy_and_carrying,
    portal_that_comes_up_after_the_gateway_is_waited_for,
    portal_that_refuses_with_401_blocks_and_closes_all_access,
    portal_that_refuses_with_409_is_asked_again,
    portal_that_refuses_with_429_is_left_alone_as_long_as_it_says,
    portal_that_is_overloaded_with_503_is_asked_again,
    portal_that_closes_with_1012_is_not_stormed,
    portal_that_is_slow_to_answer_is_waited_for,
    token_file_that_is_replaced_is_read_again,
    production_file_gives_a_ready_gateway,
    production_file_scaled_to_three_is_three_lasting_gateways,
    production_file_with_a_refused_token_is_a_state_not_a_crash_loop,
    relay_carries_ipv4_and_ipv6_when_direct_is_blocked,
    relay_over_ipv6_alone_carries_both,
    other_relay_takes_over_when_one_stops,
    relay_that_restarts_and_forgets_is_used_again,
    direct_path_does_not_notice_that_all_relays_are_lost,
    relays_that_were_all_lost_are_used_as_soon_as_they_return,
    relay_credentials_that_are_rotated_cost_nothing,
    relay_that_is_withdrawn_hands_over_to_the_next,
    resource_sees_the_gateways_own_address,
    names_are_translated,
    name_with_ipv4_alone,
    name_with_ipv6_alone,
    dns_that_is_dead_stops_names_and_nothing_else,
    internet_resource_takes_what_is_not_named,
    access_that_is_revoked_ends_at_once,
    access_that_expires_ends_without_the_portal,
    clock_of_the_portal_that_is_wrong_is_survived,
    filters_change_what_is_reached_at_once,
    ping_goes_to_networks_and_names,
    download_of_200_megabytes_is_undamaged,
    downloads_at_once_are_undamaged,
    upload_is_undamaged,
    iperf_moves_data_both_ways,
    refused_port_is_refused_at_once,
    reset_by_the_resource_reaches_the_client,
    reset_by_the_client_reaches_the_resource,
    ecn_is_negotiated_and_shows_outside,
    ecn_congestion_outside_reaches_the_inside,
    ecn_congestion_outside_does_not_touch_what_knows_no_ecn,
}

/// A cell that is in a file but not in the list above would silently never run.
#[test]
fn every_cell_of_the_matrix_is_run() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compose/cells");
    let mut in_files: Vec<String> = Vec::new();
    for entry in Path::new(directory).read_dir().unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        in_files.extend(text.lines().filter_map(|line| {
            let name = line.strip_prefix("cell_")?.strip_suffix("() {")?;
            Some(name.to_owned())
        }));
    }
    let mut listed = CELLS.to_vec();
    in_files.sort_unstable();
    listed.sort_unstable();
    assert!(listed.len() >= 40, "{}", listed.len());
    assert_eq!(in_files, listed);
}
