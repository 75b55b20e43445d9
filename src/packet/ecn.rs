//! Explicit congestion notification across the tunnel (data-path spec §7.5, RFC 6040).

use super::checksum;

/// Not ECN-capable.
pub const NOT_ECT: u8 = 0b00;
/// ECN-capable transport, codepoint 1.
pub const ECT_1: u8 = 0b01;
/// ECN-capable transport, codepoint 0.
pub const ECT_0: u8 = 0b10;
/// Congestion experienced.
pub const CE: u8 = 0b11;

/// The ECN field of a packet, to be copied to the outer header; [`NOT_ECT`] if it is not IP.
#[inline]
pub fn of(packet: &[u8]) -> u8 {
    match packet {
        [version, tos, ..] if version >> 4 == 4 => tos & CE,
        [version, class, ..] if version >> 4 == 6 => (class >> 4) & CE,
        _ => NOT_ECT,
    }
}

/// Carries congestion that was met outside the tunnel over to the inner packet: ECT(0) or ECT(1)
/// inside with CE outside becomes CE. Every other combination leaves the packet as it is.
#[inline]
pub fn merge(packet: &mut [u8], outer: u8) {
    if outer & CE == CE && matches!(of(packet), ECT_0 | ECT_1) {
        mark(packet);
    }
}

#[cold]
fn mark(packet: &mut [u8]) {
    match packet {
        [version, class, ..] if *version >> 4 == 6 => *class |= CE << 4,
        [version, tos, _, _, _, _, _, _, _, _, sum_hi, sum_lo, ..] if *version >> 4 == 4 => {
            let old = [*version, *tos];
            *tos |= CE;
            let sum = u16::from_be_bytes([*sum_hi, *sum_lo]);
            let sum = checksum::update(sum, &old, &[*version, *tos]).to_be_bytes();
            (*sum_hi, *sum_lo) = (sum[0], sum[1]);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::packet::{Meta, samples};

    fn with_ecn(mut packet: Vec<u8>, ecn: u8) -> Vec<u8> {
        if packet[0] >> 4 == 4 {
            packet[1] = 0b1011_1000 | ecn;
            packet[10..12].fill(0);
            let sum = checksum::of(&packet[..20]).to_be_bytes();
            packet[10..12].copy_from_slice(&sum);
        } else {
            packet[0] = 0x6A;
            packet[1] = (ecn << 4) | 0b1100_0101;
        }
        packet
    }

    fn samples() -> [Vec<u8>; 2] {
        [
            samples::udp4([100, 64, 0, 1], [10, 0, 0, 1], 1, 2, b"hello"),
            samples::udp6("fd00::1", "fd00::2", 1, 2, b"hello"),
        ]
    }

    #[test]
    fn all_sixteen_combinations_follow_the_table() {
        for sample in samples() {
            for inner in 0..4 {
                for outer in 0..4 {
                    let before = with_ecn(sample.clone(), inner);
                    let mut after = before.clone();
                    merge(&mut after, outer);
                    let expected = if outer == CE && (inner == ECT_0 || inner == ECT_1) {
                        CE
                    } else {
                        inner
                    };
                    assert_eq!(of(&after), expected, "inner {inner:02b}, outer {outer:02b}");
                    // Nothing but the two bits and the checksum changed, and the checksum is right.
                    assert_eq!(after, with_ecn(before, expected));
                    assert!(Meta::parse(&after).is_ok());
                }
            }
        }
    }

    #[test]
    fn short_and_foreign_packets_are_left_alone() {
        for sample in samples() {
            let sample = with_ecn(sample, ECT_0);
            for len in 0..sample.len() {
                let mut cut = sample[..len].to_vec();
                merge(&mut cut, CE);
                assert_eq!(cut.len(), len);
            }
        }
        let mut foreign = vec![0x50, 0x02, 0, 0];
        merge(&mut foreign, CE);
        assert_eq!(foreign, [0x50, 0x02, 0, 0]);
        assert_eq!(of(&[]), NOT_ECT);
        assert_eq!(of(&[0x45]), NOT_ECT);
    }
}
