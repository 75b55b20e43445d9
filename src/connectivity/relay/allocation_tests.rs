#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use secrecy::SecretString;
use uuid::Uuid;

use super::double::{
    ALLOCATE, BINDING, CHANNEL_BIND, Fate, LOCAL_V4, LOCAL_V6, Machine, NAT_V4, PASSWORD, REFRESH,
    Seen, Style, TurnServer, USER, World, method_of,
};
use super::{Allocation, AllocationEvent, RelayError, RelayTransmit, channel_data};
use crate::ids::RelayId;
use crate::portal::messages::RelayEntry;

const V4: &str = "192.0.2.10:3478";
const V6: &str = "[2001:db8::10]:3478";

impl Machine for Allocation {
    fn packet(&mut self, now: Instant, local: SocketAddr, from: SocketAddr, datagram: &[u8]) {
        if channel_data::is_channel_data(datagram) {
            self.decapsulate(now, datagram);
        } else {
            self.handle_packet(now, local, from, datagram);
        }
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

fn peer(port: u16) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 5], port))
}

fn entry(v4: Option<&str>, v6: Option<&str>) -> RelayEntry {
    RelayEntry {
        id: RelayId(Uuid::from_u128(1)),
        v4: v4.map(addr),
        v6: v6.map(addr),
        username: USER.to_owned(),
        password: SecretString::from(PASSWORD),
        expires_at: 2_145_916_800,
    }
}

pub(super) fn dual_stack(style: Style) -> TurnServer {
    TurnServer::new(style, &[V4, V6], &["192.0.2.10", "2001:db8::10"])
}

pub(super) fn world_with(server: TurnServer) -> World<Allocation> {
    let now = Instant::now();
    let has = |s: &str| server.sockets.contains(&addr(s));
    let entry = entry(has(V4).then_some(V4), has(V6).then_some(V6));
    World::new(now, Allocation::new(now, &entry, 7), vec![server])
}

fn world(style: Style) -> World<Allocation> {
    world_with(dual_stack(style))
}

/// A world whose allocation is there.
pub(super) fn allocated(style: Style) -> World<Allocation> {
    let mut world = world(style);
    world.run_secs(1);
    assert!(world.machine.is_allocated());
    events(&mut world);
    world
}

fn events(world: &mut World<Allocation>) -> Vec<AllocationEvent> {
    std::iter::from_fn(|| world.machine.poll_event()).collect()
}

fn losses(world: &mut World<Allocation>) -> Vec<RelayError> {
    events(world)
        .into_iter()
        .filter_map(|event| match event {
            AllocationEvent::Lost { cause } => Some(cause),
            _ => None,
        })
        .collect()
}

fn of_method(world: &World<Allocation>, method: u16) -> Vec<Seen> {
    let seen = world.servers[0].seen.iter();
    seen.filter(|s| s.method == method).cloned().collect()
}

fn relayed(world: &World<Allocation>) -> Vec<SocketAddr> {
    world.machine.relayed().collect()
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn allocates_both_families_from_either_kind_of_server() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = world(style);
        world.run(Duration::from_millis(200));
        let expected = vec![addr("192.0.2.10:49152"), addr("[2001:db8::10]:49152")];
        assert_eq!(relayed(&world), expected);
        assert!(events(&mut world).contains(&AllocationEvent::Allocated { relayed: expected }));
        let allocates = of_method(&world, ALLOCATE);
        assert_eq!(allocates.len(), 2, "{style:?}");
        assert!(!allocates[0].signed);
        assert_eq!(allocates[0].answer, 401);
        assert_eq!(allocates[0].attributes, [0x8022, 0x0019, 0x8000]);
        assert!(allocates[1].signed);
        assert_eq!(allocates[1].answer, 0);
        assert_eq!(world.machine.rtt(), Some(Duration::from_millis(20)));
    }
}

#[test]
fn binding_answers_show_our_addresses_in_both_families() {
    let mut world = world(Style::Stock);
    world.run_secs(1);
    let events = events(&mut world);
    for (local, mapped) in [(LOCAL_V4, NAT_V4), (LOCAL_V6, LOCAL_V6)] {
        assert!(events.contains(&AllocationEvent::Mapped {
            local: addr(local),
            mapped: Some(addr(mapped)),
        }));
    }
}

#[test]
fn first_address_that_answers_is_used_for_everything() {
    let mut world = world(Style::Stock);
    let mut first = true;
    world.filter = Box::new(move |to_server, _| {
        // The IPv4 BINDING goes out first.
        if to_server && std::mem::take(&mut first) {
            Fate::Late(Duration::from_millis(50))
        } else {
            Fate::Deliver
        }
    });
    world.run_secs(60);
    world.machine.bind_channel(world.now, peer(1));
    world.run_secs(600);
    assert_eq!(world.machine.active_socket(), Some(addr(V6)));
    assert!(
        world.servers[0]
            .seen
            .iter()
            .filter(|s| s.method != BINDING)
            .all(|s| s.to == addr(V6))
    );
}

#[test]
fn relay_without_a_working_second_address_is_usable() {
    let mut server = dual_stack(Style::Coturn);
    server.sockets = vec![addr(V6)];
    let now = Instant::now();
    let allocation = Allocation::new(now, &entry(Some(V4), Some(V6)), 1);
    let mut world = World::new(now, allocation, vec![server]);
    world.run_secs(3600);
    assert!(world.machine.is_allocated());
    assert_eq!(losses(&mut world), []);
}

#[test]
fn realm_is_the_one_that_the_server_names() {
    let mut server = dual_stack(Style::Coturn);
    server.realm = "example.org".to_owned();
    let mut world = world_with(server);
    world.run_secs(1);
    assert!(world.machine.is_allocated());
}

