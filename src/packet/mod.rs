//! Reading and writing of inner IP packets: pure functions over byte slices.
//!
//! Everything here runs on bytes that a client, a resource or an attacker chose. Nothing panics,
//! whatever the bytes are, and what runs for every packet ([`Meta::parse`], [`FlowKey`], [`ecn`])
//! does not allocate.

pub mod checksum;
pub mod control;
pub mod ecn;
mod flow;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod icmp;
mod meta;
#[cfg(test)]
pub(crate) mod samples;
pub mod split;
pub mod translate;

pub use flow::{FlowHash, FlowKey};
pub use meta::{Malformed, Meta, TcpFlags};

/// Longest inner packet in bytes (data-path spec §5.2); also the MTU of the device.
pub const MAX_PACKET: usize = 1280;

/// IP protocol numbers (IANA "Protocol Numbers").
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// Reserved by IANA; marks in-tunnel control packets (data-path spec §6.1).
    pub const CONTROL: u8 = 0xFF;
}
