//! A second reading of the rules: plain lists, walked from the start for every packet.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use super::client::{
    Client, Grant, Granted, Name, covers, is_for_names, is_gateway, is_proxy, is_tunnel, short,
};
use super::packet::{Body, Packet};
use super::talk::{Flow, Millis, Talk, Until};
use crate::access::fixtures::UNIX;
use crate::access::{Reply, Resolved, Unannounced};
use crate::ids::ResourceId;
use crate::portal::messages::{Filter, Resource};

/// What is to happen to a packet.
#[derive(Debug)]
pub(super) enum Ruling {
    Drop(Option<Reply>),
    /// It passes as this packet.
    Pass {
        until: Until,
        packet: Packet,
    },
    /// It goes to this address, from any port but these.
    Move {
        until: Until,
        real: IpAddr,
        taken: Vec<u16>,
    },
}

impl fmt::Display for Ruling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ruling::Drop(reply) => f.write_str(&dropped(*reply)),
            Ruling::Pass { until, packet } => write!(f, "passes until {until:?} as {packet}"),
            Ruling::Move { until, real, taken } => write!(
                f,
                "passes until {until:?} to {real} from any port but {taken:?}"
            ),
        }
    }
}

pub(super) fn dropped(reply: Option<Reply>) -> String {
    match reply {
        Some(reply) => format!("dropped with the answer {reply:?}"),
        None => "dropped".into(),
    }
}

const SILENT: Ruling = Ruling::Drop(None);
pub(super) struct Model {
    pub(super) clients: Vec<Client>,
    /// What is open of the gateway itself besides DNS, if anything.
    open_ports: Option<Vec<Filter>>,
    /// One reading of both clocks, Unix time in milliseconds.
    clock: (Millis, u64),
    /// How often what is worth testing came about.
    pub(super) tally: BTreeMap<&'static str, usize>,
}

