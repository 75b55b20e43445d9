//! One socket: references, join, heartbeats, and what the portal owes us.

use std::collections::VecDeque;
use std::time::Instant;

use super::expected::{Answer, Expected, Habits};
use super::{Action, HEARTBEAT_INTERVAL, JOIN_TIMEOUT, PROBE_TIMEOUT, STABLE_AFTER, Timer};
use crate::portal::login::Protocol;
use crate::portal::messages::{Egress, Ingress};
use crate::portal::wire;

/// So many messages whose arrival is not proved are kept; beyond, the oldest count as arrived.
/// Those of one client cancel each other out before they are sent again.
const MAX_UNCONFIRMED: usize = 4096;

#[derive(Debug)]
enum Join {
    Pending { reference: u64, deadline: Instant },
    Done { since: Instant, stable: bool },
}

#[derive(Debug)]
pub(super) struct Session {
    protocol: Protocol,
    next_reference: u64,
    join: Join,
    /// The join was repeated on this socket and has not been stable since.
    rejoined: bool,
    heartbeat_at: Instant,
    /// A heartbeat that was handed out and has not left yet.
    queued_heartbeat: Option<u64>,
    unanswered_heartbeats: Vec<u64>,
    probe: Option<(u64, Instant)>,
    held: Vec<Ingress>,
    expected: Expected,
    /// Messages that must survive the session, until something proves that they arrived.
    unconfirmed: VecDeque<(u64, Egress)>,
    /// The portal's socket received everything up to this reference.
    received: Option<u64>,
}

impl Session {
    /// References start at 0 on every socket (portal-channel spec §1.6), and the join is first.
    pub(super) fn open(now: Instant, protocol: Protocol) -> (Self, Action) {
        let mut session = Self {
            protocol,
            next_reference: 0,
            join: Join::Done {
                since: now,
                stable: false,
            },
            rejoined: false,
            heartbeat_at: now + HEARTBEAT_INTERVAL,
            queued_heartbeat: None,
            unanswered_heartbeats: Vec::new(),
            probe: None,
            held: Vec::new(),
            expected: Expected::default(),
            unconfirmed: VecDeque::new(),
            received: None,
        };
        let join = session.send_join(now);
        (session, join)
    }

