//! Connecting, joining and the common rules of a channel.

use std::time::Duration;

use firezone_lab::portal::Timings;
use serde_json::{Value, json};

use crate::support::{Dial, GATEWAY_TOKEN, eventually, get, portal, timings};

#[tokio::test]
async fn join_is_answered_with_an_empty_response_and_init_follows() {
    let portal = portal(timings(), None).await;
    let (_gateway, init) = Dial::gateway(&portal).join().await;
    assert_eq!(
        init["interface"],
        json!({"ipv4": "100.64.0.1", "ipv6": "fd00:2021:1111::1"})
    );
    assert_eq!(init["account_slug"], "test");
    assert_eq!(init["authorizations"], json!([]));
    for member in ["api_url", "upload_interval_secs", "upload_batch_size"] {
        assert!(!init["flow_logs"][member].is_null(), "{member}");
    }
    for member in ["ipv4_masquerade_enabled", "ipv6_masquerade_enabled"] {
        assert_eq!(init["config"][member], true);
    }
    let relays = init["relays"].as_array().unwrap();
    assert_eq!(relays.len(), 2, "one entry per address");
    assert_eq!(relays[0]["addr"], "192.0.2.1:3478");
    assert_eq!(relays[1]["addr"], "[2001:db8::1]:3478");
    for relay in relays {
        assert_eq!(relay["type"], "turn");
        assert_eq!(relay["id"], "5d5d5d5d-0000-4000-8000-000000000001");
        assert_eq!(relay["expires_at"], 2_145_916_800u64);
        assert!(
            relay["username"]
                .as_str()
                .unwrap()
                .starts_with("2145916800:")
        );
        assert!(relay["password"].is_string());
    }
}

#[tokio::test]
async fn client_init_names_resources_and_addresses() {
    let portal = portal(timings(), None).await;
    let (_client, init) = Dial::client(&portal).join().await;
    assert_eq!(init["interface"]["ipv4"], "100.64.0.1");
    assert_eq!(
        init["resources"],
        json!([{
            "type": "cidr",
            "id": "5b5b5b5b-0000-4000-8000-000000000001",
            "address": "10.0.0.0/8",
            "address_description": null,
            "name": "Net",
            "filters": [],
            "sites": [{"id": "5a5a5a5a-0000-4000-8000-000000000001", "name": "Lab"}],
        }])
    );
    assert!(init["flow_logs"].is_object() && init["relays"].is_array());
}

#[tokio::test]
async fn heartbeat_is_echoed_with_a_numeric_ref_even_before_the_join() {
    let portal = portal(timings(), None).await;
    let mut gateway = Dial::gateway(&portal).connect().await;
    for expected in 0..3 {
        let reference = gateway.heartbeat().await;
        assert_eq!(reference, expected);
        assert_eq!(
            gateway.reply(reference).await,
            json!({"status": "ok", "response": {}})
        );
    }
    let state = get(&portal, "/state").await;
    assert_eq!(state["gateways"][0]["heartbeats"], 3);
    assert_eq!(state["gateways"][0]["online"], false, "not joined");
}

#[tokio::test]
async fn messages_to_other_topics_or_unknown_events_get_an_error_reply() {
    let portal = portal(timings(), None).await;
    let error = |reason| json!({"status": "error", "response": {"reason": reason}});
    let mut gateway = Dial::gateway(&portal).connect().await;
    let early = gateway.say("no_relays", json!({})).await;
    assert_eq!(gateway.reply(early).await, error("unmatched topic"));
    let other = gateway.say_on("relay", "phx_join", Value::Null).await;
    assert_eq!(gateway.reply(other).await, error("unmatched topic"));
    let join = gateway.say("phx_join", Value::Null).await;
    gateway.reply(join).await;
    let unknown = gateway.say("make_coffee", json!({})).await;
    assert_eq!(gateway.reply(unknown).await, error("unknown_message"));
    let v1 = gateway.say("flow_authorized", json!({"ref": "x"})).await;
    assert_eq!(gateway.reply(v1).await, error("unknown_message"));
    let made_up = gateway
        .say("authorization_created", json!({"ref": "x"}))
        .await;
    assert_eq!(gateway.reply(made_up).await, error("invalid_ref"));
}

