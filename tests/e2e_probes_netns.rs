//! How fast probes are answered while the data path is saturated, in network namespaces.
//!
//! Needs root, coturn, iproute2, nftables and iperf3. `scripts/probe-latency` runs it with release
//! binaries and holds it to the goals; everywhere else the figures are only printed
//! (`--success-output immediate`), since they are those of the machine as well.

#![allow(clippy::print_stdout)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::{Lab, RESOURCE_V4};
use firezone_lab::traffic::serve_iperf3;
use serde_json::Value;

/// What the 99th percentile is to stay below, in milliseconds.
const GOALS: [(&str, f64); 2] = [("/livez", 5.0), ("/readyz", 10.0)];
/// Pause between two probes.
const PAUSE: Duration = Duration::from_millis(5);

/// From connecting to the end of the answer: what an orchestrator waits for.
fn probe(path: &str) -> Result<Duration> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect("127.0.0.1:8080")?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let took = begun.elapsed();
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
    Ok(took)
}

/// Puts this thread before all others: what is measured is how long the gateway takes, not how long
/// the asking thread waits for a CPU that it shares with the load.
fn go_first() -> Result<()> {
    let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
    let chrt = Command::new("chrt")
        .args(["-f", "-p", "1", &thread])
        .output()?;
    ensure!(chrt.status.success(), "{chrt:?}");
    Ok(())
}

/// Milliseconds of all probes of each kind, sorted.
fn probe_for(lab: &Lab, time: Duration) -> Result<[Vec<f64>; 2]> {
    lab.net.within("gateway", || {
        go_first()?;
        let mut took = [Vec::new(), Vec::new()];
        let begun = Instant::now();
        while begun.elapsed() < time {
            for ((path, _), took) in GOALS.iter().zip(&mut took) {
                took.push(probe(path)?.as_secs_f64() * 1000.0);
                std::thread::sleep(PAUSE);
            }
        }
        for took in &mut took {
            took.sort_by(f64::total_cmp);
        }
        Ok(took)
    })
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
}

/// Streams both ways, as fast as they go.
fn load(lab: &Lab, seconds: u64) -> Result<Child> {
    let seconds = seconds.to_string();
    let args = [
        "-J",
        "--bidir",
        "-P",
        "4",
        "-t",
        &seconds,
        "-c",
        RESOURCE_V4,
    ];
    Ok(lab
        .net
        .command("client", "iperf3", &args)
        .stdout(Stdio::piped())
        .spawn()?)
}

/// CPU time in seconds that the gateway's workers have used.
fn workers_time(pid: u32) -> Result<f64> {
    let mut ticks = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        if std::fs::read_to_string(task.join("comm"))?.starts_with("worker-") {
            let stat = std::fs::read_to_string(task.join("stat"))?;
            let (_, fields) = stat.rsplit_once(')').context("no name")?;
            // User and system time are the 14th and 15th field; the name was the second.
            for field in fields.split_whitespace().skip(11).take(2) {
                ticks += field.parse::<u64>()?;
            }
        }
    }
    // The kernel tells it in hundredths of a second, whatever its own clock ticks at.
    Ok(ticks as f64 / 100.0)
}

/// Time in seconds that all CPUs have been busy and idle.
fn machine_time() -> Result<[f64; 2]> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let fields: Vec<f64> = stat
        .lines()
        .next()
        .context("no CPU")?
        .split_whitespace()
        .skip(1)
        .take(8)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let idle = fields[3] + fields[4];
    Ok([fields.iter().sum::<f64>() - idle, idle].map(|ticks| ticks / 100.0))
}

fn report(when: &str, took: &[Vec<f64>; 2]) {
    for ((path, _), took) in GOALS.iter().zip(took) {
        println!(
            "{when:<9} {path:<8} {:>5} probes: 50 % {:>6.2} ms, 99 % {:>6.2} ms, slowest {:>6.2} ms",
            took.len(),
            percentile(took, 50),
            percentile(took, 99),
            percentile(took, 100)
        );
    }
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn probes_are_answered_while_the_data_path_is_saturated() -> Result<()> {
    let strict = std::env::var_os("FIREZONE_PROBE_GOALS").is_some();
    let time = Duration::from_secs(if strict { 20 } else { 5 });
    if strict {
        // The script gives us a session of our own. Builds and browsers on the same machine are not
        // what is measured; where there are no such groups, the machine has to be quiet.
        let _ = std::fs::write("/proc/self/autogroup", "-20");
    }
    let mut lab = Lab::start_all("probes", Path::new(env!("CARGO_BIN_EXE_firezone-gateway")))?;
    lab.reach(30)?;
    serve_iperf3(&mut lab)?;
    report("idle", &probe_for(&lab, time / 4)?);

    let pid = lab.net.pid("gateway")?;
    let streams = load(&lab, time.as_secs() + 2)?;
    // Past the slow start.
    std::thread::sleep(Duration::from_secs(1));
    let (begun, worker, [busy, idle]) = (Instant::now(), workers_time(pid)?, machine_time()?);
    let took = probe_for(&lab, time)?;
    let worker = (workers_time(pid)? - worker) / begun.elapsed().as_secs_f64();
    let [busy, idle] = [machine_time()?[0] - busy, machine_time()?[1] - idle];
    let streams = streams.wait_with_output()?;
    let streams: Value = serde_json::from_slice(&streams.stdout)?;
    let rate = |way: &str| -> Result<f64> {
        let rate = &streams["end"][way]["bits_per_second"];
        Ok(rate
            .as_f64()
            .with_context(|| streams["error"].to_string())?
            / 1e6)
    };
    let (up, down) = (rate("sum_received")?, rate("sum_received_bidir_reverse")?);
    println!(
        "under load of {up:.0} Mbit/s up and {down:.0} down, the workers at {:.0} % of a CPU, the \
         machine's CPUs {:.0} % busy:",
        worker * 100.0,
        busy / (busy + idle) * 100.0
    );
    report("saturated", &took);
    ensure!(
        up > 1.0 && down > 1.0 && worker > 0.1,
        "no load to speak of"
    );
    if strict {
        for ((path, goal), took) in GOALS.iter().zip(&took) {
            let reached = percentile(took, 99);
            ensure!(
                reached <= *goal,
                "{path}: 99 % {reached:.2} ms, goal {goal} ms"
            );
        }
    }
    Ok(())
}
