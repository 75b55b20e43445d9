//! Conversations, and how long they are remembered.

use std::fmt;
use std::net::IpAddr;

use super::packet::{Body, Packet};

/// Milliseconds since the start of the run. All are multiples of 100, the grain of the data path's
/// own clock.
pub(super) type Millis = u64;
/// When a grant ends; `None` is never.
pub(super) type Until = Option<Millis>;

/// A conversation, seen from one side of the translation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Talk {
    pub(super) protocol: u8,
    /// Pings have an identifier of their own, all other ICMP to one place is one conversation.
    pub(super) ping: bool,
    pub(super) port: u16,
    pub(super) remote: IpAddr,
    pub(super) remote_port: u16,
}

impl Talk {
    /// Of a packet that goes out.
    pub(super) fn sent(packet: &Packet) -> Self {
        let (port, remote_port, ping) = match packet.body {
            Body::Tcp { from, to, .. } | Body::Udp { from, to, .. } => (from, to, false),
            Body::Echo { id, reply: false } => (id, 0, true),
            _ => (0, 0, false),
        };
        Self {
            protocol: packet.protocol(),
            ping,
            port,
            remote: packet.dst,
            remote_port,
        }
    }

    /// Of a packet that comes in: the one that it answers.
    pub(super) fn received(packet: &Packet) -> Self {
        let (port, remote_port, ping) = match packet.body {
            Body::Tcp { from, to, .. } | Body::Udp { from, to, .. } => (to, from, false),
            Body::Echo { id, reply: true } => (id, 0, true),
            _ => (0, 0, false),
        };
        Self {
            protocol: packet.protocol(),
            ping,
            port,
            remote: packet.src,
            remote_port,
        }
    }

    pub(super) fn is_translatable(&self) -> bool {
        self.ping || self.protocol == 6 || self.protocol == 17
    }
}

#[derive(Debug)]
pub(super) struct Flow {
    /// As the client sees it.
    pub(super) inside: Talk,
    /// As the resource sees it.
    pub(super) outside: Talk,
    /// The name that the client's address stood for; empty without translation.
    pub(super) name: String,
    pub(super) began: Millis,
    pub(super) last_out: Millis,
    pub(super) last_in: Option<Millis>,
    pub(super) fin_out: bool,
    pub(super) fin_in: bool,
    pub(super) reset: bool,
}

impl Flow {
    pub(super) fn is_translated(&self) -> bool {
        !self.name.is_empty()
    }

    /// Why the flow has ended, if it has.
    pub(super) fn ended(&self, now: Millis) -> Option<&'static str> {
        let last = self.last_out.max(self.last_in.unwrap_or(0));
        let (since, seconds, why) = if self.reset || (self.fin_out && self.fin_in) {
            (last, 5, "closed")
        } else if self.last_in.is_none() {
            (self.last_out, 60, "unanswered")
        } else {
            match self.inside.protocol {
                6 => (last, 7440, "idle TCP"),
                1 | 17 | 58 => (last, 120, "idle UDP or ICMP"),
                _ => (last, 600, "idle, others"),
            }
        };
        (now >= since + seconds * 1000).then_some(why)
    }

    pub(super) fn is_live(&self, now: Millis) -> bool {
        self.ended(now).is_none()
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (inside, outside) = (&self.inside, &self.outside);
        write!(
            f,
            "flow of protocol {}{}: port {} to {} port {}",
            inside.protocol,
            if inside.ping { " (ping)" } else { "" },
            inside.port,
            inside.remote,
            inside.remote_port,
        )?;
        if self.is_translated() {
            write!(
                f,
                ", outside port {} to {} for {}",
                outside.port, outside.remote, self.name
            )?;
        }
        write!(f, "; began {}, sent {}", self.began, self.last_out)?;
        if let Some(at) = self.last_in {
            write!(f, ", answered {at}")?;
        }
        let signs = [
            (self.fin_out, "FIN out"),
            (self.fin_in, "FIN in"),
            (self.reset, "RST"),
        ];
        for (_, sign) in signs.iter().filter(|(seen, _)| *seen) {
            write!(f, ", {sign}")?;
        }
        Ok(())
    }
}
