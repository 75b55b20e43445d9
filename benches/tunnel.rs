//! What traffic through the gateway costs, beside other userspace WireGuard implementations in the same
//! network, in turns; run by `scripts/bench`, which installs what it needs.
//!
//! The process that is measured is the gateway's alone: client, resource and relay have the same machine
//! to themselves, so throughput says little where there are few cores, and CPU time says what counts.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use firezone_lab::scenario::{GATEWAY_ROUTER, Lab, RESOURCE_V4};
use firezone_lab::traffic::{page, serve_iperf3};
use firezone_lab::usage::Usage;
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
    /// Also the gateway while it is watched: status each second, metrics each five, traces, metrics and
    /// log lines to a collector.
    #[arg(long)]
    watched: bool,
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
    /// Draws throughput and CPU time of each case into this file.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Measures nothing, but shows what `--json` has written.
    #[arg(long)]
    from: Option<PathBuf>,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Figures of one case by name.
type Figures = BTreeMap<String, f64>;

/// Figures by case and tunnel.
type Table = BTreeMap<(String, String), Figures>;

/// The gateway, and the gateway while it is watched.
const GATEWAY: &str = "firezone-gateway";
const WATCHED: &str = "watched";

fn main() -> Result<()> {
    // `cargo test --benches` only wants to know that it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let mut args = Args::parse();
    if args.watched {
        args.tunnels.push(WATCHED.to_owned());
    }
    let table = match &args.from {
        Some(file) => read(file)?,
        None => measure(&args)?,
    };
    show(&args, &table);
    if let Some(file) = &args.json {
        let rows: Vec<Value> = table
            .iter()
            .map(|((case, tunnel), f)| serde_json::json!({"case": case, "tunnel": tunnel, "figures": f}))
            .collect();
        std::fs::write(file, serde_json::to_string_pretty(&rows)?)?;
    }
    if let Some(file) = &args.plot {
        plot::draw(file, &table).map_err(|error| anyhow::anyhow!("{error}"))?;
        println!("drawn into {}", file.display());
    }
    Ok(())
}

/// What `--json` has written.
fn read(file: &Path) -> Result<Table> {
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(file)?)?;
    rows.iter()
        .map(|row| {
            let text = |name: &str| Some(row[name].as_str()?.to_owned());
            let key = text("case")
                .zip(text("tunnel"))
                .context("no case or tunnel")?;
            Ok((key, serde_json::from_value(row["figures"].clone())?))
        })
        .collect()
}

