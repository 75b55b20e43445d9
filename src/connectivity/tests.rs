#![allow(clippy::unwrap_used)]

//! Two agents in virtual time, no relay: the gateway's [`Connectivity`] against a controlling
//! agent that stands for the client.

use is::stun::StunPacket;
use is::{Candidate, IceAgent, IceAgentEvent, Protocol};

use secrecy::SecretString;
use uuid::Uuid;

use super::fixtures::{controlling_agent, creds, id, sock};
use super::relay::double::{PASSWORD, Style, TurnServer, USER};
use super::*;
use crate::admin::model::CandidateKind;
use crate::datapath::peers::PathKind;

const GATEWAY: &str = "192.0.2.1:52625";
const CLIENT: &str = "192.0.2.9:40000";
const CLIENT_OTHER: &str = "198.51.100.9:40000";

struct World {
    now: Instant,
    start: Instant,
    gateway: Connectivity,
    client: IceAgent,
    /// Client addresses whose datagrams are lost, both ways.
    blocked: Vec<SocketAddr>,
    events: Vec<Event>,
    client_nominated: Option<SocketAddr>,
    wake_ups: usize,
}

impl World {
    fn new(client_addresses: &[&str]) -> Self {
        let now = Instant::now();
        let mut client = controlling_agent();
        for address in client_addresses {
            client.add_local_candidate(Candidate::host(sock(address), "udp").unwrap());
        }
        client.handle_timeout(now);
        let mut gateway = Connectivity::new(1);
        gateway.add_host(now, sock(GATEWAY));
        Self {
            now,
            start: now,
            gateway,
            client,
            blocked: Vec::new(),
            events: Vec::new(),
            client_nominated: None,
            wake_ups: 0,
        }
    }

    fn upsert(&mut self) -> Upsert {
        let upsert = self
            .gateway
            .upsert(self.now, id(), &creds("gtwy"), &creds("clnt"), false);
        self.signal();
        upsert
    }

    /// Carries candidates to the client.
    fn signal(&mut self) {
        while let Some(event) = self.gateway.poll_event() {
            if let Event::CandidatesAdded { candidates, .. } = &event {
                for line in candidates {
                    self.client
                        .add_remote_candidate(Candidate::from_sdp_string(line).unwrap());
                }
            }
            self.events.push(event);
        }
    }

    fn offer_client_candidates(&mut self) {
        let lines: Vec<String> = self
            .client
            .local_candidates()
            .map(|c| c.to_sdp_string())
            .collect();
        self.gateway.add_remote_candidates(self.now, id(), &lines);
    }

    fn exchange(&mut self) {
        loop {
            let mut quiet = true;
            while let Some(t) = self.gateway.poll_transmit() {
                quiet = false;
                let source = SocketAddr::new(t.source.unwrap(), sock(GATEWAY).port());
                if self.blocked.contains(&t.destination) {
                    continue;
                }
                let message = StunMessage::parse(&t.payload).unwrap();
                self.client.handle_packet(
                    self.now,
                    StunPacket {
                        proto: Protocol::Udp,
                        source,
                        destination: t.destination,
                        message,
                    },
                );
            }
            while let Some(t) = self.client.poll_transmit() {
                quiet = false;
                if self.blocked.contains(&t.source) {
                    continue;
                }
                let bytes: Vec<u8> = t.contents.into();
                let got = self
                    .gateway
                    .handle_packet(self.now, t.destination, t.source, &bytes);
                assert!(
                    !matches!(got, Inbound::WireGuard { .. }),
                    "a check is not WireGuard"
                );
            }
            while let Some(event) = self.client.poll_event() {
                if let IceAgentEvent::NominatedSend { source, .. } = event {
                    self.client_nominated = Some(source);
                }
            }
            self.signal();
            if quiet {
                return;
            }
        }
    }

    fn run(&mut self, seconds: f64) {
        let end = self.now + Duration::from_secs_f64(seconds);
        self.exchange();
        loop {
            let next = [
                self.gateway.poll_timeout().map(|(at, _)| at),
                self.client.poll_timeout(),
            ]
            .into_iter()
            .flatten()
            .min();
            let Some(next) = next.filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(next);
            if self
                .gateway
                .poll_timeout()
                .is_some_and(|(at, _)| at <= self.now)
            {
                self.wake_ups += 1;
                self.gateway.handle_timeout(self.now);
            }
            self.client.handle_timeout(self.now);
            self.exchange();
        }
        self.now = end;
    }

    fn path(&self) -> Option<Path> {
        self.gateway.describe(id()).and_then(|v| v.path)
    }
}

