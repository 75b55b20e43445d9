//! Outgoing datagrams, collected into trains of equal size so that one system call sends many
//! (`UDP_SEGMENT`).

use std::io;
use std::sync::Arc;

use super::peers::Path;
use crate::net::{MAX_TRAIN, Sockets};

/// Trains that wait at most, so that many active clients do not take memory for each.
const MAX_TRAINS: usize = 32;

struct Train {
    path: Arc<Path>,
    ecn: u8,
    /// Size of every datagram but perhaps the last.
    segment: usize,
    /// Whether a shorter datagram has ended it.
    closed: bool,
    datagrams: usize,
    /// Room for a whole train, and how much of it is used.
    buffer: Box<[u8]>,
    used: usize,
}

/// Trains in the order in which they were begun; a client's datagrams never overtake each other.
#[derive(Default)]
pub struct Trains {
    trains: Vec<Train>,
    spare: Vec<Box<[u8]>>,
}

impl Trains {
    /// Appends a datagram of `len` bytes that `fill` writes; it returns false to take it back.
    pub fn push(
        &mut self,
        path: &Arc<Path>,
        ecn: u8,
        len: usize,
        max_datagrams: usize,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        // The latest train of a path decides: an older one must not grow past it.
        let at = self
            .trains
            .iter()
            .rposition(|t| Arc::ptr_eq(&t.path, path) || t.path == *path)
            .filter(|at| {
                let t = &self.trains[*at];
                !t.closed
                    && t.ecn == ecn
                    && len <= t.segment
                    && t.datagrams < max_datagrams
                    && t.used + len <= MAX_TRAIN
            });
        let at = at.unwrap_or_else(|| {
            self.trains.push(Train {
                path: Arc::clone(path),
                ecn,
                segment: len,
                closed: false,
                datagrams: 0,
                buffer: self
                    .spare
                    .pop()
                    .unwrap_or_else(|| vec![0; MAX_TRAIN].into_boxed_slice()),
                used: 0,
            });
            self.trains.len() - 1
        });
        let train = &mut self.trains[at];
        if !fill(&mut train.buffer[train.used..train.used + len]) {
            return false;
        }
        train.used += len;
        train.datagrams += 1;
        train.closed = len < train.segment;
        true
    }

    /// Sends everything; `failed` learns of trains that could not be sent, with the number of
    /// datagrams lost.
    pub fn flush(&mut self, sockets: &Sockets, mut failed: impl FnMut(io::Error, usize)) {
        for train in self.trains.drain(..) {
            if train.datagrams > 0 {
                let segment = (train.datagrams > 1).then_some(train.segment);
                if let Err(error) = sockets.send(
                    train.path.source,
                    train.path.destination,
                    train.ecn,
                    &train.buffer[..train.used],
                    segment,
                ) {
                    failed(error, train.datagrams);
                }
            }
            self.spare.push(train.buffer);
        }
    }

    /// Whether it is time to send.
    pub fn is_full(&self) -> bool {
        self.trains.len() >= MAX_TRAINS
    }

    /// Bytes that wait.
    pub fn waiting(&self) -> usize {
        self.trains.iter().map(|train| train.used).sum()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.trains.is_empty()
    }

    #[cfg(test)]
    fn shape(&self) -> Vec<(usize, usize)> {
        self.trains
            .iter()
            .map(|t| (t.segment, t.datagrams))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::datapath::peers::PathKind;

    fn path(port: u16) -> Arc<Path> {
        Arc::new(Path {
            source: None,
            destination: ([192, 0, 2, 1], port).into(),
            channel: None,
            kind: PathKind::Direct,
        })
    }

    fn push(trains: &mut Trains, path: &Arc<Path>, ecn: u8, len: usize) {
        assert!(trains.push(path, ecn, len, 64, |b| {
            b.fill(1);
            true
        }));
    }

    #[test]
    fn equal_datagrams_share_a_train_and_a_shorter_one_ends_it() {
        let (mut trains, a) = (Trains::default(), path(1));
        for len in [100, 100, 60, 60, 100] {
            push(&mut trains, &a, 0, len);
        }
        assert_eq!(trains.shape(), [(100, 3), (60, 1), (100, 1)]);
    }

    #[test]
    fn clients_and_ecn_do_not_mix_and_order_is_kept() {
        let (mut trains, a, b) = (Trains::default(), path(1), path(2));
        push(&mut trains, &a, 0, 100);
        push(&mut trains, &b, 0, 100);
        push(&mut trains, &a, 0, 100);
        push(&mut trains, &a, 3, 100);
        // Back to the first marking: it must not jump ahead of the marked one.
        push(&mut trains, &a, 0, 100);
        assert_eq!(trains.shape(), [(100, 2), (100, 1), (100, 1), (100, 1)]);
    }

    #[test]
    fn a_train_never_outgrows_one_send() {
        let (mut trains, a) = (Trains::default(), path(1));
        for _ in 0..60 {
            push(&mut trains, &a, 0, 1312);
        }
        for (segment, datagrams) in trains.shape() {
            assert!(segment * datagrams <= MAX_TRAIN);
        }
        assert_eq!(trains.shape().iter().map(|s| s.1).sum::<usize>(), 60);
    }

    #[test]
    fn a_datagram_taken_back_leaves_no_trace() {
        let (mut trains, a) = (Trains::default(), path(1));
        push(&mut trains, &a, 0, 100);
        assert!(!trains.push(&a, 0, 50, 64, |_| false));
        push(&mut trains, &a, 0, 100);
        assert_eq!(trains.shape(), [(100, 2)]);
    }
}
