//! The status document. The slow path publishes a snapshot of it; `/status`, the `status`
//! sub-command and the readiness checks read it. Times are Unix seconds (fractional), durations
//! seconds, so that the document means the same wherever it is read.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::datapath::peers::PathKind;

/// Version of the document's layout; raised when a field changes meaning or disappears.
pub const SCHEMA: u32 = 1;

/// Everything an operator can ask the gateway in one read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// When the document was made (Unix seconds).
    #[serde(default)]
    pub at: f64,
    /// Version of the program.
    pub version: String,
    /// Display name.
    pub name: String,
    /// The Firezone id as the portal sees it (`external_id`).
    pub id: String,
    /// When the process started.
    pub started_at: f64,
    /// Whether a shutdown is under way.
    pub draining: bool,
    /// Loops of the gateway that do not turn, as `/livez` tells it. While one is `slow_path`, all
    /// else is as it was when that one stopped.
    #[serde(default)]
    pub stuck: Vec<String>,
    /// The portal channel.
    pub portal: PortalStatus,
    /// TURN relays.
    pub relays: Vec<RelayStatus>,
    /// Allocations that ended in the last hour: how much the relays come and go.
    #[serde(default)]
    pub relay_churn: u64,
    /// The last allocations that ended, oldest first, at most 20.
    #[serde(default)]
    pub relay_episodes: Vec<RelayEpisode>,
    /// Clients with at least one grant or a connection.
    pub clients: Clients,
    /// Whether the clients' candidates and pairs are in it, as far as there are any. They are
    /// collected when somebody asks; if the gateway has no time for it, what it published last is
    /// given out without them.
    #[serde(default)]
    pub complete: bool,
    /// The TUN device.
    pub device: DeviceStatus,
    /// What the preflight found on the host.
    pub host: Vec<HostFinding>,
    /// WireGuard handshakes.
    #[serde(default)]
    pub handshakes: HandshakeStatus,
    /// Inner packets that passed since start, of clients that are gone, too.
    #[serde(default)]
    pub traffic: TrafficStatus,
    /// Flows of all clients.
    #[serde(default)]
    pub flows: usize,
    /// Names that were forgotten because their client used too many, since start.
    #[serde(default)]
    pub names_evicted: u64,
    /// The DNS service on the gateway's tunnel addresses.
    #[serde(default)]
    pub dns: DnsStatus,
    /// Flow logs; all zero while nobody wants them.
    #[serde(default)]
    pub flow_logs: FlowLogStatus,
    /// Dropped packets by reason.
    pub dropped: BTreeMap<String, u64>,
}

/// What became of flow logs since start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowLogStatus {
    /// Records written to the spool.
    pub written: u64,
    /// Records that the server took.
    pub uploaded: u64,
    /// Requests that delivered nothing.
    pub upload_failures: u64,
    /// Records lost: no room, disk errors, refused for good, or their token expired.
    pub dropped: u64,
    /// Files in the spool that are damaged or not ours.
    pub damaged: u64,
    /// Bytes in the spool.
    pub spool_bytes: u64,
    /// Files in the spool.
    pub spool_files: u64,
    /// What went wrong last.
    pub last_error: Option<String>,
}

/// Inner packets that passed since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficStatus {
    /// Bytes from clients.
    pub rx_bytes: u64,
    /// Bytes to clients.
    pub tx_bytes: u64,
    /// Packets from clients.
    pub rx_packets: u64,
    /// Packets to clients.
    pub tx_packets: u64,
}

/// What became of DNS queries to the gateway's tunnel addresses since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsStatus {
    /// Answered by a name server of the site.
    pub answered: u64,
    /// Answered with SERVFAIL, because no name server could be reached in time.
    pub failed: u64,
    /// Over the number that may be under way at once; not answered.
    pub limited: u64,
    /// No standard query, or not from a client; not answered.
    pub ignored: u64,
}

/// What became of WireGuard handshake messages since start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HandshakeStatus {
    /// Initiations that were let through.
    pub admitted: u64,
    /// Messages whose sender does not know our public key.
    pub bad_mac: u64,
    /// Initiations that were answered with a cookie, because too many came.
    pub cookies: u64,
    /// Initiations over every limit.
    pub limited: u64,
    /// Messages that curve operations were done for.
    pub computed: u64,
}

