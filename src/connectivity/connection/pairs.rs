//! Which candidate pairs show signs of life. The agent keeps a pair until its checks have failed
//! for good, which takes a multiple of what a TCP connection bears; so the path is chosen among
//! pairs whose last check was answered lately (data-path spec §12 R2).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// More pairs are not followed; the one that was answered least lately goes.
const MAX: usize = 100;

/// Our address (host or relayed) and theirs.
pub(super) type Ends = (SocketAddr, SocketAddr);

#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub(super) ends: Ends,
    /// The client permits it (USE-CANDIDATE, RFC 8445 §8).
    pub(super) nominated: bool,
    /// When an answer to one of our checks came last: proof of both directions.
    pub(super) answered: Option<Instant>,
    /// When the client checked it last.
    asked: Option<Instant>,
    /// When it was found dead; only an answer changes that. That checks have become rare, or that
    /// they were, is no sign of life.
    pub(super) died: Option<Instant>,
}

impl Pair {
    /// Neither end has heard of the other here.
    pub(super) fn untried(ends: Ends) -> Self {
        Self {
            ends,
            nominated: false,
            answered: None,
            asked: None,
            died: None,
        }
    }

    /// Whether it was answered within the limit, and not found dead since.
    pub(super) fn is_alive(&self, now: Instant, limit: Duration) -> bool {
        self.died.is_none() && self.is_kept(now, limit)
    }

    /// Whether it was answered within the limit.
    fn is_kept(&self, now: Instant, limit: Duration) -> bool {
        self.answered.is_some_and(|at| now < at + limit)
    }
}

/// The pairs of one connection.
#[derive(Debug)]
pub(super) struct Pairs {
    pairs: Vec<Pair>,
    /// Pairs that are not followed any more.
    forgotten: Vec<Ends>,
    /// Before this, checks were too rare to say anything.
    watched_since: Instant,
}

