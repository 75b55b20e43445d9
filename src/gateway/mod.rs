//! Composition root: builds the parts, runs the slow path's loop, shuts down in order.
//!
//! [`core::Core`] holds the decisions and is sans-IO; this module gives it sockets, a clock and the
//! portal. The admin server runs on a thread of its own; it reads snapshots, and has to ask for
//! what is too much for each of them.

pub mod core;
pub mod episodes;
mod flow_reports;
mod host_setup;
mod host_story;
pub mod outbox;
mod prepared;
mod resolutions;
#[cfg(test)]
mod simulation;
mod slow_path;
pub mod snapshot;
pub mod story;

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};

pub use self::prepared::{Prepared, check_host, hand_over_state, leave_root};
use self::snapshot::{Facts, Surroundings};
use crate::admin::{self, AdminState, Drain, Liveness, Offer, Opened};
use crate::config::{Config, ExitStatus};
use crate::telemetry;

/// Runs the gateway until a signal or a final failure ends it.
///
/// # Errors
/// When something needed from the start cannot be had, such as a thread.
pub fn run(
    config: Config,
    prepared: Prepared,
    telemetry: telemetry::Guard,
) -> anyhow::Result<ExitStatus> {
    let facts = Facts {
        name: config.name.clone(),
        id: config.identity.external_id(),
        started: Instant::now(),
    };
    let first = snapshot::build(
        &facts,
        &Surroundings::default(),
        None,
        snapshot::Told::default(),
        &[],
        Instant::now(),
        SystemTime::now(),
    );
    let (status, watcher) = watch::channel(Arc::new(first));
    let liveness = Liveness::default();
    let drain = Drain::default();
    let (asking, questions) = mpsc::channel(slow_path::QUESTIONS);
    let state = AdminState::new(watcher, liveness.clone(), drain.clone())
        .asking(asking)
        .guarded(config.admin_token.clone())
        .logging(telemetry.log_control());
    let read = state.clone();
    let metrics = telemetry::metrics(&config.telemetry, move || read.reading())?;
    let metrics = Arc::new(metrics);
    let Prepared {
        listeners,
        without_page,
        nodes,
    } = prepared;
    if let Some(error) = without_page {
        tracing::warn!(%error, "No status page, metrics and control");
    }
    start_admin(listeners, state.measured(Arc::clone(&metrics)))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let exit = runtime.block_on(slow_path::run(
        config,
        nodes,
        facts,
        status,
        questions,
        liveness,
        drain,
        telemetry.log_control(),
        metrics.durations(),
    ));
    let deadline = std::time::Instant::now() + slow_path::TELEMETRY_FLUSH;
    let (done, pushed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Nobody waits any more when the limit has passed.
        let _ = done.send(metrics.shutdown());
    });
    telemetry.shutdown(slow_path::TELEMETRY_FLUSH);
    // A collector that hangs must not hold up the end.
    let left = deadline.saturating_duration_since(std::time::Instant::now());
    let _ = pushed.recv_timeout(left);
    // Tasks that still wait for the network must not hold up the end.
    runtime.shutdown_background();
    exit
}

/// The admin server lives on a thread of its own, so that no request can slow the slow path, and
/// answers for as long as the process lives.
fn start_admin(listeners: Vec<(Opened, Offer)>, state: AdminState) -> anyhow::Result<()> {
    if listeners.is_empty() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("admin")
        .enable_all()
        .build()?;
    let mut open = Vec::new();
    {
        let _inside = runtime.enter();
        for (listener, offer) in listeners {
            open.push((listener.listen()?, offer));
        }
    }
    std::thread::Builder::new()
        .name("admin".to_owned())
        .spawn(move || {
            let served = open.into_iter().map(|(socket, offer)| {
                admin::serve(socket, state.clone(), offer, std::future::pending())
            });
            let served = runtime.block_on(futures_util::future::try_join_all(served));
            if let Err(error) = served {
                tracing::error!(%error, "The admin server ended");
            }
        })?;
    Ok(())
}
