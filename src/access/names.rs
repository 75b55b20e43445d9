//! What a client's made-up addresses stand for (data-path spec §6.2, §6.4).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::limits::{MAX_PROXIES, MAX_PROXIES_OF_DOMAIN};
use super::ranges;
use crate::ids::ResourceId;
use crate::packet::FlowHash;

/// What a domain resolves to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolved {
    /// IPv4 addresses; `None` if the question could not be answered.
    pub ipv4: Option<Vec<Ipv4Addr>>,
    /// IPv6 addresses; `None` if the question could not be answered.
    pub ipv6: Option<Vec<Ipv6Addr>>,
}

impl Resolved {
    /// Whether neither question could be answered.
    pub fn is_failure(&self) -> bool {
        self.ipv4.is_none() && self.ipv6.is_none()
    }
}

/// What an announcement did besides what it asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Announced {
    /// The client had given an address to another domain before: everything known was forgotten.
    pub renumbered: bool,
    /// Domains that were forgotten for lack of room.
    pub evicted: usize,
}

/// The domains and proxy addresses of one client.
#[derive(Debug, Default)]
pub(super) struct Names {
    proxies: HashMap<IpAddr, Proxy, FlowHash>,
    /// Each has at least one proxy address, so that the bound on those bounds domains, too. Clients
    /// choose the names freely, and [`FlowHash`] does not claim to withstand who aims at it.
    domains: HashMap<Arc<str>, Domain>,
    /// The domains by [`Domain::used`]: the first was announced longest ago.
    by_age: BTreeMap<u64, Arc<str>>,
    announcements: u64,
}

#[derive(Debug)]
struct Proxy {
    domain: Arc<str>,
    resolved: Option<IpAddr>,
}

#[derive(Debug, Default)]
struct Domain {
    resources: BTreeSet<ResourceId>,
    /// In the order of their announcement.
    proxies: Vec<IpAddr>,
    ipv4: Vec<Ipv4Addr>,
    ipv6: Vec<Ipv6Addr>,
    /// Number of the announcement that named it last.
    used: u64,
}

impl Domain {
    /// Whether it stands for no address at all.
    fn is_nowhere(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }
}

impl Names {
    /// Takes an announcement over. A question that could not be answered leaves what was known; if
    /// neither could, and no address was known, nothing is taken over. Addresses outside the proxy
    /// ranges are left out: nothing looks them up, nor a domain without any other.
    pub(super) fn announce(
        &mut self,
        domain: &str,
        resource: ResourceId,
        proxies: &[IpAddr],
        resolved: &Resolved,
    ) -> Announced {
        let name: Arc<str> = domain.to_ascii_lowercase().into();
        let mut done = Announced::default();
        let taken = |p: &IpAddr| self.proxies.get(p).is_some_and(|p| p.domain != name);
        if proxies.iter().any(taken) {
            done.renumbered = true;
            *self = Self {
                announcements: self.announcements,
                ..Self::default()
            };
        }
        let proxies = proxies.iter().copied().filter(|p| ranges::is_proxy(*p));
        let known = self.domains.get(&name);
        let is_useless = resolved.is_failure() && known.is_none_or(Domain::is_nowhere)
            || known.is_none() && proxies.clone().next().is_none();
        if is_useless {
            return done;
        }
        self.announcements += 1;

        let entry = self.domains.entry(Arc::clone(&name)).or_default();
        self.by_age.remove(&entry.used);
        entry.used = self.announcements;
        self.by_age.insert(entry.used, Arc::clone(&name));
        entry.resources.insert(resource);
        for proxy in proxies {
            if entry.proxies.len() < MAX_PROXIES_OF_DOMAIN && !entry.proxies.contains(&proxy) {
                entry.proxies.push(proxy);
            }
        }
        if let Some(addresses) = &resolved.ipv4 {
            entry.ipv4 = sorted(addresses, |a| is_forwardable((*a).into()));
        }
        if let Some(addresses) = &resolved.ipv6 {
            entry.ipv6 = sorted(addresses, |a| is_forwardable((*a).into()));
        }

        let (mut v4, mut v6) = (entry.ipv4.iter().cycle(), entry.ipv6.iter().cycle());
        for &proxy in &entry.proxies {
            let resolved = match proxy {
                IpAddr::V4(_) => v4.next().map(|a| IpAddr::V4(*a)),
                IpAddr::V6(_) => v6.next().map(|a| IpAddr::V6(*a)),
            };
            let domain = Arc::clone(&name);
            self.proxies.insert(proxy, Proxy { domain, resolved });
        }
        while self.proxies.len() > MAX_PROXIES {
            let Some((_, oldest)) = self.by_age.pop_first() else {
                break;
            };
            self.forget(&oldest);
            done.evicted += 1;
        }
        done
    }

