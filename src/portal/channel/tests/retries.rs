//! Failures, delays, budgets.

use super::*;

#[test]
fn first_error_after_days_of_uptime_waits_not_fails() {
    let mut lab = Lab::new(budget(15));
    lab.come_up();
    lab.advance(3 * 24 * 60 * MINUTE);
    lab.take_events();
    lab.lose();
    assert_eq!(lab.take_events(), ["disconnected: server_close"]);
    assert!(lab.pause() <= INITIAL_INTERVAL.mul_f64(1.5));
    let status = lab.channel.status(lab.now, SystemTime::now());
    assert_eq!(status.backoff.unwrap().budget_left, Some(900.0));
}

#[test]
fn no_backoff_exists_while_all_is_well() {
    let mut lab = Lab::stable();
    assert_eq!(lab.channel.status(lab.now, SystemTime::now()).backoff, None);
    lab.lose();
    assert!(
        lab.channel
            .status(lab.now, SystemTime::now())
            .backoff
            .is_some()
    );
}

#[test]
fn an_outage_longer_than_its_budget_is_given_up_once() {
    let mut lab = Lab::new(budget(15));
    lab.come_up();
    lab.advance(24 * 60 * MINUTE);
    let lost = lab.now;
    lab.lose();
    while lab.state() != PortalState::GaveUp {
        lab.redial();
        lab.refuse();
    }
    assert_eq!(lab.now - lost, 15 * MINUTE);
    assert_eq!(
        lab.take_events().last().unwrap(),
        "gave up: BudgetExhausted"
    );
    assert_eq!(lab.channel.poll_timeout(), None);
    assert!(matches!(
        lab.milestones.last(),
        Some(Milestone::OutageEnded(o)) if o.outcome == Outcome::GaveUp
            && (o.cause, o.last_cause) == (ErrorType::ServerClose, ErrorType::TcpConnect)
    ));
}

#[test]
fn a_portal_that_is_slow_at_boot_is_waited_for() {
    let mut lab = Lab::started();
    for _ in 0..100 {
        lab.refuse();
        lab.redial();
    }
    assert!(
        lab.take_events().is_empty(),
        "never joined, so nothing was lost"
    );
    lab.join();
    assert_eq!(lab.take_events(), ["connected"]);
}

#[test]
fn a_portal_that_joins_and_drops_meets_growing_delays() {
    let mut lab = Lab::started();
    let mut pauses = Vec::new();
    for _ in 0..14 {
        lab.join();
        lab.advance(STABLE_AFTER - TICK);
        lab.lose();
        pauses.push(lab.pause());
        lab.redial();
    }
    assert!(
        pauses[0] < SECOND && pauses[13] >= 30 * SECOND,
        "{pauses:?}"
    );
}

#[test]
fn a_join_that_is_stable_ends_the_outage_at_the_time_of_the_join() {
    let mut lab = Lab::started();
    let first_error = lab.now;
    for _ in 0..8 {
        lab.refuse();
        lab.redial();
    }
    lab.come_up();
    let joined = lab.now;
    lab.advance(STABLE_AFTER - TICK);
    assert!(
        lab.channel
            .status(lab.now, SystemTime::now())
            .backoff
            .is_some()
    );
    lab.advance(TICK);
    assert_eq!(lab.channel.status(lab.now, SystemTime::now()).backoff, None);
    let expected = Milestone::OutageEnded(EndedOutage {
        since: first_error,
        until: joined,
        cause: ErrorType::TcpConnect,
        last_cause: ErrorType::TcpConnect,
        failures: 8,
        outcome: Outcome::Joined,
    });
    assert_eq!(lab.milestones.last(), Some(&expected));
    lab.lose();
    assert!(lab.pause() < SECOND, "the next outage starts small");
}

#[test]
fn budget_stands_still_while_joined_but_not_stable() {
    let mut lab = Lab::new(budget(15));
    let left = |lab: &Lab| {
        let status = lab.channel.status(lab.now, SystemTime::now());
        status.backoff.unwrap().budget_left.unwrap()
    };
    lab.refuse();
    lab.redial();
    lab.advance(5 * SECOND);
    lab.join();
    let before = left(&lab);
    lab.advance(9 * SECOND);
    assert_eq!(left(&lab), before);
    lab.lose();
    lab.advance(TICK);
    assert!(left(&lab) < before);
}

#[test]
fn retry_after_decides_over_the_delay() {
    let mut lab = Lab::started();
    lab.fail(http(503, Some(40)));
    assert!((40 * SECOND..=44 * SECOND).contains(&lab.pause()));
    lab.redial();
    lab.fail(http(429, Some(86_400)));
    assert!(lab.pause() <= 330 * SECOND, "clamped");
}

#[test]
fn a_restarting_portal_is_given_room() {
    for cause in [
        CloseCause::Frame {
            code: Some(1012),
            reason: String::new(),
        },
        CloseCause::Frame {
            code: Some(1001),
            reason: "deploy".to_owned(),
        },
    ] {
        let mut lab = Lab::stable();
        lab.with(|c, now| c.closed(now, cause));
        assert!(lab.pause() <= DELIBERATE_CLOSE_SPREAD);
        assert!(
            lab.pause() > INITIAL_INTERVAL.mul_f64(1.5),
            "with this seed, not the ladder"
        );
    }
}

#[test]
fn phx_close_and_phx_error_reconnect() {
    for (event, kind) in [
        ("phx_close", "channel_close"),
        ("phx_error", "channel_error"),
    ] {
        let mut lab = Lab::stable();
        lab.take_events();
        lab.push(event, json!({}));
        assert_eq!(lab.take_events(), [format!("disconnected: {kind}")]);
        assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
        lab.redial();
        lab.join();
    }
}

#[test]
fn an_attempt_that_hangs_is_cut_off() {
    let mut lab = Lab::started();
    lab.advance(ATTEMPT_LIMIT);
    assert_eq!(lab.hangups, [Action::Disconnect]);
    assert_eq!(lab.state(), PortalState::Waiting);
}

#[test]
fn a_conflict_with_the_own_old_connection_is_an_ordinary_retry() {
    let mut lab = Lab::stable();
    let lost = lab.now;
    lab.lose();
    loop {
        lab.redial();
        if lab.now - lost >= 37 * SECOND {
            break;
        }
        lab.fail(http(409, None));
        assert!(lab.pause() <= 10 * SECOND);
    }
    assert!(lab.now - lost <= 47 * SECOND);
    lab.join();
    assert!(!lab.take_events().iter().any(|e| e.starts_with("blocked")));
}
