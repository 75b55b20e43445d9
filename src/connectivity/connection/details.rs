//! What to show of a connection when somebody asks: candidates, pairs and the path's past.

use std::collections::VecDeque;
use std::time::Instant;

use super::known::{Known, pair_priority};
use super::pairs::Pair;
use super::{Connection, MAX_PAIRS};
use crate::admin::model::{CandidateKind, CandidateStatus, PairStatus, PathReason};
use crate::connectivity::{ConnectionDetails, PathStep};
use crate::datapath::peers::PathKind;

/// Pairs, and candidates of either side, that are shown: a client is free to signal any number.
const SHOWN: usize = 20;

/// Changes of the path that are remembered.
const STEPS: usize = 8;

/// The last changes of a path.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<PathStep>);

impl History {
    pub(super) fn note(
        &mut self,
        at: Instant,
        from: Option<PathKind>,
        to: Option<PathKind>,
        reason: PathReason,
    ) {
        if self.0.len() == STEPS {
            self.0.pop_front();
        }
        self.0.push_back(PathStep {
            at,
            from,
            to,
            reason,
        });
    }

    /// Oldest first.
    pub(super) fn steps(&self) -> Vec<PathStep> {
        self.0.iter().copied().collect()
    }
}

fn shown(candidates: &[Known]) -> Vec<CandidateStatus> {
    candidates
        .iter()
        .take(SHOWN)
        .map(|known| CandidateStatus {
            kind: known.kind,
            address: known.address,
        })
        .collect()
}

impl Connection {
    /// Costs some microseconds and allocations, so it is for those who ask, not for each snapshot.
    pub(in crate::connectivity) fn details(
        &self,
        now: Instant,
        unix_now: f64,
    ) -> ConnectionDetails {
        let (ours, theirs) = (&self.known.ours, &self.known.theirs);
        // What is not a host or relayed address is reached through one (RFC 8445 §6.1.2.4).
        let bases: Vec<Known> = ours
            .iter()
            .filter(|c| matches!(c.kind, CandidateKind::Host | CandidateKind::Relayed))
            .copied()
            .collect();
        let of = |known: &[Known], address| known.iter().find(|c| c.address == address).copied();

        let mut pairs: Vec<(Pair, Option<Known>, Option<Known>)> = self
            .pairs
            .iter()
            .map(|pair| (*pair, of(&bases, pair.ends.0), of(theirs, pair.ends.1)))
            .filter(|(pair, local, remote)| {
                (local.is_some() && remote.is_some()) || self.in_use == Some(pair.ends)
            })
            .collect();
        // The agent keeps its check list to itself, but this is how it is made. Pairs that failed
        // stay: each search tries them again.
        'all: for remote in theirs {
            for local in &bases {
                if pairs.len() >= MAX_PAIRS {
                    break 'all;
                }
                let ends = (local.address, remote.address);
                if local.address.is_ipv4() == remote.address.is_ipv4()
                    && !pairs.iter().any(|(pair, _, _)| pair.ends == ends)
                {
                    pairs.push((Pair::untried(ends), Some(*local), Some(*remote)));
                }
            }
        }
        let alive_within = self.alive_within();
        pairs.sort_by_cached_key(|(pair, local, remote)| {
            let priority = |known: &Option<Known>| known.map_or(0, |known| known.priority);
            std::cmp::Reverse((
                self.in_use == Some(pair.ends),
                pair.nominated,
                pair.is_alive(now, alive_within),
                pair_priority(priority(local), priority(remote)),
            ))
        });
        ConnectionDetails {
            pair_count: pairs.len(),
            pairs: pairs
                .into_iter()
                .take(SHOWN)
                .map(|(pair, local, remote)| PairStatus {
                    local: pair.ends.0,
                    local_kind: local.map(|known| known.kind),
                    remote: pair.ends.1,
                    remote_kind: remote.map(|known| known.kind),
                    answered_at: pair
                        .answered
                        .map(|at| unix_now - now.saturating_duration_since(at).as_secs_f64()),
                    nominated: pair.nominated,
                    in_use: self.in_use == Some(pair.ends),
                })
                .collect(),
            local_candidate_count: ours.len(),
            local_candidates: shown(ours),
            remote_candidate_count: theirs.len(),
            remote_candidates: shown(theirs),
        }
    }
}
