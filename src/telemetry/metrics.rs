//! Metrics: one list of instruments, read from the status that the admin server publishes anyway,
//! for Prometheus to fetch and, if an endpoint is set, for an OpenTelemetry collector to receive.
//!
//! Nothing is counted twice for it, so metrics cannot slow the gateway. No id, address or name of a
//! client, relay or resource is an attribute: the number of series does not grow with them.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Histogram, Meter, MeterProvider as _};
use opentelemetry_otlp::MetricExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use prometheus::{Registry, TextEncoder};

use super::durations::{Durations, OUTAGES, ROUND_TRIPS};
use super::names::metric;
use super::watched::{Watched, failed_exports};
use super::{Signal, names};
use crate::admin::model::{ClientStatus, PortalState, Status};

/// Name of the meter.
const METER: &str = "firezone_gateway";

/// Whether a value may fall.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// It never falls while the process lives.
    Counter,
    /// It may.
    Gauge,
    /// Many values in buckets up to these, told one by one; see [`Durations`].
    Histogram(&'static [f64]),
}

/// What values are read from.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The latest status.
    pub status: Arc<Status>,
    /// The time of reading, in seconds since 1970.
    pub unix: f64,
    /// Whether the gateway is live, started and ready.
    pub health: [bool; 3],
}

/// Attributes of a value, and the value.
type Value = (Vec<(&'static str, Cow<'static, str>)>, f64);

/// An instrument.
pub struct Definition {
    /// Name, by the OpenTelemetry semantic conventions where they have one.
    pub name: &'static str,
    /// Unit (UCUM); annotations in braces do not show in Prometheus.
    pub unit: &'static str,
    /// For people.
    pub description: &'static str,
    /// Whether it may fall.
    pub kind: Kind,
    read: fn(&Reading) -> Vec<Value>,
}

/// One value without attributes.
fn plain(value: f64) -> Vec<Value> {
    vec![(Vec::new(), value)]
}

fn flag(value: bool) -> Vec<Value> {
    plain(if value { 1.0 } else { 0.0 })
}

/// A value for each of several attribute values.
fn by<const N: usize>(attribute: &'static str, values: [(&'static str, f64); N]) -> Vec<Value> {
    values
        .into_iter()
        .map(|(name, value)| (vec![(attribute, Cow::Borrowed(name))], value))
        .collect()
}

/// As [`by`], for numbers of things.
fn counts<const N: usize>(attribute: &'static str, values: [(&'static str, u64); N]) -> Vec<Value> {
    by(attribute, values.map(|(name, count)| (name, count as f64)))
}

