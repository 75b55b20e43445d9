//! The command line. Every value is taken as text here and judged in one place, [`super::load`],
//! together with the environment, so that all mistakes come out at once.
//!
//! The environment is not read by `clap`: its help would have to be kept from showing the token,
//! and a wrong variable would end the program before the next one is looked at. `[env: …]` in the
//! help texts is checked against the loader by a test.

use std::{convert::Infallible, fmt, str::FromStr};

use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};

const PORTAL: &str = "Portal";
const IDENTITY: &str = "Identity";
const ADMIN: &str = "Admin server";
const LOGGING: &str = "Logging and tracing";
const DEVICE: &str = "Device and sockets";
const BEHAVIOUR: &str = "Behaviour";

const AFTER_HELP: &str = "\
Settings are taken from the command line, then from the environment; an empty variable counts as \
unset. `check-config` shows what is in force and where it came from.

Export follows the OpenTelemetry environment variables. Spans, metrics and log lines are exported \
(OTLP) only if OTEL_EXPORTER_OTLP_ENDPOINT is set, or for one of them \
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_METRICS_ENDPOINT or \
OTEL_EXPORTER_OTLP_LOGS_ENDPOINT. OTEL_EXPORTER_OTLP_PROTOCOL is http/protobuf (the default) or grpc. \
OTEL_SDK_DISABLED=true, OTEL_TRACES_EXPORTER=none, OTEL_METRICS_EXPORTER=none and \
OTEL_LOGS_EXPORTER=none turn it off. docs/telemetry.md has all variables.

Exit status: 0 ended on request or check passed; 1 failed while running or check not passed; \
2 wrong usage or configuration; 77 token refused (with --exit-on-auth-failure); \
78 the host lacks something (with --strict, or found by check-config).";

/// Zero-trust WireGuard gateway that interoperates with Firezone.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "firezone-gateway",
    version,
    about,
    after_help = AFTER_HELP,
    disable_help_flag = true
)]
pub struct Cli {
    /// Print help.
    // The short form would leave out the variables, which is what most look for.
    #[arg(short, long, action = ArgAction::HelpLong, global = true)]
    pub help: Option<bool>,
    /// What to do instead of running the gateway.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings given on the command line.
    #[command(flatten)]
    pub settings: Settings,
}

/// Sub-commands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Run the gateway; the same as no sub-command at all.
    Run {
        /// Settings after the sub-command's name.
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Ask a running gateway whether it is healthy; exit status 0 or 1.
    ///
    /// Without --check it asks for `live` and `started`, which never depend on the portal or on a
    /// relay: a container must not be restarted while it carries traffic.
    Healthcheck(HealthcheckArgs),
    /// Show what a running gateway is doing: portal, relays, clients, device. One that does not listen yet
    /// is waited for, for two seconds.
    Status(StatusArgs),
    /// Show which log lines a running gateway writes, or have it write others from now on.
    ///
    /// Until it ends, or until SIGHUP puts the settings into force again. The gateway takes it from
    /// whoever knows the admin token; where none is set, from its own host (or container) only.
    LogFilter(LogFilterArgs),
    /// Write what is needed to find out what is wrong into one archive: status, metrics, probes, the
    /// last log lines, preflight, interfaces, routes, rules, counters, settings. No secrets.
    ///
    /// Also where no gateway runs: the archive tells what is missing and why.
    Diagnose(DiagnoseArgs),
    /// Show the settings in force and every mistake in them, and look at the host as the gateway would,
    /// without starting or changing anything; also beside a gateway that runs. Exit status 0, 2 for
    /// wrong settings, 78 if the host lacks something. --no-check leaves the host out.
    CheckConfig {
        /// Show the lines to add for another way of running the gateway than this one, or for all of them.
        #[arg(long, value_name = "PLATFORM")]
        fix_for: Option<FixFor>,
        /// Settings after the sub-command's name.
        #[command(flatten)]
        settings: Box<Settings>,
    },
}

/// The names of the sub-commands.
pub(super) fn command_names() -> Vec<String> {
    Cli::command()
        .get_subcommands()
        .map(|command| command.get_name().to_owned())
        .collect()
}

