//! What the data path needs to know of a packet, read once.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{MAX_PACKET, protocol};

/// Why a packet is not worth looking at further (data-path spec §5.2). It is dropped without reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Malformed {
    /// Neither IPv4 nor IPv6, or empty.
    Version,
    /// Shorter than its headers say, or an IPv4 header length below 20 bytes.
    Truncated,
    /// Longer than the limit of the caller, normally [`MAX_PACKET`].
    TooLong,
    /// IPv4 total length or IPv6 payload length differs from the length of the slice.
    Length,
    /// A fragment; fragments hide ports and are never let through.
    Fragment,
    /// IPv4 options that cannot be walked.
    Options,
    /// An IPv4 source route or an IPv6 routing header with segments left. Such a packet goes on to
    /// another address than the one that is checked (RFC 7126 §4.3, RFC 5095).
    SourceRouted,
    /// More IPv6 extension headers than any sensible sender uses.
    ExtensionHeaders,
    /// TCP header shorter than 20 bytes or longer than the packet.
    TcpHeader,
    /// UDP length differs from the length of the IP payload.
    UdpLength,
    /// ICMP header shorter than 8 bytes.
    IcmpHeader,
    /// ICMPv4 in IPv6 or the reverse.
    IcmpFamily,
}

impl Malformed {
    /// A stable name for counters and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Malformed::Version => "malformed_version",
            Malformed::Truncated => "malformed_truncated",
            Malformed::TooLong => "malformed_too_long",
            Malformed::Length => "malformed_length",
            Malformed::Fragment => "malformed_fragment",
            Malformed::Options => "malformed_options",
            Malformed::SourceRouted => "malformed_source_routed",
            Malformed::ExtensionHeaders => "malformed_extension_headers",
            Malformed::TcpHeader => "malformed_tcp_header",
            Malformed::UdpLength => "malformed_udp_length",
            Malformed::IcmpHeader => "malformed_icmp_header",
            Malformed::IcmpFamily => "malformed_icmp_family",
        }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::error::Error for Malformed {}

/// Facts about one valid inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// TCP or UDP source port; the identifier of an ICMP echo; otherwise 0.
    pub src_port: u16,
    /// TCP or UDP destination port; the identifier of an ICMP echo; otherwise 0.
    pub dst_port: u16,
    /// Length of the packet in bytes.
    pub len: u16,
    /// Where the header named by [`Self::protocol`] starts, in bytes.
    pub transport_offset: u16,
    /// IP protocol number after any IPv6 extension headers.
    pub protocol: u8,
    /// Bytes behind the TCP or UDP header; 0 for other protocols.
    pub payload_len: u16,
    /// The flags of a TCP segment; none for other protocols.
    pub tcp_flags: TcpFlags,
    pub(super) flags: u8,
}

/// The flags of a TCP segment that begin and end connections (RFC 9293 §3.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpFlags(u8);

impl TcpFlags {
    const FIN: u8 = 1 << 0;
    const SYN: u8 = 1 << 1;
    const RST: u8 = 1 << 2;
    const ACK: u8 = 1 << 4;

    /// Those in a TCP header's 14th byte.
    #[inline]
    pub(super) fn of(byte: u8) -> Self {
        Self(byte)
    }

    /// Whether the sender asks for a new connection: SYN without ACK.
    #[inline]
    pub fn is_opening(self) -> bool {
        self.0 & (Self::SYN | Self::ACK) == Self::SYN
    }

    /// Whether the sender has nothing more to say: FIN.
    #[inline]
    pub fn is_closing(self) -> bool {
        self.0 & Self::FIN != 0
    }

    /// Whether the sender gives the connection up: RST.
    #[inline]
    pub fn is_reset(self) -> bool {
        self.0 & Self::RST != 0
    }
}

