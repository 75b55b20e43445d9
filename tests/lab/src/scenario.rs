//! The lab in network namespaces: portal, trace collector and relay on "the internet", a client
//! and a gateway each behind a NAT router, a resource behind the gateway that knows no way back to
//! the tunnel's addresses.
//!
//! ```text
//!   client ── router-c ──┐                        ┌── router-g ── gateway ── resource
//!  192.168.10.2      203.0.113.10            203.0.113.20    192.168.20.2   10.99.0.2
//!                        └──── internet (portal, relay, collector) ────┘
//!                                     203.0.113.1
//! ```
//!
//! There is IPv6 only when asked for ([`Lab::add_v6`]), and then without NAT.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::netns::Net;
use crate::traffic::page;

/// Address of portal, relay and collector.
pub const INTERNET: &str = "203.0.113.1";
/// Address of the second relay.
pub const SECOND_RELAY: &str = "203.0.113.2";
/// The client's public address where there is NAT.
pub const CLIENT_PUBLIC: &str = "203.0.113.10";
/// Portal and relay, IPv6.
pub const INTERNET_V6: &str = "2001:db8::1";
/// The second relay, IPv6.
pub const SECOND_RELAY_V6: &str = "2001:db8::2";
/// The client's router.
pub const CLIENT_ROUTER: &str = "router-c";
/// The gateway's router.
pub const GATEWAY_ROUTER: &str = "router-g";
/// The resource, IPv4.
pub const RESOURCE_V4: &str = "10.99.0.2";
/// The resource, IPv6.
pub const RESOURCE_V6: &str = "fd99::2";
/// The gateway's address towards the resource; what the resource sees when masquerading works.
pub const GATEWAY_V4: &str = "10.99.0.1";
/// Likewise for IPv6.
pub const GATEWAY_V6: &str = "fd99::1";
/// Token of the lab's gateway.
pub const GATEWAY_TOKEN: &str = ".lab-gateway-token-000000";
/// Resource id of the IPv4 network.
pub const NETWORK_V4_ID: &str = "5b5b5b5b-0000-4000-8000-000000000001";
/// Resource id of the name `web.lab.example`: TCP port 80 and ICMP.
pub const WEB_ID: &str = "5b5b5b5b-0000-4000-8000-000000000004";
/// Resource id of the names `**.corp.example`: everything.
pub const CORP_ID: &str = "5b5b5b5b-0000-4000-8000-000000000006";
/// Resource id of the internet.
pub const INTERNET_ID: &str = "5b5b5b5b-0000-4000-8000-000000000007";
/// Resource id of the IPv6 network.
pub const NETWORK_V6_ID: &str = "5b5b5b5b-0000-4000-8000-000000000002";

/// The client's token.
pub const CLIENT_TOKEN: &str = "lab-client-token";
/// What the relays' credentials are made of.
pub const RELAY_SECRET: &str = "lab-relay-secret";

const POLICY: &str = r#"
account_slug: lab
authorization_ttl: 28800
sites:
  - {id: 5a5a5a5a-0000-4000-8000-000000000001, name: Lab}
gateway_tokens:
  - {token: ".lab-gateway-token-000000", site: Lab}
client_tokens:
  - token: "lab-client-token"
    actor: {id: 5c5c5c5c-0000-4000-8000-000000000001, name: Ada, email: ada@example.net}
resources:
  - {id: 5b5b5b5b-0000-4000-8000-000000000001, type: cidr, name: Network, address: 10.99.0.0/24}
  - {id: 5b5b5b5b-0000-4000-8000-000000000002, type: cidr, name: Network v6, address: "fd99::/64"}
  - id: 5b5b5b5b-0000-4000-8000-000000000003
    type: cidr
    name: Filtered
    address: 10.98.0.2/32
    filters: [{protocol: tcp, ports: [80]}]
  - id: 5b5b5b5b-0000-4000-8000-000000000004
    type: dns
    name: Web
    address: web.lab.example
    filters: [{protocol: tcp, ports: [80]}, {protocol: icmp}]
  - id: 5b5b5b5b-0000-4000-8000-000000000005
    type: dns
    name: Api
    address: api.lab.example
    filters: [{protocol: tcp, ports: [8080]}]
  - {id: 5b5b5b5b-0000-4000-8000-000000000006, type: dns, name: Corp, address: "**.corp.example"}
  - {id: 5b5b5b5b-0000-4000-8000-000000000007, type: internet}
