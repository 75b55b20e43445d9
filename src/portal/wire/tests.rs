#![allow(clippy::unwrap_used)]

use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::*;
use crate::ids::ClientId;
use crate::portal::messages::{Filter, Init, RelaysPresence, Resource};

const CLIENT: &str = "11111111-2222-4333-8444-555555555555";
const RESOURCE: &str = "0b0b0b0b-1111-4222-8333-444444444444";
const RELAY: &str = "271a413b-d339-4570-9fdc-eaec41f14f11";

fn push(event: &str, payload: Value) -> Result<Inbound, WireError> {
    decode(
        &json!({"topic": "gateway", "event": event, "ref": null, "payload": payload}).to_string(),
    )
}

fn message(event: &str, payload: Value) -> (Ingress, usize) {
    match push(event, payload).unwrap() {
        Inbound::Message { message, skipped } => (message, skipped),
        other => panic!("not a message: {other:?}"),
    }
}

fn refusal(event: &str, payload: Value) -> String {
    match push(event, payload) {
        Err(WireError::Refused { event: e, problem }) => {
            assert_eq!(e, event);
            problem
        }
        other => panic!("not refused: {other:?}"),
    }
}

fn init(payload: Value) -> (Init, usize) {
    match message("init", payload) {
        (Ingress::Init(init), skipped) => (init, skipped),
        other => panic!("{other:?}"),
    }
}

fn turn(id: &str, addr: &str) -> Value {
    json!({"id": id, "type": "turn", "addr": addr, "username": "2145916800:salt",
        "password": "hunter2", "expires_at": 2145916800})
}

fn interface() -> Value {
    json!({"ipv4": "100.70.8.21", "ipv6": "fd00:2021:1111::7:4"})
}

fn authorization() -> Value {
    json!({
        "ref": "opaque-signed/string==",
        "resource": {"type": "cidr", "id": RESOURCE, "address": "10.20.0.0/16", "name": "Lab",
            "filters": []},
        "client": {"id": CLIENT,
            "public_key": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
            "preshared_key": "6GxN1vJ+n3QtDvDYH7VdhJsulbIlWRKEQTO3PoNi8ts=",
            "ipv4": "100.70.1.5", "ipv6": "fd00:2021:1111::1:5", "version": "1.5.11",
            "device_os_name": "Debian", "device_serial": null},
        "client_ice_credentials": {"username": "ww54", "password": "atm32zsp76tbbrq6su4fqb"},
        "gateway_ice_credentials": {"username": "qslo", "password": "we3usyefp3j3i2wk2gockq"},
        "expires_at": 1790000000,
        "use_iceless": false,
        "subject": {"actor_name": "Ada"},
        "flow_logs_ingest_token": "a.b.c"
    })
}

// ---- What we send ----

#[test]
fn frames_are_v1_objects_with_numeric_ref_in_reference_key_order() {
    assert_eq!(
        encode_join(0),
        r#"{"topic":"gateway","event":"phx_join","payload":null,"ref":0}"#
    );
    assert_eq!(
        encode_heartbeat(7),
        r#"{"topic":"phoenix","event":"heartbeat","payload":{},"ref":7}"#
    );
}

