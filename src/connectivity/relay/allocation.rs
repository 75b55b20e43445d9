//! The TURN client of one relay.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stun_codec::TransactionId;
use tracing::{debug, info, warn};

use super::channels::ChannelTable;
use super::constants::{
    BAD_CREDENTIALS_FIRST, DEFAULT_LIFETIME, KEEP_ALIVE, MAX_CHALLENGES, MAX_LIFETIME,
    MAX_MISMATCHES, MAX_QUEUED_PEERS, MIN_REFRESH_INTERVAL, POKE_INTERVAL, PROBE_FIRST, PROBE_MAX,
    REFRESH_RETRY, REFUSED_FIRST, REFUSED_MAX,
};
use super::stun::{self, Challenge, Credentials, Families, Incoming, Integrity, Request};
use super::transactions::{Due, Outgoing, Transaction, Transactions};
use super::{ChannelPath, Decapsulated, RelayError, RelayTimer, RelayTransmit, channel_data};
use crate::admin::model::RelayStatus;
use crate::ids::RelayId;
use crate::portal::messages::RelayEntry;

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
            Purpose::Clear | Purpose::Release => Request::Refresh { lifetime: Some(0) },
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
    relayed: Vec<SocketAddr>,
    at: Instant,
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

    last_error: Option<RelayError>,
    /// Failed attempts in a row.
    failures: u32,
    /// Failed attempts in a row for the same cause.
    same_cause: u32,
    span: Option<tracing::Span>,

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
            last_error: None,
            failures: 0,
            same_cause: 0,
            span: None,
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
        let error = (!message.is_success()).then(|| message.error_code());
        if transaction.purpose != Purpose::Binding {
            // RFC 8489 §9.2.4: servers do not sign 401 and 438. Everything else must prove itself,
            // and nothing can prove itself to a request that was not signed but an error.
            let trusted = match (error, transaction.signed) {
                (Some(401 | 438), _) | (Some(_), false) => true,
                (None, false) => false,
                (_, true) => {
                    self.credentials
                        .as_ref()
                        .zip(self.challenge.as_ref())
                        .map(|(credentials, c)| message.integrity(credentials, &c.realm))
                        == Some(Integrity::Valid)
                }
            };
            if !trusted {
                transaction.distrusted_error = error;
                debug!(relay.id = %self.id, ?error, "Ignoring an answer without valid MESSAGE-INTEGRITY");
                return true;
            }
        }
        let Some(transaction) = self.transactions.remove(message.id()) else {
            return false;
        };
        self.last_heard = Some(now);
        self.sample_rtt(now.saturating_duration_since(transaction.first_sent));

        match (transaction.purpose, error) {
            // An error is a sign of life, too: some servers want BINDING signed.
            (Purpose::Binding, _) => self.on_binding(now, local, from, message.mapped()),
            (_, None) => self.on_success(now, transaction.purpose, &message),
            (_, Some(code @ (401 | 438))) => self.on_challenge(now, &transaction, code, &message),
            (purpose, Some(code)) => self.on_error(now, purpose, code),
        }
        true
    }

    fn sample_rtt(&mut self, sample: Duration) {
        self.rtt = Some(match self.rtt {
            Some(rtt) => rtt * 7 / 8 + sample / 8,
            None => sample,
        });
    }

    fn on_binding(
        &mut self,
        now: Instant,
        local: SocketAddr,
        from: SocketAddr,
        mapped: Option<SocketAddr>,
    ) {
        let mapping = Mapping { local, mapped };
        let known = &mut self.mappings[family_index(from)];
        let previous = known.replace(mapping);
        if previous != Some(mapping) {
            self.events
                .push_back(AllocationEvent::Mapped { local, mapped });
        }
        match &mut self.state {
            State::Probing => {
                self.active = Some(from);
                if let Some(span) = &self.span {
                    span.record("server.address", from.ip().to_string());
                    span.record("server.port", from.port());
                }
                self.start_allocate(now);
            }
            // The server knows the allocation by our 5-tuple; if that changed, it has lost us.
            State::Allocated(allocated)
                if previous.is_some_and(|p| p != mapping)
                    && self.active == Some(from)
                    && allocated.refresh_at.is_some() =>
            {
                allocated.refresh_at = Some(now);
                self.refresh_if_due(now);
            }
            _ => {}
        }
    }

    fn on_success(&mut self, now: Instant, purpose: Purpose, message: &Incoming) {
        match purpose {
            Purpose::Allocate(_) => {
                let relayed: Vec<_> = message
                    .relayed()
                    .into_iter()
                    .filter(|addr| addr.port() != 0 && !addr.ip().is_unspecified())
                    .collect();
                if relayed.is_empty() {
                    self.fail(now, RelayError::Protocol);
                } else {
                    self.allocated(now, relayed, message.lifetime());
                }
            }
            Purpose::Refresh => {
                if message.lifetime().is_some_and(|l| l.is_zero()) {
                    self.reallocate(now);
                } else if let State::Allocated(allocated) = &mut self.state {
                    let (refresh_after, lifetime) = refresh_times(message.lifetime());
                    allocated.refresh_at = Some(now + refresh_after);
                    allocated.expires_at = now + lifetime;
                }
            }
            Purpose::Clear => self.start_allocate(now),
            Purpose::ChannelBind { channel, .. } => self.channels.confirmed(now, channel),
            Purpose::Release | Purpose::Binding => {}
        }
    }

    fn allocated(&mut self, now: Instant, relayed: Vec<SocketAddr>, lifetime: Option<Duration>) {
        let (refresh_after, lifetime) = refresh_times(lifetime);
        self.state = State::Allocated(Allocated {
            relayed: relayed.clone(),
            at: now,
            refresh_at: Some(now + refresh_after),
            expires_at: now + lifetime,
            keep_alive_at: now + KEEP_ALIVE,
        });
        self.since = now;
        self.failures = 0;
        self.same_cause = 0;
        self.last_error = None;
        self.end_span(None);
        info!(
            relay.id = %self.id,
            relay.address = ?self.active,
            ?relayed,
            lifetime = lifetime.as_secs(),
            "Relay allocated"
        );
        self.events
            .push_back(AllocationEvent::Allocated { relayed });
        for peer in std::mem::take(&mut self.queued) {
            self.bind_channel(now, peer);
        }
    }

    fn on_challenge(
        &mut self,
        now: Instant,
        transaction: &Transaction<Purpose>,
        code: u16,
        message: &Incoming,
    ) {
        let purpose = transaction.purpose;
        let known_realm = self.challenge.as_ref().map(|c| &c.realm);
        let realm = message.realm().or(known_realm).cloned();
        // A signed request that is answered 401 was signed with the wrong key, unless the key was
        // made with another realm (RFC 8489 §9.2.5).
        let refused = code == 401 && transaction.signed && realm.as_ref() == known_realm;
        if refused || self.credentials.is_none() {
            return self.fail(now, RelayError::BadCredentials);
        }
        if transaction.challenged >= MAX_CHALLENGES {
            return self.fail(now, RelayError::StaleNonce);
        }
        let Some((realm, nonce)) = realm.zip(message.nonce().cloned()) else {
            return self.fail(now, RelayError::Protocol);
        };
        self.challenge = Some(Challenge { realm, nonce });
        self.send(now, purpose, transaction.dst, transaction.challenged + 1);
    }

    fn on_error(&mut self, now: Instant, purpose: Purpose, code: u16) {
        match (purpose, code) {
            (Purpose::Allocate(_), 437) if self.mismatches < MAX_MISMATCHES => {
                self.mismatches += 1;
                self.send_to_active(now, Purpose::Clear);
            }
            (Purpose::Clear, 437) => self.start_allocate(now),
            // 400, because that is what a server says that chokes on an attribute.
            (Purpose::Allocate(Families::Both), 400 | 420 | 440 | 442) => {
                self.send_to_active(now, Purpose::Allocate(Families::Default));
            }
            (Purpose::Allocate(Families::Default), 440) => {
                self.send_to_active(now, Purpose::Allocate(Families::V6));
            }
            (Purpose::Refresh, 437) => self.reallocate(now),
            (Purpose::ChannelBind { peer, .. }, 437) => {
                self.queue(peer);
                self.reallocate(now);
            }
            (Purpose::Allocate(_) | Purpose::Clear, _) | (Purpose::Refresh, 441) => {
                self.fail(now, RelayError::from_code(code));
            }
            (Purpose::Refresh, _) => {
                warn!(relay.id = %self.id, stun.error_code = code, "Relay refuses to refresh the allocation");
                self.last_error = Some(RelayError::from_code(code));
                self.retry_refresh(now);
            }
            (Purpose::ChannelBind { channel, peer }, _) => {
                debug!(relay.id = %self.id, %peer, stun.error_code = code, "Relay refuses a channel");
                self.channels.failed(channel);
            }
            (Purpose::Release | Purpose::Binding, _) => {}
        }
    }

    fn retry_refresh(&mut self, now: Instant) {
        if let State::Allocated(allocated) = &mut self.state {
            allocated.refresh_at = Some(now + REFRESH_RETRY);
        }
    }

    /// The server no longer knows the allocation: ask for another one at once.
    fn reallocate(&mut self, now: Instant) {
        if let State::Allocated(allocated) = &self.state
            && now.saturating_duration_since(allocated.at) < MIN_REFRESH_INTERVAL
        {
            // It forgets as fast as it allocates; going on would be a loop at the speed of light.
            return self.fail(now, RelayError::AllocationMismatch(437));
        }
        warn!(relay.id = %self.id, "Relay lost our allocation, allocating again");
        self.forget_allocation(now);
        self.last_error = Some(RelayError::AllocationMismatch(437));
        self.mismatches = 0;
        self.start_span();
        if let (Some(span), Some(active)) = (&self.span, self.active) {
            span.record("server.address", active.ip().to_string());
            span.record("server.port", active.port());
        }
        self.start_allocate(now);
    }

    /// Drops allocation, channels and requests; the channels' peers wait for the next allocation.
    fn forget_allocation(&mut self, now: Instant) {
        self.transactions.clear();
        for peer in self.channels.clear(now) {
            self.queue(peer);
        }
        if let State::Allocated(allocated) =
            std::mem::replace(&mut self.state, State::Waiting { retry_at: None })
        {
            let relayed = allocated.relayed;
            self.events
                .push_back(AllocationEvent::Invalidated { relayed });
        }
    }

    /// The present attempt or allocation has failed.
    fn fail(&mut self, now: Instant, cause: RelayError) {
        if matches!(self.state, State::Released) {
            self.transactions.clear();
            return;
        }
        let was_hopeful = self.is_hopeful();
        self.end_span(Some(cause));
        self.forget_allocation(now);
        if cause != RelayError::NoResponse {
            self.queued.clear();
        }
        self.active = None;
        self.challenge = None;
        let same = self.failures > 0 && self.last_error == Some(cause);
        self.same_cause = if same { self.same_cause + 1 } else { 0 };
        self.failures = self.failures.saturating_add(1);
        self.last_error = Some(cause);
        let delay = self.retry_delay(cause);
        self.state = State::Waiting {
            retry_at: delay.map(|d| now + d),
        };
        if was_hopeful {
            self.since = now;
            warn!(relay.id = %self.id, error = %cause, error.type = cause.error_type(), retry_in = ?delay, "Relay not usable");
            self.events.push_back(AllocationEvent::Lost { cause });
        } else {
            debug!(relay.id = %self.id, error = %cause, retry_in = ?delay, "Relay still not usable");
        }
    }

    fn retry_delay(&mut self, cause: RelayError) -> Option<Duration> {
        let (first, max) = match cause {
            RelayError::NoAddress => return None,
            RelayError::NoResponse | RelayError::Expired => (PROBE_FIRST, PROBE_MAX),
            RelayError::BadCredentials => (BAD_CREDENTIALS_FIRST, REFUSED_MAX),
            _ => (REFUSED_FIRST, REFUSED_MAX),
        };
        let full = first.saturating_mul(1 << self.same_cause.min(16)).min(max);
        // Many gateways lose a relay at the same moment; they should not all come back at once.
        Some(full.mul_f64(self.rng.random_range(0.75..=1.0)))
    }

    fn start_attempt(&mut self, now: Instant) {
        self.transactions.clear();
        self.active = None;
        self.challenge = None;
        self.mismatches = 0;
        self.start_span();
        if self.servers.is_empty() {
            self.state = State::Probing;
            return self.fail(now, RelayError::NoAddress);
        }
        self.state = State::Probing;
        for server in self.servers.clone() {
            self.send(now, Purpose::Binding, server, 0);
        }
    }

    fn start_allocate(&mut self, now: Instant) {
        if !matches!(self.state, State::Allocating) {
            self.state = State::Allocating;
            if self.failures == 0 {
                self.since = now;
            }
        }
        self.send_to_active(now, Purpose::Allocate(Families::Both));
    }

    fn start_span(&mut self) {
        self.span = Some(tracing::info_span!(
            parent: None,
            "relay.allocate",
            otel.kind = "client",
            otel.status_code = tracing::field::Empty,
            relay.id = %self.id,
            server.address = tracing::field::Empty,
            server.port = tracing::field::Empty,
            stun.error_code = tracing::field::Empty,
            error.type = tracing::field::Empty,
        ));
    }

    fn end_span(&mut self, error: Option<RelayError>) {
        let Some(span) = self.span.take() else {
            return;
        };
        if let Some(error) = error {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", error.error_type());
            if let Some(code) = error.stun_error_code() {
                span.record("stun.error_code", code);
            }
            if self.active.is_none()
                && let Some(server) = self.servers.first()
            {
                span.record("server.address", server.ip().to_string());
                span.record("server.port", server.port());
            }
        }
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
        let signed = auth.is_some();
        let bytes = stun::encode(purpose.request(), id, auth);
        self.transmits.push_back(RelayTransmit {
            dst,
            payload: bytes.clone(),
        });
        let outgoing = Outgoing {
            purpose,
            dst,
            bytes,
            signed,
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

    fn on_silence(&mut self, now: Instant, transaction: &Transaction<Purpose>) {
        // A lost request is not a lost relay.
        let alive = self
            .last_heard
            .is_some_and(|at| at > transaction.first_sent);
        let cause = transaction
            .distrusted_error
            .map_or(RelayError::NoResponse, RelayError::from_code);
        match transaction.purpose {
            Purpose::Release => {}
            Purpose::Binding => {
                let probing = matches!(self.state, State::Probing);
                let others = self
                    .transactions
                    .iter()
                    .any(|t| t.purpose == Purpose::Binding);
                let silent_allocation =
                    self.is_allocated() && self.active == Some(transaction.dst) && !alive;
                if (probing && !others) || silent_allocation {
                    self.fail(now, RelayError::NoResponse);
                }
            }
            Purpose::Refresh if alive => self.retry_refresh(now),
            Purpose::ChannelBind { channel, .. } if alive => self.channels.unanswered(now, channel),
            Purpose::Allocate(_)
            | Purpose::Clear
            | Purpose::Refresh
            | Purpose::ChannelBind { .. } => self.fail(now, cause),
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

    /// Makes `peer` reachable through the relay; idempotent.
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
        if covered && let Some(channel) = self.channels.bind(now, peer) {
            self.send_to_active(now, Purpose::ChannelBind { channel, peer });
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

    /// Notes that channel data from `peer` arrived without passing [`Self::decapsulate`].
    pub fn note_received(&mut self, now: Instant, peer: SocketAddr) {
        self.last_heard = Some(now);
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
            || self
                .transactions
                .iter()
                .any(|t| t.signed && matches!(t.purpose, Purpose::Allocate(_)));
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
    /// once. At most every [`POKE_INTERVAL`], because what calls this may flap.
    pub fn poke(&mut self, now: Instant) {
        if now.saturating_duration_since(self.last_poke) < POKE_INTERVAL {
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

    /// A description for operators; `unix_now` is the wall clock at `now`, in seconds.
    pub fn status(&self, now: Instant, unix_now: f64) -> RelayStatus {
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
            since: unix_now - now.saturating_duration_since(self.since).as_secs_f64(),
            relayed: self.relayed().map(|addr| addr.to_string()).collect(),
            rtt: self.rtt.map(|rtt| rtt.as_secs_f64()),
            #[allow(clippy::cast_precision_loss)]
            credentials_expire_at: Some(self.credentials_expire_at as f64),
            channels: self.channels.bound(now),
            last_error: self.last_error.map(|error| error.to_string()),
        }
    }
}

fn family_index(addr: SocketAddr) -> usize {
    usize::from(addr.is_ipv6())
}

/// After how long to refresh, and after how long the allocation is gone (RFC 8656 §8).
fn refresh_times(lifetime: Option<Duration>) -> (Duration, Duration) {
    let lifetime = lifetime.unwrap_or(DEFAULT_LIFETIME).min(MAX_LIFETIME);
    ((lifetime / 2).max(MIN_REFRESH_INTERVAL), lifetime)
}
