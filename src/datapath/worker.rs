//! A worker: moves packets between the UDP sockets and the TUN device for established sessions.
//!
//! Per packet there is a session lookup by index, the cipher, one flow-cache hit, and an append to
//! an output batch; what comes from the device as a super-packet is looked up once. Whatever is not established data goes to the slow path through a bounded
//! queue; when that is full, the datagram is dropped and counted.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use rustix::event::epoll;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::IoSlice;
use tokio::sync::mpsc;

use super::coalesce::Coalescer;
use super::counters::Counters;
use super::flow_cache::{At, FlowCache};
use super::peers::{Path, Peer, PeerTable, ReplyBudget};
use super::train::Trains;
use crate::access::{ClientPolicy, Denied, DropReason, Flow, Reply};
use crate::admin::Heartbeat;
use crate::connectivity::relay::channel_data;
use crate::device::virtio::{self, Segmentation};
use crate::device::{MTU, Queue, Tun};
use crate::fault;
use crate::ids::ClientId;
use crate::net::{BATCH_SIZE, Datagram, RecvBuffers, Sockets, UdpSocket};
use crate::packet::split::{self, Split};
use crate::packet::{FlowKey, Malformed, Meta, TcpFlags, ecn, icmp};
use crate::wireguard::data_receiver;

/// Bytes that WireGuard adds to a packet (data-path spec §1.2).
const WG_OVERHEAD: usize = 32;
/// Longest message of a client; what is longer is not even answered.
const MAX_MESSAGE: usize = 2048;
/// Packets, super-packets included, read from the device before the sockets get their turn.
const TUN_BURST: usize = 64;
/// The same in bytes that wait to be sent.
const TUN_BURST_BYTES: usize = 256 << 10;
/// Room for one read of the device: a header and the longest super-packet.
const TUN_BUFFER: usize = virtio::HEADER_LEN + 65_535;
/// Batches received from one socket before the device gets its turn.
const UDP_BURST: usize = 2;
/// What comes sooner after something else than this is part of a stream of packets.
const BUSY_WITHIN: Duration = Duration::from_micros(100);
/// A read of the device that is as long as this is likely not the only one.
const LONG_READ: usize = 16 << 10;
/// How often a worker without traffic shows that it is alive.
const IDLE_TICK: Duration = Duration::from_secs(1);

/// What the worker cannot decide itself.
#[derive(Debug)]
pub enum Slow {
    /// STUN, TURN, handshakes, or data without a session, as received.
    Datagram {
        /// Our address it came to.
        local: SocketAddr,
        /// Who sent it.
        remote: SocketAddr,
        /// The whole datagram, channel data included.
        payload: Vec<u8>,
    },
    /// A worker cannot go on.
    Ended(io::Error),
    /// An in-tunnel control packet (data-path spec §6.1), decrypted.
    Control {
        /// Who sent it.
        client: ClientId,
        /// The inner packet.
        packet: Vec<u8>,
    },
}

/// What a worker works with.
pub struct Worker {
    /// The UDP sockets.
    pub sockets: Arc<Sockets>,
    /// The device.
    pub tun: Arc<Tun>,
    /// Which of its queues is this worker's.
    pub queue: usize,
    /// Clients and relays.
    pub table: Arc<PeerTable>,
    /// Counters.
    pub counters: Arc<Counters>,
    /// The way to the slow path.
    pub slow: mpsc::Sender<Slow>,
    /// Shows that the loop turns.
    pub heartbeat: Heartbeat,
}

