//! Messages of the gateway's Phoenix channel (portal-channel spec §4), under the names that they have
//! in version 2; [`super::wire`] knows those of version 1.
//!
//! These types are what the rest of the gateway works with; [`super::wire`] turns frames into them
//! and decides what a malformed frame costs.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ip_network::IpNetwork;
use secrecy::SecretString;

use crate::ids::{ClientId, RelayId, ResourceId};

/// A message pushed by the portal.
#[derive(Debug)]
pub enum Ingress {
    /// Sent after each join and whenever the gateway's own data change; idempotent (§4.3).
    Init(Init),
    /// Grants a client access to a resource; must be answered with its `reference` (§4.5).
    CreateAuthorization(Box<CreateAuthorization>),
    /// Takes one grant back (§4.5).
    RejectAccess {
        /// Whose grant.
        client_id: ClientId,
        /// For what.
        resource_id: ResourceId,
    },
    /// New filters of a resource, for every client that holds it (§4.5).
    ResourceUpdated(Resource),
    /// Changes of the relay set (§6.2).
    RelaysPresence(RelaysPresence),
    /// Remote ICE candidates, as SDP candidate lines (§4.6).
    IceCandidates {
        /// Whose candidates.
        client_id: ClientId,
        /// Candidate lines, malformed ones included; the ICE layer skips those.
        candidates: Vec<String>,
    },
    /// Remote candidates that are no longer valid (§4.6).
    InvalidateIceCandidates {
        /// Whose candidates.
        client_id: ClientId,
        /// Candidate lines.
        candidates: Vec<String>,
    },
}

/// A message pushed by the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Egress {
    /// Answer to [`Ingress::CreateAuthorization`].
    AuthorizationCreated {
        /// The opaque reference of the request, byte for byte.
        reference: String,
    },
    /// New local candidates.
    BroadcastIceCandidates {
        /// Receivers.
        client_ids: Vec<ClientId>,
        /// SDP candidate lines, highest priority first.
        candidates: Vec<String>,
    },
    /// Local candidates that are no longer valid.
    BroadcastInvalidatedIceCandidates {
        /// Receivers.
        client_ids: Vec<ClientId>,
        /// SDP candidate lines.
        candidates: Vec<String>,
    },
    /// Asks for relays; the portal answers with `relays_presence` (§4.7).
    NoRelays,
    /// What path finding this gateway speaks (§4.6).
    SetSnownetCapabilities {
        /// Whether ICE-less path finding is supported.
        iceless: bool,
    },
}

impl Egress {
    /// Whether the message must reach the portal even if the connection is lost meanwhile
    /// (portal-channel spec §4.6). Everything else is about the one session: the portal forgets the
    /// request that an answer belongs to, and sends relays by itself after a join.
    pub fn survives_reconnect(&self) -> bool {
        match self {
            Self::BroadcastIceCandidates { .. }
            | Self::BroadcastInvalidatedIceCandidates { .. } => true,
            Self::AuthorizationCreated { .. }
            | Self::NoRelays
            | Self::SetSnownetCapabilities { .. } => false,
        }
    }
}

/// `init` (§4.3).
#[derive(Debug, Clone)]
pub struct Init {
    /// The gateway's tunnel addresses.
    pub interface: Interface,
    /// Relays to use, grouped by id.
    pub relays: Vec<RelayEntry>,
    /// Every grant that is still valid; what is not listed is revoked.
    pub authorizations: Vec<AuthorizationEntry>,
    /// For display only.
    pub account_slug: Option<String>,
    /// Where flow logs go; `None` if the portal says nothing that can be read.
    pub flow_logs: Option<FlowLogUploads>,
}

/// Where flow logs go, and how often (portal-channel spec §4.8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowLogUploads {
    /// Base of the address.
    pub api_url: String,
    /// Seconds between uploads; 0 switches them off.
    pub interval_secs: u64,
    /// Records in one upload; 0 leaves it to us.
    pub batch_size: u64,
}

/// The gateway's own tunnel addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interface {
    /// IPv4 tunnel address.
    pub ipv4: Ipv4Addr,
    /// IPv6 tunnel address.
    pub ipv6: Ipv6Addr,
}

