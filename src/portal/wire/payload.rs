//! Payloads of pushed messages. Errors are words about the shape, never quoted values: payloads
//! hold keys and passwords.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ip_network::IpNetwork;
use secrecy::SecretString;
use serde_json::Value;
use uuid::Uuid;

use crate::ids::RelayId;
use crate::portal::messages::{
    AuthorizationEntry, CidrResource, ClientPeer, CreateAuthorization, DnsResource, Filter,
    FlowLogUploads, IceCredentials, Ingress, Init, Interface, PresharedKey, RelayEntry,
    RelaysPresence, Resource,
};

type Result<T> = std::result::Result<T, String>;

/// Decodes the payload of `event`; `None` if the event is not known. The number counts list
/// entries that were left out.
pub(super) fn decode(event: &str, payload: &Value) -> Result<Option<(Ingress, usize)>> {
    let mut skipped = 0;
    let message = match event {
        "init" => Ingress::Init(init(payload, &mut skipped)?),
        // Version 1 has another name for the same thing (portal-channel spec §4.1); only one of the
        // two is ever pushed on a channel.
        "create_authorization" | "authorize_flow" => {
            Ingress::CreateAuthorization(Box::new(create_authorization(payload, &mut skipped)?))
        }
        "reject_access" => Ingress::RejectAccess {
            client_id: id(payload, "client_id")?,
            resource_id: id(payload, "resource_id")?,
        },
        "resource_updated" => Ingress::ResourceUpdated(resource(payload, &mut skipped)?),
        "relays_presence" => Ingress::RelaysPresence(relays_presence(payload, &mut skipped)?),
        "ice_candidates" => Ingress::IceCandidates {
            client_id: id(payload, "client_id")?,
            candidates: candidates(payload, &mut skipped)?,
        },
        "invalidate_ice_candidates" => Ingress::InvalidateIceCandidates {
            client_id: id(payload, "client_id")?,
            candidates: candidates(payload, &mut skipped)?,
        },
        _ => return Ok(None),
    };
    Ok(Some((message, skipped)))
}

fn init(payload: &Value, skipped: &mut usize) -> Result<Init> {
    let interface = member(payload, "interface")?;
    Ok(Init {
        interface: Interface {
            ipv4: parsed::<Ipv4Addr>(interface, "ipv4")?,
            ipv6: parsed::<Ipv6Addr>(interface, "ipv6")?,
        },
        relays: relays(list(payload, "relays")?, skipped),
        authorizations: tolerant(
            list(payload, "authorizations")?,
            authorization_entry,
            skipped,
        ),
        account_slug: optional_text(payload, "account_slug"),
        flow_logs: payload.get("flow_logs").and_then(flow_log_uploads),
    })
}

/// Whatever is wrong with it, access must not suffer.
fn flow_log_uploads(value: &Value) -> Option<FlowLogUploads> {
    Some(FlowLogUploads {
        api_url: optional_text(value, "api_url")?,
        interval_secs: value.get("upload_interval_secs")?.as_u64()?,
        batch_size: value
            .get("upload_batch_size")
            .and_then(Value::as_u64)
            .unwrap_or(0),
    })
}

fn authorization_entry(entry: &Value) -> Result<AuthorizationEntry> {
    Ok(AuthorizationEntry {
        client_id: id(entry, "client_id")?,
        resource_id: id(entry, "resource_id")?,
        expires_at: expiry(entry)?,
    })
}

fn create_authorization(payload: &Value, skipped: &mut usize) -> Result<CreateAuthorization> {
    let client = member(payload, "client")?;
    Ok(CreateAuthorization {
        reference: text(payload, "ref")?.to_owned(),
        resource: resource(member(payload, "resource")?, skipped)?,
        client: ClientPeer {
            id: id(client, "id")?,
            public_key: key(client, "public_key")?,
            preshared_key: PresharedKey(key(client, "preshared_key")?),
            ipv4: parsed::<Ipv4Addr>(client, "ipv4")?,
            ipv6: parsed::<Ipv6Addr>(client, "ipv6")?,
            version: optional_text(client, "version"),
        },
        client_ice_credentials: ice_credentials(payload, "client_ice_credentials")?,
        gateway_ice_credentials: ice_credentials(payload, "gateway_ice_credentials")?,
        expires_at: expiry(payload)?,
        use_iceless: match payload.get("use_iceless") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(iceless)) => *iceless,
            Some(_) => return Err("`use_iceless` is not a boolean".to_owned()),
        },
        flow_logs_ingest_token: optional_text(payload, "flow_logs_ingest_token")
            .map(SecretString::from),
    })
}

