//! One gateway: an ICE agent in the controlling role and a WireGuard tunnel that initiates
//! (data-path spec §2, §4).

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use is::{Candidate, CandidateKind, IceAgent, IceAgentEvent, IceConnectionState, IceCreds};
use uuid::Uuid;

use super::candidate;
use super::messages::{AuthorizationCreated, IceCredentials, Key};
use super::status::{EndStatus, GatewayStatus, PathKind};

/// A connection without any remote candidate fails after this long (§2.8).
pub const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(10);
/// Grace after ICE reports "disconnected" (§2.8).
pub const DISCONNECT_GRACE: Duration = Duration::from_secs(2);
/// An unanswered handshake fails the connection after this long (§2.8).
pub const HANDSHAKE_GIVE_UP: Duration = Duration::from_secs(20);
/// Silence after which the slow probing profile is used (§2.8).
pub const IDLE_AFTER: Duration = Duration::from_secs(20);
/// At most one nomination-triggered handshake per this long (§2.5).
pub const PROACTIVE_INTERVAL: Duration = Duration::from_secs(20);
/// The initiator renews an expiring session even without traffic (§4.3).
const SESSION_LIFE: Duration = Duration::from_secs(180);
/// Packets kept while there is no session (§9 "client buffer while connecting").
pub const MAX_BUFFERED: usize = 128;

/// "client active" (§2.4): initial, max, retransmits.
const ACTIVE: (Duration, Duration, usize) =
    (Duration::from_millis(250), Duration::from_millis(1500), 12);
/// "client idle" (§2.4).
const IDLE: (Duration, Duration, usize) = (Duration::from_secs(25), Duration::from_secs(25), 4);

/// The pair data is sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nominated {
    /// Base of the local candidate: a socket address of ours, or our relayed address.
    pub local: SocketAddr,
    /// The gateway's address.
    pub remote: SocketAddr,
}

/// Why a connection was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The gateway never signalled a candidate.
    NoCandidates,
    /// No pair works any more.
    IceDisconnected,
    /// WireGuard got no answer.
    HandshakeTimeout,
    /// WireGuard gave the tunnel up.
    TunnelExpired,
}

impl Failure {
    /// For logs and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCandidates => "no candidates within 10 s",
            Self::IceDisconnected => "ICE disconnected",
            Self::HandshakeTimeout => "no WireGuard answer within 20 s",
            Self::TunnelExpired => "WireGuard tunnel expired",
        }
    }
}

