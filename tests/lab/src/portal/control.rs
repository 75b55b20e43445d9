//! The control API: JSON over HTTP, for tests.
//!
//! | Request | Body | Effect |
//! |---|---|---|
//! | `GET /healthz` | | `ok` |
//! | `GET /state` | | peers, grants, relays, faults |
//! | `GET /events?n=&since=&kind=` | | newest `n` (100) events, oldest first, after number `since` |
//! | `POST /faults` | `{"role": "gateway"\|"client"\|"both", "clear": bool,` fields of [`FaultSet`]`, "close_all": {"code", "reason"}, "kill_all": bool, "crash_channel": "phx_close"\|"phx_error"}` | changes the named faults, then does the one-time actions |
//! | `POST /reject` | `{"client", "resource"}` | `reject_access` |
//! | `POST /resource` | [`ResourceChange`] | `resource_updated` and what belongs to it |
//! | `POST /relays` | `{"relays": [...], "immediate": bool, "force": bool}` | replaces the relay set |
//! | `POST /expire` | [`Expire`] | moves the end of grants, pushes `init` |
//! | `POST /disconnect` | `{"gateway" or "client", "reason"}` | `disconnect`, then Close 1000 |
//! | `POST /block_forward_candidates` | [`CandidateFilter`] | which kinds of candidates pass |
//! | `POST /init` | `{"gateway" or "client"}` | pushes `init` again |
//! | `POST /push` | `{"gateway" or "client", "event", "payload"}` | pushes anything |
//! | `POST /token` | `{"token", "revoked": bool}` | makes a token invalid or valid again |
//! | `POST /clock` | `{"offset_seconds"}` | the portal's clock is wrong by that much |
//! | `POST /shutdown` | `{"code", "reason"}` (1012) | Close to all, then the process ends |
//!
//! Peers are named by id, external id or name, resources by id or name. An empty body is `{}`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::core::{CandidateFilter, Core, Expire, OperationError, ResourceChange};
use super::events::{Event, Now};
use super::faults::FaultSet;
use super::policy::{Relay, check_relays};
use super::server::Shared;
use super::store::Role;

type Reply = Result<Json<Value>, Failure>;

/// An error answer, `{"error": "…"}`.
struct Failure(StatusCode, String);

impl Failure {
    fn invalid(what: impl ToString) -> Self {
        Self(StatusCode::BAD_REQUEST, what.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(json!({"error": self.1}))).into_response()
    }
}

impl From<OperationError> for Failure {
    fn from(error: OperationError) -> Self {
        match error {
            OperationError::NotFound(what) => Self(StatusCode::NOT_FOUND, what),
            OperationError::Invalid(what) => Self(StatusCode::BAD_REQUEST, what),
        }
    }
}

pub(super) fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/state", get(state))
        .route("/events", get(events))
        .route("/faults", post(faults))
        .route("/reject", post(reject))
        .route("/resource", post(resource))
        .route("/relays", post(relays))
        .route("/expire", post(expire))
        .route("/disconnect", post(disconnect))
        .route("/block_forward_candidates", post(candidate_filter))
        .route("/init", post(init))
        .route("/push", post(push))
        .route("/token", post(token))
        .route("/clock", post(clock))
        .route("/shutdown", post(shutdown))
        .with_state(shared)
}

/// The body as JSON, whatever its declared media type; it is typed by hand more often than not.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(Failure::invalid)
}

fn done() -> Reply {
    Ok(Json(json!({"ok": true})))
}

async fn state(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(shared.with(|core, now| core.report(now)))
}

#[derive(Deserialize)]
struct EventsQuery {
    #[serde(default = "hundred")]
    n: usize,
    #[serde(default)]
    since: u64,
    kind: Option<String>,
}

fn hundred() -> usize {
    100
}

