#![allow(clippy::unwrap_used)]

use rand::SeedableRng as _;

use super::*;
use crate::flow_logs::fixtures::{NOW, at};

const SECOND: Duration = Duration::from_secs(1);

fn config(interval: u64, batch_size: u32) -> UploadConfig {
    UploadConfig {
        api_url: "https://logs.example.net/".to_owned(),
        interval: Duration::from_secs(interval),
        batch_size,
    }
}

/// A schedule with a clock that stands where it is put and a spool that is a list of numbers.
struct Rig {
    schedule: Schedule,
    start: Instant,
    now: Instant,
    /// Records left per authorization; all below `before`.
    records: Vec<(Id, usize)>,
}

/// A request: seconds since the start, authorization, number of records.
type Sent = (f64, String, usize);

impl Rig {
    fn new(config: &UploadConfig, records: &[(&str, usize)]) -> Self {
        let now = Instant::now();
        let mut schedule = Schedule::new(now, StdRng::seed_from_u64(7));
        schedule.configure(now, Some(config), true);
        let records = records
            .iter()
            .map(|(id, count)| (Id::from(*id), *count))
            .collect();
        Self {
            schedule,
            start: now,
            now,
            records,
        }
    }

    fn elapsed(&self) -> f64 {
        (self.now - self.start).as_secs_f64()
    }

    /// The next request before `limit` seconds since the start.
    fn next(&mut self, limit: u64) -> Option<(Id, usize)> {
        loop {
            let waiting = || {
                let ids = self.records.iter().filter(|(_, count)| *count > 0);
                (1, ids.map(|(id, _)| Id::clone(id)).collect())
            };
            match self.schedule.poll(self.now, waiting) {
                Next::Send { id, limit, .. } => {
                    let left = self.records.iter().find(|(known, _)| *known == id);
                    let count = left.map_or(0, |(_, count)| (*count).min(limit));
                    if count > 0 {
                        return Some((id, count));
                    }
                    self.schedule.empty(&id);
                }
                Next::Wait(Some(until)) => {
                    assert!(until > self.now, "would spin");
                    self.now = until;
                    if until > self.start + Duration::from_secs(limit) {
                        return None;
                    }
                }
                Next::Wait(None) => return None,
            }
        }
    }

    /// All requests before `limit`, which are answered so.
    fn run(&mut self, limit: u64, answer: impl Fn(&str, usize) -> Meaning) -> Vec<Sent> {
        let mut sent = Vec::new();
        while let Some((id, count)) = self.next(limit) {
            sent.push((self.elapsed(), id.to_string(), count));
            assert!(sent.len() < 100_000, "would spin");
            let meaning = answer(&id, count);
            let verdict = self.schedule.answered(self.now, &id, count, meaning);
            if matches!(verdict, Verdict::Delete | Verdict::Drop) {
                let left = self.records.iter_mut().find(|(known, _)| *known == id);
                left.unwrap().1 -= count;
            }
        }
        sent
    }

    fn left(&self) -> usize {
        self.records.iter().map(|(_, count)| count).sum()
    }
}

fn sent(list: &[(f64, &str, usize)]) -> Vec<Sent> {
    list.iter()
        .map(|(at, id, count)| (*at, (*id).to_owned(), *count))
        .collect()
}

fn pauses(sent: &[Sent]) -> Vec<f64> {
    sent.windows(2).map(|pair| pair[1].0 - pair[0].0).collect()
}

#[test]
fn answers_mean_what_the_specification_says() {
    let meaning = |status| Meaning::of(status, None, at(NOW));
    for status in [200, 201, 202, 204, 299] {
        assert_eq!(meaning(status), Meaning::Delivered);
    }
    for status in [301, 302, 307, 308] {
        assert_eq!(meaning(status), Meaning::Redirect);
    }
    for status in [401, 403] {
        assert_eq!(meaning(status), Meaning::Refused);
    }
    for status in [408, 500, 502, 503, 504, 599] {
        assert_eq!(meaning(status), Meaning::Retry);
    }
    assert_eq!(meaning(413), Meaning::TooLarge);
    for status in [
        100, 199, 300, 303, 304, 400, 402, 404, 409, 422, 428, 600, 0,
    ] {
        assert_eq!(meaning(status), Meaning::Later);
    }
}

