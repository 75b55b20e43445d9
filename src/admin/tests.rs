//! The admin server through a real socket, as probes see it.
#![allow(clippy::unwrap_used)]

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
fn with_a_token_only_the_probes_are_open_to_everybody() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "sesame\n").unwrap();
    let server = Server::start(good());
    let guarded = server
        .state
        .clone()
        .guarded(Some(AdminToken::in_file(&file)));
    let address = server.also(guarded);
    for path in ["/livez", "/healthz", "/startupz", "/readyz?verbose"] {
        assert_eq!(ask(address, path).unwrap().code, 200, "{path}");
    }
    for path in ["/", "/status", "/metrics", "/page.js", "/events"] {
        let answer = ask(address, path).unwrap();
        assert_eq!(answer.code, 401, "{path}");
        assert!(!answer.body.contains("portal"), "{}", answer.body);
    }
    assert_eq!(ask(address, "/nothing").unwrap().code, 404);

    let arguments = StatusArgs {
        watch: None,
        json: true,
        addr: Some(address.to_string()),
    };
    let shown = |variables: &[(&str, &str)]| {
        let env: FixedEnv = variables.iter().copied().collect();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let settings = Settings::default();
        let exit = status(&arguments, &settings, &env, false, &mut out, &mut err).unwrap();
        let text = [out, err].concat();
        (exit, String::from_utf8(text).unwrap())
    };
    let (exit, text) = shown(&[]);
    assert_eq!(exit, ExitStatus::Failure);
    assert!(text.contains("FIREZONE_ADMIN_TOKEN_FILE"), "{text}");
    let path = file.to_str().unwrap();
    let (exit, text) = shown(&[("FIREZONE_ADMIN_TOKEN_FILE", path)]);
    assert_eq!(exit, ExitStatus::Ok, "{text}");
    assert!(
        text.contains("\"portal\"") && !text.contains("sesame"),
        "{text}"
    );
    // The file is gone: nobody is let in, and nothing else breaks.
    std::fs::remove_file(&file).unwrap();
    assert_eq!(ask(address, "/status").unwrap().code, 503);
    assert_eq!(ask(address, "/livez").unwrap().code, 200);
}

/// What `log-filter` prints.
fn run_log_filter(
    address: SocketAddr,
    filter: Option<&str>,
    reset: bool,
    variables: &[(&str, &str)],
) -> (ExitStatus, String) {
    let arguments = LogFilterArgs {
        filter: filter.map(str::to_owned),
        reset,
        addr: Some(address.to_string()),
    };
    let env: FixedEnv = variables.iter().copied().collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let settings = Settings::default();
    let exit = log_filter(&arguments, &settings, &env, &mut out, &mut err).unwrap();
    (exit, String::from_utf8([out, err].concat()).unwrap())
}

#[test]
fn the_log_filter_is_shown_and_changed_from_the_same_host() {
    let server = Server::start(good());
    let run = |filter, reset| run_log_filter(server.address, filter, reset, &[]);
    assert_eq!(
        run(Some("info,firezone_gateway=debug"), false),
        (ExitStatus::Ok, "info,firezone_gateway=debug\n".to_owned())
    );
    let (exit, text) = run(Some("firezone_gateway=loud"), false);
    assert_eq!(exit, ExitStatus::Failure);
    assert!(text.contains("no log filter: "), "{text}");
    assert_eq!(
        run(None, false),
        (ExitStatus::Ok, "info,firezone_gateway=debug\n".to_owned())
    );
    // What was configured is nothing here, which is no filter.
    assert_eq!(run(None, true).0, ExitStatus::Failure);
    let long = "x".repeat(10_000);
    let answer = server.raw(&format!(
        "PUT /log-filter HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n{long}"
    ));
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(server.state.log.filter(), "info,firezone_gateway=debug");
}

