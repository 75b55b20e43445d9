//! The resource behind the gateway: a web server that says whom it sees and moves bytes.

use std::convert::Infallible;
use std::net::SocketAddr;

use anyhow::Context as _;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Size of one piece of `/bytes/{n}`, in bytes.
const CHUNK: usize = 64 * 1024;

/// Connections waiting for `accept`.
const BACKLOG: i32 = 1024;

/// Period of the byte pattern of `/bytes/{n}`: prime, so that a shifted or repeated block shows.
const PERIOD: usize = 251;

/// Name of this host, `unknown` if the kernel does not say.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Listens on each address; IPv6 sockets take IPv6 only, so that both wildcards fit on one port.
///
/// # Errors
/// If none of the addresses can be listened on. A single failure is only logged: a host without
/// IPv6 still serves IPv4.
pub fn bind(addresses: &[SocketAddr]) -> anyhow::Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    let mut last_error = None;
    for address in addresses {
        match bind_one(*address) {
            Ok(listener) => {
                tracing::info!(%address, "web server listening");
                listeners.push(listener);
            }
            Err(error) => {
                tracing::warn!(%address, %error, "cannot listen");
                last_error = Some(error);
            }
        }
    }
    match (listeners.is_empty(), last_error) {
        (false, _) => Ok(listeners),
        (true, Some(error)) => Err(error).context("no address to listen on"),
        (true, None) => anyhow::bail!("no address given"),
    }
}

fn bind_one(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves on all listeners until one fails.
///
/// # Errors
/// The error of the listener that failed.
pub async fn serve(listeners: Vec<TcpListener>, name: String) -> anyhow::Result<()> {
    let servers = listeners.into_iter().map(|listener| {
        let service = router(name.clone()).into_make_service_with_connect_info::<SocketAddr>();
        std::future::IntoFuture::into_future(axum::serve(listener, service))
    });
    futures_util::future::try_join_all(servers).await?;
    Ok(())
}

/// Routes of the web server.
pub fn router(name: String) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/peer", get(peer))
        .route("/bytes/{n}", get(bytes))
        .route("/sink", post(sink).put(sink))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .with_state(name)
}

async fn page(
    State(name): State<String>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> Html<String> {
    let name = name.replace('&', "&amp;").replace('<', "&lt;");
    Html(format!(
        "<!doctype html>\n<title>{name}</title>\n<h1>{name}</h1>\n\
         <p>This is <b>{name}</b>; you are <b>{}</b>, port {}.</p>\n",
        peer.ip(),
        peer.port()
    ))
}

async fn peer(
    State(name): State<String>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> Json<Value> {
    Json(json!({"server": name, "peer": peer.ip(), "port": peer.port()}))
}

/// Byte `i` of the answer is `i % 251`.
async fn bytes(Path(n): Path<u64>) -> Response {
    // One piece serves every offset: the pattern repeats, so a piece is a slice of a longer one.
    let pattern = Bytes::from_iter((0..CHUNK + PERIOD).map(|i| (i % PERIOD) as u8));
    let pieces = futures_util::stream::unfold(0u64, move |sent| {
        let piece = (sent < n).then(|| {
            let phase = (sent % PERIOD as u64) as usize;
            let length = (n - sent).min(CHUNK as u64) as usize;
            (
                Ok::<_, Infallible>(pattern.slice(phase..phase + length)),
                sent + length as u64,
            )
        });
        std::future::ready(piece)
    });
    (
        [
            (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
            (header::CONTENT_LENGTH, n.to_string()),
        ],
        Body::from_stream(pieces),
    )
        .into_response()
}

async fn sink(body: Body) -> Response {
    let mut hash = Sha256::new();
    let mut received = 0u64;
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        match piece {
            Ok(piece) => {
                received += piece.len() as u64;
                hash.update(&piece);
            }
            Err(error) => {
                tracing::warn!(received, %error, "upload broken off");
                return (StatusCode::BAD_REQUEST, error.to_string()).into_response();
            }
        }
    }
    Json(json!({"bytes": received, "sha256": hex::encode(hash.finalize())})).into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    async fn exchange(request: Vec<u8>) -> (String, Vec<u8>) {
        let listeners = bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        let address = listeners[0].local_addr().unwrap();
        let server = tokio::spawn(serve(listeners, "web-1".to_owned()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&request).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        server.abort();
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        (head, answer[end + 4..].to_vec())
    }

    fn get(path: &str) -> Vec<u8> {
        format!("GET {path} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").into_bytes()
    }

    #[tokio::test]
    async fn page_names_the_peer_and_the_server() {
        let (head, body) = exchange(get("/")).await;
        let body = String::from_utf8(body).unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(
            body.contains("127.0.0.1") && body.contains("web-1"),
            "{body}"
        );
    }

    #[tokio::test]
    async fn bytes_has_the_length_and_pattern_asked_for() {
        let n = 3 * CHUNK + 17;
        let (head, body) = exchange(get(&format!("/bytes/{n}"))).await;
        assert!(head.contains(&format!("content-length: {n}")), "{head}");
        assert_eq!(body.len(), n);
        assert!(
            body.iter()
                .enumerate()
                .all(|(i, b)| usize::from(*b) == i % PERIOD)
        );
    }

    #[tokio::test]
    async fn sink_reports_length_and_digest() {
        let mut request =
            b"POST /sink HTTP/1.1\r\nHost: web\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
                .to_vec();
        request.extend_from_slice(b"abc");
        let (_, body) = exchange(request).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["bytes"], 3);
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            body["sha256"],
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[tokio::test]
    async fn both_wildcards_share_a_port() {
        let v4 = bind_one("0.0.0.0:0".parse().unwrap()).unwrap();
        let port = v4.local_addr().unwrap().port();
        // A host without IPv6 has nothing to show here.
        if TcpListener::bind("[::1]:0").await.is_ok() {
            bind_one(SocketAddr::new("::".parse().unwrap(), port)).unwrap();
        }
    }
}
