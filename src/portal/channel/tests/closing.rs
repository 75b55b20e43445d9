//! How a session ends, and who hears of it (portal-channel spec §1.10 and the rows of §2.2 about
//! open connections).

use super::*;

/// Ends a stable session and checks what everybody is told.
fn lost(end: impl FnOnce(&mut Lab), kind: &str, cause: AttemptCause) -> Lab {
    let mut lab = Lab::stable();
    end(&mut lab);
    assert_eq!(lab.take_events(), [format!("disconnected: {kind}")]);
    assert_eq!(lab.next_cause(), cause);
    let status = lab.channel.status(lab.now, SystemTime::now());
    assert_eq!(status.last_error.unwrap().kind, kind);
    assert_eq!(status.state, PortalState::Waiting);
    lab
}

fn close_frame(code: Option<u16>) -> impl FnOnce(&mut Lab) {
    move |lab| {
        let reason = String::new();
        lab.with(|c, now| c.closed(now, CloseCause::Frame { code, reason }));
    }
}

const BACKOFF: AttemptCause = AttemptCause::Failure(DelayReason::Backoff);
const SPREAD: AttemptCause = AttemptCause::Failure(DelayReason::Spread);

#[test]
fn phx_close_reconnects_and_says_goodbye_to_the_socket() {
    let lab = lost(|l| l.push("phx_close", json!({})), "channel_close", SPREAD);
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
}

#[test]
fn phx_close_with_a_filled_payload_counts_too() {
    lost(
        |l| l.push("phx_close", json!({"reason": "x"})),
        "channel_close",
        SPREAD,
    );
}

#[test]
fn phx_close_of_another_topic_is_not_ours() {
    let mut lab = Lab::stable();
    lab.frame(json!({"topic": "other", "event": "phx_close", "ref": null, "payload": {}}));
    assert!(lab.take_events().is_empty() && lab.channel.is_joined());
}

#[test]
fn phx_error_reconnects_because_nobody_is_behind_the_socket_any_more() {
    let lab = lost(|l| l.push("phx_error", json!({})), "channel_error", BACKOFF);
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
}

#[test]
fn disconnect_with_token_expired_is_confirmed_before_anybody_loses_access() {
    let lab = lost(
        |l| l.push("disconnect", json!({"reason": "token_expired"})),
        "token_expired",
        AttemptCause::Confirmation,
    );
    assert!((CONFIRM_BOUNDS.0..=CONFIRM_BOUNDS.1).contains(&lab.pause()));
}

#[test]
fn token_expired_of_a_lost_race_between_two_connections_is_survived() {
    // The newcomer of two connections is told so while the portal holds the older one.
    let mut lab = Lab::stable();
    lab.lose();
    lab.redial();
    lab.come_up();
    lab.take_events();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    lab.redial();
    lab.fail(http(409, None));
    lab.redial();
    lab.come_up();
    assert_eq!(
        lab.take_events(),
        ["disconnected: token_expired", "connected", "message"]
    );
}

#[test]
fn disconnect_with_another_reason_changes_nothing_by_itself() {
    for payload in [
        json!({"reason": "certificate_revoked"}),
        json!({}),
        json!(null),
    ] {
        let mut lab = Lab::stable();
        lab.push("disconnect", payload);
        assert!(lab.take_events().is_empty() && lab.channel.is_joined());
    }
}

#[test]
fn disconnect_with_another_reason_and_then_a_close_reconnects() {
    lost(
        |l| {
            l.push("disconnect", json!({"reason": "certificate_revoked"}));
            close_frame(Some(1000))(l);
        },
        "server_close",
        BACKOFF,
    );
}

#[test]
fn close_frame_1000_reconnects() {
    lost(close_frame(Some(1000)), "server_close", BACKOFF);
}

#[test]
fn close_frame_1001_going_away_is_spread() {
    lost(close_frame(Some(1001)), "server_close", SPREAD);
}

#[test]
fn close_frame_1011_server_error_reconnects() {
    lost(close_frame(Some(1011)), "server_close", BACKOFF);
}

#[test]
fn close_frame_1012_service_restart_is_spread() {
    lost(close_frame(Some(1012)), "server_close", SPREAD);
}

#[test]
fn close_frame_1013_try_again_later_is_spread() {
    lost(close_frame(Some(1013)), "server_close", SPREAD);
}

#[test]
fn close_frame_without_a_code_reconnects() {
    lost(close_frame(None), "server_close", BACKOFF);
}

#[test]
fn close_frame_with_an_unknown_code_reconnects() {
    lost(close_frame(Some(4999)), "server_close", BACKOFF);
}

#[test]
fn end_of_stream_reconnects() {
    let lab = lost(Lab::lose, "server_close", BACKOFF);
    assert!(lab.hangups.is_empty(), "nothing is left to hang up");
}

#[test]
fn io_error_reconnects() {
    let reset = CloseCause::Io("connection reset by peer".to_owned());
    lost(|l| l.with(|c, now| c.closed(now, reset)), "io", BACKOFF);
}

