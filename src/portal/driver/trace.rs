//! Spans of attempts and outages. An attempt is a trace of its own, linked to the one before; an
//! outage is recorded when it ends, since a span that stays open for hours is seen by nobody.

use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanContext, Status, TraceContextExt, Tracer};
use tracing::{Span, field, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::portal::channel::{Attempt, EndedOutage, Milestone, Outcome};
use crate::portal::error::Failure;
use crate::portal::login::LoginUrl;
use crate::telemetry::names;
use crate::telemetry::past::{Past, TRACER};

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
            names::span::PORTAL_CONNECT,
            { names::OTEL_KIND } = "client",
            { names::PORTAL_ATTEMPT } = attempt.of_outage,
            { names::PORTAL_BACKOFF_DELAY_MS } = millis(attempt.delay),
            { names::PORTAL_OUTAGE_ELAPSED_MS } = millis(attempt.outage_elapsed),
            { names::PORTAL_CAUSE } = attempt.cause.as_str(),
            { names::PORTAL_PROTOCOL } = attempt.protocol.as_str(),
            { names::SERVER_ADDRESS } = %self.host,
            { names::SERVER_PORT } = self.port,
            { names::ERROR_TYPE } = field::Empty,
            { names::HTTP_RESPONSE_STATUS_CODE } = field::Empty,
            { names::PORTAL_PROBLEM_CODE } = field::Empty,
            { names::PORTAL_CLOSE_CODE } = field::Empty,
            { names::OTEL_STATUS_CODE } = field::Empty,
            { names::OTEL_STATUS_DESCRIPTION } = field::Empty,
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
                        names::span::CHANNEL_JOIN,
                        { names::ERROR_TYPE } = field::Empty,
                        { names::OTEL_STATUS_CODE } = field::Empty,
                    ));
                }
            }
            Milestone::AttemptSucceeded | Milestone::AttemptAbandoned => {
                self.join = None;
                self.attempt = None;
            }
            // The outage tells how many there were, and the attempts what they were.
            Milestone::Failed(_) => {}
            Milestone::AttemptFailed(failure) => {
                if let Some(join) = self.join.take() {
                    mark_failed(&join, &failure);
                }
                if let Some(attempt) = self.attempt.take() {
                    mark_failed(&attempt, &failure);
                    attempt.record(names::OTEL_STATUS_DESCRIPTION, failure.message.as_str());
                    if let Some(status) = failure.http_status {
                        attempt.record(names::HTTP_RESPONSE_STATUS_CODE, status);
                    }
                    if let Some(code) = &failure.code {
                        attempt.record(names::PORTAL_PROBLEM_CODE, code.as_str());
                    }
                    if let Some(code) = failure.close_code {
                        attempt.record(names::PORTAL_CLOSE_CODE, code);
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
    let mut attributes = vec![
        KeyValue::new(names::PORTAL_OUTAGE_FAILURES, i64::from(outage.failures)),
        KeyValue::new(names::PORTAL_OUTAGE_CAUSE, outage.cause.as_str()),
        KeyValue::new(names::PORTAL_OUTAGE_LAST_CAUSE, outage.last_cause.as_str()),
        KeyValue::new(names::PORTAL_OUTAGE_OUTCOME, outage.outcome.as_str()),
    ];
    let status = match outage.outcome {
        // Errors that were retried until it worked do not make the whole a failure.
        Outcome::Joined => Status::Ok,
        Outcome::GaveUp => {
            attributes.push(KeyValue::new(names::ERROR_TYPE, outage.last_cause.as_str()));
            Status::error("the portal was not reached again")
        }
        // We were asked to end; nobody knows how it would have gone on.
        Outcome::Abandoned => Status::Unset,
    };
    let past = Past {
        name: names::span::PORTAL_OUTAGE,
        since: outage.since,
        until: outage.until,
        attributes,
        events: Vec::new(),
        links: attempts.into_iter().collect(),
        status,
    };
    past.record(tracer, now);
}

fn mark_failed(span: &Span, failure: &Failure) {
    span.record(names::ERROR_TYPE, failure.kind.as_str());
    span.record(names::OTEL_STATUS_CODE, "ERROR");
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
