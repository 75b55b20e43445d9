//! Address ranges with a meaning of their own (data-path spec §5.1, §5.4).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const fn v4(address: Ipv4Addr, network: Ipv4Addr, prefix: u32) -> bool {
    (address.to_bits() ^ network.to_bits()) >> (32 - prefix) == 0
}

const fn v6(address: Ipv6Addr, network: Ipv6Addr, prefix: u32) -> bool {
    (address.to_bits() ^ network.to_bits()) >> (128 - prefix) == 0
}

/// Whether this is in the ranges from which clients and gateways get their tunnel addresses:
/// 100.64.0.0/11 and fd00:2021:1111::/107.
#[inline]
pub fn is_tunnel(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => v4(a, Ipv4Addr::new(100, 64, 0, 0), 11),
        IpAddr::V6(a) => v6(a, Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, 0), 107),
    }
}

/// Whether this is in the ranges from which clients make up addresses for DNS resources:
/// 100.96.0.0/11 and fd00:2021:1111:8000::/107.
#[inline]
pub fn is_proxy(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => v4(a, Ipv4Addr::new(100, 96, 0, 0), 11),
        IpAddr::V6(a) => v6(
            a,
            Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, 0),
            107,
        ),
    }
}

/// Whether an Internet resource leaves this address out (data-path spec §5.4).
///
/// Besides the ranges of the specification these are refused, because they are other spellings of
/// the same places: 0.0.0.0/8, IPv4-compatible addresses (::/96), site-local addresses (fec0::/10)
/// and refused IPv4 addresses behind the well-known NAT64 prefix (64:ff9b::/96).
pub fn internet_refuses(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => internet_refuses_v4(a),
        IpAddr::V6(a) => internet_refuses_v6(a),
    }
}

fn internet_refuses_v4(a: Ipv4Addr) -> bool {
    a.is_private()
        || a.is_loopback()
        || a.is_link_local()
        || a.is_multicast()
        || v4(a, Ipv4Addr::UNSPECIFIED, 8)
        || v4(a, Ipv4Addr::new(100, 64, 0, 0), 10)
        || v4(a, Ipv4Addr::new(240, 0, 0, 0), 4)
}

fn internet_refuses_v6(a: Ipv6Addr) -> bool {
    const NAT64: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);
    const SITE_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0);

    a.is_unique_local()
        || a.is_unicast_link_local()
        || a.is_multicast()
        || a.to_ipv4_mapped().is_some()
        // Loopback and the unspecified address among them.
        || v6(a, Ipv6Addr::UNSPECIFIED, 96)
        || v6(a, SITE_LOCAL, 10)
        || (v6(a, NAT64, 96) && internet_refuses_v4(Ipv4Addr::from_bits(a.to_bits() as u32)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn check(range: fn(IpAddr) -> bool, inside: &[&str], outside: &[&str]) {
        for a in inside {
            assert!(range(a.parse().unwrap()), "{a} is inside");
        }
        for a in outside {
            assert!(!range(a.parse().unwrap()), "{a} is outside");
        }
    }

    #[test]
    fn tunnel_ranges_end_where_proxy_ranges_begin() {
        check(
            is_tunnel,
            &[
                "100.64.0.0",
                "100.95.255.255",
                "fd00:2021:1111::",
                "fd00:2021:1111::1f:ffff",
            ],
            &[
                "100.63.255.255",
                "100.96.0.0",
                "fd00:2021:1110:ffff:ffff:ffff:ffff:ffff",
                "fd00:2021:1111::20:0",
            ],
        );
        check(
            is_proxy,
            &[
                "100.96.0.0",
                "100.127.255.255",
                "fd00:2021:1111:8000::",
                "fd00:2021:1111:8000::1f:ffff",
            ],
            &[
                "100.95.255.255",
                "100.128.0.0",
                "fd00:2021:1111:7fff:ffff:ffff:ffff:ffff",
                "fd00:2021:1111:8000::20:0",
            ],
        );
    }

    #[test]
    fn internet_excludes_private_and_special_ranges_to_the_last_address() {
        check(
            internet_refuses,
            &[
                "0.0.0.0",
                "0.255.255.255",
                "10.0.0.0",
                "10.255.255.255",
                "100.64.0.0",
                "100.127.255.255",
                "127.0.0.1",
                "169.254.169.254",
                "172.16.0.0",
                "172.31.255.255",
                "192.168.0.0",
                "192.168.255.255",
                "224.0.0.1",
                "239.255.255.255",
                "240.0.0.0",
                "255.255.255.255",
                "::",
                "::1",
                "::10.0.0.1",
                "::ffff:8.8.8.8",
                "64:ff9b::10.0.0.1",
                "64:ff9b::169.254.169.254",
                "fc00::",
                "fdff::1",
                "fe80::1",
                "febf::1",
                "fec0::1",
                "ff02::1",
            ],
            &[
                "1.0.0.0",
                "9.255.255.255",
                "11.0.0.0",
                "100.63.255.255",
                "100.128.0.0",
                "172.15.255.255",
                "172.32.0.0",
                "192.167.255.255",
                "192.169.0.0",
                "223.255.255.255",
                "2606:4700::1111",
                "64:ff9b::8.8.8.8",
                "fbff:ffff::1",
                "2001:db8::1",
            ],
        );
    }
}
