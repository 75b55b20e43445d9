//! Channels and what flows through them.

#![allow(clippy::unwrap_used)]

use super::*;

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
