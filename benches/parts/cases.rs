//! What is measured. Each case does the same work again and again; what it needs for that is laid ready
//! outside the measured part.

use std::cell::Cell;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;

use boringtun::noise::TunnResult;
use firezone_gateway::access::Flow;
use firezone_gateway::datapath::coalesce::Coalescer;
use firezone_gateway::device::virtio::{HEADER_LEN, Header};
use firezone_gateway::device::{Offloads, Tun};
use firezone_gateway::packet::split::Split;
use firezone_gateway::packet::{FlowKey, Meta, checksum};

use crate::world::{
    Client, FORBIDDEN, HOST4, Kind, PORT, PROXY4, PROXY6, WIREGUARD, World, inner, meta, packet,
    relay,
};

/// Payload of the longest TCP segment over IPv4, and of the longest datagram.
const TCP_PAYLOAD: usize = 1240;
const UDP_PAYLOAD: usize = 1252;
/// Payload of a packet of 64 bytes.
const SMALL: usize = 36;
/// As many packets as a super-packet of the tunnel's packets holds.
const TRAIN: usize = 49;
/// Times that a short part is repeated, so that it can be timed.
const REPEATED: usize = 64;

/// One case.
pub struct Case {
    pub name: &'static str,
    /// Packets per run.
    pub packets: usize,
    pub make: fn() -> Box<dyn Work>,
}

/// A case that is ready to run.
pub trait Work {
    /// Lays ready what a run uses up.
    fn prepare(&mut self);
    /// What is measured.
    fn run(&mut self);
    /// Packets that have passed so far, for cases where the worker counts them.
    fn passed(&self) -> Option<u64>;
}

struct Parts<S, P, R> {
    state: S,
    prepare: P,
    run: R,
    passed: fn(&S) -> Option<u64>,
}

impl<S, P: FnMut(&mut S), R: FnMut(&mut S)> Work for Parts<S, P, R> {
    fn prepare(&mut self) {
        (self.prepare)(&mut self.state);
    }

    fn run(&mut self) {
        (self.run)(&mut self.state);
    }

    fn passed(&self) -> Option<u64> {
        (self.passed)(&self.state)
    }
}

/// Of the worker, which counts what it lets through.
fn traffic(
    world: World,
    prepare: impl FnMut(&mut World) + 'static,
    run: impl FnMut(&mut World) + 'static,
) -> Box<dyn Work> {
    Box::new(Parts {
        state: world,
        prepare,
        run,
        passed: |world| Some(world.passed()),
    })
}

fn part<S: 'static>(
    state: S,
    prepare: impl FnMut(&mut S) + 'static,
    run: impl FnMut(&mut S) + 'static,
) -> Box<dyn Work> {
    Box::new(Parts {
        state,
        prepare,
        run,
        passed: |_| None,
    })
}

fn nothing<S>(_: &mut S) {}

const fn case(name: &'static str, packets: usize, make: fn() -> Box<dyn Work>) -> Case {
    Case {
        name,
        packets,
        make,
    }
}

