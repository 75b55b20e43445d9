//! Who may reach what: grants from the portal, their expiry, and the policy snapshots that the
//! data path works with (data-path spec §5.3 to §5.6, portal-channel spec §4.4 and §4.5).
//!
//! [`Access`] is a state machine without clock or I/O. Call its methods, then drain
//! [`Access::poll_event`] until it is empty, then arm a timer for [`Access::poll_timeout`].

mod expiry;
mod filter;
mod policy;
pub mod ranges;
mod verdict;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use policy::{ClientPolicy, DNS_PORT, TunnelAddresses};
pub use verdict::{DropReason, Reply, Verdict};

use crate::admin::model::GrantStatus;
use crate::ids::{ClientId, ResourceId};
use crate::portal::messages::{AuthorizationEntry, ClientPeer, Resource};
use expiry::{Expiry, UnixClock};

/// What changed; to be drained after every call that may change something.
#[derive(Debug, Clone)]
pub enum AccessEvent {
    /// A client has a new policy, which replaces any earlier one.
    PolicyChanged {
        /// Whose.
        client: ClientId,
        /// The policy.
        policy: Arc<ClientPolicy>,
    },
    /// A client has no access any more; everything kept for it is to be dropped.
    ClientRemoved {
        /// Who.
        client: ClientId,
        /// Why.
        cause: RemovalCause,
    },
}

/// Why a client lost all access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemovalCause {
    /// The portal rejected its last grant.
    Rejected,
    /// Its last grant expired.
    Expired,
    /// None of its grants is in the portal's list any more.
    Resync,
    /// Its tunnel addresses changed; a [`AccessEvent::PolicyChanged`] with the new ones follows.
    AddressesChanged,
    /// Another client was given one of its tunnel addresses.
    AddressTaken,
    /// [`Access::remove_client`] or [`Access::remove_all`] was called.
    Requested,
}

impl RemovalCause {
    /// A stable name for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            RemovalCause::Rejected => "rejected",
            RemovalCause::Expired => "expired",
            RemovalCause::Resync => "resync",
            RemovalCause::AddressesChanged => "addresses_changed",
            RemovalCause::AddressTaken => "address_taken",
            RemovalCause::Requested => "requested",
        }
    }
}

/// What [`Access::poll_timeout`] waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessTimer {
    /// A grant ends.
    GrantExpiry,
}

/// All grants of all clients.
#[derive(Debug)]
pub struct Access {
    clock: UnixClock,
    gateway: Option<TunnelAddresses>,
    clients: BTreeMap<ClientId, Client>,
    by_address: HashMap<IpAddr, ClientId>,
    /// One entry per grant that ends, soonest first.
    deadlines: BTreeSet<(Instant, ClientId, ResourceId)>,
    events: VecDeque<AccessEvent>,
}

#[derive(Debug)]
struct Client {
    addresses: TunnelAddresses,
    grants: BTreeMap<ResourceId, Grant>,
    policy: Arc<ClientPolicy>,
}

#[derive(Debug)]
struct Grant {
    resource: Resource,
    /// As the portal said it, Unix seconds.
    expires_at: Option<u64>,
    expires: Expiry,
}

impl Access {
    /// No grants. `now` and `unix_now` (time since the Unix epoch) are one simultaneous reading of
    /// the two clocks; it maps the portal's time stamps to deadlines.
    pub fn new(now: Instant, unix_now: Duration) -> Self {
        Self {
            clock: UnixClock::new(now, unix_now),
            gateway: None,
            clients: BTreeMap::new(),
            by_address: HashMap::new(),
            deadlines: BTreeSet::new(),
            events: VecDeque::new(),
        }
    }

    /// Tells the gateway's own tunnel addresses, from `init`.
    pub fn set_gateway_addresses(&mut self, v4: Ipv4Addr, v6: Ipv6Addr) {
        let addresses = Some(TunnelAddresses { ipv4: v4, ipv6: v6 });
        if self.gateway == addresses {
            return;
        }
        self.gateway = addresses;
        for client in self.client_ids() {
            self.publish(client);
        }
    }

