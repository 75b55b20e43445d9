#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::packet::samples::{self, icmp4, icmp6, ip4, ip4_options, ip6, tcp4, tcp6, udp4, udp6};

const C4: [u8; 4] = [100, 64, 0, 1];
const R4: [u8; 4] = [10, 0, 0, 1];
const C6: &str = "fd00:2021:1111::1";
const R6: &str = "fd12::1";

fn parse(packet: &[u8]) -> Meta {
    Meta::parse(packet).unwrap()
}

/// Makes the length field agree with the slice, if there is one.
fn repair_length(packet: &mut [u8]) {
    let len = packet.len() as u16;
    match packet.first().map(|b| b >> 4) {
        Some(4) if len >= 4 => packet[2..4].copy_from_slice(&len.to_be_bytes()),
        Some(6) if len >= 40 => packet[4..6].copy_from_slice(&(len - 40).to_be_bytes()),
        _ => {}
    }
}

#[test]
fn addresses_protocol_and_ports_are_read() {
    for packet in [udp4(C4, R4, 1000, 53, b"q"), tcp4(C4, R4, 1000, 53, b"q")] {
        let meta = parse(&packet);
        assert_eq!(meta.src, IpAddr::from(C4));
        assert_eq!(meta.dst, IpAddr::from(R4));
        assert_eq!((meta.src_port, meta.dst_port), (1000, 53));
        assert_eq!(meta.protocol, packet[9]);
        assert_eq!(usize::from(meta.len), packet.len());
        assert_eq!(meta.transport_offset, 20);
        assert!(meta.is_ipv4());
    }
    for packet in [udp6(C6, R6, 1000, 53, b"q"), tcp6(C6, R6, 1000, 53, b"q")] {
        let meta = parse(&packet);
        assert_eq!(meta.src, C6.parse::<IpAddr>().unwrap());
        assert_eq!(meta.dst, R6.parse::<IpAddr>().unwrap());
        assert_eq!((meta.src_port, meta.dst_port), (1000, 53));
        assert_eq!(meta.protocol, packet[6]);
        assert_eq!(meta.transport_offset, 40);
        assert!(!meta.is_ipv4());
    }
}

#[test]
fn every_sample_is_accepted() {
    for (name, packet) in samples::all() {
        assert!(Meta::parse(&packet).is_ok(), "{name}");
    }
}

#[test]
fn echo_identifier_stands_for_both_ports() {
    for (packet, request) in [
        (icmp4(C4, R4, 8, 0, [0x12, 0x34, 0, 9], b"x"), true),
        (icmp4(C4, R4, 0, 0, [0x12, 0x34, 0, 9], b"x"), false),
        (icmp6(C6, R6, 128, 0, [0x12, 0x34, 0, 9], b"x"), true),
        (icmp6(C6, R6, 129, 0, [0x12, 0x34, 0, 9], b"x"), false),
    ] {
        let meta = parse(&packet);
        assert_eq!((meta.src_port, meta.dst_port), (0x1234, 0x1234));
        assert_eq!(meta.is_icmp_echo_request(), request);
        assert_eq!(meta.is_icmp_echo_reply(), !request);
        assert!(!meta.is_icmp_error());
    }
}

#[test]
fn other_protocols_and_icmp_types_have_no_ports() {
    for packet in [
        ip4(C4, R4, 47, &[0xFF; 20]),
        ip6(C6, R6, 132, &[0xFF; 20]),
        icmp4(C4, R4, 13, 0, [0xFF; 4], b""),
        icmp6(C6, R6, 135, 0, [0xFF; 4], b""),
    ] {
        let meta = parse(&packet);
        assert_eq!((meta.src_port, meta.dst_port), (0, 0));
    }
}

#[test]
fn icmp_errors_are_told_by_type() {
    for kind in 0..=255 {
        let v4 = parse(&icmp4(R4, C4, kind, 0, [0; 4], b""));
        let v6 = parse(&icmp6(R6, C6, kind, 0, [0; 4], b""));
        assert_eq!(
            v4.is_icmp_error(),
            [3, 4, 5, 11, 12].contains(&kind),
            "{kind}"
        );
        assert_eq!(v6.is_icmp_error(), kind < 128, "{kind}");
        assert!(!v4.is_icmp_error_for_dst() && !v6.is_icmp_error_for_dst());
    }
}

