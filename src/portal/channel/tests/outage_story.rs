//! The story that the lazy policy is there for. A channel has been up for three days; then the
//! portal is away for fourteen minutes, or for sixteen; the budget is fifteen. The same schedule is
//! run with the policy that is created together with the channel and merely reset when it connects.

use std::sync::Arc;

use super::*;
use crate::admin::model::Status;
use crate::admin::{AdminState, Drain, Liveness, Moment, render_status};
use crate::config::Probe;

const THREE_DAYS: Duration = Duration::from_secs(3 * 24 * 3600);

#[derive(Debug, PartialEq)]
enum Ending {
    /// Joined again so long after the loss.
    Recovered(Duration),
    GaveUp {
        after: Duration,
        failures: u32,
        last_cause: ErrorType,
    },
}

/// Three days joined, then `away` without a portal; attempts take `each` to fail.
fn three_days_and_an_outage(away: Duration, each: Duration, eager: bool) -> Ending {
    let mut lab = Lab::new(budget(15));
    lab.come_up();
    let connected = lab.now;
    lab.advance(STABLE_AFTER);
    if eager {
        lab.channel.reconnect.create_eagerly(connected);
    }
    lab.advance(THREE_DAYS);
    let lost = lab.now;
    lab.with(|c, now| {
        c.closed(
            now,
            CloseCause::Frame {
                code: Some(1012),
                reason: "service restart".to_owned(),
            },
        );
    });
    loop {
        if lab.state() == PortalState::GaveUp {
            let Some(Milestone::OutageEnded(ended)) = lab.milestones.last() else {
                panic!("{:?}", lab.milestones.last());
            };
            return Ending::GaveUp {
                after: lab.now - lost,
                failures: ended.failures,
                last_cause: ended.last_cause,
            };
        }
        lab.redial();
        if lab.now - lost >= away {
            lab.come_up();
            lab.advance(STABLE_AFTER);
            assert_eq!(lab.state(), PortalState::Joined);
            return Ending::Recovered(lab.now - lost - STABLE_AFTER);
        }
        lab.advance(each);
        lab.fail(Failure::new(ErrorType::Dns, "no such name"));
    }
}

#[test]
fn after_three_days_an_outage_of_fourteen_minutes_is_survived_with_a_budget_of_fifteen() {
    for each in [0, 1, 15] {
        let ending = three_days_and_an_outage(14 * MINUTE, each * SECOND, false);
        let Ending::Recovered(after) = ending else {
            panic!("{ending:?}");
        };
        assert!((14 * MINUTE..=15 * MINUTE).contains(&after), "{after:?}");
    }
}

#[test]
fn an_outage_of_sixteen_minutes_is_given_up_with_its_last_cause() {
    for each in [0, 1, 15] {
        let ending = three_days_and_an_outage(16 * MINUTE, each * SECOND, false);
        let Ending::GaveUp {
            after,
            failures,
            last_cause,
        } = ending
        else {
            panic!("{ending:?}");
        };
        assert!((15 * MINUTE..=15 * MINUTE + each * SECOND).contains(&after));
        assert!(failures > 10, "{failures}");
        assert_eq!(last_cause, ErrorType::Dns);
    }
}

#[test]
fn the_eager_policy_fails_the_same_schedule_at_the_first_error() {
    for away in [SECOND, 14 * MINUTE, 16 * MINUTE] {
        assert_eq!(
            three_days_and_an_outage(away, Duration::ZERO, true),
            Ending::GaveUp {
                after: Duration::ZERO,
                failures: 1,
                last_cause: ErrorType::ServerClose,
            },
            "this is the mistake that lazy creation avoids"
        );
    }
}

#[test]
fn two_outages_a_day_apart_have_a_budget_each() {
    let mut lab = Lab::new(budget(15));
    lab.come_up();
    lab.advance(THREE_DAYS);
    for _ in 0..5 {
        let lost = lab.now;
        lab.lose();
        while lab.now - lost < 14 * MINUTE {
            lab.redial();
            if lab.now - lost < 14 * MINUTE {
                lab.refuse();
            }
        }
        lab.come_up();
        lab.advance(24 * 60 * MINUTE);
        assert_eq!(lab.state(), PortalState::Joined);
    }
}

#[test]
fn without_a_budget_an_outage_of_a_month_is_survived() {
    let mut lab = Lab::stable();
    let lost = lab.now;
    lab.lose();
    while lab.now - lost < 30 * 24 * 60 * MINUTE {
        lab.redial();
        lab.refuse();
    }
    lab.redial();
    lab.come_up();
    assert_eq!(lab.state(), PortalState::Joined);
}

const RUNBOOK: &str = include_str!("../../../../docs/runbook.md");

/// What operators are shown after so long, which is what the runbook shows.
#[test]
fn after_twenty_minutes_status_and_readiness_tell_cause_attempt_and_what_comes_next() {
    let mut lab = Lab::stable();
    let lost = lab.now;
    lab.lose();
    let refused = "cannot connect: 203.0.113.1:8081: Connection refused (os error 111)";
    let mut failures = 1;
    while lab.now - lost < 20 * MINUTE {
        lab.redial();
        failures += 1;
        lab.fail(Failure::new(ErrorType::TcpConnect, refused));
    }
    let (down, left) = (lab.now - lost, lab.pause());
    assert!((20 * MINUTE..22 * MINUTE).contains(&down), "{down:?}");
    assert!(failures < 40, "{failures} attempts in twenty minutes");

    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let status = Status {
        portal: lab.channel.status(lab.now, wall),
        ..Status::default()
    };
    let shown = render_status(&status, 1_800_000_000.0, false);
    for line in [
        "  waiting for the next attempt for 0s".to_owned(),
        format!(
            "  outage for {}m {}s: attempt {} in 1m 0s, never gives up; \
             it began with server_close\n",
            down.as_secs() / 60,
            down.as_secs() % 60,
            failures + 1
        ),
        format!("  last error 0s ago: tcp_connect: {refused}\n"),
    ] {
        assert!(shown.contains(&line), "{line}{shown}");
        assert!(
            RUNBOOK.contains(&line),
            "the runbook shows something else: {line}"
        );
    }

    let (_sender, receiver) = tokio::sync::watch::channel(Arc::new(status));
    let state = AdminState::new(receiver, Liveness::default(), Drain::default());
    let now = Moment {
        instant: lab.now,
        unix: 1_800_000_000.0,
    };
    let ready = state.report(Probe::Ready, now);
    let reason = format!(
        "not joined: waiting for attempt {} in {:.0} s (it began with server_close): tcp_connect: \
         {refused}",
        failures + 1,
        left.as_secs_f64().ceil()
    );
    assert_eq!(ready.checks[0].reason, reason);
    assert!(
        RUNBOOK.contains(&reason),
        "the runbook shows something else: {reason}"
    );
    assert!(
        state.report(Probe::Live, now).passed,
        "nobody is to restart it"
    );

    lab.redial();
    lab.come_up();
    lab.advance(STABLE_AFTER);
    let Some(Milestone::OutageEnded(ended)) = lab.milestones.last() else {
        panic!("{:?}", lab.milestones.last());
    };
    assert_eq!(ended.last_cause, ErrorType::TcpConnect);
    assert_eq!((ended.failures, ended.outcome), (failures, Outcome::Joined));
    assert_eq!(ended.since, lost);
}
