//! Entry points of the fuzz targets in `fuzz/`. The committed corpus goes through them as a test.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::VecDeque;

use is::stun::StunPacket;
use is::{Candidate, IceAgent, Protocol};
use secrecy::SecretString;
use uuid::Uuid;

use super::fixtures::{agent_of, creds, sock};
use super::relay::double::{CHANNEL_BIND, PASSWORD, Style, TurnServer, USER};
pub use super::relay::fuzzing::{channel_data, stun, turn_client};
use super::*;
use crate::datapath::worker::established;
use crate::fuzzing::Script;

const HOSTS: [&str; 2] = ["198.51.100.1:52625", "[2001:db8:1::1]:52625"];
/// The gateway as relays see it when it is behind a NAT.
const MAPPED: &str = "203.0.113.77:41000";
const RELAYS: [&str; 2] = ["192.0.2.1:3478", "192.0.2.2:3478"];
const RELAYED: [&str; 2] = ["192.0.2.101", "192.0.2.102"];
const STRANGERS: [&str; 3] = ["203.0.113.200:1", "192.0.2.1:50000", "[2001:db8::bad]:3478"];
const CLIENTS: usize = 3;

/// Datagrams that are kept to be delivered later, or once more.
const MAX_POOL: usize = 128;
/// What one call may send: an answer and two rounds of checks of every pair, for each client.
const MAX_BURST: usize = CLIENTS * 250;

#[derive(Clone, Debug)]
struct Datagram {
    /// Our address, or the client's.
    local: SocketAddr,
    remote: SocketAddr,
    bytes: Vec<u8>,
}

struct Client {
    id: ClientId,
    agent: IceAgent,
    ours: IceCredentials,
    theirs: IceCredentials,
    addresses: Vec<SocketAddr>,
    /// Whether the gateway serves it.
    present: bool,
}

fn entry(n: usize) -> RelayEntry {
    RelayEntry {
        id: RelayId(Uuid::from_u128(n as u128 + 1)),
        v4: Some(sock(RELAYS[n])),
        v6: None,
        username: USER.to_owned(),
        password: SecretString::from(PASSWORD),
        expires_at: 2_145_916_800,
    }
}

fn addresses(n: usize) -> Vec<SocketAddr> {
    vec![
        sock(&format!("203.0.113.{}:40000", 9 + n)),
        sock(&format!("10.9.0.{}:40000", 9 + n)),
        sock(&format!("[2001:db8:2::{}]:40000", 9 + n)),
    ]
}

