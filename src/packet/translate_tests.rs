#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::packet::TcpFlags;
use crate::packet::samples::{
    self, icmp4, icmp6, ip4, ip4_options, ip6, tcp4, tcp4_flags, tcp6, udp4, udp6,
};

const C4: [u8; 4] = [100, 64, 0, 1];
const P4: [u8; 4] = [100, 96, 0, 1];
const R4: [u8; 4] = [10, 0, 0, 1];
const C6: &str = "fd00:2021:1111::1";
const P6: &str = "fd00:2021:1111:8000::1";
const R6: &str = "fd12::1";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn parse(packet: &[u8]) -> Meta {
    Meta::parse(packet).unwrap()
}

/// All checksums of a packet, computed by `etherparse`, agree with what is written.
fn checksums_hold(packet: &[u8]) -> bool {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let payload_sum = |sum: u16, written: u16| sum == written;
    let (src4, dst4, src6, dst6) = match sliced.net.as_ref().unwrap() {
        NetSlice::Ipv4(v4) => {
            let header = v4.header().to_header();
            if header.calc_header_checksum() != header.header_checksum {
                return false;
            }
            (Some(header.source), Some(header.destination), None, None)
        }
        NetSlice::Ipv6(v6) => {
            let header = v6.header().to_header();
            (None, None, Some(header.source), Some(header.destination))
        }
        _ => panic!("not IP"),
    };
    match sliced.transport.as_ref().unwrap() {
        TransportSlice::Tcp(tcp) => {
            let sum = match (src4, dst4, src6, dst6) {
                (Some(s), Some(d), _, _) => tcp.calc_checksum_ipv4(s, d).unwrap(),
                (_, _, Some(s), Some(d)) => tcp.calc_checksum_ipv6(s, d).unwrap(),
                _ => unreachable!(),
            };
            payload_sum(sum, tcp.checksum())
        }
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let sum = match (src4, dst4, src6, dst6) {
                (Some(s), Some(d), _, _) => {
                    header.calc_checksum_ipv4_raw(s, d, udp.payload()).unwrap()
                }
                (_, _, Some(s), Some(d)) => {
                    header.calc_checksum_ipv6_raw(s, d, udp.payload()).unwrap()
                }
                _ => unreachable!(),
            };
            payload_sum(sum, udp.checksum())
        }
        TransportSlice::Icmpv4(icmp) => {
            icmp.icmp_type().calc_checksum(icmp.payload()) == icmp.checksum()
        }
        TransportSlice::Icmpv6(icmp) => icmp.is_checksum_valid(src6.unwrap(), dst6.unwrap()),
    }
}

#[test]
fn a_client_packet_gets_the_destination_and_the_source_port_it_would_have_been_built_with() {
    for (mut packet, wanted) in [
        (
            tcp4(C4, P4, 1000, 443, b"hello"),
            tcp4(C4, R4, 2000, 443, b"hello"),
        ),
        (
            udp4(C4, P4, 1000, 53, b"odd"),
            udp4(C4, R4, 2000, 53, b"odd"),
        ),
        (
            icmp4(C4, P4, 8, 0, [0x03, 0xE8, 0, 7], b"ping"),
            icmp4(C4, R4, 8, 0, [0x07, 0xD0, 0, 7], b"ping"),
        ),
    ] {
        let meta = parse(&packet);
        assert!(outbound(&mut packet, &meta, R4.into(), 2000));
        assert_eq!(packet, wanted);
    }
    for (mut packet, wanted) in [
        (
            tcp6(C6, P6, 1000, 443, b"hello"),
            tcp6(C6, R6, 2000, 443, b"hello"),
        ),
        (
            udp6(C6, P6, 1000, 53, b"odd"),
            udp6(C6, R6, 2000, 53, b"odd"),
        ),
        (
            icmp6(C6, P6, 128, 0, [0x03, 0xE8, 0, 7], b"ping"),
            icmp6(C6, R6, 128, 0, [0x07, 0xD0, 0, 7], b"ping"),
        ),
    ] {
        let meta = parse(&packet);
        assert!(outbound(&mut packet, &meta, ip(R6), 2000));
        assert_eq!(packet, wanted);
    }
}

