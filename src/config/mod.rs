//! Settings: flags, environment and secret files become one typed [`Config`]
//! (portal-channel spec §5.1–5.3). All mistakes are reported at once.

pub mod cli;
mod env;
mod exit;
mod identity;
mod load;
mod mistake;
mod report;
mod token;
mod values;

#[cfg(test)]
mod tests;

use std::{fmt, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use secrecy::SecretString;
use url::Url;

use self::identity::Claim;
pub use self::{
    cli::{Cli, Command, FixFor, Probe, Settings},
    env::{Env, FixedEnv, NotUnicode, ProcessEnv},
    exit::ExitStatus,
    identity::{Identity, IdentitySource},
    load::{Examination, Host, SettingShown, admin_listeners, admin_token, examine, user},
    mistake::{Mistake, Notice},
    report::{print_examination, print_mistakes},
    token::{TokenError, TokenSource},
};
use crate::access::OpenPorts;
use crate::admin::{AdminToken, Place};
use crate::host::constants;
use crate::host::privileges::User;
use crate::telemetry;

/// Address of the hosted portal.
pub const DEFAULT_API_URL: &str = "wss://api.firezone.dev";
/// Where the admin server listens unless told otherwise.
pub const DEFAULT_HEALTH_CHECK_ADDR: &str = "0.0.0.0:8080";
/// Where page, status, metrics and control are unless told otherwise, if the probes are open to
/// others: for this host only.
pub const DEFAULT_ADMIN_ADDR: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8081);
/// Where the identity is kept unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/firezone";
/// Name of the tunnel interface unless told otherwise.
pub const DEFAULT_TUN_NAME: &str = "tun-firezone";
/// Preferred local UDP port (data-path spec, sockets).
pub const DEFAULT_UDP_PORT: u16 = constants::UDP_PORT;
/// Send buffer to ask for, in bytes (data-path spec, sockets).
pub const DEFAULT_UDP_SEND_BUFFER: usize = constants::UDP_SEND_BUFFER as usize;
/// Receive buffer to ask for, in bytes (data-path spec, sockets).
pub const DEFAULT_UDP_RECV_BUFFER: usize = constants::UDP_RECEIVE_BUFFER as usize;

/// Everything that is decided before the gateway starts.
#[derive(Debug, Clone)]
pub struct Config {
    /// Base URL of the portal, as given but without query, fragment and user: `ws`, `wss`, `http`
    /// or `https`.
    pub api_url: Url,
    /// The token, without any white space.
    pub token: SecretString,
    /// Where the token came from; lets it be read again.
    pub token_source: TokenSource,
    /// Lasting identity.
    pub identity: Identity,
    /// Display name.
    pub name: String,
    /// Budget of one portal outage; `None` is no limit.
    pub max_partition_time: Option<Duration>,
    /// End the process with [`ExitStatus::AuthFailure`] when the token is refused.
    pub exit_on_auth_failure: bool,
    /// Where the admin server listens.
    pub listeners: Listeners,
    /// What the admin server asks for; `None` if whoever reaches it may look.
    pub admin_token: Option<AdminToken>,
    /// Directory for what outlives the process.
    pub state_dir: PathBuf,
    /// Name of the TUN interface.
    pub tun_name: String,
    /// Preferred UDP port; 0 lets the kernel choose.
    pub udp_port: u16,
    /// Ports of the gateway itself that are open to clients.
    pub gateway_ports: OpenPorts,
    /// Threads that move packets; `None` for one per core.
    pub workers: Option<usize>,
    /// What to leave to the kernel where it can.
    pub offloads: Offloads,
    /// Try to raise `net.core.rmem_max` and `wmem_max`.
    pub raise_buffer_limits: bool,
    /// Send buffer to ask for, in bytes.
    pub udp_send_buffer: usize,
    /// Receive buffer to ask for, in bytes.
    pub udp_recv_buffer: usize,
    /// Whom to become when started as root; `None` stays as it was started.
    pub user: Option<User>,
    /// Why the process is root although `user` is set; `None` while nobody has tried.
    pub stays_root: Option<String>,
    /// How long to carry traffic after being asked to stop.
    pub linger: Duration,
    /// End the process with [`ExitStatus::HostLacks`] when the host lacks something.
    pub strict: bool,
    /// Write every flow's beginning and end to the log, whatever the portal says.
    pub flow_logs: bool,
    /// Check permissions and host settings at start.
    pub check_host: bool,
    /// Logging and tracing.
    pub telemetry: telemetry::Options,
    /// Things to tell the operator once logging works.
    pub notices: Vec<Notice>,
    /// Keeps other gateways out of the state directory for as long as this lives.
    claim: Option<Arc<Claim>>,
}

