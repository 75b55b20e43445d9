//! One client: its grants, the names it has announced, and what these let through.

use std::fmt;
use std::net::IpAddr;
use std::sync::LazyLock;

use ip_network::IpNetwork;

use super::packet::{Body, Packet};
use super::talk::{Flow, Millis, Talk, Until};
use crate::access::fixtures::{GATEWAY4, GATEWAY6, addr4, addr6};
use crate::access::{Reply, Unannounced};
use crate::ids::ResourceId;
use crate::portal::messages::{Filter, Resource};

type Nets = LazyLock<Vec<IpNetwork>>;

static TUNNEL: Nets = LazyLock::new(|| nets("100.64.0.0/11 fd00:2021:1111::/107"));
static PROXY: Nets = LazyLock::new(|| nets("100.96.0.0/11 fd00:2021:1111:8000::/107"));
static MULTICAST: Nets = LazyLock::new(|| nets("224.0.0.0/4 ff00::/8"));
static NOT_INTERNET: Nets = LazyLock::new(|| {
    nets(
        "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 127.0.0.0/8 169.254.0.0/16 100.64.0.0/10 \
         224.0.0.0/4 240.0.0.0/4 0.0.0.0/8 ::/96 ::ffff:0:0/96 fc00::/7 fe80::/10 fec0::/10 \
         ff00::/8 64:ff9b::a00:0/104",
    )
});
/// Where a name may not lead.
static NOT_FOR_NAMES: Nets = LazyLock::new(|| {
    nets(
        "100.64.0.0/11 100.96.0.0/11 127.0.0.0/8 224.0.0.0/4 255.255.255.255/32 0.0.0.0/8 \
         fd00:2021:1111::/107 fd00:2021:1111:8000::/107 ::1/128 ::/128 ff00::/8 fe80::/10 \
         ::ffff:0:0/96",
    )
});

fn nets(list: &str) -> Vec<IpNetwork> {
    list.split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect()
}

fn within(nets: &Nets, address: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(address))
}

pub(super) fn is_gateway(address: IpAddr) -> bool {
    address == IpAddr::from(GATEWAY4) || address == GATEWAY6.parse::<IpAddr>().unwrap()
}

pub(super) fn is_proxy(address: IpAddr) -> bool {
    within(&PROXY, address)
}

pub(super) fn is_tunnel(address: IpAddr) -> bool {
    within(&TUNNEL, address)
}

/// Whether a name may lead there.
pub(super) fn is_for_names(address: IpAddr) -> bool {
    !within(&NOT_FOR_NAMES, address)
}

#[derive(Debug)]
pub(super) struct Grant {
    pub(super) resource: Resource,
    pub(super) expires_at: Option<u64>,
    pub(super) ends: Until,
}

impl Grant {
    pub(super) fn is_valid(&self, now: Millis) -> bool {
        self.ends.is_none_or(|end| now < end)
    }

    pub(super) fn is_dns(&self) -> bool {
        matches!(self.resource, Resource::Dns(_))
    }
}

/// A name and what the client has announced for it.
#[derive(Debug)]
pub(super) struct Name {
    pub(super) name: String,
    pub(super) resources: Vec<ResourceId>,
    /// In the order in which they were first announced.
    pub(super) proxies: Vec<IpAddr>,
    /// Ascending, of both families.
    pub(super) addresses: Vec<IpAddr>,
}

impl Name {
    /// Addresses of one family are given out in turn.
    pub(super) fn resolve(&self, proxy: IpAddr) -> Option<IpAddr> {
        let of_family = |list: &[IpAddr]| -> Vec<IpAddr> {
            let alike = |a: &&IpAddr| a.is_ipv4() == proxy.is_ipv4();
            list.iter().filter(alike).copied().collect()
        };
        let position = of_family(&self.proxies).iter().position(|p| *p == proxy)?;
        let addresses = of_family(&self.addresses);
        addresses.get(position % addresses.len().max(1)).copied()
    }
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) n: u8,
    /// Number of its pair of tunnel addresses.
    pub(super) address: u8,
    pub(super) grants: Vec<Grant>,
    pub(super) names: Vec<Name>,
    pub(super) flows: Vec<Flow>,
}

