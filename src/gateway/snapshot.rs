//! The status document that the admin server and the `status` sub-command read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::core::{Core, NO_CONNECTION, unix_seconds};
use crate::admin::model::{
    ClientStatus, Clients, DeviceStatus, DnsStatus, FlowLogStatus, HandshakeStatus, HostFinding,
    PortalStatus, SCHEMA, Status, TrafficStatus,
};
use crate::datapath::counters::Counters;
use crate::dns::Forwarded;
use crate::flow_logs::FlowLogCounters;

/// What does not change while the process runs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Display name.
    pub name: String,
    /// Identity as the portal sees it.
    pub id: String,
    /// When the process started. As the time of day it is told by today's clock, which may have been set
    /// since.
    pub started: Instant,
}

/// What is known outside the core.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// Whether a shutdown is under way.
    pub draining: bool,
    /// The portal channel.
    pub portal: PortalStatus,
    /// The device.
    pub device: DeviceStatus,
    /// What the preflight found.
    pub host: Vec<HostFinding>,
    /// The DNS service on the tunnel addresses.
    pub dns: Forwarded,
    /// What became of flow logs.
    pub flow_logs: FlowLogCounters,
}

/// The clients of the documents that are published all the time. However many there are, collecting
/// them takes no more than a fifth of a percent of the time.
#[derive(Debug, Default)]
pub struct Collected {
    clients: Clients,
    next: Option<Instant>,
}

impl Collected {
    /// How long they are good for, in multiples of the time that they took.
    const FACTOR: u32 = 499;

    /// What was collected last, or is now if it is time for that. It has always been with few of them.
    pub fn clients(
        &mut self,
        clock: impl Fn() -> Instant,
        collect: impl FnOnce() -> Vec<ClientStatus>,
    ) -> Clients {
        let begin = clock();
        if self.next.is_none_or(|at| begin >= at) {
            self.clients = collect().into();
            let took = clock().saturating_duration_since(begin);
            self.next = Some(begin + took + took * Self::FACTOR);
        }
        self.clients.clone()
    }
}

/// What a document tells of clients.
#[derive(Debug, Default)]
pub struct Told {
    /// All of them.
    pub clients: Clients,
    /// Whether everything that is known, or only what is cheap enough to be published all the time.
    pub complete: bool,
}

/// Builds the document.
pub fn build(
    facts: &Facts,
    around: &Surroundings,
    core: Option<&Core>,
    told: Told,
    counters: &[Arc<Counters>],
    now: Instant,
    wall: SystemTime,
) -> Status {
    let mut dropped = BTreeMap::new();
    for (reason, count) in counters.iter().flat_map(|c| c.all()) {
        *dropped.entry(reason.as_str().to_owned()).or_default() += count;
    }
    let dns = around.dns;
    let clients = told.clients;
    Status {
        schema: SCHEMA,
        at: unix_seconds(wall),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        name: facts.name.clone(),
        id: facts.id.clone(),
        started_at: unix_seconds(wall - now.saturating_duration_since(facts.started)),
        draining: around.draining,
        // Whoever publishes cannot know.
        stuck: Vec::new(),
        portal: around.portal.clone(),
        relays: core.map_or_else(Vec::new, |c| c.relays(now, wall)),
        relay_churn: core.map_or(0, |c| c.episodes().churn(now)),
        relay_episodes: core.map_or_else(Vec::new, |c| c.episodes().status(now, wall)),
        // A client without a connection has nothing more to tell.
        complete: told.complete || clients.iter().all(|c| c.connection == NO_CONNECTION),
        clients,
        device: around.device.clone(),
        host: around.host.clone(),
        handshakes: core.map_or_else(HandshakeStatus::default, Core::handshakes),
        traffic: traffic(counters),
        flows: core.map_or(0, Core::flow_count),
        names_evicted: core.map_or(0, Core::names_evicted),
        dns: DnsStatus {
            answered: dns.answered,
            failed: dns.failed,
            limited: dns.limited,
            ignored: dns.ignored,
        },
        flow_logs: flow_logs(
            &around.flow_logs,
            core.map_or(0, Core::flow_reports_dropped),
        ),
        dropped,
    }
}

fn traffic(counters: &[Arc<Counters>]) -> TrafficStatus {
    use std::sync::atomic::{AtomicU64, Ordering};

    let sum = |part: fn(&Counters) -> &AtomicU64| -> u64 {
        let parts = counters.iter().map(|c| part(c).load(Ordering::Relaxed));
        parts.sum()
    };
    TrafficStatus {
        rx_bytes: sum(|c| &c.traffic.rx_bytes),
        tx_bytes: sum(|c| &c.traffic.tx_bytes),
        rx_packets: sum(|c| &c.traffic.rx_packets),
        tx_packets: sum(|c| &c.traffic.tx_packets),
    }
}

/// `untold` did not even become records.
fn flow_logs(counters: &FlowLogCounters, untold: u64) -> FlowLogStatus {
    FlowLogStatus {
        written: counters.written,
        uploaded: counters.uploaded,
        upload_failures: counters.upload_failures,
        dropped: untold
            + counters.dropped_queue_full
            + counters.dropped_spool_full
            + counters.write_errors
            + counters.rejected
            + counters.expired,
        damaged: counters.damaged,
        spool_bytes: counters.spool_bytes,
        spool_files: counters.spool_files,
        last_error: counters.last_error.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    /// How often clients are collected in 100 s, if that is wanted twice a second and takes so long.
    fn collections(takes: Duration) -> usize {
        let now = Cell::new(Instant::now());
        let (mut collected, mut times) = (Collected::default(), 0);
        for _ in 0..200 {
            let clients = collected.clients(
                || now.get(),
                || {
                    times += 1;
                    now.set(now.get() + takes);
                    vec![ClientStatus::default()]
                },
            );
            assert_eq!(clients.len(), 1, "there is always something to tell");
            now.set(now.get() + Duration::from_millis(500));
        }
        times
    }

    #[test]
    fn collecting_clients_takes_a_fifth_of_a_percent_of_the_time_at_most() {
        assert_eq!(collections(Duration::from_millis(1)), 200);
        // Of about 100 s: a fifth of a second.
        assert!((8..=12).contains(&collections(Duration::from_millis(20))));
        assert_eq!(collections(Duration::from_secs(1)), 1);
    }
}
