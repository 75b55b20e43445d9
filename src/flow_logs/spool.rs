//! Records on disk until they are uploaded: `<state_dir>/flow_logs/responder/<authorization>/` with
//! the `token` and one file per record (portal-channel spec §4.8, data-path spec §8.1).
//!
//! What is there is read once, at the start; from then on it is known. Both its bytes and its files
//! are bounded, and so is what is known of them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use secrecy::ExposeSecret as _;

use super::counters::{Counters, add, count};
use super::files::{Content, DRAFT_SUFFIX, Dir, Found, Moment};
use super::record::{self, Key, Kind, MAX_FILE, Record};
use super::token::{Authorization, MAX_TOKEN, is_id};

/// Directories below the state directory; the second is our role in the flows.
const PATH: [&str; 2] = ["flow_logs", "responder"];
const TOKEN: &str = "token";
const BODY_START: &str = "{\"flow_logs\":[";
const BODY_END: &str = "]}";

/// How much the spool may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in all files, tokens included. What the files take on disk is more by up to one block
    /// of the file system for each.
    pub max_bytes: u64,
    /// Files, tokens included.
    pub max_files: u64,
}

impl Default for Limits {
    /// 64 MiB in 100,000 files: room for the flows of a busy day without the portal.
    fn default() -> Self {
        Self {
            max_bytes: 64 << 20,
            max_files: 100_000,
        }
    }
}

/// Id of an authorization; a valid name of a directory.
pub(super) type Id = Arc<str>;

/// Records of one authorization, ready to be sent.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) authorization: Arc<Authorization>,
    /// The JSON to post.
    pub(super) body: Vec<u8>,
    /// Which records it holds, oldest first; never empty.
    pub(super) numbers: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    key: Key,
    size: u64,
}

/// What is kept of one authorization: a token and at least one record.
#[derive(Debug)]
struct Kept {
    authorization: Arc<Authorization>,
    token_size: u64,
    /// By number.
    records: BTreeMap<u64, Entry>,
    numbers: HashMap<Key, u64>,
}

#[derive(Debug)]
pub(super) struct Spool {
    root: Dir,
    limits: Limits,
    counters: Arc<Counters>,
    kept: HashMap<Id, Kept>,
    /// All records by number, which is in the order of writing.
    order: BTreeMap<u64, Id>,
    next: u64,
    bytes: u64,
    files: u64,
}

impl Spool {
    /// Opens the spool, makes it when there is none, and takes over what is in it.
    ///
    /// # Errors
    /// When a directory cannot be made or read, or is a symbolic link.
    pub(super) fn open(
        state_dir: &Path,
        limits: Limits,
        counters: Arc<Counters>,
        now: SystemTime,
    ) -> io::Result<Self> {
        // With the mode that the identity's file would give it.
        DirBuilder::new()
            .recursive(true)
            .mode(0o770)
            .create(state_dir)?;
        let mut root = Dir::open(state_dir)?;
        for name in PATH {
            root = root.make_child(name)?;
        }
        let mut spool = Self {
            root,
            limits,
            counters,
            kept: HashMap::new(),
            order: BTreeMap::new(),
            next: 0,
            bytes: 0,
            files: 0,
        };
        spool.scan()?;
        spool.expire(now);
        if let Err(error) = spool.make_room(None) {
            // Nothing more is written then, but what is there can be uploaded.
            spool
                .counters
                .failed(format!("cannot remove a flow log: {error}"));
        }
        spool.publish();
        Ok(spool)
    }

    fn scan(&mut self) -> io::Result<()> {
        let mut names = Vec::new();
        let mut foreign = 0;
        self.root.for_each(|name, found| {
            if found.is_dir && is_id(name) {
                names.push(Id::from(name));
            } else {
                foreign += 1;
            }
            Ok(())
        })?;
        add(&self.counters.damaged, foreign);

        let mut records = Vec::new();
        for id in names {
            // One directory that cannot be read is no reason to do without all others.
            match self.scan_authorization(&id) {
                Ok(found) => records.extend(found),
                Err(error) => {
                    count(&self.counters.damaged);
                    tracing::warn!(%error, authorization = %id, "cannot read flow logs");
                }
            }
        }
        // Numbers go on where the former run ended, as far as the clock tells.
        records.sort_unstable_by(|a, b| (a.0, a.2.key, &a.1).cmp(&(b.0, b.2.key, &b.1)));
        for (_, id, entry) in records {
            self.insert(&id, entry);
        }
        Ok(())
    }

