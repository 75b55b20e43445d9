#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, IceAgent, IceAgentEvent, IceCreds, Protocol};
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::client::demux::{PeerStep, peer_step};
use crate::client::status::{GatewayStatus, PathKind};

const CLIENT_IP: &str = "10.0.0.1";
const CLIENT_PORT: u16 = 5000;
const GATEWAY_ADDR: &str = "10.0.0.2:52625";
const RESOURCE: Uuid = Uuid::from_u128(0x0b0b_0b0b);
const DNS_RESOURCE: Uuid = Uuid::from_u128(0x0c0c_0c0c);
const GATEWAY: Uuid = Uuid::from_u128(0x6666);

/// The other side, built from the libraries alone: a controlled agent and a responder.
struct FakeGateway {
    addr: SocketAddr,
    agent: IceAgent,
    tunn: Tunn,
    nominated: Option<SocketAddr>,
    initiations: usize,
    inner: Vec<Vec<u8>>,
    answer_wireguard: bool,
}

struct World {
    now: Instant,
    client: Core,
    gateway: FakeGateway,
    egress: Vec<Egress>,
    to_tun: Vec<Vec<u8>>,
    /// Whether datagrams get through.
    connected: bool,
}

fn config(only: Only) -> CoreConfig {
    CoreConfig {
        only,
        one_allocation_per_relay: false,
        internet: false,
        port_v4: Some(CLIENT_PORT),
        port_v6: None,
        connect: Vec::new(),
    }
}

fn decode(event: &str, payload: serde_json::Value) -> Ingress {
    Ingress::decode(event, payload).unwrap().unwrap()
}

fn init() -> Ingress {
    decode(
        "init",
        json!({
            "interface": {"ipv4": "100.70.1.5", "ipv6": "fd00:2021:1111::1:5"},
            "resources": [
                {"type": "cidr", "id": RESOURCE, "address": "10.20.0.0/16", "name": "Lab", "filters": []},
                {"type": "dns", "id": DNS_RESOURCE, "address": "*.corp.example", "name": "Corp", "filters": []}
            ],
            "relays": [],
        }),
    )
}

fn packet_to(destination: [u8; 4]) -> Vec<u8> {
    ipv4([100, 70, 1, 5], destination)
}

