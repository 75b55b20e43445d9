//! Against sockets on the loopback interface.

#![allow(clippy::unwrap_used)]

use firezone_lab::portal::tls::{Front, Identity};
use rustls::RootCertStore;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::portal::dial::tls_config_with;

const TOKEN: &str = "aaa.bbb.ccc";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";

fn plain() -> Client {
    Client::new(tls_config_with(RootCertStore::empty()), "Linux gateway/1")
}

fn token() -> SecretString {
    SecretString::from(TOKEN)
}

async fn listen() -> (TcpListener, Url) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!(
        "http://{}/ingestion/flow_logs",
        listener.local_addr().unwrap()
    );
    (listener, Url::parse(&url).unwrap())
}

/// Reads one request: its head and its body.
async fn read_request(stream: &mut TcpStream) -> (String, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.split_once("content-length: ").unwrap().1;
    let length: usize = length.split_once("\r\n").unwrap().0.parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    (head, String::from_utf8(body).unwrap())
}

/// Answers one request on a connection of its own.
async fn answer(listener: &TcpListener, answer: &str) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let (head, _) = read_request(&mut stream).await;
    stream.write_all(answer.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    head
}

async fn post(client: &Client, url: &Url) -> Reply {
    client.post(url, &token(), Bytes::from_static(b"{}")).await
}

#[tokio::test]
async fn the_request_is_as_documented() {
    let (listener, url) = listen().await;
    let client = plain();
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let request = read_request(&mut stream).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
        request
    };
    let body = Bytes::from_static(b"{\"flow_logs\":[]}");
    let token = token();
    let ((head, sent), reply) = tokio::join!(server, client.post(&url, &token, body));
    assert_eq!(reply.meaning, Meaning::Delivered);
    assert_eq!(sent, "{\"flow_logs\":[]}");
    let mut lines: Vec<_> = head.trim_end().split("\r\n").collect();
    assert_eq!(lines.remove(0), "post /ingestion/flow_logs http/1.1");
    lines.sort_unstable();
    let host = format!("host: 127.0.0.1:{}", url.port().unwrap());
    assert_eq!(
        lines,
        [
            "authorization: bearer aaa.bbb.ccc",
            "content-length: 16",
            "content-type: application/json",
            &host,
            "user-agent: linux gateway/1",
        ]
    );
}

#[tokio::test]
async fn a_connection_is_used_again_until_the_server_closes_it() {
    let (listener, url) = listen().await;
    let client = plain();
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        for _ in 0..2 {
            read_request(&mut stream).await;
            stream.write_all(OK.as_bytes()).await.unwrap();
        }
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            .await
            .unwrap();
        drop(stream);
        answer(&listener, OK).await;
    };
    let requests = async {
        for _ in 0..4 {
            assert_eq!(post(&client, &url).await.meaning, Meaning::Delivered);
        }
    };
    tokio::join!(server, requests);
}

