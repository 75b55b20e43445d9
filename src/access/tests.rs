#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::fixtures::*;
use super::*;
use crate::packet::samples::{tcp4, udp4};

const LAN: &str = "10.0.0.0/8";
const HOST: [u8; 4] = [10, 0, 0, 1];
const PROXY: [u8; 4] = [100, 96, 0, 1];
const PROXY2: [u8; 4] = [100, 96, 0, 2];

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn entry(client: u8, resource: u8, expires_at: Option<u64>) -> AuthorizationEntry {
    AuthorizationEntry {
        client_id: client_id(client),
        resource_id: resource_id(resource),
        expires_at,
    }
}

/// Whether client `n` may reach a TCP port of [`HOST`].
fn reaches(access: &Access, n: u8, port: u16, now: Instant) -> bool {
    let packet = meta(&tcp4(addr4(n), HOST, 1000, port, b""));
    access
        .policy(client_id(n))
        .is_some_and(|policy| policy.outbound(&packet, now).is_allow())
}

/// Asserts that exactly one event is left: the removal of client `n`.
#[track_caller]
fn assert_removed(access: &mut Access, n: u8, expected: RemovalCause) {
    match drain(access).as_slice() {
        [AccessEvent::ClientRemoved { client, cause }] => {
            assert_eq!((*client, *cause), (client_id(n), expected));
        }
        other => panic!("{other:?}"),
    }
    assert!(access.policy(client_id(n)).is_none());
    assert!(access.grants(client_id(n)).is_empty());
}

/// Asserts that the events left are new policies of exactly these clients.
#[track_caller]
fn assert_changed(access: &mut Access, expected: &[u8]) {
    let changed: Vec<_> = drain(access)
        .into_iter()
        .map(|event| match event {
            AccessEvent::PolicyChanged { client, policy } => {
                assert_eq!(policy.client(), client);
                client
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let expected: Vec<_> = expected.iter().map(|n| client_id(*n)).collect();
    assert_eq!(changed, expected);
}

fn expiry_times(access: &Access, n: u8) -> Vec<Option<f64>> {
    let grants = access.grants(client_id(n));
    grants.iter().map(|g| g.expires_at).collect()
}

#[test]
fn a_grant_takes_effect_with_the_event_it_causes() {
    let (mut access, now) = access();
    assert!(access.poll_timeout().is_none());
    access.authorize(now, &peer(1), cidr(1, LAN, &[tcp(443, 443)]), None);
    let Some(AccessEvent::PolicyChanged { client, policy }) = access.poll_event() else {
        panic!("no event");
    };
    assert_eq!(client, client_id(1));
    assert!(Arc::ptr_eq(&policy, &access.policy(client).unwrap()));
    assert!(access.poll_event().is_none());
    assert!(access.poll_timeout().is_none());
    assert!(reaches(&access, 1, 443, now));
    assert!(!reaches(&access, 1, 80, now));
    assert!(!reaches(&access, 2, 443, now));
}

#[test]
fn generations_are_unique_across_clients_and_instances() {
    let (mut a, now) = access();
    let (mut b, _) = access();
    let mut generations = BTreeSet::new();
    for n in 0..10 {
        for access in [&mut a, &mut b] {
            access.authorize(now, &peer(n), cidr(1, LAN, &[]), None);
            access.authorize(now, &peer(n), cidr(1, LAN, &[]), None);
            for event in drain(access) {
                let AccessEvent::PolicyChanged { policy, .. } = event else {
                    panic!("{event:?}");
                };
                assert!(generations.insert(policy.generation()));
            }
        }
    }
    assert_eq!(generations.len(), 40);
}

#[test]
fn a_repeated_grant_replaces_filters_address_and_expiry() {
    let (mut access, now) = access();
    access.authorize(
        now,
        &peer(1),
        cidr(1, LAN, &[tcp(443, 443)]),
        Some(UNIX + 10),
    );
    access.authorize(now, &peer(1), cidr(1, LAN, &[tcp(22, 22)]), Some(UNIX + 20));
    assert!(!reaches(&access, 1, 443, now));
    assert!(reaches(&access, 1, 22, now));
    assert_eq!(
        access.poll_timeout(),
        Some((now + seconds(20), AccessTimer::GrantExpiry))
    );
    access.authorize(now, &peer(1), cidr(1, "10.9.0.0/16", &[]), None);
    assert!(!reaches(&access, 1, 22, now));
    assert!(access.poll_timeout().is_none());
    assert_eq!(access.grants(client_id(1)).len(), 1);
}

#[test]
fn a_repeated_grant_with_the_same_expiry_keeps_its_deadline() {
    let (mut access, now) = access();
    for _ in 0..2 {
        access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 10));
    }
    drain(&mut access);
    access.handle_timeout(now + seconds(10));
    assert_removed(&mut access, 1, RemovalCause::Expired);
    assert!(access.poll_timeout().is_none());
}

#[test]
fn expiry_removes_the_grant_on_the_tick_and_not_before() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 10));
    access.authorize(now, &peer(1), cidr(2, "10.0.0.0/24", &[]), Some(UNIX + 20));
    drain(&mut access);
    let tick = Duration::from_nanos(1);

    let (first, timer) = access.poll_timeout().unwrap();
    assert_eq!(
        (first, timer),
        (now + seconds(10), AccessTimer::GrantExpiry)
    );
    access.handle_timeout(first - tick);
    assert!(drain(&mut access).is_empty());
    assert_eq!(access.grants(client_id(1)).len(), 2);

    access.handle_timeout(first);
    assert_changed(&mut access, &[1]);
    assert_eq!(access.grants(client_id(1)).len(), 1);

    let (second, _) = access.poll_timeout().unwrap();
    assert_eq!(second, now + seconds(20));
    access.handle_timeout(second - tick);
    assert!(drain(&mut access).is_empty());
    access.handle_timeout(second);
    assert_removed(&mut access, 1, RemovalCause::Expired);
    assert!(access.poll_timeout().is_none());
}