fn ipv4(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0u8; 28];
    packet[0] = 0x45;
    packet[3] = 28;
    packet[8] = 64;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&source);
    packet[16..20].copy_from_slice(&destination);
    packet
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let mut client = Core::new(now, [7; 32], config(Only::All));
        let gateway_private = StaticSecret::from([9; 32]);
        let mut agent = IceAgent::new(IceCreds {
            ufrag: "qslo".into(),
            pass: "we3usyefp3j3i2wk2gockq".into(),
        });
        agent.set_controlling(false);
        agent.set_remote_credentials(IceCreds {
            ufrag: "ww54".into(),
            pass: "atm32zsp76tbbrq6su4fqb".into(),
        });
        agent.set_timing_advance(Duration::ZERO);
        let addr: SocketAddr = GATEWAY_ADDR.parse().unwrap();
        agent
            .add_local_candidate(Candidate::host(addr, "udp").unwrap())
            .unwrap();
        agent.handle_timeout(now);
        let tunn = Tunn::new(
            gateway_private,
            PublicKey::from(client.public_key()),
            Some([3; 32]),
            None,
            1,
            None,
        );
        client.handle_host_address(now, CLIENT_IP.parse().unwrap());
        client.handle_portal_up(now);
        client.handle_portal(now, init());
        let mut world = Self {
            now,
            client,
            gateway: FakeGateway {
                addr,
                agent,
                tunn,
                nominated: None,
                initiations: 0,
                inner: Vec::new(),
                answer_wireguard: true,
            },
            egress: Vec::new(),
            to_tun: Vec::new(),
            connected: true,
        };
        world.drain();
        world
    }

    fn grant(&mut self, resource: Uuid) {
        let grant = decode(
            "authorization_created",
            json!({
                "resource_id": resource,
                "gateway_id": GATEWAY,
                "gateway_public_key": STANDARD.encode(PublicKey::from(&StaticSecret::from([9; 32])).as_bytes()),
                "gateway_ipv4": "100.70.8.21", "gateway_ipv6": "fd00:2021:1111::7:4",
                "site_id": Uuid::nil(),
                "preshared_key": STANDARD.encode([3; 32]),
                "client_ice_credentials": {"username": "ww54", "password": "atm32zsp76tbbrq6su4fqb"},
                "gateway_ice_credentials": {"username": "qslo", "password": "we3usyefp3j3i2wk2gockq"},
                "use_iceless": false,
                "flow_logs_ingest_token": "a.b.c",
            }),
        );
        self.client.handle_portal(self.now, grant);
        self.drain();
    }

    fn signal_gateway_candidate(&mut self) {
        let lines: Vec<String> = self
            .gateway
            .agent
            .local_candidates()
            .map(|c| c.to_sdp_string())
            .collect();
        self.client.handle_portal(
            self.now,
            decode(
                "ice_candidates",
                json!({"gateway_id": GATEWAY, "candidates": lines}),
            ),
        );
        self.drain();
    }

    /// Moves everything that is under way, both ways, without letting time pass.
    fn drain(&mut self) {
        loop {
            let mut to_gateway = Vec::new();
            while let Some(batch) = self.client.transmits().pop() {
                for datagram in batch.buf.chunks(batch.segment) {
                    to_gateway.push((batch.dst, datagram.to_vec()));
                }
            }
            while let Some(message) = self.client.poll_egress() {
                if let Egress::NewGatewayIceCandidates { candidates, .. } = &message {
                    for line in candidates {
                        self.gateway
                            .agent
                            .add_remote_candidate(Candidate::from_sdp_string(line).unwrap());
                    }
                    self.gateway.agent.handle_timeout(self.now);
                }
                self.egress.push(message);
            }
            self.to_tun
                .extend(self.client.tun_packets().iter().map(<[u8]>::to_vec));
            self.client.tun_packets().clear();
            // Answers to these may produce more.
            let mut quiet = to_gateway.is_empty();
            for (dst, datagram) in to_gateway {
                if self.connected && dst == self.gateway.addr {
                    self.gateway.receive(self.now, &datagram, &mut self.client);
                }
            }
            for datagram in self.gateway.pending() {
                quiet = false;
                if self.connected {
                    self.client.handle_datagram(
                        self.now,
                        CLIENT_IP.parse().unwrap(),
                        self.gateway.addr,
                        &datagram,
                    );
                }
            }
            if quiet {
                break;
            }
        }
    }

    fn advance(&mut self, by: Duration) {
        let until = self.now + by;
        while self.now < until {
            let step = Duration::from_millis(10);
            self.now = (self.now + step).min(until);
            if self.client.poll_timeout() <= self.now {
                self.client.handle_timeout(self.now);
            }
            if self
                .gateway
                .agent
                .poll_timeout()
                .is_some_and(|at| at <= self.now)
            {
                self.gateway.agent.handle_timeout(self.now);
            }
            self.drain();
        }
    }

    fn gateway_status(&self) -> Option<GatewayStatus> {
        self.client.status(self.now).gateways.into_iter().next()
    }

    fn requests(&self) -> usize {
        self.egress
            .iter()
            .filter(|e| matches!(e, Egress::RequestAuthorization { .. }))
            .count()
    }

    fn establish(&mut self) {
        self.client
            .handle_tun_packet(self.now, &packet_to([10, 20, 0, 1]));
        self.drain();
        self.grant(RESOURCE);
        self.signal_gateway_candidate();
        self.advance(Duration::from_secs(1));
        assert!(self.gateway_status().unwrap().session);
    }

    fn gateway_sends(&mut self, packet: &[u8]) {
        let mut buf = [0u8; 2048];
        let TunnResult::WriteToNetwork(datagram) = self.gateway.tunn.encapsulate(packet, &mut buf)
        else {
            panic!("no session on the gateway");
        };
        let datagram = datagram.to_vec();
        self.client.handle_datagram(
            self.now,
            CLIENT_IP.parse().unwrap(),
            self.gateway.addr,
            &datagram,
        );
        self.drain();
    }
}

