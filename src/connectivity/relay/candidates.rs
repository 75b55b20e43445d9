//! Local candidates as learned from relays (data-path spec §2.3).

use std::net::{IpAddr, SocketAddr};

use crate::ids::RelayId;

/// Kind of a gathered candidate (RFC 8445 §5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CandidateKind {
    /// Our own address.
    Host,
    /// Our address as a relay sees it.
    ServerReflexive,
    /// An address of a relay that leads to us.
    Relayed,
}

/// A local candidate, learned from a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gathered {
    /// The relay it was learned from. Host and server-reflexive candidates serve every connection;
    /// relayed ones only those that chose this relay (data-path spec §2.3).
    pub relay: RelayId,
    /// Its kind.
    pub kind: CandidateKind,
    /// The candidate's address.
    pub addr: SocketAddr,
    /// Our local address behind it; for a relayed candidate the one from which the relay is used.
    pub base: SocketAddr,
}

impl Gathered {
    fn is_same_candidate(&self, other: &Gathered) -> bool {
        self.kind == other.kind && self.addr == other.addr && self.base == other.base
    }
}

/// Addresses that a peer could use, and should (RFC 8445 §5.1.1.1, data-path spec §2.3), of either
/// end. Link-local ones are out because they mean nothing without an interface, loopback ones because
/// they mean somebody else to everybody.
pub(in crate::connectivity) fn is_valid_candidate(addr: SocketAddr) -> bool {
    let usable = match addr.ip() {
        IpAddr::V4(ip) => {
            !ip.is_link_local()
                && !ip.is_broadcast()
                && !ip.is_multicast()
                && !ip.is_unspecified()
                && !ip.is_loopback()
        }
        IpAddr::V6(ip) => {
            let is_in = |prefix: u16| ip.segments()[0] & 0xffc0 == prefix;
            let is_local = is_in(0xfe80) || is_in(0xfec0);
            // Mapped and compatible ones; `::` and `::1` look like the latter.
            let is_ipv4 = ip.to_ipv4().is_some();
            !ip.is_multicast() && !is_local && !is_ipv4
        }
    };
    usable && addr.port() != 0
}

/// Host and server-reflexive candidates of all relays.
///
/// What a removed relay said stays true until another relay says otherwise: without it, losing the
/// last relay would cost new connections their direct paths, too.
#[derive(Debug, Default)]
pub(super) struct DirectCandidates {
    known: Vec<Gathered>,
    orphaned: Vec<Gathered>,
}

impl DirectCandidates {
    /// Each candidate once.
    pub(super) fn distinct(&self) -> Vec<Gathered> {
        let mut distinct: Vec<Gathered> = Vec::new();
        for candidate in self.known.iter().chain(&self.orphaned) {
            if !distinct.iter().any(|d| d.is_same_candidate(candidate)) {
                distinct.push(*candidate);
            }
        }
        distinct
    }

    /// Puts what `relay` says about us in place of what it, or a removed relay, said before in this
    /// address family; answers the candidates that were not known.
    pub(super) fn replace(
        &mut self,
        relay: RelayId,
        local: SocketAddr,
        mapped: Option<SocketAddr>,
    ) -> Vec<Gathered> {
        let before = self.distinct();
        let is_v4 = local.is_ipv4();
        self.known
            .retain(|c| c.relay != relay || c.base.is_ipv4() != is_v4);
        self.orphaned.retain(|c| c.base.is_ipv4() != is_v4);

        let candidate = |kind, addr| Gathered {
            relay,
            kind,
            addr,
            base: local,
        };
        let host = candidate(CandidateKind::Host, local);
        // Without a NAT in between, both are the same.
        let reflexive = mapped
            .filter(|mapped| *mapped != local && mapped.is_ipv4() == is_v4)
            .map(|mapped| candidate(CandidateKind::ServerReflexive, mapped));
        let valid = std::iter::once(host)
            .chain(reflexive)
            .filter(|c| is_valid_candidate(c.addr) && is_valid_candidate(c.base));
        let mut fresh = Vec::new();
        for candidate in valid {
            self.known.push(candidate);
            if !before.iter().any(|b| b.is_same_candidate(&candidate)) {
                fresh.push(candidate);
            }
        }
        fresh
    }

