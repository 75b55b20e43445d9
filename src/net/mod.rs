//! UDP sockets with batched, segment-offloaded I/O (data-path spec §1.1).
//!
//! One socket per family, bound to the wildcard address and shared by all clients and relays. The
//! slow path sends on the same sockets as the workers; only workers receive.

mod addresses;

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use rustix::event::{PollFd, PollFlags};
use socket2::{Domain, Protocol, Socket, Type};

pub use self::addresses::local_addresses;
use crate::host::constants;

/// Routing mark of every socket of this process, so that its packets never take the tunnel's
/// routes (data-path spec §9).
pub const FWMARK: u32 = constants::FWMARK;

/// Room for one receive buffer: the largest train of datagrams that GRO can hand over.
const RECV_BUFFER: usize = 65_535;

/// Largest payload of one `UDP_SEGMENT` send: 65,535 less the largest IPv4 and UDP headers.
pub const MAX_TRAIN: usize = 65_535 - 68;

/// How long a send waits for room in the socket buffer before the datagrams are dropped.
const SEND_PATIENCE: Duration = Duration::from_millis(5);

/// Address family of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What to ask for when binding.
#[derive(Debug, Clone, Copy)]
pub struct SocketOptions {
    /// Preferred local port; an ephemeral one is taken when it is in use.
    pub port: u16,
    /// `SO_SNDBUF` in bytes; halved until the kernel agrees.
    pub send_buffer: usize,
    /// `SO_RCVBUF` in bytes; halved until the kernel agrees.
    pub recv_buffer: usize,
}

impl Default for SocketOptions {
    /// Port and sizes of data-path spec §1.1.
    fn default() -> Self {
        Self {
            port: constants::UDP_PORT,
            send_buffer: constants::UDP_SEND_BUFFER as usize,
            recv_buffer: constants::UDP_RECEIVE_BUFFER as usize,
        }
    }
}

/// Smallest socket buffer worth asking for.
const BUFFER_FLOOR: usize = 64 << 10;

/// A bound UDP socket.
pub struct UdpSocket {
    socket: StdUdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
    sizes: (usize, usize),
}

impl UdpSocket {
    /// Binds the wildcard address of `family`.
    ///
    /// # Errors
    /// When the family is not available, or no port can be had.
    pub fn bind(family: Family, options: SocketOptions) -> io::Result<Self> {
        let (domain, wildcard) = match family {
            Family::V4 => (Domain::IPV4, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            Family::V6 => (Domain::IPV6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if family == Family::V6 {
            socket.set_only_v6(true)?;
        }
        mark(&socket)?;
        let sizes = (
            grow(
                options.send_buffer,
                |n| socket.set_send_buffer_size(n),
                || socket.send_buffer_size(),
            ),
            grow(
                options.recv_buffer,
                |n| socket.set_recv_buffer_size(n),
                || socket.recv_buffer_size(),
            ),
        );
        let preferred = SocketAddr::new(wildcard, options.port);
        if let Err(error) = socket.bind(&preferred.into()) {
            if error.kind() != io::ErrorKind::AddrInUse {
                return Err(error);
            }
            socket.bind(&SocketAddr::new(wildcard, 0).into())?;
        }
        let socket: StdUdpSocket = socket.into();
        let state = UdpSocketState::new((&socket).into())?;
        let local = socket.local_addr()?;
        Ok(Self {
            socket,
            state,
            local,
            sizes,
        })
    }

    /// The bound address; the IP is the wildcard.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Send and receive buffer sizes that the kernel granted, in bytes.
    pub fn buffer_sizes(&self) -> (usize, usize) {
        self.sizes
    }

    /// How many datagrams one send may carry; 1 without `UDP_SEGMENT`.
    pub fn max_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    /// Whether the kernel hands over trains of datagrams (`UDP_GRO`).
    pub fn has_gro(&self) -> bool {
        self.state.gro_segments() > 1
    }

    /// Receives into `buffers` without blocking and returns how many were filled.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when nothing is there; other errors as the kernel reports them.
    pub fn recv(&self, buffers: &mut RecvBuffers) -> io::Result<usize> {
        let mut slices = buffers
            .storage
            .chunks_mut(RECV_BUFFER)
            .map(IoSliceMut::new)
            .collect::<arrayvec_lite::Slices<'_>>();
        self.state
            .recv((&self.socket).into(), slices.as_mut(), &mut buffers.meta)
    }

    /// Sends one datagram, or a train of equal ones when `segment` is given (the last may be
    /// shorter). Waits briefly when the socket buffer is full.
    ///
    /// # Errors
    /// When the kernel refuses, or the buffer stays full.
    pub fn send(
        &self,
        source: Option<IpAddr>,
        destination: SocketAddr,
        ecn: u8,
        payload: &[u8],
        segment: Option<usize>,
    ) -> io::Result<()> {
        let transmit = Transmit {
            destination,
            ecn: EcnCodepoint::from_bits(ecn),
            contents: payload,
            segment_size: segment,
            src_ip: source,
        };
        match self.state.try_send((&self.socket).into(), &transmit) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_writable(&self.socket)?;
                self.state.try_send((&self.socket).into(), &transmit)
            }
            // After EIO or EINVAL the library has switched segmentation off; once more, one by one.
            Err(error)
                if segment.is_some()
                    && matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) =>
            {
                self.send_each(&transmit)
            }
            other => other,
        }
    }