impl Meta {
    const ECHO_REQUEST: u8 = 1 << 0;
    const ECHO_REPLY: u8 = 1 << 1;
    const ICMP_ERROR: u8 = 1 << 2;
    const ICMP_ERROR_FOR_DST: u8 = 1 << 3;
    const ATOMIC_FRAGMENT: u8 = 1 << 4;
    /// The flags on which a verdict may depend; part of the flow key.
    pub(super) const VERDICT_FLAGS: u8 =
        Self::ECHO_REQUEST | Self::ECHO_REPLY | Self::ICMP_ERROR | Self::ICMP_ERROR_FOR_DST;

    /// Reads a packet of at most [`MAX_PACKET`] bytes.
    ///
    /// # Errors
    ///
    /// [`Malformed`] if the packet breaks one of the rules of data-path spec §5.2.
    #[inline]
    pub fn parse(packet: &[u8]) -> Result<Meta, Malformed> {
        Self::parse_up_to(packet, MAX_PACKET)
    }

    /// As [`Self::parse`] with another length limit, for the super-packets that segmentation
    /// offload hands over (their length fields cover the whole super-packet).
    ///
    /// # Errors
    ///
    /// As [`Self::parse`].
    #[inline]
    pub fn parse_up_to(packet: &[u8], limit: usize) -> Result<Meta, Malformed> {
        if packet.len() > limit.min(usize::from(u16::MAX)) {
            return Err(Malformed::TooLong);
        }
        match packet.first().map(|b| b >> 4) {
            Some(4) => parse_v4(packet),
            Some(6) => parse_v6(packet),
            _ => Err(Malformed::Version),
        }
    }

    /// Whether the packet is IPv4.
    #[inline]
    pub fn is_ipv4(&self) -> bool {
        self.dst.is_ipv4()
    }

    /// Whether this is an ICMP or ICMPv6 echo request.
    #[inline]
    pub fn is_icmp_echo_request(&self) -> bool {
        self.flags & Self::ECHO_REQUEST != 0
    }

    /// Whether this is an ICMP or ICMPv6 echo reply.
    #[inline]
    pub fn is_icmp_echo_reply(&self) -> bool {
        self.flags & Self::ECHO_REPLY != 0
    }

    /// Whether this is an ICMP or ICMPv6 echo request or reply.
    #[inline]
    pub fn is_icmp_echo(&self) -> bool {
        self.flags & (Self::ECHO_REQUEST | Self::ECHO_REPLY) != 0
    }

    /// Whether this is an ICMP error message of any type: ICMPv4 types 3, 4, 5, 11 and 12 (RFC 1122
    /// §3.2.2), ICMPv6 types below 128 (RFC 4443 §2.1).
    #[inline]
    pub fn is_icmp_error(&self) -> bool {
        self.flags & Self::ICMP_ERROR != 0
    }

    /// Whether this is an ICMP error that the receiver can act on: unreachable, too big or time
    /// exceeded, about a packet that the receiver itself has sent.
    ///
    /// The embedded packet's source is compared with the outer destination, because anything else
    /// is noise at best and a blind attack on the receiver's connections at worst (RFC 5927 §4).
    #[inline]
    pub fn is_icmp_error_for_dst(&self) -> bool {
        self.flags & Self::ICMP_ERROR_FOR_DST != 0
    }

    /// Whether the packet carries an IPv6 fragment header though it is whole (RFC 6946). Real
    /// fragments are [`Malformed::Fragment`].
    #[inline]
    pub fn is_atomic_fragment(&self) -> bool {
        self.flags & Self::ATOMIC_FRAGMENT != 0
    }

    /// Whether the destination is a multicast group.
    #[inline]
    pub fn is_multicast(&self) -> bool {
        self.dst.is_multicast()
    }

    /// Whether this is an in-tunnel control packet (data-path spec §6.1).
    #[inline]
    pub fn is_control(&self) -> bool {
        self.protocol == protocol::CONTROL
            && self.src == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
            && self.dst == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    }

    #[inline]
    pub(super) fn verdict_flags(&self) -> u8 {
        self.flags & Self::VERDICT_FLAGS
    }
}

#[inline]
pub(super) fn v4_addresses(header: &[u8; 20]) -> (Ipv4Addr, Ipv4Addr) {
    (
        Ipv4Addr::new(header[12], header[13], header[14], header[15]),
        Ipv4Addr::new(header[16], header[17], header[18], header[19]),
    )
}

