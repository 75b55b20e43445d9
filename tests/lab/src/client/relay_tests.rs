#![allow(clippy::unwrap_used)]

use super::*;

fn entry(id: u128, addr: &str) -> RelayEntry {
    RelayEntry {
        id: Uuid::from_u128(id),
        kind: "turn".into(),
        addr: addr.parse().unwrap(),
        username: "user".into(),
        password: Secret::new("pass"),
    }
}

fn drain(queue: &mut TransmitQueue) -> Vec<(SocketAddr, Vec<u8>)> {
    std::iter::from_fn(|| queue.pop())
        .flat_map(|b| {
            b.buf
                .chunks(b.segment)
                .map(|c| (b.dst, c.to_vec()))
                .collect::<Vec<_>>()
        })
        .collect()
}

fn binding_answer(request: &[u8], mapped: SocketAddr) -> Vec<u8> {
    let request = Message::from_bytes(request).unwrap();
    let mut builder = Message::builder_success(&request, MessageWriteVec::new());
    builder
        .add_attribute(&XorMappedAddress::new(mapped, request.transaction_id()))
        .unwrap();
    builder.finish()
}

#[test]
fn silent_relay_gets_four_bindings_and_is_dropped_after_eight_seconds() {
    let start = Instant::now();
    let mut relays = Relays::new(start, true, true, false);
    let mut out = TransmitQueue::default();
    relays.upsert(start, &[entry(1, "203.0.113.1:3478")]);
    assert!(relays.take_changed());
    let mut sent = Vec::new();
    let mut now = start;
    while !relays.is_empty() {
        relays.handle_timeout(now, &mut out);
        for _ in drain(&mut out) {
            sent.push((now - start).as_millis());
        }
        let Some(next) = relays.poll_timeout() else {
            break;
        };
        now = next.max(now + Duration::from_millis(1));
    }
    assert_eq!(sent, [0, 1000, 2500, 4750]);
    assert_eq!((now - start).as_secs(), 8);
    assert!(relays.take_changed());
    let late = relays.handle_stun(
        now,
        "10.0.0.1:5000".parse().unwrap(),
        "203.0.113.1:3478".parse().unwrap(),
        &[0; 20],
    );
    assert_eq!(late, StunOutcome::Late);
}

#[test]
fn binding_reveals_addresses_and_starts_an_unsigned_allocate() {
    let start = Instant::now();
    let relay: SocketAddr = "203.0.113.1:3478".parse().unwrap();
    let local: SocketAddr = "10.0.0.1:5000".parse().unwrap();
    let mapped: SocketAddr = "198.51.100.4:40000".parse().unwrap();
    let mut relays = Relays::new(start, true, false, false);
    let mut out = TransmitQueue::default();
    relays.upsert(
        start,
        &[entry(1, "203.0.113.1:3478"), entry(1, "[2001:db8::1]:3478")],
    );
    relays.handle_timeout(start, &mut out);
    let requests = drain(&mut out);
    assert_eq!(requests.len(), 1, "no IPv6 socket, no IPv6 request");
    assert_eq!(requests[0].0, relay);

    let now = start + Duration::from_millis(30);
    let answer = binding_answer(&requests[0].1, mapped);
    relays.take_changed();
    assert_eq!(
        relays.handle_stun(now, local, relay, &answer),
        StunOutcome::Consumed
    );
    assert!(relays.take_changed());
    let (_, path) = relays.paths().next().unwrap();
    assert_eq!(path.local(), Some(local));
    assert_eq!(path.mapped(), Some(mapped));
    assert_eq!(path.rtt(), Some(Duration::from_millis(30)));

    relays.handle_timeout(now, &mut out);
    let requests = drain(&mut out);
    assert_eq!(requests.len(), 1);
    // Method Allocate, class request (RFC 8656 §17), and no USERNAME (0x0006) among the attributes.
    assert_eq!(requests[0].1[..2], [0x00, 0x03]);
    let message = Message::from_bytes(&requests[0].1).unwrap();
    assert!(
        message
            .attribute::<turn_client_proto::stun::types::attribute::Username>()
            .is_err()
    );
}

#[test]
fn same_entries_keep_a_relay_and_new_credentials_replace_it() {
    let start = Instant::now();
    let mut relays = Relays::new(start, true, true, false);
    relays.upsert(start, &[entry(1, "203.0.113.1:3478")]);
    assert!(relays.take_changed());
    relays.upsert(start, &[entry(1, "203.0.113.1:3478")]);
    assert!(!relays.take_changed());
    let mut renewed = entry(1, "203.0.113.1:3478");
    renewed.password = Secret::new("other");
    relays.upsert(start, &[renewed]);
    assert!(relays.take_changed());
    assert_eq!(relays.paths().count(), 1);
    relays.remove(&[Uuid::from_u128(1)]);
    assert!(relays.is_empty());
}

#[test]
fn stun_entries_are_ignored() {
    let start = Instant::now();
    let mut relays = Relays::new(start, true, true, false);
    let mut stun = entry(1, "203.0.113.1:3478");
    stun.kind = "stun".into();
    relays.upsert(start, &[stun]);
    assert!(relays.is_empty());
}

