#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use firezone_lab::portal::tls::{Front, Identity};
use futures_util::stream;
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper::service::service_fn;
use tokio::net::TcpListener;

use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;

use super::super::export::{Export, Signal};
use super::super::tests::Output;
use super::super::{Options, assemble};
use super::*;
use crate::config::{FixedEnv, LogFormat};

/// What a collector was sent.
#[derive(Debug)]
struct Seen {
    uri: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Seen {
    fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.map_or("", |value| value.to_str().unwrap())
    }
}

/// What it answers: a status, headers, a body, and trailers.
#[derive(Debug, Clone, Copy)]
struct Reply {
    status: u16,
    headers: &'static [(&'static str, &'static str)],
    body: &'static [u8],
    trailers: &'static [(&'static str, &'static str)],
}

const TAKEN: Reply = Reply {
    status: 200,
    headers: &[("content-type", "application/grpc")],
    body: b"\0\0\0\0\x02\x0a\x00",
    trailers: &[("grpc-status", "0")],
};

type Body = StreamBody<stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

fn response(reply: Reply) -> Response<Body> {
    let map = |pairs: &'static [(&'static str, &'static str)]| {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect::<HeaderMap>()
    };
    let mut frames = vec![Ok(Frame::data(Bytes::from_static(reply.body)))];
    if !reply.trailers.is_empty() {
        frames.push(Ok(Frame::trailers(map(reply.trailers))));
    }
    let mut response = Response::new(StreamBody::new(stream::iter(frames)));
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap();
    *response.headers_mut() = map(reply.headers);
    response
}

/// A collector that speaks one protocol, and answers connections in turn so often. Returns its
/// address, and that of a TLS listener in front of it with a certificate for `localhost`.
struct Collector {
    plain: SocketAddr,
    tls: SocketAddr,
    certificate: String,
    seen: Receiver<Seen>,
}

fn collector(protocol: Protocol, reply: Reply, per_connection: usize) -> Collector {
    let (requests, seen) = mpsc::channel();
    let (ready, started) = mpsc::channel();
    thread::spawn(move || {
        // What the server logs is none of the gateway's lines.
        let nobody = tracing::subscriber::NoSubscriber::default();
        let _quiet = tracing::subscriber::set_default(nobody);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let plain = listener.local_addr().unwrap();
            let identity = Identity::new(&["localhost".to_owned()], false).unwrap();
            let front = Front::start("127.0.0.1:0".parse().unwrap(), plain, &identity)
                .await
                .unwrap();
            ready
                .send((plain, front.address(), identity.pem()))
                .unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let (done, all) = tokio::sync::mpsc::channel::<()>(1);
                let left = Arc::new(std::sync::atomic::AtomicUsize::new(per_connection));
                let requests = requests.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let (requests, done, left) =
                        (requests.clone(), done.clone(), Arc::clone(&left));
                    async move {
                        let (parts, body) = request.into_parts();
                        let body = body.collect().await.unwrap().to_bytes();
                        // The test may be over.
                        let _ = requests.send(Seen {
                            uri: parts.uri.to_string(),
                            headers: parts.headers,
                            body,
                        });
                        if left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) == 1 {
                            let _ = done.try_send(());
                        }
                        Ok::<_, Infallible>(response(reply))
                    }
                });
                let io = TokioIo::new(stream);
                tokio::spawn(async move {
                    let mut all = all;
                    let end = async {
                        all.recv().await;
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    };
                    match protocol {
                        Protocol::Http => {
                            let server = hyper::server::conn::http1::Builder::new();
                            tokio::select! {
                                _ = server.serve_connection(io, service) => {}
                                () = end => {}
                            }
                        }
                        Protocol::Grpc => {
                            let server = hyper::server::conn::http2::Builder::new(
                                hyper_util::rt::TokioExecutor::new(),
                            );
                            tokio::select! {
                                _ = server.serve_connection(io, service) => {}
                                () = end => {}
                            }
                        }
                    }
                });
            }
        });
    });
    let (plain, tls, certificate) = started.recv().unwrap();
    Collector {
        plain,
        tls,
        certificate,
        seen,
    }
}

