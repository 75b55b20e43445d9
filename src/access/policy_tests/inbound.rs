//! Resource to client (data-path spec §5.6).

#![allow(clippy::unwrap_used)]

use super::*;

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
