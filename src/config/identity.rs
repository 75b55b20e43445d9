//! Who this gateway is (portal-channel spec §5.2, §1.2).
//!
//! The identity must survive a restart, otherwise the portal sees a new gateway each time and
//! clients' authorizations end. Sources, in this order: the setting, the state directory, the
//! machine id, and a random one that is stored.

use std::{
    fmt, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use hmac::{Hmac, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// Name of the file in the state directory.
const FILE: &str = "gateway_id";

/// Key under which the machine id is hashed, shared with the stock gateway, so that replacing it on
/// a host keeps the identity (portal-channel spec §5.2).
const MACHINE_ID_KEY: &[u8] = b"753b38f9f96947ef8083802d5909a372";

/// Longest identity that is accepted, in bytes. It travels in a URL.
const LONGEST: usize = 255;

/// How many gateways may share a state directory.
const MOST_CLAIMS: u32 = 256;

/// The lasting identity of the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The Firezone id as configured, stored or derived.
    pub id: String,
    /// Where it came from.
    pub source: IdentitySource,
}

impl Identity {
    /// One that no other gateway has.
    pub(super) fn made_up() -> Self {
        Self {
            id: hex::encode(Sha256::digest(Uuid::new_v4().to_string())),
            source: IdentitySource::Random,
        }
    }

    /// The value of the `external_id` parameter: an id that is a UUID is sent as the hex SHA-256 of
    /// its text, any other as it is (portal-channel spec §1.2).
    pub fn external_id(&self) -> String {
        if Uuid::parse_str(&self.id).is_ok() {
            hex::encode(Sha256::digest(self.id.as_bytes()))
        } else {
            self.id.clone()
        }
    }
}

/// Where an identity came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentitySource {
    /// `FIREZONE_ID` or `--firezone-id`.
    Setting,
    /// A file in the state directory.
    File(PathBuf),
    /// The machine id in this file.
    MachineId(PathBuf),
    /// Made up just now.
    Random,
}

impl fmt::Display for IdentitySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting => f.write_str("FIREZONE_ID"),
            Self::File(path) => write!(f, "stored in {}", path.display()),
            Self::MachineId(path) => write!(f, "derived from {}", path.display()),
            Self::Random => f.write_str("random"),
        }
    }
}

/// The file's content. 2024 gateways wrote the bare UUID instead.
#[derive(Serialize, Deserialize)]
struct Stored {
    id: String,
}

/// Why an identity could not be determined.
#[derive(Debug, thiserror::Error)]
pub(super) enum IdentityError {
    #[error("{0}")]
    Unusable(&'static str),
    #[error("cannot read {path}: {error}")]
    Read { path: String, error: io::Error },
    #[error("{path} holds neither {{\"id\":\"…\"}} nor a UUID")]
    Garbage { path: String },
}

/// Path of the file in `state_dir`.
pub(super) fn file(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// Finds the identity without changing anything on disk.
pub(super) fn find(
    setting: Option<&str>,
    state_dir: &Path,
    machine_id: &Path,
) -> Result<Identity, IdentityError> {
    if let Some(id) = setting {
        check(id).map_err(IdentityError::Unusable)?;
        return Ok(Identity {
            id: id.to_owned(),
            source: IdentitySource::Setting,
        });
    }
    let path = file(state_dir);
    if let Some(id) = stored(&path)? {
        return Ok(Identity {
            id,
            source: IdentitySource::File(path),
        });
    }
    // A machine id that cannot be read, or that the image left for first boot to fill in, would
    // give the same identity to every container made from that image.
    if let Ok(content) = fs::read(machine_id)
        && !matches!(content.trim_ascii(), b"" | b"uninitialized")
    {
        return Ok(Identity {
            id: derive(&content),
            source: IdentitySource::MachineId(machine_id.to_owned()),
        });
    }
    Ok(Identity::made_up())
}

/// The identity of a gateway that shares a state directory and has `own` of it: as stored there,
/// else a new one. The machine id is the first one's.
pub(super) fn of_claim(own: &Path) -> Result<Identity, IdentityError> {
    let path = file(own);
    Ok(match stored(&path)? {
        Some(id) => Identity {
            id,
            source: IdentitySource::File(path),
        },
        None => Identity::made_up(),
    })
}

fn stored(path: &Path) -> Result<Option<String>, IdentityError> {
    let content = match fs::read_to_string(path) {
        Ok(content) => content,
        // A path through a file cannot hold an identity either; storing one will tell.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(error) => {
            return Err(IdentityError::Read {
                path: path.display().to_string(),
                error,
            });
        }
    };
    let text = content.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let id = match serde_json::from_str::<Stored>(text) {
        Ok(stored) => stored.id,
        Err(_) if Uuid::parse_str(text).is_ok() => text.to_owned(),
        Err(_) => String::new(),
    };
    match check(&id) {
        Ok(()) => Ok(Some(id)),
        Err(_) => Err(IdentityError::Garbage {
            path: path.display().to_string(),
        }),
    }
}

fn check(id: &str) -> Result<(), &'static str> {
    if id.trim().is_empty() {
        Err("the id is blank")
    } else if id.len() > LONGEST {
        Err("the id is longer than 255 bytes")
    } else if id.chars().any(char::is_control) {
        Err("the id contains a control character, such as a line break")
    } else {
        Ok(())
    }
}