#[test]
fn retry_after_is_seconds_or_a_date_within_bounds() {
    let date = |unix| httpdate::fmt_http_date(at(unix));
    let cases = [
        (None, 1),
        (Some("7".to_owned()), 7),
        (Some(" 7 ".to_owned()), 7),
        (Some("0".to_owned()), 1),
        (Some("301".to_owned()), 300),
        (Some("9".repeat(40)), 300),
        (Some("-7".to_owned()), 1),
        (Some("soon".to_owned()), 1),
        (Some(String::new()), 1),
        (Some(date(NOW + 20)), 20),
        (Some(date(NOW - 20)), 1),
        (Some(date(NOW + 86_400)), 300),
    ];
    for (value, seconds) in cases {
        assert_eq!(
            Meaning::of(429, value.as_deref(), at(NOW)),
            Meaning::Wait(Duration::from_secs(seconds)),
            "{value:?}"
        );
    }
}

#[test]
fn the_endpoint_is_below_the_address_of_the_portal() {
    for (api_url, expected) in [
        (
            "https://logs.example.net/",
            "https://logs.example.net/ingestion/flow_logs",
        ),
        (
            "https://logs.example.net",
            "https://logs.example.net/ingestion/flow_logs",
        ),
        (
            "https://[2001:db8::1]:8443/v1/?a=b#c",
            "https://[2001:db8::1]:8443/v1/ingestion/flow_logs",
        ),
        (
            "http://127.0.0.1:8080",
            "http://127.0.0.1:8080/ingestion/flow_logs",
        ),
        ("http://[::1]/", "http://[::1]/ingestion/flow_logs"),
        ("http://localhost", "http://localhost/ingestion/flow_logs"),
    ] {
        assert_eq!(endpoint(api_url, false).unwrap().as_str(), expected);
    }
    let plain = "http://portal.lab:8081";
    assert_eq!(endpoint(plain, false), Err(UrlError::NotHttps));
    assert_eq!(
        endpoint(plain, true).unwrap().as_str(),
        "http://portal.lab:8081/ingestion/flow_logs"
    );
    for (api_url, error) in [
        ("", UrlError::Invalid),
        ("logs.example.net", UrlError::Invalid),
        ("https://", UrlError::Invalid),
        ("mailto:a@example.net", UrlError::Invalid),
        ("ftp://example.net", UrlError::NotHttps),
        ("wss://example.net", UrlError::NotHttps),
        ("file:///etc/passwd", UrlError::Invalid),
        ("https://user@example.net", UrlError::Credentials),
        ("https://:pass@example.net", UrlError::Credentials),
        ("http://localhost.example.net", UrlError::NotHttps),
    ] {
        assert_eq!(endpoint(api_url, false), Err(error), "{api_url}");
    }
}

#[test]
fn redirects_lead_to_https_on_443_without_credentials_only() {
    let from = Url::parse("https://logs.example.net:8443/ingestion/flow_logs").unwrap();
    let to = |location| redirect(&from, location).map(|url| url.to_string());
    let expected = "https://eu.example.net/ingestion/flow_logs".to_owned();
    assert_eq!(
        to("https://eu.example.net/ingestion/flow_logs"),
        Ok(expected.clone())
    );
    assert_eq!(to("//eu.example.net:443/ingestion/flow_logs"), Ok(expected));
    assert_eq!(to("/other"), Err(UrlError::Port), "relative to 8443");
    assert_eq!(to("http://eu.example.net/"), Err(UrlError::NotHttps));
    assert_eq!(to("http://eu.example.net:443/"), Err(UrlError::NotHttps));
    assert_eq!(to("https://eu.example.net:444/"), Err(UrlError::Port));
    assert_eq!(
        to("https://a:b@eu.example.net/"),
        Err(UrlError::Credentials)
    );
    assert_eq!(to("javascript:alert(1)"), Err(UrlError::NotHttps));
    assert_eq!(to("https://[::1"), Err(UrlError::Invalid));
    let standard = Url::parse("https://logs.example.net/a/b").unwrap();
    assert_eq!(
        redirect(&standard, "c").unwrap().as_str(),
        "https://logs.example.net/a/c"
    );
}

