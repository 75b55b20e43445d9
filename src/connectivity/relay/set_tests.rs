#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use secrecy::SecretString;
use uuid::Uuid;

use super::double::{
    ALLOCATE, Fate, LOCAL_V4, Machine, NAT_V4, PASSWORD, REFRESH, Style, TurnServer, USER, World,
    method_of,
};
use super::episode::EpisodeBegin;
use super::{
    CandidateKind, Handled, RelayError, RelaySet, RelaySetEvent, RelayTimer, RelayTransmit,
    channel_data,
};
use crate::ids::RelayId;
use crate::portal::messages::{RelayEntry, RelaysPresence};

impl Machine for RelaySet {
    fn packet(&mut self, now: Instant, local: SocketAddr, from: SocketAddr, datagram: &[u8]) {
        let handled = self.handle_packet(now, local, from, datagram);
        assert_ne!(handled, Handled::NotRelay, "the servers are all known");
    }

    fn timeout(&mut self, now: Instant) {
        self.handle_timeout(now);
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.poll_timeout().map(|(at, _)| at)
    }

    fn transmit(&mut self) -> Option<RelayTransmit> {
        self.poll_transmit()
    }
}

fn addr(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

fn socket(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 3478))
}

fn id(n: u8) -> RelayId {
    RelayId(Uuid::from_u128(n.into()))
}

fn entry(n: u8) -> RelayEntry {
    RelayEntry {
        id: id(n),
        v4: Some(socket(n)),
        v6: None,
        username: USER.to_owned(),
        password: SecretString::from(PASSWORD),
        expires_at: 2_145_916_800,
    }
}

fn server(n: u8) -> TurnServer {
    let ip = format!("192.0.2.{n}");
    TurnServer::new(Style::Stock, &[&format!("{ip}:3478")], &[&ip])
}

fn peer(n: u16) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 5], n))
}

/// A set that was given relays 1 to `n`, all of which work.
fn world(n: u8) -> World<RelaySet> {
    let now = Instant::now();
    let mut set = RelaySet::new(3);
    set.upsert(now, &(1..=n).map(entry).collect::<Vec<_>>());
    World::new(now, set, (1..=n).map(server).collect())
}

fn usable(n: u8) -> World<RelaySet> {
    let mut world = world(n);
    world.run_secs(1);
    events(&mut world);
    world
}

/// What calls for action.
fn events(world: &mut World<RelaySet>) -> Vec<RelaySetEvent> {
    std::iter::from_fn(|| world.machine.poll_event())
        .filter(|event| {
            !matches!(
                event,
                RelaySetEvent::EpisodeEnded(_) | RelaySetEvent::Allocated(_)
            )
        })
        .collect()
}

/// What is for the record: length in seconds, beginning, end, flaps.
fn episodes(world: &mut World<RelaySet>) -> Vec<(u64, EpisodeBegin, RelayError, u32)> {
    std::iter::from_fn(|| world.machine.poll_event())
        .filter_map(|event| match event {
            RelaySetEvent::EpisodeEnded(e) => {
                assert_eq!(e.server, Some(socket(1)));
                let seconds = (e.until - e.since).as_secs();
                Some((seconds, e.begin, e.end, e.flaps))
            }
            _ => None,
        })
        .collect()
}

fn relayed_addr(world: &World<RelaySet>, n: u8) -> SocketAddr {
    world
        .machine
        .local_candidates()
        .find(|c| c.relay == id(n) && c.kind == CandidateKind::Relayed)
        .unwrap()
        .addr
}

fn presence(world: &mut World<RelaySet>, disconnected: &[u8], connected: &[RelayEntry]) {
    let message = RelaysPresence {
        disconnected_ids: disconnected.iter().map(|n| id(*n)).collect(),
        connected: connected.to_vec(),
    };
    world.machine.presence(world.now, &message);
}

fn lost(n: u8, cause: RelayError) -> RelaySetEvent {
    RelaySetEvent::RelayLost { id: id(n), cause }
}

fn invalidated(n: u8, addr: SocketAddr) -> RelaySetEvent {
    RelaySetEvent::RelayedInvalidated {
        relay: id(n),
        addrs: vec![addr],
    }
}

fn is_added(event: &RelaySetEvent) -> bool {
    matches!(event, RelaySetEvent::CandidateAdded(_))
}

