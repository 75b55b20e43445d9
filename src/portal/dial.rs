//! One attempt to open the portal's WebSocket: DNS, TCP, TLS, upgrade (portal-channel spec §1.5).

pub(in crate::portal) mod answer;
mod transport;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};
use secrecy::{ExposeSecret, SecretString};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::handshake::client::{Request, generate_key};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config};
use tracing::{Instrument, Span, field, info_span};
use url::Host;

pub(crate) use self::answer::parse_retry_after;
pub(crate) use self::transport::Io;
pub use self::transport::Transport;
use self::transport::lend;
use super::clock::PortalClock;
use super::error::{ErrorType, Failure};
use super::login::{self, LoginUrl};
use crate::telemetry::names;

/// Mark on every socket of the gateway, so that routing can tell its own traffic from that of the
/// tunnel (portal-channel spec §1.5).
pub const SOCKET_MARK: u32 = 0xfd00_2021;
/// Limit of the race of all addresses.
pub const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit of a whole attempt.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);
/// Largest message that is accepted; an `init` with thousands of grants is far below.
const MAX_MESSAGE: usize = 16 << 20;

/// An open WebSocket.
pub type Socket = WebSocketStream<Transport>;

/// What to dial.
#[derive(Clone)]
pub struct DialRequest {
    /// Where.
    pub login: LoginUrl,
    /// The token.
    pub token: SecretString,
    /// See [`login::user_agent`].
    pub user_agent: String,
    /// See [`tls_config`].
    pub tls: Arc<ClientConfig>,
    /// Told what time the portal has.
    pub clock: PortalClock,
}

/// TLS settings with [`roots`].
pub fn tls_config() -> Arc<ClientConfig> {
    tls_config_with(roots())
}

/// Whom to trust: the built-in web roots, and those of the system, of `SSL_CERT_FILE` or of
/// `SSL_CERT_DIR`. An image made from scratch has no system roots; a private portal has a private
/// authority.
pub fn roots() -> RootCertStore {
    let mut roots = RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    let native = rustls_native_certs::load_native_certs();
    let named = ["SSL_CERT_FILE", "SSL_CERT_DIR"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    for error in native.errors {
        if named {
            tracing::warn!(%error, "cannot read the certificates named by SSL_CERT_FILE or SSL_CERT_DIR");
        } else {
            tracing::debug!(%error, "cannot read the system's certificates");
        }
    }
    roots.add_parsable_certificates(native.certs);
    roots
}

/// TLS settings that trust these roots alone.
pub fn tls_config_with(roots: RootCertStore) -> Arc<ClientConfig> {
    let builder = tls_builder().with_root_certificates(roots);
    Arc::new(builder.with_no_client_auth())
}

/// The beginning of TLS settings.
pub fn tls_builder() -> ConfigBuilder<ClientConfig, WantsVerifier> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring implements the cipher suites of both TLS versions")
}

/// Opens the WebSocket. Names are resolved anew each time: the portal may have moved.
///
/// # Errors
///
/// The first step that failed, with a [`Failure::kind`] that names it.
pub async fn dial(request: DialRequest) -> Result<Socket, Failure> {
    let bearer = login::bearer(&request.token)
        .map_err(|e| Failure::new(ErrorType::TokenUnusable, e.to_string()))?;
    let login = &request.login;
    let url = login
        .with_token(&request.token)
        .map_err(|e| Failure::new(ErrorType::TokenUnusable, e.to_string()))?;
    let deadline = Instant::now() + ATTEMPT_TIMEOUT;

    let addresses = step(
        info_span!(
            names::span::DNS_RESOLVE,
            { names::ERROR_TYPE } = field::Empty,
            { names::OTEL_STATUS_CODE } = field::Empty
        ),
        resolve(login.host(), login.port(), deadline),
    )
    .await?;
    let tcp = step(
        info_span!(
            names::span::TCP_CONNECT,
            { names::NETWORK_PEER_ADDRESS } = field::Empty,
            { names::ERROR_TYPE } = field::Empty,
            { names::OTEL_STATUS_CODE } = field::Empty
        ),
        connect_any(&addresses, deadline),
    )
    .await?;
    let stream: Box<dyn Io> = if login.is_tls() {
        let span = info_span!(
            names::span::TLS_HANDSHAKE,
            { names::ERROR_TYPE } = field::Empty,
            { names::OTEL_STATUS_CODE } = field::Empty
        );
        step(
            span,
            handshake(tcp, login.host(), Arc::clone(&request.tls), deadline),
        )
        .await?
    } else {
        Box::new(tcp)
    };
    let span = info_span!(
        names::span::WS_UPGRADE,
        { names::ERROR_TYPE } = field::Empty,
        { names::OTEL_STATUS_CODE } = field::Empty
    );
    step(
        span,
        upgrade(stream, login, &url, bearer, &request, deadline),
    )
    .await
}

