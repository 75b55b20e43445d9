//! What the gateway exports to a collector, in network namespaces.
//!
//! Needs root, coturn, iproute2, nftables and curl; run by `scripts/test`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::Lab;
use serde_json::Value;

fn gateway() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_firezone-gateway"))
}

fn count(span: &Value, name: &str) -> i64 {
    let value = &span["attributes"][format!("portal.outage.{name}")];
    value.as_i64().unwrap_or(-1)
}

/// Links of one kind, in order.
fn links<'a>(span: &'a Value, kind: &str) -> Vec<&'a Value> {
    let all = span["links"].as_array().map(Vec::as_slice);
    all.unwrap_or_default()
        .iter()
        .filter(|link| link["attributes"]["portal.outage.link"] == kind)
        .collect()
}

/// The portal is away while something happens; returns the outage's span.
fn outage(lab: &mut Lab, happens: impl FnOnce(&mut Lab) -> Result<()>) -> Result<Value> {
    let before = lab.spans("portal.outage")?.len();
    lab.net.kill("lab-portal")?;
    lab.net
        .eventually("the outage shows", Duration::from_secs(10), |net| {
            net.sh(
                "gateway",
                "curl -s http://127.0.0.1:8080/status | grep -q outage_since",
            )
        })?;
    happens(lab)?;
    lab.start_portal()?;
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        let mut spans = lab.spans("portal.outage")?;
        if spans.len() > before {
            return Ok(spans.remove(before));
        }
        ensure!(Instant::now() < end, "no span of it\n{}", lab.net.logs());
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// The span that is linked to, which links back to the outage.
fn other_end(lab: &Lab, name: &str, link: &Value, outage: &Value) -> Result<Value> {
    let spans = lab.spans(name)?;
    let span = spans
        .iter()
        .find(|span| span["span_id"] == link["span_id"])
        .with_context(|| format!("{link} is not in {spans:?}"))?;
    let back = links(span, "outage");
    ensure!(
        back.len() == 1 && back[0]["span_id"] == outage["span_id"],
        "{span} does not link to {outage}"
    );
    Ok(span.clone())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn the_trace_of_an_outage_tells_whom_it_cut_and_whom_something_else_did() -> Result<()> {
    let mut lab = Lab::new("outage-trace", gateway())?;
    lab.block_direct()?;
    lab.start_surroundings()?;
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    lab.reach(20)?;
    lab.expect_path(|path| path.starts_with("relay"), 5)?;

    // Long enough for several attempts, and nobody is cut.
    let quiet = outage(&mut lab, |lab| {
        std::thread::sleep(Duration::from_secs(4));
        lab.reach(2).map(drop)
    })?;
    ensure!(
        quiet["attributes"]["portal.outage.outcome"] == "joined" && quiet["status"]["code"] == "ok",
        "{quiet}"
    );
    for (name, wanted) in [
        ("clients", 1),
        ("clients_relayed", 1),
        ("clients_lost", 0),
        ("clients_lost_relayed", 0),
        ("clients_lost_by_portal", 0),
        ("relays_lost", 0),
        ("relays_lost_by_portal", 0),
    ] {
        ensure!(count(&quiet, name) == wanted, "{name}: {quiet}");
    }
    let attempts = links(&quiet, "attempt");
    let numbers: Vec<i64> = attempts
        .iter()
        .filter_map(|link| link["attributes"]["portal.attempt"].as_i64())
        .collect();
    ensure!(
        numbers.len() >= 2 && numbers.is_sorted() && numbers[0] < numbers[1],
        "{quiet}"
    );
    for link in attempts {
        let told = &link["attributes"];
        ensure!(
            told["portal.cause"].is_string()
                && told["portal.backoff.delay_ms"].is_i64()
                && told["error.type"] == "tcp_connect",
            "{link}"
        );
        other_end(&lab, "portal.connect", link, &quiet)?;
    }
    // The session that was lost, and the one that came.
    ensure!(links(&quiet, "session").len() == 2, "{quiet}");

    let cut = outage(&mut lab, |lab| {
        lab.net.kill("coturn")?;
        lab.net
            .eventually("the relay is given up", Duration::from_secs(60), |net| {
                let status = net.output("gateway", "curl -s http://127.0.0.1:8080/status")?;
                let status: Value = serde_json::from_str(&status)?;
                let usable = status["relays"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(|relay| relay["state"] == "usable"));
                let path = &status["clients"][0]["path"];
                ensure!(!usable && path.is_null(), "{status}");
                Ok(())
            })?;
        lab.start_relay()
    })?;
    ensure!(
        count(&cut, "clients_relayed") == 1
            && count(&cut, "clients_lost_relayed") >= 1
            && count(&cut, "relays_lost") >= 1,
        "{cut}"
    );
    ensure!(
        count(&cut, "clients_lost_by_portal") == 0 && count(&cut, "relays_lost_by_portal") == 0,
        "{cut}"
    );
    for (kind, name) in [
        ("client_lost", "connection.path"),
        ("relay_lost", "relay.episode"),
    ] {
        let links = links(&cut, kind);
        ensure!(!links.is_empty(), "no {kind}: {cut}");
        for link in links {
            let cause = &link["attributes"]["portal.outage.effect.cause"];
            ensure!(cause == "relay" || cause == "network", "{link}");
            let span = other_end(&lab, name, link, &cut)?;
            ensure!(span["status"]["code"] == "error", "{span}");
        }
    }
    Ok(())
}
