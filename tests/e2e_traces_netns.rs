//! What the gateway exports to a collector, in network namespaces.
//!
//! Needs root, coturn, iproute2, nftables, curl and rotel, a collector that PyPI has; run by
//! `scripts/test`, which installs it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::Lab;
use rustix::process::Signal;
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
    // The backoff is not what is tested here.
    lab.net
        .eventually("the portal answers", Duration::from_secs(5), |net| {
            net.sh("internet", "nc -z 127.0.0.1 8081")
        })?;
    lab.net.signal("gateway", Signal::HUP)?;
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
                    .is_some_and(|all| all.iter().any(|relay| relay["state"] == "allocated"));
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

/// A collector that is not ours passes everything on to ours.
fn start_rotel(lab: &mut Lab) -> Result<()> {
    let agent = std::env::var("FIREZONE_LAB_ROTEL").unwrap_or_else(|_| "rotel-agent".to_owned());
    let pid = lab.net.dir().join("rotel.pid");
    let pid = pid.to_string_lossy().into_owned();
    let args = [
        ["start", "--pid-file"].as_slice(),
        &[&pid, "--otlp-http-endpoint", "0.0.0.0:4328"],
        &["--otlp-grpc-endpoint", "0.0.0.0:4327"],
        &["--exporter", "otlp", "--otlp-exporter-protocol", "http"],
        &["--otlp-exporter-endpoint", "http://127.0.0.1:4318"],
        &["--otlp-exporter-compression", "none"],
    ]
    .concat();
    lab.net
        .start("rotel", "internet", Path::new(&agent), &args, &[])
        .context("set FIREZONE_LAB_ROTEL to rotel-agent of PyPI's package rotel")?;
    lab.net
        .eventually("rotel listens", Duration::from_secs(10), |net| {
            net.sh("internet", "nc -z 127.0.0.1 4328 && nc -z 127.0.0.1 4327")
        })
}

/// What our collector has of one kind.
fn received(lab: &Lab, kind: &str) -> Result<Vec<Value>> {
    let line = format!("curl -sS -f http://127.0.0.1:4318/{kind}");
    let all: Value = serde_json::from_str(&lab.net.output("internet", &line)?)?;
    Ok(all.as_array().context("a list")?.clone())
}

#[test]
#[ignore = "needs root, coturn, rotel and network namespaces"]
fn a_collector_of_others_takes_all_signals_over_both_protocols() -> Result<()> {
    let mut lab = Lab::new("rotel", gateway())?;
    lab.start_surroundings()?;
    start_rotel(&mut lab)?;
    for (protocol, port, compression) in [("http/protobuf", 4328, "none"), ("grpc", 4327, "gzip")] {
        lab.net.sh(
            "internet",
            "curl -sS -f -X DELETE http://127.0.0.1:4318/spans",
        )?;
        let endpoint = format!("http://203.0.113.1:{port}");
        lab.start_gateway(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", compression),
            ("OTEL_BLRP_SCHEDULE_DELAY", "500"),
        ])?;
        lab.wait_ready()?;
        let end = Instant::now() + Duration::from_secs(20);
        let (spans, lines) = loop {
            let spans = received(&lab, "spans")?;
            let lines = received(&lab, "logs")?;
            let metrics = received(&lab, "metrics")?;
            let joined = lines.iter().any(|l| l["body"] == "connected to the portal");
            let attempt = spans.iter().any(|s| s["name"] == "portal.connect");
            if joined && attempt && metrics.iter().any(|m| m == "gateway.portal.state") {
                break (spans, lines);
            }
            ensure!(
                Instant::now() < end,
                "{protocol}: {spans:?}\n{lines:?}\n{metrics:?}\n{}",
                lab.net.logs()
            );
            std::thread::sleep(Duration::from_millis(300));
        };
        let attempt = spans.iter().find(|s| s["name"] == "portal.connect");
        let attempt = attempt.context("an attempt")?;
        for one in [attempt, &lines[0]] {
            let service = &one["resource"]["service.name"];
            ensure!(service == "firezone-gateway", "{protocol}: {one}");
        }
        // The line is found from the span.
        let line = lines
            .iter()
            .find(|l| l["body"] == "connected to the portal");
        let line = line.context("the line")?;
        ensure!(
            line["trace_id"] == attempt["trace_id"] && line["span_id"] == attempt["span_id"],
            "{protocol}: {line} {attempt}"
        );

        // The last words arrive, too.
        lab.net.signal("gateway", Signal::TERM)?;
        let status = lab.net.wait("gateway", Duration::from_secs(5))?;
        ensure!(status.success(), "{protocol}: {status}");
        lab.net
            .eventually("the last line arrives", Duration::from_secs(5), |net| {
                net.sh(
                    "internet",
                    "curl -sS -f http://127.0.0.1:4318/logs | grep -q 'Shutting down'",
                )
            })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_collector_that_does_not_answer_costs_a_line_a_signal_and_no_time() -> Result<()> {
    let mut lab = Lab::new("silent", gateway())?;
    lab.start_surroundings()?;
    // Takes connections and says nothing.
    let args = ["-l", "-k", "-p", "4399"];
    lab.net
        .start("silent", "internet", Path::new("nc"), &args, &[])?;
    for protocol in ["http/protobuf", "grpc"] {
        let said_before = lab.net.whole_log("gateway").len();
        lab.start_gateway(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://203.0.113.1:4399"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "500"),
            ("RUST_LOG", "trace"),
        ])?;
        lab.wait_ready()?;
        lab.net.eventually(
            "all signals fail, metrics again and again",
            Duration::from_secs(30),
            |net| {
                let metrics = net.output("gateway", "curl -sS http://127.0.0.1:8080/metrics")?;
                for signal in ["traces", "metrics", "logs"] {
                    let name =
                        format!("gateway_telemetry_export_failures_total{{signal=\"{signal}\"}} ");
                    let failures = metrics.lines().find_map(|l| l.strip_prefix(&name));
                    let failures: f64 = failures.context("the counter")?.parse()?;
                    let wanted = if signal == "metrics" { 3.0 } else { 1.0 };
                    ensure!(failures >= wanted, "{signal}: {failures}");
                }
                Ok(())
            },
        )?;
        lab.net
            .sh("gateway", "curl -sf http://127.0.0.1:8080/livez >/dev/null")?;
        lab.net.signal("gateway", Signal::TERM)?;
        let status = lab.net.wait("gateway", Duration::from_secs(3))?;
        ensure!(status.success(), "{protocol}: {status}");
        let log = lab.net.whole_log("gateway").split_off(said_before);
        for what in ["spans", "metrics", "log lines"] {
            let line = format!("{what} cannot be delivered");
            let said: Vec<_> = log.lines().filter(|l| l.contains(&line)).collect();
            ensure!(
                said.len() == 1 && said[0].contains("no answer within 0.5 s"),
                "{protocol}: {said:?}"
            );
        }
    }
    Ok(())
}
