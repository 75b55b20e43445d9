//! Who may reach what: grants from the portal, their expiry, and the policy snapshots that the
//! data path works with (data-path spec §5.3 to §5.6, portal-channel spec §4.4 and §4.5).
//!
//! [`Access`] is a state machine without clock or I/O. Call its methods, then drain
//! [`Access::poll_event`] until it is empty, then arm a timer for [`Access::poll_timeout`].

mod account;
mod expiry;
mod filter;
pub mod flows;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod limits;
pub mod names;
mod open_ports;
mod pattern;
mod policy;
pub mod ranges;
mod tables;
mod verdict;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use account::{Counted, FlowEnd, FlowReport};
pub use flows::{Flow, Tick};
pub use names::{Announced, Resolved};
pub use open_ports::{NotAPort, OpenPorts};
pub use policy::{ClientPolicy, DNS_PORT, TunnelAddresses};
pub use tables::Sizes;
pub use verdict::{Denied, DropReason, Passed, Reply, Verdict};

use crate::admin::model::GrantStatus;
use crate::flow_logs::Authorization;
use crate::ids::{ClientId, ResourceId};
use crate::portal::messages::{AuthorizationEntry, ClientPeer, Resource};
use account::{Owner, Reports};
use expiry::{Expiry, UnixClock};
use filter::Filters;
use policy::{Gateway, Granted};
use tables::{Shared, Tables};

/// How often a client's flows are looked through for those that have ended. It costs in proportion
/// to their number; they count as ended at once, however late they are dropped.
const PURGE_INTERVAL: Duration = Duration::from_secs(15);

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
    /// Flows that have ended are dropped.
    FlowPurge,
}

/// Why an announcement of proxy addresses was not taken (data-path spec §6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unannounced {
    /// The client holds no valid grant for the resource.
    #[error("no access to the resource")]
    NotAuthorized,
    /// The resource is not a name.
    #[error("not a DNS resource")]
    NotDns,
    /// The resource's pattern does not cover the domain.
    #[error("the resource does not cover the domain")]
    NotCovered,
    /// The domain could not be resolved, neither now nor before.
    #[error("the domain could not be resolved")]
    NotResolved,
}

/// All grants of all clients.
#[derive(Debug)]
pub struct Access {
    clock: UnixClock,
    gateway: Option<TunnelAddresses>,
    /// Ports of the gateway that are open besides DNS; `None` if there are none.
    open_ports: Option<Arc<Filters>>,
    clients: BTreeMap<ClientId, Client>,
    by_address: HashMap<IpAddr, ClientId>,
    /// One entry per grant that ends, soonest first.
    deadlines: BTreeSet<(Instant, ClientId, ResourceId)>,
    /// One entry per client with flows: when they are looked through next.
    purges: BTreeSet<(Instant, ClientId)>,
    shared: Shared,
    reports: Reports,
    events: VecDeque<AccessEvent>,
}

#[derive(Debug)]
struct Client {
    addresses: TunnelAddresses,
    grants: BTreeMap<ResourceId, Grant>,
    policy: Arc<ClientPolicy>,
    /// Lives as long as the client has any access: clients do not announce again what has been
    /// confirmed to them.
    tables: Arc<Tables>,
    /// Its entry in [`Access::purges`].
    purge_at: Option<Instant>,
}

#[derive(Debug)]
struct Grant {
    resource: Resource,
    /// As the portal said it, Unix seconds.
    expires_at: Option<u64>,
    expires: Expiry,
    /// What its flows are logged with.
    authorization: Option<Arc<Authorization>>,
}

impl Access {
    /// No grants. `now` and `unix_now` (time since the Unix epoch) are one simultaneous reading of
    /// the two clocks; it maps the portal's time stamps to deadlines.
    pub fn new(now: Instant, unix_now: Duration) -> Self {
        Self {
            clock: UnixClock::new(now, unix_now),
            gateway: None,
            open_ports: None,
            clients: BTreeMap::new(),
            by_address: HashMap::new(),
            deadlines: BTreeSet::new(),
            purges: BTreeSet::new(),
            shared: Shared::new(now),
            reports: Reports::default(),
            events: VecDeque::new(),
        }
    }

    /// Opens ports of the gateway itself to clients; to be called before any is known.
    pub fn open_ports(&mut self, ports: &OpenPorts) {
        self.open_ports = ports.filters().map(Arc::new);
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
        self.authorize_with(now, client, resource, expires_at, None);
    }

