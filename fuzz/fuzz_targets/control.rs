//! The prost messages of every frame kind, and their way to the program's own types.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use selvedge_proto::frame::{self, FrameDecoder, Kind};
use selvedge_proto::inference::{Preference, Residency, TensorSpec, Tier};
use selvedge_proto::message::Properties;
use selvedge_proto::status::Status;
use selvedge_proto::topic::SubscribeTarget;
use selvedge_proto::wire::{self, control};

fuzz_target!(|data: &[u8]| {
    let Some((&kind, body)) = data.split_first() else {
        return;
    };
    let (kind, body) = (Kind(kind % 12), Bytes::copy_from_slice(body));
    match kind {
        Kind::LANE => drop(read::<wire::LaneHeader>(kind, body)),
        Kind::BIND => drop(read::<wire::Bind>(kind, body)),
        Kind::CALL => drop(read::<wire::CallHeader>(kind, body)),
        Kind::INFER => {
            if let Some(header) = read::<wire::InferHeader>(kind, body) {
                let _ = Residency::from_wire(header.residency);
                let _ = Preference::from_wire(header.preference);
            }
        }
        Kind::ANSWER => {
            if let Some(answer) = read::<wire::InferAnswer>(kind, body) {
                let _ = Tier::from_wire(answer.tier);
            }
        }
        Kind::STATUS => status(read::<wire::Status>(kind, body)),
        Kind::MARK => drop(read::<wire::Ping>(kind, body)),
        _ => control(read::<wire::Control>(Kind::CONTROL, body)),
    }
});

/// Decodes, and checks that what was decoded survives a round trip through a frame.
fn read<M>(kind: Kind, body: Bytes) -> Option<M>
where
    M: prost::Message + Default,
{
    let message: M = frame::decode("fuzzed", body).ok()?;
    let encoded = frame::encode(kind, &message);
    let mut decoder = FrameDecoder::new(usize::MAX);
    decoder.push(encoded);
    // Only a body over the limit for headers is refused; the fuzzer's inputs can reach it.
    if let Ok(frame) = decoder.next_frame() {
        let frame = frame.expect("it is whole");
        let again: M = frame::decode("fuzzed", frame.body).expect("it was just encoded");
        // Encodings are compared, since a NaN is not equal to itself.
        assert_eq!(again.encode_to_vec(), message.encode_to_vec());
    }
    Some(message)
}

fn control(control: Option<wire::Control>) {
    match control.and_then(|control| control.frame) {
        Some(control::Frame::Hello(hello)) => {
            let header = hello.will.and_then(|will| will.header);
            drop(header.map(Properties::from));
        }
        Some(control::Frame::Goodbye(goodbye)) => status(goodbye.status),
        Some(control::Frame::PublishRefused(refused)) => status(refused.status),
        Some(control::Frame::Reply(reply)) => {
            for one in reply.statuses {
                status(Some(one));
            }
        }
        Some(control::Frame::Subscribe(subscribe)) => {
            for subscription in subscribe.subscriptions {
                let _ = SubscribeTarget::parse(&subscription.filter);
            }
        }
        Some(control::Frame::Work(work)) => {
            let _ = Tier::from_wire(work.tier);
            for spec in work.inputs.into_iter().chain(work.outputs) {
                drop(TensorSpec::from(spec));
            }
        }
        _ => {}
    }
}

fn status(status: Option<wire::Status>) {
    if let Some(status) = status.map(Status::from) {
        let _ = status.to_string();
        let again = Status::from(wire::Status::from(status.clone()));
        assert_eq!(again, status);
    }
}
