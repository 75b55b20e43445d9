//! Entry point of the fuzz target in `fuzz/`. The committed corpus goes through it as a test.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Access, Resolved, ranges};
use crate::fuzzing::Script;
use crate::ids::{ClientId, ResourceId};
use crate::packet::Meta;
use crate::portal::messages::{
    AuthorizationEntry, CidrResource, ClientPeer, DnsResource, Filter, PresharedKey, Resource,
};

const UNIX: u64 = 1_800_000_000;
const GATEWAY: [u8; 4] = [100, 64, 0, 200];
const NETWORKS: [&str; 4] = ["10.0.0.0/8", "10.1.0.0/16", "100.96.0.0/11", "0.0.0.0/0"];
const PATTERNS: [&str; 4] = ["**.example", "*.a.example", "a.example", "b?.example"];
const DOMAINS: [&str; 4] = ["a.example", "x.a.example", "b1.example", "..odd"];
const REMOTES: [[u8; 4]; 8] = [
    [10, 0, 0, 1],
    [10, 1, 0, 1],
    [100, 96, 0, 1],
    [100, 96, 0, 2],
    [100, 64, 0, 1],
    [9, 9, 9, 9],
    [224, 0, 0, 1],
    GATEWAY,
];

/// A script of what portal, clients and resources do to the grants, names and flows.
pub fn access(data: &[u8]) {
    let mut script = Script::new(data);
    let now = Instant::now();
    let mut world = World {
        access: Access::new(now, Duration::from_secs(UNIX)),
        now,
        unix: UNIX,
        begun: BTreeMap::new(),
    };
    world.access.account_for_flows(true);
    world
        .access
        .set_gateway_addresses(GATEWAY.into(), "fd00:2021:1111::ff".parse().expect("valid"));
    while !script.is_empty() {
        world.step(&mut script);
        while world.access.poll_event().is_some() {}
        world.take_reports();
        world.check();
    }
    world.access.remove_all();
    while world.access.poll_event().is_some() {}
    world.take_reports();
    assert!(world.begun.is_empty(), "what was told to have begun ends");
    assert_eq!(world.access.flow_count(), 0, "flows go with their clients");
    assert_eq!(world.access.poll_timeout(), None, "nothing is left to do");
}

struct World {
    access: Access,
    now: Instant,
    unix: u64,
    /// Flows that were told to have begun, by their ends: how many.
    begun: BTreeMap<(ClientId, u8, SocketAddr, SocketAddr), usize>,
}

fn client_id(n: u8) -> ClientId {
    ClientId(Uuid::from_u128(1 + u128::from(n)))
}

fn resource_id(n: u8) -> ResourceId {
    ResourceId(Uuid::from_u128(100 + u128::from(n)))
}

fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, 1 + n)
}

fn peer(n: u8, renumbered: bool) -> ClientPeer {
    ClientPeer {
        id: client_id(n),
        public_key: [n; 32],
        preshared_key: PresharedKey([0; 32]),
        ipv4: address(n + u8::from(renumbered)),
        ipv6: format!("fd00:2021:1111::{:x}", u16::from(n) + 1)
            .parse()
            .expect("valid"),
        version: None,
    }
}

fn resource(script: &mut Script<'_>, n: u8) -> Resource {
    let filters = match script.below(4) {
        0 => vec![],
        1 => vec![Filter::Tcp { start: 80, end: 80 }],
        2 => vec![Filter::Icmp, Filter::Udp { start: 0, end: 9 }],
        _ => vec![Filter::Unreadable],
    };
    let (id, name) = (resource_id(n), String::new());
    match script.below(3) {
        0 => Resource::Cidr(CidrResource {
            id,
            address: script.one_of(&NETWORKS).parse().expect("valid"),
            name,
            filters,
        }),
        1 => Resource::Dns(DnsResource {
            id,
            address: script.one_of(&PATTERNS).to_owned(),
            name,
            filters,
        }),
        _ => Resource::Internet { id },
    }
}

fn packet(protocol: u8, src: [u8; 4], dst: [u8; 4], ports: [u16; 2], flags: u8) -> Vec<u8> {
    let mut packet = vec![0; 40];
    packet[0] = 0x45;
    packet[3] = 40;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&src);
    packet[16..20].copy_from_slice(&dst);
    packet[20..22].copy_from_slice(&ports[0].to_be_bytes());
    packet[22..24].copy_from_slice(&ports[1].to_be_bytes());
    match protocol {
        6 => {
            packet[32] = 0x50;
            packet[33] = flags;
        }
        17 => packet[24..26].copy_from_slice(&20u16.to_be_bytes()),
        // An echo request with the first port as its identifier.
        1 => {
            packet[20..24].copy_from_slice(&[8, 0, 0, 0]);
            packet[24..26].copy_from_slice(&ports[0].to_be_bytes());
        }
        _ => {}
    }
    packet
}