#[test]
fn relay_yields_candidates_of_three_kinds_and_is_usable() {
    let mut world = world(1);
    world.run_secs(1);
    let candidates: Vec<_> = world.machine.local_candidates().collect();
    let found: Vec<_> = candidates.iter().map(|c| (c.kind, c.addr)).collect();
    assert_eq!(
        found,
        [
            (CandidateKind::Host, addr(LOCAL_V4)),
            (CandidateKind::ServerReflexive, addr(NAT_V4)),
            (CandidateKind::Relayed, addr("192.0.2.1:49152")),
        ]
    );
    assert!(candidates.iter().all(|c| c.base == addr(LOCAL_V4)));
    let expected: Vec<_> = candidates
        .into_iter()
        .map(RelaySetEvent::CandidateAdded)
        .chain([RelaySetEvent::RelayUsable(id(1))])
        .collect();
    assert_eq!(events(&mut world), expected);
    assert_eq!(world.machine.addresses(), [socket(1)]);
}

#[test]
fn second_relay_adds_only_its_relayed_candidate() {
    let mut world = usable(1);
    world.servers.push(server(2));
    world.machine.upsert(world.now, &[entry(1), entry(2)]);
    world.run_secs(1);
    let added: Vec<_> = events(&mut world)
        .into_iter()
        .filter_map(|e| match e {
            RelaySetEvent::CandidateAdded(c) => Some((c.relay, c.kind)),
            _ => None,
        })
        .collect();
    assert_eq!(added, [(id(2), CandidateKind::Relayed)]);
}

#[test]
fn same_entry_again_changes_nothing() {
    let mut world = usable(1);
    for _ in 0..10 {
        world.run_secs(1);
        world.machine.upsert(world.now, &[entry(1)]);
    }
    assert_eq!(events(&mut world), []);
    assert_eq!(world.servers[0].count(ALLOCATE), 2);
    assert!(world.servers[0].count(REFRESH) <= 2, "checked, not flooded");
}

#[test]
fn relay_that_is_not_listed_stays() {
    let mut world = usable(2);
    world.machine.upsert(world.now, &[entry(2)]);
    world.run_secs(60);
    assert!(world.machine.is_usable(id(1)));
    assert_eq!(events(&mut world), []);
}

#[test]
fn two_entries_of_one_relay_are_merged_and_the_last_credentials_win() {
    let now = Instant::now();
    let v4 = RelayEntry {
        username: "old".to_owned(),
        ..entry(1)
    };
    let v6 = RelayEntry {
        v4: None,
        v6: Some(addr("[2001:db8::1]:3478")),
        ..entry(1)
    };
    let mut set = RelaySet::new(3);
    set.upsert(now, &[v4, entry(2), v6]);
    assert!(set.owns(socket(1)) && set.owns(addr("[2001:db8::1]:3478")));
    let mut world = World::new(now, set, vec![server(1), server(2)]);
    world.run_secs(1);
    assert!(world.machine.is_usable(id(1)));
    assert_eq!(world.machine.statuses(now, 0.0).len(), 2);
}

#[test]
fn new_credentials_replace_the_allocation_without_a_mismatch() {
    let mut world = usable(1);
    let old = relayed_addr(&world, 1);
    let mut renewed = entry(1);
    renewed.username = "new:salt".to_owned();
    world.servers[0]
        .users
        .insert("new:salt".to_owned(), PASSWORD.to_owned());
    world.machine.upsert(world.now, &[renewed]);
    world.run_secs(1);
    let events = events(&mut world);
    assert_eq!(
        events[..2],
        [invalidated(1, old), lost(1, RelayError::Replaced)]
    );
    assert_eq!(events.last(), Some(&RelaySetEvent::RelayUsable(id(1))));
    assert!(!events.contains(&RelaySetEvent::LastRelayLost));
    let answers: Vec<_> = world.servers[0].seen.iter().map(|s| s.answer).collect();
    assert!(!answers.contains(&437), "{answers:?}");
    assert_eq!(world.allocations(0), 1);
}

#[test]
fn relay_with_a_new_address_is_released_at_the_old_one() {
    let mut world = usable(1);
    world.servers.push(server(2));
    let moved = RelayEntry {
        v4: Some(socket(2)),
        ..entry(1)
    };
    world.machine.upsert(world.now, &[moved]);
    world.run_secs(1);
    assert_eq!(world.allocations(0), 0);
    assert_eq!(world.allocations(1), 1);
    assert!(world.machine.recently_removed(socket(1)));
    assert!(!world.machine.owns(socket(1)));
}

