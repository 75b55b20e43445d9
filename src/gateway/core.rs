//! The slow path's decisions: portal messages, datagrams and instants in; portal messages,
//! datagrams and commands out. No socket, clock or task inside.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use secrecy::ExposeSecret as _;

use super::episodes::Episodes;
use super::outbox::Outbox;
use super::resolutions::{Announcement, Begun, Resolutions};
use super::story::{PathEnd, Paths, SetUps, Story};
use crate::access::{
    Access, AccessEvent, DropReason, FlowReport, OpenPorts, RemovalCause, Resolved, Tick,
    TunnelAddresses,
};
use crate::admin::model::{ClientStatus, HandshakeStatus, PathChange, RelayStatus};
use crate::connectivity::{self, Connectivity, Inbound, Transmit, Upsert};
use crate::datapath::counters::Counters;
use crate::datapath::peers::PeerTable;
use crate::flow_logs::Authorization;
use crate::ids::ClientId;
use crate::packet::control::{self, Control};
use crate::portal::messages::{
    ClientPeer, CreateAuthorization, Egress, FlowLogUploads, Ingress, Init, Interface,
};
use crate::telemetry::durations::Timing;
use crate::telemetry::outage::Clients;
use crate::throttle::Throttle;
use crate::wireguard::{self, Outgoing, Route, WireGuard};

/// At most one `no_relays` in this time: each costs the portal a push.
const NO_RELAYS_PAUSE: Duration = Duration::from_secs(1);

/// How often activity of clients is looked at.
const TICK: Duration = Duration::from_secs(1);

/// What the status calls the state of a connection that is not there.
pub(super) const NO_CONNECTION: &str = "none";

/// Something for the outside to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Give the device these addresses.
    Configure(Interface),
    /// Resolve this name and tell [`Core::resolved`].
    Resolve(String),
    /// Upload flow logs as the portal says now; `None` if it says nothing that can be read.
    ConfigureFlowLogs(Option<FlowLogUploads>),
}

/// A way that a client's tunnel packets took (data-path spec §8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// The client's end; of its relay, if it uses one.
    pub client: SocketAddr,
    /// Our end; of our relay, if we use one.
    pub gateway: SocketAddr,
    /// Since when.
    pub since: Instant,
}

/// How much a flow's times may be too early.
const FLOW_PRECISION: Duration = Tick::UNIT;

/// Ways that are remembered per client (data-path spec §9).
const MAX_OUTERS: usize = 16;

/// Log lines that a client causes at its own pace: names it announces, paths it nominates.
const LINES_OF_CLIENT: Throttle = Throttle::new(20, Duration::from_secs(10));

/// What is remembered per client besides access, connection and session.
#[derive(Debug, Clone)]
struct ClientState {
    addresses: [IpAddr; 2],
    packets: u64,
    lines: Throttle,
}

/// All protocol state of the gateway but the portal channel itself.
pub struct Core {
    access: Access,
    connectivity: Connectivity,
    wireguard: WireGuard,
    table: Arc<PeerTable>,
    counters: Arc<Counters>,
    outbox: Outbox,
    set_ups: SetUps,
    paths: Paths,
    resolutions: Resolutions,
    /// Names that were forgotten for lack of room.
    names_evicted: u64,
    /// Whether flows are accounted for, whatever the portal says.
    log_flows: bool,
    /// What the portal said of uploads.
    uploads: Option<FlowLogUploads>,
    /// The ways of each client with access, oldest first. They outlive its connections.
    outers: BTreeMap<ClientId, VecDeque<Outer>>,
    flow_reports: VecDeque<(FlowReport, Vec<Outer>)>,
    stories: VecDeque<Story>,
    episodes: Episodes,
    timings: VecDeque<Timing>,
    clients: BTreeMap<ClientId, ClientState>,
    interface: Option<Interface>,
    joined: bool,
    no_relays: Option<Instant>,
    next_tick: Option<Instant>,
    egress: VecDeque<Egress>,
    transmits: VecDeque<Transmit>,
    commands: VecDeque<Command>,
}

