//! A worker that benchmarks drive by hand: datagrams and packets are laid before the very functions
//! that the loop calls once it has received or read them. There are no sockets, so a train ends where
//! it would be sent, and what stands for the device takes packets for nothing.

#![allow(missing_docs)]

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::{At, Slow, State, Worker, established};
use crate::access::{ClientPolicy, Denied, Flow};
use crate::admin::Liveness;
use crate::datapath::counters::Counters;
use crate::datapath::peers::PeerTable;
use crate::device::{Offloads, Tun};
use crate::net::{RecvBuffers, Sockets};
use crate::packet::{FlowKey, Meta};

/// As many as Linux sends at once.
const MAX_SEGMENTS: usize = 64;
const PORT: u16 = 51_820;

pub struct ByHand {
    state: State,
    buffers: RecvBuffers,
    slow: mpsc::Receiver<Slow>,
    _liveness: Liveness,
}

impl ByHand {
    /// `sink` swallows what is written to the device.
    pub fn new(table: Arc<PeerTable>, sink: OwnedFd, now: Instant) -> Self {
        let offloads = Offloads {
            header: true,
            tso: true,
            uso: true,
        };
        let liveness = Liveness::new(now);
        let (to_slow_path, slow) = mpsc::channel(1024);
        let mut state = State::new(Worker {
            sockets: Arc::new(Sockets { v4: None, v6: None }),
            tun: Arc::new(Tun::stand_in(sink, offloads)),
            queue: 0,
            table,
            counters: Arc::new(Counters::new()),
            slow: to_slow_path,
            heartbeat: liveness.register("worker-0", now),
        });
        state.now = now;
        state.max_segments = MAX_SEGMENTS;
        Self {
            state,
            buffers: RecvBuffers::new(),
            slow,
            _liveness: liveness,
        }
    }

    /// What will have been received.
    pub fn buffers(&mut self) -> &mut RecvBuffers {
        &mut self.buffers
    }

    /// Handles what so many buffers hold, as one burst.
    pub fn received(&mut self, filled: usize) {
        self.state.datagrams(&mut self.buffers, filled, PORT);
        self.state.flush();
    }

    /// Handles reads of the device, each with its header, as one burst.
    pub fn read<'a>(&mut self, reads: impl Iterator<Item = &'a mut [u8]>) {
        let mut current = None;
        for read in reads {
            self.state.with_header(&mut current, read);
        }
        drop(current);
        self.state.flush();
    }

    /// Asks for the verdict on a packet of a client; `generation` is the policy's, or any other for
    /// one that is not remembered.
    ///
    /// # Errors
    /// As the policy says.
    pub fn admit_outbound(
        &mut self,
        policy: &ClientPolicy,
        generation: u64,
        meta: &Meta,
    ) -> Result<Option<&Arc<Flow>>, Denied> {
        let at = At {
            now: self.state.now,
            tick: policy.tick(self.state.now),
        };
        let key = FlowKey::outbound(meta);
        self.state
            .outbound
            .pass(&key, generation, at, meta.tcp_flags, || {
                policy.admit_outbound(meta, at.now)
            })
    }

    /// The same for a packet to a client.
    ///
    /// # Errors
    /// As the policy says.
    pub fn admit_inbound(
        &mut self,
        policy: &ClientPolicy,
        meta: &Meta,
    ) -> Result<Option<&Arc<Flow>>, Denied> {
        self.state.flow_to_client(policy, meta)
    }

    /// The receiver index of a datagram that is established data.
    pub fn demux(&self, from: SocketAddr, datagram: &[u8]) -> Option<u32> {
        established(&self.state.relays, from, datagram).map(|(index, _)| index)
    }

    /// Takes up relays that were published.
    pub fn refresh(&mut self) {
        self.state.relays = self.state.io.table.relays();
    }

    /// Takes from the slow path's queue what was handed over: how many.
    pub fn take_slow(&mut self) -> usize {
        std::iter::from_fn(|| self.slow.try_recv().ok()).count()
    }

    /// Counters of the worker.
    pub fn counters(&self) -> &Counters {
        &self.state.io.counters
    }

    /// An address of the gateway.
    pub fn address() -> IpAddr {
        [192, 0, 2, 1].into()
    }
}
