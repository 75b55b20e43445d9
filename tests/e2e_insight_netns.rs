//! What operators look at: Debian's Prometheus fetches a gateway's metrics and evaluates its alert
//! rules, and a real browser shows its page; in network namespaces.
//!
//! Needs root, coturn, iproute2, nftables, curl, prometheus and chromium; run by `scripts/test`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::{Lab, RESOURCE_V4};
use firezone_lab::traffic::page;
use serde_json::Value;

fn query(lab: &Lab, expression: &str) -> Result<Vec<Value>> {
    let line = format!(
        "curl -sS -f -G http://127.0.0.1:9090/api/v1/query --data-urlencode 'query={expression}'"
    );
    let answer: Value = serde_json::from_str(&lab.net.output("gateway", &line)?)?;
    ensure!(answer["status"] == "success", "{answer}");
    let result = answer["data"]["result"].as_array();
    Ok(result.context("a result")?.clone())
}

/// The value of an expression with exactly one result.
fn value(lab: &Lab, expression: &str) -> Result<f64> {
    let result = query(lab, expression)?;
    ensure!(result.len() == 1, "{expression}: {result:?}");
    let value = result[0]["value"][1].as_str();
    Ok(value.context("a value")?.parse()?)
}

#[test]
#[ignore = "needs root, coturn, prometheus and network namespaces"]
fn prometheus_sees_what_happens_and_raises_the_alarm() -> Result<()> {
    let gateway = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::start_all("metrics", gateway)?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    let rules = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/compose/observability/rules.yaml"
    );
    // Alerts wait for minutes; here nobody does.
    let hasty: String = std::fs::read_to_string(rules)?
        .lines()
        .filter(|line| !line.trim().starts_with("for:"))
        .map(|line| format!("{line}\n"))
        .collect();
    let dir = lab.net.dir().to_owned();
    std::fs::write(dir.join("rules.yaml"), hasty)?;
    let config = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
         rule_files: [{}]\n\
         scrape_configs:\n\
         - {{job_name: firezone-gateway, static_configs: [{{targets: [\"127.0.0.1:8080\"]}}]}}\n",
        dir.join("rules.yaml").display()
    );
    let file = dir.join("prometheus.yaml");
    std::fs::write(&file, config)?;
    let (file, data) = (file.display().to_string(), dir.join("prometheus"));
    let data = format!("--storage.tsdb.path={}", data.display());
    let args = [
        &format!("--config.file={file}"),
        &data,
        "--web.listen-address=127.0.0.1:9090",
    ];
    lab.net
        .start("prometheus", "gateway", Path::new("prometheus"), &args, &[])?;
    lab.net
        .eventually("metrics are there", Duration::from_secs(30), |net| {
            net.sh(
                "gateway",
                "curl -sf -G http://127.0.0.1:9090/api/v1/query \
                 --data-urlencode 'query=sum(gateway_clients{client_path=\"direct\"}) == 1' \
                 | grep -q value",
            )
        })?;
    ensure!(value(&lab, "sum(gateway_clients{client_path=\"direct\"})")? == 1.0);
    ensure!(value(&lab, "gateway_portal_state{state=\"joined\"}")? == 1.0);
    ensure!(value(&lab, "gateway_health{probe=\"ready\"}")? == 1.0);
    ensure!(value(&lab, "sum(gateway_network_io_bytes_total)")? > 500.0);
    let alerts = query(&lab, "ALERTS")?;
    ensure!(alerts.is_empty(), "{alerts:?}");

    lab.net.kill("lab-portal")?;
    lab.net.kill("coturn")?;
    lab.net
        .eventually("the alarms", Duration::from_secs(90), |net| {
            let alerts = net.output(
                "gateway",
                "curl -sf 'http://127.0.0.1:9090/api/v1/query?query=ALERTS'",
            )?;
            for alert in ["GatewayNotReady", "GatewayNoRelay"] {
                ensure!(alerts.contains(alert), "no {alert}: {alerts}");
            }
            Ok(())
        })?;
    ensure!(value(&lab, "gateway_portal_outage_duration_seconds")? > 0.0);
    Ok(())
}

/// The page as a browser has it after a few seconds, and what it complained about.
fn browse(lab: &Lab, options: &str) -> Result<(String, String)> {
    // As root it needs to be told that nobody else's pages will be shown.
    let line = format!(
        "HOME={} chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars \
         --enable-logging=stderr --virtual-time-budget=6000 {options} http://127.0.0.1:8080/",
        lab.net.dir().display()
    );
    let output = lab.net.try_output("gateway", &line)?;
    let complaints = String::from_utf8_lossy(&output.stderr)
        .lines()
        .filter(|line| line.contains("CONSOLE"))
        .map(|line| format!("{line}\n"))
        .collect();
    Ok((
        String::from_utf8_lossy(&output.stdout).into_owned(),
        complaints,
    ))
}

/// Screenshots for the documentation, if `FIREZONE_LAB_SCREENSHOTS` names a directory.
fn photograph(lab: &Lab, name: &str, options: &str) -> Result<()> {
    if let Ok(directory) = std::env::var("FIREZONE_LAB_SCREENSHOTS") {
        browse(
            lab,
            &format!("{options} --screenshot={directory}/{name}.png"),
        )?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root, coturn, chromium and network namespaces"]
fn the_page_tells_in_a_browser_what_is_wrong_and_when_it_is_right_again() -> Result<()> {
    let gateway = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::start_all("page", gateway)?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    let id = lab.status()?["clients"][0]["id"].clone();
    let id = id.as_str().context("an id")?;
    let (dom, complaints) = browse(&lab, "--dump-dom")?;
    for wanted in [
        "<h1 id=\"name\">lab gateway</h1>",
        "✓ live",
        "✓ ready",
        ">joined</span> for",
        "203.0.113.1:3478",
        ">allocated</td>",
        id,
        "direct",
        "No outage of the portal channel",
    ] {
        ensure!(dom.contains(wanted), "no {wanted}: {complaints}{dom}");
    }
    ensure!(complaints.is_empty(), "{complaints}");

    lab.net.kill("lab-portal")?;
    lab.net
        .eventually("the outage is known", Duration::from_secs(30), |net| {
            net.sh(
                "gateway",
                "curl -s http://127.0.0.1:8080/readyz | grep -q 'not joined'",
            )
        })?;
    std::thread::sleep(Duration::from_secs(5));
    photograph(&lab, "page-outage", "--window-size=1100,1000")?;
    let (dom, complaints) = browse(&lab, "--dump-dom")?;
    for wanted in [
        "✗ ready",
        "Outage for",
        "failed attempts",
        "It never gives up",
        "goes on",
        "1 outage of",
    ] {
        ensure!(dom.contains(wanted), "no {wanted}: {dom}");
    }
    // The one complaint is that `/readyz` says 503.
    let others: Vec<&str> = complaints.lines().filter(|l| !l.contains("503")).collect();
    ensure!(others.is_empty(), "{others:?}");

    lab.start_portal()?;
    lab.net
        .eventually("the outage is over", Duration::from_secs(90), |net| {
            let status = net.output("gateway", "curl -sf http://127.0.0.1:8080/status")?;
            let status: Value = serde_json::from_str(&status)?;
            let outages = status["portal"]["outages"].as_array();
            ensure!(outages.is_some_and(|o| o.len() == 1), "{status}");
            Ok(())
        })?;
    let (dom, _) = browse(&lab, "--dump-dom")?;
    ensure!(
        dom.contains("✓ ready") && dom.contains("1 outage of"),
        "{dom}"
    );
    photograph(
        &lab,
        "page-phone",
        "--window-size=500,1400 --blink-settings=preferredColorScheme=0",
    )
}

/// What `firezone-gateway` says in the gateway's namespace.
fn gateway(lab: &Lab, arguments: &str) -> Result<String> {
    let line = format!(
        "HEALTH_CHECK_ADDR=127.0.0.1:8080 {} {arguments}",
        env!("CARGO_BIN_EXE_firezone-gateway")
    );
    lab.net.output("gateway", &line)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn the_log_level_changes_while_the_gateway_runs() -> Result<()> {
    let binary = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::new("loglevel", binary)?;
    lab.start_surroundings()?;
    lab.start_gateway(&[("RUST_LOG", "warn")])?;
    lab.wait_ready()?;
    let says = |lab: &Lab, text: &str| lab.net.whole_log("gateway").contains(text);
    ensure!(!says(&lab, "INFO"), "{}", lab.net.logs());
    ensure!(gateway(&lab, "log-filter")?.trim() == "warn");
    ensure!(gateway(&lab, "log-filter info,firezone_gateway::portal=debug")?.contains("debug"));
    ensure!(gateway(&lab, "log-filter a=b=c").is_err());
    lab.net.signal("gateway", rustix::process::Signal::HUP)?;
    // The portal is tried again at once, and the filter is the one of the settings.
    lab.net
        .eventually("the signal was heard", Duration::from_secs(10), |net| {
            let log = net.whole_log("gateway");
            let told = "Another log filter is in force";
            ensure!(log.matches(told).count() == 2, "{log}");
            Ok(())
        })?;
    ensure!(says(&lab, "Reload asked for"), "{}", lab.net.logs());
    ensure!(gateway(&lab, "log-filter")?.trim() == "warn");
    Ok(())
}
