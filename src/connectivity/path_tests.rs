//! A direct path that dies and comes back, in virtual time: gateway, client, and a relay in
//! between that keeps working.

#![allow(clippy::unwrap_used)]

use is::stun::StunPacket;
use is::{Candidate, IceAgent, IceAgentEvent, Protocol};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use secrecy::SecretString;
use uuid::Uuid;

use super::fixtures::{check, controlling_agent, creds, id, sock};
use super::relay::double::{ALLOCATE, CHANNEL_BIND, PASSWORD, Style, TurnServer, USER};
use super::*;
use crate::datapath::peers::PathKind;
use crate::ids::RelayId;

const GATEWAY: &str = "198.51.100.1:52625";
const CLIENT: &str = "203.0.113.9:40000";
/// The other family, where both have it; preferred, and lost together with the first.
const GATEWAY_V6: &str = "[2001:db8:1::1]:52625";
const CLIENT_V6: &str = "[2001:db8:2::9]:40000";
/// Where the client's own relay lends it an address.
const CLIENT_RELAYED: &str = "192.0.2.9:50000";
const RELAYS: [&str; 3] = ["192.0.2.1:3478", "192.0.2.2:3478", "192.0.2.3:3478"];

struct World {
    now: Instant,
    gateway: Connectivity,
    client: IceAgent,
    relays: Vec<TurnServer>,
    /// The client sees packets from relays come from other ports than they say.
    relays_behind_nat: bool,
    /// Share of datagrams between the two that are lost; relays have a loss of their own:
    /// they can be silent.
    direct_loss: f64,
    /// The client's own relay is gone.
    client_relay_silent: bool,
    rng: SmallRng,
    /// Whether candidates get through, which takes the portal.
    portal: bool,
    waiting: Vec<Event>,
    /// Whether packets pass.
    active: bool,
    next_second: Instant,
    /// How late timers are noticed.
    lateness: Duration,
    /// Since the start of the last [`Self::run`], every path the gateway used.
    paths: Vec<(Duration, PathKind)>,
    /// Why it changed, each time since the start.
    reasons: Vec<PathReason>,
    /// How often there was no path at all.
    gaps: usize,
    wake_ups: usize,
    failures: usize,
    client_sends_to: Option<(Instant, SocketAddr)>,
    offers: usize,
    withdrawals: usize,
}

impl World {
    fn client(now: Instant) -> IceAgent {
        let mut client = controlling_agent();
        client.add_local_candidate(Candidate::host(sock(CLIENT), "udp").unwrap());
        client.handle_timeout(now);
        client
    }

    /// Connected directly, with a relay as the other possibility.
    fn new() -> Self {
        Self::with_relays(1)
    }

    fn with_relays(relays: usize) -> Self {
        Self::with(relays, false, false)
    }

