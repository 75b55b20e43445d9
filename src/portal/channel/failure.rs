//! What follows from a failure: another attempt and when, a refused token, or the end.

use std::time::{Duration, Instant};

use super::{
    Action, AttemptCause, CLOSE_NORMAL, Channel, EndedOutage, Event, GaveUpReason, HURRIED_SPACING,
    Hangup, Milestone, Outcome, Phase,
};
use crate::portal::error::{ErrorType, Failure};
use crate::portal::login::Protocol;
use crate::portal::reconnect::{DelayReason, Verdict};

impl Channel {
    pub(super) fn hang_up(&mut self, how: Hangup) {
        match how {
            Hangup::Gone => {}
            Hangup::Politely => self.actions.push_back(Action::Close { code: CLOSE_NORMAL }),
            Hangup::Abruptly => self.actions.push_back(Action::Disconnect),
        }
    }

    /// Every failure of an attempt or a socket ends here.
    pub(super) fn fail(&mut self, now: Instant, failure: Failure, hangup: Hangup) {
        self.hang_up(hangup);
        let was_joined = self.is_joined();
        let undelivered = match &mut self.phase {
            Phase::Open(session) => session.take_unconfirmed(),
            _ => Vec::new(),
        };
        self.milestones
            .push_back(Milestone::Failed(failure.clone()));
        if std::mem::take(&mut self.attempt_open) {
            self.milestones
                .push_back(Milestone::AttemptFailed(failure.clone()));
        }
        *self.counters.failures.entry(failure.kind).or_default() += 1;
        self.last_error = Some((failure.clone(), now));
        if was_joined {
            self.events.push_back(Event::Disconnected {
                failure: failure.clone(),
                undelivered,
            });
        }
        self.choose_protocol(&failure);

        if self.blocked.is_some() {
            return self.wait_blocked(now, failure);
        }
        match failure.kind {
            ErrorType::TokenExpired if !self.suspect => {
                // Also sent by mistake, e.g. to the loser of two connections that raced; what the
                // clients have must not be taken away for that.
                self.suspect = true;
                let delay = self.reconnect.confirm(now, &failure);
                tracing::warn!(
                    error.type = failure.kind.as_str(),
                    delay = ?delay,
                    "the portal withdrew the token; making sure with one fresh connection"
                );
                self.wait(now, delay, AttemptCause::Confirmation);
            }
            kind if is_refusal(kind) => self.block(now, failure),
            _ => match self.reconnect.failed(now, &failure) {
                Verdict::Retry { delay, reason } => {
                    self.retry(now, &failure, was_joined, delay, reason);
                }
                Verdict::GiveUp => self.give_up(now, failure, GaveUpReason::BudgetExhausted),
            },
        }
    }

    fn retry(
        &mut self,
        now: Instant,
        failure: &Failure,
        was_joined: bool,
        mut delay: Duration,
        reason: DelayReason,
    ) {
        let hurried = self.earliest(now).saturating_duration_since(now);
        let mut cause = AttemptCause::Failure(reason);
        if let Some(hurry) = self.hurry
            && reason == DelayReason::Backoff
        {
            cause = hurry;
            if hurried < delay {
                self.reconnect.restart_growth();
                delay = hurried;
            }
        }
        let failures = self.reconnect.outage().map_or(0, |o| o.failures());
        let delay_s = delay.as_secs_f64();
        if was_joined {
            tracing::warn!(
                error.type = failure.kind.as_str(),
                cause = %failure,
                "portal connection lost; next attempt in {delay_s:.1} s, clients keep their access"
            );
        } else {
            tracing::warn!(
                error.type = failure.kind.as_str(),
                cause = %failure,
                failures,
                reason = ?reason,
                "no connection to the portal; next attempt in {delay_s:.1} s"
            );
        }
        self.wait(now, delay, cause);
    }