#[test]
fn only_actionable_errors_about_the_receivers_own_packets_count_as_for_it() {
    let (own4, foreign4) = (
        udp4(C4, R4, 1, 2, b""),
        udp4([100, 64, 0, 2], R4, 1, 2, b""),
    );
    let (own6, foreign6) = (
        udp6(C6, R6, 1, 2, b""),
        udp6("fd00:2021:1111::2", R6, 1, 2, b""),
    );
    for kind in 0..=255 {
        let v4 = |about: &[u8]| parse(&icmp4(R4, C4, kind, 0, [0; 4], about));
        let v6 = |about: &[u8]| parse(&icmp6(R6, C6, kind, 0, [0; 4], about));
        assert_eq!(
            v4(&own4).is_icmp_error_for_dst(),
            [3, 11].contains(&kind),
            "{kind}"
        );
        assert_eq!(
            v6(&own6).is_icmp_error_for_dst(),
            [1, 2, 3].contains(&kind),
            "{kind}"
        );
        for other in [&foreign4[..], &own6, &own4[..19], b""] {
            assert!(!v4(other).is_icmp_error_for_dst());
        }
        for other in [&foreign6[..], &own4, &own6[..39], b""] {
            assert!(!v6(other).is_icmp_error_for_dst());
        }
        // A header alone is enough to know whose packet it was.
        assert_eq!(
            v4(&own4[..20]).is_icmp_error_for_dst(),
            [3, 11].contains(&kind)
        );
    }
}

#[test]
fn multicast_destinations_are_recognized() {
    assert!(parse(&udp4(C4, [224, 0, 0, 251], 1, 2, b"")).is_multicast());
    assert!(parse(&udp6(C6, "ff02::fb", 1, 2, b"")).is_multicast());
    assert!(!parse(&udp4(C4, R4, 1, 2, b"")).is_multicast());
}

#[test]
fn control_packets_need_protocol_and_both_addresses() {
    assert!(parse(&samples::control(2, b"")).is_control());
    assert!(!parse(&ip6("::", "::1", 0xFF, b"12345678")).is_control());
    assert!(!parse(&ip6("::1", "::", 0xFF, b"12345678")).is_control());
    assert!(!parse(&ip6("::", "::", 0xFE, b"12345678")).is_control());
    assert!(!parse(&ip4([0; 4], [0; 4], 0xFF, b"12345678")).is_control());
}

#[test]
fn empty_and_foreign_packets_are_refused() {
    assert_eq!(Meta::parse(&[]), Err(Malformed::Version));
    for version in (0..16u8).filter(|v| ![4, 6].contains(v)) {
        let packet = [version << 4; 60];
        assert_eq!(Meta::parse(&packet), Err(Malformed::Version));
    }
}

#[test]
fn a_packet_of_1280_bytes_passes_and_one_more_does_not() {
    for (packet, header) in [(udp4(C4, R4, 1, 2, b""), 28), (udp6(C6, R6, 1, 2, b""), 48)] {
        let v4 = packet[0] >> 4 == 4;
        let build = |len: usize| {
            let data = vec![0; len - header];
            if v4 {
                udp4(C4, R4, 1, 2, &data)
            } else {
                udp6(C6, R6, 1, 2, &data)
            }
        };
        assert!(Meta::parse(&build(1280)).is_ok());
        assert_eq!(Meta::parse(&build(1281)), Err(Malformed::TooLong));
        assert!(Meta::parse_up_to(&build(1281), 65_535).is_ok());
    }
}

#[test]
fn no_limit_admits_more_than_the_length_fields_can_say() {
    let packet = vec![0x45; 70_000];
    assert_eq!(
        Meta::parse_up_to(&packet, usize::MAX),
        Err(Malformed::TooLong)
    );
}

