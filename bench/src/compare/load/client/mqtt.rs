//! Clients of MQTT brokers: 3.1.1, QoS 0 and 1.

use anyhow::{Context as _, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::super::framing::{Framing, mqtt_length};
use super::{Ear, Held, Listening, Publisher, Sink, Source, Subscriber, Template, Tls, Wish};
use crate::compare::job::{Protocol, Service};
use crate::compare::load::per_write;

/// Filters of one SUBSCRIBE packet.
const FILTERS: usize = 100;

async fn connect(stream: &mut Tls, client: &str, clean: bool) -> anyhow::Result<()> {
    let mut body = BytesMut::new();
    put_text(&mut body, "MQTT");
    body.put_u8(4);
    body.put_u8(if clean { 0b10 } else { 0 });
    // No keep-alive.
    body.put_u16(0);
    put_text(&mut body, client);
    stream.write_all(&packet(0x10, &body)).await?;
    stream.flush().await?;
    let (kind, answer) = read_packet(stream).await.context("wait for CONNACK")?;
    ensure!(
        kind == 0x20 && answer.get(1) == Some(&0),
        "expected CONNACK with code 0, found packet {kind:#x} with {answer:?}"
    );
    Ok(())
}

pub(super) async fn subscribe(
    mut stream: Tls,
    client: &str,
    wish: &Wish,
) -> anyhow::Result<Subscriber> {
    connect(&mut stream, client, !wish.service.kept()).await?;
    let qos = u8::from(wish.service.acknowledged());
    for filters in wish.filters.chunks(FILTERS) {
        let mut body = BytesMut::new();
        body.put_u16(1);
        for filter in filters {
            put_text(&mut body, filter);
            body.put_u8(qos);
        }
        stream.write_all(&packet(0x82, &body)).await?;
        stream.flush().await?;
        let (kind, answer) = read_packet(&mut stream).await.context("wait for SUBACK")?;
        let granted = answer.get(2..).unwrap_or_default();
        ensure!(
            kind == 0x90 && granted.iter().all(|code| *code == qos),
            "expected SUBACK with QoS {qos}, found packet {kind:#x} with {answer:?}"
        );
    }
    let (read, write) = tokio::io::split(stream);
    Ok(Subscriber {
        protocol: Protocol::Mqtt,
        acknowledges: wish.service.acknowledged(),
        source: Some(Source::tls(read)),
        answers: Some(Sink::Tls(write)),
        held: Held::default(),
    })
}

pub(super) async fn publish(
    mut stream: Tls,
    client: &str,
    topic: &str,
    size: usize,
    service: Service,
) -> anyhow::Result<Publisher> {
    connect(&mut stream, client, true).await?;
    let (read, write) = tokio::io::split(stream);
    let qos = u8::from(service.acknowledged());
    let mut body = BytesMut::new();
    put_text(&mut body, topic);
    if qos > 0 {
        body.put_u16(0);
    }
    body.resize(body.len() + size, 0);
    let frame = packet(0x30 | qos << 1, &body);
    let payload = frame.len() - size;
    let template = Template {
        frame,
        payload,
        id: (qos > 0).then_some(payload - 2),
    };
    let per_write = per_write(template.frame.len());
    Ok(Publisher {
        listening: Some(Listening(Ear::Tls(Source::tls(read), Framing::Mqtt))),
        ..Publisher::new(Sink::Tls(write), template, per_write)
    })
}

/// Acknowledges messages.
pub(super) fn acks(ids: &[u16]) -> Bytes {
    let mut buffer = BytesMut::with_capacity(ids.len() * 4);
    for id in ids {
        buffer.put_u8(0x40);
        buffer.put_u8(2);
        buffer.put_u16(*id);
    }
    buffer.freeze()
}

fn packet(first: u8, body: &[u8]) -> Bytes {
    let mut buffer = BytesMut::with_capacity(body.len() + 5);
    buffer.put_u8(first);
    let mut length = body.len();
    while length > 0x7f {
        buffer.put_u8(length as u8 | 0x80);
        length >>= 7;
    }
    buffer.put_u8(length as u8);
    buffer.extend_from_slice(body);
    buffer.freeze()
}

fn put_text(buffer: &mut BytesMut, text: &str) {
    buffer.put_u16(text.len() as u16);
    buffer.extend_from_slice(text.as_bytes());
}

/// Reads one packet: its first byte and its body.
async fn read_packet(stream: &mut Tls) -> anyhow::Result<(u8, Vec<u8>)> {
    let mut head = Vec::new();
    loop {
        head.push(stream.read_u8().await?);
        if let Some((_, body)) = mqtt_length(&head)? {
            let mut body = vec![0; body];
            stream.read_exact(&mut body).await?;
            return Ok((head[0], body));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_says_its_length() {
        for size in [0, 127, 128, 16_383, 16_384, 65_600] {
            let packet = packet(0x30, &vec![0; size]);
            let (prefix, body) = mqtt_length(&packet).unwrap().unwrap();
            assert_eq!((prefix + body, body), (packet.len(), size));
        }
    }
}
