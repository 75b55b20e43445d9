//! TURN client (RFC 8656) and the set of relays that the portal hands out.
//!
//! Sans-IO: [`Allocation`] is the client of one relay, [`RelaySet`] owns one per relay, decides
//! which of them to use and recognises their packets among everything that arrives on the UDP
//! sockets. After any `handle_*` call, drain `poll_transmit` and `poll_event` and ask
//! `poll_timeout` again.

use std::net::SocketAddr;

pub mod allocation;
mod candidates;
pub mod channel_data;
mod channels;
pub mod constants;
pub mod episode;
mod error;
pub mod set;
mod stun;
mod transactions;

#[cfg(test)]
mod allocation_tests;
#[cfg(any(test, fuzzing))]
pub(crate) mod double;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
#[cfg(test)]
mod set_tests;
#[cfg(test)]
mod span_tests;

pub use allocation::{Allocation, AllocationEvent};
pub(super) use candidates::is_valid_candidate;
pub use candidates::{CandidateKind, Gathered};
pub use error::RelayError;
pub use set::{Handled, RelaySet, RelaySetEvent};

/// A datagram for a relay. The source address is left to the kernel (data-path spec §1.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayTransmit {
    /// The relay's socket.
    pub dst: SocketAddr,
    /// The UDP payload.
    pub payload: Vec<u8>,
}

/// Why a relay asks to be woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RelayTimer {
    /// A request may have to be sent again, or has failed.
    Retransmit,
    /// A failed relay is tried again.
    Retry,
    /// The allocation is refreshed.
    Refresh,
    /// The allocation's lifetime ends.
    Expiry,
    /// BINDING to keep NAT bindings open.
    KeepAlive,
    /// A channel is refreshed or ends.
    Channel,
    /// A withdrawn relay goes out of service.
    Retirement,
}

/// How to reach a peer through a relay: channel data under this number to this socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChannelPath {
    /// Channel number.
    pub channel: u16,
    /// The relay's socket.
    pub relay: SocketAddr,
}

/// Channel data, unwrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decapsulated<'a> {
    /// The peer that sent it.
    pub peer: SocketAddr,
    /// Our relayed transport address that the peer sent it to.
    pub relayed: SocketAddr,
    /// What it sent.
    pub payload: &'a [u8],
}