/// Stops a running worker.
pub struct Stop {
    flag: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Stop {
    /// Asks the worker to end, and waits until it has.
    pub fn stop(mut self) {
        self.flag.store(true, Ordering::Release);
        // The counter cannot overflow from one increment; if the worker is gone nobody waits.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What woke the worker, as epoll data.
const WAKE: u64 = 0;
const TUN: u64 = 1;
const UDP4: u64 = 2;
const UDP6: u64 = 3;

impl Worker {
    fn queue(&self) -> &Queue {
        &self.tun.queues()[self.queue]
    }

    /// Starts a thread.
    ///
    /// # Errors
    /// When the kernel gives no epoll instance, event descriptor or thread.
    pub fn spawn(self, number: usize) -> io::Result<Stop> {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add = |fd: &dyn AsFd, data: u64| {
            epoll::add(
                &poll,
                fd.as_fd(),
                epoll::EventData::new_u64(data),
                epoll::EventFlags::IN,
            )
        };
        add(&*wake, WAKE)?;
        add(self.queue(), TUN)?;
        if let Some(socket) = &self.sockets.v4 {
            add(socket, UDP4)?;
        }
        if let Some(socket) = &self.sockets.v6 {
            add(socket, UDP6)?;
        }
        let flag = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&flag);
        let thread = std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || {
                let name = format!("worker-{number}");
                let slow = self.slow.clone();
                let mut state = State::new(self);
                if let Err(error) = state.run(&name, &poll, &stopping) {
                    tracing::error!(worker = name, %error, "A worker died");
                    state.io.heartbeat.die();
                    // Without the slow path there is nobody to tell.
                    let _ = slow.blocking_send(Slow::Ended(error));
                }
            })?;
        Ok(Stop {
            flag,
            wake,
            thread: Some(thread),
        })
    }
}

struct State {
    io: Worker,
    now: Instant,
    /// Whether something came just before.
    is_busy: bool,
    relays: Arc<Vec<SocketAddr>>,
    outbound: FlowCache,
    inbound: FlowCache,
    trains: Trains,
    /// What goes to the device at the end of the burst.
    device: Coalescer,
    passed: Passed,
    /// Of answers to the site; each client has its own.
    replies: ReplyBudget,
    max_segments: usize,
}

/// What has passed in a burst. Others read the counters: a write for each packet would have the
/// worker wait for their caches.
#[derive(Default)]
struct Passed {
    rx_packets: u64,
    rx_bytes: u64,
    tx_packets: u64,
    tx_bytes: u64,
}

impl State {
    fn new(io: Worker) -> Self {
        let now = Instant::now();
        let max_segments = io
            .sockets
            .iter()
            .map(UdpSocket::max_segments)
            .min()
            .unwrap_or(1);
        let workers = io.tun.queues().len();
        Self {
            relays: io.table.relays(),
            device: Coalescer::new(io.queue().offloads()),
            io,
            now,
            is_busy: false,
            outbound: FlowCache::new(workers),
            inbound: FlowCache::new(workers),
            trains: Trains::default(),
            passed: Passed::default(),
            replies: ReplyBudget::default(),
            max_segments,
        }
    }

