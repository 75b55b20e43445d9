//! Hosts, sites with their routers, and the internet between them, in virtual time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::nat::Nat;

pub(super) type HostId = usize;
pub(super) type SiteId = usize;

/// Where the TURN servers listen.
pub(super) const RELAY_PORT: u16 = 3478;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Datagram {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) payload: Vec<u8>,
}

/// What a site's access is like, each way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Line {
    pub(super) delay: Duration,
    /// Up to so much more, for each datagram anew: later ones overtake.
    pub(super) jitter: Duration,
    /// Share of datagrams that are lost.
    pub(super) loss: f64,
}

/// A network with its hosts, and its access to the internet.
#[derive(Debug, Clone)]
pub(super) struct Site {
    pub(super) nat: Option<Nat>,
    /// IPv6 is let in only as an answer.
    pub(super) stateful_v6: bool,
    /// Lets out only what goes to relays.
    pub(super) only_relays: bool,
    /// Hosts inside cannot reach one another directly.
    pub(super) isolates: bool,
    pub(super) line: Line,
    answers_v6: HashMap<(SocketAddr, SocketAddr), Instant>,
}

impl Site {
    pub(super) fn new(line: Line) -> Self {
        Self {
            nat: None,
            stateful_v6: false,
            only_relays: false,
            isolates: false,
            line,
            answers_v6: HashMap::new(),
        }
    }
}

#[derive(Debug, Clone)]
struct Host {
    addresses: Vec<IpAddr>,
    site: SiteId,
}

/// Where a datagram is after its delay.
#[derive(Debug, Clone)]
enum Arrival {
    /// At the edge of whichever site it is for.
    Edge,
    Host(HostId),
}

#[derive(Debug, Clone)]
pub(super) struct Network {
    seed: u64,
    hosts: Vec<Host>,
    pub(super) sites: Vec<Site>,
    /// Hosts that cannot reach each other without a relay in between.
    cut: HashSet<(HostId, HostId)>,
    /// Hosts that nothing reaches.
    down: HashSet<HostId>,
    queue: BTreeMap<(Instant, u64), (HostId, Arrival, Datagram)>,
    sent: u64,
    /// How many datagrams went from a host to an address; each has its own luck.
    pairs: HashMap<(HostId, SocketAddr), u64>,
}

