//! Readers on bytes from nowhere: an error or nothing, never a panic.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const CONNECTS: [&[u8]; 3] = [
    b"\x10\x0e\x00\x06MQIsdp\x03\x02\x00\x00\x00\x00",
    b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00",
    b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x00",
];

/// All packets of `bytes`, which arrive in pieces.
fn read(bytes: &[u8], piece: usize) -> (usize, Option<ProtocolError>) {
    let mut reader = Reader::new(1 << 20);
    let mut buffer = BytesMut::new();
    let mut packets = 0;
    for piece in bytes.chunks(piece) {
        buffer.extend_from_slice(piece);
        loop {
            match reader.next(&mut buffer) {
                Ok(Some(_)) => packets += 1,
                Ok(None) => break,
                Err(error) => return (packets, Some(error)),
            }
        }
    }
    (packets, None)
}

#[test]
fn each_version_is_recognised_however_it_arrives() {
    for (bytes, version) in CONNECTS
        .into_iter()
        .zip([Version::V3, Version::V3, Version::V5])
    {
        for piece in 1..bytes.len() {
            assert_eq!(read(bytes, piece), (1, None));
        }
        let mut reader = Reader::new(1024);
        assert_eq!(reader.version(), None);
        reader.next(&mut BytesMut::from(bytes)).unwrap();
        assert_eq!(reader.version(), Some(version));
    }
}

#[test]
fn a_connect_is_bounded_before_its_peer_is_known() {
    let mut reader = Reader::new(16 << 20);
    let mut buffer = BytesMut::from(&b"\x10\xff\xff\x7f\x00\x04MQTT\x05"[..]);
    let error = reader.next(&mut buffer).unwrap_err();
    assert_eq!(error.reason, Reason::PACKET_TOO_LARGE);
    assert!(buffer.capacity() < 1024);
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..256), piece in 1..64usize) {
        read(&bytes, piece);
    }

    #[test]
    fn hostile_packets_after_connect_never_panic(
        connect in prop::sample::select(&CONNECTS[..]),
        packets in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..100)), 1..8),
        piece in 1..64usize,
    ) {
        let mut bytes = connect.to_vec();
        for (kind, body) in packets {
            bytes.push(kind);
            bytes.push(body.len() as u8);
            bytes.extend(body);
        }
        let (read_packets, _) = read(&bytes, piece);
        prop_assert!(read_packets >= 1);
    }

    #[test]
    fn hostile_connects_never_panic(
        connect in prop::sample::select(&CONNECTS[..]),
        flags in any::<u8>(),
        rest in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut bytes = connect.to_vec();
        let position = bytes.len() - rest.len().min(3);
        bytes.truncate(position);
        bytes.push(flags);
        bytes.extend(rest);
        let length = bytes.len() - 2;
        bytes[1] = (length & 0x7f) as u8;
        read(&bytes, 16);
    }
}
