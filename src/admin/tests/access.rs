//! Who gets what at which address: the admin token, the host itself, Unix sockets, probes alone.

use super::*;

/// The same server with a token, `sesame`, at an address of its own.
fn guarded(server: &Server, file: &std::path::Path) -> SocketAddr {
    std::fs::write(file, "sesame\n").unwrap();
    let token = AdminToken::in_file(file);
    server.also(server.state.clone().guarded(Some(token)))
}

#[test]
fn with_a_token_only_the_probes_are_open_to_everybody() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let server = Server::start(good());
    let address = guarded(&server, &file);
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
        "Host: 127.0.0.1\r\nX-Forwarded-Proto: https\r\n",
        "Host: 127.0.0.1\r\nX-Real-IP: 192.0.2.1\r\n",
        "Host: localhost\r\nX-Envoy-Attempt-Count: 1\r\n",
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
    let server = Server::start(good());
    let address = guarded(&server, &file);
    let (exit, text) = run_log_filter(address, Some("trace"), false, &[]);
    assert_eq!(exit, ExitStatus::Failure);
    assert!(text.contains("FIREZONE_ADMIN_TOKEN_FILE"), "{text}");
    assert_eq!(server.state.log.filter(), "");
    let path = file.to_str().unwrap();
    let knowing = [("FIREZONE_ADMIN_TOKEN_FILE", path)];
    let (exit, text) = run_log_filter(address, Some("trace"), false, &knowing);
    assert_eq!((exit, text.as_str()), (ExitStatus::Ok, "trace\n"));
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
