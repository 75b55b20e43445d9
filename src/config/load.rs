//! The one pass over all settings.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use secrecy::SecretString;
use url::Url;
use uuid::Uuid;

use super::{
    Config, DEFAULT_ADMIN_ADDR, DEFAULT_API_URL, DEFAULT_HEALTH_CHECK_ADDR, DEFAULT_STATE_DIR,
    DEFAULT_TUN_NAME, DEFAULT_UDP_PORT, DEFAULT_UDP_RECV_BUFFER, DEFAULT_UDP_SEND_BUFFER, Env,
    Identity, IdentitySource, Listeners, LogFormat, Mistake, Notice, Offloads, Settings,
    TokenSource, cli as command_line, identity,
    mistake::shown,
    token::{self, NAME as TOKEN},
    values::{self, AdminAddress, Wrong, wrong},
};
use crate::admin::{AdminToken, Place};
use crate::host::privileges::User;
use crate::telemetry::{self, Export, Signal};

const TOKEN_FILE: &str = "FIREZONE_TOKEN_FILE";
const HEALTH_CHECK_ADDR: &str = "HEALTH_CHECK_ADDR";
const ADMIN_ADDR: &str = "FIREZONE_ADMIN_ADDR";
const USER: &str = "FIREZONE_USER";
const LOG_FILTER_FILE: &str = "FIREZONE_LOG_FILTER_FILE";

/// Variables with our prefix that mean something; any other is probably misspelt.
const KNOWN: &[&str] = &[
    "FIREZONE_API_URL",
    TOKEN,
    TOKEN_FILE,
    "FIREZONE_ID",
    "FIREZONE_NAME",
    "FIREZONE_LOG_FORMAT",
    LOG_FILTER_FILE,
    "FIREZONE_MAX_PARTITION_TIME",
    "FIREZONE_STATE_DIR",
    "FIREZONE_TUN_NAME",
    "FIREZONE_UDP_PORT",
    "FIREZONE_WORKERS",
    "FIREZONE_OFFLOADS",
    "FIREZONE_GATEWAY_PORTS",
    ADMIN_ADDR,
    "FIREZONE_ADMIN_TOKEN_FILE",
    "FIREZONE_NO_INC_BUF",
    "FIREZONE_UDP_SEND_BUFFER_SIZE",
    "FIREZONE_UDP_RECV_BUFFER_SIZE",
    "FIREZONE_EXIT_ON_AUTH_FAILURE",
    "FIREZONE_STRICT",
    USER,
    "FIREZONE_SHUTDOWN_LINGER",
    "FIREZONE_NO_TELEMETRY",
    "FIREZONE_FLOW_LOGS",
    "FIREZONE_METRICS",
    "FIREZONE_VALIDATE_CHECKSUMS",
];

/// Facts of the host that settings fall back to.
#[derive(Debug, Clone)]
pub struct Host {
    /// File with the machine id.
    pub machine_id: PathBuf,
    /// Name of the host.
    pub hostname: Option<String>,
}

impl Host {
    /// The host that this process runs on.
    pub fn here() -> Self {
        let name = rustix::system::uname();
        Self {
            machine_id: PathBuf::from("/etc/machine-id"),
            hostname: name
                .nodename()
                .to_str()
                .ok()
                .filter(|name| !name.is_empty() && *name != "(none)")
                .map(str::to_owned),
        }
    }
}

/// One setting in force, for showing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingShown {
    /// Environment variable of the setting, or its flag if it has none.
    pub name: &'static str,
    /// Its value, redacted where it is a secret.
    pub value: String,
    /// Where it came from.
    pub source: String,
}

/// Result of looking at all settings.
#[derive(Debug, Clone)]
pub struct Examination {
    /// What is in force, in the order of the help. Settings with a mistake are left out.
    pub settings: Vec<SettingShown>,
    /// What works, but probably not as meant.
    pub notices: Vec<Notice>,
    /// What does not work.
    pub mistakes: Vec<Mistake>,
    /// The configuration, if there are no mistakes.
    pub config: Option<Config>,
}