/// Medians of interleaved rounds.
fn measure(args: &Args) -> Result<Table> {
    ensure!(rustix::process::geteuid().is_root(), "namespaces need root");
    let mut all: BTreeMap<(String, String), Vec<Figures>> = BTreeMap::new();
    for round in 0..args.rounds {
        let mut tunnels: Vec<&String> = args.tunnels.iter().collect();
        // What changes slowly comes before and after everybody as often.
        if round % 2 == 1 {
            tunnels.reverse();
        }
        for tunnel in tunnels {
            let mut bench = Bench::start(tunnel, false, args)?;
            for case in &args.cases {
                let figures = match bench.measure(case, args) {
                    Ok(figures) => figures,
                    // One of the others that drops a test's own connections spoils that case only.
                    Err(error) if tunnel.contains('=') => {
                        println!("{} {} {case}: {error}", round + 1, name(tunnel));
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                tell(round, tunnel, case, &figures);
                all.entry((case.clone(), name(tunnel).to_owned()))
                    .or_default()
                    .push(figures);
            }
            bench.finish()?;
            if args.relayed && tunnel == GATEWAY {
                let mut bench = Bench::start(tunnel, true, args)?;
                for case in args.cases.iter().filter(|c| c.ends_with("-1")) {
                    let figures = bench.measure(case, args)?;
                    let case = format!("relayed-{case}");
                    tell(round, tunnel, &case, &figures);
                    all.entry((case, name(tunnel).to_owned()))
                        .or_default()
                        .push(figures);
                }
            }
        }
    }
    println!("\nMedians of {} rounds of {} s", args.rounds, args.seconds);
    Ok(all
        .into_iter()
        .map(|(key, runs)| (key, medians(&runs)))
        .collect())
}

fn show(args: &Args, table: &Table) {
    println!(
        "{:<16} {:<18} {:>8} {:>9} {:>6} {:>6} {:>10} {:>8} {:>7}",
        "case", "tunnel", "Mbit/s", "CPU s/GB", "user", "sys", "switches", "us/pkt", "ratio"
    );
    for ((case, tunnel), figures) in table {
        let figure = |name| figures.get(name).copied();
        let shown = |name, digits: usize| {
            figure(name).map_or_else(|| "-".to_owned(), |v: f64| format!("{v:.digits$}"))
        };
        let first = name(args.tunnels.get(1).map_or("", String::as_str));
        let ratio = table
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
        if let Some((ms, most)) = figure("rtt_ms").zip(figure("rtt_99_ms")) {
            println!("{:>50} {ms:.2} ms median round trip, {most:.2} ms 99 %", "");
        }
    }
    // What being watched costs.
    for ((case, tunnel), watched) in table {
        let alone = table.get(&(case.clone(), GATEWAY.to_owned()));
        let (WATCHED, Some(alone)) = (tunnel.as_str(), alone) else {
            continue;
        };
        let change = |name: &str| Some((watched.get(name)? / alone.get(name)? - 1.0) * 100.0);
        if let Some((throughput, cpu)) = change("mbit").zip(change("cpu_per_gb")) {
            println!("{case:<16} watched: throughput {throughput:+.1} %, CPU s/GB {cpu:+.1} %");
        }
    }
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
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, value) in runs.iter().flatten() {
        values.entry(name.clone()).or_default().push(*value);
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
    watcher: Option<Watcher>,
}

impl Bench {
    fn start(tunnel: &str, relayed: bool, args: &Args) -> Result<Self> {
        let mut lab = Lab::new("bench", Path::new(env!("CARGO_BIN_EXE_firezone-gateway")))?;
        lab.no_nat_for_gateway()?;
        match tunnel.split_once('=') {
            None if tunnel == GATEWAY || tunnel == WATCHED => {
                let env: Vec<(&str, &str)> = args
                    .env
                    .iter()
                    .map(|e| e.split_once('=').with_context(|| format!("no value: {e}")))
                    .collect::<Result<_>>()?;
                let mut all = vec![("RUST_LOG", "info")];
                if tunnel == GATEWAY {
                    all.push(("OTEL_SDK_DISABLED", "true"));
                }
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
            watcher: None,
        };
        serve_iperf3(&mut bench.lab)?;
        if tunnel == WATCHED {
            bench.watcher = Some(Watcher::start(&bench.lab)?);
        }
        if tunnel == GATEWAY || tunnel == WATCHED {
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

    /// Makes sure that the gateway was watched, if it was to be.
    fn finish(self) -> Result<()> {
        match self.watcher {
            Some(watcher) => watcher.stop(),
            None => Ok(()),
        }
    }

    fn pid(&mut self) -> Result<u32> {
        self.lab.net.pid("gateway")
    }

    fn usage(&mut self) -> Result<Usage> {
        Usage::of(self.pid()?)
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
        let mut figures = figures([
            ("mbit", bytes * 8.0 / 1e6 / f64::from(args.seconds)),
            ("cpu_per_gb", (user + system) / gb),
            ("user_per_gb", user / gb),
            ("system_per_gb", system / gb),
            ("switches_per_gb", (after.switches - before.switches) / gb),
        ]);
        if kind == "udp" || kind == "small" {
            let length = if kind == "udp" { 1200.0 } else { 64.0 };
            figures.insert(
                "us_per_packet".to_owned(),
                (user + system) * 1e6 / (bytes / length),
            );
            figures.insert("lost_percent".to_owned(), lost);
        }
        if let Some(retransmits) = report["end"]["sum_sent"]["retransmits"].as_f64() {
            figures.insert("retransmits".to_owned(), retransmits);
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
        Ok(figures([
            ("rtt_ms", times[times.len() / 2]),
            ("rtt_99_ms", times[times.len() * 99 / 100]),
        ]))
    }
}

fn figures<const N: usize>(figures: [(&str, f64); N]) -> Figures {
    figures.map(|(name, value)| (name.to_owned(), value)).into()
}

/// Looks at the gateway as monitoring does.
struct Watcher {
    stop: Arc<AtomicBool>,
    looks: std::thread::JoinHandle<Result<u32>>,
}

impl Watcher {
    fn start(lab: &Lab) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let looks = lab.net.beside("gateway", move || {
            let mut looks = 0;
            while !stopped.load(Ordering::Relaxed) {
                get("/status")?;
                if looks % 5 == 0 {
                    get("/metrics")?;
                }
                looks += 1;
                std::thread::sleep(Duration::from_secs(1));
            }
            Ok(looks)
        })?;
        Ok(Self { stop, looks })
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let looks = self
            .looks
            .join()
            .map_err(|_| anyhow::anyhow!("it panicked"))??;
        ensure!(looks > 0, "nobody looked");
        Ok(())
    }
}

/// Asks the gateway's admin server for something.
fn get(path: &str) -> Result<()> {
    use std::io::{Read as _, Write as _};

    let mut stream = std::net::TcpStream::connect("127.0.0.1:8080")?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "{path} is refused");
    Ok(())
}

/// Another implementation at both ends, with static keys; the resource is reached as through the gateway,
/// by masquerading.
fn plain(lab: &mut Lab, kind: &str, program: &Path) -> Result<()> {
    static ROUNDS: AtomicU32 = AtomicU32::new(0);

    let keys = |lab: &Lab, host: &str| -> Result<(String, String)> {
        let private = lab.net.output(host, "wg genkey")?.trim().to_owned();
        let public = lab
            .net
            .output(host, &format!("echo {private} | wg pubkey"))?;
        Ok((private, public.trim().to_owned()))
    };
    let (client, gateway) = (keys(lab, "client")?, keys(lab, "gateway")?);
    // Both keep a control socket per interface name, for all namespaces, and one that is on its way out
    // removes it under the feet of the next.
    let round = ROUNDS.fetch_add(1, Ordering::Relaxed);
    let interface = |host: &str| format!("wg{round}-{host}");
    for (host, process) in [("gateway", "gateway"), ("client", "wg-client")] {
        let interface = interface(host);
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
    let route = format!("ip route add 10.99.0.0/24 dev {}", interface("client"));
    lab.net.sh("client", &route)?;
    lab.net.nft(
        "gateway",
        "table inet bench { chain postrouting { type nat hook postrouting priority srcnat; \
         oifname \"eth1\" masquerade\n}\n}\n",
    )?;
    lab.net
        .sh(GATEWAY_ROUTER, "nft flush chain inet lab input")?;
    Ok(())
}

mod plot {
    use std::path::Path;

    use plotters::prelude::*;

    use super::Table;

    const COLOURS: [RGBColor; 4] = [
        RGBColor(0, 98, 155),
        RGBColor(196, 78, 40),
        RGBColor(120, 120, 120),
        RGBColor(90, 140, 60),
    ];
    const SIZE: (u32, u32) = (900, 640);

    /// Throughput above, CPU time per gigabyte below: a group of bars per case, a bar per tunnel.
    pub fn draw(path: &Path, table: &Table) -> Result<(), Box<dyn std::error::Error>> {
        let mut cases: Vec<&str> = Vec::new();
        let mut tunnels: Vec<&str> = Vec::new();
        for ((case, tunnel), figures) in table {
            // Of streams only: what small packets cost per gigabyte is out of proportion.
            if !figures.contains_key("cpu_per_gb") || figures.contains_key("us_per_packet") {
                continue;
            }
            for (list, name) in [(&mut cases, case), (&mut tunnels, tunnel)] {
                if !list.contains(&name.as_str()) {
                    list.push(name);
                }
            }
        }
        cases.sort_by_key(|case| (case.starts_with("relayed"), case.starts_with("paced")));
        // Ours first, whatever its name.
        tunnels.sort_by_key(|tunnel| (*tunnel != super::GATEWAY, *tunnel));
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let (above, below) = area.split_vertically(SIZE.1 / 2);
        for (area, figure, title) in [
            (above, "mbit", "Mbit/s"),
            (
                below,
                "cpu_per_gb",
                "CPU seconds of the gateway per gigabyte",
            ),
        ] {
            let value = |case: &str, tunnel: &str| {
                let figures = table.get(&(case.to_owned(), tunnel.to_owned()))?;
                figures.get(figure).copied()
            };
            let highest = cases
                .iter()
                .flat_map(|case| tunnels.iter().filter_map(|tunnel| value(case, tunnel)))
                .fold(0.0, f64::max);
            let mut chart = ChartBuilder::on(&area)
                .caption(title, ("sans-serif", 18))
                .margin(12)
                .x_label_area_size(28)
                .y_label_area_size(56)
                .build_cartesian_2d(0.0..cases.len() as f64, 0.0..highest * 1.35)?;
            let label = |x: &f64| {
                let case = x.floor() as usize;
                cases
                    .get(case)
                    .map_or_else(String::new, |case| (*case).to_owned())
            };
            chart
                .configure_mesh()
                .disable_x_mesh()
                .disable_x_axis()
                .light_line_style(TRANSPARENT)
                .y_label_formatter(&|y| format!("{y:.0}"))
                .draw()?;
            let width = 0.8 / tunnels.len() as f64;
            for ((at, tunnel), colour) in tunnels.iter().enumerate().zip(COLOURS.iter().cycle()) {
                let bars = cases.iter().enumerate().filter_map(|(n, case)| {
                    let left = n as f64 + 0.1 + at as f64 * width;
                    let corner = (left + width * 0.92, value(case, tunnel)?);
                    Some(Rectangle::new([(left, 0.0), corner], colour.filled()))
                });
                chart
                    .draw_series(bars)?
                    .label(*tunnel)
                    .legend(move |(x, y)| {
                        Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled())
                    });
            }
            // Under the middle of each group.
            let plotting = chart.plotting_area();
            let style = ("sans-serif", 13).into_text_style(&area);
            let style = style.pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Center,
                plotters::style::text_anchor::VPos::Top,
            ));
            for n in 0..cases.len() {
                let (x, y) = plotting.map_coordinate(&(n as f64 + 0.5, 0.0));
                let (left, top) = area.get_base_pixel();
                area.draw_text(&label(&(n as f64)), &style, (x - left, y - top + 6))?;
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK)
                .draw()?;
        }
        Ok(())
    }
}
