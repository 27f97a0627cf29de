//! The body of a message frame: what is read is what writing it again gives.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use selvedge_proto::frame::FrameDecoder;
use selvedge_proto::lane::{MessageFrame, MessageRef, put_message};
use selvedge_proto::message::Properties;

fuzz_target!(|data: &[u8]| {
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