fn transport(address: &str, variables: &[(&str, &str)]) -> (Transport, Trouble) {
    let mut env: Vec<(&str, &str)> = vec![("OTEL_EXPORTER_OTLP_ENDPOINT", address)];
    env.extend(variables);
    let env: FixedEnv = env.into_iter().collect();
    let export = Export::decide(&env, Signal::Logs);
    let trouble = Trouble::default();
    let transport = Transport::new(export.target().unwrap(), trouble.clone()).unwrap();
    (transport, trouble)
}

const GRPC: (&str, &str) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");

/// As the exporter makes them.
fn post(transport: &Transport, encoding: Option<&'static str>) -> Result<(u16, Bytes), String> {
    let mut request = Request::post("http://ignored/")
        .header("content-type", "application/x-protobuf")
        .body(Bytes::from_static(b"message"))
        .unwrap();
    if let Some(encoding) = encoding {
        let encoding = HeaderValue::from_static(encoding);
        request.headers_mut().insert(CONTENT_ENCODING, encoding);
    }
    futures_util::future::FutureExt::now_or_never(transport.send_bytes(request))
        .expect("it blocks instead of waiting")
        .map(|response| (response.status().as_u16(), response.into_body()))
        .map_err(|error| error.to_string())
}

#[test]
fn over_http_a_request_has_path_host_headers_and_password() {
    let reply = Reply {
        headers: &[],
        trailers: &[],
        ..TAKEN
    };
    let collector = collector(Protocol::Http, reply, 9);
    let address = format!("http://user:p%40ss@{}/otlp", collector.plain);
    let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "x-scope=a%20b");
    let (transport, trouble) = transport(&address, &[headers]);
    for _ in 0..2 {
        let (status, body) = post(&transport, Some("gzip")).unwrap();
        assert_eq!((status, &body[..]), (200, TAKEN.body));
        let seen = collector.seen.try_recv().unwrap();
        assert_eq!(seen.uri, "/otlp/v1/logs");
        assert_eq!(seen.header("host"), collector.plain.to_string());
        assert_eq!(seen.header("content-type"), "application/x-protobuf");
        assert_eq!(seen.header("content-encoding"), "gzip");
        assert_eq!(seen.header("x-scope"), "a b");
        assert_eq!(seen.header("authorization"), "Basic dXNlcjpwQHNz");
        assert_eq!(&seen.body[..], b"message");
    }
    assert_eq!(trouble.get(), None);
    assert!(
        !format!("{transport:?}").contains("p%40ss"),
        "{transport:?}"
    );
}

/// Options that export log lines alone.
fn logs_to(collector: &str, variables: &[(&str, &str)]) -> Options {
    let mut env: Vec<(&str, &str)> = vec![("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", collector)];
    env.extend(variables);
    let env: FixedEnv = env.into_iter().collect();
    Options {
        log_format: LogFormat::Human,
        log_filter: "info".to_owned(),
        log_filter_file: None,
        export: Export::decide(&env, Signal::Traces),
        metrics: Export::decide(&env, Signal::Metrics),
        logs: Export::decide(&env, Signal::Logs),
        resource: Vec::new(),
    }
}

/// Has the exporter send one line. Returns whether it was delivered.
fn export_a_line(options: &Options) -> bool {
    let output = Output::default();
    let (subscriber, guard, problems) = assemble(options, Box::new(output), false).unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    tracing::subscriber::with_default(subscriber, || tracing::info!("a line"));
    let exporter = super::super::logger_provider(
        options.logs.target().unwrap(),
        options,
        super::super::Failures::default(),
    );
    let shown = format!("{guard:?} {exporter:?}");
    assert!(!shown.contains("hunter2"), "{shown}");
    guard.shutdown(Duration::from_secs(20))
}

#[test]
fn the_address_that_is_set_is_where_the_exporter_sends_to() {
    let method = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
    for (protocol, variables, path) in [
        (Protocol::Http, &[][..], "/own/path?x=1"),
        (Protocol::Grpc, &[GRPC][..], method),
    ] {
        let reply = match protocol {
            Protocol::Http => Reply {
                headers: &[],
                body: b"",
                trailers: &[],
                ..TAKEN
            },
            Protocol::Grpc => TAKEN,
        };
        let collector = collector(protocol, reply, 9);
        let address = format!("http://us:hunter2@{}/own/path?x=1", collector.plain);
        assert!(export_a_line(&logs_to(&address, variables)));
        let seen = collector.seen.try_recv().unwrap();
        assert!(seen.uri.ends_with(path), "{}", seen.uri);
        assert_eq!(seen.header("authorization"), "Basic dXM6aHVudGVyMg==");
        assert!(collector.seen.try_recv().is_err());
    }
}

