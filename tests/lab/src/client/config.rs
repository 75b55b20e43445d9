//! Settings of `lab-client` and the URL it dials (portal-channel spec §1.1–§1.4).

use std::net::SocketAddr;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Parser, ValueEnum};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::messages::Secret;

/// Which local candidates are signalled and used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Only {
    /// All of them.
    #[default]
    All,
    /// Relayed ones.
    Relay,
    /// Host and server-reflexive ones.
    Direct,
}

/// A stand-in for the stock headless client.
#[derive(Debug, Clone, Parser)]
#[command(name = "lab-client", version)]
pub struct Args {
    /// Base URL of the portal; only `ws://` (or `http://`) is spoken.
    #[arg(long, env = "FIREZONE_API_URL", default_value = "ws://127.0.0.1:8081/")]
    pub portal_url: String,
    /// Client token.
    #[arg(long, env = "FIREZONE_TOKEN", hide_env_values = true, value_parser = parse_secret)]
    pub token: Secret,
    /// Stable identity; sent hashed if it is a UUID.
    #[arg(long, env = "FIREZONE_ID", default_value = "lab-client")]
    pub id: String,
    /// Display name.
    #[arg(long, env = "FIREZONE_NAME", default_value = "lab-client")]
    pub name: String,
    /// Name of the TUN device to create.
    #[arg(long, default_value = "tun-client")]
    pub tun_name: String,
    /// UDP port for WireGuard, ICE and TURN; 0 lets the kernel choose.
    #[arg(long, default_value_t = 0)]
    pub listen_port: u16,
    /// Where the control API listens.
    #[arg(long, env = "LAB_CLIENT_CONTROL", default_value = "127.0.0.1:8083")]
    pub control: SocketAddr,
    /// Restrict the local candidates.
    #[arg(long, value_enum, default_value_t)]
    pub only: Only,
    /// Allocate on one address of a dual-stack relay only. Needed with relays that allow one
    /// allocation per user.
    #[arg(long)]
    pub one_allocation_per_relay: bool,
    /// Do not open an IPv4 socket.
    #[arg(long)]
    pub no_v4: bool,
    /// Do not open an IPv6 socket.
    #[arg(long)]
    pub no_v6: bool,
    /// Use the internet resource: take the default route.
    #[arg(long, env = "FIREZONE_ACTIVATE_INTERNET_RESOURCE")]
    pub internet: bool,
    /// Ask for access to this resource as soon as it is known.
    #[arg(long)]
    pub connect: Vec<Uuid>,
}

fn parse_secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    // Line breaks inside a token file are common; no token contains white space.
    Ok(Secret::new(
        text.chars()
            .filter(|c| !c.is_whitespace())
            .collect::<String>(),
    ))
}

/// User agent of the headless client this double stands in for.
pub fn user_agent() -> String {
    format!(
        "Linux/0 headless-client/1.5.11 ({})",
        std::env::consts::ARCH
    )
}

/// Where to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address literal, without brackets.
    pub host: String,
    /// TCP port: the explicit one, otherwise 443 whatever the scheme (§1.1).
    pub port: u16,
    /// Path with query.
    pub path_and_query: String,
}

/// Builds the WebSocket endpoint from the base URL.
///
/// # Errors
/// For a scheme other than `ws` or `http`, or a URL without a host.
pub fn endpoint(
    base: &str,
    external_id: &str,
    name: &str,
    public_key: &[u8; 32],
) -> anyhow::Result<Endpoint> {
    let (scheme, rest) = base.split_once("://").context("the URL has no scheme")?;
    if !matches!(scheme, "ws" | "http") {
        bail!("{scheme}:// is not supported, only ws:// and http://");
    }
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let (host, port) = if let Some(literal) = authority.strip_prefix('[') {
        let (host, after) = literal.split_once(']').context("unclosed bracket")?;
        (host, after.strip_prefix(':'))
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    if host.is_empty() {
        bail!("the URL has no host");
    }
    let port = match port {
        Some(port) => port.parse().context("the port is not a number")?,
        None => 443,
    };
    let external_id = if Uuid::try_parse(external_id).is_ok() {
        hex::encode(Sha256::digest(external_id.as_bytes()))
    } else {
        external_id.to_owned()
    };
    Ok(Endpoint {
        host: host.to_owned(),
        port,
        path_and_query: format!(
            "{}/client/v2/websocket?external_id={}&name={}&public_key={}",
            path.trim_end_matches('/'),
            form_encode(&external_id),
            form_encode(name),
            form_encode(&STANDARD.encode(public_key)),
        ),
    })
}

/// application/x-www-form-urlencoded, as the portal's query parser expects.
fn form_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'*' | b'-' | b'.' | b'_' => {
                out.push(char::from(byte));
            }
            b' ' => out.push('+'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn url_carries_identity_name_and_key() {
        let endpoint = endpoint("ws://portal:8081/base/", "edge 7", "Zoë", &[2; 32]).unwrap();
        assert_eq!(endpoint.host, "portal");
        assert_eq!(endpoint.port, 8081);
        assert_eq!(
            endpoint.path_and_query,
            "/base/client/v2/websocket?external_id=edge+7&name=Zo%C3%AB&public_key=AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI%3D"
        );
    }

    #[test]
    fn uuid_identities_are_sent_hashed() {
        let id = "11111111-2222-4333-8444-555555555555";
        let path = endpoint("ws://p:1", id, "n", &[0; 32])
            .unwrap()
            .path_and_query;
        assert!(!path.contains(id));
        assert!(path.contains(&hex::encode(Sha256::digest(id.as_bytes()))));
    }

    #[test]
    fn port_defaults_to_443_even_without_tls() {
        assert_eq!(endpoint("ws://p", "i", "n", &[0; 32]).unwrap().port, 443);
        let v6 = endpoint("http://[2001:db8::1]:81/?x=1", "i", "n", &[0; 32]).unwrap();
        assert_eq!((v6.host.as_str(), v6.port), ("2001:db8::1", 81));
        assert!(v6.path_and_query.starts_with("/client/v2/websocket?"));
    }

    #[test]
    fn unsupported_urls_are_refused_in_words() {
        assert!(endpoint("wss://p", "i", "n", &[0; 32]).is_err());
        assert!(endpoint("ws://:80", "i", "n", &[0; 32]).is_err());
        assert!(endpoint("portal", "i", "n", &[0; 32]).is_err());
    }

    #[test]
    fn tokens_lose_all_white_space_and_stay_out_of_debug_output() {
        let args = Args::parse_from(["lab-client", "--token", " .abc\n def "]);
        assert_eq!(args.token.expose(), ".abcdef");
        assert!(!format!("{args:?}").contains("abcdef"));
    }
}