    fn send_each(&self, train: &Transmit<'_>) -> io::Result<()> {
        let size = train.segment_size.unwrap_or(train.contents.len()).max(1);
        for contents in train.contents.chunks(size) {
            let one = Transmit {
                contents,
                segment_size: None,
                ..train.clone()
            };
            if let Err(error) = self.state.try_send((&self.socket).into(), &one) {
                if error.kind() != io::ErrorKind::WouldBlock {
                    return Err(error);
                }
                wait_writable(&self.socket)?;
                self.state.try_send((&self.socket).into(), &one)?;
            }
        }
        Ok(())
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sets the routing mark; without `CAP_NET_ADMIN` that is refused, and then the tunnel's policy
/// rules could not be installed either.
fn mark(socket: &Socket) -> io::Result<()> {
    match socket.set_mark(FWMARK) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

fn grow(
    wanted: usize,
    set: impl Fn(usize) -> io::Result<()>,
    get: impl Fn() -> io::Result<usize>,
) -> usize {
    let mut size = wanted;
    while size >= BUFFER_FLOOR && set(size).is_err() {
        size /= 2;
    }
    get().unwrap_or(0)
}

fn wait_writable(socket: &StdUdpSocket) -> io::Result<()> {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    let patience = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: SEND_PATIENCE.as_nanos() as _,
    };
    match rustix::event::poll(&mut fds, Some(&patience)) {
        Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Buffers of one batched receive, reused for ever.
pub struct RecvBuffers {
    storage: Vec<u8>,
    meta: [RecvMeta; BATCH_SIZE],
}

impl RecvBuffers {
    /// Room for one full batch.
    pub fn new() -> Self {
        Self {
            storage: vec![0; RECV_BUFFER * BATCH_SIZE],
            meta: [RecvMeta::default(); BATCH_SIZE],
        }
    }

    /// The datagrams of the first `filled` buffers, in order of arrival, with trains split.
    pub fn datagrams(&mut self, filled: usize) -> impl Iterator<Item = Datagram<'_>> {
        self.storage
            .chunks_mut(RECV_BUFFER)
            .zip(self.meta.iter())
            .take(filled)
            .flat_map(|(buffer, meta)| {
                let stride = meta.stride.max(1);
                buffer[..meta.len.min(RECV_BUFFER)]
                    .chunks_mut(stride)
                    .map(move |payload| Datagram {
                        from: meta.addr,
                        to: meta.dst_ip,
                        ecn: meta.ecn.map_or(0, |e| e as u8),
                        payload,
                    })
            })
    }
}

impl Default for RecvBuffers {
    fn default() -> Self {
        Self::new()
    }
}

/// One received datagram.
pub struct Datagram<'a> {
    /// Who sent it.
    pub from: SocketAddr,
    /// Which of our addresses it came to; ICE needs it.
    pub to: Option<IpAddr>,
    /// ECN bits of the outer header.
    pub ecn: u8,
    /// The payload.
    pub payload: &'a mut [u8],
}

/// A fixed array of I/O slices, filled from an iterator without allocating.
mod arrayvec_lite {
    use super::{BATCH_SIZE, IoSliceMut};

    pub(super) struct Slices<'a>([IoSliceMut<'a>; BATCH_SIZE]);

    impl<'a> FromIterator<IoSliceMut<'a>> for Slices<'a> {
        fn from_iter<T: IntoIterator<Item = IoSliceMut<'a>>>(iter: T) -> Self {
            let mut iter = iter.into_iter();
            Self(std::array::from_fn(|_| {
                iter.next().unwrap_or_else(|| IoSliceMut::new(&mut []))
            }))
        }
    }

    impl<'a> AsMut<[IoSliceMut<'a>]> for Slices<'a> {
        fn as_mut(&mut self) -> &mut [IoSliceMut<'a>] {
            &mut self.0
        }
    }
}

