#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::*;
use crate::flow_logs::FlowLogCounters;
use crate::flow_logs::fixtures::{NOW, at, authorization, authorization_with, end, start};

const BIG: usize = 1 << 20;

struct Rig {
    dir: tempfile::TempDir,
    limits: Limits,
    counters: Arc<Counters>,
}

impl Rig {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            limits: Limits::default(),
            counters: Arc::default(),
        }
    }

    fn with_limits(max_bytes: u64, max_files: u64) -> Self {
        let limits = Limits {
            max_bytes,
            max_files,
        };
        Self {
            limits,
            ..Self::new()
        }
    }

    fn try_open(&self) -> io::Result<Spool> {
        let counters = Arc::clone(&self.counters);
        Spool::open(self.dir.path(), self.limits, counters, at(NOW))
    }

    fn open(&self) -> Spool {
        self.try_open().unwrap()
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("flow_logs/responder")
    }

    fn counted(&self) -> FlowLogCounters {
        self.counters.read()
    }

    /// Names below the root, sorted.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for authorization in fs::read_dir(self.root()).unwrap() {
            let authorization = authorization.unwrap();
            for file in fs::read_dir(authorization.path()).unwrap() {
                let (dir, file) = (authorization.file_name(), file.unwrap().file_name());
                files.push(format!("{}/{}", dir.display(), file.display()));
            }
        }
        files.sort();
        files
    }

    /// The books agree with the disk.
    fn check(&self) {
        let mut bytes = 0;
        let files = self.files();
        for file in &files {
            bytes += fs::metadata(self.root().join(file)).unwrap().len();
        }
        let counted = self.counted();
        assert_eq!(counted.spool_files, files.len() as u64, "{files:?}");
        assert_eq!(counted.spool_bytes, bytes);
        assert!(bytes <= self.limits.max_bytes && files.len() as u64 <= self.limits.max_files);
    }
}

fn put(spool: &mut Spool, authorization: &Arc<Authorization>, record: &Record) {
    spool.write(authorization, record, at(NOW)).unwrap();
}

fn name(record: &Record) -> String {
    Key::of(record).file_name()
}

/// Inner source ports of the records of a batch, which are the numbers of the flows.
fn flows(batch: &Batch) -> Vec<u64> {
    let body: Value = serde_json::from_slice(&batch.body).unwrap();
    let logs = body["flow_logs"].as_array().unwrap().clone();
    assert_eq!(logs.len(), batch.numbers.len());
    logs.iter()
        .map(|log| log["inner_src_port"].as_u64().unwrap())
        .collect()
}

fn batch(spool: &mut Spool, id: &str) -> Option<Batch> {
    let before = spool.next_number();
    spool.batch(&id.into(), 10_000, BIG, before)
}

#[test]
fn what_is_written_is_found_after_a_restart_in_the_same_order() {
    let rig = Rig::new();
    let (a, b) = (authorization("a"), authorization("b"));
    let mut spool = rig.open();
    for number in [3, 5, 9] {
        put(&mut spool, &a, &start(number));
    }
    put(&mut spool, &b, &end(20));
    rig.check();
    let before = rig.counted();
    drop(spool);

    let mut spool = rig.open();
    assert_eq!(rig.counted(), before);
    rig.check();
    assert_eq!(spool.waiting(), [Id::from("a"), Id::from("b")]);
    let found = batch(&mut spool, "a").unwrap();
    assert_eq!(flows(&found), [3, 5, 9]);
    assert!(found.authorization.has_token_of(&a));
    assert_eq!(flows(&batch(&mut spool, "b").unwrap()), [20]);
    assert_eq!(before.written, 4);
    assert_eq!(before.damaged, 0);
}

