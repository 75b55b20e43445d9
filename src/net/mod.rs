//! UDP sockets with batched, segment-offloaded I/O (data-path spec §1.1).
//!
//! One socket per family and worker, bound to the same wildcard address and shared by all clients and
//! relays. The slow path sends on the first worker's sockets; only workers receive.

mod addresses;

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// Buffers that one receive can fill.
pub use quinn_udp::BATCH_SIZE;
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
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
    /// Whether to send trains of datagrams (`UDP_SEGMENT`) where the kernel can.
    pub gso: bool,
    /// Whether to receive them (`UDP_GRO`).
    pub gro: bool,
}

impl Default for SocketOptions {
    /// Port and sizes of data-path spec §1.1.
    fn default() -> Self {
        Self {
            port: constants::UDP_PORT,
            send_buffer: constants::UDP_SEND_BUFFER as usize,
            recv_buffer: constants::UDP_RECEIVE_BUFFER as usize,
            gso: true,
            gro: true,
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
    gso: bool,
    gro: bool,
}

impl UdpSocket {
    /// Binds the wildcard address of `family`.
    ///
    /// # Errors
    /// When the family is not available, or no port can be had.
    pub fn bind(family: Family, options: SocketOptions) -> io::Result<Self> {
        let (socket, sizes) = unbound(family, options)?;
        let preferred = SocketAddr::new(family.wildcard(), options.port);
        if let Err(error) = socket.bind(&preferred.into()) {
            if error.kind() != io::ErrorKind::AddrInUse {
                return Err(error);
            }
            socket.bind(&SocketAddr::new(family.wildcard(), 0).into())?;
        }
        Self::new(socket, sizes, options)
    }

    /// One more socket at the same address. The kernel gives each source to one of them.
    ///
    /// # Errors
    /// When the kernel has no `SO_REUSEPORT`, or no more sockets.
    pub fn bind_beside(&self, options: SocketOptions) -> io::Result<Self> {
        let family = match self.local {
            SocketAddr::V4(_) => Family::V4,
            SocketAddr::V6(_) => Family::V6,
        };
        // The first was bound without it: two gateways on a host must not share a port by mistake. It
        // stays on, which takes a program of the same user that asks for just this port.
        socket2::SockRef::from(&self.socket).set_reuse_port(true)?;
        let (socket, sizes) = unbound(family, options)?;
        socket.set_reuse_port(true)?;
        socket.bind(&self.local.into())?;
        Self::new(socket, sizes, options)
    }

    fn new(socket: Socket, sizes: (usize, usize), options: SocketOptions) -> io::Result<Self> {
        let socket: StdUdpSocket = socket.into();
        let state = UdpSocketState::new((&socket).into())?;
        let local = socket.local_addr()?;
        // Without it full packets of the tunnel do not pass a way of less than 1360 bytes. Peers take
        // no shorter ones: 1280 is the least that IPv6 inside may have.
        if let Err(error) = let_fragment(&socket, local) {
            tracing::debug!(%error, "datagrams cannot be fragmented");
        }
        // The library asks for times of arrival, which nobody here reads. With them its buffer is too
        // small for what the kernel tells of a train, and the ECN bits, told last, are cut off.
        set_option(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 0)?;
        let gro = options.gro && state.gro_segments() > 1;
        if !gro {
            // The library has turned it on; a kernel that does not know it has nothing to turn off.
            let _ = set_gro(&socket, false);
        }
        Ok(Self {
            gso: options.gso && state.max_gso_segments() > 1,
            gro,
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
        if self.gso {
            self.state.max_gso_segments()
        } else {
            1
        }
    }

    /// Whether the kernel hands over trains of datagrams (`UDP_GRO`).
    pub fn has_gro(&self) -> bool {
        self.gro
    }

    /// How many datagrams the kernel has dropped because this socket's buffer was full.
    ///
    /// # Errors
    /// When the kernel does not tell (before Linux 4.12).
    pub fn dropped(&self) -> io::Result<u32> {
        /// `SK_MEMINFO_DROPS` of the kernel's `include/uapi/linux/sock_diag.h`.
        const DROPS: usize = 8;
        const SO_MEMINFO: libc::c_int = 55;

        let mut values = [0u32; DROPS + 1];
        let mut len = size_of_val(&values) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes, which is the size of `values`, and the new
        // length; both live until it returns.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_MEMINFO,
                values.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(values[DROPS])
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
            // EMSGSIZE: the way there takes shorter ones only, and the kernel fragments no trains.
            Err(error)
                if segment.is_some()
                    && matches!(
                        error.raw_os_error(),
                        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)
                    ) =>
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

impl Family {
    fn wildcard(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// A socket with everything but an address, and the sizes of its buffers.
fn unbound(family: Family, options: SocketOptions) -> io::Result<(Socket, (usize, usize))> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
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
    Ok((socket, sizes))
}

fn set_gro(socket: &StdUdpSocket, on: bool) -> io::Result<()> {
    const UDP_GRO: libc::c_int = 104;

    set_option(socket, libc::SOL_UDP, UDP_GRO, libc::c_int::from(on))
}

/// Lets routers (IPv4) and this host (both families) fragment what is too long for the way; the
/// library, made for a protocol that looks for the longest datagram itself, has forbidden it.
fn let_fragment(socket: &StdUdpSocket, local: SocketAddr) -> io::Result<()> {
    if local.is_ipv4() {
        let (name, value) = (libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT);
        return set_option(socket, libc::IPPROTO_IP, name, value);
    }
    let (name, value) = (libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT);
    set_option(socket, libc::IPPROTO_IPV6, name, value)?;
    set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)
}

fn set_option(
    socket: &StdUdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as `value` has, while it lives.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
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

    /// Makes a buffer look as if datagrams of `stride` bytes each had come, for benchmarks. `fill`
    /// writes them, and says how many bytes they are.
    #[doc(hidden)]
    pub fn pretend(
        &mut self,
        buffer: usize,
        (from, to): (SocketAddr, IpAddr),
        stride: usize,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) {
        let storage = &mut self.storage[RECV_BUFFER * buffer..][..RECV_BUFFER];
        let meta = &mut self.meta[buffer];
        meta.len = fill(storage);
        (meta.addr, meta.dst_ip, meta.stride) = (from, Some(to), stride);
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

    /// A set for each worker, all at the same addresses; the first one is bound by the rules of
    /// [`Self::bind`]. Where the kernel gives fewer, there are fewer.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn bind_group(options: SocketOptions, count: usize) -> io::Result<Vec<Self>> {
        let mut group = vec![Self::bind(options)?];
        while group.len() < count {
            let beside = |socket: &Option<UdpSocket>| {
                socket
                    .as_ref()
                    .map(|socket| socket.bind_beside(options))
                    .transpose()
            };
            match (beside(&group[0].v4), beside(&group[0].v6)) {
                (Ok(v4), Ok(v6)) => group.push(Self { v4, v6 }),
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(%error, sockets = group.len(), "fewer sockets than workers");
                    break;
                }
            }
        }
        Ok(group)
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

    fn group(options: SocketOptions, count: usize) -> Vec<Sockets> {
        let options = SocketOptions { port: 0, ..options };
        Sockets::bind_group(options, count).unwrap()
    }

    fn v4(sockets: &Sockets) -> &UdpSocket {
        sockets.v4.as_ref().unwrap()
    }

    #[test]
    fn the_sockets_of_a_group_share_an_address_and_each_source_keeps_to_one() {
        let group = group(SocketOptions::default(), 3);
        assert_eq!(group.len(), 3);
        let to = loopback(v4(&group[0]));
        for sockets in &group {
            assert_eq!(loopback(v4(sockets)), to);
        }
        let senders: Vec<UdpSocket> = (0..64).map(|_| bind()).collect();
        for _ in 0..3 {
            for sender in &senders {
                sender.send(None, to, 0, b"x", None).unwrap();
            }
        }
        let mut sources = Vec::new();
        for sockets in &group {
            let got = recv_all(v4(sockets), 192);
            assert!(!got.is_empty(), "every worker has something to do");
            let mut own: Vec<u16> = got.iter().map(|(from, _)| from.port()).collect();
            own.sort_unstable();
            assert!(own.chunk_by(|a, b| a == b).all(|same| same.len() == 3));
            own.dedup();
            sources.extend(own);
        }
        assert_eq!(sources.len(), senders.len(), "no source is split");
    }

    #[test]
    fn a_group_keeps_its_port_to_itself() {
        let first = group(SocketOptions::default(), 2);
        let options = SocketOptions {
            port: loopback(v4(&first[0])).port(),
            ..SocketOptions::default()
        };
        let second = Sockets::bind_group(options, 2).unwrap();
        assert_ne!(loopback(v4(&second[0])), loopback(v4(&first[0])));
    }

    #[test]
    fn offloads_that_are_not_wanted_are_off() {
        let options = SocketOptions {
            gso: false,
            gro: false,
            ..SocketOptions::default()
        };
        let group = group(options, 1);
        let (off, on) = (v4(&group[0]), bind());
        assert_eq!((off.max_segments(), off.has_gro()), (1, false));
        assert!(on.max_segments() > 1 && on.has_gro(), "kernel of this host");
        // A train arrives in as many buffers as it has datagrams.
        let train = vec![7; 1000];
        on.send(None, loopback(off), 0, &train, Some(100)).unwrap();
        let mut buffers = RecvBuffers::new();
        let filled = (0..2000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            off.recv(&mut buffers).ok()
        });
        assert_eq!(filled, Some(10));
    }

    #[test]
    fn datagrams_that_found_no_room_are_counted() {
        let options = SocketOptions {
            port: 0,
            recv_buffer: BUFFER_FLOOR,
            ..SocketOptions::default()
        };
        let full = UdpSocket::bind(Family::V4, options).unwrap();
        assert_eq!(full.dropped().unwrap(), 0);
        let sender = bind();
        for _ in 0..1000 {
            sender
                .send(None, loopback(&full), 0, &[7; 1000], None)
                .unwrap();
        }
        assert!(full.dropped().unwrap() > 0);
    }

    /// ECN bits of what arrives, and how many buffers it took.
    fn ecn_received(socket: &UdpSocket, wanted: usize) -> (Vec<u8>, usize) {
        let mut buffers = RecvBuffers::new();
        let (mut ecn, mut filled) = (Vec::new(), 0);
        for _ in 0..2000 {
            if let Ok(n) = socket.recv(&mut buffers) {
                filled += n;
                ecn.extend(buffers.datagrams(n).map(|d| d.ecn));
            } else if ecn.len() < wanted {
                std::thread::sleep(Duration::from_millis(1));
            }
            if ecn.len() >= wanted {
                return (ecn, filled);
            }
        }
        panic!("only {} of {wanted} arrived", ecn.len());
    }

    #[test]
    fn ecn_bits_reach_the_receiver() {
        let (a, b) = (bind(), bind());
        a.send(None, loopback(&b), 0b10, b"x", None).unwrap();
        assert_eq!(ecn_received(&b, 1), (vec![0b10], 1));
    }

    #[test]
    fn ecn_bits_of_trains_reach_the_receiver() {
        for (family, ip) in [
            (Family::V4, IpAddr::from(Ipv4Addr::LOCALHOST)),
            (Family::V6, IpAddr::from(Ipv6Addr::LOCALHOST)),
        ] {
            let options = SocketOptions {
                port: 0,
                ..SocketOptions::default()
            };
            let Ok(a) = UdpSocket::bind(family, options) else {
                assert_eq!(family, Family::V6, "no IPv4");
                continue;
            };
            let b = UdpSocket::bind(family, options).unwrap();
            let to = SocketAddr::new(ip, b.local_addr().port());
            a.send(None, to, 0b11, &[0; 10 * 100], Some(100)).unwrap();
            let (ecn, filled) = ecn_received(&b, 10);
            assert_eq!(ecn, [0b11; 10], "{family:?}");
            if a.max_segments() > 1 && b.has_gro() {
                assert_eq!(filled, 1, "not a train");
            }
        }
    }
}
