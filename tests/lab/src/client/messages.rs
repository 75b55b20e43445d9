//! Messages of the client's Phoenix channel, protocol v2 (portal-channel spec §7.2), and the
//! framing they travel in (serializer v1, §1.6).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ip_network::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

/// The topic every client message is sent on.
pub const TOPIC: &str = "client";

/// Text that must not show up in logs.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps `value`.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A 32-byte key as standard base64 with padding (portal-channel spec §4.2).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key(pub [u8; 32]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[key]")
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD
            .decode(text)
            .map_err(|_| serde::de::Error::custom("key is not base64"))?;
        let bytes = <[u8; 32]>::try_from(bytes)
            .map_err(|_| serde::de::Error::custom("key is not 32 bytes long"))?;
        Ok(Self(bytes))
    }
}

/// This client's tunnel addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Interface {
    /// IPv4 address inside the tunnel.
    pub ipv4: Ipv4Addr,
    /// IPv6 address inside the tunnel.
    pub ipv6: Ipv6Addr,
}

/// What a resource covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResourceKind {
    /// A network, or one address as a /32 or /128.
    Cidr(IpNetwork),
    /// A domain or a pattern.
    Dns(String),
    /// Everything that is not private.
    Internet,
}

/// Something the user may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Identity.
    pub id: Uuid,
    /// Display name; empty for the internet resource.
    pub name: String,
    /// Coverage.
    pub kind: ResourceKind,
}

impl Resource {
    /// Reads one resource object.
    ///
    /// # Errors
    /// In words, for an unknown `type` or a missing or malformed member.
    pub fn decode(value: &Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(tag = "type", rename_all = "snake_case")]
        enum Wire {
            Cidr {
                id: Uuid,
                #[serde(default)]
                name: String,
                address: String,
            },
            Dns {
                id: Uuid,
                #[serde(default)]
                name: String,
                address: String,
            },
            Internet {
                id: Uuid,
            },
        }
        match Wire::deserialize(value).map_err(|e| e.to_string())? {
            Wire::Cidr { id, name, address } => {
                let network = parse_network(&address)?;
                Ok(Self {
                    id,
                    name,
                    kind: ResourceKind::Cidr(network),
                })
            }
            Wire::Dns { id, name, address } => Ok(Self {
                id,
                name,
                kind: ResourceKind::Dns(address),
            }),
            Wire::Internet { id } => Ok(Self {
                id,
                name: String::new(),
                kind: ResourceKind::Internet,
            }),
        }
    }
}

fn parse_network(text: &str) -> Result<IpNetwork, String> {
    if let Ok(network) = text.parse::<IpNetwork>() {
        return Ok(network);
    }
    // Host bits set: a portal that stores what an admin typed may send them.
    let (ip, prefix) = match text.split_once('/') {
        Some((ip, prefix)) => (ip, prefix.parse().ok()),
        None => (text, None),
    };
    let ip = ip
        .parse::<std::net::IpAddr>()
        .map_err(|_| format!("{text} is not a network"))?;
    let prefix = prefix.unwrap_or(if ip.is_ipv4() { 32 } else { 128 });
    IpNetwork::new_truncate(ip, prefix).map_err(|_| format!("{text} is not a network"))
}

/// A relay entry (portal-channel spec §6.1).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RelayEntry {
    /// Identity; both addresses of a dual-stack relay share it.
    pub id: Uuid,
    /// `turn`; `stun` entries are ignored.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it listens.
    pub addr: SocketAddr,
    /// TURN long-term user name.
    #[serde(default)]
    pub username: String,
    /// TURN long-term password.
    #[serde(default = "no_secret")]
    pub password: Secret,
}

fn no_secret() -> Secret {
    Secret::new("")
}

/// ICE user name fragment and password of one side.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct IceCredentials {
    /// ufrag.
    pub username: String,
    /// pwd.
    pub password: Secret,
}

