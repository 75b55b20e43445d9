//! Thousands of random histories. Whatever the portal and the network do, a few things must hold.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use rand::Rng;
use rand::rngs::SmallRng;
use serde_json::json;

use super::*;
use crate::portal::reconnect::{CONFIRM_BOUNDS, MAX_INTERVAL, MIN_DELAY, RECHECK_BOUNDS};

const STEPS: usize = 100;
const SCHEDULES: u64 = 2000;
/// `Retry-After` at its upper bound, with jitter.
const LONGEST_DELAY: Duration = Duration::from_secs(360);

struct World {
    rng: SmallRng,
    channel: Channel,
    now: Instant,
    /// What the driver would hold: an attempt or a socket.
    open: Option<Open>,
    join_ref: Option<u64>,
    heartbeats: Vec<u64>,
    joined_since: Option<Instant>,
    blocked: bool,
    ended: bool,
    last_dial: Option<Instant>,
    /// The next dial may come at any time: first one, new token.
    free_dial: bool,
    blocked_dials: VecDeque<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Open {
    Attempt,
    Socket,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let budget = rng
            .random_bool(0.5)
            .then(|| Duration::from_secs(rng.random_range(60..4000)));
        let config = ChannelConfig {
            max_partition_time: budget,
            exit_on_auth_failure: rng.random_bool(0.1),
            ..ChannelConfig::default()
        };
        let now = Instant::now();
        let mut channel = Channel::new(config, seed);
        channel.start(now);
        Self {
            rng,
            channel,
            now,
            open: None,
            join_ref: None,
            heartbeats: Vec::new(),
            joined_since: None,
            blocked: false,
            ended: false,
            last_dial: None,
            free_dial: true,
            blocked_dials: VecDeque::new(),
        }
    }

