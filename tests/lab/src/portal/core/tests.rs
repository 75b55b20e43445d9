//! The rules, in virtual time.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::sync::mpsc::UnboundedReceiver;

use super::super::faults::Refusal;
use super::*;

const GATEWAY: &str = "Debian/13.0 gateway/1.6.0 (x86_64; 6.12)";
const CLIENT: &str = "Debian/13.0 headless-client/1.5.11 (x86_64; 6.12)";
const NET: &str = "5b5b5b5b-0000-4000-8000-000000000001";
const WEB: &str = "5b5b5b5b-0000-4000-8000-000000000002";

const POLICY: &str = r#"
sites:
  - {id: 5a5a5a5a-0000-4000-8000-000000000001, name: Lab}
  - {id: 5a5a5a5a-0000-4000-8000-000000000002, name: Empty}
gateway_tokens: [{token: g}, {token: owned, owner: edge}]
client_tokens: [{token: c}, {token: restricted, resources: [Web]}]
resources:
  - {id: 5b5b5b5b-0000-4000-8000-000000000001, type: cidr, name: Net, address: 10.0.0.0/8}
  - {id: 5b5b5b5b-0000-4000-8000-000000000002, type: dns, name: Web, address: web.lab, expires_in: 10}
  - {id: 5b5b5b5b-0000-4000-8000-000000000003, type: internet, site: Empty}
relays:
  - {id: 5d5d5d5d-0000-4000-8000-000000000001, v4: "192.0.2.1:3478", secret: s}
  - {id: 5d5d5d5d-0000-4000-8000-000000000002, v4: "192.0.2.2:3478", secret: s}
  - {id: 5d5d5d5d-0000-4000-8000-000000000003, v4: "192.0.2.3:3478", secret: s}
"#;

struct Lab {
    core: Core,
    now: Now,
}

struct Peer {
    id: ConnId,
    topic: &'static str,
    next_ref: u64,
    queue: UnboundedReceiver<Outgoing>,
}

impl Peer {
    /// Everything sent since the last call.
    fn received(&mut self) -> Vec<Outgoing> {
        std::iter::from_fn(|| self.queue.try_recv().ok()).collect()
    }

    fn frames(&mut self) -> Vec<Value> {
        self.received()
            .into_iter()
            .filter_map(|outgoing| match outgoing {
                Outgoing::Text(text) => Some(serde_json::from_str(&text).unwrap()),
                Outgoing::Close { .. } | Outgoing::Kill => None,
            })
            .collect()
    }

    /// Payloads of the messages with this event.
    fn payloads(&mut self, event: &str) -> Vec<Value> {
        let mut frames = self.frames();
        frames.retain(|frame| frame["event"] == event);
        frames
            .into_iter()
            .map(|mut frame| frame["payload"].take())
            .collect()
    }

    fn payload(&mut self, event: &str) -> Value {
        let mut payloads = self.payloads(event);
        assert_eq!(payloads.len(), 1, "{event}: {payloads:?}");
        payloads.remove(0)
    }
}

