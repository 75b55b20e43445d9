//! The TURN client of one relay.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stun_codec::TransactionId;
use tracing::{debug, info};

use super::channels::ChannelTable;
use super::constants::{KEEP_ALIVE, MAX_QUEUED_PEERS, POKE_INTERVAL};
use super::stun::{self, Challenge, Credentials, Families, Incoming, Integrity, Request, Verdict};
use super::transactions::{Due, Outgoing, Transactions};
use super::{ChannelPath, Decapsulated, RelayError, RelayTimer, RelayTransmit, channel_data};
use crate::admin::model::RelayStatus;
use crate::ids::RelayId;
use crate::portal::messages::RelayEntry;

mod answers;
mod attempt;

/// What happened to an allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllocationEvent {
    /// A BINDING answer showed how the relay sees us.
    Mapped {
        /// Our address on which the answer arrived.
        local: SocketAddr,
        /// Our address as the relay sees it; `None` if it does not say.
        mapped: Option<SocketAddr>,
    },
    /// There is an allocation.
    Allocated {
        /// Its relayed transport addresses, one per family at most.
        relayed: Vec<SocketAddr>,
    },
    /// The allocation is gone; another attempt may already be under way.
    Invalidated {
        /// Its former relayed transport addresses.
        relayed: Vec<SocketAddr>,
    },
    /// The relay is not usable and will not be within the next round trips. It is tried again.
    Lost {
        /// Why.
        cause: RelayError,
    },
}

/// What a request in flight is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Binding,
    Allocate(Families),
    Refresh,
    /// Clears away an allocation that the server holds for our 5-tuple, to make a new one.
    Clear,
    /// Gives back an allocation that is of no use.
    Discard,
    /// Gives the allocation back for good.
    Release,
    ChannelBind {
        channel: u16,
        peer: SocketAddr,
    },
}

impl Purpose {
    fn request(self) -> Request {
        match self {
            Purpose::Binding => Request::Binding,
            Purpose::Allocate(families) => Request::Allocate(families),
            Purpose::Refresh => Request::Refresh { lifetime: None },
            Purpose::Clear | Purpose::Discard | Purpose::Release => {
                Request::Refresh { lifetime: Some(0) }
            }
            Purpose::ChannelBind { channel, peer } => Request::ChannelBind { channel, peer },
        }
    }
}

#[derive(Debug)]
enum State {
    /// BINDING to every address; the first answer decides which one is used.
    Probing,
    /// ALLOCATE, or what must precede it, is in flight.
    Allocating,
    Allocated(Allocated),
    /// The last attempt failed; `None` waits for ever.
    Waiting {
        retry_at: Option<Instant>,
    },
    Released,
}

#[derive(Debug)]
struct Allocated {
    since: Instant,
    relayed: Vec<SocketAddr>,
    /// `None` while a REFRESH is in flight.
    refresh_at: Option<Instant>,
    expires_at: Instant,
    keep_alive_at: Instant,
}

/// How a relay sees us over one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    local: SocketAddr,
    mapped: Option<SocketAddr>,
}

/// The TURN client of one relay: finds a working address of it, allocates, keeps the allocation
/// and its channels alive, and starts over when any of that fails (data-path spec §3).
#[derive(Debug)]
pub struct Allocation {
    id: RelayId,
    /// The relay's addresses, IPv4 first.
    servers: Vec<SocketAddr>,
    /// `None` when the portal's user name cannot be encoded.
    credentials: Option<Credentials>,
    credentials_expire_at: u64,
    rng: StdRng,

    state: State,
    since: Instant,
    /// The relay's address that answered first.
    active: Option<SocketAddr>,
    challenge: Option<Challenge>,
    /// 437 answers in the present attempt.
    mismatches: u8,
    transactions: Transactions<Purpose>,
    channels: ChannelTable,
    queued: VecDeque<SocketAddr>,

    mappings: [Option<Mapping>; 2],
    rtt: Option<Duration>,
    last_heard: Option<Instant>,
    last_data_sent: Option<Instant>,
    last_poke: Instant,
    last_reallocation: Option<Instant>,

    /// What is wrong at present.
    last_error: Option<RelayError>,
    /// The last thing that was ever wrong, and when.
    last_failure: Option<(Instant, RelayError)>,
    /// Failed attempts in a row.
    failures: u32,
    /// Failed attempts in a row for the same cause.
    same_cause: u32,
    span: Option<tracing::Span>,
    /// When the present attempt began.
    attempt_since: Option<Instant>,
    /// How long the attempt took that led to the last allocation.
    attempt_took: Duration,

