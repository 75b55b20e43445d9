//! What the control API can do to the portal's peers and data.

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::events::Now;
use super::super::faults::FaultSet;
use super::super::policy::{Filter, Resource};
use super::super::store::{Grant, Role};
use super::client::may_reach;
use super::{Access, ConnId, Core, Outgoing};

/// Why an operation was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperationError {
    /// What it names does not exist (or is not online).
    NotFound(String),
    /// It contradicts itself or the policy.
    Invalid(String),
}

/// A change to a resource.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResourceChange {
    /// New filters for an existing resource.
    SetFilters {
        /// Name or id.
        resource: String,
        /// The whole new list.
        filters: Vec<Filter>,
    },
    /// A new resource, or all of an existing one.
    Upsert(Resource),
    /// Takes a resource (name or id) and all grants for it away.
    Remove(String),
}

/// Moves the end of grants.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Expire {
    /// Only grants of this client (id, external id or name).
    pub client: Option<String>,
    /// Only grants through this gateway (id, external id or name).
    pub gateway: Option<String>,
    /// Only grants for this resource (id or name).
    pub resource: Option<String>,
    /// Seconds from now; 0 ends them at once.
    pub in_seconds: u64,
    /// Do not tell the gateways with a new `init`; they learn of it at the next join.
    pub silent: bool,
}

impl Core {
    /// Takes grants back and tells their gateways (§4.5); returns how many there were.
    ///
    /// # Errors
    /// If the client or resource does not exist.
    pub fn reject(
        &mut self,
        now: Now,
        client: &str,
        resource: &str,
    ) -> Result<usize, OperationError> {
        let client_id = self.peer(Role::Client, client)?;
        let resource_id = self.resource_id(resource)?;
        let matches =
            |grant: &Grant| grant.client_id == client_id && grant.resource_id == resource_id;
        Ok(self.revoke(now, matches))
    }

    fn revoke(&mut self, now: Now, which: impl Fn(&Grant) -> bool) -> usize {
        let taken = self.store.take(which);
        for grant in &taken {
            let detail = json!({"client_id": grant.client_id, "gateway_id": grant.gateway_id,
                "resource_id": grant.resource_id});
            self.events.record(now, "access_rejected", detail);
            if let Some(id) = self.online(grant.gateway_id) {
                let payload =
                    json!({"client_id": grant.client_id, "resource_id": grant.resource_id});
                self.push(now, id, "reject_access", payload);
            }
        }
        taken.len()
    }

    /// Changes a resource and tells gateways and clients (§4.5, §7.2).
    ///
    /// # Errors
    /// If there is no such resource, or the new one is not valid.
    pub fn change_resource(
        &mut self,
        now: Now,
        change: ResourceChange,
    ) -> Result<(), OperationError> {
        let (old, new) = match change {
            ResourceChange::SetFilters { resource, filters } => {
                let id = self.resource_id(&resource)?;
                let old = self.policy.resources.iter().find(|r| r.id == id).cloned();
                let new = old.clone().map(|old| Resource { filters, ..old });
                (old, new)
            }
            ResourceChange::Upsert(new) => {
                let old = self.policy.resources.iter().find(|r| r.id == new.id);
                (old.cloned(), Some(new))
            }
            ResourceChange::Remove(key) => {
                let id = self.resource_id(&key)?;
                let old = self.policy.resources.iter().find(|r| r.id == id);
                (old.cloned(), None)
            }
        };
        let new = new
            .map(|new| self.policy.checked(new))
            .transpose()
            .map_err(|error| OperationError::Invalid(format!("{error:#}")))?;
        let Some(id) = new.as_ref().or(old.as_ref()).map(|r| r.id) else {
            return Ok(());
        };
        // Anything beyond filters and names takes the grants back first.
        let breaking = match (&old, &new) {
            (Some(old), Some(new)) => old.differs_in_kind(new),
            (Some(_), None) => true,
            (None, _) => false,
        };
        let resources = &mut self.policy.resources;
        match (resources.iter().position(|r| r.id == id), new.clone()) {
            (Some(index), Some(new)) => resources[index] = new,
            (Some(index), None) => drop(resources.remove(index)),
            (None, Some(new)) => resources.push(new),
            (None, None) => {}
        }
        let detail = json!({"resource_id": id, "added": old.is_none(), "removed": new.is_none(),
            "breaking": breaking});
        self.events.record(now, "resource_changed", detail);
        if breaking {
            self.revoke(now, |grant| grant.resource_id == id);
        }
        if let (Some(_), Some(new), false) = (&old, &new, breaking) {
            self.push_resource_updated(now, &new.for_gateway());
        }
        self.tell_clients(now, old.as_ref(), new.as_ref(), breaking);
        Ok(())
    }

