//! Spans as JSON.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value as Any};
use opentelemetry_proto::tonic::trace::v1::{self as otlp, span::SpanKind, status::StatusCode};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// One finished span.
#[derive(Debug, Clone, Serialize)]
pub struct Span {
    /// Name.
    pub name: String,
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
    /// 16 hex digits; empty for a root span.
    pub parent_span_id: String,
    /// `internal`, `server`, `client`, `producer`, `consumer` or `unspecified`.
    pub kind: &'static str,
    /// Nanoseconds since the Unix epoch.
    pub start_unix_nano: u64,
    /// Nanoseconds since the Unix epoch.
    pub end_unix_nano: u64,
    /// Attributes by name.
    pub attributes: Map<String, Value>,
    /// Events in order.
    pub events: Vec<Event>,
    /// Links in order.
    pub links: Vec<Link>,
    /// Status.
    pub status: Status,
    /// Attributes of the resource (`service.name` and so on).
    pub resource: Map<String, Value>,
    /// Name of the instrumentation scope.
    pub scope: String,
}

/// An event of a span.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// Name.
    pub name: String,
    /// Nanoseconds since the Unix epoch.
    pub unix_nano: u64,
    /// Attributes by name.
    pub attributes: Map<String, Value>,
}

/// A link to another span.
#[derive(Debug, Clone, Serialize)]
pub struct Link {
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
    /// Attributes by name.
    pub attributes: Map<String, Value>,
}

/// Outcome of a span.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// `unset`, `ok` or `error`.
    pub code: &'static str,
    /// Description; usually only set with `error`.
    pub message: String,
}

/// Every span of an export request, with its resource and scope copied into it.
pub(super) fn flatten(request: ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for from_resource in request.resource_spans {
        let resource = from_resource
            .resource
            .map(|resource| attributes(resource.attributes))
            .unwrap_or_default();
        for from_scope in from_resource.scope_spans {
            let scope = from_scope.scope.map(|scope| scope.name).unwrap_or_default();
            spans.extend(
                from_scope
                    .spans
                    .into_iter()
                    .map(|span| convert(span, resource.clone(), scope.clone())),
            );
        }
    }
    spans
}

fn convert(span: otlp::Span, resource: Map<String, Value>, scope: String) -> Span {
    let status = span.status.unwrap_or_default();
    Span {
        kind: match SpanKind::try_from(span.kind) {
            Ok(SpanKind::Internal) => "internal",
            Ok(SpanKind::Server) => "server",
            Ok(SpanKind::Client) => "client",
            Ok(SpanKind::Producer) => "producer",
            Ok(SpanKind::Consumer) => "consumer",
            Ok(SpanKind::Unspecified) | Err(_) => "unspecified",
        },
        name: span.name,
        trace_id: hex::encode(span.trace_id),
        span_id: hex::encode(span.span_id),
        parent_span_id: hex::encode(span.parent_span_id),
        start_unix_nano: span.start_time_unix_nano,
        end_unix_nano: span.end_time_unix_nano,
        attributes: attributes(span.attributes),
        events: span
            .events
            .into_iter()
            .map(|event| Event {
                name: event.name,
                unix_nano: event.time_unix_nano,
                attributes: attributes(event.attributes),
            })
            .collect(),
        links: span
            .links
            .into_iter()
            .map(|link| Link {
                trace_id: hex::encode(link.trace_id),
                span_id: hex::encode(link.span_id),
                attributes: attributes(link.attributes),
            })
            .collect(),
        status: Status {
            code: match StatusCode::try_from(status.code) {
                Ok(StatusCode::Ok) => "ok",
                Ok(StatusCode::Error) => "error",
                Ok(StatusCode::Unset) | Err(_) => "unset",
            },
            message: status.message,
        },
        resource,
        scope,
    }
}

pub(super) fn attributes(pairs: Vec<KeyValue>) -> Map<String, Value> {
    pairs
        .into_iter()
        .map(|pair| (pair.key, pair.value.map_or(Value::Null, value)))
        .collect()
}

pub(super) fn value(value: AnyValue) -> Value {
    match value.value {
        None => Value::Null,
        Some(Any::StringValue(v)) => Value::String(v),
        Some(Any::BoolValue(v)) => Value::Bool(v),
        Some(Any::IntValue(v)) => json!(v),
        Some(Any::DoubleValue(v)) => json!(v),
        Some(Any::ArrayValue(v)) => v.values.into_iter().map(self::value).collect(),
        Some(Any::KvlistValue(v)) => Value::Object(attributes(v.values)),
        Some(Any::BytesValue(v)) => Value::String(STANDARD.encode(v)),
        // Only meaningful in the profiling signal, which has a string table.
        Some(Any::StringValueStrindex(_)) => Value::Null,
    }
}
