//! Remembered verdicts: one lookup per packet instead of the policy's tables.
//!
//! A fixed table of four-way sets, so memory is bounded and a flood of flows evicts old verdicts
//! instead of growing. The hash is seeded per process, so that nobody can aim at one set. Entries
//! carry the generation of the policy that made them: a changed policy has another generation, and
//! what it made before simply no longer matches.

use std::hash::BuildHasher;
use std::time::Instant;

use crate::access::Verdict;
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
        // Denials are not kept: one can turn into an allowance with nothing but time.
        if !verdict.is_allow() {
            return verdict;
        }
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
        Verdict::Deny { .. } => false,
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;
    use crate::access::DropReason;
    use crate::packet::Meta;

    fn key(port: u16) -> FlowKey {
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[3] = 28;
        packet[9] = 17;
        packet[12..16].copy_from_slice(&[100, 64, 0, 9]);
        packet[16..20].copy_from_slice(&[10, 0, 0, 1]);
        packet[20..22].copy_from_slice(&port.to_be_bytes());
        packet[25] = 8;
        FlowKey::outbound(&Meta::parse(&packet).unwrap())
    }

    const ALLOW: Verdict = Verdict::Allow { until: None };
    const DENY: Verdict = Verdict::Deny {
        reason: DropReason::NoGrant,
        reply: None,
    };

    #[test]
    fn an_allowance_is_asked_for_once_per_generation() {
        let (mut cache, now) = (FlowCache::new(), Instant::now());
        let mut asked = 0;
        for generation in [1, 1, 1, 2, 2, 1] {
            let _ = cache.verdict(&key(5), generation, now, || {
                asked += 1;
                ALLOW
            });
        }
        assert_eq!(asked, 3);
    }

    #[test]
    fn an_allowance_ends_when_its_grant_does() {
        let (mut cache, now) = (FlowCache::new(), Instant::now());
        let until = now + Duration::from_secs(5);
        let limited = Verdict::Allow { until: Some(until) };
        let _ = cache.verdict(&key(5), 1, now, || limited);
        let tick = Duration::from_nanos(1);
        assert_eq!(cache.verdict(&key(5), 1, until - tick, || DENY), limited);
        assert_eq!(cache.verdict(&key(5), 1, until, || DENY), DENY);
    }

    #[test]
    fn a_denial_is_asked_for_each_time() {
        let (mut cache, now) = (FlowCache::new(), Instant::now());
        assert_eq!(cache.verdict(&key(5), 1, now, || DENY), DENY);
        assert_eq!(cache.verdict(&key(5), 1, now, || ALLOW), ALLOW);
    }

    #[test]
    fn a_flood_of_flows_evicts_but_never_mixes_verdicts() {
        let (mut cache, now) = (FlowCache::new(), Instant::now());
        for round in 0..2 {
            for port in 0..=u16::MAX {
                let own = Verdict::Allow {
                    until: Some(now + Duration::from_secs(1 + u64::from(port))),
                };
                let got = cache.verdict(&key(port), 1, now, || own);
                assert_eq!(got, own, "round {round}");
            }
        }
    }

    #[test]
    fn answers_are_limited_per_second() {
        let now = Instant::now();
        let mut budget = ReplyBudget::new(now);
        let sent = (0..1000).filter(|_| budget.take(now)).count();
        assert_eq!(sent, REPLIES_PER_SECOND as usize);
        assert!(budget.take(now + Duration::from_secs(1)));
    }
}
