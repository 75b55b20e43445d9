//! Packets as what they mean, so that the model need not read bytes.

use std::fmt;
use std::net::IpAddr;

use etherparse::PacketBuilder;

use crate::packet::samples::{icmp4, icmp6, ip4, ip6, udp4, udp6};

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Packet {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) body: Body,
    pub(super) payload: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Body {
    /// Flags are any of the letters S, A, F and R.
    Tcp {
        from: u16,
        to: u16,
        flags: &'static str,
    },
    /// `summed` is false for a checksum left out, which IPv4 allows.
    Udp {
        from: u16,
        to: u16,
        summed: bool,
    },
    Echo {
        id: u16,
        reply: bool,
    },
    /// Neither echo nor error.
    Icmp {
        kind: u8,
    },
    /// Quotes the first bytes of another packet.
    Error {
        kind: u8,
        about: Box<Packet>,
        quoted: usize,
    },
    Other {
        protocol: u8,
    },
}

impl Packet {
    pub(super) fn protocol(&self) -> u8 {
        match self.body {
            Body::Tcp { .. } => 6,
            Body::Udp { .. } => 17,
            Body::Other { protocol } => protocol,
            _ if self.src.is_ipv4() => 1,
            _ => 58,
        }
    }

    pub(super) fn has_flag(&self, flag: char) -> bool {
        matches!(self.body, Body::Tcp { flags, .. } if flags.contains(flag))
    }

    /// Whether it asks for a new TCP connection.
    pub(super) fn is_opening(&self) -> bool {
        self.has_flag('S') && !self.has_flag('A')
    }

    /// The same packet, had it been sent to `dst` from `port`.
    pub(super) fn sent_to(&self, dst: IpAddr, port: u16) -> Self {
        let mut packet = self.clone();
        packet.dst = dst;
        match &mut packet.body {
            Body::Tcp { from, .. } | Body::Udp { from, .. } => *from = port,
            Body::Echo { id, reply: false } => *id = port,
            _ => {}
        }
        packet
    }

    /// The same packet, had it been sent by `src` to `port`.
    pub(super) fn received_from(&self, src: IpAddr, port: u16) -> Self {
        let mut packet = self.clone();
        packet.src = src;
        match &mut packet.body {
            Body::Tcp { to, .. } | Body::Udp { to, .. } => *to = port,
            Body::Echo { id, reply: true } => *id = port,
            _ => {}
        }
        packet
    }

    /// What a host that gets the packet sends back.
    pub(super) fn answer(&self, flags: &'static str) -> Self {
        let body = match self.body.clone() {
            Body::Tcp { from, to, .. } => Body::Tcp {
                from: to,
                to: from,
                flags,
            },
            Body::Udp { from, to, summed } => Body::Udp {
                from: to,
                to: from,
                summed,
            },
            Body::Echo { id, reply } => Body::Echo { id, reply: !reply },
            Body::Icmp { kind } => Body::Icmp { kind: kind ^ 3 },
            other => other,
        };
        Self {
            src: self.dst,
            dst: self.src,
            body,
            payload: self.payload.clone(),
        }
    }

