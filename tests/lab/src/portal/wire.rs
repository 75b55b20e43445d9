//! Frames of Phoenix serializer v1: one JSON object per text message (portal-channel spec §1.6).

use serde::Deserialize;
use serde_json::{Value, json};

/// Topic of heartbeats.
pub const PHOENIX: &str = "phoenix";

/// A frame from a peer.
#[derive(Debug, Clone, Deserialize)]
pub struct Frame {
    /// Channel.
    pub topic: String,
    /// What it is.
    pub event: String,
    /// Contents.
    #[serde(default)]
    pub payload: Value,
    /// Number of the message; replies repeat it as it came.
    #[serde(default, rename = "ref")]
    pub reference: Value,
}

/// Outcome of a message, as told in a `phx_reply`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// Success, with the empty response that decoders insist on.
    Ok,
    /// Failure and its reason.
    Error(&'a str),
}

/// The `phx_reply` to a message.
pub fn reply(topic: &str, reference: &Value, outcome: Reply<'_>) -> Value {
    let (status, response) = match outcome {
        Reply::Ok => ("ok", json!({})),
        Reply::Error(reason) => ("error", json!({ "reason": reason })),
    };
    json!({
        "topic": topic,
        "event": "phx_reply",
        "ref": reference,
        "payload": {"status": status, "response": response},
    })
}

/// A message from the portal on its own account.
pub fn push(topic: &str, event: &str, payload: Value) -> Value {
    json!({"topic": topic, "event": event, "ref": null, "payload": payload})
}

/// Members whose values are secrets and must not show up in logs, events or the control API.
const SECRET: [&str; 5] = [
    "password",
    "preshared_key",
    "flow_logs_ingest_token",
    "token",
    "secret",
];

/// `value` without secrets.
pub fn redacted(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(redacted).collect(),
        Value::Object(members) => members
            .iter()
            .map(|(name, member)| {
                let member = if SECRET.contains(&name.as_str()) {
                    json!("[redacted]")
                } else {
                    redacted(member)
                };
                (name.clone(), member)
            })
            .collect(),
        plain => plain.clone(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn replies_repeat_the_reference_as_it_came() {
        let frame: Frame =
            serde_json::from_str(r#"{"topic":"gateway","event":"x","payload":null,"ref":7}"#)
                .unwrap();
        let text = reply(&frame.topic, &frame.reference, Reply::Ok).to_string();
        assert!(text.contains(r#""ref":7"#), "{text}");
        assert!(text.contains(r#""response":{}"#), "{text}");
    }

    #[test]
    fn secrets_are_redacted_at_any_depth() {
        let shown = redacted(&json!({
            "client": {"preshared_key": "k", "id": "i"},
            "relays": [{"username": "u", "password": "p"}],
        }));
        assert_eq!(
            shown,
            json!({
                "client": {"preshared_key": "[redacted]", "id": "i"},
                "relays": [{"username": "u", "password": "[redacted]"}],
            })
        );
    }
}
