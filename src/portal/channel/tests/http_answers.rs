//! Answers to the upgrade request (portal-channel spec §2.1 and the HTTP rows of §2.2), from the
//! bytes to what follows. Only a refused token is final; everything else may pass.

use tokio_tungstenite::tungstenite::http::{HeaderMap, StatusCode};

use super::*;
use crate::portal::dial::answer;
use crate::portal::reconnect::RETRY_AFTER_BOUNDS;

/// As the portal of today answers: problem details with a code.
fn problem(status: u16, code: &str, retry_after: Option<&str>) -> Failure {
    let body = json!({"type": "about:blank", "title": "x", "status": status,
        "detail": "in words", "code": code});
    raw(
        status,
        Some("application/problem+json; charset=utf-8"),
        retry_after,
        &body.to_string(),
    )
}

fn raw(status: u16, media: Option<&str>, retry_after: Option<&str>, body: &str) -> Failure {
    let mut headers = HeaderMap::new();
    if let Some(media) = media {
        headers.insert("content-type", media.parse().unwrap());
    }
    if let Some(value) = retry_after {
        headers.insert("retry-after", value.parse().unwrap());
    }
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
    answer::failure(
        StatusCode::from_u16(status).unwrap(),
        &headers,
        body.as_bytes(),
        now,
    )
}

/// Answered so at the first contact; returns the cause of what happens next.
fn first_contact(failure: Failure) -> (Lab, AttemptCause) {
    let mut lab = Lab::started();
    lab.fail(failure);
    let cause = lab.next_cause();
    (lab, cause)
}

fn retried_with_backoff(failure: Failure, kind: &str) {
    let message = failure.message.clone();
    let (mut lab, cause) = first_contact(failure);
    assert_eq!(cause, AttemptCause::Failure(DelayReason::Backoff));
    assert!(lab.pause() <= INITIAL_INTERVAL.mul_f64(1.5));
    assert!(lab.take_events().is_empty(), "nobody loses anything");
    let status = lab.channel.status(lab.now, SystemTime::now());
    let error = status.last_error.unwrap();
    assert_eq!((error.kind.as_str(), error.message), (kind, message));
    lab.redial();
    lab.come_up();
}

fn blocked(failure: Failure, code: Option<&str>) {
    assert_eq!(failure.code.as_deref(), code);
    let (mut lab, cause) = first_contact(failure);
    assert_eq!(cause, AttemptCause::Recheck);
    assert_eq!(lab.state(), PortalState::Blocked);
    assert_eq!(lab.take_events(), ["blocked: http_401"]);
}

// ---- Table 2.1 ----

#[test]
fn http_401_invalid_token_blocks() {
    blocked(problem(401, "invalid_token", None), Some("invalid_token"));
}

#[test]
fn http_401_missing_token_blocks() {
    blocked(problem(401, "missing_token", None), Some("missing_token"));
}

#[test]
fn http_400_invalid_connect_params_is_retried() {
    retried_with_backoff(problem(400, "invalid_connect_params", None), "http_4xx");
}

#[test]
fn http_402_limits_exceeded_is_retried() {
    retried_with_backoff(problem(402, "limits_exceeded", None), "http_4xx");
}

#[test]
fn http_403_account_disabled_is_retried() {
    retried_with_backoff(problem(403, "account_disabled", None), "http_4xx");
}

#[test]
fn http_403_unauthenticated_is_retried() {
    retried_with_backoff(problem(403, "unauthenticated", None), "http_4xx");
}

#[test]
fn http_403_device_untrusted_is_retried() {
    retried_with_backoff(problem(403, "device_untrusted", None), "http_4xx");
}

#[test]
fn http_403_certificate_revoked_is_retried() {
    retried_with_backoff(problem(403, "certificate_revoked", None), "http_4xx");
}

#[test]
fn http_409_gateway_already_connected_is_retried() {
    retried_with_backoff(problem(409, "gateway_already_connected", None), "http_409");
}

#[test]
fn http_409_device_identity_conflict_is_retried() {
    retried_with_backoff(problem(409, "device_identity_conflict", None), "http_409");
}

#[test]
fn http_503_rate_limit_waits_the_second_that_it_asks_for() {
    let (lab, cause) = first_contact(problem(503, "rate_limit", Some("1")));
    assert_eq!(cause, AttemptCause::Failure(DelayReason::RetryAfter));
    assert!((SECOND..=2 * SECOND).contains(&lab.pause()));
}

#[test]
fn http_500_unhandled_connect_error_is_retried() {
    retried_with_backoff(problem(500, "unhandled_connect_error", None), "http_5xx");
}

