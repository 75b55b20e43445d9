//! The channel as an operator sees it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::{Channel, Phase};
use crate::admin::model::{BackoffStatus, PortalError, PortalState, PortalStatus};

impl Channel {
    /// The status document's view. `wall` is the wall clock at `now`; it dates everything, so that
    /// a clock that was set in between does not put events out of order.
    pub fn status(&self, now: Instant, wall: SystemTime) -> PortalStatus {
        let wall = match wall.duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_secs_f64(),
            Err(before) => -before.duration().as_secs_f64(),
        };
        let date = |at: Instant| {
            if at > now {
                wall + (at - now).as_secs_f64()
            } else {
                wall - (now - at).as_secs_f64()
            }
        };
        PortalStatus {
            outages: Vec::new(),
            recent_attempts: Vec::new(),
            clock_ahead: None,
            url: self.url().to_owned(),
            state: self.current_state(),
            since: date(self.state_since.unwrap_or(now)),
            initialized: self.initialized,
            last_message_at: self.last_message_at.map(date),
            backoff: self.reconnect.outage().map(|outage| BackoffStatus {
                outage_since: date(outage.since()),
                cause: outage.cause().as_str().to_owned(),
                attempt: outage.failures(),
                next_attempt_at: match self.phase {
                    Phase::Waiting { until, .. } => Some(date(until)),
                    _ => None,
                },
                budget_left: outage.budget_left(now).map(|left| left.as_secs_f64()),
            }),
            last_error: self.last_error.as_ref().map(|(failure, at)| PortalError {
                kind: failure.kind.as_str().to_owned(),
                message: failure.message.clone(),
                at: date(*at),
            }),
            joins: self.counters.joins,
            attempts: self.counters.attempts,
        }
    }

    /// Stays `Blocked` during re-checks: nothing is better until one succeeds.
    fn current_state(&self) -> PortalState {
        match &self.phase {
            Phase::Idle => PortalState::Idle,
            Phase::GaveUp => PortalState::GaveUp,
            Phase::Closed => PortalState::Closed,
            _ if self.blocked.is_some() => PortalState::Blocked,
            Phase::Dialling { .. } => PortalState::Connecting,
            Phase::Waiting { .. } => PortalState::Waiting,
            Phase::Open(session) if session.joined_since().is_some() => PortalState::Joined,
            Phase::Open(_) => PortalState::Joining,
        }
    }

    pub(super) fn track_state(&mut self, now: Instant) {
        let state = self.current_state();
        if state != self.state || self.state_since.is_none() {
            self.state = state;
            self.state_since = Some(now);
        }
    }
}
