//! The TURN client against Debian's coturn over real sockets.
//!
//! `cargo nextest run --run-ignored only --test turn_coturn`
#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use firezone_gateway::connectivity::relay::{
    Allocation, AllocationEvent, RelayError, channel_data,
};
use firezone_gateway::ids::RelayId;
use firezone_gateway::portal::messages::RelayEntry;
use hmac::{Hmac, Mac};
use secrecy::SecretString;
use sha1::Sha1;
use uuid::Uuid;

const TURNSERVER: &str = "/usr/bin/turnserver";
const SECRET: &str = "coturn-test-secret";

/// A running coturn; ends with the test.
struct Coturn {
    child: Child,
    addr: SocketAddr,
    dir: tempfile::TempDir,
}

impl Coturn {
    fn start(extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Free a moment ago; good enough for a test.
        let port = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        let child = Self::spawn(&dir, addr, extra);
        Self { child, addr, dir }
    }

    fn spawn(dir: &tempfile::TempDir, addr: SocketAddr, extra: &[&str]) -> Child {
        Command::new(TURNSERVER)
            .args([
                "-n",
                "--listening-ip",
                "127.0.0.1",
                "--relay-ip",
                "127.0.0.1",
            ])
            .args(["--listening-port", &addr.port().to_string()])
            .args(["--use-auth-secret", "--static-auth-secret", SECRET])
            .args([
                "--realm",
                "firezone",
                "--no-tls",
                "--no-dtls",
                "--no-tcp",
                "--no-cli",
            ])
            .args([
                "--allow-loopback-peers",
                "--log-file",
                "stdout",
                "--simple-log",
            ])
            .arg("--pidfile")
            .arg(dir.path().join("pid"))
            .arg("--userdb")
            .arg(dir.path().join("db"))
            .args(extra)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn restart(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.child = Self::spawn(&self.dir, self.addr, &[]);
    }

    /// Credentials as coturn's `use-auth-secret` expects them: the password is
    /// base64(HMAC-SHA1(secret, user name)).
    fn entry(&self) -> RelayEntry {
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let expires_at = unix + 3600;
        let username = format!("{expires_at}:gateway");
        let password = STANDARD.encode(hmac_sha1(SECRET.as_bytes(), username.as_bytes()));
        RelayEntry {
            id: RelayId(Uuid::new_v4()),
            v4: Some(self.addr),
            v6: None,
            username,
            password: SecretString::from(password),
            expires_at,
        }
    }
}

impl Drop for Coturn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hmac_sha1(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha1>::new_from_slice(key).unwrap();
    mac.update(message);
    mac.finalize().into_bytes().to_vec()
}

/// An allocation on a real socket.
struct Client {
    socket: UdpSocket,
    local: SocketAddr,
    allocation: Allocation,
    events: Vec<AllocationEvent>,
}

impl Client {
    fn new(entry: &RelayEntry) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let local = socket.local_addr().unwrap();
        Self {
            socket,
            local,
            allocation: Allocation::new(Instant::now(), entry, Uuid::new_v4().as_u64_pair().0),
            events: Vec::new(),
        }
    }

    /// Sends what is to be sent and takes one datagram; answers it when it is not STUN.
    fn step(&mut self) -> Option<Vec<u8>> {
        let now = Instant::now();
        if self
            .allocation
            .poll_timeout()
            .is_some_and(|(at, _)| at <= now)
        {
            self.allocation.handle_timeout(now);
        }
        while let Some(transmit) = self.allocation.poll_transmit() {
            self.socket
                .send_to(&transmit.payload, transmit.dst)
                .unwrap();
        }
        self.events
            .extend(std::iter::from_fn(|| self.allocation.poll_event()));
        let mut buffer = [0; 2048];
        let (len, from) = match self.socket.recv_from(&mut buffer) {
            Ok(received) => received,
            // Nothing yet, or an ICMP error because the server is still starting.
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::ConnectionRefused
                ) =>
            {
                return None;
            }
            Err(e) => panic!("{e}"),
        };
        let datagram = &buffer[..len];
        if channel_data::is_channel_data(datagram) {
            return Some(datagram.to_vec());
        }
        assert!(
            self.allocation
                .handle_packet(Instant::now(), self.local, from, datagram)
        );
        self.events
            .extend(std::iter::from_fn(|| self.allocation.poll_event()));
        None
    }

    fn run_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(
                Instant::now() < end,
                "{what}: {:?}",
                self.allocation.status(Instant::now(), 0.0)
            );
            self.step();
        }
    }

    fn settle(&mut self) {
        let end = Instant::now() + Duration::from_millis(200);
        while Instant::now() < end {
            self.step();
        }
    }

    fn has_lost(&self) -> bool {
        self.events.iter().any(|e| {
            matches!(
                e,
                AllocationEvent::Lost { .. } | AllocationEvent::Invalidated { .. }
            )
        })
    }
}

