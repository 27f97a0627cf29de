#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn messages_round_trip(
        alias in 0u32..=1 << 29,
        qos in 0u8..3,
        retain: bool,
        header in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..300)),
        payload in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let flags = Flags::new(Qos::try_from(qos).unwrap()).with_retain(retain);
        let mut buffer = BytesMut::new();
        put_message(&mut buffer, flags, alias, header.as_deref(), &payload);
        let header_bytes = header.as_ref().map_or(0, Vec::len);
        prop_assert!(buffer.len() <= MESSAGE_OVERHEAD + header_bytes + payload.len());
        let head = frame::peek(&buffer, frame::MAX_FRAME).unwrap().unwrap();
        prop_assert_eq!(head.total(), buffer.len());
        let body = buffer.freeze().slice(head.prefix..);
        let message = MessageFrame::parse(&body).unwrap();
        prop_assert_eq!(message.alias, alias);
        prop_assert_eq!(message.flags.qos().unwrap() as u8, qos);
        prop_assert_eq!(message.flags.retain(), retain);
        prop_assert_eq!(message.header.map(|header| header.to_vec()), header);
        prop_assert_eq!(&message.payload[..], &payload[..]);
    }

    #[test]
    fn hostile_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(message) = MessageRef::parse(&body) {
            prop_assert!(message.payload.len() < body.len());
            let _ = message.flags.qos();
            prop_assert_eq!(&body[message.payload_offset(&body)..], message.payload);
        }
    }
}

#[test]
fn durability_survives_the_flags() {
    for durability in [
        Durability::Default,
        Durability::Memory,
        Durability::Disk,
        Durability::Replicated,
    ] {
        let flags = Flags::new(Qos::AtLeastOnce)
            .with_durability(durability)
            .with_retain(true);
        assert_eq!(flags.durability(), durability);
        assert_eq!(flags.qos().unwrap(), Qos::AtLeastOnce);
    }
}

#[test]
fn a_body_cut_short_names_what_is_missing() {
    let missing = |body: &[u8]| MessageRef::parse(body).unwrap_err().to_string();
    assert_eq!(
        missing(&[]),
        "malformed message frame: ends before its flags"
    );
    assert_eq!(
        missing(&[0]),
        "malformed message frame: ends before its alias"
    );
    assert_eq!(
        missing(&[8, 1]),
        "malformed message frame: ends before its header length"
    );
    assert_eq!(
        missing(&[8, 1, 5, 1]),
        "malformed message frame: ends before its header"
    );
}
