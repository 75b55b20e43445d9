//! What the relay's answers mean, and what its silence does (data-path spec §3.1 to §3.3).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::super::RelayError;
use super::super::constants::{
    DEFAULT_LIFETIME, KEEP_ALIVE, MAX_CHALLENGES, MAX_LIFETIME, MAX_MISMATCHES,
    MIN_REFRESH_INTERVAL, REFRESH_RETRY,
};
use super::super::stun::{Challenge, Families, Incoming};
use super::super::transactions::Transaction;
use super::{Allocated, Allocation, AllocationEvent, Mapping, Purpose, State, family_index};

impl Allocation {
    pub(super) fn sample_rtt(&mut self, sample: Duration) {
        self.rtt = Some(match self.rtt {
            Some(rtt) => rtt * 7 / 8 + sample / 8,
            None => sample,
        });
    }

    pub(super) fn on_binding(
        &mut self,
        now: Instant,
        local: SocketAddr,
        from: SocketAddr,
        mapped: Option<SocketAddr>,
    ) {
        let mapping = Mapping { local, mapped };
        let previous = self.learn_mapping(from, mapping);
        match &mut self.state {
            State::Probing => {
                self.active = Some(from);
                if let Some(span) = &self.span {
                    span.record("server.address", from.ip().to_string());
                    span.record("server.port", i64::from(from.port()));
                }
                self.start_allocate(now);
            }
            // The server knows the allocation by our 5-tuple; if that changed, it has lost us.
            State::Allocated(allocated)
                if previous.is_some_and(|p| p != mapping)
                    && self.active == Some(from)
                    && allocated.refresh_at.is_some() =>
            {
                allocated.refresh_at = Some(now);
                self.refresh_if_due(now);
            }
            _ => {}
        }
    }

    /// Takes what the relay says about our address; answers what was known before.
    pub(super) fn learn_mapping(&mut self, from: SocketAddr, mapping: Mapping) -> Option<Mapping> {
        let previous = self.mappings[family_index(from)].replace(mapping);
        if previous != Some(mapping) {
            let Mapping { local, mapped } = mapping;
            self.events
                .push_back(AllocationEvent::Mapped { local, mapped });
        }
        previous
    }

    pub(super) fn on_success(&mut self, now: Instant, purpose: Purpose, message: &Incoming) {
        match purpose {
            Purpose::Allocate(_) => {
                let relayed: Vec<_> = message
                    .relayed()
                    .into_iter()
                    .filter(|addr| addr.port() != 0 && !addr.ip().is_unspecified())
                    .collect();
                if relayed.is_empty() {
                    // What is of no use is deleted (RFC 8656 §7.3).
                    self.send_to_active(now, Purpose::Discard);
                } else {
                    self.allocated(now, relayed, message.lifetime());
                }
            }
            Purpose::Refresh => {
                if message.lifetime().is_some_and(|l| l.is_zero()) {
                    self.reallocate(now);
                } else if let State::Allocated(allocated) = &mut self.state {
                    let (refresh_after, lifetime) = refresh_times(message.lifetime());
                    allocated.refresh_at = Some(now + refresh_after);
                    allocated.expires_at = now + lifetime;
                    self.last_error = None;
                }
            }
            Purpose::Clear => self.start_allocate(now),
            Purpose::Discard => self.fail(now, RelayError::Protocol),
            Purpose::ChannelBind { channel, .. } => self.channels.confirmed(now, channel),
            Purpose::Release | Purpose::Binding => {}
        }
    }

    pub(super) fn allocated(
        &mut self,
        now: Instant,
        relayed: Vec<SocketAddr>,
        lifetime: Option<Duration>,
    ) {
        let (refresh_after, lifetime) = refresh_times(lifetime);
        self.state = State::Allocated(Allocated {
            since: now,
            relayed: relayed.clone(),
            refresh_at: Some(now + refresh_after),
            expires_at: now + lifetime,
            keep_alive_at: now + KEEP_ALIVE,
        });
        self.since = now;
        self.failures = 0;
        self.same_cause = 0;
        self.last_error = None;
        self.end_span(None);
        let since = self.attempt_since.take().unwrap_or(now);
        self.attempt_took = now.saturating_duration_since(since);
        info!(
            relay.id = %self.id,
            relay.address = ?self.active,
            ?relayed,
            lifetime = lifetime.as_secs(),
            "Relay allocated"
        );
        self.events
            .push_back(AllocationEvent::Allocated { relayed });
        for peer in std::mem::take(&mut self.queued) {
            self.bind_channel(now, peer);
        }
    }