fn request(role: Role, token: &str, external_id: &str, user_agent: &str) -> ConnectRequest {
    ConnectRequest {
        role,
        protocol: Protocol::V2,
        remote: "192.0.2.200:5000".parse().unwrap(),
        authorization: Some(format!("Bearer {token}")),
        user_agent: user_agent.to_owned(),
        params: HashMap::from(
            [
                ("external_id", external_id.to_owned()),
                ("name", format!("name of {external_id}")),
                ("public_key", STANDARD.encode([1; 32])),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        ),
    }
}

impl Lab {
    fn new() -> Self {
        Self::with_policy(POLICY)
    }

    fn with_policy(policy: &str) -> Self {
        let now = Now::read();
        let policy = Policy::parse(policy).unwrap();
        let store = Store::open(None).unwrap();
        Self {
            core: Core::new(now, policy, store, Timings::default()),
            now,
        }
    }

    fn advance(&mut self, duration: Duration) {
        self.now.instant += duration;
        self.now.unix_ms += duration.as_millis() as u64;
        if self
            .core
            .poll_timeout()
            .is_some_and(|due| due <= self.now.instant)
        {
            self.core.handle_timeout(self.now);
        }
    }

    fn try_connect(&mut self, request: ConnectRequest) -> Result<Peer, Refusal> {
        let topic = request.role.topic();
        let admission = self.core.admit(self.now, request)?;
        let (sender, queue) = mpsc::unbounded_channel();
        Ok(Peer {
            id: self.core.open(self.now, admission, sender),
            topic,
            next_ref: 0,
            queue,
        })
    }

    fn join(&mut self, request: ConnectRequest) -> Peer {
        let mut peer = self.try_connect(request).unwrap();
        self.say(&mut peer, "phx_join", Value::Null);
        peer
    }

    fn gateway(&mut self, external_id: &str, user_agent: &str) -> Peer {
        self.join(request(Role::Gateway, "g", external_id, user_agent))
    }

    fn client(&mut self, token: &str) -> Peer {
        self.join(request(Role::Client, token, "laptop", CLIENT))
    }

    /// Sends a message on the peer's topic.
    fn say(&mut self, peer: &mut Peer, event: &str, payload: Value) {
        let frame = json!({"topic": peer.topic, "event": event, "payload": payload,
            "ref": peer.next_ref});
        peer.next_ref += 1;
        self.core.handle_text(self.now, peer.id, &frame.to_string());
    }

    fn ask(&mut self, client: &mut Peer, resource: &str, connected: &[Value]) {
        client.received();
        let payload = json!({"resource_id": resource, "connected_gateway_ids": connected});
        self.say(client, "request_authorization", payload);
    }

    fn answer(&mut self, gateway: &mut Peer, request: &Value) {
        let payload = json!({"ref": request["ref"]});
        self.say(gateway, "authorization_created", payload);
    }

    fn peer_id(&self, peer: &Peer) -> Uuid {
        self.core.conns[&peer.id].admission.peer
    }

    fn failure(&mut self, client: &mut Peer, resource: &str) -> Value {
        self.ask(client, resource, &[]);
        client.payload("authorization_creation_failed")["reason"].take()
    }
}

#[test]
fn unanswered_authorization_fails_as_offline_after_15_s_and_a_late_answer_is_ignored() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut client = lab.client("c");
    lab.ask(&mut client, NET, &[]);
    let request = gateway.payload("create_authorization");

    lab.advance(Duration::from_millis(14_999));
    assert_eq!(client.frames(), [] as [Value; 0]);
    lab.advance(Duration::from_millis(1));
    assert_eq!(
        client.payload("authorization_creation_failed"),
        json!({"resource_id": NET, "reason": "offline", "violated_properties": []})
    );

    lab.answer(&mut gateway, &request);
    assert_eq!(
        gateway.payload("phx_reply"),
        json!({"status": "ok", "response": {}})
    );
    assert_eq!(client.frames(), [] as [Value; 0]);
}

#[test]
fn newer_request_for_the_same_resource_replaces_the_pending_one() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut client = lab.client("c");
    lab.ask(&mut client, NET, &[]);
    let first = gateway.payload("create_authorization");
    lab.advance(Duration::from_secs(10));
    lab.ask(&mut client, NET, &[]);
    let second = gateway.payload("create_authorization");
    assert_ne!(first["ref"], second["ref"]);
    // What peers build their connection from stays the same.
    for part in [
        "client",
        "client_ice_credentials",
        "gateway_ice_credentials",
    ] {
        assert_eq!(first[part], second[part]);
    }

    lab.answer(&mut gateway, &first);
    assert_eq!(client.frames(), [] as [Value; 0]);
    lab.advance(Duration::from_secs(10));
    assert_eq!(
        client.frames(),
        [] as [Value; 0],
        "the first deadline no longer counts"
    );
    lab.answer(&mut gateway, &second);
    client.payload("authorization_created");
}

#[test]
fn made_up_reference_and_reference_of_another_gateway_are_invalid() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut other = lab.gateway("other", "Debian/13.0 gateway/1.5.0");
    let mut client = lab.client("c");
    lab.ask(&mut client, NET, &[]);
    let request = gateway.payload("create_authorization");
    for (peer, request) in [(&mut gateway, json!({"ref": "x"})), (&mut other, request)] {
        peer.received();
        lab.answer(peer, &request);
        assert_eq!(
            peer.payload("phx_reply"),
            json!({"status": "error", "response": {"reason": "invalid_ref"}})
        );
    }
    assert_eq!(client.frames(), [] as [Value; 0]);
}