/// Runs one step inside its span and records how it failed.
async fn step<T>(span: Span, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let result = work.instrument(span.clone()).await;
    if let Err(failure) = &result {
        span.record(names::ERROR_TYPE, failure.kind.as_str());
        span.record(names::OTEL_STATUS_CODE, "ERROR");
    }
    result
}

/// All addresses of a host.
pub(crate) async fn resolve(
    host: &Host,
    port: u16,
    deadline: Instant,
) -> Result<Vec<SocketAddr>, Failure> {
    let name = match host {
        Host::Ipv4(ip) => return Ok(vec![(*ip, port).into()]),
        Host::Ipv6(ip) => return Ok(vec![(*ip, port).into()]),
        Host::Domain(name) => name,
    };
    let failure =
        |why: String| Failure::new(ErrorType::Dns, format!("cannot resolve {name}: {why}"));
    let mut addresses: Vec<_> =
        timeout_at(deadline, tokio::net::lookup_host((name.as_str(), port)))
            .await
            .map_err(|_| failure("no answer in time".to_owned()))?
            .map_err(|e| failure(e.to_string()))?
            .collect();
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() {
        return Err(failure("no addresses".to_owned()));
    }
    Ok(addresses)
}

/// The first address that answers wins.
pub(crate) async fn connect_any(
    addresses: &[SocketAddr],
    deadline: Instant,
) -> Result<TcpStream, Failure> {
    let deadline = deadline.min(Instant::now() + TCP_TIMEOUT);
    let mut race: FuturesUnordered<_> = addresses
        .iter()
        .map(|address| async move { (*address, connect(*address).await) })
        .collect();
    let mut errors = Vec::new();
    loop {
        match timeout_at(deadline, race.next()).await {
            Ok(Some((address, Ok(stream)))) => {
                Span::current().record(names::NETWORK_PEER_ADDRESS, field::display(address.ip()));
                return Ok(stream);
            }
            Ok(Some((address, Err(error)))) => errors.push((address, error)),
            Ok(None) => return Err(all_refused(&errors)),
            Err(_) => {
                let message = format!(
                    "no answer from {} within {} s",
                    listed(addresses.iter().map(SocketAddr::to_string)),
                    TCP_TIMEOUT.as_secs()
                );
                return Err(Failure::new(ErrorType::TcpTimeout, message));
            }
        }
    }
}

fn all_refused(errors: &[(SocketAddr, io::Error)]) -> Failure {
    let timed_out = errors
        .iter()
        .all(|(_, e)| e.kind() == io::ErrorKind::TimedOut);
    let kind = if timed_out {
        ErrorType::TcpTimeout
    } else {
        ErrorType::TcpConnect
    };
    let each = errors.iter().map(|(address, e)| format!("{address}: {e}"));
    Failure::new(kind, format!("cannot connect: {}", listed(each)))
}

/// Joins the first few; a name may have dozens of addresses.
fn listed(items: impl Iterator<Item = String>) -> String {
    const SHOWN: usize = 4;
    let mut items: Vec<_> = items.take(SHOWN + 1).collect();
    if items.len() > SHOWN {
        items[SHOWN] = "…".to_owned();
    }
    items.join(", ")
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    mark(&socket);
    let stream = socket.connect(address).await?;
    // Frames and requests are small, and someone waits for each.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The mark only matters where the tunnel could capture our own traffic; without the right to set
/// it the connection is still worth having.
fn mark(socket: &TcpSocket) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if let Err(error) = socket2::SockRef::from(socket).set_mark(SOCKET_MARK)
        && !WARNED.swap(true, Ordering::Relaxed)
    {
        tracing::warn!(%error, "cannot mark the portal's sockets (needs NET_ADMIN); continuing without");
    }
}

