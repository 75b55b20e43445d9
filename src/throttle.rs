//! Keeping the log readable where somebody else sets the pace: a client, a stranger, a disk.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Lets a few lines through at once and then one per pause; counts those it holds back.
#[derive(Debug, Clone)]
pub(crate) struct Throttle {
    burst: u32,
    pause: Duration,
    left: u32,
    /// When the last line was let through, or the last one after that was earned.
    earned: Option<Instant>,
    held_back: u64,
}

impl Throttle {
    /// One line per minute: for what stays true meanwhile, such as a full disk.
    pub(crate) const MINUTELY: Self = Self::new(1, Duration::from_secs(60));

    /// At most `burst` lines at once, and one more for each `pause` that has passed.
    pub(crate) const fn new(burst: u32, pause: Duration) -> Self {
        Self {
            burst,
            pause,
            left: burst,
            earned: None,
            held_back: 0,
        }
    }

    /// `None` if the line is to be held back; else how many were since the last one that was not.
    #[expect(
        clippy::option_option,
        reason = "the inner one is a field of the log line, left out if there is nothing to tell"
    )]
    pub(crate) fn admit(&mut self, now: Instant) -> Option<Option<NonZeroU64>> {
        self.admit_silently(now).then(|| self.take())
    }

    /// As [`Self::admit`] for a line that cannot tell how many were held back before it: that is
    /// left to [`Self::take`].
    pub(crate) fn admit_silently(&mut self, now: Instant) -> bool {
        self.earn(now);
        let admitted = self.left > 0;
        if admitted {
            self.spend(now);
        } else {
            self.held_back += 1;
        }
        admitted
    }

    /// How many lines were held back, if a pause has passed without another line that could tell:
    /// otherwise the end of a flood would never be told of.
    pub(crate) fn overdue(&mut self, now: Instant) -> Option<NonZeroU64> {
        self.earn(now);
        if self.held_back == 0 || self.left == 0 {
            return None;
        }
        self.spend(now);
        self.take()
    }

    /// How many lines were held back and not told of.
    pub(crate) fn take(&mut self) -> Option<NonZeroU64> {
        NonZeroU64::new(std::mem::take(&mut self.held_back))
    }

    fn spend(&mut self, now: Instant) {
        self.earned.get_or_insert(now);
        self.left -= 1;
    }

    fn earn(&mut self, now: Instant) {
        let Some(earned) = self.earned else {
            return;
        };
        let passed = now.saturating_duration_since(earned).as_nanos() / self.pause.as_nanos();
        let more = u32::try_from(passed).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(self.burst);
        // With all of them back, time begins to count at the next line.
        self.earned = (self.left < self.burst).then(|| earned + self.pause * more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(n: u64) -> Option<Option<NonZeroU64>> {
        Some(NonZeroU64::new(n))
    }

    #[test]
    fn one_line_per_minute_is_let_through_and_tells_how_many_were_not() {
        let start = Instant::now();
        let mut throttle = Throttle::MINUTELY;
        let through = (0..180)
            .filter_map(|s| Some((s, throttle.admit(start + Duration::from_secs(s))?)))
            .collect::<Vec<_>>();
        let lost = NonZeroU64::new(59);
        assert_eq!(through, [(0, None), (60, lost), (120, lost)]);
    }

    #[test]
    fn a_burst_is_earned_again_one_by_one() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut throttle = Throttle::new(3, Duration::from_secs(10));
        for _ in 0..3 {
            assert_eq!(throttle.admit(at(0)), told(0));
        }
        assert_eq!(throttle.admit(at(9)), None);
        assert_eq!(throttle.admit(at(10)), told(1));
        assert_eq!(throttle.admit(at(19)), None);
        assert_eq!(throttle.admit(at(35)), told(1));
        assert_eq!(throttle.admit(at(35)), told(0));
        assert_eq!(throttle.admit(at(35)), None);
        assert_eq!(throttle.admit(at(39)), None, "half a pause is not lost");
        assert_eq!(throttle.admit(at(40)), told(2));
        // However long nothing was said, no more than the burst is earned.
        let through = (0..9).filter_map(|_| throttle.admit(at(9_999))).count();
        assert_eq!(through, 3);
    }

    #[test]
    fn what_was_held_back_last_is_told_when_its_time_has_come() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut throttle = Throttle::MINUTELY;
        assert_eq!(throttle.overdue(at(0)), None);
        assert_eq!(throttle.admit(at(0)), told(0));
        assert_eq!(throttle.admit(at(1)), None);
        assert_eq!(throttle.admit(at(2)), None);
        assert_eq!(throttle.overdue(at(59)), None);
        assert_eq!(throttle.overdue(at(60)), NonZeroU64::new(2));
        assert_eq!(throttle.overdue(at(600)), None);
        assert_eq!(throttle.admit(at(600)), told(0));
    }
}
