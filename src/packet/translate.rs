//! Replacing the address and the port of one end of a packet, in place, with its checksums
//! (data-path spec §6.5, §6.6; RFC 3022 §4, RFC 5508 §4).
//!
//! Checksums are updated, not computed anew, so that a packet damaged before it came here stays
//! recognizably damaged.

use std::net::IpAddr;

use super::meta::walk_extensions;
use super::{Meta, checksum, protocol};

/// Which end of a packet is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

impl End {
    /// Where the address is in a header of the family of `address`.
    fn address_at(self, address: IpAddr) -> usize {
        match (address, self) {
            (IpAddr::V4(_), End::Source) => 12,
            (IpAddr::V4(_), End::Destination) => 16,
            (IpAddr::V6(_), End::Source) => 8,
            (IpAddr::V6(_), End::Destination) => 24,
        }
    }
}

/// Sends a packet of a client on to `dst`, as if the client had used `src_port` (the identifier,
/// for an ICMP echo).
///
/// `meta` must have been parsed from this very packet. Returns `false`, and changes nothing, if
/// `dst` is of the other family or the protocol has no port to replace.
#[inline]
pub fn outbound(packet: &mut [u8], meta: &Meta, dst: IpAddr, src_port: u16) -> bool {
    replace(packet, meta, End::Destination, dst, src_port)
}

/// Makes a packet to a client come from `src` and go to `dst_port` (the identifier, for an ICMP
/// echo). Otherwise as [`outbound`].
#[inline]
pub fn inbound(packet: &mut [u8], meta: &Meta, src: IpAddr, dst_port: u16) -> bool {
    replace(packet, meta, End::Source, src, dst_port)
}

/// Replaces the address of one end and the port of the *other*: the client's end keeps its address
/// and may get another port, the resource's end is the reverse.
fn replace(packet: &mut [u8], meta: &Meta, end: End, address: IpAddr, port: u16) -> bool {
    let transport = usize::from(meta.transport_offset);
    let Some((port_at, sum_at)) = fields(meta.protocol, meta.is_icmp_echo(), end) else {
        return false;
    };
    // `Meta` vouches for the header; a slice of another packet is answered, not walked past.
    if address.is_ipv4() != meta.is_ipv4() || packet.len() < transport + sum_at + 2 {
        return false;
    }
    let mut changes = Changes::default();
    changes.address(packet, 0, end, address);
    changes.port(packet, transport + port_at, port);
    changes.settle_transport(packet, transport + sum_at, meta.protocol, address.is_ipv4());
    true
}

/// Where the client's port and the checksum are within the transport header.
fn fields(protocol: u8, echo: bool, end: End) -> Option<(usize, usize)> {
    let port = match end {
        End::Destination => 0,
        End::Source => 2,
    };
    match protocol {
        protocol::TCP => Some((port, 16)),
        protocol::UDP => Some((port, 6)),
        protocol::ICMP | protocol::ICMPV6 if echo => Some((4, 2)),
        _ => None,
    }
}

/// Bytes that were replaced, to be taken over into checksums.
#[derive(Default)]
struct Changes {
    /// Old and new address; only the first `addresses` bytes count.
    old: [u8; 18],
    new: [u8; 18],
    address_len: usize,
}

impl Changes {
    /// Replaces an address in the IP header at `header`, and repairs the header's own checksum.
    fn address(&mut self, packet: &mut [u8], header: usize, end: End, address: IpAddr) {
        let at = header + end.address_at(address);
        let mut put = |octets: &[u8]| {
            let len = octets.len();
            self.old[..len].copy_from_slice(&packet[at..at + len]);
            self.new[..len].copy_from_slice(octets);
            packet[at..at + len].copy_from_slice(octets);
            self.address_len = len;
        };
        match address {
            IpAddr::V4(a) => put(&a.octets()),
            IpAddr::V6(a) => put(&a.octets()),
        }
        if address.is_ipv4() {
            patch(packet, header + 10, &self.old[..4], &self.new[..4]);
        }
    }

    fn port(&mut self, packet: &mut [u8], at: usize, port: u16) {
        self.old[16..].copy_from_slice(&packet[at..at + 2]);
        self.new[16..].copy_from_slice(&port.to_be_bytes());
        packet[at..at + 2].copy_from_slice(&port.to_be_bytes());
    }