#[test]
fn a_direct_pair_is_nominated_and_pinned_to_its_source() {
    let mut w = World::new(&[CLIENT]);
    assert_eq!(w.upsert(), Upsert::Created);
    w.offer_client_candidates();
    w.run(3.0);
    assert_eq!(
        w.path(),
        Some(Path {
            source: Some(sock(GATEWAY).ip()),
            destination: sock(CLIENT),
            channel: None,
            kind: PathKind::Direct,
        })
    );
    assert_eq!(w.client_nominated, Some(sock(CLIENT)));
}

#[test]
fn checks_before_the_clients_candidates_arrive_still_make_a_path() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    // The client never signals: its checks alone reveal where it is.
    w.run(3.0);
    assert!(w.path().is_some());
}

#[test]
fn a_repeated_authorization_keeps_the_path_and_signals_everything_again() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    let path = w.path();
    w.events.clear();
    assert_eq!(w.upsert(), Upsert::Reused);
    assert_eq!(w.path(), path);
    assert!(
        w.events.iter().any(|e| matches!(
            e,
            Event::CandidatesAdded { candidates, .. } if candidates[0].contains("192.0.2.1 52625 typ host")
        )),
        "{:?}",
        w.events
    );
}

#[test]
fn a_client_that_never_signals_is_given_up_after_ten_seconds() {
    let mut w = World::new(&[CLIENT]);
    w.blocked.push(sock(CLIENT));
    w.upsert();
    w.run(9.9);
    assert!(w.gateway.describe(id()).is_some());
    w.run(0.2);
    assert!(w.gateway.describe(id()).is_none());
    assert!(w.events.contains(&Event::Failed {
        client: id(),
        cause: FailureCause::NoCandidates
    }));
}

#[test]
fn traffic_moves_to_another_pair_when_the_nominated_one_dies() {
    let mut w = World::new(&[CLIENT, CLIENT_OTHER]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    let first = w.path().unwrap().destination;
    w.blocked.push(first);
    w.run(1.5);
    assert_eq!(w.path().unwrap().destination, first, "it may be a hiccup");
    w.run(2.5);
    let second = w.path().expect("the other pair works").destination;
    assert_ne!(first, second);
}

#[test]
fn a_connection_without_any_working_pair_fails() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    w.blocked.push(sock(CLIENT));
    w.run(40.0);
    assert!(w.events.contains(&Event::Failed {
        client: id(),
        cause: FailureCause::NoPath
    }));
    assert!(w.gateway.describe(id()).is_none());
}

#[test]
fn an_idle_connection_stays_up_for_hours_with_few_wake_ups() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    w.offer_client_candidates();
    w.run(60.0);
    w.client.set_initial_stun_rto(Duration::from_secs(25));
    w.client.set_max_stun_rto(Duration::from_secs(25));
    w.client.set_max_stun_retransmits(4);
    w.run(60.0);
    w.wake_ups = 0;
    w.run(3600.0);
    assert!(w.path().is_some());
    assert!(w.wake_ups < 1000, "{} wake-ups in an hour", w.wake_ups);
}

#[test]
fn datagrams_that_belong_to_nobody_change_nothing() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    let mut stun = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    stun.resize(20, 0);
    assert_eq!(
        w.gateway
            .handle_packet(w.now, sock(GATEWAY), sock(CLIENT), &stun),
        Inbound::Unknown
    );
    assert_eq!(
        w.gateway
            .handle_packet(w.now, sock(GATEWAY), sock(CLIENT), &[4, 0, 0, 0]),
        Inbound::WireGuard {
            local: sock(GATEWAY),
            remote: sock(CLIENT),
            payload: 0..4
        }
    );
    for first in 0..=255u8 {
        for len in 0..40 {
            let mut datagram = vec![first; len];
            if len > 8 {
                datagram[4..8].copy_from_slice(&[0x21, 0x12, 0xa4, 0x42]);
            }
            w.gateway
                .handle_packet(w.now, sock(GATEWAY), sock(CLIENT), &datagram);
        }
    }
    assert!(w.now >= w.start);
}

/// What the client is offered, and takes back.
fn line(candidate: &Candidate) -> Vec<String> {
    vec![candidate.to_sdp_string()]
}

impl World {
    fn reasons(&self) -> Vec<PathReason> {
        self.events
            .iter()
            .filter_map(|event| match event {
                Event::PathChanged { reason, .. } => Some(*reason),
                _ => None,
            })
            .collect()
    }

    fn details(&self) -> ConnectionDetails {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        self.gateway.details(self.now, wall, id()).unwrap()
    }
}

#[test]
fn the_first_path_is_nominated_and_no_change() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    assert_eq!(w.reasons(), [PathReason::Nominated]);
    let view = w.gateway.describe(id()).unwrap();
    assert_eq!(view.path_changes, 0);
    assert_eq!(view.history.len(), 1);
    assert_eq!(
        (view.history[0].from, view.history[0].to),
        (None, Some(PathKind::Direct))
    );
}

