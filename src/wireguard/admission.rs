//! Who gets a handshake computed (WireGuard paper §5.4.4, §5.4.7; data-path spec §12 R1).
//!
//! An initiation costs curve operations, so it has to earn them:
//!
//! 1. Its first MAC shows that the sender knows our public key. Garbage ends here, after two hashes.
//! 2. Where a connectivity check was answered lately, an authorized client is at the other end: it
//!    has a budget of its own, which nobody else can use up.
//! 3. Anybody else is served from a small common budget, with a limit per source.
//! 4. Beyond that the sender must prove its address with a cookie; proven addresses have a budget
//!    apart, again with a limit per source. So a flood of forged addresses ends at 3, and one from
//!    real addresses meets its own limit.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use boringtun::x25519::PublicKey;

use super::SCRATCH;
use crate::ids::ClientId;

/// So many in a row, and one more each `every`.
#[derive(Debug, Clone, Copy)]
struct Budget {
    burst: u32,
    every: Duration,
}

/// Per client on a path that its checks vouch for. A client makes one handshake in two minutes,
/// and some more when its path changes.
const KNOWN: Budget = Budget {
    burst: 10,
    every: Duration::from_millis(500),
};
/// Everybody without a cookie together: 50/s.
const UNVERIFIED: Budget = Budget {
    burst: 100,
    every: Duration::from_millis(20),
};
/// One source without a cookie. Many clients may share an address.
const UNVERIFIED_SOURCE: Budget = Budget {
    burst: 20,
    every: Duration::from_millis(100),
};
/// Everybody with a cookie together: 200/s, about 2 % of a core.
const VERIFIED: Budget = Budget {
    burst: 400,
    every: Duration::from_millis(5),
};
/// One source with a cookie.
const VERIFIED_SOURCE: Budget = Budget {
    burst: 100,
    every: Duration::from_millis(20),
};
/// Cookie replies; smaller than what they answer, but not for free.
const REPLIES: Budget = Budget {
    burst: 200,
    every: Duration::from_millis(2),
};
/// Sources and clients that are remembered at once.
const REMEMBERED: usize = 4096;

/// A budget in use: the generic cell rate algorithm, which needs a single instant.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket(Option<Instant>);

impl Bucket {
    fn take(&mut self, now: Instant, budget: Budget) -> bool {
        let earliest = self.0.map_or(now, |at| at.max(now));
        if earliest - now > budget.every * (budget.burst - 1) {
            return false;
        }
        self.0 = Some(earliest + budget.every);
        true
    }

    fn is_full(&self, now: Instant) -> bool {
        self.0.is_none_or(|at| at <= now)
    }
}

/// A bucket per key, in bounded memory.
#[derive(Debug)]
struct Buckets<K> {
    buckets: HashMap<K, Bucket>,
    pruned: Option<Instant>,
}

impl<K: Eq + Hash> Buckets<K> {
    fn new() -> Self {
        Self {
            buckets: HashMap::new(),
            pruned: None,
        }
    }

    fn take(&mut self, now: Instant, key: K, budget: Budget) -> bool {
        if let Some(bucket) = self.buckets.get_mut(&key) {
            return bucket.take(now, budget);
        }
        if self.buckets.len() >= REMEMBERED {
            // A walk through all is for once in a while.
            let lately = self
                .pruned
                .is_some_and(|at| now - at < Duration::from_secs(1));
            if !lately {
                self.pruned = Some(now);
                self.buckets.retain(|_, bucket| !bucket.is_full(now));
            }
            if self.buckets.len() >= REMEMBERED {
                return false;
            }
        }
        self.buckets.entry(key).or_default().take(now, budget)
    }
}

/// What went by. Only ever grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AdmissionCounters {
    /// Initiations that were let through.
    pub admitted: u64,
    /// Messages that do not know our public key.
    pub bad_mac: u64,
    /// Initiations that were answered with a cookie.
    pub cookies: u64,
    /// Initiations over every limit.
    pub limited: u64,
    /// Handshake messages for which curve operations were done.
    pub computed: u64,
}

/// Why a message goes no further.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rejected {
    /// Not a WireGuard message.
    Invalid,
    /// Its first MAC is wrong.
    Mac,
    /// Over a limit; perhaps with a cookie to answer with.
    Limited(Option<Vec<u8>>),
}

pub(super) struct Admission {
    /// Checks first MACs only.
    open: RateLimiter,
    /// Asks everybody for a cookie.
    strict: RateLimiter,
    known: Buckets<ClientId>,
    unverified: Bucket,
    unverified_sources: Buckets<IpAddr>,
    verified: Bucket,
    verified_sources: Buckets<IpAddr>,
    replies: Bucket,
    pub(super) counters: AdmissionCounters,
}