// ---- Table 2.2, rows about HTTP ----

#[test]
fn http_401_with_another_code_blocks() {
    blocked(problem(401, "clock_skew", None), Some("clock_skew"));
}

#[test]
fn http_401_that_is_no_problem_document_blocks() {
    blocked(
        raw(401, Some("text/plain"), None, "no\r\n{\"code\":1}"),
        None,
    );
    blocked(raw(401, None, None, ""), None);
    blocked(
        raw(401, Some("application/problem+json"), None, "{\"code\""),
        None,
    );
}

#[test]
fn http_401_with_retry_after_blocks_all_the_same() {
    blocked(
        problem(401, "invalid_token", Some("1")),
        Some("invalid_token"),
    );
}

#[test]
fn http_3xx_is_retried_and_not_followed() {
    for status in [301, 302, 303, 307, 308] {
        retried_with_backoff(raw(status, None, None, ""), "http_other");
    }
}

#[test]
fn http_200_instead_of_an_upgrade_is_retried() {
    retried_with_backoff(raw(200, Some("text/html"), None, "<p>hello"), "http_other");
}

#[test]
fn http_408_is_retried() {
    retried_with_backoff(raw(408, None, None, ""), "http_4xx");
}

#[test]
fn http_422_of_an_older_portal_is_retried() {
    retried_with_backoff(raw(422, Some("text/plain"), None, "bad"), "http_4xx");
}

#[test]
fn http_429_without_a_hint_is_retried_with_backoff() {
    retried_with_backoff(raw(429, None, None, ""), "http_429");
}

#[test]
fn http_502_and_504_of_a_proxy_are_retried() {
    for status in [502, 504] {
        retried_with_backoff(raw(status, Some("text/html"), None, "<p>"), "http_5xx");
    }
}

#[test]
fn http_503_without_a_hint_is_a_deploy_and_spread() {
    let (lab, cause) = first_contact(raw(503, None, None, ""));
    assert_eq!(cause, AttemptCause::Failure(DelayReason::Spread));
    assert!(lab.pause() <= DELIBERATE_CLOSE_SPREAD);
}

#[test]
fn retry_after_is_honoured_for_every_other_status() {
    for status in [302, 400, 403, 404, 408, 409, 422, 429, 500, 502, 503, 504] {
        let (lab, cause) = first_contact(raw(status, None, Some("30"), ""));
        assert_eq!(cause, AttemptCause::Failure(DelayReason::RetryAfter));
        assert!(
            (30 * SECOND..=33 * SECOND).contains(&lab.pause()),
            "{status}"
        );
    }
}

#[test]
fn retry_after_may_be_a_date() {
    let date = "Sun, 06 Nov 1994 08:50:37 GMT";
    let (lab, cause) = first_contact(raw(503, None, Some(date), ""));
    assert_eq!(cause, AttemptCause::Failure(DelayReason::RetryAfter));
    assert!((60 * SECOND..=66 * SECOND).contains(&lab.pause()));
}

#[test]
fn retry_after_in_the_past_is_the_shortest_wait() {
    let date = "Sun, 06 Nov 1994 08:00:00 GMT";
    let (lab, _) = first_contact(raw(503, None, Some(date), ""));
    assert!((RETRY_AFTER_BOUNDS.0..=2 * SECOND).contains(&lab.pause()));
}

#[test]
fn retry_after_of_zero_for_ever_is_no_hot_loop() {
    let mut lab = Lab::started();
    for _ in 0..100 {
        lab.fail(raw(503, None, Some("0"), ""));
        assert!(lab.pause() >= RETRY_AFTER_BOUNDS.0);
        lab.redial();
    }
}

#[test]
fn retry_after_that_is_no_time_counts_as_absent() {
    for value in ["-1", "1.5", "soon", ""] {
        retried_with_backoff(raw(500, None, Some(value), ""), "http_5xx");
    }
}

#[test]
fn retry_after_longer_than_five_minutes_is_cut() {
    let (lab, _) = first_contact(raw(503, None, Some("86400"), ""));
    assert!((300 * SECOND..=330 * SECOND).contains(&lab.pause()));
}

#[test]
fn waiting_on_request_costs_no_budget() {
    let mut lab = Lab::new(budget(15));
    for _ in 0..20 {
        lab.fail(raw(503, None, Some("300"), ""));
        lab.redial();
    }
    assert_ne!(lab.state(), PortalState::GaveUp);
    let status = lab.channel.status(lab.now, SystemTime::now());
    assert_eq!(status.backoff.unwrap().budget_left, Some(900.0));
}
