//! What the portal derives from identities and keys (portal-channel spec §7.4, §6.1).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use hmac::{Hmac, Mac as _};
use serde::Serialize;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// Expiry of relay credentials that are not meant to change: 2038-01-01T00:00:00Z (§6.1).
pub const FIXED_EXPIRY: u64 = 2_145_916_800;

/// One end of a connection, as far as keys are concerned.
#[derive(Clone, Copy)]
pub struct Endpoint<'a> {
    /// Id.
    pub id: Uuid,
    /// X25519 public key as base64 text, which is how it enters the derivations.
    pub public_key: &'a str,
    /// Secret that the portal keeps for this identity.
    pub psk_base: &'a [u8; 32],
}

/// ICE user name fragment and password (RFC 8445 §5.3).
#[derive(Clone, PartialEq, Eq, Serialize)]
pub struct IceCredentials {
    /// User name fragment, 4 characters.
    pub username: String,
    /// Password, 22 characters.
    pub password: String,
}

impl fmt::Debug for IceCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IceCredentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// ICE credentials of the client and of the gateway, in this order (§7.4).
pub fn ice_credentials(
    client: Endpoint<'_>,
    gateway: Endpoint<'_>,
) -> (IceCredentials, IceCredentials) {
    let digest = Sha256::digest(format!(
        "{}:{}:{}:{}",
        client.id, client.public_key, gateway.id, gateway.public_key
    ));
    let text = base32_lower(&digest);
    let part =
        |username: std::ops::Range<usize>, password: std::ops::Range<usize>| IceCredentials {
            username: text[username].to_owned(),
            password: text[password].to_owned(),
        };
    (part(0..4, 4..26), part(26..30, 30..52))
}

/// WireGuard preshared key of the pair, base64 (§7.4).
pub fn preshared_key(client: Endpoint<'_>, gateway: Endpoint<'_>) -> String {
    let password = [client.psk_base.as_slice(), gateway.psk_base.as_slice()].concat();
    let salt = format!(
        "WG_PSK|C_ID:{}|G_ID:{}|C_PK:{}|G_PK:{}",
        client.id, gateway.id, client.public_key, gateway.public_key
    );
    // PBKDF2 (RFC 8018 §5.2) with one iteration and one block is a single HMAC.
    let mut mac = Hmac::<Sha256>::new_from_slice(&password).expect("HMAC takes keys of any length");
    mac.update(salt.as_bytes());
    mac.update(&1u32.to_be_bytes());
    STANDARD.encode(mac.finalize().into_bytes())
}

/// User name and password for one peer at one relay.
pub struct RelayCredentials {
    /// TURN user name.
    pub username: String,
    /// TURN password.
    pub password: String,
}

/// Credentials for a relay that shares `secret` with us in coturn's `use-auth-secret` scheme: the
/// user name carries the expiry (Unix seconds), the password is its HMAC-SHA1.
pub fn coturn_credentials(secret: &str, public_key: &str, expires_at: u64) -> RelayCredentials {
    let username = format!("{expires_at}:{}", relay_salt(public_key));
    let mut mac =
        Hmac::<Sha1>::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(username.as_bytes());
    RelayCredentials {
        password: STANDARD.encode(mac.finalize().into_bytes()),
        username,
    }
}

/// Distinguishes peers at a relay; stable per public key, so that reconnecting changes nothing.
fn relay_salt(public_key: &str) -> String {
    STANDARD_NO_PAD.encode(Sha256::digest(public_key))
}

/// RFC 4648 base32 in lower case, without padding.
fn base32_lower(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut buffer, mut bits) = (0u32, 0);
    for byte in bytes {
        buffer = (buffer << 8) | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(ALPHABET[(buffer >> bits) as usize & 31]));
        }
    }
    if bits > 0 {
        text.push(char::from(ALPHABET[(buffer << (5 - bits)) as usize & 31]));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn pair<T>(f: impl FnOnce(Endpoint<'_>, Endpoint<'_>) -> T) -> T {
        let client = Endpoint {
            id: "11111111-2222-4333-8444-555555555555".parse().unwrap(),
            public_key: &STANDARD.encode([1; 32]),
            psk_base: &[3; 32],
        };
        let gateway = Endpoint {
            id: "66666666-7777-4888-9999-aaaaaaaaaaaa".parse().unwrap(),
            public_key: &STANDARD.encode([2; 32]),
            psk_base: &[4; 32],
        };
        f(client, gateway)
    }

    #[test]
    fn ice_credentials_match_the_test_vector() {
        let (client, gateway) = pair(ice_credentials);
        assert_eq!(client.username, "ww54");
        assert_eq!(client.password, "atm32zsp76tbbrq6su4fqb");
        assert_eq!(gateway.username, "qslo");
        assert_eq!(gateway.password, "we3usyefp3j3i2wk2gockq");
    }

    #[test]
    fn preshared_key_matches_the_test_vector() {
        assert_eq!(
            pair(preshared_key),
            "6GxN1vJ+n3QtDvDYH7VdhJsulbIlWRKEQTO3PoNi8ts="
        );
    }

    #[test]
    fn base32_matches_rfc_4648() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "my"),
            ("fo", "mzxq"),
            ("foo", "mzxw6"),
            ("foob", "mzxw6yq"),
            ("fooba", "mzxw6ytb"),
            ("foobar", "mzxw6ytboi"),
        ] {
            assert_eq!(base32_lower(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn coturn_credentials_carry_the_expiry_and_a_stable_salt() {
        let credentials = coturn_credentials("north", &STANDARD.encode([2; 32]), FIXED_EXPIRY);
        // Salt as in the relay test vector of spec §7.5; password computed with
        // `printf %s <username> | openssl dgst -sha1 -hmac north -binary | base64`.
        assert_eq!(
            credentials.username,
            "2145916800:nXAyqBpHWYA/1G2XTllLzU96O4pcBycOWOnhLBT9TPA"
        );
        assert_eq!(credentials.password, "4CE9ZxRrzNzuW9ATXtpOvdIXF3M=");
    }

    #[test]
    fn debug_output_hides_the_password() {
        let (client, _) = pair(ice_credentials);
        assert!(!format!("{client:?}").contains("atm32"));
    }
}