#[test]
fn allocation_is_refreshed_at_half_its_lifetime_with_nothing_extra() {
    let mut world = allocated(Style::Coturn);
    let start = world.now;
    world.run_secs(2 * 3600);
    let refreshes = of_method(&world, REFRESH);
    assert!(refreshes.len() >= 23, "{}", refreshes.len());
    for (i, refresh) in (1..).zip(&refreshes) {
        assert_eq!(refresh.answer, 0);
        assert_eq!(refresh.attributes, [0x8022, 0x0006, 0x0014, 0x0015, 0x0008]);
        let elapsed = refresh.at - start;
        assert!(elapsed <= secs(300 * i + 5), "{elapsed:?}");
    }
    assert_eq!(losses(&mut world), []);
    assert_eq!(world.servers[0].count(ALLOCATE), 2, "the first one holds");
}

#[test]
fn refresh_that_fails_once_is_repeated_and_remembered_with_its_time() {
    let mut world = allocated(Style::Coturn);
    world.servers[0].errors.push_back((REFRESH, 500));
    world.run_secs(301);
    assert_eq!(world.machine.last_error(), Some(RelayError::Refused(500)));
    assert!(world.machine.is_allocated());
    world.run_secs(20);
    assert_eq!(world.machine.last_error(), None);
    assert_eq!(losses(&mut world), []);
    let status = world.machine.status(world.now, 1000.0);
    assert_eq!(
        status.last_error.as_deref(),
        Some("the relay answers with error 500")
    );
    let at = status.last_error_at.unwrap();
    assert!((978.0..981.0).contains(&at), "{at}");
}

#[test]
fn short_lifetime_is_honoured_without_a_flood() {
    let mut server = dual_stack(Style::Coturn);
    server.lifetime = 10;
    let mut world = world_with(server);
    world.run_secs(600);
    assert!(world.machine.is_allocated());
    let refreshes = world.servers[0].count(REFRESH);
    assert!((100..=125).contains(&refreshes), "{refreshes}");
}

#[test]
fn idle_relay_gets_a_binding_every_25_seconds() {
    let mut world = allocated(Style::Stock);
    let before = world.servers[0].count(BINDING);
    world.run_secs(251);
    // To both addresses, as both had answered.
    assert_eq!(world.servers[0].count(BINDING) - before, 20);
}

#[test]
fn traffic_both_ways_replaces_the_keep_alive_on_the_address_in_use() {
    let mut world = allocated(Style::Stock);
    world.machine.bind_channel(world.now, peer(1));
    let before = world.servers[0].seen.len();
    for _ in 0..25 {
        world.run_secs(10);
        world.machine.note_sent(world.now, peer(1));
        let (_, data) = world.servers[0]
            .packet_from(world.now, peer(1), b"data")
            .unwrap();
        assert!(world.machine.decapsulate(world.now, &data).is_some());
    }
    let keep_alives: Vec<_> = world.servers[0].seen[before..]
        .iter()
        .filter(|s| s.method == BINDING)
        .map(|s| s.to)
        .collect();
    assert!(!keep_alives.contains(&world.machine.active_socket().unwrap()));
}

#[test]
fn another_address_is_told_when_the_relay_sees_it_at_the_next_allocation() {
    let mut world = allocated(Style::Stock);
    while world.machine.poll_event().is_some() {}
    // The router was restarted, and traffic hides that from the keep-alive.
    world.nat_v4 = "203.0.113.77:51000".parse().unwrap();
    world.servers[0].restart();
    world.machine.bind_channel(world.now, peer(1));
    world.run_secs(2);
    let expected = AllocationEvent::Mapped {
        local: LOCAL_V4.parse().unwrap(),
        mapped: Some(world.nat_v4),
    };
    let events: Vec<_> = std::iter::from_fn(|| world.machine.poll_event()).collect();
    assert!(events.contains(&expected), "{events:?}");
}

#[test]
fn a_check_that_comes_too_soon_is_made_when_it_is_allowed() {
    let mut world = allocated(Style::Stock);
    world.run_secs(10);
    world.machine.poke(world.now);
    world.run_secs(1);
    world.servers[0].restart();
    let before = world.servers[0].count(REFRESH);
    for _ in 0..10 {
        world.machine.poke(world.now);
    }
    world.run_secs(1);
    assert_eq!(world.servers[0].count(REFRESH), before, "too soon");
    world.run_secs(5);
    assert_eq!(world.allocations(0), 1);
}

#[test]
fn sending_into_silence_does_not_hide_a_dead_relay() {
    let mut world = allocated(Style::Stock);
    world.machine.bind_channel(world.now, peer(1));
    world.run_secs(1);
    world.servers[0].silent = true;
    for _ in 0..8 {
        world.run_secs(10);
        world.machine.note_sent(world.now, peer(1));
    }
    assert_eq!(losses(&mut world), [RelayError::NoResponse]);
}

#[test]
fn late_answer_to_an_earlier_copy_counts() {
    let mut world = world(Style::Stock);
    world.filter = Box::new(|to_server, datagram| {
        if !to_server && method_of(datagram) == Some(ALLOCATE) {
            Fate::Late(Duration::from_millis(2200))
        } else {
            Fate::Deliver
        }
    });
    world.run_secs(30);
    assert!(world.machine.is_allocated());
    // The stock relay answers the copies 437; nobody waits for those any more.
    let answers: Vec<_> = of_method(&world, ALLOCATE)
        .iter()
        .map(|s| s.answer)
        .collect();
    assert!(answers.contains(&437), "{answers:?}");
    assert_eq!(answers.iter().filter(|code| **code == 0).count(), 1);
    assert_eq!(losses(&mut world), []);
}