#[test]
fn directories_and_files_are_for_their_owner_alone() {
    let rig = Rig::new();
    fs::create_dir_all(rig.root()).unwrap();
    fs::set_permissions(rig.root(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut spool = rig.open();
    put(&mut spool, &authorization("a"), &start(1));
    let mode = |path: PathBuf| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777;
    for path in [rig.root(), rig.root().join("a")] {
        assert_eq!(mode(path), 0o700);
    }
    let files = rig.files();
    assert_eq!(files, [format!("a/{}", name(&start(1))), "a/token".into()]);
    for file in files {
        assert_eq!(mode(rig.root().join(file)), 0o600);
    }
}

#[test]
fn an_end_takes_the_place_of_its_start_and_a_late_start_is_not_written() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    put(&mut spool, &a, &start(1));
    put(&mut spool, &a, &start(2));
    put(&mut spool, &a, &end(1));
    put(&mut spool, &a, &start(1));
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [2, 1]);
    assert_eq!(rig.counted().written, 3);
    rig.check();
    drop(spool);

    // A crash came between writing the end and removing the start.
    let leftover = rig.root().join("a").join(name(&start(1)));
    fs::write(&leftover, record::encode(&start(1)).unwrap()).unwrap();
    let mut spool = rig.open();
    assert_eq!(batch(&mut spool, "a").unwrap().numbers.len(), 2);
    assert!(!leftover.exists());
    assert_eq!(rig.counted().damaged, 0);
    rig.check();
}

#[test]
fn the_same_report_twice_is_kept_once() {
    let rig = Rig::new();
    let mut spool = rig.open();
    for _ in 0..3 {
        put(&mut spool, &authorization("a"), &end(1));
    }
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [1]);
    rig.check();
}

#[test]
fn batches_are_bounded_by_records_bytes_and_round() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    for number in 0..10 {
        put(&mut spool, &a, &start(number));
    }
    let round = spool.next_number();
    put(&mut spool, &a, &start(10));
    let id: Id = "a".into();
    let all = spool.batch(&id, 100, BIG, round).unwrap();
    assert_eq!(flows(&all), (0..10).collect::<Vec<_>>());
    let three = spool.batch(&id, 3, BIG, round).unwrap();
    assert_eq!(flows(&three), [0, 1, 2]);
    let exact = spool.batch(&id, 100, three.body.len(), round).unwrap();
    assert_eq!(flows(&exact), [0, 1, 2]);
    let less = spool.batch(&id, 100, three.body.len() - 1, round).unwrap();
    assert_eq!(flows(&less), [0, 1]);
    let one = spool.batch(&id, 100, 1, round).unwrap();
    assert_eq!(flows(&one), [0], "a single record always goes");

    spool.remove(&id, &all.numbers);
    assert!(spool.batch(&id, 100, BIG, round).is_none());
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [10]);
    rig.check();
}

#[test]
fn the_last_record_takes_the_token_and_the_directory_with_it() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    put(&mut spool, &a, &start(1));
    let sent = batch(&mut spool, "a").unwrap();
    spool.remove(&"a".into(), &sent.numbers);
    assert_eq!(fs::read_dir(rig.root()).unwrap().count(), 0);
    rig.check();
    put(&mut spool, &a, &start(2));
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [2]);
    rig.check();
}

#[test]
fn a_record_replaced_while_it_was_sent_stays() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    put(&mut spool, &a, &start(1));
    let sent = batch(&mut spool, "a").unwrap();
    put(&mut spool, &a, &end(1));
    spool.remove(&"a".into(), &sent.numbers);
    let left = batch(&mut spool, "a").unwrap();
    assert!(str::from_utf8(&left.body).unwrap().contains("flow_end"));
    rig.check();
}

#[test]
fn when_files_are_used_up_the_oldest_records_go_first() {
    let rig = Rig::with_limits(u64::MAX, 4);
    let (a, b) = (authorization("a"), authorization("b"));
    let mut spool = rig.open();
    put(&mut spool, &b, &start(100));
    for number in 0..50 {
        put(&mut spool, &a, &start(number));
        rig.check();
    }
    assert!(batch(&mut spool, "b").is_none(), "it was the oldest");
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [47, 48, 49]);
    assert_eq!(rig.counted().dropped_spool_full, 48);
    assert_eq!(rig.counted().written, 51);
}

#[test]
fn when_bytes_are_used_up_the_oldest_records_go_first() {
    let rig = Rig::with_limits(8_000, u64::MAX);
    let mut spool = rig.open();
    for number in 0..200 {
        let id = format!("a{}", number % 3);
        put(&mut spool, &authorization(&id), &end(number));
        rig.check();
    }
    let mut left: Vec<u64> = spool
        .waiting()
        .iter()
        .flat_map(|id| flows(&batch(&mut spool, id).unwrap()))
        .collect();
    left.sort_unstable();
    assert!(left.len() > 5);
    let newest: Vec<u64> = (0..200).skip(200 - left.len()).collect();
    assert_eq!(left, newest);
}

