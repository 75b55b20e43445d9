//! Why the channel failed, as a closed list that spans, metrics, status and logs share.

use std::fmt;
use std::time::Duration;

/// Values of `error.type` (OpenTelemetry semantic conventions, "Recording errors"): few and stable,
/// so that they can be grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ErrorType {
    /// The name could not be resolved, or to nothing.
    Dns,
    /// Every address refused the connection or was unreachable.
    TcpConnect,
    /// No address answered in time.
    TcpTimeout,
    /// TLS failed for another reason than the certificate.
    Tls,
    /// The server's certificate is not acceptable.
    TlsCert,
    /// TLS worked, the answer to the upgrade request did not come in time.
    UpgradeTimeout,
    /// HTTP 401: the token is refused.
    Http401,
    /// HTTP 409: the portal still believes the previous connection alive.
    Http409,
    /// HTTP 429.
    Http429,
    /// Any other HTTP 4xx.
    Http4xx,
    /// Any HTTP 5xx.
    Http5xx,
    /// Any other HTTP answer than 101, redirects included.
    HttpOther,
    /// The token cannot be sent at all: empty, or with characters that no header may carry.
    TokenUnusable,
    /// The join was not answered in time.
    JoinTimeout,
    /// The join was refused.
    JoinRefused,
    /// Too many heartbeats without an answer.
    HeartbeatTimeout,
    /// The server sent a Close frame or ended the stream.
    ServerClose,
    /// The server closed the channel (`phx_close`).
    ChannelClose,
    /// The channel crashed (`phx_error`), or the portal keeps forgetting that we joined.
    ChannelError,
    /// The portal answers, but no application message comes.
    StreamSilent,
    /// The portal withdrew the token (`disconnect` with `token_expired`).
    TokenExpired,
    /// What arrived is not WebSocket or not JSON.
    Protocol,
    /// A read or write failed or stalled.
    Io,
    /// None of the above.
    Other,
}

impl ErrorType {
    /// Every value, for documentation and metrics that want to start at zero.
    pub const ALL: [ErrorType; 24] = [
        Self::Dns,
        Self::TcpConnect,
        Self::TcpTimeout,
        Self::Tls,
        Self::TlsCert,
        Self::UpgradeTimeout,
        Self::Http401,
        Self::Http409,
        Self::Http429,
        Self::Http4xx,
        Self::Http5xx,
        Self::HttpOther,
        Self::TokenUnusable,
        Self::JoinTimeout,
        Self::JoinRefused,
        Self::HeartbeatTimeout,
        Self::ServerClose,
        Self::ChannelClose,
        Self::ChannelError,
        Self::StreamSilent,
        Self::TokenExpired,
        Self::Protocol,
        Self::Io,
        Self::Other,
    ];

    /// The value as it appears in `error.type`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::TcpConnect => "tcp_connect",
            Self::TcpTimeout => "tcp_timeout",
            Self::Tls => "tls",
            Self::TlsCert => "tls_cert",
            Self::UpgradeTimeout => "upgrade_timeout",
            Self::Http401 => "http_401",
            Self::Http409 => "http_409",
            Self::Http429 => "http_429",
            Self::Http4xx => "http_4xx",
            Self::Http5xx => "http_5xx",
            Self::HttpOther => "http_other",
            Self::TokenUnusable => "token_unusable",
            Self::JoinTimeout => "join_timeout",
            Self::JoinRefused => "join_refused",
            Self::HeartbeatTimeout => "heartbeat_timeout",
            Self::ServerClose => "server_close",
            Self::ChannelClose => "channel_close",
            Self::ChannelError => "channel_error",
            Self::StreamSilent => "stream_silent",
            Self::TokenExpired => "token_expired",
            Self::Protocol => "protocol",
            Self::Io => "io",
            Self::Other => "_OTHER",
        }
    }

    /// The kind of an HTTP answer that is not 101.
    pub const fn from_status(status: u16) -> Self {
        match status {
            401 => Self::Http401,
            409 => Self::Http409,
            429 => Self::Http429,
            400..=499 => Self::Http4xx,
            500..=599 => Self::Http5xx,
            _ => Self::HttpOther,
        }
    }
}

impl fmt::Display for ErrorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One failure of the channel or of an attempt to open it. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its kind.
    pub kind: ErrorType,
    /// In words, for an operator.
    pub message: String,
    /// What the server asked for in `Retry-After`, not yet clamped.
    pub retry_after: Option<Duration>,
    /// HTTP status, if it was an HTTP answer.
    pub http_status: Option<u16>,
    /// `code` of an RFC 9457 problem document, if there was one.
    pub code: Option<String>,
    /// Code of the WebSocket Close frame (RFC 6455 §7.4), if there was one.
    pub close_code: Option<u16>,
}

impl Failure {
    /// A failure without further details.
    pub fn new(kind: ErrorType, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            retry_after: None,
            http_status: None,
            code: None,
            close_code: None,
        }
    }

    /// Whether the server ended the connection on purpose, as it does towards everybody at once
    /// when it is restarted: Close 1001, 1012 or 1013, `phx_close`, or 503 without `Retry-After`.
    pub fn is_deliberate_close(&self) -> bool {
        match self.kind {
            ErrorType::ServerClose => matches!(self.close_code, Some(1001 | 1012 | 1013)),
            ErrorType::ChannelClose => true,
            ErrorType::Http5xx => self.http_status == Some(503) && self.retry_after.is_none(),
            _ => false,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_error_type_has_a_name_of_its_own() {
        let names: BTreeSet<_> = ErrorType::ALL.iter().map(|e| e.as_str()).collect();
        assert_eq!(names.len(), ErrorType::ALL.len());
    }

    #[test]
    fn the_documentation_lists_every_error_type_and_no_other() {
        let page = include_str!("../../docs/portal.md");
        let (_, table) = page.split_once("## Causes").unwrap();
        let (table, _) = table.split_once("## Traces").unwrap();
        let listed: Vec<_> = table
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .filter(|name| *name != "error.type")
            .collect();
        let names: Vec<_> = ErrorType::ALL.iter().map(|e| e.as_str()).collect();
        assert_eq!(listed, names);
    }

    #[test]
    fn http_status_maps_to_the_closed_list() {
        let cases = [
            (401, "http_401"),
            (409, "http_409"),
            (429, "http_429"),
            (400, "http_4xx"),
            (408, "http_4xx"),
            (500, "http_5xx"),
            (503, "http_5xx"),
            (302, "http_other"),
            (200, "http_other"),
        ];
        for (status, name) in cases {
            assert_eq!(ErrorType::from_status(status).as_str(), name, "{status}");
        }
    }

    #[test]
    fn only_restart_like_closes_are_deliberate() {
        let close = |code| Failure {
            close_code: code,
            ..Failure::new(ErrorType::ServerClose, "closed")
        };
        for code in [1001, 1012, 1013] {
            assert!(close(Some(code)).is_deliberate_close(), "{code}");
        }
        for code in [None, Some(1000), Some(1006), Some(1011)] {
            assert!(!close(code).is_deliberate_close(), "{code:?}");
        }
        let unavailable = Failure {
            http_status: Some(503),
            ..Failure::new(ErrorType::Http5xx, "unavailable")
        };
        assert!(unavailable.is_deliberate_close());
        let with_hint = Failure {
            retry_after: Some(Duration::from_secs(1)),
            ..unavailable
        };
        assert!(!with_hint.is_deliberate_close(), "the hint says it better");
    }
}
