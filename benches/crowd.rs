//! What many clients cost that are connected and say nothing: memory and CPU time of the gateway's process;
//! run by `scripts/bench --clients`.
//!
//! The gateway is the real one, in a network namespace of its own. In another one this program plays the
//! portal and every client: each has an address, an ICE agent with the timing of an idle client, and a
//! WireGuard session, which it renews every three minutes. Nobody has a relay.
#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use clap::Parser;
use firezone_gateway::net::{Family, RecvBuffers, SocketOptions, UdpSocket};
use firezone_lab::netns::Net;
use firezone_lab::usage::Usage;
use futures_util::{SinkExt as _, StreamExt as _};
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, IceAgent, IceAgentEvent, IceCreds, Protocol};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

/// Has idle clients, and prints what they cost.
#[derive(Parser)]
#[command(name = "scripts/bench --clients")]
struct Args {
    /// How many.
    #[arg(long, default_value_t = 10_000)]
    clients: usize,
    /// For how long the gateway is watched once all are quiet.
    #[arg(long, default_value_t = 75)]
    seconds: u64,
    /// Profiles the gateway with `perf` meanwhile, into this file.
    #[arg(long)]
    perf: Option<PathBuf>,
    /// Settings of the gateway, `NAME=VALUE`.
    #[arg(long = "env")]
    env: Vec<String>,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

const PORTAL: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The first client's address; the others follow.
const FIRST: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 1);
const PORT: u16 = 40_000;
/// Clients that are being connected at the same time.
const AT_ONCE: usize = 100;
/// How often datagrams and timers are looked after.
const STEP: Duration = Duration::from_millis(5);
/// By then both ends have found that nothing goes on.
const QUIET_AFTER: Duration = Duration::from_secs(35);
/// A client renews its session by itself.
const SESSION: Duration = Duration::from_secs(180);
/// It tries again after this if there was no answer.
const AGAIN: Duration = Duration::from_secs(5);
/// An idle client checks the path this often.
const IDLE_CHECK: Duration = Duration::from_secs(25);
/// What the gateway may use, in all and per client.
const MAX_CORE: f64 = 0.03;
const MAX_MEMORY: f64 = 16.0 * 1024.0;

fn main() -> Result<()> {
    // `cargo test --benches` only wants to know that it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let args = Args::parse();
    ensure!(rustix::process::geteuid().is_root(), "namespaces need root");
    let gateway = match std::env::var_os("FIREZONE_LAB_BIN_DIR") {
        Some(dir) => PathBuf::from(dir).join("firezone-gateway"),
        None => PathBuf::from(env!("CARGO_BIN_EXE_firezone-gateway")),
    };
    let mut net = Net::new("crowd")?;
    for host in ["crowd", "gateway"] {
        net.host(host)?;
    }
    net.link(
        ("crowd", "eth0", &["198.51.100.1/24"]),
        ("gateway", "eth0", &["198.51.100.2/24"]),
    )?;
    net.sh("crowd", "ip route add local 10.64.0.0/16 dev lo")?;
    net.sh("gateway", "ip route add default via 198.51.100.1")?;
    start(&mut net, &gateway, &args)?;
    let pid = net.pid("gateway")?;
    let costs = net.within("crowd", || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(watch(pid, &args))
    });
    let costs = costs.with_context(|| net.log("gateway"))?;
    let clients = args.clients as f64;
    let memory = (costs.after.resident - costs.before.resident) / clients;
    let seconds = costs.watched.as_secs_f64();
    let user = (costs.after.user - costs.quiet.user) / seconds;
    let system = (costs.after.system - costs.quiet.system) / seconds;
    println!(
        "{} clients, connected and idle, for {seconds:.0} s",
        args.clients
    );
    println!(
        "memory per client       {:8.1} KiB (at most {:.0})",
        memory / 1024.0,
        MAX_MEMORY / 1024.0
    );
    println!(
        "one core                {:8.2} % (user {:.2}, system {:.2}; at most {:.0})",
        (user + system) * 100.0,
        user * 100.0,
        system * 100.0,
        MAX_CORE * 100.0
    );
    println!(
        "context switches        {:8.0} per second",
        (costs.after.switches - costs.quiet.switches) / seconds
    );
    println!(
        "setting all up          {:8.1} s of CPU time, {:.2} ms per client",
        costs.setup,
        costs.setup * 1000.0 / clients
    );
    ensure!(memory <= MAX_MEMORY, "too much memory per client");
    ensure!(user + system <= MAX_CORE, "too much CPU time");
    Ok(())
}

