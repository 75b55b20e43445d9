//! A token that is refused, withdrawn or replaced.

use super::*;

#[test]
fn a_refused_token_blocks_and_is_checked_again_about_every_five_minutes() {
    let mut lab = Lab::started();
    lab.unauthorized();
    assert_eq!(lab.take_events(), ["blocked: http_401"]);
    for _ in 0..30 {
        assert_eq!(lab.state(), PortalState::Blocked);
        assert!((RECHECK_BOUNDS.0..=RECHECK_BOUNDS.1).contains(&lab.pause()));
        lab.redial();
        assert_eq!(lab.state(), PortalState::Blocked, "also during the check");
        lab.unauthorized();
    }
    assert!(lab.take_events().is_empty(), "said once");
    lab.redial();
    lab.join();
    assert_eq!(lab.take_events(), ["unblocked", "connected"]);
}

#[test]
fn a_check_that_cannot_reach_the_portal_stays_blocked() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.redial();
    lab.refuse();
    assert_eq!(lab.state(), PortalState::Blocked);
    assert!(lab.pause() >= RECHECK_BOUNDS.0);
}

#[test]
fn a_new_token_is_tried_at_once() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.advance(SECOND);
    lab.with(|c, now| c.token_changed(now));
    assert_eq!(lab.dials.last().unwrap().0, lab.now);
    assert_eq!(lab.take_events(), ["blocked: http_401", "unblocked"]);
    lab.refuse();
    assert!(lab.pause() < 2 * SECOND, "an ordinary failure again");
    lab.redial();
    lab.unauthorized();
    assert_eq!(lab.take_events(), ["blocked: http_401"]);
}

#[test]
fn a_new_token_cuts_a_running_attempt_short() {
    let mut lab = Lab::started();
    lab.with(|c, now| c.token_changed(now));
    assert_eq!(
        (lab.dials.len(), lab.hangups.as_slice()),
        (2, &[Action::Disconnect][..])
    );
    lab.open();
    lab.with(|c, now| c.token_changed(now));
    assert_eq!(lab.dials.len(), 3);
    assert_eq!(lab.hangups[1], Action::Close { code: CLOSE_NORMAL });
    let abandoned = |m: &&Milestone| **m == Milestone::AttemptAbandoned;
    assert_eq!(lab.milestones.iter().filter(abandoned).count(), 2);
}

#[test]
fn a_new_token_leaves_a_working_session_alone() {
    let mut lab = Lab::stable();
    lab.with(|c, now| c.token_changed(now));
    assert!(lab.channel.is_joined());
    assert_eq!(lab.dials.len(), 1);
}

#[test]
fn a_refused_join_blocks() {
    for reason in ["disabled", "invalid_version", "whatever"] {
        let mut lab = Lab::started();
        lab.open();
        lab.reply(
            "gateway",
            0,
            json!({"status": "error", "response": {"reason": reason}}),
        );
        assert_eq!(lab.take_events(), ["blocked: join_refused"]);
    }
}

#[test]
fn a_join_that_crashed_on_the_portal_is_no_refusal() {
    let mut lab = Lab::started();
    lab.open();
    lab.reply(
        "gateway",
        0,
        json!({"status": "error", "response": {"reason": "join crashed"}}),
    );
    assert_eq!(lab.state(), PortalState::Waiting);
}

#[test]
fn one_withdrawn_token_is_tried_once_more_before_it_counts() {
    let mut lab = Lab::stable();
    lab.take_events();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    assert_eq!(lab.take_events(), ["disconnected: token_expired"]);
    assert!((CONFIRM_BOUNDS.0..=CONFIRM_BOUNDS.1).contains(&lab.pause()));
    lab.redial();
    lab.join();
    lab.advance(STABLE_AFTER);
    assert_eq!(lab.state(), PortalState::Joined, "it was a mistake");

    lab.take_events();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    lab.redial();
    lab.join();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    assert_eq!(lab.take_events().last().unwrap(), "blocked: token_expired");
}

#[test]
fn a_withdrawn_token_that_is_then_refused_blocks_despite_trouble_in_between() {
    let mut lab = Lab::stable();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    lab.redial();
    lab.refuse();
    lab.redial();
    lab.fail(http(409, None));
    lab.redial();
    lab.unauthorized();
    assert_eq!(lab.state(), PortalState::Blocked);
}

#[test]
fn other_disconnect_reasons_wait_for_the_close() {
    let mut lab = Lab::stable();
    lab.push("disconnect", json!({"reason": "certificate_revoked"}));
    assert!(lab.channel.is_joined());
}

#[test]
fn auth_failure_ends_the_process_only_where_configured() {
    let mut lab = Lab::new(ChannelConfig {
        exit_on_auth_failure: true,
        ..ChannelConfig::default()
    });
    lab.unauthorized();
    assert_eq!(lab.take_events(), ["gave up: AuthRefused"]);
    assert_eq!(lab.state(), PortalState::GaveUp);
}

#[test]
fn days_of_being_blocked_cost_no_budget() {
    let mut lab = Lab::new(budget(15));
    for _ in 0..1000 {
        lab.unauthorized();
        lab.redial();
        lab.advance(10 * SECOND);
    }
    lab.with(|c, now| c.token_changed(now));
    lab.refuse();
    assert_eq!(lab.state(), PortalState::Waiting);
}
