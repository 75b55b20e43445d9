#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::net::Ipv4Addr;

use super::*;
use crate::access::fixtures::{addr4, addr6, meta};
use crate::packet::samples::{icmp4, icmp6, ip4, ip6, tcp4, tcp4_flags, tcp6, udp4, udp6};

const HOST: [u8; 4] = [10, 0, 0, 1];
const HOST6: &str = "fd12::1";
const PROXY: [u8; 4] = [100, 96, 0, 1];
const PROXY2: [u8; 4] = [100, 96, 0, 2];
const PROXY6: &str = "fd00:2021:1111:8000::1";

const GRE: u8 = 47;
const ESP: u8 = 50;
const SCTP: u8 = 132;

/// Shortest time that flows can tell.
const UNIT: Duration = Duration::from_millis(100);

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// The tick at this time after the start.
fn at(time: Duration) -> Tick {
    let epoch = Instant::now();
    Tick::new(epoch, epoch + time)
}

fn start() -> Tick {
    at(Duration::ZERO)
}

/// A table of one client by itself, and the total it counts into.
fn table() -> (Flows, Total) {
    let total = Total::default();
    (Flows::new(total.clone()), total)
}

fn table_with_total(flows: usize) -> (Flows, Total) {
    let total = Total(Arc::new(AtomicUsize::new(flows)));
    (Flows::new(total.clone()), total)
}

/// A packet of the client to a real address.
#[track_caller]
fn open(flows: &mut Flows, packet: &[u8], tick: Tick) -> Arc<Flow> {
    let nothing_to_resolve = |proxy| panic!("{proxy} is not a proxy address");
    flows
        .open(&meta(packet), tick, None, nothing_to_resolve)
        .unwrap()
}

/// A packet of the client to a proxy address that stands for `real`.
fn try_translate(
    flows: &mut Flows,
    packet: &[u8],
    real: impl Into<IpAddr>,
    tick: Tick,
) -> Result<Arc<Flow>, DropReason> {
    let real = real.into();
    flows.open(&meta(packet), tick, None, |_| {
        Some((real, "a.example".into()))
    })
}

#[track_caller]
fn translate(flows: &mut Flows, packet: &[u8], real: impl Into<IpAddr>, tick: Tick) -> Arc<Flow> {
    try_translate(flows, packet, real, tick).unwrap()
}

/// The flow that a packet to the client belongs to.
fn answered(flows: &mut Flows, packet: &[u8], tick: Tick) -> Option<Arc<Flow>> {
    flows.answered_by(&meta(packet), tick)
}

#[track_caller]
fn assert_same(found: Option<Arc<Flow>>, expected: &Arc<Flow>) {
    let found = found.expect("a flow");
    assert!(Arc::ptr_eq(&found, expected), "{found:?} {expected:?}");
}

/// Asserts when a flow ends on which nothing more passes.
#[track_caller]
fn assert_ends(flow: &Flow, time: Duration) {
    assert!(!flow.is_over(at(time - UNIT)), "ended too early");
    assert!(flow.is_over(at(time)), "not ended");
    assert!(flow.is_over(at(time * 10)), "begun again");
}

/// The flags of a TCP segment, by letter.
fn flags(letters: &str) -> TcpFlags {
    meta(&tcp4_flags(addr4(1), HOST, 1, 2, letters)).tcp_flags
}

const NONE: &str = "";

fn query(dst: [u8; 4], from: u16) -> Vec<u8> {
    udp4(addr4(1), dst, from, 53, b"")
}

/// The `n`th proxy address.
fn nth_proxy(n: u32) -> [u8; 4] {
    Ipv4Addr::from_bits(Ipv4Addr::from(PROXY).to_bits() + n).octets()
}

/// Fills a table with that many flows to distinct hosts.
fn fill(flows: &mut Flows, count: usize, tick: Tick) {
    let first = Ipv4Addr::from([11, 0, 0, 0]).to_bits();
    let mut packet = meta(&query(HOST, 1000));
    for n in 0..count as u32 {
        packet.dst = Ipv4Addr::from_bits(first + n).into();
        flows.open(&packet, tick, None, |_| None).unwrap();
    }
}

// Ticks.

#[test]
fn ticks_count_tenths_of_a_second_and_never_run_backwards() {
    assert_eq!(at(Duration::from_millis(99)), start());
    assert!(at(UNIT) > start());
    assert_eq!(at(Duration::from_millis(12_399)), Tick(123));
    assert_eq!(Tick::of(TCP_IDLE), 74_400);
    let epoch = Instant::now() + seconds(60);
    assert_eq!(Tick::new(epoch, epoch - seconds(60)), start());
}

// Which packets belong to a flow.

