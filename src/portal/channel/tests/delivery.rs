//! What must survive a session is given back with its loss, unless it is known to have arrived.

use super::*;

fn candidates(n: u32) -> Egress {
    Egress::BroadcastIceCandidates {
        client_ids: vec![],
        candidates: vec![n.to_string()],
    }
}

fn send(lab: &mut Lab, message: Egress) -> u64 {
    lab.channel.send(lab.now, message).unwrap();
    lab.drain();
    lab.sent.last().unwrap()["ref"].as_u64().unwrap()
}

/// What comes back when the session is lost now.
fn given_back(lab: &mut Lab) -> Vec<Egress> {
    lab.events.clear();
    lab.lose();
    match lab.events.pop() {
        Some(Event::Disconnected { undelivered, .. }) => undelivered,
        other => panic!("{other:?}"),
    }
}

fn heartbeat_ref(lab: &Lab) -> u64 {
    let heartbeat = lab.sent.iter().rfind(|f| f["event"] == "heartbeat");
    heartbeat.unwrap()["ref"].as_u64().unwrap()
}

#[test]
fn candidates_of_the_last_moment_come_back_in_order() {
    let mut lab = Lab::stable();
    for n in 0..3 {
        send(&mut lab, candidates(n));
    }
    let withdrawn = Egress::BroadcastInvalidatedIceCandidates {
        client_ids: vec![],
        candidates: vec!["1".to_owned()],
    };
    send(&mut lab, withdrawn.clone());
    assert_eq!(
        given_back(&mut lab),
        [candidates(0), candidates(1), candidates(2), withdrawn]
    );
}

#[test]
fn they_come_back_once() {
    let mut lab = Lab::stable();
    send(&mut lab, candidates(0));
    assert_eq!(given_back(&mut lab).len(), 1);
    lab.redial();
    lab.come_up();
    assert!(given_back(&mut lab).is_empty());
}

#[test]
fn answers_and_requests_of_a_session_end_with_it() {
    let mut lab = Lab::stable();
    send(&mut lab, Egress::NoRelays);
    let reference = "r".to_owned();
    send(&mut lab, Egress::AuthorizationCreated { reference });
    assert!(given_back(&mut lab).is_empty());
}

#[test]
fn a_later_reply_of_the_channel_proves_arrival() {
    let mut lab = Lab::stable();
    send(&mut lab, candidates(0));
    let reference = "r".to_owned();
    let answer = send(&mut lab, Egress::AuthorizationCreated { reference });
    send(&mut lab, candidates(1));
    lab.reply("gateway", answer, json!({"status": "ok", "response": {}}));
    assert_eq!(given_back(&mut lab), [candidates(1)]);
}

#[test]
fn a_heartbeat_alone_proves_that_the_socket_lives_and_nothing_else() {
    let mut lab = Lab::stable();
    send(&mut lab, candidates(0));
    lab.advance(MINUTE);
    assert_eq!(given_back(&mut lab), [candidates(0)]);
}

#[test]
fn a_heartbeat_and_then_a_push_prove_arrival() {
    let mut lab = Lab::stable();
    send(&mut lab, candidates(0));
    lab.advance(MINUTE);
    send(&mut lab, candidates(1));
    lab.push("init", init());
    assert_eq!(
        given_back(&mut lab),
        [candidates(1)],
        "sent after the heartbeat"
    );
}

#[test]
fn a_push_before_the_heartbeat_proves_nothing() {
    let mut lab = Lab::stable();
    send(&mut lab, candidates(0));
    lab.push("init", init());
    lab.advance(MINUTE);
    assert_eq!(given_back(&mut lab), [candidates(0)]);
}

#[test]
fn replies_to_references_that_were_never_used_prove_nothing() {
    let mut lab = Lab::stable();
    send(&mut lab, candidates(0));
    lab.reply("phoenix", 9999, json!({"status": "ok", "response": {}}));
    lab.push("init", init());
    assert_eq!(given_back(&mut lab), [candidates(0)]);
}

#[test]
fn a_late_heartbeat_of_an_older_reference_does_not_take_proof_back() {
    let mut lab = Lab::stable();
    let old = heartbeat_ref(&lab);
    send(&mut lab, candidates(0));
    lab.advance(MINUTE);
    lab.reply("phoenix", old, json!({"status": "ok", "response": {}}));
    lab.push("init", init());
    assert!(given_back(&mut lab).is_empty());
}

#[test]
fn what_a_forgotten_join_swallowed_comes_back() {
    let mut lab = Lab::stable();
    let reference = send(&mut lab, candidates(0));
    let forgotten = json!({"status": "error", "response": {"reason": "unmatched topic"}});
    lab.reply("gateway", reference, forgotten);
    let Some(Event::Disconnected { undelivered, .. }) = lab.events.pop() else {
        panic!("the session is interrupted");
    };
    assert_eq!(undelivered, [candidates(0)]);
}

#[test]
fn messages_held_for_a_join_that_fails_are_not_delivered() {
    let mut lab = Lab::started();
    lab.open();
    lab.push("init", init());
    lab.advance(JOIN_TIMEOUT);
    lab.redial();
    lab.join();
    assert_eq!(lab.take_events(), ["connected"]);
}

#[test]
fn a_message_that_comes_too_late_for_the_session_is_handed_back() {
    let mut lab = Lab::stable();
    lab.channel.closed(lab.now, CloseCause::Eof);
    assert_eq!(
        lab.channel.send(lab.now, candidates(7)),
        Err(NotJoined(candidates(7)))
    );
}
