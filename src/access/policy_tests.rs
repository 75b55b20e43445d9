#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;
use crate::access::fixtures::*;
use crate::access::{Access, Resolved};
use crate::packet::samples::{icmp4, icmp6, ip4, ip6, tcp4, tcp6, udp4, udp6};
use crate::portal::messages::Filter;

const LAN: &str = "10.0.0.0/8";
const LAN6: &str = "fd12::/32";
const HOST: [u8; 4] = [10, 0, 0, 1];
const HOST6: &str = "fd12::1";
const PUBLIC: [u8; 4] = [9, 9, 9, 9];
const PUBLIC6: &str = "2620:fe::fe";

const FOREVER: Verdict = Verdict::Allow { until: None };

fn prohibited(reason: DropReason) -> Verdict {
    deny(reason, Some(Reply::Prohibited))
}

fn unreachable(reason: DropReason) -> Verdict {
    deny(reason, Some(Reply::Unreachable))
}

fn silent(reason: DropReason) -> Verdict {
    deny(reason, None)
}

fn deny(reason: DropReason, reply: Option<Reply>) -> Verdict {
    Verdict::Deny(Denied { reason, reply })
}

/// The packet of the client that `packet` answers or, if it is an ICMP error, is about.
/// `None` if the error does not quote it as a whole.
fn cause(packet: &[u8]) -> Option<Meta> {
    let meta = meta(packet);
    let transport = usize::from(meta.transport_offset);
    if meta.is_icmp_error() {
        return Meta::parse(&packet[transport + 8..]).ok();
    }
    let (addresses, size) = if meta.is_ipv4() { (12, 4) } else { (8, 16) };
    let mut mirrored = packet.to_vec();
    let (src, dst) = mirrored[addresses..addresses + 2 * size].split_at_mut(size);
    src.swap_with_slice(dst);
    match (meta.protocol, packet[transport]) {
        (protocol::TCP | protocol::UDP, _) => {
            mirrored.swap(transport, transport + 2);
            mirrored.swap(transport + 1, transport + 3);
        }
        (protocol::ICMP, 0) => mirrored[transport] = 8,
        (protocol::ICMP, 8) => mirrored[transport] = 0,
        (protocol::ICMPV6, 129) => mirrored[transport] = 128,
        (protocol::ICMPV6, 128) => mirrored[transport] = 129,
        _ => {}
    }
    Meta::parse(&mirrored).ok()
}

/// Judges a packet to the client without anything having gone before.
fn unasked(policy: &ClientPolicy, packet: &[u8], now: Instant) -> Verdict {
    let meta = meta(packet);
    Verdict::from(if meta.is_icmp_error() {
        policy.admit_error(packet, &meta, now).map(|_| None)
    } else {
        policy.admit_inbound(&meta, now).map(|passed| passed.until)
    })
}

/// Judges a packet to the client as if the client had asked for it, whether or not it was allowed
/// to: the tables do not judge.
fn inbound(policy: &ClientPolicy, packet: &[u8], now: Instant) -> Verdict {
    if let Some(cause) = cause(packet) {
        // There is none to addresses that stand for nothing.
        let _ = policy
            .tables
            .open(&cause, now, || unreachable!("nothing is accounted for"));
    }
    unasked(policy, packet, now)
}

/// A policy of client 1 whose grants never end, with both directions as closures over bytes.
struct Judge(std::sync::Arc<ClientPolicy>, Instant);

impl Judge {
    fn new(grants: &[Resource]) -> Self {
        let grants: Vec<_> = grants.iter().map(|r| (r.clone(), None)).collect();
        let (policy, now) = policy(&grants);
        Self(policy, now)
    }

    fn outbound(&self, packet: &[u8]) -> Verdict {
        self.0.outbound(&meta(packet), self.1)
    }

    fn inbound(&self, packet: &[u8]) -> Verdict {
        inbound(&self.0, packet, self.1)
    }

    fn unasked(&self, packet: &[u8]) -> Verdict {
        unasked(&self.0, packet, self.1)
    }

    /// TCP from the client to port 443.
    fn to4(&self, dst: [u8; 4]) -> Verdict {
        self.outbound(&tcp4(addr4(1), dst, 1000, 443, b""))
    }

    fn to6(&self, dst: &str) -> Verdict {
        self.outbound(&tcp6(&addr6(1), dst, 1000, 443, b""))
    }

    /// TCP to the client from port 443.
    fn from4(&self, src: [u8; 4]) -> Verdict {
        self.inbound(&tcp4(src, addr4(1), 443, 1000, b""))
    }

    fn from6(&self, src: &str) -> Verdict {
        self.inbound(&tcp6(src, &addr6(1), 443, 1000, b""))
    }
}

fn networks() -> Judge {
    Judge::new(&[cidr(1, LAN, &[]), cidr(2, LAN6, &[])])
}

#[test]
fn snapshots_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<ClientPolicy>();
}

// Client to resource, data-path spec §5.3.

#[test]
fn multicast_is_dropped_silently_before_anything_else() {
    let judge = networks();
    for packet in [
        udp4(addr4(1), [224, 0, 0, 251], 5353, 5353, b""),
        udp4(addr4(9), [239, 1, 1, 1], 5353, 5353, b""),
        udp6(&addr6(1), "ff02::fb", 5353, 5353, b""),
    ] {
        assert_eq!(judge.outbound(&packet), silent(DropReason::Multicast));
    }
}

#[test]
fn clients_may_not_send_icmp_errors() {
    let judge = networks();
    let about4 = udp4(HOST, addr4(1), 1, 2, b"");
    let about6 = udp6(HOST6, &addr6(1), 1, 2, b"");
    for kind in [3, 4, 5, 11, 12] {
        let packet = icmp4(addr4(1), HOST, kind, 0, [0; 4], &about4);
        assert_eq!(
            judge.outbound(&packet),
            silent(DropReason::IcmpErrorFromClient)
        );
    }
    for kind in [1, 2, 3, 4] {
        let packet = icmp6(&addr6(1), HOST6, kind, 0, [0; 4], &about6);
        assert_eq!(
            judge.outbound(&packet),
            silent(DropReason::IcmpErrorFromClient)
        );
    }
}

#[test]
fn source_must_be_one_of_the_clients_two_addresses() {
    let judge = networks();
    assert_eq!(judge.to4(HOST), FOREVER);
    assert_eq!(judge.to6(HOST6), FOREVER);
    for src in [addr4(2), [100, 64, 0, 0], [10, 0, 0, 2], GATEWAY4, [0; 4]] {
        assert_eq!(
            judge.outbound(&udp4(src, HOST, 1, 2, b"")),
            prohibited(DropReason::SourceNotClient)
        );
    }
    for src in [addr6(2).as_str(), HOST6, GATEWAY6, "::", "fe80::1"] {
        assert_eq!(
            judge.outbound(&udp6(src, HOST6, 1, 2, b"")),
            prohibited(DropReason::SourceNotClient)
        );
    }
}

