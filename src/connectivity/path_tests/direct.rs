//! A direct path that dies and comes back, with a relay in between that keeps working.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn a_dead_direct_path_is_left_by_both_ends_in_four_seconds() {
    for phase in 0..15 {
        let mut w = World::new();
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(6.0);
        let (after, kind) = w.paths[0];
        assert_eq!(kind, PathKind::RelayLocal);
        assert!(after <= Duration::from_secs(4), "{after:?}");
        let (at, to) = w.client_sends_to.unwrap();
        assert_ne!(to, sock(GATEWAY));
        assert!(at - cut <= Duration::from_secs(4), "{:?}", at - cut);
        assert_eq!(w.paths.len(), 1, "and no other change: {:?}", w.paths);
        assert_eq!(w.withdrawals, 1);
    }
}

#[test]
fn the_client_is_told_of_a_dead_path_in_the_moment_it_is_left() {
    for phase in 0..15 {
        let mut w = World::new();
        // Timers of real machines are late, so that nothing else happens in the same moment.
        w.lateness = Duration::from_millis(1);
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(6.0);
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(0), "{to}");
        assert_eq!(at - cut, w.paths[0].0);
    }
}

#[test]
fn a_pause_of_a_second_and_a_half_moves_nothing() {
    // Wherever between two checks it begins.
    for phase in 0..15 {
        let mut w = World::new();
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        w.run(1.5);
        w.direct_loss = 0.0;
        w.run(30.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
        assert_eq!(w.withdrawals, 0);
        assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    }
}

#[test]
fn with_both_families_dead_the_client_does_not_try_one_after_the_other() {
    for phase in 0..15 {
        let mut w = World::with(1, true, false);
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(6.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(0), "{to}");
        assert!(at - cut <= Duration::from_secs(5), "{:?}", at - cut);
        w.direct_loss = 0.0;
        w.run(15.0);
        assert_eq!(w.kind(), Some(PathKind::Direct));
        assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY_V6));
    }
}

