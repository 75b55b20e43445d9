//! Outages of the last day and the last attempts, for the status.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use super::channel::EndedOutage;
use super::error::ErrorType;
use crate::admin::model::{AttemptStatus, OutageStatus};

/// How long an outage is told after it ended.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// Most outages told; the oldest go first.
const MAX: usize = 100;
/// Most attempts told.
const MAX_ATTEMPTS: usize = 20;

/// The outages that are over, and the last attempts.
#[derive(Debug, Default)]
pub(super) struct History {
    outages: VecDeque<EndedOutage>,
    attempts: VecDeque<(Instant, Option<ErrorType>)>,
}

impl History {
    pub(super) fn note(&mut self, outage: EndedOutage) {
        if self.outages.len() == MAX {
            self.outages.pop_front();
        }
        self.outages.push_back(outage);
    }

    /// An attempt has ended, without a failure in a join.
    pub(super) fn note_attempt(&mut self, now: Instant, failure: Option<ErrorType>) {
        if self.attempts.len() == MAX_ATTEMPTS {
            self.attempts.pop_front();
        }
        self.attempts.push_back((now, failure));
    }

    /// The last attempts, oldest first. `now` and `wall` are one reading of both clocks.
    pub(super) fn attempts(&self, now: Instant, wall: SystemTime) -> Vec<AttemptStatus> {
        self.attempts
            .iter()
            .map(|(at, failure)| AttemptStatus {
                at: unix(*at, now, wall),
                cause: failure.map(|kind| kind.as_str().to_owned()),
            })
            .collect()
    }

    /// Those that ended within a day, oldest first. `now` and `wall` are one reading of both clocks.
    pub(super) fn status(&self, now: Instant, wall: SystemTime) -> Vec<OutageStatus> {
        self.outages
            .iter()
            .filter(|outage| now.saturating_duration_since(outage.until) < KEPT)
            .map(|outage| OutageStatus {
                began: unix(outage.since, now, wall),
                ended: unix(outage.until, now, wall),
                cause: outage.cause.as_str().to_owned(),
                last_cause: outage.last_cause.as_str().to_owned(),
                failures: outage.failures,
                outcome: outage.outcome.as_str().to_owned(),
            })
            .collect()
    }
}

fn unix(at: Instant, now: Instant, wall: SystemTime) -> f64 {
    let time = wall - now.saturating_duration_since(at);
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::portal::channel::Outcome;

    fn outage(begin: Instant, seconds: u64) -> EndedOutage {
        EndedOutage {
            since: begin,
            until: begin + Duration::from_secs(seconds),
            cause: ErrorType::TcpConnect,
            last_cause: ErrorType::Dns,
            failures: 3,
            outcome: Outcome::Joined,
        }
    }

    #[test]
    fn outages_are_told_with_cause_and_length_for_a_day() {
        let start = Instant::now();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let mut history = History::default();
        history.note(outage(start, 60));
        let after = |seconds| {
            let later = Duration::from_secs(seconds);
            history.status(start + later, wall + later)
        };
        let told = after(100);
        assert_eq!(told.len(), 1);
        assert_eq!(
            (told[0].began, told[0].ended),
            (1_800_000_000.0, 1_800_000_060.0)
        );
        assert_eq!(told[0].cause, ErrorType::TcpConnect.as_str());
        assert_eq!(told[0].last_cause, ErrorType::Dns.as_str());
        assert_eq!((told[0].failures, told[0].outcome.as_str()), (3, "joined"));
        assert_eq!(after(60 + 86_399).len(), 1);
        assert_eq!(after(60 + 86_400).len(), 0);
    }

    #[test]
    fn the_number_of_outages_is_bounded() {
        let start = Instant::now();
        let mut history = History::default();
        for n in 0..1000 {
            history.note(outage(start + Duration::from_secs(n), 1));
        }
        let now = start + Duration::from_secs(1000);
        let told = history.status(
            now,
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        );
        assert_eq!(told.len(), MAX);
        assert_eq!(told[99].ended, 1_800_000_000.0);
    }

    #[test]
    fn the_last_attempts_are_told_with_what_became_of_them() {
        let start = Instant::now();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let mut history = History::default();
        for n in 0..30 {
            history.note_attempt(start + Duration::from_secs(n), Some(ErrorType::Dns));
        }
        history.note_attempt(start + Duration::from_secs(30), None);
        let told = history.attempts(start + Duration::from_secs(40), wall);
        assert_eq!(told.len(), MAX_ATTEMPTS);
        assert_eq!(told[18].at, 1_800_000_000.0 - 11.0);
        assert_eq!(told[18].cause.as_deref(), Some("dns"));
        assert_eq!((told[19].at, &told[19].cause), (1_799_999_990.0, &None));
    }
}
