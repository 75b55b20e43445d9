//! Against sockets on the loopback interface.

#![allow(clippy::unwrap_used)]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::SinkExt;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::Message;
use url::Url;

use super::*;
use crate::portal::test_portal::{Peer, answer, listen, read_request};

/// Self-signed for `localhost` and 127.0.0.1, 2020 to 2120; serves nothing but these tests.
const CERTIFICATE: &str = "MIIBaDCCAQ6gAwIBAgIBATAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtwb3J0YWwgdGVzdD\
    AgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowFjEUMBIGA1UEAwwLcG9ydGFsIHRlc3QwWTATBgcqhkjOPQIBB\
    ggqhkjOPQMBBwNCAAQcnncKu7I9mhJ9lQcwXKMKbQkTvZoDQzwRojo8bmw5hqoHbTpV8xYafup4YoDcE81pnI5Bq8tSJo26\
    QdBmklDyo0swSTAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwDAYDVR0TAQH/BAIwADAdBgNVHQ4EFgQUN9YTCLytmKm\
    y/yp6TPQ1qzapy4kwCgYIKoZIzj0EAwIDSAAwRQIgZMzsaI6oC9XRShXd7/tP1k+DycwFPnGJUHTzYlS62CoCIQC1mOYDqH\
    nxNNocQA0qZnjqjR9d4d9Ycl615xXTDRsJaA==";
const KEY: &str = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgT2K1SG14mGgiF5po5bwld8Ayv0CJGomX8\
    4I4xKiNXL+hRANCAAQcnncKu7I9mhJ9lQcwXKMKbQkTvZoDQzwRojo8bmw5hqoHbTpV8xYafup4YoDcE81pnI5Bq8tSJo26\
    QdBmklDy";

fn certificate() -> CertificateDer<'static> {
    STANDARD.decode(CERTIFICATE).unwrap().into()
}

fn trusting() -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate()).unwrap();
    tls_config_with(roots)
}

fn acceptor() -> TlsAcceptor {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(STANDARD.decode(KEY).unwrap()));
    let config = rustls::ServerConfig::builder_with_provider(
        rustls::crypto::ring::default_provider().into(),
    )
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_no_client_auth()
    .with_single_cert(vec![certificate()], key)
    .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

fn request(url: &Url) -> DialRequest {
    DialRequest {
        login: LoginUrl::new(url, "id-1", "edge 7", &[2; 32], login::Protocol::V2).unwrap(),
        token: SecretString::from(".tok\nen"),
        user_agent: "Linux/6.1 gateway/1.6.0 (x86_64; 6.1)".to_owned(),
        tls: tls_config_with(RootCertStore::empty()),
        clock: PortalClock::default(),
    }
}

async fn failure(request: DialRequest) -> Failure {
    match dial(request).await {
        Ok(_) => panic!("must not succeed"),
        Err(failure) => failure,
    }
}

#[tokio::test]
async fn upgrade_request_has_the_documented_headers_and_no_others() {
    let (listener, url) = listen().await;
    let refused = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
    let (head, failure) = tokio::join!(answer(&listener, refused), failure(request(&url)));
    assert_eq!(failure.kind, ErrorType::Http4xx);
    let mut lines: Vec<_> = head.trim_end().split("\r\n").collect();
    assert_eq!(
        lines.remove(0),
        "GET /gateway/v2/websocket?external_id=id-1&name=edge+7\
         &public_key=AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI%3D HTTP/1.1"
    );
    lines.retain(|line| !line.starts_with("Sec-WebSocket-Key: "));
    lines.sort_unstable_by_key(|line| line.to_ascii_lowercase());
    assert_eq!(
        lines,
        [
            "Connection: Upgrade",
            "Host: 127.0.0.1",
            "Sec-WebSocket-Version: 13",
            "Upgrade: websocket",
            "user-agent: Linux/6.1 gateway/1.6.0 (x86_64; 6.1)",
            "x-authorization: Bearer .token",
        ]
    );
}

