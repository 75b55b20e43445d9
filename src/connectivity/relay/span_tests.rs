#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::{Layer, Registry};
use uuid::Uuid;

use super::allocation_tests::{allocated, dual_stack, world_with};
use super::double::{ALLOCATE, Style};

type Fields = BTreeMap<String, Vec<String>>;

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Spans>>);

#[derive(Default)]
struct Spans {
    open: BTreeMap<u64, Fields>,
    closed: Vec<Fields>,
}

struct Collect<'a>(&'a mut Fields);

impl Visit for Collect<'_> {
    fn record_u64(&mut self, field: &Field, _: u64) {
        panic!("{field}: tracing-opentelemetry makes text of unsigned numbers");
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let text = format!("{value:?}").trim_matches('"').to_owned();
        self.0
            .entry(field.name().to_owned())
            .or_default()
            .push(text);
    }
}

impl<S: tracing::Subscriber> Layer<S> for Recorder {
    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        assert_eq!(attrs.metadata().name(), "relay.allocate");
        assert!(attrs.is_root());
        let mut fields = Fields::new();
        attrs.record(&mut Collect(&mut fields));
        self.0.lock().unwrap().open.insert(id.into_u64(), fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        let mut inner = self.0.lock().unwrap();
        values.record(&mut Collect(inner.open.get_mut(&id.into_u64()).unwrap()));
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        let mut inner = self.0.lock().unwrap();
        let fields = inner.open.remove(&id.into_u64()).unwrap();
        inner.closed.push(fields);
    }
}

fn record(run: impl FnOnce()) -> Vec<Fields> {
    let recorder = Recorder::default();
    let subscriber = Registry::default().with(recorder.clone());
    tracing::subscriber::with_default(subscriber, run);
    let inner = recorder.0.lock().unwrap();
    assert!(inner.open.is_empty(), "a span stayed open");
    inner.closed.clone()
}

fn one(fields: &Fields, name: &str) -> String {
    let values = fields.get(name).map(Vec::as_slice).unwrap_or_default();
    assert_eq!(values.len(), 1, "{name} in {fields:?}");
    values[0].clone()
}

#[test]
fn attempt_that_succeeds_is_one_span_of_its_duration() {
    let spans = record(|| {
        let mut world = allocated(Style::Stock);
        world.run_secs(3600);
    });
    assert_eq!(spans.len(), 1);
    assert_eq!(one(&spans[0], "otel.kind"), "client");
    assert_eq!(one(&spans[0], "server.address"), "192.0.2.10");
    assert_eq!(one(&spans[0], "server.port"), "3478");
    assert_eq!(one(&spans[0], "relay.id"), Uuid::from_u128(1).to_string());
    assert!(!spans[0].contains_key("error.type"));
}

#[test]
fn attempt_that_fails_says_why() {
    let spans = record(|| {
        let mut server = dual_stack(Style::Stock);
        server.errors.push_back((ALLOCATE, 486));
        let mut world = world_with(server);
        world.run_secs(2);
    });
    assert_eq!(one(&spans[0], "error.type"), "relay_quota_reached");
    assert_eq!(one(&spans[0], "stun.error_code"), "486");
    assert_eq!(one(&spans[0], "otel.status_code"), "ERROR");
    assert_eq!(one(&spans[0], "server.address"), "192.0.2.10");
}

#[test]
fn attempt_without_an_answer_names_the_server_all_the_same() {
    let spans = record(|| {
        let mut server = dual_stack(Style::Stock);
        server.silent = true;
        let mut world = world_with(server);
        world.run_secs(8);
        world.run(Duration::from_millis(500));
    });
    assert_eq!(spans.len(), 1);
    assert_eq!(one(&spans[0], "error.type"), "relay_no_response");
    assert_eq!(one(&spans[0], "server.port"), "3478");
}