#[test]
fn a_late_timeout_catches_up_with_one_event_per_client() {
    let (mut access, now) = access();
    for n in 1..=3 {
        access.authorize(now, &peer(1), cidr(n, LAN, &[]), Some(UNIX + u64::from(n)));
        access.authorize(now, &peer(2), cidr(n, LAN, &[]), Some(UNIX + u64::from(n)));
    }
    access.authorize(now, &peer(2), cidr(9, LAN, &[]), None);
    drain(&mut access);
    access.handle_timeout(now + seconds(3600));
    let events = drain(&mut access);
    assert!(matches!(
        events.as_slice(),
        [
            AccessEvent::ClientRemoved {
                cause: RemovalCause::Expired,
                ..
            },
            AccessEvent::PolicyChanged { .. }
        ]
    ));
    assert_eq!(access.clients().count(), 1);
}

#[test]
fn a_grant_from_the_past_permits_nothing_and_goes_with_the_next_tick() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX - 1));
    assert_changed(&mut access, &[1]);
    assert!(!reaches(&access, 1, 443, now));
    assert!(!access.is_authorized(client_id(1), resource_id(1), now));
    assert!(access.poll_timeout().unwrap().0 <= now);
    access.handle_timeout(now);
    assert_removed(&mut access, 1, RemovalCause::Expired);
}

#[test]
fn an_absurd_expiry_is_capped_not_overflowed() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(u64::MAX));
    assert!(reaches(&access, 1, 443, now + seconds(365 * 86_400)));
    assert!(access.poll_timeout().unwrap().0 > now + seconds(365 * 86_400));
}

#[test]
fn resource_update_changes_filters_of_every_holder_and_nothing_else() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 60));
    access.authorize(now, &peer(2), cidr(1, LAN, &[]), None);
    access.authorize(now, &peer(3), cidr(2, LAN, &[]), None);
    drain(&mut access);

    let Resource::Cidr(mut update) = cidr(1, "192.168.0.0/16", &[tcp(443, 443)]) else {
        unreachable!();
    };
    update.name = "renamed".into();
    let update = Resource::Cidr(update);
    access.update_resource(&update);
    assert_changed(&mut access, &[1, 2]);
    for n in [1, 2] {
        assert!(reaches(&access, n, 443, now));
        assert!(!reaches(&access, n, 80, now));
        let grant = &access.grants(client_id(n))[0];
        assert_eq!(grant.address, "10.0.0.0/8");
        assert_eq!(grant.name, "network 1");
    }
    assert!(reaches(&access, 3, 80, now));
    assert_eq!(access.poll_timeout().unwrap().0, now + seconds(60));

    // The same filters again are no change.
    access.update_resource(&update);
    assert!(drain(&mut access).is_empty());
}

#[test]
fn resource_update_of_another_type_or_an_unknown_resource_is_ignored() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    drain(&mut access);
    for update in [dns(1, "a.example"), internet(1), cidr(2, LAN, &[tcp(1, 1)])] {
        access.update_resource(&update);
        assert!(drain(&mut access).is_empty(), "{update:?}");
        assert!(reaches(&access, 1, 443, now));
    }
}

#[test]
fn rejecting_one_of_two_grants_leaves_the_other() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 10));
    access.authorize(now, &peer(1), cidr(2, "10.9.0.0/16", &[]), None);
    drain(&mut access);
    access.reject(client_id(1), resource_id(1));
    assert_changed(&mut access, &[1]);
    assert!(!reaches(&access, 1, 443, now));
    assert!(access.poll_timeout().is_none());
    access.reject(client_id(1), resource_id(2));
    assert_removed(&mut access, 1, RemovalCause::Rejected);
}