#[test]
fn lost_success_of_an_allocate_is_recovered_from() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = world(style);
        let mut responses = 0;
        world.filter = Box::new(move |to_server, datagram| {
            if !to_server && method_of(datagram) == Some(ALLOCATE) {
                responses += 1;
                if responses == 2 {
                    return Fate::Lose;
                }
            }
            Fate::Deliver
        });
        world.run_secs(5);
        assert!(world.machine.is_allocated(), "{style:?}");
        assert_eq!(world.allocations(0), 1);
    }
}

#[test]
fn a_third_of_all_packets_may_get_lost() {
    for seed in 0..20 {
        let mut world = world(Style::Stock);
        let mut rng = StdRng::seed_from_u64(seed);
        world.filter = Box::new(move |_, _| {
            if rng.random_bool(0.33) {
                Fate::Lose
            } else {
                Fate::Deliver
            }
        });
        let mut usable = 0;
        for _ in 0..180 {
            world.run_secs(10);
            usable += usize::from(world.machine.is_allocated());
        }
        assert!(usable > 90, "seed {seed}: usable {usable} of 180");
    }
}

#[test]
fn allocation_left_behind_is_cleared_away_first() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = world(style);
        world.servers[0].leave_behind(world.now, addr(NAT_V4), USER);
        if style == Style::Stock {
            // Evicted by user name only when on another 5-tuple; ours stays in the way.
            world.servers[0].leave_behind(world.now, addr("203.0.113.77:9"), USER);
        }
        world.run_secs(3);
        assert!(world.machine.is_allocated());
        let clears = of_method(&world, REFRESH);
        assert!(clears.iter().all(|s| s.lifetime == Some(0)));
        assert_eq!(clears.last().map(|s| s.answer), Some(0));
    }
}

#[test]
fn foreign_allocation_on_our_socket_is_waited_out_politely() {
    let mut world = world(Style::Coturn);
    world.servers[0].leave_behind(world.now, addr(NAT_V4), "somebody-else");
    world.run_secs(590);
    assert!(!world.machine.is_allocated());
    assert_eq!(losses(&mut world), [RelayError::AllocationMismatch(441)]);
    assert!(world.servers[0].count(ALLOCATE) < 40);
    world.run_secs(320);
    assert!(world.machine.is_allocated());
}

#[test]
fn server_that_forgot_us_is_asked_again_and_channels_follow() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = allocated(style);
        world.machine.bind_channel(world.now, peer(1));
        world.machine.bind_channel(world.now, peer(2));
        world.run_secs(1);
        let old = relayed(&world);
        world.servers[0].restart();
        world.run_secs(301);
        assert_eq!(
            events(&mut world),
            [
                AllocationEvent::Invalidated { relayed: old },
                AllocationEvent::Allocated {
                    relayed: relayed(&world)
                },
            ]
        );
        let peers: Vec<_> = world.servers[0]
            .channels()
            .into_iter()
            .map(|(_, peer)| peer)
            .collect();
        assert_eq!(peers, [peer(1), peer(2)]);
        for n in 1..=2 {
            assert!(world.machine.channel_to(world.now, peer(n)).is_some());
        }
    }
}

#[test]
fn mismatch_on_a_channel_bind_reveals_the_loss_at_once() {
    let mut world = allocated(Style::Coturn);
    world.servers[0].restart();
    world.machine.bind_channel(world.now, peer(1));
    world.run_secs(1);
    assert!(world.machine.is_allocated());
    assert_eq!(losses(&mut world), []);
    assert_eq!(world.servers[0].channels().len(), 1);
}

#[test]
fn server_that_forgets_at_once_is_not_asked_in_a_loop() {
    let mut world = allocated(Style::Coturn);
    world.servers[0].errors = std::iter::repeat_n((CHANNEL_BIND, 437), 10_000).collect();
    let before = world.servers[0].seen.len();
    for _ in 0..60 {
        world.machine.bind_channel(world.now, peer(1));
        world.run_secs(1);
    }
    let requests = world.servers[0].seen.len() - before;
    assert!(requests < 150, "{requests} requests in a minute");
}

#[test]
fn stale_nonce_is_replaced_without_a_loss() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = allocated(style);
        world.servers[0].expire_nonces();
        for n in 1..=20 {
            world.machine.bind_channel(world.now, peer(n));
        }
        world.run_secs(1);
        assert_eq!(world.servers[0].channels().len(), 20);
        world.servers[0].expire_nonces();
        world.run_secs(600);
        assert_eq!(losses(&mut world), []);
        let codes: Vec<_> = of_method(&world, REFRESH)
            .iter()
            .map(|s| s.answer)
            .collect();
        assert_eq!(codes[..2], [438, 0]);
    }
}

#[test]
fn server_that_likes_no_nonce_is_given_up_for_a_while() {
    let mut server = dual_stack(Style::Coturn);
    server.always_stale = true;
    let mut world = world_with(server);
    world.run_secs(60);
    assert_eq!(losses(&mut world), [RelayError::StaleNonce]);
    assert!(world.servers[0].count(ALLOCATE) < 40);
}

#[test]
fn refused_credentials_are_named_and_retried_rarely() {
    for style in [Style::Coturn, Style::Stock] {
        let mut server = dual_stack(style);
        server.users.clear();
        let mut world = world_with(server);
        world.run_secs(20);
        assert_eq!(
            losses(&mut world),
            [RelayError::BadCredentials],
            "{style:?}"
        );
        assert_eq!(world.servers[0].count(ALLOCATE), 2);
        let status = world.machine.status(world.now, 1000.0);
        assert_eq!(status.state, "failed");
        assert!((979.0..=981.0).contains(&status.since), "{}", status.since);
        assert_eq!(status.last_error_at, Some(status.since));
        assert_eq!(status.allocated_at, None);
        assert_eq!(status.allocation_expires_at, None);
        assert_eq!(
            status.last_error.as_deref(),
            Some("the relay refuses the credentials")
        );
        world.run_secs(600);
        assert!(world.servers[0].count(ALLOCATE) <= 14);
        assert_eq!(losses(&mut world), [], "told once");
        let later = world.machine.status(world.now, 1600.0);
        assert!(later.last_error_at.unwrap() > later.since + 60.0);
    }
}

