//! Which pair to send on, and how both ends get off one that is dead and back on it.
//!
//! Either end finds out by itself, but a client of today takes 16.5 s to give up a pair
//! (data-path spec §2.4), and once both have given it up nobody looks whether it works again. So
//! when a path dies while another one lives, the client is told through the portal that our
//! addresses there are gone, upon which it leaves at once; and direct ones are offered again now and
//! then, upon which both ends check anew. A check costs a datagram, traffic only moves when it
//! succeeds.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use is::{Candidate, CandidateKind};

use super::pairs::Ends;
use super::{Connection, Pace};
use crate::admin::model::PathReason;
use crate::connectivity::relay::ChannelPath;
use crate::datapath::peers::{Path, PathKind};
use crate::ids::RelayId;

/// A direct pair without an answer for so long is dead, if another one lives (data-path spec §12
/// R2). A radio link may well be silent for two seconds…
const DIRECT_DEAD_AFTER: Duration = Duration::from_millis(3200);
/// …a relay does so only when it is gone, and its traffic has nowhere else to come back to later.
const RELAYED_DEAD_AFTER: Duration = Duration::from_millis(2200);
/// The same while the path is relayed and checks are quick. A TCP sender that has heard nothing tries
/// again after 0.2, 0.6, 1.4 and 3 s: what is found out later than after 1.4 s costs it 3 s.
const QUICK_DEAD_AFTER: Duration = Duration::from_millis(1300);
/// Another pair must have been answered within this then: when all are silent, it is not a relay that
/// is gone.
const QUICK_ALIVE_WITHIN: Duration = Duration::from_millis(750);
/// Two checks and some more while idle.
const IDLE_DEAD_AFTER: Duration = Duration::from_millis(50_200);

/// Without an answer for so long, checks become frequent: one is overdue.
const DOUBT_AFTER: Duration = Duration::from_millis(1250);
/// The same while the path is relayed.
const QUICK_DOUBT_AFTER: Duration = Duration::from_millis(750);

/// How long after a direct path was left it is looked for again; doubles up to
/// [`SEARCH_MAX`] while that leads nowhere.
pub(super) const SEARCH_FIRST: Duration = Duration::from_secs(10);
/// Each search costs a message through the portal.
pub(super) const SEARCH_MAX: Duration = Duration::from_secs(600);
/// The first search for a direct path where there never was one.
const SEARCH_NEW: Duration = Duration::from_secs(60);
/// Offers of one address that are remembered.
const MAX_ROUNDS: usize = 8;
/// A direct path that lasted this long makes the next search quick again.
const SEARCH_FORGET: Duration = Duration::from_secs(60);

/// The way back to a direct path.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// Local addresses that the client was told are gone.
    withdrawn: Vec<Candidate>,
    next: Option<Instant>,
    interval: Option<Duration>,
    direct_since: Option<Instant>,
    /// When our direct addresses were offered again last.
    offered: Option<Instant>,
    /// How often addresses were offered again, and in which rounds each was: all that the client
    /// was not told to forget, because it may hold on to any of them.
    round: u16,
    rounds: Vec<(SocketAddr, u16)>,
    /// Whether a better path than the present one has been looked for.
    sought: bool,
}

impl Search {
    fn rounds_of(&self, address: SocketAddr) -> impl DoubleEndedIterator<Item = u16> {
        self.rounds
            .iter()
            .filter(move |(a, _)| *a == address)
            .map(|(_, round)| *round)
    }

    fn offer(&mut self, address: SocketAddr, was_withdrawn: bool) {
        if was_withdrawn {
            self.rounds.retain(|(a, _)| *a != address);
        } else if self.rounds_of(address).next().is_none() {
            self.rounds.push((address, 0));
        }
        if self.rounds_of(address).count() == MAX_ROUNDS {
            // A pair that works stays with the first one.
            let mut of_address = (0..self.rounds.len()).filter(|n| self.rounds[*n].0 == address);
            if let Some(second) = of_address.nth(1) {
                self.rounds.remove(second);
            }
        }
        self.rounds.push((address, self.round));
    }
}