#[test]
fn rejecting_an_unknown_pair_does_nothing() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    drain(&mut access);
    access.reject(client_id(1), resource_id(2));
    access.reject(client_id(2), resource_id(1));
    assert!(drain(&mut access).is_empty());
    assert!(reaches(&access, 1, 443, now));
}

#[test]
fn resync_revokes_what_is_not_listed_and_ignores_what_is_unknown() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    access.authorize(now, &peer(2), cidr(1, LAN, &[]), None);
    access.authorize(now, &peer(2), cidr(2, "10.9.0.0/16", &[]), Some(UNIX + 5));
    access.authorize(now, &peer(3), cidr(1, LAN, &[]), None);
    drain(&mut access);
    access.resync(
        now,
        &[
            entry(2, 1, None),
            entry(3, 1, None),
            entry(3, 7, None),
            entry(8, 1, None),
        ],
    );
    let events = drain(&mut access);
    assert!(matches!(
        events.as_slice(),
        [
            AccessEvent::ClientRemoved { client: gone, cause: RemovalCause::Resync },
            AccessEvent::PolicyChanged { client: changed, .. },
        ] if *gone == client_id(1) && *changed == client_id(2)
    ));
    assert_eq!(access.grants(client_id(2)).len(), 1);
    assert_eq!(access.grants(client_id(3)).len(), 1);
    assert!(access.policy(client_id(8)).is_none());
    assert!(access.poll_timeout().is_none());
}

#[test]
fn resync_with_the_same_list_changes_nothing() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 60));
    drain(&mut access);
    access.resync(now + seconds(5), &[entry(1, 1, Some(UNIX + 60))]);
    assert!(drain(&mut access).is_empty());
    assert_eq!(access.poll_timeout().unwrap().0, now + seconds(60));
}

#[test]
fn resync_takes_over_longer_and_shorter_expiries() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 60));
    for (listed, expected) in [
        (Some(UNIX + 90), Some(90)),
        (Some(UNIX + 30), Some(30)),
        (None, None),
        (Some(UNIX + 45), Some(45)),
    ] {
        drain(&mut access);
        access.resync(now, &[entry(1, 1, listed)]);
        assert_changed(&mut access, &[1]);
        assert_eq!(
            access.poll_timeout().map(|t| t.0),
            expected.map(|s| now + seconds(s))
        );
        assert_eq!(expiry_times(&access, 1), [listed.map(|unix| unix as f64)]);
    }
    access.handle_timeout(now + seconds(45));
    assert_removed(&mut access, 1, RemovalCause::Expired);
}

#[test]
fn a_grant_listed_twice_gets_the_later_expiry() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    access.resync(
        now,
        &[entry(1, 1, Some(UNIX + 90)), entry(1, 1, Some(UNIX + 30))],
    );
    assert_eq!(access.poll_timeout().unwrap().0, now + seconds(90));
    access.resync(now, &[entry(1, 1, Some(UNIX + 90)), entry(1, 1, None)]);
    assert!(access.poll_timeout().is_none());
}

#[test]
fn an_empty_list_revokes_everything() {
    let (mut access, now) = access();
    for n in 1..=3 {
        access.authorize(now, &peer(n), internet(1), Some(UNIX + 10));
    }
    drain(&mut access);
    access.resync(now, &[]);
    assert_eq!(drain(&mut access).len(), 3);
    assert_eq!(access.clients().count(), 0);
    assert!(access.poll_timeout().is_none());
}

#[test]
fn new_tunnel_addresses_replace_the_client_as_a_whole() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 10));
    drain(&mut access);
    let mut moved = peer(1);
    moved.ipv6 = addr6(77).parse().unwrap();
    access.authorize(now, &moved, cidr(2, LAN, &[]), None);
    let events = drain(&mut access);
    let [
        AccessEvent::ClientRemoved { client, cause },
        AccessEvent::PolicyChanged { policy, .. },
    ] = events.as_slice()
    else {
        panic!("{events:?}");
    };
    assert_eq!(*client, client_id(1));
    assert_eq!(*cause, RemovalCause::AddressesChanged);
    assert_eq!(policy.addresses().ipv6, moved.ipv6);
    assert_eq!(access.grants(client_id(1)).len(), 1);
    assert!(access.poll_timeout().is_none());
    assert_eq!(access.client_at(moved.ipv6.into()), Some(client_id(1)));
    assert_eq!(access.client_at(peer(1).ipv6.into()), None);
}