#[test]
fn request_fails_for_the_reason_that_applies() {
    let mut lab = Lab::new();
    let mut client = lab.client("restricted");
    let unknown = Uuid::new_v4().to_string();
    assert_eq!(lab.failure(&mut client, &unknown), "not_found");
    assert_eq!(lab.failure(&mut client, NET), "forbidden");
    assert_eq!(lab.failure(&mut client, WEB), "offline");
    lab.gateway("old", "Debian/13.0 gateway/1.3.9");
    lab.gateway("nameless", "curl/8.0");
    assert_eq!(lab.failure(&mut client, WEB), "version_mismatch");
}

#[test]
fn connected_gateway_is_preferred_then_the_highest_version() {
    let mut lab = Lab::new();
    let mut old = lab.gateway("old", "Debian/13.0 gateway/1.5.0");
    let mut new = lab.gateway("new", "Debian/13.0 gateway/1.6.0");
    let mut incompatible = lab.gateway("newest", "Debian/13.0 gateway/1.7.0");
    let mut client = lab.client("c");

    lab.ask(&mut client, NET, &[]);
    assert_eq!(new.payloads("create_authorization").len(), 1);
    let connected = json!(lab.peer_id(&old));
    lab.ask(&mut client, NET, &[connected]);
    assert_eq!(old.payloads("create_authorization").len(), 1);
    let connected = json!(lab.peer_id(&incompatible));
    lab.ask(&mut client, NET, &[connected]);
    assert_eq!(new.payloads("create_authorization").len(), 1);
    assert_eq!(incompatible.payloads("create_authorization").len(), 0);
}

#[test]
fn init_lists_grants_until_they_expire_even_before_the_answer() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut client = lab.client("c");
    lab.ask(&mut client, WEB, &[]);
    let request = gateway.payload("create_authorization");
    assert_eq!(request["expires_at"], lab.now.unix() + 10);

    let listed = |lab: &mut Lab, gateway: &mut Peer| {
        lab.core
            .repeat_init(lab.now, Role::Gateway, "edge")
            .unwrap();
        gateway.payload("init")["authorizations"].take()
    };
    let expected = json!([{"client_id": lab.peer_id(&client), "resource_id": WEB,
        "expires_at": request["expires_at"]}]);
    assert_eq!(listed(&mut lab, &mut gateway), expected);
    lab.answer(&mut gateway, &request);
    gateway.received();
    lab.advance(Duration::from_secs(9));
    assert_eq!(listed(&mut lab, &mut gateway), expected);
    lab.advance(Duration::from_secs(1));
    assert_eq!(listed(&mut lab, &mut gateway), json!([]));
}

#[test]
fn relay_that_is_gone_is_announced_after_a_second_but_not_a_flap() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let init = gateway.payload("init");
    let ids = |relays: &Value| -> Vec<Value> {
        relays
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["id"].clone())
            .collect()
    };
    let all = lab.core.relays.clone();
    let expected: Vec<_> = all[..2].iter().map(|relay| json!(relay.id)).collect();
    assert_eq!(ids(&init["relays"]), expected, "two at most");

    lab.core
        .set_relays(lab.now, all[1..].to_vec(), false, false);
    lab.advance(Duration::from_millis(900));
    lab.core.set_relays(lab.now, all.clone(), false, false);
    lab.advance(Duration::from_secs(5));
    assert_eq!(
        gateway.frames(),
        [] as [Value; 0],
        "flap of less than a second"
    );

    lab.core
        .set_relays(lab.now, all[1..].to_vec(), false, false);
    lab.advance(Duration::from_secs(1));
    let presence = gateway.payload("relays_presence");
    assert_eq!(presence["disconnected_ids"], json!([all[0].id]));
    assert_eq!(
        ids(&presence["connected"]),
        [json!(all[1].id), json!(all[2].id)]
    );

    lab.core.set_relays(lab.now, all.clone(), true, false);
    assert_eq!(
        gateway.frames(),
        [] as [Value; 0],
        "a third relay is not announced"
    );
    lab.core.set_relays(lab.now, all, true, true);
    assert_eq!(
        gateway.payload("relays_presence")["disconnected_ids"],
        json!([])
    );
}

