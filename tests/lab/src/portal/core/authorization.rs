//! Authorizations: from a client's request to the answer of both ends (portal-channel spec §7.3).

use std::time::Instant;

use rand::seq::IndexedRandom as _;
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::derive::{self, Endpoint, FIXED_EXPIRY};
use super::super::events::Now;
use super::super::ingest_token::{self, Claims, Role as TokenRole};
use super::super::policy::Resource;
use super::super::store::Grant;
use super::super::version;
use super::channel::Answer;
use super::client::may_reach;
use super::{Access, Conn, ConnId, Core, Protocol};

/// References remembered after their request ended, so that a late answer is told from a made-up
/// one.
const SETTLED: usize = 10_000;

/// A `create_authorization` that waits for its answer.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) reference: String,
    pub(super) deadline: Instant,
    started: Instant,
    client_conn: ConnId,
    client_id: Uuid,
    gateway_id: Uuid,
    resource_id: Uuid,
    /// What the client gets once the gateway has answered.
    answer: Value,
}

impl Pending {
    /// What the control API shows.
    pub(super) fn report(&self, now: Now) -> Value {
        let age = now.instant.saturating_duration_since(self.started);
        json!({
            "client_id": self.client_id,
            "gateway_id": self.gateway_id,
            "resource_id": self.resource_id,
            "age_ms": age.as_millis() as u64,
        })
    }

    fn detail(&self, now: Now) -> Value {
        let latency = now.instant.saturating_duration_since(self.started);
        json!({
            "client_id": self.client_id,
            "gateway_id": self.gateway_id,
            "resource_id": self.resource_id,
            "latency_ms": latency.as_secs_f64() * 1000.0,
        })
    }
}

