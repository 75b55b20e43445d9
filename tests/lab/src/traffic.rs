//! Traffic from the client to the resource, and what became of it.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::scenario::{Lab, RESOURCE_V4};

/// The URL of a host's page.
pub fn page(host: &str) -> String {
    if host.contains(':') {
        format!("http://[{host}]/")
    } else {
        format!("http://{host}/")
    }
}

/// A download that goes on while things happen.
pub struct Download {
    curl: Child,
    bytes: u64,
}

impl Download {
    /// Begins it.
    ///
    /// # Errors
    /// When `curl` cannot be started.
    pub fn start(lab: &Lab, bytes: u64, rate: &str) -> Result<Self> {
        Self::start_from(lab, RESOURCE_V4, bytes, rate)
    }

    /// Begins it at another host.
    ///
    /// # Errors
    /// When `curl` cannot be started.
    pub fn start_from(lab: &Lab, host: &str, bytes: u64, rate: &str) -> Result<Self> {
        let url = format!("{}bytes/{bytes}", page(host));
        let options = ["-sSf", "--limit-rate", rate, "-o", "/dev/null"];
        let report = ["-w", "%{size_download}", &url];
        let curl = spawn(lab, "curl", &[&options[..], &report[..]].concat())?;
        Ok(Self { curl, bytes })
    }

    /// Whether it has not ended.
    ///
    /// # Errors
    /// When that cannot be known.
    pub fn goes_on(&mut self) -> Result<bool> {
        Ok(self.curl.try_wait()?.is_none())
    }

    /// Ends it.
    pub fn give_up(mut self) {
        let _ = self.curl.kill();
        let _ = self.curl.wait();
    }

    /// Waits for its end: every byte has come, over one connection.
    ///
    /// # Errors
    /// When it broke.
    pub fn finish(self) -> Result<()> {
        let output = self.curl.wait_with_output()?;
        let whole = output.stdout == self.bytes.to_string().as_bytes();
        ensure!(output.status.success() && whole, "broken: {output:?}");
        Ok(())
    }
}

/// Two TCP streams of limited rate, one each way, watched ten times a second.
pub struct Streams(Child);

impl Streams {
    /// Begins them; they last for `seconds`.
    ///
    /// # Errors
    /// When `iperf3` cannot be started.
    pub fn start(lab: &mut Lab, seconds: u32) -> Result<Self> {
        serve_iperf3(lab)?;
        let seconds = seconds.to_string();
        let what = [
            "-J", "-i", "0.1", "--bidir", "-b", "20M", "-w", "64K", "-t", &seconds,
        ];
        let whom = ["-c", RESOURCE_V4];
        Ok(Self(spawn(
            lab,
            "iperf3",
            &[&what[..], &whom[..]].concat(),
        )?))
    }

    /// Waits for their end: neither connection has broken.
    ///
    /// # Errors
    /// When one broke.
    pub fn finish(self) -> Result<Flow> {
        let output = self.0.wait_with_output()?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("no report: {output:?}"))?;
        let error = &report["error"];
        ensure!(
            output.status.success() && error.is_null(),
            "broken: {error}"
        );
        let intervals = report["intervals"].as_array().context("no intervals")?;
        Ok(Flow(
            intervals
                .iter()
                .map(|interval| Interval {
                    end: interval["sum"]["end"].as_f64().unwrap_or_default(),
                    bytes: ["sum", "sum_bidir_reverse"]
                        .map(|way| interval[way]["bytes"].as_u64().unwrap_or_default()),
                })
                .collect(),
        ))
    }
}

/// What arrived when.
#[derive(Debug)]
pub struct Flow(Vec<Interval>);

#[derive(Debug, Clone, Copy)]
struct Interval {
    /// Seconds since the beginning.
    end: f64,
    /// To the resource, and from it.
    bytes: [u64; 2],
}

/// A time without a byte one way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stall {
    /// When it began, in seconds since the beginning.
    pub from: f64,
    /// How many seconds it lasted.
    pub lasted: f64,
}

impl Flow {
    /// The longest stalls: to the resource, and from it.
    pub fn stalls(&self) -> [Stall; 2] {
        [0, 1].map(|way| self.longest(way))
    }

    fn longest(&self, way: usize) -> Stall {
        let mut longest = Stall {
            from: 0.0,
            lasted: 0.0,
        };
        let mut alive = 0.0;
        for interval in &self.0 {
            if interval.bytes[way] > 0 {
                alive = interval.end;
            } else if interval.end - alive > longest.lasted {
                longest = Stall {
                    from: alive,
                    lasted: interval.end - alive,
                };
            }
        }
        longest
    }
}