/// How many items there are under each of several attribute values; `of` says under which one is.
fn count_by<T, const N: usize>(
    attribute: &'static str,
    names: [&'static str; N],
    items: &[T],
    of: impl Fn(&T) -> &str,
) -> Vec<Value> {
    let count = |name| items.iter().filter(|item| of(item) == name).count();
    counts(attribute, names.map(|name| (name, count(name) as u64)))
}

/// One for the present state and zero for the others, so that a query can tell absent from false.
fn state_set<const N: usize>(states: [&'static str; N], present: &str) -> Vec<Value> {
    let value = |state| if state == present { 1.0 } else { 0.0 };
    by("state", states.map(|state| (state, value(state))))
}

/// Every instrument.
pub const ALL: &[Definition] = &[
    Definition {
        name: "gateway.health",
        unit: "",
        description: "Whether a health question is answered with yes: live, started, ready",
        kind: Kind::Gauge,
        read: |r| {
            let value = |n: usize| if r.health[n] { 1.0 } else { 0.0 };
            let probes = [
                ("live", value(0)),
                ("started", value(1)),
                ("ready", value(2)),
            ];
            by("probe", probes)
        },
    },
    Definition {
        name: "gateway.uptime",
        unit: "s",
        description: "Time since the process started",
        kind: Kind::Gauge,
        read: |r| plain((r.unix - r.status.started_at).max(0.0)),
    },
    Definition {
        name: "gateway.portal.state",
        unit: "",
        description: "State of the portal channel: 1 for the present one, 0 for the others",
        kind: Kind::Gauge,
        read: |r| state_set(PortalState::NAMES, r.status.portal.state.as_str()),
    },
    Definition {
        name: "gateway.portal.connection.attempts",
        unit: "{attempt}",
        description: "Attempts to connect to the portal",
        kind: Kind::Counter,
        read: |r| plain(r.status.portal.attempts as f64),
    },
    Definition {
        name: "gateway.portal.joins",
        unit: "{join}",
        description: "Attempts that ended joined",
        kind: Kind::Counter,
        read: |r| plain(r.status.portal.joins as f64),
    },
    Definition {
        name: "gateway.portal.outage.duration",
        unit: "s",
        description: "How long the present outage of the portal channel lasts; 0 without one",
        kind: Kind::Gauge,
        read: |r| {
            let backoff = r.status.portal.backoff.as_ref();
            plain(backoff.map_or(0.0, |b| (r.unix - b.outage_since).max(0.0)))
        },
    },
    Definition {
        name: metric::PORTAL_CONNECT_DURATION,
        unit: "s",
        description: "Duration of attempts to connect to the portal, the join included",
        kind: Kind::Histogram(ROUND_TRIPS),
        read: |_| Vec::new(),
    },
    Definition {
        name: metric::PORTAL_OUTAGE_LENGTH,
        unit: "s",
        description: "Duration of outages of the portal channel that are over",
        kind: Kind::Histogram(OUTAGES),
        read: |_| Vec::new(),
    },
    Definition {
        name: "gateway.portal.outage.failures",
        unit: "{attempt}",
        description: "Failed attempts in the present outage; 0 without one",
        kind: Kind::Gauge,
        read: |r| {
            let backoff = r.status.portal.backoff.as_ref();
            plain(backoff.map_or(0.0, |b| f64::from(b.attempt)))
        },
    },
    Definition {
        name: "gateway.portal.backoff.next_attempt",
        unit: "s",
        description: "Time until the next attempt; absent while one runs or none is needed",
        kind: Kind::Gauge,
        read: |r| {
            let backoff = r.status.portal.backoff.as_ref();
            let next = backoff.and_then(|b| b.next_attempt_at);
            next.map_or_else(Vec::new, |at| plain((at - r.unix).max(0.0)))
        },
    },
    Definition {
        name: "gateway.portal.backoff.budget",
        unit: "s",
        description: "What is left of the outage's budget; absent without an outage or a limit",
        kind: Kind::Gauge,
        read: |r| {
            let backoff = r.status.portal.backoff.as_ref();
            let left = backoff.and_then(|b| b.budget_left);
            left.map_or_else(Vec::new, plain)
        },
    },
    Definition {
        name: "gateway.portal.last_message.age",
        unit: "s",
        description: "Time since the portal said something other than a heartbeat",
        kind: Kind::Gauge,
        read: |r| {
            let last = r.status.portal.last_message_at;
            last.map_or_else(Vec::new, |at| plain((r.unix - at).max(0.0)))
        },
    },
    Definition {
        name: "gateway.relays",
        unit: "{relay}",
        description: "Relays by state",
        kind: Kind::Gauge,
        read: |r| {
            let states = [
                "probing",
                "allocating",
                "allocated",
                "failed",
                "withdrawn",
                "released",
            ];
            count_by("state", states, &r.status.relays, |relay| &relay.state)
        },
    },
    Definition {
        name: "gateway.relay.rtt",
        unit: "s",
        description: "Round trip time of the nearest relay; absent without a measurement",
        kind: Kind::Gauge,
        read: |r| {
            let times = r.status.relays.iter().filter_map(|relay| relay.rtt);
            let nearest = times.min_by(f64::total_cmp);
            nearest.map_or_else(Vec::new, plain)
        },
    },
    Definition {
        name: metric::RELAY_ALLOCATE_DURATION,
        unit: "s",
        description: "Duration of attempts that ended in an allocation at a relay",
        kind: Kind::Histogram(ROUND_TRIPS),
        read: |_| Vec::new(),
    },
    Definition {
        name: "gateway.clients",
        unit: "{client}",
        description: "Clients by path: direct, by whose relay, or none",
        kind: Kind::Gauge,
        read: |r| {
            let paths = [
                "direct",
                "relay_local",
                "relay_remote",
                "relay_both",
                "none",
            ];
            count_by(names::CLIENT_PATH, paths, &r.status.clients, client_path)
        },
    },
    Definition {
        name: metric::CLIENT_SETUP_DURATION,
        unit: "s",
        description: "Duration of the set-up of clients' connections, from authorization to handshake or failure",
        kind: Kind::Histogram(ROUND_TRIPS),
        read: |_| Vec::new(),
    },
    Definition {
        name: "gateway.network.io",
        unit: "By",
        description: "Bytes of packets inside the tunnel, as clients send and receive them",
        kind: Kind::Counter,
        read: |r| {
            let t = &r.status.traffic;
            let directions = [("receive", t.rx_bytes), ("transmit", t.tx_bytes)];
            counts(names::NETWORK_IO_DIRECTION, directions)
        },
    },
    Definition {
        name: "gateway.network.packets",
        unit: "{packet}",
        description: "Packets inside the tunnel",
        kind: Kind::Counter,
        read: |r| {
            let t = &r.status.traffic;
            let directions = [("receive", t.rx_packets), ("transmit", t.tx_packets)];
            counts(names::NETWORK_IO_DIRECTION, directions)
        },
    },
    Definition {
        name: "gateway.network.packets.dropped",
        unit: "{packet}",
        description: "Packets and datagrams that went nowhere, by reason (docs/access.md)",
        kind: Kind::Counter,
        read: |r| {
            let dropped = r.status.dropped.iter();
            dropped
                .map(|(reason, count)| {
                    let reason = Cow::Owned(reason.clone());
                    (vec![(names::ERROR_TYPE, reason)], *count as f64)
                })
                .collect()
        },
    },
    Definition {
        name: "gateway.wireguard.handshakes",
        unit: "{message}",
        description: "Handshake messages by what became of them",
        kind: Kind::Counter,
        read: |r| {
            let h = &r.status.handshakes;
            counts(
                "outcome",
                [
                    ("admitted", h.admitted),
                    ("bad_mac", h.bad_mac),
                    ("cookie", h.cookies),
                    ("limited", h.limited),
                ],
            )
        },
    },
    Definition {
        name: "gateway.flows",
        unit: "{flow}",
        description: "Flows that clients have begun and that have not ended",
        kind: Kind::Gauge,
        read: |r| plain(r.status.flows as f64),
    },
    Definition {
        name: "gateway.dns.queries",
        unit: "{query}",
        description: "DNS queries to the tunnel addresses by what became of them",
        kind: Kind::Counter,
        read: |r| {
            let d = &r.status.dns;
            counts(
                "outcome",
                [
                    ("answered", d.answered),
                    ("failed", d.failed),
                    ("limited", d.limited),
                    ("ignored", d.ignored),
                ],
            )
        },
    },
    Definition {
        name: "gateway.flow_logs.records",
        unit: "{record}",
        description: "Flow log records by what became of them",
        kind: Kind::Counter,
        read: |r| {
            let f = &r.status.flow_logs;
            counts(
                "outcome",
                [
                    ("written", f.written),
                    ("uploaded", f.uploaded),
                    ("dropped", f.dropped),
                ],
            )
        },
    },
    Definition {
        name: "gateway.flow_logs.spool",
        unit: "By",
        description: "Flow logs on disk",
        kind: Kind::Gauge,
        read: |r| plain(r.status.flow_logs.spool_bytes as f64),
    },
    Definition {
        name: "gateway.telemetry.export.failures",
        unit: "{export}",
        description: "Batches that no collector took, by what was in them",
        kind: Kind::Counter,
        read: |_| {
            counts(
                "signal",
                [
                    ("traces", failed_exports(Signal::Traces)),
                    ("metrics", failed_exports(Signal::Metrics)),
                    ("logs", failed_exports(Signal::Logs)),
                ],
            )
        },
    },
    Definition {
        name: "gateway.device.up",
        unit: "",
        description: "Whether the tunnel device is up",
        kind: Kind::Gauge,
        read: |r| flag(r.status.device.up),
    },
    Definition {
        name: "gateway.device.kernel_drops",
        unit: "{packet}",
        description: "What the kernel dropped before the gateway saw it: datagrams (udp), packets to clients (device)",
        kind: Kind::Counter,
        read: |r| {
            let drops = r.status.device.kernel_drops;
            counts("queue", [("udp", drops.udp), ("device", drops.device)])
        },
    },
    Definition {
        name: "gateway.host.findings",
        unit: "{finding}",
        description: "What the preflight found on the host, by level",
        kind: Kind::Gauge,
        read: |r| {
            let levels = ["ok", "warning", "error"];
            count_by("level", levels, &r.status.host, |finding| &finding.level)
        },
    },
    Definition {
        name: "process.cpu.time",
        unit: "s",
        description: "CPU time of the gateway's process",
        kind: Kind::Counter,
        read: |_| {
            let times = cpu_times();
            times.map_or_else(Vec::new, |(user, system)| {
                by("cpu.mode", [("user", user), ("system", system)])
            })
        },
    },
    Definition {
        name: "process.memory.usage",
        unit: "By",
        description: "Memory that the gateway's process occupies",
        kind: Kind::Gauge,
        read: |_| resident().map_or_else(Vec::new, plain),
    },
];

fn client_path(client: &ClientStatus) -> &str {
    client.path.as_deref().unwrap_or("none")
}

/// Seconds in user and in system mode (proc_pid_stat(5), fields 14 and 15).
fn cpu_times() -> Option<(f64, f64)> {
    /// What Linux counts in towards programs, whatever its own clock does.
    const TICKS_PER_SECOND: f64 = 100.0;

    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in parentheses, which may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let user: f64 = fields.nth(11)?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user / TICKS_PER_SECOND, system / TICKS_PER_SECOND))
}