impl Connection {
    /// The best pair that the client permits.
    ///
    /// The agent says which, but it ranks a pair by what it knew first: a relayed address that it
    /// meets in a check before it is told of it counts as peer-reflexive, above what NAT routers
    /// give, for good.
    fn permitted(&self, now: Instant) -> Option<Ends> {
        let lives =
            |(local, remote): Ends| self.known.is_ours(local) && self.known.is_theirs(remote);
        let chosen = self.chosen?;
        let rank = |ends| self.known.priority(ends);
        let chosen_rank = lives(chosen).then(|| rank(chosen));
        self.pairs
            .permitted(now, self.kept_for())
            .filter(|ends| lives(*ends))
            .filter(|ends| chosen_rank.is_none_or(|chosen| rank(*ends) > chosen))
            .max_by_key(|ends| rank(*ends))
            .or(Some(chosen).filter(|_| chosen_rank.is_some()))
    }

    /// How long a pair without an answer stays permitted; about as long as the agent keeps it.
    fn kept_for(&self) -> Duration {
        let profile = if self.idle { Pace::Idle } else { Pace::Active }.profile();
        profile.max * u32::try_from(profile.retransmits).unwrap_or(u32::MAX)
    }

    /// The pair to send on: the one that is nominated, or one that lives if that one is dead.
    fn preferred(&self, now: Instant) -> Option<Ends> {
        let Some(chosen) = self.nominated else {
            // Before the client's first word nothing is sent; but when a pair is taken away under
            // our feet, those that live, or will, are as good as before.
            return self.path_since.and_then(|_| self.best_alive(now));
        };
        if !self.is_dead(now, chosen) {
            return Some(chosen);
        }
        self.best_alive(now).or(Some(chosen))
    }

    /// The one that is in use counts until it is dead: a lost answer is no reason to leave it for
    /// another one that the client has not chosen either.
    fn best_alive(&self, now: Instant) -> Option<Ends> {
        let within = self.alive_within();
        self.pairs
            .iter()
            .filter(|pair| {
                let ends = pair.ends;
                pair.is_alive(now, within)
                    || self.in_use == Some(ends)
                        && pair.answered.is_some()
                        && !self.is_dead(now, ends)
            })
            .map(|pair| (pair.ends, pair.nominated))
            .filter(|(ends, _)| self.known.is_ours(ends.0) && self.known.is_theirs(ends.1))
            .max_by_key(|(ends, nominated)| (*nominated, self.known.priority(*ends)))
            .map(|(ends, _)| ends)
    }

    /// What was never answered is the agent's to judge.
    fn is_dead(&self, now: Instant, ends: Ends) -> bool {
        self.dead_from(ends).is_some_and(|from| from <= now)
    }

    /// Remembers which pairs have died since this was asked last.
    fn note_deaths(&mut self, now: Instant) {
        let dead: Vec<Ends> = self
            .pairs
            .iter()
            .filter(|pair| pair.answered.is_some() && pair.died.is_none())
            .filter(|pair| self.is_dead(now, pair.ends))
            .map(|pair| pair.ends)
            .collect();
        for ends in dead {
            self.pairs.died(now, ends);
        }
    }

    /// When the pair counts as dead, unless it is answered before.
    fn dead_from(&self, ends: Ends) -> Option<Instant> {
        if self.idle {
            return self.pairs.alive_until(ends, IDLE_DEAD_AFTER);
        }
        if !self.is_relayed(ends) {
            return self.pairs.alive_until(ends, DIRECT_DEAD_AFTER);
        }
        let from = self.pairs.alive_until(ends, RELAYED_DEAD_AFTER)?;
        let Some(quick_since) = self.quick_since else {
            return Some(from);
        };
        // Checks that were rarer before are not held against it; but what is dead by the slow rule
        // does not rise when checks become quick.
        let quick = self.pairs.alive_until(ends, QUICK_DEAD_AFTER)?;
        Some(from.min(quick.max(quick_since + QUICK_DEAD_AFTER)))
    }

