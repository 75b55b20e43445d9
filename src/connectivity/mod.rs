//! ICE agents, candidates and path selection (data-path spec §1.3, §2, §3).
//!
//! Sans-IO: datagrams and instants go in, datagrams and events come out. After any `handle_*` or
//! other mutation the caller drains `poll_transmit` and `poll_event` until both are empty.

mod connection;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod relay;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime};

use is::stun::StunMessage;

use self::connection::Connection;
use self::relay::episode::Episode;
use self::relay::{CandidateKind, Handled, RelaySet, RelaySetEvent, RelayTransmit, channel_data};
use crate::admin::model::{CandidateStatus, PairStatus, PathReason, RelayStatus};
use crate::datapath::peers::{Path, PathKind};
use crate::ids::{ClientId, RelayId};
use crate::portal::messages::{IceCredentials, RelayEntry, RelaysPresence};
use crate::timers::Deadlines;

/// How long the transaction id of a connectivity check is remembered. Longer than the largest
/// retransmission interval, so that slow answers still count.
const CHECK_MEMORY: Duration = Duration::from_secs(30);

/// Host candidates: a host that is given new addresses again and again offers the last ones.
const MAX_HOSTS: usize = 16;

/// For so long an answered check says who is at the other end; idle clients are checked each 25 s.
const VOUCHED: Duration = Duration::from_secs(60);

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Address to send from; `None` leaves it to the kernel.
    pub source: Option<IpAddr>,
    /// Where to.
    pub destination: SocketAddr,
    /// The datagram.
    pub payload: Vec<u8>,
}

impl From<RelayTransmit> for Transmit {
    fn from(transmit: RelayTransmit) -> Self {
        Self {
            source: None,
            destination: transmit.dst,
            payload: transmit.payload,
        }
    }
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Local candidates to signal to a client, highest priority first.
    CandidatesAdded {
        /// To whom.
        client: ClientId,
        /// SDP candidate lines.
        candidates: Vec<String>,
    },
    /// Local candidates that the client must forget.
    CandidatesInvalidated {
        /// Who.
        client: ClientId,
        /// SDP candidate lines.
        candidates: Vec<String>,
    },
    /// The pair to send on was nominated, replaced or lost.
    PathChanged {
        /// Whose.
        client: ClientId,
        /// The new path.
        path: Option<Path>,
        /// Why it changed.
        reason: PathReason,
    },
    /// No path exists any more; the connection is gone.
    Failed {
        /// Whose.
        client: ClientId,
        /// Why.
        cause: FailureCause,
    },
    /// The set of relay sockets in use changed.
    RelaySocketsChanged(Vec<SocketAddr>),
    /// No relay is left; the portal may have others.
    LastRelayLost,
    /// There is an allocation at a relay after an attempt that took so long; for the record.
    RelayAllocated(Duration),
    /// An allocation at a relay is over; for the record.
    RelayEpisode(Episode),
}

/// Why a connection failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureCause {
    /// The client never signalled a candidate.
    NoCandidates,
    /// No candidate pair works.
    NoPath,
}

impl FailureCause {
    /// The value of `error.type`.
    pub const fn error_type(self) -> &'static str {
        match self {
            Self::NoCandidates => "no_candidates",
            Self::NoPath => "no_path",
        }
    }

    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCandidates => "the client sent no candidates",
            Self::NoPath => "no candidate pair works",
        }
    }
}

/// What a datagram turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inbound {
    /// STUN or TURN; dealt with.
    Consumed,
    /// A WireGuard message, perhaps unwrapped from channel data.
    WireGuard {
        /// Our address it came to (a relayed one if unwrapped).
        local: SocketAddr,
        /// Whom it came from (behind the relay if unwrapped).
        remote: SocketAddr,
        /// Where it lies in the datagram.
        payload: Range<usize>,
    },
    /// STUN that belongs to nobody here.
    Unknown,
}

/// Whether an authorization met the connection it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upsert {
    /// The connection with these credentials goes on.
    Reused,
    /// A new one was made, replacing any former.
    Created,
}

/// A connectivity check that may still be answered.
#[derive(Debug, Clone, Copy)]
struct Check {
    client: ClientId,
    /// Where it went from: one of our addresses, or a relayed one.
    source: SocketAddr,
    destination: SocketAddr,
}

