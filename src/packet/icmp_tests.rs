#![allow(clippy::unwrap_used)]

use etherparse::icmpv4::DestUnreachableHeader as V4;
use etherparse::icmpv6::DestUnreachableCode as V6;
use etherparse::{Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::packet::samples::{self, icmp4, icmp6, ip4_options, tcp4, udp4, udp6};

const C4: [u8; 4] = [100, 64, 0, 1];
const R4: [u8; 4] = [10, 0, 0, 1];
const C6: &str = "fd00:2021:1111::1";
const R6: &str = "fd12::1";

type Builder = fn(&[u8], &mut [u8]) -> Option<usize>;

fn answer(build: Builder, original: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0xAA; MAX_REPLY];
    let len = build(original, &mut out)?;
    out.truncate(len);
    Some(out)
}

/// Checks everything that both kinds of reply share, with checksums calculated by `etherparse`,
/// and returns the embedded part.
fn verify_v4(reply: &[u8], original: &[u8], expected: Icmpv4Type) -> Vec<u8> {
    let sliced = SlicedPacket::from_ip(reply).unwrap();
    let Some(NetSlice::Ipv4(ip)) = sliced.net else {
        panic!("not IPv4");
    };
    let header = ip.header().to_header();
    assert_eq!(header.time_to_live, 20);
    assert_eq!(header.header_checksum, header.calc_header_checksum());
    assert_eq!(usize::from(header.total_len), reply.len());
    assert_eq!(header.source, original[16..20]);
    assert_eq!(header.destination, original[12..16]);
    let Some(TransportSlice::Icmpv4(icmp)) = sliced.transport else {
        panic!("not ICMP");
    };
    assert_eq!(icmp.icmp_type(), expected);
    assert_eq!(
        icmp.checksum(),
        expected.calc_checksum(icmp.payload()),
        "checksum"
    );
    assert!(Meta::parse(reply).unwrap().is_icmp_error_for_dst());
    icmp.payload().to_vec()
}

fn verify_v6(reply: &[u8], original: &[u8], expected: Icmpv6Type) -> Vec<u8> {
    let sliced = SlicedPacket::from_ip(reply).unwrap();
    let Some(NetSlice::Ipv6(ip)) = sliced.net else {
        panic!("not IPv6");
    };
    let header = ip.header().to_header();
    assert_eq!(header.hop_limit, 20);
    assert_eq!(usize::from(header.payload_length) + 40, reply.len());
    assert_eq!(header.source, original[24..40]);
    assert_eq!(header.destination, original[8..24]);
    let Some(TransportSlice::Icmpv6(icmp)) = sliced.transport else {
        panic!("not ICMPv6");
    };
    assert_eq!(icmp.icmp_type(), expected);
    assert!(icmp.is_checksum_valid(header.source, header.destination));
    assert!(Meta::parse(reply).unwrap().is_icmp_error_for_dst());
    icmp.payload().to_vec()
}

#[test]
fn prohibited_and_unreachable_have_the_documented_types_and_codes() {
    let v4 = udp4(C4, R4, 1, 2, b"some data");
    let reply = answer(prohibited, &v4).unwrap();
    verify_v4(
        &reply,
        &v4,
        Icmpv4Type::DestinationUnreachable(V4::FilterProhibited),
    );
    assert_eq!((reply[20], reply[21]), (3, 13));
    let reply = answer(unreachable, &v4).unwrap();
    verify_v4(&reply, &v4, Icmpv4Type::DestinationUnreachable(V4::Network));
    assert_eq!((reply[20], reply[21]), (3, 0));

    let v6 = udp6(C6, R6, 1, 2, b"some data");
    let reply = answer(prohibited, &v6).unwrap();
    verify_v6(
        &reply,
        &v6,
        Icmpv6Type::DestinationUnreachable(V6::Prohibited),
    );
    assert_eq!((reply[40], reply[41]), (1, 1));
    let reply = answer(unreachable, &v6).unwrap();
    verify_v6(&reply, &v6, Icmpv6Type::DestinationUnreachable(V6::Address));
    assert_eq!((reply[40], reply[41]), (1, 3));
}

#[test]
fn ipv4_embeds_the_header_and_eight_bytes() {
    let kind = Icmpv4Type::DestinationUnreachable(V4::FilterProhibited);
    let original = tcp4(C4, R4, 1, 2, &[7; 500]);
    let reply = answer(prohibited, &original).unwrap();
    assert_eq!(verify_v4(&reply, &original, kind.clone()), original[..28]);

    let with_options = ip4_options(&[7, 8, 4, 0, 0, 0, 0, 0], 47, &[9; 30]);
    let reply = answer(prohibited, &with_options).unwrap();
    assert_eq!(
        verify_v4(&reply, &with_options, kind.clone()),
        with_options[..36]
    );

    let short = samples::ip4(C4, R4, 47, b"abc");
    let reply = answer(prohibited, &short).unwrap();
    assert_eq!(verify_v4(&reply, &short, kind), short);
}

#[test]
fn ipv6_embeds_as_much_as_fits_into_1280_bytes() {
    let kind = Icmpv6Type::DestinationUnreachable(V6::Address);
    for (data, embedded) in [
        (0, 48),
        (100, 148),
        (1184, 1232),
        (1185, 1232),
        (1232, 1232),
    ] {
        let original = udp6(C6, R6, 1, 2, &vec![5; data]);
        let reply = answer(unreachable, &original).unwrap();
        assert_eq!(reply.len(), 48 + embedded);
        assert_eq!(verify_v6(&reply, &original, kind), original[..embedded]);
    }
}