#[test]
fn an_answer_finds_its_flow_by_addresses_protocol_and_ports() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    for (out, back) in [
        (
            tcp4(c4, HOST, 1000, 443, b""),
            tcp4(HOST, c4, 443, 1000, b""),
        ),
        (
            udp4(c4, HOST, 1000, 443, b""),
            udp4(HOST, c4, 443, 1000, b""),
        ),
        (
            tcp6(&c6, HOST6, 1000, 443, b""),
            tcp6(HOST6, &c6, 443, 1000, b""),
        ),
        (
            udp6(&c6, HOST6, 1000, 443, b""),
            udp6(HOST6, &c6, 443, 1000, b""),
        ),
    ] {
        assert!(answered(&mut flows, &back, start()).is_none());
        let flow = open(&mut flows, &out, start());
        assert_same(answered(&mut flows, &back, start()), &flow);
        assert!(!flow.is_translated());
        assert_eq!(flow.outside(), flow.remote());
        assert_eq!(flow.remote(), meta(&out).dst);
        assert_eq!((flow.local_port(), flow.remote_port()), (1000, 443));
        assert_eq!(flow.outside_port(), 1000);
    }
    assert_eq!(flows.len(), 4);
}

#[test]
fn other_ports_protocols_and_addresses_are_no_answer() {
    let (mut flows, _) = table();
    let c = addr4(1);
    open(&mut flows, &tcp4(c, HOST, 1000, 443, b""), start());
    for packet in [
        tcp4(HOST, c, 443, 1001, b""),
        tcp4(HOST, c, 444, 1000, b""),
        tcp4(HOST, c, 1000, 443, b""),
        tcp4([10, 0, 0, 2], c, 443, 1000, b""),
        udp4(HOST, c, 443, 1000, b""),
        icmp4(HOST, c, 0, 0, [3, 0xE8, 0, 1], b""),
        ip4(HOST, c, GRE, b""),
        tcp6("::10.0.0.1", &addr6(1), 443, 1000, b""),
    ] {
        assert!(
            answered(&mut flows, &packet, start()).is_none(),
            "{packet:?}"
        );
    }
}

#[test]
fn a_further_packet_of_the_client_belongs_to_the_same_flow() {
    let (mut flows, total) = table();
    let first = open(&mut flows, &query(HOST, 1000), start());
    assert_same(
        Some(open(&mut flows, &query(HOST, 1000), at(seconds(1)))),
        &first,
    );
    let other = open(&mut flows, &query(HOST, 1001), start());
    assert!(!Arc::ptr_eq(&first, &other));
    assert_eq!((flows.len(), total.get()), (2, 2));
}

#[test]
fn a_ping_is_answered_by_the_reply_with_its_identifier_whatever_the_sequence() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    let ping4 = open(
        &mut flows,
        &icmp4(c4, HOST, 8, 0, [0x12, 0x34, 0, 1], b""),
        start(),
    );
    let ping6 = open(
        &mut flows,
        &icmp6(&c6, HOST6, 128, 0, [0x12, 0x34, 0, 1], b""),
        start(),
    );
    assert_eq!((ping4.local_port(), ping4.remote_port()), (0x1234, 0));
    for sequence in [1, 2, 77] {
        let reply4 = icmp4(HOST, c4, 0, 0, [0x12, 0x34, 0, sequence], b"");
        let reply6 = icmp6(HOST6, &c6, 129, 0, [0x12, 0x34, 0, sequence], b"");
        assert_same(answered(&mut flows, &reply4, start()), &ping4);
        assert_same(answered(&mut flows, &reply6, start()), &ping6);
    }
    for packet in [
        icmp4(HOST, c4, 0, 0, [0x12, 0x35, 0, 1], b""),
        icmp4([10, 0, 0, 2], c4, 0, 0, [0x12, 0x34, 0, 1], b""),
        icmp6(HOST6, &c6, 129, 0, [0x12, 0x35, 0, 1], b""),
    ] {
        assert!(
            answered(&mut flows, &packet, start()).is_none(),
            "{packet:?}"
        );
    }
}

#[test]
fn a_ping_from_outside_is_no_answer_to_a_ping() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    let id = [0x12, 0x34, 0, 1];
    open(&mut flows, &icmp4(c4, HOST, 8, 0, id, b""), start());
    open(&mut flows, &icmp6(&c6, HOST6, 128, 0, id, b""), start());
    let pings = [
        icmp4(HOST, c4, 8, 0, id, b""),
        icmp6(HOST6, &c6, 128, 0, id, b""),
    ];
    for ping in &pings {
        assert!(answered(&mut flows, ping, start()).is_none(), "{ping:?}");
    }
    // Nor is any other message.
    let timestamp = icmp4(HOST, c4, 14, 0, id, b"");
    assert!(answered(&mut flows, &timestamp, start()).is_none());
}

#[test]
fn icmp_other_than_pings_goes_by_the_address_alone() {
    let (mut flows, _) = table();
    let c = addr4(1);
    let timestamp = icmp4(c, HOST, 13, 0, [1, 2, 3, 4], b"twelve bytes");
    let flow = open(&mut flows, &timestamp, start());
    assert_eq!((flow.local_port(), flow.remote_port()), (0, 0));
    let reply = icmp4(HOST, c, 14, 0, [5, 6, 7, 8], b"twelve bytes");
    assert_same(answered(&mut flows, &reply, start()), &flow);
    let foreign = icmp4([10, 0, 0, 2], c, 14, 0, [1, 2, 3, 4], b"");
    assert!(answered(&mut flows, &foreign, start()).is_none());
    // It opens no way for echo replies that nobody has asked for.
    let echo = icmp4(HOST, c, 0, 0, [0; 4], b"");
    assert!(answered(&mut flows, &echo, start()).is_none());
}

