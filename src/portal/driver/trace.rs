//! Spans of attempts and outages. An attempt is a trace of its own, linked to the one before; an
//! outage is recorded when it ends, since a span that stays open for hours is seen by nobody.

use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{
    Link, Span as _, SpanContext, SpanKind, Status, TraceContextExt, Tracer,
};
use opentelemetry::{Context, KeyValue};
use tracing::{Span, field, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::portal::channel::{Attempt, EndedOutage, Milestone};
use crate::portal::error::Failure;
use crate::portal::login::LoginUrl;

/// Name of the tracer that back-dated spans are recorded with.
pub const TRACER: &str = "firezone-gateway";
/// An outage links to so many of its attempts, the latest ones.
const MAX_LINKS: usize = 64;

pub(super) struct Trace {
    host: String,
    port: u16,
    attempt: Option<Span>,
    join: Option<Span>,
    /// Attempts since the last outage ended.
    recent: Vec<SpanContext>,
    previous: Option<SpanContext>,
}

impl Trace {
    pub(super) fn new(login: &LoginUrl) -> Self {
        Self {
            host: login.host().to_string(),
            port: login.port(),
            attempt: None,
            join: None,
            recent: Vec::new(),
            previous: None,
        }
    }

    /// The span of a new attempt, to run the dialling in.
    pub(super) fn attempt(&mut self, attempt: &Attempt) -> Span {
        let span = info_span!(
            parent: None,
            "portal.connect",
            "otel.kind" = "client",
            "portal.attempt" = attempt.of_outage,
            "portal.backoff.delay_ms" = millis(attempt.delay),
            "portal.outage.elapsed_ms" = millis(attempt.outage_elapsed),
            "server.address" = %self.host,
            "server.port" = self.port,
            "error.type" = field::Empty,
            "http.response.status_code" = field::Empty,
            "otel.status_code" = field::Empty,
            "otel.status_description" = field::Empty,
        );
        if let Some(previous) = self.previous.take() {
            span.add_link(previous);
        }
        let context = span.context().span().span_context().clone();
        if context.is_valid() {
            if self.recent.len() == MAX_LINKS {
                self.recent.remove(0);
            }
            self.recent.push(context.clone());
            self.previous = Some(context);
        }
        self.attempt = Some(span.clone());
        span
    }

    pub(super) fn record(&mut self, milestone: Milestone, now: Instant) {
        match milestone {
            Milestone::JoinStarted => {
                if let Some(attempt) = &self.attempt {
                    self.join = Some(info_span!(
                        parent: attempt,
                        "channel.join",
                        "error.type" = field::Empty,
                        "otel.status_code" = field::Empty,
                    ));
                }
            }
            Milestone::AttemptSucceeded | Milestone::AttemptAbandoned => {
                self.join = None;
                self.attempt = None;
            }
            Milestone::AttemptFailed(failure) => {
                if let Some(join) = self.join.take() {
                    mark_failed(&join, &failure);
                }
                if let Some(attempt) = self.attempt.take() {
                    mark_failed(&attempt, &failure);
                    attempt.record("otel.status_description", failure.message.as_str());
                    if let Some(status) = failure.http_status {
                        attempt.record("http.response.status_code", status);
                    }
                }
            }
            Milestone::OutageEnded(outage) => {
                let tracer = opentelemetry::global::tracer(TRACER);
                record_outage(&tracer, &outage, self.recent.drain(..), now);
            }
        }
    }
}

/// Records an outage with the times it had. Attempts are linked, not children: they are over and
/// exported long before it is known that there is an outage to speak of.
pub(super) fn record_outage<T: Tracer>(
    tracer: &T,
    outage: &EndedOutage,
    attempts: impl IntoIterator<Item = SpanContext>,
    now: Instant,
) {
    let wall = SystemTime::now();
    let date = |at: Instant| {
        wall.checked_sub(now.saturating_duration_since(at))
            .unwrap_or(wall)
    };
    let outcome = if outage.recovered {
        "recovered"
    } else {
        "abandoned"
    };
    let mut span = tracer
        .span_builder("portal.outage")
        .with_kind(SpanKind::Internal)
        .with_start_time(date(outage.since))
        .with_attributes([
            KeyValue::new("portal.outage.attempts", i64::from(outage.failures)),
            KeyValue::new("portal.outage.cause", outage.cause.as_str()),
            KeyValue::new("portal.outage.outcome", outcome),
        ])
        .with_links(attempts.into_iter().map(Link::with_context).collect())
        .start_with_context(tracer, &Context::new());
    if outage.recovered {
        // Errors that were retried until it worked do not make the whole a failure.
        span.set_status(Status::Ok);
    } else {
        span.set_attribute(KeyValue::new("error.type", outage.cause.as_str()));
        span.set_status(Status::error("the portal was not reached again"));
    }
    span.end_with_timestamp(date(outage.until));
}

fn mark_failed(span: &Span, failure: &Failure) {
    span.record("error.type", failure.kind.as_str());
    span.record("otel.status_code", "ERROR");
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
