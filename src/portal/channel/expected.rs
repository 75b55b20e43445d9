//! What the portal owes us. Heartbeats are answered by its socket, everything else by the process
//! behind it; when that one hangs, the socket looks alive for ever and nobody is let in. So the
//! answers that matter have a limit of their own.
//!
//! `init` is owed after every join. The others are only counted on once this portal has been seen
//! to give them, and after one that did not come not before it is seen again: a portal that never
//! answers such a message is not replaced over and over.

use std::time::{Duration, Instant};

use crate::portal::messages::Egress;

/// The portal takes up to 15 s for the slowest of these (portal-channel spec §1.11, §7.7); twice
/// as long is no delay any more.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// More are not followed one by one; the oldest ones decide.
const MAX_OPEN: usize = 64;

/// An answer that the portal gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// `init` after a join.
    Init,
    /// `phx_reply` to the answer to an authorization (portal-channel spec §4.5).
    Authorization,
    /// `relays_presence` after `no_relays` (portal-channel spec §4.7).
    Relays,
}

impl Answer {
    /// The answer to `message`, if there is one.
    pub(super) const fn to(message: &Egress) -> Option<Self> {
        match message {
            Egress::AuthorizationCreated { .. } => Some(Self::Authorization),
            Egress::NoRelays => Some(Self::Relays),
            _ => None,
        }
    }

    /// In words, for an operator.
    pub(super) const fn describe(self) -> &'static str {
        match self {
            Self::Init => "its configuration after the join",
            Self::Authorization => "a reply to the answer to an authorization",
            Self::Relays => "the relays that were asked for",
        }
    }
}

/// Which answers are outstanding on one session.
#[derive(Debug, Default)]
pub(super) struct Expected {
    open: Vec<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    answer: Answer,
    /// Of the message that is to be answered, where the answer carries it.
    reference: Option<u64>,
    /// `None` while nobody knows whether this portal gives the answer.
    deadline: Option<Instant>,
}

impl Expected {
    /// `counted_on` makes it overdue [`ANSWER_TIMEOUT`] from now.
    pub(super) fn open(
        &mut self,
        now: Instant,
        answer: Answer,
        reference: Option<u64>,
        counted_on: bool,
    ) {
        if self.open.len() == MAX_OPEN {
            match self.open.iter().position(|o| o.deadline.is_none()) {
                Some(oldest) => drop(self.open.remove(oldest)),
                None => return,
            }
        }
        self.open.push(Open {
            answer,
            reference,
            deadline: counted_on.then(|| now + ANSWER_TIMEOUT),
        });
    }

    pub(super) fn is_open(&self, answer: Answer) -> bool {
        self.open.iter().any(|o| o.answer == answer)
    }

    /// An answer that carries no reference came. Says whether it was asked for.
    pub(super) fn came(&mut self, answer: Answer) -> bool {
        let before = self.open.len();
        self.open.retain(|o| o.answer != answer);
        self.open.len() < before
    }

    /// A reply came. Says which answer it is.
    pub(super) fn replied(&mut self, reference: u64) -> Option<Answer> {
        let at = self
            .open
            .iter()
            .position(|o| o.answer == Answer::Authorization && o.reference == Some(reference))?;
        Some(self.open.remove(at).answer)
    }

    /// When the first answer is overdue, and which.
    pub(super) fn deadline(&self) -> Option<(Instant, Answer)> {
        self.open
            .iter()
            .filter_map(|o| Some((o.deadline?, o.answer)))
            .min_by_key(|(at, _)| *at)
    }
}

/// Which answers this portal has been seen to give; outlives sessions.
#[derive(Debug, Default)]
pub(super) struct Habits {
    authorization: bool,
    relays: bool,
}

impl Habits {
    pub(super) fn gives(&self, answer: Answer) -> bool {
        match answer {
            Answer::Init => true,
            Answer::Authorization => self.authorization,
            Answer::Relays => self.relays,
        }
    }

    /// It gave the answer, or it did not when it was due.
    pub(super) fn note(&mut self, answer: Answer, given: bool) {
        match answer {
            Answer::Init => {}
            Answer::Authorization => self.authorization = given,
            Answer::Relays => self.relays = given,
        }
    }
}
