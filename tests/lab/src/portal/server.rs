//! The server: listeners, the upgrade of peers, timers and the end.

use std::collections::HashMap;
use std::future::IntoFuture as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::serve::ListenerExt as _;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::core::{ConnectRequest, Core, Protocol, Timings};
use super::events::Now;
use super::faults::Refusal;
use super::policy::Policy;
use super::store::{Role, Store};
use super::{control, socket};

/// How long peers get at shutdown to answer the Close frame.
const DRAIN: Duration = Duration::from_secs(2);

/// What a portal is started with.
#[derive(Debug)]
pub struct Options {
    /// Addresses for peers.
    pub listen: Vec<SocketAddr>,
    /// Address of the control API.
    pub control: SocketAddr,
    /// The policy.
    pub policy: Policy,
    /// The state file, if state is to survive a restart.
    pub state: Option<PathBuf>,
    /// Time limits.
    pub timings: Timings,
}

/// A running portal.
#[derive(Debug)]
pub struct Portal {
    shared: Arc<Shared>,
    listen: Vec<SocketAddr>,
    control: SocketAddr,
    tasks: JoinSet<()>,
}

/// What the tasks of the portal share.
#[derive(Debug)]
pub(super) struct Shared {
    core: Mutex<Core>,
    /// How wrong the portal's clock is, in seconds.
    clock_offset: AtomicI64,
    /// The next deadline may have changed.
    changed: Notify,
    /// Set once, to the code and reason of the Close frames, when the portal is to end.
    shutdown: watch::Sender<Option<(u16, String)>>,
}

impl Shared {
    /// Runs `f` on the state, then writes what it changed to the state file.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Core, Now) -> T) -> T {
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = self.clock_offset.load(Ordering::Relaxed);
        let result = f(&mut core, Now::read().with_clock_off_by(offset));
        if let Err(error) = core.save() {
            tracing::error!(error = %format!("{error:#}"), "state not saved");
        }
        drop(core);
        self.changed.notify_one();
        result
    }

    /// From now on the portal's clock is wrong by so many seconds.
    pub(super) fn set_clock_offset(&self, seconds: i64) {
        self.clock_offset.store(seconds, Ordering::Relaxed);
    }

    /// Asks for the end; the first call counts.
    pub(super) fn shut_down(&self, code: u16, reason: &str) {
        self.shutdown.send_if_modified(|shutdown| {
            let first = shutdown.is_none();
            if first {
                *shutdown = Some((code, reason.to_owned()));
            }
            first
        });
    }
}

impl Portal {
    /// Starts a portal.
    ///
    /// # Errors
    /// If the state file cannot be used or an address cannot be listened on.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let store = Store::open(options.state)?;
        let core = Core::new(Now::read(), options.policy, store, options.timings);
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            clock_offset: AtomicI64::new(0),
            changed: Notify::new(),
            shutdown: watch::Sender::new(None),
        });
        // Write the file now, so that a path that cannot be written fails the start.
        shared
            .core
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .save()?;

        let mut tasks = JoinSet::new();
        let mut listen = Vec::new();
        for address in options.listen {
            let listener = bind(address).await?;
            listen.push(listener.local_addr()?);
            spawn_server(&mut tasks, listener, peer_routes(shared.clone()));
        }
        let listener = bind(options.control).await?;
        let control = listener.local_addr()?;
        spawn_server(&mut tasks, listener, control::routes(shared.clone()));
        tasks.spawn(run_timers(shared.clone()));
        Ok(Self {
            shared,
            listen,
            control,
            tasks,
        })
    }

    /// Addresses for peers, with the ports that were chosen for port 0.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.listen
    }

    /// Address of the control API.
    pub fn control_address(&self) -> SocketAddr {
        self.control
    }

    /// Changes the portal's state from outside, as the control API does.
    pub fn with<T>(&self, f: impl FnOnce(&mut Core, Now) -> T) -> T {
        self.shared.with(f)
    }

    /// Resolves when somebody used `POST /shutdown`.
    pub async fn shutdown_requested(&self) {
        let mut shutdown = self.shared.shutdown.subscribe();
        // The sender lives as long as `self`.
        let _ = shutdown.wait_for(Option::is_some).await;
    }

    /// Ends gracefully: Close 1012 (or what `POST /shutdown` asked for) to every peer, a moment
    /// for them to answer, then everything is closed.
    pub async fn shut_down(mut self) {
        self.shared.shut_down(1012, "service restart");
        let asked = self.shared.shutdown.borrow().clone();
        let (code, reason) = asked.unwrap_or((1012, String::new()));
        self.shared.with(|core, now| {
            core.close_all(now, None, code, &reason);
        });
        let drained = async {
            while self.shared.with(|core, _| core.connections()) > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::warn!("peers did not answer the Close frame in time");
        }
        self.tasks.shutdown().await;
    }
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))
}

