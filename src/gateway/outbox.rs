//! What must reach the portal even if it is away just now (portal-channel spec §4.6): candidate
//! changes are held per client and flushed after the next join. A candidate that is withdrawn
//! before it was ever told cancels out.

use std::collections::BTreeMap;

use crate::ids::ClientId;
use crate::portal::messages::Egress;

#[derive(Debug, Default)]
struct Held {
    added: Vec<String>,
    invalidated: Vec<String>,
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
            let address = identity(&candidate);
            held.invalidated.retain(|c| identity(c) != address);
            if !held.added.iter().any(|c| identity(c) == address) {
                held.added.push(candidate);
            }
        }
    }

    /// Holds withdrawals.
    pub fn invalidate(&mut self, client: ClientId, candidates: Vec<String>) {
        let held = self.held.entry(client).or_default();
        for candidate in candidates {
            let address = identity(&candidate);
            let before = held.added.len();
            held.added.retain(|c| identity(c) != address);
            let cancelled = held.added.len() < before;
            if !cancelled && !held.invalidated.iter().any(|c| identity(c) == address) {
                held.invalidated.push(candidate);
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
                    candidates: held.added,
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

    const HOST: &str = "candidate:1 1 udp 2130706175 192.0.2.4 52625 typ host ufrag abcd";
    const RELAY: &str =
        "candidate:2 1 udp 37748479 198.51.100.9 50000 typ relay raddr 0.0.0.0 rport 0";
    const RELAY_OTHER_PRIORITY: &str =
        "candidate:9 1 udp 1 198.51.100.9 50000 typ relay raddr 0.0.0.0 rport 0";

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|l| (*l).to_owned()).collect()
    }

    #[test]
    fn a_candidate_withdrawn_before_it_was_told_cancels_out() {
        let client = ClientId(Uuid::from_u128(1));
        let mut outbox = Outbox::default();
        outbox.add(client, lines(&[HOST, RELAY]));
        outbox.invalidate(client, lines(&[RELAY_OTHER_PRIORITY]));
        assert_eq!(
            outbox.flush(),
            [Egress::BroadcastIceCandidates {
                client_ids: vec![client],
                candidates: lines(&[HOST]),
            }]
        );
        assert!(outbox.flush().is_empty(), "told once");
    }

    #[test]
    fn a_withdrawal_of_a_told_candidate_is_told() {
        let client = ClientId(Uuid::from_u128(1));
        let mut outbox = Outbox::default();
        outbox.add(client, lines(&[RELAY]));
        outbox.flush();
        outbox.invalidate(client, lines(&[RELAY]));
        assert!(matches!(
            outbox.flush().as_slice(),
            [Egress::BroadcastInvalidatedIceCandidates { candidates, .. }] if candidates.len() == 1
        ));
    }

    #[test]
    fn a_candidate_that_comes_back_is_offered_not_withdrawn() {
        let client = ClientId(Uuid::from_u128(1));
        let mut outbox = Outbox::default();
        outbox.invalidate(client, lines(&[RELAY]));
        outbox.add(client, lines(&[RELAY]));
        assert!(matches!(
            outbox.flush().as_slice(),
            [Egress::BroadcastIceCandidates { .. }]
        ));
    }

    #[test]
    fn nothing_is_told_about_a_connection_that_is_gone() {
        let client = ClientId(Uuid::from_u128(1));
        let mut outbox = Outbox::default();
        outbox.add(client, lines(&[HOST]));
        outbox.forget(client);
        assert!(outbox.flush().is_empty());
    }
}
