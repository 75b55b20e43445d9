//! Channel bindings of one allocation (RFC 8656 §12, data-path spec §3.4).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::channel_data::CHANNEL_NUMBERS;
use super::constants::{
    CHANNEL_LIFETIME, CHANNEL_REFRESH, CHANNEL_RETRY_FIRST, CHANNEL_RETRY_MAX, CHANNEL_REUSE,
    REFRESH_RETRY,
};

#[derive(Debug)]
struct Channel {
    peer: SocketAddr,
    /// When the server last confirmed the binding.
    confirmed_at: Option<Instant>,
    /// When it was last asked to; the server may have bound the channel even if its answer got
    /// lost, so re-use of the number counts from here.
    requested_at: Instant,
    /// Whether a CHANNEL-BIND is in flight.
    pending: bool,
    /// Whether anything was sent or received since the last confirmation.
    used: bool,
    /// The one entry of this channel in the table's deadlines.
    deadline: Instant,
}

impl Channel {
    fn is_bound(&self, now: Instant) -> bool {
        self.confirmed_at
            .is_some_and(|at| now < at + CHANNEL_LIFETIME)
    }
}

/// The channels of one allocation.
#[derive(Debug)]
pub(super) struct ChannelTable {
    by_number: HashMap<u16, Channel>,
    by_peer: HashMap<SocketAddr, u16>,
    /// Numbers that were given up, with the time from which they may be used again.
    cooling: BTreeMap<u16, Instant>,
    /// Peers to whom no channel was had lately: when to ask again, and the pause before that.
    refused: HashMap<SocketAddr, (Instant, Duration)>,
    deadlines: BTreeSet<(Instant, u16)>,
    next: u16,
}

impl Default for ChannelTable {
    fn default() -> Self {
        Self {
            by_number: HashMap::new(),
            by_peer: HashMap::new(),
            cooling: BTreeMap::new(),
            refused: HashMap::new(),
            deadlines: BTreeSet::new(),
            next: *CHANNEL_NUMBERS.start(),
        }
    }
}

impl ChannelTable {
    /// The number for which a CHANNEL-BIND must be sent to reach `peer`.
    ///
    /// `None` when the binding exists or is under way, was refused just now, or when every number is
    /// taken.
    pub(super) fn bind(&mut self, now: Instant, peer: SocketAddr) -> Option<u16> {
        if self
            .refused
            .get(&peer)
            .is_some_and(|(until, _)| now < *until)
        {
            return None;
        }
        if let Some(&number) = self.by_peer.get(&peer) {
            let channel = self.by_number.get_mut(&number)?;
            if channel.pending || channel.is_bound(now) {
                return None;
            }
            channel.pending = true;
            channel.requested_at = now;
            channel.confirmed_at = None;
            self.schedule(number, now + CHANNEL_REUSE);
            return Some(number);
        }
        let number = self.free_number(now)?;
        let deadline = now + CHANNEL_REUSE;
        let channel = Channel {
            peer,
            confirmed_at: None,
            requested_at: now,
            pending: true,
            used: false,
            deadline,
        };
        self.by_number.insert(number, channel);
        self.by_peer.insert(peer, number);
        self.deadlines.insert((deadline, number));
        Some(number)
    }

    fn free_number(&mut self, now: Instant) -> Option<u16> {
        self.cooling.retain(|_, until| now < *until);
        if self.by_number.len() + self.cooling.len() >= CHANNEL_NUMBERS.len() {
            return None;
        }
        for _ in CHANNEL_NUMBERS {
            let number = self.next;
            self.next = if number >= *CHANNEL_NUMBERS.end() {
                *CHANNEL_NUMBERS.start()
            } else {
                number + 1
            };
            if !self.by_number.contains_key(&number) && !self.cooling.contains_key(&number) {
                return Some(number);
            }
        }
        None
    }

    fn schedule(&mut self, number: u16, at: Instant) {
        if let Some(channel) = self.by_number.get_mut(&number) {
            self.deadlines.remove(&(channel.deadline, number));
            channel.deadline = at;
            self.deadlines.insert((at, number));
        }
    }