#[test]
fn every_message_has_its_documented_shape() {
    let client: ClientId = uuid::Uuid::parse_str(CLIENT).unwrap().into();
    let cases = [
        (
            Egress::AuthorizationCreated {
                reference: "a\"b".to_owned(),
            },
            json!({"topic": "gateway", "event": "authorization_created",
                "payload": {"ref": "a\"b"}, "ref": 5}),
        ),
        (
            Egress::BroadcastIceCandidates {
                client_ids: vec![client],
                candidates: vec!["candidate:1".to_owned()],
            },
            json!({"topic": "gateway", "event": "broadcast_ice_candidates",
                "payload": {"client_ids": [CLIENT], "candidates": ["candidate:1"]}, "ref": 5}),
        ),
        (
            Egress::BroadcastInvalidatedIceCandidates {
                client_ids: vec![client],
                candidates: vec![],
            },
            json!({"topic": "gateway", "event": "broadcast_invalidated_ice_candidates",
                "payload": {"client_ids": [CLIENT], "candidates": []}, "ref": 5}),
        ),
        (
            Egress::NoRelays,
            json!({"topic": "gateway", "event": "no_relays", "payload": {}, "ref": 5}),
        ),
        (
            Egress::SetSnownetCapabilities { iceless: false },
            json!({"topic": "gateway", "event": "set_snownet_capabilities",
                "payload": {"iceless": false}, "ref": 5}),
        ),
    ];
    for (message, expected) in cases {
        let text = encode(&message, 5, Protocol::V2);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), expected);
    }
}

#[test]
fn version_1_has_other_names_for_an_authorization_and_its_answer_alone() {
    let answer = Egress::AuthorizationCreated {
        reference: "r".to_owned(),
    };
    assert_eq!(
        serde_json::from_str::<Value>(&encode(&answer, 5, Protocol::V1)).unwrap(),
        json!({"topic": "gateway", "event": "flow_authorized", "payload": {"ref": "r"}, "ref": 5})
    );
    for message in [
        Egress::NoRelays,
        Egress::SetSnownetCapabilities { iceless: false },
        Egress::BroadcastIceCandidates {
            client_ids: vec![],
            candidates: vec![],
        },
        Egress::BroadcastInvalidatedIceCandidates {
            client_ids: vec![],
            candidates: vec![],
        },
    ] {
        assert_eq!(
            encode(&message, 5, Protocol::V1),
            encode(&message, 5, Protocol::V2)
        );
    }
    let (v1, _) = message("authorize_flow", authorization());
    let (v2, _) = message("create_authorization", authorization());
    assert_eq!(format!("{v1:?}"), format!("{v2:?}"));
}

// ---- Replies and control ----

#[test]
fn replies_are_told_apart_by_topic_reference_and_status() {
    let reply = |text: &str| match decode(text).unwrap() {
        Inbound::Reply(reply) => reply,
        other => panic!("{other:?}"),
    };
    let ok = reply(
        r#"{"topic":"gateway","event":"phx_reply","ref":0,"payload":{"status":"ok","response":{}}}"#,
    );
    assert_eq!(
        (ok.topic.as_str(), ok.reference, ok.result),
        ("gateway", Some(0), Ok(()))
    );

    let error = reply(
        r#"{"ref":3,"topic":"gateway","event":"phx_reply",
            "payload":{"status":"error","response":{"reason":"unmatched topic"}}}"#,
    );
    assert_eq!(error.result, Err("unmatched topic".to_owned()));
}

