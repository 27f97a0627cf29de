//! Carrying single messages: the checks and changes on the way in and out, and the tasks that take
//! messages from the fabric.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use selvedge_client::{Message, Subscription};
use selvedge_proto::message::{Durability, Properties, Qos};
use selvedge_proto::topic::TopicName;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::mapping::Rule;
use crate::names::Names;
use crate::properties::add_hop;
use crate::spool::record::Stored;
use crate::spool::{Spool, Waiter};
use crate::status::{DropReason, Record};

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
    pub(crate) durability: Durability,
    /// With the topic that it has in the fabric.
    pub(crate) packet: Packet,
}

impl Inward {
    /// As it is kept; `name` makes it the same message when it is given to the fabric again.
    pub(crate) fn stored(self, name: Bytes) -> Stored {
        let taken = SystemTime::now();
        let expiry = self.packet.properties.expiry;
        Stored {
            rule: self.rule,
            taken,
            expires: expiry.and_then(|expiry| taken.checked_add(expiry)),
            durability: self.durability,
            name,
            packet: self.packet,
        }
    }
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
    Ok(Inward {
        rule: index,
        durability: rule.durability,
        packet: Packet {
            topic: Bytes::copy_from_slice(topic.as_str().as_bytes()),
            payload: packet.payload,
            qos: packet.qos.min(rule.qos_cap),
            retain: rule.retain.apply(packet.retain),
            properties,
        },
    })
}

/// A message of the fabric, as it goes to the remote, and its name if it has one: then it may be
/// carried exactly once.
pub(crate) fn outward(
    rule: &Rule,
    own_hop: &str,
    message: &Message,
) -> Result<(Packet, Bytes), DropReason> {
    let topic = rule.map_out(&message.topic).ok_or(DropReason::Unmapped)?;
    let mut properties = message.properties().clone();
    add_hop(&mut properties.hops, own_hop)?;
    // The id is the fabric's own.
    let id = std::mem::take(&mut properties.message_id);
    let mut qos = message.qos.min(rule.qos_cap);
    let mut name = Bytes::new();
    if rule.qos_cap == Qos::ExactlyOnce && message.qos > Qos::AtMostOnce {
        if id.is_empty() {
            // Nothing would tell a second delivery by the fabric from another message.
            qos = Qos::AtLeastOnce;
        } else {
            qos = Qos::ExactlyOnce;
            // The topic, since two rules may carry one message to two places.
            name = [message.publisher.as_bytes(), topic.as_str().as_bytes(), &id]
                .join(&0)
                .into();
        }
    }
    let packet = Packet {
        topic: Bytes::copy_from_slice(topic.as_str().as_bytes()),
        payload: message.payload.clone(),
        qos,
        retain: rule.retain.apply(message.retain),
        properties,
    };
    Ok((packet, name))
}

/// The fabric, which keeps a message until it is acknowledged.
#[derive(Debug)]
pub(crate) struct Owed(Message);

impl Waiter for Owed {
    fn released(mut self) {
        self.0.ack();
    }
}

/// A message on its way to the remote.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) rule: usize,
    pub(crate) packet: Packet,
    /// When its lifetime ends.
    pub(crate) expires: Option<Instant>,
    /// Its number in the queue; none for QoS 0, which is in no queue.
    pub(crate) number: Option<u64>,
}

/// Takes the messages of one outward rule from the fabric.
pub(crate) struct OutwardTask {
    pub(crate) rule: Rule,
    pub(crate) index: usize,
    pub(crate) own_hop: Arc<str>,
    pub(crate) record: Record,
    pub(crate) subscription: Subscription,
    /// Where messages go; when it has no room the task waits, so that the fabric keeps them.
    pub(crate) spool: Spool<Owed>,
    /// What was carried exactly once.
    pub(crate) names: Names,
    /// Where QoS 0 goes; bounded, and when it is full the task waits.
    pub(crate) passing: mpsc::Sender<Outbound>,
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
            let (packet, name) = match outward(&self.rule, &self.own_hop, &message) {
                Ok(packet) => packet,
                Err(reason) => {
                    self.record.dropped(Some(self.index), reason, None);
                    message.ack();
                    continue;
                }
            };
            if packet.qos == Qos::AtMostOnce {
                message.ack();
                if !self.pass(packet).await {
                    return;
                }
                continue;
            }
            if !name.is_empty()
                && let Some(number) = self.names.number(&name)
            {
                self.record.repeated(self.index);
                self.spool.attach(number, Owed(message));
                continue;
            }
            if !self.spool.has_room() {
                self.spool.count_full();
                self.spool.room().await;
            }
            let stored = Inward {
                rule: self.index,
                durability: Durability::Default,
                packet,
            }
            .stored(name.clone());
            let (names, place) = (&self.names, self.spool.place());
            let further = |number| match name.is_empty() {
                true => Vec::new(),
                false => names.add(place, number, &name),
            };
            self.spool.append(stored, Owed(message), further).await;
        }
        let reason = match self.subscription.end() {
            Some(status) => format!("the fabric ended the subscription: {status}"),
            None => "the connection to the fabric is closed".to_owned(),
        };
        tracing::error!(rule = %self.rule, %reason, "nothing more is carried out by this rule");
        self.record.rule_error(self.index, reason);
    }

    /// Sends QoS 0 on its way, if there is one. `false` at the end.
    async fn pass(&self, packet: Packet) -> bool {
        if !self.record.is_connected() {
            let reason = DropReason::Disconnected;
            self.record.dropped(Some(self.index), reason, None);
            return true;
        }
        let expiry = packet.properties.expiry;
        let outbound = Outbound {
            rule: self.index,
            packet,
            expires: expiry.and_then(|expiry| Instant::now().checked_add(expiry)),
            number: None,
        };
        self.passing.send(outbound).await.is_ok()
    }
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
        assert_eq!(carried.rule, 1);
        let expected = Packet {
            qos: Qos::AtMostOnce,
            retain: false,
            ..packet(b"x/a/1", vec![OWN.into()])
        };
        assert_eq!(carried.packet, expected);
        let carried = inward(&rules(), OWN, packet(b"b/1", vec!["other".into()])).unwrap();
        assert_eq!(carried.rule, 2);
        let expected = Packet {
            qos: Qos::AtLeastOnce,
            ..packet(b"x/b/1", vec!["other".into(), OWN.into()])
        };
        assert_eq!(carried.packet, expected);
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
