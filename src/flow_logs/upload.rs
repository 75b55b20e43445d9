//! When to upload what, and what the server's answers mean (portal-channel spec §4.8, data-path
//! spec §8.1). Decides only; the clock is a parameter.
//!
//! Every authorization is served for itself, since each request carries one token: trouble with one
//! does not hold up the others. Trouble with the server as a whole does, so that an outage is not
//! met with one request per authorization.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use backoff::backoff::Backoff as _;
use backoff::exponential::ExponentialBackoff;
use rand::Rng as _;
use rand::rngs::StdRng;
use url::{Host, Url};

use super::spool::Id;
use crate::portal::dial::parse_retry_after;
use crate::portal::reconnect::{GivenTime, RETRY_AFTER_BOUNDS};

/// Records per request when the portal names no number (portal-channel spec §4.3).
pub const DEFAULT_BATCH: usize = 1_000;
/// Most records per request, whatever the portal says (portal-channel spec §4.8).
pub const MAX_BATCH: usize = 10_000;
/// Longest body of a request, in bytes.
pub const MAX_BODY: usize = 1 << 20;
/// Pause before the first round, so that what former runs left goes soon.
pub const FIRST_ROUND: Duration = Duration::from_secs(1);
/// Bounds of the time between rounds.
pub const INTERVAL_BOUNDS: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(24 * 3600));
/// Delay after the first failure.
pub const BACKOFF_INITIAL: Duration = Duration::from_secs(1);
/// Growth per failure.
pub const BACKOFF_MULTIPLIER: f64 = 2.0;
/// No delay is longer, before jitter.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// After so long a batch is left for later (portal-channel spec §4.8).
pub const BATCH_LIMIT: Duration = Duration::from_secs(300);
/// Jitter, as a share of the delay in both directions.
pub const JITTER: f64 = 0.25;
/// How long an authorization is left alone whose token was refused.
pub const REFUSED_PAUSE: Duration = Duration::from_secs(600);
/// How long, at least, a batch is left alone that is kept for later.
pub const LATER: Duration = Duration::from_secs(60);
/// Most redirects that are followed for one request (portal-channel spec §4.8).
pub const MAX_REDIRECTS: usize = 5;

/// What the portal says about uploads (portal-channel spec §4.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadConfig {
    /// Base of the address to post to.
    pub api_url: String,
    /// Time between rounds; zero turns uploads off.
    pub interval: Duration,
    /// Records per request; zero stands for [`DEFAULT_BATCH`].
    pub batch_size: u32,
}

/// Why an address cannot be posted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum UrlError {
    #[error("it is not a URL")]
    Invalid,
    #[error("it is not https")]
    NotHttps,
    #[error("it contains a user name or a password")]
    Credentials,
    #[error("its port is not 443")]
    Port,
    #[error("there were more than {MAX_REDIRECTS} redirects")]
    TooMany,
}

/// The address to post to. Plain HTTP is for the same host, and for portals that are themselves
/// reached without TLS.
pub(super) fn endpoint(api_url: &str, allow_plain: bool) -> Result<Url, UrlError> {
    let mut url = Url::parse(api_url).map_err(|_| UrlError::Invalid)?;
    let loopback = match url.host() {
        None => return Err(UrlError::Invalid),
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
    };
    match url.scheme() {
        "https" => {}
        "http" if allow_plain || loopback => {}
        _ => return Err(UrlError::NotHttps),
    }
    if has_credentials(&url) {
        return Err(UrlError::Credentials);
    }
    url.set_query(None);
    url.set_fragment(None);
    url.path_segments_mut()
        .map_err(|()| UrlError::Invalid)?
        .pop_if_empty()
        .extend(["ingestion", "flow_logs"]);
    Ok(url)
}

/// Where a redirect leads. The address is that of the server that sent it.
pub(super) fn redirect(from: &Url, location: &str) -> Result<Url, UrlError> {
    let url = from.join(location).map_err(|_| UrlError::Invalid)?;
    if url.scheme() != "https" {
        return Err(UrlError::NotHttps);
    }
    if url.port_or_known_default() != Some(443) {
        return Err(UrlError::Port);
    }
    if has_credentials(&url) {
        return Err(UrlError::Credentials);
    }
    Ok(url)
}

fn has_credentials(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

/// What the answer to a request means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// 2xx.
    Delivered,
    /// 413.
    TooLarge,
    /// 429, with the time to wait.
    Wait(Duration),
    /// 408 and 5xx, and no answer at all.
    Retry,
    /// 401, 403.
    Refused,
    /// 301, 302, 307, 308.
    Redirect,
    /// Everything else.
    Later,
}