struct World {
    start: Instant,
    now: Instant,
    gateway: Connectivity,
    mapped: SocketAddr,
    servers: Vec<TurnServer>,
    clients: Vec<Client>,
    /// On their way to the gateway, to relays and to clients.
    to_gateway: VecDeque<Datagram>,
    to_relays: VecDeque<Datagram>,
    to_clients: VecDeque<Datagram>,
    /// All that went to the gateway.
    past: VecDeque<Datagram>,
    signals: VecDeque<(ClientId, bool, Vec<String>)>,
    events: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let mut gateway = Connectivity::new(seed);
        gateway.add_host(now, sock(HOSTS[0]));
        let client = |n: usize| {
            let theirs = creds(&format!("c{n}"));
            let ours = creds(&format!("g{n}"));
            Client {
                id: ClientId(Uuid::from_u128(n as u128 + 1)),
                agent: agent_of(&theirs, &ours),
                ours,
                theirs,
                addresses: addresses(n),
                present: false,
            }
        };
        let mut world = Self {
            start: now,
            now,
            gateway,
            mapped: sock(HOSTS[0]),
            servers: (0..RELAYS.len())
                .map(|n| TurnServer::new(Style::Stock, &[RELAYS[n]], &[RELAYED[n]]))
                .collect(),
            clients: (0..CLIENTS).map(client).collect(),
            to_gateway: VecDeque::new(),
            to_relays: VecDeque::new(),
            to_clients: VecDeque::new(),
            past: VecDeque::new(),
            signals: VecDeque::new(),
            events: 0,
        };
        (0..CLIENTS).for_each(|n| world.restart_client(n));
        world
    }

    /// A client's agent starts over, with the credentials that it has.
    fn restart_client(&mut self, n: usize) {
        let client = &mut self.clients[n];
        client.agent = agent_of(&client.theirs, &client.ours);
        for address in &client.addresses {
            let host = Candidate::host(*address, "udp").unwrap();
            client.agent.add_local_candidate(host);
        }
        client.agent.handle_timeout(self.now);
    }

    /// What the portal does when a client asks for access.
    fn authorize(&mut self, n: usize, replace: bool) -> Upsert {
        let client = &mut self.clients[n];
        client.present = true;
        let upsert =
            self.gateway
                .upsert(self.now, client.id, &client.ours, &client.theirs, replace);
        self.settle();
        upsert
    }

    fn offer(&mut self, n: usize) {
        let client = &self.clients[n];
        let lines: Vec<String> = client
            .agent
            .local_candidates()
            .map(|c| c.to_sdp_string())
            .collect();
        self.gateway
            .add_remote_candidates(self.now, client.id, &lines);
        self.settle();
    }

    /// Takes everything out of the gateway, and looks whether it makes sense.
    fn settle(&mut self) {
        let mut burst = 0;
        while let Some(transmit) = self.gateway.poll_transmit() {
            burst += 1;
            let to_relay = RELAYS.contains(&&*transmit.destination.to_string());
            match transmit.source {
                Some(ip) => assert!(
                    HOSTS.iter().any(|host| sock(host).ip() == ip),
                    "sends as {ip}"
                ),
                None => assert!(to_relay, "{} is no relay", transmit.destination),
            }
            let payload = &transmit.payload;
            assert!(is_stun(payload) || matches!(payload[0], 64..=79));
            let local = match transmit.source {
                Some(ip) => SocketAddr::new(ip, sock(HOSTS[0]).port()),
                None => self.mapped,
            };
            let queue = if to_relay {
                &mut self.to_relays
            } else {
                &mut self.to_clients
            };
            push(
                queue,
                Datagram {
                    local: transmit.destination,
                    remote: local,
                    bytes: transmit.payload,
                },
            );
        }
        assert!(burst <= MAX_BURST, "{burst} datagrams at once");
        assert_eq!(self.gateway.relays.poll_transmit(), None, "left behind");
        while let Some(event) = self.gateway.poll_event() {
            self.events += 1;
            self.event(event);
        }
        self.check();
    }

    fn event(&mut self, event: Event) {
        let client = match &event {
            Event::CandidatesAdded { client, .. }
            | Event::CandidatesInvalidated { client, .. }
            | Event::PathChanged { client, .. }
            | Event::Failed { client, .. } => {
                let known = self.clients.iter_mut().find(|c| c.id == *client);
                let known = known.expect("a client of ours");
                assert!(known.present, "{event:?} after the end");
                Some(known)
            }
            _ => None,
        };
        match event {
            Event::CandidatesAdded { client, candidates } => {
                let priorities: Vec<u32> = candidates
                    .iter()
                    .map(|line| Candidate::from_sdp_string(line).unwrap().prio())
                    .collect();
                assert!(priorities.is_sorted_by(|a, b| a >= b), "{candidates:?}");
                push(&mut self.signals, (client, true, candidates));
            }
            Event::CandidatesInvalidated { client, candidates } => {
                push(&mut self.signals, (client, false, candidates));
            }
            Event::Failed { client: id, .. } => {
                client.unwrap().present = false;
                assert_eq!(self.gateway.describe(id), None);
            }
            Event::PathChanged {
                path: Some(path), ..
            } => {
                assert_eq!(path.channel.is_some(), path.source.is_none());
                if path.channel.is_some() {
                    assert!(RELAYS.contains(&&*path.destination.to_string()));
                }
            }
            Event::PathChanged { path: None, .. } => {}
            Event::RelaySocketsChanged(sockets) => {
                let known = |s: &SocketAddr| RELAYS.contains(&&*s.to_string());
                assert!(sockets.iter().all(known));
            }
            Event::LastRelayLost | Event::RelayAllocated(_) | Event::RelayEpisode(_) => {}
        }
    }

    /// What must hold at any time.
    fn check(&self) {
        let gateway = &self.gateway;
        for client in &self.clients {
            let connection = gateway.connections.get(&client.id);
            assert_eq!(connection.is_some(), client.present);
        }
        let named: usize = gateway.by_ufrag.values().map(Vec::len).sum();
        assert_eq!(named, gateway.connections.len());
        for (ufrag, clients) in &gateway.by_ufrag {
            assert!(!clients.is_empty());
            let named = |id| gateway.connections[id].local_ufrag() == ufrag;
            assert!(clients.iter().all(named));
        }
        for (ends, client) in &gateway.owners {
            let connection = gateway.connections.get(client).expect("owned by nobody");
            assert!(
                connection.ends().any(|e| e == *ends),
                "forgotten, but owned"
            );
        }
        assert!(gateway.checks.len() <= gateway.check_order.len());
        assert!(gateway.hosts.len() <= HOSTS.len());
        for local in HOSTS.map(sock) {
            for remote in self.clients.iter().flat_map(|c| &c.addresses) {
                let owner = gateway.owner_of(self.now, local, *remote);
                assert!(owner.is_none_or(|id| gateway.connections.contains_key(&id)));
            }
        }
    }

    /// Lets time pass at once, as if the machine had been asleep.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        for round in 0.. {
            self.gateway.handle_timeout(self.now);
            self.settle();
            let next = self.gateway.poll_timeout().map(|(at, _)| at);
            if next.is_none_or(|at| at > self.now) {
                break;
            }
            assert!(round < 4, "due at once again and again");
        }
        for client in &mut self.clients {
            client.agent.handle_timeout(self.now);
        }
        self.drain_clients();
    }

    fn drain_clients(&mut self) {
        for client in &mut self.clients {
            while let Some(transmit) = client.agent.poll_transmit() {
                let bytes: Vec<u8> = transmit.contents.into();
                let (from, to) = (transmit.source, transmit.destination);
                if HOSTS.contains(&&*to.to_string()) || to == self.mapped {
                    push(
                        &mut self.to_gateway,
                        Datagram {
                            local: sock(HOSTS[usize::from(to.is_ipv6())]),
                            remote: from,
                            bytes,
                        },
                    );
                } else if let Some(n) = RELAYED.iter().position(|ip| *ip == to.ip().to_string())
                    && !self.servers[n].silent
                    && let Some((_, bytes)) = self.servers[n].packet_from(self.now, from, &bytes)
                {
                    push(
                        &mut self.to_gateway,
                        Datagram {
                            local: sock(HOSTS[0]),
                            remote: sock(RELAYS[n]),
                            bytes,
                        },
                    );
                }
            }
            while client.agent.poll_event().is_some() {}
        }
    }

    fn arrive(&mut self, datagram: &Datagram) -> Inbound {
        let Datagram {
            local,
            remote,
            bytes,
        } = datagram;
        let inbound = self.gateway.handle_packet(self.now, *local, *remote, bytes);
        if let Inbound::WireGuard {
            local: to,
            remote: from,
            payload,
        } = &inbound
        {
            let message = bytes.get(payload.clone()).expect("within the datagram");
            assert!(!is_stun(message), "STUN");
            if !RELAYS.contains(&&*remote.to_string()) {
                assert_eq!((to, from, payload), (local, remote, &(0..bytes.len())));
            }
        }
        self.settle();
        inbound
    }

    fn deliver_to_gateway(&mut self, at: usize) {
        if let Some(datagram) = self.to_gateway.remove(at) {
            self.arrive(&datagram);
            push(&mut self.past, datagram);
            self.drain_clients();
        }
    }

    fn deliver_to_relay(&mut self, at: usize) {
        let Some(datagram) = self.to_relays.remove(at) else {
            return;
        };
        let n = (0..RELAYS.len())
            .find(|n| sock(RELAYS[*n]) == datagram.local)
            .unwrap();
        let server = &mut self.servers[n];
        let answer = server.handle(self.now, datagram.remote, datagram.local, &datagram.bytes);
        let forwarded = std::mem::take(&mut server.forwarded);
        if let Some(bytes) = answer {
            push(
                &mut self.to_gateway,
                Datagram {
                    local: sock(HOSTS[0]),
                    remote: datagram.local,
                    bytes,
                },
            );
        }
        for (mut relayed, peer, bytes) in forwarded {
            if n == 1 {
                // This one is behind a NAT: it is seen as another than it says.
                relayed.set_port(relayed.port() - 1000);
            }
            push(
                &mut self.to_clients,
                Datagram {
                    local: peer,
                    remote: relayed,
                    bytes,
                },
            );
        }
    }

    fn deliver_to_client(&mut self, at: usize) {
        let Some(datagram) = self.to_clients.remove(at) else {
            return;
        };
        if let Some(client) = self
            .clients
            .iter_mut()
            .find(|c| c.addresses.contains(&datagram.local))
        {
            let message = StunMessage::parse(&datagram.bytes).expect("checks and answers");
            client.agent.handle_packet(
                self.now,
                StunPacket {
                    proto: Protocol::Udp,
                    source: datagram.remote,
                    destination: datagram.local,
                    message,
                },
            );
            self.drain_clients();
        }
    }

    fn signal(&mut self, at: usize) {
        let Some((id, added, lines)) = self.signals.remove(at) else {
            return;
        };
        let client = self.clients.iter_mut().find(|c| c.id == id).unwrap();
        for line in lines {
            let candidate = Candidate::from_sdp_string(&line).unwrap();
            if added {
                client.agent.add_remote_candidate(candidate);
            } else {
                client.agent.invalidate_candidate(&candidate);
            }
        }
        client.agent.handle_timeout(self.now);
        self.drain_clients();
    }

    fn exchange(&mut self) {
        for _ in 0..1000 {
            if !self.signals.is_empty() {
                self.signal(0);
            } else if !self.to_relays.is_empty() {
                self.deliver_to_relay(0);
            } else if !self.to_clients.is_empty() {
                self.deliver_to_client(0);
            } else if !self.to_gateway.is_empty() {
                self.deliver_to_gateway(0);
            } else {
                return;
            }
        }
    }

    /// Lets time pass while the network does its best.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        self.exchange();
        loop {
            let next = self
                .clients
                .iter_mut()
                .filter_map(|c| c.agent.poll_timeout())
                .chain(self.gateway.poll_timeout().map(|(at, _)| at))
                .min();
            let Some(next) = next.filter(|at| *at <= end) else {
                break;
            };
            // A step at least, for the clients' sake.
            let step = next.saturating_duration_since(self.now);
            self.pass(step.max(Duration::from_millis(10)));
            self.exchange();
        }
        self.now = self.now.max(end);
    }

    fn step(&mut self, script: &mut Script<'_>) {
        let n = script.below(CLIENTS);
        let id = self.clients[n].id;
        match script.byte() % 24 {
            0 | 1 => {
                if let Some((at, _)) = self.gateway.poll_timeout() {
                    self.pass(at.saturating_duration_since(self.now));
                }
            }
            2 => self.pass(Duration::from_millis(u64::from(script.byte()) * 10)),
            3 => self.pass(Duration::from_secs(u64::from(script.byte()) * 20)),
            4 => self.run(Duration::from_millis(u64::from(script.byte()) * 20)),
            5 => self.exchange(),
            6 => {
                let at = script.byte().into();
                match script.below(4) {
                    0 => self.deliver_to_gateway(at),
                    1 => self.deliver_to_relay(at),
                    2 => self.deliver_to_client(at),
                    _ => self.signal(at),
                }
            }
            7 => match script.below(4) {
                0 => self.to_gateway.clear(),
                1 => self.to_relays.clear(),
                2 => self.to_clients.clear(),
                _ => self.signals.clear(),
            },
            8 | 9 => {
                if !self.past.is_empty() {
                    let mut datagram = self.past[script.below(self.past.len())].clone();
                    for _ in 0..script.below(4) {
                        let at = usize::from(script.u16()) % datagram.bytes.len();
                        datagram.bytes[at] ^= script.byte();
                    }
                    if script.bit() {
                        self.elsewhere(script, &mut datagram);
                    }
                    self.arrive(&datagram);
                }
            }
            10 => {
                let bytes = script.bytes().to_vec();
                let (local, remote) = (sock(HOSTS[0]), sock(HOSTS[0]));
                let mut datagram = Datagram {
                    local,
                    remote,
                    bytes,
                };
                self.elsewhere(script, &mut datagram);
                self.arrive(&datagram);
            }
            11 => {
                let replace = script.bit();
                self.authorize(n, replace);
            }
            12 => {
                self.change_credentials(n, script.byte());
                self.restart_client(n);
            }
            13 => {
                self.gateway.remove(id);
                self.clients[n].present = false;
                self.settle();
                assert_eq!(self.gateway.describe(id), None);
            }
            14 => self.offer(n),
            15 | 16 => {
                let lines: Vec<_> = (0..=script.below(4)).map(|_| line(script)).collect();
                if script.below(3) == 0 {
                    self.gateway
                        .invalidate_remote_candidates(self.now, id, &lines);
                } else {
                    self.gateway.add_remote_candidates(self.now, id, &lines);
                }
                self.settle();
            }
            17 => self.portal_speaks_of_relays(script),
            18 => {
                let server = &mut self.servers[script.below(RELAYS.len())];
                match script.below(7) {
                    0 => server.silent ^= true,
                    1 => server.restart(),
                    2 => server.expire_nonces(),
                    3 => server.style = script.one_of(&[Style::Coturn, Style::Stock]),
                    4 => server.pads ^= true,
                    5 => server.errors.push_back((CHANNEL_BIND, 403)),
                    _ => server.always_stale ^= true,
                }
            }
            19 => {
                self.gateway.note_activity(self.now, id);
                self.settle();
            }
            20 => {
                if script.bit() {
                    self.gateway.add_host(self.now, sock(script.one_of(&HOSTS)));
                } else {
                    self.gateway.set_can_signal(self.now, script.bit());
                }
                self.settle();
            }
            21 => {
                let host = sock(HOSTS[0]);
                self.mapped = match script.byte() {
                    0 => host,
                    n => SocketAddr::new(sock(MAPPED).ip(), 41000 + u16::from(n)),
                };
            }
            22 => {
                // Behind a NAT that has forgotten it.
                let port = 40000 + u16::from(script.byte() % 4);
                for address in &mut self.clients[n].addresses {
                    address.set_port(port);
                }
                self.restart_client(n);
            }
            _ => {
                if script.byte() == 77 {
                    self.gateway.release_relays(self.now);
                    self.settle();
                }
            }
        }
    }

    /// Another source for a datagram.
    fn elsewhere(&self, script: &mut Script<'_>, datagram: &mut Datagram) {
        datagram.remote = match script.below(3) {
            0 => sock(script.one_of(&STRANGERS)),
            1 => sock(script.one_of(&RELAYS)),
            _ => addresses(script.below(CLIENTS))[script.below(3)],
        };
        datagram.local = sock(HOSTS[usize::from(datagram.remote.is_ipv6())]);
    }

    fn change_credentials(&mut self, n: usize, choice: u8) {
        let (ours, theirs) = match choice % 6 {
            // Nobody promised that these differ between clients.
            0 => ("same".to_owned(), format!("c{n}")),
            1 => ("same".to_owned(), "same".to_owned()),
            2 => ("g".repeat(63), "c".repeat(63)),
            3 => (format!("g{n}x"), format!("c{n}")),
            _ => (format!("g{n}"), format!("c{n}")),
        };
        self.clients[n].ours = creds(&ours);
        self.clients[n].theirs = creds(&theirs);
    }

    fn portal_speaks_of_relays(&mut self, script: &mut Script<'_>) {
        let mut entries: Vec<_> = (0..RELAYS.len())
            .filter(|_| script.bit())
            .map(entry)
            .collect();
        if let Some(first) = entries.first_mut() {
            match script.below(6) {
                0 => first.password = SecretString::from("wrong"),
                1 => first.id = RelayId(Uuid::from_u128(99)),
                2 => first.v4 = None,
                _ => {}
            }
        }
        if script.bit() {
            let ids = [1, 2, 99].map(|n| RelayId(Uuid::from_u128(n)));
            let presence = RelaysPresence {
                disconnected_ids: ids.into_iter().filter(|_| script.bit()).collect(),
                connected: entries,
            };
            self.gateway.relays_presence(self.now, &presence);
        } else {
            self.gateway.upsert_relays(self.now, &entries);
        }
        self.settle();
    }

    /// Whatever happened before, a new authorization leads to a path.
    fn new_client(&mut self) {
        for server in &mut self.servers {
            server.silent = false;
            server.always_stale = false;
        }
        let n = 0;
        self.clients[n].addresses = addresses(n);
        self.clients[n].ours = creds("new0");
        self.clients[n].theirs = creds("new1");
        self.restart_client(n);
        self.signals.clear();
        self.authorize(n, false);
        let reflexive = self.signals.iter().flat_map(|(_, _, lines)| lines);
        let reflexive = reflexive.filter(|line| line.contains("typ srflx")).count();
        assert!(reflexive <= RELAYS.len(), "offers addresses of the past");
        self.offer(n);
        self.run(Duration::from_secs(6));
        let view = self.gateway.describe(self.clients[n].id).expect("present");
        assert!(view.path.is_some(), "{view:?}");
    }

    /// Nothing is left of what is gone.
    fn farewell(&mut self) {
        for client in &mut self.clients {
            self.gateway.remove(client.id);
            client.present = false;
        }
        self.settle();
        assert!(self.gateway.connections.is_empty());
        assert!(self.gateway.owners.is_empty());
        self.gateway.release_relays(self.now);
        self.settle();
        let events = self.events;
        let end = self.now + CHECK_MEMORY;
        while let Some((at, _)) = self.gateway.poll_timeout() {
            assert!(at < end, "still busy");
            self.pass(at.saturating_duration_since(self.now));
        }
        self.pass(end - self.now);
        assert_eq!(self.gateway.poll_timeout(), None);
        assert_eq!(self.events, events, "events for nobody");
        assert!(self.gateway.checks.is_empty() && self.gateway.check_order.is_empty());
        assert!(self.gateway.relays.is_released());
        assert!(self.start <= self.now);
    }
}

