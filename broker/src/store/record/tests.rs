use std::sync::Arc;

use proptest::prelude::*;
use selvedge_certs::Identity;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::topic::TopicName;

use super::*;
use crate::batch::Flow;

fn batch(messages: &[(Option<Vec<u8>>, Vec<u8>)], qos: Qos, expires: Option<Instant>) -> Batch {
    let topic = TopicName::parse("plant/1").unwrap();
    let publisher = Identity::new("example.org", "acme", "s", "p").unwrap();
    let flow = Arc::new(Flow::new(7, topic, publisher, 1));
    let mut frames = BytesMut::new();
    for (header, payload) in messages {
        lane::put_message(&mut frames, Flags::new(qos), 7, header.as_deref(), payload);
    }
    Batch {
        flow,
        class: Class::Alarm,
        qos,
        retain: false,
        retain_as_published: true,
        count: messages.len() as u32,
        frames: frames.freeze(),
        payload: Bytes::new(),
        expires,
    }
}

proptest! {
    #[test]
    fn a_batch_comes_back_as_it_was(
        messages in proptest::collection::vec(
            (proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
             proptest::collection::vec(any::<u8>(), 0..200)),
            1..8),
    ) {
        let now = Instant::now();
        let clock = SystemTime::now();
        let expires = now + Duration::from_secs(5);
        let record = encode_batch(&batch(&messages, Qos::AtLeastOnce, Some(expires)), now, clock);
        let stored = decode_batch(&record).unwrap();
        let back: Vec<_> = stored.messages.iter()
            .map(|message| (message.header.as_ref().map(|h| h.to_vec()), message.payload.to_vec()))
            .collect();
        prop_assert_eq!(back, messages);
        prop_assert_eq!((stored.topic.as_str(), stored.class, stored.qos), ("plant/1", Class::Alarm, Qos::AtLeastOnce));
        prop_assert!(stored.retain_as_published && !stored.retain);
        let again = instant_of(stored.expires.unwrap(), now, clock).unwrap();
        prop_assert!(again.max(expires) - again.min(expires) <= Duration::from_millis(1));
    }

    #[test]
    fn damaged_records_are_refused_not_believed(
        cut in 0usize..100, flip in 0usize..100, value: u8,
    ) {
        let mut record = encode_batch(
            &batch(&[(None, vec![1; 20])], Qos::AtLeastOnce, None), Instant::now(), SystemTime::now());
        let length = record.len();
        prop_assert!(decode_batch(&record[..cut.min(length - 1)]).is_err());
        let flip = flip.min(length - 1);
        let was = std::mem::replace(&mut record[flip], value);
        prop_assert_eq!(decode_batch(&record).is_ok(), was == value);
    }

    #[test]
    fn hostile_records_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode_batch(&bytes);
        let _ = decode_json::<StoredSession>(&bytes);
        let _ = QueueKey::from_bytes(&bytes);
    }

    #[test]
    fn keys_sort_as_queues_do(a in (0u64..3, 0u32..3, 0usize..3, any::<u64>()), b in (0u64..3, 0u32..3, 0usize..3, any::<u64>())) {
        let key = |(session, subscription, class, sequence): (u64, u32, usize, u64)| QueueKey {
            session, subscription, class: Class::ALL[class], sequence,
        };
        let tuple = |k: (u64, u32, usize, u64)| k;
        prop_assert_eq!(key(a).to_bytes().cmp(&key(b).to_bytes()), tuple(a).cmp(&tuple(b)));
        prop_assert_eq!(QueueKey::from_bytes(&key(a).to_bytes()), Some(key(a)));
    }
}

#[test]
fn a_later_version_is_named() {
    assert_eq!(decode_batch(&[9]), Err(RecordError::Version { found: 9 }));
    assert_eq!(
        RecordError::Version { found: 9 }.to_string(),
        "record version 9: expected 1"
    );
}
