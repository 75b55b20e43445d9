//! Posting a batch over HTTP/1.1.
//!
//! The connections are made as those of the portal channel, not by an HTTP client library, for the
//! mark that keeps them out of the tunnel and for the TLS settings.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{
    AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER, USER_AGENT,
};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};
use url::{Host, Url};

use super::upload::{MAX_REDIRECTS, Meaning, UrlError, redirect};
use crate::portal::Failure;
use crate::portal::dial::{self, Io, connect_any, handshake};

/// Limit for the name, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit for a request with all its redirects.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection is used again within this only: after a longer pause the server may be about to
/// close it, and nobody could tell whether it still took the records.
const IDLE: Duration = Duration::from_secs(5);
/// Longest head of an answer, in bytes.
const MAX_HEAD: usize = 32 << 10;
/// Longest body of an answer that is read, in bytes, and for how long. Only read so that the
/// connection can be used again.
const MAX_ANSWER: usize = 64 << 10;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) meaning: Meaning,
    /// What to tell the operator. Without secrets.
    pub(super) text: String,
}

impl Reply {
    fn astray(from: &Url, error: UrlError) -> Self {
        Self {
            meaning: Meaning::Later,
            text: format!("{} redirects elsewhere, and {error}", host(from)),
        }
    }
}

/// Scheme, host and port.
type Origin = url::Origin;

struct Connection {
    origin: Origin,
    sender: SendRequest<Full<Bytes>>,
    used: Instant,
    driver: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Posts batches, one at a time.
pub(super) struct Client {
    tls: Arc<ClientConfig>,
    user_agent: HeaderValue,
    idle: Mutex<Option<Connection>>,
    /// Addresses in place of those that names resolve to.
    #[cfg(test)]
    pub(super) addresses: std::collections::HashMap<String, SocketAddr>,
}

impl Client {
    pub(super) fn new(tls: Arc<ClientConfig>, user_agent: &str) -> Self {
        Self {
            tls,
            // A host name may stand in it, and not be fit for a header.
            user_agent: HeaderValue::from_str(user_agent)
                .unwrap_or(HeaderValue::from_static("gateway")),
            idle: Mutex::new(None),
            #[cfg(test)]
            addresses: std::collections::HashMap::new(),
        }
    }

    /// Posts a body of JSON, and follows redirects.
    ///
    /// The token stays with the host it is meant for. A redirect to another host is followed
    /// without it, and from there on it is not sent any more, wherever it leads.
    pub(super) async fn post(&self, url: &Url, token: &SecretString, body: Bytes) -> Reply {
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        let mut token = Some(token);
        let mut at = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let (status, headers) = match self.send(&at, token, body.clone(), deadline).await {
                Ok(answer) => answer,
                Err(error) => {
                    return Reply {
                        meaning: Meaning::Retry,
                        text: format!("{}: {error}", host(&at)),
                    };
                }
            };
            let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
            let meaning = Meaning::of(status, header(RETRY_AFTER), SystemTime::now());
            if meaning != Meaning::Redirect {
                return Reply {
                    meaning,
                    text: format!("{} answered {status}", host(&at)),
                };
            }
            let next = header(LOCATION)
                .ok_or(UrlError::Invalid)
                .and_then(|location| redirect(&at, location));
            let next = match next {
                Ok(next) => next,
                Err(error) => return Reply::astray(&at, error),
            };
            if next.host() != url.host() {
                token = None;
            }
            at = next;
        }
        Reply::astray(&at, UrlError::TooMany)
    }

    /// One request and the head of its answer.
    async fn send(
        &self,
        url: &Url,
        token: Option<&SecretString>,
        body: Bytes,
        deadline: Instant,
    ) -> Result<(u16, HeaderMap), String> {
        let request = request(url, token, &self.user_agent, body)?;
        let mut connection = match self.take_idle(&url.origin()) {
            Some(connection) => connection,
            None => {
                self.connect(url, deadline.min(Instant::now() + CONNECT_TIMEOUT))
                    .await?
            }
        };
        let answer = timeout_at(deadline, connection.sender.send_request(request))
            .await
            .map_err(|_| format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))?
            .map_err(|error| format!("the request failed: {error}"))?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        // The answer is known from here on, whatever becomes of its body.
        let reusable = async { drain(answer).await && connection.sender.ready().await.is_ok() };
        if timeout(ANSWER_TIMEOUT, reusable).await.unwrap_or(false) {
            connection.used = Instant::now();
            *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        }
        Ok((status, headers))
    }

    fn take_idle(&self, origin: &Origin) -> Option<Connection> {
        let connection = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        let usable = connection.origin == *origin
            && connection.used.elapsed() < IDLE
            && connection.sender.is_ready();
        usable.then_some(connection)
    }

    async fn connect(&self, url: &Url, deadline: Instant) -> Result<Connection, String> {
        let port = url
            .port_or_known_default()
            .ok_or("the address has no port")?;
        let host = url.host().ok_or("the address has no host")?.to_owned();
        let words = |failure: Failure| failure.message;
        let addresses = self.resolve(&host, port, deadline).await.map_err(words)?;
        let tcp = connect_any(&addresses, deadline).await.map_err(words)?;
        let stream: Box<dyn Io> = if url.scheme() == "https" {
            handshake(tcp, &host, Arc::clone(&self.tls), deadline)
                .await
                .map_err(words)?
        } else {
            Box::new(tcp)
        };
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| format!("the connection failed: {error}"))?;
        let driver = tokio::spawn(async move {
            // Requests in progress learn of the error themselves.
            let _ = driver.await;
        });
        Ok(Connection {
            origin: url.origin(),
            sender,
            used: Instant::now(),
            driver: driver.abort_handle(),
        })
    }

    async fn resolve(
        &self,
        host: &Host,
        port: u16,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, Failure> {
        #[cfg(test)]
        if let Host::Domain(name) = host
            && let Some(address) = self.addresses.get(name)
        {
            return Ok(vec![*address]);
        }
        dial::resolve(host, port, deadline).await
    }
}

fn request(
    url: &Url,
    token: Option<&SecretString>,
    user_agent: &HeaderValue,
    body: Bytes,
) -> Result<Request<Full<Bytes>>, String> {
    let target = match url.query() {
        None => url.path().to_owned(),
        Some(query) => format!("{}?{query}", url.path()),
    };
    let authority = match url.port() {
        None => url.host_str().unwrap_or_default().to_owned(),
        Some(port) => format!("{}:{port}", url.host_str().unwrap_or_default()),
    };
    let mut request = Request::post(target)
        .header(HOST, authority)
        .header(USER_AGENT, user_agent)
        .header(CONTENT_TYPE, "application/json");
    if let Some(token) = token {
        let mut bearer = HeaderValue::from_str(&format!("Bearer {}", token.expose_secret()))
            .map_err(|_| "the token does not fit into a header")?;
        bearer.set_sensitive(true);
        request = request.header(AUTHORIZATION, bearer);
    }
    request
        .body(Full::new(body))
        .map_err(|error| format!("cannot form a request: {error}"))
}

/// Reads the rest of an answer. Says whether it came to an end within its limit.
async fn drain(answer: Response<Incoming>) -> bool {
    let mut body = answer.into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return false };
        length += frame.data_ref().map_or(0, Bytes::len);
        if length > MAX_ANSWER {
            return false;
        }
    }
    true
}

/// What of an address may be shown.
fn host(url: &Url) -> &str {
    url.host_str().unwrap_or("the server")
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