    /// The records of one authorization, whose token is then known.
    fn scan_authorization(&mut self, id: &Id) -> io::Result<Vec<(Moment, Id, Entry)>> {
        let dir = self.root.child(id)?;
        let mut found: Vec<(Key, Found)> = Vec::new();
        let mut damaged = 0;
        let mut has_token = false;
        dir.for_each(|name, file| {
            if name == TOKEN {
                has_token = true;
            } else if let Some(name) = name.strip_suffix(DRAFT_SUFFIX)
                && (name == TOKEN || Key::from_file_name(name).is_some())
            {
                // A crash came between writing and renaming. Nobody reads it if it stays.
                let _ = dir.remove(&format!("{name}{DRAFT_SUFFIX}"));
            } else if let Some(key) = Key::from_file_name(name)
                && file.is_file
            {
                found.push((key, file));
            } else {
                damaged += 1;
            }
            Ok(())
        })?;
        add(&self.counters.damaged, damaged);

        let token = if has_token {
            read_token(&dir, id)?
        } else {
            None
        };
        let Some((authorization, token_size)) = token else {
            // Without the token nobody takes the records, and nobody knows until when to keep them.
            add(
                &self.counters.damaged,
                found.len() as u64 + u64::from(has_token),
            );
            for (key, _) in found {
                dir.remove(&key.file_name())?;
            }
            self.remove_directory(&dir, id);
            return Ok(Vec::new());
        };

        let may_be_good = |file: &Found| (1..=MAX_FILE as u64).contains(&file.size);
        let ended: HashSet<Key> = found
            .iter()
            .filter(|(key, file)| key.kind == Kind::End && may_be_good(file))
            .map(|(key, _)| *key)
            .collect();
        let mut records = Vec::with_capacity(found.len());
        for (key, file) in found {
            let superseded = key.kind == Kind::Start && ended.contains(&key.end());
            if superseded || !may_be_good(&file) {
                if !superseded {
                    count(&self.counters.damaged);
                }
                dir.remove(&key.file_name())?;
                continue;
            }
            let entry = Entry {
                key,
                size: file.size,
            };
            records.push((file.modified, Id::clone(id), entry));
        }
        if records.is_empty() {
            self.remove_directory(&dir, id);
        } else {
            self.add_authorization(id, Arc::new(authorization), token_size);
        }
        Ok(records)
    }

    /// Writes a record, and counts it. An end takes the place of its start.
    ///
    /// # Errors
    /// When the file cannot be written, or does not even fit into an empty spool.
    pub(super) fn write(
        &mut self,
        authorization: &Arc<Authorization>,
        record: &Record,
        now: SystemTime,
    ) -> io::Result<()> {
        if authorization.is_expired(now) {
            count(&self.counters.expired);
            return Ok(());
        }
        let key = Key::of(record);
        let id = self
            .kept
            .get_key_value(authorization.id())
            .map_or_else(|| Id::from(authorization.id()), |(id, _)| Id::clone(id));
        let numbers = self.kept.get(&id).map(|kept| &kept.numbers);
        if key.kind == Kind::Start && numbers.is_some_and(|n| n.contains_key(&key.end())) {
            return Ok(());
        }
        let file = record::encode(record)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let size = file.len() as u64;
        let token_size = authorization.token().expose_secret().len() as u64;
        self.make_room(Some((&id, size, token_size)))?;

        let written = self
            .directory(&id, authorization)
            .and_then(|dir| dir.write(&key.file_name(), &file).map(|()| dir));
        let dir = match written {
            Ok(dir) => dir,
            Err(error) => {
                self.remove_if_empty(&id);
                self.publish();
                return Err(error);
            }
        };
        self.forget(&id, key);
        self.insert(&id, Entry { key, size });
        count(&self.counters.written);
        if key.kind == Kind::End && self.forget(&id, key.start()) {
            // If it stays it is sent after the next start, which does no harm.
            let _ = dir.remove(&key.start().file_name());
        }
        self.publish();
        Ok(())
    }

    /// The directory of an authorization, with its newest token in it.
    fn directory(&mut self, id: &Id, authorization: &Arc<Authorization>) -> io::Result<Dir> {
        let mut authorization = authorization;
        let known = self.kept.get(id).map(|kept| &kept.authorization);
        if let Some(known) = known {
            let is_newer = !Arc::ptr_eq(known, authorization)
                && !known.has_token_of(authorization)
                && known.expires_at() <= authorization.expires_at();
            if !is_newer {
                match self.root.child(id) {
                    Ok(dir) => return Ok(dir),
                    // Somebody tidied up.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => authorization = known,
                    Err(error) => return Err(error),
                }
            }
        }
        let authorization = Arc::clone(authorization);
        let token = authorization.token().expose_secret().as_bytes();
        let token_size = token.len() as u64;
        let dir = self.root.make_child(id)?;
        dir.write(TOKEN, token).inspect_err(|_| {
            if !self.kept.contains_key(id) {
                // Fails unless it is as empty as it was made.
                let _ = self.root.remove_child(id);
            }
        })?;
        self.add_authorization(id, authorization, token_size);
        Ok(dir)
    }

