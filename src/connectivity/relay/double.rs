//! A small TURN server for tests, written from RFC 8489 and RFC 8656, and a virtual network that
//! joins it with the state machine under test.
#![allow(clippy::unwrap_used)]
// Fuzzing needs only a part of it.
#![cfg_attr(not(test), allow(dead_code))]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytecodec::{DecodeExt, EncodeExt};
use is::{DefaultSha1HmacProvider, Sha1HmacProvider as _};
use stun_codec::rfc5389::attributes::{
    ErrorCode, MessageIntegrity, Nonce, Realm, Software, Username, XorMappedAddress,
};
use stun_codec::rfc5766::attributes::{
    ChannelNumber, DontFragment, Lifetime, RequestedTransport, XorPeerAddress, XorRelayAddress,
};
use stun_codec::rfc8656::attributes::{
    AdditionalAddressFamily, AddressFamily, RequestedAddressFamily,
};
use stun_codec::{
    Message, MessageClass, MessageDecoder, MessageEncoder, Method, TransactionId,
    define_attribute_enums,
};

use super::RelayTransmit;

define_attribute_enums!(
    Attr,
    AttrDecoder,
    AttrEncoder,
    [
        MessageIntegrity,
        Username,
        Realm,
        Nonce,
        ErrorCode,
        Software,
        XorMappedAddress,
        ChannelNumber,
        Lifetime,
        XorPeerAddress,
        XorRelayAddress,
        RequestedTransport,
        RequestedAddressFamily,
        AdditionalAddressFamily,
        DontFragment
    ]
);

pub(crate) const BINDING: u16 = 0x001;
pub(crate) const ALLOCATE: u16 = 0x003;
pub(crate) const REFRESH: u16 = 0x004;
pub(crate) const CHANNEL_BIND: u16 = 0x009;
const CREATE_PERMISSION: u16 = 0x008;

/// Where servers differ (data-path spec §3.6, §3.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Never signs 401 and 438. A repeated ALLOCATE with the same transaction id gets the same
    /// answer; another one gets an unsigned 437, before any authentication. A deleted allocation
    /// lingers for a second. (The last two as measured with 4.6.1.)
    Coturn,
    /// Signs every error whose request carried a USERNAME; one allocation per user name; a
    /// repeated ALLOCATE gets 437.
    Stock,
}

/// A request as the server saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) at: Instant,
    pub(crate) method: u16,
    pub(crate) signed: bool,
    pub(crate) attributes: Vec<u16>,
    pub(crate) lifetime: Option<u64>,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    /// The error the server answered, 0 for success.
    pub(crate) answer: u16,
}

#[derive(Debug)]
struct ServerAllocation {
    username: String,
    transaction: TransactionId,
    relayed: Vec<SocketAddr>,
    expires_at: Instant,
    /// Peer and end of the binding.
    channels: HashMap<u16, (SocketAddr, Instant)>,
}

#[derive(Debug)]
pub(crate) struct TurnServer {
    pub(crate) style: Style,
    pub(crate) sockets: Vec<SocketAddr>,
    pub(crate) relay_ips: Vec<IpAddr>,
    pub(crate) realm: String,
    pub(crate) users: HashMap<String, String>,
    /// Serves clients of another make, too, and gives permissions where channels would do.
    pub(crate) serves_others: bool,
    /// Makes passwords for everybody, as coturn's `use-auth-secret` does.
    pub(crate) secret: Option<String>,
    pub(crate) lifetime: u64,
    /// Answers nothing while set.
    pub(crate) silent: bool,
    /// Pads channel data to four bytes.
    pub(crate) pads: bool,
    /// Never accepts a nonce.
    pub(crate) always_stale: bool,
    /// Error for ALLOCATE with ADDITIONAL-ADDRESS-FAMILY.
    pub(crate) refuses_additional: Option<u16>,
    /// Errors to answer to the next authenticated requests of a method.
    pub(crate) errors: VecDeque<(u16, u16)>,
    /// Whether such errors are signed.
    pub(crate) signs_errors: bool,
    /// Whether success responses are signed.
    pub(crate) signs_success: bool,
    /// Signs with this password instead of the user's.
    pub(crate) forged_key: Option<String>,
    /// Serves anybody without credentials.
    pub(crate) open: bool,
    /// Puts an attribute that nobody expects, and everybody has to understand (DONT-FRAGMENT), into
    /// answers to this method with this error, or 0.
    pub(crate) adds_unknown_to: Option<(u16, u16)>,
    /// Whether errors say which.
    pub(crate) names_errors: bool,
    pub(crate) seen: Vec<Seen>,
    /// What went to peers: from which relayed address, to whom, and the payload.
    pub(crate) forwarded: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
    allocations: HashMap<SocketAddr, ServerAllocation>,
    nonce: u32,
    next_port: u16,
}