#[test]
fn a_backlog_goes_at_once_and_new_records_with_the_next_round() {
    let mut rig = Rig::new(&config(60, 1_000), &[("a", 2_500), ("b", 10)]);
    let first = rig.run(30, |_, _| Meaning::Delivered);
    assert_eq!(
        first,
        sent(&[
            (1.0, "a", 1_000),
            (1.0, "b", 10),
            (1.0, "a", 1_000),
            (1.0, "a", 500),
        ])
    );
    rig.records[1].1 = 3;
    let second = rig.run(125, |_, _| Meaning::Delivered);
    assert_eq!(second.len(), 1);
    assert_eq!(second[0].1, "b");
    assert_eq!(rig.left(), 0);
    assert!(rig.schedule.progress.is_empty());
}

#[test]
fn the_batch_size_is_that_of_the_portal_within_bounds() {
    for (asked, expected) in [(0, 1_000), (1, 1), (10_000, 10_000), (u32::MAX, 10_000)] {
        let mut rig = Rig::new(&config(60, asked), &[("a", 20_000)]);
        assert_eq!(rig.next(10).unwrap().1, expected);
    }
}

#[test]
fn intervals_of_the_portal_are_kept_within_bounds() {
    let mut rig = Rig::new(&config(u64::MAX, 10), &[("a", 1)]);
    assert_eq!(rig.run(10, |_, _| Meaning::Delivered).len(), 1);
    let mut often = config(1, 10);
    often.interval = Duration::from_nanos(1);
    let mut rig = Rig::new(&often, &[("a", 1)]);
    rig.run(5, |_, _| Meaning::Delivered);
    assert_eq!(
        rig.schedule.poll(rig.now, || (2, Vec::new())),
        Next::Wait(Some(rig.now + SECOND))
    );
}

#[test]
fn off_means_that_nothing_is_sent_until_it_is_on_again() {
    let mut rig = Rig::new(&config(60, 10), &[("a", 1)]);
    rig.schedule.configure(rig.now, None, false);
    assert_eq!(rig.next(100_000), None);
    rig.schedule.configure(rig.now, Some(&config(0, 10)), false);
    assert_eq!(rig.next(100_000), None);
    rig.now += 500 * SECOND;
    rig.schedule
        .configure(rig.now, Some(&config(60, 10)), false);
    let again = rig.run(600, |_, _| Meaning::Delivered);
    assert_eq!(again, sent(&[(501.0, "a", 1)]));
}

#[test]
fn a_shorter_interval_applies_at_once_and_the_same_one_changes_nothing() {
    let mut rig = Rig::new(&config(3_600, 10), &[]);
    rig.run(10, |_, _| Meaning::Delivered);
    rig.now = rig.start + 10 * SECOND;
    rig.schedule
        .configure(rig.now, Some(&config(3_600, 20)), false);
    assert_eq!(rig.schedule.round_at, rig.start + 3_601 * SECOND);
    rig.schedule.configure(rig.now, Some(&config(5, 20)), false);
    assert_eq!(rig.schedule.round_at, rig.start + 15 * SECOND);
}

#[test]
fn an_answer_that_comes_after_uploads_were_turned_off_still_counts() {
    let mut rig = Rig::new(&config(60, 10), &[("a", 1)]);
    let (id, count) = rig.next(10).unwrap();
    rig.schedule.configure(rig.now, None, false);
    let verdict = rig
        .schedule
        .answered(rig.now, &id, count, Meaning::Delivered);
    assert_eq!(verdict, Verdict::Delete);
    let verdict = rig.schedule.answered(rig.now, &id, count, Meaning::Retry);
    assert_eq!(verdict, Verdict::Keep);
}

