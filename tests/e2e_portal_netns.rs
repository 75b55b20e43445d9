//! The portal channel of the real binary, in network namespaces: what an operator sees and can do
//! when the portal refuses, fails or falls silent.
//!
//! Needs root, coturn, iproute2, nftables and curl; run by `scripts/test`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::netns::Net;
use firezone_lab::scenario::{GATEWAY_TOKEN, Lab, RESOURCE_V4};
use rustix::process::Signal;
use serde_json::{Value, json};

fn gateway() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_firezone-gateway"))
}

/// What the portal takes to notice a change, times two.
const SOON: Duration = Duration::from_secs(5);

fn text(net: &Net, url: &str) -> Result<String> {
    // Probes answer 503 with the text that is asked for.
    let answer = net.try_output("gateway", &format!("curl -s '{url}'"))?;
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

fn readyz(net: &Net) -> Result<String> {
    text(net, "http://127.0.0.1:8080/readyz?verbose")
}

fn alive(lab: &mut Lab) -> Result<()> {
    lab.net
        .sh("gateway", "curl -sf http://127.0.0.1:8080/livez >/dev/null")?;
    ensure!(lab.net.runs("gateway"), "{}", lab.net.log("gateway"));
    Ok(())
}

fn portal_state(net: &Net, wanted: &str) -> Result<Value> {
    let status: Value = serde_json::from_str(&text(net, "http://127.0.0.1:8080/status")?)?;
    ensure!(status["portal"]["state"] == wanted, "{}", status["portal"]);
    Ok(status["portal"].clone())
}

fn revoke(lab: &Lab, revoked: bool) -> Result<()> {
    lab.portal_post(
        "/token",
        &json!({"token": GATEWAY_TOKEN, "revoked": revoked}),
    )
}

fn fetch(net: &Net) -> Result<()> {
    net.sh(
        "client",
        &format!("curl -sf --max-time 2 http://{RESOURCE_V4}/ >/dev/null"),
    )
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_revoked_token_closes_all_access_and_the_gateway_recovers_by_itself() -> Result<()> {
    let mut lab = Lab::new("token", gateway())?;
    let token_file = lab.net.dir().join("token");
    std::fs::write(&token_file, GATEWAY_TOKEN)?;
    let path = token_file.to_string_lossy().into_owned();
    lab.start_surroundings()?;
    lab.start_gateway(&[("FIREZONE_TOKEN", ""), ("FIREZONE_TOKEN_FILE", &path)])?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    lab.fetch(&format!("http://{RESOURCE_V4}/"))
        .with_context(|| lab.net.logs())?;

    revoke(&lab, true)?;
    lab.net
        .eventually("the token counts as refused", SOON, |net| {
            portal_state(net, "blocked")
        })?;
    ensure!(fetch(&lab.net).is_err(), "access outlived the token");
    let ready = readyz(&lab.net)?;
    for words in [
        "[-]portal",
        "blocked: token refused",
        "http_401",
        "invalid_token",
    ] {
        ensure!(ready.contains(words), "no {words}: {ready}");
    }
    let status = lab.status()?;
    ensure!(status["clients"] == json!([]), "{}", status["clients"]);
    alive(&mut lab)?;

    // Made valid again at the portal: SIGHUP says so.
    revoke(&lab, false)?;
    lab.net.signal("gateway", Signal::HUP)?;
    lab.net.eventually("it is let in again", SOON, |net| {
        portal_state(net, "joined")
    })?;
    lab.net.eventually(
        "the client is served again",
        Duration::from_secs(30),
        |net| fetch(net),
    )?;

    // A wrong token in the file changes nothing while the session lasts.
    std::fs::write(&token_file, "mistyped")?;
    std::thread::sleep(Duration::from_secs(2));
    portal_state(&lab.net, "joined")?;
    lab.portal_post("/faults", &json!({"close_all": {"code": 1000}}))?;
    lab.net
        .eventually("the wrong token is refused", SOON, |net| {
            portal_state(net, "blocked")
        })?;
    // The right one again, by a rename as configuration tools do it.
    let draft = token_file.with_extension("new");
    std::fs::write(&draft, format!("{GATEWAY_TOKEN}\n"))?;
    std::fs::rename(&draft, &token_file)?;
    lab.net.eventually("the new file is noticed", SOON, |net| {
        portal_state(net, "joined")
    })?;
    alive(&mut lab)?;

    let log = lab.net.whole_log("gateway");
    ensure!(
        !log.contains(GATEWAY_TOKEN) && !log.contains("mistyped"),
        "a token in the log"
    );
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_refused_token_ends_the_process_with_status_77_where_that_is_wanted() -> Result<()> {
    let mut lab = Lab::new("token-exit", gateway())?;
    lab.start_portal()?;
    lab.start_gateway(&[
        ("FIREZONE_TOKEN", "mistyped"),
        ("FIREZONE_EXIT_ON_AUTH_FAILURE", "true"),
    ])?;
    let status = lab.net.wait("gateway", Duration::from_secs(10))?;
    ensure!(status.code() == Some(77), "{status}");
    ensure!(lab.net.log("gateway").contains("http_401"));
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_budget_ends_the_process_with_status_1_and_the_last_cause() -> Result<()> {
    let mut lab = Lab::new("budget", gateway())?;
    lab.start_portal()?;
    lab.start_gateway(&[("FIREZONE_MAX_PARTITION_TIME", "4s")])?;
    lab.net
        .eventually("it joins", Duration::from_secs(10), |net| {
            portal_state(net, "joined")
        })?;
    // Longer than the budget: none of it is used up while all is well.
    std::thread::sleep(Duration::from_secs(12));
    ensure!(portal_state(&lab.net, "joined")?["backoff"].is_null());
    lab.net.signal("lab-portal", Signal::KILL)?;
    let lost = Instant::now();
    let status = lab.net.wait("gateway", Duration::from_secs(15))?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(lost.elapsed() >= Duration::from_secs(3), "no second chance");
    let log = lab.net.log("gateway");
    ensure!(
        log.contains("giving up") && log.contains("tcp_connect"),
        "{log}"
    );
    Ok(())
}

/// Sets a fault, cuts the connection, and waits until the status names the cause.
fn named(lab: &mut Lab, faults: &Value, kind: &str, limit: u64) -> Result<()> {
    let mut body = json!({"clear": true, "kill_all": true});
    body.as_object_mut()
        .context("an object")?
        .extend(faults.as_object().context("an object")?.clone());
    lab.portal_post("/faults", &body)?;
    lab.net
        .eventually(kind, Duration::from_secs(limit), |net| {
            let status: Value = serde_json::from_str(&text(net, "http://127.0.0.1:8080/status")?)?;
            let portal = &status["portal"];
            ensure!(portal["last_error"]["kind"] == kind, "{portal}");
            let ready = readyz(net)?;
            ensure!(
                portal["state"] == "joined" || ready.contains(kind),
                "not in readyz: {ready}"
            );
            Ok(())
        })
        .with_context(|| faults.to_string())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn faults_of_the_portal_are_named_in_status_readiness_and_traces() -> Result<()> {
    let mut lab = Lab::new("faults", gateway())?;
    lab.start_surroundings()?;
    lab.start_gateway(&[])?;
    lab.wait_ready()?;

    let refuse = |status: u16, retry_after: Option<&str>| json!({"refuse": {"status": status, "retry_after": retry_after}});
    named(&mut lab, &refuse(503, Some("1")), "http_5xx", 20)?;
    named(&mut lab, &refuse(429, None), "http_429", 60)?;
    named(&mut lab, &json!({"join": "ignore"}), "join_timeout", 90)?;
    named(&mut lab, &json!({"channel": "crash"}), "channel_error", 90)?;
    named(
        &mut lab,
        &json!({"channel": "silent"}),
        "stream_silent",
        120,
    )?;
    lab.portal_post("/faults", &json!({"clear": true}))?;
    lab.net.signal("gateway", Signal::HUP)?;
    lab.net
        .eventually("it joins", SOON, |net| portal_state(net, "joined"))?;

    let traced =
        |spans: &[Value], kind: &str| spans.iter().any(|s| s["attributes"]["error.type"] == kind);
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let attempts = lab.spans("portal.connect")?;
        let outages = lab.spans("portal.outage")?;
        let ended = outages.iter().any(|s| {
            s["attributes"]["portal.outage.cause"] == "server_close"
                && s["attributes"]["portal.outage.outcome"] == "joined"
        });
        if ended
            && ["http_5xx", "http_429", "join_timeout"]
                .iter()
                .all(|kind| traced(&attempts, kind))
        {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{attempts:?} {outages:?}");
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_certificate_for_another_name_is_named_with_what_to_check() -> Result<()> {
    let mut lab = Lab::new("tls", gateway())?;
    let root = lab.net.dir().join("root.pem");
    let root = root.to_string_lossy().into_owned();
    let tls = |names, extra: &[&str]| {
        let mut args = vec![
            "--tls-listen",
            "0.0.0.0:8443",
            "--tls-root",
            &root,
            "--tls-names",
            names,
        ];
        args.extend(extra);
        args.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    for (names, extra, words) in [
        ("portal.example", &[][..], "not valid for name"),
        ("203.0.113.1", &["--tls-expired"][..], "expired"),
        ("203.0.113.1", &[][..], ""),
    ] {
        lab.start_portal_with(&tls(names, extra))?;
        lab.start_gateway(&[
            ("FIREZONE_API_URL", "wss://203.0.113.1:8443"),
            ("SSL_CERT_FILE", &root),
        ])?;
        lab.net
            .eventually("the outcome shows", Duration::from_secs(20), |net| {
                if words.is_empty() {
                    return portal_state(net, "joined").map(|_| ());
                }
                let ready = readyz(net)?;
                ensure!(
                    ready.contains("tls_cert") && ready.contains(words),
                    "{words}: {ready}"
                );
                Ok(())
            })?;
        lab.net.kill("gateway")?;
        lab.net.kill("lab-portal")?;
    }
    Ok(())
}