/// The sub-command that a mistyped name probably means: one that begins with it, else the nearest
/// one, unless more than a third of it would have to change.
pub(super) fn meant(typed: &str) -> Option<String> {
    let names = command_names();
    names
        .iter()
        .find(|name| name.starts_with(typed))
        .or_else(|| {
            names
                .iter()
                .map(|name| (distance(typed, name), name))
                .filter(|(distance, name)| *distance <= name.len() / 3)
                .min()
                .map(|(_, name)| name)
        })
        .cloned()
}

/// How many bytes have to be put in, taken out or changed to make one of the other.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (n, a) in one.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], n + 1);
        for (m, b) in other.bytes().enumerate() {
            let changed = diagonal + usize::from(a != b);
            diagonal = row[m + 1];
            row[m + 1] = changed.min(diagonal + 1).min(row[m] + 1);
        }
    }
    row[other.len()]
}

/// Arguments of `healthcheck`.
#[derive(Debug, Clone, Args)]
pub struct HealthcheckArgs {
    /// Which question to ask; may be given more than once. Default: live and started.
    #[arg(long, value_name = "CHECK", value_enum)]
    pub check: Vec<Probe>,
    /// Address of the admin server: host and port, or unix: and a path. Default: what
    /// HEALTH_CHECK_ADDR says.
    #[arg(long, value_name = "ADDRESS")]
    pub addr: Option<String>,
}

/// Arguments of `status`.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// Print the document as it came, for programs.
    #[arg(long)]
    pub json: bool,
    /// Print it again every so many seconds (2), until interrupted.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
        default_missing_value = "2", value_parser = clap::value_parser!(u16).range(1..))]
    pub watch: Option<u16>,
    /// Address of the admin server: host and port, or unix: and a path. Default: what
    /// FIREZONE_ADMIN_ADDR says.
    #[arg(long, value_name = "ADDRESS")]
    pub addr: Option<String>,
}

/// Arguments of `log-filter`.
#[derive(Debug, Clone, Args)]
pub struct LogFilterArgs {
    /// A level (error, warn, info, debug, trace), directives such as
    /// info,firezone_gateway::portal=debug, or off. Without it, the one in force is shown.
    pub filter: Option<String>,
    /// Put the settings into force again.
    #[arg(long, conflicts_with = "filter")]
    pub reset: bool,
    /// Address of the admin server: host and port, or unix: and a path. Default: what
    /// FIREZONE_ADMIN_ADDR says.
    #[arg(long, value_name = "ADDRESS")]
    pub addr: Option<String>,
}

/// Arguments of `diagnose`.
#[derive(Debug, Clone, Args)]
pub struct DiagnoseArgs {
    /// File to write, which must not be there yet; `-` for standard output, as for
    /// `docker compose exec -T gateway /firezone-gateway diagnose -o - > gateway.tar.gz`.
    /// Default: firezone-gateway-TIME.tar.gz here.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<String>,
    /// Address of the admin server: host and port, or unix: and a path. Default: what
    /// FIREZONE_ADMIN_ADDR says.
    #[arg(long, value_name = "ADDRESS")]
    pub addr: Option<String>,
}

/// For whom `check-config` shows the lines to add.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FixFor {
    /// A service in a compose file.
    Compose,
    /// A pod.
    Kubernetes,
    /// A host without containers, usually with systemd.
    Host,
    /// Each of them.
    All,
}

/// The three questions of health (DESIGN: live, started, ready).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Probe {
    /// The loops of the process turn.
    Live,
    /// The device is up, the host can forward, the portal has sent its first configuration.
    Started,
    /// Joined to the portal, device healthy, a relay usable (or none offered), not shutting down.
    Ready,
}

impl Probe {
    /// Path of the probe on the admin server.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Live => "/livez",
            Self::Started => "/startupz",
            Self::Ready => "/readyz",
        }
    }

    /// Name of the probe as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Started => "started",
            Self::Ready => "ready",
        }
    }
}

/// A value that must not be shown, as a command-line argument.
#[derive(Clone)]
pub struct SecretArg(String);

impl SecretArg {
    /// The value itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

impl FromStr for SecretArg {
    type Err = Infallible;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Ok(Self(value.to_owned()))
    }
}

