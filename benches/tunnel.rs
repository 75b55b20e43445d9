//! What traffic through the gateway costs, beside other userspace WireGuard implementations in the same
//! network, in turns; run by `scripts/bench`, which installs what it needs.
//!
//! The process that is measured is the gateway's alone: client, resource and relay have the same machine
//! to themselves, so throughput says little where there are few cores, and CPU time says what counts.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use firezone_lab::scenario::{GATEWAY_ROUTER, Lab, RESOURCE_V4};
use firezone_lab::traffic::{page, serve_iperf3};
use serde_json::Value;

/// Compares tunnels side by side.
#[derive(Parser)]
#[command(name = "scripts/bench")]
struct Args {
    /// What carries the traffic; each is `firezone-gateway`, `wireguard-go=PATH` or `boringtun-cli=PATH`.
    #[arg(long, value_delimiter = ',', default_value = "firezone-gateway")]
    tunnels: Vec<String>,
    /// Cases: `up-1`, `down-1`, `up-4`, `down-4` (TCP streams), `paced-up`, `paced-down` (TCP at 500
    /// Mbit/s), `udp-up`, `udp-down` (1200 bytes), `small-up`, `small-down` (64 bytes), `latency`.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "up-1,down-1,up-4,down-4,paced-up,paced-down,udp-up,udp-down,small-up,small-down,latency"
    )]
    cases: Vec<String>,
    /// Also through coturn, which forwards packet by packet (firezone-gateway only).
    #[arg(long)]
    relayed: bool,
    /// Seconds per case.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Rounds; the median of each figure counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Settings of the gateway, `NAME=VALUE`.
    #[arg(long = "env")]
    env: Vec<String>,
    /// Profiles the gateway with `perf` in each case, into this directory.
    #[arg(long)]
    perf: Option<PathBuf>,
    /// Writes every figure to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Figures of one case by name.
type Figures = BTreeMap<&'static str, f64>;

