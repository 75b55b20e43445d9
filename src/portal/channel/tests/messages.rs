//! Every event of the channel (portal-channel spec §4.1), and what becomes of it.

use super::*;
use crate::portal::messages::Ingress;

const ID: &str = "11111111-2222-4333-8444-555555555555";

/// The one message that a push becomes.
fn delivered(event: &str, payload: Value) -> Ingress {
    let mut lab = Lab::stable();
    lab.push(event, payload);
    let mut events = std::mem::take(&mut lab.events);
    match (events.pop(), events.len()) {
        (Some(Event::Message(message)), 0) => message,
        other => panic!("{event}: {other:?}"),
    }
}

/// A push that is known to nobody here changes nothing but a counter.
fn ignored(event: &str, payload: Value) {
    let mut lab = Lab::stable();
    lab.push(event, payload);
    assert!(lab.take_events().is_empty(), "{event}");
    assert_eq!(lab.channel.counters().unknown_events, 1, "{event}");
    assert!(lab.channel.is_joined());
}

fn sent(message: Egress) -> Value {
    let mut lab = Lab::stable();
    lab.channel.send(lab.now, message).unwrap();
    lab.drain();
    lab.sent.pop().unwrap()
}

fn authorization() -> Value {
    let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    let credentials = json!({"username": "ww54", "password": "atm32zsp76tbbrq6su4fqb"});
    json!({
        "ref": "opaque", "resource": {"type": "internet", "id": ID},
        "client": {"id": ID, "public_key": key, "preshared_key": key,
            "ipv4": "100.70.1.5", "ipv6": "fd00:2021:1111::1:5"},
        "client_ice_credentials": credentials, "gateway_ice_credentials": credentials,
        "expires_at": 1_790_000_000, "flow_logs_ingest_token": "not a token",
    })
}

#[test]
fn init_is_delivered() {
    assert!(matches!(delivered("init", init()), Ingress::Init(_)));
}

#[test]
fn init_is_delivered_again_in_the_same_session() {
    let mut lab = Lab::stable();
    lab.push("init", init());
    lab.push("init", init());
    assert_eq!(lab.take_events(), ["message", "message"]);
}

#[test]
fn create_authorization_of_version_2_is_delivered() {
    let Ingress::CreateAuthorization(grant) = delivered("create_authorization", authorization())
    else {
        panic!("not a grant");
    };
    assert_eq!(grant.reference, "opaque");
}

#[test]
fn authorize_flow_of_version_1_is_the_same_thing() {
    let Ingress::CreateAuthorization(grant) = delivered("authorize_flow", authorization()) else {
        panic!("not a grant");
    };
    assert_eq!(grant.reference, "opaque");
}

#[test]
fn reject_access_is_delivered() {
    let payload = json!({"client_id": ID, "resource_id": ID});
    let message = delivered("reject_access", payload);
    assert!(matches!(message, Ingress::RejectAccess { .. }));
}

#[test]
fn resource_updated_is_delivered() {
    let message = delivered("resource_updated", json!({"type": "internet", "id": ID}));
    assert!(matches!(message, Ingress::ResourceUpdated(_)));
}

#[test]
fn relays_presence_is_delivered() {
    let message = delivered(
        "relays_presence",
        json!({"disconnected_ids": [ID], "connected": []}),
    );
    assert!(matches!(message, Ingress::RelaysPresence(_)));
}

#[test]
fn ice_candidates_are_delivered() {
    let payload = json!({"client_id": ID, "candidates": ["candidate:1 …"]});
    let message = delivered("ice_candidates", payload);
    assert!(matches!(message, Ingress::IceCandidates { .. }));
}

#[test]
fn invalidate_ice_candidates_are_delivered() {
    let payload = json!({"client_id": ID, "candidates": []});
    let message = delivered("invalidate_ice_candidates", payload);
    assert!(matches!(message, Ingress::InvalidateIceCandidates { .. }));
}

