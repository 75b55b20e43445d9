//! The sub-commands that ask a running gateway.

use std::thread;

use super::*;

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

/// Whoever pastes all lines of the instructions asks before it listens.
#[test]
fn status_waits_for_a_gateway_that_was_started_a_moment_ago() {
    let socket = tempfile::tempdir().unwrap();
    let path = socket.path().join("admin.sock");
    let arguments = StatusArgs {
        watch: None,
        json: true,
        addr: Some(format!("unix:{}", path.display())),
    };
    let gateway = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        let body = serde_json::to_string(&good()).unwrap();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).unwrap();
    });
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (settings, env) = (Settings::default(), FixedEnv::default());
    let exit = status(&arguments, &settings, &env, false, &mut out, &mut err).unwrap();
    assert_eq!(exit, ExitStatus::Ok, "{}", String::from_utf8_lossy(&err));
    gateway.join().unwrap();
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
