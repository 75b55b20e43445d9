//! The gateway's core, clients of the lab, its portal, and TURN servers, joined by the simulated
//! network. What the workers do with packets is done here with the same tables.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::noise::TunnResult;
use firezone_lab::client::config::Only;
use firezone_lab::client::core::{Core as Client, CoreConfig};
use firezone_lab::client::messages::{FrameIn, FrameOut, Ingress as ClientIngress, TOPIC};
use firezone_lab::portal::Timings;
use firezone_lab::portal::core::{ConnId, ConnectRequest, Core as Portal, Outgoing, Protocol};
use firezone_lab::portal::derive;
use firezone_lab::portal::events::Now;
use firezone_lab::portal::policy::{Policy, Relay};
use firezone_lab::portal::store::{Role, Store};
use serde_json::{Value, json};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use uuid::Uuid;

use super::nat::{Behaviour, Nat};
use super::network::{Datagram, HostId, Line, Network, RELAY_PORT, Site, SiteId};
use crate::connectivity;
use crate::connectivity::relay::double::{Style, TurnServer};
use crate::datapath::counters::Counters;
use crate::datapath::peers::{Path, PathKind, Peer, PeerTable};
use crate::datapath::worker::established;
use crate::gateway::core::Core;
use crate::packet::{Meta, samples};
use crate::portal::login;
use crate::portal::messages::Egress;
use crate::portal::wire::{self, Inbound};

/// Gateway and clients prefer the same port, as stock ones do (data-path spec §1.1).
pub(super) const PORT: u16 = 52625;
const SECRET: &str = "simulated";
/// Where the resource is that all clients talk to.
const RESOURCE: [u8; 4] = [10, 20, 0, 1];
const RESOURCE_ID: Uuid = Uuid::from_u128(0x5b5b);
/// Unless a test says otherwise.
const PORTAL_DELAY: Duration = Duration::from_millis(20);
/// The time of day at the start.
const WALL: Duration = Duration::from_secs(1_800_000_000);

/// How a site reaches the IPv4 internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum V4 {
    /// Not at all.
    None,
    /// With public addresses.
    Public,
    /// Through a router.
    Behind(Behaviour),
}

/// How a site reaches the IPv6 internet; addresses are always public.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum V6 {
    None,
    Open,
    /// Only answers are let in.
    Stateful,
}

/// The access of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Access {
    pub(super) v4: V4,
    pub(super) v6: V6,
    pub(super) only_relays: bool,
    pub(super) isolates: bool,
}

/// Where a client is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Place {
    /// In a site of its own.
    Own(Access, Line),
    /// In the same site as the gateway.
    WithGateway,
    /// In the same site as the client before it.
    WithPrevious,
}

/// What a simulation starts with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) gateway: (Access, Line),
    pub(super) clients: Vec<Place>,
    /// Families of each relay: IPv4, IPv6.
    pub(super) relays: Vec<(bool, bool)>,
    pub(super) style: Style,
}

/// What went through the tunnel for a client.
#[derive(Debug, Default)]
pub(super) struct Flow {
    sent: u64,
    /// The way that each request and answer took, by number.
    ways: HashMap<(bool, u64), (SocketAddr, SocketAddr)>,
    /// The newest that arrived: requests at the gateway, answers at the client.
    newest: [Option<u64>; 2],
    /// Answers, and when they came.
    pub(super) answers: Vec<(Instant, u64)>,
    /// Packets that came after a later one although both went the same way.
    pub(super) overtaken: u64,
}

pub(super) struct Device {
    pub(super) core: Client,
    pub(super) host: HostId,
    pub(super) flow: Flow,
    pub(super) active: bool,
    /// Whether its public address or port ever changed.
    pub(super) moved: bool,
    /// Its address in the tunnel, once the portal has told it.
    tunnel: Option<Ipv4Addr>,
    link: Link,
    next_packet: Instant,
    packets: u64,
}

/// One end's connection to the portal.
struct Link {
    conn: Option<(ConnId, UnboundedReceiver<Outgoing>)>,
    references: u64,
    joined: bool,
}

struct RelayHost {
    server: TurnServer,
    host: HostId,
}

enum Mail {
    /// To the portal, on a connection. The gateway's messages are kept as they were, since those
    /// under way can be lost.
    Portal(ConnId, String, Option<Egress>),
    Gateway(ConnId, String),
    Client(usize, ConnId, String),
}