#[test]
fn the_gateway_itself_offers_dns_and_ping_and_nothing_else() {
    // Even the widest grant opens nothing more.
    let judge = Judge::new(&[cidr(1, "0.0.0.0/0", &[]), cidr(2, "::/0", &[])]);
    let (c4, c6) = (addr4(1), addr6(1));
    for packet in [
        udp4(c4, GATEWAY4, 1, 53_535, b""),
        tcp4(c4, GATEWAY4, 1, 53_535, b""),
        udp6(&c6, GATEWAY6, 1, 53_535, b""),
        tcp6(&c6, GATEWAY6, 1, 53_535, b""),
        icmp4(c4, GATEWAY4, 8, 0, [0, 1, 0, 1], b""),
        icmp4(c4, GATEWAY4, 0, 0, [0, 1, 0, 1], b""),
        icmp6(&c6, GATEWAY6, 128, 0, [0, 1, 0, 1], b""),
        icmp6(&c6, GATEWAY6, 129, 0, [0, 1, 0, 1], b""),
    ] {
        assert_eq!(judge.outbound(&packet), FOREVER);
    }
    for packet in [
        tcp4(c4, GATEWAY4, 53_535, 22, b""),
        tcp4(c4, GATEWAY4, 1, 53_534, b""),
        tcp4(c4, GATEWAY4, 1, 53_536, b""),
        udp4(c4, GATEWAY4, 1, 53, b""),
        tcp6(&c6, GATEWAY6, 1, 8080, b""),
        udp6(&c6, GATEWAY6, 1, 161, b""),
        icmp4(c4, GATEWAY4, 13, 0, [0; 4], b""),
        icmp6(&c6, GATEWAY6, 135, 0, [0; 4], b""),
        ip4(c4, GATEWAY4, 47, b"gre"),
        ip6(&c6, GATEWAY6, 132, b"sctp"),
    ] {
        assert_eq!(
            judge.outbound(&packet),
            prohibited(DropReason::GatewayServiceClosed)
        );
    }
}

#[test]
fn gateway_services_work_for_holders_of_any_kind_of_grant() {
    for grant in [cidr(1, LAN, &[]), dns(1, "*.corp.example"), internet(1)] {
        let judge = Judge::new(&[grant]);
        let packet = udp4(addr4(1), GATEWAY4, 1, 53_535, b"");
        assert_eq!(judge.outbound(&packet), FOREVER);
    }
}

#[test]
fn other_peers_are_out_of_reach_whatever_the_grants() {
    for judge in [
        Judge::new(&[
            cidr(1, "100.64.0.0/10", &[]),
            cidr(2, "fd00:2021:1111::/48", &[]),
        ]),
        Judge::new(&[internet(1)]),
    ] {
        for dst in [addr4(2), [100, 64, 0, 0], [100, 95, 255, 255], addr4(1)] {
            assert_eq!(judge.to4(dst), prohibited(DropReason::OtherPeer));
        }
        assert_eq!(judge.to6(&addr6(2)), prohibited(DropReason::OtherPeer));
        assert_eq!(
            judge.to6("fd00:2021:1111::1f:ffff"),
            prohibited(DropReason::OtherPeer)
        );
    }
}

#[test]
fn before_init_the_gateways_address_is_just_another_peer() {
    let now = Instant::now();
    let mut access = crate::access::Access::new(now, Duration::from_secs(UNIX));
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    let policy = access.policy(client_id(1)).unwrap();
    let packet = meta(&udp4(addr4(1), GATEWAY4, 1, 53_535, b""));
    assert_eq!(
        policy.outbound(&packet, now),
        prohibited(DropReason::OtherPeer)
    );
}

#[test]
fn destinations_without_grant_are_prohibited() {
    let judge = networks();
    for dst in [[9, 255, 255, 255], [11, 0, 0, 0], PUBLIC, [127, 0, 0, 1]] {
        assert_eq!(judge.to4(dst), prohibited(DropReason::NoGrant));
    }
    for dst in ["fd11:ffff::1", "fd12:1::", PUBLIC6, "::1"] {
        assert_eq!(judge.to6(dst), prohibited(DropReason::NoGrant));
    }
}

#[test]
fn networks_reach_from_first_to_last_address() {
    let judge = Judge::new(&[cidr(1, "10.1.2.0/23", &[]), cidr(2, "fd12::10/124", &[])]);
    assert_eq!(judge.to4([10, 1, 1, 255]), prohibited(DropReason::NoGrant));
    assert_eq!(judge.to4([10, 1, 2, 0]), FOREVER);
    assert_eq!(judge.to4([10, 1, 3, 255]), FOREVER);
    assert_eq!(judge.to4([10, 1, 4, 0]), prohibited(DropReason::NoGrant));
    assert_eq!(judge.to6("fd12::f"), prohibited(DropReason::NoGrant));
    assert_eq!(judge.to6("fd12::10"), FOREVER);
    assert_eq!(judge.to6("fd12::1f"), FOREVER);
    assert_eq!(judge.to6("fd12::20"), prohibited(DropReason::NoGrant));
}

#[test]
fn a_single_address_is_a_network_of_one() {
    let judge = Judge::new(&[cidr(1, "10.0.0.1/32", &[]), cidr(2, "fd12::1/128", &[])]);
    assert_eq!(judge.to4(HOST), FOREVER);
    assert_eq!(judge.to4([10, 0, 0, 2]), prohibited(DropReason::NoGrant));
    assert_eq!(judge.to6(HOST6), FOREVER);
    assert_eq!(judge.to6("fd12::2"), prohibited(DropReason::NoGrant));
}

// Classification, data-path spec §5.4.

#[test]
fn filters_apply_to_the_destination_port_outbound() {
    let judge = Judge::new(&[cidr(1, LAN, &[tcp(443, 443), udp(53, 54)])]);
    let c = addr4(1);
    assert_eq!(judge.outbound(&tcp4(c, HOST, 80, 443, b"")), FOREVER);
    assert_eq!(judge.outbound(&udp4(c, HOST, 80, 54, b"")), FOREVER);
    for packet in [
        tcp4(c, HOST, 443, 80, b""),
        tcp4(c, HOST, 1, 53, b""),
        udp4(c, HOST, 1, 443, b""),
        udp4(c, HOST, 1, 55, b""),
        icmp4(c, HOST, 8, 0, [0; 4], b""),
        ip4(c, HOST, 47, b"gre"),
    ] {
        assert_eq!(
            judge.outbound(&packet),
            prohibited(DropReason::FilterDenied)
        );
    }
}

