//! How requests of exporters get to a collector: HTTP/1.1, or gRPC over HTTP/2; in the clear or
//! over TLS.
//!
//! The connections are made as those of the portal channel, for the mark that keeps them out of the
//! tunnel and for the TLS settings. A unary gRPC call is an HTTP/2 request whose body, behind five
//! bytes of prefix, is the very message that OTLP posts over HTTP, so that one exporter does for
//! both and no second stack is needed.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, TE,
};
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use opentelemetry_http::{HttpClient, HttpError};
use prost::Message as _;
use rustls::ClientConfig;
use tokio::runtime::Runtime;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};
use url::{Position, Url};

use super::export::{Protocol, Target};
use super::tls::{self, CertificateError};
use crate::portal::Failure;
use crate::portal::dial::{Io, connect_any, handshake, resolve};

/// A connection is used again within this only: nobody looks after it in between, and a server may
/// have closed it.
const IDLE: Duration = Duration::from_secs(20);
/// Longest answer, in bytes.
const MAX_ANSWER: usize = 64 << 10;
/// Longest text of a collector that is passed on, in characters.
const MAX_TEXT: usize = 200;
/// Prefix of a message in a gRPC body: whether it is compressed, and its length.
const PREFIX: usize = 5;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// Why the last request failed, in words. The exporter itself tells less.
#[derive(Debug, Clone, Default)]
pub(super) struct Trouble(Arc<Mutex<Option<String>>>);

