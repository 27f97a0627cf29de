use bytes::Bytes;
use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn boundaries_and_status_are_found_in_any_chunking(
        payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..6),
        cuts in proptest::collection::vec(1usize..200, 1..50),
    ) {
        let mut wire_bytes = BytesMut::new();
        for payload in &payloads {
            frame::put_head(&mut wire_bytes, Kind::DATA, payload.len());
            wire_bytes.extend_from_slice(payload);
        }
        let status = Status::new(Code::NotFound, "gone");
        frame::append(&mut wire_bytes, Kind::STATUS, &wire::Status::from(status.clone()));
        let mut rest: Bytes = wire_bytes.freeze();
        let mut tracker = ResponseTracker::new(10_000);
        let mut cuts = cuts.into_iter().cycle();
        while !rest.is_empty() {
            prop_assert_eq!(tracker.ended(), None);
            let cut = cuts.next().unwrap_or(1).min(rest.len());
            tracker.feed(&rest.split_to(cut)).unwrap();
        }
        prop_assert!(tracker.is_at_boundary());
        prop_assert_eq!(tracker.ended(), Some(&status));
    }

    #[test]
    fn hostile_responses_never_panic(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..20)) {
        let mut tracker = ResponseTracker::new(1000);
        for chunk in chunks {
            if tracker.feed(&chunk).is_err() {
                break;
            }
        }
    }
}

#[test]
fn a_cut_inside_a_frame_is_no_boundary() {
    let mut tracker = ResponseTracker::new(1000);
    assert!(tracker.is_at_boundary());
    tracker.feed(&[3]).unwrap();
    assert!(!tracker.is_at_boundary());
    tracker.feed(&[Kind::DATA.0, 1]).unwrap();
    assert!(!tracker.is_at_boundary());
    tracker.feed(&[2]).unwrap();
    assert!(tracker.is_at_boundary());
}