pub(super) struct World {
    pub(super) now: Instant,
    start: Instant,
    wall: SystemTime,
    pub(super) network: Network,
    pub(super) core: Core,
    pub(super) table: Arc<PeerTable>,
    pub(super) gateway_host: HostId,
    gateway_link: Link,
    pub(super) devices: Vec<Device>,
    relays: Vec<RelayHost>,
    pub(super) offered: Vec<Relay>,
    portal: Portal,
    mail: BTreeMap<(Instant, u64), Mail>,
    mails: u64,
    pub(super) portal_up: bool,
    /// One way between anybody and the portal.
    pub(super) portal_delay: Duration,
    /// How often the gateway's timers fired since this was last reset.
    pub(super) wake_ups: u64,
    /// Packets that came out of the tunnel for somebody else than they were meant for.
    pub(super) astray: u64,
    traced_from: Option<f64>,
    /// Whether gateway and clients are still running.
    running: bool,
    /// Whether a relay may hold an allocation that the gateway could not give back: its public
    /// address changed, or the relay was out of reach and is now used by its other address.
    pub(super) moved: bool,
    pub(super) story: Vec<String>,
    kinds: Vec<Option<PathKind>>,
}

fn policy(relays: &[Relay]) -> Policy {
    let mut policy = Policy::parse(&format!(
        r#"
sites: [{{id: 5a5a5a5a-0000-4000-8000-000000000001, name: Lab}}]
gateway_tokens: [{{token: g}}]
client_tokens: [{{token: c}}]
resources: [{{id: {RESOURCE_ID}, type: cidr, name: Net, address: 10.20.0.0/16}}]
relays: []
"#
    ))
    .expect("a valid policy");
    policy.relays = relays.to_vec();
    policy
}

impl World {
    pub(super) fn new(plan: &Plan) -> Self {
        let now = Instant::now();
        let wall = SystemTime::UNIX_EPOCH + WALL;
        let mut network = Network::new(plan.seed);
        let (relays, offered) = Self::relays(plan, &mut network);
        let (gateway_host, hosts) = populate(plan, &mut network);
        let portal = Portal::new(
            Now {
                instant: now,
                unix_ms: WALL.as_millis() as u64,
            },
            policy(&offered),
            Store::open(None).expect("in memory").in_order(),
            Timings::default(),
        );
        let table = Arc::new(PeerTable::new());
        let core = Core::new(
            now,
            wall,
            Arc::clone(&table),
            Arc::new(Counters::new()),
            plan.seed,
        );
        let devices: Vec<Device> = hosts
            .into_iter()
            .enumerate()
            .map(|(n, host)| {
                let config = CoreConfig {
                    only: Only::All,
                    // The stock relay gives one user a single allocation.
                    one_allocation_per_relay: plan.style == Style::Stock,
                    internet: false,
                    port_v4: network.address(host, true).map(|_| PORT),
                    port_v6: network.address(host, false).map(|_| PORT),
                    connect: vec![RESOURCE_ID],
                };
                let key = [u8::try_from(n + 1).expect("few"); 32];
                Device {
                    core: Client::new(now, key, config),
                    host,
                    flow: Flow::default(),
                    active: true,
                    moved: false,
                    tunnel: None,
                    link: Link::new(),
                    next_packet: now,
                    packets: 0,
                }
            })
            .collect();
        let mut world = Self {
            now,
            start: now,
            wall,
            network,
            core,
            table,
            gateway_host,
            gateway_link: Link::new(),
            kinds: vec![None; devices.len()],
            devices,
            relays,
            offered,
            portal,
            mail: BTreeMap::new(),
            mails: 0,
            portal_up: true,
            portal_delay: PORTAL_DELAY,
            wake_ups: 0,
            astray: 0,
            traced_from: std::env::var("FIREZONE_TRACE")
                .ok()
                .map(|s| s.parse().expect("seconds")),
            running: true,
            moved: false,
            story: vec![format!("{plan:?}")],
        };
        // As the gateway does at its start: the source addresses of the default routes.
        for v4 in [true, false] {
            if let Some(ip) = world.network.address(gateway_host, v4) {
                world.core.add_host(now, SocketAddr::new(ip, PORT));
            }
        }
        world.connect_portal();
        world
    }

