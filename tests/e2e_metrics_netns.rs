//! Debian's Prometheus fetches a gateway's metrics and evaluates its alert rules, in network
//! namespaces.
//!
//! Needs root, coturn, iproute2, nftables, curl and prometheus; run by `scripts/test`.

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
                "curl -sf 'http://127.0.0.1:9090/api/v1/query?query=gateway_clients' | grep -q direct",
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