    /// Length of the IP header; there are no options.
    pub(super) fn header(&self) -> usize {
        if self.src.is_ipv4() { 20 } else { 40 }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let (src, dst, payload) = (self.src, self.dst, &self.payload);
        match &self.body {
            Body::Tcp { from, to, flags } => tcp(src, dst, *from, *to, flags, payload),
            Body::Udp { from, to, summed } => match (src, dst) {
                (IpAddr::V4(s), IpAddr::V4(d)) => {
                    let mut packet = udp4(s.octets(), d.octets(), *from, *to, payload);
                    if !summed {
                        packet[26..28].fill(0);
                    }
                    packet
                }
                _ => udp6(&src.to_string(), &dst.to_string(), *from, *to, payload),
            },
            Body::Echo { id, reply } => {
                let kind = match (src.is_ipv4(), reply) {
                    (true, false) => 8,
                    (true, true) => 0,
                    (false, false) => 128,
                    (false, true) => 129,
                };
                let [high, low] = id.to_be_bytes();
                icmp(src, dst, kind, [high, low, 0, 7], payload)
            }
            Body::Icmp { kind } => icmp(src, dst, *kind, [1, 2, 3, 4], payload),
            Body::Error {
                kind,
                about,
                quoted,
            } => {
                let about = about.bytes();
                let quoted = &about[..about.len().min(*quoted)];
                icmp(src, dst, *kind, [0, 0, 5, 0], quoted)
            }
            Body::Other { protocol } => match (src, dst) {
                (IpAddr::V4(s), IpAddr::V4(d)) => ip4(s.octets(), d.octets(), *protocol, payload),
                _ => ip6(&src.to_string(), &dst.to_string(), *protocol, payload),
            },
        }
    }

    /// A payload with which the checksum of this packet is 0 before it is written: the value that
    /// has two spellings.
    pub(super) fn vanishing(&self) -> Vec<u8> {
        let mut packet = self.clone();
        packet.payload = vec![0, 0];
        let at = self.header()
            + match self.body {
                Body::Tcp { .. } => 16,
                Body::Udp { .. } => 6,
                Body::Other { .. } => return Vec::new(),
                _ => 2,
            };
        packet.bytes()[at..at + 2].to_vec()
    }

    /// The sender's port or identifier, read from bytes that were built from this.
    pub(super) fn port_in(&self, bytes: &[u8]) -> u16 {
        let at = match self.body {
            Body::Tcp { .. } | Body::Udp { .. } => self.header(),
            _ => self.header() + 4,
        };
        u16::from_be_bytes([bytes[at], bytes[at + 1]])
    }
}

fn icmp(src: IpAddr, dst: IpAddr, kind: u8, rest: [u8; 4], body: &[u8]) -> Vec<u8> {
    match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => icmp4(s.octets(), d.octets(), kind, 0, rest, body),
        _ => icmp6(&src.to_string(), &dst.to_string(), kind, 0, rest, body),
    }
}

fn tcp(src: IpAddr, dst: IpAddr, from: u16, to: u16, flags: &str, data: &[u8]) -> Vec<u8> {
    let builder = match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => PacketBuilder::ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => PacketBuilder::ipv6(s.octets(), d.octets(), 64),
        _ => panic!("{src} and {dst} are of two families"),
    };
    let mut builder = builder.tcp(from, to, 1, 1000);
    for flag in flags.chars() {
        builder = match flag {
            'S' => builder.syn(),
            'A' => builder.ack(1),
            'F' => builder.fin(),
            'R' => builder.rst(),
            other => panic!("no such flag: {other}"),
        };
    }
    let mut packet = Vec::new();
    builder.write(&mut packet, data).unwrap();
    packet
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (src, dst) = (self.src, self.dst);
        match &self.body {
            Body::Tcp { from, to, flags } => {
                write!(f, "TCP[{flags}] {src} port {from} > {dst} port {to}")
            }
            Body::Udp { from, to, summed } => {
                let note = if *summed { "" } else { " without checksum" };
                write!(f, "UDP{note} {src} port {from} > {dst} port {to}")
            }
            Body::Echo { id, reply } => {
                let what = if *reply { "reply" } else { "request" };
                write!(f, "echo {what} {src} > {dst} id {id}")
            }
            Body::Icmp { kind } => write!(f, "ICMP type {kind} {src} > {dst}"),
            Body::Error {
                kind,
                about,
                quoted,
            } => write!(
                f,
                "ICMP error type {kind} {src} > {dst} quoting {quoted} bytes of ({about})"
            ),
            Body::Other { protocol } => write!(f, "protocol {protocol} {src} > {dst}"),
        }
    }
}
