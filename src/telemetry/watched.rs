//! Notices when spans, metrics or log lines cannot be delivered, and says so rarely.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter},
    metrics::{Temporality, data::ResourceMetrics, exporter::PushMetricExporter},
    trace::{SpanData, SpanExporter},
};

use super::{Signal, transport::Trouble};

/// At most one line in this time about a collector that stays away.
const QUIET: Duration = Duration::from_secs(15 * 60);

/// Counts failed exports.
#[derive(Debug, Clone, Default)]
pub(super) struct Failures(Arc<AtomicU64>);

impl Failures {
    pub(super) fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Those of the whole process.
fn failed(signal: Signal) -> &'static AtomicU64 {
    static FAILED: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
    match signal {
        Signal::Traces => &FAILED[0],
        Signal::Metrics => &FAILED[1],
        Signal::Logs => &FAILED[2],
    }
}

/// Exports that failed since start.
pub(super) fn failed_exports(signal: Signal) -> u64 {
    failed(signal).load(Ordering::Relaxed)
}

/// When a line was last written, and whether the collector is away.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    last: Option<Instant>,
    failed: u64,
}

/// What to say about the result of an export.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Say {
    Nothing,
    /// Failed; so many batches since the last success.
    Failing(u64),
    /// Works again after so many batches were lost.
    Recovered(u64),
}

impl Complaints {
    pub(super) fn observe(&mut self, delivered: bool, now: Instant) -> Say {
        if delivered {
            let failed = std::mem::take(&mut self.failed);
            return if failed > 0 {
                Say::Recovered(failed)
            } else {
                Say::Nothing
            };
        }
        self.failed += 1;
        // Also after a recovery: a collector that comes and goes must not write a line each time.
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < QUIET)
        {
            return Say::Nothing;
        }
        self.last = Some(now);
        Say::Failing(self.failed)
    }
}

/// An exporter whose failures are counted and reported.
pub struct Watched<E> {
    exporter: E,
    signal: Signal,
    failures: Failures,
    /// Tells more than the exporter does.
    trouble: Trouble,
    complaints: Mutex<Complaints>,
}

impl<E> fmt::Debug for Watched<E> {
    /// Without the exporter, which would show the headers that it sends.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched")
            .field("signal", &self.signal)
            .field("failures", &self.failures)
            .field("trouble", &self.trouble)
            .finish_non_exhaustive()
    }
}

impl<E> Watched<E> {
    pub(super) fn new(exporter: E, signal: Signal, failures: Failures, trouble: Trouble) -> Self {
        Self {
            exporter,
            signal,
            failures,
            trouble,
            complaints: Mutex::default(),
        }
    }

    /// Takes note of the result of an export.
    pub(super) fn note(&self, result: &OTelSdkResult) {
        let what = self.signal.as_str();
        if result.is_err() {
            self.failures.0.fetch_add(1, Ordering::Relaxed);
            failed(self.signal).fetch_add(1, Ordering::Relaxed);
        }
        let say = self
            .complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .observe(result.is_ok(), Instant::now());
        match (say, result) {
            (Say::Failing(batches), Err(error)) => tracing::warn!(
                error = self.trouble.get().unwrap_or_else(|| error.to_string()),
                batches,
                "{what} cannot be delivered to the OTLP endpoint and are lost; the gateway is not \
                 affected, and this is not repeated for 15 minutes"
            ),
            (Say::Recovered(batches), _) => {
                tracing::debug!(batches, "{what} are delivered to the OTLP endpoint again");
            }
            _ => {}
        }
    }
}

impl<E: SpanExporter> SpanExporter for Watched<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        self.note(&result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn shutdown(&self) -> OTelSdkResult {
        self.exporter.shutdown()
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Watched<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let result = self.exporter.export(metrics).await;
        self.note(&result);
        result
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn shutdown(&self) -> OTelSdkResult {
        self.exporter.shutdown()
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

impl<E: LogExporter> LogExporter for Watched<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        self.note(&result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn shutdown(&self) -> OTelSdkResult {
        self.exporter.shutdown()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreachable_collector_costs_one_line_per_quarter_hour() {
        let start = Instant::now();
        let mut complaints = Complaints::default();
        let mut lines = 0;
        for second in (0..3600).step_by(5) {
            let say = complaints.observe(false, start + Duration::from_secs(second));
            lines += usize::from(say != Say::Nothing);
        }
        assert_eq!(lines, 4);
    }

    #[test]
    fn what_the_exporter_holds_is_not_shown() {
        let watched = Watched::new(
            "authorization: hunter2",
            Signal::Logs,
            Failures::default(),
            Trouble::default(),
        );
        let shown = format!("{watched:?}");
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn collector_that_comes_and_goes_does_not_warn_each_time() {
        let start = Instant::now();
        let mut complaints = Complaints::default();
        assert_eq!(complaints.observe(false, start), Say::Failing(1));
        assert_eq!(
            complaints.observe(true, start + Duration::from_secs(5)),
            Say::Recovered(1)
        );
        assert_eq!(
            complaints.observe(false, start + Duration::from_secs(10)),
            Say::Nothing
        );
        assert_eq!(complaints.observe(false, start + QUIET), Say::Failing(2));
    }
}