fn echo(client: &mut Client, peer: &UdpSocket, payload: &[u8]) {
    let peer_addr = peer.local_addr().unwrap();
    let path = client
        .allocation
        .channel_to(Instant::now(), peer_addr)
        .unwrap();
    let mut datagram = channel_data::header(path.channel, payload.len())
        .unwrap()
        .to_vec();
    datagram.extend_from_slice(payload);
    client.socket.send_to(&datagram, path.relay).unwrap();

    let mut buffer = [0; 2048];
    let (len, from) = peer.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], payload);
    let relayed: Vec<_> = client.allocation.relayed().collect();
    assert_eq!(relayed, [from]);
    peer.send_to(&buffer[..len], from).unwrap();

    let end = Instant::now() + Duration::from_secs(5);
    loop {
        assert!(Instant::now() < end, "no echo");
        let Some(datagram) = client.step() else {
            continue;
        };
        let inner = client
            .allocation
            .decapsulate(Instant::now(), &datagram)
            .unwrap();
        assert_eq!(inner.peer, peer_addr);
        assert_eq!(inner.relayed, from);
        assert_eq!(inner.payload, payload);
        return;
    }
}

#[test]
#[ignore = "needs coturn"]
fn coturn_relays_both_ways_refreshes_and_releases() {
    let coturn = Coturn::start(&[]);
    let entry = coturn.entry();
    let mut client = Client::new(&entry);
    client.run_until("allocate", |c| c.allocation.is_allocated());
    assert_eq!(client.allocation.active_socket(), Some(coturn.addr));
    assert!(client.allocation.rtt().unwrap() < Duration::from_secs(8));

    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let peer_addr = peer.local_addr().unwrap();
    client.allocation.bind_channel(Instant::now(), peer_addr);
    client.run_until("bind", |c| {
        c.allocation.status(Instant::now(), 0.0).channels == 1
    });
    let payload: Vec<u8> = (0..1400u32).map(|n| n.to_le_bytes()[0]).collect();
    // Sizes whose channel data would need padding, too.
    for len in [1400, 1399, 1398, 1397, 1, 0] {
        echo(&mut client, &peer, &payload[..len]);
    }

    // `poke` sends a REFRESH, but not within its first seconds; virtual time is shorter than real.
    let later = Instant::now() + Duration::from_secs(10);
    client.allocation.poke(later);
    client.settle();
    assert!(!client.has_lost(), "{:?}", client.events);
    assert_eq!(
        client.allocation.status(Instant::now(), 0.0).last_error,
        None
    );
    echo(&mut client, &peer, &payload);

    let path = client
        .allocation
        .channel_to(Instant::now(), peer_addr)
        .unwrap();
    client.allocation.release(Instant::now());
    client.run_until("release", |c| c.allocation.is_finished());
    let mut datagram = channel_data::header(path.channel, 4).unwrap().to_vec();
    datagram.extend_from_slice(b"late");
    peer.set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    // coturn takes a second to let go.
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        client.socket.send_to(&datagram, path.relay).unwrap();
        if peer.recv_from(&mut [0; 16]).is_err() {
            break;
        }
        assert!(Instant::now() < end, "the relay still forwards");
    }

    // The same socket may allocate again at once.
    client.allocation = Allocation::new(Instant::now(), &entry, 5);
    client.run_until("allocate again", |c| c.allocation.is_allocated());
}

#[test]
#[ignore = "needs coturn"]
fn allocation_that_a_crashed_gateway_left_on_coturn_is_cleared_away() {
    let coturn = Coturn::start(&[]);
    let entry = coturn.entry();
    let mut client = Client::new(&entry);
    client.run_until("allocate", |c| c.allocation.is_allocated());
    let first: Vec<_> = client.allocation.relayed().collect();

    client.allocation = Allocation::new(Instant::now(), &entry, 6);
    client.run_until("allocate again", |c| c.allocation.is_allocated());
    let second: Vec<_> = client.allocation.relayed().collect();
    assert_ne!(first, second);
}

#[test]
#[ignore = "needs coturn"]
fn coturn_that_restarts_is_used_again() {
    let mut coturn = Coturn::start(&[]);
    let entry = coturn.entry();
    let mut client = Client::new(&entry);
    client.run_until("allocate", |c| c.allocation.is_allocated());

    coturn.restart();
    std::thread::sleep(Duration::from_secs(1));
    let later = Instant::now() + Duration::from_secs(10);
    client.allocation.poke(later);
    client.run_until("notice", |c| c.has_lost());
    client.run_until("allocate again", |c| c.allocation.is_allocated());
}

#[test]
#[ignore = "needs coturn"]
fn coturn_names_wrong_credentials() {
    let coturn = Coturn::start(&[]);
    let mut entry = coturn.entry();
    entry.password = SecretString::from("wrong");
    let mut client = Client::new(&entry);
    client.run_until("refusal", Client::has_lost);
    assert_eq!(
        client.events.last(),
        Some(&AllocationEvent::Lost {
            cause: RelayError::BadCredentials
        })
    );
}

#[test]
#[ignore = "needs coturn"]
fn coturn_quota_is_named() {
    let coturn = Coturn::start(&["--user-quota", "1"]);
    let entry = coturn.entry();
    let mut first = Client::new(&entry);
    first.run_until("allocate", |c| c.allocation.is_allocated());
    let mut second = Client::new(&entry);
    second.run_until("refusal", Client::has_lost);
    assert_eq!(
        second.events.last(),
        Some(&AllocationEvent::Lost {
            cause: RelayError::QuotaReached
        })
    );
}