    fn relays(plan: &Plan, network: &mut Network) -> (Vec<RelayHost>, Vec<Relay>) {
        let mut hosts = Vec::new();
        let mut offered = Vec::new();
        for (n, (v4, v6)) in (1..).zip(&plan.relays) {
            let ip4: IpAddr = [203, 0, 113, n].into();
            let ip6: IpAddr = format!("2001:db8:f::{n}").parse().expect("an address");
            let addresses: Vec<IpAddr> = [v4.then_some(ip4), v6.then_some(ip6)]
                .into_iter()
                .flatten()
                .collect();
            let texts: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
            let sockets: Vec<String> = addresses
                .iter()
                .map(|ip| SocketAddr::new(*ip, RELAY_PORT).to_string())
                .collect();
            let refs = |v: &[String]| v.iter().map(|s| s.to_owned()).collect::<Vec<_>>();
            let (sockets, texts) = (refs(&sockets), refs(&texts));
            let mut server = TurnServer::new(
                plan.style,
                &sockets.iter().map(String::as_str).collect::<Vec<_>>(),
                &texts.iter().map(String::as_str).collect::<Vec<_>>(),
            );
            server.secret = Some(SECRET.to_owned());
            server.serves_others = true;
            let site = network.add_site(Site::new(Line {
                delay: Duration::from_millis(u64::from(n)),
                jitter: Duration::ZERO,
                loss: 0.0,
            }));
            let host = network.add_host(site, addresses);
            hosts.push(RelayHost { server, host });
            let mut entry =
                json!({"id": Uuid::from_u128(0x5d00 + u128::from(n)), "secret": SECRET});
            if *v4 {
                entry["v4"] = json!(SocketAddr::new(ip4, RELAY_PORT));
            }
            if *v6 {
                entry["v6"] = json!(SocketAddr::new(ip6, RELAY_PORT));
            }
            offered.push(serde_json::from_value(entry).expect("a relay"));
        }
        (hosts, offered)
    }

    /// Notes something for whoever reads a failure.
    pub(super) fn tell(&mut self, what: impl Into<String>) {
        let at = (self.now - self.start).as_secs_f64();
        self.story.push(format!("{at:8.3} {}", what.into()));
    }

    pub(super) fn wall_now(&self) -> Now {
        Now {
            instant: self.now,
            unix_ms: (WALL + (self.now - self.start)).as_millis() as u64,
        }
    }

    // ---- what a schedule does ----------------------------------------------------------------

    pub(super) fn relay_count(&self) -> usize {
        self.relays.len()
    }

    /// A relay answers nothing, or does again.
    pub(super) fn silence_relay(&mut self, relay: usize, silent: bool) {
        self.network.set_down(self.relays[relay].host, silent);
        self.moved |= silent;
        self.tell(format!("relay {relay} silent: {silent}"));
    }

    /// A relay is restarted: it knows nobody any more.
    pub(super) fn restart_relay(&mut self, relay: usize) {
        self.relays[relay].server.restart();
        self.tell(format!("relay {relay} restarts"));
    }

    /// The portal learns which relays there are.
    pub(super) fn offer_relays(&mut self, which: &[usize]) {
        let relays: Vec<Relay> = which.iter().map(|n| self.offered[*n].clone()).collect();
        let now = self.wall_now();
        self.portal.set_relays(now, relays, false, false);
        self.tell(format!("portal knows relays {which:?}"));
    }

    pub(super) fn restart_router(&mut self, site: SiteId) {
        if let Some(nat) = &mut self.network.sites[site].nat {
            nat.restart();
            self.moved |= site == self.network.site_of(self.gateway_host);
            for device in &mut self.devices {
                device.moved |= site == self.network.site_of(device.host);
            }
        }
        self.tell(format!("router of site {site} restarts"));
    }

    /// Allocations of the gateway that live at relays.
    pub(super) fn allocations(&self) -> usize {
        let key = STANDARD.encode(self.core.public_key());
        let user = derive::coturn_credentials(SECRET, &key, derive::FIXED_EXPIRY).username;
        self.relays
            .iter()
            .map(|r| r.server.allocations_of(self.now, &user))
            .sum()
    }

    /// When the gateway asked for relays, in seconds since the start.
    pub(super) fn relays_asked_for(&self) -> Vec<f64> {
        let conn = self.gateway_link.conn.as_ref().map(|(conn, _)| *conn);
        self.portal
            .events(10_000, 0, Some("no_relays"))
            .iter()
            .filter(|event| event.detail["conn"].as_u64() == conn)
            .map(|event| (event.at_ms - WALL.as_millis() as u64) as f64 / 1000.0)
            .collect()
    }

    pub(super) fn shut_down(&mut self) {
        self.tell("shutdown");
        let now = self.now;
        self.core.shutdown(now);
        for device in &mut self.devices {
            device.active = false;
            device.core.shutdown(now);
        }
        self.drain();
        self.running = false;
    }

