//! What the tests of several parts need.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::{Authorization, End, Outer, Protocol, Record};

/// Unix seconds of the tests' present.
pub(super) const NOW: u64 = 1_790_000_000;

pub(super) fn at(unix: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(unix)
}

/// The claims of a token that is good until the year 2100.
pub(crate) fn claims(id: &str) -> Value {
    json!({
        "account_id": "b1e9a5f0-5a0e-4f0e-8c7c-6ba2f5f5a111",
        "iat": NOW,
        "exp": 4_102_444_800_u64,
        "uploads_enabled": true,
        "role": "responder",
        "initiator_device_id": "11111111-2222-4333-8444-555555555555",
        "responder_device_id": "66666666-7777-4888-9999-aaaaaaaaaaaa",
        "policy_authorization_id": id,
        "policy_id": "77777777-7777-4777-8777-777777777777",
        "resource_id": "0a0a0a0a-1b1b-4c2c-8d3d-4e4e4e4e4e4e",
        "resource_name": "Wiki",
        "initiator_actor_id": "99999999-9999-4999-8999-999999999999",
        "initiator_actor_name": "Ada",
        "authorized_at": "2026-09-21T00:00:00Z",
        "authorization_expires_at": "2026-09-22T00:00:00Z",
    })
}

pub(crate) fn token_of(claims: &Value) -> String {
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    format!(
        "{}.{}.{}",
        part(r#"{"alg":"HS256","typ":"JWT"}"#),
        part(&claims.to_string()),
        part("not checked")
    )
}

/// An authorization with one claim changed.
pub(super) fn authorization_with(id: &str, claim: &str, value: Value) -> Arc<Authorization> {
    let mut claims = claims(id);
    claims[claim] = value;
    Arc::new(Authorization::parse(&token_of(&claims)).unwrap())
}

pub(super) fn authorization(id: &str) -> Arc<Authorization> {
    Arc::new(Authorization::parse(&token_of(&claims(id))).unwrap())
}

/// The start of a flow; flows with different numbers start one second apart.
pub(super) fn start(number: u16) -> Record {
    Record {
        protocol: Protocol::Tcp,
        inner_src: format!("100.64.0.9:{number}").parse().unwrap(),
        inner_dst: "10.1.2.3:443".parse().unwrap(),
        domain: Some("wiki.example.com".to_owned()),
        outers: vec![Outer {
            src: Some("192.0.2.1:51820".parse().unwrap()),
            dst: "198.51.100.7:3478".parse().unwrap(),
            path_activated_at: at(NOW),
        }],
        flow_start: at(NOW + u64::from(number)),
        end: None,
    }
}

/// The end of the flow with that number.
pub(super) fn end(number: u16) -> Record {
    let mut record = start(number);
    record.end = Some(End {
        flow_end: record.flow_start + Duration::from_secs(10),
        last_packet: record.flow_start + Duration::from_secs(8),
        rx_packets: 3,
        tx_packets: 2,
        rx_bytes: 300,
        tx_bytes: 200,
    });
    record
}
