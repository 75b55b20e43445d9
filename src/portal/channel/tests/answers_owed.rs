//! A portal whose socket lives while nobody is behind it.

use super::*;

fn answer_to(reference: u64) -> Value {
    json!({"topic": "gateway", "event": "phx_reply", "ref": reference,
        "payload": {"status": "ok", "response": {}}})
}

/// Sends the message and returns its reference.
fn send(lab: &mut Lab, message: Egress) -> u64 {
    lab.channel.send(lab.now, message).unwrap();
    lab.drain();
    lab.sent.last().unwrap()["ref"].as_u64().unwrap()
}

fn authorized(lab: &mut Lab, n: u32) -> u64 {
    let reference = format!("r{n}");
    send(lab, Egress::AuthorizationCreated { reference })
}

fn presence() -> Value {
    json!({"disconnected_ids": [], "connected": []})
}

#[test]
fn a_session_without_configuration_is_replaced_after_thirty_seconds_and_not_before() {
    let mut lab = Lab::joined();
    lab.advance(ANSWER_TIMEOUT - TICK);
    assert!(lab.channel.is_joined());
    lab.advance(TICK);
    assert_eq!(
        lab.take_events(),
        ["connected", "disconnected: stream_silent"]
    );
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
    let error = lab.channel.status(lab.now, SystemTime::now()).last_error;
    assert!(error.unwrap().message.contains("configuration"));
}

#[test]
fn configuration_one_tick_before_the_limit_keeps_the_session() {
    let mut lab = Lab::joined();
    lab.advance(ANSWER_TIMEOUT - TICK);
    lab.push("init", init());
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn configuration_that_overtakes_the_join_reply_counts() {
    let mut lab = Lab::started();
    lab.open();
    lab.push("init", init());
    lab.reply("gateway", 0, json!({"status": "ok", "response": {}}));
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn a_session_without_configuration_never_counts_as_stable() {
    let mut lab = Lab::started();
    lab.refuse();
    lab.redial();
    lab.join();
    lab.advance(ANSWER_TIMEOUT - TICK);
    let status = lab.channel.status(lab.now, SystemTime::now());
    assert_eq!(status.backoff.unwrap().attempt, 1);
    lab.push("init", init());
    lab.advance(TICK);
    let status = lab.channel.status(lab.now, SystemTime::now());
    assert_eq!(status.backoff, None, "it has been up for long enough");
}

#[test]
fn a_portal_that_never_configures_meets_growing_delays() {
    let mut lab = Lab::started();
    let mut pauses = Vec::new();
    for _ in 0..12 {
        lab.join();
        lab.advance(ANSWER_TIMEOUT);
        pauses.push(lab.pause());
        lab.redial();
    }
    assert!(pauses[0] < SECOND && pauses[11] > 20 * SECOND, "{pauses:?}");
}

#[test]
fn silence_on_both_levels_is_a_matter_of_heartbeats() {
    let mut lab = Lab::joined();
    lab.pass(ANSWER_TIMEOUT, false);
    assert_eq!(
        lab.take_events(),
        ["connected", "disconnected: heartbeat_timeout"]
    );
}

#[test]
fn a_reply_that_the_portal_is_known_to_give_is_missed_after_thirty_seconds() {
    let mut lab = Lab::stable();
    let first = authorized(&mut lab, 1);
    lab.frame(answer_to(first));
    authorized(&mut lab, 2);
    lab.advance(ANSWER_TIMEOUT - TICK);
    assert!(lab.channel.is_joined());
    lab.advance(TICK);
    assert_eq!(lab.take_events(), ["disconnected: stream_silent"]);
}

#[test]
fn a_reply_one_tick_before_the_limit_keeps_the_session() {
    let mut lab = Lab::stable();
    let first = authorized(&mut lab, 1);
    lab.frame(answer_to(first));
    let second = authorized(&mut lab, 2);
    lab.advance(ANSWER_TIMEOUT - TICK);
    lab.frame(answer_to(second));
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn an_error_reply_is_an_answer() {
    let mut lab = Lab::stable();
    let first = authorized(&mut lab, 1);
    lab.frame(answer_to(first));
    let second = authorized(&mut lab, 2);
    let no = json!({"status": "error", "response": {"reason": "invalid_ref"}});
    lab.reply("gateway", second, no);
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn a_reply_to_another_message_is_not_the_answer() {
    let mut lab = Lab::stable();
    let first = authorized(&mut lab, 1);
    lab.frame(answer_to(first));
    authorized(&mut lab, 2);
    lab.frame(answer_to(first));
    lab.advance(ANSWER_TIMEOUT);
    assert_eq!(lab.take_events(), ["disconnected: stream_silent"]);
}

#[test]
fn a_portal_that_never_replies_to_authorizations_is_taken_as_it_is() {
    let mut lab = Lab::stable();
    for n in 0..200 {
        authorized(&mut lab, n);
        lab.advance(MINUTE);
    }
    assert!(lab.channel.is_joined());
}

#[test]
fn a_missed_reply_replaces_one_session_and_not_one_after_the_other() {
    let mut lab = Lab::stable();
    let first = authorized(&mut lab, 1);
    lab.frame(answer_to(first));
    authorized(&mut lab, 2);
    lab.advance(ANSWER_TIMEOUT);
    lab.redial();
    lab.come_up();
    authorized(&mut lab, 3);
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined(), "it may have lost the habit");
    let fourth = authorized(&mut lab, 4);
    lab.frame(answer_to(fourth));
    authorized(&mut lab, 5);
    lab.advance(ANSWER_TIMEOUT);
    assert!(!lab.channel.is_joined(), "it has it again");
}

#[test]
fn relays_that_were_asked_for_are_missed_if_they_came_before() {
    let mut lab = Lab::stable();
    send(&mut lab, Egress::NoRelays);
    lab.push("relays_presence", presence());
    lab.advance(10 * MINUTE);
    lab.take_events();
    send(&mut lab, Egress::NoRelays);
    lab.advance(ANSWER_TIMEOUT - TICK);
    assert!(lab.channel.is_joined());
    lab.advance(TICK);
    assert_eq!(lab.take_events(), ["disconnected: stream_silent"]);
}

#[test]
fn relays_that_nobody_asked_for_prove_no_habit() {
    let mut lab = Lab::stable();
    lab.push("relays_presence", presence());
    send(&mut lab, Egress::NoRelays);
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn any_number_of_requests_is_answered_by_one_relays_presence() {
    let mut lab = Lab::stable();
    send(&mut lab, Egress::NoRelays);
    lab.push("relays_presence", presence());
    for _ in 0..100 {
        send(&mut lab, Egress::NoRelays);
    }
    lab.push("relays_presence", presence());
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn what_one_session_owed_the_next_one_does_not() {
    let mut lab = Lab::stable();
    let first = authorized(&mut lab, 1);
    lab.frame(answer_to(first));
    authorized(&mut lab, 2);
    lab.lose();
    lab.redial();
    lab.come_up();
    lab.advance(10 * MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn a_repeated_join_owes_a_configuration_again() {
    let mut lab = Lab::stable();
    let forgotten = json!({"status": "error", "response": {"reason": "unmatched topic"}});
    lab.reply("gateway", 1, forgotten);
    let join = lab.join_ref();
    lab.reply("gateway", join, json!({"status": "ok", "response": {}}));
    lab.advance(ANSWER_TIMEOUT - TICK);
    assert!(lab.channel.is_joined());
    lab.advance(TICK);
    assert!(!lab.channel.is_joined());
}
