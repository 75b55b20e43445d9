//! Spans of what is over. A span that stays open for hours is seen by nobody, so longer stories are
//! recorded at their end, with the times they had.

use std::time::{Instant, SystemTime};

use opentelemetry::trace::{Event, Link, Span as _, SpanContext, SpanKind, Status, Tracer};
use opentelemetry::{Context, KeyValue};

use super::names;

/// Name of the tracer that such spans are recorded with.
pub const TRACER: &str = "firezone-gateway";

/// A story that is over.
#[derive(Debug)]
pub struct Past {
    /// Name of the span.
    pub name: &'static str,
    /// Its beginning.
    pub since: Instant,
    /// Its end.
    pub until: Instant,
    /// What there is to say.
    pub attributes: Vec<KeyValue>,
    /// What happened in it, and when.
    pub events: Vec<(&'static str, Instant)>,
    /// How it ended.
    pub status: Status,
}

impl Past {
    /// Records it, with a link to the outage of the portal that was on when it ended. `now` is the
    /// present, which dates everything else. Returns what others link to.
    pub fn record<T: Tracer>(
        self,
        tracer: &T,
        now: Instant,
        outage: Option<SpanContext>,
    ) -> SpanContext {
        let wall = SystemTime::now();
        let date = |at: Instant| {
            wall.checked_sub(now.saturating_duration_since(at))
                .unwrap_or(wall)
        };
        let events = self
            .events
            .into_iter()
            .map(|(name, at)| Event::new(name, date(at), Vec::new(), 0))
            .collect();
        let mut span = tracer
            .span_builder(self.name)
            .with_kind(SpanKind::Internal)
            .with_start_time(date(self.since))
            .with_attributes(self.attributes)
            .with_events(events)
            .with_links(outage.map(outage_link).into_iter().collect())
            .start_with_context(tracer, &Context::new());
        span.set_status(self.status);
        span.end_with_timestamp(date(self.until));
        span.span_context().clone()
    }
}

/// The link of whatever happens while the portal is away.
fn outage_link(outage: SpanContext) -> Link {
    let attributes = vec![KeyValue::new(names::PORTAL_OUTAGE_LINK, "outage")];
    Link::new(outage, attributes, 0)
}
