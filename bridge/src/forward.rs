//! Carrying single messages: the checks and changes on the way in and out, and the tasks that take
//! messages from the fabric.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use selvedge_client::{
    Backoff, Client, Code, Message, Publish, PublishError, Reconnect, Subscription,
};
use selvedge_proto::message::{Class, Properties, Qos};
use selvedge_proto::topic::TopicName;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::mapping::Rule;
use crate::properties::add_hop;
use crate::status::{DropReason, InFlight, Record};

/// Delays between attempts to give the fabric a message that it cannot take just now.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// A message as a remote sent it or will get it, the same for every MQTT version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) topic: Bytes,
    pub(crate) payload: Bytes,
    pub(crate) qos: Qos,
    pub(crate) retain: bool,
    pub(crate) properties: Properties,
}

impl Packet {
    /// About what the packet holds in memory.
    pub(crate) fn bytes(&self) -> usize {
        let user = self.properties.user.iter();
        let user: usize = user.map(|(name, value)| name.len() + value.len()).sum();
        self.topic.len() + self.payload.len() + user + PACKET_OVERHEAD
    }
}

/// What a message costs besides topic, payload and user properties, in bytes.
const PACKET_OVERHEAD: usize = 256;

/// A message of the remote, as it goes to the fabric.
#[derive(Debug)]
pub(crate) struct Inward {
    pub(crate) rule: usize,
    pub(crate) qos: Qos,
    pub(crate) publish: Publish,
}

/// What becomes of a message of the remote; an error names the rule that it would have gone by.
pub(crate) fn inward(
    rules: &[Rule],
    own_hop: &str,
    packet: Packet,
) -> Result<Inward, (Option<usize>, DropReason)> {
    let unmapped = (None, DropReason::Unmapped);
    let topic = TopicName::try_from(&*packet.topic).map_err(|_| unmapped)?;
    let mut mapped = rules.iter().enumerate();
    let (index, topic) = mapped
        .find_map(|(index, rule)| Some((index, rule.map_in(&topic)?)))
        .ok_or(unmapped)?;
    let rule = &rules[index];
    let mut properties = packet.properties;
    add_hop(&mut properties.hops, own_hop).map_err(|refusal| (Some(index), refusal.into()))?;
    let qos = packet.qos.min(rule.qos_cap);
    let publish = Publish::new(topic, packet.payload)
        .qos(qos)
        .retain(rule.retain.apply(packet.retain))
        .class(Class::Normal)
        .durability(rule.durability)
        .properties(properties);
    Ok(Inward {
        rule: index,
        qos,
        publish,
    })
}

/// A message of the fabric, as it goes to the remote.
pub(crate) fn outward(rule: &Rule, own_hop: &str, message: &Message) -> Result<Packet, DropReason> {
    let topic = rule.map_out(&message.topic).ok_or(DropReason::Unmapped)?;
    let mut properties = message.properties().clone();
    add_hop(&mut properties.hops, own_hop)?;
    Ok(Packet {
        topic: Bytes::copy_from_slice(topic.as_str().as_bytes()),
        payload: message.payload.clone(),
        qos: message.qos.min(rule.qos_cap),
        retain: rule.retain.apply(message.retain),
        properties,
    })
}

/// A message on its way to the remote. Dropping it without an acknowledgement leaves it to the
/// fabric to deliver it again.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) rule: usize,
    pub(crate) packet: Packet,
    /// When its lifetime ends.
    pub(crate) expires: Option<Instant>,
    message: Message,
    _in_flight: InFlight,
    _room: OwnedSemaphorePermit,
}

impl Outbound {
    /// The fabric need not keep the message any longer.
    pub(crate) fn acknowledge(mut self) {
        self.message.ack();
    }
}

/// Takes the messages of one outward rule from the fabric.
pub(crate) struct OutwardTask {
    pub(crate) rule: Rule,
    pub(crate) index: usize,
    pub(crate) own_hop: Arc<str>,
    pub(crate) record: Record,
    pub(crate) subscription: Subscription,
    /// Where messages go; bounded, and when it is full the task waits, so that the fabric keeps them.
    pub(crate) outbox: mpsc::Sender<Outbound>,
    /// Room in bytes, shared by the rules of the remote; when there is none the task waits.
    pub(crate) room: Arc<Semaphore>,
    pub(crate) room_bytes: u32,
    pub(crate) shutdown: CancellationToken,
}

impl OutwardTask {
    /// Runs until the shutdown or the end of the subscription. Gives the subscription back, since
    /// dropping it before the client is closed would take it out of the session.
    pub(crate) async fn run(mut self) -> Subscription {
        let shutdown = self.shutdown.clone();
        let _ended = shutdown.run_until_cancelled(self.forward()).await;
        self.subscription
    }

