//! Random networks and what happens to them. Every schedule is told by its seed; a failing one
//! prints its story.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::nat::{Behaviour, Scope};
use super::network::Line;
use super::oracle::rank;
use super::tests::{KINDS, best};
use super::world::{Access, Place, Plan, V4, V6, World};
use crate::connectivity::relay::double::Style;
use crate::datapath::peers::PathKind;

/// Longer than any pause between two searches for a better path that a schedule can cause.
const CALM: f64 = 660.0;

/// A client may have to notice that its handshakes came to nothing, 20 s, before it asks again.
const RECOVERY: f64 = 45.0;

fn line(rng: &mut SmallRng) -> Line {
    Line {
        delay: Duration::from_millis(rng.random_range(1..80)),
        jitter: Duration::from_millis(*[0, 0, 5, 40].choose(rng).unwrap()),
        loss: *[0.0, 0.0, 0.01, 0.05].choose(rng).unwrap(),
    }
}

fn access(rng: &mut SmallRng) -> Access {
    let v4 = match KINDS.choose(rng).unwrap().1 {
        V4::Behind(behaviour) => V4::Behind(Behaviour {
            hairpins: rng.random_bool(0.5),
            ..behaviour
        }),
        other => other,
    };
    let v6 = *[V6::None, V6::Open, V6::Stateful].choose(rng).unwrap();
    let v4 = if v6 != V6::None && rng.random_bool(0.2) {
        V4::None
    } else {
        v4
    };
    Access {
        v4,
        v6,
        only_relays: rng.random_bool(0.1),
        isolates: rng.random_bool(0.3),
    }
}

fn plan(seed: u64, rng: &mut SmallRng) -> Plan {
    let gateway = (access(rng), line(rng));
    let mut clients = Vec::new();
    for _ in 0..rng.random_range(1..=3) {
        clients.push(match rng.random_range(0..5) {
            0 => Place::WithGateway,
            1 if !clients.is_empty() => Place::WithPrevious,
            _ => Place::Own(access(rng), line(rng)),
        });
    }
    // A client uses one relay; with relays of different families its choice would decide.
    let families = *[(true, true), (true, true), (true, false), (false, true)]
        .choose(rng)
        .unwrap();
    let relays = vec![families; rng.random_range(1..=2)];
    Plan {
        seed,
        gateway,
        clients,
        relays,
        style: *[Style::Stock, Style::Coturn].choose(rng).unwrap(),
    }
}

/// Does something to the world that a network, a relay or the portal might do.
fn disturb(world: &mut World, rng: &mut SmallRng) {
    let relays = world.relay_count();
    match rng.random_range(0..10) {
        0 | 1 => {
            let n = rng.random_range(0..world.devices.len());
            let cut = rng.random_bool(0.5);
            let (a, b) = (world.gateway_host, world.devices[n].host);
            world.network.set_cut(a, b, cut);
            world.tell(format!("direct way to client {n} cut: {cut}"));
        }
        2 => {
            let silent = rng.random_bool(0.5);
            world.silence_relay(rng.random_range(0..relays), silent);
        }
        3 => world.restart_relay(rng.random_range(0..relays)),
        4 => {
            let which: Vec<usize> = (0..relays).filter(|_| rng.random_bool(0.6)).collect();
            world.offer_relays(&which);
        }
        5 => {
            let site = world.network.site_of(world.gateway_host);
            world.restart_router(site);
        }
        6 => {
            let n = rng.random_range(0..world.devices.len());
            let site = world.network.site_of(world.devices[n].host);
            world.restart_router(site);
        }
        7 => world.set_portal(!world.portal_up),
        8 => {
            let n = rng.random_range(0..world.devices.len());
            world.devices[n].active ^= true;
            let active = world.devices[n].active;
            world.tell(format!("client {n} active: {active}"));
        }
        _ => {}
    }
}

/// A timer storm would take hundreds; per client, checks of many pairs add up.
fn check_wake_ups(world: &mut World, seconds: f64) {
    let clients = world.devices.len() as f64;
    let limit = (60.0 * clients + 60.0) * (seconds + 1.0);
    let wake_ups = std::mem::take(&mut world.wake_ups) as f64;
    assert!(
        wake_ups <= limit,
        "{wake_ups} wake-ups in {seconds} s\n{}",
        world.report()
    );
}

fn calm_down(world: &mut World) {
    world.tell("calm");
    world.set_portal(true);
    let all: Vec<usize> = (0..world.relay_count()).collect();
    for relay in &all {
        world.silence_relay(*relay, false);
    }
    world.offer_relays(&all);
    for n in 0..world.devices.len() {
        let (a, b) = (world.gateway_host, world.devices[n].host);
        world.network.set_cut(a, b, false);
        world.devices[n].active = true;
    }
}

