//! What a client's policy lets through, both ways.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;
use crate::access::fixtures::*;
use crate::access::{Access, Resolved};
use crate::packet::samples::{icmp4, icmp6, ip4, ip6, tcp4, tcp6, udp4, udp6};
use crate::portal::messages::Filter;

mod expiry;
mod inbound;
mod names;
mod outbound;

const LAN: &str = "10.0.0.0/8";
const LAN6: &str = "fd12::/32";
const HOST: [u8; 4] = [10, 0, 0, 1];
const HOST6: &str = "fd12::1";
const PUBLIC: [u8; 4] = [9, 9, 9, 9];
const PUBLIC6: &str = "2620:fe::fe";

const FOREVER: Verdict = Verdict::Allow { until: None };

fn prohibited(reason: DropReason) -> Verdict {
    deny(reason, Some(Reply::Prohibited))
}

fn unreachable(reason: DropReason) -> Verdict {
    deny(reason, Some(Reply::Unreachable))
}

fn silent(reason: DropReason) -> Verdict {
    deny(reason, None)
}

fn deny(reason: DropReason, reply: Option<Reply>) -> Verdict {
    Verdict::Deny(Denied { reason, reply })
}

/// The packet of the client that `packet` answers or, if it is an ICMP error, is about.
/// `None` if the error does not quote it as a whole.
fn cause(packet: &[u8]) -> Option<Meta> {
    let meta = meta(packet);
    let transport = usize::from(meta.transport_offset);
    if meta.is_icmp_error() {
        return Meta::parse(&packet[transport + 8..]).ok();
    }
    let (addresses, size) = if meta.is_ipv4() { (12, 4) } else { (8, 16) };
    let mut mirrored = packet.to_vec();
    let (src, dst) = mirrored[addresses..addresses + 2 * size].split_at_mut(size);
    src.swap_with_slice(dst);
    match (meta.protocol, packet[transport]) {
        (protocol::TCP | protocol::UDP, _) => {
            mirrored.swap(transport, transport + 2);
            mirrored.swap(transport + 1, transport + 3);
        }
        (protocol::ICMP, 0) => mirrored[transport] = 8,
        (protocol::ICMP, 8) => mirrored[transport] = 0,
        (protocol::ICMPV6, 129) => mirrored[transport] = 128,
        (protocol::ICMPV6, 128) => mirrored[transport] = 129,
        _ => {}
    }
    Meta::parse(&mirrored).ok()
}

/// Judges a packet to the client without anything having gone before.
fn unasked(policy: &ClientPolicy, packet: &[u8], now: Instant) -> Verdict {
    let meta = meta(packet);
    Verdict::from(if meta.is_icmp_error() {
        policy.admit_error(packet, &meta, now).map(|_| None)
    } else {
        policy.admit_inbound(&meta, now).map(|passed| passed.until)
    })
}

/// Judges a packet to the client as if the client had asked for it, whether or not it was allowed
/// to: the tables do not judge.
fn inbound(policy: &ClientPolicy, packet: &[u8], now: Instant) -> Verdict {
    if let Some(cause) = cause(packet) {
        // There is none to addresses that stand for nothing.
        let _ = policy
            .tables
            .open(&cause, now, || unreachable!("nothing is accounted for"));
    }
    unasked(policy, packet, now)
}

/// A policy of client 1 whose grants never end, with both directions as closures over bytes.
struct Judge(std::sync::Arc<ClientPolicy>, Instant);

impl Judge {
    fn new(grants: &[Resource]) -> Self {
        let grants: Vec<_> = grants.iter().map(|r| (r.clone(), None)).collect();
        let (policy, now) = policy(&grants);
        Self(policy, now)
    }

    fn outbound(&self, packet: &[u8]) -> Verdict {
        self.0.outbound(&meta(packet), self.1)
    }

    fn inbound(&self, packet: &[u8]) -> Verdict {
        inbound(&self.0, packet, self.1)
    }

    fn unasked(&self, packet: &[u8]) -> Verdict {
        unasked(&self.0, packet, self.1)
    }

    /// TCP from the client to port 443.
    fn to4(&self, dst: [u8; 4]) -> Verdict {
        self.outbound(&tcp4(addr4(1), dst, 1000, 443, b""))
    }

    fn to6(&self, dst: &str) -> Verdict {
        self.outbound(&tcp6(&addr6(1), dst, 1000, 443, b""))
    }

    /// TCP to the client from port 443.
    fn from4(&self, src: [u8; 4]) -> Verdict {
        self.inbound(&tcp4(src, addr4(1), 443, 1000, b""))
    }

    fn from6(&self, src: &str) -> Verdict {
        self.inbound(&tcp6(src, &addr6(1), 443, 1000, b""))
    }
}

fn networks() -> Judge {
    Judge::new(&[cidr(1, LAN, &[]), cidr(2, LAN6, &[])])
}

#[test]
fn snapshots_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<ClientPolicy>();
}
