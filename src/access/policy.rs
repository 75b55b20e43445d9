//! What one client may reach: an immutable snapshot for the data path.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ip_network::IpNetwork;

use super::account::Owner;
use super::expiry::Expiry;
use super::filter::Filters;
use super::flows::{Flow, Tick};
use super::ranges;
use super::tables::Tables;
use super::verdict::{Denied, DropReason, Passed, Reply, Verdict};
use crate::ids::{ClientId, ResourceId};
use crate::packet::translate::Embedded;
use crate::packet::{Meta, protocol};
use crate::portal::messages::Resource;

/// Port of the DNS service on the gateway's tunnel addresses, UDP and TCP (data-path spec §6.7).
pub const DNS_PORT: u16 = 53_535;

/// A pair of tunnel addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelAddresses {
    /// IPv4 tunnel address.
    pub ipv4: Ipv4Addr,
    /// IPv6 tunnel address.
    pub ipv6: Ipv6Addr,
}

impl TunnelAddresses {
    /// Whether `address` is one of the two.
    #[inline]
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => a == self.ipv4,
            IpAddr::V6(a) => a == self.ipv6,
        }
    }
}

/// What one client may reach; a snapshot that never changes. Consulted when the data path meets a
/// flow it does not remember.
///
/// A grant that has expired counts for nothing, whether or not the snapshot has been replaced since:
/// a late slow path cannot prolong access.
///
/// The proxy addresses of DNS resources are looked up in the client's tables, which live on from
/// snapshot to snapshot. One that was never announced is *unreachable* for a client that holds a
/// DNS resource, as data-path spec §6.4 asks for addresses without translation; for a client
/// without one it is *prohibited*, as any destination that no grant covers.
pub struct ClientPolicy {
    client: ClientId,
    addresses: TunnelAddresses,
    gateway: Gateway,
    generation: u64,
    /// Longest-lived grant of any kind.
    any: Option<Expiry>,
    /// Longest-lived Internet grant.
    internet: Option<(Expiry, Owner)>,
    /// Longest-lived DNS grant.
    dns: Option<Expiry>,
    /// DNS grants in the order of their resources.
    names: Vec<Entry>,
    /// CIDR grants.
    networks: Networks,
    tables: Arc<Tables>,
}

/// The gateway itself as clients may see it.
#[derive(Debug, Default)]
pub(super) struct Gateway {
    /// Its tunnel addresses, once known.
    pub(super) addresses: Option<TunnelAddresses>,
    /// Ports that are open besides DNS; `None` if there are none.
    pub(super) open_ports: Option<Arc<Filters>>,
}

struct Entry {
    owner: Owner,
    expires: Expiry,
    filters: Filters,
}

/// CIDR grants, to be found by an address in the network. Few lengths of prefixes occur, so each is
/// tried; a tree of bits would take six kilobytes for a client with a single network.
#[derive(Default)]
struct Networks {
    /// In the order of their networks.
    grants: Vec<(IpNetwork, Entry)>,
    /// Lengths of prefixes that occur, IPv4 and IPv6.
    lengths: [Vec<u8>; 2],
}

impl Networks {
    /// To be called once all are there.
    fn order(&mut self) {
        self.grants.sort_unstable_by_key(|(network, _)| *network);
        self.grants.shrink_to_fit();
        for (network, _) in &self.grants {
            self.lengths[usize::from(network.is_ipv6())].push(network.netmask());
        }
        for lengths in &mut self.lengths {
            lengths.sort_unstable();
            lengths.dedup();
            lengths.shrink_to_fit();
        }
    }

    /// All grants of networks that an address is in, with the lengths of their prefixes.
    fn around(&self, address: IpAddr) -> impl Iterator<Item = (u8, &Entry)> {
        self.lengths[usize::from(address.is_ipv6())]
            .iter()
            .filter_map(move |length| IpNetwork::new_truncate(address, *length).ok())
            .flat_map(|network| {
                let first = self.grants.partition_point(|(other, _)| *other < network);
                self.grants[first..]
                    .iter()
                    .take_while(move |(other, _)| *other == network)
                    .map(move |(_, entry)| (network.netmask(), entry))
            })
    }
}

/// What lets a packet pass.
struct Permit<'a> {
    expires: Expiry,
    /// `None` for the gateway's own services.
    owner: Option<&'a Owner>,
}

