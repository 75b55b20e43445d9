//! Admin server: health in three questions, the status document, and the sub-commands that ask for
//! them. It reads snapshots, so that it cannot block the gateway. What is too much for each
//! snapshot it asks the slow path for, which answers when it has time and no more often than it
//! can bear.

pub mod client;
mod events;
mod health;
mod listener;
mod liveness;
pub mod model;
mod routes;
mod table;
mod token;

#[cfg(test)]
mod tests;

use std::{
    io,
    num::NonZeroU64,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, mpsc, oneshot, watch};

pub use self::{
    client::{AskError, ask, fetch, healthcheck, log_filter, status},
    health::{CheckResult, Moment, Report},
    listener::{Opened, Place, Socket},
    liveness::{Heartbeat, Liveness},
    table::render as render_status,
    token::AdminToken,
};
use self::{
    events::Events,
    health::Tracker,
    listener::{Bounded, Caller},
    model::Status,
};
use crate::config::Probe;
use crate::telemetry::{
    LogControl,
    metrics::{Metrics, Reading},
};
use crate::throttle::Throttle;

/// How long requests under way may take once the server is to end.
const LINGER: Duration = Duration::from_secs(2);

/// How long the slow path may take for a complete document. The sub-command waits for 2 s.
const PATIENCE: Duration = Duration::from_secs(1);

/// Somebody wants a complete status document.
pub type Question = oneshot::Sender<Arc<Status>>;

/// Set once when a shutdown begins; readiness fails from then on, liveness does not.
#[derive(Debug, Clone, Default)]
pub struct Drain(Arc<AtomicBool>);

impl Drain {
    /// The shutdown has begun.
    pub fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it has.
    pub fn is_draining(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the admin server looks at. Clones share everything.
#[derive(Debug, Clone)]
pub struct AdminState {
    status: watch::Receiver<Arc<Status>>,
    questions: Option<mpsc::Sender<Question>>,
    liveness: Liveness,
    drain: Drain,
    tracker: Arc<Mutex<Tracker>>,
    metrics: Option<Arc<Metrics>>,
    token: Option<AdminToken>,
    complaints: Arc<Mutex<Throttle>>,
    log: LogControl,
    events: Events,
}

impl AdminState {
    /// A server for what is published in `status`.
    pub fn new(status: watch::Receiver<Arc<Status>>, liveness: Liveness, drain: Drain) -> Self {
        Self {
            status,
            questions: None,
            liveness,
            drain,
            tracker: Arc::default(),
            metrics: None,
            token: None,
            complaints: Arc::new(Mutex::new(Throttle::MINUTELY)),
            log: LogControl::default(),
            events: Events::default(),
        }
    }

    /// Everything but the probes only for those who know the token.
    #[must_use]
    pub fn guarded(mut self, token: Option<AdminToken>) -> Self {
        self.token = token;
        self
    }

    /// With a log to control.
    #[must_use]
    pub fn logging(mut self, log: LogControl) -> Self {
        self.log = log;
        self
    }

    /// With metrics to show.
    #[must_use]
    pub fn measured(mut self, metrics: Arc<Metrics>) -> Self {
        self.metrics = Some(metrics);
        self
    }

    /// What metrics are read from, as of now.
    pub fn reading(&self) -> Reading {
        let now = Moment::now();
        let passes = |probe| self.report(probe, now).passed;
        Reading {
            status: self.status(),
            unix: now.unix,
            health: [Probe::Live, Probe::Started, Probe::Ready].map(passes),
        }
    }

    /// With somebody to ask for complete documents.
    #[must_use]
    pub fn asking(mut self, questions: mpsc::Sender<Question>) -> Self {
        self.questions = Some(questions);
        self
    }

    /// The latest status. The drain flag and what is stuck are ahead of what was published.
    pub fn status(&self) -> Arc<Status> {
        self.as_of_now(Arc::clone(&self.status.borrow()))
    }

    /// A complete status, or the latest one if that is not to be had within a second.
    pub async fn complete_status(&self) -> Arc<Status> {
        let latest = self.status();
        // While it shuts down, the slow path has other things to do; and stuck, it does nothing.
        let stuck = health::is_stuck(&self.liveness, "slow_path", Moment::now().instant);
        if latest.draining || stuck {
            return latest;
        }
        let Some(questions) = &self.questions else {
            return latest;
        };
        let (question, answer) = oneshot::channel();
        if questions.try_send(question).is_err() {
            return latest;
        }
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(status)) => self.as_of_now(status),
            Ok(Err(_)) | Err(_) => self.status(),
        }
    }