#[test]
fn a_ping_from_outside_is_no_answer_to_anything() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    let id = [0x12, 0x34, 0, 1];
    // A timestamp request, and replies to no request.
    open(&mut flows, &icmp4(c4, HOST, 13, 0, id, b""), start());
    open(&mut flows, &icmp4(c4, HOST, 0, 0, id, b""), start());
    open(&mut flows, &icmp6(&c6, HOST6, 129, 0, id, b""), start());
    for ping in [
        icmp4(HOST, c4, 8, 0, id, b""),
        icmp6(HOST6, &c6, 128, 0, id, b""),
    ] {
        assert!(answered(&mut flows, &ping, start()).is_none(), "{ping:?}");
    }
}

#[test]
fn protocols_without_ports_work_both_ways() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    for protocol in [GRE, ESP, SCTP] {
        let back4 = ip4(HOST, c4, protocol, b"back");
        let back6 = ip6(HOST6, &c6, protocol, b"back");
        assert!(answered(&mut flows, &back4, start()).is_none());
        assert!(answered(&mut flows, &back6, start()).is_none());
        let flow4 = open(&mut flows, &ip4(c4, HOST, protocol, b"out"), start());
        let flow6 = open(&mut flows, &ip6(&c6, HOST6, protocol, b"out"), start());
        assert_same(answered(&mut flows, &back4, start()), &flow4);
        assert_same(answered(&mut flows, &back6, start()), &flow6);
    }
}

// Translation.

#[test]
fn protocols_without_ports_cannot_be_translated() {
    let (mut flows, total) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    for (packet, real) in [
        (ip4(c4, PROXY, GRE, b""), IpAddr::from(HOST)),
        (ip4(c4, PROXY, ESP, b""), HOST.into()),
        (ip6(&c6, PROXY6, SCTP, b""), HOST6.parse().unwrap()),
        // Neither can a reply that belongs to no request, or a message without identifier.
        (icmp4(c4, PROXY, 0, 0, [0, 1, 0, 1], b""), HOST.into()),
        (icmp4(c4, PROXY, 13, 0, [0, 1, 0, 1], b""), HOST.into()),
    ] {
        let outcome = try_translate(&mut flows, &packet, real, start());
        assert_eq!(
            outcome.unwrap_err(),
            DropReason::NatUnsupportedProtocol,
            "{packet:?}"
        );
    }
    assert_eq!((flows.len(), total.get()), (0, 0));
}

#[test]
fn an_address_that_stands_for_nothing_makes_no_flow() {
    let (mut flows, total) = table();
    let outcome = flows.open(&meta(&query(PROXY, 1000)), start(), None, |proxy| {
        assert_eq!(proxy, IpAddr::from(PROXY));
        None
    });
    assert_eq!(outcome.unwrap_err(), DropReason::NotTranslated);
    assert_eq!((flows.len(), total.get()), (0, 0));
}

#[test]
fn a_translated_flow_goes_to_the_real_address_with_the_clients_port() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    let real6: IpAddr = HOST6.parse().unwrap();
    let ping = [0x12, 0x34, 0, 1];
    for (out, real, back, ports) in [
        (
            tcp4(c4, PROXY, 1000, 443, b""),
            IpAddr::from(HOST),
            tcp4(HOST, c4, 443, 1000, b""),
            (1000, 443),
        ),
        (
            udp6(&c6, PROXY6, 1000, 443, b""),
            real6,
            udp6(HOST6, &c6, 443, 1000, b""),
            (1000, 443),
        ),
        (
            icmp4(c4, PROXY, 8, 0, ping, b""),
            HOST.into(),
            icmp4(HOST, c4, 0, 0, ping, b""),
            (0x1234, 0),
        ),
        (
            icmp6(&c6, PROXY6, 128, 0, ping, b""),
            real6,
            icmp6(HOST6, &c6, 129, 0, ping, b""),
            (0x1234, 0),
        ),
    ] {
        let flow = translate(&mut flows, &out, real, start());
        assert!(flow.is_translated());
        assert_eq!((flow.remote(), flow.outside()), (meta(&out).dst, real));
        assert_eq!((flow.local_port(), flow.remote_port()), ports);
        assert_eq!(flow.outside_port(), flow.local_port());
        assert_same(answered(&mut flows, &back, start()), &flow);
        // The next packet finds it again without asking what the address stands for.
        let again = flows.open(&meta(&out), start(), None, |_| panic!("was resolved"));
        assert_same(again.ok(), &flow);
    }
    // What comes from the proxy address itself is no answer: nothing is there.
    let forged = tcp4(PROXY, c4, 443, 1000, b"");
    assert!(answered(&mut flows, &forged, start()).is_none());
}