#[test]
fn a_batch_that_is_too_large_is_halved_down_to_the_record_at_fault() {
    let mut rig = Rig::new(&config(60, 1_000), &[("a", 1_000)]);
    let all = rig.run(10, |_, count| {
        if count > 100 {
            Meaning::TooLarge
        } else {
            Meaning::Delivered
        }
    });
    let counts: Vec<usize> = all.iter().map(|(_, _, count)| *count).collect();
    assert_eq!(counts[..4], [1_000, 500, 250, 125]);
    assert!(counts[4..].iter().all(|count| *count <= 62));
    assert_eq!(rig.left(), 0);

    // The first record alone is too large; it goes, and the others together.
    let mut rig = Rig::new(&config(60, 1_000), &[("a", 9)]);
    let all = rig.run(10, {
        let dropped = std::cell::Cell::new(false);
        move |_, count| {
            if dropped.get() {
                return Meaning::Delivered;
            }
            dropped.set(count == 1);
            Meaning::TooLarge
        }
    });
    let counts: Vec<usize> = all.iter().map(|(_, _, count)| *count).collect();
    assert_eq!(counts, [9, 4, 2, 1, 8]);
    assert_eq!(rig.left(), 0);
}

#[test]
fn a_server_that_finds_everything_too_large_ends() {
    let mut rig = Rig::new(&config(60, 1_000), &[("a", 100)]);
    rig.run(10, |_, _| Meaning::TooLarge);
    assert_eq!(rig.left(), 0);
}

#[test]
fn waiting_on_request_holds_everybody_and_is_free_of_charge() {
    let mut rig = Rig::new(&config(60, 1_000), &[("a", 1), ("b", 1)]);
    let (id, count) = rig.next(10).unwrap();
    assert_eq!(&*id, "a");
    let wait = Meaning::Wait(40 * SECOND);
    let verdict = rig.schedule.answered(rig.now, &id, count, wait);
    assert_eq!(verdict, Verdict::Keep);
    let rest = rig.run(50, |_, _| Meaning::Delivered);
    assert_eq!(rest, sent(&[(41.0, "a", 1), (41.0, "b", 1)]));

    // Failures and long waits by turns: the waits do not use up the time of the batch.
    let mut rig = Rig::new(&config(3_600, 1_000), &[("a", 1)]);
    let turn = std::cell::Cell::new(0);
    let all = rig.run(3_000, |_, _| {
        turn.set(turn.get() + 1);
        if turn.get() % 2 == 1 {
            Meaning::Retry
        } else {
            Meaning::Wait(300 * SECOND)
        }
    });
    let failures = all.len() / 2;
    assert!(failures >= 8, "{all:?}");
    assert!(
        pauses(&all).iter().all(|pause| *pause <= 301.0),
        "never left for later: {all:?}"
    );
}

#[test]
fn failures_are_retried_with_growing_delays_and_then_left_for_later() {
    let mut rig = Rig::new(&config(3_600, 1_000), &[("a", 1)]);
    let all = rig.run(3_600, |_, _| Meaning::Retry);
    let pauses = pauses(&all);
    for (pause, delay) in pauses.iter().zip([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]) {
        let share = pause / delay;
        assert!((1.0 - JITTER..=1.0 + JITTER).contains(&share), "{pauses:?}");
    }
    let last = all.last().unwrap().0;
    assert!((200.0..=BATCH_LIMIT.as_secs_f64() + 1.0).contains(&last));
    assert_eq!(rig.left(), 1, "kept");
    let later = rig.run(8_000, |_, _| Meaning::Delivered);
    assert_eq!(later.len(), 1);
    assert!(later[0].0 > last + 3_500.0);
}

#[test]
fn an_outage_is_not_met_with_one_request_per_authorization() {
    let names: Vec<String> = (0..500).map(|n| format!("a{n:03}")).collect();
    let records: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let mut rig = Rig::new(&config(60, 1_000), &records);
    let all = rig.run(3_600, |_, _| Meaning::Retry);
    assert!((60..=100).contains(&all.len()), "{}", all.len());
    let least = pauses(&all)[6..].iter().copied().fold(f64::MAX, f64::min);
    assert!(least >= 60.0 * (1.0 - JITTER), "{least}");
    // Over: everything goes at once.
    let over = rig.run(3_800, |_, _| Meaning::Delivered);
    assert_eq!(over.len(), 500);
    assert_eq!(rig.left(), 0);
}

