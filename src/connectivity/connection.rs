//! One client's ICE agent with what surrounds it: candidates, relay, nominated path, time limits.

mod details;
mod known;
mod pairs;
mod paths;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use is::stun::{StunMessage, StunPacket};
use is::{
    Candidate, CandidateKind, IceAgent, IceAgentEvent, IceConnectionState, IceCreds, Protocol,
};

use self::details::History;
use self::known::Candidates;
use self::pairs::{Ends, Pairs};
use self::paths::Search;
use super::relay::is_valid_candidate;
use super::{ConnectionView, FailureCause};
use crate::admin::model::CandidateKind as KnownKind;
use crate::datapath::peers::Path;
use crate::ids::RelayId;
use crate::portal::messages::IceCredentials;

/// A client that signals no candidate within this time is given up (data-path spec §2.8).
const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection without a working pair may last (data-path spec §2.8).
const DISCONNECT_GRACE: Duration = Duration::from_secs(2);

/// Without inner packets for this long, checks slow down (data-path spec §2.8).
const IDLE_AFTER: Duration = Duration::from_secs(20);

/// A client that checks a pair again within this is not idle; one that is waits 25 s (data-path spec
/// §2.4).
const IDLE_CHECKS: Duration = Duration::from_secs(5);

/// How long a candidate may be on its way to the client.
const TELLING: Duration = Duration::from_secs(1);

/// Relays per connection.
const RELAYS: usize = 2;

/// Candidate pairs per connection (data-path spec §2.2).
const MAX_PAIRS: usize = 100;

/// Remote candidates per connection, with those that came and went: the agent keeps them all.
const MAX_REMOTE: usize = 1000;
/// From then on, those that are named once more are passed over: clients name all of theirs with each
/// authorization, and must not use up the room for new ones.
const MAX_REPEATS: usize = 200;

/// Optimistic candidates per call (data-path spec §2.3).
const MAX_OPTIMISTIC: usize = 2;

/// How often pairs are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    Active,
    Relayed,
    Suspect,
    Idle,
}

impl Pace {
    fn profile(self) -> &'static Profile {
        match self {
            Self::Active => &ACTIVE,
            Self::Relayed => &RELAYED,
            Self::Suspect => &SUSPECT,
            Self::Idle => &IDLE,
        }
    }
}

/// When checks are repeated and a pair is given up.
struct Profile {
    initial: Duration,
    max: Duration,
    retransmits: usize,
}

/// While traffic flows: a pair is checked each second, and given up after 16 s without an answer, as
/// the client does. (The stock gateway waits ten minutes and keeps sending into the dead pair.)
const ACTIVE: Profile = Profile {
    initial: Duration::from_millis(250),
    max: Duration::from_secs(1),
    retransmits: 18,
};

/// While traffic flows through a relay. There is another relay to turn to, and what is found out
/// early costs a TCP connection half as long a stall.
const RELAYED: Profile = Profile {
    initial: Duration::from_millis(250),
    max: Duration::from_millis(500),
    retransmits: 34,
};

/// While the path in use owes an answer: many checks at once, so that a lossy path is told from a
/// dead one. They are as many as last longer than the question stays open.
const SUSPECT: Profile = Profile {
    initial: Duration::from_millis(150),
    max: Duration::from_millis(150),
    retransmits: 100,
};

/// While idle: as seldom as keeps NAT bindings alive, and long enough that the client decides.
const IDLE: Profile = Profile {
    initial: Duration::from_secs(25),
    max: Duration::from_secs(25),
    retransmits: 8,
};