#[test]
fn two_proxies_that_lead_to_the_same_port_get_neighbouring_source_ports() {
    let (mut flows, _) = table();
    let c = addr4(1);
    let first = translate(&mut flows, &tcp4(c, PROXY, 1000, 443, b""), HOST, start());
    let second = translate(&mut flows, &tcp4(c, PROXY2, 1000, 443, b""), HOST, start());
    assert_eq!((first.outside_port(), second.outside_port()), (1000, 1001));
    assert_eq!((first.local_port(), second.local_port()), (1000, 1000));
    let back = |port| tcp4(HOST, c, 443, port, b"");
    assert_same(answered(&mut flows, &back(1000), start()), &first);
    assert_same(answered(&mut flows, &back(1001), start()), &second);

    // The client's own flow from that port then has to make do with the one after it.
    let third = translate(&mut flows, &tcp4(c, PROXY, 1001, 443, b""), HOST, start());
    assert_eq!(third.outside_port(), 1002);

    // Another protocol, or pings, are counted apart.
    let datagram = translate(&mut flows, &udp4(c, PROXY2, 1000, 443, b""), HOST, start());
    assert_eq!(datagram.outside_port(), 1000);
}

#[test]
fn two_proxies_that_lead_to_the_same_host_get_neighbouring_echo_identifiers() {
    let (mut flows, _) = table();
    let ping = |proxy| icmp4(addr4(1), proxy, 8, 0, [0, 7, 0, 1], b"");
    let first = translate(&mut flows, &ping(PROXY), HOST, start());
    let second = translate(&mut flows, &ping(PROXY2), HOST, start());
    assert_eq!((first.outside_port(), second.outside_port()), (7, 8));
    let reply = icmp4(HOST, addr4(1), 0, 0, [0, 8, 0, 1], b"");
    assert_same(answered(&mut flows, &reply, start()), &second);
    assert_eq!(second.local_port(), 7);
}

#[test]
fn flows_to_different_real_addresses_or_ports_share_a_source_port() {
    let (mut flows, _) = table();
    let c = addr4(1);
    for (proxy, real, port) in [
        (PROXY, HOST, 443),
        (PROXY2, [10, 0, 0, 2], 443),
        (PROXY, HOST, 80),
        (PROXY2, HOST, 22),
    ] {
        let out = tcp4(c, proxy, 1000, port, b"");
        let flow = translate(&mut flows, &out, real, start());
        assert_eq!(flow.outside_port(), 1000);
        let back = tcp4(real, c, port, 1000, b"");
        assert_same(answered(&mut flows, &back, start()), &flow);
    }
}

#[test]
fn after_the_last_port_comes_1() {
    let (mut flows, _) = table();
    let ports: Vec<_> = (0..4)
        .map(|n| {
            let out = query(nth_proxy(n), 65_534);
            translate(&mut flows, &out, HOST, start()).outside_port()
        })
        .collect();
    assert_eq!(ports, [65_534, 65_535, 1, 2]);
    let last = translate(&mut flows, &query(nth_proxy(9), 65_535), HOST, start());
    assert_eq!(last.outside_port(), 3);
}

#[test]
fn a_port_is_free_again_once_its_flow_has_ended() {
    let (mut flows, total) = table();
    let first = translate(&mut flows, &query(PROXY, 1000), HOST, start());
    let late = at(UNANSWERED);
    let second = translate(&mut flows, &query(PROXY2, 1000), HOST, late);
    assert_eq!(second.outside_port(), 1000);
    assert!(first.is_over(start()));
    assert_eq!((flows.len(), total.get()), (1, 1));
    // And the ended one does not take the new one's place when it is asked for again.
    let third = translate(&mut flows, &query(PROXY, 1000), HOST, late);
    assert_eq!(third.outside_port(), 1001);
    assert!(!second.is_over(late));
}

#[test]
fn a_flow_keeps_its_real_address_when_the_name_moves() {
    let (mut flows, _) = table();
    let moved = [10, 0, 0, 2];
    let flow = translate(&mut flows, &query(PROXY, 1000), HOST, start());
    let again = translate(&mut flows, &query(PROXY, 1000), moved, at(seconds(1)));
    assert_same(Some(again), &flow);
    assert_eq!(flow.outside(), IpAddr::from(HOST));
    // A new flow goes to the new address, and so does this one once it has ended.
    let new = translate(&mut flows, &query(PROXY, 1001), moved, at(seconds(1)));
    assert_eq!(new.outside(), IpAddr::from(moved));
    let later = translate(&mut flows, &query(PROXY, 1000), moved, at(UNANSWERED));
    assert_eq!(later.outside(), IpAddr::from(moved));
}

#[test]
fn a_flow_to_the_real_address_displaces_a_translated_one_with_the_same_ends() {
    let (mut flows, total) = table();
    let back = udp4(HOST, addr4(1), 53, 1000, b"");
    let translated = translate(&mut flows, &query(PROXY, 1000), HOST, start());
    let direct = open(&mut flows, &query(HOST, 1000), start());
    assert!(!direct.is_translated());
    assert!(translated.is_over(start()));
    assert!(!direct.is_over(start()));
    assert_same(answered(&mut flows, &back, start()), &direct);
    assert_eq!((flows.len(), total.get()), (1, 1));

    // The next packet to the proxy address begins anew, from the next port.
    let moved = translate(&mut flows, &query(PROXY, 1000), HOST, start());
    assert_eq!(moved.outside_port(), 1001);
    assert!(!direct.is_over(start()));
    assert_same(Some(open(&mut flows, &query(HOST, 1000), start())), &direct);
    assert_eq!((flows.len(), total.get()), (2, 2));
}

