//! Flow logs: who reached what, when, and how much passed (data-path spec §8.1, portal-channel spec
//! §4.8).
//!
//! The data path reports flows; a thread of its own writes them to a bounded spool on disk and
//! uploads them from there, in this run or a later one. Neither a slow disk nor a slow server is
//! waited for: what finds no room is dropped and counted.

mod counters;
mod files;
#[cfg(test)]
pub(crate) mod fixtures;
mod http;
mod record;
mod spool;
mod token;
mod upload;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use tokio::sync::{mpsc, watch};

pub use counters::FlowLogCounters;
use counters::{Counters, count};
pub use record::{End, Outer, Protocol, Record};
pub use spool::Limits;
pub use token::{Authorization, MAX_TOKEN, TokenError};
pub use upload::{DEFAULT_BATCH, MAX_BATCH, UploadConfig};
use worker::Worker;

/// Reports that may wait for the disk (data-path spec §8.1).
pub const QUEUE: usize = 10_000;
/// Longest wait in [`FlowLogs::finish`], whatever is asked for.
const LONGEST_FAREWELL: Duration = Duration::from_secs(60);
/// How much longer than it was told the thread may take to end.
const GRACE: Duration = Duration::from_millis(200);

/// What does not change while the gateway runs.
#[derive(Clone)]
pub struct Settings {
    /// Where the gateway keeps its state; `flow_logs` is made in it.
    pub state_dir: PathBuf,
    /// See [`crate::portal::dial::tls_config`].
    pub tls: Arc<ClientConfig>,
    /// See [`crate::portal::login::user_agent`].
    pub user_agent: String,
    /// Whether records and tokens may travel without TLS to any host, and not only to this one:
    /// when the portal channel itself is plain.
    pub allow_plain_http: bool,
    /// How much may be kept.
    pub limits: Limits,
}

/// A report about one flow of one authorization.
#[derive(Debug, Clone)]
pub struct Report {
    /// What the flow was allowed by.
    pub authorization: Arc<Authorization>,
    /// What happened.
    pub record: Record,
}

/// The way to the thread that looks after flow logs. It ends with this.
#[derive(Debug)]
pub struct FlowLogs {
    reports: mpsc::Sender<Report>,
    config: watch::Sender<Option<UploadConfig>>,
    stop: watch::Sender<Option<Instant>>,
    /// Disconnected once the thread has ended; nothing is ever sent.
    ended: Mutex<std_mpsc::Receiver<()>>,
    counters: Arc<Counters>,
}

impl FlowLogs {
    /// Starts the thread. Uploads begin with [`Self::configure`].
    ///
    /// # Errors
    /// When the kernel gives no thread or no epoll instance. A state directory that cannot be
    /// written to is no error: it is counted, and tried again.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let (reports, incoming) = mpsc::channel(QUEUE);
        let (config, configured) = watch::channel(None);
        let (stop, stopped) = watch::channel(None);
        let (ending, ended) = std_mpsc::channel();
        let counters = Arc::new(Counters::default());
        let counted = Arc::clone(&counters);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("flow-logs".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    Worker::new(settings, counted)
                        .run(incoming, configured, stopped)
                        .await;
                });
                drop(ending);
                // A name that is being resolved would be waited for otherwise.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            reports,
            config,
            stop,
            ended: Mutex::new(ended),
            counters,
        })
    }

    /// Uploads go to this address from now on, or nowhere. What is in the spool stays there
    /// meanwhile, within its limits.
    pub fn configure(&self, config: Option<UploadConfig>) {
        self.config.send_replace(config);
    }

    /// Hands over a report. Never blocks: when [`QUEUE`] reports wait for the disk it is dropped
    /// and counted. One whose authorization wants no records is dropped at once.
    pub fn report(&self, report: Report) {
        if report.authorization.uploads_enabled() && self.reports.try_send(report).is_err() {
            count(&self.counters.dropped_queue_full);
        }
    }

    /// What became of the reports so far.
    pub fn counters(&self) -> FlowLogCounters {
        self.counters.read()
    }

    /// Writes what is queued and ends the thread. Reports that come later are dropped. Blocks for
    /// at most `timeout`, of which no more than a minute is used, and a little; says whether the
    /// thread ended within that.
    pub fn finish(&self, timeout: Duration) -> bool {
        let timeout = timeout.min(LONGEST_FAREWELL);
        self.stop.send_replace(Some(Instant::now() + timeout));
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(
            ended.recv_timeout(timeout + GRACE),
            Err(std_mpsc::RecvTimeoutError::Disconnected)
        )
    }
}

#[cfg(test)]
mod tests;
