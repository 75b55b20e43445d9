//! The state as the control API shows it; without secrets.

use serde_json::{Value, json};

use super::super::events::Now;
use super::super::store::{Identity, Role};
use super::{Access, Core, Protocol};

impl Core {
    /// Everything there is to see.
    pub fn report(&self, now: Now) -> Value {
        let of_role = |role| -> Vec<_> {
            self.store
                .identities()
                .iter()
                .filter(|identity| identity.role == role)
                .map(|identity| self.peer_report(identity))
                .collect()
        };
        let grants: Vec<_> = self
            .store
            .grants()
            .iter()
            .map(|grant| {
                let mut value = json!(grant);
                value["valid"] = json!(grant.valid(now.unix()));
                value
            })
            .collect();
        let resources: Vec<_> = self
            .policy
            .resources
            .iter()
            .map(|r| r.for_gateway())
            .collect();
        let relays: Vec<_> = self
            .relays
            .iter()
            .map(|relay| json!({"id": relay.id, "v4": relay.v4, "v6": relay.v6}))
            .collect();
        let pending: Vec<_> = self.pending.iter().map(|p| p.report(now)).collect();
        json!({
            "now_ms": now.unix_ms,
            "gateways": of_role(Role::Gateway),
            "clients": of_role(Role::Client),
            "grants": grants,
            "pending": pending,
            "resources": resources,
            "relays": relays,
            "candidate_filter": self.candidate_filter,
            "faults": *self.faults.borrow(),
        })
    }

    fn peer_report(&self, identity: &Identity) -> Value {
        let online = self
            .online(identity.id)
            .and_then(|id| self.conns.get(&id).map(|conn| (id, conn)));
        let history = self.history.get(&identity.id);
        let sockets = self
            .conns
            .values()
            .filter(|conn| conn.admission.peer == identity.id)
            .count();
        let ending = history.and_then(|history| {
            history.last_ending.as_ref().map(|(at_ms, ending)| {
                let mut value = json!(ending);
                value["at_ms"] = json!(at_ms);
                value
            })
        });
        let site = online.and_then(|(_, conn)| match conn.admission.access {
            Access::Gateway { site } => Some(site),
            Access::Client(_) => None,
        });
        let protocol: Option<Protocol> = online.map(|(_, conn)| conn.admission.protocol);
        json!({
            "id": identity.id,
            "external_id": identity.external_id,
            "name": identity.name,
            "public_key": identity.public_key,
            "ipv4": identity.ipv4,
            "ipv6": identity.ipv6,
            "online": online.is_some(),
            "conn": online.map(|(id, _)| id),
            "sockets": sockets,
            "remote": online.map(|(_, conn)| conn.admission.remote),
            "site_id": site,
            "protocol": protocol,
            "iceless": online.map(|(_, conn)| conn.iceless),
            "relays_sent": online.map(|(_, conn)| &conn.relays_sent),
            "user_agent": history.map(|h| &h.user_agent),
            "version": history.and_then(|h| h.version.as_ref()),
            "connects": history.map_or(0, |h| h.connects),
            "joins": history.map_or(0, |h| h.joins),
            "heartbeats": history.map_or(0, |h| h.heartbeats),
            "last_frame_ms": history.and_then(|h| h.last_frame_ms),
            "joined_at_ms": history.and_then(|h| h.joined_at_ms),
            "last_close_received": history.and_then(|h| h.last_close_received.as_ref()),
            "last_ending": ending,
            "violations": history.map(|h| &h.violations),
            "messages": history.map(|h| &h.messages),
        })
    }
}