/// A coturn on loopback, and everything that goes through it.
mod coturn {
    use super::*;
    use std::net::UdpSocket;
    use std::process::{Child, Command, Stdio};

    struct Server {
        process: Child,
        dir: std::path::PathBuf,
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    fn start(ip: &str) -> Server {
        let dir = std::env::temp_dir().join(format!("lab-coturn-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let process = Command::new("turnserver")
            .args([
                "-n",
                "--listening-port=3478",
                "--realm=firezone",
                "--user=user:pass",
                "--lt-cred-mech",
                "--no-tls",
                "--no-dtls",
                "--no-cli",
                "--no-tcp",
                "--allow-loopback-peers",
                "--log-file=stdout",
                "--min-port=51000",
                "--max-port=51100",
            ])
            .arg(format!("--listening-ip={ip}"))
            .arg(format!("--relay-ip={ip}"))
            .arg(format!("--userdb={}/db", dir.display()))
            .arg(format!("--pidfile={}/pid", dir.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("turnserver is installed");
        Server { process, dir }
    }

    struct Harness {
        relays: Relays,
        out: TransmitQueue,
        socket: UdpSocket,
        local: SocketAddr,
        received: Vec<(SocketAddr, Vec<u8>)>,
    }

    impl Harness {
        fn run_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(15);
            let mut buf = [0u8; 2048];
            while !done(self) {
                let now = Instant::now();
                assert!(now < deadline, "no {what} within 15 s");
                self.relays.handle_timeout(now, &mut self.out);
                for (dst, datagram) in drain(&mut self.out) {
                    self.socket.send_to(&datagram, dst).unwrap();
                }
                let Ok((len, from)) = self.socket.recv_from(&mut buf) else {
                    continue;
                };
                let datagram = &buf[..len];
                match crate::client::demux::relay_step(from, datagram) {
                    crate::client::demux::RelayStep::Stun => {
                        self.relays
                            .handle_stun(Instant::now(), self.local, from, datagram);
                    }
                    crate::client::demux::RelayStep::ChannelData { number, payload } => {
                        if let ChannelOutcome::Peer { peer, .. } =
                            self.relays.handle_channel_data(from, number)
                        {
                            self.received.push((peer, payload.to_vec()));
                        }
                    }
                    crate::client::demux::RelayStep::Other => panic!("unexpected {datagram:?}"),
                }
            }
        }
    }

    fn round_trip(ip: &str) {
        let _server = start(ip);
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let peer = UdpSocket::bind((ip, 0)).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let peer_addr = peer.local_addr().unwrap();
        let start = Instant::now();
        let mut harness = Harness {
            relays: Relays::new(start, true, true, false),
            out: TransmitQueue::default(),
            local: socket.local_addr().unwrap(),
            socket,
            received: Vec::new(),
        };
        let relay = SocketAddr::new(ip.parse().unwrap(), 3478);
        harness
            .relays
            .upsert(start, &[entry(1, &relay.to_string())]);
        let relay_id = Uuid::from_u128(1);
        // Wanted before there is an allocation: must be bound once there is one.
        harness.relays.want_channel(start, relay_id, peer_addr);
        harness.run_until("allocation", |h| h.relays.has_allocation(relay_id));
        assert_eq!(harness.relays.best(), Some(relay_id));
        let relayed = harness.relays.paths().next().unwrap().1.relayed().unwrap();
        assert_eq!(relayed.ip(), relay.ip());
        assert!((51000..=51100).contains(&relayed.port()));
        harness.run_until("channel", |h| {
            h.relays.paths().next().unwrap().1.channel_peers().count() == 1
        });

        // Length not a multiple of four: padding would be visible.
        let message = [0x5Au8; 1311];
        assert!(harness.relays.send(
            Instant::now(),
            relayed,
            peer_addr,
            &message,
            &mut harness.out
        ));
        for (dst, datagram) in drain(&mut harness.out) {
            assert_eq!(datagram.len(), 4 + message.len());
            harness.socket.send_to(&datagram, dst).unwrap();
        }
        let mut buf = [0u8; 2048];
        let (len, from) = peer.recv_from(&mut buf).unwrap();
        assert_eq!((&buf[..len], from), (&message[..], relayed));
        peer.send_to(&buf[..len], from).unwrap();
        harness.run_until("echo", |h| !h.received.is_empty());
        assert_eq!(harness.received, [(peer_addr, message.to_vec())]);

        let unbound: SocketAddr = SocketAddr::new(relay.ip(), 9);
        assert!(
            !harness
                .relays
                .send(Instant::now(), relayed, unbound, b"x", &mut harness.out)
        );
        harness.relays.release(Instant::now(), &mut harness.out);
        // A bind for the stranger above may be queued before it, but must not take its place.
        let released = drain(&mut harness.out);
        let refreshes = released.iter().filter(|(_, d)| d[..2] == [0x00, 0x04]);
        assert_eq!(refreshes.count(), 1, "one REFRESH in {released:?}");
    }

    #[test]
    #[ignore = "needs coturn"]
    fn allocation_channel_and_echo_over_ipv4() {
        round_trip("127.0.0.61");
    }

    #[test]
    #[ignore = "needs coturn"]
    fn allocation_channel_and_echo_over_ipv6() {
        round_trip("::1");
    }
}
