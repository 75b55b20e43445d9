//! Cutting super-packets into the packets that they stand for (TSO, USO).
//!
//! Nothing is moved: each packet is made where its payload lies, by writing its headers in front, over
//! the end of the payload before, which has been taken by then.

use super::checksum::Sum;
use super::{MAX_PACKET, Malformed, Meta, TcpFlags, protocol};
use crate::device::virtio::{Header, PartialChecksum, Segmentation};

/// Longest headers of a super-packet: IPv4 with options, or IPv6, and TCP with options.
const MAX_HEADERS: usize = 60 + 60;
/// Longest super-packet, as far as IP can tell its length.
const MAX_SUPER: usize = 65_535;

/// Bits of the TCP header's 14th byte.
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Completes a packet's checksum where the kernel has left that to us.
///
/// # Errors
/// When there is no room for the checksum where it is said to be.
pub fn complete(packet: &mut [u8], checksum: PartialChecksum) -> Result<(), Malformed> {
    let start = usize::from(checksum.start);
    let at = start + usize::from(checksum.offset);
    if at + 2 > packet.len() {
        return Err(Malformed::Truncated);
    }
    let is_udp = checksum.offset == 6;
    let sum = Sum::new().bytes(&packet[start..]).checksum();
    let sum = if sum == 0 && is_udp { 0xFFFF } else { sum };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

/// A super-packet that is being cut.
pub struct Split<'a> {
    packet: &'a mut [u8],
    whole: Meta,
    headers: [u8; MAX_HEADERS],
    headers_len: usize,
    transport: usize,
    /// Bytes of payload per packet.
    size: usize,
    /// Where the next payload begins.
    next: usize,
    number: u32,
    is_v4: bool,
    is_tcp: bool,
    /// The sum of what is the same in each packet's pseudo-header.
    pseudo: Sum,
}

impl<'a> Split<'a> {
    /// Begins to cut a super-packet as the header says.
    ///
    /// # Errors
    /// When it is not of the kind that the header says, or its parts would be too long.
    pub fn new(header: Header, packet: &'a mut [u8]) -> Result<Self, Malformed> {
        let meta = Meta::parse_up_to(packet, MAX_SUPER)?;
        let transport = usize::from(meta.transport_offset);
        let (size, is_tcp, transport_len) = match header.segmentation {
            Segmentation::Tcp(size) if meta.protocol == protocol::TCP => {
                let offset = packet.get(transport + 12).ok_or(Malformed::TcpHeader)?;
                (size, true, usize::from(offset >> 4) * 4)
            }
            Segmentation::Udp(size) if meta.protocol == protocol::UDP => (size, false, 8),
            _ => return Err(Malformed::Length),
        };
        let headers_len = transport + transport_len;
        let size = usize::from(size);
        if headers_len > MAX_HEADERS || headers_len >= packet.len() {
            return Err(Malformed::Truncated);
        }
        if headers_len + size > MAX_PACKET {
            return Err(Malformed::TooLong);
        }
        let mut headers = [0; MAX_HEADERS];
        headers[..headers_len].copy_from_slice(&packet[..headers_len]);
        let checksum = transport + if is_tcp { 16 } else { 6 };
        headers[checksum..checksum + 2].fill(0);
        Ok(Self {
            pseudo: Sum::new().pseudo_header(meta.src, meta.dst, meta.protocol, 0),
            whole: meta,
            packet,
            headers,
            headers_len,
            transport,
            size,
            next: headers_len,
            number: 0,
            is_v4: meta.is_ipv4(),
            is_tcp,
        })
    }

    /// What all packets have in common, and the flags and length of the whole.
    pub fn whole(&self) -> &Meta {
        &self.whole
    }

    /// How many packets it makes.
    pub fn count(&self) -> usize {
        (self.packet.len() - self.headers_len).div_ceil(self.size)
    }