/// All connections and relays.
pub struct Connectivity {
    relays: RelaySet,
    /// In order, so that what happens to all happens alike each time.
    connections: BTreeMap<ClientId, Connection>,
    /// Whose our user name fragments are. They are short, and nobody promises that they differ.
    by_ufrag: HashMap<String, Vec<ClientId>>,
    /// Whose checks were answered on a pair.
    owners: HashMap<(SocketAddr, SocketAddr), ClientId>,
    checks: HashMap<[u8; 12], Check>,
    check_order: VecDeque<(Instant, [u8; 12])>,
    /// Whether candidates get to clients.
    can_signal: bool,
    hosts: Vec<SocketAddr>,
    deadlines: Deadlines<ClientId>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Connectivity {
    /// Without relays and clients.
    pub fn new(seed: u64) -> Self {
        Self {
            relays: RelaySet::new(seed),
            connections: BTreeMap::new(),
            by_ufrag: HashMap::new(),
            owners: HashMap::new(),
            checks: HashMap::new(),
            check_order: VecDeque::new(),
            can_signal: true,
            hosts: Vec::new(),
            deadlines: Deadlines::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Adds a local address as host candidate for every connection, present and future.
    pub fn add_host(&mut self, now: Instant, address: SocketAddr) {
        if self.hosts.contains(&address) {
            return;
        }
        if self.hosts.len() == MAX_HOSTS {
            // Not new clients' any more. If it is in use still, it is named again soon.
            self.hosts.remove(0);
        }
        self.hosts.push(address);
        self.each_connection(now, |connection| connection.add_host(address));
    }

    /// Tells whether candidates that are signalled get to clients, which takes the portal.
    pub fn set_can_signal(&mut self, now: Instant, can_signal: bool) {
        if self.can_signal != can_signal {
            self.can_signal = can_signal;
            self.each_connection(now, |c| c.set_can_signal(now, can_signal));
        }
    }

    /// Applies `init.relays`: nothing is removed by it (portal-channel spec §4.3).
    pub fn upsert_relays(&mut self, now: Instant, relays: &[RelayEntry]) {
        self.relays.upsert(now, relays);
        self.drain_relays(now);
    }

    /// Applies `relays_presence` (portal-channel spec §6.2).
    pub fn relays_presence(&mut self, now: Instant, presence: &RelaysPresence) {
        self.relays.presence(now, presence);
        self.drain_relays(now);
    }

    /// Gives every allocation back.
    pub fn release_relays(&mut self, now: Instant) {
        self.relays.release_all(now);
        self.drain_relays(now);
    }

    /// Whether a relay can be used, or may be soon.
    pub fn has_relay(&self) -> bool {
        self.relays.any_hopeful()
    }

    /// Makes or keeps the connection to a client (data-path spec §2.7). Either way every local
    /// candidate is signalled (again).
    pub fn upsert(
        &mut self,
        now: Instant,
        client: ClientId,
        local: &IceCredentials,
        remote: &IceCredentials,
        replace: bool,
    ) -> Upsert {
        let reusable = !replace
            && self
                .connections
                .get(&client)
                .is_some_and(|c| c.has_credentials(local, remote) && !c.is_worn_out());
        if reusable {
            self.with_connection(now, client, |connection| {
                connection.touch(now);
                connection.signal_all();
            });
            return Upsert::Reused;
        }
        self.remove(client);
        let mut connection = Connection::new(now, local, remote);
        connection.set_can_signal(now, self.can_signal);
        for host in &self.hosts {
            connection.add_host(*host);
        }
        // Only what holds at present: a NAT may have had us at many addresses before.
        for gathered in self.relays.local_candidates() {
            if gathered.kind == CandidateKind::ServerReflexive {
                connection.add_server_reflexive(gathered.addr, gathered.base);
            }
        }
        let alike = self.by_ufrag.entry(local.username.clone()).or_default();
        alike.push(client);
        self.connections.insert(client, connection);
        self.assign_relay(now, client);
        self.with_connection(now, client, |connection| connection.start(now));
        Upsert::Created
    }

    /// Forgets a client's connection; nothing is signalled.
    pub fn remove(&mut self, client: ClientId) {
        if let Some(mut connection) = self.connections.remove(&client) {
            if let Some(alike) = self.by_ufrag.get_mut(connection.local_ufrag()) {
                alike.retain(|other| *other != client);
                if alike.is_empty() {
                    self.by_ufrag.remove(connection.local_ufrag());
                }
            }
            let forgotten = connection.take_forgotten();
            for ends in connection.ends().chain(forgotten) {
                self.disown(client, ends);
            }
            self.deadlines.clear(&client);
        }
    }

    /// Nothing vouches any more for `client` being there; another one may be by now.
    fn disown(&mut self, client: ClientId, ends: (SocketAddr, SocketAddr)) {
        if self.owners.get(&ends) == Some(&client) {
            self.owners.remove(&ends);
        }
    }

    /// Adds remote candidates; malformed lines are skipped one by one.
    pub fn add_remote_candidates(&mut self, now: Instant, client: ClientId, lines: &[String]) {
        self.with_connection(now, client, |c| c.add_remote(now, lines));
        self.bind_channels(now, client);
    }

    /// Removes remote candidates.
    pub fn invalidate_remote_candidates(
        &mut self,
        now: Instant,
        client: ClientId,
        lines: &[String],
    ) {
        self.with_connection(now, client, |c| c.invalidate_remote(now, lines));
    }

    /// Tells that inner packets went to or came from the client.
    pub fn note_activity(&mut self, now: Instant, client: ClientId) {
        self.with_connection(now, client, |c| c.touch(now));
        // Data takes the fast path, past the relay's bookkeeping of which channels are in use.
        if let Some((relay, peer)) = self
            .connections
            .get(&client)
            .and_then(Connection::relayed_peer)
        {
            // Not that it was heard from: data may go into the void.
            self.relays.note_sent(now, relay, peer);
        }
    }

    /// The state of a client's connection, in one word, and its nominated pair.
    pub fn describe(&self, client: ClientId) -> Option<ConnectionView> {
        self.connections.get(&client).map(Connection::view)
    }

    /// Candidates and pairs of a client's connection, for people; `wall` is the time of day at
    /// `now`.
    pub fn details(
        &self,
        now: Instant,
        wall: SystemTime,
        client: ClientId,
    ) -> Option<ConnectionDetails> {
        let connection = self.connections.get(&client)?;
        Some(connection.details(now, unix_seconds(wall)))
    }

    /// What to show about the relays.
    pub fn relay_statuses(&self, now: Instant, wall: SystemTime) -> Vec<RelayStatus> {
        self.relays.statuses(now, unix_seconds(wall))
    }

    /// Takes a datagram; `local` is our address that it came to, with our port
    /// (demultiplexing: data-path spec §1.3).
    pub fn handle_packet(
        &mut self,
        now: Instant,
        local: SocketAddr,
        remote: SocketAddr,
        datagram: &[u8],
    ) -> Inbound {
        let (local, remote, payload, is_direct) =
            match self.relays.handle_packet(now, local, remote, datagram) {
                Handled::Consumed => {
                    self.drain_relays(now);
                    return Inbound::Consumed;
                }
                Handled::Inner {
                    peer,
                    relayed,
                    payload,
                    ..
                } => (relayed, peer, payload, false),
                Handled::NotRelay => (local, remote, 0..datagram.len(), true),
            };
        let bytes = &datagram[payload.clone()];
        if !looks_like_stun(bytes) {
            return Inbound::WireGuard {
                local,
                remote,
                payload,
            };
        }
        let Ok(message) = StunMessage::parse(bytes) else {
            return Inbound::Unknown;
        };
        let client = if message.is_binding_request() {
            self.addressee(&message)
        } else {
            // An answer has to come from where the check went, and to where that came from
            // (RFC 8445 §7.2.5.2.1): it says that the path works both ways, and whose it is. Who
            // catches an answer on its way and sends it from elsewhere is not the client.
            transaction_id(bytes)
                .and_then(|id| self.checks.get(&id))
                .filter(|check| check.source == local && check.destination == remote)
                .map(|check| check.client)
        };
        // RFC 8445 §7.3 wants FINGERPRINT in checks and their answers, and all clients send it. It comes
        // last because it costs most.
        let Some(client) = client.filter(|_| has_fingerprint(bytes)) else {
            return Inbound::Unknown;
        };
        self.with_connection(now, client, |c| {
            c.handle_stun(now, (local, remote), message, is_direct);
        });
        if let Some(connection) = self.connections.get_mut(&client) {
            let forgotten = connection.take_forgotten();
            if connection.vouches_for(now, (local, remote), Duration::ZERO) {
                self.owners.insert((local, remote), client);
            }
            for ends in forgotten {
                self.disown(client, ends);
            }
        }
        Inbound::Consumed
    }

    /// Whom a check is for.
    fn addressee(&self, check: &StunMessage<'_>) -> Option<ClientId> {
        let (ours, _) = check.split_username()?;
        match self.by_ufrag.get(ours)?.as_slice() {
            [client] => Some(*client),
            alike => alike.iter().copied().find(|client| {
                self.connections
                    .get(client)
                    .is_some_and(|c| c.accepts(check))
            }),
        }
    }

    /// The client whose connectivity checks vouch for a path: it has shown lately, with credentials
    /// of the portal's, that it is at the other end.
    pub fn owner_of(
        &self,
        now: Instant,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Option<ClientId> {
        let client = *self.owners.get(&(local, remote))?;
        self.connections
            .get(&client)?
            .vouches_for(now, (local, remote), VOUCHED)
            .then_some(client)
    }

    /// The way back to whoever sent a datagram from `remote` to `local`: direct, or through the
    /// relay that `local` belongs to.
    pub fn reply_transmit(
        &self,
        now: Instant,
        local: SocketAddr,
        remote: SocketAddr,
        payload: Vec<u8>,
    ) -> Option<Transmit> {
        match self.relays.relay_of(local) {
            None => Some(Transmit {
                source: Some(local.ip()),
                destination: remote,
                payload,
            }),
            Some(relay) => {
                let channel = self.relays.channel_to(now, relay, remote)?;
                Some(Transmit {
                    source: None,
                    destination: channel.relay,
                    payload: wrap(channel.channel, &payload)?,
                })
            }
        }
    }

    /// Runs what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.relays.poll_timeout().is_some_and(|(at, _)| at <= now) {
            self.relays.handle_timeout(now);
            self.drain_relays(now);
        }
        while let Some(client) = self.deadlines.pop_due(now) {
            self.with_connection(now, client, |c| c.handle_timeout(now));
        }
        self.drain_relays(now);
        while let Some((at, id)) = self.check_order.front() {
            if now.duration_since(*at) < CHECK_MEMORY {
                break;
            }
            self.checks.remove(id);
            self.check_order.pop_front();
        }
    }

    /// When [`Self::handle_timeout`] has something to do next, and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let relay = self.relays.poll_timeout().map(|(at, _)| (at, "relay"));
        let connection = self.deadlines.next().map(|at| (at, "ice"));
        match (relay, connection) {
            (Some(a), Some(b)) => Some(if a.0 <= b.0 { a } else { b }),
            (a, b) => a.or(b),
        }
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        let relays = &mut self.relays;
        self.transmits.pop_front().or_else(|| {
            // What a change of path made a relay be asked.
            relays.poll_transmit().map(Transmit::from)
        })
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn each_connection(&mut self, now: Instant, mut f: impl FnMut(&mut Connection)) {
        let clients: Vec<ClientId> = self.connections.keys().copied().collect();
        for client in clients {
            self.with_connection(now, client, &mut f);
        }
    }

    /// Mutates a connection, then drains it: the one place where agents are driven.
    fn with_connection(&mut self, now: Instant, client: ClientId, f: impl FnOnce(&mut Connection)) {
        let Some(connection) = self.connections.get_mut(&client) else {
            return;
        };
        f(connection);
        let mut failed = None;
        connection.drive(now);
        while let Some((source, destination, payload)) = connection.poll_transmit() {
            if is_request(&payload)
                && let Some(id) = transaction_id(&payload)
            {
                let check = Check {
                    client,
                    source,
                    destination,
                };
                self.checks.insert(id, check);
                self.check_order.push_back((now, id));
            }
            match connection.relay_of(source) {
                Some(_) if is_request(&payload) && !connection.may_check_from(now, source) => {}
                Some(relay) => {
                    // The relay lets through only what it has a permission for, which has to last as
                    // long as the pair is checked (RFC 8445 §7.2.1). A check that finds no channel
                    // is repeated.
                    let is_wanted = self.relays.channel_to(now, relay, destination).is_some()
                        || connection.is_channel_peer(destination);
                    if is_wanted {
                        self.relays.bind_channel(now, relay, destination);
                    }
                    while let Some(transmit) = self.relays.poll_transmit() {
                        self.transmits.push_back(transmit.into());
                    }
                    if let Some(channel) = self.relays.channel_to(now, relay, destination)
                        && let Some(payload) = wrap(channel.channel, &payload)
                    {
                        self.transmits.push_back(Transmit {
                            source: None,
                            destination: channel.relay,
                            payload,
                        });
                    }
                }
                None => self.transmits.push_back(Transmit {
                    source: Some(source.ip()),
                    destination,
                    payload,
                }),
            }
        }
        let relays = &self.relays;
        if let Some((path, reason)) =
            connection.path_change(now, |relay, peer| relays.channel_to(now, relay, peer))
        {
            self.events.push_back(Event::PathChanged {
                client,
                path,
                reason,
            });
            // A relay that has restarted answers keep-alives, but knows nothing of us any more.
            for relay in connection.relays() {
                self.relays.poke(now, *relay);
            }
        }
        // The same where there is nothing else to turn to.
        if let Some(relay) = connection.take_doubted() {
            self.relays.poke(now, relay);
        }
        // Only now: leaving a dead path is something to tell the client at once.
        let (added, invalidated) = connection.take_signals();
        if !added.is_empty() {
            self.events.push_back(Event::CandidatesAdded {
                client,
                candidates: added,
            });
        }
        if !invalidated.is_empty() {
            self.events.push_back(Event::CandidatesInvalidated {
                client,
                candidates: invalidated,
            });
        }
        if let Some(cause) = connection.failure(now) {
            failed = Some(cause);
        }
        match failed {
            Some(cause) => {
                for relay in connection.relays() {
                    self.relays.poke(now, *relay);
                }
                self.remove(client);
                self.events.push_back(Event::Failed { client, cause });
            }
            None => self.deadlines.set(client, connection.poll_timeout()),
        }
    }

    fn assign_relay(&mut self, now: Instant, client: ClientId) {
        while let Some(connection) = self.connections.get(&client)
            && connection.wants_relay()
            && let Some(relay) = self.relays.choose_other_than(connection.relays())
        {
            self.add_relay(now, client, relay);
        }
    }

    fn add_relay(&mut self, now: Instant, client: ClientId, relay: RelayId) {
        let relayed: Vec<(SocketAddr, SocketAddr)> = self
            .relays
            .local_candidates()
            .filter(|g| g.relay == relay && g.kind == CandidateKind::Relayed)
            .map(|g| (g.addr, g.base))
            .collect();
        self.relays.poke(now, relay);
        self.with_connection(now, client, |c| c.set_relay(now, relay, &relayed));
        self.bind_channels(now, client);
    }

    fn bind_channels(&mut self, now: Instant, client: ClientId) {
        let Some(connection) = self.connections.get(&client) else {
            return;
        };
        let peers: Vec<SocketAddr> = connection.channel_peers().collect();
        for relay in connection.relays() {
            for peer in &peers {
                self.relays.bind_channel(now, *relay, *peer);
            }
        }
        self.drain_relays(now);
    }

    fn drain_relays(&mut self, now: Instant) {
        let mut sockets_changed = false;
        let mut reassign = false;
        while let Some(event) = self.relays.poll_event() {
            match event {
                RelaySetEvent::CandidateAdded(gathered) => match gathered.kind {
                    CandidateKind::Host => self.add_host(now, gathered.addr),
                    CandidateKind::ServerReflexive => self.each_connection(now, |c| {
                        c.add_server_reflexive(gathered.addr, gathered.base);
                    }),
                    CandidateKind::Relayed => {
                        self.each_connection(now, |c| {
                            c.add_relayed(now, gathered.relay, gathered.addr, gathered.base);
                        });
                        reassign = true;
                    }
                },
                RelaySetEvent::RelayedInvalidated { relay, addrs } => {
                    sockets_changed = true;
                    reassign = true;
                    self.each_connection(now, |c| c.invalidate_relayed(relay, &addrs));
                }
                RelaySetEvent::RelayUsable(_) => {
                    sockets_changed = true;
                    reassign = true;
                }
                RelaySetEvent::RelayLost { id, .. } => {
                    sockets_changed = true;
                    reassign = true;
                    self.each_connection(now, |c| c.drop_relay(id));
                }
                RelaySetEvent::LastRelayLost => self.events.push_back(Event::LastRelayLost),
                RelaySetEvent::Allocated(took) => {
                    self.events.push_back(Event::RelayAllocated(took));
                }
                RelaySetEvent::EpisodeEnded(episode) => {
                    self.events.push_back(Event::RelayEpisode(episode));
                }
            }
        }
        while let Some(transmit) = self.relays.poll_transmit() {
            self.transmits.push_back(transmit.into());
        }
        if sockets_changed {
            self.events
                .push_back(Event::RelaySocketsChanged(self.relays.addresses()));
        }
        if reassign {
            let without: Vec<ClientId> = self
                .connections
                .iter()
                .filter(|(_, c)| c.wants_relay())
                .map(|(id, _)| *id)
                .collect();
            for client in without {
                self.assign_relay(now, client);
            }
            self.each_connection(now, |_| {});
        }
    }
}

/// A connection for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionView {
    /// `checking`, `connected`, `disconnected`, …
    pub state: &'static str,
    /// The path in use.
    pub path: Option<Path>,
    /// Since when.
    pub path_since: Option<Instant>,
    /// How often it changed.
    pub path_changes: u64,
    /// The last changes, oldest first, the first nomination included.
    pub history: Vec<PathStep>,
    /// Our end of the nominated pair.
    pub local: Option<SocketAddr>,
    /// The client's end of the nominated pair.
    pub remote: Option<SocketAddr>,
}

/// A change of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathStep {
    /// When.
    pub at: Instant,
    /// What it was.
    pub from: Option<PathKind>,
    /// What it became.
    pub to: Option<PathKind>,
    /// Why.
    pub reason: PathReason,
}

