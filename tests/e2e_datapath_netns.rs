//! The data path with and without what the kernel can do for it: nothing is damaged, nothing overtakes
//! anything, every size gets through, in network namespaces with real binaries.
//!
//! Needs root, coturn, iproute2, nftables, curl, ping and iperf3; run by `scripts/test`.

// Rates are worth seeing even when nothing fails.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::{Lab, RESOURCE_V4, RESOURCE_V6};
use firezone_lab::traffic::{page, serve_iperf3};
use serde_json::{Value, json};

/// Hosts whose kernels look at what has come through.
const KERNELS: [&str; 3] = ["client", "gateway", "resource"];

fn start(name: &str, env: &[(&str, &str)], relayed: bool) -> Result<Lab> {
    let gateway = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::new(name, gateway)?;
    if relayed {
        lab.block_direct()?;
    }
    lab.start_surroundings()?;
    lab.start_gateway(env)?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    for host in [RESOURCE_V4, RESOURCE_V6] {
        lab.fetch(&page(host)).with_context(|| lab.net.logs())?;
    }
    let wanted = if relayed { "relay_" } else { "direct" };
    lab.expect_path(|path| path.starts_with(wanted), 20)?;
    serve_iperf3(&mut lab)?;
    Ok(lab)
}

fn iperf3(lab: &Lab, args: &str) -> Result<Value> {
    let report = lab.net.output("client", &format!("iperf3 -J {args}"))?;
    let report: Value = serde_json::from_str(&report)?;
    ensure!(report["error"].is_null(), "{args}: {}", report["error"]);
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let rate = rate.or_else(|| report["end"]["sum"]["bits_per_second"].as_f64());
    println!("{args}: {:.0} Mbit/s", rate.unwrap_or(0.0) / 1e6);
    Ok(report)
}

/// Packets that a host's kernel found damaged, by counter: checksums and headers, of IP, TCP, UDP, ICMP.
fn damaged(lab: &Lab, host: &str) -> Result<BTreeMap<String, u64>> {
    let text = lab
        .net
        .output(host, "cat /proc/net/snmp; cat /proc/net/snmp6")?;
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    ensure!(lines.len() > 20, "no counters: {text}");
    let is_told = |name: &str| name.ends_with("InCsumErrors") || name.ends_with("InHdrErrors");
    let mut found = BTreeMap::new();
    // IPv4: names in one line, values in the next.
    for pair in lines.windows(2) {
        let (names, values) = (&pair[0], &pair[1]);
        if names.first() == values.first() && names.len() == values.len() {
            for (name, value) in names.iter().zip(values).filter(|(name, _)| is_told(name)) {
                found.insert(format!("{}{name}", names[0]), value.parse()?);
            }
        }
    }
    // IPv6: a name and its value in each line.
    for line in &lines {
        if let [name, value] = line[..]
            && is_told(name)
        {
            found.insert(name.to_owned(), value.parse()?);
        }
    }
    Ok(found)
}

/// Bulk both ways over both families, datagrams as quick as they go, and packets of edge sizes.
fn exercise(lab: &Lab) -> Result<()> {
    let before: Vec<_> = KERNELS
        .iter()
        .map(|host| damaged(lab, host))
        .collect::<Result<_>>()?;
    for host in [RESOURCE_V4, RESOURCE_V6] {
        for way in ["", "-R"] {
            let report = iperf3(lab, &format!("-c {host} -P 4 -n 50M {way}"))?;
            let received = report["end"]["sum_received"]["bytes"].as_u64();
            // What is on its way at the end does not count.
            ensure!(received.is_some_and(|b| b > 10_000_000), "{received:?}");
            for length in [1200, 100] {
                let report = iperf3(lab, &format!("-c {host} -u -b 200M -l {length} -t 2 {way}"))?;
                let streams = report["end"]["streams"].as_array().context("no streams")?;
                for stream in streams {
                    let udp = &stream["udp"];
                    let packets = udp["packets"].as_u64().unwrap_or(0);
                    let lost = udp["lost_packets"].as_u64().unwrap_or(0);
                    ensure!(packets > lost + 1000, "too few: {udp}");
                    ensure!(udp["out_of_order"] == 0, "overtaken: {udp}");
                }
            }
        }
    }
    for (host, header) in [(RESOURCE_V4, 28), (RESOURCE_V6, 48)] {
        sizes(lab, host, [0, 1, 2, 7, 8, 1279 - header, 1280 - header])?;
    }
    for (host, before) in KERNELS.iter().zip(before) {
        let damaged = damaged(lab, host)?;
        ensure!(damaged == before, "{host} got damaged packets: {damaged:?}");
    }
    Ok(())
}

/// Echoes of so many bytes of data all come back whole.
fn sizes(lab: &Lab, host: &str, sizes: impl IntoIterator<Item = u32>) -> Result<()> {
    let sizes: Vec<String> = sizes.into_iter().map(|size| size.to_string()).collect();
    let lost = lab.net.output(
        "client",
        &format!(
            "for size in {}; do ping -q -n -M do -c 1 -W 3 -s $size {host} >/dev/null || echo $size; done",
            sizes.join(" ")
        ),
    )?;
    ensure!(lost.trim().is_empty(), "{host} did not answer: {lost}");
    Ok(())
}

fn device(lab: &Lab) -> Result<Value> {
    Ok(lab.status()?["device"].clone())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn with_all_that_the_kernel_can_do_nothing_is_damaged_or_overtaken() -> Result<()> {
    let lab = start("datapath", &[("FIREZONE_WORKERS", "2")], false)?;
    let all = json!(["tun-tso", "tun-uso", "udp-gso", "udp-gro"]);
    let device = device(&lab)?;
    ensure!(
        device["offloads"] == all && device["workers"] == 2,
        "{device}"
    );
    exercise(&lab)?;
    // Every size there is.
    sizes(&lab, RESOURCE_V4, 0..=1252)?;
    sizes(&lab, RESOURCE_V6, 0..=1232)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn without_anything_from_the_kernel_nothing_is_damaged_or_overtaken() -> Result<()> {
    let env = [("FIREZONE_OFFLOADS", "none"), ("FIREZONE_WORKERS", "1")];
    let lab = start("datapath-plain", &env, false)?;
    let device = device(&lab)?;
    ensure!(
        device["offloads"] == json!([]) && device["workers"] == 1,
        "{device}"
    );
    exercise(&lab)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn with_super_packets_on_the_device_alone_nothing_is_damaged_or_overtaken() -> Result<()> {
    let env = [("FIREZONE_OFFLOADS", "tun-tso"), ("FIREZONE_WORKERS", "3")];
    let lab = start("datapath-tun", &env, false)?;
    let device = device(&lab)?;
    ensure!(
        device["offloads"] == json!(["tun-tso"]) && device["workers"] == 3,
        "{device}"
    );
    exercise(&lab)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn with_trains_on_the_sockets_alone_nothing_is_damaged_or_overtaken() -> Result<()> {
    let env = [("FIREZONE_OFFLOADS", "udp-gso,udp-gro")];
    let lab = start("datapath-udp", &env, false)?;
    let device = device(&lab)?;
    ensure!(
        device["offloads"] == json!(["udp-gso", "udp-gro"]),
        "{device}"
    );
    exercise(&lab)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn through_a_relay_nothing_is_damaged_or_overtaken() -> Result<()> {
    let lab = start("datapath-relayed", &[("FIREZONE_WORKERS", "2")], true)?;
    exercise(&lab)
}
