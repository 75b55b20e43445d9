//! What is asked of the candidates again and again. The agent only gives out copies of them, so what
//! matters is noted once for all questions that a datagram raises.

use std::net::SocketAddr;

use is::{Candidate, IceAgent};

use super::pairs::Ends;
use crate::admin::model::CandidateKind;

/// A candidate without what is only for signalling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) address: SocketAddr,
    pub(super) kind: CandidateKind,
    pub(super) priority: u32,
}

/// The candidates of both ends, by falling priority.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pub(super) ours: Vec<Known>,
    pub(super) theirs: Vec<Known>,
}

impl Candidates {
    pub(super) fn of(agent: &IceAgent) -> Self {
        Self {
            ours: all(agent.local_candidates()),
            theirs: all(agent.remote_candidates()),
        }
    }

    /// Whether it is an address that we have, as any kind of candidate.
    pub(super) fn has_ours(&self, address: SocketAddr) -> bool {
        self.ours.iter().any(|known| known.address == address)
    }

    /// Whether datagrams can leave from it: what a router made of an address cannot be sent from.
    pub(super) fn is_ours(&self, address: SocketAddr) -> bool {
        self.ours
            .iter()
            .any(|c| c.address == address && c.kind != CandidateKind::ServerReflexive)
    }

    pub(super) fn is_host(&self, address: SocketAddr) -> bool {
        self.ours
            .iter()
            .any(|c| c.address == address && c.kind == CandidateKind::Host)
    }

    pub(super) fn is_theirs(&self, address: SocketAddr) -> bool {
        self.theirs.iter().any(|known| known.address == address)
    }

    pub(super) fn is_their_relay(&self, address: SocketAddr) -> bool {
        self.theirs
            .iter()
            .any(|c| c.address == address && c.kind == CandidateKind::Relayed)
    }

    /// Pair priority (RFC 8445 §6.1.2.3); the client is the controlling one.
    pub(super) fn priority(&self, (local, remote): Ends) -> u64 {
        let best = |known: &[Known], address| {
            known
                .iter()
                .find(|c| c.address == address)
                .map_or(0, |c| c.priority)
        };
        pair_priority(best(&self.ours, local), best(&self.theirs, remote))
    }
}

/// See [`Candidates::priority`].
pub(super) fn pair_priority(ours: u32, theirs: u32) -> u64 {
    let (ours, theirs) = (u64::from(ours), u64::from(theirs));
    (ours.min(theirs) << 32) + 2 * ours.max(theirs) + u64::from(theirs > ours)
}

fn all(candidates: impl Iterator<Item = Candidate>) -> Vec<Known> {
    let mut all: Vec<Known> = candidates
        .map(|candidate| Known {
            address: candidate.addr(),
            kind: kind(candidate.kind()),
            priority: candidate.prio(),
        })
        .collect();
    all.sort_by_key(|known| std::cmp::Reverse(known.priority));
    all
}

fn kind(kind: is::CandidateKind) -> CandidateKind {
    match kind {
        is::CandidateKind::Host => CandidateKind::Host,
        is::CandidateKind::ServerReflexive => CandidateKind::ServerReflexive,
        is::CandidateKind::PeerReflexive => CandidateKind::PeerReflexive,
        is::CandidateKind::Relayed => CandidateKind::Relayed,
    }
}