    /// The server confirmed a binding.
    pub(super) fn confirmed(&mut self, now: Instant, number: u16) {
        if let Some(channel) = self.by_number.get_mut(&number) {
            channel.confirmed_at = Some(now);
            channel.pending = false;
            channel.used = false;
            self.refused.remove(&channel.peer);
            self.schedule(number, now + CHANNEL_REFRESH);
        }
    }

    /// The server did not answer although it is alive. It may have bound the channel all the same,
    /// and would refuse another number for this peer, so the number stays with the peer.
    pub(super) fn unanswered(&mut self, now: Instant, number: u16) {
        let Some(channel) = self.by_number.get_mut(&number) else {
            return;
        };
        channel.pending = false;
        if channel.is_bound(now) {
            self.schedule(number, now + REFRESH_RETRY);
        } else {
            let (peer, reusable) = (channel.peer, channel.requested_at + CHANNEL_REUSE);
            self.schedule(number, reusable);
            self.pause(now, peer);
        }
    }

    /// The server refused a binding. One that it confirmed before lasts until its end all the same
    /// (RFC 8656 §12: only time ends it), and a refusal like 508 may be over soon.
    pub(super) fn failed(&mut self, now: Instant, number: u16) {
        let Some(channel) = self.by_number.get_mut(&number) else {
            return;
        };
        channel.pending = false;
        if channel.is_bound(now) {
            self.schedule(number, now + REFRESH_RETRY);
            return;
        }
        let peer = channel.peer;
        self.forget(number);
        self.pause(now, peer);
    }

    /// Whoever wants to reach the peer asks again and again; the server is to be asked less often.
    fn pause(&mut self, now: Instant, peer: SocketAddr) {
        self.refused
            .retain(|_, (until, _)| now < *until + CHANNEL_RETRY_MAX);
        let pause = match self.refused.get(&peer) {
            Some((_, last)) => (*last * 2).min(CHANNEL_RETRY_MAX),
            None => CHANNEL_RETRY_FIRST,
        };
        self.refused.insert(peer, (now + pause, pause));
    }

    fn forget(&mut self, number: u16) {
        if let Some(channel) = self.by_number.remove(&number) {
            self.by_peer.remove(&channel.peer);
            self.deadlines.remove(&(channel.deadline, number));
            self.cooling
                .insert(number, channel.requested_at + CHANNEL_REUSE);
        }
    }

    /// The number over which `peer` can be reached, confirmed or not yet.
    pub(super) fn to(&self, now: Instant, peer: SocketAddr) -> Option<u16> {
        let number = *self.by_peer.get(&peer)?;
        let channel = self.by_number.get(&number)?;
        let optimistic = channel.pending && channel.confirmed_at.is_none();
        (optimistic || channel.is_bound(now)).then_some(number)
    }

    /// The peer behind a number on which data arrived; notes the use.
    ///
    /// The server sends on a channel only once it is bound, so data may overtake the confirmation.
    pub(super) fn received(&mut self, now: Instant, number: u16) -> Option<SocketAddr> {
        let peer = self.by_number.get(&number)?.peer;
        self.note_use(now, number);
        Some(peer)
    }

    /// Notes that data was sent to or received from a peer outside of this table.
    pub(super) fn note_use_of_peer(&mut self, now: Instant, peer: SocketAddr) {
        if let Some(&number) = self.by_peer.get(&peer) {
            self.note_use(now, number);
        }
    }