/// Derives an identity from the machine id, taken with its line break (portal-channel spec §5.2).
fn derive(machine_id: &[u8]) -> String {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(MACHINE_ID_KEY).expect("HMAC takes keys of any length");
    mac.update(machine_id);
    hex::encode(mac.finalize().into_bytes())
}

/// The part of a state directory that belongs to this process until this is dropped.
///
/// Containers of one service, as `docker compose up --scale gateway=3` makes them, share their
/// volume. What is in it belongs to one gateway: two with one identity would take turns at the
/// portal, and each would send the flow logs of the other. So the first one takes the directory
/// itself, the next ones each a directory below it; whoever starts again takes any that is free. The
/// identities stay the same, whichever container has which.
#[derive(Debug)]
pub(super) struct Claim {
    /// The directory to use in place of the shared one.
    pub(super) directory: PathBuf,
    /// 1 for the directory itself.
    pub(super) number: u32,
    /// The kernel gives the lock back when the last descriptor is closed, however the process ends.
    _lock: fs::File,
}

impl Claim {
    /// Takes the first place that no running gateway has.
    ///
    /// # Errors
    /// When a directory is missing and cannot be made, its file system has no locks, or all places
    /// are taken.
    pub(super) fn take(state_dir: &Path) -> io::Result<Self> {
        use rustix::fs::{FlockOperation, flock};

        for number in 1..=MOST_CLAIMS {
            let directory = match number {
                1 => state_dir.to_owned(),
                _ => state_dir.join(format!("gateway-{number}")),
            };
            if number == 1 {
                make(&directory)?;
            } else {
                make_below(&directory)?;
            }
            // The directory itself: that leaves no file behind, and needs no right to write.
            let lock = fs::File::open(&directory)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    return Ok(Self {
                        directory,
                        number,
                        _lock: lock,
                    });
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other("too many gateways share it"))
    }
}

fn make(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;

    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o770)
        .create(directory)
}

