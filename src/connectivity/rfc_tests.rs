//! What RFC 8445 demands of a controlled agent, datagram by datagram; see docs/rfc.md.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use is::Candidate;
use is::stun::TransId;
use uuid::Uuid;

use super::fixtures::{
    answer, answer_as, attribute_types, check, check_as, creds, id, signed, sock,
};
use super::*;
use crate::admin::model::CandidateKind as Kind;

const GATEWAY: &str = "192.0.2.1:52625";
const GATEWAY_2: &str = "192.0.2.2:52625";
const CLIENT: &str = "192.0.2.9:40000";
const ELSEWHERE: &str = "203.0.113.66:7";

/// A gateway with one connection, whose client has one address.
struct World {
    now: Instant,
    gateway: Connectivity,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let mut gateway = Connectivity::new(1);
        gateway.add_host(now, sock(GATEWAY));
        gateway.add_host(now, sock(GATEWAY_2));
        gateway.upsert(now, id(), &creds("gtwy"), &creds("clnt"), false);
        let mut world = Self { now, gateway };
        world.offer(&[CLIENT]);
        world
    }

    /// The client's candidates.
    fn offer(&mut self, addresses: &[&str]) {
        let lines: Vec<String> = addresses
            .iter()
            .map(|address| {
                let candidate = Candidate::host(sock(address), "udp").unwrap();
                candidate.to_sdp_string()
            })
            .collect();
        self.gateway.add_remote_candidates(self.now, id(), &lines);
    }

    /// What was sent, and by which class of message.
    fn sent(&mut self, requests: bool) -> Vec<Transmit> {
        std::iter::from_fn(|| self.gateway.poll_transmit())
            .filter(|t| is_request(&t.payload) == requests)
            .collect()
    }

    /// A check from the first address to the client's.
    fn check_sent(&mut self) -> Vec<u8> {
        let sent = self.sent(true).into_iter();
        let mut of_pair =
            sent.filter(|t| t.source == Some(sock(GATEWAY).ip()) && t.destination == sock(CLIENT));
        of_pair.next().unwrap().payload
    }

    fn receive(&mut self, local: &str, remote: &str, datagram: &[u8]) -> Inbound {
        self.gateway
            .handle_packet(self.now, sock(local), sock(remote), datagram)
    }

    fn owner(&self, local: &str, remote: &str) -> Option<ClientId> {
        self.gateway.owner_of(self.now, sock(local), sock(remote))
    }

    /// Lets time pass; `answers` says whether the client answers checks. What was sent, and when.
    fn run(&mut self, seconds: u64, answers: bool) -> Vec<(Instant, Transmit)> {
        let end = self.now + Duration::from_secs(seconds);
        let mut all = Vec::new();
        loop {
            while let Some(t) = self.gateway.poll_transmit() {
                if answers && is_request(&t.payload) {
                    let source = SocketAddr::new(t.source.unwrap(), sock(GATEWAY).port());
                    let datagram = answer(&t.payload, source);
                    self.gateway
                        .handle_packet(self.now, source, t.destination, &datagram);
                }
                all.push((self.now, t));
            }
            while self.gateway.poll_event().is_some() {}
            let Some((at, _)) = self.gateway.poll_timeout().filter(|(at, _)| *at <= end) else {
                break;
            };
            self.now = self.now.max(at);
            self.gateway.handle_timeout(self.now);
        }
        self.now = end;
        all
    }

    fn path(&self) -> Option<Path> {
        self.gateway.describe(id()).and_then(|view| view.path)
    }

    fn details(&self) -> ConnectionDetails {
        let details = self.gateway.details(self.now, SystemTime::UNIX_EPOCH, id());
        details.unwrap()
    }
}

/// The message with a right FINGERPRINT in place of its last.
fn fingerprinted(mut message: Vec<u8>) -> Vec<u8> {
    let end = message.len() - 8;
    let crc = crc32(&message[..end]) ^ 0x5354_554e;
    message[end + 4..].copy_from_slice(&crc.to_be_bytes());
    message
}

