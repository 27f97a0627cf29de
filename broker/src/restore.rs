//! Puts what the store kept back in place, before any port is served.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use selvedge_certs::Identity;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::message::Qos;
use selvedge_proto::topic::{SubscribeTarget, TopicName};

use crate::batch::{Batch, Flow};
use crate::fabric::Fabric;
use crate::queue::Overflow;
use crate::session::{Session, SessionKey, SessionOptions, Will};
use crate::store::{
    Change, HistoryKey, Loaded, Store, StoredMessages, StoredSession, StoredSubscription,
    StoredWill,
};
use crate::tenant::{RetainDelivery, SubscribeRequest, Tenant};

/// Flows of restored messages, by tenant, topic and publisher.
type Flows = HashMap<(Arc<str>, String, String), Arc<Flow>>;

/// Restores sessions, subscriptions, queues and retained messages. What cannot be restored is
/// named in the log and left out.
pub(crate) fn restore(fabric: &Arc<Fabric>, loaded: Loaded) {
    let Some(store) = fabric.store.clone() else {
        return;
    };
    let mut left_out = loaded.left_out;
    let mut flows = Flows::new();
    let mut sessions: HashMap<u64, (Arc<Tenant>, Arc<Session>)> = HashMap::new();
    let counts = (
        loaded.sessions.len(),
        loaded.queues.len(),
        loaded.retained.len(),
    );

    for (stored, subscriptions) in loaded.sessions {
        fabric.skip_session_ids(stored.id);
        match restore_session(fabric, &store, &stored) {
            Ok((tenant, session)) => {
                let policy = fabric.policy_for(&session.key.identity);
                for subscription in subscriptions {
                    let target = subscription.target.clone();
                    let restored = request_of(&subscription).and_then(|request| {
                        tenant
                            .restore_subscription(&session, &policy, request)
                            .map_err(|status| status.to_string())
                    });
                    if let Err(why) = restored {
                        left_out.push(format!(
                            "subscription {target} of {}: {why}",
                            session.key.identity
                        ));
                    }
                }
                sessions.insert(stored.id, (tenant, session));
            }
            Err(why) => {
                left_out.push(format!(
                    "session {:?} of {}: {why}",
                    stored.name, stored.identity
                ));
                store.put(Change::RemoveSession(stored.id));
            }
        }
    }
    for (key, stored) in loaded.queues {
        fabric.skip_session_ids(key.session);
        let place = sessions.get(&key.session).and_then(|(tenant, session)| {
            Some((tenant, session.queue(key.subscription, key.class)?))
        });
        let Some((tenant, queue)) = place else {
            // Its session or subscription had ended when the broker stopped.
            store.put(Change::Dequeue(key));
            continue;
        };
        match batch_of(tenant, &mut flows, stored) {
            Ok(Some(batch)) => queue.restore(Arc::new(batch), key.sequence),
            Ok(None) => {
                fabric.metrics.dropped_expired.inc();
                store.put(Change::Dequeue(key));
            }
            Err(why) => {
                left_out.push(format!("a queued batch: {why}"));
                store.put(Change::Dequeue(key));
            }
        }
    }
    for (id, packet) in loaded.packets {
        match sessions.get(&id) {
            Some((_, session)) => session.restore_packet(packet),
            None => store.put(Change::RemovePacket(id, packet.key())),
        }
    }
    for (name, stored) in loaded.retained {
        let publisher = stored.publisher.parse::<Identity>();
        let topic: Arc<str> = stored.topic.as_str().into();
        let restored = publisher
            .map_err(|error| error.to_string())
            .and_then(|publisher| {
                let tenant = fabric.tenant(&publisher);
                if *tenant.name != *name {
                    return Err("it is not its publisher's tenant's".to_owned());
                }
                Ok(batch_of(&tenant, &mut flows, stored)?.map(|batch| (tenant, batch)))
            });
        match restored {
            Ok(Some((tenant, batch))) => match tenant.retained.set(Arc::new(batch)) {
                Ok(grown) => {
                    fabric.metrics.retained.inc_by(grown);
                }
                Err(full) => left_out.push(format!("retained message of {topic}: {full}")),
            },
            Ok(None) => store.put(Change::RemoveRetained(name.as_str().into(), topic)),
            Err(why) => left_out.push(format!("retained message of {topic}: {why}")),
        }
    }

    // What members of share groups had is for whoever comes back first.
    for (_, session) in sessions.values() {
        session.reclaim();
    }
    restore_history(fabric, &store, &mut flows, loaded.history, &mut left_out);

    let (now, clock) = (crate::clock::now(), SystemTime::now());
    let mut message_ids = loaded.message_ids;
    // The store has them in the order of their names. The window is in that of time, and putting hundreds
    // of thousands into the middle of it would take minutes.
    message_ids.sort_by_key(|stored| stored.until);
    for stored in message_ids {
        match stored.publisher.parse::<Identity>() {
            Ok(publisher) => {
                let left = stored.until.duration_since(clock).unwrap_or_default();
                let tenant = fabric.tenant(&publisher);
                tenant.dedup.restore(&publisher, &stored.id, left, now);
            }
            Err(error) => left_out.push(format!("a message id: {error}")),
        }
    }

    for stored in loaded.wills {
        let of = stored.session;
        let what = format!("the will of {:?} of {}", stored.name, stored.identity);
        let place = sessions.get(&stored.session);
        if let Err(why) = restore_will(fabric, &store, place, stored) {
            left_out.push(format!("{what}: {why}"));
            store.put(Change::RemoveWill(of));
        }
    }

    let (kept, batches, retained) = counts;
    tracing::info!(
        sessions = kept,
        batches,
        retained,
        left_out = left_out.len(),
        "the store was read"
    );
    for what in left_out {
        fabric.metrics.store_left_out.inc();
        tracing::error!(%what, "left out of the store");
    }
}

