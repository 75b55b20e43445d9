//! Which local addresses clients may be told of (host candidates, RFC 8445 §5.1.1.1).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use if_addrs::{IfOperStatus, Interface};
use socket2::{Domain, Protocol, Socket, Type};

use super::mark;

/// Addresses of one family beyond the one that reaches the internet. Each makes as many pairs to check
/// as the client has addresses.
const MAX_OTHERS: usize = 4;

/// Names of interfaces that lead to containers, virtual machines or tunnels of this host, where no
/// client is. In a container its own interface has none of these names.
const INNER: [&str; 11] = [
    "cali",
    "cilium",
    "cni",
    "docker",
    "flannel",
    "lxc",
    "podman",
    "tailscale",
    "veth",
    "virbr",
    "wg",
];

/// The addresses that the host can be reached at: the one of each family that reaches the internet, and
/// one of every other interface, where a client in the same network may be. Nothing is sent.
pub fn local_addresses() -> Vec<IpAddr> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|error| {
        tracing::debug!(%error, "interfaces cannot be listed");
        Vec::new()
    });
    select(default_sources(), &interfaces)
}

fn select(defaults: Vec<IpAddr>, interfaces: &[Interface]) -> Vec<IpAddr> {
    let mut selected = defaults.clone();
    for is_v4 in [true, false] {
        let family = || {
            interfaces
                .iter()
                .filter(|interface| interface.ip().is_ipv4() == is_v4)
        };
        // An IPv6 interface has addresses that expire; the first of them will do. One that reaches the
        // internet has shown which of its addresses it prefers.
        let mut seen: Vec<&str> = family()
            .filter(|interface| defaults.contains(&interface.ip()))
            .map(|interface| interface.name.as_str())
            .collect();
        let mut others = 0;
        for interface in family().filter(|interface| is_useful(interface)) {
            if others < MAX_OTHERS && !seen.contains(&interface.name.as_str()) {
                seen.push(&interface.name);
                selected.push(interface.ip());
                others += 1;
            }
        }
    }
    selected
}

fn is_useful(interface: &Interface) -> bool {
    let name = interface.name.as_str();
    // Docker names its bridges so, and routers theirs `br-lan`.
    let is_docker = name
        .strip_prefix("br-")
        .is_some_and(|id| id.len() == 12 && id.bytes().all(|b| b.is_ascii_hexdigit()));
    let is_inner = is_docker || INNER.iter().any(|prefix| name.starts_with(prefix));
    let is_down = interface.oper_status == IfOperStatus::Down;
    !(is_inner
        || is_down
        || interface.is_p2p()
        || interface.is_loopback()
        || interface.is_link_local())
}

/// The local addresses that a datagram to the public internet would leave from, one per family.
///
/// Connecting a UDP socket only asks the routing table. The targets are documentation addresses
/// (RFC 5737 and RFC 3849), which stand for any address that is not near.
fn default_sources() -> Vec<IpAddr> {
    const TARGETS: [(IpAddr, IpAddr); 2] = [
        (
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        ),
        (
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        ),
    ];
    TARGETS
        .into_iter()
        .filter_map(|(wildcard, target)| {
            let domain = if wildcard.is_ipv4() {
                Domain::IPV4
            } else {
                Domain::IPV6
            };
            let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).ok()?;
            mark(&socket).ok()?;
            socket.bind(&SocketAddr::new(wildcard, 0).into()).ok()?;
            socket.connect(&SocketAddr::new(target, 9).into()).ok()?;
            let local = socket.local_addr().ok()?.as_socket()?.ip();
            (!local.is_loopback() && !local.is_unspecified()).then_some(local)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use if_addrs::{IfAddr, Ifv4Addr, Ifv6Addr};

    use super::*;

    fn interface(name: &str, ip: &str) -> Interface {
        let addr = match ip.parse().expect("an address") {
            IpAddr::V4(ip) => IfAddr::V4(Ifv4Addr {
                ip,
                netmask: Ipv4Addr::new(255, 255, 255, 0),
                prefixlen: 24,
                broadcast: None,
            }),
            IpAddr::V6(ip) => IfAddr::V6(Ifv6Addr {
                ip,
                netmask: Ipv6Addr::UNSPECIFIED,
                prefixlen: 64,
                broadcast: None,
            }),
        };
        Interface {
            name: name.to_owned(),
            addr,
            index: None,
            oper_status: IfOperStatus::Up,
            is_p2p: false,
        }
    }

    fn selected(defaults: &[&str], interfaces: &[Interface]) -> Vec<String> {
        let defaults = defaults.iter().map(|ip| ip.parse().expect("an address"));
        let selected = select(defaults.collect(), interfaces);
        selected.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_second_network_is_offered_after_the_one_that_reaches_the_internet() {
        let interfaces = [
            interface("eth1", "10.1.0.2"),
            interface("eth0", "192.0.2.2"),
            interface("eth0", "2001:db8::2"),
            interface("eth1", "fd00::2"),
        ];
        assert_eq!(
            selected(&["192.0.2.2", "2001:db8::2"], &interfaces),
            ["192.0.2.2", "2001:db8::2", "10.1.0.2", "fd00::2"]
        );
        assert_eq!(selected(&[], &interfaces[..1]), ["10.1.0.2"], "no internet");
        let lan = [interface("br-lan", "192.168.1.1")];
        assert_eq!(selected(&[], &lan), ["192.168.1.1"], "a router");
    }

    #[test]
    fn of_the_addresses_of_an_interface_one_is_offered() {
        let interfaces = [
            interface("eth0", "2001:db8::aaaa"),
            interface("eth0", "2001:db8::2"),
            interface("eth1", "fd00::1"),
            interface("eth1", "fd00::2"),
        ];
        assert_eq!(
            selected(&["2001:db8::2"], &interfaces),
            ["2001:db8::2", "fd00::1"]
        );
    }

    #[test]
    fn where_no_client_can_be_nothing_is_offered() {
        let mut down = interface("eth7", "10.7.0.1");
        down.oper_status = IfOperStatus::Down;
        let mut tunnel = interface("tun-firezone", "100.64.0.1");
        tunnel.is_p2p = true;
        let interfaces = [
            down,
            tunnel,
            interface("lo", "127.0.0.1"),
            interface("lo", "::1"),
            interface("eth1", "fe80::1"),
            interface("eth1", "169.254.1.1"),
            interface("docker0", "172.17.0.1"),
            interface("br-0123456789ab", "172.18.0.1"),
            interface("virbr0", "192.168.122.1"),
        ];
        assert_eq!(selected(&[], &interfaces), [""; 0]);
    }

    #[test]
    fn a_host_with_many_networks_offers_a_few() {
        let interfaces: Vec<_> = (0..20)
            .map(|n| interface(&format!("eth{n}"), &format!("10.{n}.0.1")))
            .collect();
        let selected = selected(&["10.9.0.1"], &interfaces);
        assert_eq!(
            selected,
            ["10.9.0.1", "10.0.0.1", "10.1.0.1", "10.2.0.1", "10.3.0.1"]
        );
    }

    #[test]
    fn what_this_host_has_can_be_bound() {
        for address in local_addresses() {
            std::net::UdpSocket::bind((address, 0)).expect("an address of this host");
        }
    }
}
