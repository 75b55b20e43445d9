//! Single values as text, judged.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use url::Url;

use crate::access::{NotAPort, OpenPorts};
use crate::admin::{AdminToken, Place};
use crate::host::privileges::User;
use crate::telemetry;

use super::{LogFormat, Offloads, mistake::shown};

/// Whoever waits longer has probably taken one unit for another.
const LONGEST_LINGER: Duration = Duration::from_secs(3600);

/// What is wrong with a value, and what to set instead.
pub(super) struct Wrong {
    pub(super) problem: String,
    pub(super) fix: String,
}

pub(super) fn wrong<T>(problem: impl Into<String>, fix: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong {
        problem: problem.into(),
        fix: fix.into(),
    })
}

/// Base URL of the portal, without what is never sent (portal-channel spec §1.1).
pub(super) fn api_url(text: &str) -> Result<Url, Wrong> {
    const FIX: &str = "Set it to the portal's address, such as wss://api.firezone.dev.";
    let mut url = match Url::parse(text) {
        Ok(url) => url,
        Err(error) => return wrong(format!("{} is not a URL ({error})", shown(text)), FIX),
    };
    if !matches!(url.scheme(), "ws" | "wss" | "http" | "https") {
        return wrong(
            format!("the scheme {} is not possible", shown(url.scheme())),
            FIX,
        );
    }
    if !url.username().is_empty() || url.password().is_some() {
        return wrong("a user or password in the URL is never sent", FIX);
    }
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

/// Budget of an outage; `none` is no limit.
pub(super) fn partition_time(text: &str) -> Result<Option<Duration>, Wrong> {
    const FIX: &str = "Set it to a time with a unit, such as 15m, 24h or 30d, or to none.";
    if matches!(text.to_ascii_lowercase().as_str(), "none" | "off") {
        return Ok(None);
    }
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => wrong(
            "with no time at all, the first failure would be the end",
            FIX,
        ),
        Ok(time) => Ok(Some(time)),
        Err(error) => wrong(format!("{} is not a duration ({error})", shown(text)), FIX),
    }
}

/// Whom to become when started as root; `none` for nobody else.
pub(super) fn user(text: &str) -> Result<Option<User>, Wrong> {
    const FIX: &str =
        "Set it to the numbers of a user and a group, such as 65532:65532, or to none.";
    if matches!(text.to_ascii_lowercase().as_str(), "none" | "keep") {
        return Ok(None);
    }
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    // The kernel takes the last one for "leave it as it is".
    let id = |text: &str| text.parse().ok().filter(|id| *id != u32::MAX);
    match (id(uid), id(gid)) {
        (Some(0), _) | (_, Some(0)) => wrong(
            format!("{} would be root, or in its group", shown(text)),
            FIX,
        ),
        (Some(uid), Some(gid)) => Ok(Some(User { uid, gid })),
        _ => wrong(format!("{} is not a user by number", shown(text)), FIX),
    }
}

/// How long to go on after being asked to stop.
pub(super) fn linger(text: &str) -> Result<Duration, Wrong> {
    const FIX: &str = "Set it to a time with a unit of up to an hour, such as 5s, or to 0s.";
    match humantime::parse_duration(text) {
        Ok(time) if time > LONGEST_LINGER => {
            wrong(format!("{} is longer than an hour", shown(text)), FIX)
        }
        Ok(time) => Ok(time),
        Err(_) if text == "0" => Ok(Duration::ZERO),
        Err(error) => wrong(format!("{} is not a duration ({error})", shown(text)), FIX),
    }
}

/// A directory that does not depend on where the process was started.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, Wrong> {
    let path = PathBuf::from(text);
    if path.is_absolute() {
        Ok(path)
    } else {
        wrong(
            format!("{} is not an absolute path", shown(text)),
            "Set it to a directory such as /var/lib/firezone.",
        )
    }
}

