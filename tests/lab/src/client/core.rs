//! The client without I/O: datagrams, packets, portal messages and the clock go in; datagrams,
//! packets and portal messages come out. After every `handle_*` the caller drains the queues.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
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

/// Everything but the connections, so that a connection and this can be borrowed together.
struct Io {
    config: CoreConfig,
    relays: Relays,
    transmits: TransmitQueue,
    tun: PacketQueue,
    egress: VecDeque<Egress>,
    host_addrs: BTreeSet<IpAddr>,
    route_probes: VecDeque<SocketAddr>,
    counters: Counters,
    portal_up: bool,
    scratch: Box<[u8; SCRATCH]>,
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

    /// The topic was joined: messages reach the portal from here on.
    pub fn handle_portal_up(&mut self, now: Instant) {
        self.io.portal_up = true;
        self.portal.connected = true;
        self.portal.joins += 1;
        self.last_no_relays = None;
        self.io
            .egress
            .push_back(Egress::SetSnownetCapabilities { iceless: false });
        // What could not be signalled meanwhile.
        self.sync_all(now);
        let waiting: Vec<Uuid> = self
            .pending
            .iter()
            .filter(|(_, p)| !p.buffered.is_empty())
            .map(|(id, _)| *id)
            .collect();
        for resource in waiting {
            self.request(now, resource);
        }
    }

    /// The portal is out of reach; connections carry on.
    pub fn handle_portal_down(&mut self, reason: String) {
        self.io.portal_up = false;
        self.portal.connected = false;
        self.portal.last_error = Some(reason);
        self.io.egress.clear();
    }

    /// A message of the portal.
    pub fn handle_portal(&mut self, now: Instant, message: Ingress) {
        match message {
            Ingress::Init(init) => {
                self.interface = Some(init.interface);
                let fresh: BTreeMap<Uuid, Resource> =
                    init.resources.into_iter().map(|r| (r.id, r)).collect();
                let gone: Vec<Uuid> = self
                    .resources
                    .keys()
                    .filter(|id| !fresh.contains_key(id))
                    .copied()
                    .collect();
                for id in gone {
                    self.remove_resource(now, id);
                }
                for resource in fresh.into_values() {
                    self.upsert_resource(now, resource);
                }
                self.io.relays.upsert(now, &init.relays);
                self.update_network();
                self.request_wanted(now);
            }
            Ingress::ConfigChanged(interface) => {
                self.interface = Some(interface);
                self.update_network();
            }
            Ingress::RelaysPresence {
                disconnected_ids,
                connected,
            } => {
                self.io.relays.remove(&disconnected_ids);
                self.io.relays.upsert(now, &connected);
            }
            Ingress::ResourceUpserted(resource) => {
                self.upsert_resource(now, resource);
                self.update_network();
            }
            Ingress::ResourceDeleted(id) => {
                self.remove_resource(now, id);
                self.update_network();
            }
            Ingress::AuthorizationCreated(grant) => self.handle_grant(now, &grant),
            Ingress::AuthorizationFailed {
                resource_id,
                reason,
            } => {
                tracing::warn!(resource = %resource_id, reason, "authorization refused");
                self.io.counters.authorizations_failed += 1;
                self.refused.insert(resource_id, reason);
                if let Some(pending) = self.pending.get_mut(&resource_id) {
                    pending.buffered.clear();
                }
            }
            Ingress::IceCandidates {
                gateway_id,
                candidates,
            } => {
                let Some(connection) = self.connections.get_mut(&gateway_id) else {
                    self.io.counters.candidates_for_unknown_gateway += candidates.len() as u64;
                    return;
                };
                connection.wake(now);
                let mut added = Vec::new();
                for line in &candidates {
                    if let Some(candidate) = candidate::parse(line) {
                        added.extend(connection.add_remote(candidate));
                    }
                }
                self.io.reach_remotes(now, connection, &added);
                connection.agent.handle_timeout(now);
                self.io.drive(now, connection);
            }
            Ingress::InvalidateIceCandidates {
                gateway_id,
                candidates,
            } => {
                let Some(connection) = self.connections.get_mut(&gateway_id) else {
                    self.io.counters.candidates_for_unknown_gateway += candidates.len() as u64;
                    return;
                };
                connection.wake(now);
                for candidate in candidates.iter().filter_map(|line| candidate::parse(line)) {
                    connection.remove_remote(&candidate);
                }
                connection.agent.handle_timeout(now);
                self.io.drive(now, connection);
            }
        }
        let io = &mut self.io;
        io.relays.handle_timeout(now, &mut io.transmits);
        self.after_relays(now);
    }