fn push<T>(queue: &mut VecDeque<T>, item: T) {
    if queue.len() == MAX_POOL {
        queue.pop_front();
    }
    queue.push_back(item);
}

/// A candidate line, more or less.
fn line(script: &mut Script<'_>) -> String {
    let address = match script.below(4) {
        0 => script.one_of(&STRANGERS).to_owned(),
        1 => script.one_of(&HOSTS).to_owned(),
        2 => script
            .one_of(&["192.0.2.9:50000", "0.0.0.0:0", "224.0.0.1:9", "127.0.0.1:1"])
            .to_owned(),
        _ => addresses(script.below(CLIENTS))[script.below(3)].to_string(),
    };
    let address = sock(&address);
    let port = address.port() + u16::from(script.byte() % 8);
    let kind = script.one_of(&["host", "srflx", "relay", "prflx", "other"]);
    let related = match script.below(3) {
        0 => " raddr 0.0.0.0 rport 0",
        1 => " raddr :: rport 65536",
        _ => "",
    };
    let ufrag = script.one_of(&["", " ufrag c0", " ufrag same"]);
    let priority = script.one_of(&["2130706431", "1", "4294967295", "4294967296", "-1"]);
    let mut line = format!(
        "candidate:x 1 udp {priority} {} {port} typ {kind}{related}{ufrag}",
        address.ip()
    );
    if script.below(4) == 0 {
        let at = script.below(line.len());
        line.replace_range(at..(at + script.below(8)).min(line.len()), script.text());
    }
    line
}

