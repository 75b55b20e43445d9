//! Files below a directory that others may have meddled with: everything is reached from the
//! directory's own descriptor, one name at a time, and no symbolic link is followed.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Stat, fchmod, fstat, mkdirat, openat, renameat, statat,
    unlinkat,
};
use rustix::io::Errno;

/// Directories are for their owner alone (portal-channel spec §4.8).
const DIRECTORY_MODE: u32 = 0o700;
/// Files too.
const FILE_MODE: u32 = 0o600;
/// Of a file that is not complete yet.
pub(super) const DRAFT_SUFFIX: &str = ".new";

/// An open directory.
#[derive(Debug)]
pub(super) struct Dir(OwnedFd);

/// Seconds and nanoseconds since 1970.
pub(super) type Moment = (i64, i64);

/// What stands in a directory under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) is_file: bool,
    pub(super) is_dir: bool,
    /// In bytes.
    pub(super) size: u64,
    pub(super) modified: Moment,
}

/// Result of [`Dir::read`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    Bytes(Vec<u8>),
    /// Nothing has that name.
    Missing,
    /// No regular file, or too long a one.
    Unusable,
}

impl Dir {
    /// Opens a directory that the operator named, which may stand behind a link.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(openat(CWD, path, flags, Mode::empty())?))
    }

    /// Opens the directory of that name in this one.
    pub(super) fn child(&self, name: &str) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(openat(&self.0, name, flags, Mode::empty())?))
    }

    /// As [`Self::child`]; makes the directory when there is none, and closes one that is open to
    /// others.
    pub(super) fn make_child(&self, name: &str) -> io::Result<Self> {
        match mkdirat(&self.0, name, Mode::from_raw_mode(DIRECTORY_MODE)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let child = self.child(name)?;
        let mode = fstat(&child.0)?.st_mode & 0o7777;
        if mode != DIRECTORY_MODE {
            // Someone else's directory cannot be changed, and need not be usable to write into.
            let _ = fchmod(&child.0, Mode::from_raw_mode(DIRECTORY_MODE));
        }
        Ok(child)
    }

    /// Calls `each` with every name. Names that are not UTF-8 come out mangled, and are nobody's.
    pub(super) fn for_each(
        &self,
        mut each: impl FnMut(&str, Found) -> io::Result<()>,
    ) -> io::Result<()> {
        for entry in rustix::fs::Dir::read_from(&self.0)? {
            let entry = entry?;
            let name: &CStr = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let found = match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => found(&stat),
                // Removed since.
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            each(&name.to_string_lossy(), found)?;
        }
        Ok(())
    }

    /// Reads a regular file of at most `limit` bytes.
    pub(super) fn read(&self, name: &str, limit: usize) -> io::Result<Content> {
        // Not blocking: whoever put a named pipe here would stop us otherwise.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.0, name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(Content::Missing),
            // A link; a socket, or a device without a driver.
            Err(Errno::LOOP | Errno::NXIO | Errno::NODEV) => return Ok(Content::Unusable),
            Err(error) => return Err(error.into()),
        };
        let found = found(&fstat(&file)?);
        if !found.is_file || found.size > limit as u64 {
            return Ok(Content::Unusable);
        }
        let mut bytes = Vec::new();
        File::from(file)
            .take(limit as u64 + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() > limit {
            return Ok(Content::Unusable);
        }
        Ok(Content::Bytes(bytes))
    }

    /// Writes a file that is there as a whole or not at all, also after a crash of the process.
    ///
    /// Not synced: after a power cut the records of the last seconds may be cut short, which their
    /// checksum tells. Waiting for the disk each time would keep hundreds of records per second
    /// from being written at all.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let draft = format!("{name}{DRAFT_SUFFIX}");
        let written = self
            .create(&draft)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| Ok(renameat(&self.0, &*draft, &self.0, name)?));
        if written.is_err() {
            // On a full disk even the remains of a draft are too much.
            let _ = self.remove(&draft);
        }
        written
    }

    fn create(&self, name: &str) -> io::Result<File> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(FILE_MODE);
        let file = match openat(&self.0, name, flags, mode) {
            Err(Errno::EXIST) => {
                // Left by a crash.
                self.remove(name)?;
                openat(&self.0, name, flags, mode)?
            }
            other => other?,
        };
        Ok(File::from(file))
    }

    /// Removes a file, or a link itself. It may be gone already.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        gone(unlinkat(&self.0, name, AtFlags::empty()))
    }

    /// Removes an empty directory. It may be gone already.
    pub(super) fn remove_child(&self, name: &str) -> io::Result<()> {
        gone(unlinkat(&self.0, name, AtFlags::REMOVEDIR))
    }
}

fn gone(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn found(stat: &Stat) -> Found {
    let kind = FileType::from_raw_mode(stat.st_mode);
    Found {
        is_file: kind == FileType::RegularFile,
        is_dir: kind == FileType::Directory,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: (
            stat.st_mtime,
            i64::try_from(stat.st_mtime_nsec).unwrap_or(0),
        ),
    }
}
