#![allow(clippy::unwrap_used)]

mod answers_owed;
mod boundaries;
mod closing;
mod delivery;
mod http_answers;
mod messages;
mod network_changes;
mod outage_story;
mod refusals;
mod requests;
mod retries;
mod versions;

use std::time::SystemTime;

use serde_json::{Value, json};

use super::*;
use crate::portal::reconnect::{
    CONFIRM_BOUNDS, DELIBERATE_CLOSE_SPREAD, DelayReason, INITIAL_INTERVAL, MIN_DELAY,
    RECHECK_BOUNDS,
};

const TICK: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// A channel, the clock, and the little of a driver that the tests need: writes succeed at once.
struct Lab {
    channel: Channel,
    now: Instant,
    sent: Vec<Value>,
    dials: Vec<(Instant, Attempt)>,
    hangups: Vec<Action>,
    events: Vec<Event>,
    milestones: Vec<Milestone>,
    writes: bool,
}

impl Lab {
    fn new(config: ChannelConfig) -> Self {
        let mut lab = Self {
            channel: Channel::new(config, 42),
            now: Instant::now(),
            sent: Vec::new(),
            dials: Vec::new(),
            hangups: Vec::new(),
            events: Vec::new(),
            milestones: Vec::new(),
            writes: true,
        };
        lab.with(|c, now| c.start(now));
        lab
    }

    fn started() -> Self {
        Self::new(ChannelConfig::default())
    }

    fn joined() -> Self {
        let mut lab = Self::started();
        lab.join();
        lab
    }

    /// Joined and configured.
    fn up() -> Self {
        let mut lab = Self::started();
        lab.come_up();
        lab
    }

    fn stable() -> Self {
        let mut lab = Self::up();
        lab.advance(STABLE_AFTER);
        lab.take_events();
        lab
    }

    fn with(&mut self, input: impl FnOnce(&mut Channel, Instant)) {
        input(&mut self.channel, self.now);
        self.drain();
    }

    fn drain(&mut self) {
        self.milestones
            .extend(std::iter::from_fn(|| self.channel.poll_milestone()));
        while let Some(action) = self.channel.poll_action() {
            match action {
                Action::Dial(attempt) => self.dials.push((self.now, attempt)),
                Action::SendText { text, reference } => {
                    self.sent.push(serde_json::from_str(&text).unwrap());
                    if self.writes {
                        self.channel.written(self.now, reference);
                    }
                }
                hangup => self.hangups.push(hangup),
            }
        }
        self.events
            .extend(std::iter::from_fn(|| self.channel.poll_event()));
    }

    /// Lets time pass, stopping at every timer; answers heartbeats if the portal is `alive`.
    fn pass(&mut self, duration: Duration, alive: bool) {
        let end = self.now + duration;
        while let Some((at, _)) = self.channel.poll_timeout()
            && at <= end
        {
            self.now = self.now.max(at);
            let before = self.sent.len();
            self.with(|c, now| c.handle_timeout(now));
            let heartbeats: Vec<_> = self.sent[before..]
                .iter()
                .filter(|frame| alive && frame["event"] == "heartbeat")
                .map(|frame| frame["ref"].as_u64().unwrap())
                .collect();
            for reference in heartbeats {
                self.reply(
                    "phoenix",
                    reference,
                    json!({"status": "ok", "response": {}}),
                );
            }
        }
        self.now = end;
    }

    fn advance(&mut self, duration: Duration) {
        self.pass(duration, true);
    }

    fn open(&mut self) {
        self.with(|c, now| c.socket_opened(now));
    }

    fn reply(&mut self, topic: &str, reference: u64, payload: Value) {
        self.frame(
            json!({"topic": topic, "event": "phx_reply", "ref": reference, "payload": payload}),
        );
    }

    fn frame(&mut self, frame: Value) {
        self.with(|c, now| c.frame(now, &frame.to_string()));
    }

    fn push(&mut self, event: &str, payload: Value) {
        self.frame(json!({"topic": "gateway", "event": event, "ref": null, "payload": payload}));
    }