/// Looks at all settings without changing anything on disk.
pub fn examine(settings: &Settings, env: &dyn Env, host: &Host) -> Examination {
    let mut loader = Loader::new(env);
    let config = loader.config(settings, host);
    Examination {
        config: config
            .filter(|_| loader.mistakes.is_empty())
            .map(|config| Config {
                notices: loader.notices.clone(),
                ..config
            }),
        settings: loader.shown,
        notices: loader.notices,
        mistakes: loader.mistakes,
    }
}

/// Where the admin server listens, for the sub-commands that ask it and need no other setting.
///
/// # Errors
/// What is wrong with the addresses, the first mistake if there are several.
pub fn admin_listeners(settings: &Settings, env: &dyn Env) -> Result<Listeners, Mistake> {
    let mut loader = Loader::new(env);
    let listeners = loader.listeners(settings);
    if loader.mistakes.is_empty() {
        Ok(listeners)
    } else {
        Err(loader.mistakes.remove(0))
    }
}

/// What the admin server asks for, for the sub-commands that ask it.
///
/// # Errors
/// What is wrong with the file.
pub fn admin_token(settings: &Settings, env: &dyn Env) -> Result<Option<AdminToken>, Mistake> {
    let mut loader = Loader::new(env);
    let token = loader.admin_token(settings);
    match loader.mistakes.pop() {
        Some(mistake) => Err(mistake),
        None => Ok(token.flatten()),
    }
}

/// Whom to become when started as root, for those who have to know before the settings are read that
/// only this user may read. Mistakes are left to [`examine`].
pub fn user(settings: &Settings, env: &dyn Env) -> Option<User> {
    Loader::new(env).user(settings).flatten()
}

/// A value as given, and by which flag if not by the variable.
struct Given {
    value: String,
    flag: Option<&'static str>,
}

impl Given {
    fn source(&self) -> String {
        self.flag.unwrap_or("environment").to_owned()
    }
}

struct Loader<'a> {
    env: &'a dyn Env,
    shown: Vec<SettingShown>,
    notices: Vec<Notice>,
    mistakes: Vec<Mistake>,
}

impl<'a> Loader<'a> {
    fn new(env: &'a dyn Env) -> Self {
        Self {
            env,
            shown: Vec::new(),
            notices: Vec::new(),
            mistakes: Vec::new(),
        }
    }

