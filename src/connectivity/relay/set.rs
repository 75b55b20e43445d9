//! All relays that the portal handed out.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use secrecy::ExposeSecret;
use tracing::info;

use super::candidates::{CandidateKind, DirectCandidates, Gathered, is_valid_candidate};
use super::constants::{MAX_REMOVED, MIN_RTT_DEVIATION, RETIREMENT, RETIREMENT_OF_LAST};
use super::episode::{Chronicle, Episode, Totals};
use super::{
    Allocation, AllocationEvent, ChannelPath, RelayError, RelayTimer, RelayTransmit, channel_data,
    stun,
};
use crate::admin::model::RelayStatus;
use crate::ids::RelayId;
use crate::portal::messages::{RelayEntry, RelaysPresence};

/// What to do about the relays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelaySetEvent {
    /// A new local candidate.
    CandidateAdded(Gathered),
    /// These relayed candidates lead nowhere any more: withdraw them from every peer.
    RelayedInvalidated {
        /// Whose they were.
        relay: RelayId,
        /// The former relayed addresses.
        addrs: Vec<SocketAddr>,
    },
    /// The relay can be used. Repeated after every recovery.
    RelayUsable(RelayId),
    /// Connections that use this relay should choose another one. Unless its addresses were
    /// invalidated, too, it still carries their packets for a while.
    RelayLost {
        /// The relay.
        id: RelayId,
        /// Why.
        cause: RelayError,
    },
    /// No relay is usable, nor about to be: ask the portal for others (`no_relays`).
    LastRelayLost,
    /// There is an allocation after an attempt that took so long; for the record.
    Allocated(Duration),
    /// An allocation is over; for the record.
    EpisodeEnded(Episode),
}

/// What a datagram from the network turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handled {
    /// Not between us and a relay: go on with ICE and WireGuard.
    NotRelay,
    /// Dealt with, or to be dropped.
    Consumed,
    /// A peer's packet that a relay forwarded: go on as if it had come from `peer` to `relayed`.
    Inner {
        /// The relay that forwarded it.
        relay: RelayId,
        /// Who sent it.
        peer: SocketAddr,
        /// Our relayed address that it was sent to.
        relayed: SocketAddr,
        /// Where in the datagram it is.
        payload: Range<usize>,
    },
}

#[derive(Debug)]
struct Relay {
    allocation: Allocation,
    entry: RelayEntry,
    retiring: Option<Retiring>,
    chronicle: Chronicle,
}

/// A relay that the portal withdrew but that still serves its connections: the peers must learn of
/// another one first, and the portal may change its mind within seconds.
#[derive(Debug, Clone, Copy)]
struct Retiring {
    since: Instant,
}

impl Relay {
    fn is_usable(&self) -> bool {
        self.retiring.is_none() && self.allocation.is_allocated()
    }

    fn is_same(&self, entry: &RelayEntry) -> bool {
        self.entry.v4 == entry.v4
            && self.entry.v6 == entry.v6
            && same_credentials(&self.entry, entry)
    }
}

fn same_credentials(a: &RelayEntry, b: &RelayEntry) -> bool {
    a.username == b.username && a.password.expose_secret() == b.password.expose_secret()
}

/// All relays: who they are, which one to use, and what they told us about ourselves.
#[derive(Debug)]
pub struct RelaySet {
    relays: BTreeMap<RelayId, Relay>,
    by_socket: HashMap<SocketAddr, RelayId>,
    /// Removed relays whose REFRESH with a lifetime of zero is still unanswered.
    leaving: Vec<Allocation>,
    /// Sockets of relays removed lately, oldest first.
    removed: VecDeque<SocketAddr>,
    /// Host and server-reflexive candidates; survive their relay until another one replaces them.
    direct: DirectCandidates,
    rng: StdRng,
    was_hopeful: bool,
    events: VecDeque<RelaySetEvent>,
}

