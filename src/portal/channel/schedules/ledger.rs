//! What must be true of attempts, delays and budgets, kept apart from the policy that is judged:
//! nothing here asks the channel how it sees things, except for the comparison.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::portal::channel::{
    Attempt, AttemptCause, ChannelConfig, EndedOutage, GaveUpReason, Milestone, Outcome,
    STABLE_AFTER,
};
use crate::portal::error::{ErrorType, Failure};
use crate::portal::reconnect::{
    CONFIRM_BOUNDS, DELIBERATE_CLOSE_SPREAD, DelayReason, MAX_INTERVAL, MIN_DELAY, RECHECK_BOUNDS,
    RETRY_AFTER_BOUNDS,
};

/// Jitter is drawn in floating point.
const TOLERANCE: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);

#[derive(Debug)]
struct Outage {
    since: Instant,
    cause: ErrorType,
    last_cause: ErrorType,
    failures: u32,
    /// Time that counts against the budget.
    charged: Duration,
    /// Ordinary delays in a row, each longer than the one before but for jitter.
    grown: i32,
}

/// The books.
#[derive(Debug)]
pub(super) struct Ledger {
    budget: Option<Duration>,
    exit_on_auth_failure: bool,
    at: Instant,
    outage: Option<Outage>,
    pub(super) attempt: Option<Attempt>,
    last_dial: Option<Instant>,
    joined_since: Option<Instant>,
    configured: bool,
    blocked: bool,
    /// The server named the time of the next attempt.
    patient: bool,
    /// Rechecks of a refused token that nobody asked for.
    rechecks: VecDeque<Instant>,
    /// What the outage that ended last was charged.
    last_charged: Duration,
    pub(super) ended: bool,
}

impl Ledger {
    pub(super) fn new(now: Instant, config: &ChannelConfig) -> Self {
        Self {
            budget: config.max_partition_time,
            exit_on_auth_failure: config.exit_on_auth_failure,
            at: now,
            outage: None,
            attempt: None,
            last_dial: None,
            joined_since: None,
            configured: false,
            blocked: false,
            patient: false,
            rechecks: VecDeque::new(),
            last_charged: Duration::ZERO,
            ended: false,
        }
    }

    /// Time passes. The budget of an outage is used up only by what is the outage's own: not by
    /// being joined, blocked, or asked to wait.
    pub(super) fn advance(&mut self, now: Instant) {
        let passed = now - std::mem::replace(&mut self.at, now);
        if let Some(outage) = &mut self.outage
            && self.joined_since.is_none()
            && !self.blocked
            && !self.patient
        {
            outage.charged += passed;
        }
    }

    /// Whether the present join is one that nothing is left of an outage after.
    pub(super) fn is_stable(&self) -> bool {
        self.configured
            && self
                .joined_since
                .is_some_and(|since| self.at - since > STABLE_AFTER)
    }

    pub(super) fn dialled(&mut self, attempt: Attempt) {
        assert!(!self.ended, "dials after the end");
        assert!(self.attempt.is_none(), "two attempts at once");
        assert!(self.joined_since.is_none(), "dials while joined");
        let hurried = matches!(
            attempt.cause,
            AttemptCause::Start | AttemptCause::TokenChange
        );
        if let Some(last) = self.last_dial
            && !hurried
        {
            let pause = self.at - last;
            assert!(pause >= MIN_DELAY, "hot loop: {pause:?} between attempts");
        }
        self.last_dial = Some(self.at);
        self.attempt = Some(attempt);
        self.patient = false;
        self.check_delay(&attempt);
        if self.blocked && attempt.cause == AttemptCause::Recheck {
            self.rechecks.push_back(self.at);
            if self.rechecks.len() > 12 {
                let span = self.at - self.rechecks.pop_front().unwrap();
                assert!(span >= HOUR, "13 checks of a refused token within {span:?}");
            }
        }
        let expected = self
            .outage
            .as_ref()
            .map_or((1, Duration::ZERO), |o| (o.failures + 1, self.at - o.since));
        assert_eq!((attempt.of_outage, attempt.outage_elapsed), expected);
    }

    fn check_delay(&mut self, attempt: &Attempt) {
        let delay = attempt.delay;
        let within = |low: Duration, high: Duration| {
            assert!(
                delay + TOLERANCE >= low && delay <= high + TOLERANCE,
                "{:?} after {delay:?}, allowed are {low:?} to {high:?}",
                attempt.cause
            );
        };
        let left = self
            .budget
            .zip(self.outage.as_ref())
            .map(|(budget, outage)| budget.saturating_sub(outage.charged));
        match attempt.cause {
            AttemptCause::Start | AttemptCause::TokenChange => {
                within(Duration::ZERO, Duration::ZERO);
            }
            AttemptCause::Failure(DelayReason::Backoff) => {
                within(MIN_DELAY, MAX_INTERVAL);
                let outage = self.outage.as_mut().expect("only an outage has delays");
                outage.grown += 1;
                // 0.5 s, half as much again each time, at most 60 s; less half of it by jitter.
                let nominal = (0.5 * 1.5f64.powi(outage.grown - 1)).min(60.0);
                let shortened =
                    outage.last_cause == ErrorType::Http409 || left.is_some_and(|l| l < MIN_DELAY);
                assert!(
                    shortened || delay.as_secs_f64() >= nominal * 0.5 - 0.001,
                    "delay {} of the outage is {delay:?}",
                    outage.grown
                );
            }
            AttemptCause::Failure(DelayReason::Spread) => {
                within(MIN_DELAY, DELIBERATE_CLOSE_SPREAD);
            }
            AttemptCause::Failure(DelayReason::RetryAfter) => {
                let longest = RETRY_AFTER_BOUNDS.1;
                within(RETRY_AFTER_BOUNDS.0, longest + longest / 10);
            }
            AttemptCause::OtherProtocol | AttemptCause::NetworkChange | AttemptCause::Request => {
                within(Duration::ZERO, RECHECK_BOUNDS.1);
                if let Some(outage) = &mut self.outage {
                    outage.grown = 0;
                }
            }
            AttemptCause::Confirmation => within(CONFIRM_BOUNDS.0, CONFIRM_BOUNDS.1),
            AttemptCause::Recheck => within(RECHECK_BOUNDS.0, RECHECK_BOUNDS.1),
        }
        if matches!(attempt.cause, AttemptCause::TokenChange)
            && let Some(outage) = &mut self.outage
        {
            outage.grown = 0;
        }
    }

