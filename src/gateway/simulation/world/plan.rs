//! Who is where, and how they reach each other.

use super::*;

/// How a site reaches the IPv4 internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in super::super) enum V4 {
    /// Not at all.
    None,
    /// With public addresses.
    Public,
    /// Through a router.
    Behind(Behaviour),
}

/// How a site reaches the IPv6 internet; addresses are always public.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in super::super) enum V6 {
    None,
    Open,
    /// Only answers are let in.
    Stateful,
}

/// The access of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in super::super) struct Access {
    pub(in super::super) v4: V4,
    pub(in super::super) v6: V6,
    pub(in super::super) only_relays: bool,
    pub(in super::super) isolates: bool,
}

/// Where a client is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in super::super) enum Place {
    /// In a site of its own.
    Own(Access, Line),
    /// In the same site as the gateway.
    WithGateway,
    /// In the same site as the client before it.
    WithPrevious,
}

/// What a simulation starts with.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct Plan {
    pub(in super::super) seed: u64,
    pub(in super::super) gateway: (Access, Line),
    pub(in super::super) clients: Vec<Place>,
    /// Families of each relay: IPv4, IPv6.
    pub(in super::super) relays: Vec<(bool, bool)>,
    pub(in super::super) style: Style,
}

/// Puts everybody where the plan says; answers the gateway's host and the clients'.
pub(super) fn populate(plan: &Plan, network: &mut Network) -> (HostId, Vec<HostId>) {
    // All private networks are numbered alike, as home routers do it.
    let mut hosts = Vec::new();
    let mut sites: Vec<(SiteId, Access, u8)> = Vec::new();
    let mut settle = |network: &mut Network, place: Option<(Access, Line)>, at: Option<usize>| {
        let index = match (place, at) {
            (Some((access, line)), _) => {
                let number = u8::try_from(sites.len()).expect("few sites");
                let mut site = Site::new(line);
                site.stateful_v6 = access.v6 == V6::Stateful;
                site.only_relays = access.only_relays;
                site.isolates = access.isolates;
                if let V4::Behind(behaviour) = access.v4 {
                    site.nat = Some(Nat::new(behaviour, [198, 51, 100, number + 1].into()));
                }
                sites.push((network.add_site(site), access, 0));
                sites.len() - 1
            }
            (None, at) => at.expect("a site"),
        };
        let (site, access, count) = &mut sites[index];
        *count += 1;
        let mut addresses: Vec<IpAddr> = Vec::new();
        let number = u8::try_from(index).expect("few sites");
        match access.v4 {
            V4::None => {}
            V4::Public => addresses.push([192, 0, 2, 16 * (number + 1) + *count].into()),
            V4::Behind(_) => addresses.push([192, 168, 1, 1 + *count].into()),
        }
        if access.v6 != V6::None {
            let ip = format!("2001:db8:{}::{}", number + 1, count);
            addresses.push(ip.parse().expect("an address"));
        }
        hosts.push(network.add_host(*site, addresses));
        index
    };
    let gateway_site = settle(network, Some(plan.gateway), None);
    let mut previous = gateway_site;
    for place in &plan.clients {
        previous = match place {
            Place::Own(access, line) => settle(network, Some((*access, *line)), None),
            Place::WithGateway => settle(network, None, Some(gateway_site)),
            Place::WithPrevious => settle(network, None, Some(previous)),
        };
    }
    let gateway = hosts.remove(0);
    (gateway, hosts)
}