fn schedule(seed: u64) -> Vec<String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let plan = plan(seed, &mut rng);
    let mut world = World::new(&plan);
    world.tell(format!("seed {seed}"));
    let clients = 0..plan.clients.len();

    // Whoever can be reached is reached in ten seconds.
    world.run_secs(10.0);
    check_wake_ups(&mut world, 10.0);
    let possible = |world: &World| -> Vec<[Option<PathKind>; 2]> {
        clients.clone().map(|n| best(world, &plan, n)).collect()
    };
    let expected: Vec<_> = possible(&world).iter().map(|[_, worst]| *worst).collect();
    for n in clients.clone() {
        let answered = !world.devices[n].flow.answers.is_empty();
        assert!(
            answered || expected[n].is_none(),
            "client {n} is not served within 10 s, although {:?} is possible\n{}",
            expected[n],
            world.report()
        );
    }

    for _ in 0..rng.random_range(0..12) {
        disturb(&mut world, &mut rng);
        let seconds = *[0.1, 1.0, 3.0, 10.0, 30.0].choose(&mut rng).unwrap();
        world.run_secs(seconds);
        check_wake_ups(&mut world, seconds);
    }

    calm_down(&mut world);
    let since = world.now;
    world.run_secs(RECOVERY);
    let possible = possible(&world);
    let reachable: Vec<usize> = clients
        .clone()
        .filter(|n| possible[*n][0].is_some())
        .collect();
    let served = |world: &World, n: usize| world.answered_after(n, since).is_some();
    for n in &reachable {
        // A client whose router gives it another port hears of it from its relay only when it
        // refreshes its allocation there.
        assert!(
            served(&world, *n) || world.devices[*n].moved,
            "client {n} is not served again\n{}",
            world.report()
        );
    }
    let done = |world: &World, n: usize| {
        let both = Some(PathKind::RelayBoth);
        let site = world.network.site_of(world.devices[n].host);
        let good = if world.network.sites[site].only_relays {
            // It depends on its own relay, and its TURN library does not ask again for a channel
            // that it once failed to get.
            rank(both)
        } else {
            rank(possible[n][1]).min(rank(both))
        };
        served(world, n) && rank(world.kind(n)) <= good
    };
    let mut seconds = RECOVERY;
    while seconds < CALM && !reachable.iter().all(|n| done(&world, *n)) {
        world.run_secs(15.0);
        seconds += 15.0;
    }
    check_wake_ups(&mut world, seconds);
    for n in reachable {
        assert!(
            done(&world, n),
            "client {n}: {:?} in the end, although {:?} are possible\n{}",
            world.kind(n),
            possible[n],
            world.report()
        );
        let overtaken = world.devices[n].flow.overtaken;
        assert!(
            overtaken == 0 || jitters(&plan),
            "{overtaken} packets overtaken\n{}",
            world.report()
        );
    }
    assert_eq!(world.astray, 0, "{}", world.report());

    world.shut_down();
    // The last word to a relay may be lost; then the allocation ends by itself.
    world.run_secs(5.0);
    let left = world.allocations();
    world.run_secs(600.0);
    // What it has no way back to ends by itself.
    assert!(
        left == 0 || loses(&plan) || world.moved,
        "{left} allocations stay\n{}",
        world.report()
    );
    assert_eq!(world.allocations(), 0, "{}", world.report());
    world.story
}

fn lines(plan: &Plan) -> impl Iterator<Item = Line> + '_ {
    let own = plan.clients.iter().filter_map(|place| match place {
        Place::Own(_, line) => Some(*line),
        _ => None,
    });
    own.chain([plan.gateway.1])
}

fn jitters(plan: &Plan) -> bool {
    lines(plan).any(|line| line.jitter > Duration::ZERO)
}

fn loses(plan: &Plan) -> bool {
    lines(plan).any(|line| line.loss > 0.0)
}

/// `FIREZONE_NETWORK_SCHEDULES` says how many; `FIREZONE_SEED` runs a single one and tells its
/// story.
fn schedules(shard: u64, shards: u64) {
    if let Ok(seed) = std::env::var("FIREZONE_SEED") {
        if shard == 0 {
            let story = schedule(seed.parse().expect("a number"));
            eprintln!("{}", story.join("\n"));
        }
        return;
    }
    let count: u64 = std::env::var("FIREZONE_NETWORK_SCHEDULES")
        .ok()
        .map_or(40, |n| n.parse().expect("a number of schedules"));
    for seed in (shard..count).step_by(usize::try_from(shards).unwrap()) {
        schedule(seed);
    }
}

#[test]
fn every_random_network_ends_on_the_best_path_1_of_4() {
    schedules(0, 4);
}

#[test]
fn every_random_network_ends_on_the_best_path_2_of_4() {
    schedules(1, 4);
}

#[test]
fn every_random_network_ends_on_the_best_path_3_of_4() {
    schedules(2, 4);
}

#[test]
fn every_random_network_ends_on_the_best_path_4_of_4() {
    schedules(3, 4);
}

/// Nearly all do: in which order the client's TURN library repeats requests is its own affair.
#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in 0..8 {
        let (first, second) = (schedule(seed), schedule(seed));
        for (n, line) in first.iter().enumerate() {
            assert_eq!(Some(line), second.get(n), "seed {seed}, line {n}");
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
    }
}

#[test]
fn scopes_are_all_in_use() {
    // The table of kinds is what the schedules draw from.
    for scope in [Scope::Any, Scope::Address, Scope::AddressAndPort] {
        let used = |f: fn(&Behaviour) -> Scope| {
            KINDS
                .iter()
                .any(|(_, v4)| matches!(v4, V4::Behind(b) if f(b) == scope))
        };
        assert!(used(|b| b.mapping) && used(|b| b.filtering), "{scope:?}");
    }
}