    fn failed(&mut self, failure: &Failure) {
        // Stable only from the timer on; the moment itself is nobody's.
        if self.is_stable() {
            assert!(self.outage.is_none(), "an outage outlived a stable join");
        }
        self.joined_since = None;
        self.configured = false;
        let outage = self.outage.get_or_insert(Outage {
            since: self.at,
            cause: failure.kind,
            last_cause: failure.kind,
            failures: 0,
            charged: Duration::ZERO,
            grown: 0,
        });
        outage.failures += 1;
        outage.last_cause = failure.kind;
        let refusal = matches!(
            failure.kind,
            ErrorType::Http401 | ErrorType::TokenExpired | ErrorType::JoinRefused
        );
        self.patient = failure.retry_after.is_some() && !self.blocked && !refusal;
    }

    pub(super) fn joined(&mut self) {
        assert!(!self.blocked, "joined, and nobody was told");
        self.joined_since = Some(self.at);
        self.configured = false;
        self.patient = false;
    }

    pub(super) fn configured(&mut self) {
        self.configured = self.joined_since.is_some();
    }

    pub(super) fn lost_without_failure(&mut self) {
        self.joined_since = None;
        self.configured = false;
    }

    pub(super) fn blocked(&mut self) {
        assert!(!std::mem::replace(&mut self.blocked, true), "blocked twice");
        assert!(!self.exit_on_auth_failure, "blocked where it is to end");
        self.patient = false;
        self.rechecks.clear();
    }

    pub(super) fn unblocked(&mut self) {
        assert!(std::mem::take(&mut self.blocked), "was not blocked");
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    pub(super) fn gave_up(&mut self, reason: GaveUpReason) {
        assert!(!std::mem::replace(&mut self.ended, true), "gave up twice");
        match reason {
            GaveUpReason::AuthRefused => assert!(self.exit_on_auth_failure),
            GaveUpReason::BudgetExhausted => {
                let budget = self.budget.expect("without a budget nothing is given up");
                // The outage ended a milestone earlier.
                let charged = self.last_charged;
                assert!(
                    charged + MIN_DELAY + TOLERANCE >= budget,
                    "gave up after {charged:?} of {budget:?}"
                );
            }
        }
    }

    /// What the channel says of its steps agrees with what was seen.
    pub(super) fn milestone(&mut self, milestone: &Milestone) {
        match milestone {
            Milestone::JoinStarted => assert!(self.attempt.is_some()),
            Milestone::Failed(failure) => self.failed(failure),
            Milestone::AttemptSucceeded
            | Milestone::AttemptFailed(_)
            | Milestone::AttemptAbandoned => {
                assert!(self.attempt.take().is_some(), "no attempt is under way");
            }
            Milestone::OutageEnded(ended) => self.outage_ended(ended),
        }
    }

    fn outage_ended(&mut self, ended: &EndedOutage) {
        let outage = self.outage.take().expect("ends what never began");
        assert_eq!(
            (ended.since, ended.cause, ended.last_cause, ended.failures),
            (
                outage.since,
                outage.cause,
                outage.last_cause,
                outage.failures
            )
        );
        match ended.outcome {
            Outcome::Joined => {
                assert_eq!(Some(ended.until), self.joined_since);
                assert!(self.configured, "a session without configuration is none");
                assert!(self.at >= ended.until + STABLE_AFTER);
            }
            Outcome::GaveUp | Outcome::Abandoned => assert_eq!(ended.until, self.at),
        }
        self.last_charged = outage.charged;
    }

    /// Compares with what an operator is shown.
    pub(super) fn compare(&self, status: &crate::admin::model::PortalStatus) {
        assert_eq!(status.backoff.is_some(), self.outage.is_some());
        let Some((shown, outage)) = status.backoff.as_ref().zip(self.outage.as_ref()) else {
            return;
        };
        assert_eq!(shown.attempt, outage.failures);
        let left = self
            .budget
            .map(|budget| budget.saturating_sub(outage.charged).as_secs_f64());
        assert!(
            match (shown.budget_left, left) {
                (None, None) => true,
                (Some(shown), Some(left)) => (shown - left).abs() < 0.01,
                _ => false,
            },
            "shown {:?}, left {left:?}",
            shown.budget_left
        );
    }
}
