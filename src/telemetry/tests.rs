#![allow(clippy::unwrap_used)]

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write},
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_sdk::error::OTelSdkError;
use prost::Message as _;

use super::*;
use crate::config::FixedEnv;

#[derive(Clone, Default)]
pub(super) struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn options(filter: &str, format: LogFormat, collector: Option<SocketAddr>) -> Options {
    let env: FixedEnv = collector
        .map(|address| {
            (
                "OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(),
                format!("http://{address}"),
            )
        })
        .into_iter()
        .collect();
    Options {
        log_format: format,
        log_filter: filter.to_owned(),
        log_filter_file: None,
        export: Export::decide(&env, Signal::Traces),
        metrics: Export::decide(&env, Signal::Metrics),
        logs: Export::decide(&env, Signal::Logs),
        resource: resource_attributes(&env, "edge-7"),
    }
}

struct Request {
    line: String,
    headers: String,
    body: Vec<u8>,
}

/// A collector that takes one request after another and hands them out.
fn collector() -> (SocketAddr, mpsc::Receiver<Request>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (requests, received) = mpsc::channel();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let mut reader = BufReader::new(&stream);
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let mut headers = String::new();
            loop {
                let before = headers.len();
                reader.read_line(&mut headers).unwrap();
                if headers[before..].trim().is_empty() {
                    break;
                }
            }
            let length = headers
                .to_lowercase()
                .lines()
                .find_map(|header| header.strip_prefix("content-length:")?.trim().parse().ok())
                .unwrap();
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            (&stream)
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .unwrap();
            let request = Request {
                line,
                headers,
                body,
            };
            if requests.send(request).is_err() {
                break;
            }
        }
    });
    (address, received)
}

fn contains(body: &[u8], text: &str) -> bool {
    body.windows(text.len())
        .any(|window| window == text.as_bytes())
}

#[test]
fn spans_reach_the_collector_within_shutdown_whatever_rust_log_says() {
    let (address, received) = collector();
    let output = Output::default();
    let options = options("off", LogFormat::Human, Some(address));
    let (subscriber, guard, problems) =
        assemble(&options, Box::new(output.clone()), false).unwrap();
    assert!(problems.is_empty() && guard.exports_traces());

    tracing::subscriber::with_default(subscriber, || {
        tracing::info_span!("portal.connect", "portal.attempt" = 3).in_scope(|| {});
        tracing::info_span!(target: "hyper", "foreign.span").in_scope(|| {});
        tracing::debug_span!("verbose.span").in_scope(|| {});
    });

    assert!(guard.shutdown(Duration::from_secs(20)));
    let request = received
        .try_recv()
        .expect("delivered before shutdown returned");
    assert!(
        request.line.starts_with("POST /v1/traces "),
        "{}",
        request.line
    );
    assert!(
        request
            .headers
            .to_lowercase()
            .contains("content-type: application/x-protobuf"),
        "{}",
        request.headers
    );
    for text in ["portal.connect", "service.name", "firezone-gateway"] {
        assert!(contains(&request.body, text), "{text} is missing");
    }
    for text in ["foreign.span", "verbose.span", "edge-7"] {
        assert!(!contains(&request.body, text), "{text} was exported");
    }
    assert_eq!(output.text(), "", "RUST_LOG=off");
}

#[test]
fn collector_that_never_answers_does_not_hold_up_shutdown() {
    // Connections land in the backlog and are never answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = options("off", LogFormat::Human, Some(silent.local_addr().unwrap()));
    let (subscriber, guard, _) = assemble(&options, Box::new(io::sink()), false).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        tracing::info_span!("portal.connect").in_scope(|| {});
    });

    let begin = Instant::now();
    let all_done = guard.shutdown(Duration::from_millis(300));

    assert!(!all_done);
    // The exporter itself would wait 10 s.
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn refused_export_is_counted() {
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let options = options("off", LogFormat::Human, Some(closed));
    let (subscriber, guard, _) = assemble(&options, Box::new(io::sink()), false).unwrap();
    let failures = guard.failures.clone();
    assert_eq!(guard.failed_exports(), 0);
    tracing::subscriber::with_default(subscriber, || {
        tracing::info_span!("portal.connect").in_scope(|| {});
    });

    guard.shutdown(Duration::from_secs(30));

    assert_eq!(failures.total(), 1);
}

