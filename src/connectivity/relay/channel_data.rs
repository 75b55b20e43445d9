//! Channel-data framing (RFC 8656 §12.4): two bytes channel number, two bytes length, payload.
//!
//! Written by hand because the data path must be able to frame and unframe without copying.

use std::ops::RangeInclusive;

/// Bytes that the framing adds in front of a payload.
pub const HEADER_LEN: usize = 4;

/// Channel numbers of RFC 8656 §12; the first byte of a datagram is then 64..=79.
pub const CHANNEL_NUMBERS: RangeInclusive<u16> = 0x4000..=0x4FFF;

/// Whether the first byte of a datagram says that it is channel data (RFC 8656 §12.4).
#[inline]
pub fn is_channel_data(datagram: &[u8]) -> bool {
    matches!(datagram.first(), Some(64..=79))
}

/// The header that turns a payload of `payload_len` bytes into channel data.
///
/// Returns `None` when the payload does not fit the 16-bit length field.
#[inline]
pub fn header(channel: u16, payload_len: usize) -> Option<[u8; HEADER_LEN]> {
    let [c0, c1] = channel.to_be_bytes();
    let [l0, l1] = u16::try_from(payload_len).ok()?.to_be_bytes();
    Some([c0, c1, l0, l1])
}

/// Splits channel data into channel number and payload.
///
/// Over UDP padding is optional (RFC 8656 §12.5), and what a server pads is not ours to choose, so
/// up to three trailing bytes are ignored. Anything else that does not match the length field is
/// not channel data: `None`.
#[inline]
pub fn parse(datagram: &[u8]) -> Option<(u16, &[u8])> {
    let (&[c0, c1, l0, l1], rest) = datagram.split_first_chunk::<HEADER_LEN>()?;
    let channel = u16::from_be_bytes([c0, c1]);
    if !CHANNEL_NUMBERS.contains(&channel) {
        return None;
    }
    let len = usize::from(u16::from_be_bytes([l0, l1]));
    let payload = rest.get(..len)?;
    let padding = rest.len() - len;
    (padding <= 3).then_some((channel, payload))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn framed(channel: u16, payload: &[u8]) -> Vec<u8> {
        let mut out = header(channel, payload.len()).unwrap().to_vec();
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn header_is_number_and_length_in_network_order() {
        assert_eq!(header(0x4001, 0x0102), Some([0x40, 0x01, 0x01, 0x02]));
    }

    #[test]
    fn payload_that_exceeds_the_length_field_has_no_header() {
        assert_eq!(header(0x4000, 65535), Some([0x40, 0x00, 0xFF, 0xFF]));
        assert_eq!(header(0x4000, 65536), None);
    }

    #[test]
    fn every_truncation_is_refused() {
        let full = framed(0x4ABC, &[7; 40]);
        assert_eq!(parse(&full), Some((0x4ABC, &[7u8; 40][..])));
        for len in 0..full.len() {
            assert_eq!(parse(&full[..len]), None, "{len} bytes");
        }
    }

    #[test]
    fn padding_to_four_bytes_is_tolerated_and_more_is_not() {
        let mut datagram = framed(0x4000, &[1, 2, 3, 4, 5]);
        for _ in 0..3 {
            datagram.push(0);
            assert_eq!(parse(&datagram), Some((0x4000, &[1, 2, 3, 4, 5][..])));
        }
        datagram.push(0);
        assert_eq!(parse(&datagram), None);
    }

    #[test]
    fn numbers_outside_of_the_channel_range_are_refused() {
        assert_eq!(parse(&framed(0x3FFF, b"x")), None);
        assert_eq!(parse(&framed(0x5000, b"x")), None);
        assert!(parse(&framed(0x4000, b"x")).is_some());
        assert!(parse(&framed(0x4FFF, b"x")).is_some());
    }

    proptest! {
        #[test]
        fn what_is_framed_is_unframed(channel in CHANNEL_NUMBERS, payload: Vec<u8>) {
            let datagram = framed(channel, &payload);
            prop_assert!(is_channel_data(&datagram));
            prop_assert_eq!(parse(&datagram), Some((channel, &payload[..])));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            if let Some((channel, payload)) = parse(&bytes) {
                prop_assert!(is_channel_data(&bytes));
                prop_assert_eq!(&framed(channel, payload)[..], &bytes[..HEADER_LEN + payload.len()]);
            }
        }
    }
}