    fn forget(&mut self, name: &str) {
        let Some(domain) = self.domains.remove(name) else {
            return;
        };
        self.by_age.remove(&domain.used);
        for proxy in domain.proxies {
            self.proxies.remove(&proxy);
        }
    }

    /// Keeps, of what was announced, the pairs of resource and domain that `keep` says.
    pub(super) fn retain(&mut self, keep: impl Fn(ResourceId, &str) -> bool) {
        let mut orphans = Vec::new();
        for (name, domain) in &mut self.domains {
            domain.resources.retain(|resource| keep(*resource, name));
            if domain.resources.is_empty() {
                orphans.push(Arc::clone(name));
            }
        }
        for name in orphans {
            self.forget(&name);
        }
    }

    /// Whether a domain was announced for a resource, and stands for some address.
    pub(super) fn is_known(&self, domain: &str, resource: ResourceId) -> bool {
        self.domains
            .get(domain.to_ascii_lowercase().as_str())
            .is_some_and(|d| d.resources.contains(&resource) && !d.is_nowhere())
    }

    /// The resources that an announced address belongs to.
    pub(super) fn resources(&self, proxy: IpAddr) -> Option<&BTreeSet<ResourceId>> {
        let domain = &self.proxies.get(&proxy)?.domain;
        self.domains.get(domain).map(|d| &d.resources)
    }

    /// What an announced address stands for.
    #[cfg(test)]
    fn resolved(&self, proxy: IpAddr) -> Option<IpAddr> {
        self.proxies.get(&proxy)?.resolved
    }

    /// What an announced address stands for, with its domain.
    pub(super) fn target(&self, proxy: IpAddr) -> Option<(IpAddr, Arc<str>)> {
        let proxy = self.proxies.get(&proxy)?;
        Some((proxy.resolved?, Arc::clone(&proxy.domain)))
    }

    /// Numbers of domains and of proxy addresses.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.domains.len(), self.proxies.len())
    }
}

/// Ascending, each address once.
fn sorted<A: Ord + Copy>(addresses: &[A], keep: impl Fn(&A) -> bool) -> Vec<A> {
    let kept: BTreeSet<A> = addresses.iter().copied().filter(keep).collect();
    kept.into_iter().collect()
}

/// Whether a packet for this address can leave the gateway by routing. A name that stands for
/// anything else, by mistake or because somebody else answers for it, must not reach the gateway
/// itself, another client, or many hosts at once.
fn is_forwardable(address: IpAddr) -> bool {
    if ranges::is_tunnel(address) || ranges::is_proxy(address) {
        return false;
    }
    match address {
        IpAddr::V4(a) => {
            // Link-local addresses are where clouds keep their machines' credentials.
            !(a.is_loopback()
                || a.is_link_local()
                || a.is_multicast()
                || a.is_broadcast()
                || a.octets()[0] == 0)
        }
        IpAddr::V6(a) => {
            !(a.is_loopback()
                || a.is_multicast()
                || a.is_unspecified()
                || a.is_unicast_link_local()
                || a.to_ipv4_mapped().is_some())
        }
    }
}

#[cfg(test)]
#[path = "names_tests.rs"]
mod tests;
