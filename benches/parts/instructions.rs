//! Instructions per packet, as callgrind counts them, beside those of a committed baseline.
//!
//! What the kernel does, and how long memory takes to answer, does not count. Nothing is measured, so
//! that two runs differ by no more than where a random seed puts a hash.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cases::{
    MANY_DECRYPT, MANY_ENCRYPT, ONE_DECRYPT, ONE_ENCRYPT, RANDOM_DECRYPT, RANDOM_ENCRYPT,
};
use crate::valgrind;
use crate::{find, names};

/// Argument of the process that runs under callgrind.
pub const COUNT: &str = "--count";
/// Packets of each case, at least. A case runs as often as it takes.
const PACKETS: usize = 2000;
/// A case may take so much more than in the baseline.
const TOLERANCE: f64 = 0.03;
/// Instructions that do not matter, however few there are.
const NOISE: f64 = 3.0;
/// A packet may take so much more with many clients than with one.
const MANY_TOLERANCE: f64 = 0.10;

/// Instructions per packet by case.
type Counts = BTreeMap<String, f64>;

/// Runs cases under callgrind and prints how they compare with the baseline, or makes them the baseline.
///
/// # Errors
/// When one is worse, or cannot be counted.
pub fn compare(chosen: &[&str], save: bool) -> Result<()> {
    let chosen: Vec<&str> = names()
        .filter(|name| chosen.is_empty() || chosen.iter().any(|part| name.contains(part)))
        .collect();
    ensure!(!chosen.is_empty(), "there is no such case");
    let counts = run(&chosen)?;
    let file = baseline_file();
    let baseline = Baseline::read(&file)?;
    let here = Toolchain::here()?;
    println!(
        "{:<44} {:>12} {:>10} {:>8}",
        "instructions per packet", "now", "baseline", "change"
    );
    let mut worse = Vec::new();
    for (name, now) in &counts {
        let Some(before) = baseline.counts.get(name) else {
            println!("{name:<44} {now:>12.1} {:>10} {:>8}", "-", "new");
            continue;
        };
        let change = now / before - 1.0;
        println!(
            "{name:<44} {now:>12.1} {before:>10.1} {:>+7.1}%",
            change * 100.0
        );
        if change > TOLERANCE && now - before > NOISE {
            worse.push(name.as_str());
        }
    }
    let many = compare_many(&counts);
    if save {
        let mut counts = counts;
        for (name, count) in baseline.counts {
            if names().any(|known| known == name) {
                counts.entry(name).or_insert(count);
            }
        }
        write(&file, &here, &counts)?;
        println!("\nThis is the baseline from now on: {}", file.display());
        return many;
    }
    let how = "`scripts/bench --instructions --save` makes what was counted the new baseline";
    if !worse.is_empty() {
        let list = worse.join(", ");
        let text = format!(
            "more than {:.0} % worse than {}: {list}",
            TOLERANCE * 100.0,
            file.display()
        );
        if baseline.toolchain.as_ref() == Some(&here) {
            bail!("{text}. If that is meant, {how}.");
        }
        println!(
            "\nwarning: {text}. The baseline was made with {}, and this is {here}, so that says little. {how}.",
            baseline
                .toolchain
                .map_or_else(|| "something else".to_owned(), |t| t.to_string()),
        );
    }
    many
}

/// How much more a packet takes when it is one of many clients'.
fn compare_many(counts: &Counts) -> Result<()> {
    let mut failed = false;
    println!();
    for (one, many) in [
        (ONE_DECRYPT, MANY_DECRYPT),
        (ONE_DECRYPT, RANDOM_DECRYPT),
        (ONE_ENCRYPT, MANY_ENCRYPT),
        (ONE_ENCRYPT, RANDOM_ENCRYPT),
    ] {
        if let (Some(one), Some(count)) = (counts.get(one), counts.get(many)) {
            let more = count / one - 1.0;
            println!("{many}: {:+.1} % over one client", more * 100.0);
            failed |= more > MANY_TOLERANCE;
        }
    }
    ensure!(
        !failed,
        "more than {:.0} % over one client",
        MANY_TOLERANCE * 100.0
    );
    Ok(())
}