impl RelaySet {
    /// An empty set. `seed` feeds transaction ids, jitter and the choice among equals; outside of
    /// tests it must be unpredictable.
    pub fn new(seed: u64) -> Self {
        Self {
            relays: BTreeMap::new(),
            by_socket: HashMap::new(),
            leaving: Vec::new(),
            removed: VecDeque::new(),
            direct: DirectCandidates::default(),
            rng: StdRng::seed_from_u64(seed),
            was_hopeful: false,
            events: VecDeque::new(),
        }
    }

    /// Takes the relays of an `init`: unknown ones are allocated, known ones left alone, changed
    /// ones replaced. Those that are not listed stay, but all that stay are checked (data-path spec
    /// §3.5, portal-channel spec §6.2).
    pub fn upsert(&mut self, now: Instant, entries: &[RelayEntry]) {
        for entry in merged(entries) {
            self.upsert_one(now, entry);
        }
        for relay in self.relays.values_mut() {
            relay.allocation.poke(now);
        }
        self.settle(now);
    }

    /// Takes a `relays_presence`. A relay in both lists stays.
    ///
    /// A withdrawn relay with an allocation is not chosen any more and [`RelaySetEvent::RelayLost`]
    /// says so at once, but it carries packets until another relay took over, for 5 s at least and
    /// 30 s at most; then its addresses are invalidated and the allocation is given back. If it
    /// returns before that, nothing was lost.
    pub fn presence(&mut self, now: Instant, presence: &RelaysPresence) {
        for id in &presence.disconnected_ids {
            if !presence.connected.iter().any(|entry| entry.id == *id) {
                self.retire(now, *id);
            }
        }
        self.upsert(now, &presence.connected);
    }

    fn upsert_one(&mut self, now: Instant, entry: RelayEntry) {
        let id = entry.id;
        let mut inherited = None;
        match self.relays.get_mut(&id) {
            Some(relay) if relay.is_same(&entry) => {
                relay.entry.expires_at = entry.expires_at;
                if relay.retiring.take().is_some() {
                    relay.chronicle.flap();
                    info!(relay.id = %id, "Relay is back");
                    if relay.is_usable() {
                        self.events.push_back(RelaySetEvent::RelayUsable(id));
                    }
                }
                return;
            }
            Some(_) => {
                info!(relay.id = %id, "Relay has another address or other credentials");
                inherited = self.succeed(now, id, &entry, inherited);
            }
            None => info!(relay.id = %id, v4 = ?entry.v4, v6 = ?entry.v6, "New relay"),
        }
        // One 5-tuple can hold one allocation: a relay that came back under another id takes over.
        for socket in entry.v4.into_iter().chain(entry.v6) {
            if let Some(&other) = self.by_socket.get(&socket) {
                inherited = self.succeed(now, other, &entry, inherited);
            }
        }
        for socket in entry.v4.into_iter().chain(entry.v6) {
            self.by_socket.insert(socket, id);
            self.removed.retain(|removed| *removed != socket);
        }
        let relay = Relay {
            allocation: Allocation::new(now, &entry, self.rng.random()),
            entry,
            retiring: None,
            chronicle: inherited.map_or_else(Chronicle::default, Chronicle::of_successor),
        };
        self.relays.insert(id, relay);
    }

    /// Takes a relay out whose place `entry` takes, and adds what happened with it to `inherited`.
    fn succeed(
        &mut self,
        now: Instant,
        id: RelayId,
        entry: &RelayEntry,
        inherited: Option<Totals>,
    ) -> Option<Totals> {
        // An allocation that was had in this very moment counts.
        self.drain_allocations(now);
        let totals = self.relays.get(&id).map(|relay| relay.chronicle.totals());
        self.remove(now, id, RelayError::Replaced, Some(entry));
        let (one, other) = (totals.unwrap_or_default(), inherited.unwrap_or_default());
        Some(Totals {
            allocations: one.allocations + other.allocations,
            flaps: one.flaps + other.flaps,
        })
    }