/// Pushes what there is to an address once, and returns how often that failed.
fn push_once(collector: SocketAddr) -> u64 {
    let options = options("off", LogFormat::Human, Some(collector));
    let failures = Failures::default();
    let push = metric_exporter(options.metrics.target().unwrap(), failures.clone()).unwrap();
    let read = || metrics::Reading {
        status: Arc::default(),
        unix: 0.0,
        health: [true; 3],
    };
    let metrics = metrics::Metrics::new(resource(&options), Some(push), read).unwrap();
    metrics.shutdown();
    failures.total()
}

#[test]
fn metrics_are_pushed_and_a_collector_that_refuses_them_is_noticed() {
    let (address, received) = collector();
    assert_eq!(push_once(address), 0);
    let request = received.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(
        request.line.starts_with("POST /v1/metrics "),
        "{}",
        request.line
    );
    assert!(contains(&request.body, "gateway.health"));

    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    assert_eq!(push_once(closed), 1);
}

#[test]
fn all_signals_complain_about_a_dead_collector_by_name() {
    let output = Output::default();
    let options = options(DEFAULT_FILTER, LogFormat::Human, None);
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        for signal in [Signal::Traces, Signal::Metrics, Signal::Logs] {
            let trouble = Trouble::default();
            let watched = Watched::new((), signal, Failures::default(), trouble.clone());
            let failed = || Err(OTelSdkError::InternalFailure("network error".into()));
            trouble.set(Some("connection refused".to_owned()));
            watched.note(&failed());
            watched.note(&failed());
        }
    });
    assert!(guard.shutdown(Duration::from_secs(10)));
    let text = output.text();
    for what in ["spans", "metrics", "log lines"] {
        let line = format!("{what} cannot be delivered");
        assert_eq!(text.matches(&line).count(), 1, "{text}");
    }
    assert!(text.contains("connection refused"), "{text}");
}

#[test]
fn without_an_endpoint_lines_are_logged_and_nothing_is_exported() {
    let output = Output::default();
    let options = options(DEFAULT_FILTER, LogFormat::Human, None);
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
    assert!(!guard.exports_traces());

    tracing::subscriber::with_default(subscriber, || {
        tracing::info!(attempt = 3, "joined");
        tracing::debug!("details");
    });

    assert!(guard.shutdown(Duration::from_secs(10)));
    let text = output.text();
    assert!(
        text.contains("joined") && text.contains("attempt=3"),
        "{text}"
    );
    assert!(!text.contains("details"), "{text}");
    assert!(!text.contains('\u{1b}'), "no colour unless on a terminal");
}

#[test]
fn json_lines_are_one_object_each() {
    let output = Output::default();
    let options = options("debug", LogFormat::Json, None);
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();

    tracing::subscriber::with_default(subscriber, || {
        tracing::info!(attempt = 3, "joined\nor \"not\"");
        tracing::debug!("details");
    });

    assert!(guard.shutdown(Duration::from_secs(10)));
    let text = output.text();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["message"], "joined\nor \"not\"");
    assert_eq!(lines[0]["attempt"], 3);
    assert_eq!(lines[1]["level"], "DEBUG");
}

#[test]
fn json_lines_of_an_exported_span_have_its_ids_whatever_the_level() {
    let (address, _received) = collector();
    for filter in ["info", "warn"] {
        let output = Output::default();
        let options = options(filter, LogFormat::Json, Some(address));
        let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
        let ids = tracing::subscriber::with_default(subscriber, || {
            tracing::warn!("outside");
            tracing::info_span!("portal.connect").in_scope(|| {
                tracing::warn!(attempt = 3, "inside");
                let current = opentelemetry::Context::current();
                let span = current.span().span_context().clone();
                (span.trace_id().to_string(), span.span_id().to_string())
            })
        });
        assert!(guard.shutdown(Duration::from_secs(10)));
        let text = output.text();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].get("trace_id").is_none(), "{text}");
        assert_eq!((ids.0.len(), ids.1.len()), (32, 16));
        assert_eq!(lines[1]["trace_id"], ids.0, "{text}");
        assert_eq!(lines[1]["span_id"], ids.1, "{text}");
        assert_eq!(lines[1]["attempt"], 3, "{text}");
    }
}