#[test]
fn icmp_filter_ignores_the_echo_identifier() {
    let judge = Judge::new(&[cidr(1, LAN, &[Filter::Icmp])]);
    for id in [0u16, 1, 0xFFFF] {
        let [hi, lo] = id.to_be_bytes();
        let packet = icmp4(addr4(1), HOST, 8, 0, [hi, lo, 0, 1], b"");
        assert_eq!(judge.outbound(&packet), FOREVER);
    }
    assert_eq!(judge.to4(HOST), prohibited(DropReason::FilterDenied));
}

#[test]
fn protocols_without_ports_need_an_empty_filter_list() {
    let open = networks();
    let filtered = Judge::new(&[cidr(
        1,
        LAN,
        &[tcp(0, 65_535), udp(0, 65_535), Filter::Icmp],
    )]);
    for protocol in [2, 47, 50, 132] {
        let out = ip4(addr4(1), HOST, protocol, b"payload");
        let back = ip4(HOST, addr4(1), protocol, b"payload");
        assert_eq!(open.outbound(&out), FOREVER);
        assert_eq!(open.inbound(&back), FOREVER);
        assert_eq!(
            filtered.outbound(&out),
            prohibited(DropReason::FilterDenied)
        );
        assert_eq!(filtered.inbound(&back), silent(DropReason::FilterDenied));
    }
}

#[test]
fn what_permits_wins_over_the_longer_prefix() {
    let judge = Judge::new(&[
        cidr(1, "10.0.0.0/8", &[tcp(443, 443)]),
        cidr(2, "10.0.0.1/32", &[tcp(22, 22)]),
    ]);
    assert_eq!(judge.to4(HOST), FOREVER);
    let ssh = tcp4(addr4(1), HOST, 1, 22, b"");
    assert_eq!(judge.outbound(&ssh), FOREVER);
    let web = tcp4(addr4(1), HOST, 1, 80, b"");
    assert_eq!(judge.outbound(&web), prohibited(DropReason::FilterDenied));
}

#[test]
fn among_permitting_networks_the_longer_prefix_decides_the_expiry() {
    for (wide, narrow) in [(1, 2), (2, 1)] {
        let (policy, now) = policy(&[
            (cidr(wide, "10.0.0.0/8", &[]), Some(UNIX + 10)),
            (cidr(narrow, "10.0.0.0/24", &[]), Some(UNIX + 20)),
        ]);
        let packet = meta(&tcp4(addr4(1), HOST, 1, 443, b""));
        let until = Some(now + Duration::from_secs(20));
        assert_eq!(policy.outbound(&packet, now), Verdict::Allow { until });
    }
}

#[test]
fn among_equal_prefixes_the_larger_resource_id_decides() {
    let (policy, now) = policy(&[
        (cidr(7, LAN, &[]), Some(UNIX + 30)),
        (cidr(8, LAN, &[]), Some(UNIX + 10)),
        (cidr(9, LAN, &[tcp(22, 22)]), Some(UNIX + 20)),
    ]);
    let seconds = |s| Verdict::Allow {
        until: Some(now + Duration::from_secs(s)),
    };
    let web = meta(&tcp4(addr4(1), HOST, 1, 443, b""));
    assert_eq!(policy.outbound(&web, now), seconds(10));
    let ssh = meta(&tcp4(addr4(1), HOST, 1, 22, b""));
    assert_eq!(policy.outbound(&ssh, now), seconds(20));
    // With the decider gone the next in rank takes over.
    let later = now + Duration::from_secs(10);
    assert_eq!(policy.outbound(&web, later), seconds(30));
}

#[test]
fn internet_allows_public_addresses_and_calls_private_ones_unreachable() {
    let judge = Judge::new(&[internet(1)]);
    assert_eq!(judge.to4(PUBLIC), FOREVER);
    assert_eq!(judge.to6(PUBLIC6), FOREVER);
    assert_eq!(judge.outbound(&ip4(addr4(1), PUBLIC, 47, b"gre")), FOREVER);
    for dst in [
        [10, 0, 0, 1],
        [172, 16, 0, 1],
        [192, 168, 1, 1],
        [127, 0, 0, 1],
        [169, 254, 169, 254],
        [240, 0, 0, 1],
        [255, 255, 255, 255],
        [0, 0, 0, 0],
    ] {
        assert_eq!(judge.to4(dst), unreachable(DropReason::InternetRefused));
        assert_eq!(judge.from4(dst), silent(DropReason::InternetRefused));
    }
    for dst in ["::1", "::ffff:9.9.9.9", "fd12::1", "fe80::1", "fc00::1"] {
        assert_eq!(judge.to6(dst), unreachable(DropReason::InternetRefused));
        assert_eq!(judge.from6(dst), silent(DropReason::InternetRefused));
    }
}

#[test]
fn networks_are_ignored_while_the_client_holds_an_internet_resource() {
    let (policy, now) = policy(&[
        (cidr(1, LAN, &[]), None),
        (cidr(2, "9.0.0.0/8", &[tcp(22, 22)]), None),
        (internet(3), Some(UNIX + 10)),
    ]);
    let lan = meta(&tcp4(addr4(1), HOST, 1, 443, b""));
    let public = meta(&tcp4(addr4(1), PUBLIC, 1, 443, b""));
    assert_eq!(
        policy.outbound(&lan, now),
        unreachable(DropReason::InternetRefused)
    );
    // The filter of the network does not restrict the Internet resource.
    let end = now + Duration::from_secs(10);
    assert_eq!(
        policy.outbound(&public, now),
        Verdict::Allow { until: Some(end) }
    );
    // And once it has ended they count again.
    assert_eq!(policy.outbound(&lan, end), FOREVER);
    assert_eq!(
        policy.outbound(&public, end),
        prohibited(DropReason::FilterDenied)
    );
}

#[test]
fn the_longest_lived_of_several_internet_grants_counts() {
    let (policy, now) = policy(&[
        (internet(1), Some(UNIX + 30)),
        (internet(2), Some(UNIX + 10)),
    ]);
    let packet = meta(&tcp4(addr4(1), PUBLIC, 1, 443, b""));
    let until = Some(now + Duration::from_secs(30));
    assert_eq!(policy.outbound(&packet, now), Verdict::Allow { until });
}