    fn note_use(&mut self, now: Instant, number: u16) {
        let Some(channel) = self.by_number.get_mut(&number) else {
            return;
        };
        if channel.used {
            return;
        }
        channel.used = true;
        // Idle at the time of its refresh, in use again since.
        let overdue = channel
            .confirmed_at
            .is_some_and(|at| now >= at + CHANNEL_REFRESH);
        if overdue && !channel.pending && channel.is_bound(now) {
            self.schedule(number, now);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Handles one due deadline. `Some(Some(_))` names a channel that must be bound anew, `Some(None)`
    /// means only book-keeping was due; call until `None`.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Option<(u16, SocketAddr)>> {
        let &(_, number) = self.deadlines.first().filter(|(at, _)| *at <= now)?;
        let Some(channel) = self.by_number.get_mut(&number) else {
            self.deadlines.pop_first();
            return Some(None);
        };
        if channel.pending {
            // Its transaction ends sooner or later, and with it the wait.
            self.schedule(number, now + CHANNEL_REFRESH);
            return Some(None);
        }
        if channel.is_bound(now) {
            if channel.used {
                channel.pending = true;
                channel.requested_at = now;
                let peer = channel.peer;
                self.schedule(number, now + CHANNEL_REUSE);
                return Some(Some((number, peer)));
            }
            let end = channel.confirmed_at.unwrap_or(channel.requested_at) + CHANNEL_LIFETIME;
            self.schedule(number, end);
            return Some(None);
        }
        let reusable = channel.confirmed_at.unwrap_or(channel.requested_at) + CHANNEL_REUSE;
        if now < reusable {
            // The same peer may still have its number back.
            self.schedule(number, reusable);
        } else {
            self.forget(number);
        }
        Some(None)
    }

    /// Channels that carry data or are about to.
    pub(super) fn bound(&self, now: Instant) -> usize {
        self.by_number.values().filter(|c| c.is_bound(now)).count()
    }

    /// The allocation is gone and its channels with it; returns the peers they led to.
    pub(super) fn clear(&mut self, now: Instant) -> Vec<SocketAddr> {
        let mut live: Vec<(u16, SocketAddr)> = self
            .by_number
            .iter()
            .filter(|(_, channel)| channel.pending || channel.is_bound(now))
            .map(|(number, channel)| (*number, channel.peer))
            .collect();
        live.sort_unstable();
        self.by_number.clear();
        self.by_peer.clear();
        self.deadlines.clear();
        // Numbers of the old allocation mean nothing to a new one, but late packets might: go on
        // counting instead of starting over.
        self.cooling.clear();
        self.refused.clear();
        live.into_iter().map(|(_, peer)| peer).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    fn peer(n: u16) -> SocketAddr {
        SocketAddr::from(([198, 51, 100, 7], n))
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Runs all deadlines up to `until`; answers what must be bound anew.
    fn run(table: &mut ChannelTable, until: Instant) -> Vec<u16> {
        let mut rebinds = Vec::new();
        while let Some(at) = table.next_deadline().filter(|at| *at <= until) {
            while let Some(due) = table.pop_due(at) {
                rebinds.extend(due.map(|(number, _)| number));
            }
        }
        rebinds
    }

    #[test]
    fn binding_twice_asks_once() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        assert_eq!(table.bind(now, peer(1)), Some(0x4000));
        assert_eq!(table.bind(now, peer(1)), None);
        assert_eq!(table.to(now, peer(1)), Some(0x4000), "optimistic");
        table.confirmed(now, 0x4000);
        assert_eq!(table.bind(now + secs(599), peer(1)), None);
        assert_eq!(table.to(now + secs(599), peer(1)), Some(0x4000));
        assert_eq!(table.to(now + secs(600), peer(1)), None);
    }

    #[test]
    fn channel_in_use_is_refreshed_before_its_permission_ends() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        table.bind(now, peer(1));
        table.confirmed(now, 0x4000);
        assert_eq!(table.received(now + secs(10), 0x4000), Some(peer(1)));
        assert!(run(&mut table, now + secs(239)).is_empty());
        assert_eq!(run(&mut table, now + secs(240)), [0x4000]);
        table.confirmed(now + secs(240), 0x4000);
        assert_eq!(table.to(now + secs(839), peer(1)), Some(0x4000));
        assert!(
            run(&mut table, now + secs(839)).is_empty(),
            "not used since"
        );
    }

    #[test]
    fn channel_used_again_after_a_quiet_while_is_refreshed_at_once() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        table.bind(now, peer(1));
        table.confirmed(now, 0x4000);
        assert!(run(&mut table, now + secs(400)).is_empty());
        table.note_use_of_peer(now + secs(400), peer(1));
        assert_eq!(run(&mut table, now + secs(400)), [0x4000]);
    }