#[test]
fn thousands_of_names_for_one_host_are_told_apart_from_one_source_port() {
    let (mut flows, _) = table();
    let mut packet = meta(&query(PROXY, 65_000));
    let mut ports = HashSet::new();
    for n in 0..MAX_FLOWS as u32 {
        packet.dst = nth_proxy(n).into();
        let flow = flows
            .open(&packet, start(), None, |_| {
                Some((HOST.into(), "a.example".into()))
            })
            .unwrap();
        assert_ne!(flow.outside_port(), 0);
        assert!(ports.insert(flow.outside_port()), "{}", flow.outside_port());
    }
    assert_eq!(ports.len(), MAX_FLOWS);
}

#[test]
fn the_search_for_a_port_gives_up_when_almost_none_is_free() {
    // No client gets this far; the table is filled behind its back.
    let (mut flows, _) = table();
    let real = Key {
        remote: HOST.into(),
        ..Key::outbound(&meta(&query(PROXY, 1000)))
    };
    for local_port in 0..=u16::MAX {
        let outside = Key { local_port, ..real };
        let flow = Arc::new(Flow::new(outside, outside, start(), None));
        flows.by_outside.insert(outside, flow);
    }
    flows.total.0.store(flows.len(), Ordering::Relaxed);
    assert_eq!(flows.free_port(real, start()), None);
}

// How long flows last.

#[test]
fn a_flow_that_nobody_answers_ends_a_minute_after_its_last_packet() {
    let (mut flows, _) = table();
    let c = addr4(1);
    for packet in [
        tcp4_flags(c, HOST, 1000, 443, "S"),
        udp4(c, HOST, 1000, 443, b""),
        icmp4(c, HOST, 8, 0, [0; 4], b""),
        icmp4(c, HOST, 13, 0, [0; 4], b""),
        ip4(c, HOST, GRE, b""),
    ] {
        let flow = open(&mut flows, &packet, start());
        assert_ends(&flow, seconds(60));
        flow.note_out(at(seconds(50)), flags(NONE));
        assert_ends(&flow, seconds(110));
    }
}

#[test]
fn an_answered_flow_lasts_as_long_as_its_protocol_deserves() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    for (packet, idle) in [
        (tcp4(c4, HOST, 1000, 443, b""), seconds(7440)),
        (tcp6(&c6, HOST6, 1000, 443, b""), seconds(7440)),
        (udp4(c4, HOST, 1000, 443, b""), seconds(120)),
        (icmp4(c4, HOST, 8, 0, [0; 4], b""), seconds(120)),
        (icmp4(c4, HOST, 13, 0, [0; 4], b""), seconds(120)),
        (icmp6(&c6, HOST6, 128, 0, [0; 4], b""), seconds(120)),
        (ip4(c4, HOST, GRE, b""), seconds(600)),
        (ip4(c4, HOST, ESP, b""), seconds(600)),
        (ip6(&c6, HOST6, SCTP, b""), seconds(600)),
    ] {
        let flow = open(&mut flows, &packet, start());
        flow.note_in(start(), flags(NONE));
        assert_ends(&flow, idle);
        // Either direction renews it.
        let next = idle - UNIT;
        flow.note_out(at(next), flags(NONE));
        assert_ends(&flow, next + idle);
        flow.note_in(at(next * 2), flags(NONE));
        assert_ends(&flow, next * 2 + idle);
    }
}

#[test]
fn the_first_answer_counts_even_in_the_last_moment() {
    let (mut flows, _) = table();
    let flow = open(&mut flows, &query(HOST, 1000), start());
    let last = seconds(60) - UNIT;
    let back = udp4(HOST, addr4(1), 53, 1000, b"");
    answered(&mut flows, &back, at(last))
        .unwrap()
        .note_in(at(last), flags(NONE));
    assert_ends(&flow, last + seconds(120));
}

/// A TCP connection that was answered.
fn connection(flows: &mut Flows) -> Arc<Flow> {
    let flow = open(flows, &tcp4_flags(addr4(1), HOST, 1000, 443, "S"), start());
    flow.note_out(start(), flags("S"));
    flow.note_in(start(), flags("SA"));
    flow.note_out(start(), flags("A"));
    flow
}

#[test]
fn a_connection_closed_by_both_ends_after_five_seconds() {
    let (mut flows, _) = table();
    let flow = connection(&mut flows);
    flow.note_out(at(seconds(10)), flags("FA"));
    flow.note_in(at(seconds(20)), flags("FA"));
    assert_ends(&flow, seconds(25));
    // The last acknowledgement, or one that is repeated, still passes.
    flow.note_out(at(seconds(24)), flags("A"));
    assert_ends(&flow, seconds(29));
}

#[test]
fn a_connection_closed_by_one_end_lives_on() {
    for ends_first in ["client", "resource"] {
        let (mut flows, _) = table();
        let flow = connection(&mut flows);
        if ends_first == "client" {
            flow.note_out(start(), flags("FA"));
            flow.note_out(start(), flags("FA"));
        } else {
            flow.note_in(start(), flags("FA"));
            flow.note_in(start(), flags("FA"));
        }
        assert_ends(&flow, seconds(7440));
    }
}

