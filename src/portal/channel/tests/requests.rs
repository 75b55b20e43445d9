//! Somebody asks for an attempt (SIGHUP).

use super::*;

fn ask(lab: &mut Lab) {
    lab.with(|c, now| c.retry_now(now));
}

#[test]
fn a_request_checks_a_refused_token_at_once() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.advance(2 * SECOND);
    ask(&mut lab);
    lab.advance(Duration::ZERO);
    assert_eq!(lab.dials.last().unwrap().0, lab.now);
    assert_eq!(lab.dials.last().unwrap().1.cause, AttemptCause::Request);
    assert_eq!(lab.state(), PortalState::Blocked, "until it is accepted");
    lab.come_up();
    assert_eq!(
        lab.take_events(),
        ["blocked: http_401", "unblocked", "connected", "message"]
    );
}

#[test]
fn a_request_that_is_refused_again_keeps_the_pace_of_the_checks() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.advance(2 * SECOND);
    ask(&mut lab);
    lab.advance(Duration::ZERO);
    lab.unauthorized();
    assert!((RECHECK_BOUNDS.0..=RECHECK_BOUNDS.1).contains(&lab.pause()));
    assert_eq!(lab.take_events(), ["blocked: http_401"], "said once");
}

#[test]
fn a_request_ends_waiting_and_growth() {
    let mut lab = Lab::started();
    for _ in 0..12 {
        lab.refuse();
        lab.redial();
    }
    lab.refuse();
    assert!(lab.pause() > 10 * SECOND);
    lab.advance(2 * SECOND);
    ask(&mut lab);
    lab.advance(Duration::ZERO);
    assert_eq!(lab.dials.last().unwrap().0, lab.now);
    lab.refuse();
    assert!(lab.pause() < SECOND);
}

#[test]
fn a_request_does_not_wait_out_a_retry_after() {
    let mut lab = Lab::started();
    lab.fail(http(503, Some(300)));
    lab.advance(2 * SECOND);
    ask(&mut lab);
    assert_eq!(lab.pause(), Duration::ZERO);
}

#[test]
fn requests_in_a_row_keep_a_second_between_attempts() {
    let mut lab = Lab::started();
    for _ in 0..10 {
        lab.refuse();
        for _ in 0..5 {
            ask(&mut lab);
        }
        lab.redial();
    }
    for pair in lab.dials.windows(2) {
        let pause = pair[1].0 - pair[0].0;
        assert!(pause >= HURRIED_SPACING / 4, "{pause:?}");
    }
    let span = lab.dials[10].0 - lab.dials[0].0;
    assert!(span >= 2 * SECOND, "{span:?}");
}

#[test]
fn a_request_during_an_attempt_makes_its_failure_cheap() {
    let mut lab = Lab::started();
    for _ in 0..12 {
        lab.refuse();
        lab.redial();
    }
    ask(&mut lab);
    lab.refuse();
    assert!(lab.pause() <= HURRIED_SPACING);
    assert_eq!(lab.next_cause(), AttemptCause::Request);
}

#[test]
fn a_request_while_joined_probes_the_socket() {
    let mut lab = Lab::stable();
    lab.sent.clear();
    ask(&mut lab);
    assert_eq!(lab.sent.len(), 1);
    assert_eq!(lab.sent[0]["event"], "heartbeat");
    let reference = lab.sent[0]["ref"].as_u64().unwrap();
    lab.reply(
        "phoenix",
        reference,
        json!({"status": "ok", "response": {}}),
    );
    lab.advance(MINUTE);
    assert!(lab.channel.is_joined(), "and keeps it");
}

#[test]
fn a_request_after_the_end_changes_nothing() {
    let mut lab = Lab::stable();
    lab.with(|c, now| c.close(now));
    ask(&mut lab);
    assert_eq!(lab.channel.poll_timeout(), None);
    assert_eq!(lab.dials.len(), 1);
}