pub const CASES: &[Case] = &[
    // ---- whole ways through the worker
    case("decrypt/packet/1280", 1, || {
        decrypt(false, 1, |c| c.packet(Kind::Udp, false, UDP_PAYLOAD))
    }),
    case("decrypt/packet/64", 1, || {
        decrypt(false, 1, |c| c.packet(Kind::Udp, false, SMALL))
    }),
    case("decrypt/train/tcp", TRAIN, || {
        decrypt(false, TRAIN, |c| c.packet(Kind::Tcp, false, TCP_PAYLOAD))
    }),
    case("decrypt/train/udp", TRAIN, || {
        decrypt(false, TRAIN, |c| c.packet(Kind::Udp, false, UDP_PAYLOAD))
    }),
    case("decrypt/train/relayed", TRAIN, || {
        decrypt(true, TRAIN, |c| c.packet(Kind::Tcp, false, TCP_PAYLOAD))
    }),
    case("encrypt/packet/1280", 1, || {
        encrypt(false, |c| c.answer(Kind::Udp, false, UDP_PAYLOAD))
    }),
    case("encrypt/packet/64", 1, || {
        encrypt(false, |c| c.answer(Kind::Udp, false, SMALL))
    }),
    case("encrypt/super-packet/tcp", TRAIN, || {
        encrypt(false, |c| c.answers(Kind::Tcp, TRAIN, TCP_PAYLOAD))
    }),
    case("encrypt/super-packet/udp", TRAIN, || {
        encrypt(false, |c| c.answers(Kind::Udp, TRAIN, UDP_PAYLOAD))
    }),
    case("encrypt/super-packet/relayed", TRAIN, || {
        encrypt(true, |c| c.answers(Kind::Tcp, TRAIN, TCP_PAYLOAD))
    }),
    // ---- one client, or a hundred out of ten thousand
    case(ONE_DECRYPT, BURST * SHORT, || {
        few_or_many_decrypt(Who::One, SHORT)
    }),
    case(MANY_DECRYPT, BURST * SHORT, || {
        few_or_many_decrypt(Who::InTurn, SHORT)
    }),
    case(RANDOM_DECRYPT, BURST * SHORT, || {
        few_or_many_decrypt(Who::AtRandom, SHORT)
    }),
    case(ONE_ENCRYPT, BURST * SHORT, || {
        few_or_many_encrypt(Who::One, SHORT)
    }),
    case(MANY_ENCRYPT, BURST * SHORT, || {
        few_or_many_encrypt(Who::InTurn, SHORT)
    }),
    case(RANDOM_ENCRYPT, BURST * SHORT, || {
        few_or_many_encrypt(Who::AtRandom, SHORT)
    }),
    case("clients/1/decrypt/singles", BURST, || {
        few_or_many_decrypt(Who::One, 1)
    }),
    case("clients/10000/decrypt/singles", BURST, || {
        few_or_many_decrypt(Who::AtRandom, 1)
    }),
    case("clients/1/encrypt/singles", BURST, || {
        few_or_many_encrypt(Who::One, 1)
    }),
    case("clients/10000/encrypt/singles", BURST, || {
        few_or_many_encrypt(Who::AtRandom, 1)
    }),
    // ---- parts
    case("cipher/decrypt/1280", TRAIN, cipher_decrypt),
    case("cipher/encrypt/1280", TRAIN, cipher_encrypt),
    case("parse/tcp-v4", REPEATED, || parse(HOST4, Kind::Tcp)),
    case("parse/udp-v6", REPEATED, || parse(PROXY6, Kind::Udp)),
    case("verdict/hit/from-client", REPEATED, || verdict_hit(true)),
    case("verdict/hit/to-client", REPEATED, || verdict_hit(false)),
    case("verdict/miss/known-flow", REPEATED, verdict_known),
    case("verdict/miss/new-flow", REPEATED, verdict_new),
    case("verdict/miss/denied", REPEATED, verdict_denied),
    case("translate/out/v4", REPEATED, || translate(false, true)),
    case("translate/in/v4", REPEATED, || translate(false, false)),
    case("translate/out/v6", REPEATED, || translate(true, true)),
    case("translate/in/v6", REPEATED, || translate(true, false)),
    case("demux/data", REPEATED, || demux(&DATA, false)),
    case("demux/channel-data", REPEATED, || {
        demux(&CHANNEL_DATA, true)
    }),
    case("demux/other", REPEATED, || demux(&[0; 64], false)),
    case("demux/stun-to-slow-path", REPEATED, stun),
    case("split/tcp", TRAIN, || split(Kind::Tcp, TCP_PAYLOAD)),
    case("split/udp", TRAIN, || split(Kind::Udp, UDP_PAYLOAD)),
    case("coalesce/tcp", TRAIN, || coalesce(Kind::Tcp, TCP_PAYLOAD)),
    case("coalesce/udp", TRAIN, || coalesce(Kind::Udp, UDP_PAYLOAD)),
    case("checksum/1280", REPEATED, || sum(1280)),
    case("checksum/64", REPEATED, || sum(64)),
    case("checksum/update", REPEATED, sum_update),
];

// ---- whole ways ----------------------------------------------------------------------------------

fn decrypt(relayed: bool, train: usize, packet: fn(&mut Client) -> Vec<u8>) -> Box<dyn Work> {
    traffic(
        World::new(1, relayed),
        move |world| world.lay(0, 0, train, packet),
        |world| world.worker.received(1),
    )
}

fn encrypt(relayed: bool, read: fn(&Client) -> Vec<u8>) -> Box<dyn Work> {
    let world = World::new(1, relayed);
    let original = read(&world.clients[0]);
    let buffer = std::rc::Rc::new(std::cell::RefCell::new(original.clone()));
    let laid = std::rc::Rc::clone(&buffer);
    traffic(
        world,
        move |_| laid.borrow_mut().copy_from_slice(&original),
        move |world| {
            let mut read = buffer.borrow_mut();
            world.worker.read(std::iter::once(&mut read[..]));
        },
    )
}

