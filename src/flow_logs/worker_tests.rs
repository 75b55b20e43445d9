#![allow(clippy::unwrap_used)]

use std::path::Path;

use rustls::RootCertStore;

use super::*;
use crate::flow_logs::fixtures::{authorization, start};
use crate::flow_logs::{Authorization, Limits};
use crate::portal::dial::tls_config_with;

fn worker(state_dir: &Path) -> Worker {
    let settings = Settings {
        state_dir: state_dir.to_owned(),
        tls: tls_config_with(RootCertStore::empty()),
        user_agent: "gateway/test".to_owned(),
        allow_plain_http: false,
        limits: Limits::default(),
    };
    let mut worker = Worker::new(settings, Arc::default());
    worker.open();
    worker
}

fn report(authorization: &Arc<Authorization>, number: u16) -> Report {
    Report {
        authorization: Arc::clone(authorization),
        record: start(number),
    }
}

fn config(host: &str) -> UploadConfig {
    UploadConfig {
        api_url: format!("https://{host}/"),
        interval: Duration::from_secs(1),
        batch_size: 0,
    }
}

/// Has the worker begin with what it has, to be answered in this way at once.
fn send(worker: &mut Worker, meaning: Meaning) {
    let spool = worker.spool.as_mut().unwrap();
    let id = spool.waiting()[0].clone();
    let batch = spool
        .batch(&id, 1_000, MAX_BODY, spool.next_number())
        .unwrap();
    worker.sending = Some(Sending {
        id,
        numbers: batch.numbers,
        reply: Box::pin(async move {
            Reply {
                meaning,
                text: String::new(),
            }
        }),
    });
}

/// Takes the answer in, if there is one to wait for.
async fn take_answer(worker: &mut Worker) {
    let short = Duration::from_millis(1);
    if let Ok((id, numbers, reply)) = tokio::time::timeout(short, answer(&mut worker.sending)).await
    {
        worker.answered(&id, &numbers, &reply);
    }
}

#[tokio::test]
async fn an_answer_about_a_spool_that_is_gone_removes_nothing_from_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let mut worker = worker(dir.path());
    worker.configure(Some(&config("a.example")), None);
    let a = authorization("a");
    worker.write(&report(&a, 1));
    send(&mut worker, Meaning::Delivered);

    std::fs::remove_dir_all(dir.path().join("flow_logs")).unwrap();
    worker.write(&report(&a, 2));
    assert!(worker.spool.is_none());
    worker.opened_at = None;
    worker.write(&report(&a, 3));
    take_answer(&mut worker).await;
    assert_eq!(worker.spool.as_ref().unwrap().waiting().len(), 1);
    assert_eq!(worker.counters.read().uploaded, 0);
}

#[tokio::test]
async fn an_answer_of_a_former_server_says_nothing_about_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let mut worker = worker(dir.path());
    let (former, next) = (config("a.example"), config("b.example"));
    worker.configure(Some(&former), None);
    worker.write(&report(&authorization("a"), 1));
    send(&mut worker, Meaning::Refused);
    worker.configure(Some(&next), Some(&former));
    take_answer(&mut worker).await;
    assert_eq!(worker.counters.read().upload_failures, 0);
    // The same when uploads were off in between.
    send(&mut worker, Meaning::Refused);
    worker.configure(None, Some(&next));
    worker.configure(Some(&former), None);
    take_answer(&mut worker).await;
    assert_eq!(worker.counters.read().upload_failures, 0);
}

#[tokio::test]
async fn what_was_delivered_counts_when_the_server_is_still_the_same_or_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut worker = worker(dir.path());
    let former = config("a.example");
    let mut slower = former.clone();
    slower.interval = Duration::from_secs(60);
    worker.configure(Some(&former), None);
    for (uploaded, new) in [(1, Some(&slower)), (2, None)] {
        worker.write(&report(&authorization("a"), uploaded));
        send(&mut worker, Meaning::Delivered);
        worker.configure(new, Some(&former));
        take_answer(&mut worker).await;
        assert_eq!(worker.counters.read().uploaded, u64::from(uploaded));
    }
}
