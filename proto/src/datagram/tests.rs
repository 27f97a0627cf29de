#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn datagrams_round_trip(
        retain: bool,
        subscription: u32,
        topic in "\\PC{0,80}",
        publisher in "\\PC{0,80}",
        header in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..80)),
        payload in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let datagram = DatagramRef {
            flags: Flags::new(Qos::AtMostOnce).with_retain(retain),
            subscription,
            topic: &topic,
            publisher: &publisher,
            header: header.as_deref(),
            payload: &payload,
        };
        let bytes = datagram.encode();
        prop_assert_eq!(bytes.len(), datagram.encoded_len());
        let read = DatagramRef::parse(&bytes).unwrap().unwrap();
        prop_assert_eq!(read.flags.retain(), retain);
        // The flag for a header is the only difference that writing makes.
        prop_assert_eq!(DatagramRef { flags: datagram.flags, ..read }, datagram);
    }

    #[test]
    fn hostile_datagrams_never_panic_and_those_that_parse_are_read_alike_again(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..80),
        known: bool,
    ) {
        if known && let Some(kind) = bytes.first_mut() {
            *kind = Kind::MESSAGE.0;
        }
        if let Ok(Some(datagram)) = DatagramRef::parse(&bytes) {
            let again = datagram.encode();
            prop_assert_eq!(DatagramRef::parse(&again).unwrap(), Some(datagram));
        }
    }
}

fn honest() -> Bytes {
    DatagramRef {
        flags: Flags::default(),
        subscription: 7,
        topic: "a/b",
        publisher: "p",
        header: Some(b"h"),
        payload: b"",
    }
    .encode()
}

#[test]
fn a_datagram_cut_short_names_what_is_missing() {
    let whole = honest();
    let reasons: Vec<String> = (0..whole.len())
        .map(|length| {
            let error = DatagramRef::parse(&whole[..length]).unwrap_err();
            let text = error.to_string();
            let reason = text.strip_prefix("malformed datagram frame: ends before its ");
            reason.unwrap().to_owned()
        })
        .collect();
    let mut missing = vec!["kind", "flags"];
    missing.extend(["subscription"; 4]);
    missing.push("topic length");
    missing.extend(["topic"; 3]);
    missing.extend(["publisher length", "publisher", "header length", "header"]);
    assert_eq!(reasons, missing);
}

#[test]
fn a_datagram_of_another_kind_is_none_of_ours() {
    assert_eq!(DatagramRef::parse(&[200, 1, 2, 3]), Ok(None));
}

#[test]
fn a_datagram_has_quality_of_service_0_and_text_for_its_topic() {
    let reason = |at: usize, byte: u8| {
        let mut bytes = honest().to_vec();
        bytes[at] = byte;
        DatagramRef::parse(&bytes).unwrap_err().to_string()
    };
    assert_eq!(
        reason(1, 1),
        "malformed datagram frame: quality of service 1: expected 0"
    );
    assert_eq!(
        reason(7, 0xff),
        "malformed datagram frame: its topic is not UTF-8"
    );
    assert_eq!(
        reason(1, 3),
        "malformed message frame: quality of service 3: expected 0, 1 or 2"
    );
}
