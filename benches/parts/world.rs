//! A gateway with clients, all in memory: the gateway's own tables, sessions and policies, and a worker
//! that is driven by hand.

use std::fs::OpenOptions;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use etherparse::PacketBuilder;
use firezone_gateway::access::{Access, ClientPolicy, Resolved};
use firezone_gateway::datapath::peers::{Path, PathKind, Peer, PeerTable};
use firezone_gateway::datapath::worker::bench::ByHand;
use firezone_gateway::device::virtio::{HEADER_LEN, Header, PartialChecksum, Segmentation};
use firezone_gateway::ids::{ClientId, ResourceId};
use firezone_gateway::packet::Meta;
use firezone_gateway::portal::messages::{
    CidrResource, ClientPeer, DnsResource, Filter, PresharedKey, Resource,
};
use firezone_gateway::wireguard::{Route, WireGuard};
use uuid::Uuid;

/// Resources of each client, half of them networks, half names.
const RESOURCES: u32 = 20;
/// What WireGuard adds to a packet.
pub const WIREGUARD: usize = 32;
/// What a channel adds to a datagram.
const CHANNEL_DATA: usize = 4;
const CHANNEL: u16 = 0x4001;

/// A host in a network that every client may reach.
pub const HOST4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 2, 0, 1));
pub const HOST6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1));
/// What the first client has made up for a name, and where that really is.
pub const PROXY4: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 96, 0, 1));
pub const PROXY6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, 1));
/// Nobody has a grant for it.
pub const FORBIDDEN: IpAddr = IpAddr::V4(Ipv4Addr::new(11, 0, 0, 1));
/// Lends addresses, and forwards as channel data.
pub fn relay() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 7], 3478))
}

pub const PORT: u16 = 443;

/// The transport of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Udp,
}

/// A client, and what it sends from.
pub struct Client {
    pub tunn: Tunn,
    pub ipv4: IpAddr,
    pub ipv6: IpAddr,
    pub policy: Arc<ClientPolicy>,
    from: SocketAddr,
    relayed: bool,
    peer: ClientPeer,
    /// Of its TCP stream.
    sequence: u32,
}

pub struct World {
    pub now: Instant,
    pub worker: ByHand,
    pub clients: Vec<Client>,
    access: Access,
    wireguard: WireGuard,
    table: Arc<PeerTable>,
}

impl World {
    /// With so many clients, connected and with sessions; through a relay or directly.
    pub fn new(clients: u32, relayed: bool) -> Self {
        let now = Instant::now();
        let table = Arc::new(PeerTable::new());
        table.set_relays(vec![relay()]);
        let sink = OpenOptions::new().write(true).open("/dev/null").unwrap();
        let mut access = Access::new(now, Duration::from_secs(1_800_000_000));
        access.set_gateway_addresses(
            Ipv4Addr::new(100, 64, 0, 1),
            "fd00:2021:1111::ffff".parse().unwrap(),
        );
        let mut world = Self {
            now,
            worker: ByHand::new(Arc::clone(&table), sink.into(), now),
            clients: Vec::new(),
            access,
            wireguard: WireGuard::new(Arc::clone(&table)),
            table,
        };
        world.worker.refresh();
        for n in 0..clients {
            world.connect(n, relayed);
        }
        world
    }

