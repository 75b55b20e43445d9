//! The admin server through a real socket, as probes see it.
#![allow(clippy::unwrap_used)]

mod access;
mod commands;
mod events;
mod health;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Instant,
};

use tokio::{runtime::Runtime, sync::oneshot};

use super::{
    client::{Answer, ask},
    model::{
        BackoffStatus, DeviceStatus, HostFinding, PortalError, PortalState, PortalStatus,
        RelayStatus,
    },
    *,
};
use crate::config::{
    ExitStatus, FixedEnv, Settings,
    cli::{HealthcheckArgs, LogFilterArgs, StatusArgs},
};
use crate::telemetry::metrics::Metrics;

/// Whole seconds, which survive JSON to the last bit.
fn now() -> f64 {
    Moment::now().unix.floor()
}

fn good() -> Status {
    Status {
        schema: model::SCHEMA,
        version: "1.6.0".into(),
        name: "edge-7".into(),
        id: "abc".into(),
        started_at: now(),
        portal: PortalStatus {
            state: PortalState::Joined,
            since: now(),
            initialized: true,
            ..PortalStatus::default()
        },
        relays: vec![relay("allocated")],
        device: DeviceStatus {
            name: "tun-firezone".into(),
            up: true,
            addresses: vec!["100.64.0.1".into()],
            ..DeviceStatus::default()
        },
        ..Status::default()
    }
}

fn relay(state: &str) -> RelayStatus {
    RelayStatus {
        id: "r1".into(),
        addresses: vec!["192.0.2.4:3478".into()],
        state: state.into(),
        since: now(),
        ..RelayStatus::default()
    }
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn tcp(socket: &Socket) -> SocketAddr {
    match socket.place().unwrap() {
        Place::Tcp(address) => address,
        Place::Unix(path) => panic!("{}", path.display()),
    }
}

struct Server {
    runtime: Runtime,
    address: SocketAddr,
    status: watch::Sender<Arc<Status>>,
    liveness: Liveness,
    drain: Drain,
    state: AdminState,
    stop: oneshot::Sender<()>,
    ended: tokio::task::JoinHandle<io::Result<()>>,
}

impl Server {
    fn start(initial: Status) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (status, receiver) = watch::channel(Arc::new(initial));
        let liveness = Liveness::default();
        let drain = Drain::default();
        let state = AdminState::new(receiver, liveness.clone(), drain.clone());
        let listener = runtime.block_on(bind(any_port())).unwrap();
        let address = tcp(&listener);
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = runtime.spawn(serve(listener, state.clone(), Offer::Everything, async {
            let _ = stopped.await;
        }));
        Self {
            runtime,
            address,
            status,
            liveness,
            drain,
            state,
            stop,
            ended,
        }
    }

    /// Serves another state for as long as this one, and says where.
    fn also(&self, state: AdminState) -> SocketAddr {
        let socket = self.runtime.block_on(bind(any_port())).unwrap();
        let address = tcp(&socket);
        self.serve(socket, state, Offer::Everything);
        address
    }

    fn serve(&self, socket: Socket, state: AdminState, offer: Offer) {
        let endless = std::future::pending();
        self.runtime.spawn(serve(socket, state, offer, endless));
    }

    fn change(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| {
            let mut next = Status::clone(status);
            change(&mut next);
            *status = Arc::new(next);
        });
    }

    fn get(&self, path: &str) -> Answer {
        ask(self.address, path).unwrap()
    }

    fn code(&self, path: &str) -> u16 {
        self.get(path).code
    }

    /// Head and body as they come.
    fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

#[test]
fn browsers_get_a_page_that_needs_nothing_from_elsewhere() {
    let server = Server::start(good());
    let get = |path: &str, accept: &str| {
        server.raw(&format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n"
        ))
    };
    let page = get("/", "text/html,application/xhtml+xml");
    assert!(page.contains("content-type: text/html"), "{page}");
    assert!(page.contains("default-src 'none'"), "{page}");
    assert!(page.contains("<title>firezone-gateway</title>"));
    assert!(
        get("/", "*/*").contains("/livez"),
        "a list for everybody else"
    );
    for (path, kind) in [
        ("/page.css", "content-type: text/css"),
        ("/page.js", "content-type: text/javascript"),
    ] {
        let part = get(path, "*/*");
        assert!(part.contains(kind), "{part}");
        assert!(page.contains(&format!("\"{path}\"")), "{path} is not used");
        assert!(!part.contains("://"), "{path} leads elsewhere");
        // Names come from outside: they are text, never markup.
        for unsafe_call in ["innerHTML", "insertAdjacent", "document.write", "eval("] {
            assert!(!part.contains(unsafe_call), "{path}: {unsafe_call}");
        }
    }
    assert!(!page.contains("://"));
    // The page takes the time from it.
    let status = get("/status", "application/json");
    assert!(status.contains("\r\ndate: "), "{status}");
}

