//! The vocabulary between the channel and its owner.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::printable;
use crate::portal::error::{ErrorType, Failure};
use crate::portal::login::Protocol;
use crate::portal::messages::{Egress, Ingress};
use crate::portal::reconnect::DelayReason;

/// What the channel needs to know.
#[derive(Debug, Clone, Default)]
pub struct ChannelConfig {
    /// URL without query of each version of the channel, for the status.
    pub url_v1: String,
    /// See [`Self::url_v1`].
    pub url_v2: String,
    /// Budget of one outage; `None` tries for ever.
    pub max_partition_time: Option<Duration>,
    /// End with [`Event::GaveUp`] where the channel would be blocked.
    pub exit_on_auth_failure: bool,
}

/// To be done by the owner, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start an attempt; answer with [`super::Channel::socket_opened`] or [`super::Channel::attempt_failed`].
    Dial(Attempt),
    /// Write a text message; report with [`super::Channel::written`] once it left.
    SendText {
        /// The message.
        text: String,
        /// Its reference.
        reference: u64,
    },
    /// Drop the attempt or socket.
    Disconnect,
    /// Send a Close frame and drop the socket.
    Close {
        /// Close code.
        code: u16,
    },
}

/// One attempt to connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// Number since start, from 1.
    pub number: u64,
    /// Number within this outage, from 1.
    pub of_outage: u32,
    /// How long was waited before it.
    pub delay: Duration,
    /// Age of the outage; zero without one.
    pub outage_elapsed: Duration,
    /// Which version of the channel to ask for.
    pub protocol: Protocol,
    /// What it follows.
    pub cause: AttemptCause,
}

/// What an attempt follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptCause {
    /// The start of the channel.
    Start,
    /// A failure, and the delay that this owes.
    Failure(DelayReason),
    /// The portal does not know the other version of the channel.
    OtherProtocol,
    /// Another token.
    TokenChange,
    /// Another network.
    NetworkChange,
    /// Somebody asked for it.
    Request,
    /// A withdrawn token is tried once more.
    Confirmation,
    /// A refused token is checked again.
    Recheck,
}

impl AttemptCause {
    /// The value as it appears in `portal.cause`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Failure(DelayReason::Backoff) => "backoff",
            Self::Failure(DelayReason::RetryAfter) => "retry_after",
            Self::Failure(DelayReason::Spread) => "spread",
            Self::OtherProtocol => "other_protocol",
            Self::TokenChange => "token_change",
            Self::NetworkChange => "network_change",
            Self::Request => "request",
            Self::Confirmation => "token_confirmation",
            Self::Recheck => "token_recheck",
        }
    }
}

/// What the rest of the gateway needs to hear.
#[derive(Debug)]
pub enum Event {
    /// Joined: messages can be sent until [`Event::Disconnected`].
    Connected,
    /// No longer joined; access that was granted stays.
    Disconnected {
        /// Why.
        failure: Failure,
        /// Messages that must survive (see [`Egress::survives_reconnect`]) and of which nothing
        /// says that they arrived; oldest first. Some of them may have.
        undelivered: Vec<Egress>,
    },
    /// A message of the portal.
    Message(Ingress),
    /// The portal refuses the token: nobody is authorized any more. It is checked again rarely.
    Blocked {
        /// The refusal.
        failure: Failure,
    },
    /// The refusal is over: the portal accepted the token, or there is another token to try.
    Unblocked,
    /// The end, no further attempt is made.
    GaveUp {
        /// The last failure.
        failure: Failure,
        /// Why that ends it.
        reason: GaveUpReason,
    },
}

/// Why no further attempt is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GaveUpReason {
    /// The outage lasted longer than its budget.
    BudgetExhausted,
    /// The token is refused, and configuration says that this ends the process.
    AuthRefused,
}

/// Steps that telemetry records; nothing depends on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Milestone {
    /// The socket is open, the join is on its way.
    JoinStarted,
    /// The attempt ended in a join.
    AttemptSucceeded,
    /// Something failed that counts in the outage: an attempt, or a session.
    Failed(Failure),
    /// The attempt failed.
    AttemptFailed(Failure),
    /// The attempt was cut short by us.
    AttemptAbandoned,
    /// An outage is over.
    OutageEnded(EndedOutage),
}

/// An outage that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndedOutage {
    /// First error.
    pub since: Instant,
    /// The join that proved stable, or the moment of giving up.
    pub until: Instant,
    /// What the first error was.
    pub cause: ErrorType,
    /// What the last error was.
    pub last_cause: ErrorType,
    /// Errors in it.
    pub failures: u32,
    /// How it ended.
    pub outcome: Outcome,
}

/// How an outage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// In a join that proved stable.
    Joined,
    /// Its budget ran out, or a refused token was to end the process.
    GaveUp,
    /// The channel was closed on purpose.
    Abandoned,
}

impl Outcome {
    /// The value as it appears in `portal.outage.outcome`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Joined => "joined",
            Self::GaveUp => "gave_up",
            Self::Abandoned => "abandoned",
        }
    }
}

/// Why the socket is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseCause {
    /// The server sent a Close frame.
    Frame {
        /// Close code; `None` if the frame was empty.
        code: Option<u16>,
        /// Reason given.
        reason: String,
    },
    /// The stream ended without a Close frame.
    Eof,
    /// Reading or writing failed.
    Io(String),
    /// What arrived is not WebSocket.
    Protocol(String),
    /// A message could not be written in time.
    WriteStalled,
}

impl From<CloseCause> for Failure {
    fn from(cause: CloseCause) -> Self {
        match cause {
            CloseCause::Frame { code, reason } => {
                let mut message = "the portal closed the connection".to_owned();
                if let Some(code) = code {
                    message.push_str(&format!(" with code {code}"));
                }
                if !reason.is_empty() {
                    message.push_str(&format!(": {}", printable(&reason)));
                }
                Failure {
                    close_code: code,
                    ..Failure::new(ErrorType::ServerClose, message)
                }
            }
            CloseCause::Eof => Failure::new(
                ErrorType::ServerClose,
                "the connection ended without a Close frame",
            ),
            CloseCause::Io(e) => Failure::new(ErrorType::Io, format!("connection lost: {e}")),
            CloseCause::Protocol(e) => Failure::new(ErrorType::Protocol, e),
            CloseCause::WriteStalled => Failure::new(
                ErrorType::Io,
                "the connection takes no data any more; it is considered dead",
            ),
        }
    }
}

/// The channel is not joined; here is the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the portal channel is not joined")]
pub struct NotJoined(pub Egress);

/// Which deadline [`super::Channel::poll_timeout`] speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// Start the next attempt.
    Retry,
    /// Check a refused token again.
    Recheck,
    /// The attempt takes too long.
    Attempt,
    /// The join takes too long.
    JoinTimeout,
    /// The portal owes us an answer.
    Answer,
    /// Send a heartbeat.
    Heartbeat,
    /// The socket did not prove that it survived a network change.
    Probe,
    /// The join has been stable for long enough.
    StableSession,
}

/// What went by, for metrics. Only ever grows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Attempts started.
    pub attempts: u64,
    /// Join replies.
    pub joins: u64,
    /// Events that we do not know.
    pub unknown_events: u64,
    /// Messages that were refused because of their payload.
    pub refused_messages: u64,
    /// List entries that were left out.
    pub skipped_items: u64,
    /// Text messages that are no frames.
    pub undecodable_frames: u64,
    /// Failures by kind.
    pub failures: BTreeMap<ErrorType, u64>,
}