#[test]
fn relay_that_comes_back_under_another_id_takes_over_its_socket() {
    let mut world = usable(1);
    world.servers[0].restart();
    let reborn = RelayEntry {
        id: id(9),
        ..entry(1)
    };
    presence(&mut world, &[1], &[reborn]);
    world.run_secs(2);
    assert!(world.machine.is_usable(id(9)));
    assert!(!world.machine.is_usable(id(1)));
    assert_eq!(world.allocations(0), 1);
    assert!(!world.machine.recently_removed(socket(1)));
    world.run_secs(700);
    assert!(world.machine.is_usable(id(9)), "no late release deleted it");
}

#[test]
fn farewell_to_a_socket_does_not_hit_its_next_allocation() {
    let mut world = usable(1);
    let mut farewells = 0;
    world.filter = Box::new(move |to_server, datagram| {
        // The answer to the first REFRESH gets lost, which invites a copy.
        if !to_server && method_of(datagram) == Some(REFRESH) {
            farewells += 1;
            if farewells == 1 {
                return Fate::Lose;
            }
        }
        Fate::Deliver
    });
    let reborn = RelayEntry {
        id: id(9),
        ..entry(1)
    };
    presence(&mut world, &[], &[reborn]);
    world.run_secs(20);
    assert_eq!(world.allocations(0), 1);
    assert_eq!(world.servers[0].count(REFRESH), 1);
}

#[test]
fn farewell_that_gets_lost_is_repeated() {
    let mut world = usable(1);
    let mut farewells = 0;
    world.filter = Box::new(move |to_server, datagram| {
        if to_server && method_of(datagram) == Some(REFRESH) {
            farewells += 1;
            if farewells <= 2 {
                return Fate::Lose;
            }
        }
        Fate::Deliver
    });
    world.machine.release_all(world.now);
    world.run_secs(5);
    assert_eq!(world.allocations(0), 0);
    assert!(world.machine.is_released());
}

#[test]
fn withdrawn_relay_serves_until_another_took_over() {
    let mut world = usable(2);
    world.machine.bind_channel(world.now, id(1), peer(1));
    world.run_secs(1);
    let old = relayed_addr(&world, 1);
    presence(&mut world, &[1], &[]);
    assert_eq!(
        events(&mut world),
        [lost(1, RelayError::Withdrawn)],
        "make first"
    );
    assert!(!world.machine.is_usable(id(1)));
    let offered = |c: super::Gathered| c.kind == CandidateKind::Relayed && c.relay == id(1);
    assert!(!world.machine.local_candidates().any(offered));
    for _ in 0..50 {
        assert_eq!(world.machine.choose(), Some(id(2)));
    }
    world.run_secs(4);
    assert!(
        world
            .machine
            .channel_to(world.now, id(1), peer(1))
            .is_some()
    );
    assert_eq!(world.machine.statuses(world.now, 0.0)[0].state, "withdrawn");
    let (at, timer) = world.machine.poll_timeout().unwrap();
    assert_eq!(timer, RelayTimer::Retirement);
    assert!(at - world.now <= Duration::from_secs(1));

    world.run_secs(2);
    assert_eq!(events(&mut world), [invalidated(1, old)], "then break");
    assert_eq!(world.allocations(0), 0, "released");
    assert_eq!(world.machine.channel_to(world.now, id(1), peer(1)), None);
    assert!(world.machine.recently_removed(socket(1)));
}

#[test]
fn presence_flap_costs_nothing() {
    let mut world = usable(2);
    for _ in 0..300 {
        presence(&mut world, &[1], &[]);
        world.run_secs(1);
        presence(&mut world, &[], &[entry(1)]);
        world.run_secs(1);
        assert!(world.machine.is_usable(id(1)));
    }
    assert_eq!(world.servers[0].count(ALLOCATE), 2);
    let events = events(&mut world);
    assert!(!events.iter().any(is_added));
    assert_eq!(
        events[..2],
        [
            lost(1, RelayError::Withdrawn),
            RelaySetEvent::RelayUsable(id(1))
        ]
    );
}

/// Allocations and flaps of the first relay.
fn counts(world: &World<RelaySet>) -> (u64, u64) {
    let status = &world.machine.statuses(world.now, 0.0)[0];
    (status.allocations, status.flaps)
}

