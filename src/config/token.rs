//! Where the token comes from (portal-channel spec §5.3).

use std::{
    fmt,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use secrecy::SecretString;

use crate::kept_files;

/// Name of the systemd credential, and of the variable.
pub(super) const NAME: &str = "FIREZONE_TOKEN";

/// A token file larger than this, in bytes, is something else.
const LARGEST_FILE: u64 = 64 * 1024;

/// Where a token came from. A file can be read again when it changes or on SIGHUP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The positional argument.
    Argument,
    /// The value of `FIREZONE_TOKEN`.
    Variable,
    /// A file: the one that `FIREZONE_TOKEN` or `FIREZONE_TOKEN_FILE` names, or a systemd
    /// credential.
    File(PathBuf),
}

impl TokenSource {
    /// The file to watch for a new token, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Argument | Self::Variable => None,
        }
    }

    /// Reads the token anew. `None` when it came from the command line or the environment, which
    /// cannot change while the process runs.
    ///
    /// # Errors
    /// The file cannot be read, or holds no token.
    pub fn reload(&self) -> Option<Result<SecretString, TokenError>> {
        self.path().map(read)
    }
}

impl fmt::Display for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument => f.write_str("command line"),
            Self::Variable => f.write_str(NAME),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// Why there is no usable token. Never contains any of it.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Docker makes a directory where the source of a bind mount is missing.
    #[error("{0} is a directory, not a file; the source of the bind mount is probably missing")]
    Directory(PathBuf),
    /// The file is too large for a token.
    #[error("{0} is larger than 64 KiB, so it is no token")]
    TooLarge(PathBuf),
    /// Nothing but white space.
    #[error("the token is empty")]
    Empty,
    /// Something that no HTTP header may contain.
    #[error("the token contains characters that no token has (only visible ASCII is possible)")]
    Characters,
}

/// Reads the token in `path`.
pub(super) fn read(path: &Path) -> Result<SecretString, TokenError> {
    let failed = |error| TokenError::Read {
        path: path.to_owned(),
        error,
    };
    let file = kept_files::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(TokenError::Directory(path.to_owned()));
    }
    let mut text = String::new();
    match file.take(LARGEST_FILE + 1).read_to_string(&mut text) {
        Ok(_) if text.len() as u64 > LARGEST_FILE => Err(TokenError::TooLarge(path.to_owned())),
        Ok(_) => clean(&text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(TokenError::Characters),
        Err(error) => Err(failed(error)),
    }
}

/// Removes all white space, also inside, as a token that was wrapped by an editor or a terminal has
/// it (portal-channel spec §1.3), and refuses what cannot be sent.
pub(super) fn clean(text: &str) -> Result<SecretString, TokenError> {
    let token: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    // A byte order mark is not white space, but just as invisible.
    let token = token.trim_start_matches('\u{feff}');
    if token.is_empty() {
        Err(TokenError::Empty)
    } else if token.chars().all(|c| c.is_ascii_graphic()) {
        Ok(SecretString::from(token))
    } else {
        Err(TokenError::Characters)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn white_space_anywhere_is_removed_and_a_leading_dot_kept() {
        let token = clean("\u{feff} .SFMy\nNTY.g2g\tDaAN \r\n").unwrap();
        assert_eq!(token.expose_secret(), ".SFMyNTY.g2gDaAN");
    }

    #[test]
    fn unusable_tokens_are_refused_without_being_shown() {
        for text in ["", " \n", "töken", "se\0cret"] {
            let error = clean(text).unwrap_err();
            assert!(!error.to_string().contains("cret"), "{error}");
        }
    }

    #[test]
    fn file_is_read_again_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        fs::write(&path, "one\n").unwrap();
        let source = TokenSource::File(path.clone());
        assert_eq!(source.reload().unwrap().unwrap().expose_secret(), "one");

        fs::write(&path, "two\n").unwrap();

        assert_eq!(source.reload().unwrap().unwrap().expose_secret(), "two");
        assert!(TokenSource::Variable.reload().is_none());
    }

    #[test]
    fn directory_endless_and_missing_files_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read(dir.path()), Err(TokenError::Directory(_))));
        assert!(matches!(
            read(Path::new("/dev/zero")),
            Err(TokenError::TooLarge(_))
        ));
        assert!(matches!(
            read(&dir.path().join("none")),
            Err(TokenError::Read { .. })
        ));
    }
}
