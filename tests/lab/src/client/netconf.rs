//! Addresses, routes and rules by running iproute2, on a thread of its own so that packets do not
//! wait for it.

use std::net::IpAddr;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};

use ip_network::IpNetwork;

use super::core::NetworkConfig;

/// Mark of our own sockets: they never use the tunnel (data-path spec §7.1).
pub const FWMARK: u32 = 0xfd00_2021;
/// Table with the routes of resources.
const TABLE: u32 = 0x2021_fd00;
/// Table with the default route.
const TABLE_DEFAULT: u32 = 0x2021_fd02;
const PRIORITY_ROUTES: u32 = 100;
const PRIORITY_MAIN: u32 = 200;
const PRIORITY_DEFAULT: u32 = 300;

/// Starts the thread; it ends, taking its rules along, when the sender is dropped.
///
/// # Errors
/// If no thread can be started.
pub fn spawn(tun: String) -> std::io::Result<(Sender<NetworkConfig>, std::thread::JoinHandle<()>)> {
    let (sender, receiver) = channel();
    let thread = std::thread::Builder::new()
        .name("netconf".into())
        .spawn(move || work(&tun, &receiver))?;
    Ok((sender, thread))
}

fn work(tun: &str, receiver: &Receiver<NetworkConfig>) {
    // Replies to marked sockets must pass reverse path filtering with the mark.
    let sysctl = "/proc/sys/net/ipv4/conf/all/src_valid_mark";
    if let Err(error) = std::fs::write(sysctl, "1") {
        tracing::debug!(%error, "cannot set {sysctl}");
    }
    let mut applied: Option<NetworkConfig> = None;
    while let Ok(wanted) = receiver.recv() {
        for command in commands(tun, applied.as_ref(), &wanted) {
            run(&command);
        }
        applied = Some(wanted);
    }
    for command in rule_commands("del") {
        run(&command);
    }
}

fn run(command: &[String]) {
    match Command::new("ip").args(command).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => tracing::warn!(
            command = command.join(" "),
            error = String::from_utf8_lossy(&output.stderr).trim(),
            "ip failed"
        ),
        Err(error) => tracing::error!(%error, "cannot run ip"),
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn rule_commands(verb: &str) -> Vec<Vec<String>> {
    ["-4", "-6"]
        .iter()
        .flat_map(|family| {
            let rule = format!("{family} rule {verb} not fwmark {FWMARK:#x}");
            [
                words(&format!("{rule} lookup {TABLE} pref {PRIORITY_ROUTES}")),
                words(&format!(
                    "{rule} lookup main suppress_prefixlength 0 pref {PRIORITY_MAIN}"
                )),
                words(&format!(
                    "{rule} lookup {TABLE_DEFAULT} pref {PRIORITY_DEFAULT}"
                )),
            ]
        })
        .collect()
}

fn route(verb: &str, tun: &str, network: IpNetwork, wanted: &NetworkConfig) -> Vec<String> {
    let source: IpAddr = match network {
        IpNetwork::V4(_) => wanted.interface.ipv4.into(),
        IpNetwork::V6(_) => wanted.interface.ipv6.into(),
    };
    words(&format!(
        "route {verb} {network} dev {tun} table {TABLE} src {source}"
    ))
}

/// The `ip` invocations that lead from one configuration to the next.
fn commands(tun: &str, from: Option<&NetworkConfig>, to: &NetworkConfig) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    let same_addresses = from.is_some_and(|f| f.interface == to.interface);
    if !same_addresses {
        if from.is_some() {
            out.push(words(&format!("address flush dev {tun}")));
        }
        let (v4, v6) = (to.interface.ipv4, to.interface.ipv6);
        out.push(words(&format!("address replace {v4}/32 dev {tun}")));
        out.push(words(&format!(
            "-6 address replace {v6}/128 dev {tun} nodad"
        )));
        out.push(words(&format!("link set dev {tun} up")));
    }
    if from.is_none() {
        out.extend(rule_commands("add"));
    }
    // Flushing an address takes the routes that name it along.
    let kept = from.filter(|_| same_addresses);
    for network in kept.iter().flat_map(|f| f.routes.difference(&to.routes)) {
        out.push(route("del", tun, *network, to));
    }
    for network in &to.routes {
        if kept.is_none_or(|f| !f.routes.contains(network)) {
            out.push(route("replace", tun, *network, to));
        }
    }
    let had_default = kept.is_some_and(|f| f.default_route);
    if to.default_route != had_default {
        let verb = if to.default_route { "replace" } else { "del" };
        for family in ["-4", "-6"] {
            out.push(words(&format!(
                "{family} route {verb} default dev {tun} table {TABLE_DEFAULT}"
            )));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::client::messages::Interface;
    use std::collections::BTreeSet;

    fn config(routes: &[&str], default_route: bool) -> NetworkConfig {
        NetworkConfig {
            interface: Interface {
                ipv4: "100.70.1.5".parse().unwrap(),
                ipv6: "fd00:2021:1111::1:5".parse().unwrap(),
            },
            routes: routes
                .iter()
                .map(|r| r.parse().unwrap())
                .collect::<BTreeSet<_>>(),
            default_route,
        }
    }

    fn joined(commands: Vec<Vec<String>>) -> Vec<String> {
        commands.into_iter().map(|c| c.join(" ")).collect()
    }

    #[test]
    fn first_configuration_sets_addresses_rules_and_routes() {
        let commands = joined(commands("tun0", None, &config(&["10.0.0.0/8"], false)));
        assert_eq!(commands[0], "address replace 100.70.1.5/32 dev tun0");
        assert!(
            commands.contains(
                &"-4 rule add not fwmark 0xfd002021 lookup 539098368 pref 100".to_owned()
            )
        );
        assert_eq!(
            commands.last().unwrap(),
            "route replace 10.0.0.0/8 dev tun0 table 539098368 src 100.70.1.5"
        );
    }

    #[test]
    fn only_differences_are_applied() {
        let before = config(&["10.0.0.0/8", "10.9.0.0/16"], false);
        let after = config(&["10.0.0.0/8", "2001:db8::/32"], true);
        assert_eq!(
            joined(commands("tun0", Some(&before), &after)),
            [
                "route del 10.9.0.0/16 dev tun0 table 539098368 src 100.70.1.5",
                "route replace 2001:db8::/32 dev tun0 table 539098368 src fd00:2021:1111::1:5",
                "-4 route replace default dev tun0 table 539098370",
                "-6 route replace default dev tun0 table 539098370",
            ]
        );
        assert!(commands("tun0", Some(&after), &after).is_empty());
    }
}