#[test]
fn status_counts_flaps_and_allocations_through_all_changes() {
    let mut world = usable(2);
    assert_eq!(counts(&world), (1, 0));
    for _ in 0..2 {
        presence(&mut world, &[1], &[]);
        world.run_secs(1);
        presence(&mut world, &[], &[entry(1)]);
        world.run_secs(1);
    }
    assert_eq!(counts(&world), (1, 2));
    // Lost and had again.
    world.servers[0].restart();
    world.run_secs(10);
    world.machine.poke(world.now, id(1));
    world.run_secs(5);
    assert_eq!(counts(&world), (2, 2));
    // Other credentials, then another id for the same socket, as after a restart of the relay.
    let mut other = entry(1);
    other.username = "new:salt".to_owned();
    world.servers[0]
        .users
        .insert(other.username.clone(), PASSWORD.to_owned());
    presence(&mut world, &[], &[other.clone()]);
    world.run_secs(10);
    assert_eq!(counts(&world), (3, 2));
    presence(&mut world, &[], &[RelayEntry { id: id(0), ..other }]);
    world.run_secs(10);
    assert_eq!(counts(&world), (4, 2));
    // Gone for good is forgotten.
    presence(&mut world, &[0], &[]);
    world.run_secs(10);
    presence(&mut world, &[], &[entry(1)]);
    world.run_secs(1);
    assert_eq!(counts(&world), (1, 0));
}

#[test]
fn relay_in_both_lists_stays() {
    let mut world = usable(1);
    presence(&mut world, &[1], &[entry(1)]);
    world.run_secs(60);
    assert_eq!(events(&mut world), []);
    assert!(world.machine.is_usable(id(1)));
}

#[test]
fn unknown_relay_in_the_disconnected_list_is_ignored() {
    let mut world = usable(1);
    presence(&mut world, &[77], &[]);
    assert_eq!(events(&mut world), []);
}

#[test]
fn last_relay_that_is_withdrawn_is_told_at_once_and_serves_half_a_minute() {
    let mut world = usable(1);
    let old = relayed_addr(&world, 1);
    presence(&mut world, &[1], &[]);
    assert_eq!(
        events(&mut world),
        [lost(1, RelayError::Withdrawn), RelaySetEvent::LastRelayLost]
    );
    world.run_secs(29);
    assert_eq!(events(&mut world), []);
    assert_eq!(world.allocations(0), 1);
    world.run_secs(2);
    assert_eq!(events(&mut world), [invalidated(1, old)]);
    assert_eq!(world.allocations(0), 0);
}

#[test]
fn withdrawn_last_relay_leaves_once_its_replacement_works() {
    let mut world = usable(1);
    world.servers.push(server(2));
    presence(&mut world, &[1], &[entry(2)]);
    world.run_secs(4);
    assert_eq!(world.allocations(0), 1);
    world.run_secs(2);
    assert_eq!(world.allocations(0), 0);
    assert!(!events(&mut world).contains(&RelaySetEvent::LastRelayLost));
}

#[test]
fn withdrawn_relay_that_is_dead_leaves_as_soon_as_that_shows() {
    let mut world = usable(1);
    let old = relayed_addr(&world, 1);
    world.run_secs(10);
    world.servers[0].silent = true;
    presence(&mut world, &[1], &[]);
    events(&mut world);
    world.run_secs(9);
    assert_eq!(events(&mut world), [invalidated(1, old)]);
    assert!(world.machine.statuses(world.now, 0.0).is_empty());
}

#[test]
fn withdrawn_relay_without_allocation_goes_at_once() {
    let mut world = world(1);
    presence(&mut world, &[1], &[]);
    assert_eq!(
        events(&mut world),
        [lost(1, RelayError::Withdrawn), RelaySetEvent::LastRelayLost]
    );
    assert!(world.machine.statuses(world.now, 0.0).is_empty());
}

#[test]
fn silent_relay_is_invalidated_and_comes_back_by_itself() {
    let mut world = usable(2);
    let old = relayed_addr(&world, 1);
    world.servers[0].silent = true;
    world.run_secs(40);
    assert_eq!(
        events(&mut world),
        [invalidated(1, old), lost(1, RelayError::NoResponse)]
    );
    world.servers[0].restart();
    world.servers[0].silent = false;
    world.run_secs(40);
    let events = events(&mut world);
    assert!(events.iter().any(is_added));
    assert_eq!(events.last(), Some(&RelaySetEvent::RelayUsable(id(1))));
}