    /// The relay was removed; its words count until another relay speaks about that family.
    pub(super) fn orphan(&mut self, relay: RelayId) {
        let (of_relay, rest): (Vec<_>, Vec<_>) =
            self.known.drain(..).partition(|c| c.relay == relay);
        self.known = rest;
        for candidate in of_relay {
            let is_v4 = candidate.base.is_ipv4();
            if !self.known.iter().any(|c| c.base.is_ipv4() == is_v4) {
                self.orphaned.push(candidate);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;

    fn relay(n: u128) -> RelayId {
        RelayId(Uuid::from_u128(n))
    }

    fn addr(s: &str) -> SocketAddr {
        s.parse().unwrap()
    }

    fn kinds(candidates: &[Gathered]) -> Vec<(CandidateKind, SocketAddr)> {
        candidates.iter().map(|c| (c.kind, c.addr)).collect()
    }

    #[test]
    fn two_relays_that_agree_give_each_candidate_once() {
        let mut direct = DirectCandidates::default();
        let (local, mapped) = (addr("10.0.0.2:52625"), addr("203.0.113.9:40000"));
        let fresh = direct.replace(relay(1), local, Some(mapped));
        let expected = [
            (CandidateKind::Host, local),
            (CandidateKind::ServerReflexive, mapped),
        ];
        assert_eq!(kinds(&fresh), expected);
        assert_eq!(direct.replace(relay(2), local, Some(mapped)), []);
        assert_eq!(kinds(&direct.distinct()), expected);
    }

    #[test]
    fn without_nat_there_is_no_reflexive_candidate() {
        let mut direct = DirectCandidates::default();
        let local = addr("[2001:db8::2]:52625");
        let fresh = direct.replace(relay(1), local, Some(local));
        assert_eq!(kinds(&fresh), [(CandidateKind::Host, local)]);
    }

    #[test]
    fn new_mapping_replaces_the_old_one_of_its_family_only() {
        let mut direct = DirectCandidates::default();
        let local = addr("10.0.0.2:1");
        let local6 = addr("[2001:db8::2]:1");
        direct.replace(relay(1), local, Some(addr("203.0.113.9:1")));
        direct.replace(relay(1), local6, None);
        let fresh = direct.replace(relay(1), local, Some(addr("203.0.113.9:2")));
        assert_eq!(
            kinds(&fresh),
            [(CandidateKind::ServerReflexive, addr("203.0.113.9:2"))]
        );
        assert_eq!(
            kinds(&direct.distinct()),
            [
                (CandidateKind::Host, local6),
                (CandidateKind::Host, local),
                (CandidateKind::ServerReflexive, addr("203.0.113.9:2")),
            ]
        );
    }

    #[test]
    fn candidates_outlive_the_last_relay_of_their_family() {
        let mut direct = DirectCandidates::default();
        let local = addr("10.0.0.2:1");
        direct.replace(relay(1), local, Some(addr("203.0.113.9:1")));
        direct.replace(relay(2), local, Some(addr("203.0.113.9:2")));
        direct.orphan(relay(1));
        assert_eq!(direct.distinct().len(), 2, "relay 2 speaks for the family");
        direct.orphan(relay(2));
        assert_eq!(direct.distinct().len(), 2, "nobody contradicts");
        direct.replace(relay(3), addr("10.0.0.3:1"), None);
        assert_eq!(
            kinds(&direct.distinct()),
            [(CandidateKind::Host, addr("10.0.0.3:1"))]
        );
    }

    #[test]
    fn addresses_that_no_peer_can_use_are_not_candidates() {
        for bad in [
            "169.254.1.1:1",
            "0.0.0.0:1",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "192.0.2.1:0",
            "127.0.0.1:1",
            "[::]:1",
            "[::1]:1",
            "[ff02::1]:1",
            "[fe80::1]:1",
            "[febf::1]:1",
            "[fec0::1]:1",
            "[::ffff:192.0.2.1]:1",
            "[::192.0.2.1]:1",
            "[2001:db8::1]:0",
        ] {
            assert!(!is_valid_candidate(addr(bad)), "{bad}");
        }
        for good in [
            "192.0.2.1:1",
            "10.0.0.1:1",
            "[2001:db8::1]:1",
            "[fd00::1]:1",
            "[64:ff9b::192.0.2.1]:1",
        ] {
            assert!(is_valid_candidate(addr(good)), "{good}");
        }
    }
}