pub(crate) const USER: &str = "2145916800:salt";
pub(crate) const PASSWORD: &str = "hunter2-hunter2";

impl TurnServer {
    pub(crate) fn new(style: Style, sockets: &[&str], relay_ips: &[&str]) -> Self {
        Self {
            style,
            sockets: sockets.iter().map(|s| s.parse().unwrap()).collect(),
            relay_ips: relay_ips.iter().map(|s| s.parse().unwrap()).collect(),
            realm: "firezone".to_owned(),
            users: HashMap::from([(USER.to_owned(), PASSWORD.to_owned())]),
            serves_others: false,
            secret: None,
            lifetime: 600,
            silent: false,
            pads: false,
            always_stale: false,
            refuses_additional: None,
            errors: VecDeque::new(),
            signs_errors: true,
            signs_success: true,
            forged_key: None,
            open: false,
            adds_unknown_to: None,
            names_errors: true,
            seen: Vec::new(),
            forwarded: Vec::new(),
            allocations: HashMap::new(),
            nonce: 1,
            next_port: 49152,
        }
    }

    /// Loses all state, as a restart does.
    pub(crate) fn restart(&mut self) {
        self.allocations.clear();
        self.nonce += 1000;
    }

    /// Makes every nonce handed out so far stale.
    pub(crate) fn expire_nonces(&mut self) {
        self.nonce += 1;
    }

    pub(crate) fn allocations(&self, now: Instant) -> usize {
        self.allocations
            .values()
            .filter(|a| now < a.expires_at)
            .count()
    }

    pub(crate) fn allocations_of(&self, now: Instant, user: &str) -> usize {
        self.allocations
            .values()
            .filter(|a| now < a.expires_at && a.username == user)
            .count()
    }

    pub(crate) fn channels(&self) -> Vec<(u16, SocketAddr)> {
        let mut channels: Vec<_> = self
            .allocations
            .values()
            .flat_map(|a| a.channels.iter().map(|(n, (peer, _))| (*n, *peer)))
            .collect();
        channels.sort_unstable();
        channels
    }

    pub(crate) fn count(&self, method: u16) -> usize {
        self.seen.iter().filter(|s| s.method == method).count()
    }

    /// An allocation that somebody left behind on this 5-tuple.
    pub(crate) fn leave_behind(&mut self, now: Instant, client: SocketAddr, username: &str) {
        let allocation = ServerAllocation {
            username: username.to_owned(),
            transaction: TransactionId::new([0; 12]),
            relayed: vec![],
            expires_at: now + Duration::from_secs(600),
            channels: HashMap::new(),
        };
        self.allocations.insert(client, allocation);
    }

    /// A datagram from `peer` to one of the relayed addresses; answers what goes to which client.
    pub(crate) fn packet_from(
        &self,
        now: Instant,
        peer: SocketAddr,
        payload: &[u8],
    ) -> Option<(SocketAddr, Vec<u8>)> {
        self.allocations.iter().find_map(|(client, allocation)| {
            let (number, _) = allocation
                .channels
                .iter()
                .find(|(_, (p, until))| *p == peer && now < *until)?;
            Some((*client, self.channel_data(*number, payload)))
        })
    }

    /// A datagram from `peer` to `relayed`; answers what goes to which client. Only bound channels
    /// carry anything, as with the stock relay (data-path spec §3.6).
    pub(crate) fn receive(
        &self,
        now: Instant,
        relayed: SocketAddr,
        peer: SocketAddr,
        payload: &[u8],
    ) -> Option<(SocketAddr, Vec<u8>)> {
        let (client, allocation) = self
            .allocations
            .iter()
            .find(|(_, a)| now < a.expires_at && a.relayed.contains(&relayed))?;
        let (number, _) = allocation
            .channels
            .iter()
            .find(|(_, (p, until))| *p == peer && now < *until)?;
        Some((*client, self.channel_data(*number, payload)))
    }

    fn channel_data(&self, number: u16, payload: &[u8]) -> Vec<u8> {
        let mut datagram = number.to_be_bytes().to_vec();
        datagram.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        datagram.extend_from_slice(payload);
        if self.pads {
            datagram.resize(datagram.len().next_multiple_of(4), 0);
        }
        datagram
    }

