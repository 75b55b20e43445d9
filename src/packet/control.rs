//! In-tunnel control packets (data-path spec §6.1): how a client announces the addresses it made
//! up for a domain, and how either side takes its leave.
//!
//! Delivery is unreliable and events are idempotent, so a packet that cannot be read costs nothing
//! but a counter.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{MAX_PACKET, Meta, protocol};
use crate::ids::ResourceId;

const IP_HEADER: usize = 40;
const HEADER: usize = 8;
/// Where the body starts.
const BODY: usize = IP_HEADER + HEADER;

const ASSIGNED_IPS: u8 = 0;
const DOMAIN_STATUS: u8 = 1;
const GOODBYE: u8 = 2;

/// A control packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Client to gateway: these addresses stand for this domain.
    AssignedIps {
        /// The DNS resource that the domain belongs to; to be echoed.
        resource: ResourceId,
        /// The domain, without trailing dot; to be echoed exactly.
        domain: String,
        /// Proxy addresses of either family. Unreadable entries are left out.
        proxy_ips: Vec<IpAddr>,
    },
    /// Gateway to client: whether the domain's translation is in place.
    DomainStatus {
        /// As in the announcement.
        resource: ResourceId,
        /// As in the announcement.
        domain: String,
        /// Every status but `"Active"` reads as inactive.
        active: bool,
    },
    /// The sender forgets the other side.
    Goodbye,
    /// An event type of a future version, to be ignored.
    Unknown(u8),
}

/// Why a packet is not a readable control packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Not a control packet at all.
    #[error("not a control packet")]
    NotControl,
    /// Shorter than the control header.
    #[error("control header is truncated")]
    Truncated,
    /// The JSON body of a known event cannot be read.
    #[error("control body is unreadable")]
    Body,
}

#[derive(Deserialize)]
struct AssignedIpsBody {
    resource: ResourceId,
    domain: String,
    #[serde(default)]
    proxy_ips: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct DomainStatusBody {
    resource: ResourceId,
    domain: String,
    #[serde(default)]
    status: serde_json::Value,
}

#[derive(Serialize)]
struct DomainStatusOut<'a> {
    resource: ResourceId,
    domain: &'a str,
    status: &'static str,
}

/// Reads a control packet.
///
/// # Errors
///
/// [`ControlError`]; never a panic.
pub fn parse(packet: &[u8]) -> Result<Control, ControlError> {
    let meta = Meta::parse(packet).map_err(|_| ControlError::NotControl)?;
    if !meta.is_control() {
        return Err(ControlError::NotControl);
    }
    let payload = packet
        .get(usize::from(meta.transport_offset)..)
        .unwrap_or_default();
    let (header, body) = payload
        .split_first_chunk::<HEADER>()
        .ok_or(ControlError::Truncated)?;
    // Bytes 1 to 7 are reserved and ignored.
    match header[0] {
        ASSIGNED_IPS => {
            let body: AssignedIpsBody =
                serde_json::from_slice(body).map_err(|_| ControlError::Body)?;
            Ok(Control::AssignedIps {
                resource: body.resource,
                domain: body.domain,
                proxy_ips: body
                    .proxy_ips
                    .iter()
                    .filter_map(|ip| ip.as_str()?.parse().ok())
                    .collect(),
            })
        }
        DOMAIN_STATUS => {
            let body: DomainStatusBody =
                serde_json::from_slice(body).map_err(|_| ControlError::Body)?;
            Ok(Control::DomainStatus {
                resource: body.resource,
                domain: body.domain,
                active: body.status.as_str() == Some("Active"),
            })
        }
        GOODBYE => Ok(Control::Goodbye),
        other => Ok(Control::Unknown(other)),
    }
}

/// A goodbye packet.
pub const fn goodbye() -> [u8; BODY] {
    let mut packet = [0; BODY];
    packet[0] = 0x60;
    packet[5] = HEADER as u8;
    packet[6] = protocol::CONTROL;
    packet[IP_HEADER] = GOODBYE;
    packet
}

