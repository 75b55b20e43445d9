//! Faults on request, for tests of what is to notice them. Only builds with debug assertions know
//! them; in a release build [`point`] does nothing.
//!
//! The file that `FIREZONE_FAULT_FILE` names, which may come and go, has one fault per line:
//! `wedge NAME` keeps a loop from going on for as long as the line is there, `fail NAME` ends it.

use std::io;

/// A loop comes by here once a round.
///
/// # Errors
/// When the loop is to fail.
#[cfg(not(debug_assertions))]
#[inline]
pub(crate) fn point(_: &str) -> io::Result<()> {
    Ok(())
}

/// A loop comes by here once a round.
///
/// # Errors
/// When the loop is to fail.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) -> io::Result<()> {
    use std::path::PathBuf;
    use std::sync::LazyLock;
    use std::time::Duration;

    static FILE: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| std::env::var_os("FIREZONE_FAULT_FILE").map(PathBuf::from));
    let Some(file) = &*FILE else {
        return Ok(());
    };
    loop {
        let wanted = std::fs::read_to_string(file).unwrap_or_default();
        let has = |fault| {
            wanted
                .lines()
                .any(|l| l.split_once(' ') == Some((fault, name)))
        };
        if has("fail") {
            return Err(io::Error::other("a fault was asked for"));
        }
        if !has("wedge") {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