    /// Grants a client access to a resource until `expires_at` (Unix seconds; `None` never ends).
    /// A repeated grant replaces the earlier one, its filters and its expiry.
    ///
    /// A grant whose time is past is taken in and removed by the next [`Self::handle_timeout`]; it
    /// permits nothing meanwhile. Other addresses than before replace everything known of the
    /// client. A client that holds one of the addresses is removed: the portal gives an address to
    /// one client at a time, so the older grant is a leftover.
    pub fn authorize(
        &mut self,
        now: Instant,
        client: &ClientPeer,
        resource: Resource,
        expires_at: Option<u64>,
    ) {
        let id = client.id;
        let addresses = TunnelAddresses {
            ipv4: client.ipv4,
            ipv6: client.ipv6,
        };
        if self
            .clients
            .get(&id)
            .is_some_and(|c| c.addresses != addresses)
        {
            self.drop_client(id, RemovalCause::AddressesChanged);
        }
        for address in [addresses.ipv4.into(), addresses.ipv6.into()] {
            match self.by_address.get(&address) {
                Some(&holder) if holder != id => {
                    tracing::warn!(%address, client = %id, %holder, "tunnel address was given to another client");
                    self.drop_client(holder, RemovalCause::AddressTaken);
                }
                _ => {}
            }
        }

        let resource_id = resource.id();
        let grant = Grant {
            expires: self.clock.expiry(expires_at),
            expires_at,
            resource,
        };
        tracing::info!(
            client = %id,
            resource = %resource_id,
            expires_in = ?grant.expires.instant().map(|at| at.saturating_duration_since(now)),
            "access granted"
        );
        let entry = self.clients.entry(id).or_insert_with(|| {
            self.by_address.insert(addresses.ipv4.into(), id);
            self.by_address.insert(addresses.ipv6.into(), id);
            Client {
                addresses,
                grants: BTreeMap::new(),
                policy: Arc::new(ClientPolicy::new(id, addresses, None, std::iter::empty())),
            }
        });
        if let Some(at) = grant.expires.instant() {
            self.deadlines.insert((at, id, resource_id));
        }
        let new_expiry = grant.expires;
        if let Some(old) = entry.grants.insert(resource_id, grant)
            && old.expires != new_expiry
            && let Some(at) = old.expires.instant()
        {
            self.deadlines.remove(&(at, id, resource_id));
        }
        self.publish(id);
    }

    /// Takes over new filters of a resource for every client that holds it. Name, address and type
    /// stay as they were granted; a resource of another type is ignored.
    pub fn update_resource(&mut self, resource: &Resource) {
        let id = resource.id();
        let mut changed = Vec::new();
        for (client, state) in &mut self.clients {
            let Some(grant) = state.grants.get_mut(&id) else {
                continue;
            };
            let (held, new) = match (&mut grant.resource, resource) {
                (Resource::Cidr(held), Resource::Cidr(new)) => (&mut held.filters, &new.filters),
                (Resource::Dns(held), Resource::Dns(new)) => (&mut held.filters, &new.filters),
                (Resource::Internet { .. }, Resource::Internet { .. }) => continue,
                _ => {
                    tracing::warn!(resource = %id, %client, "ignoring an update that changes the type of a resource");
                    continue;
                }
            };
            if held != new {
                held.clone_from(new);
                changed.push(*client);
            }
        }
        for client in changed {
            self.publish(client);
        }
    }

    /// Takes one grant back. Unknown pairs are ignored.
    pub fn reject(&mut self, client: ClientId, resource: ResourceId) {
        let Some(state) = self.clients.get_mut(&client) else {
            return;
        };
        let Some(grant) = state.grants.remove(&resource) else {
            return;
        };
        if let Some(at) = grant.expires.instant() {
            self.deadlines.remove(&(at, client, resource));
        }
        tracing::info!(%client, %resource, "access rejected");
        self.settle(client, RemovalCause::Rejected);
    }

