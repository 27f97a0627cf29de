//! Frames cut from a stream: the same ones however it is chunked, and none over the limit.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use selvedge_proto::frame::{Frame, FrameDecoder, FrameError};

const LIMIT: usize = 4096;

fuzz_target!(|data: &[u8]| {
    let Some((&chunk, stream)) = data.split_first() else {
        return;
    };
    let whole = cut(stream, usize::MAX);
    let pieces = cut(stream, usize::from(chunk) + 1);
    assert_eq!(whole, pieces);
    for frame in whole.0 {
        assert!(frame.body.len() < LIMIT);
    }
});

fn cut(stream: &[u8], chunk: usize) -> (Vec<Frame>, Result<(), FrameError>) {
    let mut decoder = FrameDecoder::new(LIMIT);
    let mut frames = Vec::new();
    for piece in stream.chunks(chunk) {
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
    }
    (frames, decoder.finish())
}
