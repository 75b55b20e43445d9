#![allow(clippy::unwrap_used)]

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{
    AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value::Value as Any,
};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{
    ResourceSpans, ScopeSpans, Span, Status, span::Link, span::SpanKind, status::StatusCode as Code,
};
use prost::Message;
use serde_json::json;

use super::{Filter, Store};

fn pair(key: &str, value: Any) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

fn text(value: &str) -> Any {
    Any::StringValue(value.to_owned())
}

fn request(spans: Vec<Span>) -> Bytes {
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(Resource {
                attributes: vec![pair("service.name", text("gateway"))],
                ..Resource::default()
            }),
            scope_spans: vec![ScopeSpans {
                scope: Some(InstrumentationScope {
                    name: "portal".to_owned(),
                    ..InstrumentationScope::default()
                }),
                spans,
                ..ScopeSpans::default()
            }],
            ..ResourceSpans::default()
        }],
    }
    .encode_to_vec()
    .into()
}

fn span(name: &str) -> Span {
    Span {
        name: name.to_owned(),
        trace_id: vec![0xab; 16],
        span_id: vec![0x01; 8],
        ..Span::default()
    }
}

fn protobuf() -> HeaderMap {
    HeaderMap::from_iter([(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/x-protobuf"),
    )])
}

async fn post(store: &Store, headers: HeaderMap, body: Bytes) -> Response {
    super::traces(State(store.clone()), headers, body).await
}

#[tokio::test]
async fn spans_come_back_with_their_attributes_links_status_and_resource() {
    let store = Store::with_capacity(10);
    let sent = Span {
        parent_span_id: vec![0x02; 8],
        kind: SpanKind::Client as i32,
        start_time_unix_nano: 1,
        end_time_unix_nano: 2,
        attributes: vec![
            pair("attempt", Any::IntValue(3)),
            pair("ok", Any::BoolValue(false)),
            pair(
                "addresses",
                Any::ArrayValue(ArrayValue {
                    values: vec![AnyValue {
                        value: Some(text("192.0.2.1")),
                    }],
                }),
            ),
        ],
        links: vec![Link {
            trace_id: vec![0xcd; 16],
            span_id: vec![0x03; 8],
            ..Link::default()
        }],
        status: Some(Status {
            message: "refused".to_owned(),
            code: Code::Error as i32,
        }),
        ..span("connect")
    };
    let response = post(&store, protobuf(), request(vec![sent, span("other")])).await;
    assert_eq!(response.status(), StatusCode::OK);

    let found = store.spans(&Filter {
        name: Some("connect".to_owned()),
        service: Some("gateway".to_owned()),
        ..Filter::default()
    });
    assert_eq!(
        serde_json::to_value(found).unwrap(),
        json!([{
            "name": "connect",
            "trace_id": "ab".repeat(16),
            "span_id": "01".repeat(8),
            "parent_span_id": "02".repeat(8),
            "kind": "client",
            "start_unix_nano": 1,
            "end_unix_nano": 2,
            "attributes": {"attempt": 3, "ok": false, "addresses": ["192.0.2.1"]},
            "events": [],
            "links": [{"trace_id": "cd".repeat(16), "span_id": "03".repeat(8), "attributes": {}}],
            "status": {"code": "error", "message": "refused"},
            "resource": {"service.name": "gateway"},
            "scope": "portal",
        }])
    );
    let roots = store.spans(&Filter {
        parent_span_id: Some(String::new()),
        ..Filter::default()
    });
    assert_eq!(roots.len(), 1);
    assert_eq!(roots[0].name, "other");
}

#[tokio::test]
async fn oldest_spans_go_first_when_full() {
    let store = Store::with_capacity(2);
    post(
        &store,
        protobuf(),
        request(vec![span("a"), span("b"), span("c")]),
    )
    .await;
    let names: Vec<_> = store
        .spans(&Filter::default())
        .into_iter()
        .map(|span| span.name)
        .collect();
    assert_eq!(names, ["b", "c"]);
    assert_eq!(store.stats().spans, 3);
}

#[tokio::test]
async fn json_and_broken_requests_are_refused_and_counted() {
    let store = Store::with_capacity(2);
    let json = HeaderMap::from_iter([(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    )]);
    let encoded = |encoding| {
        let mut headers = protobuf();
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
        headers
    };
    let (gzip, zstd) = (encoded("gzip"), encoded("zstd"));
    for (headers, body, expected) in [
        (json, request(vec![]), StatusCode::UNSUPPORTED_MEDIA_TYPE),
        (zstd, request(vec![]), StatusCode::UNSUPPORTED_MEDIA_TYPE),
        (gzip, request(vec![]), StatusCode::BAD_REQUEST),
        (
            protobuf(),
            Bytes::from_static(b"\xff\xff"),
            StatusCode::BAD_REQUEST,
        ),
    ] {
        assert_eq!(post(&store, headers, body).await.status(), expected);
    }
    assert_eq!(store.stats().refused, 4);
    assert_eq!(store.stats().trace_requests, 0);
}

#[tokio::test]
async fn compressed_requests_are_understood() {
    let store = Store::with_capacity(2);
    let mut headers = protobuf();
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    let plain = request(vec![span("a")]);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, &plain).unwrap();
    let body = Bytes::from(encoder.finish().unwrap());
    assert_eq!(post(&store, headers, body).await.status(), StatusCode::OK);
    assert_eq!(store.spans(&Filter::default())[0].name, "a");
}

#[tokio::test]
async fn log_lines_come_back_with_their_ids() {
    let store = Store::with_capacity(1);
    let record = |text: &str| LogRecord {
        body: Some(AnyValue {
            value: Some(Any::StringValue(text.to_owned())),
        }),
        severity_text: "WARN".to_owned(),
        trace_id: vec![0xab; 16],
        span_id: vec![0x01; 8],
        ..LogRecord::default()
    };
    let body = ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs {
            scope_logs: vec![ScopeLogs {
                log_records: vec![record("first"), record("second")],
                ..ScopeLogs::default()
            }],
            ..ResourceLogs::default()
        }],
    };
    let body = Bytes::from(body.encode_to_vec());
    let answer = super::logs(State(store.clone()), protobuf(), body).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(store.stats().logs, 2);
    let lines = super::list_logs(State(store)).await.0;
    assert_eq!(
        serde_json::to_value(&lines).unwrap(),
        json!([{
            "body": "second",
            "severity": "WARN",
            "trace_id": "ab".repeat(16),
            "span_id": "0101010101010101",
            "attributes": {},
            "resource": {},
        }])
    );
}