#[test]
fn an_answer_from_elsewhere_or_to_another_address_proves_nothing() {
    let mut w = World::new();
    let check = w.check_sent();
    let datagram = answer(&check, sock(GATEWAY));
    for (local, remote) in [(GATEWAY, ELSEWHERE), (GATEWAY_2, CLIENT)] {
        assert_eq!(w.receive(local, remote, &datagram), Inbound::Unknown);
        assert_eq!(w.owner(local, remote), None);
        assert_eq!(w.owner(GATEWAY, CLIENT), None);
    }
    assert_eq!(w.receive(GATEWAY, CLIENT, &datagram), Inbound::Consumed);
    assert_eq!(w.owner(GATEWAY, CLIENT), Some(id()));
    w.receive(GATEWAY, ELSEWHERE, &datagram);
    assert_eq!(w.owner(GATEWAY, ELSEWHERE), None);
}

#[test]
fn an_answer_under_another_password_or_none_proves_nothing() {
    let mut w = World::new();
    let check = w.check_sent();
    let forged = answer_as(&check, sock(GATEWAY), &creds("gtwy").password);
    w.receive(GATEWAY, CLIENT, &forged);
    assert_eq!(w.owner(GATEWAY, CLIENT), None);
    let right = answer(&check, sock(GATEWAY));
    // MESSAGE-INTEGRITY left out: 12 bytes of XOR-MAPPED-ADDRESS, then FINGERPRINT.
    let mut unsigned = [&right[..32], &right[right.len() - 8..]].concat();
    unsigned[3] = 20;
    w.receive(GATEWAY, CLIENT, &fingerprinted(unsigned));
    assert_eq!(w.owner(GATEWAY, CLIENT), None);
    // MESSAGE-INTEGRITY-SHA256 in its place.
    let mut otherwise = right.clone();
    otherwise[33] = 0x1C;
    w.receive(GATEWAY, CLIENT, &fingerprinted(otherwise));
    assert_eq!(w.owner(GATEWAY, CLIENT), None);
    assert!(w.details().pairs.iter().all(|p| p.answered_at.is_none()));
    w.receive(GATEWAY, CLIENT, &right);
    assert_eq!(w.owner(GATEWAY, CLIENT), Some(id()));
}

#[test]
fn remote_candidates_that_mean_nothing_here_are_skipped() {
    let mut w = World::new();
    let good = w.details().remote_candidate_count;
    let line = |address: &str, port: u16| {
        format!("candidate:1 1 udp 2130706175 {address} {port} typ host")
    };
    let lines: Vec<String> = [
        ("127.0.0.1", 1),
        ("::1", 1),
        ("fe80::1", 1),
        ("fec0::1", 1),
        ("::ffff:192.0.2.9", 1),
        ("::192.0.2.9", 1),
        ("169.254.1.1", 1),
        ("0.0.0.0", 1),
        ("::", 1),
        ("224.0.0.1", 1),
        ("ff02::1", 1),
        ("192.0.2.9", 0),
    ]
    .into_iter()
    .map(|(address, port)| line(address, port))
    .collect();
    w.gateway.add_remote_candidates(w.now, id(), &lines);
    assert_eq!(w.details().remote_candidate_count, good);
    w.gateway
        .add_remote_candidates(w.now, id(), &[line("198.51.100.9", 1)]);
    assert_eq!(w.details().remote_candidate_count, good + 1);
}

#[test]
fn an_address_that_a_check_reveals_is_a_candidate_only_if_it_may_be() {
    let mut w = World::new();
    w.receive("192.0.2.3:52625", CLIENT, &check(false));
    w.receive("[fe80::3]:52625", "[fe80::9]:40000", &check(false));
    let ours = w.details().local_candidates;
    let is_ours = |address: &str| ours.iter().any(|c| c.address == sock(address));
    assert!(is_ours("192.0.2.3:52625"));
    assert!(!is_ours("[fe80::3]:52625"));
    assert!(w.sent(false).iter().all(|t| t.destination.is_ipv4()));
}

