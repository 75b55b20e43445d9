//! The policy file: who may connect, what there is to reach, and through which relays.

mod resource;

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use uuid::Uuid;

use super::derive::{self, FIXED_EXPIRY};
pub use resource::{Filter, FilterProtocol, IpStack, PortRange, Resource, ResourceKind};

/// Realm that every client assumes (portal-channel spec §6.1).
const REALM: &str = "firezone";

/// Grants last 8 hours unless the policy says otherwise.
const DEFAULT_TTL: u64 = 8 * 3600;

/// Contents of the policy file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Account name, for display.
    #[serde(default = "lab")]
    pub account_slug: String,
    /// Tokens that gateways may present.
    #[serde(default)]
    pub gateway_tokens: Vec<GatewayToken>,
    /// Tokens that clients may present.
    #[serde(default)]
    pub client_tokens: Vec<ClientToken>,
    /// Sites; the first is the default of tokens and resources.
    pub sites: Vec<Site>,
    /// What clients may reach.
    #[serde(default)]
    pub resources: Vec<Resource>,
    /// TURN relays in order of preference; the first two are handed out (§6.1).
    #[serde(default)]
    pub relays: Vec<Relay>,
    /// How long a grant lasts, unless its resource says otherwise.
    #[serde(default)]
    pub authorization_ttl: Ttl,
    /// Whether peers that both announce it use ICE-less path finding.
    #[serde(default)]
    pub iceless: bool,
    /// Whether connecting is limited to once a second per address and token (§1.11).
    #[serde(default)]
    pub rate_limit: bool,
    /// Name resolution of clients.
    #[serde(default)]
    pub dns: Dns,
    /// Where gateways are to upload flow logs; nowhere by default.
    #[serde(default)]
    pub flow_logs: Option<FlowLogs>,
}

/// Upload of flow logs (§4.8).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowLogs {
    /// Base of the address.
    pub api_url: String,
    /// Seconds between uploads.
    pub interval: u64,
}

fn lab() -> String {
    "lab".to_owned()
}

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A token for gateways.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayToken {
    /// The token.
    pub token: Secret,
    /// Site, by name or id, that its gateways serve.
    #[serde(default)]
    pub site: Option<String>,
    /// For a token of a single gateway: the external id that it stands for, whatever the gateway
    /// itself says (§1.3).
    #[serde(default)]
    pub owner: Option<String>,
}

/// A token for clients.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientToken {
    /// The token.
    pub token: Secret,
    /// Who uses the client.
    #[serde(default)]
    pub actor: Actor,
    /// Resources, by name or id, that they may reach; all if absent.
    #[serde(default)]
    pub resources: Option<Vec<String>>,
}

/// A person.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Actor {
    /// Id.
    #[serde(default)]
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// Mail address.
    #[serde(default)]
    pub email: Option<String>,
}

impl Default for Actor {
    fn default() -> Self {
        Self {
            id: Uuid::nil(),
            name: "Lab user".to_owned(),
            email: None,
        }
    }
}

/// A group of gateways.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// Id.
    pub id: Uuid,
    /// Name.
    pub name: String,
}

/// A duration in seconds, or `never` for a grant that does not expire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// Seconds.
    Seconds(u64),
    /// No end.
    Never,
}

impl Default for Ttl {
    fn default() -> Self {
        Self::Seconds(DEFAULT_TTL)
    }
}

impl Ttl {
    /// Unix seconds of the end, for a start at `now` (Unix seconds).
    pub fn ends_at(self, now: u64) -> Option<u64> {
        match self {
            Self::Seconds(seconds) => Some(now.saturating_add(seconds)),
            Self::Never => None,
        }
    }
}

impl<'de> Deserialize<'de> for Ttl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Seconds(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Seconds(seconds) => Ok(Self::Seconds(seconds)),
            Raw::Text(text) if text == "never" => Ok(Self::Never),
            Raw::Text(text) => Err(D::Error::invalid_value(
                Unexpected::Str(&text),
                &"a number of seconds or \"never\"",
            )),
        }
    }
}

