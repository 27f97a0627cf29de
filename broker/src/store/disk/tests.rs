use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use selvedge_certs::Identity;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::topic::TopicName;

use super::super::{StoredMessageId, from_unix_ms, unix_ms};
use super::*;
use crate::batch::{Batch, Flow};

mod damage;

const SESSION: u64 = 7;

fn key(sequence: u64) -> QueueKey {
    QueueKey {
        session: SESSION,
        subscription: 0,
        class: Class::Normal,
        sequence,
    }
}

fn payload(sequence: u64) -> Vec<u8> {
    format!("message {sequence} ").repeat(8).into_bytes()
}

fn batch(sequence: u64) -> Arc<Batch> {
    let topic = TopicName::parse("line/1").unwrap();
    let publisher = Identity::new("example.org", "acme", "plant-1", "press-7").unwrap();
    let mut frames = BytesMut::new();
    lane::put_message(
        &mut frames,
        Flags::new(Qos::AtLeastOnce),
        1,
        None,
        &payload(sequence),
    );
    Arc::new(Batch {
        flow: Arc::new(Flow::new(1, topic, publisher, 1)),
        class: Class::Normal,
        qos: Qos::AtLeastOnce,
        retain: false,
        retain_as_published: false,
        count: 1,
        frames: frames.freeze(),
        payload: Bytes::new(),
        expires: None,
    })
}

fn session() -> StoredSession {
    StoredSession {
        id: SESSION,
        identity: "spiffe://example.org/acme/plant-1/reader".into(),
        name: "kept".into(),
        expiry_ms: 1000,
        detached_ms: None,
    }
}

/// A store with a session and 300 messages, of which the first 100 were taken.
fn fill(folder: &Path) {
    let (mut engine, left_out) = DiskEngine::open(folder).unwrap();
    assert!(left_out.is_empty());
    let mut changes = vec![Change::PutSession(session())];
    changes.extend((1..=300).map(|sequence| Change::Enqueue(key(sequence), batch(sequence))));
    for part in changes.chunks(50) {
        engine.commit(part).unwrap();
    }
    // Half of it is in tables and half in the journal, so that both are damaged below.
    engine.tables().queues.rotate_memtable_and_wait().unwrap();
    let taken: Vec<Change> = (1..=100)
        .map(|sequence| Change::Dequeue(key(sequence)))
        .collect();
    engine.commit(&taken).unwrap();
}

fn messages(loaded: &Loaded) -> BTreeMap<u64, Vec<u8>> {
    let payload = |stored: &StoredMessages| stored.messages[0].payload.to_vec();
    loaded
        .queues
        .iter()
        .map(|(key, stored)| (key.sequence, payload(stored)))
        .collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if std::fs::metadata(&path).unwrap().len() > 0 {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn what_was_committed_is_there_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let (mut engine, left_out) = DiskEngine::open(folder.path()).unwrap();
    let loaded = engine.load();
    assert!(left_out.is_empty() && loaded.left_out.is_empty());
    assert_eq!(loaded.sessions, [(session(), Vec::new())]);
    let want: BTreeMap<u64, Vec<u8>> = (101..=300).map(|n| (n, payload(n))).collect();
    assert_eq!(messages(&loaded), want);

    engine.commit(&[Change::RemoveSession(SESSION)]).unwrap();
    drop(engine);
    let loaded = DiskEngine::open(folder.path()).unwrap().0.load();
    assert!(loaded.sessions.is_empty() && loaded.queues.is_empty());
}

fn history(topic: &str, sequence: u64) -> HistoryKey {
    HistoryKey {
        tenant: "acme".into(),
        topic: topic.into(),
        sequence,
    }
}

/// The same batch on another topic.
fn batch_on(topic: &str, sequence: u64) -> Arc<Batch> {
    let batch = batch(sequence);
    let publisher = batch.flow.publisher.clone();
    let flow = Flow::new(1, TopicName::parse(topic).unwrap(), publisher, 1);
    Arc::new(Batch {
        flow: Arc::new(flow),
        frames: batch.frames.clone(),
        payload: Bytes::new(),
        ..*batch
    })
}

#[test]
fn message_ids_are_there_after_reopening_until_they_are_past() {
    let folder = tempfile::tempdir().unwrap();
    let (mut engine, _) = DiskEngine::open(folder.path()).unwrap();
    let clock = from_unix_ms(unix_ms(SystemTime::now()));
    let hour = std::time::Duration::from_secs(3600);
    let put = |id: &'static [u8], until| Change::PutMessageId {
        tenant: "acme".into(),
        publisher: "spiffe://example.org/acme/s/p".into(),
        id: Bytes::from_static(id),
        until,
    };
    let remove = Change::RemoveMessageId {
        tenant: "acme".into(),
        publisher: "spiffe://example.org/acme/s/p".into(),
        id: Bytes::from_static(b"removed"),
    };
    let changes = [
        put(b"\0kept", clock + hour),
        put(b"past", clock - hour),
        put(b"removed", clock + hour),
        remove,
    ];
    engine.commit(&changes).unwrap();
    drop(engine);

    let (mut engine, _) = DiskEngine::open(folder.path()).unwrap();
    let loaded = engine.load();
    assert!(loaded.left_out.is_empty(), "{:?}", loaded.left_out);
    let want = StoredMessageId {
        tenant: "acme".into(),
        publisher: "spiffe://example.org/acme/s/p".into(),
        id: Bytes::from_static(b"\0kept"),
        until: clock + hour,
    };
    assert_eq!(loaded.message_ids, [want]);
    assert_eq!(engine.tables().message_ids.iter().count(), 1);
}

