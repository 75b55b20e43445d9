//! Composition root: builds the parts, runs the slow path's loop, shuts down in order.
//!
//! [`core::Core`] holds the decisions and is sans-IO; this module gives it sockets, a clock and the
//! portal. The admin server runs on a thread of its own and only ever reads snapshots.

pub mod core;
mod host_setup;
pub mod outbox;
mod slow_path;
pub mod snapshot;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context as _;
use tokio::sync::watch;

use self::snapshot::{Facts, Surroundings};
use crate::admin;
use crate::admin::model::Status;
use crate::config::{Config, ExitStatus};
use crate::telemetry;

/// Runs the gateway until a signal or a final failure ends it.
///
/// # Errors
/// When something needed from the start cannot be had, such as the admin server's address.
pub fn run(config: Config, telemetry: telemetry::Guard) -> anyhow::Result<ExitStatus> {
    let facts = Facts {
        name: config.name.clone(),
        id: config.identity.external_id(),
        started: SystemTime::now(),
    };
    let first = snapshot::build(
        &facts,
        &Surroundings::default(),
        None,
        &[],
        std::time::Instant::now(),
        facts.started,
    );
    let (status, watcher) = watch::channel(Arc::new(first));
    let liveness = Arc::new(admin::Liveness::new());
    start_admin(&config, watcher, Arc::clone(&liveness))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let exit = runtime.block_on(slow_path::run(config, facts, status, liveness));
    telemetry.shutdown(slow_path::TELEMETRY_FLUSH);
    // Tasks that still wait for the network must not hold up the end.
    runtime.shutdown_background();
    exit
}

/// The admin server lives on a thread of its own, so that no request can slow the slow path, and
/// answers for as long as the process lives.
fn start_admin(
    config: &Config,
    status: watch::Receiver<Arc<Status>>,
    liveness: Arc<admin::Liveness>,
) -> anyhow::Result<()> {
    let Some(address) = config.health_check_addr else {
        return Ok(());
    };
    let listener = TcpListener::bind(address).with_context(|| {
        format!(
            "the admin server cannot listen on {address}; set HEALTH_CHECK_ADDR to a free address \
             such as 0.0.0.0:8081, or to `off`"
        )
    })?;
    listener.set_nonblocking(true)?;
    let state = admin::AdminState::new(status, liveness);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("admin")
        .enable_all()
        .build()?;
    std::thread::Builder::new()
        .name("admin".to_owned())
        .spawn(move || {
            runtime.block_on(async move {
                let served = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => admin::serve(listener, state, std::future::pending()).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = served {
                    tracing::error!(%error, "The admin server ended");
                }
            });
        })?;
    Ok(())
}