// ---- one client or many --------------------------------------------------------------------------

/// Clients that are connected, and of those, how many send.
pub const CONNECTED: u32 = 10_000;
const ACTIVE: usize = 100;
/// Trains in one burst, and datagrams in each.
const BURST: usize = 16;
const SHORT: usize = 8;

pub const ONE_DECRYPT: &str = "clients/1/decrypt/trains";
pub const MANY_DECRYPT: &str = "clients/10000/decrypt/trains/in-turn";
pub const RANDOM_DECRYPT: &str = "clients/10000/decrypt/trains/at-random";
pub const ONE_ENCRYPT: &str = "clients/1/encrypt/trains";
pub const MANY_ENCRYPT: &str = "clients/10000/encrypt/trains/in-turn";
pub const RANDOM_ENCRYPT: &str = "clients/10000/encrypt/trains/at-random";

#[derive(Clone, Copy)]
enum Who {
    One,
    InTurn,
    AtRandom,
}

impl Who {
    fn world(self) -> World {
        let all = if crate::is_test() { 200 } else { CONNECTED };
        World::new(if matches!(self, Self::One) { 1 } else { all }, false)
    }

    /// Who sends next, by a sequence that is always the same. The active clients lie all over the table.
    fn next(self, connected: usize, state: &mut u64) -> usize {
        *state = match self {
            Self::One => return 0,
            Self::InTurn => *state + 1,
            // Of Knuth's MMIX.
            Self::AtRandom => state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407),
        };
        let turn = if matches!(self, Self::InTurn) {
            *state
        } else {
            *state >> 33
        };
        (turn % ACTIVE as u64) as usize * (connected / ACTIVE)
    }
}

fn few_or_many_decrypt(who: Who, train: usize) -> Box<dyn Work> {
    let mut state = 0;
    traffic(
        who.world(),
        move |world| {
            for buffer in 0..BURST {
                let client = who.next(world.clients.len(), &mut state);
                world.lay(buffer, client, train, |c| {
                    c.packet(Kind::Tcp, false, TCP_PAYLOAD)
                });
            }
        },
        |world| world.worker.received(BURST),
    )
}

fn few_or_many_encrypt(who: Who, train: usize) -> Box<dyn Work> {
    let mut state = 0;
    let reads = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    let laid = std::rc::Rc::clone(&reads);
    traffic(
        who.world(),
        move |world| {
            let mut laid = laid.borrow_mut();
            laid.clear();
            laid.extend((0..BURST).map(|_| {
                let client = &world.clients[who.next(world.clients.len(), &mut state)];
                if train == 1 {
                    client.answer(Kind::Tcp, false, TCP_PAYLOAD)
                } else {
                    client.answers(Kind::Tcp, train, TCP_PAYLOAD)
                }
            }));
        },
        move |world| {
            let mut reads = reads.borrow_mut();
            world
                .worker
                .read(reads.iter_mut().map(|read: &mut Vec<u8>| &mut read[..]));
        },
    )
}

// ---- parts ---------------------------------------------------------------------------------------

fn cipher_decrypt() -> Box<dyn Work> {
    let world = World::new(1, false);
    // The client decrypts what the gateway's session has encrypted for it.
    let read = world.clients[0].answer(Kind::Udp, false, UDP_PAYLOAD);
    let peer = world.peer(0);
    let packet = inner(&read).to_vec();
    part(
        (
            world,
            vec![vec![0; packet.len() + WIREGUARD]; TRAIN],
            [0; 2048],
        ),
        move |(_, messages, _)| {
            let mut tunn = peer.tunn();
            for message in messages {
                let done = tunn.encapsulate(&packet, message);
                assert!(matches!(done, TunnResult::WriteToNetwork(_)));
            }
        },
        |(world, messages, out)| {
            let tunn = &mut world.clients[0].tunn;
            for message in messages {
                let done = tunn.decapsulate(None, message, out);
                assert!(matches!(done, TunnResult::WriteToTunnelV4(..)));
            }
        },
    )
}