#[inline]
pub(super) fn v6_addresses(header: &[u8; 40]) -> (Ipv6Addr, Ipv6Addr) {
    let (mut src, mut dst) = ([0; 16], [0; 16]);
    src.copy_from_slice(&header[8..24]);
    dst.copy_from_slice(&header[24..40]);
    (src.into(), dst.into())
}

#[inline]
fn parse_v4(packet: &[u8]) -> Result<Meta, Malformed> {
    let header: &[u8; 20] = packet.first_chunk().ok_or(Malformed::Truncated)?;
    let header_len = usize::from(header[0] & 0x0F) * 4;
    if header_len < 20 || header_len > packet.len() {
        return Err(Malformed::Truncated);
    }
    if usize::from(u16::from_be_bytes([header[2], header[3]])) != packet.len() {
        return Err(Malformed::Length);
    }
    // "More fragments" or an offset; "don't fragment" and the reserved bit do not matter.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3FFF != 0 {
        return Err(Malformed::Fragment);
    }
    if header_len > 20 {
        check_v4_options(&packet[20..header_len])?;
    }
    let (src, dst) = v4_addresses(header);
    parse_transport(packet, src.into(), dst.into(), header[9], header_len, 0)
}

/// Walks IPv4 options and refuses source routes.
#[cold]
fn check_v4_options(mut options: &[u8]) -> Result<(), Malformed> {
    const END: u8 = 0;
    const NOP: u8 = 1;
    const LOOSE_SOURCE_ROUTE: u8 = 131;
    const STRICT_SOURCE_ROUTE: u8 = 137;

    while let Some(&kind) = options.first() {
        match kind {
            END => break,
            NOP => options = &options[1..],
            LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE => return Err(Malformed::SourceRouted),
            _ => {
                let len = usize::from(*options.get(1).ok_or(Malformed::Options)?);
                if len < 2 {
                    return Err(Malformed::Options);
                }
                options = options.get(len..).ok_or(Malformed::Options)?;
            }
        }
    }
    Ok(())
}

#[inline]
fn parse_v6(packet: &[u8]) -> Result<Meta, Malformed> {
    let header: &[u8; 40] = packet.first_chunk().ok_or(Malformed::Truncated)?;
    if usize::from(u16::from_be_bytes([header[4], header[5]])) + 40 != packet.len() {
        return Err(Malformed::Length);
    }
    let (src, dst) = v6_addresses(header);
    let (protocol, offset, flags) = match header[6] {
        next @ (protocol::HOP_BY_HOP
        | protocol::ROUTING
        | protocol::FRAGMENT
        | protocol::DESTINATION_OPTIONS) => walk_extensions(packet, next)?,
        next => (next, 40, 0),
    };
    parse_transport(packet, src.into(), dst.into(), protocol, offset, flags)
}

/// Follows IPv6 extension headers to the upper-layer header: its protocol, its offset, flags.
///
/// Authentication headers are not followed: what is behind them counts as "other protocol".
#[cold]
pub(super) fn walk_extensions(packet: &[u8], mut next: u8) -> Result<(u8, usize, u8), Malformed> {
    /// Each of the four kinds once, destination options twice (RFC 8200 §4.1), and some slack.
    const MAX_EXTENSIONS: usize = 8;

    let mut offset = 40;
    let mut flags = 0;
    for _ in 0..MAX_EXTENSIONS {
        let header = packet.get(offset..).unwrap_or_default();
        let header: &[u8; 8] = match next {
            protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::DESTINATION_OPTIONS => header.first_chunk().ok_or(Malformed::Truncated)?,
            _ => return Ok((next, offset, flags)),
        };
        let mut len = (usize::from(header[1]) + 1) * 8;
        match next {
            protocol::FRAGMENT => {
                // Offset and "more fragments"; the two bits between are reserved.
                if u16::from_be_bytes([header[2], header[3]]) & 0xFFF9 != 0 {
                    return Err(Malformed::Fragment);
                }
                flags |= Meta::ATOMIC_FRAGMENT;
                len = 8;
            }
            protocol::ROUTING if header[3] != 0 => return Err(Malformed::SourceRouted),
            _ => {}
        }
        offset += len;
        if offset > packet.len() {
            return Err(Malformed::Truncated);
        }
        next = header[0];
    }
    Err(Malformed::ExtensionHeaders)
}

