//! Who gets past the upgrade (portal-channel spec §1.2, §1.3, §1.11, §2.1).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::super::events::Now;
use super::super::faults::Refusal;
use super::super::store::Role;
use super::super::version;
use super::{Access, Conn, ConnId, Core, Ending, Outgoing, Protocol, canonical};

/// With `rate_limit`, time between two connects with the same token from the same address.
const RATE_LIMIT: Duration = Duration::from_secs(1);

/// A connect, as far as the portal looks at it.
pub struct ConnectRequest {
    /// From the path.
    pub role: Role,
    /// From the path.
    pub protocol: Protocol,
    /// Who asks.
    pub remote: SocketAddr,
    /// Value of `X-Authorization`.
    pub authorization: Option<String>,
    /// Value of `User-Agent`.
    pub user_agent: String,
    /// Query parameters, decoded.
    pub params: HashMap<String, String>,
}

/// A connect that was let in.
#[derive(Debug, Clone)]
pub struct Admission {
    pub(super) role: Role,
    pub(super) protocol: Protocol,
    pub(super) remote: SocketAddr,
    pub(super) peer: Uuid,
    pub(super) name: String,
    pub(super) public_key: String,
    pub(super) user_agent: String,
    pub(super) version: Option<String>,
    pub(super) access: Access,
    pub(super) token: super::super::policy::Secret,
}

impl Core {
    /// Decides on a connect.
    ///
    /// # Errors
    /// The HTTP answer if it is refused.
    pub fn admit(&mut self, now: Now, request: ConnectRequest) -> Result<Admission, Refusal> {
        let role = request.role;
        let mut detail = json!({
            "role": role,
            "protocol": request.protocol,
            "remote": canonical(request.remote),
            "user_agent": request.user_agent,
            "external_id": external_id(&request.params),
            "name": request.params.get("name"),
        });
        let result = self.decide(now, request);
        match &result {
            Ok(admission) => {
                detail["status"] = json!(101);
                detail["peer_id"] = json!(admission.peer);
            }
            Err(refusal) => {
                detail["status"] = json!(refusal.status.as_u16());
                detail["code"] = json!(refusal.code);
                detail["retry_after"] = json!(refusal.retry_after);
            }
        }
        self.events.record(now, "connect", detail);
        result
    }

