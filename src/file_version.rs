//! Whether a file that others write is still what it was when it was read.

use std::path::Path;
use std::time::SystemTime;

/// What tells one content of a file from the next. Time alone does not: a new file in its place
/// may be as old as the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileVersion {
    modified: SystemTime,
    inode: u64,
    len: u64,
}

impl FileVersion {
    /// `None` when there is no such file, or nothing can be found out about it.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt as _;

        let metadata = crate::kept_files::metadata(path).ok()?;
        Some(Self {
            modified: metadata.modified().ok()?,
            inode: metadata.ino(),
            len: metadata.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn another_content_or_file_is_another_version_and_no_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert_eq!(FileVersion::of(&path), None);
        std::fs::write(&path, "a").unwrap();
        let first = FileVersion::of(&path);
        assert!(first.is_some());
        assert_eq!(FileVersion::of(&path), first);
        std::fs::write(&path, "ab").unwrap();
        let longer = FileVersion::of(&path);
        assert_ne!(longer, first);
        // As long and as old, but another one.
        let other = dir.path().join("other");
        std::fs::write(&other, "cd").unwrap();
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        let file = std::fs::File::options().write(true).open(&other).unwrap();
        file.set_modified(modified).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_ne!(FileVersion::of(&path), longer);
    }
}
