//! A collector for tests: OTLP/HTTP with binary protobuf in, JSON out.
//!
//! Spans are kept as received. Nothing is sampled, merged or renamed, so that a test sees exactly
//! what the exporter sent.

mod span;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::io::Read as _;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use span::Span;

/// Largest export request accepted, in bytes.
const MAX_REQUEST: usize = 64 * 1024 * 1024;

/// What has been received so far; clones share the same contents.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Mutex<Inner>>,
    capacity: usize,
}

#[derive(Default)]
struct Inner {
    spans: VecDeque<Span>,
    flow_logs: VecDeque<FlowLog>,
    logs: VecDeque<LogLine>,
    metrics: BTreeSet<String>,
    stats: Stats,
}

/// A log line.
#[derive(Debug, Clone, Serialize)]
pub struct LogLine {
    /// Its text.
    pub body: Value,
    /// `INFO` and so on.
    pub severity: String,
    /// 32 hex digits; empty outside a span.
    pub trace_id: String,
    /// 16 hex digits; empty outside a span.
    pub span_id: String,
    /// Attributes by name.
    pub attributes: Map<String, Value>,
    /// Attributes of the resource.
    pub resource: Map<String, Value>,
}

/// An uploaded flow log record.
#[derive(Debug, Clone, Serialize)]
pub struct FlowLog {
    /// What the token in the request says (its claims, unverified).
    pub claims: Value,
    /// The record as it came.
    pub record: Value,
}

/// Number of things received since start or since the last `DELETE /spans`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    /// Export requests to `/v1/traces`.
    pub trace_requests: u64,
    /// Export requests to `/v1/metrics`.
    pub metric_requests: u64,
    /// Export requests to `/v1/logs`.
    pub log_requests: u64,
    /// Spans received, including those that no longer fit.
    pub spans: u64,
    /// Metrics received.
    pub metrics: u64,
    /// Log records received.
    pub logs: u64,
    /// Requests refused (wrong media type, encoding or contents).
    pub refused: u64,
}