/// State of the portal channel.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PortalStatus {
    /// URL without query.
    pub url: String,
    /// Where the channel is.
    pub state: PortalState,
    /// When it got there.
    pub since: f64,
    /// Whether an `init` was ever seen.
    pub initialized: bool,
    /// When the last application message arrived (not a heartbeat).
    pub last_message_at: Option<f64>,
    /// The retry policy of the present outage; `None` while all is well.
    pub backoff: Option<BackoffStatus>,
    /// The outages that ended within the last 24 hours, oldest first, at most 100.
    #[serde(default)]
    pub outages: Vec<OutageStatus>,
    /// The last attempts that ended, oldest first, at most 20.
    #[serde(default)]
    pub recent_attempts: Vec<AttemptStatus>,
    /// The last failure, kept after recovery.
    pub last_error: Option<PortalError>,
    /// Successful joins since start.
    pub joins: u64,
    /// Connection attempts since start.
    pub attempts: u64,
    /// By how many seconds the portal's clock is ahead of ours; negative if it is behind, `None` while
    /// it has not told the time.
    #[serde(default)]
    pub clock_ahead: Option<f64>,
}

/// An outage of the portal channel that is over.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OutageStatus {
    /// The first failure (Unix seconds).
    pub began: f64,
    /// The join that proved stable, or the moment of giving up (Unix seconds).
    pub ended: f64,
    /// `error.type` of the first failure.
    pub cause: String,
    /// `error.type` of the last one.
    pub last_cause: String,
    /// How many there were.
    pub failures: u32,
    /// `joined`, `gave_up` or `abandoned`.
    pub outcome: String,
}

/// An attempt to connect to the portal and join.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AttemptStatus {
    /// When it ended (Unix seconds).
    pub at: f64,
    /// `error.type` of its failure; `None` if it ended in a join.
    pub cause: Option<String>,
}

/// States of the portal channel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortalState {
    /// Not started.
    #[default]
    Idle,
    /// DNS, TCP, TLS or WebSocket upgrade.
    Connecting,
    /// Waiting for the join reply.
    Joining,
    /// Joined.
    Joined,
    /// Waiting for the next attempt.
    Waiting,
    /// The token was refused; re-checked rarely and on token change.
    Blocked,
    /// The retry budget of this outage ran out.
    GaveUp,
    /// Closed on purpose.
    Closed,
}

impl PortalState {
    /// Every state as it is written.
    pub const NAMES: [&'static str; 8] = [
        "idle",
        "connecting",
        "joining",
        "joined",
        "waiting",
        "blocked",
        "gave_up",
        "closed",
    ];

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// The retry policy of the present outage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BackoffStatus {
    /// When the outage began, i.e. when the policy was created.
    pub outage_since: f64,
    /// `error.type` of the failure that it began with.
    #[serde(default)]
    pub cause: String,
    /// Failed attempts in this outage.
    pub attempt: u32,
    /// When the next attempt starts; `None` while one is running.
    pub next_attempt_at: Option<f64>,
    /// Seconds left of the budget; `None` when there is no limit.
    pub budget_left: Option<f64>,
}

impl PortalStatus {
    /// What the present outage began with, unless the last failure is of the same kind.
    pub(super) fn first_cause(&self) -> Option<&str> {
        let cause = self.backoff.as_ref()?.cause.as_str();
        let last = self.last_error.as_ref()?.kind.as_str();
        (!cause.is_empty() && cause != last).then_some(cause)
    }
}

/// A failure of the portal channel.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PortalError {
    /// From the closed list of `error.type`.
    pub kind: String,
    /// In words.
    pub message: String,
    /// When.
    pub at: f64,
}

