//! What a process has used so far.

use anyhow::{Context as _, Result};

/// Of one process, all threads together.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Seconds in user mode.
    pub user: f64,
    /// Seconds in the kernel.
    pub system: f64,
    /// Context switches.
    pub switches: f64,
    /// Bytes of memory that it occupies.
    pub resident: f64,
}

impl Usage {
    /// Of a process that runs.
    ///
    /// # Errors
    /// When it does not.
    pub fn of(pid: u32) -> Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("stat")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // USER_HZ, the same on every Linux that runs this.
        let ticks = 100.0;
        let field = |n: usize| -> Result<f64> { Ok(fields[n].parse::<f64>()? / ticks) };
        let number = |line: &str| line.split_whitespace().nth(1)?.parse::<f64>().ok();
        let mut switches = 0.0;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = std::fs::read_to_string(task?.path().join("status")).unwrap_or_default();
            switches += status
                .lines()
                .filter(|line| line.contains("ctxt_switches"))
                .filter_map(number)
                .sum::<f64>();
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .and_then(number)
            .context("no VmRSS")?;
        Ok(Self {
            user: field(11)?,
            system: field(12)?,
            switches,
            resident: resident * 1024.0,
        })
    }
}