    fn retire(&mut self, now: Instant, id: RelayId) {
        let Some(relay) = self.relays.get_mut(&id) else {
            return;
        };
        if relay.retiring.is_some() {
            return;
        }
        if !relay.allocation.is_allocated() {
            self.remove(now, id, RelayError::Withdrawn, None);
            return;
        }
        info!(relay.id = %id, "Relay withdrawn by the portal");
        relay.retiring = Some(Retiring { since: now });
        relay.allocation.poke(now);
        let cause = RelayError::Withdrawn;
        self.events
            .push_back(RelaySetEvent::RelayLost { id, cause });
    }

    /// Takes a relay out. `successor` is what will use one of its sockets next.
    fn remove(
        &mut self,
        now: Instant,
        id: RelayId,
        cause: RelayError,
        successor: Option<&RelayEntry>,
    ) {
        self.drain_allocations(now);
        let Some(mut relay) = self.relays.remove(&id) else {
            return;
        };
        let episode = relay.chronicle.end(now, id, cause);
        self.events.extend(episode.map(RelaySetEvent::EpisodeEnded));
        self.by_socket.retain(|_, owner| *owner != id);
        self.direct.orphan(id);
        for socket in relay.entry.v4.into_iter().chain(relay.entry.v6) {
            if self.removed.len() >= MAX_REMOVED {
                self.removed.pop_front();
            }
            self.removed.push_back(socket);
        }
        let addrs: Vec<_> = relay.allocation.relayed().collect();
        if !addrs.is_empty() {
            self.events
                .push_back(RelaySetEvent::RelayedInvalidated { relay: id, addrs });
        }
        if relay.retiring.is_none() && relay.allocation.is_hopeful() {
            self.events
                .push_back(RelaySetEvent::RelayLost { id, cause });
        }
        if successor.is_some_and(|next| same_credentials(&relay.entry, next)) {
            relay.allocation.release_once(now);
        } else {
            relay.allocation.release(now);
        }
        if !relay.allocation.is_finished() {
            self.leaving.push(relay.allocation);
        }
    }

    /// Whether `from` is a socket of one of the relays.
    pub fn owns(&self, from: SocketAddr) -> bool {
        self.by_socket.contains_key(&from)
    }

    /// Whether `from` was a socket of one of the last 64 relays that were removed.
    pub fn recently_removed(&self, from: SocketAddr) -> bool {
        self.removed.contains(&from)
    }