#[test]
fn a_better_pair_that_the_client_adds_is_nominated() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    w.events.clear();
    // Its other interface comes up; IPv6 ranks above IPv4.
    w.gateway.add_host(w.now, sock("[2001:db8::1]:52625"));
    let other = Candidate::host(sock("[2001:db8::9]:40000"), "udp").unwrap();
    w.client.add_local_candidate(other.clone());
    w.signal();
    w.gateway.add_remote_candidates(w.now, id(), &line(&other));
    w.run(3.0);
    assert_eq!(w.reasons(), [PathReason::Nominated]);
    assert!(w.path().unwrap().destination.is_ipv6());
}

#[test]
fn a_candidate_that_the_client_withdraws_is_told_as_the_reason() {
    let mut w = World::new(&[CLIENT, CLIENT_OTHER]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    w.events.clear();
    let used = w.path().unwrap().destination;
    let gone = Candidate::host(used, "udp").unwrap();
    w.client.invalidate_candidate(&gone);
    w.gateway
        .invalidate_remote_candidates(w.now, id(), &line(&gone));
    w.run(5.0);
    assert_eq!(w.reasons(), [PathReason::Withdrawn]);
    assert_ne!(w.path().unwrap().destination, used);
    let details = w.details();
    assert_eq!(details.remote_candidate_count, 1);
    assert!(details.pairs.iter().all(|pair| pair.remote != used));
}

#[test]
fn without_any_working_pair_the_path_is_disconnected() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    w.events.clear();
    w.blocked.push(sock(CLIENT));
    while w.path().is_some() {
        w.run(0.1);
        assert!(w.now - w.start < Duration::from_secs(60));
    }
    assert_eq!(w.reasons(), [PathReason::Disconnected]);
    let view = w.gateway.describe(id()).unwrap();
    let last = view.history.last().unwrap();
    assert_eq!((last.from, last.to), (Some(PathKind::Direct), None));
}

#[test]
fn an_address_that_turns_out_to_be_the_clients_relay_is_the_same_pair() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    // Seen in checks before it is signalled.
    w.run(3.0);
    let pair = w.details().pairs[0];
    assert_eq!(pair.remote_kind, Some(CandidateKind::PeerReflexive));
    assert!(pair.in_use && pair.nominated);
    w.events.clear();
    let relayed = Candidate::relayed(sock(CLIENT), sock(CLIENT), "udp").unwrap();
    w.gateway
        .add_remote_candidates(w.now, id(), &line(&relayed));
    w.run(1.0);
    assert_eq!(w.reasons(), [PathReason::Updated]);
    assert_eq!(w.path().unwrap().kind, PathKind::RelayRemote);
    let pair = w.details().pairs[0];
    assert_eq!(pair.remote_kind, Some(CandidateKind::Relayed));
}

#[test]
fn only_the_best_of_many_pairs_are_shown_and_the_one_in_use_is_first() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    // Addresses where nobody is.
    let lines: Vec<String> = (0..500u16)
        .map(|n| SocketAddr::from(([198, 51, 100, 7], 1000 + n)))
        .flat_map(|address| line(&Candidate::host(address, "udp").unwrap()))
        .collect();
    w.gateway.add_remote_candidates(w.now, id(), &lines);
    w.run(0.5);
    let details = w.details();
    assert_eq!(details.remote_candidate_count, 501);
    assert_eq!(details.remote_candidates.len(), 20);
    assert_eq!(details.pair_count, 100);
    assert_eq!(details.pairs.len(), 20);
    assert_eq!(details.pairs[0].remote, sock(CLIENT));
    assert!(details.pairs[0].in_use);
    assert!(
        details.pairs[1..]
            .iter()
            .all(|p| p.answered_at.is_none() && !p.in_use)
    );
}

#[test]
fn clients_whose_fragments_are_alike_do_not_get_in_each_others_way() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    let other = ClientId(Uuid::from_u128(2));
    let alike = IceCredentials {
        password: "another-password-0123456789".to_owned(),
        ..creds("gtwy")
    };
    w.gateway
        .upsert(w.now, other, &alike, &creds("othr"), false);
    w.signal();
    // Only the client's checks reveal where it is.
    w.run(3.0);
    let path = w.path();
    assert!(path.is_some());
    w.gateway.remove(other);
    w.run(5.0);
    assert_eq!(w.path(), path);
    w.gateway.remove(id());
    assert!(w.gateway.by_ufrag.is_empty());
}

#[test]
fn candidates_that_are_named_again_and_again_leave_room_for_new_ones() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    let named = |w: &mut World, address: &str, port: u16| {
        let line = format!("candidate:1 1 udp 1 {address} {port} typ host");
        w.gateway.add_remote_candidates(w.now, id(), &[line]);
        // Long enough for the pair to be given up.
        w.run(20.0);
    };
    for _ in 0..1100 {
        named(&mut w, "203.0.113.5", 7);
    }
    named(&mut w, "203.0.113.6", 8);
    let known: Vec<_> = w.gateway.connections[&id()].channel_peers().collect();
    assert!(known.contains(&sock("203.0.113.6:8")), "{}", known.len());
}

