//! Inner IP packets: addresses, and the in-tunnel control protocol (data-path spec §6.1).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPv6 next header of control packets.
const CONTROL_PROTOCOL: u8 = 0xFF;
const IPV6_HEADER: usize = 40;
const CONTROL_HEADER: usize = 8;

/// Event type "assigned IPs", client to gateway.
pub const EVENT_ASSIGNED_IPS: u8 = 0;
/// Event type "domain status", gateway to client.
pub const EVENT_DOMAIN_STATUS: u8 = 1;
/// Event type "goodbye", both ways.
pub const EVENT_GOODBYE: u8 = 2;

/// Destination of an IP packet; `None` if it is too short to have one.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 16, 24)
}

/// Source of an IP packet.
pub fn source(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 12, 8)
}

fn address(packet: &[u8], v4_at: usize, v6_at: usize) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let bytes: [u8; 4] = packet[v4_at..v4_at + 4].try_into().ok()?;
            Some(Ipv4Addr::from(bytes).into())
        }
        6 if packet.len() >= IPV6_HEADER => {
            let bytes: [u8; 16] = packet[v6_at..v6_at + 16].try_into().ok()?;
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// Whether `packet` is the ICMP error a gateway sends for denied traffic: v4 type 3 code 13, v6
/// type 1 code 1 (data-path spec §5.3).
pub fn is_icmp_prohibited(packet: &[u8]) -> bool {
    match packet.first().map(|b| b >> 4) {
        Some(4) => {
            let header = usize::from(packet[0] & 0x0F) * 4;
            packet.get(9) == Some(&1) && packet.get(header..header + 2) == Some(&[3, 13])
        }
        Some(6) => packet.get(6) == Some(&58) && packet.get(40..42) == Some(&[1, 1]),
        _ => false,
    }
}

/// A control packet taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Control<'a> {
    /// Event type.
    pub event: u8,
    /// JSON, or empty.
    pub body: &'a [u8],
}

/// Recognises a control packet: IPv6 between unspecified addresses with next header 0xFF.
pub fn parse_control(packet: &[u8]) -> Option<Control<'_>> {
    if packet.len() < IPV6_HEADER + CONTROL_HEADER
        || packet[0] >> 4 != 6
        || packet[6] != CONTROL_PROTOCOL
        || packet[8..IPV6_HEADER].iter().any(|b| *b != 0)
    {
        return None;
    }
    Some(Control {
        event: packet[IPV6_HEADER],
        body: &packet[IPV6_HEADER + CONTROL_HEADER..],
    })
}

/// Builds a control packet.
pub fn control(event: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; IPV6_HEADER + CONTROL_HEADER];
    packet[0] = 0x60;
    let payload = u16::try_from(CONTROL_HEADER + body.len()).unwrap_or(u16::MAX);
    packet[4..6].copy_from_slice(&payload.to_be_bytes());
    packet[6] = CONTROL_PROTOCOL;
    packet[IPV6_HEADER] = event;
    packet.extend_from_slice(body);
    packet
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn control_packets_survive_a_round_trip() {
        let packet = control(EVENT_DOMAIN_STATUS, b"{}");
        assert_eq!(packet.len(), 50);
        assert_eq!(
            parse_control(&packet).unwrap(),
            Control {
                event: 1,
                body: b"{}"
            }
        );
    }

    #[test]
    fn ordinary_packets_are_not_control_packets() {
        let mut packet = control(EVENT_GOODBYE, b"");
        packet[39] = 1;
        assert!(parse_control(&packet).is_none());
        let mut packet = control(EVENT_GOODBYE, b"");
        packet[6] = 17;
        assert!(parse_control(&packet).is_none());
        assert!(parse_control(&packet[..44]).is_none());
        assert!(parse_control(&[]).is_none());
    }

    #[test]
    fn addresses_of_both_families_and_of_rubbish() {
        let mut v4 = [0u8; 20];
        v4[0] = 0x45;
        v4[12..16].copy_from_slice(&[10, 0, 0, 1]);
        v4[16..20].copy_from_slice(&[10, 0, 0, 2]);
        assert_eq!(destination(&v4), Some("10.0.0.2".parse().unwrap()));
        assert_eq!(source(&v4), Some("10.0.0.1".parse().unwrap()));
        let v6 = control(0, b"");
        assert_eq!(destination(&v6), Some("::".parse().unwrap()));
        assert_eq!(destination(&v4[..19]), None);
        assert_eq!(destination(&[0x10; 64]), None);
    }

    #[test]
    fn administratively_prohibited_is_told_from_other_errors() {
        let mut v4 = vec![0u8; 28];
        v4[0] = 0x45;
        v4[9] = 1;
        v4[20] = 3;
        v4[21] = 13;
        assert!(is_icmp_prohibited(&v4));
        v4[21] = 0;
        assert!(!is_icmp_prohibited(&v4));
        let mut v6 = vec![0u8; 48];
        v6[0] = 0x60;
        v6[6] = 58;
        v6[40] = 1;
        v6[41] = 1;
        assert!(is_icmp_prohibited(&v6));
        assert!(!is_icmp_prohibited(&v6[..41]));
    }
}