    #[test]
    fn number_serves_another_peer_only_after_fifteen_minutes() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        for n in 0..4096 {
            assert!(table.bind(now, peer(n)).is_some());
        }
        for number in CHANNEL_NUMBERS {
            table.confirmed(now, number);
        }
        assert_eq!(table.bind(now, peer(5000)), None, "all taken");
        run(&mut table, now + secs(899));
        assert_eq!(table.bind(now + secs(899), peer(5000)), None);
        run(&mut table, now + secs(900));
        assert!(table.bind(now + secs(900), peer(5000)).is_some());
    }

    #[test]
    fn same_peer_gets_its_old_number_back() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        table.bind(now, peer(1));
        table.confirmed(now, 0x4000);
        run(&mut table, now + secs(700));
        assert_eq!(table.bind(now + secs(700), peer(1)), Some(0x4000));
    }

    #[test]
    fn refused_number_is_not_handed_out_again_soon() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        assert_eq!(table.bind(now, peer(1)), Some(0x4000));
        table.failed(now, 0x4000);
        assert_eq!(table.to(now, peer(1)), None);
        assert_eq!(table.bind(now, peer(2)), Some(0x4001));
        assert_eq!(table.bind(now + secs(1), peer(1)), Some(0x4002));
    }

    #[test]
    fn refused_peer_is_asked_for_again_after_growing_pauses() {
        let start = Instant::now();
        let mut table = ChannelTable::default();
        let mut now = start;
        let mut asked = Vec::new();
        while now < start + secs(400) {
            if let Some(number) = table.bind(now, peer(1)) {
                asked.push((now - start).as_secs());
                table.failed(now, number);
            }
            now += secs(1);
        }
        assert_eq!(asked, [0, 1, 3, 7, 15, 31, 63, 127, 207, 287, 367]);
        let number = table.bind(start + secs(447), peer(1)).unwrap();
        table.confirmed(start + secs(447), number);
        assert_eq!(table.to(start + secs(448), peer(1)), Some(number));
        assert!(table.refused.is_empty());
    }

    #[test]
    fn refused_refresh_is_repeated_under_its_number_while_the_binding_lives() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        table.bind(now, peer(1));
        table.confirmed(now, 0x4000);
        table.received(now, 0x4000);
        assert_eq!(run(&mut table, now + secs(240)), [0x4000]);
        table.failed(now + secs(241), 0x4000);
        assert_eq!(table.to(now + secs(241), peer(1)), Some(0x4000));
        assert_eq!(run(&mut table, now + secs(256)), [0x4000]);
        for n in (256..600).step_by(15) {
            table.failed(now + secs(n), 0x4000);
            assert_eq!(table.to(now + secs(n), peer(1)), Some(0x4000));
            run(&mut table, now + secs(n + 15));
        }
        assert_eq!(table.to(now + secs(600), peer(1)), None, "it is over");
    }

    #[test]
    fn unanswered_binding_keeps_its_number_for_the_peer() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        table.bind(now, peer(1));
        table.unanswered(now + secs(8), 0x4000);
        assert_eq!(table.to(now + secs(8), peer(1)), None);
        assert_eq!(table.bind(now + secs(8), peer(1)), None, "a pause first");
        assert_eq!(table.bind(now + secs(9), peer(1)), Some(0x4000));
    }

    #[test]
    fn unanswered_refresh_is_repeated_while_the_binding_lives() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        table.bind(now, peer(1));
        table.confirmed(now, 0x4000);
        table.received(now, 0x4000);
        assert_eq!(run(&mut table, now + secs(240)), [0x4000]);
        table.unanswered(now + secs(248), 0x4000);
        assert_eq!(table.to(now + secs(248), peer(1)), Some(0x4000));
        assert_eq!(run(&mut table, now + secs(263)), [0x4000]);
    }

    #[test]
    fn data_on_unknown_numbers_has_no_peer() {
        let mut table = ChannelTable::default();
        assert_eq!(table.received(Instant::now(), 0x4000), None);
    }

    #[test]
    fn losing_the_allocation_names_the_live_peers_in_order() {
        let now = Instant::now();
        let mut table = ChannelTable::default();
        for n in 1..=3 {
            table.bind(now, peer(n));
        }
        table.confirmed(now, 0x4000);
        table.failed(now, 0x4001);
        assert_eq!(table.clear(now), [peer(1), peer(3)]);
        assert_eq!(table.next_deadline(), None);
        assert_eq!(table.bind(now, peer(9)), Some(0x4003), "keeps counting");
    }
}