/// A TURN relay that the portal shares a secret with.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    /// Id. Give a relay whose secret or address changes a new one, as real relays do.
    pub id: Uuid,
    /// IPv4 address and port.
    #[serde(default)]
    pub v4: Option<SocketAddrV4>,
    /// IPv6 address and port.
    #[serde(default)]
    pub v6: Option<SocketAddrV6>,
    /// coturn's `static-auth-secret`.
    pub secret: Secret,
    /// The realm that the relay is configured with. It is not sent to anybody: peers assume
    /// `firezone`.
    #[serde(default)]
    pub realm: Option<String>,
    /// Lifetime of credentials in seconds, counted from when they are handed out; without it they
    /// never change (§6.1).
    #[serde(default)]
    pub credentials_ttl: Option<u64>,
}

impl Relay {
    /// The one or two entries of this relay in `init` and `relays_presence` (§6.1), for the peer
    /// with this base64 public key. IPv4 comes first.
    pub fn entries(&self, public_key: &str, now: u64) -> Vec<Value> {
        let expires_at = self
            .credentials_ttl
            .map_or(FIXED_EXPIRY, |ttl| now.saturating_add(ttl));
        let credentials = derive::coturn_credentials(self.secret.expose(), public_key, expires_at);
        [self.v4.map(SocketAddr::V4), self.v6.map(SocketAddr::V6)]
            .into_iter()
            .flatten()
            .map(|address| {
                json!({
                    "id": self.id,
                    "type": "turn",
                    "addr": address.to_string(),
                    "username": credentials.username,
                    "password": credentials.password,
                    "expires_at": expires_at,
                })
            })
            .collect()
    }
}

/// Name resolution of clients (§7.2).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dns {
    /// Servers for names that are not resources.
    #[serde(default)]
    pub upstream_do53: Vec<IpAddr>,
    /// Search domain.
    #[serde(default)]
    pub search_domain: Option<String>,
}

impl Policy {
    /// Reads and checks a policy file.
    ///
    /// # Errors
    /// If it cannot be read, is not YAML of this form, or contradicts itself.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read policy file {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("policy file {}", path.display()))
    }

    /// Parses and checks a policy.
    ///
    /// # Errors
    /// If it is not YAML of this form, or contradicts itself.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut policy: Self = serde_yaml_ng::from_str(text)?;
        ensure!(!policy.sites.is_empty(), "at least one site is needed");
        let resources = std::mem::take(&mut policy.resources);
        for resource in resources {
            let resource = policy.checked(resource)?;
            ensure!(
                !policy.resources.iter().any(|other| other.id == resource.id),
                "resource id {} is used twice",
                resource.id
            );
            policy.resources.push(resource);
        }
        for token in &policy.gateway_tokens {
            policy.site(token.site.as_deref())?;
        }
        for wanted in policy
            .client_tokens
            .iter()
            .filter_map(|t| t.resources.as_ref())
        {
            for key in wanted {
                ensure!(
                    policy.resource(key).is_some(),
                    "there is no resource {key:?}"
                );
            }
        }
        check_relays(&policy.relays)?;
        Ok(policy)
    }

    /// The site of this name or id; the first one if none is named.
    ///
    /// # Errors
    /// If there is no such site.
    pub fn site(&self, key: Option<&str>) -> anyhow::Result<&Site> {
        match key {
            None => self.sites.first(),
            Some(key) => self
                .sites
                .iter()
                .find(|site| site.name == key || site.id.to_string() == key),
        }
        .with_context(|| format!("there is no site {:?}", key.unwrap_or("at all")))
    }

    /// The resource of this name or id.
    pub fn resource(&self, key: &str) -> Option<&Resource> {
        self.resources.iter().find(|resource| resource.is(key))
    }

    /// Checks a resource and brings its address into the form that peers get.
    ///
    /// # Errors
    /// If its site does not exist or its address does not fit its kind.
    pub fn checked(&self, resource: Resource) -> anyhow::Result<Resource> {
        let id = resource.id;
        self.site(resource.site.as_deref())
            .with_context(|| format!("resource {id}"))?;
        resource.checked().with_context(|| format!("resource {id}"))
    }
}