fn start(net: &mut Net, gateway: &Path, args: &Args) -> Result<()> {
    let state = net.dir().join("state");
    std::fs::create_dir_all(&state)?;
    let state = state.to_string_lossy().into_owned();
    let url = format!("ws://{PORTAL}:8081");
    let mut env = vec![
        ("FIREZONE_TOKEN", ".lab-gateway-token-000000"),
        ("FIREZONE_ID", "lab-gateway"),
        ("FIREZONE_API_URL", url.as_str()),
        ("FIREZONE_STATE_DIR", &state),
        ("RUST_LOG", "warn"),
    ];
    for pair in &args.env {
        env.push(
            pair.split_once('=')
                .with_context(|| format!("no value: {pair}"))?,
        );
    }
    net.start("gateway", "gateway", gateway, &[], &env)
}

struct Costs {
    /// Without clients.
    before: Usage,
    /// Of connecting them all.
    setup: f64,
    /// When all were connected and quiet.
    quiet: Usage,
    after: Usage,
    watched: Duration,
}

async fn watch(pid: u32, args: &Args) -> Result<Costs> {
    let mut crowd = Crowd::meet(args.clients).await?;
    let begin = Instant::now();
    crowd
        .live(|_| begin.elapsed() > Duration::from_secs(2))
        .await?;
    let before = Usage::of(pid)?;
    for _ in 0..AT_ONCE {
        crowd.ask_for_next().await?;
    }
    let limit = Duration::from_secs(60) + Duration::from_millis(20) * args.clients as u32;
    crowd
        .live(|c| c.established == c.members.len() || begin.elapsed() > limit)
        .await?;
    let connected = Usage::of(pid)?;
    ensure!(
        crowd.established == args.clients,
        "only {} of {} clients got through in {limit:?}",
        crowd.established,
        args.clients
    );
    println!("all connected after {:.1} s", begin.elapsed().as_secs_f64());
    crowd.settle(Instant::now());
    let since = Instant::now();
    crowd.live(|_| since.elapsed() > QUIET_AFTER).await?;
    let quiet = Usage::of(pid)?;
    let perf = args.perf.as_ref().map(|file| {
        std::process::Command::new("perf")
            .args([
                "record",
                "-q",
                "-F",
                "997",
                "-g",
                "-p",
                &pid.to_string(),
                "-o",
            ])
            .arg(file)
            .args(["--", "sleep", &args.seconds.to_string()])
            .spawn()
    });
    let handshakes = crowd.handshakes;
    let since = Instant::now();
    crowd
        .live(|_| since.elapsed() > Duration::from_secs(args.seconds))
        .await?;
    let (after, watched) = (Usage::of(pid)?, since.elapsed());
    if let Some(child) = perf {
        child.context("perf")?.wait()?;
    }
    ensure!(
        crowd.lost == 0,
        "{} clients lost their connection",
        crowd.lost
    );
    println!(
        "{} sessions were renewed meanwhile",
        crowd.handshakes - handshakes
    );
    Ok(Costs {
        before,
        setup: connected.user + connected.system - before.user - before.system,
        quiet,
        after,
        watched,
    })
}

/// One client.
struct Member {
    address: SocketAddr,
    agent: IceAgent,
    tunn: Tunn,
    /// The gateway's end of the pair in use.
    gateway: Option<SocketAddr>,
    has_session: bool,
    /// When it renews its session.
    renewal: Option<Instant>,
    timer: Option<Instant>,
}

/// The portal and all its clients.
struct Crowd {
    gateway: WebSocketStream<TcpStream>,
    socket: UdpSocket,
    buffers: RecvBuffers,
    members: Vec<Member>,
    timers: BTreeSet<(Instant, usize)>,
    asked: usize,
    established: usize,
    handshakes: usize,
    lost: usize,
}

