//! Who may see what the gateway is doing: whoever knows the token in a file, if one is named.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

use crate::kept_files;

/// Longest token in bytes.
const LONGEST: u64 = 4096;

/// A token in a file; read for each question, so that a new one counts at once.
#[derive(Clone, PartialEq, Eq)]
pub struct AdminToken(PathBuf);

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AdminToken").field(&self.0).finish()
    }
}

impl AdminToken {
    /// The token in this file.
    pub fn in_file(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The token, without white space around it.
    ///
    /// # Errors
    /// When the file cannot be read, or does not hold between 1 and 4096 bytes of visible ASCII.
    /// The rest could not be shown: a header has no other characters, and clients that take it for
    /// a password do not agree on how to encode them.
    pub fn read(&self) -> io::Result<SecretString> {
        use std::io::Read as _;

        let unusable = |problem| Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        let mut bytes = Vec::new();
        kept_files::open(&self.0)?
            .take(LONGEST + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LONGEST {
            return unusable("it is longer than 4096 bytes");
        }
        match bytes.trim_ascii() {
            [] => unusable("it is empty"),
            token if token.iter().all(u8::is_ascii_graphic) => Ok(SecretString::from(
                String::from_utf8_lossy(token).into_owned(),
            )),
            _ => unusable(
                "it contains spaces or other characters that no header can carry; only visible \
                 ASCII is possible",
            ),
        }
    }

    /// Whether an `Authorization` header shows that its sender knows the token: as bearer
    /// (RFC 6750 §2.1), or as the password of any user (RFC 7617), which is what browsers ask for.
    ///
    /// # Errors
    /// See [`Self::read`]. Nobody is let in then.
    pub fn permits(&self, authorization: Option<&str>) -> io::Result<bool> {
        let token = self.read()?;
        let Some((scheme, value)) = authorization.and_then(|header| header.split_once(' ')) else {
            return Ok(false);
        };
        let shown = if scheme.eq_ignore_ascii_case("bearer") {
            Some(value.trim().to_owned())
        } else if scheme.eq_ignore_ascii_case("basic") {
            STANDARD
                .decode(value.trim())
                .ok()
                .and_then(|pair| String::from_utf8(pair).ok())
                .and_then(|pair| Some(pair.split_once(':')?.1.to_owned()))
        } else {
            None
        };
        // Hashes differ from the first byte on, however alike the tokens are, so that the time a
        // comparison takes tells nothing.
        let hash = |text: &str| Sha256::digest(text.as_bytes());
        Ok(shown.is_some_and(|shown| hash(&shown) == hash(token.expose_secret())))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn token(content: &str) -> (tempfile::TempDir, AdminToken) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, content).unwrap();
        (dir, AdminToken::in_file(path))
    }

    #[test]
    fn the_token_opens_as_bearer_and_as_password() {
        let (_dir, token) = token(" sesame\n");
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
        for (header, permitted) in [
            (Some("Bearer sesame".to_owned()), true),
            (Some("bearer  sesame ".to_owned()), true),
            (Some(basic("anybody:sesame")), true),
            (Some(basic(":sesame")), true),
            (Some("Bearer sesam".to_owned()), false),
            (Some("Bearer ".to_owned()), false),
            (Some("Bearer".to_owned()), false),
            (Some(basic("sesame")), false),
            (Some(basic("sesame:")), false),
            (Some("Basic ???".to_owned()), false),
            (Some("Digest sesame".to_owned()), false),
            (None, false),
        ] {
            let outcome = token.permits(header.as_deref()).unwrap();
            assert_eq!(outcome, permitted, "{header:?}");
        }
    }

    #[test]
    fn a_new_token_counts_at_once_and_a_missing_one_lets_nobody_in() {
        let (dir, token) = token("old");
        assert!(token.permits(Some("Bearer old")).unwrap());
        std::fs::write(token.path(), "new").unwrap();
        assert!(!token.permits(Some("Bearer old")).unwrap());
        assert!(token.permits(Some("Bearer new")).unwrap());
        for content in ["", " \n"] {
            std::fs::write(token.path(), content).unwrap();
            assert!(token.permits(Some("Bearer ")).is_err());
        }
        std::fs::write(token.path(), "x".repeat(5000)).unwrap();
        assert!(token.permits(Some("Bearer x")).is_err());
        drop(dir);
        assert!(token.permits(Some("Bearer new")).is_err());
    }

    #[test]
    fn what_cannot_be_sent_in_a_header_is_no_token() {
        for (content, reason) in [
            ("open sesame".as_bytes(), "visible ASCII"),
            ("s\u{e9}same".as_bytes(), "visible ASCII"),
            (b"sesame\0", "visible ASCII"),
            (b"\xffsesame", "visible ASCII"),
            (b"one\ntwo\n", "visible ASCII"),
            (b" \r\n", "empty"),
            (&[b'x'; 5000], "longer than 4096 bytes"),
        ] {
            let (_dir, token) = token("");
            std::fs::write(token.path(), content).unwrap();
            let error = token.read().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert!(!error.contains("sesame"), "{error}");
        }
        let (_dir, token) = token("\t~!sesame$\r\n");
        assert!(token.permits(Some("Bearer ~!sesame$")).unwrap());
    }

    #[test]
    fn the_token_is_not_shown() {
        let (_dir, token) = token("sesame");
        assert!(!format!("{token:?} {:?}", token.read()).contains("sesame"));
    }
}