/// A script of what clients, relays, the portal, the network and time do.
pub fn connectivity(data: &[u8]) {
    let mut script = Script::new(data);
    let mut world = World::new(u64::from(script.byte()));
    while !script.is_empty() {
        world.step(&mut script);
    }
    world.new_client();
    world.farewell();
}

/// Datagrams of all kinds for a gateway with two relays and a client.
pub fn demux(data: &[u8]) {
    let mut script = Script::new(data);
    let mut world = World::new(0);
    world
        .gateway
        .upsert_relays(world.now, &[entry(0), entry(1)]);
    world.settle();
    world.exchange();
    world.authorize(0, false);
    world.offer(0);
    world.run(Duration::from_secs(2));
    let connection = |world: &World| world.gateway.describe(world.clients[0].id).unwrap();
    assert!(connection(&world).path.is_some());
    // A socket that was a relay's until now.
    let presence = RelaysPresence {
        disconnected_ids: vec![entry(1).id],
        connected: vec![],
    };
    world.gateway.relays_presence(world.now, &presence);
    world.settle();
    world.run(Duration::from_secs(8));

    while !script.is_empty() {
        if script.below(8) == 0 {
            let mut replayed = world.past[script.below(world.past.len())].clone();
            replayed.remote = sock(script.one_of(&STRANGERS));
            world.arrive(&replayed);
            let remote = connection(&world).remote.unwrap();
            assert!(world.clients[0].addresses.contains(&remote), "hijacked");
            continue;
        }
        let datagram = unauthentic(&world, &mut script);
        let before = connection(&world);
        let ends = before.local.zip(before.remote).unwrap();
        let owner = world.gateway.owner_of(world.now, ends.0, ends.1);
        let events = world.events;
        let waiting = world.to_clients.len() + world.to_relays.len();
        let inbound = world.arrive(&datagram);
        check_inbound(&world, &datagram, &inbound);
        assert_eq!(connection(&world), before, "changed by anybody");
        assert_eq!(world.gateway.owner_of(world.now, ends.0, ends.1), owner);
        assert_eq!(world.events, events);
        assert_eq!(
            world.to_clients.len() + world.to_relays.len(),
            waiting,
            "answered to anybody"
        );
    }
}