#[test]
fn proxy_addresses_without_translation_are_unreachable() {
    for grants in [
        vec![dns(1, "*.corp.example")],
        vec![dns(1, "*.corp.example"), internet(2)],
        vec![dns(1, "*.corp.example"), cidr(2, "0.0.0.0/0", &[])],
        vec![cidr(1, "100.64.0.0/10", &[]), cidr(2, "fd00::/8", &[])],
    ] {
        let judge = Judge::new(&grants);
        assert_eq!(
            judge.to4([100, 96, 0, 1]),
            unreachable(DropReason::NotTranslated)
        );
        // No flow leads there, so that nothing can come from there either.
        assert_eq!(judge.from4([100, 96, 0, 1]), silent(DropReason::NoFlow));
        assert_eq!(
            judge.to6("fd00:2021:1111:8000::1"),
            unreachable(DropReason::NotTranslated)
        );
    }
}

#[test]
fn proxy_addresses_are_prohibited_for_clients_without_dns_resource() {
    for grants in [vec![cidr(1, LAN, &[])], vec![internet(1)]] {
        let judge = Judge::new(&grants);
        assert_eq!(judge.to4([100, 96, 0, 1]), prohibited(DropReason::NoGrant));
        assert_eq!(
            judge.to6("fd00:2021:1111:8000::1"),
            prohibited(DropReason::NoGrant)
        );
    }
}

// Resource to client, data-path spec §5.6.

#[test]
fn inbound_destination_must_be_the_client() {
    let judge = networks();
    assert_eq!(judge.from4(HOST), FOREVER);
    assert_eq!(judge.from6(HOST6), FOREVER);
    for packet in [
        tcp4(HOST, addr4(2), 443, 1, b""),
        tcp4(HOST, PUBLIC, 443, 1, b""),
        tcp6(HOST6, &addr6(2), 443, 1, b""),
    ] {
        assert_eq!(
            judge.inbound(&packet),
            silent(DropReason::DestinationNotClient)
        );
    }
}

#[test]
fn the_gateway_itself_may_send_anything_to_its_client() {
    let judge = networks();
    for packet in [
        udp4(GATEWAY4, addr4(1), 53_535, 1, b""),
        tcp4(GATEWAY4, addr4(1), 22, 1, b""),
        icmp4(GATEWAY4, addr4(1), 0, 0, [0; 4], b""),
        icmp4(
            GATEWAY4,
            addr4(1),
            11,
            0,
            [0; 4],
            &udp4(addr4(1), HOST, 1, 2, b""),
        ),
        udp6(GATEWAY6, &addr6(1), 53_535, 1, b""),
    ] {
        assert_eq!(judge.inbound(&packet), FOREVER);
    }
}

#[test]
fn inbound_source_must_not_be_a_tunnel_address() {
    let judge = Judge::new(&[
        cidr(1, "100.64.0.0/10", &[]),
        cidr(2, "fd00:2021:1111::/48", &[]),
    ]);
    for src in [addr4(2), addr4(1), [100, 95, 255, 255]] {
        assert_eq!(judge.from4(src), silent(DropReason::SourceInTunnelRange));
    }
    assert_eq!(
        judge.from6(&addr6(2)),
        silent(DropReason::SourceInTunnelRange)
    );
}

#[test]
fn filters_apply_to_the_source_port_inbound() {
    let judge = Judge::new(&[cidr(1, LAN, &[tcp(443, 443)])]);
    assert_eq!(judge.from4(HOST), FOREVER);
    let from_other_port = tcp4(HOST, addr4(1), 80, 443, b"");
    assert_eq!(
        judge.inbound(&from_other_port),
        silent(DropReason::FilterDenied)
    );
    assert_eq!(judge.from4(PUBLIC), silent(DropReason::NoGrant));
}

#[test]
fn icmp_errors_about_the_clients_packets_pass_regardless_of_filters() {
    let judge = Judge::new(&[cidr(1, LAN, &[tcp(443, 443)]), cidr(2, LAN6, &[tcp(1, 1)])]);
    let about4 = tcp4(addr4(1), HOST, 1, 443, b"");
    let about6 = tcp6(&addr6(1), HOST6, 1, 443, b"");
    // From the resource itself and from a router on the way.
    for src in [HOST, PUBLIC] {
        for kind in [3, 11] {
            let packet = icmp4(src, addr4(1), kind, 1, [0; 4], &about4);
            assert_eq!(judge.inbound(&packet), FOREVER);
        }
    }
    for src in [HOST6, PUBLIC6] {
        for kind in [1, 2, 3] {
            let packet = icmp6(src, &addr6(1), kind, 0, [0; 4], &about6);
            assert_eq!(judge.inbound(&packet), FOREVER);
        }
    }
}

#[test]
fn other_icmp_errors_do_not_reach_the_client() {
    let judge = networks();
    let own = tcp4(addr4(1), HOST, 1, 443, b"");
    let foreign = tcp4(addr4(2), HOST, 1, 443, b"");
    for packet in [
        // A redirect, and errors that are not about a packet of this client.
        icmp4(HOST, addr4(1), 5, 0, [10, 0, 0, 2], &own),
        icmp4(HOST, addr4(1), 3, 1, [0; 4], &foreign),
        icmp4(HOST, addr4(1), 3, 1, [0; 4], b""),
        // Too little is quoted to tell which flow it is about.
        icmp4(HOST, addr4(1), 3, 1, [0; 4], &own[..20]),
    ] {
        assert_eq!(
            judge.inbound(&packet),
            silent(DropReason::IcmpErrorNotForClient)
        );
    }
}

#[test]
fn an_icmp_error_from_a_tunnel_address_is_still_refused() {
    let judge = networks();
    let packet = icmp4(
        addr4(2),
        addr4(1),
        3,
        1,
        [0; 4],
        &tcp4(addr4(1), HOST, 1, 443, b""),
    );
    assert_eq!(
        judge.inbound(&packet),
        silent(DropReason::SourceInTunnelRange)
    );
}

#[test]
fn nothing_comes_in_that_the_client_has_not_asked_for() {
    let judge = Judge::new(&[cidr(1, LAN, &[]), cidr(2, LAN6, &[])]);
    let c4 = addr4(1);
    for packet in [
        tcp4(HOST, c4, 443, 1000, b""),
        udp4(HOST, c4, 53, 1000, b""),
        icmp4(HOST, c4, 8, 0, [0, 1, 0, 1], b""),
        icmp4(HOST, c4, 0, 0, [0, 1, 0, 1], b""),
        ip4(HOST, c4, 47, b"gre"),
        tcp6(HOST6, &addr6(1), 443, 1000, b""),
        icmp4(HOST, c4, 3, 1, [0; 4], &tcp4(c4, HOST, 1000, 443, b"")),
        tcp4([100, 96, 0, 1], c4, 443, 1000, b""),
    ] {
        assert_eq!(judge.unasked(&packet), silent(DropReason::NoFlow));
    }
}