#[tokio::test]
async fn a_problem_document_that_follows_its_headers_late_is_read() {
    let (listener, url) = listen().await;
    let portal = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        let body = r#"{"code":"gateway_already_connected","detail":"online"}"#;
        let head = format!(
            "HTTP/1.1 409 Conflict\r\nContent-Type: application/problem+json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        for part in body.as_bytes().chunks(20) {
            stream.flush().await.unwrap();
            tokio::task::yield_now().await;
            stream.write_all(part).await.unwrap();
        }
        // Kept open: the length alone says where the document ends.
        stream
    };
    let (_stream, failure) = tokio::join!(portal, failure(request(&url)));
    assert_eq!(failure.kind, ErrorType::Http409);
    assert_eq!(failure.code.as_deref(), Some("gateway_already_connected"));
}

#[tokio::test]
async fn retry_after_is_read() {
    let (listener, url) = listen().await;
    let busy = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n";
    let (_, failure) = tokio::join!(answer(&listener, busy), failure(request(&url)));
    assert_eq!(failure.kind, ErrorType::Http5xx);
    assert_eq!(failure.retry_after, Some(Duration::from_secs(7)));
    assert_eq!(failure.http_status, Some(503));
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let (listener, url) = listen().await;
    let moved = "HTTP/1.1 301 Moved Permanently\r\nLocation: ws://127.0.0.1:1/\r\n\
                 Content-Length: 0\r\n\r\n";
    let (_, failure) = tokio::join!(answer(&listener, moved), failure(request(&url)));
    assert_eq!(failure.kind, ErrorType::HttpOther);
    assert!(failure.message.contains("301"));
}