    /// First step of demultiplexing (data-path spec §1.3): a datagram that arrived from `from` on
    /// our address `local`.
    ///
    /// Relays are known by their whole socket address, whatever their port: a peer that is itself
    /// behind a relay has that relay's address, but another port.
    pub fn handle_packet(
        &mut self,
        now: Instant,
        local: SocketAddr,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Handled {
        let Some(&id) = self.by_socket.get(&from) else {
            return self.handle_packet_of_removed(now, local, from, datagram);
        };
        if channel_data::is_channel_data(datagram) {
            if channel_data::parse(datagram).is_none() {
                return Handled::NotRelay;
            }
            let inner = self
                .relays
                .get_mut(&id)
                .and_then(|relay| relay.allocation.decapsulate(now, datagram));
            let Some(inner) = inner else {
                return Handled::Consumed;
            };
            let start = channel_data::HEADER_LEN;
            return Handled::Inner {
                relay: id,
                peer: inner.peer,
                relayed: inner.relayed,
                payload: start..start + inner.payload.len(),
            };
        }
        if !stun::is_stun(datagram) {
            return Handled::NotRelay;
        }
        let known = self
            .relays
            .get_mut(&id)
            .is_some_and(|relay| relay.allocation.handle_packet(now, local, from, datagram));
        if !known {
            self.tell_leaving(now, local, from, datagram);
        }
        self.settle(now);
        Handled::Consumed
    }

    fn handle_packet_of_removed(
        &mut self,
        now: Instant,
        local: SocketAddr,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Handled {
        if !self.recently_removed(from) {
            return Handled::NotRelay;
        }
        if stun::is_stun(datagram) {
            self.tell_leaving(now, local, from, datagram);
            Handled::Consumed
        } else if channel_data::parse(datagram).is_some() {
            Handled::Consumed
        } else {
            Handled::NotRelay
        }
    }

    fn tell_leaving(&mut self, now: Instant, local: SocketAddr, from: SocketAddr, datagram: &[u8]) {
        for allocation in &mut self.leaving {
            if allocation.handle_packet(now, local, from, datagram) {
                break;
            }
        }
        self.leaving.retain(|allocation| !allocation.is_finished());
    }

    /// A relay for a connection: uniformly among those whose round trip time is not out of line
    /// with the best (data-path spec §3.8). Allocated ones come before those that only answered.
    pub fn choose(&mut self) -> Option<RelayId> {
        self.choose_other_than(&[])
    }

    /// As [`Self::choose`], without the relays in `not`.
    pub fn choose_other_than(&mut self, not: &[RelayId]) -> Option<RelayId> {
        let candidates = |allocated: bool| -> Vec<(RelayId, Duration)> {
            self.relays
                .iter()
                .filter(|(id, relay)| {
                    relay.retiring.is_none()
                        && relay.allocation.is_hopeful()
                        && (relay.allocation.is_allocated() || !allocated)
                        && !not.contains(id)
                })
                .filter_map(|(id, relay)| Some((*id, relay.allocation.rtt()?)))
                .collect()
        };
        let mut of = candidates(true);
        if of.is_empty() {
            of = candidates(false);
        }
        eligible(of).choose(&mut self.rng).copied()
    }

    /// Whether any relay is usable.
    pub fn any_usable(&self) -> bool {
        self.relays.values().any(Relay::is_usable)
    }

    /// Whether any relay is usable, or may be soon.
    pub fn any_hopeful(&self) -> bool {
        self.relays
            .values()
            .any(|relay| relay.retiring.is_none() && relay.allocation.is_hopeful())
    }

    /// Whether this relay is usable for new connections.
    pub fn is_usable(&self, id: RelayId) -> bool {
        self.relays.get(&id).is_some_and(Relay::is_usable)
    }

    /// Makes `peer` reachable through `relay`, see [`Allocation::bind_channel`].
    pub fn bind_channel(&mut self, now: Instant, relay: RelayId, peer: SocketAddr) {
        if let Some(relay) = self.relays.get_mut(&relay) {
            relay.allocation.bind_channel(now, peer);
        }
    }

    /// Checks that `relay` still knows our allocation; see [`Allocation::poke`] for how often.
    pub fn poke(&mut self, now: Instant, relay: RelayId) {
        if let Some(relay) = self.relays.get_mut(&relay) {
            relay.allocation.poke(now);
        }
    }

    /// How to reach `peer` through `relay` now, see [`Allocation::channel_to`].
    pub fn channel_to(
        &self,
        now: Instant,
        relay: RelayId,
        peer: SocketAddr,
    ) -> Option<ChannelPath> {
        self.relays.get(&relay)?.allocation.channel_to(now, peer)
    }

    /// The relay behind one of our relayed addresses.
    pub fn relay_of(&self, relayed: SocketAddr) -> Option<RelayId> {
        self.relays
            .iter()
            .find(|(_, relay)| relay.allocation.relayed().any(|addr| addr == relayed))
            .map(|(id, _)| *id)
    }

    /// See [`Allocation::note_sent`].
    pub fn note_sent(&mut self, now: Instant, relay: RelayId, peer: SocketAddr) {
        if let Some(relay) = self.relays.get_mut(&relay) {
            relay.allocation.note_sent(now, peer);
        }
    }

    /// All local candidates: host and server-reflexive ones of any relay, relayed ones of those
    /// that may be used.
    pub fn local_candidates(&self) -> impl Iterator<Item = Gathered> + '_ {
        let relayed = self
            .relays
            .values()
            .filter(|relay| relay.is_usable())
            .flat_map(|relay| relayed_candidates(&relay.allocation));
        self.direct.distinct().into_iter().chain(relayed)
    }

    /// Sockets of the relays in use, to tell their packets from others.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.relays
            .values()
            .filter(|relay| relay.allocation.is_allocated())
            .filter_map(|relay| relay.allocation.active_socket())
            .collect()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        for relay in self.relays.values_mut() {
            relay.allocation.handle_timeout(now);
        }
        for allocation in &mut self.leaving {
            allocation.handle_timeout(now);
        }
        self.leaving.retain(|allocation| !allocation.is_finished());
        self.settle(now);
    }