#[test]
fn an_address_given_to_another_client_takes_it_from_the_first() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    drain(&mut access);
    let mut heir = peer(2);
    heir.ipv4 = peer(1).ipv4;
    access.authorize(now, &heir, cidr(1, LAN, &[]), None);
    let events = drain(&mut access);
    assert!(matches!(
        events.as_slice(),
        [
            AccessEvent::ClientRemoved { client: gone, cause: RemovalCause::AddressTaken },
            AccessEvent::PolicyChanged { client, .. },
        ] if *gone == client_id(1) && *client == client_id(2)
    ));
    assert_eq!(access.client_at(heir.ipv4.into()), Some(client_id(2)));
    assert_eq!(access.client_at(peer(1).ipv6.into()), None);
}

#[test]
fn removed_clients_leave_no_address_and_no_deadline() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 10));
    access.authorize(now, &peer(2), cidr(1, LAN, &[]), Some(UNIX + 20));
    drain(&mut access);
    access.remove_client(client_id(1));
    assert_removed(&mut access, 1, RemovalCause::Requested);
    assert_eq!(access.client_at(peer(1).ipv4.into()), None);
    assert_eq!(access.poll_timeout().unwrap().0, now + seconds(20));
    access.remove_client(client_id(1));
    assert!(drain(&mut access).is_empty());
    access.remove_all();
    assert_removed(&mut access, 2, RemovalCause::Requested);
    assert!(access.poll_timeout().is_none());
}

#[test]
fn new_gateway_addresses_reach_every_policy_once() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    access.authorize(now, &peer(2), cidr(1, LAN, &[]), None);
    drain(&mut access);
    let moved = [100, 64, 200, 201];
    let ipv6 = GATEWAY6.parse().unwrap();
    access.set_gateway_addresses(moved.into(), ipv6);
    assert_changed(&mut access, &[1, 2]);
    access.set_gateway_addresses(moved.into(), ipv6);
    assert!(drain(&mut access).is_empty());
    let policy = access.policy(client_id(1)).unwrap();
    let dns_at = |gateway| meta(&udp4(addr4(1), gateway, 1, DNS_PORT, b""));
    assert!(policy.outbound(&dns_at(moved), now).is_allow());
    assert!(!policy.outbound(&dns_at(GATEWAY4), now).is_allow());
}

#[test]
fn a_snapshot_in_use_does_not_change_under_the_data_path() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    let old = access.policy(client_id(1)).unwrap();
    access.reject(client_id(1), resource_id(1));
    let packet = meta(&tcp4(addr4(1), HOST, 1, 443, b""));
    assert!(old.outbound(&packet, now).is_allow());
    assert!(access.policy(client_id(1)).is_none());
}

#[test]
fn status_shows_every_kind_of_grant() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 10));
    access.authorize(now, &peer(1), dns(2, "*.corp.example"), None);
    access.authorize(now, &peer(1), internet(3), None);
    let grants = access.grants(client_id(1));
    let shown: Vec<_> = grants
        .iter()
        .map(|g| (g.name.as_str(), g.address.as_str(), g.expires_at))
        .collect();
    assert_eq!(
        shown,
        [
            ("network 1", "10.0.0.0/8", Some((UNIX + 10) as f64)),
            ("name 2", "*.corp.example", None),
            ("Internet", "internet", None),
        ]
    );
    assert_eq!(grants[0].resource, resource_id(1).to_string());
    let clients: Vec<_> = access.clients().collect();
    assert_eq!(clients.len(), 1);
    assert_eq!(clients[0].1.ipv4, peer(1).ipv4);
    assert!(access.is_authorized(client_id(1), resource_id(2), now));
    assert!(!access.is_authorized(client_id(1), resource_id(9), now));
    assert!(!access.is_authorized(client_id(2), resource_id(2), now));
}

#[test]
fn a_suspended_machine_does_not_prolong_access() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 3600));
    access.authorize(now, &peer(2), cidr(1, LAN, &[]), Some(UNIX + 9000));
    drain(&mut access);
    // Two hours went by on the wall, ten seconds on the monotonic clock.
    let woken = now + seconds(10);
    assert!(access.adjust_clock(woken, seconds(UNIX + 7200)));
    assert_changed(&mut access, &[1, 2]);
    assert!(!reaches(&access, 1, 443, woken));
    access.handle_timeout(woken);
    assert_removed(&mut access, 1, RemovalCause::Expired);
    assert_eq!(access.poll_timeout().unwrap().0, woken + seconds(1800));
}

#[test]
fn a_clock_set_back_does_not_cut_access_short() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 60));
    assert!(access.adjust_clock(now, seconds(UNIX - 3600)));
    assert_eq!(access.poll_timeout().unwrap().0, now + seconds(3660));
}

#[test]
fn ordinary_clock_jitter_changes_nothing() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 60));
    drain(&mut access);
    for millis in [8_001, 10_000, 11_999] {
        let wall = Duration::from_secs(UNIX) + Duration::from_millis(millis);
        assert!(!access.adjust_clock(now + seconds(10), wall));
    }
    assert!(drain(&mut access).is_empty());
    assert_eq!(access.poll_timeout().unwrap().0, now + seconds(60));
}

