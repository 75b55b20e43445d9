//! Client to resource (data-path spec §5.3 and §5.4).

#![allow(clippy::unwrap_used)]

use super::*;

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
