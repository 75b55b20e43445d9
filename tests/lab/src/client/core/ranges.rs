//! The ranges that tunnel and proxy addresses are from (data-path spec §5.1).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ip_network::IpNetwork;

fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> IpNetwork {
    IpNetwork::new_truncate(Ipv4Addr::new(a, b, c, d), prefix).expect("prefix is at most 32")
}

fn v6(segments: [u16; 8], prefix: u8) -> IpNetwork {
    IpNetwork::new_truncate(Ipv6Addr::from(segments), prefix).expect("prefix is at most 128")
}

/// Tunnel addresses of all clients and gateways (§5.1).
pub(super) fn tunnel_ranges() -> [IpNetwork; 2] {
    [
        v4(100, 64, 0, 0, 11),
        v6([0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, 0], 107),
    ]
}

/// Proxy addresses of DNS resources (§5.1).
pub(super) fn proxy_ranges() -> [IpNetwork; 2] {
    [
        v4(100, 96, 0, 0, 11),
        v6([0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, 0], 107),
    ]
}

pub(super) fn is_tunnel_range(ip: IpAddr) -> bool {
    tunnel_ranges().iter().any(|n| n.contains(ip))
}

pub(super) fn in_proxy_range(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => u32::from(ip) >> 21 == u32::from(Ipv4Addr::new(100, 96, 0, 0)) >> 21,
        IpAddr::V6(_) => proxy_ranges()[1].contains(ip),
    }
}