#[tokio::test]
async fn answers_are_told_apart_and_described_without_secrets() {
    let (listener, url) = listen().await;
    let client = plain();
    for (head, meaning) in [
        ("204 No Content", Meaning::Delivered),
        ("401 aaa.bbb.ccc", Meaning::Refused),
        ("413 Content Too Large", Meaning::TooLarge),
        (
            "429 Slow\r\nRetry-After: 7",
            Meaning::Wait(Duration::from_secs(7)),
        ),
        ("503 Service Unavailable", Meaning::Retry),
        ("422 Unprocessable", Meaning::Later),
    ] {
        let text = format!("HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        let (_, reply) = tokio::join!(answer(&listener, &text), post(&client, &url));
        assert_eq!(reply.meaning, meaning, "{head}");
        let status = &head[..3];
        assert_eq!(reply.text, format!("127.0.0.1 answered {status}"));
    }
}

#[tokio::test]
async fn no_answer_garbage_and_nobody_there_are_tried_again() {
    let (listener, url) = listen().await;
    let client = plain();
    let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(2 * MAX_HEAD));
    for text in ["", "no HTTP at all\r\n\r\n", "HTTP/1.1 200", &endless] {
        let (_, reply) = tokio::join!(answer(&listener, text), post(&client, &url));
        assert_eq!(reply.meaning, Meaning::Retry, "{reply:?}");
        assert!(!reply.text.contains(TOKEN));
    }
    drop(listener);
    let reply = post(&client, &url).await;
    assert_eq!(reply.meaning, Meaning::Retry);
    assert!(reply.text.contains("cannot connect"), "{}", reply.text);
    let nowhere = Url::parse(&format!("http://{}.invalid/", "a".repeat(64))).unwrap();
    let reply = post(&client, &nowhere).await;
    assert_eq!(reply.meaning, Meaning::Retry);
    assert!(reply.text.contains("cannot resolve"), "{}", reply.text);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_left_after_thirty_seconds() {
    let (_listener, url) = listen().await;
    let client = plain();
    let start = Instant::now();
    let reply = post(&client, &url).await;
    assert_eq!(reply.meaning, Meaning::Retry);
    assert_eq!(start.elapsed().as_secs(), REQUEST_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_server_silent_during_the_tls_handshake_is_left_after_ten_seconds() {
    let (_listener, mut url) = listen().await;
    let port = url.port();
    url = Url::parse("https://127.0.0.1/").unwrap();
    url.set_port(port).unwrap();
    let client = plain();
    let start = Instant::now();
    let reply = post(&client, &url).await;
    assert_eq!(reply.meaning, Meaning::Retry);
    let expected = "127.0.0.1: no answer to the TLS handshake";
    assert_eq!(reply.text, expected);
    assert_eq!(start.elapsed().as_secs(), CONNECT_TIMEOUT.as_secs());
}

#[tokio::test]
async fn an_endless_or_broken_body_does_not_undo_a_delivery() {
    let (listener, url) = listen().await;
    let client = plain();
    let long = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}",
        u64::MAX / 2,
        "x".repeat(MAX_ANSWER + 1)
    );
    let cut = "HTTP/1.1 201 Created\r\nContent-Length: 1000\r\n\r\nx";
    for text in [&long, cut] {
        let (_, reply) = tokio::join!(answer(&listener, text), post(&client, &url));
        assert_eq!(reply.meaning, Meaning::Delivered);
        assert!(client.idle.lock().unwrap().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_comes_is_not_waited_for() {
    let (listener, url) = listen().await;
    let client = plain();
    let start = Instant::now();
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
            .await
            .unwrap();
        stream
    };
    let (_stream, reply) = tokio::join!(server, post(&client, &url));
    assert_eq!(reply.meaning, Meaning::Delivered);
    assert!(start.elapsed() <= REQUEST_TIMEOUT);
}

/// Hosts with TLS, and a client that takes port 443 of any host for theirs.
struct Hosts {
    client: Client,
    listener: TcpListener,
    _front: Front,
}

impl Hosts {
    async fn start() -> Self {
        let names = ["one.test", "two.test"];
        let identity = Identity::new(&names.map(str::to_owned), false).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let front = Front::start(
            "127.0.0.1:0".parse().unwrap(),
            listener.local_addr().unwrap(),
            &identity,
        )
        .await
        .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(identity.der()).unwrap();
        let mut client = Client::new(tls_config_with(roots), "gateway");
        for name in names.into_iter().chain(["other.test"]) {
            client.addresses.insert(name.to_owned(), front.address());
        }
        Self {
            client,
            listener,
            _front: front,
        }
    }

    /// Posts to the first host, which sends to these places in turn. The heads of all requests.
    async fn redirected(&self, to: &[&str], last: &str) -> (Vec<String>, Reply) {
        let url = Url::parse("https://one.test/ingestion/flow_logs").unwrap();
        let server = async {
            let mut heads = Vec::new();
            for location in to {
                let text = format!(
                    "HTTP/1.1 307 Elsewhere\r\nLocation: {location}\r\nConnection: close\r\n\
                     Content-Length: 0\r\n\r\n"
                );
                heads.push(answer(&self.listener, &text).await);
            }
            if !last.is_empty() {
                heads.push(answer(&self.listener, last).await);
            }
            heads
        };
        tokio::join!(server, post(&self.client, &url))
    }
}

fn has_token(head: &str) -> bool {
    head.contains("authorization:") || head.contains(TOKEN)
}

#[tokio::test]
async fn a_redirect_on_the_same_host_is_followed_with_the_token() {
    let hosts = Hosts::start().await;
    let (heads, reply) = hosts.redirected(&["/v2/logs?x=1"], OK).await;
    assert_eq!(reply.meaning, Meaning::Delivered);
    assert!(heads[1].starts_with("post /v2/logs?x=1 http/1.1\r\n"));
    assert!(heads[1].contains("host: one.test\r\n"));
    assert!(heads.iter().all(|head| has_token(head)));
}

#[tokio::test]
async fn the_token_is_never_sent_to_another_host_nor_after_one() {
    let hosts = Hosts::start().await;
    let to = ["https://two.test/a", "https://one.test/b"];
    let (heads, reply) = hosts.redirected(&to, OK).await;
    assert_eq!(reply.meaning, Meaning::Delivered);
    let with: Vec<bool> = heads.iter().map(|head| has_token(head)).collect();
    assert_eq!(with, [true, false, false]);
    assert!(heads[1].contains("host: two.test\r\n"));
}

#[tokio::test]
async fn redirects_without_tls_or_without_end_are_not_followed() {
    let hosts = Hosts::start().await;
    for location in [
        "http://one.test/",
        "https://one.test:8443/",
        "https://user:hunter2@one.test/",
        "https://[::1",
    ] {
        let (heads, reply) = hosts.redirected(&[location], "").await;
        assert_eq!(heads.len(), 1);
        assert_eq!(reply.meaning, Meaning::Later, "{location}");
        assert!(!reply.text.contains("hunter2"), "{}", reply.text);
    }
    let (heads, reply) = hosts.redirected(&["/next"; MAX_REDIRECTS + 1], "").await;
    assert_eq!(heads.len(), MAX_REDIRECTS + 1);
    assert_eq!(reply.meaning, Meaning::Later);
    assert!(reply.text.contains("more than 5"), "{}", reply.text);
    let (_, reply) = hosts.redirected(&["/next"; MAX_REDIRECTS], OK).await;
    assert_eq!(reply.meaning, Meaning::Delivered);
    let bare = "HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    let (_, reply) = hosts.redirected(&[], bare).await;
    assert_eq!(reply.meaning, Meaning::Later);
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let hosts = Hosts::start().await;
    let url = Url::parse("https://other.test/").unwrap();
    let reply = post(&hosts.client, &url).await;
    assert_eq!(reply.meaning, Meaning::Retry);
    let expected = "other.test: the server's certificate is not acceptable";
    assert!(reply.text.starts_with(expected), "{}", reply.text);
}

#[tokio::test]
async fn an_authority_that_is_not_known_comes_with_a_hint() {
    let mut hosts = Hosts::start().await;
    hosts.client.tls = tls_config_with(RootCertStore::empty());
    let url = Url::parse("https://one.test/").unwrap();
    let reply = post(&hosts.client, &url).await;
    assert_eq!(reply.meaning, Meaning::Retry);
    assert!(reply.text.contains("SSL_CERT_FILE"), "{}", reply.text);
}

#[test]
fn a_user_agent_that_is_no_header_is_replaced() {
    let client = Client::new(tls_config_with(RootCertStore::empty()), "a\nb");
    assert_eq!(client.user_agent, "gateway");
}
