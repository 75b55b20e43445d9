//! What the portal says, and what follows from it.

use std::time::Instant;

use super::expected::Answer;
use super::{Channel, Event, Hangup, MAX_HELD, Milestone, Phase, printable};
use crate::portal::error::{ErrorType, Failure};
use crate::portal::messages::{Egress, Ingress};
use crate::portal::wire::{self, Inbound, Reply, WireError};

impl Channel {
    pub(super) fn inbound(&mut self, now: Instant, inbound: Inbound) {
        match inbound {
            Inbound::Reply(reply) => self.reply(now, reply),
            Inbound::Message { message, skipped } => {
                self.last_message_at = Some(now);
                self.counters.skipped_items += skipped as u64;
                if skipped > 0 {
                    tracing::warn!(skipped, "left out malformed entries of a portal message");
                }
                self.initialized |= matches!(message, Ingress::Init(_));
                self.note_push(&message);
                match &mut self.phase {
                    Phase::Open(session) => match session.hold(message, MAX_HELD) {
                        Some(message) => self.events.push_back(Event::Message(message)),
                        None => tracing::debug!("portal message before the join reply, held"),
                    },
                    _ => tracing::debug!("portal message without a session"),
                }
            }
            Inbound::ChannelClosed => {
                let failure =
                    Failure::new(ErrorType::ChannelClose, "the portal closed the channel");
                self.fail(now, failure, Hangup::Politely);
            }
            Inbound::ChannelCrashed => {
                let failure = Failure::new(
                    ErrorType::ChannelError,
                    "the channel crashed on the portal's side",
                );
                self.fail(now, failure, Hangup::Politely);
            }
            Inbound::Disconnect { reason } if reason == "token_expired" => {
                let failure = Failure::new(
                    ErrorType::TokenExpired,
                    "the portal says that the token expired",
                );
                self.fail(now, failure, Hangup::Politely);
            }
            Inbound::Disconnect { reason } => {
                tracing::warn!(
                    reason = %printable(&reason),
                    "the portal announces a disconnect"
                );
            }
            Inbound::Unknown { event } => {
                self.counters.unknown_events += 1;
                self.unknown_event(&event);
            }
        }
    }

    /// Some pushes are what we waited for, and all are signs of life.
    fn note_push(&mut self, message: &Ingress) {
        let Phase::Open(session) = &mut self.phase else {
            return;
        };
        session.channel_is_alive();
        let answer = match message {
            Ingress::Init(_) => Answer::Init,
            Ingress::RelaysPresence(_) => Answer::Relays,
            _ => return,
        };
        if session.expected().came(answer) {
            self.habits.note(answer, true);
        }
    }

    /// Warns once per event name: a newer portal may send one with every change.
    fn unknown_event(&mut self, event: &str) {
        const MAX_NAMES: usize = 32;
        let event = printable(event);
        if self.warned_events.len() < MAX_NAMES && !self.warned_events.contains(&event) {
            tracing::warn!(event, "ignoring an unknown portal event");
            self.warned_events.push(event);
        } else {
            tracing::debug!(event, "ignoring an unknown portal event");
        }
    }

    pub(super) fn undecodable(&mut self, now: Instant, error: &WireError) {
        match error {
            WireError::Truncated => {
                self.counters.undecodable_frames += 1;
                let failure = Failure::new(ErrorType::Protocol, "the portal sent truncated JSON");
                self.fail(now, failure, Hangup::Politely);
            }
            WireError::NotAFrame(_) => {
                self.counters.undecodable_frames += 1;
                tracing::warn!(%error, "ignoring an undecodable portal message");
            }
            WireError::Refused { event, problem } => {
                self.counters.refused_messages += 1;
                tracing::warn!(event = %printable(event), problem, "refusing a portal message");
            }
        }
    }

    fn reply(&mut self, now: Instant, reply: Reply) {
        let Phase::Open(session) = &mut self.phase else {
            return;
        };
        let Some(reference) = reply.reference else {
            tracing::debug!("ignoring a portal reply without reference");
            return;
        };
        if reply.topic == wire::HEARTBEAT_TOPIC {
            session.heartbeat_answered(reference);
            return;
        }
        if reply.topic != wire::TOPIC {
            return;
        }
        if reply.result.is_ok() {
            session.confirmed(reference);
        }
        if let Some(answer) = session.expected().replied(reference) {
            self.habits.note(answer, true);
        }
        match reply.result {
            Ok(()) if session.joins_with(reference) => self.joined(now),
            Ok(()) => {}
            Err(reason) if session.joins_with(reference) => self.join_refused(now, &reason),
            Err(reason) if reason == "unmatched topic" && session.joined_since().is_some() => {
                self.rejoin(now);
            }
            Err(reason) => {
                tracing::debug!(reference, reason = %printable(&reason), "portal refused a message");
            }
        }
    }

    fn joined(&mut self, now: Instant) {
        let Phase::Open(session) = &mut self.phase else {
            return;
        };
        let held = session.set_joined(now);
        let capabilities = Egress::SetSnownetCapabilities { iceless: false };
        let capabilities = session.message(now, &capabilities, &self.habits);
        self.counters.joins += 1;
        self.reconnect.freeze(now);
        self.hurry = None;
        if std::mem::take(&mut self.attempt_open) {
            self.milestones.push_back(Milestone::AttemptSucceeded);
        }
        self.unblock();
        tracing::info!(
            attempt = self.counters.attempts,
            failures = self.reconnect.outage().map_or(0, |o| o.failures()),
            "connected to the portal"
        );
        self.actions.push_back(capabilities);
        self.events.push_back(Event::Connected);
        self.events.extend(held.into_iter().map(Event::Message));
    }

    fn join_refused(&mut self, now: Instant, reason: &str) {
        // Phoenix answers so when the join callback raises: trouble of the server, not a verdict.
        let kind = if reason == "join crashed" {
            ErrorType::ChannelError
        } else {
            ErrorType::JoinRefused
        };
        let failure = Failure {
            code: Some(printable(reason)),
            ..Failure::new(
                kind,
                format!("the portal refused the join: {}", printable(reason)),
            )
        };
        self.fail(now, failure, Hangup::Politely);
    }

    /// The portal forgot that we joined (portal-channel spec §1.7). Once per socket that is
    /// repaired in place; a portal that does it again gets a new connection after a delay.
    fn rejoin(&mut self, now: Instant) {
        let Phase::Open(session) = &mut self.phase else {
            return;
        };
        let failure = Failure::new(
            ErrorType::ChannelError,
            "the portal does not know the channel any more",
        );
        match session.rejoin(now) {
            Some(join) => {
                let undelivered = session.take_unconfirmed();
                self.reconnect.thaw(now);
                tracing::warn!("the portal forgot the channel; joining again");
                self.actions.push_back(join);
                *self.counters.failures.entry(failure.kind).or_default() += 1;
                self.last_error = Some((failure.clone(), now));
                self.events.push_back(Event::Disconnected {
                    failure,
                    undelivered,
                });
            }
            None => self.fail(now, failure, Hangup::Politely),
        }
    }
}