    /// As [`Self::authorize`], with what the grant's flows are logged with. Those that have begun
    /// are logged as they began.
    pub fn authorize_with(
        &mut self,
        now: Instant,
        client: &ClientPeer,
        resource: Resource,
        expires_at: Option<u64>,
        authorization: Option<Arc<Authorization>>,
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
            authorization,
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
            let tables = Arc::new(Tables::new(id, addresses, &self.shared));
            let none = std::iter::empty();
            Client {
                addresses,
                grants: BTreeMap::new(),
                policy: Arc::new(ClientPolicy::new(
                    id,
                    addresses,
                    Gateway::default(),
                    Arc::clone(&tables),
                    none,
                )),
                tables,
                purge_at: None,
            }
        });
        if let Some(at) = grant.expires.instant() {
            self.deadlines.insert((at, id, resource_id));
        }
        let new_expiry = grant.expires;
        let pattern = match &grant.resource {
            Resource::Dns(dns) => Some(dns.address.clone()),
            _ => None,
        };
        let old = entry.grants.insert(resource_id, grant);
        if let Some(old) = &old
            && old.expires != new_expiry
            && let Some(at) = old.expires.instant()
        {
            self.deadlines.remove(&(at, id, resource_id));
        }
        let old_pattern = old.and_then(|old| match old.resource {
            Resource::Dns(dns) => Some(dns.address),
            _ => None,
        });
        // Names outlive their grant: one that was taken back and comes again, or as something else,
        // may cover less than it did.
        if old_pattern != pattern {
            let pattern = pattern.unwrap_or_default();
            entry.tables.retain_names(|resource, domain| {
                resource != resource_id || pattern::covers(&pattern, domain)
            });
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

    /// Whether flows that begin from now on are accounted for, see [`Self::poll_report`].
    pub fn account_for_flows(&mut self, on: bool) {
        self.shared.set_accounting(on);
    }

    /// What flow logs are to be told next.
    pub fn poll_report(&mut self) -> Option<FlowReport> {
        self.reports.pop()
    }

    /// How much flow logs were not told, for lack of room: reports, and flows that were not even
    /// accounted for.
    pub fn reports_dropped(&self) -> u64 {
        self.reports.dropped()
    }

    /// Whether a client may announce addresses for a domain of a resource.
    ///
    /// # Errors
    /// [`Unannounced`], if it may not.
    pub fn may_announce(
        &self,
        client: ClientId,
        resource: ResourceId,
        domain: &str,
        now: Instant,
    ) -> Result<(), Unannounced> {
        let grant = self
            .clients
            .get(&client)
            .and_then(|state| state.grants.get(&resource))
            .filter(|grant| !grant.expires.is_over(now))
            .ok_or(Unannounced::NotAuthorized)?;
        match &grant.resource {
            Resource::Dns(dns) if pattern::covers(&dns.address, domain) => Ok(()),
            Resource::Dns(_) => Err(Unannounced::NotCovered),
            _ => Err(Unannounced::NotDns),
        }
    }

    /// Takes over what the addresses that a client made up for a domain stand for (data-path spec
    /// §6.4). A domain that has no addresses is taken over, too: its packets are *unreachable*.
    ///
    /// # Errors
    /// [`Unannounced`], if the client may not announce it (any more), or if nothing is known of the
    /// domain's addresses.
    pub fn announce(
        &mut self,
        client: ClientId,
        resource: ResourceId,
        domain: &str,
        proxies: &[IpAddr],
        resolved: &Resolved,
        now: Instant,
    ) -> Result<Announced, Unannounced> {
        self.may_announce(client, resource, domain, now)?;
        let state = self
            .clients
            .get(&client)
            .ok_or(Unannounced::NotAuthorized)?;
        let done = state.tables.announce(domain, resource, proxies, resolved);
        if resolved.is_failure() && !state.tables.is_known(domain, resource) {
            return Err(Unannounced::NotResolved);
        }
        Ok(done)
    }

    /// How much is remembered of a client; nothing for an unknown one.
    pub fn sizes(&self, client: ClientId) -> Sizes {
        let state = self.clients.get(&client);
        state.map_or_else(Sizes::default, |state| state.tables.sizes())
    }

    /// Number of flows of all clients.
    pub fn flow_count(&self) -> usize {
        self.shared.flows()
    }

    fn purge(&mut self, now: Instant) {
        for client in self.shared.take_talkative() {
            if let Some(state) = self.clients.get(&client) {
                state.tables.report(&mut self.reports);
            }
        }
        let next = now + PURGE_INTERVAL;
        for client in self.shared.take_stirred() {
            if let Some(state) = self.clients.get_mut(&client)
                && state.purge_at.is_none()
            {
                state.purge_at = Some(next);
                self.purges.insert((next, client));
            }
        }
        while let Some(&(at, client)) = self.purges.first()
            && at <= now
        {
            self.purges.pop_first();
            if let Some(state) = self.clients.get_mut(&client) {
                state.purge_at = state.tables.purge(now, &mut self.reports).then_some(next);
                if state.purge_at.is_some() {
                    self.purges.insert((next, client));
                }
            }
        }
        self.reports.complain(now);
    }

    /// Removes the grants whose time has come, and flows that have ended. Flows begin without our
    /// being told: to be called every few seconds even when [`Self::poll_timeout`] is silent.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.purge(now);
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
        let grant = self
            .deadlines
            .first()
            .map(|d| (d.0, AccessTimer::GrantExpiry));
        let purge = self.purges.first().map(|p| (p.0, AccessTimer::FlowPurge));
        grant.into_iter().chain(purge).min_by_key(|(at, _)| *at)
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
        let grants = state.grants.iter().map(|(id, grant)| Granted {
            resource: &grant.resource,
            expires: grant.expires,
            owner: Owner {
                resource: *id,
                authorization: grant.authorization.clone(),
            },
        });
        state.policy = Arc::new(ClientPolicy::new(
            client,
            state.addresses,
            Gateway {
                addresses: self.gateway,
                open_ports: self.open_ports.clone(),
            },
            Arc::clone(&state.tables),
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
        state.tables.end_all(&mut self.reports);
        for (resource, grant) in state.grants {
            if let Some(at) = grant.expires.instant() {
                self.deadlines.remove(&(at, client, resource));
            }
        }
        if let Some(at) = state.purge_at {
            self.purges.remove(&(at, client));
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
