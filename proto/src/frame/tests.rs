#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

fn drain(decoder: &mut FrameDecoder) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    Ok(frames)
}

fn kinds() -> impl Strategy<Value = Kind> {
    any::<u8>().prop_map(Kind)
}

proptest! {
    #[test]
    fn frames_survive_any_chunking(
        frames in proptest::collection::vec((kinds(), proptest::collection::vec(any::<u8>(), 0..300)), 0..20),
        cuts in proptest::collection::vec(1usize..400, 0..200),
    ) {
        let mut wire = BytesMut::new();
        for (kind, body) in &frames {
            put_head(&mut wire, *kind, body.len());
            wire.extend_from_slice(body);
        }
        let mut wire = wire.freeze();
        let mut decoder = FrameDecoder::new(DEFAULT);
        let mut got = Vec::new();
        let mut cuts = cuts.into_iter().cycle();
        while !wire.is_empty() {
            let cut = cuts.next().unwrap_or(7).min(wire.len());
            decoder.push(wire.split_to(cut));
            got.extend(drain(&mut decoder).unwrap());
        }
        decoder.finish().unwrap();
        let want: Vec<Frame> = frames.into_iter().map(|(kind, body)| Frame { kind, body: body.into() }).collect();
        prop_assert_eq!(got, want);
    }

    #[test]
    fn hostile_bytes_never_panic_and_never_exceed_the_limit(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..10),
        limit in 1usize..100_000,
    ) {
        let mut decoder = FrameDecoder::new(limit);
        for chunk in chunks {
            decoder.push(chunk.into());
            match drain(&mut decoder) {
                Ok(frames) => for frame in frames {
                    let limit = if frame.kind.is_payload() { limit } else { crate::MAX_HEADER_FRAME };
                    prop_assert!(frame.body.len() < limit);
                },
                Err(_) => return Ok(()),
            }
        }
        let _ = decoder.finish();
    }

    #[test]
    fn integers_round_trip(value in 0usize..=MAX_FRAME) {
        let mut buffer = BytesMut::new();
        put_varint(&mut buffer, value);
        prop_assert_eq!(buffer.len(), varint_len(value));
        prop_assert_eq!(varint(&buffer), Some((value, buffer.len())));
    }
}

const DEFAULT: usize = crate::DEFAULT_MAX_FRAME;

#[test]
fn an_oversize_frame_is_refused_by_its_head_alone() {
    let mut buffer = BytesMut::new();
    put_head(&mut buffer, Kind::MESSAGE, 1000);
    let mut decoder = FrameDecoder::new(1000);
    decoder.push(buffer.freeze());
    assert_eq!(
        decoder.next_frame(),
        Err(FrameError::TooLarge {
            found: 1001,
            limit: 1000,
            kind: Kind::MESSAGE.0
        })
    );
}

#[test]
fn header_frames_have_their_own_limit() {
    let head = head(Kind::CONTROL, crate::MAX_HEADER_FRAME);
    assert_eq!(
        peek(&head, DEFAULT),
        Err(FrameError::TooLarge {
            found: crate::MAX_HEADER_FRAME + 1,
            limit: crate::MAX_HEADER_FRAME,
            kind: Kind::CONTROL.0
        })
    );
}

#[test]
fn malformed_lengths_are_named() {
    assert_eq!(peek(&[0, 0], DEFAULT), Err(FrameError::Empty));
    assert_eq!(peek(&[0xc0], DEFAULT), Err(FrameError::LongLength));
    let mut decoder = FrameDecoder::new(DEFAULT);
    decoder.push(Bytes::from_static(&[10, 1, 2]));
    assert_eq!(decoder.next_frame(), Ok(None));
    assert_eq!(decoder.finish(), Err(FrameError::Truncated { missing: 8 }));
}