    fn config(&mut self, cli: &Settings, host: &Host) -> Option<Config> {
        let api_url = self.setting(
            ("FIREZONE_API_URL", "--api-url"),
            cli.api_url.as_deref(),
            DEFAULT_API_URL,
            values::api_url,
            Url::to_string,
        );
        let token = self.token(cli);
        let max_partition_time = self.setting(
            ("FIREZONE_MAX_PARTITION_TIME", "--max-partition-time"),
            cli.max_partition_time.as_deref(),
            "none",
            values::partition_time,
            |time| match time {
                Some(time) => humantime::format_duration(*time).to_string(),
                None => "none (try for ever)".to_owned(),
            },
        );
        let exit_on_auth_failure = self.boolean(
            ("FIREZONE_EXIT_ON_AUTH_FAILURE", "--exit-on-auth-failure"),
            cli.exit_on_auth_failure.as_deref(),
        );

        let state_dir = self.setting(
            ("FIREZONE_STATE_DIR", "--state-dir"),
            cli.state_dir.as_deref(),
            DEFAULT_STATE_DIR,
            values::absolute_path,
            |path| path.display().to_string(),
        );
        let identity = self.identity(cli, state_dir.as_deref(), host);
        let name = self.name(cli, host);

        let listeners = self.listeners(cli);
        let admin_token = self.admin_token(cli);

        let log_format = self.setting(
            ("FIREZONE_LOG_FORMAT", "--log-format"),
            cli.log_format.as_deref(),
            "human",
            values::log_format,
            LogFormat::to_string,
        );
        let log_filter = self.setting(
            ("RUST_LOG", "--log-filter"),
            cli.log_filter.as_deref(),
            telemetry::DEFAULT_FILTER,
            values::log_filter,
            String::clone,
        );
        let log_filter_file = self.setting(
            (LOG_FILTER_FILE, "--log-filter-file"),
            cli.log_filter_file.as_deref(),
            "",
            values::log_filter_file,
            |file| match file {
                Some((path, filter)) => format!("{} ({filter})", path.display()),
                None => "none".to_owned(),
            },
        );
        let [export, metrics, logs] = self.exports();

        let tun_name = self.setting(
            ("FIREZONE_TUN_NAME", "--tun-name"),
            cli.tun_name.as_deref(),
            DEFAULT_TUN_NAME,
            values::interface_name,
            String::clone,
        );
        let udp_port = self.setting(
            ("FIREZONE_UDP_PORT", "--udp-port"),
            cli.udp_port.as_deref(),
            &DEFAULT_UDP_PORT.to_string(),
            values::udp_port,
            u16::to_string,
        );
        let gateway_ports = self.setting(
            ("FIREZONE_GATEWAY_PORTS", "--gateway-ports"),
            cli.gateway_ports.as_deref(),
            "none",
            values::gateway_ports,
            |ports| match ports.to_string() {
                none if none.is_empty() => "none".to_owned(),
                ports => ports,
            },
        );
        let workers = self.setting(
            ("FIREZONE_WORKERS", "--workers"),
            cli.workers.as_deref(),
            "auto",
            values::workers,
            |workers| workers.map_or_else(|| "auto".to_owned(), |n| n.to_string()),
        );
        let offloads = self.setting(
            ("FIREZONE_OFFLOADS", "--offloads"),
            cli.offloads.as_deref(),
            "all",
            values::offloads,
            Offloads::to_string,
        );
        let no_inc_buf = self.boolean(
            ("FIREZONE_NO_INC_BUF", "--no-inc-buf"),
            cli.no_inc_buf.as_deref(),
        );
        let udp_send_buffer = self.setting(
            ("FIREZONE_UDP_SEND_BUFFER_SIZE", "--udp-send-buffer-size"),
            cli.udp_send_buffer_size.as_deref(),
            &DEFAULT_UDP_SEND_BUFFER.to_string(),
            values::buffer_size,
            usize::to_string,
        );
        let udp_recv_buffer = self.setting(
            ("FIREZONE_UDP_RECV_BUFFER_SIZE", "--udp-recv-buffer-size"),
            cli.udp_recv_buffer_size.as_deref(),
            &DEFAULT_UDP_RECV_BUFFER.to_string(),
            values::buffer_size,
            usize::to_string,
        );
        let user = self.user(cli);
        let linger = self.setting(
            ("FIREZONE_SHUTDOWN_LINGER", "--shutdown-linger"),
            cli.shutdown_linger.as_deref(),
            "0s",
            values::linger,
            |time| humantime::format_duration(*time).to_string(),
        );
        let strict = self.boolean(("FIREZONE_STRICT", "--strict"), cli.strict.as_deref());
        let flow_logs = self.boolean(
            ("FIREZONE_FLOW_LOGS", "--flow-logs"),
            cli.flow_logs.as_deref(),
        );

        if cli.no_check {
            self.show("--no-check", "true".to_owned(), "--no-check".to_owned());
        }

        self.ignored(cli);
        self.unknown();

        let (token, token_source) = token?;
        let identity = identity?;
        let (log_filter, log_filter_file) = match log_filter_file? {
            Some((path, filter)) => (filter, Some(path)),
            None => (log_filter?, None),
        };
        Some(Config {
            api_url: api_url?,
            token,
            token_source,
            name: name?,
            max_partition_time: max_partition_time?,
            exit_on_auth_failure: exit_on_auth_failure?,
            listeners,
            admin_token: admin_token?,
            state_dir: state_dir?,
            tun_name: tun_name?,
            udp_port: udp_port?,
            gateway_ports: gateway_ports?,
            workers: workers?,
            offloads: offloads?,
            raise_buffer_limits: !no_inc_buf?,
            udp_send_buffer: udp_send_buffer?,
            udp_recv_buffer: udp_recv_buffer?,
            user: user?,
            stays_root: None,
            linger: linger?,
            strict: strict?,
            flow_logs: flow_logs?,
            check_host: !cli.no_check,
            telemetry: telemetry::Options {
                log_format: log_format?,
                log_filter,
                log_filter_file,
                resource: telemetry::resource_attributes(self.env, &identity.id),
                export,
                metrics,
                logs,
            },
            identity,
            notices: Vec::new(),
            claim: None,
        })
    }