#[test]
fn credentials_that_end_cost_the_allocation() {
    let mut world = allocated(Style::Stock);
    let old = relayed(&world);
    world.servers[0].users.clear();
    world.run_secs(301);
    assert_eq!(
        events(&mut world),
        [
            AllocationEvent::Invalidated { relayed: old },
            AllocationEvent::Lost {
                cause: RelayError::BadCredentials
            },
        ]
    );
}

#[test]
fn refusals_are_named_and_retried_at_growing_intervals() {
    for (code, cause) in [
        (486, RelayError::QuotaReached),
        (508, RelayError::InsufficientCapacity),
        (440, RelayError::Unsupported(440)),
        (441, RelayError::AllocationMismatch(441)),
        (403, RelayError::Refused(403)),
        (500, RelayError::Refused(500)),
        (300, RelayError::Refused(300)),
    ] {
        // 440 takes one request for each wish.
        let requests = if code == 440 { 3 } else { 1 };
        let at_least = match code {
            486 | 508 => secs(60),
            440 => secs(225),
            _ => Duration::from_millis(3750),
        };
        let mut server = dual_stack(Style::Coturn);
        server.errors = std::iter::repeat_n((ALLOCATE, code), 1000).collect();
        let mut world = world_with(server);
        world.run_secs(1800);
        assert_eq!(losses(&mut world), [cause]);
        let attempts: Vec<_> = of_method(&world, ALLOCATE)
            .into_iter()
            .filter(|s| s.signed)
            .map(|s| s.at)
            .step_by(requests)
            .collect();
        assert!((7..=14).contains(&attempts.len()), "{}", attempts.len());
        let first = attempts[1] - attempts[0];
        assert!(first >= at_least, "{code}: {first:?}");
        let last = attempts[attempts.len() - 1] - attempts[attempts.len() - 2];
        assert!(last > secs(200), "{last:?}");
        world.servers[0].errors.clear();
        world.run_secs(301);
        assert!(world.machine.is_allocated());
    }
}

#[test]
fn server_that_refuses_a_second_family_is_asked_for_one() {
    for code in [400, 420, 440, 442] {
        let mut server = dual_stack(Style::Coturn);
        server.refuses_additional = Some(code);
        let mut world = world_with(server);
        world.run_secs(1);
        assert_eq!(relayed(&world).len(), 1, "{code}");
        assert_eq!(losses(&mut world), []);
    }
}

#[test]
fn server_with_ipv6_only_is_asked_for_that() {
    let mut server = TurnServer::new(Style::Coturn, &[V6], &["2001:db8::10"]);
    server.refuses_additional = Some(440);
    let mut world = world_with(server);
    world.run_secs(1);
    let ips: Vec<_> = relayed(&world).iter().map(SocketAddr::ip).collect();
    assert_eq!(ips, [addr(V6).ip()]);
}

#[test]
fn one_family_is_enough_and_peers_of_the_other_are_ignored() {
    let server = TurnServer::new(Style::Coturn, &[V4], &["192.0.2.10"]);
    let mut world = world_with(server);
    let v6_peer = addr("[2001:db8:9::1]:5");
    world.machine.bind_channel(world.now, v6_peer);
    world.machine.bind_channel(world.now, peer(1));
    world.run_secs(1);
    world.machine.bind_channel(world.now, v6_peer);
    world.run_secs(1);
    assert_eq!(relayed(&world), [addr("192.0.2.10:49152")]);
    assert_eq!(world.servers[0].channels(), [(0x4000, peer(1))]);
    assert_eq!(world.machine.channel_to(world.now, v6_peer), None);
}

#[test]
fn unsigned_success_is_not_believed() {
    let mut server = dual_stack(Style::Coturn);
    server.signs_success = false;
    let mut world = world_with(server);
    world.run_secs(60);
    assert!(!world.machine.is_allocated());
    assert_eq!(losses(&mut world), [RelayError::Integrity]);
}

#[test]
fn success_under_another_key_is_not_believed() {
    let mut server = dual_stack(Style::Coturn);
    server.forged_key = Some("guess".to_owned());
    let mut world = world_with(server);
    world.run_secs(60);
    assert!(!world.machine.is_allocated());
    assert_eq!(losses(&mut world), [RelayError::Integrity]);
}

#[test]
fn server_that_asks_for_no_credentials_is_not_believed() {
    let mut server = dual_stack(Style::Coturn);
    server.open = true;
    let mut world = world_with(server);
    world.run_secs(60);
    assert!(!world.machine.is_allocated());
    assert!(world.servers[0].count(ALLOCATE) < 40);
}

#[test]
fn realm_that_changes_is_followed() {
    let mut world = allocated(Style::Coturn);
    world.servers[0].realm = "renamed.example".to_owned();
    world.run_secs(700);
    assert!(world.machine.is_allocated());
    assert_eq!(losses(&mut world), []);
}

#[test]
fn unsigned_error_is_not_obeyed_but_explains_the_silence() {
    let mut server = dual_stack(Style::Coturn);
    server.signs_errors = false;
    server.errors = std::iter::repeat_n((ALLOCATE, 486), 1000).collect();
    let mut world = world_with(server);
    world.run_secs(5);
    assert_eq!(losses(&mut world), [], "it may be forged");
    world.run_secs(5);
    assert_eq!(losses(&mut world), [RelayError::QuotaReached]);
}

