//! Which pair to send on, and how both ends get off one that is dead and back on it.
//!
//! Either end finds out by itself, but a client of today takes 16.5 s to give up a pair
//! (data-path spec §2.4), and once both have given it up nobody looks whether it works again. So
//! when a direct path dies while another one lives, the client is told through the portal that our
//! addresses there are gone, upon which it leaves at once; and they are offered again now and then,
//! upon which both ends check anew. A check costs a datagram, traffic only moves when it succeeds.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use is::{Candidate, CandidateKind};

use super::pairs::Ends;
use super::{ACTIVE, Connection, IDLE, SUSPECT};
use crate::connectivity::relay::ChannelPath;
use crate::datapath::peers::{Path, PathKind};
use crate::ids::RelayId;

/// A pair without an answer for two check intervals and some more is dead, if another one lives
/// (data-path spec §12 R2).
fn dead_after(idle: bool) -> Duration {
    let profile = if idle { &IDLE } else { &ACTIVE };
    2 * profile.max + Duration::from_millis(200)
}

/// Without an answer for so long, checks become frequent.
const DOUBT_AFTER: Duration = Duration::from_millis(1750);

/// How long after a direct path was left it is looked for again; doubles up to
/// [`SEARCH_MAX`] while that leads nowhere.
pub(super) const SEARCH_FIRST: Duration = Duration::from_secs(10);
/// Each search costs a message through the portal.
pub(super) const SEARCH_MAX: Duration = Duration::from_secs(300);
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
    /// How often our direct addresses were offered again.
    round: u16,
}

impl Connection {
    /// The pair to send on: the one that the agent chose, or one that lives if that one is dead.
    fn preferred(&self, now: Instant) -> Option<Ends> {
        let chosen = self.nominated?;
        if !self.is_dead(now, chosen) {
            return Some(chosen);
        }
        self.pairs
            .alive(now, dead_after(self.idle))
            .filter(|(ends, _)| self.is_ours(ends.0))
            .max_by_key(|(ends, nominated)| (*nominated, self.priority(*ends)))
            .map(|(ends, _)| ends)
            .or(Some(chosen))
    }

    /// What was never answered is the agent's to judge.
    fn is_dead(&self, now: Instant, ends: Ends) -> bool {
        self.pairs
            .alive_until(ends, dead_after(self.idle))
            .is_some_and(|until| until <= now)
    }

    fn is_ours(&self, local: SocketAddr) -> bool {
        self.agent
            .local_candidates()
            .any(|c| c.addr() == local && c.kind() != CandidateKind::ServerReflexive)
    }

    /// Pair priority (RFC 8445 §6.1.2.3); the client is the controlling one.
    fn priority(&self, (local, remote): Ends) -> u64 {
        let best = |candidates: &mut dyn Iterator<Item = Candidate>, address| {
            candidates
                .filter(|c| c.addr() == address)
                .map(|c| u64::from(c.prio()))
                .max()
                .unwrap_or(0)
        };
        let ours = best(&mut self.agent.local_candidates(), local);
        let theirs = best(&mut self.agent.remote_candidates(), remote);
        (ours.min(theirs) << 32) + 2 * ours.max(theirs) + u64::from(theirs > ours)
    }

    /// When the pair in use counts as dead unless it is answered before.
    pub(super) fn dead_at(&self) -> Option<Instant> {
        let until = self
            .pairs
            .alive_until(self.nominated?, dead_after(self.idle))?;
        (self.told_dead != Some(until)).then_some(until)
    }

    /// When the path in use becomes doubtful.
    pub(super) fn doubt_at(&self) -> Option<Instant> {
        if self.idle || self.suspect {
            return None;
        }
        let at = self.pairs.alive_until(self.in_use?, DOUBT_AFTER)?;
        (self.told_doubt != Some(at)).then_some(at)
    }

    /// Checks often while the path in use is doubtful.
    fn doubt(&mut self, now: Instant) {
        let ends = self.in_use.filter(|_| !self.idle);
        let silent_since = ends.and_then(|ends| self.pairs.alive_until(ends, DOUBT_AFTER));
        let suspect = silent_since.is_some_and(|at| at <= now)
            && ends.is_some_and(|ends| !self.is_dead(now, ends));
        self.told_doubt = silent_since.filter(|at| *at <= now);
        if suspect != self.suspect {
            self.suspect = suspect;
            if !self.idle {
                self.apply(if suspect { &SUSPECT } else { &ACTIVE });
            }
        }
    }