#[test]
fn without_a_token_nobody_else_changes_the_log() {
    let server = Server::start(good());
    let put = |headers: &str| {
        server.raw(&format!(
            "PUT /log-filter HTTP/1.1\r\n{headers}Content-Length: 5\r\n\r\ntrace"
        ))
    };
    for headers in [
        // A browser of this host that was led here by a name.
        "Host: evil.example\r\n",
        "Host: 127.0.0.1.evil.example:8080\r\n",
        // What a proxy on this host passes on.
        "Host: 127.0.0.1\r\nX-Forwarded-For: 192.0.2.1\r\n",
        "Host: 127.0.0.1\r\nForwarded: for=192.0.2.1\r\n",
    ] {
        let answer = put(headers);
        assert!(answer.starts_with("HTTP/1.1 403"), "{headers}: {answer}");
        assert!(answer.contains("FIREZONE_ADMIN_TOKEN_FILE"), "{answer}");
    }
    assert_eq!(server.state.log.filter(), "");
    for path in ["/log", "/log-filter"] {
        let read = |host: &str| {
            let answer = server.raw(&format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
            answer[..12].to_owned()
        };
        assert_eq!(read("evil.example"), "HTTP/1.1 403", "{path}");
        assert_eq!(read("127.0.0.1"), "HTTP/1.1 200", "{path}");
    }
    for headers in [
        "Host: 127.0.0.1:8080\r\n",
        "Host: [::1]:8080\r\n",
        "Host: localhost\r\n",
    ] {
        let answer = put(headers);
        assert!(answer.starts_with("HTTP/1.1 200"), "{headers}: {answer}");
    }
}

#[test]
fn with_a_token_whoever_shows_it_changes_the_log_and_nobody_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "sesame\n").unwrap();
    let server = Server::start(good());
    let guarded = server
        .state
        .clone()
        .guarded(Some(AdminToken::in_file(&file)));
    let address = server.also(guarded);
    let (exit, text) = run_log_filter(address, Some("trace"), false, &[]);
    assert_eq!(exit, ExitStatus::Failure);
    assert!(text.contains("FIREZONE_ADMIN_TOKEN_FILE"), "{text}");
    assert_eq!(server.state.log.filter(), "");
    let path = file.to_str().unwrap();
    let knowing = [("FIREZONE_ADMIN_TOKEN_FILE", path)];
    let (exit, text) = run_log_filter(address, Some("trace"), false, &knowing);
    assert_eq!((exit, text.as_str()), (ExitStatus::Ok, "trace\n"));
}

/// A stream of events, as it comes.
struct Stream {
    stream: TcpStream,
    text: String,
}

impl Stream {
    fn open(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        let request = b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n";
        stream.write_all(request).unwrap();
        let timeout = Some(Duration::from_secs(10));
        stream.set_read_timeout(timeout).unwrap();
        Self {
            stream,
            text: String::new(),
        }
    }

    /// Reads until something is told, and says whether it ever was.
    fn until(&mut self, wanted: &str) -> bool {
        let mut buffer = [0; 4096];
        while !self.text.contains(wanted) {
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return false,
                Ok(length) => self
                    .text
                    .push_str(&String::from_utf8_lossy(&buffer[..length])),
            }
        }
        true
    }

    /// When the events came about.
    fn times(&self) -> Vec<&str> {
        let events = self.text.split("data: {\"at\":").skip(1);
        events.filter_map(|event| event.split(',').next()).collect()
    }
}

#[test]
fn events_tell_what_changes_for_longer_than_an_answer_may_take() {
    let server = Server::start(good());
    let mut one = Stream::open(server.address);
    assert!(one.until("edge-7"), "{}", one.text);
    for head in [
        "HTTP/1.1 200",
        "content-type: text/event-stream",
        "cache-control: no-store",
        "content-security-policy: default-src 'none'",
        "retry: 2000\n\nevent: status\ndata: {",
    ] {
        assert!(one.text.contains(head), "{}", one.text);
    }
    let mut other = Stream::open(server.address);
    server.change(|status| status.portal.state = PortalState::Waiting);
    assert!(one.until("\"state\":\"waiting\""), "{}", one.text);
    assert!(one.until("not joined"), "readiness is in it: {}", one.text);
    let began = Instant::now();
    for n in 0..6 {
        let name = format!("edge-{n}-anew");
        server.change(|status| status.name.clone_from(&name));
        assert!(one.until(&name), "{}", one.text);
    }
    let took = began.elapsed();
    assert!(
        took > Duration::from_secs(5),
        "more often than once a second"
    );
    assert!(other.until("edge-5-anew"), "{}", other.text);
    // All are told the same thing, put together once.
    let (one, other) = (one.times(), other.times());
    assert!(one.ends_with(&other[1..]), "{one:?} {other:?}");
}

#[test]
fn events_end_with_the_one_that_tells_of_the_shutdown() {
    let server = Server::start(good());
    let mut stream = Stream::open(server.address);
    assert!(stream.until("edge-7"));
    server.drain.begin();
    server.change(|status| status.draining = true);
    assert!(!stream.until("never told"), "it ends");
    let last = stream.text.rsplit("data: ").next().unwrap();
    assert!(last.contains("\"draining\":true"), "{last}");
    assert!(stream.text.ends_with("0\r\n\r\n"), "in order");
}