#[test]
fn over_grpc_a_request_is_a_call_of_the_service() {
    let collector = collector(Protocol::Grpc, TAKEN, 9);
    let address = format!("http://{}", collector.plain);
    let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x");
    let (transport, _) = transport(&address, &[GRPC, headers]);
    for (encoding, first, told) in [(None, 0, ""), (Some("gzip"), 1, "gzip")] {
        let (status, body) = post(&transport, encoding).unwrap();
        assert_eq!((status, &body[..]), (200, &b"\x0a\x00"[..]));
        let seen = collector.seen.try_recv().unwrap();
        let method = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
        assert_eq!(seen.uri, format!("{address}{method}"));
        assert_eq!(seen.header("content-type"), "application/grpc");
        assert_eq!(seen.header("te"), "trailers");
        assert_eq!(seen.header("grpc-encoding"), told);
        assert_eq!(seen.header("content-encoding"), "");
        assert_eq!(seen.header("authorization"), "Bearer x");
        assert_eq!(&seen.body[..5], [first, 0, 0, 0, 7]);
        assert_eq!(&seen.body[5..], b"message");
    }
}

#[test]
fn refusals_are_told_in_words_and_only_passing_ones_are_tried_again() {
    // The HTTP status is what the exporter decides by.
    let grpc = |trailers| Reply { trailers, ..TAKEN };
    let only_headers = Reply {
        headers: &[("grpc-status", "12"), ("grpc-message", "unknown service")],
        body: b"",
        trailers: &[],
        ..TAKEN
    };
    let not_grpc = Reply {
        headers: &[],
        body: b"hello",
        trailers: &[],
        ..TAKEN
    };
    // partial_success { rejected: 3, error_message: "too old" }
    let partial = Reply {
        body: b"\0\0\0\0\x0d\x0a\x0b\x08\x03\x12\x07too old",
        ..TAKEN
    };
    let partial_http = Reply {
        body: b"\x0a\x0b\x08\x03\x12\x07too old",
        headers: &[],
        trailers: &[],
        ..TAKEN
    };
    let not_found = Reply {
        status: 404,
        ..not_grpc
    };
    let long = Reply {
        body: &[b' '; MAX_ANSWER + 1],
        ..not_grpc
    };
    let long_refusal = Reply {
        status: 403,
        ..long
    };
    let told = |protocol, reply| {
        let collector = collector(protocol, reply, 9);
        let address = format!("http://{}", collector.plain);
        let variables = match protocol {
            Protocol::Http => vec![],
            Protocol::Grpc => vec![GRPC],
        };
        let (transport, trouble) = transport(&address, &variables);
        let status = post(&transport, None).map_or(0, |(status, _)| status);
        (status, trouble.get().unwrap())
    };
    for (protocol, reply, status, words) in [
        (
            Protocol::Grpc,
            grpc(&[("grpc-status", "14"), ("grpc-message", "back soon")]),
            503,
            "the collector answers gRPC status 14, unavailable: back soon",
        ),
        (
            Protocol::Grpc,
            grpc(&[("grpc-status", "16"), ("grpc-message", "bad token hunter2")]),
            400,
            "the collector answers gRPC status 16, unauthenticated",
        ),
        (
            Protocol::Grpc,
            only_headers,
            400,
            "the collector answers gRPC status 12, unimplemented: unknown service",
        ),
        (
            Protocol::Grpc,
            not_grpc,
            400,
            "the answer is not gRPC (is this the port for http/protobuf?)",
        ),
        (
            Protocol::Grpc,
            partial,
            400,
            "the collector rejects 3 of them: too old",
        ),
        (
            Protocol::Http,
            partial_http,
            400,
            "the collector rejects 3 of them: too old",
        ),
        (
            Protocol::Grpc,
            long,
            400,
            "the answer is longer than 64 KiB",
        ),
        (
            Protocol::Http,
            long,
            400,
            "the answer is longer than 64 KiB",
        ),
        (
            Protocol::Http,
            long_refusal,
            403,
            "the collector answers 403 Forbidden",
        ),
        (
            Protocol::Http,
            not_found,
            404,
            "the collector answers 404 Not Found",
        ),
        (
            Protocol::Grpc,
            not_found,
            404,
            "the collector answers 404 Not Found",
        ),
    ] {
        assert_eq!(told(protocol, reply), (status, words.to_owned()));
    }
}

