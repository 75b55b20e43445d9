//! The real binary with the rights that a container gives it: it leaves root, goes on without, and
//! ends in order.
//!
//! Needs root, iproute2, nftables, curl, coturn and setpriv; run by `scripts/test`.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use firezone_lab::netns::Net;
use firezone_lab::scenario::{GATEWAY_TOKEN, GATEWAY_V4, Lab, RESOURCE_V4};
use firezone_lab::traffic::page;
use rustix::process::Signal;

const GATEWAY: &str = env!("CARGO_BIN_EXE_firezone-gateway");

/// As `cap_drop: ALL` with what compose/gateway.yaml adds.
const CONTAINER: &[&str] = &["setpriv", "--bounding-set=-all,+net_admin,+setuid,+setgid"];
const USER: (&str, &str) = ("FIREZONE_USER", "65532:65533");

fn gateway() -> &'static Path {
    Path::new(GATEWAY)
}

/// Lines of `/proc/PID/status`, of every thread.
fn threads(net: &mut Net) -> Result<Vec<BTreeMap<String, String>>> {
    let tasks = format!("/proc/{}/task", net.pid("gateway")?);
    std::fs::read_dir(tasks)?
        .map(|task| {
            let status = std::fs::read_to_string(task?.path().join("status"))?;
            let lines = status.lines().filter_map(|line| line.split_once(':'));
            let lines = lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
            Ok(lines.collect())
        })
        .collect()
}

/// Every thread has exactly these rights.
fn all_have(net: &mut Net, wanted: &[(&str, &str)]) -> Result<()> {
    let threads = threads(net)?;
    ensure!(threads.len() > 5, "{} threads", threads.len());
    for thread in threads {
        for (name, value) in wanted {
            let found = thread.get(*name).context("no such line")?;
            let found = found.split_whitespace().collect::<Vec<_>>().join(" ");
            ensure!(found == *value, "{}: {name} {found}", thread["Name"]);
        }
    }
    Ok(())
}

/// What a thread has that can do no more than the gateway needs. With no_new_privs nothing can be got
/// out of the bounding set, which only `SETPCAP` can empty.
const NO_MORE_THAN_NEEDED: [(&str, &str); 5] = [
    ("CapEff", "0000000000001000"),
    ("CapPrm", "0000000000001000"),
    ("CapInh", "0000000000000000"),
    ("CapAmb", "0000000000000000"),
    ("NoNewPrivs", "1"),
];

fn host_finding(lab: &Lab, name: &str) -> Result<(String, String)> {
    let status = lab.status()?;
    let findings = status["host"].as_array().context("no findings")?;
    let finding = findings.iter().find(|f| f["name"] == name);
    let finding = finding.with_context(|| format!("no {name}: {findings:?}"))?;
    let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    Ok((text("level"), text("found")))
}

fn log_has(lab: &mut Lab, text: &str) -> Result<()> {
    lab.net
        .eventually("it is logged", Duration::from_secs(10), |net| {
            let log = net.whole_log("gateway");
            ensure!(log.contains(text), "no {text:?}: {log}");
            Ok(())
        })
}

/// A file that only root may read.
fn secret(lab: &Lab, name: &str, content: &str) -> Result<PathBuf> {
    let path = lab.net.dir().join(name);
    std::fs::write(&path, content)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(path)
}

