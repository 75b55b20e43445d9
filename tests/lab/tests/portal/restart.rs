//! A portal with a state file is the same portal after a restart.

use serde_json::{Value, json};

use crate::support::{Dial, NET, get, portal, post, timings};

#[tokio::test]
async fn restarted_portal_hands_out_the_same_identities_keys_and_grants() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state.json");
    let mut seen: Vec<Value> = Vec::new();
    for run in 0..2 {
        let portal = portal(timings(), Some(state.clone())).await;
        // The other way round the second time: identity must not depend on the order.
        let ((mut gateway, gateway_init), (mut client, client_init)) = if run == 0 {
            let gateway = Dial::gateway(&portal).join().await;
            (gateway, Dial::client(&portal).join().await)
        } else {
            let client = Dial::client(&portal).join().await;
            (Dial::gateway(&portal).join().await, client)
        };
        if run == 1 {
            let first: &Value = &seen[0];
            assert_eq!(
                gateway_init["authorizations"],
                json!([{"client_id": first["request"]["client"]["id"], "resource_id": NET,
                    "expires_at": first["request"]["expires_at"]}])
            );
        }
        let payload = json!({"resource_id": NET, "connected_gateway_ids": []});
        client.say("request_authorization", payload).await;
        let request = gateway.payload("create_authorization").await;
        let payload = json!({"ref": request["ref"]});
        gateway.say("authorization_created", payload).await;
        let created = client.payload("authorization_created").await;
        seen.push(json!({
            "gateway_interface": gateway_init["interface"],
            "client_interface": client_init["interface"],
            "gateway_relays": gateway_init["relays"],
            "gateway_id": created["gateway_id"],
            "request": request,
        }));

        post(&portal, "/shutdown", json!({})).await;
        portal.shutdown_requested().await;
        let (_, gateway_code, client_code) =
            tokio::join!(portal.shut_down(), gateway.closed(), client.closed());
        assert_eq!((gateway_code, client_code), (Some(1012), Some(1012)));
    }
    let (first, second) = (&seen[0], &seen[1]);
    for member in [
        "gateway_interface",
        "client_interface",
        "gateway_relays",
        "gateway_id",
    ] {
        assert_eq!(first[member], second[member], "{member}");
    }
    for member in [
        "client",
        "client_ice_credentials",
        "gateway_ice_credentials",
    ] {
        assert_eq!(
            first["request"][member], second["request"][member],
            "{member}"
        );
    }
    assert_ne!(first["request"]["ref"], second["request"]["ref"]);
}

#[tokio::test]
async fn portal_without_a_state_file_starts_over() {
    let mut ids = Vec::new();
    for _ in 0..2 {
        let portal = portal(timings(), None).await;
        Dial::gateway(&portal).join().await;
        ids.push(get(&portal, "/state").await["gateways"][0]["id"].clone());
        portal.shut_down().await;
    }
    assert_ne!(ids[0], ids[1]);
}