#[test]
fn the_checksum_is_that_of_the_rfc() {
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    // RFC 5769 §2.2.
    let response = "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220\
         002000080001a147e112a643000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96";
    let mut response = hex::decode(response).unwrap();
    assert!(has_fingerprint(&response));
    for at in 0..response.len() {
        response[at] ^= 1;
        assert!(!has_fingerprint(&response), "byte {at}");
        response[at] ^= 1;
    }
}

#[test]
fn without_a_right_fingerprint_it_is_no_check_and_no_answer() {
    let mut w = World::new();
    let request = w.check_sent();
    for good in [check(true), answer(&request, sock(GATEWAY))] {
        let mut wrong = good.clone();
        *wrong.last_mut().unwrap() ^= 1;
        let mut without = good[..good.len() - 8].to_vec();
        without[3] -= 8;
        for datagram in [wrong, without] {
            assert!(StunMessage::parse(&datagram).is_ok(), "else it is well");
            assert_eq!(w.receive(GATEWAY, CLIENT, &datagram), Inbound::Unknown);
        }
        assert_eq!(w.owner(GATEWAY, CLIENT), None);
        assert!(w.sent(false).is_empty());
        assert_eq!(w.receive(GATEWAY, CLIENT, &good), Inbound::Consumed);
        assert_eq!(w.sent(false).len(), usize::from(is_request(&good)));
    }
    assert_eq!(w.owner(GATEWAY, CLIENT), Some(id()));
}

#[test]
fn checks_carry_what_they_should_and_nothing_else() {
    let mut w = World::new();
    let first = w.check_sent();
    w.receive(GATEWAY, CLIENT, &check(true));
    let mut checks: Vec<Vec<u8>> = w
        .run(30, true)
        .into_iter()
        .filter(|(_, t)| is_request(&t.payload))
        .map(|(_, t)| t.payload)
        .collect();
    assert!(w.path().is_some(), "nominated and answered");
    assert!(checks.len() > 20, "{}", checks.len());
    checks.push(first);
    let mut ids = BTreeSet::new();
    for datagram in &checks {
        // USERNAME, ICE-CONTROLLED, PRIORITY, MESSAGE-INTEGRITY, FINGERPRINT: no USE-CANDIDATE.
        assert_eq!(
            attribute_types(datagram),
            [0x0006, 0x8029, 0x0024, 0x0008, 0x8028]
        );
        assert!(has_fingerprint(datagram));
        let message = StunMessage::parse(datagram).unwrap();
        assert_eq!(message.username(), Some("clnt:gtwy"));
        assert_eq!(message.prio().unwrap() >> 24, 110, "peer-reflexive");
        let again = signed(message, &creds("clnt").password);
        assert_eq!(*datagram, again, "signed with the client's password");
        ids.insert(transaction_id(datagram).unwrap());
    }
    assert_eq!(ids.len(), checks.len(), "each under an id of its own");
}

#[test]
fn a_check_is_answered_from_where_it_came_to_each_time_it_comes() {
    let mut w = World::new();
    w.sent(true);
    let request = check(false);
    let mut before = None;
    for _ in 0..3 {
        w.receive(GATEWAY_2, CLIENT, &request);
        let replies = w.sent(false);
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].source, Some(sock(GATEWAY_2).ip()));
        assert_eq!(replies[0].destination, sock(CLIENT));
        let reply = &replies[0].payload;
        // XOR-MAPPED-ADDRESS, MESSAGE-INTEGRITY, FINGERPRINT: no USERNAME.
        assert_eq!(attribute_types(reply), [0x0020, 0x0008, 0x8028]);
        assert!(has_fingerprint(reply));
        assert_eq!(transaction_id(reply), transaction_id(&request));
        let message = StunMessage::parse(reply).unwrap();
        assert!(message.is_successful_binding_response());
        assert_eq!(message.mapped_address(), Some(sock(CLIENT)));
        assert_eq!(*reply, signed(message, &creds("gtwy").password));
        let state = (w.details(), w.path());
        assert_eq!(*before.get_or_insert_with(|| state.clone()), state);
    }
}

