#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashSet};

use super::*;
use crate::admin::model::{
    BackoffStatus, DnsStatus, FlowLogStatus, HandshakeStatus, HostFinding, RelayStatus,
    TrafficStatus,
};
use crate::telemetry::durations::Timing;

const NOW: f64 = 1_800_000_100.0;

/// A status in which everything has happened.
fn status() -> Status {
    let mut status = Status {
        started_at: NOW - 100.0,
        ..Status::default()
    };
    status.portal.state = PortalState::Waiting;
    status.portal.attempts = 7;
    status.portal.joins = 2;
    status.portal.last_message_at = Some(NOW - 30.0);
    status.portal.backoff = Some(BackoffStatus {
        outage_since: NOW - 20.0,
        attempt: 3,
        next_attempt_at: Some(NOW + 4.0),
        budget_left: Some(60.0),
        ..BackoffStatus::default()
    });
    status.relays = [
        ("allocated", Some(0.2)),
        ("allocated", Some(0.1)),
        ("failed", None),
    ]
    .map(|(state, rtt)| RelayStatus {
        id: "secret-relay-id".into(),
        addresses: vec!["203.0.113.1:3478".into()],
        state: state.into(),
        rtt,
        ..RelayStatus::default()
    })
    .into();
    status.clients = [Some("direct"), Some("direct"), Some("relay_both"), None]
        .map(|path| ClientStatus {
            id: "secret-client-id".into(),
            addresses: vec!["100.64.0.9".into()],
            path: path.map(str::to_owned),
            ..ClientStatus::default()
        })
        .into_iter()
        .collect();
    status.traffic = TrafficStatus {
        rx_bytes: 1,
        tx_bytes: 2,
        rx_packets: 3,
        tx_packets: 4,
    };
    status.dropped = BTreeMap::from([("no_grant".into(), 5), ("no_flow".into(), 6)]);
    status.handshakes = HandshakeStatus {
        admitted: 8,
        ..HandshakeStatus::default()
    };
    status.flows = 9;
    status.dns = DnsStatus {
        answered: 10,
        ..DnsStatus::default()
    };
    status.flow_logs = FlowLogStatus {
        uploaded: 11,
        spool_bytes: 12,
        ..FlowLogStatus::default()
    };
    status.device.up = true;
    status.host = vec![HostFinding {
        name: "udp_buffers".into(),
        level: "warning".into(),
        ..HostFinding::default()
    }];
    status
}

fn metrics(status: Status) -> Metrics {
    let status = Arc::new(status);
    let resource = Resource::builder_empty()
        .with_attribute(KeyValue::new("service.name", "firezone-gateway"))
        .build();
    let metrics = Metrics::new(resource, None, move || Reading {
        status: Arc::clone(&status),
        unix: NOW,
        health: [true, true, false],
    })
    .unwrap();
    let took = Duration::from_millis(60);
    for timing in [
        Timing::PortalConnect { took, error: None },
        Timing::PortalConnect {
            took: 30 * took,
            error: Some("tcp_connect"),
        },
        Timing::PortalOutage {
            took: 2000 * took,
            outcome: "joined",
        },
        Timing::RelayAllocate { took },
        Timing::RelayAllocate { took: 2 * took },
        Timing::ClientSetUp {
            took,
            path: Some("direct"),
            error: None,
        },
        Timing::ClientSetUp {
            took: 200 * took,
            path: None,
            error: Some("no_path"),
        },
    ] {
        metrics.durations().note(timing);
    }
    metrics
}

/// Names in the text format, and for histograms what its samples are called, too.
fn sample_names(text: &str) -> HashSet<&str> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let names = samples.filter_map(|line| line.split(['{', ' ']).next());
    names
        .flat_map(|name| {
            let histogram = name.strip_suffix("_bucket");
            histogram.into_iter().chain([name])
        })
        .collect()
}

fn lines(status: Status) -> Vec<String> {
    let text = metrics(status).render().unwrap();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.map(str::to_owned).collect()
}