    /// When [`Self::handle_timeout`] wants to be called, and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, RelayTimer)> {
        let retirements = self
            .relays
            .values()
            .filter_map(|relay| Some((self.retires_at(relay)?, RelayTimer::Retirement)));
        self.relays
            .values()
            .map(|relay| &relay.allocation)
            .chain(&self.leaving)
            .filter_map(Allocation::poll_timeout)
            .chain(retirements)
            .min()
    }

    fn retires_at(&self, relay: &Relay) -> Option<Instant> {
        let after = if self.any_usable() {
            RETIREMENT
        } else {
            RETIREMENT_OF_LAST
        };
        Some(relay.retiring?.since + after)
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<RelayTransmit> {
        // Farewells first: they must reach the server before a successor's ALLOCATE does.
        let transmit = self
            .leaving
            .iter_mut()
            .chain(self.relays.values_mut().map(|relay| &mut relay.allocation))
            .find_map(Allocation::poll_transmit);
        self.leaving.retain(|allocation| !allocation.is_finished());
        transmit
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<RelaySetEvent> {
        self.events.pop_front()
    }

    /// Gives every allocation back, for a shutdown. Drain [`Self::poll_transmit`] afterwards.
    pub fn release_all(&mut self, now: Instant) {
        let ids: Vec<_> = self.relays.keys().copied().collect();
        for id in ids {
            self.remove(now, id, RelayError::Released, None);
        }
        self.was_hopeful = false;
    }

    /// Whether every released allocation was answered for or given up.
    pub fn is_released(&self) -> bool {
        self.relays.is_empty() && self.leaving.is_empty()
    }

    /// Everything that is held, also what is only waiting to be given back.
    #[cfg(any(test, fuzzing))]
    pub(super) fn allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.relays
            .values()
            .map(|relay| &relay.allocation)
            .chain(&self.leaving)
    }

    /// Descriptions for operators; `unix_now` is the wall clock at `now`, in seconds.
    pub fn statuses(&self, now: Instant, unix_now: f64) -> Vec<RelayStatus> {
        self.relays
            .values()
            .map(|relay| {
                let mut status = relay.allocation.status(now, unix_now);
                let totals = relay.chronicle.totals();
                (status.allocations, status.flaps) = (totals.allocations, totals.flaps);
                if let Some(retiring) = relay.retiring {
                    "withdrawn".clone_into(&mut status.state);
                    status.since =
                        unix_now - now.saturating_duration_since(retiring.since).as_secs_f64();
                }
                status
            })
            .collect()
    }

    /// Brings everything into line after something changed.
    fn settle(&mut self, now: Instant) {
        self.drain_allocations(now);
        let over: Vec<_> = self
            .relays
            .iter()
            .filter(|(_, relay)| {
                relay.retiring.is_some()
                    && (!relay.allocation.is_allocated()
                        || self.retires_at(relay).is_some_and(|at| at <= now))
            })
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            self.remove(now, id, RelayError::Withdrawn, None);
        }
        let hopeful = self
            .relays
            .values()
            .any(|relay| relay.retiring.is_none() && relay.allocation.is_hopeful());
        if self.was_hopeful && !hopeful {
            self.events.push_back(RelaySetEvent::LastRelayLost);
        }
        self.was_hopeful = hopeful;
    }

    fn drain_allocations(&mut self, now: Instant) {
        for (&id, relay) in &mut self.relays {
            while let Some(event) = relay.allocation.poll_event() {
                match event {
                    AllocationEvent::Mapped { local, mapped } => {
                        let fresh = self.direct.replace(id, local, mapped);
                        let added = fresh.into_iter().map(RelaySetEvent::CandidateAdded);
                        self.events.extend(added);
                    }
                    AllocationEvent::Allocated { .. } => {
                        relay.chronicle.begin(now, relay.allocation.active_socket());
                        let took = relay.allocation.attempt_took();
                        self.events.push_back(RelaySetEvent::Allocated(took));
                        if relay.retiring.is_none() {
                            let added = relayed_candidates(&relay.allocation)
                                .map(RelaySetEvent::CandidateAdded);
                            self.events.extend(added);
                            self.events.push_back(RelaySetEvent::RelayUsable(id));
                        }
                    }
                    AllocationEvent::Invalidated { relayed } => {
                        let cause = relay.allocation.last_error().unwrap_or(RelayError::Expired);
                        let episode = relay.chronicle.end(now, id, cause);
                        self.events.extend(episode.map(RelaySetEvent::EpisodeEnded));
                        self.events.push_back(RelaySetEvent::RelayedInvalidated {
                            relay: id,
                            addrs: relayed,
                        });
                    }
                    AllocationEvent::Lost { cause } => {
                        if relay.retiring.is_none() {
                            self.events
                                .push_back(RelaySetEvent::RelayLost { id, cause });
                        }
                    }
                }
            }
        }
    }
}

