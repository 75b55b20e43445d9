//! A loop of the real binary that does not turn is noticed within ten seconds, and named; faults are
//! injected, which only builds with debug assertions let happen to them.
//!
//! Needs root, iproute2 and curl; run by `scripts/test`.

// How long it took is worth seeing even when nothing fails.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::netns::Net;
use firezone_lab::scenario::Lab;
use serde_json::json;

const GATEWAY: &str = env!("CARGO_BIN_EXE_firezone-gateway");

/// Within which time liveness has to fail.
const LIMIT: Duration = Duration::from_secs(10);

/// A gateway that is joined, and does what the file `fault` says.
fn lab(name: &str) -> Result<Lab> {
    // The binary that this build made: what FIREZONE_LAB_BIN_DIR has knows no faults.
    let mut lab = Lab::of(name, Path::new(GATEWAY))?;
    lab.start_portal()?;
    let file = lab.net.dir().join("fault");
    let file = file.to_string_lossy().into_owned();
    lab.start_gateway(&[("FIREZONE_FAULT_FILE", &file)])?;
    lab.wait_ready()?;
    Ok(lab)
}

fn inject(lab: &Lab, fault: &str) -> Result<Instant> {
    // By a rename: half a line is no fault.
    let file = lab.net.dir().join("fault");
    let draft = file.with_extension("new");
    std::fs::write(&draft, fault)?;
    std::fs::rename(&draft, &file)?;
    Ok(Instant::now())
}

/// Code and text of `/livez?verbose`.
fn livez(net: &Net) -> Result<(String, String)> {
    let line = "curl -s --max-time 5 -w '\n%{http_code}' 'http://127.0.0.1:8080/livez?verbose'";
    let answer = net.output("gateway", line)?;
    let (text, code) = answer.rsplit_once('\n').context("no code")?;
    Ok((code.to_owned(), text.to_owned()))
}

fn wedge(lab: &mut Lab, stuck: &str, well: &str) -> Result<()> {
    let (code, text) = livez(&lab.net)?;
    let both = text.contains("[+]slow_path ok") && text.contains("[+]worker-0 ok");
    ensure!(code == "200" && both, "{code} {text}");

    let begun = inject(lab, &format!("wedge {stuck}\n"))?;
    let took = lab.net.eventually("liveness fails", LIMIT, |net| {
        let (code, text) = livez(net)?;
        let named = text.contains(&format!("[-]{stuck} stuck: no sign of life for"));
        let other = text.contains(&format!("[+]{well} ok"));
        ensure!(code == "503" && named && other, "{code} {text}");
        Ok(begun.elapsed())
    })?;
    println!("{stuck}: 503 after {took:?}");
    ensure!(took <= LIMIT, "{took:?}");
    // Both sub-commands say so as well, without waiting for what is stuck.
    let table = lab.status_table()?;
    ensure!(
        table.contains(&format!("not alive: {stuck} stuck")),
        "{table}"
    );
    let check = format!("HEALTH_CHECK_ADDR=127.0.0.1:8080 {GATEWAY} healthcheck --check live");
    let check = lab.net.try_output("gateway", &check)?;
    let told = String::from_utf8_lossy(&check.stdout).into_owned();
    ensure!(
        !check.status.success() && told.contains(&format!("[-]{stuck} stuck")),
        "{told}"
    );

    inject(lab, "")?;
    lab.net.eventually("it turns again", LIMIT, |net| {
        let (code, text) = livez(net)?;
        ensure!(code == "200", "{text}");
        Ok(())
    })?;
    let table = lab.status_table()?;
    ensure!(!table.contains("not alive"), "{table}");
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_wedged_slow_path_is_noticed_and_named() -> Result<()> {
    wedge(&mut lab("wedged-slow-path")?, "slow_path", "worker-0")
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_wedged_worker_is_noticed_and_named() -> Result<()> {
    wedge(&mut lab("wedged-worker")?, "worker-0", "slow_path")
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_dead_worker_is_named_and_ends_the_process_which_is_of_no_use_without_it() -> Result<()> {
    let mut lab = lab("dead-worker")?;
    // A portal that does not answer the farewell gives us half a second to look.
    lab.portal_post("/faults", &json!({"blackhole": true}))?;
    inject(&lab, "fail worker-0\n")?;
    // On a busy machine the look may come too late. What remains then is what it left behind.
    let seen = lab
        .net
        .eventually("liveness fails, or the process has ended", LIMIT, |net| {
            let Ok((code, text)) = livez(net) else {
                return Ok(None);
            };
            ensure!(code == "503", "{code} {text}");
            Ok(Some(text))
        })?;
    match seen {
        Some(text) => ensure!(text.contains("[-]worker-0 died"), "{text}"),
        None => println!("dead-worker: nobody answers any more, so that liveness was not seen"),
    }
    let status = lab.net.wait("gateway", LIMIT)?;
    ensure!(status.code() == Some(1), "{status}");
    let log = lab.net.log("gateway");
    for words in ["A worker died", "worker-0", "a fault was asked for"] {
        ensure!(log.contains(words), "no {words}: {log}");
    }
    Ok(())
}

#[test]
#[ignore = "needs the release build that FIREZONE_LAB_BIN_DIR names"]
fn a_release_build_knows_no_faults() -> Result<()> {
    let knows = |path: &Path| -> Result<bool> {
        let wanted = b"FIREZONE_FAULT_FILE";
        let binary = std::fs::read(path).with_context(|| path.display().to_string())?;
        Ok(binary.windows(wanted.len()).any(|part| part == wanted))
    };
    ensure!(
        knows(Path::new(GATEWAY))?,
        "what is looked for is not there"
    );
    if let Some(release) = std::env::var_os("FIREZONE_LAB_BIN_DIR") {
        ensure!(!knows(&Path::new(&release).join("firezone-gateway"))?);
    }
    Ok(())
}
