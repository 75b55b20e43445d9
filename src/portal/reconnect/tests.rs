#![allow(clippy::unwrap_used)]

use rand::SeedableRng;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(1);

fn reconnect(budget: Option<Duration>, seed: u64) -> Reconnect {
    Reconnect::new(budget, StdRng::seed_from_u64(seed))
}

fn refused() -> Failure {
    Failure::new(ErrorType::TcpConnect, "refused")
}

fn http(status: u16, retry_after: Option<u64>) -> Failure {
    Failure {
        http_status: Some(status),
        retry_after: retry_after.map(Duration::from_secs),
        ..Failure::new(ErrorType::from_status(status), "no")
    }
}

fn delay(verdict: Verdict) -> Duration {
    match verdict {
        Verdict::Retry { delay, .. } => delay,
        Verdict::GiveUp => panic!("gave up"),
    }
}

/// What drives the outage tests: the product's policy, or the mistake it avoids.
trait Policy {
    fn failed(&mut self, now: Instant) -> Option<Duration>;
}

impl Policy for Reconnect {
    fn failed(&mut self, now: Instant) -> Option<Duration> {
        match Reconnect::failed(self, now, &refused()) {
            Verdict::Retry { delay, .. } => Some(delay),
            Verdict::GiveUp => None,
        }
    }
}

/// Built together with the channel and merely reset when it connects, as it was done once.
struct Eager(ExponentialBackoff<GivenTime>);

impl Eager {
    fn new(now: Instant, budget: Duration) -> Self {
        Self(Outage::new(now, ErrorType::Other, Some(budget)).policy)
    }

    fn connected(&mut self, now: Instant) {
        self.0.clock = GivenTime(now);
        self.0.reset();
    }
}

impl Policy for Eager {
    fn failed(&mut self, now: Instant) -> Option<Duration> {
        self.0.clock = GivenTime(now);
        self.0.next_backoff()
    }
}

/// Every attempt before `down_for` fails after `attempt_takes`; returns when the first one after
/// that starts, or the moment of giving up.
fn outage(
    policy: &mut dyn Policy,
    start: Instant,
    down_for: Duration,
    attempt_takes: Duration,
) -> Result<Duration, Duration> {
    let mut now = start;
    loop {
        let Some(delay) = policy.failed(now) else {
            return Err(now - start);
        };
        now += delay;
        if now - start >= down_for {
            return Ok(now - start);
        }
        now += attempt_takes;
    }
}

const THREE_DAYS: Duration = Duration::from_secs(3 * 24 * 3600);
const BUDGET: Duration = Duration::from_secs(15 * 60);

#[test]
fn fourteen_minutes_of_outage_after_three_days_recover_within_a_budget_of_fifteen() {
    for seed in 0..200 {
        for attempt_takes in [0, 5, 15] {
            let booted = Instant::now();
            let mut policy = reconnect(Some(BUDGET), seed);
            let end = outage(
                &mut policy,
                booted + THREE_DAYS,
                14 * MINUTE,
                Duration::from_secs(attempt_takes),
            );
            let back = end.unwrap_or_else(|at| panic!("seed {seed} gave up after {at:?}"));
            assert!(back <= 15 * MINUTE, "seed {seed}: back after {back:?}");
        }
    }
}

#[test]
fn sixteen_minutes_of_outage_exceed_a_budget_of_fifteen() {
    for seed in 0..200 {
        let mut policy = reconnect(Some(BUDGET), seed);
        let end = outage(
            &mut policy,
            Instant::now() + THREE_DAYS,
            16 * MINUTE,
            Duration::ZERO,
        );
        let gave_up = end.expect_err("budget is finite");
        assert!(gave_up <= BUDGET, "seed {seed}: {gave_up:?}");
        assert!(
            gave_up > BUDGET - MIN_DELAY,
            "the budget is used to its end"
        );
    }
}

#[test]
fn an_eagerly_created_policy_fails_the_same_outage_at_once() {
    let booted = Instant::now();
    let mut policy = Eager::new(booted, BUDGET);
    policy.connected(booted + Duration::from_secs(1));
    assert_eq!(
        outage(
            &mut policy,
            booted + THREE_DAYS,
            14 * MINUTE,
            Duration::ZERO
        ),
        Err(Duration::ZERO),
        "this is the mistake that lazy creation avoids"
    );
}

#[test]
fn first_error_after_days_of_uptime_waits_not_fails() {
    let mut policy = reconnect(Some(BUDGET), 1);
    let first = delay(policy.failed(Instant::now() + 100 * THREE_DAYS, &refused()));
    assert!(first >= INITIAL_INTERVAL / 2 && first <= INITIAL_INTERVAL.mul_f64(1.5));
}

