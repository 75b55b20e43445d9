#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::ids::ClientId;
use crate::packet::split::Split;

const ALL: Offloads = Offloads {
    header: true,
    tso: true,
    uso: true,
};

fn peer() -> Arc<Peer> {
    use boringtun::noise::Tunn;
    use boringtun::x25519::{PublicKey, StaticSecret};
    let secret = StaticSecret::from([1; 32]);
    let public = PublicKey::from(&StaticSecret::from([2; 32]));
    let tunn = Tunn::new(secret, public, None, None, 1, None);
    Arc::new(Peer::new(1, ClientId(uuid::Uuid::nil()), tunn))
}

/// What a sender says.
#[derive(Debug, Clone)]
struct Segment {
    port: u16,
    sequence: u32,
    acknowledgement: u32,
    window: u16,
    flags: u8,
    payload: Vec<u8>,
    timestamp: u8,
    hop_limit: u8,
}

impl Segment {
    fn new(sequence: u32, len: usize) -> Self {
        Self {
            port: 5000,
            sequence,
            acknowledgement: 9,
            window: 500,
            flags: ACK,
            payload: (0..len)
                .map(|n| (n as u32).wrapping_add(sequence) as u8)
                .collect(),
            timestamp: 1,
            hop_limit: 64,
        }
    }

    /// Made by another library.
    fn build(&self, v4: bool) -> Vec<u8> {
        use etherparse::PacketBuilder;
        let mut builder = if v4 {
            PacketBuilder::ipv4([100, 64, 0, 1], [10, 0, 0, 1], self.hop_limit)
        } else {
            let (mut near, far) = ([0xfd; 16], [0xfc; 16]);
            near[15] = 1;
            PacketBuilder::ipv6(near, far, self.hop_limit)
        }
        .tcp(self.port, 443, self.sequence, self.window)
        .ack(self.acknowledgement)
        .options_raw(&[1, 1, 8, 10, 1, 2, 3, self.timestamp, 5, 6, 7, 8])
        .unwrap();
        for (flag, set) in [
            (
                PSH,
                (|b| etherparse::PacketBuilderStep::psh(b)) as fn(_) -> _,
            ),
            (0x01, |b| etherparse::PacketBuilderStep::fin(b)),
            (0x02, |b| etherparse::PacketBuilderStep::syn(b)),
            (0x40, |b| etherparse::PacketBuilderStep::ece(b)),
        ] {
            if self.flags & flag != 0 {
                builder = set(builder);
            }
        }
        let mut out = Vec::new();
        builder.write(&mut out, &self.payload).unwrap();
        out
    }
}

fn datagram(port: u16, len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    etherparse::PacketBuilder::ipv4([100, 64, 0, 1], [10, 0, 0, 1], 64)
        .udp(port, 53)
        .write(&mut out, &vec![port as u8; len])
        .unwrap();
    out
}

/// What is written to the device: header and packet.
fn written(offloads: Offloads, packets: &[Vec<u8>]) -> Vec<(Option<Header>, Vec<u8>)> {
    let mut coalescer = Coalescer::new(offloads);
    let peer = peer();
    for packet in packets {
        assert!(coalescer.has_room(packet.len()));
        coalescer.slot()[..packet.len()].copy_from_slice(packet);
        coalescer.push(&peer, &Meta::parse(packet).unwrap());
    }
    let mut out = Vec::new();
    coalescer.drain(|header, pieces, _| {
        let header = header.map(|h| Header::parse(h.try_into().unwrap()).unwrap());
        out.push((header, pieces.collect::<Vec<_>>().concat()));
    });
    assert!(coalescer.is_empty() && coalescer.has_room(ARENA));
    out
}