/// Where to listen; `off` is nowhere.
pub(super) fn listen_address(text: &str) -> Result<Option<SocketAddr>, Wrong> {
    const FIX: &str = "Set it to an IP address and a port, such as 0.0.0.0:8080, [::]:8080 or \
                       127.0.0.1:8080, or to off.";
    if text.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => wrong("nobody would find port 0", FIX),
        Ok(address) => Ok(Some(address)),
        Err(_) => wrong(
            format!("{} is not an IP address with a port", shown(text)),
            FIX,
        ),
    }
}

/// Where page, status, metrics and control are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AdminAddress {
    /// Where the probes are.
    WithProbes,
    Off,
    At(Place),
}

/// Where everything but the probes is; empty leaves the choice.
pub(super) fn admin_address(text: &str) -> Result<Option<AdminAddress>, Wrong> {
    match text.to_ascii_lowercase().as_str() {
        "" => return Ok(None),
        "off" => return Ok(Some(AdminAddress::Off)),
        "health" => return Ok(Some(AdminAddress::WithProbes)),
        _ => {}
    }
    match place(text) {
        Ok(place) => Ok(Some(AdminAddress::At(place))),
        Err(problem) => wrong(
            problem,
            "Set it to an IP address and a port, such as 127.0.0.1:8081, to a socket, such as \
             unix:/run/firezone-gateway.sock, to health for where HEALTH_CHECK_ADDR says, or to \
             off.",
        ),
    }
}

/// An address with a port, or a socket.
fn place(text: &str) -> Result<Place, String> {
    // What the kernel takes, and a zero at the end.
    const LONGEST_SOCKET: usize = 107;
    if let Some(path) = text.strip_prefix("unix:") {
        return match PathBuf::from(path) {
            path if !path.is_absolute() => Err(format!("{} is not an absolute path", shown(text))),
            path if path.as_os_str().len() > LONGEST_SOCKET => Err(format!(
                "the path of a socket cannot be longer than {LONGEST_SOCKET} bytes"
            )),
            path => Ok(Place::Unix(path)),
        };
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => Err("nobody would find port 0".to_owned()),
        Ok(address) => Ok(Place::Tcp(address)),
        Err(_) => Err(format!("{} is not an IP address with a port", shown(text))),
    }
}

/// How log lines look.
pub(super) fn log_format(text: &str) -> Result<LogFormat, Wrong> {
    match text.to_ascii_lowercase().as_str() {
        "human" => Ok(LogFormat::Human),
        "json" => Ok(LogFormat::Json),
        _ => wrong(
            format!("{} is not a log format", shown(text)),
            "Set it to human or json.",
        ),
    }
}

/// A filter in the syntax of `RUST_LOG`.
pub(super) fn log_filter(text: &str) -> Result<String, Wrong> {
    match telemetry::parse_filter(text) {
        Ok((text, _)) => Ok(text),
        Err(error) => wrong(
            format!("{} is not a log filter ({error})", shown(text)),
            "Set it to a level such as info, or to directives such as \
             info,firezone_gateway=debug.",
        ),
    }
}

/// A file that holds such a filter, and the filter; empty is none.
pub(super) fn log_filter_file(text: &str) -> Result<Option<(PathBuf, String)>, Wrong> {
    if text.is_empty() {
        return Ok(None);
    }
    let path = PathBuf::from(text);
    match telemetry::read_filter(&path) {
        Ok(filter) => Ok(Some((path, filter))),
        Err(error) => wrong(
            format!("no log filter can be read from {}: {error}", shown(text)),
            "Set it to the path of a file with a level such as info, or with directives such as \
             info,firezone_gateway=debug.",
        ),
    }
}

