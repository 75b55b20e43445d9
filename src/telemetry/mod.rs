//! Logging and tracing: log lines for people or programs, spans for an OpenTelemetry collector.
//!
//! Neither can slow the gateway: log lines pass through a bounded queue, spans through the SDK's
//! batch processor, each with a thread of its own.

mod export;
pub mod metrics;
pub mod names;
pub mod outage;
pub mod past;
mod watched;
mod writer;

#[cfg(test)]
mod tests;

use std::{
    io::{self, IsTerminal as _},
    panic,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use opentelemetry::{KeyValue, global, trace::TracerProvider as _};
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, Protocol, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    resource::TelemetryResourceDetector,
    trace::{BatchSpanProcessor, SdkTracerProvider},
};
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::Targets, fmt, layer::SubscriberExt as _,
    registry::LookupSpan,
};

pub use self::export::{Endpoint, Export, Signal, resource_attributes};
use self::{
    watched::{Failures, Watched},
    writer::LogQueue,
};
use crate::config::LogFormat;

/// Which log lines are written unless `RUST_LOG` says otherwise.
pub const DEFAULT_FILTER: &str = "info";

/// How long to wait for the last log lines when nobody said how long.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Spans of these targets are exported, whatever `RUST_LOG` says.
const EXPORTED_TARGET: &str = "firezone_gateway";

/// What to set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines to write, in the syntax of `RUST_LOG`.
    pub log_filter: String,
    /// Whether and where to export spans.
    pub export: Export,
    /// Whether and where to export metrics.
    pub metrics: Export,
    /// Attributes of the resource, the last one of a name wins.
    pub resource: Vec<(String, String)>,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The filter is not in the syntax of `RUST_LOG`.
    #[error("RUST_LOG: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// No thread could be started for writing log lines.
    #[error("cannot start the thread that writes log lines: {0}")]
    Thread(#[from] io::Error),
    /// Logging was set up before, in this process.
    #[error("logging is set up already")]
    Twice(#[from] tracing::subscriber::SetGlobalDefaultError),
}

/// Keeps logging and export alive. Call [`shutdown`](Self::shutdown) last.
#[must_use = "spans are lost when it is dropped without `shutdown`"]
#[derive(Debug)]
pub struct Guard {
    logs: LogQueue,
    provider: Option<SdkTracerProvider>,
    failures: Failures,
}

/// Sets up logging for the whole process and, if an endpoint is configured, the export of spans.
///
/// An exporter that cannot be built is reported as a log line: tracing is no reason to refuse work.
///
/// # Errors
/// See [`InitError`].
pub fn init(options: &Options) -> Result<Guard, InitError> {
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (subscriber, guard, problem) = assemble(options, Box::new(io::stdout()), colour)?;
    tracing::subscriber::set_global_default(subscriber)?;
    if let Some(provider) = &guard.provider {
        global::set_tracer_provider(provider.clone());
    }
    log_panics(guard.logs.clone());
    if let Some(error) = problem {
        tracing::warn!(%error, "no spans are exported: the OTLP exporter cannot be built");
    }
    Ok(guard)
}

/// A panic ends the process at once, with whatever waits in the queue. It is logged like anything
/// else, and the queue is written out before the process goes.
fn log_panics(logs: LogQueue) {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        tracing::error!(thread = thread::current().name(), "{panic}");
        logs.flush(LAST_LINES);
        usual(panic);
    }));
}

/// Everything but the global part, so that tests can have several in one process.
fn assemble(
    options: &Options,
    output: Box<dyn io::Write + Send>,
    colour: bool,
) -> Result<
    (
        impl Subscriber + Send + Sync + 'static,
        Guard,
        Option<ExporterBuildError>,
    ),
    InitError,
> {
    let (logs, writer) = writer::start(output)?;
    let failures = Failures::default();
    let (provider, problem) = match &options.export {
        Export::Off { .. } => (None, None),
        Export::On { endpoint, .. } => match provider(endpoint, options, failures.clone()) {
            Ok(provider) => (Some(provider), None),
            Err(error) => (None, Some(error)),
        },
    };
    let subscriber = Registry::default()
        .with(log_layer(options, colour, writer)?)
        .with(provider.as_ref().map(span_layer));
    let guard = Guard {
        logs,
        provider,
        failures,
    };
    Ok((subscriber, guard, problem))
}