#[test]
fn everything_is_told_under_the_names_that_dashboards_use() {
    let lines = lines(status());
    for expected in [
        "gateway_health{probe=\"live\"} 1",
        "gateway_health{probe=\"ready\"} 0",
        "gateway_uptime_seconds 100",
        "gateway_portal_state{state=\"waiting\"} 1",
        "gateway_portal_state{state=\"joined\"} 0",
        "gateway_portal_connection_attempts_total 7",
        "gateway_portal_joins_total 2",
        "gateway_portal_outage_duration_seconds 20",
        "gateway_portal_outage_failures 3",
        "gateway_portal_backoff_next_attempt_seconds 4",
        "gateway_portal_backoff_budget_seconds 60",
        "gateway_portal_last_message_age_seconds 30",
        "gateway_relays{state=\"allocated\"} 2",
        "gateway_relays{state=\"failed\"} 1",
        "gateway_relay_rtt_seconds 0.1",
        "gateway_clients{client_path=\"direct\"} 2",
        "gateway_clients{client_path=\"relay_both\"} 1",
        "gateway_clients{client_path=\"none\"} 1",
        "gateway_portal_connect_duration_seconds_count 1",
        "gateway_portal_connect_duration_seconds_bucket{le=\"0.05\"} 0",
        "gateway_portal_connect_duration_seconds_bucket{le=\"0.075\"} 1",
        "gateway_portal_connect_duration_seconds_sum{error_type=\"tcp_connect\"} 1.8",
        "gateway_portal_outage_length_seconds_bucket{outcome=\"joined\",le=\"60\"} 0",
        "gateway_portal_outage_length_seconds_bucket{outcome=\"joined\",le=\"120\"} 1",
        "gateway_relay_allocate_duration_seconds_count 2",
        "gateway_relay_allocate_duration_seconds_bucket{le=\"0.25\"} 2",
        "gateway_client_setup_duration_seconds_count{client_path=\"direct\"} 1",
        "gateway_client_setup_duration_seconds_bucket{error_type=\"no_path\",le=\"10\"} 0",
        "gateway_client_setup_duration_seconds_bucket{error_type=\"no_path\",le=\"+Inf\"} 1",
        "gateway_network_io_bytes_total{network_io_direction=\"receive\"} 1",
        "gateway_network_packets_total{network_io_direction=\"transmit\"} 4",
        "gateway_network_packets_dropped_total{error_type=\"no_flow\"} 6",
        "gateway_wireguard_handshakes_total{outcome=\"admitted\"} 8",
        "gateway_flows 9",
        "gateway_dns_queries_total{outcome=\"answered\"} 10",
        "gateway_flow_logs_records_total{outcome=\"uploaded\"} 11",
        "gateway_flow_logs_spool_bytes 12",
        "gateway_telemetry_export_failures_total{signal=\"logs\"} 0",
        "gateway_device_up 1",
        "gateway_host_findings{level=\"warning\"} 1",
        "target_info{service_name=\"firezone-gateway\"} 1",
    ] {
        assert!(
            lines.iter().any(|l| l == expected),
            "{expected}: {lines:#?}"
        );
    }
    for prefix in [
        "process_cpu_time_seconds_total{cpu_mode=\"user\"} ",
        "process_memory_usage_bytes ",
    ] {
        let value = lines.iter().find_map(|l| l.strip_prefix(prefix)).unwrap();
        assert!(value.parse::<f64>().is_ok(), "{prefix}{value}");
    }
}

#[test]
fn what_is_not_known_is_absent_and_not_zero() {
    let lines = lines(Status::default());
    for absent in [
        "gateway_portal_backoff_next_attempt",
        "gateway_portal_backoff_budget",
        "gateway_portal_last_message_age",
        "gateway_relay_rtt",
    ] {
        assert!(!lines.iter().any(|l| l.starts_with(absent)), "{absent}");
    }
    let outage = "gateway_portal_outage_duration_seconds 0";
    assert!(lines.iter().any(|l| l == outage), "{lines:#?}");
}

#[test]
fn nothing_tells_who_is_who() {
    let text = metrics(status()).render().unwrap();
    for secret in [
        "secret-client-id",
        "secret-relay-id",
        "100.64.0.9",
        "203.0.113.1",
    ] {
        assert!(!text.contains(secret), "{secret}");
    }
}

#[test]
fn names_are_distinct_and_explained() {
    let mut seen = HashSet::new();
    for definition in ALL {
        assert!(seen.insert(definition.name), "{}", definition.name);
        assert!(!definition.description.is_empty());
        // Prometheus would append words for these.
        assert!(definition.unit != "1" && definition.unit != "%");
    }
}