#[test]
fn a_reset_by_either_end_ends_a_connection_after_five_seconds() {
    let (mut flows, _) = table();
    let flow = connection(&mut flows);
    flow.note_out(at(seconds(10)), flags("RA"));
    assert_ends(&flow, seconds(15));

    let (mut flows, _) = table();
    let flow = connection(&mut flows);
    flow.note_in(at(seconds(10)), flags("R"));
    assert_ends(&flow, seconds(15));

    // A refused connection does not wait for the rest of its minute either.
    let (mut flows, _) = table();
    let flow = open(
        &mut flows,
        &tcp4_flags(addr4(1), HOST, 1000, 443, "S"),
        start(),
    );
    flow.note_in(at(seconds(1)), flags("RA"));
    assert_ends(&flow, seconds(6));
}

#[test]
fn a_connection_attempt_after_the_end_of_another_is_a_new_flow() {
    let syn = tcp4_flags(addr4(1), HOST, 1000, 443, "S");
    let end_by_client: fn(&Flow) = |flow| flow.note_out(start(), flags("FA"));
    let end_by_resource: fn(&Flow) = |flow| flow.note_in(start(), flags("FA"));
    let reset: fn(&Flow) = |flow| flow.note_in(start(), flags("R"));
    for end in [end_by_client, end_by_resource, reset] {
        let (mut flows, total) = table();
        let old = connection(&mut flows);
        end(&old);
        assert!(!old.is_over(start()));
        let new = open(&mut flows, &syn, start());
        assert!(!Arc::ptr_eq(&old, &new));
        assert!(old.is_over(start()), "the old one is out of the table");
        assert_ends(&new, seconds(60));
        assert_eq!((flows.len(), total.get()), (1, 1));
        let back = tcp4_flags(HOST, addr4(1), 443, 1000, "SA");
        assert_same(answered(&mut flows, &back, start()), &new);
    }
}

#[test]
fn a_translated_connection_that_is_opened_anew_keeps_its_port_and_follows_its_name() {
    let (mut flows, _) = table();
    let syn = tcp4_flags(addr4(1), PROXY, 1000, 443, "S");
    let old = translate(&mut flows, &syn, HOST, start());
    old.note_in(start(), flags("RA"));
    let new = translate(&mut flows, &syn, HOST, start());
    assert!(old.is_over(start()) && !new.is_over(start()));
    assert_eq!(new.outside_port(), 1000);
    new.note_in(start(), flags("RA"));
    let moved = translate(&mut flows, &syn, [10, 0, 0, 2], start());
    assert_eq!(moved.outside(), IpAddr::from([10, 0, 0, 2]));
    assert_eq!(flows.len(), 1);
}

#[test]
fn a_repeated_connection_attempt_is_the_same_flow() {
    let (mut flows, _) = table();
    let syn = tcp4_flags(addr4(1), HOST, 1000, 443, "S");
    let flow = open(&mut flows, &syn, start());
    assert_same(Some(open(&mut flows, &syn, at(seconds(1)))), &flow);
    // Even if it was answered meanwhile: the answer may have been lost.
    flow.note_in(at(seconds(1)), flags("SA"));
    assert_same(Some(open(&mut flows, &syn, at(seconds(2)))), &flow);
}

#[test]
fn what_follows_an_end_without_opening_anew_is_the_same_flow() {
    let (mut flows, _) = table();
    let flow = connection(&mut flows);
    flow.note_out(start(), flags("FA"));
    for letters in ["A", "FA", "R", "SA"] {
        let packet = tcp4_flags(addr4(1), HOST, 1000, 443, letters);
        assert_same(Some(open(&mut flows, &packet, start())), &flow);
    }
}

// Getting rid of flows that have ended.

#[test]
fn a_flow_that_has_ended_is_dropped_by_whoever_looks_for_it() {
    let (mut flows, total) = table();
    let late = at(UNANSWERED);
    let back = udp4(HOST, addr4(1), 53, 1000, b"");

    let ended = open(&mut flows, &query(HOST, 1000), start());
    assert!(answered(&mut flows, &back, late).is_none());
    assert_eq!((flows.len(), total.get()), (0, 0));
    assert!(ended.is_over(start()));
    assert!(answered(&mut flows, &back, late).is_none());

    let ended = translate(&mut flows, &query(PROXY, 1000), HOST, start());
    assert!(answered(&mut flows, &back, late).is_none());
    assert_eq!((flows.len(), flows.by_inside.len(), total.get()), (0, 0, 0));
    assert!(ended.is_over(start()));

    let ended = open(&mut flows, &query(HOST, 1000), start());
    let new = open(&mut flows, &query(HOST, 1000), late);
    assert!(!Arc::ptr_eq(&ended, &new));
    assert!(ended.is_over(start()) && !new.is_over(late));
    assert_eq!((flows.len(), total.get()), (1, 1));
}

