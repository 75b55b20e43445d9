//! The named checks behind the three questions (DESIGN: health is three questions).

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use super::{
    Liveness,
    liveness::LoopState,
    model::{HostFinding, PortalState, PortalStatus, RelayStatus, Status},
    table::duration,
};
use crate::config::Probe;

/// A loop that was silent for longer is stuck. With the second that may pass between two ticks of
/// one that has nothing to do, it is known within ten.
const STUCK: Duration = Duration::from_secs(8);
/// A relay that is replaced leaves a gap; only a longer one makes the gateway not ready.
const RELAY_HOLD: Duration = Duration::from_secs(1);
/// The host is looked at each five seconds; one bad look is not enough.
const HOST_HOLD: Duration = Duration::from_secs(6);
/// What a gateway that has started cannot do without. Device and portal have checks of their own.
const LASTING: [&str; 2] = ["forwarding_ipv4", "nftables"];

/// Now, on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// For measuring.
    pub instant: Instant,
    /// Unix seconds, for showing.
    pub unix: f64,
}

impl Moment {
    /// The present moment.
    pub fn now() -> Self {
        Self {
            instant: Instant::now(),
            unix: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |time| time.as_secs_f64()),
        }
    }
}

/// Answer to one of the three questions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// `live`, `started` or `ready`.
    pub check: &'static str,
    /// Whether all checks that are not excluded passed.
    pub passed: bool,
    /// The checks, in a fixed order.
    pub checks: Vec<CheckResult>,
}

/// Result of one named check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckResult {
    /// Name, for `?exclude=`.
    pub name: String,
    /// Whether it passed.
    pub ok: bool,
    /// In words; empty when there is nothing to say.
    pub reason: String,
    /// Since when it has been so, in Unix seconds.
    pub since: f64,
    /// Whether the request asked to leave it out.
    pub excluded: bool,
}

impl Report {
    /// Leaves out the named checks.
    #[must_use]
    pub fn excluding(mut self, names: &[String]) -> Self {
        for check in &mut self.checks {
            check.excluded = names.contains(&check.name);
        }
        self.passed = self.checks.iter().all(|check| check.ok || check.excluded);
        self
    }
}

/// What a check says: a note if all is well, otherwise a reason.
type Outcome = Result<String, String>;

