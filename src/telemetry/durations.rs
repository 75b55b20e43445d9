//! How long things took, for histograms: told when they are over, unlike all that is read from the
//! status.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Histogram;

use super::names::{self, metric};

/// Of what takes a network some round trips: what the semantic conventions advise for requests.
pub const ROUND_TRIPS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
/// Of outages: from a restart of the portal to a day.
pub const OUTAGES: &[f64] = &[
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0, 14_400.0, 86_400.0,
];

/// Something that is over, and how long it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timing {
    /// An attempt to connect to the portal, the join included.
    PortalConnect {
        /// Its duration.
        took: Duration,
        /// `error.type` if it failed.
        error: Option<&'static str>,
    },
    /// An outage of the portal channel.
    PortalOutage {
        /// Its duration.
        took: Duration,
        /// How it ended.
        outcome: &'static str,
    },
    /// A successful attempt to get an allocation at a relay.
    RelayAllocate {
        /// Its duration.
        took: Duration,
    },
    /// The set-up of a client's connection, from its authorization to its first handshake.
    ClientSetUp {
        /// Its duration.
        took: Duration,
        /// What kind of path it is.
        path: Option<&'static str>,
        /// `error.type` if it came to nothing.
        error: Option<&'static str>,
    },
}

/// Where timings are told; clones share everything. The default takes no notice of them.
#[derive(Debug, Clone, Default)]
pub struct Durations(Arc<Vec<(&'static str, Histogram<f64>)>>);

impl Durations {
    pub(super) fn of(histograms: Vec<(&'static str, Histogram<f64>)>) -> Self {
        Self(Arc::new(histograms))
    }

    /// Adds one.
    pub fn note(&self, timing: Timing) {
        let (name, took, attributes) = match timing {
            Timing::PortalConnect { took, error } => (
                metric::PORTAL_CONNECT_DURATION,
                took,
                [(names::ERROR_TYPE, error), ("", None)],
            ),
            Timing::PortalOutage { took, outcome } => (
                metric::PORTAL_OUTAGE_LENGTH,
                took,
                [("outcome", Some(outcome)), ("", None)],
            ),
            Timing::RelayAllocate { took } => (
                metric::RELAY_ALLOCATE_DURATION,
                took,
                [("", None), ("", None)],
            ),
            Timing::ClientSetUp { took, path, error } => (
                metric::CLIENT_SETUP_DURATION,
                took,
                [(names::CLIENT_PATH, path), (names::ERROR_TYPE, error)],
            ),
        };
        let attributes: Vec<KeyValue> = attributes
            .into_iter()
            .filter_map(|(name, value)| Some(KeyValue::new(name, value?)))
            .collect();
        for (_, histogram) in self.0.iter().filter(|(known, _)| *known == name) {
            histogram.record(took.as_secs_f64(), &attributes);
        }
    }
}