impl Trouble {
    pub(super) fn set(&self, why: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub(super) fn get(&self) -> Option<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

enum Sender {
    Http(http1::SendRequest<Full<Bytes>>),
    Grpc(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Grpc(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }
}

/// What runs for one connection, and ends with it. A request that the collector does not take to
/// its end would hold on to an HTTP/2 connection for ever.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<Vec<AbortHandle>>>);

impl Tasks {
    fn spawn(&self, task: impl Future<Output: Send> + Send + 'static) {
        let mut handles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        handles.retain(|handle| !handle.is_finished());
        handles.push(tokio::spawn(task).abort_handle());
    }
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}

struct Connection {
    sender: Sender,
    used: Instant,
    tasks: Tasks,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let handles = self.tasks.0.lock().unwrap_or_else(PoisonError::into_inner);
        handles.iter().for_each(AbortHandle::abort);
    }
}

/// What works only while a request is on its way.
struct Engine {
    runtime: Option<Runtime>,
    connection: Option<Connection>,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.connection = None;
        // Must not wait for a name server, wherever this happens.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Sends one request after another.
pub(super) struct Transport {
    target: Target,
    tls: Option<Arc<ClientConfig>>,
    trouble: Trouble,
    engine: Mutex<Engine>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

/// Why there is no way to the collector.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The system gives us no runtime.
    #[error("cannot start a runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

impl Transport {
    pub(super) fn new(target: &Target, trouble: Trouble) -> Result<Self, TransportError> {
        let tls = match target.endpoint.url().scheme() {
            "https" => Some(tls::config(target)?),
            _ => None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Self {
            target: target.clone(),
            tls,
            trouble,
            engine: Mutex::new(Engine {
                runtime: Some(runtime),
                connection: None,
            }),
        })
    }

    /// Blocks: only threads that the SDK has for exporting come here.
    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, String> {
        if tokio::runtime::Handle::try_current().is_ok() {
            return Err("exporting on a thread that drives tasks".to_owned());
        }
        let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        let Engine {
            runtime,
            connection,
        } = &mut *engine;
        let runtime = runtime.as_ref().ok_or("the exporter has ended")?;
        runtime.block_on(async {
            let deadline = Instant::now() + self.target.timeout;
            match timeout_at(deadline, self.exchange(connection, request, deadline)).await {
                Ok(result) => result,
                Err(_) => {
                    let limit = self.target.timeout.as_secs_f64();
                    Err(format!("no answer within {limit} s"))
                }
            }
        })
    }

    async fn exchange(
        &self,
        kept: &mut Option<Connection>,
        request: Request<Bytes>,
        deadline: Instant,
    ) -> Result<Response<Bytes>, String> {
        let (parts, body) = request.into_parts();
        let request = self.request(parts.headers, body)?;
        let reused = kept.take().filter(|c| c.used.elapsed() < IDLE);
        let (mut connection, response) = match reused {
            Some(mut connection) => match connection.sender.send(request.clone()).await {
                Ok(response) => (connection, response),
                // It was closed meanwhile, most likely.
                Err(_) => self.on_new_connection(request, deadline).await?,
            },
            None => self.on_new_connection(request, deadline).await?,
        };
        let (answer, is_complete) = answer(self.target.protocol, response).await?;
        // Otherwise, the rest of it is still to come.
        if is_complete {
            connection.used = Instant::now();
            *kept = Some(connection);
        }
        Ok(answer)
    }

    async fn on_new_connection(
        &self,
        request: Request<Full<Bytes>>,
        deadline: Instant,
    ) -> Result<(Connection, Response<Incoming>), String> {
        let mut connection = self.connect(deadline).await?;
        let response = connection
            .sender
            .send(request)
            .await
            .map_err(|error| self.failed("request", &error))?;
        Ok((connection, response))
    }

    async fn connect(&self, deadline: Instant) -> Result<Connection, String> {
        let url = self.target.endpoint.url();
        let port = url
            .port_or_known_default()
            .ok_or("the address has no port")?;
        let host = url.host().ok_or("the address has no host")?.to_owned();
        let words = |failure: Failure| failure.message;
        let addresses = resolve(&host, port, deadline).await.map_err(words)?;
        let tcp = connect_any(&addresses, deadline).await.map_err(words)?;
        let stream: Box<dyn Io> = match &self.tls {
            Some(tls) => handshake(tcp, &host, Arc::clone(tls), deadline)
                .await
                .map_err(words)?,
            None => Box::new(tcp),
        };
        let failed = |error: hyper::Error| self.failed("connection", &error);
        let tasks = Tasks::default();
        let io = TokioIo::new(stream);
        // Requests in progress learn of the connection's errors themselves.
        let sender = match self.target.protocol {
            Protocol::Http => {
                let (sender, driver) = http1::handshake(io).await.map_err(failed)?;
                tasks.spawn(driver);
                Sender::Http(sender)
            }
            Protocol::Grpc => {
                let handshake = http2::handshake(tasks.clone(), io);
                let (sender, driver) = handshake.await.map_err(failed)?;
                tasks.spawn(driver);
                Sender::Grpc(sender)
            }
        };
        Ok(Connection {
            sender,
            used: Instant::now(),
            tasks,
        })
    }

    fn failed(&self, what: &str, error: &hyper::Error) -> String {
        let hint = match self.target.protocol {
            Protocol::Http => "is it http/protobuf, mostly on port 4318, or grpc, on 4317?",
            Protocol::Grpc => "is it grpc, mostly on port 4317, or http/protobuf, on 4318?",
        };
        format!("the {what} failed: {} ({hint})", causes(error))
    }

    fn request(&self, headers: HeaderMap, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
        let url = self.target.endpoint.url();
        let authority = &url[Position::BeforeHost..Position::AfterPort];
        let path = &url[Position::BeforePath..Position::AfterQuery];
        let (uri, body) = match self.target.protocol {
            Protocol::Http => (path.to_owned(), body),
            Protocol::Grpc => {
                let compressed = headers.contains_key(CONTENT_ENCODING);
                let uri = format!("{}://{authority}{path}", url.scheme());
                (uri, framed(&body, compressed)?)
            }
        };
        let mut request = Request::post(uri)
            .body(Full::new(body))
            .map_err(|error| format!("cannot form a request: {error}"))?;
        let all = request.headers_mut();
        *all = headers;
        match self.target.protocol {
            Protocol::Http => {
                let host = HeaderValue::from_str(authority)
                    .map_err(|_| "the address does not fit into a header")?;
                all.insert(HOST, host);
            }
            Protocol::Grpc => {
                if let Some(encoding) = all.remove(CONTENT_ENCODING) {
                    all.insert(GRPC_ENCODING, encoding);
                }
                all.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
                all.insert(TE, HeaderValue::from_static("trailers"));
            }
        }
        if let Some(basic) = basic(url) {
            all.insert(AUTHORIZATION, basic);
        }
        for (name, value) in &self.target.headers {
            all.insert(name.clone(), value.clone());
        }
        if self.target.protocol == Protocol::Grpc {
            *request.version_mut() = Version::HTTP_2;
        }
        Ok(request)
    }
}

#[async_trait]
impl HttpClient for Transport {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        match self.send(request) {
            Ok(response) if response.status().is_success() => {
                self.trouble.set(None);
                Ok(response)
            }
            Ok(response) => {
                let told = response.extensions().get::<Told>().cloned();
                let why = told.map_or_else(
                    || format!("the collector answers {}", response.status()),
                    |Told(why)| why,
                );
                self.trouble.set(Some(why));
                Ok(response)
            }
            Err(why) => {
                self.trouble.set(Some(why.clone()));
                Err(why.into())
            }
        }
    }
}

/// What a collector said besides the status.
#[derive(Debug, Clone)]
struct Told(String);

/// A message as it stands in the body of a gRPC request.
fn framed(message: &[u8], compressed: bool) -> Result<Bytes, String> {
    let length = u32::try_from(message.len()).map_err(|_| "the request is too long")?;
    let mut body = Vec::with_capacity(PREFIX + message.len());
    body.push(u8::from(compressed));
    body.extend(length.to_be_bytes());
    body.extend(message);
    Ok(body.into())
}

/// The message in the body of a gRPC answer; nothing if it is not one.
fn unframed(body: &Bytes) -> Bytes {
    match body.split_first_chunk::<PREFIX>() {
        // We did not offer to take compressed answers. What the message says is of little use,
        // so that nothing depends on its length.
        Some(([0, ..], _)) => body.slice(PREFIX..),
        _ => Bytes::new(),
    }
}

/// What the exporter is told of an answer, and whether all of that was read.
///
/// A collector that answers with success most likely took what it was sent, however strange the
/// rest of its answer: an error would have the exporter send it again.
async fn answer(
    protocol: Protocol,
    response: Response<Incoming>,
) -> Result<(Response<Bytes>, bool), String> {
    let (parts, body) = response.into_parts();
    let collected = match Limited::new(body, MAX_ANSWER).collect().await {
        Ok(collected) => collected,
        Err(error) if error.is::<LengthLimitError>() => {
            let answer = if parts.status.is_success() {
                let why = format!("the answer is longer than {} KiB", MAX_ANSWER >> 10);
                refusal(false, why)
            } else {
                Response::from_parts(parts, Bytes::new())
            };
            return Ok((answer, false));
        }
        Err(error) => return Err(format!("the answer cannot be read: {error}")),
    };
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let body = collected.to_bytes();
    let answer = if !parts.status.is_success() {
        Response::from_parts(parts, body)
    } else if protocol == Protocol::Http {
        taken(body)
    } else {
        // An answer without a message has its trailers in place of headers.
        called(body, |name| trailers.get(name).or(parts.headers.get(name)))
    };
    Ok((answer, true))
}

/// What came of a gRPC call.
fn called<'a>(
    body: Bytes,
    find: impl Fn(&HeaderName) -> Option<&'a HeaderValue>,
) -> Response<Bytes> {
    let code = find(&GRPC_STATUS).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    let Some(code) = code else {
        let why = "the answer is not gRPC (is this the port for http/protobuf?)";
        return refusal(false, why.to_owned());
    };
    if code == 0 {
        return taken(unframed(&body));
    }
    let mut why = format!(
        "the collector answers gRPC status {code}, {}",
        name_of(code)
    );
    // An answer about credentials may repeat them.
    if !matches!(code, 7 | 16)
        && let Some(message) = find(&GRPC_MESSAGE).and_then(|v| v.to_str().map(shortened).ok())
        && !message.is_empty()
    {
        why.push_str(": ");
        why.push_str(&message);
    }
    refusal(is_passing(code), why)
}

/// An answer of success may still say that some of it was not taken: that is lost, and the exporter
/// would keep it to itself.
fn taken(body: Bytes) -> Response<Bytes> {
    let partial = Answer::decode(body.clone()).ok().and_then(|a| a.partial);
    match partial {
        Some(partial) if partial.rejected > 0 => {
            let mut why = format!("the collector rejects {} of them", partial.rejected);
            if !partial.message.is_empty() {
                why.push_str(": ");
                why.push_str(&shortened(&partial.message));
            }
            refusal(false, why)
        }
        _ => Response::new(body),
    }
}

/// What makes the exporter try again or not.
fn refusal(is_passing: bool, why: String) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = if is_passing {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::BAD_REQUEST
    };
    response.extensions_mut().insert(Told(why));
    response
}

/// What `Export…ServiceResponse` has in common for all signals.
#[derive(Clone, PartialEq, prost::Message)]
struct Answer {
    #[prost(message, optional, tag = "1")]
    partial: Option<Partial>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Partial {
    #[prost(int64, tag = "1")]
    rejected: i64,
    #[prost(string, tag = "2")]
    message: String,
}

/// Whether to try again (OTLP specification, "Failures" of OTLP/gRPC).
const fn is_passing(code: u32) -> bool {
    matches!(code, 1 | 4 | 10 | 11 | 14 | 15)
}

const fn name_of(code: u32) -> &'static str {
    match code {
        1 => "cancelled",
        2 => "unknown",
        3 => "invalid argument",
        4 => "deadline exceeded",
        5 => "not found",
        7 => "permission denied",
        8 => "resource exhausted",
        10 => "aborted",
        11 => "out of range",
        12 => "unimplemented",
        13 => "internal",
        14 => "unavailable",
        15 => "data loss",
        16 => "unauthenticated",
        _ => "an error",
    }
}

/// One line of a collector's text.
fn shortened(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_TEXT)
        .collect()
}

/// User and password in the address are for the server.
fn basic(url: &Url) -> Option<HeaderValue> {
    let password = url.password();
    if url.username().is_empty() && password.is_none() {
        return None;
    }
    let decoded = |part: &str| super::export::decode(part);
    let pair = format!(
        "{}:{}",
        decoded(url.username()),
        decoded(password.unwrap_or_default())
    );
    let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(pair))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// An error with what it is due to.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
