//! Paths under NAT, IPv6, firewalls and dying relays, in network namespaces: real binaries, two
//! real coturns, real connection tracking.
//!
//! Needs root, coturn, iproute2, nftables, curl, ping and iperf3; run by `scripts/test`. The limits
//! are for busy machines; what was measured is printed (`--success-output immediate`).

// The figures are worth seeing even when nothing fails.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::{
    CLIENT_ROUTER, GATEWAY_ROUTER, GATEWAY_V4, INTERNET, INTERNET_V6, Lab, Nat, RESOURCE_V4,
    SECOND_RELAY,
};
use firezone_lab::traffic::{Echoes, Pings, Streams, page};
use serde_json::Value;

/// How long streams run: long enough for whatever happens meanwhile, and for its aftermath.
const STREAMS: u32 = 15;

fn new_lab(name: &str) -> Result<Lab> {
    Lab::new(name, Path::new(env!("CARGO_BIN_EXE_firezone-gateway")))
}

/// Portal, relays, gateway and client, in this order.
fn start(lab: &mut Lab, relays: usize) -> Result<()> {
    lab.start_surroundings()?;
    if relays == 2 {
        lab.start_second_relay()?;
    }
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    lab.start_client(&[])
}

/// A page comes through, over a path of this kind.
fn expect_page_over(lab: &mut Lab, kind: &str) -> Result<()> {
    let body = lab
        .fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    ensure!(body.contains(GATEWAY_V4), "masqueraded? {body}");
    lab.expect_path(|path| path == kind, 20)?;
    println!("{}", told(lab)?);
    let body = lab.fetch(&page(RESOURCE_V4))?;
    ensure!(body.contains(GATEWAY_V4), "masqueraded? {body}");
    Ok(())
}

/// The path in use, in words.
fn told(lab: &Lab) -> Result<String> {
    let client = &lab.status()?["clients"][0];
    Ok(format!(
        "{}: {} to {}, {} changes",
        client["path"], client["local"], client["remote"], client["path_changes"]
    ))
}

/// UDP only to and from this relay; TCP goes anywhere.
fn only_relay(lab: &Lab, router: &str, relay: &str) -> Result<()> {
    lab.firewall(
        router,
        &[
            &format!("ip daddr {relay} udp dport 3478 accept"),
            &format!("ip saddr {relay} udp sport 3478 accept"),
            "meta l4proto udp drop",
        ],
    )
}

/// Streams while something happens three seconds after they began; neither breaks, and neither
/// stands still for more than `limit` seconds.
fn stream_through(
    lab: &mut Lab,
    seconds: u32,
    limit: f64,
    happens: impl FnOnce(&mut Lab) -> Result<()>,
) -> Result<()> {
    let streams = Streams::start(lab, seconds)?;
    std::thread::sleep(Duration::from_secs(3));
    println!("before: {}", told(lab)?);
    happens(lab)?;
    let [to, from] = streams.finish().with_context(|| lab.net.logs())?.stalls();
    println!("after: {}", told(lab)?);
    println!(
        "stalled for {:.1} s (at {:.1}) to the resource, {:.1} s (at {:.1}) from it",
        to.lasted, to.from, from.lasted, from.from
    );
    ensure!(
        to.lasted.max(from.lasted) <= limit,
        "stalled for too long\n{}",
        lab.net.logs()
    );
    Ok(())
}

/// Kills the relay that the gateway's path leads through, its own one if there are two.
fn kill_relay_in_use(lab: &mut Lab) -> Result<&'static str> {
    let client = lab.status()?["clients"][0].clone();
    let end = if client["path"] == "relay_remote" {
        client["remote"].clone()
    } else {
        client["local"].clone()
    };
    let name = if end.to_string().contains(SECOND_RELAY) {
        "coturn-b"
    } else {
        "coturn"
    };
    lab.net.kill(name)?;
    Ok(name)
}

