//! When to try again.
//!
//! The policy of an outage does not exist while all is well. It is created at the *first error*
//! after a stable success, which is the moment its budget counts from, and it is dropped only when
//! a join has been stable for a while. Creating it earlier is a trap: an [`ExponentialBackoff`]
//! measures wall-clock time from its construction, so one that was built together with the channel
//! has used up its budget after minutes of perfect operation, and the first error days later is
//! taken for the end of a long outage (portal-channel spec §3.2).

use std::time::{Duration, Instant};

use backoff::backoff::Backoff;
use backoff::exponential::ExponentialBackoff;
use rand::Rng;
use rand::rngs::StdRng;

use super::error::{ErrorType, Failure};

/// Delay after the first error, before jitter.
pub const INITIAL_INTERVAL: Duration = Duration::from_millis(500);
/// Growth per error.
pub const MULTIPLIER: f64 = 1.5;
/// No ordinary delay is longer, jitter included.
pub const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// Jitter, as a share of the delay in both directions.
pub const JITTER: f64 = 0.5;
/// No delay is shorter, whatever jitter, budget or server say.
pub const MIN_DELAY: Duration = Duration::from_millis(100);
/// Bounds of what a server may ask for in `Retry-After`.
pub const RETRY_AFTER_BOUNDS: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(300));
/// After a deliberate close everybody comes back at once; the first retry is spread over this.
pub const DELIBERATE_CLOSE_SPREAD: Duration = Duration::from_secs(10);
/// …and the delays that follow grow from here, before jitter. From [`INITIAL_INTERVAL`] everybody
/// would try six more times within the first ten seconds, which undoes the spreading; from here on
/// second attempts begin to come only as the first ones end (`docs/herd.md`).
pub const DELIBERATE_CLOSE_INTERVAL: Duration = Duration::from_secs(12);
/// Bounds of the pause between checks of a refused token: at most 12 per hour.
pub const RECHECK_BOUNDS: (Duration, Duration) =
    (Duration::from_secs(300), Duration::from_secs(360));
/// Bounds of the pause before a withdrawn token is tried once more.
pub const CONFIRM_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));
/// For so long the portal may take a lost connection for alive and answer 409
/// (portal-channel spec §1.11: 37 s)…
pub const CONFLICT_WINDOW: Duration = Duration::from_secs(40);
/// …during which delays stay below this, so that the end of it is not missed by a minute.
pub const CONFLICT_MAX_DELAY: Duration = Duration::from_secs(10);

/// What the delay is owed to; for logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DelayReason {
    /// The growing interval.
    Backoff,
    /// The server named a time.
    RetryAfter,
    /// The server closed on purpose; spread so that not everybody comes at once.
    Spread,
}

/// Answer to a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Try again after the delay.
    Retry {
        /// How long to wait.
        delay: Duration,
        /// Why so long.
        reason: DelayReason,
    },
    /// The budget of this outage is used up.
    GiveUp,
}

/// Clock of a backoff object: stands where the caller puts it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GivenTime(pub(crate) Instant);

impl backoff::Clock for GivenTime {
    fn now(&self) -> Instant {
        self.0
    }
}

/// What is known of the present outage.
#[derive(Debug)]
pub struct Outage {
    since: Instant,
    cause: ErrorType,
    last_cause: ErrorType,
    failures: u32,
    /// Its `start_time` moves forward by every frozen stretch, so that elapsed time is charged time.
    policy: ExponentialBackoff<GivenTime>,
    frozen_at: Option<Instant>,
    spread_used: bool,
}

impl Outage {
    fn new(now: Instant, cause: ErrorType, budget: Option<Duration>) -> Self {
        Self {
            since: now,
            cause,
            last_cause: cause,
            failures: 0,
            policy: ExponentialBackoff {
                current_interval: INITIAL_INTERVAL,
                initial_interval: INITIAL_INTERVAL,
                // Jitter is ours, so that the cap applies after it and tests can seed it.
                randomization_factor: 0.0,
                multiplier: MULTIPLIER,
                max_interval: MAX_INTERVAL,
                start_time: now,
                max_elapsed_time: budget,
                clock: GivenTime(now),
            },
            frozen_at: None,
            spread_used: false,
        }
    }

    /// When the first error happened.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The first error.
    pub fn cause(&self) -> ErrorType {
        self.cause
    }

    /// The last error.
    pub fn last_cause(&self) -> ErrorType {
        self.last_cause
    }

    /// Errors so far.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// What is left of the budget; `None` without one.
    pub fn budget_left(&self, now: Instant) -> Option<Duration> {
        let budget = self.policy.max_elapsed_time?;
        let now = self.frozen_at.unwrap_or(now);
        Some(budget.saturating_sub(now.saturating_duration_since(self.policy.start_time)))
    }

    fn thaw(&mut self, now: Instant) {
        if let Some(frozen_at) = self.frozen_at.take() {
            self.policy.start_time += now.saturating_duration_since(frozen_at);
        }
    }
}

/// Decides over delays; owns the [`Outage`] if there is one.
#[derive(Debug)]
pub struct Reconnect {
    budget: Option<Duration>,
    rng: StdRng,
    outage: Option<Outage>,
}

