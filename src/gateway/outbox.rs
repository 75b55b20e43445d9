//! What must reach the portal even if it is away just now (portal-channel spec §4.6): candidate
//! changes are held per client and flushed after the next join. A candidate that is withdrawn
//! before it was ever told cancels out.

use std::collections::BTreeMap;

use crate::ids::ClientId;
use crate::portal::messages::Egress;

#[derive(Debug, Default)]
struct Held {
    added: Vec<Added>,
    invalidated: Vec<String>,
}

#[derive(Debug)]
struct Added {
    candidate: String,
    /// It was sent before and may have arrived: a withdrawal has to be told.
    maybe_told: bool,
}

impl Held {
    fn add(&mut self, candidate: String, maybe_told: bool) {
        let address = identity(&candidate);
        let withdrawals = self.invalidated.len();
        self.invalidated.retain(|c| identity(c) != address);
        // A withdrawal that was pending says that it was told once.
        let maybe_told = maybe_told || self.invalidated.len() < withdrawals;
        match self
            .added
            .iter_mut()
            .find(|a| identity(&a.candidate) == address)
        {
            Some(known) => known.maybe_told |= maybe_told,
            None => self.added.push(Added {
                candidate,
                maybe_told,
            }),
        }
    }

    fn invalidate(&mut self, candidate: String) {
        let address = identity(&candidate);
        let known = self
            .added
            .iter()
            .position(|a| identity(&a.candidate) == address)
            .map(|at| self.added.remove(at));
        let cancelled = known.is_some_and(|known| !known.maybe_told);
        if !cancelled && !self.invalidated.iter().any(|c| identity(c) == address) {
            self.invalidated.push(candidate);
        }
    }
}

/// Candidate changes by client.
#[derive(Debug, Default)]
pub struct Outbox {
    held: BTreeMap<ClientId, Held>,
}

impl Outbox {
    /// Holds new candidates.
    pub fn add(&mut self, client: ClientId, candidates: Vec<String>) {
        let held = self.held.entry(client).or_default();
        for candidate in candidates {
            held.add(candidate, false);
        }
    }

    /// Holds withdrawals.
    pub fn invalidate(&mut self, client: ClientId, candidates: Vec<String>) {
        let held = self.held.entry(client).or_default();
        for candidate in candidates {
            held.invalidate(candidate);
        }
    }

    /// Takes back what was flushed before and may not have arrived, oldest first. It is older than
    /// anything held now. Clients that are not `wanted` any more are left out.
    pub fn restore(
        &mut self,
        undelivered: impl IntoIterator<Item = Egress>,
        wanted: impl Fn(ClientId) -> bool,
    ) {
        let newer = std::mem::take(&mut self.held);
        for message in undelivered {
            let (client_ids, candidates, new) = match message {
                Egress::BroadcastIceCandidates {
                    client_ids,
                    candidates,
                } => (client_ids, candidates, true),
                Egress::BroadcastInvalidatedIceCandidates {
                    client_ids,
                    candidates,
                } => (client_ids, candidates, false),
                _ => continue,
            };
            for client in client_ids.into_iter().filter(|client| wanted(*client)) {
                let held = self.held.entry(client).or_default();
                for candidate in candidates.iter().cloned() {
                    if new {
                        held.add(candidate, true);
                    } else {
                        held.invalidate(candidate);
                    }
                }
            }
        }
        for (client, changes) in newer {
            let held = self.held.entry(client).or_default();
            for added in changes.added {
                held.add(added.candidate, added.maybe_told);
            }
            for candidate in changes.invalidated {
                held.invalidate(candidate);
            }
        }
    }

    /// Forgets a client's changes; its connection is gone.
    pub fn forget(&mut self, client: ClientId) {
        self.held.remove(&client);
    }

    /// Everything held, as messages; one client each.
    pub fn flush(&mut self) -> Vec<Egress> {
        let mut out = Vec::new();
        for (client, held) in std::mem::take(&mut self.held) {
            if !held.added.is_empty() {
                out.push(Egress::BroadcastIceCandidates {
                    client_ids: vec![client],
                    candidates: held.added.into_iter().map(|a| a.candidate).collect(),
                });
            }
            if !held.invalidated.is_empty() {
                out.push(Egress::BroadcastInvalidatedIceCandidates {
                    client_ids: vec![client],
                    candidates: held.invalidated,
                });
            }
        }
        out
    }
}