    fn password(&self, user: &str) -> Option<String> {
        if let Some(secret) = &self.secret {
            let mac = DefaultSha1HmacProvider.sha1_hmac(secret.as_bytes(), &[user.as_bytes()]);
            return Some(STANDARD.encode(mac));
        }
        self.users.get(user).cloned()
    }

    pub(crate) fn handle(
        &mut self,
        now: Instant,
        client: SocketAddr,
        to: SocketAddr,
        datagram: &[u8],
    ) -> Option<Vec<u8>> {
        if self.silent {
            return None;
        }
        self.allocations.retain(|_, a| now < a.expires_at);
        if datagram[0] & 0xC0 == 0x40 {
            self.forward(now, client, datagram);
            return None;
        }
        let request = MessageDecoder::<Attr>::new()
            .decode_from_bytes(datagram)
            .unwrap()
            .unwrap();
        let method = request.method().as_u16();
        let mut response = self.answer(now, client, &request);
        let answer = match response.get_attribute::<ErrorCode>() {
            Some(e) => e.code(),
            None => 0,
        };
        self.seen.push(Seen {
            at: now,
            method,
            signed: request.get_attribute::<MessageIntegrity>().is_some(),
            attributes: attribute_types(datagram),
            lifetime: request
                .get_attribute::<Lifetime>()
                .map(|l| l.lifetime().as_secs()),
            from: client,
            to,
            answer,
        });
        let named = request.get_attribute::<Username>().is_some();
        let sign = match answer {
            0 => named && self.signs_success,
            401 | 438 => self.style == Style::Stock && named,
            437 if method == ALLOCATE && self.style == Style::Coturn => false,
            _ => named && self.signs_errors,
        };
        if answer != 0 && !self.names_errors {
            response = Message::new(
                response.class(),
                response.method(),
                response.transaction_id(),
            );
        }
        if self.adds_unknown_to == Some((method, answer)) {
            response.add_attribute(DontFragment);
        }
        if sign {
            let user = request.get_attribute::<Username>().unwrap();
            // The stock relay derives a password even for users that it does not let in.
            let password = self
                .forged_key
                .clone()
                .or_else(|| self.password(user.name()))
                .unwrap_or_else(|| "derived".to_owned());
            let realm = Realm::new(self.realm.clone()).unwrap();
            let integrity =
                MessageIntegrity::new_long_term_credential(&response, user, &realm, &password);
            response.add_attribute(integrity.unwrap());
        }
        Some(
            MessageEncoder::default()
                .encode_into_bytes(response)
                .unwrap(),
        )
    }

    fn answer(
        &mut self,
        now: Instant,
        client: SocketAddr,
        request: &Message<Attr>,
    ) -> Message<Attr> {
        let method = request.method().as_u16();
        if method == BINDING {
            if let Some(code) = self.take_error(BINDING) {
                return error(request, code);
            }
            let mut response = success(request);
            response.add_attribute(XorMappedAddress::new(client));
            return response;
        }
        let busy = self.allocations.get(&client);
        if self.style == Style::Coturn
            && method == ALLOCATE
            && busy.is_some_and(|a| a.transaction != request.transaction_id())
        {
            return error(request, 437);
        }
        if !self.open
            && let Err(code) = self.authenticate(request)
        {
            let mut response = error(request, code);
            response.add_attribute(Realm::new(self.realm.clone()).unwrap());
            response.add_attribute(Nonce::new(self.nonce.to_string()).unwrap());
            return response;
        }
        if let Some(code) = self.take_error(method) {
            return error(request, code);
        }
        let result = match method {
            ALLOCATE => self.allocate(now, client, request),
            REFRESH => self.refresh(now, client, request),
            CHANNEL_BIND => self.channel_bind(now, client, request),
            CREATE_PERMISSION if self.serves_others => {
                let known = self.allocations.contains_key(&client);
                known.then(|| success(request)).ok_or(437)
            }
            other => panic!("method {other:#x} must not be used"),
        };
        result.unwrap_or_else(|code| error(request, code))
    }

    fn take_error(&mut self, method: u16) -> Option<u16> {
        let at = self.errors.iter().position(|(m, _)| *m == method)?;
        self.errors.remove(at).map(|(_, code)| code)
    }