fn secret(n: usize) -> StaticSecret {
    let mut secret = [7; 32];
    // Not the first bits: X25519 sets those itself.
    secret[8..16].copy_from_slice(&(n as u64).to_le_bytes());
    StaticSecret::from(secret)
}

fn id(n: usize) -> Uuid {
    Uuid::from_u128(0xC11E_0000 + n as u128)
}

fn credentials(side: &str, n: usize) -> IceCreds {
    IceCreds {
        ufrag: format!("{side}{n}"),
        pass: format!("{side}-password-{n:012}"),
    }
}

impl Crowd {
    /// Waits for the gateway to join.
    #[expect(clippy::result_large_err, reason = "the library's callback")]
    async fn meet(clients: usize) -> Result<Self> {
        let listener = TcpListener::bind((PORTAL, 8081)).await?;
        let patience = Duration::from_secs(20);
        let (stream, _) = tokio::time::timeout(patience, listener.accept())
            .await
            .context("the gateway does not come")??;
        stream.set_nodelay(true)?;
        let key = std::cell::Cell::new(None);
        let gateway = tokio_tungstenite::accept_hdr_async(
            stream,
            |request: &tokio_tungstenite::tungstenite::handshake::server::Request, response| {
                key.set(public_key(request.uri().query().unwrap_or_default()));
                Ok(response)
            },
        )
        .await?;
        let key = key.take().context("the gateway told no public key")?;
        let socket = UdpSocket::bind(
            Family::V4,
            SocketOptions {
                port: PORT,
                ..SocketOptions::default()
            },
        )?;
        Ok(Self {
            gateway,
            socket,
            buffers: RecvBuffers::new(),
            members: (0..clients).map(|n| Member::new(n, key)).collect(),
            timers: BTreeSet::new(),
            asked: 0,
            established: 0,
            handshakes: 0,
            lost: 0,
        })
    }

