//! The span of a portal outage. It begins with the outage, so that what happens meanwhile can link
//! to it, and is exported at its end. It tells the attempts in order and what became of relays and
//! clients, so that one span answers whether the outage cut anybody.

use std::time::{Instant, SystemTime};

use opentelemetry::trace::{Span, SpanContext, SpanKind, Status, Tracer};
use opentelemetry::{Context, KeyValue};

use super::names;

/// An outage links to so many of its first attempts, which tell how it began,
const FIRST_ATTEMPTS: usize = 8;
/// to so many of its last ones,
const LAST_ATTEMPTS: usize = 40;
/// to the first so many relays that were lost,
const RELAYS: usize = 16;
/// clients that were lost,
const CLIENTS_LOST: usize = 40;
/// and clients that have another path, of which there can be many without any harm, so that they
/// must not take the place of the others. An SDK drops what is beyond 128 links.
const CLIENTS_MOVED: usize = 8;

/// An attempt to connect, for its link.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// Its span.
    pub span: SpanContext,
    /// Its number, delay and cause.
    pub attributes: Vec<KeyValue>,
    /// Whether it ended in a join.
    pub joined: bool,
}

/// Attempts since the last outage, as many as the next one links to.
#[derive(Debug, Default)]
pub struct Attempts {
    first: Vec<Attempt>,
    last: std::collections::VecDeque<Attempt>,
}

impl Attempts {
    /// Adds one.
    pub fn push(&mut self, attempt: Attempt) {
        if self.first.len() < FIRST_ATTEMPTS {
            return self.first.push(attempt);
        }
        if self.last.len() == LAST_ATTEMPTS {
            self.last.pop_front();
        }
        self.last.push_back(attempt);
    }

    /// The latest one.
    pub fn latest(&mut self) -> Option<&mut Attempt> {
        self.last.back_mut().or(self.first.last_mut())
    }

    /// All but the latest one are forgotten: it made the session that may be lost next.
    pub fn keep_latest(&mut self) {
        let latest = self.last.pop_back().or_else(|| self.first.pop());
        self.first = latest.into_iter().collect();
        self.last.clear();
    }

    fn iter(&self) -> impl Iterator<Item = &Attempt> {
        self.first.iter().chain(&self.last)
    }
}

/// Whose doing it is that something ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Culprit {
    /// The portal said so, or did not give what only it can give.
    Portal,
    /// The relay.
    Relay,
    /// The network between us and the client.
    Network,
    /// The client.
    Client,
    /// Its time was over, as it had been set before.
    Expiry,
    /// The gateway, on its way out.
    Gateway,
}

impl Culprit {
    /// The value of `portal.outage.effect.cause`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Portal => "portal",
            Self::Relay => "relay",
            Self::Network => "network",
            Self::Client => "client",
            Self::Expiry => "expiry",
            Self::Gateway => "gateway",
        }
    }
}

/// Who is affected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affected {
    /// A relay is not used any more.
    Relay,
    /// A client has no path any more.
    ClientLost {
        /// Whether a relay was in it.
        relayed: bool,
    },
    /// A client has another path.
    ClientMoved,
}

impl Affected {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "relay_lost",
            Self::ClientLost { .. } => "client_lost",
            Self::ClientMoved => "client_moved",
        }
    }

    /// How many of the kind an outage links to.
    const fn most(self) -> usize {
        match self {
            Self::Relay => RELAYS,
            Self::ClientLost { .. } => CLIENTS_LOST,
            Self::ClientMoved => CLIENTS_MOVED,
        }
    }
}

/// Something that happened during an outage, because of it or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effect {
    /// To whom.
    pub affected: Affected,
    /// Whose doing it is.
    pub culprit: Culprit,
}

/// Clients that have a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Clients {
    /// All of them.
    pub all: usize,
    /// Those with a relay in it.
    pub relayed: usize,
}

#[derive(Debug, Default)]
struct Toll {
    relays_lost: i64,
    relays_lost_by_portal: i64,
    clients_lost: i64,
    clients_lost_relayed: i64,
    clients_lost_by_portal: i64,
    clients_moved: i64,
}

