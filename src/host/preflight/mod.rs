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

pub use checks::{make_tun_device, tun_device_can_be_made};
pub use fix::{Fix, Platform};

use super::nft::NftError;
use super::privileges::User;
use crate::admin::model::HostFinding;
use crate::config::Offloads;

/// The checks. Their names are part of the status document and do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// `/dev/net/tun` can be opened.
    TunDevice,
    /// `CAP_NET_ADMIN` is effective.
    NetAdmin,
    /// The process has no more rights than it needs.
    Privileges,
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
    /// The kernel takes work off the gateway.
    Offloads,
    /// The way out takes full packets of the tunnel.
    Mtu,
    /// The clock was set, and right.
    Clock,
    /// The state directory can be written.
    StateDirectory,
    /// The resolver is configured.
    ResolvConf,
}

impl Check {
    /// Every check, in the order in which they run.
    pub const ALL: [Self; 15] = [
        Self::TunDevice,
        Self::NetAdmin,
        Self::Privileges,
        Self::ForwardingIpv4,
        Self::ForwardingIpv6,
        Self::SrcValidMark,
        Self::Ipv6Enabled,
        Self::Nftables,
        Self::ForwardPolicy,
        Self::UdpBuffers,
        Self::Offloads,
        Self::Mtu,
        Self::Clock,
        Self::StateDirectory,
        Self::ResolvConf,
    ];

    /// The name, as in the status document.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TunDevice => "tun_device",
            Self::NetAdmin => "net_admin",
            Self::Privileges => "privileges",
            Self::ForwardingIpv4 => "forwarding_ipv4",
            Self::ForwardingIpv6 => "forwarding_ipv6",
            Self::SrcValidMark => "src_valid_mark",
            Self::Ipv6Enabled => "ipv6_enabled",
            Self::Nftables => "nftables",
            Self::ForwardPolicy => "forward_policy",
            Self::UdpBuffers => "udp_buffers",
            Self::Offloads => "offloads",
            Self::Mtu => "mtu",
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

/// What is known about `/dev/net/tun`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunDevice {
    /// Open it.
    Probe,
    /// It is open already, perhaps since the process could open it.
    Open,
    /// It is missing, and the gateway makes it at the start.
    ToBeMade,
}

/// What is known about what the kernel can do for the gateway.
#[derive(Debug, Clone, Copy)]
pub enum KernelOffloads<'a> {
    /// Try them, with a device that is there for a moment.
    Probe(&'a crate::device::Nodes),
    /// What is in use.
    Known(Offloads),
    /// Nothing can be said, such as before there is a device.
    Unknown,
}

/// Whose rights the process has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner<'a> {
    /// Whom it should be in place of root.
    pub wanted: Option<User>,
    /// Why it is root all the same.
    pub stays_root: Option<&'a str>,
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
    /// What is known about the device.
    pub tun_device: TunDevice,
    /// What is known about offloads.
    pub offloads: KernelOffloads<'a>,
    /// Those that are wanted.
    pub wanted_offloads: Offloads,
    /// By how many seconds the portal's clock is ahead, if it has told the time.
    pub portal_ahead: Option<f64>,
    /// Whose rights the process should have.
    pub owner: Owner<'a>,
    /// Whether the gateway raises the limits of socket buffers where it may.
    pub raises_buffers: bool,
    /// Whether the state directory is given to that user at the start.
    pub state_handed_over: bool,
    /// Whether `/dev/net/tun` and the state directory may be made where they are missing.
    pub may_make: bool,
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
            tun_device: TunDevice::Probe,
            offloads: KernelOffloads::Unknown,
            wanted_offloads: Offloads::ALL,
            portal_ahead: None,
            owner: Owner::default(),
            raises_buffers: false,
            state_handed_over: false,
            may_make: true,
        }
    }

    /// `path`, which may be absolute, below the root.
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// The findings as text, each with the lines to add on `platforms`, which are told apart if there are several.
pub fn render(findings: &[Finding], platforms: &[Platform]) -> String {
    use std::fmt::Write as _;

    let mut text = String::new();
    for finding in findings {
        let (level, check) = (finding.level.as_str(), finding.check.as_str());
        // Writing to a string does not fail.
        let _ = writeln!(text, "{level:8} {check}: {}", finding.found);
        let Some(fix) = &finding.fix else { continue };
        let several = platforms.len() > 1;
        for platform in platforms {
            let told = if several { platform.as_str() } else { "" };
            for line in fix.on(*platform).lines() {
                let _ = writeln!(text, "{told:>10} | {line}");
            }
        }
    }
    text
}

/// Runs every check, in the order of [`Check::ALL`]. Blocks for some system calls; changes nothing
/// but making `/dev/net/tun` and the state directory where they are missing and it may. To look at
/// some things, something is made and taken away again: a file, a device.
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