#[test]
fn losing_every_relay_is_told_once() {
    let mut world = usable(2);
    for server in &mut world.servers {
        server.silent = true;
    }
    world.run_secs(3600);
    let told = events(&mut world)
        .into_iter()
        .filter(|e| *e == RelaySetEvent::LastRelayLost)
        .count();
    assert_eq!(told, 1);
}

#[test]
fn relays_that_never_worked_are_told_lost_too() {
    let mut world = world(2);
    for server in &mut world.servers {
        server.silent = true;
    }
    world.run_secs(10);
    assert_eq!(
        events(&mut world),
        [
            lost(1, RelayError::NoResponse),
            lost(2, RelayError::NoResponse),
            RelaySetEvent::LastRelayLost
        ]
    );
}

#[test]
fn lost_relay_is_not_missed_while_another_works() {
    let mut world = usable(2);
    world.servers[0].silent = true;
    world.run_secs(600);
    assert!(!events(&mut world).contains(&RelaySetEvent::LastRelayLost));
    assert!(world.machine.any_usable());
}

#[test]
fn direct_candidates_survive_the_last_relay() {
    let mut world = usable(1);
    presence(&mut world, &[1], &[]);
    world.run_secs(40);
    let kinds: Vec<_> = world.machine.local_candidates().map(|c| c.kind).collect();
    assert_eq!(kinds, [CandidateKind::Host, CandidateKind::ServerReflexive]);
}

#[test]
fn channel_data_is_unwrapped_and_the_rest_is_told_apart() {
    let mut world = usable(1);
    world.machine.bind_channel(world.now, id(1), peer(1));
    world.run_secs(1);
    let now = world.now;
    let (_, datagram) = world.servers[0].packet_from(now, peer(1), b"ping").unwrap();
    let local = addr(LOCAL_V4);
    let set = &mut world.machine;
    let relayed = addr("192.0.2.1:49152");
    assert_eq!(
        set.handle_packet(now, local, socket(1), &datagram),
        Handled::Inner {
            relay: id(1),
            peer: peer(1),
            relayed,
            payload: 4..8,
        }
    );
    assert_eq!(set.relay_of(relayed), Some(id(1)));

    let unbound = [0x4A, 0xBC, 0, 1, 7];
    assert_eq!(
        set.handle_packet(now, local, socket(1), &unbound),
        Handled::Consumed
    );
    for not_relay in [
        &datagram[..6],                // wrong length field
        &[4, 0, 0, 0, 1, 2, 3, 4][..], // WireGuard data
        &[1, 0, 0, 0, 1, 2, 3, 4][..], // WireGuard initiation, looks a bit like STUN
        &[][..],
    ] {
        assert_eq!(
            set.handle_packet(now, local, socket(1), not_relay),
            Handled::NotRelay
        );
    }
    // A peer behind the same relay has another port.
    let other = SocketAddr::new(socket(1).ip(), 50000);
    assert_eq!(
        set.handle_packet(now, local, other, &datagram),
        Handled::NotRelay
    );
}

#[test]
fn late_packets_of_a_removed_relay_are_swallowed() {
    let mut world = usable(1);
    let mut datagram = channel_data::header(0x4000, 3).unwrap().to_vec();
    datagram.extend_from_slice(b"abc");
    let stun = {
        world.machine.bind_channel(world.now, id(1), peer(1));
        world.machine.poll_transmit().unwrap().payload
    };
    world.machine.release_all(world.now);
    world.run_secs(1);
    assert!(world.machine.is_released());
    assert_eq!(world.allocations(0), 0);
    let now = world.now;
    for late in [&datagram, &stun] {
        assert_eq!(
            world
                .machine
                .handle_packet(now, addr(LOCAL_V4), socket(1), late),
            Handled::Consumed
        );
    }
    let wireguard = [4, 0, 0, 0, 9, 9];
    assert_eq!(
        world
            .machine
            .handle_packet(now, addr(LOCAL_V4), socket(1), &wireguard),
        Handled::NotRelay
    );
}