#[test]
fn what_a_collector_took_is_not_sent_again() {
    // Each of them has the status 200, but is no answer of the protocol.
    let strange = Reply {
        headers: &[],
        body: b"hello",
        trailers: &[],
        ..TAKEN
    };
    let long = Reply {
        body: &[b' '; MAX_ANSWER + 1],
        ..strange
    };
    for (protocol, reply, variables) in [
        (Protocol::Grpc, strange, &[GRPC][..]),
        (Protocol::Grpc, long, &[GRPC][..]),
        (Protocol::Http, long, &[][..]),
    ] {
        let collector = collector(protocol, reply, 9);
        let address = format!("http://{}/v1/logs", collector.plain);
        export_a_line(&logs_to(&address, variables));
        assert_eq!(collector.seen.try_iter().count(), 1, "{protocol:?}");
    }
}

#[test]
fn after_an_answer_that_is_too_long_the_next_request_gets_through() {
    let long = Reply {
        headers: &[],
        body: &[b' '; MAX_ANSWER + 1],
        trailers: &[],
        ..TAKEN
    };
    for (protocol, variables) in [(Protocol::Http, &[][..]), (Protocol::Grpc, &[GRPC][..])] {
        let collector = collector(protocol, long, 9);
        let address = format!("http://{}", collector.plain);
        let (transport, _) = transport(&address, variables);
        for _ in 0..3 {
            assert_eq!(post(&transport, None).unwrap().0, 400);
        }
        assert_eq!(collector.seen.try_iter().count(), 3);
    }
}

#[test]
fn the_wrong_protocol_is_told_and_takes_no_time() {
    for (spoken, variables) in [(Protocol::Http, &[GRPC][..]), (Protocol::Grpc, &[][..])] {
        let collector = collector(spoken, TAKEN, 9);
        let address = format!("http://{}", collector.plain);
        let (transport, trouble) = transport(&address, variables);
        let begin = std::time::Instant::now();
        assert!(post(&transport, None).is_err());
        assert!(begin.elapsed() < Duration::from_secs(5));
        let told = trouble.get().unwrap();
        assert!(told.contains("4317") && told.contains("4318"), "{told}");
    }
}

#[test]
fn a_connection_that_the_collector_closed_is_replaced() {
    for (protocol, variables) in [(Protocol::Http, &[][..]), (Protocol::Grpc, &[GRPC][..])] {
        let collector = collector(protocol, TAKEN, 1);
        let address = format!("http://{}", collector.plain);
        let (transport, trouble) = transport(&address, variables);
        for _ in 0..3 {
            post(&transport, None).unwrap();
            thread::sleep(Duration::from_millis(150));
        }
        assert_eq!(collector.seen.try_iter().count(), 3);
        assert_eq!(trouble.get(), None);
    }
}

#[test]
fn a_collector_that_does_not_answer_is_given_up_in_time() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let limit = ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "300");
    for variables in [&[limit][..], &[limit, GRPC][..]] {
        let (transport, trouble) = transport(&address, variables);
        let begin = std::time::Instant::now();
        assert!(post(&transport, None).is_err());
        assert!(
            begin.elapsed() < Duration::from_secs(3),
            "{:?}",
            begin.elapsed()
        );
        assert_eq!(trouble.get().unwrap(), "no answer within 0.3 s");
    }
}