    pub(super) fn next_timer(&self) -> Option<(Instant, Timer)> {
        let join = match self.join {
            Join::Pending { deadline, .. } => Some((deadline, Timer::JoinTimeout)),
            Join::Done {
                since,
                stable: false,
            } if !self.expected.is_open(Answer::Init) => {
                Some((since + STABLE_AFTER, Timer::StableSession))
            }
            Join::Done { .. } => None,
        };
        [
            Some((self.heartbeat_at, Timer::Heartbeat)),
            join,
            self.expected.deadline().map(|(at, _)| (at, Timer::Answer)),
            self.probe.map(|(_, deadline)| (deadline, Timer::Probe)),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }

    pub(super) fn joined_since(&self) -> Option<Instant> {
        match self.join {
            Join::Done { since, .. } => Some(since),
            Join::Pending { .. } => None,
        }
    }

    pub(super) fn joins_with(&self, reference: u64) -> bool {
        matches!(self.join, Join::Pending { reference: join, .. } if join == reference)
    }

    /// Returns the messages that overtook the join reply.
    pub(super) fn set_joined(&mut self, now: Instant) -> Vec<Ingress> {
        self.join = Join::Done {
            since: now,
            stable: false,
        };
        let held = std::mem::take(&mut self.held);
        if !held.iter().any(|m| matches!(m, Ingress::Init(_))) {
            self.expected.open(now, Answer::Init, None, true);
        }
        held
    }

    /// Returns when the join that is stable now happened.
    pub(super) fn set_stable(&mut self) -> Option<Instant> {
        self.rejoined = false;
        match &mut self.join {
            Join::Done { since, stable } => {
                *stable = true;
                Some(*since)
            }
            Join::Pending { .. } => None,
        }
    }

    /// `None` if that was tried already and did not last.
    pub(super) fn rejoin(&mut self, now: Instant) -> Option<Action> {
        if std::mem::replace(&mut self.rejoined, true) {
            return None;
        }
        // Whatever the old channel owed, the new one knows nothing of.
        self.expected = Expected::default();
        Some(self.send_join(now))
    }

    /// Gives the message back if it can be delivered; keeps it while the join is pending.
    pub(super) fn hold(&mut self, message: Ingress, max: usize) -> Option<Ingress> {
        match self.join {
            Join::Done { .. } => Some(message),
            Join::Pending { .. } => {
                if self.held.len() < max {
                    self.held.push(message);
                }
                None
            }
        }
    }

    pub(super) fn message(&mut self, now: Instant, message: &Egress, habits: &Habits) -> Action {
        let reference = self.reference();
        if let Some(answer) = Answer::to(message) {
            let counted_on = habits.gives(answer);
            self.expected.open(now, answer, Some(reference), counted_on);
        }
        if message.survives_reconnect() {
            if self.unconfirmed.len() == MAX_UNCONFIRMED {
                self.unconfirmed.pop_front();
            }
            self.unconfirmed.push_back((reference, message.clone()));
        }
        Action::SendText {
            text: wire::encode(message, reference, self.protocol),
            reference,
        }
    }

    pub(super) fn expected(&mut self) -> &mut Expected {
        &mut self.expected
    }

    /// The portal's channel process answered `reference`. Order is kept all the way, so it has
    /// seen everything before as well.
    pub(super) fn confirmed(&mut self, reference: u64) {
        while self
            .unconfirmed
            .front()
            .is_some_and(|(sent, _)| *sent <= reference)
        {
            self.unconfirmed.pop_front();
        }
    }

    /// The channel process is alive: what its socket had received before, it has seen by now.
    pub(super) fn channel_is_alive(&mut self) {
        if let Some(reference) = self.received {
            self.confirmed(reference);
        }
    }

    /// What must survive and may not have arrived, oldest first.
    pub(super) fn take_unconfirmed(&mut self) -> Vec<Egress> {
        self.unconfirmed.drain(..).map(|(_, m)| m).collect()
    }

    pub(super) fn heartbeat_due(&mut self, now: Instant) -> Option<Action> {
        let next = self.heartbeat_at + HEARTBEAT_INTERVAL;
        // After a suspended host one heartbeat is enough.
        self.heartbeat_at = if next > now {
            next
        } else {
            now + HEARTBEAT_INTERVAL
        };
        if self.queued_heartbeat.is_some() {
            return None;
        }
        let reference = self.reference();
        self.queued_heartbeat = Some(reference);
        Some(heartbeat(reference))
    }

    /// Returns how many heartbeats are unanswered now.
    pub(super) fn written(&mut self, reference: u64) -> usize {
        if self.queued_heartbeat == Some(reference) {
            self.queued_heartbeat = None;
            self.unanswered_heartbeats.push(reference);
            return self.unanswered_heartbeats.len();
        }
        0
    }

    /// One may be on its way.
    pub(super) fn heartbeats_are_answered(&self) -> bool {
        self.unanswered_heartbeats.len() <= 1
    }

    pub(super) fn heartbeat_answered(&mut self, reference: u64) {
        // The socket answers heartbeats by itself; it has passed on what came before, no more.
        if reference < self.next_reference {
            self.received = self.received.max(Some(reference));
        }
        self.unanswered_heartbeats.retain(|r| *r != reference);
        self.queued_heartbeat.take_if(|r| *r == reference);
        self.probe.take_if(|(r, _)| *r == reference);
    }

    /// Asks for a sign of life; `None` while joining, which has a limit of its own.
    pub(super) fn probe(&mut self, now: Instant) -> Option<Action> {
        self.joined_since()?;
        if self.probe.is_some() {
            // The running probe already decides; more changes must not postpone it.
            return None;
        }
        let reference = self.reference();
        self.probe = Some((reference, now + PROBE_TIMEOUT));
        Some(heartbeat(reference))
    }

    fn send_join(&mut self, now: Instant) -> Action {
        let reference = self.reference();
        self.join = Join::Pending {
            reference,
            deadline: now + JOIN_TIMEOUT,
        };
        Action::SendText {
            text: wire::encode_join(reference),
            reference,
        }
    }

    fn reference(&mut self) -> u64 {
        let reference = self.next_reference;
        self.next_reference += 1;
        reference
    }
}

fn heartbeat(reference: u64) -> Action {
    Action::SendText {
        text: wire::encode_heartbeat(reference),
        reference,
    }
}
