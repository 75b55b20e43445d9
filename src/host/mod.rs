//! What the gateway needs from the host, and how it gets it: addresses, routes and policy rules
//! ([`network`]), masquerading ([`nft`]), socket buffer limits ([`buffers`]), and a report of what
//! is missing ([`preflight`]). [`inventory`] lists what there is.
//!
//! Everything goes over netlink or through `/proc`, `/sys` and `/dev`; no other program is ever
//! started, so that an image needs nothing but the gateway.

pub mod buffers;
pub mod constants;
pub mod inventory;
pub mod network;
pub mod nft;
pub mod preflight;
pub mod privileges;

/// An error number of a kernel message. One outside the kernel's range, which would be a defect of
/// the kernel, becomes an I/O error.
fn errno(number: i32) -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&std::io::Error::from_raw_os_error(number))
        .unwrap_or(rustix::io::Errno::IO)
}
