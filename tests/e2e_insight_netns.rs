//! What operators look at: Debian's Prometheus fetches a gateway's metrics and evaluates its alert
//! rules, and a real browser shows its page; in network namespaces.
//!
//! Needs root, coturn, iproute2, nftables, curl, prometheus and chromium; run by `scripts/test`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use firezone_lab::browser::Browser;
use firezone_lab::scenario::{CLIENT_TOKEN, GATEWAY_TOKEN, Lab, RELAY_SECRET, RESOURCE_V4};
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
    for what in ["portal_connect", "relay_allocate", "client_setup"] {
        let count = format!("sum(gateway_{what}_duration_seconds_count)");
        ensure!(value(&lab, &count)? >= 1.0, "{what}");
    }
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

/// Screenshots for the documentation, if `FIREZONE_LAB_SCREENSHOTS` names a directory.
fn photograph(browser: &mut Browser, name: &str) -> Result<()> {
    match std::env::var_os("FIREZONE_LAB_SCREENSHOTS") {
        Some(directory) => browser.photograph(&Path::new(&directory).join(format!("{name}.png"))),
        None => Ok(()),
    }
}

const SOON: Duration = Duration::from_secs(10);

#[test]
#[ignore = "needs root, coturn, chromium and network namespaces"]
fn the_page_tells_in_a_browser_what_is_wrong_and_when_it_is_right_again() -> Result<()> {
    let gateway = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::start_all("page", gateway)?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    let id = lab.status()?["clients"][0]["id"].clone();
    let id = id.as_str().context("an id")?;
    // For the chart: some traffic that comes and goes.
    lab.net.start(
        "traffic",
        "client",
        Path::new("sh"),
        &[
            "-c",
            &format!(
                "while sleep 1; do curl -s -o /dev/null '{}'; done",
                page(RESOURCE_V4)
            ),
        ],
        &[],
    )?;
    let mut browser = Browser::open(&lab.net, "gateway", "http://127.0.0.1:8080/")?;
    browser.emulate(1100, 1700, false, false)?;
    let expected = [
        "lab gateway",
        "Shown as it happens.",
        "✓ live",
        "✓ ready",
        "joined for",
        "203.0.113.1:3478",
        "allocated",
        "No allocation ended in the last hour.",
        id,
        "direct for",
    ];
    browser
        .expect(&expected, SOON)
        .with_context(|| lab.net.logs())?;
    let label = |id: &str| format!("document.getElementById('{id}').getAttribute('aria-label')");
    let timeline = browser.eval(&label("timeline"))?;
    ensure!(
        timeline.as_str().is_some_and(|t| t.contains("No outage")),
        "{timeline}"
    );
    // Nothing is asked for while events come, and what is shown is of now.
    let asked =
        "performance.getEntriesByType('resource').filter(e => e.name.includes('/status')).length";
    std::thread::sleep(Duration::from_secs(8));
    ensure!(browser.eval(asked)? == 0);
    let complaints = browser.complaints();
    ensure!(complaints.is_empty(), "{complaints:?}");

    lab.net.kill("lab-portal")?;
    lab.net.kill("coturn")?;
    let expected = [
        "✗ ready",
        "Outage for",
        "failed attempts",
        "next attempt in",
        "It never gives up",
        "goes on",
        "Last attempts",
        "tcp_connect",
        "1 allocation ended in the last hour.",
    ];
    browser.expect(&expected, Duration::from_secs(60))?;
    let attempts = browser.eval(&label("attempts"))?;
    ensure!(
        attempts
            .as_str()
            .is_some_and(|t| t.contains("failed attempts in this outage")),
        "{attempts}"
    );
    let timeline = browser.eval(&label("timeline"))?;
    ensure!(
        timeline
            .as_str()
            .is_some_and(|t| t.starts_with("1 outage of")),
        "{timeline}"
    );
    std::thread::sleep(Duration::from_secs(5));
    photograph(&mut browser, "page-outage")?;

    lab.start_relay()?;
    lab.start_portal()?;
    browser.expect(&["✓ ready", "joined for"], Duration::from_secs(90))?;
    lab.net
        .eventually("the outage is over", Duration::from_secs(90), |net| {
            let status = net.output("gateway", "curl -sf http://127.0.0.1:8080/status")?;
            let status: Value = serde_json::from_str(&status)?;
            let outages = status["portal"]["outages"].as_array();
            ensure!(outages.is_some_and(|o| o.len() == 1), "{status}");
            Ok(())
        })?;
    browser.emulate(412, 2300, true, true)?;
    let text = browser.expect(&["✓ ready", "Outages of the last 24 hours"], SOON)?;
    ensure!(!text.contains("goes on"), "{text}");
    let fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth";
    ensure!(browser.eval(fits)? == true, "wider than a phone");
    photograph(&mut browser, "page-phone")?;
    let complaints = browser.complaints();
    ensure!(complaints.is_empty(), "{complaints:?}");

    // The gateway restarts: what is shown is old, then new again, by itself.
    lab.net.kill("gateway")?;
    browser.expect(&["What you see is old"], Duration::from_secs(20))?;
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    let text = browser.expect(
        &["Shown as it happens.", "✓ ready"],
        Duration::from_secs(20),
    )?;
    ensure!(!text.contains("What you see is old"), "{text}");
    ensure!(
        !text.contains("Outages of the last"),
        "of the former process: {text}"
    );
    Ok(())
}

