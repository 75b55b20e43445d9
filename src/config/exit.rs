//! What the process tells its supervisor.

use std::process::ExitCode;

/// Exit statuses of every sub-command. `healthcheck` only uses [`Ok`](Self::Ok) and
/// [`Failure`](Self::Failure), since Docker reserves 2 for itself there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// 0: ended on request (SIGINT, SIGTERM), or the check passed.
    Ok,
    /// 1: failed while running, or the check did not pass.
    Failure,
    /// 2: wrong usage or configuration; starting again without a change is no use.
    Config,
    /// 77 (`EX_NOPERM` of sysexits): the portal refused the token, and `--exit-on-auth-failure` is
    /// set.
    AuthFailure,
    /// 78 (`EX_CONFIG` of sysexits): the host lacks something that the gateway needs, and
    /// `--strict` is set or `check-config` was to find out.
    HostLacks,
}

impl ExitStatus {
    /// The number that the supervisor sees.
    pub const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failure => 1,
            Self::Config => 2,
            Self::AuthFailure => 77,
            Self::HostLacks => 78,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        ExitCode::from(status.code())
    }
}
