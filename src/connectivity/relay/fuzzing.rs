//! Entry points of the fuzz targets around relays; see [`crate::connectivity::fuzzing`].

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use is::{DefaultSha1HmacProvider, Sha1HmacProvider};
use secrecy::SecretString;
use stun_codec::TransactionId;
use stun_codec::rfc5389::attributes::{Nonce, Realm};
use uuid::Uuid;

use super::channel_data::{self, CHANNEL_NUMBERS, HEADER_LEN};
use super::constants::{CHANNEL_REUSE, MAX_QUEUED_PEERS};
use super::double::{
    ALLOCATE, BINDING, CHANNEL_BIND, PASSWORD, REFRESH, Style, TurnServer, USER, attribute,
};
use super::stun::{self, Challenge, Credentials, Families, Incoming, Integrity, Request};
use super::{CandidateKind, Handled, RelaySet, RelaySetEvent};
use crate::fuzzing::Script;
use crate::ids::RelayId;
use crate::portal::messages::{RelayEntry, RelaysPresence};

const REALM: &str = "firezone";
/// MD5 of [`USER`]`:`[`REALM`]`:`[`PASSWORD`] (RFC 8489 §9.2.2).
const KEY: [u8; 16] = [
    0xc9, 0x9f, 0x32, 0x06, 0x29, 0xaa, 0x4d, 0x33, 0x96, 0x85, 0xdb, 0xdc, 0xa6, 0x4a, 0xcb, 0x74,
];
const MESSAGE_INTEGRITY: u16 = 0x0008;

fn realm() -> Realm {
    Realm::new(REALM.to_owned()).unwrap()
}

fn credentials() -> Credentials {
    Credentials::new(USER, &SecretString::from(PASSWORD)).unwrap()
}

/// Where MESSAGE-INTEGRITY begins. Knows nothing of what the decoder under test does.
fn signature_at(datagram: &[u8]) -> Option<usize> {
    let mut at = 20;
    while let Some(&[t0, t1, l0, l1]) = datagram.get(at..at + 4) {
        if u16::from_be_bytes([t0, t1]) == MESSAGE_INTEGRITY {
            return Some(at);
        }
        at += 4 + usize::from(u16::from_be_bytes([l0, l1])).next_multiple_of(4);
    }
    None
}

/// HMAC-SHA1 over what precedes a MESSAGE-INTEGRITY at `end` (RFC 8489 §14.5).
fn hmac(key: &[u8], datagram: &[u8], end: usize) -> [u8; 20] {
    let length = u16::try_from(end + 24 - 20).unwrap().to_be_bytes();
    let parts = [&datagram[..2], &length, &datagram[4..end]];
    DefaultSha1HmacProvider.sha1_hmac(key, &parts)
}

fn independent_verdict(datagram: &[u8]) -> Integrity {
    let Some(at) = signature_at(datagram) else {
        return Integrity::Absent;
    };
    if datagram[at + 4..].starts_with(&hmac(&KEY, datagram, at)) {
        Integrity::Valid
    } else {
        Integrity::Invalid
    }
}

fn set_length(datagram: &mut [u8]) {
    let length = u16::try_from(datagram.len() - 20).unwrap();
    datagram[2..4].copy_from_slice(&length.to_be_bytes());
}

fn push_attribute(datagram: &mut Vec<u8>, kind: u16, value: &[u8]) {
    datagram.extend_from_slice(&kind.to_be_bytes());
    datagram.extend_from_slice(&u16::try_from(value.len()).unwrap().to_be_bytes());
    datagram.extend_from_slice(value);
    datagram.resize(datagram.len().next_multiple_of(4), 0);
    set_length(datagram);
}

fn sign(datagram: &mut Vec<u8>, key: &[u8]) {
    let mac = hmac(key, datagram, datagram.len());
    push_attribute(datagram, MESSAGE_INTEGRITY, &mac);
}