fn rules_come_back(lab: &mut Lab) -> Result<()> {
    lab.net.sh("gateway", "nft flush ruleset")?;
    lab.net
        .eventually("the rules are back", Duration::from_secs(20), |net| {
            net.sh("gateway", "nft list ruleset | grep -q masquerade")
        })?;
    let body = lab.fetch(&page(RESOURCE_V4))?;
    ensure!(body.contains(GATEWAY_V4), "{body}");
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn root_is_left_and_everything_goes_on_without_it() -> Result<()> {
    let mut lab = Lab::new("leave-root", gateway())?;
    lab.start_surroundings()?;
    // A fresh volume, and secrets as careful people keep them. The token is not right yet.
    let state = lab.net.dir().join("gateway-state");
    std::fs::create_dir(&state)?;
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700))?;
    let token = secret(&lab, "token", ".not-the-token-0000000000")?;
    let admin_token = secret(&lab, "admin-token", "sesame")?;
    lab.start_gateway_under(
        CONTAINER,
        &[
            USER,
            ("FIREZONE_ID", ""),
            ("FIREZONE_TOKEN", ""),
            ("FIREZONE_TOKEN_FILE", &token.to_string_lossy()),
            ("FIREZONE_ADMIN_TOKEN_FILE", &admin_token.to_string_lossy()),
            ("FIREZONE_ADMIN_ADDR", "127.0.0.1:8084"),
        ],
    )?;
    log_has(&mut lab, "blocked: the portal refuses")?;
    // The file changes in place, as it does behind a bind mount.
    std::fs::write(&token, GATEWAY_TOKEN)?;
    lab.wait_ready()?;

    all_have(
        &mut lab.net,
        &[
            ("Uid", "65532 65532 65532 65532"),
            ("Gid", "65533 65533 65533 65533"),
            ("Groups", ""),
        ],
    )?;
    all_have(&mut lab.net, &NO_MORE_THAN_NEEDED)?;
    let ask = |net: &Net, token: &str| {
        let header = format!("authorization: Bearer {token}");
        net.output(
            "gateway",
            &format!("curl -s -H '{header}' http://127.0.0.1:8084/status"),
        )
    };
    ensure!(!ask(&lab.net, "x")?.contains("privileges"));
    let status = ask(&lab.net, "sesame")?;
    let rights = "user 65532, group 65533, capability NET_ADMIN, no_new_privs";
    ensure!(status.contains(rights), "{status}");
    ensure!(!status.contains(r#""level":"error""#), "{status}");
    ensure!(
        status.contains(&format!("{} can be written", state.display())),
        "{status}"
    );
    ensure!(std::fs::metadata(&state)?.gid() == 65533);
    ensure!(state.join("gateway_id").exists() || Path::new("/etc/machine-id").exists());

    lab.start_client(&[])?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    rules_come_back(&mut lab)?;

    lab.net.eventually(
        "the host is looked at again",
        Duration::from_secs(10),
        |net| {
            let status = ask(net, "sesame")?;
            for wanted in [
                "agrees with the portal's",
                "masquerading rules are in place",
            ] {
                ensure!(status.contains(wanted), "no {wanted}: {status}");
            }
            Ok(())
        },
    )?;

    // Another file in its place cannot be read, and that is told.
    log_has(&mut lab, "may be read by root only")?;
    let new = secret(&lab, "new-token", "whatever")?;
    std::fs::rename(new, &token)?;
    log_has(&mut lab, "Token not read again")?;
    lab.fetch(&page(RESOURCE_V4))?;
    // One that is the user's can.
    let refusals = |lab: &Lab| {
        let log = lab.net.whole_log("gateway");
        log.matches("Token not read again").count()
    };
    let before = refusals(&lab);
    let new = secret(&lab, "new-token", GATEWAY_TOKEN)?;
    std::os::unix::fs::chown(&new, Some(65532), None)?;
    std::fs::rename(new, &token)?;
    lab.net.signal("gateway", Signal::HUP)?;
    log_has(&mut lab, "Reload asked for")?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(refusals(&lab) == before, "{}", lab.net.log("gateway"));
    lab.fetch(&page(RESOURCE_V4))?;
    lab.end_gateway()
}

#[test]
#[ignore = "needs root and network namespaces"]
fn without_setuid_it_stays_root_and_names_the_line() -> Result<()> {
    let mut lab = Lab::new("stay-root", gateway())?;
    lab.start_portal()?;
    lab.start_gateway_under(
        &["setpriv", "--bounding-set=-all,+net_admin,+setgid"],
        // Which is for what it cannot work without.
        &[USER, ("FIREZONE_STRICT", "true")],
    )?;
    lab.wait_ready()?;
    let (level, found) = host_finding(&lab, "privileges")?;
    ensure!(level == "warning", "{level} {found}");
    ensure!(found.contains("SETUID is missing"), "{found}");
    let table = lab.status_table()?;
    ensure!(
        table.contains("NET_ADMIN") && table.contains("SETGID"),
        "{table}"
    );
    all_have(&mut lab.net, &[("Uid", "0 0 0 0")])?;
    lab.end_gateway()
}

/// As systemd starts a service with `User=` and `AmbientCapabilities=CAP_NET_ADMIN`.
#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn started_as_another_user_it_gives_up_what_it_does_not_need() -> Result<()> {
    let mut lab = Lab::new("not-root", gateway())?;
    lab.start_surroundings()?;
    let state = lab.net.dir().join("gateway-state");
    std::fs::create_dir(&state)?;
    std::os::unix::fs::chown(&state, Some(1000), Some(1000))?;
    lab.start_gateway_under(
        &[
            "setpriv",
            "--reuid=1000",
            "--regid=1000",
            "--clear-groups",
            "--inh-caps=+net_admin,+setuid",
            "--ambient-caps=+net_admin,+setuid",
        ],
        &[USER],
    )?;
    lab.wait_ready()?;
    all_have(&mut lab.net, &[("Uid", "1000 1000 1000 1000")])?;
    all_have(&mut lab.net, &NO_MORE_THAN_NEEDED)?;
    let (level, found) = host_finding(&lab, "privileges")?;
    ensure!(level == "ok" && found.contains("user 1000"), "{found}");
    lab.start_client(&[])?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    lab.end_gateway()
}