    fn as_of_now(&self, status: Arc<Status>) -> Arc<Status> {
        let draining = status.draining || self.drain.is_draining();
        let stuck = health::stuck(&self.liveness, Instant::now());
        if draining == status.draining && stuck == status.stuck {
            return status;
        }
        Arc::new(Status {
            draining,
            stuck,
            ..Status::clone(&status)
        })
    }

    /// Answers one of the three questions.
    pub fn report(&self, probe: Probe, now: Moment) -> Report {
        let status = self.status();
        let mut tracker = self.tracker.lock().unwrap_or_else(PoisonError::into_inner);
        health::report(probe, &status, &self.liveness, &mut tracker, now)
    }

    /// Whether it may be logged that nobody can be let in, and how often it was not.
    #[expect(clippy::option_option, reason = "as `Throttle::admit`")]
    fn complaint(&self) -> Option<Option<NonZeroU64>> {
        let mut complaints = self
            .complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        complaints.admit(Instant::now())
    }

    #[cfg(test)]
    fn last_seen(&self, probe: Probe, check: &str) -> Option<bool> {
        self.tracker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last(probe, check)
    }

    /// Lets the checks see each published status also when nobody asks, so that their since-when
    /// and their hysteresis are right.
    async fn observe(mut self) {
        loop {
            let now = Moment::now();
            for probe in [Probe::Live, Probe::Started, Probe::Ready] {
                self.report(probe, now);
            }
            if self.status.changed().await.is_err() {
                // Nothing is published any more; what was last known can still be asked for.
                return std::future::pending().await;
            }
        }
    }
}

/// The admin server cannot listen.
#[derive(Debug, thiserror::Error)]
#[error(
    "the admin server cannot listen on {place}: {error}. Set HEALTH_CHECK_ADDR to an address and port \
     that are free on this host, or to off; and FIREZONE_ADMIN_ADDR to another such, to \
     unix:/path/of/a/socket whose directory exists, to health or to off"
)]
pub struct BindError {
    /// The configured place.
    pub place: Place,
    /// Why not.
    #[source]
    pub error: io::Error,
}

/// Opens the listening socket, before there is a runtime.
///
/// # Errors
/// As [`bind`].
pub fn open(place: impl Into<Place>) -> Result<Opened, BindError> {
    let place = place.into();
    Opened::at(&place).map_err(|error| BindError { place, error })
}

/// Opens the listening socket.
///
/// # Errors
/// The address is taken or not one of this host, or the path of a Unix socket cannot be had.
pub async fn bind(place: impl Into<Place>) -> Result<Socket, BindError> {
    let place = place.into();
    match Opened::at(&place).and_then(Opened::listen) {
        Ok(socket) => Ok(socket),
        Err(error) => Err(BindError { place, error }),
    }
}

/// What a listener has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// The probes only.
    Probes,
    /// Probes, status, page, metrics, control.
    Everything,
}

/// Answers requests until `shutdown` completes, then lets those under way finish.
///
/// A connection carries one request and ends after a few seconds at most, unless it is a stream of
/// events, and their number is bounded, so that slow ones do not pile up.
///
/// # Errors
/// None at present: failures of single connections end only these.
pub async fn serve(
    socket: Socket,
    state: AdminState,
    offer: Offer,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let ending = Arc::new(Notify::new());
    let end = Arc::clone(&ending);
    let routes =
        routes::router(state.clone(), offer).into_make_service_with_connect_info::<Caller>();
    let server = axum::serve(Bounded::new(socket), routes).with_graceful_shutdown(async move {
        shutdown.await;
        end.notify_one();
    });
    tokio::select! {
        result = server => result,
        () = state.observe() => Ok(()),
        () = async {
            ending.notified().await;
            tokio::time::sleep(LINGER).await;
        } => Ok(()),
    }
}