    pub(super) fn on_challenge(
        &mut self,
        now: Instant,
        transaction: &Transaction<Purpose>,
        code: u16,
        message: &Incoming,
    ) {
        let purpose = transaction.purpose;
        let used = transaction.realm.as_ref();
        let known = self.challenge.as_ref().map(|c| &c.realm);
        let realm = message.realm().or(used).or(known).cloned();
        // A signed request that is answered 401 was signed with the wrong key, unless the key was
        // made with another realm (RFC 8489 §9.2.5). What counts is the request's own: the answer to
        // another one may have brought a new realm meanwhile.
        let refused = code == 401 && transaction.is_signed() && realm.as_ref() == used;
        if refused || self.credentials.is_none() {
            return self.fail(now, RelayError::BadCredentials);
        }
        if transaction.challenged >= MAX_CHALLENGES {
            return self.fail(now, RelayError::StaleNonce);
        }
        let Some((realm, nonce)) = realm.zip(message.nonce().cloned()) else {
            return self.fail(now, RelayError::Protocol);
        };
        self.challenge = Some(Challenge { realm, nonce });
        self.send(now, purpose, transaction.dst, transaction.challenged + 1);
    }

    pub(super) fn on_error(&mut self, now: Instant, purpose: Purpose, code: u16) {
        match (purpose, code) {
            (Purpose::Allocate(_), 437) if self.mismatches < MAX_MISMATCHES => {
                self.mismatches += 1;
                self.send_to_active(now, Purpose::Clear);
            }
            (Purpose::Clear, 437) => self.start_allocate(now),
            (Purpose::Discard, _) => self.fail(now, RelayError::Protocol),
            // 400, because that is what a server says that chokes on an attribute.
            (Purpose::Allocate(Families::Both), 400 | 420 | 440 | 442) => {
                self.send_to_active(now, Purpose::Allocate(Families::Default));
            }
            (Purpose::Allocate(Families::Default), 440) => {
                self.send_to_active(now, Purpose::Allocate(Families::V6));
            }
            (Purpose::Refresh | Purpose::ChannelBind { .. }, 437) => self.reallocate(now),
            (Purpose::Allocate(_) | Purpose::Clear, _) | (Purpose::Refresh, 441) => {
                self.fail(now, RelayError::from_code(code));
            }
            (Purpose::Refresh, _) => {
                warn!(relay.id = %self.id, stun.error_code = code, "Relay refuses to refresh the allocation");
                self.note_error(now, RelayError::from_code(code));
                self.retry_refresh(now);
            }
            (Purpose::ChannelBind { channel, peer }, _) => {
                debug!(relay.id = %self.id, %peer, stun.error_code = code, "Relay refuses a channel");
                self.channels.failed(now, channel);
            }
            (Purpose::Release | Purpose::Binding, _) => {}
        }
    }

    /// The answer is the relay's, but what it says is not understood.
    pub(super) fn on_nonsense(&mut self, now: Instant, purpose: Purpose, is_success: bool) {
        match purpose {
            // Whatever it is that the relay made.
            Purpose::Allocate(_) if is_success => self.send_to_active(now, Purpose::Discard),
            Purpose::Allocate(_) | Purpose::Clear | Purpose::Discard => {
                self.fail(now, RelayError::Protocol);
            }
            Purpose::Refresh => {
                self.note_error(now, RelayError::Protocol);
                self.retry_refresh(now);
            }
            Purpose::ChannelBind { channel, .. } => self.channels.failed(now, channel),
            Purpose::Release | Purpose::Binding => {}
        }
    }

    pub(super) fn retry_refresh(&mut self, now: Instant) {
        if let State::Allocated(allocated) = &mut self.state {
            allocated.refresh_at = Some(now + REFRESH_RETRY);
        }
    }

    pub(super) fn on_silence(&mut self, now: Instant, transaction: &Transaction<Purpose>) {
        // A lost request is not a lost relay.
        let alive = self
            .last_heard
            .is_some_and(|at| at > transaction.first_sent);
        // All answers were wrongly signed, or not at all (RFC 8489 §9.2.5).
        let cause = transaction.distrusted.unwrap_or(RelayError::NoResponse);
        match transaction.purpose {
            Purpose::Release => {}
            Purpose::Discard => self.fail(now, RelayError::Protocol),
            Purpose::Binding => {
                let probing = matches!(self.state, State::Probing);
                let others = self
                    .transactions
                    .iter()
                    .any(|t| t.purpose == Purpose::Binding);
                let silent_allocation =
                    self.is_allocated() && self.active == Some(transaction.dst) && !alive;
                if (probing && !others) || silent_allocation {
                    self.fail(now, RelayError::NoResponse);
                }
            }
            Purpose::Refresh if alive => self.retry_refresh(now),
            Purpose::ChannelBind { channel, .. } if alive => self.channels.unanswered(now, channel),
            Purpose::Allocate(_)
            | Purpose::Clear
            | Purpose::Refresh
            | Purpose::ChannelBind { .. } => self.fail(now, cause),
        }
    }
}

/// After how long to refresh, and after how long the allocation is gone (RFC 8656 §8).
fn refresh_times(lifetime: Option<Duration>) -> (Duration, Duration) {
    let lifetime = lifetime.unwrap_or(DEFAULT_LIFETIME).min(MAX_LIFETIME);
    ((lifetime / 2).max(MIN_REFRESH_INTERVAL), lifetime)
}
