//! One allocation against TURN servers of either kind, in virtual time.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use secrecy::SecretString;
use uuid::Uuid;

use super::double::{
    ALLOCATE, BINDING, CHANNEL_BIND, Fate, LOCAL_V4, LOCAL_V6, Machine, NAT_V4, PASSWORD, REFRESH,
    Seen, Style, TurnServer, USER, World, method_of,
};
use super::{Allocation, AllocationEvent, RelayError, RelayTransmit, channel_data};
use crate::ids::RelayId;
use crate::portal::messages::RelayEntry;

mod channels;
mod life;
mod losses;
mod trust;

const V4: &str = "192.0.2.10:3478";
const V6: &str = "[2001:db8::10]:3478";

impl Machine for Allocation {
    fn packet(&mut self, now: Instant, local: SocketAddr, from: SocketAddr, datagram: &[u8]) {
        if channel_data::is_channel_data(datagram) {
            self.decapsulate(now, datagram);
        } else {
            self.handle_packet(now, local, from, datagram);
        }
    }

    fn timeout(&mut self, now: Instant) {
        self.handle_timeout(now);
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.poll_timeout().map(|(at, _)| at)
    }

    fn transmit(&mut self) -> Option<RelayTransmit> {
        self.poll_transmit()
    }
}

fn addr(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

fn peer(port: u16) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 5], port))
}

fn entry(v4: Option<&str>, v6: Option<&str>) -> RelayEntry {
    RelayEntry {
        id: RelayId(Uuid::from_u128(1)),
        v4: v4.map(addr),
        v6: v6.map(addr),
        username: USER.to_owned(),
        password: SecretString::from(PASSWORD),
        expires_at: 2_145_916_800,
    }
}

pub(super) fn dual_stack(style: Style) -> TurnServer {
    TurnServer::new(style, &[V4, V6], &["192.0.2.10", "2001:db8::10"])
}

pub(super) fn world_with(server: TurnServer) -> World<Allocation> {
    let now = Instant::now();
    let has = |s: &str| server.sockets.contains(&addr(s));
    let entry = entry(has(V4).then_some(V4), has(V6).then_some(V6));
    World::new(now, Allocation::new(now, &entry, 7), vec![server])
}

fn world(style: Style) -> World<Allocation> {
    world_with(dual_stack(style))
}

/// A world whose allocation is there.
pub(super) fn allocated(style: Style) -> World<Allocation> {
    let mut world = world(style);
    world.run_secs(1);
    assert!(world.machine.is_allocated());
    events(&mut world);
    world
}

fn events(world: &mut World<Allocation>) -> Vec<AllocationEvent> {
    std::iter::from_fn(|| world.machine.poll_event()).collect()
}

fn losses(world: &mut World<Allocation>) -> Vec<RelayError> {
    events(world)
        .into_iter()
        .filter_map(|event| match event {
            AllocationEvent::Lost { cause } => Some(cause),
            _ => None,
        })
        .collect()
}

fn of_method(world: &World<Allocation>, method: u16) -> Vec<Seen> {
    let seen = world.servers[0].seen.iter();
    seen.filter(|s| s.method == method).cloned().collect()
}

fn relayed(world: &World<Allocation>) -> Vec<SocketAddr> {
    world.machine.relayed().collect()
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}