    fn with(relays: usize, dual: bool, client_relay: bool) -> Self {
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
    fn before(relays: usize, dual: bool, client_relay: bool) -> Self {
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
    fn set_active(&mut self, active: bool) {
        self.set_client_active(active);
        self.active = active;
    }

    fn set_client_active(&mut self, active: bool) {
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
    fn authorize(&mut self) {
        let (ours, theirs) = (creds("gtwy"), creds("clnt"));
        self.gateway.upsert(self.now, id(), &ours, &theirs, false);
        let lines: Vec<String> = self
            .client
            .local_candidates()
            .map(|c| c.to_sdp_string())
            .collect();
        self.gateway.add_remote_candidates(self.now, id(), &lines);
    }

    fn kind(&self) -> Option<PathKind> {
        self.gateway.describe(id())?.path.map(|path| path.kind)
    }

    fn lost(&mut self) -> bool {
        self.direct_loss > 0.0 && self.rng.random_bool(self.direct_loss)
    }

    fn arrive_at_client(&mut self, source: SocketAddr, destination: SocketAddr, payload: &[u8]) {
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
    fn relay_at(&self, ip: IpAddr) -> Option<usize> {
        RELAYS[..self.relays.len()]
            .iter()
            .position(|socket| sock(socket).ip() == ip)
    }

    /// The relayed address behind which the client sees us there.
    fn relayed(&self, relay: usize) -> Option<SocketAddr> {
        let ip = sock(RELAYS[relay]).ip();
        self.client
            .remote_candidates()
            .find(|c| c.kind() == is::CandidateKind::Relayed && c.addr().ip() == ip)
            .map(|c| c.addr())
    }

    fn exchange(&mut self, begun: Instant) {
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
    fn told(&mut self, to: Option<PathKind>, reason: PathReason) {
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

    fn signal(&mut self, event: &Event) {
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

    fn run(&mut self, seconds: f64) {
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

#[test]
fn a_dead_direct_path_is_left_by_both_ends_in_four_seconds() {
    for phase in 0..15 {
        let mut w = World::new();
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(6.0);
        let (after, kind) = w.paths[0];
        assert_eq!(kind, PathKind::RelayLocal);
        assert!(after <= Duration::from_secs(4), "{after:?}");
        let (at, to) = w.client_sends_to.unwrap();
        assert_ne!(to, sock(GATEWAY));
        assert!(at - cut <= Duration::from_secs(4), "{:?}", at - cut);
        assert_eq!(w.paths.len(), 1, "and no other change: {:?}", w.paths);
        assert_eq!(w.withdrawals, 1);
    }
}

#[test]
fn the_client_is_told_of_a_dead_path_in_the_moment_it_is_left() {
    for phase in 0..15 {
        let mut w = World::new();
        // Timers of real machines are late, so that nothing else happens in the same moment.
        w.lateness = Duration::from_millis(1);
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(6.0);
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(0), "{to}");
        assert_eq!(at - cut, w.paths[0].0);
    }
}

#[test]
fn a_pause_of_a_second_and_a_half_moves_nothing() {
    // Wherever between two checks it begins.
    for phase in 0..15 {
        let mut w = World::new();
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        w.run(1.5);
        w.direct_loss = 0.0;
        w.run(30.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
        assert_eq!(w.withdrawals, 0);
        assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    }
}

#[test]
fn with_both_families_dead_the_client_does_not_try_one_after_the_other() {
    for phase in 0..15 {
        let mut w = World::with(1, true, false);
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(6.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(0), "{to}");
        assert!(at - cut <= Duration::from_secs(5), "{:?}", at - cut);
        w.direct_loss = 0.0;
        w.run(15.0);
        assert_eq!(w.kind(), Some(PathKind::Direct));
        assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY_V6));
    }
}

#[test]
fn a_search_makes_pairs_of_one_family_only() {
    let mut w = World::with(1, true, false);
    w.direct_loss = 1.0;
    w.run(6.0);
    w.direct_loss = 0.0;
    w.run(30.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn an_address_that_only_the_clients_relay_reaches_does_not_keep_the_client() {
    for phase in 0..15 {
        let mut w = World::with(1, true, true);
        w.run(10.0 + 0.1 * f64::from(phase));
        w.direct_loss = 1.0;
        let cut = w.now;
        w.run(8.0);
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(0), "{to}");
        assert!(at - cut <= Duration::from_secs(5), "{:?}", at - cut);
        assert_ne!(w.kind(), Some(PathKind::Direct));
        assert_eq!(w.gaps, 0);
        w.direct_loss = 0.0;
        let withdrawals = w.withdrawals;
        w.run(15.0);
        assert_eq!(w.kind(), Some(PathKind::Direct));
        assert_eq!(w.withdrawals, withdrawals, "offered, and not taken back");
    }
}

#[test]
fn without_a_relay_of_ours_the_clients_is_not_cut_off() {
    let mut w = World::with(0, false, true);
    w.direct_loss = 1.0;
    w.run(60.0);
    assert_eq!(w.kind(), Some(PathKind::RelayRemote));
    assert_eq!(w.withdrawals, 0);
    assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    w.direct_loss = 0.0;
    w.run(60.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_lossy_direct_path_is_kept() {
    for seed in 0..10 {
        let mut w = World::new();
        w.rng = SmallRng::seed_from_u64(seed);
        w.direct_loss = 0.1;
        w.run(600.0);
        assert!(w.paths.is_empty(), "seed {seed}: {:?}", w.paths);
        assert_eq!(w.kind(), Some(PathKind::Direct));
    }
}

#[test]
fn both_ends_return_to_the_direct_path_when_it_works_again() {
    let mut w = World::new();
    w.direct_loss = 1.0;
    w.run(6.0);
    w.direct_loss = 0.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::Direct), "{:?}", w.paths);
    assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    assert_eq!(w.paths.len(), 1, "in one step: {:?}", w.paths);
    assert_eq!(w.gateway.describe(id()).unwrap().path_changes, 2);
}

#[test]
fn a_direct_path_that_stays_dead_is_looked_for_ever_more_rarely() {
    let mut w = World::new();
    w.direct_loss = 1.0;
    w.run(6.0);
    w.offers = 0;
    w.run(3600.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    assert!(w.paths.is_empty(), "traffic stays put: {:?}", w.paths);
    assert!((8..=14).contains(&w.offers), "{} offers", w.offers);
    assert!(w.withdrawals <= 1 + w.offers, "{}", w.withdrawals);
    // Whenever it comes back, it is found within the longest pause.
    w.direct_loss = 0.0;
    w.run(601.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn while_nothing_is_sent_nobody_looks_for_a_better_path() {
    let mut w = World::new();
    w.direct_loss = 1.0;
    w.run(6.0);
    w.set_active(false);
    w.run(30.0);
    w.offers = 0;
    w.run(3600.0);
    assert_eq!(w.offers, 0);
    w.set_active(true);
    w.direct_loss = 0.0;
    w.run(15.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

/// Its packets do not arrive, but its checks of other pairs do.
#[test]
fn a_client_that_wakes_up_on_a_dead_path_wakes_the_gateway() {
    let mut w = World::new();
    w.set_active(false);
    w.run(120.0);
    w.direct_loss = 1.0;
    w.run(5.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
    w.set_client_active(true);
    w.run(6.0);
    let (after, kind) = w.paths[0];
    assert_eq!(kind, PathKind::RelayLocal);
    assert!(after <= Duration::from_secs(6), "{after:?}");
    assert_ne!(w.client_sends_to.unwrap().1, sock(GATEWAY));
}

#[test]
fn what_was_found_dead_does_not_rise_because_nobody_sends() {
    for client_relay in [false, true] {
        for again in 0..30 {
            let mut w = World::with(1, false, client_relay);
            w.direct_loss = 1.0;
            w.run(6.0);
            let relayed = w.kind();
            assert_ne!(relayed, Some(PathKind::Direct));
            w.set_active(false);
            w.run(f64::from(15 + again));
            assert_eq!(w.paths, [], "{client_relay} {again}");
            // Whoever speaks first is heard.
            w.set_active(true);
            w.run(5.0);
            assert_eq!(w.paths, [], "{client_relay} {again}");
            assert_eq!((w.kind(), w.gaps), (relayed, 0));
        }
    }
}

#[test]
fn a_client_that_checks_as_idle_ones_do_leaves_the_gateway_idle() {
    let mut w = World::new();
    w.set_active(false);
    w.run(60.0);
    w.wake_ups = 0;
    w.run(3600.0);
    assert!(w.wake_ups < 1000, "{}", w.wake_ups);
}

#[test]
fn without_the_portal_the_gateway_moves_at_once_and_the_client_by_itself() {
    let mut w = World::new();
    w.portal = false;
    w.direct_loss = 1.0;
    w.run(4.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    w.run(20.0);
    assert_ne!(w.client_sends_to.unwrap().1, sock(GATEWAY));
    // It hears of everything at once when the portal is back.
    w.direct_loss = 0.0;
    w.portal = true;
    w.run(60.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
    assert_eq!(w.client_sends_to.unwrap().1, sock(GATEWAY));
}

#[test]
fn a_direct_path_that_keeps_failing_is_trusted_ever_less() {
    let mut w = World::new();
    let mut away = Vec::new();
    for _ in 0..5 {
        w.direct_loss = 1.0;
        w.run(6.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        w.direct_loss = 0.0;
        let left = w.now;
        while w.kind() != Some(PathKind::Direct) {
            w.run(1.0);
        }
        away.push((w.now - left).as_secs());
        w.run(10.0);
    }
    assert!(away[4] > 3 * away[0], "{away:?}");
    // A minute of good behaviour is enough.
    w.run(60.0);
    w.direct_loss = 1.0;
    w.run(6.0);
    w.direct_loss = 0.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

/// Direct is out of the question; returns the relay in use.
fn over_a_relay(w: &mut World) -> usize {
    w.direct_loss = 1.0;
    w.run(40.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    let (_, to) = w.client_sends_to.unwrap();
    w.relay_at(to.ip()).unwrap()
}

#[test]
fn a_relay_that_was_quicker_at_first_does_not_delay_the_search_for_a_direct_path() {
    let mut w = World::before(2, false, true);
    w.direct_loss = 1.0;
    w.run(1.0);
    w.authorize();
    w.run(0.3);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    w.direct_loss = 0.0;
    w.run(3.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
    w.direct_loss = 1.0;
    w.run(5.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    w.direct_loss = 0.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_relay_that_dies_is_replaced_by_the_one_that_is_kept_warm() {
    for phase in 0..10 {
        let mut w = World::with_relays(2);
        let first = over_a_relay(&mut w);
        w.run(0.1 * f64::from(phase));
        let allocations: usize = w.relays.iter().map(|r| r.count(ALLOCATE)).sum();
        w.relays[first].silent = true;
        let cut = w.now;
        w.run(6.0);
        let second = &w.gateway.describe(id()).unwrap();
        let ip = second.local.unwrap().ip();
        assert_ne!(w.relay_at(ip), Some(first));
        assert!(w.paths[0].0 <= Duration::from_millis(1400), "{:?}", w.paths);
        let (at, to) = w.client_sends_to.unwrap();
        assert_ne!(w.relay_at(to.ip()), Some(first));
        assert!(at - cut <= Duration::from_secs(4), "{:?}", at - cut);
        let after: usize = w.relays.iter().map(|r| r.count(ALLOCATE)).sum();
        assert_eq!(allocations, after, "nothing had to be allocated for it");
    }
}

#[test]
fn the_clients_own_relay_is_left_as_quickly_as_one_of_ours() {
    for phase in 0..10 {
        let mut w = World::with(2, false, true);
        // The better one of ours is away, so that the client's is the best there is. Until then our
        // address has been offered more than once.
        w.relays[0].silent = true;
        w.direct_loss = 1.0;
        w.run(40.0 + 0.1 * f64::from(phase));
        assert_eq!(w.kind(), Some(PathKind::RelayRemote));
        w.client_relay_silent = true;
        let cut = w.now;
        w.run(6.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        assert!(w.paths[0].0 <= Duration::from_millis(1400), "{:?}", w.paths);
        let (at, to) = w.client_sends_to.unwrap();
        assert_eq!(w.relay_at(to.ip()), Some(1), "{to}");
        assert!(at - cut <= Duration::from_secs(3), "{:?}", at - cut);
    }
}

#[test]
fn a_relay_that_forgets_us_leaves_no_gap_while_another_one_is_warm() {
    let mut w = World::with_relays(2);
    let first = over_a_relay(&mut w);
    w.relays[first].restart();
    w.gateway
        .relays
        .poke(w.now, RelayId(Uuid::from_u128(first as u128 + 1)));
    w.run(5.0);
    let ip = w.gateway.describe(id()).unwrap().local.unwrap().ip();
    assert_ne!(w.relay_at(ip), Some(first));
    assert_eq!(w.gaps, 0, "{:?}", w.paths);
}

#[test]
fn the_only_relay_is_used_again_soon_after_it_forgot_us() {
    for phase in 0..10 {
        let mut w = World::with_relays(1);
        let relay = over_a_relay(&mut w);
        w.run(0.1 * f64::from(phase));
        w.relays[relay].restart();
        let restarted = w.now;
        w.run(5.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (at, _) = w.client_sends_to.unwrap();
        assert!(at > restarted, "over a new address");
        let after = w.paths.last().unwrap().0;
        assert!(after <= Duration::from_millis(2500), "{:?}", w.paths);
    }
}

#[test]
fn a_relay_that_was_asked_just_before_it_forgot_us_is_asked_again() {
    let mut w = World::with_relays(1);
    let relay = over_a_relay(&mut w);
    w.gateway.relays.poke(w.now, RelayId(Uuid::from_u128(1)));
    w.gateway.handle_timeout(w.now);
    w.run(0.5);
    w.relays[relay].restart();
    w.run(6.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    let after = w.paths.last().unwrap().0;
    assert!(after <= Duration::from_secs(5), "{:?}", w.paths);
}

#[test]
fn a_relay_that_forgets_both_ends_is_used_again_without_the_clients_allocation() {
    for phase in 0..10 {
        let mut w = World::with(1, false, true);
        let relay = over_a_relay(&mut w);
        // It was asked just now, and is not asked again for five seconds: the path is lost by then.
        w.gateway.relays.poke(w.now, RelayId(Uuid::from_u128(1)));
        w.gateway.handle_timeout(w.now);
        w.run(0.1 + 0.1 * f64::from(phase));
        w.relays[relay].restart();
        w.client_relay_silent = true;
        let restarted = w.now;
        w.run(9.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (at, to) = w.client_sends_to.unwrap();
        assert!(at > restarted, "over a new address");
        assert_eq!(w.relay_at(to.ip()), Some(relay), "{to}");
    }
}

#[test]
fn a_relay_that_forgets_both_ends_does_not_hold_the_client_at_its_own_dead_address_there() {
    for phase in 0..10 {
        // Our own addresses were never withdrawn: the client reaches them through its relay.
        let mut w = World::before(2, false, true);
        w.direct_loss = 1.0;
        w.run(1.0);
        w.authorize();
        w.run(10.0 + 0.1 * f64::from(phase));
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let relay = w.relay_at(w.client_sends_to.unwrap().1.ip()).unwrap();
        w.relays[relay].restart();
        w.client_relay_silent = true;
        w.run(5.0);
        assert_eq!(w.kind(), Some(PathKind::RelayLocal));
        let (_, to) = w.client_sends_to.unwrap();
        assert!(w.relay_at(to.ip()).is_some(), "phase {phase}: {to}");
    }
}

#[test]
fn a_relay_that_pauses_for_half_a_second_is_kept() {
    let mut w = World::with_relays(2);
    let relay = over_a_relay(&mut w);
    for phase in 0..20 {
        w.run(10.0 + 0.05 * f64::from(phase));
        w.relays[relay].silent = true;
        w.run(0.6);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
        w.relays[relay].silent = false;
        w.run(10.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
    }
}

#[test]
fn a_relay_that_pauses_for_longer_is_left_once_and_taken_back_once() {
    for phase in 0..20 {
        let mut w = World::with_relays(2);
        let relay = over_a_relay(&mut w);
        w.run(10.0 + 0.05 * f64::from(phase));
        let before = w.reasons.len();
        w.relays[relay].silent = true;
        w.run(2.0);
        w.relays[relay].silent = false;
        w.run(60.0);
        let reasons = &w.reasons[before..];
        let expected = [PathReason::Dead, PathReason::Returned];
        assert_eq!(reasons, expected, "{phase}: {:?}", w.paths);
        assert_eq!(w.gaps, 0);
    }
}

#[test]
fn a_radio_link_that_is_silent_for_two_seconds_moves_nothing_between_relays() {
    for phase in 0..20 {
        let mut w = World::with_relays(2);
        over_a_relay(&mut w);
        w.run(10.0 + 0.05 * f64::from(phase));
        let silent = |w: &mut World, silent| w.relays.iter_mut().for_each(|r| r.silent = silent);
        silent(&mut w, true);
        w.run(2.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
        silent(&mut w, false);
        w.run(10.0);
        assert!(w.paths.is_empty(), "{phase}: {:?}", w.paths);
    }
}

#[test]
fn a_direct_path_never_notices_what_relays_do() {
    let mut w = World::with_relays(2);
    for _ in 0..20 {
        for n in 0..2 {
            w.relays[n].silent = true;
            w.run(7.0);
            assert!(w.paths.is_empty(), "{:?}", w.paths);
            w.relays[n].silent = false;
            w.run(13.0);
            assert!(w.paths.is_empty(), "{:?}", w.paths);
        }
    }
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_channel_that_was_refused_once_is_asked_for_again() {
    let mut w = World::new();
    w.relays[0].restart();
    w.relays[0].errors.push_back((CHANNEL_BIND, 508));
    w.gateway.relays.poke(w.now, RelayId(Uuid::from_u128(1)));
    // The relay was asked lately, and is not asked again at once.
    for _ in 0..60 {
        if w.relays[0].errors.is_empty() {
            break;
        }
        w.run(0.1);
    }
    assert!(w.relays[0].errors.is_empty(), "refused");
    assert_eq!(w.relays[0].channels(), []);
    w.direct_loss = 1.0;
    w.run(12.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    let binds = w.relays[0].count(CHANNEL_BIND);
    assert!(binds <= 4, "{binds}");
}

#[test]
fn an_address_of_a_relay_never_becomes_our_own() {
    let mut w = World::with_relays(3);
    let unused = w.relays.iter().position(|r| r.channels().is_empty());
    let n = unused.expect("a connection uses two relays");
    let (relay, client) = (RelayId(Uuid::from_u128(n as u128 + 1)), id());
    w.gateway.relays.bind_channel(w.now, relay, sock(CLIENT));
    w.gateway.drain_relays(w.now);
    w.run(0.1);
    let candidates = |w: &World| {
        let details = w.gateway.details(w.now, SystemTime::UNIX_EPOCH, client);
        details.unwrap().local_candidates
    };
    let before = candidates(&w);
    let (to, datagram) = w.relays[n]
        .packet_from(w.now, sock(CLIENT), &check(false))
        .unwrap();
    w.gateway
        .handle_packet(w.now, to, sock(RELAYS[n]), &datagram);
    assert_eq!(candidates(&w), before);
    assert_eq!(w.gateway.poll_transmit(), None, "and it is not answered");
}

// ---- What the status tells ----

fn reasons_since(w: &mut World, run: impl FnOnce(&mut World)) -> Vec<PathReason> {
    w.reasons.clear();
    run(w);
    std::mem::take(&mut w.reasons)
}

#[test]
fn a_path_that_dies_and_is_found_again_is_told_so() {
    let mut w = World::new();
    assert!(
        w.reasons.iter().all(|r| *r == PathReason::Nominated),
        "by and by, the client found the best: {:?}",
        w.reasons
    );
    let away = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(6.0);
    });
    assert_eq!(away, [PathReason::Dead]);
    let back = reasons_since(&mut w, |w| {
        w.direct_loss = 0.0;
        w.run(12.0);
    });
    assert_eq!(back, [PathReason::Returned]);
    let history = w.gateway.describe(id()).unwrap().history;
    let last: Vec<_> = history[history.len() - 2..]
        .iter()
        .map(|step| (step.from, step.to, step.reason))
        .collect();
    let (direct, relayed) = (Some(PathKind::Direct), Some(PathKind::RelayLocal));
    assert_eq!(
        last,
        [
            (direct, relayed, PathReason::Dead),
            (relayed, direct, PathReason::Returned)
        ]
    );
}

#[test]
fn what_the_client_nominates_after_a_death_is_told_as_its_choice() {
    let mut w = World::with(1, false, true);
    // As if the client preferred its relay: what we turn to by ourselves is not what it chooses.
    let relayed = Candidate::relayed(sock(CLIENT_RELAYED), sock(CLIENT), "udp").unwrap();
    let line = relayed.to_sdp_string();
    let higher = line.replace(
        &relayed.prio().to_string(),
        &(relayed.prio() + 10).to_string(),
    );
    assert_ne!(line, higher);
    w.gateway.invalidate_remote_candidates(w.now, id(), &[line]);
    w.gateway.add_remote_candidates(w.now, id(), &[higher]);
    w.run(5.0);
    let reasons = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(8.0);
    });
    let kinds: Vec<_> = w.paths.iter().map(|(_, kind)| *kind).collect();
    assert_eq!(kinds, [PathKind::RelayRemote, PathKind::RelayLocal]);
    assert_eq!(reasons, [PathReason::Dead, PathReason::Nominated]);
}

#[test]
fn a_long_hiccup_that_the_client_is_not_told_of_ends_in_a_return() {
    let mut w = World::new();
    w.portal = false;
    let reasons = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(6.0);
        w.direct_loss = 0.0;
        w.run(3.0);
    });
    assert_eq!(reasons, [PathReason::Dead, PathReason::Returned]);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}

#[test]
fn a_direct_path_that_never_was_is_returned_by_the_search_only() {
    let mut w = World::with(0, false, true);
    w.reasons.clear();
    let reasons = reasons_since(&mut w, |w| {
        w.direct_loss = 1.0;
        w.run(60.0);
        w.direct_loss = 0.0;
        w.run(60.0);
    });
    assert_eq!(reasons, [PathReason::Dead, PathReason::Returned]);
}

#[test]
fn a_relay_that_falls_silent_is_dead_and_one_that_forgets_us_is_lost() {
    let mut w = World::with_relays(2);
    let first = over_a_relay(&mut w);
    let reasons = reasons_since(&mut w, |w| {
        w.relays[first].silent = true;
        w.run(6.0);
    });
    assert_eq!(reasons, [PathReason::Dead]);

    let mut w = World::with_relays(2);
    let first = over_a_relay(&mut w);
    let reasons = reasons_since(&mut w, |w| {
        w.relays[first].restart();
        w.gateway
            .relays
            .poke(w.now, RelayId(Uuid::from_u128(first as u128 + 1)));
        w.run(5.0);
    });
    assert_eq!(reasons[0], PathReason::RelayLost);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
}

#[test]
fn pairs_tell_what_is_used_what_works_and_what_does_not() {
    let mut w = World::with(2, true, true);
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let details = |w: &World| w.gateway.details(w.now, wall, id()).unwrap();
    let all = details(&w);
    assert_eq!(all.local_candidate_count, all.local_candidates.len());
    let kinds = |candidates: &[CandidateStatus]| {
        candidates
            .iter()
            .map(|c| (c.kind, c.address.to_string()))
            .collect::<Vec<_>>()
    };
    use crate::admin::model::CandidateKind::{Host, Relayed};
    let ours = kinds(&all.local_candidates);
    assert_eq!(
        ours[..2],
        [(Host, GATEWAY_V6.to_owned()), (Host, GATEWAY.to_owned())],
        "by priority"
    );
    assert_eq!(ours.iter().filter(|(kind, _)| *kind == Relayed).count(), 2);
    assert_eq!(
        kinds(&all.remote_candidates),
        [
            (Host, CLIENT_V6.to_owned()),
            (Host, CLIENT.to_owned()),
            (Relayed, CLIENT_RELAYED.to_owned())
        ]
    );
    // Three of ours for each of the two IPv4 ones, and one for the IPv6 one.
    assert_eq!((all.pair_count, all.pairs.len()), (7, 7));
    let first = all.pairs[0];
    assert_eq!(
        (first.local, first.remote),
        (sock(GATEWAY_V6), sock(CLIENT_V6))
    );
    assert!(first.in_use && first.nominated);
    let age = 1_800_000_000.0 - first.answered_at.unwrap();
    assert!((0.0..=1.0).contains(&age), "{age}");
    assert_eq!(all.pairs.iter().filter(|p| p.in_use).count(), 1);

    w.direct_loss = 1.0;
    w.run(8.0);
    let later = details(&w);
    let first = later.pairs[0];
    assert!(first.in_use);
    assert_eq!(first.local_kind, Some(Relayed));
    let dead = later
        .pairs
        .iter()
        .find(|p| p.remote == sock(CLIENT_V6))
        .unwrap();
    assert!(!dead.in_use);
    let age = 1_800_000_000.0 - dead.answered_at.unwrap();
    assert!((7.0..=9.0).contains(&age), "{age}");
}

// ---- Random schedules ----

/// Anything that a network, relays and a portal do, in any order; then everything is well again.
fn schedule(seed: u64) {
    let mut w = World::with_relays(2);
    w.rng = SmallRng::seed_from_u64(seed);
    let mut story = vec![format!("seed {seed}")];
    let mut direct_since = w.now;
    for _ in 0..30 {
        match w.rng.random_range(0..12) {
            0..3 => {
                w.direct_loss = *[0.0, 0.0, 0.05, 0.3, 1.0, 1.0].choose(&mut w.rng).unwrap();
                story.push(format!("direct loss {}", w.direct_loss));
            }
            3..6 => {
                let n = w.rng.random_range(0..2);
                w.relays[n].silent ^= true;
                story.push(format!("relay {n} silent: {}", w.relays[n].silent));
            }
            6 => {
                let n = w.rng.random_range(0..2);
                w.relays[n].restart();
                story.push(format!("relay {n} restarts"));
            }
            7 => {
                w.portal ^= true;
                story.push(format!("portal: {}", w.portal));
            }
            8 => {
                w.set_active(!w.active);
                story.push(format!("active: {}", w.active));
            }
            9 => {
                w.authorize();
                story.push("authorized again".to_owned());
            }
            _ => {}
        }
        // Without the portal nobody can be told to look again.
        if w.direct_loss > 0.0 || !w.portal {
            direct_since = w.now + Duration::from_secs(3600);
        } else {
            direct_since = direct_since.min(w.now);
        }
        let lasts = *[0.2, 1.0, 3.0, 10.0, 60.0].choose(&mut w.rng).unwrap();
        w.wake_ups = 0;
        w.run(lasts);
        story.push(format!("{lasts} s later: {:?}, {:?}", w.kind(), w.paths));
        assert!(
            w.wake_ups as f64 <= 60.0 * (lasts + 1.0),
            "{} wake-ups in {lasts} s\n{}",
            w.wake_ups,
            story.join("\n")
        );
        assert!(
            w.paths.len() as f64 <= 4.0 + lasts,
            "a storm of changes\n{}",
            story.join("\n")
        );
        if std::mem::take(&mut w.failures) > 0 {
            // The client notices as well, and asks for access anew.
            story.push("failed, and anew".to_owned());
            w.client = World::client(w.now);
            w.waiting.clear();
            w.authorize();
            direct_since = w.now;
        }
        if w.now.saturating_duration_since(direct_since) > Duration::from_secs(40) {
            assert!(w.kind().is_some(), "no path\n{}", story.join("\n"));
        }
    }
    w.direct_loss = 0.0;
    w.portal = true;
    w.set_active(true);
    for relay in &mut w.relays {
        relay.silent = false;
    }
    w.run(1.0);
    if std::mem::take(&mut w.failures) > 0 || w.gateway.describe(id()).is_none() {
        w.client = World::client(w.now);
        w.waiting.clear();
        w.authorize();
    }
    w.run(700.0);
    story.push(format!("in the end: {:?}, {:?}", w.kind(), w.paths));
    let (kind, now) = (w.kind(), w.now);
    assert_eq!(kind, Some(PathKind::Direct), "{}", story.join("\n"));
    assert_eq!(
        w.client_sends_to.unwrap().1,
        sock(GATEWAY),
        "{}",
        story.join("\n")
    );
    for relay in &w.relays {
        assert_eq!(relay.allocations(now), 1, "{}", story.join("\n"));
    }
    w.gateway.release_relays(w.now);
    w.run(10.0);
    for relay in &w.relays {
        assert_eq!(relay.allocations(w.now), 0, "allocations stay behind");
    }
}

fn schedules(shard: u64) {
    let count: u64 = std::env::var("FIREZONE_PATH_SCHEDULES")
        .ok()
        .map_or(60, |n| n.parse().expect("a number of schedules"));
    for seed in (shard..count).step_by(2) {
        schedule(seed);
    }
}

#[test]
fn every_random_schedule_ends_on_the_direct_path_1_of_2() {
    schedules(0);
}

#[test]
fn every_random_schedule_ends_on_the_direct_path_2_of_2() {
    schedules(1);
}

#[test]
fn nothing_is_sent_as_from_a_relayed_address_that_is_gone() {
    let mut w = World::new();
    let relayed = w.relayed(0).unwrap();
    w.relays_behind_nat = true;
    w.run(5.0);
    let connection = w.gateway.connections.get_mut(&id()).unwrap();
    let relay = RelayId(Uuid::from_u128(1));
    connection.invalidate_relayed(relay, &[relayed]);
    connection.drop_relay(relay);
    w.relays[0].silent = true;
    w.direct_loss = 1.0;
    w.run(14.0);
    w.direct_loss = 0.0;
    // All pairs are made anew when a path is looked for; where the datagrams go is seen to above.
    w.run(30.0);
    assert_eq!(w.failures, 0);
}

#[test]
fn a_check_that_comes_through_a_relay_makes_no_host_candidate() {
    let mut w = World::new();
    let relayed = w.relayed(0).unwrap();
    // As while a withdrawn relay still forwards: the connection does without it.
    let connection = w.gateway.connections.get_mut(&id()).unwrap();
    let relay = RelayId(Uuid::from_u128(1));
    connection.invalidate_relayed(relay, &[relayed]);
    connection.drop_relay(relay);
    w.portal = false;
    w.run(5.0);
    w.portal = true;
    w.run(0.1);
    let hosts: Vec<_> = w
        .client
        .remote_candidates()
        .filter(|c| c.kind() == is::CandidateKind::Host)
        .map(|c| c.addr())
        .collect();
    assert_eq!(hosts, [sock(GATEWAY)]);
    assert_eq!(w.kind(), Some(PathKind::Direct));
}