    fn upsert_resource(&mut self, now: Instant, resource: Resource) {
        let moved = self
            .resources
            .get(&resource.id)
            .is_some_and(|known| known.kind != resource.kind);
        if moved {
            // Another address is another grant.
            self.remove_resource(now, resource.id);
        }
        self.resources.insert(resource.id, resource);
    }

    fn remove_resource(&mut self, now: Instant, id: Uuid) {
        self.resources.remove(&id);
        self.pending.remove(&id);
        self.refused.remove(&id);
        if let Some(gateway) = self.by_resource.remove(&id)
            && let Some(connection) = self.connections.get_mut(&gateway)
        {
            connection.resources.remove(&id);
            if connection.resources.is_empty() {
                self.say_goodbye(now, gateway);
            }
        }
    }

    fn update_network(&mut self) {
        let Some(interface) = self.interface else {
            return;
        };
        let mut routes = BTreeSet::from(tunnel_ranges());
        let mut default_route = false;
        for resource in self.resources.values() {
            match &resource.kind {
                ResourceKind::Cidr(network) => {
                    routes.insert(*network);
                }
                ResourceKind::Dns(_) => routes.extend(proxy_ranges()),
                ResourceKind::Internet => default_route |= self.io.config.internet,
            }
        }
        let wanted = NetworkConfig {
            interface,
            routes,
            default_route,
        };
        if self.network.as_ref() != Some(&wanted) {
            self.network = Some(wanted);
            self.network_dirty = true;
        }
    }

