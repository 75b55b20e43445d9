//! The flows of one client: what lets answers back in, and what translates those of DNS resources
//! (data-path spec §5.6, §6.5; RFC 3022, RFC 4787, RFC 5382).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::account::{Account, FlowEnd, FlowReport, Owner, Reports, SILENCE, of_family};
use super::limits::{ASSURED_FLOWS, MAX_FLOWS, MAX_FLOWS_TOTAL, MAX_UNTOLD};
use super::policy::TunnelAddresses;
use super::ranges;
use super::verdict::DropReason;
use crate::ids::ClientId;
use crate::packet::translate::{self, Embedded};
use crate::packet::{FlowHash, Meta, TcpFlags, protocol};

/// An idle TCP connection is forgotten after this (RFC 5382 REQ-5, data-path spec §9).
const TCP_IDLE: Duration = Duration::from_secs(7440);
/// UDP and ICMP (RFC 4787 REQ-5, data-path spec §9).
const DATAGRAM_IDLE: Duration = Duration::from_secs(120);
/// Any other protocol; as Linux's connection tracking has it.
const OTHER_IDLE: Duration = Duration::from_secs(600);
/// A flow that was never answered, since its last packet from the client (data-path spec §9).
const UNANSWERED: Duration = Duration::from_secs(60);
/// The same when the client has used up most of its flows: a scan must not stop the rest.
const UNANSWERED_UNDER_PRESSURE: Duration = Duration::from_secs(5);
/// After FIN both ways or RST either way, since the last packet: late segments still pass.
const CLOSED: Duration = Duration::from_secs(5);
/// A full table is looked through at most this often: it costs a walk over all flows.
const FULL_PURGE_PAUSE: Duration = Duration::from_secs(1);

/// Time since the start of the process's tables, in units of [`Tick::UNIT`]. Lasts for 13 years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(u32);

impl Tick {
    /// Precision of the times of flows.
    pub const UNIT: Duration = Duration::from_millis(100);

    /// The instant of this tick on a clock that started at `epoch`.
    fn instant(self, epoch: Instant) -> Instant {
        epoch + Self::UNIT * self.0
    }

    /// The tick of `now` on a clock that started at `epoch`.
    #[inline]
    pub fn new(epoch: Instant, now: Instant) -> Self {
        Self(Self::of(now.saturating_duration_since(epoch)))
    }

    /// Whole units in `duration`. Asked for every packet: no division of 128 bits.
    #[inline]
    const fn of(duration: Duration) -> u32 {
        const UNIT: u32 = Tick::UNIT.subsec_millis();
        const PER_SECOND: u64 = 1000 / UNIT as u64;

        let units = duration.as_secs() * PER_SECOND + (duration.subsec_millis() / UNIT) as u64;
        units as u32
    }
}

/// What tells flows of one client apart, seen from one side of the translation. The client's own
/// address is not part of it: it has one per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    remote: IpAddr,
    kind: Kind,
    /// The client's port, or the identifier of an ICMP echo.
    local_port: u16,
    remote_port: u16,
}

/// Protocol, with pings told apart from other ICMP, which has no identifier to go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    protocol: u8,
    echo: bool,
}

impl Key {
    fn outbound(meta: &Meta) -> Self {
        let echo = meta.is_icmp_echo_request();
        let ports = has_ports(meta.protocol);
        Self {
            remote: meta.dst,
            kind: Kind {
                protocol: meta.protocol,
                echo,
            },
            local_port: if echo || ports { meta.src_port } else { 0 },
            remote_port: if ports { meta.dst_port } else { 0 },
        }
    }

    fn inbound(meta: &Meta) -> Self {
        let echo = meta.is_icmp_echo_reply();
        let ports = has_ports(meta.protocol);
        Self {
            remote: meta.src,
            kind: Kind {
                protocol: meta.protocol,
                echo,
            },
            local_port: if echo || ports { meta.dst_port } else { 0 },
            remote_port: if ports { meta.src_port } else { 0 },
        }
    }

