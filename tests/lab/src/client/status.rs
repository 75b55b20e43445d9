//! What `GET /status` shows.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::Serialize;
use uuid::Uuid;

use super::relay::RelayState;

/// The whole picture.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Control channel.
    pub portal: PortalStatus,
    /// Device and addresses.
    pub tunnel: TunnelStatus,
    /// What may be reached.
    pub resources: Vec<ResourceStatus>,
    /// One entry per connection.
    pub gateways: Vec<GatewayStatus>,
    /// One entry per relay address.
    pub relays: Vec<RelayStatus>,
    /// Totals since start.
    pub counters: Counters,
}

/// See [`Status::portal`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PortalStatus {
    /// Joined the topic.
    pub connected: bool,
    /// Successful joins since start.
    pub joins: u64,
    /// Why the last connection ended or could not be made.
    pub last_error: Option<String>,
}

/// See [`Status::tunnel`].
#[derive(Debug, Clone, Serialize)]
pub struct TunnelStatus {
    /// Tunnel address.
    pub ipv4: Option<Ipv4Addr>,
    /// Tunnel address.
    pub ipv6: Option<Ipv6Addr>,
    /// WireGuard public key, base64.
    pub public_key: String,
    /// Bound UDP port, IPv4.
    pub port_v4: Option<u16>,
    /// Bound UDP port, IPv6.
    pub port_v6: Option<u16>,
}

/// See [`Status::resources`].
#[derive(Debug, Clone, Serialize)]
pub struct ResourceStatus {
    /// Identity.
    pub id: Uuid,
    /// Display name.
    pub name: String,
    /// `cidr`, `dns` or `internet`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Network or pattern.
    pub address: Option<String>,
    /// Gateway that grants access now.
    pub gateway_id: Option<Uuid>,
    /// Why the portal last refused it.
    pub refused: Option<String>,
}

/// How data flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PathKind {
    /// No relay involved.
    Direct,
    /// Through our relay only.
    RelayLocal,
    /// Through the gateway's relay only.
    RelayRemote,
    /// Through both.
    RelayBoth,
}

/// One end of the nominated pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EndStatus {
    /// `host`, `srflx`, `prflx` or `relay`.
    pub kind: String,
    /// Address.
    pub addr: SocketAddr,
}

/// See [`Status::gateways`].
#[derive(Debug, Clone, Serialize)]
pub struct GatewayStatus {
    /// Identity.
    pub id: Uuid,
    /// Its tunnel addresses.
    pub tunnel_ips: [IpAddr; 2],
    /// Resources reached through it.
    pub resources: Vec<Uuid>,
    /// `new`, `checking`, `connected`, `completed`, `disconnected`.
    pub ice_state: String,
    /// Local end of the nominated pair.
    pub local: Option<EndStatus>,
    /// Remote end of the nominated pair.
    pub remote: Option<EndStatus>,
    /// How data flows.
    pub path: Option<PathKind>,
    /// Slow probing because nothing was sent for a while.
    pub idle: bool,
    /// A WireGuard session exists.
    pub session: bool,
    /// Age of the last completed handshake in seconds.
    pub last_handshake_age_s: Option<f64>,
    /// Completed handshakes.
    pub handshakes: u64,
    /// Times the nominated pair changed.
    pub nominations: u64,
    /// Inner bytes received.
    pub rx_bytes: u64,
    /// Inner bytes sent.
    pub tx_bytes: u64,
    /// Inner packets received.
    pub rx_packets: u64,
    /// Inner packets sent.
    pub tx_packets: u64,
    /// Candidates signalled to the gateway.
    pub local_candidates: Vec<String>,
    /// Candidates the gateway signalled.
    pub remote_candidates: Vec<EndStatus>,
    /// Age of the connection in seconds.
    pub age_s: f64,
}

/// See [`Status::relays`].
#[derive(Debug, Clone, Serialize)]
pub struct RelayStatus {
    /// Identity.
    pub id: Uuid,
    /// Address of the relay.
    pub addr: SocketAddr,
    /// Progress.
    pub state: RelayState,
    /// Our own address towards it.
    pub host: Option<SocketAddr>,
    /// Our address as it sees us.
    pub srflx: Option<SocketAddr>,
    /// Our address on it.
    pub relayed: Option<SocketAddr>,
    /// Round trip in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Peers with a channel.
    pub channels: Vec<SocketAddr>,
}

/// See [`Status::counters`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// `request_authorization` sent.
    pub authorizations_requested: u64,
    /// `authorization_created` received.
    pub authorizations_created: u64,
    /// `authorization_creation_failed` received.
    pub authorizations_failed: u64,
    /// Connections that carried data and failed, or never came up.
    pub connections_failed: u64,
    /// Why the last one failed.
    pub last_connection_failure: Option<String>,
    /// Goodbyes received from gateways.
    pub goodbyes_received: u64,
    /// ICMP "administratively prohibited" received through the tunnel.
    pub icmp_prohibited_received: u64,
    /// Packets from applications with no matching resource.
    pub dropped_no_resource: u64,
    /// Packets that fell out of a full buffer.
    pub dropped_buffer_full: u64,
    /// Datagrams that are neither STUN nor WireGuard.
    pub dropped_unknown_datagram: u64,
    /// STUN for no connection of ours, or failing authentication.
    pub dropped_stun: u64,
    /// WireGuard for no connection of ours, or failing authentication.
    pub dropped_wireguard: u64,
    /// Channel data without a channel.
    pub dropped_channel_data: u64,
    /// Tunnel packets not addressed to us.
    pub dropped_inner_destination: u64,
    /// TURN Data indications, which the stock client ignores.
    pub ignored_turn_indications: u64,
    /// Candidates for unknown connections.
    pub candidates_for_unknown_gateway: u64,
}