#[test]
fn length_fields_must_equal_the_slice() {
    for mut packet in [udp4(C4, R4, 1, 2, b"data"), tcp4(C4, R4, 1, 2, b"data")] {
        packet.push(0);
        assert_eq!(Meta::parse(&packet), Err(Malformed::Length));
        packet.truncate(packet.len() - 2);
        assert_eq!(Meta::parse(&packet), Err(Malformed::Length));
    }
    for mut packet in [udp6(C6, R6, 1, 2, b"data"), tcp6(C6, R6, 1, 2, b"data")] {
        packet.push(0);
        assert_eq!(Meta::parse(&packet), Err(Malformed::Length));
        packet.truncate(packet.len() - 2);
        assert_eq!(Meta::parse(&packet), Err(Malformed::Length));
    }
}

#[test]
fn ipv4_header_length_must_be_sane() {
    let good = udp4(C4, R4, 1, 2, b"");
    for ihl in 0..5 {
        let mut packet = good.clone();
        packet[0] = 0x40 | ihl;
        assert_eq!(Meta::parse(&packet), Err(Malformed::Truncated));
    }
    let mut packet = good;
    packet[0] = 0x48; // 32 bytes in a packet of 28
    assert_eq!(Meta::parse(&packet), Err(Malformed::Truncated));
}

#[test]
fn udp_length_must_equal_the_ip_payload() {
    for at in [-1i32, 1] {
        let mut v4 = udp4(C4, R4, 1, 2, b"data");
        let mut v6 = udp6(C6, R6, 1, 2, b"data");
        let wrong = ((12 + at) as u16).to_be_bytes();
        v4[24..26].copy_from_slice(&wrong);
        v6[44..46].copy_from_slice(&wrong);
        assert_eq!(Meta::parse(&v4), Err(Malformed::UdpLength));
        assert_eq!(Meta::parse(&v6), Err(Malformed::UdpLength));
    }
    assert_eq!(
        Meta::parse(&ip4(C4, R4, 17, &[0, 1, 0, 2, 0, 7, 0])),
        Err(Malformed::UdpLength)
    );
}

#[test]
fn tcp_header_must_be_whole() {
    let mut packet = tcp4(C4, R4, 1, 2, b"");
    for words in 0..5 {
        packet[32] = words << 4;
        assert_eq!(Meta::parse(&packet), Err(Malformed::TcpHeader));
    }
    packet[32] = 6 << 4; // options that are not there
    assert_eq!(Meta::parse(&packet), Err(Malformed::TcpHeader));
    packet.extend_from_slice(&[1; 4]);
    repair_length(&mut packet);
    assert!(Meta::parse(&packet).is_ok());
    assert_eq!(
        Meta::parse(&ip6(C6, R6, 6, &[0; 19])),
        Err(Malformed::TcpHeader)
    );
}

#[test]
fn icmp_header_must_be_whole() {
    assert_eq!(
        Meta::parse(&ip4(C4, R4, 1, &[8; 7])),
        Err(Malformed::IcmpHeader)
    );
    assert_eq!(
        Meta::parse(&ip6(C6, R6, 58, &[128; 7])),
        Err(Malformed::IcmpHeader)
    );
}

#[test]
fn icmp_of_the_other_family_is_refused() {
    assert_eq!(
        Meta::parse(&ip4(C4, R4, 58, &[128, 0, 0, 0, 0, 0, 0, 0])),
        Err(Malformed::IcmpFamily)
    );
    assert_eq!(
        Meta::parse(&ip6(C6, R6, 1, &[8, 0, 0, 0, 0, 0, 0, 0])),
        Err(Malformed::IcmpFamily)
    );
}

#[test]
fn ipv4_fragments_are_refused_and_dont_fragment_is_not() {
    let good = udp4(C4, R4, 1, 2, b"");
    for (word, ok) in [
        (0x0000u16, true),
        (0x4000, true),  // don't fragment
        (0x8000, true),  // reserved
        (0x2000, false), // more fragments
        (0x0001, false), // offset 8
        (0x1FFF, false), // largest offset
    ] {
        let mut packet = good.clone();
        packet[6..8].copy_from_slice(&word.to_be_bytes());
        let parsed = Meta::parse(&packet);
        if ok {
            assert!(parsed.is_ok(), "{word:04x}");
        } else {
            assert_eq!(parsed, Err(Malformed::Fragment), "{word:04x}");
        }
    }
}