#[test]
fn purging_drops_what_has_ended_and_nothing_else() {
    let (mut flows, total) = table();
    let gone = open(&mut flows, &query(HOST, 1), start());
    let gone_translated = translate(&mut flows, &query(PROXY, 2), HOST, start());
    let answered_one = open(&mut flows, &query(HOST, 3), start());
    answered_one.note_in(start(), flags(NONE));
    let kept_translated = translate(&mut flows, &query(PROXY, 4), HOST, at(UNIT));

    flows.purge(at(seconds(60) - UNIT));
    assert_eq!(flows.len(), 4);
    flows.purge(at(seconds(60)));
    assert_eq!((flows.len(), flows.by_inside.len(), total.get()), (2, 1, 2));
    assert!(gone.is_over(start()) && gone_translated.is_over(start()));
    assert!(!answered_one.is_over(start()) && !kept_translated.is_over(start()));
    flows.purge(at(seconds(120)));
    assert_eq!((flows.len(), flows.by_inside.len(), total.get()), (0, 0, 0));
}

#[test]
fn a_table_that_was_large_once_is_not_kept_so() {
    let (mut flows, _) = table();
    fill(&mut flows, 4096, start());
    assert!(flows.by_outside.capacity() >= 4096);
    flows.purge(at(seconds(60)));
    assert!(flows.by_outside.capacity() < 64);
}

#[test]
fn translated_flows_can_be_dropped_apart() {
    let (mut flows, total) = table();
    let direct = open(&mut flows, &query(HOST, 1), start());
    let translated = translate(&mut flows, &query(PROXY, 2), HOST, start());
    flows.clear_translated();
    assert!(translated.is_over(start()));
    assert!(!direct.is_over(start()));
    assert_eq!((flows.len(), flows.by_inside.len(), total.get()), (1, 0, 1));
    let back = udp4(HOST, addr4(1), 53, 2, b"");
    assert!(answered(&mut flows, &back, start()).is_none());
}

#[test]
fn a_table_that_is_dropped_ends_its_flows_and_leaves_the_total() {
    let total = Total::default();
    let mut first = Flows::new(total.clone());
    let mut second = Flows::new(total.clone());
    let direct = open(&mut first, &query(HOST, 1), start());
    let translated = translate(&mut first, &query(PROXY, 2), HOST, start());
    let other = open(&mut second, &query(HOST, 1), start());
    assert_eq!(total.get(), 3);
    drop(first);
    assert!(direct.is_over(start()) && translated.is_over(start()));
    assert!(!other.is_over(start()));
    assert_eq!(total.get(), 1);
    drop(second);
    assert_eq!(total.get(), 0);
}

// Limits.

#[test]
fn one_client_gets_so_many_flows_and_no_more() {
    let (mut flows, total) = table();
    fill(&mut flows, MAX_FLOWS - 1, start());
    let last = open(&mut flows, &query(HOST, 1000), start());
    let new = meta(&query(HOST, 1001));
    let refused = flows.open(&new, start(), None, |_| None);
    assert_eq!(refused.unwrap_err(), DropReason::FlowLimit);
    let refused = try_translate(&mut flows, &query(PROXY, 1001), HOST, start());
    assert_eq!(refused.unwrap_err(), DropReason::FlowLimit);
    assert_eq!((flows.len(), total.get()), (MAX_FLOWS, MAX_FLOWS));
    // What is there goes on, in both directions.
    assert_same(Some(open(&mut flows, &query(HOST, 1000), start())), &last);
    let back = udp4(HOST, addr4(1), 53, 1000, b"");
    assert_same(answered(&mut flows, &back, start()), &last);
    // Others are not concerned.
    let mut other = Flows::new(total);
    open(&mut other, &query(HOST, 1000), start());
}

#[test]
fn in_a_full_table_unanswered_flows_give_way_after_five_seconds() {
    let (mut flows, total) = table();
    let wanted = open(&mut flows, &query(HOST, 1000), start());
    wanted.note_in(start(), flags(NONE));
    fill(&mut flows, MAX_FLOWS - 1, start());
    let new = meta(&query(HOST, 1001));
    let refused = flows.open(&new, at(seconds(5) - UNIT), None, |_| None);
    assert_eq!(refused.unwrap_err(), DropReason::FlowLimit);
    // Looked through a moment ago: not again within a second.
    let refused = flows.open(&new, at(seconds(6) - UNIT * 2), None, |_| None);
    assert_eq!(refused.unwrap_err(), DropReason::FlowLimit);
    flows
        .open(&new, at(seconds(6) - UNIT), None, |_| None)
        .unwrap();
    assert_eq!((flows.len(), total.get()), (2, 2));
    assert!(!wanted.is_over(at(seconds(6))), "was answered");
}

#[test]
fn a_full_table_is_looked_through_once_a_second_at_most() {
    let (mut flows, _) = table();
    fill(&mut flows, MAX_FLOWS, start());
    let new = meta(&query(HOST, 1001));
    let mut walks = Vec::new();
    for tenth in 0..35 {
        let now = at(UNIT * tenth);
        let refused = flows.open(&new, now, None, |_| None);
        assert_eq!(refused.unwrap_err(), DropReason::FlowLimit);
        if flows.last_full_purge == Some(now) {
            walks.push(tenth);
        }
    }
    assert_eq!(walks, [0, 10, 20, 30]);
}

