//! What the core knows of flows, as flow logs want it (data-path spec §8.1).

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::core::Outer;
use crate::access::FlowReport;
use crate::flow_logs::{self, End, Protocol, Record, Report};
use crate::packet::protocol;

/// The record of a report, with wall-clock times. `now` and `wall` are one reading of both clocks.
/// In a record, "tx" and "source" are the client's, in and outside the tunnel.
fn record(report: &FlowReport, outers: &[Outer], now: Instant, wall: SystemTime) -> Record {
    let time = |at: Instant| wall - now.saturating_duration_since(at);
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
                path_activated_at: time(outer.since),
            })
            .collect(),
        flow_start: time(report.began),
        end: report.ended.map(|end| End {
            flow_end: time(end.last_packet),
            last_packet: time(end.last_packet),
            rx_packets: end.counted.in_packets,
            tx_packets: end.counted.out_packets,
            rx_bytes: end.counted.in_bytes,
            tx_bytes: end.counted.out_bytes,
        }),
    }
}

/// What is to be spooled, if the grant came with something to upload with. Written to the log as
/// well, if `log`.
pub(super) fn take(
    report: &FlowReport,
    outers: &[Outer],
    log: bool,
    (now, wall): (Instant, SystemTime),
) -> Option<Report> {
    let record = record(report, outers, now, wall);
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

    use std::time::Duration;

    use uuid::Uuid;

    use super::*;
    use crate::access::{Counted, FlowEnd};
    use crate::ids::{ClientId, ResourceId};

    #[test]
    fn times_are_of_the_day_and_directions_are_the_clients() {
        let (start, day) = (Instant::now(), SystemTime::UNIX_EPOCH);
        let (now, wall) = (
            start + Duration::from_secs(100),
            day + Duration::from_secs(1_800_000_100),
        );
        let at = |seconds| start + Duration::from_secs(seconds);
        let report = FlowReport {
            client: ClientId(Uuid::nil()),
            resource: ResourceId(Uuid::nil()),
            authorization: None,
            protocol: protocol::UDP,
            source: "100.64.0.9:1000".parse().unwrap(),
            destination: "10.0.0.1:53".parse().unwrap(),
            domain: Some("a.example".into()),
            began: at(10),
            ended: Some(FlowEnd {
                last_packet: at(40),
                counted: Counted {
                    out_packets: 1,
                    out_bytes: 2,
                    in_packets: 3,
                    in_bytes: 4,
                },
            }),
        };
        let outer = Outer {
            client: "203.0.113.10:40000".parse().unwrap(),
            gateway: "192.168.20.2:52625".parse().unwrap(),
            since: at(5),
        };
        let record = record(&report, &[outer], now, wall);
        let time = |seconds: u64| day + Duration::from_secs(1_800_000_000 + seconds);
        assert_eq!(record.protocol, Protocol::Udp);
        assert_eq!(record.flow_start, time(10));
        assert_eq!(record.outers[0].src, Some(outer.client));
        assert_eq!(record.outers[0].dst, outer.gateway);
        assert_eq!(record.outers[0].path_activated_at, time(5));
        let end = record.end.unwrap();
        assert_eq!((end.last_packet, end.flow_end), (time(40), time(40)));
        assert_eq!((end.tx_packets, end.tx_bytes), (1, 2));
        assert_eq!((end.rx_packets, end.rx_bytes), (3, 4));
        // Without anything to upload with, it is nobody's.
        assert!(take(&report, &[], true, (now, wall)).is_none());
    }
}