    /// Takes the token into the books, in place of a former one.
    fn add_authorization(&mut self, id: &Id, authorization: Arc<Authorization>, token_size: u64) {
        if let Some(kept) = self.kept.get_mut(id) {
            self.bytes = self.bytes - kept.token_size + token_size;
            kept.token_size = token_size;
            kept.authorization = authorization;
            return;
        }
        self.bytes += token_size;
        self.files += 1;
        let kept = Kept {
            authorization,
            token_size,
            records: BTreeMap::new(),
            numbers: HashMap::new(),
        };
        self.kept.insert(Id::clone(id), kept);
    }

    fn insert(&mut self, id: &Id, entry: Entry) {
        let Some(kept) = self.kept.get_mut(id) else {
            return;
        };
        let number = self.next;
        self.next += 1;
        kept.records.insert(number, entry);
        kept.numbers.insert(entry.key, number);
        self.order.insert(number, Id::clone(id));
        self.bytes += entry.size;
        self.files += 1;
    }

    /// Takes a record out of the books. Says whether it was there.
    fn forget(&mut self, id: &Id, key: Key) -> bool {
        let Some(kept) = self.kept.get_mut(id) else {
            return false;
        };
        let Some(number) = kept.numbers.remove(&key) else {
            return false;
        };
        self.order.remove(&number);
        if let Some(entry) = kept.records.remove(&number) {
            self.bytes -= entry.size;
            self.files -= 1;
        }
        true
    }

