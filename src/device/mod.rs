//! The TUN device (data-path spec §7).
//!
//! Where the kernel can, packets come and go as super-packets that many segments fit into (TSO, USO),
//! each with a [`virtio`] header in front, and the device has a queue per worker. What the kernel cannot
//! is left out, down to a device that carries plain packets, one per call.

pub mod virtio;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::IoSlice;
use tun::AbstractDevice as _;

/// Largest inner packet, and the device's MTU (data-path spec §1.2).
pub const MTU: u16 = crate::packet::MAX_PACKET as u16;

const TUN_NODE: &std::ffi::CStr = c"/dev/net/tun";
/// Offloads (`TUNSETOFFLOAD`; the kernel's `include/uapi/linux/if_tun.h`).
const F_CSUM: libc::c_ulong = 0x01;
const F_TSO4: libc::c_ulong = 0x02;
const F_TSO6: libc::c_ulong = 0x04;
const F_TSO_ECN: libc::c_ulong = 0x08;
const F_USO4: libc::c_ulong = 0x20;
const F_USO6: libc::c_ulong = 0x40;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
/// For [`probe`]; the kernel puts a number in place of `%d`.
const PROBE_NAME: &str = "fzcheck%d";
/// Refuse a device that exists.
const IFF_TUN_EXCL: libc::c_int = 0x8000;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// `/dev/net/tun` does not exist.
    #[error(
        "/dev/net/tun is missing; add it to the container: devices: [\"/dev/net/tun:/dev/net/tun\"]"
    )]
    NoDeviceNode,
    /// The process may not make network devices.
    #[error(
        "not allowed to make the TUN device; add the capability: cap_add: [\"NET_ADMIN\"] \
         (and the device: devices: [\"/dev/net/tun:/dev/net/tun\"])"
    )]
    NotPermitted,
    /// Another process holds the device of that name.
    #[error("the TUN device {0} is in use by another process")]
    Busy(String),
    /// Anything else.
    #[error("cannot make the TUN device: {0}")]
    Other(String),
}

impl DeviceError {
    fn from_io(error: &io::Error, name: &str) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoDeviceNode,
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted,
            Some(libc::EBUSY) => Self::Busy(name.to_owned()),
            _ => Self::Other(error.to_string()),
        }
    }

    fn from_tun(error: tun::Error, name: &str) -> Self {
        match &error {
            tun::Error::Io(io) => Self::from_io(io, name),
            _ => Self::Other(error.to_string()),
        }
    }
}

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Queues, one per worker; at least one.
    pub queues: usize,
    /// Whether TCP super-packets are wanted.
    pub tso: bool,
    /// Whether UDP super-packets are wanted.
    pub uso: bool,
}

/// What the kernel does for us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Each packet has a [`virtio`] header, and its checksum may be left to us.
    pub header: bool,
    /// TCP super-packets, both families.
    pub tso: bool,
    /// UDP super-packets, both families (Linux 6.2 and newer).
    pub uso: bool,
}

/// Descriptors of `/dev/net/tun` for a user who may not open it, opened by one who may. Each makes one
/// queue.
#[derive(Debug, Default)]
pub struct Nodes(Mutex<Vec<OwnedFd>>);

impl Nodes {
    /// Opens so many; fewer, or none, where that cannot be done.
    pub fn open(count: usize) -> Self {
        Self(Mutex::new(
            (0..count).map_while(|_| open_node().ok()).collect(),
        ))
    }

    /// Lets go of them if they can be opened anew at any time.
    pub fn let_go_if_open(&self) {
        if open_node().is_ok() {
            self.kept().clear();
        }
    }

