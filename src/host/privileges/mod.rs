//! Leaving root: what needs its rights is opened first, then the process becomes another user that
//! keeps `CAP_NET_ADMIN` and can never get more.
//!
//! Users, groups and capabilities belong to threads, not to processes. All of this has to happen
//! before there is a second thread, whose rights would stay; [`Rights::leave`] makes sure of that.
//!
//! In order:
//!
//! 1. [`begin`] takes the new group, so that what is made from then on is the group's, and root may
//!    hand files to the group: their owner may give them to any group that it is in, without
//!    `CAP_CHOWN`.
//! 2. [`hand_over`] gives the state directory to the group, and others open sockets and devices.
//! 3. [`Rights::leave`] takes the new user, drops capabilities and sets no_new_privs.

mod credentials;
mod hand_over;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;

use rustix::process::{Gid, Uid, geteuid, getgroups};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

pub use self::credentials::{Credentials, names};
pub(super) use self::hand_over::can_be_made;
pub use self::hand_over::{Handed, can_hand_over, hand_over};

/// A user and its group, by number: an image made from scratch has no names for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// Never 0.
    pub uid: u32,
    /// Never 0.
    pub gid: u32,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

/// What is to be done about the rights of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Plan {
    /// Nothing: nobody asked for it.
    Keep,
    /// It is not root; what it has too much goes.
    Trim,
    /// It becomes this user.
    Leave(User),
    /// It should leave root, and cannot.
    Stay(String),
}

/// What can be done about rights `permitted` to user `uid`.
fn plan(wanted: Option<User>, uid: u32, permitted: CapabilitySet) -> Plan {
    let Some(user) = wanted else {
        return Plan::Keep;
    };
    if uid != 0 {
        return Plan::Trim;
    }
    let missing = (CapabilitySet::SETUID | CapabilitySet::SETGID) - permitted;
    if missing.is_empty() {
        return Plan::Leave(user);
    }
    let missing = names(missing.bits());
    let verb = if missing.len() == 1 { "is" } else { "are" };
    Plan::Stay(format!("{} {verb} missing", missing.join(" and ")))
}

/// What of `permitted` stays. A port that only root may open needs a capability of its own, since a
/// socket may have to be opened again.
fn kept(permitted: CapabilitySet, low_port: bool) -> CapabilitySet {
    let mut kept = CapabilitySet::NET_ADMIN;
    if low_port {
        kept |= CapabilitySet::NET_BIND_SERVICE;
    }
    kept & permitted
}

/// The rights of the process, on the way from one user to the other.
#[derive(Debug)]
#[must_use]
pub struct Rights(Plan);

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was asked for, and nothing done.
    Kept,
    /// The process was not root, and now has no more rights than it needs.
    Trimmed,
    /// It is this user now.
    Left(User),
    /// It remains root, for this reason.
    Stayed(String),
    /// It is this user now, but something else went wrong.
    Failed(User, String),
}

/// Takes the first step towards `wanted`. Whoever cannot go on with it has lost nothing.
pub fn begin(wanted: Option<User>) -> Rights {
    let permitted = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
    let mut plan = plan(wanted, geteuid().as_raw(), permitted);
    if let Plan::Leave(user) = plan
        && let Err(error) = join(user.gid)
    {
        plan = Plan::Stay(format!("group {} cannot be taken: {error}", user.gid));
    }
    Rights(plan)
}

/// Takes the group. The former ones stay until root is left: settings are yet to be read.
fn join(gid: u32) -> io::Result<()> {
    let own = rustix::process::getegid();
    let gid = Gid::from_raw(gid);
    let mut groups = getgroups()?;
    for group in [own, gid] {
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    set_thread_groups(&groups)?;
    set_thread_res_gid(gid, gid, gid)?;
    Ok(())
}

impl Rights {
    /// The user that the process will be, if it leaves root.
    pub fn leaving_for(&self) -> Option<User> {
        match self.0 {
            Plan::Leave(user) => Some(user),
            _ => None,
        }
    }

    /// Takes the last step; there is no way back. `low_port` is whether a port is to be opened that
    /// only root may open.
    pub fn leave(self, low_port: bool) -> Outcome {
        match self.0 {
            Plan::Keep => Outcome::Kept,
            Plan::Stay(why) => Outcome::Stayed(why),
            Plan::Trim => match trim(low_port) {
                Ok(()) => Outcome::Trimmed,
                Err(error) => Outcome::Stayed(format!("capabilities cannot be dropped: {error}")),
            },
            Plan::Leave(user) => match threads() {
                Ok(1) => become_user(user, low_port),
                Ok(count) => Outcome::Stayed(format!("there are {count} threads already")),
                Err(error) => Outcome::Stayed(format!("threads cannot be counted: {error}")),
            },
        }
    }
}

fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

fn become_user(user: User, low_port: bool) -> Outcome {
    let uid = Uid::from_raw(user.uid);
    let change = || -> io::Result<()> {
        set_thread_groups(&[])?;
        // Otherwise all capabilities would go with the user.
        set_keep_capabilities(true)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    if let Err(error) = change() {
        let _ = set_keep_capabilities(false);
        return Outcome::Stayed(format!("user {} cannot be taken: {error}", user.uid));
    }
    let trimmed = trim(low_port).and_then(|()| {
        set_keep_capabilities(false)?;
        // Nobody will ever see this fail, and nobody should have to take our word for it.
        match set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT) {
            Ok(()) => Err(io::Error::other("root can be taken again")),
            Err(_) => Ok(()),
        }
    });
    match trimmed {
        Ok(()) => Outcome::Left(user),
        Err(error) => Outcome::Failed(user, error.to_string()),
    }
}

/// Drops all capabilities but those that are needed, and the ways to get others.
fn trim(low_port: bool) -> io::Result<()> {
    let mut sets = capabilities(None)?;
    // What is left in the bounding set without this capability is of no use with no_new_privs.
    if sets.permitted.contains(CapabilitySet::SETPCAP) {
        sets.effective |= CapabilitySet::SETPCAP;
        set_capabilities(None, sets)?;
        for bit in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            // Beyond the last one that the kernel knows.
            if remove_capability_from_bounding_set(capability).is_err() {
                break;
            }
        }
    }
    // Before the others, since it is a part of them. Kernels before 4.3 have none.
    let _ = clear_ambient_capability_set();
    let kept = kept(sets.permitted, low_port);
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    set_no_new_privs(true)?;
    Ok(())
}

/// Whether only root, or whoever has `CAP_NET_BIND_SERVICE`, may open this port.
pub fn is_low_port(port: u16) -> bool {
    // The default of the kernel; Docker sets it to 0 in containers.
    const USUAL: u16 = 1024;
    let first = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    port != 0 && port < first.unwrap_or(USUAL)
}
