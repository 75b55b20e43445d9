//! The channel as a state machine without sockets, clock or tasks.
//!
//! Feed it with what happened and when; afterwards drain [`Channel::poll_action`],
//! [`Channel::poll_milestone`] and [`Channel::poll_event`], and call
//! [`Channel::handle_timeout`] at the time that [`Channel::poll_timeout`] names. There is at most
//! one attempt or socket at any time; inputs that belong to none are ignored.

mod expected;
mod failure;
mod inbound;
mod session;
mod status;
mod types;

#[cfg(test)]
mod schedules;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

pub use self::expected::ANSWER_TIMEOUT;
use self::expected::Habits;
use self::session::Session;
pub use self::types::{
    Action, Attempt, AttemptCause, ChannelConfig, CloseCause, Counters, EndedOutage, Event,
    GaveUpReason, Milestone, NotJoined, Outcome, Timer,
};
use super::error::{ErrorType, Failure};
use super::login::Protocol;
use super::messages::Egress;
use super::reconnect::{CONFIRM_BOUNDS, Reconnect};
use super::wire;
use crate::admin::model::PortalState;

/// The join must be answered within this (portal-channel spec §1.7).
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between heartbeats, and before the first one (portal-channel spec §1.8).
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// So many heartbeats may be unanswered; one more is a failure (portal-channel spec §1.8).
pub const MAX_UNANSWERED_HEARTBEATS: usize = 3;
/// Only a join that lasted this long ends an outage; a portal that accepts and drops would
/// otherwise be hammered without end (portal-channel spec §3.3).
pub const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Safety net above the limits of the dialler, which are shorter (portal-channel spec §1.5).
pub const ATTEMPT_LIMIT: Duration = Duration::from_secs(20);
/// After a network change the socket must prove within this that it still works.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Network changes come in bursts; attempts they cause keep this distance.
pub const HURRIED_SPACING: Duration = Duration::from_secs(1);
/// Close code of an orderly end (RFC 6455 §7.4.1).
pub const CLOSE_NORMAL: u16 = 1000;
/// So many messages that overtook the join reply are kept.
const MAX_HELD: usize = 256;

#[derive(Debug)]
enum Phase {
    Idle,
    Dialling {
        deadline: Instant,
    },
    Open(Session),
    Waiting {
        until: Instant,
        delay: Duration,
        cause: AttemptCause,
    },
    GaveUp,
    Closed,
}

/// How to end what is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hangup {
    /// It is gone already.
    Gone,
    /// It still works: say goodbye, so that the portal does not take it for alive (409).
    Politely,
    /// It does not answer.
    Abruptly,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Channel {
    config: ChannelConfig,
    reconnect: Reconnect,
    phase: Phase,
    /// The refusal, while the token counts as refused.
    blocked: Option<Failure>,
    /// A token was withdrawn once and not yet proved good or bad.
    suspect: bool,
    /// Why a failure of the attempt under way would say little, if it would: the next one follows
    /// at once.
    hurry: Option<AttemptCause>,
    /// Which version of the channel the next attempt asks for.
    protocol: Protocol,
    /// The other version was tried at once in this outage; from then on they take turns.
    tried_other_protocol: bool,
    habits: Habits,
    /// The attempt's end was not yet reported.
    attempt_open: bool,
    last_dial_at: Option<Instant>,
    counters: Counters,
    actions: VecDeque<Action>,
    events: VecDeque<Event>,
    milestones: VecDeque<Milestone>,
    initialized: bool,
    last_message_at: Option<Instant>,
    last_error: Option<(Failure, Instant)>,
    state: PortalState,
    state_since: Option<Instant>,
    warned_events: Vec<String>,
}

impl Channel {
    /// A channel that does nothing until [`Self::start`]. The seed decides over jitter.
    pub fn new(config: ChannelConfig, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let reconnect = Reconnect::new(
            config.max_partition_time,
            StdRng::seed_from_u64(rng.next_u64()),
        );
        Self {
            config,
            reconnect,
            phase: Phase::Idle,
            blocked: None,
            suspect: false,
            hurry: None,
            protocol: Protocol::default(),
            tried_other_protocol: false,
            habits: Habits::default(),
            attempt_open: false,
            last_dial_at: None,
            counters: Counters::default(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
            milestones: VecDeque::new(),
            initialized: false,
            last_message_at: None,
            last_error: None,
            state: PortalState::Idle,
            state_since: None,
            warned_events: Vec::new(),
        }
    }

    // ---- Outputs ----

    /// What to do next, if anything.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// What to tell the rest of the gateway, if anything.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What to record, if anything. Drain before [`Self::poll_action`]: a new attempt's action
    /// follows the old attempt's end.
    pub fn poll_milestone(&mut self) -> Option<Milestone> {
        self.milestones.pop_front()
    }

    /// When to call [`Self::handle_timeout`], and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, Timer)> {
        match &self.phase {
            Phase::Dialling { deadline } => Some((*deadline, Timer::Attempt)),
            Phase::Waiting { until, .. } if self.blocked.is_some() => {
                Some((*until, Timer::Recheck))
            }
            Phase::Waiting { until, .. } => Some((*until, Timer::Retry)),
            Phase::Open(session) => session.next_timer(),
            Phase::Idle | Phase::GaveUp | Phase::Closed => None,
        }
    }

