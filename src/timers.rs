//! One deadline per object, ordered: a wake-up costs in proportion to what is due, not to how many
//! objects exist.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Instant;

/// Deadlines by key.
#[derive(Debug)]
pub(crate) struct Deadlines<K> {
    queue: BTreeSet<(Instant, K)>,
    current: HashMap<K, Instant>,
}

impl<K: Copy + Ord + Hash> Deadlines<K> {
    pub(crate) fn new() -> Self {
        Self {
            queue: BTreeSet::new(),
            current: HashMap::new(),
        }
    }

    /// Sets, moves or (with `None`) removes the deadline of `key`.
    pub(crate) fn set(&mut self, key: K, at: Option<Instant>) {
        if self.current.get(&key).copied() == at {
            return;
        }
        self.clear(&key);
        if let Some(at) = at {
            self.queue.insert((at, key));
            self.current.insert(key, at);
        }
    }

    /// Sets the deadline of `key` unless it has an earlier one.
    pub(crate) fn set_earlier(&mut self, key: K, at: Instant) {
        if self.current.get(&key).is_none_or(|current| at < *current) {
            self.set(key, Some(at));
        }
    }

    /// Removes the deadline of `key`.
    pub(crate) fn clear(&mut self, key: &K) {
        if let Some(at) = self.current.remove(key) {
            self.queue.remove(&(at, *key));
        }
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Takes out one key whose deadline has come.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<K> {
        let (at, key) = *self.queue.first()?;
        if at > now {
            return None;
        }
        self.clear(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn due_keys_come_out_in_order_and_moved_ones_at_their_new_time() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut deadlines = Deadlines::new();
        deadlines.set('a', Some(at(3)));
        deadlines.set('b', Some(at(1)));
        deadlines.set('c', Some(at(2)));
        deadlines.set('b', Some(at(5)));
        deadlines.set('c', None);
        assert_eq!(deadlines.next(), Some(at(3)));
        assert_eq!(deadlines.pop_due(at(2)), None);
        assert_eq!(deadlines.pop_due(at(9)), Some('a'));
        assert_eq!(deadlines.pop_due(at(9)), Some('b'));
        assert_eq!(deadlines.pop_due(at(9)), None);
        assert_eq!(deadlines.next(), None);
    }
}