#[test]
fn only_the_last_64_removed_relays_are_remembered() {
    let now = Instant::now();
    let mut set = RelaySet::new(1);
    for n in 1..=66 {
        set.upsert(now, &[entry(n)]);
        let message = RelaysPresence {
            disconnected_ids: vec![id(n)],
            connected: vec![],
        };
        set.presence(now, &message);
    }
    assert!(!set.recently_removed(socket(2)));
    assert!(set.recently_removed(socket(3)));
    assert!(set.recently_removed(socket(66)));
}

#[test]
fn release_of_all_relays_invalidates_and_frees_them() {
    let mut world = usable(2);
    world.machine.release_all(world.now);
    let events = events(&mut world);
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, RelaySetEvent::RelayedInvalidated { .. }))
            .count(),
        2
    );
    assert!(!world.machine.is_released());
    world.run_secs(1);
    assert!(world.machine.is_released());
    assert!(world.servers.iter().all(|s| s.allocations(world.now) == 0));
}

/// How often each relay is chosen when their one-way delays are these, in milliseconds.
fn choices(delays: &[u64]) -> BTreeMap<u8, usize> {
    let n = u8::try_from(delays.len()).unwrap();
    let now = Instant::now();
    let mut set = RelaySet::new(11);
    let mut servers = Vec::new();
    for i in 1..=n {
        set.upsert(now, &[entry(i)]);
        servers.push(server(i));
    }
    let mut world = World::new(now, set, servers);
    let delays = delays.to_vec();
    world.delay_to = Box::new(move |server| {
        let SocketAddr::V4(v4) = server else {
            return Duration::ZERO;
        };
        Duration::from_millis(delays[usize::from(v4.ip().octets()[3]) - 1])
    });
    world.run_secs(5);
    let mut counts = BTreeMap::new();
    for _ in 0..300 {
        let chosen = world.machine.choose().unwrap();
        let n = u8::try_from(chosen.0.as_u128()).unwrap();
        *counts.entry(n).or_insert(0) += 1;
    }
    counts
}

#[test]
fn of_two_relays_a_much_slower_one_is_not_chosen() {
    let close = choices(&[10, 14]);
    assert!(close[&1] > 100 && close[&2] > 100, "{close:?}");
    assert_eq!(choices(&[10, 16]).keys().copied().collect::<Vec<_>>(), [1]);
}