#[test]
fn the_number_of_streams_is_bounded_and_places_are_given_back() {
    let server = Server::start(good());
    let mut streams: Vec<Stream> = (0..16).map(|_| Stream::open(server.address)).collect();
    for stream in &mut streams {
        assert!(stream.until("edge-7"));
    }
    assert_eq!(server.code("/events"), 503);
    assert_eq!(server.code("/status"), 200);
    streams.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut stream = Stream::open(server.address);
        if stream.until("edge-7") {
            break;
        }
        assert!(Instant::now() < deadline, "{}", stream.text);
    }
}

#[test]
fn a_browser_that_takes_no_event_loses_its_stream() {
    let mut huge = good();
    huge.name = "x".repeat(16 << 20);
    let server = Server::start(huge);
    let mut stream = Stream::open(server.address);
    assert!(stream.until("HTTP/1.1 200"));
    std::thread::sleep(Duration::from_secs(7));
    // What is in the kernel's buffers comes, and then nothing more.
    let timeout = Some(Duration::from_secs(2));
    stream.stream.set_read_timeout(timeout).unwrap();
    let mut rest = Vec::new();
    let end = stream.stream.take(32 << 20).read_to_end(&mut rest);
    let end = end.map_err(|error| error.kind());
    assert!(
        matches!(end, Ok(_) | Err(io::ErrorKind::ConnectionReset)),
        "{end:?}"
    );
    assert!(rest.len() < 16 << 20, "it was cut off");
}

#[test]
fn the_busiest_clients_are_told_of_if_there_are_too_many() {
    let server = Server::start(good());
    server.change(|status| {
        status.clients = (0..500)
            .map(|n| model::ClientStatus {
                id: format!("client-{n}-"),
                rx_bytes: n,
                ..model::ClientStatus::default()
            })
            .collect();
    });
    let mut stream = Stream::open(server.address);
    assert!(stream.until("\n\n\r\n"), "{}", stream.text);
    assert!(stream.until("client-300-"), "{}", stream.text);
    assert!(stream.text.contains("\"clients_left_out\":300"));
    assert!(!stream.text.contains("client-299-"), "{}", stream.text);
}

#[test]
fn where_only_the_probes_are_there_is_nothing_else() {
    let server = Server::start(good());
    let socket = server.runtime.block_on(bind(any_port())).unwrap();
    let address = tcp(&socket);
    server.serve(socket, server.state.clone(), Offer::Probes);
    for path in ["/livez", "/healthz", "/startupz", "/readyz?verbose"] {
        assert_eq!(ask(address, path).unwrap().code, 200, "{path}");
    }
    for path in [
        "/status",
        "/events",
        "/metrics",
        "/log-filter",
        "/page.js",
        "/x",
    ] {
        let answer = ask(address, path).unwrap();
        assert_eq!(answer.code, 404, "{path}");
        assert!(answer.body.contains("FIREZONE_ADMIN_ADDR"), "{path}");
    }
    let root = ask(address, "/").unwrap();
    assert!(
        root.code == 200 && root.body.contains("/livez"),
        "{}",
        root.body
    );
    let (exit, _, err) = ask_status(address, false);
    assert_eq!(exit, ExitStatus::Failure);
    assert!(err.contains("has only the probes"), "{err}");
}

#[test]
fn a_unix_socket_is_for_its_owner_and_group_and_counts_as_this_host() {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let place = Place::Unix(path.clone());
    let server = Server::start(good());
    let bind_here = || server.runtime.block_on(bind(place.clone()));
    // What a process that is gone has left behind is in nobody's way.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let socket = bind_here().unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o660);
    server.serve(socket, server.state.clone(), Offer::Everything);
    // What lives is.
    let error = bind_here().unwrap_err().to_string();
    assert!(error.contains("FIREZONE_ADMIN_ADDR"), "{error}");
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let onto_file = server.runtime.block_on(bind(Place::Unix(file.clone())));
    assert!(onto_file.is_err());
    assert_eq!(std::fs::read_to_string(file).unwrap(), "mine");

    let setting = place.to_string();
    let env: FixedEnv = [("FIREZONE_ADMIN_ADDR", setting.as_str())]
        .into_iter()
        .collect();
    let mut out = Vec::new();
    let arguments = StatusArgs {
        json: true,
        watch: None,
        addr: None,
    };
    let nothing = Settings::default();
    let exit = status(&arguments, &nothing, &env, false, &mut out, &mut io::sink()).unwrap();
    assert_eq!(exit, ExitStatus::Ok);
    assert!(String::from_utf8(out).unwrap().contains("edge-7"));
    let arguments = LogFilterArgs {
        filter: Some("debug".into()),
        reset: false,
        addr: Some(setting),
    };
    let nowhere = FixedEnv::default();
    let mut out = Vec::new();
    let exit = log_filter(&arguments, &nothing, &nowhere, &mut out, &mut io::sink()).unwrap();
    assert_eq!(
        (exit, out.as_slice()),
        (ExitStatus::Ok, b"debug\n".as_slice())
    );
}

