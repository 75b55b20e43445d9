//! What `/proc/PID/status` tells about the rights of a process.

use rustix::thread::CapabilitySet;

/// Rights of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Effective capabilities, by bit (Linux `capability.h`).
    pub effective: u64,
    /// Bounding set: what it could get at most.
    pub bounding: u64,
    /// Whether it can never get more, whatever it runs. `None` where the kernel does not say (before
    /// 4.10).
    pub no_new_privs: Option<bool>,
}

impl Credentials {
    /// Reads the text of `/proc/PID/status`. `None` if it lacks user, group or capabilities.
    pub fn parse(status: &str) -> Option<Self> {
        // Real, effective, saved, file system.
        let id = |name| field(status, name)?.split_whitespace().nth(1)?.parse().ok();
        let set = |name| u64::from_str_radix(field(status, name)?, 16).ok();
        Some(Self {
            uid: id("Uid")?,
            gid: id("Gid")?,
            effective: set("CapEff")?,
            bounding: set("CapBnd")?,
            no_new_privs: field(status, "NoNewPrivs").map(|value| value == "1"),
        })
    }

    /// Whether a capability is effective.
    pub fn has(&self, capability: CapabilitySet) -> bool {
        self.effective & capability.bits() == capability.bits()
    }

    /// The effective capabilities in words.
    pub fn capabilities(&self) -> String {
        match names(self.effective).as_slice() {
            [] => "no capability".to_owned(),
            [one] => format!("capability {one}"),
            // Root without any limit: a list of all would tell nobody anything.
            many if many.len() > MANY => format!("{} capabilities", many.len()),
            many => format!("capabilities {}", many.join(", ")),
        }
    }
}

/// More capabilities than this are counted, not listed. Docker's default are 14.
const MANY: usize = 14;

/// The value of a line "name:<tab>value".
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// The names of capabilities, as in compose files, in the kernel's order.
pub fn names(bits: u64) -> Vec<String> {
    (0..u64::BITS)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            match one.iter_names().next() {
                Some((name, _)) => name.to_owned(),
                // One that is newer than the library.
                None => format!("number {bit}"),
            }
        })
        .collect()
}