#[test]
fn ipv6_fragments_are_refused_unless_atomic() {
    let udp = udp6(C6, R6, 1, 2, b"")[40..].to_vec();
    for (word, ok) in [
        (0x0000u16, true),
        (0x0006, true),  // reserved bits
        (0x0001, false), // more fragments
        (0x0008, false), // offset 8
        (0xFFF8, false), // largest offset
    ] {
        let [hi, lo] = word.to_be_bytes();
        let payload = [&[17, 0, hi, lo, 0, 0, 0, 7], &udp[..]].concat();
        let parsed = Meta::parse(&ip6(C6, R6, 44, &payload));
        if ok {
            let meta = parsed.unwrap();
            assert!(meta.is_atomic_fragment());
            assert_eq!((meta.protocol, meta.dst_port), (17, 2));
            assert_eq!(meta.transport_offset, 48);
        } else {
            assert_eq!(parsed, Err(Malformed::Fragment), "{word:04x}");
        }
    }
    assert!(!parse(&udp6(C6, R6, 1, 2, b"")).is_atomic_fragment());
}

#[test]
fn ports_behind_extension_headers_are_found() {
    let udp = udp6(C6, R6, 1000, 53, b"")[40..].to_vec();
    // Hop-by-hop (8), destination options (16), atomic fragment (8), spent routing header (8).
    let chain = [
        &[60u8, 0, 1, 4, 0, 0, 0, 0][..],
        &[44, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[43, 0, 0, 0, 0, 0, 0, 1],
        &[17, 0, 4, 0, 0, 0, 0, 0],
        &udp,
    ]
    .concat();
    let meta = parse(&ip6(C6, R6, 0, &chain));
    assert_eq!((meta.protocol, meta.dst_port), (17, 53));
    assert_eq!(meta.transport_offset, 80);
}

#[test]
fn a_chain_of_extension_headers_has_an_end() {
    let endless: Vec<u8> = [60, 0, 1, 4, 0, 0, 0, 0].repeat(100);
    assert_eq!(
        Meta::parse(&ip6(C6, R6, 60, &endless)),
        Err(Malformed::ExtensionHeaders)
    );
}

#[test]
fn an_extension_header_longer_than_the_packet_is_refused() {
    assert_eq!(
        Meta::parse(&ip6(C6, R6, 60, &[17, 1, 1, 4, 0, 0, 0, 0])),
        Err(Malformed::Truncated)
    );
    assert_eq!(
        Meta::parse(&ip6(C6, R6, 0, &[17, 0, 1])),
        Err(Malformed::Truncated)
    );
}

#[test]
fn source_routes_are_refused() {
    let udp = udp4(C4, R4, 1, 2, b"")[20..].to_vec();
    for kind in [131, 137] {
        let direct = ip4_options(&[kind, 7, 4, 10, 9, 9, 9, 0], 17, &udp);
        assert_eq!(Meta::parse(&direct), Err(Malformed::SourceRouted));
        let behind = ip4_options(&[1, 7, 3, 4, kind, 7, 4, 10, 9, 9, 9, 0], 17, &udp);
        assert_eq!(Meta::parse(&behind), Err(Malformed::SourceRouted));
        // Behind the end of the list the byte means nothing.
        let after_end = ip4_options(&[0, kind, 7, 4], 17, &udp);
        assert!(Meta::parse(&after_end).is_ok());
    }
    let routed = [&[17u8, 2, 0, 1, 0, 0, 0, 0][..], &[0xFD; 16], &udp].concat();
    assert_eq!(
        Meta::parse(&ip6(C6, R6, 43, &routed)),
        Err(Malformed::SourceRouted)
    );
}

#[test]
fn options_that_cannot_be_walked_are_refused() {
    for options in [[7u8, 0, 0, 0], [7, 1, 0, 0], [7, 5, 0, 0], [1, 1, 1, 7]] {
        assert_eq!(
            Meta::parse(&ip4_options(&options, 47, b"")),
            Err(Malformed::Options),
            "{options:?}"
        );
    }
}

#[test]
fn what_is_behind_esp_and_ah_counts_as_that_protocol() {
    let udp = udp6(C6, R6, 1000, 53, b"")[40..].to_vec();
    let ah = [&[17u8, 4, 0, 0][..], &[0; 20], &udp].concat();
    for protocol in [50, 51, 59] {
        let meta = parse(&ip6(C6, R6, protocol, &ah));
        assert_eq!((meta.protocol, meta.dst_port), (protocol, 0));
    }
}

#[test]
fn names_of_reasons_are_distinct() {
    use std::collections::HashSet;
    let all = [
        Malformed::Version,
        Malformed::Truncated,
        Malformed::TooLong,
        Malformed::Length,
        Malformed::Fragment,
        Malformed::Options,
        Malformed::SourceRouted,
        Malformed::ExtensionHeaders,
        Malformed::TcpHeader,
        Malformed::UdpLength,
        Malformed::IcmpHeader,
        Malformed::IcmpFamily,
    ];
    let names: HashSet<_> = all.iter().map(|m| m.as_str()).collect();
    assert_eq!(names.len(), all.len());
    assert!(names.iter().all(|n| n.starts_with("malformed_")));
}

#[test]
fn every_truncation_of_every_sample_is_refused() {
    for (name, packet) in samples::all() {
        for len in 0..packet.len() {
            assert!(Meta::parse(&packet[..len]).is_err(), "{name} cut to {len}");
        }
    }
}

#[test]
fn every_truncation_with_repaired_lengths_is_survived() {
    for (_, packet) in samples::all() {
        for len in 1..packet.len() {
            let mut cut = packet[..len].to_vec();
            repair_length(&mut cut);
            if let Ok(meta) = Meta::parse(&cut) {
                assert!(usize::from(meta.transport_offset) <= cut.len());
                assert_eq!(usize::from(meta.len), cut.len());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes_never_panic(packet in prop::collection::vec(any::<u8>(), 0..1400)) {
        let _ = Meta::parse(&packet);
    }

    /// Random damage to valid packets, with the length fields repaired so that the damage is
    /// reached; accepted packets must agree with an independent parser.
    #[test]
    fn damaged_samples_never_panic_and_agree_with_etherparse(
        which in 0usize..14,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let (_, mut packet) = samples::all().swap_remove(which);
        for (at, value) in damage {
            let at = at.index(packet.len());
            packet[at] = value;
        }
        repair_length(&mut packet);
        if let Ok(meta) = Meta::parse(&packet) {
            compare_with_etherparse(&packet, &meta)?;
        }
    }
}

fn compare_with_etherparse(packet: &[u8], meta: &Meta) -> Result<(), TestCaseError> {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    // Authentication headers are opaque here and followed there.
    if meta.protocol == 51 {
        return Ok(());
    }
    let Ok(sliced) = SlicedPacket::from_ip(packet) else {
        // The independent parser may be stricter, e.g. about the order of extension headers.
        return Ok(());
    };
    let (src, dst): (IpAddr, IpAddr) = match sliced.net.unwrap() {
        NetSlice::Ipv4(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        NetSlice::Ipv6(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        NetSlice::Arp(_) => unreachable!("not IP"),
    };
    prop_assert_eq!((meta.src, meta.dst), (src, dst));
    match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            prop_assert_eq!(meta.protocol, 6);
            prop_assert_eq!(meta.src_port, tcp.source_port());
            prop_assert_eq!(meta.dst_port, tcp.destination_port());
        }
        Some(TransportSlice::Udp(udp)) => {
            prop_assert_eq!(meta.protocol, 17);
            prop_assert_eq!(meta.src_port, udp.source_port());
            prop_assert_eq!(meta.dst_port, udp.destination_port());
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            prop_assert_eq!(meta.protocol, 1);
            prop_assert_eq!(meta.is_icmp_echo_request(), icmp.type_u8() == 8);
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            prop_assert_eq!(meta.protocol, 58);
            prop_assert_eq!(meta.is_icmp_echo_request(), icmp.type_u8() == 128);
        }
        None => prop_assert_eq!((meta.src_port, meta.dst_port), (0, 0)),
    }
    Ok(())
}