    /// Does what comes up, until `done`.
    async fn live(&mut self, done: impl Fn(&Self) -> bool) -> Result<()> {
        let mut steps = tokio::time::interval(STEP);
        steps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !done(self) {
            tokio::select! {
                frame = self.gateway.next() => {
                    let frame = frame.context("the gateway has gone")??;
                    if let Message::Text(text) = frame {
                        self.frame(&serde_json::from_str(&text)?).await?;
                    }
                }
                _ = steps.tick() => {
                    self.receive()?;
                    let now = Instant::now();
                    while let Some((_, n)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
                        self.timeout(now, n)?;
                    }
                    while self.established + AT_ONCE > self.asked && self.established > 0
                        && self.asked < self.members.len()
                    {
                        self.ask_for_next().await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn send(&mut self, frame: Value) -> Result<()> {
        self.gateway.send(Message::text(frame.to_string())).await?;
        Ok(())
    }

    async fn push(&mut self, event: &str, payload: Value) -> Result<()> {
        self.send(json!({"topic": "gateway", "event": event, "ref": null, "payload": payload}))
            .await
    }

    async fn frame(&mut self, frame: &Value) -> Result<()> {
        let payload = &frame["payload"];
        match frame["event"].as_str().unwrap_or_default() {
            "broadcast_ice_candidates" => {
                for n in Self::numbers(&payload["client_ids"])? {
                    for line in payload["candidates"].as_array().into_iter().flatten() {
                        let candidate =
                            Candidate::from_sdp_string(line.as_str().unwrap_or_default())?;
                        self.members[n].agent.add_remote_candidate(candidate);
                    }
                    let now = Instant::now();
                    // Only after a first one does it say when it wants the next.
                    self.members[n].agent.handle_timeout(now);
                    self.move_on(now, n)?;
                }
                return Ok(());
            }
            "broadcast_invalidated_ice_candidates" | "no_relays" | "set_snownet_capabilities" => {
                return Ok(());
            }
            "authorization_created" => {
                let reference = payload["ref"].as_str().unwrap_or_default();
                let n: usize = reference.parse()?;
                let mut candidate = Candidate::host(self.members[n].address, "udp")?;
                candidate.set_ufrag(&credentials("c", n).ufrag);
                let line = candidate.to_sdp_string();
                let payload = json!({"client_id": id(n), "candidates": [line]});
                self.push("ice_candidates", payload).await?;
            }
            _ => {}
        }
        self.send(json!({
            "topic": frame["topic"], "event": "phx_reply", "ref": frame["ref"],
            "payload": {"status": "ok", "response": {}},
        }))
        .await?;
        if frame["event"] == "phx_join" {
            let init = json!({
                "interface": {"ipv4": "100.64.0.1", "ipv6": "fd00:2021:1111::ffff"},
                "config": {"ipv4_masquerade_enabled": true, "ipv6_masquerade_enabled": true},
                "account_slug": "crowd", "relays": [], "authorizations": [],
            });
            self.push("init", init).await?;
        }
        Ok(())
    }

    fn numbers(ids: &Value) -> Result<Vec<usize>> {
        ids.as_array()
            .into_iter()
            .flatten()
            .map(|text| {
                let uuid: Uuid = text.as_str().unwrap_or_default().parse()?;
                Ok((uuid.as_u128() - id(0).as_u128()) as usize)
            })
            .collect()
    }

    /// Lets the next client ask for access.
    async fn ask_for_next(&mut self) -> Result<()> {
        let n = self.asked;
        if n == self.members.len() {
            return Ok(());
        }
        self.asked += 1;
        let (ours, theirs) = (credentials("c", n), credentials("g", n));
        let ipv4 = Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 2).to_bits() + n as u32);
        let ipv6 = Ipv6Addr::from_bits(0xfd00_2021_1111 << 80 | (n as u128 + 1));
        let payload = json!({
            "ref": n.to_string(),
            "resource": {"type": "cidr", "id": Uuid::from_u128(0x0E50_0000), "name": "network",
                "address": "10.99.0.0/24", "filters": []},
            "client": {"id": id(n), "ipv4": ipv4, "ipv6": ipv6,
                "public_key": BASE64.encode(PublicKey::from(&secret(n)).as_bytes()),
                "preshared_key": BASE64.encode([3; 32])},
            "client_ice_credentials": {"username": ours.ufrag, "password": ours.pass},
            "gateway_ice_credentials": {"username": theirs.ufrag, "password": theirs.pass},
            "expires_at": null,
            "use_iceless": false,
        });
        self.push("create_authorization", payload).await
    }

    fn receive(&mut self) -> Result<()> {
        let mut buffers = std::mem::take(&mut self.buffers);
        let now = Instant::now();
        while let Ok(filled) = self.socket.recv(&mut buffers) {
            for datagram in buffers.datagrams(filled) {
                let Some(IpAddr::V4(to)) = datagram.to else {
                    bail!("no address");
                };
                let n = to.to_bits().wrapping_sub(FIRST.to_bits()) as usize;
                if n < self.members.len() {
                    self.datagram(now, n, datagram.from, datagram.payload)?;
                }
            }
        }
        self.buffers = buffers;
        Ok(())
    }

    fn datagram(
        &mut self,
        now: Instant,
        n: usize,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Result<()> {
        let member = &mut self.members[n];
        if let Ok(message) = StunMessage::parse(datagram) {
            member.agent.handle_packet(
                now,
                StunPacket {
                    proto: Protocol::Udp,
                    source: from,
                    destination: member.address,
                    message,
                },
            );
            return self.move_on(now, n);
        }
        let mut buffer = [0; 2048];
        match member.tunn.decapsulate(None, datagram, &mut buffer) {
            TunnResult::WriteToNetwork(message) => {
                if message.first() == Some(&4) {
                    self.handshakes += 1;
                    if !std::mem::replace(&mut member.has_session, true) {
                        self.established += 1;
                        member.renewal = Some(now + SESSION);
                    }
                }
                self.socket
                    .send(Some(member.address.ip()), from, 0, message, None)?;
            }
            // An answer that took longer than the client waited.
            TunnResult::Err(WireGuardError::UnexpectedPacket) => {}
            TunnResult::Err(error) => bail!("client {n}: {error:?}"),
            _ => {}
        }
        Ok(())
    }

    fn timeout(&mut self, now: Instant, n: usize) -> Result<()> {
        let member = &mut self.members[n];
        member.agent.handle_timeout(now);
        if member.renewal.is_some_and(|at| at <= now) {
            self.initiate(now, n)?;
        }
        self.move_on(now, n)
    }

    /// Sends what the agent has to send, and sees what it has found.
    fn move_on(&mut self, now: Instant, n: usize) -> Result<()> {
        let member = &mut self.members[n];
        for _ in 0..100 {
            match member.agent.poll_timeout() {
                Some(at) if at <= now => member.agent.handle_timeout(now),
                _ => break,
            }
        }
        let mut nominated = false;
        while let Some(event) = member.agent.poll_event() {
            match event {
                IceAgentEvent::NominatedSend { destination, .. } => {
                    nominated |= member.gateway.replace(destination).is_none();
                }
                IceAgentEvent::IceConnectionStateChange(state) if state.is_disconnected() => {
                    self.lost += 1;
                }
                _ => {}
            }
        }
        while let Some(transmit) = member.agent.poll_transmit() {
            let source = Some(transmit.source.ip());
            self.socket
                .send(source, transmit.destination, 0, &transmit.contents, None)?;
        }
        if nominated {
            self.initiate(now, n)?;
        }
        let member = &mut self.members[n];
        let next = [member.agent.poll_timeout(), member.renewal]
            .into_iter()
            .flatten()
            .min();
        if member.timer != next {
            if let Some(former) = std::mem::replace(&mut member.timer, next) {
                self.timers.remove(&(former, n));
            }
            self.timers.extend(next.map(|at| (at, n)));
        }
        Ok(())
    }

    fn initiate(&mut self, now: Instant, n: usize) -> Result<()> {
        let member = &mut self.members[n];
        // Too many at once are put off.
        let next = if member.has_session { SESSION } else { AGAIN };
        member.renewal = Some(now + next);
        let Some(gateway) = member.gateway else {
            return Ok(());
        };
        let mut buffer = [0; 2048];
        if let TunnResult::WriteToNetwork(message) =
            member.tunn.format_handshake_initiation(&mut buffer, true)
        {
            self.socket
                .send(Some(member.address.ip()), gateway, 0, message, None)?;
        }
        Ok(())
    }

    /// All are connected: from now on they check their paths as seldom as idle clients do, and renew
    /// their sessions one after the other.
    fn settle(&mut self, now: Instant) {
        let all = self.members.len() as u32;
        for (n, member) in (0..).zip(&mut self.members) {
            member.agent.set_initial_stun_rto(IDLE_CHECK);
            member.agent.set_max_stun_rto(IDLE_CHECK);
            member.agent.set_max_stun_retransmits(4);
            member.renewal = Some(now + SESSION * n / all);
            // Looked at soon, and then when it has said.
            let soon = now + STEP;
            if let Some(former) = member.timer.replace(soon) {
                self.timers.remove(&(former, n as usize));
            }
            self.timers.insert((soon, n as usize));
        }
    }
}

impl Member {
    fn new(n: usize, gateway: [u8; 32]) -> Self {
        let address = Ipv4Addr::from_bits(FIRST.to_bits() + n as u32);
        let address = SocketAddr::from((address, PORT));
        let mut agent = IceAgent::new(credentials("c", n));
        agent.set_controlling(true);
        agent.set_remote_credentials(credentials("g", n));
        agent.set_timing_advance(Duration::ZERO);
        if let Ok(candidate) = Candidate::host(address, "udp") {
            agent.add_local_candidate(candidate);
        }
        let key = PublicKey::from(gateway);
        Self {
            address,
            agent,
            tunn: Tunn::new(secret(n), key, Some([3; 32]), None, n as u32, None),
            gateway: None,
            has_session: false,
            renewal: None,
            timer: None,
        }
    }
}

/// The gateway's key, as it tells the portal when it connects.
fn public_key(query: &str) -> Option<[u8; 32]> {
    let (_, value) =
        url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "public_key")?;
    BASE64.decode(value.as_bytes()).ok()?.try_into().ok()
}