    fn handle_grant(&mut self, now: Instant, grant: &AuthorizationCreated) {
        self.io.counters.authorizations_created += 1;
        let id = grant.gateway_id;
        if grant.use_iceless {
            tracing::error!(gateway = %id, "the portal asked for ICE-less path finding, which was not offered");
            return;
        }
        self.refused.remove(&grant.resource_id);
        self.wanted.remove(&grant.resource_id);
        let buffered = self
            .pending
            .remove(&grant.resource_id)
            .map(|p| p.buffered)
            .unwrap_or_default();
        if self.connections.get(&id).is_some_and(|c| !c.matches(grant)) {
            tracing::info!(gateway = %id, "connection replaced");
            self.forget(id);
        }
        if !self.connections.contains_key(&id) {
            tracing::info!(gateway = %id, resource = %grant.resource_id, "new connection");
            let index = self.fresh_index();
            let connection = Connection::new(now, &self.private_key, grant, index);
            self.connections.insert(id, connection);
        }
        self.by_resource.insert(grant.resource_id, id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.resources.insert(grant.resource_id);
            connection.ipv4 = grant.gateway_ipv4;
            connection.ipv6 = grant.gateway_ipv6;
            connection.wake(now);
            // An upsert signals everything again (§2.7).
            connection.signalled.clear();
            self.io.sync_candidates(now, connection);
            self.io.drive(now, connection);
        }
        for packet in buffered {
            self.handle_tun_packet(now, &packet);
        }
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

/// Sends a WireGuard datagram on the current path, if there is one.
fn send_on(
    now: Instant,
    path: Option<Nominated>,
    datagram: &[u8],
    relays: &mut Relays,
    transmits: &mut TransmitQueue,
) {
    let Some(path) = path else { return };
    if relays.is_relayed(path.local) {
        relays.send(now, path.local, path.remote, datagram, transmits);
    } else {
        transmits.push(Some(path.local.ip()), path.remote, &[], datagram);
    }
}

impl Io {
    fn send_packet(&mut self, now: Instant, connection: &mut Connection, packet: &[u8]) {
        let path = connection.nominated;
        let Some(needed) = packet.len().checked_add(32) else {
            return;
        };
        if needed > self.scratch.len() {
            return;
        }
        if let Some(datagram) = connection.encapsulate(now, packet, self.scratch.as_mut_slice()) {
            send_on(now, path, datagram, &mut self.relays, &mut self.transmits);
        }
    }

    /// Drains the agent: checks go out, events are applied, due work is done.
    fn drive(&mut self, now: Instant, connection: &mut Connection) {
        // With Ta = 0 the agent does one check per call; the pair limit of 100 bounds the rounds.
        for _ in 0..256 {
            while let Some(transmit) = connection.agent.poll_transmit() {
                let path = Nominated {
                    local: transmit.source,
                    remote: transmit.destination,
                };
                send_on(
                    now,
                    Some(path),
                    &transmit.contents,
                    &mut self.relays,
                    &mut self.transmits,
                );
            }
            while let Some(event) = connection.agent.poll_event() {
                if connection.handle_agent_event(now, event) {
                    tracing::info!(gateway = %connection.gateway_id, pair = ?connection.nominated, "nominated");
                    let path = connection.nominated;
                    if let Some(datagram) =
                        connection.initiate_after_nomination(now, self.scratch.as_mut_slice())
                    {
                        send_on(now, path, datagram, &mut self.relays, &mut self.transmits);
                    }
                }
            }
            if connection.agent.poll_timeout().is_none_or(|at| at > now) {
                break;
            }
            connection.agent.handle_timeout(now);
        }
    }

    fn tick(&mut self, now: Instant, connection: &mut Connection) -> Result<(), Failure> {
        let path = connection.nominated;
        if let Some(datagram) = connection.tick(now, self.scratch.as_mut_slice())? {
            send_on(now, path, datagram, &mut self.relays, &mut self.transmits);
        }
        Ok(())
    }

    /// Channels and host addresses for new remote candidates.
    fn reach_remotes(
        &mut self,
        now: Instant,
        connection: &Connection,
        remotes: &[(SocketAddr, CandidateKind)],
    ) {
        for (addr, kind) in remotes {
            let through_relay = *kind != CandidateKind::Host;
            if through_relay && let Some(relay) = connection.relay {
                self.relays.want_channel(now, relay, *addr);
            }
            if self.config.only != Only::Relay && *kind != CandidateKind::Relayed {
                self.route_probes.push_back(*addr);
            }
        }
    }

    /// Brings the agent's local candidates and what the gateway knows of them up to date.
    fn sync_candidates(&mut self, now: Instant, connection: &mut Connection) {
        if self.config.only != Only::Direct {
            let usable = connection
                .relay
                .is_some_and(|relay| self.relays.has_allocation(relay));
            if !usable && let Some(relay) = self.relays.best() {
                connection.relay = Some(relay);
                let remotes = connection.remote.clone();
                self.reach_remotes(now, connection, &remotes);
            }
        }
        let wanted = self.wanted_candidates(connection.relay);
        for candidate in &wanted {
            if !connection.local.iter().any(|c| same(c, candidate))
                && let Some(added) = connection.agent.add_local_candidate(candidate.clone())
            {
                connection.local.push(added.clone());
            }
        }
        // Only relayed candidates are ever taken back (§2.3).
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut connection.local)
            .into_iter()
            .partition(|c| c.kind() != CandidateKind::Relayed || wanted.iter().any(|w| same(c, w)));
        connection.local = kept;
        for candidate in gone {
            connection.agent.invalidate_candidate(&candidate);
            if connection.signalled.iter().any(|c| same(c, &candidate)) {
                connection.signalled.retain(|c| !same(c, &candidate));
                connection.withdrawn.push(candidate);
            }
        }
        if self.portal_up {
            self.signal(connection);
        }
        connection.agent.handle_timeout(now);
    }

    fn signal(&mut self, connection: &mut Connection) {
        let gateway_id = connection.gateway_id;
        // Withdrawn and added again while the portal was away: nothing to say.
        let local = &connection.local;
        connection
            .withdrawn
            .retain(|gone| !local.iter().any(|c| same(c, gone)));
        if !connection.withdrawn.is_empty() {
            let candidates = candidate::to_lines(std::mem::take(&mut connection.withdrawn));
            self.egress
                .push_back(Egress::InvalidateGatewayIceCandidates {
                    gateway_id,
                    candidates,
                });
        }
        let fresh: Vec<Candidate> = connection
            .local
            .iter()
            .filter(|c| !connection.signalled.iter().any(|s| same(s, c)))
            .cloned()
            .collect();
        if !fresh.is_empty() {
            connection.signalled.extend(fresh.iter().cloned());
            self.egress.push_back(Egress::NewGatewayIceCandidates {
                gateway_id,
                candidates: candidate::to_lines(fresh),
            });
        }
    }

    fn wanted_candidates(&self, relay: Option<Uuid>) -> Vec<Candidate> {
        let mut hosts: Vec<SocketAddr> = Vec::new();
        let mut wanted = Vec::new();
        if self.config.only != Only::Relay {
            for ip in &self.host_addrs {
                let port = if ip.is_ipv4() {
                    self.config.port_v4
                } else {
                    self.config.port_v6
                };
                hosts.extend(port.map(|port| SocketAddr::new(*ip, port)));
            }
            hosts.extend(self.relays.paths().filter_map(|(_, p)| p.local()));
            hosts.sort_unstable();
            hosts.dedup();
            wanted.extend(hosts.iter().map(|addr| Candidate::host(*addr, "udp")));
            wanted.extend(
                self.relays
                    .paths()
                    .filter_map(|(_, p)| Some((p.mapped()?, p.local()?)))
                    .map(|(mapped, local)| Candidate::server_reflexive(mapped, local, "udp")),
            );
        }
        if self.config.only != Only::Direct {
            wanted.extend(
                self.relays
                    .paths()
                    .filter(|(id, _)| Some(*id) == relay)
                    .filter_map(|(_, p)| Some((p.relayed()?, p.local()?)))
                    .map(|(relayed, local)| Candidate::relayed(relayed, local, "udp")),
            );
        }
        // Addresses that cannot be candidates, such as link-local ones, are left out.
        wanted.into_iter().flatten().collect()
    }
}

fn same(a: &Candidate, b: &Candidate) -> bool {
    a.addr() == b.addr() && a.kind() == b.kind() && a.local() == b.local()
}

fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> IpNetwork {
    IpNetwork::new_truncate(Ipv4Addr::new(a, b, c, d), prefix).expect("prefix is at most 32")
}

fn v6(segments: [u16; 8], prefix: u8) -> IpNetwork {
    IpNetwork::new_truncate(Ipv6Addr::from(segments), prefix).expect("prefix is at most 128")
}

/// Tunnel addresses of all clients and gateways (§5.1).
fn tunnel_ranges() -> [IpNetwork; 2] {
    [
        v4(100, 64, 0, 0, 11),
        v6([0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, 0], 107),
    ]
}

/// Proxy addresses of DNS resources (§5.1).
fn proxy_ranges() -> [IpNetwork; 2] {
    [
        v4(100, 96, 0, 0, 11),
        v6([0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, 0], 107),
    ]
}

fn is_tunnel_range(ip: IpAddr) -> bool {
    tunnel_ranges().iter().any(|n| n.contains(ip))
}

fn in_proxy_range(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => u32::from(ip) >> 21 == u32::from(Ipv4Addr::new(100, 96, 0, 0)) >> 21,
        IpAddr::V6(_) => proxy_ranges()[1].contains(ip),
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
