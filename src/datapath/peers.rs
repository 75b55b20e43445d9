//! What the slow path publishes to the workers: one slot per client, read without locks.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use boringtun::noise::Tunn;
use serde::{Deserialize, Serialize};

use super::counters::Counters;
use crate::access::ClientPolicy;
use crate::ids::ClientId;
use crate::packet::FlowHash;

/// Number of clients that can have a session at once.
pub const SLOTS: usize = 1 << 14;

/// Bits of the slot number within the 24-bit peer index that WireGuard messages carry; the bits
/// above count the slot's reuses, so that a late message for its former owner is not mistaken.
const SLOT_BITS: u32 = SLOTS.trailing_zeros();

/// Where data for a client goes: the nominated candidate pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// Local address to send from; `None` leaves it to the kernel (towards relays).
    pub source: Option<IpAddr>,
    /// The client's address, or our relay's when there is a channel.
    pub destination: SocketAddr,
    /// TURN channel to wrap datagrams in (RFC 8656 §12).
    pub channel: Option<u16>,
    /// Direct or relayed, by whom.
    pub kind: PathKind,
}

/// The four kinds of path (data-path spec §2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathKind {
    /// No relay in between.
    Direct,
    /// Through our relay.
    RelayLocal,
    /// Through the client's relay.
    RelayRemote,
    /// Through both.
    RelayBoth,
}

impl PathKind {
    /// Classifies a pair by which ends are relayed.
    pub fn of(local_relayed: bool, remote_relayed: bool) -> Self {
        match (local_relayed, remote_relayed) {
            (false, false) => Self::Direct,
            (true, false) => Self::RelayLocal,
            (false, true) => Self::RelayRemote,
            (true, true) => Self::RelayBoth,
        }
    }

    /// Whether a relay is in it, ours or the client's.
    pub fn is_relayed(self) -> bool {
        self != Self::Direct
    }

    /// The name used in status, spans and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::RelayLocal => "relay_local",
            Self::RelayRemote => "relay_remote",
            Self::RelayBoth => "relay_both",
        }
    }
}

/// Limits ICMP answers to denied packets, so that a client's port scan is not amplified.
#[derive(Debug, Default)]
pub struct ReplyBudget {
    /// When the present second began; `None` before the first answer.
    window: Option<Instant>,
    left: u32,
}

/// ICMP answers per second to one client, and to the site.
const REPLIES_PER_SECOND: u32 = 100;

