//! Which ports of the gateway itself clients may reach, besides its DNS service.

use std::fmt;
use std::str::FromStr;

use super::filter::Filters;
use crate::portal::messages::Filter;

/// Ports of the gateway's tunnel addresses that the operator has opened to every client with any
/// access. None by default: whatever listens on the host is not the clients' business.
///
/// Written as a list such as `tcp/22, udp/5000-5010`, or `all`, which is what the stock gateway
/// does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPorts {
    /// `None` opens everything, whatever the protocol.
    listed: Option<Vec<Filter>>,
}

impl Default for OpenPorts {
    fn default() -> Self {
        Self::none()
    }
}

/// Why a text is no list of ports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a port such as tcp/22 or udp/5000-5010")]
pub struct NotAPort(pub String);

impl OpenPorts {
    /// No port.
    pub const fn none() -> Self {
        Self {
            listed: Some(Vec::new()),
        }
    }

    /// Compiled; `None` if there is no open port.
    pub(super) fn filters(&self) -> Option<Filters> {
        match self.listed.as_deref() {
            Some([]) => None,
            Some(listed) => Some(Filters::new(listed)),
            None => Some(Filters::new(&[])),
        }
    }
}

impl FromStr for OpenPorts {
    type Err = NotAPort;

    fn from_str(text: &str) -> Result<Self, NotAPort> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("all") {
            return Ok(Self { listed: None });
        }
        let entries = text.split(',').map(str::trim).filter(|e| !e.is_empty());
        let listed = entries
            .map(|entry| port(entry).ok_or_else(|| NotAPort(entry.to_owned())))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            listed: Some(listed),
        })
    }
}

fn port(entry: &str) -> Option<Filter> {
    let (protocol, range) = entry.split_once('/')?;
    let (start, end) = range.split_once('-').unwrap_or((range, range));
    let (start, end) = (start.parse().ok()?, end.parse().ok()?);
    if start == 0 || end < start {
        return None;
    }
    match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Some(Filter::Tcp { start, end }),
        "udp" => Some(Filter::Udp { start, end }),
        _ => None,
    }
}

impl fmt::Display for OpenPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(listed) = &self.listed else {
            return f.write_str("all");
        };
        let mut comma = "";
        for filter in listed {
            let (protocol, start, end) = match *filter {
                Filter::Tcp { start, end } => ("tcp", start, end),
                Filter::Udp { start, end } => ("udp", start, end),
                // Not made by `port`.
                Filter::Icmp | Filter::Unreadable => continue,
            };
            write!(f, "{comma}{protocol}/{start}")?;
            if end != start {
                write!(f, "-{end}")?;
            }
            comma = ", ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn lists_are_read_and_shown() {
        for (text, shown) in [
            ("", ""),
            ("all", "all"),
            ("ALL ", "all"),
            ("tcp/22", "tcp/22"),
            (" TCP/22,udp/5000-5010 ,", "tcp/22, udp/5000-5010"),
            ("tcp/1-65535", "tcp/1-65535"),
        ] {
            assert_eq!(text.parse::<OpenPorts>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_port_is_named() {
        for wrong in [
            "22",
            "tcp",
            "tcp/",
            "tcp/0",
            "tcp/65536",
            "icmp/1",
            "tcp/9-8",
            "tcp/1-2-3",
        ] {
            let text = format!("tcp/22, {wrong}");
            assert_eq!(text.parse::<OpenPorts>(), Err(NotAPort(wrong.to_owned())));
        }
    }

    #[test]
    fn only_listed_ports_are_open() {
        assert!(OpenPorts::none().filters().is_none());
        assert_eq!("".parse(), Ok(OpenPorts::none()));
        let some = "tcp/22".parse::<OpenPorts>().unwrap().filters().unwrap();
        assert!(some.permits(6, 22) && !some.permits(6, 23) && !some.permits(17, 22));
        assert!(!some.permits(47, 0));
        let all = "all".parse::<OpenPorts>().unwrap().filters().unwrap();
        assert!(all.permits(6, 1) && all.permits(47, 0));
    }
}
