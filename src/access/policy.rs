//! What one client may reach: an immutable snapshot for the data path.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ip_network_table::IpNetworkTable;

use super::expiry::Expiry;
use super::filter::Filters;
use super::ranges;
use super::verdict::{DropReason, Reply, Verdict};
use crate::ids::{ClientId, ResourceId};
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
/// DNS resources are known here by name only. Their proxy addresses cannot be translated yet, so a
/// packet to one is *unreachable* for a client that holds a DNS resource, as data-path spec §6.4
/// asks for addresses without translation; for a client without one it is *prohibited*, as any
/// destination that no grant covers.
pub struct ClientPolicy {
    client: ClientId,
    addresses: TunnelAddresses,
    gateway: Option<TunnelAddresses>,
    generation: u64,
    /// Longest-lived grant of any kind.
    any: Option<Expiry>,
    /// Longest-lived Internet grant.
    internet: Option<Expiry>,
    /// Longest-lived DNS grant.
    dns: Option<Expiry>,
    /// CIDR grants by network.
    networks: IpNetworkTable<Vec<Entry>>,
}

struct Entry {
    resource: ResourceId,
    expires: Expiry,
    filters: Filters,
}

/// Why the classification of a remote address failed.
type Refusal = (DropReason, Reply);

impl ClientPolicy {
    pub(super) fn new<'a>(
        client: ClientId,
        addresses: TunnelAddresses,
        gateway: Option<TunnelAddresses>,
        grants: impl Iterator<Item = (&'a Resource, Expiry)>,
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
            networks: IpNetworkTable::new(),
        };
        for (resource, expires) in grants {
            // `None` is less than any expiry, so that the maximum is the longest-lived grant.
            policy.any = policy.any.max(Some(expires));
            match resource {
                Resource::Internet { .. } => policy.internet = policy.internet.max(Some(expires)),
                Resource::Dns(_) => policy.dns = policy.dns.max(Some(expires)),
                Resource::Cidr(cidr) => {
                    let entry = Entry {
                        resource: cidr.id,
                        expires,
                        filters: Filters::new(&cidr.filters),
                    };
                    match policy.networks.exact_match_mut(cidr.address) {
                        Some(entries) => entries.push(entry),
                        None => {
                            policy.networks.insert(cidr.address, vec![entry]);
                        }
                    }
                }
            }
        }
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

    /// Judges a packet from the client (data-path spec §5.3 steps 1 and 4 to 9, §5.4). Control
    /// packets must have been taken out before.
    pub fn outbound(&self, meta: &Meta, now: Instant) -> Verdict {
        if meta.is_multicast() {
            return deny(DropReason::Multicast, None);
        }
        if meta.is_icmp_error() {
            return deny(DropReason::IcmpErrorFromClient, None);
        }
        if !self.addresses.contains(meta.src) {
            return deny(DropReason::SourceNotClient, Some(Reply::Prohibited));
        }
        let outcome = if self.is_gateway(meta.dst) {
            self.gateway_service(meta, now)
        } else if ranges::is_tunnel(meta.dst) {
            Err((DropReason::OtherPeer, Reply::Prohibited))
        } else {
            self.classify(meta.dst, meta.protocol, meta.dst_port, now)
        };
        match outcome {
            Ok(expires) => allow(expires),
            Err((reason, reply)) => deny(reason, Some(reply)),
        }
    }

    /// Judges a packet to the client (data-path spec §5.6). Nothing is ever answered in this
    /// direction.
    ///
    /// Protocols other than TCP, UDP and ICMP come back from resources without filters, so that
    /// GRE, ESP and SCTP work both ways.
    pub fn inbound(&self, meta: &Meta, now: Instant) -> Verdict {
        if !self.addresses.contains(meta.dst) {
            return deny(DropReason::DestinationNotClient, None);
        }
        let outcome = if self.is_gateway(meta.src) {
            self.any_grant(now)
        } else if ranges::is_tunnel(meta.src) {
            return deny(DropReason::SourceInTunnelRange, None);
        } else if meta.is_icmp_error_for_dst() {
            // From whichever router it comes, and regardless of filters: without it neither path
            // MTU discovery nor traceroute work.
            self.any_grant(now)
        } else if meta.is_icmp_error() {
            return deny(DropReason::IcmpErrorNotForClient, None);
        } else {
            self.classify(meta.src, meta.protocol, meta.src_port, now)
        };
        match outcome {
            Ok(expires) => allow(expires),
            Err((reason, _)) => deny(reason, None),
        }
    }