/// Puts the history of topics back, oldest first. What has expired, or belongs to a topic that keeps no
/// history any more, is taken out of the store.
fn restore_history(
    fabric: &Fabric,
    store: &Store,
    flows: &mut Flows,
    history: Vec<(HistoryKey, SystemTime, StoredMessages)>,
    left_out: &mut Vec<String>,
) {
    // The clock may have been set back between two messages of a topic; their order stays.
    let mut latest = SystemTime::UNIX_EPOCH;
    let mut topic: Option<(Arc<str>, Arc<str>)> = None;
    let mut by_age: Vec<_> = history
        .into_iter()
        .map(|(key, published, stored)| {
            let of = (Arc::clone(&key.tenant), Arc::clone(&key.topic));
            if topic.as_ref() != Some(&of) {
                (topic, latest) = (Some(of), SystemTime::UNIX_EPOCH);
            }
            latest = latest.max(published);
            (latest, key, published, stored)
        })
        .collect();
    by_age.sort_by_key(|(latest, ..)| *latest);
    for (_, key, published, stored) in by_age {
        let restored = stored
            .publisher
            .parse::<Identity>()
            .map_err(|error| error.to_string())
            .and_then(|publisher| {
                let tenant = fabric.tenant(&publisher);
                if *tenant.name != *key.tenant || *stored.topic != *key.topic {
                    return Err("it is not its publisher's tenant's".to_owned());
                }
                Ok(batch_of(&tenant, flows, stored)?.map(|batch| (tenant, batch)))
            });
        let placed = restored.map(|found| {
            found.is_some_and(|(tenant, batch)| {
                tenant.history.restore(batch, key.sequence, published)
            })
        });
        match placed {
            Ok(true) => {}
            Ok(false) => store.put(Change::RemoveHistory(key)),
            Err(why) => left_out.push(format!("history of {}: {why}", key.topic)),
        }
    }
}

/// Publishes the will of a session that was connected when the broker stopped, or whose delay was
/// running: after what is left of the delay, unless its client comes back.
fn restore_will(
    fabric: &Arc<Fabric>,
    store: &Store,
    place: Option<&(Arc<Tenant>, Arc<Session>)>,
    stored: StoredWill,
) -> Result<(), String> {
    fabric.skip_session_ids(stored.session);
    let topic = TopicName::parse(stored.topic.as_str()).map_err(|error| error.to_string())?;
    let delay = Duration::from_millis(stored.delay_ms);
    let gone = stored
        .lost_ms
        .and_then(|ms| {
            let lost = crate::store::from_unix_ms(ms);
            SystemTime::now().duration_since(lost).ok()
        })
        .unwrap_or_default();
    let will = Will {
        topic,
        payload: stored.payload,
        qos: stored.qos,
        retain: stored.retain,
        delay,
        header: stored.header,
    };
    let (tenant, session, delay) = match place {
        Some((tenant, session)) => {
            session.restore_will();
            let left = delay.min(session.expiry()).saturating_sub(gone);
            (Arc::clone(tenant), Arc::clone(session), left)
        }
        // It was not to be kept, and has ended with the broker.
        None => {
            let identity: Identity = stored.identity.parse().map_err(|e| format!("{e}"))?;
            let tenant = fabric.tenant(&identity);
            let session = Session::new(SessionOptions {
                id: stored.session,
                queue_limit: fabric.limits.queue_bytes,
                losses: tenant.losses.clone(),
                usage: tenant.usages.of(&identity),
                store: Some(store.clone()),
                key: SessionKey {
                    identity,
                    name: stored.name.as_str().into(),
                },
            });
            (tenant, session, Duration::ZERO)
        }
    };
    tenant.publish_will_after(fabric, &session, session.epoch(), will, delay);
    Ok(())
}