impl FakeGateway {
    fn receive(&mut self, now: Instant, datagram: &[u8], client: &mut Core) {
        let from = SocketAddr::new(CLIENT_IP.parse().unwrap(), CLIENT_PORT);
        if peer_step(datagram) == PeerStep::Stun {
            let message = StunMessage::parse(datagram).unwrap();
            self.agent.handle_packet(
                now,
                StunPacket {
                    proto: Protocol::Udp,
                    source: from,
                    destination: self.addr,
                    message,
                },
            );
            return;
        }
        if datagram[0] == 1 {
            self.initiations += 1;
        }
        if !self.answer_wireguard {
            return;
        }
        let mut buf = [0u8; 2048];
        match self.tunn.decapsulate(None, datagram, &mut buf) {
            TunnResult::WriteToNetwork(reply) => {
                let reply = reply.to_vec();
                client.handle_datagram(now, from.ip(), self.addr, &reply);
            }
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                self.inner.push(packet.to_vec());
            }
            TunnResult::Done => {}
            TunnResult::Err(error) => panic!("gateway: {error:?}"),
        }
    }

    fn pending(&mut self) -> Vec<Vec<u8>> {
        while let Some(event) = self.agent.poll_event() {
            if let IceAgentEvent::NominatedSend { destination, .. } = event {
                self.nominated = Some(destination);
            }
        }
        std::iter::from_fn(|| self.agent.poll_transmit())
            .map(|t| t.contents.to_vec())
            .collect()
    }
}

#[test]
fn first_packet_leads_to_request_nomination_handshake_and_delivery() {
    let mut world = World::new();
    assert!(matches!(
        world.egress[0],
        Egress::SetSnownetCapabilities { iceless: false }
    ));
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 2]));
    world.drain();
    assert_eq!(world.requests(), 1, "the portal is asked once");

    world.grant(RESOURCE);
    let candidates = world.egress.iter().find_map(|e| match e {
        Egress::NewGatewayIceCandidates { candidates, .. } => Some(candidates.clone()),
        _ => None,
    });
    let candidates = candidates.expect("candidates are signalled");
    assert_eq!(candidates.len(), 1);
    assert!(candidates[0].contains(" 10.0.0.1 5000 typ host"));

    world.signal_gateway_candidate();
    world.advance(Duration::from_secs(1));

    let status = world.gateway_status().unwrap();
    assert_eq!(status.path, Some(PathKind::Direct));
    assert_eq!(status.remote.unwrap().addr, world.gateway.addr);
    assert_eq!(status.handshakes, 1);
    assert_eq!(
        world.gateway.nominated,
        Some("10.0.0.1:5000".parse().unwrap())
    );
    assert_eq!(
        world.gateway.inner,
        [packet_to([10, 20, 0, 1]), packet_to([10, 20, 0, 2])],
        "buffered packets arrive in order"
    );

    let answer = ipv4([10, 20, 0, 1], [100, 70, 1, 5]);
    world.gateway_sends(&answer);
    assert_eq!(world.to_tun, [answer]);
    world.gateway_sends(&ipv4([10, 20, 0, 1], [100, 70, 1, 6]));
    assert_eq!(world.to_tun.len(), 1, "not addressed to us");
    assert_eq!(
        world
            .client
            .status(world.now)
            .counters
            .dropped_inner_destination,
        1
    );
}

#[test]
fn requests_are_throttled_to_one_in_two_seconds() {
    let mut world = World::new();
    for _ in 0..5 {
        world
            .client
            .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
        world.advance(Duration::from_millis(300));
    }
    assert_eq!(world.requests(), 1);
    world.advance(Duration::from_millis(600));
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
    world.drain();
    assert_eq!(world.requests(), 2);
}