impl Meaning {
    /// `retry_after` is the header's value, seconds or a date.
    pub(super) fn of(status: u16, retry_after: Option<&str>, now: SystemTime) -> Self {
        match status {
            200..=299 => Self::Delivered,
            301 | 302 | 307 | 308 => Self::Redirect,
            401 | 403 => Self::Refused,
            408 | 500..=599 => Self::Retry,
            413 => Self::TooLarge,
            429 => {
                // The lower bound also when it names nothing (portal-channel spec §4.8).
                let asked = retry_after
                    .and_then(|value| parse_retry_after(value, now))
                    .unwrap_or(RETRY_AFTER_BOUNDS.0);
                Self::Wait(asked.clamp(RETRY_AFTER_BOUNDS.0, RETRY_AFTER_BOUNDS.1))
            }
            _ => Self::Later,
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Post at most `limit` records of this authorization with numbers below `before`, and tell
    /// [`Schedule::answered`], or [`Schedule::empty`] when there is none.
    Send { id: Id, limit: usize, before: u64 },
    /// Nothing before this, or before something changes.
    Wait(Option<Instant>),
}

/// What becomes of the records of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// They are where they should be.
    Delete,
    /// The only record is too large for the server.
    Drop,
    /// They stay, which the server asked for.
    Keep,
    /// They stay, and something is wrong.
    Failed,
}

type Policy = ExponentialBackoff<GivenTime>;

fn policy(now: Instant, limit: Option<Duration>) -> Policy {
    ExponentialBackoff {
        current_interval: BACKOFF_INITIAL,
        initial_interval: BACKOFF_INITIAL,
        // Jitter is ours, so that tests can seed it.
        randomization_factor: 0.0,
        multiplier: BACKOFF_MULTIPLIER,
        max_interval: BACKOFF_MAX,
        start_time: now,
        max_elapsed_time: limit,
        clock: GivenTime(now),
    }
}

/// What an authorization's records went through. None is kept of those without trouble.
#[derive(Debug, Default)]
struct Progress {
    /// Comes on then, in this round or not.
    not_before: Option<Instant>,
    /// Records per request, after the server found a larger number too large.
    limit: Option<usize>,
    /// From the first failure of a batch to its success.
    policy: Option<Policy>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Active {
    interval: Duration,
    batch: usize,
}

/// Decides whose records are posted when.
#[derive(Debug)]
pub(super) struct Schedule {
    rng: StdRng,
    active: Option<Active>,
    round_at: Instant,
    /// Records with larger numbers are for the next round.
    before: u64,
    /// Still to come in this round.
    ready: VecDeque<Id>,
    progress: HashMap<Id, Progress>,
    /// Whether the last one had had trouble before.
    second_try: bool,
    /// Nobody comes on before this.
    gate: Option<Instant>,
    /// From the server's first failure to its next sensible answer.
    trouble: Option<Policy>,
}

impl Schedule {
    pub(super) fn new(now: Instant, rng: StdRng) -> Self {
        Self {
            rng,
            active: None,
            round_at: now,
            before: 0,
            ready: VecDeque::new(),
            progress: HashMap::new(),
            second_try: false,
            gate: None,
            trouble: None,
        }
    }

    /// Uploads go on, with these settings, or end. `is_new_server` when what is known of the server
    /// is of no use any more.
    pub(super) fn configure(
        &mut self,
        now: Instant,
        config: Option<&UploadConfig>,
        is_new_server: bool,
    ) {
        let active = config
            .filter(|config| !config.interval.is_zero())
            .map(|config| Active {
                interval: config.interval.clamp(INTERVAL_BOUNDS.0, INTERVAL_BOUNDS.1),
                batch: match config.batch_size {
                    0 => DEFAULT_BATCH,
                    size => usize::try_from(size).map_or(MAX_BATCH, |size| size.min(MAX_BATCH)),
                },
            });
        if is_new_server || active.is_none() {
            self.ready.clear();
            self.progress.clear();
            self.gate = None;
            self.trouble = None;
        }
        if let Some(active) = active {
            if is_new_server || self.active.is_none() {
                self.round_at = now + FIRST_ROUND;
            } else {
                self.round_at = self.round_at.min(now + active.interval);
            }
        }
        self.active = active;
    }