impl Pairs {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            pairs: Vec::new(),
            forgotten: Vec::new(),
            watched_since: now,
        }
    }

    /// The pace of checks changed.
    pub(super) fn watch_from(&mut self, now: Instant) {
        self.watched_since = now;
    }

    /// The client checked a pair. Returns how long after the last time, if it has before.
    pub(super) fn asked(
        &mut self,
        now: Instant,
        ends: Ends,
        use_candidate: bool,
    ) -> Option<Duration> {
        let pair = self.pair(ends);
        pair.nominated |= use_candidate;
        let before = pair.asked.replace(now)?;
        Some(now.saturating_duration_since(before))
    }

    /// The client answered a check.
    pub(super) fn answered(&mut self, now: Instant, ends: Ends) {
        let pair = self.pair(ends);
        pair.answered = Some(now);
        pair.died = None;
    }

    fn pair(&mut self, ends: Ends) -> &mut Pair {
        let at = match self.pairs.iter().position(|p| p.ends == ends) {
            Some(at) => at,
            None => {
                if self.pairs.len() == MAX {
                    let oldest = self
                        .pairs
                        .iter()
                        .enumerate()
                        .min_by_key(|(_, p)| p.answered);
                    if let Some((oldest, _)) = oldest {
                        self.forgotten.push(self.pairs.swap_remove(oldest).ends);
                    }
                }
                self.pairs.push(Pair::untried(ends));
                self.pairs.len() - 1
            }
        };
        &mut self.pairs[at]
    }

    /// Every pair.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Pair> + '_ {
        self.pairs.iter()
    }

    /// The ends of every pair.
    pub(super) fn ends(&self) -> impl Iterator<Item = Ends> + '_ {
        self.pairs.iter().map(|p| p.ends)
    }

    /// Pairs that had to make room.
    pub(super) fn take_forgotten(&mut self) -> Vec<Ends> {
        std::mem::take(&mut self.forgotten)
    }

    /// When a check of the pair was answered last.
    pub(super) fn answered_at(&self, ends: Ends) -> Option<Instant> {
        self.pairs.iter().find(|p| p.ends == ends)?.answered
    }

    /// Whether the client permits the pair.
    pub(super) fn is_nominated(&self, ends: Ends) -> bool {
        self.pairs.iter().any(|p| p.ends == ends && p.nominated)
    }

    /// When the pair stops counting as alive, unless it is answered again; or when it did.
    pub(super) fn alive_until(&self, ends: Ends, limit: Duration) -> Option<Instant> {
        let pair = self.pairs.iter().find(|p| p.ends == ends)?;
        let until = pair.answered?.max(self.watched_since) + limit;
        Some(pair.died.map_or(until, |died| died.min(until)))
    }

    /// The pair was found dead.
    pub(super) fn died(&mut self, now: Instant, ends: Ends) {
        if let Some(pair) = self.pairs.iter_mut().find(|p| p.ends == ends) {
            pair.died.get_or_insert(now);
        }
    }

    /// The ends of pairs that the client permits and that were answered within the limit, though they
    /// may have been found dead since.
    pub(super) fn permitted(
        &self,
        now: Instant,
        limit: Duration,
    ) -> impl Iterator<Item = Ends> + '_ {
        self.pairs
            .iter()
            .filter(move |p| p.nominated && p.is_kept(now, limit))
            .map(|p| p.ends)
    }

    /// The ends of pairs that live, as [`Pair::is_alive`] has it.
    pub(super) fn alive(&self, now: Instant, limit: Duration) -> impl Iterator<Item = Ends> + '_ {
        self.pairs
            .iter()
            .filter(move |p| p.is_alive(now, limit))
            .map(|p| p.ends)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);
    const TICK: Duration = Duration::from_millis(1);

    fn ends(n: u16) -> Ends {
        (
            SocketAddr::from(([192, 0, 2, 1], 1)),
            SocketAddr::from(([192, 0, 2, 9], n)),
        )
    }

    #[test]
    fn a_pair_is_alive_until_the_limit_after_its_last_answer() {
        let start = Instant::now();
        let mut pairs = Pairs::new(start);
        assert_eq!(pairs.alive_until(ends(1), LIMIT), None);
        assert_eq!(pairs.asked(start, ends(1), true), None);
        assert_eq!(pairs.alive_until(ends(1), LIMIT), None, "one way only");
        pairs.answered(start, ends(1));
        assert_eq!(pairs.alive_until(ends(1), LIMIT), Some(start + LIMIT));
        assert_eq!(pairs.alive(start + LIMIT - TICK, LIMIT).count(), 1);
        assert_eq!(pairs.alive(start + LIMIT, LIMIT).count(), 0);
        pairs.answered(start + LIMIT, ends(1));
        assert_eq!(pairs.alive(start + LIMIT, LIMIT).next(), Some(ends(1)));
    }

    #[test]
    fn only_an_answer_brings_the_dead_back() {
        let start = Instant::now();
        let mut pairs = Pairs::new(start);
        pairs.asked(start, ends(1), true);
        pairs.answered(start, ends(1));
        let death = start + LIMIT;
        pairs.died(death, ends(1));
        pairs.died(death + TICK, ends(1));
        pairs.watch_from(death + LIMIT);
        assert_eq!(pairs.alive_until(ends(1), 10 * LIMIT), Some(death));
        assert_eq!(pairs.alive(death, 10 * LIMIT).count(), 0);
        let permitted = |pairs: &Pairs| pairs.permitted(death, 10 * LIMIT).next();
        assert_eq!(
            permitted(&pairs),
            Some(ends(1)),
            "the client's to take back"
        );
        assert_eq!(pairs.asked(death, ends(1), true), Some(LIMIT));
        assert_eq!(pairs.alive(death, 10 * LIMIT).count(), 0, "one way only");
        pairs.answered(death + LIMIT, ends(1));
        assert_eq!(pairs.alive(death + LIMIT, LIMIT).next(), Some(ends(1)));
        assert_eq!(
            pairs.alive_until(ends(1), LIMIT),
            Some(death + LIMIT + LIMIT)
        );
    }

    #[test]
    fn pauses_between_a_clients_checks_are_those_of_one_pair() {
        let start = Instant::now();
        let mut pairs = Pairs::new(start);
        assert_eq!(pairs.asked(start, ends(1), false), None);
        assert_eq!(pairs.asked(start + TICK, ends(2), false), None);
        let pause = pairs.asked(start + LIMIT, ends(1), false);
        assert_eq!(pause, Some(LIMIT));
    }

    #[test]
    fn rare_checks_of_the_past_are_not_held_against_a_pair() {
        let start = Instant::now();
        let mut pairs = Pairs::new(start);
        pairs.answered(start, ends(1));
        let later = start + 10 * LIMIT;
        pairs.watch_from(later);
        assert_eq!(pairs.alive_until(ends(1), LIMIT), Some(later + LIMIT));
        assert_eq!(
            pairs.alive(later, LIMIT).count(),
            0,
            "but it is no proof of life either"
        );
    }

    #[test]
    fn any_number_of_pairs_is_followed_in_bounded_memory() {
        let start = Instant::now();
        let mut pairs = Pairs::new(start);
        for n in 0..1000 {
            pairs.asked(start, ends(n), false);
            if n % 2 == 0 {
                pairs.answered(start + TICK * u32::from(n), ends(n));
            }
        }
        assert_eq!(pairs.pairs.len(), MAX);
        assert!(pairs.alive_until(ends(998), LIMIT).is_some());
    }
}