/// One still valid grant, as listed in `init`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthorizationEntry {
    /// Who.
    pub client_id: ClientId,
    /// What.
    pub resource_id: ResourceId,
    /// Unix seconds; `None` never expires.
    pub expires_at: Option<u64>,
}

/// `create_authorization` (§4.5).
#[derive(Debug)]
pub struct CreateAuthorization {
    /// Opaque; echoed in the answer.
    pub reference: String,
    /// What is granted.
    pub resource: Resource,
    /// To whom.
    pub client: ClientPeer,
    /// Remote ICE credentials.
    pub client_ice_credentials: IceCredentials,
    /// Local ICE credentials.
    pub gateway_ice_credentials: IceCredentials,
    /// Unix seconds; `None` never expires.
    pub expires_at: Option<u64>,
    /// Whether ICE-less path finding was negotiated.
    pub use_iceless: bool,
    /// What flow logs of this grant are uploaded with, as it came; access does not depend on it.
    pub flow_logs_ingest_token: Option<SecretString>,
}

/// The WireGuard peer that a grant is for.
#[derive(Debug, Clone)]
pub struct ClientPeer {
    /// Id of the client.
    pub id: ClientId,
    /// X25519 public key.
    pub public_key: [u8; 32],
    /// WireGuard preshared key.
    pub preshared_key: PresharedKey,
    /// IPv4 tunnel address.
    pub ipv4: Ipv4Addr,
    /// IPv6 tunnel address.
    pub ipv6: Ipv6Addr,
    /// Client version, for display.
    pub version: Option<String>,
}

/// A WireGuard preshared key; never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PresharedKey(pub [u8; 32]);

impl std::fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PresharedKey([redacted])")
    }
}

/// ICE user name fragment and password (RFC 8445 §5.3).
#[derive(Clone, PartialEq, Eq)]
pub struct IceCredentials {
    /// User name fragment.
    pub username: String,
    /// Password.
    pub password: String,
}

impl std::fmt::Debug for IceCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IceCredentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What a client may be granted (§4.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// A network; a single address is a /32 or /128.
    Cidr(CidrResource),
    /// A domain name or pattern.
    Dns(DnsResource),
    /// Every public destination.
    Internet {
        /// Id of the resource.
        id: ResourceId,
    },
}

impl Resource {
    /// The id of the resource, whatever its kind.
    pub fn id(&self) -> ResourceId {
        match self {
            Resource::Cidr(r) => r.id,
            Resource::Dns(r) => r.id,
            Resource::Internet { id } => *id,
        }
    }
}

/// A network resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CidrResource {
    /// Id of the resource.
    pub id: ResourceId,
    /// The network.
    pub address: IpNetwork,
    /// For display.
    pub name: String,
    /// Allow-list; empty allows everything.
    pub filters: Vec<Filter>,
}

/// A name resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsResource {
    /// Id of the resource.
    pub id: ResourceId,
    /// Domain or pattern.
    pub address: String,
    /// For display.
    pub name: String,
    /// Allow-list; empty allows everything.
    pub filters: Vec<Filter>,
}

/// One entry of a resource's allow-list (§4.2); port ranges are inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// TCP destination ports.
    Tcp {
        /// First port.
        start: u16,
        /// Last port.
        end: u16,
    },
    /// UDP destination ports.
    Udp {
        /// First port.
        start: u16,
        /// Last port.
        end: u16,
    },
    /// All of ICMP or ICMPv6.
    Icmp,
    /// One that we cannot read; allows nothing.
    Unreadable,
}

/// `relays_presence` (§6.2).
#[derive(Debug, Clone, Default)]
pub struct RelaysPresence {
    /// Relays that must no longer be used.
    pub disconnected_ids: Vec<RelayId>,
    /// The recommended set, possibly with known relays.
    pub connected: Vec<RelayEntry>,
}

/// One TURN relay with up to one address per family (§6.1).
#[derive(Debug, Clone)]
pub struct RelayEntry {
    /// Id of the relay.
    pub id: RelayId,
    /// IPv4 address, if it has one.
    pub v4: Option<SocketAddr>,
    /// IPv6 address, if it has one.
    pub v6: Option<SocketAddr>,
    /// TURN user name.
    pub username: String,
    /// TURN password.
    pub password: SecretString,
    /// Unix seconds at which the credentials end.
    pub expires_at: u64,
}
