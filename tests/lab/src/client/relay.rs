//! TURN side: BINDING for host and reflexive candidates, one allocation per relay address through
//! `turn-client-proto`, and hand-framed channel data for the packets (data-path spec §3).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use turn_client_proto::api::{DelayedMessageOrChannelSend, Transmit, TurnConfig, TurnEvent};
use turn_client_proto::prelude::{DelayedTransmitBuild as _, TurnClientApi as _};
use turn_client_proto::stun::types::attribute::{ErrorCode, Software, XorMappedAddress};
use turn_client_proto::stun::types::message::{BINDING, Message, MessageWriteVec, TransactionId};
use turn_client_proto::stun::types::prelude::{MessageWrite as _, MessageWriteExt as _};
use turn_client_proto::types::{
    AddressFamily, Instant as TurnInstant, TransportType, TurnCredentials,
};
use turn_client_proto::udp::{TurnClientUdp, TurnPollRet, TurnRecvRet};
use uuid::Uuid;

use super::erase::{Erased, Eraser};
use super::messages::{RelayEntry, Secret};
use super::transmit::TransmitQueue;

/// Keep-alive and re-measuring interval (§3.1).
const BINDING_INTERVAL: Duration = Duration::from_secs(25);
/// First retry of a BINDING; later ones grow by half (§3.2).
const BINDING_RETRY: Duration = Duration::from_secs(1);
/// A BINDING unanswered for longer is given up (§3.2).
const BINDING_GIVE_UP: Duration = Duration::from_secs(8);
/// Pause before a failed address or allocation is tried again.
const RESTART_PAUSE: Duration = Duration::from_secs(5);
/// When the answer to a bind is lost, the TURN library neither repeats it nor gives it up, nor lets
/// it be begun again. After this time the allocation is made anew.
const BIND_GIVE_UP: Duration = Duration::from_secs(10);
/// coturn keeps a deleted allocation for a second.
const ERASE_PAUSE: Duration = Duration::from_millis(1500);
/// Peers that may wait for an allocation (§3.4).
const MAX_QUEUED_PEERS: usize = 100;
/// Dropped relays whose late answers are ignored without noise (§1.3).
const MAX_DROPPED: usize = 64;

/// How far one relay address has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RelayState {
    /// Waiting for a BINDING answer.
    Probing,
    /// BINDING answered; no allocation wanted here.
    Reachable,
    /// ALLOCATE under way.
    Allocating,
    /// Allocation held.
    Allocated,
    /// No answer, or the allocation was refused; retried later.
    Failed,
}

#[derive(Debug)]
struct Binding {
    id: TransactionId,
    bytes: Vec<u8>,
    first_sent: Instant,
    next: Instant,
    interval: Duration,
}

/// One address of a relay: one 5-tuple, one allocation.
#[derive(Debug)]
pub struct RelayPath {
    relay: Uuid,
    addr: SocketAddr,
    /// Whether this address may allocate.
    allocate: bool,
    binding: Option<Binding>,
    next_binding: Instant,
    state: RelayState,
    local: Option<SocketAddr>,
    mapped: Option<SocketAddr>,
    rtt: Option<Duration>,
    turn: Option<TurnClientUdp>,
    turn_wake: Instant,
    turn_restart: Option<Instant>,
    /// The relay still holds an allocation for us that we know nothing of.
    occupied: bool,
    eraser: Option<Eraser>,
    relayed: Option<SocketAddr>,
    /// Peers a channel is wanted for.
    wanted: BTreeSet<SocketAddr>,
    /// Peers whose bind is under way; the TURN client would start a second one.
    binding_channel: BTreeMap<SocketAddr, TurnInstant>,
    channels: HashMap<SocketAddr, u16>,
    peers: HashMap<u16, SocketAddr>,
}

impl RelayPath {
    fn new(relay: Uuid, addr: SocketAddr, allocate: bool, now: Instant) -> Self {
        Self {
            relay,
            addr,
            allocate,
            binding: None,
            next_binding: now,
            state: RelayState::Probing,
            local: None,
            mapped: None,
            rtt: None,
            turn: None,
            turn_wake: now,
            turn_restart: None,
            occupied: false,
            eraser: None,
            relayed: None,
            wanted: BTreeSet::new(),
            binding_channel: BTreeMap::new(),
            channels: HashMap::new(),
            peers: HashMap::new(),
        }
    }

