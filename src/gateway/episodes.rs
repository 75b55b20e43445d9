//! Allocations at relays that are over, for the status.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use super::core::unix_seconds;
use crate::admin::model::RelayEpisode;
use crate::connectivity::relay::episode::Episode;

/// The time that churn is told of.
const HOUR: Duration = Duration::from_secs(3600);
/// Most episodes told.
const MAX: usize = 20;
/// Most ends that are counted. Where there are more in an hour, more would not tell more.
const MAX_ENDS: usize = 1000;

/// The last allocations that ended, and how many did in the last hour.
#[derive(Debug, Default)]
pub struct Episodes {
    last: VecDeque<Episode>,
    ends: VecDeque<Instant>,
}

impl Episodes {
    pub(super) fn note(&mut self, episode: &Episode) {
        if self.last.len() == MAX {
            self.last.pop_front();
        }
        self.last.push_back(episode.clone());
        if self.ends.len() == MAX_ENDS {
            self.ends.pop_front();
        }
        self.ends.push_back(episode.until);
    }

    /// How many ended in the last hour.
    pub fn churn(&self, now: Instant) -> u64 {
        let lately = |end: &&Instant| now.saturating_duration_since(**end) < HOUR;
        self.ends.iter().rev().take_while(lately).count() as u64
    }

    /// The last ones, oldest first. `now` and `wall` are one reading of both clocks.
    pub fn status(&self, now: Instant, wall: SystemTime) -> Vec<RelayEpisode> {
        let unix = |at: Instant| unix_seconds(wall - now.saturating_duration_since(at));
        self.last
            .iter()
            .map(|episode| RelayEpisode {
                relay: episode.relay.to_string(),
                server: episode.server,
                began: unix(episode.since),
                ended: unix(episode.until),
                begin: episode.begin.as_str().to_owned(),
                end: episode.end.to_string(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::connectivity::relay::RelayError;
    use crate::connectivity::relay::episode::EpisodeBegin;
    use crate::ids::RelayId;

    #[test]
    fn episodes_of_the_last_hour_are_counted_and_the_last_ones_told() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let mut episodes = Episodes::default();
        assert_eq!(episodes.churn(start), 0);
        for n in 0..60 {
            episodes.note(&Episode {
                relay: RelayId(Uuid::from_u128(n)),
                server: None,
                since: start,
                until: at(60 * n as u64),
                begin: EpisodeBegin::Offered,
                end: RelayError::NoResponse,
                flaps: 0,
            });
        }
        assert_eq!(episodes.churn(at(60 * 59)), 60);
        assert_eq!(episodes.churn(at(60 * 60)), 59);
        assert_eq!(episodes.churn(at(3 * 3600)), 0);
        let told = episodes.status(at(3600), wall);
        assert_eq!(told.len(), MAX);
        let last = &told[19];
        assert_eq!((last.began, last.ended), (1_799_996_400.0, 1_799_999_940.0));
        assert_eq!(last.relay, Uuid::from_u128(59).to_string());
        assert_eq!(last.begin, "offered");
        assert_eq!(last.end, RelayError::NoResponse.to_string());
    }

    #[test]
    fn relays_that_flap_without_end_take_no_more_room() {
        let now = Instant::now();
        let mut episodes = Episodes::default();
        for n in 0..5000 {
            episodes.note(&Episode {
                relay: RelayId(Uuid::from_u128(n)),
                server: None,
                since: now,
                until: now,
                begin: EpisodeBegin::Recovered,
                end: RelayError::NoResponse,
                flaps: 0,
            });
        }
        assert_eq!(episodes.churn(now), MAX_ENDS as u64);
        assert_eq!(episodes.status(now, SystemTime::now()).len(), MAX);
    }
}
