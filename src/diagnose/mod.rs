//! The sub-command `diagnose`: one archive with what is needed to find out what is wrong, to be
//! handed to somebody else. Whatever cannot be had is named in it, with the reason.

mod secrets;

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, IsTerminal as _, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use flate2::{Compression, write::GzEncoder};

use self::secrets::Secrets;
use crate::admin::{self, AskError, model::Status};
use crate::config::{
    Config, Env, Examination, ExitStatus, Host, Settings, cli::DiagnoseArgs, examine,
    print_examination,
};
use crate::host::{
    inventory, nft,
    preflight::{self, Check, Environment, Platform},
};

/// What the admin server is asked for.
const QUESTIONS: [(&str, &str); 7] = [
    ("status.json", "/status"),
    ("livez.txt", "/livez?verbose"),
    ("startupz.txt", "/startupz?verbose"),
    ("readyz.txt", "/readyz?verbose"),
    ("metrics.txt", "/metrics"),
    ("log.txt", "/log"),
    ("log-filter.txt", "/log-filter"),
];

/// Counters and limits of the kernel.
const FILES: [&str; 18] = [
    "/proc/net/snmp",
    "/proc/net/snmp6",
    "/proc/net/netstat",
    "/proc/net/dev",
    "/proc/net/sockstat",
    "/proc/net/sockstat6",
    "/proc/net/softnet_stat",
    "/proc/net/udp",
    "/proc/net/udp6",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/cpuinfo",
    "/proc/self/limits",
    "/sys/fs/cgroup/cpu.max",
    "/sys/fs/cgroup/cpu.stat",
    "/sys/fs/cgroup/memory.max",
    "/etc/resolv.conf",
];

/// What the gateway depends on, below `/proc/sys/net`.
const SETTINGS: [&str; 12] = [
    "core/rmem_max",
    "core/wmem_max",
    "core/netdev_max_backlog",
    "ipv4/ip_forward",
    "ipv4/conf/all/rp_filter",
    "ipv4/conf/default/rp_filter",
    "ipv4/conf/all/src_valid_mark",
    "ipv6/conf/all/disable_ipv6",
    "ipv6/conf/all/forwarding",
    "ipv6/conf/default/forwarding",
    "netfilter/nf_conntrack_max",
    "netfilter/nf_conntrack_count",
];

/// No file of the kernel's is longer than this; what is, is cut off.
const LONGEST_FILE: u64 = 1 << 20;

/// Runs the sub-command; what is said to people goes to `err`.
///
/// # Errors
/// When the archive cannot be written.
pub fn run(
    arguments: &DiagnoseArgs,
    settings: &Settings,
    env: &dyn Env,
    host: &Host,
    err: &mut dyn Write,
) -> io::Result<ExitStatus> {
    let now = SystemTime::now();
    let name = format!("firezone-gateway-{}", stamp(now));
    let to_stdout = arguments.output.as_deref() == Some("-");
    if to_stdout && io::stdout().is_terminal() {
        writeln!(
            err,
            "an archive is nothing for a terminal; send it to a file"
        )?;
        return Ok(ExitStatus::Failure);
    }
    let output = arguments
        .output
        .clone()
        .unwrap_or_else(|| format!("{name}.tar.gz"));
    // Before anything is asked: who cannot write should learn at once.
    let mut file: Box<dyn Write> = if to_stdout {
        Box::new(io::stdout().lock())
    } else {
        match File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&output)
        {
            Ok(file) => Box::new(file),
            Err(error) => {
                writeln!(err, "cannot write {output}: {error}")?;
                return Ok(ExitStatus::Failure);
            }
        }
    };

    let examination = examine(settings, env, host);
    let mut bundle = Bundle::default();
    bundle.add("version.txt", Ok(version()));
    bundle.add("config.txt", configuration(&examination));
    ask_gateway(&mut bundle, arguments, settings, env);
    look_at_host(&mut bundle, examination.config.as_ref());
    let secrets = Secrets::of(settings, env, &examination);
    let summary = bundle.summary();
    bundle.write(&mut file, &name, &summary, &secrets, now)?;
    file.flush()?;

    err.write_all(secrets.remove(&summary).as_bytes())?;
    if !to_stdout {
        writeln!(err, "\nWritten to {output}.")?;
    }
    Ok(ExitStatus::Ok)
}

/// Files that are to go into the archive, or why they do not.
#[derive(Default)]
struct Bundle(Vec<(String, Result<String, String>)>);

impl Bundle {
    fn add(&mut self, name: impl Into<String>, content: Result<String, String>) {
        self.0.push((name.into(), content));
    }

    fn summary(&self) -> String {
        let mut text = String::from("What is in it:\n");
        // Writing to a string does not fail.
        for (name, content) in &self.0 {
            if let Ok(content) = content {
                let _ = writeln!(text, "  {name} ({} bytes)", content.len());
            }
        }
        let mut missing = self.0.iter().filter(|(_, content)| content.is_err());
        if let Some(first) = missing.next() {
            text.push_str("What is missing, and why:\n");
            for (name, content) in std::iter::once(first).chain(missing) {
                if let Err(why) = content {
                    let _ = writeln!(text, "  {name}: {}", why.trim());
                }
            }
        }
        text
    }

