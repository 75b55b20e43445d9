//! The whole way in network namespaces: real binaries, real coturn, real kernel forwarding.
//!
//! Needs root, coturn, iproute2, nftables, curl and iperf3; run by `scripts/test`.

// Rates are worth seeing even when nothing fails.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::{
    GATEWAY_V4, GATEWAY_V6, Lab, NETWORK_V4_ID, RESOURCE_V4, RESOURCE_V6, SECOND_RELAY,
};
use firezone_lab::traffic::{Download, page, serve_iperf3};
use rustix::process::Signal;
use serde_json::{Value, json};

fn gateway() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_firezone-gateway"))
}

/// Bytes per transfer; the full gigabyte takes minutes, so plain runs move less.
fn transfer_size() -> String {
    std::env::var("FIREZONE_LAB_TRANSFER").unwrap_or_else(|_| "100M".to_owned())
}

fn iperf(lab: &Lab, host: &str, reverse: bool) -> Result<()> {
    let reverse = if reverse { " -R" } else { "" };
    let size = transfer_size();
    let report = lab
        .net
        .output("client", &format!("iperf3 -J -c {host} -n {size}{reverse}"))?;
    let report: Value = serde_json::from_str(&report)?;
    ensure!(report["error"].is_null(), "{}", report["error"]);
    let received = report["end"]["sum_received"]["bytes"].as_u64();
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    println!(
        "{host}{reverse}: {} MB at {:.0} Mbit/s",
        received.unwrap_or(0) / 1_000_000,
        rate.unwrap_or(0.0) / 1e6
    );
    ensure!(received.is_some_and(|b| b > 0), "nothing arrived: {report}");
    Ok(())
}