    fn join_ref(&self) -> u64 {
        let join = self
            .sent
            .iter()
            .rfind(|f| f["event"] == "phx_join")
            .unwrap();
        join["ref"].as_u64().unwrap()
    }

    fn join(&mut self) {
        self.open();
        let reference = self.join_ref();
        self.reply(
            "gateway",
            reference,
            json!({"status": "ok", "response": {}}),
        );
        assert!(self.channel.is_joined());
    }

    fn come_up(&mut self) {
        self.join();
        self.push("init", init());
    }

    fn fail(&mut self, failure: Failure) {
        self.with(|c, now| c.attempt_failed(now, failure));
    }

    fn refuse(&mut self) {
        self.fail(Failure::new(ErrorType::TcpConnect, "refused"));
    }

    fn unauthorized(&mut self) {
        self.fail(http(401, None));
    }

    fn lose(&mut self) {
        self.with(|c, now| c.closed(now, CloseCause::Eof));
    }

    /// Time until the next attempt.
    fn pause(&self) -> Duration {
        let (at, timer) = self.channel.poll_timeout().unwrap();
        assert!(matches!(timer, Timer::Retry | Timer::Recheck), "{timer:?}");
        at - self.now
    }

    /// What the next attempt will follow.
    fn next_cause(&self) -> AttemptCause {
        match self.channel.phase {
            Phase::Waiting { cause, .. } => cause,
            _ => panic!("not waiting"),
        }
    }

    /// Waits for the next attempt.
    fn redial(&mut self) {
        let dials = self.dials.len();
        let pause = self.pause();
        self.advance(pause);
        assert_eq!(self.dials.len(), dials + 1);
    }

    fn state(&self) -> PortalState {
        self.channel.status(self.now, SystemTime::now()).state
    }

    fn take_events(&mut self) -> Vec<String> {
        std::mem::take(&mut self.events)
            .iter()
            .map(|e| match e {
                Event::Connected => "connected".to_owned(),
                Event::Disconnected { failure, .. } => format!("disconnected: {}", failure.kind),
                Event::Message(_) => "message".to_owned(),
                Event::Blocked { failure } => format!("blocked: {}", failure.kind),
                Event::Unblocked => "unblocked".to_owned(),
                Event::GaveUp { reason, .. } => format!("gave up: {reason:?}"),
            })
            .collect()
    }
}

fn http(status: u16, retry_after: Option<u64>) -> Failure {
    Failure {
        http_status: Some(status),
        retry_after: retry_after.map(Duration::from_secs),
        ..Failure::new(ErrorType::from_status(status), "no")
    }
}

fn init() -> Value {
    json!({"interface": {"ipv4": "100.70.8.21", "ipv6": "fd00:2021:1111::7:4"}})
}

fn budget(minutes: u32) -> ChannelConfig {
    ChannelConfig {
        max_partition_time: Some(minutes * MINUTE),
        ..ChannelConfig::default()
    }
}

// ---- Joining ----

#[test]
fn join_is_the_first_frame_and_nothing_else_is_sent_before_its_reply() {
    let mut lab = Lab::started();
    lab.open();
    assert_eq!(
        lab.sent,
        [json!({"topic": "gateway", "event": "phx_join", "payload": null, "ref": 0})]
    );
    assert_eq!(
        lab.channel.send(lab.now, Egress::NoRelays),
        Err(NotJoined(Egress::NoRelays))
    );
    lab.drain();
    assert_eq!(lab.sent.len(), 1);
    assert_eq!(lab.state(), PortalState::Joining);
}

#[test]
fn capabilities_are_the_first_message_after_every_join() {
    let mut lab = Lab::joined();
    assert_eq!(lab.sent[1]["event"], "set_snownet_capabilities");
    assert_eq!(lab.sent[1]["payload"], json!({"iceless": false}));
    assert_eq!(lab.sent[1]["ref"], 1);
    lab.channel.send(lab.now, Egress::NoRelays).unwrap();
    lab.drain();
    assert_eq!(lab.sent[2]["event"], "no_relays");
    assert_eq!(lab.sent[2]["ref"], 2);
    assert_eq!(lab.take_events(), ["connected"]);
}

