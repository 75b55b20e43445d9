//! Gateway, client, relays and the network between them, in virtual time.

#![allow(clippy::unwrap_used)]

use super::*;

pub(super) const GATEWAY: &str = "198.51.100.1:52625";
pub(super) const CLIENT: &str = "203.0.113.9:40000";
/// The other family, where both have it; preferred, and lost together with the first.
pub(super) const GATEWAY_V6: &str = "[2001:db8:1::1]:52625";
pub(super) const CLIENT_V6: &str = "[2001:db8:2::9]:40000";
/// Where the client's own relay lends it an address.
pub(super) const CLIENT_RELAYED: &str = "192.0.2.9:50000";
pub(super) const RELAYS: [&str; 3] = ["192.0.2.1:3478", "192.0.2.2:3478", "192.0.2.3:3478"];

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) gateway: Connectivity,
    pub(super) client: IceAgent,
    pub(super) relays: Vec<TurnServer>,
    /// The client sees packets from relays come from other ports than they say.
    pub(super) relays_behind_nat: bool,
    /// Share of datagrams between the two that are lost; relays have a loss of their own:
    /// they can be silent.
    pub(super) direct_loss: f64,
    /// The client's own relay is gone.
    pub(super) client_relay_silent: bool,
    pub(super) rng: SmallRng,
    /// Whether candidates get through, which takes the portal.
    pub(super) portal: bool,
    pub(super) waiting: Vec<Event>,
    /// Whether packets pass.
    pub(super) active: bool,
    pub(super) next_second: Instant,
    /// How late timers are noticed.
    pub(super) lateness: Duration,
    /// Since the start of the last [`Self::run`], every path the gateway used.
    pub(super) paths: Vec<(Duration, PathKind)>,
    /// Why it changed, each time since the start.
    pub(super) reasons: Vec<PathReason>,
    /// How often there was no path at all.
    pub(super) gaps: usize,
    pub(super) wake_ups: usize,
    pub(super) failures: usize,
    pub(super) client_sends_to: Option<(Instant, SocketAddr)>,
    pub(super) offers: usize,
    pub(super) withdrawals: usize,
}

impl World {
    pub(super) fn client(now: Instant) -> IceAgent {
        let mut client = controlling_agent();
        client.add_local_candidate(Candidate::host(sock(CLIENT), "udp").unwrap());
        client.handle_timeout(now);
        client
    }

    /// Connected directly, with a relay as the other possibility.
    pub(super) fn new() -> Self {
        Self::with_relays(1)
    }

    pub(super) fn with_relays(relays: usize) -> Self {
        Self::with(relays, false, false)
    }

    pub(super) fn with(relays: usize, dual: bool, client_relay: bool) -> Self {
        let mut world = Self::before(relays, dual, client_relay);
        world.run(1.0);
        world.authorize();
        world.run(5.0);
        assert_eq!(world.kind(), Some(PathKind::Direct));
        let direct = sock(if dual { GATEWAY_V6 } else { GATEWAY });
        assert_eq!(world.client_sends_to.unwrap().1, direct);
        world
    }

    /// Before the client asks for access.
    pub(super) fn before(relays: usize, dual: bool, client_relay: bool) -> Self {
        let now = Instant::now();
        let client = Self::client(now);
        let mut gateway = Connectivity::new(1);
        gateway.add_host(now, sock(GATEWAY));
        let mut client = client;
        if dual {
            gateway.add_host(now, sock(GATEWAY_V6));
            client.add_local_candidate(Candidate::host(sock(CLIENT_V6), "udp").unwrap());
        }
        if client_relay {
            let relayed = Candidate::relayed(sock(CLIENT_RELAYED), sock(CLIENT), "udp");
            client.add_local_candidate(relayed.unwrap());
        }
        let entries: Vec<RelayEntry> = (1..)
            .zip(&RELAYS[..relays])
            .map(|(n, socket)| RelayEntry {
                id: RelayId(Uuid::from_u128(n)),
                v4: Some(sock(socket)),
                v6: None,
                username: USER.to_owned(),
                password: SecretString::from(PASSWORD),
                expires_at: 2_145_916_800,
            })
            .collect();
        gateway.upsert_relays(now, &entries);
        Self {
            now,
            gateway,
            client,
            relays: RELAYS[..relays]
                .iter()
                .map(|socket| {
                    let ip = sock(socket).ip().to_string();
                    TurnServer::new(Style::Stock, &[socket], &[&ip])
                })
                .collect(),
            relays_behind_nat: false,
            direct_loss: 0.0,
            client_relay_silent: false,
            rng: SmallRng::seed_from_u64(7),
            portal: true,
            waiting: Vec::new(),
            active: true,
            next_second: now,
            lateness: Duration::ZERO,
            paths: Vec::new(),
            reasons: Vec::new(),
            gaps: 0,
            wake_ups: 0,
            failures: 0,
            client_sends_to: None,
            offers: 0,
            withdrawals: 0,
        }
    }

