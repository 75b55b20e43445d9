#![allow(clippy::unwrap_used)]

use super::*;
use crate::access::fixtures::resource_id;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|a| ip(a)).collect()
}

/// The `n`th IPv4 proxy address.
fn proxy(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(100, 96, 0, 0).to_bits() + n).into()
}

fn resolved(list: &[&str]) -> Resolved {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = ips(list).into_iter().partition(IpAddr::is_ipv4);
    Resolved {
        ipv4: Some(v4.iter().map(|a| a.to_string().parse().unwrap()).collect()),
        ipv6: Some(v6.iter().map(|a| a.to_string().parse().unwrap()).collect()),
    }
}

const PROXIES: [&str; 5] = [
    "100.96.0.1",
    "100.96.0.2",
    "100.96.0.3",
    "fd00:2021:1111:8000::1",
    "fd00:2021:1111:8000::2",
];

fn announced(list: &[&str]) -> Names {
    let mut names = Names::default();
    let done = names.announce(
        "db.example",
        resource_id(1),
        &ips(&PROXIES),
        &resolved(list),
    );
    assert_eq!(done, Announced::default());
    names
}

#[test]
fn addresses_are_dealt_out_in_ascending_order_round_and_round_by_family() {
    let names = announced(&["10.0.0.9", "10.0.0.2", "fd12::7"]);
    let dealt: Vec<_> = PROXIES.iter().map(|p| names.resolved(ip(p))).collect();
    assert_eq!(
        dealt,
        ["10.0.0.2", "10.0.0.9", "10.0.0.2", "fd12::7", "fd12::7"].map(|a| Some(ip(a)))
    );
}

#[test]
fn a_family_without_addresses_stays_without() {
    let names = announced(&["fd12::7"]);
    assert_eq!(names.resolved(ip(PROXIES[0])), None);
    assert!(names.resources(ip(PROXIES[0])).is_some(), "but is known");
    assert_eq!(names.resolved(ip(PROXIES[3])), Some(ip("fd12::7")));
}

#[test]
fn a_new_announcement_brings_new_addresses_and_a_failed_question_keeps_the_old() {
    let mut names = announced(&["10.0.0.1", "fd12::1"]);
    let answer = Resolved {
        ipv4: Some(vec![[10, 0, 0, 5].into()]),
        ipv6: None,
    };
    names.announce("DB.Example", resource_id(1), &ips(&PROXIES), &answer);
    assert_eq!(names.resolved(ip(PROXIES[0])), Some(ip("10.0.0.5")));
    assert_eq!(names.resolved(ip(PROXIES[4])), Some(ip("fd12::1")));
    assert_eq!(names.sizes(), (1, 5), "case makes no other domain");
    names.announce("db.example", resource_id(1), &ips(&PROXIES), &resolved(&[]));
    assert_eq!(names.resolved(ip(PROXIES[0])), None, "gone for good");
}

#[test]
fn resources_that_announce_the_same_domain_share_its_addresses() {
    let mut names = announced(&["10.0.0.1"]);
    names.announce("db.example", resource_id(2), &ips(&PROXIES), &resolved(&[]));
    let resources: Vec<_> = names.resources(ip(PROXIES[0])).unwrap().iter().collect();
    assert_eq!(resources, [&resource_id(1), &resource_id(2)]);
    assert_eq!(names.resources(proxy(77)), None);
}

#[test]
fn an_address_that_belonged_to_another_domain_means_everything_was_renumbered() {
    let mut names = announced(&["10.0.0.1"]);
    names.announce(
        "b.example",
        resource_id(1),
        &[proxy(8)],
        &resolved(&["10.0.0.2"]),
    );
    let done = names.announce(
        "c.example",
        resource_id(1),
        &ips(&PROXIES[2..]),
        &resolved(&["10.0.0.3"]),
    );
    assert!(done.renumbered);
    assert_eq!(names.sizes(), (1, 3));
    assert_eq!(names.resolved(ip(PROXIES[2])), Some(ip("10.0.0.3")));
    assert_eq!(names.resolved(proxy(8)), None);
}

