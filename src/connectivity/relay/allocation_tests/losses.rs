//! Lost packets, relays that are silent, forget or refuse, and allocations given back.

#![allow(clippy::unwrap_used)]

use super::*;

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
