//! The TUN device (data-path spec §7).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use tun::AbstractDevice as _;

/// Largest inner packet, and the device's MTU (data-path spec §1.2).
pub const MTU: u16 = crate::packet::MAX_PACKET as u16;

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
    fn from_tun(error: tun::Error, name: &str) -> Self {
        let tun::Error::Io(io) = &error else {
            return Self::Other(error.to_string());
        };
        match io.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoDeviceNode,
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted,
            Some(libc::EBUSY) => Self::Busy(name.to_owned()),
            _ => Self::Other(error.to_string()),
        }
    }
}

/// A TUN device that carries plain IP packets, one per read and write, without blocking.
pub struct Tun {
    device: tun::Device,
    name: String,
}

impl Tun {
    /// Makes the device, sets its MTU and brings it up. Addresses and routes come later, over
    /// netlink.
    ///
    /// # Errors
    /// See [`DeviceError`]; each names what is missing.
    pub fn create(name: &str) -> Result<Self, DeviceError> {
        let mut configuration = tun::Configuration::default();
        configuration.tun_name(name).mtu(MTU).up();
        let device = tun::create(&configuration).map_err(|e| DeviceError::from_tun(e, name))?;
        device
            .set_nonblock()
            .map_err(|e| DeviceError::Other(e.to_string()))?;
        let name = device
            .tun_name()
            .map_err(|e| DeviceError::from_tun(e, name))?;
        Ok(Self { device, name })
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads one packet.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when none is there.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.as_fd(), buffer)?)
    }

    /// Writes one packet.
    ///
    /// # Errors
    /// As the kernel reports them; a packet is either taken whole or not at all.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        rustix::io::write(self.as_fd(), packet)?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let fd = self.device.as_raw_fd();
        // SAFETY: the descriptor belongs to `self.device`, which outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}