// Announcements of names.

/// What a name with [`HOST`] as its one address resolves to.
fn resolved() -> Resolved {
    Resolved {
        ipv4: Some(vec![HOST.into()]),
        ipv6: Some(vec![]),
    }
}

/// Client 1 announces one proxy address, and the resolver finds [`HOST`].
fn announce(
    access: &mut Access,
    resource: u8,
    domain: &str,
    proxy: [u8; 4],
    now: Instant,
) -> Result<Announced, Unannounced> {
    let (client, resource) = (client_id(1), resource_id(resource));
    access.announce(client, resource, domain, &[proxy.into()], &resolved(), now)
}

/// Lets client `n` send a datagram to this destination; returns whether it passed.
fn sends(access: &Access, n: u8, dst: [u8; 4], now: Instant) -> bool {
    let packet = meta(&udp4(addr4(n), dst, 1000, 53, b""));
    access
        .policy(client_id(n))
        .is_some_and(|policy| policy.admit_outbound(&packet, now).is_ok())
}

/// Lets client `n` get an answer to what [`sends`] has sent to [`HOST`].
fn receives(access: &Access, n: u8, now: Instant) -> bool {
    let policy = access.policy(client_id(n)).unwrap();
    let packet = meta(&udp4(HOST, addr4(n), 53, 1000, b""));
    let Ok(Passed { flow, .. }) = policy.admit_inbound(&packet, now) else {
        return false;
    };
    flow.unwrap().note_in(policy.tick(now), packet.tcp_flags);
    true
}

fn sizes(flows: usize, domains: usize, proxies: usize) -> Sizes {
    Sizes {
        flows,
        domains,
        proxies,
    }
}

#[test]
fn names_may_be_announced_for_dns_resources_that_cover_them() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "*.corp.example"), Some(UNIX + 10));
    access.authorize(now, &peer(1), cidr(2, LAN, &[]), None);
    access.authorize(now, &peer(1), internet(3), None);
    let (c, end) = (client_id(1), now + seconds(10));
    let may = |client, resource, domain, at| {
        access.may_announce(client, resource_id(resource), domain, at)
    };
    for domain in ["db.corp.example", "DB.Corp.Example", "corp.example"] {
        assert_eq!(may(c, 1, domain, now), Ok(()));
    }
    for domain in ["a.b.corp.example", "example", "", "..", "db.other.example"] {
        assert_eq!(may(c, 1, domain, now), Err(Unannounced::NotCovered));
    }
    for resource in [2, 3] {
        assert_eq!(
            may(c, resource, "db.corp.example", now),
            Err(Unannounced::NotDns)
        );
    }
    for (client, resource, at) in [
        (c, 9, now),
        (client_id(2), 1, now),
        (c, 1, end),
        (c, 1, end + seconds(1)),
    ] {
        assert_eq!(
            may(client, resource, "db.corp.example", at),
            Err(Unannounced::NotAuthorized)
        );
    }
    let before = end - Duration::from_nanos(1);
    assert_eq!(may(c, 1, "db.corp.example", before), Ok(()));
}

#[test]
fn an_announcement_that_is_not_allowed_changes_nothing() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "*.corp.example"), Some(UNIX + 10));
    access.authorize(now, &peer(1), cidr(2, LAN, &[]), None);
    for (resource, domain, at, cause) in [
        (9, "db.corp.example", now, Unannounced::NotAuthorized),
        (
            1,
            "db.corp.example",
            now + seconds(10),
            Unannounced::NotAuthorized,
        ),
        (1, "db.other.example", now, Unannounced::NotCovered),
        (2, "db.corp.example", now, Unannounced::NotDns),
    ] {
        let refused = announce(&mut access, resource, domain, PROXY, at);
        assert_eq!(refused, Err(cause));
    }
    assert_eq!(access.sizes(client_id(1)), Sizes::default());
    let stranger = access.announce(
        client_id(2),
        resource_id(1),
        "db.corp.example",
        &[PROXY.into()],
        &resolved(),
        now,
    );
    assert_eq!(stranger, Err(Unannounced::NotAuthorized));
    assert_eq!(access.sizes(client_id(2)), Sizes::default());
}

#[test]
fn an_announcement_takes_effect_without_a_new_policy() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "*.corp.example"), None);
    drain(&mut access);
    assert!(!sends(&access, 1, PROXY, now));
    let done = announce(&mut access, 1, "DB.corp.example", PROXY, now);
    assert_eq!(done, Ok(Announced::default()));
    assert!(sends(&access, 1, PROXY, now));
    assert!(receives(&access, 1, now));
    assert!(drain(&mut access).is_empty());
    assert_eq!(access.sizes(client_id(1)), sizes(1, 1, 1));
    assert_eq!(access.flow_count(), 1);
}