#[test]
fn healthcheck_asks_where_the_probes_are() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Unix(dir.path().join("admin.sock"));
    let server = Server::start(good());
    let socket = server.runtime.block_on(bind(place.clone())).unwrap();
    server.serve(socket, server.state.clone(), Offer::Everything);
    let place = place.to_string();
    let asks = |health: &str, admin: &str| {
        let env: FixedEnv = [
            ("HEALTH_CHECK_ADDR", health),
            ("FIREZONE_ADMIN_ADDR", admin),
        ]
        .into_iter()
        .collect();
        let mut out = Vec::new();
        let settings = Settings::default();
        let exit = healthcheck(&healthcheck_args(&[], None), &settings, &env, &mut out).unwrap();
        (exit, String::from_utf8(out).unwrap())
    };
    let passed = (ExitStatus::Ok, "live: ok\nstarted: ok\n".to_owned());
    let probes = server.address.to_string();
    assert_eq!(asks(&probes, "unix:/nowhere/at.all"), passed);
    assert_eq!(asks("off", &place), passed);
    let (exit, text) = asks("off", "off");
    assert_eq!(exit, ExitStatus::Ok);
    assert!(text.contains("not checked"), "{text}");
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
fn healthy_gateway_passes_everything() {
    let server = Server::start(good());
    let heartbeat = server.liveness.register("slow_path", Instant::now());
    for path in ["/livez", "/healthz", "/startupz", "/readyz"] {
        let answer = server.get(path);
        assert_eq!((answer.code, answer.body.as_str()), (200, "ok"), "{path}");
    }
    assert_eq!(
        server.get("/readyz?verbose").body,
        "[+]portal ok\n[+]device ok\n[+]host ok\n[+]relays ok: 1 of 1 usable\n[+]drain ok\n\
         readyz check passed\n"
    );
    assert_eq!(
        server.get("/startupz?verbose").body,
        "[+]device ok\n[+]host ok\n[+]init ok\nstartupz check passed\n"
    );
    assert_eq!(
        server.get("/livez?verbose").body,
        "[+]slow_path ok\nlivez check passed\n"
    );
    drop(heartbeat);
}

#[test]
fn portal_outage_fails_readiness_with_its_reason_and_nothing_else() {
    let server = Server::start(good());
    server.change(|status| {
        status.portal.state = PortalState::Waiting;
        status.portal.backoff = Some(BackoffStatus {
            outage_since: now(),
            attempt: 3,
            next_attempt_at: Some(now() + 3650.0),
            budget_left: None,
            ..BackoffStatus::default()
        });
        status.portal.last_error = Some(PortalError {
            kind: "tcp_connect".into(),
            message: "connection refused".into(),
            at: now(),
        });
    });

    let answer = server.get("/readyz");

    assert_eq!(answer.code, 503);
    let first = answer.body.lines().next().unwrap();
    assert!(
        first.starts_with("[-]portal not joined: waiting for attempt 4 in 36")
            && first.contains(" s: tcp_connect: connection refused (for "),
        "{first}"
    );
    assert!(answer.body.ends_with("readyz check failed\n"));
    assert_eq!(server.code("/livez"), 200);
    assert_eq!(server.code("/startupz"), 200);
}

#[test]
fn each_state_of_the_portal_has_its_words() {
    let server = Server::start(good());
    for (state, words) in [
        (PortalState::Idle, "not joined: not started"),
        (
            PortalState::Connecting,
            "not joined: connecting, attempt 1: http_503",
        ),
        (PortalState::Joining, "not joined: joining, attempt 1"),
        (PortalState::Waiting, "not joined: waiting for attempt 1"),
        (
            PortalState::Blocked,
            "not joined: blocked: token refused: http_503: busy",
        ),
        (PortalState::GaveUp, "not joined: gave up"),
        (PortalState::Closed, "not joined: closed (for"),
    ] {
        server.change(|status| {
            status.portal.state = state;
            status.portal.last_error = Some(PortalError {
                kind: "http_503".into(),
                message: "busy".into(),
                at: 0.0,
            });
        });
        let answer = server.get("/readyz");
        assert_eq!(answer.code, 503);
        assert!(
            answer.body.contains(&format!("[-]portal {words}")),
            "{}",
            answer.body
        );
    }
}