fn cipher_encrypt() -> Box<dyn Work> {
    let world = World::new(1, false);
    let read = world.clients[0].answer(Kind::Udp, false, UDP_PAYLOAD);
    part((world, [0; 2048]), nothing, move |(world, out)| {
        let tunn = &mut world.clients[0].tunn;
        for _ in 0..TRAIN {
            let done = tunn.encapsulate(inner(&read), out);
            assert!(matches!(done, TunnResult::WriteToNetwork(_)));
        }
    })
}

fn parse(dst: std::net::IpAddr, kind: Kind) -> Box<dyn Work> {
    let world = World::new(1, false);
    let client = &world.clients[0];
    let src = if dst.is_ipv4() {
        client.ipv4
    } else {
        client.ipv6
    };
    let packet = packet(kind, (src, dst), (50_000, PORT), 1, 1200);
    part(packet, nothing, |packet| {
        for _ in 0..REPEATED {
            let meta = Meta::parse(black_box(packet)).unwrap();
            black_box(FlowKey::outbound(&meta));
        }
    })
}

fn verdict_hit(from_client: bool) -> Box<dyn Work> {
    let mut world = World::new(1, false);
    let out = meta(&world.clients[0].packet(Kind::Tcp, false, TCP_PAYLOAD));
    let back = meta(inner(&world.clients[0].answer(
        Kind::Tcp,
        false,
        TCP_PAYLOAD,
    )));
    part(world, nothing, move |world| {
        let policy = &world.clients[0].policy;
        for _ in 0..REPEATED {
            let flow = if from_client {
                let meta = black_box(&out);
                world
                    .worker
                    .admit_outbound(policy, policy.generation(), meta)
            } else {
                world.worker.admit_inbound(policy, black_box(&back))
            };
            assert!(flow.is_ok_and(|flow| flow.is_some()));
        }
    })
}

/// The policy has changed since, or another flow took the place.
fn verdict_known() -> Box<dyn Work> {
    let mut world = World::new(1, false);
    let out = meta(&world.clients[0].packet(Kind::Tcp, false, TCP_PAYLOAD));
    let generation = Cell::new(1 << 40);
    part(world, nothing, move |world| {
        let policy = &world.clients[0].policy;
        for _ in 0..REPEATED {
            generation.set(generation.get() + 1);
            let flow = world
                .worker
                .admit_outbound(policy, generation.get(), black_box(&out));
            assert!(flow.is_ok_and(|flow| flow.is_some()));
        }
    })
}

fn verdict_new() -> Box<dyn Work> {
    let world = World::new(1, false);
    let src = world.clients[0].ipv4;
    let metas: Vec<Meta> = (0..REPEATED as u16)
        .map(|n| meta(&packet(Kind::Udp, (src, HOST4), (1024 + n, PORT), 1, 1200)))
        .collect();
    part(
        world,
        |world| world.forget_flows(0),
        move |world| {
            let policy = &world.clients[0].policy;
            for meta in &metas {
                let flow = world
                    .worker
                    .admit_outbound(policy, policy.generation(), meta);
                assert!(flow.is_ok_and(|flow| flow.is_some()));
            }
        },
    )
}

fn verdict_denied() -> Box<dyn Work> {
    let world = World::new(1, false);
    let src = world.clients[0].ipv4;
    let meta = meta(&packet(
        Kind::Tcp,
        (src, FORBIDDEN),
        (50_000, PORT),
        1,
        1200,
    ));
    part(world, nothing, move |world| {
        let policy = &world.clients[0].policy;
        for _ in 0..REPEATED {
            let denied = world
                .worker
                .admit_outbound(policy, policy.generation(), black_box(&meta));
            assert!(denied.is_err());
        }
    })
}

/// Of the flow to a DNS resource.
fn translate(v6: bool, out: bool) -> Box<dyn Work> {
    let mut world = World::new(1, false);
    world.announce(0);
    let client = &world.clients[0];
    let (src, proxy) = if v6 {
        (client.ipv6, PROXY6)
    } else {
        (client.ipv4, PROXY4)
    };
    let from_client = packet(Kind::Tcp, (src, proxy), (50_000, PORT), 1, 1200);
    let passed = client.policy.admit_outbound(&meta(&from_client), world.now);
    let flow: Arc<Flow> = passed.unwrap().flow.unwrap();
    assert!(flow.is_translated());
    let tick = client.policy.tick(world.now);
    let packet = if out {
        from_client
    } else {
        let ports = (PORT, flow.outside_port());
        packet(Kind::Tcp, (flow.outside(), src), ports, 1, 1200)
    };
    let read = meta(&packet);
    // Over and over: what is written is the same each time, and costs as much.
    part((world, packet), nothing, move |(_, packet)| {
        for _ in 0..REPEATED {
            if out {
                flow.pass_out(tick, black_box(&read), packet);
            } else {
                flow.pass_in(tick, black_box(&read), packet);
            }
        }
        black_box(packet);
    })
}