/// A received WireGuard datagram taken apart.
#[derive(Debug)]
pub enum Decapsulated<'a> {
    /// To be sent to the gateway.
    Reply(&'a [u8]),
    /// An inner packet.
    Packet(&'a [u8]),
    /// Nothing further.
    Nothing,
    /// Not authentic, replayed or unexpected.
    Rejected,
}

/// See module docs.
pub struct Connection {
    /// Identity of the gateway.
    pub gateway_id: Uuid,
    /// Its tunnel address.
    pub ipv4: Ipv4Addr,
    /// Its tunnel address.
    pub ipv6: Ipv6Addr,
    /// Resources authorised through it.
    pub resources: BTreeSet<Uuid>,
    /// Upper 24 bits of our session indices.
    pub index: u32,
    /// ICE.
    pub agent: IceAgent,
    /// Packets waiting for a session.
    pub buffered: VecDeque<Vec<u8>>,
    /// Relay whose allocations this connection uses.
    pub relay: Option<Uuid>,
    /// Local candidates given to the agent that the gateway has been told of.
    pub signalled: Vec<Candidate>,
    /// Local candidates given to the agent.
    pub local: Vec<Candidate>,
    /// Withdrawn candidates the gateway has not been told of.
    pub withdrawn: Vec<Candidate>,
    /// Candidates of the gateway.
    pub remote: Vec<(SocketAddr, CandidateKind)>,
    /// Current path.
    pub nominated: Option<Nominated>,
    /// Key of the gateway.
    pub gateway_key: Key,
    psk: Key,
    local_creds: IceCredentials,
    remote_creds: IceCredentials,
    tunn: Tunn,
    created: Instant,
    ice_state: IceConnectionState,
    disconnected_since: Option<Instant>,
    last_inner: Instant,
    idle: bool,
    handshake_since: Option<Instant>,
    last_handshake: Option<Instant>,
    last_proactive: Option<Instant>,
    initiator: bool,
    /// We answered an initiation and wait for the first data message.
    unconfirmed: bool,
    fresh_session: bool,
    handshakes: u64,
    nominations: u64,
    rx_bytes: u64,
    tx_bytes: u64,
    rx_packets: u64,
    tx_packets: u64,
}

impl Connection {
    /// A fresh connection as the authorization describes it.
    pub fn new(
        now: Instant,
        private_key: &StaticSecret,
        grant: &AuthorizationCreated,
        index: u32,
    ) -> Self {
        let mut agent = IceAgent::new(IceCreds {
            ufrag: grant.client_ice_credentials.username.clone(),
            pass: grant.client_ice_credentials.password.expose().to_owned(),
        });
        agent.set_controlling(true);
        agent.set_remote_credentials(IceCreds {
            ufrag: grant.gateway_ice_credentials.username.clone(),
            pass: grant.gateway_ice_credentials.password.expose().to_owned(),
        });
        agent.set_timing_advance(Duration::ZERO);
        let mut connection = Self {
            gateway_id: grant.gateway_id,
            ipv4: grant.gateway_ipv4,
            ipv6: grant.gateway_ipv6,
            resources: BTreeSet::from([grant.resource_id]),
            index,
            agent,
            buffered: VecDeque::new(),
            relay: None,
            signalled: Vec::new(),
            local: Vec::new(),
            withdrawn: Vec::new(),
            remote: Vec::new(),
            nominated: None,
            gateway_key: grant.gateway_public_key,
            psk: grant.preshared_key,
            local_creds: grant.client_ice_credentials.clone(),
            remote_creds: grant.gateway_ice_credentials.clone(),
            tunn: Tunn::new(
                private_key.clone(),
                PublicKey::from(grant.gateway_public_key.0),
                Some(grant.preshared_key.0),
                None,
                index,
                None,
            ),
            created: now,
            ice_state: IceConnectionState::New,
            disconnected_since: None,
            last_inner: now,
            idle: false,
            handshake_since: None,
            last_handshake: None,
            last_proactive: None,
            initiator: true,
            unconfirmed: false,
            fresh_session: false,
            handshakes: 0,
            nominations: 0,
            rx_bytes: 0,
            tx_bytes: 0,
            rx_packets: 0,
            tx_packets: 0,
        };
        connection.set_profile(false);
        // The agent has no notion of time before its first call.
        connection.agent.handle_timeout(now);
        connection
    }

    /// Whether a repeated authorization may keep this connection (§2.7).
    pub fn matches(&self, grant: &AuthorizationCreated) -> bool {
        self.gateway_key == grant.gateway_public_key
            && self.psk == grant.preshared_key
            && self.local_creds == grant.client_ice_credentials
            && self.remote_creds == grant.gateway_ice_credentials
    }

    fn set_profile(&mut self, idle: bool) {
        let (initial, max, retransmits) = if idle { IDLE } else { ACTIVE };
        self.agent.set_initial_stun_rto(initial);
        self.agent.set_max_stun_rto(max);
        self.agent.set_max_stun_retransmits(retransmits);
        self.idle = idle;
    }

    /// Inner traffic, an upsert or a candidate change: probe quickly again.
    pub fn wake(&mut self, now: Instant) {
        self.last_inner = now;
        if self.idle {
            tracing::debug!(gateway = %self.gateway_id, "active again");
            self.set_profile(false);
        }
    }

    /// Whether a WireGuard session can carry data.
    pub fn has_session(&self, now: Instant) -> bool {
        self.last_handshake
            .is_some_and(|at| now.saturating_duration_since(at) < SESSION_LIFE)
    }

    /// Keeps a packet until there is a session; returns whether an older one had to go.
    pub fn buffer(&mut self, packet: &[u8]) -> bool {
        let full = self.buffered.len() >= MAX_BUFFERED;
        if full {
            self.buffered.pop_front();
        }
        self.buffered.push_back(packet.to_vec());
        full
    }

    /// Adds a candidate of the gateway and the guesses that follow from it; returns those whose
    /// addresses are new.
    pub fn add_remote(&mut self, candidate: Candidate) -> Vec<(SocketAddr, CandidateKind)> {
        if candidate
            .ufrag()
            .is_some_and(|ufrag| ufrag != self.remote_creds.username)
        {
            tracing::debug!(gateway = %self.gateway_id, "candidate of another session");
            return Vec::new();
        }
        let mut added = Vec::new();
        let entry = (candidate.addr(), candidate.kind());
        if !self.remote.contains(&entry) {
            self.remote.push(entry);
            added.push(entry);
        }
        self.agent.add_remote_candidate(candidate);
        for guess in candidate::optimistic(&self.remote) {
            let entry = (guess.addr(), guess.kind());
            self.remote.push(entry);
            added.push(entry);
            self.agent.add_remote_candidate(guess);
        }
        added
    }

    /// Removes a candidate of the gateway.
    pub fn remove_remote(&mut self, candidate: &Candidate) {
        self.agent.invalidate_candidate(candidate);
        self.remote
            .retain(|entry| *entry != (candidate.addr(), candidate.kind()));
    }

    /// Applies an event of the agent; true if the path changed.
    pub fn handle_agent_event(&mut self, now: Instant, event: IceAgentEvent) -> bool {
        match event {
            IceAgentEvent::IceConnectionStateChange(state) => {
                tracing::info!(gateway = %self.gateway_id, ?state, "ICE");
                self.ice_state = state;
                if state.is_disconnected() {
                    self.disconnected_since.get_or_insert(now);
                } else {
                    self.disconnected_since = None;
                }
                false
            }
            IceAgentEvent::NominatedSend {
                source,
                destination,
                ..
            } => {
                let pair = Nominated {
                    local: source,
                    remote: destination,
                };
                if self.nominated == Some(pair) {
                    return false;
                }
                self.nominations += 1;
                self.nominated = Some(pair);
                true
            }
            IceAgentEvent::IceRestart(_) | IceAgentEvent::DiscoveredRecv { .. } => false,
        }
    }

    /// The initiation due after a nomination, at most one per [`PROACTIVE_INTERVAL`].
    pub fn initiate_after_nomination<'a>(
        &mut self,
        now: Instant,
        scratch: &'a mut [u8],
    ) -> Option<&'a [u8]> {
        if self
            .last_proactive
            .is_some_and(|at| now.saturating_duration_since(at) < PROACTIVE_INTERVAL)
        {
            return None;
        }
        self.last_proactive = Some(now);
        self.initiate(now, scratch)
    }

    fn initiate<'a>(&mut self, now: Instant, scratch: &'a mut [u8]) -> Option<&'a [u8]> {
        match self.tunn.format_handshake_initiation(scratch, true) {
            TunnResult::WriteToNetwork(datagram) => {
                self.handshake_since.get_or_insert(now);
                Some(datagram)
            }
            _ => None,
        }
    }

    /// Encrypts an inner packet. Only call with a session.
    pub fn encapsulate<'a>(
        &mut self,
        now: Instant,
        packet: &[u8],
        scratch: &'a mut [u8],
    ) -> Option<&'a [u8]> {
        self.tx_packets += 1;
        self.tx_bytes += packet.len() as u64;
        match self.tunn.encapsulate(packet, scratch) {
            TunnResult::WriteToNetwork(datagram) => {
                if datagram.first() == Some(&1) {
                    self.handshake_since.get_or_insert(now);
                }
                Some(datagram)
            }
            _ => None,
        }
    }

    /// Processes a WireGuard datagram.
    pub fn decapsulate<'a>(
        &mut self,
        now: Instant,
        from: IpAddr,
        datagram: &[u8],
        scratch: &'a mut [u8],
    ) -> Decapsulated<'a> {
        let kind = datagram.first().copied();
        match self.tunn.decapsulate(Some(from), datagram, scratch) {
            // Type 3 is a cookie reply of our own rate limiter: no session came of it.
            TunnResult::WriteToNetwork(reply) if reply.first() == Some(&3) => {
                Decapsulated::Reply(reply)
            }
            TunnResult::WriteToNetwork(reply) => {
                match kind {
                    Some(2) => self.established(now, true),
                    Some(1) => {
                        // Answering abandons an initiation of ours. The session counts once the
                        // gateway has confirmed it with a first data message.
                        self.handshake_since = None;
                        self.unconfirmed = true;
                    }
                    _ => {}
                }
                Decapsulated::Reply(reply)
            }
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                if self.unconfirmed {
                    self.established(now, false);
                }
                self.rx_packets += 1;
                self.rx_bytes += packet.len() as u64;
                Decapsulated::Packet(packet)
            }
            TunnResult::Done => {
                if kind == Some(4) && self.unconfirmed {
                    self.established(now, false);
                }
                Decapsulated::Nothing
            }
            TunnResult::Err(error) => {
                tracing::debug!(gateway = %self.gateway_id, ?error, "WireGuard");
                Decapsulated::Rejected
            }
        }
    }

    /// Whether a session was established since the last call: what was held may go.
    pub fn take_fresh_session(&mut self) -> bool {
        std::mem::take(&mut self.fresh_session)
    }

    /// The next datagram of the tunnel's own queue, after a handshake.
    pub fn next_queued<'a>(&mut self, scratch: &'a mut [u8]) -> Option<&'a [u8]> {
        match self.tunn.decapsulate(None, &[], scratch) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram),
            _ => None,
        }
    }

    fn established(&mut self, now: Instant, initiator: bool) {
        self.initiator = initiator;
        self.last_handshake = Some(now);
        self.handshakes += 1;
        self.handshake_since = None;
        self.unconfirmed = false;
        self.fresh_session = true;
        tracing::info!(gateway = %self.gateway_id, initiator, "WireGuard session");
    }

    /// Periodic work, at least every 250 ms: WireGuard timers. Returns a datagram to send.
    ///
    /// # Errors
    /// When the connection is over.
    pub fn tick<'a>(
        &mut self,
        now: Instant,
        scratch: &'a mut [u8],
    ) -> Result<Option<&'a [u8]>, Failure> {
        if self.remote.is_empty()
            && self.nominated.is_none()
            && now.saturating_duration_since(self.created) >= CANDIDATE_TIMEOUT
        {
            return Err(Failure::NoCandidates);
        }
        if self
            .disconnected_since
            .is_some_and(|at| now.saturating_duration_since(at) >= DISCONNECT_GRACE)
        {
            return Err(Failure::IceDisconnected);
        }
        if self
            .handshake_since
            .is_some_and(|at| now.saturating_duration_since(at) >= HANDSHAKE_GIVE_UP)
        {
            return Err(Failure::HandshakeTimeout);
        }
        if !self.idle
            && self.ice_state.is_connected()
            && now.saturating_duration_since(self.last_inner) >= IDLE_AFTER
        {
            tracing::debug!(gateway = %self.gateway_id, "idle");
            self.set_profile(true);
        }
        if self.nominated.is_none() {
            // Nothing to send on; the timers start with the first handshake.
            return Ok(None);
        }
        let renew = self.initiator
            && self.handshake_since.is_none()
            && self.last_handshake.is_some()
            && !self.has_session(now);
        if renew {
            return Ok(self.initiate(now, scratch));
        }
        match self.tunn.update_timers(scratch) {
            TunnResult::WriteToNetwork(datagram) => {
                if datagram.first() == Some(&1) {
                    self.handshake_since.get_or_insert(now);
                }
                Ok(Some(datagram))
            }
            TunnResult::Err(_) => Err(Failure::TunnelExpired),
            _ => Ok(None),
        }
    }

    /// What `GET /status` says.
    pub fn status(&self, now: Instant, is_relayed: impl Fn(SocketAddr) -> bool) -> GatewayStatus {
        let age = |at: Instant| now.saturating_duration_since(at).as_secs_f64();
        let local = self.nominated.map(|pair| EndStatus {
            kind: if is_relayed(pair.local) {
                "relay"
            } else {
                "host"
            }
            .to_owned(),
            addr: pair.local,
        });
        let remote = self.nominated.map(|pair| EndStatus {
            kind: self
                .remote_kind(pair.remote)
                .unwrap_or(CandidateKind::PeerReflexive)
                .to_string(),
            addr: pair.remote,
        });
        let path = local.as_ref().zip(remote.as_ref()).map(|(l, r)| {
            match (l.kind == "relay", r.kind == "relay") {
                (false, false) => PathKind::Direct,
                (true, false) => PathKind::RelayLocal,
                (false, true) => PathKind::RelayRemote,
                (true, true) => PathKind::RelayBoth,
            }
        });
        GatewayStatus {
            id: self.gateway_id,
            tunnel_ips: [self.ipv4.into(), self.ipv6.into()],
            resources: self.resources.iter().copied().collect(),
            ice_state: format!("{:?}", self.ice_state).to_lowercase(),
            local,
            remote,
            path,
            idle: self.idle,
            session: self.has_session(now),
            last_handshake_age_s: self.last_handshake.map(age),
            handshakes: self.handshakes,
            nominations: self.nominations,
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
            rx_packets: self.rx_packets,
            tx_packets: self.tx_packets,
            local_candidates: self
                .signalled
                .iter()
                .map(Candidate::to_sdp_string)
                .collect(),
            remote_candidates: self
                .remote
                .iter()
                .map(|(addr, kind)| EndStatus {
                    kind: kind.to_string(),
                    addr: *addr,
                })
                .collect(),
            age_s: age(self.created),
        }
    }

    fn remote_kind(&self, addr: SocketAddr) -> Option<CandidateKind> {
        self.remote
            .iter()
            .find(|(known, _)| *known == addr)
            .map(|(_, kind)| *kind)
    }
}