    /// Applies the portal's complete list of valid grants (portal-channel spec §4.3): grants that
    /// are not listed are revoked, those that are get the listed expiry (the latest one, if listed
    /// twice), and listed grants that are not known here are ignored.
    pub fn resync(&mut self, now: Instant, listed: &[AuthorizationEntry]) {
        let mut valid: HashMap<(ClientId, ResourceId), (Expiry, Option<u64>)> =
            HashMap::with_capacity(listed.len());
        for entry in listed {
            let expiry = (self.clock.expiry(entry.expires_at), entry.expires_at);
            valid
                .entry((entry.client_id, entry.resource_id))
                .and_modify(|known| *known = (*known).max(expiry))
                .or_insert(expiry);
        }

        let (mut revoked, mut renewed) = (0usize, 0usize);
        let mut changed = Vec::new();
        for (&client, state) in &mut self.clients {
            let before = revoked + renewed;
            state.grants.retain(|&resource, grant| {
                let new = valid.get(&(client, resource)).copied();
                let renewal = new.filter(|&(_, expires_at)| expires_at != grant.expires_at);
                if (new.is_none() || renewal.is_some())
                    && let Some(at) = grant.expires.instant()
                {
                    self.deadlines.remove(&(at, client, resource));
                }
                if let Some((expires, expires_at)) = renewal {
                    if let Some(at) = expires.instant() {
                        self.deadlines.insert((at, client, resource));
                    }
                    grant.expires = expires;
                    grant.expires_at = expires_at;
                    renewed += 1;
                }
                if new.is_none() {
                    tracing::info!(%client, %resource, "access is not in the portal's list any more");
                    revoked += 1;
                }
                new.is_some()
            });
            if revoked + renewed != before {
                changed.push(client);
            }
        }
        for client in changed {
            self.settle(client, RemovalCause::Resync);
        }
        let due = self.deadlines.iter().take_while(|d| d.0 <= now).count();
        tracing::debug!(
            listed = listed.len(),
            revoked,
            renewed,
            due,
            "grants compared with the portal's list"
        );
    }

    /// Takes all grants of a client back, for instance when it has said goodbye.
    pub fn remove_client(&mut self, client: ClientId) {
        self.drop_client(client, RemovalCause::Requested);
    }

    /// Takes all grants of all clients back.
    pub fn remove_all(&mut self) {
        for client in self.client_ids() {
            self.drop_client(client, RemovalCause::Requested);
        }
    }

    /// Tells a later simultaneous reading of the two clocks. If they have moved apart by two
    /// seconds or more, because the host's clock was set or the machine was suspended, every expiry
    /// is mapped anew. Returns whether that was the case.
    pub fn adjust_clock(&mut self, now: Instant, unix_now: Duration) -> bool {
        /// Smaller steps are slewing and reading jitter, not worth new policies for everybody.
        const TOLERANCE: Duration = Duration::from_secs(2);

        if self.clock.drift(now, unix_now) < TOLERANCE {
            return false;
        }
        self.clock = UnixClock::new(now, unix_now);
        self.deadlines.clear();
        for (&client, state) in &mut self.clients {
            for (&resource, grant) in &mut state.grants {
                grant.expires = self.clock.expiry(grant.expires_at);
                if let Some(at) = grant.expires.instant() {
                    self.deadlines.insert((at, client, resource));
                }
            }
        }
        for client in self.client_ids() {
            self.publish(client);
        }
        true
    }