#[test]
fn a_resource_packet_gets_the_source_and_the_destination_port_the_client_knows() {
    for (mut packet, wanted, src) in [
        (
            tcp4(R4, C4, 443, 2000, b"hello"),
            tcp4(P4, C4, 443, 1000, b"hello"),
            IpAddr::from(P4),
        ),
        (
            udp6(R6, C6, 53, 2000, b"odd"),
            udp6(P6, C6, 53, 1000, b"odd"),
            ip(P6),
        ),
        (
            icmp6(R6, C6, 129, 0, [0x07, 0xD0, 0, 7], b"ping"),
            icmp6(P6, C6, 129, 0, [0x03, 0xE8, 0, 7], b"ping"),
            ip(P6),
        ),
    ] {
        let meta = parse(&packet);
        assert!(inbound(&mut packet, &meta, src, 1000));
        assert_eq!(packet, wanted);
    }
}

#[test]
fn an_absent_udp_checksum_stays_absent_and_a_zero_sum_is_written_as_ones() {
    let mut packet = udp4(C4, P4, 1000, 53, b"x");
    packet[26..28].fill(0);
    let meta = parse(&packet);
    assert!(outbound(&mut packet, &meta, R4.into(), 2000));
    assert_eq!(packet[26..28], [0, 0]);

    // Some port makes the sum come out as zero; 65536 of them cannot miss it.
    let zero = (0..=u16::MAX).find(|&port| {
        let mut packet = udp4(C4, P4, 1000, 53, b"x");
        let meta = parse(&packet);
        assert!(outbound(&mut packet, &meta, R4.into(), port));
        packet[26..28] == [0xFF, 0xFF]
    });
    let mut packet = udp4(C4, P4, 1000, 53, b"x");
    let meta = parse(&packet);
    assert!(outbound(&mut packet, &meta, R4.into(), zero.unwrap()));
    assert_eq!(packet, udp4(C4, R4, zero.unwrap(), 53, b"x"));
}

#[test]
fn what_cannot_be_translated_is_left_as_it_is() {
    let gre = ip4(C4, P4, 47, b"gre payload");
    let sctp = ip6(C6, P6, 132, b"sctp payload");
    let timestamp = icmp4(C4, P4, 13, 0, [0; 4], &[0; 12]);
    for (packet, address) in [
        (gre, IpAddr::from(R4)),
        (sctp, ip(R6)),
        (timestamp, IpAddr::from(R4)),
        // Of the other family.
        (tcp4(C4, P4, 1, 2, b""), ip(R6)),
        (tcp6(C6, P6, 1, 2, b""), IpAddr::from(R4)),
    ] {
        let mut copy = packet.clone();
        let meta = parse(&packet);
        assert!(!outbound(&mut copy, &meta, address, 9));
        assert!(!inbound(&mut copy, &meta, address, 9));
        assert_eq!(copy, packet);
    }
}

#[test]
fn options_and_extension_headers_are_stepped_over() {
    let udp = &udp4(C4, R4, 1000, 53, b"query")[20..];
    let mut packet = ip4_options(&[1, 1, 7, 4, 0, 0, 0, 0], 17, udp);
    let meta = parse(&packet);
    assert!(outbound(&mut packet, &meta, [10, 0, 0, 9].into(), 77));
    assert!(checksums_hold(&packet));
    let meta = parse(&packet);
    assert_eq!((meta.dst, meta.src_port), ([10, 0, 0, 9].into(), 77));

    let udp = &udp6(C6, P6, 1000, 53, b"query")[40..];
    let mut packet = ip6(C6, P6, 60, &[&[17, 0, 1, 4, 0, 0, 0, 0], udp].concat());
    let meta = parse(&packet);
    assert!(outbound(&mut packet, &meta, ip(R6), 77));
    assert!(checksums_hold(&packet));
    let meta = parse(&packet);
    assert_eq!((meta.dst, meta.src_port), (ip(R6), 77));
}

#[test]
fn a_damaged_packet_stays_damaged() {
    let mut packet = tcp4(C4, P4, 1000, 443, b"hello");
    *packet.last_mut().unwrap() ^= 1;
    let meta = parse(&packet);
    assert!(outbound(&mut packet, &meta, R4.into(), 2000));
    assert!(!checksums_hold(&packet));
}

