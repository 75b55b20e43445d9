#![allow(clippy::unwrap_used)]

use std::io;
use std::time::{Duration, UNIX_EPOCH};

use rustix::io::Errno;

use super::checks::{TunError, judge_nftables, judge_offloads, judge_tun_device};
use super::*;

/// The files of a host on which everything is as it should be, but for the TUN device.
const HEALTHY: &[(&str, &str)] = &[
    (
        "proc/self/status",
        "Name:\tfirezone-gateway\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nCapPrm:\t0000000000001000\nCapEff:\t0000000000001000\nCapBnd:\t0000000000001000\nNoNewPrivs:\t1\n",
    ),
    ("proc/sys/net/ipv4/ip_forward", "1\n"),
    ("proc/sys/net/ipv4/conf/all/rp_filter", "0\n"),
    ("proc/sys/net/ipv4/conf/default/rp_filter", "2\n"),
    ("proc/sys/net/ipv4/conf/all/src_valid_mark", "0\n"),
    ("proc/sys/net/ipv6/conf/all/forwarding", "1\n"),
    ("proc/sys/net/ipv6/conf/all/disable_ipv6", "0\n"),
    ("proc/sys/net/ipv6/conf/default/disable_ipv6", "0\n"),
    ("proc/sys/net/core/rmem_max", "16777216\n"),
    ("proc/sys/net/core/wmem_max", "16777216\n"),
    (
        "etc/resolv.conf",
        "# comment\nsearch example.com\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n",
    ),
];

struct Host(tempfile::TempDir);

impl Host {
    fn healthy() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for (path, content) in HEALTHY {
            host.write(path, content);
        }
        host
    }

    fn with(path: &str, content: &str) -> Self {
        let host = Self::healthy();
        host.write(path, content);
        host
    }

    fn without(path: &str) -> Self {
        let host = Self::healthy();
        let path = host.0.path().join(path);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
        host
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn environment(&self) -> Environment<'static> {
        Environment {
            root: self.0.path().to_owned(),
            now: UNIX_EPOCH + Duration::from_secs(1_800_000_000),
            nftables: Nftables::Known(&Ok(())),
            forward_policy: ForwardPolicy::Known(Vec::new()),
            may_make: false,
            ..Environment::of_this_host("/var/lib/firezone", "tun-firezone")
        }
    }

    fn finding(&self, check: Check) -> Finding {
        find(&self.environment(), check)
    }
}

fn find(environment: &Environment<'_>, check: Check) -> Finding {
    run(environment)
        .into_iter()
        .find(|finding| finding.check == check)
        .unwrap()
}

/// Asserts the level, a part of the finding, and the exact lines for the three platforms.
#[track_caller]
fn assert_finding(finding: &Finding, level: Level, found: &str, lines: [&str; 3]) {
    assert_eq!(finding.level, level, "{finding:?}");
    assert!(finding.found.contains(found), "{finding:?}");
    for (platform, line) in [Platform::Compose, Platform::Kubernetes, Platform::Host]
        .into_iter()
        .zip(lines)
    {
        let message = finding.message(platform);
        assert!(message.contains(line), "{line:?} not in {message:?}");
        assert!(message.contains(found), "{message:?}");
    }
}

#[track_caller]
fn assert_ok(finding: &Finding) {
    assert_eq!(
        (finding.level, &finding.fix),
        (Level::Ok, &None),
        "{finding:?}"
    );
}

#[test]
fn every_check_reports_once_and_a_healthy_host_needs_nothing() {
    let findings = run(&Host::healthy().environment());
    let checks: Vec<Check> = findings.iter().map(|finding| finding.check).collect();
    assert_eq!(checks, Check::ALL);
    for finding in findings {
        // The fake tree cannot hold a device.
        if finding.check != Check::TunDevice {
            assert_ok(&finding);
        }
    }
}

#[test]
fn missing_tun_device_names_the_devices_line() {
    assert_finding(
        &Host::healthy().finding(Check::TunDevice),
        Level::Error,
        "/dev/net/tun is missing",
        [
            r#"devices: ["/dev/net/tun:/dev/net/tun"]"#,
            "hostPath: {path: /dev/net/tun, type: CharDevice}",
            "DeviceAllow=/dev/net/tun rw",
        ],
    );
}