    /// RFC 8489 §9.2.4.
    fn authenticate(&self, request: &Message<Attr>) -> Result<(), u16> {
        let integrity = request.get_attribute::<MessageIntegrity>().ok_or(401u16)?;
        let username = request.get_attribute::<Username>().ok_or(400u16)?;
        let realm = request.get_attribute::<Realm>().ok_or(400u16)?;
        let nonce = request.get_attribute::<Nonce>().ok_or(400u16)?;
        if self.always_stale || nonce.value() != self.nonce.to_string() {
            return Err(438);
        }
        let password = self.password(username.name()).ok_or(401u16)?;
        if realm.text() != self.realm
            || integrity
                .check_long_term_credential(username, realm, &password)
                .is_err()
        {
            return Err(401);
        }
        Ok(())
    }

    /// RFC 8656 §7.2.
    fn allocate(
        &mut self,
        now: Instant,
        client: SocketAddr,
        request: &Message<Attr>,
    ) -> Result<Message<Attr>, u16> {
        let username = request
            .get_attribute::<Username>()
            .map_or("", |user| user.name());
        let transport = request.get_attribute::<RequestedTransport>();
        let additional = request.get_attribute::<AdditionalAddressFamily>();
        let requested = request.get_attribute::<RequestedAddressFamily>();
        if self.style == Style::Stock {
            self.allocations
                .retain(|at, a| a.username != username || *at == client);
        }
        if let Some(existing) = self.allocations.get(&client) {
            let repeated = existing.transaction == request.transaction_id();
            if self.style == Style::Coturn && repeated {
                return Ok(self.allocate_success(request, &existing.relayed, client));
            }
            return Err(437);
        }
        if transport.ok_or(400u16)?.protocol() != 17 {
            return Err(442);
        }
        if additional.is_some() {
            if requested.is_some() {
                return Err(400);
            }
            if let Some(code) = self.refuses_additional {
                return Err(code);
            }
        }
        let wants_v6_only =
            requested.is_some_and(|family| family.address_family() == AddressFamily::V6);
        let port = self.next_port;
        self.next_port += 1;
        let relayed: Vec<_> = self
            .relay_ips
            .iter()
            .filter(|ip| match ip {
                IpAddr::V4(_) => !wants_v6_only,
                IpAddr::V6(_) => wants_v6_only || additional.is_some(),
            })
            .map(|ip| SocketAddr::new(*ip, port))
            .collect();
        if relayed.is_empty() {
            return Err(440);
        }
        let response = self.allocate_success(request, &relayed, client);
        let allocation = ServerAllocation {
            username: username.to_owned(),
            transaction: request.transaction_id(),
            relayed,
            expires_at: now + Duration::from_secs(self.lifetime),
            channels: HashMap::new(),
        };
        self.allocations.insert(client, allocation);
        Ok(response)
    }

    fn allocate_success(
        &self,
        request: &Message<Attr>,
        relayed: &[SocketAddr],
        client: SocketAddr,
    ) -> Message<Attr> {
        let mut response = success(request);
        for addr in relayed {
            response.add_attribute(XorRelayAddress::new(*addr));
        }
        response.add_attribute(Lifetime::from_u32(u32::try_from(self.lifetime).unwrap()));
        response.add_attribute(XorMappedAddress::new(client));
        response
    }

    /// RFC 8656 §7.3; both extra attributes as coturn takes them.
    fn refresh(
        &mut self,
        now: Instant,
        client: SocketAddr,
        request: &Message<Attr>,
    ) -> Result<Message<Attr>, u16> {
        if request.get_attribute::<RequestedTransport>().is_some() {
            return Err(420);
        }
        if request.get_attribute::<AdditionalAddressFamily>().is_some() {
            return Err(443);
        }
        let username = request
            .get_attribute::<Username>()
            .map_or("", |user| user.name());
        let wanted = request
            .get_attribute::<Lifetime>()
            .map_or(self.lifetime, |l| l.lifetime().as_secs().min(self.lifetime));
        let allocation = self.allocations.get_mut(&client).ok_or(437u16)?;
        if allocation.username != username {
            return Err(441);
        }
        if wanted == 0 && self.style == Style::Coturn {
            allocation.expires_at = now + Duration::from_secs(1);
        } else if wanted == 0 {
            self.allocations.remove(&client);
        } else {
            allocation.expires_at = now + Duration::from_secs(wanted);
        }
        let mut response = success(request);
        response.add_attribute(Lifetime::from_u32(u32::try_from(wanted).unwrap()));
        Ok(response)
    }