#[test]
fn references_restart_on_every_socket() {
    let mut lab = Lab::stable();
    lab.lose();
    lab.redial();
    lab.sent.clear();
    lab.join();
    let references: Vec<_> = lab
        .sent
        .iter()
        .map(|f| f["ref"].as_u64().unwrap())
        .collect();
    assert_eq!(references, [0, 1]);
}

#[test]
fn join_times_out_at_five_seconds_and_not_before() {
    let mut lab = Lab::started();
    lab.open();
    lab.pass(JOIN_TIMEOUT - TICK, false);
    assert_eq!(lab.state(), PortalState::Joining);
    lab.pass(TICK, false);
    assert_eq!(lab.state(), PortalState::Waiting);
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
    assert!(matches!(
        lab.milestones.last(),
        Some(Milestone::AttemptFailed(f)) if f.kind == ErrorType::JoinTimeout
    ));
}

#[test]
fn a_reply_one_tick_before_the_limit_joins() {
    let mut lab = Lab::started();
    lab.open();
    lab.pass(JOIN_TIMEOUT - TICK, false);
    lab.reply("gateway", 0, json!({"status": "ok", "response": {}}));
    lab.pass(SECOND, false);
    assert!(lab.channel.is_joined());
}

#[test]
fn join_reply_with_a_filled_response_joins_too() {
    let mut lab = Lab::started();
    lab.open();
    lab.reply(
        "gateway",
        0,
        json!({"status": "ok", "response": {"motd": "hi"}}),
    );
    assert!(lab.channel.is_joined());
}

#[test]
fn replies_with_another_reference_or_topic_do_not_join() {
    let mut lab = Lab::started();
    lab.open();
    lab.reply("gateway", 1, json!({"status": "ok", "response": {}}));
    lab.reply("phoenix", 0, json!({"status": "ok", "response": {}}));
    lab.frame(
        json!({"topic": "gateway", "event": "phx_reply", "ref": null,
        "payload": {"status": "ok", "response": {}}}),
    );
    assert_eq!(lab.state(), PortalState::Joining);
}

#[test]
fn messages_that_overtake_the_join_reply_follow_connected() {
    let mut lab = Lab::started();
    lab.open();
    lab.push("init", init());
    assert!(lab.events.is_empty());
    lab.reply("gateway", 0, json!({"status": "ok", "response": {}}));
    assert_eq!(lab.take_events(), ["connected", "message"]);
}

#[test]
fn unmatched_topic_joins_again_on_the_same_socket() {
    let mut lab = Lab::stable();
    lab.take_events();
    lab.channel.send(lab.now, Egress::NoRelays).unwrap();
    lab.drain();
    let refused = lab.sent.last().unwrap()["ref"].as_u64().unwrap();
    let no = json!({"status": "error", "response": {"reason": "unmatched topic"}});
    lab.reply("gateway", refused, no.clone());
    lab.reply("gateway", refused, no);
    assert_eq!(
        lab.join_ref(),
        refused + 1,
        "one join with a fresh reference"
    );
    assert_eq!(
        lab.channel.send(lab.now, Egress::NoRelays),
        Err(NotJoined(Egress::NoRelays))
    );

    let reference = lab.join_ref();
    lab.reply(
        "gateway",
        reference,
        json!({"status": "ok", "response": {}}),
    );
    assert_eq!(
        lab.take_events(),
        ["disconnected: channel_error", "connected"]
    );
    assert_eq!(
        lab.sent.last().unwrap()["event"],
        "set_snownet_capabilities"
    );
    assert_eq!((lab.dials.len(), lab.hangups.len()), (1, 0));
}

#[test]
fn a_portal_that_keeps_forgetting_the_join_gets_a_new_connection_after_a_delay() {
    let mut lab = Lab::joined();
    let no = json!({"status": "error", "response": {"reason": "unmatched topic"}});
    lab.reply("gateway", 1, no.clone());
    let reference = lab.join_ref();
    lab.reply(
        "gateway",
        reference,
        json!({"status": "ok", "response": {}}),
    );
    lab.reply("gateway", reference + 1, no);
    assert_eq!(lab.state(), PortalState::Waiting);
    assert!(lab.pause() >= MIN_DELAY);
}