#[test]
fn of_many_relays_outliers_are_not_chosen() {
    let chosen = choices(&[10, 11, 12, 60]);
    assert_eq!(chosen.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    assert!(chosen.values().all(|n| *n > 60), "{chosen:?}");
}

#[test]
fn relay_without_a_round_trip_time_is_not_chosen() {
    let mut world = world(2);
    assert_eq!(world.machine.choose(), None);
    world.servers[0].silent = true;
    world.run_secs(1);
    for _ in 0..20 {
        assert_eq!(world.machine.choose(), Some(id(2)));
    }
    assert_eq!(world.machine.choose_other_than(&[id(2)]), None);
}

#[test]
fn second_relay_is_at_hand_for_a_connection_that_lost_its_first() {
    let mut world = usable(2);
    assert_eq!(world.machine.choose_other_than(&[id(1)]), Some(id(2)));
    assert_eq!(world.machine.choose_other_than(&[id(2)]), Some(id(1)));
}

proptest! {
    /// Whatever the portal and the network do: no panic, no spinning timer, `LastRelayLost` only
    /// after something worked or was tried, and working relays are usable in the end.
    #[test]
    fn arbitrary_histories_end_well(
        seed: u64,
        steps in prop::collection::vec((0u8..8, 1u8..4, 0u64..40), 1..25),
    ) {
        let now = Instant::now();
        let mut world = World::new(
            now,
            RelaySet::new(seed),
            (1..4).map(server).collect::<Vec<_>>(),
        );
        for (step, n, pause) in steps {
            let at = usize::from(n) - 1;
            match step {
                0 | 1 => presence(&mut world, &[], &[entry(n)]),
                2 => presence(&mut world, &[n], &[]),
                3 => world.servers[at].restart(),
                4 => world.servers[at].silent = true,
                5 => world.servers[at].silent = false,
                6 => world.servers[at].expire_nonces(),
                _ => {
                    let now = world.now;
                    world.machine.bind_channel(now, id(n), peer(n.into()));
                }
            }
            world.run_secs(pause);
        }
        for server in &mut world.servers {
            server.silent = false;
        }
        let all: Vec<_> = (1..4).map(entry).collect();
        presence(&mut world, &[], &all);
        world.run_secs(700);
        for n in 1..4 {
            prop_assert!(world.machine.is_usable(id(n)), "relay {n}");
        }
        world.machine.release_all(world.now);
        world.run_secs(10);
        prop_assert!(world.machine.is_released());
        prop_assert!(world.servers.iter().all(|s| s.allocations(world.now) == 0));
    }

    #[test]
    fn arbitrary_datagrams_never_panic(datagram: Vec<u8>, first: u8, from in 1u8..4) {
        let mut world = usable(2);
        presence(&mut world, &[2], &[]);
        let mut datagram = datagram;
        if let Some(byte) = datagram.first_mut() {
            *byte = first;
        }
        let now = world.now;
        world.machine.handle_packet(now, addr(LOCAL_V4), socket(from), &datagram);
    }
}

// ---- Episodes ----

#[test]
fn an_episode_ends_when_the_portal_withdraws_the_relay_for_good() {
    let mut world = usable(1);
    world.run_secs(100);
    presence(&mut world, &[1], &[]);
    world.run_secs(29);
    assert_eq!(episodes(&mut world), [], "it still serves");
    world.run_secs(2);
    let [(seconds, begin, end, flaps)] = episodes(&mut world)[..] else {
        panic!("one episode");
    };
    assert!((130..=132).contains(&seconds), "{seconds}");
    assert_eq!(
        (begin, end, flaps),
        (EpisodeBegin::Offered, RelayError::Withdrawn, 0)
    );
}

#[test]
fn an_episode_counts_how_often_the_portal_changed_its_mind() {
    let mut world = usable(1);
    for _ in 0..1000 {
        presence(&mut world, &[1], &[]);
        presence(&mut world, &[], &[entry(1)]);
    }
    world.run_secs(60);
    assert_eq!(episodes(&mut world), [], "none of it ended anything");
    assert_eq!(world.allocations(0), 1);
    world.machine.release_all(world.now);
    let [(_, _, end, flaps)] = episodes(&mut world)[..] else {
        panic!("one episode");
    };
    assert_eq!((end, flaps), (RelayError::Released, 1000));
}

#[test]
fn a_relay_that_falls_silent_ends_one_episode_and_begins_another() {
    let mut world = usable(1);
    world.servers[0].silent = true;
    world.run_secs(60);
    world.servers[0].silent = false;
    world.run_secs(600);
    presence(&mut world, &[1], &[]);
    world.run_secs(60);
    let told: Vec<_> = episodes(&mut world)
        .into_iter()
        .map(|(_, begin, end, _)| (begin, end))
        .collect();
    assert_eq!(
        told,
        [
            (EpisodeBegin::Offered, RelayError::NoResponse),
            (EpisodeBegin::Recovered, RelayError::Withdrawn)
        ]
    );
}

#[test]
fn how_long_an_allocation_took_is_told() {
    let mut world = world(1);
    let begun = world.now;
    world.run_secs(1);
    let took = std::iter::from_fn(|| world.machine.poll_event()).find_map(|event| match event {
        RelaySetEvent::Allocated(took) => Some(took),
        _ => None,
    });
    // A BINDING, an ALLOCATE that is challenged, and one that is not.
    let took = took.unwrap();
    assert!(
        took > Duration::ZERO && took < world.now - begun,
        "{took:?}"
    );
}

#[test]
fn a_relay_that_forgets_its_allocations_ends_an_episode() {
    let mut world = usable(1);
    world.servers[0].restart();
    world.machine.poke(world.now, id(1));
    world.run_secs(400);
    let told = episodes(&mut world);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].2, RelayError::Forgotten);
}

#[test]
fn new_credentials_end_one_episode_and_begin_the_next() {
    let mut world = usable(1);
    let other = RelayEntry {
        username: "2145916801:salt".to_owned(),
        ..entry(1)
    };
    world.servers[0]
        .users
        .insert(other.username.clone(), PASSWORD.to_owned());
    presence(&mut world, &[], &[other]);
    world.run_secs(10);
    world.machine.release_all(world.now);
    let told: Vec<_> = episodes(&mut world)
        .into_iter()
        .map(|(_, begin, end, _)| (begin, end))
        .collect();
    assert_eq!(
        told,
        [
            (EpisodeBegin::Offered, RelayError::Replaced),
            (EpisodeBegin::Replaced, RelayError::Released)
        ]
    );
}
