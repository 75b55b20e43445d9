//! What is remembered of one client besides its grants: its flows, and what its proxy addresses
//! stand for. Outlives every policy snapshot (data-path spec §6.4, retention).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::flows::{Flow, Flows, Tick, Total};
use super::names::{Announced, Names, Resolved};
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
}

impl Shared {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            total: Total::default(),
            stirred: Arc::default(),
        }
    }

    /// The clients that got their first flow since the last call. The others need no looking
    /// after, however many there are.
    pub(super) fn take_stirred(&self) -> Vec<ClientId> {
        std::mem::take(&mut self.stirred.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Flows of all clients.
    pub(super) fn flows(&self) -> usize {
        self.total.get()
    }
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
    shared: Shared,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    flows: Flows,
    names: Names,
    /// Whether the client has been reported as stirred, and is looked after since.
    stirred: bool,
}

impl Tables {
    pub(super) fn new(client: ClientId, shared: &Shared) -> Self {
        Self {
            client,
            inner: Mutex::new(Inner {
                flows: Flows::new(shared.total.clone()),
                names: Names::default(),
                stirred: false,
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

    /// See [`Flows::open`].
    pub(super) fn open(&self, meta: &Meta, now: Instant) -> Result<Arc<Flow>, DropReason> {
        let tick = self.tick(now);
        let mut inner = self.lock();
        let Inner {
            flows,
            names,
            stirred,
        } = &mut *inner;
        let flow = flows.open(meta, tick, |proxy| names.resolved(proxy))?;
        if !std::mem::replace(stirred, true) {
            let mut list = self.shared.stirred.lock();
            list.as_mut()
                .unwrap_or_else(|poisoned| poisoned.get_mut())
                .push(self.client);
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

    /// Drops flows that are over. Returns whether any is left; if not, the client will be reported
    /// as stirred again.
    pub(super) fn purge(&self, now: Instant) -> bool {
        let tick = self.tick(now);
        let mut inner = self.lock();
        inner.flows.purge(tick);
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
