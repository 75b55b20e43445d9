//! Entry points of the fuzz targets in `fuzz/`. The committed corpus goes through them as a test.

#![allow(missing_docs)]

use std::net::IpAddr;

use super::translate::{self, Embedded};
use super::{MAX_PACKET, Meta, control, icmp, protocol};
use crate::fuzzing::Script;

/// An inner packet, as a client or a resource may send it: eighteen bytes that say what to make of
/// it, then the packet. Its lengths are put right, so that more than their check is reached.
pub fn packet(data: &[u8]) {
    let Some((choices, bytes)) = data.split_first_chunk::<18>() else {
        return;
    };
    let mut packet = bytes.to_vec();
    repair_length(&mut packet);
    let Ok(meta) = Meta::parse(&packet) else {
        return;
    };
    assert!(packet.len() <= MAX_PACKET);
    assert_eq!(usize::from(meta.len), packet.len());
    assert!(usize::from(meta.transport_offset) <= packet.len());
    answers(&packet, &meta);

    let port = u16::from_be_bytes([choices[0], choices[1]]);
    let address = address(&choices[2..], meta.is_ipv4());
    there_and_back(&packet, &meta, address, port);
    if let Some(embedded) = Embedded::of(&packet, &meta) {
        let before = checksum_holds(&packet, &meta);
        let mut error = packet.clone();
        if translate::error_about(&mut error, &meta, &embedded, address, port) {
            let after = Meta::parse(&error).expect("as long as before");
            assert_eq!(after.src, address);
            assert_eq!(checksum_holds(&error, &after), before);
            let about = Embedded::of(&error, &after).expect("still an error");
            assert_eq!((about.dst, about.src_port), (address, port));
        } else {
            assert_eq!(error, packet, "nothing half done");
        }
    }
}

/// Translates one way and back again.
fn there_and_back(packet: &[u8], meta: &Meta, address: IpAddr, port: u16) {
    let holds = checksum_holds(packet, meta);
    for outward in [true, false] {
        let mut copy = packet.to_vec();
        let (original, original_port) = if outward {
            (meta.dst, meta.src_port)
        } else {
            (meta.src, meta.dst_port)
        };
        let translate = if outward {
            translate::outbound
        } else {
            translate::inbound
        };
        if !translate(&mut copy, meta, address, port) {
            assert_eq!(copy, packet, "nothing half done");
            continue;
        }
        let there = Meta::parse(&copy).expect("as long as before");
        let (end, end_port) = if outward {
            (there.dst, there.src_port)
        } else {
            (there.src, there.dst_port)
        };
        assert_eq!((end, end_port), (address, port));
        assert_eq!(checksum_holds(&copy, &there), holds, "as true as before");
        assert!(translate(&mut copy, &there, original, original_port));
        assert_same_but_for_zeros(&copy, packet, meta);
    }
}

/// A sum of zero has two spellings, and there and back may lead from one to the other.
fn assert_same_but_for_zeros(copy: &[u8], packet: &[u8], meta: &Meta) {
    let (mut copy, mut packet) = (copy.to_vec(), packet.to_vec());
    let mut sums = vec![];
    if meta.is_ipv4() {
        sums.push(10);
    }
    let transport = usize::from(meta.transport_offset);
    sums.extend(transport_sum(meta.protocol).map(|at| transport + at));
    for at in sums {
        for bytes in [&mut copy, &mut packet] {
            if bytes[at..at + 2] == [0xFF, 0xFF] {
                bytes[at..at + 2].fill(0);
            }
        }
    }
    assert_eq!(copy, packet);
}

fn transport_sum(protocol: u8) -> Option<usize> {
    match protocol {
        protocol::TCP => Some(16),
        protocol::UDP => Some(6),
        protocol::ICMP | protocol::ICMPV6 => Some(2),
        _ => None,
    }
}

