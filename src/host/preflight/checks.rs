//! The checks themselves. Each reads, judges, and says what it found.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::fix::{self, Fix};
use super::{
    Check, Environment, Finding, ForwardPolicy, KernelOffloads, Level, Nftables, Owner, TunDevice,
};
use crate::config::Offloads;
use crate::device::{self, Nodes};
use crate::host::buffers::{self, RMEM_MAX, WMEM_MAX};
use crate::host::constants::{
    CLOCK_TOLERANCE, OLDEST_SANE_TIME, OUTER_PACKET_V4, OUTER_PACKET_V6, TUN_DEVICE_NUMBER,
    TUN_DIRECTORY_MODE, TUN_NODE_MODE, UDP_RECEIVE_BUFFER, UDP_SEND_BUFFER,
};
use crate::host::nft::{self, NftError};
use crate::host::privileges::{Credentials, can_be_made};
use crate::net::{Family, SocketOptions, UdpSocket};

const TUN: &str = "dev/net/tun";
const PROCESS_STATUS: &str = "proc/self/status";
const RESOLV_CONF: &str = "etc/resolv.conf";
const IPV4: &str = "proc/sys/net/ipv4";
const IPV6: &str = "proc/sys/net/ipv6";
const IPV4_ROUTES: &str = "proc/net/route";
const IPV6_ROUTES: &str = "proc/net/ipv6_route";
const LINKS: &str = "sys/class/net";

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
        Check::Privileges => privileges(environment),
        Check::ForwardingIpv4 => forwarding_ipv4(environment),
        Check::ForwardingIpv6 => forwarding_ipv6(environment),
        Check::SrcValidMark => src_valid_mark(environment),
        Check::Ipv6Enabled => ipv6_enabled(environment),
        Check::Nftables => nftables(environment),
        Check::ForwardPolicy => forward_policy(environment),
        Check::UdpBuffers => udp_buffers(environment),
        Check::Offloads => offloads(environment),
        Check::Mtu => mtu(environment),
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
    match environment.tun_device {
        TunDevice::Open => return ok("/dev/net/tun has been opened"),
        TunDevice::ToBeMade => return ok("/dev/net/tun is missing, and is made at the start"),
        TunDevice::Probe => {}
    }
    let path = environment.path(TUN);
    let made = environment.may_make && make_tun_device(&environment.root);
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

/// Makes `/dev/net/tun` below the root where it is missing and the process may. Whether it did.
pub fn make_tun_device(root: &Path) -> bool {
    let path = root.join(TUN);
    !path.exists() && make_node(&path).is_ok()
}

/// Whether [`make_tun_device`] would.
pub fn tun_device_can_be_made(root: &Path) -> bool {
    let may = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::MKNOD));
    may && !root.join(TUN).exists()
}

