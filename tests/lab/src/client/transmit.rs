//! Queue of outgoing datagrams, grouped so that one system call can send many.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

/// Segments one UDP GSO send may carry (Linux `UDP_MAX_SEGMENTS`).
pub const MAX_SEGMENTS: usize = 64;
/// Bytes one UDP GSO send may carry: 65535 less the headers of the larger family.
const MAX_BYTES: usize = 65_535 - 68;
/// Buffers kept for reuse.
const MAX_FREE: usize = 64;

/// Datagrams to one destination: all `segment` bytes long, the last one possibly shorter.
#[derive(Debug)]
pub struct Batch {
    /// Source address to pin, where the kernel must not choose.
    pub src: Option<IpAddr>,
    /// Destination.
    pub dst: SocketAddr,
    /// Length of each datagram in bytes.
    pub segment: usize,
    /// Number of datagrams.
    pub count: usize,
    /// The datagrams, back to back.
    pub buf: Vec<u8>,
    closed: bool,
}

/// See module docs.
#[derive(Debug, Default)]
pub struct TransmitQueue {
    batches: VecDeque<Batch>,
    free: Vec<Vec<u8>>,
}

impl TransmitQueue {
    /// Appends one datagram made of `head` followed by `body`.
    pub fn push(&mut self, src: Option<IpAddr>, dst: SocketAddr, head: &[u8], body: &[u8]) {
        let len = head.len() + body.len();
        // Only the newest batch of a destination may grow, or datagrams would overtake each other.
        if let Some(batch) = self
            .batches
            .iter_mut()
            .rev()
            .find(|b| b.dst == dst && b.src == src)
            && !batch.closed
            && batch.count < MAX_SEGMENTS
            && len <= batch.segment
            && batch.buf.len() + len <= MAX_BYTES
        {
            batch.buf.extend_from_slice(head);
            batch.buf.extend_from_slice(body);
            batch.count += 1;
            batch.closed = len < batch.segment;
            return;
        }
        let mut buf = self.free.pop().unwrap_or_default();
        buf.extend_from_slice(head);
        buf.extend_from_slice(body);
        self.batches.push_back(Batch {
            src,
            dst,
            segment: len,
            count: 1,
            buf,
            closed: false,
        });
    }

    /// The oldest batch.
    pub fn pop(&mut self) -> Option<Batch> {
        self.batches.pop_front()
    }

    /// Gives a sent batch's buffer back.
    pub fn recycle(&mut self, mut batch: Batch) {
        if self.free.len() < MAX_FREE {
            batch.buf.clear();
            self.free.push(batch.buf);
        }
    }
}

/// Packets for the TUN device, back to back in one buffer.
#[derive(Debug, Default)]
pub struct PacketQueue {
    buf: Vec<u8>,
    ends: Vec<usize>,
}

impl PacketQueue {
    /// Appends one packet.
    pub fn push(&mut self, packet: &[u8]) {
        self.buf.extend_from_slice(packet);
        self.ends.push(self.buf.len());
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The packets in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.ends.iter().scan(0, |start, &end| {
            let packet = &self.buf[*start..end];
            *start = end;
            Some(packet)
        })
    }

    /// Forgets all packets, keeping the memory.
    pub fn clear(&mut self) {
        self.buf.clear();
        self.ends.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn dst(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    #[test]
    fn equal_sizes_share_a_batch_and_a_shorter_one_closes_it() {
        let mut queue = TransmitQueue::default();
        queue.push(None, dst(1), &[1, 2], &[3]);
        queue.push(None, dst(1), &[], &[4, 5, 6]);
        queue.push(None, dst(1), &[], &[7]);
        queue.push(None, dst(1), &[], &[8]);
        let first = queue.pop().unwrap();
        assert_eq!((first.segment, first.count), (3, 3));
        assert_eq!(first.buf, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(queue.pop().unwrap().buf, [8]);
        assert!(queue.pop().is_none());
    }

    #[test]
    fn larger_datagrams_and_other_sources_open_a_new_batch() {
        let mut queue = TransmitQueue::default();
        queue.push(None, dst(1), &[], &[1]);
        queue.push(None, dst(1), &[], &[2, 2]);
        queue.push(Some([127, 0, 0, 1].into()), dst(1), &[], &[3, 3]);
        queue.push(None, dst(2), &[], &[4]);
        queue.push(None, dst(1), &[], &[5, 5]);
        let counts: Vec<_> = std::iter::from_fn(|| queue.pop())
            .map(|b| b.count)
            .collect();
        assert_eq!(counts, [1, 2, 1, 1]);
    }

    #[test]
    fn a_batch_never_exceeds_what_one_gso_send_may_carry() {
        let mut queue = TransmitQueue::default();
        for _ in 0..200 {
            queue.push(None, dst(1), &[], &[0; 1316]);
        }
        let mut total = 0;
        while let Some(batch) = queue.pop() {
            assert!(batch.count <= MAX_SEGMENTS && batch.buf.len() <= MAX_BYTES);
            total += batch.count;
        }
        assert_eq!(total, 200);
    }
}
