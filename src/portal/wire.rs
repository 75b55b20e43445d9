//! Frames of the channel: Phoenix serializer v1, one JSON object per WebSocket text message
//! (portal-channel spec §1.6), and what a malformed one costs (§4.2).
//!
//! Three rules decide about bad input. Members that are not known are ignored. Where one bad entry
//! of a list can be left out without giving or taking access wrongly (candidates, relays, listed
//! authorizations), it is left out and counted. Everything else refuses the one message.

mod payload;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::login::Protocol;
use super::messages::{Egress, Ingress};

/// Topic of the gateway's channel.
pub const TOPIC: &str = "gateway";
/// Topic of heartbeats.
pub const HEARTBEAT_TOPIC: &str = "phoenix";

/// A frame from the portal.
#[derive(Debug)]
pub enum Inbound {
    /// `phx_reply`.
    Reply(Reply),
    /// A message of the application, and how many list entries were left out of it.
    Message {
        /// The message.
        message: Ingress,
        /// List entries that were skipped.
        skipped: usize,
    },
    /// `phx_close`: the channel ended normally.
    ChannelClosed,
    /// `phx_error`: the channel crashed.
    ChannelCrashed,
    /// `disconnect`, e.g. `token_expired`.
    Disconnect {
        /// Why.
        reason: String,
    },
    /// An event that we do not know, or one of another topic.
    Unknown {
        /// Its name.
        event: String,
    },
}

/// `phx_reply`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Topic of the message that is answered.
    pub topic: String,
    /// Reference of the message that is answered; `None` if the portal sent none.
    pub reference: Option<u64>,
    /// `Err` holds the reason.
    pub result: Result<(), String>,
}

/// Why a frame was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The text ends in the middle; what follows cannot be trusted either.
    #[error("truncated JSON")]
    Truncated,
    /// Not a frame at all.
    #[error("not a frame: {0}")]
    NotAFrame(String),
    /// A frame whose payload cannot be used; nothing else is lost.
    #[error("`{event}` refused: {problem}")]
    Refused {
        /// The event.
        event: String,
        /// What is wrong with it.
        problem: String,
    },
}

#[derive(Deserialize)]
struct Frame {
    topic: String,
    event: String,
    #[serde(default)]
    payload: Value,
    #[serde(default, rename = "ref")]
    reference: Value,
}

/// Decodes one text message.
///
/// # Errors
///
/// See [`WireError`]; only [`WireError::Truncated`] says anything about the connection.
pub fn decode(text: &str) -> Result<Inbound, WireError> {
    let frame: Frame = serde_json::from_str(text).map_err(|e| {
        if e.is_eof() {
            WireError::Truncated
        } else {
            // serde_json quotes offending values of unexpected types; they may be secrets.
            WireError::NotAFrame(format!("line {} column {}", e.line(), e.column()))
        }
    })?;

    if frame.event == "phx_reply" {
        return decode_reply(frame).map(Inbound::Reply);
    }
    if frame.topic != TOPIC {
        return Ok(Inbound::Unknown { event: frame.event });
    }

    let refused = |problem| WireError::Refused {
        event: frame.event.clone(),
        problem,
    };
    Ok(match frame.event.as_str() {
        "phx_close" => Inbound::ChannelClosed,
        "phx_error" => Inbound::ChannelCrashed,
        "disconnect" => Inbound::Disconnect {
            reason: frame
                .payload
                .get("reason")
                .and_then(Value::as_str)
                .unwrap_or("unspecified")
                .to_owned(),
        },
        event => match payload::decode(event, &frame.payload).map_err(refused)? {
            Some((message, skipped)) => Inbound::Message { message, skipped },
            None => Inbound::Unknown { event: frame.event },
        },
    })
}

fn decode_reply(frame: Frame) -> Result<Reply, WireError> {
    let refused = |problem: &str| WireError::Refused {
        event: "phx_reply".to_owned(),
        problem: problem.to_owned(),
    };
    // The portal echoes a number; a number in quotes still says which message is meant.
    let reference = match &frame.reference {
        Value::Number(n) => n.as_u64(),
        Value::String(s) => s.parse().ok(),
        _ => None,
    };
    let result = match frame.payload.get("status").and_then(Value::as_str) {
        // Whatever `response` holds, the answer was yes.
        Some("ok") => Ok(()),
        Some("error") => Err(frame
            .payload
            .pointer("/response/reason")
            .and_then(Value::as_str)
            .unwrap_or("no reason given")
            .to_owned()),
        _ => return Err(refused("unknown status")),
    };
    Ok(Reply {
        topic: frame.topic,
        reference,
        result,
    })
}

/// Key order as the reference implementation has it; receivers do not care, readers of captures do.
#[derive(Serialize)]
struct OutFrame<'a> {
    topic: &'a str,
    event: &'a str,
    payload: Value,
    #[serde(rename = "ref")]
    reference: u64,
}

impl OutFrame<'_> {
    fn encode(&self) -> String {
        serde_json::to_string(self).expect("string keys and plain values always serialize")
    }
}

/// `phx_join` (portal-channel spec §1.7).
pub fn encode_join(reference: u64) -> String {
    OutFrame {
        topic: TOPIC,
        event: "phx_join",
        payload: Value::Null,
        reference,
    }
    .encode()
}

/// `heartbeat` (portal-channel spec §1.8).
pub fn encode_heartbeat(reference: u64) -> String {
    OutFrame {
        topic: HEARTBEAT_TOPIC,
        event: "heartbeat",
        payload: json!({}),
        reference,
    }
    .encode()
}

/// A message of the gateway (portal-channel spec §4), under the name that it has in `protocol`.
pub fn encode(message: &Egress, reference: u64, protocol: Protocol) -> String {
    let (event, payload) = match message {
        Egress::AuthorizationCreated { reference } => {
            let event = match protocol {
                Protocol::V1 => "flow_authorized",
                Protocol::V2 => "authorization_created",
            };
            (event, json!({ "ref": reference }))
        }
        Egress::BroadcastIceCandidates {
            client_ids,
            candidates,
        } => (
            "broadcast_ice_candidates",
            json!({ "client_ids": client_ids, "candidates": candidates }),
        ),
        Egress::BroadcastInvalidatedIceCandidates {
            client_ids,
            candidates,
        } => (
            "broadcast_invalidated_ice_candidates",
            json!({ "client_ids": client_ids, "candidates": candidates }),
        ),
        Egress::NoRelays => ("no_relays", json!({})),
        Egress::SetSnownetCapabilities { iceless } => {
            ("set_snownet_capabilities", json!({ "iceless": iceless }))
        }
    };
    OutFrame {
        topic: TOPIC,
        event,
        payload,
        reference,
    }
    .encode()
}
