//! The best kind of path that a network allows, found without ICE: both ends try everything that
//! they can know from everywhere, in a network without delay, and whatever is answered from where
//! it was asked counts.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::network::{Datagram, HostId, Line, Network, RELAY_PORT};
use super::world::PORT;
use crate::datapath::peers::PathKind;

/// From where one end can send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    gateway: bool,
    /// The relay's host if it lends the address.
    relay: Option<HostId>,
    address: SocketAddr,
}

struct Side {
    host: HostId,
    ends: Vec<End>,
    /// What the other one is told.
    signalled: BTreeSet<SocketAddr>,
    hosts: BTreeSet<SocketAddr>,
    reflexive: BTreeSet<SocketAddr>,
    relayed: BTreeSet<SocketAddr>,
    /// Where the other one may be.
    known: BTreeSet<SocketAddr>,
    /// To whom its relays forward.
    channels: BTreeSet<SocketAddr>,
}

pub(super) struct Question<'a> {
    pub(super) network: &'a Network,
    pub(super) relays: &'a [HostId],
    pub(super) gateway: HostId,
    pub(super) client: HostId,
    /// The client takes one allocation per relay, in its first family.
    pub(super) one_allocation: bool,
    /// Other clients behind the client's router.
    pub(super) neighbours: &'a [HostId],
    /// Leaves out addresses that a relay lends in another family than it is reached by: by their
    /// priority (data-path spec §2.3) such a way is worse than one through two relays. And lets
    /// the neighbours have the ports that they would like.
    pub(super) worst: bool,
}

/// Best first; `None` if there is no way at all. The two kinds with one relay are equally good.
pub(super) fn rank(kind: Option<PathKind>) -> u8 {
    match kind {
        Some(PathKind::Direct) => 0,
        Some(PathKind::RelayLocal | PathKind::RelayRemote) => 1,
        Some(PathKind::RelayBoth) => 2,
        None => 3,
    }
}

/// The best kind of path that there is.
pub(super) fn best(question: &Question<'_>) -> Option<PathKind> {
    let mut network = question.network.clone();
    network.clear();
    for site in &mut network.sites {
        site.line = Line {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
        };
    }
    let mut prober = Prober {
        now: Instant::now(),
        network,
    };
    let mut gateway = prober.side(question, true);
    let mut client = prober.side(question, false);
    if question.worst {
        prober.prime(question.neighbours, &gateway);
    }
    tell(&gateway, &mut client, false);
    tell(&client, &mut gateway, true);
    let mut found = BTreeSet::new();
    for _ in 0..4 {
        for gateway_asks in [false, true] {
            prober.round(&mut gateway, &mut client, gateway_asks, &mut found);
        }
    }
    found
        .into_iter()
        .map(|(ours, theirs)| PathKind::of(ours, theirs))
        .min_by_key(|kind| rank(Some(*kind)))
}

/// What one end learns of the other through the portal (data-path spec §2.3).
fn tell(from: &Side, to: &mut Side, to_gateway: bool) {
    to.known.extend(&from.signalled);
    let guesses: Vec<SocketAddr> = from
        .hosts
        .iter()
        .filter(|host| host.is_ipv4())
        .flat_map(|host| {
            from.reflexive
                .iter()
                .filter(|public| public.is_ipv4())
                .map(|public| SocketAddr::new(public.ip(), host.port()))
        })
        .collect();
    to.known.extend(&guesses);
    to.channels.extend(&guesses);
    to.channels.extend(&from.reflexive);
    to.channels.extend(&from.relayed);
    if to_gateway {
        let public = |host: &&SocketAddr| match host.ip() {
            IpAddr::V4(ip) => !ip.is_private(),
            IpAddr::V6(_) => true,
        };
        to.channels.extend(from.hosts.iter().filter(public));
    }
}

struct Prober {
    now: Instant,
    network: Network,
}

const ASK: u8 = 0;
const ANSWER: u8 = 1;

