//! What the portal's clock says, so that a wrong one of ours is noticed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use tokio_tungstenite::tungstenite::http::HeaderMap;
use tokio_tungstenite::tungstenite::http::header::DATE;

/// The portal's clock as of its last answer (`Date`, RFC 9110 §6.6.1). Clones share it.
#[derive(Debug, Clone, Default)]
pub struct PortalClock(Arc<Mutex<Option<(SystemTime, Instant)>>>);

impl PortalClock {
    /// The portal answered; without a usable date nothing changes.
    pub(super) fn note(&self, headers: &HeaderMap, now: Instant) {
        let date = headers.get(DATE).and_then(|value| value.to_str().ok());
        if let Some(date) = date.and_then(|text| httpdate::parse_http_date(text).ok()) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((date, now));
        }
    }

    /// By how many seconds it is ahead of ours, which says `wall`; negative if it is behind. `None`
    /// before its first answer.
    pub fn ahead(&self, now: Instant, wall: SystemTime) -> Option<f64> {
        let (date, at) = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        let portal = date.checked_add(now.saturating_duration_since(at))?;
        Some(match portal.duration_since(wall) {
            Ok(ahead) => ahead.as_secs_f64(),
            Err(behind) => -behind.duration().as_secs_f64(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    #[test]
    fn the_difference_follows_our_clock_when_that_is_set() {
        let clock = PortalClock::default();
        let start = Instant::now();
        // As in the date below.
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(clock.ahead(start, wall), None);
        let mut headers = HeaderMap::new();
        clock.note(&headers, start);
        headers.insert(DATE, "yesterday".parse().unwrap());
        clock.note(&headers, start);
        assert_eq!(clock.ahead(start, wall), None, "no date so far");

        headers.insert(DATE, "Sun, 06 Nov 1994 08:49:37 GMT".parse().unwrap());
        clock.note(&headers, start);
        let minute = Duration::from_secs(60);
        assert_eq!(clock.ahead(start + minute, wall + minute), Some(0.0));
        assert_eq!(clock.ahead(start + minute, wall), Some(60.0));
        assert_eq!(clock.ahead(start, wall + minute), Some(-60.0));
    }
}