/// Whoever may write the shared directory as its group may write this as well, whatever the umask.
fn make_below(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    match fs::create_dir(directory) {
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o770)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes `id` into `state_dir`, which is made when it is missing. A crash leaves either the old
/// file or the new one.
pub(super) fn store(id: &str, state_dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;

    make(state_dir)?;
    let path = file(state_dir);
    let draft = path.with_extension("new");
    let mut output = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o640)
        .open(&draft)?;
    serde_json::to_writer(&mut output, &Stored { id: id.to_owned() })?;
    output.write_all(b"\n")?;
    output.sync_all()?;
    fs::rename(&draft, &path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// HMAC-SHA256 written out after RFC 2104, so that the vector does not come from the code under
    /// test.
    fn hmac_by_hand(key: &[u8; 32], message: &[u8]) -> String {
        let pad = |byte: u8| -> Vec<u8> {
            let mut block = [byte; 64];
            for (b, k) in block.iter_mut().zip(key) {
                *b ^= k;
            }
            block.to_vec()
        };
        let mut inner = pad(0x36);
        inner.extend_from_slice(message);
        let mut outer = pad(0x5c);
        outer.extend_from_slice(&Sha256::digest(&inner));
        hex::encode(Sha256::digest(&outer))
    }

    fn nowhere() -> PathBuf {
        PathBuf::from("/nonexistent/machine-id")
    }

    #[test]
    fn setting_wins_over_stored_id_and_machine_id() {
        let dir = tempfile::tempdir().unwrap();
        store("stored", dir.path()).unwrap();

        let identity = find(Some("set"), dir.path(), &nowhere()).unwrap();

        assert_eq!(identity.id, "set");
        assert_eq!(identity.source, IdentitySource::Setting);
    }

    #[test]
    fn stored_id_survives_and_wins_over_machine_id() {
        let dir = tempfile::tempdir().unwrap();
        let machine_id = dir.path().join("machine-id");
        fs::write(&machine_id, "0123\n").unwrap();
        store("abc", dir.path()).unwrap();

        let identity = find(None, dir.path(), &machine_id).unwrap();

        assert_eq!(identity.id, "abc");
        assert_eq!(identity.source, IdentitySource::File(file(dir.path())));
    }

    #[test]
    fn stored_file_is_the_json_of_the_stock_gateway_and_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");

        store("abc", &state).unwrap();

        let text = fs::read_to_string(state.join("gateway_id")).unwrap();
        assert_eq!(text, "{\"id\":\"abc\"}\n");
        let mode = fs::metadata(file(&state)).unwrap().permissions().mode();
        assert_eq!(mode & 0o137, 0, "mode {mode:o}");
    }

    #[test]
    fn plain_uuid_of_2024_is_taken_over_and_hashed_for_the_portal() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = "7c8b1c3e-2e2b-4f6b-9a27-0d6d0f2f5b11";
        fs::write(file(dir.path()), format!("{uuid}\n")).unwrap();

        let identity = find(None, dir.path(), &nowhere()).unwrap();

        assert_eq!(identity.id, uuid);
        assert_eq!(
            identity.external_id(),
            hex::encode(Sha256::digest(uuid.as_bytes()))
        );
    }

    #[test]
    fn machine_id_is_hashed_with_its_line_break() {
        let dir = tempfile::tempdir().unwrap();
        let machine_id = dir.path().join("machine-id");
        let content = b"dc6d7bd5c1f84ea3b6e0a7fb3a5c9a10\n";
        fs::write(&machine_id, content).unwrap();

        let identity = find(None, dir.path(), &machine_id).unwrap();

        let expected = hmac_by_hand(b"753b38f9f96947ef8083802d5909a372", content);
        assert_eq!(identity.id, expected);
        assert_eq!(identity.source, IdentitySource::MachineId(machine_id));
        assert!(!file(dir.path()).exists(), "derived ids are not stored");
    }

    #[test]
    fn machine_id_left_for_first_boot_is_not_shared_by_all() {
        let dir = tempfile::tempdir().unwrap();
        let machine_id = dir.path().join("machine-id");
        for content in ["", "\n", "uninitialized\n"] {
            fs::write(&machine_id, content).unwrap();

            let one = find(None, dir.path(), &machine_id).unwrap();
            let two = find(None, dir.path(), &machine_id).unwrap();

            assert_eq!(one.source, IdentitySource::Random);
            assert_ne!(one.id, two.id);
            assert_eq!(one.id.len(), 64);
        }
    }

    #[test]
    fn external_id_hashes_uuids_as_written_and_sends_others_verbatim() {
        let external = |id: &str| {
            Identity {
                id: id.into(),
                source: IdentitySource::Setting,
            }
            .external_id()
        };
        let upper = "7C8B1C3E-2E2B-4F6B-9A27-0D6D0F2F5B11";

        assert_eq!(external("edge-7"), "edge-7");
        assert_eq!(external(upper), hex::encode(Sha256::digest(upper)));
        assert_ne!(external(upper), external(&upper.to_lowercase()));
    }

    #[test]
    fn damaged_file_is_an_error_and_not_a_new_identity() {
        let dir = tempfile::tempdir().unwrap();
        for content in ["not an id", "{\"id\":\"\"}", "{\"id\":\"a\\nb\"}", "{}"] {
            fs::write(file(dir.path()), content).unwrap();
            let error = find(None, dir.path(), &nowhere()).unwrap_err();
            assert!(error.to_string().contains("gateway_id"), "{error}");
        }
    }

    #[test]
    fn ids_that_cannot_travel_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for id in [" ", "a\nb", &"x".repeat(256)] {
            assert!(find(Some(id), dir.path(), &nowhere()).is_err(), "{id:?}");
        }
    }
}
