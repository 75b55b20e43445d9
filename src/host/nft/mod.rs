//! Masquerading and forwarding rules in nf_tables, over netlink.
//!
//! One table of our own, `inet firezone_gateway`, so that nothing of anyone else is touched and one
//! deletion takes everything away. Packets of clients get the host's address on whatever interface
//! they leave by; the rules name no interface but the tunnel device.
//!
//! A verdict `accept` ends only its own chain: a host firewall that drops forwarded packets in
//! another table still drops them.
//!
//! The calls block, normally for less than a millisecond, and are bounded by
//! [`NETLINK_TIMEOUT`](super::constants::NETLINK_TIMEOUT).

mod message;
mod socket;
#[cfg(test)]
mod tests;

use std::io;

use rustix::io::Errno;

use super::constants::MAX_LINK_NAME;

/// Why the rules are not in place.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// Not a name that an interface can have.
    #[error("{0:?} cannot be the name of an interface")]
    InvalidLink(String),
    /// The kernel wants `CAP_NET_ADMIN` for this.
    #[error("not permitted to use nf_tables: CAP_NET_ADMIN is not effective")]
    NotPermitted,
    /// The kernel lacks nf_tables, or NAT in it.
    #[error("the kernel cannot {step}: {source} (is nf_tables with NAT built in or loaded?)")]
    Unsupported {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused it for another reason.
    #[error("could not {step}: {source}")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel did not answer in time.
    #[error("the kernel answered {answered} of {expected} nf_tables messages")]
    Timeout {
        /// Answers received.
        answered: usize,
        /// Answers expected.
        expected: usize,
    },
    /// The kernel's answer cannot be read.
    #[error("the kernel sent an unreadable nf_tables message")]
    Malformed,
}

impl NftError {
    fn from_errno(step: &'static str, errno: Errno) -> Self {
        let source = io::Error::from(errno);
        match errno {
            Errno::PERM | Errno::ACCESS => Self::NotPermitted,
            Errno::NOENT
            | Errno::OPNOTSUPP
            | Errno::AFNOSUPPORT
            | Errno::PROTONOSUPPORT
            | Errno::NOSYS => Self::Unsupported { step, source },
            _ => Self::Kernel { step, source },
        }
    }
}

/// Puts the table in place, for packets to and from the interface `link`. It replaces a table of an
/// earlier run in the same transaction, so that there is no moment without rules.
///
/// # Errors
/// See [`NftError`]. On error nothing has changed.
pub fn install(link: &str) -> Result<(), NftError> {
    check_link(link)?;
    socket::transact(&message::install(link), socket::Outcome::Commit)
}

/// Has the kernel check the whole of [`install`] without doing it.
///
/// # Errors
/// The same as [`install`].
pub fn probe(link: &str) -> Result<(), NftError> {
    check_link(link)?;
    socket::transact(&message::install(link), socket::Outcome::Discard)
}

/// Whether the table is there with as many rules as [`install`] makes. It is not when somebody
/// flushed the host's rule set, as firewall services do when they reload.
///
/// # Errors
/// See [`NftError`].
pub fn is_installed() -> Result<bool, NftError> {
    Ok(socket::count_rules()? == message::RULES)
}

/// The rules in our table, in the words of the netlink library; none if there is no such table.
///
/// # Errors
/// See [`NftError`].
pub fn rules() -> Result<Vec<String>, NftError> {
    socket::rules()
}

/// Chains of other tables whose policy drops forwarded packets, as "family table chain". Accepting
/// them in our table does not help there; `ip filter FORWARD` is what Docker sets on its host.
/// Firewalls that do not use nf_tables, such as iptables-legacy, are not seen.
///
/// # Errors
/// See [`NftError`].
pub fn forward_drops() -> Result<Vec<String>, NftError> {
    socket::forward_drops()
}

/// Takes the table away; one that is not there counts as taken away.
///
/// # Errors
/// See [`NftError`].
pub fn remove() -> Result<(), NftError> {
    socket::transact(&message::remove(), socket::Outcome::Commit)
}

/// The kernel's own rule for names (`dev_valid_name`), so that a wrong name is an error here and
/// not a rule that never matches.
fn check_link(link: &str) -> Result<(), NftError> {
    let valid = !link.is_empty()
        && link.len() <= MAX_LINK_NAME
        && link != "."
        && link != ".."
        && !link
            .bytes()
            .any(|b| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace());
    if valid {
        Ok(())
    } else {
        Err(NftError::InvalidLink(link.to_owned()))
    }
}
