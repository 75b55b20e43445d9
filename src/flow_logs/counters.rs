//! What became of flow logs, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What became of flow logs since the start, and what is on disk now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlowLogCounters {
    /// Records written to disk.
    pub written: u64,
    /// Records lost as the disk could not keep up, or as the gateway was ending.
    pub dropped_queue_full: u64,
    /// Records removed from the full spool to make room for newer ones.
    pub dropped_spool_full: u64,
    /// Records that could not be written.
    pub write_errors: u64,
    /// Files in the spool that are damaged or that nobody here wrote.
    pub damaged: u64,
    /// Records whose token expired before they were uploaded.
    pub expired: u64,
    /// Records the server took.
    pub uploaded: u64,
    /// Records the server found too large even alone.
    pub rejected: u64,
    /// Requests that delivered nothing, other than those the server asked to repeat later or in
    /// smaller parts.
    pub upload_failures: u64,
    /// Bytes in the spool, tokens included.
    pub spool_bytes: u64,
    /// Files in the spool, tokens included.
    pub spool_files: u64,
    /// What went wrong last, whenever that was. Without secrets.
    pub last_error: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) written: AtomicU64,
    pub(super) dropped_queue_full: AtomicU64,
    pub(super) dropped_spool_full: AtomicU64,
    pub(super) write_errors: AtomicU64,
    pub(super) damaged: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) uploaded: AtomicU64,
    pub(super) rejected: AtomicU64,
    pub(super) upload_failures: AtomicU64,
    pub(super) spool_bytes: AtomicU64,
    pub(super) spool_files: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl Counters {
    pub(super) fn failed(&self, error: String) {
        *self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    pub(super) fn read(&self) -> FlowLogCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FlowLogCounters {
            written: read(&self.written),
            dropped_queue_full: read(&self.dropped_queue_full),
            dropped_spool_full: read(&self.dropped_spool_full),
            write_errors: read(&self.write_errors),
            damaged: read(&self.damaged),
            expired: read(&self.expired),
            uploaded: read(&self.uploaded),
            rejected: read(&self.rejected),
            upload_failures: read(&self.upload_failures),
            spool_bytes: read(&self.spool_bytes),
            spool_files: read(&self.spool_files),
            last_error: self
                .last_error
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}

pub(super) fn count(counter: &AtomicU64) {
    add(counter, 1);
}

pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}
