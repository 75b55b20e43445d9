//! The checks themselves. Each reads, judges, and says what it found.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;

use super::fix::{self, Fix};
use super::{Check, Environment, Finding, ForwardPolicy, Level, Nftables};
use crate::host::buffers::{self, RMEM_MAX, WMEM_MAX};
use crate::host::constants::{
    CAP_NET_ADMIN, OLDEST_SANE_TIME, TUN_DEVICE_NUMBER, TUN_DIRECTORY_MODE, UDP_RECEIVE_BUFFER,
    UDP_SEND_BUFFER,
};
use crate::host::nft::{self, NftError};

const TUN: &str = "dev/net/tun";
const PROCESS_STATUS: &str = "proc/self/status";
const RESOLV_CONF: &str = "etc/resolv.conf";
const IPV4: &str = "proc/sys/net/ipv4";
const IPV6: &str = "proc/sys/net/ipv6";

/// A [`Finding`] before it knows its check.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) level: Level,
    pub(super) found: String,
    pub(super) fix: Option<Fix>,
}

fn ok(found: impl Into<String>) -> Verdict {
    Verdict {
        level: Level::Ok,
        found: found.into(),
        fix: None,
    }
}

fn warning(found: impl Into<String>, fix: Fix) -> Verdict {
    Verdict {
        level: Level::Warning,
        found: found.into(),
        fix: Some(fix),
    }
}

fn error(found: impl Into<String>, fix: Fix) -> Verdict {
    Verdict {
        level: Level::Error,
        found: found.into(),
        fix: Some(fix),
    }
}

pub(super) fn run(check: Check, environment: &Environment<'_>) -> Finding {
    let verdict = match check {
        Check::TunDevice => tun_device(environment),
        Check::NetAdmin => net_admin(environment),
        Check::ForwardingIpv4 => forwarding_ipv4(environment),
        Check::ForwardingIpv6 => forwarding_ipv6(environment),
        Check::SrcValidMark => src_valid_mark(environment),
        Check::Ipv6Enabled => ipv6_enabled(environment),
        Check::Nftables => nftables(environment),
        Check::ForwardPolicy => forward_policy(environment),
        Check::UdpBuffers => udp_buffers(environment),
        Check::Clock => clock(environment),
        Check::StateDirectory => state_directory(environment),
        Check::ResolvConf => resolv_conf(environment),
    };
    Finding {
        check,
        level: verdict.level,
        found: verdict.found,
        fix: verdict.fix,
    }
}

fn tun_device(environment: &Environment<'_>) -> Verdict {
    let path = environment.path(TUN);
    let mut made = false;
    if environment.make_tun_device && !path.exists() {
        made = make_tun_device(&path).is_ok();
    }
    let opened = open_tun_device(&path);
    if made && opened.is_err() {
        // A node that cannot be opened would only mislead whoever looks for the cause.
        let _ = fs::remove_file(&path);
    }
    judge_tun_device(opened, made)
}

#[derive(Debug)]
pub(super) enum TunError {
    Missing,
    NotTheDevice,
    Open(io::Error),
}

fn open_tun_device(path: &Path) -> Result<(), TunError> {
    let metadata = fs::metadata(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => TunError::Missing,
        _ => TunError::Open(e),
    })?;
    let number = (
        rustix::fs::major(metadata.rdev()),
        rustix::fs::minor(metadata.rdev()),
    );
    if !metadata.file_type().is_char_device() || number != TUN_DEVICE_NUMBER {
        return Err(TunError::NotTheDevice);
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map(drop)
        .map_err(TunError::Open)
}

