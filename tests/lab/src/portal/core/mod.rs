//! The portal's state and rules, without sockets or clocks.
//!
//! Everything happens in `handle_*` and in the operations of the control API. What is to be sent
//! goes into the queue of the connection it is for; [`Core::poll_timeout`] says when
//! [`Core::handle_timeout`] is next due.

mod admin;
mod authorization;
mod candidates;
mod channel;
mod client;
mod connect;
mod gateway;
mod relays;
mod report;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

pub use admin::{Expire, OperationError, ResourceChange};
pub use candidates::CandidateFilter;
pub use connect::{Admission, ConnectRequest};

use super::events::{Event, EventLog, Now};
use super::faults::{ChannelFault, Faults};
use super::policy::{ClientToken, Policy, Relay};
use super::store::{Role, Store};
use super::wire;
use authorization::Pending;

/// Messages kept per peer for the control API.
const MESSAGE_TAIL: usize = 256;
/// Protocol violations kept per peer.
const VIOLATION_TAIL: usize = 64;

/// Number of a connection; never used twice.
pub type ConnId = u64;

/// Time limits of the portal (portal-channel spec §1.5, §6.2, §7.1, §7.3).
#[derive(Debug, Clone, Copy)]
pub struct Timings {
    /// A connection without a frame for this long is closed.
    pub idle: Duration,
    /// A gateway has this long to answer `create_authorization`.
    pub authorization: Duration,
    /// Relay changes are announced after this long.
    pub presence_debounce: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(37),
            authorization: Duration::from_secs(15),
            presence_debounce: Duration::from_secs(1),
        }
    }
}

/// Which event names a connection uses (§4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// `/gateway/websocket`, `/client/websocket`.
    V1,
    /// `/gateway/v2/websocket`, `/client/v2/websocket`.
    V2,
}

/// What the task of a connection is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// Send a text message.
    Text(String),
    /// Send a Close frame and end.
    Close {
        /// Close code (RFC 6455 §7.4).
        code: u16,
        /// Reason.
        reason: String,
    },
    /// End without a word.
    Kill,
}

/// How a connection ended.
#[derive(Debug, Clone, Serialize)]
pub struct Ending {
    /// `peer_close` (a Close frame came first from the peer), `portal_close`, `portal_kill`,
    /// `idle` or `transport` (end of stream or error).
    pub by: &'static str,
    /// Code of the peer's Close frame; `None` if there was no frame or no code in it.
    pub code: Option<u16>,
    /// Reason of the peer's Close frame, or the transport error.
    pub reason: String,
}

/// What a peer may do.
#[derive(Debug, Clone)]
enum Access {
    /// A gateway of this site.
    Gateway { site: Uuid },
    /// A client with this token.
    Client(ClientToken),
}

#[derive(Debug)]
struct Conn {
    admission: Admission,
    queue: mpsc::UnboundedSender<Outgoing>,
    /// Whether the channel is joined, that is: whether the peer is online.
    joined: bool,
    /// Announced with `set_snownet_capabilities`; belongs to one join.
    iceless: bool,
    /// Relays that the peer was given.
    relays_sent: BTreeSet<Uuid>,
    /// The `ref` that the next message should carry (§1.6).
    next_ref: u64,
}

impl Conn {
    fn role(&self) -> Role {
        self.admission.role
    }
}

/// What is known about a peer since this process started.
#[derive(Debug, Default)]
struct History {
    connects: u64,
    joins: u64,
    heartbeats: u64,
    user_agent: String,
    version: Option<String>,
    last_frame_ms: Option<u64>,
    joined_at_ms: Option<u64>,
    last_ending: Option<(u64, Ending)>,
    last_close_received: Option<Value>,
    violations: VecDeque<String>,
    messages: VecDeque<Value>,
}

/// The state of the portal.
#[derive(Debug)]
pub struct Core {
    policy: Policy,
    store: Store,
    timings: Timings,
    conns: BTreeMap<ConnId, Conn>,
    last_conn: ConnId,
    history: HashMap<Uuid, History>,
    pending: Vec<Pending>,
    /// References of requests that were answered, replaced or given up.
    settled: VecDeque<String>,
    relays: Vec<Relay>,
    presence_due: Option<(Instant, bool)>,
    candidate_filter: CandidateFilter,
    revoked_tokens: HashSet<String>,
    admitted: HashMap<(IpAddr, String), Instant>,
    events: EventLog,
    faults: watch::Sender<Faults>,
}