impl Guard {
    /// Whether spans are exported.
    pub fn exports_traces(&self) -> bool {
        self.provider.is_some()
    }

    /// Batches of spans that could not be delivered since start.
    pub fn failed_exports(&self) -> u64 {
        self.failures.total()
    }

    /// Sends the last spans and writes the last log lines, within about `limit`. Returns whether
    /// all of it was done in time. Blocks; do not call it on a thread that drives tasks.
    pub fn shutdown(mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let exported = self
            .provider
            .take()
            .is_none_or(|provider| shut_down(provider, limit));
        // The log lines that this very shutdown caused should still come out.
        let left = deadline.saturating_duration_since(Instant::now());
        self.logs.flush(left.max(Duration::from_millis(100))) && exported
    }
}

impl Drop for Guard {
    /// Log lines are worth a moment also where an error cut the shutdown short.
    fn drop(&mut self) {
        self.logs.flush(LAST_LINES);
    }
}

/// The SDK's own limit does not cover a full control queue or an exporter that holds a lock, so the
/// wait is for a helper thread.
fn shut_down(provider: SdkTracerProvider, limit: Duration) -> bool {
    let (done, finished) = mpsc::channel();
    let helper = thread::Builder::new()
        .name("otel-shutdown".to_owned())
        .spawn(move || {
            let result = provider.shutdown_with_timeout(limit);
            // Nobody waits any more when the limit has passed.
            let _ = done.send(result.is_ok());
        });
    match helper {
        Ok(_) => finished.recv_timeout(limit).unwrap_or(false),
        Err(_) => false,
    }
}

fn log_layer<S>(
    options: &Options,
    colour: bool,
    writer: writer::LogWriter,
) -> Result<Box<dyn Layer<S> + Send + Sync>, InitError>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let filter = EnvFilter::builder().parse(&options.log_filter)?;
    Ok(match options.log_format {
        LogFormat::Human => fmt::layer()
            .with_ansi(colour)
            .with_writer(writer)
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(writer)
            .with_filter(filter)
            .boxed(),
    })
}

fn span_layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(EXPORTED_TARGET))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(Targets::new().with_target(EXPORTED_TARGET, LevelFilter::INFO))
}

fn provider(
    endpoint: &Endpoint,
    options: &Options,
    failures: Failures,
) -> Result<SdkTracerProvider, ExporterBuildError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_endpoint(endpoint.expose())
        .with_protocol(Protocol::HttpBinary)
        .build()?;
    Ok(SdkTracerProvider::builder()
        .with_span_processor(BatchSpanProcessor::builder(Watched::new(exporter, failures)).build())
        .with_resource(resource(options))
        .build())
}

fn resource(options: &Options) -> Resource {
    let attributes = options
        .resource
        .iter()
        .map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
    Resource::builder_empty()
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_attributes(attributes)
        .build()
}

/// Registers the instruments, for Prometheus and, if an endpoint is set, for a collector. A pushing
/// exporter that cannot be built is reported as a log line.
///
/// # Errors
/// See [`metrics::MetricsError`].
pub fn metrics(
    options: &Options,
    read: impl Fn() -> metrics::Reading + Send + Sync + 'static,
) -> Result<metrics::Metrics, metrics::MetricsError> {
    let push = match &options.metrics {
        Export::Off { .. } => None,
        Export::On { endpoint, .. } => metric_exporter(endpoint, Failures::default())
            .inspect_err(|error| {
                tracing::warn!(%error, "no metrics are pushed: the OTLP exporter cannot be built");
            })
            .ok(),
    };
    metrics::Metrics::new(resource(options), push, read)
}

fn metric_exporter(
    endpoint: &Endpoint,
    failures: Failures,
) -> Result<Watched<MetricExporter>, ExporterBuildError> {
    let exporter = MetricExporter::builder()
        .with_http()
        .with_endpoint(endpoint.expose())
        .with_protocol(Protocol::HttpBinary)
        .build()?;
    Ok(Watched::new(exporter, failures))
}