/// A grant as a policy takes it over.
pub(super) struct Granted<'a> {
    pub(super) resource: &'a Resource,
    pub(super) expires: Expiry,
    pub(super) owner: Owner,
}

impl ClientPolicy {
    pub(super) fn new<'a>(
        client: ClientId,
        addresses: TunnelAddresses,
        gateway: Gateway,
        tables: Arc<Tables>,
        grants: impl Iterator<Item = Granted<'a>>,
    ) -> Self {
        static GENERATION: AtomicU64 = AtomicU64::new(1);

        let mut policy = Self {
            client,
            addresses,
            gateway,
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            any: None,
            internet: None,
            dns: None,
            names: Vec::new(),
            networks: Networks::default(),
            tables,
        };
        for Granted {
            resource,
            expires,
            owner,
        } in grants
        {
            // `None` is less than any expiry, so that the maximum is the longest-lived grant.
            policy.any = policy.any.max(Some(expires));
            match resource {
                Resource::Internet { .. } => {
                    if policy.internet.as_ref().is_none_or(|i| i.0 < expires) {
                        policy.internet = Some((expires, owner));
                    }
                }
                Resource::Dns(dns) => {
                    policy.dns = policy.dns.max(Some(expires));
                    policy.names.push(Entry {
                        owner,
                        expires,
                        filters: Filters::new(&dns.filters),
                    });
                }
                Resource::Cidr(cidr) => {
                    let entry = Entry {
                        owner,
                        expires,
                        filters: Filters::new(&cidr.filters),
                    };
                    policy.networks.grants.push((cidr.address, entry));
                }
            }
        }
        policy.networks.order();
        policy
            .names
            .sort_unstable_by_key(|entry| entry.owner.resource);
        policy
    }

    /// Whose policy this is.
    pub fn client(&self) -> ClientId {
        self.client
    }

    /// The client's tunnel addresses.
    pub fn addresses(&self) -> TunnelAddresses {
        self.addresses
    }

    /// Number of this snapshot, unique in the process across all clients. A remembered verdict is
    /// good only for the snapshot that gave it.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The present tick of the clock by which flows end.
    #[inline]
    pub fn tick(&self, now: Instant) -> Tick {
        self.tables.tick(now)
    }

    /// Judges a packet from the client and finds or makes the flow it belongs to (data-path spec
    /// §5.3 steps 1 and 4 to 9).
    ///
    /// # Errors
    /// [`Denied`], if it is to be dropped.
    pub fn admit_outbound(&self, meta: &Meta, now: Instant) -> Result<Passed, Denied> {
        let permit = self.judge(meta, now)?;
        let until = permit.expires.instant();
        let Some(owner) = permit.owner else {
            return Ok(Passed { until, flow: None });
        };
        match self.tables.open(meta, now, || owner.clone()) {
            // What a proxy address stands for may have changed since it was judged; from here on, a
            // change ends the flow.
            Ok(flow) if flow.is_translated() => Ok(Passed {
                until: self.judge(meta, now)?.expires.instant(),
                flow: Some(flow),
            }),
            Ok(flow) => Ok(Passed {
                until,
                flow: Some(flow),
            }),
            Err(reason) => Err(Denied {
                reason,
                reply: (reason == DropReason::NotTranslated).then_some(Reply::Unreachable),
            }),
        }
    }

    /// Judges a packet to the client, other than an ICMP error, and finds the flow it belongs to
    /// (data-path spec §5.6). What no packet of the client has asked for does not pass.
    ///
    /// # Errors
    /// [`Denied`], if it is to be dropped.
    pub fn admit_inbound(&self, meta: &Meta, now: Instant) -> Result<Passed, Denied> {
        self.check_ends(meta)?;
        if self.is_gateway(meta.src) {
            let expires = self
                .any_grant(now)
                .map_err(|denied| silent(denied.reason))?;
            let until = expires.instant();
            return Ok(Passed { until, flow: None });
        }
        let Some(flow) = self.tables.answered_by(meta, now) else {
            return Err(silent(DropReason::NoFlow));
        };
        // The other end as the client knows it: by this its grant is found.
        let expires = self.classify(flow.remote(), meta.protocol, flow.remote_port(), now);
        let permit = expires.map_err(|denied| silent(denied.reason))?;
        let until = permit.expires.instant();
        Ok(Passed {
            until,
            flow: Some(flow),
        })
    }

    /// Judges an ICMP error for the client and finds the flow it is about (data-path spec §6.6).
    /// It passes from whichever router it comes and regardless of filters: without it, neither path
    /// MTU discovery nor traceroute work. Not to be remembered: another error between the same ends
    /// is about something else.
    ///
    /// # Errors
    /// [`Denied`], if it is to be dropped.
    pub fn admit_error(
        &self,
        packet: &[u8],
        meta: &Meta,
        now: Instant,
    ) -> Result<Option<(Arc<Flow>, Embedded)>, Denied> {
        let not_for_client = silent(DropReason::IcmpErrorNotForClient);
        self.check_ends(meta)?;
        if !meta.is_icmp_error_for_dst() {
            return Err(not_for_client);
        }
        self.any_grant(now)
            .map_err(|denied| silent(denied.reason))?;
        let embedded = Embedded::of(packet, meta).ok_or(not_for_client)?;
        if self.is_gateway(embedded.dst) {
            return Ok(None);
        }
        match self.tables.about(&embedded, now) {
            Some(flow) => Ok(Some((flow, embedded))),
            None => Err(silent(DropReason::NoFlow)),
        }
    }

    /// Whether a packet to the client may come from where it claims to.
    fn check_ends(&self, meta: &Meta) -> Result<(), Denied> {
        if !self.addresses.contains(meta.dst) {
            return Err(silent(DropReason::DestinationNotClient));
        }
        if ranges::is_tunnel(meta.src) && !self.is_gateway(meta.src) {
            return Err(silent(DropReason::SourceInTunnelRange));
        }
        Ok(())
    }

    /// Judges a packet from the client (data-path spec §5.3 steps 1 and 4 to 9, §5.4), without
    /// regard to flows. Control packets must have been taken out before.
    pub fn outbound(&self, meta: &Meta, now: Instant) -> Verdict {
        Verdict::from(self.judge(meta, now).map(|permit| permit.expires.instant()))
    }

    fn judge(&self, meta: &Meta, now: Instant) -> Result<Permit<'_>, Denied> {
        if meta.is_multicast() {
            Err(silent(DropReason::Multicast))
        } else if meta.is_icmp_error() {
            Err(silent(DropReason::IcmpErrorFromClient))
        } else if !self.addresses.contains(meta.src) {
            Err(prohibited(DropReason::SourceNotClient))
        } else if self.is_gateway(meta.dst) {
            self.gateway_service(meta, now)
        } else if ranges::is_tunnel(meta.dst) {
            Err(prohibited(DropReason::OtherPeer))
        } else {
            self.classify(meta.dst, meta.protocol, meta.dst_port, now)
        }
    }

    fn is_gateway(&self, address: IpAddr) -> bool {
        self.gateway
            .addresses
            .is_some_and(|gateway| gateway.contains(address))
    }

    /// The gateway's own tunnel address offers DNS and answers pings. Everything else that happens
    /// to listen on the host is not the client's business, unless the operator says so.
    fn gateway_service(&self, meta: &Meta, now: Instant) -> Result<Permit<'_>, Denied> {
        let serves = match meta.protocol {
            protocol::UDP | protocol::TCP => meta.dst_port == DNS_PORT,
            _ => meta.is_icmp_echo(),
        };
        let opened = || {
            let ports = self.gateway.open_ports.as_ref();
            ports.is_some_and(|ports| ports.permits(meta.protocol, meta.dst_port))
        };
        if !serves && !opened() {
            return Err(prohibited(DropReason::GatewayServiceClosed));
        }
        Ok(Permit {
            expires: self.any_grant(now)?,
            owner: None,
        })
    }

    /// The longest-lived grant, for what is open to every client with any access at all.
    fn any_grant(&self, now: Instant) -> Result<Expiry, Denied> {
        alive(self.any, now).ok_or(prohibited(DropReason::GrantExpired))
    }

    /// Resource classification (data-path spec §5.4). `port` is the one on the resource's side.
    fn classify(
        &self,
        remote: IpAddr,
        protocol: u8,
        port: u16,
        now: Instant,
    ) -> Result<Permit<'_>, Denied> {
        if ranges::is_proxy(remote) {
            return self.classify_proxy(remote, protocol, port, now);
        }
        match self.live_internet(now) {
            Some(_) if ranges::internet_refuses(remote) => {
                Err(unreachable(DropReason::InternetRefused))
            }
            Some(permit) => Ok(permit),
            None => {
                let mut contest = Contest::new(protocol, port, now);
                contest.any_expired = self.internet.is_some() && !ranges::internet_refuses(remote);
                self.enter_networks(&mut contest, remote);
                contest.settle()
            }
        }
    }

    /// Classification of a proxy address: the DNS resources it was announced for, and networks that
    /// span the proxy range. A network does not make an address usable that was never announced.
    fn classify_proxy(
        &self,
        remote: IpAddr,
        protocol: u8,
        port: u16,
        now: Instant,
    ) -> Result<Permit<'_>, Denied> {
        let mut contest = Contest::new(protocol, port, now);
        let known = self.tables.with_resources(remote, |resources| {
            let host = if remote.is_ipv4() { 32 } else { 128 };
            for entry in &self.names {
                if resources.contains(&entry.owner.resource) {
                    contest.enter(host, entry);
                }
            }
        });
        if known.is_none() {
            if alive(self.dns, now).is_some() {
                return Err(unreachable(DropReason::NotTranslated));
            }
            contest.any_expired = self.dns.is_some();
        }
        if self.live_internet(now).is_none() {
            self.enter_networks(&mut contest, remote);
        }
        match (contest.settle(), known) {
            (Ok(_), None) => Err(unreachable(DropReason::NotTranslated)),
            (outcome, _) => outcome,
        }
    }

    fn live_internet(&self, now: Instant) -> Option<Permit<'_>> {
        let (expires, owner) = self.internet.as_ref()?;
        (!expires.is_over(now)).then_some(Permit {
            expires: *expires,
            owner: Some(owner),
        })
    }

    fn enter_networks<'a>(&'a self, contest: &mut Contest<'a>, remote: IpAddr) {
        for (prefix, entry) in self.networks.around(remote) {
            contest.enter(prefix, entry);
        }
    }
}