/// What to leave to the kernel where it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// TCP super-packets from and to the device.
    pub tun_tso: bool,
    /// UDP super-packets from and to the device.
    pub tun_uso: bool,
    /// Trains of datagrams sent at once (`UDP_SEGMENT`).
    pub udp_gso: bool,
    /// Trains of datagrams received at once (`UDP_GRO`).
    pub udp_gro: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Self = Self {
        tun_tso: true,
        tun_uso: true,
        udp_gso: true,
        udp_gro: true,
    };
    /// Nothing.
    pub const NONE: Self = Self {
        tun_tso: false,
        tun_uso: false,
        udp_gso: false,
        udp_gro: false,
    };

    fn each(self) -> [(&'static str, bool); 4] {
        [
            ("tun-tso", self.tun_tso),
            ("tun-uso", self.tun_uso),
            ("udp-gso", self.udp_gso),
            ("udp-gro", self.udp_gro),
        ]
    }

    /// The names of those that are on.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.each()
            .into_iter()
            .filter_map(|(name, is_on)| is_on.then_some(name))
    }
}

impl std::fmt::Display for Offloads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::ALL => f.write_str("all"),
            Self::NONE => f.write_str("none"),
            some => f.write_str(&some.names().collect::<Vec<_>>().join(",")),
        }
    }
}

/// Where the admin server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listeners {
    /// For the probes; `None` for nowhere.
    pub probes: Option<Place>,
    /// For everything; `None` for nowhere.
    pub admin: Option<Place>,
    /// Whether somebody chose the latter.
    pub chosen: bool,
}

impl Listeners {
    /// Whether one listener has it all.
    pub fn are_one(&self) -> bool {
        self.probes == self.admin
    }

    /// Whom to ask for a probe.
    pub fn for_probes(&self) -> Option<&Place> {
        self.probes.as_ref().or(self.admin.as_ref())
    }
}

impl Config {
    /// Reads and checks all settings. Nothing on disk changes; see
    /// [`keep_identity`](Self::keep_identity).
    ///
    /// # Errors
    /// Every mistake that was found, not only the first.
    pub fn load(settings: &Settings, env: &dyn Env, host: &Host) -> Result<Self, Vec<Mistake>> {
        let examination = examine(settings, env, host);
        examination.config.ok_or(examination.mistakes)
    }

    /// Takes a part of the state directory that no running gateway has, and the identity in it. One
    /// that was made up is stored, so that the next start finds it. If that fails, the gateway still
    /// works until then, so it is a notice.
    pub fn keep_identity(&mut self, env: &dyn Env) {
        // What keeps the lock from being taken keeps the identity from being stored, and is told
        // there; where none is to be stored, the directory may well be read-only.
        if let Ok(claim) = Claim::take(&self.state_dir) {
            self.settle(claim, env);
        }
        if self.identity.source != IdentitySource::Random {
            return;
        }
        let path = identity::file(&self.state_dir);
        let message = match identity::store(&self.identity.id, &self.state_dir) {
            Ok(()) => {
                self.identity.source = IdentitySource::File(path.clone());
                format!(
                    "a new identity was made up and stored in {}",
                    path.display()
                )
            }
            Err(error) => format!(
                "a new identity was made up, but cannot be stored in {} ({error}): the next start \
                 will be a different gateway to the portal. Set FIREZONE_ID, or mount a writable \
                 volume at {}",
                path.display(),
                self.state_dir.display(),
            ),
        };
        self.tell("FIREZONE_ID", message);
    }

    fn settle(&mut self, claim: Claim, env: &dyn Env) {
        if claim.number > 1 {
            self.tell(
                "FIREZONE_STATE_DIR",
                format!(
                    "another gateway uses {}, so this one keeps what is its own in {}",
                    self.state_dir.display(),
                    claim.directory.display()
                ),
            );
            self.state_dir.clone_from(&claim.directory);
        }
        // Also in the first place: another one may have come and gone since the settings were read.
        let unsettled = claim.number > 1 || self.identity.source == IdentitySource::Random;
        if unsettled && self.identity.source != IdentitySource::Setting {
            match identity::of_claim(&claim.directory) {
                Ok(identity) => self.identity = identity,
                Err(error) => {
                    self.tell("FIREZONE_ID", format!("{error}; it is replaced"));
                    self.identity = Identity::made_up();
                }
            }
            self.telemetry.resource = telemetry::resource_attributes(env, &self.identity.id);
        }
        self.claim = Some(Arc::new(claim));
    }

    /// Remembers something to tell the operator once logging works.
    pub fn tell(&mut self, setting: &str, message: String) {
        self.notices.push(Notice {
            setting: setting.to_owned(),
            message,
        });
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Human => "human",
            Self::Json => "json",
        })
    }
}