impl Model {
    pub(super) fn new(open_ports: Option<Vec<Filter>>) -> Self {
        Self {
            open_ports,
            clients: Vec::new(),
            clock: (0, UNIX * 1000),
            tally: BTreeMap::new(),
        }
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    pub(super) fn client(&self, n: u8) -> Option<&Client> {
        self.clients.iter().find(|c| c.n == n)
    }

    fn client_mut(&mut self, n: u8) -> Option<&mut Client> {
        self.clients.iter_mut().find(|c| c.n == n)
    }

    pub(super) fn unix(&self, now: Millis) -> u64 {
        self.clock.1 + now - self.clock.0
    }

    // ---- grants ------------------------------------------------------------------------------

    /// What is past at the reading of the clocks has ended at the reading.
    fn ends(&self, expires_at: Option<u64>) -> Until {
        expires_at.map(|unix| self.clock.0 + (unix * 1000).saturating_sub(self.clock.1))
    }

    pub(super) fn set_clock(&mut self, now: Millis, unix: u64) {
        if self.unix(now).abs_diff(unix) < 2000 {
            return;
        }
        self.clock = (now, unix);
        for c in 0..self.clients.len() {
            for g in 0..self.clients[c].grants.len() {
                self.clients[c].grants[g].ends = self.ends(self.clients[c].grants[g].expires_at);
            }
        }
    }

    pub(super) fn authorize(
        &mut self,
        n: u8,
        address: u8,
        resource: Resource,
        expires_at: Option<u64>,
    ) {
        // One address, one client; another address, another state.
        self.clients
            .retain(|c| (c.n == n) == (c.address == address));
        if self.client(n).is_none() {
            self.clients.push(Client {
                n,
                address,
                grants: Vec::new(),
                names: Vec::new(),
                flows: Vec::new(),
            });
        }
        let ends = self.ends(expires_at);
        let client = self.client_mut(n).unwrap();
        // Names that the resource does not cover (any more) are not its own. After a grant was taken
        // back they wait until it is known what the resource covers when it is granted again.
        let id = resource.id();
        let held = client.grants.iter().find(|g| g.resource.id() == id);
        let was_dns = held.is_some_and(Grant::is_dns);
        for name in &mut client.names {
            let keep = match &resource {
                Resource::Dns(r) => covers(&r.address, &name.name),
                _ => !was_dns,
            };
            name.resources.retain(|r| *r != id || keep);
        }
        let before = client.names.len();
        client.forget_names(|name| name.resources.is_empty());
        let forgotten = before - client.names.len();
        client.grants.retain(|g| g.resource.id() != id);
        client.grants.push(Grant {
            resource,
            expires_at,
            ends,
        });
        for _ in 0..forgotten {
            self.count("names forgotten");
        }
    }

    pub(super) fn update_resource(&mut self, new: &Resource) {
        for grant in self.clients.iter_mut().flat_map(|c| &mut c.grants) {
            match (&mut grant.resource, new) {
                (Resource::Cidr(held), Resource::Cidr(new)) if held.id == new.id => {
                    held.filters.clone_from(&new.filters);
                }
                (Resource::Dns(held), Resource::Dns(new)) if held.id == new.id => {
                    held.filters.clone_from(&new.filters);
                }
                _ => {}
            }
        }
    }

    /// Keeps the grants that `keep` says; a client without any is forgotten.
    fn retain_grants(&mut self, keep: impl Fn(u8, &Grant) -> bool) {
        self.clients.retain_mut(|client| {
            client.grants.retain(|g| keep(client.n, g));
            !client.grants.is_empty()
        });
    }

    pub(super) fn reject(&mut self, n: u8, resource: ResourceId) {
        self.retain_grants(|c, grant| c != n || grant.resource.id() != resource);
    }

    /// `listed` may name a pair twice; then the later end counts.
    pub(super) fn resync(&mut self, listed: &[(u8, ResourceId, Option<u64>)]) {
        let entries = |n: u8, id: ResourceId| -> Vec<Option<u64>> {
            let same = listed.iter().filter(|l| l.0 == n && l.1 == id);
            same.map(|l| l.2).collect()
        };
        self.retain_grants(|n, grant| !entries(n, grant.resource.id()).is_empty());
        for c in 0..self.clients.len() {
            for g in 0..self.clients[c].grants.len() {
                let entries = entries(self.clients[c].n, self.clients[c].grants[g].resource.id());
                let expires_at = if entries.contains(&None) {
                    None
                } else {
                    entries.into_iter().flatten().max()
                };
                let ends = self.ends(expires_at);
                let grant = &mut self.clients[c].grants[g];
                (grant.expires_at, grant.ends) = (expires_at, ends);
            }
        }
    }

    pub(super) fn expire(&mut self, now: Millis) {
        self.retain_grants(|_, grant| grant.is_valid(now));
    }

    pub(super) fn remove_client(&mut self, n: u8) {
        self.clients.retain(|c| c.n != n);
    }

    /// When the next grant ends.
    pub(super) fn deadline(&self) -> Option<Millis> {
        let grants = self.clients.iter().flat_map(|c| &c.grants);
        grants.filter_map(|g| g.ends).min()
    }

    // ---- names -------------------------------------------------------------------------------

    /// Whether the client has given its addresses new meanings.
    pub(super) fn announce(
        &mut self,
        n: u8,
        resource: ResourceId,
        domain: &str,
        proxies: &[IpAddr],
        resolved: &Resolved,
        now: Millis,
    ) -> Result<bool, Unannounced> {
        let client = self.client_mut(n).ok_or(Unannounced::NotAuthorized)?;
        client.may_announce(resource, domain, now)?;
        let domain = domain.to_lowercase();
        let renumbered = client
            .names
            .iter()
            .any(|n| n.name != domain && n.proxies.iter().any(|p| proxies.contains(p)));
        if renumbered {
            client.forget_names(|_| true);
        }
        let known = client.names.iter().find(|n| n.name == domain);
        let is_failure = resolved.ipv4.is_none() && resolved.ipv6.is_none();
        if is_failure && known.is_none_or(|name| name.addresses.is_empty()) {
            return Err(Unannounced::NotResolved);
        }
        if known.is_none() {
            if !proxies.iter().any(|p| is_proxy(*p)) {
                return Ok(renumbered);
            }
            client.names.push(Name {
                name: domain.clone(),
                resources: Vec::new(),
                proxies: Vec::new(),
                addresses: Vec::new(),
            });
        }
        let name = client.names.iter_mut().find(|n| n.name == domain).unwrap();
        if !name.resources.contains(&resource) {
            name.resources.push(resource);
        }
        for proxy in proxies.iter().filter(|p| is_proxy(**p)) {
            if !name.proxies.contains(proxy) {
                name.proxies.push(*proxy);
            }
        }
        // A question without an answer leaves what was known.
        if let Some(v4) = &resolved.ipv4 {
            name.addresses.retain(IpAddr::is_ipv6);
            name.addresses.extend(v4.iter().map(|a| IpAddr::V4(*a)));
        }
        if let Some(v6) = &resolved.ipv6 {
            name.addresses.retain(IpAddr::is_ipv4);
            name.addresses.extend(v6.iter().map(|a| IpAddr::V6(*a)));
        }
        name.addresses.retain(|a| is_for_names(*a));
        name.addresses.sort();
        name.addresses.dedup();
        Ok(renumbered)
    }

    // ---- packets -----------------------------------------------------------------------------

    /// Flows that ended long ago are of no interest, not even for the tally.
    pub(super) fn tidy(&mut self, now: Millis) {
        let long_ago = now.saturating_sub(200_000);
        for client in &mut self.clients {
            client.flows.retain(|f| f.is_live(long_ago));
        }
    }

    /// What is to happen to a packet from a client. If it passes, [`Self::sent`] must follow.
    pub(super) fn outbound(&mut self, n: u8, packet: &Packet, now: Millis) -> Ruling {
        let Some(client) = self.client(n) else {
            return SILENT;
        };
        let until = match client.judge_outbound(packet, self.open_ports.as_deref(), now) {
            Ok(until) => until,
            Err(reply) => return Ruling::Drop(reply),
        };
        let unchanged = Ruling::Pass {
            until,
            packet: packet.clone(),
        };
        if is_gateway(packet.dst) {
            return unchanged;
        }
        let talk = Talk::sent(packet);
        let client = self.client_mut(n).unwrap();
        client.flows.retain(|f| f.is_live(now) || f.inside != talk);
        // An attempt to connect after either end has closed is a new connection.
        if packet.is_opening() {
            let before = client.flows.len();
            let closing = |f: &Flow| f.fin_out || f.fin_in || f.reset;
            client.flows.retain(|f| f.inside != talk || !closing(f));
            if client.flows.len() < before {
                self.count("connections anew");
            }
        }
        let client = self.client_mut(n).unwrap();
        if let Some(flow) = client.flows.iter().find(|f| f.inside == talk) {
            return Ruling::Pass {
                until,
                packet: packet.sent_to(flow.outside.remote, flow.outside.port),
            };
        }
        if !is_proxy(packet.dst) {
            // This one cannot be given another port. A translated flow that looks the same from
            // outside makes way; it begins again from another.
            let before = client.flows.len();
            client.flows.retain(|f| f.outside != talk);
            if client.flows.len() < before {
                self.count("flows that gave way");
            }
            return unchanged;
        }
        if !talk.is_translatable() {
            return SILENT;
        }
        let Some(real) = client
            .name_of(packet.dst)
            .and_then(|n| n.resolve(packet.dst))
        else {
            return Ruling::Drop(Some(Reply::Unreachable));
        };
        let to_there = client.flows.iter().filter(|f| {
            f.is_live(now)
                && f.outside
                    == Talk {
                        port: f.outside.port,
                        remote: real,
                        ..talk
                    }
        });
        let taken: Vec<u16> = to_there.map(|f| f.outside.port).collect();
        if taken.contains(&talk.port) {
            self.count("ports moved");
            return Ruling::Move { until, real, taken };
        }
        Ruling::Pass {
            until,
            packet: packet.sent_to(real, talk.port),
        }
    }

    /// Notes that a packet has left as another one.
    pub(super) fn sent(&mut self, n: u8, packet: &Packet, outside: &Packet, now: Millis) {
        if is_gateway(packet.dst) {
            return;
        }
        let client = self.client_mut(n).unwrap();
        let inside = Talk::sent(packet);
        if !client.flows.iter().any(|f| f.inside == inside) {
            let name = client.name_of(packet.dst).map(|n| n.name.clone());
            client.flows.push(Flow {
                inside,
                outside: Talk::sent(outside),
                name: name.unwrap_or_default(),
                began: now,
                last_out: now,
                last_in: None,
                fin_out: false,
                fin_in: false,
                reset: false,
            });
        }
        let flow = client
            .flows
            .iter_mut()
            .find(|f| f.inside == inside)
            .unwrap();
        flow.last_out = now;
        flow.fin_out |= packet.has_flag('F');
        flow.reset |= packet.has_flag('R');
        if flow.is_translated() {
            self.count("outbound, translated");
        }
    }

    /// What is to happen to a packet to a client. If it passes, it counts as delivered.
    pub(super) fn inbound(&mut self, n: u8, packet: &Packet, now: Millis) -> Ruling {
        let Some(client) = self.client_mut(n) else {
            return SILENT;
        };
        if !client.holds(packet.dst) || (is_tunnel(packet.src) && !is_gateway(packet.src)) {
            return SILENT;
        }
        let Ok(any) = client.any_grant(now) else {
            return SILENT;
        };
        if let Body::Error {
            kind,
            about,
            quoted,
        } = &packet.body
        {
            return self.error(n, packet, (*kind, about, *quoted), now);
        }
        if is_gateway(packet.src) {
            return Ruling::Pass {
                until: any,
                packet: packet.clone(),
            };
        }
        // That is a question, whatever was sent before.
        if matches!(packet.body, Body::Echo { reply: false, .. }) {
            return SILENT;
        }
        let talk = Talk::received(packet);
        let mut why = None;
        let mut found = None;
        for flow in client.flows.iter().filter(|f| f.outside == talk) {
            why = flow.ended(now);
            if why.is_none() {
                found = Some(flow);
                break;
            }
        }
        let Some(flow) = found else {
            if let Some(why) = why {
                self.count(why);
            }
            return SILENT;
        };
        let covered = client.classify(
            flow.inside.remote,
            packet.protocol(),
            flow.inside.remote_port,
            now,
        );
        let Ok(until) = covered else {
            self.count("answers cut off by grants");
            return SILENT;
        };
        let live = |f: &&mut Flow| f.outside == talk && f.is_live(now);
        let flow = client.flows.iter_mut().find(live).unwrap();
        flow.last_in = Some(now);
        flow.fin_in |= packet.has_flag('F');
        flow.reset |= packet.has_flag('R');
        let translated = flow.is_translated();
        let ruling = Ruling::Pass {
            until,
            packet: packet.received_from(flow.inside.remote, flow.inside.port),
        };
        if translated {
            self.count("inbound, translated");
        }
        ruling
    }

    /// An ICMP error passes if it is about a packet of a flow, whatever the filters say.
    fn error(
        &mut self,
        n: u8,
        packet: &Packet,
        (kind, about, quoted): (u8, &Packet, usize),
        now: Millis,
    ) -> Ruling {
        let of_use: &[u8] = if packet.src.is_ipv4() {
            &[3, 11]
        } else {
            &[1, 2, 3]
        };
        let beyond_header = match about.body {
            Body::Tcp { .. } | Body::Udp { .. } => 4,
            Body::Other { .. } => 0,
            _ => 8,
        };
        if !of_use.contains(&kind)
            || about.src != packet.dst
            || quoted < about.header() + beyond_header
        {
            return SILENT;
        }
        let unchanged = Ruling::Pass {
            until: None,
            packet: packet.clone(),
        };
        if is_gateway(about.dst) {
            return unchanged;
        }
        let talk = Talk::sent(about);
        let client = self.client(n).unwrap();
        let of_talk = |f: &&Flow| f.outside == talk && f.is_live(now);
        let Some(flow) = client.flows.iter().find(of_talk) else {
            self.count("errors about nothing");
            return SILENT;
        };
        if !flow.is_translated() {
            self.count("errors, as they are");
            return unchanged;
        }
        let mut packet = packet.clone();
        packet.src = flow.inside.remote;
        packet.body = Body::Error {
            kind,
            about: Box::new(about.sent_to(flow.inside.remote, flow.inside.port)),
            quoted,
        };
        self.count("errors, translated");
        Ruling::Pass {
            until: None,
            packet,
        }
    }

    /// What is known of a client, as far as it matters for some addresses.
    pub(super) fn describe(&self, n: u8, about: &[IpAddr], now: Millis) -> String {
        let Some(client) = self.client(n) else {
            return format!("client {n} has no access\n");
        };
        let mut text = format!("client {n} at the addresses {}\n", client.address);
        for grant in &client.grants {
            let state = if grant.is_valid(now) { "" } else { ", over" };
            text += &format!(
                "  may use {}{state}\n",
                Granted(&grant.resource, grant.ends)
            );
        }
        for name in &client.names {
            let resources: Vec<_> = name.resources.iter().map(short).collect();
            text += &format!(
                "  {} of resources {resources:?} is {:?}, real {:?}\n",
                name.name, name.proxies, name.addresses
            );
        }
        for flow in &client.flows {
            if about.contains(&flow.inside.remote) || about.contains(&flow.outside.remote) {
                let ended = flow
                    .ended(now)
                    .map_or(String::new(), |why| format!("; ended: {why}"));
                text += &format!("  {flow}{ended}\n");
            }
        }
        text
    }
}
