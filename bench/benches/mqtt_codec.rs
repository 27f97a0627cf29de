//! MQTT codecs from the registry: 64 KiB of PUBLISH packets of MQTT 5.0, as a socket gives them, cut into
//! packets with a topic and a payload.
#![allow(missing_docs, reason = "Criterion's macros make public functions")]

use std::hint::black_box;

use bytes::{Buf as _, Bytes, BytesMut};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tokio_util::codec::Decoder as _;

const LENGTH: usize = 64 << 10;
const PAYLOADS: [usize; 3] = [64, 256, 4096];
const TOPIC: &[u8] = b"line/7/press/3/temperature";
const LIMIT: u32 = 1 << 20;

/// Cuts bytes into packets; gives the bytes of their payloads.
type Decode = fn(&[u8]) -> usize;

criterion_group!(benches, read);
criterion_main!(benches);

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read PUBLISH");
    for size in PAYLOADS {
        let (bytes, count) = packets(size);
        let expected = count * size;
        group.throughput(Throughput::Elements(count as u64));
        let codecs: [(&str, Decode); 3] = [
            ("rmqtt-codec", rmqtt_codec),
            ("mqtt5-protocol", mqtt5_protocol),
            ("mqtt-protocol-core", mqtt_protocol_core),
        ];
        for (name, decode) in codecs {
            assert_eq!(decode(&bytes), expected, "{name}");
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter(|| decode(black_box(&bytes)));
            });
        }
    }
    group.finish();
}

/// As many whole packets of QoS 1 as fit, and their number.
fn packets(size: usize) -> (Vec<u8>, usize) {
    let mut packet = Vec::new();
    packet.extend_from_slice(&u16::try_from(TOPIC.len()).unwrap_or(0).to_be_bytes());
    packet.extend_from_slice(TOPIC);
    // Packet id 7, no properties.
    packet.extend_from_slice(&[0, 7, 0]);
    packet.resize(packet.len() + size, 7);
    let mut header = vec![0x32];
    let mut length = packet.len();
    loop {
        let digit = (length % 128) as u8;
        length /= 128;
        header.push(if length > 0 { digit | 0x80 } else { digit });
        if length == 0 {
            break;
        }
    }
    let packet = [header, packet].concat();
    let count = LENGTH / packet.len();
    (packet.repeat(count), count)
}

/// Bytes of payloads. The copy into the buffer is the socket's.
fn rmqtt_codec(bytes: &[u8]) -> usize {
    let mut codec = rmqtt_codec::v5::Codec::new(LIMIT, LIMIT);
    let mut buffer = BytesMut::from(bytes);
    let mut payloads = 0;
    while let Ok(Some((packet, _))) = codec.decode(&mut buffer) {
        if let rmqtt_codec::v5::Packet::Publish(publish) = packet {
            assert_eq!(publish.topic.len(), TOPIC.len());
            payloads += publish.payload.len();
        }
    }
    payloads
}

fn mqtt5_protocol(bytes: &[u8]) -> usize {
    use mqtt5_protocol::packet::{FixedHeader, Packet};
    let mut buffer = Bytes::copy_from_slice(bytes);
    let mut payloads = 0;
    while buffer.has_remaining() {
        let Ok(header) = FixedHeader::decode(&mut buffer) else {
            break;
        };
        let mut body = buffer.split_to(header.remaining_length as usize);
        let packet = Packet::decode_from_body(header.packet_type, &header, &mut body);
        if let Ok(Packet::Publish(publish)) = packet {
            assert_eq!(publish.topic_name.len(), TOPIC.len());
            payloads += publish.payload.len();
        }
    }
    payloads
}

fn mqtt_protocol_core(bytes: &[u8]) -> usize {
    use mqtt_protocol_core::mqtt::packet::v5_0::Publish;
    use mqtt_protocol_core::mqtt::packet::{DecodeResult, VariableByteInteger};
    // The copy of the socket, as for the others.
    let buffer = Bytes::copy_from_slice(bytes);
    let mut rest = &buffer[..];
    let mut payloads = 0;
    while let Some((&first, after)) = rest.split_first() {
        let DecodeResult::Ok(length, used) = VariableByteInteger::decode_stream(after) else {
            break;
        };
        let (body, next) = after[used..].split_at(length.to_u32() as usize);
        // What its connection does with each packet.
        if let Ok((publish, _)) = Publish::parse(first & 0x0F, body.into()) {
            assert_eq!(publish.topic_name().len(), TOPIC.len());
            payloads += publish.payload().len();
        }
        rest = next;
    }
    payloads
}