impl Reconnect {
    /// `budget` limits the charged wall-clock time of one outage. Not charged is time spent joined,
    /// blocked, or waiting because the server asked for it.
    pub fn new(budget: Option<Duration>, rng: StdRng) -> Self {
        Self {
            budget,
            rng,
            outage: None,
        }
    }

    /// The present outage.
    pub fn outage(&self) -> Option<&Outage> {
        self.outage.as_ref()
    }

    /// An attempt or a connection failed.
    pub fn failed(&mut self, now: Instant, failure: &Failure) -> Verdict {
        let outage = note(&mut self.outage, self.budget, now, failure);
        outage.thaw(now);
        let left = outage.budget_left(now);
        if left == Some(Duration::ZERO) {
            return Verdict::GiveUp;
        }

        if let Some(asked) = failure.retry_after {
            // Waiting on request is the server's time, not a growing distrust of it.
            outage.frozen_at = Some(now);
            let delay = asked.clamp(RETRY_AFTER_BOUNDS.0, RETRY_AFTER_BOUNDS.1);
            let spread = Duration::from_secs(1).max(delay / 10);
            return Verdict::Retry {
                delay: delay + self.rng.random_range(Duration::ZERO..=spread),
                reason: DelayReason::RetryAfter,
            };
        }

        if failure.is_deliberate_close() && !outage.spread_used {
            outage.spread_used = true;
            outage.policy.current_interval = outage
                .policy
                .current_interval
                .max(DELIBERATE_CLOSE_INTERVAL);
            let delay = self.rng.random_range(MIN_DELAY..=DELIBERATE_CLOSE_SPREAD);
            return within(delay, left, DelayReason::Spread);
        }

        outage.policy.clock = GivenTime(now);
        let Some(interval) = outage.policy.next_backoff() else {
            // The next interval would end after the budget: use what is left for a last attempt.
            return within(MAX_INTERVAL, left, DelayReason::Backoff);
        };
        let jitter = self.rng.random_range(1.0 - JITTER..=1.0 + JITTER);
        let mut delay = interval.mul_f64(jitter).clamp(MIN_DELAY, MAX_INTERVAL);
        if failure.kind == ErrorType::Http409
            && now.saturating_duration_since(outage.since) < CONFLICT_WINDOW
        {
            delay = delay.min(CONFLICT_MAX_DELAY);
        }
        within(delay, left, DelayReason::Backoff)
    }

    /// The token was withdrawn once: how long to wait before it is tried again. Neither grows nor
    /// ends anything.
    pub fn confirm(&mut self, now: Instant, failure: &Failure) -> Duration {
        note(&mut self.outage, self.budget, now, failure).thaw(now);
        self.rng.random_range(CONFIRM_BOUNDS.0..=CONFIRM_BOUNDS.1)
    }

    /// The token is refused: how long to wait before it is checked again. The budget stands still
    /// until [`Self::thaw`].
    pub fn blocked(&mut self, now: Instant, failure: &Failure) -> Duration {
        let outage = note(&mut self.outage, self.budget, now, failure);
        outage.frozen_at.get_or_insert(now);
        self.rng.random_range(RECHECK_BOUNDS.0..=RECHECK_BOUNDS.1)
    }

    /// Joined, but not yet for long: the budget stands still.
    pub fn freeze(&mut self, now: Instant) {
        if let Some(outage) = &mut self.outage {
            outage.frozen_at.get_or_insert(now);
        }
    }

    /// The budget counts again.
    pub fn thaw(&mut self, now: Instant) {
        if let Some(outage) = &mut self.outage {
            outage.thaw(now);
        }
    }

    /// The reason to wait is gone (another network, another token): delays start over, the budget
    /// does not.
    pub fn restart_growth(&mut self) {
        if let Some(outage) = &mut self.outage {
            outage.policy.current_interval = outage.policy.initial_interval;
        }
    }

    /// The mistake that this module avoids, for comparison: a policy that exists while all is well.
    #[cfg(test)]
    pub(super) fn create_eagerly(&mut self, connected: Instant) {
        let mut outage = Outage::new(connected, ErrorType::Other, self.budget);
        outage.policy.clock = GivenTime(connected);
        outage.policy.reset();
        self.outage = Some(outage);
    }

    /// The join proved stable, or the channel is given up: ends the outage.
    pub fn take(&mut self) -> Option<Outage> {
        self.outage.take()
    }
}

/// Records the failure in the outage, which it creates if this is the first one.
fn note<'a>(
    outage: &'a mut Option<Outage>,
    budget: Option<Duration>,
    now: Instant,
    failure: &Failure,
) -> &'a mut Outage {
    let outage = outage.get_or_insert_with(|| Outage::new(now, failure.kind, budget));
    outage.failures = outage.failures.saturating_add(1);
    outage.last_cause = failure.kind;
    outage
}

fn within(delay: Duration, left: Option<Duration>, reason: DelayReason) -> Verdict {
    match left {
        Some(left) if left < MIN_DELAY => Verdict::GiveUp,
        Some(left) => Verdict::Retry {
            delay: delay.min(left),
            reason,
        },
        None => Verdict::Retry { delay, reason },
    }
}

#[cfg(test)]
#[path = "reconnect/tests.rs"]
mod tests;
