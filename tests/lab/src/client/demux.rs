//! Telling datagrams apart by their bytes (data-path spec §1.3).

use std::net::SocketAddr;

/// The port every relay answers from; datagrams from other ports are never TURN.
pub const RELAY_PORT: u16 = 3478;
/// STUN magic cookie (RFC 8489 §5).
const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];

/// What the relay step makes of a datagram.
#[derive(Debug, PartialEq, Eq)]
pub enum RelayStep<'a> {
    /// Starts like a STUN message: for the allocation, if the sender is a relay of ours.
    Stun,
    /// Well-formed channel data.
    ChannelData {
        /// Channel number, 0x4000–0x4FFF.
        number: u16,
        /// What the peer sent.
        payload: &'a [u8],
    },
    /// Nothing for the relay step.
    Other,
}

/// First step: only datagrams from port 3478 take part.
pub fn relay_step(from: SocketAddr, datagram: &[u8]) -> RelayStep<'_> {
    if from.port() != RELAY_PORT {
        return RelayStep::Other;
    }
    match datagram.first() {
        Some(0..=3) => RelayStep::Stun,
        Some(64..=79) if datagram.len() >= 4 => {
            let number = u16::from_be_bytes([datagram[0], datagram[1]]);
            let length = u16::from_be_bytes([datagram[2], datagram[3]]);
            // Padding is not tolerated: the stock client's fast path requires the exact length.
            if usize::from(length) != datagram.len() - 4 {
                return RelayStep::Other;
            }
            RelayStep::ChannelData {
                number,
                payload: &datagram[4..],
            }
        }
        _ => RelayStep::Other,
    }
}

/// What a datagram between peers is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerStep {
    /// ICE connectivity check or its answer.
    Stun,
    /// WireGuard handshake initiation.
    Initiation,
    /// Response, cookie reply or data: addressed by the receiver index.
    Indexed {
        /// WireGuard message type, 2–4.
        kind: u8,
        /// Our session index.
        receiver: u32,
    },
    /// Neither.
    Unknown,
}

/// Second and third step.
pub fn peer_step(datagram: &[u8]) -> PeerStep {
    let len = datagram.len();
    if len >= 20
        && datagram[0] < 4
        && datagram[4..8] == MAGIC_COOKIE
        && usize::from(u16::from_be_bytes([datagram[2], datagram[3]])) == len - 20
        && len.is_multiple_of(4)
    {
        return PeerStep::Stun;
    }
    if len < 12 || datagram[1..4] != [0, 0, 0] {
        return PeerStep::Unknown;
    }
    let index_at = |at: usize| {
        u32::from_le_bytes([
            datagram[at],
            datagram[at + 1],
            datagram[at + 2],
            datagram[at + 3],
        ])
    };
    match (datagram[0], len) {
        (1, 148) => PeerStep::Initiation,
        (2, 92) => PeerStep::Indexed {
            kind: 2,
            receiver: index_at(8),
        },
        (3, 64) => PeerStep::Indexed {
            kind: 3,
            receiver: index_at(4),
        },
        (4, 32..) => PeerStep::Indexed {
            kind: 4,
            receiver: index_at(4),
        },
        _ => PeerStep::Unknown,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn relay() -> SocketAddr {
        "203.0.113.7:3478".parse().unwrap()
    }

    #[test]
    fn only_port_3478_is_considered_a_relay() {
        let stun = [0u8; 20];
        assert_eq!(relay_step(relay(), &stun), RelayStep::Stun);
        let elsewhere = "203.0.113.7:3479".parse().unwrap();
        assert_eq!(relay_step(elsewhere, &stun), RelayStep::Other);
    }

    #[test]
    fn channel_data_must_have_the_exact_length() {
        let exact = [0x40, 0x01, 0, 2, 9, 9];
        assert_eq!(
            relay_step(relay(), &exact),
            RelayStep::ChannelData {
                number: 0x4001,
                payload: &[9, 9]
            }
        );
        let padded = [0x40, 0x01, 0, 2, 9, 9, 0, 0];
        assert_eq!(relay_step(relay(), &padded), RelayStep::Other);
        assert_eq!(relay_step(relay(), &[0x40, 0x01]), RelayStep::Other);
        let above_range = [0x50, 0x01, 0, 0];
        assert_eq!(relay_step(relay(), &above_range), RelayStep::Other);
    }

    #[test]
    fn stun_and_wireguard_are_told_apart_by_the_cookie() {
        let mut binding = vec![0u8; 20];
        binding[1] = 1;
        binding[4..8].copy_from_slice(&MAGIC_COOKIE);
        assert_eq!(peer_step(&binding), PeerStep::Stun);
        binding[3] = 4;
        assert_eq!(peer_step(&binding), PeerStep::Unknown);

        let mut initiation = vec![0u8; 148];
        initiation[0] = 1;
        assert_eq!(peer_step(&initiation), PeerStep::Initiation);
        assert_eq!(peer_step(&initiation[..147]), PeerStep::Unknown);

        let mut data = vec![0u8; 32];
        data[0] = 4;
        data[4..8].copy_from_slice(&0x0102_0304u32.to_le_bytes());
        assert_eq!(
            peer_step(&data),
            PeerStep::Indexed {
                kind: 4,
                receiver: 0x0102_0304
            }
        );
        let mut response = vec![0u8; 92];
        response[0] = 2;
        response[8..12].copy_from_slice(&7u32.to_le_bytes());
        assert_eq!(
            peer_step(&response),
            PeerStep::Indexed {
                kind: 2,
                receiver: 7
            }
        );
    }

    #[test]
    fn no_input_panics() {
        for len in 0..200 {
            for first in [0u8, 1, 2, 3, 4, 64, 79, 80, 255] {
                let mut bytes = vec![0u8; len];
                if let Some(b) = bytes.first_mut() {
                    *b = first;
                }
                relay_step(relay(), &bytes);
                peer_step(&bytes);
            }
        }
    }
}