/// Whether all checksums of a packet are true, computed the slow way. A missing UDP checksum over
/// IPv4 counts as true.
fn checksum_holds(packet: &[u8], meta: &Meta) -> bool {
    let transport = usize::from(meta.transport_offset);
    if meta.is_ipv4() && ones_complement(&packet[..transport]) != 0xFFFF {
        return false;
    }
    let Some(at) = transport_sum(meta.protocol) else {
        return true;
    };
    let segment = &packet[transport..];
    if meta.is_ipv4() && meta.protocol == protocol::UDP && segment[at..at + 2] == [0, 0] {
        return true;
    }
    let mut covered = Vec::new();
    if meta.protocol != protocol::ICMP {
        for address in [meta.src, meta.dst] {
            match address {
                IpAddr::V4(a) => covered.extend_from_slice(&a.octets()),
                IpAddr::V6(a) => covered.extend_from_slice(&a.octets()),
            }
        }
        covered.extend_from_slice(&[0, meta.protocol]);
        covered.extend_from_slice(&(segment.len() as u16).to_be_bytes());
    }
    covered.extend_from_slice(segment);
    ones_complement(&covered) == 0xFFFF
}

/// Word by word, with the carry brought around at once (RFC 1071 §1).
fn ones_complement(data: &[u8]) -> u16 {
    let mut sum = 0u16;
    for pair in data.chunks(2) {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        let (next, carry) = sum.overflowing_add(word);
        sum = next + u16::from(carry);
    }
    sum
}

/// What the gateway may answer is valid, true, and for the sender alone.
fn answers(packet: &[u8], meta: &Meta) {
    type Make = fn(&[u8], &mut [u8]) -> Option<usize>;
    let too_big: Make = |packet, out| icmp::too_big(packet, MAX_PACKET as u16, out);
    let made: [Make; 3] = [icmp::prohibited, icmp::unreachable, too_big];
    for make in made {
        let mut out = [0; icmp::MAX_REPLY];
        let Some(len) = make(packet, &mut out) else {
            continue;
        };
        let answer = Meta::parse(&out[..len]).expect("an answer is a valid packet");
        assert_eq!((answer.src, answer.dst), (meta.dst, meta.src));
        assert!(answer.is_icmp_error() && !meta.is_icmp_error());
        assert!(checksum_holds(&out[..len], &answer));
    }
}

fn address(bytes: &[u8], ipv4: bool) -> IpAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[..16]);
    if ipv4 {
        IpAddr::from([octets[0], octets[1], octets[2], octets[3]])
    } else {
        IpAddr::from(octets)
    }
}

fn repair_length(packet: &mut Vec<u8>) {
    packet.truncate(MAX_PACKET + 1);
    let len = packet.len();
    match packet.first().map(|b| b >> 4) {
        Some(4) if len >= 4 => packet[2..4].copy_from_slice(&(len as u16).to_be_bytes()),
        Some(6) if len >= 40 => packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes()),
        _ => {}
    }
    // UDP has one more.
    if let Some(header) = packet.first().map(|b| usize::from(b & 0x0F) * 4)
        && packet[0] >> 4 == 4
        && len >= header + 8
        && packet.get(9) == Some(&protocol::UDP)
    {
        packet[header + 4..header + 6].copy_from_slice(&((len - header) as u16).to_be_bytes());
    }
    if len >= 48 && packet[0] >> 4 == 6 && packet[6] == protocol::UDP {
        packet[44..46].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    }
}

/// A control packet: its event and body.
pub fn control_packet(data: &[u8]) {
    let mut script = Script::new(data);
    let mut packet = control::goodbye().to_vec();
    packet[40] = script.byte();
    packet.extend(std::iter::from_fn(|| {
        (!script.is_empty()).then(|| script.byte())
    }));
    repair_length(&mut packet);
    let Ok(read) = control::parse(&packet) else {
        return;
    };
    match read {
        control::Control::AssignedIps {
            resource, domain, ..
        } => {
            // Whatever name can be asked with, the answer can carry, and it says the same.
            let Some(answer) = control::domain_status(resource, &domain, true) else {
                return;
            };
            let echoed = control::parse(&answer).expect("we wrote it");
            let expected = control::Control::DomainStatus {
                resource,
                domain,
                active: true,
            };
            assert_eq!(echoed, expected);
        }
        control::Control::Unknown(kind) => assert!(kind > 2),
        control::Control::DomainStatus { .. } | control::Control::Goodbye => {}
    }
}

#[cfg(test)]
mod tests {
    use crate::fuzzing::corpus;

    #[test]
    fn corpus_of_packets() {
        corpus("packet", 64, super::packet);
    }

    #[test]
    fn corpus_of_control_packets() {
        corpus("control_packet", 64, super::control_packet);
    }
}