#[test]
fn packets_without_a_resource_are_dropped_and_counted() {
    let mut world = World::new();
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 99, 0, 1]));
    world.drain();
    assert_eq!(world.requests(), 0);
    assert_eq!(
        world.client.status(world.now).counters.dropped_no_resource,
        1
    );
}

#[test]
fn buffer_keeps_the_newest_128_packets() {
    let mut world = World::new();
    for i in 0..130u8 {
        world
            .client
            .handle_tun_packet(world.now, &packet_to([10, 20, 1, i]));
    }
    world.grant(RESOURCE);
    world.signal_gateway_candidate();
    world.advance(Duration::from_secs(1));
    assert_eq!(world.gateway.inner.len(), 128);
    assert_eq!(world.gateway.inner[0], packet_to([10, 20, 1, 2]));
    assert_eq!(
        world.client.status(world.now).counters.dropped_buffer_full,
        2
    );
}

#[test]
fn goodbye_forgets_the_gateway_and_the_next_packet_asks_again() {
    let mut world = World::new();
    world.establish();
    world.gateway_sends(&packet::control(packet::EVENT_GOODBYE, &[]));
    assert!(world.gateway_status().is_none());
    assert_eq!(world.client.status(world.now).counters.goodbyes_received, 1);
    assert!(world.to_tun.is_empty(), "control packets stay inside");
    let before = world.requests();
    world.advance(Duration::from_secs(2));
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
    world.drain();
    assert_eq!(world.requests(), before + 1);
}

#[test]
fn disconnect_says_goodbye_on_the_nominated_path() {
    let mut world = World::new();
    world.establish();
    world.gateway.inner.clear();
    assert_eq!(world.client.disconnect(world.now), 1);
    world.drain();
    let goodbye = packet::parse_control(&world.gateway.inner[0]).unwrap();
    assert_eq!(goodbye.event, packet::EVENT_GOODBYE);
    assert!(world.gateway_status().is_none());
}

#[test]
fn no_candidates_for_ten_seconds_fails_the_connection() {
    let mut world = World::new();
    world.connected = false;
    world.grant(RESOURCE);
    world.advance(Duration::from_millis(9_500));
    assert!(world.gateway_status().is_some());
    world.advance(Duration::from_secs(1));
    assert!(world.gateway_status().is_none());
    let counters = world.client.status(world.now).counters;
    assert_eq!(counters.connections_failed, 1);
    assert_eq!(
        counters.last_connection_failure.as_deref(),
        Some(Failure::NoCandidates.as_str())
    );
}

#[test]
fn silent_wireguard_fails_the_connection_after_twenty_seconds() {
    let mut world = World::new();
    world.gateway.answer_wireguard = false;
    world.grant(RESOURCE);
    world.signal_gateway_candidate();
    world.advance(Duration::from_secs(19));
    assert_eq!(world.gateway.initiations, 1, "one per nomination");
    assert!(world.gateway_status().is_some());
    world.advance(Duration::from_secs(2));
    assert!(world.gateway_status().is_none());
    assert_eq!(
        world
            .client
            .status(world.now)
            .counters
            .last_connection_failure
            .as_deref(),
        Some(Failure::HandshakeTimeout.as_str())
    );
}

#[test]
fn a_session_the_gateway_started_releases_held_packets_and_counts_as_an_answer() {
    let mut world = World::new();
    world.gateway.answer_wireguard = false;
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
    world.grant(RESOURCE);
    world.signal_gateway_candidate();
    world.advance(Duration::from_secs(1));
    assert!(!world.gateway_status().unwrap().session);

    world.gateway.answer_wireguard = true;
    let mut buf = [0u8; 2048];
    let TunnResult::WriteToNetwork(initiation) = world
        .gateway
        .tunn
        .format_handshake_initiation(&mut buf, true)
    else {
        panic!("no initiation");
    };
    let initiation = initiation.to_vec();
    let deliver = |world: &mut World, datagram: &[u8]| {
        let (ip, from) = (CLIENT_IP.parse().unwrap(), world.gateway.addr);
        world.client.handle_datagram(world.now, ip, from, datagram);
        world.drain();
    };
    deliver(&mut world, &initiation);
    let status = world.gateway_status().unwrap();
    assert!(status.session);
    assert_eq!(status.handshakes, 1);
    assert_eq!(world.gateway.inner, [packet_to([10, 20, 0, 1])]);
    for _ in 0..30 {
        world
            .client
            .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
        world.advance(Duration::from_secs(1));
    }
    assert!(world.gateway_status().is_some(), "not a handshake timeout");
}