#[test]
fn every_instrument_is_documented() {
    let page = include_str!("../../docs/metrics.md");
    for Definition {
        name, description, ..
    } in ALL
    {
        let row = page.lines().find(|l| l.contains(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("{name} is not in docs/metrics.md"));
        assert!(row.contains(description), "{name}: {row}");
        let prometheus = row.split('`').nth(1).unwrap();
        let text = metrics(status()).render().unwrap();
        assert!(sample_names(&text).contains(prometheus), "{prometheus}");
    }
}

#[test]
fn counters_and_gauges_are_what_they_say() {
    let text = metrics(status()).render().unwrap();
    for definition in ALL {
        let name = definition.name.replace('.', "_");
        let kind = match definition.kind {
            Kind::Counter => " counter",
            Kind::Gauge => " gauge",
            Kind::Histogram(_) => " histogram",
        };
        let lines = text.lines().filter(|l| l.starts_with("# TYPE "));
        let mut told =
            lines.filter(|l| l["# TYPE ".len()..].starts_with(&name) && l.ends_with(kind));
        assert!(told.next().is_some(), "{name}{kind}\n{text}");
    }
}

#[test]
fn within_one_collection_everybody_is_told_the_same() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let start = Instant::now();
    let now = Arc::new(Mutex::new(start));
    let clock = Arc::clone(&now);
    let read = remembering(
        move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Reading {
                status: Arc::default(),
                unix: NOW,
                health: [true; 3],
            }
        },
        move || *clock.lock().unwrap(),
    );
    let first = read();
    *now.lock().unwrap() = start + LASTS - Duration::from_millis(1);
    // Each instrument has a handle of its own.
    assert!(Arc::ptr_eq(&first, &read.clone()()));
    assert_eq!(asked.load(Ordering::Relaxed), 1);

    *now.lock().unwrap() = start + LASTS;
    assert!(!Arc::ptr_eq(&first, &read()), "the next collection");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

/// Every word of a file that looks like one of our metrics.
fn metrics_named_in(text: &str) -> HashSet<&str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("gateway_") || word.starts_with("process_"))
        .collect()
}

#[test]
fn rules_and_documents_name_only_metrics_that_exist() {
    let text = metrics(status()).render().unwrap();
    let known = sample_names(&text);
    for (file, content) in [
        (
            "rules.yaml",
            include_str!("../../compose/observability/rules.yaml"),
        ),
        (
            "rules_test.yaml",
            include_str!("../../compose/observability/rules_test.yaml"),
        ),
        ("metrics.md", include_str!("../../docs/metrics.md")),
        ("runbook.md", include_str!("../../docs/runbook.md")),
        (
            "portal.json",
            include_str!("../../compose/observability/dashboards/portal.json"),
        ),
        (
            "relays.json",
            include_str!("../../compose/observability/dashboards/relays.json"),
        ),
        (
            "data.json",
            include_str!("../../compose/observability/dashboards/data.json"),
        ),
    ] {
        let named = metrics_named_in(content);
        // The runbook speaks of alerts and is free to do without.
        assert!(named.len() > 2 || file == "runbook.md", "{file}");
        for name in named {
            assert!(known.contains(name), "{file}: {name}");
        }
    }
}

#[test]
fn dashboards_are_json_and_ask_for_what_they_show() {
    for file in [
        include_str!("../../compose/observability/dashboards/portal.json"),
        include_str!("../../compose/observability/dashboards/relays.json"),
        include_str!("../../compose/observability/dashboards/data.json"),
    ] {
        let dashboard: serde_json::Value = serde_json::from_str(file).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        assert!(panels.len() >= 4, "{}", dashboard["title"]);
        for panel in panels {
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{}", panel["title"]);
            for target in targets {
                let expression = target["expr"].as_str().unwrap();
                assert!(!metrics_named_in(expression).is_empty(), "{expression}");
            }
        }
    }
}

#[test]
fn every_alert_has_its_page_in_the_runbook() {
    let rules = include_str!("../../compose/observability/rules.yaml");
    let runbook = include_str!("../../docs/runbook.md");
    let alerts: Vec<&str> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    assert!(alerts.len() >= 10, "{alerts:?}");
    for alert in alerts {
        let link = format!("docs/runbook.md#{}", alert.to_ascii_lowercase());
        assert!(rules.contains(&link), "{alert} has no link");
        assert!(
            runbook.contains(&format!("\n## {alert}\n")),
            "{alert} has no page"
        );
    }
}

#[test]
fn every_alert_is_tested_to_fire_and_to_keep_quiet() {
    let rules = include_str!("../../compose/observability/rules.yaml");
    let tests = include_str!("../../compose/observability/rules_test.yaml");
    let healthy = tests.split("\n  - interval: ").nth(1).unwrap();
    assert!(healthy.contains("a healthy gateway alarms nobody"));
    for alert in rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
    {
        let quiet = format!("alertname: {alert}, exp_alerts: []}}");
        assert!(healthy.contains(&quiet), "{alert} when all is well");
        let fires = format!("alertname: {alert}\n        exp_alerts:\n          - exp_labels:");
        assert!(tests.contains(&fires), "{alert} never fires");
    }
}