/// Everything that the allocation reads from a message.
fn said(message: &Incoming) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        message.id(),
        message.is_success(),
        message.verdict(),
        message.realm().map(|r| r.text().to_owned()),
        message.nonce().map(|n| n.value().to_owned()),
        message.lifetime(),
        message.mapped(),
        message.relayed(),
    )
}

/// Bytes as a STUN message, as the attributes of a signed one, and as parameters of our requests.
pub fn stun(data: &[u8]) {
    check_message(data);

    let body = &data[..(data.len() & !3).min(4096)];
    let mut signed = vec![0; 20];
    signed[..2].copy_from_slice(&data.get(..2).unwrap_or(&[1, 3])[..2]);
    signed[0] &= 0x3F;
    signed[4..8].copy_from_slice(&[0x21, 0x12, 0xA4, 0x42]);
    signed[8..20].copy_from_slice(&[0x5A; 12]);
    signed.extend_from_slice(body);
    sign(&mut signed, &KEY);
    check_message(&signed);
    let spot = body.iter().fold(body.len(), |hash, byte| {
        hash.wrapping_mul(31) ^ usize::from(*byte)
    });
    let mut forged = signed.clone();
    forged[spot % signed.len()] ^= 1 << (spot % 8);
    check_message(&forged);

    check_requests(&mut Script::new(data));
}

fn check_message(datagram: &[u8]) {
    let is_stun = stun::is_stun(datagram);
    let Some(message) = Incoming::decode(datagram) else {
        return;
    };
    assert!(is_stun || datagram[0] > 3);
    let length = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
    assert_eq!(length + 20, datagram.len());
    assert_eq!(&message.id().as_bytes()[..], &datagram[8..20]);
    let class = (datagram[0] & 1) << 1 | (datagram[1] >> 4 & 1);
    assert_eq!(message.is_success(), class == 2);
    let method = u16::from(datagram[0] & 0x3E) << 2
        | u16::from(datagram[1] & 0xE0) >> 1
        | u16::from(datagram[1] & 0x0F);
    for (number, request) in [
        (BINDING, Request::Binding),
        (ALLOCATE, Request::Allocate(Families::Both)),
        (REFRESH, Request::Refresh { lifetime: None }),
    ] {
        assert_eq!(message.answers(request), class >= 2 && method == number);
    }
    for relayed in message.relayed() {
        let family = |a: &&SocketAddr| a.is_ipv4() == relayed.is_ipv4();
        assert_eq!(message.relayed().iter().filter(family).count(), 1);
    }

    let again = message.encode();
    let decoded = Incoming::decode(&again).expect("what was decoded, encoded");
    assert_eq!(said(&decoded), said(&message));

    // The codec signs what it understood. Bits that it passes over, as it must, change no meaning.
    let verdict = message.integrity(&credentials(), &realm());
    if again == datagram {
        assert_eq!(verdict, independent_verdict(datagram));
    } else {
        assert_eq!(
            verdict == Integrity::Absent,
            signature_at(datagram).is_none()
        );
        assert_eq!(verdict, independent_verdict(&again));
    }

    // What follows the signature says nothing.
    if let Some(at) = signature_at(datagram) {
        let mut covered = datagram[..at].to_vec();
        set_length(&mut covered);
        let covered = Incoming::decode(&covered).expect("its beginning is well-formed");
        assert_eq!(said(&covered), said(&message));
    }
}

