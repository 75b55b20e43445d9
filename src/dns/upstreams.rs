//! Which of the site's name servers is asked first: the one that answers fastest over UDP, as
//! measured on real queries and, now and then, on one of our own (data-path spec §6.7).

use std::net::IpAddr;
use std::time::Duration;

/// Weight of a new measurement, as one part of this many.
const SMOOTHING: u32 = 4;
/// What a server that did not answer counts as; more than any answer may take.
const SILENT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Upstream {
    address: IpAddr,
    /// Smoothed; `None` until something is known.
    latency: Option<Duration>,
}

/// The name servers of the site, with what is known of their speed.
#[derive(Debug, Default)]
pub(super) struct Upstreams {
    list: Vec<Upstream>,
}

impl Upstreams {
    /// Takes a list over, keeping what is known of servers that were on the former one.
    pub(super) fn set(&mut self, addresses: &[IpAddr]) {
        let mut list: Vec<Upstream> = Vec::with_capacity(addresses.len());
        for &address in addresses {
            if list.iter().any(|known| known.address == address) {
                continue;
            }
            let known = self.list.iter().find(|known| known.address == address);
            list.push(Upstream {
                address,
                latency: known.and_then(|known| known.latency),
            });
        }
        self.list = list;
    }

    /// All servers, the one to ask first in front. Those of which nothing is known keep the
    /// administrator's order, between those that answer and those that do not.
    pub(super) fn order(&self) -> Vec<IpAddr> {
        let mut order: Vec<&Upstream> = self.list.iter().collect();
        order.sort_by_key(|upstream| upstream.latency.unwrap_or(SILENT / 2));
        order.into_iter().map(|upstream| upstream.address).collect()
    }

    /// A server answered after this time, be it with a refusal: what it refuses to one it may tell
    /// another.
    pub(super) fn answered(&mut self, address: IpAddr, latency: Duration) {
        self.note(address, latency.min(SILENT / 2));
    }

    /// A server could not be reached or did not answer. One failure is enough to ask another first: the next
    /// measurements bring it back.
    pub(super) fn failed(&mut self, address: IpAddr) {
        if let Some(upstream) = self.find(address) {
            upstream.latency = Some(SILENT);
        }
    }

    fn note(&mut self, address: IpAddr, latency: Duration) {
        if let Some(upstream) = self.find(address) {
            upstream.latency = Some(match upstream.latency {
                // Back among the living: what it was before does not matter.
                None | Some(SILENT) => latency,
                Some(before) => (before * (SMOOTHING - 1) + latency) / SMOOTHING,
            });
        }
    }

    fn find(&mut self, address: IpAddr) -> Option<&mut Upstream> {
        self.list.iter_mut().find(|u| u.address == address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn upstreams() -> Upstreams {
        let mut upstreams = Upstreams::default();
        upstreams.set(&[ip(1), ip(2), ip(3), ip(1)]);
        upstreams
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn without_measurements_the_administrators_order_counts() {
        assert_eq!(upstreams().order(), [ip(1), ip(2), ip(3)]);
    }

    #[test]
    fn the_fastest_comes_first_and_the_unknown_before_the_silent() {
        let mut upstreams = upstreams();
        upstreams.failed(ip(1));
        upstreams.answered(ip(3), 20 * MS);
        assert_eq!(upstreams.order(), [ip(3), ip(2), ip(1)]);
        upstreams.answered(ip(2), 10 * MS);
        assert_eq!(upstreams.order(), [ip(2), ip(3), ip(1)]);
    }

    #[test]
    fn one_slow_answer_does_not_turn_the_order_around_but_one_failure_does() {
        let mut upstreams = upstreams();
        for _ in 0..3 {
            upstreams.answered(ip(1), 10 * MS);
            upstreams.answered(ip(2), 40 * MS);
        }
        upstreams.answered(ip(1), 100 * MS);
        assert_eq!(upstreams.order()[0], ip(1));
        upstreams.failed(ip(1));
        assert_eq!(upstreams.order()[0], ip(2));
        upstreams.answered(ip(1), 10 * MS);
        assert_eq!(upstreams.order()[0], ip(1), "back at once");
    }

    #[test]
    fn a_new_list_keeps_what_is_known() {
        let mut upstreams = upstreams();
        upstreams.answered(ip(3), MS);
        upstreams.set(&[ip(9), ip(3)]);
        assert_eq!(upstreams.order(), [ip(3), ip(9)]);
        upstreams.answered(ip(1), MS);
        assert_eq!(upstreams.order(), [ip(3), ip(9)], "not on the list");
    }
}