/// Ten pings a second.
pub struct Pings(Child);

impl Pings {
    /// Begins them.
    ///
    /// # Errors
    /// When `ping` cannot be started.
    pub fn start(lab: &Lab) -> Result<Self> {
        Ok(Self(spawn(lab, "ping", &["-n", "-i", "0.1", RESOURCE_V4])?))
    }

    /// Ends them, and says what became of them.
    ///
    /// # Errors
    /// When what `ping` says cannot be understood.
    pub fn finish(self) -> Result<Echoes> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        let output = self.0.wait_with_output()?;
        Echoes::read(&String::from_utf8_lossy(&output.stdout))
    }
}

/// What became of pings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echoes {
    /// How many were answered.
    pub answered: usize,
    /// How many were not.
    pub lost: usize,
    /// The longest time without an answer, also at the end.
    pub silence: Duration,
}

impl Echoes {
    fn read(text: &str) -> Result<Self> {
        // Errors have a number as well, but nobody has answered then.
        let mut answered: Vec<usize> = text
            .lines()
            .filter(|line| line.contains(" bytes from "))
            .filter_map(|line| {
                let rest = line.split_once("icmp_seq=")?.1;
                rest.split_once(' ')?.0.parse().ok()
            })
            .collect();
        answered.sort_unstable();
        answered.dedup();
        let last = *answered.last().context("no answers")?;
        let (sent, _) = text
            .split_once(" packets transmitted")
            .context("ping does not say how many it sent")?;
        let sent: usize = sent.rsplit('\n').next().unwrap_or(sent).parse()?;
        // The last one may have been on its way.
        let due = last.max(sent.saturating_sub(1));
        answered.insert(0, 0);
        answered.push(due + 1);
        let gaps = answered.windows(2).map(|pair| pair[1] - pair[0] - 1);
        let answered = answered.len() - 2;
        Ok(Self {
            answered,
            lost: due - answered,
            silence: Duration::from_millis(100) * gaps.max().unwrap_or(0) as u32,
        })
    }
}

/// Has the resource answer `iperf3`, if it does not yet.
///
/// # Errors
/// When it cannot be started.
pub fn serve_iperf3(lab: &mut Lab) -> Result<()> {
    if !lab.net.runs("iperf3-server") {
        lab.net.start(
            "iperf3-server",
            "resource",
            Path::new("iperf3"),
            &["-s"],
            &[],
        )?;
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

fn spawn(lab: &Lab, program: &str, args: &[&str]) -> Result<Child> {
    Ok(lab
        .net
        .command("client", program, args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_stall_is_told_for_each_way() {
        let bytes = [[1, 1], [0, 1], [0, 0], [1, 0], [0, 0], [0, 0], [1, 0]];
        let flow = Flow(
            bytes
                .iter()
                .zip(1u8..)
                .map(|(bytes, second)| Interval {
                    end: f64::from(second),
                    bytes: *bytes,
                })
                .collect(),
        );
        let stall = |from, lasted| Stall { from, lasted };
        assert_eq!(flow.stalls(), [stall(1.0, 2.0), stall(2.0, 5.0)]);
    }

    fn read(numbers: &[usize], sent: usize) -> [u128; 3] {
        let mut text = "PING 10.99.0.2 (10.99.0.2) 56(84) bytes of data.\n".to_owned();
        for number in numbers {
            text += &format!("64 bytes from 10.99.0.2: icmp_seq={number} ttl=63 time=0.8 ms\n");
        }
        text += "From 100.64.0.1 icmp_seq=3 Destination Host Unreachable\n\n";
        text += &format!("--- 10.99.0.2 ping statistics ---\n{sent} packets transmitted, 2\n");
        let echoes = Echoes::read(&text).expect("it can be read");
        let silence = echoes.silence.as_millis();
        [echoes.answered as u128, echoes.lost as u128, silence]
    }

    #[test]
    fn what_was_not_answered_is_lost_wherever_it_was_sent() {
        assert_eq!(read(&[1, 2, 3], 3), [3, 0, 0]);
        assert_eq!(read(&[1, 2], 3), [2, 0, 0], "on its way");
        assert_eq!(read(&[1, 2, 2, 4], 4), [3, 1, 100], "an error is no answer");
        assert_eq!(read(&[4, 5], 5), [2, 3, 300]);
        assert_eq!(read(&[1, 2], 12), [2, 9, 900], "they stopped for good");
    }
}