#[test]
fn before_the_first_configuration_the_gateway_is_live_but_not_started() {
    let server = Server::start(Status::default());
    assert_eq!(server.code("/livez"), 200);
    assert_eq!(server.code("/readyz"), 503);
    let answer = server.get("/startupz");
    assert_eq!(answer.code, 503);
    assert!(
        answer.body.contains("[-]device not up yet"),
        "{}",
        answer.body
    );
    assert!(
        answer
            .body
            .contains("[-]init no configuration from the portal yet: not joined: not started"),
        "{}",
        answer.body
    );
}

#[test]
fn joined_without_configuration_is_not_started() {
    let server = Server::start(good());
    server.change(|status| status.portal.initialized = false);
    assert!(
        server
            .get("/startupz")
            .body
            .contains("[-]init the portal has not sent a configuration yet")
    );
}

#[test]
fn host_errors_fail_start_with_their_remedy_then_readiness_and_warnings_are_told() {
    let server = Server::start(good());
    let finding = |level: &str| HostFinding {
        name: "forwarding_ipv4".into(),
        level: level.into(),
        found: "off".into(),
        fix: Some("sysctls: [net.ipv4.ip_forward=1]".into()),
    };
    let told = "forwarding_ipv4: off (fix: sysctls: [net.ipv4.ip_forward=1])";
    server.change(|status| status.host = vec![finding("warning"), finding("ok")]);
    for path in ["/startupz?verbose", "/readyz?verbose"] {
        let answer = server.get(path);
        assert_eq!(answer.code, 200);
        let line = format!("[+]host ok: with a warning: {told}\n");
        assert!(answer.body.contains(&line), "{}", answer.body);
    }

    server.change(|status| status.host = vec![finding("error"), finding("warning")]);
    let answer = server.get("/startupz");
    assert_eq!(answer.code, 503);
    let line = format!("[-]host {told} (for ");
    assert!(answer.body.contains(&line), "{}", answer.body);
    // One bad look is not enough for a gateway that works.
    let answer = server.get("/readyz?verbose");
    assert_eq!(answer.code, 200);
    let line = format!("[+]host ok: about to fail: {told}\n");
    assert!(answer.body.contains(&line), "{}", answer.body);
    assert_eq!(server.code("/livez"), 200);
}

#[test]
fn broken_device_fails_start_and_readiness() {
    let server = Server::start(good());
    server.change(|status| status.device.error = Some("operation not permitted".into()));
    for path in ["/startupz", "/readyz"] {
        let answer = server.get(path);
        assert_eq!(answer.code, 503);
        assert!(
            answer
                .body
                .contains("[-]device tun-firezone: operation not permitted"),
            "{}",
            answer.body
        );
    }
    assert_eq!(server.code("/livez"), 200);
}

#[test]
fn no_relay_offered_is_ready_and_no_relay_usable_is_not() {
    let server = Server::start(Status {
        relays: Vec::new(),
        ..good()
    });
    let answer = server.get("/readyz?verbose");
    assert_eq!(answer.code, 200);
    assert!(
        answer.body.contains("[+]relays ok: none offered"),
        "{}",
        answer.body
    );

    let server = Server::start(Status {
        relays: vec![RelayStatus {
            last_error: Some("401".into()),
            ..relay("failed")
        }],
        ..good()
    });
    let answer = server.get("/readyz");
    assert_eq!(answer.code, 503);
    assert!(
        answer
            .body
            .contains("[-]relays none of 1 usable: 192.0.2.4:3478 failed for "),
        "{}",
        answer.body
    );
}

#[test]
fn an_error_that_was_overcome_is_no_reason_not_to_be_ready() {
    let relay = |state: &str, error_at| RelayStatus {
        last_error: Some("the relay does not answer".into()),
        last_error_at: Some(error_at),
        ..relay(state)
    };
    for (state, error_at, told) in [
        ("failed", now(), true),
        ("allocating", now() - 3600.0, false),
    ] {
        let server = Server::start(Status {
            relays: vec![relay(state, error_at)],
            ..good()
        });
        let body = server.get("/readyz").body;
        assert_eq!(body.contains("does not answer"), told, "{body}");
    }
}

#[test]
fn relay_that_is_replaced_does_not_flip_readiness_until_it_lasts() {
    let (sender, receiver) = watch::channel(Arc::new(good()));
    let state = AdminState::new(receiver, Liveness::default(), Drain::default());
    let start = Moment::now();
    let ready = |after: u64| {
        let moment = Moment {
            instant: start.instant + Duration::from_millis(after),
            unix: start.unix + after as f64 / 1000.0,
        };
        state.report(crate::config::Probe::Ready, moment).passed
    };
    assert!(ready(0));

    sender.send_replace(Arc::new(Status {
        relays: vec![relay("allocating")],
        ..good()
    }));
    assert!(ready(100) && ready(1099));
    assert!(!ready(1100));

    sender.send_replace(Arc::new(good()));
    assert!(ready(1200));
}