    /// The value of a setting: the flag, else the variable. Empty is unset.
    fn given(
        &mut self,
        variable: &'static str,
        flag: &'static str,
        on_command_line: Option<&str>,
    ) -> Option<Given> {
        if let Some(value) = on_command_line.filter(|value| !value.is_empty()) {
            return Some(Given {
                value: value.to_owned(),
                flag: Some(flag),
            });
        }
        self.variable(variable)
            .map(|value| Given { value, flag: None })
    }

    /// The value of a variable, without the quotes that `docker --env-file` leaves around it.
    fn variable(&mut self, variable: &'static str) -> Option<String> {
        let Ok(value) = self.env.var(variable) else {
            self.mistake(
                variable,
                None,
                "the value is not UTF-8 text",
                "Set it to plain text.",
            );
            return None;
        };
        let value = value?;
        for quote in ['"', '\''] {
            if let Some(inner) = value
                .strip_prefix(quote)
                .and_then(|rest| rest.strip_suffix(quote))
            {
                self.notice(
                    variable,
                    "the quotes around the value are part of it, and were removed; env files of \
                     Docker take no quotes",
                );
                return Some(inner.to_owned()).filter(|inner| !inner.is_empty());
            }
        }
        Some(value)
    }

    /// Reads, judges and shows one setting. `None` after a mistake.
    fn setting<T>(
        &mut self,
        (variable, flag): (&'static str, &'static str),
        on_command_line: Option<&str>,
        default: &str,
        parse: impl Fn(&str) -> Result<T, Wrong>,
        show: impl Fn(&T) -> String,
    ) -> Option<T> {
        let mistakes = self.mistakes.len();
        let given = self.given(variable, flag, on_command_line);
        if self.mistakes.len() > mistakes {
            return None;
        }
        let (text, flag, source) = match &given {
            Some(given) => (given.value.as_str(), given.flag, given.source()),
            None => (default, None, "default".to_owned()),
        };
        match parse(text.trim()) {
            Ok(value) => {
                self.show(variable, show(&value), source);
                Some(value)
            }
            Err(Wrong { problem, fix }) => {
                self.mistake(variable, flag, problem, fix);
                None
            }
        }
    }