fn make_node(path: &Path) -> io::Result<()> {
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
    // As everywhere else, since making an interface takes a capability anyway. Not subject to the umask.
    rustix::fs::chmod(path, Mode::from_raw_mode(TUN_NODE_MODE))?;
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
    let Some(credentials) = Credentials::parse(&status) else {
        return warning(
            format!(
                "/proc/self/status does not tell whether CAP_NET_ADMIN is there; {CONSEQUENCE}"
            ),
            fix::net_admin(),
        );
    };
    if credentials.has(CapabilitySet::NET_ADMIN) {
        ok("CAP_NET_ADMIN is effective")
    } else if is_out_of_reach(&credentials) {
        error(
            format!(
                "CAP_NET_ADMIN is granted but not effective, because the process runs as user {}; {CONSEQUENCE}",
                credentials.uid
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

/// Whether `CAP_NET_ADMIN` is granted to a process whose user does not get it.
fn is_out_of_reach(credentials: &Credentials) -> bool {
    credentials.bounding & CapabilitySet::NET_ADMIN.bits() != 0 && credentials.uid != 0
}

/// For what else needs it.
fn get_net_admin(environment: &Environment<'_>) -> Fix {
    let status = fs::read_to_string(environment.path(PROCESS_STATUS)).unwrap_or_default();
    match Credentials::parse(&status) {
        Some(credentials) if is_out_of_reach(&credentials) => fix::root_user(),
        _ => fix::net_admin(),
    }
}

fn privileges(environment: &Environment<'_>) -> Verdict {
    let status = fs::read_to_string(environment.path(PROCESS_STATUS)).unwrap_or_default();
    let Some(credentials) = Credentials::parse(&status) else {
        return ok("/proc/self/status does not tell them");
    };
    let mut found = format!(
        "user {}, group {}, {}",
        credentials.uid,
        credentials.gid,
        credentials.capabilities()
    );
    match credentials.no_new_privs {
        Some(true) => found.push_str(", no_new_privs"),
        Some(false) => found.push_str(", no_new_privs not set"),
        None => {}
    }
    let Owner {
        wanted: Some(wanted),
        stays_root: Some(why),
    } = environment.owner
    else {
        return ok(found);
    };
    warning(
        format!(
            "{found}: it stays as it was started and does not become user {wanted}, because {why}"
        ),
        fix::leave_root(),
    )
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
        Nftables::Known(result) => judge_nftables(environment, result.as_ref().err(), true),
        Nftables::Probe => {
            let problem = nft::probe(environment.link).err();
            // Those of a gateway that runs here already.
            let in_place = matches!(nft::is_installed(), Ok(true));
            judge_nftables(environment, problem.as_ref(), in_place)
        }
    }
}

pub(super) fn judge_nftables(
    environment: &Environment<'_>,
    problem: Option<&NftError>,
    in_place: bool,
) -> Verdict {
    const CONSEQUENCE: &str = "without masquerading, resources see tunnel addresses and only answer if they are routed back";
    match problem {
        None if in_place => ok("masquerading rules are in place"),
        None => ok("the kernel accepts masquerading rules; none are in place yet"),
        Some(e @ NftError::NotPermitted) => {
            error(format!("{e}; {CONSEQUENCE}"), get_net_admin(environment))
        }
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
            Ok(limit) if limit < wanted && can_be_raised(environment, path) => {
                seen.push(format!("{name}={limit} is raised to {wanted} at the start"));
            }
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

fn offloads(environment: &Environment<'_>) -> Verdict {
    let wanted = environment.wanted_offloads;
    let found = match environment.offloads {
        KernelOffloads::Unknown => return ok("known when there is a device"),
        KernelOffloads::Known(found) => found,
        KernelOffloads::Probe(nodes) => match probe_offloads(nodes, wanted) {
            Ok(found) => found,
            // Other checks say what is missing.
            Err(e) => return ok(format!("cannot be tried ({e})")),
        },
    };
    judge_offloads(wanted, found)
}

fn probe_offloads(nodes: &Nodes, wanted: Offloads) -> Result<Offloads, String> {
    let options = device::Options {
        queues: 1,
        tso: wanted.tun_tso,
        uso: wanted.tun_uso,
    };
    let device = device::probe(nodes, options).map_err(|e| e.to_string())?;
    let options = SocketOptions {
        port: 0,
        gso: wanted.udp_gso,
        gro: wanted.udp_gro,
        ..SocketOptions::default()
    };
    let socket = UdpSocket::bind(Family::V4, options).map_err(|e| e.to_string())?;
    Ok(Offloads {
        tun_tso: device.tso,
        tun_uso: device.uso,
        udp_gso: socket.max_segments() > 1,
        udp_gro: socket.has_gro(),
    })
}

pub(super) fn judge_offloads(wanted: Offloads, found: Offloads) -> Verdict {
    let missing: Vec<_> = wanted
        .names()
        .filter(|name| !found.names().any(|found| found == *name))
        .collect();
    let in_use = match found.to_string() {
        none if none == "none" => "the kernel takes no work off the gateway".to_owned(),
        some => format!("the kernel has {some}"),
    };
    match missing.as_slice() {
        [] => ok(in_use),
        // Most kernels in use are older than Linux 6.2, and little is lost.
        ["tun-uso"] => ok(format!(
            "{in_use}, but not tun-uso, which came with Linux 6.2"
        )),
        missing => warning(
            format!(
                "{in_use}, but not {}: more CPU time for each byte, and lower rates",
                missing.join(", ")
            ),
            fix::newer_kernel(),
        ),
    }
}

/// Interfaces that a default route leads to, and how large a packet must fit through.
fn uplinks(environment: &Environment<'_>) -> Vec<(String, u32)> {
    let read = |path| fs::read_to_string(environment.path(path)).unwrap_or_default();
    let v4 = read(IPV4_ROUTES);
    // Interface, destination, gateway, flags, three counters, mask.
    let v4 = v4.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let default = words.get(1) == Some(&"00000000") && words.get(7) == Some(&"00000000");
        default.then(|| (words[0].to_owned(), OUTER_PACKET_V4))
    });
    let v6 = read(IPV6_ROUTES);
    // Destination, its length, ..., interface.
    let v6 = v6.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let default = words.first()?.bytes().all(|b| b == b'0') && words.get(1) == Some(&"00");
        // The kernel's own "unreachable" leads to the loopback interface.
        let link = words.last().filter(|link| **link != "lo")?;
        default.then(|| ((*link).to_owned(), OUTER_PACKET_V6))
    });
    v4.chain(v6).collect()
}

fn mtu(environment: &Environment<'_>) -> Verdict {
    let mut seen = Vec::new();
    for (link, wanted) in uplinks(environment) {
        let file = environment.path(LINKS).join(&link).join("mtu");
        let mtu = fs::read_to_string(file)
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok());
        match mtu {
            Some(mtu) if mtu < wanted => {
                return warning(
                    format!(
                        "{link} takes packets of {mtu} bytes, but full ones of the tunnel have {wanted}: they are sent in fragments, which many routers drop"
                    ),
                    fix::mtu(&link),
                );
            }
            Some(mtu) => {
                let shown = format!("{link} takes {mtu} bytes");
                if !seen.contains(&shown) {
                    seen.push(shown);
                }
            }
            None => {}
        }
    }
    if seen.is_empty() {
        ok("no interface with a default route can be seen")
    } else {
        ok(seen.join(", "))
    }
}