impl Prober {
    fn side(&mut self, question: &Question<'_>, gateway: bool) -> Side {
        let host = if gateway {
            question.gateway
        } else {
            question.client
        };
        let mut side = Side {
            host,
            ends: Vec::new(),
            signalled: BTreeSet::new(),
            hosts: BTreeSet::new(),
            reflexive: BTreeSet::new(),
            relayed: BTreeSet::new(),
            known: BTreeSet::new(),
            channels: BTreeSet::new(),
        };
        for v4 in [true, false] {
            if let Some(ip) = self.network.address(host, v4) {
                let address = SocketAddr::new(ip, PORT);
                side.hosts.insert(address);
                side.ends.push(End {
                    gateway,
                    relay: None,
                    address,
                });
            }
        }
        let mut lent = Vec::new();
        for relay in question.relays {
            let mut families = Vec::new();
            for v4 in [true, false] {
                if let Some(seen) = self.reaches(host, *relay, v4) {
                    side.reflexive.insert(seen);
                    families.push(v4);
                }
            }
            if families.is_empty() {
                continue;
            }
            if gateway && question.worst {
                // Whichever socket answered first was taken.
                if families.len() > 1 {
                    families.clear();
                }
            } else if gateway {
                // One allocation covers all families that the relay has.
                families = [true, false]
                    .into_iter()
                    .filter(|v4| self.network.address(*relay, *v4).is_some())
                    .collect();
            } else if question.one_allocation {
                families.truncate(1);
            }
            for v4 in families {
                let ip = self.network.address(*relay, v4).expect("it has the family");
                let port = if gateway { 60_000 } else { 60_001 };
                lent.push(End {
                    gateway,
                    relay: Some(*relay),
                    address: SocketAddr::new(ip, port),
                });
            }
            if !gateway {
                // A client uses the nearest.
                break;
            }
        }
        side.relayed.extend(lent.iter().map(|end| end.address));
        side.ends.extend(lent);
        side.signalled = &(&side.hosts | &side.reflexive) | &side.relayed;
        side
    }

    /// Lets others talk to the gateway first.
    fn prime(&mut self, hosts: &[HostId], gateway: &Side) {
        for host in hosts {
            for end in &gateway.signalled {
                self.network
                    .send(self.now, *host, None, PORT, *end, vec![ANSWER]);
            }
        }
        while self.next().is_some() {}
    }

    /// How a relay sees a host, if both ways work.
    fn reaches(&mut self, host: HostId, relay: HostId, v4: bool) -> Option<SocketAddr> {
        let ip = self.network.address(relay, v4)?;
        let socket = SocketAddr::new(ip, RELAY_PORT);
        self.network
            .send(self.now, host, None, PORT, socket, vec![ASK]);
        let (at, datagram) = self.next()?;
        let seen = datagram.from;
        if at != relay {
            return None;
        }
        self.network
            .send(self.now, relay, Some(ip), RELAY_PORT, seen, vec![ANSWER]);
        let (at, _) = self.next()?;
        (at == host).then_some(seen)
    }

    fn next(&mut self) -> Option<(HostId, Datagram)> {
        self.now += Duration::from_millis(2);
        self.network.poll(self.now)
    }

    fn send(&mut self, side: &Side, end: &End, to: SocketAddr, payload: Vec<u8>) {
        if end.address.is_ipv4() != to.is_ipv4() {
            return;
        }
        let host = match end.relay {
            None => side.host,
            Some(_) if !side.channels.contains(&to) => return,
            Some(relay) => relay,
        };
        let (ip, port) = (end.address.ip(), end.address.port());
        self.network
            .send(self.now, host, Some(ip), port, to, payload);
    }

    fn round(
        &mut self,
        gateway: &mut Side,
        client: &mut Side,
        gateway_asks: bool,
        found: &mut BTreeSet<(bool, bool)>,
    ) {
        let asking = if gateway_asks { &*gateway } else { &*client };
        let targets: Vec<(End, SocketAddr)> = asking
            .ends
            .iter()
            .flat_map(|end| asking.known.iter().map(|to| (*end, *to)))
            .collect();
        for (end, to) in targets {
            let asking = if gateway_asks { &*gateway } else { &*client };
            self.send(asking, &end, to, vec![ASK]);
            let mut asked_at: Option<End> = None;
            while let Some((host, datagram)) = self.next() {
                let Some(receiver) = whose(gateway, client, host, &datagram) else {
                    continue;
                };
                if datagram.payload == [ASK] {
                    if receiver.gateway == gateway_asks {
                        // It reached somebody else, perhaps itself.
                        continue;
                    }
                    asked_at = Some(receiver);
                    let side = if receiver.gateway {
                        &mut *gateway
                    } else {
                        &mut *client
                    };
                    side.known.insert(datagram.from);
                    self.send(side, &receiver, datagram.from, vec![ANSWER]);
                } else if receiver == end && datagram.from == to && !gateway_asks {
                    let ours = asked_at.is_some_and(|at| at.relay.is_some());
                    found.insert((ours, end.relay.is_some()));
                }
            }
        }
    }
}

/// The end that a datagram is for, if it gets there.
fn whose(gateway: &Side, client: &Side, host: HostId, datagram: &Datagram) -> Option<End> {
    [gateway, client].into_iter().find_map(|side| {
        side.ends.iter().copied().find(|end| match end.relay {
            None => host == side.host && end.address == datagram.to,
            Some(relay) => {
                host == relay
                    && end.address == datagram.to
                    && side.channels.contains(&datagram.from)
            }
        })
    })
}