    fn wait(&mut self, now: Instant, delay: Duration, cause: AttemptCause) {
        self.phase = Phase::Waiting {
            until: now + delay,
            delay,
            cause,
        };
    }

    /// A portal that does not know the path of one version is asked for the other: at once the
    /// first time, since nothing is wrong with the connection, then in turns. Every outage begins
    /// with version 2 again; the portal may have been updated in it.
    fn choose_protocol(&mut self, failure: &Failure) {
        if self.reconnect.outage().is_none() {
            self.protocol = Protocol::default();
            self.tried_other_protocol = false;
        }
        if failure.http_status != Some(404) {
            return;
        }
        self.protocol = self.protocol.other();
        tracing::info!(
            protocol = self.protocol.as_str(),
            "the portal does not know this version of the channel; asking for the other one"
        );
        if !std::mem::replace(&mut self.tried_other_protocol, true) {
            self.hurry = Some(AttemptCause::OtherProtocol);
        }
    }

    fn block(&mut self, now: Instant, failure: Failure) {
        if self.config.exit_on_auth_failure {
            // Counted in the outage, so that the status tells how it came to this.
            self.reconnect.blocked(now, &failure);
            return self.give_up(now, failure, GaveUpReason::AuthRefused);
        }
        self.blocked = Some(failure.clone());
        self.events.push_back(Event::Blocked {
            failure: failure.clone(),
        });
        self.wait_blocked(now, failure);
    }

    fn wait_blocked(&mut self, now: Instant, failure: Failure) {
        let delay = self.reconnect.blocked(now, &failure);
        let delay_s = delay.as_secs();
        if is_refusal(failure.kind) {
            tracing::error!(
                error.type = failure.kind.as_str(),
                cause = %failure,
                "blocked: the portal refuses this gateway; set a valid token. Next check in \
                 {delay_s} s or when the token changes"
            );
        } else {
            tracing::warn!(
                error.type = failure.kind.as_str(),
                cause = %failure,
                "still blocked: the token could not be checked. Next check in {delay_s} s or when \
                 the token changes"
            );
        }
        self.wait(now, delay, AttemptCause::Recheck);
    }

    pub(super) fn unblock(&mut self) {
        if self.blocked.take().is_some() {
            self.events.push_back(Event::Unblocked);
        }
    }

    fn give_up(&mut self, now: Instant, failure: Failure, reason: GaveUpReason) {
        tracing::error!(
            error.type = failure.kind.as_str(),
            cause = %failure,
            reason = ?reason,
            "giving up on the portal"
        );
        self.end_outage(now, Outcome::GaveUp);
        self.phase = Phase::GaveUp;
        self.events.push_back(Event::GaveUp { failure, reason });
    }

    pub(super) fn end_outage(&mut self, until: Instant, outcome: Outcome) {
        let Some(outage) = self.reconnect.take() else {
            return;
        };
        let ended = EndedOutage {
            since: outage.since(),
            until,
            cause: outage.cause(),
            last_cause: outage.last_cause(),
            failures: outage.failures(),
            outcome,
        };
        if outcome == Outcome::Joined {
            tracing::info!(
                outage_s = until.saturating_duration_since(ended.since).as_secs(),
                failures = ended.failures,
                cause = ended.cause.as_str(),
                "portal outage is over, the connection is stable"
            );
        }
        self.milestones.push_back(Milestone::OutageEnded(ended));
    }

    /// The earliest time for an attempt that does not wait for the backoff.
    pub(super) fn earliest(&self, now: Instant) -> Instant {
        self.last_dial_at
            .map_or(now, |at| now.max(at + HURRIED_SPACING))
    }
}

/// Kinds by which the portal says that it does not want this gateway with this token.
fn is_refusal(kind: ErrorType) -> bool {
    matches!(
        kind,
        ErrorType::Http401
            | ErrorType::TokenUnusable
            | ErrorType::JoinRefused
            | ErrorType::TokenExpired
    )
}
