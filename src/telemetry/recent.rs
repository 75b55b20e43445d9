//! The last log lines, for who has to tell afterwards what happened: the log itself may be rotated
//! away, or kept where nobody looks.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt as _, Targets, filter_fn};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::libraries::Libraries;

/// Lines that are kept.
const LINES: usize = 1000;
/// Bytes that are kept.
const BYTES: usize = 512 * 1024;
/// Bytes of one line.
const LINE: usize = 4096;

/// The last lines at INFO and above, whatever is written to the log. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Recent(Arc<Mutex<Lines>>);

#[derive(Debug, Default)]
struct Lines {
    lines: VecDeque<String>,
    bytes: usize,
    forgotten: u64,
}

impl Lines {
    fn push(&mut self, line: String) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.lines.len() > LINES || self.bytes > BYTES {
            let Some(oldest) = self.lines.pop_front() else {
                return;
            };
            self.bytes -= oldest.len();
            self.forgotten += 1;
        }
    }
}

impl Recent {
    /// Those that libraries repeat are held back here, too: they would push all others out.
    pub(super) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let wanted = Targets::new()
            .with_default(LevelFilter::INFO)
            // They are a record of their own, which would push out all else.
            .with_target("flow_logs", LevelFilter::OFF);
        // Spans are told of nowhere here, and need not be made for it.
        let events = filter_fn(|about| about.is_event()).with_max_level_hint(LevelFilter::INFO);
        self.clone()
            .with_filter(wanted.and(events).and(Libraries::default()))
    }

    /// All of it, oldest first.
    pub(super) fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::with_capacity(lines.bytes + 64);
        if lines.forgotten > 0 {
            // Writing to a string does not fail.
            let _ = writeln!(text, "({} older lines are not kept)", lines.forgotten);
        }
        text.extend(lines.lines.iter().map(String::as_str));
        text
    }
}

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let now = humantime::format_rfc3339_millis(SystemTime::now());
        let about = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let Fields { message, others } = fields;
        let mut line = format!(
            "{now} {:>5} {}: {message}{others}",
            about.level(),
            about.target()
        );
        if line.len() > LINE {
            line.truncate(line.floor_char_boundary(LINE));
            line.push_str(" ...");
        }
        // A line stays a line, whoever is quoted in it.
        let mut line = line.replace(char::is_control, " ");
        line.push('\n');
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(line);
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.others, " {}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_within_bounds() {
        let recent = Recent::default();
        let mut lines = recent.0.lock().unwrap_or_else(PoisonError::into_inner);
        for n in 0..LINES + 5 {
            lines.push(format!("{n}\n"));
        }
        assert_eq!((lines.lines.len(), lines.forgotten), (LINES, 5));
        for _ in 0..1000 {
            lines.push("x".repeat(LINE));
        }
        assert!(lines.bytes <= BYTES && lines.lines.len() == BYTES / LINE);
        drop(lines);
        assert!(
            recent
                .text()
                .starts_with("(1877 older lines are not kept)\n")
        );
    }
}
