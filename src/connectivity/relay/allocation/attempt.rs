//! Beginning and end of allocation attempts.

use std::time::{Duration, Instant};

use rand::Rng;
use tracing::{debug, warn};

use super::super::RelayError;
use super::super::constants::{
    BAD_CREDENTIALS_FIRST, FULL_FIRST, MIN_REFRESH_INTERVAL, PROBE_FIRST, PROBE_MAX, REFUSED_FIRST,
    REFUSED_MAX,
};
use super::super::stun::Families;
use super::{Allocation, AllocationEvent, Purpose, State};

impl Allocation {
    /// The server no longer knows the allocation: ask for another one at once.
    pub(super) fn reallocate(&mut self, now: Instant) {
        let again = self
            .last_reallocation
            .replace(now)
            .is_some_and(|at| now.saturating_duration_since(at) < MIN_REFRESH_INTERVAL);
        if again {
            // It forgets as fast as it allocates; going on would be a loop as fast as the network.
            return self.fail(now, RelayError::Forgotten);
        }
        warn!(relay.id = %self.id, "Relay has forgotten our allocation, allocating again");
        self.forget_allocation(now);
        self.note_error(now, RelayError::Forgotten);
        self.mismatches = 0;
        self.start_span(now);
        if let (Some(span), Some(active)) = (&self.span, self.active) {
            span.record("server.address", active.ip().to_string());
            span.record("server.port", i64::from(active.port()));
        }
        self.start_allocate(now);
    }

    /// Drops allocation, channels and requests; the channels' peers wait for the next allocation.
    pub(super) fn forget_allocation(&mut self, now: Instant) {
        self.transactions.clear();
        for peer in self.channels.clear(now) {
            self.queue(peer);
        }
        if let State::Allocated(allocated) =
            std::mem::replace(&mut self.state, State::Waiting { retry_at: None })
        {
            let relayed = allocated.relayed;
            self.events
                .push_back(AllocationEvent::Invalidated { relayed });
        }
    }

    /// The present attempt or allocation has failed.
    pub(super) fn fail(&mut self, now: Instant, cause: RelayError) {
        if matches!(self.state, State::Released) {
            self.transactions.clear();
            return;
        }
        let was_hopeful = self.is_hopeful();
        self.end_span(Some(cause));
        self.forget_allocation(now);
        if !matches!(cause, RelayError::NoResponse | RelayError::Expired) {
            self.queued.clear();
        }
        self.active = None;
        self.challenge = None;
        let same = self.failures > 0 && self.last_error == Some(cause);
        self.same_cause = if same { self.same_cause + 1 } else { 0 };
        self.failures = self.failures.saturating_add(1);
        self.note_error(now, cause);
        let delay = self.retry_delay(cause);
        self.state = State::Waiting {
            retry_at: delay.map(|d| now + d),
        };
        if was_hopeful {
            self.since = now;
            warn!(relay.id = %self.id, error = %cause, error.type = cause.error_type(), retry_in = ?delay, "Relay not usable");
            self.events.push_back(AllocationEvent::Lost { cause });
        } else {
            debug!(relay.id = %self.id, error = %cause, retry_in = ?delay, "Relay still not usable");
        }
    }

    pub(super) fn retry_delay(&mut self, cause: RelayError) -> Option<Duration> {
        let (first, max) = match cause {
            RelayError::NoAddress => return None,
            RelayError::NoResponse | RelayError::Expired => (PROBE_FIRST, PROBE_MAX),
            RelayError::BadCredentials => (BAD_CREDENTIALS_FIRST, REFUSED_MAX),
            RelayError::QuotaReached | RelayError::InsufficientCapacity => {
                (FULL_FIRST, REFUSED_MAX)
            }
            // By then every family was asked for (RFC 8656 §7.4: not to be repeated).
            RelayError::Unsupported(440) => (REFUSED_MAX, REFUSED_MAX),
            _ => (REFUSED_FIRST, REFUSED_MAX),
        };
        let full = first.saturating_mul(1 << self.same_cause.min(16)).min(max);
        // Many gateways lose a relay at the same moment; they should not all come back at once.
        Some(full.mul_f64(self.rng.random_range(0.75..=1.0)))
    }

    pub(super) fn start_attempt(&mut self, now: Instant) {
        self.transactions.clear();
        self.active = None;
        self.challenge = None;
        self.mismatches = 0;
        self.start_span(now);
        if self.servers.is_empty() {
            self.state = State::Probing;
            return self.fail(now, RelayError::NoAddress);
        }
        self.state = State::Probing;
        for server in self.servers.clone() {
            self.send(now, Purpose::Binding, server, 0);
        }
    }

    pub(super) fn start_allocate(&mut self, now: Instant) {
        if !matches!(self.state, State::Allocating) {
            self.state = State::Allocating;
            if self.failures == 0 {
                self.since = now;
            }
        }
        self.send_to_active(now, Purpose::Allocate(Families::Both));
    }

    pub(super) fn start_span(&mut self, now: Instant) {
        self.attempt_since = Some(now);
        self.span = Some(tracing::info_span!(
            parent: None,
            "relay.allocate",
            otel.kind = "client",
            otel.status_code = tracing::field::Empty,
            relay.id = %self.id,
            server.address = tracing::field::Empty,
            server.port = tracing::field::Empty,
            stun.error_code = tracing::field::Empty,
            error.type = tracing::field::Empty,
        ));
    }

    pub(super) fn end_span(&mut self, error: Option<RelayError>) {
        let Some(span) = self.span.take() else {
            return;
        };
        if let Some(error) = error {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", error.error_type());
            if let Some(code) = error.stun_error_code() {
                span.record("stun.error_code", i64::from(code));
            }
            if self.active.is_none()
                && let Some(server) = self.servers.first()
            {
                span.record("server.address", server.ip().to_string());
                span.record("server.port", i64::from(server.port()));
            }
        }
    }
}