/// A domain status packet; `None` if the domain is so long that the packet would exceed
/// [`MAX_PACKET`], which no valid domain (RFC 1035 §2.3.4: 255 bytes) does.
pub fn domain_status(resource: ResourceId, domain: &str, active: bool) -> Option<Vec<u8>> {
    let body = DomainStatusOut {
        resource,
        domain,
        status: if active { "Active" } else { "Inactive" },
    };
    let body = serde_json::to_vec(&body).ok()?;
    let mut packet = goodbye().to_vec();
    packet.extend_from_slice(&body);
    if packet.len() > MAX_PACKET {
        return None;
    }
    let payload_len = (HEADER + body.len()) as u16;
    packet[4..6].copy_from_slice(&payload_len.to_be_bytes());
    packet[IP_HEADER] = DOMAIN_STATUS;
    Some(packet)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::packet::samples::control as event;

    const RESOURCE: &str = "0a0a0a0a-1b1b-4c2c-8d3d-4e4e4e4e4e4e";

    fn resource() -> ResourceId {
        ResourceId(RESOURCE.parse().unwrap())
    }

    #[test]
    fn assigned_ips_of_both_families_are_read() {
        let body = format!(
            r#"{{"resource":"{RESOURCE}","domain":"db.corp.example","proxy_ips":["100.96.0.1","fd00:2021:1111:8000::1"]}}"#
        );
        assert_eq!(
            parse(&event(0, body.as_bytes())).unwrap(),
            Control::AssignedIps {
                resource: resource(),
                domain: "db.corp.example".into(),
                proxy_ips: vec![
                    "100.96.0.1".parse().unwrap(),
                    "fd00:2021:1111:8000::1".parse().unwrap()
                ],
            }
        );
    }

    #[test]
    fn unknown_members_and_unreadable_addresses_do_not_spoil_an_announcement() {
        let body = format!(
            r#"{{"resource":"{RESOURCE}","domain":"a","new":{{}},"proxy_ips":["x",7,"100.96.0.1"]}}"#
        );
        let Control::AssignedIps { proxy_ips, .. } = parse(&event(0, body.as_bytes())).unwrap()
        else {
            panic!("wrong event");
        };
        assert_eq!(proxy_ips, ["100.96.0.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn reserved_header_bytes_are_ignored() {
        let mut packet = event(2, b"");
        packet[41..48].fill(0xAA);
        assert_eq!(parse(&packet), Ok(Control::Goodbye));
    }

    #[test]
    fn unknown_types_are_told_apart_from_unreadable_bodies() {
        assert_eq!(parse(&event(77, b"\xFF\xFE")), Ok(Control::Unknown(77)));
        assert_eq!(parse(&event(0, b"{}")), Err(ControlError::Body));
        assert_eq!(parse(&event(1, b"")), Err(ControlError::Body));
        assert_eq!(parse(&event(0, b"\xFF")), Err(ControlError::Body));
    }

    #[test]
    fn ordinary_packets_are_not_control_packets() {
        let udp = crate::packet::samples::udp6("::", "::", 1, 2, b"");
        assert_eq!(parse(&udp), Err(ControlError::NotControl));
        let mut addressed = event(2, b"");
        addressed[23] = 1;
        assert_eq!(parse(&addressed), Err(ControlError::NotControl));
    }

    #[test]
    fn goodbye_is_the_empty_event_between_unspecified_addresses() {
        let packet = goodbye();
        assert_eq!(packet.as_slice(), event(2, b""));
        assert_eq!(parse(&packet), Ok(Control::Goodbye));
    }

    #[test]
    fn domain_status_has_the_documented_body_and_reads_back() {
        for (active, word) in [(true, "Active"), (false, "Inactive")] {
            let packet = domain_status(resource(), "db.corp.example", active).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&packet[48..]).unwrap();
            assert_eq!(
                body,
                serde_json::json!({"resource": RESOURCE, "domain": "db.corp.example", "status": word})
            );
            assert_eq!(
                parse(&packet).unwrap(),
                Control::DomainStatus {
                    resource: resource(),
                    domain: "db.corp.example".into(),
                    active,
                }
            );
        }
    }

    #[test]
    fn unknown_status_reads_as_inactive() {
        for status in [r#""Pending""#, "null", "3"] {
            let body = format!(r#"{{"resource":"{RESOURCE}","domain":"a","status":{status}}}"#);
            assert!(matches!(
                parse(&event(1, body.as_bytes())),
                Ok(Control::DomainStatus { active: false, .. })
            ));
        }
    }

    #[test]
    fn a_status_that_does_not_fit_is_not_made() {
        let around = domain_status(resource(), "", false).unwrap().len();
        let longest = "d".repeat(MAX_PACKET - around);
        assert_eq!(
            domain_status(resource(), &longest, false).unwrap().len(),
            MAX_PACKET
        );
        assert_eq!(domain_status(resource(), &(longest + "d"), false), None);
    }

    #[test]
    fn every_truncation_is_survived() {
        let body =
            format!(r#"{{"resource":"{RESOURCE}","domain":"a","proxy_ips":["100.96.0.1"]}}"#);
        for kind in 0..4 {
            let whole = event(kind, body.as_bytes());
            for len in 0..whole.len() {
                assert_eq!(parse(&whole[..len]), Err(ControlError::NotControl));
                // The same with a length field that admits to the loss.
                if len >= 40 {
                    let mut cut = whole[..len].to_vec();
                    cut[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
                    let parsed = parse(&cut);
                    match kind {
                        _ if len < 48 => assert_eq!(parsed, Err(ControlError::Truncated)),
                        0 | 1 => assert_eq!(parsed, Err(ControlError::Body)),
                        _ => assert!(parsed.is_ok()),
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(kind in 0u8..4, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&event(kind, &body));
        }

        #[test]
        fn any_domain_is_echoed_exactly(domain in "\\PC{0,60}", active: bool) {
            let packet = domain_status(resource(), &domain, active).unwrap();
            prop_assert_eq!(
                parse(&packet).unwrap(),
                Control::DomainStatus { resource: resource(), domain, active }
            );
        }
    }
}