/// `init`.
#[derive(Debug, Clone)]
pub struct Init {
    /// Tunnel addresses.
    pub interface: Interface,
    /// Everything reachable; malformed entries were skipped.
    pub resources: Vec<Resource>,
    /// Relays, ungrouped.
    pub relays: Vec<RelayEntry>,
}

/// `authorization_created`.
#[derive(Debug, Clone, Deserialize)]
pub struct AuthorizationCreated {
    /// For which resource.
    pub resource_id: Uuid,
    /// Through which gateway.
    pub gateway_id: Uuid,
    /// WireGuard key of the gateway.
    pub gateway_public_key: Key,
    /// Its tunnel address.
    pub gateway_ipv4: Ipv4Addr,
    /// Its tunnel address.
    pub gateway_ipv6: Ipv6Addr,
    /// WireGuard preshared key.
    pub preshared_key: Key,
    /// Ours.
    pub client_ice_credentials: IceCredentials,
    /// Theirs.
    pub gateway_ice_credentials: IceCredentials,
    /// Whether both sides announced ICE-less path finding; this client never does.
    #[serde(default)]
    pub use_iceless: bool,
}

/// A message pushed by the portal.
#[derive(Debug, Clone)]
pub enum Ingress {
    /// State of the world, after each join.
    Init(Init),
    /// New tunnel addresses.
    ConfigChanged(Interface),
    /// Changes of the relay set.
    RelaysPresence {
        /// To be dropped.
        disconnected_ids: Vec<Uuid>,
        /// To be added or refreshed.
        connected: Vec<RelayEntry>,
    },
    /// A resource appeared or changed.
    ResourceUpserted(Resource),
    /// A resource is gone.
    ResourceDeleted(Uuid),
    /// Access was granted.
    AuthorizationCreated(Box<AuthorizationCreated>),
    /// Access was refused.
    AuthorizationFailed {
        /// For which resource.
        resource_id: Uuid,
        /// `offline`, `not_found`, `version_mismatch`, …
        reason: String,
    },
    /// Candidates of a gateway.
    IceCandidates {
        /// Whose.
        gateway_id: Uuid,
        /// SDP candidate lines.
        candidates: Vec<String>,
    },
    /// Candidates a gateway no longer has.
    InvalidateIceCandidates {
        /// Whose.
        gateway_id: Uuid,
        /// SDP candidate lines.
        candidates: Vec<String>,
    },
}

impl Ingress {
    /// Decodes a pushed event; `Ok(None)` for events this client has no use for.
    ///
    /// # Errors
    /// In words, for a payload that lacks required members.
    pub fn decode(event: &str, payload: Value) -> Result<Option<Self>, String> {
        #[derive(Deserialize)]
        struct WireInit {
            interface: Interface,
            #[serde(default)]
            resources: Vec<Value>,
            #[serde(default)]
            relays: Vec<RelayEntry>,
        }
        #[derive(Deserialize)]
        struct WireConfig {
            interface: Interface,
        }
        #[derive(Deserialize)]
        struct WirePresence {
            #[serde(default)]
            disconnected_ids: Vec<Uuid>,
            #[serde(default)]
            connected: Vec<RelayEntry>,
        }
        #[derive(Deserialize)]
        struct WireFailed {
            resource_id: Uuid,
            reason: String,
        }
        #[derive(Deserialize)]
        struct WireCandidates {
            gateway_id: Uuid,
            candidates: Vec<String>,
        }
        fn parse<T: serde::de::DeserializeOwned>(payload: Value) -> Result<T, String> {
            serde_json::from_value(payload).map_err(|e| e.to_string())
        }

        Ok(Some(match event {
            "init" => {
                let wire: WireInit = parse(payload)?;
                let resources = wire
                    .resources
                    .iter()
                    .filter_map(|value| {
                        Resource::decode(value)
                            .inspect_err(|e| tracing::warn!("skipping a resource: {e}"))
                            .ok()
                    })
                    .collect();
                Self::Init(Init {
                    interface: wire.interface,
                    resources,
                    relays: wire.relays,
                })
            }
            "config_changed" => Self::ConfigChanged(parse::<WireConfig>(payload)?.interface),
            "relays_presence" => {
                let wire: WirePresence = parse(payload)?;
                Self::RelaysPresence {
                    disconnected_ids: wire.disconnected_ids,
                    connected: wire.connected,
                }
            }
            "resource_created_or_updated" => Self::ResourceUpserted(Resource::decode(&payload)?),
            "resource_deleted" => Self::ResourceDeleted(parse(payload)?),
            "authorization_created" => Self::AuthorizationCreated(Box::new(parse(payload)?)),
            "authorization_creation_failed" => {
                let wire: WireFailed = parse(payload)?;
                Self::AuthorizationFailed {
                    resource_id: wire.resource_id,
                    reason: wire.reason,
                }
            }
            "ice_candidates" | "gateway_ice_candidates" => {
                let wire: WireCandidates = parse(payload)?;
                Self::IceCandidates {
                    gateway_id: wire.gateway_id,
                    candidates: wire.candidates,
                }
            }
            "invalidate_ice_candidates" | "invalidate_gateway_ice_candidates" => {
                let wire: WireCandidates = parse(payload)?;
                Self::InvalidateIceCandidates {
                    gateway_id: wire.gateway_id,
                    candidates: wire.candidates,
                }
            }
            _ => return Ok(None),
        }))
    }
}