#[test]
fn a_name_that_cannot_be_resolved_is_not_announced_unless_it_is_known() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "*.corp.example"), None);
    let try_announce = |access: &mut Access, domain: &str, proxy: [u8; 4], answer: &Resolved| {
        let (client, resource) = (client_id(1), resource_id(1));
        access.announce(client, resource, domain, &[proxy.into()], answer, now)
    };
    let failure = Resolved::default();
    let refused = try_announce(&mut access, "db.corp.example", PROXY, &failure);
    assert_eq!(refused, Err(Unannounced::NotResolved));
    assert!(!sends(&access, 1, PROXY, now));

    let done = try_announce(&mut access, "db.corp.example", PROXY, &resolved());
    assert_eq!(done, Ok(Announced::default()));
    // Once known it outlives failures of the resolver.
    let done = try_announce(&mut access, "db.corp.example", PROXY, &failure);
    assert_eq!(done, Ok(Announced::default()));
    assert!(sends(&access, 1, PROXY, now));

    // That it has no address is an answer; its packets go nowhere.
    let nothing = Resolved {
        ipv4: Some(vec![]),
        ipv6: Some(vec![]),
    };
    let done = try_announce(&mut access, "none.corp.example", PROXY2, &nothing);
    assert_eq!(done, Ok(Announced::default()));
    assert!(!sends(&access, 1, PROXY2, now));
    // One family may be missing.
    let ipv4_alone = Resolved {
        ipv6: None,
        ..resolved()
    };
    let done = try_announce(
        &mut access,
        "half.corp.example",
        [100, 96, 0, 3],
        &ipv4_alone,
    );
    assert_eq!(done, Ok(Announced::default()));
    assert!(sends(&access, 1, [100, 96, 0, 3], now));
}

#[test]
fn a_client_that_renumbers_is_noticed() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "*.corp.example"), None);
    announce(&mut access, 1, "a.corp.example", PROXY, now).unwrap();
    announce(&mut access, 1, "b.corp.example", PROXY2, now).unwrap();
    assert!(sends(&access, 1, PROXY2, now));
    let done = announce(&mut access, 1, "c.corp.example", PROXY, now).unwrap();
    assert!(done.renumbered);
    assert_eq!(access.sizes(client_id(1)), sizes(0, 1, 1));
    assert!(!sends(&access, 1, PROXY2, now));
}

#[test]
fn a_changed_pattern_forgets_what_it_no_longer_covers() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "**.corp.example"), None);
    access.authorize(now, &peer(1), dns(2, "*.corp.example"), None);
    announce(&mut access, 1, "a.corp.example", PROXY, now).unwrap();
    announce(&mut access, 1, "b.corp.example", PROXY2, now).unwrap();
    announce(&mut access, 2, "b.corp.example", PROXY2, now).unwrap();
    assert!(sends(&access, 1, PROXY, now) && sends(&access, 1, PROXY2, now));

    // The same pattern again, with other filters or another end, forgets nothing.
    access.authorize(now, &peer(1), dns(1, "**.corp.example"), Some(UNIX + 60));
    assert_eq!(access.sizes(client_id(1)), sizes(2, 2, 2));
    assert!(sends(&access, 1, PROXY, now) && sends(&access, 1, PROXY2, now));

    access.authorize(now, &peer(1), dns(1, "db.other.example"), None);
    let left = access.sizes(client_id(1));
    assert_eq!((left.domains, left.proxies), (1, 1));
    assert!(!sends(&access, 1, PROXY, now), "flow or not");
    assert!(sends(&access, 1, PROXY2, now), "by the other resource");
    access.reject(client_id(1), resource_id(2));
    assert!(!sends(&access, 1, PROXY2, now));
}

#[test]
fn a_pattern_that_changes_between_two_grants_forgets_what_it_no_longer_covers() {
    let reject: fn(&mut Access, Instant) = |a, _| a.reject(client_id(1), resource_id(1));
    let unlist: fn(&mut Access, Instant) = |a, now| a.resync(now, &[entry(1, 2, None)]);
    let expire: fn(&mut Access, Instant) = |a, now| a.handle_timeout(now + seconds(10));
    for take_back in [reject, unlist, expire] {
        let (mut access, now) = access();
        access.authorize(now, &peer(1), dns(1, "*.corp.example"), Some(UNIX + 10));
        access.authorize(now, &peer(1), cidr(2, LAN, &[]), None);
        announce(&mut access, 1, "a.corp.example", PROXY, now).unwrap();
        take_back(&mut access, now);
        access.authorize(now, &peer(1), dns(1, "db.other.example"), None);
        assert!(!sends(&access, 1, PROXY, now));
        assert_eq!(access.sizes(client_id(1)), sizes(0, 0, 0));
    }
}