fn spawn_server(tasks: &mut JoinSet<()>, listener: TcpListener, routes: Router) {
    // Replies and pushes are small and often follow each other; without this the second one waits
    // for the acknowledgement of the first.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY not set");
        }
    });
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    tasks.spawn(async move {
        if let Err(error) = axum::serve(listener, service).into_future().await {
            tracing::error!(%error, "server ended");
        }
    });
}

async fn run_timers(shared: Arc<Shared>) {
    loop {
        let due = {
            let core = shared.core.lock().unwrap_or_else(PoisonError::into_inner);
            core.poll_timeout()
        };
        let sleep = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep => shared.with(|core, now| core.handle_timeout(now)),
            () = shared.changed.notified() => {}
        }
    }
}

fn peer_routes(shared: Arc<Shared>) -> Router {
    let mut routes = Router::new();
    for (path, role, protocol) in [
        ("/gateway/v2/websocket", Role::Gateway, Protocol::V2),
        ("/gateway/websocket", Role::Gateway, Protocol::V1),
        ("/client/v2/websocket", Role::Client, Protocol::V2),
        ("/client/websocket", Role::Client, Protocol::V1),
    ] {
        let handler =
            move |State(shared): State<Arc<Shared>>,
                  ConnectInfo(remote): ConnectInfo<SocketAddr>,
                  Query(params): Query<HashMap<String, String>>,
                  headers: HeaderMap,
                  upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>| {
                let text = |name: &str| {
                    let value = headers.get(name)?;
                    Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
                };
                let request = ConnectRequest {
                    role,
                    protocol,
                    remote,
                    authorization: text("x-authorization"),
                    user_agent: text(header::USER_AGENT.as_str()).unwrap_or_default(),
                    params,
                };
                connect(shared, request, upgrade)
            };
        routes = routes.route(path, any(handler));
    }
    routes.with_state(shared)
}

async fn connect(
    shared: Arc<Shared>,
    request: ConnectRequest,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let role = request.role;
    let mut faults = shared.with(|core, _| core.faults());
    let delay = faults.borrow().of(role).upgrade_delay_ms;
    if delay > 0 {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    // Ends with the request if the peer gives up first.
    let _ = faults.wait_for(|faults| !faults.of(role).blackhole).await;

    let admission = match shared.with(|core, now| core.admit(now, request)) {
        Ok(admission) => admission,
        Err(refusal) => return refuse(&refusal),
    };
    match upgrade {
        Ok(upgrade) => upgrade.on_upgrade(move |ws| socket::run(shared, ws, role, admission)),
        Err(rejection) => rejection.into_response(),
    }
}

/// Problem details (RFC 9457) if there is a code, plain text otherwise.
fn refuse(refusal: &Refusal) -> Response {
    let status = refusal.status;
    let mut response = match &refusal.code {
        Some(code) => (
            status,
            [(header::CONTENT_TYPE, "application/problem+json")],
            json!({
                "type": "about:blank",
                "title": status.canonical_reason().unwrap_or("Error"),
                "status": status.as_u16(),
                "detail": refusal.detail,
                "code": code,
            })
            .to_string(),
        )
            .into_response(),
        None => (status, refusal.detail.clone()).into_response(),
    };
    if let Some(value) = refusal.retry_after.as_ref().and_then(|v| v.parse().ok()) {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    if status == StatusCode::SWITCHING_PROTOCOLS {
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    }
    response
}