/// TLS with this host.
pub(crate) async fn handshake(
    tcp: TcpStream,
    host: &Host,
    config: Arc<ClientConfig>,
    deadline: Instant,
) -> Result<Box<dyn Io>, Failure> {
    let name = match host {
        Host::Domain(name) => ServerName::try_from(name.clone())
            .map_err(|e| Failure::new(ErrorType::Tls, format!("{name}: {e}")))?,
        Host::Ipv4(ip) => ServerName::from(std::net::IpAddr::from(*ip)),
        Host::Ipv6(ip) => ServerName::from(std::net::IpAddr::from(*ip)),
    };
    let stream = timeout_at(deadline, TlsConnector::from(config).connect(name, tcp))
        .await
        .map_err(|_| Failure::new(ErrorType::Tls, "no answer to the TLS handshake"))?
        .map_err(|e| tls_failure(&e))?;
    Ok(Box::new(stream))
}

fn tls_failure(error: &io::Error) -> Failure {
    let rustls_error = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match rustls_error {
        Some(rustls::Error::InvalidCertificate(e)) => {
            let hint = match e {
                rustls::CertificateError::UnknownIssuer => {
                    " (for a private authority set SSL_CERT_FILE)"
                }
                rustls::CertificateError::Expired
                | rustls::CertificateError::ExpiredContext { .. }
                | rustls::CertificateError::NotValidYet
                | rustls::CertificateError::NotValidYetContext { .. } => {
                    " (is the clock of this host right?)"
                }
                _ => "",
            };
            Failure::new(
                ErrorType::TlsCert,
                format!("the server's certificate is not acceptable: {e}{hint}"),
            )
        }
        _ => Failure::new(ErrorType::Tls, format!("TLS handshake failed: {error}")),
    }
}

async fn upgrade(
    stream: Box<dyn Io>,
    login: &LoginUrl,
    url: &SecretString,
    bearer: HeaderValue,
    dial: &DialRequest,
    deadline: Instant,
) -> Result<Socket, Failure> {
    let request = Request::builder()
        .uri(url.expose_secret())
        .header("Host", login.host_header())
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", generate_key())
        .header("User-Agent", &dial.user_agent)
        .header("X-Authorization", bearer)
        .body(())
        .map_err(|e| Failure::new(ErrorType::Other, format!("cannot form a request: {e}")))?;
    let mut config = WebSocketConfig::default()
        .read_buffer_size(16 << 10)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    config.write_buffer_size = 0;

    // On a refusal the handshake keeps only what came together with the headers; the rest of the
    // body, which says why, is read from the stream once that is back.
    let (stream, returned) = lend(stream);
    let result = timeout_at(
        deadline,
        client_async_with_config(request, stream, Some(config)),
    )
    .await
    .map_err(|_| {
        Failure::new(
            ErrorType::UpgradeTimeout,
            "no answer to the upgrade request",
        )
    })?;
    match result {
        Ok((socket, response)) => {
            // Only now is it sure that it was the portal who answered.
            dial.clock
                .note(response.headers(), Instant::now().into_std());
            Ok(socket)
        }
        Err(WsError::Http(response)) => {
            let (parts, body) = response.into_parts();
            let body = answer::read_body(
                &parts.headers,
                body.unwrap_or_default(),
                returned.take(),
                deadline,
            )
            .await;
            Err(answer::failure(
                parts.status,
                &parts.headers,
                &body,
                SystemTime::now(),
            ))
        }
        Err(WsError::Io(e)) => Err(Failure::new(
            ErrorType::Io,
            format!("connection lost during the upgrade: {e}"),
        )),
        Err(e) => Err(Failure::new(
            ErrorType::Protocol,
            format!("the upgrade failed: {e}"),
        )),
    }
}
