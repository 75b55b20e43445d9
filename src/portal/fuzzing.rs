//! Entry points of the fuzz targets in `fuzz/`. The committed corpus goes through them as a test.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::channel::{Action, Channel, ChannelConfig, CloseCause, Event};
use super::dial::answer;
use super::error::{ErrorType, Failure};
use super::messages::{Egress, Ingress, Resource};
use super::wire::{self, Inbound};
use crate::fuzzing::Script;

/// A frame of the portal. Whatever it holds, it never gives more than it says.
pub fn portal_frame(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(Inbound::Message { message, .. }) = wire::decode(text) else {
        return;
    };
    // Members that are passed over may hold numbers that no `Value` can.
    let Ok(frame) = serde_json::from_str::<Value>(text) else {
        return;
    };
    let payload = &frame["payload"];
    match message {
        Ingress::ResourceUpdated(resource) => check_resource(payload, &resource),
        Ingress::CreateAuthorization(grant) => {
            check_resource(&payload["resource"], &grant.resource);
            assert_eq!(grant.expires_at, payload["expires_at"].as_u64());
            assert_eq!(grant.expires_at.is_none(), payload["expires_at"].is_null());
            let answer = Egress::AuthorizationCreated {
                reference: grant.reference,
            };
            let answer = wire::encode(&answer, 1, super::login::Protocol::V2);
            let answer: Value = serde_json::from_str(&answer).expect("we wrote it");
            assert_eq!(answer["payload"]["ref"], payload["ref"]);
        }
        Ingress::Init(init) => {
            let listed = payload["authorizations"].as_array().map_or(0, Vec::len);
            assert!(init.authorizations.len() <= listed);
        }
        _ => {}
    }
}

fn check_resource(said: &Value, understood: &Resource) {
    let filters = match understood {
        Resource::Cidr(cidr) => &cidr.filters,
        Resource::Dns(dns) => &dns.filters,
        Resource::Internet { .. } => return,
    };
    let said = said["filters"].as_array().expect("a list, or refused");
    assert_eq!(filters.len(), said.len(), "an empty list allows everything");
}

/// An HTTP answer: a status, headers up to an empty line, a body.
pub fn portal_answer(data: &[u8]) {
    let Some((status, rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let status = 100 + u16::from_be_bytes(*status) % 900;
    let mut headers = HeaderMap::new();
    let mut lines = rest.split(|b| *b == b'\n');
    for line in lines.by_ref().take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_at(line.iter().position(|b| *b == b':').unwrap_or(0));
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(name),
            HeaderValue::from_bytes(value.get(1..).unwrap_or_default()),
        ) {
            headers.insert(name, value);
        }
    }
    let body = lines.collect::<Vec<_>>().join(&b'\n');
    let status = StatusCode::from_u16(status).expect("between 100 and 999");
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let failure = answer::failure(status, &headers, &body, now);
    assert!(failure.message.len() < 4096 && !failure.message.contains(char::is_control));
    assert_eq!(failure.kind, ErrorType::from_status(status.as_u16()));
}

/// A script of what happens to a channel.
pub fn portal_channel(data: &[u8]) {
    let mut script = Script::new(data);
    let config = ChannelConfig {
        max_partition_time: script.bit().then_some(Duration::from_secs(600)),
        exit_on_auth_failure: script.bit(),
        ..ChannelConfig::default()
    };
    let mut owner = Owner {
        channel: Channel::new(config, u64::from(script.byte())),
        now: Instant::now(),
        open: Open::Nothing,
        joined: false,
        ended: false,
        references: 0,
    };
    owner.channel.start(owner.now);
    owner.settle();
    while !script.is_empty() {
        owner.step(&mut script);
        owner.settle();
    }
}

#[derive(PartialEq, Debug)]
enum Open {
    Nothing,
    Attempt,
    Socket,
}

struct Owner {
    channel: Channel,
    now: Instant,
    open: Open,
    joined: bool,
    ended: bool,
    references: u64,
}