    /// Removes the grants whose time has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut changed = BTreeSet::new();
        while let Some(&(at, client, resource)) = self.deadlines.first()
            && at <= now
        {
            self.deadlines.pop_first();
            if let Some(state) = self.clients.get_mut(&client) {
                state.grants.remove(&resource);
            }
            tracing::info!(%client, %resource, "access expired");
            changed.insert(client);
        }
        for client in changed {
            self.settle(client, RemovalCause::Expired);
        }
    }

    /// When [`Self::handle_timeout`] is due next, and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, AccessTimer)> {
        let (at, ..) = self.deadlines.first()?;
        Some((*at, AccessTimer::GrantExpiry))
    }

    /// The next change, in order of occurrence.
    pub fn poll_event(&mut self) -> Option<AccessEvent> {
        self.events.pop_front()
    }

    /// The present policy of a client.
    pub fn policy(&self, client: ClientId) -> Option<Arc<ClientPolicy>> {
        Some(Arc::clone(&self.clients.get(&client)?.policy))
    }

    /// Who holds a tunnel address.
    pub fn client_at(&self, address: IpAddr) -> Option<ClientId> {
        self.by_address.get(&address).copied()
    }

    /// Whether a client holds a grant for a resource.
    pub fn is_authorized(&self, client: ClientId, resource: ResourceId, now: Instant) -> bool {
        self.clients
            .get(&client)
            .and_then(|state| state.grants.get(&resource))
            .is_some_and(|grant| !grant.expires.is_over(now))
    }

    /// What a client may reach, for the status; empty for an unknown client.
    pub fn grants(&self, client: ClientId) -> Vec<GrantStatus> {
        let grants = self.clients.get(&client).map(|state| &state.grants);
        grants
            .into_iter()
            .flatten()
            .map(|(id, grant)| {
                let (name, address) = match &grant.resource {
                    Resource::Cidr(r) => (r.name.clone(), r.address.to_string()),
                    Resource::Dns(r) => (r.name.clone(), r.address.clone()),
                    Resource::Internet { .. } => ("Internet".to_owned(), "internet".to_owned()),
                };
                GrantStatus {
                    resource: id.to_string(),
                    name,
                    address,
                    expires_at: grant.expires_at.map(|unix| unix as f64),
                }
            })
            .collect()
    }

    /// All clients with at least one grant, by id.
    pub fn clients(&self) -> impl Iterator<Item = (ClientId, TunnelAddresses)> + '_ {
        self.clients.iter().map(|(id, c)| (*id, c.addresses))
    }

    fn client_ids(&self) -> Vec<ClientId> {
        self.clients.keys().copied().collect()
    }

    /// After grants of a client were changed: publishes what is left, or removes the client.
    fn settle(&mut self, client: ClientId, cause: RemovalCause) {
        match self.clients.get(&client) {
            Some(state) if state.grants.is_empty() => self.drop_client(client, cause),
            Some(_) => self.publish(client),
            None => {}
        }
    }

    fn publish(&mut self, client: ClientId) {
        let Some(state) = self.clients.get_mut(&client) else {
            return;
        };
        let grants = state.grants.values().map(|g| (&g.resource, g.expires));
        state.policy = Arc::new(ClientPolicy::new(
            client,
            state.addresses,
            self.gateway,
            grants,
        ));
        self.events.push_back(AccessEvent::PolicyChanged {
            client,
            policy: Arc::clone(&state.policy),
        });
    }

    fn drop_client(&mut self, client: ClientId, cause: RemovalCause) {
        let Some(state) = self.clients.remove(&client) else {
            return;
        };
        for (resource, grant) in state.grants {
            if let Some(at) = grant.expires.instant() {
                self.deadlines.remove(&(at, client, resource));
            }
        }
        self.by_address.remove(&state.addresses.ipv4.into());
        self.by_address.remove(&state.addresses.ipv6.into());
        tracing::info!(%client, cause = cause.as_str(), "client has no access any more");
        self.events
            .push_back(AccessEvent::ClientRemoved { client, cause });
    }
}

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