#[test]
fn a_search_makes_pairs_of_one_family_only() {
    let mut w = World::with(1, true, false);
    w.direct_loss = 1.0;
    w.run(6.0);
    w.direct_loss = 0.0;
    w.run(30.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn an_address_that_only_the_clients_relay_reaches_does_not_keep_the_client() {
    for phase in 0..15 {
        let mut w = World::with(1, true, true);
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(8.0);
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(0), "{to}");
        assert!(at - cut <= Duration::from_secs(5), "{:?}", at - cut);
        assert_ne!(w.kind(), Some(PathKind::Direct));
        assert_eq!(w.gaps, 0);
        w.direct_loss = 0.0;
        let withdrawals = w.withdrawals;
        w.run(15.0);
        assert_eq!(w.kind(), Some(PathKind::Direct));
        assert_eq!(w.withdrawals, withdrawals, "offered, and not taken back");
    }
}

#[test]
fn without_a_relay_of_ours_the_clients_is_not_cut_off() {
    let mut w = World::with(0, false, true);
    w.direct_loss = 1.0;
    w.run(60.0);
    assert_eq!(w.kind(), Some(PathKind::RelayRemote));
    assert_eq!(w.withdrawals, 0);
    assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    w.direct_loss = 0.0;
    w.run(60.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_lossy_direct_path_is_kept() {
    for seed in 0..10 {
        let mut w = World::new();
        w.rng = SmallRng::seed_from_u64(seed);
        w.direct_loss = 0.1;
        w.run(600.0);
        assert!(w.paths.is_empty(), "seed {seed}: {:?}", w.paths);
        assert_eq!(w.kind(), Some(PathKind::Direct));
    }
}

#[test]
fn both_ends_return_to_the_direct_path_when_it_works_again() {
    let mut w = World::new();
    w.direct_loss = 1.0;
    w.run(6.0);
    w.direct_loss = 0.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::Direct), "{:?}", w.paths);
    assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    assert_eq!(w.paths.len(), 1, "in one step: {:?}", w.paths);
    assert_eq!(w.gateway.describe(id()).unwrap().path_changes, 2);
}

#[test]
fn a_direct_path_that_stays_dead_is_looked_for_ever_more_rarely() {
    let mut w = World::new();
    w.direct_loss = 1.0;
    w.run(6.0);
    w.offers = 0;
    w.run(3600.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    assert!(w.paths.is_empty(), "traffic stays put: {:?}", w.paths);
    assert!((8..=14).contains(&w.offers), "{} offers", w.offers);
    assert!(w.withdrawals <= 1 + w.offers, "{}", w.withdrawals);
    // Whenever it comes back, it is found within the longest pause.
    w.direct_loss = 0.0;
    w.run(601.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn while_nothing_is_sent_nobody_looks_for_a_better_path() {
    let mut w = World::new();
    w.direct_loss = 1.0;
    w.run(6.0);
    w.set_active(false);
    w.run(30.0);
    w.offers = 0;
    w.run(3600.0);
    assert_eq!(w.offers, 0);
    w.set_active(true);
    w.direct_loss = 0.0;
    w.run(15.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

/// Its packets do not arrive, but its checks of other pairs do.
#[test]
fn a_client_that_wakes_up_on_a_dead_path_wakes_the_gateway() {
    let mut w = World::new();
    w.set_active(false);
    w.run(120.0);
    w.direct_loss = 1.0;
    w.run(5.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
    w.set_client_active(true);
    w.run(6.0);
    let (after, kind) = w.paths[0];
    assert_eq!(kind, PathKind::RelayLocal);
    assert!(after <= Duration::from_secs(6), "{after:?}");
    assert_ne!(w.client_sends_to.unwrap().1, sock(GATEWAY));
}

#[test]
fn what_was_found_dead_does_not_rise_because_nobody_sends() {
    for client_relay in [false, true] {
        for again in 0..30 {
            let mut w = World::with(1, false, client_relay);
            w.direct_loss = 1.0;
            w.run(6.0);
            let relayed = w.kind();
            assert_ne!(relayed, Some(PathKind::Direct));
            w.set_active(false);
            w.run(f64::from(15 + again));
            assert_eq!(w.paths, [], "{client_relay} {again}");
            // Whoever speaks first is heard.
            w.set_active(true);
            w.run(5.0);
            assert_eq!(w.paths, [], "{client_relay} {again}");
            assert_eq!((w.kind(), w.gaps), (relayed, 0));
        }
    }
}

#[test]
fn a_client_that_checks_as_idle_ones_do_leaves_the_gateway_idle() {
    let mut w = World::new();
    w.set_active(false);
    w.run(60.0);
    w.wake_ups = 0;
    w.run(3600.0);
    assert!(w.wake_ups < 1000, "{}", w.wake_ups);
}

#[test]
fn without_the_portal_the_gateway_moves_at_once_and_the_client_by_itself() {
    let mut w = World::new();
    w.portal = false;
    w.direct_loss = 1.0;
    w.run(4.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    w.run(20.0);
    assert_ne!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    // It hears of everything at once when the portal is back.
    w.direct_loss = 0.0;
    w.portal = true;
    w.run(60.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
    assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
}

#[test]
fn a_direct_path_that_keeps_failing_is_trusted_ever_less() {
    let mut w = World::new();
    let mut away = Vec::new();
    for _ in 0..5 {
        w.direct_loss = 1.0;
        w.run(6.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        w.direct_loss = 0.0;
        let left = w.now;
        while w.kind() != Some(PathKind::Direct) {
            w.run(1.0);
        }
        away.push((w.now - left).as_secs());
        w.run(10.0);
    }
    assert!(away[4] > 3 * away[0], "{away:?}");
    // A minute of good behaviour is enough.
    w.run(60.0);
    w.direct_loss = 1.0;
    w.run(6.0);
    w.direct_loss = 0.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}
