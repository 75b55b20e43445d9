//! The HTTP interface for tests and demos.

use std::net::IpAddr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::core::ConnectOutcome;
use super::io::{Command, CoreHandle};

#[derive(Debug, Deserialize)]
struct ConnectRequest {
    resource_id: Uuid,
    /// Ask also if there is access already, as far as this side knows.
    #[serde(default)]
    again: bool,
}

#[derive(Debug, Deserialize)]
struct InjectRequest {
    /// Inner packets in hexadecimal.
    packets: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct ResolveRequest {
    domain: String,
}

#[derive(Debug, Serialize)]
struct ResolveAnswer {
    resource_id: Uuid,
    proxy_ips: Vec<IpAddr>,
}

/// `GET /status`, `POST /connect {resource_id, again}`, `POST /disconnect`, `POST /resolve {domain}`,
/// `POST /inject {packets}`.
pub fn router(core: CoreHandle) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/connect", post(connect))
        .route("/disconnect", post(disconnect))
        .route("/resolve", post(resolve))
        .route("/inject", post(inject))
        .with_state(core)
}

async fn ask<T>(
    core: &CoreHandle,
    make: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, Response> {
    let (reply, answer) = oneshot::channel();
    core.send(make(reply));
    answer
        .await
        .map_err(|_| StatusCode::SERVICE_UNAVAILABLE.into_response())
}

async fn status(State(core): State<CoreHandle>) -> Result<Response, Response> {
    let status = ask(&core, Command::Status).await?;
    Ok(Json(*status).into_response())
}

async fn connect(
    State(core): State<CoreHandle>,
    Json(request): Json<ConnectRequest>,
) -> Result<Response, Response> {
    let outcome = ask(&core, |reply| Command::Connect {
        resource: request.resource_id,
        again: request.again,
        reply,
    })
    .await?;
    let code = match outcome {
        ConnectOutcome::UnknownResource => StatusCode::NOT_FOUND,
        ConnectOutcome::Connected => StatusCode::OK,
        ConnectOutcome::Requested | ConnectOutcome::Pending => StatusCode::ACCEPTED,
    };
    Ok((code, Json(json!({"outcome": outcome}))).into_response())
}

async fn disconnect(State(core): State<CoreHandle>) -> Result<Response, Response> {
    let count = ask(&core, Command::Disconnect).await?;
    Ok(Json(json!({"disconnected": count})).into_response())
}

async fn inject(
    State(core): State<CoreHandle>,
    Json(request): Json<InjectRequest>,
) -> Result<Response, Response> {
    let packets: Result<Vec<Vec<u8>>, _> = request.packets.iter().map(hex::decode).collect();
    let Ok(packets) = packets else {
        return Ok(StatusCode::BAD_REQUEST.into_response());
    };
    let sent = ask(&core, |reply| Command::Inject(packets, reply)).await?;
    Ok(Json(json!({"sent": sent})).into_response())
}

async fn resolve(
    State(core): State<CoreHandle>,
    Json(request): Json<ResolveRequest>,
) -> Result<Response, Response> {
    let answer = ask(&core, |reply| Command::Resolve(request.domain, reply)).await?;
    Ok(match answer {
        Some((resource_id, proxy_ips)) => Json(ResolveAnswer {
            resource_id,
            proxy_ips,
        })
        .into_response(),
        None => (
            StatusCode::NOT_FOUND,
            Json(json!({"error": "no DNS resource covers this name"})),
        )
            .into_response(),
    })
}