relays:
  - {id: 5d5d5d5d-0000-4000-8000-000000000001, v4: "203.0.113.1:3478", secret: lab-relay-secret, realm: firezone}
dns: {}
"#;

/// What a router does with the addresses and ports of those behind it (IPv4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// One public port per port inside, as home routers do, and only those who were sent something
    /// may answer: mapping independent of the endpoint, filtering by address and port (RFC 4787).
    PortPreserving,
    /// Another public port for each destination; nobody can be told in advance which.
    Symmetric,
}

impl Nat {
    /// Replaces a router's rules. Unsolicited datagrams are dropped silently: were they let in to
    /// the router itself, connection tracking would remember them, and the flow that punches the
    /// hole from inside would be given another port.
    fn rules(self) -> String {
        let flags = match self {
            Nat::PortPreserving => "",
            Nat::Symmetric => " random,fully-random",
        };
        format!(
            "table inet lab
delete table inet lab
table inet lab {{
  chain input {{ type filter hook input priority filter; iifname \"wan\" meta l4proto udp drop; }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    oifname \"wan\" meta nfproto ipv4 masquerade{flags};
  }}
  chain forward {{ type filter hook forward priority filter; policy accept; }}
}}
"
        )
    }
}

/// A running lab.
pub struct Lab {
    /// The namespaces.
    pub net: Net,
    gateway: PathBuf,
    bins: PathBuf,
    v6: bool,
}

impl Lab {
    /// Builds the namespaces. `gateway` is the binary under test; the lab's own binaries lie
    /// beside it, or in `FIREZONE_LAB_BIN_DIR`.
    ///
    /// # Errors
    /// When a namespace or link cannot be made, or a binary is missing.
    pub fn new(name: &str, gateway: &Path) -> Result<Self> {
        match std::env::var_os("FIREZONE_LAB_BIN_DIR") {
            Some(dir) => Self::of(name, &PathBuf::from(dir).join("firezone-gateway")),
            None => Self::of(name, gateway),
        }
    }