#[test]
fn what_the_client_asks_for_comes_back_through_the_same_flow() {
    let judge = networks();
    let (c4, c6) = (addr4(1), addr6(1));
    for back in [
        tcp4(HOST, c4, 443, 1000, b""),
        icmp4(HOST, c4, 0, 0, [0, 1, 0, 1], b""),
        ip4(HOST, c4, 132, b"sctp"),
        udp6(HOST6, &c6, 443, 1000, b""),
    ] {
        let out = cause(&back).unwrap();
        let asked = judge.0.admit_outbound(&out, judge.1).unwrap();
        let answer = judge.0.admit_inbound(&meta(&back), judge.1).unwrap();
        assert_eq!((asked.until, answer.until), (None, None));
        assert!(Arc::ptr_eq(&asked.flow.unwrap(), &answer.flow.unwrap()));
    }
}

#[test]
fn what_is_refused_outbound_opens_no_way_back() {
    let judge = Judge::new(&[cidr(1, LAN, &[tcp(443, 443)])]);
    let c = addr4(1);
    for (out, back, reason) in [
        (
            udp4(c, HOST, 1000, 53, b""),
            udp4(HOST, c, 53, 1000, b""),
            DropReason::FilterDenied,
        ),
        (
            udp4(c, PUBLIC, 1000, 53, b""),
            udp4(PUBLIC, c, 53, 1000, b""),
            DropReason::NoGrant,
        ),
        (
            udp4(c, addr4(2), 1000, 53, b""),
            udp4(GATEWAY4, addr4(2), 53, 1000, b""),
            DropReason::OtherPeer,
        ),
    ] {
        let refused = judge.0.admit_outbound(&meta(&out), judge.1).unwrap_err();
        assert_eq!(refused.reason, reason);
        assert_eq!(refused.reply, Some(Reply::Prohibited));
        assert!(!judge.unasked(&back).is_allow());
    }
    assert_eq!(judge.0.tables.sizes().flows, 0);
}

#[test]
fn a_flow_ends_for_the_resource_as_it_ends_for_the_client() {
    let judge = networks();
    let (out, back) = (
        meta(&udp4(addr4(1), HOST, 1000, 53, b"")),
        udp4(HOST, addr4(1), 53, 1000, b""),
    );
    judge.0.admit_outbound(&out, judge.1).unwrap();
    let end = judge.1 + Duration::from_secs(60);
    let before = end - Duration::from_millis(100);
    assert_eq!(unasked(&judge.0, &back, before), FOREVER);
    assert_eq!(unasked(&judge.0, &back, end), silent(DropReason::NoFlow));
}

#[test]
fn the_gateways_own_services_need_no_flow() {
    let judge = networks();
    let packet = meta(&udp4(addr4(1), GATEWAY4, 1000, DNS_PORT, b""));
    let passed = judge.0.admit_outbound(&packet, judge.1).unwrap();
    assert!(passed.flow.is_none());
    for packet in [
        udp4(GATEWAY4, addr4(1), DNS_PORT, 1000, b""),
        udp6(GATEWAY6, &addr6(1), DNS_PORT, 1000, b""),
        icmp4(GATEWAY4, addr4(1), 8, 0, [0, 1, 0, 1], b""),
    ] {
        let answer = judge.0.admit_inbound(&meta(&packet), judge.1).unwrap();
        assert!(answer.flow.is_none());
    }
    // Nor does an error about them, say that nobody listens on the port.
    for packet in [
        icmp4(
            GATEWAY4,
            addr4(1),
            3,
            3,
            [0; 4],
            &udp4(addr4(1), GATEWAY4, 1000, DNS_PORT, b""),
        ),
        icmp6(
            GATEWAY6,
            &addr6(1),
            1,
            4,
            [0; 4],
            &udp6(&addr6(1), GATEWAY6, 1000, DNS_PORT, b""),
        ),
    ] {
        let about = judge.0.admit_error(&packet, &meta(&packet), judge.1);
        assert!(about.unwrap().is_none());
    }
    assert_eq!(judge.0.tables.sizes().flows, 0);
}

#[test]
fn errors_from_other_peers_are_refused_even_about_flows_that_exist() {
    let judge = networks();
    let out4 = tcp4(addr4(1), HOST, 1000, 443, b"");
    let out6 = tcp6(&addr6(1), HOST6, 1000, 443, b"");
    judge.0.admit_outbound(&meta(&out4), judge.1).unwrap();
    judge.0.admit_outbound(&meta(&out6), judge.1).unwrap();
    for packet in [
        icmp4(addr4(2), addr4(1), 3, 1, [0; 4], &out4),
        icmp4([100, 95, 255, 255], addr4(1), 3, 1, [0; 4], &out4),
        icmp6(&addr6(2), &addr6(1), 1, 0, [0; 4], &out6),
    ] {
        assert_eq!(
            judge.unasked(&packet),
            silent(DropReason::SourceInTunnelRange)
        );
    }
    let astray = icmp4(HOST, addr4(2), 3, 1, [0; 4], &out4);
    assert_eq!(
        judge.unasked(&astray),
        silent(DropReason::DestinationNotClient)
    );
}

// DNS resources, data-path spec §5.4 and §6.

const PROXY: [u8; 4] = [100, 96, 0, 1];
const PROXY2: [u8; 4] = [100, 96, 0, 2];
const PROXY6: &str = "fd00:2021:1111:8000::1";

/// A DNS resource for `*.corp.example` with filters.
fn corp(n: u8, filters: &[Filter]) -> Resource {
    let Resource::Dns(mut resource) = dns(n, "*.corp.example") else {
        unreachable!();
    };
    resource.filters = filters.to_vec();
    Resource::Dns(resource)
}

/// Client 1, which can announce names.
struct Namer {
    access: Access,
    now: Instant,
}

impl Namer {
    fn new(grants: &[(Resource, Option<u64>)]) -> Self {
        let (access, now) = access();
        let mut namer = Self { access, now };
        for (resource, expires_at) in grants {
            namer.grant(resource.clone(), *expires_at);
        }
        namer
    }

    fn grant(&mut self, resource: Resource, expires_at: Option<u64>) {
        let now = self.now;
        self.access.authorize(now, &peer(1), resource, expires_at);
    }

    fn announce(&mut self, resource: u8, domain: &str, proxies: &[IpAddr], addresses: &[IpAddr]) {
        let mut resolved = Resolved {
            ipv4: Some(vec![]),
            ipv6: Some(vec![]),
        };
        for address in addresses {
            match address {
                IpAddr::V4(a) => resolved.ipv4.as_mut().unwrap().push(*a),
                IpAddr::V6(a) => resolved.ipv6.as_mut().unwrap().push(*a),
            }
        }
        let (client, resource) = (client_id(1), resource_id(resource));
        self.access
            .announce(client, resource, domain, proxies, &resolved, self.now)
            .unwrap();
    }