// ---- Heartbeats ----

#[test]
fn heartbeats_leave_every_ten_seconds_from_the_upgrade_on() {
    let mut lab = Lab::started();
    lab.open();
    let opened = lab.now;
    lab.reply("gateway", 0, json!({"status": "ok", "response": {}}));
    let mut at = Vec::new();
    for _ in 0..35 {
        let before = lab.sent.len();
        lab.advance(SECOND);
        for frame in &lab.sent[before..] {
            assert_eq!(
                (&frame["topic"], &frame["event"]),
                (&json!("phoenix"), &json!("heartbeat"))
            );
            at.push((lab.now - opened).as_secs());
        }
    }
    assert_eq!(at, [10, 20, 30]);
}

#[test]
fn the_fourth_unanswered_heartbeat_is_a_failure() {
    let mut lab = Lab::up();
    lab.pass(Duration::from_secs(40) - TICK, false);
    assert!(lab.channel.is_joined());
    lab.pass(TICK, false);
    assert_eq!(
        lab.take_events(),
        ["connected", "message", "disconnected: heartbeat_timeout"]
    );
}

#[test]
fn answers_to_other_references_do_not_count_as_life() {
    let mut lab = Lab::joined();
    for _ in 0..40 {
        lab.pass(SECOND, false);
        lab.reply("phoenix", 4711, json!({"status": "ok", "response": {}}));
    }
    assert!(!lab.channel.is_joined());
}

#[test]
fn three_missing_answers_are_forgiven_when_they_come_late() {
    let mut lab = Lab::up();
    lab.pass(Duration::from_secs(35), false);
    for frame in lab.sent.clone() {
        if frame["event"] == "heartbeat" {
            lab.reply(
                "phoenix",
                frame["ref"].as_u64().unwrap(),
                json!({"status": "ok", "response": {}}),
            );
        }
    }
    lab.pass(Duration::from_secs(30), false);
    assert!(lab.channel.is_joined());
}

#[test]
fn heartbeats_that_never_left_do_not_count_as_unanswered() {
    let mut lab = Lab::up();
    lab.writes = false;
    let before = lab.sent.len();
    lab.pass(10 * MINUTE, false);
    assert!(lab.channel.is_joined());
    assert_eq!(lab.sent.len(), before + 1, "and they do not pile up");
}

#[test]
fn after_a_suspended_host_one_heartbeat_is_sent() {
    let mut lab = Lab::stable();
    let before = lab.sent.len();
    lab.now += 60 * MINUTE;
    lab.with(|c, now| c.handle_timeout(now));
    assert_eq!(lab.sent.len(), before + 1);
    assert!(lab.channel.is_joined());
}

// ---- Tolerance ----

#[test]
fn bad_frames_are_counted_and_nothing_else() {
    let mut lab = Lab::stable();
    lab.take_events();
    lab.push("brand_new_event", json!({"x": 1}));
    lab.push("brand_new_event", json!({"x": 1}));
    lab.push("resource_updated", json!({"type": "teleporter"}));
    lab.with(|c, now| c.frame(now, "[1,2,3]"));
    lab.push(
        "ice_candidates",
        json!({"client_id": "11111111-2222-4333-8444-555555555555", "candidates": [1]}),
    );
    let counters = lab.channel.counters();
    assert_eq!(
        (
            counters.unknown_events,
            counters.refused_messages,
            counters.undecodable_frames,
            counters.skipped_items
        ),
        (2, 1, 1, 1)
    );
    assert!(lab.channel.is_joined());
    assert_eq!(lab.take_events(), ["message"]);
}