#[test]
fn answers_from_another_address_are_ignored() {
    let mut world = world(Style::Stock);
    let forged: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
    let copy = Rc::clone(&forged);
    world.filter = Box::new(move |to_server, datagram| {
        if !to_server {
            copy.borrow_mut().push(datagram.to_vec());
            return Fate::Lose;
        }
        Fate::Deliver
    });
    world.run_secs(1);
    let datagrams = forged.take();
    assert!(!datagrams.is_empty());
    let now = world.now;
    for datagram in datagrams {
        let from = addr("192.0.2.66:3478");
        assert!(
            !world
                .machine
                .handle_packet(now, addr(LOCAL_V4), from, &datagram)
        );
    }
    assert_eq!(events(&mut world), []);
}

#[test]
fn silent_relay_is_lost_and_probed_until_it_is_back() {
    let mut world = allocated(Style::Stock);
    let old = relayed(&world);
    world.servers[0].silent = true;
    world.run_secs(40);
    assert_eq!(
        events(&mut world),
        [
            AllocationEvent::Invalidated { relayed: old },
            AllocationEvent::Lost {
                cause: RelayError::NoResponse
            },
        ]
    );
    world.run_secs(3600);
    assert_eq!(events(&mut world), [], "told once");
    world.servers[0].restart();
    world.servers[0].silent = false;
    world.run_secs(40);
    assert!(world.machine.is_allocated());
}

#[test]
fn relay_that_restarts_quickly_is_back_quickly() {
    let mut world = allocated(Style::Stock);
    world.servers[0].silent = true;
    while world.machine.is_allocated() {
        world.run_secs(1);
    }
    world.servers[0].restart();
    world.servers[0].silent = false;
    world.run_secs(2);
    assert!(world.machine.is_allocated());
}

#[test]
fn first_attempt_that_fails_is_told() {
    let mut server = dual_stack(Style::Stock);
    server.silent = true;
    let mut world = world_with(server);
    assert!(world.machine.is_hopeful());
    world.run_secs(9);
    assert_eq!(losses(&mut world), [RelayError::NoResponse]);
    assert!(!world.machine.is_hopeful());
}

#[test]
fn allocation_that_expired_while_the_clock_jumped_starts_over() {
    let mut world = allocated(Style::Coturn);
    world.now += secs(700);
    world.servers[0].restart();
    world.run_secs(3);
    assert!(world.machine.is_allocated());
    assert!(losses(&mut world).len() <= 1);
}

#[test]
fn a_hundred_peers_wait_for_the_allocation() {
    let mut world = world(Style::Stock);
    for n in 1..=150 {
        world.machine.bind_channel(world.now, peer(n));
        world.machine.bind_channel(world.now, peer(n));
        assert_eq!(world.machine.channel_to(world.now, peer(n)), None);
    }
    world.run_secs(1);
    let peers: Vec<_> = world.servers[0].channels();
    assert_eq!(peers.len(), 100);
    assert_eq!(world.servers[0].count(CHANNEL_BIND), 100);
}

#[test]
fn channel_data_flows_both_ways() {
    for pads in [false, true] {
        let mut world = allocated(Style::Stock);
        world.servers[0].pads = pads;
        let now = world.now;
        world.machine.bind_channel(now, peer(1));
        assert!(
            world.machine.channel_to(now, peer(1)).is_some(),
            "optimistic"
        );
        world.run_secs(1);

        let path = world.machine.channel_to(world.now, peer(1)).unwrap();
        assert_eq!(path.relay, world.machine.active_socket().unwrap());
        let mut datagram = channel_data::header(path.channel, 5).unwrap().to_vec();
        datagram.extend_from_slice(b"hello");
        world.send_raw(path.relay, datagram);
        world.run_secs(1);
        let [(_, to, payload)] = &world.servers[0].forwarded[..] else {
            panic!("{:?}", world.servers[0].forwarded);
        };
        assert_eq!((*to, &payload[..]), (peer(1), &b"hello"[..]));

        let (_, datagram) = world.servers[0]
            .packet_from(world.now, peer(1), b"world")
            .unwrap();
        let inner = world.machine.decapsulate(world.now, &datagram).unwrap();
        assert_eq!(inner.peer, peer(1));
        assert_eq!(inner.relayed, addr("192.0.2.10:49152"));
        assert_eq!(inner.payload, b"world");
    }
}

#[test]
fn channel_in_use_lives_for_hours_and_an_idle_one_ends() {
    let mut world = allocated(Style::Coturn);
    world.machine.bind_channel(world.now, peer(1));
    world.machine.bind_channel(world.now, peer(2));
    for _ in 0..120 {
        world.run_secs(60);
        if let Some((_, datagram)) = world.servers[0].packet_from(world.now, peer(1), b"x") {
            world.receive_raw(addr(V4), datagram);
        }
    }
    assert!(world.machine.channel_to(world.now, peer(1)).is_some());
    assert_eq!(world.machine.channel_to(world.now, peer(2)), None);
    let binds = world.servers[0].count(CHANNEL_BIND);
    assert!((30..=33).contains(&binds), "{binds}");
    world.machine.bind_channel(world.now, peer(2));
    world.run_secs(1);
    assert!(world.servers[0].channels().iter().any(|c| c.1 == peer(2)));
}

#[test]
fn refused_channel_is_forgotten_and_nothing_else() {
    let mut world = allocated(Style::Coturn);
    world.servers[0].errors.push_back((CHANNEL_BIND, 403));
    world.machine.bind_channel(world.now, peer(1));
    world.machine.bind_channel(world.now, peer(2));
    world.run_secs(1);
    assert_eq!(world.machine.channel_to(world.now, peer(1)), None);
    assert!(world.machine.channel_to(world.now, peer(2)).is_some());
    assert_eq!(losses(&mut world), []);
}