    fn policy(&self) -> Arc<ClientPolicy> {
        self.access.policy(client_id(1)).unwrap()
    }

    fn send(&self, packet: &[u8]) -> Result<Passed, Denied> {
        self.policy().admit_outbound(&meta(packet), self.now)
    }

    fn receive(&self, packet: &[u8]) -> Result<Passed, Denied> {
        self.policy().admit_inbound(&meta(packet), self.now)
    }

    /// The flow of a TCP segment to a proxy address.
    #[track_caller]
    fn connect(&self, proxy: [u8; 4], port: u16) -> Arc<Flow> {
        let passed = self.send(&tcp4(addr4(1), proxy, 1000, port, b""));
        passed.unwrap().flow.unwrap()
    }

    /// Asserts what becomes of a TCP segment to this port of a proxy address.
    #[track_caller]
    fn assert_to(&self, proxy: [u8; 4], port: u16, expected: Verdict) {
        let packet = tcp4(addr4(1), proxy, 1000, port, b"");
        let passed = self.send(&packet).map(|passed| passed.until);
        assert_eq!(Verdict::from(passed), expected);
    }
}

#[test]
fn an_announced_name_is_reached_through_its_proxy_address_both_ways() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    let proxies = [PROXY.into(), PROXY6.parse().unwrap()];
    let addresses = [HOST.into(), HOST6.parse().unwrap()];
    namer.announce(1, "db.corp.example", &proxies, &addresses);
    let (c4, c6) = (addr4(1), addr6(1));
    for (out, back) in [
        (
            tcp4(c4, PROXY, 1000, 443, b""),
            tcp4(HOST, c4, 443, 1000, b""),
        ),
        (
            icmp4(c4, PROXY, 8, 0, [0, 7, 0, 1], b""),
            icmp4(HOST, c4, 0, 0, [0, 7, 0, 1], b""),
        ),
        (
            udp6(&c6, PROXY6, 1000, 443, b""),
            udp6(HOST6, &c6, 443, 1000, b""),
        ),
    ] {
        let unasked = namer.receive(&back).unwrap_err();
        assert_eq!(
            unasked,
            Denied {
                reason: DropReason::NoFlow,
                reply: None
            }
        );
        let flow = namer.send(&out).unwrap().flow.unwrap();
        assert!(flow.is_translated());
        assert_eq!(flow.remote(), meta(&out).dst);
        assert_eq!(flow.outside(), meta(&back).src);
        let answer = namer.receive(&back).unwrap().flow.unwrap();
        assert!(Arc::ptr_eq(&flow, &answer));
    }
}

#[test]
fn a_name_grants_nothing_on_the_real_address() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.assert_to(HOST, 443, prohibited(DropReason::NoGrant));
    namer.connect(PROXY, 443);
    namer.assert_to(HOST, 443, prohibited(DropReason::NoGrant));
}

#[test]
fn an_announced_name_is_judged_by_the_filters_of_its_resource() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 443)]), Some(UNIX + 10)),
        (dns(2, "*.other.example"), None),
    ]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let until = Some(namer.now + Duration::from_secs(10));
    namer.assert_to(PROXY, 443, Verdict::Allow { until });
    namer.assert_to(PROXY, 80, prohibited(DropReason::FilterDenied));

    // Filters that change meanwhile apply to what comes back, too.
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert!(namer.receive(&back).is_ok());
    namer.access.update_resource(&corp(1, &[tcp(80, 80)]));
    assert_eq!(
        namer.receive(&back).unwrap_err(),
        Denied {
            reason: DropReason::FilterDenied,
            reply: None
        }
    );
}

#[test]
fn two_names_for_one_host_keep_their_own_filters_both_ways() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 443)]), None),
        (dns(2, "ssh.example"), None),
    ]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.announce(2, "ssh.example", &[PROXY2.into()], &[HOST.into()]);
    namer.assert_to(PROXY, 22, prohibited(DropReason::FilterDenied));
    let web = namer.connect(PROXY, 443);
    let other = namer.connect(PROXY2, 443);
    assert_eq!(web.outside(), other.outside());
    assert_ne!(web.outside_port(), other.outside_port());

    let back = |flow: &Flow| tcp4(HOST, addr4(1), 443, flow.outside_port(), b"");
    for flow in [&web, &other] {
        let answer = namer.receive(&back(flow)).unwrap().flow.unwrap();
        assert!(Arc::ptr_eq(&answer, flow));
    }
    // What is taken from one is not taken from the other.
    namer.access.update_resource(&corp(1, &[tcp(80, 80)]));
    assert_eq!(
        namer.receive(&back(&web)).unwrap_err().reason,
        DropReason::FilterDenied
    );
    assert!(namer.receive(&back(&other)).is_ok());
    namer.access.reject(client_id(1), resource_id(2));
    assert_eq!(
        namer.receive(&back(&other)).unwrap_err().reason,
        DropReason::NoGrant
    );
}

#[test]
fn a_name_with_ipv6_addresses_alone_is_unreachable_over_ipv4() {
    let mut namer = Namer::new(&[(corp(1, &[tcp(443, 443)]), None)]);
    let proxies = [PROXY.into(), PROXY6.parse().unwrap()];
    namer.announce(1, "db.corp.example", &proxies, &[HOST6.parse().unwrap()]);
    namer.assert_to(PROXY, 443, unreachable(DropReason::NotTranslated));
    // Filters come first: they say more than the lack of an address.
    namer.assert_to(PROXY, 80, prohibited(DropReason::FilterDenied));
    let out = tcp6(&addr6(1), PROXY6, 1000, 443, b"");
    let flow = namer.send(&out).unwrap().flow.unwrap();
    assert_eq!(flow.outside(), HOST6.parse::<IpAddr>().unwrap());
    // A name without any address is unreachable as a whole.
    namer.announce(1, "none.corp.example", &[PROXY2.into()], &[]);
    namer.assert_to(PROXY2, 443, unreachable(DropReason::NotTranslated));
}

#[test]
fn a_protocol_that_cannot_be_translated_is_dropped_silently() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    for protocol in [47, 50, 132] {
        let packet = ip4(addr4(1), PROXY, protocol, b"payload");
        assert_eq!(
            namer.send(&packet).unwrap_err(),
            Denied {
                reason: DropReason::NatUnsupportedProtocol,
                reply: None
            }
        );
    }
}

#[test]
fn an_address_that_was_not_announced_is_unreachable_beside_one_that_was() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.assert_to(PROXY, 443, FOREVER);
    namer.assert_to(PROXY2, 443, unreachable(DropReason::NotTranslated));
}

