//! Stores with flipped bits and files cut short, many of them: each opens, believes nothing false,
//! and leaves nothing out without a word.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

/// Damages tried, of each kind to each shape of store.
const ROUNDS: usize = 8;

/// A store with three sessions, 200 queued batches and 50 retained messages, of which some are in
/// tables, some were replaced or removed by later journals, and some are in the journal only.
fn fill_well(folder: &Path) {
    let (mut engine, _) = DiskEngine::open(folder).unwrap();
    let topic = |number: u64| format!("state/{number}");
    let mut changes = Vec::new();
    for id in 1..=3 {
        changes.push(Change::PutSession(StoredSession { id, ..session() }));
        changes.push(Change::PutSubscription(id, subscription(1)));
    }
    for part in changes.chunks(2) {
        engine.commit(part).unwrap();
    }
    let queued = |n: u64| Change::Enqueue(queue_key(n), batch(n));
    let retained = |n: u64| Change::PutRetained("acme".into(), batch_on(&topic(n), n));
    let first: Vec<Change> = (0..150).map(queued).chain((0..30).map(retained)).collect();
    for part in first.chunks(7) {
        engine.commit(part).unwrap();
    }
    engine.tables().queues.rotate_memtable_and_wait().unwrap();
    engine.tables().retained.rotate_memtable_and_wait().unwrap();
    let mut second: Vec<Change> = (0..50).map(|n| Change::Dequeue(queue_key(n))).collect();
    second.extend((150..250).map(queued));
    second.extend((20..50).map(retained));
    for part in second.chunks(7) {
        engine.commit(part).unwrap();
    }
}

fn queue_key(sequence: u64) -> QueueKey {
    QueueKey {
        session: sequence % 3 + 1,
        ..key(sequence)
    }
}

/// What is in a store, in words.
fn contents(loaded: &Loaded) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (session, subscriptions) in &loaded.sessions {
        found.insert(format!("{session:?}"));
        for subscription in subscriptions {
            found.insert(format!("{} {subscription:?}", session.id));
        }
    }
    for (key, stored) in &loaded.queues {
        found.insert(format!("{key:?} {stored:?}"));
    }
    for (tenant, stored) in &loaded.retained {
        found.insert(format!("{tenant} {stored:?}"));
    }
    found
}

/// The files of a store, read once: what is in them, and how long they are with the zeros behind.
type Snapshot = BTreeMap<PathBuf, Content>;

type Content = (Vec<u8>, u64);

fn snapshot(folder: &Path) -> Snapshot {
    files(folder)
        .into_iter()
        .map(|file| {
            let mut bytes = std::fs::read(&file).unwrap();
            let length = bytes.len() as u64;
            bytes.truncate(salvage::content_length(&bytes));
            (
                file.strip_prefix(folder).unwrap().to_owned(),
                (bytes, length),
            )
        })
        .collect()
}

fn lay_out(folder: &Path, snapshot: &Snapshot) {
    for (name, (bytes, length)) in snapshot {
        let target = folder.join(name);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(&target, bytes).unwrap();
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&target)
            .unwrap();
        file.set_len(*length).unwrap();
    }
}

#[derive(Debug, Default)]
struct Figures {
    tried: usize,
    reported: usize,
    with_loss: usize,
    lost: usize,
    most_lost: usize,
    came_back: usize,
}