/// Apart from the looking, because a device cannot be part of a test's files.
pub(super) fn judge_tun_device(opened: Result<(), TunError>, made: bool) -> Verdict {
    const CONSEQUENCE: &str = "without it there is no tunnel interface and no client can connect";
    match opened {
        Ok(()) if made => ok("/dev/net/tun was missing and has been made"),
        Ok(()) => ok("/dev/net/tun can be opened"),
        Err(TunError::Missing) => error(
            format!("/dev/net/tun is missing; {CONSEQUENCE}"),
            fix::tun_device(),
        ),
        Err(TunError::NotTheDevice) => error(
            format!("/dev/net/tun is not the TUN device (character device 10:200); {CONSEQUENCE}"),
            fix::tun_device(),
        ),
        Err(TunError::Open(e))
            if matches!(Errno::from_io_error(&e), Some(Errno::NODEV | Errno::NXIO)) =>
        {
            error(
                format!(
                    "/dev/net/tun is there but the kernel has no TUN driver ({e}); {CONSEQUENCE}"
                ),
                fix::tun_module(),
            )
        }
        Err(TunError::Open(e)) => error(
            format!("/dev/net/tun cannot be opened ({e}); {CONSEQUENCE}"),
            fix::tun_device(),
        ),
    }
}

fn make_tun_device(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(TUN_DIRECTORY_MODE)
            .create(directory)?;
    }
    let (major, minor) = TUN_DEVICE_NUMBER;
    rustix::fs::mknodat(
        CWD,
        path,
        FileType::CharacterDevice,
        Mode::RUSR | Mode::WUSR,
        rustix::fs::makedev(major, minor),
    )?;
    Ok(())
}

fn net_admin(environment: &Environment<'_>) -> Verdict {
    const CONSEQUENCE: &str =
        "without it the tunnel interface, its routes and the masquerading cannot be set up";
    let status = match fs::read_to_string(environment.path(PROCESS_STATUS)) {
        Ok(status) => status,
        Err(e) => {
            return warning(
                format!(
                    "/proc/self/status cannot be read ({e}), so it is unknown whether CAP_NET_ADMIN is there; {CONSEQUENCE}"
                ),
                fix::net_admin(),
            );
        }
    };
    let has = |set: &str| {
        field(&status, set)
            .and_then(|value| u64::from_str_radix(value, 16).ok())
            .is_some_and(|bits| bits >> CAP_NET_ADMIN & 1 == 1)
    };
    // Real, effective, saved, file system.
    let user = field(&status, "Uid").and_then(|ids| ids.split_whitespace().nth(1));
    if has("CapEff") {
        ok("CAP_NET_ADMIN is effective")
    } else if has("CapBnd") && user.is_some_and(|user| user != "0") {
        error(
            format!(
                "CAP_NET_ADMIN is granted but not effective, because the process runs as user {}; {CONSEQUENCE}",
                user.unwrap_or_default()
            ),
            fix::root_user(),
        )
    } else {
        error(
            format!("CAP_NET_ADMIN is missing; {CONSEQUENCE}"),
            fix::net_admin(),
        )
    }
}

/// The value of a line "name:<tab>value".
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

fn forwarding_ipv4(environment: &Environment<'_>) -> Verdict {
    const NAME: &str = "net.ipv4.ip_forward";
    const CONSEQUENCE: &str = "clients connect, but their IPv4 packets reach no resource";
    match sysctl(environment, &format!("{IPV4}/ip_forward")) {
        Ok(1) => ok(format!("{NAME}=1")),
        Ok(value) => error(
            format!("{NAME}={value}: the kernel does not forward IPv4; {CONSEQUENCE}"),
            fix::sysctl(NAME, "1"),
        ),
        Err(e) => warning(
            format!("{NAME} cannot be read ({e}); if it is not 1, {CONSEQUENCE}"),
            fix::sysctl(NAME, "1"),
        ),
    }
}

