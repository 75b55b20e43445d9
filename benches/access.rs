//! What access costs with many clients: time of an authorization, memory per client and per flow.
//!
//! `cargo bench --bench access`. Times are of the whole decision in the slow path, from the portal's
//! message to the published policy; memory is the growth of the resident set.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use firezone_gateway::access::{Access, Resolved};
use firezone_gateway::datapath::counters::Counters;
use firezone_gateway::datapath::peers::PeerTable;
use firezone_gateway::gateway::core::Core;
use firezone_gateway::ids::{ClientId, ResourceId};
use firezone_gateway::packet::Meta;
use firezone_gateway::portal::messages::{
    CidrResource, ClientPeer, CreateAuthorization, DnsResource, Filter, IceCredentials, Ingress,
    PresharedKey, Resource,
};
use uuid::Uuid;

const CLIENTS: u32 = 10_000;
const RESOURCES: u32 = 20;
const UPDATES: u32 = 2_000;
const FLOWS_PER_CLIENT: u16 = 100;

fn main() {
    // `cargo test --benches` only wants to know that it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    // Each in a process of its own: memory that one has given back would be used again.
    match std::env::args().find(|argument| argument == "times" || argument == "memory") {
        Some(part) if part == "times" => authorizations(),
        Some(_) => memory(),
        None => {
            println!("{CLIENTS} clients with {RESOURCES} resources each\n");
            for part in ["times", "memory"] {
                let this = std::env::current_exe().unwrap();
                let status = std::process::Command::new(this).arg(part).status();
                assert!(status.unwrap().success());
            }
        }
    }
}

fn resource(n: u32) -> Resource {
    let id = ResourceId(Uuid::from_u128(0x0E50_0000 + u128::from(n)));
    let filters = vec![
        Filter::Tcp { start: 80, end: 80 },
        Filter::Tcp {
            start: 443,
            end: 443,
        },
        Filter::Icmp,
    ];
    if n.is_multiple_of(2) {
        Resource::Cidr(CidrResource {
            id,
            address: format!("10.{n}.0.0/16").parse().unwrap(),
            name: format!("network {n}"),
            filters,
        })
    } else {
        Resource::Dns(DnsResource {
            id,
            address: format!("**.n{n}.corp.example"),
            name: format!("names {n}"),
            filters,
        })
    }
}

fn client(n: u32) -> ClientPeer {
    let mut public_key = [7; 32];
    public_key[..4].copy_from_slice(&n.to_le_bytes());
    ClientPeer {
        id: ClientId(Uuid::from_u128(0xC11E_0000 + u128::from(n))),
        public_key,
        preshared_key: PresharedKey([3; 32]),
        ipv4: ipv4(n),
        ipv6: Ipv6Addr::from_bits(0xfd00_2021_1111 << 80 | u128::from(n)),
        version: None,
    }
}

fn ipv4(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 2).to_bits() + n)
}

fn authorization(client_number: u32, resource_number: u32) -> Ingress {
    let credentials = |side: &str| IceCredentials {
        username: format!("{side}{client_number}"),
        password: format!("{side}-password-{client_number:08}"),
    };
    Ingress::CreateAuthorization(Box::new(CreateAuthorization {
        reference: "reference".to_owned(),
        resource: resource(resource_number),
        client: client(client_number),
        client_ice_credentials: credentials("c"),
        gateway_ice_credentials: credentials("g"),
        expires_at: None,
        use_iceless: false,
        flow_logs_ingest_token: None,
    }))
}

fn authorizations() {
    let (now, wall) = (Instant::now(), SystemTime::now());
    let table = Arc::new(PeerTable::new());
    let mut core = Core::new(now, wall, Arc::clone(&table), Arc::new(Counters::new()), 7);
    core.connected(now);
    let drain = |core: &mut Core| {
        while core.poll_egress().is_some() {}
        while core.poll_transmit().is_some() {}
        while core.poll_command().is_some() {}
    };
    let before = resident();
    let (mut first, mut further) = (Vec::new(), Vec::new());
    for n in 0..CLIENTS {
        for r in 0..RESOURCES {
            let message = authorization(n, r);
            let begin = Instant::now();
            core.handle_portal(now, message);
            let times = if r == 0 { &mut first } else { &mut further };
            times.push(begin.elapsed());
            drain(&mut core);
        }
    }
    // The last quarter met almost all clients.
    let full = first.len() * 3 / 4;
    println!("time of an authorization, in microseconds:    median      99 %   slowest");
    show("new client (with its key exchange)", &mut first[full..]);
    let full = further.len() * 3 / 4;
    show("one more resource", &mut further[full..]);

    let generation = |n: u32| {
        let peer = table.by_address(IpAddr::V4(ipv4(n))).unwrap();
        peer.policy().unwrap().generation()
    };
    let others: Vec<u64> = (1..CLIENTS).map(generation).collect();
    let mut repeated = Vec::new();
    for n in 0..UPDATES {
        let message = authorization(0, n % RESOURCES);
        let begin = Instant::now();
        core.handle_portal(now, message);
        repeated.push(begin.elapsed());
        drain(&mut core);
    }
    show("renewed", &mut repeated);
    let after: Vec<u64> = (1..CLIENTS).map(generation).collect();
    assert_eq!(others, after, "verdicts of other clients stay");

    let mut rejected = Vec::new();
    for n in 0..UPDATES {
        let message = Ingress::RejectAccess {
            client_id: client(n).id,
            resource_id: resource(1).id(),
        };
        let begin = Instant::now();
        core.handle_portal(now, message);
        rejected.push(begin.elapsed());
        drain(&mut core);
    }
    show("taken back", &mut rejected);
    println!(
        "\nmemory per client, sessions, candidates and grants included: {} KiB",
        (resident() - before) / u64::from(CLIENTS) / 1024
    );
}