fn main() -> Result<()> {
    // `cargo test --benches` only wants to know that it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let args = Args::parse();
    ensure!(rustix::process::geteuid().is_root(), "namespaces need root");
    let mut all: BTreeMap<(String, String), Vec<Figures>> = BTreeMap::new();
    for round in 0..args.rounds {
        for tunnel in &args.tunnels {
            let mut bench = Bench::start(tunnel, false, &args)?;
            for case in &args.cases {
                let figures = bench.measure(case, &args)?;
                tell(round, tunnel, case, &figures);
                all.entry((case.clone(), name(tunnel).to_owned()))
                    .or_default()
                    .push(figures);
            }
            if args.relayed && tunnel == "firezone-gateway" {
                drop(bench);
                let mut bench = Bench::start(tunnel, true, &args)?;
                for case in args.cases.iter().filter(|c| c.ends_with("-1")) {
                    let figures = bench.measure(case, &args)?;
                    let case = format!("relayed-{case}");
                    tell(round, tunnel, &case, &figures);
                    all.entry((case, name(tunnel).to_owned()))
                        .or_default()
                        .push(figures);
                }
            }
        }
    }
    let medians: BTreeMap<_, _> = all.iter().map(|(key, runs)| (key, medians(runs))).collect();
    println!("\nMedians of {} rounds of {} s", args.rounds, args.seconds);
    println!(
        "{:<16} {:<18} {:>8} {:>9} {:>6} {:>6} {:>10} {:>8} {:>7}",
        "case", "tunnel", "Mbit/s", "CPU s/GB", "user", "sys", "switches", "us/pkt", "ratio"
    );
    for ((case, tunnel), figures) in &medians {
        let figure = |name| figures.get(name).copied();
        let shown = |name, digits: usize| {
            figure(name).map_or_else(|| "-".to_owned(), |v: f64| format!("{v:.digits$}"))
        };
        let first = name(args.tunnels.get(1).map_or("", String::as_str));
        let ratio = medians
            .get(&(case.clone(), first.to_owned()))
            .and_then(|other| Some(figure("cpu_per_gb")? / other.get("cpu_per_gb")?))
            .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!(
            "{case:<16} {tunnel:<18} {:>8} {:>9} {:>6} {:>6} {:>10} {:>8} {ratio:>7}",
            shown("mbit", 0),
            shown("cpu_per_gb", 2),
            shown("user_per_gb", 2),
            shown("system_per_gb", 2),
            shown("switches_per_gb", 0),
            shown("us_per_packet", 2),
        );
        if let Some(ms) = figure("rtt_ms") {
            println!(
                "{:>50} {ms:.2} ms median round trip, {:.2} ms 99 %",
                "", figures["rtt_99_ms"]
            );
        }
    }
    if let Some(file) = &args.json {
        let rows: Vec<Value> = medians
            .iter()
            .map(|((case, tunnel), f)| serde_json::json!({"case": case, "tunnel": tunnel, "figures": f}))
            .collect();
        std::fs::write(file, serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(())
}

/// A tunnel without the path of its binary.
fn name(tunnel: &str) -> &str {
    tunnel.split('=').next().unwrap_or(tunnel)
}

fn tell(round: usize, tunnel: &str, case: &str, figures: &Figures) {
    let text: Vec<String> = figures
        .iter()
        .map(|(name, value)| format!("{name} {value:.2}"))
        .collect();
    println!("{} {} {case}: {}", round + 1, name(tunnel), text.join(", "));
}

fn medians(runs: &[Figures]) -> Figures {
    let mut values: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for (name, value) in runs.iter().flatten() {
        values.entry(name).or_default().push(*value);
    }
    values
        .into_iter()
        .map(|(name, mut values)| {
            values.sort_by(f64::total_cmp);
            (name, values[values.len() / 2])
        })
        .collect()
}

/// A tunnel that is up.
struct Bench {
    lab: Lab,
    tunnel: String,
}

/// What a process has used so far.
#[derive(Clone, Copy)]
struct Usage {
    user: f64,
    system: f64,
    switches: f64,
}

impl Bench {
    fn start(tunnel: &str, relayed: bool, args: &Args) -> Result<Self> {
        let mut lab = Lab::new("bench", Path::new(env!("CARGO_BIN_EXE_firezone-gateway")))?;
        lab.no_nat_for_gateway()?;
        match tunnel.split_once('=') {
            None if tunnel == "firezone-gateway" => {
                let env: Vec<(&str, &str)> = args
                    .env
                    .iter()
                    .map(|e| e.split_once('=').with_context(|| format!("no value: {e}")))
                    .collect::<Result<_>>()?;
                let mut all = vec![("RUST_LOG", "info")];
                all.extend(env);
                if relayed {
                    lab.block_direct()?;
                }
                lab.start_surroundings()?;
                lab.start_gateway(&all)?;
                lab.wait_ready()?;
                lab.start_client(&[])?;
            }
            Some((kind, path)) => plain(&mut lab, kind, Path::new(path))?,
            None => bail!("what is {tunnel}?"),
        }
        let mut bench = Self {
            lab,
            tunnel: tunnel.to_owned(),
        };
        serve_iperf3(&mut bench.lab)?;
        if name(tunnel) == "firezone-gateway" {
            bench.lab.fetch(&page(RESOURCE_V4))?;
            let wanted = if relayed { "relay" } else { "direct" };
            bench.lab.expect_path(|path| path.starts_with(wanted), 20)?;
        } else {
            let ping = format!("ping -c 1 -W 5 {RESOURCE_V4}");
            bench
                .lab
                .net
                .eventually("the tunnel is up", Duration::from_secs(10), |net| {
                    net.sh("client", &ping)
                })?;
        }
        Ok(bench)
    }

    fn pid(&mut self) -> Result<u32> {
        self.lab.net.pid("gateway")
    }

    fn usage(&mut self) -> Result<Usage> {
        let pid = self.pid()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("stat")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // USER_HZ, the same on every Linux that runs this.
        let ticks = 100.0;
        let field = |n: usize| -> Result<f64> { Ok(fields[n].parse::<f64>()? / ticks) };
        let mut switches = 0.0;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = std::fs::read_to_string(task?.path().join("status")).unwrap_or_default();
            switches += status
                .lines()
                .filter(|line| line.contains("ctxt_switches"))
                .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
                .sum::<f64>();
        }
        Ok(Usage {
            user: field(11)?,
            system: field(12)?,
            switches,
        })
    }

    fn measure(&mut self, case: &str, args: &Args) -> Result<Figures> {
        if case == "latency" {
            return self.latency(args.seconds);
        }
        let seconds = args.seconds.to_string();
        let (kind, way) = case
            .split_once('-')
            .map(|(a, b)| match a {
                "up" | "down" => (b, a),
                _ => (a, b),
            })
            .with_context(|| format!("what is {case}?"))?;
        let mut iperf = vec!["-J", "-c", RESOURCE_V4, "-t", &seconds, "-O", "1"];
        match kind {
            "1" => {}
            "4" => iperf.extend(["-P", "4"]),
            "paced" => iperf.extend(["-b", "500M"]),
            "udp" => iperf.extend(["-u", "-b", "600M", "-l", "1200"]),
            "small" => iperf.extend(["-u", "-b", "40M", "-l", "64"]),
            _ => bail!("what is {case}?"),
        }
        match way {
            "up" => {}
            "down" => iperf.push("-R"),
            _ => bail!("what is {case}?"),
        }
        let profile = self.profile(case, args)?;
        // The first second, which iperf3 leaves out, is warming up for us as well.
        let client = self
            .lab
            .net
            .command("client", "iperf3", &iperf)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()?;
        std::thread::sleep(Duration::from_secs(1));
        let before = self.usage()?;
        std::thread::sleep(Duration::from_secs(u64::from(args.seconds)));
        let after = self.usage()?;
        let output = client.wait_with_output()?;
        if let Some(mut profile) = profile {
            profile.wait()?;
        }
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{case}: {output:?}"))?;
        ensure!(
            report["error"].is_null(),
            "{} {case}: {}",
            self.tunnel,
            report["error"]
        );
        let sum = match report["end"]["sum_received"]["bytes"].as_f64() {
            Some(_) if !report["end"]["sum_received"].is_null() => &report["end"]["sum_received"],
            _ => &report["end"]["sum"],
        };
        let bytes = sum["bytes"].as_f64().context("no bytes")?;
        let lost = report["end"]["sum"]["lost_percent"].as_f64().unwrap_or(0.0);
        let bytes = bytes
            * if kind == "udp" || kind == "small" {
                1.0 - lost / 100.0
            } else {
                1.0
            };
        let gb = bytes / 1e9;
        let (user, system) = (after.user - before.user, after.system - before.system);
        let mut figures = Figures::from([
            ("mbit", bytes * 8.0 / 1e6 / f64::from(args.seconds)),
            ("cpu_per_gb", (user + system) / gb),
            ("user_per_gb", user / gb),
            ("system_per_gb", system / gb),
            ("switches_per_gb", (after.switches - before.switches) / gb),
        ]);
        if kind == "udp" || kind == "small" {
            let length = if kind == "udp" { 1200.0 } else { 64.0 };
            figures.insert("us_per_packet", (user + system) * 1e6 / (bytes / length));
            figures.insert("lost_percent", lost);
        }
        if let Some(retransmits) = report["end"]["sum_sent"]["retransmits"].as_f64() {
            figures.insert("retransmits", retransmits);
        }
        Ok(figures)
    }

    fn profile(&mut self, case: &str, args: &Args) -> Result<Option<std::process::Child>> {
        let Some(dir) = &args.perf else {
            return Ok(None);
        };
        std::fs::create_dir_all(dir)?;
        let pid = self.pid()?.to_string();
        let file = dir.join(format!("{}-{case}.data", name(&self.tunnel)));
        let seconds = args.seconds.to_string();
        let child = std::process::Command::new("perf")
            .args(["record", "-F", "997", "-g", "-p", &pid, "-o"])
            .arg(file)
            .args(["--", "sleep", &seconds])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .context("perf")?;
        Ok(Some(child))
    }

    /// Round trips while 250 Mbit/s go up.
    fn latency(&mut self, seconds: u32) -> Result<Figures> {
        let seconds = (seconds + 1).to_string();
        let mut load = self
            .lab
            .net
            .command(
                "client",
                "iperf3",
                &["-c", RESOURCE_V4, "-b", "250M", "-t", &seconds],
            )
            .stdout(std::process::Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_secs(1));
        let pings = self
            .lab
            .net
            .output("client", &format!("ping -n -c 200 -i 0.02 {RESOURCE_V4}"))?;
        load.wait()?;
        let mut times: Vec<f64> = pings
            .lines()
            .filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse().ok())
            .collect();
        ensure!(times.len() > 100, "pings are lost: {pings}");
        times.sort_by(f64::total_cmp);
        Ok(Figures::from([
            ("rtt_ms", times[times.len() / 2]),
            ("rtt_99_ms", times[times.len() * 99 / 100]),
        ]))
    }
}