fn resource(value: &Value, skipped: &mut usize) -> Result<Resource> {
    match text(value, "type")? {
        "cidr" => Ok(Resource::Cidr(CidrResource {
            id: id(value, "id")?,
            address: network(text(value, "address")?)?,
            name: optional_text(value, "name").unwrap_or_default(),
            filters: filters(value, skipped)?,
        })),
        "dns" => Ok(Resource::Dns(DnsResource {
            id: id(value, "id")?,
            address: text(value, "address")?.to_owned(),
            name: optional_text(value, "name").unwrap_or_default(),
            filters: filters(value, skipped)?,
        })),
        "internet" => Ok(Resource::Internet {
            id: id(value, "id")?,
        }),
        _ => Err("unknown resource type".to_owned()),
    }
}

fn network(text: &str) -> Result<IpNetwork> {
    IpNetwork::from_str(text)
        .ok()
        .or_else(|| text.parse().ok().map(|ip: std::net::IpAddr| ip.into()))
        .ok_or_else(|| "`address` is not a network".to_owned())
}

/// A filter that cannot be read allows nothing, but keeps its place: a list of which it was the
/// only entry must not become the empty one, which allows everything. So the rest of the message
/// is of use, and what a newer portal can say beyond us stays closed. Without a list nobody can
/// tell which of the two was meant, and the resource is refused.
fn filters(resource: &Value, skipped: &mut usize) -> Result<Vec<Filter>> {
    let filters: Vec<_> = member(resource, "filters")?
        .as_array()
        .ok_or("`filters` is not a list")?
        .iter()
        .map(|value| filter(value).unwrap_or(Filter::Unreadable))
        .collect();
    *skipped += filters
        .iter()
        .filter(|filter| **filter == Filter::Unreadable)
        .count();
    Ok(filters)
}

fn filter(value: &Value) -> Result<Filter> {
    match text(value, "protocol")? {
        "tcp" => ports(value).map(|(start, end)| Filter::Tcp { start, end }),
        "udp" => ports(value).map(|(start, end)| Filter::Udp { start, end }),
        "icmp" => Ok(Filter::Icmp),
        _ => Err("unknown filter protocol".to_owned()),
    }
}

fn ports(filter: &Value) -> Result<(u16, u16)> {
    let port = |name, default| match filter.get(name) {
        None => Ok(default),
        Some(value) => value
            .as_u64()
            .and_then(|port| u16::try_from(port).ok())
            .ok_or_else(|| format!("`{name}` is not a port")),
    };
    let range = (
        port("port_range_start", 0)?,
        port("port_range_end", u16::MAX)?,
    );
    if range.0 > range.1 {
        return Err("the port range ends before it starts".to_owned());
    }
    Ok(range)
}

fn relays_presence(payload: &Value, skipped: &mut usize) -> Result<RelaysPresence> {
    let relay_id = |value: &Value| {
        value
            .as_str()
            .and_then(|s| Uuid::parse_str(s).ok())
            .map(RelayId)
            .ok_or_else(|| "not an id".to_owned())
    };
    Ok(RelaysPresence {
        disconnected_ids: tolerant(list(payload, "disconnected_ids")?, relay_id, skipped),
        connected: relays(list(payload, "connected")?, skipped),
    })
}

/// Entries of one relay carry the same id; the portal puts them next to each other, but nothing
/// depends on it (portal-channel spec §6.1).
fn relays(entries: &[Value], skipped: &mut usize) -> Vec<RelayEntry> {
    let mut relays: Vec<RelayEntry> = Vec::new();
    for entry in tolerant(entries, relay, skipped).into_iter().flatten() {
        match relays.iter_mut().find(|known| known.id == entry.id) {
            Some(known) => {
                *known = RelayEntry {
                    v4: entry.v4.or(known.v4),
                    v6: entry.v6.or(known.v6),
                    ..entry
                }
            }
            None => relays.push(entry),
        }
    }
    relays
}