#[test]
fn checks_under_other_credentials_are_not_answered() {
    let mut w = World::new();
    w.sent(true);
    let ours = creds("gtwy").password;
    let mut unsigned = check(true);
    let integrity = unsigned.len() - 8 - 24;
    unsigned.drain(integrity..integrity + 24);
    unsigned[3] -= 24;
    let mut indication = check(true);
    indication[1] |= 0x10;
    for datagram in [
        check_as("gtwy:clnt", "some-other-password", true),
        check_as("gtwy:clnt", &creds("clnt").password, true),
        check_as("gtwx:clnt", &ours, true),
        check_as("gtwy:clnx", &ours, true),
        fingerprinted(unsigned),
        fingerprinted(indication),
    ] {
        assert!(has_fingerprint(&datagram));
        w.receive(GATEWAY, ELSEWHERE, &datagram);
        assert!(w.sent(false).is_empty());
    }
    let details = w.details();
    assert!(
        details
            .remote_candidates
            .iter()
            .all(|c| c.address != sock(ELSEWHERE))
    );
    assert!(details.pairs.iter().all(|p| !p.nominated));
    w.receive(GATEWAY, ELSEWHERE, &check(true));
    assert_eq!(w.sent(false).len(), 1, "the right ones are");
}

#[test]
fn old_stun_is_not_spoken() {
    let mut w = World::new();
    w.sent(true);
    // Without the magic cookie (RFC 3489).
    let mut datagram = check(false);
    datagram[4..8].fill(0);
    let datagram = fingerprinted(datagram);
    assert_ne!(w.receive(GATEWAY, CLIENT, &datagram), Inbound::Consumed);
    assert!(w.sent(false).is_empty());
}

#[test]
fn a_nominated_pair_on_which_our_checks_fail_is_not_used() {
    let mut w = World::new();
    for _ in 0..8 {
        w.receive(GATEWAY, CLIENT, &check(true));
        w.run(1, false);
        assert_eq!(w.path(), None);
    }
    w.receive(GATEWAY, CLIENT, &check(true));
    w.run(2, true);
    assert_eq!(w.path().unwrap().destination, sock(CLIENT));
}

#[test]
fn a_487_makes_us_take_the_other_role() {
    let mut w = World::new();
    let request = w.check_sent();
    let message = StunMessage::parse(&request).unwrap();
    let refusal = StunMessage::binding_role_conflict_reply(message.trans_id());
    w.receive(GATEWAY, CLIENT, &signed(refusal, &creds("clnt").password));
    let checks = w.run(1, false);
    assert!(!checks.is_empty());
    for (_, t) in checks {
        let types = attribute_types(&t.payload);
        assert!(
            types.contains(&0x802a) && !types.contains(&0x8029),
            "ICE-CONTROLLING"
        );
    }
}

#[test]
fn a_role_conflict_that_we_win_is_answered_487() {
    let mut w = World::new();
    w.sent(true);
    let request = StunMessage::binding_request("gtwy:clnt", TransId::new(), false, 0, 1, false);
    let request = signed(request, &creds("gtwy").password);
    w.receive(GATEWAY, CLIENT, &request);
    let replies = w.sent(false);
    assert_eq!(replies.len(), 1);
    let reply = &replies[0].payload;
    // ERROR-CODE, MESSAGE-INTEGRITY, FINGERPRINT.
    assert_eq!(attribute_types(reply), [0x0009, 0x0008, 0x8028]);
    let message = StunMessage::parse(reply).unwrap();
    assert!(message.is_failed_binding_response());
    let (code, phrase) = message.error_code().unwrap();
    assert_eq!(code, 487);
    assert!(phrase.chars().count() < 128);
    assert_eq!(*reply, signed(message, &creds("gtwy").password));
}

#[test]
fn the_mapped_address_of_an_answer_may_be_new() {
    let mut w = World::new();
    let request = w.check_sent();
    w.receive(GATEWAY, CLIENT, &answer(&request, sock(ELSEWHERE)));
    let ours = w.details().local_candidates;
    let found = ours.iter().find(|c| c.address == sock(ELSEWHERE)).unwrap();
    assert_eq!(found.kind, Kind::PeerReflexive);
}

