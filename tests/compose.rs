//! Runs the cases of `tests/compose/run`, so that they count and are reported like any other
//! test. They need Docker and the images that `scripts/up` builds; `scripts/test` sees to both.

use std::process::Command;

fn run(case: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compose/run");
    let status = Command::new(script)
        .arg(case)
        .status()
        .unwrap_or_else(|error| panic!("cannot start {script}: {error}"));
    assert!(status.success(), "{case}: see the output above");
}

macro_rules! cases {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        #[ignore = "needs Docker and the lab: scripts/test"]
        fn $name() {
            run(stringify!($name));
        }
    )*};
}

cases! {
    direct_path_carries_ipv4_and_ipv6,
    resource_sees_the_gateways_own_address,
    relay_carries_ipv4_and_ipv6_when_direct_is_blocked,
    names_are_translated,
    other_relay_takes_over_when_one_stops,
    iperf_moves_data_both_ways,
    transfer_survives_a_portal_restart,
    portal_outage_leaves_the_gateway_healthy_and_carrying,
    traces_reach_the_collector,
    gateway_stops_fast_and_cleanly,
    production_file_gives_a_ready_gateway,
    refused_token_is_a_state_not_a_crash_loop,
    missing_rights_are_named,
}

/// A case that is in the script but not in the list above would silently never run.
#[test]
fn every_case_of_the_script_is_run() {
    let script = include_str!("compose/run");
    let mut in_script: Vec<_> = script
        .lines()
        .filter_map(|line| line.strip_prefix("case_")?.strip_suffix("() {"))
        .collect();
    let source = include_str!("compose.rs");
    let list = source
        .split_once("cases! {\n")
        .and_then(|(_, rest)| rest.split_once('}'))
        .map_or("", |(list, _)| list);
    let mut listed: Vec<_> = list
        .lines()
        .map(|line| line.trim().trim_end_matches(','))
        .filter(|line| !line.is_empty())
        .collect();
    in_script.sort_unstable();
    listed.sort_unstable();
    assert!(!listed.is_empty());
    assert_eq!(in_script, listed);
}
