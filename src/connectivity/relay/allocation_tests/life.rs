//! How an allocation comes about and is kept: families, addresses, refreshes, what the status says.

#![allow(clippy::unwrap_used)]

use super::*;

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