#[test]
fn addresses_outside_the_proxy_ranges_are_left_out() {
    let mut names = Names::default();
    let odd = ips(&["10.0.0.1", "100.64.0.1", "::1", "100.96.0.1"]);
    names.announce("a.example", resource_id(1), &odd, &resolved(&["10.0.0.1"]));
    assert_eq!(names.sizes(), (1, 1));
}

#[test]
fn names_cannot_stand_for_the_gateway_itself_for_peers_or_for_groups() {
    let names = announced(&[
        "127.0.0.1",
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "100.64.0.7",
        "100.96.0.7",
        "::1",
        "::",
        "fe80::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "fd00:2021:1111::7",
        "fd00:2021:1111:8000::7",
    ]);
    for proxy in PROXIES {
        assert_eq!(names.resolved(ip(proxy)), None, "{proxy}");
    }
}

#[test]
fn what_a_changed_pattern_no_longer_covers_is_forgotten() {
    let mut names = announced(&["10.0.0.1"]);
    names.announce(
        "db.example",
        resource_id(2),
        &ips(&PROXIES),
        &resolved(&["10.0.0.1"]),
    );
    names.announce(
        "b.example",
        resource_id(1),
        &[proxy(8)],
        &resolved(&["10.0.0.2"]),
    );
    names.retain(|resource, domain| resource != resource_id(1) || domain == "b.example");
    let left: Vec<_> = names.resources(ip(PROXIES[0])).unwrap().iter().collect();
    assert_eq!(left, [&resource_id(2)]);
    names.retain(|resource, _| resource == resource_id(1));
    assert_eq!(names.sizes(), (1, 1));
    assert_eq!(names.resources(ip(PROXIES[0])), None);
}

#[test]
fn known_is_what_stands_for_an_address() {
    let names = announced(&["10.0.0.1"]);
    assert!(names.is_known("DB.example", resource_id(1)));
    assert!(!names.is_known("db.example", resource_id(2)));
    assert!(!names.is_known("other.example", resource_id(1)));
    assert!(!announced(&[]).is_known("db.example", resource_id(1)));
}

#[test]
fn the_domain_announced_longest_ago_makes_room() {
    let mut names = Names::default();
    let each = 8u32;
    let domains = MAX_PROXIES as u32 / each;
    let announce = |names: &mut Names, n: u32| {
        let proxies: Vec<_> = (0..each).map(|i| proxy(n * each + i)).collect();
        let answer = resolved(&["10.0.0.1"]);
        names.announce(&format!("d{n}.example"), resource_id(1), &proxies, &answer)
    };
    for n in 0..domains {
        assert_eq!(announce(&mut names, n), Announced::default());
    }
    announce(&mut names, 0);
    assert_eq!(announce(&mut names, domains).evicted, 1);
    assert_eq!(names.sizes(), (domains as usize, MAX_PROXIES));
    assert!(names.resources(proxy(0)).is_some(), "was announced again");
    assert!(names.resources(proxy(each)).is_none(), "was the oldest");
}

const FAILURE: Resolved = Resolved {
    ipv4: None,
    ipv6: None,
};

#[test]
fn names_without_a_proxy_address_are_not_kept() {
    let mut names = announced(&["10.0.0.1"]);
    let odd = ips(&["10.0.0.1", "::1"]);
    for n in 0..MAX_PROXIES + 10 {
        let proxies = if n % 2 == 0 { &odd[..] } else { &[] };
        let name = format!("n{n}.example");
        let done = names.announce(&name, resource_id(1), proxies, &resolved(&["10.0.0.2"]));
        assert_eq!(done, Announced::default());
    }
    assert_eq!(names.sizes(), (1, PROXIES.len()));
    // One that has its addresses already need not name them again.
    names.announce("db.example", resource_id(2), &[], &resolved(&["10.0.0.3"]));
    assert_eq!(names.resolved(ip(PROXIES[0])), Some(ip("10.0.0.3")));
    assert_eq!(names.resources(ip(PROXIES[0])).unwrap().len(), 2);
}