#[inline]
fn parse_transport(
    packet: &[u8],
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    offset: usize,
    mut flags: u8,
) -> Result<Meta, Malformed> {
    let payload = packet.get(offset..).ok_or(Malformed::Truncated)?;
    let mut tcp_flags = TcpFlags::default();
    let mut payload_len = 0;
    let (src_port, dst_port) = match protocol {
        protocol::TCP => {
            let header: &[u8; 20] = payload.first_chunk().ok_or(Malformed::TcpHeader)?;
            let data_offset = usize::from(header[12] >> 4) * 4;
            if data_offset < 20 || data_offset > payload.len() {
                return Err(Malformed::TcpHeader);
            }
            tcp_flags = TcpFlags(header[13]);
            payload_len = payload.len() - data_offset;
            ports(header[0], header[1], header[2], header[3])
        }
        protocol::UDP => {
            let header: &[u8; 8] = payload.first_chunk().ok_or(Malformed::UdpLength)?;
            if usize::from(u16::from_be_bytes([header[4], header[5]])) != payload.len() {
                return Err(Malformed::UdpLength);
            }
            payload_len = payload.len() - 8;
            ports(header[0], header[1], header[2], header[3])
        }
        protocol::ICMP | protocol::ICMPV6 => {
            if (protocol == protocol::ICMP) != dst.is_ipv4() {
                return Err(Malformed::IcmpFamily);
            }
            let header: &[u8; 8] = payload.first_chunk().ok_or(Malformed::IcmpHeader)?;
            let class = icmp_class(protocol, header[0], &payload[8..], dst);
            flags |= class;
            if class & (Meta::ECHO_REQUEST | Meta::ECHO_REPLY) != 0 {
                ports(header[4], header[5], header[4], header[5])
            } else {
                (0, 0)
            }
        }
        _ => (0, 0),
    };
    Ok(Meta {
        src,
        dst,
        src_port,
        dst_port,
        // All are within the length, which `parse_up_to` holds below 2^16.
        len: packet.len() as u16,
        transport_offset: offset as u16,
        protocol,
        payload_len: payload_len as u16,
        tcp_flags,
        flags,
    })
}

#[inline]
fn ports(a: u8, b: u8, c: u8, d: u8) -> (u16, u16) {
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

/// The flags of an ICMP message by its type, and for errors by whom they are about.
fn icmp_class(protocol: u8, kind: u8, body: &[u8], dst: IpAddr) -> u8 {
    let (error, actionable) = match (protocol, kind) {
        (protocol::ICMP, 8) | (protocol::ICMPV6, 128) => return Meta::ECHO_REQUEST,
        (protocol::ICMP, 0) | (protocol::ICMPV6, 129) => return Meta::ECHO_REPLY,
        (protocol::ICMP, 3 | 11) | (protocol::ICMPV6, 1..=3) => (true, true),
        (protocol::ICMP, 4 | 5 | 12) | (protocol::ICMPV6, 0..=127) => (true, false),
        _ => (false, false),
    };
    let mut flags = 0;
    if error {
        flags |= Meta::ICMP_ERROR;
    }
    if actionable && embedded_source(body) == Some(dst) {
        flags |= Meta::ICMP_ERROR_FOR_DST;
    }
    flags
}

/// The source address of a packet that may be cut off after its header.
fn embedded_source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => {
            let header: &[u8; 20] = packet.first_chunk()?;
            let header_len = usize::from(header[0] & 0x0F) * 4;
            (20..=packet.len())
                .contains(&header_len)
                .then(|| v4_addresses(header).0.into())
        }
        6 => Some(v6_addresses(packet.first_chunk()?).0.into()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "meta_tests.rs"]
mod tests;
