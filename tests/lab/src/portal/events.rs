//! What happened, in order, for tests to look at.

use std::collections::VecDeque;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

/// Events kept; the oldest go first.
const CAPACITY: usize = 20_000;

/// The time, on both clocks, at which something is handled.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For intervals and deadlines.
    pub instant: Instant,
    /// Milliseconds since the Unix epoch, for expiries and for people.
    pub unix_ms: u64,
}

impl Now {
    /// Reads both clocks.
    pub fn read() -> Self {
        let unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64);
        Self {
            instant: Instant::now(),
            unix_ms,
        }
    }

    /// The same moment where the clock is wrong by so many seconds; intervals do not change.
    #[must_use]
    pub fn with_clock_off_by(self, seconds: i64) -> Self {
        let unix_ms = self
            .unix_ms
            .saturating_add_signed(seconds.saturating_mul(1000));
        Self { unix_ms, ..self }
    }

    /// Seconds since the Unix epoch.
    pub fn unix(&self) -> u64 {
        self.unix_ms / 1000
    }
}

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// Counts up from 1 without gaps.
    pub seq: u64,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What.
    pub kind: &'static str,
    /// Particulars, beside the members above.
    #[serde(flatten)]
    pub detail: Value,
}

/// The newest events.
#[derive(Debug, Default)]
pub struct EventLog {
    events: VecDeque<Event>,
    last: u64,
}

impl EventLog {
    /// Appends an event; `detail` is a JSON object without secrets.
    pub fn record(&mut self, now: Now, kind: &'static str, detail: Value) {
        tracing::info!(kind, %detail, "event");
        self.last += 1;
        self.events.push_back(Event {
            seq: self.last,
            at_ms: now.unix_ms,
            kind,
            detail,
        });
        if self.events.len() > CAPACITY {
            self.events.pop_front();
        }
    }

    /// The newest `count` events of `kind` (any if `None`) after number `since`, oldest first.
    pub fn newest(&self, count: usize, since: u64, kind: Option<&str>) -> Vec<Event> {
        let mut newest: Vec<_> = self
            .events
            .iter()
            .rev()
            .take_while(|event| event.seq > since)
            .filter(|event| kind.is_none_or(|kind| kind == event.kind))
            .take(count)
            .cloned()
            .collect();
        newest.reverse();
        newest
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn newest_events_come_oldest_first_and_can_be_narrowed() {
        let mut log = EventLog::default();
        for (n, kind) in ["a", "b", "a", "b"].into_iter().enumerate() {
            log.record(Now::read(), kind, json!({ "n": n }));
        }
        let seqs = |events: Vec<Event>| events.iter().map(|e| e.seq).collect::<Vec<_>>();
        assert_eq!(seqs(log.newest(2, 0, None)), [3, 4]);
        assert_eq!(seqs(log.newest(9, 1, Some("b"))), [2, 4]);
        assert_eq!(seqs(log.newest(9, 4, None)), [] as [u64; 0]);
    }
}
