//! What the host lacks, and the exact line that adds it.
//!
//! A gateway that cannot work should say why in one read, not die with an error number. Every
//! check has a name that stays the same, a level, a finding in words and, where something is
//! wrong, the line to add for Docker Compose, for Kubernetes and for a plain host.

mod checks;
mod fix;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

pub use fix::{Fix, Platform};

use super::nft::NftError;
use crate::admin::model::HostFinding;

/// The checks. Their names are part of the status document and do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// `/dev/net/tun` can be opened.
    TunDevice,
    /// `CAP_NET_ADMIN` is effective.
    NetAdmin,
    /// The kernel forwards IPv4.
    ForwardingIpv4,
    /// The kernel forwards IPv6.
    ForwardingIpv6,
    /// Reverse path filtering knows the routing mark.
    SrcValidMark,
    /// The kernel has IPv6 switched on.
    Ipv6Enabled,
    /// Masquerading rules can be made.
    Nftables,
    /// No other firewall drops what is forwarded.
    ForwardPolicy,
    /// Sockets may have large buffers.
    UdpBuffers,
    /// The clock was set.
    Clock,
    /// The state directory can be written.
    StateDirectory,
    /// The resolver is configured.
    ResolvConf,
}

impl Check {
    /// Every check, in the order in which they run.
    pub const ALL: [Self; 12] = [
        Self::TunDevice,
        Self::NetAdmin,
        Self::ForwardingIpv4,
        Self::ForwardingIpv6,
        Self::SrcValidMark,
        Self::Ipv6Enabled,
        Self::Nftables,
        Self::ForwardPolicy,
        Self::UdpBuffers,
        Self::Clock,
        Self::StateDirectory,
        Self::ResolvConf,
    ];

    /// The name, as in the status document.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TunDevice => "tun_device",
            Self::NetAdmin => "net_admin",
            Self::ForwardingIpv4 => "forwarding_ipv4",
            Self::ForwardingIpv6 => "forwarding_ipv6",
            Self::SrcValidMark => "src_valid_mark",
            Self::Ipv6Enabled => "ipv6_enabled",
            Self::Nftables => "nftables",
            Self::ForwardPolicy => "forward_policy",
            Self::UdpBuffers => "udp_buffers",
            Self::Clock => "clock",
            Self::StateDirectory => "state_directory",
            Self::ResolvConf => "resolv_conf",
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Nothing to do.
    Ok,
    /// The gateway works, but not fully.
    Warning,
    /// The gateway cannot do its work.
    Error,
}

impl Level {
    /// The name, as in the status document.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: Check,
    /// How bad it is.
    pub level: Level,
    /// What was found and why it matters, in words.
    pub found: String,
    /// What to add; `None` if there is nothing to do.
    pub fix: Option<Fix>,
}

impl Finding {
    /// The finding with the line to add on `platform`.
    pub fn message(&self, platform: Platform) -> String {
        match &self.fix {
            Some(fix) => format!(
                "{}: {}. {}:\n{}",
                self.check,
                self.found,
                platform.instruction(),
                fix.on(platform)
            ),
            None => format!("{}: {}", self.check, self.found),
        }
    }

    /// The finding as the status document has it, with the line to add on `platform`.
    pub fn to_status(&self, platform: Platform) -> HostFinding {
        HostFinding {
            name: self.check.as_str().to_owned(),
            level: self.level.as_str().to_owned(),
            found: self.found.clone(),
            fix: self.fix.as_ref().map(|fix| fix.on(platform).to_owned()),
        }
    }
}

impl From<&Finding> for HostFinding {
    /// With the compose line.
    fn from(finding: &Finding) -> Self {
        finding.to_status(Platform::Compose)
    }
}

/// What is known about nf_tables.
#[derive(Debug)]
pub enum Nftables<'a> {
    /// Ask the kernel whether it would take the rules.
    Probe,
    /// The result of having installed them.
    Known(&'a Result<(), NftError>),
    /// Masquerading is switched off; nothing to check.
    Unused,
}

/// What is known about the forwarding policy of other firewalls.
#[derive(Debug)]
pub enum ForwardPolicy {
    /// Ask the kernel.
    Probe,
    /// What [`forward_drops`](super::nft::forward_drops) said.
    Known(Vec<String>),
}

/// Where the checks look.
#[derive(Debug)]
pub struct Environment<'a> {
    /// Root of the file system; `/` outside tests.
    pub root: PathBuf,
    /// The state directory, as an absolute path below `root`.
    pub state_directory: PathBuf,
    /// The time of day.
    pub now: SystemTime,
    /// What is known about nf_tables.
    pub nftables: Nftables<'a>,
    /// What is known about other firewalls.
    pub forward_policy: ForwardPolicy,
    /// Name of the tunnel interface, for the lines to add.
    pub link: &'a str,
    /// Whether a missing `/dev/net/tun` may be made.
    pub make_tun_device: bool,
}

impl<'a> Environment<'a> {
    /// The machine that the process runs on, asking the kernel for whatever can be asked.
    pub fn of_this_host(state_directory: impl Into<PathBuf>, link: &'a str) -> Self {
        Self {
            root: PathBuf::from("/"),
            state_directory: state_directory.into(),
            now: SystemTime::now(),
            nftables: Nftables::Probe,
            forward_policy: ForwardPolicy::Probe,
            link,
            make_tun_device: true,
        }
    }

    /// `path`, which may be absolute, below the root.
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// Runs every check, in the order of [`Check::ALL`]. Blocks for some system calls; changes nothing
/// but making `/dev/net/tun` and the state directory where they are missing and it may.
pub fn run(environment: &Environment<'_>) -> Vec<Finding> {
    run_those(environment, |_| true)
}

/// As [`run`], some of them.
pub fn run_those(environment: &Environment<'_>, wanted: impl Fn(Check) -> bool) -> Vec<Finding> {
    Check::ALL
        .into_iter()
        .filter(|check| wanted(*check))
        .map(|check| checks::run(check, environment))
        .collect()
}
