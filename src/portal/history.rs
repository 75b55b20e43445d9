//! Outages of the last day, for the status.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use super::channel::EndedOutage;
use crate::admin::model::OutageStatus;

/// How long an outage is told after it ended.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// Most outages told; the oldest go first.
const MAX: usize = 100;

/// The outages that are over.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<EndedOutage>);

impl History {
    pub(super) fn note(&mut self, outage: EndedOutage) {
        if self.0.len() == MAX {
            self.0.pop_front();
        }
        self.0.push_back(outage);
    }

    /// Those that ended within a day, oldest first. `now` and `wall` are one reading of both clocks.
    pub(super) fn status(&self, now: Instant, wall: SystemTime) -> Vec<OutageStatus> {
        let unix = |at: Instant| {
            let time = wall - now.saturating_duration_since(at);
            time.duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs_f64()
        };
        self.0
            .iter()
            .filter(|outage| now.saturating_duration_since(outage.until) < KEPT)
            .map(|outage| OutageStatus {
                began: unix(outage.since),
                ended: unix(outage.until),
                cause: outage.cause.as_str().to_owned(),
                last_cause: outage.last_cause.as_str().to_owned(),
                failures: outage.failures,
                outcome: outage.outcome.as_str().to_owned(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::portal::channel::Outcome;
    use crate::portal::error::ErrorType;

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
}