#[test]
fn metrics_are_told_in_the_format_of_prometheus_if_there_are_any() {
    let server = Server::start(good());
    assert_eq!(server.code("/metrics"), 404);

    let state = server.state.clone();
    let read = state.clone();
    let resource = opentelemetry_sdk::Resource::builder_empty().build();
    let metrics = Metrics::new(resource, None, move || read.reading()).unwrap();
    let address = server.also(state.measured(Arc::new(metrics)));
    let answer = ask(address, "/metrics").unwrap();
    assert_eq!(answer.code, 200);
    let joined = "gateway_portal_state{state=\"joined\"} 1\n";
    assert!(answer.body.contains(joined), "{}", answer.body);
    let ready = "gateway_health{probe=\"ready\"} 1\n";
    assert!(answer.body.contains(ready), "{}", answer.body);
    server.change(|status| status.portal.state = PortalState::Waiting);
    let deadline = Instant::now() + Duration::from_secs(10);
    while ask(address, "/metrics").unwrap().body.contains(joined) {
        assert!(Instant::now() < deadline, "the change is not seen");
    }
}

#[test]
fn states_of_the_portal_are_written_the_same_everywhere() {
    for name in PortalState::NAMES {
        let state: PortalState = serde_json::from_value(name.into()).unwrap();
        assert_eq!(state.as_str(), name);
        assert_eq!(serde_json::to_value(state).unwrap(), name);
    }
    // What is no state is answered with a list of all there are.
    let unknown = serde_json::from_value::<PortalState>("?".into()).unwrap_err();
    let unknown = unknown.to_string();
    let known: Vec<&str> = unknown.split('`').skip(3).step_by(2).collect();
    assert_eq!(known, PortalState::NAMES, "{unknown}");
}

#[test]
fn status_is_the_published_document() {
    let status = good();
    let server = Server::start(status.clone());
    let answer = server.get("/status");
    assert_eq!(answer.code, 200);
    assert_eq!(
        serde_json::from_str::<Status>(&answer.body).unwrap(),
        status
    );
}

/// A server whose slow path is `slow_path`, for a status that lacks what has to be asked for.
fn asking(
    slow_path: impl FnOnce(mpsc::Receiver<Question>) + Send + 'static,
) -> (AdminState, Runtime) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    // Nobody publishes anything more, but the last word stands.
    let (_, receiver) = watch::channel(Arc::new(good()));
    let (questions, asked) = mpsc::channel(1);
    std::thread::spawn(move || slow_path(asked));
    let state = AdminState::new(receiver, Liveness::default(), Drain::default());
    (state.asking(questions), runtime)
}

#[test]
fn what_is_not_published_is_asked_for() {
    let (state, runtime) = asking(|mut asked| {
        while let Some(question) = asked.blocking_recv() {
            let answer = Status {
                complete: true,
                ..good()
            };
            question.send(Arc::new(answer)).unwrap();
        }
    });
    assert!(runtime.block_on(state.complete_status()).complete);
    assert!(!state.status().complete, "it is not published");
    state.drain.begin();
    let status = runtime.block_on(state.complete_status());
    assert!(status.draining && !status.complete, "not any more");
}

#[test]
fn status_is_given_out_also_when_the_slow_path_does_not_answer() {
    // It is stuck, so that further questions find no place; or gone; or drops them.
    let (state, runtime) = asking(|asked| {
        std::thread::sleep(Duration::from_secs(30));
        drop(asked);
    });
    for _ in 0..2 {
        assert!(!runtime.block_on(state.complete_status()).complete);
    }
    let (state, runtime) = asking(drop);
    assert!(!runtime.block_on(state.complete_status()).complete);
    let (state, runtime) = asking(|mut asked| while asked.blocking_recv().is_some() {});
    assert!(!runtime.block_on(state.complete_status()).complete);
}