fn iperf_all(lab: &mut Lab) -> Result<()> {
    serve_iperf3(lab)?;
    for host in [RESOURCE_V4, RESOURCE_V6] {
        for reverse in [false, true] {
            iperf(lab, host, reverse)?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_page_comes_through_the_tunnel_direct_and_masqueraded() -> Result<()> {
    let mut lab = Lab::start_all("direct", gateway())?;
    let body = lab
        .fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    ensure!(body.contains(GATEWAY_V4), "masqueraded? {body}");
    let body = lab.fetch(&page(RESOURCE_V6))?;
    ensure!(body.contains(GATEWAY_V6), "masqueraded? {body}");
    lab.expect_path(|p| p == "direct", 10)?;

    let status = lab.status()?;
    let client = &status["clients"][0];
    ensure!(client["rx_bytes"].as_u64() > Some(0), "{client}");
    ensure!(client["last_handshake_at"].is_number(), "{client}");
    ensure!(status["portal"]["state"] == "joined", "{status}");
    ensure!(status["relays"][0]["state"] == "allocated", "{status}");
    // What is published lags behind by half a second.
    lab.net
        .eventually("metrics tell it, too", Duration::from_secs(10), |net| {
            let metrics = net.output("gateway", "curl -sS -f http://127.0.0.1:8080/metrics")?;
            for wanted in [
                "gateway_health{probe=\"ready\"} 1",
                "gateway_clients{client_path=\"direct\"} 1",
                "gateway_relays{state=\"allocated\"} 1",
            ] {
                ensure!(metrics.lines().any(|l| l == wanted), "{wanted}: {metrics}");
            }
            Ok(())
        })?;
    lab.net
        .eventually("metrics are pushed, too", Duration::from_secs(10), |net| {
            let stats = net.output("internet", "curl -sSf http://127.0.0.1:4318/stats")?;
            let stats: Value = serde_json::from_str(&stats)?;
            ensure!(stats["metrics"].as_u64() > Some(20), "{stats}");
            Ok(())
        })?;
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let told = lab.spans("connection.establish")?;
        if told
            .iter()
            .any(|s| s["attributes"]["client.path"] == "direct")
        {
            break;
        }
        ensure!(Instant::now() < end, "no such span: {told:?}");
        std::thread::sleep(Duration::from_millis(300));
    }
    iperf_all(&mut lab)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn with_the_direct_path_blocked_everything_goes_through_the_relay() -> Result<()> {
    let mut lab = Lab::new("relayed", gateway())?;
    lab.block_direct()?;
    lab.start_surroundings()?;
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    let body = lab
        .fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    ensure!(body.contains(GATEWAY_V4), "{body}");
    lab.expect_path(|p| p.starts_with("relay"), 5)?;
    iperf_all(&mut lab)?;
    lab.expect_path(|p| p.starts_with("relay"), 5)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_transfer_moves_to_the_relay_when_the_direct_path_dies_and_back_when_it_lives() -> Result<()> {
    let mut lab = Lab::start_all("failover", gateway())?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    lab.expect_path(|p| p == "direct", 10)?;
    let mut download = Download::start(&lab, 80_000_000, "2M")?;
    std::thread::sleep(Duration::from_secs(3));
    for round in ["first", "second"] {
        lab.block_direct()?;
        let cut = Instant::now();
        // Limits of seconds are for virtual time; here it is the order of things.
        lab.expect_path(|p| p.starts_with("relay"), 10)?;
        println!("{round} cut: relayed after {:?}", cut.elapsed());
        // The client's own traffic has moved, too: nothing else would get through.
        lab.reach(25)?;
        println!("{round} cut: a page after {:?}", cut.elapsed());
        lab.unblock_direct()?;
        let mended = Instant::now();
        // The search may have to run twice, and then waits longer the next time.
        lab.expect_path(|p| p == "direct", 90)?;
        println!("{round} mend: direct after {:?}", mended.elapsed());
        ensure!(
            download.goes_on()? || round == "second" || mended.elapsed().as_secs() > 25,
            "the download was to last"
        );
    }
    download.finish()?;
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_transfer_survives_the_death_of_the_relay_in_use() -> Result<()> {
    let mut lab = Lab::new("relay-death", gateway())?;
    lab.block_direct()?;
    lab.start_surroundings()?;
    lab.start_second_relay()?;
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    // Both ends know both relays, and have checked the pairs through them.
    std::thread::sleep(Duration::from_secs(3));
    let download = Download::start(&lab, 40_000_000, "2M")?;
    std::thread::sleep(Duration::from_secs(3));
    let client = lab.status()?["clients"][0].clone();
    let ends = [&client["local"], &client["remote"]].map(ToString::to_string);
    let second = ends.iter().any(|end| end.contains(SECOND_RELAY));
    lab.net.kill(if second { "coturn-b" } else { "coturn" })?;
    let took = lab.reach(25)?;
    println!(
        "{} ({ends:?}): a page {took:?} after the relay died",
        client["path"]
    );
    download.finish()?;
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn traffic_flows_on_while_the_portal_restarts_and_the_attempts_are_traced() -> Result<()> {
    let mut lab = Lab::start_all("portal-restart", gateway())?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    let mut download = Download::start(&lab, 40_000_000, "4M")?;
    std::thread::sleep(Duration::from_secs(1));
    lab.net.kill("lab-portal")?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(download.goes_on()?, "the download must still run");
    let away = lab.status()?;
    ensure!(away["portal"]["state"] != "joined", "{}", away["portal"]);
    ensure!(away["portal"]["backoff"].is_object(), "{}", away["portal"]);
    lab.start_portal()?;
    lab.net
        .eventually("the gateway rejoins", Duration::from_secs(30), |net| {
            net.sh("gateway", "curl -sf http://127.0.0.1:8080/readyz")
        })?;
    download.finish()?;
    // Still the same session afterwards: the grants were listed again.
    lab.fetch(&page(RESOURCE_V4))?;

    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let spans = lab.spans("portal.connect")?;
        let failed = spans
            .iter()
            .filter(|s| s["attributes"]["error.type"].is_string())
            .count();
        let joined = spans.len() - failed;
        if failed >= 1 && joined >= 2 && !lab.spans("portal.outage")?.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "spans: {spans:?}\n{}", lab.net.logs());
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn sigterm_says_goodbye_and_ends_within_three_seconds() -> Result<()> {
    let mut lab = Lab::start_all("sigterm", gateway())?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    lab.net.signal("gateway", Signal::TERM)?;
    let took = lab.gateway_ends(Duration::from_secs(5))?;
    ensure!(took < Duration::from_secs(3), "took {took:?}");
    lab.net
        .eventually("the client is told", Duration::from_secs(3), |net| {
            net.sh(
                "client",
                "curl -sf http://127.0.0.1:8083/status | grep -q '\"goodbyes_received\": *[1-9]\\|\"goodbyes\": *[1-9]'",
            )
        })?;
    let events = lab.portal("/events")?.to_string();
    ensure!(events.contains("1000"), "close code 1000: {events}");
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn filters_and_revocation_are_enforced() -> Result<()> {
    let mut lab = Lab::start_all("access", gateway())?;
    lab.fetch("http://10.98.0.2/")
        .with_context(|| lab.net.logs())?;
    // A filtered port is refused with an ICMP error, so the client learns at once.
    let begun = Instant::now();
    let refused = lab
        .net
        .try_output("client", "curl -sS --max-time 10 http://10.98.0.2:81/")?;
    ensure!(!refused.status.success());
    ensure!(
        begun.elapsed() < Duration::from_secs(5),
        "refused only after {:?}",
        begun.elapsed()
    );
    let status = lab.status()?;
    ensure!(
        status["dropped"].as_object().is_some_and(|d| !d.is_empty()),
        "{status}"
    );

    lab.fetch(&page(RESOURCE_V4))?;
    let client = status["clients"][0]["id"].clone();
    lab.portal_post(
        "/reject",
        &json!({"client": client, "resource": NETWORK_V4_ID}),
    )?;
    lab.net
        .eventually("the grant is gone", Duration::from_secs(5), |net| {
            let status = net.output("gateway", "curl -sf http://127.0.0.1:8080/status")?;
            ensure!(!status.contains(NETWORK_V4_ID), "{status}");
            Ok(())
        })
}

/// Runs the gateway on a host that lacks something, and waits until its admin server says all of
/// `wanted`, while not started and still running.
fn told(name: &str, prepare: &str, wrapper: &[&str], wanted: &[&str]) -> Result<()> {
    let mut lab = Lab::new(name, gateway())?;
    lab.net.sh("gateway", prepare)?;
    lab.start_gateway_under(wrapper, &[])?;
    lab.net
        .eventually("the status names it", Duration::from_secs(10), |net| {
            let answers = net.try_output(
                "gateway",
                "curl -s 'http://127.0.0.1:8080/startupz?verbose'; \
                 curl -s http://127.0.0.1:8080/status",
            )?;
            let text = String::from_utf8_lossy(&answers.stdout).into_owned();
            ensure!(text.contains("startupz check failed"), "{text}");
            for wanted in wanted {
                ensure!(text.contains(wanted), "no {wanted}: {text}");
            }
            Ok(())
        })?;
    // It stays up, so that the message can be read.
    ensure!(lab.net.runs("gateway"), "{}", lab.net.log("gateway"));
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_missing_tun_device_is_named_with_the_line_to_add() -> Result<()> {
    told(
        "no-tun",
        "true",
        &[
            "unshare",
            "-m",
            "sh",
            "-c",
            "mount -t tmpfs tmpfs /dev/net && exec setpriv --bounding-set=-mknod \"$@\"",
            "sh",
        ],
        &["/dev/net/tun is missing", "/dev/net/tun:/dev/net/tun"],
    )
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_missing_capability_is_named_with_the_line_to_add() -> Result<()> {
    told(
        "no-net-admin",
        "true",
        &["setpriv", "--bounding-set=-net_admin"],
        &["NET_ADMIN", "cap_add"],
    )
}

#[test]
#[ignore = "needs root and network namespaces"]
fn forwarding_switched_off_is_named_with_the_line_to_add() -> Result<()> {
    told(
        "no-forwarding",
        "echo 0 > /proc/sys/net/ipv4/ip_forward",
        &[],
        &["net.ipv4.ip_forward=0", "sysctl"],
    )
}

#[test]
#[ignore = "needs root and network namespaces"]
fn an_address_where_no_portal_is_shows_in_the_status_with_its_cause() -> Result<()> {
    let mut lab = Lab::new("wrong-url", gateway())?;
    lab.start_gateway(&[("FIREZONE_API_URL", "ws://203.0.113.1:9")])?;
    let portal = lab
        .net
        .eventually("the cause shows", Duration::from_secs(15), |net| {
            let status = net.output("gateway", "curl -sf http://127.0.0.1:8080/status")?;
            let status: Value = serde_json::from_str(&status)?;
            ensure!(status["portal"]["last_error"].is_object(), "{status}");
            Ok(status["portal"].clone())
        })?;
    ensure!(
        portal["last_error"]["kind"] == "tcp_connect",
        "kind: {portal}"
    );
    ensure!(portal["backoff"]["attempt"].as_u64() > Some(0), "{portal}");
    let ready = lab
        .net
        .try_output("gateway", "curl -s 'http://127.0.0.1:8080/readyz?verbose'")?;
    let ready = String::from_utf8_lossy(&ready.stdout).into_owned();
    ensure!(ready.contains("[-]portal"), "{ready}");
    // A portal that is away says nothing about the process.
    lab.net
        .sh("gateway", "curl -sf http://127.0.0.1:8080/livez >/dev/null")
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_relay_that_restarts_without_its_memory_is_used_again() -> Result<()> {
    let mut lab = Lab::new("relay-restart", gateway())?;
    lab.block_direct()?;
    lab.start_surroundings()?;
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    lab.net.kill("coturn")?;
    lab.start_relay()?;
    lab.net
        .eventually("a page again", Duration::from_secs(60), |net| {
            net.sh(
                "client",
                &format!("curl -sf --max-time 3 http://{RESOURCE_V4}/ >/dev/null"),
            )
        })?;
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let told = lab.spans("relay.episode")?;
        if told
            .iter()
            .any(|s| s["attributes"]["relay.begin.reason"] == "offered")
        {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "the first allocation's end is not told: {told:?}"
        );
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn flushed_masquerading_rules_come_back() -> Result<()> {
    let mut lab = Lab::start_all("flushed", gateway())?;
    lab.net.sh("gateway", "nft flush ruleset")?;
    lab.net
        .eventually("the rules are back", Duration::from_secs(20), |net| {
            net.sh("gateway", "nft list ruleset | grep -q masquerade")
        })?;
    let body = lab.fetch(&page(RESOURCE_V4))?;
    ensure!(body.contains(GATEWAY_V4), "{body}");
    Ok(())
}