/// What of the requests went to a path, decoded.
fn logs(received: &mpsc::Receiver<Request>) -> Vec<LogRecord> {
    received
        .try_iter()
        .filter(|request| request.line.starts_with("POST /v1/logs "))
        .map(|request| ExportLogsServiceRequest::decode(request.body.as_slice()).unwrap())
        .flat_map(|request| request.resource_logs)
        .flat_map(|resource| resource.scope_logs)
        .flat_map(|scope| scope.log_records)
        .collect()
}

fn body(record: &LogRecord) -> &str {
    match record.body.as_ref().and_then(|body| body.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn log_lines_that_are_written_are_exported_with_the_ids_of_their_span() {
    let (address, received) = collector();
    let output = Output::default();
    let options = options("info", LogFormat::Human, Some(address));
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        tracing::debug!("details");
        tracing::info_span!("portal.connect").in_scope(|| tracing::warn!(attempt = 3, "no answer"));
        tracing::info!("joined");
    });
    assert!(guard.shutdown(Duration::from_secs(10)));
    let records = logs(&received);
    let bodies: Vec<_> = records.iter().map(body).collect();
    assert_eq!(bodies, ["no answer", "joined"]);
    assert_eq!(records[0].severity_text, "WARN");
    assert_eq!(records[0].attributes[0].key, "attempt");
    assert_eq!(
        (records[0].trace_id.len(), records[0].span_id.len()),
        (16, 8)
    );
    assert!(records[1].trace_id.is_empty());
    assert!(output.text().contains("joined"));
}

#[test]
fn a_collector_that_takes_no_log_lines_costs_neither_time_nor_memory() {
    // Connections land in the backlog and are never answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = options("info", LogFormat::Human, Some(silent.local_addr().unwrap()));
    let (subscriber, guard, _) = assemble(&options, Box::new(io::sink()), false).unwrap();
    let begin = Instant::now();
    tracing::subscriber::with_default(subscriber, || {
        for n in 0..20_000 {
            tracing::info!(n, "something happened");
        }
    });
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    let begin = Instant::now();
    assert!(!guard.shutdown(Duration::from_millis(300)));
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_certificate_that_cannot_be_read_is_told_by_name() {
    let env: FixedEnv = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://127.0.0.1:1"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nonexistent/ca.pem"),
        ("OTEL_LOGS_EXPORTER", "none"),
    ]
    .into_iter()
    .collect();
    let options = Options {
        export: Export::decide(&env, Signal::Traces),
        logs: Export::decide(&env, Signal::Logs),
        ..options("info", LogFormat::Human, None)
    };
    let (_, guard, problems) = assemble(&options, Box::new(io::sink()), false).unwrap();
    assert!(!guard.exports_traces());
    let [(Signal::Traces, error)] = problems.as_slice() else {
        panic!("{problems:?}");
    };
    assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
}

#[test]
fn broken_filter_is_an_error() {
    let options = options("info,=,=", LogFormat::Human, None);
    assert!(matches!(
        assemble(&options, Box::new(io::sink()), false),
        Err(InitError::Filter(_))
    ));
}

#[test]
fn a_library_that_repeats_itself_is_held_back_and_ours_is_not() {
    let output = Output::default();
    let options = options("info", LogFormat::Human, None);
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
    let control = guard.log_control();
    tracing::subscriber::with_default(subscriber, || {
        for n in 0..100 {
            // What the ICE library says of a message that anybody can send.
            tracing::warn!(target: "is::stun", "STUN got UnknownAttributes");
            tracing::info!(target: "firezone_gateway::gateway", n, "ours");
            tracing::info!(target: "flow_logs", n, "a flow");
        }
        control.tell();
        control.tell();
    });

    assert!(guard.shutdown(Duration::from_secs(1)));

    let text = output.text();
    assert_eq!(text.matches("UnknownAttributes").count(), 5, "{text}");
    assert_eq!(text.matches("ours").count(), 100);
    assert_eq!(text.matches("a flow").count(), 100);
    let told = r#"A library repeats itself library="is::stun" suppressed=95"#;
    assert_eq!(text.matches(told).count(), 1, "{text}");
}