pub(super) struct Connection {
    agent: IceAgent,
    /// Its candidates, and whether they may have changed since.
    known: Candidates,
    is_known_stale: bool,
    local: IceCredentials,
    remote: IceCredentials,
    /// The relays that it may be reached through, the preferred one first.
    relays: Vec<RelayId>,
    /// Relayed addresses that are local candidates here: whose, the address, its base. Those of a
    /// former relay stay until they are invalidated, so that traffic moves before they go.
    relayed: Vec<(RelayId, SocketAddr, SocketAddr)>,
    /// Relayed addresses that the client may not know yet, and since when it has been on its way.
    untold: Vec<(SocketAddr, Option<Instant>)>,
    /// Whether what is to be signalled gets to the client.
    can_signal: bool,
    added: Vec<Candidate>,
    invalidated: Vec<String>,
    /// Our public addresses, and the local address that each belongs to.
    reflexive: Vec<(SocketAddr, SocketAddr)>,
    /// The pair to send on, as the agent says.
    chosen: Option<Ends>,
    /// The best pair that the client permits.
    nominated: Option<Ends>,
    /// The same when the path was last looked at.
    was_nominated: Option<Ends>,
    /// The pair that is sent on.
    in_use: Option<Ends>,
    pairs: Pairs,
    /// When the path was looked at last.
    looked_at: Option<Instant>,
    /// The moment of doubt that was acted upon.
    told_doubt: Option<Instant>,
    search: Search,
    suspect: bool,
    pace: Pace,
    /// Since when the path is relayed, and pairs are checked more often than once a second.
    quick_since: Option<Instant>,
    doubted: Option<RelayId>,
    path: Option<Path>,
    path_since: Option<Instant>,
    path_changes: u64,
    history: History,
    created: Instant,
    has_remote: bool,
    /// How many remote candidates the agent was given.
    remotes: usize,
    disconnected: Option<Instant>,
    last_activity: Instant,
    idle: bool,
}

impl Connection {
    pub(super) fn new(now: Instant, local: &IceCredentials, remote: &IceCredentials) -> Self {
        let mut agent = IceAgent::new(creds(local));
        agent.set_controlling(false);
        agent.set_remote_credentials(creds(remote));
        agent.set_max_candidate_pairs(MAX_PAIRS);
        agent.set_timing_advance(Duration::ZERO);
        let mut connection = Self {
            agent,
            known: Candidates::default(),
            is_known_stale: true,
            local: local.clone(),
            remote: remote.clone(),
            relays: Vec::new(),
            relayed: Vec::new(),
            untold: Vec::new(),
            can_signal: true,
            added: Vec::new(),
            invalidated: Vec::new(),
            reflexive: Vec::new(),
            chosen: None,
            nominated: None,
            was_nominated: None,
            in_use: None,
            pairs: Pairs::new(now),
            looked_at: None,
            told_doubt: None,
            search: Search::default(),
            suspect: false,
            pace: Pace::Active,
            quick_since: None,
            doubted: None,
            path: None,
            path_since: None,
            path_changes: 0,
            history: History::default(),
            created: now,
            has_remote: false,
            remotes: 0,
            disconnected: None,
            last_activity: now,
            idle: false,
        };
        connection.apply(Pace::Active);
        connection
    }

    /// Sets the pace of checks to what the state asks for.
    fn set_pace(&mut self) {
        let pace = if self.idle {
            Pace::Idle
        } else if self.suspect {
            Pace::Suspect
        } else if self.quick_since.is_some() {
            Pace::Relayed
        } else {
            Pace::Active
        };
        if pace != self.pace {
            self.apply(pace);
        }
    }

    fn apply(&mut self, pace: Pace) {
        self.pace = pace;
        let profile = pace.profile();
        self.agent.set_initial_stun_rto(profile.initial);
        self.agent.set_max_stun_rto(profile.max);
        self.agent.set_max_stun_retransmits(profile.retransmits);
    }

    pub(super) fn has_credentials(&self, local: &IceCredentials, remote: &IceCredentials) -> bool {
        self.local == *local && self.remote == *remote
    }

    /// Whether no way leads to the client, and no new address of its can be taken in any more.
    pub(super) fn is_worn_out(&self) -> bool {
        self.remotes >= MAX_REMOTE && self.path.is_none()
    }

    /// Whether a message was made with this connection's credentials.
    pub(super) fn accepts(&self, message: &StunMessage<'_>) -> bool {
        self.agent.accepts_message(message)
    }

    pub(super) fn local_ufrag(&self) -> &str {
        &self.local.username
    }

    pub(super) fn relays(&self) -> &[RelayId] {
        &self.relays
    }

    /// The second one is kept warm: when the first dies, its replacement needs neither an allocation
    /// nor a word through the portal (data-path spec §12 R12).
    pub(super) fn wants_relay(&self) -> bool {
        self.relays.len() < RELAYS
    }