#[test]
fn history_is_there_after_reopening_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (mut engine, _) = DiskEngine::open(folder.path()).unwrap();
    let published = from_unix_ms(1_700_000_000_000);
    let long = format!("line/{}", "x".repeat(65_000));
    let topics = ["line", "line/2", long.as_str()];
    let mut changes = Vec::new();
    for topic in topics {
        for sequence in [256, 3, 1] {
            let batch = batch_on(topic, sequence);
            changes.push(Change::PutHistory(
                history(topic, sequence),
                batch,
                published,
            ));
        }
        changes.push(Change::RemoveHistory(history(topic, 3)));
    }
    changes.push(Change::PutRetained("acme".into(), batch_on(&long, 7)));
    engine.commit(&changes).unwrap();
    drop(engine);

    let loaded = DiskEngine::open(folder.path()).unwrap().0.load();
    assert!(loaded.left_out.is_empty(), "{:?}", loaded.left_out);
    let found: Vec<_> = loaded.history.iter().map(|(key, ..)| key.clone()).collect();
    let mut want: Vec<_> = topics
        .into_iter()
        .flat_map(|topic| [history(topic, 1), history(topic, 256)])
        .collect();
    want.sort();
    assert_eq!(found, want);
    for (key, at, stored) in &loaded.history {
        assert_eq!(*at, published);
        assert_eq!(stored.messages[0].payload[..], payload(key.sequence)[..]);
    }
    assert_eq!(loaded.retained[0].1.topic, long);
}

fn subscription(id: u32) -> StoredSubscription {
    StoredSubscription {
        id,
        target: "line/#".into(),
        max_qos: 1,
        no_local: false,
        retain_as_published: false,
        identifier: None,
        own_lane: true,
        overflow: "default".into(),
        owed: true,
        datagrams: true,
    }
}

#[test]
fn subscriptions_are_there_after_reopening_and_old_ones_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let (mut engine, _) = DiskEngine::open(folder.path()).unwrap();
    let subscription = subscription(3);
    let put = Change::PutSubscription(SESSION, subscription.clone());
    engine
        .commit(&[Change::PutSession(session()), put])
        .unwrap();
    drop(engine);
    let loaded = DiskEngine::open(folder.path()).unwrap().0.load();
    assert_eq!(loaded.sessions, [(session(), vec![subscription])]);

    let old = serde_json::json!({
        "id": 3, "target": "line/#", "max_qos": 1, "no_local": false, "retain_as_published": false,
        "identifier": null, "own_lane": false, "overflow": "default",
    });
    let read: StoredSubscription = decode_json(&encode_json(&old)).unwrap();
    assert!(!read.owed && !read.datagrams);
}

#[test]
fn a_second_broker_is_turned_away_and_harms_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let first = DiskEngine::open(folder.path()).unwrap();
    let error = DiskEngine::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("in use by another broker"), "{error}");
    drop(first);
    assert_eq!(
        DiskEngine::open(folder.path())
            .unwrap()
            .0
            .load()
            .queues
            .len(),
        200
    );
}

/// Damages each file in turn: the store opens all the same, and believes no byte that was not
/// written.
fn survives(damage: impl Fn(&mut Vec<u8>)) {
    let kept = tempfile::tempdir().unwrap();
    let original = kept.path().join("store");
    fill(&original);
    let mut damaged = 0;
    for file in files(&original) {
        let place = tempfile::tempdir().unwrap();
        let copy = place.path().join("store");
        for source in files(&original) {
            let target = copy.join(source.strip_prefix(&original).unwrap());
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            std::fs::copy(&source, target).unwrap();
        }
        let target = copy.join(file.strip_prefix(&original).unwrap());
        let mut bytes = std::fs::read(&target).unwrap();
        damage(&mut bytes);
        std::fs::write(&target, bytes).unwrap();
        damaged += 1;

        let (mut engine, mut left_out) = DiskEngine::open(&copy).unwrap();
        let loaded = engine.load();
        left_out.extend(loaded.left_out.iter().cloned());
        for (sequence, found) in messages(&loaded) {
            assert_eq!(found, payload(sequence), "{}", file.display());
        }
        // It serves on.
        engine
            .commit(&[Change::Enqueue(key(1000), batch(1000))])
            .unwrap();
    }
    assert!(damaged >= 4, "{damaged} files");
}

#[test]
fn a_store_with_a_flipped_bit_opens_and_believes_nothing_false() {
    survives(|bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    });
}

#[test]
fn a_store_with_a_file_cut_short_opens_and_believes_nothing_false() {
    survives(|bytes| bytes.truncate(bytes.len() / 2));
}