    fn run(&mut self, name: &str, poll: &OwnedFd, stopping: &AtomicBool) -> io::Result<()> {
        let mut events = Vec::with_capacity(8);
        let mut buffers = RecvBuffers::new();
        let mut packet = vec![0; TUN_BUFFER];
        let timeout = rustix::event::Timespec {
            tv_sec: IDLE_TICK.as_secs() as _,
            tv_nsec: 0,
        };
        while !stopping.load(Ordering::Acquire) {
            events.clear();
            match epoll::wait(
                poll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&timeout),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            fault::point(name)?;
            let now = Instant::now();
            self.is_busy = now.duration_since(self.now) < BUSY_WITHIN;
            self.now = now;
            self.io.heartbeat.tick(self.now);
            self.relays = self.io.table.relays();
            for event in &events {
                match event.data.u64() {
                    TUN => self.read_tun(&mut packet)?,
                    UDP4 => self.read_udp(&mut buffers, |s| s.v4.as_ref()),
                    UDP6 => self.read_udp(&mut buffers, |s| s.v6.as_ref()),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    // ---- network to device -------------------------------------------------------------------

    fn read_udp(
        &mut self,
        buffers: &mut RecvBuffers,
        which: impl Fn(&Sockets) -> Option<&UdpSocket>,
    ) {
        let sockets = Arc::clone(&self.io.sockets);
        let Some(socket) = which(&sockets) else {
            return;
        };
        let port = socket.local_addr().port();
        for _ in 0..UDP_BURST {
            match socket.recv(buffers) {
                Ok(filled) => {
                    self.datagrams(buffers, filled, port);
                    // Nothing is left, and asking costs as much as being woken.
                    if filled < BATCH_SIZE {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Pending socket errors (say, an ICMP unreachable) are delivered once each.
                Err(_) => break,
            }
        }
        self.flush();
    }

    fn datagrams(&mut self, buffers: &mut RecvBuffers, filled: usize, port: u16) {
        let mut datagrams = buffers.datagrams(filled).peekable();
        while let Some(datagram) = datagrams.next() {
            let Some((index, message)) = self.established(&datagram) else {
                self.defer(datagram, port);
                continue;
            };
            let Some(peer) = self.io.table.by_receiver_index(index) else {
                self.io.counters.count(DropReason::UnknownIndex, 1);
                continue;
            };
            let receiver = Receiver {
                policy: peer.policy(),
                peer,
            };
            // One lock for the whole run of this client's datagrams.
            let peer = Arc::clone(&receiver.peer);
            let mut tunn = peer.tunn();
            let mut message = &datagram.payload[message];
            let mut ecn = datagram.ecn;
            let mut next;
            loop {
                self.inbound_message(&receiver, &mut tunn, message, ecn);
                next = datagrams.next_if(|d| {
                    self.established(d)
                        .is_some_and(|(i, _)| i >> 8 == peer.index)
                });
                let Some(datagram) = &next else { break };
                // Cannot be `None`: the very same datagram has just passed.
                let Some((_, range)) = self.established(datagram) else {
                    break;
                };
                message = &datagram.payload[range];
                ecn = datagram.ecn;
            }
        }
    }

    fn established(&self, datagram: &Datagram<'_>) -> Option<(u32, Range<usize>)> {
        established(&self.relays, datagram.from, datagram.payload)
    }

    fn defer(&mut self, datagram: Datagram<'_>, port: u16) {
        let Some(ip) = datagram.to else {
            self.io.counters.count(DropReason::UnknownDatagram, 1);
            return;
        };
        let message = Slow::Datagram {
            local: SocketAddr::new(ip, port),
            remote: datagram.from,
            payload: datagram.payload.to_vec(),
        };
        if !self.hand_over(message) {
            self.io.counters.count(DropReason::QueueFull, 1);
        }
    }

    /// Whether the slow path had room for it.
    fn hand_over(&self, message: Slow) -> bool {
        self.io.slow.try_send(message).is_ok()
    }

    fn inbound_message(
        &mut self,
        receiver: &Receiver,
        tunn: &mut Tunn,
        message: &[u8],
        outer_ecn: u8,
    ) {
        if message.len() > MAX_MESSAGE {
            self.drop_of(&receiver.peer, DropReason::MalformedTooLong);
            return;
        }
        // Also keeps the cipher's output within the slot: boringtun panics past it.
        if !self.device.has_room(message.len()) {
            self.flush_device();
        }
        let peer = &receiver.peer;
        // Decrypted to where it is written to the device from.
        let len = match tunn.decapsulate(None, message, self.device.slot()) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                ecn::merge(packet, outer_ecn);
                packet.len()
            }
            // An empty message is a keep-alive.
            TunnResult::Done | TunnResult::WriteToNetwork(_) => return,
            TunnResult::Err(WireGuardError::DuplicateCounter | WireGuardError::InvalidCounter) => {
                return self.drop_of(peer, DropReason::Replayed);
            }
            // Authentic, but its content is no IP packet: the library reads lengths, too.
            TunnResult::Err(WireGuardError::InvalidPacket) => {
                return self.drop_of(peer, DropReason::MalformedLength);
            }
            TunnResult::Err(_) => return self.drop_of(peer, DropReason::DecryptFailed),
        };
        let Some((reason, answer)) = self.inner_packet(receiver, len) else {
            return;
        };
        self.drop_of(peer, reason);
        // A scan is refused many answers; none of those is made.
        if let Some(make) = answer
            && peer.may_reply(self.now)
        {
            let mut reply = [0; icmp::MAX_REPLY];
            if let Some(len) = make(&self.device.slot()[..len], &mut reply) {
                self.answer(peer, tunn, &reply[..len]);
            }
        }
    }

    /// Judges the packet that lies in the device's slot, and passes it on; or says why not, and what to
    /// answer.
    #[inline]
    fn inner_packet(&mut self, receiver: &Receiver, len: usize) -> Option<(DropReason, Answer)> {
        let packet = &mut self.device.slot()[..len];
        let meta = match Meta::parse(packet) {
            Ok(meta) => meta,
            Err(malformed) => {
                let answer: Answer = match malformed {
                    Malformed::TooLong => Some(|p, out| icmp::too_big(p, MTU, out)),
                    _ => None,
                };
                return Some((malformed.into(), answer));
            }
        };
        if meta.is_control() {
            let message = Slow::Control {
                client: receiver.peer.client,
                packet: packet.to_vec(),
            };
            let is_taken = self.hand_over(message);
            return (!is_taken).then_some((DropReason::QueueFull, None));
        }
        let Some(policy) = &receiver.policy else {
            return Some((DropReason::NoPolicy, None));
        };
        let at = At {
            now: self.now,
            tick: policy.tick(self.now),
        };
        let key = FlowKey::outbound(&meta);
        let passed = self
            .outbound
            .pass(&key, policy.generation(), at, meta.tcp_flags, || {
                policy.admit_outbound(&meta, at.now)
            });
        match passed {
            Ok(flow) => {
                if let Some(flow) = flow {
                    flow.pass_out(at.tick, &meta, packet);
                }
                self.device.push(&receiver.peer, &meta);
                None
            }
            Err(Denied { reason, reply }) => {
                let answer: Answer = reply.map(|reply| match reply {
                    Reply::Prohibited => icmp::prohibited as fn(&[u8], &mut [u8]) -> Option<usize>,
                    Reply::Unreachable => icmp::unreachable,
                });
                Some((reason, answer))
            }
        }
    }

    /// Counts a packet of a client that goes nowhere, for the client and in all.
    fn drop_of(&self, peer: &Peer, reason: DropReason) {
        self.drops_of(peer, reason, 1);
    }

    fn drops_of(&self, peer: &Peer, reason: DropReason, packets: u64) {
        self.io.counters.count(reason, packets);
        peer.counters.count(reason, packets);
    }

    /// Tells the client's application why its packet went nowhere (data-path spec §5.3).
    fn answer(&mut self, peer: &Arc<Peer>, tunn: &mut Tunn, reply: &[u8]) {
        let Some(path) = peer.path() else {
            return;
        };
        if has_session(tunn) {
            self.encrypt(peer, tunn, &path, reply);
        } else {
            self.drop_of(peer, DropReason::NoSession);
        }
    }

    // ---- device to network -------------------------------------------------------------------

    /// # Errors
    /// When the device is gone.
    fn read_tun(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let tun = Arc::clone(&self.io.tun);
        let queue = &tun.queues()[self.io.queue];
        let has_header = queue.offloads().header;
        let mut current: Option<Sender> = None;
        for _ in 0..TUN_BURST {
            let len = match queue.read(buffer) {
                Ok(len) => len,
                // Deleted. It would wake us for ever, and carry nothing.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EIO)) => {
                    return Err(error);
                }
                Err(_) => break,
            };
            let packet = &mut buffer[..len];
            if has_header {
                self.with_header(&mut current, packet);
            } else if len > 0 {
                self.plain_packet(&mut current, packet);
            } else {
                break;
            }
            // Where packets come one by one, being woken for the next costs no more than finding none.
            if self.trains.waiting() >= TUN_BURST_BYTES || !self.is_busy && len < LONG_READ {
                break;
            }
        }
        drop(current);
        self.flush();
        Ok(())
    }

    /// Takes what the device has read: a packet, or a super-packet.
    fn with_header(&mut self, current: &mut Option<Sender>, read: &mut [u8]) {
        let Some((header, packet)) = read.split_first_chunk_mut() else {
            self.io.counters.count(DropReason::MalformedTruncated, 1);
            return;
        };
        let Ok(header) = virtio::Header::parse(header) else {
            self.io.counters.count(DropReason::MalformedLength, 1);
            return;
        };
        if header.segmentation == Segmentation::None {
            match header.checksum.map(|sum| split::complete(packet, sum)) {
                None | Some(Ok(())) => self.plain_packet(current, packet),
                Some(Err(malformed)) => self.malformed(malformed, packet),
            }
            return;
        }
        match Split::new(header, packet) {
            Ok(packets) => self.super_packet(current, packets),
            Err(malformed) => self.malformed(malformed, packet),
        }
    }

    /// Counts what the device should not have handed over.
    fn malformed(&mut self, malformed: Malformed, packet: &[u8]) {
        self.io.counters.count(malformed.into(), 1);
        if malformed == Malformed::TooLong {
            self.answer_device(packet);
        }
    }

    fn plain_packet(&mut self, current: &mut Option<Sender>, packet: &mut [u8]) {
        let meta = match Meta::parse(packet) {
            Ok(meta) => meta,
            Err(malformed) => return self.malformed(malformed, packet),
        };
        let Some(mut to) = self.recipient(current, meta.dst, 1) else {
            return;
        };
        match self.admit_inbound(to.policy, &meta, packet) {
            Ok(()) => {
                let sent = self.send(&mut to, packet);
                self.count_sent(to.peer, u64::from(sent > 0), sent);
            }
            Err(denied) => self.drop_of(to.peer, denied.reason),
        }
    }

    /// All packets of a super-packet are of one flow, which is looked up once.
    fn super_packet(&mut self, current: &mut Option<Sender>, mut packets: Split<'_>) {
        let meta = *packets.whole();
        let count = packets.count() as u64;
        let Some(mut to) = self.recipient(current, meta.dst, count) else {
            return;
        };
        let flow = match self.flow_to_client(to.policy, &meta) {
            Ok(flow) => flow.map(Arc::clone),
            Err(denied) => return self.drops_of(to.peer, denied.reason, count),
        };
        let tick = to.policy.tick(self.now);
        let (mut sent_packets, mut sent_bytes) = (0, 0);
        while let Some((meta, packet)) = packets.next_packet() {
            if let Some(flow) = &flow {
                flow.pass_in(tick, &meta, packet);
            }
            let sent = self.send(&mut to, packet);
            sent_packets += u64::from(sent > 0);
            sent_bytes += sent;
        }
        self.count_sent(to.peer, sent_packets, sent_bytes);
    }

    /// Who a packet from the device is for, with all that it takes to send it; counts what cannot be
    /// sent, which does not become part of its flow and does not keep it alive.
    fn recipient<'a>(
        &self,
        current: &'a mut Option<Sender>,
        address: IpAddr,
        packets: u64,
    ) -> Option<Recipient<'a>> {
        if current.as_ref().is_none_or(|s| s.address != address) {
            *current = self.io.table.by_address(address).map(|peer| Sender {
                address,
                policy: peer.policy(),
                path: peer.path(),
                peer,
            });
        }
        let Some(sender) = current else {
            self.io.counters.count(DropReason::NoPeer, packets);
            return None;
        };
        let peer = &sender.peer;
        let reason = match (&sender.policy, &sender.path) {
            (None, _) => DropReason::NoPolicy,
            (_, None) => DropReason::NoPath,
            (Some(policy), Some(path)) => {
                let tunn = peer.tunn();
                if has_session(&tunn) {
                    return Some(Recipient {
                        peer,
                        policy,
                        path,
                        tunn,
                    });
                }
                DropReason::NoSession
            }
        };
        self.drops_of(peer, reason, packets);
        None
    }

    /// Returns the bytes that were encrypted, all or none.
    fn send(&mut self, to: &mut Recipient<'_>, packet: &[u8]) -> u64 {
        if self.encrypt(to.peer, &mut to.tunn, to.path, packet) {
            packet.len() as u64
        } else {
            0
        }
    }

    fn count_sent(&mut self, peer: &Peer, packets: u64, bytes: u64) {
        peer.counters.traffic.sent(packets, bytes);
        self.passed.tx_packets += packets;
        self.passed.tx_bytes += bytes;
    }

    /// Tells the sender of a packet that is too long for the tunnel how long it may be. Normally the
    /// kernel does; it cannot when somebody has raised the device's MTU.
    fn answer_device(&mut self, packet: &[u8]) {
        let mut answer = [0; icmp::MAX_REPLY];
        if self.replies.take(self.now)
            && let Some(len) = icmp::too_big(packet, MTU, &mut answer)
        {
            let header = virtio::Header::PLAIN.to_bytes(true);
            let header = if self.io.queue().offloads().header {
                &header[..]
            } else {
                &[]
            };
            let pieces = [IoSlice::new(header), IoSlice::new(&answer[..len])];
            if self.io.queue().write(&pieces).is_err() {
                self.io.counters.count(DropReason::DeviceWriteFailed, 1);
            }
        }
    }

    /// Judges a packet to the client, and makes it what the client expects.
    fn admit_inbound(
        &mut self,
        policy: &ClientPolicy,
        meta: &Meta,
        packet: &mut [u8],
    ) -> Result<(), Denied> {
        if meta.is_icmp_error() {
            // Each is about something else, and they are rare.
            if let Some((flow, embedded)) = policy.admit_error(packet, meta, self.now)? {
                flow.pass_error_in(&embedded, meta, packet);
            }
            return Ok(());
        }
        let tick = policy.tick(self.now);
        if let Some(flow) = self.flow_to_client(policy, meta)? {
            flow.pass_in(tick, meta, packet);
        }
        Ok(())
    }

    /// The flow that a packet to the client is part of, if it may pass.
    fn flow_to_client(
        &mut self,
        policy: &ClientPolicy,
        meta: &Meta,
    ) -> Result<Option<&Arc<Flow>>, Denied> {
        let at = At {
            now: self.now,
            tick: policy.tick(self.now),
        };
        let key = FlowKey::inbound(meta);
        // What comes to the client does not begin a flow, whatever its flags.
        let flags = TcpFlags::default();
        self.inbound.pass(&key, policy.generation(), at, flags, || {
            policy.admit_inbound(meta, at.now)
        })
    }

    /// Encrypts into the path's train. [`has_session`] must have said so: without a session
    /// boringtun would queue the packet and start a handshake of its own.
    fn encrypt(&mut self, peer: &Peer, tunn: &mut Tunn, path: &Arc<Path>, packet: &[u8]) -> bool {
        if self.trains.is_full() {
            self.send_trains();
        }
        let header = path.channel.map_or(0, |_| channel_data::HEADER_LEN);
        let message = packet.len() + WG_OVERHEAD;
        let pushed = self.trains.push(
            path,
            ecn::of(packet),
            header + message,
            self.max_segments,
            |out| {
                if let Some(channel) = path.channel {
                    let Some(head) = channel_data::header(channel, message) else {
                        return false;
                    };
                    out[..header].copy_from_slice(&head);
                }
                matches!(
                    tunn.encapsulate(packet, &mut out[header..]),
                    TunnResult::WriteToNetwork(m) if m.len() == message
                )
            },
        );
        if !pushed {
            self.drop_of(peer, DropReason::NoSession);
        }
        pushed
    }

    /// Writes to the device what waits for it.
    fn flush_device(&mut self) {
        if self.device.is_empty() {
            return;
        }
        let (counters, passed) = (&self.io.counters, &mut self.passed);
        self.device
            .flush(self.io.queue(), |peer, packets, bytes, result| {
                if result.is_ok() {
                    peer.counters.traffic.received(packets, bytes);
                    passed.rx_packets += packets;
                    passed.rx_bytes += bytes;
                } else {
                    counters.count(DropReason::DeviceWriteFailed, packets);
                    peer.counters.count(DropReason::DeviceWriteFailed, packets);
                }
            });
    }

    /// Ends a burst: writes and sends what waits, and publishes what has passed.
    fn flush(&mut self) {
        self.flush_device();
        let passed = std::mem::take(&mut self.passed);
        let traffic = &self.io.counters.traffic;
        if passed.rx_packets > 0 {
            traffic.received(passed.rx_packets, passed.rx_bytes);
        }
        if passed.tx_packets > 0 {
            traffic.sent(passed.tx_packets, passed.tx_bytes);
        }
        if !self.trains.is_empty() {
            self.send_trains();
        }
    }

    fn send_trains(&mut self) {
        let counters = &self.io.counters;
        self.trains.flush(&self.io.sockets, |_, datagrams| {
            counters.count(DropReason::SocketWriteFailed, datagrams as u64);
        });
    }
}

/// Whether a packet can be encrypted for this client.
fn has_session(tunn: &Tunn) -> bool {
    tunn.time_since_last_handshake().is_some()
}

/// What makes an answer to a packet.
type Answer = Option<fn(&[u8], &mut [u8]) -> Option<usize>>;

/// What it takes to send a client something.
struct Recipient<'a> {
    peer: &'a Arc<Peer>,
    policy: &'a ClientPolicy,
    path: &'a Arc<Path>,
    tunn: MutexGuard<'a, Tunn>,
}

/// The client whose datagrams are being read.
struct Receiver {
    peer: Arc<Peer>,
    policy: Option<Arc<ClientPolicy>>,
}

/// The client that packets from the device are for.
struct Sender {
    address: IpAddr,
    peer: Arc<Peer>,
    policy: Option<Arc<ClientPolicy>>,
    path: Option<Arc<Path>>,
}

/// The receiver index of established data and where the message lies: past any channel data header,
/// and without what the relay may have padded it with.
pub(crate) fn established(
    relays: &[SocketAddr],
    from: SocketAddr,
    datagram: &[u8],
) -> Option<(u32, Range<usize>)> {
    let message = if channel_data::is_channel_data(datagram) && relays.contains(&from) {
        // The channel number is not looked up: the message authenticates itself, and the path
        // it came by decides nothing.
        let (_, payload) = channel_data::parse(datagram)?;
        channel_data::HEADER_LEN..channel_data::HEADER_LEN + payload.len()
    } else {
        0..datagram.len()
    };
    let receiver = data_receiver(&datagram[message.clone()])?;
    Some((receiver, message))
}

#[doc(hidden)]
#[path = "bench.rs"]
pub mod bench;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn channel_data_of_relays_is_unwrapped_without_padding() {
        let relay = SocketAddr::from(([192, 0, 2, 1], 3478));
        let other = SocketAddr::from(([192, 0, 2, 1], 3479));
        let mut message = vec![4, 0, 0, 0, 1, 2, 3, 4];
        message.resize(33, 7);
        assert_eq!(
            established(&[relay], other, &message),
            Some((0x0403_0201, 0..33))
        );
        let mut wrapped = channel_data::header(0x4001, message.len())
            .unwrap()
            .to_vec();
        wrapped.extend_from_slice(&message);
        for _ in 0..=3 {
            assert_eq!(
                established(&[relay], relay, &wrapped),
                Some((0x0403_0201, 4..37))
            );
            assert_eq!(established(&[relay], other, &wrapped), None);
            wrapped.push(0);
        }
        assert_eq!(established(&[relay], relay, &wrapped), None, "too long");
        assert_eq!(established(&[relay], relay, &wrapped[..36]), None, "cut");
    }
}