    /// The relay's socket.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
    /// Progress.
    pub fn state(&self) -> RelayState {
        self.state
    }
    /// Our address as the datagrams of this relay reach us.
    pub fn local(&self) -> Option<SocketAddr> {
        self.local
    }
    /// Our address as the relay sees it.
    pub fn mapped(&self) -> Option<SocketAddr> {
        self.mapped
    }
    /// Our address on the relay.
    pub fn relayed(&self) -> Option<SocketAddr> {
        self.relayed
    }
    /// Smoothed round-trip time.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }
    /// Peers with a confirmed channel.
    pub fn channel_peers(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.channels.keys().copied()
    }

    fn forget_allocation(&mut self) {
        self.turn = None;
        self.relayed = None;
        self.binding_channel.clear();
        self.channels.clear();
        self.peers.clear();
    }

    fn timeout(&self) -> Instant {
        let mut at = match &self.binding {
            Some(binding) => binding.next,
            None => self.next_binding,
        };
        if self.turn.is_some() {
            at = at.min(self.turn_wake);
        }
        if let Some(restart) = self.turn_restart {
            at = at.min(restart);
        }
        if let Some(eraser) = &self.eraser {
            at = at.min(eraser.timeout());
        }
        at
    }

    fn drive_binding(&mut self, now: Instant, out: &mut TransmitQueue) -> bool {
        if let Some(binding) = &mut self.binding {
            if now >= binding.first_sent + BINDING_GIVE_UP {
                tracing::info!(relay = %self.addr, "no answer from relay");
                self.binding = None;
                self.next_binding = now + RESTART_PAUSE;
                self.state = RelayState::Failed;
                self.turn_restart = None;
                self.forget_allocation();
                return true;
            }
            if now >= binding.next {
                out.push(None, self.addr, &[], &binding.bytes);
                binding.interval = binding.interval * 3 / 2;
                binding.next = (now + binding.interval).min(binding.first_sent + BINDING_GIVE_UP);
            }
        } else if now >= self.next_binding {
            let (id, bytes) = binding_request();
            out.push(None, self.addr, &[], &bytes);
            self.binding = Some(Binding {
                id,
                bytes,
                first_sent: now,
                next: now + BINDING_RETRY,
                interval: BINDING_RETRY,
            });
        }
        false
    }

    /// Goes on freeing the socket; afterwards the allocation is tried again.
    fn drive_eraser(&mut self, now: Instant, out: &mut TransmitQueue) {
        let Some(eraser) = &mut self.eraser else {
            return;
        };
        match eraser.poll(now) {
            Some(Some(request)) => out.push(None, self.addr, &[], request),
            Some(None) => {}
            None => self.eraser = None,
        }
    }

    /// Recognises the answer to our BINDING. `None`: not ours.
    fn handle_binding(
        &mut self,
        now: Instant,
        local: SocketAddr,
        message: &Message<'_>,
    ) -> Option<bool> {
        if self.binding.as_ref()?.id != message.transaction_id() {
            return None;
        }
        let binding = self.binding.take()?;
        self.next_binding = now + BINDING_INTERVAL;
        let Ok(mapped) = message
            .attribute::<XorMappedAddress>()
            .map(|a| a.addr(message.transaction_id()))
        else {
            tracing::debug!(relay = %self.addr, "BINDING answer without a mapped address");
            return Some(false);
        };
        let sample = now.saturating_duration_since(binding.first_sent);
        self.rtt = Some(self.rtt.map_or(sample, |old| (old * 7 + sample) / 8));
        let changed = self.local != Some(local) || self.mapped != Some(mapped);
        let moved = self.local.is_some_and(|old| old != local);
        self.local = Some(local);
        self.mapped = Some(mapped);
        if moved {
            // Another source address is another 5-tuple: the allocation is out of reach.
            self.forget_allocation();
        }
        if self.turn.is_none()
            && self.turn_restart.is_none()
            && (moved || self.state != RelayState::Reachable)
        {
            self.state = RelayState::Reachable;
            if self.allocate {
                self.turn_restart = Some(now);
            }
        }
        Some(changed)
    }
}

fn binding_request() -> (TransactionId, Vec<u8>) {
    let mut builder = Message::builder_request(BINDING, MessageWriteVec::new());
    if let Ok(software) = Software::new("lab-client") {
        // Cannot fail: the attribute is the first one in an empty message.
        let _ = builder.add_attribute(&software);
    }
    (builder.transaction_id(), builder.finish())
}

#[derive(Debug)]
struct Server {
    username: String,
    password: Secret,
    paths: Vec<RelayPath>,
}