    fn connect(&mut self, n: u32, relayed: bool) {
        let mut secret = [7; 32];
        // Not the first bits: X25519 sets those itself.
        secret[8..12].copy_from_slice(&n.to_le_bytes());
        let secret = StaticSecret::from(secret);
        let peer = ClientPeer {
            id: ClientId(Uuid::from_u128(0xC11E_0000 + u128::from(n))),
            public_key: PublicKey::from(&secret).to_bytes(),
            preshared_key: PresharedKey([3; 32]),
            ipv4: Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 2).to_bits() + n),
            ipv6: Ipv6Addr::from_bits(0xfd00_2021_1111 << 80 | u128::from(n + 1)),
            version: None,
        };
        let from = Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 1).to_bits() + n);
        let from = SocketAddr::from((from, 40_000));
        let policy = self.authorize(&peer);
        let (id, public, psk) = (peer.id, peer.public_key, PresharedKey([3; 32]));
        // A budget of handshakes is not what is looked at here.
        let now = self.now + Duration::from_millis(1) * n;
        let shown = self.wireguard.insert(now, id, public, psk).unwrap();
        let path = Path {
            source: (!relayed).then(ByHand::address),
            destination: if relayed { relay() } else { from },
            channel: relayed.then_some(CHANNEL),
            kind: PathKind::of(relayed, false),
        };
        self.wireguard.set_path(id, Some(path));
        shown.set_policy(Some(Arc::clone(&policy)));
        let (ipv4, ipv6) = (peer.ipv4.into(), peer.ipv6.into());
        self.table.set_addresses(&shown, &[ipv4, ipv6]);
        let gateway = PublicKey::from(self.wireguard.public_key());
        let mut client = Client {
            tunn: Tunn::new(secret, gateway, Some([3; 32]), None, n, None),
            ipv4,
            ipv6,
            policy,
            from,
            relayed,
            peer,
            sequence: 1,
        };
        let mut buffer = [0; 2048];
        let initiation = match client.tunn.format_handshake_initiation(&mut buffer, false) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            other => panic!("no initiation: {other:?}"),
        };
        let local = SocketAddr::new(ByHand::address(), 51_820);
        self.wireguard
            .handle_message(now, local, from, Some(id), &initiation)
            .unwrap();
        let answer = self.wireguard.poll_outgoing().unwrap();
        assert!(matches!(answer.route, Route::Path(_)));
        while self.wireguard.poll_event().is_some() {}
        let confirmation = client.tunn.decapsulate(None, &answer.payload, &mut buffer);
        assert!(matches!(confirmation, TunnResult::WriteToNetwork(_)));
        self.clients.push(client);
        // The session is there once the gateway has met a packet of it; so is the flow of each kind.
        for v6 in [false, true] {
            for kind in [Kind::Tcp, Kind::Udp] {
                let before = self.passed();
                self.lay(0, n as usize, 1, |client| client.packet(kind, v6, 32));
                self.worker.received(1);
                assert_eq!(self.passed(), before + 1, "the gateway takes packets");
            }
        }
    }

    /// What a client may reach, granted anew: none of its flows is known any more.
    pub fn authorize(&mut self, peer: &ClientPeer) -> Arc<ClientPolicy> {
        self.access.remove_client(peer.id);
        for n in 0..RESOURCES {
            self.access.authorize(self.now, peer, resource(n), None);
        }
        while self.access.poll_event().is_some() {}
        self.access.policy(peer.id).unwrap()
    }

    /// Forgets a client's flows.
    pub fn forget_flows(&mut self, client: usize) {
        let peer = self.clients[client].peer.clone();
        self.clients[client].policy = self.authorize(&peer);
    }

    /// Has a client use a name, which stands for [`HOST4`] and [`HOST6`].
    pub fn announce(&mut self, client: usize) {
        let resolved = Resolved {
            ipv4: Some(vec![Ipv4Addr::new(10, 99, 0, 2)]),
            ipv6: Some(vec!["fd99::2".parse().unwrap()]),
        };
        let id = self.clients[client].peer.id;
        self.access
            .announce(
                id,
                resource(1).id(),
                "a.n1.corp.example",
                &[PROXY4, PROXY6],
                &resolved,
                self.now,
            )
            .unwrap();
    }

    /// A client as the workers see it.
    pub fn peer(&self, client: usize) -> Arc<Peer> {
        let id = self.clients[client].peer.id;
        Arc::clone(self.wireguard.peer(id).unwrap())
    }

    /// Packets that the worker has let through, both ways.
    pub fn passed(&self) -> u64 {
        self.worker.counters().traffic.packets()
    }

    /// Lays a train of datagrams of a client into a receive buffer.
    pub fn lay(
        &mut self,
        buffer: usize,
        client: usize,
        datagrams: usize,
        packet: impl Fn(&mut Client) -> Vec<u8>,
    ) {
        let client = &mut self.clients[client];
        let packets: Vec<Vec<u8>> = (0..datagrams).map(|_| packet(client)).collect();
        let header = if client.relayed { CHANNEL_DATA } else { 0 };
        let stride = header + packets[0].len() + WIREGUARD;
        let from = if client.relayed { relay() } else { client.from };
        let tunn = &mut client.tunn;
        let fill = |storage: &mut [u8]| {
            let mut used = 0;
            for packet in &packets {
                let message = packet.len() + WIREGUARD;
                let out = &mut storage[used..used + header + message];
                if header > 0 {
                    out[..2].copy_from_slice(&CHANNEL.to_be_bytes());
                    out[2..4].copy_from_slice(&(message as u16).to_be_bytes());
                }
                match tunn.encapsulate(packet, &mut out[header..]) {
                    TunnResult::WriteToNetwork(m) => assert_eq!(m.len(), message),
                    other => panic!("not encrypted: {other:?}"),
                }
                used += header + message;
            }
            used
        };
        let ends = (from, ByHand::address());
        self.worker.buffers().pretend(buffer, ends, stride, fill);
    }
}