/// One that lets everything come and reads none of it: HTTP/2 would wait for room to say goodbye.
#[test]
fn a_collector_that_is_stuck_keeps_no_connection() {
    let stuck = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", stuck.local_addr().unwrap());
    let accepted = thread::spawn(move || {
        let accept = || {
            let (mut stream, _) = stuck.accept().unwrap();
            // SETTINGS with the largest window for streams, WINDOW_UPDATE for the connection
            // (RFC 9113 §6.5.2, §6.9).
            let settings = [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff];
            let window = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0, 0, 0];
            stream
                .write_all(&[&settings[..], &window].concat())
                .unwrap();
            stream
        };
        [accept(), accept()]
    });
    let limit = ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "300");
    let (transport, _) = transport(&address, &[limit, GRPC]);
    let long = || {
        Request::post("/")
            .body(Bytes::from(vec![0; 32 << 20]))
            .unwrap()
    };
    assert!(transport.send(long()).is_err());
    // What was given up ends when there is something to do again.
    assert!(transport.send(long()).is_err());
    let [mut first, _second] = accepted.join().unwrap();
    first
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    if let Err(error) = std::io::copy(&mut first, &mut std::io::sink()) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn with_tls_the_certificate_has_to_be_trusted_and_to_have_the_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    let file = file.to_str().unwrap();
    let trusted = ("OTEL_EXPORTER_OTLP_CERTIFICATE", file);
    for (protocol, variables) in [(Protocol::Http, &[][..]), (Protocol::Grpc, &[GRPC][..])] {
        let collector = collector(protocol, TAKEN, 9);
        std::fs::write(file, &collector.certificate).unwrap();
        let with = |more: &[(&'static str, &'static str)]| [variables, more].concat();
        let by_name = format!("https://localhost:{}", collector.tls.port());

        let mut all = with(&[]);
        all.push(trusted);
        let (secure, _) = transport(&by_name, &all);
        assert_eq!(post(&secure, None).unwrap().0, 200);
        assert!(
            collector
                .seen
                .try_recv()
                .unwrap()
                .body
                .ends_with(b"message")
        );

        let (stranger, trouble) = transport(&by_name, &with(&[]));
        assert!(post(&stranger, None).is_err());
        assert!(trouble.get().unwrap().contains("certificate"));

        let (by_address, trouble) = transport(&format!("https://{}", collector.tls), &all);
        assert!(post(&by_address, None).is_err());
        assert!(trouble.get().unwrap().contains("not valid for name"));
        assert_eq!(collector.seen.try_iter().count(), 0);
    }
}

#[test]
fn on_a_thread_that_drives_tasks_nothing_is_blocked() {
    let (transport, trouble) = transport("http://127.0.0.1:1", &[]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    assert!(runtime.block_on(async { post(&transport, None) }).is_err());
    assert!(trouble.get().is_some());
    // The engine goes away in a place where a runtime must not wait for its end.
    runtime.block_on(async move { drop(transport) });
}

#[test]
fn exporting_log_lines_does_not_make_more_of_them() {
    let collector = collector(Protocol::Grpc, TAKEN, 99);
    let address = format!("http://{}", collector.plain);
    let env: FixedEnv = [GRPC, ("OTEL_EXPORTER_OTLP_ENDPOINT", address.as_str())]
        .into_iter()
        .collect();
    let options = Options {
        log_format: LogFormat::Human,
        // The HTTP/2 library says a lot.
        log_filter: "trace".to_owned(),
        log_filter_file: None,
        export: Export::decide(&env, Signal::Traces),
        metrics: Export::decide(&env, Signal::Metrics),
        logs: Export::decide(&env, Signal::Logs),
        resource: Vec::new(),
    };
    let output = Output::default();
    let (subscriber, guard, _) = assemble(&options, Box::new(output.clone()), false).unwrap();
    // The threads of the exporters have no other.
    tracing::subscriber::set_global_default(subscriber).unwrap();
    tracing::info!("the only one");
    thread::sleep(Duration::from_millis(2500));
    tracing::info!("the other one");
    assert!(guard.shutdown(Duration::from_secs(10)));
    assert!(output.text().contains("h2::"), "{}", output.text());
    let scopes: Vec<_> = collector
        .seen
        .try_iter()
        .map(|seen| ExportLogsServiceRequest::decode(seen.body.slice(PREFIX..)).unwrap())
        .flat_map(|request| request.resource_logs)
        .flat_map(|resource| resource.scope_logs)
        .collect();
    let lines: usize = scopes.iter().map(|s| s.log_records.len()).sum();
    let targets: Vec<_> = scopes
        .iter()
        .map(|s| &s.scope.as_ref().unwrap().name)
        .collect();
    assert!(lines >= 2, "{scopes:?}");
    assert!(
        targets.iter().all(|t| t.starts_with("firezone_gateway")),
        "{targets:?}"
    );
}