    /// RFC 8656 §12.2.
    fn channel_bind(
        &mut self,
        now: Instant,
        client: SocketAddr,
        request: &Message<Attr>,
    ) -> Result<Message<Attr>, u16> {
        let allocation = self.allocations.get_mut(&client).ok_or(437u16)?;
        let number = request.get_attribute::<ChannelNumber>().ok_or(400u16)?;
        let peer = request.get_attribute::<XorPeerAddress>().ok_or(400u16)?;
        let (number, peer) = (number.value(), peer.address());
        let covered = |a: &SocketAddr| a.is_ipv4() == peer.is_ipv4();
        if !allocation.relayed.iter().any(covered) {
            return Err(443);
        }
        allocation.channels.retain(|_, (_, until)| now < *until);
        let clash = allocation
            .channels
            .iter()
            .any(|(n, (p, _))| (*n == number) != (*p == peer));
        if clash {
            return Err(400);
        }
        // Nothing but a permission lets anything through, which lasts 300 s (RFC 8656 §9); coturn
        // deletes the channel together with it.
        let lasts = if self.style == Style::Coturn {
            300
        } else {
            600
        };
        let until = now + Duration::from_secs(lasts);
        allocation.channels.insert(number, (peer, until));
        Ok(success(request))
    }

    fn forward(&mut self, now: Instant, client: SocketAddr, datagram: &[u8]) {
        let number = u16::from_be_bytes([datagram[0], datagram[1]]);
        let len = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
        assert_eq!(len + 4, datagram.len(), "no padding");
        let binding = self
            .allocations
            .get(&client)
            .and_then(|a| a.channels.get(&number));
        if let Some((peer, until)) = binding
            && now < *until
        {
            let (peer, payload) = (*peer, datagram[4..].to_vec());
            let relayed = self.allocations[&client]
                .relayed
                .iter()
                .find(|relayed| relayed.is_ipv4() == peer.is_ipv4());
            self.forwarded
                .extend(relayed.map(|relayed| (*relayed, peer, payload)));
        }
    }
}

fn success(request: &Message<Attr>) -> Message<Attr> {
    Message::new(
        MessageClass::SuccessResponse,
        request.method(),
        request.transaction_id(),
    )
}

fn error(request: &Message<Attr>, code: u16) -> Message<Attr> {
    let mut response = Message::new(
        MessageClass::ErrorResponse,
        request.method(),
        request.transaction_id(),
    );
    response.add_attribute(ErrorCode::new(code, "no".to_owned()).unwrap());
    response
}

fn attribute_types(datagram: &[u8]) -> Vec<u16> {
    let mut types = Vec::new();
    let mut rest = &datagram[20..];
    while !rest.is_empty() {
        types.push(u16::from_be_bytes([rest[0], rest[1]]));
        let len = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        rest = &rest[4 + len.next_multiple_of(4)..];
    }
    types
}

/// The value of the first attribute of a type.
pub(in crate::connectivity) fn attribute(datagram: &[u8], kind: u16) -> Option<&[u8]> {
    let mut rest = datagram.get(20..)?;
    while let Some((&[t0, t1, l0, l1], tail)) = rest.split_first_chunk::<4>() {
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        if u16::from_be_bytes([t0, t1]) == kind {
            return tail.get(..len);
        }
        rest = tail.get(len.next_multiple_of(4)..)?;
    }
    None
}

/// The method of a STUN datagram, for filters.
pub(crate) fn method_of(datagram: &[u8]) -> Option<u16> {
    if datagram[0] & 0xC0 != 0 {
        return None;
    }
    let message = MessageDecoder::<Attr>::new()
        .decode_from_bytes(datagram)
        .ok()?
        .ok()?;
    Some(Method::as_u16(message.method()))
}

/// What the virtual network drives.
pub(crate) trait Machine {
    fn packet(&mut self, now: Instant, local: SocketAddr, from: SocketAddr, datagram: &[u8]);
    fn timeout(&mut self, now: Instant);
    fn next_timeout(&self) -> Option<Instant>;
    fn transmit(&mut self) -> Option<RelayTransmit>;
}

/// What the network does with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Deliver,
    Lose,
    /// Deliver this much later than usual.
    Late(Duration),
}

#[derive(Debug)]
enum Hop {
    ToServer { to: SocketAddr, datagram: Vec<u8> },
    ToClient { from: SocketAddr, datagram: Vec<u8> },
}

/// Decides over each datagram; the flag says whether it goes to the server.
type Filter = Box<dyn FnMut(bool, &[u8]) -> Fate>;