fn check_requests(script: &mut Script<'_>) {
    let port = script.u16();
    let peer = match script.bit() {
        true => SocketAddr::from(([0x2001, 0xdb8, port, 0, 0, 0, 0, 1], port)),
        false => SocketAddr::from(([192, 0, 2, script.byte()], port)),
    };
    let channel = CHANNEL_NUMBERS.start() + script.u16() % CHANNEL_NUMBERS.len() as u16;
    let lifetime = script
        .bit()
        .then(|| u32::from(script.u16()) << (script.byte() % 17));
    let id = TransactionId::new([script.byte(); 12]);
    let challenge = Nonce::new(script.text().to_owned())
        .ok()
        .map(|nonce| Challenge {
            realm: realm(),
            nonce,
        });
    let credentials = credentials();
    for request in [
        Request::Binding,
        Request::Allocate(Families::Both),
        Request::Allocate(Families::Default),
        Request::Allocate(Families::V6),
        Request::Refresh { lifetime },
        Request::ChannelBind { channel, peer },
    ] {
        let auth = challenge.as_ref().map(|c| (&credentials, c));
        let datagram = stun::encode(request, id, auth);
        let message = Incoming::decode(&datagram).expect("ours");
        check_message(&datagram);
        assert!(!message.answers(request) && !message.is_success());
        assert_eq!(message.id(), id);
        assert_eq!(message.nonce(), challenge.as_ref().map(|c| &c.nonce));
        let expected = challenge
            .as_ref()
            .map_or(Integrity::Absent, |_| Integrity::Valid);
        assert_eq!(independent_verdict(&datagram), expected);
        match request {
            Request::Refresh { lifetime } => {
                let seconds = lifetime.map(|s| Duration::from_secs(s.into()));
                assert_eq!(message.lifetime(), seconds);
            }
            Request::ChannelBind { channel, peer } => {
                let number = attribute(&datagram, 0x000C).expect("CHANNEL-NUMBER");
                assert_eq!(number, [&channel.to_be_bytes()[..], &[0, 0]].concat());
                assert_eq!(peer_of(&datagram), Some(peer));
            }
            _ => {}
        }
    }
}

/// XOR-PEER-ADDRESS (RFC 8489 §14.2).
fn peer_of(datagram: &[u8]) -> Option<SocketAddr> {
    let value = attribute(datagram, 0x0012)?;
    let plain: Vec<u8> = value[4..]
        .iter()
        .zip(&datagram[4..20])
        .map(|(a, b)| a ^ b)
        .collect();
    let port = u16::from_be_bytes([value[2], value[3]]) ^ 0x2112;
    match <[u8; 4]>::try_from(&plain[..]) {
        Ok(v4) => Some(SocketAddr::from((v4, port))),
        Err(_) => Some(SocketAddr::from((
            <[u8; 16]>::try_from(&plain[..]).ok()?,
            port,
        ))),
    }
}

/// Bytes as channel data, and as the payload of some.
pub fn channel_data(data: &[u8]) {
    let long_enough = data.len() >= HEADER_LEN;
    let length = long_enough.then(|| usize::from(u16::from_be_bytes([data[2], data[3]])));
    let fits = length.is_some_and(|len| (len..=len + 3).contains(&(data.len() - HEADER_LEN)));
    let parsed = channel_data::parse(data);
    assert_eq!(parsed.is_some(), fits && matches!(data[0], 0x40..=0x4F));
    if let Some((channel, payload)) = parsed {
        assert!(channel_data::is_channel_data(data));
        assert_eq!(channel.to_be_bytes(), data[..2]);
        assert_eq!(payload, &data[HEADER_LEN..HEADER_LEN + length.unwrap()]);
    }

    let Some((number, payload)) = data.split_first_chunk::<2>() else {
        return;
    };
    let channel = 0x4000 | u16::from_be_bytes(*number) & 0x0FFF;
    let mut wrapped = crate::connectivity::wrap(channel, payload).expect("fits a datagram");
    assert!(channel_data::is_channel_data(&wrapped));
    let whole = wrapped.len();
    assert_eq!(channel_data::parse(&wrapped[..whole - 1]), None);
    for padding in 0..8 {
        let expected = (padding <= 3).then_some((channel, payload));
        assert_eq!(channel_data::parse(&wrapped), expected);
        wrapped.push(data[0]);
    }
}

/// Requests that are in flight at a relay at most: one for each peer, and some for the allocation.
const MAX_IN_FLIGHT: usize = PEERS as usize + 8;
const PEERS: u16 = 12;
/// Datagrams that are kept to be delivered later.
const MAX_POOL: usize = 64;

