//! WireGuard sessions around boringtun: keys, indices, handshakes, timers (data-path spec §4).
//!
//! The slow path runs handshakes and timers here; established sessions are shared with the workers
//! through [`Peer`], which take the session's lock once per run of packets. Who may reach what, and
//! over which path, is decided elsewhere.

mod admission;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};

pub use self::admission::AdmissionCounters;
use self::admission::{Admission, Rejected};
use crate::access::DropReason;
use crate::datapath::peers::{IndexPool, Path, Peer, PeerTable};
use crate::ids::ClientId;
use crate::portal::messages::PresharedKey;
use crate::timers::Deadlines;

/// How often the timers of a session in use are looked at; boringtun, which does not say when they
/// are due, has a clock as coarse as this: which of two packets came first it knows if there was a look
/// between them.
const TIMER_STEP: Duration = Duration::from_millis(500);
/// So long after its last packet or handshake nothing more of the same exchange is to be expected.
const JUST_USED: Duration = Duration::from_secs(2);
/// A session that waits for nothing but a keep-alive or a handshake for want of an answer, which come after
/// 10 and 15 s.
const CALM_STEP: Duration = Duration::from_secs(2);
/// For so long after its last packet or handshake that may be.
const IN_USE: Duration = Duration::from_secs(30);
/// A session that nothing goes through, and whose keys do not end before. What boringtun is told later
/// counts from the last look, and the attempts at a handshake end after 90 s.
const IDLE_STEP: Duration = Duration::from_secs(20);
/// Keys are to be given up 180 s after their handshake (REJECT-AFTER-TIME, WireGuard paper §6.1), which
/// boringtun does at the next look.
const KEYS_END: Duration = Duration::from_millis(180_500);

/// A connection whose re-keys stay unanswered this long has failed (data-path spec §2.8).
const GIVE_UP: Duration = Duration::from_secs(20);

/// Datagrams kept until a pair is nominated (data-path spec §2.5).
const HELD: usize = 128;

/// Largest datagram that boringtun writes for a handshake or an empty data message.
const SCRATCH: usize = 2048;

/// A datagram for a client, to be sent now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Where to.
    pub route: Route,
    /// The WireGuard message.
    pub payload: Vec<u8>,
}

/// Where an [`Outgoing`] datagram goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Over the client's nominated path.
    Path(Path),
    /// Back to where a message came from (cookie replies only: their sender is not known yet).
    Reply {
        /// The address it came to.
        local: SocketAddr,
        /// The address it came from.
        remote: SocketAddr,
    },
}

/// What happened to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A handshake was completed or answered.
    Handshake(ClientId),
    /// The client stopped answering, or the session is too old.
    Failed(ClientId),
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Not a WireGuard message, or one that belongs to no session.
    Invalid,
    /// Its first MAC is wrong: the sender does not know our public key.
    Mac,
    /// Too many handshakes; a cookie was asked for.
    UnderLoad,
    /// Nobody with that key is authorized.
    UnknownPeer,
}

impl Refused {
    /// What it is counted as.
    pub fn drop_reason(self) -> DropReason {
        match self {
            Self::Invalid | Self::Mac | Self::UnknownPeer => DropReason::HandshakeInvalid,
            Self::UnderLoad => DropReason::HandshakeRateLimited,
        }
    }
}

struct Session {
    peer: Arc<Peer>,
    public_key: [u8; 32],
    preshared_key: PresharedKey,
    held: VecDeque<Vec<u8>>,
    /// Since when our own initiations are unanswered.
    unanswered_since: Option<Instant>,
    /// The last handshake and the one before, whose keys are good at the same time.
    handshakes: [Option<Instant>; 2],
    last_use: Instant,
}

impl Session {
    /// When boringtun may have something to do, or is to know what time it is.
    fn next_look(&self, now: Instant) -> Instant {
        let quiet_for = now.saturating_duration_since(self.last_use);
        let step = if quiet_for < JUST_USED || self.unanswered_since.is_some() {
            TIMER_STEP
        } else if quiet_for < IN_USE {
            CALM_STEP
        } else {
            IDLE_STEP
        };
        let ends = self.handshakes.iter().flatten().map(|at| *at + KEYS_END);
        ends.filter(|end| *end > now).fold(now + step, Instant::min)
    }
}

/// Every client's WireGuard session; one static key per process.
pub struct WireGuard {
    private: StaticSecret,
    public: PublicKey,
    /// Before any curve operation.
    admission: Admission,
    /// Sessions get one that never limits: admission has already happened.
    unlimited: Arc<RateLimiter>,
    indices: IndexPool,
    sessions: HashMap<ClientId, Session>,
    by_key: HashMap<[u8; 32], ClientId>,
    by_index: HashMap<u32, ClientId>,
    table: Arc<PeerTable>,
    outgoing: VecDeque<Outgoing>,
    events: VecDeque<Event>,
    /// When each session's timers are to be looked at.
    timers: Deadlines<ClientId>,
    /// How often that happened.
    #[cfg(test)]
    looked_at: u64,
}