#[test]
fn join_reply_with_members_in_response_or_null_is_still_a_yes() {
    for response in [json!({"a": 1}), Value::Null, json!([])] {
        let text = json!({"topic": "gateway", "event": "phx_reply", "ref": 0,
            "payload": {"status": "ok", "response": response}});
        match decode(&text.to_string()).unwrap() {
            Inbound::Reply(reply) => assert_eq!(reply.result, Ok(())),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn reply_without_usable_reference_is_a_reply_without_reference() {
    for reference in ["null", "-1", "1.5", "{}", "\"x\""] {
        let text = format!(
            r#"{{"topic":"gateway","event":"phx_reply","ref":{reference},
                "payload":{{"status":"ok","response":{{}}}}}}"#
        );
        match decode(&text).unwrap() {
            Inbound::Reply(reply) => assert_eq!(reply.reference, None, "{reference}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn control_events_are_recognised_whatever_their_payload() {
    for payload in [json!({}), Value::Null, json!({"more": 1})] {
        assert!(matches!(
            push("phx_close", payload.clone()),
            Ok(Inbound::ChannelClosed)
        ));
        assert!(matches!(
            push("phx_error", payload),
            Ok(Inbound::ChannelCrashed)
        ));
    }
    match push("disconnect", json!({"reason": "token_expired"})).unwrap() {
        Inbound::Disconnect { reason } => assert_eq!(reason, "token_expired"),
        other => panic!("{other:?}"),
    }
    match push("disconnect", json!({})).unwrap() {
        Inbound::Disconnect { reason } => assert_eq!(reason, "unspecified"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn unknown_events_and_topics_are_reported_as_such() {
    for event in [
        "allow_access",
        "access_authorization_expiry_updated",
        "config_changed",
    ] {
        match push(event, json!({"x": 1})).unwrap() {
            Inbound::Unknown { event: e } => assert_eq!(e, event),
            other => panic!("{other:?}"),
        }
    }
    let elsewhere = r#"{"topic":"relay","event":"init","payload":{},"ref":null}"#;
    assert!(matches!(decode(elsewhere), Ok(Inbound::Unknown { .. })));
}

#[test]
fn truncated_json_is_told_apart_from_other_nonsense() {
    for text in ["", "{", r#"{"topic":"gateway","ev"#] {
        assert_eq!(decode(text).unwrap_err(), WireError::Truncated, "{text:?}");
    }
    for text in [
        "[]",
        "1",
        "nonsense",
        r#"{"topic":"gateway"}"#,
        r#"{"topic":1,"event":"x"}"#,
    ] {
        assert!(
            matches!(decode(text), Err(WireError::NotAFrame(_))),
            "{text:?}"
        );
    }
}

#[test]
fn errors_quote_nothing_of_the_frame() {
    let text = r#"{"topic":{"password":"hunter2"},"event":"x"}"#;
    assert!(!decode(text).unwrap_err().to_string().contains("hunter2"));
    let mut payload = authorization();
    payload["client"]["preshared_key"] = json!("hunter2");
    assert!(!refusal("create_authorization", payload).contains("hunter2"));
}

// ---- init ----

#[test]
fn init_is_decoded_with_unknown_members_ignored() {
    let (init, skipped) = init(json!({
        "interface": {"ipv4": "100.70.8.21", "ipv6": "fd00:2021:1111::7:4", "upstream_do53": []},
        "config": {"ipv4_masquerade_enabled": true, "ipv6_masquerade_enabled": true},
        "account_slug": "acme_lab",
        "relays": [turn(RELAY, "198.51.100.9:3478"), turn(RELAY, "[2001:db8::9]:3478")],
        "authorizations": [{"client_id": CLIENT, "resource_id": RESOURCE, "expires_at": 1790000000}],
        "flow_logs": {"api_url": "https://logs.example.net/", "upload_interval_secs": 60},
        "brand_new": {"x": []}
    }));
    assert_eq!(skipped, 0);
    assert_eq!(init.interface.ipv4.to_string(), "100.70.8.21");
    assert_eq!(init.account_slug.as_deref(), Some("acme_lab"));
    assert_eq!(init.authorizations[0].expires_at, Some(1_790_000_000));
    let [relay] = init.relays.as_slice() else {
        panic!("one relay with two addresses: {:?}", init.relays);
    };
    assert_eq!(relay.v4, Some("198.51.100.9:3478".parse().unwrap()));
    assert_eq!(relay.v6, Some("[2001:db8::9]:3478".parse().unwrap()));
    assert_eq!(relay.password.expose_secret(), "hunter2");
    assert!(!format!("{init:?}").contains("hunter2"));
}

#[test]
fn init_needs_nothing_but_the_interface() {
    let (bare, skipped) = init(json!({"interface": interface()}));
    assert!(bare.relays.is_empty() && bare.authorizations.is_empty() && skipped == 0);
    assert_eq!(bare.account_slug, None);
    let (nulls, _) = init(json!({"interface": interface(), "account_slug": null, "relays": null}));
    assert!(nulls.relays.is_empty());
    assert!(refusal("init", json!({})).contains("interface"));
    assert!(refusal("init", json!({"interface": {"ipv4": "100.70.8.21"}})).contains("ipv6"));
    assert!(
        refusal(
            "init",
            json!({"interface": interface(), "authorizations": 5})
        )
        .contains("list")
    );
}

#[test]
fn relay_entries_are_grouped_by_id_whatever_their_order() {
    let other = "8d0a8b2e-98b3-4a9b-9f3c-3f2b8c1d0e4f";
    let (init, _) = init(json!({"interface": interface(), "relays": [
        turn(RELAY, "[2001:db8::9]:3478"),
        turn(other, "203.0.113.1:3478"),
        turn(RELAY, "198.51.100.9:3478"),
    ]}));
    assert_eq!(init.relays.len(), 2);
    assert!(init.relays[0].v4.is_some() && init.relays[0].v6.is_some());
    assert!(init.relays[1].v4.is_some() && init.relays[1].v6.is_none());
}

#[test]
fn bad_list_entries_are_left_out_one_by_one() {
    let mut no_port = turn(RELAY, "198.51.100.9");
    no_port["note"] = json!("no port");
    let (init, skipped) = init(json!({
        "interface": interface(),
        "relays": [no_port, 5, {"type": "teleport"}, turn(RELAY, "198.51.100.9:3478"),
            {"id": RELAY, "type": "stun", "addr": "198.51.100.9:3478"}],
        "authorizations": [
            {"client_id": "x", "resource_id": RESOURCE, "expires_at": 1},
            {"client_id": CLIENT, "resource_id": RESOURCE, "expires_at": "tomorrow"},
            {"client_id": CLIENT, "resource_id": RESOURCE, "expires_at": null}],
    }));
    assert_eq!(skipped, 5, "a stun entry is no mistake");
    assert_eq!(init.relays.len(), 1);
    assert_eq!(init.authorizations.len(), 1);
    assert_eq!(init.authorizations[0].expires_at, None);
}

// ---- Authorizations and resources ----

#[test]
fn authorization_is_decoded() {
    let (Ingress::CreateAuthorization(a), 0) = message("create_authorization", authorization())
    else {
        panic!("not an authorization");
    };
    assert_eq!(a.reference, "opaque-signed/string==");
    assert_eq!(a.client.public_key, [1; 32]);
    assert_eq!(a.client.version.as_deref(), Some("1.5.11"));
    assert_eq!(a.expires_at, Some(1_790_000_000));
    assert_eq!(a.gateway_ice_credentials.username, "qslo");
    assert!(!a.use_iceless);
    assert_eq!(a.resource.id().to_string(), RESOURCE);
    let debug = format!("{a:?}");
    assert!(!debug.contains("we3usyefp3j3i2wk2gockq") && !debug.contains("232, 108"));
}

#[test]
fn authorization_tolerates_what_older_and_newer_portals_leave_out() {
    let mut payload = authorization();
    let members = payload.as_object_mut().unwrap();
    for optional in [
        "flow_logs_ingest_token",
        "subject",
        "use_iceless",
        "expires_at",
    ] {
        members.remove(optional);
    }
    let (Ingress::CreateAuthorization(a), _) = message("create_authorization", payload) else {
        panic!("not an authorization");
    };
    assert_eq!((a.expires_at, a.use_iceless), (None, false));
}

#[test]
fn authorization_without_a_required_member_is_refused() {
    for pointer in [
        "ref",
        "resource",
        "client",
        "client_ice_credentials",
        "gateway_ice_credentials",
    ] {
        let mut payload = authorization();
        payload.as_object_mut().unwrap().remove(pointer);
        assert!(refusal("create_authorization", payload).contains(pointer));
    }
    for member in ["id", "public_key", "preshared_key", "ipv4", "ipv6"] {
        let mut payload = authorization();
        payload["client"].as_object_mut().unwrap().remove(member);
        assert!(refusal("create_authorization", payload).contains(member));
    }
}

#[test]
fn ice_user_names_that_no_check_can_carry_are_refused() {
    for name in ["client_ice_credentials", "gateway_ice_credentials"] {
        let mut payload = authorization();
        payload[name]["username"] = json!("x".repeat(64));
        assert!(refusal("create_authorization", payload).contains(name));
    }
}

#[test]
fn keys_must_be_32_bytes_of_padded_standard_base64() {
    for key in [
        "AQEB",
        "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE",
        "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ==",
        "!",
    ] {
        let mut payload = authorization();
        payload["client"]["public_key"] = json!(key);
        assert!(
            refusal("create_authorization", payload).contains("public_key"),
            "{key}"
        );
    }
}

#[test]
fn expiry_that_is_no_timestamp_never_becomes_unlimited() {
    for expiry in [json!("1790000000"), json!(-5), json!(1.5), json!({})] {
        let mut payload = authorization();
        payload["expires_at"] = expiry;
        assert!(refusal("create_authorization", payload).contains("expires_at"));
    }
}

#[test]
fn filters_are_decoded_with_their_defaults() {
    let (Ingress::ResourceUpdated(Resource::Dns(resource)), _) = message(
        "resource_updated",
        json!({"type": "dns", "id": RESOURCE, "address": "**.corp.example", "name": "Corp",
            "filters": [{"protocol": "tcp", "port_range_start": 443, "port_range_end": 443},
                {"protocol": "udp"}, {"protocol": "icmp", "new": 1}]}),
    ) else {
        panic!("not a DNS resource");
    };
    assert_eq!(resource.address, "**.corp.example");
    assert_eq!(
        resource.filters,
        [
            Filter::Tcp {
                start: 443,
                end: 443
            },
            Filter::Udp {
                start: 0,
                end: 65535
            },
            Filter::Icmp
        ]
    );
}

#[test]
fn a_filter_that_cannot_be_read_allows_nothing_and_costs_nothing_else() {
    for filter in [
        json!({"protocol": "sctp"}),
        json!({}),
        json!("tcp"),
        json!({"protocol": "tcp", "port_range_start": 65536}),
        json!({"protocol": "tcp", "port_range_start": null}),
        json!({"protocol": "tcp", "port_range_start": "443"}),
        json!({"protocol": "udp", "port_range_start": 2, "port_range_end": 1}),
    ] {
        let resource = json!({"type": "cidr", "id": RESOURCE, "address": "10.0.0.0/8", "name": "x",
            "filters": [{"protocol": "icmp"}, filter]});
        let (updated, skipped) = message("resource_updated", resource.clone());
        let Ingress::ResourceUpdated(Resource::Cidr(cidr)) = updated else {
            panic!("not a network");
        };
        assert_eq!(
            (cidr.filters, skipped),
            (vec![Filter::Icmp, Filter::Unreadable], 1),
            "{filter}"
        );
        let mut payload = authorization();
        payload["resource"] = resource;
        assert_eq!(message("create_authorization", payload).1, 1);
    }
}

#[test]
fn an_allow_list_without_a_readable_entry_does_not_become_the_one_that_allows_everything() {
    let resource = json!({"type": "cidr", "id": RESOURCE, "address": "10.0.0.0/8", "name": "x",
        "filters": [{"protocol": "sctp"}]});
    let (Ingress::ResourceUpdated(Resource::Cidr(cidr)), 1) = message("resource_updated", resource)
    else {
        panic!("not a network with one entry left out");
    };
    assert_eq!(cidr.filters, [Filter::Unreadable]);
}

#[test]
fn filters_that_are_no_list_refuse_the_message() {
    for filters in [json!({}), json!(null), json!("all"), json!(0)] {
        let resource = json!({"type": "cidr", "id": RESOURCE, "address": "10.0.0.0/8", "name": "x",
            "filters": filters});
        assert!(refusal("resource_updated", resource).contains("filters"));
    }
}

#[test]
fn absent_filters_are_not_taken_for_an_empty_list_which_allows_everything() {
    let resource = json!({"type": "cidr", "id": RESOURCE, "address": "10.0.0.0/8", "name": "x"});
    assert!(refusal("resource_updated", resource).contains("filters"));
}

#[test]
fn resources_are_told_apart_by_type() {
    let (updated, _) = message(
        "resource_updated",
        json!({"type": "internet", "id": RESOURCE}),
    );
    assert!(matches!(
        updated,
        Ingress::ResourceUpdated(Resource::Internet { .. })
    ));
    let (updated, _) = message(
        "resource_updated",
        json!({"type": "cidr", "id": RESOURCE, "address": "192.0.2.7", "filters": []}),
    );
    let Ingress::ResourceUpdated(Resource::Cidr(cidr)) = updated else {
        panic!("not a network");
    };
    assert_eq!(cidr.address.to_string(), "192.0.2.7/32");
    for kind in ["static_device_pool", ""] {
        assert!(
            refusal("resource_updated", json!({"type": kind, "id": RESOURCE})).contains("type")
        );
    }
    for address in ["10.0.0.0/33", "10.0.0.1/8", "host.example", ""] {
        refusal(
            "resource_updated",
            json!({"type": "cidr", "id": RESOURCE, "address": address, "filters": []}),
        );
    }
}

// ---- The rest ----

#[test]
fn reject_access_is_decoded() {
    let (rejected, _) = message(
        "reject_access",
        json!({"client_id": CLIENT, "resource_id": RESOURCE}),
    );
    assert!(matches!(
        rejected,
        Ingress::RejectAccess { client_id, resource_id }
            if client_id.to_string() == CLIENT && resource_id.to_string() == RESOURCE
    ));
    refusal("reject_access", json!({"client_id": CLIENT}));
}

#[test]
fn candidates_that_are_no_text_are_left_out() {
    for event in ["ice_candidates", "invalidate_ice_candidates"] {
        let (message, skipped) = message(
            event,
            json!({"client_id": CLIENT, "candidates": ["candidate:1", 5, null, "garbage"]}),
        );
        let (Ingress::IceCandidates { candidates, .. }
        | Ingress::InvalidateIceCandidates { candidates, .. }) = message
        else {
            panic!("not candidates");
        };
        assert_eq!(
            candidates,
            ["candidate:1", "garbage"],
            "the ICE layer judges the lines"
        );
        assert_eq!(skipped, 2);
        refusal(event, json!({"client_id": CLIENT}));
    }
}

#[test]
fn relays_presence_is_decoded_tolerantly() {
    let (message, skipped) = message(
        "relays_presence",
        json!({"disconnected_ids": [RELAY, "x"], "connected": [turn(RELAY, "[2001:db8::9]:3478"), {}]}),
    );
    let Ingress::RelaysPresence(RelaysPresence {
        disconnected_ids,
        connected,
    }) = message
    else {
        panic!("not relays_presence");
    };
    assert_eq!(
        (disconnected_ids.len(), connected.len(), skipped),
        (1, 1, 2)
    );
    assert_eq!(connected[0].v4, None);
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_decoder_panic(text in "\\PC{0,200}") {
        let _ = decode(&text);
    }

    #[test]
    fn no_mutation_of_a_payload_makes_the_decoder_panic(
        at in 0usize..900, replacement in proptest::sample::select(vec!["null", "[]", "1", "\"\"", "{"]),
    ) {
        let text = json!({"topic": "gateway", "event": "create_authorization",
            "payload": authorization()}).to_string();
        let at = at.min(text.len());
        let mut mutated = text[..at].to_owned();
        mutated.push_str(replacement);
        mutated.push_str(&text[(at + 3).min(text.len())..]);
        let _ = decode(&mutated);
    }
}
