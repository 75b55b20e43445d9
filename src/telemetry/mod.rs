//! Logging and tracing: log lines for people or programs, spans and log lines for an OpenTelemetry
//! collector.
//!
//! None can slow the gateway: log lines pass through a bounded queue, what is exported through the
//! SDK's batch processors, which are bounded as well, each with a thread of its own.

mod control;
pub mod durations;
mod export;
mod json;
mod libraries;
pub mod metrics;
pub mod names;
pub mod outage;
pub mod past;
mod recent;
mod tls;
mod transport;
mod watched;
mod writer;

#[cfg(test)]
mod tests;

use std::{
    io::{self, IsTerminal as _},
    panic,
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use opentelemetry::{KeyValue, global, trace::TracerProvider as _};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{
    Compression, ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithExportConfig,
    WithHttpConfig,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{BatchLogProcessor, SdkLoggerProvider},
    resource::TelemetryResourceDetector,
    trace::{BatchSpanProcessor, SdkTracerProvider},
};
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    Layer, Registry,
    filter::{FilterExt as _, Targets},
    fmt,
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
};

pub use self::control::{FilterError, LONGEST_FILTER, LogControl, parse_filter, read_filter};
pub(crate) use self::export::decode;
pub use self::export::{Endpoint, Export, Protocol, Signal, Target, resource_attributes};
use self::{
    transport::{Transport, TransportError, Trouble},
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

/// Where the SDK believes that it sends to. [`Transport`] knows better; the address that was set may
/// hold a password, which the SDK would repeat in errors and log lines.
const NOWHERE: &str = "http://collector/";

/// What to set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines to write, in the syntax of `RUST_LOG`.
    pub log_filter: String,
    /// Where `log_filter` was read from, if from a file.
    pub log_filter_file: Option<PathBuf>,
    /// Whether and where to export spans.
    pub export: Export,
    /// Whether and where to export metrics.
    pub metrics: Export,
    /// Whether and where to export log lines.
    pub logs: Export,
    /// Attributes of the resource, the last one of a name wins.
    pub resource: Vec<(String, String)>,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The filter is not in the syntax of `RUST_LOG`.
    #[error("RUST_LOG: {0}")]
    Filter(#[from] FilterError),
    /// No thread could be started for writing log lines.
    #[error("cannot start the thread that writes log lines: {0}")]
    Thread(#[from] io::Error),
    /// Logging was set up before, in this process.
    #[error("logging is set up already")]
    Twice(#[from] tracing::subscriber::SetGlobalDefaultError),
}

/// Why a signal is not exported although it should be.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("the OTLP exporter cannot be built: {0}")]
    Exporter(#[from] ExporterBuildError),
}

/// Keeps logging and export alive. Call [`shutdown`](Self::shutdown) last.
#[must_use = "spans are lost when it is dropped without `shutdown`"]
#[derive(Debug)]
pub struct Guard {
    logs: LogQueue,
    provider: Option<SdkTracerProvider>,
    exported_logs: Option<SdkLoggerProvider>,
    failures: Failures,
    control: LogControl,
}

/// Sets up logging for the whole process and, if an endpoint is configured, the export of spans
/// and log lines.
///
/// An exporter that cannot be built is reported as a log line: tracing is no reason to refuse work.
///
/// # Errors
/// See [`InitError`].
pub fn init(options: &Options) -> Result<Guard, InitError> {
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (subscriber, guard, problems) = assemble(options, Box::new(io::stdout()), colour)?;
    // First, since the library logs this, which would tell nobody anything.
    if let Some(provider) = &guard.provider {
        global::set_tracer_provider(provider.clone());
    }
    tracing::subscriber::set_global_default(subscriber)?;
    log_panics(guard.logs.clone(), guard.exported_logs.clone());
    for (signal, error) in problems {
        tell(signal, &error);
    }
    Ok(guard)
}

fn tell(signal: Signal, error: &ExportError) {
    tracing::error!(%error, "no {} are exported", signal.as_str());
}

/// A panic ends the process at once, with whatever waits in the queues. It is logged like anything
/// else, and the queues are written out before the process goes.
fn log_panics(logs: LogQueue, exported: Option<SdkLoggerProvider>) {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        tracing::error!(thread = thread::current().name(), "{panic}");
        let exported = exported.clone().map(|e| aside(move || e.force_flush()));
        logs.flush(LAST_LINES);
        if let Some(exported) = exported {
            // What cannot be delivered is lost with the rest.
            let _ = exported.recv_timeout(LAST_LINES);
        }
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
        Vec<(Signal, ExportError)>,
    ),
    InitError,
> {
    let (logs, writer) = writer::start(output)?;
    let failures = Failures::default();
    let mut problems = Vec::new();
    let provider = built(&options.export, Signal::Traces, &mut problems, |target| {
        provider(target, options, failures.clone())
    });
    let exported_logs = built(&options.logs, Signal::Logs, &mut problems, |target| {
        logger_provider(target, options, failures.clone())
    });
    let (layer, control) = log_layer(options, colour, writer, exported_logs.as_ref())?;
    let subscriber = Registry::default()
        .with(layer)
        .with(control.recent().layer())
        .with(provider.as_ref().map(span_layer));
    let guard = Guard {
        logs,
        provider,
        exported_logs,
        failures,
        control,
    };
    Ok((subscriber, guard, problems))
}

/// What exports a signal, if it is to be exported.
fn built<T>(
    export: &Export,
    signal: Signal,
    problems: &mut Vec<(Signal, ExportError)>,
    build: impl FnOnce(&Target) -> Result<T, ExportError>,
) -> Option<T> {
    build(export.target()?)
        .map_err(|error| problems.push((signal, error)))
        .ok()
}

impl Guard {
    /// Whether spans are exported.
    pub fn exports_traces(&self) -> bool {
        self.provider.is_some()
    }

    /// What can be done about log lines while the process runs.
    pub fn log_control(&self) -> LogControl {
        self.control.clone()
    }

    /// Batches of spans and log lines that could not be delivered since start.
    pub fn failed_exports(&self) -> u64 {
        self.failures.total()
    }

    /// Sends the last spans and log lines and writes the latter, within about `limit`. Returns
    /// whether all of it was done in time. Blocks; do not call it on a thread that drives tasks.
    pub fn shutdown(mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        // The SDK's own limit does not cover a full control queue or an exporter that holds a lock.
        let spans = self.provider.take();
        let spans = spans.map(|p| aside(move || p.shutdown_with_timeout(limit)));
        let lines = self.exported_logs.take();
        let lines = lines.map(|p| aside(move || p.shutdown_with_timeout(limit)));
        let exported = [spans, lines].into_iter().flatten().all(|done| {
            let left = deadline.saturating_duration_since(Instant::now());
            matches!(done.recv_timeout(left), Ok(Ok(())))
        });
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

/// Does something that may block on a thread of its own. Nobody has to wait for the result.
fn aside(work: impl FnOnce() -> OTelSdkResult + Send + 'static) -> mpsc::Receiver<OTelSdkResult> {
    let (done, finished) = mpsc::channel();
    // Without a thread, the receiver learns at once that nothing comes.
    let _ = thread::Builder::new()
        .name("otel-shutdown".to_owned())
        .spawn(move || done.send(work()));
    finished
}

fn log_layer<S>(
    options: &Options,
    colour: bool,
    writer: writer::LogWriter,
    exported: Option<&SdkLoggerProvider>,
) -> Result<(Box<dyn Layer<S> + Send + Sync>, LogControl), InitError>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let (text, filter) = parse_filter(&options.log_filter)?;
    let (filter, handle) = reload::Layer::new(filter);
    let control = LogControl::new(
        &text,
        options.log_filter_file.clone(),
        // Fails only when the subscriber is gone, and nothing is logged any more.
        Box::new(move |filter| drop(handle.reload(filter))),
    );
    let filter = filter.and(control.libraries());
    let lines: Box<dyn Layer<S> + Send + Sync> = match options.log_format {
        LogFormat::Human => fmt::layer().with_ansi(colour).with_writer(writer).boxed(),
        LogFormat::Json => fmt::layer()
            .json()
            .event_format(json::WithIds::default())
            .with_writer(writer)
            .boxed(),
    };
    let exported = exported.map(OpenTelemetryTracingBridge::new);
    let layer = lines.and_then(exported).with_filter(filter).boxed();
    Ok((layer, control))
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
    target: &Target,
    options: &Options,
    failures: Failures,
) -> Result<SdkTracerProvider, ExportError> {
    let trouble = Trouble::default();
    let builder = SpanExporter::builder().with_http();
    let exporter = directed(builder, target, &trouble)?.build()?;
    let exporter = Watched::new(exporter, Signal::Traces, failures, trouble);
    Ok(SdkTracerProvider::builder()
        .with_span_processor(BatchSpanProcessor::builder(exporter).build())
        .with_resource(resource(options))
        .build())
}

fn logger_provider(
    target: &Target,
    options: &Options,
    failures: Failures,
) -> Result<SdkLoggerProvider, ExportError> {
    let trouble = Trouble::default();
    let builder = LogExporter::builder().with_http();
    let exporter = directed(builder, target, &trouble)?.build()?;
    let exporter = Watched::new(exporter, Signal::Logs, failures, trouble);
    Ok(SdkLoggerProvider::builder()
        .with_log_processor(BatchLogProcessor::builder(exporter).build())
        .with_resource(resource(options))
        .build())
}

/// An exporter that sends to `target` over a [`Transport`], which does gRPC as well.
fn directed<B: WithExportConfig + WithHttpConfig>(
    builder: B,
    target: &Target,
    trouble: &Trouble,
) -> Result<B, TransportError> {
    let builder = builder
        .with_endpoint(NOWHERE)
        .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
        .with_timeout(target.timeout)
        .with_http_client(Transport::new(target, trouble.clone())?);
    Ok(if target.gzip {
        builder.with_compression(Compression::Gzip)
    } else {
        builder
    })
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
    let push = options.metrics.target().and_then(|target| {
        metric_exporter(target, Failures::default())
            .inspect_err(|error| tell(Signal::Metrics, error))
            .ok()
    });
    metrics::Metrics::new(resource(options), push, read)
}

fn metric_exporter(
    target: &Target,
    failures: Failures,
) -> Result<Watched<MetricExporter>, ExportError> {
    let trouble = Trouble::default();
    let builder = MetricExporter::builder().with_http();
    let exporter = directed(builder, target, &trouble)?.build()?;
    Ok(Watched::new(exporter, Signal::Metrics, failures, trouble))
}