/// Virtual time, one client with one socket per family, some servers.
pub(crate) struct World<M> {
    pub(crate) now: Instant,
    pub(crate) machine: M,
    pub(crate) servers: Vec<TurnServer>,
    /// One-way delay to and from a server.
    pub(crate) delay_to: Box<dyn Fn(SocketAddr) -> Duration>,
    /// The client's IPv4 address as servers see it.
    pub(crate) nat_v4: SocketAddr,
    pub(crate) filter: Filter,
    queue: BTreeMap<(Instant, u64), Hop>,
    sequence: u64,
}

pub(crate) const LOCAL_V4: &str = "10.0.0.2:52625";
pub(crate) const LOCAL_V6: &str = "[2001:db8:1::2]:52625";
pub(crate) const NAT_V4: &str = "203.0.113.77:41000";

impl<M: Machine> World<M> {
    pub(crate) fn new(now: Instant, machine: M, servers: Vec<TurnServer>) -> Self {
        Self {
            now,
            machine,
            servers,
            delay_to: Box::new(|_| Duration::from_millis(10)),
            nat_v4: NAT_V4.parse().unwrap(),
            filter: Box::new(|_, _| Fate::Deliver),
            queue: BTreeMap::new(),
            sequence: 0,
        }
    }

    fn enqueue(&mut self, hop: Hop) {
        let (to_server, server, datagram) = match &hop {
            Hop::ToServer { to, datagram } => (true, *to, datagram),
            Hop::ToClient { from, datagram } => (false, *from, datagram),
        };
        let usual = self.now + (self.delay_to)(server);
        let at = match (self.filter)(to_server, datagram) {
            Fate::Deliver => usual,
            Fate::Lose => return,
            Fate::Late(extra) => usual + extra,
        };
        self.sequence += 1;
        self.queue.insert((at, self.sequence), hop);
    }

    fn drain(&mut self) {
        while let Some(RelayTransmit { dst, payload }) = self.machine.transmit() {
            self.enqueue(Hop::ToServer {
                to: dst,
                datagram: payload,
            });
        }
    }

    /// Sends a raw datagram from the client, as the data path would.
    pub(crate) fn send_raw(&mut self, to: SocketAddr, datagram: Vec<u8>) {
        self.enqueue(Hop::ToServer { to, datagram });
    }

    /// Delivers a raw datagram to the client.
    pub(crate) fn receive_raw(&mut self, from: SocketAddr, datagram: Vec<u8>) {
        self.enqueue(Hop::ToClient { from, datagram });
    }

    /// Lets time pass; every packet and timer happens at its moment.
    pub(crate) fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        let mut steps = 0;
        loop {
            self.drain();
            let packet = self.queue.first_key_value().map(|((at, _), _)| *at);
            let timer = self.machine.next_timeout();
            let next = packet.into_iter().chain(timer).min();
            let Some(at) = next.filter(|at| *at <= end) else {
                break;
            };
            steps += 1;
            assert!(steps < 200_000, "the world spins");
            self.now = self.now.max(at);
            if packet == Some(at) {
                let (_, hop) = self.queue.pop_first().unwrap();
                self.deliver(hop);
            } else {
                self.machine.timeout(self.now);
                let next = self.machine.next_timeout();
                assert!(
                    next.is_none_or(|next| next > self.now),
                    "a timer that fired stays due"
                );
            }
        }
        self.now = end;
    }

    /// Live allocations of a server.
    pub(crate) fn allocations(&self, server: usize) -> usize {
        self.servers[server].allocations(self.now)
    }

    pub(crate) fn run_secs(&mut self, seconds: u64) {
        self.run(Duration::from_secs(seconds));
    }

    fn deliver(&mut self, hop: Hop) {
        match hop {
            Hop::ToServer { to, datagram } => {
                let client = if to.is_ipv4() {
                    self.nat_v4
                } else {
                    LOCAL_V6.parse().unwrap()
                };
                let now = self.now;
                let response = self
                    .servers
                    .iter_mut()
                    .find(|s| s.sockets.contains(&to))
                    .and_then(|s| s.handle(now, client, to, &datagram));
                if let Some(datagram) = response {
                    self.enqueue(Hop::ToClient { from: to, datagram });
                }
            }
            Hop::ToClient { from, datagram } => {
                let local = if from.is_ipv4() { LOCAL_V4 } else { LOCAL_V6 };
                let local = local.parse().unwrap();
                self.machine.packet(self.now, local, from, &datagram);
            }
        }
    }
}
