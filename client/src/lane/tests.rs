//! What a publish lane writes, read back as a broker reads it.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use proptest::prelude::*;
use selvedge_proto::frame::FrameDecoder;
use selvedge_proto::lane::MessageFrame;
use selvedge_proto::message::Qos;
use selvedge_proto::status::Code;
use tokio::time::timeout;

use super::*;

const LIMIT: usize = 100_000;

/// A message as the broker makes it out: topic, QoS, duplicate flag, payload.
type Read = (String, u8, bool, Bytes);

/// The receiving end of a lane.
struct Broker {
    decoder: FrameDecoder,
    aliases: HashMap<u32, String>,
    max_aliases: u32,
}

impl Broker {
    fn new(max_aliases: u32) -> Self {
        Self {
            decoder: FrameDecoder::new(1 << 20),
            aliases: HashMap::new(),
            max_aliases,
        }
    }

    /// Everything that the lane has to send.
    async fn read(&mut self, lane: &Lane) -> Vec<Read> {
        let mut read = Vec::new();
        let Ok(pieces) = timeout(Duration::ZERO, lane.take()).await else {
            return read;
        };
        for piece in pieces {
            self.decoder.push(piece);
            while let Some(frame) = self.decoder.next_frame().unwrap() {
                match frame.kind {
                    Kind::BIND => {
                        let bind: wire::Bind = frame::decode("bind", frame.body).unwrap();
                        assert!((1..=self.max_aliases).contains(&bind.alias));
                        self.aliases.insert(bind.alias, bind.topic);
                    }
                    Kind::UNBIND => self.aliases.clear(),
                    Kind::MESSAGE => {
                        let message = MessageFrame::parse(&frame.body).unwrap();
                        read.push((
                            self.aliases[&message.alias].clone(),
                            message.flags.qos().unwrap() as u8,
                            message.flags.duplicate(),
                            message.payload,
                        ));
                    }
                    Kind::MARK => {}
                    other => panic!("unexpected frame {other:?}"),
                }
            }
        }
        assert!(self.decoder.is_empty());
        read
    }
}

fn lane() -> Lane {
    Lane::new(Class::Normal, LIMIT, Arc::default())
}

fn plain<'a>(topic: &'a str, payload: &[u8]) -> Outgoing<&'a str> {
    Outgoing {
        topic,
        flags: Flags::new(Qos::AtMostOnce),
        header: None,
        payload: Bytes::copy_from_slice(payload),
    }
}

fn acknowledged(topic: &str, payload: &[u8]) -> Outgoing<TopicName> {
    Outgoing {
        topic: TopicName::parse(topic).unwrap(),
        flags: Flags::new(Qos::AtLeastOnce),
        header: None,
        payload: Bytes::copy_from_slice(payload),
    }
}

fn read(topic: &str, qos: u8, duplicate: bool, payload: &[u8]) -> Read {
    (
        topic.to_owned(),
        qos,
        duplicate,
        Bytes::copy_from_slice(payload),
    )
}

proptest! {
    #[test]
    fn every_message_arrives_under_its_topic_however_few_aliases_there_are(
        max_aliases in 0u32..5,
        messages in proptest::collection::vec((0u8..8, 0usize..9000, any::<bool>()), 1..40),
        cut in 0usize..40,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let lane = Lane::new(Class::Normal, usize::MAX, Arc::default());
            let mut broker = Broker::new(max_aliases.max(1));
            lane.connected(max_aliases, 1 << 20);
            let mut arrived = Vec::new();
            let mut expected = Vec::new();
            let mut answers = Vec::new();
            for (index, (topic, size, qos1)) in messages.into_iter().enumerate() {
                let topic = format!("t/{topic}");
                let payload = vec![index as u8; size];
                expected.push(read(&topic, u8::from(qos1), false, &payload));
                if qos1 {
                    match lane.push_acknowledged(acknowledged(&topic, &payload)).unwrap() {
                        Push::Done(answer) => answers.push(answer),
                        Push::Full(_) => panic!("there is room"),
                    }
                } else {
                    let pushed = lane.push_plain(plain(&topic, &payload)).unwrap();
                    assert!(matches!(pushed, Push::Done(())));
                }
                if index == cut {
                    arrived.extend(broker.read(&lane).await);
                }
            }
            arrived.extend(broker.read(&lane).await);
            assert_eq!(arrived, expected);
        });
    }
}