#[test]
fn tcp_flags_are_told_apart() {
    for (flags, opening, closing, reset) in [
        ("S", true, false, false),
        ("SA", false, false, false),
        ("A", false, false, false),
        ("FA", false, true, false),
        ("R", false, false, true),
        ("RA", false, false, true),
    ] {
        let flags_read = parse(&tcp4_flags(C4, R4, 1, 2, flags)).tcp_flags;
        assert_eq!(flags_read.is_opening(), opening, "{flags}");
        assert_eq!(flags_read.is_closing(), closing, "{flags}");
        assert_eq!(flags_read.is_reset(), reset, "{flags}");
    }
    let udp = parse(&udp4(C4, R4, 1, 2, b"S")).tcp_flags;
    assert_eq!(udp, TcpFlags::default());
}

/// An error about each translatable packet, and the same error as the client must see it.
fn errors() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let router4 = [192, 0, 2, 1];
    let router6 = "2001:db8::1";
    let error4 = |about: &[u8]| icmp4(router4, C4, 3, 1, [0, 0, 5, 0], about);
    let seen4 = |about: &[u8]| icmp4(P4, C4, 3, 1, [0, 0, 5, 0], about);
    let error6 = |about: &[u8]| icmp6(router6, C6, 2, 0, [0, 0, 5, 0], about);
    let seen6 = |about: &[u8]| icmp6(P6, C6, 2, 0, [0, 0, 5, 0], about);
    vec![
        (
            "tcp4",
            error4(&tcp4(C4, R4, 2000, 443, b"hello")),
            seen4(&tcp4(C4, P4, 1000, 443, b"hello")),
        ),
        (
            "tcp4 cut after eight bytes, as RFC 792 has it",
            error4(&tcp4(C4, R4, 2000, 443, b"hello")[..28]),
            seen4(&tcp4(C4, P4, 1000, 443, b"hello")[..28]),
        ),
        (
            "udp4 cut to an odd length",
            error4(&udp4(C4, R4, 2000, 53, b"hello")[..31]),
            seen4(&udp4(C4, P4, 1000, 53, b"hello")[..31]),
        ),
        (
            "echo4",
            error4(&icmp4(C4, R4, 8, 0, [0x07, 0xD0, 0, 1], b"ping")),
            seen4(&icmp4(C4, P4, 8, 0, [0x03, 0xE8, 0, 1], b"ping")),
        ),
        (
            "tcp6",
            error6(&tcp6(C6, R6, 2000, 443, b"hello")),
            seen6(&tcp6(C6, P6, 1000, 443, b"hello")),
        ),
        (
            "udp6",
            error6(&udp6(C6, R6, 2000, 53, b"odd")),
            seen6(&udp6(C6, P6, 1000, 53, b"odd")),
        ),
        (
            "echo6",
            error6(&icmp6(C6, R6, 128, 0, [0x07, 0xD0, 0, 1], b"ping")),
            seen6(&icmp6(C6, P6, 128, 0, [0x03, 0xE8, 0, 1], b"ping")),
        ),
    ]
}

#[test]
fn an_error_about_a_translated_packet_is_one_about_the_packet_the_client_sent() {
    for (name, mut packet, wanted) in errors() {
        let meta = parse(&packet);
        let embedded = Embedded::of(&packet, &meta).unwrap();
        assert_eq!(embedded.src_port, 2000, "{name}");
        let proxy = if meta.is_ipv4() { P4.into() } else { ip(P6) };
        assert!(error_about(&mut packet, &meta, &embedded, proxy, 1000));
        assert_eq!(packet, wanted, "{name}");
    }
}

#[test]
fn an_error_names_the_flow_it_is_about() {
    let packet = icmp4(R4, C4, 11, 0, [0; 4], &udp4(C4, R4, 7, 9, b"")[..28]);
    let embedded = Embedded::of(&packet, &parse(&packet)).unwrap();
    assert_eq!((embedded.src, embedded.dst), (C4.into(), R4.into()));
    assert_eq!((embedded.src_port, embedded.dst_port), (7, 9));
    assert_eq!(embedded.protocol, protocol::UDP);

    let reply = icmp4(C4, R4, 0, 0, [0, 9, 0, 0], b"");
    let packet = icmp4(R4, C4, 3, 1, [0; 4], &reply);
    let embedded = Embedded::of(&packet, &parse(&packet)).unwrap();
    assert!(!embedded.is_echo_request);
    assert_eq!(embedded.src_port, 0);
}

