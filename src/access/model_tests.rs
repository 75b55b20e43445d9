//! Random grants, names, packets and time, judged by a second reading of the rules.
//!
//! The implementation is driven as a worker drives it: each packet goes through a long-lived flow
//! cache, what passes is noted in its flow and rewritten. The model knows packets by what they mean,
//! walks plain lists, and says what each is to become; that is built anew and compared byte by byte.
//!
//! The seed is printed; `ACCESS_MODEL_SEED=<n>` repeats a run.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::fixtures::*;
use super::*;
use crate::datapath::flow_cache::{At, FlowCache};
use crate::packet::{FlowKey, Meta, TcpFlags};
use client::{Client, Granted, short};
use model::{Model, Ruling};
use packet::{Body, Packet};
use random::{ADDRESSES, CLIENTS, Left, RESOURCES};
use story::Story;
use talk::Millis;

mod client;
mod model;
mod packet;
mod random;
mod story;
mod talk;

const ROUNDS: usize = 7_000;
const PACKETS_PER_ROUND: usize = 60;
/// How many of the packets that have left are remembered per client, to be answered.
const REMEMBERED: usize = 32;

/// What must come about in a run, at a third or less of the usual number.
const AT_LEAST: &[(&str, usize)] = &[
    ("announced", 700),
    ("not resolved", 1),
    ("renumbered", 15),
    ("names forgotten", 70),
    ("outbound, by the policy", 14_000),
    ("outbound, by the cache", 8_000),
    ("outbound, dropped", 35_000),
    ("outbound, translated", 11_000),
    ("ports moved", 200),
    ("flows that gave way", 15),
    ("connections anew", 700),
    ("inbound, by the policy", 13_000),
    ("inbound, by the cache", 17_000),
    ("inbound, dropped", 45_000),
    ("inbound, translated", 12_000),
    ("answers cut off by grants", 1_300),
    ("closed", 2_600),
    ("unanswered", 2_200),
    ("idle UDP or ICMP", 1_500),
    ("idle TCP", 5),
    ("idle, others", 5),
    ("errors, as they are", 1_700),
    ("errors, translated", 1_900),
    ("errors about nothing", 3_500),
];

/// What the implementation does with a packet.
enum Got {
    Drop(Option<Reply>),
    /// It is as given in the buffer. `until` if the policy was asked and not the cache alone.
    Pass {
        until: Option<Option<Instant>>,
    },
}

/// The caches of one worker.
struct Caches {
    outbound: FlowCache,
    inbound: FlowCache,
}

impl Caches {
    fn new() -> Self {
        Self {
            outbound: FlowCache::new(1),
            inbound: FlowCache::new(1),
        }
    }

    fn pass_out(&mut self, policy: &ClientPolicy, packet: &mut [u8], now: Instant) -> Got {
        let meta = Meta::parse(packet).unwrap();
        let (key, flags) = (FlowKey::outbound(&meta), meta.tcp_flags);
        let tick = policy.tick(now);
        let mut until = None;
        let decide = || {
            let passed = policy.admit_outbound(&meta, now)?;
            until = Some(passed.until);
            Ok(passed)
        };
        let at = At { now, tick };
        match self
            .outbound
            .pass(&key, policy.generation(), at, flags, decide)
        {
            Ok(flow) => {
                if let Some(flow) = flow {
                    flow.pass_out(tick, &meta, packet);
                }
                Got::Pass { until }
            }
            Err(denied) => Got::Drop(denied.reply),
        }
    }

    fn pass_in(&mut self, policy: &ClientPolicy, packet: &mut [u8], now: Instant) -> Got {
        let meta = Meta::parse(packet).unwrap();
        if meta.is_icmp_error() {
            return match policy.admit_error(packet, &meta, now) {
                Ok(about) => {
                    if let Some((flow, embedded)) = about {
                        flow.pass_error_in(&embedded, &meta, packet);
                    }
                    Got::Pass { until: None }
                }
                Err(denied) => Got::Drop(denied.reply),
            };
        }
        let key = FlowKey::inbound(&meta);
        let tick = policy.tick(now);
        let mut until = None;
        let decide = || {
            let passed = policy.admit_inbound(&meta, now)?;
            until = Some(passed.until);
            Ok(passed)
        };
        let (at, flags) = (At { now, tick }, TcpFlags::default());
        match self
            .inbound
            .pass(&key, policy.generation(), at, flags, decide)
        {
            Ok(flow) => {
                if let Some(flow) = flow {
                    flow.pass_in(tick, &meta, packet);
                }
                Got::Pass { until }
            }
            Err(denied) => Got::Drop(denied.reply),
        }
    }
}

