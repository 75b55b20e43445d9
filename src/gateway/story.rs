//! Stories that are told once they are over: an allocation at a relay, the set-up of a client's
//! connection.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::trace::{Status, Tracer};

use crate::connectivity::relay::RelayError;
use crate::connectivity::relay::episode::Episode;
use crate::datapath::peers::PathKind;
use crate::ids::ClientId;
use crate::telemetry::names;
use crate::telemetry::past::Past;

/// A client that has a session and sends nothing for this long is set up all the same.
const QUIET: Duration = Duration::from_secs(30);

/// A story that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Story {
    /// An allocation at a relay.
    Relay(Episode),
    /// The set-up of a connection.
    SetUp(SetUp),
}

/// The set-up of a client's connection, step by step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetUp {
    /// Whose.
    pub client: ClientId,
    /// The authorization that asked for it.
    pub since: Instant,
    /// The last step, or the failure.
    pub until: Instant,
    /// The client's first candidates.
    pub candidates: Option<Instant>,
    /// The first nominated pair.
    pub nominated: Option<Instant>,
    /// What kind of path it is.
    pub path: Option<PathKind>,
    /// The first WireGuard handshake.
    pub handshake: Option<Instant>,
    /// The first inner packet, to the second.
    pub first_packet: Option<Instant>,
    /// Why it came to nothing.
    pub failure: Option<&'static str>,
}

/// Set-ups under way.
#[derive(Debug, Default)]
pub(super) struct SetUps {
    open: HashMap<ClientId, SetUp>,
    over: VecDeque<SetUp>,
}

impl SetUps {
    /// A connection is wanted. What was under way for the same client is superseded.
    pub(super) fn begin(&mut self, now: Instant, client: ClientId) {
        self.fail(now, client, "superseded");
        self.open.insert(
            client,
            SetUp {
                client,
                since: now,
                until: now,
                candidates: None,
                nominated: None,
                path: None,
                handshake: None,
                first_packet: None,
                failure: None,
            },
        );
    }

    pub(super) fn candidates(&mut self, now: Instant, client: ClientId) {
        if let Some(set_up) = self.open.get_mut(&client) {
            set_up.candidates.get_or_insert(now);
        }
    }

    pub(super) fn nominated(&mut self, now: Instant, client: ClientId, path: PathKind) {
        if let Some(set_up) = self.open.get_mut(&client) {
            set_up.nominated.get_or_insert(now);
            // The first one may be for seconds only; what carries the answer to the handshake
            // counts, and that may have waited for a pair.
            if set_up.handshake.is_none() || set_up.path.is_none() {
                set_up.path = Some(path);
            }
        }
    }

    pub(super) fn handshake(&mut self, now: Instant, client: ClientId) {
        if let Some(set_up) = self.open.get_mut(&client) {
            set_up.handshake.get_or_insert(now);
        }
    }

    pub(super) fn packet(&mut self, now: Instant, client: ClientId) {
        if let Some(mut set_up) = self.open.remove(&client) {
            set_up.first_packet = Some(now);
            set_up.until = now;
            self.over.push_back(set_up);
        }
    }

    pub(super) fn fail(&mut self, now: Instant, client: ClientId, why: &'static str) {
        if let Some(mut set_up) = self.open.remove(&client) {
            match set_up.handshake {
                // It was set up; that it did not last is another story.
                Some(at) => set_up.until = at,
                None => (set_up.until, set_up.failure) = (now, Some(why)),
            }
            self.over.push_back(set_up);
        }
    }

    /// Ends those that wait for nothing but a packet.
    pub(super) fn tick(&mut self, now: Instant) {
        let quiet: Vec<ClientId> = self
            .open
            .values()
            .filter(|s| s.handshake.is_some_and(|at| now - at >= QUIET))
            .map(|s| s.client)
            .collect();
        for client in quiet {
            self.fail(now, client, "");
        }
    }

    pub(super) fn poll(&mut self) -> Option<SetUp> {
        self.over.pop_front()
    }
}

impl Story {
    /// As a span.
    pub fn record<T: Tracer>(self, tracer: &T, now: Instant) {
        match self {
            Self::Relay(episode) => relay(episode).record(tracer, now),
            Self::SetUp(set_up) => connection(&set_up).record(tracer, now),
        }
    }
}

fn relay(episode: Episode) -> Past {
    let mut attributes = vec![
        KeyValue::new(names::RELAY_ID, episode.relay.to_string()),
        KeyValue::new(names::RELAY_BEGIN_REASON, episode.begin.as_str()),
        KeyValue::new(names::RELAY_END_REASON, episode.end.error_type()),
        KeyValue::new(names::RELAY_FLAPS, i64::from(episode.flaps)),
    ];
    if let Some(server) = episode.server {
        attributes.push(KeyValue::new(
            names::SERVER_ADDRESS,
            server.ip().to_string(),
        ));
        attributes.push(KeyValue::new(names::SERVER_PORT, i64::from(server.port())));
    }
    let on_purpose = matches!(
        episode.end,
        RelayError::Withdrawn | RelayError::Replaced | RelayError::Released
    );
    let status = if on_purpose {
        Status::Ok
    } else {
        attributes.push(KeyValue::new(names::ERROR_TYPE, episode.end.error_type()));
        Status::error(episode.end.to_string())
    };
    Past {
        name: names::span::RELAY_EPISODE,
        since: episode.since,
        until: episode.until,
        attributes,
        events: Vec::new(),
        links: Vec::new(),
        status,
    }
}

