//! What the host lacks, as a story: told in the log when it begins and when it ends, and recorded as
//! a span at its end.

use std::time::Instant;

use opentelemetry::KeyValue;
use opentelemetry::trace::{Status, Tracer};

use crate::admin::model::HostFinding;
use crate::telemetry::names;
use crate::telemetry::past::Past;

/// Findings that are not well at present, and since when.
#[derive(Debug, Default)]
pub(super) struct HostStory(Vec<(HostFinding, Instant)>);

/// Something that the host lacked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Lack {
    finding: HostFinding,
    since: Instant,
    until: Instant,
    mended: bool,
}

impl HostStory {
    /// The host was looked at. What is mended is returned; so is what is found differently, such as
    /// an error that was a warning.
    pub(super) fn note(&mut self, now: Instant, found: &[HostFinding]) -> Vec<Lack> {
        let is_lacking = |f: &&HostFinding| f.level != "ok";
        // The words may tell the time, or a number that moves.
        let is_same = |a: &HostFinding, b: &HostFinding| (&a.name, &a.level) == (&b.name, &b.level);
        let goes_on = |(old, _): &(HostFinding, Instant)| found.iter().any(|f| is_same(f, old));
        let (open, over) = std::mem::take(&mut self.0).into_iter().partition(goes_on);
        self.0 = open;
        for finding in found.iter().filter(is_lacking) {
            if !self.0.iter().any(|(old, _)| is_same(old, finding)) {
                tell(finding);
                self.0.push((finding.clone(), now));
            }
        }
        for (old, _) in &over {
            if !self.0.iter().any(|(new, _)| new.name == old.name) {
                tracing::info!(check = %old.name, "Mended on the host: {}", old.found);
            }
        }
        let still = |name: &str| self.0.iter().any(|(open, _)| open.name == name);
        lacks(now, over, |name| !still(name))
    }

    /// The gateway ends; what the host lacks then is told as well.
    pub(super) fn end(&mut self, now: Instant) -> Vec<Lack> {
        let open = std::mem::take(&mut self.0);
        lacks(now, open, |_| false)
    }
}

fn lacks(
    now: Instant,
    over: Vec<(HostFinding, Instant)>,
    is_mended: impl Fn(&str) -> bool,
) -> Vec<Lack> {
    over.into_iter()
        .map(|(finding, since)| Lack {
            mended: is_mended(&finding.name),
            finding,
            since,
            until: now,
        })
        .collect()
}

fn tell(finding: &HostFinding) {
    let fix = finding.fix.as_deref().unwrap_or("");
    match finding.level.as_str() {
        "error" => tracing::error!(check = %finding.name, fix, "{}", finding.found),
        _ => tracing::warn!(check = %finding.name, fix, "{}", finding.found),
    }
}

impl Lack {
    /// As a span.
    pub(super) fn record<T: Tracer>(self, tracer: &T, now: Instant) {
        let past = Past {
            name: names::span::HOST_LACK,
            since: self.since,
            until: self.until,
            attributes: vec![
                KeyValue::new(names::HOST_CHECK, self.finding.name),
                KeyValue::new(names::HOST_LEVEL, self.finding.level),
                KeyValue::new(names::HOST_MENDED, self.mended),
            ],
            events: Vec::new(),
            status: Status::error(self.finding.found),
        };
        past.record(tracer, now, None);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn finding(name: &str, level: &str, found: &str) -> HostFinding {
        HostFinding {
            name: name.to_owned(),
            level: level.to_owned(),
            found: found.to_owned(),
            fix: None,
        }
    }

    #[test]
    fn a_lack_is_told_once_it_is_mended_changed_or_the_gateway_ends() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let well = finding("forwarding_ipv4", "ok", "on");
        let off = finding("forwarding_ipv4", "error", "off");
        let unknown = finding("forwarding_ipv4", "warning", "unreadable");
        let slow = finding("udp_buffers", "warning", "small");
        let mut story = HostStory::default();
        let lack = |finding: &HostFinding, since, until, mended| Lack {
            finding: finding.clone(),
            since: at(since),
            until: at(until),
            mended,
        };

        assert_eq!(story.note(at(0), &[well.clone(), slow.clone()]), []);
        assert_eq!(story.note(at(5), &[off.clone(), slow.clone()]), []);
        assert_eq!(story.note(at(10), &[off.clone(), slow.clone()]), []);
        assert_eq!(
            story.note(at(15), &[unknown.clone(), slow.clone()]),
            [lack(&off, 5, 15, false)]
        );
        assert_eq!(
            story.note(at(20), &[well, slow.clone()]),
            [lack(&unknown, 15, 20, true)]
        );
        let slower = finding("udp_buffers", "warning", "smaller");
        assert_eq!(story.note(at(25), &[slower]), [], "only the words differ");
        assert_eq!(story.end(at(30)), [lack(&slow, 0, 30, false)]);
        assert_eq!(story.end(at(31)), []);
    }
}
