//! What passed, and what was dropped for which reason.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::access::DropReason;

/// Traffic of one client or of one worker; inner packets only.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Bytes from clients.
    pub rx_bytes: AtomicU64,
    /// Bytes to clients.
    pub tx_bytes: AtomicU64,
    /// Packets from clients.
    pub rx_packets: AtomicU64,
    /// Packets to clients.
    pub tx_packets: AtomicU64,
}

impl Traffic {
    /// Counts packets from a client.
    pub fn received(&self, packets: u64, bytes: u64) {
        self.rx_packets.fetch_add(packets, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts packets to a client.
    pub fn sent(&self, packets: u64, bytes: u64) {
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Sum of packets both ways; changes when the client is active.
    pub fn packets(&self) -> u64 {
        self.rx_packets.load(Ordering::Relaxed) + self.tx_packets.load(Ordering::Relaxed)
    }
}

/// What became of packets of one worker or of one client. Whoever wants may read.
#[derive(Debug)]
pub struct Counters {
    /// What passed.
    pub traffic: Traffic,
    drops: Box<[AtomicU64]>,
}

impl Counters {
    /// All zero.
    pub fn new() -> Self {
        Self {
            traffic: Traffic::default(),
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