#[test]
fn channel_bind_that_gets_lost_does_not_cost_a_living_relay() {
    let mut world = allocated(Style::Coturn);
    world.filter = Box::new(|to_server, datagram| {
        if to_server && method_of(datagram) == Some(CHANNEL_BIND) {
            Fate::Lose
        } else {
            Fate::Deliver
        }
    });
    world.run_secs(22);
    world.machine.bind_channel(world.now, peer(1));
    world.run_secs(60);
    assert!(world.machine.is_allocated());
    assert_eq!(losses(&mut world), []);
    assert_eq!(world.machine.channel_to(world.now, peer(1)), None);
}

#[test]
fn released_allocation_is_given_back_even_when_packets_get_lost() {
    let mut world = allocated(Style::Stock);
    let mut lost = 0;
    world.filter = Box::new(move |to_server, _| {
        lost += usize::from(to_server);
        if to_server && lost <= 2 {
            Fate::Lose
        } else {
            Fate::Deliver
        }
    });
    world.machine.release(world.now);
    world.machine.release(world.now);
    assert_eq!(events(&mut world).len(), 1, "invalidated once");
    world.run_secs(4);
    assert_eq!(world.allocations(0), 0);
    assert!(world.machine.is_finished());
    assert_eq!(world.machine.poll_timeout(), None);
    let refreshes = of_method(&world, REFRESH);
    assert_eq!(refreshes.len(), 1);
    assert_eq!(refreshes[0].lifetime, Some(0));
}

#[test]
fn release_follows_a_new_nonce_and_ends_at_a_refusal() {
    let mut world = allocated(Style::Coturn);
    world.servers[0].expire_nonces();
    world.machine.release(world.now);
    world.run_secs(2);
    assert_eq!(world.allocations(0), 0);
    assert!(world.machine.is_finished());

    let mut world = allocated(Style::Coturn);
    world.servers[0].users.clear();
    world.machine.release(world.now);
    world.run_secs(1);
    assert!(world.machine.is_finished());
}

#[test]
fn allocation_that_may_have_come_about_is_released_too() {
    let mut world = world(Style::Coturn);
    world.filter = Box::new(|to_server, datagram| {
        // The signed ALLOCATE's success never arrives.
        if !to_server
            && method_of(datagram) == Some(ALLOCATE)
            && datagram[0] == 1
            && datagram[1] == 3
        {
            Fate::Lose
        } else {
            Fate::Deliver
        }
    });
    world.run(Duration::from_millis(500));
    assert_eq!(world.allocations(0), 1);
    assert!(!world.machine.is_allocated());
    world.machine.release(world.now);
    world.run_secs(2);
    assert_eq!(world.allocations(0), 0);
}

#[test]
fn changed_nat_mapping_is_noticed_with_the_next_keep_alive() {
    let server = TurnServer::new(Style::Coturn, &[V4], &["192.0.2.10"]);
    let mut world = world_with(server);
    world.run_secs(1);
    let old = relayed(&world);
    events(&mut world);
    world.nat_v4 = addr("203.0.113.77:42000");
    world.run_secs(26);
    assert!(world.machine.is_allocated());
    assert_ne!(relayed(&world), old);
    assert_eq!(
        events(&mut world)[..2],
        [
            AllocationEvent::Mapped {
                local: addr(LOCAL_V4),
                mapped: Some(addr("203.0.113.77:42000")),
            },
            AllocationEvent::Invalidated { relayed: old },
        ]
    );
}

#[test]
fn server_that_wants_binding_signed_is_usable() {
    let mut server = dual_stack(Style::Coturn);
    server.errors = std::iter::repeat_n((BINDING, 401), 1000).collect();
    let mut world = world_with(server);
    world.run_secs(600);
    assert!(world.machine.is_allocated());
    assert!(events(&mut world).contains(&AllocationEvent::Mapped {
        local: addr(LOCAL_V4),
        mapped: None,
    }));
}

#[test]
fn poke_checks_the_allocation_at_most_every_five_seconds() {
    let mut world = allocated(Style::Stock);
    for _ in 0..100 {
        world.run(Duration::from_millis(200));
        let now = world.now;
        world.machine.poke(now);
    }
    let refreshes = world.servers[0].count(REFRESH);
    assert!((3..=5).contains(&refreshes), "{refreshes}");
}

#[test]
fn poke_retries_a_failed_relay_at_once() {
    let mut server = dual_stack(Style::Coturn);
    server.errors.push_back((ALLOCATE, 486));
    let mut world = world_with(server);
    world.run(Duration::from_millis(500));
    assert!(!world.machine.is_allocated());
    world.now += Duration::from_millis(4600);
    let now = world.now;
    world.machine.poke(now);
    world.run(Duration::from_millis(100));
    assert!(world.machine.is_allocated());
}

#[test]
fn relay_without_address_fails_and_never_wakes() {
    let now = Instant::now();
    let mut allocation = Allocation::new(now, &entry(None, None), 1);
    assert_eq!(
        allocation.poll_event(),
        Some(AllocationEvent::Lost {
            cause: RelayError::NoAddress
        })
    );
    assert_eq!(allocation.poll_timeout(), None);
    assert_eq!(allocation.poll_transmit(), None);
}

#[test]
fn user_name_that_cannot_be_sent_is_bad_credentials() {
    let now = Instant::now();
    let mut entry = entry(Some(V4), None);
    entry.username = "x".repeat(600);
    let mut world = World::new(
        now,
        Allocation::new(now, &entry, 1),
        vec![dual_stack(Style::Stock)],
    );
    world.run_secs(1);
    assert_eq!(losses(&mut world), [RelayError::BadCredentials]);
}