#[test]
fn peer_with_fewer_than_two_relays_hears_of_the_next_one() {
    let mut lab = Lab::new();
    let all = lab.core.relays.clone();
    lab.core.set_relays(lab.now, Vec::new(), true, false);
    let mut client = lab.client("c");
    assert_eq!(client.payload("init")["relays"], json!([]));

    lab.core.set_relays(lab.now, all[..1].to_vec(), true, false);
    let presence = client.payload("relays_presence");
    assert_eq!(presence["connected"][0]["id"], json!(all[0].id));

    lab.say(&mut client, "no_relays", json!({}));
    let presence = client.payload("relays_presence");
    assert_eq!(presence["disconnected_ids"], json!([]));
    assert_eq!(presence["connected"][0]["id"], json!(all[0].id));
}

#[test]
fn first_gateway_connection_wins_even_in_a_race() {
    let mut lab = Lab::new();
    let connect = || request(Role::Gateway, "g", "edge", GATEWAY);
    let mut first = lab.try_connect(connect()).unwrap();
    let mut second = lab.try_connect(connect()).unwrap();
    lab.say(&mut first, "phx_join", Value::Null);
    lab.say(&mut second, "phx_join", Value::Null);
    let mut received = second.received();
    assert!(matches!(
        received.pop(),
        Some(Outgoing::Close { code: 1000, .. })
    ));
    let Some(Outgoing::Text(text)) = received.pop() else {
        panic!("no message before the Close frame");
    };
    let frame: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(frame["event"], "disconnect");
    assert_eq!(frame["payload"], json!({"reason": "token_expired"}));
    first.payload("init");

    let refusal = lab.try_connect(connect()).err().unwrap();
    assert_eq!(refusal.status, StatusCode::CONFLICT);
    assert_eq!(refusal.code.as_deref(), Some("gateway_already_connected"));

    let ending = Ending {
        by: "transport",
        code: None,
        reason: String::new(),
    };
    lab.core.closed(lab.now, first.id, ending);
    assert!(lab.try_connect(connect()).is_ok());
}

#[test]
fn single_owner_token_decides_who_the_gateway_is() {
    let mut lab = Lab::new();
    let a = lab.join(request(Role::Gateway, "owned", "whatever", GATEWAY));
    let refusal = lab
        .try_connect(request(Role::Gateway, "owned", "else", GATEWAY))
        .err()
        .unwrap();
    assert_eq!(refusal.status, StatusCode::CONFLICT);
    let identity = lab.core.store.identity(lab.peer_id(&a)).unwrap();
    assert_eq!(identity.external_id, "edge");
}

#[test]
fn client_that_connects_again_replaces_its_connection_and_its_key() {
    let mut lab = Lab::new();
    let mut first = lab.client("c");
    let mut again = request(Role::Client, "c", "laptop", CLIENT);
    again
        .params
        .insert("public_key".to_owned(), STANDARD.encode([9; 32]));
    let second = lab.join(again);
    assert!(matches!(
        first.received().pop(),
        Some(Outgoing::Close { .. })
    ));
    assert_eq!(lab.core.online(lab.peer_id(&second)), Some(second.id));
    let identity = lab.core.store.identity(lab.peer_id(&second)).unwrap();
    assert_eq!(identity.public_key, STANDARD.encode([9; 32]));
}

#[test]
fn rate_limit_refuses_with_retry_after() {
    let mut lab = Lab::with_policy(&format!("{POLICY}\nrate_limit: true\n"));
    let connect = || request(Role::Client, "c", "laptop", CLIENT);
    assert!(lab.try_connect(connect()).is_ok());
    let refusal = lab.try_connect(connect()).err().unwrap();
    assert_eq!(refusal.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refusal.code.as_deref(), Some("rate_limit"));
    assert_eq!(refusal.retry_after.as_deref(), Some("1"));
    lab.advance(Duration::from_secs(1));
    assert!(lab.try_connect(connect()).is_ok());
}

#[test]
fn first_protocol_has_its_own_event_names() {
    let mut lab = Lab::new();
    let v1 = |request: ConnectRequest| ConnectRequest {
        protocol: Protocol::V1,
        ..request
    };
    let mut gateway = lab.join(v1(request(Role::Gateway, "g", "edge", GATEWAY)));
    let mut client = lab.join(v1(request(Role::Client, "c", "laptop", CLIENT)));
    gateway.received();
    client.received();
    lab.say(&mut client, "create_flow", json!({"resource_id": NET}));
    let request = gateway.payload("authorize_flow");
    lab.answer(&mut gateway, &request);
    let reply = gateway.payload("phx_reply");
    assert_eq!(reply["response"]["reason"], "unknown_message");
    lab.say(
        &mut gateway,
        "flow_authorized",
        json!({"ref": request["ref"]}),
    );
    client.payload("flow_created");
}

