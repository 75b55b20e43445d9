//! Random grants and packets, judged by a second reading of the rules: a plain list of grants that
//! is walked from the start for every packet, with `IpNetwork::contains` in place of tables.
//!
//! The seed is printed; `ACCESS_MODEL_SEED=<n>` repeats a run.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ip_network::IpNetwork;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::fixtures::*;
use super::*;
use crate::packet::samples::{icmp4, icmp6, ip4, ip6, tcp4, tcp6, udp4, udp6};
use crate::packet::{FlowKey, Meta};
use crate::portal::messages::Filter;

const ROUNDS: usize = 500;
const PACKETS_PER_ROUND: usize = 60;

const NETWORKS: &[&str] = &[
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/9",
    "10.0.0.0/24",
    "10.0.0.1/32",
    "10.0.0.2/31",
    "9.9.9.0/24",
    "100.64.0.0/10",
    "192.168.0.0/16",
    "128.0.0.0/1",
    "::/0",
    "fd12::/32",
    "fd12::/64",
    "fd12::1/128",
    "fd12::2/127",
    "2620:fe::/48",
    "fd00:2021:1111::/48",
];

const REMOTE4: &[[u8; 4]] = &[
    [10, 0, 0, 1],
    [10, 0, 0, 2],
    [10, 0, 0, 3],
    [10, 0, 1, 1],
    [10, 200, 0, 1],
    [9, 9, 9, 9],
    [192, 168, 1, 1],
    [172, 31, 255, 255],
    [127, 0, 0, 1],
    [169, 254, 1, 1],
    [203, 0, 113, 7],
    [240, 0, 0, 1],
    [255, 255, 255, 255],
    [0, 0, 0, 0],
    [224, 0, 0, 251],
    [100, 96, 0, 1],
    [100, 127, 255, 255],
    [100, 64, 0, 0],
    [100, 95, 255, 255],
    GATEWAY4,
];

const REMOTE6: &[&str] = &[
    "fd12::1",
    "fd12::2",
    "fd12::3",
    "fd12:0:0:1::1",
    "2620:fe::9",
    "2001:db8::1",
    "::1",
    "::",
    "::ffff:9.9.9.9",
    "fe80::1",
    "fc00::1",
    "fec0::1",
    "64:ff9b::a00:1",
    "64:ff9b::909:909",
    "ff02::1",
    "fd00:2021:1111::1f:ffff",
    "fd00:2021:1111:8000::1",
    GATEWAY6,
];

const PORTS: &[u16] = &[0, 1, 22, 53, 443, 53_534, 53_535, 53_536, 65_535];

/// One grant as the model remembers it.
#[derive(Clone)]
struct Held {
    resource: Resource,
    expires_at: Option<u64>,
}

/// What the rules say: until when the packet passes, or which answer its sender gets.
#[derive(Debug, PartialEq)]
enum Ruling {
    Pass(Option<u64>),
    Drop(Option<Reply>),
}

/// Shorthands for the three ways to be dropped.
const SILENT: Ruling = Ruling::Drop(None);
const PROHIBITED: Ruling = Ruling::Drop(Some(Reply::Prohibited));
const UNREACHABLE: Ruling = Ruling::Drop(Some(Reply::Unreachable));

struct Model {
    grants: BTreeMap<(u8, u8), Held>,
    nets: BTreeMap<&'static str, IpNetwork>,
}

impl Model {
    fn new() -> Self {
        let names = [
            "100.64.0.0/11",
            "100.96.0.0/11",
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "100.64.0.0/10",
            "224.0.0.0/4",
            "240.0.0.0/4",
            "0.0.0.0/8",
            "fd00:2021:1111::/107",
            "fd00:2021:1111:8000::/107",
            "::/96",
            "::ffff:0:0/96",
            "fc00::/7",
            "fe80::/10",
            "fec0::/10",
            "ff00::/8",
            "64:ff9b::a00:0/104",
        ];
        Self {
            grants: BTreeMap::new(),
            nets: names.iter().map(|n| (*n, n.parse().unwrap())).collect(),
        }
    }

    fn inside(&self, address: IpAddr, nets: &[&str]) -> bool {
        nets.iter().any(|net| self.nets[net].contains(address))
    }

    fn refused_by_internet(&self, address: IpAddr) -> bool {
        let all_but_overlay = self.nets.keys().copied().filter(|n| !n.ends_with("/107"));
        self.inside(address, &all_but_overlay.collect::<Vec<_>>())
    }