/// The build may know better than the table: nobody runs a program before it was built.
fn oldest_sane_time() -> u64 {
    let built = option_env!("SOURCE_DATE_EPOCH").and_then(|text| text.parse().ok());
    built.unwrap_or(0).max(OLDEST_SANE_TIME)
}

fn clock(environment: &Environment<'_>) -> Verdict {
    let oldest = UNIX_EPOCH + Duration::from_secs(oldest_sane_time());
    if environment.now >= oldest {
        return match environment.portal_ahead {
            Some(ahead) if ahead.abs() > CLOCK_TOLERANCE => {
                let (side, then) = if ahead > 0.0 {
                    ("behind", "late")
                } else {
                    ("ahead of", "early")
                };
                warning(
                    format!(
                        "the clock is {:.0} s {side} the portal's: access that ends at a certain time ends too {then}, and what is logged is dated wrong",
                        ahead.abs()
                    ),
                    fix::clock(),
                )
            }
            Some(_) => ok("the clock is set, and agrees with the portal's"),
            None => ok("the clock is set"),
        };
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
    let path = environment.path(&environment.state_directory);
    let e = match write_and_remove(&path, environment.may_make) {
        Ok(()) => return ok(format!("{shown} can be written")),
        Err(e) => e,
    };
    let missing = e.kind() == io::ErrorKind::NotFound;
    if missing && !environment.may_make && (environment.state_handed_over || can_be_made(&path)) {
        return ok(format!("{shown} is not there, and is made at the start"));
    }
    if environment.state_handed_over {
        return ok(format!(
            "{shown} is given to the gateway's group at the start"
        ));
    }
    let refused = e.kind() == io::ErrorKind::PermissionDenied;
    let user = rustix::process::geteuid().as_raw();
    warning(
        format!(
            "{shown} cannot be written ({e}): without FIREZONE_ID, the portal may take the gateway for a new one after a restart"
        ),
        if refused && user != 0 {
            fix::state_owner(&shown, user)
        } else {
            fix::state_directory(&shown)
        },
    )
}

fn can_be_raised(environment: &Environment<'_>, path: &str) -> bool {
    let file = environment.path(path);
    environment.raises_buffers && OpenOptions::new().write(true).open(file).is_ok()
}

/// Writes for real, because permission bits tell nothing about read-only or full file systems.
fn write_and_remove(directory: &Path, may_make: bool) -> io::Result<()> {
    if may_make {
        fs::create_dir_all(directory)?;
    }
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