#[test]
fn who_wants_to_debug_a_library_gets_all_of_it() {
    let output = Output::default();
    let options = options("is=debug", LogFormat::Human, None);
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        for _ in 0..100 {
            tracing::debug!(target: "is::stun", "detail");
        }
    });

    assert!(guard.shutdown(Duration::from_secs(1)));

    assert_eq!(output.text().matches("detail").count(), 100);
}

#[test]
fn the_filter_changes_while_the_process_runs_and_every_change_is_told() {
    let output = Output::default();
    let options = options("info", LogFormat::Human, None);
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
    let control = guard.log_control();
    let say = |n: u32| {
        tracing::info!(n, "info");
        tracing::debug!(n, "debug");
    };
    tracing::subscriber::with_default(subscriber, || {
        say(1);
        control.set_filter(" debug\n", "admin").unwrap();
        say(2);
        control.set_filter("off", "admin").unwrap();
        say(3);
        for wrong in [
            "",
            "  ",
            "a=b=c",
            "firezone_gateway=loud",
            &"x".repeat(5000),
        ] {
            assert!(control.set_filter(wrong, "admin").is_err(), "{wrong}");
        }
        assert_eq!(control.filter(), "off");
        control.reset_filter("SIGHUP").unwrap();
        control.reset_filter("SIGHUP").unwrap();
        say(4);
    });

    assert!(guard.shutdown(Duration::from_secs(1)));

    let text = output.text();
    let lines: Vec<&str> = text
        .lines()
        .map(|line| line.rsplit_once(": ").unwrap().1)
        .collect();
    let changed = |old: &str, new: &str, by: &str| {
        format!("Another log filter is in force old={old:?} new={new:?} by={by:?}")
    };
    assert_eq!(
        lines,
        [
            "info n=1",
            &changed("info", "debug", "admin"),
            "info n=2",
            "debug n=2",
            &changed("debug", "off", "admin"),
            &changed("off", "info", "SIGHUP"),
            "info n=4",
        ],
        "{text}"
    );
}

#[test]
fn a_file_with_the_filter_is_read_again_and_one_that_went_wrong_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("filter");
    let options = Options {
        log_filter_file: Some(file.clone()),
        ..options("warn", LogFormat::Human, None)
    };
    let (_subscriber, guard, _) = assemble(&options, Box::new(io::sink()), false).unwrap();
    let control = guard.log_control();
    std::fs::write(&file, "info,firezone_gateway::portal=debug\n").unwrap();
    control.reset_filter("SIGHUP").unwrap();
    assert_eq!(control.filter(), "info,firezone_gateway::portal=debug");
    for wrong in [&b"a=b=c"[..], b"", b"\xff\xfe"] {
        std::fs::write(&file, wrong).unwrap();
        assert!(control.reset_filter("SIGHUP").is_err(), "{wrong:?}");
    }
    std::fs::remove_file(&file).unwrap();
    assert!(control.reset_filter("SIGHUP").is_err());
    assert_eq!(control.filter(), "info,firezone_gateway::portal=debug");
}

#[test]
fn the_last_lines_are_kept_whatever_the_filter_says() {
    let options = options("off", LogFormat::Json, None);
    let (subscriber, guard, _) = assemble(&options, Box::new(io::sink()), false).unwrap();
    let control = guard.log_control();
    tracing::subscriber::with_default(subscriber, || {
        tracing::warn!(client = %"c-1", count = 3, "something\nodd");
        tracing::debug!("too much");
        tracing::info!(target: "flow_logs", "too much");
        for _ in 0..100 {
            tracing::warn!(target: "is::stun", "STUN got UnknownAttributes");
        }
    });
    let text = control.recent_lines();
    let first = text.lines().next().unwrap();
    let (time, rest) = first.split_once(' ').unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z'), "{first}");
    assert_eq!(
        rest.trim_start(),
        "WARN firezone_gateway::telemetry::tests: something odd client=c-1 count=3"
    );
    assert!(!text.contains("too much"), "{text}");
    assert_eq!(text.matches("UnknownAttributes").count(), 5, "{text}");
}
