//! The ingest token of an authorization: a JWT that names the flow's parties to whoever receives
//! the records (portal-channel spec §4.8). It is passed on, so its signature is not checked here.

use std::fmt;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value};

/// Longest token that is accepted, in bytes. It travels in a header, and a file holds it.
pub const MAX_TOKEN: usize = 16 << 10;
/// Longest id of an authorization, in bytes. It names a directory.
const MAX_ID: usize = 64;

/// Claims that must be strings, besides those that are looked at one by one (portal-channel spec
/// §4.8).
const REQUIRED_STRINGS: [&str; 10] = [
    "account_id",
    "initiator_device_id",
    "responder_device_id",
    "policy_id",
    "resource_id",
    "resource_name",
    "initiator_actor_id",
    "initiator_actor_name",
    "authorized_at",
    "authorization_expires_at",
];

/// Why a token cannot be used. Says nothing of what the token contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Longer than [`MAX_TOKEN`].
    #[error("the token is longer than {MAX_TOKEN} bytes")]
    TooLong,
    /// Not three segments, or one of them is empty.
    #[error("the token does not consist of three segments")]
    Segments,
    /// A segment is not base64url without padding.
    #[error("the token's {0} is not base64url without padding")]
    Encoding(&'static str),
    /// The header or the claims are not a JSON object.
    #[error("the token's {0} is not a JSON object")]
    Json(&'static str),
    /// Signed in another way than HS256.
    #[error("the token's algorithm is not HS256")]
    Algorithm,
    /// A required claim is missing or of the wrong type.
    #[error("the token's claim `{0}` is missing or of the wrong type")]
    Claim(&'static str),
    /// Made for the client's end of the connection.
    #[error("the token is not for a gateway")]
    Role,
    /// The id of the authorization is not 1 to 64 letters, digits and hyphens.
    #[error("the token's policy_authorization_id cannot name a directory")]
    Id,
}

/// What records are kept under: one grant of one resource to one client.
#[derive(Clone)]
pub struct Authorization {
    id: String,
    resource_id: String,
    uploads_enabled: bool,
    /// Unix seconds.
    expires_at: u64,
    token: SecretString,
}

impl Authorization {
    /// Reads a token. Claims that are not known are tolerated.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn parse(token: &str) -> Result<Self, TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::TooLong);
        }
        let mut segments = token.split('.');
        let (Some(header), Some(claims), Some(signature), None) = (
            segments.next(),
            segments.next(),
            segments.next(),
            segments.next(),
        ) else {
            return Err(TokenError::Segments);
        };
        if header.is_empty() || claims.is_empty() || signature.is_empty() {
            return Err(TokenError::Segments);
        }
        let header = object(header, "header")?;
        let claims = object(claims, "claims")?;
        decode(signature, "signature")?;
        if header.get("alg").and_then(Value::as_str) != Some("HS256") {
            return Err(TokenError::Algorithm);
        }

        for name in REQUIRED_STRINGS {
            string(&claims, name)?;
        }
        number(&claims, "iat")?;
        let expires_at = number(&claims, "exp")?;
        let uploads_enabled = claims
            .get("uploads_enabled")
            .and_then(Value::as_bool)
            .ok_or(TokenError::Claim("uploads_enabled"))?;
        match string(&claims, "role")? {
            "responder" => {}
            "initiator" => return Err(TokenError::Role),
            _ => return Err(TokenError::Claim("role")),
        }
        let id = string(&claims, "policy_authorization_id")?;
        if !is_id(id) {
            return Err(TokenError::Id);
        }
        Ok(Self {
            id: id.to_owned(),
            resource_id: string(&claims, "resource_id")?.to_owned(),
            uploads_enabled,
            expires_at,
            token: SecretString::from(token),
        })
    }

    /// `policy_authorization_id`: 1 to 64 ASCII letters, digits and hyphens.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `resource_id`, as written.
    pub fn resource_id(&self) -> &str {
        &self.resource_id
    }

    /// Whether records of this authorization are wanted at all.
    pub fn uploads_enabled(&self) -> bool {
        self.uploads_enabled
    }

    /// `exp`, in Unix seconds.
    pub fn expires_at(&self) -> u64 {
        self.expires_at
    }

    /// Whether the token is no longer accepted at `now`.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        now.as_secs() >= self.expires_at
    }

    /// The token itself.
    pub fn token(&self) -> &SecretString {
        &self.token
    }

    pub(super) fn has_token_of(&self, other: &Self) -> bool {
        self.token.expose_secret() == other.token.expose_secret()
    }
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorization")
            .field("id", &self.id)
            .field("resource_id", &self.resource_id)
            .field("uploads_enabled", &self.uploads_enabled)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// Whether a text can be the id of an authorization, and so the name of a directory.
pub(super) fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn decode(segment: &str, what: &'static str) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD
        .decode(segment)
        .map_err(|_| TokenError::Encoding(what))
}

fn object(segment: &str, what: &'static str) -> Result<Map<String, Value>, TokenError> {
    serde_json::from_slice(&decode(segment, what)?).map_err(|_| TokenError::Json(what))
}

fn string<'a>(claims: &'a Map<String, Value>, name: &'static str) -> Result<&'a str, TokenError> {
    claims
        .get(name)
        .and_then(Value::as_str)
        .ok_or(TokenError::Claim(name))
}

fn number(claims: &Map<String, Value>, name: &'static str) -> Result<u64, TokenError> {
    claims
        .get(name)
        .and_then(Value::as_u64)
        .ok_or(TokenError::Claim(name))
}

#[cfg(test)]
#[path = "token_tests.rs"]
mod tests;