fn forwarding_ipv6(environment: &Environment<'_>) -> Verdict {
    const NAME: &str = "net.ipv6.conf.all.forwarding";
    const CONSEQUENCE: &str = "clients connect, but their IPv6 packets reach no resource";
    if !environment.path(IPV6).exists() {
        return ok("the kernel has no IPv6, so there is none to forward");
    }
    match sysctl(environment, &format!("{IPV6}/conf/all/forwarding")) {
        Ok(1) => ok(format!("{NAME}=1")),
        Ok(value) => warning(
            format!("{NAME}={value}: the kernel does not forward IPv6; {CONSEQUENCE}"),
            fix::sysctl(NAME, "1"),
        ),
        Err(e) => warning(
            format!("{NAME} cannot be read ({e}); if it is not 1, {CONSEQUENCE}"),
            fix::sysctl(NAME, "1"),
        ),
    }
}

fn src_valid_mark(environment: &Environment<'_>) -> Verdict {
    const NAME: &str = "net.ipv4.conf.all.src_valid_mark";
    let conf = |path: &str| sysctl(environment, &format!("{IPV4}/conf/{path}")).unwrap_or(0);
    // The kernel takes the larger of "all" and the interface's own, which begins as "default".
    let filter = conf("all/rp_filter").max(conf("default/rp_filter"));
    match (filter, conf("all/src_valid_mark")) {
        (_, 1) => ok(format!("{NAME}=1")),
        (1, value) => warning(
            format!(
                "reverse path filtering is strict (rp_filter=1) and {NAME}={value}: the filter does not see the gateway's routing mark and may drop packets of clients whose own address is in 100.64.0.0/11"
            ),
            fix::sysctl(NAME, "1"),
        ),
        (filter, _) => ok(format!(
            "reverse path filtering is not strict (rp_filter={filter})"
        )),
    }
}

fn ipv6_enabled(environment: &Environment<'_>) -> Verdict {
    const NAME: &str = "net.ipv6.conf.all.disable_ipv6";
    const CONSEQUENCE: &str = "the gateway works with IPv4 alone; IPv6 resources and clients with only IPv6 are out of reach";
    if !environment.path(IPV6).exists() {
        return warning(
            format!("the kernel has no IPv6; {CONSEQUENCE}"),
            fix::ipv6_in_kernel(),
        );
    }
    for scope in ["all", "default"] {
        // A new interface, such as the tunnel, begins with "default"; setting "all" sets both.
        if let Ok(value @ 1..) = sysctl(environment, &format!("{IPV6}/conf/{scope}/disable_ipv6")) {
            return warning(
                format!(
                    "net.ipv6.conf.{scope}.disable_ipv6={value}: IPv6 is switched off; {CONSEQUENCE}"
                ),
                fix::sysctl(NAME, "0"),
            );
        }
    }
    ok("IPv6 is switched on")
}

fn nftables(environment: &Environment<'_>) -> Verdict {
    match &environment.nftables {
        Nftables::Unused => ok("not used; something else has to masquerade"),
        Nftables::Known(result) => judge_nftables(result.as_ref().err()),
        Nftables::Probe => judge_nftables(nft::probe(environment.link).err().as_ref()),
    }
}

pub(super) fn judge_nftables(problem: Option<&NftError>) -> Verdict {
    const CONSEQUENCE: &str = "without masquerading, resources see tunnel addresses and only answer if they are routed back";
    match problem {
        None => ok("masquerading rules are accepted by the kernel"),
        Some(e @ NftError::NotPermitted) => error(format!("{e}; {CONSEQUENCE}"), fix::net_admin()),
        Some(e) => warning(format!("{e}; {CONSEQUENCE}"), fix::nft_modules()),
    }
}

fn forward_policy(environment: &Environment<'_>) -> Verdict {
    let probed;
    let chains = match &environment.forward_policy {
        ForwardPolicy::Known(chains) => chains,
        ForwardPolicy::Probe => match nft::forward_drops() {
            Ok(chains) => {
                probed = chains;
                &probed
            }
            // The check of nf_tables reports the cause.
            Err(e) => return ok(format!("other firewalls cannot be seen ({e})")),
        },
    };
    if chains.is_empty() {
        ok("no other firewall in nf_tables drops forwarded packets by default")
    } else {
        warning(
            format!(
                "another firewall drops forwarded packets by default ({}); unless it has a rule for {}, clients connect but reach no resource",
                chains.join(", "),
                environment.link
            ),
            fix::forward_policy(chains, environment.link),
        )
    }
}

