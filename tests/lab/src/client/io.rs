//! The thread that moves datagrams and packets: poll, read in batches, let the core work, send in
//! batches.

use std::io::{ErrorKind, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::core::{ConnectOutcome, Core, NetworkConfig};
use super::messages::{Egress, Ingress};
use super::netconf::FWMARK;
use super::status::Status;
use super::transmit::Batch;
use super::tun::Tun;

/// Inner MTU (data-path spec §1.2).
pub const MTU: u16 = 1280;
/// Largest datagram between peers (data-path spec §1.2).
const MAX_DATAGRAM: usize = 1316;
/// Reads of one device before the other gets its turn.
const TUN_BATCH: usize = 8;
const SEND_BUFFER: usize = 2 << 20;
const RECV_BUFFER: usize = 16 << 20;
/// How long a full socket or device buffer may hold up everything else.
const MAX_BLOCK: Duration = Duration::from_millis(10);

/// What other threads ask of the core.
#[derive(Debug)]
pub enum Command {
    /// The topic was joined.
    PortalUp,
    /// The channel broke.
    PortalDown(String),
    /// A message arrived.
    Portal(Ingress),
    /// A local address was learned.
    HostAddress(IpAddr),
    /// `POST /connect`.
    Connect {
        /// Access to what.
        resource: Uuid,
        /// Ask also if there is access already.
        again: bool,
        /// What came of it.
        reply: oneshot::Sender<ConnectOutcome>,
    },
    /// `POST /disconnect`.
    Disconnect(oneshot::Sender<usize>),
    /// `POST /inject`.
    Inject(Vec<Vec<u8>>, oneshot::Sender<usize>),
    /// `POST /resolve`.
    Resolve(String, oneshot::Sender<Option<(Uuid, Vec<IpAddr>)>>),
    /// `GET /status`.
    Status(oneshot::Sender<Box<Status>>),
    /// Say goodbye and end.
    Shutdown,
}

/// Sends commands and wakes the thread up.
#[derive(Debug, Clone)]
pub struct CoreHandle {
    sender: Sender<Command>,
    wake: Arc<OwnedFd>,
}

impl CoreHandle {
    /// A handle and what the thread needs to receive.
    ///
    /// # Errors
    /// If no eventfd can be made.
    pub fn new() -> std::io::Result<(Self, Receiver<Command>)> {
        let (sender, receiver) = channel();
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok((
            Self {
                sender,
                wake: Arc::new(wake),
            },
            receiver,
        ))
    }

    /// Queues a command; lost if the thread has ended.
    pub fn send(&self, command: Command) {
        if self.sender.send(command).is_ok() {
            // Full means that a wake-up is pending anyway.
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// A UDP socket of one family.
#[derive(Debug)]
pub struct Udp {
    socket: UdpSocket,
    state: UdpSocketState,
    port: u16,
}

impl Udp {
    /// Binds the wildcard address of a family.
    ///
    /// # Errors
    /// If the family is not available or the port is taken.
    pub fn bind(v6: bool, port: u16) -> anyhow::Result<Self> {
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if v6 {
            socket.set_only_v6(true)?;
        }
        if let Err(error) = socket.set_mark(FWMARK) {
            tracing::warn!(%error, "cannot mark the UDP socket: traffic may loop into the tunnel");
        }
        // As much as the kernel grants.
        let _ = socket.set_send_buffer_size(SEND_BUFFER);
        let _ = socket.set_recv_buffer_size(RECV_BUFFER);
        let any: IpAddr = if v6 {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        socket.bind(&SocketAddr::new(any, port).into())?;
        let socket = UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        let port = socket.local_addr()?.port();
        Ok(Self {
            socket,
            state,
            port,
        })
    }

    /// The bound port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sends a batch, in one call if the kernel segments.
    pub fn send(&self, batch: &Batch) {
        let max = self.state.max_gso_segments().max(1) * batch.segment;
        for chunk in batch.buf.chunks(max.max(1)) {
            self.send_chunk(batch, chunk);
        }
    }

    fn send_chunk(&self, batch: &Batch, chunk: &[u8]) {
        let transmit = Transmit {
            destination: batch.dst,
            ecn: None,
            contents: chunk,
            segment_size: (chunk.len() > batch.segment).then_some(batch.segment),
            src_ip: batch.src,
        };
        for attempt in 0..2 {
            match self.state.try_send((&self.socket).into(), &transmit) {
                Ok(()) => return,
                Err(error) if error.kind() == ErrorKind::WouldBlock && attempt == 0 => {
                    wait_for(self.socket.as_fd(), PollFlags::OUT);
                }
                Err(error) => {
                    tracing::trace!(%error, dst = %batch.dst, "send failed");
                    return;
                }
            }
        }
    }
}

fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags) {
    let timeout = Timespec::try_from(MAX_BLOCK).ok();
    let _ = poll(&mut [PollFd::from_borrowed_fd(fd, flags)], timeout.as_ref());
}

/// Receive buffers of one `recvmmsg`.
struct RecvBuffers {
    storage: Vec<u8>,
    each: usize,
    meta: Vec<RecvMeta>,
}

impl RecvBuffers {
    fn new(gro_segments: usize) -> Self {
        let each = MAX_DATAGRAM.next_multiple_of(64) * gro_segments.max(1);
        // Datagrams that are too large to be ours still have to fit to be told apart.
        let each = each.max(2048);
        Self {
            storage: vec![0; each * quinn_udp::BATCH_SIZE],
            each,
            meta: vec![RecvMeta::default(); quinn_udp::BATCH_SIZE],
        }
    }

    fn recv(&mut self, udp: &Udp) -> std::io::Result<usize> {
        let mut slices: Vec<IoSliceMut<'_>> = self
            .storage
            .chunks_mut(self.each)
            .map(IoSliceMut::new)
            .collect();
        udp.state
            .recv((&udp.socket).into(), &mut slices, &mut self.meta)
    }

    fn datagrams(&self, count: usize) -> impl Iterator<Item = (IpAddr, SocketAddr, &[u8])> {
        self.meta
            .iter()
            .zip(self.storage.chunks(self.each))
            .take(count)
            .filter_map(|(meta, buf)| Some((meta.dst_ip?, meta, buf)))
            .flat_map(|(dst, meta, buf)| {
                buf[..meta.len]
                    .chunks(meta.stride.max(1))
                    .map(move |datagram| (dst, meta.addr, datagram))
            })
            .filter(|(_, _, datagram)| datagram.len() <= MAX_DATAGRAM)
    }
}

/// Everything the thread owns.
pub struct Shell {
    /// Protocol.
    pub core: Core,
    /// IPv4 socket.
    pub v4: Option<Udp>,
    /// IPv6 socket.
    pub v6: Option<Udp>,
    /// Device.
    pub tun: Tun,
    /// From other threads.
    pub commands: Receiver<Command>,
    /// Wakes the thread up.
    pub handle: CoreHandle,
    /// To the portal task.
    pub egress: UnboundedSender<Egress>,
    /// To the iproute2 thread.
    pub network: Sender<NetworkConfig>,
}

impl Shell {
    /// Runs until [`Command::Shutdown`].
    ///
    /// # Errors
    /// If waiting for events fails.
    pub fn run(mut self) -> anyhow::Result<()> {
        let segments = |udp: &Option<Udp>| udp.as_ref().map_or(1, |u| u.state.gro_segments());
        let mut buffers = RecvBuffers::new(segments(&self.v4).max(segments(&self.v6)));
        loop {
            let now = Instant::now();
            if self.core.poll_timeout() <= now {
                self.core.handle_timeout(now);
            }
            self.flush();
            let ready = self.wait()?;
            if ready.wake && self.run_commands() {
                self.flush();
                return Ok(());
            }
            if ready.v4 {
                recv(&mut self.core, self.v4.as_ref(), &mut buffers);
            }
            if ready.v6 {
                recv(&mut self.core, self.v6.as_ref(), &mut buffers);
            }
            if ready.tun {
                let now = Instant::now();
                for _ in 0..TUN_BATCH {
                    let core = &mut self.core;
                    match self.tun.read(|packet| core.handle_tun_packet(now, packet)) {
                        Ok(()) => {}
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                        Err(error) => {
                            tracing::debug!(%error, "TUN read");
                            break;
                        }
                    }
                }
            }
        }
    }

    fn wait(&mut self) -> anyhow::Result<Ready> {
        let timeout = self
            .core
            .poll_timeout()
            .saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(timeout).context("timeout out of range")?;
        let tun = self.tun.as_fd();
        let wake = self.handle.wake.as_fd();
        let mut fds = vec![
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
            PollFd::from_borrowed_fd(tun, PollFlags::IN),
        ];
        for udp in [&self.v4, &self.v6].into_iter().flatten() {
            fds.push(PollFd::new(&udp.socket, PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut udp = ready[2..].iter().copied();
        Ok(Ready {
            wake: ready[0],
            tun: ready[1],
            v4: self.v4.is_some() && udp.next().unwrap_or(false),
            v6: self.v6.is_some() && udp.next().unwrap_or(false),
        })
    }

    /// True when it is time to end.
    fn run_commands(&mut self) -> bool {
        let mut counter = [0u8; 8];
        let _ = rustix::io::read(&*self.handle.wake, &mut counter);
        while let Ok(command) = self.commands.try_recv() {
            let now = Instant::now();
            match command {
                Command::PortalUp => self.core.handle_portal_up(now),
                Command::PortalDown(reason) => self.core.handle_portal_down(reason),
                Command::Portal(message) => self.core.handle_portal(now, message),
                Command::HostAddress(ip) => self.core.handle_host_address(now, ip),
                Command::Connect {
                    resource,
                    again,
                    reply,
                } => {
                    let _ = reply.send(self.core.connect(now, resource, again));
                }
                Command::Inject(packets, reply) => {
                    let _ = reply.send(self.core.inject(now, &packets));
                }
                Command::Disconnect(reply) => {
                    let _ = reply.send(self.core.disconnect(now));
                }
                Command::Resolve(domain, reply) => {
                    let _ = reply.send(self.core.resolve(now, &domain));
                }
                Command::Status(reply) => {
                    let _ = reply.send(Box::new(self.core.status(now)));
                }
                Command::Shutdown => {
                    self.core.shutdown(now);
                    return true;
                }
            }
        }
        false
    }

    fn flush(&mut self) {
        while let Some(probe) = self.core.poll_route_probe() {
            if let Some(ip) = local_address_towards(probe) {
                self.core.handle_host_address(Instant::now(), ip);
            }
        }
        while let Some(network) = self.core.poll_network() {
            let _ = self.network.send(network);
        }
        while let Some(message) = self.core.poll_egress() {
            let _ = self.egress.send(message);
        }
        while let Some(batch) = self.core.transmits().pop() {
            let udp = if batch.dst.is_ipv4() {
                &self.v4
            } else {
                &self.v6
            };
            if let Some(udp) = udp {
                udp.send(&batch);
            }
            self.core.transmits().recycle(batch);
        }
        let packets = self.core.tun_packets();
        if packets.is_empty() {
            return;
        }
        if let Err(error) = self.tun.write(packets) {
            tracing::trace!(%error, "TUN write");
        }
        packets.clear();
    }
}

struct Ready {
    wake: bool,
    tun: bool,
    v4: bool,
    v6: bool,
}

fn recv(core: &mut Core, udp: Option<&Udp>, buffers: &mut RecvBuffers) {
    let Some(udp) = udp else { return };
    match buffers.recv(udp) {
        Ok(count) => {
            let now = Instant::now();
            for (local, from, datagram) in buffers.datagrams(count) {
                core.handle_datagram(now, local, from, datagram);
            }
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        Err(error) => tracing::debug!(%error, "UDP receive"),
    }
}

/// The address the kernel would send from, found by connecting a marked socket.
fn local_address_towards(remote: SocketAddr) -> Option<IpAddr> {
    let domain = Domain::for_address(remote);
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).ok()?;
    // Unmarked, the answer could be the tunnel's own address.
    let _ = socket.set_mark(FWMARK);
    socket.connect(&remote.into()).ok()?;
    Some(socket.local_addr().ok()?.as_socket()?.ip())
}
