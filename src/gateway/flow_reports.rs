//! What the core knows of flows, as flow logs want it (data-path spec §8.1).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::core::Outer;
use crate::access::FlowReport;
use crate::flow_logs::{self, End, Protocol, Record, Report};
use crate::packet::protocol;

/// How far the two clocks may move apart before instants are placed anew: more than a clock is
/// moved when it is kept right, less than anybody would look for in a log.
const TOLERANCE: Duration = Duration::from_secs(2);
/// How many readings are kept. Only flows older than all of them are placed otherwise than when
/// they began.
const READINGS: usize = 64;

/// Wall-clock times of instants.
///
/// The reports of a flow's start and of its end must name the same start: the spool, and whoever
/// receives them, know by it that they belong together. So an instant has one wall-clock time,
/// however late it is asked for: that by the last reading of both clocks before it. A clock that
/// was set changes the times of what comes later.
#[derive(Debug)]
pub(super) struct WallClock {
    first: (Instant, SystemTime),
    /// In the order of time.
    later: VecDeque<(Instant, SystemTime)>,
}

impl WallClock {
    /// From one reading of both clocks.
    pub(super) fn new(now: Instant, wall: SystemTime) -> Self {
        Self {
            first: (now, wall),
            later: VecDeque::new(),
        }
    }

    /// Takes one reading of both clocks, to be called now and then.
    pub(super) fn note(&mut self, now: Instant, wall: SystemTime) {
        let expected = self.time(now);
        let drift = match wall.duration_since(expected) {
            Ok(ahead) => ahead,
            Err(behind) => behind.duration(),
        };
        if drift < TOLERANCE {
            return;
        }
        if self.later.len() == READINGS
            && let Some(oldest) = self.later.pop_front()
        {
            self.first = oldest;
        }
        self.later.push_back((now, wall));
    }

    /// In microseconds, as it is uploaded. Clocks that stand at an end of time stay there.
    fn time(&self, at: Instant) -> SystemTime {
        let mut readings = self.later.iter().rev();
        let &(read, wall) = readings
            .find(|(read, _)| *read <= at)
            .unwrap_or(&self.first);
        let exact = match at.checked_duration_since(read) {
            Some(since) => wall.checked_add(since),
            None => wall.checked_sub(read.saturating_duration_since(at)),
        };
        let exact = exact.unwrap_or(wall);
        let nanoseconds = exact
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.subsec_nanos());
        exact - Duration::from_nanos(u64::from(nanoseconds % 1_000))
    }
}

/// The record of a report, with wall-clock times. In a record, "tx" and "source" are the client's,
/// in and outside the tunnel.
fn record(report: &FlowReport, outers: &[Outer], clock: &WallClock) -> Record {
    let flow_start = clock.time(report.began);
    Record {
        protocol: if report.protocol == protocol::TCP {
            Protocol::Tcp
        } else {
            Protocol::Udp
        },
        inner_src: report.source,
        inner_dst: report.destination,
        domain: report.domain.as_deref().map(str::to_owned),
        outers: outers
            .iter()
            .map(|outer| flow_logs::Outer {
                src: Some(outer.client),
                dst: outer.gateway,
                path_activated_at: clock.time(outer.since),
            })
            .collect(),
        flow_start,
        end: report.ended.map(|end| {
            // A clock that was set back meanwhile would have the flow end before it began.
            let last_packet = clock.time(end.last_packet).max(flow_start);
            End {
                flow_end: last_packet,
                last_packet,
                rx_packets: end.counted.in_packets,
                tx_packets: end.counted.out_packets,
                rx_bytes: end.counted.in_bytes,
                tx_bytes: end.counted.out_bytes,
            }
        }),
    }
}

/// What is to be spooled, if the grant came with something to upload with. Written to the log as
/// well, if `log`.
pub(super) fn take(
    report: &FlowReport,
    outers: &[Outer],
    log: bool,
    clock: &WallClock,
) -> Option<Report> {
    let record = record(report, outers, clock);
    if log {
        write(report, &record);
    }
    Some(Report {
        authorization: Arc::clone(report.authorization.as_ref()?),
        record,
    })
}

