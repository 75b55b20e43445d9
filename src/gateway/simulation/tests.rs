//! Which path comes of which network.

use std::net::IpAddr;
use std::time::Duration;

use super::nat::{Behaviour, Scope};
use super::network::Line;
use super::oracle::{self, Question, rank};
use super::world::{Access, Place, Plan, V4, V6, World};
use crate::connectivity::relay::double::Style;
use crate::datapath::peers::PathKind;

pub(super) const LINE: Line = Line {
    delay: Duration::from_millis(10),
    jitter: Duration::ZERO,
    loss: 0.0,
};

const fn behind(mapping: Scope, filtering: Scope, preserves_ports: bool) -> V4 {
    V4::Behind(Behaviour {
        mapping,
        filtering,
        preserves_ports,
        hairpins: false,
    })
}

/// All kinds of IPv4 access, by their names in the field.
pub(super) const KINDS: [(&str, V4); 8] = [
    ("no NAT", V4::Public),
    ("full cone", behind(Scope::Any, Scope::Any, false)),
    ("restricted cone", behind(Scope::Any, Scope::Address, false)),
    (
        "port-restricted cone",
        behind(Scope::Any, Scope::AddressAndPort, false),
    ),
    (
        "keeps ports",
        behind(Scope::Any, Scope::AddressAndPort, true),
    ),
    (
        "address-dependent",
        behind(Scope::Address, Scope::Address, false),
    ),
    (
        "symmetric",
        behind(Scope::AddressAndPort, Scope::AddressAndPort, false),
    ),
    (
        "symmetric that keeps ports",
        behind(Scope::AddressAndPort, Scope::AddressAndPort, true),
    ),
];

pub(super) const fn access(v4: V4, v6: V6) -> Access {
    Access {
        v4,
        v6,
        only_relays: false,
        isolates: false,
    }
}

pub(super) fn plan(gateway: Access, client: Access, style: Style) -> Plan {
    Plan {
        seed: 1,
        gateway: (gateway, LINE),
        clients: vec![Place::Own(client, LINE)],
        relays: vec![(true, true), (true, true)],
        style,
    }
}

/// The best kind of path to a client, and the worst that is as good by its priority.
pub(super) fn best(world: &World, plan: &Plan, client: usize) -> [Option<PathKind>; 2] {
    let host = world.devices[client].host;
    let site = world.network.site_of(host);
    let neighbours: Vec<_> = world
        .devices
        .iter()
        .map(|d| d.host)
        .filter(|other| *other != host && world.network.site_of(*other) == site)
        .collect();
    let relays = world.relay_hosts();
    let ask = |worst, first: usize| {
        // A client uses one relay, and which depends on a few milliseconds.
        let mut relays = relays.clone();
        relays.rotate_left(first);
        oracle::best(&Question {
            network: &world.network,
            relays: &relays,
            gateway: world.gateway_host,
            client: host,
            one_allocation: plan.style == Style::Stock,
            neighbours: &neighbours,
            worst,
        })
    };
    let all = || 0..relays.len();
    [
        all().map(|n| ask(false, n)).min_by_key(|kind| rank(*kind)),
        all().map(|n| ask(true, n)).max_by_key(|kind| rank(*kind)),
    ]
    .map(Option::flatten)
}

/// Lets everybody connect, and compares what came of it with what is possible.
fn ends_on_the_best(name: &str, plan: &Plan) -> Option<PathKind> {
    let mut world = World::new(plan);
    let expected: Vec<_> = (0..plan.clients.len())
        .map(|n| best(&world, plan, n)[0])
        .collect();
    world.run_secs(10.0);
    for (n, expected) in expected.iter().enumerate() {
        let story = || world.report();
        let answered = !world.devices[n].flow.answers.is_empty();
        assert_eq!(
            answered,
            expected.is_some(),
            "{name}: {expected:?}\n{}",
            story()
        );
    }
    world.run_secs(5.0);
    for (n, expected) in expected.iter().enumerate() {
        let kind = world.kind(n).filter(|_| expected.is_some());
        assert_eq!(
            rank(kind),
            rank(*expected),
            "{name}: {expected:?}, not {kind:?}\n{}",
            world.report()
        );
    }
    assert_eq!(world.astray, 0);
    expected[0]
}

/// Rows: the gateway's router, columns: the client's, both in the order of [`KINDS`]. `D` direct,
/// `1` one relay, `2` both relays. Known from the field: two ends get through to each other unless
/// both depend on who the other one is; one relay is enough unless it would have to know a
/// symmetric router's next port.
const MATRIX: [&str; 8] = [
    "DDDDDDDD", //
    "DDDDDDDD", //
    "DDDDDDDD", //
    "DDDDD11D", //
    "DDDDD11D", //
    "DDD11111", //
    "DDD11121", //
    "DDDDD11D", //
];