impl Toll {
    fn add(&mut self, effect: Effect) {
        let by_portal = i64::from(effect.culprit == Culprit::Portal);
        match effect.affected {
            Affected::Relay => {
                self.relays_lost += 1;
                self.relays_lost_by_portal += by_portal;
            }
            Affected::ClientLost { relayed } => {
                self.clients_lost += 1;
                self.clients_lost_relayed += i64::from(relayed);
                self.clients_lost_by_portal += by_portal;
            }
            Affected::ClientMoved => self.clients_moved += 1,
        }
    }
}

/// How an outage ended.
#[derive(Debug)]
pub struct End {
    /// When.
    pub until: Instant,
    /// What there is to say of its course.
    pub attributes: Vec<KeyValue>,
    /// How it counts.
    pub status: Status,
}

/// An outage that is not over.
#[derive(Debug)]
pub struct Outage<S> {
    span: S,
    since: Instant,
    began: SystemTime,
    clients: Option<Clients>,
    toll: Toll,
    effects: Vec<(Effect, SpanContext)>,
}

impl<S: Span> Outage<S> {
    /// Begins at `since`; `now` is the present, which dates it.
    pub fn begin<T: Tracer<Span = S>>(tracer: &T, since: Instant, now: Instant) -> Self {
        let age = now.saturating_duration_since(since);
        let began = SystemTime::now() - age;
        let span = tracer
            .span_builder(names::span::PORTAL_OUTAGE)
            .with_kind(SpanKind::Internal)
            .with_start_time(began)
            .start_with_context(tracer, &Context::new());
        Self {
            span,
            since,
            began,
            clients: None,
            toll: Toll::default(),
            effects: Vec::new(),
        }
    }

    /// What others link to.
    pub fn context(&self) -> &SpanContext {
        self.span.span_context()
    }

    /// Who was served when it began; what is told later does not change that.
    pub fn met(&mut self, clients: Clients) {
        self.clients.get_or_insert(clients);
    }

    /// Something happened, and `span` tells it.
    pub fn affected(&mut self, effect: Effect, span: SpanContext) {
        self.toll.add(effect);
        let kind = effect.affected.as_str();
        let alike = self
            .effects
            .iter()
            .filter(|(other, _)| other.affected.as_str() == kind)
            .count();
        if alike < effect.affected.most() && span.is_valid() {
            self.effects.push((effect, span));
        }
    }

    /// Ends it and has it exported. It is as long as it was by the monotonic clock, whatever
    /// happened to the time of day meanwhile.
    pub fn end(mut self, end: End, attempts: &Attempts) {
        for attempt in attempts.iter() {
            let mut attributes = attempt.attributes.clone();
            let relation = if attempt.joined { "session" } else { "attempt" };
            attributes.push(KeyValue::new(names::PORTAL_OUTAGE_LINK, relation));
            self.span.add_link(attempt.span.clone(), attributes);
        }
        for (effect, span) in self.effects {
            let attributes = vec![
                KeyValue::new(names::PORTAL_OUTAGE_LINK, effect.affected.as_str()),
                KeyValue::new(names::PORTAL_OUTAGE_EFFECT_CAUSE, effect.culprit.as_str()),
            ];
            self.span.add_link(span, attributes);
        }
        let count = |name, n: i64| KeyValue::new(name, n);
        let size = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let clients = self.clients.unwrap_or_default();
        let toll = self.toll;
        self.span.set_attributes(end.attributes);
        self.span.set_attributes([
            count(names::PORTAL_OUTAGE_CLIENTS, size(clients.all)),
            count(names::PORTAL_OUTAGE_CLIENTS_RELAYED, size(clients.relayed)),
            count(names::PORTAL_OUTAGE_CLIENTS_LOST, toll.clients_lost),
            count(
                names::PORTAL_OUTAGE_CLIENTS_LOST_RELAYED,
                toll.clients_lost_relayed,
            ),
            count(
                names::PORTAL_OUTAGE_CLIENTS_LOST_BY_PORTAL,
                toll.clients_lost_by_portal,
            ),
            count(names::PORTAL_OUTAGE_CLIENTS_MOVED, toll.clients_moved),
            count(names::PORTAL_OUTAGE_RELAYS_LOST, toll.relays_lost),
            count(
                names::PORTAL_OUTAGE_RELAYS_LOST_BY_PORTAL,
                toll.relays_lost_by_portal,
            ),
        ]);
        self.span.set_status(end.status);
        let length = end.until.saturating_duration_since(self.since);
        self.span.end_with_timestamp(self.began + length);
    }
}
