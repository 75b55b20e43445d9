//! What the tests of connections share.

#![allow(clippy::unwrap_used)]
// Fuzzing needs only a part of it.
#![cfg_attr(not(test), allow(dead_code))]

use std::net::SocketAddr;
use std::time::Duration;

use is::stun::{StunMessage, TransId};
use is::{DefaultSha1HmacProvider, IceAgent, IceCreds, Sha1HmacProvider as _};
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

/// A message signed with a password.
pub(super) fn signed(message: StunMessage<'_>, password: &str) -> Vec<u8> {
    let mut buffer = vec![0; 1400];
    let hmac = |key: &[u8], parts: &[&[u8]]| DefaultSha1HmacProvider.sha1_hmac(key, parts);
    let len = message
        .to_bytes(Some(password.as_bytes()), &mut buffer, hmac)
        .unwrap();
    buffer.truncate(len);
    buffer
}

/// A check of the client's.
pub(super) fn check(nominates: bool) -> Vec<u8> {
    check_as("gtwy:clnt", &creds("gtwy").password, nominates)
}

/// A check with any credentials.
pub(super) fn check_as(username: &str, password: &str, nominates: bool) -> Vec<u8> {
    let id = TransId::new();
    let priority = 110 << 24 | 65_534 << 8 | 255;
    let request = StunMessage::binding_request(username, id, true, 5, priority, nominates);
    signed(request, password)
}

/// An answer to a check of the gateway's, signed with a password.
pub(super) fn answer_as(check: &[u8], mapped: SocketAddr, password: &str) -> Vec<u8> {
    let id = StunMessage::parse(check).unwrap().trans_id();
    signed(StunMessage::binding_reply(id, mapped), password)
}

/// The client's answer to a check of the gateway's, which it sees come from `mapped`.
pub(super) fn answer(check: &[u8], mapped: SocketAddr) -> Vec<u8> {
    answer_as(check, mapped, &creds("clnt").password)
}

pub(super) fn attribute_types(message: &[u8]) -> Vec<u16> {
    let mut types = Vec::new();
    let mut rest = &message[20..];
    while !rest.is_empty() {
        types.push(u16::from_be_bytes([rest[0], rest[1]]));
        let len = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        rest = &rest[4 + len.next_multiple_of(4)..];
    }
    types
}