#[test]
fn a_dead_path_is_noticed_within_the_active_limits() {
    let mut world = World::new();
    world.establish();
    world.connected = false;
    let started = world.now;
    while world.gateway_status().is_some() {
        world
            .client
            .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
        world.advance(Duration::from_millis(500));
        assert!(
            world.now - started < Duration::from_secs(40),
            "never noticed"
        );
    }
    let took = world.now - started;
    assert!(took > Duration::from_secs(5), "{took:?}");
    assert_eq!(
        world
            .client
            .status(world.now)
            .counters
            .last_connection_failure
            .as_deref(),
        Some(Failure::IceDisconnected.as_str())
    );
}

#[test]
fn silence_makes_the_connection_idle_and_a_packet_wakes_it() {
    let mut world = World::new();
    world.establish();
    world.advance(Duration::from_secs(21));
    assert!(world.gateway_status().unwrap().idle);
    world.advance(Duration::from_secs(60));
    assert!(world.gateway_status().is_some(), "idle is not dead");
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 1]));
    world.drain();
    assert!(!world.gateway_status().unwrap().idle);
}

#[test]
fn a_second_grant_reuses_the_connection_and_signals_again() {
    let mut world = World::new();
    world.establish();
    let before = world.egress.len();
    world.grant(DNS_RESOURCE);
    let status = world.gateway_status().unwrap();
    assert_eq!(status.handshakes, 1, "WireGuard is left alone");
    assert_eq!(status.resources.len(), 2);
    assert!(
        world.egress[before..]
            .iter()
            .any(|e| matches!(e, Egress::NewGatewayIceCandidates { .. }))
    );
}

#[test]
fn traffic_survives_a_portal_restart_and_candidates_are_held_meanwhile() {
    let mut world = World::new();
    world.establish();
    world.client.handle_portal_down("restart".into());
    let before = world.egress.len();
    world
        .client
        .handle_host_address(world.now, "10.0.0.9".parse().unwrap());
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 7]));
    world.drain();
    assert_eq!(
        world.gateway.inner.last().unwrap(),
        &packet_to([10, 20, 0, 7])
    );
    assert_eq!(world.egress.len(), before, "nothing is sent while down");

    world.client.handle_portal_up(world.now);
    world.client.handle_portal(world.now, init());
    world.drain();
    let after = &world.egress[before..];
    assert!(matches!(
        after[0],
        Egress::SetSnownetCapabilities { iceless: false }
    ));
    assert!(after.iter().any(|e| matches!(e,
        Egress::NewGatewayIceCandidates { candidates, .. }
            if candidates.len() == 1 && candidates[0].contains(" 10.0.0.9 5000 "))));
    assert!(world.gateway_status().unwrap().session);
}

#[test]
fn packets_that_arrive_while_the_portal_is_away_are_asked_for_later() {
    let mut world = World::new();
    world.client.handle_portal_down("restart".into());
    world
        .client
        .handle_tun_packet(world.now, &packet_to([10, 20, 0, 7]));
    world.drain();
    assert_eq!(world.requests(), 0);
    world.client.handle_portal_up(world.now);
    world.drain();
    assert_eq!(world.requests(), 1);
}