#[test]
fn no_outage_exists_before_the_first_error() {
    let policy = reconnect(Some(BUDGET), 1);
    assert!(policy.outage().is_none());
}

#[test]
fn delays_grow_by_half_until_the_cap_which_holds_after_jitter() {
    for seed in 0..500 {
        let mut policy = reconnect(None, seed);
        let mut now = Instant::now();
        let mut base = INITIAL_INTERVAL.as_secs_f64();
        let mut reached_cap = false;
        for _ in 0..30 {
            let delay = delay(policy.failed(now, &refused()));
            let low = (base * 0.5).min(60.0) - 1e-6;
            let high = (base * 1.5).min(60.0) + 1e-6;
            let secs = delay.as_secs_f64();
            assert!(
                (low..=high).contains(&secs),
                "seed {seed}: {secs} of {base}"
            );
            assert!(delay <= MAX_INTERVAL, "seed {seed}: {delay:?}");
            reached_cap |= delay == MAX_INTERVAL;
            base = (base * MULTIPLIER).min(60.0);
            now += delay;
        }
        assert!(
            reached_cap,
            "seed {seed}: upward jitter is cut off by the cap"
        );
    }
}

#[test]
fn without_a_budget_nothing_is_ever_given_up() {
    let mut policy = reconnect(None, 3);
    let mut now = Instant::now();
    for _ in 0..50_000 {
        now += delay(policy.failed(now, &refused()));
    }
    assert_eq!(policy.outage().unwrap().failures(), 50_000);
    assert_eq!(policy.outage().unwrap().budget_left(now), None);
}

#[test]
fn a_stable_success_gives_the_next_outage_a_fresh_policy() {
    let mut policy = reconnect(Some(BUDGET), 4);
    let mut now = Instant::now();
    for _ in 0..12 {
        now += delay(policy.failed(now, &refused()));
    }
    let ended = policy.take().unwrap();
    assert_eq!(
        (ended.failures(), ended.cause()),
        (12, ErrorType::TcpConnect)
    );

    now += Duration::from_secs(3600);
    assert!(delay(policy.failed(now, &refused())) < Duration::from_secs(1));
    assert_eq!(policy.outage().unwrap().budget_left(now), Some(BUDGET));
}

#[test]
fn budget_is_frozen_while_joined_but_interval_is_kept() {
    let mut policy = reconnect(Some(BUDGET), 5);
    let mut now = Instant::now();
    for _ in 0..10 {
        now += delay(policy.failed(now, &refused()));
    }
    let before = policy.outage().unwrap().budget_left(now).unwrap();
    policy.freeze(now);
    now += Duration::from_secs(3600);
    assert_eq!(policy.outage().unwrap().budget_left(now), Some(before));
    let next = delay(policy.failed(now, &refused()));
    assert!(next > Duration::from_secs(10), "still grown: {next:?}");
    assert_eq!(policy.outage().unwrap().budget_left(now), Some(before));
    assert_eq!(
        policy.outage().unwrap().budget_left(now + MINUTE),
        Some(before - MINUTE),
        "and counting again"
    );
}

#[test]
fn retry_after_is_clamped_and_jittered() {
    for seed in 0..200 {
        let mut policy = reconnect(None, seed);
        for (asked, low, high) in [
            (0, 1.0, 2.0),
            (1, 1.0, 2.0),
            (30, 30.0, 33.0),
            (9999, 300.0, 330.0),
        ] {
            let verdict = policy.failed(Instant::now(), &http(503, Some(asked)));
            let Verdict::Retry { delay, reason } = verdict else {
                panic!("gave up");
            };
            assert_eq!(reason, DelayReason::RetryAfter);
            assert!(
                (low..=high).contains(&delay.as_secs_f64()),
                "{asked}: {delay:?}"
            );
        }
    }
}

#[test]
fn retry_after_neither_consumes_nor_resets_the_policy() {
    let mut policy = reconnect(Some(BUDGET), 6);
    let mut now = Instant::now();
    for _ in 0..8 {
        now += delay(policy.failed(now, &refused()));
    }
    let left = policy.outage().unwrap().budget_left(now).unwrap();
    for _ in 0..20 {
        now += delay(policy.failed(now, &http(429, Some(300))));
    }
    assert_eq!(policy.outage().unwrap().budget_left(now), Some(left));
    let ninth = delay(policy.failed(now, &refused())).as_secs_f64();
    let nominal = 0.5 * MULTIPLIER.powi(8);
    assert!((nominal * 0.5..=nominal * 1.5).contains(&ninth), "{ninth}");
}