    /// Of the packet that an ICMP error is about, which went out.
    fn about(embedded: &Embedded) -> Self {
        Self {
            remote: embedded.dst,
            kind: Kind {
                protocol: embedded.protocol,
                echo: embedded.is_echo_request,
            },
            local_port: embedded.src_port,
            remote_port: embedded.dst_port,
        }
    }

    /// Whether a port can be replaced, so that two flows to the same place can be told apart.
    fn is_translatable(&self) -> bool {
        self.kind.echo || has_ports(self.kind.protocol)
    }
}

fn has_ports(protocol: u8) -> bool {
    matches!(protocol, protocol::TCP | protocol::UDP)
}

/// One flow. Workers hold it along with their remembered verdicts, and note in it what passes.
#[derive(Debug)]
pub struct Flow {
    /// As the client sees it.
    inside: Key,
    /// As the resource sees it; the same as `inside` unless translated.
    outside: Key,
    state: AtomicU8,
    /// When it began, or when it was told to have begun anew after a silence.
    began: AtomicU32,
    last_out: AtomicU32,
    last_in: AtomicU32,
    /// Only if flow logs want it.
    account: Option<Box<Account>>,
}

/// Bits of [`Flow::state`].
const ANSWERED: u8 = 1 << 0;
const FIN_OUT: u8 = 1 << 1;
const FIN_IN: u8 = 1 << 2;
const RESET: u8 = 1 << 3;
/// Not in the table any more.
const GONE: u8 = 1 << 4;

impl Flow {
    fn new(inside: Key, outside: Key, tick: Tick, account: Option<Box<Account>>) -> Self {
        Self {
            inside,
            outside,
            account,
            state: AtomicU8::new(0),
            began: AtomicU32::new(tick.0),
            last_out: AtomicU32::new(tick.0),
            last_in: AtomicU32::new(tick.0),
        }
    }

    /// The other end as the client addresses it: for DNS resources, the proxy address.
    pub fn remote(&self) -> IpAddr {
        self.inside.remote
    }

    /// The port of the other end; 0 for protocols without.
    pub fn remote_port(&self) -> u16 {
        self.inside.remote_port
    }

    /// The client's port, or the identifier of its echo requests.
    pub fn local_port(&self) -> u16 {
        self.inside.local_port
    }

    /// Where the other end really is.
    pub fn outside(&self) -> IpAddr {
        self.outside.remote
    }

    /// The client's port, or echo identifier, as the other end sees it.
    pub fn outside_port(&self) -> u16 {
        self.outside.local_port
    }

    /// Whether packets must be rewritten.
    #[inline]
    pub fn is_translated(&self) -> bool {
        self.inside.remote != self.outside.remote
    }

    /// Takes a packet from the client into the flow, and makes it what the resource expects.
    #[inline]
    pub fn pass_out(&self, tick: Tick, meta: &Meta, packet: &mut [u8]) {
        self.note_out(tick, meta.tcp_flags);
        self.count_out(meta);
        if self.is_translated() {
            translate::outbound(packet, meta, self.outside(), self.outside_port());
        }
    }

    /// Takes a packet to the client into the flow, and makes it what the client expects.
    #[inline]
    pub fn pass_in(&self, tick: Tick, meta: &Meta, packet: &mut [u8]) {
        self.note_in(tick, meta.tcp_flags);
        self.count_in(meta);
        if self.is_translated() {
            translate::inbound(packet, meta, self.remote(), self.local_port());
        }
    }

    /// Makes an ICMP error about a packet of the flow what the client expects. It is not part of
    /// the flow.
    pub fn pass_error_in(&self, embedded: &Embedded, meta: &Meta, packet: &mut [u8]) {
        if self.is_translated() {
            translate::error_about(packet, meta, embedded, self.remote(), self.local_port());
        }
    }

