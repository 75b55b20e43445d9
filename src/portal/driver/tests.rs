//! Against sockets on the loopback interface.

#![allow(clippy::unwrap_used)]

use std::fmt::Debug;
use std::sync::Mutex;

use opentelemetry::trace::{
    Link, Span as _, SpanContext, SpanId, Status, TraceContextExt as _, Tracer, TracerProvider as _,
};
use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use serde_json::json;
use tokio::net::TcpListener;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{self, SubscriberExt};

use super::*;
use crate::admin::model::PortalState;
use crate::portal::channel::{EndedOutage, Outcome};
use crate::portal::error::ErrorType;
use crate::portal::messages::Ingress;
use crate::portal::test_portal::{Peer, answer, listen};
use crate::telemetry::metrics::{Metrics, Reading};
use crate::telemetry::outage::{self, Affected, Culprit, Outage};

const UNAUTHORIZED: &str = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n";
const BUSY: &str =
    "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n";

fn driver(url: &Url) -> Driver {
    let config = PortalConfig {
        api_url: url.clone(),
        token: SecretString::from("secret-token"),
        external_id_source: "id-1".to_owned(),
        name: "edge-7".to_owned(),
        public_key: [2; 32],
        max_partition_time: None,
        user_agent: "Linux/6.1 gateway/1.6.0".to_owned(),
        exit_on_auth_failure: false,
    };
    assert!(!format!("{config:?}").contains("secret-token"));
    Driver::new(config).unwrap()
}

/// Runs the driver until the portal's side of the story is told.
async fn while_driven<T>(driver: &mut Driver, portal: impl Future<Output = T>) -> (T, Vec<Event>) {
    tokio::pin!(portal);
    let mut events = Vec::new();
    let result = loop {
        tokio::select! {
            event = driver.next() => events.push(event),
            result = &mut portal => break result,
        }
    };
    (result, events)
}

async fn connect(driver: &mut Driver, listener: &TcpListener) -> Peer {
    let portal = async {
        let mut peer = Peer::accept(listener).await;
        peer.join().await;
        peer
    };
    let (peer, mut events) = while_driven(driver, portal).await;
    if events.is_empty() {
        events.push(driver.next().await);
    }
    assert!(
        matches!(events.as_slice(), [.., Event::Connected]),
        "{events:?}"
    );
    peer
}

#[tokio::test]
async fn joins_exchanges_messages_and_closes_in_order() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    assert_eq!(
        driver.send(Egress::NoRelays),
        Err(NotJoined(Egress::NoRelays))
    );
    let mut peer = connect(&mut driver, &listener).await;
    assert_eq!(driver.status().state, PortalState::Joined);
    assert_eq!(
        driver.status().url,
        format!("{}gateway/v2/websocket", url.as_str())
    );

    peer.send(
        json!({"topic": "gateway", "event": "init", "ref": null, "payload":
        {"interface": {"ipv4": "100.70.8.21", "ipv6": "fd00:2021:1111::7:4"}}}),
    )
    .await;
    assert!(matches!(
        driver.next().await,
        Event::Message(Ingress::Init(_))
    ));

    driver.send(Egress::NoRelays).unwrap();
    let (received, _) = while_driven(&mut driver, peer.receive()).await;
    assert_eq!(received["event"], "no_relays");

    driver.send(Egress::NoRelays).unwrap();
    let goodbye = async {
        let last = peer.receive().await;
        (last["event"].clone(), peer.receive().await)
    };
    let ((last, close), ()) = tokio::join!(goodbye, driver.shutdown());
    assert_eq!(last, "no_relays", "what was accepted is sent");
    assert_eq!(close, json!({"close": 1000}));
    assert_eq!(driver.status().state, PortalState::Closed);
}