    /// The first tick, after which the agent asks for wake-ups.
    pub(super) fn start(&mut self, now: Instant) {
        self.agent.handle_timeout(now);
    }

    /// Something happened on this connection; checks go back to their fast pace.
    pub(super) fn touch(&mut self, now: Instant) {
        self.wake(now);
        self.last_activity = now;
    }

    fn wake(&mut self, now: Instant) {
        if self.idle {
            self.last_activity = now;
            self.idle = false;
            let is_quick = self.in_use.is_some() && self.is_path_relayed();
            self.quick_since = is_quick.then_some(now);
            self.set_pace();
            self.pairs.watch_from(now);
        }
    }

    /// Whether the agent took the candidate.
    fn add_local(&mut self, candidate: Result<Candidate, is::IceError>) -> bool {
        self.is_known_stale = true;
        match candidate {
            Ok(candidate) => {
                let added = self.agent.add_local_candidate(candidate).cloned();
                let taken = added.is_some();
                self.added.extend(added);
                taken
            }
            Err(error) => {
                tracing::debug!(%error, "local candidate not usable");
                false
            }
        }
    }

    pub(super) fn add_host(&mut self, address: SocketAddr) {
        self.add_local(Candidate::host(address, "udp"));
    }

    pub(super) fn add_server_reflexive(&mut self, address: SocketAddr, base: SocketAddr) {
        if self.reflexive.contains(&(address, base)) {
            return;
        }
        self.reflexive.push((address, base));
        let taken = self.add_local(Candidate::server_reflexive(address, base, "udp"));
        if !taken {
            let known = self.offered().into_iter();
            self.added.extend(known.filter(|c| c.addr() == address));
        }
    }

    /// Our candidates as clients know them. An address that the agent learned from a client's
    /// answer (peer-reflexive) before a relay showed it to us is news for all other clients.
    fn offered(&self) -> Vec<Candidate> {
        self.agent
            .local_candidates()
            .filter_map(|candidate| match candidate.kind() {
                CandidateKind::PeerReflexive => {
                    let known =
                        |(address, _): &&(SocketAddr, SocketAddr)| *address == candidate.addr();
                    let (address, base) = self.reflexive.iter().find(known)?;
                    let mut reflexive = Candidate::server_reflexive(*address, *base, "udp").ok()?;
                    reflexive.set_ufrag(&self.local.username);
                    Some(reflexive)
                }
                _ => Some(candidate),
            })
            .collect()
    }

    /// Binds the connection to a relay and offers its relayed addresses.
    pub(super) fn set_relay(
        &mut self,
        now: Instant,
        relay: RelayId,
        relayed: &[(SocketAddr, SocketAddr)],
    ) {
        if !self.relays.contains(&relay) {
            self.relays.push(relay);
        }
        for (address, base) in relayed {
            self.add_relayed(now, relay, *address, *base);
        }
    }

    /// A relay got a relayed address; it counts here only if it is this connection's relay.
    pub(super) fn add_relayed(
        &mut self,
        now: Instant,
        relay: RelayId,
        address: SocketAddr,
        base: SocketAddr,
    ) {
        if !self.relays.contains(&relay) || self.relayed.contains(&(relay, address, base)) {
            return;
        }
        self.relayed.push((relay, address, base));
        self.untold.push((address, self.can_signal.then_some(now)));
        self.add_local(Candidate::relayed(address, base, "udp"));
    }

    /// Whether candidates get to the client from now on.
    pub(super) fn set_can_signal(&mut self, now: Instant, can_signal: bool) {
        self.can_signal = can_signal;
        for (_, since) in &mut self.untold {
            *since = can_signal.then(|| since.unwrap_or(now));
        }
    }

    /// Whether a check may leave from `source`. A client that meets a relayed address before it is
    /// told of it takes it for better than a direct path through NAT, and keeps to that (RFC 8838
    /// §10 forbids it, too). It will check that address itself as soon as it is told, which opens the
    /// way for our checks. Only where there is no path, and nobody to tell it, that is welcome.
    pub(super) fn may_check_from(&mut self, now: Instant, source: SocketAddr) -> bool {
        if self.path.is_none() && !self.can_signal {
            return true;
        }
        self.untold
            .retain(|(_, since)| since.is_none_or(|since| now < since + TELLING));
        self.untold.iter().all(|(address, _)| *address != source)
    }