fn udp_buffers(environment: &Environment<'_>) -> Verdict {
    let limits = [
        ("net.core.rmem_max", RMEM_MAX, UDP_RECEIVE_BUFFER),
        ("net.core.wmem_max", WMEM_MAX, UDP_SEND_BUFFER),
    ];
    let mut seen = Vec::new();
    for (name, path, wanted) in limits {
        match buffers::read(&environment.path(path)) {
            Ok(limit) if limit < wanted => {
                return warning(
                    format!(
                        "{name}={limit} is below {wanted}: bursts at high rates overflow the sockets and packets are lost"
                    ),
                    fix::machine_sysctl(name, wanted),
                );
            }
            Ok(limit) => seen.push(format!("{name}={limit}")),
            // Not shown in a network namespace of its own by kernels before 6.9.
            Err(_) => seen.push(format!("{name} is not visible here")),
        }
    }
    ok(seen.join(", "))
}

fn clock(environment: &Environment<'_>) -> Verdict {
    let oldest = UNIX_EPOCH + Duration::from_secs(OLDEST_SANE_TIME);
    if environment.now >= oldest {
        return ok("the clock is set");
    }
    let reads = environment.now.duration_since(UNIX_EPOCH).map_or_else(
        |_| "a time before 1970".to_owned(),
        |_| humantime::format_rfc3339_seconds(environment.now).to_string(),
    );
    error(
        format!(
            "the clock says {reads}: the portal's certificate seems not valid yet, so the gateway cannot connect"
        ),
        fix::clock(),
    )
}

fn state_directory(environment: &Environment<'_>) -> Verdict {
    let shown = environment.state_directory.display().to_string();
    match write_and_remove(&environment.path(&environment.state_directory)) {
        Ok(()) => ok(format!("{shown} can be written")),
        Err(e) => warning(
            format!(
                "{shown} cannot be written ({e}): without FIREZONE_ID, the portal may take the gateway for a new one after a restart"
            ),
            fix::state_directory(&shown),
        ),
    }
}

/// Writes for real, because permission bits tell nothing about read-only or full file systems.
fn write_and_remove(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let path: PathBuf = directory.join(format!(".write-check-{}", std::process::id()));
    // Left over from a process with this number that was killed in between.
    let _ = fs::remove_file(&path);
    File::create_new(&path)?;
    fs::remove_file(&path)
}

fn resolv_conf(environment: &Environment<'_>) -> Verdict {
    const CONSEQUENCE: &str = "the names of the portal and of DNS resources cannot be resolved";
    match fs::read(environment.path(RESOLV_CONF)) {
        Err(e) => error(
            format!("/etc/resolv.conf cannot be read ({e}); {CONSEQUENCE}"),
            fix::resolv_conf(),
        ),
        Ok(bytes) => {
            let servers: Vec<String> = String::from_utf8_lossy(&bytes)
                .lines()
                .filter_map(|line| {
                    let mut words = line.split_whitespace();
                    (words.next() == Some("nameserver"))
                        .then(|| words.next().map(str::to_owned))
                        .flatten()
                })
                .collect();
            if servers.is_empty() {
                warning(
                    format!(
                        "/etc/resolv.conf names no nameserver; unless one runs at 127.0.0.1, {CONSEQUENCE}"
                    ),
                    fix::resolv_conf(),
                )
            } else {
                ok(format!("nameservers: {}", servers.join(", ")))
            }
        }
    }
}

fn sysctl(environment: &Environment<'_>, path: &str) -> io::Result<i64> {
    fs::read_to_string(environment.path(path))?
        .trim()
        .parse()
        .map_err(io::Error::other)
}