    /// Notes a packet from the client.
    #[inline]
    fn note_out(&self, tick: Tick, flags: TcpFlags) {
        store_if_changed(&self.last_out, tick.0);
        self.note_end(flags, FIN_OUT);
    }

    /// Notes a packet to the client.
    #[inline]
    pub(super) fn note_in(&self, tick: Tick, flags: TcpFlags) {
        store_if_changed(&self.last_in, tick.0);
        if self.state.load(Ordering::Relaxed) & ANSWERED == 0 {
            self.state.fetch_or(ANSWERED, Ordering::Relaxed);
        }
        self.note_end(flags, FIN_IN);
    }

    /// Counts a packet from the client, if flow logs want it.
    #[inline]
    pub(crate) fn count_out(&self, meta: &Meta) {
        if let Some(account) = &self.account {
            account.count_out(meta);
        }
    }

    /// Counts a packet to the client, if flow logs want it.
    #[inline]
    fn count_in(&self, meta: &Meta) {
        if let Some(account) = &self.account {
            account.count_in(meta);
        }
    }

    fn last(&self) -> Tick {
        let out = self.last_out.load(Ordering::Relaxed);
        Tick(out.max(self.last_in.load(Ordering::Relaxed)))
    }

    #[inline]
    fn note_end(&self, flags: TcpFlags, fin: u8) {
        if flags.is_reset() {
            self.state.fetch_or(RESET, Ordering::Relaxed);
        } else if flags.is_closing() {
            self.state.fetch_or(fin, Ordering::Relaxed);
        }
    }

    /// Whether the flow has ended: its table has dropped it, or nothing has passed for too long.
    #[inline]
    pub fn is_over(&self, tick: Tick) -> bool {
        self.is_over_with(tick, UNANSWERED)
    }

    fn is_over_with(&self, tick: Tick, unanswered: Duration) -> bool {
        let state = self.state.load(Ordering::Relaxed);
        if state & GONE != 0 {
            return true;
        }
        let (since, limit) = if is_closed(state) {
            (self.last(), CLOSED)
        } else if state & ANSWERED == 0 {
            (Tick(self.last_out.load(Ordering::Relaxed)), unanswered)
        } else {
            let idle = match self.inside.kind.protocol {
                protocol::TCP => TCP_IDLE,
                protocol::UDP | protocol::ICMP | protocol::ICMPV6 => DATAGRAM_IDLE,
                _ => OTHER_IDLE,
            };
            (self.last(), idle)
        };
        tick.0.saturating_sub(since.0) >= Tick::of(limit)
    }

    /// Whether a connection attempt with the same ports is a new connection rather than a repeated
    /// attempt.
    #[inline]
    pub fn is_succeeded_by(&self, flags: TcpFlags) -> bool {
        flags.is_opening() && self.state.load(Ordering::Relaxed) & (FIN_OUT | FIN_IN | RESET) != 0
    }
}

fn is_closed(state: u8) -> bool {
    state & RESET != 0 || state & (FIN_OUT | FIN_IN) == FIN_OUT | FIN_IN
}

/// A store makes other cores reload the line; most packets come within the same tick.
#[inline]
fn store_if_changed(cell: &AtomicU32, value: u32) {
    if cell.load(Ordering::Relaxed) != value {
        cell.store(value, Ordering::Relaxed);
    }
}

/// Number of flows of all clients together.
#[derive(Debug, Clone, Default)]
pub(super) struct Total(Arc<AtomicUsize>);

impl Total {
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Accounted flows that began and ended since flow logs were told last.
#[derive(Debug, Default)]
struct Untold {
    fresh: Vec<Arc<Flow>>,
    ended: Vec<Arc<Flow>>,
    /// Flows that are not accounted for, because there were too many of the others.
    refused: u64,
}

impl Untold {
    /// Whether one more flow can be accounted for. One that is will come to `ended` in any case: by
    /// then there may be as many more as a client has flows.
    fn admit(&mut self) -> bool {
        let has_room = self.fresh.len() + self.ended.len() < MAX_UNTOLD;
        self.refused += u64::from(!has_room);
        has_room
    }