    /// These relayed addresses lead nowhere any more.
    pub(super) fn invalidate_relayed(&mut self, relay: RelayId, addresses: &[SocketAddr]) {
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.relayed)
            .into_iter()
            .partition(|(owner, address, _)| *owner == relay && addresses.contains(address));
        self.relayed = kept;
        self.untold
            .retain(|(address, _)| !addresses.contains(address));
        for (_, address, base) in gone {
            self.invalidate_local_relayed(address, base);
        }
    }

    /// Another relay should be chosen; what this one still carries goes on until its addresses are
    /// invalidated.
    pub(super) fn drop_relay(&mut self, relay: RelayId) {
        self.relays.retain(|other| *other != relay);
    }

    fn invalidate_local_relayed(&mut self, address: SocketAddr, base: SocketAddr) {
        let Ok(mut candidate) = Candidate::relayed(address, base, "udp") else {
            return;
        };
        self.is_known_stale = true;
        if self.agent.invalidate_candidate(&candidate) {
            self.added
                .retain(|c| c.addr() != address || c.kind() != CandidateKind::Relayed);
            candidate.set_ufrag(&self.local.username);
            self.invalidated.push(self.line(&candidate));
        }
        if self.chosen.is_some_and(|(local, _)| local == address) {
            self.chosen = None;
        }
    }

    /// Signals every local candidate once more.
    pub(super) fn signal_all(&mut self) {
        self.added = self.offered();
    }

    /// Candidate lines to signal: new ones by falling priority, and withdrawn ones.
    pub(super) fn take_signals(&mut self) -> (Vec<String>, Vec<String>) {
        let mut added = std::mem::take(&mut self.added);
        added.sort_by_key(|c| std::cmp::Reverse(c.prio()));
        (
            added.iter().map(|c| self.line(c)).collect(),
            std::mem::take(&mut self.invalidated),
        )
    }

    pub(super) fn add_remote(&mut self, now: Instant, lines: &[String]) {
        self.touch(now);
        for line in lines {
            match Candidate::from_sdp_string(line) {
                Ok(candidate) => {
                    self.has_remote = true;
                    if is_valid_candidate(candidate.addr()) {
                        self.add_remote_candidate(candidate);
                    } else {
                        tracing::debug!(address = %candidate.addr(), "remote candidate skipped");
                    }
                }
                Err(error) => tracing::debug!(%error, "remote candidate skipped"),
            }
        }
        self.add_optimistic();
    }

    fn add_remote_candidate(&mut self, candidate: Candidate) {
        let ip = candidate.addr().ip();
        // One that has no pair, or none any more, the agent takes for a new one when it is repeated:
        // another try, unless it is in vain.
        let is_repeated = self
            .agent
            .remote_candidates()
            .any(|c| c.addr() == candidate.addr() && c.kind() == candidate.kind());
        let has_family = self
            .agent
            .local_candidates()
            .any(|c| c.addr().is_ipv4() == ip.is_ipv4());
        if is_repeated && (!has_family || self.remotes >= MAX_REPEATS) {
            return;
        }
        if self.remotes >= MAX_REMOTE {
            tracing::debug!(addr = %candidate.addr(), "too many remote candidates");
            return;
        }
        self.remotes += 1;
        self.is_known_stale = true;
        self.agent.add_remote_candidate(candidate);
    }

    /// Whether the agent may hear of a source of checks; it makes a candidate of each new one.
    fn may_hear_of(&mut self, ends: Ends) -> bool {
        let is_known = self.pairs.ends().any(|known| known == ends) || self.known.is_theirs(ends.1);
        if !is_known {
            self.remotes += 1;
            self.is_known_stale = true;
        }
        is_known || self.remotes <= MAX_REMOTE
    }

    /// A peer behind a NAT that keeps ports can often be reached at its public address and its
    /// private port, even when the address was learned from another mapping.
    fn add_optimistic(&mut self) {
        let v4 = |kind| {
            self.agent
                .remote_candidates()
                .filter(move |c| c.kind() == kind && c.addr().is_ipv4())
                .map(|c| c.addr())
                .collect::<Vec<_>>()
        };
        let reflexive = v4(CandidateKind::ServerReflexive);
        let guesses: Vec<SocketAddr> = v4(CandidateKind::Host)
            .iter()
            .flat_map(|host| {
                reflexive
                    .iter()
                    .map(|public| SocketAddr::new(public.ip(), host.port()))
            })
            .filter(|guess| !reflexive.contains(guess))
            .take(MAX_OPTIMISTIC)
            .collect();
        for guess in guesses {
            if let Ok(candidate) = Candidate::server_reflexive(guess, guess, "udp") {
                self.add_remote_candidate(candidate);
            }
        }
    }

    pub(super) fn invalidate_remote(&mut self, now: Instant, lines: &[String]) {
        self.touch(now);
        for line in lines {
            if let Ok(candidate) = Candidate::from_sdp_string(line) {
                // The agent would take its own candidate with the same address.
                let ours = |c: Candidate| c.addr() == candidate.addr();
                if !self.agent.local_candidates().any(ours) {
                    self.is_known_stale = true;
                    self.agent.invalidate_candidate(&candidate);
                }
            }
        }
    }

    /// Remote addresses that our relay must be able to forward to. Private host addresses are left
    /// out: a relay on the internet cannot reach them.
    pub(super) fn channel_peers(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.known
            .theirs
            .iter()
            .filter(|c| c.kind != KnownKind::Host || is_public(c.address.ip()))
            .map(|c| c.address)
    }

    /// Whether an address is one of them.
    pub(super) fn is_channel_peer(&self, peer: SocketAddr) -> bool {
        self.channel_peers().any(|address| address == peer)
    }

    /// Unless the message `is_direct`, a relay forwarded it, and `local` is an address of the relay's.
    pub(super) fn handle_stun(
        &mut self,
        now: Instant,
        (local, remote): Ends,
        message: StunMessage<'_>,
        is_direct: bool,
    ) {
        // A check that came to an address not known as host candidate shows that the address
        // works: without the candidate the agent would have to ignore it. One that a relay
        // forwarded to an address that this connection does not use, or no longer, shows nothing.
        let accepted = self.agent.accepts_message(&message);
        if accepted && message.is_binding_request() {
            if !self.may_hear_of((local, remote)) {
                return;
            }
            self.untold.retain(|(address, _)| *address != local);
            let is_new = !self.known.has_ours(local);
            if is_new && is_direct && is_valid_candidate(local) {
                self.add_host(local);
            }
            let ends = (local, remote);
            let pause = self.pairs.asked(now, ends, message.use_candidate());
            // It has something to send; the path it sends on may be dead, and we would be the last
            // to notice.
            if pause.is_some_and(|pause| pause < IDLE_CHECKS) {
                self.wake(now);
            }
        } else if accepted && message.is_successful_binding_response() {
            self.pairs.answered(now, (local, remote));
            // Who answers says how it sees us, which makes a candidate.
            let seen = message.mapped_address();
            self.is_known_stale |= seen.is_some_and(|seen| !self.known.has_ours(seen));
        }
        self.agent.handle_packet(
            now,
            StunPacket {
                proto: Protocol::Udp,
                source: remote,
                destination: local,
                message,
            },
        );
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if !self.idle
            && self.agent.state().is_connected()
            && now.duration_since(self.last_activity) >= IDLE_AFTER
        {
            self.idle = true;
            self.suspect = false;
            self.quick_since = None;
            self.set_pace();
        }
        self.search_again(now);
        self.agent.handle_timeout(now);
    }

    /// Lets the agent do all that is possible at `now`, and takes its events.
    pub(super) fn drive(&mut self, now: Instant) {
        // One pair is checked per call; each moves its next check into the future, so the bound
        // is only there to keep a defect in the agent from spinning.
        for _ in 0..2 * MAX_PAIRS {
            match self.agent.poll_timeout() {
                Some(at) if at <= now => self.agent.handle_timeout(now),
                _ => break,
            }
        }
        while let Some(event) = self.agent.poll_event() {
            match event {
                IceAgentEvent::IceConnectionStateChange(state) => {
                    self.disconnected = match state {
                        IceConnectionState::Disconnected => Some(now),
                        _ => None,
                    };
                    if state == IceConnectionState::Disconnected {
                        self.chosen = None;
                    }
                }
                IceAgentEvent::NominatedSend {
                    source,
                    destination,
                    ..
                } => self.chosen = Some((source, destination)),
                IceAgentEvent::IceRestart(_) | IceAgentEvent::DiscoveredRecv { .. } => {}
            }
        }
        if std::mem::take(&mut self.is_known_stale) {
            self.known = Candidates::of(&self.agent);
        }
    }

    /// The agent's next datagram: source (a host or relayed candidate), destination, bytes.
    pub(super) fn poll_transmit(&mut self) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
        loop {
            let transmit = self.agent.poll_transmit()?;
            // When the library makes all pairs anew it puts both families together. Such a check would go
            // out from another address than it says, and its answer belong to nobody (RFC 8445 §6.1.2.2).
            if transmit.source.is_ipv4() != transmit.destination.is_ipv4() {
                continue;
            }
            // A client that saw another address than the relayed one made that a candidate, too,
            // which stays when the relayed one goes.
            if self.relay_of(transmit.source).is_some() || self.known.is_host(transmit.source) {
                return Some((
                    transmit.source,
                    transmit.destination,
                    transmit.contents.into(),
                ));
            }
        }
    }

    /// The relay to send through, if `source` is one of its relayed addresses.
    pub(super) fn relay_of(&self, source: SocketAddr) -> Option<RelayId> {
        self.relayed
            .iter()
            .find(|(_, address, _)| *address == source)
            .map(|(relay, _, _)| *relay)
    }

    /// The relay and peer of the pair in use, if it is relayed on our side.
    pub(super) fn relayed_peer(&self) -> Option<(RelayId, SocketAddr)> {
        let (local, remote) = self.in_use?;
        Some((self.relay_of(local)?, remote))
    }

    /// Why the connection must end, if it must.
    pub(super) fn failure(&self, now: Instant) -> Option<FailureCause> {
        if !self.has_remote && now >= self.created + CANDIDATE_TIMEOUT {
            return Some(FailureCause::NoCandidates);
        }
        let since = self.disconnected?;
        (now >= since + DISCONNECT_GRACE).then_some(FailureCause::NoPath)
    }

    pub(super) fn poll_timeout(&mut self) -> Option<Instant> {
        let candidates = (!self.has_remote).then(|| self.created + CANDIDATE_TIMEOUT);
        let grace = self.disconnected.map(|at| at + DISCONNECT_GRACE);
        let idle = (!self.idle && self.agent.state().is_connected())
            .then(|| self.last_activity + IDLE_AFTER);
        [
            self.agent.poll_timeout(),
            candidates,
            grace,
            idle,
            self.doubt_at(),
            self.dead_at(),
            self.search_at(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    pub(super) fn view(&self) -> ConnectionView {
        ConnectionView {
            state: match self.agent.state() {
                IceConnectionState::New => "new",
                IceConnectionState::Checking => "checking",
                IceConnectionState::Connected => "connected",
                IceConnectionState::Completed => "connected",
                IceConnectionState::Disconnected => "disconnected",
            },
            path: self.path,
            path_since: self.path_since,
            path_changes: self.path_changes,
            history: self.history.steps(),
            local: self.in_use.map(|(local, _)| local),
            remote: self.in_use.map(|(_, remote)| remote),
        }
    }
}

fn creds(credentials: &IceCredentials) -> IceCreds {
    IceCreds {
        ufrag: credentials.username.clone(),
        pass: credentials.password.clone(),
    }
}

fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            !(ip.is_private() || ip.is_link_local() || ip.is_loopback() || ip.is_unspecified())
        }
        // Unique local fc00::/7 and link-local fe80::/10 stay inside a site.
        IpAddr::V6(ip) => {
            let first = ip.segments()[0];
            !(ip.is_loopback() || first & 0xfe00 == 0xfc00 || first & 0xffc0 == 0xfe80)
        }
    }
}