/// Both UDP sockets of the gateway.
pub struct Sockets {
    /// The IPv4 socket, if that family works here.
    pub v4: Option<UdpSocket>,
    /// The IPv6 socket, if that family works here.
    pub v6: Option<UdpSocket>,
}

impl Sockets {
    /// Binds both families; one may be missing.
    ///
    /// # Errors
    /// When neither family can be bound.
    pub fn bind(options: SocketOptions) -> io::Result<Self> {
        let v4 = UdpSocket::bind(Family::V4, options);
        let v6 = UdpSocket::bind(Family::V6, options);
        match (v4, v6) {
            (Err(error), Err(_)) => Err(error),
            (v4, v6) => {
                for (name, result) in [("IPv4", &v4), ("IPv6", &v6)] {
                    if let Err(error) = result {
                        tracing::warn!("No {name} socket, continuing without: {error}");
                    }
                }
                Ok(Self {
                    v4: v4.ok(),
                    v6: v6.ok(),
                })
            }
        }
    }

    /// The socket that reaches `destination`.
    pub fn for_destination(&self, destination: SocketAddr) -> Option<&UdpSocket> {
        match destination {
            SocketAddr::V4(_) => self.v4.as_ref(),
            SocketAddr::V6(_) => self.v6.as_ref(),
        }
    }

    /// Sends on the socket of the destination's family; see [`UdpSocket::send`].
    ///
    /// # Errors
    /// As [`UdpSocket::send`], and when the family is missing.
    pub fn send(
        &self,
        source: Option<IpAddr>,
        destination: SocketAddr,
        ecn: u8,
        payload: &[u8],
        segment: Option<usize>,
    ) -> io::Result<()> {
        self.for_destination(destination)
            .ok_or(io::ErrorKind::AddrNotAvailable)?
            .send(source, destination, ecn, payload, segment)
    }

    /// Every socket there is.
    pub fn iter(&self) -> impl Iterator<Item = &UdpSocket> {
        self.v4.iter().chain(self.v6.iter())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn recv_all(socket: &UdpSocket, want: usize) -> Vec<(SocketAddr, Vec<u8>)> {
        let mut buffers = RecvBuffers::new();
        let mut got = Vec::new();
        for _ in 0..2000 {
            match socket.recv(&mut buffers) {
                Ok(n) => {
                    for d in buffers.datagrams(n) {
                        assert!(d.to.is_some(), "destination address must be known");
                        got.push((d.from, d.payload.to_vec()));
                    }
                }
                Err(e) => {
                    assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            if got.len() >= want {
                break;
            }
        }
        got
    }

    fn bind() -> UdpSocket {
        let options = SocketOptions {
            port: 0,
            ..SocketOptions::default()
        };
        UdpSocket::bind(Family::V4, options).unwrap()
    }

    fn loopback(socket: &UdpSocket) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), socket.local_addr().port())
    }

    #[test]
    fn a_train_arrives_as_its_datagrams_in_order() {
        let (a, b) = (bind(), bind());
        let train: Vec<u8> = (0..10u8).flat_map(|i| [i; 100]).chain([77; 30]).collect();
        a.send(None, loopback(&b), 0, &train, Some(100)).unwrap();
        let got = recv_all(&b, 11);
        assert_eq!(got.len(), 11);
        for (i, (from, payload)) in got.iter().take(10).enumerate() {
            assert_eq!(*from, loopback(&a));
            assert_eq!(*payload, vec![i as u8; 100]);
        }
        assert_eq!(got[10].1, vec![77; 30]);
    }

    #[test]
    fn a_taken_port_falls_back_to_another() {
        let first = bind();
        let options = SocketOptions {
            port: first.local_addr().port(),
            ..SocketOptions::default()
        };
        let second = UdpSocket::bind(Family::V4, options).unwrap();
        assert_ne!(first.local_addr().port(), second.local_addr().port());
    }

    #[test]
    fn ecn_bits_reach_the_receiver() {
        let (a, b) = (bind(), bind());
        a.send(None, loopback(&b), 0b10, b"x", None).unwrap();
        let mut buffers = RecvBuffers::new();
        for _ in 0..2000 {
            if let Ok(n) = b.recv(&mut buffers) {
                let ecn: Vec<u8> = buffers.datagrams(n).map(|d| d.ecn).collect();
                assert_eq!(ecn, [0b10]);
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("nothing arrived");
    }
}
