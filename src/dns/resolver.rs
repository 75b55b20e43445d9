//! Resolution of the names of DNS resources, as the gateway's host resolves names
//! (data-path spec §6.3).

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver, system_conf};

use super::watched::Watched;
use crate::access::Resolved;

/// Longest that one name may take (data-path spec §9).
const LIMIT: Duration = Duration::from_secs(10);
/// Answers kept for as long as they say (data-path spec §9).
const CACHE: u64 = 512;
/// An answer is not kept longer than this, whatever it says: clients ask again when an
/// application does, and an address that changed must come through.
const MAX_TTL: Duration = Duration::from_secs(300);
/// The same for "there is no such name": it is often asked for just before it is made.
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(10);
/// How long the resolver waits for one server before it asks the next.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Where the host says how it resolves names.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Normally `/etc/resolv.conf`.
    pub resolv_conf: PathBuf,
    /// Normally `/etc/hosts`.
    pub hosts: PathBuf,
    /// Port of the name servers; normally 53.
    pub port: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            resolv_conf: "/etc/resolv.conf".into(),
            hosts: "/etc/hosts".into(),
            port: 53,
        }
    }
}

impl Settings {
    fn read(&self, resolv_conf: &Path) -> Result<(ResolverConfig, ResolverOpts), NetError> {
        let content = std::fs::read(resolv_conf)?;
        let (config, mut options) = system_conf::parse_resolv_conf(content)?;
        let mut servers = config.name_servers().to_vec();
        for connection in servers.iter_mut().flat_map(|s| &mut s.connections) {
            connection.port = self.port;
        }
        options.cache_size = CACHE;
        options.positive_max_ttl = Some(MAX_TTL);
        options.negative_max_ttl = Some(MAX_NEGATIVE_TTL);
        options.timeout = options.timeout.min(TIMEOUT);
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        // Looked at here: a name found there is not asked for anywhere else.
        options.use_hosts_file = ResolveHosts::Never;
        Ok((ResolverConfig::from_parts(None, vec![], servers), options))
    }
}

/// The name servers, in the order of `resolv.conf`; a list without any is an error.
pub(super) fn name_servers(resolv_conf: &Path) -> Result<Vec<IpAddr>, NetError> {
    let content = std::fs::read(resolv_conf)?;
    let (config, _) = system_conf::parse_resolv_conf(content)?;
    Ok(config.name_servers().iter().map(|s| s.ip).collect())
}

/// What the host's files say.
struct Loaded {
    resolver: Watched<Arc<TokioResolver>>,
    hosts: Watched<Arc<Hosts>>,
}

/// Resolves names; reads the host's files again when they have changed.
pub(super) struct Resolver {
    settings: Arc<Settings>,
    loaded: Mutex<Loaded>,
}

impl Resolver {
    pub(super) fn new(settings: Arc<Settings>) -> Self {
        let loaded = Loaded {
            resolver: Watched::new(settings.resolv_conf.clone()),
            hosts: Watched::new(settings.hosts.clone()),
        };
        Self {
            settings,
            loaded: Mutex::new(loaded),
        }
    }

    /// The addresses of a name, by the hosts file, else by DNS. Both families are asked for at
    /// once, and one may fail without the other.
    pub(super) async fn resolve(&self, name: &str) -> Resolved {
        // Names of resources are complete: the search list is for people.
        let Ok(mut name) = Name::from_utf8(name) else {
            // No such name can exist.
            return Resolved {
                ipv4: Some(vec![]),
                ipv6: Some(vec![]),
            };
        };
        name.set_fqdn(true);
        let (resolver, hosts) = self.current();
        if let Some(found) = in_hosts(&hosts, &name) {
            return found;
        }
        let Some(resolver) = resolver else {
            return Resolved::default();
        };
        let lookup = |kind| {
            let (resolver, name) = (Arc::clone(&resolver), name.clone());
            async move {
                match tokio::time::timeout(LIMIT, resolver.lookup(name.clone(), kind)).await {
                    Ok(Ok(lookup)) => Some(
                        lookup
                            .answers()
                            .iter()
                            .filter_map(|record| address(&record.data))
                            .collect::<Vec<IpAddr>>(),
                    ),
                    Ok(Err(error)) if error.is_no_records_found() => Some(Vec::new()),
                    Ok(Err(error)) => {
                        tracing::debug!(%name, %kind, %error, "name not resolved");
                        None
                    }
                    Err(_) => {
                        tracing::debug!(%name, %kind, "name not resolved in time");
                        None
                    }
                }
            }
        };
        let (v4, v6) = tokio::join!(lookup(RecordType::A), lookup(RecordType::AAAA));
        Resolved {
            ipv4: v4.map(|all| all.into_iter().filter_map(v4_of).collect()),
            ipv6: v6.map(|all| all.into_iter().filter_map(v6_of).collect()),
        }
    }

    /// The resolver and the hosts file as of now; no resolver as long as the host has never said
    /// how it resolves names.
    fn current(&self) -> (Option<Arc<TokioResolver>>, Arc<Hosts>) {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let resolver = loaded.resolver.current(|path| self.build(path)).cloned();
        let hosts = loaded.hosts.current(read_hosts).cloned();
        (resolver, hosts.unwrap_or_default())
    }

    fn build(&self, resolv_conf: &Path) -> Result<Arc<TokioResolver>, NetError> {
        let (config, options) = self.settings.read(resolv_conf)?;
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .map(Arc::new)
    }
}

fn read_hosts(path: &Path) -> io::Result<Arc<Hosts>> {
    let content = match std::fs::read(path) {
        Ok(content) => content,
        // In many a container, which is as good as empty.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut hosts = Hosts::default();
    // A letter of another encoding, in a comment say, is no reason to do without the rest.
    hosts.read_hosts_conf(String::from_utf8_lossy(&content).as_bytes())?;
    Ok(Arc::new(hosts))
}

/// What the hosts file says of a name, if anything: a family it does not name has no addresses.
fn in_hosts(hosts: &Hosts, name: &Name) -> Option<Resolved> {
    let look = |kind| hosts.lookup_static_host(&Query::query(name.to_lowercase(), kind));
    let (v4, v6) = (look(RecordType::A), look(RecordType::AAAA));
    if v4.is_none() && v6.is_none() {
        return None;
    }
    let addresses = |lookup: Option<hickory_resolver::lookup::Lookup>| {
        lookup
            .iter()
            .flat_map(|l| l.answers())
            .filter_map(|record| address(&record.data))
            .collect::<Vec<IpAddr>>()
    };
    Some(Resolved {
        ipv4: Some(addresses(v4).into_iter().filter_map(v4_of).collect()),
        ipv6: Some(addresses(v6).into_iter().filter_map(v6_of).collect()),
    })
}

fn address(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(a) => Some(IpAddr::V6(a.0)),
        _ => None,
    }
}

fn v4_of(address: IpAddr) -> Option<std::net::Ipv4Addr> {
    match address {
        IpAddr::V4(a) => Some(a),
        IpAddr::V6(_) => None,
    }
}

fn v6_of(address: IpAddr) -> Option<std::net::Ipv6Addr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(a) => Some(a),
    }
}

#[cfg(test)]
#[path = "resolver_tests.rs"]
mod tests;