/// Interface names hold at most 15 bytes (IFNAMSIZ less the terminator), no slash, no white space.
pub(super) fn interface_name(text: &str) -> Result<String, Wrong> {
    let possible = !text.is_empty()
        && text.len() <= 15
        && !matches!(text, "." | "..")
        && text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if possible {
        Ok(text.to_owned())
    } else {
        wrong(
            format!("{} cannot be the name of an interface", shown(text)),
            "Set it to at most 15 letters, digits, - or _, such as tun-firezone.",
        )
    }
}

/// A port; 0 is any.
pub(super) fn udp_port(text: &str) -> Result<u16, Wrong> {
    if text.contains("://") {
        return wrong(
            format!(
                "{} looks like the address of a Kubernetes service called firezone-udp",
                shown(text)
            ),
            "Set `enableServiceLinks: false` in the pod's specification, or set the variable to a \
             port.",
        );
    }
    match text.parse() {
        Ok(port) => Ok(port),
        Err(_) => wrong(
            format!("{} is not a port", shown(text)),
            "Set it to a number up to 65535, such as 52625, or to 0 for any free port.",
        ),
    }
}

/// A number of threads.
pub(super) fn workers(text: &str) -> Result<Option<usize>, Wrong> {
    /// More would each have too little to do, whatever the machine.
    const MOST: usize = 32;

    match text.parse() {
        _ if text == "auto" => Ok(None),
        Ok(workers @ 1..=MOST) => Ok(Some(workers)),
        _ => wrong(
            format!("{} is not a number of workers", shown(text)),
            "Set it to a number from 1 to 32, or to auto for one per core.",
        ),
    }
}

/// Some of the kernel's offloads.
pub(super) fn offloads(text: &str) -> Result<Offloads, Wrong> {
    match text {
        "all" => return Ok(Offloads::ALL),
        "none" => return Ok(Offloads::NONE),
        _ => {}
    }
    let mut offloads = Offloads::NONE;
    for name in text.split(',').map(str::trim) {
        match name {
            "tun-tso" => offloads.tun_tso = true,
            "tun-uso" => offloads.tun_uso = true,
            "udp-gso" => offloads.udp_gso = true,
            "udp-gro" => offloads.udp_gro = true,
            _ => {
                return wrong(
                    format!("{} is not an offload", shown(name)),
                    "Set it to all, none, or some of tun-tso, tun-uso, udp-gso and udp-gro, with \
                     commas in between.",
                );
            }
        }
    }
    Ok(offloads)
}

/// A file with the token of the admin server; empty for none.
pub(super) fn admin_token(text: &str) -> Result<Option<AdminToken>, Wrong> {
    if text.is_empty() {
        return Ok(None);
    }
    let token = AdminToken::in_file(text);
    match token.read() {
        Ok(_) => Ok(Some(token)),
        Err(error) => wrong(
            format!(
                "there is no usable admin token in {} ({error})",
                shown(text)
            ),
            "Put a token into the file, such as the output of `openssl rand -hex 32`, and let the \
             gateway read it.",
        ),
    }
}

/// Ports of the gateway that are open to clients.
pub(super) fn gateway_ports(text: &str) -> Result<OpenPorts, Wrong> {
    if text.eq_ignore_ascii_case("none") {
        return Ok(OpenPorts::none());
    }
    text.parse().or_else(|error: NotAPort| {
        wrong(
            format!("{} is not a port of a protocol", shown(&error.0)),
            "Set it to a list such as tcp/22, udp/5000-5010, to all, or to none.",
        )
    })
}

/// The kernel takes socket buffer sizes as a signed 32-bit number and doubles them.
pub(super) fn buffer_size(text: &str) -> Result<usize, Wrong> {
    const SMALLEST: usize = 64 * 1024;
    const LARGEST: usize = 1024 * 1024 * 1024;
    match text.parse() {
        Ok(size) if (SMALLEST..=LARGEST).contains(&size) => Ok(size),
        _ => wrong(
            format!("{} is not a buffer size", shown(text)),
            "Set it to a number of bytes from 65536 to 1073741824, such as 16777216.",
        ),
    }
}
