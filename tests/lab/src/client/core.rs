//! The client without I/O: datagrams, packets, portal messages and the clock go in; datagrams,
//! packets and portal messages come out. After every `handle_*` the caller drains the queues.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn};
use boringtun::x25519::{PublicKey, StaticSecret};
use ip_network::IpNetwork;
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, CandidateKind, Protocol};
use uuid::Uuid;

use super::candidate;
use super::config::Only;
use super::connection::{Connection, Decapsulated, Failure, MAX_BUFFERED, Nominated};
use super::demux::{PeerStep, RelayStep, peer_step, relay_step};
use super::dns::{self, Gate, Names};
use super::messages::{AuthorizationCreated, Egress, Ingress, Interface, Resource, ResourceKind};
use super::packet;
use super::relay::{ChannelOutcome, Relays, StunOutcome};
use super::status::{Counters, PortalStatus, RelayStatus, ResourceStatus, Status, TunnelStatus};
use super::transmit::{PacketQueue, TransmitQueue};

mod io;
mod portal;
mod ranges;

use io::{Io, send_on};
use ranges::{in_proxy_range, is_tunnel_range, proxy_ranges, tunnel_ranges};

/// The portal is asked for the same resource at most this often (data-path spec §9).
pub const REQUEST_INTERVAL: Duration = Duration::from_secs(2);
/// `no_relays` is repeated while there are none.
const NO_RELAYS_INTERVAL: Duration = Duration::from_secs(10);
/// WireGuard timers must be looked at this often (§4.5).
const TICK: Duration = Duration::from_millis(250);
/// Largest datagram between peers is 1316 bytes; handshakes need 148.
const SCRATCH: usize = 2048;

/// Fixed settings of the core.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Restriction of the local candidates.
    pub only: Only,
    /// One allocation per relay instead of one per address.
    pub one_allocation_per_relay: bool,
    /// Use the internet resource.
    pub internet: bool,
    /// Bound port of the IPv4 socket, if there is one.
    pub port_v4: Option<u16>,
    /// Bound port of the IPv6 socket, if there is one.
    pub port_v6: Option<u16>,
    /// Resources to connect to at once.
    pub connect: Vec<Uuid>,
}

/// What the device and the routing should look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Tunnel addresses.
    pub interface: Interface,
    /// Networks to route into the tunnel.
    pub routes: BTreeSet<IpNetwork>,
    /// Whether to take the default route.
    pub default_route: bool,
}

/// Result of a `connect` request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConnectOutcome {
    /// The portal was asked.
    Requested,
    /// A request is under way.
    Pending,
    /// There is a connection.
    Connected,
    /// No such resource.
    UnknownResource,
}

#[derive(Debug)]
struct Pending {
    last_request: Option<Instant>,
    buffered: VecDeque<Vec<u8>>,
}

/// See module docs.
pub struct Core {
    private_key: StaticSecret,
    public_key: PublicKey,
    interface: Option<Interface>,
    network: Option<NetworkConfig>,
    network_dirty: bool,
    resources: BTreeMap<Uuid, Resource>,
    refused: HashMap<Uuid, String>,
    by_resource: HashMap<Uuid, Uuid>,
    pending: HashMap<Uuid, Pending>,
    connections: BTreeMap<Uuid, Connection>,
    names: Names,
    portal: PortalStatus,
    next_tick: Instant,
    /// Resources to connect to without a packet, until first granted.
    wanted: BTreeSet<Uuid>,
    last_no_relays: Option<Instant>,
    io: Io,
}

impl Core {
    /// A client with a fresh identity.
    pub fn new(now: Instant, private_key: [u8; 32], config: CoreConfig) -> Self {
        let private_key = StaticSecret::from(private_key);
        let relays = Relays::new(
            now,
            config.port_v4.is_some(),
            config.port_v6.is_some(),
            config.one_allocation_per_relay,
        );
        Self {
            public_key: PublicKey::from(&private_key),
            private_key,
            interface: None,
            network: None,
            network_dirty: false,
            resources: BTreeMap::new(),
            refused: HashMap::new(),
            by_resource: HashMap::new(),
            pending: HashMap::new(),
            connections: BTreeMap::new(),
            names: Names::default(),
            portal: PortalStatus::default(),
            next_tick: now,
            wanted: config.connect.iter().copied().collect(),
            last_no_relays: None,
            io: Io {
                config,
                relays,
                transmits: TransmitQueue::default(),
                tun: PacketQueue::default(),
                egress: VecDeque::new(),
                host_addrs: BTreeSet::new(),
                route_probes: VecDeque::new(),
                counters: Counters::default(),
                portal_up: false,
                scratch: Box::new([0; SCRATCH]),
            },
        }
    }

