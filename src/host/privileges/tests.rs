#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use super::*;

const USER: User = User {
    uid: 65532,
    gid: 65533,
};

const NET_ADMIN: CapabilitySet = CapabilitySet::NET_ADMIN;
const BOTH: CapabilitySet = CapabilitySet::SETUID.union(CapabilitySet::SETGID);

#[test]
fn root_leaves_when_asked_and_able_and_says_what_it_lacks_otherwise() {
    let stay = |why: &str| Plan::Stay(why.to_owned());
    for (wanted, uid, permitted, expected) in [
        (None, 0, CapabilitySet::all(), Plan::Keep),
        (None, 1000, NET_ADMIN, Plan::Keep),
        (Some(USER), 0, NET_ADMIN | BOTH, Plan::Leave(USER)),
        // It may be useless without NET_ADMIN, but not for want of another user.
        (Some(USER), 0, BOTH, Plan::Leave(USER)),
        (
            Some(USER),
            0,
            NET_ADMIN,
            stay("SETGID and SETUID are missing"),
        ),
        (
            Some(USER),
            0,
            NET_ADMIN | CapabilitySet::SETUID,
            stay("SETGID is missing"),
        ),
        (
            Some(USER),
            0,
            NET_ADMIN | CapabilitySet::SETGID,
            stay("SETUID is missing"),
        ),
        // As systemd starts it.
        (Some(USER), 1000, NET_ADMIN, Plan::Trim),
        (Some(USER), 65532, CapabilitySet::empty(), Plan::Trim),
    ] {
        assert_eq!(
            plan(wanted, uid, permitted),
            expected,
            "{wanted:?} {uid} {permitted:?}"
        );
    }
}

#[test]
fn nothing_is_kept_but_what_is_needed_and_there() {
    let all = CapabilitySet::all();
    let bind = CapabilitySet::NET_BIND_SERVICE;
    assert_eq!(kept(all, false), NET_ADMIN);
    assert_eq!(kept(all, true), NET_ADMIN | bind);
    assert_eq!(kept(NET_ADMIN | BOTH, true), NET_ADMIN);
    assert_eq!(kept(BOTH, false), CapabilitySet::empty());
}

#[test]
fn rights_are_read_from_the_kernels_text() {
    let status = "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 \n\
                  CapInh:\t0000000000000000\nCapPrm:\t0000000000001000\n\
                  CapEff:\t0000000000001000\nCapBnd:\t00000000000010c0\nNoNewPrivs:\t1\n";
    let credentials = Credentials::parse(status).unwrap();
    assert_eq!((credentials.uid, credentials.gid), (2, 6));
    assert_eq!(credentials.no_new_privs, Some(true));
    assert!(credentials.has(NET_ADMIN) && !credentials.has(CapabilitySet::SETUID));
    assert_eq!(
        names(credentials.bounding),
        ["SETGID", "SETUID", "NET_ADMIN"]
    );
    assert_eq!(credentials.capabilities(), "capability NET_ADMIN");
    let with = |effective| Credentials {
        effective,
        ..credentials.clone()
    };
    assert_eq!(with(0).capabilities(), "no capability");
    assert_eq!(with((1 << 41) - 1).capabilities(), "41 capabilities");
    assert_eq!(names(1 << 60), ["number 60"]);
    for damaged in ["", "Uid:\t1", "Uid:\tx\nGid:\t1\nCapEff:\t0\nCapBnd:\t0\n"] {
        assert_eq!(Credentials::parse(damaged), None);
    }
}

/// Group and permissions.
fn of(path: &Path) -> (u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.gid(), found.mode() & 0o777)
}

fn file(path: &Path, mode: u32) {
    fs::write(path, "x").unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Whether the tests may give files to others.
fn is_root() -> bool {
    geteuid().is_root()
}

#[test]
fn state_of_roots_is_opened_to_the_group_and_nothing_else_is_touched() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    file(&outside, 0o600);
    let state = dir.path().join("state");
    let records = state.join("flow_logs/responder/one");
    fs::create_dir_all(&records).unwrap();
    for directory in [&state, &state.join("flow_logs"), &records] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
    }
    file(&state.join("gateway_id"), 0o640);
    // Another gateway's, which shares the directory.
    fs::create_dir(state.join("gateway-2")).unwrap();
    file(&records.join("token"), 0o600);
    // What whoever could write here before may have left for root to open.
    symlink(&outside, records.join("link")).unwrap();
    let second_name = dir.path().join("second-name");
    file(&second_name, 0o600);
    fs::hard_link(&second_name, records.join("hard")).unwrap();

    assert!(can_hand_over(&state, USER));
    assert_eq!(hand_over(&state, USER).unwrap(), Handed::ToGroup);

    assert_eq!(of(&state), (USER.gid, 0o770));
    assert_eq!(of(&records), (USER.gid, 0o770));
    assert_eq!(of(&state.join("gateway_id")), (USER.gid, 0o660));
    assert_eq!(of(&records.join("token")), (USER.gid, 0o660));
    assert_eq!(of(&outside), (0, 0o600));
    assert_eq!(of(&second_name), (0, 0o600));
    assert_eq!(hand_over(&state, USER).unwrap(), Handed::AlreadyOpen);
}

#[test]
fn missing_state_directory_is_made_and_one_that_is_open_is_left_alone() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("a/b");
    assert!(can_hand_over(&state, USER), "it is made");
    file(&dir.path().join("file"), 0o600);
    let nowhere = dir.path().join("file/state");
    assert!(!can_hand_over(&nowhere, USER), "it cannot be made");
    assert!(hand_over(&nowhere, USER).is_err());
    assert_eq!(hand_over(&state, USER).unwrap(), Handed::ToGroup);
    assert_eq!(of(&state).0, USER.gid);

    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o700)).unwrap();
    chown(&theirs, Some(USER.uid), Some(0)).unwrap();
    file(&theirs.join("something"), 0o600);
    assert!(can_hand_over(&theirs, USER));
    assert_eq!(hand_over(&theirs, USER).unwrap(), Handed::AlreadyOpen);
    assert_eq!(of(&theirs), (0, 0o700));
}

#[test]
fn directory_with_other_things_in_it_is_not_given_away() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    file(&dir.path().join("shadow"), 0o600);
    assert!(!can_hand_over(dir.path(), USER));
    let error = hand_over(dir.path(), USER).unwrap_err();
    assert!(error.to_string().contains("shadow"), "{error}");
    assert_eq!(of(dir.path()), (0, 0o755));
}
