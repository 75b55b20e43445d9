//! Giving the state directory to the group of the user that the gateway becomes.
//!
//! It is often a volume of root's. Without `CAP_CHOWN` root cannot give it to the user, but it can
//! give its own files to a group that it is in. Only what the gateway makes itself is touched, and no
//! link is followed: whoever could write here before must not get root to open other files.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use rustix::fs::{
    Access, CWD, Dir, FileType, Mode, OFlags, Stat, access, fchmod, fchown, fstat, openat,
};
use rustix::io::Errno;
use rustix::process::Gid;

use super::User;

/// Of the directory: read, write, enter.
const DIRECTORY: u32 = 0o070;
/// Of files: read, write.
const FILE: u32 = 0o060;
/// How deep the spool of flow logs goes: role, authorization, records.
const DEPTH: u32 = 4;

/// What the gateway makes in its state directory, and what a fresh volume has.
const OURS: [&str; 4] = ["gateway_id", "gateway_id.new", "flow_logs", "lost+found"];
/// What other gateways have there that share it, with a number behind it.
const OTHERS: &str = "gateway-";
/// What the preflight makes there for a moment.
const WRITE_CHECK: &str = ".write-check-";

/// What became of the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handed {
    /// The user could write it before.
    AlreadyOpen,
    /// The group can write it now.
    ToGroup,
}

/// Opens the state directory, which is made when it is missing, and what the gateway has in it to the
/// user's group. For whoever has the group, see [`begin`](super::begin).
///
/// # Errors
/// When the directory is not ours to give, or holds something that is not the gateway's.
pub fn hand_over(directory: &Path, to: User) -> io::Result<Handed> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o770)
        .create(directory)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // The operator named it; it may stand behind a link.
    let fd = openat(CWD, directory, flags, Mode::empty())?;
    let handed = if is_open(&fstat(&fd)?, to, DIRECTORY) {
        Handed::AlreadyOpen
    } else {
        only_ours(&fd)?;
        open_to(&fd, to, DIRECTORY)?;
        Handed::ToGroup
    };
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"gateway_id" | b"flow_logs") {
            hand_over_entry(&fd, name, to, DEPTH)?;
        }
    }
    Ok(handed)
}

/// Whether [`hand_over`] would do, as far as that can be told without trying.
pub fn can_hand_over(directory: &Path, to: User) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = match openat(CWD, directory, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(error) => return error == Errno::NOENT && can_be_made(directory),
    };
    fstat(&fd).is_ok_and(|stat| {
        is_open(&stat, to, DIRECTORY)
            || stat.st_uid == rustix::process::geteuid().as_raw()
                && only_ours(&fd).is_ok()
                // Of what is mounted read-only nothing can be given.
                && rustix::fs::fstatvfs(&fd).is_ok_and(|fs| {
                    !fs.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY)
                })
    })
}

/// Whether a directory could be made there: the nearest one above can be written.
pub(in super::super) fn can_be_made(directory: &Path) -> bool {
    let above = directory.ancestors().skip(1).find(|above| above.exists());
    above.is_some_and(|above| access(above, Access::WRITE_OK | Access::EXEC_OK).is_ok())
}

/// Whether user or group have all of these rights, which are given as those of a group.
fn is_open(stat: &Stat, to: User, rights: u32) -> bool {
    let has = |shifted: u32| stat.st_mode & shifted == shifted;
    if stat.st_uid == to.uid {
        has(rights << 3)
    } else if stat.st_gid == to.gid {
        has(rights)
    } else {
        has(rights >> 3)
    }
}

fn open_to(fd: &OwnedFd, to: User, rights: u32) -> io::Result<()> {
    fchown(fd, None, Some(Gid::from_raw(to.gid)))?;
    let mode = Mode::from_raw_mode(fstat(fd)?.st_mode & 0o7777 | rights);
    fchmod(fd, mode)?;
    Ok(())
}

/// A directory that holds other things as well is probably not for the gateway alone.
fn only_ours(fd: &OwnedFd) -> io::Result<()> {
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        let known = matches!(&*name, "." | "..")
            || OURS.contains(&&*name)
            || name.starts_with(OTHERS)
            || name.starts_with(WRITE_CHECK);
        if !known {
            return Err(io::Error::other(format!(
                "it holds {name:?}, which is not the gateway's"
            )));
        }
    }
    Ok(())
}

fn hand_over_entry(
    parent: &OwnedFd,
    name: &std::ffi::CStr,
    to: User,
    depth: u32,
) -> io::Result<()> {
    // Not blocking, in case it is a named pipe.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = match openat(parent, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        // A link, or already the user's alone.
        Err(Errno::LOOP | Errno::NOENT | Errno::NXIO | Errno::ACCESS) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let stat = fstat(&fd)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            if is_open(&stat, to, DIRECTORY) && stat.st_gid == to.gid {
                return Ok(());
            }
            if !is_open(&stat, to, DIRECTORY) {
                open_to(&fd, to, DIRECTORY)?;
            }
            let Some(depth) = depth.checked_sub(1) else {
                return Ok(());
            };
            for entry in Dir::read_from(&fd)? {
                let entry = entry?;
                let name = entry.file_name();
                if !matches!(name.to_bytes(), b"." | b"..") {
                    hand_over_entry(&fd, name, to, depth)?;
                }
            }
            Ok(())
        }
        // A second name may stand in a directory of somebody else.
        FileType::RegularFile if stat.st_nlink == 1 && !is_open(&stat, to, FILE) => {
            open_to(&fd, to, FILE)
        }
        _ => Ok(()),
    }
}
