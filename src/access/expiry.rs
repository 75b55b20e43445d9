//! When grants end.

use std::time::{Duration, Instant};

/// A grant of longer life is held to this. No process runs that long, and the cap keeps a
/// time stamp in the wrong unit from overflowing the clock.
const FAR_FUTURE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// The end of a grant. Ordered: what never ends comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Expiry {
    /// Valid strictly before this instant.
    At(Instant),
    /// Valid for good.
    Never,
}

impl Expiry {
    pub(super) fn is_over(self, now: Instant) -> bool {
        match self {
            Expiry::At(at) => at <= now,
            Expiry::Never => false,
        }
    }

    pub(super) fn instant(self) -> Option<Instant> {
        match self {
            Expiry::At(at) => Some(at),
            Expiry::Never => None,
        }
    }
}

/// Maps Unix time to the monotonic clock, from one simultaneous reading of both
/// (portal-channel spec §4.5).
#[derive(Debug, Clone, Copy)]
pub(super) struct UnixClock {
    at: Instant,
    unix: Duration,
}

impl UnixClock {
    pub(super) fn new(now: Instant, unix_now: Duration) -> Self {
        Self {
            at: now,
            unix: unix_now,
        }
    }

    /// A time before the reading counts as the time of the reading, which is in the past.
    pub(super) fn expiry(&self, expires_at: Option<u64>) -> Expiry {
        let Some(unix) = expires_at else {
            return Expiry::Never;
        };
        let left = Duration::from_secs(unix).saturating_sub(self.unix);
        Expiry::At(self.at.checked_add(left.min(FAR_FUTURE)).unwrap_or(self.at))
    }

    /// How far the two clocks have moved apart since the reading.
    pub(super) fn drift(&self, now: Instant, unix_now: Duration) -> Duration {
        let expected = self.unix + now.saturating_duration_since(self.at);
        unix_now.abs_diff(expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIX: Duration = Duration::from_millis(1_790_000_000_250);

    #[test]
    fn unix_seconds_map_to_the_millisecond() {
        let start = Instant::now();
        let clock = UnixClock::new(start, UNIX);
        let at = start + Duration::from_millis(9_750);
        let expiry = clock.expiry(Some(1_790_000_010));
        assert_eq!(expiry, Expiry::At(at));
        assert!(!expiry.is_over(at - Duration::from_nanos(1)));
        assert!(expiry.is_over(at));
    }

    #[test]
    fn the_past_is_over_at_once() {
        let start = Instant::now();
        let clock = UnixClock::new(start, UNIX);
        for past in [0, 1, 1_789_999_999, 1_790_000_000] {
            assert!(clock.expiry(Some(past)).is_over(start), "{past}");
        }
        assert!(!clock.expiry(Some(1_790_000_001)).is_over(start));
    }

    #[test]
    fn absurd_times_are_capped_and_absent_ones_never_come() {
        let start = Instant::now();
        let clock = UnixClock::new(start, UNIX);
        for absurd in [u64::MAX, u64::MAX / 2, 1_790_000_000_000] {
            assert_eq!(
                clock.expiry(Some(absurd)),
                Expiry::At(start + FAR_FUTURE),
                "{absurd}"
            );
        }
        assert!(!clock.expiry(None).is_over(start + 2 * FAR_FUTURE));
    }

    #[test]
    fn never_is_later_than_any_time() {
        let now = Instant::now();
        assert!(Expiry::Never > Expiry::At(now + FAR_FUTURE));
        assert!(Expiry::At(now) < Expiry::At(now + Duration::from_nanos(1)));
    }
}
