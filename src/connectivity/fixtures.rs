//! What the tests of connections share.

#![allow(clippy::unwrap_used)]
// Fuzzing needs only a part of it.
#![cfg_attr(not(test), allow(dead_code))]

use std::net::SocketAddr;
use std::time::Duration;

use is::{IceAgent, IceCreds};
use uuid::Uuid;

use crate::ids::ClientId;
use crate::portal::messages::IceCredentials;

pub(super) fn sock(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

pub(super) fn creds(name: &str) -> IceCredentials {
    IceCredentials {
        username: name.to_owned(),
        password: format!("{name}-password-0123456789"),
    }
}

pub(super) fn id() -> ClientId {
    ClientId(Uuid::from_u128(1))
}

/// A client's agent with the credentials `clnt`, towards a gateway with `gtwy`.
pub(super) fn controlling_agent() -> IceAgent {
    agent_of(&creds("clnt"), &creds("gtwy"))
}

/// A client's agent with the timing of stock clients (data-path spec §2.4).
pub(super) fn agent_of(client: &IceCredentials, gateway: &IceCredentials) -> IceAgent {
    let of = |credentials: &IceCredentials| IceCreds {
        ufrag: credentials.username.clone(),
        pass: credentials.password.clone(),
    };
    let mut agent = IceAgent::new(of(client));
    agent.set_controlling(true);
    agent.set_timing_advance(Duration::ZERO);
    agent.set_initial_stun_rto(Duration::from_millis(250));
    agent.set_max_stun_rto(Duration::from_millis(1500));
    agent.set_max_stun_retransmits(12);
    agent.set_remote_credentials(of(gateway));
    agent
}