#[test]
fn file_in_place_of_the_tun_device_is_recognised() {
    let finding = Host::with("dev/net/tun", "").finding(Check::TunDevice);
    assert_eq!(finding.level, Level::Error);
    assert!(
        finding.found.contains("not the TUN device"),
        "{}",
        finding.found
    );
}

#[test]
fn tun_device_that_may_not_be_opened_names_the_devices_line() {
    let verdict = judge_tun_device(Err(TunError::Open(Errno::PERM.into())), false);
    assert_eq!(verdict.level, Level::Error);
    assert!(verdict.found.contains("cannot be opened"));
    assert_eq!(
        verdict.fix.unwrap().compose,
        r#"devices: ["/dev/net/tun:/dev/net/tun"]"#
    );
}

#[test]
fn tun_device_without_a_driver_names_the_module() {
    let verdict = judge_tun_device(Err(TunError::Open(Errno::NODEV.into())), false);
    assert_eq!(verdict.level, Level::Error);
    assert!(verdict.found.contains("no TUN driver"));
    assert!(verdict.fix.unwrap().compose.contains("modprobe tun"));
}

#[test]
fn usable_tun_device_needs_nothing() {
    for made in [false, true] {
        let verdict = judge_tun_device(Ok(()), made);
        assert_eq!(verdict.level, Level::Ok);
        assert_eq!(verdict.found.contains("has been made"), made);
    }
}

#[test]
fn missing_net_admin_names_the_cap_add_line() {
    let host = Host::with(
        "proc/self/status",
        "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nCapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n",
    );
    assert_finding(
        &host.finding(Check::NetAdmin),
        Level::Error,
        "CAP_NET_ADMIN is missing",
        [
            r#"cap_add: ["NET_ADMIN"]"#,
            r#"securityContext: {capabilities: {add: ["NET_ADMIN"]}}"#,
            "AmbientCapabilities=CAP_NET_ADMIN",
        ],
    );
}

#[test]
fn net_admin_out_of_reach_of_the_user_names_the_user_line() {
    let host = Host::with(
        "proc/self/status",
        "Uid:\t65532\t65532\t65532\t65532\nGid:\t0\t0\t0\t0\nCapEff:\t0000000000000000\nCapBnd:\t0000000000001000\n",
    );
    assert_finding(
        &host.finding(Check::NetAdmin),
        Level::Error,
        "runs as user 65532",
        [
            r#"user: "0:0""#,
            "runAsUser: 0",
            "AmbientCapabilities=CAP_NET_ADMIN",
        ],
    );
}

#[test]
fn unreadable_process_status_is_a_warning_not_an_error() {
    for host in [
        Host::without("proc/self/status"),
        Host::with("proc/self/status", "Uid:\t0\t0\t0\t0\n"),
    ] {
        assert_eq!(host.finding(Check::NetAdmin).level, Level::Warning);
        assert_ok(&host.finding(Check::Privileges));
    }
}

#[test]
fn ipv4_forwarding_off_is_an_error_with_the_sysctls_line() {
    assert_finding(
        &Host::with("proc/sys/net/ipv4/ip_forward", "0\n").finding(Check::ForwardingIpv4),
        Level::Error,
        "net.ipv4.ip_forward=0",
        [
            r#"sysctls: {net.ipv4.ip_forward: "1"}"#,
            r#"securityContext: {sysctls: [{name: net.ipv4.ip_forward, value: "1"}]}"#,
            "sysctl -w net.ipv4.ip_forward=1",
        ],
    );
    let unknown = Host::without("proc/sys/net/ipv4/ip_forward").finding(Check::ForwardingIpv4);
    assert_eq!(unknown.level, Level::Warning);
}

#[test]
fn ipv6_forwarding_off_is_a_warning_with_the_sysctls_line() {
    assert_finding(
        &Host::with("proc/sys/net/ipv6/conf/all/forwarding", "0\n").finding(Check::ForwardingIpv6),
        Level::Warning,
        "net.ipv6.conf.all.forwarding=0",
        [
            r#"sysctls: {net.ipv6.conf.all.forwarding: "1"}"#,
            r#"{name: net.ipv6.conf.all.forwarding, value: "1"}"#,
            "sysctl -w net.ipv6.conf.all.forwarding=1",
        ],
    );
}