impl WireGuard {
    /// Sessions under a fresh static key.
    pub fn new(table: Arc<PeerTable>) -> Self {
        // The thread generator is cryptographic and seeded by the kernel.
        Self::with_key(table, StaticSecret::from(rand::random::<[u8; 32]>()))
    }

    fn with_key(table: Arc<PeerTable>, private: StaticSecret) -> Self {
        let public = PublicKey::from(&private);
        Self {
            admission: Admission::new(&public),
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            indices: IndexPool::new(rand::random()),
            private,
            public,
            sessions: HashMap::new(),
            by_key: HashMap::new(),
            by_index: HashMap::new(),
            table,
            outgoing: VecDeque::new(),
            events: VecDeque::new(),
            timers: Deadlines::new(),
            #[cfg(test)]
            looked_at: 0,
        }
    }

    /// Our public key, as told to the portal on every connect.
    pub fn public_key(&self) -> [u8; 32] {
        self.public.to_bytes()
    }

    /// Whether a client's session was made with just these keys.
    pub fn has_session(&self, client: ClientId, key: &[u8; 32], psk: &PresharedKey) -> bool {
        self.sessions
            .get(&client)
            .is_some_and(|s| s.public_key == *key && s.preshared_key == *psk)
    }

    /// Makes a session, replacing the client's former one. `None` when every slot is taken.
    pub fn insert(
        &mut self,
        now: Instant,
        client: ClientId,
        public_key: [u8; 32],
        preshared_key: PresharedKey,
    ) -> Option<Arc<Peer>> {
        self.remove(client);
        let index = self.indices.take()?;
        let tunn = Tunn::new(
            self.private.clone(),
            PublicKey::from(public_key),
            Some(preshared_key.0),
            None,
            index,
            Some(Arc::clone(&self.unlimited)),
        );
        let peer = Arc::new(Peer::new(index, client, tunn));
        self.table.insert(Arc::clone(&peer));
        // A key moves with its newest owner: two clients never share one.
        if let Some(former) = self.by_key.insert(public_key, client) {
            self.remove(former);
            self.by_key.insert(public_key, client);
        }
        self.by_index.insert(index, client);
        self.sessions.insert(
            client,
            Session {
                peer: Arc::clone(&peer),
                public_key,
                preshared_key,
                held: VecDeque::new(),
                unanswered_since: None,
                handshakes: [None; 2],
                last_use: now,
            },
        );
        self.timers.set(client, Some(now + TIMER_STEP));
        Some(peer)
    }

    /// Drops a client's session.
    pub fn remove(&mut self, client: ClientId) {
        let Some(session) = self.sessions.remove(&client) else {
            return;
        };
        self.table.remove(&session.peer);
        self.by_key.remove(&session.public_key);
        self.by_index.remove(&session.peer.index);
        self.indices.give(session.peer.index);
        self.timers.clear(&client);
    }

    /// The client as the workers see it.
    pub fn peer(&self, client: ClientId) -> Option<&Arc<Peer>> {
        self.sessions.get(&client).map(|s| &s.peer)
    }

    /// When the client's last handshake was.
    pub fn last_handshake(&self, client: ClientId) -> Option<Instant> {
        self.sessions.get(&client)?.handshakes[0]
    }

    /// Switches the path and sends what waited for one.
    pub fn set_path(&mut self, client: ClientId, path: Option<Path>) {
        let Some(session) = self.sessions.get_mut(&client) else {
            return;
        };
        session.peer.set_path(path);
        if let Some(path) = path {
            let route = Route::Path(path);
            self.outgoing.extend(
                session
                    .held
                    .drain(..)
                    .map(|payload| Outgoing { route, payload }),
            );
        }
    }

    /// What handshakes went by.
    pub fn admission_counters(&self) -> AdmissionCounters {
        self.admission.counters
    }