#[test]
fn allow_access_and_request_connection_of_old_clients_are_ignored() {
    ignored("allow_access", json!({"ref": "x", "client_id": ID}));
    ignored("request_connection", json!({"ref": "x"}));
}

#[test]
fn access_authorization_expiry_updated_is_ignored() {
    ignored(
        "access_authorization_expiry_updated",
        json!({"client_id": ID, "resource_id": ID, "expires_at": 1}),
    );
}

#[test]
fn events_that_are_for_clients_are_ignored() {
    ignored("resource_created", json!({"type": "internet", "id": ID}));
    ignored("resource_deleted", json!(ID));
    ignored("config_changed", json!({"interface": {}}));
}

#[test]
fn events_of_the_future_are_ignored() {
    ignored("gateway_posture_requested", json!({"a": [1, {"b": null}]}));
}

#[test]
fn a_grant_for_a_kind_of_resource_that_we_do_not_know_is_refused_and_counted() {
    let mut lab = Lab::stable();
    let mut payload = authorization();
    payload["resource"]["type"] = json!("static_device_pool");
    lab.push("create_authorization", payload);
    assert!(lab.take_events().is_empty() && lab.channel.is_joined());
    assert_eq!(lab.channel.counters().refused_messages, 1);
}

#[test]
fn a_grant_without_an_ingest_token_is_a_grant() {
    let mut payload = authorization();
    payload
        .as_object_mut()
        .unwrap()
        .remove("flow_logs_ingest_token");
    delivered("create_authorization", payload);
}

#[test]
fn a_filter_that_we_do_not_know_costs_neither_the_message_nor_the_filter_list() {
    let mut lab = Lab::stable();
    let mut payload = authorization();
    payload["resource"] = json!({"type": "cidr", "id": ID, "address": "10.0.0.0/8", "name": "n",
        "filters": [{"protocol": "sctp"}]});
    lab.push("create_authorization", payload);
    assert_eq!(lab.take_events(), ["message"]);
    assert_eq!(lab.channel.counters().skipped_items, 1);
}

#[test]
fn authorization_created_echoes_the_reference_byte_for_byte() {
    let reference = "SFMyNTY.g2gDdAAA-\"\\\u{e9}".to_owned();
    let frame = sent(Egress::AuthorizationCreated {
        reference: reference.clone(),
    });
    assert_eq!(frame["event"], "authorization_created");
    assert_eq!(frame["payload"], json!({"ref": reference}));
}

#[test]
fn broadcasts_no_relays_and_capabilities_are_sent_under_their_names() {
    let cases = [
        (
            Egress::BroadcastIceCandidates {
                client_ids: vec![],
                candidates: vec![],
            },
            "broadcast_ice_candidates",
        ),
        (
            Egress::BroadcastInvalidatedIceCandidates {
                client_ids: vec![],
                candidates: vec![],
            },
            "broadcast_invalidated_ice_candidates",
        ),
        (Egress::NoRelays, "no_relays"),
        (
            Egress::SetSnownetCapabilities { iceless: false },
            "set_snownet_capabilities",
        ),
    ];
    for (message, event) in cases {
        let frame = sent(message);
        assert_eq!(
            (&frame["topic"], &frame["event"]),
            (&json!("gateway"), &json!(event))
        );
        assert!(frame["ref"].is_u64());
    }
}

#[test]
fn application_messages_date_the_session_and_heartbeats_do_not() {
    let mut lab = Lab::stable();
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    lab.push("resource_deleted", json!(ID));
    lab.advance(25 * SECOND);
    let age = |lab: &Lab| 1_000_000.0 - lab.channel.status(lab.now, wall).last_message_at.unwrap();
    assert_eq!(age(&lab), 35.0, "unknown events say nothing to us");
    lab.push("init", init());
    assert_eq!(age(&lab), 0.0);
}