    /// Takes a flow over that is being taken out of its table.
    fn bury(&mut self, flow: &Arc<Flow>) {
        flow.state.fetch_or(GONE, Ordering::Relaxed);
        if flow.account.is_some() {
            self.ended.push(Arc::clone(flow));
        }
    }
}

/// The flows of one client.
#[derive(Debug)]
pub(super) struct Flows {
    /// Every flow, by how the resource sees it.
    by_outside: HashMap<Key, Arc<Flow>, FlowHash>,
    /// Translated flows, by how the client sees them.
    by_inside: HashMap<Key, Arc<Flow>, FlowHash>,
    total: Total,
    untold: Untold,
    last_full_purge: Option<Tick>,
    /// Changes with each probe for a free port.
    probe: u32,
}

impl Flows {
    pub(super) fn new(total: Total) -> Self {
        Self {
            by_outside: HashMap::default(),
            by_inside: HashMap::default(),
            total,
            untold: Untold::default(),
            last_full_purge: None,
            probe: 0,
        }
    }

    /// The flow of a packet from the client; a new one if there is none. `resolve` says what a proxy
    /// address stands for. The flow is accounted for to `owner`, if there is one.
    ///
    /// # Errors
    /// [`DropReason::NotTranslated`] if it stands for nothing,
    /// [`DropReason::NatUnsupportedProtocol`], [`DropReason::NatExhausted`] or
    /// [`DropReason::FlowLimit`].
    pub(super) fn open(
        &mut self,
        meta: &Meta,
        tick: Tick,
        owner: Option<Owner>,
        resolve: impl FnOnce(IpAddr) -> Option<(IpAddr, Arc<str>)>,
    ) -> Result<Arc<Flow>, DropReason> {
        let inside = Key::outbound(meta);
        let is_proxy = ranges::is_proxy(inside.remote);
        let known = if is_proxy {
            self.by_inside.get(&inside)
        } else {
            // One with the same outside may be the translation of another.
            self.by_outside.get(&inside).filter(|f| !f.is_translated())
        };
        if let Some(flow) = known {
            if !flow.is_over(tick) && !flow.is_succeeded_by(meta.tcp_flags) {
                return Ok(Arc::clone(flow));
            }
            let flow = Arc::clone(flow);
            self.remove(&flow);
        }
        let mut outside = inside;
        let mut domain = None;
        if is_proxy {
            if !inside.is_translatable() {
                return Err(DropReason::NatUnsupportedProtocol);
            }
            let (resolved, name) = resolve(inside.remote).ok_or(DropReason::NotTranslated)?;
            outside.remote = resolved;
            domain = Some(name);
        }
        self.make_room(tick)?;
        if is_proxy {
            outside.local_port = self
                .free_port(outside, tick)
                .ok_or(DropReason::NatExhausted)?;
        } else if let Some(translated) = self.by_outside.get(&outside).cloned() {
            // The client reaches the same place by its real address, too, from the same port. It
            // can only do so with two sockets; the untranslated one cannot be moved.
            self.remove(&translated);
        }
        let owner = owner.filter(|_| has_ports(inside.kind.protocol) && self.untold.admit());
        let account = owner.map(|owner| Box::new(Account::new(owner, domain)));
        let flow = Arc::new(Flow::new(inside, outside, tick, account));
        if flow.account.is_some() {
            self.untold.fresh.push(Arc::clone(&flow));
        }
        self.by_outside.insert(outside, Arc::clone(&flow));
        if is_proxy {
            self.by_inside.insert(inside, Arc::clone(&flow));
        }
        self.total.0.fetch_add(1, Ordering::Relaxed);
        Ok(flow)
    }

