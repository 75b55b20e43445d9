//! The portal of the schedules: what it believes of the gateway, and how it answers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::portal::error::{ErrorType, Failure};
use crate::portal::login::Protocol;

/// For so long a portal takes a lost connection for alive (portal-channel spec §1.11).
const IDLE_LIMIT: Duration = Duration::from_secs(37);

/// What goes wrong at present.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Weather {
    Good,
    NoName,
    Refused,
    /// Nothing comes back, not even a refusal.
    Swallowed,
    /// TCP is accepted and nothing more happens.
    Hangs,
    Http {
        status: u16,
        retry_after: Option<u64>,
    },
    OnlyVersion1,
    JoinsIgnored,
    JoinsRefused,
    JoinsCrash,
    DropsAfterJoin,
    NoConfiguration,
    /// The socket answers heartbeats, the process behind it nothing.
    Stuck,
    /// Open connections are deaf and dumb, new ones do not come about.
    HalfOpen,
}

/// A connection, seen from the portal.
#[derive(Debug)]
struct Connection {
    id: u64,
    protocol: Protocol,
    joined: bool,
    last_frame: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Portal {
    connection: Option<Connection>,
    /// Candidates per client, as clients have them.
    pub(super) told: BTreeMap<String, BTreeSet<String>>,
    /// How often each authorization was answered.
    answered: BTreeMap<String, u32>,
    pub(super) told_again: bool,
    pub(super) version_1: bool,
}

impl Portal {
    /// How the portal's HTTP side answers an attempt, as far as it is reached.
    pub(super) fn upgrade(
        &mut self,
        now: Instant,
        weather: &Weather,
        token_is_good: bool,
        protocol: Protocol,
        id: u64,
    ) -> Result<(), Failure> {
        match weather {
            Weather::NoName => return Err(Failure::new(ErrorType::Dns, "no such name")),
            Weather::Refused => return Err(Failure::new(ErrorType::TcpConnect, "refused")),
            Weather::Http {
                status,
                retry_after,
            } => return Err(http(*status, *retry_after)),
            Weather::OnlyVersion1 if protocol == Protocol::V2 => return Err(http(404, None)),
            _ => {}
        }
        if !token_is_good {
            return Err(http(401, None));
        }
        if let Some(old) = &self.connection {
            if now - old.last_frame < IDLE_LIMIT {
                return Err(http(409, None));
            }
            self.connection = None;
        }
        self.version_1 |= protocol == Protocol::V1;
        self.connection = Some(Connection {
            id,
            protocol,
            joined: false,
            last_frame: now,
        });
        Ok(())
    }

    /// The connection ended, and the portal knows.
    pub(super) fn ended(&mut self, id: u64) {
        self.connection.take_if(|c| c.id == id);
    }

    /// The process of a joined channel dies; its socket stays.
    pub(super) fn crash(&mut self) -> bool {
        self.connection
            .as_mut()
            .is_some_and(|c| std::mem::take(&mut c.joined))
    }

    pub(super) fn is_joined(&self) -> bool {
        self.connection.as_ref().is_some_and(|c| c.joined)
    }

    pub(super) fn authorize(&mut self, n: u64) -> Value {
        let reference = format!("ref-{n}");
        self.answered.insert(reference.clone(), 0);
        let event = match self.connection.as_ref().map(|c| c.protocol) {
            Some(Protocol::V1) => "authorize_flow",
            _ => "create_authorization",
        };
        let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
        let credentials = json!({"username": "ww54", "password": "atm32zsp76tbbrq6su4fqb"});
        push(
            event,
            json!({
                "ref": reference,
                "resource": {"type": "internet", "id": uuid::Uuid::from_u128(9)},
                "client": {"id": uuid::Uuid::from_u128(1), "public_key": key,
                    "preshared_key": key, "ipv4": "100.70.1.5", "ipv6": "fd00:2021:1111::1:5"},
                "client_ice_credentials": credentials,
                "gateway_ice_credentials": credentials,
                "expires_at": null,
            }),
        )
    }

    /// Takes a frame of the gateway; returns what the portal sends, in order.
    pub(super) fn frame(
        &mut self,
        now: Instant,
        weather: &Weather,
        id: u64,
        text: &str,
    ) -> Vec<Value> {
        let Some(connection) = self.connection.as_mut().filter(|c| c.id == id) else {
            return Vec::new();
        };
        connection.last_frame = now;
        let frame: Value = serde_json::from_str(text).unwrap();
        let reference = frame["ref"].as_u64().expect("references are numbers");
        let topic = frame["topic"].as_str().unwrap();
        let payload = &frame["payload"];
        let ok = || reply(topic, reference, json!({"status": "ok", "response": {}}));
        let no = |reason: &str| {
            reply(
                topic,
                reference,
                json!({"status": "error", "response": {"reason": reason}}),
            )
        };
        let event = frame["event"].as_str().unwrap();
        if event == "heartbeat" {
            return vec![ok()];
        }
        if *weather == Weather::Stuck {
            return Vec::new();
        }
        if event == "phx_join" {
            assert_eq!(payload, &Value::Null);
            return match weather {
                Weather::JoinsIgnored => vec![],
                Weather::JoinsRefused => vec![no("disabled")],
                Weather::JoinsCrash => vec![no("join crashed")],
                _ => {
                    connection.joined = true;
                    match weather {
                        Weather::NoConfiguration => vec![ok()],
                        _ => vec![ok(), init()],
                    }
                }
            };
        }
        if !connection.joined {
            return vec![no("unmatched topic")];
        }
        match event {
            "set_snownet_capabilities" => vec![],
            "no_relays" => vec![push(
                "relays_presence",
                json!({"disconnected_ids": [], "connected": []}),
            )],
            "authorization_created" | "flow_authorized" => {
                let expected = match connection.protocol {
                    Protocol::V1 => "flow_authorized",
                    Protocol::V2 => "authorization_created",
                };
                assert_eq!(event, expected);
                let reference = payload["ref"].as_str().unwrap();
                let times = self.answered.get_mut(reference).expect("was asked for");
                *times += 1;
                assert_eq!(*times, 1, "{reference} is answered again");
                vec![ok()]
            }
            "broadcast_ice_candidates" | "broadcast_invalidated_ice_candidates" => {
                for client in payload["client_ids"].as_array().unwrap() {
                    let told = self
                        .told
                        .entry(client.as_str().unwrap().to_owned())
                        .or_default();
                    for candidate in payload["candidates"].as_array().unwrap() {
                        let candidate = candidate.as_str().unwrap();
                        if event == "broadcast_ice_candidates" {
                            self.told_again |= !told.insert(candidate.to_owned());
                        } else {
                            told.remove(candidate);
                        }
                    }
                }
                vec![]
            }
            other => panic!("the gateway sends {other}"),
        }
    }
}

pub(super) fn init() -> Value {
    push(
        "init",
        json!({"interface": {"ipv4": "100.70.8.21", "ipv6": "fd00:2021:1111::7:4"}}),
    )
}

pub(super) fn push(event: &str, payload: Value) -> Value {
    json!({"topic": "gateway", "event": event, "ref": null, "payload": payload})
}

fn reply(topic: &str, reference: u64, payload: Value) -> Value {
    json!({"topic": topic, "event": "phx_reply", "ref": reference, "payload": payload})
}

fn http(status: u16, retry_after: Option<u64>) -> Failure {
    Failure {
        http_status: Some(status),
        retry_after: retry_after.map(Duration::from_secs),
        ..Failure::new(
            ErrorType::from_status(status),
            format!("the portal answered {status}"),
        )
    }
}