    /// The client's pace of checks (data-path spec §2.4), and whether packets pass.
    pub(super) fn set_active(&mut self, active: bool) {
        self.set_client_active(active);
        self.active = active;
    }

    pub(super) fn set_client_active(&mut self, active: bool) {
        let (initial, max, retransmits) = if active {
            (250, 1500, 12)
        } else {
            (25_000, 25_000, 4)
        };
        self.client
            .set_initial_stun_rto(Duration::from_millis(initial));
        self.client.set_max_stun_rto(Duration::from_millis(max));
        self.client.set_max_stun_retransmits(retransmits);
        self.client.handle_timeout(self.now);
    }

    /// What the portal does when the client asks for access.
    pub(super) fn authorize(&mut self) {
        let (ours, theirs) = (creds("gtwy"), creds("clnt"));
        self.gateway.upsert(self.now, id(), &ours, &theirs, false);
        let lines: Vec<String> = self
            .client
            .local_candidates()
            .map(|c| c.to_sdp_string())
            .collect();
        self.gateway.add_remote_candidates(self.now, id(), &lines);
    }

    pub(super) fn kind(&self) -> Option<PathKind> {
        self.gateway.describe(id())?.path.map(|path| path.kind)
    }

    pub(super) fn lost(&mut self) -> bool {
        self.direct_loss > 0.0 && self.rng.random_bool(self.direct_loss)
    }

    pub(super) fn arrive_at_client(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
        payload: &[u8],
    ) {
        let message = StunMessage::parse(payload).unwrap();
        self.client.handle_packet(
            self.now,
            StunPacket {
                proto: Protocol::Udp,
                source,
                destination,
                message,
            },
        );
    }

    /// The relay that an address belongs to.
    pub(super) fn relay_at(&self, ip: IpAddr) -> Option<usize> {
        RELAYS[..self.relays.len()]
            .iter()
            .position(|socket| sock(socket).ip() == ip)
    }

    /// The relayed address behind which the client sees us there.
    pub(super) fn relayed(&self, relay: usize) -> Option<SocketAddr> {
        let ip = sock(RELAYS[relay]).ip();
        self.client
            .remote_candidates()
            .find(|c| c.kind() == is::CandidateKind::Relayed && c.addr().ip() == ip)
            .map(|c| c.addr())
    }

    pub(super) fn exchange(&mut self, begun: Instant) {
        loop {
            let mut quiet = true;
            while let Some(t) = self.gateway.poll_transmit() {
                quiet = false;
                if let Some(ip) = t.source {
                    assert!([GATEWAY, GATEWAY_V6].iter().any(|a| sock(a).ip() == ip));
                    assert_eq!(ip.is_ipv4(), t.destination.is_ipv4(), "one family");
                }
                if let Some(n) = self.relay_at(t.destination.ip()) {
                    let relay = &mut self.relays[n];
                    let answer = relay.handle(self.now, sock(GATEWAY), t.destination, &t.payload);
                    let forwarded = std::mem::take(&mut relay.forwarded);
                    if let Some(answer) = answer {
                        self.gateway
                            .handle_packet(self.now, sock(GATEWAY), t.destination, &answer);
                    }
                    for (_, peer, payload) in forwarded {
                        if peer == sock(CLIENT)
                            && let Some(mut relayed) = self.relayed(n)
                        {
                            if self.relays_behind_nat {
                                relayed.set_port(relayed.port() - 1000);
                            }
                            self.arrive_at_client(relayed, peer, &payload);
                        }
                    }
                } else if t.destination == sock(CLIENT_RELAYED) {
                    if !self.client_relay_silent {
                        self.arrive_at_client(sock(GATEWAY), t.destination, &t.payload);
                    }
                } else if [sock(CLIENT), sock(CLIENT_V6)].contains(&t.destination) && !self.lost() {
                    let v6 = t.destination.is_ipv6();
                    let source = sock(if v6 { GATEWAY_V6 } else { GATEWAY });
                    self.arrive_at_client(source, t.destination, &t.payload);
                }
            }
            assert_eq!(self.gateway.relays.poll_transmit(), None, "left behind");
            while let Some(t) = self.client.poll_transmit() {
                quiet = false;
                let bytes: Vec<u8> = t.contents.into();
                if [sock(GATEWAY), sock(GATEWAY_V6)].contains(&t.destination) {
                    let arrives = if t.source == sock(CLIENT_RELAYED) {
                        !self.client_relay_silent
                    } else {
                        !self.lost()
                    };
                    if arrives {
                        self.gateway
                            .handle_packet(self.now, t.destination, t.source, &bytes);
                    }
                } else if let Some(n) = self.relay_at(t.destination.ip())
                    && !self.relays[n].silent
                    && let Some((to, datagram)) =
                        self.relays[n].packet_from(self.now, sock(CLIENT), &bytes)
                {
                    self.gateway
                        .handle_packet(self.now, to, sock(RELAYS[n]), &datagram);
                }
            }
            while let Some(event) = self.client.poll_event() {
                if let IceAgentEvent::NominatedSend { destination, .. } = event {
                    self.client_sends_to = Some((self.now, destination));
                }
            }
            while let Some(event) = self.gateway.poll_event() {
                match &event {
                    Event::PathChanged { path, reason, .. } => {
                        self.told(path.map(|p| p.kind), *reason);
                        match path {
                            Some(path) => self.paths.push((self.now - begun, path.kind)),
                            None => self.gaps += 1,
                        }
                        continue;
                    }
                    Event::CandidatesAdded { .. } => self.offers += 1,
                    Event::CandidatesInvalidated { .. } => self.withdrawals += 1,
                    Event::Failed { .. } => {
                        self.failures += 1;
                        continue;
                    }
                    _ => continue,
                }
                self.waiting.push(event);
            }
            self.gateway.set_can_signal(self.now, self.portal);
            if self.portal {
                for event in std::mem::take(&mut self.waiting) {
                    self.signal(&event);
                }
            }
            if quiet {
                return;
            }
        }
    }

