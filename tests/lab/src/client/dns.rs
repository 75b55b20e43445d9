//! DNS resources: proxy addresses for names and the in-tunnel set-up of their translation
//! (data-path spec §5.1, §6.1, §6.2). Names are resolved through the control API instead of a DNS
//! server.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Proxy addresses of each family a name gets.
const PER_FAMILY: u32 = 4;
/// Re-announcing interval while packets keep coming (§6.2).
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(2);
/// Packets kept per name until the gateway confirms (§6.2).
const MAX_BUFFERED: usize = 32;

/// Body of the "assigned IPs" event.
#[derive(Debug, Serialize)]
struct AssignedIps<'a> {
    resource: Uuid,
    domain: &'a str,
    proxy_ips: &'a [IpAddr],
}

/// Body of the "domain status" event.
#[derive(Debug, Deserialize)]
struct DomainStatus {
    resource: Uuid,
    domain: String,
    status: String,
}

#[derive(Debug)]
struct Name {
    resource: Uuid,
    proxy_ips: Vec<IpAddr>,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Translation {
    #[default]
    Unconfirmed,
    Active,
    /// The gateway refused; packets are sent unbuffered.
    Inactive,
}

#[derive(Debug, Default)]
struct Announcement {
    state: Translation,
    last_sent: Option<Instant>,
    buffered: VecDeque<Vec<u8>>,
}

/// What to do with a packet for a proxy address.
#[derive(Debug, PartialEq, Eq)]
pub enum Gate {
    /// Send it.
    Pass,
    /// It was kept; announce with this body first, if given.
    Held(Option<Vec<u8>>),
}

/// All names with proxy addresses.
#[derive(Debug, Default)]
pub struct Names {
    names: BTreeMap<String, Name>,
    by_ip: HashMap<IpAddr, String>,
    announcements: HashMap<(Uuid, String), Announcement>,
    next: u32,
}

impl Names {
    /// Proxy addresses for `domain`, invented on first use.
    pub fn assign(&mut self, domain: &str, resource: Uuid) -> Vec<IpAddr> {
        if let Some(name) = self.names.get_mut(domain) {
            name.resource = resource;
            return name.proxy_ips.clone();
        }
        let v4 = u32::from(Ipv4Addr::new(100, 96, 0, 0));
        let v6 = u128::from(Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, 0));
        let mut proxy_ips: Vec<IpAddr> = Vec::new();
        for i in 1..=PER_FAMILY {
            proxy_ips.push(Ipv4Addr::from(v4 + self.next + i).into());
        }
        for i in 1..=PER_FAMILY {
            proxy_ips.push(Ipv6Addr::from(v6 + u128::from(self.next + i)).into());
        }
        self.next += PER_FAMILY;
        for ip in &proxy_ips {
            self.by_ip.insert(*ip, domain.to_owned());
        }
        self.names.insert(
            domain.to_owned(),
            Name {
                resource,
                proxy_ips: proxy_ips.clone(),
            },
        );
        proxy_ips
    }

    /// Resource behind a proxy address.
    pub fn resource_of(&self, ip: IpAddr) -> Option<Uuid> {
        Some(self.names.get(self.by_ip.get(&ip)?)?.resource)
    }

    fn body(&self, domain: &str) -> Option<Vec<u8>> {
        let name = self.names.get(domain)?;
        serde_json::to_vec(&AssignedIps {
            resource: name.resource,
            domain,
            proxy_ips: &name.proxy_ips,
        })
        .ok()
    }

    /// Every DNS query for a name announces it again, confirmed or not.
    pub fn announce(&mut self, now: Instant, gateway: Uuid, domain: &str) -> Option<Vec<u8>> {
        let body = self.body(domain)?;
        self.announcements
            .entry((gateway, domain.to_owned()))
            .or_default()
            .last_sent = Some(now);
        Some(body)
    }

    /// Decides on a packet to `ip` through `gateway`.
    pub fn gate(&mut self, now: Instant, gateway: Uuid, ip: IpAddr, packet: &[u8]) -> Gate {
        let Some(domain) = self.by_ip.get(&ip).cloned() else {
            return Gate::Pass;
        };
        let body = self.body(&domain);
        let entry = self.announcements.entry((gateway, domain)).or_default();
        if entry.state != Translation::Unconfirmed {
            return Gate::Pass;
        }
        if entry.buffered.len() >= MAX_BUFFERED {
            entry.buffered.pop_front();
        }
        entry.buffered.push_back(packet.to_vec());
        let due = entry
            .last_sent
            .is_none_or(|at| now.saturating_duration_since(at) >= ANNOUNCE_INTERVAL);
        if due {
            entry.last_sent = Some(now);
        }
        Gate::Held(body.filter(|_| due))
    }