/// How long a stateful firewall waits for an answer.
const ANSWER_TIME: Duration = Duration::from_secs(60);

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            hosts: Vec::new(),
            sites: Vec::new(),
            cut: HashSet::new(),
            down: HashSet::new(),
            queue: BTreeMap::new(),
            sent: 0,
            pairs: HashMap::new(),
        }
    }

    pub(super) fn add_site(&mut self, site: Site) -> SiteId {
        self.sites.push(site);
        self.sites.len() - 1
    }

    pub(super) fn add_host(&mut self, site: SiteId, addresses: Vec<IpAddr>) -> HostId {
        self.hosts.push(Host { addresses, site });
        self.hosts.len() - 1
    }

    /// The address that a host uses towards others.
    pub(super) fn address(&self, host: HostId, v4: bool) -> Option<IpAddr> {
        let addresses = &self.hosts[host].addresses;
        addresses.iter().copied().find(|a| a.is_ipv4() == v4)
    }

    pub(super) fn site_of(&self, host: HostId) -> SiteId {
        self.hosts[host].site
    }

    /// Takes the direct way between two hosts, or gives it back.
    pub(super) fn set_cut(&mut self, a: HostId, b: HostId, cut: bool) {
        for pair in [(a, b), (b, a)] {
            if cut {
                self.cut.insert(pair);
            } else {
                self.cut.remove(&pair);
            }
        }
    }

    /// Nothing reaches a host any more, or it is back.
    pub(super) fn set_down(&mut self, host: HostId, down: bool) {
        if down {
            self.down.insert(host);
        } else {
            self.down.remove(&host);
        }
    }

    /// Sends a datagram; without `source` the kernel chooses. What cannot be routed is lost.
    pub(super) fn send(
        &mut self,
        now: Instant,
        host: HostId,
        source: Option<IpAddr>,
        port: u16,
        to: SocketAddr,
        payload: Vec<u8>,
    ) {
        let Some(ip) = source.or_else(|| self.address(host, to.is_ipv4())) else {
            return;
        };
        if !self.hosts[host].addresses.contains(&ip) || ip.is_ipv4() != to.is_ipv4() {
            return;
        }
        let from = SocketAddr::new(ip, port);
        let id = self.hosts[host].site;
        let datagram = Datagram { from, to, payload };
        // A relay talks to itself, and whoever has the same private address as the other one does.
        if self.hosts[host].addresses.contains(&to.ip()) {
            let soon = now + Duration::from_micros(50);
            return self.enqueue(soon, host, Arrival::Host(host), datagram);
        }
        if let Some(neighbour) = self.neighbour(id, to.ip()) {
            if !self.sites[id].isolates {
                let soon = now + Duration::from_millis(1);
                self.enqueue(soon, host, Arrival::Host(neighbour), datagram);
            }
            return;
        }
        let private = matches!(to.ip(), IpAddr::V4(ip) if ip.is_private());
        let site = &mut self.sites[id];
        if private || (site.only_relays && to.port() != RELAY_PORT) {
            return;
        }
        let from = match &mut site.nat {
            Some(nat) if to.is_ipv4() => nat.outbound(now, from, to),
            _ => from,
        };
        if to.is_ipv6() && site.stateful_v6 {
            site.answers_v6.insert((from, to), now);
        }
        let line = site.line;
        let (lost, more) = self.luck(host, to, &line, &datagram.payload);
        if !lost {
            let at = now + line.delay + more;
            self.enqueue(at, host, Arrival::Edge, Datagram { from, ..datagram });
        }
    }

    fn neighbour(&self, site: SiteId, ip: IpAddr) -> Option<HostId> {
        self.hosts
            .iter()
            .position(|h| h.site == site && h.addresses.contains(&ip))
    }

    /// Whether a datagram is lost, and how much later than others it comes. Depends on nothing but
    /// the seed and how many went the same way before.
    fn luck(
        &mut self,
        host: HostId,
        to: SocketAddr,
        line: &Line,
        payload: &[u8],
    ) -> (bool, Duration) {
        let count = self.pairs.entry((host, to)).or_default();
        *count += 1;
        let dice = foldhash::fast::FixedState::with_seed(self.seed).hash_one((host, to, *count));
        let share = |bits: u64| bits as f64 / f64::from(u32::MAX);
        (
            share(dice & 0xffff_ffff) < line.loss && !is_handshake(payload),
            line.jitter.mul_f64(share(dice >> 32)),
        )
    }

    fn enqueue(&mut self, at: Instant, sender: HostId, arrival: Arrival, datagram: Datagram) {
        self.sent += 1;
        self.queue
            .insert((at, self.sent), (sender, arrival, datagram));
    }

    /// Forgets all that is under way.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
    }

    /// When the next datagram arrives somewhere.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    /// A datagram that arrives at a host by now.
    pub(super) fn poll(&mut self, now: Instant) -> Option<(HostId, Datagram)> {
        loop {
            let entry = self.queue.first_entry()?;
            if entry.key().0 > now {
                return None;
            }
            let (sender, arrival, datagram) = entry.remove();
            let host = match arrival {
                Arrival::Host(host) => Some((host, datagram)),
                Arrival::Edge => self.enter(now, sender, datagram),
            };
            if let Some((host, datagram)) = host
                && !self.down.contains(&host)
                && !self.down.contains(&sender)
                && !self.cut.contains(&(sender, host))
            {
                return Some((host, datagram));
            }
        }
    }

    /// Lets a datagram from the internet into the site that it is for.
    fn enter(
        &mut self,
        now: Instant,
        sender: HostId,
        mut datagram: Datagram,
    ) -> Option<(HostId, Datagram)> {
        let Datagram { from, to, .. } = datagram;
        let behind = self
            .sites
            .iter()
            .position(|s| s.nat.as_ref().is_some_and(|n| n.public == to.ip()));
        let site = match behind {
            Some(site) => {
                let nat = self.sites[site].nat.as_ref()?;
                if self.hosts[sender].site == site && !nat.behaviour.hairpins {
                    return None;
                }
                datagram.to = nat.inbound(now, from, to.port())?;
                site
            }
            None => {
                let host = self.hosts.iter().find(|h| {
                    h.addresses.contains(&to.ip())
                        && (to.is_ipv6() || self.sites[h.site].nat.is_none())
                })?;
                host.site
            }
        };
        let allowed = &self.sites[site];
        if to.is_ipv6()
            && allowed.stateful_v6
            && allowed
                .answers_v6
                .get(&(to, from))
                .is_none_or(|at| now >= *at + ANSWER_TIME)
        {
            return None;
        }
        if allowed.only_relays && from.port() != RELAY_PORT {
            return None;
        }
        let host = self.neighbour(site, datagram.to.ip())?;
        let line = self.sites[site].line;
        let (lost, more) = self.luck(host, from, &line, &datagram.payload);
        if lost {
            return None;
        }
        if line.delay + more > Duration::ZERO {
            let at = now + line.delay + more;
            self.enqueue(at, sender, Arrival::Host(host), datagram);
            return None;
        }
        Some((host, datagram))
    }
}

/// WireGuard handshakes are not lost by chance: boringtun repeats them by a clock of its own, which
/// stands still here.
fn is_handshake(payload: &[u8]) -> bool {
    let inner = match payload {
        [64..=79, _, _, _, inner @ ..] => inner,
        all => all,
    };
    matches!(inner, [1..=3, 0, 0, 0, ..])
}
