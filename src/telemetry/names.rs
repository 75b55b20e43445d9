//! Names of spans, attributes and metrics, all in one place. Where the OpenTelemetry semantic
//! conventions have a name, it is used; those that they lack begin with `portal.`, `relay.` or
//! `client.`.
//!
//! No id of a client, no address inside the tunnel and no name of a resource belongs on a metric.

/// Name of the service (resource).
pub const SERVICE_NAME: &str = "service.name";
/// Version of the program (resource).
pub const SERVICE_VERSION: &str = "service.version";
/// Which of the gateways (resource).
pub const SERVICE_INSTANCE_ID: &str = "service.instance.id";
/// Operating system (resource).
pub const OS_TYPE: &str = "os.type";

/// Closed list of failures; absent on success.
pub const ERROR_TYPE: &str = "error.type";
/// Host that was dialled.
pub const SERVER_ADDRESS: &str = "server.address";
/// Port that was dialled.
pub const SERVER_PORT: &str = "server.port";
/// Address of the other end of the socket.
pub const NETWORK_PEER_ADDRESS: &str = "network.peer.address";
/// Port of the other end of the socket.
pub const NETWORK_PEER_PORT: &str = "network.peer.port";
/// `tcp` or `udp`.
pub const NETWORK_TRANSPORT: &str = "network.transport";
/// `ipv4` or `ipv6`.
pub const NETWORK_TYPE: &str = "network.type";
/// `websocket` or `turn`.
pub const NETWORK_PROTOCOL_NAME: &str = "network.protocol.name";
/// `receive` or `transmit`, as seen from the gateway.
pub const NETWORK_IO_DIRECTION: &str = "network.io.direction";
/// `ws` or `wss`.
pub const URL_SCHEME: &str = "url.scheme";
/// Kind of span (read by tracing-opentelemetry).
pub const OTEL_KIND: &str = "otel.kind";
/// Status of a span (read by tracing-opentelemetry).
pub const OTEL_STATUS_CODE: &str = "otel.status_code";
/// Why the status is an error (read by tracing-opentelemetry).
pub const OTEL_STATUS_DESCRIPTION: &str = "otel.status_description";

/// Status of the answer to the upgrade request.
pub const HTTP_RESPONSE_STATUS_CODE: &str = "http.response.status_code";

/// Number of the attempt within an outage, from 1.
pub const PORTAL_ATTEMPT: &str = "portal.attempt";
/// Delay before the attempt, in milliseconds.
pub const PORTAL_BACKOFF_DELAY_MS: &str = "portal.backoff.delay_ms";
/// Time since the outage began, in milliseconds.
pub const PORTAL_OUTAGE_ELAPSED_MS: &str = "portal.outage.elapsed_ms";
/// What the attempt followed: `start`, `backoff`, `retry_after`, `spread`, `network_change`, …
/// (see `portal::channel::AttemptCause`).
pub const PORTAL_CAUSE: &str = "portal.cause";
/// Version of the channel that was asked for: `v1` or `v2`.
pub const PORTAL_PROTOCOL: &str = "portal.protocol";
/// Failures in an outage.
pub const PORTAL_OUTAGE_FAILURES: &str = "portal.outage.failures";
/// `error.type` of the first failure of an outage.
pub const PORTAL_OUTAGE_CAUSE: &str = "portal.outage.cause";
/// `error.type` of the last failure of an outage.
pub const PORTAL_OUTAGE_LAST_CAUSE: &str = "portal.outage.last_cause";
/// How an outage ended: `joined`, `gave_up` or `abandoned` (see `portal::channel::Outcome`).
pub const PORTAL_OUTAGE_OUTCOME: &str = "portal.outage.outcome";
/// Why a span is linked to or from an outage: `session` (the one that was lost), `attempt`,
/// `relay_lost`, `client_lost`, `client_moved`, or `outage` for the way back.
pub const PORTAL_OUTAGE_LINK: &str = "portal.outage.link";
/// Whose doing it is that something ended during an outage: `portal`, `relay`, `network`, `client`,
/// `expiry` or `gateway` (on links).
pub const PORTAL_OUTAGE_EFFECT_CAUSE: &str = "portal.outage.effect.cause";
/// Clients that had a path when an outage began.
pub const PORTAL_OUTAGE_CLIENTS: &str = "portal.outage.clients";
/// Those of them whose path led over a relay.
pub const PORTAL_OUTAGE_CLIENTS_RELAYED: &str = "portal.outage.clients_relayed";
/// How often a client lost its path during an outage.
pub const PORTAL_OUTAGE_CLIENTS_LOST: &str = "portal.outage.clients_lost";
/// How often that was a path over a relay.
pub const PORTAL_OUTAGE_CLIENTS_LOST_RELAYED: &str = "portal.outage.clients_lost_relayed";
/// How often that was the portal's doing.
pub const PORTAL_OUTAGE_CLIENTS_LOST_BY_PORTAL: &str = "portal.outage.clients_lost_by_portal";
/// How often a client's path became another one during an outage.
pub const PORTAL_OUTAGE_CLIENTS_MOVED: &str = "portal.outage.clients_moved";
/// Relay episodes that ended during an outage.
pub const PORTAL_OUTAGE_RELAYS_LOST: &str = "portal.outage.relays_lost";
/// How many of them were the portal's doing.
pub const PORTAL_OUTAGE_RELAYS_LOST_BY_PORTAL: &str = "portal.outage.relays_lost_by_portal";
/// `code` of the problem document (RFC 9457) that came with a refusal.
pub const PORTAL_PROBLEM_CODE: &str = "portal.problem.code";
/// Close code (RFC 6455 §7.4) with which the connection ended.
pub const PORTAL_CLOSE_CODE: &str = "portal.close.code";