fn peer(n: usize) -> SocketAddr {
    let n = u16::try_from(n).unwrap() % PEERS;
    match n % 4 {
        3 => SocketAddr::from(([0x2001, 0xdb8, 9, 0, 0, 0, 0, n], 40000)),
        _ => SocketAddr::from(([203, 0, 113, 9], 40000 + n)),
    }
}

fn local_for(remote: SocketAddr) -> SocketAddr {
    match remote {
        SocketAddr::V4(_) => "10.0.0.2:52625".parse().unwrap(),
        SocketAddr::V6(_) => "[2001:db8:1::2]:52625".parse().unwrap(),
    }
}

fn server_sockets(server: usize) -> [SocketAddr; 2] {
    let n = u8::try_from(server).unwrap() + 1;
    [
        SocketAddr::from(([192, 0, 2, n], 3478)),
        SocketAddr::from(([0x2001, 0xdb8, 0xff, 0, 0, 0, 0, n.into()], 3478)),
    ]
}

fn relay_id(n: usize) -> RelayId {
    RelayId(Uuid::from_u128(n as u128 + 1))
}

/// A script of what relays answer, what the portal says about them, and how time passes.
pub fn turn_client(data: &[u8]) {
    let mut script = Script::new(data);
    let seed = script.byte();
    let mut world = World::new(seed.into());
    while !script.is_empty() {
        world.step(&mut script);
        world.settle();
    }
    // These take longer than most scripts.
    if seed & 1 == 0 {
        world.silence();
    }
    if seed & 2 == 0 {
        world.recovery();
    }
    world.farewell();
}

/// A request that was sent more than once, perhaps.
struct Copies {
    first: Instant,
    count: usize,
    bytes: Vec<u8>,
}

