//! Clients of the bare relay.

use bytes::{Bytes, BytesMut};
use quinn::{Connection, Endpoint};
use selvedge_proto::lane::{Flags, put_message};
use selvedge_proto::message::Qos;

use super::{Held, Publisher, Sink, Source, Subscriber, Template};
use crate::compare::job::Protocol;
use crate::compare::load::per_write;
use crate::compare::relay::Greeting;

pub(super) async fn subscribe(
    endpoint: &Endpoint,
    connection: Connection,
    group: u32,
) -> anyhow::Result<Subscriber> {
    let mut hello = connection.open_uni().await?;
    hello
        .write_all(&Greeting::Subscribe(group).encode())
        .await?;
    hello.finish()?;
    // The relay opens the stream once the subscription is in place.
    let stream = connection.accept_uni().await?;
    Ok(Subscriber {
        protocol: Protocol::Relay,
        acknowledges: false,
        source: Some(Source::Quic(stream)),
        answers: None,
        held: Held {
            quic: Some((endpoint.clone(), connection)),
            ..Held::default()
        },
    })
}

pub(super) async fn publish(
    endpoint: &Endpoint,
    connection: Connection,
    group: u32,
    size: usize,
) -> anyhow::Result<Publisher> {
    let mut stream = connection.open_uni().await?;
    stream.write_all(&Greeting::Publish(group).encode()).await?;
    let template = message(Flags::new(Qos::AtMostOnce), size);
    let per_write = per_write(template.frame.len());
    Ok(Publisher {
        _held: Held {
            quic: Some((endpoint.clone(), connection)),
            ..Held::default()
        },
        ..Publisher::new(Sink::Quic(stream), template, per_write)
    })
}

/// A message of selvedge/1 under alias 1.
pub(super) fn message(flags: Flags, size: usize) -> Template {
    let mut buffer = BytesMut::new();
    put_message(&mut buffer, flags, 1, None, &vec![0; size]);
    let frame: Bytes = buffer.freeze();
    Template {
        payload: frame.len() - size,
        frame,
        id: None,
    }
}
