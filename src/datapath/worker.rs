//! A worker: moves packets between the UDP sockets and the TUN device for established sessions.
//!
//! Per packet there is a session lookup by index, the cipher, one flow-cache hit, and an append to
//! an output batch. Whatever is not established data goes to the slow path through a bounded
//! queue; when that is full, the datagram is dropped and counted.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use rustix::event::epoll;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::mpsc;

use super::counters::Counters;
use super::flow_cache::{At, FlowCache};
use super::peers::{Path, Peer, PeerTable, ReplyBudget};
use super::train::Trains;
use crate::access::{ClientPolicy, Denied, DropReason, Reply};
use crate::admin::Heartbeat;
use crate::connectivity::relay::channel_data;
use crate::device::{MTU, Tun};
use crate::ids::ClientId;
use crate::net::{Datagram, RecvBuffers, Sockets, UdpSocket};
use crate::packet::{FlowKey, Malformed, Meta, TcpFlags, ecn, icmp};
use crate::wireguard::data_receiver;

/// Bytes that WireGuard adds to a packet (data-path spec §1.2).
const WG_OVERHEAD: usize = 32;
/// Room for one packet; what is longer than this is not even answered.
const SCRATCH: usize = 2048;
/// Packets read from the device before the sockets get their turn.
const TUN_BURST: usize = 64;
/// Batches received from one socket before the device gets its turn.
const UDP_BURST: usize = 2;
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
        add(&*self.tun, TUN)?;
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
                if let Err(error) = State::new(self).run(&poll, &stopping) {
                    tracing::error!(%error, "a worker ended");
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
    relays: Arc<Vec<SocketAddr>>,
    outbound: FlowCache,
    inbound: FlowCache,
    trains: Trains,
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
        Self {
            relays: io.table.relays(),
            io,
            now,
            outbound: FlowCache::new(),
            inbound: FlowCache::new(),
            trains: Trains::default(),
            passed: Passed::default(),
            replies: ReplyBudget::default(),
            max_segments,
        }
    }

    fn run(mut self, poll: &OwnedFd, stopping: &AtomicBool) -> io::Result<()> {
        let mut events = Vec::with_capacity(8);
        let mut buffers = RecvBuffers::new();
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
            self.now = Instant::now();
            self.io.heartbeat.tick(self.now);
            self.relays = self.io.table.relays();
            for event in &events {
                match event.data.u64() {
                    TUN => self.read_tun(),
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
                Ok(filled) => self.datagrams(buffers, filled, port),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Pending socket errors (say, an ICMP unreachable) are delivered once each.
                Err(_) => break,
            }
        }
        self.flush();
    }

    fn datagrams(&mut self, buffers: &mut RecvBuffers, filled: usize, port: u16) {
        let mut scratch = [0; SCRATCH];
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
                self.inbound_message(&receiver, &mut tunn, &mut scratch, message, ecn);
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
        scratch: &mut [u8; SCRATCH],
        message: &[u8],
        outer_ecn: u8,
    ) {
        // Also keeps the cipher's output within the scratch buffer: boringtun panics past it.
        if message.len() > SCRATCH {
            self.drop_of(&receiver.peer, DropReason::MalformedTooLong);
            return;
        }
        let peer = &receiver.peer;
        match tunn.decapsulate(None, message, scratch) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                ecn::merge(packet, outer_ecn);
                self.inner_packet(receiver, tunn, packet);
            }
            // An empty message is a keep-alive.
            TunnResult::Done | TunnResult::WriteToNetwork(_) => {}
            TunnResult::Err(WireGuardError::DuplicateCounter | WireGuardError::InvalidCounter) => {
                self.drop_of(peer, DropReason::Replayed)
            }
            // Authentic, but its content is no IP packet: the library reads lengths, too.
            TunnResult::Err(WireGuardError::InvalidPacket) => {
                self.drop_of(peer, DropReason::MalformedLength);
            }
            TunnResult::Err(_) => self.drop_of(peer, DropReason::DecryptFailed),
        }
    }

    fn inner_packet(&mut self, receiver: &Receiver, tunn: &mut Tunn, packet: &mut [u8]) {
        let meta = match Meta::parse(packet) {
            Ok(meta) => meta,
            Err(malformed) => {
                self.drop_of(&receiver.peer, malformed.into());
                if malformed == Malformed::TooLong {
                    self.answer(&receiver.peer, tunn, packet, |p, out| {
                        icmp::too_big(p, MTU, out)
                    });
                }
                return;
            }
        };
        if meta.is_control() {
            let message = Slow::Control {
                client: receiver.peer.client,
                packet: packet.to_vec(),
            };
            if !self.hand_over(message) {
                self.drop_of(&receiver.peer, DropReason::QueueFull);
            }
            return;
        }
        let Some(policy) = &receiver.policy else {
            self.drop_of(&receiver.peer, DropReason::NoPolicy);
            return;
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
                if self.io.tun.write(packet).is_err() {
                    self.drop_of(&receiver.peer, DropReason::DeviceWriteFailed);
                    return;
                }
                let len = packet.len() as u64;
                receiver.peer.counters.traffic.received(1, len);
                self.passed.rx_packets += 1;
                self.passed.rx_bytes += len;
            }
            Err(Denied { reason, reply }) => {
                self.drop_of(&receiver.peer, reason);
                match reply {
                    Some(Reply::Prohibited) => {
                        self.answer(&receiver.peer, tunn, packet, icmp::prohibited);
                    }
                    Some(Reply::Unreachable) => {
                        self.answer(&receiver.peer, tunn, packet, icmp::unreachable);
                    }
                    None => {}
                }
            }
        }
    }

    /// Counts a packet of a client that goes nowhere, for the client and in all.
    fn drop_of(&self, peer: &Peer, reason: DropReason) {
        self.io.counters.count(reason, 1);
        peer.counters.count(reason, 1);
    }

    /// Tells the client's application why its packet went nowhere (data-path spec §5.3).
    fn answer(
        &mut self,
        peer: &Arc<Peer>,
        tunn: &mut Tunn,
        packet: &[u8],
        make: impl FnOnce(&[u8], &mut [u8]) -> Option<usize>,
    ) {
        if !peer.may_reply(self.now) {
            return;
        }
        let mut answer = [0; icmp::MAX_REPLY];
        if let (Some(len), Some(path)) = (make(packet, &mut answer), peer.path())
            && self.has_session(peer, tunn)
        {
            self.encrypt(peer, tunn, &path, &answer[..len]);
        }
    }

    // ---- device to network -------------------------------------------------------------------

    fn read_tun(&mut self) {
        let mut packet = [0; SCRATCH];
        let mut current: Option<Sender> = None;
        for _ in 0..TUN_BURST {
            match self.io.tun.read(&mut packet) {
                Ok(0) => break,
                Ok(len) => self.outbound_packet(&mut current, &mut packet[..len]),
                Err(_) => break,
            }
        }
        drop(current);
        self.flush();
    }

    fn outbound_packet(&mut self, current: &mut Option<Sender>, packet: &mut [u8]) {
        let meta = match Meta::parse(packet) {
            Ok(meta) => meta,
            Err(malformed) => {
                self.io.counters.count(malformed.into(), 1);
                if malformed == Malformed::TooLong {
                    self.answer_device(packet);
                }
                return;
            }
        };
        let dst = meta.dst;
        if current.as_ref().is_none_or(|s| s.address != dst) {
            *current = self.io.table.by_address(dst).map(|peer| Sender {
                address: dst,
                policy: peer.policy(),
                path: peer.path(),
                peer,
            });
        }
        let Some(sender) = current else {
            self.io.counters.count(DropReason::NoPeer, 1);
            return;
        };
        let Some(policy) = &sender.policy else {
            self.drop_of(&sender.peer, DropReason::NoPolicy);
            return;
        };
        // What cannot be sent is not counted as part of its flow, and does not keep it alive.
        let Some(path) = &sender.path else {
            self.drop_of(&sender.peer, DropReason::NoPath);
            return;
        };
        let mut tunn = sender.peer.tunn();
        if !self.has_session(&sender.peer, &tunn) {
            return;
        }
        if let Err(denied) = self.admit_inbound(policy, &meta, packet) {
            self.drop_of(&sender.peer, denied.reason);
            return;
        }
        if self.encrypt(&sender.peer, &mut tunn, path, packet) {
            let len = packet.len() as u64;
            sender.peer.counters.traffic.sent(1, len);
            self.passed.tx_packets += 1;
            self.passed.tx_bytes += len;
        }
    }

    /// Tells the sender of a packet that is too long for the tunnel how long it may be. Normally the
    /// kernel does; it cannot when somebody has raised the device's MTU.
    fn answer_device(&mut self, packet: &[u8]) {
        let mut answer = [0; icmp::MAX_REPLY];
        if self.replies.take(self.now)
            && let Some(len) = icmp::too_big(packet, MTU, &mut answer)
            && self.io.tun.write(&answer[..len]).is_err()
        {
            self.io.counters.count(DropReason::DeviceWriteFailed, 1);
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
        let at = At {
            now: self.now,
            tick: policy.tick(self.now),
        };
        let key = FlowKey::inbound(meta);
        // What comes to the client does not begin a flow, whatever its flags.
        let flags = TcpFlags::default();
        let flow = self
            .inbound
            .pass(&key, policy.generation(), at, flags, || {
                policy.admit_inbound(meta, at.now)
            })?;
        if let Some(flow) = flow {
            flow.pass_in(at.tick, meta, packet);
        }
        Ok(())
    }

    /// Whether a packet can be encrypted for this client; counts it as dropped if not.
    fn has_session(&self, peer: &Peer, tunn: &Tunn) -> bool {
        let has = tunn.time_since_last_handshake().is_some();
        if !has {
            self.drop_of(peer, DropReason::NoSession);
        }
        has
    }

    /// Encrypts into the path's train. [`Self::has_session`] must have said so: without a session
    /// boringtun would queue the packet and start a handshake of its own.
    fn encrypt(&mut self, peer: &Peer, tunn: &mut Tunn, path: &Arc<Path>, packet: &[u8]) -> bool {
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

    /// Ends a burst: publishes what has passed, and sends what is to be sent.
    fn flush(&mut self) {
        let passed = std::mem::take(&mut self.passed);
        let traffic = &self.io.counters.traffic;
        if passed.rx_packets > 0 {
            traffic.received(passed.rx_packets, passed.rx_bytes);
        }
        if passed.tx_packets > 0 {
            traffic.sent(passed.tx_packets, passed.tx_bytes);
        }
        if self.trains.is_empty() {
            return;
        }
        let counters = &self.io.counters;
        self.trains.flush(&self.io.sockets, |_, datagrams| {
            counters.count(DropReason::SocketWriteFailed, datagrams as u64);
        });
    }
}

/// The client whose datagrams are being read.
struct Receiver {
    peer: Arc<Peer>,
    policy: Option<Arc<ClientPolicy>>,
}

/// The client that packets from the device are for.
struct Sender {
    address: std::net::IpAddr,
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