impl Store {
    /// An empty store for at most `capacity` spans.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            inner: Arc::default(),
            capacity,
        }
    }

    /// All spans that match `filter`, in order of arrival.
    pub fn spans(&self, filter: &Filter) -> Vec<Span> {
        self.with(|inner| {
            inner
                .spans
                .iter()
                .filter(|span| filter.matches(span))
                .cloned()
                .collect()
        })
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.with(|inner| inner.stats.clone())
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Query of `GET /spans`; every given part must match.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Filter {
    /// Exact span name.
    pub name: Option<String>,
    /// Trace id, lower-case hex.
    pub trace_id: Option<String>,
    /// Parent span id, lower-case hex; empty selects root spans.
    pub parent_span_id: Option<String>,
    /// `service.name` of the resource.
    pub service: Option<String>,
}

impl Filter {
    fn matches(&self, span: &Span) -> bool {
        fn agrees(wanted: Option<&str>, actual: &str) -> bool {
            wanted.is_none_or(|wanted| wanted == actual)
        }
        agrees(self.name.as_deref(), &span.name)
            && agrees(self.trace_id.as_deref(), &span.trace_id)
            && agrees(self.parent_span_id.as_deref(), &span.parent_span_id)
            && self.service.as_deref().is_none_or(|wanted| {
                span.resource.get("service.name").and_then(|v| v.as_str()) == Some(wanted)
            })
    }
}

/// Routes of the collector.
pub fn router(store: Store) -> Router {
    Router::new()
        .route("/v1/traces", post(traces))
        .route("/v1/metrics", post(metrics))
        .route("/v1/logs", post(logs))
        .route("/spans", get(list).delete(clear))
        .route("/logs", get(list_logs))
        .route("/metrics", get(list_metrics))
        .route("/stats", get(stats))
        .route("/ingestion/flow_logs", post(flow_logs))
        .route("/flow_logs", get(list_flow_logs))
        .route("/healthz", get(|| async { "ok\n" }))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(store)
}

async fn list(State(store): State<Store>, Query(filter): Query<Filter>) -> Json<Vec<Span>> {
    Json(store.spans(&filter))
}

/// Takes flow logs as the portal does: a bearer token, and records of its authorization.
async fn flow_logs(State(store): State<Store>, headers: HeaderMap, body: Bytes) -> Response {
    let refuse = |status: StatusCode, why: &str| {
        tracing::warn!(%status, why, "flow logs refused");
        store.with(|inner| inner.stats.refused += 1);
        (status, why.to_owned()).into_response()
    };
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let claims = token
        .and_then(|token| token.split('.').nth(1))
        .and_then(|claims| URL_SAFE_NO_PAD.decode(claims).ok())
        .and_then(|claims| serde_json::from_slice::<Value>(&claims).ok());
    let Some(claims) = claims else {
        return refuse(StatusCode::UNAUTHORIZED, "no token");
    };
    let Ok(body) = serde_json::from_slice::<Value>(&body) else {
        return refuse(StatusCode::BAD_REQUEST, "not JSON");
    };
    let Some(records) = body["flow_logs"].as_array() else {
        return refuse(StatusCode::BAD_REQUEST, "no records");
    };
    store.with(|inner| {
        for record in records {
            inner.flow_logs.push_back(FlowLog {
                claims: claims.clone(),
                record: record.clone(),
            });
        }
        while inner.flow_logs.len() > store.capacity {
            inner.flow_logs.pop_front();
        }
    });
    StatusCode::NO_CONTENT.into_response()
}

async fn list_flow_logs(State(store): State<Store>) -> Json<Vec<FlowLog>> {
    Json(store.with(|inner| inner.flow_logs.iter().cloned().collect()))
}

async fn list_logs(State(store): State<Store>) -> Json<Vec<LogLine>> {
    Json(store.with(|inner| inner.logs.iter().cloned().collect()))
}

/// Names of all metrics received.
async fn list_metrics(State(store): State<Store>) -> Json<BTreeSet<String>> {
    Json(store.with(|inner| inner.metrics.clone()))
}

async fn clear(State(store): State<Store>) -> StatusCode {
    store.with(|inner| *inner = Inner::default());
    StatusCode::NO_CONTENT
}

async fn stats(State(store): State<Store>) -> Json<Stats> {
    Json(store.stats())
}

async fn traces(State(store): State<Store>, headers: HeaderMap, body: Bytes) -> Response {
    receive(&store, &headers, &body, |inner, request| {
        inner.stats.trace_requests += 1;
        for span in span::flatten(request) {
            inner.stats.spans += 1;
            inner.spans.push_back(span);
        }
        while inner.spans.len() > store.capacity {
            inner.spans.pop_front();
        }
        ExportTraceServiceResponse::default()
    })
}

async fn metrics(State(store): State<Store>, headers: HeaderMap, body: Bytes) -> Response {
    receive(
        &store,
        &headers,
        &body,
        |inner, request: ExportMetricsServiceRequest| {
            inner.stats.metric_requests += 1;
            let scopes = request.resource_metrics.into_iter();
            let scopes = scopes.flat_map(|resource| resource.scope_metrics);
            for metric in scopes.flat_map(|scope| scope.metrics) {
                inner.stats.metrics += 1;
                inner.metrics.insert(metric.name);
            }
            ExportMetricsServiceResponse::default()
        },
    )
}

async fn logs(State(store): State<Store>, headers: HeaderMap, body: Bytes) -> Response {
    receive(
        &store,
        &headers,
        &body,
        |inner, request: ExportLogsServiceRequest| {
            inner.stats.log_requests += 1;
            for from_resource in request.resource_logs {
                let resource = from_resource.resource.unwrap_or_default();
                let resource = span::attributes(resource.attributes);
                let scopes = from_resource.scope_logs.into_iter();
                for record in scopes.flat_map(|scope| scope.log_records) {
                    inner.stats.logs += 1;
                    inner.logs.push_back(LogLine {
                        body: record.body.map_or(Value::Null, span::value),
                        severity: record.severity_text,
                        trace_id: hex::encode(record.trace_id),
                        span_id: hex::encode(record.span_id),
                        attributes: span::attributes(record.attributes),
                        resource: resource.clone(),
                    });
                }
            }
            while inner.logs.len() > store.capacity {
                inner.logs.pop_front();
            }
            ExportLogsServiceResponse::default()
        },
    )
}

/// Decodes an export request and answers as OTLP/HTTP asks: 200 with an empty response message,
/// 415 for what is not binary protobuf, 400 for what does not decode.
fn receive<Request, Reply>(
    store: &Store,
    headers: &HeaderMap,
    body: &[u8],
    accept: impl FnOnce(&mut Inner, Request) -> Reply,
) -> Response
where
    Request: Message + Default,
    Reply: Message,
{
    let refuse = |status: StatusCode, why: String| {
        tracing::warn!(%status, why, "export refused");
        store.with(|inner| inner.stats.refused += 1);
        (status, why).into_response()
    };
    let value = |name| {
        headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or("")
    };
    let media_type = value(header::CONTENT_TYPE);
    if media_type.split(';').next().map(str::trim) != Some("application/x-protobuf") {
        return refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("content type {media_type:?}, only application/x-protobuf is understood"),
        );
    }
    let mut decompressed = Vec::new();
    let body = match value(header::CONTENT_ENCODING) {
        "" | "identity" => body,
        "gzip" => {
            let mut decoder = flate2::read::GzDecoder::new(body).take(MAX_REQUEST as u64);
            match decoder.read_to_end(&mut decompressed) {
                Ok(_) => decompressed.as_slice(),
                Err(error) => return refuse(StatusCode::BAD_REQUEST, format!("not gzip: {error}")),
            }
        }
        other => {
            return refuse(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("content encoding {other:?}, only gzip is understood"),
            );
        }
    };
    match Request::decode(body) {
        Ok(request) => {
            let reply = store.with(|inner| accept(inner, request));
            (
                [(header::CONTENT_TYPE, "application/x-protobuf")],
                reply.encode_to_vec(),
            )
                .into_response()
        }
        Err(error) => refuse(StatusCode::BAD_REQUEST, format!("not decodable: {error}")),
    }
}