/// What the kernel makes of it.
fn received(written: &[(Option<Header>, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for (header, packet) in written {
        match header {
            Some(header) if header.segmentation != Segmentation::None => {
                let mut packet = packet.clone();
                let mut split = Split::new(*header, &mut packet).unwrap();
                while let Some((_, packet)) = split.next_packet() {
                    out.push(packet.to_vec());
                }
            }
            _ => out.push(packet.clone()),
        }
    }
    out
}

fn sizes(written: &[(Option<Header>, Vec<u8>)]) -> Vec<usize> {
    written.iter().map(|(_, packet)| packet.len()).collect()
}

/// A row of segments of a flow.
fn row(count: u32, len: usize) -> Vec<Segment> {
    (0..count)
        .map(|n| Segment::new(4_294_967_000u32.wrapping_add(n * len as u32), len))
        .collect()
}

fn build(v4: bool, segments: &[Segment]) -> Vec<Vec<u8>> {
    segments.iter().map(|segment| segment.build(v4)).collect()
}

/// Without the identification, which the kernel gives anew.
fn without_id(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut packets = packets.to_vec();
    for packet in packets.iter_mut().filter(|p| p[0] >> 4 == 4) {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packets
}

#[test]
fn segments_in_order_become_one_and_are_cut_into_the_same_again() {
    for v4 in [true, false] {
        let mut segments = row(40, 1208);
        segments[39].flags |= PSH;
        segments[39].payload.truncate(77);
        let packets = build(v4, &segments);
        let written = written(ALL, &packets);
        assert_eq!(written.len(), 1, "v4 {v4}");
        let header = written[0].0.unwrap();
        assert_eq!(header.segmentation, Segmentation::Tcp(1208));
        let transport = if v4 { 20 } else { 40 };
        let checksum = PartialChecksum {
            start: transport,
            offset: 16,
        };
        assert_eq!(header.checksum, Some(checksum));
        assert_eq!(header.headers_len, transport + 32);
        assert_eq!(without_id(&received(&written)), without_id(&packets));
    }
}

/// The addresses of names are proxies, which the packet has no more when it is put together.
#[test]
fn packets_that_were_translated_after_they_were_read_become_one() {
    for v4 in [true, false] {
        let mut coalescer = Coalescer::new(ALL);
        let peer = peer();
        for mut packet in build(v4, &row(5, 1000)) {
            let meta = Meta::parse(&packet).unwrap();
            let resource = if v4 { "192.0.2.7" } else { "2001:db8::7" };
            assert!(crate::packet::translate::outbound(
                &mut packet,
                &meta,
                resource.parse().unwrap(),
                6000
            ));
            coalescer.slot()[..packet.len()].copy_from_slice(&packet);
            coalescer.push(&peer, &meta);
        }
        let mut groups = 0;
        coalescer.drain(|_, _, _| groups += 1);
        assert_eq!(groups, 1, "v4 {v4}");
    }
}

#[test]
fn the_checksum_that_is_left_to_the_kernel_comes_out_right() {
    for v4 in [true, false] {
        let written = written(ALL, &build(v4, &row(3, 1000)));
        let (header, mut packet) = written[0].clone();
        crate::packet::split::complete(&mut packet, header.unwrap().checksum.unwrap()).unwrap();
        let meta = Meta::parse_up_to(&packet, 65_535).unwrap();
        let segment = &packet[usize::from(meta.transport_offset)..];
        let sum = checksum::of_transport(meta.src, meta.dst, meta.protocol, segment);
        assert_eq!(sum, 0);
        assert!(!v4 || checksum::of(&packet[..20]) == 0);
    }
}

#[test]
fn what_says_something_of_its_own_stays_alone() {
    type Change = fn(&mut Segment);
    let changes: [(&str, Change); 10] = [
        ("a gap", |s| s.sequence += 1),
        ("another acknowledgement", |s| s.acknowledgement += 1),
        ("another window", |s| s.window += 1),
        ("another timestamp", |s| s.timestamp += 1),
        ("another hop limit", |s| s.hop_limit -= 1),
        ("no payload", |s| s.payload.clear()),
        ("more than the others", |s| s.payload.push(0)),
        ("FIN", |s| s.flags |= 0x01),
        ("ECE", |s| s.flags |= 0x40),
        ("another port", |s| s.port += 1),
    ];
    for v4 in [true, false] {
        for (what, change) in changes {
            let mut segments = row(4, 1000);
            change(&mut segments[2]);
            let packets = build(v4, &segments);
            let written = written(ALL, &packets);
            assert_eq!(written[0].1.len(), packets[0].len() + 1000, "{what}");
            assert_eq!(written[1].1, packets[2], "{what}");
            assert_eq!(written.len(), 3, "{what}");
        }
    }
}

#[test]
fn a_short_or_pushed_segment_is_the_last() {
    let mut segments = row(4, 1000);
    segments[1].flags |= PSH;
    let written_pushed = written(ALL, &build(true, &segments));
    assert_eq!(written_pushed.len(), 2);
    assert_eq!(written_pushed[0].1[33] & PSH, PSH);
    assert_eq!(written_pushed[1].1[33] & PSH, 0);

    let mut segments = row(3, 1000);
    segments[1].payload.truncate(10);
    segments[2].sequence = segments[1].sequence.wrapping_add(10);
    assert_eq!(written(ALL, &build(true, &segments)).len(), 2);
}

#[test]
fn a_wrong_checksum_is_passed_on_as_it_is() {
    for at in [10, 36, 60] {
        let mut packets = build(true, &row(3, 1000));
        packets[1][at] ^= 1;
        let written = written(ALL, &packets);
        assert_eq!(sizes(&written), [1052; 3], "byte {at}");
        assert_eq!(written[1].1, packets[1]);
        assert_eq!(written[1].0, Some(Header::PLAIN));
    }
}

#[test]
fn datagrams_of_one_size_become_one() {
    let mut packets: Vec<Vec<u8>> = (0..70).map(|_| datagram(7, 300)).collect();
    packets.push(datagram(7, 20));
    packets.push(datagram(7, 300));
    let written = written(ALL, &packets);
    let header = written[0].0.unwrap();
    assert_eq!(header.segmentation, Segmentation::Udp(300));
    assert_eq!(
        sizes(&written),
        [28 + 64 * 300, 28 + 6 * 300 + 20, 28 + 300]
    );
    assert_eq!(received(&written).len(), packets.len());
    assert_eq!(without_id(&received(&written)), without_id(&packets));
}

#[test]
fn without_offloads_each_packet_is_written_as_it_is() {
    let mut packets = build(true, &row(5, 1000));
    packets.push(datagram(7, 300));
    packets.push(datagram(7, 300));
    for header in [true, false] {
        let none = Offloads {
            header,
            ..Offloads::default()
        };
        let written = written(none, &packets);
        let got: Vec<_> = written.iter().map(|(_, packet)| packet.clone()).collect();
        assert_eq!(got, packets);
        assert!(written.iter().all(|(h, _)| h.is_some() == header));
    }
    let tso_alone = Offloads { uso: false, ..ALL };
    assert_eq!(written(tso_alone, &packets).len(), 3);
}

#[test]
fn a_super_packet_is_never_longer_than_ip_can_tell() {
    let written = written(ALL, &build(false, &row(60, 1208)));
    assert_eq!(written.len(), 2);
    assert!(sizes(&written).iter().all(|size| *size <= MAX_SUPER));
    // Nor has it more pieces than a write may have.
    let small = self::written(ALL, &build(true, &row(300, 8)));
    assert_eq!(small.len(), 300usize.div_ceil(MAX_PIECES));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Several flows at once, with everything that can happen to a segment.
    #[test]
    fn each_flow_is_received_as_it_was_sent(
        script in prop::collection::vec((0u16..4, 0u8..12, 1usize..1200), 1..150),
        v4: bool,
    ) {
        let mut next = [1000u32; 4];
        let mut size = [500usize; 4];
        let mut packets = Vec::new();
        for (flow, kind, len) in script {
            let n = usize::from(flow);
            let mut segment = Segment::new(next[n], size[n]);
            segment.port = 6000 + flow;
            match kind {
                0 => { size[n] = len; continue; }
                1 => segment.payload.truncate(len),
                2 => segment.flags |= PSH,
                3 => segment.acknowledgement += len as u32,
                4 => segment.payload.clear(),
                5 => segment.sequence = segment.sequence.wrapping_add(len as u32),
                6 => segment.flags |= 0x01,
                7 if v4 => {
                    packets.push(datagram(flow, len));
                    continue;
                }
                _ => {}
            }
            next[n] = segment.sequence.wrapping_add(segment.payload.len() as u32);
            packets.push(segment.build(v4));
        }
        let written = written(ALL, &packets);
        let got = without_id(&received(&written));
        let sent = without_id(&packets);
        let flow_of = |packet: &Vec<u8>| {
            let meta = Meta::parse(packet).unwrap();
            (meta.protocol, meta.src_port)
        };
        prop_assert_eq!(got.len(), sent.len());
        for (protocol, port) in sent.iter().map(flow_of) {
            let of = |all: &[Vec<u8>]| -> Vec<Vec<u8>> {
                all.iter().filter(|p| flow_of(p) == (protocol, port)).cloned().collect()
            };
            prop_assert_eq!(of(&got), of(&sent));
        }
    }
}
