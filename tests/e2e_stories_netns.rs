//! What operators live through, in network namespaces: each story happens for real, and readiness,
//! `firezone-gateway status` and the trace have to name its cause, in words that its section of the
//! runbook has as well.
//!
//! Needs root, coturn, iproute2, nftables and curl; run by `scripts/test`.
//! `FIREZONE_LAB_STORIES=directory` keeps what each of them showed, for the runbook.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use firezone_lab::scenario::{GATEWAY_TOKEN, INTERNET, Lab, RESOURCE_V4, RESOURCE_V6};
use firezone_lab::traffic::page;
use rustix::process::Signal;
use serde_json::{Value, json};

const RUNBOOK: &str = include_str!("../docs/runbook.md");

/// For whatever has to happen: far longer than it takes.
const LIMIT: Duration = Duration::from_secs(60);

/// A lab, and the section of the runbook that tells what happens in it.
struct Story {
    lab: Lab,
    title: &'static str,
    section: String,
    shown: String,
}

impl Story {
    fn new(title: &'static str) -> Result<Self> {
        let (_, section) = RUNBOOK
            .split_once(&format!("\n### {title}\n"))
            .with_context(|| format!("the runbook has no section {title:?}"))?;
        let section = section.split("\n## ").next().unwrap_or_default();
        let section = section.split("\n### ").next().unwrap_or_default();
        let name = title
            .to_lowercase()
            .replace(|c: char| !c.is_alphanumeric(), "-");
        Ok(Self {
            lab: Lab::new(&name, Path::new(env!("CARGO_BIN_EXE_firezone-gateway")))?,
            title,
            section: section.to_owned(),
            shown: String::new(),
        })
    }

    /// Portal, relays, gateway and a client that has got a page.
    fn begin(&mut self, relays: usize) -> Result<()> {
        self.lab.start_surroundings()?;
        if relays == 2 {
            self.lab.start_second_relay()?;
        }
        self.lab.start_gateway(&[])?;
        self.lab.wait_ready()?;
        self.lab.start_client(&[])?;
        self.page()
    }

    /// A page comes through the tunnel, if not at once.
    fn page(&mut self) -> Result<()> {
        self.lab.reach(LIMIT.as_secs()).map(|_| ())
    }

    fn show(&mut self, what: &str, text: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.shown, "---- {what} ----\n{text}");
    }

    /// Waits until what `look` shows has all these words, which the runbook must have, too.
    fn shows(
        &mut self,
        what: &str,
        words: &[&str],
        look: impl Fn(&Lab) -> Result<String>,
    ) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let text = look(&self.lab);
            let missing = match &text {
                Ok(text) => words.iter().find(|w| !text.contains(**w)),
                Err(_) => words.first(),
            };
            match (text, missing) {
                (Ok(text), None) => {
                    self.show(what, &text);
                    break;
                }
                (text, missing) if Instant::now() > end => {
                    bail!(
                        "no {missing:?} in {what}: {text:?}\n{}",
                        self.lab.net.logs()
                    );
                }
                _ => std::thread::sleep(Duration::from_millis(100)),
            }
        }
        self.documented(words)
    }

    fn documented(&self, words: &[&str]) -> Result<()> {
        for words in words {
            ensure!(
                self.section.contains(words),
                "the runbook's section {:?} has no {words:?}\n{}",
                self.title,
                self.shown
            );
        }
        Ok(())
    }

    /// `/readyz?verbose`, whether it passes or not.
    fn readyz(&mut self, words: &[&str]) -> Result<()> {
        self.shows("readyz", words, |lab| probe(lab, "readyz"))
    }

    /// `firezone-gateway status`.
    fn status(&mut self, words: &[&str]) -> Result<()> {
        self.shows("status", words, Lab::status_table)
    }

    /// Waits for a span with these attributes, all of which the runbook must name.
    fn span(&mut self, name: &str, wanted: &Value) -> Result<Value> {
        let wanted = wanted.as_object().context("attributes")?;
        let end = Instant::now() + LIMIT;
        let has = |span: &Value| {
            wanted
                .iter()
                .all(|(key, value)| span["attributes"][key] == *value)
        };
        let span = loop {
            let spans = self.lab.spans(name)?;
            if let Some(span) = spans.iter().find(|span| has(span)) {
                break span.clone();
            }
            ensure!(
                Instant::now() < end,
                "no {name} {wanted:?}: {spans:#?}\n{}",
                self.lab.net.logs()
            );
            std::thread::sleep(Duration::from_millis(200));
        };
        let mut line = name.to_owned();
        for (key, value) in span["attributes"].as_object().context("attributes")? {
            let _ = write!(line, " {key}={}", value.to_string().trim_matches('"'));
        }
        let status = &span["status"];
        let _ = write!(
            line,
            " status={}",
            status["code"].to_string().trim_matches('"')
        );
        if status["message"] != "" {
            let _ = write!(
                line,
                ": {}",
                status["message"].to_string().trim_matches('"')
            );
        }
        self.show("span", &line);
        self.documented(&[name])?;
        for (key, value) in wanted {
            self.documented(&[&format!("{key}={}", value.to_string().trim_matches('"'))])?;
        }
        Ok(span)
    }

    /// Keeps what was shown, if somebody wants it.
    fn end(self) -> Result<()> {
        if let Ok(directory) = std::env::var("FIREZONE_LAB_STORIES") {
            std::fs::create_dir_all(&directory)?;
            let file = Path::new(&directory).join(format!("{}.txt", self.title));
            std::fs::write(file, &self.shown)?;
        }
        Ok(())
    }
}