/// A datagram that shows no knowledge of any secret.
fn unauthentic(world: &World, script: &mut Script<'_>) -> Datagram {
    let remote = match script.below(6) {
        0 | 1 => sock(RELAYS[0]),
        2 => sock(RELAYS[1]),
        3 => sock(script.one_of(&STRANGERS)),
        _ => world.clients[0].addresses[script.below(3)],
    };
    let local = match script.below(4) {
        0 => sock("198.51.100.1:1"),
        1 => sock(HOSTS[1]),
        _ => sock(HOSTS[0]),
    };
    let mut bytes = match script.below(7) {
        0 => script.bytes().to_vec(),
        1 => {
            let mut message = vec![script.byte() & 3, script.byte(), 0, 0];
            message.extend_from_slice(&[0x21, 0x12, 0xa4, 0x42]);
            message.extend_from_slice(script.bytes());
            let length = message.len().saturating_sub(20) & !3;
            message.truncate(20 + length);
            message[2..4].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            message
        }
        2 | 3 => {
            let kind = script.byte() % 6;
            let length = [0, 148, 92, 64, 32, 96][usize::from(kind)];
            let mut message = vec![kind, 0, 0, 0];
            message.extend_from_slice(script.bytes());
            message.resize(length, 0);
            message
        }
        4 => {
            // A check with the right names, but not the password.
            let client = &world.clients[0];
            let name = format!("{}:{}", client.ours.username, client.theirs.username);
            let mut message = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
            message.extend_from_slice(&[script.byte(); 12]);
            attribute(&mut message, 0x0006, name.as_bytes());
            attribute(&mut message, 0x0024, &[1, 2, 3, 4]);
            attribute(&mut message, 0x0025, &[]);
            attribute(&mut message, 0x8029 + u16::from(script.bit()), &[9; 8]);
            attribute(&mut message, 0x0008, &[script.byte(); 20]);
            message
        }
        _ => {
            // An answer to a check of ours.
            let mut checks: Vec<_> = world.gateway.check_order.iter().collect();
            checks.sort_unstable();
            let (_, id) = checks[script.below(checks.len())];
            let mut message = vec![1, script.one_of(&[1, 0x11]), 0, 0, 0x21, 0x12, 0xa4, 0x42];
            message.extend_from_slice(id);
            attribute(&mut message, 0x0020, &[0, 1, 1, 2, 3, 4, 5, 6]);
            attribute(&mut message, 0x0009, &[0, 0, 4, 87]);
            attribute(&mut message, 0x0008, &[script.byte(); 20]);
            message
        }
    };
    if script.bit() {
        let number = match script.bit() {
            true => world.servers[0].channels()[0].0,
            false => 0x4000 | script.u16(),
        };
        bytes = wrap(number, &bytes).unwrap();
        bytes.resize(bytes.len() + script.below(5), 0);
    }
    Datagram {
        local,
        remote,
        bytes,
    }
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&u16::try_from(value.len()).unwrap().to_be_bytes());
    message.extend_from_slice(value);
    let length = u16::try_from(message.len() - 20).unwrap();
    message[2..4].copy_from_slice(&length.to_be_bytes());
}