/// Which of several grants decides: what permits the packet wins; then the longer prefix; then the
/// larger resource id (data-path spec §5.4).
struct Contest<'a> {
    protocol: u8,
    port: u16,
    now: Instant,
    winner: Option<((bool, u8, ResourceId), &'a Entry)>,
    any_expired: bool,
}

impl<'a> Contest<'a> {
    fn new(protocol: u8, port: u16, now: Instant) -> Self {
        Self {
            protocol,
            port,
            now,
            winner: None,
            any_expired: false,
        }
    }

    fn enter(&mut self, prefix: u8, entry: &'a Entry) {
        if entry.expires.is_over(self.now) {
            self.any_expired = true;
            return;
        }
        let permits = entry.filters.permits(self.protocol, self.port);
        let rank = (permits, prefix, entry.owner.resource);
        if self.winner.is_none_or(|(best, _)| best < rank) {
            self.winner = Some((rank, entry));
        }
    }

    fn settle(&self) -> Result<Permit<'a>, Denied> {
        match self.winner {
            Some(((true, ..), entry)) => Ok(Permit {
                expires: entry.expires,
                owner: Some(&entry.owner),
            }),
            Some(_) => Err(prohibited(DropReason::FilterDenied)),
            None if self.any_expired => Err(prohibited(DropReason::GrantExpired)),
            None => Err(prohibited(DropReason::NoGrant)),
        }
    }
}

fn alive(expires: Option<Expiry>, now: Instant) -> Option<Expiry> {
    expires.filter(|expires| !expires.is_over(now))
}

fn silent(reason: DropReason) -> Denied {
    Denied {
        reason,
        reply: None,
    }
}

fn prohibited(reason: DropReason) -> Denied {
    Denied {
        reason,
        reply: Some(Reply::Prohibited),
    }
}

fn unreachable(reason: DropReason) -> Denied {
    Denied {
        reason,
        reply: Some(Reply::Unreachable),
    }
}

impl fmt::Debug for ClientPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientPolicy")
            .field("client", &self.client)
            .field("addresses", &self.addresses)
            .field("generation", &self.generation)
            .field("networks", &self.networks.grants.len())
            .field("internet", &self.internet.is_some())
            .field("names", &self.names.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "policy_tests/mod.rs"]
mod tests;