impl Core {
    /// Without clients and relays. `wall` is the time of day at `now`.
    pub fn new(
        now: Instant,
        wall: SystemTime,
        table: Arc<PeerTable>,
        counters: Arc<Counters>,
        seed: u64,
    ) -> Self {
        let unix = wall
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            access: Access::new(now, unix),
            connectivity: Connectivity::new(seed),
            wireguard: WireGuard::new(Arc::clone(&table)),
            table,
            counters,
            outbox: Outbox::default(),
            set_ups: SetUps::default(),
            paths: Paths::default(),
            resolutions: Resolutions::default(),
            names_evicted: 0,
            log_flows: false,
            uploads: None,
            outers: BTreeMap::new(),
            flow_reports: VecDeque::new(),
            stories: VecDeque::new(),
            episodes: Episodes::default(),
            timings: VecDeque::new(),
            clients: BTreeMap::new(),
            interface: None,
            joined: false,
            no_relays: None,
            next_tick: Some(now + TICK),
            egress: VecDeque::new(),
            transmits: VecDeque::new(),
            commands: VecDeque::new(),
        }
    }

    /// Opens ports of the gateway itself to clients; to be called before any is known.
    pub fn open_ports(&mut self, ports: &OpenPorts) {
        self.access.open_ports(ports);
    }

    /// Accounts for flows, whatever the portal says.
    pub fn log_flows(&mut self) {
        self.log_flows = true;
        self.access.account_for_flows(true);
    }

    /// Our WireGuard public key.
    pub fn public_key(&self) -> [u8; 32] {
        self.wireguard.public_key()
    }

    /// Adds a local address that clients may be able to reach directly.
    pub fn add_host(&mut self, now: Instant, address: SocketAddr) {
        self.connectivity.add_host(now, address);
        self.drain(now);
    }

    /// The channel was joined: what was held goes out.
    pub fn connected(&mut self, now: Instant) {
        self.joined = true;
        self.no_relays = None;
        self.connectivity.set_can_signal(now, true);
        self.drain(now);
    }

    /// The channel is away: clients' traffic goes on, candidate changes are held, those included
    /// that were sent and may not have arrived (oldest first).
    pub fn disconnected(&mut self, now: Instant, undelivered: Vec<Egress>) {
        self.joined = false;
        self.connectivity.set_can_signal(now, false);
        // Answers belong to the lost session; whoever still needs one asks again.
        let queued = std::mem::take(&mut self.egress);
        self.hold_undelivered(undelivered.into_iter().chain(queued).collect());
    }

    /// Keeps what a session did not take, as far as it must survive the session.
    pub fn hold_undelivered(&mut self, messages: Vec<Egress>) {
        let clients = &self.clients;
        self.outbox.restore(
            messages.into_iter().filter(Egress::survives_reconnect),
            |client| clients.contains_key(&client),
        );
    }

    /// The token was refused: nobody may be served any more.
    pub fn revoke_all(&mut self, now: Instant) {
        self.access.remove_all();
        self.drain(now);
    }

    /// Takes a message of the portal.
    pub fn handle_portal(&mut self, now: Instant, message: Ingress) {
        match message {
            Ingress::Init(init) => self.init(now, init),
            Ingress::CreateAuthorization(authorization) => self.authorize(now, *authorization),
            Ingress::RejectAccess {
                client_id,
                resource_id,
            } => {
                self.access.reject(client_id, resource_id);
            }
            Ingress::ResourceUpdated(resource) => self.access.update_resource(&resource),
            Ingress::RelaysPresence(presence) => self.connectivity.relays_presence(now, &presence),
            Ingress::IceCandidates {
                client_id,
                candidates,
            } => {
                self.set_ups.candidates(now, client_id);
                self.connectivity
                    .add_remote_candidates(now, client_id, &candidates);
            }
            Ingress::InvalidateIceCandidates {
                client_id,
                candidates,
            } => self
                .connectivity
                .invalidate_remote_candidates(now, client_id, &candidates),
        }
        self.drain(now);
    }

    fn init(&mut self, now: Instant, init: Init) {
        self.connectivity.upsert_relays(now, &init.relays);
        self.access
            .set_gateway_addresses(init.interface.ipv4, init.interface.ipv6);
        self.access.resync(now, &init.authorizations);
        if self.interface != Some(init.interface) {
            self.interface = Some(init.interface);
            self.commands.push_back(Command::Configure(init.interface));
        }
        let uploads = init.flow_logs.as_ref();
        let on = uploads.is_some_and(|uploads| uploads.interval_secs > 0);
        self.access.account_for_flows(self.log_flows || on);
        if self.uploads != init.flow_logs {
            self.uploads.clone_from(&init.flow_logs);
            self.commands
                .push_back(Command::ConfigureFlowLogs(init.flow_logs));
        }
        if !self.connectivity.has_relay() && init.relays.is_empty() {
            self.ask_for_relays(now);
        }
    }

    fn authorize(&mut self, now: Instant, authorization: CreateAuthorization) {
        let CreateAuthorization {
            reference,
            resource,
            client,
            client_ice_credentials,
            gateway_ice_credentials,
            expires_at,
            use_iceless,
            flow_logs_ingest_token,
        } = authorization;
        if use_iceless {
            // Never announced, so this is a portal defect; an answer would promise a path.
            tracing::warn!(client = %client.id, "ICE-less connection asked for, but never announced");
            return;
        }
        let flow_logs = flow_logs_ingest_token.and_then(|token| {
            // Whatever is wrong with it, access is granted all the same.
            Authorization::parse(token.expose_secret())
                .inspect_err(|error| {
                    tracing::debug!(client = %client.id, %error, "flows of this grant are not uploaded");
                })
                .ok()
                .map(Arc::new)
        });
        self.access
            .authorize_with(now, &client, resource, expires_at, flow_logs);
        self.drain_access(now);
        let keys_changed =
            !self
                .wireguard
                .has_session(client.id, &client.public_key, &client.preshared_key);
        if keys_changed && !self.open_session(now, &client) {
            self.access.remove_client(client.id);
            self.drain_access(now);
            return;
        }
        // Before any candidate: a client drops candidates of a connection it does not know yet.
        self.egress
            .push_back(Egress::AuthorizationCreated { reference });
        let upsert = self.connectivity.upsert(
            now,
            client.id,
            &gateway_ice_credentials,
            &client_ice_credentials,
            keys_changed,
        );
        if upsert == Upsert::Created && !keys_changed {
            // New ICE credentials with old keys: stock treats the pair as one, and a fresh session
            // has a fresh handshake timestamp to compare with.
            self.open_session(now, &client);
        }
        if upsert == Upsert::Created {
            self.paths.close(now, client.id, PathEnd::Superseded);
            self.set_ups.begin(now, client.id);
        }
        self.publish(client.id);
        if !self.connectivity.has_relay() {
            self.ask_for_relays(now);
        }
    }

    fn open_session(&mut self, now: Instant, client: &ClientPeer) -> bool {
        let made = self
            .wireguard
            .insert(now, client.id, client.public_key, client.preshared_key)
            .is_some();
        if !made {
            tracing::error!(client = %client.id, "Too many clients; this one is not served");
            return false;
        }
        self.clients.insert(
            client.id,
            ClientState {
                addresses: [client.ipv4.into(), client.ipv6.into()],
                packets: 0,
                lines: LINES_OF_CLIENT,
            },
        );
        true
    }

    /// Shows the workers what a client may reach, and at which addresses it is.
    fn publish(&self, client: ClientId) {
        let (Some(peer), Some(state)) = (self.wireguard.peer(client), self.clients.get(&client))
        else {
            return;
        };
        peer.set_policy(self.access.policy(client));
        self.table.set_addresses(peer, &state.addresses);
    }

    fn ask_for_relays(&mut self, now: Instant) {
        let lately = self
            .no_relays
            .is_some_and(|at| now.duration_since(at) < NO_RELAYS_PAUSE);
        if self.joined && !lately {
            self.no_relays = Some(now);
            self.egress.push_back(Egress::NoRelays);
        }
    }

    /// Takes a datagram that is not established data.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        local: SocketAddr,
        remote: SocketAddr,
        datagram: &[u8],
    ) {
        match self
            .connectivity
            .handle_packet(now, local, remote, datagram)
        {
            Inbound::Consumed => {}
            Inbound::Unknown => self.counters.count(DropReason::UnknownDatagram, 1),
            Inbound::WireGuard {
                local,
                remote,
                payload,
            } => {
                let message = &datagram[payload];
                let owner = self.connectivity.owner_of(now, local, remote);
                if let Err(refused) = self
                    .wireguard
                    .handle_message(now, local, remote, owner, message)
                {
                    self.counters.count(refused.drop_reason(), 1);
                }
            }
        }
        self.drain(now);
    }

    /// Takes a decrypted in-tunnel control packet (data-path spec §6.1).
    pub fn handle_control(&mut self, now: Instant, client: ClientId, packet: &[u8]) {
        match control::parse(packet) {
            Ok(Control::Goodbye) => {
                tracing::info!(%client, "The client said goodbye");
                self.access.remove_client(client);
                self.close(now, client, PathEnd::Goodbye);
            }
            Ok(Control::AssignedIps {
                resource,
                domain,
                proxy_ips,
            }) => {
                let announcement = Announcement {
                    client,
                    resource,
                    domain,
                    proxy_ips,
                };
                self.announced(now, announcement);
            }
            Ok(Control::DomainStatus { .. } | Control::Unknown(_)) => {}
            Err(error) => {
                self.drop_of(client, DropReason::MalformedControl);
                tracing::debug!(%client, %error, "control packet skipped");
            }
        }
        self.drain(now);
    }

    /// A client has made addresses up for a domain.
    fn announced(&mut self, now: Instant, announcement: Announcement) {
        let Announcement {
            client,
            resource,
            ref domain,
            ..
        } = announcement;
        if let Err(why) = self.access.may_announce(client, resource, domain, now) {
            tracing::debug!(%client, %resource, domain, %why, "announcement refused");
            self.send_domain_status(now, &announcement, false);
            return;
        }
        match self.resolutions.begin(announcement) {
            Begun::Resolve(name) => self.commands.push_back(Command::Resolve(name)),
            Begun::Waiting => {}
            Begun::Refused => self.drop_of(client, DropReason::ControlLimited),
        }
    }

    /// Counts a packet of a known client that went nowhere.
    fn drop_of(&self, client: ClientId, reason: DropReason) {
        self.counters.count(reason, 1);
        if let Some(peer) = self.wireguard.peer(client) {
            peer.counters.count(reason, 1);
        }
    }

    /// Takes the answer to [`Command::Resolve`].
    pub fn resolved(&mut self, now: Instant, name: &str, resolved: &Resolved) {
        for announcement in self.resolutions.end(name) {
            let Announcement {
                client,
                resource,
                domain,
                proxy_ips,
            } = &announcement;
            let outcome = self
                .access
                .announce(*client, *resource, domain, proxy_ips, resolved, now);
            match &outcome {
                Ok(done) => {
                    if done.renumbered
                        && let Some(suppressed) = line_of(&mut self.clients, *client, now)
                    {
                        tracing::info!(%client, suppressed, "The client made up its addresses anew");
                    }
                    if done.evicted > 0 {
                        self.names_evicted += done.evicted as u64;
                        if let Some(suppressed) = line_of(&mut self.clients, *client, now) {
                            tracing::warn!(%client, evicted = done.evicted, suppressed, "The client uses too many names; the oldest were forgotten");
                        }
                    }
                    tracing::debug!(%client, domain, ?resolved, "name resolved");
                }
                Err(why) => {
                    if let Some(suppressed) = line_of(&mut self.clients, *client, now) {
                        tracing::info!(%client, domain, %why, suppressed, "Name not usable");
                    }
                }
            }
            self.send_domain_status(now, &announcement, outcome.is_ok());
        }
        self.drain(now);
    }

    fn send_domain_status(&mut self, now: Instant, announcement: &Announcement, active: bool) {
        let Announcement {
            client,
            resource,
            domain,
            ..
        } = announcement;
        if let Some(answer) = control::domain_status(*resource, domain, active) {
            self.send_inner(now, *client, &answer);
        }
    }

    fn send_inner(&mut self, now: Instant, client: ClientId, packet: &[u8]) {
        if let Some(outgoing) = self.wireguard.encapsulate(client, packet) {
            self.route(now, outgoing);
        }
    }

    /// Ends every connection with a goodbye and gives relays their allocations back.
    pub fn shutdown(&mut self, now: Instant) {
        let clients: Vec<ClientId> = self.clients.keys().copied().collect();
        for client in clients {
            self.send_inner(now, client, &control::goodbye());
            self.close(now, client, PathEnd::Shutdown);
        }
        self.access.remove_all();
        self.drain(now);
        self.connectivity.release_relays(now);
        self.drain(now);
    }

    fn close(&mut self, now: Instant, client: ClientId, why: PathEnd) {
        self.set_ups.fail(now, client, "closed");
        self.paths.close(now, client, why);
        self.wireguard.remove(client);
        self.connectivity.remove(client);
        self.outbox.forget(client);
        self.clients.remove(&client);
    }

    /// Runs what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.access.handle_timeout(now);
        self.connectivity.handle_timeout(now);
        self.wireguard.handle_timeout(now);
        if self.next_tick.is_some_and(|at| at <= now) {
            self.next_tick = Some(now + TICK);
            self.note_activity(now);
        }
        self.drain(now);
    }

    /// When [`Self::handle_timeout`] has something to do next, and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        [
            self.access.poll_timeout().map(|(at, _)| (at, "expiry")),
            self.connectivity.poll_timeout(),
            self.wireguard.poll_timeout().map(|at| (at, "wireguard")),
            self.next_tick.map(|at| (at, "tick")),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }

    /// Compares the time of day with what grants were mapped by: after a suspended machine or a
    /// stepped clock they must end at their real time.
    pub fn note_wall(&mut self, now: Instant, wall: SystemTime) {
        let unix = wall
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        if self.access.adjust_clock(now, unix) {
            tracing::warn!("The clock was stepped; the ends of all grants were mapped anew");
        }
        self.drain(now);
    }

    fn note_activity(&mut self, now: Instant) {
        let mut active = Vec::new();
        for (client, state) in &mut self.clients {
            if let Some(suppressed) = state.lines.overdue(now) {
                tracing::info!(%client, suppressed, "More was not logged of this client");
            }
            let Some(peer) = self.wireguard.peer(*client) else {
                continue;
            };
            let packets = peer.counters.traffic.packets();
            if packets != state.packets {
                state.packets = packets;
                active.push(*client);
            }
        }
        for client in active {
            self.set_ups.packet(now, client);
            self.connectivity.note_activity(now, client);
            self.wireguard.note_activity(now, client);
        }
        self.set_ups.tick(now);
    }

    fn drain_access(&mut self, now: Instant) {
        // Before clients are forgotten, and the ways they took with them.
        while let Some(report) = self.access.poll_report() {
            let outers = self.outers_of(&report);
            self.flow_reports.push_back((report, outers));
        }
        while let Some(event) = self.access.poll_event() {
            match event {
                AccessEvent::PolicyChanged { client, .. } => self.publish(client),
                AccessEvent::ClientRemoved { client, cause } => {
                    tracing::info!(%client, cause = cause.as_str(), "Closing the client's connection");
                    self.send_inner(now, client, &control::goodbye());
                    let why = match cause {
                        // What else is on request has closed the connection before.
                        RemovalCause::Requested => PathEnd::TokenRefused,
                        cause => PathEnd::Removed(cause),
                    };
                    self.close(now, client, why);
                    self.outers.remove(&client);
                }
            }
        }
    }

    /// The ways that a flow's packets took: the one at its beginning, and those that came after.
    fn outers_of(&self, report: &FlowReport) -> Vec<Outer> {
        let Some(known) = self.outers.get(&report.client) else {
            return Vec::new();
        };
        let until = report.ended.map(|end| end.last_packet + FLOW_PRECISION);
        let began = report.began + FLOW_PRECISION;
        let first = known.iter().rposition(|outer| outer.since <= began);
        known
            .iter()
            .skip(first.unwrap_or(0))
            .filter(|outer| until.is_none_or(|until| outer.since <= until))
            .copied()
            .collect()
    }

    fn note_outer(&mut self, now: Instant, client: ClientId) {
        let Some(view) = self.connectivity.describe(client) else {
            return;
        };
        let (Some(remote), Some(local)) = (view.remote, view.local) else {
            return;
        };
        let known = self.outers.entry(client).or_default();
        if known
            .back()
            .is_some_and(|last| (last.client, last.gateway) == (remote, local))
        {
            return;
        }
        if known.len() == MAX_OUTERS {
            known.pop_front();
        }
        known.push_back(Outer {
            client: remote,
            gateway: local,
            since: now,
        });
    }

    /// Moves every part's output on until all are quiet.
    fn drain(&mut self, now: Instant) {
        self.drain_access(now);
        loop {
            while let Some(event) = self.connectivity.poll_event() {
                self.connectivity_event(now, event);
            }
            while let Some(event) = self.wireguard.poll_event() {
                match event {
                    wireguard::Event::Handshake(client) => {
                        tracing::debug!(%client, "WireGuard handshake");
                        self.set_ups.handshake(now, client);
                    }
                    wireguard::Event::Failed(client) => {
                        tracing::info!(%client, "The client does not answer handshakes; connection dropped");
                        self.set_ups.fail(now, client, "handshake_timeout");
                        self.close(now, client, PathEnd::Failed("handshake_timeout"));
                    }
                }
            }
            while let Some(outgoing) = self.wireguard.poll_outgoing() {
                self.route(now, outgoing);
            }
            while let Some(transmit) = self.connectivity.poll_transmit() {
                self.transmits.push_back(transmit);
            }
            match self.connectivity.poll_event() {
                Some(event) => self.connectivity_event(now, event),
                None => break,
            }
        }
        if self.joined {
            self.egress.extend(self.outbox.flush());
        }
    }

    fn connectivity_event(&mut self, now: Instant, event: connectivity::Event) {
        match event {
            connectivity::Event::CandidatesAdded { client, candidates } => {
                self.outbox.add(client, candidates);
            }
            connectivity::Event::CandidatesInvalidated { client, candidates } => {
                self.outbox.invalidate(client, candidates);
            }
            connectivity::Event::PathChanged {
                client,
                path,
                reason,
            } => {
                let why = reason.as_str();
                match (path, line_of(&mut self.clients, client, now)) {
                    (Some(path), Some(suppressed)) => tracing::info!(
                        %client, path = path.kind.as_str(), remote = %path.destination, reason = why,
                        suppressed, "Path to the client"
                    ),
                    (None, Some(suppressed)) => {
                        tracing::info!(%client, reason = why, suppressed, "No path to the client");
                    }
                    (_, None) => {}
                }
                self.paths.changed(now, client, path, reason);
                if let Some(path) = path {
                    self.set_ups.nominated(now, client, path.kind);
                    self.note_outer(now, client);
                }
                self.wireguard.set_path(client, path);
            }
            connectivity::Event::Failed { client, cause } => {
                // The grants stay: the client may come back and believe them valid.
                tracing::info!(%client, cause = cause.as_str(), "Connection failed");
                self.set_ups.fail(now, client, cause.error_type());
                self.close(now, client, PathEnd::Failed(cause.error_type()));
            }
            connectivity::Event::RelaySocketsChanged(sockets) => self.table.set_relays(sockets),
            connectivity::Event::LastRelayLost => self.ask_for_relays(now),
            connectivity::Event::RelayAllocated(took) => {
                self.timings.push_back(Timing::RelayAllocate { took });
            }
            connectivity::Event::RelayEpisode(episode) => {
                self.paths.relay_lost(&episode);
                self.episodes.note(&episode);
                self.stories.push_back(Story::Relay(episode));
            }
        }
    }

    fn route(&mut self, now: Instant, outgoing: Outgoing) {
        let Outgoing { route, payload } = outgoing;
        let transmit = match route {
            Route::Path(path) => {
                let payload = match path.channel {
                    Some(channel) => connectivity::wrap(channel, &payload),
                    None => Some(payload),
                };
                let Some(payload) = payload else { return };
                Transmit {
                    source: path.source,
                    destination: path.destination,
                    payload,
                }
            }
            Route::Reply { local, remote } => {
                let Some(transmit) = self
                    .connectivity
                    .reply_transmit(now, local, remote, payload)
                else {
                    return;
                };
                transmit
            }
        };
        self.transmits.push_back(transmit);
    }

    /// The next story to record.
    pub fn poll_story(&mut self) -> Option<Story> {
        self.stories
            .pop_front()
            .or_else(|| self.paths.poll().map(Story::Path))
            .or_else(|| self.set_ups.poll().map(Story::SetUp))
    }

    /// How many clients there are that may have something due at any moment.
    pub fn client_count(&self) -> usize {
        self.clients.len()
    }

    /// How many clients have a path.
    pub fn served(&self) -> Clients {
        self.paths.clients()
    }

    /// How much flow logs were not told, for lack of room.
    pub fn flow_reports_dropped(&self) -> u64 {
        self.access.reports_dropped()
    }

    /// How long something took.
    pub fn poll_timing(&mut self) -> Option<Timing> {
        self.timings.pop_front()
    }

    /// What flow logs are to be told next, with the ways that the flow's packets took.
    pub fn poll_flow_report(&mut self) -> Option<(FlowReport, Vec<Outer>)> {
        self.flow_reports.pop_front()
    }

    /// The next message for the portal.
    pub fn poll_egress(&mut self) -> Option<Egress> {
        self.egress.pop_front()
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next thing to do outside.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// What to show about relays.
    pub fn relays(&self, now: Instant, wall: SystemTime) -> Vec<RelayStatus> {
        self.connectivity.relay_statuses(now, wall)
    }

    /// Allocations at relays that are over.
    pub fn episodes(&self) -> &Episodes {
        &self.episodes
    }

    /// Number of flows of all clients.
    pub fn flow_count(&self) -> usize {
        self.access.flow_count()
    }

    /// Names that were forgotten for lack of room, since start.
    pub fn names_evicted(&self) -> u64 {
        self.names_evicted
    }

    /// What to show about handshakes.
    pub fn handshakes(&self) -> HandshakeStatus {
        let counters = self.wireguard.admission_counters();
        HandshakeStatus {
            admitted: counters.admitted,
            bad_mac: counters.bad_mac,
            cookies: counters.cookies,
            limited: counters.limited,
            computed: counters.computed,
        }
    }

    /// What to show about clients. Candidates and pairs, only if `complete`: with many clients,
    /// they cost more than all the rest.
    pub fn client_statuses(
        &self,
        now: Instant,
        wall: SystemTime,
        complete: bool,
    ) -> Vec<ClientStatus> {
        use std::sync::atomic::Ordering::Relaxed;

        let unix = |at: Instant| unix_seconds(wall - now.saturating_duration_since(at));

        let mut all: BTreeMap<ClientId, Option<TunnelAddresses>> =
            self.clients.keys().map(|client| (*client, None)).collect();
        all.extend(self.access.clients().map(|(client, a)| (client, Some(a))));
        all.into_iter()
            .map(|(client, addresses)| {
                let view = self.connectivity.describe(client);
                let peer = self.wireguard.peer(client);
                let sizes = self.access.sizes(client);
                let details = complete
                    .then(|| self.connectivity.details(now, wall, client))
                    .flatten()
                    .unwrap_or_default();
                ClientStatus {
                    id: client.to_string(),
                    addresses: addresses
                        .map_or_else(Vec::new, |a| vec![a.ipv4.to_string(), a.ipv6.to_string()]),
                    connection: view.as_ref().map_or(NO_CONNECTION, |v| v.state).to_owned(),
                    path: view
                        .as_ref()
                        .and_then(|v| v.path)
                        .map(|p| p.kind.as_str().to_owned()),
                    path_since: view.as_ref().and_then(|v| v.path_since).map(unix),
                    path_changes: view.as_ref().map_or(0, |v| v.path_changes),
                    path_history: view.as_ref().map_or_else(Vec::new, |v| {
                        v.history
                            .iter()
                            .map(|step| PathChange {
                                at: unix(step.at),
                                from: step.from,
                                to: step.to,
                                reason: step.reason,
                            })
                            .collect()
                    }),
                    local: view.as_ref().and_then(|v| v.local).map(|a| a.to_string()),
                    remote: view.as_ref().and_then(|v| v.remote).map(|a| a.to_string()),
                    pair_count: details.pair_count,
                    pairs: details.pairs,
                    local_candidate_count: details.local_candidate_count,
                    local_candidates: details.local_candidates,
                    remote_candidate_count: details.remote_candidate_count,
                    remote_candidates: details.remote_candidates,
                    last_handshake_at: self.wireguard.last_handshake(client).map(unix),
                    rx_bytes: peer.map_or(0, |p| p.counters.traffic.rx_bytes.load(Relaxed)),
                    tx_bytes: peer.map_or(0, |p| p.counters.traffic.tx_bytes.load(Relaxed)),
                    flows: sizes.flows,
                    domains: sizes.domains,
                    dropped: peer.map_or_else(BTreeMap::new, |p| {
                        let drops = p.counters.all();
                        drops
                            .map(|(reason, n)| (reason.as_str().to_owned(), n))
                            .collect()
                    }),
                    grants: self.access.grants(client),
                }
            })
            .collect()
    }
}

/// Whether a line that this client caused may be written, and how many before it were not. A client
/// that is gone causes none.
#[expect(clippy::option_option, reason = "as `Throttle::admit`")]
fn line_of(
    clients: &mut BTreeMap<ClientId, ClientState>,
    client: ClientId,
    now: Instant,
) -> Option<Option<NonZeroU64>> {
    clients.get_mut(&client)?.lines.admit(now)
}

/// Fractional Unix seconds.
pub fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
