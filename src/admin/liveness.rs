//! Whether the loops of the process turn.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The loop ended as it should.
const ENDED: u64 = u64::MAX;
/// The loop ended as it should not.
const DIED: u64 = u64::MAX - 1;

/// Last signs of life of all loops. Clones share everything.
#[derive(Debug, Clone)]
pub struct Liveness {
    start: Instant,
    loops: Arc<Mutex<Vec<Arc<Loop>>>>,
}

#[derive(Debug)]
struct Loop {
    name: String,
    /// Milliseconds since `start` of the last tick, or one of the marks above.
    ticked: AtomicU64,
}

/// State of one loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoopState {
    pub(super) name: String,
    /// Time since the last tick; `None` when the loop died.
    pub(super) silent: Option<Duration>,
}

impl Default for Liveness {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Liveness {
    /// No loops yet. `start` is the beginning of time for the ticks.
    pub fn new(start: Instant) -> Self {
        Self {
            start,
            loops: Arc::default(),
        }
    }

    /// Adds a loop, such as `slow_path` or `worker-0`. It counts as turning as of `now`, and must
    /// tick at least every few seconds from then on, also when it has nothing to do.
    pub fn register(&self, name: impl Into<String>, now: Instant) -> Heartbeat {
        let state = Arc::new(Loop {
            name: name.into(),
            ticked: AtomicU64::new(0),
        });
        let heartbeat = Heartbeat {
            start: self.start,
            state: Arc::clone(&state),
        };
        heartbeat.tick(now);
        self.loops
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(state);
        heartbeat
    }

    /// All loops that should be turning.
    pub(super) fn states(&self, now: Instant) -> Vec<LoopState> {
        let mut loops = self.loops.lock().unwrap_or_else(PoisonError::into_inner);
        loops.retain(|state| state.ticked.load(Ordering::Relaxed) != ENDED);
        loops
            .iter()
            .map(|state| LoopState {
                name: state.name.clone(),
                silent: match state.ticked.load(Ordering::Relaxed) {
                    DIED => None,
                    ticked => Some(
                        now.saturating_duration_since(self.start + Duration::from_millis(ticked)),
                    ),
                },
            })
            .collect()
    }
}

/// A loop's side. Dropping it says that the loop has ended, or died if the thread is panicking.
#[derive(Debug)]
pub struct Heartbeat {
    start: Instant,
    state: Arc<Loop>,
}

impl Heartbeat {
    /// The loop has come round. One relaxed store.
    pub fn tick(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.start).as_millis();
        let millis = u64::try_from(millis).unwrap_or(DIED - 1);
        self.state.ticked.store(millis, Ordering::Relaxed);
    }

    /// The loop ends because of an error.
    pub fn die(self) {
        let state = Arc::clone(&self.state);
        drop(self);
        state.ticked.store(DIED, Ordering::Relaxed);
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        let mark = if thread::panicking() { DIED } else { ENDED };
        self.state.ticked.store(mark, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn silence_counts_from_the_last_tick() {
        let start = Instant::now();
        let liveness = Liveness::new(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        let heartbeat = liveness.register("slow_path", at(100));
        assert_eq!(
            liveness.states(at(104))[0].silent,
            Some(Duration::from_secs(4))
        );

        heartbeat.tick(at(105));

        assert_eq!(
            liveness.states(at(106))[0].silent,
            Some(Duration::from_secs(1))
        );
        assert_eq!(liveness.states(at(100))[0].silent, Some(Duration::ZERO));
    }

    #[test]
    fn loop_that_ended_is_forgotten_and_one_that_failed_or_panicked_is_not() {
        let now = Instant::now();
        let liveness = Liveness::new(now);
        drop(liveness.register("ended", now));
        liveness.register("worker-0", now).die();
        let dying = liveness.register("worker-1", now);
        thread::spawn(move || {
            let _dying = dying;
            panic!("expected by the test");
        })
        .join()
        .unwrap_err();

        let states = liveness.states(now);

        let states: Vec<_> = states.iter().map(|s| (s.name.as_str(), s.silent)).collect();
        assert_eq!(states, [("worker-0", None), ("worker-1", None)]);
    }
}