#[test]
fn at_most_a_hundred_pairs_are_checked() {
    let mut w = World::new();
    let lines: Vec<String> = (0..250u16)
        .map(|n| {
            let address = SocketAddr::from(([198, 51, 100, 7], 1000 + n));
            Candidate::host(address, "udp").unwrap().to_sdp_string()
        })
        .collect();
    w.gateway.add_remote_candidates(w.now, id(), &lines);
    w.sent(true);
    let pairs: BTreeSet<_> = w
        .run(10, false)
        .into_iter()
        .map(|(_, t)| (t.source, t.destination))
        .collect();
    assert_eq!(pairs.len(), 100);
}

#[test]
fn candidates_are_offered_by_falling_unique_priorities() {
    let mut w = World::new();
    w.gateway.add_host(w.now, sock("[2001:db8::1]:52625"));
    while w.gateway.poll_event().is_some() {}
    let now = w.now;
    w.gateway.with_connection(w.now, id(), |c| {
        c.add_server_reflexive(sock("203.0.113.1:52625"), sock(GATEWAY));
        c.add_server_reflexive(sock("203.0.113.2:52625"), sock(GATEWAY_2));
        for n in 1..=2u8 {
            let relay = crate::ids::RelayId(Uuid::from_u128(n.into()));
            let relayed = [
                SocketAddr::from(([198, 51, 100, n], 50_000)),
                sock(&format!("[2001:db8:5::{n}]:50000")),
            ];
            c.set_relay(now, relay, &relayed.map(|address| (address, sock(GATEWAY))));
        }
        // An address that is ours already.
        c.set_relay(
            now,
            crate::ids::RelayId(Uuid::from_u128(3)),
            &[(sock(GATEWAY), sock(GATEWAY))],
        );
        c.signal_all();
    });
    let offered: Vec<String> = std::iter::from_fn(|| w.gateway.poll_event())
        .filter_map(|event| match event {
            Event::CandidatesAdded { candidates, .. } => Some(candidates),
            _ => None,
        })
        .next()
        .unwrap();
    assert_eq!(offered.len(), 3 + 2 + 4, "{offered:?}");
    let mut types: Vec<(u32, &str)> = Vec::new();
    let mut last = u32::MAX;
    for line in &offered {
        let fields: Vec<&str> = line.split(' ').collect();
        assert_eq!(fields[1], "1", "component");
        let priority: u32 = fields[3].parse().unwrap();
        assert!((1..1 << 31).contains(&priority));
        assert!(priority < last, "{offered:?}");
        last = priority;
        assert_eq!(priority & 0xff, 255, "256 - component");
        let of_type = (priority >> 24, fields[7]);
        if !types.contains(&of_type) {
            types.push(of_type);
        }
    }
    assert_eq!(types, [(126, "host"), (100, "srflx"), (2, "relay")]);
}

#[test]
fn a_reflexive_address_is_checked_from_its_base_only() {
    let mut w = World::new();
    w.gateway.with_connection(w.now, id(), |c| {
        c.add_server_reflexive(sock("203.0.113.1:52625"), sock(GATEWAY));
    });
    let sources: Vec<_> = w
        .run(0, false)
        .into_iter()
        .map(|(_, t)| t.source.unwrap())
        .collect();
    assert_eq!(sources.len(), 2, "one for each base");
    assert!(sources.contains(&sock(GATEWAY).ip()) && sources.contains(&sock(GATEWAY_2).ip()));
}

#[test]
fn an_idle_pair_is_checked_every_25_seconds_and_a_removed_one_no_more() {
    let mut w = World::new();
    w.receive(GATEWAY, CLIENT, &check(true));
    w.run(60, true);
    let path = w.path().unwrap();
    let began = w.now;
    let checks: Vec<Duration> = w
        .run(600, true)
        .into_iter()
        .filter(|(_, t)| t.source == path.source && t.destination == path.destination)
        .map(|(at, _)| at - began)
        .collect();
    assert!((24..=25).contains(&checks.len()), "{checks:?}");
    for pair in checks.windows(2) {
        assert_eq!(pair[1] - pair[0], Duration::from_secs(25));
    }
    assert_eq!(w.path(), Some(path));
    w.gateway.remove(id());
    assert_eq!(w.run(600, true), []);
}