    /// What the status says of a change fits what is told of it.
    pub(super) fn told(&mut self, to: Option<PathKind>, reason: PathReason) {
        self.reasons.push(reason);
        let gone = [
            PathReason::Disconnected,
            PathReason::RelayLost,
            PathReason::Withdrawn,
        ];
        assert!(to.is_some() || gone.contains(&reason), "{reason:?}");
        assert!(to.is_none() || reason != PathReason::Disconnected, "{to:?}");
        // It may have failed for good meanwhile.
        let Some(view) = self.gateway.describe(id()) else {
            return;
        };
        assert!((1..=8).contains(&view.history.len()));
        assert_eq!(view.history.len() as u64, 8.min(1 + view.path_changes));
        for steps in view.history.windows(2) {
            assert_eq!(steps[0].to, steps[1].from);
            assert!(steps[0].at <= steps[1].at);
        }
        let last = view.history.last().unwrap();
        assert_eq!(last.to, view.path.map(|p| p.kind));
        assert_eq!(Some(last.at), view.path_since);
        if view.history.len() == 1 + usize::try_from(view.path_changes).unwrap() {
            assert_eq!(view.history[0].reason, PathReason::Nominated);
            assert_eq!(view.history[0].from, None);
        }
    }

    pub(super) fn signal(&mut self, event: &Event) {
        let candidate = |line: &String| Candidate::from_sdp_string(line).unwrap();
        match event {
            Event::CandidatesAdded { candidates, .. } => {
                for line in candidates {
                    self.client.add_remote_candidate(candidate(line));
                }
            }
            Event::CandidatesInvalidated { candidates, .. } => {
                for line in candidates {
                    self.client.invalidate_candidate(&candidate(line));
                }
            }
            _ => {}
        }
        self.client.handle_timeout(self.now);
    }

    pub(super) fn run(&mut self, seconds: f64) {
        let begun = self.now;
        let end = self.now + Duration::from_secs_f64(seconds);
        self.paths.clear();
        self.exchange(begun);
        loop {
            let next = [
                self.gateway.poll_timeout().map(|(at, _)| at),
                self.client.poll_timeout(),
                Some(self.next_second),
            ]
            .into_iter()
            .flatten()
            .min();
            let Some(next) = next.filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(next + self.lateness);
            if self.next_second <= self.now {
                self.next_second = self.now + Duration::from_secs(1);
                if self.active {
                    self.gateway.note_activity(self.now, id());
                }
            }
            if self
                .gateway
                .poll_timeout()
                .is_some_and(|(at, _)| at <= self.now)
            {
                self.wake_ups += 1;
                self.gateway.handle_timeout(self.now);
            }
            self.client.handle_timeout(self.now);
            self.exchange(begun);
        }
        self.now = end;
    }
}