struct World {
    set: RelaySet,
    start: Instant,
    now: Instant,
    servers: Vec<TurnServer>,
    /// What the portal said last about each relay.
    entries: HashMap<RelayId, RelayEntry>,
    pending: VecDeque<(SocketAddr, Vec<u8>)>,
    answers: VecDeque<(SocketAddr, Vec<u8>)>,
    copies: HashMap<(SocketAddr, Vec<u8>), Copies>,
    /// Who was last given a number at a socket, and when.
    bound: HashMap<(SocketAddr, u16), (SocketAddr, Instant)>,
    /// Relayed candidates that were told and not taken back.
    offered: HashSet<(RelayId, SocketAddr)>,
    /// Sockets that were ever named.
    sockets: HashSet<SocketAddr>,
    /// How many datagrams what happened justifies.
    allowed: usize,
    sent: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let server = |n: usize| {
            let sockets = server_sockets(n).map(|s| s.to_string());
            let ips = server_sockets(n).map(|s| s.ip().to_string());
            TurnServer::new(
                Style::Coturn,
                &sockets.each_ref().map(|s| &**s),
                &ips.each_ref().map(|s| &**s),
            )
        };
        Self {
            set: RelaySet::new(seed),
            start: now,
            now,
            servers: (0..3).map(server).collect(),
            entries: HashMap::new(),
            pending: VecDeque::new(),
            answers: VecDeque::new(),
            copies: HashMap::new(),
            bound: HashMap::new(),
            offered: HashSet::new(),
            sockets: HashSet::new(),
            allowed: 0,
            sent: 0,
        }
    }

    fn entry(&mut self, script: &mut Script<'_>) -> RelayEntry {
        let id = relay_id(script.below(4));
        let what = script.byte();
        let [v4, v6] = server_sockets(usize::from(what) % 3);
        let entry = RelayEntry {
            id,
            v4: (what & 0x10 == 0).then_some(v4),
            v6: (what & 0x20 != 0).then_some(v6),
            username: match what >> 6 {
                3 => "x".repeat(600),
                _ => USER.to_owned(),
            },
            password: SecretString::from(if what >> 6 == 2 { "wrong" } else { PASSWORD }),
            expires_at: 2_145_916_800,
        };
        self.sockets.extend(entry.v4.into_iter().chain(entry.v6));
        entry
    }

    /// What counts after the portal said this: a relay may come as two entries, and a socket belongs
    /// to the relay that was named last.
    fn remember(&mut self, entries: &[RelayEntry]) {
        let mut merged: Vec<RelayEntry> = Vec::new();
        for entry in entries {
            match merged.iter_mut().find(|known| known.id == entry.id) {
                Some(known) => {
                    let (v4, v6) = (known.v4, known.v6);
                    *known = entry.clone();
                    known.v4 = known.v4.or(v4);
                    known.v6 = known.v6.or(v6);
                }
                None => merged.push(entry.clone()),
            }
        }
        for entry in merged {
            let named = [entry.v4, entry.v6];
            let taken = |socket: Option<SocketAddr>| socket.is_some() && named.contains(&socket);
            self.entries
                .retain(|_, other| !taken(other.v4) && !taken(other.v6));
            self.entries.insert(entry.id, entry);
        }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() % 20 {
            0 | 1 => {
                if let Some((at, _)) = self.set.poll_timeout() {
                    self.pass(at.saturating_duration_since(self.now));
                }
            }
            2 => self.pass(Duration::from_millis(u64::from(script.byte()) * 20)),
            3 => self.pass(Duration::from_secs(u64::from(script.byte()) * 8)),
            4 | 5 => {
                if let Some((to, request)) = self.pending.pop_front() {
                    self.exchange(to, &request);
                }
            }
            6 | 7 => self.exchange_all(),
            8 => drop(self.pending.pop_front()),
            9 => {
                if let Some((to, request)) = self.pending.pop_front()
                    && let Some(mut answer) = self.ask(to, &request)
                {
                    for _ in 0..=script.below(3) {
                        let at = usize::from(script.byte()) % answer.len();
                        answer[at] ^= script.byte();
                    }
                    if script.bit() {
                        answer.truncate(usize::from(script.byte()));
                    }
                    self.deliver(to, &answer);
                }
            }
            10 | 11 => {
                if let Some((to, request)) = self.pending.pop_front() {
                    let answer = forge(script, &request);
                    self.deliver(to, &answer);
                }
            }
            12 => {
                if !self.answers.is_empty() {
                    let at = script.below(self.answers.len());
                    let (from, answer) = self.answers[at].clone();
                    let from = match script.below(4) {
                        0 => server_sockets(script.below(3))[script.below(2)],
                        _ => from,
                    };
                    self.deliver(from, &answer);
                }
            }
            13 | 14 => {
                let peer = peer(script.below(PEERS.into()));
                self.allowed += 1;
                let relay = relay_id(script.below(4));
                self.set.bind_channel(self.now, relay, peer);
            }
            15 => {
                let from = server_sockets(script.below(3))[0];
                let number = match script.bit() {
                    true => script.u16(),
                    false => CHANNEL_NUMBERS.start() + u16::from(script.byte() % 16),
                };
                let mut datagram = number.to_be_bytes().to_vec();
                let payload = script.bytes();
                datagram.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
                datagram.extend_from_slice(payload);
                self.deliver(from, &datagram);
            }
            16 => {
                let entries: Vec<_> = (0..script.below(4)).map(|_| self.entry(script)).collect();
                let gone: Vec<_> = (0..script.below(3))
                    .map(|_| relay_id(script.below(4)))
                    .collect();
                self.allowed += 12 * 8;
                for id in &gone {
                    self.entries.remove(id);
                }
                self.remember(&entries);
                if gone.is_empty() {
                    self.set.upsert(self.now, &entries);
                } else {
                    let presence = RelaysPresence {
                        disconnected_ids: gone,
                        connected: entries,
                    };
                    self.set.presence(self.now, &presence);
                }
            }
            17 => self.turn_a_knob(script),
            18 => {
                let (relay, peer) = (relay_id(script.below(4)), peer(script.below(12)));
                self.allowed += 2;
                match script.below(3) {
                    0 => self.set.poke(self.now, relay),
                    1 => self.set.note_sent(self.now, relay, peer),
                    _ => {
                        let chosen = self.set.choose_other_than(&[relay]);
                        assert_ne!(chosen, Some(relay));
                    }
                }
            }
            _ => {
                if script.byte() == 77 {
                    self.allowed += 8;
                    self.entries.clear();
                    self.set.release_all(self.now);
                }
            }
        }
    }

    fn turn_a_knob(&mut self, script: &mut Script<'_>) {
        let which = script.below(3);
        let server = &mut self.servers[which];
        match script.byte() % 14 {
            0 => server.silent ^= true,
            1 => server.always_stale ^= true,
            2 => server.restart(),
            3 => server.expire_nonces(),
            4 => server.signs_errors ^= true,
            5 => server.signs_success ^= true,
            6 => server.open ^= true,
            7 => server.style = script.one_of(&[Style::Coturn, Style::Stock]),
            8 => server.lifetime = u64::from(script.byte()) * 15,
            9 => {
                let code = script.one_of(&[400, 420, 437, 440, 441, 442, 443, 486, 508, 300]);
                server.refuses_additional = (code != 300).then_some(code);
            }
            10 => server.forged_key = script.bit().then(|| "forged".to_owned()),
            11 => {
                let local = local_for(server.sockets[script.below(2)]);
                server.leave_behind(self.now, local, script.one_of(&[USER, "somebody"]));
            }
            _ => {
                let method = script.one_of(&[BINDING, ALLOCATE, REFRESH, CHANNEL_BIND]);
                let code = script.one_of(&[
                    300, 400, 401, 403, 420, 437, 438, 440, 441, 442, 443, 486, 500, 508, 599,
                ]);
                server.errors.push_back((method, code));
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.set.handle_timeout(self.now);
        let next = self.set.poll_timeout().map(|(at, _)| at);
        assert!(next.is_none_or(|at| at > self.now), "due at once again");
    }

    fn ask(&mut self, to: SocketAddr, request: &[u8]) -> Option<Vec<u8>> {
        let server = self.servers.iter_mut().find(|s| s.sockets.contains(&to))?;
        let answer = server.handle(self.now, local_for(to), to, request)?;
        if self.answers.len() == MAX_POOL {
            self.answers.pop_front();
        }
        self.answers.push_back((to, answer.clone()));
        Some(answer)
    }

    fn exchange(&mut self, to: SocketAddr, request: &[u8]) {
        if let Some(answer) = self.ask(to, request) {
            self.deliver(to, &answer);
        }
    }

    fn exchange_all(&mut self) {
        for _ in 0..200 {
            let Some((to, request)) = self.pending.pop_front() else {
                return;
            };
            self.exchange(to, &request);
            self.settle();
        }
    }

    fn deliver(&mut self, from: SocketAddr, datagram: &[u8]) {
        // An answer may end an attempt, and begin one with all that waits for it.
        self.allowed += usize::from(PEERS) + 4;
        let local = local_for(from);
        let owned = self.set.owns(from);
        match self.set.handle_packet(self.now, local, from, datagram) {
            Handled::Inner {
                relay,
                peer,
                relayed,
                payload,
            } => {
                assert!(owned);
                assert_eq!(payload.start, HEADER_LEN);
                let length = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
                assert_eq!(payload.len(), length);
                assert!(payload.end <= datagram.len());
                assert_eq!(peer.is_ipv4(), relayed.is_ipv4());
                assert!(self.set.relay_of(relayed).is_some());
                let channel = u16::from_be_bytes([datagram[0], datagram[1]]);
                let known = self.bound.iter().any(|((socket, number), (who, _))| {
                    *number == channel && *who == peer && self.set.addresses().contains(socket)
                });
                assert!(known, "{peer} was never bound to {channel:#x} at {relay}");
            }
            Handled::Consumed => assert!(owned || self.set.recently_removed(from)),
            Handled::NotRelay => {}
        }
    }

    fn settle(&mut self) {
        while let Some(transmit) = self.set.poll_transmit() {
            self.sent += 1;
            let (dst, bytes) = (transmit.dst, transmit.payload);
            assert!(self.sockets.contains(&dst), "{dst} is no relay");
            assert!(Incoming::decode(&bytes).is_some());
            self.note_copy(dst, &bytes);
            if self.pending.len() == MAX_POOL {
                self.pending.pop_front();
            }
            self.pending.push_back((dst, bytes));
        }
        while let Some(event) = self.set.poll_event() {
            match event {
                RelaySetEvent::CandidateAdded(gathered) => {
                    if gathered.kind == CandidateKind::Relayed {
                        self.offered.insert((gathered.relay, gathered.addr));
                    }
                }
                RelaySetEvent::RelayedInvalidated { relay, addrs } => {
                    for addr in addrs {
                        self.offered.remove(&(relay, addr));
                    }
                }
                RelaySetEvent::EpisodeEnded(episode) => {
                    assert!(self.start <= episode.since && episode.since <= episode.until);
                    assert!(episode.until <= self.now);
                }
                RelaySetEvent::RelayUsable(_)
                | RelaySetEvent::Allocated(_)
                | RelaySetEvent::RelayLost { .. }
                | RelaySetEvent::LastRelayLost => {}
            }
        }
        // Each request in flight is sent four times in eight seconds at most.
        let in_flight = 4 * MAX_IN_FLIGHT;
        let seconds = usize::try_from((self.now - self.start).as_secs()).unwrap();
        let allowed = self.allowed + 2 * in_flight + seconds * in_flight / 2;
        assert!(
            self.sent <= allowed,
            "{} datagrams where {allowed} were in order",
            self.sent
        );
        for (relay, addr) in &self.offered {
            let mut allocations = self.set.allocations();
            assert!(
                allocations.any(|a| a.id() == *relay && a.relayed().any(|r| r == *addr)),
                "{addr} is offered, but gone"
            );
        }
        for allocation in self.set.allocations() {
            let (requests, queued) = allocation.load();
            assert!(requests <= MAX_IN_FLIGHT, "{requests} requests in flight");
            assert!(queued <= MAX_QUEUED_PEERS.min(PEERS.into()));
        }
        self.check_channels();
        let _ = self.set.statuses(self.now, 1_800_000_000.0);
    }

    fn check_channels(&self) {
        for n in 0..4 {
            let mut used = HashSet::new();
            for peer in (0..PEERS.into()).map(peer) {
                if let Some(path) = self.set.channel_to(self.now, relay_id(n), peer) {
                    assert!(CHANNEL_NUMBERS.contains(&path.channel));
                    assert!(self.set.owns(path.relay));
                    assert!(used.insert(path.channel), "two peers on one channel");
                }
            }
        }
    }

    fn note_copy(&mut self, dst: SocketAddr, bytes: &[u8]) {
        let now = self.now;
        self.copies
            .retain(|_, copies| now.duration_since(copies.first) < Duration::from_secs(60));
        let id = bytes[8..20].to_vec();
        match self.copies.get_mut(&(dst, id.clone())) {
            Some(copies) => {
                copies.count += 1;
                assert!(copies.count <= 4, "{} copies", copies.count);
                assert_eq!(copies.bytes, bytes);
                assert!(now - copies.first <= Duration::from_millis(8125));
                return;
            }
            None => {
                let copies = Copies {
                    first: now,
                    count: 1,
                    bytes: bytes.to_vec(),
                };
                self.copies.insert((dst, id), copies);
            }
        }
        if bytes[..2] == ALLOCATE.to_be_bytes() {
            // Another allocation knows nothing of the channels of the last one.
            self.bound.retain(|(socket, _), _| *socket != dst);
        }
        let Some(number) = attribute(bytes, 0x000C) else {
            return;
        };
        let number = u16::from_be_bytes([number[0], number[1]]);
        assert!(CHANNEL_NUMBERS.contains(&number));
        let peer = peer_of(bytes).expect("with its peer");
        let before = self.bound.insert((dst, number), (peer, now));
        if let Some((other, at)) = before {
            // There are far more numbers than this gives away, so none is ever due for re-use.
            assert!(
                other == peer || now - at >= CHANNEL_REUSE,
                "{number:#x} was {other}'s, now it is {peer}'s"
            );
        }
    }

    /// An hour without any answer.
    fn silence(&mut self) {
        let end = self.now + Duration::from_secs(3600);
        let (mut wake_ups, sent) = (0, self.sent);
        while let Some((at, _)) = self.set.poll_timeout().filter(|(at, _)| *at <= end) {
            self.pass(at.saturating_duration_since(self.now));
            self.settle();
            wake_ups += 1;
            assert!(wake_ups < 10_000, "spins");
        }
        let sent = self.sent - sent;
        assert!(sent < 4 * 1500, "{sent} datagrams in an hour of silence");
        self.pending.clear();
        self.now = end;
    }

    /// Servers that do what they should, for longer than the longest pause between attempts.
    fn recovery(&mut self) {
        for server in &mut self.servers {
            server.restart();
            server.style = Style::Coturn;
            server.silent = false;
            server.always_stale = false;
            server.refuses_additional = None;
            server.errors.clear();
            server.signs_errors = true;
            server.signs_success = true;
            server.forged_key = None;
            server.open = false;
            server.lifetime = 600;
        }
        let end = self.now + Duration::from_secs(700);
        let mut wake_ups = 0;
        loop {
            self.exchange_all();
            let Some((at, _)) = self.set.poll_timeout().filter(|(at, _)| *at <= end) else {
                break;
            };
            self.pass(at.saturating_duration_since(self.now));
            self.settle();
            wake_ups += 1;
            assert!(wake_ups < 10_000, "spins");
        }
        self.now = end;
        for entry in self.entries.values() {
            let good = entry.username == USER
                && secrecy::ExposeSecret::expose_secret(&entry.password) == PASSWORD;
            let reachable = entry.v4.or(entry.v6).is_some();
            assert_eq!(self.set.is_usable(entry.id), good && reachable, "{entry:?}");
        }
    }

    fn farewell(&mut self) {
        self.allowed += 8;
        self.set.release_all(self.now);
        self.settle();
        for _ in 0..20 {
            self.pass(Duration::from_secs(1));
            self.settle();
        }
        assert!(self.set.is_released());
        assert_eq!(self.set.poll_timeout(), None);
        assert!(self.offered.is_empty());
    }
}

/// An answer that the server never gave.
fn forge(script: &mut Script<'_>, request: &[u8]) -> Vec<u8> {
    let success = script.bit();
    let mut answer = request[..20].to_vec();
    answer[0] |= 1;
    if !success {
        answer[1] |= 0x10;
        let code = match script.bit() {
            true => script.one_of(&[300, 400, 401, 420, 437, 438, 440, 441, 442, 486, 508]),
            false => 300 + script.u16() % 300,
        };
        let number = (code % 100).to_be_bytes()[1];
        push_attribute(
            &mut answer,
            0x0009,
            &[0, 0, (code / 100).to_be_bytes()[1], number],
        );
    }
    for _ in 0..script.below(5) {
        match script.below(6) {
            0 => push_attribute(
                &mut answer,
                0x0014,
                script.one_of(&["firezone", "other", ""]).as_bytes(),
            ),
            1 => push_attribute(&mut answer, 0x0015, script.text().as_bytes()),
            2 => {
                let seconds = script.one_of(&[0u32, 1, 5, 600, u32::MAX]);
                push_attribute(&mut answer, 0x000D, &seconds.to_be_bytes());
            }
            3 => {
                let port = (script.u16() ^ 0x2112).to_be_bytes();
                let last = script.byte();
                let value = [0, 1, port[0], port[1], 192 ^ 0x21, 0x12, 2 ^ 0xA4, last];
                push_attribute(&mut answer, script.one_of(&[0x0016, 0x0020]), &value);
            }
            _ => push_attribute(&mut answer, script.u16(), script.bytes()),
        }
    }
    match script.below(4) {
        0 => {}
        1 => sign(&mut answer, b"wrong"),
        _ => sign(&mut answer, &KEY),
    }
    answer
}
