//! The thread's own part: takes reports, writes them, and uploads what is written.

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use url::Url;

use super::counters::{Counters, add, count};
use super::http::{Client, Reply};
use super::spool::{Id, Spool};
use super::upload::{self, MAX_BODY, Meaning, Next, Schedule, UploadConfig, Verdict};
use super::{Report, Settings};
use crate::throttle::Throttle;

/// Reports written in one go, before the network gets its turn.
const AT_ONCE: usize = 256;
/// How often expired records are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// Pause between attempts to open the spool.
const REOPEN: Duration = Duration::from_secs(10);
/// What is queued is written within this when the gateway forgot to say how long it waits.
const FAREWELL: Duration = Duration::from_secs(1);

/// A request in progress.
struct Sending {
    id: Id,
    numbers: Vec<u64>,
    reply: Pin<Box<dyn Future<Output = Reply>>>,
}

pub(super) struct Worker {
    settings: Settings,
    counters: Arc<Counters>,
    spool: Option<Spool>,
    opened_at: Option<Instant>,
    client: Arc<Client>,
    endpoint: Option<Url>,
    schedule: Schedule,
    sending: Option<Sending>,
    disk_complaints: Throttle,
    upload_complaints: Throttle,
}

impl Worker {
    pub(super) fn new(settings: Settings, counters: Arc<Counters>) -> Self {
        let client = Client::new(Arc::clone(&settings.tls), &settings.user_agent);
        Self {
            settings,
            counters,
            spool: None,
            opened_at: None,
            client: Arc::new(client),
            endpoint: None,
            schedule: Schedule::new(Instant::now(), StdRng::from_os_rng()),
            sending: None,
            disk_complaints: Throttle::MINUTELY,
            upload_complaints: Throttle::MINUTELY,
        }
    }

    /// Ends when `stop` says until when, or when its other end is gone.
    pub(super) async fn run(
        mut self,
        mut reports: mpsc::Receiver<Report>,
        mut config: watch::Receiver<Option<UploadConfig>>,
        mut stop: watch::Receiver<Option<Instant>>,
    ) {
        let mut known = None;
        let mut sweep = interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut taken = Vec::with_capacity(AT_ONCE);
        self.open();
        loop {
            let wake = self.upload();
            tokio::select! {
                number = reports.recv_many(&mut taken, AT_ONCE) => {
                    if number == 0 {
                        return;
                    }
                    for report in taken.drain(..) {
                        self.write(&report);
                    }
                }
                // When the other end is gone `stop` says so too.
                Ok(()) = config.changed() => {
                    let new = config.borrow_and_update().clone();
                    if new != known {
                        self.configure(new.as_ref(), known.as_ref());
                        known = new;
                    }
                }
                _ = stop.changed() => break,
                (id, numbers, reply) = answer(&mut self.sending) => {
                    self.answered(&id, &numbers, &reply);
                }
                _ = sweep.tick() => {
                    self.open();
                    if let Some(spool) = &mut self.spool {
                        spool.expire(SystemTime::now());
                    }
                }
                () = until(wake) => {}
            }
        }
        // A request in progress is given up: its records stay, and are sent once more after the
        // restart.
        let deadline = (*stop.borrow()).unwrap_or_else(|| Instant::now() + FAREWELL);
        self.finish(&mut reports, deadline);
    }

    /// Writes what is queued. What cannot be written in time is lost, and counted.
    fn finish(&mut self, reports: &mut mpsc::Receiver<Report>, deadline: Instant) {
        reports.close();
        while let Ok(report) = reports.try_recv() {
            if Instant::now() < deadline {
                self.write(&report);
            } else {
                count(&self.counters.dropped_queue_full);
            }
        }
    }

    /// Opens the spool unless it is open, or could not be opened just now.
    fn open(&mut self) {
        let now = Instant::now();
        let waits = self
            .opened_at
            .is_some_and(|at| now.saturating_duration_since(at) < REOPEN);
        if self.spool.is_some() || waits {
            return;
        }
        self.opened_at = Some(now);
        match Spool::open(
            &self.settings.state_dir,
            self.settings.limits,
            Arc::clone(&self.counters),
            SystemTime::now(),
        ) {
            Ok(spool) => self.spool = Some(spool),
            Err(error) => self.disk_failed(&error),
        }
    }

