//! Network, driver and owner of the schedules, with a clock that only moves when nothing is left
//! to do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use uuid::Uuid;

use super::ledger::Ledger;
use super::portal::{Portal, Weather, init, push};
use crate::gateway::outbox::Outbox;
use crate::ids::ClientId;
use crate::portal::channel::{
    ANSWER_TIMEOUT, ATTEMPT_LIMIT, Action, Channel, ChannelConfig, CloseCause, Event, GaveUpReason,
    HEARTBEAT_INTERVAL, JOIN_TIMEOUT, Milestone, NotJoined, Outcome, PROBE_TIMEOUT, STABLE_AFTER,
    Timer,
};
use crate::portal::error::{ErrorType, Failure};
use crate::portal::messages::{Egress, Ingress};
use crate::portal::reconnect::RECHECK_BOUNDS;

/// `Retry-After` at its upper bound, with jitter.
const LONGEST_DELAY: Duration = Duration::from_secs(360);
/// What the driver gives a socket to take data.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Timers that are due at the same moment; more is a loop.
const MAX_AT_ONCE: u32 = 20;
const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Next {
    Weather(Weather),
    /// An attempt reaches the portal.
    Arrives(u64),
    /// An attempt fails on the way.
    Fails(u64, ErrorType),
    ToPortal(u64, String),
    ToGateway(u64, String),
    /// The network or the portal ends a connection.
    Ends(u64, CloseCause),
    Happens(Happening),
    /// The end of the last good weather.
    Verdict,
}

#[derive(Debug, Clone, Copy)]
enum Happening {
    Authorize,
    Init,
    Garbage,
    Truncated,
    UnmatchedTopic,
    ChannelClosed,
    ChannelCrashed,
    Close(u16),
    Reset,
    /// The portal withdraws the token; by mistake, if it stays valid.
    TokenExpired {
        by_mistake: bool,
    },
    Candidate,
    NoRelays,
    NetworkChange,
    NewToken {
        good: bool,
    },
    Hangup,
    /// The socket takes no data any more.
    Stalls,
    ClockStep,
}

#[derive(Debug, Clone, Copy)]
enum Link {
    Nothing,
    Attempt(u64),
    Socket {
        id: u64,
        stalled: bool,
        /// Nothing passes any more, either way, and nobody says so.
        dead: bool,
    },
}