    /// Takes a message that is not established data: handshakes and cookies, or data that no
    /// worker could place. `owner` is the client whose connectivity checks vouch for the path that
    /// it came over, if there is one.
    ///
    /// # Errors
    /// See [`Refused`]; nothing has changed then.
    pub fn handle_message(
        &mut self,
        now: Instant,
        local: SocketAddr,
        remote: SocketAddr,
        owner: Option<ClientId>,
        datagram: &[u8],
    ) -> Result<(), Refused> {
        let packet = match self.admission.admit(now, remote.ip(), owner, datagram) {
            Ok(packet) => packet,
            Err(Rejected::Invalid) => return Err(Refused::Invalid),
            Err(Rejected::Mac) => return Err(Refused::Mac),
            Err(Rejected::Limited(cookie)) => {
                self.outgoing.extend(cookie.map(|payload| Outgoing {
                    route: Route::Reply { local, remote },
                    payload,
                }));
                return Err(Refused::UnderLoad);
            }
        };
        let (client, initiation) = match &packet {
            Packet::HandshakeInit(init) => {
                self.admission.counters.computed += 1;
                let half = parse_handshake_anon(&self.private, &self.public, init)
                    .map_err(|_| Refused::Invalid)?;
                let client = self
                    .by_key
                    .get(&half.peer_static_public)
                    .ok_or(Refused::UnknownPeer)?;
                (*client, true)
            }
            Packet::HandshakeResponse(p) => {
                let client = self.client_at(p.receiver_idx)?;
                self.admission.counters.computed += 1;
                (client, false)
            }
            Packet::PacketCookieReply(p) => (self.client_at(p.receiver_idx)?, false),
            Packet::PacketData(_) => return Err(Refused::Invalid),
        };
        // The keys that come of it are as old as the last look.
        self.run_timers(now, client);
        let session = self.sessions.get_mut(&client).ok_or(Refused::UnknownPeer)?;
        let mut buffer = [0; SCRATCH];
        let mut replies = Vec::new();
        {
            let mut tunn = session.peer.tunn();
            let mut result = tunn.decapsulate(Some(remote.ip()), datagram, &mut buffer);
            loop {
                match result {
                    TunnResult::WriteToNetwork(reply) => replies.push(reply.to_vec()),
                    TunnResult::Err(error) => {
                        tracing::debug!(%client, ?error, "WireGuard message refused");
                        return Err(Refused::Invalid);
                    }
                    _ => break,
                }
                if initiation {
                    break;
                }
                result = tunn.decapsulate(None, &[], &mut buffer);
            }
        }
        session.last_use = now;
        self.timers.set_earlier(client, now + TIMER_STEP);
        if !replies.is_empty() {
            session.unanswered_since = None;
            session.handshakes = [Some(now), session.handshakes[0]];
            self.events.push_back(Event::Handshake(client));
        }
        for reply in replies {
            Self::send(session, &mut self.outgoing, reply);
        }
        Ok(())
    }

    fn client_at(&self, receiver: u32) -> Result<ClientId, Refused> {
        self.by_index
            .get(&(receiver >> 8))
            .copied()
            .ok_or(Refused::Invalid)
    }

    fn send(session: &mut Session, outgoing: &mut VecDeque<Outgoing>, payload: Vec<u8>) {
        match session.peer.path() {
            Some(path) => outgoing.push_back(Outgoing {
                route: Route::Path(*path),
                payload,
            }),
            // An initiation can arrive before the pair is nominated; its answer must not be lost.
            None => {
                if session.held.len() == HELD {
                    session.held.pop_front();
                }
                session.held.push_back(payload);
            }
        }
    }

    /// Encrypts an inner packet for a client, if there is a session and a path.
    pub fn encapsulate(&mut self, client: ClientId, packet: &[u8]) -> Option<Outgoing> {
        let session = self.sessions.get_mut(&client)?;
        let path = session.peer.path()?;
        let mut buffer = vec![0; packet.len() + 32];
        let mut tunn = session.peer.tunn();
        // Without a session boringtun would queue the packet and start a handshake.
        tunn.time_since_last_handshake()?;
        match tunn.encapsulate(packet, &mut buffer) {
            TunnResult::WriteToNetwork(message) => Some(Outgoing {
                route: Route::Path(*path),
                payload: message.to_vec(),
            }),
            _ => None,
        }
    }

    /// Tells that packets went to or came from a client.
    pub fn note_activity(&mut self, now: Instant, client: ClientId) {
        if let Some(session) = self.sessions.get_mut(&client) {
            session.last_use = now;
            self.timers.set_earlier(client, now + TIMER_STEP);
        }
    }

    /// Runs the sessions' timers that are due.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(client) = self.timers.pop_due(now) {
            self.run_timers(now, client);
        }
    }

    fn run_timers(&mut self, now: Instant, client: ClientId) {
        let Some(session) = self.sessions.get_mut(&client) else {
            return;
        };
        #[cfg(test)]
        {
            self.looked_at += 1;
        }
        let mut buffer = [0; SCRATCH];
        let mut message = None;
        match session.peer.tunn().update_timers(&mut buffer) {
            TunnResult::WriteToNetwork(m) => message = Some(m.to_vec()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.events.push_back(Event::Failed(client));
            }
            _ => {}
        }
        // Message type 1 is an initiation; the other kind is a keep-alive.
        if message.as_ref().is_some_and(|m| m.first() == Some(&1)) {
            let since = *session.unanswered_since.get_or_insert(now);
            if now.duration_since(since) >= GIVE_UP {
                self.events.push_back(Event::Failed(client));
                message = None;
            }
        }
        if let Some(message) = message {
            Self::send(session, &mut self.outgoing, message);
        }
        self.timers.set(client, Some(session.next_look(now)));
    }

    /// When [`Self::handle_timeout`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// The next datagram to send.
    pub fn poll_outgoing(&mut self) -> Option<Outgoing> {
        self.outgoing.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
}

/// Whether a datagram looks like established WireGuard data, and for which receiver index.
pub fn data_receiver(datagram: &[u8]) -> Option<u32> {
    match datagram {
        [4, 0, 0, 0, a, b, c, d, rest @ ..] if rest.len() >= 24 => {
            Some(u32::from_le_bytes([*a, *b, *c, *d]))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