    fn write(&mut self, report: &Report) {
        self.open();
        let Some(spool) = &mut self.spool else {
            count(&self.counters.write_errors);
            return;
        };
        if let Err(error) = spool.write(&report.authorization, &report.record, SystemTime::now()) {
            count(&self.counters.write_errors);
            if error.kind() == std::io::ErrorKind::NotFound {
                // The directories were removed under us; they are made anew.
                self.spool = None;
                // It names its records by numbers that the next spool gives to others.
                self.sending = None;
            }
            self.disk_failed(&error);
        }
    }

    fn disk_failed(&mut self, error: &std::io::Error) {
        self.counters.failed(format!(
            "cannot write flow logs below {}: {error}",
            self.settings.state_dir.display()
        ));
        if let Some(suppressed) = self.disk_complaints.admit(Instant::now()) {
            let path = self.settings.state_dir.display();
            tracing::warn!(%error, %path, suppressed, "cannot write flow logs; they are lost meanwhile");
        }
    }

    fn configure(&mut self, new: Option<&UploadConfig>, known: Option<&UploadConfig>) {
        let active = new.filter(|config| !config.interval.is_zero());
        self.endpoint = active.and_then(|config| {
            upload::endpoint(&config.api_url, self.settings.allow_plain_http)
                .inspect_err(|error| {
                    let text = format!("cannot upload flow logs to the portal's address: {error}");
                    tracing::warn!("{text}");
                    self.counters.failed(text);
                })
                .ok()
        });
        let is_new_server = new.map(|config| &config.api_url) != known.map(|c| &c.api_url);
        if is_new_server && new.is_some() {
            // What the former one would answer says nothing about this one. Its records stay.
            self.sending = None;
        }
        let usable = active.filter(|_| self.endpoint.is_some());
        self.schedule
            .configure(Instant::now(), usable, is_new_server);
    }

    /// Begins a request if it is time for one. Says when to ask again otherwise.
    fn upload(&mut self) -> Option<Instant> {
        if self.sending.is_some() {
            return None;
        }
        // Without a spool the next sweep or report tries to open it.
        let (Some(spool), Some(endpoint)) = (&mut self.spool, &self.endpoint) else {
            return None;
        };
        loop {
            let next = self
                .schedule
                .poll(Instant::now(), || (spool.next_number(), spool.waiting()));
            let (id, limit, before) = match next {
                Next::Send { id, limit, before } => (id, limit, before),
                Next::Wait(until) => return until,
            };
            let Some(batch) = spool.batch(&id, limit, MAX_BODY, before) else {
                self.schedule.empty(&id);
                continue;
            };
            let (client, url) = (Arc::clone(&self.client), endpoint.clone());
            let (authorization, body) = (batch.authorization, batch.body);
            self.sending = Some(Sending {
                id,
                numbers: batch.numbers,
                reply: Box::pin(async move {
                    client.post(&url, authorization.token(), body.into()).await
                }),
            });
            return None;
        }
    }

    fn answered(&mut self, id: &Id, numbers: &[u64], reply: &Reply) {
        let verdict = self
            .schedule
            .answered(Instant::now(), id, numbers.len(), reply.meaning);
        // Removed before they are counted: who sees the count finds the disk as it says.
        if matches!(verdict, Verdict::Delete | Verdict::Drop)
            && let Some(spool) = &mut self.spool
        {
            spool.remove(id, numbers);
        }
        match verdict {
            Verdict::Delete => add(&self.counters.uploaded, numbers.len() as u64),
            Verdict::Drop => count(&self.counters.rejected),
            Verdict::Keep => {}
            Verdict::Failed => {
                count(&self.counters.upload_failures);
                self.upload_failed(id, reply);
            }
        }
    }

    fn upload_failed(&mut self, id: &Id, reply: &Reply) {
        let error = &reply.text;
        self.counters
            .failed(format!("cannot upload flow logs: {error}"));
        if let Some(suppressed) = self.upload_complaints.admit(Instant::now()) {
            let refused = reply.meaning == Meaning::Refused;
            tracing::warn!(%error, authorization = %id, refused, suppressed, "cannot upload flow logs; they are kept");
        }
    }
}

/// The answer to the request in progress, of which there may be none.
async fn answer(sending: &mut Option<Sending>) -> (Id, Vec<u64>, Reply) {
    let Some(in_progress) = sending else {
        return pending().await;
    };
    let reply = in_progress.reply.as_mut().await;
    // Nothing is awaited from here on, so the answer is not lost when another branch is faster.
    match sending.take() {
        Some(sending) => (sending.id, sending.numbers, reply),
        None => pending().await,
    }
}

async fn until(wake: Option<Instant>) {
    match wake {
        Some(wake) => sleep_until(wake.into()).await,
        None => pending().await,
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
