//! Dropped packets by reason.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::access::DropReason;

/// Dropped packets by reason, of one worker or of one client. Whoever wants may read.
#[derive(Debug)]
pub struct Counters {
    drops: Box<[AtomicU64]>,
}

impl Counters {
    /// All zero.
    pub fn new() -> Self {
        Self {
            drops: (0..DropReason::COUNT).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Counts dropped packets.
    pub fn count(&self, reason: DropReason, packets: u64) {
        self.drops[reason.index()].fetch_add(packets, Ordering::Relaxed);
    }

    /// Dropped packets of one reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason.index()].load(Ordering::Relaxed)
    }

    /// The reasons that have occurred, with their numbers.
    pub fn all(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .iter()
            .map(|reason| (*reason, self.dropped(*reason)))
            .filter(|(_, packets)| *packets > 0)
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self::new()
    }
}
