//! Clients and resources for tests.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::*;
use crate::packet::Meta;
use crate::portal::messages::{CidrResource, DnsResource, Filter, PresharedKey};

/// The Unix time at which every test starts.
pub(super) const UNIX: u64 = 1_790_000_000;
pub(super) const GATEWAY4: [u8; 4] = [100, 64, 200, 200];
pub(super) const GATEWAY6: &str = "fd00:2021:1111::ff";

pub(super) fn client_id(n: u8) -> ClientId {
    ClientId(Uuid::from_u128(0xC11E_0000 + u128::from(n)))
}

pub(super) fn resource_id(n: u8) -> ResourceId {
    ResourceId(Uuid::from_u128(0x0E50_0000 + u128::from(n)))
}

/// IPv4 tunnel address of client `n`.
pub(super) fn addr4(n: u8) -> [u8; 4] {
    [100, 64, 0, n]
}

/// IPv6 tunnel address of client `n`.
pub(super) fn addr6(n: u8) -> String {
    format!("fd00:2021:1111::{n:x}")
}

pub(super) fn peer(n: u8) -> ClientPeer {
    ClientPeer {
        id: client_id(n),
        public_key: [n; 32],
        preshared_key: PresharedKey([n; 32]),
        ipv4: addr4(n).into(),
        ipv6: addr6(n).parse().unwrap(),
        version: None,
    }
}

pub(super) fn cidr(n: u8, network: &str, filters: &[Filter]) -> Resource {
    Resource::Cidr(CidrResource {
        id: resource_id(n),
        address: network.parse().unwrap(),
        name: format!("network {n}"),
        filters: filters.to_vec(),
    })
}

pub(super) fn dns(n: u8, pattern: &str) -> Resource {
    Resource::Dns(DnsResource {
        id: resource_id(n),
        address: pattern.into(),
        name: format!("name {n}"),
        filters: vec![],
    })
}

pub(super) fn internet(n: u8) -> Resource {
    Resource::Internet { id: resource_id(n) }
}

pub(super) fn tcp(start: u16, end: u16) -> Filter {
    Filter::Tcp { start, end }
}

pub(super) fn udp(start: u16, end: u16) -> Filter {
    Filter::Udp { start, end }
}

/// An `Access` that knows the gateway's addresses, and the time it was made.
pub(super) fn access() -> (Access, Instant) {
    let now = Instant::now();
    let mut access = Access::new(now, Duration::from_secs(UNIX));
    access.set_gateway_addresses(GATEWAY4.into(), GATEWAY6.parse().unwrap());
    (access, now)
}

/// The policy of client 1 with these grants.
pub(super) fn policy(grants: &[(Resource, Option<u64>)]) -> (Arc<ClientPolicy>, Instant) {
    let (mut access, now) = access();
    for (resource, expires_at) in grants {
        access.authorize(now, &peer(1), resource.clone(), *expires_at);
    }
    (access.policy(client_id(1)).unwrap(), now)
}

pub(super) fn meta(packet: &[u8]) -> Meta {
    Meta::parse(packet).unwrap()
}

pub(super) fn drain(access: &mut Access) -> Vec<AccessEvent> {
    std::iter::from_fn(|| access.poll_event()).collect()
}