#[test]
fn debug_output_holds_no_secrets() {
    let world = allocated(Style::Stock);
    let debug = format!("{:?}", world.machine);
    assert!(!debug.contains(PASSWORD));
}

#[test]
fn status_describes_the_allocation() {
    let mut world = allocated(Style::Stock);
    world.machine.bind_channel(world.now, peer(1));
    world.run_secs(9);
    let status = world.machine.status(world.now, 1_000_000.0);
    assert_eq!(status.state, "allocated");
    assert_eq!(status.addresses, [V4, V6]);
    assert_eq!(status.relayed, ["192.0.2.10:49152", "[2001:db8::10]:49152"]);
    assert_eq!(status.channels, 1);
    assert!((999_990.0..999_991.0).contains(&status.since));
    assert_eq!(status.credentials_expire_at, Some(2_145_916_800.0));
    assert_eq!((status.last_error, status.last_error_at), (None, None));
    assert!((0.019..0.021).contains(&status.rtt.unwrap()));
    assert_eq!(status.allocated_at, Some(status.since));
    let ends = status.allocation_expires_at.unwrap();
    let lifetime = ends - status.allocated_at.unwrap();
    assert!((599.0..=600.0).contains(&lifetime), "{lifetime}");

    world.run_secs(400);
    let later = world.machine.status(world.now, 1_000_400.0);
    assert_eq!(
        later.allocated_at, status.allocated_at,
        "refreshed, not made anew"
    );
    assert!((299.0..302.0).contains(&(later.allocation_expires_at.unwrap() - ends)));
}

#[test]
fn channel_in_use_is_bound_anew_before_its_permission_ends() {
    let mut world = allocated(Style::Coturn);
    world.machine.bind_channel(world.now, peer(1));
    for n in 0..720 {
        world.run_secs(5);
        let (_, datagram) = world.servers[0]
            .packet_from(world.now, peer(1), b"x")
            .unwrap_or_else(|| panic!("no channel after {} s", 5 * n));
        world.receive_raw(addr(V4), datagram);
    }
    let binds = of_method(&world, CHANNEL_BIND);
    assert!(binds.len() >= 13, "{}", binds.len());
    for pair in binds.windows(2) {
        let pause = pair[1].at - pair[0].at;
        assert!(pause <= secs(290), "{pause:?}");
    }
}

#[test]
fn refused_refresh_of_a_channel_does_not_cut_it_off() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = allocated(style);
        world.machine.bind_channel(world.now, peer(1));
        for n in 0..700 {
            if n == 10 {
                world.servers[0].errors.push_back((CHANNEL_BIND, 508));
            }
            world.run_secs(1);
            let path = world.machine.channel_to(world.now, peer(1));
            assert!(path.is_some(), "gone after {n} s");
            let (_, datagram) = world.servers[0]
                .packet_from(world.now, peer(1), b"x")
                .unwrap();
            world.receive_raw(addr(V4), datagram);
        }
        let binds = of_method(&world, CHANNEL_BIND);
        let answers: Vec<_> = binds.iter().map(|s| s.answer).collect();
        assert_eq!(answers[..3], [0, 508, 0]);
        let pause = binds[2].at - binds[1].at;
        assert!((secs(14)..=secs(16)).contains(&pause), "{pause:?}");
        assert_eq!(world.servers[0].channels(), [(0x4000, peer(1))]);
    }
}

#[test]
fn realm_that_changes_under_several_requests_is_followed_by_all() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = allocated(style);
        world.servers[0].realm = "renamed.example".to_owned();
        for n in 1..=3 {
            world.machine.bind_channel(world.now, peer(n));
        }
        world.run_secs(1);
        assert_eq!(losses(&mut world), []);
        assert!(world.machine.is_allocated());
        assert_eq!(world.servers[0].channels().len(), 3);
    }
}

#[test]
fn allocation_without_a_usable_address_is_given_back() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = world_with(TurnServer::new(style, &[V4], &["0.0.0.0"]));
        let mut lost = false;
        world.filter = Box::new(move |to_server, datagram| {
            if to_server
                && method_of(datagram) == Some(REFRESH)
                && !std::mem::replace(&mut lost, true)
            {
                Fate::Lose
            } else {
                Fate::Deliver
            }
        });
        world.run_secs(3);
        assert_eq!(losses(&mut world), [RelayError::Protocol]);
        assert_eq!(world.allocations(0), 0);
        let refreshes = of_method(&world, REFRESH);
        assert_eq!(refreshes.len(), 1);
        assert_eq!((refreshes[0].lifetime, refreshes[0].answer), (Some(0), 0));
    }
}

#[test]
fn answer_with_something_that_must_be_understood_and_is_not_is_not_used() {
    for style in [Style::Coturn, Style::Stock] {
        for answer in [0, 401] {
            let mut server = dual_stack(style);
            server.adds_unknown_to = Some((ALLOCATE, answer));
            let mut world = world_with(server);
            world.run_secs(3);
            assert_eq!(losses(&mut world), [RelayError::Protocol], "{answer}");
            assert_eq!(world.allocations(0), 0, "nothing stays behind");
            let seen = &world.servers[0].seen;
            assert_eq!(seen.iter().any(|s| s.method == REFRESH), answer == 0);
        }

        let mut world = allocated(style);
        world.servers[0].adds_unknown_to = Some((CHANNEL_BIND, 0));
        world.machine.bind_channel(world.now, peer(1));
        world.run(Duration::from_millis(500));
        assert_eq!(world.machine.channel_to(world.now, peer(1)), None);
        world.servers[0].adds_unknown_to = Some((REFRESH, 0));
        world.run_secs(301);
        assert_eq!(world.machine.last_error(), Some(RelayError::Protocol));
        assert!(world.machine.is_allocated());
        world.servers[0].adds_unknown_to = None;
        world.run_secs(20);
        assert_eq!(world.machine.last_error(), None);

        let mut server = dual_stack(style);
        server.adds_unknown_to = Some((BINDING, 0));
        let mut world = world_with(server);
        world.run_secs(1);
        // The other family is known by BINDING alone.
        assert!(
            world
                .machine
                .mappings()
                .any(|m| m == (addr(LOCAL_V6), None))
        );
    }
}