/// What the agents of a connection work with, for people.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConnectionDetails {
    /// How many pairs there are.
    pub pair_count: usize,
    /// The best of them.
    pub pairs: Vec<PairStatus>,
    /// How many candidates we have.
    pub local_candidate_count: usize,
    /// The best of them.
    pub local_candidates: Vec<CandidateStatus>,
    /// How many candidates the client has.
    pub remote_candidate_count: usize,
    /// The best of them.
    pub remote_candidates: Vec<CandidateStatus>,
}

fn unix_seconds(wall: SystemTime) -> f64 {
    wall.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// Whether a datagram is STUN: its first two bits are zero and the magic cookie is in place
/// (RFC 8489 §5). WireGuard types 1–4 share the first bits, but not the cookie.
fn looks_like_stun(datagram: &[u8]) -> bool {
    datagram.len() >= 20 && datagram[0] < 4 && datagram[4..8] == [0x21, 0x12, 0xa4, 0x42]
}

/// Whether a STUN message is of class request (RFC 8489 §5: both class bits are zero).
fn is_request(message: &[u8]) -> bool {
    message.len() >= 2 && message[0] & 0x01 == 0 && message[1] & 0x10 == 0
}

/// Whether a STUN message ends with a right FINGERPRINT (RFC 8489 §14.7).
fn has_fingerprint(message: &[u8]) -> bool {
    match message.split_last_chunk::<8>() {
        Some((covered, [0x80, 0x28, 0, 4, crc @ ..])) => {
            crc32(covered) ^ 0x5354_554e == u32::from_be_bytes(*crc)
        }
        _ => false,
    }
}

/// As in ITU V.42, which is also that of Ethernet.
fn crc32(bytes: &[u8]) -> u32 {
    static V42: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
    V42.checksum(bytes)
}

fn transaction_id(message: &[u8]) -> Option<[u8; 12]> {
    message.get(8..20)?.try_into().ok()
}

/// Wraps a datagram in channel data (RFC 8656 §12.4); over UDP there is no padding. `None` for one
/// that no UDP datagram could carry.
pub fn wrap(channel: u16, payload: &[u8]) -> Option<Vec<u8>> {
    let mut out = channel_data::header(channel, payload.len())?.to_vec();
    out.extend_from_slice(payload);
    Some(out)
}

#[cfg(any(test, fuzzing))]
mod fixtures;
#[cfg(test)]
mod tests;

#[cfg(test)]
mod path_tests;
#[cfg(test)]
mod rfc_table;
#[cfg(test)]
mod rfc_tests;
