//! Passing ICE candidates between clients and gateways (portal-channel spec §4.6, §7.2).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::super::events::Now;
use super::Core;

/// Which kinds of candidates pass; `None` lets all through, an empty set none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CandidateFilter {
    /// From clients to gateways: `host`, `srflx`, `prflx`, `relay`.
    pub to_gateway: Option<BTreeSet<String>>,
    /// From gateways to clients.
    pub to_client: Option<BTreeSet<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    ToGateway,
    ToClient,
}

impl Core {
    /// Which candidates are passed on from now on.
    pub fn set_candidate_filter(&mut self, now: Now, filter: CandidateFilter) {
        self.events
            .record(now, "candidate_filter", json!({ "filter": filter }));
        self.candidate_filter = filter;
    }

    /// Passes candidates on, or drops them if the receiver is offline.
    pub(super) fn forward(
        &mut self,
        now: Now,
        direction: Direction,
        (from, to): (Uuid, Uuid),
        event: &str,
        candidates: Vec<String>,
    ) {
        let (filter, sender_key) = match direction {
            Direction::ToGateway => (&self.candidate_filter.to_gateway, "client_id"),
            Direction::ToClient => (&self.candidate_filter.to_client, "gateway_id"),
        };
        let total = candidates.len();
        let passed: Vec<_> = candidates
            .into_iter()
            .filter(|line| match filter {
                None => true,
                Some(kinds) => kind(line).is_some_and(|kind| kinds.contains(kind)),
            })
            .collect();
        let receiver = self.online(to);
        let kinds: Vec<_> = passed.iter().map(|line| kind(line)).collect();
        let detail = json!({
            "event": event,
            "from": from,
            "to": to,
            "kinds": kinds,
            "filtered": total - passed.len(),
            "delivered": receiver.is_some() && !passed.is_empty(),
        });
        self.events.record(now, "candidates", detail);
        if let Some(receiver) = receiver.filter(|_| !passed.is_empty()) {
            self.push(
                now,
                receiver,
                event,
                json!({sender_key: from, "candidates": passed}),
            );
        }
    }
}

/// The candidate type of an SDP candidate line (RFC 8839 §5.1).
fn kind(line: &str) -> Option<&str> {
    let mut words = line.split_ascii_whitespace();
    words.find(|word| *word == "typ")?;
    words.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_is_the_word_after_typ() {
        let line = "candidate:1 1 udp 1694498815 203.0.113.9 5000 typ srflx raddr 10.0.0.2 rport 5";
        assert_eq!(kind(line), Some("srflx"));
        assert_eq!(kind("candidate:1 1 udp 1 203.0.113.9 5000 typ"), None);
        assert_eq!(kind("nonsense"), None);
    }
}