fn write(report: &FlowReport, record: &Record) {
    let FlowReport {
        client, resource, ..
    } = report;
    let protocol = match record.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let (source, destination) = (record.inner_src, record.inner_dst);
    let domain = record.domain.as_deref();
    match record.end {
        None => tracing::info!(
            target: "flow_logs",
            %client, %resource, protocol, %source, %destination, domain,
            "Flow began"
        ),
        Some(end) => tracing::info!(
            target: "flow_logs",
            %client, %resource, protocol, %source, %destination, domain,
            tx_packets = end.tx_packets, tx_bytes = end.tx_bytes,
            rx_packets = end.rx_packets, rx_bytes = end.rx_bytes,
            "Flow ended"
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;
    use crate::access::{Counted, FlowEnd};
    use crate::ids::{ClientId, ResourceId};

    fn report(began: Instant, last_packet: Option<Instant>) -> FlowReport {
        FlowReport {
            client: ClientId(Uuid::nil()),
            resource: ResourceId(Uuid::nil()),
            authorization: None,
            protocol: protocol::UDP,
            source: "100.64.0.9:1000".parse().unwrap(),
            destination: "10.0.0.1:53".parse().unwrap(),
            domain: Some("a.example".into()),
            began,
            ended: last_packet.map(|last_packet| FlowEnd {
                last_packet,
                counted: Counted {
                    out_packets: 1,
                    out_bytes: 2,
                    in_packets: 3,
                    in_bytes: 4,
                },
            }),
        }
    }

    fn day(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    #[test]
    fn times_are_of_the_day_and_directions_are_the_clients() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let clock = WallClock::new(at(20), day(20));
        let report = report(at(10), Some(at(40)));
        let outer = Outer {
            client: "203.0.113.10:40000".parse().unwrap(),
            gateway: "192.168.20.2:52625".parse().unwrap(),
            since: at(5),
        };
        let record = record(&report, &[outer], &clock);
        assert_eq!(record.protocol, Protocol::Udp);
        assert_eq!(record.flow_start, day(10));
        assert_eq!(record.outers[0].src, Some(outer.client));
        assert_eq!(record.outers[0].dst, outer.gateway);
        assert_eq!(record.outers[0].path_activated_at, day(5));
        let end = record.end.unwrap();
        assert_eq!((end.last_packet, end.flow_end), (day(40), day(40)));
        assert_eq!((end.tx_packets, end.tx_bytes), (1, 2));
        assert_eq!((end.rx_packets, end.rx_bytes), (3, 4));
        // Without anything to upload with, it is nobody's.
        assert!(take(&report, &[], true, &clock).is_none());
    }

    #[test]
    fn the_end_of_a_flow_is_filed_next_to_its_start() {
        let start = Instant::now();
        let nanos = Duration::from_nanos;
        let mut clock = WallClock::new(start, day(0) + nanos(123_456_789));
        let began = start + nanos(1_000_000_123);
        let first = record(&report(began, None), &[], &clock);
        // The two clocks are read one after the other, and one of them is being slewed.
        for (seconds, apart) in [(10, 417), (20, 1_000_003), (30, 499_000_000)] {
            let seconds = Duration::from_secs(seconds);
            clock.note(start + seconds, day(0) + seconds + nanos(apart));
            let end = record(&report(began, Some(start + seconds)), &[], &clock);
            let name = first.file_name().replace(".start.", ".end.");
            assert_eq!(end.file_name(), name);
        }
    }

    #[test]
    fn a_clock_that_is_set_moves_what_comes_later_and_not_what_was() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut clock = WallClock::new(at(0), day(0));
        clock.note(at(100), day(1_100));
        clock.note(at(200), day(900));
        assert_eq!(clock.time(at(99)), day(99));
        assert_eq!(clock.time(at(100)), day(1_100));
        assert_eq!(clock.time(at(201)), day(901));
        let end = record(&report(at(150), Some(at(201))), &[], &clock);
        assert_eq!(end.flow_start, day(1_150));
        assert_eq!(end.end.unwrap().flow_end, day(1_150), "not before it began");
    }

    #[test]
    fn a_clock_that_is_set_again_and_again_takes_no_more_room() {
        let start = Instant::now();
        let mut clock = WallClock::new(start, day(0));
        for round in 1..=10 * READINGS as u64 {
            clock.note(start + Duration::from_secs(round), day(100 * round));
        }
        assert_eq!(clock.later.len(), READINGS);
        let last = 10 * READINGS as u64;
        assert_eq!(
            clock.time(start + Duration::from_secs(last)),
            day(100 * last)
        );
    }

    #[test]
    fn clocks_at_the_end_of_time_do_no_harm() {
        let now = Instant::now();
        let mut clock = WallClock::new(now, SystemTime::UNIX_EPOCH - Duration::from_nanos(1));
        clock.time(now - Duration::from_nanos(1));
        let last = SystemTime::UNIX_EPOCH + Duration::from_secs(i64::MAX as u64);
        clock.note(now, last);
        assert_eq!(clock.time(now + Duration::from_secs(9)), last);
    }
}
