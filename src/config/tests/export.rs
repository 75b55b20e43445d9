//! Where spans, metrics and logs go.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn export_that_cannot_be_followed_is_told_and_does_not_stop_the_gateway() {
    let notices = notices(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
    ]);
    assert_eq!(notices.len(), 1);
    assert!(
        notices[0].contains("no spans, no metrics and no log lines are exported")
            && notices[0].contains("http/protobuf"),
        "{notices:?}"
    );
}

#[test]
fn what_of_an_export_cannot_be_followed_is_told_once_and_without_secrets() {
    let notices = notices(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
        ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "soon"),
    ]);
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert!(notices[0].starts_with("OTEL_EXPORTER_OTLP_HEADERS: entry 1"));
    assert!(notices[1].starts_with("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT: not a number"));
    assert!(!format!("{notices:?}").contains("hunter2"), "{notices:?}");
}

#[test]
fn what_keeps_metrics_alone_from_being_pushed_is_told() {
    const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let no_spans = ("OTEL_TRACES_EXPORTER", "none");
    let no_logs = ("OTEL_LOGS_EXPORTER", "none");
    for (variables, named) in [
        ([no_spans, (ENDPOINT, "ftp://c")], ENDPOINT),
        (
            [no_spans, ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "c:4318")],
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        ),
        (
            [
                (ENDPOINT, "http://c:4318"),
                ("OTEL_METRICS_EXPORTER", "console"),
            ],
            "OTEL_METRICS_EXPORTER",
        ),
        (
            [
                (ENDPOINT, "http://c:4318"),
                ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json"),
            ],
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
        ),
    ] {
        let told = notices(&[variables.as_slice(), &[no_logs]].concat());
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with(named) && told[0].contains("no metrics are exported"),
            "{named}: {told:?}"
        );
    }
    let told = notices(&[
        no_spans,
        no_logs,
        (ENDPOINT, "http://c:4317"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "thrift"),
    ]);
    assert!(
        told.len() == 1 && told[0].starts_with("OTEL_EXPORTER_OTLP_PROTOCOL: no metrics"),
        "{told:?}"
    );
}

#[test]
fn where_spans_and_metrics_go_is_shown_for_each_of_them() {
    let shown = |variables: &[(&str, &str)]| {
        examine(&Settings::default(), &with_token(variables), &host())
            .settings
            .into_iter()
            .filter(|setting| setting.name.starts_with("OTEL_"))
            .map(|setting| format!("{} {} ({})", setting.name, setting.value, setting.source))
            .collect::<Vec<_>>()
    };
    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
    assert_eq!(
        shown(&[]),
        [
            "OTEL_EXPORTER_OTLP_ENDPOINT no spans, no metrics and no log lines are exported: no \
             endpoint is set (default)"
        ]
    );
    assert_eq!(
        shown(&[ENDPOINT]),
        [
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/traces (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/metrics (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/logs (environment)",
        ]
    );
    assert_eq!(
        shown(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")]),
        [
            "OTEL_TRACES_EXPORTER no spans are exported: switched off (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/metrics (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/logs (environment)",
        ]
    );
    assert_eq!(
        shown(&[("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://m/x")]),
        [
            "OTEL_EXPORTER_OTLP_ENDPOINT no spans and no log lines are exported: no endpoint is set \
             (default)",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT http://m/x (environment)",
        ]
    );
}