#[test]
fn changes_are_seen_also_while_nobody_asks() {
    let server = Server::start(good());
    let seen = |wanted: bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.state.last_seen("portal") != Some(wanted) {
            assert!(Instant::now() < deadline, "not seen");
            std::thread::yield_now();
        }
    };
    seen(true);
    server.change(|status| status.portal.state = PortalState::Waiting);
    seen(false);
    server.change(|status| status.portal.state = PortalState::Joined);
    seen(true);
}

#[test]
fn portal_flips_readiness_at_once() {
    let (sender, receiver) = watch::channel(Arc::new(good()));
    let state = AdminState::new(receiver, Liveness::default(), Drain::default());
    let now = Moment::now();
    assert!(state.report(crate::config::Probe::Ready, now).passed);
    sender.send_modify(|status| {
        Arc::make_mut(status).portal.state = PortalState::Connecting;
    });
    assert!(!state.report(crate::config::Probe::Ready, now).passed);
}

/// Loops `slow_path` and `worker-0`, and what `/livez` says of them, in virtual time.
struct Loops {
    start: Moment,
    state: AdminState,
    slow_path: Heartbeat,
    worker: Heartbeat,
    _status: watch::Sender<Arc<Status>>,
}

impl Loops {
    fn new() -> Self {
        let (status, receiver) = watch::channel(Arc::new(good()));
        let start = Moment::now();
        let liveness = Liveness::new(start.instant);
        Self {
            start,
            slow_path: liveness.register("slow_path", start.instant),
            worker: liveness.register("worker-0", start.instant),
            state: AdminState::new(receiver, liveness, Drain::default()),
            _status: status,
        }
    }

    fn at(&self, seconds: f64) -> Moment {
        Moment {
            instant: self.start.instant + Duration::from_secs_f64(seconds),
            unix: self.start.unix + seconds,
        }
    }

    fn report(&self, seconds: f64) -> Report {
        self.state.report(Probe::Live, self.at(seconds))
    }
}

#[test]
fn a_stuck_loop_fails_liveness_within_ten_seconds_by_name_until_it_turns_again() {
    // Whichever gets stuck; the other one goes on as if nothing had happened.
    for stuck in ["slow_path", "worker-0"] {
        let loops = Loops::new();
        let mut failed = None;
        for second in 1..3600 {
            let now = f64::from(second);
            for (name, heartbeat) in [("slow_path", &loops.slow_path), ("worker-0", &loops.worker)]
            {
                // It gets stuck just before it would have ticked again.
                if name != stuck || !(1000..=1100).contains(&second) {
                    heartbeat.tick(loops.at(now).instant);
                }
            }
            let report = loops.report(now);
            for check in &report.checks {
                assert!(check.ok || check.name == stuck, "{check:?}");
            }
            if !report.passed {
                failed.get_or_insert(now);
                assert!((1000.0..=1100.0).contains(&now), "failed at {now}");
                let check = report.checks.iter().find(|c| c.name == stuck).unwrap();
                let silent = format!("stuck: no sign of life for {} s", second - 999);
                assert_eq!(check.reason, silent);
            } else {
                assert!(!(1009.0..=1100.0).contains(&now), "passed at {now}");
            }
        }
        // The last tick was at 999, so that it was well until just before 1000.
        let failed = failed.unwrap();
        assert!((1005.0..=1009.0).contains(&failed), "{failed}");
    }
}

#[test]
fn a_loop_that_died_fails_liveness_at_once_and_for_good() {
    let loops = Loops::new();
    assert!(loops.report(1.0).passed);
    let Loops {
        start,
        state,
        slow_path,
        worker,
        ..
    } = loops;
    worker.die();
    for seconds in [1, 3600] {
        let now = Moment {
            instant: start.instant + Duration::from_secs(seconds),
            unix: start.unix + seconds as f64,
        };
        slow_path.tick(now.instant);
        let report = state.report(Probe::Live, now);
        let of = |name: &str| report.checks.iter().find(|c| c.name == name).unwrap();
        assert!(!report.passed && of("slow_path").ok, "{report:?}");
        assert_eq!(of("worker-0").reason, "died; the log says of what");
    }
}

