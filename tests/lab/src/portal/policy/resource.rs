//! Resources: what they are, and how gateways and clients are told of them.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};
use ip_network::IpNetwork;
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Site, Ttl};

/// Something to reach (§4.4).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resource {
    /// Id.
    pub id: Uuid,
    /// Kind.
    #[serde(rename = "type")]
    pub kind: ResourceKind,
    /// Name; "Internet" for that kind.
    #[serde(default)]
    pub name: String,
    /// Domain or pattern, or network; a single address is a network too.
    #[serde(default)]
    pub address: Option<String>,
    /// For display on clients.
    #[serde(default)]
    pub address_description: Option<String>,
    /// Address families of a name.
    #[serde(default)]
    pub ip_stack: IpStack,
    /// Allow-list; empty allows everything.
    #[serde(default)]
    pub filters: Vec<Filter>,
    /// Site, by name or id, whose gateways reach it.
    #[serde(default)]
    pub site: Option<String>,
    /// How long a grant for it lasts.
    #[serde(default)]
    pub expires_in: Option<Ttl>,
}

/// Kind of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResourceKind {
    /// A network.
    Cidr,
    /// A domain name or pattern.
    Dns,
    /// Every public destination.
    Internet,
}

/// Address families of a name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IpStack {
    /// Both.
    #[default]
    Dual,
    /// IPv4.
    Ipv4Only,
    /// IPv6.
    Ipv6Only,
}

/// One entry of an allow-list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Protocol.
    pub protocol: FilterProtocol,
    /// Ports and ranges; empty means all.
    #[serde(default)]
    pub ports: Vec<PortRange>,
}

/// Protocol of a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilterProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
}

/// An inclusive range of ports: `443` or `"8000-8100"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// First port.
    pub start: u16,
    /// Last port.
    pub end: u16,
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            One(u16),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::One(port) => Ok(Self {
                start: port,
                end: port,
            }),
            Raw::Text(text) => {
                let (start, end) = text.split_once('-').unwrap_or((&text, &text));
                match (start.trim().parse(), end.trim().parse()) {
                    (Ok(start), Ok(end)) if start <= end => Ok(Self { start, end }),
                    _ => Err(D::Error::invalid_value(
                        Unexpected::Str(&text),
                        &"a port or a range such as 8000-8100",
                    )),
                }
            }
        }
    }
}

impl Resource {
    /// Checks the resource and brings its address into the form that peers get.
    ///
    /// # Errors
    /// If its address does not fit its kind, or a filter contradicts itself.
    pub(super) fn checked(mut self) -> anyhow::Result<Self> {
        match (self.kind, &self.address) {
            (ResourceKind::Internet, None) => {
                ensure!(self.filters.is_empty(), "the internet takes no filters");
                if self.name.is_empty() {
                    self.name = "Internet".to_owned();
                }
            }
            (ResourceKind::Internet, Some(_)) => {
                bail!("the internet has no address")
            }
            (_, None) => bail!("an address is needed"),
            (ResourceKind::Cidr, Some(address)) => {
                self.address =
                    Some(network(address).with_context(|| {
                        format!("{address:?} is neither an address nor a network")
                    })?);
            }
            (ResourceKind::Dns, Some(address)) => {
                ensure!(!address.is_empty(), "the address is empty");
            }
        }
        for filter in &self.filters {
            ensure!(
                filter.protocol != FilterProtocol::Icmp || filter.ports.is_empty(),
                "ICMP has no ports"
            );
        }
        Ok(self)
    }

    /// Whether `key` is its name or id.
    pub fn is(&self, key: &str) -> bool {
        self.name == key || self.id.to_string() == key
    }

    /// What gateways are told (§4.4).
    pub fn for_gateway(&self) -> Value {
        match self.kind {
            ResourceKind::Internet => json!({"type": "internet", "id": self.id}),
            ResourceKind::Cidr | ResourceKind::Dns => json!({
                "type": self.kind_name(),
                "id": self.id,
                "address": self.address,
                "name": self.name,
                "filters": self.filters_on_the_wire(),
            }),
        }
    }

    /// What clients are told (§7.2).
    pub fn for_client(&self, site: &Site) -> Value {
        let sites = json!([{"id": site.id, "name": site.name}]);
        let mut value = match self.kind {
            ResourceKind::Internet => {
                json!({"type": "internet", "id": self.id, "can_be_disabled": true})
            }
            ResourceKind::Cidr | ResourceKind::Dns => {
                let mut value = self.for_gateway();
                value["address_description"] = json!(self.address_description);
                value
            }
        };
        if self.kind == ResourceKind::Dns {
            value["ip_stack"] = json!(match self.ip_stack {
                IpStack::Dual => "dual",
                IpStack::Ipv4Only => "ipv4_only",
                IpStack::Ipv6Only => "ipv6_only",
            });
        }
        value["sites"] = sites;
        value
    }

    /// Whether a change to `new` is more than a new filter list or name; such a change takes
    /// existing grants back (§4.5).
    pub fn differs_in_kind(&self, new: &Self) -> bool {
        (self.kind, &self.address, self.ip_stack) != (new.kind, &new.address, new.ip_stack)
    }

    fn kind_name(&self) -> &'static str {
        match self.kind {
            ResourceKind::Cidr => "cidr",
            ResourceKind::Dns => "dns",
            ResourceKind::Internet => "internet",
        }
    }

    /// One object per port or range (§4.2).
    fn filters_on_the_wire(&self) -> Vec<Value> {
        let mut entries = Vec::new();
        for filter in &self.filters {
            let protocol = match filter.protocol {
                FilterProtocol::Tcp => "tcp",
                FilterProtocol::Udp => "udp",
                FilterProtocol::Icmp => "icmp",
            };
            if filter.ports.is_empty() {
                entries.push(json!({ "protocol": protocol }));
            }
            entries.extend(filter.ports.iter().map(|range| {
                json!({
                    "protocol": protocol,
                    "port_range_start": range.start,
                    "port_range_end": range.end,
                })
            }));
        }
        entries
    }
}

/// CIDR text of a network or a single address.
fn network(address: &str) -> Option<String> {
    let network: IpNetwork = match address.parse::<IpAddr>() {
        Ok(address) => address.into(),
        Err(_) => address.parse().ok()?,
    };
    Some(network.to_string())
}