#[test]
fn one_client_cannot_use_the_names_of_another() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let now = namer.now;
    namer.access.authorize(now, &peer(2), corp(1, &[]), None);
    let other = namer.access.policy(client_id(2)).unwrap();
    let packet = meta(&tcp4(addr4(2), PROXY, 1000, 443, b""));
    assert_eq!(
        other.admit_outbound(&packet, now).unwrap_err(),
        Denied {
            reason: DropReason::NotTranslated,
            reply: Some(Reply::Unreachable)
        }
    );
}

#[test]
fn a_name_whose_grant_was_taken_back_is_prohibited() {
    for other in [cidr(9, LAN6, &[]), dns(9, "other.example"), internet(9)] {
        let mut namer = Namer::new(&[(corp(1, &[]), None), (other, None)]);
        namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
        namer.connect(PROXY, 443);
        namer.access.reject(client_id(1), resource_id(1));
        namer.assert_to(PROXY, 443, prohibited(DropReason::NoGrant));
        let back = tcp4(HOST, addr4(1), 443, 1000, b"");
        assert_eq!(
            namer.receive(&back).unwrap_err(),
            Denied {
                reason: DropReason::NoGrant,
                reply: None
            }
        );
    }
}

#[test]
fn a_name_whose_grant_has_expired_is_prohibited_before_and_after_its_removal() {
    let mut namer = Namer::new(&[
        (corp(1, &[]), Some(UNIX + 10)),
        (dns(2, "other.example"), None),
    ]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.connect(PROXY, 443);
    namer.now += Duration::from_secs(10);
    namer.assert_to(PROXY, 443, prohibited(DropReason::GrantExpired));
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert_eq!(
        namer.receive(&back).unwrap_err(),
        Denied {
            reason: DropReason::GrantExpired,
            reply: None
        }
    );
    namer.access.handle_timeout(namer.now);
    namer.assert_to(PROXY, 443, prohibited(DropReason::NoGrant));
}

#[test]
fn a_name_works_again_once_its_resource_is_granted_again() {
    let mut namer = Namer::new(&[(corp(1, &[]), None), (cidr(2, LAN6, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let flow = namer.connect(PROXY, 443);
    namer.access.reject(client_id(1), resource_id(1));
    namer.assert_to(PROXY, 443, prohibited(DropReason::NoGrant));
    namer.grant(corp(1, &[]), None);
    // Clients do not announce again what was confirmed once; even the connection goes on.
    assert!(Arc::ptr_eq(&namer.connect(PROXY, 443), &flow));
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert!(namer.receive(&back).is_ok());
}

#[test]
fn of_a_network_over_the_proxy_range_and_a_name_what_permits_wins_then_the_name() {
    let (name_end, network_end) = (Some(UNIX + 10), Some(UNIX + 20));
    for (name, network) in [(1, 2), (2, 1)] {
        let mut namer = Namer::new(&[
            (corp(name, &[tcp(443, 444)]), name_end),
            (
                cidr(network, "100.64.0.0/10", &[tcp(444, 445)]),
                network_end,
            ),
        ]);
        namer.announce(name, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
        let until = |s| Verdict::Allow {
            until: Some(namer.now + Duration::from_secs(s)),
        };
        namer.assert_to(PROXY, 443, until(10));
        // Both permit it; the name is the longer prefix, whatever the ids.
        namer.assert_to(PROXY, 444, until(10));
        namer.assert_to(PROXY, 445, until(20));
        namer.assert_to(PROXY, 446, prohibited(DropReason::FilterDenied));
        // Where nothing was announced the network helps only to say no.
        namer.assert_to(PROXY2, 445, unreachable(DropReason::NotTranslated));
    }
}

#[test]
fn of_a_name_and_a_network_of_just_its_address_the_larger_id_decides() {
    for (name, network, seconds) in [(1, 2, 20), (2, 1, 10)] {
        let mut namer = Namer::new(&[
            (corp(name, &[]), Some(UNIX + 10)),
            (cidr(network, "100.96.0.1/32", &[]), Some(UNIX + 20)),
        ]);
        namer.announce(name, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
        let until = Some(namer.now + Duration::from_secs(seconds));
        namer.assert_to(PROXY, 443, Verdict::Allow { until });
    }
}

#[test]
fn of_two_resources_with_the_same_name_what_permits_wins_then_the_larger_id() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 444)]), Some(UNIX + 10)),
        (corp(2, &[tcp(444, 445)]), Some(UNIX + 20)),
        (corp(3, &[]), Some(UNIX + 30)),
    ]);
    for n in [2, 1] {
        namer.announce(n, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    }
    let until = |s| Verdict::Allow {
        until: Some(namer.now + Duration::from_secs(s)),
    };
    namer.assert_to(PROXY, 443, until(10));
    namer.assert_to(PROXY, 444, until(20));
    namer.assert_to(PROXY, 445, until(20));
    // The third covers the name, but it was not announced for it.
    namer.assert_to(PROXY, 446, prohibited(DropReason::FilterDenied));
}

#[test]
fn an_internet_resource_and_names_do_not_mix() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 443)]), None),
        (internet(2), Some(UNIX + 10)),
        (cidr(3, "100.64.0.0/10", &[]), None),
    ]);
    // A private address, which the Internet resource alone would refuse.
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let end = namer.now + Duration::from_secs(10);
    namer.assert_to(PUBLIC, 80, Verdict::Allow { until: Some(end) });
    namer.assert_to(HOST, 443, unreachable(DropReason::InternetRefused));
    namer.assert_to(PROXY, 443, FOREVER);
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert_eq!(namer.receive(&back).unwrap().until, None);
    // The Internet resource permits nothing on a name, and networks are ignored besides it.
    namer.assert_to(PROXY, 80, prohibited(DropReason::FilterDenied));
    namer.assert_to(PROXY2, 443, unreachable(DropReason::NotTranslated));
    namer.now = end;
    namer.assert_to(PROXY, 80, FOREVER);
}