#[test]
fn a_document_of_an_older_gateway_is_read() {
    let mut document = serde_json::to_value(Status {
        clients: vec![model::ClientStatus::default()].into(),
        ..good()
    })
    .unwrap();
    let forget = |value: &mut serde_json::Value, names: &[&str]| {
        for name in names {
            value.as_object_mut().unwrap().remove(*name).unwrap();
        }
    };
    forget(&mut document, &["complete", "handshakes"]);
    forget(
        &mut document["relays"][0],
        &[
            "allocated_at",
            "allocation_expires_at",
            "allocations",
            "flaps",
            "last_error_at",
        ],
    );
    forget(
        &mut document["clients"][0],
        &[
            "path_since",
            "path_changes",
            "path_history",
            "pair_count",
            "pairs",
            "local_candidate_count",
            "local_candidates",
            "remote_candidate_count",
            "remote_candidates",
        ],
    );
    let status: Status = serde_json::from_value(document).unwrap();
    assert_eq!(status.relays, good().relays);
}

#[test]
fn index_lists_every_page_and_others_are_not_found() {
    let server = Server::start(good());
    let index = server.get("/");
    assert_eq!(index.code, 200);
    for page in ["/livez", "/healthz", "/startupz", "/readyz", "/status"] {
        assert!(index.body.contains(page), "{page}");
        assert_eq!(server.code(page), 200, "{page}");
    }
    for path in ["/metrics", "/readyz/x", "/..%2fetc", "//"] {
        assert_eq!(server.code(path), 404, "{path}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused_without_harm() {
    let server = Server::start(good());
    for (request, answer) in [
        (
            "POST /readyz HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
            "HTTP/1.1 405 ",
        ),
        ("\x16\x03\x01\r\n\r\n", "HTTP/1.1 400 "),
        (
            "GET /readyz?exclude=%ff%zz&&==&verbose HTTP/1.1\r\nHost: x\r\n\r\n",
            "HTTP/1.1 200 ",
        ),
    ] {
        let got = server.raw(request);
        assert!(got.starts_with(answer), "{request:?} gave {got:?}");
    }
    assert_eq!(server.code("/readyz"), 200);
}

#[test]
fn answers_end_the_connection_and_are_not_cached() {
    let server = Server::start(good());
    let answer = server
        .raw("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        .to_lowercase();
    assert!(answer.contains("connection: close"), "{answer}");
    assert!(answer.contains("cache-control: no-store"), "{answer}");
}

#[test]
fn connections_that_send_nothing_are_ended_and_give_way() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (_status, receiver) = watch::channel(Arc::new(good()));
    let state = AdminState::new(receiver, Liveness::default(), Drain::default());
    let listener = runtime.block_on(bind(any_port())).unwrap();
    let address = tcp(&listener);
    let bounded = Bounded::with_limits(listener, 2, Duration::from_millis(200));
    runtime
        .spawn(async move { axum::serve(bounded, routes::router(state, Offer::Everything)).await });

    // Both places are taken by peers that begin a request and never finish it.
    let mut slow: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET /livez HT").unwrap();
            stream
        })
        .collect();

    assert_eq!(ask(address, "/livez").unwrap().code, 200);
    for stream in &mut slow {
        // Ended by the server: the end of the stream, or a reset.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{rest:?}");
    }
}

#[test]
fn address_in_use_names_the_setting() {
    let server = Server::start(good());
    let error = server.runtime.block_on(bind(server.address)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("HEALTH_CHECK_ADDR") && text.contains(&server.address.to_string()),
        "{text}"
    );
}

#[test]
fn server_ends_when_asked_also_with_an_idle_connection() {
    let server = Server::start(good());
    let _idle = TcpStream::connect(server.address).unwrap();
    server.stop.send(()).unwrap();
    let ended = server.runtime.block_on(async {
        tokio::time::timeout(LINGER + Duration::from_secs(20), server.ended).await
    });
    ended.unwrap().unwrap().unwrap();
}

fn healthcheck_args(check: &[crate::config::Probe], addr: Option<&str>) -> HealthcheckArgs {
    HealthcheckArgs {
        check: check.to_vec(),
        addr: addr.map(str::to_owned),
    }
}

fn ask_status(address: SocketAddr, json: bool) -> (ExitStatus, String, String) {
    let arguments = StatusArgs {
        watch: None,
        json,
        addr: Some(address.to_string()),
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let exit = status(
        &arguments,
        &Settings::default(),
        &FixedEnv::default(),
        false,
        &mut out,
        &mut err,
    )
    .unwrap();
    (
        exit,
        String::from_utf8(out).unwrap(),
        String::from_utf8(err).unwrap(),
    )
}