#[test]
fn a_failure_to_resolve_what_is_unknown_leaves_no_trace() {
    let mut names = announced(&["10.0.0.1"]);
    names.announce("b.example", resource_id(1), &[proxy(8)], &FAILURE);
    assert_eq!(names.sizes(), (1, PROXIES.len()));
    // Nor does it give addresses to a name that is known to have none.
    names.announce("c.example", resource_id(1), &[proxy(9)], &resolved(&[]));
    names.announce("c.example", resource_id(2), &[proxy(10)], &FAILURE);
    assert_eq!(names.sizes(), (2, PROXIES.len() + 1));
    assert_eq!(names.resources(proxy(9)).unwrap().len(), 1);
}

#[test]
fn a_failure_evicts_nothing_but_shows_that_the_client_has_renumbered() {
    let mut names = Names::default();
    let each = MAX_PROXIES_OF_DOMAIN as u32;
    for n in 0..MAX_PROXIES as u32 / each {
        let proxies: Vec<_> = (0..each).map(|i| proxy(n * each + i)).collect();
        let name = format!("d{n}.example");
        names.announce(&name, resource_id(1), &proxies, &resolved(&["10.0.0.1"]));
    }
    let full = names.sizes();
    let new = proxy(MAX_PROXIES as u32);
    let done = names.announce("new.example", resource_id(1), &[new], &FAILURE);
    assert_eq!((done, names.sizes()), (Announced::default(), full));
    let done = names.announce("new.example", resource_id(1), &[proxy(0)], &FAILURE);
    assert!(done.renumbered);
    assert_eq!(names.sizes(), (0, 0));
}

#[test]
fn a_domain_has_so_many_proxy_addresses_and_no_more() {
    let mut names = Names::default();
    let proxies: Vec<_> = (0..=MAX_PROXIES_OF_DOMAIN as u32).map(proxy).collect();
    for part in [&proxies[..10], &proxies[..], &proxies[5..]] {
        names.announce(
            "a.example",
            resource_id(1),
            part,
            &resolved(&["10.0.0.1", "10.0.0.2"]),
        );
    }
    assert_eq!(proxies.len(), 65);
    assert_eq!(names.sizes(), (1, 64));
    assert_eq!(names.resolved(proxies[63]), Some(ip("10.0.0.2")));
    assert!(names.resources(proxies[64]).is_none());
}

#[test]
fn many_domains_make_room_in_the_order_of_their_announcement() {
    let mut names = Names::default();
    let (max, each) = (MAX_PROXIES as u32, MAX_PROXIES_OF_DOMAIN as u32);
    let answer = resolved(&["10.0.0.1"]);
    for n in 0..max {
        names.announce(
            &format!("d{n}.example"),
            resource_id(1),
            &[proxy(n)],
            &answer,
        );
    }
    // Two that are no longer where they were in the order.
    names.announce("d0.example", resource_id(1), &[], &answer);
    names.retain(|_, domain| domain != "d1.example");
    names.announce("d1.example", resource_id(1), &[proxy(1)], &answer);
    // By and by, each announcement takes the place of the 64 oldest.
    for n in 0..max / each {
        let proxies: Vec<_> = (0..each).map(|i| proxy(max + n * each + i)).collect();
        let done = names.announce(&format!("w{n}.example"), resource_id(1), &proxies, &answer);
        assert_eq!(done.evicted, each as usize);
        assert_eq!(names.proxies.len(), MAX_PROXIES);
        let is_left = |n: u32| names.resources(proxy(n)).is_some();
        let oldest = (n + 1) * each + 2;
        if oldest < max {
            assert!(!is_left(oldest - 1) && is_left(oldest));
            assert!(is_left(0) && is_left(1));
        }
    }
    assert_eq!(names.sizes(), ((max / each) as usize, MAX_PROXIES));
    assert_eq!(names.by_age.len(), names.domains.len());
}