#[test]
fn a_socket_that_takes_no_data_reconnects() {
    lost(
        |l| l.with(|c, now| c.closed(now, CloseCause::WriteStalled)),
        "io",
        BACKOFF,
    );
}

#[test]
fn something_that_is_not_websocket_reconnects() {
    let cause = CloseCause::Protocol("invalid opcode".to_owned());
    lost(
        |l| l.with(|c, now| c.closed(now, cause)),
        "protocol",
        BACKOFF,
    );
}

#[test]
fn truncated_json_hangs_up_politely_and_reconnects() {
    let lab = lost(
        |l| l.with(|c, now| c.frame(now, "{\"topic\":\"gate")),
        "protocol",
        BACKOFF,
    );
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
}

#[test]
fn heartbeats_without_answer_reconnect() {
    lost(
        |l| l.pass(4 * HEARTBEAT_INTERVAL, false),
        "heartbeat_timeout",
        BACKOFF,
    );
}

#[test]
fn join_timeout_hangs_up_and_reconnects() {
    let mut lab = Lab::started();
    lab.open();
    lab.advance(JOIN_TIMEOUT);
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
    assert_eq!(lab.next_cause(), BACKOFF);
    assert!(lab.take_events().is_empty(), "it was never connected");
}

#[test]
fn join_refusals_that_name_a_verdict_block() {
    for reason in ["disabled", "invalid_version", "unmatched topic", "other"] {
        let mut lab = Lab::started();
        lab.open();
        let payload = json!({"status": "error", "response": {"reason": reason}});
        lab.reply("gateway", 0, payload);
        assert_eq!(lab.take_events(), ["blocked: join_refused"], "{reason}");
        assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
    }
}

#[test]
fn a_join_refusal_without_a_reason_blocks_too() {
    let mut lab = Lab::started();
    lab.open();
    lab.reply("gateway", 0, json!({"status": "error", "response": {}}));
    assert_eq!(lab.take_events(), ["blocked: join_refused"]);
}

#[test]
fn dns_failure_is_retried() {
    let mut lab = Lab::started();
    lab.fail(Failure::new(ErrorType::Dns, "no addresses"));
    assert_eq!(lab.next_cause(), BACKOFF);
}

#[test]
fn tcp_refusal_and_timeout_are_retried() {
    for kind in [ErrorType::TcpConnect, ErrorType::TcpTimeout] {
        let mut lab = Lab::started();
        lab.fail(Failure::new(kind, "no"));
        assert_eq!(lab.next_cause(), BACKOFF, "{kind}");
    }
}

#[test]
fn tls_failures_are_retried() {
    for kind in [ErrorType::Tls, ErrorType::TlsCert] {
        let mut lab = Lab::started();
        lab.fail(Failure::new(kind, "no"));
        assert_eq!(lab.next_cause(), BACKOFF, "{kind}");
    }
}

#[test]
fn an_upgrade_that_hangs_is_retried() {
    let mut lab = Lab::started();
    lab.fail(Failure::new(ErrorType::UpgradeTimeout, "no answer"));
    assert_eq!(lab.next_cause(), BACKOFF);
}

#[test]
fn a_token_that_no_header_can_carry_blocks_instead_of_being_tried() {
    let mut lab = Lab::started();
    lab.fail(Failure::new(ErrorType::TokenUnusable, "empty"));
    assert_eq!(lab.take_events(), ["blocked: token_unusable"]);
}

#[test]
fn a_refused_message_loses_nothing_else() {
    let mut lab = Lab::stable();
    for reason in ["unknown_message", "invalid_ref", "whatever"] {
        let payload = json!({"status": "error", "response": {"reason": reason}});
        lab.reply("gateway", 1, payload);
    }
    assert!(lab.take_events().is_empty() && lab.channel.is_joined());
}

#[test]
fn a_reply_without_reference_is_ignored() {
    let mut lab = Lab::started();
    lab.open();
    lab.frame(
        json!({"topic": "gateway", "event": "phx_reply", "ref": null,
            "payload": {"status": "ok", "response": {}}}),
    );
    assert!(!lab.channel.is_joined());
}

#[test]
fn closing_while_joining_hangs_up_and_stays_closed() {
    let mut lab = Lab::started();
    lab.open();
    lab.with(|c, now| c.close(now));
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
    lab.advance(10 * MINUTE);
    assert_eq!((lab.dials.len(), lab.state()), (1, PortalState::Closed));
}

#[test]
fn closing_while_waiting_makes_no_further_attempt() {
    let mut lab = Lab::started();
    lab.refuse();
    lab.with(|c, now| c.close(now));
    assert_eq!(lab.channel.poll_timeout(), None);
}

#[test]
fn closing_while_blocked_ends_the_checks() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.with(|c, now| c.close(now));
    assert_eq!(lab.channel.poll_timeout(), None);
    assert_eq!(lab.state(), PortalState::Closed);
}