/// `None` is a valid entry that is of no use to us.
fn relay(entry: &Value) -> Result<Option<RelayEntry>> {
    match text(entry, "type")? {
        "turn" => {}
        "stun" => return Ok(None),
        _ => return Err("unknown relay type".to_owned()),
    }
    let address = parsed::<SocketAddr>(entry, "addr")?;
    Ok(Some(RelayEntry {
        id: id(entry, "id")?,
        v4: Some(address).filter(SocketAddr::is_ipv4),
        v6: Some(address).filter(SocketAddr::is_ipv6),
        username: text(entry, "username")?.to_owned(),
        password: SecretString::from(text(entry, "password")?),
        expires_at: member(entry, "expires_at")?
            .as_u64()
            .ok_or("`expires_at` is not a timestamp")?,
    }))
}

fn candidates(payload: &Value, skipped: &mut usize) -> Result<Vec<String>> {
    let entries = member(payload, "candidates")?
        .as_array()
        .ok_or("`candidates` is not a list")?;
    let line = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(String::new);
    Ok(tolerant(entries, line, skipped))
}

/// Two of them and a colon make the USERNAME of a connectivity check, and the agent writes none that
/// is longer than 128 bytes. The portal's have four.
const MAX_FRAGMENT: usize = 63;

fn ice_credentials(payload: &Value, name: &str) -> Result<IceCredentials> {
    let credentials = member(payload, name)?;
    let username = text(credentials, "username")?;
    if username.len() > MAX_FRAGMENT {
        return Err(format!("the user name of `{name}` is too long"));
    }
    Ok(IceCredentials {
        username: username.to_owned(),
        password: text(credentials, "password")?.to_owned(),
    })
}

/// Absent or `null` never expires; anything that is not a timestamp must not come to mean that.
fn expiry(value: &Value) -> Result<Option<u64>> {
    match value.get("expires_at") {
        None | Some(Value::Null) => Ok(None),
        Some(seconds) => seconds
            .as_u64()
            .map(Some)
            .ok_or_else(|| "`expires_at` is not a timestamp".to_owned()),
    }
}

/// 32 bytes in standard base64 with padding (portal-channel spec §4.2).
fn key(value: &Value, name: &str) -> Result<[u8; 32]> {
    STANDARD
        .decode(text(value, name)?)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("`{name}` is not 32 bytes of base64"))
}

fn id<T: From<Uuid>>(value: &Value, name: &str) -> Result<T> {
    Uuid::parse_str(text(value, name)?)
        .map(T::from)
        .map_err(|_| format!("`{name}` is not a UUID"))
}

fn parsed<T: FromStr>(value: &Value, name: &str) -> Result<T> {
    text(value, name)?
        .parse()
        .map_err(|_| format!("`{name}` is not an address"))
}

fn member<'a>(value: &'a Value, name: &str) -> Result<&'a Value> {
    value
        .get(name)
        .ok_or_else(|| format!("`{name}` is missing"))
}

fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    member(value, name)?
        .as_str()
        .ok_or_else(|| format!("`{name}` is not a string"))
}

fn optional_text(value: &Value, name: &str) -> Option<String> {
    value.get(name).and_then(Value::as_str).map(str::to_owned)
}

/// An absent list is an empty one.
fn list<'a>(value: &'a Value, name: &str) -> Result<&'a [Value]> {
    match value.get(name) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(entries)) => Ok(entries),
        Some(_) => Err(format!("`{name}` is not a list")),
    }
}

fn tolerant<T>(
    entries: &[Value],
    decode: impl Fn(&Value) -> Result<T>,
    skipped: &mut usize,
) -> Vec<T> {
    let decoded: Vec<T> = entries.iter().filter_map(|e| decode(e).ok()).collect();
    *skipped += entries.len() - decoded.len();
    decoded
}