    /// The client's port as the resource is to see it: its own if no other flow to the same place
    /// has it, else one near by, else any.
    fn free_port(&mut self, mut outside: Key, tick: Tick) -> Option<u16> {
        /// With at most [`MAX_FLOWS`] of 65535 ports taken, a probe misses with a probability of
        /// one quarter.
        const NEAR: u16 = 32;
        const ANYWHERE: u32 = 64;

        let first = outside.local_port;
        for n in 0..NEAR {
            // After the last port comes 1: 0 is no port.
            outside.local_port = match first.checked_add(n) {
                Some(port) => port,
                None => first.wrapping_add(n).wrapping_add(1),
            };
            if self.is_free(&outside, tick) {
                return Some(outside.local_port);
            }
        }
        for _ in 0..ANYWHERE {
            // Knuth's multiplicative hash walks through all values without a pattern.
            self.probe = self.probe.wrapping_add(1);
            let port = (self.probe.wrapping_mul(2_654_435_769) >> 16) as u16;
            outside.local_port = port.max(1);
            if self.is_free(&outside, tick) {
                return Some(outside.local_port);
            }
        }
        None
    }

    fn is_free(&mut self, outside: &Key, tick: Tick) -> bool {
        let Some(flow) = self.by_outside.get(outside).cloned() else {
            return true;
        };
        let over = flow.is_over(tick);
        if over {
            self.remove(&flow);
        }
        over
    }

    fn make_room(&mut self, tick: Tick) -> Result<(), DropReason> {
        if self.has_room() {
            return Ok(());
        }
        let lately = self
            .last_full_purge
            .is_some_and(|last| tick.0.saturating_sub(last.0) < Tick::of(FULL_PURGE_PAUSE));
        if !lately {
            self.last_full_purge = Some(tick);
            self.purge(tick);
        }
        if self.has_room() {
            Ok(())
        } else {
            Err(DropReason::FlowLimit)
        }
    }

    fn has_room(&self) -> bool {
        self.len() < ASSURED_FLOWS || (self.len() < MAX_FLOWS && self.total.get() < MAX_FLOWS_TOTAL)
    }

    /// The flow that a packet to the client belongs to.
    pub(super) fn answered_by(&mut self, meta: &Meta, tick: Tick) -> Option<Arc<Flow>> {
        // A ping is a question, even where other ICMP goes by the address alone.
        if meta.is_icmp_echo_request() {
            return None;
        }
        self.find(&Key::inbound(meta), tick)
    }

    /// The flow of the packet that an ICMP error is about.
    pub(super) fn about(&mut self, embedded: &Embedded, tick: Tick) -> Option<Arc<Flow>> {
        self.find(&Key::about(embedded), tick)
    }

    fn find(&mut self, outside: &Key, tick: Tick) -> Option<Arc<Flow>> {
        let flow = Arc::clone(self.by_outside.get(outside)?);
        if flow.is_over(tick) {
            self.remove(&flow);
            return None;
        }
        Some(flow)
    }

    fn remove(&mut self, flow: &Arc<Flow>) {
        self.untold.bury(flow);
        if self.by_outside.remove(&flow.outside).is_some() {
            self.total.0.fetch_sub(1, Ordering::Relaxed);
        }
        if flow.is_translated() {
            self.by_inside.remove(&flow.inside);
        }
    }

    /// Drops the flows that are over.
    pub(super) fn purge(&mut self, tick: Tick) {
        let crowded =
            self.len() >= MAX_FLOWS / 4 * 3 || self.total.get() >= MAX_FLOWS_TOTAL / 4 * 3;
        let unanswered = if crowded {
            UNANSWERED_UNDER_PRESSURE
        } else {
            UNANSWERED
        };
        self.drop_those(|flow| flow.is_over_with(tick, unanswered));
    }

    /// Drops the translated flows: what their addresses stand for has changed.
    pub(super) fn clear_translated(&mut self) {
        self.drop_those(Flow::is_translated);
    }