impl World {
    fn step(&mut self, script: &mut Script<'_>) {
        let (client, n) = (script.below(2) as u8, script.below(3) as u8);
        match script.below(9) {
            0 => {
                let resource = resource(script, n);
                let expires = script.bit().then(|| self.unix + u64::from(script.byte()));
                let peer = peer(client, script.below(16) == 15);
                self.access.authorize(self.now, &peer, resource, expires);
            }
            1 => {
                let resource = resource(script, n);
                self.access.update_resource(&resource);
            }
            2 => self.access.reject(client_id(client), resource_id(n)),
            3 => {
                let listed: Vec<_> = (0..script.below(4))
                    .map(|_| AuthorizationEntry {
                        client_id: client_id(script.below(2) as u8),
                        resource_id: resource_id(script.below(3) as u8),
                        expires_at: script.bit().then(|| self.unix + u64::from(script.byte())),
                    })
                    .collect();
                self.access.resync(self.now, &listed);
            }
            4 => {
                let seconds = u64::from(script.byte());
                self.now += Duration::from_secs(seconds);
                self.unix += seconds;
                self.access.handle_timeout(self.now);
            }
            5 => self.announce(script, client, n),
            6 => self.access.remove_client(client_id(client)),
            _ => self.packet(script, client),
        }
    }

    fn announce(&mut self, script: &mut Script<'_>, client: u8, n: u8) {
        let proxies: Vec<IpAddr> = (0..script.below(4))
            .map(|_| script.one_of(&REMOTES).into())
            .collect();
        let resolved = Resolved {
            ipv4: script.bit().then(|| {
                (0..script.below(3))
                    .map(|_| script.one_of(&REMOTES).into())
                    .collect()
            }),
            ipv6: script.bit().then(Vec::new),
        };
        let domain = script.one_of(&DOMAINS);
        let (client, resource) = (client_id(client), resource_id(n));
        let _ = self
            .access
            .announce(client, resource, domain, &proxies, &resolved, self.now);
    }

    /// One packet from a client, and if it passes, an answer to it.
    fn packet(&mut self, script: &mut Script<'_>, client: u8) {
        let Some(policy) = self.access.policy(client_id(client)) else {
            return;
        };
        let protocol = script.one_of(&[6, 17, 1, 47]);
        let src = address(script.below(3) as u8).octets();
        let dst = script.one_of(&REMOTES);
        let ports = [
            u16::from(script.byte()),
            script.one_of(&[80, 9, 443, 53_535]),
        ];
        let mut sent = packet(protocol, src, dst, ports, script.byte());
        let Ok(meta) = Meta::parse(&sent) else {
            return;
        };
        let tick = policy.tick(self.now);
        let Ok(passed) = policy.admit_outbound(&meta, self.now) else {
            return;
        };
        assert!(policy.addresses().contains(meta.src), "spoofed");
        assert!(passed.until.is_none_or(|until| until > self.now), "expired");
        let Some(flow) = passed.flow else {
            assert_eq!(
                meta.dst,
                IpAddr::from(GATEWAY),
                "only there no flow is needed"
            );
            return;
        };
        flow.pass_out(tick, &meta, &mut sent);
        let outside = flow.outside();
        assert!(
            !ranges::is_tunnel(outside) && !ranges::is_proxy(outside),
            "{outside}"
        );
        assert_eq!(flow.is_translated(), ranges::is_proxy(meta.dst));
        let asked = meta.dst;
        let meta = Meta::parse(&sent).expect("still valid");
        assert_eq!(meta.dst, outside, "goes to where it stands for");
        if protocol == 47 || protocol == 1 {
            return;
        }
        let IpAddr::V4(outside) = outside else {
            panic!("IPv4 leads to IPv4");
        };
        let ports = [flow.remote_port(), flow.outside_port()];
        let mut answer = packet(protocol, outside.octets(), src, ports, script.byte());
        let Ok(meta) = Meta::parse(&answer) else {
            return;
        };
        // Whoever may ask may be answered.
        let answered = policy.admit_inbound(&meta, self.now);
        let answered = answered.expect("the grant is the same").flow;
        let answered = answered.expect("not from the gateway");
        assert!(std::sync::Arc::ptr_eq(&answered, &flow));
        answered.pass_in(tick, &meta, &mut answer);
        let answer = Meta::parse(&answer).expect("still valid");
        assert_eq!(answer.src, asked, "comes from where the client asked");
    }

    /// Each end of a flow is told after its beginning, and with what has passed.
    fn take_reports(&mut self) {
        while let Some(report) = self.access.poll_report() {
            let ends = (report.source, report.destination);
            let flow = (report.client, report.protocol, ends.0, ends.1);
            let begun = self.begun.entry(flow).or_default();
            let Some(end) = report.ended else {
                *begun += 1;
                continue;
            };
            assert!(end.last_packet >= report.began);
            assert!(end.counted.out_packets + end.counted.in_packets > 0);
            *begun = begun.checked_sub(1).expect("has begun");
            if *begun == 0 {
                self.begun.remove(&flow);
            }
        }
        assert_eq!(self.access.reports_dropped(), 0);
    }

    fn check(&self) {
        let flows: usize = (0..2).map(|n| self.access.sizes(client_id(n)).flows).sum();
        assert_eq!(flows, self.access.flow_count());
    }
}

#[cfg(test)]
mod tests {
    use crate::fuzzing::corpus;

    #[test]
    fn corpus_of_access() {
        corpus("access", 64, super::access);
    }

    #[test]
    fn random_scripts_keep_every_rule() {
        use rand::{RngCore as _, SeedableRng as _};

        for seed in 0..3000 {
            let mut script = [0; 400];
            rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut script);
            let run = std::panic::catch_unwind(|| super::access(&script));
            assert!(run.is_ok(), "seed {seed}");
        }
    }
}