#[test]
fn a_name_that_becomes_a_network_is_forgotten() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "*.corp.example"), None);
    announce(&mut access, 1, "a.corp.example", PROXY, now).unwrap();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    assert_eq!(access.sizes(client_id(1)), sizes(0, 0, 0));
    assert!(!sends(&access, 1, PROXY, now));
}

#[test]
fn flows_and_names_outlive_changes_of_grants() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), dns(1, "*.corp.example"), Some(UNIX + 20));
    access.authorize(now, &peer(1), cidr(2, LAN, &[]), None);
    announce(&mut access, 1, "a.corp.example", PROXY, now).unwrap();
    let flow_to = |access: &Access, dst| {
        let packet = meta(&udp4(addr4(1), dst, 1000, 53, b""));
        let policy = access.policy(client_id(1)).unwrap();
        policy.admit_outbound(&packet, now).unwrap().flow.unwrap()
    };
    let translated = flow_to(&access, PROXY);
    let direct = flow_to(&access, [10, 0, 0, 2]);
    let tick = access.policy(client_id(1)).unwrap().tick(now);

    let repeated: fn(&mut Access, Instant) =
        |a, now| a.authorize(now, &peer(1), dns(1, "*.corp.example"), Some(UNIX + 10));
    let another: fn(&mut Access, Instant) = |a, now| a.authorize(now, &peer(1), internet(3), None);
    let rejected: fn(&mut Access, Instant) = |a, _| a.reject(client_id(1), resource_id(3));
    let filtered: fn(&mut Access, Instant) =
        |a, _| a.update_resource(&cidr(2, LAN, &[udp(53, 53)]));
    let listed: fn(&mut Access, Instant) =
        |a, now| a.resync(now, &[entry(1, 1, Some(UNIX + 10)), entry(1, 2, None)]);
    let renumbered: fn(&mut Access, Instant) =
        |a, _| a.set_gateway_addresses([100, 64, 9, 9].into(), GATEWAY6.parse().unwrap());
    for change in [repeated, another, rejected, filtered, listed, renumbered] {
        change(&mut access, now);
        assert_eq!(access.sizes(client_id(1)), sizes(2, 1, 1));
        assert!(!translated.is_over(tick) && !direct.is_over(tick));
    }
    assert!(Arc::ptr_eq(&flow_to(&access, PROXY), &translated));
    assert!(Arc::ptr_eq(&flow_to(&access, [10, 0, 0, 2]), &direct));

    // Nor does the end of one grant take them away, but nothing passes by it.
    access.handle_timeout(now + seconds(10));
    assert_eq!(access.sizes(client_id(1)), sizes(2, 1, 1));
    assert!(!sends(&access, 1, PROXY, now + seconds(10)));
    assert!(!receives(&access, 1, now + seconds(10)));
}

#[test]
fn flows_and_names_are_gone_with_the_client() {
    let remove: fn(&mut Access, Instant) = |a, _| a.remove_client(client_id(1));
    let reject: fn(&mut Access, Instant) = |a, _| a.reject(client_id(1), resource_id(1));
    let expire: fn(&mut Access, Instant) = |a, now| a.handle_timeout(now + seconds(10));
    let unlist: fn(&mut Access, Instant) = |a, now| a.resync(now, &[entry(2, 1, None)]);
    let move_away: fn(&mut Access, Instant) = |a, now| {
        let mut moved = peer(1);
        moved.ipv6 = addr6(77).parse().unwrap();
        a.authorize(now, &moved, dns(1, "*.corp.example"), None);
    };
    for change in [remove, reject, expire, unlist, move_away] {
        let (mut access, now) = access();
        access.authorize(now, &peer(1), dns(1, "*.corp.example"), Some(UNIX + 10));
        access.authorize(now, &peer(2), cidr(1, LAN, &[]), None);
        announce(&mut access, 1, "a.corp.example", PROXY, now).unwrap();
        assert!(sends(&access, 1, PROXY, now) && sends(&access, 2, HOST, now));
        let policy = access.policy(client_id(1)).unwrap();
        let tick = policy.tick(now);
        let packet = meta(&udp4(addr4(1), PROXY, 1000, 53, b""));
        let flow = policy.admit_outbound(&packet, now).unwrap().flow.unwrap();
        drop(policy);
        access.handle_timeout(now);
        drain(&mut access);
        assert_eq!(access.flow_count(), 2);

        change(&mut access, now);
        drain(&mut access);
        assert_eq!(access.sizes(client_id(1)), Sizes::default());
        assert_eq!(access.flow_count(), 1, "the other client's");
        assert!(flow.is_over(tick), "for those who still remember it");
        // Coming back does not bring them back.
        access.authorize(now, &peer(1), dns(1, "*.corp.example"), None);
        assert!(!sends(&access, 1, PROXY, now));
    }
}

// Purging.