#[tokio::test]
async fn something_that_is_not_http_is_a_protocol_failure() {
    let (listener, url) = listen().await;
    let (_, failure) = tokio::join!(
        answer(&listener, "SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        failure(request(&url))
    );
    assert_eq!(failure.kind, ErrorType::Protocol, "{failure}");
}

#[tokio::test]
async fn a_frame_that_comes_with_the_upgrade_answer_is_not_lost() {
    let (listener, url) = listen().await;
    let portal = async {
        let mut peer = Peer::accept(&listener).await;
        peer.send(serde_json::json!({"early": true})).await;
        peer
    };
    let (_peer, socket) = tokio::join!(portal, dial(request(&url)));
    let message = socket.unwrap().next().await.unwrap().unwrap();
    assert_eq!(message, Message::text(r#"{"early":true}"#));
}

#[tokio::test]
async fn a_closed_port_is_tcp_connect() {
    let (listener, url) = listen().await;
    drop(listener);
    let failure = failure(request(&url)).await;
    assert_eq!(failure.kind, ErrorType::TcpConnect);
    assert!(failure.message.contains("127.0.0.1"), "{failure}");
}

#[tokio::test]
async fn any_address_that_answers_wins_over_those_that_refuse() {
    let (closed, _) = listen().await;
    let (open, _) = listen().await;
    let addresses = [closed.local_addr().unwrap(), open.local_addr().unwrap()];
    drop(closed);
    let deadline = Instant::now() + ATTEMPT_TIMEOUT;
    let stream = connect_any(&addresses, deadline).await.unwrap();
    assert_eq!(stream.peer_addr().unwrap(), addresses[1]);
}

#[tokio::test(start_paused = true)]
async fn addresses_that_do_not_answer_are_left_after_five_seconds() {
    // A full accept queue makes Linux drop further SYNs.
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    listener.bind(&any.into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let _filling = std::net::TcpStream::connect(address).unwrap();

    let start = Instant::now();
    let deadline = start + ATTEMPT_TIMEOUT;
    let failure = connect_any(&[address], deadline).await.unwrap_err();
    assert_eq!(failure.kind, ErrorType::TcpTimeout);
    assert_eq!(start.elapsed().as_secs(), TCP_TIMEOUT.as_secs());
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_dns() {
    let too_long = format!("ws://{}.invalid:8081", "a".repeat(64));
    let failure = failure(request(&too_long.parse().unwrap())).await;
    assert_eq!(failure.kind, ErrorType::Dns, "{failure}");
}

#[tokio::test(start_paused = true)]
async fn a_portal_that_accepts_and_stays_silent_is_left_after_fifteen_seconds() {
    let (_listener, url) = listen().await;
    let start = Instant::now();
    let failure = failure(request(&url)).await;
    assert_eq!(failure.kind, ErrorType::UpgradeTimeout);
    assert_eq!(start.elapsed().as_secs(), ATTEMPT_TIMEOUT.as_secs());
}

#[tokio::test]
async fn an_unusable_token_is_named_before_anything_is_sent() {
    let (_listener, url) = listen().await;
    for token in ["", " \n", "tökén"] {
        let unusable = DialRequest {
            token: SecretString::from(token),
            ..request(&url)
        };
        assert_eq!(failure(unusable).await.kind, ErrorType::TokenUnusable);
    }
}

#[tokio::test]
async fn wss_speaks_tls_and_verifies_the_name() {
    let (listener, url) = listen().await;
    let port = url.port().unwrap();
    let portal = async {
        let (stream, _) = listener.accept().await.unwrap();
        let stream = acceptor().accept(stream).await.unwrap();
        let sni = stream.get_ref().1.server_name().map(str::to_owned);
        let mut peer = Peer::over(stream).await;
        (sni, peer.receive().await)
    };
    let gateway = async {
        let mut socket = dial(DialRequest {
            tls: trusting(),
            ..request(&format!("wss://localhost:{port}").parse().unwrap())
        })
        .await
        .unwrap();
        socket.send(Message::text("[1]")).await.unwrap();
        socket
    };
    let ((sni, received), _socket) = tokio::join!(portal, gateway);
    assert_eq!(sni.as_deref(), Some("localhost"));
    assert_eq!(received, serde_json::json!([1]));
}

async fn tls_failure_of(host: &str, tls: Arc<ClientConfig>) -> Failure {
    let listener = TcpListener::bind((host, 0)).await.unwrap();
    let url = format!("wss://{}", listener.local_addr().unwrap());
    let portal = async {
        let (stream, _) = listener.accept().await.unwrap();
        let _ = acceptor().accept(stream).await;
    };
    let request = DialRequest {
        tls,
        ..request(&url.parse().unwrap())
    };
    tokio::join!(portal, failure(request)).1
}

#[tokio::test]
async fn a_certificate_of_an_unknown_authority_says_what_to_set() {
    let nobody = tls_config_with(RootCertStore::empty());
    let failure = tls_failure_of("127.0.0.1", nobody).await;
    assert_eq!(failure.kind, ErrorType::TlsCert);
    assert!(failure.message.contains("SSL_CERT_FILE"), "{failure}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let failure = tls_failure_of("127.0.0.2", trusting()).await;
    assert_eq!(failure.kind, ErrorType::TlsCert, "{failure}");
}

#[tokio::test]
async fn a_server_without_tls_is_tls_and_not_tls_cert() {
    let (listener, url) = listen().await;
    let portal = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .unwrap();
        stream
    };
    let url = format!("wss://127.0.0.1:{}", url.port().unwrap());
    let (_stream, failure) = tokio::join!(portal, failure(request(&url.parse().unwrap())));
    assert_eq!(failure.kind, ErrorType::Tls, "{failure}");
}

#[test]
fn built_in_roots_are_there_without_any_system_roots() {
    assert!(webpki_roots::TLS_SERVER_ROOTS.len() > 50);
    let _ = tls_config();
}

#[tokio::test]
#[expect(clippy::result_large_err, reason = "the library's own type")]
async fn the_clock_of_a_portal_that_takes_us_is_noted_and_of_nobody_else() {
    use tokio_tungstenite::accept_hdr_async;
    use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

    const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
    let ahead = |clock: &PortalClock| clock.ahead(Instant::now().into_std(), wall);

    let (listener, url) = listen().await;
    let refusal = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let answer = format!("HTTP/1.1 302 Found\r\nDate: {DATE}\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream
    };
    let dialled = request(&url);
    let clock = dialled.clock.clone();
    tokio::join!(refusal, failure(dialled));
    assert_eq!(ahead(&clock), None, "perhaps a captive portal");

    let portal = async {
        let (stream, _) = listener.accept().await.unwrap();
        let dated = |_: &Request, mut response: Response| {
            let headers = response.headers_mut();
            headers.insert("date", DATE.parse().unwrap());
            Ok(response)
        };
        accept_hdr_async(stream, dated).await.unwrap()
    };
    let dialled = request(&url);
    let clock = dialled.clock.clone();
    let (_portal, socket) = tokio::join!(portal, dial(dialled));
    socket.unwrap();
    let ahead = ahead(&clock).unwrap();
    assert!((0.0..10.0).contains(&ahead), "{ahead}");
}