#[test]
fn a_record_larger_than_the_spool_is_an_error_and_leaves_nothing() {
    for (bytes, files) in [(100, 100), (1_000_000, 1), (0, 0)] {
        let rig = Rig::with_limits(bytes, files);
        let mut spool = rig.open();
        let error = spool.write(&authorization("a"), &start(1), at(NOW));
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        rig.check();
    }
    let rig = Rig::new();
    let mut huge = start(1);
    huge.domain = Some("x".repeat(MAX_FILE));
    let error = rig.open().write(&authorization("a"), &huge, at(NOW));
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidData);
    rig.check();
}

#[test]
fn smaller_limits_after_a_restart_apply_at_once() {
    let mut rig = Rig::new();
    let mut spool = rig.open();
    for number in 0..10 {
        put(&mut spool, &authorization("a"), &start(number));
    }
    drop(spool);
    rig.limits.max_files = 4;
    let mut spool = rig.open();
    rig.check();
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [7, 8, 9]);
    assert_eq!(rig.counted().dropped_spool_full, 7);
}

#[test]
fn expired_authorizations_go_with_their_records() {
    let rig = Rig::new();
    let soon = authorization_with("soon", "exp", json!(NOW + 10));
    let later = authorization_with("later", "exp", json!(NOW + 20));
    let mut spool = rig.open();
    put(&mut spool, &soon, &start(1));
    put(&mut spool, &soon, &start(2));
    put(&mut spool, &later, &start(3));
    spool.expire(at(NOW + 9));
    assert_eq!(rig.counted().expired, 0);
    spool.expire(at(NOW + 10));
    assert_eq!(rig.counted().expired, 2);
    assert_eq!(spool.waiting(), [Id::from("later")]);
    rig.check();
    spool.write(&soon, &start(4), at(NOW + 10)).unwrap();
    assert_eq!(rig.counted().expired, 3, "not written any more");
    rig.check();
    drop(spool);

    // The other one expires while the gateway is off.
    let counters = Arc::clone(&rig.counters);
    let spool = Spool::open(rig.dir.path(), rig.limits, counters, at(NOW + 20)).unwrap();
    assert!(spool.waiting().is_empty());
    assert_eq!(rig.counted().expired, 4);
    rig.check();
}

#[test]
fn a_newer_token_replaces_the_older_one_and_not_the_other_way_round() {
    let rig = Rig::new();
    let older = authorization_with("a", "exp", json!(NOW + 10));
    let newer = authorization_with("a", "exp", json!(NOW + 1_000_000_000));
    let mut spool = rig.open();
    for (authorization, number) in [(&older, 1), (&newer, 2), (&older, 3)] {
        put(&mut spool, authorization, &start(number));
        rig.check();
    }
    assert!(
        batch(&mut spool, "a")
            .unwrap()
            .authorization
            .has_token_of(&newer)
    );
    drop(spool);
    let mut spool = rig.open();
    spool.expire(at(NOW + 10));
    assert_eq!(batch(&mut spool, "a").unwrap().numbers.len(), 3);
}

#[test]
fn every_truncation_and_every_foreign_content_is_counted_and_never_sent() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    let file = record::encode(&end(1)).unwrap();
    let contents = (0..file.len())
        .map(|length| file[..length].to_vec())
        .chain([
            b"{}".to_vec(),
            vec![0; 1_000],
            vec![b'['; MAX_FILE],
            vec![b' '; MAX_FILE + 1],
        ])
        .enumerate();
    for (number, content) in contents {
        put(&mut spool, &a, &end(1));
        put(&mut spool, &a, &end(2));
        let path = rig.root().join("a").join(name(&end(1)));
        fs::write(&path, content).unwrap();
        assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [2], "{number}");
        assert_eq!(rig.counted().damaged, number as u64 + 1);
        assert!(!path.exists());
        rig.check();
    }
}