    fn write(
        &self,
        out: &mut dyn Write,
        name: &str,
        summary: &str,
        secrets: &Secrets,
        now: SystemTime,
    ) -> io::Result<()> {
        let time = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let mut archive = tar::Builder::new(GzEncoder::new(out, Compression::default()));
        let present = self.0.iter().filter_map(|(file, content)| {
            let content = content.as_ref().ok()?;
            Some((file.as_str(), content.as_str()))
        });
        for (file, content) in std::iter::once(("summary.txt", summary)).chain(present) {
            let content = secrets.remove(content);
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o600);
            header.set_mtime(time.as_secs());
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, format!("{name}/{file}"), content.as_bytes())?;
        }
        archive.into_inner()?.finish()?;
        Ok(())
    }
}

/// Fit for the name of a file.
fn stamp(now: SystemTime) -> String {
    humantime::format_rfc3339_seconds(now)
        .to_string()
        .replace(['-', ':'], "")
}

fn version() -> String {
    let system = rustix::system::uname();
    let part = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    format!(
        "firezone-gateway {}\n{} {} {} {}\n",
        env!("CARGO_PKG_VERSION"),
        part(system.sysname()),
        part(system.release()),
        part(system.version()),
        part(system.machine()),
    )
}

fn configuration(examination: &Examination) -> Result<String, String> {
    let mut text = Vec::new();
    print_examination(&mut text, examination).map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn ask_gateway(bundle: &mut Bundle, arguments: &DiagnoseArgs, settings: &Settings, env: &dyn Env) {
    let addr = arguments.addr.as_deref();
    let mut gone = None;
    for (file, path) in QUESTIONS {
        if let Some(first) = gone {
            // Each would wait as long as the first one.
            bundle.add(file, Err(format!("not asked for, because of {first}")));
            continue;
        }
        let answer = match admin::fetch(addr, settings, env, path) {
            // A probe that fails says what is wrong.
            Ok(answer)
                if answer.code == 200 || (answer.code == 503 && path.ends_with("?verbose")) =>
            {
                Ok(answer.body)
            }
            Ok(answer) => Err(format!("{path} answers {}: {}", answer.code, answer.body)),
            Err(error) => {
                // A token that is missing is asked for again at no cost, and the probes need none.
                if !matches!(error, AskError::Token(_)) {
                    gone = Some(file);
                }
                Err(error.to_string())
            }
        };
        if file == "status.json"
            && let Ok(json) = &answer
        {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let status = serde_json::from_str::<Status>(json);
            let table = status.map_err(|error| error.to_string()).map(|status| {
                admin::render_status(&status, now.unwrap_or_default().as_secs_f64(), false)
            });
            bundle.add("status.txt", table);
        }
        bundle.add(file, answer);
    }
}

fn look_at_host(bundle: &mut Bundle, config: Option<&Config>) {
    bundle.add("preflight.txt", Ok(check_host(config)));
    let rules = nft::rules().map(|rules| {
        rules.iter().fold(String::new(), |mut text, rule| {
            let _ = writeln!(text, "{rule}");
            text
        })
    });
    bundle.add("nft.txt", rules.map_err(|error| error.to_string()));
    let (interfaces, routes, rules) = match list() {
        Ok(found) => (found.interfaces, found.routes, found.rules),
        Err(error) => {
            let why = Err(error.to_string());
            (why.clone(), why.clone(), why)
        }
    };
    bundle.add("interfaces.txt", interfaces);
    bundle.add("routes.txt", routes);
    bundle.add("rules.txt", rules);
    let mut text = String::new();
    for name in SETTINGS {
        let value = read(&Path::new("/proc/sys/net").join(name));
        let value = value.unwrap_or_else(|why| format!("({why})"));
        let _ = writeln!(text, "net/{name} {}", value.trim());
    }
    bundle.add("sysctl.txt", Ok(text));
    for path in FILES {
        bundle.add(path.trim_start_matches('/'), read(Path::new(path)));
    }
}

/// The same checks that the gateway makes, with the rights of whoever asks. Where it does not run, this
/// may be all there is.
fn check_host(config: Option<&Config>) -> String {
    let default = Path::new(crate::config::DEFAULT_STATE_DIR);
    let state_dir = config.map_or(default, |config| &config.state_dir);
    let link = config.map_or(crate::config::DEFAULT_TUN_NAME, |config| &config.tun_name);
    let environment = Environment {
        // To look is not to change.
        may_make: false,
        ..Environment::of_this_host(state_dir, link)
    };
    let platform = Platform::detect(&environment.root);
    let wanted = |check| check != Check::StateDirectory || state_dir.exists();
    let findings = preflight::run_those(&environment, wanted);
    let mut text = preflight::render(&findings, &[platform]);
    if !state_dir.exists() {
        let _ = writeln!(text, "error    {} does not exist", state_dir.display());
    }
    text
}

fn list() -> io::Result<inventory::Inventory> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let found = runtime.block_on(inventory::inventory());
    runtime.shutdown_timeout(Duration::from_millis(100));
    found
}

fn read(path: &Path) -> Result<String, String> {
    use io::Read as _;

    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(LONGEST_FILE).read_to_end(&mut bytes))
        .map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests;
