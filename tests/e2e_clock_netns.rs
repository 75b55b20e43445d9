//! The clock of the gateway's host is set, forwards and back, while it carries traffic.
//!
//! A network namespace has no clock of its own, so the gateway runs under libfaketime, which needs a
//! binary that loads libraries: the one that this build made. Needs root, iproute2, nftables, curl,
//! coturn and libfaketime; run by `scripts/test`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::{Lab, RESOURCE_V4};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(15);
/// Bytes that one connection carries through all steps, and how many a second.
const DOWNLOAD: (u64, u64) = (30_000_000, 2_000_000);

fn library() -> Result<PathBuf> {
    std::fs::read_dir("/usr/lib")?
        .filter_map(|entry| Some(entry.ok()?.path().join("faketime/libfaketime.so.1")))
        .find(|path| path.exists())
        .context("libfaketime is missing")
}

struct Stepped {
    lab: Lab,
    offset: PathBuf,
    steps: usize,
}

impl Stepped {
    fn new() -> Result<Self> {
        let mut lab = Lab::of("clock", Path::new(env!("CARGO_BIN_EXE_firezone-gateway")))?;
        lab.start_surroundings()?;
        let offset = lab.net.dir().join("offset");
        std::fs::write(&offset, "+0")?;
        let preload = format!("LD_PRELOAD={}", library()?.display());
        let file = format!("FAKETIME_TIMESTAMP_FILE={}", offset.display());
        // Nothing but the time of day: what a step leaves alone.
        let wrapper = [
            "env",
            &preload,
            &file,
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
        ];
        lab.start_gateway_under(&wrapper, &[])?;
        lab.wait_ready()?;
        lab.start_client(&[])?;
        lab.reach(15)?;
        Ok(Self {
            lab,
            offset,
            steps: 0,
        })
    }

    /// Sets the clock to so many seconds beside the right time, and waits until the gateway knows.
    fn step(&mut self, seconds: i64) -> Result<()> {
        // In one piece, because it is read again and again.
        let new = self.offset.with_extension("new");
        std::fs::write(&new, format!("{seconds:+}"))?;
        std::fs::rename(&new, &self.offset)?;
        self.steps += 1;
        let steps = self.steps;
        self.lab
            .net
            .eventually("the step is noticed", LIMIT, |net| {
                let log = net.whole_log("gateway");
                let told = log.matches("The clock was stepped").count();
                ensure!(told >= steps, "{told} of {steps}");
                Ok(())
            })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let ahead = self.lab.status()?["at"].as_f64().context("no time")? - now;
        #[expect(clippy::cast_precision_loss, reason = "years at most")]
        let wanted = seconds as f64;
        ensure!((ahead - wanted).abs() < 5.0, "{ahead} s ahead");
        Ok(())
    }

    /// What must be the same after each step.
    fn facts(&self) -> Result<Value> {
        let status = self.lab.status()?;
        let client = &status["clients"][0];
        let at = status["at"].as_f64().context("no time")?;
        // Nothing is older than the process, whatever the clock says.
        for (what, when) in [
            ("start", &status["started_at"]),
            ("join", &status["portal"]["since"]),
            ("relay", &status["relays"][0]["since"]),
            ("path", &client["path_since"]),
            ("handshake", &client["last_handshake_at"]),
        ] {
            let age = at - when.as_f64().context(what)?;
            ensure!((0.0..60.0).contains(&age), "{what} {age} s ago: {status}");
        }
        Ok(serde_json::json!([
            status["portal"]["state"],
            status["portal"]["joins"],
            status["relays"][0]["state"],
            client["path"],
            client["path_changes"],
            client["grants"][0]["expires_at"],
        ]))
    }
}

#[test]
#[ignore = "needs root, coturn, libfaketime and network namespaces"]
fn a_clock_that_is_set_moves_nothing_but_the_end_of_access() -> Result<()> {
    let mut w = Stepped::new()?;
    let before = w.facts()?;
    let (bytes, rate) = DOWNLOAD;
    let file = w.lab.net.dir().join("download").display().to_string();
    let url = format!("http://{RESOURCE_V4}/bytes/{bytes}");
    let rate = rate.to_string();
    let args = ["-sf", "--limit-rate", &rate, "-o", &file, &url];
    w.lab
        .net
        .start("download", "client", Path::new("curl"), &args, &[])?;

    for seconds in [3600, -7200, -3 * 365 * 86_400, 60, 0] {
        w.step(seconds)?;
        w.lab.reach(3).with_context(|| w.lab.net.logs())?;
        w.lab.wait_ready()?;
        let after = w.facts()?;
        ensure!(after == before, "{seconds}: {after} instead of {before}");
    }
    let status = w.lab.net.wait("download", Duration::from_secs(30))?;
    ensure!(status.success(), "download: {status}");
    ensure!(std::fs::metadata(&file)?.len() == bytes);

    // Past the end of all access, which is a matter of the time of day.
    w.step(10 * 3600)?;
    w.lab.net.eventually("access ends", LIMIT, |net| {
        ensure!(net.whole_log("gateway").contains("access expired"));
        Ok(())
    })?;
    w.step(0)?;
    w.lab.reach(60).with_context(|| w.lab.net.logs())?;
    Ok(())
}