/// Settings as text. `None` is "not on the command line".
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = PORTAL)]
pub struct Settings {
    /// Token of the gateway, or the path of a file that holds it. Anything on a command line can be
    /// read by every user of the machine: prefer FIREZONE_TOKEN_FILE.
    ///
    /// [env: FIREZONE_TOKEN]
    #[arg(value_name = "TOKEN", help_heading = PORTAL)]
    pub token: Option<SecretArg>,

    /// File that holds the token, such as /run/secrets/firezone_token. With systemd, the credential
    /// FIREZONE_TOKEN (LoadCredential=) is found by itself.
    ///
    /// [env: FIREZONE_TOKEN_FILE]
    #[arg(long, value_name = "PATH", help_heading = PORTAL)]
    pub token_file: Option<String>,

    /// Address of the portal: wss:// (or ws:// for tests), without a path unless a proxy needs one.
    ///
    /// [env: FIREZONE_API_URL] [default: wss://api.firezone.dev]
    #[arg(short = 'u', long, value_name = "URL", help_heading = PORTAL)]
    pub api_url: Option<String>,

    /// How long to keep trying when the portal cannot be reached, counted from the first failure of
    /// an outage; then the process ends with status 1. For example 15m, 24h, 30d.
    ///
    /// [env: FIREZONE_MAX_PARTITION_TIME] [default: none, try for ever]
    #[arg(short = 'm', long, value_name = "DURATION", help_heading = PORTAL)]
    pub max_partition_time: Option<String>,

    /// End with status 77 when the portal refuses the token. Otherwise the gateway stays up without
    /// access for anyone, says so, and looks again now and then and when the token file changes.
    ///
    /// [env: FIREZONE_EXIT_ON_AUTH_FAILURE] [default: false]
    #[arg(long, value_name = "BOOL", help_heading = PORTAL,
        num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub exit_on_auth_failure: Option<String>,

    /// Lasting identity of this gateway at the portal. Needed when several replicas have no state
    /// directory. Default: the one stored in the state directory, else derived from /etc/machine-id,
    /// else made up and stored.
    ///
    /// [env: FIREZONE_ID]
    #[arg(short = 'i', long, value_name = "ID", help_heading = IDENTITY)]
    pub firezone_id: Option<String>,

    /// Name to show in the portal. Default: the host's name.
    ///
    /// [env: FIREZONE_NAME]
    #[arg(short = 'n', long, value_name = "NAME", help_heading = IDENTITY)]
    pub firezone_name: Option<String>,

    /// Directory for what must outlive the container (the identity, flow logs not uploaded yet). Mount
    /// a volume here. Gateways that share one take a part of it each.
    ///
    /// [env: FIREZONE_STATE_DIR] [default: /var/lib/firezone]
    #[arg(long, value_name = "PATH", help_heading = IDENTITY)]
    pub state_dir: Option<String>,

    /// Where the health probes are (/livez, /startupz, /readyz); `off` for nowhere.
    ///
    /// [env: HEALTH_CHECK_ADDR] [default: 0.0.0.0:8080]
    #[arg(long, value_name = "IP:PORT", help_heading = ADMIN)]
    pub health_check_addr: Option<String>,

    /// Where page, status, metrics and control are: an IP address and a port, `unix:` and the path
    /// of a socket, `health` for where the probes are, or `off` for nowhere.
    ///
    /// [env: FIREZONE_ADMIN_ADDR] [default: 127.0.0.1:8081; in the container image, or if
    /// the probes are on a loopback address: health; if they are off: off]
    #[arg(long, value_name = "ADDRESS", help_heading = ADMIN)]
    pub admin_addr: Option<String>,

    /// File with a token that everything on the admin server but the health probes asks for, as
    /// bearer or as password. A changed file counts at once.
    ///
    /// [env: FIREZONE_ADMIN_TOKEN_FILE] [default: none; whoever reaches the port may look]
    #[arg(long, value_name = "PATH", help_heading = ADMIN)]
    pub admin_token_file: Option<String>,

    /// How log lines look: `human` or `json`.
    ///
    /// [env: FIREZONE_LOG_FORMAT] [default: human]
    #[arg(long, value_name = "FORMAT", help_heading = LOGGING)]
    pub log_format: Option<String>,

    /// Which log lines to write: a level (error, warn, info, debug, trace), or directives such as
    /// info,firezone_gateway::portal=debug. Does not affect exported spans.
    ///
    /// [env: RUST_LOG] [default: info]
    #[arg(long, value_name = "FILTER", help_heading = LOGGING)]
    pub log_filter: Option<String>,

