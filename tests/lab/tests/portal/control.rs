//! Faults and the other levers of the control API, seen from the peers.

use std::time::{Duration, Instant};

use firezone_lab::portal::Timings;
use serde_json::{Value, json};

use crate::support::{Dial, NET, eventually, get, portal, post, timings, try_post};

#[tokio::test]
async fn connects_are_refused_as_often_as_asked() {
    let portal = portal(timings(), None).await;
    let refuse = json!({"status": 503, "retry_after": 7, "times": 2});
    post(&portal, "/faults", json!({ "refuse": refuse })).await;
    for _ in 0..2 {
        let (status, retry_after, body) = Dial::gateway(&portal).refused().await;
        assert_eq!((status, retry_after.as_deref()), (503, Some("7")));
        assert_eq!(body, Value::Null, "no problem details without a code");
    }
    Dial::gateway(&portal).join().await;

    let refuse = json!({"status": 403, "code": "account_disabled"});
    post(
        &portal,
        "/faults",
        json!({"role": "client", "refuse": refuse}),
    )
    .await;
    let (status, _, body) = Dial::client(&portal).refused().await;
    assert_eq!((status, &body["code"]), (403, &json!("account_disabled")));
    post(&portal, "/faults", json!({"role": "client", "clear": true})).await;
    Dial::client(&portal).join().await;
}

#[tokio::test]
async fn naming_one_fault_leaves_the_others_in_force() {
    let portal = portal(timings(), None).await;
    post(&portal, "/faults", json!({"join": "ignore"})).await;
    post(&portal, "/faults", json!({"drop_heartbeat_replies": true})).await;
    let faults = &get(&portal, "/state").await["faults"];
    assert_eq!(faults["gateway"]["join"], "ignore");
    assert_eq!(faults["gateway"]["drop_heartbeat_replies"], true);
    assert_eq!(faults["client"]["join"], "none");
    let (status, answer) = try_post(&portal, "/faults", json!({"jion": "ignore"})).await;
    assert_eq!(status, 400);
    assert!(answer["error"].as_str().unwrap().contains("jion"));
}

#[tokio::test]
async fn join_can_stay_unanswered_or_be_refused() {
    let portal = portal(timings(), None).await;
    post(&portal, "/faults", json!({"join": "ignore"})).await;
    let mut gateway = Dial::gateway(&portal).connect().await;
    gateway.say("phx_join", Value::Null).await;
    gateway.quiet().await;
    assert_eq!(get(&portal, "/state").await["gateways"][0]["online"], false);

    post(&portal, "/faults", json!({"join": {"refuse": "disabled"}})).await;
    let join = gateway.say("phx_join", Value::Null).await;
    assert_eq!(
        gateway.reply(join).await,
        json!({"status": "error", "response": {"reason": "disabled"}})
    );
    gateway.quiet().await;
}

#[tokio::test]
async fn heartbeat_replies_can_be_dropped_and_come_back() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    post(&portal, "/faults", json!({"drop_heartbeat_replies": true})).await;
    gateway.heartbeat().await;
    gateway.quiet().await;
    let unknown = gateway.say("make_coffee", json!({})).await;
    gateway.reply(unknown).await;
    post(&portal, "/faults", json!({"drop_heartbeat_replies": false})).await;
    let reference = gateway.heartbeat().await;
    gateway.reply(reference).await;
}

#[tokio::test]
async fn upgrade_can_be_delayed() {
    let portal = portal(timings(), None).await;
    post(&portal, "/faults", json!({"upgrade_delay_ms": 300})).await;
    let started = Instant::now();
    Dial::gateway(&portal).connect().await;
    assert!(started.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn blackhole_swallows_everything_until_the_idle_limit_ends_the_connection() {
    let portal = portal(
        Timings {
            idle: Duration::from_millis(2000),
            ..timings()
        },
        None,
    )
    .await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    post(&portal, "/faults", json!({"blackhole": true})).await;
    gateway.heartbeat().await;
    post(&portal, "/init", json!({"gateway": "edge-1"})).await;
    let newcomer = Dial {
        external_id: "edge-2",
        ..Dial::gateway(&portal)
    };
    let newcomer = newcomer.join();
    tokio::pin!(newcomer);
    tokio::select! {
        _ = &mut newcomer => panic!("connect was answered"),
        () = gateway.quiet() => {}
    }
    assert_eq!(
        get(&portal, "/state").await["gateways"][0]["online"],
        true,
        "the portal does not know yet"
    );
    assert_eq!(gateway.closed().await, None, "no Close frame");
    let ended = |state: &Value| state["gateways"][0]["last_ending"]["by"] == "idle";
    eventually(&portal, "/state", ended).await;

    post(&portal, "/faults", json!({"blackhole": false})).await;
    newcomer.await;
    Dial::gateway(&portal).join().await;
}

#[tokio::test]
async fn all_sockets_can_be_closed_with_a_code_or_killed() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    let (mut client, _) = Dial::client(&portal).join().await;
    let answer = post(&portal, "/faults", json!({"close_all": {"code": 1013}})).await;
    assert_eq!(answer["affected"], 1);
    assert_eq!(gateway.closed().await, Some(1013));
    post(
        &portal,
        "/faults",
        json!({"role": "client", "kill_all": true}),
    )
    .await;
    assert_eq!(client.closed().await, None);
    Dial::gateway(&portal).join().await;
}

#[tokio::test]
async fn crashed_channel_meets_unmatched_topic_and_can_be_joined_again() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    for event in ["phx_error", "phx_close"] {
        post(&portal, "/faults", json!({"crash_channel": event})).await;
        assert_eq!(gateway.payload(event).await, json!({}));
        let message = gateway.say("no_relays", json!({})).await;
        assert_eq!(
            gateway.reply(message).await["response"]["reason"],
            "unmatched topic"
        );
        let join = gateway.say("phx_join", Value::Null).await;
        assert_eq!(gateway.reply(join).await["status"], "ok");
        gateway.payload("init").await;
    }
    let (status, _) = try_post(&portal, "/faults", json!({"crash_channel": "init"})).await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn disconnect_is_pushed_before_the_close_frame() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    let body = json!({"gateway": "edge-1", "reason": "token_expired"});
    post(&portal, "/disconnect", body).await;
    assert_eq!(
        gateway.payload("disconnect").await,
        json!({"reason": "token_expired"})
    );
    assert_eq!(gateway.closed().await, Some(1000));
    let (status, _) = try_post(&portal, "/disconnect", json!({"gateway": "nobody"})).await;
    assert_eq!(status, 404);
}