    /// The next packet, complete.
    #[inline]
    pub fn next_packet(&mut self) -> Option<(Meta, &mut [u8])> {
        let payload = self.next;
        if payload >= self.packet.len() {
            return None;
        }
        let end = (payload + self.size).min(self.packet.len());
        let is_last = end == self.packet.len();
        let packet = &mut self.packet[payload - self.headers_len..end];
        packet[..self.headers_len].copy_from_slice(&self.headers[..self.headers_len]);
        // What is left of the whole fits 16 bits, as `Meta` has read it from such a field.
        let len = packet.len() as u16;
        let transport = self.transport;
        if self.is_v4 {
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(self.number as u16);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[10..12].fill(0);
            let sum = Sum::new().bytes(&packet[..transport.min(60)]).checksum();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
        }
        let transport_len = len - transport as u16;
        let segment = &mut packet[transport..];
        let checksum_at = if self.is_tcp {
            let sequence = u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
            let sequence = sequence.wrapping_add(self.number * self.size as u32);
            segment[4..8].copy_from_slice(&sequence.to_be_bytes());
            if !is_last {
                segment[13] &= !(FIN | PSH);
            }
            if self.number > 0 {
                segment[13] &= !CWR;
            }
            16
        } else {
            segment[4..6].copy_from_slice(&transport_len.to_be_bytes());
            6
        };
        let sum = self.pseudo.word(transport_len).bytes(segment).checksum();
        let sum = if sum == 0 && !self.is_tcp {
            0xFFFF
        } else {
            sum
        };
        segment[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
        self.next = end;
        self.number += 1;
        let meta = Meta {
            len,
            payload_len: len - self.headers_len as u16,
            tcp_flags: if self.is_tcp {
                TcpFlags::of(packet[transport + 13])
            } else {
                TcpFlags::default()
            },
            ..self.whole
        };
        Some((meta, packet))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::packet::checksum;

    fn header(segmentation: Segmentation) -> Header {
        Header {
            checksum: None,
            segmentation,
            headers_len: 0,
        }
    }

    /// A packet with complete checksums, made by another library.
    fn build(v4: bool, tcp: bool, flags: u8, payload: &[u8]) -> Vec<u8> {
        use etherparse::PacketBuilder;
        let ip = if v4 {
            PacketBuilder::ipv4([10, 0, 0, 1], [100, 64, 0, 2], 64)
        } else {
            let mut far = [0; 16];
            far[15] = 9;
            PacketBuilder::ipv6([0xfd; 16], far, 64)
        };
        let mut out = Vec::new();
        if tcp {
            let mut builder = ip
                .tcp(443, 50_000, 4_294_960_000, 65_000)
                .ack(77)
                .options_raw(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8])
                .unwrap();
            if flags & FIN != 0 {
                builder = builder.fin();
            }
            if flags & PSH != 0 {
                builder = builder.psh();
            }
            builder.write(&mut out, payload).unwrap();
        } else {
            ip.udp(443, 50_000).write(&mut out, payload).unwrap();
        }
        out
    }

    fn split(segmentation: Segmentation, mut packet: Vec<u8>) -> Vec<Vec<u8>> {
        let mut split = Split::new(header(segmentation), &mut packet).unwrap();
        let mut packets = Vec::new();
        assert_eq!(
            split.count(),
            split.whole().payload_len as usize / split.size
                + usize::from(!(split.whole().payload_len as usize).is_multiple_of(split.size))
        );
        while let Some((meta, packet)) = split.next_packet() {
            assert_eq!(Ok(meta), Meta::parse(packet));
            packets.push(packet.to_vec());
        }
        packets
    }

    fn transport_checksum(packet: &[u8]) -> u16 {
        let meta = Meta::parse(packet).unwrap();
        let segment = &packet[usize::from(meta.transport_offset)..];
        checksum::of_transport(meta.src, meta.dst, meta.protocol, segment)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_parts_are_valid_and_carry_the_whole_payload_in_order(
            v4: bool,
            tcp: bool,
            size in 8usize..1200,
            seed: u8,
            len in 1usize..40_000,
        ) {
            let payload: Vec<u8> = (0..len).map(|n| (n as u8).wrapping_mul(31) ^ seed).collect();
            let whole = build(v4, tcp, FIN | PSH, &payload);
            let segmentation = if tcp {
                Segmentation::Tcp(size as u16)
            } else {
                Segmentation::Udp(size as u16)
            };
            let packets = split(segmentation, whole);
            prop_assert_eq!(packets.len(), len.div_ceil(size));
            let mut got = Vec::new();
            for (n, packet) in packets.iter().enumerate() {
                let meta = Meta::parse(packet).unwrap();
                prop_assert_eq!(transport_checksum(packet), 0);
                if v4 {
                    prop_assert_eq!(checksum::of(&packet[..20]), 0);
                    prop_assert_eq!(u16::from_be_bytes([packet[4], packet[5]]) as usize, n & 0xFFFF);
                }
                let at = usize::from(meta.transport_offset);
                let is_last = n + 1 == packets.len();
                if tcp {
                    let sequence = u32::from_be_bytes(packet[at + 4..at + 8].try_into().unwrap());
                    prop_assert_eq!(sequence, 4_294_960_000u32.wrapping_add(got.len() as u32));
                    prop_assert_eq!(packet[at + 13] & (FIN | PSH) != 0, is_last);
                }
                let payload = &packet[packet.len() - usize::from(meta.payload_len)..];
                prop_assert!(payload.len() == size || is_last);
                got.extend_from_slice(payload);
            }
            prop_assert_eq!(got, payload);
        }

        #[test]
        fn nothing_that_a_device_could_hand_over_panics(
            mut packet in prop::collection::vec(any::<u8>(), 0..300),
            kind in 0u8..3,
            size: u16,
            start: u16,
            offset in 0u16..40,
        ) {
            let segmentation = match kind {
                0 => Segmentation::None,
                1 => Segmentation::Tcp(size.max(1)),
                _ => Segmentation::Udp(size.max(1)),
            };
            if let Some(first) = packet.first_mut() {
                *first = if size % 2 == 0 { 0x45 } else { 0x60 };
            }
            let len = packet.len() as u16;
            if packet.len() > 44 {
                packet[2..4].copy_from_slice(&len.to_be_bytes());
                packet[9] = 6;
                packet[6] = 6;
                if size % 2 == 1 {
                    packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                }
            }
            let _ = complete(&mut packet, PartialChecksum { start: start % 400, offset });
            if let Ok(mut split) = Split::new(header(segmentation), &mut packet) {
                while split.next_packet().is_some() {}
            }
        }
    }

    #[test]
    fn congestion_window_reduced_is_said_once() {
        let mut whole = build(true, true, 0, &[7; 3000]);
        whole[33] |= CWR;
        let packets = split(Segmentation::Tcp(1000), whole);
        let said: Vec<bool> = packets.iter().map(|p| p[33] & CWR != 0).collect();
        assert_eq!(said, [true, false, false]);
    }

    #[test]
    fn what_does_not_fit_the_tunnel_is_not_cut() {
        let mut whole = build(true, true, 0, &[7; 5000]);
        let mss = (MAX_PACKET - 52) as u16;
        assert!(Split::new(header(Segmentation::Tcp(mss)), &mut whole).is_ok());
        let longer = Split::new(header(Segmentation::Tcp(mss + 1)), &mut whole);
        assert_eq!(longer.err(), Some(Malformed::TooLong));
        let other = Split::new(header(Segmentation::Udp(1000)), &mut whole);
        assert_eq!(other.err(), Some(Malformed::Length));
    }

    #[test]
    fn a_checksum_that_was_left_to_us_is_completed() {
        for (v4, tcp) in [(true, true), (true, false), (false, true), (false, false)] {
            let whole = build(v4, tcp, 0, b"an odd number of bytes");
            let meta = Meta::parse(&whole).unwrap();
            let checksum = PartialChecksum {
                start: meta.transport_offset,
                offset: if tcp { 16 } else { 6 },
            };
            let at = usize::from(checksum.start + checksum.offset);
            let mut partial = whole.clone();
            let len = whole.len() as u16 - meta.transport_offset;
            let pseudo = Sum::new().pseudo_header(meta.src, meta.dst, meta.protocol, len);
            partial[at..at + 2].copy_from_slice(&pseudo.folded().to_be_bytes());
            assert_ne!(partial, whole);
            complete(&mut partial, checksum).unwrap();
            assert_eq!(partial, whole);
        }
    }

    #[test]
    fn a_checksum_field_outside_the_packet_is_refused() {
        let mut packet = build(true, true, 0, b"");
        let end = packet.len() as u16;
        let checksum = PartialChecksum {
            start: end,
            offset: 0,
        };
        assert_eq!(complete(&mut packet, checksum), Err(Malformed::Truncated));
    }
}
