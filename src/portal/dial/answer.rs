//! HTTP answers that are not an upgrade (portal-channel spec §2.1, §2.2).

use std::time::{Duration, SystemTime};

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use tokio_tungstenite::tungstenite::http::{HeaderMap, StatusCode};

use super::transport::Io;
use crate::portal::channel::printable;
use crate::portal::error::{ErrorType, Failure};

/// More of a problem document is not read.
const MAX_BODY: usize = 16 << 10;
/// Longer is not waited for it.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// Completes the body of a problem document; anything else is of no interest.
pub(super) async fn read_body(
    headers: &HeaderMap,
    mut body: Vec<u8>,
    stream: Option<Box<dyn Io>>,
    deadline: Instant,
) -> Vec<u8> {
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .unwrap_or(MAX_BODY)
        .min(MAX_BODY);
    if let Some(stream) = stream
        && is_problem(headers)
        && body.len() < length
    {
        let deadline = deadline.min(Instant::now() + BODY_TIMEOUT);
        let missing = (length - body.len()) as u64;
        // What arrived before an error or the deadline is kept.
        let _ = timeout_at(deadline, stream.take(missing).read_to_end(&mut body)).await;
    }
    body
}

/// The failure that an answer stands for.
pub(in crate::portal) fn failure(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    now: SystemTime,
) -> Failure {
    let problem = is_problem(headers)
        .then(|| serde_json::from_slice::<Value>(body).ok())
        .flatten();
    let member = |name: &str| {
        problem
            .as_ref()
            .and_then(|p| p.get(name)?.as_str())
            .map(printable)
    };
    let code = member("code");
    let mut message = format!("the portal answered {status}");
    if let Some(code) = &code {
        message.push_str(&format!(" ({code})"));
    }
    if let Some(detail) = member("detail") {
        message.push_str(&format!(": {detail}"));
    }
    if status.is_redirection() {
        message.push_str("; redirects are not followed, check the portal URL");
    }
    let retry_after = headers
        .get(RETRY_AFTER)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| parse_retry_after(v, now));
    Failure {
        retry_after,
        http_status: Some(status.as_u16()),
        code,
        ..Failure::new(ErrorType::from_status(status.as_u16()), message)
    }
}

fn is_problem(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split(';').next())
        .is_some_and(|v| v.trim().eq_ignore_ascii_case("application/problem+json"))
}

/// `Retry-After` (RFC 9110 §10.2.3): seconds, or an HTTP date, which may lie in the past.
pub(crate) fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        // Too long for a number is too long for us in any case; the caller clamps.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn retry_after_takes_seconds_and_dates_and_nothing_else() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let cases = [
            ("0", Some(0)),
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("99999999999999999999999", Some(u64::MAX)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("+3", None),
            ("soon", None),
        ];
        for (value, expected) in cases {
            assert_eq!(
                parse_retry_after(value, now),
                expected.map(Duration::from_secs),
                "{value:?}"
            );
        }
    }

    #[test]
    fn problem_details_are_read_whatever_the_parameters_of_the_media_type() {
        let body = br#"{"type":"about:blank","title":"Unauthorized","status":401,
            "detail":"no such token","code":"invalid_token"}"#;
        for media in [
            "application/problem+json",
            "Application/Problem+JSON; charset=utf-8",
        ] {
            let failure = failure(
                StatusCode::UNAUTHORIZED,
                &headers(&[("content-type", media)]),
                body,
                SystemTime::now(),
            );
            assert_eq!(failure.kind, ErrorType::Http401);
            assert_eq!(failure.code.as_deref(), Some("invalid_token"));
            assert_eq!(
                failure.message,
                "the portal answered 401 Unauthorized (invalid_token): no such token"
            );
        }
    }

    #[test]
    fn other_media_types_and_broken_documents_carry_no_details() {
        for (media, body) in [
            ("application/json", &br#"{"code":"invalid_token"}"#[..]),
            ("application/problem+json", b"{\"code\":"),
            ("application/problem+json", b"{\"code\":5}"),
        ] {
            let failure = failure(
                StatusCode::CONFLICT,
                &headers(&[("content-type", media)]),
                body,
                SystemTime::now(),
            );
            assert_eq!((failure.kind, failure.code), (ErrorType::Http409, None));
        }
    }

    #[test]
    fn a_hostile_detail_cannot_break_lines_or_fill_logs() {
        let detail = format!("a\\nb{}", "x".repeat(5000));
        let failure = failure(
            StatusCode::FORBIDDEN,
            &headers(&[("content-type", "application/problem+json")]),
            format!("{{\"detail\":\"{detail}\"}}").as_bytes(),
            SystemTime::now(),
        );
        assert!(failure.message.len() < 300 && !failure.message.contains('\n'));
    }
}
