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

mod packets;
mod plan;
mod portal;

use packets::Flow;
use plan::populate;
pub(super) use plan::{Access, Place, Plan, V4, V6};
use portal::{Link, Mail, client_frame, policy};

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

struct RelayHost {
    server: TurnServer,
    host: HostId,
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