async fn events(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<EventsQuery>,
) -> Json<Vec<Event>> {
    Json(shared.with(|core, _| core.events(query.n, query.since, query.kind.as_deref())))
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Target {
    #[default]
    Gateway,
    Client,
    Both,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CloseWith {
    #[serde(default = "service_restart")]
    code: u16,
    #[serde(default)]
    reason: String,
}

/// "Service restart" in IANA's registry of close codes.
fn service_restart() -> u16 {
    1012
}

async fn faults(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    fn take<T: DeserializeOwned>(
        body: &mut Map<String, Value>,
        name: &str,
    ) -> Result<Option<T>, Failure> {
        body.remove(name)
            .map(serde_json::from_value)
            .transpose()
            .map_err(|error| Failure::invalid(format!("{name}: {error}")))
    }

    let mut body: Map<String, Value> = parse(&body)?;
    let roles: &[Role] = match take(&mut body, "role")?.unwrap_or_default() {
        Target::Gateway => &[Role::Gateway],
        Target::Client => &[Role::Client],
        Target::Both => &[Role::Gateway, Role::Client],
    };
    let clear = take(&mut body, "clear")?.unwrap_or(false);
    let close_all: Option<CloseWith> = take(&mut body, "close_all")?;
    let kill_all = take(&mut body, "kill_all")?.unwrap_or(false);
    let crash: Option<String> = take(&mut body, "crash_channel")?;
    if crash
        .as_deref()
        .is_some_and(|event| !matches!(event, "phx_close" | "phx_error"))
    {
        return Err(Failure::invalid("crash_channel: phx_close or phx_error"));
    }

    let affected = shared.with(|core, now| {
        let mut affected = 0;
        for role in roles {
            if clear || !body.is_empty() {
                let merged = merge(core, *role, clear, &body)?;
                core.set_faults(now, *role, merged);
            }
            if let Some(event) = &crash {
                affected += core.end_channels(now, *role, event);
            }
            if let Some(close) = &close_all {
                affected += core.close_all(now, Some(*role), close.code, &close.reason);
            }
            if kill_all {
                affected += core.kill_all(now, *role);
            }
        }
        Ok::<_, Failure>(affected)
    })?;
    Ok(Json(json!({"ok": true, "affected": affected})))
}

/// The faults in force, with the members of `changes` in place of what they name.
fn merge(
    core: &Core,
    role: Role,
    clear: bool,
    changes: &Map<String, Value>,
) -> Result<FaultSet, Failure> {
    let current = if clear {
        FaultSet::default()
    } else {
        core.faults().borrow().of(role).clone()
    };
    let mut merged = json!(current);
    for (name, value) in changes {
        merged[name] = value.clone();
    }
    serde_json::from_value(merged).map_err(Failure::invalid)
}

#[derive(Deserialize)]
struct Reject {
    client: String,
    resource: String,
}

async fn reject(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Reject = parse(&body)?;
    let grants = shared.with(|core, now| core.reject(now, &body.client, &body.resource))?;
    Ok(Json(json!({"ok": true, "grants": grants})))
}

async fn resource(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let change: ResourceChange = parse(&body)?;
    shared.with(|core, now| core.change_resource(now, change))?;
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Relays {
    relays: Vec<Relay>,
    #[serde(default)]
    immediate: bool,
    #[serde(default)]
    force: bool,
}

async fn relays(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Relays = parse(&body)?;
    check_relays(&body.relays).map_err(Failure::invalid)?;
    shared.with(|core, now| core.set_relays(now, body.relays, body.immediate, body.force));
    done()
}

async fn expire(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Expire = parse(&body)?;
    let grants = shared.with(|core, now| core.expire(now, &body))?;
    Ok(Json(json!({"ok": true, "grants": grants})))
}

/// One peer, named by its role.
#[derive(Deserialize)]
struct Addressed {
    gateway: Option<String>,
    client: Option<String>,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    event: String,
    #[serde(default)]
    payload: Value,
}

impl Addressed {
    fn peer(&self) -> Result<(Role, &str), Failure> {
        match (&self.gateway, &self.client) {
            (Some(gateway), None) => Ok((Role::Gateway, gateway)),
            (None, Some(client)) => Ok((Role::Client, client)),
            _ => Err(Failure::invalid("name a gateway or a client")),
        }
    }
}

async fn disconnect(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Addressed = parse(&body)?;
    let (role, peer) = body.peer()?;
    shared.with(|core, now| core.disconnect(now, role, peer, &body.reason))?;
    done()
}

async fn candidate_filter(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let filter: CandidateFilter = parse(&body)?;
    shared.with(|core, now| core.set_candidate_filter(now, filter));
    done()
}

async fn init(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Addressed = parse(&body)?;
    let (role, peer) = body.peer()?;
    shared.with(|core, now| core.repeat_init(now, role, peer))?;
    done()
}

async fn push(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Addressed = parse(&body)?;
    let (role, peer) = body.peer()?;
    shared.with(|core: &mut Core, now: Now| {
        core.push_raw(now, role, peer, &body.event, body.payload.clone())
    })?;
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    token: String,
    revoked: bool,
}

async fn token(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Token = parse(&body)?;
    shared.with(|core, now| core.set_token_revoked(now, &body.token, body.revoked));
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Clock {
    offset_seconds: i64,
}

async fn clock(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let body: Clock = parse(&body)?;
    shared.set_clock_offset(body.offset_seconds);
    done()
}

async fn shutdown(State(shared): State<Arc<Shared>>, body: Bytes) -> Reply {
    let close: CloseWith = parse(&body)?;
    shared.shut_down(close.code, &close.reason);
    done()
}
