//! Remembered verdicts: one lookup per packet instead of the policy's tables.
//!
//! A fixed table of four-way sets, so memory is bounded and a flood of flows evicts old verdicts
//! instead of growing. The hash is seeded per process, so that nobody can aim at one set. Entries
//! carry the generation of the policy that made them: a changed policy has another generation, and
//! what it made before simply no longer matches.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Instant;

use crate::access::{Denied, Flow, Passed, Tick};
use crate::packet::{FlowKey, TcpFlags};

/// Sets of all workers' caches together; each flow is one worker's.
const SETS: usize = 4096;
/// Sets of a cache at least.
const MIN_SETS: usize = 512;
/// Entries per set.
const WAYS: usize = 4;

struct Entry {
    key: FlowKey,
    generation: u64,
    until: Option<Instant>,
    flow: Option<Arc<Flow>>,
}

impl Entry {
    /// Whether what was decided still holds for a packet with these TCP flags.
    #[inline]
    fn is_current(&self, now: Instant, tick: Tick, flags: TcpFlags) -> bool {
        self.until.is_none_or(|until| now < until)
            && self
                .flow
                .as_ref()
                .is_none_or(|flow| !flow.is_over(tick) && !flow.is_succeeded_by(flags))
    }
}

/// Allowances by flow.
pub struct FlowCache {
    /// Made with the first flow: a gateway that nobody uses is small.
    sets: Box<[[Option<Entry>; WAYS]]>,
    /// How many there are then, less one.
    mask: usize,
    /// Which way of a set is replaced next.
    victim: Box<[u8]>,
    hasher: foldhash::fast::RandomState,
}

/// When a packet comes, on the two clocks that matter for it.
#[derive(Debug, Clone, Copy)]
pub struct At {
    /// The clock by which grants end.
    pub now: Instant,
    /// The clock by which flows end.
    pub tick: Tick,
}

impl FlowCache {
    /// An empty cache for one of so many workers.
    pub fn new(workers: usize) -> Self {
        let sets = (SETS / workers.max(1)).max(MIN_SETS).next_power_of_two();
        Self {
            sets: Box::default(),
            mask: sets - 1,
            victim: vec![0; sets].into_boxed_slice(),
            hasher: foldhash::fast::RandomState::default(),
        }
    }

    /// The flow that a packet belongs to, if it may pass under the policy of this generation;
    /// `decide` is asked on a miss. `flags` are the packet's, if it may begin a flow.
    ///
    /// # Errors
    /// What `decide` says. Not kept: it can turn into an allowance with nothing but time.
    #[inline]
    pub fn pass(
        &mut self,
        key: &FlowKey,
        generation: u64,
        at: At,
        flags: TcpFlags,
        decide: impl FnOnce() -> Result<Passed, Denied>,
    ) -> Result<Option<&Arc<Flow>>, Denied> {
        let set = self.hasher.hash_one(key) as usize & self.mask;
        let hit = self.sets.get(set).and_then(|ways| {
            ways.iter().position(|entry| {
                entry.as_ref().is_some_and(|entry| {
                    entry.generation == generation
                        && entry.key == *key
                        && entry.is_current(at.now, at.tick, flags)
                })
            })
        });
        let way = match hit {
            Some(way) => way,
            None => self.keep(set, key, generation, decide()?),
        };
        Ok(self.sets[set][way]
            .as_ref()
            .and_then(|entry| entry.flow.as_ref()))
    }

    #[cold]
    fn keep(&mut self, set: usize, key: &FlowKey, generation: u64, passed: Passed) -> usize {
        if self.sets.is_empty() {
            let all = 0..=self.mask;
            self.sets = all.map(|_| [const { None }; WAYS]).collect();
        }
        let ways = &mut self.sets[set];
        // The same flow under an older policy, else a free way, else the next victim.
        let way = ways
            .iter()
            .position(|e| e.as_ref().is_some_and(|e| e.key == *key))
            .or_else(|| ways.iter().position(Option::is_none))
            .unwrap_or_else(|| {
                let way = usize::from(self.victim[set]) % WAYS;
                self.victim[set] = self.victim[set].wrapping_add(1);
                way
            });
        ways[way] = Some(Entry {
            key: *key,
            generation,
            until: passed.until,
            flow: passed.flow,
        });
        way
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

    const ALLOW: Result<Passed, Denied> = Ok(Passed {
        until: None,
        flow: None,
    });
    const DENY: Result<Passed, Denied> = Err(Denied {
        reason: DropReason::NoGrant,
        reply: None,
    });

    /// Asks for one flow's verdict; the epoch of the ticks is `start`.
    fn passes(
        cache: &mut FlowCache,
        (port, generation): (u16, u64),
        (start, now): (Instant, Instant),
        decide: impl FnOnce() -> Result<Passed, Denied>,
    ) -> bool {
        let at = At {
            now,
            tick: Tick::new(start, now),
        };
        let flags = TcpFlags::default();
        cache
            .pass(&key(port), generation, at, flags, decide)
            .is_ok()
    }

    #[test]
    fn an_allowance_is_asked_for_once_per_generation() {
        let (mut cache, now) = (FlowCache::new(1), Instant::now());
        let mut asked = 0;
        for generation in [1, 1, 1, 2, 2, 1] {
            passes(&mut cache, (5, generation), (now, now), || {
                asked += 1;
                ALLOW
            });
        }
        assert_eq!(asked, 3);
    }

    #[test]
    fn an_allowance_ends_when_its_grant_does() {
        let (mut cache, now) = (FlowCache::new(1), Instant::now());
        let until = now + Duration::from_secs(5);
        let limited = || {
            Ok(Passed {
                until: Some(until),
                flow: None,
            })
        };
        assert!(passes(&mut cache, (5, 1), (now, now), limited));
        let tick = Duration::from_nanos(1);
        assert!(passes(&mut cache, (5, 1), (now, until - tick), || DENY));
        assert!(!passes(&mut cache, (5, 1), (now, until), || DENY));
    }

    #[test]
    fn a_denial_is_asked_for_each_time() {
        let (mut cache, now) = (FlowCache::new(1), Instant::now());
        assert!(!passes(&mut cache, (5, 1), (now, now), || DENY));
        assert!(passes(&mut cache, (5, 1), (now, now), || ALLOW));
    }

    #[test]
    fn a_flood_of_flows_evicts_but_never_mixes_verdicts() {
        let (mut cache, now) = (FlowCache::new(1), Instant::now());
        for round in 0..2u64 {
            for port in 0..=u16::MAX {
                // Each flow's allowance ends at a time of its own; asked just before and at it.
                let until = now + Duration::from_secs(1 + u64::from(port));
                let own = || {
                    Ok(Passed {
                        until: Some(until),
                        flow: None,
                    })
                };
                let before = until - Duration::from_nanos(1);
                assert!(passes(&mut cache, (port, 1), (now, before), own), "{round}");
                assert!(passes(&mut cache, (port, 1), (now, before), || DENY));
                assert!(!passes(&mut cache, (port, 1), (now, until), || DENY));
            }
        }
    }
}