/// Another implementation at both ends, with static keys; the resource is reached as through the gateway,
/// by masquerading.
fn plain(lab: &mut Lab, kind: &str, program: &Path) -> Result<()> {
    let keys = |lab: &Lab, host: &str| -> Result<(String, String)> {
        let private = lab.net.output(host, "wg genkey")?.trim().to_owned();
        let public = lab
            .net
            .output(host, &format!("echo {private} | wg pubkey"))?;
        Ok((private, public.trim().to_owned()))
    };
    let (client, gateway) = (keys(lab, "client")?, keys(lab, "gateway")?);
    for (host, process) in [("gateway", "gateway"), ("client", "wg-client")] {
        // Both keep a control socket per interface name, for all namespaces.
        let interface = format!("bench-{host}");
        let args: Vec<&str> = match kind {
            "wireguard-go" => vec!["-f", &interface],
            "boringtun-cli" => vec!["--foreground", "--disable-drop-privileges", &interface],
            _ => bail!("what is {kind}?"),
        };
        lab.net
            .start(process, host, program, &args, &[("LOG_LEVEL", "error")])?;
        let (own, other) = if host == "gateway" {
            (&gateway.0, &client.1)
        } else {
            (&client.0, &gateway.1)
        };
        let peer = if host == "gateway" {
            "allowed-ips 10.6.0.2/32".to_owned()
        } else {
            "allowed-ips 10.6.0.1/32,10.99.0.0/24 endpoint 198.51.100.2:51820 \
             persistent-keepalive 25"
                .to_owned()
        };
        let address = if host == "gateway" {
            "10.6.0.1/24"
        } else {
            "10.6.0.2/24"
        };
        let key = lab.net.dir().join(format!("{host}.key"));
        std::fs::write(&key, own)?;
        lab.net
            .eventually("the interface is there", Duration::from_secs(10), |net| {
                net.sh(host, &format!("wg show {interface}"))
            })?;
        lab.net.sh(
            host,
            &format!(
                "wg set {interface} listen-port 51820 private-key {} peer {other} {peer} && \
                 ip addr add {address} dev {interface} && ip link set {interface} mtu 1280 up",
                key.display()
            ),
        )?;
    }
    lab.net
        .sh("client", "ip route add 10.99.0.0/24 dev bench-client")?;
    lab.net.nft(
        "gateway",
        "table inet bench { chain postrouting { type nat hook postrouting priority srcnat; \
         oifname \"eth1\" masquerade\n}\n}\n",
    )?;
    lab.net
        .sh(GATEWAY_ROUTER, "nft flush chain inet lab input")?;
    Ok(())
}