    /// Grants of a client that are valid at `unix`.
    fn valid(&self, client: u8, unix: u64) -> Vec<&Held> {
        self.grants
            .iter()
            .filter(|((c, _), held)| *c == client && held.expires_at.is_none_or(|end| end > unix))
            .map(|(_, held)| held)
            .collect()
    }

    fn classify(&self, valid: &[&Held], remote: IpAddr, protocol: u8, port: u16) -> Ruling {
        let is_proxy = self.inside(remote, &["100.96.0.0/11", "fd00:2021:1111:8000::/107"]);
        let has_dns = valid.iter().any(|h| matches!(h.resource, Resource::Dns(_)));
        let internet: Vec<_> = valid
            .iter()
            .filter(|h| matches!(h.resource, Resource::Internet { .. }))
            .collect();
        if is_proxy && has_dns {
            return UNREACHABLE;
        }
        if !internet.is_empty() {
            return if is_proxy {
                PROHIBITED
            } else if self.refused_by_internet(remote) {
                UNREACHABLE
            } else {
                Ruling::Pass(latest(internet.iter().map(|h| h.expires_at)))
            };
        }
        let mut candidates: Vec<_> = valid
            .iter()
            .filter_map(|h| match &h.resource {
                Resource::Cidr(r) if r.address.contains(remote) => Some((r, h.expires_at)),
                _ => None,
            })
            .collect();
        candidates.sort_by_key(|(r, _)| {
            (
                permits(&r.filters, protocol, port),
                r.address.netmask(),
                r.id,
            )
        });
        match candidates.last() {
            Some((r, expires_at)) if permits(&r.filters, protocol, port) => {
                if is_proxy {
                    UNREACHABLE
                } else {
                    Ruling::Pass(*expires_at)
                }
            }
            _ => PROHIBITED,
        }
    }

    fn outbound(&self, client: u8, meta: &Meta, unix: u64) -> Ruling {
        let valid = self.valid(client, unix);
        if self.inside(meta.dst, &["224.0.0.0/4", "ff00::/8"]) || meta.is_icmp_error() {
            return SILENT;
        }
        if !is_client(client, meta.src) {
            return PROHIBITED;
        }
        if is_gateway(meta.dst) {
            let dns = [6, 17].contains(&meta.protocol) && meta.dst_port == 53_535;
            let ping = meta.is_icmp_echo_request() || meta.is_icmp_echo_reply();
            return match valid.is_empty() {
                false if dns || ping => Ruling::Pass(latest(valid.iter().map(|h| h.expires_at))),
                _ => PROHIBITED,
            };
        }
        if self.inside(meta.dst, &["100.64.0.0/11", "fd00:2021:1111::/107"]) {
            return PROHIBITED;
        }
        self.classify(&valid, meta.dst, meta.protocol, meta.dst_port)
    }

    fn inbound(&self, client: u8, meta: &Meta, unix: u64) -> Ruling {
        let valid = self.valid(client, unix);
        if valid.is_empty() || !is_client(client, meta.dst) {
            return SILENT;
        }
        let longest = || Ruling::Pass(latest(valid.iter().map(|h| h.expires_at)));
        if is_gateway(meta.src) {
            return longest();
        }
        if self.inside(meta.src, &["100.64.0.0/11", "fd00:2021:1111::/107"]) {
            return SILENT;
        }
        if meta.is_icmp_error() {
            return if meta.is_icmp_error_for_dst() {
                longest()
            } else {
                SILENT
            };
        }
        match self.classify(&valid, meta.src, meta.protocol, meta.src_port) {
            Ruling::Drop(_) => SILENT,
            pass => pass,
        }
    }

    /// Drops grants that are over at `unix`.
    fn expire(&mut self, unix: u64) {
        self.grants
            .retain(|_, held| held.expires_at.is_none_or(|end| end > unix));
    }
}

fn latest(ends: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    let ends: Vec<_> = ends.collect();
    if ends.contains(&None) {
        return None;
    }
    ends.into_iter().flatten().max()
}

fn permits(filters: &[Filter], protocol: u8, port: u16) -> bool {
    filters.is_empty()
        || filters.iter().any(|filter| match *filter {
            Filter::Tcp { start, end } => protocol == 6 && (start..=end).contains(&port),
            Filter::Udp { start, end } => protocol == 17 && (start..=end).contains(&port),
            Filter::Icmp => [1, 58].contains(&protocol),
            Filter::Unreadable => false,
        })
}