fn relayed_candidates(allocation: &Allocation) -> impl Iterator<Item = Gathered> + '_ {
    let relay = allocation.id();
    let local = allocation.local();
    allocation
        .relayed()
        .filter(|addr| is_valid_candidate(*addr))
        .filter_map(move |addr| {
            Some(Gathered {
                relay,
                kind: CandidateKind::Relayed,
                addr,
                base: local?,
            })
        })
}

/// Entries by id, in order of appearance; a relay's two addresses may come as two entries, and the
/// later credentials win (data-path spec §3).
fn merged(entries: &[RelayEntry]) -> Vec<RelayEntry> {
    let mut merged: Vec<RelayEntry> = Vec::with_capacity(entries.len());
    for entry in entries {
        match merged.iter_mut().find(|known| known.id == entry.id) {
            Some(known) => {
                let (v4, v6) = (entry.v4.or(known.v4), entry.v6.or(known.v6));
                *known = RelayEntry {
                    v4,
                    v6,
                    ..entry.clone()
                };
            }
            None => merged.push(entry.clone()),
        }
    }
    merged
}

/// The relays that are near enough to the best (data-path spec §3.8).
fn eligible(mut relays: Vec<(RelayId, Duration)>) -> Vec<RelayId> {
    relays.sort_by_key(|(_, rtt)| *rtt);
    let Some(&(_, best)) = relays.first() else {
        return Vec::new();
    };
    let limit = if relays.len() <= 2 {
        best.mul_f64(1.5)
    } else {
        let rtts: Vec<_> = relays.iter().map(|(_, rtt)| *rtt).collect();
        let middle = median(&rtts);
        let mut deviations: Vec<_> = rtts.iter().map(|rtt| rtt.abs_diff(middle)).collect();
        deviations.sort_unstable();
        middle + median(&deviations).max(MIN_RTT_DEVIATION) * 3
    };
    relays
        .into_iter()
        .filter(|(_, rtt)| *rtt <= limit)
        .map(|(id, _)| id)
        .collect()
}

/// Median of a sorted, non-empty list.
fn median(sorted: &[Duration]) -> Duration {
    let upper = sorted[sorted.len() / 2];
    if sorted.len().is_multiple_of(2) {
        (sorted[sorted.len() / 2 - 1] + upper) / 2
    } else {
        upper
    }
}
