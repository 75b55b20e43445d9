//! Remembered verdicts: one lookup per packet instead of the policy's tables.
//!
//! A fixed table of four-way sets, so memory is bounded and a flood of flows evicts old verdicts
//! instead of growing. The hash is seeded per process, so that nobody can aim at one set. Entries
//! carry the generation of the policy that made them: a changed policy has another generation, and
//! what it made before simply no longer matches.

use std::hash::BuildHasher;
use std::time::Instant;

use crate::access::{DropReason, Reply, Verdict};
use crate::packet::FlowKey;

/// Sets per cache.
const SETS: usize = 4096;
/// Entries per set.
const WAYS: usize = 4;

#[derive(Clone, Copy)]
struct Entry {
    key: FlowKey,
    generation: u64,
    verdict: Verdict,
}

/// Verdicts by flow.
pub struct FlowCache {
    sets: Box<[[Option<Entry>; WAYS]]>,
    /// Which way of a set is replaced next.
    victim: Box<[u8]>,
    hasher: foldhash::fast::RandomState,
}

impl FlowCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self {
            sets: vec![[None; WAYS]; SETS].into_boxed_slice(),
            victim: vec![0; SETS].into_boxed_slice(),
            hasher: foldhash::fast::RandomState::default(),
        }
    }

    /// The verdict for a flow under the policy of this generation; `decide` is asked on a miss.
    #[inline]
    pub fn verdict(
        &mut self,
        key: &FlowKey,
        generation: u64,
        now: Instant,
        decide: impl FnOnce() -> Verdict,
    ) -> Verdict {
        let set = self.hasher.hash_one(key) as usize & (SETS - 1);
        let ways = &mut self.sets[set];
        for entry in ways.iter().flatten() {
            if entry.generation == generation && entry.key == *key && is_current(entry, now) {
                return entry.verdict;
            }
        }
        let verdict = decide();
        let entry = Entry {
            key: *key,
            generation,
            verdict,
        };
        // The same flow under an older policy, else a free way, else the next victim.
        let way = ways
            .iter()
            .position(|e| e.is_some_and(|e| e.key == *key))
            .or_else(|| ways.iter().position(Option::is_none))
            .unwrap_or_else(|| {
                let way = usize::from(self.victim[set]) % WAYS;
                self.victim[set] = self.victim[set].wrapping_add(1);
                way
            });
        ways[way] = Some(entry);
        verdict
    }
}

impl Default for FlowCache {
    fn default() -> Self {
        Self::new()
    }
}

fn is_current(entry: &Entry, now: Instant) -> bool {
    match entry.verdict {
        Verdict::Allow { until } => until.is_none_or(|until| now < until),
        Verdict::Deny { .. } => true,
    }
}

/// Limits ICMP answers to denied packets, so that a client's port scan is not amplified.
pub struct ReplyBudget {
    window: Instant,
    left: u32,
}

/// ICMP answers per second and worker.
const REPLIES_PER_SECOND: u32 = 100;

impl ReplyBudget {
    /// A full budget.
    pub fn new(now: Instant) -> Self {
        Self {
            window: now,
            left: REPLIES_PER_SECOND,
        }
    }

    /// Whether one more answer may be sent.
    pub fn take(&mut self, now: Instant) -> bool {
        if now.duration_since(self.window).as_secs() >= 1 {
            *self = Self::new(now);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// A denied packet's reason and answer, for callers that only care about denials.
pub fn denial(verdict: Verdict) -> Option<(DropReason, Option<Reply>)> {
    match verdict {
        Verdict::Allow { .. } => None,
        Verdict::Deny { reason, reply } => Some((reason, reply)),
    }
}
