//! Log lines of libraries. Some of them warn of what a stranger's packet says (a STUN message with
//! an unusual attribute is enough) or a name server's, and so at a pace that others set.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata};
use tracing_subscriber::layer::{Context, Filter};

use super::EXPORTED_TARGET;
use crate::throttle::Throttle;

/// For each place in a library's source. Who asks for `debug` gets all of it.
const LINES: Throttle = Throttle::new(5, Duration::from_secs(60));

/// Targets that are given in our own source.
const OURS: [&str; 2] = [EXPORTED_TARGET, "flow_logs"];

/// How often what was held back is told of.
const TOLD_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Places {
    throttles: HashMap<Identifier, (&'static str, Throttle)>,
    told: Option<Instant>,
}

/// Holds repeated lines of libraries back. Clones share the count.
#[derive(Debug, Clone, Default)]
pub(super) struct Libraries(Arc<Mutex<Places>>);

impl Libraries {
    fn admits(&self, line: &'static Metadata<'static>, now: Instant) -> bool {
        if !concerns(line) {
            return true;
        }
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, throttle) = places
            .throttles
            .entry(line.callsite())
            .or_insert((line.target(), LINES));
        throttle.admit_silently(now)
    }

    /// What was held back and is to be told of now, by target. Most of the time nothing.
    pub(super) fn overdue(&self, now: Instant) -> Vec<(&'static str, NonZeroU64)> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lately = places
            .told
            .is_some_and(|told| now.saturating_duration_since(told) < TOLD_EVERY);
        if lately {
            return Vec::new();
        }
        let untold: Vec<_> = places
            .throttles
            .values_mut()
            .filter_map(|(target, throttle)| Some((*target, throttle.take()?)))
            .collect();
        if !untold.is_empty() {
            places.told = Some(now);
        }
        untold
    }
}

fn concerns(line: &Metadata<'_>) -> bool {
    let ours = OURS.iter().any(|own| {
        let rest = line.target().strip_prefix(own);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    });
    !ours && *line.level() <= Level::INFO
}

impl<S> Filter<S> for Libraries {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn callsite_enabled(&self, line: &'static Metadata<'static>) -> Interest {
        // The registry wants to be asked anew about an event that may be disabled later.
        if concerns(line) {
            Interest::sometimes()
        } else {
            Interest::always()
        }
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        self.admits(event.metadata(), Instant::now())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }
}
