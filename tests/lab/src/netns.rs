//! Network namespaces for tests: hosts, NAT routers and links that exist only while a test runs.
//!
//! Everything is named after the process, and removed when the [`Net`] is dropped, also when the
//! test fails. Needs root and the programs `ip` and `nft`.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A set of namespaces, and the processes that run in them.
pub struct Net {
    prefix: String,
    links: u32,
    hosts: Vec<String>,
    processes: Vec<(String, Child)>,
    dir: PathBuf,
}

impl Net {
    /// An empty net with a directory for logs and state.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("fz{}n{number}", std::process::id());
        let dir = std::env::temp_dir().join(format!("firezone-lab-{name}-{prefix}"));
        std::fs::create_dir_all(&dir)?;
        Ok(Self {
            prefix,
            links: 0,
            hosts: Vec::new(),
            processes: Vec::new(),
            dir,
        })
    }

    /// Where logs and state files go; kept when the test fails.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn ns(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// Makes a host with loopback up.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn host(&mut self, host: &str) -> Result<()> {
        let ns = self.ns(host);
        run(Command::new("ip").args(["netns", "add", &ns]))?;
        self.hosts.push(host.to_owned());
        self.sh(host, "ip link set lo up")
    }

    /// Makes a host that forwards packets of both families.
    ///
    /// # Errors
    /// When `ip` or the settings fail.
    pub fn router(&mut self, host: &str) -> Result<()> {
        self.host(host)?;
        self.sh(
            host,
            "echo 1 > /proc/sys/net/ipv4/ip_forward; \
             echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
        )
    }

    /// Gives a host a file of its own in `/etc`, as `ip netns exec` has it; before anything starts
    /// there. Written again, it changes for those who run already.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn etc(&self, host: &str, file: &str, content: &str) -> Result<()> {
        let dir = etc_dir(&self.ns(host));
        std::fs::create_dir_all(&dir)?;
        // In place: a mount shows the file that was there, not one that has taken its name.
        Ok(std::fs::write(dir.join(file), content)?)
    }

    /// Connects two hosts; each end gets a name and addresses (with prefix length).
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn link(&mut self, a: (&str, &str, &[&str]), b: (&str, &str, &[&str])) -> Result<()> {
        self.links += 1;
        let (tmp_a, tmp_b) = (
            format!("v{}{}a", std::process::id() % 100_000, self.links),
            format!("v{}{}b", std::process::id() % 100_000, self.links),
        );
        run(Command::new("ip").args([
            "link", "add", &tmp_a, "type", "veth", "peer", "name", &tmp_b,
        ]))?;
        for ((host, name, addresses), tmp) in [(a, tmp_a), (b, tmp_b)] {
            let ns = self.ns(host);
            run(Command::new("ip").args(["link", "set", &tmp, "netns", &ns, "name", name]))?;
            for address in addresses {
                let nodad = if address.contains(':') { " nodad" } else { "" };
                self.sh(host, &format!("ip addr add {address} dev {name}{nodad}"))?;
            }
            self.sh(host, &format!("ip link set {name} up"))?;
        }
        Ok(())
    }

    /// Runs a shell line on a host.
    ///
    /// # Errors
    /// When it exits with anything but 0; its output is in the message.
    pub fn sh(&self, host: &str, line: &str) -> Result<()> {
        self.output(host, line).map(drop)
    }

    /// Runs a shell line on a host and returns what it printed.
    ///
    /// # Errors
    /// When it exits with anything but 0; its output is in the message.
    pub fn output(&self, host: &str, line: &str) -> Result<String> {
        let output = self.try_output(host, line)?;
        if !output.status.success() {
            bail!(
                "on {host}: `{line}` ended with {}\n{}{}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a shell line on a host, whatever it exits with.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn try_output(&self, host: &str, line: &str) -> Result<Output> {
        Ok(self.command(host, "sh", &["-c", line]).output()?)
    }

    /// Loads nftables rules on a host.
    ///
    /// # Errors
    /// When `nft` refuses them.
    pub fn nft(&self, host: &str, rules: &str) -> Result<()> {
        let mut child = self
            .command(host, "nft", &["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .context("stdin is piped")?
            .write_all(rules.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("nft: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// A command that will run on a host.
    pub fn command(&self, host: &str, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.ns(host), program])
            .args(args);
        command
    }

    /// Starts a long-running process on a host; its output goes to `<name>.log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        &mut self,
        name: &str,
        host: &str,
        program: &Path,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Result<()> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("{name}.log")))?;
        let program = program.to_string_lossy();
        let child = self
            .command(host, &program, args)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        self.processes.push((name.to_owned(), child));
        Ok(())
    }

    /// Sends a signal to a process that [`Self::start`] began.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn signal(&mut self, name: &str, signal: rustix::process::Signal) -> Result<()> {
        let child = self.process(name)?;
        let pid = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(pid, signal)?;
        Ok(())
    }

    /// Waits until a process has ended by itself.
    ///
    /// # Errors
    /// When it has not within `limit`.
    pub fn wait(&mut self, name: &str, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.process(name)?.try_wait()? {
                self.processes.retain(|(n, _)| n != name);
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("{name} has not ended within {limit:?}\n{}", self.log(name));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills a process at once.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        let child = self.process(name)?;
        child.kill()?;
        child.wait()?;
        self.processes.retain(|(n, _)| n != name);
        Ok(())
    }

    /// The id of a process that [`Self::start`] began.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn pid(&mut self, name: &str) -> Result<u32> {
        Ok(self.process(name)?.id())
    }

    /// Whether a process still runs.
    pub fn runs(&mut self, name: &str) -> bool {
        self.process(name)
            .is_ok_and(|c| matches!(c.try_wait(), Ok(None)))
    }

    /// Lets `act` go on in the background, on a thread that sees the network as a host does.
    ///
    /// # Errors
    /// When the namespace is not there.
    pub fn beside<T: Send + 'static>(
        &self,
        host: &str,
        act: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<std::thread::JoinHandle<Result<T>>> {
        let namespace = std::fs::File::open(Path::new("/run/netns").join(self.ns(host)))?;
        Ok(std::thread::spawn(move || {
            let network = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(namespace.as_fd(), network)?;
            act()
        }))
    }

    /// Runs `act` on a thread of its own that sees the network as a host does: what has to be quick
    /// cannot start a program for each step.
    ///
    /// # Errors
    /// When the namespace cannot be entered; what `act` fails with.
    pub fn within<T: Send>(&self, host: &str, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = std::fs::File::open(Path::new("/run/netns").join(self.ns(host)))?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let network = Some(rustix::thread::LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(namespace.as_fd(), network)?;
                act()
            });
            inside.join().map_err(|_| anyhow::anyhow!("it panicked"))?
        })
    }

    fn process(&mut self, name: &str) -> Result<&mut Child> {
        self.processes
            .iter_mut()
            .find(|(n, _)| n == name)
            .map(|(_, c)| c)
            .with_context(|| format!("no process {name}"))
    }

    /// All that a process has written, also before it was started anew.
    pub fn whole_log(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default()
    }

    /// The last lines of a process's log, for the message of a failed test.
    pub fn log(&self, name: &str) -> String {
        let text = self.whole_log(name);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Every process's last lines, for the message of a failed test.
    pub fn logs(&self) -> String {
        let mut names: Vec<String> = std::fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| {
                e.file_name()
                    .to_string_lossy()
                    .strip_suffix(".log")
                    .map(str::to_owned)
            })
            .collect();
        names.sort();
        names
            .iter()
            .map(|n| format!("---- {n} ----\n{}\n", self.log(n)))
            .collect()
    }

    /// Repeats `check` until it succeeds.
    ///
    /// # Errors
    /// The last failure, with the logs, when `limit` has passed.
    pub fn eventually<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut check: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            match check(self) {
                Ok(value) => return Ok(value),
                Err(error) if Instant::now() > end => {
                    bail!("not within {limit:?}: {what}: {error:#}\n{}", self.logs());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
        for host in &self.hosts {
            let ns = self.ns(host);
            let _ = Command::new("ip").args(["netns", "del", &ns]).output();
            let _ = std::fs::remove_dir_all(etc_dir(&ns));
        }
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

fn etc_dir(ns: &str) -> PathBuf {
    Path::new("/etc/netns").join(ns)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