impl Client {
    pub(super) fn holds(&self, address: IpAddr) -> bool {
        address == IpAddr::from(addr4(self.address))
            || address == addr6(self.address).parse::<IpAddr>().unwrap()
    }

    pub(super) fn valid(&self, now: Millis) -> Vec<&Grant> {
        self.grants.iter().filter(|g| g.is_valid(now)).collect()
    }

    pub(super) fn name_of(&self, proxy: IpAddr) -> Option<&Name> {
        self.names.iter().find(|n| n.proxies.contains(&proxy))
    }

    /// All its addresses that stand for a name.
    pub(super) fn proxies(&self) -> Vec<IpAddr> {
        self.names.iter().flat_map(|n| n.proxies.clone()).collect()
    }

    pub(super) fn may_announce(
        &self,
        resource: ResourceId,
        domain: &str,
        now: Millis,
    ) -> Result<(), Unannounced> {
        let valid = self.valid(now);
        let grant = valid.iter().find(|g| g.resource.id() == resource);
        match &grant.ok_or(Unannounced::NotAuthorized)?.resource {
            Resource::Dns(r) if covers(&r.address, domain) => Ok(()),
            Resource::Dns(_) => Err(Unannounced::NotCovered),
            _ => Err(Unannounced::NotDns),
        }
    }

    pub(super) fn sizes(&self) -> (usize, usize) {
        let proxies = self.names.iter().map(|n| n.proxies.len()).sum();
        (self.names.len(), proxies)
    }

    pub(super) fn live_flows(&self, now: Millis) -> usize {
        self.flows.iter().filter(|f| f.is_live(now)).count()
    }

    /// A flow does not outlive the name it leads to.
    pub(super) fn forget_names(&mut self, which: impl Fn(&Name) -> bool) {
        let flows = &mut self.flows;
        self.names.retain(|name| {
            if which(name) {
                flows.retain(|f| f.name != name.name);
            }
            !which(name)
        });
    }

    /// What is open to whoever has any access.
    pub(super) fn any_grant(&self, now: Millis) -> Result<Until, Option<Reply>> {
        latest(&self.valid(now)).ok_or(Some(Reply::Prohibited))
    }

    /// Until when a packet to or from `remote` is covered by a grant, else what to answer.
    pub(super) fn classify(
        &self,
        remote: IpAddr,
        protocol: u8,
        port: u16,
        now: Millis,
    ) -> Result<Until, Option<Reply>> {
        let valid = self.valid(now);
        let mut internet = valid.clone();
        internet.retain(|g| matches!(g.resource, Resource::Internet { .. }));
        let internet = latest(&internet);
        if let Some(until) = internet
            && !is_proxy(remote)
        {
            return if within(&NOT_INTERNET, remote) {
                Err(Some(Reply::Unreachable))
            } else {
                Ok(until)
            };
        }
        let name = self.name_of(remote);
        let mut candidates = Vec::new();
        for grant in &valid {
            let (id, filters, prefix) = match &grant.resource {
                Resource::Cidr(r) if internet.is_none() && r.address.contains(remote) => {
                    (r.id, &r.filters, r.address.netmask())
                }
                Resource::Dns(r) if name.is_some_and(|n| n.resources.contains(&r.id)) => {
                    (r.id, &r.filters, if remote.is_ipv4() { 32 } else { 128 })
                }
                _ => continue,
            };
            candidates.push((permits(filters, protocol, port), prefix, id, grant.ends));
        }
        candidates.sort_by_key(|(permitted, prefix, id, _)| (*permitted, *prefix, *id));
        let unknown = is_proxy(remote) && name.is_none();
        match candidates.last() {
            _ if unknown && valid.iter().any(|g| g.is_dns()) => Err(Some(Reply::Unreachable)),
            Some((true, ..)) if unknown => Err(Some(Reply::Unreachable)),
            Some((true, .., until)) => Ok(*until),
            _ => Err(Some(Reply::Prohibited)),
        }
    }

