//! What clients, resources and the portal may come up with. Few values each, so that they meet.

use std::net::IpAddr;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::packet::{Body, Packet};
use crate::access::Resolved;
use crate::access::fixtures::{GATEWAY4, GATEWAY6, addr4, addr6, cidr, internet, resource_id};
use crate::portal::messages::{DnsResource, Filter, Resource};

pub(super) const CLIENTS: u8 = 3;
/// Pairs of tunnel addresses; more than clients.
pub(super) const ADDRESSES: u8 = 5;
pub(super) const RESOURCES: u8 = 14;

const NETWORKS: &[&str] = &[
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/9",
    "10.0.0.0/24",
    "10.0.0.1/32",
    "10.0.0.2/31",
    "9.9.9.0/24",
    "100.64.0.0/10",
    "100.96.0.0/30",
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

/// Where names lead, and what networks cover.
const REAL4: &[[u8; 4]] = &[[10, 0, 0, 1], [10, 0, 0, 2], [9, 9, 9, 9], [192, 168, 1, 1]];
const REAL6: &[&str] = &["fd12::1", "fd12::2", "2620:fe::9", "2001:db8::1"];

/// Where no name may lead.
const BAD4: &[[u8; 4]] = &[
    [0, 0, 0, 1],
    [127, 0, 0, 1],
    [224, 0, 0, 251],
    [255, 255, 255, 255],
    [100, 64, 0, 2],
    [100, 96, 0, 1],
    GATEWAY4,
];
const BAD6: &[&str] = &[
    "::",
    "::1",
    "::ffff:10.0.0.1",
    "fe80::1",
    "ff02::1",
    "fd00:2021:1111::2",
    "fd00:2021:1111:8000::1",
    GATEWAY6,
];

const REMOTE4: &[[u8; 4]] = &[
    [10, 0, 0, 3],
    [10, 0, 1, 1],
    [10, 200, 0, 1],
    [172, 31, 255, 255],
    [127, 0, 0, 1],
    [169, 254, 1, 1],
    [203, 0, 113, 7],
    [240, 0, 0, 1],
    [255, 255, 255, 255],
    [0, 0, 0, 0],
    [224, 0, 0, 251],
    [100, 127, 255, 255],
    [100, 64, 0, 0],
    [100, 95, 255, 255],
    [100, 64, 0, 1],
    [100, 64, 0, 2],
    GATEWAY4,
    GATEWAY4,
];

const REMOTE6: &[&str] = &[
    "fd12::3",
    "fd12:0:0:1::1",
    "::1",
    "::",
    "::ffff:9.9.9.9",
    "fe80::1",
    "fc00::1",
    "fec0::1",
    "64:ff9b::a00:1",
    "64:ff9b::909:909",
    "ff02::1",
    "fd00:2021:1111:8000::1f:ffff",
    "fd00:2021:1111::1f:ffff",
    "fd00:2021:1111::1",
    "fd00:2021:1111::2",
    GATEWAY6,
    GATEWAY6,
];

const DOMAINS: &[&str] = &[
    "db.corp.example",
    "a.corp.example",
    "b.a.corp.example",
    "corp.example",
    "a1.corp.example",
    "other.example",
];

const PATTERNS: &[&str] = &[
    "db.corp.example",
    "*.corp.example",
    "*.Corp.example",
    "**.corp.example",
    "**.a.corp.example",
    "a?.corp.example",
    "*b*.corp.example",
    "**.example",
    "**",
    "*.example",
];

const FLAGS: &[&str] = &[
    "", "A", "A", "S", "S", "SA", "FA", "FA", "F", "R", "RA", "SF",
];
/// Ports where filters end and ports of the gateway's own services.
const PORTS: &[u16] = &[0, 1, 22, 53, 443, 53_534, 53_535, 53_536, 65_535];

fn of<T: Copy>(rng: &mut StdRng, list: &[T]) -> T {
    *list.choose(rng).unwrap()
}

fn v6(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn address(n: u8, ipv4: bool) -> IpAddr {
    if ipv4 { addr4(n).into() } else { v6(&addr6(n)) }
}

// ---- grants and names ------------------------------------------------------------------------

pub(super) fn filters(rng: &mut StdRng) -> Vec<Filter> {
    let count = of(rng, &[0, 0, 0, 1, 2, 3]);
    let filter = |rng: &mut StdRng| {
        let (start, end) = (of(rng, PORTS), of(rng, PORTS));
        match rng.random_range(0..10) {
            0..3 => Filter::Tcp { start, end },
            3..6 => Filter::Udp { start, end },
            6..9 => Filter::Icmp,
            _ => Filter::Unreadable,
        }
    };
    (0..count).map(|_| filter(rng)).collect()
}

/// Mostly, though not always, a resource of the same kind under the same number.
pub(super) fn resource(rng: &mut StdRng) -> Resource {
    let n = rng.random_range(0..RESOURCES);
    let kind = if rng.random_bool(0.95) {
        n
    } else {
        rng.random_range(0..RESOURCES)
    };
    match kind {
        0 if rng.random_bool(0.6) => internet(n),
        0..7 => {
            let filters = filters(rng);
            cidr(n, NETWORKS.choose(rng).unwrap(), &filters)
        }
        _ => Resource::Dns(DnsResource {
            id: resource_id(n),
            address: of(rng, PATTERNS).into(),
            name: format!("name {n}"),
            filters: filters(rng),
        }),
    }
}

pub(super) fn expiry(rng: &mut StdRng, unix: u64) -> Option<u64> {
    let within = of(rng, &[10, 100, 1_000, 10_000]);
    rng.random_bool(0.6)
        .then(|| (unix / 1000 + rng.random_range(0..within)).saturating_sub(3))
}

/// Addresses `i` of domain `d`, of both families.
fn proxy(d: usize, i: usize, ipv4: bool) -> IpAddr {
    let last = d * 4 + i;
    if ipv4 {
        [100, 96, 0, last as u8].into()
    } else {
        v6(&format!("fd00:2021:1111:8000::{last:x}"))
    }
}

pub(super) struct Announcement {
    pub(super) domain: String,
    pub(super) proxies: Vec<IpAddr>,
    pub(super) resolved: Resolved,
}

pub(super) fn announcement(rng: &mut StdRng) -> Announcement {
    let d = rng.random_range(0..DOMAINS.len());
    // Each domain has addresses of its own, until the client renumbers.
    let owner = if rng.random_bool(0.95) {
        d
    } else {
        rng.random_range(0..DOMAINS.len())
    };
    let (four, six) = of(
        rng,
        &[(true, true), (true, true), (true, false), (false, true)],
    );
    let mut proxies = Vec::new();
    for i in 0..rng.random_range(1..=4) {
        if four {
            proxies.push(proxy(owner, i, true));
        }
        if six {
            proxies.push(proxy(owner, i, false));
        }
    }
    if rng.random_bool(0.1) {
        // Not in the ranges made for this.
        proxies.push(of(rng, &[[10, 0, 0, 1], [100, 64, 0, 2]]).into());
    }
    if rng.random_bool(0.3) {
        proxies.reverse();
    }
    if rng.random_bool(0.02) {
        proxies.clear();
    }
    let mut domain = DOMAINS[d].to_owned();
    if rng.random_bool(0.1) {
        domain.make_ascii_uppercase();
    }
    let mut resolved = Resolved::default();
    if rng.random_bool(0.85) {
        let count = of(rng, &[0, 1, 1, 2, 3]);
        let list = (0..count).map(|_| {
            let list = if rng.random_bool(0.9) { REAL4 } else { BAD4 };
            of(rng, list).into()
        });
        resolved.ipv4 = Some(list.collect());
    }
    if rng.random_bool(0.85) {
        let count = of(rng, &[0, 1, 1, 2, 3]);
        let list = (0..count).map(|_| {
            let list = if rng.random_bool(0.9) { REAL6 } else { BAD6 };
            of(rng, list).parse().unwrap()
        });
        resolved.ipv6 = Some(list.collect());
    }
    Announcement {
        domain,
        proxies,
        resolved,
    }
}

// ---- time ------------------------------------------------------------------------------------

/// To the very ends of flows, to just before them, and any.
pub(super) fn pause(rng: &mut StdRng) -> u64 {
    match rng.random_range(0..100) {
        0..50 => rng.random_range(1..40) * 100,
        50..70 => of(rng, &[4_900, 5_000, 5_100]),
        70..86 => of(rng, &[54_900, 55_000, 59_900, 60_000, 60_100]),
        86..95 => of(rng, &[119_900, 120_000, 120_100]),
        95..98 => of(rng, &[599_900, 600_000]),
        _ => of(rng, &[7_439_900, 7_440_000]),
    }
}

/// Within a round: short, lest all that came before has ended.
pub(super) fn short_pause(rng: &mut StdRng) -> u64 {
    of(rng, &[100, 900, 1_000, 4_900, 5_000, 55_000, 60_000])
}

// ---- packets ---------------------------------------------------------------------------------

/// A packet that has left, as the client has sent it and as the world has got it.
#[derive(Clone)]
pub(super) struct Left {
    pub(super) inside: Packet,
    pub(super) outside: Packet,
}

fn remote(rng: &mut StdRng, ipv4: bool) -> IpAddr {
    match (rng.random_range(0..10), ipv4) {
        (0..4, _) => {
            let d = rng.random_range(0..=DOMAINS.len());
            proxy(d, rng.random_range(0..4), ipv4)
        }
        (4..8, true) => of(rng, REAL4).into(),
        (4..8, false) => v6(of(rng, REAL6)),
        (_, true) => of(rng, REMOTE4).into(),
        (_, false) => v6(of(rng, REMOTE6)),
    }
}

fn body(rng: &mut StdRng, ipv4: bool, outbound: bool) -> Body {
    let local = of(rng, &[1000, 1000, 1001, 1002, 65_535, 65_534, 0]);
    let remote = if rng.random_bool(0.7) {
        of(rng, &[53, 443])
    } else {
        of(rng, PORTS)
    };
    let (from, to) = if outbound {
        (local, remote)
    } else {
        (remote, local)
    };
    match rng.random_range(0..20) {
        0..8 => Body::Tcp {
            from,
            to,
            flags: of(rng, FLAGS),
        },
        8..13 => Body::Udp {
            from,
            to,
            summed: !ipv4 || rng.random_bool(0.8),
        },
        13..17 => Body::Echo {
            id: local,
            reply: rng.random_bool(0.2) == outbound,
        },
        17 => Body::Icmp {
            kind: of(rng, if ipv4 { &[13, 14] } else { &[133, 134] }),
        },
        _ => Body::Other {
            protocol: of(rng, &[47, 132]),
        },
    }
}

fn payload(rng: &mut StdRng) -> Vec<u8> {
    (0..rng.random_range(0..4)).map(|_| rng.random()).collect()
}

fn error_kind(rng: &mut StdRng, ipv4: bool) -> u8 {
    if ipv4 {
        of(rng, &[3, 3, 3, 11, 11, 4, 5, 12])
    } else {
        of(rng, &[1, 1, 2, 2, 3, 4])
    }
}

/// How much of a packet routers quote: the headers that make up an answerable error, a little less,
/// or a lot. Never half a checksum, which cannot be told from a built one.
fn quoted(rng: &mut StdRng, about: &Packet) -> usize {
    about.header() + of(rng, &[0, 3, 4, 8, 8, 8, 8, 9, 20, 24, 25, 500, 500])
}

/// A packet from the holder of an address pair to anywhere, often to a `known` address.
pub(super) fn outbound(rng: &mut StdRng, holder: u8, known: &[IpAddr]) -> Packet {
    let ipv4 = rng.random();
    let mut dst = remote(rng, ipv4);
    if let Some(known) = known.choose(rng)
        && rng.random_bool(0.5)
    {
        dst = *known;
    }
    let ipv4 = dst.is_ipv4();
    let from = if rng.random_bool(0.95) {
        holder
    } else {
        rng.random_range(1..=ADDRESSES)
    };
    let mut packet = Packet {
        src: address(from, ipv4),
        dst,
        body: body(rng, ipv4, true),
        payload: payload(rng),
    };
    if rng.random_bool(0.03) {
        // An error about something that the client may have got.
        let about = packet.answer("A");
        packet.body = Body::Error {
            kind: error_kind(rng, ipv4),
            quoted: quoted(rng, &about),
            about: Box::new(about),
        };
    }
    packet
}

/// A packet that goes on with what a client has sent before.
pub(super) fn continued(rng: &mut StdRng, left: &Left) -> Packet {
    let (mut packet, mut outside) = (left.inside.clone(), left.outside.clone());
    packet.payload = payload(rng);
    let new = of(rng, FLAGS);
    for packet in [&mut packet, &mut outside] {
        if let Body::Tcp { flags, .. } = &mut packet.body {
            *flags = new;
        }
    }
    if rng.random_bool(0.1) {
        packet.payload = outside.vanishing();
    }
    packet
}

/// A packet to the holder of an address pair that nobody has asked for.
pub(super) fn unsolicited(rng: &mut StdRng, holder: u8) -> Packet {
    let ipv4 = rng.random();
    Packet {
        src: remote(rng, ipv4),
        dst: address(holder, ipv4),
        body: body(rng, ipv4, false),
        payload: payload(rng),
    }
}

/// An answer to a packet that has left, or something that looks much like it.
pub(super) fn answer(rng: &mut StdRng, left: &Left) -> Packet {
    let flags = of(rng, FLAGS);
    let mut packet = left.outside.answer(flags);
    packet.payload = if rng.random_bool(0.9) {
        payload(rng)
    } else {
        left.inside.answer(flags).vanishing()
    };
    let ipv4 = packet.src.is_ipv4();
    match rng.random_range(0..30) {
        0 => packet.src = remote(rng, ipv4),
        1 => packet.dst = address(rng.random_range(1..=ADDRESSES), ipv4),
        2 => match &mut packet.body {
            Body::Tcp { from, .. } | Body::Udp { from, .. } => *from ^= 1,
            Body::Echo { reply, .. } => *reply = !*reply,
            other => *other = Body::Other { protocol: 50 },
        },
        3 => match &mut packet.body {
            Body::Tcp { to, .. } | Body::Udp { to, .. } => *to ^= 1,
            Body::Echo { id, .. } => *id ^= 1,
            other => *other = Body::Other { protocol: 50 },
        },
        4 => {
            packet.body = match packet.body {
                Body::Tcp { from, to, .. } => Body::Udp {
                    from,
                    to,
                    summed: true,
                },
                Body::Udp { from, to, .. } => Body::Tcp {
                    from,
                    to,
                    flags: "A",
                },
                other => other,
            }
        }
        _ => {}
    }
    packet
}

/// An ICMP error about a packet that has left, or about something that looks much like it.
pub(super) fn error(rng: &mut StdRng, left: &Left) -> Packet {
    // Now and then about what the client has sent and nobody outside has seen.
    let left = if rng.random_bool(0.9) {
        &left.outside
    } else {
        &left.inside
    };
    let ipv4 = left.src.is_ipv4();
    let mut about = left.clone();
    let dst = if rng.random_bool(0.96) {
        left.src
    } else {
        address(rng.random_range(1..=ADDRESSES), ipv4)
    };
    match rng.random_range(0..20) {
        0 => about = about.sent_to(remote(rng, ipv4), 1000),
        1 => about = about.sent_to(about.dst, 1001),
        2 => about.src = address(rng.random_range(1..=ADDRESSES), ipv4),
        3 => about.body = body(rng, ipv4, true),
        _ => {}
    }
    let src = match rng.random_range(0..10) {
        0..4 => left.dst,
        4 => remote(rng, ipv4),
        5 if ipv4 => GATEWAY4.into(),
        5 => v6(GATEWAY6),
        _ if ipv4 => [198, 51, 100, 1].into(),
        _ => v6("2001:db8:1::1"),
    };
    Packet {
        src,
        dst,
        body: Body::Error {
            kind: error_kind(rng, ipv4),
            quoted: quoted(rng, &about),
            about: Box::new(about),
        },
        payload: Vec::new(),
    }
}