    /// Removes the oldest records until the spool is within its limits together with a new record
    /// of an authorization, whose token may be new too; both with their sizes.
    fn make_room(&mut self, record: Option<(&Id, u64, u64)>) -> io::Result<()> {
        loop {
            // Asked anew each time: the oldest record may be the last one under this very token.
            let (bytes, files) = match record {
                None => (0, 0),
                Some((id, size, token_size)) => match self.kept.get(id) {
                    None => (size + token_size, 2),
                    Some(kept) => (size + token_size.saturating_sub(kept.token_size), 1),
                },
            };
            if self.bytes + bytes <= self.limits.max_bytes
                && self.files + files <= self.limits.max_files
            {
                return Ok(());
            }
            let Some((number, id)) = self.order.first_key_value() else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the record is larger than the spool may be",
                ));
            };
            let (number, id) = (*number, Id::clone(id));
            self.remove_file(&id, number)?;
            count(&self.counters.dropped_spool_full);
        }
    }

    /// Removes a record. When its file cannot be removed the record stays.
    fn remove_file(&mut self, id: &Id, number: u64) -> io::Result<()> {
        let Some(entry) = self.kept.get(id).and_then(|kept| kept.records.get(&number)) else {
            return Ok(());
        };
        let key = entry.key;
        match self.root.child(id) {
            Ok(dir) => dir.remove(&key.file_name())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        self.forget(id, key);
        self.remove_if_empty(id);
        Ok(())
    }

    /// Ends the books of an authorization without records, so that tokens do not pile up.
    fn remove_if_empty(&mut self, id: &Id) {
        if self
            .kept
            .get(id)
            .is_none_or(|kept| !kept.records.is_empty())
        {
            return;
        }
        if let Some(kept) = self.kept.remove(id) {
            self.bytes -= kept.token_size;
            self.files -= 1;
        }
        if let Ok(dir) = self.root.child(id) {
            self.remove_directory(&dir, id);
        }
    }

    /// Removes the token and the directory, unless there are files of somebody else in it, to whom
    /// the token is of use. What is left after a failure is found at the next start.
    fn remove_directory(&self, dir: &Dir, id: &str) {
        let mut others = false;
        let listed = dir.for_each(|name, _| {
            others |= name != TOKEN;
            Ok(())
        });
        if listed.is_ok() && !others {
            let _ = dir.remove(TOKEN);
            let _ = self.root.remove_child(id);
        }
    }

    /// Removes everything whose token is expired at `now`.
    pub(super) fn expire(&mut self, now: SystemTime) {
        let expired: Vec<(Id, Vec<u64>)> = self
            .kept
            .iter()
            .filter(|(_, kept)| kept.authorization.is_expired(now))
            .map(|(id, kept)| (Id::clone(id), kept.records.keys().copied().collect()))
            .collect();
        for (id, numbers) in expired {
            self.remove(&id, &numbers);
            add(&self.counters.expired, numbers.len() as u64);
        }
        self.publish();
    }

    /// Number of the next record: those that are there now have smaller ones.
    pub(super) fn next_number(&self) -> u64 {
        self.next
    }

    /// All authorizations, those with the oldest records first.
    pub(super) fn waiting(&self) -> Vec<Id> {
        let mut waiting: Vec<(u64, &Id)> = self
            .kept
            .iter()
            .filter_map(|(id, kept)| Some((*kept.records.first_key_value()?.0, id)))
            .collect();
        waiting.sort_unstable();
        waiting.into_iter().map(|(_, id)| Id::clone(id)).collect()
    }

    /// The oldest records of an authorization with numbers below `before`, in a body of at most
    /// `max_bytes`. Damaged ones are removed on the way. Nothing when there is none that can be
    /// read.
    pub(super) fn batch(
        &mut self,
        id: &Id,
        max_records: usize,
        max_bytes: usize,
        before: u64,
    ) -> Option<Batch> {
        let kept = self.kept.get(id)?;
        let authorization = Arc::clone(&kept.authorization);
        let dir = self.root.child(id);
        let mut body = BODY_START.as_bytes().to_vec();
        let mut numbers = Vec::new();
        let mut damaged = Vec::new();
        for (number, entry) in kept.records.range(..before) {
            if numbers.len() == max_records {
                break;
            }
            let file = match &dir {
                Ok(dir) => dir.read(&entry.key.file_name(), MAX_FILE),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Content::Missing),
                Err(_) => return None,
            };
            let file = match file {
                Ok(Content::Bytes(file)) => file,
                // Somebody tidied up.
                Ok(Content::Missing) => {
                    damaged.push(*number);
                    continue;
                }
                Ok(Content::Unusable) => {
                    count(&self.counters.damaged);
                    damaged.push(*number);
                    continue;
                }
                // The disk may be able to read it another time.
                Err(error) => {
                    self.counters
                        .failed(format!("cannot read a flow log: {error}"));
                    continue;
                }
            };
            let Some(payload) = record::decode(&file, entry.key.kind) else {
                count(&self.counters.damaged);
                damaged.push(*number);
                continue;
            };
            let comma = usize::from(!numbers.is_empty());
            if !numbers.is_empty()
                && body.len() + comma + payload.len() + BODY_END.len() > max_bytes
            {
                break;
            }
            if comma == 1 {
                body.push(b',');
            }
            body.extend_from_slice(payload.as_bytes());
            numbers.push(*number);
        }
        body.extend_from_slice(BODY_END.as_bytes());
        if !damaged.is_empty() {
            self.remove(id, &damaged);
        }
        (!numbers.is_empty()).then_some(Batch {
            authorization,
            body,
            numbers,
        })
    }

    /// Removes records, such as those that were uploaded. One whose file cannot be removed is
    /// forgotten all the same: it would be sent again and again.
    pub(super) fn remove(&mut self, id: &Id, numbers: &[u64]) {
        let dir = self.root.child(id);
        for number in numbers {
            let Some(entry) = self.kept.get(id).and_then(|kept| kept.records.get(number)) else {
                continue;
            };
            let key = entry.key;
            if let Ok(dir) = &dir
                && let Err(error) = dir.remove(&key.file_name())
            {
                self.counters
                    .failed(format!("cannot remove a flow log: {error}"));
            }
            self.forget(id, key);
        }
        self.remove_if_empty(id);
        self.publish();
    }

    fn publish(&self) {
        self.counters
            .spool_bytes
            .store(self.bytes, Ordering::Relaxed);
        self.counters
            .spool_files
            .store(self.files, Ordering::Relaxed);
    }
}

/// The token of a directory and its length, if it can be used and is that of this directory.
fn read_token(dir: &Dir, id: &str) -> io::Result<Option<(Authorization, u64)>> {
    let Content::Bytes(bytes) = dir.read(TOKEN, MAX_TOKEN)? else {
        return Ok(None);
    };
    Ok(str::from_utf8(&bytes)
        .ok()
        .and_then(|token| Authorization::parse(token).ok())
        .filter(|authorization| authorization.id() == id && authorization.uploads_enabled())
        .map(|authorization| (authorization, bytes.len() as u64)))
}

#[cfg(test)]
#[path = "spool_tests.rs"]
mod tests;
