//! A file of the host, read again when it has changed.

use std::error::Error;
use std::path::{Path, PathBuf};

use crate::file_version::FileVersion;

/// What a file says, as far as is known.
pub(super) struct Watched<T> {
    path: PathBuf,
    /// Of what `value` was made from.
    version: Option<FileVersion>,
    value: Option<T>,
    /// A failure has been told, and nothing was read since.
    told: bool,
}

impl<T> Watched<T> {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            version: None,
            value: None,
            told: false,
        }
    }

    /// What the file says now. When it cannot be read, which it may be while somebody writes it or
    /// while too many files are open, what it said before holds until it can; the next call tries
    /// again. `None` if it could never be read.
    pub(super) fn current<E: Error>(
        &mut self,
        read: impl FnOnce(&Path) -> Result<T, E>,
    ) -> Option<&T> {
        // Looked at first: what is written after this is of a later version.
        let version = FileVersion::of(&self.path);
        if version.is_some() && version == self.version {
            return self.value.as_ref();
        }
        match read(&self.path) {
            Ok(value) => {
                self.told = false;
                self.version = version;
                self.value = Some(value);
            }
            Err(error) => {
                // Not for each name that is asked for.
                if !std::mem::replace(&mut self.told, true) {
                    let file = self.path.display();
                    tracing::warn!(%error, %file, "Cannot be read; what was known, if anything, holds");
                }
            }
        }
        self.value.as_ref()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io;

    use super::*;

    fn read(path: &Path) -> io::Result<String> {
        std::fs::read_to_string(path)
    }

    fn fail(_: &Path) -> io::Result<String> {
        Err(io::Error::other("too many open files"))
    }

    fn not_read(_: &Path) -> io::Result<String> {
        panic!("it has not changed");
    }

    #[test]
    fn it_is_read_when_it_changed_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "a").unwrap();
        let mut watched = Watched::new(path.clone());
        assert_eq!(watched.current(read).unwrap(), "a");
        assert_eq!(watched.current(not_read).unwrap(), "a");
        std::fs::write(&path, "bc").unwrap();
        assert_eq!(watched.current(read).unwrap(), "bc");
        assert_eq!(watched.current(not_read).unwrap(), "bc");
    }

    #[test]
    fn a_failure_changes_nothing_and_the_next_call_tries_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "a").unwrap();
        let mut watched = Watched::new(path.clone());
        assert_eq!(watched.current(fail), None);
        assert_eq!(watched.current(read).unwrap(), "a");
        std::fs::write(&path, "bc").unwrap();
        assert_eq!(watched.current(fail).unwrap(), "a");
        assert_eq!(watched.current(read).unwrap(), "bc", "still the same file");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(watched.current(read).unwrap(), "bc");
    }
}
