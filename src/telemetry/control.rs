//! What can be done about log lines while the process runs.

use std::time::Instant;

use super::libraries::Libraries;

/// A handle to the log. Clones share everything.
#[derive(Debug, Clone, Default)]
pub struct LogControl {
    libraries: Libraries,
}

impl LogControl {
    pub(super) fn libraries(&self) -> Libraries {
        self.libraries.clone()
    }

    /// Logs how much of what libraries had to say was held back; to be called now and then.
    pub fn tell(&self) {
        for (library, suppressed) in self.libraries.overdue(Instant::now()) {
            tracing::info!(library, suppressed, "A library repeats itself");
        }
    }
}