    fn tell_clients(
        &mut self,
        now: Now,
        old: Option<&Resource>,
        new: Option<&Resource>,
        breaking: bool,
    ) {
        let view = new.and_then(|new| self.client_view(new));
        for conn_id in self.joined(Role::Client) {
            let (had, has) = match self.conns.get(&conn_id).map(|c| &c.admission.access) {
                Some(Access::Client(token)) => (
                    old.is_some_and(|old| may_reach(token, old)),
                    new.is_some_and(|new| may_reach(token, new)),
                ),
                _ => continue,
            };
            if let Some(old) = old.filter(|_| had && (breaking || !has)) {
                self.push(now, conn_id, "resource_deleted", json!(old.id));
            }
            if let Some(view) = view.as_ref().filter(|_| has) {
                self.push(now, conn_id, "resource_created_or_updated", view.clone());
            }
        }
    }

    /// Moves the end of grants and tells their gateways by a new `init` (§4.5); returns how many
    /// there were.
    ///
    /// # Errors
    /// If a client, gateway or resource that it names does not exist.
    pub fn expire(&mut self, now: Now, expire: &Expire) -> Result<usize, OperationError> {
        let client = expire.client.as_deref();
        let client = client.map(|c| self.peer(Role::Client, c)).transpose()?;
        let gateway = expire.gateway.as_deref();
        let gateway = gateway.map(|g| self.peer(Role::Gateway, g)).transpose()?;
        let resource = expire.resource.as_deref();
        let resource = resource.map(|r| self.resource_id(r)).transpose()?;
        let expires_at = now.unix().saturating_add(expire.in_seconds);
        let changed = self.store.change(
            |grant| {
                client.is_none_or(|id| id == grant.client_id)
                    && gateway.is_none_or(|id| id == grant.gateway_id)
                    && resource.is_none_or(|id| id == grant.resource_id)
            },
            |grant| grant.expires_at = Some(expires_at),
        );
        let detail = json!({"grants": changed.len(), "expires_at": expires_at,
            "silent": expire.silent});
        self.events.record(now, "grants_expire", detail);
        if !expire.silent {
            let mut gateways: Vec<_> = changed.iter().map(|grant| grant.gateway_id).collect();
            gateways.sort_unstable();
            gateways.dedup();
            for gateway in gateways {
                if let Some(id) = self.online(gateway) {
                    self.push_init(now, id);
                }
            }
        }
        Ok(changed.len())
    }

    /// Pushes `init` once more (§4.3).
    ///
    /// # Errors
    /// If the peer is not online.
    pub fn repeat_init(&mut self, now: Now, role: Role, peer: &str) -> Result<(), OperationError> {
        let id = self.online_peer(role, peer)?;
        self.push_init(now, id);
        Ok(())
    }

    /// Pushes any event with any payload, to see how a peer takes it.
    ///
    /// # Errors
    /// If the peer is not online.
    pub fn push_raw(
        &mut self,
        now: Now,
        role: Role,
        peer: &str,
        event: &str,
        payload: Value,
    ) -> Result<(), OperationError> {
        let id = self.online_peer(role, peer)?;
        self.push(now, id, event, payload);
        Ok(())
    }