#[test]
fn a_connection_without_room_or_path_is_made_anew() {
    let mut w = World::new(&[CLIENT]);
    w.blocked = vec![sock(CLIENT)];
    w.upsert();
    let lines: Vec<_> = (1..3000)
        .map(|port| format!("candidate:1 1 udp 1 203.0.113.5 {port} typ srflx"))
        .collect();
    w.gateway.add_remote_candidates(w.now, id(), &lines);
    w.blocked.clear();
    w.upsert();
    w.offer_client_candidates();
    w.run(3.0);
    assert!(w.path().is_some());
}

#[test]
fn a_client_can_name_many_candidates_but_not_any_number() {
    let mut w = World::new(&[CLIENT]);
    w.upsert();
    let peers = |w: &World| w.gateway.connections[&id()].channel_peers().count();
    // We have no IPv6 address, so these are paired with nothing.
    let line = "candidate:1 1 udp 1 2001:db8::9 40000 typ host";
    for _ in 0..50 {
        w.gateway
            .add_remote_candidates(w.now, id(), &[line.to_owned()]);
    }
    assert_eq!(peers(&w), 1, "one candidate");
    let lines: Vec<_> = (1..3000)
        .map(|port| format!("candidate:1 1 udp 1 203.0.113.5 {port} typ srflx"))
        .collect();
    w.gateway.add_remote_candidates(w.now, id(), &lines);
    assert!((900..=1000).contains(&peers(&w)), "{}", peers(&w));
}

/// A gateway behind a NAT, with a relay.
fn behind_nat(
    gateway: &mut Connectivity,
    server: &mut TurnServer,
    now: &mut Instant,
    seconds: u64,
    mapped: &str,
) {
    let end = *now + Duration::from_secs(seconds);
    loop {
        while let Some(t) = gateway.poll_transmit() {
            if let Some(answer) = server.handle(*now, sock(mapped), t.destination, &t.payload) {
                gateway.handle_packet(*now, sock(GATEWAY), t.destination, &answer);
            }
        }
        let Some((at, _)) = gateway.poll_timeout().filter(|(at, _)| *at <= end) else {
            break;
        };
        *now = at.max(*now);
        gateway.handle_timeout(*now);
    }
    *now = end;
}

#[test]
fn public_addresses_of_the_past_are_not_offered_and_those_that_return_are() {
    let mut now = Instant::now();
    let mut gateway = Connectivity::new(1);
    let mut server = TurnServer::new(Style::Coturn, &["192.0.2.77:3478"], &["192.0.2.77"]);
    let entry = RelayEntry {
        id: RelayId(Uuid::from_u128(1)),
        v4: Some(sock("192.0.2.77:3478")),
        v6: None,
        username: USER.to_owned(),
        password: SecretString::from(PASSWORD),
        expires_at: 2_145_916_800,
    };
    gateway.upsert_relays(now, &[entry]);
    let mapped = |n: usize| format!("203.0.113.1:{}", 1000 + n);
    for n in 0..20 {
        behind_nat(&mut gateway, &mut server, &mut now, 30, &mapped(n));
    }
    while gateway.poll_event().is_some() {}
    let offered = |gateway: &mut Connectivity| -> Vec<String> {
        std::iter::from_fn(|| gateway.poll_event())
            .filter_map(|event| match event {
                Event::CandidatesAdded { candidates, .. } => Some(candidates),
                _ => None,
            })
            .flatten()
            .filter(|line| line.contains("typ srflx"))
            .collect()
    };
    gateway.upsert(now, id(), &creds("gtwy"), &creds("clnt"), false);
    let line = offered(&mut gateway);
    assert!(line.len() == 1 && line[0].contains(" 1019 "), "{line:?}");
    behind_nat(&mut gateway, &mut server, &mut now, 8, &mapped(0));
    let line = offered(&mut gateway);
    assert!(line.len() == 1 && line[0].contains(" 1000 "), "{line:?}");
}

#[test]
fn two_ends_that_are_both_controlled_settle_who_leads() {
    for tie_breaker in [0, u64::MAX] {
        let mut w = World::new(&[CLIENT]);
        w.client.set_controlling(false);
        w.client.set_control_tie_breaker(tie_breaker);
        w.upsert();
        w.offer_client_candidates();
        w.run(5.0);
        let path = w.path().expect("a path");
        assert_eq!(path.destination, sock(CLIENT));
        assert_eq!(w.client_nominated, Some(sock(CLIENT)));
        assert_eq!(w.client.controlling(), tie_breaker == 0);
    }
}
