//! What both kinds of channel have in common: frames, joins and heartbeats (portal-channel spec
//! §1.6–1.10).

use serde_json::{Value, json};

use super::super::events::Now;
use super::super::faults::{ChannelFault, JoinFault};
use super::super::store::Role;
use super::super::wire::{self, Frame, Reply};
use super::{ConnId, Core};

/// What to answer to a message of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing.
    Silence,
    /// `ok`.
    Ok,
    /// `error` with a reason.
    Error(&'static str),
}

/// The answer to messages that a channel does not know, or whose payload it does not understand.
pub(super) const UNKNOWN: Answer = Answer::Error("unknown_message");

impl Core {
    /// Notes that a frame of any type arrived.
    pub fn handle_frame(&mut self, now: Now, id: ConnId) {
        if let Some(conn) = self.conns.get(&id) {
            let history = self.history.entry(conn.admission.peer).or_default();
            history.last_frame_ms = Some(now.unix_ms);
        }
    }

    /// Handles a text message.
    pub fn handle_text(&mut self, now: Now, id: ConnId, text: &str) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let (role, peer, joined) = (conn.role(), conn.admission.peer, conn.joined);
        let frame: Frame = match serde_json::from_str(text) {
            Ok(frame) => frame,
            Err(error) => {
                // The socket process of the real portal crashes on these.
                self.violation(
                    now,
                    id,
                    &format!("frame that is not serializer v1: {error}"),
                );
                self.close(now, id, 1011, "");
                return;
            }
        };
        self.check_reference(now, id, &frame.reference);

        if frame.topic == wire::PHOENIX && frame.event == "heartbeat" {
            self.history.entry(peer).or_default().heartbeats += 1;
            if !self.faults.borrow().of(role).drop_heartbeat_replies {
                self.reply(now, id, &frame, Reply::Ok);
            }
            return;
        }
        let shown = json!({"topic": frame.topic, "event": frame.event, "ref": frame.reference,
            "payload": frame.payload});
        self.note_message(now, peer, "in", &shown);

        let fault = self.faults.borrow().of(role).channel;
        if fault == ChannelFault::Silent && joined {
            self.events.record(
                now,
                "message_swallowed",
                json!({"conn": id, "peer_id": peer}),
            );
        } else if frame.topic != role.topic() {
            self.reply(now, id, &frame, Reply::Error("unmatched topic"));
        } else if frame.event == "phx_join" {
            self.handle_join(now, id, &frame);
        } else if !joined {
            self.violation(
                now,
                id,
                &format!("{} outside a joined channel", frame.event),
            );
            self.reply(now, id, &frame, Reply::Error("unmatched topic"));
        } else if frame.event == "phx_leave" {
            self.leave(now, id, "peer left");
            self.reply(now, id, &frame, Reply::Ok);
        } else {
            let answer = match role {
                Role::Gateway => self.handle_gateway(now, id, &frame.event, frame.payload.clone()),
                Role::Client => self.handle_client(now, id, &frame.event, frame.payload.clone()),
            };
            match answer {
                Answer::Silence => {}
                Answer::Ok => self.reply(now, id, &frame, Reply::Ok),
                Answer::Error(reason) => {
                    let detail = json!({"conn": id, "peer_id": peer, "event": frame.event,
                        "reason": reason});
                    self.events.record(now, "message_refused", detail);
                    self.reply(now, id, &frame, Reply::Error(reason));
                }
            }
        }
    }

    fn reply(&mut self, now: Now, id: ConnId, frame: &Frame, outcome: Reply<'_>) {
        if !frame.reference.is_null() {
            let frame = wire::reply(&frame.topic, &frame.reference, outcome);
            self.send(now, id, &frame);
        }
    }

    /// References are JSON numbers that count from 0 on every connection.
    fn check_reference(&mut self, now: Now, id: ConnId, reference: &Value) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let expected = conn.next_ref;
        match reference.as_u64() {
            Some(actual) => {
                conn.next_ref = actual + 1;
                if actual != expected {
                    let what = format!("ref {actual} where {expected} was due");
                    self.violation(now, id, &what);
                }
            }
            None => self.violation(now, id, &format!("ref {reference} is not a number")),
        }
    }

    fn handle_join(&mut self, now: Now, id: ConnId, frame: &Frame) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let (role, peer) = (conn.role(), conn.admission.peer);
        let detail = json!({"conn": id, "peer_id": peer, "role": role});
        if !frame.payload.is_null() {
            self.violation(now, id, "join payload that is not null");
        }
        let fault = self.faults.borrow().of(role).join.clone();
        match fault {
            JoinFault::None => {}
            JoinFault::Ignore => {
                self.events.record(now, "join_ignored", detail);
                return;
            }
            JoinFault::Refuse(reason) => {
                self.events.record(now, "join_refused", detail);
                self.reply(now, id, frame, Reply::Error(&reason));
                return;
            }
        }
        if let Some(other) = self.online(peer).filter(|other| *other != id) {
            match role {
                Role::Gateway => {
                    // Both got past the check at connect; the first one wins (§1.11).
                    self.reply(now, id, frame, Reply::Ok);
                    self.push(now, id, "disconnect", json!({"reason": "token_expired"}));
                    self.close(now, id, 1000, "");
                    self.events.record(now, "join_lost_race", detail);
                    return;
                }
                Role::Client => self.close(now, other, 1000, "replaced by a newer connection"),
            }
        }
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        conn.joined = true;
        conn.iceless = false;
        let admission = &conn.admission;
        self.store
            .update(peer, &admission.name, &admission.public_key);
        let history = self.history.entry(peer).or_default();
        history.joins += 1;
        history.joined_at_ms = Some(now.unix_ms);
        self.reply(now, id, frame, Reply::Ok);
        self.events.record(now, "joined", detail);
        self.push_init(now, id);
        if self.faults.borrow().of(role).channel == ChannelFault::Crash {
            self.push(now, id, "phx_error", json!({}));
            self.leave(now, id, "crashed by a fault");
        }
    }

    /// Pushes `init` to a joined channel.
    pub(super) fn push_init(&mut self, now: Now, id: ConnId) {
        let payload = match self.conns.get(&id).map(super::Conn::role) {
            Some(Role::Gateway) => self.gateway_init(now, id),
            Some(Role::Client) => self.client_init(now, id),
            None => None,
        };
        if let Some(payload) = payload {
            self.push(now, id, "init", payload);
        }
    }

    /// Ends the channel but not the socket; later messages meet an unmatched topic.
    pub(super) fn leave(&mut self, now: Now, id: ConnId, why: &str) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.joined = false;
            let detail = json!({"conn": id, "peer_id": conn.admission.peer, "why": why});
            self.events.record(now, "left", detail);
        }
    }
}