    pub(super) fn set_portal(&mut self, up: bool) {
        if up == self.portal_up {
            return;
        }
        self.portal_up = up;
        self.tell(format!("portal: {up}"));
        if up {
            self.connect_portal();
            return;
        }
        let under_way = std::mem::take(&mut self.mail);
        let lost = under_way.into_values().filter_map(|mail| match mail {
            Mail::Portal(_, _, egress) => egress,
            _ => None,
        });
        self.core.disconnected(self.now, lost.collect());
        let now = self.wall_now();
        let ended = || firezone_lab::portal::core::Ending {
            by: "transport",
            code: None,
            reason: String::new(),
        };
        for link in std::iter::once(&mut self.gateway_link)
            .chain(self.devices.iter_mut().map(|d| &mut d.link))
        {
            if let Some((conn, _)) = link.conn.take() {
                self.portal.closed(now, conn, ended());
            }
            link.joined = false;
        }
        for device in &mut self.devices {
            device.core.handle_portal_down("gone".to_owned());
        }
    }

    // ---- portal ------------------------------------------------------------------------------

    fn connect_portal(&mut self) {
        let now = self.wall_now();
        let key = self.core.public_key();
        let agent = "Debian/13.0 gateway/1.6.0 (x86_64; 6.12)";
        self.gateway_link = connect(&mut self.portal, now, Role::Gateway, "gateway", agent, key);
        let conn = self.gateway_link.conn.as_ref().expect("just made").0;
        self.post(Mail::Portal(conn, wire::encode_join(0), None));
        for n in 0..self.devices.len() {
            let key = self.devices[n].core.public_key();
            let name = format!("client-{n}");
            let agent = "Debian/13.0 headless-client/1.5.11 (x86_64; 6.12)";
            let link = connect(&mut self.portal, now, Role::Client, &name, agent, key);
            let conn = link.conn.as_ref().expect("just made").0;
            self.devices[n].link = link;
            self.post(Mail::Portal(
                conn,
                client_frame("phx_join", Value::Null, 0),
                None,
            ));
        }
    }

    fn post(&mut self, mail: Mail) {
        self.mails += 1;
        self.mail
            .insert((self.now + self.portal_delay, self.mails), mail);
    }

    fn collect_mail(&mut self) {
        if let Some((conn, queue)) = &mut self.gateway_link.conn {
            let conn = *conn;
            let texts: Vec<String> = texts(queue).collect();
            for text in texts {
                self.post(Mail::Gateway(conn, text));
            }
        }
        for n in 0..self.devices.len() {
            if let Some((conn, queue)) = &mut self.devices[n].link.conn {
                let conn = *conn;
                let texts: Vec<String> = texts(queue).collect();
                for text in texts {
                    self.post(Mail::Client(n, conn, text));
                }
            }
        }
    }

