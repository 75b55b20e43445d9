//! What is remembered of one client besides its grants: its flows, and what its proxy addresses
//! stand for. Outlives every policy snapshot (data-path spec §6.4, retention).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::account::{Owner, Reports};
use super::flows::{Flow, Flows, Teller, Tick, Total};
use super::names::{Announced, Names, Resolved};
use super::policy::TunnelAddresses;
use super::verdict::DropReason;
use crate::ids::{ClientId, ResourceId};
use crate::packet::Meta;
use crate::packet::translate::Embedded;

/// What all tables share.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    epoch: Instant,
    total: Total,
    stirred: Arc<Mutex<Vec<ClientId>>>,
    /// Whether flow logs want to know.
    accounting: Arc<AtomicBool>,
    /// Clients with something to report.
    talkative: Arc<Mutex<Vec<ClientId>>>,
}

impl Shared {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            total: Total::default(),
            stirred: Arc::default(),
            accounting: Arc::default(),
            talkative: Arc::default(),
        }
    }

    /// Whether flows that begin from now on are accounted for.
    pub(super) fn set_accounting(&self, on: bool) {
        self.accounting.store(on, Ordering::Relaxed);
    }

    fn is_accounting(&self) -> bool {
        self.accounting.load(Ordering::Relaxed)
    }

    /// The clients with something to report since the last call.
    pub(super) fn take_talkative(&self) -> Vec<ClientId> {
        take(&self.talkative)
    }

    /// The clients that got their first flow since the last call. The others need no looking
    /// after, however many there are.
    pub(super) fn take_stirred(&self) -> Vec<ClientId> {
        take(&self.stirred)
    }

    /// Flows of all clients.
    pub(super) fn flows(&self) -> usize {
        self.total.get()
    }
}

fn put(list: &Mutex<Vec<ClientId>>, client: ClientId) {
    list.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(client);
}

fn take(list: &Mutex<Vec<ClientId>>) -> Vec<ClientId> {
    std::mem::take(&mut list.lock().unwrap_or_else(PoisonError::into_inner))
}

/// How much is remembered of a client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Flows.
    pub flows: usize,
    /// Domains announced.
    pub domains: usize,
    /// Proxy addresses of those domains.
    pub proxies: usize,
}

/// Flows and names of one client. Workers take the lock on a flow-cache miss only.
#[derive(Debug)]
pub(super) struct Tables {
    client: ClientId,
    addresses: TunnelAddresses,
    shared: Shared,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    flows: Flows,
    names: Names,
    /// Whether the client has been reported as stirred, and is looked after since.
    stirred: bool,
    /// Whether the client is on the list of those with something to report.
    talkative: bool,
}

impl Tables {
    pub(super) fn new(client: ClientId, addresses: TunnelAddresses, shared: &Shared) -> Self {
        Self {
            client,
            addresses,
            inner: Mutex::new(Inner {
                flows: Flows::new(shared.total.clone()),
                names: Names::default(),
                stirred: false,
                talkative: false,
            }),
            shared: shared.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic under the lock would be a defect of ours; each change is whole by itself, so
        // that what it leaves is still usable.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present tick of the flows' clock.
    #[inline]
    pub(super) fn tick(&self, now: Instant) -> Tick {
        Tick::new(self.shared.epoch, now)
    }

    /// See [`Flows::open`]; `owner` is asked only if flows are accounted for.
    pub(super) fn open(
        &self,
        meta: &Meta,
        now: Instant,
        owner: impl FnOnce() -> Owner,
    ) -> Result<Arc<Flow>, DropReason> {
        let tick = self.tick(now);
        let owner = self.shared.is_accounting().then(owner);
        let mut inner = self.lock();
        let Inner {
            flows,
            names,
            stirred,
            talkative,
        } = &mut *inner;
        let accounted = owner.is_some();
        let flow = flows.open(meta, tick, owner, |proxy| names.target(proxy))?;
        if accounted && !std::mem::replace(talkative, true) {
            put(&self.shared.talkative, self.client);
        }
        if !std::mem::replace(stirred, true) {
            put(&self.shared.stirred, self.client);
        }
        Ok(flow)
    }

    /// See [`Flows::answered_by`].
    pub(super) fn answered_by(&self, meta: &Meta, now: Instant) -> Option<Arc<Flow>> {
        self.lock().flows.answered_by(meta, self.tick(now))
    }

    /// See [`Flows::about`].
    pub(super) fn about(&self, embedded: &Embedded, now: Instant) -> Option<Arc<Flow>> {
        self.lock().flows.about(embedded, self.tick(now))
    }

    /// See [`Names::announce`].
    pub(super) fn announce(
        &self,
        domain: &str,
        resource: ResourceId,
        proxies: &[IpAddr],
        resolved: &Resolved,
    ) -> Announced {
        let mut inner = self.lock();
        let Inner { flows, names, .. } = &mut *inner;
        let done = names.announce(domain, resource, proxies, resolved);
        if done.renumbered {
            flows.clear_translated();
        } else if done.evicted > 0 {
            flows.retain_translated(|proxy| names.resources(proxy).is_some());
        }
        done
    }

    /// See [`Names::is_known`].
    pub(super) fn is_known(&self, domain: &str, resource: ResourceId) -> bool {
        self.lock().names.is_known(domain, resource)
    }

    /// See [`Names::retain`]. Flows to what is forgotten end.
    pub(super) fn retain_names(&self, keep: impl Fn(ResourceId, &str) -> bool) {
        let mut inner = self.lock();
        let Inner { flows, names, .. } = &mut *inner;
        names.retain(keep);
        flows.retain_translated(|proxy| names.resources(proxy).is_some());
    }

    /// Looks at the resources that an announced address belongs to; `None` if it was not announced.
    pub(super) fn with_resources<R>(
        &self,
        proxy: IpAddr,
        look: impl FnOnce(&BTreeSet<ResourceId>) -> R,
    ) -> Option<R> {
        self.lock().names.resources(proxy).map(look)
    }

    fn teller(&self) -> Teller {
        Teller {
            client: self.client,
            addresses: self.addresses,
            epoch: self.shared.epoch,
        }
    }

    /// Tells of flows that began or ended.
    pub(super) fn report(&self, reports: &mut Reports) {
        let mut inner = self.lock();
        inner.talkative = false;
        inner.flows.report(&self.teller(), reports);
    }

    /// Drops all flows, and tells of their end.
    pub(super) fn end_all(&self, reports: &mut Reports) {
        let mut inner = self.lock();
        inner.flows.clear();
        inner.flows.report(&self.teller(), reports);
    }

    /// Tells of flows that fell silent, and drops those that are over along with
    /// [`Self::report`]. Returns whether any is left; if not, the client will be reported
    /// as stirred again.
    pub(super) fn purge(&self, now: Instant, reports: &mut Reports) -> bool {
        let tick = self.tick(now);
        let mut inner = self.lock();
        inner.flows.purge(tick);
        let teller = self.teller();
        inner.flows.report(&teller, reports);
        if self.shared.is_accounting() {
            inner.flows.report_silent(tick, &teller, reports);
        }
        inner.stirred = inner.flows.len() > 0;
        inner.stirred
    }

    pub(super) fn sizes(&self) -> Sizes {
        let inner = self.lock();
        let (domains, proxies) = inner.names.sizes();
        Sizes {
            flows: inner.flows.len(),
            domains,
            proxies,
        }
    }
}
