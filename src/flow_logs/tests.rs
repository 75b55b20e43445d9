//! The whole of it, against a server in this process.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::post;
use rustls::RootCertStore;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};

use super::fixtures::{authorization, authorization_with, end, start};
use super::*;
use crate::portal::dial::tls_config_with;

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

fn settings(state_dir: &Path) -> Settings {
    Settings {
        state_dir: state_dir.to_owned(),
        tls: tls_config_with(RootCertStore::empty()),
        user_agent: "gateway/test".to_owned(),
        allow_plain_http: false,
        limits: Limits::default(),
    }
}

fn report(authorization: &Arc<Authorization>, record: Record) -> Report {
    Report {
        authorization: Arc::clone(authorization),
        record,
    }
}

/// Waits until the counters are as wanted.
fn until(logs: &FlowLogs, wanted: impl Fn(&FlowLogCounters) -> bool) -> FlowLogCounters {
    let start = Instant::now();
    loop {
        let counters = logs.counters();
        if wanted(&counters) {
            return counters;
        }
        assert!(start.elapsed() < LIMIT, "{counters:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[derive(Default)]
struct Received {
    /// Flows by token, in the order of their arrival.
    flows: BTreeMap<String, Vec<u64>>,
    /// Records per request.
    requests: Vec<usize>,
    /// Statuses to answer with before everything is taken.
    answers: Vec<u16>,
    /// More records per request are too large.
    most: Option<usize>,
}

type Shared = Arc<Mutex<Received>>;

/// A server that takes flow logs; ends when dropped.
struct Server {
    received: Shared,
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(answers: &[u16]) -> Self {
        let received = Shared::default();
        received.lock().unwrap().answers = answers.iter().rev().copied().collect();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let app = Router::new()
            .route("/api/ingestion/flow_logs", post(take))
            .layer(DefaultBodyLimit::max(upload::MAX_BODY))
            .with_state(Arc::clone(&received));
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self {
            received,
            address,
            _runtime: runtime,
        }
    }

    fn config(&self, batch_size: u32) -> Option<UploadConfig> {
        Some(UploadConfig {
            api_url: format!("http://{}/api/", self.address),
            interval: Duration::from_secs(1),
            batch_size,
        })
    }

    fn flows(&self, authorization: &Authorization) -> Vec<u64> {
        let token = authorization.token().expose_secret();
        let received = self.received.lock().unwrap();
        let mut flows = received.flows.get(token).cloned().unwrap_or_default();
        flows.sort_unstable();
        flows
    }
}

async fn take(
    State(received): State<Shared>,
    headers: HeaderMap,
    body: Bytes,
) -> impl IntoResponse {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let logs = body["flow_logs"].as_array().unwrap();
    let mut received = received.lock().unwrap();
    received.requests.push(logs.len());
    if let Some(status) = received.answers.pop() {
        return StatusCode::from_u16(status).unwrap();
    }
    if received.most.is_some_and(|most| logs.len() > most) {
        return StatusCode::PAYLOAD_TOO_LARGE;
    }
    let token = headers["authorization"].to_str().unwrap();
    let token = token.strip_prefix("Bearer ").unwrap().to_owned();
    let flows = logs
        .iter()
        .map(|log| log["inner_src_port"].as_u64().unwrap());
    received.flows.entry(token).or_default().extend(flows);
    StatusCode::OK
}

fn numbers(range: std::ops::Range<u16>) -> Vec<u64> {
    range.map(u64::from).collect()
}

fn records_in(state_dir: &Path) -> usize {
    let mut count = 0;
    let root = state_dir.join("flow_logs/responder");
    for dir in fs::read_dir(root).unwrap() {
        let files = fs::read_dir(dir.unwrap().path()).unwrap();
        count += files
            .filter(|file| {
                let name = file.as_ref().unwrap().file_name();
                name.display().to_string().ends_with(".json")
            })
            .count();
    }
    count
}

#[test]
fn reports_are_written_and_uploaded_under_their_own_token() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[]);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    logs.configure(server.config(7));
    let (a, b) = (authorization("a"), authorization("b"));
    for number in 0..30 {
        logs.report(report(&a, start(number)));
    }
    logs.report(report(&b, end(99)));
    let counters = until(&logs, |counters| counters.uploaded == 31);
    assert_eq!(server.flows(&a), numbers(0..30));
    assert_eq!(server.flows(&b), [99]);
    let requests = server.received.lock().unwrap().requests.clone();
    assert!(requests.iter().all(|count| (1..=7).contains(count)));
    let expected = FlowLogCounters {
        written: 31,
        uploaded: 31,
        ..FlowLogCounters::default()
    };
    assert_eq!(counters, expected);
    assert_eq!(records_in(dir.path()), 0);
    assert!(logs.finish(LIMIT));
}

#[test]
fn records_of_a_former_run_are_uploaded_after_the_restart() {
    let dir = tempfile::tempdir().unwrap();
    let a = authorization("a");
    for run in 0..2 {
        let logs = FlowLogs::start(settings(dir.path())).unwrap();
        for number in 0..10 {
            logs.report(report(&a, start(run * 10 + number)));
        }
        assert!(logs.finish(LIMIT), "all is written before the end");
        assert_eq!(logs.counters().written, 10);
    }
    assert_eq!(records_in(dir.path()), 20);

    let server = Server::start(&[]);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let before = until(&logs, |counters| counters.spool_files == 21);
    assert_eq!(before.written, 0);
    logs.configure(server.config(0));
    until(&logs, |counters| counters.uploaded == 20);
    assert_eq!(server.flows(&a), numbers(0..20));
    assert_eq!(logs.counters().spool_bytes, 0);
}

#[test]
fn without_configuration_records_stay_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[]);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let mut off = server.config(0).unwrap();
    off.interval = Duration::ZERO;
    logs.configure(Some(off));
    logs.report(report(&authorization("a"), start(1)));
    assert!(logs.finish(LIMIT));
    assert_eq!(records_in(dir.path()), 1);
    assert!(server.received.lock().unwrap().requests.is_empty());
}

