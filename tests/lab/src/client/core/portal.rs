//! What the portal says, and what becomes of it.

use super::*;

impl Core {
    /// The topic was joined: messages reach the portal from here on.
    pub fn handle_portal_up(&mut self, now: Instant) {
        self.io.portal_up = true;
        self.portal.connected = true;
        self.portal.joins += 1;
        self.last_no_relays = None;
        self.io
            .egress
            .push_back(Egress::SetSnownetCapabilities { iceless: false });
        // What could not be signalled meanwhile.
        self.sync_all(now);
        let waiting: Vec<Uuid> = self
            .pending
            .iter()
            .filter(|(_, p)| !p.buffered.is_empty())
            .map(|(id, _)| *id)
            .collect();
        for resource in waiting {
            self.request(now, resource);
        }
    }

    /// The portal is out of reach; connections carry on.
    pub fn handle_portal_down(&mut self, reason: String) {
        self.io.portal_up = false;
        self.portal.connected = false;
        self.portal.last_error = Some(reason);
        self.io.egress.clear();
    }

    /// A message of the portal.
    pub fn handle_portal(&mut self, now: Instant, message: Ingress) {
        match message {
            Ingress::Init(init) => {
                self.interface = Some(init.interface);
                let fresh: BTreeMap<Uuid, Resource> =
                    init.resources.into_iter().map(|r| (r.id, r)).collect();
                let gone: Vec<Uuid> = self
                    .resources
                    .keys()
                    .filter(|id| !fresh.contains_key(id))
                    .copied()
                    .collect();
                for id in gone {
                    self.remove_resource(now, id);
                }
                for resource in fresh.into_values() {
                    self.upsert_resource(now, resource);
                }
                self.io.relays.upsert(now, &init.relays);
                self.update_network();
                self.request_wanted(now);
            }
            Ingress::ConfigChanged(interface) => {
                self.interface = Some(interface);
                self.update_network();
            }
            Ingress::RelaysPresence {
                disconnected_ids,
                connected,
            } => {
                self.io.relays.remove(&disconnected_ids);
                self.io.relays.upsert(now, &connected);
            }
            Ingress::ResourceUpserted(resource) => {
                self.upsert_resource(now, resource);
                self.update_network();
            }
            Ingress::ResourceDeleted(id) => {
                self.remove_resource(now, id);
                self.update_network();
            }
            Ingress::AuthorizationCreated(grant) => self.handle_grant(now, &grant),
            Ingress::AuthorizationFailed {
                resource_id,
                reason,
            } => {
                tracing::warn!(resource = %resource_id, reason, "authorization refused");
                self.io.counters.authorizations_failed += 1;
                self.refused.insert(resource_id, reason);
                if let Some(pending) = self.pending.get_mut(&resource_id) {
                    pending.buffered.clear();
                }
            }
            Ingress::IceCandidates {
                gateway_id,
                candidates,
            } => {
                let Some(connection) = self.connections.get_mut(&gateway_id) else {
                    self.io.counters.candidates_for_unknown_gateway += candidates.len() as u64;
                    return;
                };
                connection.wake(now);
                let mut added = Vec::new();
                for line in &candidates {
                    if let Some(candidate) = candidate::parse(line) {
                        added.extend(connection.add_remote(candidate));
                    }
                }
                self.io.reach_remotes(now, connection, &added);
                connection.agent.handle_timeout(now);
                self.io.drive(now, connection);
            }
            Ingress::InvalidateIceCandidates {
                gateway_id,
                candidates,
            } => {
                let Some(connection) = self.connections.get_mut(&gateway_id) else {
                    self.io.counters.candidates_for_unknown_gateway += candidates.len() as u64;
                    return;
                };
                connection.wake(now);
                for candidate in candidates.iter().filter_map(|line| candidate::parse(line)) {
                    connection.remove_remote(&candidate);
                }
                connection.agent.handle_timeout(now);
                self.io.drive(now, connection);
            }
        }
        let io = &mut self.io;
        io.relays.handle_timeout(now, &mut io.transmits);
        self.after_relays(now);
    }

    fn upsert_resource(&mut self, now: Instant, resource: Resource) {
        let moved = self
            .resources
            .get(&resource.id)
            .is_some_and(|known| known.kind != resource.kind);
        if moved {
            // Another address is another grant.
            self.remove_resource(now, resource.id);
        }
        self.resources.insert(resource.id, resource);
    }

    fn remove_resource(&mut self, now: Instant, id: Uuid) {
        self.resources.remove(&id);
        self.pending.remove(&id);
        self.refused.remove(&id);
        if let Some(gateway) = self.by_resource.remove(&id)
            && let Some(connection) = self.connections.get_mut(&gateway)
        {
            connection.resources.remove(&id);
            if connection.resources.is_empty() {
                self.say_goodbye(now, gateway);
            }
        }
    }

    fn update_network(&mut self) {
        let Some(interface) = self.interface else {
            return;
        };
        let mut routes = BTreeSet::from(tunnel_ranges());
        let mut default_route = false;
        for resource in self.resources.values() {
            match &resource.kind {
                ResourceKind::Cidr(network) => {
                    routes.insert(*network);
                }
                ResourceKind::Dns(_) => routes.extend(proxy_ranges()),
                ResourceKind::Internet => default_route |= self.io.config.internet,
            }
        }
        let wanted = NetworkConfig {
            interface,
            routes,
            default_route,
        };
        if self.network.as_ref() != Some(&wanted) {
            self.network = Some(wanted);
            self.network_dirty = true;
        }
    }

    fn handle_grant(&mut self, now: Instant, grant: &AuthorizationCreated) {
        self.io.counters.authorizations_created += 1;
        let id = grant.gateway_id;
        if grant.use_iceless {
            tracing::error!(gateway = %id, "the portal asked for ICE-less path finding, which was not offered");
            return;
        }
        self.refused.remove(&grant.resource_id);
        self.wanted.remove(&grant.resource_id);
        let buffered = self
            .pending
            .remove(&grant.resource_id)
            .map(|p| p.buffered)
            .unwrap_or_default();
        if self.connections.get(&id).is_some_and(|c| !c.matches(grant)) {
            tracing::info!(gateway = %id, "connection replaced");
            self.forget(id);
        }
        if !self.connections.contains_key(&id) {
            tracing::info!(gateway = %id, resource = %grant.resource_id, "new connection");
            let index = self.fresh_index();
            let connection = Connection::new(now, &self.private_key, grant, index);
            self.connections.insert(id, connection);
        }
        self.by_resource.insert(grant.resource_id, id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.resources.insert(grant.resource_id);
            connection.ipv4 = grant.gateway_ipv4;
            connection.ipv6 = grant.gateway_ipv6;
            connection.wake(now);
            // An upsert signals everything again (§2.7).
            connection.signalled.clear();
            self.io.sync_candidates(now, connection);
            self.io.drive(now, connection);
        }
        for packet in buffered {
            self.handle_tun_packet(now, &packet);
        }
    }
}
