//! Faults that tests switch on to see how a peer takes them.

use axum::http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};

use super::store::Role;

/// What currently goes wrong for one kind of peer. The default is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FaultSet {
    /// Answer connects with an HTTP error.
    pub refuse: Option<Refuse>,
    /// Wait this long, in milliseconds, before answering a connect.
    pub upgrade_delay_ms: u64,
    /// What to do with `phx_join`.
    pub join: JoinFault,
    /// What becomes of the channel after a join.
    pub channel: ChannelFault,
    /// Be a portal of 2024: know nothing of version 2 of the channels, whose paths answer 404, and
    /// read tokens from the query alone.
    pub only_v1: bool,
    /// Do not reply to heartbeats.
    pub drop_heartbeat_replies: bool,
    /// Do not push `create_authorization` (gateways) or ignore requests for one (clients).
    pub drop_authorizations: bool,
    /// Behave as if the network swallowed everything: nothing is read, nothing is written, new
    /// connects are not answered. Connections whose idle limit passes meanwhile end without a
    /// Close frame.
    pub blackhole: bool,
}

/// How to refuse connects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refuse {
    /// HTTP status.
    pub status: u16,
    /// Value of `Retry-After`, verbatim; a number may be given as such.
    #[serde(default, deserialize_with = "text_or_number")]
    pub retry_after: Option<String>,
    /// `code` of the problem details; without it the body is plain text.
    #[serde(default)]
    pub code: Option<String>,
    /// How many connects to refuse; all if absent.
    #[serde(default)]
    pub times: Option<u32>,
}

fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Raw {
        Number(serde_json::Number),
        Text(String),
    }
    Ok(Option::deserialize(deserializer)?.map(|raw| match raw {
        Raw::Number(number) => number.to_string(),
        Raw::Text(text) => text,
    }))
}

/// What to do with `phx_join`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JoinFault {
    /// Accept it.
    #[default]
    None,
    /// Never answer.
    Ignore,
    /// Refuse with this reason.
    Refuse(String),
}

/// What becomes of a channel after its join.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChannelFault {
    /// It works.
    #[default]
    None,
    /// Its process hangs: heartbeats are answered, which the socket does, and nothing else.
    Silent,
    /// Its process crashes right after the join (`phx_error`).
    Crash,
}

impl FaultSet {
    /// Takes one refusal, if one is due.
    pub(super) fn take_refusal(&mut self) -> Option<Refusal> {
        let refuse = self.refuse.as_mut()?;
        let refusal = Refusal {
            status: StatusCode::from_u16(refuse.status)
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            code: refuse.code.clone(),
            detail: "Refused by a fault of the stand-in portal.".to_owned(),
            retry_after: refuse.retry_after.clone(),
        };
        if let Some(times) = &mut refuse.times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                self.refuse = None;
            }
        }
        Some(refusal)
    }
}

/// The faults of both kinds of peer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// For gateways.
    pub gateway: FaultSet,
    /// For clients.
    pub client: FaultSet,
}

impl Faults {
    /// The faults of one kind of peer.
    pub fn of(&self, role: Role) -> &FaultSet {
        match role {
            Role::Gateway => &self.gateway,
            Role::Client => &self.client,
        }
    }

    /// The faults of one kind of peer, to be changed.
    pub fn of_mut(&mut self, role: Role) -> &mut FaultSet {
        match role {
            Role::Gateway => &mut self.gateway,
            Role::Client => &mut self.client,
        }
    }
}

/// An HTTP error in answer to a connect (portal-channel spec §2.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Status.
    pub status: StatusCode,
    /// `code` of the problem details; without it the body is plain text.
    pub code: Option<String>,
    /// `detail` of the problem details.
    pub detail: String,
    /// Value of `Retry-After`.
    pub retry_after: Option<String>,
}

impl Refusal {
    /// A refusal with problem details.
    pub(super) fn new(status: StatusCode, code: &str, detail: &str) -> Self {
        Self {
            status,
            code: Some(code.to_owned()),
            detail: detail.to_owned(),
            retry_after: None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn refusal_stops_after_the_given_number_of_times() {
        let mut faults: FaultSet =
            serde_json::from_str(r#"{"refuse": {"status": 503, "times": 2}}"#).unwrap();
        assert_eq!(faults.take_refusal().unwrap().status, 503);
        assert_eq!(faults.take_refusal().unwrap().status, 503);
        assert_eq!(faults.take_refusal(), None);

        let mut faults: FaultSet = serde_json::from_str(r#"{"refuse": {"status": 418}}"#).unwrap();
        assert!((0..5).all(|_| faults.take_refusal().is_some()));
    }

    #[test]
    fn retry_after_may_be_a_number_or_any_text() {
        for (json, expected) in [("5", Some("5")), (r#""-1""#, Some("-1")), ("null", None)] {
            let text = format!(r#"{{"status": 503, "retry_after": {json}}}"#);
            let refuse: Refuse = serde_json::from_str(&text).unwrap();
            assert_eq!(refuse.retry_after.as_deref(), expected);
        }
    }

    #[test]
    fn channel_fault_is_a_word() {
        let channel = |text| serde_json::from_str::<FaultSet>(text).unwrap().channel;
        assert_eq!(channel("{}"), ChannelFault::None);
        assert_eq!(channel(r#"{"channel": "silent"}"#), ChannelFault::Silent);
        assert_eq!(channel(r#"{"channel": "crash"}"#), ChannelFault::Crash);
    }

    #[test]
    fn join_fault_is_a_word_or_a_reason() {
        let join = |text| serde_json::from_str::<FaultSet>(text).unwrap().join;
        assert_eq!(join("{}"), JoinFault::None);
        assert_eq!(join(r#"{"join": "ignore"}"#), JoinFault::Ignore);
        assert_eq!(
            join(r#"{"join": {"refuse": "disabled"}}"#),
            JoinFault::Refuse("disabled".to_owned())
        );
        assert!(serde_json::from_str::<FaultSet>(r#"{"refues": 1}"#).is_err());
    }
}