fn is_client(client: u8, address: IpAddr) -> bool {
    let peer = peer(client);
    address == peer.ipv4 || address == peer.ipv6
}

fn is_gateway(address: IpAddr) -> bool {
    address == IpAddr::from(GATEWAY4) || address == GATEWAY6.parse::<IpAddr>().unwrap()
}

fn random_filters(rng: &mut StdRng) -> Vec<Filter> {
    let count = [0, 0, 1, 2, 3].choose(rng).unwrap();
    let range = |rng: &mut StdRng| {
        let mut port = || *PORTS.choose(rng).unwrap();
        (port(), port())
    };
    (0..*count)
        .map(|_| {
            let (start, end) = range(rng);
            match rng.random_range(0..10) {
                0..3 => Filter::Tcp { start, end },
                3..6 => Filter::Udp { start, end },
                6..9 => Filter::Icmp,
                _ => Filter::Unreadable,
            }
        })
        .collect()
}

fn random_resource(rng: &mut StdRng) -> Resource {
    let n = rng.random_range(0..12);
    match rng.random_range(0..20) {
        0 => internet(n),
        1 | 2 => dns(n, "*.corp.example"),
        _ => {
            let filters = random_filters(rng);
            cidr(n, NETWORKS.choose(rng).unwrap(), &filters)
        }
    }
}

fn random_expiry(rng: &mut StdRng, unix: u64) -> Option<u64> {
    rng.random_bool(0.7)
        .then(|| (unix + rng.random_range(0..20)).saturating_sub(3))
}

/// A packet between a client and a remote address, mostly with honest addresses.
fn random_packet(rng: &mut StdRng, client: u8, outbound: bool) -> Vec<u8> {
    let owner = if rng.random_bool(0.9) { client } else { 9 };
    let (from, to) = (*PORTS.choose(rng).unwrap(), *PORTS.choose(rng).unwrap());
    let [hi, lo] = from.to_be_bytes();
    let rest = [hi, lo, 0, 1];
    let shape = rng.random_range(0..8);
    if rng.random_bool(0.5) {
        let (c, r) = (addr4(owner), *REMOTE4.choose(rng).unwrap());
        let (src, dst) = if outbound { (c, r) } else { (r, c) };
        let kind = *[0, 8, 3, 5, 11, 13].choose(rng).unwrap();
        let about = udp4(
            if rng.random() { dst } else { src },
            [1, 1, 1, 1],
            1,
            2,
            b"",
        );
        match shape {
            0..=2 => tcp4(src, dst, from, to, b""),
            3 | 4 => udp4(src, dst, from, to, b""),
            5 | 6 => icmp4(src, dst, kind, 0, rest, &about),
            _ => ip4(src, dst, 47, b"gre"),
        }
    } else {
        let (c, r) = (addr6(owner), *REMOTE6.choose(rng).unwrap());
        let (src, dst) = if outbound {
            (c.as_str(), r)
        } else {
            (r, c.as_str())
        };
        let kind = *[128, 129, 1, 2, 3, 4, 135].choose(rng).unwrap();
        let about = udp6(
            if rng.random() { dst } else { src },
            "2001:db8::9",
            1,
            2,
            b"",
        );
        match shape {
            0..=2 => tcp6(src, dst, from, to, b""),
            3 | 4 => udp6(src, dst, from, to, b""),
            5 | 6 => icmp6(src, dst, kind, 0, rest, &about),
            _ => ip6(src, dst, 132, b"sctp"),
        }
    }
}