#[tokio::test]
async fn changed_resources_and_relays_are_announced() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    let (mut client, _) = Dial::client(&portal).join().await;
    let filters = json!([{"protocol": "tcp", "ports": ["80-90"]}]);
    let change = json!({"set_filters": {"resource": "Net", "filters": filters}});
    post(&portal, "/resource", change).await;
    let expected = json!([{"protocol": "tcp", "port_range_start": 80, "port_range_end": 90}]);
    assert_eq!(
        gateway.payload("resource_updated").await["filters"],
        expected
    );
    let shown = client.payload("resource_created_or_updated").await;
    assert_eq!(shown["filters"], expected);

    let new = "5d5d5d5d-0000-4000-8000-000000000009";
    let relay = json!({"id": new, "v4": "192.0.2.9:3478", "secret": "t"});
    post(&portal, "/relays", json!({"relays": [relay]})).await;
    for peer in [&mut gateway, &mut client] {
        let presence = peer.payload("relays_presence").await;
        let gone = json!(["5d5d5d5d-0000-4000-8000-000000000001"]);
        assert_eq!(presence["disconnected_ids"], gone);
        assert_eq!(presence["connected"][0]["id"], new);
    }
    gateway.say("no_relays", json!({})).await;
    let presence = gateway.payload("relays_presence").await;
    assert_eq!(presence["disconnected_ids"], json!([]));
    assert_eq!(presence["connected"][0]["addr"], "192.0.2.9:3478");
}

#[tokio::test]
async fn a_wrong_clock_moves_the_end_of_grants_and_no_deadline() {
    let portal = portal(timings(), None).await;
    let before = get(&portal, "/state").await["now_ms"].as_u64().unwrap();
    post(&portal, "/clock", json!({"offset_seconds": -3600})).await;
    let behind = get(&portal, "/state").await["now_ms"].as_u64().unwrap();
    assert!(behind < before - 3_500_000, "{before} {behind}");
    // Connections live on.
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    let (mut client, _) = Dial::client(&portal).join().await;
    let request = json!({"resource_id": NET, "connected_gateway_ids": []});
    client.say("request_authorization", request).await;
    let grant = gateway.payload("create_authorization").await;
    let ends = grant["expires_at"].as_u64().unwrap() * 1000;
    assert!(ends < before + 8 * 3_600_000 - 3_500_000, "{grant}");
}

#[tokio::test]
async fn events_keep_the_order_of_things() {
    let portal = portal(timings(), None).await;
    let (mut gateway, _) = Dial::gateway(&portal).join().await;
    Dial::gateway(&portal).refused().await;
    gateway.close(1000).await;
    let last =
        |events: &Value| events.as_array().unwrap().last().unwrap()["kind"] == "disconnected";
    let events = eventually(&portal, "/events?n=50", last).await;
    let events = events.as_array().unwrap();
    let kinds: Vec<_> = events
        .iter()
        .map(|event| event["kind"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds,
        ["connect", "connected", "joined", "connect", "disconnected"]
    );
    assert_eq!(events[0]["status"], 101);
    assert_eq!(events[3]["status"], 409);
    assert_eq!(events[4]["code"], 1000);
    assert!(events.windows(2).all(|pair| {
        pair[0]["seq"].as_u64() < pair[1]["seq"].as_u64()
            && pair[0]["at_ms"].as_u64() <= pair[1]["at_ms"].as_u64()
    }));
    let since = get(&portal, "/events?since=3").await;
    assert_eq!(since.as_array().unwrap().len(), 2);
}
