//! Packets on their way to the device, put together to super-packets (TSO, USO): writing to the device
//! costs the kernel about as much for one packet as for fifty of the same flow.
//!
//! Packets are written in the order in which their super-packets were begun. A packet that does not
//! continue its flow's latest super-packet begins another one, so that no packet of a flow overtakes
//! another. What the kernel's own receive offload would not put together is not put together here either:
//! the two ends of a connection see the segments that they have sent, with the same headers.

use std::io;
use std::sync::Arc;

use rustix::io::IoSlice;

use super::peers::Peer;
use crate::device::virtio::{Header, PartialChecksum, Segmentation};
use crate::device::{Offloads, Queue};
use crate::packet::checksum::{self, Sum};
use crate::packet::{Meta, protocol};

/// Bytes of packets that wait at most; small enough to stay in the processor's cache.
const ARENA: usize = 256 << 10;
/// Pieces of one write; a full super-packet of the tunnel's packets has about fifty.
const MAX_PIECES: usize = 128;
/// The kernel takes no more datagrams than this in one (`UDP_MAX_SEGMENTS` of older kernels).
const MAX_DATAGRAMS: usize = 64;
/// Longest super-packet.
const MAX_SUPER: usize = 65_535;
/// How many super-packets back a flow's latest one is looked for. Further back it counts as ended.
const MEMORY: usize = 16;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// Where a packet lies in the arena.
#[derive(Debug, Clone, Copy)]
struct Piece {
    at: u32,
    len: u32,
}

/// A packet, or several.
struct Group {
    /// The first packet whole, of the others the payload.
    pieces: Vec<Piece>,
    peer: Arc<Peer>,
    /// Ports or whatever lies there; a first look at whether a packet belongs here.
    tag: u32,
    /// What it may grow by; `None` if it may not.
    growth: Option<Growth>,
    /// Bytes of all packets, headers counted for each.
    bytes: usize,
    /// The length of the super-packet.
    len: usize,
    transport: u16,
    headers_len: u16,
    /// Bytes of payload per packet.
    size: u16,
    is_tcp: bool,
    /// Some packet had the PSH flag.
    push: bool,
}

/// What the next packet of a super-packet must have.
#[derive(Debug, Clone, Copy)]
struct Growth {
    /// TCP: the sequence number.
    sequence: u32,
    /// IPv4: the identification, unless fragmentation is forbidden.
    id: Option<u16>,
}

/// What may be put together with others.
struct Candidate {
    transport: usize,
    headers_len: usize,
    payload: usize,
    sequence: u32,
    id: Option<u16>,
    push: bool,
    is_tcp: bool,
}

/// The packets that wait.
pub struct Coalescer {
    arena: Box<[u8]>,
    used: usize,
    groups: Vec<Group>,
    spare: Vec<Vec<Piece>>,
    offloads: Offloads,
}

impl Coalescer {
    /// An empty one for a device with these offloads.
    pub fn new(offloads: Offloads) -> Self {
        Self {
            arena: vec![0; ARENA].into_boxed_slice(),
            used: 0,
            groups: Vec::new(),
            spare: Vec::new(),
            offloads,
        }
    }