#[test]
fn damage_of_a_former_run_is_counted_and_the_rest_is_sent() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    for number in 0..4 {
        put(&mut spool, &a, &end(number));
    }
    drop(spool);
    let dir = rig.root().join("a");
    fs::write(dir.join(name(&end(0))), b"").unwrap();
    fs::write(dir.join(name(&end(1))), vec![b'x'; MAX_FILE + 1]).unwrap();
    fs::write(dir.join(name(&end(2))), b"{\"checksum\":").unwrap();
    fs::write(dir.join(format!("{}.new", name(&end(5)))), b"draft").unwrap();
    fs::write(dir.join("token.new"), b"draft").unwrap();
    let mut spool = rig.open();
    assert_eq!(rig.counted().damaged, 2);
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [3]);
    assert_eq!(rig.counted().damaged, 3);
    rig.check();
}

#[test]
fn an_empty_end_does_not_take_the_place_of_its_start() {
    let rig = Rig::new();
    put(&mut rig.open(), &authorization("a"), &start(1));
    fs::write(rig.root().join("a").join(name(&end(1))), b"").unwrap();
    assert_eq!(flows(&batch(&mut rig.open(), "a").unwrap()), [1]);
    assert_eq!(rig.counted().damaged, 1);
    rig.check();
}

#[test]
fn tokens_that_grow_stay_within_the_limit_too() {
    let rig = Rig::with_limits(20_000, 100);
    let mut spool = rig.open();
    for number in 0..20 {
        let name = "x".repeat(usize::from(number) * 400);
        let longer = authorization_with("a", "resource_name", json!(name));
        put(&mut spool, &longer, &start(number));
        rig.check();
    }
}

#[test]
fn files_of_others_are_counted_once_and_left_alone() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    put(&mut spool, &a, &start(1));
    drop(spool);
    let foreign = [
        rig.root().join("README"),
        rig.root().join("not an id/x"),
        rig.root().join("a/2026-01-01T00:00:00Z-1.start.json"),
        rig.root().join("a/notes.new"),
        rig.root().join("stock/token"),
        rig.root().join("stock/2026-01-01T00:00:00Z-2.end.json"),
    ];
    for path in &foreign {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"{}").unwrap();
    }
    let mut spool = rig.open();
    // Of the last two the token is damaged and the other has a name of its own.
    assert_eq!(rig.counted().damaged, 6);
    let sent = batch(&mut spool, "a").unwrap();
    assert_eq!(flows(&sent), [1]);
    spool.remove(&"a".into(), &sent.numbers);
    assert_eq!(rig.counted().damaged, 6);
    assert_eq!(rig.counted().spool_files, 0);
    for path in &foreign {
        assert!(path.exists(), "{}", path.display());
    }
}

#[test]
fn records_without_a_usable_token_of_their_own_are_removed() {
    let other = authorization("b");
    let disabled = authorization_with("a", "uploads_enabled", json!(false));
    let tokens = [
        None,
        Some(String::new()),
        Some("a.b.c".to_owned()),
        Some("x".repeat(MAX_TOKEN + 1)),
        Some(other.token().expose_secret().to_owned()),
        Some(disabled.token().expose_secret().to_owned()),
    ];
    for token in tokens {
        let rig = Rig::new();
        put(&mut rig.open(), &authorization("a"), &start(1));
        let path = rig.root().join("a/token");
        fs::remove_file(&path).unwrap();
        let mut damaged = 1;
        if let Some(token) = token {
            fs::write(&path, token).unwrap();
            damaged = 2;
        }
        let spool = rig.open();
        assert!(spool.waiting().is_empty());
        assert_eq!(rig.counted().damaged, damaged);
        assert_eq!(fs::read_dir(rig.root()).unwrap().count(), 0);
        rig.check();
    }
}