/// Started by hand, or in a container without `cap_drop`.
#[test]
#[ignore = "needs root and network namespaces"]
fn of_all_rights_that_root_can_have_nothing_can_be_had_again() -> Result<()> {
    let mut lab = Lab::new("all-rights", gateway())?;
    lab.start_portal()?;
    lab.start_gateway(&[USER])?;
    lab.wait_ready()?;
    all_have(&mut lab.net, &NO_MORE_THAN_NEEDED)?;
    all_have(
        &mut lab.net,
        &[
            ("Uid", "65532 65532 65532 65532"),
            ("Groups", ""),
            ("CapBnd", "0000000000000000"),
        ],
    )?;
    lab.end_gateway()
}

/// As on hosts without udev.
const ROOTS_OWN_TUN: &str = "mount -t tmpfs tmpfs /dev/net && mknod -m 600 /dev/net/tun c 10 200";

#[test]
#[ignore = "needs root and network namespaces"]
fn a_tun_device_for_root_only_and_a_low_port_are_had_all_the_same() -> Result<()> {
    let mut lab = Lab::new("root-tun", gateway())?;
    lab.start_portal()?;
    lab.start_gateway_under(
        &[
            "unshare",
            "-m",
            "sh",
            "-c",
            &format!(
                "{ROOTS_OWN_TUN} && exec setpriv \
                 --bounding-set=-all,+net_admin,+setuid,+setgid,+net_bind_service \"$@\""
            ),
            "sh",
        ],
        &[
            USER,
            ("FIREZONE_UDP_PORT", "443"),
            // Opened before root is left, and only once.
            ("FIREZONE_ADMIN_ADDR", "127.0.0.1:81"),
            ("FIREZONE_WORKERS", "2"),
        ],
    )?;
    lab.wait_ready()?;
    all_have(
        &mut lab.net,
        &[
            ("Uid", "65532 65532 65532 65532"),
            // NET_BIND_SERVICE is needed where the port has to be opened again.
            ("CapEff", "0000000000001400"),
        ],
    )?;
    // Looked at again, it is still well.
    std::thread::sleep(Duration::from_secs(7));
    let status = lab
        .net
        .output("gateway", "curl -sS -f http://127.0.0.1:81/status")
        .with_context(|| lab.net.log("gateway"))?;
    for wanted in [
        r#""workers":2"#,
        "0.0.0.0:443 ",
        "/dev/net/tun has been opened",
    ] {
        ensure!(status.contains(wanted), "no {wanted}: {status}");
    }
    ensure!(!status.contains(r#""level":"error""#), "{status}");
    lab.end_gateway()
}

#[test]
#[ignore = "needs root and network namespaces"]
fn the_host_is_checked_without_changing_it_also_beside_a_running_gateway() -> Result<()> {
    let mut lab = Lab::new("check-config", gateway())?;
    lab.start_portal()?;
    let state = lab.net.dir().join("gateway-state");
    let token = secret(&lab, "token", GATEWAY_TOKEN)?;
    let check = |lab: &Lab, wrapper: &str, user: &str| -> Result<(Option<i32>, String)> {
        let line = format!(
            "{wrapper} env FIREZONE_TOKEN={} FIREZONE_ID=x FIREZONE_USER={user} \
             FIREZONE_STATE_DIR={} {GATEWAY} check-config",
            token.display(),
            state.display()
        );
        let output = lab.net.try_output("gateway", &line)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok((output.status.code(), text))
    };
    let container = CONTAINER.join(" ");

    // Before the first start.
    let (code, text) = check(&lab, &container, "65532:65533")?;
    ensure!(code == Some(0), "{code:?} {text}");
    for wanted in [
        "user 65532, group 65533, capability NET_ADMIN, no_new_privs",
        "ok       tun_device",
        "none are in place yet",
        "the kernel has ",
        "eth0 takes 1500 bytes",
        "token may be read by root only",
        "gateway-state is not there, and is made at the start",
    ] {
        ensure!(text.contains(wanted), "no {wanted:?}: {text}");
    }
    ensure!(!state.exists());
    lab.leaves_nothing()?;

    // Nor is anything else in the way of a device that only root may open.
    let roots_own = format!("unshare -m sh -c '{ROOTS_OWN_TUN} && exec {container} \"$@\"' sh");
    let (code, text) = check(&lab, &roots_own, "65532:65533")?;
    ensure!(code == Some(0), "{code:?} {text}");
    for wanted in ["/dev/net/tun has been opened", "the kernel has "] {
        ensure!(text.contains(wanted), "no {wanted:?}: {text}");
    }
    lab.leaves_nothing()?;

    lab.start_gateway_under(CONTAINER, &[USER])?;
    lab.wait_ready()?;
    let before = std::fs::metadata(&state)?.mode();
    let (code, text) = check(&lab, &container, "65532:65533")?;
    ensure!(code == Some(0), "{code:?} {text}");
    ensure!(text.contains("masquerading rules are in place"), "{text}");
    ensure!(text.contains("can be written"), "{text}");
    ensure!(std::fs::metadata(&state)?.mode() == before);
    lab.net
        .sh("gateway", "curl -sf http://127.0.0.1:8080/readyz")?;
    lab.end_gateway()?;

    // What is missing is named, and is an error.
    lab.net
        .sh("gateway", "echo 0 > /proc/sys/net/ipv4/ip_forward")?;
    let (code, text) = check(&lab, "setpriv --bounding-set=-all,+net_admin", "65532")?;
    ensure!(code == Some(78), "{code:?} {text}");
    for wanted in [
        "error    forwarding_ipv4",
        // The line differs with where this runs.
        "sysctl",
        "warning  privileges",
    ] {
        ensure!(text.contains(wanted), "no {wanted:?}: {text}");
    }
    let (code, text) = check(&lab, "setpriv --bounding-set=-all", "none")?;
    ensure!(code == Some(78), "{code:?} {text}");
    ensure!(text.contains("CAP_NET_ADMIN is missing"), "{text}");
    lab.leaves_nothing()
}

#[test]
#[ignore = "needs root and network namespaces"]
fn strict_ends_where_something_is_missing_that_the_gateway_needs() -> Result<()> {
    for (name, prepare, wrapper, told) in [
        (
            "strict-forwarding",
            "echo 0 > /proc/sys/net/ipv4/ip_forward",
            CONTAINER,
            "net.ipv4.ip_forward=0",
        ),
        (
            "strict-net-admin",
            "true",
            &["setpriv", "--bounding-set=-all,+setuid,+setgid"][..],
            "CAP_NET_ADMIN is missing",
        ),
    ] {
        let mut lab = Lab::new(name, gateway())?;
        lab.net.sh("gateway", prepare)?;
        lab.start_gateway_under(wrapper, &[USER, ("FIREZONE_STRICT", "true")])?;
        let status = lab.net.wait("gateway", Duration::from_secs(5))?;
        let log = lab.net.whole_log("gateway");
        ensure!(status.code() == Some(78), "{status}\n{log}");
        ensure!(log.contains(told), "{log}");
        lab.leaves_nothing()?;
    }
    Ok(())
}