#[test]
fn what_is_stuck_shows_in_the_status_that_the_slow_path_cannot_write_any_more() {
    let server = Server::start(good());
    let long_ago = Instant::now().checked_sub(Duration::from_secs(9)).unwrap();
    let liveness = Liveness::new(long_ago);
    let (_sender, receiver) = watch::channel(Arc::new(good()));
    let address = server.also(AdminState::new(
        receiver,
        liveness.clone(),
        Drain::default(),
    ));
    let slow_path = liveness.register("slow_path", long_ago);
    let status: Status = serde_json::from_str(&ask(address, "/status").unwrap().body).unwrap();
    assert_eq!(
        status.stuck,
        ["slow_path stuck: no sign of life for 9 s"],
        "{status:?}"
    );
    let shown = render_status(&status, now(), false);
    let line = "\nnot alive: slow_path stuck: no sign of life for 9 s\n";
    assert!(shown.contains(line), "{shown}");
    assert_eq!(ask(address, "/livez").unwrap().code, 503);

    slow_path.tick(Instant::now());
    let status: Status = serde_json::from_str(&ask(address, "/status").unwrap().body).unwrap();
    assert!(status.stuck.is_empty(), "{status:?}");
}

#[test]
fn shutdown_fails_readiness_at_once_and_not_liveness() {
    let server = Server::start(good());
    server.drain.begin();
    let answer = server.get("/readyz");
    assert_eq!(answer.code, 503);
    assert!(
        answer.body.contains("[-]drain shutting down"),
        "{}",
        answer.body
    );
    assert_eq!(server.code("/livez"), 200);
    let status: Status = serde_json::from_str(&server.get("/status").body).unwrap();
    assert!(status.draining);
}

#[test]
fn checks_can_be_excluded_and_unknown_names_are_told() {
    // Failing from the start: a relay that was good would be held to be so for a while.
    let mut status = good();
    status.portal.state = PortalState::Closed;
    status.relays = vec![relay("failed")];
    let server = Server::start(status);
    assert_eq!(server.code("/readyz?exclude=portal"), 503);

    let answer = server.get("/readyz?exclude=portal&exclude=relays&exclude=nonsense&verbose");

    assert_eq!(answer.code, 200);
    assert!(
        answer.body.contains("[-]portal excluded: not joined"),
        "{}",
        answer.body
    );
    assert!(
        answer
            .body
            .contains("warn: there is no check \"nonsense\" to exclude"),
        "{}",
        answer.body
    );
}

#[test]
fn json_is_given_to_those_who_accept_it() {
    let server = Server::start(good());
    server.change(|status| status.portal.state = PortalState::Blocked);
    let answer = server.raw(
        "GET /readyz HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\nConnection: close\r\n\r\n",
    );
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["check"], "ready");
    assert_eq!(body["passed"], false);
    assert_eq!(body["checks"][0]["name"], "portal");
    assert_eq!(body["checks"][0]["ok"], false);
    assert!(body["checks"][0]["since"].as_f64().unwrap() > 1e9);
    assert_eq!(body["checks"][1]["name"], "device");
    assert_eq!(body["checks"][1]["ok"], true);
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
        clients: vec![model::ClientStatus::default()],
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

fn check(
    server: &Server,
    arguments: HealthcheckArgs,
    variables: &[(&str, &str)],
) -> (ExitStatus, String) {
    let address = server.address.to_string();
    let env: FixedEnv = [("HEALTH_CHECK_ADDR", address.as_str())]
        .iter()
        .chain(variables)
        .copied()
        .collect();
    let mut out = Vec::new();
    let status = healthcheck(&arguments, &Settings::default(), &env, &mut out).unwrap();
    (status, String::from_utf8(out).unwrap())
}

fn healthcheck_args(check: &[crate::config::Probe], addr: Option<&str>) -> HealthcheckArgs {
    HealthcheckArgs {
        check: check.to_vec(),
        addr: addr.map(str::to_owned),
    }
}

#[test]
fn healthcheck_asks_for_live_and_started_at_the_configured_port() {
    let server = Server::start(good());
    assert_ne!(server.address.port(), 8080);
    server.change(|status| status.portal.state = PortalState::Waiting);

    let (status, text) = check(&server, healthcheck_args(&[], None), &[]);

    assert_eq!(status, ExitStatus::Ok, "a portal outage is not unhealthy");
    assert_eq!(text, "live: ok\nstarted: ok\n");
}

#[test]
fn healthcheck_prints_the_checks_that_fail() {
    use crate::config::Probe;
    let server = Server::start(good());
    server.change(|status| {
        status.portal.state = PortalState::Blocked;
        status.device.up = false;
    });

    let (status, text) = check(
        &server,
        healthcheck_args(&[Probe::Live, Probe::Ready], None),
        &[],
    );

    assert_eq!(status, ExitStatus::Failure);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert_eq!(lines[..2], ["live: ok", "ready: failed"]);
    assert!(
        lines[2].starts_with("  [-]portal not joined: blocked"),
        "{text}"
    );
    assert!(lines[3].starts_with("  [-]device not up yet"), "{text}");
}