/// All relays the portal offered.
#[derive(Debug)]
pub struct Relays {
    epoch: Instant,
    use_v4: bool,
    use_v6: bool,
    one_allocation: bool,
    servers: BTreeMap<Uuid, Server>,
    by_addr: HashMap<SocketAddr, (Uuid, usize)>,
    by_relayed: HashMap<SocketAddr, (Uuid, usize)>,
    dropped: VecDeque<IpAddr>,
    changed: bool,
    /// Answers of relays that were TURN `Data` indications; ignored, as the stock client does.
    pub ignored_indications: u64,
}

/// What became of a STUN-like datagram from port 3478.
#[derive(Debug, PartialEq, Eq)]
pub enum StunOutcome {
    /// It was for a relay of ours.
    Consumed,
    /// The sender is a relay we dropped lately.
    Late,
    /// No relay: a peer whose NAT chose port 3478.
    NotRelay,
}

/// What became of channel data.
#[derive(Debug, PartialEq, Eq)]
pub enum ChannelOutcome {
    /// Sent by `peer` to `relayed`.
    Peer {
        /// The channel's peer.
        peer: SocketAddr,
        /// Our relayed address.
        relayed: SocketAddr,
    },
    /// A relay of ours, but no such channel.
    Unknown,
    /// No relay.
    NotRelay,
}

impl Relays {
    /// No relays yet. `epoch` anchors the TURN client's own time type.
    pub fn new(epoch: Instant, use_v4: bool, use_v6: bool, one_allocation: bool) -> Self {
        Self {
            epoch,
            use_v4,
            use_v6,
            one_allocation,
            servers: BTreeMap::new(),
            by_addr: HashMap::new(),
            by_relayed: HashMap::new(),
            dropped: VecDeque::new(),
            changed: false,
            ignored_indications: 0,
        }
    }

    fn turn_now(&self, now: Instant) -> TurnInstant {
        turn_time(self.epoch, now)
    }

    /// Adds unknown relays, replaces those with other addresses or credentials, keeps the rest.
    pub fn upsert(&mut self, now: Instant, entries: &[RelayEntry]) {
        let mut grouped: BTreeMap<Uuid, Vec<&RelayEntry>> = BTreeMap::new();
        for entry in entries.iter().filter(|e| e.kind == "turn") {
            let usable = if entry.addr.is_ipv4() {
                self.use_v4
            } else {
                self.use_v6
            };
            if usable {
                grouped.entry(entry.id).or_default().push(entry);
            }
        }
        for (id, entries) in grouped {
            let Some(last) = entries.last() else { continue };
            let mut addrs: Vec<SocketAddr> = Vec::new();
            for entry in &entries {
                if !addrs.contains(&entry.addr) {
                    addrs.push(entry.addr);
                }
            }
            if let Some(known) = self.servers.get(&id)
                && known.username == last.username
                && known.password == last.password
                && known.paths.iter().map(|p| p.addr).eq(addrs.iter().copied())
            {
                continue;
            }
            self.drop_server(id);
            self.dropped
                .retain(|ip| !addrs.iter().any(|a| a.ip() == *ip));
            tracing::info!(relay = %id, ?addrs, "new relay");
            let paths = addrs
                .into_iter()
                .enumerate()
                .map(|(i, addr)| RelayPath::new(id, addr, i == 0 || !self.one_allocation, now))
                .collect();
            self.servers.insert(
                id,
                Server {
                    username: last.username.clone(),
                    password: last.password.clone(),
                    paths,
                },
            );
            self.changed = true;
        }
        self.reindex();
    }

    /// Drops relays the portal reported gone.
    pub fn remove(&mut self, ids: &[Uuid]) {
        for id in ids {
            self.drop_server(*id);
        }
        self.reindex();
    }

    fn drop_server(&mut self, id: Uuid) {
        if let Some(server) = self.servers.remove(&id) {
            tracing::info!(relay = %id, "relay dropped");
            for path in server.paths {
                self.dropped.push_back(path.addr.ip());
            }
            while self.dropped.len() > MAX_DROPPED {
                self.dropped.pop_front();
            }
            self.changed = true;
        }
    }

    fn reindex(&mut self) {
        self.by_addr.clear();
        self.by_relayed.clear();
        for (id, server) in &self.servers {
            for (i, path) in server.paths.iter().enumerate() {
                self.by_addr.insert(path.addr, (*id, i));
                if let Some(relayed) = path.relayed {
                    self.by_relayed.insert(relayed, (*id, i));
                }
            }
        }
    }

