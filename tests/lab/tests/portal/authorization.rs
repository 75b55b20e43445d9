//! From a client's request to traffic: the flow of messages that sets up a connection.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use firezone_lab::portal::Timings;
use serde_json::{Value, json};

use crate::support::{Dial, Double, NET, get, portal, post, timings};

async fn ask(client: &mut Double) {
    let payload = json!({"resource_id": NET, "connected_gateway_ids": []});
    client.say("request_authorization", payload).await;
}

fn role(token: &Value) -> String {
    let claims = token.as_str().unwrap().split('.').nth(1).unwrap();
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    claims["role"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn both_ends_get_the_same_secrets_and_each_other_s_keys() {
    let portal = portal(timings(), None).await;
    let (mut gateway, gateway_init) = Dial::gateway(&portal).join().await;
    let (mut client, client_init) = Dial::client(&portal).join().await;
    ask(&mut client).await;

    let request = gateway.payload("create_authorization").await;
    assert_eq!(
        request["resource"],
        json!({"type": "cidr", "id": NET, "address": "10.0.0.0/8", "name": "Net", "filters": []})
    );
    assert_eq!(request["client"]["public_key"], STANDARD.encode([0x01; 32]));
    for family in ["ipv4", "ipv6"] {
        assert_eq!(request["client"][family], client_init["interface"][family]);
    }
    assert_eq!(request["client"]["version"], "1.5.11");
    assert_eq!(request["client"]["device_os_name"], "Debian");
    assert_eq!(request["client"]["device_os_version"], "13.0");
    assert_eq!(role(&request["flow_logs_ingest_token"]), "responder");
    assert!(request["expires_at"].is_u64() && request["use_iceless"] == false);

    let reference = request["ref"].clone();
    let answer = gateway
        .say("authorization_created", json!({ "ref": reference }))
        .await;
    assert_eq!(
        gateway.reply(answer).await,
        json!({"status": "ok", "response": {}})
    );
    let created = client.payload("authorization_created").await;
    assert_eq!(created["resource_id"], NET);
    assert_eq!(created["gateway_public_key"], STANDARD.encode([0xfb; 32]));
    assert_eq!(created["gateway_ipv4"], gateway_init["interface"]["ipv4"]);
    assert_eq!(created["gateway_ipv6"], gateway_init["interface"]["ipv6"]);
    assert_eq!(created["site_id"], "5a5a5a5a-0000-4000-8000-000000000001");
    assert_eq!(created["preshared_key"], request["client"]["preshared_key"]);
    for credentials in ["client_ice_credentials", "gateway_ice_credentials"] {
        assert_eq!(created[credentials], request[credentials]);
        assert_eq!(created[credentials]["username"].as_str().unwrap().len(), 4);
        assert_eq!(created[credentials]["password"].as_str().unwrap().len(), 22);
    }
    assert_eq!(role(&created["flow_logs_ingest_token"]), "initiator");

    let state = get(&portal, "/state").await;
    assert_eq!(state["grants"][0]["confirmed"], true);
    let events = get(&portal, "/events").await;
    let order: Vec<_> = events
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|event| event["kind"].as_str())
        .filter(|kind| kind.starts_with("authorization"))
        .collect();
    assert_eq!(
        order,
        [
            "authorization_requested",
            "authorization_pushed",
            "authorization_answered"
        ]
    );
}

#[tokio::test]
async fn candidates_travel_both_ways() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    let (mut client, _) = Dial::client(&portal).join().await;
    ask(&mut client).await;
    let request = gateway.payload("create_authorization").await;
    gateway
        .say("authorization_created", json!({"ref": request["ref"]}))
        .await;
    let created = client.payload("authorization_created").await;
    let (client_id, gateway_id) = (&request["client"]["id"], &created["gateway_id"]);
    let line = "candidate:1 1 udp 2130706175 192.0.2.4 52625 typ host";

    for (from, to) in [
        ("new_gateway_ice_candidates", "ice_candidates"),
        (
            "invalidate_gateway_ice_candidates",
            "invalidate_ice_candidates",
        ),
    ] {
        let payload = json!({"gateway_id": gateway_id, "candidates": [line]});
        client.say(from, payload).await;
        assert_eq!(
            gateway.payload(to).await,
            json!({"client_id": client_id, "candidates": [line]})
        );
    }
    for (from, to) in [
        ("broadcast_ice_candidates", "ice_candidates"),
        (
            "broadcast_invalidated_ice_candidates",
            "invalidate_ice_candidates",
        ),
    ] {
        let payload = json!({"client_ids": [client_id], "candidates": [line]});
        gateway.say(from, payload).await;
        assert_eq!(
            client.payload(to).await,
            json!({"gateway_id": gateway_id, "candidates": [line]})
        );
    }

    post(
        &portal,
        "/block_forward_candidates",
        json!({"to_client": ["relay"]}),
    )
    .await;
    let payload = json!({"client_ids": [client_id], "candidates": [line]});
    gateway.say("broadcast_ice_candidates", payload).await;
    client.quiet().await;
}

#[tokio::test]
async fn gateway_that_does_not_answer_in_time_is_offline_for_the_client() {
    let portal = portal(
        Timings {
            authorization: Duration::from_millis(200),
            ..timings()
        },
        None,
    )
    .await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    let (mut client, _) = Dial::client(&portal).join().await;
    ask(&mut client).await;
    let request = gateway.payload("create_authorization").await;
    let failed = client.payload("authorization_creation_failed").await;
    assert_eq!(failed["reason"], "offline");
    assert_eq!(failed["resource_id"], NET);
    let late = gateway
        .say("authorization_created", json!({"ref": request["ref"]}))
        .await;
    assert_eq!(gateway.reply(late).await["status"], "ok");
    client.quiet().await;
}

#[tokio::test]
async fn request_without_a_gateway_fails_at_once() {
    let portal = portal(timings(), None).await;
    let (mut client, _) = Dial::client(&portal).join().await;
    ask(&mut client).await;
    let failed = client.payload("authorization_creation_failed").await;
    assert_eq!(failed["reason"], "offline");

    let old = Dial {
        user_agent: "Debian/13.0 gateway/1.3.0",
        ..Dial::gateway(&portal)
    };
    let (_old, _) = old.join().await;
    ask(&mut client).await;
    let failed = client.payload("authorization_creation_failed").await;
    assert_eq!(failed["reason"], "version_mismatch");
}

#[tokio::test]
async fn rejected_access_reaches_the_gateway_and_later_inits() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    let (mut client, _) = Dial::client(&portal).join().await;
    ask(&mut client).await;
    let request = gateway.payload("create_authorization").await;
    gateway
        .say("authorization_created", json!({"ref": request["ref"]}))
        .await;
    client.payload("authorization_created").await;

    post(&portal, "/init", json!({"gateway": "edge-1"})).await;
    let listed = &gateway.payload("init").await["authorizations"];
    assert_eq!(
        *listed,
        json!([{"client_id": request["client"]["id"], "resource_id": NET,
            "expires_at": request["expires_at"]}])
    );
    let answer = post(
        &portal,
        "/reject",
        json!({"client": "laptop", "resource": "Net"}),
    )
    .await;
    assert_eq!(answer["grants"], 1);
    assert_eq!(
        gateway.payload("reject_access").await,
        json!({"client_id": request["client"]["id"], "resource_id": NET})
    );
    post(&portal, "/init", json!({"gateway": "edge-1"})).await;
    assert_eq!(gateway.payload("init").await["authorizations"], json!([]));
}
