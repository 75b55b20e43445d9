//! Random schedules: whatever happened, a path that works is found.

#![allow(clippy::unwrap_used)]

use super::*;

/// Anything that a network, relays and a portal do, in any order; then everything is well again.
fn schedule(seed: u64) {
    let mut w = World::with_relays(2);
    w.rng = SmallRng::seed_from_u64(seed);
    let mut story = vec![format!("seed {seed}")];
    let mut direct_since = w.now;
    for _ in 0..30 {
        match w.rng.random_range(0..12) {
            0..3 => {
                w.direct_loss = *[0.0, 0.0, 0.05, 0.3, 1.0, 1.0].choose(&mut w.rng).unwrap();
                story.push(format!("direct loss {}", w.direct_loss));
            }
            3..6 => {
                let n = w.rng.random_range(0..2);
                w.relays[n].silent ^= true;
                story.push(format!("relay {n} silent: {}", w.relays[n].silent));
            }
            6 => {
                let n = w.rng.random_range(0..2);
                w.relays[n].restart();
                story.push(format!("relay {n} restarts"));
            }
            7 => {
                w.portal ^= true;
                story.push(format!("portal: {}", w.portal));
            }
            8 => {
                w.set_active(!w.active);
                story.push(format!("active: {}", w.active));
            }
            9 => {
                w.authorize();
                story.push("authorized again".to_owned());
            }
            _ => {}
        }
        // Without the portal nobody can be told to look again.
        if w.direct_loss > 0.0 || !w.portal {
            direct_since = w.now + Duration::from_secs(3600);
        } else {
            direct_since = direct_since.min(w.now);
        }
        let lasts = *[0.2, 1.0, 3.0, 10.0, 60.0].choose(&mut w.rng).unwrap();
        w.wake_ups = 0;
        w.run(lasts);
        story.push(format!("{lasts} s later: {:?}, {:?}", w.kind(), w.paths));
        assert!(
            w.wake_ups as f64 <= 60.0 * (lasts + 1.0),
            "{} wake-ups in {lasts} s\n{}",
            w.wake_ups,
            story.join("\n")
        );
        assert!(
            w.paths.len() as f64 <= 4.0 + lasts,
            "a storm of changes\n{}",
            story.join("\n")
        );
        if std::mem::take(&mut w.failures) > 0 {
            // The client notices as well, and asks for access anew.
            story.push("failed, and anew".to_owned());
            w.client = World::client(w.now);
            w.waiting.clear();
            w.authorize();
            direct_since = w.now;
        }
        if w.now.saturating_duration_since(direct_since) > Duration::from_secs(40) {
            assert!(w.kind().is_some(), "no path\n{}", story.join("\n"));
        }
    }
    w.direct_loss = 0.0;
    w.portal = true;
    w.set_active(true);
    for relay in &mut w.relays {
        relay.silent = false;
    }
    w.run(1.0);
    if std::mem::take(&mut w.failures) > 0 || w.gateway.describe(id()).is_none() {
        w.client = World::client(w.now);
        w.waiting.clear();
        w.authorize();
    }
    w.run(700.0);
    story.push(format!("in the end: {:?}, {:?}", w.kind(), w.paths));
    let (kind, now) = (w.kind(), w.now);
    assert_eq!(kind, Some(PathKind::Direct), "{}", story.join("\n"));
    assert_eq!(
        w.client_sends_to.unwrap().1,
        sock(GATEWAY),
        "{}",
        story.join("\n")
    );
    for relay in &w.relays {
        assert_eq!(relay.allocations(now), 1, "{}", story.join("\n"));
    }
    w.gateway.release_relays(w.now);
    w.run(10.0);
    for relay in &w.relays {
        assert_eq!(relay.allocations(w.now), 0, "allocations stay behind");
    }
}

fn schedules(shard: u64) {
    let count: u64 = std::env::var("FIREZONE_PATH_SCHEDULES")
        .ok()
        .map_or(60, |n| n.parse().expect("a number of schedules"));
    for seed in (shard..count).step_by(2) {
        schedule(seed);
    }
}

#[test]
fn every_random_schedule_ends_on_the_direct_path_1_of_2() {
    schedules(0);
}

#[test]
fn every_random_schedule_ends_on_the_direct_path_2_of_2() {
    schedules(1);
}