#[tokio::test]
async fn missing_and_unknown_tokens_are_401_with_problem_details() {
    let portal = portal(timings(), None).await;
    for (token, code) in [
        (None, "missing_token"),
        (Some("nonsense"), "invalid_token"),
        (Some("client-token"), "invalid_token"),
    ] {
        let dial = Dial {
            token,
            ..Dial::gateway(&portal)
        };
        let (status, _, body) = dial.refused().await;
        assert_eq!((status, &body["code"]), (401, &json!(code)));
        assert_eq!(body["status"], 401);
        assert_eq!(body["type"], "about:blank");
        assert!(body["detail"].is_string() && body["title"] == "Unauthorized");
    }
    let events = get(&portal, "/events?kind=connect").await;
    let codes: Vec<_> = events
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["code"])
        .collect();
    assert_eq!(codes, ["missing_token", "invalid_token", "invalid_token"]);
}

#[tokio::test]
async fn token_in_the_query_still_works() {
    let portal = portal(timings(), None).await;
    let mut dial = Dial::gateway(&portal);
    dial.token = None;
    dial.external_id = "edge-1&token=.gateway-token";
    assert_eq!(GATEWAY_TOKEN, ".gateway-token");
    dial.join().await;
}

#[tokio::test]
async fn key_of_the_wrong_length_is_400() {
    let portal = portal(timings(), None).await;
    for public_key in ["", "AAAA", "not base64 at all"] {
        let dial = Dial {
            public_key: public_key.replace(' ', "+"),
            ..Dial::gateway(&portal)
        };
        let (status, _, body) = dial.refused().await;
        assert_eq!(
            (status, &body["code"]),
            (400, &json!("invalid_connect_params"))
        );
    }
}

#[tokio::test]
async fn second_connection_of_a_gateway_is_409_until_the_first_has_gone() {
    let portal = portal(timings(), None).await;
    let (mut first, _) = Dial::gateway(&portal).join().await;
    let (status, _, body) = Dial::gateway(&portal).refused().await;
    assert_eq!(
        (status, &body["code"]),
        (409, &json!("gateway_already_connected"))
    );
    let other = Dial {
        external_id: "edge-2",
        ..Dial::gateway(&portal)
    };
    other.join().await;
    first.close(1000).await;
    let gone = |state: &Value| state["gateways"][0]["online"] == false;
    eventually(&portal, "/state", gone).await;
    Dial::gateway(&portal).join().await;
}

#[tokio::test]
async fn graceful_close_of_a_peer_is_seen_with_its_code() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    gateway.close(1000).await;
    let closed = |state: &Value| !state["gateways"][0]["last_close_received"].is_null();
    let state = eventually(&portal, "/state", closed).await;
    let gateway = &state["gateways"][0];
    assert_eq!(gateway["last_close_received"]["code"], 1000);
    assert_eq!(gateway["last_ending"]["by"], "peer_close");
    assert_eq!(gateway["violations"], json!([]));
}

#[tokio::test]
async fn lost_connection_is_not_taken_for_a_graceful_close() {
    let portal = portal(timings(), None).await;
    let (gateway, _) = Dial::gateway(&portal).join().await;
    drop(gateway);
    let ended = |state: &Value| !state["gateways"][0]["last_ending"].is_null();
    let state = eventually(&portal, "/state", ended).await;
    assert_eq!(state["gateways"][0]["last_ending"]["by"], "transport");
    assert_eq!(state["gateways"][0]["last_close_received"], Value::Null);
}

#[tokio::test]
async fn silent_connection_is_closed_and_heartbeats_keep_one_open() {
    let portal = portal(
        Timings {
            idle: Duration::from_millis(1500),
            ..timings()
        },
        None,
    )
    .await;
    let (mut silent, _) = Dial::gateway(&portal).join().await;
    let (mut alive, _) = Dial::client(&portal).join().await;
    let keep_alive = async {
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let reference = alive.heartbeat().await;
            alive.reply(reference).await;
        }
    };
    let (code, ()) = tokio::join!(silent.closed(), keep_alive);
    assert_eq!(code, Some(1000));
    let idle = |state: &Value| state["gateways"][0]["last_ending"]["by"] == "idle";
    let state = eventually(&portal, "/state", idle).await;
    assert_eq!(state["clients"][0]["online"], true);
}