    /// Whether candidates or allocations changed since the last call.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Whether no relay is known.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// All addresses of all relays with their identity.
    pub fn paths(&self) -> impl Iterator<Item = (Uuid, &RelayPath)> {
        self.servers
            .values()
            .flat_map(|s| s.paths.iter().map(|p| (p.relay, p)))
    }

    /// The relay with the shortest round trip among those with an allocation.
    pub fn best(&self) -> Option<Uuid> {
        self.paths()
            .filter(|(_, p)| p.relayed.is_some())
            .min_by_key(|(_, p)| p.rtt)
            .map(|(id, _)| id)
    }

    /// Whether `id` holds an allocation.
    pub fn has_allocation(&self, id: Uuid) -> bool {
        self.servers
            .get(&id)
            .is_some_and(|s| s.paths.iter().any(|p| p.relayed.is_some()))
    }

    /// Whether `addr` is one of our relayed addresses.
    pub fn is_relayed(&self, addr: SocketAddr) -> bool {
        self.by_relayed.contains_key(&addr)
    }

    /// Wants a channel from `relay` to `peer`; queued until there is an allocation of its family.
    pub fn want_channel(&mut self, now: Instant, relay: Uuid, peer: SocketAddr) {
        let turn_now = self.turn_now(now);
        let Some(server) = self.servers.get_mut(&relay) else {
            return;
        };
        for path in &mut server.paths {
            if path.addr.is_ipv4() == peer.is_ipv4() && path.wanted.len() < MAX_QUEUED_PEERS {
                path.wanted.insert(peer);
                path.bind(turn_now, peer);
                path.turn_wake = now;
            }
        }
    }

    /// Sends `head` + `body` from `relayed` to `peer` in channel data. Without a confirmed channel
    /// the datagram is dropped and the bind started (§3.4).
    pub fn send(
        &mut self,
        now: Instant,
        relayed: SocketAddr,
        peer: SocketAddr,
        payload: &[u8],
        out: &mut TransmitQueue,
    ) -> bool {
        let Some(&(id, index)) = self.by_relayed.get(&relayed) else {
            return false;
        };
        let turn_now = self.turn_now(now);
        let Some(path) = self
            .servers
            .get_mut(&id)
            .and_then(|s| s.paths.get_mut(index))
        else {
            return false;
        };
        let Some(number) = path.channels.get(&peer) else {
            // Whom a check goes to through the relay, the relay must be able to reach; where that
            // cannot be, coturn keeps the TURN library waiting.
            let reachable = match peer.ip() {
                IpAddr::V4(ip) => !ip.is_private(),
                IpAddr::V6(ip) => !ip.is_unique_local(),
            };
            if path.wanted.contains(&peer) || (reachable && path.wanted.len() < MAX_QUEUED_PEERS) {
                path.wanted.insert(peer);
                path.bind(turn_now, peer);
                path.turn_wake = now;
            }
            return false;
        };
        let Ok(length) = u16::try_from(payload.len()) else {
            return false;
        };
        let [n0, n1] = number.to_be_bytes();
        let [l0, l1] = length.to_be_bytes();
        out.push(None, path.addr, &[n0, n1, l0, l1], payload);
        true
    }

    /// A STUN-like datagram from port 3478.
    pub fn handle_stun(
        &mut self,
        now: Instant,
        local: SocketAddr,
        from: SocketAddr,
        datagram: &[u8],
    ) -> StunOutcome {
        let turn_now = self.turn_now(now);
        let Some(&(id, index)) = self.by_addr.get(&from) else {
            return if self.dropped.contains(&from.ip()) {
                StunOutcome::Late
            } else {
                StunOutcome::NotRelay
            };
        };
        let Ok(message) = Message::from_bytes(datagram) else {
            return StunOutcome::NotRelay;
        };
        let Some(server) = self.servers.get_mut(&id) else {
            return StunOutcome::NotRelay;
        };
        let Some(path) = server.paths.get_mut(index) else {
            return StunOutcome::NotRelay;
        };
        let erased = path
            .eraser
            .as_mut()
            .and_then(|e| e.handle(now, &message, &server.username, &server.password));
        if erased == Some(Erased::Done) {
            path.eraser = None;
            path.turn_restart = Some(now + ERASE_PAUSE);
        }
        if erased.is_some() {
            return StunOutcome::Consumed;
        }
        let mismatch = message
            .attribute::<ErrorCode>()
            .is_ok_and(|e| e.code() == 437);
        if mismatch && path.state == RelayState::Allocated {
            // The relay has lost it, and the TURN library would go on as if nothing had happened.
            path.allocation_lost(now);
            path.turn_restart = Some(now);
            self.changed = true;
            self.reindex();
            return StunOutcome::Consumed;
        }
        path.occupied |= mismatch && path.state == RelayState::Allocating;
        if let Some(changed) = path.handle_binding(now, local, &message) {
            self.changed |= changed;
        } else if let Some(turn) = &mut path.turn {
            let transmit = Transmit::new(datagram, TransportType::Udp, from, local);
            if let TurnRecvRet::PeerData(_) = turn.recv(transmit, turn_now) {
                self.ignored_indications += 1;
            }
            path.turn_wake = now;
        }
        StunOutcome::Consumed
    }