impl Core {
    /// A portal with no connections.
    pub fn new(now: Now, policy: Policy, mut store: Store, timings: Timings) -> Self {
        store.forget_expired(now.unix());
        Self {
            relays: policy.relays.clone(),
            policy,
            store,
            timings,
            conns: BTreeMap::new(),
            last_conn: 0,
            history: HashMap::new(),
            pending: Vec::new(),
            settled: VecDeque::new(),
            presence_due: None,
            candidate_filter: CandidateFilter::default(),
            revoked_tokens: HashSet::new(),
            admitted: HashMap::new(),
            events: EventLog::default(),
            faults: watch::Sender::default(),
        }
    }

    /// When [`Core::handle_timeout`] is due next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.pending
            .iter()
            .map(|pending| pending.deadline)
            .chain(self.presence_due.map(|(due, _)| due))
            .min()
    }

    /// Does what has become due.
    pub fn handle_timeout(&mut self, now: Now) {
        self.authorizations_due(now);
        self.presence_due(now);
    }

    /// The faults in force, and their changes.
    pub fn faults(&self) -> watch::Receiver<Faults> {
        self.faults.subscribe()
    }

    /// Time limits.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// Number of open connections.
    pub fn connections(&self) -> usize {
        self.conns.len()
    }

    /// The newest events; see [`EventLog::newest`].
    pub fn events(&self, count: usize, since: u64, kind: Option<&str>) -> Vec<Event> {
        self.events.newest(count, since, kind)
    }

    /// Writes changes to the state file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&mut self) -> anyhow::Result<()> {
        self.store.save()
    }

    /// The joined connection of a peer.
    fn online(&self, peer: Uuid) -> Option<ConnId> {
        self.conns
            .iter()
            .find(|(_, conn)| conn.joined && conn.admission.peer == peer)
            .map(|(id, _)| *id)
    }

    /// All joined connections of a role.
    fn joined(&self, role: Role) -> Vec<ConnId> {
        self.conns
            .iter()
            .filter(|(_, conn)| conn.joined && conn.role() == role)
            .map(|(id, _)| *id)
            .collect()
    }

    /// Sends a message of the portal's own to the channel of a connection.
    fn push(&mut self, now: Now, id: ConnId, event: &str, payload: Value) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        if self.faults.borrow().of(conn.role()).channel == ChannelFault::Silent {
            return;
        }
        let frame = wire::push(conn.role().topic(), event, payload);
        self.send(now, id, &frame);
    }

    fn send(&mut self, now: Now, id: ConnId, frame: &Value) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        // A connection whose task has ended is about to be reported as closed.
        let _ = conn.queue.send(Outgoing::Text(frame.to_string()));
        if frame["topic"] != wire::PHOENIX {
            let peer = conn.admission.peer;
            self.note_message(now, peer, "out", frame);
        }
    }

    fn note_message(&mut self, now: Now, peer: Uuid, direction: &str, frame: &Value) {
        let messages = &mut self.history.entry(peer).or_default().messages;
        let mut entry = json!({"at_ms": now.unix_ms, "direction": direction});
        if let (Value::Object(entry), Value::Object(frame)) = (&mut entry, wire::redacted(frame)) {
            entry.extend(frame);
        }
        messages.push_back(entry);
        if messages.len() > MESSAGE_TAIL {
            messages.pop_front();
        }
    }

    /// Notes that a peer did something the protocol does not provide for.
    fn violation(&mut self, now: Now, id: ConnId, what: &str) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let peer = conn.admission.peer;
        let violations = &mut self.history.entry(peer).or_default().violations;
        violations.push_back(what.to_owned());
        if violations.len() > VIOLATION_TAIL {
            violations.pop_front();
        }
        let detail = json!({"conn": id, "peer_id": peer, "what": what});
        self.events.record(now, "violation", detail);
    }

    /// Closes a connection with a Close frame; its peer is offline from now on.
    fn close(&mut self, now: Now, id: ConnId, code: u16, reason: &str) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.joined = false;
            let _ = conn.queue.send(Outgoing::Close {
                code,
                reason: reason.to_owned(),
            });
            let detail = json!({"conn": id, "peer_id": conn.admission.peer, "code": code,
                "reason": reason});
            self.events.record(now, "close_sent", detail);
        }
    }
}

/// `SocketAddr` with IPv4-mapped addresses shown as the IPv4 addresses they are.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
