//! What is written, as the codec of the other side reads it, and how it reaches the socket.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rmqtt_codec::v5;
use tokio_util::codec::Decoder as _;

use super::*;

fn outgoing<'a>(payload: &'a Bytes, ids: &'a [u32]) -> Outgoing<'a> {
    Outgoing {
        alias: Alias::None,
        topic: "a/b",
        packet_id: 9,
        qos: Qos::AtLeastOnce,
        duplicate: true,
        retain: false,
        header: None,
        expiry: Some(Duration::from_millis(1500)),
        subscription_ids: ids,
        payload,
    }
}

fn bytes(mut output: Output) -> BytesMut {
    let mut all = BytesMut::new();
    all.put(&mut output);
    all
}

#[test]
fn a_message_that_is_too_large_leaves_nothing_behind() {
    let payload = Bytes::from_static(b"payload");
    let mut output = Output::default();
    let size = {
        let mut output = Output::default();
        output
            .publish(Version::V5, &outgoing(&payload, &[]), usize::MAX)
            .unwrap();
        output.remaining()
    };
    let message = outgoing(&payload, &[]);
    assert_eq!(
        output.publish(Version::V5, &message, size - 1),
        Err(TooLarge)
    );
    assert!(!output.has_remaining());
    assert_eq!(output.publish(Version::V5, &message, size), Ok(()));
    assert_eq!(output.remaining(), size);
}

#[test]
fn a_reason_is_cut_or_left_out_but_the_code_arrives() {
    let long = "ü".repeat(40_000);
    for (limit, expected) in [(usize::MAX, Some(MAX_REASON_STRING)), (20, None)] {
        let mut output = Output::default();
        output.refusal(
            Answer::Publish,
            3,
            Reason::NOT_AUTHORIZED,
            Some(&long),
            limit,
        );
        let (packet, _) = v5::Codec::default()
            .decode(&mut bytes(output))
            .unwrap()
            .unwrap();
        let v5::Packet::PublishAck(ack) = packet else {
            panic!("expected PUBACK");
        };
        assert_eq!(ack.reason_code, v5::PublishAckReason::NotAuthorized);
        assert_eq!(ack.reason_string.map(|text| text.len()), expected);
    }
}

proptest! {
    #[test]
    fn messages_are_read_as_they_were_meant_whatever_the_socket_takes(
        sizes in prop::collection::vec(prop_oneof![0..100usize, 4000..20_000usize], 1..8),
        ids in prop::collection::vec(1..268_435_455u32, 0..3),
        step in 1..5000usize,
    ) {
        let mut output = Output::default();
        let payloads: Vec<Bytes> = sizes.iter().map(|size| vec![7; *size].into()).collect();
        for payload in &payloads {
            output.publish(Version::V5, &outgoing(payload, &ids), usize::MAX).unwrap();
            output.puback(1);
        }
        let mut wire = BytesMut::new();
        while output.has_remaining() {
            let before = output.remaining();
            let mut slices = [IoSlice::new(&[]); 4];
            let filled = output.chunks_vectored(&mut slices);
            prop_assert!(filled > 0);
            let available: usize = slices.iter().map(|slice| slice.len()).sum();
            let mut take = available.min(step);
            let taken = take;
            for slice in &slices {
                let part = slice.len().min(take);
                wire.extend_from_slice(&slice[..part]);
                take -= part;
            }
            output.advance(taken);
            prop_assert_eq!(output.remaining(), before - taken);
        }
        let mut codec = v5::Codec::default();
        for payload in payloads {
            let (packet, _) = codec.decode(&mut wire).unwrap().unwrap();
            let v5::Packet::Publish(publish) = packet else {
                panic!("expected PUBLISH");
            };
            prop_assert_eq!(&publish.payload, &payload);
            prop_assert_eq!(&*publish.topic, "a/b");
            prop_assert_eq!((publish.dup, publish.packet_id.unwrap().get()), (true, 9));
            let properties = publish.properties.unwrap();
            prop_assert_eq!(properties.message_expiry_interval.unwrap().get(), 2);
            let read: Vec<u32> = properties.subscription_ids.iter().map(|id| id.get()).collect();
            prop_assert_eq!(&read, &ids);
            let (ack, _) = codec.decode(&mut wire).unwrap().unwrap();
            prop_assert!(matches!(ack, v5::Packet::PublishAck(_)));
        }
        prop_assert!(wire.is_empty());
    }
}