#[test]
fn errors_about_translated_flows_name_the_flow_that_they_are_about() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    let proxies = [PROXY.into(), PROXY6.parse().unwrap()];
    let addresses = [HOST.into(), HOST6.parse().unwrap()];
    namer.announce(1, "db.corp.example", &proxies, &addresses);
    namer.announce(1, "b.corp.example", &[PROXY2.into()], &[HOST.into()]);
    let (c4, c6) = (addr4(1), addr6(1));
    let policy = namer.policy();
    let first = namer.connect(PROXY, 443);
    let second = namer.connect(PROXY2, 443);
    let third = namer.send(&udp6(&c6, PROXY6, 1000, 443, b"")).unwrap();
    let (third, port) = (third.flow.unwrap(), second.outside_port());
    let quoted6 = udp6(&c6, HOST6, 1000, 443, b"");
    for (packet, expected) in [
        // From the resource itself or a router on the way, of any kind.
        (
            icmp4(HOST, c4, 3, 3, [0; 4], &tcp4(c4, HOST, 1000, 443, b"")),
            &first,
        ),
        (
            icmp4(PUBLIC, c4, 11, 0, [0; 4], &tcp4(c4, HOST, port, 443, b"")),
            &second,
        ),
        (icmp6(PUBLIC6, &c6, 2, 0, [0, 0, 5, 0], &quoted6), &third),
    ] {
        let about = policy.admit_error(&packet, &meta(&packet), namer.now);
        let (flow, embedded) = about.unwrap().unwrap();
        assert!(Arc::ptr_eq(&flow, expected));
        assert_eq!(embedded.dst, flow.outside());
        assert_eq!(embedded.src_port, flow.outside_port());
    }
    // About a packet as the client sent it, or about none that it sent.
    for quoted in [
        tcp4(c4, PROXY, 1000, 443, b""),
        tcp4(c4, HOST, 999, 443, b""),
    ] {
        let packet = icmp4(PUBLIC, c4, 3, 1, [0; 4], &quoted);
        assert_eq!(
            unasked(&policy, &packet, namer.now),
            silent(DropReason::NoFlow)
        );
    }
}

#[test]
fn a_client_that_renumbers_its_names_loses_the_flows_to_the_old_ones() {
    let mut namer = Namer::new(&[(corp(1, &[]), None), (cidr(2, LAN, &[]), None)]);
    namer.announce(1, "a.corp.example", &[PROXY.into()], &[HOST.into()]);
    let old = namer.connect(PROXY, 443);
    let direct = namer.connect([10, 0, 0, 2], 443);
    namer.announce(1, "b.corp.example", &[PROXY.into()], &[PUBLIC.into()]);
    let tick = namer.policy().tick(namer.now);
    assert!(old.is_over(tick));
    assert!(!direct.is_over(tick));
    assert_eq!(namer.connect(PROXY, 443).outside(), IpAddr::from(PUBLIC));
}

#[test]
fn an_address_that_was_forgotten_and_given_to_another_name_leads_to_that_one() {
    let mut namer = Namer::new(&[(dns(1, "a.example"), None), (dns(2, "b.example"), None)]);
    namer.announce(1, "a.example", &[PROXY.into()], &[HOST.into()]);
    let old = namer.connect(PROXY, 443);
    assert_eq!(old.outside(), IpAddr::from(HOST));
    // The client has no access to the old name any more, and must not keep it under the new one.
    namer.grant(dns(1, "c.example"), None);
    namer.announce(2, "b.example", &[PROXY.into()], &[PUBLIC.into()]);
    assert_eq!(namer.connect(PROXY, 443).outside(), IpAddr::from(PUBLIC));
    assert!(old.is_over(namer.policy().tick(namer.now)));
}

#[test]
fn an_address_that_made_room_and_was_given_to_another_name_leads_to_that_one() {
    let mut namer = Namer::new(&[(dns(1, "a.example"), None), (dns(2, "**.b.example"), None)]);
    namer.announce(1, "a.example", &[PROXY.into()], &[HOST.into()]);
    namer.connect(PROXY, 443);
    namer.access.reject(client_id(1), resource_id(1));
    let others: Vec<IpAddr> = (0..crate::access::limits::MAX_PROXIES as u32)
        .map(|n| Ipv4Addr::from_bits(Ipv4Addr::new(100, 97, 0, 0).to_bits() + n).into())
        .collect();
    for (n, some) in others.chunks(64).enumerate() {
        namer.announce(2, &format!("n{n}.b.example"), some, &[PUBLIC.into()]);
    }
    namer.assert_to(PROXY, 443, unreachable(DropReason::NotTranslated));
    namer.announce(2, "one.b.example", &[PROXY.into()], &[PUBLIC.into()]);
    assert_eq!(namer.connect(PROXY, 443).outside(), IpAddr::from(PUBLIC));
}

// Expiry.

#[test]
fn every_kind_of_grant_ends_on_the_tick_even_if_the_slow_path_is_late() {
    const TICK: Duration = Duration::from_nanos(1);
    let packets = |dst: [u8; 4], port| {
        (
            meta(&udp4(addr4(1), dst, 1, port, b"")),
            udp4(dst, addr4(1), port, 1, b""),
        )
    };
    let error = icmp4(
        PUBLIC,
        addr4(1),
        11,
        0,
        [0; 4],
        &udp4(addr4(1), HOST, 1, 2, b""),
    );
    for (grant, (there, back)) in [
        (cidr(1, LAN, &[]), packets(HOST, 443)),
        (internet(1), packets(PUBLIC, 443)),
        (dns(1, "a.example"), packets(GATEWAY4, DNS_PORT)),
    ] {
        let (policy, now) = policy(&[(grant, Some(UNIX + 60))]);
        let end = now + Duration::from_secs(60);
        for at in [now, end - TICK] {
            let allowed = Verdict::Allow { until: Some(end) };
            assert_eq!(policy.outbound(&there, at), allowed);
            assert_eq!(inbound(&policy, &back, at), allowed);
            // Judged anew each time, so that it needs no end.
            assert_eq!(inbound(&policy, &error, at), FOREVER);
        }
        for at in [end, end + TICK, end + Duration::from_secs(86_400)] {
            assert_eq!(
                policy.outbound(&there, at),
                prohibited(DropReason::GrantExpired)
            );
            assert_eq!(
                inbound(&policy, &back, at),
                silent(DropReason::GrantExpired)
            );
            assert_eq!(
                inbound(&policy, &error, at),
                silent(DropReason::GrantExpired)
            );
        }
    }
}

#[test]
fn an_expired_dns_grant_leaves_proxy_addresses_prohibited() {
    let (policy, now) = policy(&[(dns(1, "a.example"), Some(UNIX + 60))]);
    let packet = meta(&udp4(addr4(1), [100, 96, 0, 1], 1, 443, b""));
    let end = now + Duration::from_secs(60);
    assert_eq!(
        policy.outbound(&packet, end - Duration::from_nanos(1)),
        unreachable(DropReason::NotTranslated)
    );
    assert_eq!(
        policy.outbound(&packet, end),
        prohibited(DropReason::GrantExpired)
    );
}

#[test]
fn gateway_services_last_as_long_as_the_longest_grant() {
    let (policy, now) = policy(&[
        (cidr(1, LAN, &[]), Some(UNIX + 60)),
        (dns(2, "a.example"), Some(UNIX + 90)),
        (internet(3), Some(UNIX + 30)),
    ]);
    let packet = meta(&udp4(addr4(1), GATEWAY4, 1, 53_535, b""));
    let until = Some(now + Duration::from_secs(90));
    assert_eq!(policy.outbound(&packet, now), Verdict::Allow { until });
}