#[test]
fn errors_without_ports_are_about_nothing() {
    let mut later_fragment = udp4(C4, R4, 7, 9, b"");
    later_fragment[7] = 1;
    for about in [
        &b""[..],
        &udp4(C4, R4, 7, 9, b"")[..23],
        &later_fragment,
        &[0x55; 40],
    ] {
        let packet = icmp4(R4, C4, 3, 1, [0; 4], about);
        assert_eq!(Embedded::of(&packet, &parse(&packet)), None);
    }
    for (name, packet) in samples::all() {
        let meta = parse(&packet);
        assert_eq!(
            Embedded::of(&packet, &meta).is_some(),
            meta.is_icmp_error(),
            "{name}"
        );
    }
}

#[test]
fn every_truncation_of_an_error_is_survived() {
    for (name, whole, _) in errors() {
        for len in 0..whole.len() {
            let mut packet = whole[..len].to_vec();
            if len >= 40 || (len >= 20 && whole[0] >> 4 == 4) {
                let (at, value) = if whole[0] >> 4 == 4 {
                    (2, len)
                } else {
                    (4, len - 40)
                };
                packet[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
            }
            let Ok(meta) = Meta::parse(&packet) else {
                continue;
            };
            let Some(embedded) = Embedded::of(&packet, &meta) else {
                continue;
            };
            let proxy = if meta.is_ipv4() { P4.into() } else { ip(P6) };
            assert!(
                error_about(&mut packet, &meta, &embedded, proxy, 1000),
                "{name} cut to {len}"
            );
        }
    }
}

proptest! {
    #[test]
    fn there_and_back_is_the_same_packet_with_true_checksums_between(
        kind in 0..6,
        real4: [u8; 4],
        real6: [u8; 16],
        (port, other) in any::<(u16, u16)>(),
        translated: u16,
        data in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let id = port.to_be_bytes();
        let packet = match kind {
            0 => tcp4(C4, P4, port, other, &data),
            1 => udp4(C4, P4, port, other, &data),
            2 => icmp4(C4, P4, 8, 0, [id[0], id[1], 0, 1], &data),
            3 => tcp6(C6, P6, port, other, &data),
            4 => udp6(C6, P6, port, other, &data),
            _ => icmp6(C6, P6, 128, 0, [id[0], id[1], 0, 1], &data),
        };
        let (real, proxy): (IpAddr, IpAddr) = if kind < 3 {
            (real4.into(), P4.into())
        } else {
            (real6.into(), ip(P6))
        };
        let mut copy = packet.clone();
        let meta = parse(&copy);
        prop_assert!(outbound(&mut copy, &meta, real, translated));
        prop_assert!(checksums_hold(&copy));
        let meta = Meta::parse(&copy).unwrap();
        prop_assert_eq!((meta.dst, meta.src_port), (real, translated));
        let meta = parse(&copy);
        prop_assert!(outbound(&mut copy, &meta, proxy, port));
        prop_assert_eq!(copy, packet);
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..120), six: bool) {
        if bytes.len() >= 48 {
            let len = bytes.len() as u16;
            if six {
                bytes[0] = 0x60;
                bytes[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                bytes[6] = 58;
                bytes[40] &= 0x83;
            } else {
                bytes[0] = 0x45;
                bytes[2..4].copy_from_slice(&len.to_be_bytes());
                bytes[6] = 0;
                bytes[7] = 0;
                bytes[9] = 1;
                bytes[20] = 3;
            }
        }
        if let Ok(meta) = Meta::parse(&bytes) {
            let mut copy = bytes.clone();
            outbound(&mut copy, &meta, R4.into(), 1);
            inbound(&mut copy, &meta, ip(R6), 1);
            if let Some(embedded) = Embedded::of(&bytes, &meta) {
                error_about(&mut bytes, &meta, &embedded, P4.into(), 1);
                error_about(&mut bytes, &meta, &embedded, ip(P6), 1);
            }
        }
    }
}