#[test]
fn healthcheck_takes_another_address_also_by_name() {
    let server = Server::start(good());
    let elsewhere = format!("localhost:{}", server.address.port());
    // `localhost` may be ::1 first on some machines; the server listens on IPv4 only.
    for address in [
        server.address.to_string(),
        elsewhere.replace("localhost", "127.0.0.1"),
    ] {
        let (status, text) = check(
            &server,
            healthcheck_args(&[], Some(&address)),
            &[("HEALTH_CHECK_ADDR", "127.0.0.1:1")],
        );
        assert_eq!(status, ExitStatus::Ok, "{text}");
    }
    let (status, text) = check(&server, healthcheck_args(&[], Some("nonsense")), &[]);
    assert_eq!(status, ExitStatus::Failure);
    assert!(text.contains("--addr"), "{text}");
}

#[test]
fn healthcheck_without_a_server_says_where_it_looked() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let env: FixedEnv = [("HEALTH_CHECK_ADDR", format!("0.0.0.0:{}", closed.port()))]
        .into_iter()
        .collect();
    let mut out = Vec::new();

    let status = healthcheck(
        &healthcheck_args(&[], None),
        &Settings::default(),
        &env,
        &mut out,
    )
    .unwrap();

    assert_eq!(status, ExitStatus::Failure);
    let text = String::from_utf8(out).unwrap();
    assert!(
        text.contains(&format!("127.0.0.1:{}", closed.port())),
        "{text}"
    );
    assert!(text.contains("Is the gateway running"), "{text}");
}

#[test]
fn healthcheck_of_a_server_that_hangs_ends_in_time() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let begin = Instant::now();
    let error = ask(silent.local_addr().unwrap(), "/livez").unwrap_err();
    assert!(
        begin.elapsed() < Duration::from_secs(8),
        "{:?}",
        begin.elapsed()
    );
    assert!(error.to_string().contains("timed out"), "{error}");
}

#[test]
fn healthcheck_with_the_server_switched_off_fails_only_if_asked_for_a_check() {
    let server = Server::start(good());
    let off = [("HEALTH_CHECK_ADDR", "off")];
    assert_eq!(
        check(&server, healthcheck_args(&[], None), &off).0,
        ExitStatus::Ok
    );
    let (status, text) = check(
        &server,
        healthcheck_args(&[crate::config::Probe::Ready], None),
        &off,
    );
    assert_eq!(status, ExitStatus::Failure);
    assert!(text.contains("HEALTH_CHECK_ADDR"), "{text}");
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

#[test]
fn status_command_prints_table_or_document() {
    let server = Server::start(good());

    let (exit, table, _) = ask_status(server.address, false);
    assert_eq!(exit, ExitStatus::Ok);
    assert!(
        table.starts_with("edge-7  firezone-gateway 1.6.0, up "),
        "{table}"
    );
    assert!(table.contains("joined for"), "{table}");

    let (exit, json, _) = ask_status(server.address, true);
    assert_eq!(exit, ExitStatus::Ok);
    assert_eq!(
        serde_json::from_str::<Status>(&json).unwrap().name,
        "edge-7"
    );
}

#[test]
fn status_command_without_a_server_explains_on_stderr() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (exit, out, err) = ask_status(closed, false);
    assert_eq!(exit, ExitStatus::Failure);
    assert_eq!(out, "");
    assert!(
        err.contains(&closed.to_string()) && err.contains("HEALTH_CHECK_ADDR"),
        "{err}"
    );
}

/// Somebody who reads two pictures and goes.
#[derive(Default)]
struct Reader {
    read: Vec<u8>,
    pictures: usize,
}

impl io::Write for Reader {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if self.pictures == 2 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.pictures += 1;
        self.read.extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn watching_shows_one_picture_after_the_other_until_nobody_looks() {
    let server = Server::start(good());
    let arguments = StatusArgs {
        watch: Some(1),
        json: false,
        addr: Some(server.address.to_string()),
    };
    let env = FixedEnv::default();
    for colour in [false, true] {
        let mut reader = Reader::default();
        let ended = status(
            &arguments,
            &Settings::default(),
            &env,
            colour,
            &mut reader,
            &mut Vec::new(),
        );
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let text = String::from_utf8(reader.read).unwrap();
        assert_eq!(
            text.matches("Portal\u{1b}[").count() + text.matches("Portal\n").count(),
            2,
            "{text}"
        );
        assert_eq!(text.contains("\u{1b}[H"), colour, "{text}");
    }
}
