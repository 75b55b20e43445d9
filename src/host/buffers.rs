//! Limits of UDP socket buffers.
//!
//! The kernel caps what a socket may ask for. At high rates the default cap holds only a few
//! milliseconds of traffic, so the gateway raises it where it may (data-path spec §1.1).

use std::fmt;
use std::io;
use std::path::Path;

use super::constants::{UDP_RECEIVE_BUFFER, UDP_SEND_BUFFER};

/// `net.core.rmem_max`, below the root directory.
pub(super) const RMEM_MAX: &str = "proc/sys/net/core/rmem_max";
/// `net.core.wmem_max`, below the root directory.
pub(super) const WMEM_MAX: &str = "proc/sys/net/core/wmem_max";

/// What became of both limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// `net.core.rmem_max`.
    pub receive: Outcome,
    /// `net.core.wmem_max`.
    pub send: Outcome,
}

/// What became of one limit. Numbers are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was high enough and is untouched.
    Enough(u64),
    /// It was too low and is now high enough.
    Raised {
        /// Before.
        from: u64,
        /// Now.
        to: u64,
    },
    /// It is too low, or unknown, and could not be changed.
    Refused {
        /// As it is, if it can be read.
        current: Option<u64>,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enough(limit) => write!(f, "{limit}"),
            Self::Raised { from, to } => write!(f, "raised from {from} to {to}"),
            Self::Refused {
                current: Some(current),
                reason,
            } => write!(f, "stays {current}: {reason}"),
            Self::Refused {
                current: None,
                reason,
            } => write!(f, "unknown: {reason}"),
        }
    }
}

/// Raises `net.core.rmem_max` and `net.core.wmem_max` to what the sockets ask for, where the
/// process may. Never lowers them. `root` is `/` outside tests.
pub fn raise(root: &Path) -> Report {
    Report {
        receive: raise_one(&root.join(RMEM_MAX), UDP_RECEIVE_BUFFER),
        send: raise_one(&root.join(WMEM_MAX), UDP_SEND_BUFFER),
    }
}

fn raise_one(path: &Path, wanted: u64) -> Outcome {
    let from = match read(path) {
        Ok(limit) if limit >= wanted => return Outcome::Enough(limit),
        Ok(limit) => limit,
        Err(e) => {
            return Outcome::Refused {
                current: None,
                reason: e.to_string(),
            };
        }
    };
    // Read back, because some sandboxes accept the write and ignore it.
    let written = std::fs::write(path, wanted.to_string()).and_then(|()| read(path));
    match written {
        Ok(to) if to >= wanted => Outcome::Raised { from, to },
        Ok(current) => Outcome::Refused {
            current: Some(current),
            reason: "the kernel ignored the change".to_owned(),
        },
        Err(e) => Outcome::Refused {
            current: Some(from),
            reason: e.to_string(),
        },
    }
}

pub(super) fn read(path: &Path) -> io::Result<u64> {
    std::fs::read_to_string(path)?
        .trim()
        .parse()
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn tree(rmem: Option<&str>, wmem: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("proc/sys/net/core")).unwrap();
        for (path, value) in [(RMEM_MAX, rmem), (WMEM_MAX, wmem)] {
            if let Some(value) = value {
                std::fs::write(root.path().join(path), value).unwrap();
            }
        }
        root
    }

    #[test]
    fn low_limits_are_raised_to_what_the_sockets_ask_for() {
        let root = tree(Some("212992\n"), Some("212992\n"));
        let report = raise(root.path());
        let raised = |to| Outcome::Raised { from: 212_992, to };
        assert_eq!(report.receive, raised(16_777_216));
        assert_eq!(report.send, raised(2_097_152));
        assert_eq!(read(&root.path().join(RMEM_MAX)).unwrap(), 16_777_216);
        assert_eq!(read(&root.path().join(WMEM_MAX)).unwrap(), 2_097_152);
    }

    #[test]
    fn higher_limits_are_left_alone() {
        let root = tree(Some("33554432\n"), Some("33554432\n"));
        let report = raise(root.path());
        assert_eq!(report.receive, Outcome::Enough(33_554_432));
        assert_eq!(report.send, Outcome::Enough(33_554_432));
        assert_eq!(read(&root.path().join(WMEM_MAX)).unwrap(), 33_554_432);
    }

    #[test]
    fn limits_hidden_by_a_network_namespace_are_refused_not_fatal() {
        let root = tree(None, Some("garbage"));
        let report = raise(root.path());
        for outcome in [report.receive, report.send] {
            assert!(
                matches!(outcome, Outcome::Refused { current: None, .. }),
                "{outcome:?}"
            );
        }
    }
}