/// Tries damages to a store of this shape; each names the file it hit.
fn try_all(
    snapshot: &Snapshot,
    seed: u64,
    damage: impl Fn(&mut StdRng, &mut Content) -> String,
) -> Figures {
    let whole = tempfile::tempdir().unwrap();
    lay_out(whole.path(), snapshot);
    let loaded = DiskEngine::open(whole.path()).unwrap().0.load();
    assert!(loaded.left_out.is_empty());
    let want = contents(&loaded);
    assert_eq!(want.len(), 3 + 3 + 200 + 50);

    let mut rng = StdRng::seed_from_u64(seed);
    let names: Vec<&PathBuf> = snapshot.keys().collect();
    let large: Vec<&PathBuf> = (names.iter().copied())
        .filter(|name| snapshot[*name].0.len() > 4000)
        .collect();
    assert!(large.len() >= 3, "{large:?}");
    let mut figures = Figures::default();
    for round in 0..ROUNDS {
        // Every file has its turn, and between them those that hold the most.
        let name = match round % 2 {
            0 => names[round / 2 % names.len()],
            _ => large[round / 2 % large.len()],
        };
        let mut damaged = snapshot.clone();
        let content = damaged.get_mut(name).unwrap();
        let what = format!("{} in {}", damage(&mut rng, content), name.display());
        let place = tempfile::tempdir().unwrap();
        lay_out(place.path(), &damaged);

        let (mut engine, mut left_out) =
            DiskEngine::open(place.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let loaded = engine.load();
        left_out.extend(loaded.left_out.iter().cloned());
        let found = contents(&loaded);
        let missing = want.difference(&found).count();
        // Only a batch that was taken already may come back; nothing is ever made up.
        for extra in found.difference(&want) {
            assert!(extra.starts_with("QueueKey"), "{what}: {extra}");
        }
        for (key, stored) in &loaded.queues {
            let payload = payload(key.sequence);
            assert_eq!(stored.messages[0].payload[..], payload[..], "{what}");
        }
        assert!(
            missing == 0 || !left_out.is_empty(),
            "{what}: {missing} lost without a word"
        );
        figures.tried += 1;
        figures.reported += usize::from(!left_out.is_empty());
        figures.with_loss += usize::from(missing > 0);
        figures.lost += missing;
        figures.most_lost = figures.most_lost.max(missing);
        figures.came_back += found.difference(&want).count();

        // It serves on, and what is left out is said once.
        engine
            .commit(&[Change::Enqueue(key(9999), batch(9999))])
            .unwrap();
        drop(engine);
        let (mut engine, left_out) = DiskEngine::open(place.path()).unwrap();
        assert!(left_out.is_empty(), "{what}: {left_out:?}");
        assert_eq!(contents(&engine.load()).len(), found.len() + 1, "{what}");
    }
    figures
}

fn flip(rng: &mut StdRng, (bytes, length): &mut Content) -> String {
    // In the zeros behind, too, if there are any.
    let zeros = (bytes.len() / 50 + 1).min(*length as usize - bytes.len());
    bytes.resize(bytes.len() + zeros, 0);
    let at = rng.random_range(0..bytes.len());
    let bit = rng.random_range(0..8);
    bytes[at] ^= 1 << bit;
    format!("bit {bit} of byte {at}")
}

fn cut(rng: &mut StdRng, (bytes, length): &mut Content) -> String {
    *length = rng.random_range(0..=bytes.len() as u64);
    bytes.truncate(*length as usize);
    format!("cut to {length}")
}

/// Many bytes at once, as a bad sector is.
fn smear(rng: &mut StdRng, (bytes, _): &mut Content) -> String {
    let at = rng.random_range(0..bytes.len());
    let end = bytes.len().min(at + 512);
    rng.fill(&mut bytes[at..end]);
    format!("{} bytes at {at}", end - at)
}

#[allow(clippy::print_stderr)]
fn report(what: &str, figures: &Figures) {
    eprintln!("{what}: {figures:?}");
    assert_eq!(figures.tried, ROUNDS);
    // Damage to what counts is found, and the rest is there.
    assert!(figures.reported * 2 > figures.tried, "{what}: {figures:?}");
    assert!(figures.most_lost <= 200, "{what}: {figures:?}");
}

#[test]
fn nothing_is_left_out_of_a_damaged_store_without_a_word() {
    let folder = tempfile::tempdir().unwrap();
    fill_well(folder.path());
    let as_written = snapshot(folder.path());
    // Opening cuts off the zeros behind a journal's content.
    drop(DiskEngine::open(folder.path()).unwrap());
    let reopened = snapshot(folder.path());
    for (shape, snapshot) in [("as written", as_written), ("reopened", reopened)] {
        report(&format!("flips, {shape}"), &try_all(&snapshot, 1, flip));
        report(&format!("cuts, {shape}"), &try_all(&snapshot, 2, cut));
        report(&format!("smears, {shape}"), &try_all(&snapshot, 3, smear));
    }
}