/// Data-path spec §1.3, written down once more.
fn check_inbound(world: &World, datagram: &Datagram, inbound: &Inbound) {
    let bytes = &*datagram.bytes;
    let known = datagram.remote == sock(RELAYS[0]);
    let former = datagram.remote == sock(RELAYS[1]);
    let channel = match bytes {
        [64..=79, _, l0, l1, rest @ ..] => {
            let length = usize::from(u16::from_be_bytes([*l0, *l1]));
            (length..=length + 3)
                .contains(&rest.len())
                .then_some(length)
        }
        _ => None,
    };
    let stun = is_stun(bytes) && is_whole(bytes);
    let mut plain = (datagram.local, datagram.remote, 0..bytes.len());
    let consumed = match channel {
        Some(length) if known => {
            let number = u16::from_be_bytes([bytes[0], bytes[1]]);
            let channels = world.servers[0].channels();
            match channels.iter().find(|(n, _)| *n == number) {
                Some((_, peer)) => {
                    let relayed = world
                        .gateway
                        .relays
                        .local_candidates()
                        .find(|c| c.kind == CandidateKind::Relayed);
                    plain = (relayed.unwrap().addr, *peer, 4..4 + length);
                    false
                }
                None => true,
            }
        }
        Some(_) => former,
        None => stun && (known || former),
    };
    let (local, remote, payload) = plain;
    if consumed {
        assert_eq!(*inbound, Inbound::Consumed);
    } else if is_stun(&bytes[payload.clone()]) {
        assert!(matches!(inbound, Inbound::Consumed | Inbound::Unknown));
    } else {
        let expected = Inbound::WireGuard {
            local,
            remote,
            payload: payload.clone(),
        };
        assert_eq!(*inbound, expected);
    }

    // Both ways into the gateway see the same message.
    let relays = world.gateway.relays.addresses();
    if let Some((_, fast)) = established(&relays, datagram.remote, bytes) {
        match inbound {
            Inbound::WireGuard { payload, .. } => assert_eq!(*payload, fast),
            other => assert!(consumed && *other == Inbound::Consumed),
        }
    }
}

