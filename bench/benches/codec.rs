//! The wire: writing messages to a lane, and cutting 64 KiB of them into frames again.
#![allow(missing_docs, reason = "Criterion's macros make public functions")]

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use selvedge_proto::frame::FrameDecoder;
use selvedge_proto::lane::{Flags, MessageRef, put_message};
use selvedge_proto::message::Qos;

const LENGTH: usize = 64 << 10;
const PAYLOADS: [usize; 2] = [64, 256];
/// What one QUIC packet on an Ethernet path carries of a stream, about.
const PACKET: usize = 1_400;
const LIMIT: usize = 1 << 20;

criterion_group!(benches, write, read);
criterion_main!(benches);

fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("put_message");
    for size in PAYLOADS {
        let payload = vec![7; size];
        let count = messages(size).1;
        let mut buffer = BytesMut::with_capacity(LENGTH);
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                buffer.clear();
                for _ in 0..count {
                    put_message(
                        &mut buffer,
                        Flags::new(Qos::AtLeastOnce),
                        black_box(3),
                        None,
                        black_box(&payload),
                    );
                }
                black_box(buffer.len())
            });
        });
    }
    group.finish();
}

fn read(criterion: &mut Criterion) {
    for (name, chunk) in [("one chunk", LENGTH), ("packets", PACKET)] {
        let mut group = criterion.benchmark_group(format!("decode from {name}"));
        for size in PAYLOADS {
            let (bytes, count) = messages(size);
            assert_eq!(decode(&bytes, chunk), (count, count * size as u64));
            group.throughput(Throughput::Elements(count));
            group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
                bencher.iter(|| decode(black_box(&bytes), chunk));
            });
        }
        group.finish();
    }
}

/// As many whole messages as fit, and their number.
fn messages(size: usize) -> (Bytes, u64) {
    let payload = vec![7; size];
    let (mut bytes, mut count) = (BytesMut::new(), 0);
    loop {
        let whole = bytes.len();
        put_message(&mut bytes, Flags::new(Qos::AtLeastOnce), 3, None, &payload);
        if bytes.len() > LENGTH {
            bytes.truncate(whole);
            return (bytes.freeze(), count);
        }
        count += 1;
    }
}

/// Number of messages and bytes of their payloads.
fn decode(bytes: &Bytes, chunk: usize) -> (u64, u64) {
    let mut decoder = FrameDecoder::new(LIMIT);
    let (mut count, mut payload) = (0, 0);
    let mut position = 0;
    while position < bytes.len() {
        let end = bytes.len().min(position + chunk);
        decoder.push(bytes.slice(position..end));
        position = end;
        while let Some(frame) = decoder.next_frame().expect("the frames are whole") {
            let message = MessageRef::parse(&frame.body).expect("the messages are whole");
            count += 1;
            payload += message.payload.len() as u64;
        }
    }
    (count, payload)
}
