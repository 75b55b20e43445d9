//! What the status tells of paths: why they changed, and which pairs there are.

#![allow(clippy::unwrap_used)]

use super::*;

fn reasons_since(w: &mut World, run: impl FnOnce(&mut World)) -> Vec<PathReason> {
    w.reasons.clear();
    run(w);
    std::mem::take(&mut w.reasons)
}

#[test]
fn a_path_that_dies_and_is_found_again_is_told_so() {
    let mut w = World::new();
    assert!(
        w.reasons.iter().all(|r| *r == PathReason::Nominated),
        "by and by, the client found the best: {:?}",
        w.reasons
    );
    let away = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(6.0);
    });
    assert_eq!(away, [PathReason::Dead]);
    let back = reasons_since(&mut w, |w| {
        w.direct_loss = 0.0;
        w.run(12.0);
    });
    assert_eq!(back, [PathReason::Returned]);
    let history = w.gateway.describe(id()).unwrap().history;
    let last: Vec<_> = history[history.len() - 2..]
        .iter()
        .map(|step| (step.from, step.to, step.reason))
        .collect();
    let (direct, relayed) = (Some(PathKind::Direct), Some(PathKind::RelayLocal));
    assert_eq!(
        last,
        [
            (direct, relayed, PathReason::Dead),
            (relayed, direct, PathReason::Returned)
        ]
    );
}

#[test]
fn what_the_client_nominates_after_a_death_is_told_as_its_choice() {
    let mut w = World::with(1, false, true);
    // As if the client preferred its relay: what we turn to by ourselves is not what it chooses.
    let relayed = Candidate::relayed(sock(CLIENT_RELAYED), sock(CLIENT), "udp").unwrap();
    let line = relayed.to_sdp_string();
    let higher = line.replace(
        &relayed.prio().to_string(),
        &(relayed.prio() + 10).to_string(),
    );
    assert_ne!(line, higher);
    w.gateway.invalidate_remote_candidates(w.now, id(), &[line]);
    w.gateway.add_remote_candidates(w.now, id(), &[higher]);
    w.run(5.0);
    let reasons = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(8.0);
    });
    let kinds: Vec<_> = w.paths.iter().map(|(_, kind)| *kind).collect();
    assert_eq!(kinds, [PathKind::RelayRemote, PathKind::RelayLocal]);
    assert_eq!(reasons, [PathReason::Dead, PathReason::Nominated]);
}

#[test]
fn a_long_hiccup_that_the_client_is_not_told_of_ends_in_a_return() {
    let mut w = World::new();
    w.portal = false;
    let reasons = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(6.0);
        w.direct_loss = 0.0;
        w.run(3.0);
    });
    assert_eq!(reasons, [PathReason::Dead, PathReason::Returned]);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_direct_path_that_never_was_is_returned_by_the_search_only() {
    let mut w = World::with(0, false, true);
    w.reasons.clear();
    let reasons = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(60.0);
        w.direct_loss = 0.0;
        w.run(60.0);
    });
    assert_eq!(reasons, [PathReason::Dead, PathReason::Returned]);
}

#[test]
fn a_relay_that_falls_silent_is_dead_and_one_that_forgets_us_is_lost() {
    let mut w = World::with_relays(2);
    let first = over_a_relay(&mut w);
    let reasons = reasons_since(&mut w, |w| {
        w.relays[first].silent = true;
        w.run(6.0);
    });
    assert_eq!(reasons, [PathReason::Dead]);

    let mut w = World::with_relays(2);
    let first = over_a_relay(&mut w);
    let reasons = reasons_since(&mut w, |w| {
        w.relays[first].restart();
        w.gateway
            .relays
            .poke(w.now, RelayId(Uuid::from_u128(first as u128 + 1)));
        w.run(5.0);
    });
    assert_eq!(reasons[0], PathReason::RelayLost);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
}

#[test]
fn pairs_tell_what_is_used_what_works_and_what_does_not() {
    let mut w = World::with(2, true, true);
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let details = |w: &World| w.gateway.details(w.now, wall, id()).unwrap();
    let all = details(&w);
    assert_eq!(all.local_candidate_count, all.local_candidates.len());
    let kinds = |candidates: &[CandidateStatus]| {
        candidates
            .iter()
            .map(|c| (c.kind, c.address.to_string()))
            .collect::<Vec<_>>()
    };
    use crate::admin::model::CandidateKind::{Host, Relayed};
    let ours = kinds(&all.local_candidates);
    assert_eq!(
        ours[..2],
        [(Host, GATEWAY_V6.to_owned()), (Host, GATEWAY.to_owned())],
        "by priority"
    );
    assert_eq!(ours.iter().filter(|(kind, _)| *kind == Relayed).count(), 2);
    assert_eq!(
        kinds(&all.remote_candidates),
        [
            (Host, CLIENT_V6.to_owned()),
            (Host, CLIENT.to_owned()),
            (Relayed, CLIENT_RELAYED.to_owned())
        ]
    );
    // Three of ours for each of the two IPv4 ones, and one for the IPv6 one.
    assert_eq!((all.pair_count, all.pairs.len()), (7, 7));
    let first = all.pairs[0];
    assert_eq!(
        (first.local, first.remote),
        (sock(GATEWAY_V6), sock(CLIENT_V6))
    );
    assert!(first.in_use && first.nominated);
    let age = 1_800_000_000.0 - first.answered_at.unwrap();
    assert!((0.0..=1.0).contains(&age), "{age}");
    assert_eq!(all.pairs.iter().filter(|p| p.in_use).count(), 1);

    w.direct_loss = 1.0;
    w.run(8.0);
    let later = details(&w);
    let first = later.pairs[0];
    assert!(first.in_use);
    assert_eq!(first.local_kind, Some(Relayed));
    let dead = later
        .pairs
        .iter()
        .find(|p| p.remote == sock(CLIENT_V6))
        .unwrap();
    assert!(!dead.in_use);
    let age = 1_800_000_000.0 - dead.answered_at.unwrap();
    assert!((7.0..=9.0).contains(&age), "{age}");
}