/// Whether nobody may take it for WireGuard (RFC 8489 §5).
fn is_stun(bytes: &[u8]) -> bool {
    match bytes {
        [0..=3, _, _, _, 0x21, 0x12, 0xa4, 0x42, rest @ ..] => rest.len() >= 12,
        _ => false,
    }
}

/// Whether header and attributes fill the datagram (RFC 8489 §5, §14).
fn is_whole(stun: &[u8]) -> bool {
    let length = usize::from(u16::from_be_bytes([stun[2], stun[3]]));
    let mut rest = &stun[20..];
    if length != rest.len() {
        return false;
    }
    while let [_, _, l0, l1, tail @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*l0, *l1])).next_multiple_of(4);
        let Some(next) = tail.get(length..) else {
            return false;
        };
        rest = next;
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use crate::fuzzing::corpus;

    #[test]
    fn corpus_of_stun_means_what_it_says() {
        corpus("stun", 256, super::stun);
    }

    #[test]
    fn corpus_of_channel_data_is_framed_exactly() {
        corpus("channel_data", 256, super::channel_data);
    }

    #[test]
    fn corpus_of_relays_keeps_the_client_in_order() {
        corpus("turn_client", 16, super::turn_client);
    }

    #[test]
    fn corpus_of_datagrams_is_told_apart() {
        corpus("demux", 16, super::demux);
    }

    #[test]
    fn corpus_of_scripts_keeps_connections_in_order() {
        corpus("connectivity", 16, super::connectivity);
    }
}