#[test]
fn flows_give_way_early_only_when_three_quarters_are_used_up() {
    const CROWD: usize = MAX_FLOWS / 4 * 3;
    for (count, left) in [(CROWD - 1, CROWD - 1), (CROWD, 0)] {
        let (mut flows, _) = table();
        fill(&mut flows, count, start());
        flows.purge(at(seconds(5)));
        assert_eq!(flows.len(), left);
    }
    // The same for all clients together.
    const FULL: usize = MAX_FLOWS_TOTAL / 4 * 3;
    for (others, left) in [(FULL - 2, 1), (FULL - 1, 0)] {
        let (mut flows, total) = table_with_total(others);
        open(&mut flows, &query(HOST, 1000), start());
        flows.purge(at(seconds(5)));
        assert_eq!((flows.len(), total.get()), (left, others + left));
    }
}

#[test]
fn others_cannot_lock_a_client_out_by_using_up_the_total() {
    let (mut flows, total) = table_with_total(MAX_FLOWS_TOTAL);
    fill(&mut flows, ASSURED_FLOWS, start());
    assert_eq!(total.get(), MAX_FLOWS_TOTAL + ASSURED_FLOWS);
    let new = meta(&query(HOST, 1000));
    let refused = flows.open(&new, start(), None, |_| None);
    assert_eq!(refused.unwrap_err(), DropReason::FlowLimit);
    // Its own dead flows make room within its share.
    flows.open(&new, at(seconds(5)), None, |_| None).unwrap();
    assert_eq!((flows.len(), total.get()), (1, MAX_FLOWS_TOTAL + 1));
}

#[test]
fn beyond_its_share_a_client_gets_flows_while_the_total_lasts() {
    let (mut flows, total) = table_with_total(MAX_FLOWS_TOTAL - ASSURED_FLOWS - 1);
    fill(&mut flows, ASSURED_FLOWS + 1, start());
    assert_eq!(total.get(), MAX_FLOWS_TOTAL);
    let new = meta(&query(HOST, 1000));
    let refused = flows.open(&new, start(), None, |_| None);
    assert_eq!(refused.unwrap_err(), DropReason::FlowLimit);
    // As soon as another client ends a flow there is room again.
    total.0.fetch_sub(1, Ordering::Relaxed);
    flows.open(&new, start(), None, |_| None).unwrap();
}

// ICMP errors.

/// The flow that an ICMP error quoting `packet` is about.
fn about(flows: &mut Flows, packet: &[u8], tick: Tick) -> Option<Arc<Flow>> {
    let error = match packet[0] >> 4 {
        4 => icmp4([9, 9, 9, 9], addr4(1), 3, 1, [0; 4], packet),
        _ => icmp6("2620:fe::fe", &addr6(1), 1, 0, [0; 4], packet),
    };
    let embedded = Embedded::of(&error, &meta(&error)).unwrap();
    flows.about(&embedded, tick)
}

#[test]
fn an_error_finds_the_flow_of_the_packet_that_it_quotes() {
    let (mut flows, _) = table();
    let (c4, c6) = (addr4(1), addr6(1));
    for packet in [
        tcp4(c4, HOST, 1000, 443, b""),
        udp4(c4, HOST, 1000, 443, b""),
        icmp4(c4, HOST, 8, 0, [0x12, 0x34, 0, 1], b""),
        icmp4(c4, HOST, 13, 0, [0x12, 0x34, 0, 1], b""),
        ip4(c4, HOST, GRE, b""),
        tcp6(&c6, HOST6, 1000, 443, b""),
        icmp6(&c6, HOST6, 128, 0, [0x12, 0x34, 0, 1], b""),
        ip6(&c6, HOST6, SCTP, b""),
    ] {
        assert!(about(&mut flows, &packet, start()).is_none());
        let flow = open(&mut flows, &packet, start());
        assert_same(about(&mut flows, &packet, start()), &flow);
    }
    for packet in [
        tcp4(c4, HOST, 1001, 443, b""),
        tcp4(c4, HOST, 1000, 444, b""),
        tcp4(c4, [10, 0, 0, 2], 1000, 443, b""),
        icmp4(c4, HOST, 8, 0, [0x12, 0x35, 0, 1], b""),
    ] {
        assert!(about(&mut flows, &packet, start()).is_none(), "{packet:?}");
    }
}

#[test]
fn an_error_about_a_translated_flow_quotes_the_packet_as_it_went_out() {
    let (mut flows, _) = table();
    let c = addr4(1);
    translate(&mut flows, &query(PROXY, 1000), HOST, start());
    let flow = translate(&mut flows, &query(PROXY2, 1000), HOST, start());
    assert_same(about(&mut flows, &query(HOST, 1001), start()), &flow);
    // Not as the client had sent it.
    assert!(about(&mut flows, &query(PROXY2, 1000), start()).is_none());

    let ping = |dst, id| icmp4(c, dst, 8, 0, [0, id, 0, 1], b"");
    translate(&mut flows, &ping(PROXY, 7), HOST, start());
    let second = translate(&mut flows, &ping(PROXY2, 7), HOST, start());
    assert_same(about(&mut flows, &ping(HOST, 8), start()), &second);
}

#[test]
fn an_error_about_a_flow_that_has_ended_finds_nothing() {
    let (mut flows, total) = table();
    open(&mut flows, &query(HOST, 1000), start());
    assert!(about(&mut flows, &query(HOST, 1000), at(seconds(60))).is_none());
    assert_eq!(total.get(), 0);
}
