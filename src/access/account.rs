//! What flow logs tell of a flow (data-path spec §8.1).

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::limits::MAX_REPORTS;
use crate::flow_logs::Authorization;
use crate::ids::{ClientId, ResourceId};
use crate::packet::{Meta, protocol};
use crate::throttle::Throttle;

/// A flow that is silent for so long is told as ended, though it may go on (data-path spec §8.1).
pub(super) const SILENCE: Duration = Duration::from_secs(120);

/// Whose flow it is, for flow logs.
#[derive(Debug, Clone)]
pub(super) struct Owner {
    pub(super) resource: ResourceId,
    /// What the portal sent along with the grant; `None` if nothing that can be used.
    pub(super) authorization: Option<Arc<Authorization>>,
}

/// Traffic of one flow, counted by the workers. "out" is from the client to the resource.
#[derive(Debug)]
pub(super) struct Account {
    owner: Owner,
    domain: Option<Arc<str>>,
    /// Whether there was more to it than the end of something older.
    substantial: AtomicBool,
    told: AtomicBool,
    out_packets: AtomicU64,
    out_bytes: AtomicU64,
    in_packets: AtomicU64,
    in_bytes: AtomicU64,
}

/// Traffic of a flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// Packets from the client.
    pub out_packets: u64,
    /// Bytes behind their TCP or UDP headers.
    pub out_bytes: u64,
    /// Packets to the client.
    pub in_packets: u64,
    /// Bytes behind their TCP or UDP headers.
    pub in_bytes: u64,
}

/// Something that flow logs are to be told.
#[derive(Debug, Clone)]
pub struct FlowReport {
    /// Whose flow.
    pub client: ClientId,
    /// To which resource.
    pub resource: ResourceId,
    /// What it is logged with; `None` if the grant came without.
    pub authorization: Option<Arc<Authorization>>,
    /// IP protocol number: TCP or UDP.
    pub protocol: u8,
    /// The client's tunnel address and its port as the resource sees it.
    pub source: SocketAddr,
    /// Where the flow really goes.
    pub destination: SocketAddr,
    /// The name it goes to, for DNS resources.
    pub domain: Option<Arc<str>>,
    /// When it began.
    pub began: Instant,
    /// `None` while it goes on.
    pub ended: Option<FlowEnd>,
}

/// How a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowEnd {
    /// When its last packet passed.
    pub last_packet: Instant,
    /// What passed.
    pub counted: Counted,
}

/// Reports on their way to flow logs.
#[derive(Debug)]
pub(super) struct Reports {
    waiting: VecDeque<FlowReport>,
    dropped: u64,
    /// As much of `dropped` as the log tells of.
    told: u64,
    complaints: Throttle,
}

impl Default for Reports {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            dropped: 0,
            told: 0,
            complaints: Throttle::MINUTELY,
        }
    }
}

impl Reports {
    pub(super) fn push(&mut self, report: FlowReport) {
        if self.waiting.len() < MAX_REPORTS {
            self.waiting.push_back(report);
        } else {
            self.dropped += 1;
        }
    }

    pub(super) fn pop(&mut self) -> Option<FlowReport> {
        self.waiting.pop_front()
    }

    /// Notes flows that will not be reported.
    pub(super) fn drop_flows(&mut self, flows: u64) {
        self.dropped += flows;
    }

    /// Reports that found no room, and flows that were not even accounted for.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Tells in the log of what was dropped, once a minute at most.
    pub(super) fn complain(&mut self, now: Instant) {
        if self.dropped > self.told && self.complaints.admit(now).is_some() {
            let dropped = self.dropped - self.told;
            self.told = self.dropped;
            tracing::warn!(
                dropped,
                "More flows than flow logs can be told of; some are not logged"
            );
        }
    }
}

impl Account {
    pub(super) fn new(owner: Owner, domain: Option<Arc<str>>) -> Self {
        Self {
            owner,
            domain,
            substantial: AtomicBool::new(false),
            told: AtomicBool::new(false),
            out_packets: AtomicU64::new(0),
            out_bytes: AtomicU64::new(0),
            in_packets: AtomicU64::new(0),
            in_bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn count_out(&self, meta: &Meta) {
        self.out_packets.fetch_add(1, Ordering::Relaxed);
        self.out_bytes
            .fetch_add(u64::from(meta.payload_len), Ordering::Relaxed);
        self.note_substance(says_more(meta) || meta.tcp_flags.is_opening());
    }

    pub(super) fn count_in(&self, meta: &Meta) {
        self.in_packets.fetch_add(1, Ordering::Relaxed);
        self.in_bytes
            .fetch_add(u64::from(meta.payload_len), Ordering::Relaxed);
        self.note_substance(says_more(meta));
    }

    fn note_substance(&self, is_more: bool) {
        if is_more && !self.substantial.load(Ordering::Relaxed) {
            self.substantial.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the beginning is to be told now; says so once.
    pub(super) fn begins(&self) -> bool {
        self.substantial.load(Ordering::Relaxed) && !self.told.swap(true, Ordering::Relaxed)
    }

    /// What was counted since the beginning was told, if it was. From here on it is as if nothing
    /// had been.
    pub(super) fn ends(&self) -> Option<Counted> {
        if !self.told.swap(false, Ordering::Relaxed) {
            return None;
        }
        self.substantial.store(false, Ordering::Relaxed);
        Some(Counted {
            out_packets: self.out_packets.swap(0, Ordering::Relaxed),
            out_bytes: self.out_bytes.swap(0, Ordering::Relaxed),
            in_packets: self.in_packets.swap(0, Ordering::Relaxed),
            in_bytes: self.in_bytes.swap(0, Ordering::Relaxed),
        })
    }

    /// The report, as far as the account knows.
    pub(super) fn report(
        &self,
        client: ClientId,
        protocol: u8,
        (source, destination): (SocketAddr, SocketAddr),
        began: Instant,
        ended: Option<FlowEnd>,
    ) -> FlowReport {
        FlowReport {
            client,
            resource: self.owner.resource,
            authorization: self.owner.authorization.clone(),
            protocol,
            source,
            destination,
            domain: self.domain.clone(),
            began,
            ended,
        }
    }
}

/// Whether a packet is part of a conversation. The last words of an old connection, which we have
/// forgotten, are no flow.
fn says_more(meta: &Meta) -> bool {
    meta.protocol != protocol::TCP || meta.payload_len > 0
}

/// The address of the same family.
pub(super) fn of_family(ipv4: IpAddr, ipv6: IpAddr, like: IpAddr) -> IpAddr {
    if like.is_ipv4() { ipv4 } else { ipv6 }
}

#[cfg(test)]
#[path = "account_tests.rs"]
mod tests;