    /// Whether there is room for a packet of this length.
    #[inline]
    pub fn has_room(&self, len: usize) -> bool {
        self.used + len <= self.arena.len()
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Room for the next packet, empty without [`Self::has_room`]. What is written there is forgotten
    /// unless [`Self::push`] follows.
    #[inline]
    pub fn slot(&mut self) -> &mut [u8] {
        &mut self.arena[self.used..]
    }

    /// Takes in the packet of `meta.len` bytes that lies at the beginning of the slot.
    #[inline]
    pub fn push(&mut self, peer: &Arc<Peer>, meta: &Meta) {
        let at = self.used;
        let len = usize::from(meta.len);
        self.used += len;
        let candidate = self.candidate(at, meta);
        let packet = &self.arena[at..at + len];
        let transport = usize::from(meta.transport_offset);
        let tag = tag(packet, transport);
        let latest = self
            .groups
            .iter()
            .rev()
            .take(MEMORY)
            .position(|group| group.tag == tag && same_ends(&self.arena, group, packet))
            .map(|back| self.groups.len() - 1 - back);
        if let (Some(latest), Some(candidate)) = (latest, &candidate) {
            let group = &mut self.groups[latest];
            if group.continues(&self.arena, packet, candidate) {
                group.add(at, candidate);
                return;
            }
        }
        let mut pieces = self.spare.pop().unwrap_or_default();
        pieces.push(Piece {
            at: at as u32,
            len: len as u32,
        });
        let mut group = Group {
            pieces,
            peer: Arc::clone(peer),
            tag,
            growth: None,
            bytes: len,
            len,
            transport: meta.transport_offset,
            headers_len: 0,
            size: 0,
            is_tcp: false,
            push: false,
        };
        if let Some(candidate) = candidate {
            group.headers_len = candidate.headers_len as u16;
            group.size = candidate.payload as u16;
            group.is_tcp = candidate.is_tcp;
            group.push = candidate.push;
            group.growth = (!candidate.push).then(|| Growth {
                sequence: candidate.sequence.wrapping_add(candidate.payload as u32),
                id: candidate.id.map(|id| id.wrapping_add(1)),
            });
        }
        self.groups.push(group);
    }

    /// Judges whether a packet may be put together with others: it has payload, nothing in its headers
    /// that belongs to one packet alone, and correct checksums, which nobody would check any more.
    #[inline]
    fn candidate(&self, at: usize, meta: &Meta) -> Option<Candidate> {
        let packet = &self.arena[at..at + usize::from(meta.len)];
        let transport = usize::from(meta.transport_offset);
        let is_v4 = meta.is_ipv4();
        // IPv4 options and IPv6 extension headers belong to one packet.
        if meta.payload_len == 0 || transport != if is_v4 { 20 } else { 40 } {
            return None;
        }
        let segment = &packet[transport..];
        let payload = usize::from(meta.payload_len);
        let is_tcp = meta.protocol == protocol::TCP;
        let (sequence, push) = if is_tcp && self.offloads.tso {
            let flags = segment[13];
            if flags & !PSH != ACK || segment[12] & 0x0F != 0 {
                return None;
            }
            let sequence = u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
            (sequence, flags & PSH != 0)
        } else if meta.protocol == protocol::UDP && self.offloads.uso {
            if segment[6..8] == [0, 0] {
                return None;
            }
            (0, false)
        } else {
            return None;
        };
        // Of the packet as it is, which may have been translated since `meta` was read.
        let addresses = if is_v4 {
            &packet[12..20]
        } else {
            &packet[8..40]
        };
        let sum = Sum::new()
            .bytes(addresses)
            .word(u16::from(meta.protocol))
            .word(segment.len() as u16)
            .bytes(segment);
        let is_sound = (!is_v4 || checksum::of(&packet[..20]) == 0) && sum.checksum() == 0;
        if !is_sound {
            return None;
        }
        let forbids_fragments = !is_v4 || packet[6] & 0x40 != 0;
        Some(Candidate {
            transport,
            headers_len: packet.len() - payload,
            payload,
            sequence,
            id: (!forbids_fragments).then(|| u16::from_be_bytes([packet[4], packet[5]])),
            push,
            is_tcp,
        })
    }

    /// Writes everything. `written` learns of each client's packets: how many, their bytes, and how it
    /// went.
    pub fn flush(
        &mut self,
        queue: &Queue,
        mut written: impl FnMut(&Arc<Peer>, u64, u64, io::Result<()>),
    ) {
        self.drain(|header, pieces, group| {
            let mut slices = [IoSlice::new(&[]); MAX_PIECES + 1];
            let mut count = 0;
            if let Some(header) = header {
                slices[0] = IoSlice::new(header);
                count = 1;
            }
            for piece in pieces {
                slices[count] = IoSlice::new(piece);
                count += 1;
            }
            let result = queue.write(&slices[..count]);
            written(
                &group.peer,
                group.pieces.len() as u64,
                group.bytes as u64,
                result,
            );
        });
    }

    /// Hands over everything in order, with the device's header if there is one.
    fn drain<F>(&mut self, mut each: F)
    where
        F: for<'a> FnMut(Option<&'a [u8]>, &mut dyn Iterator<Item = &'a [u8]>, &Group),
    {
        for mut group in self.groups.drain(..) {
            let header = group.finish(&mut self.arena);
            let is_v4 = self.arena[group.pieces[0].at as usize] >> 4 == 4;
            let header = header.to_bytes(is_v4);
            let header = self.offloads.header.then_some(&header[..]);
            let arena = &self.arena;
            let mut pieces = group
                .pieces
                .iter()
                .map(|piece| &arena[piece.at as usize..(piece.at + piece.len) as usize]);
            each(header, &mut pieces, &group);
            group.pieces.clear();
            self.spare.push(group.pieces);
        }
        self.used = 0;
    }
}

impl Group {
    /// Whether a packet between the same ends continues it.
    #[inline]
    fn continues(&self, arena: &[u8], packet: &[u8], candidate: &Candidate) -> bool {
        let Some(growth) = self.growth else {
            return false;
        };
        let first = &arena[self.pieces[0].at as usize..];
        let transport = usize::from(self.transport);
        let most = if self.is_tcp {
            MAX_PIECES
        } else {
            MAX_DATAGRAMS
        };
        if candidate.is_tcp != self.is_tcp
            || candidate.transport != transport
            || candidate.headers_len != usize::from(self.headers_len)
            || candidate.payload > usize::from(self.size)
            || candidate.id != growth.id
            || self.pieces.len() == most
            || self.len + candidate.payload > MAX_SUPER
        {
            return false;
        }
        // Version, traffic class, flow label, hop limit: all that is not a length, an identification or a
        // checksum. The addresses are known to be the same.
        let same_ip = if packet[0] >> 4 == 4 {
            first[..2] == packet[..2] && first[6..10] == packet[6..10]
        } else {
            first[..4] == packet[..4] && first[6..8] == packet[6..8]
        };
        if !same_ip || !self.is_tcp {
            return same_ip;
        }
        let (old, new) = (&first[transport..], &packet[transport..]);
        let options = 20..candidate.headers_len - transport;
        candidate.sequence == growth.sequence
            // Acknowledgement and window. The flags of candidates differ in PSH only.
            && old[8..12] == new[8..12]
            && old[14..16] == new[14..16]
            && old[options.clone()] == new[options]
    }