fn letter(kind: Option<PathKind>) -> char {
    ['D', '1', '2', '-'][usize::from(rank(kind))]
}

#[test]
fn the_documentation_shows_this_table() {
    let text = include_str!("../../../docs/connectivity.md");
    let rows: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ");
            let (_, row) = (cells.next()?, cells.collect::<String>());
            (row.len() == 8 && row.chars().all(|c| "D12".contains(c))).then_some(row)
        })
        .collect();
    assert_eq!(rows, MATRIX);
}

fn matrix(style: Style) {
    let found = KINDS.map(|(ours, gateway)| {
        let row = KINDS.map(|(theirs, client)| {
            let plan = plan(access(gateway, V6::None), access(client, V6::None), style);
            ends_on_the_best(&format!("{ours} / {theirs}"), &plan)
        });
        row.map(letter).iter().collect::<String>()
    });
    assert_eq!(found, MATRIX);
}

#[test]
fn every_pair_of_nat_types_ends_on_the_best_path_with_stock_relays() {
    matrix(Style::Stock);
}

#[test]
fn every_pair_of_nat_types_ends_on_the_best_path_with_coturn() {
    matrix(Style::Coturn);
}

const SYMMETRIC: V4 = KINDS[6].1;
const CONE: V4 = KINDS[3].1;

#[test]
fn families_that_the_ends_share_are_used_and_relays_bridge_those_they_do_not() {
    let both = access(CONE, V6::Stateful);
    let blocked = access(SYMMETRIC, V6::None);
    let v4 = access(CONE, V6::None);
    let v6 = access(V4::None, V6::Stateful);
    let open = access(V4::None, V6::Open);
    for (name, gateway, client, expected) in [
        ("dual, dual", both, both, 'D'),
        ("dual, IPv6", both, v6, 'D'),
        ("IPv6, dual", v6, both, 'D'),
        ("IPv6, IPv6", v6, v6, 'D'),
        ("IPv6 without firewall", open, open, 'D'),
        ("dual, IPv4", both, v4, 'D'),
        ("IPv4, dual", v4, both, 'D'),
        (
            "symmetric, dual and IPv6",
            access(SYMMETRIC, V6::Stateful),
            v6,
            'D',
        ),
        ("IPv4, IPv6", v4, v6, '1'),
        ("IPv6, IPv4", v6, v4, '1'),
        ("symmetric IPv4, IPv6", blocked, v6, '1'),
        // The client's relay lends it nothing but IPv4.
        ("IPv6, symmetric IPv4", v6, blocked, '2'),
    ] {
        for style in [Style::Stock, Style::Coturn] {
            let plan = plan(gateway, client, style);
            let kind = ends_on_the_best(name, &plan);
            assert_eq!(letter(kind), expected, "{name}, {style:?}");
        }
    }
}

#[test]
fn relays_of_one_family_serve_those_who_have_it() {
    let v4 = access(SYMMETRIC, V6::None);
    let v6 = access(V4::None, V6::Stateful);
    for (name, relays, gateway, client, expected) in [
        ("IPv4", (true, false), v4, v4, '2'),
        ("IPv6 in between, both IPv4", (false, true), v4, v4, '-'),
        ("IPv4 in between, both IPv6", (true, false), v6, v6, 'D'),
        ("IPv4 in between, one end each", (true, false), v4, v6, '-'),
    ] {
        let plan = Plan {
            relays: vec![relays],
            ..plan(gateway, client, Style::Stock)
        };
        assert_eq!(letter(ends_on_the_best(name, &plan)), expected, "{name}");
    }
}

#[test]
fn where_only_relays_can_be_reached_two_of_them_make_the_path() {
    let only = Access {
        only_relays: true,
        ..access(CONE, V6::None)
    };
    let free = access(CONE, V6::None);
    for (gateway, client, expected) in [(only, only, '2'), (only, free, '1'), (free, only, '1')] {
        let kind = ends_on_the_best("only relays", &plan(gateway, client, Style::Stock));
        assert_eq!(letter(kind), expected);
    }
}

#[test]
fn in_one_network_the_path_stays_inside_it_or_takes_the_hairpin() {
    for (isolates, hairpins, expected) in [
        (false, false, 'D'),
        (true, true, 'D'),
        // The relay sends back what the router does not turn around.
        (true, false, '1'),
    ] {
        let behaviour = Behaviour {
            mapping: Scope::Any,
            filtering: Scope::AddressAndPort,
            preserves_ports: true,
            hairpins,
        };
        let site = Access {
            isolates,
            ..access(V4::Behind(behaviour), V6::None)
        };
        let plan = Plan {
            clients: vec![Place::WithGateway],
            ..plan(site, site, Style::Stock)
        };
        let kind = ends_on_the_best("one network", &plan);
        assert_eq!(letter(kind), expected, "{isolates} {hairpins}");
    }
}