    /// As [`Self::new`], with this very binary under test: others may know no faults.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of(name: &str, gateway: &Path) -> Result<Self> {
        let gateway = gateway.to_owned();
        let bins = match std::env::var_os("FIREZONE_LAB_BIN_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => gateway.parent().context("no directory")?.to_owned(),
        };
        for bin in ["lab-portal", "lab-client", "lab-web", "lab-collector"] {
            ensure!(
                bins.join(bin).exists(),
                "{} is missing; build it: cargo build --workspace --bins",
                bins.join(bin).display()
            );
        }
        let mut net = Net::new(name)?;
        net.host("internet")?;
        net.sh(
            "internet",
            "ip link add br0 type bridge && ip addr add 203.0.113.1/24 dev br0 && ip link set br0 up",
        )?;
        for (router, host, public, lan) in [
            (CLIENT_ROUTER, "client", CLIENT_PUBLIC, "192.168.10"),
            (GATEWAY_ROUTER, "gateway", "203.0.113.20", "192.168.20"),
        ] {
            net.router(router)?;
            net.host(host)?;
            let port = format!("p-{router}");
            let public = format!("{public}/24");
            net.link(("internet", &port, &[]), (router, "wan", &[&public]))?;
            net.sh("internet", &format!("ip link set {port} master br0"))?;
            let (inside, own) = (format!("{lan}.1/24"), format!("{lan}.2/24"));
            net.link((router, "lan", &[&inside]), (host, "eth0", &[&own]))?;
            net.sh(host, &format!("ip route add default via {lan}.1"))?;
            net.nft(router, &Nat::PortPreserving.rules())?;
        }
        net.sh(
            "gateway",
            "echo 1 > /proc/sys/net/ipv4/ip_forward; \
             echo 1 > /proc/sys/net/ipv4/conf/all/src_valid_mark; \
             echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
        )?;
        net.host("resource")?;
        net.link(
            ("gateway", "eth1", &["10.99.0.1/24", "fd99::1/64"]),
            ("resource", "eth0", &["10.99.0.2/24", "fd99::2/64"]),
        )?;
        net.sh("gateway", "ip route add 10.98.0.2/32 via 10.99.0.2")?;
        net.sh("resource", "ip addr add 10.98.0.2/32 dev lo")?;
        std::fs::write(net.dir().join("policy.yaml"), POLICY)?;
        Ok(Self {
            net,
            gateway,
            bins,
            v6: false,
        })
    }

    /// Puts another kind of NAT on a router, in place of all its rules.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn set_nat(&self, router: &str, nat: Nat) -> Result<()> {
        self.net.nft(router, &nat.rules())
    }

    /// Gives the gateway a public address, which its router only forwards to. Before it starts.
    ///
    /// # Errors
    /// When a program fails.
    pub fn no_nat_for_gateway(&self) -> Result<()> {
        self.net.sh(
            GATEWAY_ROUTER,
            "ip addr add 198.51.100.1/24 dev lan && nft flush chain inet lab postrouting",
        )?;
        self.net.sh(
            "gateway",
            "ip addr flush dev eth0 && ip addr add 198.51.100.2/24 dev eth0 && \
             ip route add default via 198.51.100.1",
        )?;
        for host in ["internet", CLIENT_ROUTER] {
            self.net
                .sh(host, "ip route add 198.51.100.0/24 via 203.0.113.20")?;
        }
        Ok(())
    }

    /// Gives every host a public IPv6 address, too, and lets everything be found over IPv6. Before
    /// anything starts.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn add_v6(&mut self) -> Result<()> {
        self.v6 = true;
        self.net.sh(
            "internet",
            &format!(
                "ip addr add {INTERNET_V6}/64 dev br0 nodad && \
                 ip route add 2001:db8:10::/64 via 2001:db8::10 && \
                 ip route add 2001:db8:20::/64 via 2001:db8::20"
            ),
        )?;
        for (router, host, this, other) in [
            (CLIENT_ROUTER, "client", 10, 20),
            (GATEWAY_ROUTER, "gateway", 20, 10),
        ] {
            self.net.sh(
                router,
                &format!(
                    "ip addr add 2001:db8::{this}/64 dev wan nodad && \
                     ip addr add 2001:db8:{this}::1/64 dev lan nodad && \
                     ip route add 2001:db8:{other}::/64 via 2001:db8::{other}"
                ),
            )?;
            self.net.sh(
                host,
                &format!(
                    "ip addr add 2001:db8:{this}::2/64 dev eth0 nodad && \
                     ip route add default via 2001:db8:{this}::1"
                ),
            )?;
        }
        Ok(())
    }

    /// Adds rules to what a router forwards, in order.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn firewall(&self, router: &str, rules: &[&str]) -> Result<()> {
        for rule in rules {
            self.net
                .sh(router, &format!("nft add rule inet lab forward {rule}"))?;
        }
        Ok(())
    }

    /// The internet's address in URLs.
    fn internet(&self) -> String {
        if self.v6 {
            format!("[{INTERNET_V6}]")
        } else {
            INTERNET.to_owned()
        }
    }

    fn lab(&mut self, name: &str, host: &str, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
        let program = self.bins.join(name);
        self.net.start(name, host, &program, args, env)
    }

    /// Starts the portal; what it hands out survives a restart.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_portal(&mut self) -> Result<()> {
        self.start_portal_with(&[])
    }

    /// As [`Self::start_portal`], with more arguments.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_portal_with(&mut self, extra: &[String]) -> Result<()> {
        let dir = self.net.dir().to_owned();
        let (policy, state) = (dir.join("policy.yaml"), dir.join("portal-state.json"));
        let (policy, state) = (policy.to_string_lossy(), state.to_string_lossy());
        let mut args = vec![
            "--listen",
            "[::]:8081",
            "--control",
            "127.0.0.1:8082",
            "--policy",
            &policy,
            "--state",
            &state,
        ];
        args.extend(extra.iter().map(String::as_str));
        self.lab("lab-portal", "internet", &args, &[])?;
        self.net
            .eventually("the portal answers", Duration::from_secs(20), |net| {
                net.sh(
                    "internet",
                    "curl -sf http://127.0.0.1:8082/state >/dev/null",
                )
            })
    }

    /// Starts Debian's coturn as relay.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_relay(&mut self) -> Result<()> {
        self.start_coturn("coturn", &[INTERNET, INTERNET_V6])
    }

    /// Starts a second relay and lets the portal hand out both.
    ///
    /// # Errors
    /// When it cannot be started, or the portal does not take it.
    pub fn start_second_relay(&mut self) -> Result<()> {
        self.net.sh(
            "internet",
            &format!("ip addr add {SECOND_RELAY}/24 dev br0"),
        )?;
        if self.v6 {
            self.net.sh(
                "internet",
                &format!("ip addr add {SECOND_RELAY_V6}/64 dev br0 nodad"),
            )?;
        }
        self.restart_second_relay()?;
        self.offer_relays(2)
    }

    /// Starts the second relay again, after it was killed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart_second_relay(&mut self) -> Result<()> {
        self.start_coturn("coturn-b", &[SECOND_RELAY, SECOND_RELAY_V6])
    }

    /// Lets the portal offer the first `count` relays, at once, in place of what it offered before.
    ///
    /// # Errors
    /// When the portal does not take it.
    pub fn offer_relays(&self, count: usize) -> Result<()> {
        self.portal_post("/relays", &self.relays(count))
    }

    /// The body of a request for [`Self::offer_relays`].
    pub fn relays(&self, count: usize) -> Value {
        let relays: Vec<Value> = [(INTERNET, INTERNET_V6), (SECOND_RELAY, SECOND_RELAY_V6)]
            .iter()
            .zip(1u8..)
            .take(count)
            .map(|((v4, v6), id)| {
                serde_json::json!({
                    "id": format!("5d5d5d5d-0000-4000-8000-{id:012}"),
                    "v4": format!("{v4}:3478"),
                    "v6": self.v6.then(|| format!("[{v6}]:3478")),
                    "secret": RELAY_SECRET,
                    "realm": "firezone",
                })
            })
            .collect();
        serde_json::json!({"relays": relays, "immediate": true})
    }

    fn start_coturn(&mut self, name: &str, addresses: &[&str]) -> Result<()> {
        let dir = self.net.dir().to_owned();
        let file = |extension: &str| dir.join(format!("{name}.{extension}"));
        let mut args: Vec<String> = [
            "-n",
            "--listening-port=3478",
            "--use-auth-secret",
            "--realm=firezone",
            "--no-tls",
            "--no-dtls",
            "--no-cli",
            "--log-file=stdout",
            "--simple-log",
            // Over IPv6, lend IPv6 addresses: it never lends both.
            "--allocation-default-address-family=keep",
        ]
        .map(str::to_owned)
        .to_vec();
        args.push(format!("--static-auth-secret={RELAY_SECRET}"));
        args.push(format!("--pidfile={}", file("pid").display()));
        args.push(format!("--userdb={}", file("sqlite").display()));
        for address in addresses {
            if self.v6 || !address.contains(':') {
                args.push(format!("--listening-ip={address}"));
                args.push(format!("--relay-ip={address}"));
            }
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.net
            .start(name, "internet", Path::new("turnserver"), &args, &[])
    }

    /// Starts portal, relay, collector and resource.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn start_surroundings(&mut self) -> Result<()> {
        self.start_relay()?;
        self.start_portal()?;
        if self.v6 {
            // The policy knows no more than its IPv4 address.
            self.offer_relays(1)?;
        }
        self.lab("lab-collector", "internet", &["--listen", "[::]:4318"], &[])?;
        self.lab("lab-web", "resource", &[], &[])
    }

    /// Starts one more web server on the resource.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_web(&mut self, name: &str, args: &[&str]) -> Result<()> {
        self.start_web_on("resource", name, args)
    }

    /// Starts a web server on any host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_web_on(&mut self, host: &str, name: &str, args: &[&str]) -> Result<()> {
        let program = self.bins.join("lab-web");
        self.net.start(name, host, &program, args, &[])
    }

    /// Lets the client send packets into the tunnel as they are, whatever they are.
    ///
    /// # Errors
    /// When it has no tunnel.
    pub fn inject(&self, packets: &[Vec<u8>]) -> Result<()> {
        for some in packets.chunks(50) {
            let packets: Vec<String> = some.iter().map(hex::encode).collect();
            let body = self.net.dir().join("inject.json");
            std::fs::write(&body, serde_json::json!({ "packets": packets }).to_string())?;
            let answer = self.net.output(
                "client",
                &format!(
                    "curl -sS -f -X POST -H 'content-type: application/json' -d @{} \
                     http://127.0.0.1:8083/inject",
                    body.display()
                ),
            )?;
            let answer: Value = serde_json::from_str(&answer)?;
            ensure!(answer["sent"] == some.len(), "{answer}");
        }
        Ok(())
    }

    /// Lets the client ask for access to a resource, also if it believes to have it.
    ///
    /// # Errors
    /// When the client does not know it.
    pub fn connect(&self, resource: &str) -> Result<()> {
        let body = serde_json::json!({ "resource_id": resource, "again": true });
        self.net.sh(
            "client",
            &format!(
                "curl -sS -f -X POST -H 'content-type: application/json' -d '{body}' \
                 http://127.0.0.1:8083/connect"
            ),
        )
    }

    /// Starts the gateway with the lab's settings and `env` on top.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_gateway(&mut self, env: &[(&str, &str)]) -> Result<()> {
        self.start_gateway_under(&[], env)
    }

    /// As [`Self::start_gateway`], as the last arguments of another command, such as one that takes
    /// rights away.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_gateway_under(&mut self, wrapper: &[&str], env: &[(&str, &str)]) -> Result<()> {
        let state = self.net.dir().join("gateway-state");
        std::fs::create_dir_all(&state)?;
        let state = state.to_string_lossy().into_owned();
        let portal = format!("ws://{}:8081", self.internet());
        let collector = format!("http://{}:4318", self.internet());
        let mut all = vec![
            ("FIREZONE_TOKEN", GATEWAY_TOKEN),
            ("FIREZONE_ID", "lab-gateway"),
            ("FIREZONE_NAME", "lab gateway"),
            ("FIREZONE_API_URL", portal.as_str()),
            ("FIREZONE_STATE_DIR", &state),
            ("HEALTH_CHECK_ADDR", "127.0.0.1:8080"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector),
            ("OTEL_BSP_SCHEDULE_DELAY", "500"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "1000"),
            ("RUST_LOG", "info,firezone_gateway=debug"),
        ];
        all.retain(|(name, _)| !env.iter().any(|(n, _)| n == name));
        all.extend(env);
        let gateway = self.gateway.to_string_lossy().into_owned();
        let mut command: Vec<&str> = wrapper.to_vec();
        command.push(&gateway);
        self.net.start(
            "gateway",
            "gateway",
            Path::new(command[0]),
            &command[1..],
            &all,
        )
    }

    /// Waits until the gateway is ready.
    ///
    /// # Errors
    /// When it is not within 20 s.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.net
            .eventually("the gateway is ready", Duration::from_secs(20), |net| {
                net.sh("gateway", "curl -sf 'http://127.0.0.1:8080/readyz?verbose'")
            })
    }

    /// Starts a client.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_client(&mut self, args: &[&str]) -> Result<()> {
        let portal = format!("ws://{}:8081", self.internet());
        let mut all = vec![
            "--portal-url",
            &portal,
            "--id",
            "lab-client",
            "--name",
            "lab client",
            "--control",
            "127.0.0.1:8083",
        ];
        all.extend(args);
        self.lab(
            "lab-client",
            "client",
            &all,
            &[("FIREZONE_TOKEN", CLIENT_TOKEN)],
        )?;
        self.net.eventually(
            "the client has its addresses",
            Duration::from_secs(20),
            |net| net.sh("client", "ip route get 10.99.0.2 | grep -q tun-client"),
        )
    }

    /// Everything up, client included.
    ///
    /// # Errors
    /// When anything does not come up.
    pub fn start_all(name: &str, gateway: &Path) -> Result<Self> {
        let mut lab = Self::new(name, gateway)?;
        lab.start_surroundings()?;
        lab.start_gateway(&[])?;
        lab.wait_ready()?;
        lab.start_client(&[])?;
        Ok(lab)
    }

    /// Asks the gateway to end.
    ///
    /// # Errors
    /// It takes longer than five seconds, ends with another status than 0, or
    /// [leaves something](Self::leaves_nothing).
    pub fn end_gateway(&mut self) -> Result<()> {
        self.net.signal("gateway", Signal::TERM)?;
        self.gateway_ends(Duration::from_secs(5))?;
        Ok(())
    }

    /// Waits for a gateway that was asked to end. Returns how long that took.
    ///
    /// # Errors
    /// As [`Self::end_gateway`].
    pub fn gateway_ends(&mut self, within: Duration) -> Result<Duration> {
        let asked = Instant::now();
        let status = self.net.wait("gateway", within)?;
        let took = asked.elapsed();
        ensure!(status.success(), "{status}\n{}", self.net.log("gateway"));
        self.leaves_nothing()
            .with_context(|| self.net.log("gateway"))?;
        Ok(took)
    }

    /// Looks for what a gateway makes on its host: rules, routes, a device, and those of its checks.
    ///
    /// # Errors
    /// There is something.
    pub fn leaves_nothing(&self) -> Result<()> {
        // The numbers are its routing table and its mark.
        let left = self.net.output(
            "gateway",
            "nft list tables; ip link show | grep -e tun-firezone -e fzcheck; \
             for v in -4 -6; do ip $v rule show | grep -i -e 539098368 -e fd002021; \
             ip $v route show table 539098368 2>/dev/null; done; true",
        )?;
        ensure!(left.trim().is_empty(), "left behind: {left}");
        Ok(())
    }

    /// Drops everything between client and gateway; the relay stays reachable.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn block_direct(&self) -> Result<()> {
        self.firewall(
            GATEWAY_ROUTER,
            &[
                "ip saddr 203.0.113.10 drop",
                "ip daddr 203.0.113.10 drop",
                "ip6 saddr 2001:db8:10::/64 drop",
                "ip6 daddr 2001:db8:10::/64 drop",
            ],
        )
    }

    /// Undoes [`Self::block_direct`] and every other [`Self::firewall`] rule of the gateway's.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn unblock_direct(&self) -> Result<()> {
        self.net
            .sh(GATEWAY_ROUTER, "nft flush chain inet lab forward")
    }

    /// Fetches a URL from the client's host.
    ///
    /// # Errors
    /// When `curl` fails.
    pub fn fetch(&self, url: &str) -> Result<String> {
        self.net
            .output("client", &format!("curl -sS -f --max-time 20 -g '{url}'"))
    }

    /// Waits until a page of the resource gets through, and returns how long that took.
    ///
    /// # Errors
    /// When it does not within `limit` seconds.
    pub fn reach(&mut self, limit: u64) -> Result<Duration> {
        let begun = Instant::now();
        let line = format!("curl -sf --max-time 1 '{}' >/dev/null", page(RESOURCE_V4));
        self.net
            .eventually("a page", Duration::from_secs(limit), |net| {
                net.sh("client", &line)
            })?;
        Ok(begun.elapsed())
    }

    /// The gateway's status document.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn status(&self) -> Result<Value> {
        json(
            &self
                .net
                .output("gateway", "curl -sS -f http://127.0.0.1:8080/status")?,
        )
    }

    /// What `firezone-gateway status` prints.
    ///
    /// # Errors
    /// When it fails.
    pub fn status_table(&self) -> Result<String> {
        let gateway = self.gateway.display();
        let line = format!("HEALTH_CHECK_ADDR=127.0.0.1:8080 {gateway} status");
        self.net.output("gateway", &line)
    }

    /// The client's status document.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn client_status(&self) -> Result<Value> {
        json(
            &self
                .net
                .output("client", "curl -sS -f http://127.0.0.1:8083/status")?,
        )
    }

    /// What the portal's control API says.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn portal(&self, path: &str) -> Result<Value> {
        json(&self.net.output(
            "internet",
            &format!("curl -sS -f 'http://127.0.0.1:8082{path}'"),
        )?)
    }

    /// Posts to the portal's control API.
    ///
    /// # Errors
    /// When it is refused.
    pub fn portal_post(&self, path: &str, body: &Value) -> Result<()> {
        self.net.sh(
            "internet",
            &format!(
                "curl -sS -f -X POST -H 'content-type: application/json' -d '{body}' \
                 'http://127.0.0.1:8082{path}'"
            ),
        )
    }

    /// Spans of one name that the collector has.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn spans(&self, name: &str) -> Result<Vec<Value>> {
        let spans = json(&self.net.output(
            "internet",
            &format!("curl -sS -f 'http://127.0.0.1:4318/spans?name={name}'"),
        )?)?;
        Ok(spans
            .as_array()
            .or_else(|| spans.get("spans").and_then(Value::as_array))
            .cloned()
            .unwrap_or_default())
    }

    /// The path of the gateway's only client.
    ///
    /// # Errors
    /// When there is none.
    pub fn path(&self) -> Result<String> {
        let status = self.status()?;
        status["clients"][0]["path"]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("no path: {}", status["clients"]))
    }

    /// Waits until the path is as `wanted`.
    ///
    /// # Errors
    /// When it is not within `limit` seconds.
    pub fn expect_path(&mut self, wanted: impl Fn(&str) -> bool, limit: u64) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(limit);
        loop {
            let path = self.path();
            if let Ok(path) = &path
                && wanted(path)
            {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "path is {path:?}\n{}",
                self.net.logs()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))
}
