//! Stories that are told once they are over: an allocation at a relay, the set-up of a client's
//! connection, a path to a client.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanContext, Status, Tracer};

use crate::access::RemovalCause;
use crate::admin::model::PathReason;
use crate::connectivity::relay::RelayError;
use crate::connectivity::relay::episode::Episode;
use crate::datapath::peers::{Path, PathKind};
use crate::ids::ClientId;
use crate::telemetry::durations::Timing;
use crate::telemetry::names;
use crate::telemetry::outage::{Affected, Clients, Culprit, Effect};
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
    /// A path to a client.
    Path(PathEpisode),
}

/// The time that a client's packets took one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathEpisode {
    /// Whose.
    pub client: ClientId,
    /// What kind of path it was.
    pub kind: PathKind,
    /// Our relay's address, if that was in it.
    pub relay: Option<SocketAddr>,
    /// When it began.
    pub since: Instant,
    /// When it ended.
    pub until: Instant,
    /// Why it began.
    pub begin: PathReason,
    /// Why it ended.
    pub end: PathEnd,
    /// What took its place.
    pub next: Option<PathKind>,
}

/// Why a path to a client ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathEnd {
    /// It changed, or none works any more.
    Changed(PathReason),
    /// The same, because our relay is not used any more; whose doing that is.
    RelayLost(Culprit),
    /// The connection failed, with an `error.type`.
    Failed(&'static str),
    /// The client asked for a new connection.
    Superseded,
    /// The client said goodbye.
    Goodbye,
    /// The client's access ended.
    Removed(RemovalCause),
    /// The portal refused the token.
    TokenRefused,
    /// The gateway ends.
    Shutdown,
}

impl PathEnd {
    /// The value of `client.path.end.reason`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Changed(reason) => reason.as_str(),
            Self::RelayLost(_) => PathReason::RelayLost.as_str(),
            Self::Failed(kind) => kind,
            Self::Superseded => "superseded",
            Self::Goodbye => "goodbye",
            Self::Removed(cause) => cause.as_str(),
            Self::TokenRefused => "token_refused",
            Self::Shutdown => "shutdown",
        }
    }

    fn culprit(self) -> Culprit {
        match self {
            Self::RelayLost(culprit) => culprit,
            Self::Changed(PathReason::RelayLost) => Culprit::Relay,
            Self::Changed(PathReason::Withdrawn | PathReason::Nominated)
            | Self::Superseded
            | Self::Goodbye
            | Self::Failed("handshake_timeout") => Culprit::Client,
            Self::Changed(
                PathReason::Dead
                | PathReason::Returned
                | PathReason::Disconnected
                | PathReason::Updated,
            )
            | Self::Failed(_) => Culprit::Network,
            Self::Removed(RemovalCause::Expired) => Culprit::Expiry,
            Self::Removed(_) | Self::TokenRefused => Culprit::Portal,
            Self::Shutdown => Culprit::Gateway,
        }
    }

    /// Whether somebody wanted it so.
    const fn on_purpose(self) -> bool {
        matches!(
            self,
            Self::Superseded | Self::Goodbye | Self::Removed(_) | Self::Shutdown
        )
    }
}

/// Paths in use, and what is over.
#[derive(Debug, Default)]
pub(super) struct Paths {
    open: HashMap<ClientId, PathEpisode>,
    over: VecDeque<PathEpisode>,
    /// Relays that were lost lately.
    relays: VecDeque<(SocketAddr, Instant, Culprit)>,
}

/// So many lost relays are remembered.
const LOST_RELAYS: usize = 16;

impl Paths {
    pub(super) fn changed(
        &mut self,
        now: Instant,
        client: ClientId,
        path: Option<Path>,
        reason: PathReason,
    ) {
        let kind = path.map(|p| p.kind);
        if let Some(open) = self.open.get_mut(&client)
            && let (PathReason::Updated, Some(kind)) = (reason, kind)
        {
            open.kind = kind;
            return;
        }
        self.end(now, client, PathEnd::Changed(reason), kind);
        if let Some(path) = path {
            let episode = PathEpisode {
                client,
                kind: path.kind,
                relay: path.channel.map(|_| path.destination),
                since: now,
                until: now,
                begin: reason,
                end: PathEnd::Shutdown,
                next: None,
            };
            self.open.insert(client, episode);
        }
    }

    pub(super) fn close(&mut self, now: Instant, client: ClientId, end: PathEnd) {
        self.end(now, client, end, None);
    }

    fn end(&mut self, now: Instant, client: ClientId, end: PathEnd, next: Option<PathKind>) {
        if let Some(open) = self.open.remove(&client) {
            self.over.push_back(PathEpisode {
                until: now,
                end,
                next,
                ..open
            });
        }
    }

    /// A relay is not used any more. Paths over it may have ended before.
    pub(super) fn relay_lost(&mut self, episode: &Episode) {
        let Some(server) = episode.server else { return };
        if self.relays.len() == LOST_RELAYS {
            self.relays.pop_front();
        }
        self.relays
            .push_back((server, episode.until, relay_culprit(episode.end)));
    }