    fn deliver_mail(&mut self) {
        while let Some(entry) = self.mail.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            match entry.remove() {
                Mail::Portal(conn, text, _) => {
                    let now = self.wall_now();
                    self.portal.handle_text(now, conn, &text);
                }
                Mail::Gateway(conn, text) => {
                    if self.gateway_link.is(conn) {
                        self.gateway_mail(&text);
                    }
                }
                Mail::Client(n, conn, text) => {
                    if self.devices[n].link.is(conn) {
                        self.client_mail(n, &text);
                    }
                }
            }
        }
    }

    fn gateway_mail(&mut self, text: &str) {
        match wire::decode(text).expect("the portal's frames are in order") {
            Inbound::Message { message, skipped } => {
                assert_eq!(skipped, 0, "{text}");
                self.core.handle_portal(self.now, message);
            }
            Inbound::Reply(reply) => {
                assert_eq!(reply.result, Ok(()), "{text}");
                if !self.gateway_link.joined {
                    self.gateway_link.joined = true;
                    self.core.connected(self.now);
                }
            }
            other => panic!("{other:?}"),
        }
    }

    fn client_mail(&mut self, n: usize, text: &str) {
        let frame: FrameIn = serde_json::from_str(text).expect("a frame");
        let device = &mut self.devices[n];
        if frame.event == "phx_reply" {
            if !device.link.joined {
                device.link.joined = true;
                device.core.handle_portal_up(self.now);
            }
        } else if let Ok(Some(message)) = ClientIngress::decode(&frame.event, frame.payload) {
            device.core.handle_portal(self.now, message);
            device.tunnel = device.core.status(self.now).tunnel.ipv4;
        }
    }

    // ---- packets -----------------------------------------------------------------------------

    fn request(&mut self, n: usize) {
        let device = &mut self.devices[n];
        let Some(source) = device.tunnel else {
            return;
        };
        device.packets += 1;
        let packet = numbered(source.octets(), RESOURCE, n, device.packets);
        device.flow.sent += 1;
        if let Some(way) = device.way(self.now) {
            device.flow.ways.insert((false, device.packets), way);
        }
        device.core.handle_tun_packet(self.now, &packet);
    }

    /// A datagram that arrives at the gateway: what a worker would do with it.
    fn gateway_receives(&mut self, datagram: &Datagram) {
        let Datagram { from, to, payload } = datagram;
        let Some((index, range)) = established(&self.table.relays(), *from, payload) else {
            self.core.handle_datagram(self.now, *to, *from, payload);
            return;
        };
        let Some(peer) = self.table.by_receiver_index(index) else {
            return;
        };
        let mut scratch = [0; 2048];
        let packet = match peer.tunn().decapsulate(None, &payload[range], &mut scratch) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                packet.to_vec()
            }
            _ => return,
        };
        self.leave_tunnel(&peer, &packet);
    }

    fn leave_tunnel(&mut self, peer: &Peer, packet: &[u8]) {
        let meta = Meta::parse(packet).expect("clients send valid packets");
        if meta.is_control() {
            self.core.handle_control(self.now, peer.client, packet);
            return;
        }
        let allowed = peer
            .policy()
            .is_some_and(|policy| policy.outbound(&meta, self.now).is_allow());
        if !allowed {
            return;
        }
        peer.counters.traffic.received(1, packet.len() as u64);
        let (n, number) = number_of(packet);
        if Some(meta.src) != self.devices[n].tunnel.map(IpAddr::V4) {
            self.astray += 1;
        }
        self.devices[n].flow.arrived(false, number);
        // The resource answers.
        let IpAddr::V4(client) = meta.src else {
            return;
        };
        let answer = numbered(RESOURCE, client.octets(), n, number);
        self.enter_tunnel(client, &answer, n, number);
    }

    fn enter_tunnel(&mut self, client: Ipv4Addr, packet: &[u8], n: usize, number: u64) {
        let Some(peer) = self.table.by_address(client.into()) else {
            return;
        };
        let Some(path) = peer.path() else {
            return;
        };
        let mut buffer = vec![0; packet.len() + 32];
        let mut tunn = peer.tunn();
        if tunn.time_since_last_handshake().is_none() {
            return;
        }
        let TunnResult::WriteToNetwork(message) = tunn.encapsulate(packet, &mut buffer) else {
            return;
        };
        let message = message.to_vec();
        drop(tunn);
        peer.counters.traffic.sent(1, packet.len() as u64);
        let Path {
            source,
            destination,
            channel,
            ..
        } = *path;
        let way = SocketAddr::new(source.unwrap_or(destination.ip()), channel.unwrap_or(0));
        let flow = &mut self.devices[n].flow;
        flow.ways.insert((true, number), (way, destination));
        let payload = match channel {
            Some(channel) => connectivity::wrap(channel, &message).expect("short"),
            None => message,
        };
        self.network.send(
            self.now,
            self.gateway_host,
            source,
            PORT,
            destination,
            payload,
        );
    }

    fn client_packets(&mut self, n: usize) {
        let device = &mut self.devices[n];
        let packets: Vec<Vec<u8>> = device
            .core
            .tun_packets()
            .iter()
            .map(<[u8]>::to_vec)
            .collect();
        device.core.tun_packets().clear();
        for packet in packets {
            let (meant, number) = number_of(&packet);
            if meant != n {
                self.astray += 1;
                continue;
            }
            let flow = &mut self.devices[n].flow;
            flow.arrived(true, number);
            flow.answers.push((self.now, number));
        }
    }

    // ---- time --------------------------------------------------------------------------------

    /// Moves everything that is ready at this instant.
    fn drain(&mut self) {
        if !self.running {
            return;
        }
        loop {
            let mut quiet = true;
            while self.core.poll_command().is_some() {}
            while self.core.poll_story().is_some() {}
            while let Some(t) = self.core.poll_transmit() {
                quiet = false;
                let to = t.destination;
                let host = self.gateway_host;
                self.network
                    .send(self.now, host, t.source, PORT, to, t.payload);
            }
            while let Some(message) = self.core.poll_egress() {
                quiet = false;
                let Some((conn, _)) = self.gateway_link.conn else {
                    panic!("said without a portal: {message:?}");
                };
                self.gateway_link.references += 1;
                let reference = self.gateway_link.references;
                let text = wire::encode(&message, reference, login::Protocol::V2);
                self.post(Mail::Portal(conn, text, Some(message)));
            }
            for n in 0..self.devices.len() {
                quiet &= self.drain_client(n);
            }
            self.collect_mail();
            if quiet {
                break;
            }
        }
        self.note_paths();
    }

    fn drain_client(&mut self, n: usize) -> bool {
        let mut quiet = true;
        while let Some(probe) = self.devices[n].core.poll_route_probe() {
            let host = self.devices[n].host;
            if let Some(ip) = self.network.address(host, probe.is_ipv4()) {
                self.devices[n].core.handle_host_address(self.now, ip);
            }
        }
        while let Some(batch) = self.devices[n].core.transmits().pop() {
            quiet = false;
            for datagram in batch.buf.chunks(batch.segment) {
                let host = self.devices[n].host;
                self.network.send(
                    self.now,
                    host,
                    batch.src,
                    PORT,
                    batch.dst,
                    datagram.to_vec(),
                );
            }
        }
        while let Some(message) = self.devices[n].core.poll_egress() {
            quiet = false;
            let (event, payload) = message.encode();
            let link = &mut self.devices[n].link;
            link.references += 1;
            let text = client_frame(event, payload, link.references);
            if let Some((conn, _)) = link.conn {
                self.post(Mail::Portal(conn, text, None));
            }
        }
        self.client_packets(n);
        quiet
    }

    fn note_paths(&mut self) {
        for n in 0..self.devices.len() {
            let kind = self.kind(n);
            if kind != self.kinds[n] {
                self.kinds[n] = kind;
                self.tell(format!("client {n}: {kind:?}"));
            }
        }
    }

    /// The kind of path that the gateway has to a client.
    pub(super) fn kind(&self, n: usize) -> Option<PathKind> {
        let address = self.devices[n].tunnel?;
        let peer = self.table.by_address(address.into())?;
        Some(peer.path()?.kind)
    }

    /// What [`oracle`] needs to know about the relays.
    pub(super) fn relay_hosts(&self) -> Vec<HostId> {
        self.relays.iter().map(|r| r.host).collect()
    }

    fn relay_receives(&mut self, relay: usize, datagram: Datagram) {
        let Datagram { from, to, payload } = datagram;
        let RelayHost { server, host } = &mut self.relays[relay];
        let host = *host;
        if to.port() != RELAY_PORT {
            if let Some((client, data)) = server.receive(self.now, to, from, &payload) {
                // From the socket of the family that the client uses.
                self.network
                    .send(self.now, host, None, RELAY_PORT, client, data);
            }
            return;
        }
        let stun = payload.len() >= 20 && payload[4..8] == [0x21, 0x12, 0xa4, 0x42];
        let channel = payload.first().is_some_and(|b| (64..80).contains(b));
        if !stun && !channel {
            return;
        }
        let answer = server.handle(self.now, from, to, &payload);
        let forwarded = std::mem::take(&mut server.forwarded);
        if let Some(answer) = answer {
            self.network
                .send(self.now, host, Some(to.ip()), RELAY_PORT, from, answer);
        }
        for (relayed, peer, payload) in forwarded {
            let (ip, port) = (relayed.ip(), relayed.port());
            self.network
                .send(self.now, host, Some(ip), port, peer, payload);
        }
    }

    /// With `FIREZONE_TRACE=s` every datagram that arrives after `s` seconds is printed.
    fn trace(&self, host: HostId, datagram: &Datagram) {
        let at = (self.now - self.start).as_secs_f64();
        if self.traced_from.is_none_or(|from| at < from) {
            return;
        }
        let who = if host == self.gateway_host {
            "gateway".to_owned()
        } else if let Some(n) = self.devices.iter().position(|d| d.host == host) {
            format!("client {n}")
        } else {
            format!("relay host {host}")
        };
        let Datagram { from, to, payload } = datagram;
        let head = &payload[..payload.len().min(8)];
        eprintln!(
            "{at:8.3} {who}: {from} -> {to} {head:02x?} {}",
            payload.len()
        );
    }

    fn arrivals(&mut self) {
        while let Some((host, datagram)) = self.network.poll(self.now) {
            self.trace(host, &datagram);
            if host == self.gateway_host {
                if self.running && datagram.to.port() == PORT {
                    self.gateway_receives(&datagram);
                }
            } else if let Some(relay) = self.relays.iter().position(|r| r.host == host) {
                self.relay_receives(relay, datagram);
            } else if let Some(n) = self.devices.iter().position(|d| d.host == host)
                && datagram.to.port() == PORT
                && self.running
            {
                let Datagram { from, to, payload } = datagram;
                self.devices[n]
                    .core
                    .handle_datagram(self.now, to.ip(), from, &payload);
            }
            self.drain();
        }
    }

    pub(super) fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        self.drain();
        let mut spins = 0u64;
        loop {
            let mut next = [
                self.network.poll_timeout(),
                self.running
                    .then(|| self.core.poll_timeout().map(|(at, _)| at))
                    .flatten(),
                self.portal.poll_timeout(),
                self.mail.first_key_value().map(|((at, _), _)| *at),
            ]
            .into_iter()
            .flatten()
            .min();
            for device in self.devices.iter_mut().filter(|_| self.running) {
                let own = device.core.poll_timeout();
                let packet = device.active.then_some(device.next_packet);
                next = next.into_iter().chain([own]).chain(packet).min();
            }
            let Some(at) = next.filter(|at| *at <= end) else {
                break;
            };
            if at > self.now {
                spins = 0;
            }
            spins += 1;
            assert!(
                spins < 10_000,
                "the world spins: {:?}\n{}",
                self.core.poll_timeout(),
                self.story.join("\n")
            );
            self.now = self.now.max(at);
            self.step();
        }
        self.now = end;
    }

    fn step(&mut self) {
        let now = self.now;
        self.arrivals();
        self.deliver_mail();
        self.drain();
        if self.running && self.core.poll_timeout().is_some_and(|(at, _)| at <= now) {
            self.wake_ups += 1;
            self.core.handle_timeout(now);
        }
        if self.portal.poll_timeout().is_some_and(|at| at <= now) {
            let now = self.wall_now();
            self.portal.handle_timeout(now);
        }
        for n in 0..self.devices.len() {
            let device = &mut self.devices[n];
            if !self.running {
                break;
            }
            if device.core.poll_timeout() <= now {
                device.core.handle_timeout(now);
            }
            if device.active && device.next_packet <= now {
                device.next_packet = now + Duration::from_millis(250);
                self.request(n);
            }
        }
        self.drain();
    }

    pub(super) fn run_secs(&mut self, seconds: f64) {
        self.run(Duration::from_secs_f64(seconds));
    }

    pub(super) fn wall(&self) -> SystemTime {
        self.wall + (self.now - self.start)
    }

    /// The story so far, and how relays and clients stand.
    pub(super) fn report(&self) -> String {
        let mut lines = self.story.clone();
        for (n, relay) in self.relays.iter().enumerate() {
            for seen in relay.server.seen.iter().rev().take(80).rev() {
                let at = (seen.at - self.start).as_secs_f64();
                lines.push(format!(
                    "relay {n}: {at:8.3} method {:#x} from {} to {}: {}",
                    seen.method, seen.from, seen.to, seen.answer
                ));
            }
        }
        for relay in self.core.relays(self.now, self.wall()) {
            lines.push(format!("gateway: {relay:?}"));
        }
        for client in self.core.client_statuses(self.now, self.wall(), true) {
            let text = serde_json::to_string(&client).unwrap_or_default();
            lines.push(format!("gateway: {text}"));
        }
        for (n, device) in self.devices.iter().enumerate() {
            let status = device.core.status(self.now);
            for relay in status.relays {
                let text = serde_json::to_string(&relay).unwrap_or_default();
                lines.push(format!("client {n}: {text}"));
            }
            for gateway in status.gateways {
                let text = serde_json::to_string(&gateway).unwrap_or_default();
                lines.push(format!("client {n}: {text}"));
            }
        }
        lines.join("\n")
    }

    /// When the first answer of the resource came to a client after `since`.
    pub(super) fn answered_after(&self, n: usize, since: Instant) -> Option<Duration> {
        self.devices[n]
            .flow
            .answers
            .iter()
            .find(|(at, _)| *at >= since)
            .map(|(at, _)| *at - since)
    }
}