#[tokio::test]
async fn what_is_unanswered_is_sent_again_before_what_was_queued_while_disconnected() {
    let lane = lane();
    lane.connected(10, LIMIT);
    let mut answers = Vec::new();
    for payload in [b"1", b"2", b"3"] {
        match lane
            .push_acknowledged(acknowledged("q/1", payload))
            .unwrap()
        {
            Push::Done(answer) => answers.push(answer),
            Push::Full(_) => panic!("there is room"),
        }
    }
    assert_eq!(Broker::new(10).read(&lane).await.len(), 3);
    lane.acknowledged(2, 2, Durability::Disk);

    lane.disconnected();
    lane.publish(plain("q/0", b"a")).await.unwrap();
    match lane.push_acknowledged(acknowledged("q/2", b"4")).unwrap() {
        Push::Done(answer) => answers.push(answer),
        Push::Full(_) => panic!("there is room"),
    }
    lane.connected(10, LIMIT);
    lane.publish(plain("q/1", b"b")).await.unwrap();
    assert_eq!(
        Broker::new(10).read(&lane).await,
        [
            read("q/1", 1, true, b"1"),
            read("q/1", 1, true, b"3"),
            read("q/2", 1, false, b"4"),
            read("q/0", 0, false, b"a"),
            read("q/1", 0, false, b"b"),
        ]
    );

    // The numbers start anew: 2 is now what was 3.
    lane.refused(2, &Status::new(Code::PermissionDenied, "no"));
    lane.acknowledged(1, 3, Durability::Memory);
    let mut results = Vec::new();
    for answer in answers {
        results.push(answer.await.unwrap());
    }
    let ack = |durability| {
        Ok(PublishAck {
            durability: Some(durability),
        })
    };
    assert_eq!(
        results,
        [
            ack(Durability::Memory),
            ack(Durability::Disk),
            Err(PublishError::Refused(Status::new(
                Code::PermissionDenied,
                "no"
            ))),
            ack(Durability::Memory),
        ]
    );
}

#[tokio::test]
async fn qos_0_is_dropped_when_disconnected_and_full_and_waits_when_connected() {
    let lane = lane();
    lane.publish(plain("a", &[0; LIMIT - 100])).await.unwrap();
    let refused = lane.publish(plain("a", &[0; 200])).await;
    assert_eq!(refused, Err(PublishError::Disconnected));
    lane.connected(1, LIMIT);
    let waiting = lane.publish(plain("a", &[1; 200]));
    let reading = async {
        let mut broker = Broker::new(1);
        let mut arrived = broker.read(&lane).await;
        while arrived.len() < 2 {
            tokio::task::yield_now().await;
            arrived.extend(broker.read(&lane).await);
        }
        arrived
    };
    let (published, arrived) = tokio::join!(waiting, reading);
    assert_eq!(published, Ok(()));
    assert_eq!(arrived[1].3, &[1; 200][..]);
}

#[tokio::test]
async fn a_message_that_cannot_be_sent_is_refused_before_it_is_queued() {
    let lane = lane();
    lane.connected(1, 1000);
    let too_large = lane.publish(plain("a", &[0; 1000])).await;
    assert_eq!(
        too_large,
        Err(PublishError::TooLarge {
            found: 1000 + MESSAGE_OVERHEAD,
            limit: 1000
        })
    );
    let invalid = lane.publish(plain("a/+", b"")).await;
    assert!(matches!(invalid, Err(PublishError::InvalidTopic(_))));

    let status = Status::new(Code::PermissionDenied, "no");
    let topic = TopicName::parse("a").unwrap();
    assert!(lane.refused_topic(topic.clone(), status.clone(), Instant::now()));
    assert!(!lane.refused_topic(topic.clone(), status.clone(), Instant::now()));
    assert_eq!(
        lane.publish(plain("a", b"")).await,
        Err(PublishError::Refused(status.clone()))
    );
    lane.publish(plain("b", b"")).await.unwrap();
    let long_ago = Instant::now().checked_sub(REFUSAL_MEMORY).unwrap();
    lane.refused_topic(topic, status, long_ago);
    lane.publish(plain("a", b"")).await.unwrap();
}

#[tokio::test]
async fn closing_answers_everyone() {
    let lane = lane();
    lane.connected(1, LIMIT);
    let waiting = lane.publish_acknowledged(acknowledged("a", b""));
    let closing = async {
        lane.close(&"the end".into());
    };
    let (answer, ()) = tokio::join!(waiting, closing);
    let closed = PublishError::Closed("the end".into());
    assert_eq!(answer, Err(closed.clone()));
    assert_eq!(lane.publish(plain("a", b"")).await, Err(closed));
    assert_eq!(lane.mark(1), Err("the end".into()));
}