/// Address, port and kind of a candidate line: what tells candidates apart. Priorities and
/// foundations may differ between the line that adds and the one that withdraws.
fn identity(line: &str) -> (&str, &str, &str) {
    let mut fields = line.split_ascii_whitespace();
    let address = fields.nth(4).unwrap_or_default();
    let port = fields.next().unwrap_or_default();
    let kind = fields.nth(1).unwrap_or_default();
    (address, port, kind)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const CLIENT: ClientId = ClientId(Uuid::from_u128(1));
    const HOST: &str = "candidate:1 1 udp 2130706175 192.0.2.4 52625 typ host ufrag abcd";
    const RELAY: &str =
        "candidate:2 1 udp 37748479 198.51.100.9 50000 typ relay raddr 0.0.0.0 rport 0";
    const RELAY_OTHER_PRIORITY: &str =
        "candidate:9 1 udp 1 198.51.100.9 50000 typ relay raddr 0.0.0.0 rport 0";

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|l| (*l).to_owned()).collect()
    }

    fn told(candidates: &[&str]) -> Egress {
        Egress::BroadcastIceCandidates {
            client_ids: vec![CLIENT],
            candidates: lines(candidates),
        }
    }

    fn withdrawn(candidates: &[&str]) -> Egress {
        Egress::BroadcastInvalidatedIceCandidates {
            client_ids: vec![CLIENT],
            candidates: lines(candidates),
        }
    }

    #[test]
    fn a_candidate_withdrawn_before_it_was_told_cancels_out() {
        let mut outbox = Outbox::default();
        outbox.add(CLIENT, lines(&[HOST, RELAY]));
        outbox.invalidate(CLIENT, lines(&[RELAY_OTHER_PRIORITY]));
        assert_eq!(outbox.flush(), [told(&[HOST])]);
        assert!(outbox.flush().is_empty(), "told once");
    }

    #[test]
    fn a_withdrawal_of_a_told_candidate_is_told() {
        let mut outbox = Outbox::default();
        outbox.add(CLIENT, lines(&[RELAY]));
        outbox.flush();
        outbox.invalidate(CLIENT, lines(&[RELAY]));
        assert_eq!(outbox.flush(), [withdrawn(&[RELAY])]);
    }

    #[test]
    fn a_candidate_that_comes_back_is_offered_not_withdrawn() {
        let mut outbox = Outbox::default();
        outbox.invalidate(CLIENT, lines(&[RELAY]));
        outbox.add(CLIENT, lines(&[RELAY]));
        assert_eq!(outbox.flush(), [told(&[RELAY])]);
    }

    #[test]
    fn a_told_candidate_that_goes_comes_and_goes_is_withdrawn() {
        let mut outbox = Outbox::default();
        outbox.add(CLIENT, lines(&[RELAY]));
        outbox.flush();
        outbox.invalidate(CLIENT, lines(&[RELAY]));
        outbox.add(CLIENT, lines(&[RELAY]));
        outbox.invalidate(CLIENT, lines(&[RELAY]));
        assert_eq!(outbox.flush(), [withdrawn(&[RELAY])]);
    }

    #[test]
    fn nothing_is_told_about_a_connection_that_is_gone() {
        let mut outbox = Outbox::default();
        outbox.add(CLIENT, lines(&[HOST]));
        outbox.forget(CLIENT);
        assert!(outbox.flush().is_empty());
        outbox.restore([told(&[HOST])], |client| client != CLIENT);
        assert!(outbox.flush().is_empty());
    }

    #[test]
    fn what_may_not_have_arrived_is_told_again() {
        let mut outbox = Outbox::default();
        outbox.restore([told(&[HOST, RELAY]), withdrawn(&[RELAY])], |_| true);
        assert_eq!(outbox.flush(), [told(&[HOST]), withdrawn(&[RELAY])]);
    }

    #[test]
    fn a_withdrawal_of_a_candidate_that_may_have_been_told_is_told() {
        let mut outbox = Outbox::default();
        outbox.restore([told(&[RELAY])], |_| true);
        outbox.invalidate(CLIENT, lines(&[RELAY_OTHER_PRIORITY]));
        assert_eq!(outbox.flush(), [withdrawn(&[RELAY_OTHER_PRIORITY])]);
    }

    #[test]
    fn what_is_held_already_is_newer_than_what_comes_back() {
        let mut outbox = Outbox::default();
        outbox.invalidate(CLIENT, lines(&[RELAY]));
        outbox.restore([told(&[RELAY])], |_| true);
        assert_eq!(outbox.flush(), [withdrawn(&[RELAY])]);

        outbox.add(CLIENT, lines(&[RELAY]));
        outbox.restore([withdrawn(&[RELAY])], |_| true);
        assert_eq!(outbox.flush(), [told(&[RELAY])]);
    }

    #[test]
    fn answers_do_not_outlive_their_session() {
        let mut outbox = Outbox::default();
        outbox.restore(
            [
                Egress::NoRelays,
                Egress::AuthorizationCreated {
                    reference: "r".to_owned(),
                },
            ],
            |_| true,
        );
        assert!(outbox.flush().is_empty());
    }
}