#[test]
fn clients_with_equal_addresses_are_told_apart() {
    // All have the same private address and port, two of them even behind the same router.
    let home = access(CONE, V6::None);
    let keeps = access(KINDS[4].1, V6::None);
    for (gateway, client) in [
        (home, home),
        (keeps, keeps),
        (access(V4::Public, V6::None), home),
    ] {
        let plan = Plan {
            clients: vec![
                Place::Own(client, LINE),
                Place::Own(client, LINE),
                Place::WithPrevious,
                Place::WithGateway,
            ],
            ..plan(gateway, client, Style::Stock)
        };
        ends_on_the_best("equal addresses", &plan);
    }
}

#[test]
fn nothing_overtakes_anything_on_one_path() {
    let mut world = World::new(&plan(
        access(CONE, V6::Stateful),
        access(SYMMETRIC, V6::Stateful),
        Style::Stock,
    ));
    world.run_secs(60.0);
    let flow = &world.devices[0].flow;
    assert!(flow.answers.len() > 200, "{}", flow.answers.len());
    assert_eq!(flow.overtaken, 0);
}

#[test]
fn ends_with_the_same_private_address_find_back_to_each_other() {
    let plan = plan(access(CONE, V6::None), access(CONE, V6::None), Style::Stock);
    let mut world = World::new(&plan);
    world.run_secs(10.0);
    let (gateway, client) = (world.gateway_host, world.devices[0].host);
    assert_eq!(
        world.network.address(gateway, true),
        world.network.address(client, true)
    );
    world.network.set_cut(gateway, client, true);
    world.run_secs(8.0);
    assert_ne!(world.kind(0), Some(PathKind::Direct));
    world.network.set_cut(gateway, client, false);
    world.run_secs(40.0);
    assert_eq!(world.kind(0), Some(PathKind::Direct), "{}", world.report());
}

#[test]
fn without_relays_the_portal_is_asked_rarely_and_an_offer_helps_at_once() {
    let blocked = access(SYMMETRIC, V6::None);
    let mut world = World::new(&plan(blocked, blocked, Style::Stock));
    world.run_secs(10.0);
    assert_eq!(world.kind(0), Some(PathKind::RelayBoth));
    world.offer_relays(&[]);
    world.run_secs(60.0);
    assert_eq!(world.kind(0), None);
    let asked = world.relays_asked_for();
    assert!(!asked.is_empty(), "{}", world.report());
    for pair in asked.windows(2) {
        assert!(pair[1] - pair[0] >= 0.99, "{asked:?}");
    }
    world.offer_relays(&[0, 1]);
    // The portal waits for a second before it tells anybody.
    let offered = world.now + Duration::from_secs(1);
    world.run_secs(20.0);
    let served = world.answered_after(0, offered);
    assert!(
        served.is_some_and(|after| after <= Duration::from_secs(5)),
        "{served:?} {}",
        world.report()
    );
}

/// Relays come and go while a client behind NAT has a direct path.
fn churn(rounds: usize, pause: f64) -> World {
    // The client's router lets in whatever comes, also what it has not asked for.
    let (gateway, client) = (access(CONE, V6::None), access(KINDS[1].1, V6::None));
    let mut world = World::new(&plan(gateway, client, Style::Stock));
    world.run_secs(10.0);
    assert_eq!(world.kind(0), Some(PathKind::Direct));
    // Longer than it takes to get a relayed address and to check from there.
    world.portal_delay = Duration::from_millis(200);
    let answered = world.devices[0].flow.answers.len();
    let since = world.now;
    for n in 0..rounds {
        world.offer_relays(&[[0, 1], [1, 0]][n % 2][..n % 3]);
        world.run_secs(pause);
    }
    world.offer_relays(&[0, 1]);
    world.run_secs(5.0);
    let seconds = (world.now - since).as_secs_f64();
    let answers = world.devices[0].flow.answers.len() - answered;
    // Four a second, and one may be under way.
    assert!(answers as f64 >= 4.0 * seconds - 1.0, "{answers}");
    world
}

fn path_changes(world: &World) -> u64 {
    world.core.client_statuses(world.now, world.wall(), false)[0].path_changes
}

#[test]
fn a_thousand_presence_flaps_cost_a_direct_path_no_packet() {
    let world = churn(1000, 0.3);
    assert_eq!(path_changes(&world), 0, "{}", world.report());
}

#[test]
fn relays_that_are_replaced_again_and_again_do_not_draw_a_direct_path_to_them() {
    let world = churn(60, 8.0);
    assert_eq!(path_changes(&world), 0, "{}", world.report());
    let way = world.devices[0].way(world.now).unwrap();
    assert_eq!(
        way.1.ip(),
        IpAddr::from([198, 51, 100, 1]),
        "{}",
        world.report()
    );
}