fn memory() {
    let now = Instant::now();
    let mut access = Access::new(now, Duration::from_secs(1_800_000_000));
    access.set_gateway_addresses(
        Ipv4Addr::new(100, 64, 0, 1),
        "fd00:2021:1111::ffff".parse().unwrap(),
    );
    let before = resident();
    for n in 0..CLIENTS {
        for r in 0..RESOURCES {
            access.authorize(now, &client(n), resource(r), None);
            while access.poll_event().is_some() {}
        }
    }
    let grants = resident();
    println!(
        "memory per client, grants and policy alone:                  {} KiB",
        (grants - before) / u64::from(CLIENTS) / 1024
    );

    let proxies: Vec<IpAddr> = (1..=4)
        .map(|n| IpAddr::from([100, 96, 0, n]))
        .chain((1..=4).map(|n| {
            let base = 0xfd00_2021_1111_8000 << 64;
            IpAddr::V6(Ipv6Addr::from_bits(base + n))
        }))
        .collect();
    let resolved = Resolved {
        ipv4: Some(vec![Ipv4Addr::new(10, 99, 0, 2)]),
        ipv6: Some(vec!["fd99::2".parse().unwrap()]),
    };
    for n in 0..CLIENTS {
        let (client, resource) = (client(n).id, resource(1).id());
        access
            .announce(
                client,
                resource,
                "a.n1.corp.example",
                &proxies,
                &resolved,
                now,
            )
            .unwrap();
    }
    let names = resident();
    println!(
        "memory per name with eight addresses:                        {} B",
        (names - grants) / u64::from(CLIENTS)
    );
    let direct = open(&access, now, [10, 2, 0, 1]);
    let flows = resident();
    println!(
        "memory per flow, untranslated:                               {} B",
        (flows - names) / direct
    );
    let translated = open(&access, now, [100, 96, 0, 1]);
    println!(
        "memory per flow, translated:                                 {} B",
        (resident() - flows) / translated
    );
}

/// Opens flows of every client to a destination; how many.
fn open(access: &Access, now: Instant, dst: [u8; 4]) -> u64 {
    let mut flows = 0;
    for n in 0..CLIENTS {
        let policy = access.policy(client(n).id).unwrap();
        // Half the number for each kind, so that both stay below the limit of all.
        for port in 0..FLOWS_PER_CLIENT / 2 {
            let packet = tcp(ipv4(n), dst.into(), 1024 + port);
            let meta = Meta::parse(&packet).unwrap();
            assert!(policy.admit_outbound(&meta, now).unwrap().flow.is_some());
            flows += 1;
        }
    }
    flows
}

/// A TCP segment to port 443.
fn tcp(src: Ipv4Addr, dst: Ipv4Addr, port: u16) -> [u8; 40] {
    let mut packet = [0; 40];
    packet[0] = 0x45;
    packet[3] = 40;
    packet[8] = 64;
    packet[9] = 6;
    packet[12..16].copy_from_slice(&src.octets());
    packet[16..20].copy_from_slice(&dst.octets());
    packet[20..22].copy_from_slice(&port.to_be_bytes());
    packet[22..24].copy_from_slice(&443u16.to_be_bytes());
    packet[32] = 0x50;
    packet[33] = 0x02;
    packet
}

fn show(what: &str, times: &mut [Duration]) {
    times.sort();
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e6;
    println!("{what:43} {:9.1} {:9.1} {:9.1}", at(50), at(99), at(100));
}

/// Bytes of memory that the process occupies.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}