    pub(super) fn clients(&self) -> Clients {
        Clients {
            all: self.open.len(),
            relayed: self.open.values().filter(|p| p.kind.is_relayed()).count(),
        }
    }

    pub(super) fn poll(&mut self) -> Option<PathEpisode> {
        let mut over = self.over.pop_front()?;
        if over.end == PathEnd::Changed(PathReason::RelayLost) {
            let lost = self
                .relays
                .iter()
                .rev()
                .find(|(server, at, _)| Some(*server) == over.relay && *at >= over.since);
            if let Some((_, _, culprit)) = lost {
                over.end = PathEnd::RelayLost(*culprit);
            }
        }
        Some(over)
    }
}

/// Whose doing the end of an episode with a relay is.
fn relay_culprit(end: RelayError) -> Culprit {
    match end {
        RelayError::Withdrawn | RelayError::Replaced => Culprit::Portal,
        // Credentials are good for a time, and only the portal has others.
        RelayError::BadCredentials => Culprit::Portal,
        RelayError::Released => Culprit::Gateway,
        _ => Culprit::Relay,
    }
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

impl SetUp {
    /// How long it took until the client could send something, or until it came to nothing.
    fn timing(&self) -> Timing {
        Timing::ClientSetUp {
            took: self.handshake.unwrap_or(self.until) - self.since,
            path: self.path.map(PathKind::as_str),
            error: self.failure,
        }
    }
}

impl Story {
    /// How long it took, if that tells something.
    pub fn timing(&self) -> Option<Timing> {
        match self {
            Self::SetUp(set_up) => Some(set_up.timing()),
            _ => None,
        }
    }

    /// What it means for an outage during which it ended. `None` if nobody is affected who did not
    /// want it.
    pub fn effect(&self) -> Option<Effect> {
        let (affected, culprit) = match self {
            Self::SetUp(_) => return None,
            Self::Relay(episode) => (Affected::Relay, relay_culprit(episode.end)),
            Self::Path(path) => {
                let affected = match path.next {
                    Some(_) => Affected::ClientMoved,
                    None => Affected::ClientLost {
                        relayed: path.kind.is_relayed(),
                    },
                };
                (affected, path.end.culprit())
            }
        };
        let wanted = match affected {
            Affected::ClientMoved => false,
            Affected::Relay | Affected::ClientLost { .. } => {
                matches!(culprit, Culprit::Client | Culprit::Gateway)
            }
        };
        (!wanted).then_some(Effect { affected, culprit })
    }

    /// As a span, linked to the outage that is on.
    pub fn record<T: Tracer>(
        self,
        tracer: &T,
        now: Instant,
        outage: Option<SpanContext>,
    ) -> SpanContext {
        let past = match self {
            Self::Relay(episode) => relay(episode),
            Self::SetUp(set_up) => connection(&set_up),
            Self::Path(path) => self::path(&path),
        };
        past.record(tracer, now, outage)
    }
}

fn path(path: &PathEpisode) -> Past {
    let mut attributes = vec![
        KeyValue::new(names::CLIENT_ID, path.client.to_string()),
        KeyValue::new(names::CLIENT_PATH, path.kind.as_str()),
        KeyValue::new(names::CLIENT_PATH_BEGIN_REASON, path.begin.as_str()),
        KeyValue::new(names::CLIENT_PATH_END_REASON, path.end.as_str()),
    ];
    if let Some(relay) = path.relay {
        attributes.push(KeyValue::new(names::SERVER_ADDRESS, relay.ip().to_string()));
        attributes.push(KeyValue::new(names::SERVER_PORT, i64::from(relay.port())));
    }
    if let Some(next) = path.next {
        attributes.push(KeyValue::new(names::CLIENT_PATH_NEXT, next.as_str()));
    }
    let status = if path.next.is_some() || path.end.on_purpose() {
        Status::Ok
    } else {
        attributes.push(KeyValue::new(names::ERROR_TYPE, path.end.as_str()));
        Status::error("the client has no path any more")
    };
    Past {
        name: names::span::CONNECTION_PATH,
        since: path.since,
        until: path.until,
        attributes,
        events: Vec::new(),
        status,
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
        status,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;
    use crate::connectivity::relay::episode::EpisodeBegin;
    use crate::ids::RelayId;

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
        let told = set_ups.poll();
        let timing = told.clone().and_then(|s| Story::SetUp(s).timing());
        let took = Timing::ClientSetUp {
            took: SECOND,
            path: None,
            error: None,
        };
        assert_eq!(timing, Some(took), "what came later is the client's");
        let told = told.map(|s| (s.until, s.failure));
        assert_eq!(told, Some((start + SECOND, None)));
    }

    #[test]
    fn a_failure_before_the_handshake_is_told_as_such_and_after_it_not() {
        let start = Instant::now();
        let mut set_ups = SetUps::default();
        set_ups.begin(start, CLIENT);
        set_ups.fail(start + SECOND, CLIENT, "no_path");
        let told = set_ups.poll();
        let timing = told.clone().and_then(|s| Story::SetUp(s).timing());
        let failed = Timing::ClientSetUp {
            took: SECOND,
            path: None,
            error: Some("no_path"),
        };
        assert_eq!(timing, Some(failed));
        let told = told.map(|s| (s.until, s.failure));
        assert_eq!(told, Some((start + SECOND, Some("no_path"))));
        set_ups.begin(start, CLIENT);
        set_ups.handshake(start + SECOND, CLIENT);
        set_ups.fail(start + 2 * SECOND, CLIENT, "no_path");
        let told = set_ups.poll().map(|s| (s.until, s.failure));
        assert_eq!(told, Some((start + SECOND, None)));
    }

    const RELAY: &str = "203.0.113.9:3478";

    fn over(relay: Option<&str>) -> Option<Path> {
        Some(Path {
            source: None,
            destination: relay.unwrap_or("192.0.2.9:40000").parse().unwrap(),
            channel: relay.map(|_| 0x4000),
            kind: match relay {
                Some(_) => PathKind::RelayLocal,
                None => PathKind::Direct,
            },
        })
    }

    fn lost(now: Instant, end: RelayError) -> Episode {
        Episode {
            relay: RelayId(Uuid::from_u128(9)),
            server: Some(RELAY.parse().unwrap()),
            since: now,
            until: now,
            begin: EpisodeBegin::Offered,
            end,
            flaps: 0,
        }
    }

    #[test]
    fn a_path_is_told_with_what_took_its_place() {
        let start = Instant::now();
        let mut paths = Paths::default();
        paths.changed(start, CLIENT, over(Some(RELAY)), PathReason::Nominated);
        paths.changed(
            start + SECOND,
            CLIENT,
            over(Some(RELAY)),
            PathReason::Updated,
        );
        assert_eq!(paths.clients(), Clients { all: 1, relayed: 1 });
        paths.changed(
            start + 2 * SECOND,
            CLIENT,
            over(None),
            PathReason::Nominated,
        );
        assert_eq!(paths.clients(), Clients { all: 1, relayed: 0 });
        let told = paths.poll().unwrap();
        assert_eq!((told.since, told.until), (start, start + 2 * SECOND));
        assert_eq!(
            (told.kind, told.next),
            (PathKind::RelayLocal, Some(PathKind::Direct))
        );
        assert_eq!(told.relay, Some(RELAY.parse().unwrap()));
        let effect = Story::Path(told).effect().unwrap();
        assert_eq!(effect.affected, Affected::ClientMoved);

        paths.changed(start + 3 * SECOND, CLIENT, None, PathReason::Disconnected);
        paths.close(start + 4 * SECOND, CLIENT, PathEnd::Failed("no_path"));
        let told = paths.poll().unwrap();
        assert_eq!(told.end.as_str(), "disconnected");
        assert_eq!(paths.poll(), None, "it was lost once");
        let effect = Story::Path(told).effect().unwrap();
        assert_eq!(effect.affected, Affected::ClientLost { relayed: false });
        assert_eq!(effect.culprit, Culprit::Network);
        assert_eq!(paths.clients(), Clients::default());
    }

    #[test]
    fn a_path_over_a_relay_that_the_portal_took_away_is_the_portals_doing() {
        for (end, culprit) in [
            (RelayError::Withdrawn, Culprit::Portal),
            (RelayError::BadCredentials, Culprit::Portal),
            (RelayError::NoResponse, Culprit::Relay),
        ] {
            // Which of them is heard of first depends on the connection.
            for path_first in [true, false] {
                let now = Instant::now();
                let mut paths = Paths::default();
                paths.changed(now, CLIENT, over(Some(RELAY)), PathReason::Nominated);
                let episode = lost(now + SECOND, end);
                if !path_first {
                    paths.relay_lost(&episode);
                }
                paths.changed(now + SECOND, CLIENT, None, PathReason::RelayLost);
                if path_first {
                    paths.relay_lost(&episode);
                }
                let effect = Story::Path(paths.poll().unwrap()).effect().unwrap();
                assert_eq!(effect.culprit, culprit, "{end:?}");
                assert_eq!(effect.affected, Affected::ClientLost { relayed: true });
                assert_eq!(
                    Story::Relay(episode).effect().map(|e| e.culprit),
                    Some(culprit)
                );
            }
        }
    }

    #[test]
    fn who_leaves_is_not_cut() {
        for end in [PathEnd::Goodbye, PathEnd::Superseded, PathEnd::Shutdown] {
            let now = Instant::now();
            let mut paths = Paths::default();
            paths.changed(now, CLIENT, over(None), PathReason::Nominated);
            paths.close(now, CLIENT, end);
            let told = Story::Path(paths.poll().unwrap());
            assert_eq!(told.effect(), None, "{end:?}");
        }
    }
}