// NAT

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn routers_that_keep_ports_let_the_path_be_direct() -> Result<()> {
    let mut lab = new_lab("nat-kept")?;
    start(&mut lab, 2)?;
    expect_page_over(&mut lab, "direct")
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_client_behind_a_symmetric_nat_reaches_a_filtered_gateway_over_its_own_relay() -> Result<()> {
    let mut lab = new_lab("nat-symmetric-client")?;
    lab.set_nat(CLIENT_ROUTER, Nat::Symmetric)?;
    start(&mut lab, 2)?;
    // The gateway's router lets nobody in but whom the gateway sent something to, and the client
    // comes from a port that nobody can know. But the gateway's port is known to the client's relay.
    expect_page_over(&mut lab, "relay_remote")
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_client_behind_a_symmetric_nat_reaches_a_public_gateway_directly() -> Result<()> {
    let mut lab = new_lab("nat-public-gateway")?;
    lab.set_nat(CLIENT_ROUTER, Nat::Symmetric)?;
    lab.no_nat_for_gateway()?;
    start(&mut lab, 2)?;
    expect_page_over(&mut lab, "direct")
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn two_symmetric_nats_leave_only_relays() -> Result<()> {
    let mut lab = new_lab("nat-symmetric-both")?;
    lab.set_nat(CLIENT_ROUTER, Nat::Symmetric)?;
    lab.set_nat(GATEWAY_ROUTER, Nat::Symmetric)?;
    start(&mut lab, 2)?;
    expect_page_over(&mut lab, "relay_both")
}

// IPv6

/// Both routers let no IPv4 through, not even to the portal.
fn without_v4(lab: &mut Lab) -> Result<()> {
    lab.add_v6()?;
    for router in [CLIENT_ROUTER, GATEWAY_ROUTER] {
        lab.firewall(router, &["meta nfproto ipv4 drop"])?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn without_any_ipv4_outside_the_path_is_direct_over_ipv6() -> Result<()> {
    let mut lab = new_lab("v6-direct")?;
    without_v4(&mut lab)?;
    start(&mut lab, 1)?;
    expect_page_over(&mut lab, "direct")?;
    let remote = lab.status()?["clients"][0]["remote"].to_string();
    ensure!(remote.contains("2001:db8:10::2"), "{remote}");
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_relay_is_used_over_ipv6_alone() -> Result<()> {
    let mut lab = new_lab("v6-relayed")?;
    without_v4(&mut lab)?;
    lab.block_direct()?;
    start(&mut lab, 1)?;
    expect_page_over(&mut lab, "relay_local")?;
    let local = lab.status()?["clients"][0]["local"].to_string();
    ensure!(local.contains(INTERNET_V6), "{local}");
    Ok(())
}

// Interfaces

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_second_interface_is_offered_to_clients_that_only_it_leads_to() -> Result<()> {
    let mut lab = new_lab("second-interface")?;
    lab.block_direct()?;
    // A network inside the company that does not lead to the internet.
    lab.net.link(
        ("client", "inner", &["192.168.77.2/24"]),
        ("gateway", "inner", &["192.168.77.1/24"]),
    )?;
    lab.net
        .sh("gateway", "ip route add 192.168.10.0/24 via 192.168.77.2")?;
    start(&mut lab, 1)?;
    expect_page_over(&mut lab, "direct")?;
    let local = lab.status()?["clients"][0]["local"].to_string();
    ensure!(local.contains("192.168.77.1"), "{local}");
    Ok(())
}

// Relays

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn each_end_may_be_confined_to_a_relay_of_its_own() -> Result<()> {
    let mut lab = new_lab("relay-both")?;
    only_relay(&lab, GATEWAY_ROUTER, INTERNET)?;
    only_relay(&lab, CLIENT_ROUTER, SECOND_RELAY)?;
    start(&mut lab, 2)?;
    expect_page_over(&mut lab, "relay_both")?;
    let client = lab.status()?["clients"][0].clone();
    let via = |end: &str, relay: &str| client[end].to_string().contains(relay);
    ensure!(via("local", INTERNET), "{client}");
    ensure!(via("remote", SECOND_RELAY), "{client}");
    stream_through(&mut lab, 4, 2.0, |_| Ok(()))
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn streams_survive_the_death_of_the_relay_in_use() -> Result<()> {
    let mut lab = new_lab("relay-dies")?;
    lab.block_direct()?;
    start(&mut lab, 2)?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    stream_through(&mut lab, STREAMS, 3.0, |lab| {
        println!("{} dies", kill_relay_in_use(lab)?);
        Ok(())
    })
}

fn restarted(name: &str, relays: usize) -> Result<()> {
    let mut lab = new_lab(name)?;
    lab.block_direct()?;
    start(&mut lab, relays)?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    // TCP waits twice as long each time it tries again; when the path was back, pings tell.
    let pings = Pings::start(&lab)?;
    stream_through(
        &mut lab,
        2 * STREAMS,
        20.0,
        |lab| match kill_relay_in_use(lab)? {
            "coturn" => lab.start_relay(),
            _ => lab.restart_second_relay(),
        },
    )?;
    let echoes = pings.finish()?;
    println!("pings: {echoes:?}");
    ensure!(
        echoes.silence <= Duration::from_secs(10),
        "{echoes:?}\n{}",
        lab.net.logs()
    );
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn streams_survive_that_the_only_relay_loses_its_memory() -> Result<()> {
    restarted("relay-restarts", 1)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn streams_survive_that_one_of_two_relays_loses_its_memory() -> Result<()> {
    restarted("relays-restart", 2)
}

// Presence

/// Asks the gateway sent for relays, as milliseconds of the portal's clock.
fn asked_for_relays(lab: &Lab) -> Result<Vec<u64>> {
    let gateway = gateway_id(lab)?;
    let events = lab.portal("/events?kind=no_relays&n=20000")?;
    Ok(events
        .as_array()
        .context("events")?
        .iter()
        .filter(|event| event["peer_id"] == gateway)
        .filter_map(|event| event["at_ms"].as_u64())
        .collect())
}

fn gateway_id(lab: &Lab) -> Result<Value> {
    Ok(lab.portal("/state")?["gateways"][0]["id"].clone())
}

/// The pauses between the asks are a second at least, bar the clock's grain.
fn ensure_modest(asked: &[u64]) -> Result<()> {
    for pair in asked.windows(2) {
        ensure!(pair[1] - pair[0] >= 990, "asked too often: {asked:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_thousand_flaps_of_the_relays_cost_a_direct_path_nothing() -> Result<()> {
    let mut lab = new_lab("flaps")?;
    start(&mut lab, 1)?;
    expect_page_over(&mut lab, "direct")?;
    let before = lab.status()?["clients"][0].clone();
    let pings = Pings::start(&lab)?;
    let begun = Instant::now();
    let post = |body: &Value| {
        format!(
            "curl -sf -d '{body}' -H 'content-type: application/json' http://127.0.0.1:8082/relays >/dev/null || exit 1"
        )
    };
    let (none, one) = (lab.relays(0), lab.relays(1));
    lab.net.sh(
        "internet",
        &format!(
            "for i in $(seq 1000); do {}; {}; done",
            post(&none),
            post(&one)
        ),
    )?;
    let took = begun.elapsed();
    let Echoes { answered, lost, .. } = pings.finish()?;
    let after = lab.status()?["clients"][0].clone();
    let asked = asked_for_relays(&lab)?;
    println!(
        "1000 flaps in {took:?}: {answered} pings answered, {lost} lost; relays asked for {} times",
        asked.len()
    );
    ensure!(lost == 0, "{lost} of {answered} lost\n{}", lab.net.logs());
    ensure!(after["path"] == "direct", "{after}");
    ensure!(
        after["path_changes"] == before["path_changes"],
        "{before} {after}"
    );
    ensure_modest(&asked)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn when_all_relays_are_gone_they_are_asked_for_and_the_next_one_is_used() -> Result<()> {
    let mut lab = new_lab("no-relays")?;
    lab.block_direct()?;
    start(&mut lab, 1)?;
    lab.offer_relays(0)?;
    lab.net.kill("coturn")?;
    ensure!(lab.reach(5).is_err(), "what got through?");
    lab.start_relay()?;
    lab.offer_relays(1)?;
    let took = lab.reach(15)?;
    lab.expect_path(|path| path.starts_with("relay"), 5)?;
    let asked = asked_for_relays(&lab)?;
    println!(
        "a page {took:?} after the relay was offered; asked {} times; {}",
        asked.len(),
        told(&lab)?
    );
    ensure!(!asked.is_empty(), "{}", lab.portal("/events?n=100")?);
    ensure_modest(&asked)
}

// The direct path

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn streams_move_off_a_blocked_direct_path_and_back() -> Result<()> {
    let mut lab = new_lab("blocked")?;
    start(&mut lab, 2)?;
    expect_page_over(&mut lab, "direct")?;
    stream_through(&mut lab, 35, 12.0, |lab| {
        lab.block_direct()?;
        let cut = Instant::now();
        lab.expect_path(|path| path.starts_with("relay"), 10)?;
        println!("relayed after {:?}", cut.elapsed());
        std::thread::sleep(Duration::from_secs(4));
        lab.unblock_direct()?;
        let mended = Instant::now();
        lab.expect_path(|path| path == "direct", 60)?;
        println!("direct again after {:?}", mended.elapsed());
        Ok(())
    })
}