#[test]
fn truncated_json_reconnects() {
    let mut lab = Lab::stable();
    lab.take_events();
    lab.with(|c, now| c.frame(now, r#"{"topic":"gate"#));
    assert_eq!(lab.take_events(), ["disconnected: protocol"]);
}

#[test]
fn error_replies_to_messages_are_harmless() {
    let mut lab = Lab::stable();
    for reason in ["unknown_message", "invalid_ref"] {
        lab.reply(
            "gateway",
            1,
            json!({"status": "error", "response": {"reason": reason}}),
        );
    }
    assert!(lab.channel.is_joined());
}

#[test]
fn inputs_that_belong_to_nothing_are_ignored() {
    let mut lab = Lab::started();
    lab.refuse();
    let pause = lab.pause();
    lab.refuse();
    lab.open();
    lab.lose();
    lab.push("phx_close", json!({}));
    lab.with(|c, now| c.written(now, 0));
    lab.with(|c, now| c.start(now));
    assert_eq!(lab.pause(), pause);
    assert_eq!((lab.dials.len(), lab.sent.len()), (1, 0));
}

// ---- Closing and status ----

#[test]
fn closing_says_goodbye_and_ends_everything() {
    let mut lab = Lab::stable();
    lab.with(|c, now| c.close(now));
    assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
    assert_eq!(lab.channel.poll_timeout(), None);
    assert_eq!(lab.state(), PortalState::Closed);
    assert_eq!(
        lab.channel.send(lab.now, Egress::NoRelays),
        Err(NotJoined(Egress::NoRelays))
    );
}

#[test]
fn closing_during_an_outage_reports_it_as_abandoned() {
    let mut lab = Lab::started();
    lab.refuse();
    lab.redial();
    lab.with(|c, now| c.close(now));
    assert_eq!(lab.hangups, [Action::Disconnect]);
    let [
        ..,
        Milestone::AttemptAbandoned,
        Milestone::OutageEnded(outage),
    ] = lab.milestones.as_slice()
    else {
        panic!("{:?}", lab.milestones);
    };
    assert_eq!(outage.outcome, Outcome::Abandoned);
}

#[test]
fn status_dates_everything_by_the_wall_clock() {
    let mut lab = Lab::started();
    lab.advance(2 * SECOND);
    lab.refuse();
    let pause = lab.pause().as_secs_f64();
    lab.advance(100 * TICK);
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let status = lab.channel.status(lab.now, wall);
    let close = |a: f64, b: f64| (a - b).abs() < 1e-3;
    let backoff = status.backoff.unwrap();
    assert_eq!(status.state, PortalState::Waiting);
    assert!(close(status.since, 999_999.9));
    assert!(close(backoff.outage_since, 999_999.9));
    assert!(close(backoff.next_attempt_at.unwrap(), 999_999.9 + pause));
    assert_eq!((backoff.attempt, backoff.budget_left), (1, None));
    assert_eq!(status.last_error.unwrap().kind, "tcp_connect");
    assert_eq!((status.attempts, status.joins), (1, 0));

    lab.redial();
    lab.join();
    let joined_at = lab.now;
    lab.push("init", init());
    lab.advance(30 * SECOND);
    let status = lab.channel.status(lab.now, wall);
    assert_eq!(status.state, PortalState::Joined);
    assert!(close(
        status.since,
        1_000_000.0 - (lab.now - joined_at).as_secs_f64()
    ));
    assert!(
        close(status.last_message_at.unwrap(), 999_970.0),
        "heartbeats do not count"
    );
    assert!(
        status.initialized && status.last_error.is_some(),
        "the error is kept"
    );
}

#[test]
fn attempts_carry_what_telemetry_needs() {
    let mut lab = Lab::started();
    assert_eq!(
        lab.dials[0].1,
        Attempt {
            number: 1,
            of_outage: 1,
            delay: Duration::ZERO,
            outage_elapsed: Duration::ZERO,
            protocol: Protocol::V2,
            cause: AttemptCause::Start,
        }
    );
    lab.refuse();
    let pause = lab.pause();
    lab.redial();
    assert_eq!(
        lab.dials[1].1,
        Attempt {
            number: 2,
            of_outage: 2,
            delay: pause,
            outage_elapsed: pause,
            protocol: Protocol::V2,
            cause: AttemptCause::Failure(DelayReason::Backoff),
        }
    );
}