#[tokio::test]
async fn refused_token_blocks_until_there_is_another() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let (head, event) = tokio::join!(answer(&listener, UNAUTHORIZED), driver.next());
    assert!(head.contains("Bearer secret-token\r\n"));
    assert!(matches!(event, Event::Blocked { failure } if failure.kind == ErrorType::Http401));
    assert_eq!(driver.status().state, PortalState::Blocked);

    driver.token_read(SecretString::from("better-token"));
    let (head, events) = while_driven(&mut driver, answer(&listener, BUSY)).await;
    assert!(head.contains("Bearer better-token\r\n"));
    assert!(matches!(events.as_slice(), [Event::Unblocked]));
    connect(&mut driver, &listener).await;
}

#[tokio::test]
async fn server_that_asks_for_patience_gets_it() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let story = async {
        answer(&listener, BUSY).await;
        let asked = Instant::now();
        let mut peer = Peer::accept(&listener).await;
        assert!(asked.elapsed() >= Duration::from_secs(1));
        peer.join().await;
        peer
    };
    while_driven(&mut driver, story).await;
    assert_eq!(driver.status().last_error.unwrap().kind, "http_5xx");
    assert_eq!(driver.counters().failures[&ErrorType::Http5xx], 1);
}

#[tokio::test]
async fn joins_again_after_the_portal_restarted() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let peer = connect(&mut driver, &listener).await;
    drop(peer);
    let event = driver.next().await;
    assert!(
        matches!(&event, Event::Disconnected { failure, .. } if failure.kind == ErrorType::ServerClose),
        "{event:?}"
    );
    connect(&mut driver, &listener).await;
    assert_eq!(driver.status().joins, 2);
}

#[tokio::test]
async fn close_frame_is_answered() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let mut peer = connect(&mut driver, &listener).await;
    peer.socket.close(None).await.unwrap();
    let (answer, events) = while_driven(&mut driver, peer.receive()).await;
    assert_eq!(answer, json!({"close": null}));
    assert!(matches!(events.as_slice(), [Event::Disconnected { .. }]));
}

#[tokio::test]
async fn next_may_be_cancelled_at_any_point() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let portal = tokio::spawn(async move {
        let mut peer = Peer::accept(&listener).await;
        peer.join().await;
        for _ in 0..100 {
            peer.send(
                json!({"topic": "gateway", "event": "relays_presence", "ref": null,
                "payload": {"disconnected_ids": [], "connected": []}}),
            )
            .await;
        }
        peer
    });
    let mut messages = 0;
    let mut cancelled = 0;
    while messages < 100 {
        tokio::select! {
            biased;
            event = driver.next() => messages += usize::from(matches!(event, Event::Message(_))),
            () = tokio::task::yield_now() => cancelled += 1,
        }
    }
    portal.await.unwrap();
    assert!(cancelled > 0, "nothing was cancelled, so nothing was shown");
}

#[tokio::test]
async fn a_stalled_socket_is_left_and_its_heartbeats_do_not_count_as_sent() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let _peer = connect(&mut driver, &listener).await;
    // From here on the portal reads nothing and only timers move.
    tokio::time::pause();
    let start = now();
    let candidates = vec!["x".repeat(1 << 20); 32];
    driver
        .send(Egress::BroadcastIceCandidates {
            client_ids: vec![],
            candidates,
        })
        .unwrap();
    let Event::Disconnected { failure, .. } = driver.next().await else {
        panic!("must disconnect");
    };
    assert_eq!(failure.kind, ErrorType::Io);
    assert!(failure.message.contains("takes no data"), "{failure}");
    assert_eq!((now() - start).as_secs(), link::WRITE_TIMEOUT.as_secs());
}

#[tokio::test]
async fn shutdown_does_not_wait_for_a_silent_portal() {
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let _peer = connect(&mut driver, &listener).await;
    tokio::time::pause();
    let start = now();
    driver.shutdown().await;
    assert!(now() - start <= SHUTDOWN_LIMIT + Duration::from_millis(1));
}

// ---- Spans ----

