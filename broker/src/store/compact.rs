//! Taking out of a list of changes those that later ones undo.

use std::collections::HashSet;

use bytes::Bytes;

use super::{Change, HistoryKey, PacketKey, QueueKey};

/// What a change is about. Of two changes with the same subject only the later one counts.
#[derive(PartialEq, Eq, Hash)]
enum Subject {
    Session(u64),
    Subscription(u64, u32),
    Batch(QueueKey),
    Retained(std::sync::Arc<str>, std::sync::Arc<str>),
    MessageId(std::sync::Arc<str>, std::sync::Arc<str>, Bytes),
    History(HistoryKey),
    Packet(u64, PacketKey),
    Will(u64),
}

/// Takes out what later changes undo. The outcome is the same, for changes none of which has been
/// given to an engine yet: a batch that came and went is never written at all.
pub(super) fn compact(changes: Vec<Change>) -> Vec<Change> {
    let undoes = |change: &Change| {
        matches!(
            change,
            Change::Dequeue(_)
                | Change::RemoveSession(_)
                | Change::RemoveSubscription(..)
                | Change::RemoveHistory(_)
                | Change::RemovePacket(..)
                | Change::RemoveWill(_)
        )
    };
    if !changes.iter().any(undoes) {
        return changes;
    }
    let mut later = HashSet::new();
    let mut ended_sessions = HashSet::new();
    let mut ended: HashSet<(u64, u32)> = HashSet::new();
    // Batches whose keys are used once: with their beginning, the end goes, too.
    let mut came = HashSet::new();
    let mut kept: Vec<Change> = Vec::with_capacity(changes.len());
    for change in changes.into_iter().rev() {
        let (subject, session) = match &change {
            Change::PutSession(session) => (Subject::Session(session.id), session.id),
            Change::RemoveSession(id) => (Subject::Session(*id), 0),
            Change::PutSubscription(session, subscription) => {
                (Subject::Subscription(*session, subscription.id), *session)
            }
            Change::RemoveSubscription(session, id) => {
                (Subject::Subscription(*session, *id), *session)
            }
            Change::Enqueue(key, _) | Change::Dequeue(key) => (Subject::Batch(*key), key.session),
            Change::PutRetained(tenant, batch) => {
                let topic = batch.flow.topic.as_str().into();
                (Subject::Retained(tenant.clone(), topic), 0)
            }
            Change::RemoveRetained(tenant, topic) => {
                (Subject::Retained(tenant.clone(), topic.clone()), 0)
            }
            Change::PutMessageId {
                tenant,
                publisher,
                id,
                ..
            }
            | Change::RemoveMessageId {
                tenant,
                publisher,
                id,
            } => {
                let subject = Subject::MessageId(tenant.clone(), publisher.clone(), id.clone());
                (subject, 0)
            }
            Change::PutHistory(key, ..) | Change::RemoveHistory(key) => {
                (Subject::History(key.clone()), 0)
            }
            Change::PutPacket(session, packet) => {
                (Subject::Packet(*session, packet.key()), *session)
            }
            Change::RemovePacket(session, key) => (Subject::Packet(*session, *key), *session),
            Change::PutWill(will) => (Subject::Will(will.session), 0),
            Change::RemoveWill(session) => (Subject::Will(*session), 0),
        };
        let queue_ended = match &change {
            // Zero stands for the session's shared queues, which no subscription owns.
            Change::Enqueue(key, _) | Change::Dequeue(key) => {
                key.subscription != 0 && ended.contains(&(key.session, key.subscription))
            }
            _ => false,
        };
        if queue_ended || ended_sessions.contains(&session) {
            continue;
        }
        if let Change::RemoveSession(id) = &change {
            ended_sessions.insert(*id);
        }
        // A subscription that ends and begins again still loses its queue on disk.
        let ends_first = matches!(&change, Change::RemoveSubscription(session, id)
            if ended.insert((*session, *id)));
        if later.contains(&subject) && !ends_first {
            if matches!(change, Change::Enqueue(..) | Change::PutHistory(..)) {
                came.insert(subject);
            }
            continue;
        }
        later.insert(subject);
        kept.push(change);
    }
    kept.retain(|change| match change {
        Change::Dequeue(key) => !came.contains(&Subject::Batch(*key)),
        Change::RemoveHistory(key) => !came.contains(&Subject::History(key.clone())),
        _ => true,
    });
    kept.reverse();
    kept
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::tests::{batch, session};
    use super::*;
    use crate::store::StoredSubscription;
    use selvedge_proto::message::Class;

    fn subscription(id: u32) -> StoredSubscription {
        StoredSubscription {
            id,
            target: String::new(),
            max_qos: 1,
            no_local: false,
            retain_as_published: false,
            identifier: None,
            own_lane: false,
            overflow: String::new(),
            owed: false,
            datagrams: false,
        }
    }

    /// What an engine would hold: sessions, subscriptions and queues by key.
    #[derive(Debug, Default, Clone, PartialEq)]
    struct Held {
        sessions: BTreeMap<u64, ()>,
        subscriptions: BTreeMap<(u64, u32), ()>,
        batches: BTreeMap<(u64, u32, u64), ()>,
    }

    impl Held {
        fn apply(&mut self, changes: &[Change]) {
            for change in changes {
                match change {
                    Change::PutSession(session) => {
                        self.sessions.insert(session.id, ());
                    }
                    Change::RemoveSession(id) => {
                        self.sessions.remove(id);
                        self.subscriptions.retain(|key, ()| key.0 != *id);
                        self.batches.retain(|key, ()| key.0 != *id);
                    }
                    Change::PutSubscription(session, subscription) => {
                        self.subscriptions.insert((*session, subscription.id), ());
                    }
                    Change::RemoveSubscription(session, id) => {
                        self.subscriptions.remove(&(*session, *id));
                        self.batches
                            .retain(|key, ()| *id == 0 || (key.0, key.1) != (*session, *id));
                    }
                    Change::Enqueue(key, _) => {
                        let key = (key.session, key.subscription, key.sequence);
                        self.batches.insert(key, ());
                    }
                    Change::Dequeue(key) => {
                        let key = (key.session, key.subscription, key.sequence);
                        self.batches.remove(&key);
                    }
                    other => unreachable!("{other:?}"),
                }
            }
        }
    }

    /// A history as a broker makes it: no session comes back, no key is used twice in a queue.
    fn history() -> impl Strategy<Value = Vec<Change>> {
        proptest::collection::vec((0u8..6, 1u64..4, 0u32..3, any::<u8>()), 0..60).prop_map(
            |steps| {
                let (mut ended, mut next) = (HashSet::new(), 0);
                let mut waiting: Vec<QueueKey> = Vec::new();
                let mut changes = Vec::new();
                for (kind, id, number, pick) in steps {
                    if ended.contains(&id) {
                        continue;
                    }
                    changes.push(match kind {
                        0 => Change::PutSession(session(id)),
                        1 if pick < 60 => {
                            ended.insert(id);
                            waiting.retain(|key| key.session != id);
                            Change::RemoveSession(id)
                        }
                        1 | 2 => Change::PutSubscription(id, subscription(number)),
                        3 => Change::RemoveSubscription(id, number),
                        5 if !waiting.is_empty() => {
                            Change::Dequeue(waiting.swap_remove(usize::from(pick) % waiting.len()))
                        }
                        _ => {
                            next += 1;
                            let key = QueueKey {
                                session: id,
                                subscription: number,
                                class: Class::Normal,
                                sequence: next,
                            };
                            waiting.push(key);
                            Change::Enqueue(key, batch(1))
                        }
                    });
                }
                changes
            },
        )
    }

    proptest! {
        #[test]
        fn the_outcome_is_the_same_wherever_the_first_part_is_on_disk(
            changes in history(), at in any::<prop::sample::Index>(),
        ) {
            let (on_disk, waiting) = changes.split_at(at.index(changes.len() + 1));
            let mut want = Held::default();
            want.apply(&changes);
            let mut held = Held::default();
            held.apply(on_disk);
            let compacted = compact(waiting.to_vec());
            prop_assert!(compacted.len() <= waiting.len());
            held.apply(&compacted);
            prop_assert_eq!(held, want);
        }
    }

    #[test]
    fn what_came_and_went_is_not_written_at_all() {
        let key = |sequence| QueueKey {
            session: 1,
            subscription: 0,
            class: Class::Normal,
            sequence,
        };
        let changes = vec![
            Change::Dequeue(key(1)),
            Change::Enqueue(key(2), batch(1)),
            Change::Enqueue(key(3), batch(1)),
            Change::Dequeue(key(2)),
        ];
        let left = compact(changes);
        assert!(
            matches!(&left[..], [Change::Dequeue(a), Change::Enqueue(b, _)]
                if a.sequence == 1 && b.sequence == 3),
            "{left:?}"
        );
    }
}