fn restore_session(
    fabric: &Fabric,
    store: &Store,
    stored: &StoredSession,
) -> Result<(Arc<Tenant>, Arc<Session>), String> {
    let identity: Identity = stored
        .identity
        .parse()
        .map_err(|error| format!("{error}"))?;
    let (now, clock) = (crate::clock::now(), SystemTime::now());
    // One that was connected when the broker stopped has been without a connection since now.
    let detached_at = stored
        .detached_ms
        .and_then(|ms| clock.duration_since(crate::store::from_unix_ms(ms)).ok())
        .and_then(|ago| now.checked_sub(ago))
        .unwrap_or(now);
    let tenant = fabric.tenant(&identity);
    let key = SessionKey {
        identity,
        name: stored.name.as_str().into(),
    };
    let options = SessionOptions {
        id: stored.id,
        queue_limit: fabric.limits.queue_bytes,
        losses: tenant.losses.clone(),
        usage: tenant.usages.of(&key.identity),
        store: Some(store.clone()),
        key,
    };
    let session = Session::restore(stored, options, detached_at);
    tenant.restore_session(&session);
    Ok((tenant, session))
}

fn request_of(stored: &StoredSubscription) -> Result<SubscribeRequest, String> {
    Ok(SubscribeRequest {
        id: stored.id,
        target: SubscribeTarget::parse(&stored.target).map_err(|error| error.to_string())?,
        max_qos: Qos::try_from(stored.max_qos)
            .map_err(|qos| format!("quality of service {qos}"))?,
        no_local: stored.no_local,
        retain_as_published: stored.retain_as_published,
        identifier: stored.identifier,
        own_lane: stored.own_lane,
        overflow: Overflow::from_word(&stored.overflow),
        retain: RetainDelivery::Never,
        replay: None,
        datagrams: stored.datagrams,
    })
}

/// The batch again, under a flow of this process; `None` when it has expired.
fn batch_of(
    tenant: &Tenant,
    flows: &mut Flows,
    stored: StoredMessages,
) -> Result<Option<Batch>, String> {
    let (now, clock) = (crate::clock::now(), SystemTime::now());
    let expires = match stored.expires {
        None => None,
        Some(date) => match crate::store::instant_of(date, now, clock) {
            None => return Ok(None),
            some => some,
        },
    };
    let key = (Arc::clone(&tenant.name), stored.topic, stored.publisher);
    let flow = match flows.get(&key) {
        Some(flow) => Arc::clone(flow),
        None => {
            let topic = TopicName::parse(key.1.as_str()).map_err(|error| error.to_string())?;
            let publisher: Identity = key.2.parse().map_err(|error| format!("{error}"))?;
            // No session has the number 0, so nobody takes the message for its own.
            let flow = tenant.flow(topic, &publisher, 0);
            flows.insert(key, Arc::clone(&flow));
            flow
        }
    };
    let mut frames = BytesMut::new();
    for message in &stored.messages {
        lane::put_message(
            &mut frames,
            Flags::new(stored.qos).with_retain(stored.retain),
            flow.id,
            message.header.as_deref(),
            &message.payload,
        );
    }
    Ok(Some(Batch {
        flow,
        class: stored.class,
        qos: stored.qos,
        retain: stored.retain,
        retain_as_published: stored.retain_as_published,
        count: u32::try_from(stored.messages.len()).unwrap_or(u32::MAX),
        frames: frames.freeze(),
        payload: Bytes::new(),
        expires,
    }))
}