/// State of one relay.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RelayStatus {
    /// Id given by the portal.
    pub id: String,
    /// Addresses of the relay.
    pub addresses: Vec<String>,
    /// `probing`, `allocating`, `allocated`, `failed`, `withdrawn`, `released`.
    pub state: String,
    /// Since when (Unix seconds).
    pub since: f64,
    /// Relayed transport addresses.
    pub relayed: Vec<String>,
    /// When the present allocation was made (Unix seconds); `None` without one.
    #[serde(default)]
    pub allocated_at: Option<f64>,
    /// When the present allocation ends unless it is refreshed before (Unix seconds), which
    /// happens after half its lifetime; `None` without one.
    #[serde(default)]
    pub allocation_expires_at: Option<f64>,
    /// Allocations made here since the portal named the relay; all but the present one were lost
    /// or replaced. New credentials, another address or another id for the same socket go on
    /// counting.
    #[serde(default)]
    pub allocations: u64,
    /// How often the portal withdrew the relay and changed its mind in time; counted as
    /// `allocations` are.
    #[serde(default)]
    pub flaps: u64,
    /// Smoothed round trip time in seconds.
    pub rtt: Option<f64>,
    /// When the credentials end (Unix seconds).
    pub credentials_expire_at: Option<f64>,
    /// Bound channels.
    pub channels: usize,
    /// The last failure, kept after recovery.
    pub last_error: Option<String>,
    /// When it was (Unix seconds).
    #[serde(default)]
    pub last_error_at: Option<f64>,
}

/// An allocation at a relay, from its beginning to its end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RelayEpisode {
    /// Id given by the portal.
    pub relay: String,
    /// The socket of the relay.
    pub server: Option<SocketAddr>,
    /// When the allocation was had (Unix seconds).
    pub began: f64,
    /// When it was gone (Unix seconds).
    pub ended: f64,
    /// Why it began: `offered`, `replaced`, `recovered`.
    pub begin: String,
    /// Why it ended, in words.
    pub end: String,
}

/// The clients of a document. There can be thousands, so documents that were made one after the other
/// share them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Clients(Arc<Vec<ClientStatus>>);

impl From<Vec<ClientStatus>> for Clients {
    fn from(clients: Vec<ClientStatus>) -> Self {
        Self(Arc::new(clients))
    }
}

impl FromIterator<ClientStatus> for Clients {
    fn from_iter<T: IntoIterator<Item = ClientStatus>>(clients: T) -> Self {
        clients.into_iter().collect::<Vec<_>>().into()
    }
}

impl Deref for Clients {
    type Target = Vec<ClientStatus>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Clients {
    /// Those of this document alone.
    fn deref_mut(&mut self) -> &mut Self::Target {
        Arc::make_mut(&mut self.0)
    }
}

/// State of one client.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// Id given by the portal.
    pub id: String,
    /// Tunnel addresses.
    pub addresses: Vec<String>,
    /// `none`, `checking`, `connected`, `failed`.
    pub connection: String,
    /// `direct`, `relay_local`, `relay_remote`, `relay_both`; `None` without a nominated pair.
    pub path: Option<String>,
    /// Since when it is this path (Unix seconds).
    #[serde(default)]
    pub path_since: Option<f64>,
    /// How often the path changed.
    #[serde(default)]
    pub path_changes: u64,
    /// The last changes of the path, oldest first, the first nomination included; of the present
    /// connection only.
    #[serde(default)]
    pub path_history: Vec<PathChange>,
    /// Our end of the path.
    pub local: Option<String>,
    /// The client's end of the path.
    pub remote: Option<String>,
    /// How many candidate pairs there are.
    #[serde(default)]
    pub pair_count: usize,
    /// The candidate pairs (RFC 8445 §6.1.2), at most 20 of them, best first: the one in use,
    /// those that the client nominated, those that answer, the others by priority. Empty unless
    /// the document is [`Status::complete`].
    #[serde(default)]
    pub pairs: Vec<PairStatus>,
    /// How many candidates we have for this client.
    #[serde(default)]
    pub local_candidate_count: usize,
    /// Our candidates by priority, at most 20; see `pairs`.
    #[serde(default)]
    pub local_candidates: Vec<CandidateStatus>,
    /// How many candidates the client has.
    #[serde(default)]
    pub remote_candidate_count: usize,
    /// The client's candidates by priority, at most 20; see `pairs`.
    #[serde(default)]
    pub remote_candidates: Vec<CandidateStatus>,
    /// When the last WireGuard handshake completed.
    pub last_handshake_at: Option<f64>,
    /// Bytes of inner packets received from the client.
    pub rx_bytes: u64,
    /// Bytes of inner packets sent to the client.
    pub tx_bytes: u64,
    /// What the client may reach.
    pub grants: Vec<GrantStatus>,
    /// Flows that the client has begun.
    #[serde(default)]
    pub flows: usize,
    /// Names that the client has made addresses up for.
    #[serde(default)]
    pub domains: usize,
    /// The client's packets that went nowhere, both ways, by reason.
    #[serde(default)]
    pub dropped: BTreeMap<String, u64>,
}

