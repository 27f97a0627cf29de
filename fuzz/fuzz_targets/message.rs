//! The body of a message frame: what is read is what writing it again gives. And a run of frames under
//! another alias: the messages are the same.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use selvedge_proto::frame;
use selvedge_proto::frame::FrameDecoder;
use selvedge_proto::lane::{MessageFrame, MessageRef, put_message, realias};
use selvedge_proto::message::Properties;

/// Flags, header and payload of each message in whole frames.
fn messages(mut frames: &[u8], count: u32) -> Vec<(u32, u8, Vec<u8>)> {
    let read = |_| {
        let head = frame::peek(frames, usize::MAX)
            .expect("was read")
            .expect("is whole");
        let (whole, rest) = frames.split_at(head.total());
        frames = rest;
        let body = &whole[head.prefix..];
        let message = MessageRef::parse(body).expect("was read");
        let rest = body[message.payload_offset(body)..].to_vec();
        (message.alias, body[0], rest)
    };
    (0..count).map(read).collect()
}

fn run(data: &[u8]) {
    let mut renamed = data.to_vec();
    let Some(run) = realias(&mut renamed, 16_000, 1 << 20, 4096) else {
        assert_eq!(renamed, data);
        return;
    };
    assert_eq!(renamed[run.bytes..], data[run.bytes..]);
    // A header that is said to be there and is not is for who reads the message; plain ones have none.
    if data[frame::peek(data, usize::MAX)
        .expect("was read")
        .expect("is whole")
        .prefix]
        > 1
    {
        return;
    }
    let (before, after) = (messages(data, run.count), messages(&renamed, run.count));
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(after.0, 16_000);
        assert_eq!((before.1, &before.2), (after.1, &after.2));
    }
}

fuzz_target!(|data: &[u8]| {
    run(data);
    let Ok(message) = MessageRef::parse(data) else {
        return;
    };
    assert_eq!(&data[message.payload_offset(data)..], message.payload);
    let _ = message.flags.qos();
    let _ = message.header.map(Properties::decode);

    let mut wire = BytesMut::new();
    let (flags, alias, header) = (message.flags, message.alias, message.header);
    put_message(&mut wire, flags, alias, header, message.payload);
    let mut decoder = FrameDecoder::new(usize::MAX);
    decoder.push(wire.freeze());
    let frame = decoder.next_frame().expect("it was just encoded");
    let frame = frame.expect("it is whole");
    let again = MessageFrame::parse(&frame.body).expect("it was just encoded");
    assert_eq!(
        again,
        MessageFrame::parse(&Bytes::copy_from_slice(data)).expect("parsed above")
    );
});