/// Remembers what each check said before, for each question: the same check may count differently.
#[derive(Debug, Default)]
pub(super) struct Tracker(BTreeMap<(&'static str, String), Seen>);

#[derive(Debug)]
struct Seen {
    ok: bool,
    since: f64,
    /// When it turned bad while it is still held to be good.
    bad_from: Option<Moment>,
}

impl Tracker {
    #[cfg(test)]
    pub(super) fn last(&self, probe: Probe, name: &str) -> Option<bool> {
        let key = (probe.name(), name.to_owned());
        self.0.get(&key).map(|seen| seen.ok)
    }

    /// Turns what a check says now into its result. A check that was good is held to be good until
    /// it has been bad for `hold`; one that has never been good is not.
    fn settle(
        &mut self,
        probe: Probe,
        name: &str,
        outcome: Outcome,
        hold: Duration,
        now: Moment,
    ) -> CheckResult {
        let key = (probe.name(), name.to_owned());
        let seen = self.0.entry(key).or_insert(Seen {
            ok: outcome.is_ok(),
            since: now.unix,
            bad_from: None,
        });
        if outcome.is_ok() {
            seen.bad_from = None;
            if !seen.ok {
                seen.ok = true;
                seen.since = now.unix;
            }
        } else if seen.ok {
            let from = *seen.bad_from.get_or_insert(now);
            if now.instant.saturating_duration_since(from.instant) >= hold {
                seen.ok = false;
                seen.since = from.unix;
                seen.bad_from = None;
            }
        }
        let reason = match outcome {
            Ok(note) => note,
            Err(reason) if seen.ok => format!("about to fail: {reason}"),
            Err(reason) => reason,
        };
        CheckResult {
            name: name.to_owned(),
            ok: seen.ok,
            reason,
            since: seen.since,
            excluded: false,
        }
    }
}

pub(super) fn report(
    probe: Probe,
    status: &Status,
    liveness: &Liveness,
    tracker: &mut Tracker,
    now: Moment,
) -> Report {
    let mut checks = Vec::new();
    let mut add = |name: &str, outcome: Outcome, hold: Duration| {
        checks.push(tracker.settle(probe, name, outcome, hold, now));
    };
    match probe {
        Probe::Live => {
            for state in liveness.states(now.instant) {
                add(&state.name, turns(&state), Duration::ZERO);
            }
        }
        Probe::Started => {
            add("device", device(status), Duration::ZERO);
            add("host", host(status, |_| true), Duration::ZERO);
            let init = if status.portal.initialized {
                Ok(String::new())
            } else {
                let portal = portal(&status.portal, now.unix);
                Err(match portal {
                    Ok(_) => "the portal has not sent a configuration yet".to_owned(),
                    Err(reason) => format!("no configuration from the portal yet: {reason}"),
                })
            };
            add("init", init, Duration::ZERO);
        }
        Probe::Ready => {
            add("portal", portal(&status.portal, now.unix), Duration::ZERO);
            add("device", addressed(status), Duration::ZERO);
            let lasting = |name: &str| LASTING.contains(&name);
            add("host", host(status, lasting), HOST_HOLD);
            add("relays", relays(&status.relays, now.unix), RELAY_HOLD);
            let drain = if status.draining {
                Err("shutting down".to_owned())
            } else {
                Ok(String::new())
            };
            add("drain", drain, Duration::ZERO);
        }
    }
    Report {
        check: probe.name(),
        passed: checks.iter().all(|check| check.ok),
        checks,
    }
}

fn turns(state: &LoopState) -> Outcome {
    match state.silent {
        Some(silent) if silent <= STUCK => Ok(String::new()),
        Some(silent) => Err(format!("stuck: no sign of life for {} s", silent.as_secs())),
        None => Err("died; the log says of what".to_owned()),
    }
}

/// Whether this loop does not turn.
pub(super) fn is_stuck(liveness: &Liveness, name: &str, now: Instant) -> bool {
    let mut states = liveness.states(now).into_iter();
    states.any(|state| state.name == name && turns(&state).is_err())
}

/// The loops that do not turn, with the reason.
pub(super) fn stuck(liveness: &Liveness, now: Instant) -> Vec<String> {
    let states = liveness.states(now).into_iter();
    states
        .filter_map(|state| Some(format!("{} {}", state.name, turns(&state).err()?)))
        .collect()
}

fn device(status: &Status) -> Outcome {
    let device = &status.device;
    match (&device.error, device.up) {
        (None, true) => Ok(String::new()),
        (Some(error), _) => Err(format!("{}: {error}", device.name)),
        (None, false) => Err("not up yet".to_owned()),
    }
}

/// Addresses are set in the background once the portal has named them: until then nothing is carried.
fn addressed(status: &Status) -> Outcome {
    let outcome = device(status)?;
    if status.portal.initialized && status.device.addresses.is_empty() {
        return Err("has no addresses yet".to_owned());
    }
    Ok(outcome)
}

/// Warnings do not keep the gateway from forwarding; errors do.
fn host(status: &Status, counts: impl Fn(&str) -> bool) -> Outcome {
    let findings = |level: &str| -> Vec<String> {
        let counts = |f: &&HostFinding| f.level == level && (level != "error" || counts(&f.name));
        let findings = status.host.iter().filter(counts);
        findings
            .map(|finding| match &finding.fix {
                Some(fix) => format!("{}: {} (fix: {fix})", finding.name, finding.found),
                None => format!("{}: {}", finding.name, finding.found),
            })
            .collect()
    };
    let errors = findings("error");
    if !errors.is_empty() {
        return Err(errors.join("; "));
    }
    let warnings = findings("warning");
    Ok(match warnings.as_slice() {
        [] => String::new(),
        [_] => format!("with a warning: {}", warnings.join("; ")),
        _ => format!("with warnings: {}", warnings.join("; ")),
    })
}

fn portal(portal: &PortalStatus, now: f64) -> Outcome {
    if portal.state == PortalState::Joined {
        return Ok(String::new());
    }
    let attempt = portal
        .backoff
        .as_ref()
        .map_or(1, |b| b.attempt.saturating_add(1));
    let doing = match portal.state {
        PortalState::Joined | PortalState::Idle => "not started".to_owned(),
        PortalState::Connecting => format!("connecting, attempt {attempt}"),
        PortalState::Joining => format!("joining, attempt {attempt}"),
        PortalState::Waiting => {
            let next = portal.backoff.as_ref().and_then(|b| b.next_attempt_at);
            match next {
                Some(at) => format!(
                    "waiting for attempt {attempt} in {:.0} s",
                    (at - now).max(0.0).ceil()
                ),
                None => format!("waiting for attempt {attempt}"),
            }
        }
        PortalState::Blocked => "blocked: token refused".to_owned(),
        PortalState::GaveUp => "gave up: the time for retries has run out".to_owned(),
        PortalState::Closed => "closed".to_owned(),
    };
    // An error that was overcome says nothing about a channel that has not started or was closed.
    let error = portal
        .last_error
        .as_ref()
        .filter(|_| !matches!(portal.state, PortalState::Idle | PortalState::Closed));
    Err(match error {
        Some(error) => {
            let began = portal.first_cause();
            let began = began.map(|cause| format!(" (it began with {cause})"));
            format!(
                "not joined: {doing}{}: {}: {}",
                began.unwrap_or_default(),
                error.kind,
                error.message
            )
        }
        None => format!("not joined: {doing}"),
    })
}

fn relays(relays: &[RelayStatus], now: f64) -> Outcome {
    if relays.is_empty() {
        return Ok("none offered".to_owned());
    }
    let usable = relays.iter().filter(|r| r.state == "allocated").count();
    if usable > 0 {
        return Ok(format!("{usable} of {} usable", relays.len()));
    }
    let each: Vec<String> = relays
        .iter()
        .map(|relay| {
            let name = relay.addresses.first().unwrap_or(&relay.id);
            let since = duration(now - relay.since);
            // What was overcome before is no reason.
            let of_now = |_: &&String| relay.last_error_at.is_none_or(|at| at >= relay.since);
            match relay.last_error.as_ref().filter(of_now) {
                Some(error) => format!("{name} {} for {since}: {error}", relay.state),
                None => format!("{name} {} for {since}", relay.state),
            }
        })
        .collect();
    Err(format!(
        "none of {} usable: {}",
        relays.len(),
        each.join("; ")
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn at(start: Instant, seconds: f64) -> Moment {
        Moment {
            instant: start + Duration::from_secs_f64(seconds),
            unix: 1000.0 + seconds,
        }
    }

    const HOLD: Duration = Duration::from_secs(1);

    fn bad() -> Outcome {
        Err("bad".to_owned())
    }

    #[test]
    fn check_that_was_good_fails_only_after_the_hold() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        tracker.settle(Probe::Ready, "x", Ok(String::new()), HOLD, at(start, 0.0));

        let held = tracker.settle(Probe::Ready, "x", bad(), HOLD, at(start, 5.0));
        assert!(held.ok && held.reason == "about to fail: bad");
        assert!(
            tracker
                .settle(Probe::Ready, "x", bad(), HOLD, at(start, 5.9))
                .ok
        );
        let failed = tracker.settle(Probe::Ready, "x", bad(), HOLD, at(start, 6.0));

        assert!(!failed.ok);
        assert_eq!(failed.reason, "bad");
        assert!((failed.since - 1005.0).abs() < 1e-6, "since it turned bad");
    }

    #[test]
    fn gap_shorter_than_the_hold_changes_nothing() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        tracker.settle(Probe::Ready, "x", Ok(String::new()), HOLD, at(start, 0.0));
        tracker.settle(Probe::Ready, "x", bad(), HOLD, at(start, 5.0));
        tracker.settle(Probe::Ready, "x", Ok(String::new()), HOLD, at(start, 5.9));

        let result = tracker.settle(Probe::Ready, "x", bad(), HOLD, at(start, 6.5));

        assert!(result.ok, "the second gap has only begun");
        assert!((result.since - 1000.0).abs() < 1e-6);
    }

    #[test]
    fn readiness_counts_what_lasts_of_the_host_and_forgives_one_bad_look() {
        let start = Instant::now();
        let liveness = Liveness::new(start);
        let mut tracker = Tracker::default();
        let mut ask = |finding: &str, level: &str, seconds: f64| {
            let status = Status {
                host: vec![HostFinding {
                    name: finding.to_owned(),
                    level: level.to_owned(),
                    ..HostFinding::default()
                }],
                ..Status::default()
            };
            // Asked for in turns, as the gateway itself does.
            [Probe::Started, Probe::Ready].map(|probe| {
                let report = report(probe, &status, &liveness, &mut tracker, at(start, seconds));
                let mut checks = report.checks.iter();
                checks.find(|check| check.name == "host").unwrap().ok
            })
        };
        assert_eq!(ask("forwarding_ipv4", "ok", 0.0), [true, true]);
        assert_eq!(ask("forwarding_ipv4", "error", 5.0), [false, true]);
        assert_eq!(ask("forwarding_ipv4", "error", 10.0), [false, true]);
        assert_eq!(ask("forwarding_ipv4", "error", 11.0), [false, false]);
        assert_eq!(ask("forwarding_ipv4", "ok", 12.0), [true, true]);
        for seconds in [20.0, 40.0] {
            assert_eq!(ask("clock", "error", seconds), [false, true]);
        }
    }

    #[test]
    fn check_that_was_never_good_is_not_held() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        assert!(
            !tracker
                .settle(Probe::Ready, "x", bad(), HOLD, at(start, 0.0))
                .ok
        );
    }

    #[test]
    fn failed_check_recovers_at_once_with_a_new_since() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        tracker.settle(Probe::Ready, "x", bad(), HOLD, at(start, 0.0));
        let result = tracker.settle(Probe::Ready, "x", Ok("fine".into()), HOLD, at(start, 7.0));
        assert!(result.ok);
        assert!((result.since - 1007.0).abs() < 1e-6);
        assert_eq!(result.reason, "fine");
    }
}