    /// Channel data from port 3478.
    pub fn handle_channel_data(&self, from: SocketAddr, number: u16) -> ChannelOutcome {
        let Some(&(id, index)) = self.by_addr.get(&from) else {
            return ChannelOutcome::NotRelay;
        };
        self.servers
            .get(&id)
            .and_then(|s| s.paths.get(index))
            .and_then(|path| {
                Some(ChannelOutcome::Peer {
                    peer: *path.peers.get(&number)?,
                    relayed: path.relayed?,
                })
            })
            .unwrap_or(ChannelOutcome::Unknown)
    }

    /// When [`Self::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.paths().map(|(_, p)| p.timeout()).min()
    }

    /// Sends what is due. A relay none of whose addresses answers is dropped (§3.2).
    pub fn handle_timeout(&mut self, now: Instant, out: &mut TransmitQueue) {
        let turn_now = self.turn_now(now);
        let epoch = self.epoch;
        let mut dirty = false;
        let mut dead = Vec::new();
        for (id, server) in &mut self.servers {
            for path in &mut server.paths {
                dirty |= path.drive_binding(now, out);
                path.drive_eraser(now, out);
                let stuck = |since: &TurnInstant| turn_now >= *since + BIND_GIVE_UP;
                if path.binding_channel.values().any(stuck) {
                    path.occupied = true;
                    path.allocation_lost(now);
                    dirty = true;
                }
                if path.turn_restart.is_some_and(|at| now >= at) {
                    path.turn_restart = None;
                    path.start_turn(&server.username, &server.password);
                    path.turn_wake = now;
                }
                if path.turn.is_some() && now >= path.turn_wake {
                    dirty |= path.drive_turn(now, turn_now, epoch, out);
                }
            }
            // A refused allocation has its restart scheduled; without one the relay is silent.
            let silent = |p: &RelayPath| p.state == RelayState::Failed && p.turn_restart.is_none();
            if server.paths.iter().all(silent) {
                dead.push(*id);
            }
        }
        for id in dead {
            self.drop_server(id);
            dirty = true;
        }
        if dirty {
            self.changed = true;
            self.reindex();
        }
    }

    /// Gives all allocations back (REFRESH with lifetime 0).
    pub fn release(&mut self, now: Instant, out: &mut TransmitQueue) {
        let turn_now = self.turn_now(now);
        for path in self.servers.values_mut().flat_map(|s| &mut s.paths) {
            if let Some(turn) = &mut path.turn {
                // Requests are paced; a moment in the future gets past that. What was queued
                // before, a channel bind say, comes first: one poll would leave the REFRESH behind.
                let later = turn_now + Duration::from_secs(1);
                if turn.delete(turn_now).is_ok() {
                    while let Some(transmit) = turn.poll_transmit(later) {
                        out.push(None, path.addr, &[], &transmit.data);
                    }
                }
            }
        }
    }
}

fn turn_time(epoch: Instant, at: Instant) -> TurnInstant {
    let nanos = at.saturating_duration_since(epoch).as_nanos();
    TurnInstant::from_nanos(i64::try_from(nanos).unwrap_or(i64::MAX))
}

impl RelayPath {
    fn start_turn(&mut self, username: &str, password: &Secret) {
        let Some(local) = self.local else { return };
        let mut config = TurnConfig::new(TurnCredentials::new(username, password.expose()));
        config.set_address_family(if self.addr.is_ipv4() {
            AddressFamily::IPV4
        } else {
            AddressFamily::IPV6
        });
        config.set_request_retransmits(
            Duration::from_millis(500),
            Duration::from_secs(2),
            5,
            Duration::from_secs(2),
        );
        self.forget_allocation();
        self.turn = Some(TurnClientUdp::allocate(local, self.addr, config));
        self.state = RelayState::Allocating;
    }