#[test]
fn symbolic_links_are_never_followed() {
    let rig = Rig::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let (a, b) = (authorization("a"), authorization("b"));
    let mut spool = rig.open();
    put(&mut spool, &a, &start(1));
    put(&mut spool, &a, &start(2));
    put(&mut spool, &b, &start(3));

    // A record that is a link to a good record elsewhere.
    let outside = elsewhere.path().join("record");
    fs::rename(rig.root().join("a").join(name(&start(1))), &outside).unwrap();
    symlink(&outside, rig.root().join("a").join(name(&start(1)))).unwrap();
    // A directory that is one.
    let moved = elsewhere.path().join("b");
    fs::rename(rig.root().join("b"), &moved).unwrap();
    symlink(&moved, rig.root().join("b")).unwrap();

    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [2]);
    assert_eq!(rig.counted().damaged, 1);
    assert!(batch(&mut spool, "b").is_none());
    spool.write(&b, &start(4), at(NOW)).unwrap_err();
    drop(spool);
    assert!(outside.exists());
    assert_eq!(fs::read_dir(&moved).unwrap().count(), 2);

    let mut spool = rig.open();
    assert_eq!(spool.waiting(), [Id::from("a")]);
    spool.write(&b, &start(4), at(NOW)).unwrap_err();
    assert_eq!(fs::read_dir(&moved).unwrap().count(), 2);

    // A draft or a token that is one is replaced, not written through.
    let victim = elsewhere.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let draft = format!("{}.new", name(&start(5)));
    symlink(&victim, rig.root().join("a").join(draft)).unwrap();
    put(&mut spool, &a, &start(5));
    let token = rig.root().join("a/token");
    fs::remove_file(&token).unwrap();
    symlink(&victim, &token).unwrap();
    let newer = authorization_with("a", "exp", json!(NOW + 4_000_000_000));
    put(&mut spool, &newer, &start(6));
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    assert!(fs::symlink_metadata(&token).unwrap().is_file());
}

#[test]
fn a_spool_that_is_a_link_is_refused() {
    let rig = Rig::new();
    let elsewhere = tempfile::tempdir().unwrap();
    symlink(elsewhere.path(), rig.dir.path().join("flow_logs")).unwrap();
    rig.try_open().unwrap_err();
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

#[test]
fn a_named_pipe_in_place_of_a_record_stops_nobody() {
    let rig = Rig::new();
    let mut spool = rig.open();
    put(&mut spool, &authorization("a"), &start(1));
    let path = rig.root().join("a").join(name(&start(1)));
    fs::remove_file(&path).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
    assert!(batch(&mut spool, "a").is_none());
    assert_eq!(rig.counted().damaged, 1);
}

#[test]
fn files_and_directories_removed_by_somebody_do_no_harm() {
    let rig = Rig::new();
    let (a, b) = (authorization("a"), authorization("b"));
    let mut spool = rig.open();
    for number in 0..3 {
        put(&mut spool, &a, &start(number));
        put(&mut spool, &b, &start(number));
    }
    fs::remove_file(rig.root().join("a").join(name(&start(1)))).unwrap();
    fs::remove_dir_all(rig.root().join("b")).unwrap();
    assert_eq!(flows(&batch(&mut spool, "a").unwrap()), [0, 2]);
    put(&mut spool, &b, &start(3));
    assert_eq!(flows(&batch(&mut spool, "b").unwrap()), [3]);
    assert_eq!(rig.counted().damaged, 0);
    rig.check();

    fs::remove_dir_all(rig.dir.path().join("flow_logs")).unwrap();
    let error = spool.write(&a, &start(4), at(NOW)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    drop(spool);
    put(&mut rig.open(), &a, &start(4));
    rig.check();
}

#[test]
fn a_failed_write_leaves_neither_draft_nor_token() {
    let rig = Rig::new();
    let mut spool = rig.open();
    // A directory in the way of the record makes the rename fail.
    let dir = rig.root().join("a");
    fs::create_dir_all(dir.join(name(&start(1)))).unwrap();
    spool
        .write(&authorization("a"), &start(1), at(NOW))
        .unwrap_err();
    assert_eq!(rig.counted().spool_files, 0);
    assert_eq!(rig.counted().written, 0);
    let left: Vec<_> = fs::read_dir(&dir).unwrap().collect();
    assert!(!left.iter().any(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.display().to_string().ends_with(".new")
    }));
}

#[test]
fn the_order_of_former_runs_is_that_of_writing_not_of_flows() {
    let rig = Rig::new();
    let a = authorization("a");
    let mut spool = rig.open();
    for number in [9, 1, 5] {
        put(&mut spool, &a, &end(number));
    }
    drop(spool);
    for (number, age) in [(9, 10), (1, 30), (5, 20)] {
        let file = fs::File::options()
            .write(true)
            .open(rig.root().join("a").join(name(&end(number))))
            .unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age))
            .unwrap();
    }
    assert_eq!(flows(&batch(&mut rig.open(), "a").unwrap()), [1, 5, 9]);
}