#[test]
fn odd_lengths_have_right_checksums() {
    for len in 0..9 {
        let original = udp6(C6, R6, 1, 2, &vec![0xF1; len]);
        let reply = answer(prohibited, &original).unwrap();
        verify_v6(
            &reply,
            &original,
            Icmpv6Type::DestinationUnreachable(V6::Prohibited),
        );
        let original = samples::ip4(C4, R4, 47, &vec![0xF1; len]);
        let reply = answer(prohibited, &original).unwrap();
        verify_v4(
            &reply,
            &original,
            Icmpv4Type::DestinationUnreachable(V4::FilterProhibited),
        );
    }
}

#[test]
fn errors_are_never_answered() {
    for kind in [3, 4, 5, 11, 12] {
        let error = icmp4(C4, R4, kind, 0, [0; 4], &udp4(R4, C4, 1, 2, b""));
        assert_eq!(answer(prohibited, &error), None);
        assert_eq!(answer(unreachable, &error), None);
    }
    for kind in [1, 2, 3, 4, 100] {
        let error = icmp6(C6, R6, kind, 0, [0; 4], &udp6(R6, C6, 1, 2, b""));
        assert_eq!(answer(prohibited, &error), None);
        assert_eq!(answer(unreachable, &error), None);
    }
}

#[test]
fn pings_are_answered() {
    assert!(answer(prohibited, &icmp4(C4, R4, 8, 0, [0; 4], b"")).is_some());
    assert!(answer(prohibited, &icmp6(C6, R6, 128, 0, [0; 4], b"")).is_some());
}

#[test]
fn nothing_is_sent_to_or_from_groups_and_nobody() {
    let all = [255; 4];
    for original in [
        udp4([0; 4], R4, 1, 2, b""),
        udp4([224, 0, 0, 1], R4, 1, 2, b""),
        udp4(all, R4, 1, 2, b""),
        udp4(C4, [224, 0, 0, 1], 1, 2, b""),
        udp4(C4, all, 1, 2, b""),
        udp4(C4, [0; 4], 1, 2, b""),
        udp6("::", R6, 1, 2, b""),
        udp6("ff02::1", R6, 1, 2, b""),
        udp6(C6, "ff02::1", 1, 2, b""),
        udp6(C6, "::", 1, 2, b""),
    ] {
        assert_eq!(answer(prohibited, &original), None, "{original:?}");
    }
}

#[test]
fn fragments_and_malformed_packets_are_not_answered() {
    let mut fragment = udp4(C4, R4, 1, 2, b"");
    fragment[6] = 0x20;
    assert_eq!(answer(prohibited, &fragment), None);
    assert_eq!(answer(prohibited, b""), None);
    assert_eq!(answer(prohibited, &[0x45; 10]), None);
}

#[test]
fn a_short_buffer_yields_nothing() {
    for original in [udp4(C4, R4, 1, 2, b"data"), udp6(C6, R6, 1, 2, b"data")] {
        let needed = answer(prohibited, &original).unwrap().len();
        for len in 0..needed {
            assert_eq!(prohibited(&original, &mut vec![0; len]), None);
        }
        assert_eq!(prohibited(&original, &mut vec![0; needed]), Some(needed));
    }
}

proptest! {
    #[test]
    fn arbitrary_originals_never_panic(original in prop::collection::vec(any::<u8>(), 0..1400)) {
        let _ = answer(prohibited, &original);
        let _ = answer(unreachable, &original);
    }

    #[test]
    fn replies_to_any_udp_packet_are_valid(src: [u8; 4], data in prop::collection::vec(any::<u8>(), 0..1200)) {
        let original = udp4(src, R4, 1, 2, &data);
        if let Some(reply) = answer(unreachable, &original) {
            verify_v4(&reply, &original, Icmpv4Type::DestinationUnreachable(V4::Network));
        }
    }
}

#[test]
fn a_packet_that_is_too_big_is_answered_with_the_size_that_fits() {
    let (client, resource) = ([100, 64, 0, 1], [10, 0, 0, 1]);
    let mut original = udp4(client, resource, 1, 2, &[7; 1300]);
    original[6] = 0x40;
    let mut out = [0; MAX_REPLY];
    let len = too_big(&original, 1280, &mut out).unwrap();
    let reply = &out[..len];
    assert_eq!(reply.len(), 20 + 8 + 28);
    assert_eq!((reply[20], reply[21]), (3, 4));
    assert_eq!(reply[24..28], [0, 0, 5, 0]);
    assert_eq!(reply[28..], original[..28]);
    let meta = Meta::parse(reply).unwrap();
    assert!(meta.is_icmp_error_for_dst());
    assert_eq!((meta.src, meta.dst), (resource.into(), client.into()));
    assert_eq!(checksum::of(&reply[..20]), 0);
    assert_eq!(checksum::of(&reply[20..]), 0);

    original[6] = 0;
    assert_eq!(too_big(&original, 1280, &mut out), None, "may be cut");

    let original = udp6("fd00:2021:1111::1", "fd12::1", 1, 2, &[7; 1300]);
    let len = too_big(&original, 1280, &mut out).unwrap();
    let reply = &out[..len];
    assert_eq!(reply.len(), MAX_PACKET);
    assert_eq!((reply[40], reply[41]), (2, 0));
    assert_eq!(reply[44..48], [0, 0, 5, 0]);
    assert!(Meta::parse(reply).unwrap().is_icmp_error_for_dst());

    let error = icmp4(client, resource, 3, 1, [0; 4], &[7; 1400]);
    assert_eq!(too_big(&error, 1280, &mut out), None, "about an error");
}