    /// Public key, sent to the portal on every connect.
    pub fn public_key(&self) -> [u8; 32] {
        self.public_key.to_bytes()
    }

    /// Outgoing datagrams.
    pub fn transmits(&mut self) -> &mut TransmitQueue {
        &mut self.io.transmits
    }

    /// Packets for the TUN device.
    pub fn tun_packets(&mut self) -> &mut PacketQueue {
        &mut self.io.tun
    }

    /// Next message for the portal.
    pub fn poll_egress(&mut self) -> Option<Egress> {
        self.io.egress.pop_front()
    }

    /// The wanted network configuration, if it changed.
    pub fn poll_network(&mut self) -> Option<NetworkConfig> {
        std::mem::take(&mut self.network_dirty)
            .then(|| self.network.clone())
            .flatten()
    }

    /// A destination whose local address is to be looked up; answer with
    /// [`Self::handle_host_address`].
    pub fn poll_route_probe(&mut self) -> Option<SocketAddr> {
        self.io.route_probes.pop_front()
    }

    /// When [`Self::handle_timeout`] is due.
    pub fn poll_timeout(&mut self) -> Instant {
        let mut at = self.next_tick;
        if let Some(relay) = self.io.relays.poll_timeout() {
            at = at.min(relay);
        }
        for connection in self.connections.values_mut() {
            if let Some(agent) = connection.agent.poll_timeout() {
                at = at.min(agent);
            }
        }
        at
    }

    /// Advances all timers.
    pub fn handle_timeout(&mut self, now: Instant) {
        let io = &mut self.io;
        io.relays.handle_timeout(now, &mut io.transmits);
        let mut failed = Vec::new();
        let tick = now >= self.next_tick;
        if tick {
            self.next_tick = now + TICK;
        }
        for (id, connection) in &mut self.connections {
            if connection.agent.poll_timeout().is_none_or(|at| at <= now) {
                connection.agent.handle_timeout(now);
            }
            io.drive(now, connection);
            if tick && let Err(failure) = io.tick(now, connection) {
                failed.push((*id, failure));
            }
        }
        for (id, failure) in failed {
            self.fail(id, failure);
        }
        if tick {
            self.request_wanted(now);
        }
        self.after_relays(now);
    }

    fn fail(&mut self, id: Uuid, failure: Failure) {
        tracing::warn!(gateway = %id, reason = failure.as_str(), "connection failed");
        self.io.counters.connections_failed += 1;
        self.io.counters.last_connection_failure = Some(failure.as_str().to_owned());
        self.forget(id);
    }

    fn forget(&mut self, id: Uuid) {
        self.connections.remove(&id);
        self.by_resource.retain(|_, gateway| *gateway != id);
        self.names.forget_gateway(id);
    }

    /// Follow-up of anything that may have changed relays.
    fn after_relays(&mut self, now: Instant) {
        if self.io.relays.take_changed() {
            self.sync_all(now);
        }
        if self.io.relays.is_empty()
            && self.io.portal_up
            && self.interface.is_some()
            && self
                .last_no_relays
                .is_none_or(|at| now.saturating_duration_since(at) >= NO_RELAYS_INTERVAL)
        {
            self.last_no_relays = Some(now);
            self.io.egress.push_back(Egress::NoRelays);
        }
    }

    fn sync_all(&mut self, now: Instant) {
        for connection in self.connections.values_mut() {
            self.io.sync_candidates(now, connection);
            self.io.drive(now, connection);
        }
    }

    /// A local address was learned by looking at the route to a destination.
    pub fn handle_host_address(&mut self, now: Instant, ip: IpAddr) {
        let ours = self.interface.is_some_and(|i| ip == i.ipv4 || ip == i.ipv6);
        if !ours && !ip.is_unspecified() && self.io.host_addrs.insert(ip) {
            self.sync_all(now);
        }
    }