impl ReplyBudget {
    /// Whether one more answer may be sent.
    pub fn take(&mut self, now: Instant) -> bool {
        let is_over = |begun: Instant| now.duration_since(begun).as_secs() >= 1;
        if self.window.is_none_or(is_over) {
            self.window = Some(now);
            self.left = REPLIES_PER_SECOND;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// One client as the workers see it.
pub struct Peer {
    /// The 24-bit index that the client's messages carry.
    pub index: u32,
    /// Who it is.
    pub client: ClientId,
    /// What passed, and what went nowhere, both ways.
    pub counters: Counters,
    replies: Mutex<ReplyBudget>,
    /// What [`PeerTable::set_addresses`] routes to it.
    addresses: Mutex<Vec<IpAddr>>,
    tunn: Mutex<Tunn>,
    path: ArcSwapOption<Path>,
    policy: ArcSwapOption<ClientPolicy>,
}

impl Peer {
    /// A peer without path or policy.
    pub fn new(index: u32, client: ClientId, tunn: Tunn) -> Self {
        Self {
            index,
            client,
            counters: Counters::new(),
            replies: Mutex::new(ReplyBudget::default()),
            addresses: Mutex::default(),
            tunn: Mutex::new(tunn),
            path: ArcSwapOption::empty(),
            policy: ArcSwapOption::empty(),
        }
    }

    /// The WireGuard session. Workers take it once per run of packets, the slow path for
    /// handshakes and timers.
    pub fn tunn(&self) -> MutexGuard<'_, Tunn> {
        // A panic while holding the lock would have been ours, not the session's: its state is
        // changed by the library alone, so it stays usable.
        self.tunn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the client may be sent one more ICMP answer. Only dropped packets come here.
    pub fn may_reply(&self, now: Instant) -> bool {
        let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        replies.take(now)
    }

    /// The nominated path, if any.
    pub fn path(&self) -> Option<Arc<Path>> {
        self.path.load_full()
    }

    /// Switches the path.
    pub fn set_path(&self, path: Option<Path>) {
        self.path.store(path.map(Arc::new));
    }

    /// What the client may reach.
    pub fn policy(&self) -> Option<Arc<ClientPolicy>> {
        self.policy.load_full()
    }

    /// Switches the policy; cached verdicts of the former one no longer match.
    pub fn set_policy(&self, policy: Option<Arc<ClientPolicy>>) {
        self.policy.store(policy);
    }
}

/// Parts of the map by address. A change copies one part, so that with thousands of clients it
/// stays cheap.
const SHARDS: usize = 256;

type Shard = ArcSwap<HashMap<IpAddr, Arc<Peer>, FlowHash>>;

/// The part that an address is in. The portal gives addresses away one after the other.
fn shard_of(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(a) => a.to_bits() as usize % SHARDS,
        IpAddr::V6(a) => a.to_bits() as usize % SHARDS,
    }
}

/// All clients, for lookup by session index and by tunnel address.
pub struct PeerTable {
    slots: Box<[ArcSwapOption<Peer>]>,
    by_address: Box<[Shard]>,
    relays: ArcSwap<Vec<SocketAddr>>,
}

impl PeerTable {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| ArcSwapOption::empty()).collect(),
            by_address: (0..SHARDS).map(|_| Shard::default()).collect(),
            relays: ArcSwap::default(),
        }
    }

    /// The peer whose messages carry this receiver index (the 24-bit peer index above the 8-bit
    /// session counter).
    pub fn by_receiver_index(&self, receiver: u32) -> Option<Arc<Peer>> {
        let index = receiver >> 8;
        let peer = self.slots[(index as usize) & (SLOTS - 1)].load_full()?;
        (peer.index == index).then_some(peer)
    }

    /// The peer with this tunnel address.
    pub fn by_address(&self, address: IpAddr) -> Option<Arc<Peer>> {
        let shard = self.by_address[shard_of(address)].load();
        shard.get(&address).cloned()
    }

    /// Publishes a peer in the slot of its index.
    pub fn insert(&self, peer: Arc<Peer>) {
        self.slots[(peer.index as usize) & (SLOTS - 1)].store(Some(peer));
    }

    /// Withdraws a peer and its addresses.
    pub fn remove(&self, peer: &Arc<Peer>) {
        let slot = &self.slots[(peer.index as usize) & (SLOTS - 1)];
        if slot.load().as_ref().is_some_and(|p| Arc::ptr_eq(p, peer)) {
            slot.store(None);
        }
        self.set_addresses(peer, &[]);
    }

    /// Routes tunnel addresses to a peer, replacing what it or another had there.
    pub fn set_addresses(&self, peer: &Arc<Peer>, addresses: &[IpAddr]) {
        let mut held = peer
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for former in held.iter().filter(|former| !addresses.contains(former)) {
            self.change(*former, |map| {
                // Somebody else may have been given it since.
                if map.get(former).is_some_and(|p| Arc::ptr_eq(p, peer)) {
                    map.remove(former);
                }
            });
        }
        for &address in addresses {
            let is_there = self
                .by_address(address)
                .is_some_and(|p| Arc::ptr_eq(&p, peer));
            if !is_there {
                self.change(address, |map| {
                    map.insert(address, Arc::clone(peer));
                });
            }
        }
        *held = addresses.to_vec();
    }

    fn change(&self, address: IpAddr, change: impl Fn(&mut HashMap<IpAddr, Arc<Peer>, FlowHash>)) {
        self.by_address[shard_of(address)].rcu(|map| {
            let mut map = HashMap::clone(map);
            change(&mut map);
            map
        });
    }

    /// Sockets of the relays in use; only from those is channel data unwrapped.
    pub fn set_relays(&self, relays: Vec<SocketAddr>) {
        self.relays.store(Arc::new(relays));
    }

    /// See [`Self::set_relays`].
    pub fn relays(&self) -> Arc<Vec<SocketAddr>> {
        self.relays.load_full()
    }
}

