//! How the real binary ends: in order, and not before those who send it clients had time to find out.
//!
//! Needs root, iproute2, nftables, curl and coturn; run by `scripts/test`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::netns::Net;
use firezone_lab::scenario::{Lab, RESOURCE_V4};
use firezone_lab::traffic::page;
use rustix::process::Signal;

fn gateway() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_firezone-gateway"))
}

/// Code of readiness.
fn ready(net: &Net) -> Result<String> {
    net.output(
        "gateway",
        "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8080/readyz",
    )
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn asked_to_stop_it_is_not_ready_at_once_and_carries_traffic_for_as_long_as_it_lingers()
-> Result<()> {
    let mut lab = Lab::new("linger", gateway())?;
    lab.start_surroundings()?;
    lab.start_gateway(&[("FIREZONE_SHUTDOWN_LINGER", "4s")])?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;

    let asked = Instant::now();
    lab.net.signal("gateway", Signal::TERM)?;
    lab.net
        .eventually("it is not ready", Duration::from_secs(1), |net| {
            let code = ready(net)?;
            ensure!(code == "503", "{code}");
            Ok(())
        })?;
    ensure!(lab.status()?["draining"] == true);
    // New flows as well, until the end.
    while asked.elapsed() < Duration::from_secs(3) {
        lab.fetch(&page(RESOURCE_V4))?;
        // It is alive, and nothing that should be started anew.
        lab.net
            .sh("gateway", "curl -sf http://127.0.0.1:8080/livez")?;
    }
    lab.gateway_ends(Duration::from_secs(5))?;
    let took = asked.elapsed();
    ensure!((4.0..6.5).contains(&took.as_secs_f64()), "it took {took:?}");
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_second_signal_ends_the_lingering_at_once() -> Result<()> {
    let mut lab = Lab::new("linger-twice", gateway())?;
    lab.start_portal()?;
    lab.start_gateway(&[("FIREZONE_SHUTDOWN_LINGER", "1m")])?;
    lab.wait_ready()?;
    lab.net.signal("gateway", Signal::TERM)?;
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(lab.net.runs("gateway"));
    // It still listens to what is asked of it.
    lab.net.signal("gateway", Signal::HUP)?;
    lab.net
        .eventually("it is logged", Duration::from_secs(5), |net| {
            ensure!(net.whole_log("gateway").contains("Reload asked for"));
            Ok(())
        })?;
    lab.net.signal("gateway", Signal::INT)?;
    let took = lab.gateway_ends(Duration::from_secs(5))?;
    ensure!(took < Duration::from_millis(1500), "it took {took:?}");
    Ok(())
}

/// The device takes a moment to get its addresses; rules that were made after their removal stayed.
#[test]
#[ignore = "needs root and network namespaces"]
fn stopped_while_the_device_gets_its_addresses_it_leaves_nothing_either() -> Result<()> {
    let mut lab = Lab::new("stop-early", gateway())?;
    lab.start_portal()?;
    for round in 0..8 {
        lab.start_gateway(&[])?;
        let joined = Instant::now() + Duration::from_secs(10);
        loop {
            let log = lab.net.whole_log("gateway");
            if log.matches("grants compared").count() > round {
                break;
            }
            ensure!(Instant::now() < joined, "{log}");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(5 * round as u64));
        lab.end_gateway()?;
    }
    Ok(())
}
