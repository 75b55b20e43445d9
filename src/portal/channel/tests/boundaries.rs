//! One tick before, and the tick itself.

use super::*;

#[test]
fn the_join_is_given_up_at_five_seconds() {
    let mut lab = Lab::started();
    lab.open();
    assert_eq!(
        lab.channel.poll_timeout(),
        Some((lab.now + JOIN_TIMEOUT, Timer::JoinTimeout))
    );
    lab.advance(JOIN_TIMEOUT - TICK);
    assert_eq!(lab.state(), PortalState::Joining);
    lab.advance(TICK);
    assert_eq!(lab.state(), PortalState::Waiting);
}

#[test]
fn an_attempt_is_given_up_at_twenty_seconds() {
    let mut lab = Lab::started();
    assert_eq!(
        lab.channel.poll_timeout(),
        Some((lab.now + ATTEMPT_LIMIT, Timer::Attempt))
    );
    lab.advance(ATTEMPT_LIMIT - TICK);
    assert_eq!(lab.state(), PortalState::Connecting);
    lab.advance(TICK);
    assert_eq!(lab.state(), PortalState::Waiting);
}

#[test]
fn the_next_attempt_starts_at_the_end_of_the_delay() {
    let mut lab = Lab::started();
    lab.refuse();
    let pause = lab.pause();
    lab.advance(pause - Duration::from_nanos(1));
    assert_eq!(lab.dials.len(), 1);
    lab.advance(Duration::from_nanos(1));
    assert_eq!(lab.dials.len(), 2);
}

#[test]
fn a_refused_token_is_checked_at_the_end_of_its_pause() {
    let mut lab = Lab::started();
    lab.unauthorized();
    let (at, timer) = lab.channel.poll_timeout().unwrap();
    assert_eq!(timer, Timer::Recheck);
    lab.advance(at - lab.now - TICK);
    assert_eq!(lab.dials.len(), 1);
    lab.advance(TICK);
    assert_eq!(lab.dials.len(), 2);
}

#[test]
fn heartbeats_leave_at_ten_seconds_and_not_before() {
    let mut lab = Lab::up();
    let heartbeats = |lab: &Lab| {
        lab.sent
            .iter()
            .filter(|f| f["event"] == "heartbeat")
            .count()
    };
    lab.advance(HEARTBEAT_INTERVAL - TICK);
    assert_eq!(heartbeats(&lab), 0);
    lab.advance(TICK);
    assert_eq!(heartbeats(&lab), 1);
    lab.advance(HEARTBEAT_INTERVAL - TICK);
    assert_eq!(heartbeats(&lab), 1);
    lab.advance(TICK);
    assert_eq!(heartbeats(&lab), 2);
}

#[test]
fn a_silent_session_fails_with_its_fourth_heartbeat() {
    let mut lab = Lab::up();
    lab.pass(4 * HEARTBEAT_INTERVAL - TICK, false);
    assert!(lab.channel.is_joined());
    lab.pass(TICK, false);
    assert!(!lab.channel.is_joined());
}

#[test]
fn a_session_is_stable_at_ten_seconds() {
    let mut lab = Lab::started();
    lab.refuse();
    lab.redial();
    lab.come_up();
    let outages = |lab: &Lab| {
        let ended = |m: &&Milestone| matches!(m, Milestone::OutageEnded(_));
        lab.milestones.iter().filter(ended).count()
    };
    lab.advance(STABLE_AFTER - TICK);
    assert_eq!(outages(&lab), 0);
    lab.advance(TICK);
    assert_eq!(outages(&lab), 1);
}

#[test]
fn a_probe_after_a_network_change_decides_at_five_seconds() {
    let mut lab = Lab::stable();
    lab.with(|c, now| c.network_changed(now));
    lab.pass(PROBE_TIMEOUT - TICK, false);
    assert!(lab.channel.is_joined());
    lab.pass(TICK, false);
    assert!(!lab.channel.is_joined());
}

#[test]
fn a_budget_is_used_to_its_last_tick() {
    for takes in [Duration::ZERO, TICK] {
        let mut lab = Lab::new(budget(1));
        lab.refuse();
        let outage = lab.now;
        while lab.now - outage < MINUTE - SECOND {
            lab.redial();
            lab.refuse();
            if lab.state() == PortalState::GaveUp {
                break;
            }
        }
        // The last attempt starts when the budget ends; whatever becomes of it decides.
        if lab.state() != PortalState::GaveUp {
            lab.redial();
            lab.advance(takes);
            lab.refuse();
        }
        assert_eq!(lab.state(), PortalState::GaveUp);
        assert!(lab.now - outage >= MINUTE && lab.now - outage <= MINUTE + takes);
    }
}

#[test]
fn an_attempt_that_starts_within_the_budget_may_end_beyond_it() {
    let mut lab = Lab::new(budget(1));
    lab.refuse();
    let outage = lab.now;
    while lab.now - outage < MINUTE {
        lab.redial();
        if lab.now - outage < MINUTE {
            lab.refuse();
        }
    }
    assert_eq!(lab.now - outage, MINUTE);
    lab.advance(5 * SECOND);
    lab.come_up();
    lab.advance(STABLE_AFTER);
    assert_eq!(lab.state(), PortalState::Joined);
}

#[test]
fn a_confirmation_waits_at_least_a_second() {
    let mut lab = Lab::stable();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    lab.advance(CONFIRM_BOUNDS.0 - TICK);
    assert_eq!(lab.dials.len(), 1);
    lab.advance(CONFIRM_BOUNDS.1 - CONFIRM_BOUNDS.0 + TICK);
    assert_eq!(lab.dials.len(), 2);
}

#[test]
fn hurried_attempts_keep_a_second_to_the_tick() {
    let mut lab = Lab::started();
    lab.refuse();
    lab.advance(100 * TICK);
    lab.with(|c, now| c.retry_now(now));
    let first = lab.dials[0].0;
    let (at, _) = lab.channel.poll_timeout().unwrap();
    assert!(at - first <= HURRIED_SPACING);
    lab.redial();
    assert!(lab.dials[1].0 - first <= HURRIED_SPACING);
}

#[test]
fn a_timer_that_fires_early_does_nothing() {
    let mut lab = Lab::started();
    lab.refuse();
    let before = lab.channel.poll_timeout();
    lab.with(|c, now| c.handle_timeout(now));
    assert_eq!(lab.channel.poll_timeout(), before);
    assert_eq!(lab.dials.len(), 1);
}

#[test]
fn a_timer_that_fires_hours_late_does_its_work_once() {
    let mut lab = Lab::started();
    lab.refuse();
    lab.now += 5 * 60 * MINUTE;
    lab.with(|c, now| c.handle_timeout(now));
    assert_eq!(lab.dials.len(), 2);
    assert_eq!(
        lab.channel.poll_timeout(),
        Some((lab.now + ATTEMPT_LIMIT, Timer::Attempt))
    );
}