/// A message pushed by the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Egress {
    /// Asks for access to a resource.
    RequestAuthorization {
        /// Which.
        resource_id: Uuid,
        /// Gateways a connection exists to; the portal prefers these.
        connected_gateway_ids: Vec<Uuid>,
    },
    /// New local candidates, highest priority first.
    NewGatewayIceCandidates {
        /// For whom.
        gateway_id: Uuid,
        /// SDP candidate lines.
        candidates: Vec<String>,
    },
    /// Local candidates that are gone.
    InvalidateGatewayIceCandidates {
        /// For whom.
        gateway_id: Uuid,
        /// SDP candidate lines.
        candidates: Vec<String>,
    },
    /// Asks for relays.
    NoRelays,
    /// What path finding this client speaks.
    SetSnownetCapabilities {
        /// Always false here.
        iceless: bool,
    },
}

impl Egress {
    /// Event name and payload.
    pub fn encode(&self) -> (&'static str, Value) {
        match self {
            Self::RequestAuthorization {
                resource_id,
                connected_gateway_ids,
            } => (
                "request_authorization",
                json!({"resource_id": resource_id, "connected_gateway_ids": connected_gateway_ids}),
            ),
            Self::NewGatewayIceCandidates {
                gateway_id,
                candidates,
            } => (
                "new_gateway_ice_candidates",
                json!({"gateway_id": gateway_id, "candidates": candidates}),
            ),
            Self::InvalidateGatewayIceCandidates {
                gateway_id,
                candidates,
            } => (
                "invalidate_gateway_ice_candidates",
                json!({"gateway_id": gateway_id, "candidates": candidates}),
            ),
            Self::NoRelays => ("no_relays", json!({})),
            Self::SetSnownetCapabilities { iceless } => {
                ("set_snownet_capabilities", json!({"iceless": iceless}))
            }
        }
    }
}

/// An outgoing frame: keys in the order the reference emits them (§1.6).
#[derive(Debug, Serialize)]
pub struct FrameOut<'a> {
    /// `client` or `phoenix`.
    pub topic: &'a str,
    /// Event name.
    pub event: &'a str,
    /// JSON `null` for the join.
    pub payload: Value,
    /// Numeric, counting from 0 on every connection.
    #[serde(rename = "ref")]
    pub reference: u64,
}

