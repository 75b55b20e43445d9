//! The key under which the data path remembers a verdict.

use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use super::Meta;

/// Hasher state for maps keyed by [`FlowKey`]: fast, and seeded per process so that nobody outside
/// can choose flows that collide.
pub type FlowHash = foldhash::fast::RandomState;

/// Everything of a packet that a verdict depends on, besides the policy and the time.
///
/// Two packets of one client with the same key get the same verdict from the same policy snapshot:
/// the key covers direction, family, addresses, protocol, ports and the ICMP class of [`Meta`].
/// It does not cover *whose* packet it is; caches compare the policy's generation for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowKey([u64; 5]);

impl FlowKey {
    const INBOUND: u64 = 1 << 48;
    const IPV6: u64 = 1 << 49;

    /// Key of a packet from a client to a resource.
    #[inline]
    pub fn outbound(meta: &Meta) -> FlowKey {
        Self::new(meta, 0)
    }

    /// Key of a packet from a resource to a client.
    #[inline]
    pub fn inbound(meta: &Meta) -> FlowKey {
        Self::new(meta, Self::INBOUND)
    }

    #[inline]
    fn new(meta: &Meta, direction: u64) -> FlowKey {
        let (src, family) = words(meta.src);
        let (dst, _) = words(meta.dst);
        let rest = u64::from(meta.src_port)
            | u64::from(meta.dst_port) << 16
            | u64::from(meta.protocol) << 32
            | u64::from(meta.verdict_flags()) << 40
            | direction
            | family;
        FlowKey([src.0, src.1, dst.0, dst.1, rest])
    }
}

#[inline]
fn words(address: IpAddr) -> ((u64, u64), u64) {
    match address {
        IpAddr::V4(a) => ((0, u64::from(a.to_bits())), 0),
        IpAddr::V6(a) => {
            let bits = a.to_bits();
            (((bits >> 64) as u64, bits as u64), FlowKey::IPV6)
        }
    }
}

impl Hash for FlowKey {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Word by word: the derived form would go through the slower byte-slice path.
        for word in self.0 {
            state.write_u64(word);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;
    use std::hash::BuildHasher;

    use super::*;
    use crate::packet::samples;

    #[test]
    fn key_is_at_most_40_bytes() {
        assert_eq!(size_of::<FlowKey>(), 40);
    }

    #[test]
    fn every_field_that_decides_a_verdict_changes_the_key() {
        let base = Meta::parse(&samples::udp4(
            [100, 64, 0, 1],
            [10, 0, 0, 1],
            1000,
            53,
            b"x",
        ))
        .unwrap();
        let mut metas = vec![base];
        metas.push(Meta {
            src: "100.64.0.2".parse().unwrap(),
            ..base
        });
        metas.push(Meta {
            dst: "10.0.0.2".parse().unwrap(),
            ..base
        });
        metas.push(Meta {
            src_port: 1001,
            ..base
        });
        metas.push(Meta {
            dst_port: 54,
            ..base
        });
        metas.push(Meta {
            protocol: 6,
            ..base
        });
        // Same address bits, other family.
        metas.push(Meta {
            src: "::100.64.0.1".parse().unwrap(),
            dst: "::10.0.0.1".parse().unwrap(),
            ..base
        });
        let mut keys = HashSet::new();
        for meta in &metas {
            assert!(keys.insert(FlowKey::outbound(meta)), "{meta:?}");
            assert!(keys.insert(FlowKey::inbound(meta)), "{meta:?}");
        }
    }

    #[test]
    fn icmp_messages_of_different_class_have_different_keys() {
        let mut keys = HashSet::new();
        // Echo request, echo reply, timestamp request, redirect; all with id 0 and equal addresses.
        for kind in [8, 0, 13, 5] {
            let packet = samples::icmp4([100, 64, 0, 1], [10, 0, 0, 1], kind, 0, [0; 4], b"data");
            let meta = Meta::parse(&packet).unwrap();
            assert!(keys.insert(FlowKey::outbound(&meta)), "type {kind}");
        }
        // An error about a packet of the receiver is yet another class.
        let about = samples::udp4([10, 0, 0, 1], [1, 1, 1, 1], 1, 2, b"");
        let packet = samples::icmp4([100, 64, 0, 1], [10, 0, 0, 1], 3, 1, [0; 4], &about);
        assert!(keys.insert(FlowKey::outbound(&Meta::parse(&packet).unwrap())));
    }

    #[test]
    fn length_and_payload_do_not_change_the_key() {
        let a = samples::udp4([100, 64, 0, 1], [10, 0, 0, 1], 7, 9, b"a");
        let b = samples::udp4([100, 64, 0, 1], [10, 0, 0, 1], 7, 9, b"longer");
        let (a, b) = (Meta::parse(&a).unwrap(), Meta::parse(&b).unwrap());
        assert_eq!(FlowKey::outbound(&a), FlowKey::outbound(&b));
    }

    #[test]
    fn hash_spreads_neighbouring_flows() {
        let state = FlowHash::default();
        let base = Meta::parse(&samples::udp4([100, 64, 0, 1], [10, 0, 0, 1], 1, 53, b"")).unwrap();
        let buckets: HashSet<u64> = (0..4096)
            .map(|src_port| {
                let meta = Meta { src_port, ..base };
                state.hash_one(FlowKey::outbound(&meta)) % 65_536
            })
            .collect();
        // 4096 balls in 65536 bins leave about 3970 bins occupied. The hash is keyed at random, and
        // under a few keys neighbours lie a little closer.
        assert!(buckets.len() > 3400, "{}", buckets.len());
    }
}
