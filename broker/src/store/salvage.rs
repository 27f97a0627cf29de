//! Looking over a store's files before the engine opens them, and saving what can be read when
//! some are damaged.
//!
//! The engine refuses a damaged journal, trusts a damaged list of tables, and drops a keyspace it
//! cannot find the name of. So every byte that it would trust is checked here first. When something
//! is wrong, all that can be read is written to a new store, which takes the place of the old; the
//! old files are kept in a folder within the store's.

mod cursor;
mod journal;
mod tables;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

pub(super) use self::cursor::content_length;
use self::journal::Loss;
use super::record::{decode_json, encode_json};
use super::unix_ms;

/// Marks a folder as a store. Written last and moved last.
const MARKER: &str = "version";
const MARKER_BYTES: &[u8] = b"FJL\x03";
const KEYSPACES: &str = "keyspaces";
const LOCK: &str = "lock";
/// The lengths of the journals when the store was closed in order, to find one that was cut short.
const CLOSED: &str = "closed";
/// A new store that is being written.
const BEGUN: &str = "salvaging";
/// A new store that is whole, while the old files are moved out.
const WHOLE: &str = "salvaged";
/// A new store that is being moved in.
const MOVING: &str = "salvaged-moving";

/// Number of the engine's own keyspace, which has the names of the others.
const NAMES: u64 = 0;

/// Records of a store by keyspace and key, without those that were removed.
pub(super) type Records = BTreeMap<String, BTreeMap<Vec<u8>, Vec<u8>>>;

/// What is wrong with a store's files.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Damage, for a person.
    pub(super) damage: Vec<String>,
    /// A commit that was never finished, as a crash leaves it: nothing in it was acknowledged.
    pub(super) torn: Option<String>,
}

/// The newest that was found of each key, by number of keyspace.
#[derive(Debug, Default)]
struct Found(HashMap<u64, HashMap<Vec<u8>, Newest>>);

/// Sequence number and value; no value when it was removed.
type Newest = (u64, Option<Vec<u8>>);

impl Found {
    fn add(&mut self, space: u64, key: &[u8], sequence: u64, value: Option<&[u8]>) {
        let space = self.0.entry(space).or_default();
        match space.get_mut(key) {
            Some((newest, _)) if *newest > sequence => {}
            Some(newest) => *newest = (sequence, value.map(<[u8]>::to_vec)),
            None => {
                space.insert(key.to_vec(), (sequence, value.map(<[u8]>::to_vec)));
            }
        }
    }

    /// The records under the names of their keyspaces. `expected` are those of a new store, in the
    /// order they are made in, for names that are lost.
    fn into_records(mut self, expected: &[&str], damage: &mut Vec<String>) -> Records {
        let mut names: HashMap<u64, String> =
            (1..).zip(expected.iter().map(|&n| n.into())).collect();
        for (key, (_, value)) in self.0.remove(&NAMES).unwrap_or_default() {
            if let Some((b'n', id)) = key.split_first()
                && let Ok(id) = id.try_into().map(u64::from_be_bytes)
                && let Some(name) = value.and_then(|name| String::from_utf8(name).ok())
            {
                names.insert(id, name);
            }
        }
        let mut records = Records::new();
        for (id, space) in self.0 {
            let kept = space
                .into_iter()
                .filter_map(|(key, (_, value))| Some((key, value?)));
            match names.get(&id) {
                Some(name) if expected.contains(&name.as_str()) => {
                    records.entry(name.clone()).or_default().extend(kept);
                }
                _ => damage.push(format!(
                    "{} records of keyspace {id}, whose name is not known",
                    kept.count()
                )),
            }
        }
        records
    }
}

/// Lengths of the journals by name.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Lengths(BTreeMap<String, usize>);

/// Whether there is a store in the folder, whole or not.
fn is_store(folder: &Path) -> io::Result<bool> {
    Ok(folder.join(MARKER).try_exists()?
        || folder.join(KEYSPACES).try_exists()?
        || !journals(folder)?.is_empty())
}

