//! Credentials, realms and nonces, and answers that are not to be believed.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn realm_is_the_one_that_the_server_names() {
    let mut server = dual_stack(Style::Coturn);
    server.realm = "example.org".to_owned();
    let mut world = world_with(server);
    world.run_secs(1);
    assert!(world.machine.is_allocated());
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
