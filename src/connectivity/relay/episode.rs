//! How long a relay was in use, and why that began and ended: what an operator needs to tell relay
//! churn from portal trouble.

use std::net::SocketAddr;
use std::time::Instant;

use super::RelayError;
use crate::ids::RelayId;

/// Why an episode with a relay began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EpisodeBegin {
    /// The portal named the relay.
    #[default]
    Offered,
    /// The portal gave the relay another address, other credentials or, after its restart, another
    /// id.
    Replaced,
    /// An allocation was had again after the last one was lost.
    Recovered,
}

impl EpisodeBegin {
    /// The value of `relay.begin.reason`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Offered => "offered",
            Self::Replaced => "replaced",
            Self::Recovered => "recovered",
        }
    }
}

/// An allocation from its beginning to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Episode {
    /// The relay.
    pub relay: RelayId,
    /// The socket that was talked to.
    pub server: Option<SocketAddr>,
    /// When the allocation was had.
    pub since: Instant,
    /// When it was gone.
    pub until: Instant,
    /// Why it began.
    pub begin: EpisodeBegin,
    /// Why it ended.
    pub end: RelayError,
    /// How often the portal withdrew the relay and changed its mind in time.
    pub flaps: u32,
}

/// The present episode of a relay, if there is one.
#[derive(Debug, Default)]
pub(super) struct Chronicle {
    open: Option<(Instant, Option<SocketAddr>)>,
    next: EpisodeBegin,
    flaps: u32,
    totals: Totals,
}

/// What happened in all episodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Totals {
    /// Allocations that were had.
    pub(super) allocations: u64,
    /// How often the portal withdrew the relay and changed its mind in time.
    pub(super) flaps: u64,
}

impl Chronicle {
    /// For what takes the place of relays with these totals.
    pub(super) fn of_successor(totals: Totals) -> Self {
        Self {
            next: EpisodeBegin::Replaced,
            totals,
            ..Self::default()
        }
    }

    pub(super) fn begin(&mut self, now: Instant, server: Option<SocketAddr>) {
        if self.open.is_none() {
            self.totals.allocations += 1;
            self.open = Some((now, server));
        }
    }

    pub(super) fn flap(&mut self) {
        self.flaps += 1;
        self.totals.flaps += 1;
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    pub(super) fn end(
        &mut self,
        now: Instant,
        relay: RelayId,
        cause: RelayError,
    ) -> Option<Episode> {
        let (since, server) = self.open.take()?;
        let begin = std::mem::replace(&mut self.next, EpisodeBegin::Recovered);
        Some(Episode {
            relay,
            server,
            since,
            until: now,
            begin,
            end: cause,
            flaps: std::mem::take(&mut self.flaps),
        })
    }
}