    pub(super) fn is_relayed(&self, (local, remote): Ends) -> bool {
        self.relay_of(local).is_some() || self.known.is_their_relay(remote)
    }

    /// A pair that was answered within this is worth moving to.
    pub(super) fn alive_within(&self) -> Duration {
        if self.idle {
            IDLE_DEAD_AFTER
        } else if self.quick_since.is_some() {
            QUICK_ALIVE_WITHIN
        } else {
            RELAYED_DEAD_AFTER
        }
    }

    /// When the pairs that the client would prefer to `used`, if it believed in them, count as dead;
    /// without those that did already when the path was looked at last.
    fn preferable_until(&self, used: Option<Ends>) -> impl Iterator<Item = Instant> + '_ {
        let rank = used.map(|ends| self.known.priority(ends));
        // Most pairs were never answered; only the others are worth looking their ends up.
        self.pairs
            .iter()
            .filter(|pair| pair.answered.is_some())
            .map(|pair| pair.ends)
            .filter(move |ends| Some(self.known.priority(*ends)) > rank)
            .filter(|ends| self.known.is_ours(ends.0) && self.known.is_theirs(ends.1))
            .filter_map(|ends| self.unseen_until(ends))
    }

    /// When the pair counts as dead, unless it did already when the path was looked at last.
    fn unseen_until(&self, ends: Ends) -> Option<Instant> {
        self.dead_from(ends)
            .filter(|from| self.looked_at.is_none_or(|at| at < *from))
    }

    /// When the pair in use, or one that the client would prefer to it, counts as dead unless it is
    /// answered before.
    pub(super) fn dead_at(&self) -> Option<Instant> {
        self.nominated
            .and_then(|ends| self.unseen_until(ends))
            .into_iter()
            .chain(self.preferable_until(self.in_use))
            .min()
    }

    /// When the path in use becomes doubtful.
    pub(super) fn doubt_at(&self) -> Option<Instant> {
        if self.idle || self.suspect {
            return None;
        }
        let at = self.doubtful_from(self.in_use?)?;
        (self.told_doubt != Some(at)).then_some(at)
    }

    fn doubtful_from(&self, ends: Ends) -> Option<Instant> {
        match self.quick_since {
            None => self.pairs.alive_until(ends, DOUBT_AFTER),
            Some(since) => {
                let from = self.pairs.alive_until(ends, QUICK_DOUBT_AFTER)?;
                Some(from.max(since + QUICK_DOUBT_AFTER))
            }
        }
    }

    /// Whether the path, or the one that the client has chosen, leads through a relay: what was found
    /// dead while checks were quick does not rise because they are no longer.
    pub(super) fn is_path_relayed(&self) -> bool {
        let mut pairs = [self.in_use, self.nominated].into_iter().flatten();
        pairs.any(|ends| self.is_relayed(ends))
    }

    /// Checks often while the path in use is doubtful, and rather often while it is relayed.
    fn doubt(&mut self, now: Instant) {
        let ends = self.in_use.filter(|_| !self.idle);
        let is_quick = ends.is_some() && self.is_path_relayed();
        if is_quick != self.quick_since.is_some() {
            self.quick_since = is_quick.then_some(now);
        }
        let silent_since = ends.and_then(|ends| self.doubtful_from(ends));
        let suspect = silent_since.is_some_and(|at| at <= now)
            && ends.is_some_and(|ends| !self.is_dead(now, ends));
        self.told_doubt = silent_since.filter(|at| *at <= now);
        if suspect != self.suspect {
            self.suspect = suspect;
            self.doubted = ends.and_then(|(local, _)| self.relay_of(local).filter(|_| suspect));
        }
        self.set_pace();
    }

    /// Our relay, if the path through it has become doubtful since this was asked last.
    pub(in crate::connectivity) fn take_doubted(&mut self) -> Option<RelayId> {
        self.doubted.take()
    }

    /// The candidate as it is signalled. A candidate that was withdrawn comes back with another
    /// related port: clients of today cannot withdraw the same one twice. The related address means
    /// nothing to them (data-path spec §2.3), but tells candidates apart.
    pub(super) fn line(&self, candidate: &Candidate) -> String {
        let last = self.search.rounds_of(candidate.addr()).next_back();
        Self::line_of_round(candidate, last.unwrap_or(0))
    }

    fn line_of_round(candidate: &Candidate, round: u16) -> String {
        let line = candidate.to_sdp_string();
        if round == 0 {
            return line;
        }
        let related = match candidate.addr() {
            SocketAddr::V4(_) => "raddr 0.0.0.0 rport",
            SocketAddr::V6(_) => "raddr :: rport",
        };
        match candidate.kind() {
            CandidateKind::Host => {
                line.replacen("typ host", &format!("typ host {related} {round}"), 1)
            }
            CandidateKind::ServerReflexive | CandidateKind::Relayed => {
                line.replacen(&format!("{related} 0"), &format!("{related} {round}"), 1)
            }
            CandidateKind::PeerReflexive => line,
        }
    }

    pub(super) fn search_at(&self) -> Option<Instant> {
        self.search
            .next
            .filter(|_| !self.idle || self.path.is_none())
    }

    /// The new path if it differs from the last one told, and why.
    pub(in crate::connectivity) fn path_change(
        &mut self,
        now: Instant,
        channel_to: impl Fn(RelayId, SocketAddr) -> Option<ChannelPath>,
    ) -> Option<(Option<Path>, PathReason)> {
        self.note_deaths(now);
        self.nominated = self.permitted(now);
        let preferred = self.preferred(now);
        let path = preferred.and_then(|(local, remote)| {
            let remote_relayed = self.known.is_their_relay(remote);
            match self.relay_of(local) {
                Some(relay) => channel_to(relay, remote).map(|channel| Path {
                    source: None,
                    destination: channel.relay,
                    channel: Some(channel.channel),
                    kind: PathKind::of(true, remote_relayed),
                }),
                None => Some(Path {
                    source: Some(local.ip()),
                    destination: remote,
                    channel: None,
                    kind: PathKind::of(false, remote_relayed),
                }),
            }
        });
        // The client learns that an address of ours is gone also when it was not in use: once that
        // one fails, which it would turn to, it would find out by itself in 16 s.
        let died = self.preferable_until(preferred).any(|until| until <= now);
        self.looked_at = Some(now);
        if preferred != self.nominated || died {
            self.leave(now);
        }
        let reason = (path != self.path).then(|| self.reason(now, preferred, path.is_some()));
        self.was_nominated = self.nominated;
        self.in_use = preferred;
        self.doubt(now);
        let reason = reason?;
        // The first one is no change.
        self.path_changes += u64::from(self.path_since.is_some());
        let kind = |path: Option<Path>| path.map(|path| path.kind);
        self.history.note(now, kind(self.path), kind(path), reason);
        self.path = path;
        self.path_since = Some(now);
        match path.map(|p| p.kind) {
            Some(PathKind::Direct) => self.found(now),
            Some(_) => self.search(now),
            // Nothing to lose: whatever worked once may do so again.
            None => self.search.next = Some(now),
        }
        Some((path, reason))
    }

    /// Why traffic goes from one pair to another, or nowhere; to be asked before anything is set to
    /// the new state.
    ///
    /// What is certain comes first: an end that is gone says more than what is used instead, or
    /// that nothing is.
    fn reason(&self, now: Instant, preferred: Option<Ends>, sendable: bool) -> PathReason {
        if self.path_since.is_none() {
            return PathReason::Nominated;
        }
        if sendable && self.path.is_some() && preferred == self.in_use {
            return PathReason::Updated;
        }
        if let Some((local, remote)) = self.in_use {
            // Of ours, only relayed addresses ever go.
            if !self.known.is_ours(local) {
                return PathReason::RelayLost;
            }
            if !self.known.is_theirs(remote) {
                return PathReason::Withdrawn;
            }
        }
        let (Some(new), true) = (preferred, sendable) else {
            // With a pair, it is the relay's channel that is missing.
            return match preferred {
                Some(_) => PathReason::RelayLost,
                None => PathReason::Disconnected,
            };
        };
        let Some(old) = self.in_use.filter(|_| self.path.is_some()) else {
            return PathReason::Returned;
        };
        let is_nominated = preferred == self.nominated;
        if self.is_dead(now, old) {
            return PathReason::Dead;
        }
        // Both live: the client chose, or something is back.
        let is_back = if is_nominated {
            // The client did not choose just now, so it was our own choice that ended.
            self.was_nominated == self.nominated
                || (self.search.sought && self.known.priority(new) > self.known.priority(old))
        } else {
            // What the agent holds on to is dead. The client may have chosen one of the others.
            !self.pairs.is_nominated(new) || self.pairs.is_nominated(old)
        };
        if is_back {
            PathReason::Returned
        } else {
            PathReason::Nominated
        }
    }

    /// Whether a check of this pair was answered within `limit`: a client with the right
    /// credentials is, or was then, at the other end.
    pub(in crate::connectivity) fn vouches_for(
        &self,
        now: Instant,
        ends: Ends,
        limit: Duration,
    ) -> bool {
        self.pairs
            .answered_at(ends)
            .is_some_and(|at| now - at <= limit)
    }

    /// Pairs that [`Self::vouches_for`] may speak of.
    pub(in crate::connectivity) fn ends(&self) -> impl Iterator<Item = Ends> + '_ {
        self.pairs.ends()
    }

    /// Pairs that it does not speak of any more.
    pub(in crate::connectivity) fn take_forgotten(&mut self) -> Vec<Ends> {
        self.pairs.take_forgotten()
    }

    /// The pair in use is dead. Tells the client which of our addresses are gone, if it has another
    /// one of ours to talk to: all that are silent now, since it would only try the next of them.
    fn leave(&mut self, now: Instant) {
        let alive: Vec<Ends> = self
            .pairs
            .alive(now, self.alive_within())
            .filter(|ends| self.known.is_ours(ends.0) && self.known.is_theirs(ends.1))
            .collect();
        if alive.is_empty() {
            return;
        }
        // A local address that only the client's relay reaches any more is silent for all that
        // matters: withdrawing it cuts that way off, too, but as long as it is offered the client
        // believes that it can have it directly.
        let counts =
            |ends: &Ends| self.relay_of(ends.0).is_some() || !self.known.is_their_relay(ends.1);
        // One lost answer does not make an address silent, though it is no reason to move there.
        let living: Vec<Ends> = self
            .pairs
            .iter()
            .filter(|pair| pair.answered.is_some() && !self.is_dead(now, pair.ends))
            .map(|pair| pair.ends)
            .filter(|ends| self.known.is_ours(ends.0) && self.known.is_theirs(ends.1))
            .collect();
        let answers = |local: SocketAddr| living.iter().any(|e| e.0 == local && counts(e));
        // An address that was offered again has to have worked before it can fail, or have had the
        // time to.
        let offered = self.search.offered;
        let tried = offered.is_none_or(|at| now >= at + DIRECT_DEAD_AFTER);
        let mut silent: Vec<SocketAddr> = self
            .pairs
            .ends()
            .filter(|ends| {
                let answered = self.pairs.answered_at(*ends);
                answered > offered || tried && answered.is_some()
            })
            .filter(|ends| {
                if counts(ends) {
                    !answers(ends.0)
                } else {
                    // Through their relay; it may be that which died.
                    living.iter().all(|e| e.0 != ends.0)
                }
            })
            .map(|ends| ends.0)
            .collect();
        if alive.iter().all(|(local, _)| silent.contains(local)) {
            // Its relay is all there is.
            silent.retain(|local| alive.iter().all(|(l, _)| l != local));
        }
        let gone: Vec<Candidate> = self
            .offered()
            .into_iter()
            .filter(|c| match c.kind() {
                CandidateKind::Host | CandidateKind::Relayed => silent.contains(&c.addr()),
                CandidateKind::ServerReflexive => silent
                    .iter()
                    .any(|base| self.reflexive.contains(&(c.addr(), *base))),
                CandidateKind::PeerReflexive => false,
            })
            .filter(|c| !self.search.withdrawn.contains(c))
            // Two private networks may number their hosts alike. Clients of today look for a
            // withdrawn address among their own first, and would give that one up.
            .filter(|c| !self.known.is_theirs(c.addr()))
            .collect();
        for candidate in gone {
            self.added.retain(|c| *c != candidate);
            let mut rounds: Vec<u16> = self.search.rounds_of(candidate.addr()).collect();
            if rounds.is_empty() {
                rounds.push(0);
            }
            let lines = rounds.iter().map(|n| Self::line_of_round(&candidate, *n));
            self.invalidated.extend(lines);
            if candidate.kind() == CandidateKind::Relayed {
                // The relay may only be out of reach for a while.
                self.search.next.get_or_insert(now + SEARCH_FIRST);
            }
            self.search.withdrawn.push(candidate);
        }
    }

    fn search(&mut self, now: Instant) {
        let stable = self
            .search
            .direct_since
            .is_some_and(|since| now - since >= SEARCH_FORGET);
        let was_direct = self.search.direct_since.take().is_some();
        if !was_direct && self.search.next.is_some() {
            // From one relay to another.
            return;
        }
        let interval = match self.search.interval {
            Some(interval) if !stable => interval,
            _ if was_direct => SEARCH_FIRST,
            _ => SEARCH_NEW,
        };
        self.search.interval = Some(interval);
        self.search.next = Some(now + interval);
    }

    fn found(&mut self, now: Instant) {
        self.search.direct_since = Some(now);
        if !std::mem::take(&mut self.search.sought) {
            // It came by itself: that a relay was quicker at first says nothing about the next time.
            self.search.interval = None;
        }
        self.search
            .withdrawn
            .retain(|c| c.kind() == CandidateKind::Relayed);
        if self.search.withdrawn.is_empty() {
            self.search.next = None;
        }
    }

    /// Offers our direct addresses again and checks the client's, if that is due.
    pub(super) fn search_again(&mut self, now: Instant) {
        if self.search_at().is_none_or(|at| at > now) {
            return;
        }
        let interval = self.search.interval.unwrap_or(SEARCH_FIRST);
        let longer = (2 * interval).min(SEARCH_MAX);
        self.search.interval = Some(longer);
        self.search.next = Some(now + longer);
        let withdrawn = std::mem::take(&mut self.search.withdrawn);
        self.search.offered = Some(now);
        self.search.round = self.search.round.wrapping_add(1);
        let again: Vec<Candidate> = self
            .offered()
            .into_iter()
            .filter(|c| c.kind() != CandidateKind::Relayed || withdrawn.contains(c))
            .collect();
        let known = &self.known;
        // Relayed addresses come and go.
        self.search
            .rounds
            .retain(|(address, _)| known.has_ours(*address));
        for candidate in &again {
            self.search
                .offer(candidate.addr(), withdrawn.contains(candidate));
        }
        self.added = again;
        if self.path.is_some_and(|p| p.kind == PathKind::Direct) {
            // Only a relay was looked for.
            self.search.next = None;
        } else {
            self.search.sought = true;
        }
        // The agent has pruned the pairs that failed. The one in use is checked anew like all others;
        // until the client has confirmed it, its last answer stands for it.
        self.agent.recreate_candidate_pairs();
    }
}