    fn boolean(
        &mut self,
        (variable, flag): (&'static str, &'static str),
        on_command_line: Option<&str>,
    ) -> Option<bool> {
        self.setting(
            (variable, flag),
            on_command_line,
            "false",
            |text| match text.to_ascii_lowercase().as_str() {
                "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                _ => wrong(
                    format!("{} is neither true nor false", shown(text)),
                    format!("Set {variable}=true or {variable}=false."),
                ),
            },
            bool::to_string,
        )
    }

    /// What is left out after a mistake does not matter.
    fn listeners(&mut self, cli: &Settings) -> Listeners {
        let probes = self.probes(cli);
        let default = || default_admin(probes);
        let admin = self.setting(
            (ADMIN_ADDR, "--admin-addr"),
            cli.admin_addr.as_deref(),
            "",
            values::admin_address,
            |address| match address.clone().unwrap_or_else(default) {
                AdminAddress::WithProbes if probes.is_none() => "off".to_owned(),
                AdminAddress::WithProbes => "health".to_owned(),
                AdminAddress::Off => "off".to_owned(),
                AdminAddress::At(place) => place.to_string(),
            },
        );
        let with_probes = probes.map(Place::Tcp);
        let place = match admin.clone().flatten().unwrap_or_else(default) {
            AdminAddress::WithProbes => with_probes.clone(),
            AdminAddress::Off => None,
            AdminAddress::At(place) => Some(place),
        };
        if let (Some(probes), Some(Place::Tcp(admin))) = (probes, &place)
            && probes != *admin
            && probes.port() == admin.port()
            && (probes.ip().is_unspecified() || admin.ip().is_unspecified())
        {
            self.mistake(
                ADMIN_ADDR,
                None,
                format!(
                    "the probes have port {} already ({HEALTH_CHECK_ADDR})",
                    admin.port()
                ),
                "Take another port, or health for the same address.",
            );
        }
        Listeners {
            probes: with_probes,
            admin: place,
            chosen: admin.flatten().is_some(),
        }
    }

    fn probes(&mut self, cli: &Settings) -> Option<SocketAddr> {
        self.setting(
            (HEALTH_CHECK_ADDR, "--health-check-addr"),
            cli.health_check_addr.as_deref(),
            DEFAULT_HEALTH_CHECK_ADDR,
            values::listen_address,
            |address| match address {
                Some(address) => address.to_string(),
                None => "off".to_owned(),
            },
        )
        .flatten()
    }

    fn user(&mut self, cli: &Settings) -> Option<Option<User>> {
        self.setting(
            (USER, "--user"),
            cli.user.as_deref(),
            "none",
            values::user,
            |user| user.map_or_else(|| "none".to_owned(), |user| user.to_string()),
        )
    }

    fn admin_token(&mut self, cli: &Settings) -> Option<Option<AdminToken>> {
        self.setting(
            ("FIREZONE_ADMIN_TOKEN_FILE", "--admin-token-file"),
            cli.admin_token_file.as_deref(),
            "",
            values::admin_token,
            |token| match token {
                Some(token) => token.path().display().to_string(),
                None => "none".to_owned(),
            },
        )
    }

    fn token(&mut self, cli: &Settings) -> Option<(SecretString, TokenSource)> {
        let mistakes = self.mistakes.len();
        let variable = self.variable(TOKEN);
        let file = self.given(TOKEN_FILE, "--token-file", cli.token_file.as_deref());
        if self.mistakes.len() > mistakes {
            return None;
        }
        let argument = cli
            .token
            .as_ref()
            .map(|token| token.expose())
            .filter(|token| !token.is_empty());
        if file.is_some() && (argument.is_some() || variable.is_some()) {
            self.notice(
                TOKEN_FILE,
                format!("not used, because {TOKEN} is set too; unset one of them"),
            );
        }

        let (source, flag, inline) = if let Some(text) = argument {
            // Otherwise a misspelt `healthcheck` in a compose file would start a second gateway.
            if text.len() <= 24 && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') {
                let meant = match command_line::meant(text) {
                    Some(name) => format!("; was {name} meant?"),
                    None => String::new(),
                };
                self.mistake(
                    TOKEN,
                    Some("command line"),
                    format!("the argument is neither a sub-command nor a token{meant}"),
                    format!(
                        "The sub-commands are {}; see --help. Give the token in \
                         FIREZONE_TOKEN_FILE or FIREZONE_TOKEN.",
                        command_line::command_names().join(", ")
                    ),
                );
                return None;
            }
            match path_of(text) {
                Some(path) => (TokenSource::File(path), Some("command line"), text),
                None => {
                    self.notice(
                        TOKEN,
                        "the token is on the command line, where every user of the machine can \
                         read it; FIREZONE_TOKEN_FILE is safer",
                    );
                    (TokenSource::Argument, Some("command line"), text)
                }
            }
        } else if let Some(text) = &variable {
            match path_of(text) {
                Some(path) => (TokenSource::File(path), None, text.as_str()),
                None => (TokenSource::Variable, None, text.as_str()),
            }
        } else if let Some(given) = &file {
            (
                TokenSource::File(PathBuf::from(&given.value)),
                given.flag,
                "",
            )
        } else if let Some(path) = self.credential() {
            (TokenSource::File(path), None, "")
        } else {
            self.mistake(
                TOKEN,
                None,
                "no token is set",
                "Set FIREZONE_TOKEN to the token that the portal shows for a new gateway, or \
                 FIREZONE_TOKEN_FILE to the path of a file that holds it. In a compose file: \
                 `environment: [\"FIREZONE_TOKEN_FILE=/run/secrets/firezone_token\"]` and \
                 `secrets: [firezone_token]`.",
            );
            return None;
        };

        let by_file_setting = argument.is_none() && variable.is_none() && file.is_some();
        let setting = if by_file_setting { TOKEN_FILE } else { TOKEN };
        let token = match &source {
            TokenSource::File(path) => token::read(path),
            TokenSource::Argument | TokenSource::Variable => token::clean(inline),
        };
        match token {
            Ok(token) => {
                self.show(TOKEN, "[REDACTED]".to_owned(), source.to_string());
                Some((token, source))
            }
            Err(error) => {
                let fix = match &source {
                    TokenSource::File(path) => format!(
                        "Put the token into {}, readable for this process, or set FIREZONE_TOKEN.",
                        path.display()
                    ),
                    _ => "Copy the token from the portal once more; it is one line of letters, \
                          digits and the characters . - _"
                        .to_owned(),
                };
                self.mistake(setting, flag, error.to_string(), fix);
                None
            }
        }
    }

    /// The credential that systemd passes with `LoadCredential=FIREZONE_TOKEN:…`.
    fn credential(&self) -> Option<PathBuf> {
        let directory = self.env.var_lossy("CREDENTIALS_DIRECTORY")?;
        Some(Path::new(&directory).join(TOKEN)).filter(|path| path.exists())
    }

    fn identity(
        &mut self,
        cli: &Settings,
        state_dir: Option<&Path>,
        host: &Host,
    ) -> Option<Identity> {
        const ID: &str = "FIREZONE_ID";
        let mistakes = self.mistakes.len();
        let given = self.given(ID, "--firezone-id", cli.firezone_id.as_deref());
        if self.mistakes.len() > mistakes {
            return None;
        }
        let value = given.as_ref().map(|given| given.value.as_str());
        // A mistake in the state directory has been noted already; it must not hide one here.
        let state_dir = state_dir.unwrap_or(Path::new(DEFAULT_STATE_DIR));
        match identity::find(value, state_dir, &host.machine_id) {
            Ok(identity) => {
                let (value, source) = match (&identity.source, &given) {
                    (IdentitySource::Setting, Some(given)) => (identity.id.clone(), given.source()),
                    (IdentitySource::Random, _) => (
                        "made up at start".to_owned(),
                        format!(
                            "default; will be stored in {}",
                            identity::file(state_dir).display()
                        ),
                    ),
                    (source, _) => (identity.id.clone(), source.to_string()),
                };
                self.show(ID, value, source);
                Some(identity)
            }
            Err(error) => {
                let fix = if given.is_some() {
                    "Set FIREZONE_ID to a name that stays the same, such as edge-1, or leave it \
                     unset."
                } else {
                    "Repair the file, or remove it to become a new gateway, or set FIREZONE_ID."
                };
                let flag = given.and_then(|given| given.flag);
                self.mistake(ID, flag, error.to_string(), fix);
                None
            }
        }
    }

    fn name(&mut self, cli: &Settings, host: &Host) -> Option<String> {
        const NAME: (&str, &str) = ("FIREZONE_NAME", "--firezone-name");
        let mistakes = self.mistakes.len();
        let given = self.given(NAME.0, NAME.1, cli.firezone_name.as_deref());
        if self.mistakes.len() > mistakes {
            return None;
        }
        let (name, flag, source) = match (given, &host.hostname) {
            (Some(given), _) => (given.value.clone(), given.flag, given.source()),
            (None, Some(hostname)) => (hostname.clone(), None, "host name".to_owned()),
            (None, None) => (Uuid::new_v4().to_string(), None, "made up".to_owned()),
        };
        if name.trim().is_empty() || name.len() > 255 || name.chars().any(char::is_control) {
            self.mistake(
                NAME.0,
                flag,
                format!("{} cannot be shown as a name", shown(&name)),
                "Set FIREZONE_NAME to one line of at most 255 bytes.",
            );
            return None;
        }
        self.show(NAME.0, name.clone(), source);
        Some(name)
    }

    /// What is exported. What holds for several signals, for one reason, is told once.
    fn exports(&mut self) -> [Export; 3] {
        let signals = [Signal::Traces, Signal::Metrics, Signal::Logs];
        let exports = signals.map(|signal| Export::decide(self.env, signal));
        let mut told: Vec<&Export> = Vec::new();
        for export in &exports {
            if told.contains(&export) {
                continue;
            }
            let alike = signals.iter().zip(&exports).filter(|(_, e)| *e == export);
            let none: Vec<_> = alike.map(|(s, _)| format!("no {}", s.as_str())).collect();
            let none = match none.as_slice() {
                [all @ .., last] if !all.is_empty() => format!("{} and {last}", all.join(", ")),
                one => one.concat(),
            };
            self.export(export, &format!("{none} are exported"));
            told.push(export);
        }
        exports
    }

    /// Shows one decision; `off` are the words for one against it.
    fn export(&mut self, export: &Export, off: &str) {
        let (setting, value) = match export {
            Export::On {
                target,
                setting,
                notices,
            } => {
                for (name, why) in notices {
                    // Often the same for all signals.
                    let told = |n: &Notice| n.setting == *name && n.message == *why;
                    if !self.notices.iter().any(told) {
                        self.notice(name, why.clone());
                    }
                }
                (*setting, target.endpoint.to_string())
            }
            Export::Off {
                setting,
                why,
                mistaken,
            } => {
                if *mistaken {
                    self.notice(setting, format!("{off}: {why}"));
                }
                (*setting, format!("{off}: {why}"))
            }
        };
        let source = match self.env.var_lossy(setting) {
            Some(_) => "environment",
            None => "default",
        };
        self.show(setting, value, source.to_owned());
    }

    /// Settings of the stock gateway that have no meaning here.
    fn ignored(&mut self, cli: &Settings) {
        let settings: [(&'static str, Option<&str>, &str); 4] = [
            (
                "FIREZONE_NO_TELEMETRY",
                cli.no_telemetry.as_deref(),
                "ignored; there is nothing to switch off, as no data goes to the vendor",
            ),
            (
                "FIREZONE_METRICS",
                cli.metrics.as_deref(),
                "ignored; fetch /metrics, or set OTEL_EXPORTER_OTLP_ENDPOINT to have them pushed",
            ),
            (
                "OTLP_GRPC_ENDPOINT",
                cli.otlp_grpc_endpoint.as_deref(),
                "ignored; set OTEL_EXPORTER_OTLP_ENDPOINT=http://HOST:4317 and OTEL_EXPORTER_OTLP_PROTOCOL=grpc \
                 instead",
            ),
            (
                "FIREZONE_VALIDATE_CHECKSUMS",
                cli.validate_checksums.as_deref(),
                "ignored; it is a debugging aid of the stock gateway",
            ),
        ];
        for (variable, on_command_line, message) in settings {
            if on_command_line.is_some() || self.env.var_lossy(variable).is_some() {
                self.notice(variable, message);
            }
        }
    }

    /// A misspelt variable would otherwise be a setting that silently does nothing.
    fn unknown(&mut self) {
        let mut names: Vec<String> = self
            .env
            .names()
            .into_iter()
            .filter(|name| name.starts_with("FIREZONE_"))
            .filter(|name| !KNOWN.contains(&name.as_str()) && !is_service_link(name))
            .collect();
        names.sort();
        for name in names {
            self.notices.push(Notice {
                setting: name,
                message: "not a known setting; ignored".to_owned(),
            });
        }
    }

    fn show(&mut self, name: &'static str, value: String, source: String) {
        self.shown.push(SettingShown {
            name,
            value,
            source,
        });
    }

    fn notice(&mut self, setting: &str, message: impl Into<String>) {
        self.notices.push(Notice {
            setting: setting.to_owned(),
            message: message.into(),
        });
    }

    fn mistake(
        &mut self,
        setting: &'static str,
        given_as: Option<&'static str>,
        problem: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.mistakes.push(Mistake {
            setting,
            given_as,
            problem: problem.into(),
            fix: fix.into(),
        });
    }
}

/// The path that a token setting names, if it is one: an existing file (as in the stock container),
/// or anything absolute, since no token begins with a slash.
fn path_of(text: &str) -> Option<PathBuf> {
    let path = Path::new(text.trim());
    (path.is_absolute() || path.is_file()).then(|| path.to_owned())
}

/// Variables that Kubernetes and Docker links make up for a service called `firezone-…`.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}

/// Where everything but the probes is unless somebody says: next to the usual port of the probes, or next to
/// that where the probes are there. Whoever is asked for no probes, or by nobody else, is to be asked for
/// nothing else by others either.
fn default_admin(probes: Option<SocketAddr>) -> AdminAddress {
    let Some(probes) = probes.filter(|probes| !probes.ip().is_loopback()) else {
        return AdminAddress::WithProbes;
    };
    let mut address = DEFAULT_ADMIN_ADDR;
    if probes.port() == address.port() {
        address.set_port(address.port() + 1);
    }
    AdminAddress::At(Place::Tcp(address))
}