#[test]
fn kernel_without_ipv6_is_one_warning_not_two() {
    let host = Host::without("proc/sys/net/ipv6");
    assert_ok(&host.finding(Check::ForwardingIpv6));
    assert_finding(
        &host.finding(Check::Ipv6Enabled),
        Level::Warning,
        "the kernel has no IPv6",
        ["ipv6.disable=1", "ipv6.disable=1", "ipv6.disable=1"],
    );
}

#[test]
fn strict_reverse_path_filter_wants_src_valid_mark() {
    let lines = [
        r#"sysctls: {net.ipv4.conf.all.src_valid_mark: "1"}"#,
        r#"{name: net.ipv4.conf.all.src_valid_mark, value: "1"}"#,
        "sysctl -w net.ipv4.conf.all.src_valid_mark=1",
    ];
    let host = Host::with("proc/sys/net/ipv4/conf/all/rp_filter", "1\n");
    host.write("proc/sys/net/ipv4/conf/default/rp_filter", "0\n");
    assert_finding(
        &host.finding(Check::SrcValidMark),
        Level::Warning,
        "rp_filter=1",
        lines,
    );
    host.write("proc/sys/net/ipv4/conf/all/src_valid_mark", "1\n");
    assert_ok(&host.finding(Check::SrcValidMark));
}

#[test]
fn loose_default_overrides_a_strict_reverse_path_filter() {
    // The kernel uses the larger value, and 2 is loose.
    assert_ok(
        &Host::with("proc/sys/net/ipv4/conf/all/rp_filter", "1\n").finding(Check::SrcValidMark),
    );
}

#[test]
fn ipv6_switched_off_names_the_sysctls_line() {
    for scope in ["all", "default"] {
        let path = format!("proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        assert_finding(
            &Host::with(&path, "1\n").finding(Check::Ipv6Enabled),
            Level::Warning,
            "disable_ipv6=1",
            [
                r#"sysctls: {net.ipv6.conf.all.disable_ipv6: "0"}"#,
                r#"{name: net.ipv6.conf.all.disable_ipv6, value: "0"}"#,
                "sysctl -w net.ipv6.conf.all.disable_ipv6=0",
            ],
        );
    }
}