    /// Whether there are any.
    pub fn are_there(&self) -> bool {
        !self.kept().is_empty()
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Vec<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that was kept, or else a new one; and which of both it is.
    fn take(&self) -> io::Result<(OwnedFd, bool)> {
        match self.kept().pop() {
            Some(fd) => Ok((fd, true)),
            None => Ok((open_node()?, false)),
        }
    }
}

/// A TUN device whose queues never block.
pub struct Tun {
    queues: Vec<Queue>,
    name: String,
    offloads: Offloads,
    // Only for what the library can set; the descriptor is a queue's.
    _device: Option<tun::Device>,
}

/// One queue of the device. A packet goes in and comes out whole.
pub struct Queue {
    fd: OwnedFd,
    offloads: Offloads,
}

impl Tun {
    /// Makes the device, sets its MTU and brings it up. Addresses and routes come later, over
    /// netlink.
    ///
    /// # Errors
    /// See [`DeviceError`]; each names what is missing.
    pub fn create(name: &str, options: Options) -> Result<Self, DeviceError> {
        Self::create_from(&Nodes::default(), name, options)
    }

    /// As [`Self::create`], with `nodes` as far as there are any.
    ///
    /// # Errors
    /// As [`Self::create`]; what was taken of `nodes` is then there again, but for a device of several
    /// queues.
    pub fn create_from(nodes: &Nodes, name: &str, options: Options) -> Result<Self, DeviceError> {
        let error = |e: io::Error| DeviceError::from_io(&e, name);
        let (queues, name, offloads) = open(nodes, name, options).map_err(error)?;
        let device = Self::configure(&name, &queues[0])
            .map_err(|error| DeviceError::from_tun(error, &name))?;
        Ok(Self {
            queues,
            name,
            offloads,
            _device: Some(device),
        })
    }

    /// Something else in the place of a device, for benchmarks.
    #[doc(hidden)]
    pub fn stand_in(fd: OwnedFd, offloads: Offloads) -> Self {
        Self {
            queues: vec![Queue { fd, offloads }],
            name: String::new(),
            offloads,
            _device: None,
        }
    }