    fn bind(&mut self, turn_now: TurnInstant, peer: SocketAddr) {
        if self.channels.contains_key(&peer)
            || self.binding_channel.contains_key(&peer)
            || self.relayed.is_none()
        {
            return;
        }
        if let Some(turn) = &mut self.turn {
            // What it refuses, because of a bind that came to nothing before, counts as stuck, too.
            let _ = turn.bind_channel(TransportType::Udp, peer, turn_now);
            self.binding_channel.insert(peer, turn_now);
        }
    }

    /// Channel numbers are private to the TURN client; a framed empty datagram shows them.
    fn learn_channel(&mut self, turn_now: TurnInstant, peer: SocketAddr) {
        let Some(turn) = &mut self.turn else { return };
        let empty: [u8; 0] = [];
        let Ok(Some(build)) = turn.send_to(TransportType::Udp, peer, empty, turn_now) else {
            return;
        };
        if let DelayedMessageOrChannelSend::Channel(channel) = build.data {
            let bytes = channel.build();
            if let Some([hi, lo]) = bytes.first_chunk::<2>() {
                let number = u16::from_be_bytes([*hi, *lo]);
                self.channels.insert(peer, number);
                self.peers.insert(number, peer);
            }
        }
    }

    fn drive_turn(
        &mut self,
        now: Instant,
        turn_now: TurnInstant,
        epoch: Instant,
        out: &mut TransmitQueue,
    ) -> bool {
        let mut dirty = false;
        // Bounded: each round either sends, reports an event or waits.
        for _ in 0..64 {
            let Some(turn) = &mut self.turn else { break };
            while let Some(transmit) = turn.poll_transmit(turn_now) {
                out.push(None, self.addr, &[], &transmit.data);
            }
            if let Some(event) = turn.poll_event() {
                dirty |= self.handle_turn_event(now, turn_now, event);
                continue;
            }
            match turn.poll(turn_now) {
                TurnPollRet::WaitUntil(at) => {
                    if at <= turn_now {
                        self.turn_wake = now + Duration::from_millis(5);
                        continue;
                    }
                    let nanos = u64::try_from(at.as_nanos()).unwrap_or(0);
                    self.turn_wake =
                        (epoch + Duration::from_nanos(nanos)).max(now + Duration::from_millis(1));
                }
                TurnPollRet::Closed => {
                    // Events that explain the end come first.
                    if let Some(event) = turn.poll_event() {
                        dirty |= self.handle_turn_event(now, turn_now, event);
                        continue;
                    }
                    tracing::info!(relay = %self.addr, "allocation over");
                    self.allocation_lost(now);
                    dirty = true;
                }
                other => {
                    tracing::debug!(?other, "unexpected answer of the TURN client");
                    self.turn_wake = now + Duration::from_secs(1);
                }
            }
            break;
        }
        dirty
    }

    fn allocation_lost(&mut self, now: Instant) {
        self.forget_allocation();
        self.state = RelayState::Failed;
        self.turn_restart = Some(now + RESTART_PAUSE);
        if std::mem::take(&mut self.occupied) {
            self.eraser = Some(Eraser::new(now));
        }
    }

    fn handle_turn_event(&mut self, now: Instant, turn_now: TurnInstant, event: TurnEvent) -> bool {
        match event {
            TurnEvent::AllocationCreated(_, relayed) => {
                tracing::info!(relay = %self.addr, %relayed, "allocated");
                self.relayed = Some(relayed);
                self.state = RelayState::Allocated;
                for peer in self.wanted.clone() {
                    self.bind(turn_now, peer);
                }
                true
            }
            TurnEvent::AllocationCreateFailed(family) => {
                tracing::warn!(relay = %self.addr, %family, "allocation refused");
                self.allocation_lost(now);
                true
            }
            TurnEvent::ChannelCreated(_, peer) => {
                self.binding_channel.remove(&peer);
                self.learn_channel(turn_now, peer);
                false
            }
            TurnEvent::ChannelCreateFailed(_, peer) => {
                tracing::debug!(relay = %self.addr, %peer, "no channel");
                self.binding_channel.remove(&peer);
                if let Some(number) = self.channels.remove(&peer) {
                    self.peers.remove(&number);
                }
                false
            }
            other => {
                tracing::trace!(?other, "TURN event");
                false
            }
        }
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
