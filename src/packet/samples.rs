//! Packets for tests, built by `etherparse` or by hand, never by the code under test.
#![allow(clippy::unwrap_used)]

use std::net::Ipv6Addr;

use etherparse::{IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder};

/// An IPv4 packet of any protocol, checksum included.
pub(crate) fn ip4(src: [u8; 4], dst: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap();
    let mut header = Ipv4Header::new(len, 64, IpNumber(protocol), src, dst).unwrap();
    header.header_checksum = header.calc_header_checksum();
    let mut packet = header.to_bytes().to_vec();
    packet.extend_from_slice(payload);
    packet
}

/// As [`ip4`] with options, whose length must be a multiple of four.
pub(crate) fn ip4_options(options: &[u8], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap();
    let (src, dst) = ([100, 64, 0, 1], [10, 0, 0, 1]);
    let mut header = Ipv4Header::new(len, 64, IpNumber(protocol), src, dst).unwrap();
    header.options = options.try_into().unwrap();
    header.set_payload_len(payload.len()).unwrap();
    header.header_checksum = header.calc_header_checksum();
    let mut packet = header.to_bytes().to_vec();
    packet.extend_from_slice(payload);
    packet
}

/// An IPv6 packet of any next header.
pub(crate) fn ip6(src: &str, dst: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let header = Ipv6Header {
        traffic_class: 0,
        flow_label: Ipv6FlowLabel::ZERO,
        payload_length: u16::try_from(payload.len()).unwrap(),
        next_header: IpNumber(next),
        hop_limit: 64,
        source: src.parse::<Ipv6Addr>().unwrap().octets(),
        destination: dst.parse::<Ipv6Addr>().unwrap().octets(),
    };
    let mut packet = header.to_bytes().to_vec();
    packet.extend_from_slice(payload);
    packet
}

/// UDP over IPv4.
pub(crate) fn udp4(src: [u8; 4], dst: [u8; 4], from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(src, dst, 64)
        .udp(from, to)
        .write(&mut packet, data)
        .unwrap();
    packet
}

/// UDP over IPv6.
pub(crate) fn udp6(src: &str, dst: &str, from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let (src, dst) = octets(src, dst);
    let mut packet = Vec::new();
    PacketBuilder::ipv6(src, dst, 64)
        .udp(from, to)
        .write(&mut packet, data)
        .unwrap();
    packet
}

/// TCP over IPv4.
pub(crate) fn tcp4(src: [u8; 4], dst: [u8; 4], from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(src, dst, 64)
        .tcp(from, to, 1, 1000)
        .write(&mut packet, data)
        .unwrap();
    packet
}

/// TCP over IPv6.
pub(crate) fn tcp6(src: &str, dst: &str, from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let (src, dst) = octets(src, dst);
    let mut packet = Vec::new();
    PacketBuilder::ipv6(src, dst, 64)
        .tcp(from, to, 1, 1000)
        .write(&mut packet, data)
        .unwrap();
    packet
}

/// TCP over IPv4 with the flags named: any of the letters S, A, F and R.
pub(crate) fn tcp4_flags(src: [u8; 4], dst: [u8; 4], from: u16, to: u16, flags: &str) -> Vec<u8> {
    let mut builder = PacketBuilder::ipv4(src, dst, 64).tcp(from, to, 1, 1000);
    for flag in flags.chars() {
        builder = match flag {
            'S' => builder.syn(),
            'A' => builder.ack(1),
            'F' => builder.fin(),
            'R' => builder.rst(),
            other => panic!("no such flag: {other}"),
        };
    }
    let mut packet = Vec::new();
    builder.write(&mut packet, b"").unwrap();
    packet
}

/// Any ICMPv4 message.
pub(crate) fn icmp4(
    src: [u8; 4],
    dst: [u8; 4],
    kind: u8,
    code: u8,
    rest: [u8; 4],
    body: &[u8],
) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(src, dst, 64)
        .icmpv4_raw(kind, code, rest)
        .write(&mut packet, body)
        .unwrap();
    packet
}

/// Any ICMPv6 message.
pub(crate) fn icmp6(
    src: &str,
    dst: &str,
    kind: u8,
    code: u8,
    rest: [u8; 4],
    body: &[u8],
) -> Vec<u8> {
    let (src, dst) = octets(src, dst);
    let mut packet = Vec::new();
    PacketBuilder::ipv6(src, dst, 64)
        .icmpv6_raw(kind, code, rest)
        .write(&mut packet, body)
        .unwrap();
    packet
}

/// A control event (data-path spec §6.1).
pub(crate) fn control(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut payload = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    payload.extend_from_slice(body);
    let mut packet = ip6("::", "::", 0xFF, &payload);
    packet[7] = 0;
    packet
}

/// One valid packet of every kind that the parser tells apart.
pub(crate) fn all() -> Vec<(&'static str, Vec<u8>)> {
    let (c4, r4) = ([100, 64, 0, 1], [10, 0, 0, 1]);
    let (c6, r6) = ("fd00:2021:1111::1", "fd12::1");
    let udp = &udp4(c4, r4, 1000, 53, b"query")[20..];
    let dest_options_then_udp = [&[17, 0, 1, 4, 0, 0, 0, 0], udp].concat();
    let atomic_fragment_then_udp = [&[17, 0, 0, 0, 1, 2, 3, 4], udp].concat();
    vec![
        ("udp4", udp4(c4, r4, 1000, 53, b"query")),
        ("udp6", udp6(c6, r6, 1000, 53, b"query")),
        ("tcp4", tcp4(c4, r4, 1000, 443, b"hello")),
        ("tcp6", tcp6(c6, r6, 1000, 443, b"hello")),
        ("echo4", icmp4(c4, r4, 8, 0, [0x12, 0x34, 0, 1], b"ping")),
        ("echo6", icmp6(c6, r6, 128, 0, [0x12, 0x34, 0, 1], b"ping")),
        (
            "unreachable4",
            icmp4(r4, c4, 3, 1, [0; 4], &tcp4(c4, r4, 1, 2, b"")),
        ),
        (
            "too_big6",
            icmp6(r6, c6, 2, 0, [0, 0, 5, 0], &tcp6(c6, r6, 1, 2, b"")),
        ),
        ("gre4", ip4(c4, r4, 47, b"gre payload")),
        ("sctp6", ip6(c6, r6, 132, b"sctp payload")),
        ("options4", ip4_options(&[1, 1, 7, 4, 0, 0, 0, 0], 17, udp)),
        ("dest_options6", ip6(c6, r6, 60, &dest_options_then_udp)),
        ("atomic6", ip6(c6, r6, 44, &atomic_fragment_then_udp)),
        ("control", control(2, b"")),
    ]
}

fn octets(src: &str, dst: &str) -> ([u8; 16], [u8; 16]) {
    (
        src.parse::<Ipv6Addr>().unwrap().octets(),
        dst.parse::<Ipv6Addr>().unwrap().octets(),
    )
}