    async fn forward(&mut self) {
        while let Some(mut message) = self.subscription.next().await {
            let packet = match outward(&self.rule, &self.own_hop, &message) {
                Ok(packet) => packet,
                Err(reason) => {
                    self.record.dropped(Some(self.index), reason, None);
                    message.ack();
                    continue;
                }
            };
            if packet.qos == Qos::AtMostOnce && !self.record.is_connected() {
                let reason = DropReason::Disconnected;
                self.record.dropped(Some(self.index), reason, None);
                message.ack();
                continue;
            }
            let in_flight = self.record.set_out(self.index);
            let expiry = packet.properties.expiry;
            let expires = expiry.and_then(|expiry| Instant::now().checked_add(expiry));
            // A message larger than all the room goes alone.
            let bytes = u32::try_from(packet.bytes()).unwrap_or(u32::MAX);
            let bytes = bytes.min(self.room_bytes);
            let Ok(room) = Arc::clone(&self.room).acquire_many_owned(bytes).await else {
                return;
            };
            let outbound = Outbound {
                rule: self.index,
                packet,
                expires,
                message,
                _in_flight: in_flight,
                _room: room,
            };
            if self.outbox.send(outbound).await.is_err() {
                return;
            }
        }
        let reason = match self.subscription.end() {
            Some(status) => format!("the fabric ended the subscription: {status}"),
            None => "the connection to the fabric is closed".to_owned(),
        };
        tracing::error!(rule = %self.rule, %reason, "nothing more is carried out by this rule");
        self.record.rule_error(self.index, reason);
    }
}

/// What the fabric made of a message.
#[derive(Debug)]
pub(crate) enum Taken {
    /// The fabric has it as safe as the rule demands.
    Yes,
    /// The fabric will never take it.
    Dropped(DropReason, String),
    /// The client is closed: somebody else must try again.
    No(String),
}

/// Gives the fabric a message, again and again while the fabric is only busy.
pub(crate) async fn give_to_fabric(
    fabric: Client,
    inward: Inward,
    record: Record,
    in_flight: InFlight,
) -> Taken {
    let Inward { rule, qos, publish } = inward;
    let mut backoff = Backoff::new(Reconnect {
        min: RETRY_MIN,
        max: RETRY_MAX,
    });
    loop {
        let error = match fabric.publish_message(publish.clone()).await {
            Ok(_) => {
                drop(in_flight);
                return Taken::Yes;
            }
            Err(error) => error,
        };
        let message = error.to_string();
        let reason = match error {
            PublishError::Closed(_) => return Taken::No(message),
            PublishError::Refused(status) if qos > Qos::AtMostOnce && is_passing(status.code) => {
                record.rule_error(rule, message);
                let delay = backoff.delay(rand::random());
                let after = status.retry_after.unwrap_or_default();
                tokio::time::sleep(after.saturating_add(delay)).await;
                continue;
            }
            PublishError::Disconnected => DropReason::Disconnected,
            PublishError::TooLarge { .. } => DropReason::TooLarge,
            _ => DropReason::Refused,
        };
        return Taken::Dropped(reason, message);
    }
}

/// Whether the same message may be taken later.
fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Aborted
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::mapping::{Direction, Retain};
    use crate::properties::MAX_HOPS;

    const OWN: &str = "spiffe://example.test/acme/site/bridge#plant";

    fn packet(topic: &'static [u8], hops: Vec<String>) -> Packet {
        Packet {
            topic: Bytes::from_static(topic),
            payload: Bytes::from_static(b"21"),
            qos: Qos::ExactlyOnce,
            retain: true,
            properties: Properties {
                hops,
                ..Properties::default()
            },
        }
    }

    fn rules() -> Vec<Rule> {
        let mut capped = Rule::new(Direction::In, "a/#", "", "x/").unwrap();
        capped.qos_cap = Qos::AtMostOnce;
        capped.retain = Retain::Clear;
        vec![
            Rule::new(Direction::Out, "#", "", "").unwrap(),
            capped,
            Rule::new(Direction::In, "b/#", "", "x/").unwrap(),
        ]
    }

    fn refusal(packet: Packet) -> (Option<usize>, DropReason) {
        inward(&rules(), OWN, packet).unwrap_err()
    }

    #[test]
    fn the_rule_that_maps_decides_name_quality_and_retain() {
        let carried = inward(&rules(), OWN, packet(b"a/1", vec![])).unwrap();
        assert_eq!((carried.rule, carried.qos), (1, Qos::AtMostOnce));
        let text = format!("{:?}", carried.publish);
        assert!(
            text.contains("x/a/1") && text.contains("retain: false"),
            "{text}"
        );
        let carried = inward(&rules(), OWN, packet(b"b/1", vec!["other".into()])).unwrap();
        assert_eq!((carried.rule, carried.qos), (2, Qos::AtLeastOnce));
        let text = format!("{:?}", carried.publish);
        assert!(text.contains("retain: true"), "{text}");
        assert!(
            text.contains(&format!("hops: [\"other\", {OWN:?}]")),
            "{text}"
        );
    }

    #[test]
    fn what_no_rule_maps_or_has_been_here_is_dropped() {
        let unmapped = (None, DropReason::Unmapped);
        assert_eq!(refusal(packet(b"c", vec![])), unmapped);
        assert_eq!(refusal(packet(b"\xff", vec![])), unmapped);
        assert_eq!(refusal(packet(b"", vec![])), unmapped);
        let looping = packet(b"a/1", vec!["other".into(), OWN.into()]);
        assert_eq!(refusal(looping), (Some(1), DropReason::Loop));
        let hops = (0..MAX_HOPS).map(|hop| hop.to_string()).collect();
        let travelled = packet(b"a/1", hops);
        assert_eq!(refusal(travelled), (Some(1), DropReason::TooManyHops));
    }
}