impl Default for PeerTable {
    fn default() -> Self {
        Self::new()
    }
}

/// Hands out 24-bit peer indices: slot number below, a count of the slot's reuses above.
#[derive(Debug)]
pub struct IndexPool {
    free: VecDeque<u32>,
    next: u32,
}

impl IndexPool {
    /// A pool with every slot free; `seed` makes indices differ between process starts.
    pub fn new(seed: u32) -> Self {
        Self {
            free: VecDeque::new(),
            next: (seed << SLOT_BITS) & 0x00ff_ffff,
        }
    }

    /// An index that no live peer has, or `None` when every slot is taken.
    pub fn take(&mut self) -> Option<u32> {
        let fresh = (self.next as usize & (SLOTS - 1)) < SLOTS - 1;
        if fresh {
            let index = self.next;
            self.next += 1;
            return Some(index);
        }
        // Oldest first, so that an index rests as long as possible before it comes back.
        self.free.pop_front()
    }

    /// Gives an index back; it comes out again with another reuse count.
    pub fn give(&mut self, index: u32) {
        self.free
            .push_back((index + (1 << SLOT_BITS)) & 0x00ff_ffff);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;
    use std::time::Duration;

    use super::*;

    #[test]
    fn indices_are_unique_and_fit_24_bits() {
        let mut pool = IndexPool::new(u32::MAX);
        let mut seen = HashSet::new();
        while let Some(index) = pool.take() {
            assert!(index < 1 << 24);
            assert!(seen.insert(index & (SLOTS as u32 - 1)), "slot twice");
        }
        assert_eq!(seen.len(), SLOTS - 1);
        let some = *seen.iter().next().unwrap();
        pool.give(some);
        let again = pool.take().unwrap();
        assert_eq!(again & (SLOTS as u32 - 1), some & (SLOTS as u32 - 1));
        assert_ne!(again, some, "a reused slot gets another index");
        assert!(pool.take().is_none());
    }

    #[test]
    fn answers_are_limited_per_second() {
        let now = Instant::now();
        let mut budget = ReplyBudget::default();
        let sent = (0..1000).filter(|_| budget.take(now)).count();
        assert_eq!(sent, REPLIES_PER_SECOND as usize);
        assert!(budget.take(now + Duration::from_secs(1)));
    }

    fn peer(index: u32) -> Arc<Peer> {
        let secret = |n: u8| boringtun::x25519::StaticSecret::from([n; 32]);
        let public = boringtun::x25519::PublicKey::from(&secret(9));
        let tunn = Tunn::new(secret(1), public, None, None, index, None);
        let client = ClientId(uuid::Uuid::from_u128(u128::from(index)));
        Arc::new(Peer::new(index, client, tunn))
    }

    #[test]
    fn addresses_lead_to_the_peer_that_was_given_them_last() {
        let table = PeerTable::new();
        let (a, b) = (peer(1), peer(2));
        let addresses: Vec<IpAddr> = ["100.64.0.1", "100.64.1.1", "fd00:2021:1111::1"]
            .iter()
            .map(|a| a.parse().unwrap())
            .collect();
        let holder = |n: usize| table.by_address(addresses[n]).map(|p| p.index);
        table.set_addresses(&a, &addresses[..2]);
        assert_eq!((holder(0), holder(1), holder(2)), (Some(1), Some(1), None));
        table.set_addresses(&b, &addresses[1..]);
        assert_eq!(
            (holder(0), holder(1), holder(2)),
            (Some(1), Some(2), Some(2))
        );
        // What it lost to another is not its to give up.
        table.set_addresses(&a, &[]);
        assert_eq!((holder(0), holder(1)), (None, Some(2)));
        table.remove(&b);
        assert_eq!((holder(1), holder(2)), (None, None));
    }
}
