//! Spans of attempts and outages. An attempt is a trace of its own, linked to the one before and to
//! the outage it belongs to.

use std::time::{Duration, Instant};

use opentelemetry::global::BoxedSpan;
use opentelemetry::trace::{SpanContext, Status, TraceContextExt};
use opentelemetry::{Context, KeyValue};
use tracing::{Span, field, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::portal::channel::{Attempt, EndedOutage, Milestone, Outcome};
use crate::portal::error::Failure;
use crate::portal::login::LoginUrl;
use crate::telemetry::names;
use crate::telemetry::outage::{self, Attempts, Clients, Effect, Outage};
use crate::telemetry::past::TRACER;

pub(super) struct Trace {
    host: String,
    port: u16,
    attempt: Option<Span>,
    join: Option<Span>,
    /// Since the last outage ended, and the one before.
    attempts: Attempts,
    previous: Option<SpanContext>,
    outage: Option<Outage<BoxedSpan>>,
}

impl Trace {
    pub(super) fn new(login: &LoginUrl) -> Self {
        Self {
            host: login.host().to_string(),
            port: login.port(),
            attempt: None,
            join: None,
            attempts: Attempts::default(),
            previous: None,
            outage: None,
        }
    }

    /// The span of a new attempt, to run the dialling in.
    pub(super) fn attempt(&mut self, attempt: &Attempt) -> Span {
        let span = info_span!(
            parent: None,
            names::span::PORTAL_CONNECT,
            { names::OTEL_KIND } = "client",
            { names::PORTAL_ATTEMPT } = i64::from(attempt.of_outage),
            { names::PORTAL_BACKOFF_DELAY_MS } = millis(attempt.delay),
            { names::PORTAL_OUTAGE_ELAPSED_MS } = millis(attempt.outage_elapsed),
            { names::PORTAL_CAUSE } = attempt.cause.as_str(),
            { names::PORTAL_PROTOCOL } = attempt.protocol.as_str(),
            { names::SERVER_ADDRESS } = %self.host,
            { names::SERVER_PORT } = i64::from(self.port),
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
        if let Some(outage) = &self.outage {
            let attributes = vec![KeyValue::new(names::PORTAL_OUTAGE_LINK, "outage")];
            span.add_link_with_attributes(outage.context().clone(), attributes);
        }
        let context = span.context().span().span_context().clone();
        if context.is_valid() {
            self.attempts.push(outage::Attempt {
                span: context.clone(),
                attributes: vec![
                    KeyValue::new(names::PORTAL_ATTEMPT, i64::from(attempt.of_outage)),
                    KeyValue::new(names::PORTAL_BACKOFF_DELAY_MS, millis(attempt.delay)),
                    KeyValue::new(names::PORTAL_CAUSE, attempt.cause.as_str()),
                ],
                joined: false,
            });
            self.previous = Some(context);
        }
        self.attempt = Some(span.clone());
        span
    }

    /// With the span of the attempt that is under way, if one is.
    pub(super) fn current(&self) -> Context {
        self.attempt
            .as_ref()
            .map_or_else(Context::new, OpenTelemetrySpanExt::context)
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
            Milestone::AttemptSucceeded => {
                self.join = None;
                self.attempt = None;
                if let Some(attempt) = self.attempts.latest() {
                    attempt.joined = true;
                }
            }
            Milestone::AttemptAbandoned => {
                self.join = None;
                self.attempt = None;
            }
            // The outage tells how many there were, and the attempts what they were.
            Milestone::Failed(_) => {
                self.open_outage(now, now);
            }
            Milestone::AttemptFailed(failure) => {
                if let Some(attempt) = self.attempts.latest() {
                    let kind = KeyValue::new(names::ERROR_TYPE, failure.kind.as_str());
                    attempt.attributes.push(kind);
                }
                if let Some(join) = self.join.take() {
                    mark_failed(&join, &failure);
                }
                if let Some(attempt) = self.attempt.take() {
                    mark_failed(&attempt, &failure);
                    attempt.record(names::OTEL_STATUS_DESCRIPTION, failure.message.as_str());
                    if let Some(status) = failure.http_status {
                        attempt.record(names::HTTP_RESPONSE_STATUS_CODE, i64::from(status));
                    }
                    if let Some(code) = &failure.code {
                        attempt.record(names::PORTAL_PROBLEM_CODE, code.as_str());
                    }
                    if let Some(code) = failure.close_code {
                        attempt.record(names::PORTAL_CLOSE_CODE, i64::from(code));
                    }
                }
            }
            Milestone::OutageEnded(ended) => {
                self.open_outage(ended.since, now);
                if let Some(outage) = self.outage.take() {
                    outage.end(end_of(&ended), &self.attempts);
                }
                self.attempts.keep_latest();
            }
        }
    }

    fn open_outage(&mut self, since: Instant, now: Instant) {
        self.outage.get_or_insert_with(|| {
            Outage::begin(&opentelemetry::global::tracer(TRACER), since, now)
        });
    }

    /// The span of the outage that is on.
    pub(super) fn outage(&self) -> Option<SpanContext> {
        self.outage.as_ref().map(|o| o.context().clone())
    }

    pub(super) fn met(&mut self, clients: Clients) {
        if let Some(outage) = &mut self.outage {
            outage.met(clients);
        }
    }

    pub(super) fn affected(&mut self, effect: Effect, span: SpanContext) {
        if let Some(outage) = &mut self.outage {
            outage.affected(effect, span);
        }
    }
}

/// What the span of an outage says at its end.
pub(super) fn end_of(ended: &EndedOutage) -> outage::End {
    let mut attributes = vec![
        KeyValue::new(names::PORTAL_OUTAGE_FAILURES, i64::from(ended.failures)),
        KeyValue::new(names::PORTAL_OUTAGE_CAUSE, ended.cause.as_str()),
        KeyValue::new(names::PORTAL_OUTAGE_LAST_CAUSE, ended.last_cause.as_str()),
        KeyValue::new(names::PORTAL_OUTAGE_OUTCOME, ended.outcome.as_str()),
    ];
    let status = match ended.outcome {
        // Errors that were retried until it worked do not make the whole a failure.
        Outcome::Joined => Status::Ok,
        Outcome::GaveUp => {
            attributes.push(KeyValue::new(names::ERROR_TYPE, ended.last_cause.as_str()));
            Status::error("the portal was not reached again")
        }
        // We were asked to end; nobody knows how it would have gone on.
        Outcome::Abandoned => Status::Unset,
    };
    outage::End {
        until: ended.until,
        attributes,
        status,
    }
}

fn mark_failed(span: &Span, failure: &Failure) {
    span.record(names::ERROR_TYPE, failure.kind.as_str());
    span.record(names::OTEL_STATUS_CODE, "ERROR");
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
