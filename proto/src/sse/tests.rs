#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn read(stream: &[u8], piece: usize) -> Vec<Bytes> {
    let mut events = Events::new(1 << 20);
    let mut found = Vec::new();
    for piece in stream.chunks(piece) {
        events.push(piece);
        while let Some(event) = events.next_event().unwrap() {
            found.push(event);
        }
    }
    found
}

#[test]
fn data_is_read_whatever_else_there_is() {
    let stream = b": a comment\n\nevent: x\ndata: one\n\ndata:two\r\n\r\ndata: a\rdata: b\r\rdata\n\nid: 3\n\ndata: cut";
    for piece in [1, 2, 3, 100] {
        assert_eq!(read(stream, piece), ["one", "two", "a\nb", ""], "{piece}");
    }
}

#[test]
fn an_event_without_end_is_refused() {
    let mut events = Events::new(8);
    events.push(b"data: 12345678");
    assert_eq!(events.next_event(), Err(TooLong(8)));
    let mut events = Events::new(8);
    events.push(b"data: 1\ndata: 2\ndata: 3\n");
    assert_eq!(events.next_event(), Ok(None));
    events.push(b"data: 45678\n");
    assert_eq!(events.next_event(), Err(TooLong(8)));
}

proptest! {
    #[test]
    fn pieces_make_no_difference(stream in "(data|:|data: |[a-c]|\n|\r){0,60}", piece in 1usize..9) {
        prop_assert_eq!(read(stream.as_bytes(), piece), read(stream.as_bytes(), usize::MAX));
    }

    #[test]
    fn no_bytes_panic(stream in prop::collection::vec(any::<u8>(), 0..200), piece in 1usize..50) {
        let mut events = Events::new(16);
        for piece in stream.chunks(piece) {
            events.push(piece);
            while let Ok(Some(_)) = events.next_event() {}
        }
    }
}
