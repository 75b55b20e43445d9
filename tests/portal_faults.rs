//! The driver against the stand-in portal over real sockets. Whatever goes wrong, the status and
//! the spans name the cause from the closed list of `error.type`.
//!
//! The clock is tokio's and held: it moves on when everybody waits, so that limits of half a minute
//! cost nothing.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use firezone_gateway::admin::model::PortalState;
use firezone_gateway::portal::channel::Event;
use firezone_gateway::portal::dial::tls_config_with;
use firezone_gateway::portal::messages::{Egress, Ingress};
use firezone_gateway::portal::{Driver, GaveUpReason, PortalConfig};
use firezone_lab::portal::faults::{ChannelFault, FaultSet, JoinFault, Refuse};
use firezone_lab::portal::store::Role;
use firezone_lab::portal::tls::{Front, Identity};
use firezone_lab::portal::{Options, Policy, Portal, Timings};
use opentelemetry::trace::{Status, TracerProvider as _};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use rustls::RootCertStore;
use secrecy::SecretString;
use tokio::time::{Instant, timeout};
use tracing_subscriber::layer::SubscriberExt as _;

const TOKEN: &str = ".gateway-token";
const POLICY: &str = "
account_slug: test
sites: [{id: 5a5a5a5a-0000-4000-8000-000000000001, name: Lab}]
gateway_tokens: [{token: .gateway-token}]
client_tokens: []
resources: []
relays: []
";

// ---- Spans ----