    fn add(&mut self, at: usize, candidate: &Candidate) {
        self.pieces.push(Piece {
            at: (at + candidate.headers_len) as u32,
            len: candidate.payload as u32,
        });
        self.bytes += candidate.headers_len + candidate.payload;
        self.len += candidate.payload;
        self.push |= candidate.push;
        let is_full = candidate.payload == usize::from(self.size);
        self.growth = self
            .growth
            .filter(|_| is_full && !candidate.push)
            .map(|growth| Growth {
                sequence: growth.sequence.wrapping_add(candidate.payload as u32),
                id: growth.id.map(|id| id.wrapping_add(1)),
            });
    }

    /// Makes the first packet's headers those of the whole.
    fn finish(&mut self, arena: &mut [u8]) -> Header {
        if self.pieces.len() == 1 {
            return Header::PLAIN;
        }
        let start = self.pieces[0].at as usize;
        let transport = usize::from(self.transport);
        let packet = &mut arena[start..start + usize::from(self.headers_len)];
        let len = self.len as u16;
        let transport_len = len - self.transport;
        let (sum, protocol) = if packet[0] >> 4 == 4 {
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum::of(&packet[..transport]).to_be_bytes();
            packet[10..12].copy_from_slice(&sum);
            (Sum::new().bytes(&packet[12..20]), packet[9])
        } else {
            packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
            (Sum::new().bytes(&packet[8..40]), packet[6])
        };
        let pseudo = sum.word(u16::from(protocol)).word(transport_len).folded();
        let segment = &mut packet[transport..];
        let offset = if self.is_tcp {
            if self.push {
                segment[13] |= PSH;
            }
            16
        } else {
            segment[4..6].copy_from_slice(&transport_len.to_be_bytes());
            6
        };
        segment[offset..offset + 2].copy_from_slice(&pseudo.to_be_bytes());
        Header {
            checksum: Some(PartialChecksum {
                start: self.transport,
                offset: offset as u16,
            }),
            segmentation: if self.is_tcp {
                Segmentation::Tcp(self.size)
            } else {
                Segmentation::Udp(self.size)
            },
            headers_len: self.headers_len,
        }
    }
}

/// The first four bytes behind the IP header: with TCP and UDP, the ports.
#[inline]
fn tag(packet: &[u8], transport: usize) -> u32 {
    packet
        .get(transport..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// Whether a packet with the same tag has the same addresses and protocol.
#[inline]
fn same_ends(arena: &[u8], group: &Group, packet: &[u8]) -> bool {
    let first = &arena[group.pieces[0].at as usize..];
    match (first[0] >> 4, packet[0] >> 4) {
        (4, 4) => first[9] == packet[9] && first[12..20] == packet[12..20],
        // Extension headers may be in front of some packets of a flow only.
        (6, 6) => first[8..40] == packet[8..40],
        _ => false,
    }
}

#[cfg(test)]
#[path = "coalesce_tests.rs"]
mod tests;