/// Runs this program once more, under callgrind.
fn run(chosen: &[&str]) -> Result<Counts> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    let status = Command::new("valgrind")
        .args([
            "--tool=callgrind",
            "--instr-atstart=no",
            "--collect-atstart=no",
            "-q",
        ])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe()?)
        .arg(COUNT)
        .args(chosen)
        .stdout(Stdio::null())
        .status()
        .context("valgrind does not start; it is needed to count instructions")?;
    ensure!(status.success(), "valgrind or a case failed: {status}");
    let mut counts = Counts::new();
    for entry in std::fs::read_dir(dir.path())? {
        let text = std::fs::read_to_string(entry?.path())?;
        let line = |start: &str| text.lines().find_map(|line| line.strip_prefix(start));
        let Some(name) = line("desc: Trigger: Client Request: ") else {
            continue;
        };
        let total: f64 = line("totals: ").context("no totals")?.trim().parse()?;
        let packets = find(name).packets;
        counts.insert(name.to_owned(), total / (packets * runs(packets)) as f64);
    }
    for name in chosen {
        let count = counts.get(*name);
        ensure!(
            count.is_some_and(|n| *n > 0.0),
            "{name}: nothing was counted"
        );
    }
    Ok(counts)
}

fn runs(packets: usize) -> usize {
    PACKETS.div_ceil(packets)
}

/// What runs under callgrind.
///
/// # Errors
/// When a packet does not come through.
pub fn count(chosen: &[String]) -> Result<()> {
    for name in chosen {
        let case = find(name);
        let mut work = (case.make)();
        let mut once = |is_counted: bool| {
            work.prepare();
            let before = work.passed();
            if is_counted {
                valgrind::toggle();
            }
            work.run();
            if is_counted {
                valgrind::toggle();
            }
            let passed = work
                .passed()
                .zip(before)
                .map(|(after, before)| after - before);
            ensure!(
                passed.is_none_or(|passed| passed == case.packets as u64),
                "{name}: {passed:?} packets came through"
            );
            Ok(())
        };
        // The first time makes room that the others find.
        for _ in 0..3 {
            once(false)?;
        }
        valgrind::start();
        valgrind::zero();
        for _ in 0..runs(case.packets) {
            once(true)?;
        }
        valgrind::dump(&CString::new(case.name)?);
        valgrind::stop();
    }
    Ok(())
}

fn baseline_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt")
}

/// What makes code of the same source.
#[derive(PartialEq, Eq)]
struct Toolchain(String);

impl Toolchain {
    fn here() -> Result<Self> {
        let output = Command::new("rustc")
            .arg("--version")
            .output()
            .context("rustc")?;
        let version = String::from_utf8(output.stdout)?;
        Ok(Self(format!(
            "{}, {}",
            version.trim(),
            std::env::consts::ARCH
        )))
    }
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Default)]
struct Baseline {
    toolchain: Option<Toolchain>,
    counts: Counts,
}

const MADE_WITH: &str = "# made with ";

impl Baseline {
    fn read(file: &Path) -> Result<Self> {
        if !file.exists() {
            return Ok(Self::default());
        }
        let mut baseline = Self::default();
        for line in std::fs::read_to_string(file)?.lines() {
            if let Some(toolchain) = line.strip_prefix(MADE_WITH) {
                baseline.toolchain = Some(Toolchain(toolchain.to_owned()));
            }
            if line.starts_with('#') || line.trim().is_empty() {
                continue;
            }
            let (name, count) = line
                .split_once(char::is_whitespace)
                .with_context(|| format!("{}: what is {line:?}?", file.display()))?;
            baseline
                .counts
                .insert(name.to_owned(), count.trim().parse()?);
        }
        Ok(baseline)
    }
}

fn write(file: &Path, toolchain: &Toolchain, counts: &Counts) -> Result<()> {
    use std::fmt::Write as _;

    let mut text = format!(
        "# Instructions per packet, release profile; `scripts/bench --instructions` compares with these.\n\
         {MADE_WITH}{toolchain}\n"
    );
    for (name, count) in counts {
        writeln!(text, "{name:<44} {count:>9.1}")?;
    }
    std::fs::write(file, text)?;
    Ok(())
}