    /// File that holds such a filter; it counts instead of RUST_LOG. It is read at the start and on
    /// SIGHUP, which puts it into force again whatever `log-filter` has set meanwhile.
    ///
    /// [env: FIREZONE_LOG_FILTER_FILE] [default: none; SIGHUP puts RUST_LOG into force again]
    #[arg(long, value_name = "PATH", help_heading = LOGGING)]
    pub log_filter_file: Option<String>,

    /// Accepted for compatibility. There is nothing to switch off: no data goes to the vendor.
    ///
    /// [env: FIREZONE_NO_TELEMETRY]
    #[arg(long, value_name = "BOOL", help_heading = LOGGING,
        num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_telemetry: Option<String>,

    /// Name of the tunnel interface.
    ///
    /// [env: FIREZONE_TUN_NAME] [default: tun-firezone]
    #[arg(long, value_name = "NAME", help_heading = DEVICE)]
    pub tun_name: Option<String>,

    /// UDP port for clients and relays. Open it in the firewall for direct connections. If it is
    /// taken, another one is used; 0 always lets the system choose.
    ///
    /// [env: FIREZONE_UDP_PORT] [default: 52625]
    #[arg(long, value_name = "PORT", help_heading = DEVICE)]
    pub udp_port: Option<String>,

    /// Ports of the gateway itself that clients may reach through the tunnel, such as
    /// `tcp/22, udp/5000-5010`; `all` for every port, as the stock gateway has it. DNS and ping
    /// are always open.
    ///
    /// [env: FIREZONE_GATEWAY_PORTS] [default: none]
    #[arg(long, value_name = "PORTS", help_heading = DEVICE)]
    pub gateway_ports: Option<String>,

    /// Threads that move packets, up to 32. More than there are cores costs more than it brings.
    ///
    /// [env: FIREZONE_WORKERS] [default: auto, one per core, at most 8]
    #[arg(long, value_name = "NUMBER", help_heading = DEVICE)]
    pub workers: Option<String>,

    /// What to leave to the kernel where it can: `all`, `none`, or some of `tun-tso, tun-uso, udp-gso,
    /// udp-gro`. Only to be changed where a driver is broken.
    ///
    /// [env: FIREZONE_OFFLOADS] [default: all]
    #[arg(long, value_name = "NAMES", help_heading = DEVICE)]
    pub offloads: Option<String>,

    /// Do not try to raise net.core.rmem_max and net.core.wmem_max.
    ///
    /// [env: FIREZONE_NO_INC_BUF] [default: false]
    #[arg(long, value_name = "BOOL", help_heading = DEVICE,
        num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_inc_buf: Option<String>,

    /// Send buffer to ask for on each UDP socket, in bytes.
    ///
    /// [env: FIREZONE_UDP_SEND_BUFFER_SIZE] [default: 2097152]
    #[arg(long, value_name = "BYTES", help_heading = DEVICE)]
    pub udp_send_buffer_size: Option<String>,

    /// Receive buffer to ask for on each UDP socket, in bytes.
    ///
    /// [env: FIREZONE_UDP_RECV_BUFFER_SIZE] [default: 16777216]
    #[arg(long, value_name = "BYTES", help_heading = DEVICE)]
    pub udp_recv_buffer_size: Option<String>,

    /// Whom to become when started as root: `uid` or `uid:gid`, by number; `none` stays root. The
    /// gateway then opens what needs root, keeps NET_ADMIN and can never get more. Without the
    /// capabilities SETUID and SETGID it stays root and says so.
    ///
    /// [env: FIREZONE_USER] [default: none; in the container image: 65532:65532]
    #[arg(long, value_name = "UID[:GID]", help_heading = BEHAVIOUR)]
    pub user: Option<String>,

    /// How long to go on carrying traffic when asked to stop, with readiness failing, so that an
    /// orchestrator can send new clients elsewhere first. A second signal ends it.
    ///
    /// [env: FIREZONE_SHUTDOWN_LINGER] [default: 0s]
    #[arg(long, value_name = "DURATION", help_heading = BEHAVIOUR)]
    pub shutdown_linger: Option<String>,