    /// A datagram from the network (data-path spec §1.3). `local_ip` is its destination address.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        local_ip: IpAddr,
        from: SocketAddr,
        datagram: &[u8],
    ) {
        let port = if local_ip.is_ipv4() {
            self.io.config.port_v4
        } else {
            self.io.config.port_v6
        };
        let Some(port) = port else { return };
        let local = SocketAddr::new(local_ip, port);
        match relay_step(from, datagram) {
            RelayStep::Stun => match self.io.relays.handle_stun(now, local, from, datagram) {
                StunOutcome::Consumed => {
                    // Answers lead to requests: do not wait for the next wake-up.
                    let io = &mut self.io;
                    io.relays.handle_timeout(now, &mut io.transmits);
                    self.after_relays(now);
                }
                StunOutcome::Late => {}
                StunOutcome::NotRelay => self.handle_peer(now, local, from, datagram),
            },
            RelayStep::ChannelData { number, payload } => {
                match self.io.relays.handle_channel_data(from, number) {
                    ChannelOutcome::Peer { peer, relayed } => {
                        self.handle_peer(now, relayed, peer, payload);
                    }
                    ChannelOutcome::Unknown => self.io.counters.dropped_channel_data += 1,
                    ChannelOutcome::NotRelay => self.handle_peer(now, local, from, datagram),
                }
            }
            RelayStep::Other => self.handle_peer(now, local, from, datagram),
        }
    }

    fn handle_peer(&mut self, now: Instant, local: SocketAddr, from: SocketAddr, datagram: &[u8]) {
        match peer_step(datagram) {
            PeerStep::Stun => self.handle_stun(now, local, from, datagram),
            PeerStep::Initiation => match self.initiator_of(datagram) {
                Some(id) => self.handle_wireguard(now, id, from, datagram),
                None => self.io.counters.dropped_wireguard += 1,
            },
            PeerStep::Indexed { receiver, .. } => {
                let index = receiver >> 8;
                let id = self
                    .connections
                    .iter()
                    .find(|(_, c)| c.index == index)
                    .map(|(id, _)| *id);
                match id {
                    Some(id) => self.handle_wireguard(now, id, from, datagram),
                    None => self.io.counters.dropped_wireguard += 1,
                }
            }
            PeerStep::Unknown => self.io.counters.dropped_unknown_datagram += 1,
        }
    }

    fn handle_stun(&mut self, now: Instant, local: SocketAddr, from: SocketAddr, datagram: &[u8]) {
        let Ok(message) = StunMessage::parse(datagram) else {
            self.io.counters.dropped_stun += 1;
            return;
        };
        let connection = if message.is_binding_request() {
            let ours = message.split_username().map(|(local, _)| local);
            self.connections
                .values_mut()
                .find(|c| Some(c.agent.local_credentials().ufrag.as_str()) == ours)
        } else if message.is_successful_binding_response() {
            self.connections
                .values_mut()
                .find(|c| c.agent.accepts_message(&message))
        } else {
            // Error responses are dropped: roles never need repair (§1.3).
            None
        };
        let Some(connection) = connection else {
            self.io.counters.dropped_stun += 1;
            return;
        };
        let accepted = connection.agent.handle_packet(
            now,
            StunPacket {
                proto: Protocol::Udp,
                source: from,
                destination: local,
                message,
            },
        );
        if !accepted {
            self.io.counters.dropped_stun += 1;
        }
        self.io.drive(now, connection);
    }

    fn initiator_of(&self, datagram: &[u8]) -> Option<Uuid> {
        let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(datagram) else {
            return None;
        };
        let half = parse_handshake_anon(&self.private_key, &self.public_key, &initiation).ok()?;
        self.connections
            .iter()
            .find(|(_, c)| c.gateway_key.0 == half.peer_static_public)
            .map(|(id, _)| *id)
    }

    fn handle_wireguard(&mut self, now: Instant, id: Uuid, from: SocketAddr, datagram: &[u8]) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let io = &mut self.io;
        let path = connection.nominated;
        let mut goodbye = false;
        let mut released = Vec::new();
        match connection.decapsulate(now, from.ip(), datagram, io.scratch.as_mut_slice()) {
            Decapsulated::Reply(reply) => {
                send_on(now, path, reply, &mut io.relays, &mut io.transmits)
            }
            Decapsulated::Packet(inner) => {
                if let Some(control) = packet::parse_control(inner) {
                    match control.event {
                        packet::EVENT_GOODBYE => goodbye = true,
                        packet::EVENT_DOMAIN_STATUS => {
                            released = self.names.handle_status(id, control.body);
                        }
                        other => tracing::debug!(event = other, "unknown control packet"),
                    }
                } else if self
                    .interface
                    .is_some_and(|i| match packet::destination(inner) {
                        Some(IpAddr::V4(ip)) => ip == i.ipv4,
                        Some(IpAddr::V6(ip)) => ip == i.ipv6,
                        None => false,
                    })
                {
                    if packet::is_icmp_prohibited(inner) {
                        io.counters.icmp_prohibited_received += 1;
                    }
                    io.tun.push(inner);
                    connection.wake(now);
                } else {
                    io.counters.dropped_inner_destination += 1;
                }
            }
            Decapsulated::Nothing => {}
            Decapsulated::Rejected => io.counters.dropped_wireguard += 1,
        }
        if goodbye {
            tracing::info!(gateway = %id, "goodbye received");
            io.counters.goodbyes_received += 1;
            self.forget(id);
            return;
        }
        if connection.take_fresh_session() {
            while let Some(queued) = connection.next_queued(io.scratch.as_mut_slice()) {
                send_on(now, path, queued, &mut io.relays, &mut io.transmits);
            }
            released.extend(connection.buffered.drain(..));
        }
        for packet in released {
            self.handle_tun_packet(now, &packet);
        }
    }

    /// A packet from the TUN device.
    pub fn handle_tun_packet(&mut self, now: Instant, packet: &[u8]) {
        let Some(destination) = packet::destination(packet) else {
            return;
        };
        if destination.is_multicast() {
            return;
        }
        if let Some(id) = self.gateway_with_ip(destination) {
            self.send_inner(now, id, destination, packet);
            return;
        }
        let Some(resource) = self.lookup(destination) else {
            self.io.counters.dropped_no_resource += 1;
            return;
        };
        match self.by_resource.get(&resource) {
            Some(id) => self.send_inner(now, *id, destination, packet),
            None => {
                let pending = self.pending.entry(resource).or_insert_with(Pending::new);
                if pending.buffered.len() >= MAX_BUFFERED {
                    pending.buffered.pop_front();
                    self.io.counters.dropped_buffer_full += 1;
                }
                pending.buffered.push_back(packet.to_vec());
                self.request(now, resource);
            }
        }
    }

    fn send_inner(&mut self, now: Instant, id: Uuid, destination: IpAddr, packet: &[u8]) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.wake(now);
        if connection.nominated.is_none() || !connection.has_session(now) {
            if connection.buffer(packet) {
                self.io.counters.dropped_buffer_full += 1;
            }
            return;
        }
        if in_proxy_range(destination)
            && let Gate::Held(announcement) = self.names.gate(now, id, destination, packet)
        {
            if let Some(body) = announcement {
                let control = packet::control(packet::EVENT_ASSIGNED_IPS, &body);
                self.io.send_packet(now, connection, &control);
            }
            return;
        }
        self.io.send_packet(now, connection, packet);
    }

    fn gateway_with_ip(&self, ip: IpAddr) -> Option<Uuid> {
        self.connections
            .iter()
            .find(|(_, c)| ip == c.ipv4 || ip == c.ipv6)
            .map(|(id, _)| *id)
    }

    /// The resource that covers `ip`: proxy address, then longest prefix, then the internet.
    fn lookup(&self, ip: IpAddr) -> Option<Uuid> {
        if in_proxy_range(ip) {
            return self.names.resource_of(ip);
        }
        let mut best: Option<(u8, Uuid)> = None;
        for resource in self.resources.values() {
            match &resource.kind {
                ResourceKind::Cidr(network)
                    if network.contains(ip)
                        && best.is_none_or(|(prefix, _)| network.netmask() >= prefix) =>
                {
                    best = Some((network.netmask(), resource.id));
                }
                ResourceKind::Internet
                    if self.io.config.internet && best.is_none() && !is_tunnel_range(ip) =>
                {
                    best = Some((0, resource.id));
                }
                _ => {}
            }
        }
        best.map(|(_, id)| id)
    }

    fn request(&mut self, now: Instant, resource: Uuid) -> ConnectOutcome {
        let pending = self.pending.entry(resource).or_insert_with(Pending::new);
        let throttled = pending
            .last_request
            .is_some_and(|at| now.saturating_duration_since(at) < REQUEST_INTERVAL);
        if throttled || !self.io.portal_up {
            return ConnectOutcome::Pending;
        }
        pending.last_request = Some(now);
        self.io.counters.authorizations_requested += 1;
        self.io.egress.push_back(Egress::RequestAuthorization {
            resource_id: resource,
            connected_gateway_ids: self.connections.keys().copied().collect(),
        });
        ConnectOutcome::Requested
    }

    /// Asks for access without waiting for a packet; `again` also if there is access already, as
    /// far as this side knows.
    pub fn connect(&mut self, now: Instant, resource: Uuid, again: bool) -> ConnectOutcome {
        if !self.resources.contains_key(&resource) {
            return ConnectOutcome::UnknownResource;
        }
        if !again && self.by_resource.contains_key(&resource) {
            return ConnectOutcome::Connected;
        }
        self.request(now, resource)
    }

    /// The gateway may not be online yet when this client starts: keep asking.
    fn request_wanted(&mut self, now: Instant) {
        for id in self.wanted.clone() {
            self.connect(now, id, false);
        }
    }

    /// Sends packets as they are to every gateway there is a session with, whatever they are;
    /// returns how many went out.
    pub fn inject(&mut self, now: Instant, packets: &[Vec<u8>]) -> usize {
        let mut sent = 0;
        for connection in self.connections.values_mut() {
            if connection.nominated.is_some() && connection.has_session(now) {
                for packet in packets {
                    self.io.send_packet(now, connection, packet);
                    sent += 1;
                }
            }
        }
        sent
    }

    /// Says goodbye to all gateways and forgets them; returns how many there were.
    pub fn disconnect(&mut self, now: Instant) -> usize {
        let ids: Vec<Uuid> = self.connections.keys().copied().collect();
        for id in &ids {
            self.say_goodbye(now, *id);
        }
        ids.len()
    }

    fn say_goodbye(&mut self, now: Instant, id: Uuid) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.nominated.is_some()
            && connection.has_session(now)
        {
            let goodbye = packet::control(packet::EVENT_GOODBYE, &[]);
            self.io.send_packet(now, connection, &goodbye);
        }
        self.forget(id);
    }

    /// Goodbye to everyone, allocations released. Only flushing the queues remains.
    pub fn shutdown(&mut self, now: Instant) {
        self.disconnect(now);
        let io = &mut self.io;
        io.relays.release(now, &mut io.transmits);
    }

    /// Resolves a name of a DNS resource to proxy addresses and announces it to its gateway.
    pub fn resolve(&mut self, now: Instant, domain: &str) -> Option<(Uuid, Vec<IpAddr>)> {
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        let resource = self.resources.values().find_map(|r| match &r.kind {
            ResourceKind::Dns(pattern) => dns::matches(pattern, &domain).then_some(r.id),
            _ => None,
        })?;
        let ips = self.names.assign(&domain, resource);
        if let Some(id) = self.by_resource.get(&resource)
            && let Some(connection) = self.connections.get_mut(id)
            && connection.nominated.is_some()
            && connection.has_session(now)
            && let Some(body) = self.names.announce(now, *id, &domain)
        {
            let control = packet::control(packet::EVENT_ASSIGNED_IPS, &body);
            self.io.send_packet(now, connection, &control);
        }
        Some((resource, ips))
    }

    fn fresh_index(&self) -> u32 {
        loop {
            let index = rand::random::<u32>() >> 8;
            if self.connections.values().all(|c| c.index != index) {
                return index;
            }
        }
    }

    /// What `GET /status` says.
    pub fn status(&self, now: Instant) -> Status {
        let mut counters = self.io.counters.clone();
        counters.ignored_turn_indications = self.io.relays.ignored_indications;
        Status {
            portal: self.portal.clone(),
            tunnel: TunnelStatus {
                ipv4: self.interface.map(|i| i.ipv4),
                ipv6: self.interface.map(|i| i.ipv6),
                public_key: STANDARD.encode(self.public_key()),
                port_v4: self.io.config.port_v4,
                port_v6: self.io.config.port_v6,
            },
            resources: self
                .resources
                .values()
                .map(|r| {
                    let (kind, address) = match &r.kind {
                        ResourceKind::Cidr(network) => ("cidr", Some(network.to_string())),
                        ResourceKind::Dns(pattern) => ("dns", Some(pattern.clone())),
                        ResourceKind::Internet => ("internet", None),
                    };
                    ResourceStatus {
                        id: r.id,
                        name: r.name.clone(),
                        kind,
                        address,
                        gateway_id: self.by_resource.get(&r.id).copied(),
                        refused: self.refused.get(&r.id).cloned(),
                    }
                })
                .collect(),
            gateways: self
                .connections
                .values()
                .map(|c| c.status(now, |addr| self.io.relays.is_relayed(addr)))
                .collect(),
            relays: self
                .io
                .relays
                .paths()
                .map(|(id, path)| RelayStatus {
                    id,
                    addr: path.addr(),
                    state: path.state(),
                    host: path.local(),
                    srflx: path.mapped(),
                    relayed: path.relayed(),
                    rtt_ms: path.rtt().map(|d| d.as_secs_f64() * 1000.0),
                    channels: path.channel_peers().collect(),
                })
                .collect(),
            counters,
        }
    }
}

impl Pending {
    fn new() -> Self {
        Self {
            last_request: None,
            buffered: VecDeque::new(),
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