    /// Drops the translated flows to addresses that stand for nothing any more. The client may give
    /// such an address to another name, which must not lead to where the old one did.
    pub(super) fn retain_translated(&mut self, is_known: impl Fn(IpAddr) -> bool) {
        self.drop_those(|flow| flow.is_translated() && !is_known(flow.remote()));
    }

    fn drop_those(&mut self, over: impl Fn(&Flow) -> bool) {
        let before = self.len();
        let untold = &mut self.untold;
        self.by_outside.retain(|_, flow| {
            let over = over(flow);
            if over {
                untold.bury(flow);
            }
            !over
        });
        self.by_inside
            .retain(|_, flow| flow.state.load(Ordering::Relaxed) & GONE == 0);
        self.total
            .0
            .fetch_sub(before - self.len(), Ordering::Relaxed);
        // A table that was large once is not kept so.
        if self.by_outside.capacity() > 4 * self.by_outside.len().max(16) {
            self.by_outside.shrink_to_fit();
            self.by_inside.shrink_to_fit();
        }
    }

    /// Drops all flows.
    pub(super) fn clear(&mut self) {
        self.drop_those(|_| true);
    }

    /// Tells of flows that began or ended since the last call.
    pub(super) fn report(&mut self, teller: &Teller, reports: &mut Reports) {
        let Untold {
            fresh,
            ended,
            refused,
        } = std::mem::take(&mut self.untold);
        for flow in fresh {
            teller.tell_beginning(&flow, reports);
        }
        for flow in ended {
            teller.tell_beginning(&flow, reports);
            teller.tell_end(&flow, reports);
        }
        reports.drop_flows(refused);
    }

    /// Tells of flows that fell silent, or speak again after they did. Looks at every flow.
    pub(super) fn report_silent(&self, tick: Tick, teller: &Teller, reports: &mut Reports) {
        for flow in self.by_outside.values().filter(|f| f.account.is_some()) {
            let last = flow.last();
            if tick.0.saturating_sub(last.0) < Tick::of(SILENCE) {
                teller.tell_beginning(flow, reports);
            } else if teller.tell_end(flow, reports) {
                // Where the next part begins is known when it does.
                flow.began.store(u32::MAX, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_outside.len()
    }
}

/// What reports need to know besides the flow.
pub(super) struct Teller {
    pub(super) client: ClientId,
    pub(super) addresses: TunnelAddresses,
    pub(super) epoch: Instant,
}

impl Teller {
    fn tell_beginning(&self, flow: &Flow, reports: &mut Reports) {
        let Some(account) = flow.account.as_deref().filter(|account| account.begins()) else {
            return;
        };
        if flow.began.load(Ordering::Relaxed) == u32::MAX {
            flow.began.store(flow.last().0, Ordering::Relaxed);
        }
        reports.push(self.report(flow, account, None));
    }

    fn tell_end(&self, flow: &Flow, reports: &mut Reports) -> bool {
        let Some(account) = flow.account.as_deref() else {
            return false;
        };
        let Some(counted) = account.ends() else {
            return false;
        };
        let last_packet = flow.last().instant(self.epoch);
        let end = FlowEnd {
            last_packet,
            counted,
        };
        reports.push(self.report(flow, account, Some(end)));
        true
    }

    fn report(&self, flow: &Flow, account: &Account, end: Option<FlowEnd>) -> FlowReport {
        let outside = flow.outside;
        let TunnelAddresses { ipv4, ipv6 } = self.addresses;
        let own = of_family(ipv4.into(), ipv6.into(), outside.remote);
        let source = SocketAddr::new(own, outside.local_port);
        let destination = SocketAddr::new(outside.remote, outside.remote_port);
        let began = Tick(flow.began.load(Ordering::Relaxed)).instant(self.epoch);
        let protocol = outside.kind.protocol;
        account.report(self.client, protocol, (source, destination), began, end)
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        for flow in self.by_outside.values() {
            flow.state.fetch_or(GONE, Ordering::Relaxed);
        }
        self.total.0.fetch_sub(self.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
#[path = "flows_tests.rs"]
mod tests;