    /// A "domain status" event; returns the packets that may go now.
    pub fn handle_status(&mut self, gateway: Uuid, body: &[u8]) -> Vec<Vec<u8>> {
        let status: DomainStatus = match serde_json::from_slice(body) {
            Ok(status) => status,
            Err(error) => {
                tracing::warn!(%error, "malformed domain status");
                return Vec::new();
            }
        };
        if self
            .names
            .get(&status.domain)
            .is_none_or(|name| name.resource != status.resource)
        {
            return Vec::new();
        }
        let Some(entry) = self
            .announcements
            .get_mut(&(gateway, status.domain.clone()))
        else {
            return Vec::new();
        };
        tracing::info!(
            domain = status.domain,
            status = status.status,
            "domain status"
        );
        entry.state = if status.status == "Active" {
            Translation::Active
        } else {
            Translation::Inactive
        };
        entry.buffered.drain(..).collect()
    }

    /// A goodbye or a failed connection makes all confirmations of the gateway void.
    pub fn forget_gateway(&mut self, gateway: Uuid) {
        self.announcements.retain(|(id, _), _| *id != gateway);
    }

    /// Confirmation of `domain` by `gateway`.
    pub fn is_active(&self, gateway: Uuid, domain: &str) -> bool {
        self.announcements
            .get(&(gateway, domain.to_owned()))
            .is_some_and(|a| a.state == Translation::Active)
    }
}

/// Whether `domain` is covered by `pattern` (§6.2): `*` within one label, `**` any number of
/// labels, `?` one character, a leading `*.` also covers the bare domain.
pub fn matches(pattern: &str, domain: &str) -> bool {
    let pattern = pattern.to_ascii_lowercase();
    let domain = domain.trim_end_matches('.').to_ascii_lowercase();
    if pattern.strip_prefix("*.") == Some(&domain) || pattern.strip_prefix("**.") == Some(&domain) {
        return true;
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let domain: Vec<&str> = domain.split('.').collect();
    labels_match(&pattern, &domain)
}

fn labels_match(pattern: &[&str], domain: &[&str]) -> bool {
    match pattern.split_first() {
        None => domain.is_empty(),
        Some((&"**", rest)) => (0..=domain.len()).any(|skip| labels_match(rest, &domain[skip..])),
        Some((label, rest)) => domain.split_first().is_some_and(|(first, others)| {
            label_matches(label.as_bytes(), first.as_bytes()) && labels_match(rest, others)
        }),
    }
}

fn label_matches(pattern: &[u8], label: &[u8]) -> bool {
    match pattern.split_first() {
        None => label.is_empty(),
        Some((b'*', rest)) => (0..=label.len()).any(|skip| label_matches(rest, &label[skip..])),
        Some((b'?', rest)) => !label.is_empty() && label_matches(rest, &label[1..]),
        Some((byte, rest)) => label.first() == Some(byte) && label_matches(rest, &label[1..]),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn patterns_follow_the_documented_rules() {
        assert!(matches("*.corp.example", "corp.example"));
        assert!(matches("*.corp.example", "a.corp.example"));
        assert!(!matches("*.corp.example", "a.b.corp.example"));
        assert!(matches("**.corp.example", "a.b.CORP.example."));
        assert!(matches("ap?.corp.example", "api.corp.example"));
        assert!(!matches("ap?.corp.example", "ap.corp.example"));
        assert!(matches("db-*.corp.example", "db-7.corp.example"));
        assert!(!matches("corp.example", "xcorp.example"));
    }

    #[test]
    fn packets_wait_for_active_and_announcements_are_throttled() {
        let now = Instant::now();
        let gateway = Uuid::from_u128(1);
        let resource = Uuid::from_u128(2);
        let mut names = Names::default();
        let ips = names.assign("a.corp.example", resource);
        assert_eq!(ips.len(), 8);
        assert_eq!(ips[0], "100.96.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(names.resource_of(ips[7]), Some(resource));
        assert_eq!(names.assign("a.corp.example", resource), ips);
        assert_ne!(names.assign("b.corp.example", resource)[0], ips[0]);

        let Gate::Held(Some(body)) = names.gate(now, gateway, ips[0], b"1") else {
            panic!("not announced");
        };
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["domain"], "a.corp.example");
        assert_eq!(body["proxy_ips"].as_array().unwrap().len(), 8);
        assert_eq!(names.gate(now, gateway, ips[0], b"2"), Gate::Held(None));
        let later = now + Duration::from_secs(2);
        assert!(matches!(
            names.gate(later, gateway, ips[0], b"3"),
            Gate::Held(Some(_))
        ));

        let status = serde_json::json!({"resource": resource, "domain": "a.corp.example", "status": "Active"});
        let released = names.handle_status(gateway, status.to_string().as_bytes());
        assert_eq!(released, [b"1".to_vec(), b"2".to_vec(), b"3".to_vec()]);
        assert_eq!(names.gate(later, gateway, ips[0], b"4"), Gate::Pass);
        names.forget_gateway(gateway);
        assert!(matches!(
            names.gate(later, gateway, ips[0], b"5"),
            Gate::Held(_)
        ));
    }
}
