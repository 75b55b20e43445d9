//! A NAT router for UDP in the terms of RFC 4787.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// What a mapping or a filter depends on (RFC 4787 §4.1, §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Scope {
    /// Nothing: endpoint-independent.
    Any,
    /// The remote address.
    Address,
    /// The remote address and port. As a mapping it is called symmetric.
    AddressAndPort,
}

/// How a router behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Behaviour {
    pub(super) mapping: Scope,
    pub(super) filtering: Scope,
    /// Keeps the internal port where it is free (§4.2.1). Where mappings depend on the remote end a
    /// port is free unless the same remote end is meant: Linux does so.
    pub(super) preserves_ports: bool,
    /// Lets hosts inside talk through the public address (§6).
    pub(super) hairpins: bool,
}

/// A mapping without outbound traffic for so long is gone; home routers take 30 s to 300 s.
const LIFETIME: Duration = Duration::from_secs(40);

#[derive(Debug, Clone)]
struct Mapping {
    internal: SocketAddr,
    /// What of the remote side the mapping is for.
    remote: (Option<IpAddr>, Option<u16>),
    external: u16,
    /// Whom datagrams went to, and when last.
    contacted: HashMap<SocketAddr, Instant>,
}

impl Mapping {
    fn alive(&self, now: Instant) -> bool {
        self.contacted.values().any(|at| now < *at + LIFETIME)
    }

    fn lets_in(&self, now: Instant, filtering: Scope, from: SocketAddr) -> bool {
        let mut known = self
            .contacted
            .iter()
            .filter(|(_, at)| now < **at + LIFETIME)
            .map(|(remote, _)| remote);
        match filtering {
            Scope::Any => known.next().is_some(),
            Scope::Address => known.any(|remote| remote.ip() == from.ip()),
            Scope::AddressAndPort => known.any(|remote| *remote == from),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Nat {
    pub(super) behaviour: Behaviour,
    pub(super) public: IpAddr,
    mappings: Vec<Mapping>,
    next_port: u16,
}

impl Nat {
    pub(super) fn new(behaviour: Behaviour, public: IpAddr) -> Self {
        Self {
            behaviour,
            public,
            mappings: Vec::new(),
            next_port: 20_000,
        }
    }

    /// Forgets every mapping, and gives other ports from now on, as a router that was restarted.
    pub(super) fn restart(&mut self) {
        self.mappings.clear();
        self.next_port += 1000;
    }

    /// The source address under which a datagram leaves.
    pub(super) fn outbound(
        &mut self,
        now: Instant,
        internal: SocketAddr,
        to: SocketAddr,
    ) -> SocketAddr {
        self.mappings.retain(|m| m.alive(now));
        let remote = match self.behaviour.mapping {
            Scope::Any => (None, None),
            Scope::Address => (Some(to.ip()), None),
            Scope::AddressAndPort => (Some(to.ip()), Some(to.port())),
        };
        let known = self
            .mappings
            .iter()
            .position(|m| m.internal == internal && m.remote == remote);
        let at = known.unwrap_or_else(|| {
            let external = self.free_port(internal.port(), remote);
            self.mappings.push(Mapping {
                internal,
                remote,
                external,
                contacted: HashMap::new(),
            });
            self.mappings.len() - 1
        });
        let mapping = &mut self.mappings[at];
        mapping.contacted.insert(to, now);
        SocketAddr::new(self.public, mapping.external)
    }

    fn free_port(&mut self, wanted: u16, remote: (Option<IpAddr>, Option<u16>)) -> u16 {
        let taken = |port| self.mappings.iter().any(|m| m.external == port);
        let clashes = |m: &Mapping| m.external == wanted && m.remote == remote;
        if self.behaviour.preserves_ports && !self.mappings.iter().any(clashes) {
            return wanted;
        }
        let mut port = self.next_port;
        while taken(port) {
            port += 1;
        }
        self.next_port = port + 1;
        port
    }

    /// Whom a datagram from outside is for, if it is let in.
    pub(super) fn inbound(
        &self,
        now: Instant,
        from: SocketAddr,
        external: u16,
    ) -> Option<SocketAddr> {
        self.mappings
            .iter()
            .find(|m| m.external == external && m.lets_in(now, self.behaviour.filtering, from))
            .map(|m| m.internal)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const INSIDE: &str = "192.168.0.2:52625";

    fn sock(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn nat(mapping: Scope, filtering: Scope) -> Nat {
        let behaviour = Behaviour {
            mapping,
            filtering,
            preserves_ports: false,
            hairpins: false,
        };
        Nat::new(behaviour, "203.0.113.7".parse().unwrap())
    }

    /// Whether three remote ends see one address: (same host, another port; another host).
    fn sees_same(mapping: Scope) -> (bool, bool) {
        let now = Instant::now();
        let mut nat = nat(mapping, Scope::Any);
        let mut out = |to| nat.outbound(now, sock(INSIDE), sock(to));
        let first = out("198.51.100.1:1");
        assert_eq!(first, out("198.51.100.1:1"));
        (
            first == out("198.51.100.1:2"),
            first == out("198.51.100.2:1"),
        )
    }

    #[test]
    fn mappings_depend_on_what_they_are_said_to_depend_on() {
        assert_eq!(sees_same(Scope::Any), (true, true));
        assert_eq!(sees_same(Scope::Address), (true, false));
        assert_eq!(sees_same(Scope::AddressAndPort), (false, false));
    }

    #[test]
    fn filters_depend_on_what_they_are_said_to_depend_on() {
        let now = Instant::now();
        for (filtering, expected) in [
            (Scope::Any, [true, true, true]),
            (Scope::Address, [true, true, false]),
            (Scope::AddressAndPort, [true, false, false]),
        ] {
            let mut nat = nat(Scope::Any, filtering);
            let port = nat
                .outbound(now, sock(INSIDE), sock("198.51.100.1:1"))
                .port();
            let let_in = ["198.51.100.1:1", "198.51.100.1:2", "198.51.100.2:1"]
                .map(|from| nat.inbound(now, sock(from), port) == Some(sock(INSIDE)));
            assert_eq!(let_in, expected, "{filtering:?}");
            let late = now + LIFETIME;
            assert_eq!(nat.inbound(late, sock("198.51.100.1:1"), port), None);
        }
    }

    #[test]
    fn a_port_is_kept_where_it_is_free() {
        let now = Instant::now();
        let mut nat = nat(Scope::AddressAndPort, Scope::AddressAndPort);
        nat.behaviour.preserves_ports = true;
        let mut out = |inside, to| nat.outbound(now, sock(inside), sock(to)).port();
        assert_eq!(out(INSIDE, "198.51.100.1:1"), 52625);
        assert_eq!(out(INSIDE, "198.51.100.1:2"), 52625);
        assert_ne!(out("192.168.0.3:52625", "198.51.100.1:1"), 52625);
        let inside = nat.inbound(now, sock("198.51.100.1:2"), 52625);
        assert_eq!(inside, Some(sock(INSIDE)));
    }
}
