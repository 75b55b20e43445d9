//! ICMP errors that the gateway itself sends back into the tunnel (data-path spec §5.3).

use std::net::{IpAddr, Ipv4Addr};

use super::checksum::{self, Sum};
use super::{MAX_PACKET, Meta, protocol};

/// Hop limit of the replies (data-path spec §9).
const TTL: u8 = 20;
/// Bytes of the original's payload that an ICMPv4 error carries behind the header (RFC 792).
const V4_EMBEDDED_PAYLOAD: usize = 8;

/// Longest reply in bytes; a buffer of this size always suffices.
pub const MAX_REPLY: usize = MAX_PACKET;

#[derive(Clone, Copy)]
struct Codes {
    v4: (u8, u8),
    v6: (u8, u8),
}

/// Writes "communication administratively prohibited" in answer to `original` into `out`: type 3
/// code 13, or for IPv6 type 1 code 1. Clients read it as "the authorization is gone".
///
/// Returns the length of the reply; `None` if the original must not be answered (malformed,
/// fragment, ICMP error, or a source or destination that no reply can bear) or `out` is too short.
pub fn prohibited(original: &[u8], out: &mut [u8]) -> Option<usize> {
    let codes = Codes {
        v4: (3, 13),
        v6: (1, 1),
    };
    reply(original, codes, out)
}

/// Writes "network unreachable" (type 3 code 0) or for IPv6 "address unreachable" (type 1 code 3)
/// in answer to `original` into `out`. Otherwise as [`prohibited`].
pub fn unreachable(original: &[u8], out: &mut [u8]) -> Option<usize> {
    let codes = Codes {
        v4: (3, 0),
        v6: (1, 3),
    };
    reply(original, codes, out)
}

/// Writes "fragmentation needed" (type 3 code 4, RFC 1191 §4), or for IPv6 "packet too big" (type 2,
/// RFC 4443 §3.2), with the longest packet that goes through, in answer to `original` into `out`.
///
/// `original` may be longer than [`MAX_PACKET`]; it is not answered if its sender allows that it
/// be cut into fragments. Otherwise as [`prohibited`].
pub fn too_big(original: &[u8], mtu: u16, out: &mut [u8]) -> Option<usize> {
    const DONT_FRAGMENT: u8 = 0x40;

    let meta = Meta::parse_up_to(original, usize::from(u16::MAX)).ok()?;
    if meta.is_ipv4() && original.get(6)? & DONT_FRAGMENT == 0 {
        return None;
    }
    let codes = Codes {
        v4: (3, 4),
        v6: (2, 0),
    };
    answer(original, &meta, codes, u32::from(mtu), out)
}

fn reply(original: &[u8], codes: Codes, out: &mut [u8]) -> Option<usize> {
    let meta = Meta::parse(original).ok()?;
    answer(original, &meta, codes, 0, out)
}

/// `rest` is what the second word of the ICMP header holds.
fn answer(original: &[u8], meta: &Meta, codes: Codes, rest: u32, out: &mut [u8]) -> Option<usize> {
    // RFC 1122 §3.2.2 and RFC 4443 §2.4 (e): no errors about errors, nothing towards many hosts.
    if meta.is_icmp_error() || !is_single_host(meta.src) || !is_single_host(meta.dst) {
        return None;
    }
    match (meta.src, meta.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => reply_v4(original, (dst, src), codes.v4, rest, out),
        (IpAddr::V6(_), IpAddr::V6(_)) => reply_v6(original, meta, codes.v6, rest, out),
        _ => None,
    }
}

fn is_single_host(address: IpAddr) -> bool {
    !address.is_unspecified()
        && !address.is_multicast()
        && address != IpAddr::V4(Ipv4Addr::BROADCAST)
}

fn reply_v4(
    original: &[u8],
    (src, dst): (Ipv4Addr, Ipv4Addr),
    (kind, code): (u8, u8),
    rest: u32,
    out: &mut [u8],
) -> Option<usize> {
    let header_len = usize::from(original.first()? & 0x0F) * 4;
    let embedded = &original[..original.len().min(header_len + V4_EMBEDDED_PAYLOAD)];
    let len = 28 + embedded.len();
    let out = out.get_mut(..len)?;

    out[..28].fill(0);
    out[0] = 0x45;
    out[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    out[6] = 0x40; // Don't fragment: with it the identification may stay 0 (RFC 6864 §4.1).
    out[8] = TTL;
    out[9] = protocol::ICMP;
    out[12..16].copy_from_slice(&src.octets());
    out[16..20].copy_from_slice(&dst.octets());
    let sum = checksum::of(&out[..20]);
    out[10..12].copy_from_slice(&sum.to_be_bytes());

    out[20] = kind;
    out[21] = code;
    out[24..28].copy_from_slice(&rest.to_be_bytes());
    out[28..].copy_from_slice(embedded);
    let sum = checksum::of(&out[20..]);
    out[22..24].copy_from_slice(&sum.to_be_bytes());
    Some(len)
}

fn reply_v6(
    original: &[u8],
    meta: &Meta,
    (kind, code): (u8, u8),
    rest: u32,
    out: &mut [u8],
) -> Option<usize> {
    let embedded = &original[..original.len().min(MAX_REPLY - 48)];
    let len = 48 + embedded.len();
    let out = out.get_mut(..len)?;
    let payload_len = (len - 40) as u16;

    out[..48].fill(0);
    out[0] = 0x60;
    out[4..6].copy_from_slice(&payload_len.to_be_bytes());
    out[6] = protocol::ICMPV6;
    out[7] = TTL;
    out[8..24].copy_from_slice(&original[24..40]);
    out[24..40].copy_from_slice(&original[8..24]);

    out[40] = kind;
    out[41] = code;
    out[44..48].copy_from_slice(&rest.to_be_bytes());
    out[48..].copy_from_slice(embedded);
    let sum = Sum::new()
        .pseudo_header(meta.dst, meta.src, protocol::ICMPV6, payload_len)
        .bytes(&out[40..])
        .checksum();
    out[42..44].copy_from_slice(&sum.to_be_bytes());
    Some(len)
}

#[cfg(test)]
#[path = "icmp_tests.rs"]
mod tests;