struct Run {
    rng: StdRng,
    start: Instant,
    /// Since `start`.
    now: Millis,
    access: Access,
    /// As the events tell, by number of the client.
    policies: BTreeMap<u8, Arc<ClientPolicy>>,
    /// As many as there are workers.
    caches: [Caches; 2],
    model: Model,
    left: BTreeMap<u8, VecDeque<Left>>,
    story: Story,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut access, start) = access();
        let (words, open_ports) = match rng.random_range(0..4) {
            0 => ("all", Some(vec![])),
            1 => (
                "tcp/22, udp/443-53534",
                Some(vec![tcp(22, 22), udp(443, 53_534)]),
            ),
            _ => ("", None),
        };
        access.open_ports(&words.parse().unwrap());
        Self {
            rng,
            start,
            now: 0,
            access,
            policies: BTreeMap::new(),
            caches: [Caches::new(), Caches::new()],
            model: Model::new(open_ports),
            left: BTreeMap::new(),
            story: Story::new(seed),
        }
    }

    fn instant(&self) -> Instant {
        self.at(self.now)
    }

    fn at(&self, millis: Millis) -> Instant {
        self.start + Duration::from_millis(millis)
    }

    fn tell(&mut self, what: String) {
        self.story.step(self.now, what);
    }

    fn wait(&mut self, millis: Millis) {
        self.now += millis;
        self.tell(format!("{} s have passed", millis as f64 / 1000.0));
    }

    #[track_caller]
    fn expect<T: PartialEq + std::fmt::Debug>(&self, what: &str, expected: T, got: T) {
        if expected != got {
            let clients = 1..=CLIENTS;
            let state: String = clients
                .map(|c| self.model.describe(c, &[], self.now))
                .collect();
            self.story.disagree(
                &state,
                &format!("{what} {expected:?}"),
                &format!("{what} {got:?}"),
            );
        }
    }

    // ---- changes -----------------------------------------------------------------------------

    /// Changes something in the same way on both sides.
    fn change(&mut self) {
        let c = self.rng.random_range(1..=CLIENTS);
        match self.rng.random_range(0..100) {
            0..42 => self.authorize(c),
            42..68 => self.announce(c),
            68..75 => self.update_resource(),
            75..80 => {
                let n = self.rng.random_range(0..RESOURCES);
                self.tell(format!("client {c} loses resource {n}"));
                self.access.reject(client_id(c), resource_id(n));
                self.model.reject(c, resource_id(n));
            }
            80..84 => self.resync(),
            84..96 => {
                self.tell("what is over is cleared away".into());
                self.access.handle_timeout(self.instant());
                self.model.expire(self.now);
            }
            96 | 97 => self.set_clock(),
            _ if self.rng.random_bool(0.4) => {
                self.tell(format!("client {c} says goodbye"));
                self.access.remove_client(client_id(c));
                self.model.remove_client(c);
            }
            _ => {}
        }
        self.take_events();
        self.compare_states();
    }

    fn authorize(&mut self, c: u8) {
        let mut resource = random::resource(&mut self.rng);
        if self.rng.random_bool(0.2)
            && let Some(client) = self.model.client(c)
        {
            // One that it holds, with the same pattern.
            resource = client
                .grants
                .choose(&mut self.rng)
                .unwrap()
                .resource
                .clone();
            if let Resource::Dns(r) = &mut resource {
                r.filters = random::filters(&mut self.rng);
            }
        }
        let expires_at = random::expiry(&mut self.rng, self.model.unix(self.now));
        let known = self.model.client(c).map_or(c, |client| client.address);
        let address = if self.rng.random_bool(0.985) {
            known
        } else {
            self.rng.random_range(1..=ADDRESSES)
        };
        let granted = Granted(&resource, None).to_string();
        self.tell(format!(
            "client {c} at the addresses {address} may use {granted} (Unix time {expires_at:?})"
        ));
        let peer = ClientPeer {
            id: client_id(c),
            ..peer(address)
        };
        self.access
            .authorize(self.instant(), &peer, resource.clone(), expires_at);
        self.model.authorize(c, address, resource, expires_at);
    }

    fn announce(&mut self, c: u8) {
        // Mostly a name that the client may have.
        let mut what = random::announcement(&mut self.rng);
        let mut id = resource_id(self.rng.random_range(0..RESOURCES));
        for _ in 0..30 {
            let client = self.model.client(c);
            if client.is_some_and(|client| client.may_announce(id, &what.domain, self.now).is_ok())
            {
                break;
            }
            what = random::announcement(&mut self.rng);
            id = resource_id(self.rng.random_range(0..RESOURCES));
        }
        let got = self.access.announce(
            client_id(c),
            id,
            &what.domain,
            &what.proxies,
            &what.resolved,
            self.instant(),
        );
        self.tell(format!(
            "client {c} announces {} of resource {} as {:?}, which is really {:?}: {got:?}",
            what.domain,
            short(&id),
            what.proxies,
            what.resolved
        ));
        let expected =
            self.model
                .announce(c, id, &what.domain, &what.proxies, &what.resolved, self.now);
        match expected {
            Ok(true) => self.model.count("renumbered"),
            Ok(false) => self.model.count("announced"),
            Err(Unannounced::NotResolved) => self.model.count("not resolved"),
            Err(_) => {}
        }
        let expected = expected.map(|renumbered| Announced {
            renumbered,
            evicted: 0,
        });
        self.expect("announcement", expected, got);
    }

    fn update_resource(&mut self) {
        let mut resource = random::resource(&mut self.rng);
        // The address is not taken over.
        match &mut resource {
            Resource::Cidr(r) => r.address = "1.2.3.4/32".parse().unwrap(),
            Resource::Dns(r) => r.address = "x.test".into(),
            Resource::Internet { .. } => {}
        }
        self.tell(format!("update of {}", Granted(&resource, None)));
        self.access.update_resource(&resource);
        self.model.update_resource(&resource);
    }

    /// The portal's list: most of what is held, some of it with another end or twice, and some that
    /// is not.
    fn resync(&mut self) {
        let unix = self.model.unix(self.now);
        let mut listed = vec![(
            self.rng.random_range(1..=CLIENTS),
            resource_id(self.rng.random_range(0..RESOURCES)),
            None,
        )];
        listed.truncate(self.rng.random_range(0..2));
        for client in &self.model.clients {
            for grant in &client.grants {
                if self.rng.random_bool(0.1) {
                    continue;
                }
                let id = grant.resource.id();
                listed.push((client.n, id, grant.expires_at));
                if self.rng.random_bool(0.3) {
                    let other = (client.n, id, random::expiry(&mut self.rng, unix));
                    if self.rng.random() {
                        listed.pop();
                    }
                    listed.push(other);
                }
            }
        }
        let words = listed.iter().map(|(c, id, end)| (c, short(id), end));
        self.tell(format!("the portal lists {:?}", words.collect::<Vec<_>>()));
        let entries: Vec<_> = listed
            .iter()
            .map(|&(c, resource_id, expires_at)| AuthorizationEntry {
                client_id: client_id(c),
                resource_id,
                expires_at,
            })
            .collect();
        self.access.resync(self.instant(), &entries);
        self.model.resync(&listed);
    }

    /// The host's clock is set, by too little to matter or by more.
    fn set_clock(&mut self) {
        let by = [-30_000, -2_000, -1_900, 0, 1_900, 2_000, 30_000];
        let by = *by.choose(&mut self.rng).unwrap();
        let unix = self.model.unix(self.now).checked_add_signed(by).unwrap();
        self.tell(format!("the clock is set by {by} ms"));
        self.access
            .adjust_clock(self.instant(), Duration::from_millis(unix));
        self.model.set_clock(self.now, unix);
    }

    fn take_events(&mut self) {
        let number = |id: ClientId| (id.0.as_u128() & 0xFF) as u8;
        for event in drain(&mut self.access) {
            match event {
                AccessEvent::PolicyChanged { client, policy } => {
                    assert_eq!(policy.client(), client);
                    self.policies.insert(number(client), policy);
                }
                AccessEvent::ClientRemoved { client, .. } => {
                    self.policies.remove(&number(client));
                }
            }
        }
    }

    fn compare_states(&self) {
        for c in 1..=CLIENTS {
            let (known, policy) = (self.model.client(c), self.policies.get(&c));
            self.expect("policy exists", known.is_some(), policy.is_some());
            let current = self.access.policy(client_id(c));
            self.expect(
                "latest policy is",
                current.map(|p| p.generation()),
                policy.map(|p| p.generation()),
            );
            let sizes = self.access.sizes(client_id(c));
            self.expect(
                "domains and proxies are",
                known.map_or((0, 0), |client| client.sizes()),
                (sizes.domains, sizes.proxies),
            );
            let live = known.map_or(0, |client| client.live_flows(self.now));
            self.expect("too few flows", false, sizes.flows < live);
        }
        for a in 1..=ADDRESSES {
            for address in [random::address(a, true), random::address(a, false)] {
                let holder = self.model.clients.iter().find(|c| c.holds(address));
                let got = self.access.client_at(address);
                self.expect("address is of", holder.map(|c| client_id(c.n)), got);
            }
        }
        let deadline = self.model.deadline().map(|d| self.at(d));
        match self.access.poll_timeout() {
            Some((at, AccessTimer::FlowPurge)) => {
                self.expect(
                    "grant is looked at late",
                    false,
                    deadline.is_some_and(|d| d < at),
                );
            }
            grant => self.expect("next grant ends", deadline, grant.map(|(at, _)| at)),
        }
    }

    // ---- packets -----------------------------------------------------------------------------

    fn earlier(&mut self, c: u8) -> Option<&Left> {
        let left = self.left.get(&c)?;
        // Rather the last ones: the rest has mostly ended.
        let back = if self.rng.random_bool(0.6) {
            6
        } else {
            REMEMBERED
        };
        let back = self.rng.random_range(0..back.min(left.len()));
        left.iter().rev().nth(back)
    }

    fn packet(&mut self) {
        let c = self.rng.random_range(1..=CLIENTS);
        let holder = self.model.client(c).map_or(c, |client| client.address);
        let dice = self.rng.random_range(0..100);
        let earlier = self.earlier(c).cloned();
        let known = self.model.client(c).map_or(Vec::new(), Client::proxies);
        let rng = &mut self.rng;
        match (dice, earlier) {
            (0..18, Some(left)) => {
                let packet = random::continued(rng, &left);
                self.send(c, &packet);
            }
            (18..60, Some(left)) => {
                let packet = random::answer(rng, &left);
                self.deliver(&packet);
            }
            (60..72, Some(left)) => {
                let packet = random::error(rng, &left);
                self.deliver(&packet);
            }
            (..76, _) => {
                let packet = random::unsolicited(rng, holder);
                self.deliver(&packet);
            }
            _ => {
                let packet = random::outbound(rng, holder, &known);
                self.send(c, &packet);
            }
        }
    }

    fn send(&mut self, c: u8, packet: &Packet) {
        let mut bytes = packet.bytes();
        let now = self.instant();
        let worker = self.rng.random_range(0..self.caches.len());
        let got = match self.policies.get(&c) {
            Some(policy) => self.caches[worker].pass_out(policy, &mut bytes, now),
            None => Got::Drop(None),
        };
        self.tell(format!("client {c} sends {packet}"));
        let ruling = self.model.outbound(c, packet, self.now);
        let passed = self.compare(c, packet, ruling, &got, &bytes);
        self.story.verdict(packet, passed.as_ref());
        self.count(true, &got);
        if let Some(outside) = passed {
            self.model.sent(c, packet, &outside, self.now);
            let left = self.left.entry(c).or_default();
            left.push_back(Left {
                inside: packet.clone(),
                outside,
            });
            if left.len() > REMEMBERED {
                left.pop_front();
            }
        }
    }

    fn deliver(&mut self, packet: &Packet) {
        let holder = self
            .policies
            .iter()
            .find(|(_, p)| p.addresses().contains(packet.dst));
        let mut c = holder.map_or(1, |(c, _)| *c);
        if self.rng.random_bool(0.02) {
            // As when an address has just changed hands.
            c = self.rng.random_range(1..=CLIENTS);
        }
        let mut bytes = packet.bytes();
        let now = self.instant();
        let worker = self.rng.random_range(0..self.caches.len());
        let got = match self.policies.get(&c) {
            Some(policy) => self.caches[worker].pass_in(policy, &mut bytes, now),
            None => Got::Drop(None),
        };
        self.tell(format!("to client {c} comes {packet}"));
        let ruling = self.model.inbound(c, packet, self.now);
        let passed = self.compare(c, packet, ruling, &got, &bytes);
        self.story.verdict(packet, passed.as_ref());
        if !matches!(packet.body, Body::Error { .. }) {
            self.count(false, &got);
        }
    }

    fn count(&mut self, outbound: bool, got: &Got) {
        self.model.count(match (outbound, got) {
            (true, Got::Drop(_)) => "outbound, dropped",
            (true, Got::Pass { until: None }) => "outbound, by the cache",
            (true, Got::Pass { .. }) => "outbound, by the policy",
            (false, Got::Drop(_)) => "inbound, dropped",
            (false, Got::Pass { until: None }) => "inbound, by the cache",
            (false, Got::Pass { .. }) => "inbound, by the policy",
        });
    }

    /// What a packet that passes has become.
    fn compare(
        &self,
        c: u8,
        packet: &Packet,
        ruling: Ruling,
        got: &Got,
        bytes: &[u8],
    ) -> Option<Packet> {
        let expected = ruling.to_string();
        let (until, became) = match (ruling, got) {
            (Ruling::Drop(expected), Got::Drop(reply)) if expected == *reply => return None,
            (Ruling::Pass { until, packet }, Got::Pass { .. }) => (until, Some(packet)),
            (Ruling::Move { until, real, taken }, Got::Pass { .. }) => {
                let port = packet.port_in(bytes);
                let good = port != 0 && !taken.contains(&port);
                (until, good.then(|| packet.sent_to(real, port)))
            }
            _ => (None, None),
        };
        let lasts = match got {
            Got::Pass { until: Some(asked) } => *asked == until.map(|end| self.at(end)),
            _ => true,
        };
        match became {
            Some(became) if lasts && became.bytes() == bytes => Some(became),
            became => {
                let mut about = vec![packet.src, packet.dst];
                if let Body::Error { about: quoted, .. } = &packet.body {
                    about.push(quoted.dst);
                }
                let wanted =
                    became.map_or(String::new(), |p| format!("\n          {:02x?}", p.bytes()));
                let got = match got {
                    Got::Drop(reply) => model::dropped(*reply),
                    Got::Pass { until } => format!(
                        "passes until {:?} (nothing if from the cache) as {:?}\n          {bytes:02x?}",
                        until.map(|u| u.map(|at| at.duration_since(self.start))),
                        Meta::parse(bytes)
                    ),
                };
                let state = self.model.describe(c, &about, self.now);
                self.story.disagree(&state, &(expected + &wanted), &got)
            }
        }
    }
}

#[test]
#[allow(clippy::print_stdout)]
fn the_model_agrees_on_random_grants_names_and_packets() {
    let seed = match std::env::var("ACCESS_MODEL_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::random(),
    };
    println!("ACCESS_MODEL_SEED={seed}");
    let mut run = Run::new(seed);
    for round in 0..ROUNDS {
        run.story.begin(round);
        if run.rng.random_bool(0.4) {
            let pause = random::pause(&mut run.rng);
            run.wait(pause);
        }
        for _ in 0..run.rng.random_range(0..5) {
            run.change();
        }
        run.model.tidy(run.now);
        for _ in 0..PACKETS_PER_ROUND {
            if run.rng.random_bool(0.03) {
                let pause = random::short_pause(&mut run.rng);
                run.wait(pause);
            }
            run.packet();
        }
    }

    // Nothing outlives the clients.
    run.access.remove_all();
    run.take_events();
    assert_eq!(run.access.flow_count(), 0);

    // The run says little if something hardly ever happened.
    let tally = &run.model.tally;
    println!("{tally:#?}");
    for (what, at_least) in AT_LEAST {
        let times = tally.get(what).copied().unwrap_or(0);
        assert!(times >= *at_least, "{what}: {times} times");
    }
}