    /// Whether messages can be sent.
    pub fn is_joined(&self) -> bool {
        matches!(&self.phase, Phase::Open(session) if session.joined_since().is_some())
    }

    /// Counters for metrics.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    // ---- Inputs ----

    /// Starts the first attempt, without delay.
    pub fn start(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Idle | Phase::GaveUp | Phase::Closed) {
            self.blocked = None;
            self.suspect = false;
            tracing::info!(url = %self.url(), "connecting to the portal");
            self.dial(now, Duration::ZERO, AttemptCause::Start);
        }
        self.track_state(now);
    }

    /// The WebSocket upgrade succeeded: joins.
    pub fn socket_opened(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Dialling { .. }) {
            let (session, join) = Session::open(now, self.protocol);
            self.phase = Phase::Open(session);
            self.actions.push_back(join);
            self.milestones.push_back(Milestone::JoinStarted);
        }
        self.track_state(now);
    }

    /// The attempt failed before there was a socket.
    pub fn attempt_failed(&mut self, now: Instant, failure: Failure) {
        if matches!(self.phase, Phase::Dialling { .. }) {
            self.fail(now, failure, Hangup::Gone);
        }
        self.track_state(now);
    }

    /// The socket is gone.
    pub fn closed(&mut self, now: Instant, cause: CloseCause) {
        if matches!(self.phase, Phase::Open(_)) {
            self.fail(now, cause.into(), Hangup::Gone);
        }
        self.track_state(now);
    }

    /// A text message arrived.
    pub fn frame(&mut self, now: Instant, text: &str) {
        if matches!(self.phase, Phase::Open(_)) {
            match wire::decode(text) {
                Ok(inbound) => self.inbound(now, inbound),
                Err(e) => self.undecodable(now, &e),
            }
        }
        self.track_state(now);
    }

    /// A message left for the network. Only from here on does a heartbeat count as sent: what a
    /// stalled socket never took cannot be answered.
    pub fn written(&mut self, now: Instant, reference: u64) {
        if let Phase::Open(session) = &mut self.phase
            && session.written(reference) > MAX_UNANSWERED_HEARTBEATS
        {
            let failure = Failure::new(
                ErrorType::HeartbeatTimeout,
                "the portal does not answer heartbeats",
            );
            self.fail(now, failure, Hangup::Politely);
        }
        self.track_state(now);
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// While not joined; the message comes back. What was accepted and must survive comes back with
    /// [`Event::Disconnected`] unless it is known to have arrived.
    pub fn send(&mut self, now: Instant, message: Egress) -> Result<(), NotJoined> {
        match &mut self.phase {
            Phase::Open(session) if session.joined_since().is_some() => {
                self.actions
                    .push_back(session.message(now, &message, &self.habits));
                Ok(())
            }
            _ => Err(NotJoined(message)),
        }
    }

    /// Another token is configured. A working session stays; anything else starts over at once.
    pub fn token_changed(&mut self, now: Instant) {
        self.suspect = false;
        match &self.phase {
            Phase::Idle | Phase::GaveUp | Phase::Closed => {}
            Phase::Open(session) if session.joined_since().is_some() => {
                tracing::info!("new portal token; it is used from the next connection on");
            }
            Phase::Open(_) | Phase::Dialling { .. } | Phase::Waiting { .. } => {
                tracing::info!("new portal token; connecting with it");
                match self.phase {
                    Phase::Open(_) => self.hang_up(Hangup::Politely),
                    Phase::Dialling { .. } => self.hang_up(Hangup::Abruptly),
                    _ => {}
                }
                if self.attempt_open {
                    self.attempt_open = false;
                    self.milestones.push_back(Milestone::AttemptAbandoned);
                }
                self.unblock();
                self.reconnect.restart_growth();
                self.dial(now, Duration::ZERO, AttemptCause::TokenChange);
            }
        }
        self.track_state(now);
    }

    /// Somebody who knows more than we do asks for it: whatever is being waited for ends, the
    /// check of a refused token included. A joined socket is probed. Access stays closed until the
    /// portal accepts the token.
    pub fn retry_now(&mut self, now: Instant) {
        self.hasten(now, AttemptCause::Request);
    }

    /// Addresses or routes of the host changed. Waiting ends, unless for a better token; a joined
    /// socket is probed rather than dropped, since most changes do not concern it.
    pub fn network_changed(&mut self, now: Instant) {
        self.hasten(now, AttemptCause::NetworkChange);
    }

    /// Ends the channel in order.
    pub fn close(&mut self, now: Instant) {
        match self.phase {
            Phase::Idle | Phase::GaveUp | Phase::Closed => {}
            Phase::Open(_) => self.hang_up(Hangup::Politely),
            Phase::Dialling { .. } => self.hang_up(Hangup::Abruptly),
            Phase::Waiting { .. } => {}
        }
        if self.attempt_open {
            self.attempt_open = false;
            self.milestones.push_back(Milestone::AttemptAbandoned);
        }
        self.end_outage(now, Outcome::Abandoned);
        self.phase = Phase::Closed;
        self.blocked = None;
        self.track_state(now);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, timer)) = self.poll_timeout()
            && at <= now
        {
            self.timer_fired(now, timer);
        }
        self.track_state(now);
    }

    // ---- Inside ----

    fn timer_fired(&mut self, now: Instant, timer: Timer) {
        match (&mut self.phase, timer) {
            (Phase::Waiting { delay, cause, .. }, _) => {
                let (delay, cause) = (*delay, *cause);
                self.dial(now, delay, cause);
            }
            (Phase::Dialling { .. }, _) => {
                let failure = Failure::new(ErrorType::UpgradeTimeout, "the attempt hangs");
                self.fail(now, failure, Hangup::Abruptly);
            }
            (Phase::Open(_), Timer::JoinTimeout) => {
                let failure = Failure::new(
                    ErrorType::JoinTimeout,
                    format!(
                        "the join was not answered within {} s",
                        JOIN_TIMEOUT.as_secs()
                    ),
                );
                self.fail(now, failure, Hangup::Politely);
            }
            (Phase::Open(session), Timer::Heartbeat) => {
                self.actions.extend(session.heartbeat_due(now));
            }
            (Phase::Open(session), Timer::Answer) => {
                let Some((_, answer)) = session.expected().deadline() else {
                    return;
                };
                self.habits.note(answer, false);
                let missing = answer.describe();
                let limit = ANSWER_TIMEOUT.as_secs();
                let failure = if session.heartbeats_are_answered() {
                    Failure::new(
                        ErrorType::StreamSilent,
                        format!(
                            "the portal answers heartbeats, but {missing} did not come within \
                             {limit} s"
                        ),
                    )
                } else {
                    Failure::new(
                        ErrorType::HeartbeatTimeout,
                        format!(
                            "the portal answers neither heartbeats nor did {missing} come within \
                             {limit} s"
                        ),
                    )
                };
                self.fail(now, failure, Hangup::Politely);
            }
            (Phase::Open(_), Timer::Probe) => {
                self.hurry = Some(AttemptCause::NetworkChange);
                let failure = Failure::new(
                    ErrorType::HeartbeatTimeout,
                    "the connection did not answer when it was checked",
                );
                self.fail(now, failure, Hangup::Abruptly);
            }
            (Phase::Open(session), _) => {
                let joined_at = session.set_stable();
                self.suspect = false;
                self.end_outage(joined_at.unwrap_or(now), Outcome::Joined);
            }
            (Phase::Idle | Phase::GaveUp | Phase::Closed, _) => {}
        }
    }

    fn hasten(&mut self, now: Instant, why: AttemptCause) {
        let earliest = self.earliest(now);
        match &mut self.phase {
            Phase::Open(session) if session.joined_since().is_some() => {
                self.actions.extend(session.probe(now));
            }
            Phase::Dialling { .. } | Phase::Open(_) => self.hurry = Some(why),
            Phase::Waiting { .. }
                if self.blocked.is_some() && why == AttemptCause::NetworkChange => {}
            Phase::Waiting {
                until,
                delay,
                cause,
            } => {
                let at = if self.suspect {
                    // A withdrawn token is never tried again without a pause.
                    earliest.max(*until - *delay + CONFIRM_BOUNDS.0)
                } else {
                    earliest
                };
                if at < *until {
                    *delay = delay.saturating_sub(*until - at);
                    *until = at;
                    *cause = why;
                    self.reconnect.restart_growth();
                    tracing::info!(
                        why = why.as_str(),
                        "connecting to the portal without waiting"
                    );
                }
            }
            Phase::Idle | Phase::GaveUp | Phase::Closed => {}
        }
        self.track_state(now);
    }

    fn dial(&mut self, now: Instant, delay: Duration, cause: AttemptCause) {
        if self.blocked.is_none() {
            self.reconnect.thaw(now);
        }
        self.hurry = None;
        self.attempt_open = true;
        self.last_dial_at = Some(now);
        self.counters.attempts += 1;
        let outage = self.reconnect.outage();
        let attempt = Attempt {
            number: self.counters.attempts,
            of_outage: outage.map_or(1, |o| o.failures().saturating_add(1)),
            delay,
            outage_elapsed: outage
                .map_or(Duration::ZERO, |o| now.saturating_duration_since(o.since())),
            protocol: self.protocol,
            cause,
        };
        tracing::debug!(attempt = attempt.number, delay = ?delay, "dialling the portal");
        self.actions.push_back(Action::Dial(attempt));
        self.phase = Phase::Dialling {
            deadline: now + ATTEMPT_LIMIT,
        };
    }

    fn url(&self) -> &str {
        match self.protocol {
            Protocol::V1 => &self.config.url_v1,
            Protocol::V2 => &self.config.url_v2,
        }
    }
}

/// Text of a server for logs: bounded, and on one line.
pub(super) fn printable(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_CHARS)
        .collect()
}
