//! Portals that know one version of the channel only (portal-channel spec §4.1).

use super::*;

fn unknown(lab: &mut Lab) {
    lab.fail(http(404, None));
}

fn asked_for(lab: &Lab) -> Protocol {
    lab.dials.last().unwrap().1.protocol
}

#[test]
fn version_2_is_asked_for_first() {
    assert_eq!(asked_for(&Lab::started()), Protocol::V2);
}

#[test]
fn a_portal_without_version_2_is_asked_for_version_1_within_a_second() {
    let mut lab = Lab::started();
    unknown(&mut lab);
    assert!(lab.pause() <= HURRIED_SPACING);
    assert_eq!(lab.next_cause(), AttemptCause::OtherProtocol);
    lab.redial();
    assert_eq!(asked_for(&lab), Protocol::V1);
    lab.come_up();
    let reference = "r".to_owned();
    let answer = Egress::AuthorizationCreated { reference };
    lab.channel.send(lab.now, answer).unwrap();
    lab.drain();
    assert_eq!(lab.sent.last().unwrap()["event"], "flow_authorized");
}

#[test]
fn the_status_shows_the_path_that_is_dialled() {
    let config = ChannelConfig {
        url_v1: "ws://p/gateway/websocket".to_owned(),
        url_v2: "ws://p/gateway/v2/websocket".to_owned(),
        ..ChannelConfig::default()
    };
    let mut lab = Lab::new(config);
    let url = |lab: &Lab| lab.channel.status(lab.now, SystemTime::now()).url;
    assert_eq!(url(&lab), "ws://p/gateway/v2/websocket");
    unknown(&mut lab);
    assert_eq!(url(&lab), "ws://p/gateway/websocket");
}

#[test]
fn a_portal_that_knows_neither_is_asked_for_both_in_turns_and_ever_more_rarely() {
    let mut lab = Lab::started();
    let mut asked = vec![asked_for(&lab)];
    let mut pauses = Vec::new();
    for _ in 0..14 {
        unknown(&mut lab);
        pauses.push(lab.pause());
        lab.redial();
        asked.push(asked_for(&lab));
    }
    for pair in asked.windows(2) {
        assert_ne!(pair[0], pair[1]);
    }
    assert!(pauses[13] > 20 * SECOND, "{pauses:?}");
}

#[test]
fn other_answers_do_not_change_the_version() {
    for failure in [
        http(400, None),
        http(403, None),
        http(410, None),
        http(500, None),
        Failure::new(ErrorType::TcpConnect, "refused"),
    ] {
        let mut lab = Lab::started();
        lab.fail(failure);
        lab.redial();
        assert_eq!(asked_for(&lab), Protocol::V2);
    }
}

#[test]
fn within_an_outage_the_version_that_worked_is_kept() {
    let mut lab = Lab::started();
    unknown(&mut lab);
    lab.redial();
    lab.join();
    lab.lose();
    lab.redial();
    assert_eq!(asked_for(&lab), Protocol::V1, "that join was not stable");
}

#[test]
fn every_outage_begins_with_version_2_again() {
    let mut lab = Lab::started();
    unknown(&mut lab);
    lab.redial();
    lab.come_up();
    lab.advance(STABLE_AFTER);
    lab.lose();
    lab.redial();
    assert_eq!(asked_for(&lab), Protocol::V2);
    unknown(&mut lab);
    assert!(lab.pause() <= HURRIED_SPACING, "and again at once");
    lab.redial();
    assert_eq!(asked_for(&lab), Protocol::V1);
}

#[test]
fn a_404_that_asks_for_patience_gets_it() {
    let mut lab = Lab::started();
    lab.fail(http(404, Some(60)));
    assert!(lab.pause() >= MINUTE);
    lab.redial();
    assert_eq!(asked_for(&lab), Protocol::V1);
}
