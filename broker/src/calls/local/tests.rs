#![allow(clippy::unwrap_used)]

use selvedge_proto::frame::{self, Kind};

use super::*;

const LIMIT: usize = 1 << 16;

fn data(payload: &'static [u8]) -> [Bytes; 2] {
    [
        frame::head(Kind::DATA, payload.len()),
        Bytes::from_static(payload),
    ]
}

#[tokio::test]
async fn frames_come_out_as_they_went_in_and_the_end_is_told() {
    let (mut leg, mut response) = pair(VecDeque::new(), LIMIT);
    leg.send.write(&mut data(b"one")).await.unwrap();
    leg.send.write(&mut data(b"two")).await.unwrap();
    leg.send.finish();
    for expected in ["one", "two"] {
        let frame = response.next().await.unwrap().unwrap();
        assert_eq!((frame.kind, frame.body), (Kind::DATA, expected.into()));
    }
    assert_eq!(response.next().await, Ok(None));
}

#[tokio::test]
async fn what_ends_early_is_an_error_with_its_code() {
    let (mut leg, mut response) = pair(VecDeque::new(), LIMIT);
    leg.send.write(&mut data(b"cut")[..1]).await.unwrap();
    leg.send.reset(Code::Unavailable);
    let error = response.next().await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);

    let (mut leg, mut response) = pair(VecDeque::new(), LIMIT);
    leg.send.write(&mut data(b"cut")[..1]).await.unwrap();
    leg.send.finish();
    let error = response.next().await.unwrap_err();
    assert_eq!(error.code, Code::Internal);

    let (leg, mut response) = pair(VecDeque::new(), LIMIT);
    drop(leg);
    assert_eq!(response.next().await.unwrap_err().code, Code::Internal);
}

#[tokio::test]
async fn a_response_that_nobody_takes_any_more_stops_its_writer() {
    let (mut leg, response) = pair(VecDeque::new(), LIMIT);
    let stopped = leg.send.stopped();
    drop(response);
    stopped.await;
    assert_eq!(leg.send.write(&mut data(b"late")).await, Err(Gone));
}

#[tokio::test]
async fn a_request_is_read_in_pieces_to_its_end() {
    let pieces = ["a", "b", "c"].map(|piece| Bytes::from_static(piece.as_bytes()));
    let (mut leg, _response) = pair(pieces.into(), LIMIT);
    let mut chunks = [Bytes::new(), Bytes::new()];
    assert_eq!(leg.recv.read(&mut chunks).await, Ok(Some(2)));
    assert_eq!(chunks, ["a", "b"]);
    assert_eq!(leg.recv.read(&mut chunks).await, Ok(Some(1)));
    assert_eq!(chunks[0], "c");
    assert_eq!(leg.recv.read(&mut chunks).await, Ok(None));
}