#[test]
fn a_client_with_flows_is_looked_through_until_it_has_none() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    access.handle_timeout(now);
    assert_eq!(access.poll_timeout(), None);
    for begin in [0, 1000] {
        let begin = now + seconds(begin);
        assert!(sends(&access, 1, HOST, begin));
        // Noticed by the next call, whenever it comes.
        assert_eq!(access.poll_timeout(), None);
        access.handle_timeout(begin + seconds(2));
        for due in [17, 32, 47, 62] {
            let due = begin + seconds(due);
            assert_eq!(access.poll_timeout(), Some((due, AccessTimer::FlowPurge)));
            access.handle_timeout(due - Duration::from_millis(1));
            assert_eq!(access.sizes(client_id(1)).flows, 1);
            access.handle_timeout(due);
        }
        assert_eq!(access.poll_timeout(), None);
        assert_eq!(access.flow_count(), 0);
        assert!(access.purges.is_empty());
    }
    assert_eq!(drain(&mut access).len(), 1, "no policy changes by it");
}

#[test]
fn traffic_keeps_a_flow_through_purges() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    for n in 0..40 {
        let at = now + seconds(n * 15);
        assert!(sends(&access, 1, HOST, at));
        assert!(receives(&access, 1, at));
        access.handle_timeout(at);
        assert_eq!(access.flow_count(), 1);
    }
    let last = now + seconds(39 * 15);
    while let Some((due, AccessTimer::FlowPurge)) = access.poll_timeout() {
        assert!(due <= last + seconds(120 + 15));
        access.handle_timeout(due);
    }
    assert_eq!(access.flow_count(), 0);
}

#[test]
fn the_sooner_of_expiry_and_purge_is_due() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), Some(UNIX + 20));
    access.authorize(now, &peer(2), cidr(1, LAN, &[]), Some(UNIX + 10));
    assert!(sends(&access, 1, HOST, now));
    access.handle_timeout(now);
    let due = |s| now + seconds(s);
    for (at, timer) in [
        (due(10), AccessTimer::GrantExpiry),
        (due(15), AccessTimer::FlowPurge),
        (due(20), AccessTimer::GrantExpiry),
    ] {
        assert_eq!(access.poll_timeout(), Some((at, timer)));
        access.handle_timeout(at);
    }
    // The purge of a client that is gone is gone, too.
    assert_eq!(access.poll_timeout(), None);
}

#[test]
fn a_client_removed_before_it_was_noticed_to_have_flows_is_not_looked_through() {
    let (mut access, now) = access();
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    assert!(sends(&access, 1, HOST, now));
    access.remove_client(client_id(1));
    access.handle_timeout(now);
    assert_eq!(access.poll_timeout(), None);
}

#[test]
fn a_client_that_comes_back_is_looked_through_once_not_twice() {
    let (mut access, now) = access();
    for _ in 0..2 {
        access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
        assert!(sends(&access, 1, HOST, now));
        access.remove_client(client_id(1));
    }
    // Due for what it had before it went; then it has flows again, which is noticed later.
    access.authorize(now, &peer(1), cidr(1, LAN, &[]), None);
    access.handle_timeout(now);
    assert!(sends(&access, 1, HOST, now));
    access.handle_timeout(now + seconds(1));
    let due = now + PURGE_INTERVAL;
    assert!(access.purges.iter().eq(&[(due, client_id(1))]));
    access.remove_client(client_id(1));
    assert_eq!(access.poll_timeout(), None);
}

#[test]
fn clients_without_flows_are_not_looked_through_however_many_there_are() {
    const CLIENTS: u32 = 10_000;

    let (mut access, now) = access();
    let member = |n: u32| ClientPeer {
        id: ClientId(uuid::Uuid::from_u128(u128::from(n))),
        ipv4: Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + n),
        ipv6: Ipv6Addr::from_bits(addr6(0).parse::<Ipv6Addr>().unwrap().to_bits() + u128::from(n)),
        ..peer(1)
    };
    for n in 1..=CLIENTS {
        access.authorize(now, &member(n), cidr(1, LAN, &[]), None);
    }
    access.handle_timeout(now);
    assert!(access.purges.is_empty());
    assert_eq!(access.poll_timeout(), None);

    // One among them that has a flow is looked through alone.
    let busy = member(4321);
    let packet = meta(&udp4(busy.ipv4.octets(), HOST, 1000, 53, b""));
    let policy = access.policy(busy.id).unwrap();
    assert!(policy.admit_outbound(&packet, now).is_ok());
    access.handle_timeout(now);
    let due = now + PURGE_INTERVAL;
    assert!(access.purges.iter().eq(&[(due, busy.id)]));
    for n in 1..=4 {
        access.handle_timeout(now + PURGE_INTERVAL * n);
    }
    assert!(access.purges.is_empty());
}