    /// `waiting` gives the number of the next record and all authorizations with records, in the
    /// order in which they should come on. It is asked when a round begins.
    pub(super) fn poll(&mut self, now: Instant, waiting: impl FnOnce() -> (u64, Vec<Id>)) -> Next {
        let Some(active) = self.active else {
            return Next::Wait(None);
        };
        if now >= self.round_at {
            self.round_at = now + active.interval;
            let (before, ids) = waiting();
            self.begin_round(before, ids);
        }
        if let Some(gate) = self.gate
            && now < gate
        {
            return Next::Wait(Some(gate));
        }
        let due = self
            .progress
            .iter()
            .filter_map(|(id, progress)| Some((progress.not_before?, id)))
            .min();
        let second_try = match due {
            Some((not_before, id)) if not_before <= now => Some(Id::clone(id)),
            _ => None,
        };
        // In turns: neither many with trouble nor many without hold up the others.
        self.second_try = second_try.is_some() && (self.ready.is_empty() || !self.second_try);
        let next = if self.second_try {
            second_try
        } else {
            self.ready.pop_front()
        };
        let Some(id) = next else {
            let due = due.map(|(not_before, _)| not_before);
            return Next::Wait(Some(
                due.map_or(self.round_at, |due| due.min(self.round_at)),
            ));
        };
        let mut limit = active.batch;
        if let Some(progress) = self.progress.get_mut(&id) {
            progress.not_before = None;
            limit = progress.limit.map_or(limit, |known| known.min(limit));
        }
        Next::Send {
            id,
            limit,
            before: self.before,
        }
    }

    fn begin_round(&mut self, before: u64, ids: Vec<Id>) {
        self.before = before;
        let present: HashSet<&Id> = ids.iter().collect();
        self.progress.retain(|id, _| present.contains(id));
        self.ready = ids
            .into_iter()
            .filter(|id| {
                // Those that wait for a moment of their own come on at that moment.
                self.progress
                    .get(id)
                    .is_none_or(|progress| progress.not_before.is_none())
            })
            .collect();
    }

    /// There was nothing to send.
    pub(super) fn empty(&mut self, id: &Id) {
        self.progress.remove(id);
    }

    /// The request with `sent` records of this authorization was answered.
    pub(super) fn answered(
        &mut self,
        now: Instant,
        id: &Id,
        sent: usize,
        meaning: Meaning,
    ) -> Verdict {
        let Some(active) = self.active else {
            // Turned off meanwhile.
            return match meaning {
                Meaning::Delivered => Verdict::Delete,
                _ => Verdict::Keep,
            };
        };
        let jitter = self.rng.random_range(1.0 - JITTER..=1.0 + JITTER);
        let later = now + active.interval.max(LATER);
        let progress = self.progress.entry(Id::clone(id)).or_default();
        if meaning != Meaning::Retry {
            self.trouble = None;
            self.gate = None;
        }
        match meaning {
            Meaning::Delivered => {
                progress.policy = None;
                self.ready.push_back(Id::clone(id));
                Verdict::Delete
            }
            Meaning::TooLarge => {
                self.ready.push_front(Id::clone(id));
                if sent > 1 {
                    progress.limit = Some(sent / 2);
                    Verdict::Keep
                } else {
                    // It was the reason; the others need not go one by one.
                    *progress = Progress::default();
                    Verdict::Drop
                }
            }
            Meaning::Wait(asked) => {
                self.gate = Some(now + asked);
                self.ready.push_front(Id::clone(id));
                // Waiting on request is not charged.
                if let Some(policy) = &mut progress.policy {
                    policy.start_time += asked;
                }
                Verdict::Keep
            }
            Meaning::Retry => {
                let own = progress
                    .policy
                    .get_or_insert_with(|| policy(now, Some(BATCH_LIMIT)));
                own.clock = GivenTime(now);
                if let Some(delay) = own.next_backoff() {
                    progress.not_before = Some(now + delay.mul_f64(jitter));
                } else {
                    progress.policy = None;
                    progress.not_before = Some(later);
                }
                let trouble = self.trouble.get_or_insert_with(|| policy(now, None));
                trouble.clock = GivenTime(now);
                let delay = trouble.next_backoff().unwrap_or(BACKOFF_MAX);
                self.gate = Some(now + delay.mul_f64(jitter));
                Verdict::Failed
            }
            Meaning::Refused => {
                progress.policy = None;
                progress.not_before = Some(now + REFUSED_PAUSE);
                Verdict::Failed
            }
            Meaning::Redirect | Meaning::Later => {
                progress.policy = None;
                progress.not_before = Some(later);
                Verdict::Failed
            }
        }
    }
}

#[cfg(test)]
#[path = "upload_tests.rs"]
mod tests;
