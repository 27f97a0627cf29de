//! Clients of this project's broker: selvedge/1 and no more of it than the work needs.

use std::io;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use selvedge_proto::frame::{self, Frame, FrameDecoder, Kind};
use selvedge_proto::lane::Flags;
use selvedge_proto::message::{Durability, Qos};
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame as ControlFrame;

use super::{Ear, Heard, Held, Listening, Publisher, Sink, Subscriber, Wish, relay};
use crate::compare::job::{Protocol, Service};
use crate::compare::load::per_write;

/// Subscriptions that are asked for in one frame.
const SUBSCRIPTIONS: usize = 1_000;
/// How long the session of a subscriber is kept that is to be kept.
const KEPT_SECONDS: u32 = 600;
const LANE: u32 = 1;
const ALIAS: u32 = 1;

/// What the broker says on the control stream.
pub(super) struct Control {
    stream: RecvStream,
    decoder: FrameDecoder,
}

impl Control {
    async fn next(&mut self) -> io::Result<ControlFrame> {
        loop {
            while let Some(frame) = self.decoder.next_frame().map_err(io::Error::other)? {
                if frame.kind == Kind::CONTROL {
                    let control = frame::decode::<wire::Control>("control", frame.body)
                        .map_err(io::Error::other)?;
                    if let Some(frame) = control.frame {
                        return Ok(frame);
                    }
                }
            }
            match self.stream.read_chunk(usize::MAX, true).await? {
                Some(chunk) => self.decoder.push(chunk.bytes),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Counts acknowledgements until the connection ends.
    pub(super) async fn run(mut self, heard: &Heard, acked: impl Fn()) -> io::Result<()> {
        loop {
            match self.next().await? {
                ControlFrame::PublishAck(ack) => {
                    heard
                        .acks
                        .fetch_add(ack.last + 1 - ack.first, Ordering::Release);
                    acked();
                }
                ControlFrame::PublishRefused(refused) => {
                    let status = refused.status.unwrap_or_default();
                    return Err(io::Error::other(format!(
                        "the broker refused a message: {}",
                        status.message
                    )));
                }
                ControlFrame::Goodbye(goodbye) => {
                    let status = goodbye.status.unwrap_or_default();
                    return Err(io::Error::other(format!(
                        "the broker said goodbye: {}",
                        status.message
                    )));
                }
                _ => {}
            }
        }
    }
}

async fn greet(
    connection: &Connection,
    session: &str,
    kept: bool,
) -> anyhow::Result<(SendStream, Control)> {
    let (mut send, stream) = connection.open_bi().await?;
    let hello = wire::Hello {
        revision: selvedge_proto::REVISION,
        agent: "selvedge bench".into(),
        session: session.into(),
        session_expiry_s: if kept { KEPT_SECONDS } else { 0 },
        clean_start: true,
        max_frame_bytes: selvedge_proto::DEFAULT_MAX_FRAME as u32,
        ..Default::default()
    };
    send.write_chunk(control(ControlFrame::Hello(hello)))
        .await?;
    let mut control = Control {
        stream,
        decoder: FrameDecoder::new(selvedge_proto::DEFAULT_MAX_FRAME),
    };
    match control.next().await? {
        ControlFrame::Welcome(_) => Ok((send, control)),
        other => bail!("expected Welcome, found {other:?}"),
    }
}

pub(super) async fn subscribe(
    endpoint: &Endpoint,
    connection: Connection,
    session: &str,
    wish: &Wish,
) -> anyhow::Result<Subscriber> {
    let (mut send, mut heard) = greet(&connection, session, wish.service.kept()).await?;
    let mut id = 0;
    for filters in wish.filters.chunks(SUBSCRIPTIONS) {
        let mut subscriptions = Vec::new();
        for filter in filters {
            id += 1;
            subscriptions.push(wire::Subscription {
                id,
                filter: filter.clone(),
                max_qos: u32::from(wish.service.acknowledged()),
                ..Default::default()
            });
        }
        let subscribe = wire::Subscribe {
            request_id: id.into(),
            subscriptions,
        };
        let frame = control(ControlFrame::Subscribe(subscribe));
        send.write_chunk(frame).await?;
        match heard.next().await? {
            ControlFrame::Reply(reply) => {
                let refused = reply.statuses.iter().find(|status| status.code != 0);
                if let Some(status) = refused {
                    bail!("the broker refused a subscription: {}", status.message);
                }
            }
            other => bail!("expected the answer to a subscription, found {other:?}"),
        }
    }
    Ok(Subscriber {
        protocol: Protocol::Selvedge,
        acknowledges: wish.service.acknowledged(),
        source: None,
        answers: Some(Sink::Quic(send)),
        held: Held {
            quic: Some((endpoint.clone(), connection)),
            _control: (None, Some(heard.stream)),
        },
    })
}

pub(super) async fn publish(
    endpoint: &Endpoint,
    connection: Connection,
    session: &str,
    topic: &str,
    size: usize,
    service: Service,
) -> anyhow::Result<Publisher> {
    let (send, heard) = greet(&connection, session, false).await?;
    let mut stream = connection.open_uni().await?;
    let header = wire::LaneHeader {
        lane: LANE,
        ..Default::default()
    };
    let bind = wire::Bind {
        alias: ALIAS,
        topic: topic.to_owned(),
        ..Default::default()
    };
    stream
        .write_chunk(frame::encode(Kind::LANE, &header))
        .await?;
    stream.write_chunk(frame::encode(Kind::BIND, &bind)).await?;
    let flags = match service {
        Service::AtMostOnce => Flags::new(Qos::AtMostOnce),
        Service::Memory | Service::Stored => {
            Flags::new(Qos::AtLeastOnce).with_durability(Durability::Memory)
        }
        Service::Disk => Flags::new(Qos::AtLeastOnce).with_durability(Durability::Disk),
    };
    let template = relay::message(flags, size);
    let per_write = per_write(template.frame.len());
    Ok(Publisher {
        listening: Some(Listening(Ear::Control(heard))),
        _held: Held {
            quic: Some((endpoint.clone(), connection)),
            _control: (Some(send), None),
        },
        ..Publisher::new(Sink::Quic(stream), template, per_write)
    })
}

/// Reads the first frame of a delivery lane: its number, and what came after it.
pub(super) async fn lane(stream: &mut RecvStream) -> io::Result<(u32, Bytes)> {
    let mut decoder = FrameDecoder::new(selvedge_proto::DEFAULT_MAX_FRAME);
    loop {
        let chunk = stream.read_chunk(usize::MAX, true).await?;
        let chunk = chunk.context("the lane has no header");
        decoder.push(chunk.map_err(io::Error::other)?.bytes);
        let Some(Frame { kind, body }) = decoder.next_frame().map_err(io::Error::other)? else {
            continue;
        };
        if kind != Kind::LANE {
            return Err(io::Error::other("expected the header of a lane"));
        }
        let header: wire::LaneHeader =
            frame::decode("lane header", body).map_err(io::Error::other)?;
        return Ok((header.lane, decoder.into_rest()));
    }
}

/// Says that all QoS 1 messages up to this number were taken.
pub(super) fn delivery_ack(lane: u32, last: u64) -> Bytes {
    control(ControlFrame::DeliveryAck(wire::DeliveryAck { lane, last }))
}

fn control(content: ControlFrame) -> Bytes {
    let control = wire::Control {
        frame: Some(content),
    };
    frame::encode(Kind::CONTROL, &control)
}
