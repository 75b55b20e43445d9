//! The three questions and their checks.

use super::*;

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
fn a_device_without_its_addresses_carries_nothing_yet() {
    let server = Server::start(good());
    server.change(|status| status.device.addresses.clear());
    let answer = server.get("/readyz");
    assert_eq!(answer.code, 503);
    let line = "[-]device has no addresses yet";
    assert!(answer.body.contains(line), "{}", answer.body);
    assert_eq!(server.code("/startupz"), 200);
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
        while server.state.last_seen(Probe::Ready, "portal") != Some(wanted) {
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