impl Device {
    /// The pair that it sends on.
    pub(super) fn way(&self, now: Instant) -> Option<(SocketAddr, SocketAddr)> {
        let status = self.core.status(now);
        let gateway = status.gateways.first()?;
        Some((gateway.local.as_ref()?.addr, gateway.remote.as_ref()?.addr))
    }
}

impl Link {
    fn new() -> Self {
        Self {
            conn: None,
            references: 0,
            joined: false,
        }
    }

    fn is(&self, conn: ConnId) -> bool {
        self.conn.as_ref().is_some_and(|(id, _)| *id == conn)
    }
}

impl Flow {
    fn arrived(&mut self, answer: bool, number: u64) {
        let newest = &mut self.newest[usize::from(answer)];
        if let Some(newest) = *newest
            && newest > number
        {
            // What took another way may well be overtaken.
            let way = |n| self.ways.get(&(answer, n));
            if way(newest) == way(number) {
                self.overtaken += 1;
            }
        }
        *newest = (*newest).max(Some(number));
    }
}

fn texts(queue: &mut UnboundedReceiver<Outgoing>) -> impl Iterator<Item = String> + '_ {
    std::iter::from_fn(|| queue.try_recv().ok()).map(|outgoing| match outgoing {
        Outgoing::Text(text) => text,
        other => panic!("{other:?}"),
    })
}