#[test]
fn a_deliberate_close_spreads_the_first_retry_over_ten_seconds() {
    let mut delays: Vec<f64> = (0..2000)
        .map(|seed| {
            let mut policy = reconnect(None, seed);
            let failure = Failure {
                close_code: Some(1012),
                ..Failure::new(ErrorType::ServerClose, "restart")
            };
            delay(policy.failed(Instant::now(), &failure)).as_secs_f64()
        })
        .collect();
    delays.sort_by(f64::total_cmp);
    assert!(delays[0] >= 0.1 && delays[1999] <= 10.0);
    assert!((delays[500] - 2.5).abs() < 0.5, "quartile {}", delays[500]);
    assert!(
        (delays[1500] - 7.5).abs() < 0.5,
        "quartile {}",
        delays[1500]
    );
}

#[test]
fn delays_after_a_deliberate_close_grow_from_twelve_seconds() {
    for seed in 0..200 {
        let mut policy = reconnect(None, seed);
        let mut now = Instant::now();
        let closed = Failure {
            close_code: Some(1012),
            ..Failure::new(ErrorType::ServerClose, "restart")
        };
        now += delay(policy.failed(now, &closed));
        for nominal in [12.0, 18.0, 27.0, 40.5] {
            let next = delay(policy.failed(now, &refused()));
            assert!((nominal * 0.5..=nominal * 1.5).contains(&next.as_secs_f64()));
            now += next;
        }
    }
}

#[test]
fn a_deliberate_close_late_in_an_outage_does_not_shorten_its_delays() {
    let mut policy = reconnect(None, 7);
    let now = Instant::now();
    for _ in 0..20 {
        policy.failed(now, &refused());
    }
    policy.failed(now, &http(503, None));
    let next = delay(policy.failed(now, &refused()));
    assert!(next >= MAX_INTERVAL / 2, "{next:?}");
}

#[test]
fn only_one_retry_of_an_outage_is_spread() {
    let mut policy = reconnect(None, 7);
    let mut now = Instant::now();
    let mut reasons = Vec::new();
    for _ in 0..3 {
        let Verdict::Retry { delay, reason } = policy.failed(now, &http(503, None)) else {
            panic!("gave up");
        };
        reasons.push(reason);
        now += delay;
    }
    assert_eq!(
        reasons,
        [
            DelayReason::Spread,
            DelayReason::Backoff,
            DelayReason::Backoff
        ]
    );
}

#[test]
fn conflict_delays_stay_short_while_the_portal_may_hold_the_old_connection() {
    for seed in 0..200 {
        let mut policy = reconnect(None, seed);
        let start = Instant::now();
        // Grown well beyond ten seconds, but all within the same second.
        for _ in 0..14 {
            policy.failed(start, &refused());
        }
        let early = delay(policy.failed(start + CONFLICT_WINDOW - TICK, &http(409, None)));
        assert!(early <= CONFLICT_MAX_DELAY, "seed {seed}: {early:?}");
        let late = delay(policy.failed(start + CONFLICT_WINDOW, &http(409, None)));
        assert!(late >= Duration::from_secs(30), "seed {seed}: {late:?}");
    }
}

#[test]
fn a_last_attempt_uses_what_is_left_of_the_budget() {
    let mut policy = reconnect(Some(MINUTE), 8);
    let start = Instant::now();
    policy.failed(start, &refused());
    for _ in 0..12 {
        policy.failed(start + Duration::from_secs(1), &refused());
    }
    assert_eq!(
        delay(policy.failed(start + Duration::from_secs(50), &refused())),
        Duration::from_secs(10)
    );
    assert_eq!(policy.failed(start + MINUTE, &refused()), Verdict::GiveUp);
}

#[test]
fn blocked_checks_come_at_most_twelve_times_an_hour_and_cost_no_budget() {
    let mut policy = reconnect(Some(BUDGET), 9);
    let mut now = Instant::now();
    for _ in 0..500 {
        let pause = policy.blocked(now, &http(401, None));
        assert!(pause >= RECHECK_BOUNDS.0 && pause <= RECHECK_BOUNDS.1);
        now += pause;
    }
    assert_eq!(policy.outage().unwrap().budget_left(now), Some(BUDGET));
}

#[test]
fn restarted_growth_keeps_the_budget() {
    let mut policy = reconnect(Some(BUDGET), 10);
    let mut now = Instant::now();
    for _ in 0..12 {
        now += delay(policy.failed(now, &refused()));
    }
    let left = policy.outage().unwrap().budget_left(now);
    policy.restart_growth();
    assert!(delay(policy.failed(now, &refused())) < Duration::from_secs(1));
    assert_eq!(policy.outage().unwrap().budget_left(now), left);
}
