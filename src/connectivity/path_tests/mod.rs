//! Paths between gateway and client in virtual time: how they die, are left and found again.

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

mod direct;
mod relays;
mod schedules;
mod told;
mod world;

use world::{CLIENT, CLIENT_RELAYED, CLIENT_V6, GATEWAY, GATEWAY_V6, RELAYS, World};

/// Direct is out of the question; returns the relay in use.
fn over_a_relay(w: &mut World) -> usize {
    w.direct_loss = 1.0;
    w.run(40.0);
    assert_eq!(w.kind(), Some(PathKind::RelayLocal));
    let (_, to) = w.client_sends_to.unwrap();
    w.relay_at(to.ip()).unwrap()
}