    /// The candidate as it is signalled. A candidate that was withdrawn comes back with another
    /// related port: clients of today cannot withdraw the same one twice. The related address means
    /// nothing to them (data-path spec §2.3), but tells candidates apart.
    pub(super) fn line(&self, candidate: &Candidate) -> String {
        let line = candidate.to_sdp_string();
        let round = self.search.round;
        let related = match (round, candidate.addr()) {
            (0, _) => return line,
            (_, SocketAddr::V4(_)) => "raddr 0.0.0.0 rport",
            (_, SocketAddr::V6(_)) => "raddr :: rport",
        };
        match candidate.kind() {
            CandidateKind::Host => {
                line.replacen("typ host", &format!("typ host {related} {round}"), 1)
            }
            CandidateKind::ServerReflexive => {
                line.replacen(&format!("{related} 0"), &format!("{related} {round}"), 1)
            }
            _ => line,
        }
    }

    pub(super) fn search_at(&self) -> Option<Instant> {
        self.search.next.filter(|_| !self.idle)
    }

    /// The new path if it differs from the last one told.
    pub(in crate::connectivity) fn path_change(
        &mut self,
        now: Instant,
        channel_to: impl Fn(RelayId, SocketAddr) -> Option<ChannelPath>,
    ) -> Option<Option<Path>> {
        let preferred = self.preferred(now);
        let path = preferred.and_then(|(local, remote)| {
            let remote_relayed = self
                .agent
                .remote_candidates()
                .any(|c| c.addr() == remote && c.kind() == CandidateKind::Relayed);
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
        if preferred != self.nominated {
            self.leave(now);
        }
        self.told_dead = self
            .nominated
            .and_then(|ends| self.pairs.alive_until(ends, dead_after(self.idle)))
            .filter(|until| *until <= now);
        self.in_use = preferred;
        self.doubt(now);
        if path == self.path {
            return None;
        }
        // The first one is no change.
        self.path_changes += u64::from(self.path_since.is_some());
        self.path = path;
        self.path_since = Some(now);
        match path.map(|p| p.kind) {
            Some(PathKind::Direct) => self.found(now),
            Some(_) if self.search.direct_since.is_some() => self.search(now),
            _ => {}
        }
        Some(path)
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

    /// Tells the client that the address of a dead direct pair is gone, if it has another one of
    /// ours to talk to.
    fn leave(&mut self, now: Instant) {
        let Some(ends) = self.nominated else {
            return;
        };
        let (dead, _) = ends;
        // An address that was offered again has to have worked before it can fail.
        if self.search.offered > self.pairs.answered_at(ends) {
            return;
        }
        // Where the client's relay still reaches this very address, that way is cut off, too; so
        // there has to be one to another address.
        let has_another = self
            .pairs
            .alive(now, dead_after(self.idle))
            .any(|(ends, _)| ends.0 != dead && self.is_ours(ends.0));
        if self.relay_of(dead).is_some() || !has_another {
            return;
        }
        let gone: Vec<Candidate> = self
            .agent
            .local_candidates()
            .filter(|c| match c.kind() {
                CandidateKind::Host => c.addr() == dead,
                CandidateKind::ServerReflexive => self.reflexive.contains(&(c.addr(), dead)),
                _ => false,
            })
            .filter(|c| !self.search.withdrawn.contains(c))
            .collect();
        for candidate in gone {
            self.added.retain(|c| *c != candidate);
            self.invalidated.push(self.line(&candidate));
            self.search.withdrawn.push(candidate);
        }
    }

    fn search(&mut self, now: Instant) {
        let stable = self
            .search
            .direct_since
            .is_some_and(|since| now - since >= SEARCH_FORGET);
        let interval = match self.search.interval {
            Some(interval) if !stable => interval,
            _ => SEARCH_FIRST,
        };
        self.search.direct_since = None;
        self.search.interval = Some(interval);
        self.search.next = Some(now + interval);
    }

    fn found(&mut self, now: Instant) {
        self.search.next = None;
        self.search.direct_since = Some(now);
        self.search.withdrawn.clear();
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
        self.search.withdrawn.clear();
        self.search.offered = Some(now);
        self.search.round = self.search.round.wrapping_add(1);
        self.added = self
            .agent
            .local_candidates()
            .filter(|c| c.kind() != CandidateKind::Relayed)
            .collect();
        // The agent has pruned pairs of theirs that failed; those that live are left alone.
        let mut theirs: Vec<Candidate> = Vec::new();
        for candidate in self.agent.remote_candidates() {
            let direct = matches!(
                candidate.kind(),
                CandidateKind::Host | CandidateKind::ServerReflexive
            );
            if direct && !theirs.iter().any(|c| c.addr() == candidate.addr()) {
                theirs.push(candidate);
            }
        }
        for candidate in theirs {
            self.agent.add_remote_candidate(candidate);
        }
    }
}