const DATA: [u8; 1312] = {
    let mut message = [0; 1312];
    message[0] = 4;
    message
};

const CHANNEL_DATA: [u8; 1316] = {
    let mut datagram = [0; 1316];
    let len = (DATA.len() as u16).to_be_bytes();
    (datagram[0], datagram[1]) = (0x40, 1);
    (datagram[2], datagram[3]) = (len[0], len[1]);
    datagram[4] = 4;
    datagram
};

fn demux(datagram: &'static [u8], is_data: bool) -> Box<dyn Work> {
    let is_data = is_data || datagram[0] == 4;
    part(World::new(1, false), nothing, move |world| {
        for _ in 0..REPEATED {
            let index = world.worker.demux(black_box(relay()), black_box(datagram));
            assert_eq!(index.is_some(), is_data);
        }
    })
}

/// A connectivity check, up to the queue of the slow path.
fn stun() -> Box<dyn Work> {
    let mut check = vec![0; 100];
    check[..8].copy_from_slice(&[0, 1, 0, 80, 0x21, 0x12, 0xA4, 0x42]);
    let from = SocketAddr::from(([198, 18, 0, 1], 40_000));
    let mut world = World::new(1, false);
    let ends = (
        from,
        firezone_gateway::datapath::worker::bench::ByHand::address(),
    );
    world
        .worker
        .buffers()
        .pretend(0, ends, check.len(), |storage| {
            for n in 0..REPEATED {
                storage[n * check.len()..][..check.len()].copy_from_slice(&check);
            }
            REPEATED * check.len()
        });
    let laid = Cell::new(false);
    part(
        world,
        move |world| {
            let taken = world.worker.take_slow();
            assert_eq!(taken, if laid.replace(true) { REPEATED } else { 0 });
        },
        |world| world.worker.received(1),
    )
}

fn split(kind: Kind, payload: usize) -> Box<dyn Work> {
    let world = World::new(1, false);
    let original = world.clients[0].answers(kind, TRAIN, payload);
    part(
        original.clone(),
        move |read| read.copy_from_slice(&original),
        |read| {
            let (header, packet) = read.split_first_chunk_mut::<HEADER_LEN>().unwrap();
            let mut packets = Split::new(Header::parse(header).unwrap(), packet).unwrap();
            let mut count = 0;
            while let Some(made) = packets.next_packet() {
                black_box(made);
                count += 1;
            }
            assert_eq!(count, TRAIN);
        },
    )
}

/// With the copy that puts each packet there, in the place of the cipher.
fn coalesce(kind: Kind, payload: usize) -> Box<dyn Work> {
    let mut world = World::new(1, false);
    let packets: Vec<Vec<u8>> = (0..TRAIN)
        .map(|_| world.clients[0].packet(kind, false, payload))
        .collect();
    let metas: Vec<Meta> = packets.iter().map(|packet| meta(packet)).collect();
    let offloads = Offloads {
        header: true,
        tso: true,
        uso: true,
    };
    let sink = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/null")
        .unwrap();
    let tun = Tun::stand_in(sink.into(), offloads);
    let peer = world.peer(0);
    part(Coalescer::new(offloads), nothing, move |coalescer| {
        for (packet, meta) in packets.iter().zip(&metas) {
            coalescer.slot()[..packet.len()].copy_from_slice(packet);
            coalescer.push(&peer, meta);
        }
        let mut writes = 0;
        coalescer.flush(&tun.queues()[0], |_, _, _, result| {
            result.unwrap();
            writes += 1;
        });
        assert_eq!(writes, 1, "all in one");
    })
}

fn sum(len: usize) -> Box<dyn Work> {
    part(vec![0xA5; len], nothing, |data| {
        for _ in 0..REPEATED {
            black_box(checksum::of(black_box(data)));
        }
    })
}

fn sum_update() -> Box<dyn Work> {
    part(0x1234, nothing, |sum| {
        for _ in 0..REPEATED {
            *sum = checksum::update(*sum, black_box(&[10, 0, 0, 1]), black_box(&[10, 99, 0, 2]));
        }
    })
}