    /// Pushes `disconnect` with a reason and closes the socket (§1.10).
    ///
    /// # Errors
    /// If the peer is not online.
    pub fn disconnect(
        &mut self,
        now: Now,
        role: Role,
        peer: &str,
        reason: &str,
    ) -> Result<(), OperationError> {
        let id = self.online_peer(role, peer)?;
        self.disconnect_conn(now, id, reason);
        Ok(())
    }

    fn disconnect_conn(&mut self, now: Now, id: ConnId, reason: &str) {
        self.push(now, id, "disconnect", json!({ "reason": reason }));
        self.close(now, id, 1000, "");
    }

    /// Makes a token invalid, with the consequences for its connections (§1.10), or valid again.
    pub fn set_token_revoked(&mut self, now: Now, token: &str, revoked: bool) {
        self.events
            .record(now, "token", json!({ "revoked": revoked }));
        if !revoked {
            self.revoked_tokens.remove(token);
            return;
        }
        self.revoked_tokens.insert(token.to_owned());
        let affected: Vec<_> = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.joined && conn.admission.token.expose() == token)
            .map(|(id, _)| *id)
            .collect();
        for id in affected {
            self.disconnect_conn(now, id, "token_expired");
        }
    }

    /// Puts faults in force in place of all earlier ones.
    pub fn set_faults(&mut self, now: Now, role: Role, faults: FaultSet) {
        self.events
            .record(now, "faults", json!({"role": role, "faults": faults}));
        self.faults
            .send_modify(|current| *current.of_mut(role) = faults);
    }

    /// Ends channels with `phx_close` or `phx_error` but leaves the sockets open (§1.10); returns
    /// how many there were.
    pub fn end_channels(&mut self, now: Now, role: Role, event: &str) -> usize {
        let ids = self.joined(role);
        for id in &ids {
            self.push(now, *id, event, json!({}));
            self.leave(now, *id, event);
        }
        ids.len()
    }

    /// Closes all sockets of a role (both if `None`) with a Close frame; returns how many.
    pub fn close_all(&mut self, now: Now, role: Option<Role>, code: u16, reason: &str) -> usize {
        let ids = self.of_role(role);
        for id in &ids {
            self.close(now, *id, code, reason);
        }
        ids.len()
    }

    /// Ends all connections of a role without a Close frame; returns how many.
    pub fn kill_all(&mut self, now: Now, role: Role) -> usize {
        let ids = self.of_role(Some(role));
        for id in &ids {
            if let Some(conn) = self.conns.get_mut(id) {
                conn.joined = false;
                let _ = conn.queue.send(Outgoing::Kill);
            }
        }
        let detail = json!({"role": role, "connections": ids.len()});
        self.events.record(now, "killed", detail);
        ids.len()
    }

    fn of_role(&self, role: Option<Role>) -> Vec<ConnId> {
        self.conns
            .iter()
            .filter(|(_, conn)| role.is_none_or(|role| role == conn.role()))
            .map(|(id, _)| *id)
            .collect()
    }

    fn peer(&self, role: Role, key: &str) -> Result<Uuid, OperationError> {
        self.store
            .find(role, key)
            .map(|identity| identity.id)
            .ok_or_else(|| OperationError::NotFound(format!("no {} {key:?}", role.topic())))
    }

    fn online_peer(&self, role: Role, key: &str) -> Result<ConnId, OperationError> {
        let peer = self.peer(role, key)?;
        self.online(peer).ok_or_else(|| {
            OperationError::NotFound(format!("{} {key:?} is not online", role.topic()))
        })
    }

    /// The id of a resource given by name or id.
    fn resource_id(&self, key: &str) -> Result<Uuid, OperationError> {
        self.policy
            .resource(key)
            .map(|resource| resource.id)
            .ok_or_else(|| OperationError::NotFound(format!("no resource {key:?}")))
    }
}