#[test]
fn new_filters_go_to_every_gateway_and_to_clients_that_may_reach_it() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut idle = lab.gateway("idle", "Debian/13.0 gateway/1.5.0");
    let mut client = lab.client("restricted");
    for peer in [&mut gateway, &mut idle, &mut client] {
        peer.received();
    }
    let change = |resource: &str| {
        serde_json::from_value(json!({"set_filters": {"resource": resource,
            "filters": [{"protocol": "tcp", "ports": [22]}]}}))
        .unwrap()
    };
    lab.core.change_resource(lab.now, change("Web")).unwrap();
    let update = gateway.payload("resource_updated");
    assert_eq!(update["filters"][0]["port_range_end"], 22);
    assert_eq!(idle.payload("resource_updated"), update);
    client.payload("resource_created_or_updated");

    lab.core.change_resource(lab.now, change("Net")).unwrap();
    assert_eq!(client.frames(), [] as [Value; 0], "not for this client");
}

#[test]
fn new_address_or_removal_takes_grants_back() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut client = lab.client("c");
    for change in [
        json!({"upsert": {"id": NET, "type": "cidr", "name": "Net", "address": "10.1.0.0/16"}}),
        json!({"remove": "Net"}),
    ] {
        lab.ask(&mut client, NET, &[]);
        let request = gateway.payloads("create_authorization").remove(0);
        lab.answer(&mut gateway, &request);
        for peer in [&mut gateway, &mut client] {
            peer.received();
        }
        let change = serde_json::from_value(change).unwrap();
        lab.core.change_resource(lab.now, change).unwrap();
        let events: Vec<_> = gateway.frames();
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(events[0]["event"], "reject_access");
        assert_eq!(
            events[0]["payload"],
            json!({"client_id": lab.peer_id(&client), "resource_id": NET})
        );
        let frames = client.frames();
        assert_eq!(frames[0]["event"], "resource_deleted");
        assert_eq!(frames[0]["payload"], NET, "a bare string");
        assert!(lab.core.store.grants().is_empty());
    }
    assert_eq!(lab.failure(&mut client, NET), "not_found");
}

#[test]
fn candidates_pass_by_kind_and_only_to_peers_that_are_online() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut client = lab.client("c");
    let (gateway_id, client_id) = (lab.peer_id(&gateway), lab.peer_id(&client));
    for peer in [&mut gateway, &mut client] {
        peer.received();
    }
    let host = "candidate:1 1 udp 2 192.0.2.4 5 typ host";
    let relay = "candidate:2 1 udp 1 192.0.2.5 6 typ relay raddr 0.0.0.0 rport 0";
    let from_client = json!({"gateway_id": gateway_id, "candidates": [host, relay]});
    let from_gateway = json!({"client_ids": [client_id], "candidates": [host, relay]});

    lab.say(
        &mut client,
        "new_gateway_ice_candidates",
        from_client.clone(),
    );
    assert_eq!(
        gateway.payload("ice_candidates"),
        json!({"client_id": client_id, "candidates": [host, relay]})
    );
    let filter = json!({"to_gateway": ["relay"], "to_client": []});
    lab.core
        .set_candidate_filter(lab.now, serde_json::from_value(filter).unwrap());
    lab.say(
        &mut client,
        "invalidate_gateway_ice_candidates",
        from_client,
    );
    assert_eq!(
        gateway.payload("invalidate_ice_candidates"),
        json!({"client_id": client_id, "candidates": [relay]})
    );
    lab.say(
        &mut gateway,
        "broadcast_ice_candidates",
        from_gateway.clone(),
    );
    assert_eq!(client.frames(), [] as [Value; 0]);

    lab.core
        .set_candidate_filter(lab.now, CandidateFilter::default());
    lab.say(
        &mut gateway,
        "broadcast_invalidated_ice_candidates",
        from_gateway.clone(),
    );
    assert_eq!(
        client.payload("invalidate_ice_candidates"),
        json!({"gateway_id": gateway_id, "candidates": [host, relay]})
    );
    lab.core.leave(lab.now, client.id, "test");
    lab.say(&mut gateway, "broadcast_ice_candidates", from_gateway);
    assert_eq!(client.frames(), [] as [Value; 0]);
}

