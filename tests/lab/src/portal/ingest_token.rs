//! Flow-log ingest tokens: signed JWTs that both ends of a grant receive (portal-channel spec §4.8).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac as _};
use serde::Serialize;
use sha2::Sha256;
use uuid::Uuid;

/// How much longer than its grant a token is valid: 30 days, in seconds.
const GRACE: u64 = 30 * 24 * 3600;

/// Which end of the connection a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The client.
    Initiator,
    /// The gateway.
    Responder,
}

/// What a token says.
#[derive(Debug, Clone, Serialize)]
pub struct Claims {
    /// Account.
    pub account_id: Uuid,
    /// Issued at, Unix seconds.
    pub iat: u64,
    /// Expires at, Unix seconds.
    pub exp: u64,
    /// Whether reports may be uploaded.
    pub uploads_enabled: bool,
    /// For whom.
    pub role: Role,
    /// Id of the client.
    pub initiator_device_id: Uuid,
    /// Id of the gateway.
    pub responder_device_id: Uuid,
    /// Id of the grant.
    pub policy_authorization_id: Uuid,
    /// Id of the policy behind the grant.
    pub policy_id: Uuid,
    /// Id of the resource.
    pub resource_id: Uuid,
    /// Name of the resource.
    pub resource_name: String,
    /// Address of the resource, unless it is the internet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource_address: Option<String>,
    /// Who uses the client.
    pub initiator_actor_id: Uuid,
    /// Their name.
    pub initiator_actor_name: String,
    /// Their mail address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initiator_actor_email: Option<String>,
    /// Version of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initiator_client_version: Option<String>,
    /// RFC 3339.
    pub authorized_at: String,
    /// RFC 3339.
    pub authorization_expires_at: String,
}

/// The `exp` claim for a grant that ends at `grant_expires_at` (Unix seconds).
pub fn expiry(grant_expires_at: u64) -> u64 {
    grant_expires_at.saturating_add(GRACE)
}

/// Compact JWS (RFC 7515 §3.1) of `claims` with HS256.
pub fn sign(key: &[u8; 32], claims: &Claims) -> String {
    let claims = serde_json::to_vec(claims).expect("claims are plain data");
    let signed = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#),
        URL_SAFE_NO_PAD.encode(claims)
    );
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(signed.as_bytes());
    let signature = URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes());
    format!("{signed}.{signature}")
}

/// RFC 3339 text, in UTC, of Unix seconds.
pub fn rfc3339(unix: u64) -> String {
    let (days, seconds) = (unix / 86_400, unix % 86_400);
    // Gregorian calendar from a day count, with years that begin in March so that the leap day
    // comes last.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::Value;

    use super::*;

    fn claims() -> Claims {
        Claims {
            account_id: Uuid::nil(),
            iat: 1,
            exp: expiry(1),
            uploads_enabled: false,
            role: Role::Responder,
            initiator_device_id: Uuid::nil(),
            responder_device_id: Uuid::nil(),
            policy_authorization_id: Uuid::nil(),
            policy_id: Uuid::nil(),
            resource_id: Uuid::nil(),
            resource_name: "Lab".to_owned(),
            resource_address: None,
            initiator_actor_id: Uuid::nil(),
            initiator_actor_name: "Ada".to_owned(),
            initiator_actor_email: None,
            initiator_client_version: None,
            authorized_at: rfc3339(1),
            authorization_expires_at: rfc3339(1),
        }
    }

    #[test]
    fn token_has_three_segments_and_every_required_claim() {
        let token = sign(&[7; 32], &claims());
        let segments: Vec<_> = token.split('.').collect();
        assert_eq!(segments.len(), 3);
        let decode = |segment: &str| URL_SAFE_NO_PAD.decode(segment).unwrap();
        let header: Value = serde_json::from_slice(&decode(segments[0])).unwrap();
        let body: Value = serde_json::from_slice(&decode(segments[1])).unwrap();
        assert_eq!(header["alg"], "HS256");
        assert_eq!(decode(segments[2]).len(), 32);
        for name in [
            "account_id",
            "role",
            "initiator_device_id",
            "responder_device_id",
            "policy_authorization_id",
            "policy_id",
            "resource_id",
            "resource_name",
            "initiator_actor_id",
            "initiator_actor_name",
            "authorized_at",
            "authorization_expires_at",
        ] {
            assert!(body[name].is_string(), "{name}");
        }
        assert!(body["iat"].is_u64() && body["exp"].is_u64());
        assert_eq!(body["uploads_enabled"], false);
        assert_eq!(body["role"], "responder");
    }

    #[test]
    fn signature_depends_on_the_key() {
        assert_ne!(sign(&[7; 32], &claims()), sign(&[8; 32], &claims()));
    }

    #[test]
    fn dates_are_right_around_leap_days_and_centuries() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (2_145_916_800, "2038-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix), text);
        }
    }
}