impl Core {
    /// Handles a client's request for access to a resource.
    pub(super) fn authorization_requested(
        &mut self,
        now: Now,
        id: ConnId,
        resource_id: Uuid,
        preferred: &[Uuid],
    ) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let detail = json!({"client_id": conn.admission.peer, "resource_id": resource_id,
            "connected_gateway_ids": preferred});
        self.events.record(now, "authorization_requested", detail);
        if self.faults.borrow().client.drop_authorizations {
            return;
        }
        let resource = self.policy.resources.iter().find(|r| r.id == resource_id);
        let result = match resource {
            None => Err("not_found"),
            Some(resource) => self
                .choose(id, resource, preferred)
                .map(|gateway| (resource.clone(), gateway)),
        };
        match result {
            Ok((resource, gateway)) => self.authorize(now, id, gateway, &resource),
            Err(reason) => self.authorization_failed(now, id, resource_id, reason),
        }
    }

    /// The connection of the gateway that is to serve the client.
    fn choose(
        &self,
        id: ConnId,
        resource: &Resource,
        preferred: &[Uuid],
    ) -> Result<ConnId, &'static str> {
        let client = self.conns.get(&id).ok_or("offline")?;
        let Access::Client(token) = &client.admission.access else {
            return Err("forbidden");
        };
        if !may_reach(token, resource) {
            return Err("forbidden");
        }
        let site = self
            .policy
            .site(resource.site.as_deref())
            .map_err(|_| "not_found")?
            .id;
        let online: Vec<(ConnId, &Conn)> = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.joined)
            .filter(|(_, conn)| {
                matches!(conn.admission.access, Access::Gateway { site: s } if s == site)
            })
            .map(|(id, conn)| (*id, conn))
            .collect();
        if online.is_empty() {
            return Err("offline");
        }
        let client_version = client.admission.version.as_deref();
        let usable: Vec<_> = online
            .into_iter()
            .filter(|(_, conn)| {
                version::compatible(client_version, conn.admission.version.as_deref())
            })
            .collect();
        let already: Vec<_> = usable
            .iter()
            .copied()
            .filter(|(_, conn)| preferred.contains(&conn.admission.peer))
            .collect();
        let eligible = if already.is_empty() { usable } else { already };
        // Everybody is equally near here. Versions compare as text, as the portal does it.
        let newest = eligible
            .iter()
            .map(|(_, conn)| &conn.admission.version)
            .max();
        let best: Vec<_> = eligible
            .iter()
            .filter(|(_, conn)| Some(&conn.admission.version) == newest)
            .map(|(id, _)| *id)
            .collect();
        best.choose(&mut rand::rng())
            .copied()
            .ok_or("version_mismatch")
    }

    fn authorize(&mut self, now: Now, id: ConnId, gateway_conn: ConnId, resource: &Resource) {
        let (Some(client), Some(gateway)) = (self.conns.get(&id), self.conns.get(&gateway_conn))
        else {
            return;
        };
        let (client, gateway) = (&client.admission, &gateway.admission);
        let iceless =
            self.policy.iceless && self.conns[&id].iceless && self.conns[&gateway_conn].iceless;
        let (Some(client_identity), Some(gateway_identity)) = (
            self.store.identity(client.peer),
            self.store.identity(gateway.peer),
        ) else {
            return;
        };
        let client_end = Endpoint {
            id: client.peer,
            public_key: &client.public_key,
            psk_base: &client_identity.psk_base.0,
        };
        let gateway_end = Endpoint {
            id: gateway.peer,
            public_key: &gateway.public_key,
            psk_base: &gateway_identity.psk_base.0,
        };
        let preshared_key = derive::preshared_key(client_end, gateway_end);
        let (client_ice, gateway_ice) = derive::ice_credentials(client_end, gateway_end);
        let expires_at = resource
            .expires_in
            .unwrap_or(self.policy.authorization_ttl)
            .ends_at(now.unix());
        let grant = Grant {
            id: Uuid::new_v4(),
            client_id: client.peer,
            gateway_id: gateway.peer,
            resource_id: resource.id,
            expires_at,
            confirmed: false,
        };
        let actor = match &client.access {
            Access::Client(token) => token.actor.clone(),
            Access::Gateway { .. } => Default::default(),
        };
        let ends = expires_at.unwrap_or(FIXED_EXPIRY);
        let token = |role| {
            let claims = Claims {
                account_id: self.store.account_id(),
                iat: now.unix(),
                exp: ingest_token::expiry(ends),
                uploads_enabled: self.policy.flow_logs.is_some(),
                role,
                initiator_device_id: client.peer,
                responder_device_id: gateway.peer,
                policy_authorization_id: grant.id,
                // One policy per resource is all there is here.
                policy_id: resource.id,
                resource_id: resource.id,
                resource_name: resource.name.clone(),
                resource_address: resource.address.clone(),
                initiator_actor_id: actor.id,
                initiator_actor_name: actor.name.clone(),
                initiator_actor_email: actor.email.clone(),
                initiator_client_version: client.version.clone(),
                authorized_at: ingest_token::rfc3339(now.unix()),
                authorization_expires_at: ingest_token::rfc3339(ends),
            };
            ingest_token::sign(self.store.account_key(), &claims)
        };
        let reference = format!("{}.{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let (os_name, os_version) = operating_system(&client.user_agent);
        let for_gateway = json!({
            "ref": reference,
            "resource": resource.for_gateway(),
            "client": {
                "id": client.peer,
                "public_key": client.public_key,
                "preshared_key": preshared_key,
                "ipv4": client_identity.ipv4,
                "ipv6": client_identity.ipv6,
                "version": client.version,
                "device_os_name": os_name,
                "device_os_version": os_version,
                "device_serial": null,
                "device_uuid": null,
                "firebase_installation_id": null,
                "identifier_for_vendor": null,
            },
            "client_ice_credentials": client_ice,
            "gateway_ice_credentials": gateway_ice,
            "expires_at": expires_at,
            "use_iceless": iceless,
            "subject": {
                "actor_id": actor.id,
                "actor_name": actor.name,
                "actor_email": actor.email,
                "actor_type": "account_user",
                "auth_provider_id": null,
                "ip": client.remote.ip(),
                "ip_region": null,
                "ip_city": null,
                "ip_lat": null,
                "ip_lon": null,
                "user_agent": client.user_agent,
            },
            "flow_logs_ingest_token": token(TokenRole::Responder),
        });
        let site_id = match gateway.access {
            Access::Gateway { site } => site,
            Access::Client(_) => Uuid::nil(),
        };
        let for_client = json!({
            "resource_id": resource.id,
            "gateway_id": gateway.peer,
            "gateway_public_key": gateway.public_key,
            "gateway_ipv4": gateway_identity.ipv4,
            "gateway_ipv6": gateway_identity.ipv6,
            "site_id": site_id,
            "preshared_key": preshared_key,
            "client_ice_credentials": client_ice,
            "gateway_ice_credentials": gateway_ice,
            "use_iceless": iceless,
            "flow_logs_ingest_token": token(TokenRole::Initiator),
        });
        let event = match gateway.protocol {
            Protocol::V1 => "authorize_flow",
            Protocol::V2 => "create_authorization",
        };
        let pending = Pending {
            reference,
            deadline: now.instant + self.timings.authorization,
            started: now.instant,
            client_conn: id,
            client_id: client.peer,
            gateway_id: gateway.peer,
            resource_id: resource.id,
            answer: for_client,
        };
        // A newer request of the same client for the same resource replaces the older one.
        let (client_id, resource_id) = (pending.client_id, pending.resource_id);
        let replaced = self
            .pending
            .extract_if(.., |p| {
                (p.client_id, p.resource_id) == (client_id, resource_id)
            })
            .collect::<Vec<_>>();
        for old in replaced {
            self.events
                .record(now, "authorization_replaced", old.detail(now));
            self.settle(old.reference);
        }
        // Listed from now on: an `init` that overtakes the answer must not revoke the grant.
        self.store.grant(grant);
        let mut detail = pending.detail(now);
        detail["expires_at"] = json!(expires_at);
        let dropped = self.faults.borrow().gateway.drop_authorizations;
        detail["dropped"] = json!(dropped);
        self.events.record(now, "authorization_pushed", detail);
        self.pending.push(pending);
        if !dropped {
            self.push(now, gateway_conn, event, for_gateway);
        }
    }

    /// Handles a gateway's answer.
    pub(super) fn authorization_answered(
        &mut self,
        now: Now,
        id: ConnId,
        reference: &str,
    ) -> Answer {
        let gateway = self.conns.get(&id).map(|conn| conn.admission.peer);
        let position = self
            .pending
            .iter()
            .position(|p| p.reference == reference && Some(p.gateway_id) == gateway);
        let Some(position) = position else {
            if self.settled.iter().any(|settled| settled == reference) {
                let detail = json!({ "gateway_id": gateway });
                self.events
                    .record(now, "authorization_answered_late", detail);
                return Answer::Ok;
            }
            return Answer::Error("invalid_ref");
        };
        let pending = self.pending.remove(position);
        self.events
            .record(now, "authorization_answered", pending.detail(now));
        let of_request = |grant: &Grant| {
            (grant.client_id, grant.gateway_id, grant.resource_id)
                == (pending.client_id, pending.gateway_id, pending.resource_id)
        };
        self.store
            .change(of_request, |grant| grant.confirmed = true);
        // A client that has reconnected no longer waits for this.
        let client = self.conns.get(&pending.client_conn);
        if let Some(protocol) = client.filter(|c| c.joined).map(|c| c.admission.protocol) {
            let event = match protocol {
                Protocol::V1 => "flow_created",
                Protocol::V2 => "authorization_created",
            };
            self.push(now, pending.client_conn, event, pending.answer);
        }
        self.settle(pending.reference);
        Answer::Ok
    }

    /// Gives up on gateways that have not answered in time.
    pub(super) fn authorizations_due(&mut self, now: Now) {
        let late: Vec<_> = self
            .pending
            .extract_if(.., |pending| pending.deadline <= now.instant)
            .collect();
        for pending in late {
            self.authorization_failed(now, pending.client_conn, pending.resource_id, "offline");
            self.settle(pending.reference);
        }
    }

    fn settle(&mut self, reference: String) {
        self.settled.push_back(reference);
        if self.settled.len() > SETTLED {
            self.settled.pop_front();
        }
    }

    fn authorization_failed(&mut self, now: Now, id: ConnId, resource_id: Uuid, reason: &str) {
        let Some(conn) = self.conns.get(&id).filter(|conn| conn.joined) else {
            return;
        };
        let event = match conn.admission.protocol {
            Protocol::V1 => "flow_creation_failed",
            Protocol::V2 => "authorization_creation_failed",
        };
        let detail = json!({"client_id": conn.admission.peer, "resource_id": resource_id,
            "reason": reason});
        self.events.record(now, "authorization_failed", detail);
        let payload =
            json!({"resource_id": resource_id, "reason": reason, "violated_properties": []});
        self.push(now, id, event, payload);
    }
}

/// Name and version of the operating system from a user agent `<name>/<version> <component>/…`.
fn operating_system(user_agent: &str) -> (Option<&str>, Option<&str>) {
    match user_agent.split_once('/') {
        Some((name, rest)) => (Some(name), rest.split(' ').next()),
        None => (None, None),
    }
}