#[test]
fn iceless_needs_the_policy_and_both_ends() {
    let policy = format!("{POLICY}\niceless: true\n");
    for (policy, gateway_says, client_says, expected) in [
        (policy.as_str(), true, true, true),
        (policy.as_str(), true, false, false),
        (policy.as_str(), false, true, false),
        (POLICY, true, true, false),
    ] {
        let mut lab = Lab::with_policy(policy);
        let mut gateway = lab.gateway("edge", GATEWAY);
        let mut client = lab.client("c");
        let say = |says: bool| json!({ "iceless": says });
        lab.say(&mut gateway, "set_snownet_capabilities", say(gateway_says));
        lab.say(&mut client, "set_snownet_capabilities", say(client_says));
        gateway.received();
        lab.ask(&mut client, NET, &[]);
        assert_eq!(
            gateway.payload("create_authorization")["use_iceless"],
            expected
        );
    }
}

#[test]
fn revoked_token_disconnects_and_keeps_out_until_restored() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    lab.core.set_token_revoked(lab.now, "g", true);
    assert_eq!(
        gateway.payload("disconnect"),
        json!({"reason": "token_expired"})
    );
    let connect = || request(Role::Gateway, "g", "edge", GATEWAY);
    let refusal = lab.try_connect(connect()).err().unwrap();
    assert_eq!(refusal.status, StatusCode::UNAUTHORIZED);
    assert_eq!(refusal.code.as_deref(), Some("invalid_token"));
    lab.core.set_token_revoked(lab.now, "g", false);
    assert!(lab.try_connect(connect()).is_ok());
}

#[test]
fn shortened_grant_is_announced_by_init_unless_silent() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut client = lab.client("c");
    lab.ask(&mut client, NET, &[]);
    gateway.received();
    let expire = Expire {
        client: Some("laptop".to_owned()),
        in_seconds: 5,
        ..Expire::default()
    };
    assert_eq!(lab.core.expire(lab.now, &expire), Ok(1));
    let init = gateway.payload("init");
    assert_eq!(init["authorizations"][0]["expires_at"], lab.now.unix() + 5);
    let silent = Expire {
        silent: true,
        ..expire
    };
    assert_eq!(lab.core.expire(lab.now, &silent), Ok(1));
    assert_eq!(gateway.frames(), [] as [Value; 0]);
}

#[test]
fn deviations_from_the_protocol_are_noted() {
    let mut lab = Lab::new();
    let mut gateway = lab
        .try_connect(request(Role::Gateway, "g", "edge", GATEWAY))
        .unwrap();
    let violations =
        |lab: &Lab, gateway: &Peer| lab.core.history[&lab.peer_id(gateway)].violations.len();
    lab.say(&mut gateway, "no_relays", json!({}));
    assert_eq!(violations(&lab, &gateway), 1, "message before the join");
    assert_eq!(
        gateway.payload("phx_reply")["response"]["reason"],
        "unmatched topic"
    );
    gateway.next_ref = 5;
    lab.say(&mut gateway, "phx_join", Value::Null);
    assert_eq!(violations(&lab, &gateway), 2, "gap in the references");
    let text = r#"{"topic":"gateway","event":"no_relays","payload":{},"ref":"6"}"#;
    lab.core.handle_text(lab.now, gateway.id, text);
    assert_eq!(
        violations(&lab, &gateway),
        3,
        "reference that is not a number"
    );
    gateway.received();
    lab.core
        .handle_text(lab.now, gateway.id, r#"["1","1","gateway","x",{}]"#);
    assert_eq!(violations(&lab, &gateway), 4, "serializer v2");
    assert!(matches!(
        gateway.received()[..],
        [Outgoing::Close { code: 1011, .. }]
    ));
}

#[test]
fn report_shows_no_secrets() {
    let mut lab = Lab::new();
    let mut gateway = lab.gateway("edge", GATEWAY);
    let mut client = lab.client("c");
    lab.ask(&mut client, NET, &[]);
    let request = gateway.payload("create_authorization");
    let report = lab.core.report(lab.now).to_string();
    let events = serde_json::to_string(&lab.core.events(1000, 0, None)).unwrap();
    for secret in [
        &request["client"]["preshared_key"],
        &request["client_ice_credentials"]["password"],
        &request["gateway_ice_credentials"]["password"],
        &request["flow_logs_ingest_token"],
    ] {
        let secret = secret.as_str().unwrap();
        assert!(!report.contains(secret) && !events.contains(secret));
    }
    assert!(report.contains("create_authorization"));
}