fn connection(set_up: &SetUp) -> Past {
    let mut attributes = vec![KeyValue::new(names::CLIENT_ID, set_up.client.to_string())];
    if let Some(path) = set_up.path {
        attributes.push(KeyValue::new(names::CLIENT_PATH, path.as_str()));
    }
    let status = match set_up.failure {
        None => Status::Ok,
        Some(why) => {
            attributes.push(KeyValue::new(names::ERROR_TYPE, why));
            Status::error(why)
        }
    };
    let events = [
        ("candidates", set_up.candidates),
        ("nominated", set_up.nominated),
        ("handshake", set_up.handshake),
        ("first_packet", set_up.first_packet),
    ];
    Past {
        name: names::span::CONNECTION_ESTABLISH,
        since: set_up.since,
        until: set_up.until,
        attributes,
        events: events
            .into_iter()
            .filter_map(|(name, at)| Some((name, at?)))
            .collect(),
        links: Vec::new(),
        status,
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const CLIENT: ClientId = ClientId(Uuid::from_u128(1));

    #[test]
    fn a_set_up_is_told_with_its_first_packet() {
        let start = Instant::now();
        let mut set_ups = SetUps::default();
        set_ups.begin(start, CLIENT);
        set_ups.candidates(start + SECOND, CLIENT);
        set_ups.candidates(start + 5 * SECOND, CLIENT);
        set_ups.nominated(start + 2 * SECOND, CLIENT, PathKind::RelayBoth);
        set_ups.nominated(start + 3 * SECOND, CLIENT, PathKind::Direct);
        set_ups.handshake(start + 4 * SECOND, CLIENT);
        set_ups.nominated(start + 5 * SECOND, CLIENT, PathKind::RelayLocal);
        assert_eq!(set_ups.poll(), None);
        set_ups.packet(start + 6 * SECOND, CLIENT);
        set_ups.packet(start + 7 * SECOND, CLIENT);
        assert_eq!(
            set_ups.poll(),
            Some(SetUp {
                client: CLIENT,
                since: start,
                until: start + 6 * SECOND,
                candidates: Some(start + SECOND),
                nominated: Some(start + 2 * SECOND),
                path: Some(PathKind::Direct),
                handshake: Some(start + 4 * SECOND),
                first_packet: Some(start + 6 * SECOND),
                failure: None,
            })
        );
        assert_eq!(set_ups.poll(), None);
    }

    #[test]
    fn a_handshake_that_waited_for_a_pair_is_told_with_its_path() {
        let start = Instant::now();
        let mut set_ups = SetUps::default();
        set_ups.begin(start, CLIENT);
        set_ups.handshake(start, CLIENT);
        set_ups.nominated(start + SECOND, CLIENT, PathKind::RelayBoth);
        set_ups.nominated(start + 2 * SECOND, CLIENT, PathKind::Direct);
        set_ups.packet(start + 3 * SECOND, CLIENT);
        let told = set_ups.poll().and_then(|s| s.path);
        assert_eq!(told, Some(PathKind::RelayBoth));
    }

    #[test]
    fn a_client_that_sends_nothing_is_set_up_with_its_handshake() {
        let start = Instant::now();
        let mut set_ups = SetUps::default();
        set_ups.begin(start, CLIENT);
        set_ups.handshake(start + SECOND, CLIENT);
        set_ups.tick(start + QUIET);
        assert_eq!(set_ups.poll(), None);
        set_ups.tick(start + SECOND + QUIET);
        let told = set_ups.poll().map(|s| (s.until, s.failure));
        assert_eq!(told, Some((start + SECOND, None)));
    }

    #[test]
    fn a_failure_before_the_handshake_is_told_as_such_and_after_it_not() {
        let start = Instant::now();
        let mut set_ups = SetUps::default();
        set_ups.begin(start, CLIENT);
        set_ups.fail(start + SECOND, CLIENT, "no_path");
        let told = set_ups.poll().map(|s| (s.until, s.failure));
        assert_eq!(told, Some((start + SECOND, Some("no_path"))));
        set_ups.begin(start, CLIENT);
        set_ups.handshake(start + SECOND, CLIENT);
        set_ups.fail(start + 2 * SECOND, CLIENT, "no_path");
        let told = set_ups.poll().map(|s| (s.until, s.failure));
        assert_eq!(told, Some((start + SECOND, None)));
    }
}