fn connect(
    portal: &mut Portal,
    now: Now,
    role: Role,
    name: &str,
    agent: &str,
    public_key: [u8; 32],
) -> Link {
    let token = match role {
        Role::Gateway => "g",
        Role::Client => "c",
    };
    let params = [
        ("external_id", name.to_owned()),
        ("name", name.to_owned()),
        ("public_key", STANDARD.encode(public_key)),
    ];
    let request = ConnectRequest {
        role,
        protocol: Protocol::V2,
        remote: SocketAddr::from(([192, 0, 2, 200], 5000)),
        authorization: Some(format!("Bearer {token}")),
        user_agent: agent.to_owned(),
        params: params.map(|(k, v)| (k.to_owned(), v)).into(),
    };
    let admission = portal.admit(now, request).expect("a valid token");
    let (sender, queue) = mpsc::unbounded_channel();
    Link {
        conn: Some((portal.open(now, admission, sender), queue)),
        references: 0,
        joined: false,
    }
}

fn client_frame(event: &str, payload: Value, reference: u64) -> String {
    let frame = FrameOut {
        topic: TOPIC,
        event,
        payload,
        reference,
    };
    serde_json::to_string(&frame).expect("plain values")
}

/// A UDP packet that says whose it is and which.
fn numbered(source: [u8; 4], destination: [u8; 4], client: usize, number: u64) -> Vec<u8> {
    let mut udp = vec![0x13, 0x88, 0x13, 0x88, 0, 24, 0, 0];
    udp.extend_from_slice(&(client as u64).to_be_bytes());
    udp.extend_from_slice(&number.to_be_bytes());
    samples::ip4(source, destination, 17, &udp)
}