    /// End with status 78 when the host lacks something (a capability, /dev/net/tun, forwarding).
    /// Otherwise the gateway stays up, not started, and says which line of the compose file is
    /// missing.
    ///
    /// [env: FIREZONE_STRICT] [default: false]
    #[arg(long, value_name = "BOOL", help_heading = BEHAVIOUR,
        num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub strict: Option<String>,

    /// Skip the check of permissions and host settings at start.
    #[arg(long, help_heading = BEHAVIOUR)]
    pub no_check: bool,

    /// Write the beginning and end of every TCP and UDP flow to the log. The portal decides by
    /// itself whether they are uploaded.
    ///
    /// [env: FIREZONE_FLOW_LOGS] [default: false]
    #[arg(long, value_name = "BOOL", help_heading = LOGGING,
        num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub flow_logs: Option<String>,

    /// Not supported here; accepted with a notice.
    #[arg(long, hide = true)]
    pub metrics: Option<String>,

    /// Not supported here; accepted with a notice.
    #[arg(long, hide = true)]
    pub otlp_grpc_endpoint: Option<String>,

    /// Not supported here; accepted with a notice.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub validate_checksums: Option<String>,
}

impl Settings {
    /// Settings given after a sub-command's name, completed by those before it.
    #[must_use]
    pub fn or(self, before: Self) -> Self {
        Self {
            token: self.token.or(before.token),
            token_file: self.token_file.or(before.token_file),
            api_url: self.api_url.or(before.api_url),
            max_partition_time: self.max_partition_time.or(before.max_partition_time),
            exit_on_auth_failure: self.exit_on_auth_failure.or(before.exit_on_auth_failure),
            firezone_id: self.firezone_id.or(before.firezone_id),
            firezone_name: self.firezone_name.or(before.firezone_name),
            state_dir: self.state_dir.or(before.state_dir),
            health_check_addr: self.health_check_addr.or(before.health_check_addr),
            admin_addr: self.admin_addr.or(before.admin_addr),
            admin_token_file: self.admin_token_file.or(before.admin_token_file),
            log_format: self.log_format.or(before.log_format),
            log_filter: self.log_filter.or(before.log_filter),
            log_filter_file: self.log_filter_file.or(before.log_filter_file),
            no_telemetry: self.no_telemetry.or(before.no_telemetry),
            tun_name: self.tun_name.or(before.tun_name),
            udp_port: self.udp_port.or(before.udp_port),
            gateway_ports: self.gateway_ports.or(before.gateway_ports),
            workers: self.workers.or(before.workers),
            offloads: self.offloads.or(before.offloads),
            no_inc_buf: self.no_inc_buf.or(before.no_inc_buf),
            udp_send_buffer_size: self.udp_send_buffer_size.or(before.udp_send_buffer_size),
            udp_recv_buffer_size: self.udp_recv_buffer_size.or(before.udp_recv_buffer_size),
            user: self.user.or(before.user),
            shutdown_linger: self.shutdown_linger.or(before.shutdown_linger),
            strict: self.strict.or(before.strict),
            no_check: self.no_check || before.no_check,
            flow_logs: self.flow_logs.or(before.flow_logs),
            metrics: self.metrics.or(before.metrics),
            otlp_grpc_endpoint: self.otlp_grpc_endpoint.or(before.otlp_grpc_endpoint),
            validate_checksums: self.validate_checksums.or(before.validate_checksums),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sub_command_that_was_meant_is_found() {
        for (typed, name) in [
            ("health", Some("healthcheck")),
            ("healthchek", Some("healthcheck")),
            ("health-check", Some("healthcheck")),
            ("stauts", Some("status")),
            ("check", Some("check-config")),
            ("checkconfig", Some("check-config")),
            ("rum", Some("run")),
            ("start", None),
            ("abcdefghijklmnop", None),
            ("-", None),
        ] {
            assert_eq!(meant(typed).as_deref(), name, "{typed}");
        }
    }

    #[test]
    fn distances_are_those_of_levenshtein() {
        for (one, other, expected) in [
            ("", "abc", 3),
            ("abc", "abc", 0),
            ("kitten", "sitting", 3),
            ("flaw", "lawn", 2),
        ] {
            assert_eq!(distance(one, other), expected, "{one} {other}");
            assert_eq!(distance(other, one), expected, "{other} {one}");
        }
    }
}