    fn configure(name: &str, queue: &Queue) -> Result<tun::Device, tun::Error> {
        let mut configuration = tun::Configuration::default();
        configuration
            .raw_fd(queue.fd.as_raw_fd())
            .close_fd_on_drop(false)
            .tun_name(name);
        let mut device = tun::create(&configuration)?;
        device.set_mtu(MTU)?;
        device.enabled(true)?;
        Ok(device)
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its queues: as many as were asked for, or one.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Gives up the queues beyond so many, of which one at least stays: what the kernel put into a queue
    /// that nobody reads would be lost.
    pub fn keep_queues(&mut self, count: usize) {
        self.queues.truncate(count.max(1));
    }

    /// What the kernel does for us.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }
}

impl Queue {
    /// What the kernel does for us.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Reads one packet, after its [`virtio`] header if there is one.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when none is there.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Writes one packet that lies in pieces, the first of which is the [`virtio`] header if the device
    /// has one.
    ///
    /// # Errors
    /// As the kernel reports them; a packet is either taken whole or not at all.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        rustix::io::writev(&self.fd, pieces)?;
        Ok(())
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens the queues with as much of what is asked for as the kernel has.
fn open(nodes: &Nodes, name: &str, options: Options) -> io::Result<(Vec<Queue>, String, Offloads)> {
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI;
    if options.tso || options.uso {
        flags |= libc::IFF_VNET_HDR;
    }
    if options.queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // Exclusive: to a device of several queues anybody could add one, and would get a part of its packets.
    let (first, name, flags) = match attach(nodes, name, flags | IFF_TUN_EXCL) {
        Ok((fd, name)) => (fd, name, flags),
        Err(error) => {
            let flags = match error.raw_os_error() {
                // There is one. If it was made to stay and nobody holds it, it has one queue for us.
                Some(libc::EBUSY) => flags & !libc::IFF_MULTI_QUEUE,
                // Sandboxes that imitate the kernel know the plain device only.
                Some(libc::EINVAL) => libc::IFF_TUN | libc::IFF_NO_PI,
                _ => return Err(error),
            };
            let is_there = error.raw_os_error() == Some(libc::EBUSY);
            let (fd, name) = attach(nodes, name, flags).map_err(|second| {
                // A device of several queues, which is not made to stay: a running gateway's.
                if is_there && second.raw_os_error() == Some(libc::EINVAL) {
                    error
                } else {
                    second
                }
            })?;
            (fd, name, flags)
        }
    };
    let offloads = if flags & libc::IFF_VNET_HDR == 0 {
        Offloads::default()
    } else {
        set_offloads(&first, options)
    };
    let mut fds = vec![first];
    if flags & libc::IFF_MULTI_QUEUE != 0 {
        while fds.len() < options.queues {
            match attach(nodes, &name, flags) {
                Ok((fd, _)) => fds.push(fd),
                Err(error) => {
                    tracing::warn!(%error, queues = fds.len(), "the device has fewer queues than workers");
                    break;
                }
            }
        }
    }
    let queues = fds.into_iter().map(|fd| Queue { fd, offloads }).collect();
    Ok((queues, name, offloads))
}

/// Opens one more queue of the device, which is made if it does not exist. Returns its name, too.
fn attach(nodes: &Nodes, name: &str, flags: libc::c_int) -> io::Result<(OwnedFd, String)> {
    if name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::Error::other(
            "the device's name is too long or not valid",
        ));
    }
    let (fd, kept) = nodes.take()?;
    // SAFETY: all bytes zero are a valid `ifreq`: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `request` is a complete `ifreq` with a terminated name, since the name is shorter than the
    // array, which was zero; the kernel reads and writes no more than that.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF as _, &raw mut request) } < 0 {
        let error = io::Error::last_os_error();
        if kept {
            // It has become no queue, and is as good as new.
            nodes.kept().push(fd);
        }
        return Err(error);
    }
    let name = request
        .ifr_name
        .iter()
        .take_while(|c| **c != 0)
        .map(|c| *c as u8)
        .collect();
    let name = String::from_utf8(name).map_err(io::Error::other)?;
    Ok((fd, name))
}

fn open_node() -> io::Result<OwnedFd> {
    // SAFETY: the path is a C string that lives as long as the program.
    let fd = unsafe {
        libc::open(
            TUN_NODE.as_ptr(),
            libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a device for a moment, under a name that the kernel chooses, to see what the kernel can do. It
/// goes with the descriptor, and is never up. One of `nodes` is used up for it if there are any.
///
/// # Errors
/// As [`Tun::create`].
pub fn probe(nodes: &Nodes, options: Options) -> Result<Offloads, DeviceError> {
    let options = Options {
        queues: 1,
        ..options
    };
    let (_, _, offloads) = open(nodes, PROBE_NAME, options)
        .map_err(|error| DeviceError::from_io(&error, PROBE_NAME))?;
    Ok(offloads)
}

/// Turns on as much as the kernel has. It is per device: further queues have it as well.
fn set_offloads(fd: &OwnedFd, options: Options) -> Offloads {
    let tso = F_TSO4 | F_TSO6;
    let mut wanted = F_CSUM;
    if options.tso {
        wanted |= tso | F_TSO_ECN;
    }
    if options.uso {
        wanted |= F_USO4 | F_USO6;
    }
    let fewer = [
        !0,
        !(F_USO4 | F_USO6),
        !(F_USO4 | F_USO6 | F_TSO_ECN),
        F_CSUM,
    ];
    let set = fewer.into_iter().map(|mask| wanted & mask).find(|flags| {
        // SAFETY: this request takes its argument by value; no memory is involved.
        unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD as _, *flags) >= 0 }
    });
    let has = |flag: libc::c_ulong| set.is_some_and(|set| set & flag != 0);
    Offloads {
        header: true,
        tso: has(F_TSO4),
        uso: has(F_USO4),
    }
}