#[test]
fn dns_names_are_announced_and_packets_wait_for_active() {
    let mut world = World::new();
    world.establish();
    world.grant(DNS_RESOURCE);
    world.gateway.inner.clear();
    let (resource, ips) = world.client.resolve(world.now, "db.corp.example.").unwrap();
    assert_eq!(resource, DNS_RESOURCE);
    let IpAddr::V4(ip) = ips[0] else {
        panic!("IPv4 first");
    };
    world
        .client
        .handle_tun_packet(world.now, &packet_to(ip.octets()));
    world.drain();
    assert_eq!(world.gateway.inner.len(), 1, "only the announcement");
    let control = packet::parse_control(&world.gateway.inner[0]).unwrap();
    assert_eq!(control.event, packet::EVENT_ASSIGNED_IPS);
    let status = json!({"resource": DNS_RESOURCE, "domain": "db.corp.example", "status": "Active"});
    world.gateway_sends(&packet::control(
        packet::EVENT_DOMAIN_STATUS,
        status.to_string().as_bytes(),
    ));
    assert_eq!(world.gateway.inner[1], packet_to(ip.octets()));
    assert!(world.client.resolve(world.now, "corp.other").is_none());
}

#[test]
fn relay_only_never_signals_a_direct_candidate() {
    let now = Instant::now();
    let mut world = World::new();
    world.client = Core::new(now, [7; 32], config(Only::Relay));
    world
        .client
        .handle_host_address(now, CLIENT_IP.parse().unwrap());
    world.client.handle_portal_up(now);
    world.client.handle_portal(now, init());
    world.egress.clear();
    world.grant(RESOURCE);
    world.signal_gateway_candidate();
    world.advance(Duration::from_secs(2));
    assert!(
        !world
            .egress
            .iter()
            .any(|e| matches!(e, Egress::NewGatewayIceCandidates { .. }))
    );
    assert_eq!(world.gateway_status().unwrap().path, None);
}

#[test]
fn rubbish_is_counted_and_harmless() {
    let mut world = World::new();
    world.establish();
    let from: SocketAddr = "192.0.2.66:3478".parse().unwrap();
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for len in 0..400usize {
        let datagram: Vec<u8> = (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[0]
            })
            .collect();
        world
            .client
            .handle_datagram(world.now, CLIENT_IP.parse().unwrap(), from, &datagram);
        world.client.handle_tun_packet(world.now, &datagram);
    }
    world.drain();
    assert!(
        world
            .client
            .status(world.now)
            .counters
            .dropped_unknown_datagram
            > 300
    );
    assert!(world.gateway_status().unwrap().session);
}

#[test]
fn wanted_resources_are_asked_for_until_first_granted() {
    let mut world = World::new();
    let mut config = config(Only::All);
    config.connect = vec![RESOURCE];
    world.client = Core::new(world.now, [7; 32], config);
    world.client.handle_portal_up(world.now);
    world.client.handle_portal(world.now, init());
    world.drain();
    assert_eq!(world.requests(), 1);
    world.client.handle_portal(
        world.now,
        decode(
            "authorization_creation_failed",
            json!({"resource_id": RESOURCE, "reason": "offline"}),
        ),
    );
    world.advance(Duration::from_secs(5));
    assert_eq!(world.requests(), 3);
    world.grant(RESOURCE);
    world.client.disconnect(world.now);
    world.advance(Duration::from_secs(5));
    assert_eq!(world.requests(), 3);
}

#[test]
fn routes_follow_the_resources() {
    let mut world = World::new();
    let network = world.client.poll_network().unwrap();
    assert!(network.routes.contains(&"10.20.0.0/16".parse().unwrap()));
    assert!(network.routes.contains(&"100.96.0.0/11".parse().unwrap()));
    assert!(!network.default_route);
    world.client.handle_portal(world.now, init());
    assert!(world.client.poll_network().is_none(), "nothing changed");
    world
        .client
        .handle_portal(world.now, decode("resource_deleted", json!(RESOURCE)));
    let network = world.client.poll_network().unwrap();
    assert!(!network.routes.contains(&"10.20.0.0/16".parse().unwrap()));
}