#[test]
fn trouble_with_one_authorization_does_not_hold_up_the_others() {
    for bad in [Meaning::Retry, Meaning::Refused, Meaning::Later] {
        let mut rig = Rig::new(&config(60, 100), &[("bad", 5), ("a", 500), ("b", 50)]);
        rig.run(
            20,
            |id, _| {
                if id == "bad" { bad } else { Meaning::Delivered }
            },
        );
        assert_eq!(rig.left(), 5, "{bad:?}");
    }
    // Even when there are more of them.
    let names: Vec<String> = (0..10).map(|n| format!("bad{n}")).collect();
    let mut records: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    records.push(("good", 100));
    let mut rig = Rig::new(&config(60, 1), &records);
    rig.run(3_600, |id, _| {
        if id == "good" {
            Meaning::Delivered
        } else {
            Meaning::Retry
        }
    });
    assert_eq!(rig.left(), 10);
}

#[test]
fn a_refused_token_is_left_alone_for_ten_minutes() {
    let mut rig = Rig::new(&config(5, 100), &[("a", 1), ("b", 1)]);
    let all = rig.run(1_500, |id, _| {
        if id == "a" {
            Meaning::Refused
        } else {
            Meaning::Delivered
        }
    });
    assert_eq!(
        all,
        sent(&[
            (1.0, "a", 1),
            (1.0, "b", 1),
            (601.0, "a", 1),
            (1_201.0, "a", 1),
        ])
    );
}

#[test]
fn anything_else_is_kept_for_a_later_round() {
    for meaning in [Meaning::Later, Meaning::Redirect] {
        let mut rig = Rig::new(&config(5, 100), &[("a", 1)]);
        let all = rig.run(200, |_, _| meaning);
        assert_eq!(
            all,
            sent(&[
                (1.0, "a", 1),
                (61.0, "a", 1),
                (121.0, "a", 1),
                (181.0, "a", 1)
            ])
        );
    }
}

#[test]
fn a_new_server_is_not_held_to_what_the_old_one_did() {
    let mut rig = Rig::new(&config(60, 100), &[("a", 1)]);
    rig.run(100, |_, _| Meaning::Refused);
    let now = rig.now;
    rig.schedule.configure(now, Some(&config(60, 100)), true);
    let next = rig.run(1_000, |_, _| Meaning::Delivered);
    assert_eq!(next.len(), 1);
    assert!(
        next[0].0 <= (now - rig.start + 2 * SECOND).as_secs_f64(),
        "{next:?}"
    );
}

#[test]
fn whatever_the_answers_the_schedule_never_spins_and_loses_nothing() {
    for seed in 0..50 {
        let mut answers = StdRng::seed_from_u64(seed);
        let mut rig = Rig::new(&config(30, 50), &[("a", 300), ("b", 20), ("c", 1)]);
        let mut dropped = 0;
        let mut delivered = 0;
        while let Some((id, count)) = rig.next(400_000) {
            let meaning = [
                Meaning::Delivered,
                Meaning::TooLarge,
                Meaning::Wait(Duration::from_secs(answers.random_range(1..=300))),
                Meaning::Retry,
                Meaning::Refused,
                Meaning::Redirect,
                Meaning::Later,
            ][answers.random_range(0..7)];
            let verdict = rig.schedule.answered(rig.now, &id, count, meaning);
            let left = rig.records.iter_mut().find(|(known, _)| *known == id);
            match verdict {
                Verdict::Delete => {
                    left.unwrap().1 -= count;
                    delivered += count;
                }
                Verdict::Drop => {
                    assert_eq!(count, 1);
                    left.unwrap().1 -= 1;
                    dropped += 1;
                }
                Verdict::Keep | Verdict::Failed => {}
            }
        }
        assert_eq!(delivered + dropped + rig.left(), 321, "seed {seed}");
        assert_eq!(rig.left(), 0, "seed {seed}");
    }
}