impl Admission {
    pub(super) fn new(public: &PublicKey) -> Self {
        Self {
            open: RateLimiter::new(public, u64::MAX),
            strict: RateLimiter::new(public, 0),
            known: Buckets::new(),
            unverified: Bucket::default(),
            unverified_sources: Buckets::new(),
            verified: Bucket::default(),
            verified_sources: Buckets::new(),
            replies: Bucket::default(),
            counters: AdmissionCounters::default(),
        }
    }

    /// `owner` is the client whose checks were answered on the path that the message came over.
    pub(super) fn admit<'a>(
        &mut self,
        now: Instant,
        source: IpAddr,
        owner: Option<ClientId>,
        datagram: &'a [u8],
    ) -> Result<Packet<'a>, Rejected> {
        let mut unused = [0; SCRATCH];
        let packet = match self.open.verify_packet(Some(source), datagram, &mut unused) {
            Ok(packet) => packet,
            Err(TunnResult::Err(WireGuardError::InvalidMac)) => {
                self.counters.bad_mac += 1;
                return Err(Rejected::Mac);
            }
            Err(_) => return Err(Rejected::Invalid),
        };
        // Everything else belongs to a session, or ends at the lookup of its index.
        if !matches!(packet, Packet::HandshakeInit(_)) {
            return Ok(packet);
        }
        let site = site(source);
        let free = owner.is_some_and(|client| self.known.take(now, client, KNOWN))
            || (self.unverified_sources.take(now, site, UNVERIFIED_SOURCE)
                && self.unverified.take(now, UNVERIFIED));
        if free || self.proves_address(now, source, datagram)? {
            self.counters.admitted += 1;
            Ok(packet)
        } else {
            self.counters.limited += 1;
            Err(Rejected::Limited(None))
        }
    }

    /// Whether there is a good cookie and budget for it; asks for one if there is none.
    fn proves_address(
        &mut self,
        now: Instant,
        source: IpAddr,
        datagram: &[u8],
    ) -> Result<bool, Rejected> {
        let mut reply = [0; SCRATCH];
        match self
            .strict
            .verify_packet(Some(source), datagram, &mut reply)
        {
            Ok(_) => Ok(self
                .verified_sources
                .take(now, site(source), VERIFIED_SOURCE)
                && self.verified.take(now, VERIFIED)),
            Err(TunnResult::WriteToNetwork(reply)) if self.replies.take(now, REPLIES) => {
                self.counters.cookies += 1;
                Err(Rejected::Limited(Some(reply.to_vec())))
            }
            Err(_) => Ok(false),
        }
    }

    /// Sources remembered, for tests of memory.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.known.buckets.len()
            + self.unverified_sources.buckets.len()
            + self.verified_sources.buckets.len()
    }
}

/// Who is limited together: an IPv4 address, or the /64 that an IPv6 host may take any address of.
fn site(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(ip) => {
            let network = u128::from(ip) & (u128::MAX << 64);
            std::net::Ipv6Addr::from(network).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(1);

    #[test]
    fn a_budget_gives_its_burst_at_once_and_then_its_rate() {
        let budget = Budget {
            burst: 3,
            every: Duration::from_secs(1),
        };
        let start = Instant::now();
        let mut bucket = Bucket::default();
        for _ in 0..3 {
            assert!(bucket.take(start, budget));
        }
        assert!(!bucket.take(start, budget));
        assert!(!bucket.take(start + Duration::from_secs(1) - TICK, budget));
        assert!(bucket.take(start + Duration::from_secs(1), budget));
        assert!(!bucket.take(start + Duration::from_secs(1), budget));
        let later = start + Duration::from_secs(60);
        let given = (0..10).filter(|_| bucket.take(later, budget)).count();
        assert_eq!(given, 3, "what was not used is not saved up");
    }

    #[test]
    fn any_number_of_sources_takes_bounded_memory() {
        let budget = Budget {
            burst: 1,
            every: Duration::from_secs(10),
        };
        let start = Instant::now();
        let mut buckets = Buckets::new();
        for n in 0..100_000u32 {
            let taken = buckets.take(start, n, budget);
            assert_eq!(taken, (n as usize) < REMEMBERED, "{n}");
        }
        assert_eq!(buckets.buckets.len(), REMEMBERED);
        let later = start + Duration::from_secs(10);
        assert!(
            buckets.take(later, 100_000, budget),
            "others have their turn"
        );
        assert_eq!(buckets.buckets.len(), 1);
    }

    #[test]
    fn an_ipv6_host_cannot_multiply_itself() {
        let site = |text: &str| site(text.parse().expect("an address"));
        assert_eq!(site("2001:db8:1:2::1"), site("2001:db8:1:2:ffff::9"));
        assert_ne!(site("2001:db8:1:2::1"), site("2001:db8:1:3::1"));
        assert_eq!(site("::ffff:192.0.2.1"), site("192.0.2.1"));
        assert_ne!(site("192.0.2.1"), site("192.0.2.2"));
    }
}