/// An incoming frame. A string `ref` makes it undecodable, as in the reference (§1.6).
#[derive(Debug, Deserialize)]
pub struct FrameIn {
    /// Topic.
    pub topic: String,
    /// Event name.
    pub event: String,
    /// Payload.
    #[serde(default)]
    pub payload: Value,
    /// Echo of our number in replies.
    #[serde(rename = "ref", default)]
    pub reference: Option<u64>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn init_skips_a_malformed_resource_and_keeps_the_rest() {
        let payload = json!({
            "interface": {"ipv4": "100.70.1.5", "ipv6": "fd00:2021:1111::1:5", "search_domain": null},
            "resources": [
                {"type": "cidr", "id": "0b0b0b0b-1111-4222-8333-444444444444", "address": "10.20.0.0/16", "name": "Lab net", "filters": []},
                {"type": "static_device_pool", "id": "0b0b0b0b-1111-4222-8333-444444444445", "devices": []},
                {"type": "internet", "id": "0b0b0b0b-1111-4222-8333-444444444446", "can_be_disabled": true}
            ],
            "relays": [{"id": "271a413b-d339-4570-9fdc-eaec41f14f11", "type": "turn", "addr": "[2001:db8::9]:3478",
                        "username": "u", "password": "hunter2", "expires_at": 2145916800}],
            "flow_logs": {"api_url": "", "upload_interval_secs": 0, "upload_batch_size": 0}
        });
        let Some(Ingress::Init(init)) = Ingress::decode("init", payload).unwrap() else {
            panic!("not an init");
        };
        assert_eq!(init.resources.len(), 2);
        assert_eq!(
            init.resources[0].kind,
            ResourceKind::Cidr("10.20.0.0/16".parse().unwrap())
        );
        assert_eq!(init.resources[1].kind, ResourceKind::Internet);
        assert_eq!(init.relays[0].password.expose(), "hunter2");
        assert!(!format!("{init:?}").contains("hunter2"));
    }

    #[test]
    fn resource_deleted_is_a_bare_string() {
        let id = "0b0b0b0b-1111-4222-8333-444444444446";
        let decoded = Ingress::decode("resource_deleted", json!(id)).unwrap();
        assert!(matches!(decoded, Some(Ingress::ResourceDeleted(x)) if x.to_string() == id));
    }

    #[test]
    fn a_short_key_rejects_the_whole_authorization() {
        let payload = json!({
            "resource_id": "0b0b0b0b-1111-4222-8333-444444444444",
            "gateway_id": "0b0b0b0b-1111-4222-8333-444444444445",
            "gateway_public_key": "AAAA", "gateway_ipv4": "100.64.0.1", "gateway_ipv6": "fd00:2021:1111::1",
            "preshared_key": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
            "client_ice_credentials": {"username": "a", "password": "b"},
            "gateway_ice_credentials": {"username": "c", "password": "d"}
        });
        assert!(Ingress::decode("authorization_created", payload).is_err());
    }

    #[test]
    fn unknown_events_are_not_errors() {
        assert!(
            Ingress::decode("something_new", json!({}))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn join_frame_matches_the_reference_byte_for_byte() {
        let frame = FrameOut {
            topic: TOPIC,
            event: "phx_join",
            payload: Value::Null,
            reference: 0,
        };
        assert_eq!(
            serde_json::to_string(&frame).unwrap(),
            r#"{"topic":"client","event":"phx_join","payload":null,"ref":0}"#
        );
    }

    #[test]
    fn string_refs_make_a_frame_undecodable() {
        let text = r#"{"topic":"client","event":"phx_reply","payload":{},"ref":"1"}"#;
        assert!(serde_json::from_str::<FrameIn>(text).is_err());
    }

    #[test]
    fn host_bits_in_a_network_are_tolerated() {
        assert_eq!(
            parse_network("10.1.2.3/16").unwrap(),
            "10.1.0.0/16".parse::<IpNetwork>().unwrap()
        );
        assert_eq!(
            parse_network("10.1.2.3").unwrap(),
            "10.1.2.3/32".parse::<IpNetwork>().unwrap()
        );
        assert!(parse_network("corp.example").is_err());
    }
}
