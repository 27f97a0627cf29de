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
    fn a_run_under_another_alias_is_what_would_have_been_written(
        aliases in proptest::collection::vec(1u32..4, 1..12),
        wide: bool,
        to in 1u32..1 << 30,
        sizes in proptest::collection::vec(0usize..200, 12),
        large in 50usize..400,
        cut in 0usize..40,
    ) {
        let plain = Flags::new(Qos::AtMostOnce);
        let base = if wide { 1 << 20 } else { 0 };
        let mut buffer = BytesMut::new();
        let mut expected = BytesMut::new();
        let mut ends = Vec::new();
        for (&alias, &size) in aliases.iter().zip(&sizes) {
            put_message(&mut buffer, plain, base + alias, None, &vec![7; size]);
            put_message(&mut expected, plain, to, None, &vec![7; size]);
            ends.push((buffer.len(), expected.len()));
        }
        let kept = buffer.len().saturating_sub(cut);
        let width = if wide { 4 } else { 2 };
        let alike = (0..ends.len())
            .take_while(|&i| {
                aliases[i] == aliases[0] && ends[i].0 <= kept && 1 + width + sizes[i] < large
            })
            .count();
        let before = buffer.clone();
        let run = realias(&mut buffer[..kept], to, frame::MAX_FRAME, large);
        if alike == 0 || (!wide && to > TWO_BYTES) {
            prop_assert_eq!(run, None);
            prop_assert_eq!(buffer, before);
            return Ok(());
        }
        let run = run.unwrap();
        prop_assert_eq!((run.count as usize, run.bytes), (alike, ends[alike - 1].0));
        prop_assert_eq!(&buffer[run.bytes..], &before[run.bytes..]);
        if wide == (to > TWO_BYTES) {
            prop_assert_eq!(&buffer[..run.bytes], &expected[..ends[alike - 1].1]);
        }
        let mut rest = &buffer[..run.bytes];
        for size in &sizes[..alike] {
            let head = frame::peek(rest, frame::MAX_FRAME).unwrap().unwrap();
            let message = MessageRef::parse(&rest[head.prefix..head.total()]).unwrap();
            prop_assert_eq!((message.flags, message.alias), (plain, to));
            prop_assert_eq!(message.payload, &vec![7; *size][..]);
            rest = &rest[head.total()..];
        }
    }

    #[test]
    fn hostile_runs_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..64),
        alias in 1u32..1 << 30,
    ) {
        let before = bytes.clone();
        match realias(&mut bytes, alias, 1024, 48) {
            None => prop_assert_eq!(bytes, before),
            Some(run) => prop_assert!(run.bytes <= before.len() && run.count > 0),
        }
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
