//! Which relays peers are given and what they hear of changes (portal-channel spec §6).

use std::collections::BTreeSet;

use serde_json::{Value, json};
use uuid::Uuid;

use super::super::events::Now;
use super::super::policy::Relay;
use super::super::store::Role;
use super::{ConnId, Core};

/// No peer is given more relays than this (§6.1).
const HANDED_OUT: usize = 2;

impl Core {
    /// Replaces the set of relays. Peers hear of it after the debounce time, or at once; by the
    /// rules of §6.2, or in any case if `force` is set.
    pub fn set_relays(&mut self, now: Now, relays: Vec<Relay>, immediate: bool, force: bool) {
        let ids: Vec<_> = relays.iter().map(|relay| relay.id).collect();
        let detail = json!({"ids": ids, "immediate": immediate, "force": force});
        self.events.record(now, "relays_changed", detail);
        self.relays = relays;
        let due = if immediate {
            now.instant
        } else {
            now.instant + self.timings.presence_debounce
        };
        let force = force || self.presence_due.is_some_and(|(_, force)| force);
        self.presence_due = Some((due, force));
        self.presence_due(now);
    }

    pub(super) fn presence_due(&mut self, now: Now) {
        let Some((_, force)) = self.presence_due.filter(|(due, _)| *due <= now.instant) else {
            return;
        };
        self.presence_due = None;
        let online: BTreeSet<_> = self.relays.iter().map(|relay| relay.id).collect();
        let peers = [self.joined(Role::Gateway), self.joined(Role::Client)].concat();
        for id in peers {
            let Some(conn) = self.conns.get(&id) else {
                continue;
            };
            let gone: Vec<_> = conn.relays_sent.difference(&online).copied().collect();
            let short = conn.relays_sent.len() < HANDED_OUT && !online.is_empty();
            if force || short || !gone.is_empty() {
                self.push_presence(now, id, &gone);
            }
        }
    }

    /// Answers `no_relays` (§4.7).
    pub(super) fn no_relays(&mut self, now: Now, id: ConnId) {
        let peer = self.conns.get(&id).map(|conn| conn.admission.peer);
        self.events
            .record(now, "no_relays", json!({"conn": id, "peer_id": peer}));
        self.push_presence(now, id, &[]);
    }

    fn push_presence(&mut self, now: Now, id: ConnId, gone: &[Uuid]) {
        let connected = self.hand_out_relays(now, id);
        let peer = self.conns.get(&id).map(|conn| conn.admission.peer);
        let detail = json!({"conn": id, "peer_id": peer, "disconnected_ids": gone,
            "connected": connected.len()});
        self.events.record(now, "relays_presence", detail);
        let payload = json!({"disconnected_ids": gone, "connected": connected});
        self.push(now, id, "relays_presence", payload);
    }

    /// The relay entries for a connection; notes that it has them.
    pub(super) fn hand_out_relays(&mut self, now: Now, id: ConnId) -> Vec<Value> {
        let Some(conn) = self.conns.get_mut(&id) else {
            return Vec::new();
        };
        let chosen = self.relays.iter().take(HANDED_OUT);
        conn.relays_sent = chosen.clone().map(|relay| relay.id).collect();
        chosen
            .flat_map(|relay| relay.entries(&conn.admission.public_key, now.unix()))
            .collect()
    }
}