#[test]
fn a_server_that_fails_first_gets_everything_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[500, 429, 408]);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let a = authorization("a");
    for number in 0..5 {
        logs.report(report(&a, start(number)));
    }
    until(&logs, |counters| counters.written == 5);
    logs.configure(server.config(0));
    let counters = until(&logs, |counters| counters.uploaded == 5);
    assert_eq!(server.flows(&a), numbers(0..5));
    assert_eq!(counters.upload_failures, 2, "429 is none");
    let error = counters.last_error.unwrap();
    assert_eq!(
        error,
        "cannot upload flow logs: 127.0.0.1 answered 408".to_owned()
    );
}

#[test]
fn batches_shrink_to_what_the_server_takes() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[]);
    server.received.lock().unwrap().most = Some(3);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let a = authorization("a");
    for number in 0..40 {
        logs.report(report(&a, start(number)));
    }
    until(&logs, |counters| counters.written == 40);
    logs.configure(server.config(0));
    let counters = until(&logs, |counters| counters.uploaded == 40);
    assert_eq!(server.flows(&a), numbers(0..40));
    assert_eq!((counters.rejected, counters.upload_failures), (0, 0));
}

#[test]
fn a_record_the_server_never_takes_is_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[413]);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    logs.report(report(&authorization("a"), start(1)));
    logs.configure(server.config(0));
    until(&logs, |counters| counters.rejected == 1);
    assert_eq!(records_in(dir.path()), 0);
}

#[test]
fn a_refused_token_keeps_its_records_and_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[403]);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let (a, b) = (authorization("a"), authorization("b"));
    logs.report(report(&a, start(1)));
    logs.report(report(&b, start(2)));
    until(&logs, |counters| counters.written == 2);
    logs.configure(server.config(0));
    let counters = until(&logs, |counters| counters.uploaded == 1);
    assert_eq!(counters.upload_failures, 1);
    assert_eq!(server.flows(&b), [2]);
    assert_eq!(records_in(dir.path()), 1);
}

#[test]
fn large_backlogs_are_cut_into_bodies_the_server_takes() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[]);
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let a = authorization("a");
    for number in 0..4_000 {
        logs.report(report(&a, end(number)));
    }
    until(&logs, |counters| counters.written == 4_000);
    logs.configure(server.config(10_000));
    until(&logs, |counters| counters.uploaded == 4_000);
    assert_eq!(server.flows(&a), numbers(0..4_000));
    assert!(server.received.lock().unwrap().requests.len() > 1);
}

#[test]
fn authorizations_that_want_no_uploads_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let quiet = authorization_with("a", "uploads_enabled", json!(false));
    logs.report(report(&quiet, start(1)));
    assert!(logs.finish(LIMIT));
    assert_eq!(logs.counters(), FlowLogCounters::default());
    assert_eq!(records_in(dir.path()), 0);
}