/// Bytes of memory (proc_pid_status(5)).
fn resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024.0)
}

/// The instruments, registered for those who read them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    provider: SdkMeterProvider,
    durations: Durations,
}

/// Why metrics cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The SDK refused the Prometheus reader.
    #[error("the Prometheus exporter cannot be built: {0}")]
    Prometheus(#[from] opentelemetry_sdk::error::OTelSdkError),
}

impl Metrics {
    /// Registers every instrument. `read` is asked for each of them when somebody collects, so it
    /// must be quick. With a `push` exporter, a collector receives them as well, as often as
    /// `OTEL_METRIC_EXPORT_INTERVAL` says.
    ///
    /// # Errors
    /// See [`MetricsError`].
    pub fn new(
        resource: Resource,
        push: Option<Watched<MetricExporter>>,
        read: impl Fn() -> Reading + Send + Sync + 'static,
    ) -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let fetched = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            // There is one scope; its name on every series would say nothing.
            .scope_info_enabled(false)
            .build()?;
        let mut provider = SdkMeterProvider::builder()
            .with_resource(resource)
            .with_reader(fetched);
        if let Some(exporter) = push {
            provider = provider.with_reader(PeriodicReader::builder(exporter).build());
        }
        let provider = provider.build();
        let meter = provider.meter(METER);
        let read = remembering(read, Instant::now);
        let mut histograms = Vec::new();
        for definition in ALL {
            let histogram = register(&meter, definition, read.clone());
            histograms.extend(histogram.map(|histogram| (definition.name, histogram)));
        }
        Ok(Self {
            registry,
            provider,
            durations: Durations::of(histograms),
        })
    }

    /// Where durations are told.
    pub fn durations(&self) -> Durations {
        self.durations.clone()
    }

    /// Everything in the text format of Prometheus.
    ///
    /// # Errors
    /// When the library cannot write what it has gathered.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Sends what is there a last time. Blocks for as long as the exporter may take.
    pub fn shutdown(&self) -> bool {
        self.provider.shutdown().is_ok()
    }
}