impl Client {
    fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.ipv6 } else { self.ipv4 }
    }

    /// A packet of so many bytes to a host of a network.
    pub fn packet(&mut self, kind: Kind, v6: bool, payload: usize) -> Vec<u8> {
        let ends = (self.address(v6), host(v6));
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(payload as u32);
        packet(kind, ends, (50_000, PORT), sequence, payload)
    }

    /// The same the other way, as the device hands it over.
    pub fn answer(&self, kind: Kind, v6: bool, payload: usize) -> Vec<u8> {
        let ends = (host(v6), self.address(v6));
        let packet = packet(kind, ends, (PORT, 50_000), 1, payload);
        [&Header::PLAIN.to_bytes(!v6), &packet[..]].concat()
    }

    /// A super-packet of so many packets from a host of a network.
    pub fn answers(&self, kind: Kind, packets: usize, payload: usize) -> Vec<u8> {
        let ends = (HOST4, self.ipv4);
        let packet = packet(kind, ends, (PORT, 50_000), 1, packets * payload);
        let (offset, segmentation) = match kind {
            Kind::Tcp => (16, Segmentation::Tcp(payload as u16)),
            Kind::Udp => (6, Segmentation::Udp(payload as u16)),
        };
        let header = Header {
            checksum: Some(PartialChecksum { start: 20, offset }),
            segmentation,
            headers_len: (packet.len() - packets * payload) as u16,
        };
        [&header.to_bytes(true), &packet[..]].concat()
    }
}

fn host(v6: bool) -> IpAddr {
    if v6 { HOST6 } else { HOST4 }
}

/// The packet behind the device's header.
pub fn inner(read: &[u8]) -> &[u8] {
    &read[HEADER_LEN..]
}

pub fn meta(packet: &[u8]) -> Meta {
    Meta::parse(packet).unwrap()
}

/// A packet with correct checksums, unless it is too long to be one.
pub fn packet(
    kind: Kind,
    (src, dst): (IpAddr, IpAddr),
    (from, to): (u16, u16),
    sequence: u32,
    payload: usize,
) -> Vec<u8> {
    let ip = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => PacketBuilder::ipv4(src.octets(), dst.octets(), 64),
        (IpAddr::V6(src), IpAddr::V6(dst)) => PacketBuilder::ipv6(src.octets(), dst.octets(), 64),
        _ => panic!("two families"),
    };
    let data: Vec<u8> = (0..payload).map(|n| n as u8).collect();
    let mut packet = Vec::new();
    match kind {
        Kind::Tcp => ip
            .tcp(from, to, sequence, 1000)
            .ack(1)
            .write(&mut packet, &data),
        Kind::Udp => ip.udp(from, to).write(&mut packet, &data),
    }
    .unwrap();
    packet
}

fn resource(n: u32) -> Resource {
    let id = ResourceId(Uuid::from_u128(0x0E50_0000 + u128::from(n)));
    let name = format!("resource {n}");
    let filters = vec![
        Filter::Tcp {
            start: PORT,
            end: PORT,
        },
        Filter::Udp {
            start: PORT,
            end: PORT,
        },
        Filter::Icmp,
    ];
    if n.is_multiple_of(2) {
        // One of them is in the other family.
        let address = if n == 0 {
            "fd99::/64".to_owned()
        } else {
            format!("10.{n}.0.0/16")
        };
        Resource::Cidr(CidrResource {
            id,
            address: address.parse().unwrap(),
            name,
            filters,
        })
    } else {
        Resource::Dns(DnsResource {
            id,
            address: format!("**.n{n}.corp.example"),
            name,
            filters,
        })
    }
}