/// A change of a client's path.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PathChange {
    /// When (Unix seconds).
    pub at: f64,
    /// What kind of path it was; `None` without one.
    pub from: Option<PathKind>,
    /// What kind of path it became; `None` without one. The same kind as before when traffic went
    /// to another pair of that kind.
    pub to: Option<PathKind>,
    /// Why.
    pub reason: PathReason,
}

/// Why a client's path changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathReason {
    /// The client, which is the controlling agent, nominated the pair: its first one, or another
    /// one while the former still worked.
    Nominated,
    /// Checks of the former pair were not answered any more, and another pair lives.
    Dead,
    /// What had been left works again, a search found a better pair, or any pair works after none
    /// did.
    Returned,
    /// Our relay does not carry the former pair any more: its allocation or channel is gone.
    RelayLost,
    /// The client withdrew the candidate at its end of the former pair.
    Withdrawn,
    /// No pair works.
    Disconnected,
    /// The pair is the same, but its far end turned out to be the client's relay, or our relay
    /// gave it another channel.
    Updated,
}

impl PathReason {
    /// The name used in status and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nominated => "nominated",
            Self::Dead => "dead",
            Self::Returned => "returned",
            Self::RelayLost => "relay_lost",
            Self::Withdrawn => "withdrawn",
            Self::Disconnected => "disconnected",
            Self::Updated => "updated",
        }
    }
}

/// Kinds of candidates (RFC 8445 §5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CandidateKind {
    /// An address of an interface.
    Host,
    /// What a STUN server or relay sees the agent at: its address outside a NAT.
    ServerReflexive,
    /// An address that was not signalled but seen in a check.
    PeerReflexive,
    /// An address that a relay lends.
    Relayed,
}

/// A candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CandidateStatus {
    /// Its kind.
    pub kind: CandidateKind,
    /// Its transport address.
    pub address: SocketAddr,
}

/// A candidate pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PairStatus {
    /// Our end: a host or relayed address; others are reached through these.
    pub local: SocketAddr,
    /// Kind of our end; `None` once the candidate is gone.
    pub local_kind: Option<CandidateKind>,
    /// The client's end.
    pub remote: SocketAddr,
    /// Kind of the client's end; `None` once the candidate is withdrawn.
    pub remote_kind: Option<CandidateKind>,
    /// When the client last answered a check of ours (Unix seconds); `None` never.
    pub answered_at: Option<f64>,
    /// Whether the client nominated it (USE-CANDIDATE, RFC 8445 §8). It may nominate several.
    pub nominated: bool,
    /// Whether traffic to the client is sent on it.
    pub in_use: bool,
}

/// One grant of a client.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GrantStatus {
    /// Resource id.
    pub resource: String,
    /// Name for display.
    pub name: String,
    /// Network, pattern or `internet`.
    pub address: String,
    /// When it ends; `None` never.
    pub expires_at: Option<f64>,
}

/// State of the TUN device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Interface name.
    pub name: String,
    /// Whether it could be made.
    pub up: bool,
    /// Why not.
    pub error: Option<String>,
    /// Tunnel addresses in use.
    pub addresses: Vec<String>,
    /// UDP sockets in use.
    pub sockets: Vec<String>,
    /// Offloads in use.
    pub offloads: Vec<String>,
    /// Workers.
    pub workers: usize,
    /// What the kernel has dropped before the gateway saw it.
    #[serde(default)]
    pub kernel_drops: KernelDrops,
}

/// What the kernel has dropped because the gateway was not quick enough, since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelDrops {
    /// Datagrams: a socket's receive buffer was full.
    pub udp: u64,
    /// Packets to clients: the device's queue was full.
    pub device: u64,
}

/// One finding of the preflight.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HostFinding {
    /// Name of the check.
    pub name: String,
    /// `ok`, `warning` or `error`.
    pub level: String,
    /// What was found.
    pub found: String,
    /// What to set, as a compose line.
    pub fix: Option<String>,
}
