//! The host configuration against a real kernel, in network namespaces of its own. Nothing outside
//! them is touched. What the gateway made is read back with `ip` and `nft`.
//!
//! `cargo nextest run --run-ignored only --test host_netns`, as root.

#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use firezone_gateway::device::{DeviceError, Options, Tun};
use firezone_gateway::host::network::{Configured, Network, NetworkError};
use firezone_gateway::host::nft::{self, NftError};
use firezone_gateway::host::preflight::{self, Check, Environment, Level, Nftables};
use rustix::thread::{CapabilitySet, UnshareFlags};
use serde_json::{Value, json};

const TUN: &str = "tun-firezone";
const V4: Ipv4Addr = Ipv4Addr::new(100, 64, 1, 2);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0, 0, 0, 1, 2);
/// How `ip` shows the number of our routing table.
const TABLE: &str = "539098368";

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own. Whatever it starts and opens is in there too, and
/// all of it vanishes with the thread.
struct Namespace {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    thread_id: i32,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (started, start) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: NEWNET gives this thread another network stack and leaves its file
            // descriptors shared, which is what makes unsharing dangerous otherwise.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
                .expect("a network namespace needs root");
            sh("ip link set lo up");
            started
                .send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            for job in queue {
                job();
            }
        });
        let thread_id = start.recv().expect("the thread did not start");
        Self {
            jobs: Some(jobs),
            thread: Some(thread),
            thread_id,
        }
    }

    /// Runs `job` in the namespace; a panic of it is one of the caller.
    fn run<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
        let (done, result) = mpsc::channel();
        self.jobs
            .as_ref()
            .unwrap()
            .send(Box::new(move || {
                let _ = done.send(catch_unwind(AssertUnwindSafe(job)));
            }))
            .unwrap();
        match result.recv().unwrap() {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[track_caller]
fn sh(command: &str) -> String {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Output of a command as JSON; tools that find nothing may print nothing.
#[track_caller]
fn json_of(command: &str) -> Value {
    let output = sh(command);
    if output.trim().is_empty() {
        return json!([]);
    }
    serde_json::from_str(&output).unwrap()
}

fn sysctl(name: &str, value: &str) {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    std::fs::write(path, value).unwrap();
}

fn make_tun() -> tun::Device {
    let mut config = tun::Configuration::default();
    config.tun_name(TUN);
    tun::create(&config).unwrap()
}

/// Runs something with a [`Network`] of the present namespace.
fn with_network<R>(job: impl AsyncFnOnce(&Network) -> R) -> R {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async { job(&Network::new().unwrap()).await })
}

fn configure(v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Configured, NetworkError> {
    with_network(async |network| network.configure(TUN, v4, v6).await)
}

/// The addresses of the device, as "address/prefix".
fn addresses() -> Vec<String> {
    let links = json_of(&format!("ip -j address show dev {TUN}"));
    let mut addresses: Vec<String> = links[0]["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| format!("{}/{}", a["local"].as_str().unwrap(), a["prefixlen"]))
        .collect();
    addresses.sort();
    addresses
}

/// Destination and device of every route in our table.
fn routes(family: &str) -> Vec<(String, String)> {
    // Asking for a table that does not exist is an error of the tool.
    let all = json_of(&format!("ip -j {family} route show table all"));
    all.as_array()
        .unwrap()
        .iter()
        .filter(|route| route["table"] == TABLE)
        .map(|route| {
            let text = |key: &str| route[key].as_str().unwrap().to_owned();
            (text("dst"), text("dev"))
        })
        .collect()
}

fn rules(family: &str) -> Vec<Value> {
    json_of(&format!("ip -j {family} rule show"))
        .as_array()
        .unwrap()
        .clone()
}

/// The rule set without numbers that the kernel gives.
fn ruleset() -> Vec<Value> {
    let mut items = json_of("nft -j list ruleset")["nftables"]
        .as_array()
        .unwrap()
        .clone();
    items.retain(|item| item.get("metainfo").is_none());
    for item in &mut items {
        for kind in ["table", "chain", "rule"] {
            if let Some(object) = item.get_mut(kind).and_then(Value::as_object_mut) {
                object.remove("handle");
            }
        }
    }
    items
}

fn our_ruleset() -> Vec<Value> {
    let match_name = |op: &str, key: &str| json!({"match": {"op": op, "left": {"meta": {"key": key}}, "right": TUN}});
    let masquerade = |protocol: &str, network: &str, length: u8| {
        json!({"rule": {
            "family": "inet", "table": "firezone_gateway", "chain": "postrouting",
            "expr": [
                {"match": {
                    "op": "==",
                    "left": {"payload": {"protocol": protocol, "field": "saddr"}},
                    "right": {"prefix": {"addr": network, "len": length}},
                }},
                match_name("!=", "oifname"),
                {"masquerade": null},
            ],
        }})
    };
    let accept = |key: &str| {
        json!({"rule": {
            "family": "inet", "table": "firezone_gateway", "chain": "forward",
            "expr": [match_name("==", key), {"accept": null}],
        }})
    };
    let chain = |name: &str, kind: &str, hook: &str, priority: i32| {
        json!({"chain": {
            "family": "inet", "table": "firezone_gateway", "name": name,
            "type": kind, "hook": hook, "prio": priority, "policy": "accept",
        }})
    };
    vec![
        json!({"table": {"family": "inet", "name": "firezone_gateway"}}),
        chain("postrouting", "nat", "postrouting", 100),
        chain("forward", "filter", "forward", 0),
        masquerade("ip", "100.64.0.0", 11),
        masquerade("ip6", "fd00:2021:1111::", 107),
        accept("iifname"),
        accept("oifname"),
    ]
}

#[track_caller]
fn assert_same_items(found: &[Value], wanted: &[Value]) {
    for item in wanted {
        assert!(found.contains(item), "{item} not in {found:#?}");
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
#[ignore = "needs root and network namespaces"]
fn configuring_twice_leaves_exactly_the_wanted_addresses_routes_and_rules() {
    Namespace::new().run(|| {
        let rules_before = [rules("-4"), rules("-6")];
        let _tun = make_tun();
        for _ in 0..2 {
            let configured = configure(V4, V6).unwrap();
            assert_eq!((configured.v4, configured.v6), (Ok(()), Ok(())));
        }

        let link = &json_of(&format!("ip -j -d link show dev {TUN}"))[0];
        assert!(
            link["flags"].as_array().unwrap().contains(&json!("UP")),
            "{link}"
        );
        assert_eq!(link["txqlen"], 10_000);
        assert_eq!(link["inet6_addr_gen_mode"], "none");
        assert_eq!(addresses(), ["100.64.1.2/32", "fd00:2021:1111::1:2/128"]);
        assert_eq!(routes("-4"), [("100.64.0.0/11".to_owned(), TUN.to_owned())]);
        assert_eq!(
            routes("-6"),
            [("fd00:2021:1111::/107".to_owned(), TUN.to_owned())]
        );
        for (family, before) in ["-4", "-6"].into_iter().zip(&rules_before) {
            let mut now = rules(family);
            let ours: Vec<Value> = now.extract_if(.., |rule| rule["priority"] == 100).collect();
            assert_eq!(ours.len(), 1, "{ours:?}");
            assert_eq!(ours[0]["fwmark"], "0xfd002021", "{ours:?}");
            assert_eq!(ours[0]["table"], TABLE, "{ours:?}");
            assert!(ours[0].get("not").is_some(), "{ours:?}");
            assert_eq!(&now, before);
        }

        with_network(async |network| {
            network.cleanup().await.unwrap();
            assert_eq!([rules("-4"), rules("-6")], rules_before);
            assert!(routes("-4").is_empty() && routes("-6").is_empty());
            // Nothing left to remove is no error.
            network.cleanup().await.unwrap();
        });
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn new_addresses_replace_the_old_ones_and_strangers() {
    Namespace::new().run(|| {
        let _tun = make_tun();
        // Up first, so that the kernel makes a link-local address.
        sh(&format!("ip link set {TUN} up"));
        sh(&format!("ip address add 192.0.2.1/24 dev {TUN}"));
        sh(&format!("ip address add 2001:db8::1/64 dev {TUN} nodad"));
        assert!(addresses().iter().any(|a| a.starts_with("fe80:")));
        configure(V4, V6).unwrap();
        assert_eq!(addresses(), ["100.64.1.2/32", "fd00:2021:1111::1:2/128"]);

        configure(
            Ipv4Addr::new(100, 95, 255, 254),
            "fd00:2021:1111::1f:ffff".parse().unwrap(),
        )
        .unwrap();
        assert_eq!(
            addresses(),
            ["100.95.255.254/32", "fd00:2021:1111::1f:ffff/128"]
        );
        assert_eq!((routes("-4").len(), routes("-6").len()), (1, 1));
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn routes_follow_a_device_that_was_made_anew() {
    Namespace::new().run(|| {
        let first = make_tun();
        configure(V4, V6).unwrap();
        drop(first);
        assert!(routes("-4").is_empty() && routes("-6").is_empty());
        let _second = make_tun();
        configure(V4, V6).unwrap();
        assert_eq!((routes("-4").len(), routes("-6").len()), (1, 1));
        let ours = |rule: &Value| rule["priority"] == 100;
        assert_eq!(rules("-4").iter().filter(|rule| ours(rule)).count(), 1);
        assert_eq!(rules("-6").iter().filter(|rule| ours(rule)).count(), 1);
    });
}

fn device(queues: usize) -> Result<Tun, DeviceError> {
    let options = Options {
        queues,
        tso: true,
        uso: true,
    };
    Tun::create(TUN, options)
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_device_that_another_gateway_holds_is_not_shared() {
    Namespace::new().run(|| {
        for held in [1, 3] {
            let first = device(held).unwrap();
            assert_eq!(first.queues().len(), held);
            for wanted in [1, 2] {
                let second = device(wanted).err();
                assert!(
                    matches!(&second, Some(DeviceError::Busy(name)) if name == TUN),
                    "{held} {wanted}: {second:?}"
                );
            }
        }
        assert!(device(2).is_ok(), "nobody holds it any more");
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_device_that_was_made_to_stay_is_used() {
    Namespace::new().run(|| {
        sh(&format!("ip tuntap add dev {TUN} mode tun"));
        let tun = device(2).unwrap();
        assert_eq!(tun.queues().len(), 1);
        assert!(matches!(device(1), Err(DeviceError::Busy(_))));
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn ipv6_switched_off_leaves_ipv4_working_and_says_why() {
    Namespace::new().run(|| {
        sysctl("net.ipv6.conf.all.disable_ipv6", "1");
        let _tun = make_tun();
        let configured = configure(V4, V6).unwrap();
        assert_eq!(configured.v4, Ok(()));
        let reason = configured.v6.unwrap_err();
        assert!(reason.contains("disable_ipv6"), "{reason}");
        assert_eq!(addresses(), ["100.64.1.2/32"]);
        assert_eq!(routes("-4").len(), 1);
        with_network(async |network| network.cleanup().await.unwrap());
        assert!(routes("-4").is_empty());
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn missing_device_is_named() {
    Namespace::new().run(|| {
        let error = configure(V4, V6).unwrap_err();
        assert!(
            matches!(&error, NetworkError::NoSuchLink { link, .. } if link == TUN),
            "{error}"
        );
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn missing_capability_is_named_without_waiting() {
    Namespace::new().run(|| {
        let _tun = make_tun();
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective -= CapabilitySet::NET_ADMIN;
        rustix::thread::set_capabilities(None, sets).unwrap();

        let start = Instant::now();
        assert!(matches!(nft::install(TUN), Err(NftError::NotPermitted)));
        assert!(matches!(nft::probe(TUN), Err(NftError::NotPermitted)));
        assert!(matches!(nft::is_installed(), Err(NftError::NotPermitted)));
        assert!(matches!(nft::remove(), Err(NftError::NotPermitted)));
        let error = configure(V4, V6).unwrap_err().to_string();
        assert!(error.contains("CAP_NET_ADMIN"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(2));
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn installing_twice_makes_exactly_our_table_and_removing_leaves_the_others() {
    Namespace::new().run(|| {
        sh("nft add table inet somebody_else");
        let others = ruleset();
        assert!(!nft::is_installed().unwrap());

        // A check alone changes nothing.
        nft::probe(TUN).unwrap();
        assert_eq!(ruleset(), others);

        for _ in 0..2 {
            nft::install(TUN).unwrap();
            assert!(nft::is_installed().unwrap());
            assert_same_items(&ruleset(), &[others.clone(), our_ruleset()].concat());
        }

        for _ in 0..2 {
            nft::remove().unwrap();
            assert!(!nft::is_installed().unwrap());
            assert_eq!(ruleset(), others);
        }
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_flush_by_somebody_else_is_noticed_and_repaired() {
    Namespace::new().run(|| {
        nft::install(TUN).unwrap();
        sh("nft flush ruleset");
        assert!(!nft::is_installed().unwrap());
        nft::install(TUN).unwrap();
        // Rules gone but chains still there.
        sh("nft flush table inet firezone_gateway");
        assert!(!nft::is_installed().unwrap());
        nft::install(TUN).unwrap();
        assert!(nft::is_installed().unwrap());
        assert_same_items(&ruleset(), &our_ruleset());
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn chains_of_others_that_drop_forwarded_packets_are_found_and_the_fix_works() {
    Namespace::new().run(|| {
        nft::install(TUN).unwrap();
        assert!(nft::forward_drops().unwrap().is_empty());
        for (family, chain, hook, policy) in [
            ("ip", "FORWARD", "forward", "drop"),
            ("inet", "in", "input", "drop"),
            ("inet", "passing", "forward", "accept"),
        ] {
            sh(&format!("nft add table {family} filter"));
            sh(&format!(
                "nft add chain {family} filter {chain} {{ type filter hook {hook} priority 0 ; policy {policy} ; }}"
            ));
        }
        assert_eq!(nft::forward_drops().unwrap(), ["ip filter FORWARD"]);

        let findings = preflight::run(&Environment {
            nftables: Nftables::Unused,
            may_make: false,
            ..Environment::of_this_host(std::env::temp_dir(), TUN)
        });
        let finding = findings
            .into_iter()
            .find(|finding| finding.check == Check::ForwardPolicy)
            .unwrap();
        assert_eq!(finding.level, Level::Warning);
        let commands = finding.fix.unwrap().host;
        for command in commands.lines().filter(|line| !line.starts_with('#')) {
            sh(command);
        }
        let accepting = ruleset()
            .iter()
            .filter(|item| item["rule"]["table"] == "filter")
            .count();
        assert_eq!(accepting, 2);
    });
}

/// A UDP packet with the text as its payload.
fn udp(source: SocketAddr, destination: SocketAddr, text: &[u8]) -> Vec<u8> {
    let builder = match (source.ip(), destination.ip()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => PacketBuilder::ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => PacketBuilder::ipv6(s.octets(), d.octets(), 64),
        _ => unreachable!(),
    };
    let mut packet = Vec::new();
    builder
        .udp(source.port(), destination.port())
        .write(&mut packet, text)
        .unwrap();
    packet
}

/// Reads packets from the device until one is UDP; returns its ends and its payload.
fn read_udp(tun: &tun::Device) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let length = tun.recv_timeout(&mut buffer, left).unwrap();
        let packet = SlicedPacket::from_ip(&buffer[..length]).unwrap();
        let (source, destination): (IpAddr, IpAddr) = match &packet.net {
            Some(NetSlice::Ipv4(ip)) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            Some(NetSlice::Ipv6(ip)) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            _ => continue,
        };
        if let Some(TransportSlice::Udp(udp)) = packet.transport {
            return (
                SocketAddr::new(source, udp.source_port()),
                SocketAddr::new(destination, udp.destination_port()),
                udp.payload().to_vec(),
            );
        }
    }
}

/// client (the far side of the TUN device) ── gateway ── lan0 ── resource. The resource knows no
/// route to tunnel addresses, and the interface is named neither `e…` nor `w…`.
#[test]
#[ignore = "needs root and network namespaces"]
fn forwarded_packets_are_masqueraded_and_answers_find_back_into_the_tunnel() {
    let gateway = Namespace::new();
    let resource = Namespace::new();
    let resource_thread = resource.thread_id;
    let tun = gateway.run(move || {
        sh(&format!(
            "ip link add lan0 type veth peer name lan0 netns {resource_thread}"
        ));
        sh("ip address add 192.0.2.1/24 dev lan0");
        sh("ip address add 2001:db8::1/64 dev lan0 nodad");
        sh("ip link set lan0 up");
        sysctl("net.ipv4.ip_forward", "1");
        sysctl("net.ipv6.conf.all.forwarding", "1");
        let tun = make_tun();
        let configured = configure(V4, V6).unwrap();
        assert_eq!((configured.v4, configured.v6), (Ok(()), Ok(())));
        tun
    });
    resource.run(|| {
        sh("ip address add 192.0.2.2/24 dev lan0");
        sh("ip address add 2001:db8::2/64 dev lan0 nodad");
        sh("ip link set lan0 up");
        // So that the resource sees packets to whose source it has no route.
        sysctl("net.ipv4.conf.all.rp_filter", "0");
        sysctl("net.ipv4.conf.lan0.rp_filter", "0");
    });

    for (client, server, masqueraded) in [
        ("100.64.7.1", "192.0.2.2", "192.0.2.1"),
        ("fd00:2021:1111::7:1", "2001:db8::2", "2001:db8::1"),
    ] {
        let [client, server, masqueraded]: [IpAddr; 3] =
            [client, server, masqueraded].map(|ip| ip.parse().unwrap());
        let server = SocketAddr::new(server, 9999);
        let socket = resource.run(move || {
            let socket = UdpSocket::bind(server).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            socket
        });
        let mut buffer = [0; 64];

        // Without the rules the resource sees the tunnel address: the test can fail.
        gateway.run(|| nft::remove().unwrap());
        let plain = SocketAddr::new(client, 4000);
        tun.send(&udp(plain, server, b"plain")).unwrap();
        let (length, source) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], source), (&b"plain"[..], plain));

        // Another port, since the kernel keeps what it decided for a flow.
        gateway.run(|| nft::install(TUN).unwrap());
        let client = SocketAddr::new(client, 4001);
        tun.send(&udp(client, server, b"ping")).unwrap();
        let (length, source) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..length], source.ip()),
            (&b"ping"[..], masqueraded)
        );

        socket.send_to(b"pong", source).unwrap();
        assert_eq!(read_udp(&tun), (server, client, b"pong".to_vec()));
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn missing_tun_device_is_made_and_the_kernel_takes_the_rules() {
    Namespace::new().run(|| {
        let root = tempfile::tempdir().unwrap();
        let findings = preflight::run(&Environment {
            root: root.path().to_owned(),
            ..Environment::of_this_host("/var/lib/firezone", TUN)
        });
        for check in [Check::TunDevice, Check::Nftables, Check::ForwardPolicy] {
            let finding = findings.iter().find(|f| f.check == check).unwrap();
            assert_eq!(finding.level, Level::Ok, "{finding:?}");
        }
        assert!(root.path().join("dev/net/tun").exists());
        assert!(ruleset().is_empty());
    });
}