    transmits: VecDeque<RelayTransmit>,
    events: VecDeque<AllocationEvent>,
}

impl Allocation {
    /// Starts to allocate on the relay that `entry` describes.
    ///
    /// `seed` feeds transaction ids and retry jitter; outside of tests it must be unpredictable.
    pub fn new(now: Instant, entry: &RelayEntry, seed: u64) -> Self {
        let mut this = Self {
            id: entry.id,
            servers: entry.v4.into_iter().chain(entry.v6).collect(),
            credentials: Credentials::new(&entry.username, &entry.password),
            credentials_expire_at: entry.expires_at,
            rng: StdRng::seed_from_u64(seed),
            state: State::Waiting { retry_at: None },
            since: now,
            active: None,
            challenge: None,
            mismatches: 0,
            transactions: Transactions::default(),
            channels: ChannelTable::default(),
            queued: VecDeque::new(),
            mappings: [None; 2],
            rtt: None,
            last_heard: None,
            last_data_sent: None,
            last_poke: now,
            last_reallocation: None,
            last_error: None,
            last_failure: None,
            failures: 0,
            same_cause: 0,
            span: None,
            attempt_since: None,
            attempt_took: Duration::ZERO,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        };
        this.start_attempt(now);
        this
    }

    /// The relay's id.
    pub fn id(&self) -> RelayId {
        self.id
    }

    /// Whether `addr` is a socket of this relay.
    pub fn owns(&self, addr: SocketAddr) -> bool {
        self.servers.contains(&addr)
    }

    /// The relay's socket in use, once one has answered.
    pub fn active_socket(&self) -> Option<SocketAddr> {
        self.active
    }

    /// Our relayed transport addresses, one per family at most.
    pub fn relayed(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        match &self.state {
            State::Allocated(allocated) => allocated.relayed.iter().copied(),
            _ => [].iter().copied(),
        }
    }

    /// Whether there is an allocation.
    pub fn is_allocated(&self) -> bool {
        matches!(self.state, State::Allocated(_))
    }

    /// Whether there is an allocation or a first attempt at one that has not failed yet.
    pub fn is_hopeful(&self) -> bool {
        match self.state {
            State::Allocated(_) => true,
            State::Probing | State::Allocating => self.failures == 0,
            State::Waiting { .. } | State::Released => false,
        }
    }

