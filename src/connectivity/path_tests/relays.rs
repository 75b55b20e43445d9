//! Relays that die, pause, forget or come and go under a path that leads through them.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn a_relay_that_was_quicker_at_first_does_not_delay_the_search_for_a_direct_path() {
    let mut w = World::before(2, false, true);
    w.direct_loss = 1.0;
    w.run(1.0);
    w.authorize();
    w.run(0.3);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    w.direct_loss = 0.0;
    w.run(3.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
    w.direct_loss = 1.0;
    w.run(5.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    w.direct_loss = 0.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_relay_that_dies_is_replaced_by_the_one_that_is_kept_warm() {
    for phase in 0..10 {
        let mut w = World::with_relays(2);
        let first = over_a_relay(&mut w);
        w.run(0.1 * f64::from(phase));
        let allocations: usize = w.relays.iter().map(|r| r.count(ALLOCATE)).sum();
        w.relays[first].silent = true;
        let cut = w.now;
        w.run(6.0);
        let second = &w.gateway.describe(id()).unwrap();
        let ip = second.local.unwrap().ip();
        assert_ne!(w.relay_at(ip), Some(first));
        assert!(w.paths[0].0 <= Duration::from_millis(1400), "{:?}", w.paths);
        let (at, to) = w.client_sends_to.unwrap();
        assert_ne!(w.relay_at(to.ip()), Some(first));
        assert!(at - cut <= Duration::from_secs(4), "{:?}", at - cut);
        let after: usize = w.relays.iter().map(|r| r.count(ALLOCATE)).sum();
        assert_eq!(allocations, after, "nothing had to be allocated for it");
    }
}

#[test]
fn the_clients_own_relay_is_left_as_quickly_as_one_of_ours() {
    for phase in 0..10 {
        let mut w = World::with(2, false, true);
        // The better one of ours is away, so that the client's is the best there is. Until then our
        // address has been offered more than once.
        w.relays[0].silent = true;
        w.direct_loss = 1.0;
        w.run(40.0 + 0.1 * f64::from(phase));
        assert_eq!(w.kind(), Some(PathKind::RelayRemote));
        w.client_relay_silent = true;
        let cut = w.now;
        w.run(6.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        assert!(w.paths[0].0 <= Duration::from_millis(1400), "{:?}", w.paths);
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(1), "{to}");
        assert!(at - cut <= Duration::from_secs(3), "{:?}", at - cut);
    }
}

#[test]
fn a_relay_that_forgets_us_leaves_no_gap_while_another_one_is_warm() {
    let mut w = World::with_relays(2);
    let first = over_a_relay(&mut w);
    w.relays[first].restart();
    w.gateway
        .relays
        .poke(w.now, RelayId(Uuid::from_u128(first as u128 + 1)));
    w.run(5.0);
    let ip = w.gateway.describe(id()).unwrap().local.unwrap().ip();
    assert_ne!(w.relay_at(ip), Some(first));
    assert_eq!(w.gaps, 0, "{:?}", w.paths);
}

#[test]
fn the_only_relay_is_used_again_soon_after_it_forgot_us() {
    for phase in 0..10 {
        let mut w = World::with_relays(1);
        let relay = over_a_relay(&mut w);
        w.run(0.1 * f64::from(phase));
        w.relays[relay].restart();
        let restarted = w.now;
        w.run(5.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (at, _) = w.client_sends_to.unwrap();
        assert!(at > restarted, "over a new address");
        let after = w.paths.last().unwrap().0;
        assert!(after <= Duration::from_millis(2500), "{:?}", w.paths);
    }
}

#[test]
fn a_relay_that_was_asked_just_before_it_forgot_us_is_asked_again() {
    let mut w = World::with_relays(1);
    let relay = over_a_relay(&mut w);
    w.gateway.relays.poke(w.now, RelayId(Uuid::from_u128(1)));
    w.gateway.handle_timeout(w.now);
    w.run(0.5);
    w.relays[relay].restart();
    w.run(6.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    let after = w.paths.last().unwrap().0;
    assert!(after <= Duration::from_secs(5), "{:?}", w.paths);
}

#[test]
fn a_relay_that_forgets_both_ends_is_used_again_without_the_clients_allocation() {
    for phase in 0..10 {
        let mut w = World::with(1, false, true);
        let relay = over_a_relay(&mut w);
        // It was asked just now, and is not asked again for five seconds: the path is lost by then.
        w.gateway.relays.poke(w.now, RelayId(Uuid::from_u128(1)));
        w.gateway.handle_timeout(w.now);
        w.run(0.1 + 0.1 * f64::from(phase));
        w.relays[relay].restart();
        w.client_relay_silent = true;
        let restarted = w.now;
        w.run(9.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (at, to) = w.client_sends_to.unwrap();
        assert!(at > restarted, "over a new address");
        assert_eq!(w.relay_at(to.ip()), Some(relay), "{to}");
    }
}

#[test]
fn a_relay_that_forgets_both_ends_does_not_hold_the_client_at_its_own_dead_address_there() {
    for phase in 0..10 {
        // Our own addresses were never withdrawn: the client reaches them through its relay.
        let mut w = World::before(2, false, true);
        w.direct_loss = 1.0;
        w.run(1.0);
        w.authorize();
        w.run(10.0 + 0.1 * f64::from(phase));
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let relay = w.relay_at(w.client_sends_to.unwrap().1.ip()).unwrap();
        w.relays[relay].restart();
        w.client_relay_silent = true;
        w.run(5.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (_, to) = w.client_sends_to.unwrap();
        assert!(w.relay_at(to.ip()).is_some(), "phase {phase}: {to}");
    }
}

#[test]
fn a_relay_that_pauses_for_half_a_second_is_kept() {
    let mut w = World::with_relays(2);
    let relay = over_a_relay(&mut w);
    for phase in 0..20 {
        w.run(10.0 + 0.05 * f64::from(phase));
        w.relays[relay].silent = true;
        w.run(0.6);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
        w.relays[relay].silent = false;
        w.run(10.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
    }
}

#[test]
fn a_relay_that_pauses_for_longer_is_left_once_and_taken_back_once() {
    for phase in 0..20 {
        let mut w = World::with_relays(2);
        let relay = over_a_relay(&mut w);
        w.run(10.0 + 0.05 * f64::from(phase));
        let before = w.reasons.len();
        w.relays[relay].silent = true;
        w.run(2.0);
        w.relays[relay].silent = false;
        w.run(60.0);
        let reasons = &w.reasons[before..];
        let expected = [PathReason::Dead, PathReason::Returned];
        assert_eq!(reasons, expected, "{phase}: {:?}", w.paths);
        assert_eq!(w.gaps, 0);
    }
}

#[test]
fn a_radio_link_that_is_silent_for_two_seconds_moves_nothing_between_relays() {
    for phase in 0..20 {
        let mut w = World::with_relays(2);
        over_a_relay(&mut w);
        w.run(10.0 + 0.05 * f64::from(phase));
        let silent = |w: &mut World, silent| w.relays.iter_mut().for_each(|r| r.silent = silent);
        silent(&mut w, true);
        w.run(2.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
        silent(&mut w, false);
        w.run(10.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
    }
}

#[test]
fn a_direct_path_never_notices_what_relays_do() {
    let mut w = World::with_relays(2);
    for _ in 0..20 {
        for n in 0..2 {
            w.relays[n].silent = true;
            w.run(7.0);
            assert!(w.paths.is_empty(), "{:?}", w.paths);
            w.relays[n].silent = false;
            w.run(13.0);
            assert!(w.paths.is_empty(), "{:?}", w.paths);
        }
    }
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_channel_that_was_refused_once_is_asked_for_again() {
    let mut w = World::new();
    w.relays[0].restart();
    w.relays[0].errors.push_back((CHANNEL_BIND, 508));
    w.gateway.relays.poke(w.now, RelayId(Uuid::from_u128(1)));
    // The relay was asked lately, and is not asked again at once.
    for _ in 0..60 {
        if w.relays[0].errors.is_empty() {
            break;
        }
        w.run(0.1);
    }
    assert!(w.relays[0].errors.is_empty(), "refused");
    assert_eq!(w.relays[0].channels(), []);
    w.direct_loss = 1.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    let binds = w.relays[0].count(CHANNEL_BIND);
    assert!(binds <= 4, "{binds}");
}

#[test]
fn an_address_of_a_relay_never_becomes_our_own() {
    let mut w = World::with_relays(3);
    let unused = w.relays.iter().position(|r| r.channels().is_empty());
    let n = unused.expect("a connection uses two relays");
    let (relay, client) = (RelayId(Uuid::from_u128(n as u128 + 1)), id());
    w.gateway.relays.bind_channel(w.now, relay, sock(CLIENT));
    w.gateway.drain_relays(w.now);
    w.run(0.1);
    let candidates = |w: &World| {
        let details = w.gateway.details(w.now, SystemTime::UNIX_EPOCH, client);
        details.unwrap().local_candidates
    };
    let before = candidates(&w);
    let (to, datagram) = w.relays[n]
        .packet_from(w.now, sock(CLIENT), &check(false))
        .unwrap();
    w.gateway
        .handle_packet(w.now, to, sock(RELAYS[n]), &datagram);
    assert_eq!(candidates(&w), before);
    assert_eq!(w.gateway.poll_transmit(), None, "and it is not answered");
}

#[test]
fn nothing_is_sent_as_from_a_relayed_address_that_is_gone() {
    let mut w = World::new();
    let relayed = w.relayed(0).unwrap();
    w.relays_behind_nat = true;
    w.run(5.0);
    let connection = w.gateway.connections.get_mut(&id()).unwrap();
    let relay = RelayId(Uuid::from_u128(1));
    connection.invalidate_relayed(relay, &[relayed]);
    connection.drop_relay(relay);
    w.relays[0].silent = true;
    w.direct_loss = 1.0;
    w.run(14.0);
    w.direct_loss = 0.0;
    // All pairs are made anew when a path is looked for; where the datagrams go is seen to above.
    w.run(30.0);
    assert_eq!(w.failures, 0);
}

#[test]
fn a_check_that_comes_through_a_relay_makes_no_host_candidate() {
    let mut w = World::new();
    let relayed = w.relayed(0).unwrap();
    // As while a withdrawn relay still forwards: the connection does without it.
    let connection = w.gateway.connections.get_mut(&id()).unwrap();
    let relay = RelayId(Uuid::from_u128(1));
    connection.invalidate_relayed(relay, &[relayed]);
    connection.drop_relay(relay);
    w.portal = false;
    w.run(5.0);
    w.portal = true;
    w.run(0.1);
    let hosts: Vec<_> = w
        .client
        .remote_candidates()
        .filter(|c| c.kind() == is::CandidateKind::Host)
        .map(|c| c.addr())
        .collect();
    assert_eq!(hosts, [sock(GATEWAY)]);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}
