#![allow(clippy::unwrap_used)]

use std::time::SystemTime;

use serde_json::{Value, json};

use super::*;
use crate::portal::reconnect::{
    CONFIRM_BOUNDS, DELIBERATE_CLOSE_SPREAD, INITIAL_INTERVAL, MIN_DELAY, RECHECK_BOUNDS,
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

    fn stable() -> Self {
        let mut lab = Self::joined();
        lab.advance(STABLE_AFTER);
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
            for frame in self.sent[before..].to_vec() {
                if alive && frame["event"] == "heartbeat" {
                    self.reply(
                        "phoenix",
                        frame["ref"].as_u64().unwrap(),
                        json!({"status": "ok", "response": {}}),
                    );
                }
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
                Event::Disconnected { failure } => format!("disconnected: {}", failure.kind),
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
    assert_eq!(lab.channel.send(lab.now, &Egress::NoRelays), Err(NotJoined));
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
    lab.channel.send(lab.now, &Egress::NoRelays).unwrap();
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
    lab.channel.send(lab.now, &Egress::NoRelays).unwrap();
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
    assert_eq!(lab.channel.send(lab.now, &Egress::NoRelays), Err(NotJoined));

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
    let mut lab = Lab::joined();
    lab.pass(Duration::from_secs(40) - TICK, false);
    assert!(lab.channel.is_joined());
    lab.pass(TICK, false);
    assert_eq!(
        lab.take_events(),
        ["connected", "disconnected: heartbeat_timeout"]
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
    let mut lab = Lab::joined();
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
    let mut lab = Lab::joined();
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

// ---- Failures and retries ----

#[test]
fn first_error_after_days_of_uptime_waits_not_fails() {
    let mut lab = Lab::new(budget(15));
    lab.join();
    lab.advance(3 * 24 * 60 * MINUTE);
    lab.take_events();
    lab.lose();
    assert_eq!(lab.take_events(), ["disconnected: server_close"]);
    assert!(lab.pause() <= INITIAL_INTERVAL.mul_f64(1.5));
    let status = lab.channel.status(lab.now, SystemTime::now());
    assert_eq!(status.backoff.unwrap().budget_left, Some(900.0));
}

#[test]
fn no_backoff_exists_while_all_is_well() {
    let mut lab = Lab::stable();
    assert_eq!(lab.channel.status(lab.now, SystemTime::now()).backoff, None);
    lab.lose();
    assert!(
        lab.channel
            .status(lab.now, SystemTime::now())
            .backoff
            .is_some()
    );
}

#[test]
fn an_outage_longer_than_its_budget_is_given_up_once() {
    let mut lab = Lab::new(budget(15));
    lab.join();
    lab.advance(24 * 60 * MINUTE);
    let lost = lab.now;
    lab.lose();
    while lab.state() != PortalState::GaveUp {
        lab.redial();
        lab.refuse();
    }
    assert_eq!(lab.now - lost, 15 * MINUTE);
    assert_eq!(
        lab.take_events().last().unwrap(),
        "gave up: BudgetExhausted"
    );
    assert_eq!(lab.channel.poll_timeout(), None);
    assert!(matches!(
        lab.milestones.last(),
        Some(Milestone::OutageEnded(o)) if !o.recovered && o.cause == ErrorType::ServerClose
    ));
}

#[test]
fn a_portal_that_is_slow_at_boot_is_waited_for() {
    let mut lab = Lab::started();
    for _ in 0..100 {
        lab.refuse();
        lab.redial();
    }
    assert!(
        lab.take_events().is_empty(),
        "never joined, so nothing was lost"
    );
    lab.join();
    assert_eq!(lab.take_events(), ["connected"]);
}

#[test]
fn a_portal_that_joins_and_drops_meets_growing_delays() {
    let mut lab = Lab::started();
    let mut pauses = Vec::new();
    for _ in 0..14 {
        lab.join();
        lab.advance(STABLE_AFTER - TICK);
        lab.lose();
        pauses.push(lab.pause());
        lab.redial();
    }
    assert!(
        pauses[0] < SECOND && pauses[13] >= 30 * SECOND,
        "{pauses:?}"
    );
}

#[test]
fn a_join_that_is_stable_ends_the_outage_at_the_time_of_the_join() {
    let mut lab = Lab::started();
    let first_error = lab.now;
    for _ in 0..8 {
        lab.refuse();
        lab.redial();
    }
    lab.join();
    let joined = lab.now;
    lab.advance(STABLE_AFTER - TICK);
    assert!(
        lab.channel
            .status(lab.now, SystemTime::now())
            .backoff
            .is_some()
    );
    lab.advance(TICK);
    assert_eq!(lab.channel.status(lab.now, SystemTime::now()).backoff, None);
    let expected = Milestone::OutageEnded(EndedOutage {
        since: first_error,
        until: joined,
        cause: ErrorType::TcpConnect,
        failures: 8,
        recovered: true,
    });
    assert_eq!(lab.milestones.last(), Some(&expected));
    lab.lose();
    assert!(lab.pause() < SECOND, "the next outage starts small");
}

#[test]
fn budget_stands_still_while_joined_but_not_stable() {
    let mut lab = Lab::new(budget(15));
    let left = |lab: &Lab| {
        let status = lab.channel.status(lab.now, SystemTime::now());
        status.backoff.unwrap().budget_left.unwrap()
    };
    lab.refuse();
    lab.redial();
    lab.advance(5 * SECOND);
    lab.join();
    let before = left(&lab);
    lab.advance(9 * SECOND);
    assert_eq!(left(&lab), before);
    lab.lose();
    lab.advance(TICK);
    assert!(left(&lab) < before);
}

#[test]
fn retry_after_decides_over_the_delay() {
    let mut lab = Lab::started();
    lab.fail(http(503, Some(40)));
    assert!((40 * SECOND..=44 * SECOND).contains(&lab.pause()));
    lab.redial();
    lab.fail(http(429, Some(86_400)));
    assert!(lab.pause() <= 330 * SECOND, "clamped");
}

#[test]
fn a_restarting_portal_is_given_room() {
    for cause in [
        CloseCause::Frame {
            code: Some(1012),
            reason: String::new(),
        },
        CloseCause::Frame {
            code: Some(1001),
            reason: "deploy".to_owned(),
        },
    ] {
        let mut lab = Lab::stable();
        lab.with(|c, now| c.closed(now, cause));
        assert!(lab.pause() <= DELIBERATE_CLOSE_SPREAD);
        assert!(
            lab.pause() > INITIAL_INTERVAL.mul_f64(1.5),
            "with this seed, not the ladder"
        );
    }
}

#[test]
fn phx_close_and_phx_error_reconnect() {
    for (event, kind) in [
        ("phx_close", "channel_close"),
        ("phx_error", "channel_error"),
    ] {
        let mut lab = Lab::stable();
        lab.take_events();
        lab.push(event, json!({}));
        assert_eq!(lab.take_events(), [format!("disconnected: {kind}")]);
        assert_eq!(lab.hangups, [Action::Close { code: CLOSE_NORMAL }]);
        lab.redial();
        lab.join();
    }
}

#[test]
fn an_attempt_that_hangs_is_cut_off() {
    let mut lab = Lab::started();
    lab.advance(ATTEMPT_LIMIT);
    assert_eq!(lab.hangups, [Action::Disconnect]);
    assert_eq!(lab.state(), PortalState::Waiting);
}

#[test]
fn a_conflict_with_the_own_old_connection_is_an_ordinary_retry() {
    let mut lab = Lab::stable();
    let lost = lab.now;
    lab.lose();
    loop {
        lab.redial();
        if lab.now - lost >= 37 * SECOND {
            break;
        }
        lab.fail(http(409, None));
        assert!(lab.pause() <= 10 * SECOND);
    }
    assert!(lab.now - lost <= 47 * SECOND);
    lab.join();
    assert!(!lab.take_events().iter().any(|e| e.starts_with("blocked")));
}

// ---- A refused token ----

#[test]
fn a_refused_token_blocks_and_is_checked_again_about_every_five_minutes() {
    let mut lab = Lab::started();
    lab.unauthorized();
    assert_eq!(lab.take_events(), ["blocked: http_401"]);
    for _ in 0..30 {
        assert_eq!(lab.state(), PortalState::Blocked);
        assert!((RECHECK_BOUNDS.0..=RECHECK_BOUNDS.1).contains(&lab.pause()));
        lab.redial();
        assert_eq!(lab.state(), PortalState::Blocked, "also during the check");
        lab.unauthorized();
    }
    assert!(lab.take_events().is_empty(), "said once");
    lab.redial();
    lab.join();
    assert_eq!(lab.take_events(), ["unblocked", "connected"]);
}

#[test]
fn a_check_that_cannot_reach_the_portal_stays_blocked() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.redial();
    lab.refuse();
    assert_eq!(lab.state(), PortalState::Blocked);
    assert!(lab.pause() >= RECHECK_BOUNDS.0);
}

#[test]
fn a_new_token_is_tried_at_once() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.advance(SECOND);
    lab.with(|c, now| c.token_changed(now));
    assert_eq!(lab.dials.last().unwrap().0, lab.now);
    assert_eq!(lab.take_events(), ["blocked: http_401", "unblocked"]);
    lab.refuse();
    assert!(lab.pause() < 2 * SECOND, "an ordinary failure again");
    lab.redial();
    lab.unauthorized();
    assert_eq!(lab.take_events(), ["blocked: http_401"]);
}

#[test]
fn a_new_token_cuts_a_running_attempt_short() {
    let mut lab = Lab::started();
    lab.with(|c, now| c.token_changed(now));
    assert_eq!(
        (lab.dials.len(), lab.hangups.as_slice()),
        (2, &[Action::Disconnect][..])
    );
    lab.open();
    lab.with(|c, now| c.token_changed(now));
    assert_eq!(lab.dials.len(), 3);
    assert_eq!(lab.hangups[1], Action::Close { code: CLOSE_NORMAL });
    let abandoned = |m: &&Milestone| **m == Milestone::AttemptAbandoned;
    assert_eq!(lab.milestones.iter().filter(abandoned).count(), 2);
}

#[test]
fn a_new_token_leaves_a_working_session_alone() {
    let mut lab = Lab::stable();
    lab.with(|c, now| c.token_changed(now));
    assert!(lab.channel.is_joined());
    assert_eq!(lab.dials.len(), 1);
}

#[test]
fn a_refused_join_blocks() {
    for reason in ["disabled", "invalid_version", "whatever"] {
        let mut lab = Lab::started();
        lab.open();
        lab.reply(
            "gateway",
            0,
            json!({"status": "error", "response": {"reason": reason}}),
        );
        assert_eq!(lab.take_events(), ["blocked: join_refused"]);
    }
}

#[test]
fn a_join_that_crashed_on_the_portal_is_no_refusal() {
    let mut lab = Lab::started();
    lab.open();
    lab.reply(
        "gateway",
        0,
        json!({"status": "error", "response": {"reason": "join crashed"}}),
    );
    assert_eq!(lab.state(), PortalState::Waiting);
}

#[test]
fn one_withdrawn_token_is_tried_once_more_before_it_counts() {
    let mut lab = Lab::stable();
    lab.take_events();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    assert_eq!(lab.take_events(), ["disconnected: token_expired"]);
    assert!((CONFIRM_BOUNDS.0..=CONFIRM_BOUNDS.1).contains(&lab.pause()));
    lab.redial();
    lab.join();
    lab.advance(STABLE_AFTER);
    assert_eq!(lab.state(), PortalState::Joined, "it was a mistake");

    lab.take_events();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    lab.redial();
    lab.join();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    assert_eq!(lab.take_events().last().unwrap(), "blocked: token_expired");
}

#[test]
fn a_withdrawn_token_that_is_then_refused_blocks_despite_trouble_in_between() {
    let mut lab = Lab::stable();
    lab.push("disconnect", json!({"reason": "token_expired"}));
    lab.redial();
    lab.refuse();
    lab.redial();
    lab.fail(http(409, None));
    lab.redial();
    lab.unauthorized();
    assert_eq!(lab.state(), PortalState::Blocked);
}

#[test]
fn other_disconnect_reasons_wait_for_the_close() {
    let mut lab = Lab::stable();
    lab.push("disconnect", json!({"reason": "certificate_revoked"}));
    assert!(lab.channel.is_joined());
}

#[test]
fn auth_failure_ends_the_process_only_where_configured() {
    let mut lab = Lab::new(ChannelConfig {
        exit_on_auth_failure: true,
        ..ChannelConfig::default()
    });
    lab.unauthorized();
    assert_eq!(lab.take_events(), ["gave up: AuthRefused"]);
    assert_eq!(lab.state(), PortalState::GaveUp);
}

#[test]
fn days_of_being_blocked_cost_no_budget() {
    let mut lab = Lab::new(budget(15));
    for _ in 0..1000 {
        lab.unauthorized();
        lab.redial();
    }
    lab.with(|c, now| c.token_changed(now));
    lab.refuse();
    assert_eq!(lab.state(), PortalState::Waiting);
}

// ---- Network changes ----

#[test]
fn a_network_change_ends_waiting_and_growth() {
    let mut lab = Lab::started();
    for _ in 0..20 {
        lab.refuse();
        lab.redial();
    }
    lab.refuse();
    assert!(lab.pause() > 20 * SECOND);
    lab.advance(2 * SECOND);
    lab.with(|c, now| c.network_changed(now));
    assert_eq!(lab.pause(), Duration::ZERO);
    lab.redial();
    lab.refuse();
    assert!(lab.pause() < SECOND, "growth starts over");
}

#[test]
fn a_burst_of_network_changes_does_not_make_a_hot_loop() {
    let mut lab = Lab::started();
    let start = lab.now;
    while lab.now - start < MINUTE {
        if lab.state() == PortalState::Connecting {
            lab.refuse();
        }
        lab.with(|c, now| c.network_changed(now));
        lab.advance(10 * TICK);
    }
    assert!(lab.dials.len() <= 100, "{}", lab.dials.len());
}

#[test]
fn an_attempt_that_saw_a_network_change_fails_cheaply() {
    let mut lab = Lab::started();
    for _ in 0..20 {
        lab.refuse();
        lab.redial();
    }
    lab.with(|c, now| c.network_changed(now));
    lab.advance(5 * SECOND);
    lab.refuse();
    assert_eq!(lab.pause(), Duration::ZERO);
}

#[test]
fn a_joined_socket_survives_a_network_change_if_it_answers() {
    let mut lab = Lab::stable();
    lab.with(|c, now| c.network_changed(now));
    let probe = lab.sent.last().unwrap().clone();
    assert_eq!(probe["event"], "heartbeat");
    lab.reply(
        "phoenix",
        probe["ref"].as_u64().unwrap(),
        json!({"status": "ok", "response": {}}),
    );
    lab.advance(MINUTE);
    assert!(lab.channel.is_joined());
}

#[test]
fn a_socket_that_does_not_survive_a_network_change_is_replaced_at_once() {
    let mut lab = Lab::stable();
    lab.take_events();
    lab.with(|c, now| c.network_changed(now));
    lab.pass(PROBE_TIMEOUT - TICK, false);
    assert!(lab.channel.is_joined());
    lab.pass(TICK, false);
    assert_eq!(lab.take_events(), ["disconnected: heartbeat_timeout"]);
    assert_eq!(lab.dials.last().unwrap().0, lab.now);
}

#[test]
fn a_network_change_does_not_hurry_a_blocked_channel() {
    let mut lab = Lab::started();
    lab.unauthorized();
    lab.advance(MINUTE);
    lab.with(|c, now| c.network_changed(now));
    assert!(lab.pause() >= RECHECK_BOUNDS.0 - MINUTE);
}

#[test]
fn an_old_network_change_does_not_hurry_a_later_failure() {
    let mut lab = Lab::started();
    lab.open();
    lab.with(|c, now| c.network_changed(now));
    lab.reply("gateway", 0, json!({"status": "ok", "response": {}}));
    lab.advance(60 * MINUTE);
    lab.lose();
    assert!(lab.pause() >= INITIAL_INTERVAL / 2);
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
    assert_eq!(lab.channel.send(lab.now, &Egress::NoRelays), Err(NotJoined));
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
    assert!(!outage.recovered);
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
            outage_elapsed: Duration::ZERO
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
            outage_elapsed: pause
        }
    );
}