/// The outage span goes through the process's own tracer provider, so one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[derive(Debug, Clone, Default)]
struct Exported(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Exported {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

fn attribute(span: &SpanData, name: &str) -> Option<String> {
    let found = span.attributes.iter().find(|kv| kv.key.as_str() == name)?;
    Some(found.value.to_string())
}

// ---- The lab ----

struct Lab {
    driver: Driver,
    spans: Exported,
    _guards: (
        MutexGuard<'static, ()>,
        tracing::subscriber::DefaultGuard,
        tracing::Dispatch,
    ),
}

async fn portal_at(address: &str, timings: Timings) -> Portal {
    Portal::start(Options {
        listen: vec![address.parse().unwrap()],
        control: "127.0.0.1:0".parse().unwrap(),
        policy: Policy::parse(POLICY).unwrap(),
        state: None,
        timings,
    })
    .await
    .unwrap()
}

async fn portal() -> Portal {
    portal_at("127.0.0.1:0", Timings::default()).await
}

fn set(portal: &Portal, faults: FaultSet) {
    portal.with(|core, now| core.set_faults(now, Role::Gateway, faults));
}

fn refuse(status: u16, retry_after: Option<&str>, code: Option<&str>) -> FaultSet {
    FaultSet {
        refuse: Some(Refuse {
            status,
            retry_after: retry_after.map(str::to_owned),
            code: code.map(str::to_owned),
            times: None,
        }),
        ..FaultSet::default()
    }
}

impl Lab {
    fn new(url: &str) -> Self {
        Self::with(url, RootCertStore::empty(), |_| {})
    }

    fn at(address: SocketAddr) -> Self {
        Self::new(&format!("ws://{address}"))
    }

    fn with(url: &str, roots: RootCertStore, change: impl FnOnce(&mut PortalConfig)) -> Self {
        let one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let spans = Exported::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(spans.clone())
            .build();
        // See the driver's own tests for the second dispatcher.
        let second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
        opentelemetry::global::set_tracer_provider(provider);
        let mut config = PortalConfig {
            api_url: url.parse().unwrap(),
            token: SecretString::from(TOKEN),
            external_id_source: "edge-1".to_owned(),
            name: "edge".to_owned(),
            public_key: [2; 32],
            max_partition_time: None,
            user_agent: "Debian/13 gateway/1.6.0".to_owned(),
            exit_on_auth_failure: false,
        };
        change(&mut config);
        Self {
            driver: Driver::with_tls(config, tls_config_with(roots)).unwrap(),
            spans,
            _guards: (one, guard, second),
        }
    }

    /// Runs until an event fits.
    async fn until(&mut self, fits: impl Fn(&Event) -> bool) -> Event {
        let wait = async {
            loop {
                let event = self.driver.next().await;
                if fits(&event) {
                    return event;
                }
            }
        };
        timeout(Duration::from_secs(600), wait).await.unwrap()
    }

    async fn configured(&mut self) {
        self.until(|e| matches!(e, Event::Message(Ingress::Init(_))))
            .await;
    }

    async fn lost(&mut self) -> String {
        match self
            .until(|e| matches!(e, Event::Disconnected { .. }))
            .await
        {
            Event::Disconnected { failure, .. } => failure.to_string(),
            _ => unreachable!("that is what was waited for"),
        }
    }

    /// Runs for a while, whatever happens.
    async fn run(&mut self, duration: Duration) {
        let _ = timeout(duration, async {
            loop {
                self.driver.next().await;
            }
        })
        .await;
    }

    /// Runs until so many attempts were made and the last of them failed.
    async fn failed_attempts(&mut self, attempts: u64) {
        while self.driver.status().attempts < attempts
            || self.driver.status().state != PortalState::Waiting
        {
            self.run(Duration::from_millis(50)).await;
        }
    }

    fn spans(&self, name: &str) -> Vec<SpanData> {
        let spans = self.spans.0.lock().unwrap();
        spans.iter().filter(|s| s.name == name).cloned().collect()
    }

    /// The status and the span of the last attempt name this cause.
    fn assert_named(&self, kind: &str, words: &str) {
        let error = self.driver.status().last_error.expect("something failed");
        assert_eq!(error.kind, kind, "{}", error.message);
        assert!(error.message.contains(words), "{}", error.message);
        let attempts = self.spans("portal.connect");
        let last = attempts.last().unwrap();
        assert_eq!(attribute(last, "error.type").as_deref(), Some(kind));
        let Status::Error { description } = &last.status else {
            panic!("{:?}", last.status);
        };
        assert!(description.contains(words), "{description}");
        assert!(!format!("{attempts:?}").contains(TOKEN));
    }

    /// The step of the last attempt that failed.
    fn assert_step(&self, step: &str, kind: &str) {
        let steps = self.spans(step);
        let last = steps.last().unwrap();
        assert_eq!(attribute(last, "error.type").as_deref(), Some(kind));
        let attempts = self.spans("portal.connect");
        let parent = attempts.last().unwrap().span_context.span_id();
        assert_eq!(last.parent_span_id, parent, "a child of the attempt");
    }

    /// The outage that ended last.
    async fn assert_outage(&mut self, cause: &str, last_cause: &str) {
        self.run(Duration::from_secs(11)).await;
        let status = self.driver.status();
        assert_eq!(status.state, PortalState::Joined);
        assert_eq!(status.backoff, None, "the outage is over");
        let outages = self.spans("portal.outage");
        let outage = outages.last().unwrap();
        let named = |name| attribute(outage, name);
        assert_eq!(named("portal.outage.cause").as_deref(), Some(cause));
        assert_eq!(
            named("portal.outage.last_cause").as_deref(),
            Some(last_cause)
        );
        assert_eq!(named("portal.outage.outcome").as_deref(), Some("joined"));
        assert_eq!(outage.status, Status::Ok);
        let attempts = self.spans("portal.connect");
        let joined = attempts.last().unwrap();
        assert!(
            outage
                .links
                .iter()
                .any(|link| link.span_context == joined.span_context),
            "linked to the attempt that ended it"
        );
    }
}

async fn free_address() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

// ---- What can go wrong before there is a session ----

#[tokio::test(start_paused = true)]
async fn a_name_that_does_not_exist_is_dns() {
    let mut lab = Lab::new("ws://portal.invalid:8081");
    lab.failed_attempts(1).await;
    lab.assert_named("dns", "cannot resolve portal.invalid");
    lab.assert_step("dns.resolve", "dns");
}

#[tokio::test(start_paused = true)]
async fn a_portal_that_does_not_run_is_tcp_connect() {
    let mut lab = Lab::at(free_address().await);
    lab.failed_attempts(2).await;
    lab.assert_named("tcp_connect", "refused");
    lab.assert_step("tcp.connect", "tcp_connect");
    let second = &lab.spans("portal.connect")[1];
    let first = &lab.spans("portal.connect")[0];
    assert_eq!(second.links[0].span_context, first.span_context);
    assert_eq!(attribute(second, "portal.cause").unwrap(), "backoff");
}

#[tokio::test(start_paused = true)]
async fn a_portal_that_accepts_and_says_nothing_is_upgrade_timeout() {
    let portal = portal().await;
    set(
        &portal,
        FaultSet {
            blackhole: true,
            ..FaultSet::default()
        },
    );
    let mut lab = Lab::at(portal.addresses()[0]);
    let start = Instant::now();
    lab.failed_attempts(1).await;
    assert!(start.elapsed() >= Duration::from_secs(15));
    lab.assert_named("upgrade_timeout", "no answer");
    lab.assert_step("websocket.upgrade", "upgrade_timeout");
}

async fn behind_tls(names: &[&str], expired: bool, trust: bool) -> (Portal, Front, Lab) {
    let portal = portal().await;
    let names: Vec<_> = names.iter().map(|n| (*n).to_owned()).collect();
    let identity = Identity::new(&names, expired).unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let front = Front::start(listen, portal.addresses()[0], &identity)
        .await
        .unwrap();
    let mut roots = RootCertStore::empty();
    if trust {
        roots.add(identity.der()).unwrap();
    }
    let url = format!("wss://localhost:{}", front.address().port());
    (portal, front, Lab::with(&url, roots, |_| {}))
}

#[tokio::test(start_paused = true)]
async fn a_good_certificate_is_no_obstacle() {
    let (_portal, _front, mut lab) = behind_tls(&["localhost"], false, true).await;
    lab.configured().await;
    let handshake = &lab.spans("tls.handshake")[0];
    assert_eq!(attribute(handshake, "error.type"), None);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_for_another_name_is_tls_cert() {
    let (_portal, _front, mut lab) = behind_tls(&["portal.example"], false, true).await;
    lab.failed_attempts(1).await;
    lab.assert_named("tls_cert", "not valid for name");
    lab.assert_step("tls.handshake", "tls_cert");
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_is_tls_cert() {
    let (_portal, _front, mut lab) = behind_tls(&["localhost"], true, true).await;
    lab.failed_attempts(1).await;
    lab.assert_named("tls_cert", "expired");
    lab.assert_step("tls.handshake", "tls_cert");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_of_an_unknown_authority_is_tls_cert() {
    let (_portal, _front, mut lab) = behind_tls(&["localhost"], false, false).await;
    lab.failed_attempts(1).await;
    lab.assert_named("tls_cert", "SSL_CERT_FILE");
}

#[tokio::test(start_paused = true)]
async fn a_portal_without_tls_where_tls_is_expected_is_tls() {
    let portal = portal().await;
    let url = format!("wss://localhost:{}", portal.addresses()[0].port());
    let mut lab = Lab::new(&url);
    lab.failed_attempts(1).await;
    lab.assert_named("tls", "TLS handshake failed");
    lab.assert_step("tls.handshake", "tls");
}

#[tokio::test(start_paused = true)]
async fn http_503_with_retry_after_is_http_5xx_and_the_time_is_kept() {
    let portal = portal().await;
    set(&portal, refuse(503, Some("7"), Some("rate_limit")));
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.failed_attempts(1).await;
    lab.assert_named("http_5xx", "rate_limit");
    lab.assert_step("websocket.upgrade", "http_5xx");
    let span = &lab.spans("portal.connect")[0];
    let named = |name| attribute(span, name).unwrap();
    assert_eq!(named("http.response.status_code"), "503");
    assert_eq!(named("portal.problem.code"), "rate_limit");
    set(&portal, FaultSet::default());
    lab.configured().await;
    let second = &lab.spans("portal.connect")[1];
    assert_eq!(attribute(second, "portal.cause").unwrap(), "retry_after");
    let delay: u64 = attribute(second, "portal.backoff.delay_ms")
        .unwrap()
        .parse()
        .unwrap();
    assert!((7000..=8000).contains(&delay), "{delay}");
    lab.assert_outage("http_5xx", "http_5xx").await;
}

#[tokio::test(start_paused = true)]
async fn other_http_answers_are_told_apart() {
    for (status, kind) in [
        (302, "http_other"),
        (403, "http_4xx"),
        (409, "http_409"),
        (429, "http_429"),
        (500, "http_5xx"),
    ] {
        let portal = portal().await;
        set(&portal, refuse(status, None, None));
        let mut lab = Lab::at(portal.addresses()[0]);
        lab.failed_attempts(1).await;
        lab.assert_named(kind, &status.to_string());
    }
}

#[tokio::test(start_paused = true)]
async fn a_join_that_is_not_answered_is_join_timeout() {
    let portal = portal().await;
    set(
        &portal,
        FaultSet {
            join: JoinFault::Ignore,
            ..FaultSet::default()
        },
    );
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.failed_attempts(1).await;
    lab.assert_named("join_timeout", "5 s");
    lab.assert_step("channel.join", "join_timeout");
}

#[tokio::test(start_paused = true)]
async fn a_join_that_is_refused_is_join_refused_and_blocks() {
    let portal = portal().await;
    set(
        &portal,
        FaultSet {
            join: JoinFault::Refuse("disabled".to_owned()),
            ..FaultSet::default()
        },
    );
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.until(|e| matches!(e, Event::Blocked { .. })).await;
    assert_eq!(lab.driver.status().state, PortalState::Blocked);
    lab.assert_named("join_refused", "disabled");
    lab.assert_step("channel.join", "join_refused");
}

#[tokio::test(start_paused = true)]
async fn an_old_portal_is_spoken_to_in_version_1() {
    let portal = portal().await;
    set(
        &portal,
        FaultSet {
            only_v1: true,
            ..FaultSet::default()
        },
    );
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.configured().await;
    assert!(lab.driver.status().url.ends_with("/gateway/websocket"));
    let attempts = lab.spans("portal.connect");
    let asked: Vec<_> = attempts
        .iter()
        .map(|span| attribute(span, "portal.protocol").unwrap())
        .collect();
    assert_eq!(asked, ["v2", "v1"]);
    assert_eq!(
        attribute(&attempts[0], "error.type").as_deref(),
        Some("http_4xx")
    );
    assert_eq!(
        attribute(&attempts[1], "portal.cause").as_deref(),
        Some("other_protocol")
    );
}

// ---- What can go wrong with a session ----

#[tokio::test(start_paused = true)]
async fn a_restart_is_server_close_and_one_outage() {
    let portal = portal().await;
    let address = portal.addresses()[0].to_string();
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.configured().await;
    lab.run(Duration::from_secs(11)).await;
    assert_eq!(lab.driver.status().backoff, None);
    let stop = portal.shut_down();
    let (words, ()) = tokio::join!(lab.lost(), stop);
    assert!(words.contains("1012"), "{words}");
    assert_eq!(lab.driver.status().last_error.unwrap().kind, "server_close");
    // Nobody is there when it is tried first.
    lab.failed_attempts(2).await;
    let _portal = portal_at(&address, Timings::default()).await;
    lab.configured().await;
    lab.assert_outage("server_close", "tcp_connect").await;
    let second = &lab.spans("portal.connect")[1];
    assert_eq!(attribute(second, "portal.cause").unwrap(), "spread");
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_crashes_after_every_join_is_channel_error_and_ever_rarer() {
    let portal = portal().await;
    set(
        &portal,
        FaultSet {
            channel: ChannelFault::Crash,
            ..FaultSet::default()
        },
    );
    let mut lab = Lab::at(portal.addresses()[0]);
    let start = Instant::now();
    for _ in 0..10 {
        let words = lab.lost().await;
        assert!(words.contains("crashed"), "{words}");
        assert_eq!(
            lab.driver.status().last_error.unwrap().kind,
            "channel_error"
        );
    }
    assert!(start.elapsed() > Duration::from_secs(15), "no hot loop");
    set(&portal, FaultSet::default());
    lab.configured().await;
    lab.assert_outage("channel_error", "channel_error").await;
    let outage = &lab.spans("portal.outage")[0];
    assert_eq!(attribute(outage, "portal.outage.failures").unwrap(), "10");
}

#[tokio::test(start_paused = true)]
async fn silence_after_the_join_is_stream_silent() {
    let portal = portal().await;
    set(
        &portal,
        FaultSet {
            channel: ChannelFault::Silent,
            ..FaultSet::default()
        },
    );
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.until(|e| matches!(e, Event::Connected)).await;
    let joined = Instant::now();
    let words = lab.lost().await;
    assert!(words.contains("configuration"), "{words}");
    assert!(joined.elapsed() >= Duration::from_secs(30));
    assert_eq!(
        lab.driver.status().last_error.unwrap().kind,
        "stream_silent"
    );
    set(&portal, FaultSet::default());
    lab.configured().await;
    lab.assert_outage("stream_silent", "stream_silent").await;
}

#[tokio::test(start_paused = true)]
async fn a_network_that_swallows_everything_is_heartbeat_timeout() {
    // The portal's own end of the connection must not make itself heard before.
    let timings = Timings {
        idle: Duration::from_secs(3600),
        ..Timings::default()
    };
    let portal = portal_at("127.0.0.1:0", timings).await;
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.configured().await;
    lab.run(Duration::from_secs(11)).await;
    set(
        &portal,
        FaultSet {
            blackhole: true,
            ..FaultSet::default()
        },
    );
    lab.lost().await;
    assert_eq!(
        lab.driver.status().last_error.unwrap().kind,
        "heartbeat_timeout"
    );
    set(&portal, FaultSet::default());
    lab.configured().await;
    lab.run(Duration::from_secs(11)).await;
    let outage = &lab.spans("portal.outage")[0];
    assert_eq!(
        attribute(outage, "portal.outage.cause").unwrap(),
        "heartbeat_timeout"
    );
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_cut_is_server_close() {
    let portal = portal().await;
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.configured().await;
    lab.run(Duration::from_secs(11)).await;
    portal.with(|core, now| core.kill_all(now, Role::Gateway));
    lab.lost().await;
    lab.configured().await;
    lab.assert_outage("server_close", "server_close").await;
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_revoked_is_confirmed_blocks_and_recovers_on_request() {
    let portal = portal().await;
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.configured().await;
    lab.run(Duration::from_secs(11)).await;
    portal.with(|core, now| core.set_token_revoked(now, TOKEN, true));
    let words = lab.lost().await;
    assert!(words.contains("token"), "{words}");
    assert_eq!(
        lab.driver.status().last_error.unwrap().kind,
        "token_expired"
    );
    lab.until(|e| matches!(e, Event::Blocked { .. })).await;
    lab.assert_named("http_401", "invalid_token");
    let confirmation = &lab.spans("portal.connect")[1];
    assert_eq!(
        attribute(confirmation, "portal.cause").unwrap(),
        "token_confirmation"
    );

    // An hour of it.
    let before = lab.driver.status().attempts;
    lab.run(Duration::from_secs(3600)).await;
    let checks = lab.driver.status().attempts - before;
    assert!((9..=12).contains(&checks), "{checks} checks in an hour");
    assert_eq!(lab.driver.status().state, PortalState::Blocked);

    portal.with(|core, now| core.set_token_revoked(now, TOKEN, false));
    let asked = Instant::now();
    lab.driver.retry_now();
    lab.configured().await;
    assert!(asked.elapsed() <= Duration::from_secs(5));
    assert_eq!(lab.driver.status().state, PortalState::Joined);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_token_blocks_until_another_one_is_read() {
    let portal = portal().await;
    let url = format!("ws://{}", portal.addresses()[0]);
    let mut lab = Lab::with(&url, RootCertStore::empty(), |config| {
        config.token = SecretString::from("mistyped");
    });
    lab.until(|e| matches!(e, Event::Blocked { .. })).await;
    lab.assert_named("http_401", "invalid_token");
    let read = Instant::now();
    lab.driver.token_read(SecretString::from("mistyped"));
    lab.run(Duration::from_secs(60)).await;
    assert_eq!(lab.driver.status().attempts, 1, "it is still the same");
    lab.driver.token_read(SecretString::from(TOKEN));
    lab.configured().await;
    assert!(read.elapsed() <= Duration::from_secs(65));
}

#[tokio::test(start_paused = true)]
async fn a_wrong_token_ends_the_process_where_that_is_configured() {
    let portal = portal().await;
    let url = format!("ws://{}", portal.addresses()[0]);
    let mut lab = Lab::with(&url, RootCertStore::empty(), |config| {
        config.token = SecretString::from("mistyped");
        config.exit_on_auth_failure = true;
    });
    let end = lab.until(|e| matches!(e, Event::GaveUp { .. })).await;
    assert!(matches!(
        end,
        Event::GaveUp {
            reason: GaveUpReason::AuthRefused,
            ..
        }
    ));
}

#[tokio::test(start_paused = true)]
async fn a_budget_ends_an_outage_with_its_last_cause() {
    let url = format!("ws://{}", free_address().await);
    let mut lab = Lab::with(&url, RootCertStore::empty(), |config| {
        config.max_partition_time = Some(Duration::from_secs(120));
    });
    let start = Instant::now();
    lab.until(|e| matches!(e, Event::GaveUp { .. })).await;
    assert!((119..=121).contains(&start.elapsed().as_secs()));
    assert_eq!(lab.driver.status().state, PortalState::GaveUp);
    let outage = &lab.spans("portal.outage")[0];
    assert_eq!(
        attribute(outage, "portal.outage.outcome").unwrap(),
        "gave_up"
    );
    assert_eq!(attribute(outage, "error.type").unwrap(), "tcp_connect");
    assert!(matches!(outage.status, Status::Error { .. }));
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_into_the_void_comes_back() {
    let portal = portal().await;
    let mut lab = Lab::at(portal.addresses()[0]);
    lab.configured().await;
    set(
        &portal,
        FaultSet {
            blackhole: true,
            ..FaultSet::default()
        },
    );
    let told = Egress::BroadcastIceCandidates {
        client_ids: vec![],
        candidates: vec!["candidate:1 1 udp 1 192.0.2.1 52625 typ host".to_owned()],
    };
    lab.driver.send(told.clone()).unwrap();
    let lost = lab.until(|e| matches!(e, Event::Disconnected { .. })).await;
    let Event::Disconnected { undelivered, .. } = lost else {
        unreachable!("that is what was waited for")
    };
    assert_eq!(undelivered, [told]);
}