    /// Whether the allocation was given back and nothing is left to send.
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Released)
            && self.transactions.is_empty()
            && self.transmits.is_empty()
    }

    /// Smoothed round trip time (data-path spec §3.8).
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Our local address and its server-reflexive counterpart, per family in which the relay
    /// answered.
    pub fn mappings(&self) -> impl Iterator<Item = (SocketAddr, Option<SocketAddr>)> + '_ {
        self.mappings.iter().flatten().map(|m| (m.local, m.mapped))
    }

    /// Our address from which the relay is used.
    pub fn local(&self) -> Option<SocketAddr> {
        let active = self.active?;
        self.mappings[family_index(active)].map(|m| m.local)
    }

    /// Takes a STUN message that arrived from `from` on our address `local`.
    ///
    /// Answers `false` when it is not an answer to one of our requests.
    pub fn handle_packet(
        &mut self,
        now: Instant,
        local: SocketAddr,
        from: SocketAddr,
        datagram: &[u8],
    ) -> bool {
        let Some(message) = Incoming::decode(datagram) else {
            return false;
        };
        let Some(transaction) = self.transactions.get_mut(message.id()) else {
            return false;
        };
        if transaction.dst != from || !message.answers(transaction.purpose.request()) {
            return false;
        }
        let verdict = message.verdict();
        if transaction.purpose != Purpose::Binding {
            // RFC 8489 §9.2.4: servers do not sign 401 and 438. Everything else must prove itself,
            // and nothing can prove itself to a request that was not signed but an error.
            let trusted = match (verdict, &transaction.realm) {
                (Verdict::Error(401 | 438), _) => true,
                (_, None) => !message.is_success(),
                (_, Some(realm)) => {
                    self.credentials
                        .as_ref()
                        .map(|credentials| message.integrity(credentials, realm))
                        == Some(Integrity::Valid)
                }
            };
            if !trusted {
                transaction.distrusted = Some(match verdict {
                    Verdict::Error(code) => RelayError::from_code(code),
                    Verdict::Success | Verdict::Nonsense => RelayError::Integrity,
                });
                debug!(relay.id = %self.id, ?verdict, "Ignoring an answer without valid MESSAGE-INTEGRITY");
                return true;
            }
        }
        let Some(transaction) = self.transactions.remove(message.id()) else {
            return false;
        };
        self.last_heard = Some(now);
        self.sample_rtt(now.saturating_duration_since(transaction.first_sent));

        match (transaction.purpose, verdict) {
            // An error is a sign of life, too: some servers want BINDING signed.
            (Purpose::Binding, Verdict::Nonsense) => self.on_binding(now, local, from, None),
            (Purpose::Binding, _) => self.on_binding(now, local, from, message.mapped()),
            (purpose, Verdict::Success) => {
                // A router that was restarted gives us another address, and the relay sees it when
                // we allocate anew (RFC 8656 §7.3).
                if let (Purpose::Allocate(_), Some(mapped)) = (purpose, message.mapped()) {
                    let mapped = Some(mapped);
                    self.learn_mapping(from, Mapping { local, mapped });
                }
                self.on_success(now, purpose, &message);
            }
            (_, Verdict::Error(code @ (401 | 438))) => {
                self.on_challenge(now, &transaction, code, &message);
            }
            (purpose, Verdict::Error(code)) => self.on_error(now, purpose, code),
            (purpose, Verdict::Nonsense) => self.on_nonsense(now, purpose, message.is_success()),
        }
        true
    }

    fn send_to_active(&mut self, now: Instant, purpose: Purpose) {
        if let Some(active) = self.active {
            self.send(now, purpose, active, 0);
        }
    }

    fn send(&mut self, now: Instant, purpose: Purpose, dst: SocketAddr, challenged: u8) {
        self.send_request(now, purpose, dst, challenged, true);
    }

    fn send_request(
        &mut self,
        now: Instant,
        purpose: Purpose,
        dst: SocketAddr,
        challenged: u8,
        retransmit: bool,
    ) {
        let id = TransactionId::new(self.rng.random());
        let auth = if purpose == Purpose::Binding {
            None
        } else {
            self.credentials.as_ref().zip(self.challenge.as_ref())
        };
        let realm = auth.map(|(_, challenge)| challenge.realm.clone());
        let bytes = stun::encode(purpose.request(), id, auth);
        self.transmits.push_back(RelayTransmit {
            dst,
            payload: bytes.clone(),
        });
        let outgoing = Outgoing {
            purpose,
            dst,
            bytes,
            realm,
            challenged,
            retransmit,
        };
        self.transactions.insert(now, id, outgoing);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(due) = self.transactions.pop_due(now) {
            match due {
                Due::Retransmit { dst, bytes } => {
                    let payload = bytes;
                    self.transmits.push_back(RelayTransmit { dst, payload });
                }
                Due::TimedOut(transaction) => self.on_silence(now, &transaction),
            }
        }
        match &self.state {
            State::Waiting { retry_at: Some(at) } if *at <= now => self.start_attempt(now),
            State::Allocated(allocated) if allocated.expires_at <= now => {
                self.fail(now, RelayError::Expired);
            }
            State::Allocated(_) => {
                self.refresh_if_due(now);
                self.keep_alive_if_due(now);
                while let Some(due) = self.channels.pop_due(now) {
                    if let Some((channel, peer)) = due {
                        self.send_to_active(now, Purpose::ChannelBind { channel, peer });
                    }
                }
            }
            _ => {}
        }
    }

    fn refresh_if_due(&mut self, now: Instant) {
        if let State::Allocated(allocated) = &mut self.state
            && allocated.refresh_at.is_some_and(|at| at <= now)
        {
            allocated.refresh_at = None;
            self.send_to_active(now, Purpose::Refresh);
        }
    }

    fn keep_alive_if_due(&mut self, now: Instant) {
        let State::Allocated(allocated) = &mut self.state else {
            return;
        };
        if allocated.keep_alive_at > now {
            return;
        }
        allocated.keep_alive_at = now + KEEP_ALIVE;
        let recently = |at: Option<Instant>| {
            at.is_some_and(|at| now.saturating_duration_since(at) < KEEP_ALIVE)
        };
        // Sending alone keeps the NAT binding, but only an answer shows that the relay lives.
        let busy = recently(self.last_data_sent) && recently(self.last_heard);
        for server in self.servers.clone() {
            let in_use = self.active == Some(server);
            let answered = self.mappings[family_index(server)].is_some();
            if (in_use && busy) || !(in_use || answered) {
                continue;
            }
            self.send(now, Purpose::Binding, server, 0);
        }
    }

    /// When [`Self::handle_timeout`] wants to be called, and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, RelayTimer)> {
        let retransmit = self
            .transactions
            .next_deadline()
            .map(|at| (at, RelayTimer::Retransmit));
        let mut next = retransmit;
        let mut consider = |at: Option<Instant>, timer| {
            if let Some(at) = at
                && next.is_none_or(|(earliest, _)| at < earliest)
            {
                next = Some((at, timer));
            }
        };
        match &self.state {
            State::Waiting { retry_at } => consider(*retry_at, RelayTimer::Retry),
            State::Allocated(allocated) => {
                consider(allocated.refresh_at, RelayTimer::Refresh);
                consider(Some(allocated.expires_at), RelayTimer::Expiry);
                consider(Some(allocated.keep_alive_at), RelayTimer::KeepAlive);
                consider(self.channels.next_deadline(), RelayTimer::Channel);
            }
            State::Probing | State::Allocating | State::Released => {}
        }
        next
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<RelayTransmit> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<AllocationEvent> {
        self.events.pop_front()
    }

    /// Makes `peer` reachable through the relay, and keeps it so; to be called whenever something is
    /// to be sent there. A peer that the relay refuses is asked for again after a pause.
    ///
    /// Without an allocation the wish is kept for later, up to [`MAX_QUEUED_PEERS`] of them. Peers
    /// of a family that the allocation does not cover are ignored.
    pub fn bind_channel(&mut self, now: Instant, peer: SocketAddr) {
        let covered = match &self.state {
            State::Released => return,
            State::Allocated(allocated) => allocated
                .relayed
                .iter()
                .any(|addr| addr.is_ipv4() == peer.is_ipv4()),
            _ => return self.queue(peer),
        };
        if !covered {
            return;
        }
        match self.channels.bind(now, peer) {
            Some(channel) => self.send_to_active(now, Purpose::ChannelBind { channel, peer }),
            None => self.channels.note_use_of_peer(now, peer),
        }
    }

    fn queue(&mut self, peer: SocketAddr) {
        if self.queued.contains(&peer) {
            return;
        }
        if self.queued.len() >= MAX_QUEUED_PEERS {
            debug!(relay.id = %self.id, %peer, "Too many peers wait for the relay");
            return;
        }
        self.queued.push_back(peer);
    }

    /// How to reach `peer` now. A channel may be used before the server has confirmed it; what it
    /// does not know yet it drops.
    pub fn channel_to(&self, now: Instant, peer: SocketAddr) -> Option<ChannelPath> {
        if !self.is_allocated() {
            return None;
        }
        let channel = self.channels.to(now, peer)?;
        let relay = self.active?;
        Some(ChannelPath { channel, relay })
    }

    /// Notes that channel data was sent to `peer`; keeps the channel in use and saves keep-alives.
    pub fn note_sent(&mut self, now: Instant, peer: SocketAddr) {
        self.last_data_sent = Some(now);
        self.channels.note_use_of_peer(now, peer);
    }

    /// Unwraps channel data from the relay; `None` for anything else and for unknown channels.
    pub fn decapsulate<'a>(
        &mut self,
        now: Instant,
        datagram: &'a [u8],
    ) -> Option<Decapsulated<'a>> {
        let (channel, payload) = channel_data::parse(datagram)?;
        if !self.is_allocated() {
            return None;
        }
        let peer = self.channels.received(now, channel)?;
        self.last_heard = Some(now);
        let relayed = self.relayed().find(|a| a.is_ipv4() == peer.is_ipv4())?;
        Some(Decapsulated {
            peer,
            relayed,
            payload,
        })
    }

    /// Gives the allocation back (REFRESH with a lifetime of zero) and stops for good.
    pub fn release(&mut self, now: Instant) {
        self.release_with(now, true);
    }

    /// As [`Self::release`], but without retransmission: for a socket on which the next allocation
    /// with the same credentials follows, which a late copy would delete.
    pub fn release_once(&mut self, now: Instant) {
        self.release_with(now, false);
    }

    fn release_with(&mut self, now: Instant, retransmit: bool) {
        if matches!(self.state, State::Released) {
            return;
        }
        // A signed ALLOCATE may have succeeded without our knowing.
        let may_exist = self.is_allocated()
            || self.transactions.iter().any(|t| {
                t.is_signed() && matches!(t.purpose, Purpose::Allocate(_) | Purpose::Discard)
            });
        self.forget_allocation(now);
        self.queued.clear();
        self.transmits.clear();
        self.state = State::Released;
        self.since = now;
        self.end_span(Some(RelayError::Released));
        if may_exist && let Some(active) = self.active {
            self.send_request(now, Purpose::Release, active, 0, retransmit);
            info!(relay.id = %self.id, "Relay allocation released");
        }
    }

    /// Checks that the relay still serves us: refreshes an allocation, retries a failed relay at
    /// once. At most every [`POKE_INTERVAL`], because what calls this may flap; a check that would
    /// come too early is made as soon as that has passed.
    pub fn poke(&mut self, now: Instant) {
        let due = self.last_poke + POKE_INTERVAL;
        if now < due {
            if let State::Allocated(allocated) = &mut self.state
                && let Some(at) = allocated.refresh_at.as_mut().filter(|at| **at > due)
            {
                *at = due;
                self.last_poke = due;
            }
            return;
        }
        self.last_poke = now;
        match &mut self.state {
            State::Allocated(allocated) => {
                if allocated.refresh_at.is_some() {
                    allocated.refresh_at = Some(now);
                    self.refresh_if_due(now);
                }
            }
            State::Waiting { retry_at: Some(_) } => self.start_attempt(now),
            State::Waiting { retry_at: None }
            | State::Probing
            | State::Allocating
            | State::Released => {}
        }
    }

    /// How many requests are in flight, and how many peers wait for an allocation.
    #[cfg(any(test, fuzzing))]
    pub(super) fn load(&self) -> (usize, usize) {
        (self.transactions.iter().count(), self.queued.len())
    }

    /// How long the attempt took that led to the last allocation.
    pub(super) fn attempt_took(&self) -> Duration {
        self.attempt_took
    }

    /// The last failure, until it is overcome.
    pub fn last_error(&self) -> Option<RelayError> {
        self.last_error
    }

    fn note_error(&mut self, now: Instant, error: RelayError) {
        self.last_error = Some(error);
        self.last_failure = Some((now, error));
    }

    /// A description for operators; `unix_now` is the wall clock at `now`, in seconds. What
    /// outlives an allocation's owner is the set's to add.
    pub fn status(&self, now: Instant, unix_now: f64) -> RelayStatus {
        let ago = |at: Instant| unix_now - now.saturating_duration_since(at).as_secs_f64();
        let allocated = match &self.state {
            State::Allocated(allocated) => Some(allocated),
            _ => None,
        };
        let state = match self.state {
            State::Allocated(_) => "allocated",
            State::Released => "released",
            State::Waiting { .. } => "failed",
            State::Probing | State::Allocating if self.failures > 0 => "failed",
            State::Probing => "probing",
            State::Allocating => "allocating",
        };
        RelayStatus {
            id: self.id.to_string(),
            addresses: self.servers.iter().map(ToString::to_string).collect(),
            state: state.to_owned(),
            since: ago(self.since),
            relayed: self.relayed().map(|addr| addr.to_string()).collect(),
            allocated_at: allocated.map(|a| ago(a.since)),
            allocation_expires_at: allocated
                .map(|a| unix_now + a.expires_at.saturating_duration_since(now).as_secs_f64()),
            rtt: self.rtt.map(|rtt| rtt.as_secs_f64()),
            #[allow(clippy::cast_precision_loss)]
            credentials_expire_at: Some(self.credentials_expire_at as f64),
            channels: self.channels.bound(now),
            last_error: self.last_failure.map(|(_, error)| error.to_string()),
            last_error_at: self.last_failure.map(|(at, _)| ago(at)),
            ..RelayStatus::default()
        }
    }
}

fn family_index(addr: SocketAddr) -> usize {
    usize::from(addr.is_ipv6())
}