#[test]
fn refused_nftables_names_the_capability_and_a_lacking_kernel_the_modules() {
    let refused = Some(&NftError::NotPermitted);
    let of_root = Host::healthy();
    let verdict = judge_nftables(&of_root.environment(), refused, false);
    assert_eq!(verdict.level, Level::Error);
    assert_eq!(verdict.fix.unwrap().compose, r#"cap_add: ["NET_ADMIN"]"#);
    // Granted, but not to this user: another line would change nothing.
    let of_another = Host::with(
        "proc/self/status",
        "Uid:\t65532\t65532\t65532\t65532\nGid:\t0\t0\t0\t0\nCapEff:\t0000000000000000\nCapBnd:\t0000000000001000\n",
    );
    let verdict = judge_nftables(&of_another.environment(), refused, false);
    assert!(verdict.fix.unwrap().compose.starts_with(r#"user: "0:0""#));

    let lacking = Err(NftError::Unsupported {
        step: "masquerade IPv4",
        source: io::Error::from_raw_os_error(95),
    });
    let host = Host::healthy();
    let mut environment = host.environment();
    environment.nftables = Nftables::Known(&lacking);
    assert_finding(
        &find(&environment, Check::Nftables),
        Level::Warning,
        "cannot masquerade IPv4",
        ["modprobe -a nf_tables nft_chain_nat nft_masq"; 3],
    );

    environment.nftables = Nftables::Unused;
    assert_ok(&find(&environment, Check::Nftables));
}

#[test]
fn firewall_that_drops_forwarded_packets_names_the_rules_to_insert() {
    let host = Host::healthy();
    let mut environment = host.environment();
    environment.forward_policy = ForwardPolicy::Known(vec!["ip filter FORWARD".to_owned()]);
    let finding = find(&environment, Check::ForwardPolicy);
    for key in ["iifname", "oifname"] {
        let line = format!("nft insert rule ip filter FORWARD {key} tun-firezone accept");
        assert_finding(&finding, Level::Warning, "ip filter FORWARD", [&line; 3]);
    }
}

#[test]
fn low_socket_buffer_limits_name_the_command_for_the_machine() {
    for (name, wanted) in [("rmem", "16777216"), ("wmem", "2097152")] {
        let line = format!("sysctl -w net.core.{name}_max={wanted}");
        assert_finding(
            &Host::with(&format!("proc/sys/net/core/{name}_max"), "212992\n")
                .finding(Check::UdpBuffers),
            Level::Warning,
            &format!("net.core.{name}_max=212992"),
            [&line; 3],
        );
    }
}

#[test]
fn invisible_socket_buffer_limits_are_no_finding() {
    assert_ok(&Host::without("proc/sys/net/core").finding(Check::UdpBuffers));
}

#[test]
fn clock_before_2024_is_an_error() {
    let host = Host::healthy();
    let mut environment = host.environment();
    for (now, reads) in [
        (UNIX_EPOCH, "1970-01-01T00:00:00Z"),
        (
            UNIX_EPOCH + Duration::from_secs(1_704_067_199),
            "2023-12-31T23:59:59Z",
        ),
        (UNIX_EPOCH - Duration::from_secs(1), "a time before 1970"),
    ] {
        environment.now = now;
        assert_finding(
            &find(&environment, Check::Clock),
            Level::Error,
            reads,
            ["timedatectl set-ntp true"; 3],
        );
    }
    environment.now = UNIX_EPOCH + Duration::from_secs(1_704_067_200);
    assert_ok(&find(&environment, Check::Clock));
}

#[test]
fn state_directory_is_made_and_left_empty() {
    let host = Host::healthy();
    let mut environment = host.environment();
    environment.may_make = true;
    assert_ok(&find(&environment, Check::StateDirectory));
    let directory = host.0.path().join("var/lib/firezone");
    assert_eq!(std::fs::read_dir(directory).unwrap().count(), 0);
}

#[test]
fn state_directory_that_cannot_be_written_names_the_volume() {
    // A file in the way stops root too, unlike permission bits.
    assert_finding(
        &Host::with("var/lib", "").finding(Check::StateDirectory),
        Level::Warning,
        "/var/lib/firezone cannot be written",
        [
            r#"volumes: ["firezone-gateway:/var/lib/firezone"]"#,
            "volumeMounts: [{name: state, mountPath: /var/lib/firezone}]",
            "StateDirectory=firezone",
        ],
    );
}

#[test]
fn missing_resolver_configuration_is_an_error_and_an_empty_one_a_warning() {
    let lines = [
        r#"dns: ["192.0.2.53"]"#,
        r#"dnsConfig: {nameservers: ["192.0.2.53"]}"#,
        "nameserver 192.0.2.53",
    ];
    assert_finding(
        &Host::without("etc/resolv.conf").finding(Check::ResolvConf),
        Level::Error,
        "/etc/resolv.conf cannot be read",
        lines,
    );
    assert_finding(
        &Host::with(
            "etc/resolv.conf",
            "search example.com\n#nameserver 192.0.2.1\n",
        )
        .finding(Check::ResolvConf),
        Level::Warning,
        "names no nameserver",
        lines,
    );
}

#[test]
fn nameservers_are_listed() {
    let finding = Host::healthy().finding(Check::ResolvConf);
    assert_eq!(finding.found, "nameservers: 192.0.2.1, 2001:db8::1");
}

#[test]
fn status_document_gets_name_level_and_the_compose_line() {
    let finding = Host::with("proc/sys/net/ipv4/ip_forward", "0\n").finding(Check::ForwardingIpv4);
    let status = HostFinding::from(&finding);
    assert_eq!(status.name, "forwarding_ipv4");
    assert_eq!(status.level, "error");
    assert_eq!(status.found, finding.found);
    assert_eq!(
        status.fix.as_deref(),
        Some(r#"sysctls: {net.ipv4.ip_forward: "1"}"#)
    );
    let pod = finding.to_status(Platform::Kubernetes);
    assert!(pod.fix.unwrap().starts_with("securityContext:"));
}

#[test]
fn names_in_the_status_document_match_the_serialised_ones() {
    for check in Check::ALL {
        assert_eq!(serde_json::to_value(check).unwrap(), check.as_str());
    }
    for level in [Level::Ok, Level::Warning, Level::Error] {
        assert_eq!(serde_json::to_value(level).unwrap(), level.as_str());
    }
}

#[test]
fn platform_is_guessed_from_what_the_runtime_leaves() {
    let host = Host::healthy();
    assert_eq!(Platform::detect(host.0.path()), Platform::Host);
    host.write(".dockerenv", "");
    assert_eq!(Platform::detect(host.0.path()), Platform::Compose);
    host.write(
        "etc/hosts",
        "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost\n",
    );
    assert_eq!(Platform::detect(host.0.path()), Platform::Kubernetes);
}

#[test]
fn rights_are_shown_and_root_that_was_to_be_left_names_the_capabilities() {
    let host = Host::with(
        "proc/self/status",
        "Uid:\t65532\t65532\t65532\t65532\nGid:\t65533\t65533\t65533\t65533\nCapEff:\t0000000000001000\nCapBnd:\t00000000000010c0\nNoNewPrivs:\t1\n",
    );
    let finding = host.finding(Check::Privileges);
    assert_ok(&finding);
    assert_eq!(
        finding.found,
        "user 65532, group 65533, capability NET_ADMIN, no_new_privs"
    );

    let host = Host::with(
        "proc/self/status",
        "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nCapEff:\t0000000000001080\nCapBnd:\t0000000000001080\nNoNewPrivs:\t0\n",
    );
    let mut environment = host.environment();
    let root = "user 0, group 0, capabilities SETUID, NET_ADMIN, no_new_privs not set";
    assert_eq!(find(&environment, Check::Privileges).found, root);
    environment.owner = Owner {
        wanted: Some(User {
            uid: 65532,
            gid: 65533,
        }),
        stays_root: Some("SETGID is missing"),
    };
    let finding = find(&environment, Check::Privileges);
    assert!(finding.found.starts_with(root), "{}", finding.found);
    assert_finding(
        &finding,
        Level::Warning,
        "does not become user 65532:65533, because SETGID is missing",
        [
            r#"cap_add: ["NET_ADMIN", "SETUID", "SETGID"]"#,
            r#"capabilities: {add: ["NET_ADMIN", "SETUID", "SETGID"]}"#,
            "AmbientCapabilities=CAP_NET_ADMIN",
        ],
    );
}

#[test]
fn a_device_that_is_open_or_to_be_made_is_not_looked_for() {
    let host = Host::healthy();
    let mut environment = host.environment();
    for known in [TunDevice::Open, TunDevice::ToBeMade] {
        environment.tun_device = known;
        assert_ok(&find(&environment, Check::TunDevice));
    }
}

#[test]
fn what_the_kernel_does_not_do_is_a_warning_unless_it_is_too_new_for_most() {
    let all = Offloads::ALL;
    let verdict = judge_offloads(all, all);
    assert_eq!(
        (verdict.level, verdict.found.as_str()),
        (Level::Ok, "the kernel has all")
    );
    let old = Offloads {
        tun_uso: false,
        ..all
    };
    let verdict = judge_offloads(all, old);
    assert_eq!(verdict.level, Level::Ok);
    assert!(verdict.found.contains("Linux 6.2"), "{}", verdict.found);
    let verdict = judge_offloads(all, Offloads::NONE);
    assert_eq!(verdict.level, Level::Warning);
    assert!(
        verdict
            .found
            .contains("not tun-tso, tun-uso, udp-gso, udp-gro"),
        "{}",
        verdict.found
    );
    assert!(verdict.fix.unwrap().host.contains("Linux 5.0"));
    // Nobody misses what was not wanted.
    assert_eq!(
        judge_offloads(Offloads::NONE, Offloads::NONE).level,
        Level::Ok
    );
    let host = Host::healthy();
    let mut environment = host.environment();
    environment.offloads = KernelOffloads::Known(Offloads::NONE);
    assert_eq!(find(&environment, Check::Offloads).level, Level::Warning);
}

const ROUTE: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth1\t0000630A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t00000000\t0114A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
";
const IPV6_ROUTE: &str = "\
00000000000000000000000000000000 00 00000000000000000000000000000000 00 20010db8002000000000000000000001 00000400 00000001 00000000 00000003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";

#[test]
fn way_out_that_is_too_narrow_for_full_packets_is_named() {
    let host = Host::with("proc/net/route", ROUTE);
    let mtu = |mtu: &str| {
        host.write("sys/class/net/eth0/mtu", mtu);
        // Not where a default route leads to.
        host.write("sys/class/net/eth1/mtu", "576\n");
        host.write("sys/class/net/lo/mtu", "16\n");
        host.finding(Check::Mtu)
    };
    let finding = mtu("1500\n");
    assert_ok(&finding);
    assert_eq!(finding.found, "eth0 takes 1500 bytes");
    assert_ok(&mtu("1344\n"));
    assert_finding(
        &mtu("1343\n"),
        Level::Warning,
        "eth0 takes packets of 1343 bytes, but full ones of the tunnel have 1344",
        [
            r#"driver_opts: {com.docker.network.driver.mtu: "1500"}"#,
            "MTU",
            "ip link set dev eth0 mtu 1500",
        ],
    );
    // The longer header counts where there is IPv6.
    host.write("proc/net/ipv6_route", IPV6_ROUTE);
    assert!(mtu("1344\n").found.contains("have 1364"));
    assert_ok(&mtu("1364\n"));
    assert_ok(&Host::healthy().finding(Check::Mtu));
}

#[test]
fn clock_that_differs_from_the_portals_is_a_warning() {
    let host = Host::healthy();
    let mut environment = host.environment();
    for (ahead, says) in [
        (31.0, "the clock is 31 s behind the portal's"),
        (-3600.4, "the clock is 3600 s ahead of the portal's"),
    ] {
        environment.portal_ahead = Some(ahead);
        assert_finding(
            &find(&environment, Check::Clock),
            Level::Warning,
            says,
            ["timedatectl set-ntp true"; 3],
        );
    }
    environment.portal_ahead = Some(-29.0);
    assert_ok(&find(&environment, Check::Clock));
}

#[test]
fn looking_alone_makes_nothing() {
    let host = Host::healthy();
    let environment = host.environment();
    let finding = find(&environment, Check::StateDirectory);
    assert_ok(&finding);
    assert!(
        finding.found.contains("is made at the start"),
        "{}",
        finding.found
    );
    run(&environment);
    for path in ["var", "dev"] {
        assert!(!host.0.path().join(path).exists(), "{path}");
    }
    // What is in the way of making it is in the way of the gateway, too.
    let host = Host::with("var/lib", "");
    let mut environment = host.environment();
    assert_eq!(
        find(&environment, Check::StateDirectory).level,
        Level::Warning
    );
    environment.state_handed_over = true;
    assert_ok(&find(&environment, Check::StateDirectory));
}

#[test]
fn limits_that_the_gateway_raises_itself_are_no_finding() {
    let host = Host::with("proc/sys/net/core/rmem_max", "212992\n");
    let mut environment = host.environment();
    environment.raises_buffers = true;
    let finding = find(&environment, Check::UdpBuffers);
    assert_ok(&finding);
    assert!(
        finding
            .found
            .contains("rmem_max=212992 is raised to 16777216"),
        "{}",
        finding.found
    );
    let left = std::fs::read_to_string(host.0.path().join("proc/sys/net/core/rmem_max"));
    assert_eq!(left.unwrap(), "212992\n");
}

#[test]
fn lines_to_add_for_several_platforms_are_told_apart() {
    let host = Host::with("proc/sys/net/ipv4/ip_forward", "0\n");
    let environment = host.environment();
    let findings = [find(&environment, Check::ForwardingIpv4)];
    let lines = |platforms: &[Platform]| -> Vec<String> {
        let text = render(&findings, platforms);
        text.lines().skip(1).map(str::to_owned).collect()
    };
    let host_line = lines(&[Platform::Host]);
    assert!(host_line[0].starts_with("           | sysctl -w net.ipv4.ip_forward=1"));
    let all = lines(&Platform::ALL);
    for (line, (platform, told)) in all.iter().zip([
        ("compose", "sysctls: "),
        ("kubernetes", "securityContext: "),
        ("host", "sysctl -w "),
    ]) {
        assert_eq!(line.find('|'), Some(11), "{line}");
        assert_eq!(line[..10].trim(), platform, "{line}");
        assert!(line[13..].starts_with(told), "{line}");
    }
    assert_eq!(all.len(), 3);
}
