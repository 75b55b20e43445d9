//! Hints that the network is another one now.

use super::*;

#[test]
fn a_network_change_ends_waiting_and_growth() {
    let mut lab = Lab::started();
    for _ in 0..20 {
        lab.refuse();
        lab.redial();
    }
    lab.refuse();
    assert!(lab.pause() > 20 * SECOND);
    lab.advance(2 * SECOND);
    lab.with(|c, now| c.network_changed(now));
    assert_eq!(lab.pause(), Duration::ZERO);
    lab.redial();
    lab.refuse();
    assert!(lab.pause() < SECOND, "growth starts over");
}

#[test]
fn a_burst_of_network_changes_does_not_make_a_hot_loop() {
    let mut lab = Lab::started();
    let start = lab.now;
    while lab.now - start < MINUTE {
        if lab.state() == PortalState::Connecting {
            lab.refuse();
        }
        lab.with(|c, now| c.network_changed(now));
        lab.advance(10 * TICK);
    }
    assert!(lab.dials.len() <= 100, "{}", lab.dials.len());
}

#[test]
fn an_attempt_that_saw_a_network_change_fails_cheaply() {
    let mut lab = Lab::started();
    for _ in 0..20 {
        lab.refuse();
        lab.redial();
    }
    lab.with(|c, now| c.network_changed(now));
    lab.advance(5 * SECOND);
    lab.refuse();
    assert_eq!(lab.pause(), Duration::ZERO);
}

#[test]
fn a_joined_socket_survives_a_network_change_if_it_answers() {
    let mut lab = Lab::stable();
    lab.with(|c, now| c.network_changed(now));
    let probe = lab.sent.last().unwrap().clone();
    assert_eq!(probe["event"], "heartbeat");
    lab.reply(
        "phoenix",
        probe["ref"].as_u64().unwrap(),
        json!({"status": "ok", "response": {}}),
    );
    lab.advance(MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn a_socket_that_does_not_survive_a_network_change_is_replaced_at_once() {
    let mut lab = Lab::stable();
    lab.take_events();
    lab.with(|c, now| c.network_changed(now));
    lab.pass(PROBE_TIMEOUT - TICK, false);
    assert!(lab.channel.is_joined());
    lab.pass(TICK, false);
    assert_eq!(lab.take_events(), ["disconnected: heartbeat_timeout"]);
    assert_eq!(lab.dials.last().unwrap().0, lab.now);
}

#[test]
fn a_network_change_does_not_hurry_a_blocked_channel() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.advance(MINUTE);
    lab.with(|c, now| c.network_changed(now));
    assert!(lab.pause() >= RECHECK_BOUNDS.0 - MINUTE);
}

#[test]
fn an_old_network_change_does_not_hurry_a_later_failure() {
    let mut lab = Lab::started();
    lab.open();
    lab.with(|c, now| c.network_changed(now));
    lab.reply("gateway", 0, json!({"status": "ok", "response": {}}));
    lab.advance(60 * MINUTE);
    lab.lose();
    assert!(lab.pause() >= INITIAL_INTERVAL / 2);
}

#[test]
fn a_network_change_does_not_shorten_the_pause_before_a_withdrawn_token_is_tried_again() {
    let mut lab = Lab::stable();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    let withdrawn = lab.now;
    lab.with(|c, now| c.network_changed(now));
    lab.redial();
    assert!(lab.now - withdrawn >= SECOND);
    for _ in 0..20 {
        lab.refuse();
        lab.redial();
    }
    lab.refuse();
    lab.advance(2 * SECOND);
    lab.with(|c, now| c.network_changed(now));
    assert_eq!(lab.pause(), Duration::ZERO, "later waits are ordinary ones");
}