    pub(super) fn judge_outbound(
        &self,
        packet: &Packet,
        open_ports: Option<&[Filter]>,
        now: Millis,
    ) -> Result<Until, Option<Reply>> {
        if within(&MULTICAST, packet.dst) || matches!(packet.body, Body::Error { .. }) {
            return Err(None);
        }
        if !self.holds(packet.src) {
            return Err(Some(Reply::Prohibited));
        }
        let port = Talk::sent(packet).remote_port;
        if is_gateway(packet.dst) {
            let serves = match packet.body {
                Body::Tcp { to, .. } | Body::Udp { to, .. } => to == 53_535,
                Body::Echo { .. } => true,
                _ => false,
            };
            let opened = open_ports.is_some_and(|list| permits(list, packet.protocol(), port));
            return if serves || opened {
                self.any_grant(now)
            } else {
                Err(Some(Reply::Prohibited))
            };
        }
        if is_tunnel(packet.dst) {
            return Err(Some(Reply::Prohibited));
        }
        self.classify(packet.dst, packet.protocol(), port, now)
    }
}

/// The latest end of these grants; `None` if there are none.
fn latest(grants: &[&Grant]) -> Option<Until> {
    if grants.iter().any(|g| g.ends.is_none()) {
        return Some(None);
    }
    grants.iter().map(|g| g.ends).max()
}

fn permits(filters: &[Filter], protocol: u8, port: u16) -> bool {
    filters.is_empty()
        || filters.iter().any(|filter| match *filter {
            Filter::Tcp { start, end } => protocol == 6 && (start..=end).contains(&port),
            Filter::Udp { start, end } => protocol == 17 && (start..=end).contains(&port),
            Filter::Icmp => [1, 58].contains(&protocol),
            Filter::Unreadable => false,
        })
}

/// Whether a DNS resource's pattern covers a name.
pub(super) fn covers(pattern: &str, name: &str) -> bool {
    fn labels(pattern: &[&str], name: &[&str]) -> bool {
        match (pattern, name) {
            ([], []) => true,
            (["**", rest @ ..], _) => {
                labels(rest, name) || (!name.is_empty() && labels(pattern, &name[1..]))
            }
            ([p, ps @ ..], [n, ns @ ..]) => letters(p.as_bytes(), n.as_bytes()) && labels(ps, ns),
            _ => false,
        }
    }
    fn letters(pattern: &[u8], label: &[u8]) -> bool {
        match (pattern, label) {
            ([], []) => true,
            ([b'*', rest @ ..], _) => {
                letters(rest, label) || (!label.is_empty() && letters(pattern, &label[1..]))
            }
            ([p, ps @ ..], [l, ls @ ..]) => (*p == b'?' || p == l) && letters(ps, ls),
            _ => false,
        }
    }
    let (pattern, name) = (pattern.to_lowercase(), name.to_lowercase());
    let pattern: Vec<&str> = pattern.split('.').collect();
    let name: Vec<&str> = name.split('.').collect();
    labels(&pattern, &name) || (pattern[0] == "*" && labels(&pattern[1..], &name))
}
/// The number by which the tests call a resource.
pub(super) fn short(id: &ResourceId) -> u8 {
    (id.0.as_u128() & 0xFF) as u8
}

/// A grant in words.
pub(super) struct Granted<'a>(pub(super) &'a Resource, pub(super) Until);

impl fmt::Display for Granted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = short(&self.0.id());
        match self.0 {
            Resource::Cidr(r) => write!(f, "resource {n} = {}, {:?}", r.address, r.filters)?,
            Resource::Dns(r) => write!(f, "resource {n} = {}, {:?}", r.address, r.filters)?,
            Resource::Internet { .. } => write!(f, "resource {n} = Internet")?,
        }
        match self.1 {
            Some(end) => write!(f, " until {end}"),
            None => write!(f, " for good"),
        }
    }
}