/// Takes the lock of a store, so that no other broker has it meanwhile.
///
/// # Errors
/// `WouldBlock` when another has it.
pub(super) fn lock(folder: &Path) -> io::Result<fs::File> {
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join(LOCK))?;
    // One that is being stopped may need a moment.
    for _ in 0..3 {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) => {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Looks over the files of a store whose lock is held.
///
/// # Errors
/// The system does not let them be read. A file that cannot be read for damage is a finding.
pub(super) fn inspect(folder: &Path) -> io::Result<Findings> {
    let mut findings = Findings::default();
    if is_store(folder)? {
        examine(folder, &mut findings, None)?;
    }
    Ok(findings)
}

/// Forgets how the store was closed: what is true of it now ends with the next commit.
pub(super) fn begin(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(CLOSED)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Notes how a store is left that the engine has let go of.
pub(super) fn end(folder: &Path) -> io::Result<()> {
    // If another has it already, it is no longer as it was left.
    let _lock = match lock(folder) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        locked => locked?,
    };
    let mut lengths = Lengths::default();
    for (_, path) in journals(folder)? {
        lengths
            .0
            .insert(file_name(&path), content_length(&fs::read(&path)?));
    }
    fs::write(folder.join(CLOSED), encode_json(&lengths))
}

/// Everything in a damaged store that can be read.
pub(super) fn read(
    folder: &Path,
    expected: &[&str],
    findings: &mut Findings,
) -> io::Result<Records> {
    *findings = Findings::default();
    let mut found = Found::default();
    examine(folder, findings, Some(&mut found))?;
    Ok(found.into_records(expected, &mut findings.damage))
}

/// Where [`replace`] wants the new store to be written.
pub(super) fn new_store(folder: &Path) -> io::Result<PathBuf> {
    let place = folder.join(BEGUN);
    remove_folder(&place)?;
    Ok(place)
}

/// Puts the new store in the place of the old, which it keeps. The answer says where.
pub(super) fn replace(folder: &Path) -> io::Result<PathBuf> {
    fs::rename(folder.join(BEGUN), folder.join(WHOLE))?;
    sync_folder(folder)?;
    move_in(folder)
}

/// Goes on where a salvage was interrupted.
pub(super) fn resume(folder: &Path) -> io::Result<()> {
    remove_folder(&folder.join(BEGUN))?;
    if folder.join(WHOLE).try_exists()? || folder.join(MOVING).try_exists()? {
        move_in(folder)?;
    }
    Ok(())
}

/// Every step is a rename, so that it can be interrupted anywhere and gone on with.
fn move_in(folder: &Path) -> io::Result<PathBuf> {
    let aside = folder.join(format!("damaged-{}", unix_ms(SystemTime::now())));
    if folder.join(WHOLE).try_exists()? {
        fs::create_dir_all(&aside)?;
        for name in store_files(folder)? {
            fs::rename(folder.join(&name), aside.join(&name))?;
        }
        sync_folder(&aside)?;
        fs::rename(folder.join(WHOLE), folder.join(MOVING))?;
        sync_folder(folder)?;
    }
    let new = folder.join(MOVING);
    for name in store_files(&new)? {
        fs::rename(new.join(&name), folder.join(&name))?;
    }
    sync_folder(folder)?;
    remove_folder(&new)?;
    Ok(aside)
}

/// Files and folders of a store, the marker last.
fn store_files(folder: &Path) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = journals(folder)?
        .iter()
        .map(|(_, path)| file_name(path))
        .collect();
    for name in [CLOSED, KEYSPACES, MARKER] {
        if folder.join(name).try_exists()? {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) {
        fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Journals in the order they were written in.
fn journals(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jnl")
            && let Some(number) = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok())
        {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The bytes of a file; `None`, with a finding, when they cannot be read for damage.
fn bytes_of(folder: &Path, path: &Path, damage: &mut Vec<String>) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if super::disk::is_of_the_system(&error) => Err(error),
        Err(error) => {
            let shown = path.strip_prefix(folder).unwrap_or(path).display();
            damage.push(format!("{shown} cannot be read: {error}"));
            Ok(None)
        }
    }
}

/// Tables that count, with their checksums where they are known.
type Listed = Vec<(u64, Option<u128>)>;

/// Looks over everything, and gives what it finds to `found` if somebody wants it.
fn examine(
    folder: &Path,
    findings: &mut Findings,
    mut found: Option<&mut Found>,
) -> io::Result<()> {
    let damage = &mut findings.damage;
    if let Some(marker) = bytes_of(folder, &folder.join(MARKER), damage)?
        && marker != MARKER_BYTES
    {
        damage.push(format!("{MARKER} is not what the engine writes"));
    }
    let mut numbers = Vec::new();
    match fs::read_dir(folder.join(KEYSPACES)) {
        Ok(entries) => {
            for entry in entries {
                match entry?.file_name().to_string_lossy().parse::<u64>() {
                    Ok(number) => numbers.push(number),
                    Err(_) => damage.push(format!("{KEYSPACES} has an entry that is no number")),
                }
            }
        }
        Err(error) if super::disk::is_of_the_system(&error) => return Err(error),
        Err(error) => damage.push(format!("{KEYSPACES} cannot be read: {error}")),
    }
    numbers.sort_unstable();
    let mut empty = Vec::new();
    for &number in &numbers {
        let listed = examine_tables(folder, number, damage, found.as_deref_mut())?;
        if !listed {
            empty.push(number);
        }
    }
    let used = examine_journals(folder, findings, found)?;
    for number in used {
        // The engine would leave these out without a word.
        if !numbers.contains(&number) || empty.contains(&number) {
            findings.damage.push(format!(
                "{KEYSPACES}/{number} is missing, and journals refer to it"
            ));
        }
    }
    Ok(())
}

/// Looks over the journals. The answer is the keyspaces that they refer to.
fn examine_journals(
    folder: &Path,
    findings: &mut Findings,
    mut found: Option<&mut Found>,
) -> io::Result<Vec<u64>> {
    let damage = &mut findings.damage;
    let closed: Lengths = fs::read(folder.join(CLOSED))
        .ok()
        .and_then(|bytes| decode_json(&bytes).ok())
        .unwrap_or_default();
    let journals = journals(folder)?;
    for name in closed.0.keys() {
        if !journals.iter().any(|(_, path)| file_name(path) == *name) {
            damage.push(format!("{name} is missing"));
        }
    }
    let mut used = Vec::new();
    let mut last_sequence = 0;
    for (index, (_, path)) in journals.iter().enumerate() {
        let Some(bytes) = bytes_of(folder, path, damage)? else {
            continue;
        };
        let name = file_name(path);
        let journal = journal::read(&bytes, last_sequence);
        for (range, loss) in &journal.damage {
            let (start, length) = (range.start, range.len());
            let last = range.end == journal.length && index + 1 == journals.len();
            damage.push(match loss {
                Loss::Lost if last => format!(
                    "{name}: the last {length} bytes, at {start}, are damaged; the commits in them \
                     are left out, of which none was acknowledged if the power failed just then"
                ),
                Loss::Lost => format!(
                    "{name}: {length} of {} bytes at {start} are damaged; the commits in them are \
                     left out",
                    journal.length
                ),
                Loss::Mended => {
                    format!(
                        "{name}: a commit at {start} is damaged, and could be read all the same"
                    )
                }
            });
        }
        if let Some(expected) = closed.0.get(&name)
            && journal.length < *expected
        {
            damage.push(format!(
                "{name} has {} bytes, and had {expected} when the broker was stopped; the commits \
                 at its end are left out",
                journal.length
            ));
        } else if let Some(torn) = &journal.torn {
            let (start, length) = (torn.start, torn.len());
            let what = format!("{name}: the last {length} bytes, at {start}, are no whole commit");
            if index + 1 == journals.len() {
                findings.torn = Some(what);
            } else {
                damage.push(what);
            }
        }
        for batch in &journal.batches {
            last_sequence = batch.sequence;
            for item in &batch.items {
                if !used.contains(&item.space) {
                    used.push(item.space);
                }
                if let Some(found) = found.as_deref_mut() {
                    found.add(item.space, item.key, batch.sequence, item.value);
                }
            }
        }
    }
    Ok(used)
}

/// Looks over the tables of a keyspace. The answer is whether it has a list of them.
fn examine_tables(
    folder: &Path,
    number: u64,
    damage: &mut Vec<String>,
    mut found: Option<&mut Found>,
) -> io::Result<bool> {
    let shown = format!("{KEYSPACES}/{number}");
    let space = folder.join(KEYSPACES).join(number.to_string());
    let present = tables_in(&space)?;
    let has_list = space.join("current").try_exists()?;
    let listed = if has_list {
        list_of(folder, &space, &shown, damage)?
    } else {
        // The engine had not finished making it, unless there is something in it.
        if !present.is_empty() {
            damage.push(format!("{shown}/current is missing"));
        }
        None
    };
    // Without the list, a table that was replaced may bring back what was removed: a message may
    // come twice then, which is better than not at all.
    let wanted = listed.unwrap_or_else(|| present.iter().map(|&id| (id, None)).collect());
    for (id, sum) in wanted {
        let path = space.join("tables").join(id.to_string());
        let Some(bytes) = bytes_of(folder, &path, damage)? else {
            continue;
        };
        let whole = sum.is_none_or(|sum| tables::checksum(&bytes) == sum);
        if whole && found.is_none() {
            continue;
        }
        let table = tables::read(&bytes);
        for range in &table.lost {
            let (start, length) = (range.start, range.len());
            damage.push(format!(
                "{shown}/tables/{id}: {length} of {} bytes at {start} are damaged; the records in \
                 them are left out",
                bytes.len()
            ));
        }
        if !whole && table.lost.is_empty() {
            damage.push(format!(
                "{shown}/tables/{id} is damaged, and its records could be read all the same"
            ));
        }
        if let Some(found) = found.as_deref_mut() {
            for record in &table.records {
                found.add(number, &record.key, record.sequence, record.value);
            }
        }
    }
    Ok(has_list)
}

fn tables_in(space: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(space.join("tables")) {
        Ok(entries) => entries,
        Err(error) if super::disk::is_of_the_system(&error) => return Err(error),
        // The tables that are listed will be found missing.
        Err(_) => return Ok(Vec::new()),
    };
    let mut found = Vec::new();
    for entry in entries {
        found.extend(entry?.file_name().to_string_lossy().parse::<u64>().ok());
    }
    Ok(found)
}

/// Tables that count and their checksums; `None`, with a finding, when that cannot be said.
fn list_of(
    folder: &Path,
    space: &Path,
    shown: &str,
    damage: &mut Vec<String>,
) -> io::Result<Option<Listed>> {
    let Some(current) = bytes_of(folder, &space.join("current"), damage)? else {
        return Ok(None);
    };
    let Some((id, sum)) = tables::read_current(&current) else {
        damage.push(format!("{shown}/current is damaged"));
        return Ok(None);
    };
    let Some(list) = bytes_of(folder, &space.join(format!("v{id}")), damage)? else {
        return Ok(None);
    };
    if tables::checksum(&list) != sum {
        damage.push(format!("{shown}/v{id} is damaged"));
        return Ok(None);
    }
    let Some(listed) = tables::read_list(&list) else {
        damage.push(format!("{shown}/v{id} cannot be read"));
        return Ok(None);
    };
    let with_sum = |(id, sum)| (id, Some(sum));
    Ok(Some(listed.into_iter().map(with_sum).collect()))
}