#[test]
#[ignore = "needs root, coturn, chromium and network namespaces"]
fn the_page_asks_by_itself_where_events_do_not_come() -> Result<()> {
    let gateway = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::new("polling", gateway)?;
    lab.start_surroundings()?;
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    // Others take all the places; some come too late, and again.
    for n in 0..20 {
        let line = [
            "-sN",
            "--retry",
            "1000",
            "--retry-delay",
            "1",
            "http://127.0.0.1:8080/events",
        ];
        lab.net.start(
            &format!("looker-{n}"),
            "gateway",
            Path::new("curl"),
            &line,
            &[],
        )?;
    }
    lab.net.eventually("all places are taken", SOON, |net| {
        net.sh(
            "gateway",
            "curl -s -m 1 http://127.0.0.1:8080/events | grep -q 'too many'",
        )
    })?;
    let mut browser = Browser::open(&lab.net, "gateway", "http://127.0.0.1:8080/")?;
    browser.expect(&["Shown every 2 seconds.", "✓ ready", "joined for"], SOON)?;
    for n in 0..20 {
        lab.net.kill(&format!("looker-{n}"))?;
    }
    browser.expect(&["Shown as it happens."], Duration::from_secs(20))?;
    Ok(())
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

/// With what status the gateway's host is answered; 000 without an answer.
fn code(lab: &Lab, url: &str) -> Result<String> {
    let line = format!("curl -s -o /dev/null -w '%{{http_code}}' {url}");
    let output = lab.net.try_output("gateway", &line)?;
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn others_reach_the_probes_and_only_the_host_the_rest() -> Result<()> {
    let binary = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::new("binds", binary)?;
    lab.start_surroundings()?;
    lab.start_gateway(&[("HEALTH_CHECK_ADDR", "0.0.0.0:8080")])?;
    lab.wait_ready()?;
    let own = lab.net.output(
        "gateway",
        "ip -4 -o addr show scope global | grep -v tun- | awk '{print $4}' | cut -d/ -f1 | head -1",
    )?;
    let own = own.trim();
    for (url, expected) in [
        (format!("{own}:8080/livez"), "200"),
        (format!("{own}:8080/status"), "404"),
        (format!("{own}:8081/livez"), "000"),
        ("127.0.0.1:8081/status".to_owned(), "200"),
        ("127.0.0.1:8081/livez".to_owned(), "200"),
    ] {
        let found = code(&lab, &url)?;
        ensure!(found == expected, "{url}: {found}");
    }
    lab.net.kill("gateway")?;

    let socket = format!("unix:{}", lab.net.dir().join("admin.sock").display());
    let env = [
        ("HEALTH_CHECK_ADDR", "0.0.0.0:8080"),
        ("FIREZONE_ADMIN_ADDR", socket.as_str()),
    ];
    // Once more, over what the first one left behind.
    for _ in 0..2 {
        lab.start_gateway(&env)?;
        lab.wait_ready()?;
        let say = |arguments: &str| {
            let binary = binary.display();
            let line = format!(
                "HEALTH_CHECK_ADDR=0.0.0.0:8080 FIREZONE_ADMIN_ADDR={socket} {binary} {arguments}"
            );
            lab.net.output("gateway", &line)
        };
        ensure!(say("status")?.contains("lab gateway"));
        ensure!(say("log-filter debug")?.trim() == "debug");
        ensure!(say("healthcheck")?.contains("live: ok"));
        ensure!(code(&lab, "127.0.0.1:8081/status")? == "000");
        lab.net.kill("gateway")?;
    }
    Ok(())
}

/// All files of an archive that `diagnose` writes in the gateway's namespace, by name.
fn bundle(lab: &Lab, env: &str) -> Result<BTreeMap<String, String>> {
    let file = lab.net.dir().join("bundle.tar.gz");
    let _ = std::fs::remove_file(&file);
    let (file, binary) = (file.display(), env!("CARGO_BIN_EXE_firezone-gateway"));
    lab.net
        .output("gateway", &format!("{env} {binary} diagnose -o {file}"))?;
    let list = lab.net.output("gateway", &format!("tar tzf {file}"))?;
    let mut files = BTreeMap::new();
    for path in list.lines() {
        let name = path.split_once('/').context("a directory")?.1;
        let text = lab
            .net
            .output("gateway", &format!("tar xzOf {file} {path}"))?;
        files.insert(name.to_owned(), text);
    }
    Ok(files)
}

/// Words as long as a key or password is in base64 or hexadecimal: 20 bytes are what a relay's
/// password has, 32 a WireGuard key.
fn looks_secret(word: &str) -> bool {
    let base64 = |c: char| c.is_ascii_alphanumeric() || "+/-_".contains(c);
    let coded = word.trim_end_matches('=');
    let mixed = coded.contains(|c: char| c.is_ascii_uppercase())
        && coded.contains(|c: char| c.is_ascii_lowercase())
        && coded.contains(|c: char| c.is_ascii_digit());
    match word.len() {
        27 | 28 | 43 | 44 => mixed && coded.chars().all(base64),
        40 | 64 => word.chars().all(|c| c.is_ascii_hexdigit()),
        _ => false,
    }
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_diagnostic_bundle_tells_what_is_wrong_and_no_secret() -> Result<()> {
    ensure!(looks_secret("rU7vO3uTm7dJ0FqXo2yJ8v9lB4k="));
    ensure!(looks_secret("yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="));
    let binary = Path::new(env!("CARGO_BIN_EXE_firezone-gateway"));
    let mut lab = Lab::new("diagnose", binary)?;
    lab.start_surroundings()?;
    let admin = lab.net.dir().join("admin-token");
    std::fs::write(&admin, "admin-secret-1\n")?;
    let admin = admin.display().to_string();
    let env = [
        ("FIREZONE_ADMIN_TOKEN_FILE", admin.as_str()),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20otlp-secret-2",
        ),
        ("RUST_LOG", "trace"),
    ];
    lab.start_gateway(&env)?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    lab.fetch(&page(RESOURCE_V4))
        .with_context(|| lab.net.logs())?;
    // Trouble has most to say.
    lab.net.kill("lab-portal")?;
    lab.net.kill("coturn")?;
    lab.net
        .eventually("the trouble is known", Duration::from_secs(90), |net| {
            let ready = net.output("gateway", "curl -s http://127.0.0.1:8080/readyz")?;
            ensure!(
                ready.contains("tcp_connect") && ready.contains("does not answer"),
                "{ready}"
            );
            Ok(())
        })?;
    let knowing = format!(
        "HEALTH_CHECK_ADDR=127.0.0.1:8080 FIREZONE_ID=lab-gateway FIREZONE_ADMIN_TOKEN_FILE={admin}"
    );
    let all = format!(
        "{knowing} FIREZONE_TOKEN={GATEWAY_TOKEN} OTEL_EXPORTER_OTLP_HEADERS={}",
        env[1].1
    );
    // Once knowing all secrets, once as little as will do: none is there to be removed.
    for environment in [&all, &knowing] {
        let files = bundle(&lab, environment)?;
        for (file, wanted) in [
            ("status.json", "\"tcp_connect\""),
            ("status.txt", "lab gateway"),
            ("readyz.txt", "[-]portal not joined"),
            ("metrics.txt", "gateway_portal_state"),
            ("log.txt", "Path to the client"),
            ("log.txt", "portal connection lost"),
            ("log-filter.txt", "trace"),
            ("config.txt", "FIREZONE_ADMIN_TOKEN_FILE"),
            ("nft.txt", "masq"),
            ("interfaces.txt", "tun-firezone"),
            ("rules.txt", "table"),
            ("routes.txt", "100.64.0.0"),
            ("preflight.txt", "nftables"),
            ("proc/net/snmp", "Udp:"),
        ] {
            let text = files.get(file).with_context(|| format!("no {file}"))?;
            ensure!(text.contains(wanted), "{file} without {wanted}: {text}");
        }
        for (file, text) in &files {
            for secret in [
                GATEWAY_TOKEN,
                GATEWAY_TOKEN.trim_start_matches('.'),
                "admin-secret-1",
                "otlp-secret-2",
                RELAY_SECRET,
                CLIENT_TOKEN,
            ] {
                ensure!(!text.contains(secret), "{secret} is in {file}");
            }
            if file.starts_with("proc/") {
                // The kernel knows no secret of ours, but long names.
                continue;
            }
            let word = |c: char| !c.is_ascii_alphanumeric() && !"+/-_=".contains(c);
            let found = text.split(word).find(|word| looks_secret(word));
            ensure!(found.is_none(), "{found:?} in {file} may be a secret");
        }
    }
    // Neither the last lines nor the filter are for whoever asks.
    for path in ["log", "log-filter", "status", "metrics"] {
        let found = code(&lab, &format!("127.0.0.1:8080/{path}"))?;
        ensure!(found == "401", "{path}: {found}");
    }
    Ok(())
}