#[derive(Debug, Clone, Default)]
struct Exported(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Exported {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

impl Exported {
    fn provider(&self) -> SdkTracerProvider {
        SdkTracerProvider::builder()
            .with_simple_exporter(self.clone())
            .build()
    }

    /// Exports the spans of this thread while the guards live. With a single subscriber in the
    /// process, tracing asks the thread that first passes a span whether anybody wants it, which
    /// may be another test's; the second subscriber makes it ask both.
    fn install(&self) -> (tracing::subscriber::DefaultGuard, tracing::Dispatch) {
        let second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
        let layer = tracing_opentelemetry::layer().with_tracer(self.provider().tracer("test"));
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
        (guard, second)
    }

    fn take(&self) -> Vec<SpanData> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn attribute(span: &SpanData, name: &str) -> Option<String> {
    let found = span.attributes.iter().find(|kv| kv.key.as_str() == name)?;
    Some(found.value.to_string())
}

#[tokio::test]
async fn attempts_and_outages_become_spans() {
    let exported = Exported::default();
    let _guards = exported.install();
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let (_, _) = while_driven(&mut driver, answer(&listener, BUSY)).await;
    let _peer = connect(&mut driver, &listener).await;

    let spans = exported.take();
    let names: Vec<_> = spans.iter().map(|s| s.name.as_ref()).collect();
    assert_eq!(
        names,
        [
            "dns.resolve",
            "tcp.connect",
            "websocket.upgrade",
            "portal.connect",
            "dns.resolve",
            "tcp.connect",
            "websocket.upgrade",
            "channel.join",
            "portal.connect",
        ]
    );
    let (failed, joined) = (&spans[3], &spans[8]);
    for (attempt, children) in [(failed, &spans[..3]), (joined, &spans[4..8])] {
        assert_eq!(attempt.parent_span_id, SpanId::INVALID);
        assert_eq!(attribute(attempt, "server.address").unwrap(), "127.0.0.1");
        for child in children {
            assert_eq!(child.parent_span_id, attempt.span_context.span_id());
        }
    }
    assert_eq!(attribute(failed, "error.type").unwrap(), "http_5xx");
    assert_eq!(
        attribute(failed, "http.response.status_code").unwrap(),
        "503"
    );
    assert!(matches!(failed.status, Status::Error { .. }));
    assert_eq!(attribute(&spans[2], "error.type").unwrap(), "http_5xx");
    assert_eq!(attribute(joined, "error.type"), None);
    assert_eq!(joined.status, Status::Unset);
    assert_eq!(attribute(joined, "portal.attempt").unwrap(), "2");
    let delay: u64 = attribute(joined, "portal.backoff.delay_ms")
        .unwrap()
        .parse()
        .unwrap();
    assert!((1000..=2000).contains(&delay), "{delay}");
    assert_eq!(joined.links[0].span_context, failed.span_context);
    for name in [
        "http.response.status_code",
        "server.port",
        "portal.attempt",
        "portal.backoff.delay_ms",
    ] {
        let found = failed.attributes.iter().find(|kv| kv.key.as_str() == name);
        assert!(
            matches!(found.unwrap().value, Value::I64(_)),
            "a number is no text: {found:?}"
        );
    }
    assert!(!format!("{spans:?}").contains("secret-token"));
}

/// Messages that are logged, each with the id of the span it belongs to.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<(String, SpanId)>>>);

impl<S: tracing::Subscriber> Layer<S> for Logged {
    fn on_event(&self, event: &tracing::Event<'_>, _: layer::Context<'_, S>) {
        struct Message(String);
        impl tracing::field::Visit for Message {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        let context = opentelemetry::Context::current();
        let span = context.span().span_context().span_id();
        self.0.lock().unwrap().push((message.0, span));
    }
}

#[tokio::test]
async fn what_is_logged_about_an_attempt_has_the_ids_of_its_span() {
    let exported = Exported::default();
    let logged = Logged::default();
    // See `Exported::install`.
    let _second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
    let spans = tracing_opentelemetry::layer().with_tracer(exported.provider().tracer("test"));
    let subscriber = tracing_subscriber::registry().with(spans);
    let _guard = tracing::subscriber::set_default(subscriber.with(logged.clone()));
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    let (_, _) = while_driven(&mut driver, answer(&listener, BUSY)).await;
    let _peer = connect(&mut driver, &listener).await;

    let spans = exported.take();
    let attempts = spans.iter().filter(|s| s.name == "portal.connect");
    let ids: Vec<SpanId> = attempts.map(|s| s.span_context.span_id()).collect();
    let logged = logged.0.lock().unwrap();
    let id_of = |begin: &str| {
        let line = logged.iter().find(|(text, _)| text.starts_with(begin));
        line.unwrap_or_else(|| panic!("{begin}: {logged:?}")).1
    };
    assert_eq!(
        ids,
        [
            id_of("no connection to the portal"),
            id_of("connected to the portal")
        ]
    );
}

fn an_attempt(tracer: &impl Tracer, n: i64, joined: bool) -> outage::Attempt {
    let mut attributes = vec![KeyValue::new("portal.attempt", n)];
    if !joined {
        attributes.push(KeyValue::new("error.type", "dns"));
    }
    outage::Attempt {
        span: tracer.start("portal.connect").span_context().clone(),
        attributes,
        joined,
    }
}

/// Kinds of links in order, each with the attributes it has besides.
fn links(span: &SpanData) -> Vec<(String, SpanContext, String)> {
    let told = |link: &Link| {
        let mut kind = String::new();
        let mut rest = Vec::new();
        for kv in &link.attributes {
            match kv.key.as_str() {
                "portal.outage.link" => kind = kv.value.to_string(),
                name => rest.push(format!("{name}={}", kv.value)),
            }
        }
        (kind, link.span_context.clone(), rest.join(" "))
    };
    span.links.iter().map(told).collect()
}

#[tokio::test]
async fn durations_of_attempts_and_outages_are_told() {
    let reading = || Reading {
        status: Arc::default(),
        unix: 0.0,
        health: [true; 3],
    };
    let metrics = Metrics::new(Resource::builder_empty().build(), None, reading).unwrap();
    let (listener, url) = listen().await;
    let mut driver = driver(&url);
    driver.tell(metrics.durations());
    let (_, _) = while_driven(&mut driver, answer(&listener, BUSY)).await;
    let _peer = connect(&mut driver, &listener).await;
    let until = now();
    driver.time(&Milestone::OutageEnded(EndedOutage {
        since: until - Duration::from_secs(600),
        until,
        cause: ErrorType::Dns,
        last_cause: ErrorType::Dns,
        failures: 9,
        outcome: Outcome::Joined,
    }));

    let text = metrics.render().unwrap();
    for line in [
        "gateway_portal_connect_duration_seconds_count{error_type=\"http_5xx\"} 1\n",
        "gateway_portal_connect_duration_seconds_count 1\n",
        "gateway_portal_outage_length_seconds_sum{outcome=\"joined\"} 600\n",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
}

#[test]
fn an_outage_is_told_at_its_end_with_the_times_it_had_and_its_attempts_in_order() {
    let exported = Exported::default();
    let tracer = exported.provider().tracer("test");
    let mut attempts = outage::Attempts::default();
    let session = an_attempt(&tracer, 1, true);
    let failed = an_attempt(&tracer, 1, false);
    let joined = an_attempt(&tracer, 2, true);
    for attempt in [&session, &failed, &joined] {
        attempts.push(attempt.clone());
    }
    exported.take();
    let now = Instant::now() + Duration::from_secs(1000);
    let ended = EndedOutage {
        since: now - Duration::from_secs(610),
        until: now - Duration::from_secs(10),
        cause: ErrorType::Dns,
        last_cause: ErrorType::Http5xx,
        failures: 9,
        outcome: Outcome::Joined,
    };
    for outcome in [Outcome::Joined, Outcome::GaveUp, Outcome::Abandoned] {
        let open = Outage::begin(&tracer, ended.since, now);
        let context = open.context().clone();
        open.end(trace::end_of(&EndedOutage { outcome, ..ended }), &attempts);
        attempts.keep_latest();
        let spans = exported.0.lock().unwrap();
        assert_eq!(spans.last().unwrap().span_context, context);
    }

    let spans = exported.take();
    let [outage, gave_up, abandoned] = spans.as_slice() else {
        panic!("{spans:?}");
    };
    let length = outage.end_time.duration_since(outage.start_time).unwrap();
    assert_eq!(length.as_secs_f64().round(), 600.0);
    let age = SystemTime::now().duration_since(outage.end_time).unwrap();
    assert!((9.9..20.0).contains(&age.as_secs_f64()), "{age:?}");
    assert_eq!(outage.name, "portal.outage");
    assert_eq!(outage.parent_span_id, SpanId::INVALID);
    let link = |kind: &str, attempt: &outage::Attempt, rest: &str| {
        (kind.to_owned(), attempt.span.clone(), rest.to_owned())
    };
    assert_eq!(
        links(outage),
        [
            link("session", &session, "portal.attempt=1"),
            link("attempt", &failed, "portal.attempt=1 error.type=dns"),
            link("session", &joined, "portal.attempt=2"),
        ]
    );
    // What is lost next is the session that the last attempt made.
    assert_eq!(
        links(gave_up),
        [link("session", &joined, "portal.attempt=2")]
    );
    assert_eq!(outage.status, Status::Ok);
    assert_eq!(attribute(outage, "portal.outage.failures").unwrap(), "9");
    assert_eq!(attribute(outage, "portal.outage.cause").unwrap(), "dns");
    assert_eq!(
        attribute(outage, "portal.outage.outcome").unwrap(),
        "joined"
    );
    assert_eq!(attribute(outage, "error.type"), None);

    assert_eq!(
        attribute(abandoned, "portal.outage.outcome").unwrap(),
        "abandoned"
    );
    assert_eq!(
        abandoned.status,
        Status::Unset,
        "nobody knows how it would have ended"
    );
    assert_eq!(
        attribute(gave_up, "portal.outage.outcome").unwrap(),
        "gave_up"
    );
    assert_eq!(
        attribute(gave_up, "portal.outage.last_cause").unwrap(),
        "http_5xx"
    );
    assert_eq!(attribute(gave_up, "error.type").unwrap(), "http_5xx");
    assert!(matches!(gave_up.status, Status::Error { .. }));
}

#[test]
fn an_outage_tells_whom_it_cut_and_whom_something_else_did() {
    let exported = Exported::default();
    let tracer = exported.provider().tracer("test");
    let now = Instant::now();
    let mut open = Outage::begin(&tracer, now, now);
    open.met(Clients { all: 5, relayed: 3 });
    open.met(Clients::default());
    let lost = Affected::ClientLost { relayed: true };
    for (affected, culprit) in [
        (Affected::Relay, Culprit::Relay),
        (lost, Culprit::Relay),
        (Affected::ClientMoved, Culprit::Network),
        (lost, Culprit::Portal),
    ] {
        let span = tracer.start("other").span_context().clone();
        open.affected(Effect { affected, culprit }, span);
    }
    let ended = EndedOutage {
        since: now,
        until: now + Duration::from_secs(60),
        cause: ErrorType::Dns,
        last_cause: ErrorType::Dns,
        failures: 1,
        outcome: Outcome::Joined,
    };
    open.end(trace::end_of(&ended), &outage::Attempts::default());

    let spans = exported.take();
    let outage = spans.last().unwrap();
    for (name, value) in [
        ("clients", "5"),
        ("clients_relayed", "3"),
        ("clients_lost", "2"),
        ("clients_lost_relayed", "2"),
        ("clients_lost_by_portal", "1"),
        ("clients_moved", "1"),
        ("relays_lost", "1"),
        ("relays_lost_by_portal", "0"),
    ] {
        let told = attribute(outage, &format!("portal.outage.{name}"));
        assert_eq!(told.as_deref(), Some(value), "{name}");
    }
    let told: Vec<_> = links(outage)
        .into_iter()
        .map(|(kind, _, rest)| format!("{kind} {rest}"))
        .collect();
    assert_eq!(
        told,
        [
            "relay_lost portal.outage.effect.cause=relay",
            "client_lost portal.outage.effect.cause=relay",
            "client_moved portal.outage.effect.cause=network",
            "client_lost portal.outage.effect.cause=portal",
        ]
    );
    assert_eq!(links(outage)[0].1, spans[0].span_context);
}

#[test]
fn links_of_an_outage_are_bounded_and_keep_its_beginning_and_its_end() {
    let exported = Exported::default();
    let tracer = exported.provider().tracer("test");
    let now = Instant::now();
    let mut attempts = outage::Attempts::default();
    for n in 1..=500 {
        attempts.push(an_attempt(&tracer, n, false));
    }
    let mut open = Outage::begin(&tracer, now, now);
    for _ in 0..500 {
        let span = tracer.start("other").span_context().clone();
        let effect = Effect {
            affected: Affected::Relay,
            culprit: Culprit::Relay,
        };
        open.affected(effect, span);
    }
    let ended = EndedOutage {
        since: now,
        until: now,
        cause: ErrorType::Dns,
        last_cause: ErrorType::Dns,
        failures: 500,
        outcome: Outcome::Joined,
    };
    open.end(trace::end_of(&ended), &attempts);

    let spans = exported.take();
    let outage = spans.last().unwrap();
    assert_eq!(outage.links.dropped_count, 0);
    let links = links(outage);
    let attempts: Vec<_> = links.iter().filter(|l| l.0 == "attempt").collect();
    assert!(attempts[0].2.starts_with("portal.attempt=1 "));
    assert!(
        attempts
            .last()
            .unwrap()
            .2
            .starts_with("portal.attempt=500 ")
    );
    assert!(links.iter().any(|l| l.0 == "relay_lost"));
    assert_eq!(
        attribute(outage, "portal.outage.relays_lost").unwrap(),
        "500"
    );
}

#[test]
fn clients_that_move_do_not_hide_what_was_lost() {
    let exported = Exported::default();
    let tracer = exported.provider().tracer("test");
    let now = Instant::now();
    let mut open = Outage::begin(&tracer, now, now);
    let lost = |relayed| Affected::ClientLost { relayed };
    let moved = std::iter::repeat_n(Affected::ClientMoved, 100);
    let rest = [lost(false), Affected::Relay]
        .into_iter()
        .chain((0..100).map(|n| lost(n % 2 == 0)))
        .chain(std::iter::repeat_n(Affected::Relay, 100));
    for affected in moved.chain(rest) {
        let span = tracer.start("other").span_context().clone();
        let culprit = Culprit::Network;
        open.affected(Effect { affected, culprit }, span);
    }
    let ended = EndedOutage {
        since: now,
        until: now,
        cause: ErrorType::Dns,
        last_cause: ErrorType::Dns,
        failures: 1,
        outcome: Outcome::Joined,
    };
    open.end(trace::end_of(&ended), &outage::Attempts::default());

    let spans = exported.take();
    let outage = spans.last().unwrap();
    let links = links(outage);
    let count = |kind: &str| links.iter().filter(|link| link.0 == kind).count();
    assert_eq!(count("client_moved"), 8);
    assert_eq!(count("client_lost"), 40);
    assert_eq!(count("relay_lost"), 16);
    assert_eq!(outage.links.dropped_count, 0);
    let told = attribute(outage, "portal.outage.clients_lost");
    assert_eq!(told.as_deref(), Some("101"));
}