#[test]
fn error_that_does_not_say_which_is_a_failure() {
    let mut server = dual_stack(Style::Coturn);
    server.names_errors = false;
    let mut world = world_with(server);
    world.run_secs(2);
    assert_eq!(losses(&mut world), [RelayError::Protocol]);
    assert_eq!(world.servers[0].count(ALLOCATE), 1, "no other wish instead");
}

#[test]
fn unsigned_400_to_a_signed_request_is_discarded() {
    let mut server = dual_stack(Style::Coturn);
    server.signs_errors = false;
    server.errors.push_back((ALLOCATE, 400));
    let mut world = world_with(server);
    world.run_secs(5);
    assert!(world.machine.is_allocated(), "a copy got another answer");
    let answers: Vec<_> = of_method(&world, ALLOCATE)
        .iter()
        .map(|s| (s.answer, s.attributes.contains(&0x8000)))
        .collect();
    assert_eq!(answers, [(401, true), (400, true), (0, true)]);
}

#[test]
fn release_of_an_allocation_that_is_gone_is_done() {
    for style in [Style::Coturn, Style::Stock] {
        let mut world = allocated(style);
        world.servers[0].restart();
        world.machine.release(world.now);
        world.run_secs(2);
        let refreshes = of_method(&world, REFRESH);
        assert_eq!(refreshes.last().map(|s| s.answer), Some(437));
        assert!(world.machine.is_finished());
        assert_eq!(losses(&mut world), []);
    }
}

#[test]
fn every_transaction_has_an_id_of_its_own_and_only_copies_share_one() {
    let mut world = world(Style::Coturn);
    let sent: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
    let copy = Rc::clone(&sent);
    let mut rng = StdRng::seed_from_u64(3);
    world.filter = Box::new(move |to_server, datagram| {
        if to_server && method_of(datagram).is_some() {
            copy.borrow_mut().push(datagram.to_vec());
        }
        if rng.random_bool(0.1) {
            Fate::Lose
        } else {
            Fate::Deliver
        }
    });
    for n in 0..360 {
        world.machine.bind_channel(world.now, peer(n));
        world.run_secs(10);
    }
    let mut by_id: std::collections::BTreeMap<Vec<u8>, Vec<u8>> = Default::default();
    let mut copies = 0;
    let mut ones = [0u32; 96];
    for datagram in sent.take() {
        let id = datagram[8..20].to_vec();
        match by_id.get(&id) {
            Some(first) => {
                assert_eq!(*first, datagram);
                copies += 1;
            }
            None => {
                for (n, count) in ones.iter_mut().enumerate() {
                    *count += u32::from(id[n / 8] >> (n % 8) & 1);
                }
                by_id.insert(id, datagram);
            }
        }
    }
    assert!(copies > 20, "{copies}");
    let ids = u32::try_from(by_id.len()).unwrap();
    assert!(ids > 500, "{ids}");
    for (n, count) in ones.into_iter().enumerate() {
        assert!(
            (2 * ids / 5..=3 * ids / 5).contains(&count),
            "bit {n}: {count} of {ids}"
        );
    }
}

#[test]
fn channels_are_kept_for_a_peer_that_is_asked_for_again_and_again() {
    let mut world = allocated(Style::Coturn);
    for _ in 0..720 {
        world.machine.bind_channel(world.now, peer(1));
        world.run_secs(5);
        let kept = world.servers[0].packet_from(world.now, peer(1), b"x");
        assert!(kept.is_some());
    }
    assert!(world.servers[0].count(CHANNEL_BIND) <= 16);
}

proptest! {
    #[test]
    fn arbitrary_datagrams_never_panic(
        datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..20),
        first in prop_oneof![Just(0u8), Just(1), Just(0x40), any::<u8>()],
    ) {
        let mut world = allocated(Style::Stock);
        world.machine.bind_channel(world.now, peer(1));
        for mut datagram in datagrams {
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            let now = world.now;
            world.machine.handle_packet(now, addr(LOCAL_V4), addr(V4), &datagram);
            world.machine.decapsulate(now, &datagram);
        }
        world.run_secs(30);
        prop_assert!(world.machine.is_allocated());
    }

    /// Corrupted answers of a real server: nothing worse than a lost packet.
    #[test]
    fn corrupted_answers_never_panic(seed: u64) {
        let mut world = world(Style::Stock);
        let mut rng = StdRng::seed_from_u64(seed);
        let corrupted: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
        let sink = Rc::clone(&corrupted);
        world.filter = Box::new(move |to_server, datagram| {
            if to_server {
                return Fate::Deliver;
            }
            let mut copy = datagram.to_vec();
            let at = rng.random_range(0..copy.len());
            copy[at] ^= 1 << rng.random_range(0..8);
            sink.borrow_mut().push(copy);
            Fate::Late(Duration::from_millis(5))
        });
        for _ in 0..50 {
            world.run(Duration::from_millis(5));
            for datagram in corrupted.take() {
                let now = world.now;
                world.machine.handle_packet(now, addr(LOCAL_V4), addr(V4), &datagram);
                world.machine.decapsulate(now, &datagram);
            }
        }
    }
}
