//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

use std::net::IpAddr;

/// Sum in progress. Pieces may be added in any order; only the last piece may have an odd length.
///
/// The words are added as they lie in memory. The sum of swapped words is the swapped sum (RFC 1071 §2),
/// so it is turned once, at the end.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum(u64);

impl Sum {
    /// An empty sum.
    pub const fn new() -> Sum {
        Sum(0)
    }

    /// Adds big-endian words; an odd last byte counts as the high byte of a word.
    #[inline]
    #[must_use]
    pub fn bytes(mut self, data: &[u8]) -> Sum {
        // A 64-bit word counts the same as its four quarters, because 2^16 is 1 modulo 2^16 - 1, and the
        // carry as much as a 1. Two sums, so that one carry does not wait for the other.
        let (blocks, rest) = data.as_chunks::<32>();
        let mut other = Sum::new();
        for block in blocks {
            let (words, _) = block.as_chunks::<8>();
            self = self.add(u64::from_ne_bytes(words[0]));
            other = other.add(u64::from_ne_bytes(words[1]));
            self = self.add(u64::from_ne_bytes(words[2]));
            other = other.add(u64::from_ne_bytes(words[3]));
        }
        self = self.add(other.0);
        let (pairs, odd) = rest.as_chunks::<2>();
        for pair in pairs {
            self = self.add(u64::from(u16::from_ne_bytes(*pair)));
        }
        if let [last] = odd {
            self = self.add(u64::from(u16::from_ne_bytes([*last, 0])));
        }
        self
    }

    #[inline]
    fn add(self, word: u64) -> Sum {
        let (sum, carry) = self.0.overflowing_add(word);
        Sum(sum + u64::from(carry))
    }

    /// Adds one word.
    #[inline]
    #[must_use]
    pub fn word(self, word: u16) -> Sum {
        self.add(u64::from(word.to_be()))
    }

    /// Adds an address.
    #[inline]
    #[must_use]
    pub fn address(self, address: IpAddr) -> Sum {
        match address {
            IpAddr::V4(a) => self.bytes(&a.octets()),
            IpAddr::V6(a) => self.bytes(&a.octets()),
        }
    }

    /// Adds the pseudo-header of TCP, UDP and ICMPv6 (RFC 9293 §3.1, RFC 8200 §8.1); `len` is the
    /// length of transport header and payload in bytes.
    #[inline]
    #[must_use]
    pub fn pseudo_header(self, src: IpAddr, dst: IpAddr, protocol: u8, len: u16) -> Sum {
        self.address(src)
            .address(dst)
            .word(u16::from(protocol))
            .word(len)
    }

    /// The sum folded to 16 bits, not complemented: what a partial checksum field holds that
    /// hardware or the kernel is to complete.
    #[inline]
    pub fn folded(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xFFFF {
            sum = (sum & 0xFFFF) + (sum >> 16);
        }
        u16::from_be(sum as u16)
    }

    /// The checksum. A UDP sender writes 0xFFFF in place of 0 (RFC 768).
    #[inline]
    pub fn checksum(self) -> u16 {
        !self.folded()
    }
}

/// Checksum over `data`; 0 for data that includes a correct checksum.
#[inline]
pub fn of(data: &[u8]) -> u16 {
    Sum::new().bytes(data).checksum()
}

/// Checksum over a transport header and its payload with the pseudo-header in front.
#[inline]
pub fn of_transport(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    Sum::new()
        .pseudo_header(src, dst, protocol, segment.len() as u16)
        .bytes(segment)
        .checksum()
}

/// The checksum after `old` was replaced by `new` in the data it covers (RFC 1624 §3, equation 3).
/// Both must have the same, even length.
#[inline]
pub fn update(checksum: u16, old: &[u8], new: &[u8]) -> u16 {
    debug_assert!(old.len() == new.len() && old.len().is_multiple_of(2));
    let removed = !Sum::new().bytes(old).folded();
    !Sum::new().word(!checksum).word(removed).bytes(new).folded()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// Word by word, with the carry brought around at once.
    fn slow(data: &[u8]) -> u16 {
        let mut sum = 0u16;
        for pair in data.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            let (next, carry) = sum.overflowing_add(word);
            sum = next + u16::from(carry);
        }
        !sum
    }

    #[test]
    fn example_of_rfc_1071() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::new().bytes(&data).folded(), 0xddf2);
    }

    #[test]
    fn update_never_leaves_minus_zero_for_an_all_zero_change() {
        // The corner case that RFC 1624 was written for.
        assert_eq!(update(0xdd2f, &[0x55, 0x55], &[0x32, 0x85]), 0x0000);
    }

    proptest! {
        #[test]
        fn agrees_with_the_word_by_word_sum(data in prop::collection::vec(any::<u8>(), 0..1300)) {
            prop_assert_eq!(of(&data), slow(&data));
        }

        #[test]
        fn update_agrees_with_a_full_recalculation(
            mut data in prop::collection::vec(1u8.., 40..60),
            at in 0usize..8,
            new in any::<[u8; 4]>(),
        ) {
            let before = of(&data);
            let old: [u8; 4] = data[at * 2..at * 2 + 4].try_into().unwrap();
            data[at * 2..at * 2 + 4].copy_from_slice(&new);
            prop_assert_eq!(update(before, &old, &new), of(&data));
        }
    }
}