/// Relay, by the id that the portal gave it.
pub const RELAY_ID: &str = "relay.id";
/// Why an episode with a relay began.
pub const RELAY_BEGIN_REASON: &str = "relay.begin.reason";
/// Why an episode with a relay ended.
pub const RELAY_END_REASON: &str = "relay.end.reason";
/// How often the portal withdrew a relay and changed its mind while it was in use.
pub const RELAY_FLAPS: &str = "relay.flaps";
/// STUN error code of a refused request.
pub const STUN_ERROR_CODE: &str = "stun.error_code";

/// `direct`, `relay_local`, `relay_remote` or `relay_both`.
pub const CLIENT_PATH: &str = "client.path";
/// Why a client's path began (see `admin::model::PathReason`).
pub const CLIENT_PATH_BEGIN_REASON: &str = "client.path.begin.reason";
/// Why it ended.
pub const CLIENT_PATH_END_REASON: &str = "client.path.end.reason";
/// The path that took its place, if one did.
pub const CLIENT_PATH_NEXT: &str = "client.path.next";
/// Client, by the id that the portal gave it; on spans only.
pub const CLIENT_ID: &str = "client.id";

/// Check of the preflight that is not passed.
pub const HOST_CHECK: &str = "host.check";
/// `warning` or `error`.
pub const HOST_LEVEL: &str = "host.level";
/// Whether it was put right while the gateway ran.
pub const HOST_MENDED: &str = "host.mended";

/// Spans.
pub mod span {
    /// One attempt to connect to the portal; the next five are its children.
    pub const PORTAL_CONNECT: &str = "portal.connect";
    /// Resolution of the portal's name.
    pub const DNS_RESOLVE: &str = "dns.resolve";
    /// TCP connection.
    pub const TCP_CONNECT: &str = "tcp.connect";
    /// TLS handshake.
    pub const TLS_HANDSHAKE: &str = "tls.handshake";
    /// WebSocket upgrade.
    pub const WS_UPGRADE: &str = "websocket.upgrade";
    /// Join of the Phoenix channel.
    pub const CHANNEL_JOIN: &str = "channel.join";
    /// One outage of the portal, exported at its end.
    pub const PORTAL_OUTAGE: &str = "portal.outage";
    /// One attempt to allocate at a relay.
    pub const TURN_ALLOCATE: &str = "relay.allocate";
    /// The time that a relay was in use, recorded at its end.
    pub const RELAY_EPISODE: &str = "relay.episode";
    /// Set-up of one client connection, from authorization to the first packet.
    pub const CONNECTION_ESTABLISH: &str = "connection.establish";
    /// The time that a client's packets took one path, recorded at its end.
    pub const CONNECTION_PATH: &str = "connection.path";
    /// The time that the host lacked something, recorded at its end.
    pub const HOST_LACK: &str = "host.lack";
}

/// Histograms. The other metrics are named where they are read from the status, see
/// [`metrics::ALL`](super::metrics::ALL).
pub mod metric {
    /// Duration of connection attempts in seconds, with `error.type` on failures.
    pub const PORTAL_CONNECT_DURATION: &str = "gateway.portal.connect.duration";
    /// Duration of outages of the portal channel in seconds.
    pub const PORTAL_OUTAGE_LENGTH: &str = "gateway.portal.outage.length";
    /// Duration of successful attempts to allocate at a relay in seconds.
    pub const RELAY_ALLOCATE_DURATION: &str = "gateway.relay.allocate.duration";
    /// Duration of the set-up of clients' connections in seconds.
    pub const CLIENT_SETUP_DURATION: &str = "gateway.client.setup.duration";
}
