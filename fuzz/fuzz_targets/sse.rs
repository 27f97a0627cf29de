//! The events of a model server's stream: the same ones however they are chunked.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_proto::sse::Events;

/// Small, so that inputs reach it.
const LARGEST: usize = 1024;

fn read(stream: &[u8], piece: usize) -> Vec<bytes::Bytes> {
    let mut events = Events::new(LARGEST);
    let mut found = Vec::new();
    for piece in stream.chunks(piece) {
        events.push(piece);
        loop {
            match events.next_event() {
                Ok(Some(event)) => found.push(event),
                Ok(None) => break,
                Err(_) => return found,
            }
        }
    }
    found
}

fuzz_target!(|data: &[u8]| {
    let Some((&piece, stream)) = data.split_first() else {
        return;
    };
    let stream = &stream[..stream.len().min(LARGEST)];
    assert_eq!(
        read(stream, usize::from(piece).max(1)),
        read(stream, usize::MAX)
    );
});