/// What was read, and when.
type Read = (Instant, Arc<Reading>);

/// Longer than a collection takes, shorter than between two.
const LASTS: Duration = Duration::from_millis(100);

/// Each instrument asks for itself; within one collection all shall be told the same.
fn remembering(
    read: impl Fn() -> Reading + Send + Sync + 'static,
    clock: impl Fn() -> Instant + Clone + Send + Sync + 'static,
) -> impl Fn() -> Arc<Reading> + Clone + Send + Sync + 'static {
    let last: Arc<Mutex<Option<Read>>> = Arc::default();
    let read = Arc::new(read);
    move || {
        let now = clock();
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((at, reading)) if now.duration_since(*at) < LASTS => Arc::clone(reading),
            _ => {
                let reading = Arc::new(read());
                *last = Some((now, Arc::clone(&reading)));
                reading
            }
        }
    }
}

fn register(
    meter: &Meter,
    definition: &'static Definition,
    read: impl Fn() -> Arc<Reading> + Send + Sync + 'static,
) -> Option<Histogram<f64>> {
    let observe = move |observe: &mut dyn FnMut(f64, &[KeyValue])| {
        for (attributes, value) in (definition.read)(&read()) {
            let attributes: Vec<KeyValue> = attributes
                .into_iter()
                .map(|(name, value)| KeyValue::new(name, value.into_owned()))
                .collect();
            observe(value, &attributes);
        }
    };
    let Definition {
        name,
        unit,
        description,
        ..
    } = *definition;
    // The SDK keeps what it was given to ask; those handles are of no further use.
    match definition.kind {
        Kind::Histogram(bounds) => {
            return Some(
                meter
                    .f64_histogram(name)
                    .with_unit(unit)
                    .with_description(description)
                    .with_boundaries(bounds.to_vec())
                    .build(),
            );
        }
        Kind::Counter => {
            meter
                .f64_observable_counter(name)
                .with_unit(unit)
                .with_description(description)
                .with_callback(move |to| observe(&mut |value, a| to.observe(value, a)))
                .build();
        }
        Kind::Gauge => {
            meter
                .f64_observable_gauge(name)
                .with_unit(unit)
                .with_description(description)
                .with_callback(move |to| observe(&mut |value, a| to.observe(value, a)))
                .build();
        }
    }
    None
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
