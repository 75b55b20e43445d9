//! What the tests of connections share.

#![allow(clippy::unwrap_used)]

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

/// A client's agent with the credentials `clnt`, towards a gateway with `gtwy`, and with the timing
/// of stock clients (data-path spec §2.4).
pub(super) fn controlling_agent() -> IceAgent {
    let mut client = IceAgent::new(IceCreds {
        ufrag: "clnt".into(),
        pass: creds("clnt").password,
    });
    client.set_controlling(true);
    client.set_timing_advance(Duration::ZERO);
    client.set_initial_stun_rto(Duration::from_millis(250));
    client.set_max_stun_rto(Duration::from_millis(1500));
    client.set_max_stun_retransmits(12);
    client.set_remote_credentials(IceCreds {
        ufrag: "gtwy".into(),
        pass: creds("gtwy").password,
    });
    client
}