/// Changes the grants in the same way on both sides.
fn random_change(
    rng: &mut StdRng,
    access: &mut Access,
    model: &mut Model,
    now: Instant,
    unix: u64,
) {
    let client = rng.random_range(1..4);
    match rng.random_range(0..12) {
        0 => {
            let n = rng.random_range(0..12);
            access.reject(client_id(client), resource_id(n));
            model.grants.remove(&(client, n));
        }
        1 => {
            let filters = random_filters(rng);
            let n = rng.random_range(0..12);
            access.update_resource(&cidr(n, "1.2.3.4/32", &filters));
            for ((_, id), held) in &mut model.grants {
                if let Resource::Cidr(r) = &mut held.resource
                    && *id == n
                {
                    r.filters.clone_from(&filters);
                }
            }
        }
        2 => {
            let mut listed = Vec::new();
            model.grants.retain(|(c, n), held| {
                if rng.random_bool(0.2) {
                    return false;
                }
                if rng.random_bool(0.5) {
                    held.expires_at = random_expiry(rng, unix);
                }
                listed.push(AuthorizationEntry {
                    client_id: client_id(*c),
                    resource_id: resource_id(*n),
                    expires_at: held.expires_at,
                });
                true
            });
            access.resync(now, &listed);
        }
        3 => {
            access.handle_timeout(now);
            model.expire(unix);
        }
        4 if rng.random_bool(0.2) => {
            access.remove_client(client_id(client));
            model.grants.retain(|(c, _), _| *c != client);
        }
        _ => {
            let resource = random_resource(rng);
            let expires_at = random_expiry(rng, unix);
            let n = (resource.id().0.as_u128() & 0xFF) as u8;
            access.authorize(now, &peer(client), resource.clone(), expires_at);
            let held = Held {
                resource,
                expires_at,
            };
            model.grants.insert((client, n), held);
        }
    }
}

fn ruling(verdict: Verdict, start: Instant) -> Ruling {
    match verdict {
        Verdict::Allow { until } => Ruling::Pass(until.map(|at| {
            // An expiry before the start is the start; such a grant never allows anything.
            UNIX + at.duration_since(start).as_secs()
        })),
        Verdict::Deny { reply, .. } => Ruling::Drop(reply),
    }
}

#[test]
#[allow(clippy::print_stdout)]
fn verdicts_agree_with_the_model_on_random_grants_and_packets() {
    let seed = match std::env::var("ACCESS_MODEL_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::random(),
    };
    println!("ACCESS_MODEL_SEED={seed}");
    let rng = &mut StdRng::seed_from_u64(seed);
    let (mut access, start) = access();
    let mut model = Model::new();
    let (mut seconds, mut judged, mut passed) = (0, 0, 0);
    // What each key has been judged to within one policy and instant.
    let mut by_key = HashMap::new();

    for round in 0..ROUNDS {
        if rng.random_bool(0.3) {
            seconds += rng.random_range(0..4);
        }
        let (now, unix) = (start + Duration::from_secs(seconds), UNIX + seconds);
        for _ in 0..rng.random_range(1..4) {
            random_change(rng, &mut access, &mut model, now, unix);
        }
        by_key.clear();
        for _ in 0..PACKETS_PER_ROUND {
            let client = rng.random_range(1..4);
            let outbound = rng.random_bool(0.5);
            let packet = random_packet(rng, client, outbound);
            let meta = Meta::parse(&packet).unwrap();
            let Some(policy) = access.policy(client_id(client)) else {
                assert!(
                    !model.grants.keys().any(|(c, _)| *c == client),
                    "seed {seed}, round {round}: client {client} has grants and no policy"
                );
                continue;
            };
            let (verdict, expected, key) = if outbound {
                (
                    policy.outbound(&meta, now),
                    model.outbound(client, &meta, unix),
                    FlowKey::outbound(&meta),
                )
            } else {
                (
                    policy.inbound(&meta, now),
                    model.inbound(client, &meta, unix),
                    FlowKey::inbound(&meta),
                )
            };
            let held = model.valid(client, unix);
            assert_eq!(
                ruling(verdict, start),
                expected,
                "seed {seed}, round {round}, outbound {outbound}: {meta:?}; {verdict:?}; grants {:?}",
                held.iter()
                    .map(|h| (&h.resource, h.expires_at))
                    .collect::<Vec<_>>()
            );
            let earlier = by_key.insert((client, key), verdict);
            assert!(
                earlier.is_none_or(|earlier| earlier == verdict),
                "seed {seed}, round {round}: one flow key, two verdicts: {meta:?}"
            );
            judged += 1;
            passed += usize::from(verdict.is_allow());
        }
        let deadline = model.grants.values().filter_map(|h| h.expires_at).min();
        assert_eq!(
            access.poll_timeout().map(|(at, _)| at),
            deadline.map(|unix| start + Duration::from_secs(unix.saturating_sub(UNIX))),
            "seed {seed}, round {round}"
        );
        assert!(!drain(&mut access).iter().any(|event| matches!(
            event,
            AccessEvent::PolicyChanged { policy, client } if policy.client() != *client
        )));
    }
    // The run says little if it judged few packets, or all of them alike.
    assert!(judged >= 20_000, "{judged}");
    assert!(
        passed * 20 >= judged && passed * 2 <= judged,
        "{passed} of {judged}"
    );
}