impl Owner {
    fn step(&mut self, script: &mut Script<'_>) {
        let now = self.now;
        match script.byte() % 16 {
            0 | 1 => {
                if let Some((at, _)) = self.channel.poll_timeout() {
                    self.now = now.max(at);
                }
                self.channel.handle_timeout(self.now);
            }
            2 => self.now += Duration::from_millis(u64::from(script.byte()) * 50),
            3 => {
                if self.open == Open::Attempt {
                    self.open = Open::Socket;
                }
                self.channel.socket_opened(now);
            }
            4 => {
                let failure = Self::failure(script);
                if self.open == Open::Attempt {
                    self.open = Open::Nothing;
                }
                self.channel.attempt_failed(now, failure);
            }
            5 => {
                let cause = match script.byte() % 4 {
                    0 => CloseCause::Eof,
                    1 => CloseCause::WriteStalled,
                    2 => CloseCause::Io(script.text().to_owned()),
                    _ => CloseCause::Frame {
                        code: script.bit().then_some(1000 + u16::from(script.byte())),
                        reason: script.text().to_owned(),
                    },
                };
                if self.open == Open::Socket {
                    self.open = Open::Nothing;
                }
                self.channel.closed(now, cause);
            }
            6 => self.channel.frame(now, script.text()),
            7..10 => {
                let reference = match script.byte() {
                    255 => 0,
                    back => self.references.saturating_sub(u64::from(back)),
                };
                let topic = ["gateway", "phoenix"][usize::from(script.bit())];
                let payload = if script.bit() {
                    json!({"status": "ok", "response": {}})
                } else {
                    let reason = ["unmatched topic", "disabled", "join crashed", "x"];
                    let reason = reason[usize::from(script.byte() % 4)];
                    json!({"status": "error", "response": {"reason": reason}})
                };
                let frame = json!({"topic": topic, "event": "phx_reply", "ref": reference,
                    "payload": payload});
                self.channel.frame(now, &frame.to_string());
            }
            10 => {
                let (event, payload) = match script.byte() % 6 {
                    0 => (
                        "init",
                        json!({"interface": {"ipv4": "100.70.8.21", "ipv6": "fd00::4"}}),
                    ),
                    1 => ("phx_close", json!({})),
                    2 => ("phx_error", json!({})),
                    3 => ("disconnect", json!({"reason": "token_expired"})),
                    4 => (
                        "relays_presence",
                        json!({"disconnected_ids": [], "connected": []}),
                    ),
                    _ => ("unheard_of", json!(null)),
                };
                let frame = json!({"topic": "gateway", "event": event, "payload": payload});
                self.channel.frame(now, &frame.to_string());
            }
            11 => {
                let message = match script.byte() % 3 {
                    0 => Egress::NoRelays,
                    1 => Egress::AuthorizationCreated {
                        reference: script.text().to_owned(),
                    },
                    _ => Egress::BroadcastIceCandidates {
                        client_ids: vec![],
                        candidates: vec![script.text().to_owned()],
                    },
                };
                assert_eq!(self.channel.send(now, message).is_ok(), self.joined);
            }
            12 => self.channel.token_changed(now),
            13 => self.channel.network_changed(now),
            14 => self.channel.retry_now(now),
            _ => {
                if script.byte() == 77 {
                    self.ended = true;
                    self.joined = false;
                    self.channel.close(now);
                }
            }
        }
    }

    fn failure(script: &mut Script<'_>) -> Failure {
        let kind = ErrorType::ALL[usize::from(script.byte()) % ErrorType::ALL.len()];
        let asked = Duration::from_secs(u64::from(script.byte()) * 10);
        Failure {
            retry_after: script.bit().then_some(asked),
            http_status: script.bit().then_some(400 + u16::from(script.byte() % 8)),
            ..Failure::new(kind, script.text())
        }
    }

    fn settle(&mut self) {
        while self.channel.poll_milestone().is_some() {}
        while let Some(action) = self.channel.poll_action() {
            match action {
                Action::Dial(_) => {
                    assert_eq!(self.open, Open::Nothing, "two at once");
                    assert!(!self.ended, "dials after the end");
                    self.open = Open::Attempt;
                }
                Action::SendText { reference, .. } => {
                    assert_eq!(self.open, Open::Socket, "sends without a socket");
                    self.references = reference;
                    self.channel.written(self.now, reference);
                }
                Action::Disconnect | Action::Close { .. } => {
                    assert_ne!(self.open, Open::Nothing, "hangs up on nothing");
                    self.open = Open::Nothing;
                }
            }
        }
        while let Some(event) = self.channel.poll_event() {
            match event {
                Event::Connected => self.joined = true,
                Event::Disconnected { .. } => self.joined = false,
                Event::GaveUp { .. } => self.ended = true,
                Event::Message(_) | Event::Blocked { .. } | Event::Unblocked => {}
            }
        }
        assert_eq!(self.channel.is_joined(), self.joined);
        assert_eq!(self.channel.poll_timeout().is_none(), self.ended);
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let _ = self.channel.status(self.now, wall);
    }
}

#[cfg(test)]
mod tests {
    use crate::fuzzing::corpus;

    #[test]
    fn corpus_of_frames_gives_no_more_than_it_says() {
        corpus("portal_frame", 256, super::portal_frame);
    }

    #[test]
    fn corpus_of_answers_is_survived() {
        corpus("portal_answer", 256, super::portal_answer);
    }

    #[test]
    fn corpus_of_scripts_keeps_the_channel_in_order() {
        corpus("portal_channel", 256, super::portal_channel);
    }
}