/// Probes answer 503 with the text that is asked for.
fn probe(lab: &Lab, name: &str) -> Result<String> {
    let line = format!("curl -s --max-time 5 'http://127.0.0.1:8080/{name}?verbose'");
    let answer = lab.net.try_output("gateway", &line)?;
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

/// Waits until this many outages are over, which a join has to last for.
fn outages(lab: &mut Lab, count: usize) -> Result<()> {
    lab.net.eventually("the outage is over", LIMIT, |net| {
        let status = net.output("gateway", "curl -sf http://127.0.0.1:8080/status")?;
        let status: Value = serde_json::from_str(&status)?;
        let outages = status["portal"]["outages"].as_array().map_or(0, Vec::len);
        ensure!(outages == count, "{}", status["portal"]);
        Ok(())
    })
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_portal_deploy() -> Result<()> {
    let mut story = Story::new("Portal deploy")?;
    story.begin(1)?;
    let close = json!({"code": 1012, "reason": "deploy"});
    story.lab.portal_post("/shutdown", &close)?;
    story.lab.net.wait("lab-portal", LIMIT)?;
    // Either still the Close frame, or already that nobody is there after it.
    story.readyz(&["[-]portal not joined: ", "server_close"])?;
    story.status(&["outage for", "server_close"])?;
    story.lab.fetch(&page(RESOURCE_V4))?;
    story.lab.start_portal()?;
    story.lab.wait_ready()?;
    outages(&mut story.lab, 1)?;
    story.status(&["outages in the last 24 hours: 1", "server_close"])?;
    let attempt = story.span("portal.connect", &json!({"portal.cause": "spread"}))?;
    let outage = json!({
        "portal.outage.cause": "server_close",
        "portal.outage.outcome": "joined",
    });
    let outage = story.span("portal.outage", &outage)?;
    let links = outage["links"].to_string();
    let id = attempt["span_id"].as_str().context("an id")?;
    ensure!(links.contains(id), "{outage:#} {attempt:#}");
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_portal_that_is_down() -> Result<()> {
    let mut story = Story::new("Portal down for 20 minutes")?;
    story.begin(1)?;
    story.lab.net.kill("lab-portal")?;
    story.readyz(&["[-]portal not joined: waiting for attempt 5", "tcp_connect"])?;
    story.status(&["outage for", "never gives up", "tcp_connect", "connected"])?;
    story.lab.fetch(&page(RESOURCE_V4))?;
    story.lab.start_portal()?;
    story.lab.wait_ready()?;
    outages(&mut story.lab, 1)?;
    story.span(
        "portal.connect",
        &json!({"error.type": "tcp_connect", "portal.attempt": 4}),
    )?;
    let outage = json!({
        "portal.outage.last_cause": "tcp_connect",
        "portal.outage.outcome": "joined",
    });
    let outage = story.span("portal.outage", &outage)?;
    let links = outage["links"].as_array().map_or(0, Vec::len);
    ensure!(links >= 5, "{outage:#}");
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_revoked_token() -> Result<()> {
    let mut story = Story::new("Token revoked")?;
    story.begin(1)?;
    let revoke = |story: &Story, revoked: bool| {
        let body = json!({"token": GATEWAY_TOKEN, "revoked": revoked});
        story.lab.portal_post("/token", &body)
    };
    revoke(&story, true)?;
    story.readyz(&["[-]portal not joined: blocked: token refused", "http_401"])?;
    story.status(&["blocked: token refused", "http_401", "Clients: 0"])?;
    let refused = json!({"error.type": "http_401", "http.response.status_code": 401});
    story.span("portal.connect", &refused)?;
    revoke(&story, false)?;
    story.lab.net.signal("gateway", Signal::HUP)?;
    story.lab.wait_ready()?;
    outages(&mut story.lab, 1)?;
    story.span(
        "portal.outage",
        &json!({"portal.outage.last_cause": "http_401"}),
    )?;
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_wrong_name_in_the_certificate() -> Result<()> {
    let mut story = Story::new("TLS name wrong")?;
    let root = story.lab.net.dir().join("root.pem");
    let root = root.to_string_lossy().into_owned();
    story.lab.start_surroundings()?;
    story.lab.net.kill("lab-portal")?;
    let tls = ["--tls-listen", "0.0.0.0:8443", "--tls-root", &root];
    let names = ["--tls-names", "portal.example"];
    let args: Vec<String> = tls.iter().chain(&names).map(|&a| a.to_owned()).collect();
    story.lab.start_portal_with(&args)?;
    story.lab.start_gateway(&[
        ("FIREZONE_API_URL", &format!("wss://{INTERNET}:8443")),
        ("SSL_CERT_FILE", &root),
    ])?;
    let words = ["tls_cert", "not valid for name", INTERNET, "portal.example"];
    story.readyz(&[&["[-]portal not joined"], &words[..]].concat())?;
    story.status(&words)?;
    let span = json!({"error.type": "tls_cert"});
    let attempt = story.span("portal.connect", &span)?;
    let handshake = story.span("tls.handshake", &span)?;
    ensure!(
        handshake["parent_span_id"] == attempt["span_id"],
        "{attempt:#} {handshake:#}"
    );
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_relay_that_restarts() -> Result<()> {
    let mut story = Story::new("One relay restarts and loses its state")?;
    story.lab.block_direct()?;
    story.begin(2)?;
    let client = story.lab.status()?["clients"][0].clone();
    let in_use = format!("{} {}", client["local"], client["remote"]);
    story.show("in use", &in_use);
    let first = in_use.contains(INTERNET);
    story
        .lab
        .net
        .kill(if first { "coturn" } else { "coturn-b" })?;
    if first {
        story.lab.start_relay()?;
    } else {
        story.lab.restart_second_relay()?;
    }
    story.page()?;
    story.status(&["the relay has forgotten our allocation"])?;
    story.readyz(&["[+]relays ok: 2 of 2 usable"])?;
    story.span(
        "relay.episode",
        &json!({"relay.end.reason": "relay_forgot"}),
    )?;
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn relays_that_flap() -> Result<()> {
    let mut story = Story::new("Relays flap")?;
    story.begin(1)?;
    for _ in 0..5 {
        story.lab.offer_relays(0)?;
        story.lab.offer_relays(1)?;
    }
    story.status(&["FLAPS", "allocated"])?;
    story.readyz(&["[+]relays ok: 1 of 1 usable"])?;
    story.page()?;
    story.lab.net.signal("gateway", Signal::TERM)?;
    story.lab.net.wait("gateway", LIMIT)?;
    story.span("relay.episode", &json!({"relay.flaps": 5}))?;
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn relays_that_are_all_gone() -> Result<()> {
    let mut story = Story::new("All relays gone")?;
    story.lab.block_direct()?;
    story.begin(1)?;
    story.lab.net.kill("coturn")?;
    story.readyz(&["[-]relays none of 1 usable", "the relay does not answer"])?;
    story.status(&["failed", "the relay does not answer"])?;
    story.lab.start_relay()?;
    story.lab.wait_ready()?;
    story.page()?;
    story.span(
        "relay.episode",
        &json!({"relay.end.reason": "relay_no_response"}),
    )?;
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_direct_path_that_dies() -> Result<()> {
    let mut story = Story::new("A client's direct path dies")?;
    story.begin(1)?;
    story
        .lab
        .expect_path(|path| path == "direct", LIMIT.as_secs())?;
    story.lab.block_direct()?;
    story
        .lab
        .expect_path(|path| path.starts_with("relay"), LIMIT.as_secs())?;
    story.status(&["after direct (dead)"])?;
    let path = json!({"client.path": "direct", "client.path.end.reason": "dead"});
    story.span("connection.path", &path)?;
    story.readyz(&["readyz check passed"])?;
    story.page()?;
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_host_that_does_not_forward() -> Result<()> {
    let mut story = Story::new("Forwarding off on the host")?;
    story.begin(1)?;
    let forward = |story: &Story, value: u8| {
        let line = format!("echo {value} > /proc/sys/net/ipv4/ip_forward");
        story.lab.net.sh("gateway", &line)
    };
    forward(&story, 0)?;
    let words = [
        "forwarding_ipv4",
        "net.ipv4.ip_forward=0: the kernel does not forward IPv4",
        "clients connect, but their IPv4 packets reach no resource",
        "sysctl",
    ];
    story.status(&words)?;
    story.shows("startupz", &words, |lab| probe(lab, "startupz"))?;
    story.readyz(&words)?;
    ensure!(story.lab.reach(1).is_err(), "what forwards?");
    forward(&story, 1)?;
    story.lab.wait_ready()?;
    story.page()?;
    let lack = json!({
        "host.check": "forwarding_ipv4",
        "host.level": "error",
        "host.mended": true,
    });
    let lack = story.span("host.lack", &lack)?;
    ensure!(lack["status"]["message"].to_string().contains(words[1]));
    story.end()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_host_without_ipv6() -> Result<()> {
    let mut story = Story::new("IPv6 off")?;
    let switch_off = |story: &Story, value: u8| {
        let line = format!("echo {value} > /proc/sys/net/ipv6/conf/all/disable_ipv6");
        story.lab.net.sh("gateway", &line)
    };
    switch_off(&story, 1)?;
    story.begin(1)?;
    story.status(&["IPv6 is switched off", "disable_ipv6"])?;
    story.readyz(&["[+]host ok: with", "IPv6 is switched off"])?;
    let over_v6 = format!("curl -sf -g --max-time 2 '{}'", page(RESOURCE_V6));
    ensure!(story.lab.net.sh("client", &over_v6).is_err());
    // It is seen to at the start of the gateway.
    story.lab.net.signal("gateway", Signal::TERM)?;
    story.lab.net.wait("gateway", LIMIT)?;
    let lack = json!({"host.check": "ipv6_enabled", "host.level": "warning"});
    story.span("host.lack", &lack)?;
    switch_off(&story, 0)?;
    // Its address there went with IPv6.
    story
        .lab
        .net
        .sh("gateway", "ip addr add fd99::1/64 dev eth1 nodad")?;
    story.lab.start_gateway(&[])?;
    story.lab.wait_ready()?;
    let limit = LIMIT;
    story
        .lab
        .net
        .eventually("a page over IPv6", limit, |net| net.sh("client", &over_v6))?;
    story.end()
}
