//! The gateway channel (portal-channel spec §4).

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::events::Now;
use super::super::store::Role;
use super::candidates::Direction;
use super::channel::{Answer, UNKNOWN};
use super::{ConnId, Core, Protocol};

#[derive(Deserialize)]
struct Answered {
    #[serde(rename = "ref")]
    reference: String,
}

#[derive(Deserialize)]
struct Broadcast {
    client_ids: Vec<Uuid>,
    candidates: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct Capabilities {
    pub(super) iceless: bool,
}

impl Core {
    pub(super) fn handle_gateway(
        &mut self,
        now: Now,
        id: ConnId,
        event: &str,
        payload: Value,
    ) -> Answer {
        let Some(conn) = self.conns.get_mut(&id) else {
            return Answer::Silence;
        };
        match (event, conn.admission.protocol) {
            ("authorization_created", Protocol::V2) | ("flow_authorized", Protocol::V1) => {
                match serde_json::from_value::<Answered>(payload) {
                    Ok(answered) => self.authorization_answered(now, id, &answered.reference),
                    Err(_) => UNKNOWN,
                }
            }
            ("broadcast_ice_candidates", _) => self.broadcast(now, id, "ice_candidates", payload),
            ("broadcast_invalidated_ice_candidates", _) => {
                self.broadcast(now, id, "invalidate_ice_candidates", payload)
            }
            ("set_snownet_capabilities", _) => {
                match serde_json::from_value::<Capabilities>(payload) {
                    Ok(capabilities) => {
                        conn.iceless = capabilities.iceless;
                        Answer::Silence
                    }
                    Err(_) => UNKNOWN,
                }
            }
            ("no_relays", _) => {
                self.no_relays(now, id);
                Answer::Silence
            }
            // Only clients older than anything here get to see it.
            ("connection_ready", _) => Answer::Ok,
            _ => UNKNOWN,
        }
    }

    fn broadcast(&mut self, now: Now, id: ConnId, event: &str, payload: Value) -> Answer {
        let Ok(broadcast) = serde_json::from_value::<Broadcast>(payload) else {
            return UNKNOWN;
        };
        let Some(gateway_id) = self.conns.get(&id).map(|conn| conn.admission.peer) else {
            return Answer::Silence;
        };
        for client_id in broadcast.client_ids {
            self.forward(
                now,
                Direction::ToClient,
                (gateway_id, client_id),
                event,
                broadcast.candidates.clone(),
            );
        }
        Answer::Silence
    }

    /// Payload of `init` (§4.3).
    pub(super) fn gateway_init(&mut self, now: Now, id: ConnId) -> Option<Value> {
        let conn = self.conns.get(&id)?;
        let identity = self.store.identity(conn.admission.peer)?;
        let authorizations: Vec<_> = self
            .store
            .grants_of_gateway(identity.id, now.unix())
            .into_iter()
            .map(|grant| {
                json!({
                    "client_id": grant.client_id,
                    "resource_id": grant.resource_id,
                    "expires_at": grant.expires_at,
                })
            })
            .collect();
        let uploads = self.policy.flow_logs.clone();
        let interface = json!({"ipv4": identity.ipv4, "ipv6": identity.ipv6});
        Some(json!({
            "interface": interface,
            "config": {"ipv4_masquerade_enabled": true, "ipv6_masquerade_enabled": true},
            "account_slug": self.policy.account_slug,
            "relays": self.hand_out_relays(now, id),
            "authorizations": authorizations,
            "flow_logs": {
                "api_url": uploads.as_ref().map_or("https://logs.example.net/", |u| u.api_url.as_str()),
                "upload_interval_secs": uploads.as_ref().map_or(0, |u| u.interval),
                "upload_batch_size": 1000,
            },
        }))
    }

    /// Tells every gateway about a resource, whether it serves it or not (§4.5).
    pub(super) fn push_resource_updated(&mut self, now: Now, resource: &Value) {
        for id in self.joined(Role::Gateway) {
            self.push(now, id, "resource_updated", resource.clone());
        }
    }
}