fn number_of(packet: &[u8]) -> (usize, u64) {
    let at = |i: usize| u64::from_be_bytes(packet[i..i + 8].try_into().expect("eight bytes"));
    (usize::try_from(at(28)).expect("few"), at(36))
}

/// Puts everybody where the plan says; answers the gateway's host and the clients'.
fn populate(plan: &Plan, network: &mut Network) -> (HostId, Vec<HostId>) {
    // All private networks are numbered alike, as home routers do it.
    let mut hosts = Vec::new();
    let mut sites: Vec<(SiteId, Access, u8)> = Vec::new();
    let mut settle = |network: &mut Network, place: Option<(Access, Line)>, at: Option<usize>| {
        let index = match (place, at) {
            (Some((access, line)), _) => {
                let number = u8::try_from(sites.len()).expect("few sites");
                let mut site = Site::new(line);
                site.stateful_v6 = access.v6 == V6::Stateful;
                site.only_relays = access.only_relays;
                site.isolates = access.isolates;
                if let V4::Behind(behaviour) = access.v4 {
                    site.nat = Some(Nat::new(behaviour, [198, 51, 100, number + 1].into()));
                }
                sites.push((network.add_site(site), access, 0));
                sites.len() - 1
            }
            (None, at) => at.expect("a site"),
        };
        let (site, access, count) = &mut sites[index];
        *count += 1;
        let mut addresses: Vec<IpAddr> = Vec::new();
        let number = u8::try_from(index).expect("few sites");
        match access.v4 {
            V4::None => {}
            V4::Public => addresses.push([192, 0, 2, 16 * (number + 1) + *count].into()),
            V4::Behind(_) => addresses.push([192, 168, 1, 1 + *count].into()),
        }
        if access.v6 != V6::None {
            let ip = format!("2001:db8:{}::{}", number + 1, count);
            addresses.push(ip.parse().expect("an address"));
        }
        hosts.push(network.add_host(*site, addresses));
        index
    };
    let gateway_site = settle(network, Some(plan.gateway), None);
    let mut previous = gateway_site;
    for place in &plan.clients {
        previous = match place {
            Place::Own(access, line) => settle(network, Some((*access, *line)), None),
            Place::WithGateway => settle(network, None, Some(gateway_site)),
            Place::WithPrevious => settle(network, None, Some(previous)),
        };
    }
    let gateway = hosts.remove(0);
    (gateway, hosts)
}