/// Checks a set of relays.
///
/// # Errors
/// If one has no address or two share an id.
pub fn check_relays(relays: &[Relay]) -> anyhow::Result<()> {
    let mut ids = HashSet::new();
    for relay in relays {
        let id = relay.id;
        ensure!(ids.insert(id), "relay id {id} is used twice");
        ensure!(
            relay.v4.is_some() || relay.v6.is_some(),
            "relay {id} has no address"
        );
        if relay.realm.as_deref().is_some_and(|realm| realm != REALM) {
            tracing::warn!(%id, "peers assume the realm {REALM:?}; this relay has another");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SITE: &str = "sites: [{id: 5a5a5a5a-0000-4000-8000-000000000001, name: Lab}]\n";

    fn parse(rest: &str) -> anyhow::Result<Policy> {
        Policy::parse(&format!("{SITE}{rest}"))
    }

    #[test]
    fn example_file_is_a_valid_policy() {
        let policy = Policy::parse(include_str!("../../../policy.example.yaml")).unwrap();
        assert!(!policy.gateway_tokens.is_empty() && !policy.client_tokens.is_empty());
        assert!(!policy.relays.is_empty());
        for kind in [
            ResourceKind::Cidr,
            ResourceKind::Dns,
            ResourceKind::Internet,
        ] {
            assert!(policy.resources.iter().any(|r| r.kind == kind), "{kind:?}");
        }
    }

    #[test]
    fn single_addresses_become_host_networks_and_filters_one_entry_per_range() {
        let policy = parse(
            r#"
resources:
  - id: 0b0b0b0b-1111-4222-8333-444444444444
    type: cidr
    name: Web
    address: 172.28.0.10
    filters:
      - {protocol: tcp, ports: [443, "8000-8100"]}
      - {protocol: udp}
      - {protocol: icmp}
"#,
        )
        .unwrap();
        assert_eq!(
            policy.resource("Web").unwrap().for_gateway(),
            json!({
                "type": "cidr",
                "id": "0b0b0b0b-1111-4222-8333-444444444444",
                "address": "172.28.0.10/32",
                "name": "Web",
                "filters": [
                    {"protocol": "tcp", "port_range_start": 443, "port_range_end": 443},
                    {"protocol": "tcp", "port_range_start": 8000, "port_range_end": 8100},
                    {"protocol": "udp"},
                    {"protocol": "icmp"},
                ],
            })
        );
    }

    #[test]
    fn contradictions_are_named() {
        let resource = "id: 0b0b0b0b-1111-4222-8333-444444444444, name: A";
        for (text, complaint) in [
            (
                format!("resources: [{{{resource}, type: cidr, address: nonsense}}]"),
                "neither",
            ),
            (
                format!("resources: [{{{resource}, type: dns}}]"),
                "an address is needed",
            ),
            (
                format!("resources: [{{{resource}, type: internet, site: Moon}}]"),
                "no site \"Moon\"",
            ),
            (
                format!("resources: [{{{resource}, type: internet, adress: x}}]"),
                "adress",
            ),
            (
                "gateway_tokens: [{token: t, site: Moon}]".to_owned(),
                "no site",
            ),
            (
                "client_tokens: [{token: t, resources: [X]}]".to_owned(),
                "no resource",
            ),
            (
                "relays: [{id: 0b0b0b0b-1111-4222-8333-444444444444, secret: s}]".to_owned(),
                "no address",
            ),
        ] {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(complaint), "{error}");
        }
    }

    #[test]
    fn dual_stack_relay_is_two_adjacent_entries_with_v4_first() {
        let policy = parse(
            r#"
relays:
  - id: 0c0c0c0c-1111-4222-8333-444444444444
    v6: "[2001:db8::9]:3478"
    v4: "198.51.100.9:3478"
    secret: north
"#,
        )
        .unwrap();
        let entries = policy.relays[0].entries("key", 0);
        assert_eq!(entries[0]["addr"], "198.51.100.9:3478");
        assert_eq!(entries[1]["addr"], "[2001:db8::9]:3478");
        assert_eq!(entries[0]["id"], entries[1]["id"]);
        assert_eq!(entries[0]["password"], entries[1]["password"]);
        assert_eq!(entries[0]["expires_at"], FIXED_EXPIRY);
        assert!(!format!("{policy:?}").contains("north"));
    }
}