    fn settle(&mut self) {
        while self.channel.poll_milestone().is_some() {}
        while let Some(action) = self.channel.poll_action() {
            self.act(action);
        }
        while let Some(event) = self.channel.poll_event() {
            self.event(&event);
        }
        self.check();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Dial(_) => {
                assert_eq!(self.open, None, "two attempts or sockets at once");
                assert!(!self.ended, "dials after the end");
                if let Some(last) = self.last_dial
                    && !std::mem::take(&mut self.free_dial)
                {
                    assert!(
                        self.now - last >= MIN_DELAY,
                        "hot loop: {:?}",
                        self.now - last
                    );
                }
                if self.blocked {
                    self.blocked_dials.push_back(self.now);
                    if self.blocked_dials.len() > 13 {
                        self.blocked_dials.pop_front();
                        let span = self.now - self.blocked_dials[0];
                        assert!(
                            span >= Duration::from_secs(3600),
                            "13 checks within {span:?}"
                        );
                    }
                }
                self.free_dial = false;
                self.last_dial = Some(self.now);
                self.open = Some(Open::Attempt);
            }
            Action::SendText { text, reference } => {
                assert_eq!(self.open, Some(Open::Socket), "sends without a socket");
                if text.contains("phx_join") {
                    self.join_ref = Some(reference);
                } else if text.contains("heartbeat") {
                    self.heartbeats.push(reference);
                } else {
                    assert!(
                        self.channel.is_joined(),
                        "sends before the join reply: {text}"
                    );
                }
                if self.rng.random_bool(0.95) {
                    self.channel.written(self.now, reference);
                }
            }
            Action::Disconnect | Action::Close { .. } => {
                assert!(self.open.is_some(), "hangs up on nothing");
                self.drop_socket();
            }
        }
    }

    fn drop_socket(&mut self) {
        self.open = None;
        self.join_ref = None;
        self.heartbeats.clear();
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Connected => {
                assert!(self.joined_since.is_none() && !self.blocked);
                self.joined_since = Some(self.now);
            }
            Event::Disconnected { .. } => {
                assert!(self.joined_since.take().is_some(), "was not connected");
            }
            Event::Message(_) => assert!(self.joined_since.is_some()),
            Event::Blocked { .. } => {
                assert!(!std::mem::replace(&mut self.blocked, true), "blocked twice");
                self.blocked_dials.clear();
            }
            Event::Unblocked => assert!(std::mem::take(&mut self.blocked), "was not blocked"),
            Event::GaveUp { .. } => {
                assert!(!std::mem::replace(&mut self.ended, true), "gave up twice");
            }
        }
    }

    fn check(&self) {
        assert_eq!(self.channel.is_joined(), self.joined_since.is_some());
        let timeout = self.channel.poll_timeout();
        if let Some((at, timer)) = timeout {
            let wait = at.saturating_duration_since(self.now);
            match timer {
                Timer::Retry => assert!(wait <= LONGEST_DELAY, "{wait:?}"),
                Timer::Recheck => assert!(wait <= RECHECK_BOUNDS.1, "{wait:?}"),
                Timer::Attempt => assert!(wait <= ATTEMPT_LIMIT),
                Timer::JoinTimeout => assert!(wait <= JOIN_TIMEOUT),
                Timer::Heartbeat => assert!(wait <= HEARTBEAT_INTERVAL),
                Timer::Probe => assert!(wait <= PROBE_TIMEOUT),
                Timer::StableSession => assert!(wait <= STABLE_AFTER),
            }
        }
        assert_eq!(timeout.is_none(), self.ended, "something must happen next");
        let status = self.channel.status(self.now, std::time::SystemTime::now());
        if let Some(since) = self.joined_since
            && self.now - since > STABLE_AFTER
        {
            assert_eq!(status.backoff, None, "joined and stable, yet a backoff");
        }
        if let Some(left) = status.backoff.and_then(|b| b.budget_left) {
            assert!(left >= 0.0);
        }
    }

    fn failure(&mut self) -> Failure {
        let hint = self
            .rng
            .random_bool(0.4)
            .then(|| Duration::from_secs(self.rng.random_range(0..1000)));
        match self.rng.random_range(0..12) {
            0 => http(401, None),
            1..4 => http(409, None),
            4 => http(429, hint),
            5..7 => http(503, hint),
            7 => Failure::new(ErrorType::Dns, "dns"),
            _ => Failure::new(ErrorType::TcpConnect, "refused"),
        }
    }

    fn reply(&mut self, topic: &str, reference: u64, payload: serde_json::Value) {
        let text =
            json!({"topic": topic, "event": "phx_reply", "ref": reference, "payload": payload});
        self.channel.frame(self.now, &text.to_string());
    }

    fn push(&mut self, event: &str, payload: serde_json::Value) {
        let text = json!({"topic": "gateway", "event": event, "ref": null, "payload": payload});
        self.channel.frame(self.now, &text.to_string());
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0 => {
                self.free_dial = true;
                self.channel.token_changed(self.now);
            }
            1..4 => self.channel.network_changed(self.now),
            4..7 => self.elapse(),
            _ => match self.open {
                Some(Open::Attempt) => {
                    let takes = Duration::from_millis(self.rng.random_range(0..16_000));
                    self.now += takes;
                    if self.rng.random_bool(0.5) {
                        self.open = Some(Open::Socket);
                        self.channel.socket_opened(self.now);
                    } else {
                        self.open = None;
                        let failure = self.failure();
                        self.channel.attempt_failed(self.now, failure);
                    }
                }
                Some(Open::Socket) => self.portal(),
                None => self.elapse(),
            },
        }
        self.settle();
    }

    fn elapse(&mut self) {
        if let Some((at, _)) = self.channel.poll_timeout() {
            self.now = self.now.max(at);
            if self.rng.random_bool(0.1) {
                self.now += Duration::from_secs(self.rng.random_range(0..100));
            }
        }
        self.channel.handle_timeout(self.now);
    }

    /// What the portal does on an open socket.
    fn portal(&mut self) {
        let ok = json!({"status": "ok", "response": {}});
        match self.rng.random_range(0..40) {
            0 => {
                let code = [None, Some(1000), Some(1001), Some(1012)][self.rng.random_range(0..4)];
                self.drop_socket();
                let reason = String::new();
                self.channel
                    .closed(self.now, CloseCause::Frame { code, reason });
            }
            1 => {
                self.drop_socket();
                self.channel.closed(self.now, CloseCause::Eof);
            }
            2 => self.push("phx_close", json!({})),
            3 => self.push("phx_error", json!({})),
            4 => self.push("disconnect", json!({"reason": "token_expired"})),
            5 => self.channel.frame(self.now, "{\"topic\""),
            6 => {
                let no = json!({"status": "error", "response": {"reason": "unmatched topic"}});
                self.reply("gateway", 77, no);
            }
            7 => {
                if let Some(reference) = self.join_ref.take() {
                    let reason = ["disabled", "join crashed"][self.rng.random_range(0..2)];
                    let no = json!({"status": "error", "response": {"reason": reason}});
                    self.reply("gateway", reference, no);
                }
            }
            8..20 => {
                if let Some(reference) = self.join_ref.take() {
                    self.reply("gateway", reference, ok);
                }
            }
            20..24 => self.push(
                "init",
                json!({"interface": {"ipv4": "100.70.8.21", "ipv6": "fd00:2021:1111::7:4"}}),
            ),
            _ => {
                self.elapse();
                if self.rng.random_bool(0.9) {
                    self.settle();
                    for reference in std::mem::take(&mut self.heartbeats) {
                        self.reply("phoenix", reference, ok.clone());
                    }
                }
            }
        }
    }
}

fn http(status: u16, retry_after: Option<Duration>) -> Failure {
    Failure {
        http_status: Some(status),
        retry_after,
        ..Failure::new(ErrorType::from_status(status), "no")
    }
}

#[test]
fn invariants_hold_in_every_random_history() {
    let mut reached = BTreeMap::new();
    for seed in 0..SCHEDULES {
        let history = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            world.settle();
            let mut stable = false;
            for _ in 0..STEPS {
                world.step();
                stable |= world
                    .joined_since
                    .is_some_and(|since| world.now - since > STABLE_AFTER);
                if world.ended {
                    break;
                }
            }
            (world.ended, world.blocked, stable)
        });
        let outcome = history.unwrap_or_else(|_| panic!("seed {seed} breaks an invariant"));
        *reached.entry(outcome).or_insert(0) += 1;
    }
    // A schedule that never gets anywhere would prove nothing.
    let count = |f: fn(&(bool, bool, bool)) -> bool| -> u64 {
        reached.iter().filter(|(k, _)| f(k)).map(|(_, n)| *n).sum()
    };
    assert!(count(|(ended, ..)| *ended) > SCHEDULES / 50);
    assert!(count(|(_, blocked, _)| *blocked) > SCHEDULES / 50);
    assert!(count(|(.., stable)| *stable) > SCHEDULES / 4);
    assert!(MAX_INTERVAL < LONGEST_DELAY && CONFIRM_BOUNDS.0 > MIN_DELAY);
}
