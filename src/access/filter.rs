//! Protocol and port allow-lists (portal-channel spec §4.2).

use crate::packet::protocol;
use crate::portal::messages::Filter;

/// A compiled allow-list.
#[derive(Debug, Clone)]
pub(super) struct Filters {
    everything: bool,
    icmp: bool,
    tcp: Box<[(u16, u16)]>,
    udp: Box<[(u16, u16)]>,
}

impl Filters {
    pub(super) fn new(filters: &[Filter]) -> Self {
        let tcp = filters.iter().filter_map(|f| match *f {
            Filter::Tcp { start, end } => Some((start, end)),
            _ => None,
        });
        let udp = filters.iter().filter_map(|f| match *f {
            Filter::Udp { start, end } => Some((start, end)),
            _ => None,
        });
        Self {
            everything: filters.is_empty(),
            icmp: filters.contains(&Filter::Icmp),
            tcp: tcp.collect(),
            udp: udp.collect(),
        }
    }

    /// Whether a protocol and the port on the resource's side are permitted. Protocols that a
    /// list cannot name pass the empty list alone.
    pub(super) fn permits(&self, protocol: u8, port: u16) -> bool {
        let within = |ranges: &[(u16, u16)]| {
            ranges
                .iter()
                .any(|&(start, end)| start <= port && port <= end)
        };
        self.everything
            || match protocol {
                protocol::TCP => within(&self.tcp),
                protocol::UDP => within(&self.udp),
                protocol::ICMP | protocol::ICMPV6 => self.icmp,
                _ => false,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHERS: [u8; 4] = [47, 50, 132, 255];

    #[test]
    fn empty_list_permits_everything() {
        let filters = Filters::new(&[]);
        for protocol in 0..=255 {
            assert!(filters.permits(protocol, 0));
            assert!(filters.permits(protocol, u16::MAX));
        }
    }

    #[test]
    fn a_list_of_filters_that_cannot_be_read_permits_nothing() {
        let filters = Filters::new(&[Filter::Unreadable]);
        for protocol in 0..=255 {
            assert!(!filters.permits(protocol, 0), "{protocol}");
            assert!(!filters.permits(protocol, 443), "{protocol}");
        }
        let filters = Filters::new(&[Filter::Unreadable, Filter::Icmp]);
        assert!(filters.permits(1, 0) && !filters.permits(6, 443));
    }

    #[test]
    fn port_ranges_include_both_ends() {
        let filters = Filters::new(&[
            Filter::Tcp {
                start: 80,
                end: 443,
            },
            Filter::Udp { start: 53, end: 53 },
        ]);
        for (protocol, port, permitted) in [
            (6, 79, false),
            (6, 80, true),
            (6, 443, true),
            (6, 444, false),
            (6, 53, false),
            (17, 52, false),
            (17, 53, true),
            (17, 54, false),
            (17, 80, false),
            (1, 0, false),
            (58, 0, false),
        ] {
            assert_eq!(
                filters.permits(protocol, port),
                permitted,
                "{protocol} {port}"
            );
        }
    }

    #[test]
    fn whole_range_reaches_from_0_to_65535() {
        let filters = Filters::new(&[Filter::Tcp {
            start: 0,
            end: 65_535,
        }]);
        assert!(filters.permits(6, 0) && filters.permits(6, 65_535));
        assert!(!filters.permits(17, 0));
    }

    #[test]
    fn icmp_covers_both_families_and_nothing_else() {
        let filters = Filters::new(&[Filter::Icmp]);
        assert!(filters.permits(1, 7) && filters.permits(58, 9));
        assert!(!filters.permits(6, 7) && !filters.permits(17, 7));
    }

    #[test]
    fn any_list_denies_protocols_it_cannot_name() {
        let filters = Filters::new(&[
            Filter::Icmp,
            Filter::Tcp {
                start: 0,
                end: 65_535,
            },
            Filter::Udp {
                start: 0,
                end: 65_535,
            },
        ]);
        for protocol in OTHERS {
            assert!(!filters.permits(protocol, 0), "{protocol}");
        }
    }

    #[test]
    fn a_reversed_range_permits_nothing_and_still_is_a_list() {
        let filters = Filters::new(&[Filter::Tcp { start: 10, end: 5 }]);
        for port in [0, 5, 7, 10, 65_535] {
            assert!(!filters.permits(6, port));
        }
        assert!(!filters.permits(17, 7));
    }
}