    fn decide(&mut self, now: Now, request: ConnectRequest) -> Result<Admission, Refusal> {
        let mut refusal = None;
        self.faults.send_if_modified(|faults| {
            refusal = faults.of_mut(request.role).take_refusal();
            refusal.is_some()
        });
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        if request.protocol == Protocol::V2 && self.faults.borrow().of(request.role).only_v1 {
            return Err(Refusal {
                status: StatusCode::NOT_FOUND,
                code: None,
                detail: "Not Found".to_owned(),
                retry_after: None,
            });
        }
        let old = self.faults.borrow().of(request.role).only_v1;
        let header = request.authorization.clone().filter(|_| !old);
        let token = token(header.as_deref(), &request.params).ok_or_else(|| {
            Refusal::new(
                StatusCode::UNAUTHORIZED,
                "missing_token",
                "A token is needed.",
            )
        })?;
        self.check_rate(now, request.remote, &token)?;
        let (access, owner, token) = self.authenticate(request.role, &token)?;
        let invalid = |what: &str| {
            let detail = format!("{what} is missing or invalid.");
            Refusal::new(StatusCode::BAD_REQUEST, "invalid_connect_params", &detail)
        };
        let external_id = owner
            .as_deref()
            .or_else(|| external_id(&request.params))
            .ok_or_else(|| invalid("external_id"))?;
        let public_key = request
            .params
            .get("public_key")
            .filter(|key| STANDARD.decode(key).is_ok_and(|key| key.len() == 32))
            .ok_or_else(|| invalid("public_key"))?
            .clone();
        let name = request
            .params
            .get("name")
            .filter(|name| !name.is_empty())
            .map_or(external_id, String::as_str);
        let peer = self
            .store
            .identify(request.role, external_id, name)
            .ok_or_else(|| {
                Refusal::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "unhandled_connect_error",
                    "All tunnel addresses are in use.",
                )
            })?
            .id;
        if request.role == Role::Gateway && self.online(peer).is_some() {
            return Err(Refusal::new(
                StatusCode::CONFLICT,
                "gateway_already_connected",
                "This gateway is already connected.",
            ));
        }
        Ok(Admission {
            role: request.role,
            protocol: request.protocol,
            remote: canonical(request.remote),
            peer,
            name: name.to_owned(),
            public_key,
            version: version::from_user_agent(&request.user_agent).map(str::to_owned),
            user_agent: request.user_agent,
            access,
            token,
        })
    }

    fn check_rate(&mut self, now: Now, remote: SocketAddr, token: &str) -> Result<(), Refusal> {
        if !self.policy.rate_limit {
            return Ok(());
        }
        self.admitted
            .retain(|_, last| now.instant.saturating_duration_since(*last) < RATE_LIMIT);
        let key = (canonical(remote).ip(), token.to_owned());
        if self.admitted.contains_key(&key) {
            let mut refusal = Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "rate_limit",
                "Connecting too often.",
            );
            refusal.retry_after = Some("1".to_owned());
            return Err(refusal);
        }
        self.admitted.insert(key, now.instant);
        Ok(())
    }

    /// What a token of this role allows, and the external id that it stands for, if it does.
    fn authenticate(
        &self,
        role: Role,
        token: &str,
    ) -> Result<(Access, Option<String>, super::super::policy::Secret), Refusal> {
        let invalid = || {
            Refusal::new(
                StatusCode::UNAUTHORIZED,
                "invalid_token",
                "The token is not valid.",
            )
        };
        if self.revoked_tokens.contains(token) {
            return Err(invalid());
        }
        match role {
            Role::Gateway => {
                let known = self
                    .policy
                    .gateway_tokens
                    .iter()
                    .find(|known| known.token.expose() == token)
                    .ok_or_else(invalid)?;
                let site = self.policy.site(known.site.as_deref());
                let site = site.map_err(|_| invalid())?.id;
                Ok((
                    Access::Gateway { site },
                    known.owner.clone(),
                    known.token.clone(),
                ))
            }
            Role::Client => {
                let known = self
                    .policy
                    .client_tokens
                    .iter()
                    .find(|known| known.token.expose() == token)
                    .ok_or_else(invalid)?;
                Ok((Access::Client(known.clone()), None, known.token.clone()))
            }
        }
    }

    /// Registers the connection of an admitted peer after the upgrade.
    pub fn open(
        &mut self,
        now: Now,
        admission: Admission,
        queue: mpsc::UnboundedSender<Outgoing>,
    ) -> ConnId {
        self.last_conn += 1;
        let id = self.last_conn;
        let history = self.history.entry(admission.peer).or_default();
        history.connects += 1;
        history.user_agent.clone_from(&admission.user_agent);
        history.version.clone_from(&admission.version);
        let detail = json!({"conn": id, "peer_id": admission.peer, "role": admission.role,
            "name": admission.name, "version": admission.version});
        self.conns.insert(
            id,
            Conn {
                admission,
                queue,
                joined: false,
                iceless: false,
                relays_sent: Default::default(),
                next_ref: 0,
            },
        );
        self.events.record(now, "connected", detail);
        id
    }

    /// Takes a peer offline while the closing handshake of its connection is still going on, so
    /// that it may connect again at once.
    pub fn offline(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.joined = false;
        }
    }

    /// Forgets a connection that has ended.
    pub fn closed(&mut self, now: Now, id: ConnId, ending: Ending) {
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        let peer = conn.admission.peer;
        let detail = json!({"conn": id, "peer_id": peer, "role": conn.admission.role,
            "by": ending.by, "code": ending.code, "reason": ending.reason});
        let history = self.history.entry(peer).or_default();
        if ending.by == "peer_close" {
            history.last_close_received = Some(json!({"at_ms": now.unix_ms, "code": ending.code,
                "reason": ending.reason}));
        }
        history.last_ending = Some((now.unix_ms, ending));
        self.events.record(now, "disconnected", detail);
    }
}

fn external_id(params: &HashMap<String, String>) -> Option<&str> {
    params
        .get("external_id")
        .or_else(|| params.get("firezone_id"))
        .map(String::as_str)
        .filter(|id| !id.is_empty())
}

/// The header wins over the query parameter of older peers (§1.3).
fn token(authorization: Option<&str>, params: &HashMap<String, String>) -> Option<String> {
    authorization
        .and_then(|value| value.strip_prefix("Bearer "))
        .or_else(|| params.get("token").map(String::as_str))
        .filter(|token| !token.is_empty())
        .map(str::to_owned)
}