    /// Takes the changes over into the transport checksum at `at`.
    fn settle_transport(&self, packet: &mut [u8], at: usize, protocol: u8, ipv4: bool) {
        let before = u16::from_be_bytes([packet[at], packet[at + 1]]);
        // A UDP sender over IPv4 may leave the checksum out (RFC 768).
        if protocol == protocol::UDP && before == 0 && ipv4 {
            return;
        }
        let mut sum = checksum::update(before, &self.old[16..], &self.new[16..]);
        // ICMP for IPv4 alone has no pseudo-header.
        if protocol != protocol::ICMP {
            let len = self.address_len;
            sum = checksum::update(sum, &self.old[..len], &self.new[..len]);
        }
        if protocol == protocol::UDP && sum == 0 {
            sum = 0xFFFF;
        }
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Updates the checksum at `at` for bytes that were replaced elsewhere.
fn patch(packet: &mut [u8], at: usize, old: &[u8], new: &[u8]) {
    let before = u16::from_be_bytes([packet[at], packet[at + 1]]);
    let sum = checksum::update(before, old, new);
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// The packet that an ICMP error is about, as far as the error quotes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Embedded {
    /// Who sent it.
    pub src: IpAddr,
    /// Where it was going.
    pub dst: IpAddr,
    /// IP protocol number after any IPv6 extension headers.
    pub protocol: u8,
    /// Source port; the identifier of an ICMP echo request; otherwise 0.
    pub src_port: u16,
    /// Destination port; otherwise 0.
    pub dst_port: u16,
    /// Whether it is an ICMP echo request.
    pub is_echo_request: bool,
    /// Where it starts within the error.
    header: usize,
    /// Where its transport header starts within the error.
    transport: usize,
}

impl Embedded {
    /// Reads what `packet`, an ICMP error with the given facts, is about; `None` if it is no error
    /// or quotes less than addresses and ports.
    pub fn of(packet: &[u8], meta: &Meta) -> Option<Self> {
        if !meta.is_icmp_error() {
            return None;
        }
        let header = usize::from(meta.transport_offset) + 8;
        let quoted = packet.get(header..)?;
        let (src, dst, protocol, offset) = match quoted.first()? >> 4 {
            4 => {
                let fixed: &[u8; 20] = quoted.first_chunk()?;
                let len = usize::from(fixed[0] & 0x0F) * 4;
                // Later fragments have no ports.
                if len < 20 || u16::from_be_bytes([fixed[6], fixed[7]]) & 0x1FFF != 0 {
                    return None;
                }
                let (src, dst) = super::meta::v4_addresses(fixed);
                (IpAddr::from(src), IpAddr::from(dst), fixed[9], len)
            }
            6 => {
                let fixed: &[u8; 40] = quoted.first_chunk()?;
                let (src, dst) = super::meta::v6_addresses(fixed);
                let (protocol, offset, _) = walk_extensions(quoted, fixed[6]).ok()?;
                (IpAddr::from(src), IpAddr::from(dst), protocol, offset)
            }
            _ => return None,
        };
        let transport = quoted.get(offset..).unwrap_or_default();
        let mut embedded = Self {
            src,
            dst,
            protocol,
            src_port: 0,
            dst_port: 0,
            is_echo_request: false,
            header,
            transport: header + offset,
        };
        match protocol {
            protocol::TCP | protocol::UDP => {
                let ports: &[u8; 4] = transport.first_chunk()?;
                embedded.src_port = u16::from_be_bytes([ports[0], ports[1]]);
                embedded.dst_port = u16::from_be_bytes([ports[2], ports[3]]);
            }
            protocol::ICMP | protocol::ICMPV6 => {
                let fixed: &[u8; 8] = transport.first_chunk()?;
                let request = if protocol == protocol::ICMP { 8 } else { 128 };
                if fixed[0] == request {
                    embedded.is_echo_request = true;
                    embedded.src_port = u16::from_be_bytes([fixed[4], fixed[5]]);
                }
            }
            _ => {}
        }
        Some(embedded)
    }
}

/// Makes an ICMP error about a translated packet one about the packet as the client had sent it: it
/// comes from `proxy`, and what it quotes goes to `proxy` from `src_port`. All checksums are
/// updated, those of the quoted packet included, as far as they are quoted.
///
/// `meta` and `embedded` must have been read from this very packet. Returns `false`, and changes
/// nothing, if `proxy` is of another family or the quoted protocol has no port to replace.
pub fn error_about(
    packet: &mut [u8],
    meta: &Meta,
    embedded: &Embedded,
    proxy: IpAddr,
    src_port: u16,
) -> bool {
    let Some((port_at, inner_sum_at)) = fields(
        embedded.protocol,
        embedded.is_echo_request,
        End::Destination,
    ) else {
        return false;
    };
    if proxy.is_ipv4() != meta.is_ipv4() || proxy.is_ipv4() != embedded.dst.is_ipv4() {
        return false;
    }
    let icmp = usize::from(meta.transport_offset);
    let quote = embedded.header..packet.len();
    // What the error's own checksum covers, before; at most one packet long.
    let mut before = [0; super::MAX_PACKET];
    let Some(before) = before.get_mut(..quote.len()) else {
        return false;
    };
    before.copy_from_slice(&packet[quote.clone()]);

    let mut inner = Changes::default();
    inner.address(packet, embedded.header, End::Destination, proxy);
    inner.port(packet, embedded.transport + port_at, src_port);
    let inner_sum = embedded.transport + inner_sum_at;
    if packet.len() >= inner_sum + 2 {
        inner.settle_transport(packet, inner_sum, embedded.protocol, proxy.is_ipv4());
    }

    let mut outer = Changes::default();
    outer.address(packet, 0, End::Source, proxy);
    let sum = u16::from_be_bytes([packet[icmp + 2], packet[icmp + 3]]);
    // An odd last byte was not changed: all that was is in whole words.
    let even = before.len() & !1;
    let mut sum = checksum::update(
        sum,
        &before[..even],
        &packet[quote.start..quote.start + even],
    );
    if meta.protocol == protocol::ICMPV6 {
        let len = outer.address_len;
        sum = checksum::update(sum, &outer.old[..len], &outer.new[..len]);
    }
    packet[icmp + 2..icmp + 4].copy_from_slice(&sum.to_be_bytes());
    true
}

#[cfg(test)]
#[path = "translate_tests.rs"]
mod tests;
