//! The client channel (portal-channel spec §7.2).

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::events::Now;
use super::super::policy::{ClientToken, Resource};
use super::candidates::Direction;
use super::channel::{Answer, UNKNOWN};
use super::gateway::Capabilities;
use super::{Access, ConnId, Core, Protocol};

#[derive(Deserialize)]
struct Request {
    resource_id: Uuid,
    #[serde(default)]
    connected_gateway_ids: Vec<Uuid>,
}

#[derive(Deserialize)]
struct Candidates {
    gateway_id: Uuid,
    candidates: Vec<String>,
}

impl Core {
    pub(super) fn handle_client(
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
            ("request_authorization", Protocol::V2) | ("create_flow", Protocol::V1) => {
                match serde_json::from_value::<Request>(payload) {
                    Ok(request) => {
                        self.authorization_requested(
                            now,
                            id,
                            request.resource_id,
                            &request.connected_gateway_ids,
                        );
                        Answer::Silence
                    }
                    Err(_) => UNKNOWN,
                }
            }
            ("new_gateway_ice_candidates", _) => {
                self.candidates_for_gateway(now, id, "ice_candidates", payload)
            }
            ("invalidate_gateway_ice_candidates", _) => {
                self.candidates_for_gateway(now, id, "invalidate_ice_candidates", payload)
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
            _ => UNKNOWN,
        }
    }

    fn candidates_for_gateway(
        &mut self,
        now: Now,
        id: ConnId,
        event: &str,
        payload: Value,
    ) -> Answer {
        let Ok(message) = serde_json::from_value::<Candidates>(payload) else {
            return UNKNOWN;
        };
        let Some(client_id) = self.conns.get(&id).map(|conn| conn.admission.peer) else {
            return Answer::Silence;
        };
        self.forward(
            now,
            Direction::ToGateway,
            (client_id, message.gateway_id),
            event,
            message.candidates,
        );
        Answer::Silence
    }

    /// Payload of `init`.
    pub(super) fn client_init(&mut self, now: Now, id: ConnId) -> Option<Value> {
        let conn = self.conns.get(&id)?;
        let Access::Client(token) = &conn.admission.access else {
            return None;
        };
        let identity = self.store.identity(conn.admission.peer)?;
        let upstream: Vec<_> = self
            .policy
            .dns
            .upstream_do53
            .iter()
            .map(|ip| json!({ "ip": ip }))
            .collect();
        let interface = json!({
            "ipv4": identity.ipv4,
            "ipv6": identity.ipv6,
            "upstream_do53": upstream,
            "upstream_doh": [],
            "upstream_dns": [],
            "search_domain": self.policy.dns.search_domain,
        });
        let resources: Vec<_> = self
            .policy
            .resources
            .iter()
            .filter(|resource| may_reach(token, resource))
            .filter_map(|resource| self.client_view(resource))
            .collect();
        Some(json!({
            "interface": interface,
            "resources": resources,
            "relays": self.hand_out_relays(now, id),
            "authorizations": [],
            "flow_logs": {
                "api_url": "https://logs.example.net/",
                "upload_interval_secs": 0,
                "upload_batch_size": 0,
            },
        }))
    }

    /// The resource as clients see it.
    pub(super) fn client_view(&self, resource: &Resource) -> Option<Value> {
        let site = self.policy.site(resource.site.as_deref()).ok()?;
        Some(resource.for_client(site))
    }
}

/// Whether the policy lets the holder of this token reach a resource.
pub(super) fn may_reach(token: &ClientToken, resource: &Resource) -> bool {
    token
        .resources
        .as_ref()
        .is_none_or(|allowed| allowed.iter().any(|key| resource.is(key)))
}