#[test]
fn a_flood_blocks_nobody_and_stays_within_all_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    settings.limits = Limits {
        max_bytes: 100_000,
        max_files: 50,
    };
    let logs = FlowLogs::start(settings).unwrap();
    let authorizations: Vec<_> = (0..5).map(|n| authorization(&format!("a{n}"))).collect();
    let total = 30_000_u64;
    for number in 0..total {
        let authorization = &authorizations[(number % 5) as usize];
        let number = u16::try_from(number).unwrap();
        logs.report(report(authorization, start(number)));
    }
    assert!(logs.finish(LIMIT));
    let counters = logs.counters();
    assert_eq!(counters.written + counters.dropped_queue_full, total);
    assert!(counters.written >= QUEUE as u64);
    let left = records_in(dir.path()) as u64;
    assert_eq!(counters.written - counters.dropped_spool_full, left);
    assert!(counters.spool_files <= 50 && counters.spool_bytes <= 100_000);
    assert_eq!(counters.spool_files, left + 5);
    assert_eq!(counters.write_errors, 0);
}

#[test]
fn a_disk_that_cannot_be_written_is_counted_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let logs = FlowLogs::start(settings(&file.join("state"))).unwrap();
    for number in 0..100 {
        logs.report(report(&authorization("a"), start(number)));
    }
    let counters = until(&logs, |counters| counters.write_errors == 100);
    assert_eq!(counters.written, 0);
    let error = counters.last_error.unwrap();
    assert!(error.starts_with("cannot write flow logs below"), "{error}");
    assert!(logs.finish(LIMIT));
}

#[test]
fn a_spool_behind_a_link_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    symlink(elsewhere.path(), dir.path().join("flow_logs")).unwrap();
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    logs.report(report(&authorization("a"), start(1)));
    assert!(logs.finish(LIMIT));
    assert_eq!(logs.counters().write_errors, 1);
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

#[test]
fn an_address_that_cannot_be_posted_to_is_an_error_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    logs.configure(Some(UploadConfig {
        api_url: "http://user:hunter2@logs.example.net".to_owned(),
        interval: Duration::from_secs(1),
        batch_size: 0,
    }));
    let counters = until(&logs, |counters| counters.last_error.is_some());
    let error = counters.last_error.unwrap();
    assert!(error.contains("it is not https"), "{error}");
    assert!(!error.contains("hunter2"));
}

#[test]
fn nothing_is_taken_after_the_end_and_no_time_is_no_time() {
    let dir = tempfile::tempdir().unwrap();
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    let a = authorization("a");
    for number in 0..2_000 {
        logs.report(report(&a, start(number)));
    }
    let began = Instant::now();
    logs.finish(Duration::ZERO);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(logs.finish(LIMIT), "a second time is not wrong");
    let counters = logs.counters();
    assert_eq!(counters.written + counters.dropped_queue_full, 2_000);
    logs.report(report(&a, start(2_000)));
    assert_eq!(
        logs.counters().dropped_queue_full,
        counters.dropped_queue_full + 1
    );
}

#[test]
fn the_end_does_not_wait_for_a_request() {
    let dir = tempfile::tempdir().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    logs.report(report(&authorization("a"), start(1)));
    logs.configure(Some(UploadConfig {
        api_url: format!("http://{}", silent.local_addr().unwrap()),
        interval: Duration::from_secs(1),
        batch_size: 0,
    }));
    let (_connection, _) = silent.accept().unwrap();
    let began = Instant::now();
    assert!(logs.finish(LIMIT));
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(records_in(dir.path()), 1, "it is sent another time");
}

#[test]
fn what_is_queued_is_written_when_the_gateway_forgets_to_say_goodbye() {
    let dir = tempfile::tempdir().unwrap();
    let logs = FlowLogs::start(settings(dir.path())).unwrap();
    for number in 0..20 {
        logs.report(report(&authorization("a"), start(number)));
    }
    let FlowLogs {
        ended,
        reports,
        config,
        stop,
        ..
    } = logs;
    drop((reports, config, stop));
    let ended = ended.lock().unwrap().recv_timeout(LIMIT);
    assert_eq!(ended, Err(std_mpsc::RecvTimeoutError::Disconnected));
    assert_eq!(records_in(dir.path()), 20);
}
