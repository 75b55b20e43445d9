//! Files that settings name, read again while the gateway runs: the token, and others that often
//! only root may read.
//!
//! Whoever leaves root loses the right to open them. So they are kept open from before, and read
//! through that descriptor as long as the path still leads to the same file. Where a single file is
//! mounted into a container that is all there ever is; a new file in its place has to be readable for
//! the new user.
//!
//! The files are the process's, as its user is: hence one table for all.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

static KEPT: RwLock<BTreeMap<PathBuf, Arc<File>>> = RwLock::new(BTreeMap::new());

/// Opens regular files to keep them. What cannot be opened is left out: whoever needs it will say so.
pub fn keep<'a>(paths: impl IntoIterator<Item = &'a Path>) {
    let mut kept = KEPT.write().unwrap_or_else(PoisonError::into_inner);
    for path in paths {
        // Opening something else may wait for another process, or have an effect.
        if !std::fs::metadata(path).is_ok_and(|found| found.is_file()) {
            continue;
        }
        if let Ok(file) = File::open(path) {
            kept.insert(path.to_owned(), Arc::new(file));
        }
    }
}

/// Lets go of those that can be opened like any other. Returns the rest.
pub fn let_go() -> Vec<PathBuf> {
    let mut kept = KEPT.write().unwrap_or_else(PoisonError::into_inner);
    kept.retain(|path, _| {
        File::open(path).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    });
    kept.keys().cloned().collect()
}

/// An open file, from its beginning.
#[derive(Debug)]
pub(crate) enum Reader {
    Fresh(File),
    /// Others read it as well, each from its own place.
    Kept(Arc<File>, u64),
}

impl Reader {
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        match self {
            Self::Fresh(file) => file.metadata(),
            Self::Kept(file, _) => file.metadata(),
        }
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Fresh(file) => file.read(buffer),
            Self::Kept(file, at) => {
                let count = file.read_at(buffer, *at)?;
                *at += count as u64;
                Ok(count)
            }
        }
    }
}

/// As [`File::open`]; one that may not be opened any more is read through the kept descriptor.
pub(crate) fn open(path: &Path) -> io::Result<Reader> {
    instead(path, File::open(path).map(Reader::Fresh), |file| {
        Ok(Reader::Kept(file, 0))
    })
}

/// As [`std::fs::metadata`], also where the directory may not be entered any more.
pub(crate) fn metadata(path: &Path) -> io::Result<Metadata> {
    instead(path, std::fs::metadata(path), |file| file.metadata())
}

/// What came of the path, or of the kept file if that is what was refused.
fn instead<T>(
    path: &Path,
    result: io::Result<T>,
    read: impl FnOnce(Arc<File>) -> io::Result<T>,
) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => match kept(path) {
            Some(file) => read(file),
            None => Err(error),
        },
        other => other,
    }
}

/// The kept file, unless another one has taken its place.
fn kept(path: &Path) -> Option<Arc<File>> {
    let kept = KEPT.read().unwrap_or_else(PoisonError::into_inner);
    let file = kept.get(path)?;
    let same = match std::fs::metadata(path) {
        Ok(there) => file
            .metadata()
            .is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    };
    same.then(|| Arc::clone(file))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn text(result: io::Result<Reader>) -> io::Result<String> {
        let mut text = String::new();
        result?.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Tests run as root, whom no mode keeps out.
    fn refused(path: &Path) -> io::Result<Reader> {
        let refused = Err(io::ErrorKind::PermissionDenied.into());
        instead(path, refused, |file| Ok(Reader::Kept(file, 0)))
    }

    #[test]
    fn what_may_not_be_opened_any_more_is_read_through_the_kept_file_each_time_from_its_beginning()
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "one").unwrap();
        assert!(refused(&path).is_err(), "not kept yet");
        keep([path.as_path()]);
        assert_eq!(text(refused(&path)).unwrap(), "one");
        // Written anew in place, as through a bind mount.
        std::fs::write(&path, "two, longer").unwrap();
        for _ in 0..2 {
            assert_eq!(text(refused(&path)).unwrap(), "two, longer");
        }
    }

    #[test]
    fn a_file_in_place_of_the_kept_one_is_not_mistaken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "old").unwrap();
        keep([path.as_path()]);
        let new = dir.path().join("new");
        std::fs::write(&new, "new").unwrap();
        std::fs::rename(&new, &path).unwrap();
        let error = text(refused(&path)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(text(open(&path)).unwrap(), "new", "to whom it is open");
        std::fs::remove_file(&path).unwrap();
        assert!(refused(&path).is_err());
        assert_eq!(open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_can_be_opened_is_not_kept_and_what_is_no_file_never() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "open to all").unwrap();
        keep([path.as_path(), dir.path(), Path::new("/nonexistent")]);
        assert!(refused(dir.path()).is_err());
        assert!(!let_go().contains(&path));
        assert!(refused(&path).is_err());
    }
}