    fn is_gateway(&self, address: IpAddr) -> bool {
        self.gateway
            .is_some_and(|gateway| gateway.contains(address))
    }

    /// The gateway's own tunnel address offers DNS and answers pings. Everything else that happens
    /// to listen on the host is not the client's business.
    fn gateway_service(&self, meta: &Meta, now: Instant) -> Result<Expiry, Refusal> {
        let open = match meta.protocol {
            protocol::UDP | protocol::TCP => meta.dst_port == DNS_PORT,
            _ => meta.is_icmp_echo_request() || meta.is_icmp_echo_reply(),
        };
        if !open {
            return Err((DropReason::GatewayServiceClosed, Reply::Prohibited));
        }
        self.any_grant(now)
    }

    /// The longest-lived grant, for what is open to every client with any access at all.
    fn any_grant(&self, now: Instant) -> Result<Expiry, Refusal> {
        alive(self.any, now).ok_or((DropReason::GrantExpired, Reply::Prohibited))
    }

    /// Resource classification (data-path spec §5.4). `port` is the one on the resource's side.
    fn classify(
        &self,
        remote: IpAddr,
        protocol: u8,
        port: u16,
        now: Instant,
    ) -> Result<Expiry, Refusal> {
        let internet = alive(self.internet, now);
        if ranges::is_proxy(remote) {
            if alive(self.dns, now).is_some() {
                return Err((DropReason::NotTranslated, Reply::Unreachable));
            }
            // A network may span the proxy range, but what it permits is still not translated.
            let outcome = match internet {
                Some(_) => Err((DropReason::NoGrant, Reply::Prohibited)),
                None => self
                    .match_networks(remote, protocol, port, now)
                    .and(Err((DropReason::NotTranslated, Reply::Unreachable))),
            };
            return match outcome {
                Err((DropReason::NoGrant, reply)) if self.dns.is_some() => {
                    Err((DropReason::GrantExpired, reply))
                }
                outcome => outcome,
            };
        }
        match internet {
            Some(_) if ranges::internet_refuses(remote) => {
                Err((DropReason::InternetRefused, Reply::Unreachable))
            }
            Some(expires) => Ok(expires),
            None => self.match_networks(remote, protocol, port, now),
        }
    }

    /// Among all networks that hold the address, what permits the packet wins; then the longer
    /// prefix; then the larger resource id.
    fn match_networks(
        &self,
        remote: IpAddr,
        protocol: u8,
        port: u16,
        now: Instant,
    ) -> Result<Expiry, Refusal> {
        let mut winner: Option<((bool, u8, ResourceId), Expiry)> = None;
        let mut expired = self.internet.is_some_and(|expires| expires.is_over(now))
            && !ranges::internet_refuses(remote);
        for (network, entries) in self.networks.matches(remote) {
            for entry in entries {
                if entry.expires.is_over(now) {
                    expired = true;
                    continue;
                }
                let rank = (
                    entry.filters.permits(protocol, port),
                    network.netmask(),
                    entry.resource,
                );
                if winner.is_none_or(|(best, _)| best < rank) {
                    winner = Some((rank, entry.expires));
                }
            }
        }
        match winner {
            Some(((true, ..), expires)) => Ok(expires),
            Some(((false, ..), _)) => Err((DropReason::FilterDenied, Reply::Prohibited)),
            None if expired => Err((DropReason::GrantExpired, Reply::Prohibited)),
            None => Err((DropReason::NoGrant, Reply::Prohibited)),
        }
    }
}

fn alive(expires: Option<Expiry>, now: Instant) -> Option<Expiry> {
    expires.filter(|expires| !expires.is_over(now))
}

fn allow(expires: Expiry) -> Verdict {
    Verdict::Allow {
        until: expires.instant(),
    }
}

fn deny(reason: DropReason, reply: Option<Reply>) -> Verdict {
    Verdict::Deny { reason, reply }
}

impl fmt::Debug for ClientPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (v4, v6) = self.networks.len();
        f.debug_struct("ClientPolicy")
            .field("client", &self.client)
            .field("addresses", &self.addresses)
            .field("generation", &self.generation)
            .field("networks", &(v4 + v6))
            .field("internet", &self.internet.is_some())
            .field("dns", &self.dns.is_some())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
