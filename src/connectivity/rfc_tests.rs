//! What RFC 8445 demands of a controlled agent, datagram by datagram; see docs/rfc.md.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use is::Candidate;
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
