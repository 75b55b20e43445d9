//! Resolution of the names of DNS resources, as the gateway's host resolves names
//! (data-path spec §6.3).

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver, system_conf};

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
    /// The name servers, in the order of `resolv.conf`; none if it cannot be read.
    pub(super) fn name_servers(&self) -> Vec<IpAddr> {
        std::fs::read(&self.resolv_conf)
            .ok()
            .and_then(|content| system_conf::parse_resolv_conf(content).ok())
            .map(|(config, _)| config.name_servers().iter().map(|s| s.ip).collect())
            .unwrap_or_default()
    }

    fn read(&self) -> Result<(ResolverConfig, ResolverOpts), NetError> {
        let content = std::fs::read(&self.resolv_conf)?;
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

/// What tells one content of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version(Option<(SystemTime, u64, u64)>);

impl Version {
    fn of(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt as _;

        let read = || {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.ino(), metadata.len()))
        };
        Self(read())
    }
}

/// What the files said when they were read.
struct Loaded {
    resolv_conf: Version,
    hosts_version: Version,
    resolver: Option<Arc<TokioResolver>>,
    hosts: Arc<Hosts>,
}

/// Resolves names; reads the host's files again when they have changed.
pub(super) struct Resolver {
    settings: Arc<Settings>,
    loaded: Mutex<Option<Loaded>>,
}

impl Resolver {
    pub(super) fn new(settings: Arc<Settings>) -> Self {
        Self {
            settings,
            loaded: Mutex::new(None),
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

    /// The resolver and the hosts file as of now; no resolver without name servers.
    fn current(&self) -> (Option<Arc<TokioResolver>>, Arc<Hosts>) {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let resolv_conf = Version::of(&self.settings.resolv_conf);
        let hosts_version = Version::of(&self.settings.hosts);
        let previous = loaded.take();
        let (same_resolver, same_hosts) = match previous {
            None => (None, None),
            Some(previous) => (
                (previous.resolv_conf == resolv_conf).then_some(previous.resolver),
                (previous.hosts_version == hosts_version).then_some(previous.hosts),
            ),
        };
        let resolver = same_resolver.unwrap_or_else(|| match self.build() {
            Ok(resolver) => Some(Arc::new(resolver)),
            Err(error) => {
                let file = self.settings.resolv_conf.display();
                tracing::warn!(%error, %file, "Names cannot be resolved");
                None
            }
        });
        let hosts = same_hosts.unwrap_or_else(|| Arc::new(read_hosts(&self.settings.hosts)));
        *loaded = Some(Loaded {
            resolv_conf,
            hosts_version,
            resolver: resolver.clone(),
            hosts: Arc::clone(&hosts),
        });
        (resolver, hosts)
    }

    fn build(&self) -> Result<TokioResolver, NetError> {
        let (config, options) = self.settings.read()?;
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
    }
}

fn read_hosts(path: &Path) -> Hosts {
    let mut hosts = Hosts::default();
    // Missing in many a container, which is as good as empty.
    if let Ok(file) = std::fs::File::open(path)
        && let Err(error) = hosts.read_hosts_conf(file)
    {
        tracing::warn!(%error, file = %path.display(), "The hosts file cannot be read to its end");
    }
    hosts
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