pub(super) struct World {
    rng: SmallRng,
    channel: Channel,
    start: Instant,
    now: Instant,
    wall: SystemTime,
    queue: BTreeMap<(Instant, u64), Next>,
    serial: u64,
    /// Frames do not overtake each other.
    last_delivery: [Instant; 2],
    weather: Weather,
    token_is_good: bool,
    portal: Portal,
    link: Link,
    ledger: Ledger,
    // The owner.
    joined: bool,
    outbox: Outbox,
    local: BTreeMap<ClientId, BTreeSet<String>>,
    timers_now: u32,
    over: bool,
    suspected: bool,
    reached: BTreeSet<&'static str>,
    story: Vec<String>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let config = ChannelConfig {
            max_partition_time: rng
                .random_bool(0.4)
                .then(|| Duration::from_secs(rng.random_range(60..4000))),
            exit_on_auth_failure: rng.random_bool(0.05),
            ..ChannelConfig::default()
        };
        let now = Instant::now();
        let mut world = Self {
            channel: Channel::new(config.clone(), seed),
            ledger: Ledger::new(now, &config),
            rng,
            start: now,
            now,
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
            queue: BTreeMap::new(),
            serial: 0,
            last_delivery: [now; 2],
            weather: Weather::Good,
            token_is_good: true,
            portal: Portal::default(),
            link: Link::Nothing,
            joined: false,
            outbox: Outbox::default(),
            local: BTreeMap::new(),
            timers_now: 0,
            over: false,
            suspected: false,
            reached: BTreeSet::new(),
            story: Vec::new(),
        };
        world.say(format!(
            "seed {seed}, budget {:?}, exit when the token is refused: {}",
            config.max_partition_time, config.exit_on_auth_failure
        ));
        world.plan();
        world
    }

    pub(super) fn tell(&self) {
        for line in &self.story {
            eprintln!("{line}");
        }
    }

    pub(super) fn reached(&self) -> impl Iterator<Item = &'static str> {
        let counters = self.channel.counters();
        let failures = counters.failures.keys().map(|kind| kind.as_str());
        failures
            .chain(self.reached.iter().copied())
            .collect::<BTreeSet<_>>()
            .into_iter()
    }

    fn say(&mut self, what: impl AsRef<str>) {
        let at = (self.now - self.start).as_secs_f64();
        self.story.push(format!("{at:>12.3}  {}", what.as_ref()));
    }

    // ---- What is drawn ----

    fn plan(&mut self) {
        let mut at = self.now;
        for _ in 0..self.rng.random_range(2..9) {
            let weather = self.draw_weather();
            let lasts = self.draw_length(&weather);
            self.at(at, Next::Weather(weather));
            for _ in 0..self.rng.random_range(0..6) {
                let when = at + lasts.mul_f64(self.rng.random::<f64>());
                let happening = self.draw_happening();
                self.at(when, Next::Happens(happening));
            }
            at += lasts;
        }
        self.at(at, Next::Weather(Weather::Good));
        self.at(at, Next::Happens(Happening::NewToken { good: true }));
        self.at(at + Duration::from_secs(1200), Next::Verdict);
    }

    fn draw_weather(&mut self) -> Weather {
        match self.rng.random_range(0..24) {
            0..8 => Weather::Good,
            8 => Weather::NoName,
            9 => Weather::Refused,
            10 => Weather::Swallowed,
            11 => Weather::Hangs,
            12 | 13 => Weather::Http {
                status: *[500, 502, 503, 503, 429, 400, 403, 302]
                    .choose(&mut self.rng)
                    .unwrap(),
                retry_after: [None, None, Some(0), Some(1), Some(30), Some(4000)]
                    .choose(&mut self.rng)
                    .copied()
                    .unwrap(),
            },
            14 => Weather::OnlyVersion1,
            15 => Weather::JoinsIgnored,
            16 => Weather::JoinsRefused,
            17 => Weather::JoinsCrash,
            18 => Weather::DropsAfterJoin,
            19 => Weather::NoConfiguration,
            20 => Weather::Stuck,
            _ => Weather::HalfOpen,
        }
    }

    fn draw_length(&mut self, weather: &Weather) -> Duration {
        let seconds = match self.rng.random_range(0..10) {
            0 => self.rng.random_range(0.01..1.0),
            1..4 => self.rng.random_range(1.0..60.0),
            4..9 => self.rng.random_range(60.0..1800.0),
            _ if *weather == Weather::Good => self.rng.random_range(1800.0..4000.0),
            _ => self.rng.random_range(1800.0..7200.0),
        };
        Duration::from_secs_f64(seconds)
    }

    fn draw_happening(&mut self) -> Happening {
        match self.rng.random_range(0..40) {
            0..4 => Happening::Authorize,
            4 => Happening::Init,
            5 => Happening::Garbage,
            6 => Happening::Truncated,
            7 => Happening::UnmatchedTopic,
            8 => Happening::ChannelClosed,
            9 => Happening::ChannelCrashed,
            10..13 => Happening::Close(
                *[1000, 1001, 1011, 1012, 1013]
                    .choose(&mut self.rng)
                    .unwrap(),
            ),
            13 => Happening::Reset,
            14 => Happening::TokenExpired {
                by_mistake: self.rng.random_bool(0.7),
            },
            15..27 => Happening::Candidate,
            27..30 => Happening::NoRelays,
            30..32 => Happening::NetworkChange,
            32..34 => Happening::NewToken {
                good: self.rng.random_bool(0.5),
            },
            34..36 => Happening::Hangup,
            36..38 => Happening::Stalls,
            _ => Happening::ClockStep,
        }
    }

    fn at(&mut self, at: Instant, next: Next) {
        self.serial += 1;
        self.queue.insert((at.max(self.now), self.serial), next);
    }

    fn latency(&mut self) -> Duration {
        Duration::from_micros(self.rng.random_range(100..200_000))
    }

    /// When a frame that leaves now arrives.
    fn delivery(&mut self, direction: usize) -> Instant {
        let at = (self.now + self.latency()).max(self.last_delivery[direction]);
        self.last_delivery[direction] = at;
        at
    }

    // ---- The loop ----

    pub(super) fn run(&mut self) {
        self.channel.start(self.now);
        self.settle();
        while !self.over {
            let next = self.queue.first_key_value().map(|((at, _), _)| *at);
            match self.channel.poll_timeout() {
                Some((at, _)) if next.is_none_or(|next| at <= next) => self.timer(at),
                _ => {
                    let Some(((at, _), next)) = self.queue.pop_first() else {
                        break;
                    };
                    self.advance(at);
                    self.happens(next);
                }
            }
            self.settle();
        }
    }

    fn advance(&mut self, at: Instant) {
        if at > self.now {
            self.wall += at - self.now;
            self.now = at;
            self.timers_now = 0;
        }
        self.ledger.advance(self.now);
    }

    fn timer(&mut self, at: Instant) {
        self.advance(at);
        self.timers_now += 1;
        assert!(
            self.timers_now <= MAX_AT_ONCE,
            "timers go round in circles: {:?}",
            self.channel.poll_timeout()
        );
        self.channel.handle_timeout(self.now);
    }

    fn happens(&mut self, next: Next) {
        match next {
            Next::Weather(weather) => {
                self.say(format!("weather: {weather:?}"));
                let before = std::mem::replace(&mut self.weather, weather);
                if self.weather == Weather::HalfOpen
                    && let Link::Socket { dead, .. } = &mut self.link
                {
                    *dead = true;
                }
                // What the hanging process had not seen goes down with it.
                if before == Weather::Stuck
                    && let Link::Socket { id, .. } = self.link
                    && self.portal.crash()
                {
                    self.send_to_gateway(id, push("phx_error", json!({})).to_string());
                }
            }
            Next::Arrives(id) => self.arrives(id),
            Next::Fails(id, kind) => {
                if matches!(self.link, Link::Attempt(current) if current == id) {
                    self.say(format!("attempt fails: {kind}"));
                    self.link = Link::Nothing;
                    let failure = Failure::new(kind, "no answer");
                    self.channel.attempt_failed(self.now, failure);
                }
            }
            Next::ToPortal(id, text) => self.arrive_at_portal(id, &text),
            Next::ToGateway(id, text) => {
                if self.is_live(id) {
                    self.channel.frame(self.now, &text);
                }
            }
            Next::Ends(id, cause) => {
                self.portal.ended(id);
                if self.is_current(id) {
                    self.say(format!("connection ends: {cause:?}"));
                    self.link = Link::Nothing;
                    self.channel.closed(self.now, cause);
                }
            }
            Next::Happens(happening) => self.happening(happening),
            Next::Verdict => self.verdict(),
        }
    }

    fn is_current(&self, id: u64) -> bool {
        matches!(self.link, Link::Socket { id: current, .. } if current == id)
    }

    fn is_live(&self, id: u64) -> bool {
        self.is_current(id) && !matches!(self.link, Link::Socket { dead: true, .. })
    }

    fn arrives(&mut self, id: u64) {
        if !matches!(self.link, Link::Attempt(current) if current == id) {
            return;
        }
        let hangs = match self.weather {
            Weather::Swallowed | Weather::HalfOpen => Some((5, ErrorType::TcpTimeout)),
            Weather::Hangs => Some((15, ErrorType::UpgradeTimeout)),
            _ => None,
        };
        if let Some((seconds, kind)) = hangs {
            // Now and then even the dialler hangs; the channel has a limit of its own.
            if self.rng.random_bool(0.95) {
                let at = self.now + seconds * SECOND;
                self.at(at, Next::Fails(id, kind));
            }
            return;
        }
        let attempt = self.ledger.attempt.expect("an attempt is under way");
        let answer = self.portal.upgrade(
            self.now,
            &self.weather,
            self.token_is_good,
            attempt.protocol,
            id,
        );
        match answer {
            Ok(()) => {
                self.say("socket opens");
                self.link = Link::Socket {
                    id,
                    stalled: false,
                    dead: false,
                };
                self.channel.socket_opened(self.now);
            }
            Err(failure) => {
                self.say(format!("attempt fails: {failure}"));
                self.link = Link::Nothing;
                self.channel.attempt_failed(self.now, failure);
            }
        }
    }

    fn arrive_at_portal(&mut self, id: u64, text: &str) {
        let was_joined = self.portal.is_joined();
        if text.contains("candidates") {
            self.say(format!("portal gets {text}"));
        }
        for frame in self.portal.frame(self.now, &self.weather, id, text) {
            self.send_to_gateway(id, frame.to_string());
        }
        if !was_joined && self.portal.is_joined() && self.weather == Weather::DropsAfterJoin {
            let at = self.delivery(1) + Duration::from_millis(self.rng.random_range(0..12_000));
            self.at(at, Next::Ends(id, CloseCause::Eof));
        }
    }

    fn send_to_gateway(&mut self, id: u64, text: String) {
        let at = self.delivery(1);
        self.at(at, Next::ToGateway(id, text));
    }

    fn happening(&mut self, happening: Happening) {
        use Happening as H;
        match happening {
            H::Candidate => return self.candidate(),
            H::NoRelays => {
                if self.joined {
                    self.send(Egress::NoRelays);
                }
                return;
            }
            H::NetworkChange => {
                self.say("the network changes");
                return self.channel.network_changed(self.now);
            }
            H::NewToken { good } => {
                if std::mem::replace(&mut self.token_is_good, good) != good {
                    self.say(format!("another token, good: {good}"));
                    self.channel.token_changed(self.now);
                }
                return;
            }
            H::Hangup => {
                self.say("SIGHUP");
                return self.channel.retry_now(self.now);
            }
            H::ClockStep => {
                self.say("the clock is set by an hour");
                self.wall += Duration::from_secs(3600);
                return;
            }
            _ => {}
        }
        let Link::Socket { id, stalled, .. } = &mut self.link else {
            return;
        };
        let id = *id;
        match happening {
            H::Stalls => {
                if !std::mem::replace(stalled, true) {
                    self.say("the socket takes no data any more");
                    let at = self.now + WRITE_TIMEOUT + HEARTBEAT_INTERVAL;
                    self.at(at, Next::Ends(id, CloseCause::WriteStalled));
                }
                return;
            }
            H::Close(code) => {
                let reason = "restart".to_owned();
                let at = self.delivery(1);
                let code = Some(code);
                return self.at(at, Next::Ends(id, CloseCause::Frame { code, reason }));
            }
            H::Reset => {
                let at = self.delivery(1);
                return self.at(at, Next::Ends(id, CloseCause::Io("reset".to_owned())));
            }
            _ => {}
        }
        if !self.portal.is_joined() || self.weather == Weather::Stuck {
            return;
        }
        let frame = match happening {
            H::Authorize => {
                self.serial += 1;
                self.portal.authorize(self.serial)
            }
            H::Init => init(),
            H::Garbage => push("device_posture_changed", json!({"new": [1, {}]})),
            H::Truncated => {
                return self.send_to_gateway(id, r#"{"topic":"gateway","ev"#.to_owned());
            }
            H::UnmatchedTopic => {
                json!({"topic": "gateway", "event": "phx_reply", "ref": 1,
                    "payload": {"status": "error", "response": {"reason": "unmatched topic"}}})
            }
            H::ChannelClosed => push("phx_close", json!({})),
            H::ChannelCrashed => push("phx_error", json!({})),
            H::TokenExpired { by_mistake } => {
                self.token_is_good = by_mistake;
                self.suspected = by_mistake;
                push("disconnect", json!({"reason": "token_expired"}))
            }
            _ => Value::Null,
        };
        self.say(format!("portal sends {}", frame["event"]));
        self.send_to_gateway(id, frame.to_string());
    }

    // ---- The owner ----

    fn candidate(&mut self) {
        let client = ClientId(Uuid::from_u128(self.rng.random_range(1..4)));
        let host = self.rng.random_range(1..4);
        let line = format!("candidate:1 1 udp 1 192.0.2.{host} 52625 typ host");
        let local = self.local.entry(client).or_default();
        let gone = local.remove(&line);
        if gone {
            self.outbox.invalidate(client, vec![line]);
        } else {
            local.insert(line.clone());
            self.outbox.add(client, vec![line]);
        }
        self.say(format!(
            "candidate .{host} of client {} {}",
            client.0.as_u128(),
            if gone { "goes" } else { "comes" }
        ));
        self.flush();
    }

    fn flush(&mut self) {
        if self.joined {
            for message in self.outbox.flush() {
                self.send(message);
            }
        }
    }

    fn send(&mut self, message: Egress) {
        if let Err(NotJoined(message)) = self.channel.send(self.now, message) {
            self.outbox
                .restore(Some(message).filter(Egress::survives_reconnect), |_| true);
        }
    }

    // ---- What the channel asks for ----

    fn settle(&mut self) {
        loop {
            if let Some(milestone) = self.channel.poll_milestone() {
                self.milestone(&milestone);
            } else if let Some(action) = self.channel.poll_action() {
                self.act(action);
            } else if let Some(event) = self.channel.poll_event() {
                self.event(event);
            } else {
                break;
            }
        }
        self.check();
    }

    fn milestone(&mut self, milestone: &Milestone) {
        match milestone {
            Milestone::Failed(failure) => {
                self.say(format!("failed: {} ({failure})", failure.kind));
            }
            Milestone::OutageEnded(ended) => {
                self.say(format!("outage ends: {ended:?}"));
                if ended.outcome == Outcome::Joined {
                    self.reached.insert("outage within budget");
                }
            }
            _ => {}
        }
        self.ledger.milestone(milestone);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Dial(attempt) => {
                self.say(format!(
                    "attempt {} ({}, {}) after {:?}",
                    attempt.number,
                    attempt.cause.as_str(),
                    attempt.protocol.as_str(),
                    attempt.delay
                ));
                assert!(
                    matches!(self.link, Link::Nothing),
                    "dials with {:?} open",
                    self.link
                );
                self.ledger.dialled(attempt);
                self.serial += 1;
                let id = self.serial;
                self.link = Link::Attempt(id);
                self.last_delivery = [self.now; 2];
                let at = self.now + self.latency();
                self.at(at, Next::Arrives(id));
            }
            Action::SendText { text, reference } => {
                let Link::Socket { id, stalled, dead } = self.link else {
                    panic!("sends without a socket: {text}");
                };
                assert!(
                    self.channel.is_joined()
                        || text.contains("phx_join")
                        || text.contains("heartbeat"),
                    "sends before the join reply: {text}"
                );
                if !stalled {
                    self.channel.written(self.now, reference);
                    if !dead {
                        let at = self.delivery(0);
                        self.at(at, Next::ToPortal(id, text));
                    }
                }
            }
            Action::Close { .. } | Action::Disconnect => {
                assert!(
                    !matches!(self.link, Link::Nothing),
                    "hangs up where nothing is open"
                );
                // The portal hears of it, unless the line is dead.
                if let Link::Socket {
                    id,
                    stalled: false,
                    dead: false,
                } = self.link
                {
                    let at = self.delivery(0);
                    self.at(at, Next::Ends(id, CloseCause::Eof));
                }
                self.link = Link::Nothing;
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Connected => {
                self.say("joined");
                assert!(!std::mem::replace(&mut self.joined, true), "joined twice");
                if !self.reached.insert("joined") {
                    self.reached.insert("rejoined");
                }
                self.ledger.joined();
                self.flush();
            }
            Event::Disconnected { undelivered, .. } => {
                assert!(std::mem::take(&mut self.joined), "was not joined");
                self.ledger.lost_without_failure();
                self.outbox.restore(undelivered, |_| true);
            }
            Event::Message(message) => {
                assert!(self.joined, "a message without a session");
                match message {
                    Ingress::CreateAuthorization(authorization) => {
                        let reference = authorization.reference;
                        self.send(Egress::AuthorizationCreated { reference });
                    }
                    Ingress::Init(_) => self.ledger.configured(),
                    _ => {}
                }
            }
            Event::Blocked { failure } => {
                self.say(format!("blocked: {}", failure.kind));
                self.reached.insert("blocked");
                self.ledger.blocked();
            }
            Event::Unblocked => {
                self.say("unblocked");
                self.reached.insert("unblocked");
                self.ledger.unblocked();
            }
            Event::GaveUp { reason, failure } => {
                self.say(format!("gives up: {reason:?}, {failure}"));
                self.reached.insert(match reason {
                    GaveUpReason::BudgetExhausted => "budget exhausted",
                    GaveUpReason::AuthRefused => "ended by a refused token",
                });
                self.ledger.gave_up(reason);
                self.over = true;
            }
        }
    }

    fn check(&mut self) {
        assert_eq!(self.channel.is_joined(), self.joined);
        let timeout = self.channel.poll_timeout();
        assert_eq!(timeout.is_none(), self.ledger.ended, "what happens next?");
        if let Some((at, timer)) = timeout {
            let wait = at.saturating_duration_since(self.now);
            let longest = match timer {
                Timer::Retry => LONGEST_DELAY,
                Timer::Recheck => RECHECK_BOUNDS.1,
                Timer::Attempt => ATTEMPT_LIMIT,
                Timer::JoinTimeout => JOIN_TIMEOUT,
                Timer::Answer => ANSWER_TIMEOUT,
                Timer::Heartbeat => HEARTBEAT_INTERVAL,
                Timer::Probe => PROBE_TIMEOUT,
                Timer::StableSession => STABLE_AFTER,
            };
            assert!(wait <= longest, "{timer:?} in {wait:?}");
        }
        let status = self.channel.status(self.now, self.wall);
        self.ledger.compare(&status);
        if self.ledger.is_stable() {
            // The timer that ends the outage may be due this very moment.
            let due = timeout.is_some_and(|(at, _)| at <= self.now);
            assert!(due || status.backoff.is_none(), "stable, yet a backoff");
            if status.backoff.is_none() {
                self.reached.insert("stable");
            }
        }
    }

    /// After twenty minutes of good weather everything must be as if nothing had ever been wrong.
    fn verdict(&mut self) {
        self.over = true;
        self.say("verdict");
        assert!(self.joined, "does not recover");
        assert!(self.ledger.is_stable() && !self.ledger.is_blocked());
        let told: BTreeMap<_, _> = self
            .portal
            .told
            .iter()
            .filter(|(_, candidates)| !candidates.is_empty())
            .map(|(client, candidates)| (client.clone(), candidates.clone()))
            .collect();
        let local: BTreeMap<_, _> = self
            .local
            .iter()
            .filter(|(_, candidates)| !candidates.is_empty())
            .map(|(client, candidates)| (client.to_string(), candidates.clone()))
            .collect();
        assert_eq!(told, local, "candidates were lost or made up");
        self.reached.insert("clean end");
        if self.portal.told_again {
            self.reached.insert("candidates told again");
        }
        if self.portal.version_1 {
            self.reached.insert("version 1");
        }
        if self.suspected {
            self.reached.insert("withdrawn token was good");
        }
    }
}
