//! Packet ids of an MQTT session: what was sent and is not acknowledged, and what the client has
//! published and not released. They outlive connections; at QoS 2 in a kept session also the process.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use selvedge_proto::message::Qos;

use crate::store::{PacketKey, Store, StoredPacket};

/// What a packet id of the broker stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// A message was sent and is not acknowledged.
    Message {
        /// Address of its queue, which the connection keeps.
        queue: usize,
        /// Number of the message in that queue.
        number: u64,
        /// At QoS 2.
        exactly_once: bool,
    },
    /// A message of an earlier connection, which waits in its queue to be sent again with this id.
    Again,
    /// The client has the message and has not answered the PUBREL, which was sent on this connection.
    Released {
        /// The message was sent on this connection, and so counts against its receive maximum.
        counts: bool,
    },
}

/// What came of the packet id of a QoS 2 PUBLISH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Receipt {
    /// Its message is a new one.
    New,
    /// Its message was taken before.
    Again,
    /// The client has as many in progress as it may.
    TooMany,
    /// Another connection has the session.
    Stale,
}

/// The packet ids of one session.
#[derive(Debug, Default)]
pub(crate) struct Packets {
    /// The connection that they are for; another one is stale.
    epoch: u64,
    /// Where ids of QoS 2 are kept, with the number of the session, if it is a kept one.
    kept: Option<(Store, u64)>,
    /// Ids of QoS 2 messages that were taken and not released. At most the receive maximum.
    received: HashSet<u16>,
    /// What the id `index + 1` stands for. Grows to what was ever in use at once.
    slots: Vec<Option<Sent>>,
    /// Ids below the highest one that are free, in the order they became so.
    free: VecDeque<u16>,
    /// Messages of this connection that are not acknowledged, and the most there may be.
    sent: u16,
    limit: u16,
    /// A connection of MQTT has or had the session.
    in_use: bool,
}

impl Packets {
    /// Says that a connection of MQTT has the session, which takes `limit` messages at once. `false`
    /// when another one has it by now.
    pub(crate) fn open(&mut self, epoch: u64, limit: u16) -> bool {
        if self.epoch != epoch {
            return false;
        }
        self.in_use = true;
        self.limit = limit;
        true
    }

    /// Whether they are for the connection of this number.
    pub(crate) fn are_for(&self, epoch: u64) -> bool {
        self.epoch == epoch
    }

    /// Whether a connection of MQTT ever had the session.
    pub(crate) fn in_use(&self) -> bool {
        self.in_use
    }

    /// The messages that the connection has sent and that are not acknowledged, by queue and number,
    /// with their ids. The queues have them to take care of from then on.
    pub(crate) fn hand_over(&mut self) -> HashMap<usize, BTreeMap<u64, u16>> {
        let mut queues: HashMap<usize, BTreeMap<u64, u16>> = HashMap::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if let Some(Sent::Message { queue, number, .. }) = *slot {
                // There are no more than 65,535 slots.
                let id = u16::try_from(index + 1).unwrap_or(u16::MAX);
                queues.entry(queue).or_default().insert(number, id);
                *slot = Some(Sent::Again);
            }
        }
        queues
    }

    /// Begins with a new connection: `again` are the ids that messages wait to be sent again with.
    pub(crate) fn begin(&mut self, epoch: u64, kept: Option<(Store, u64)>, again: &[u16]) {
        self.epoch = epoch;
        if let (None, Some((store, session))) = (&self.kept, &kept) {
            for packet in self.unfinished() {
                store.put(crate::store::Change::PutPacket(*session, packet));
            }
        }
        self.kept = kept;
        self.sent = 0;
        let released = self.released();
        self.slots.clear();
        self.free.clear();
        for id in released {
            self.occupy(id, Sent::Released { counts: false });
        }
        for id in again {
            self.occupy(*id, Sent::Again);
        }
    }

    /// Puts an id back that was kept.
    pub(crate) fn restore(&mut self, packet: StoredPacket) {
        self.in_use = true;
        match packet {
            StoredPacket::Received(id) => {
                self.received.insert(id);
            }
            StoredPacket::Released(id) => self.occupy(id, Sent::Released { counts: false }),
            StoredPacket::Sent(id, _) => self.occupy(id, Sent::Again),
        }
    }

    /// Ids for which the client is owed a PUBREL.
    pub(crate) fn released(&self) -> Vec<u16> {
        let ids = (1..=u16::MAX).zip(&self.slots);
        ids.filter(|(_, slot)| matches!(slot, Some(Sent::Released { .. })))
            .map(|(id, _)| id)
            .collect()
    }

    /// Where QoS 2 is kept, if the session is a kept one.
    pub(crate) fn store(&self) -> Option<&Store> {
        self.kept.as_ref().map(|(store, _)| store)
    }

    /// Keeps an id in the store, if the session is kept there.
    pub(crate) fn keep(&self, packet: StoredPacket) {
        if let Some((store, session)) = &self.kept {
            store.put(crate::store::Change::PutPacket(*session, packet));
        }
    }

    /// Takes an id out of the store.
    pub(crate) fn drop_kept(&self, key: PacketKey) {
        if let Some((store, session)) = &self.kept {
            store.put(crate::store::Change::RemovePacket(*session, key));
        }
    }

    /// Whether the client has as many messages as it takes.
    pub(crate) fn is_full(&self) -> bool {
        self.sent >= self.limit
    }

    /// An id for a message that is sent now; `None` when the client has as many as it takes.
    pub(crate) fn send(&mut self, queue: usize, number: u64, qos: Qos) -> Option<u16> {
        if self.is_full() {
            return None;
        }
        let id = match self.free.pop_front() {
            Some(id) => id,
            None => {
                let id = u16::try_from(self.slots.len() + 1).ok()?;
                self.slots.push(None);
                id
            }
        };
        self.put(id, queue, number, qos);
        Some(id)
    }

    /// The message of this id is sent again. The caller has made sure of room.
    pub(crate) fn send_again(&mut self, id: u16, queue: usize, number: u64, qos: Qos) {
        self.occupy(id, Sent::Again);
        self.put(id, queue, number, qos);
    }

    fn put(&mut self, id: u16, queue: usize, number: u64, qos: Qos) {
        self.sent += 1;
        self.slots[usize::from(id) - 1] = Some(Sent::Message {
            queue,
            number,
            exactly_once: qos == Qos::ExactlyOnce,
        });
    }

    /// What an id stands for.
    pub(crate) fn get(&self, id: u16) -> Option<Sent> {
        *self.slots.get(usize::from(id).checked_sub(1)?)?
    }

    /// Frees an id.
    pub(crate) fn finish(&mut self, id: u16) {
        let index = usize::from(id).checked_sub(1);
        let Some(slot) = index.and_then(|index| self.slots.get_mut(index)) else {
            return;
        };
        let Some(sent) = slot.take() else {
            return;
        };
        self.free.push_back(id);
        if !matches!(sent, Sent::Again | Sent::Released { counts: false }) {
            self.sent = self.sent.saturating_sub(1);
        }
    }

    /// The client has the message of this id.
    pub(crate) fn release(&mut self, id: u16) {
        let index = usize::from(id).checked_sub(1);
        if let Some(slot) = index.and_then(|index| self.slots.get_mut(index)) {
            *slot = Some(Sent::Released { counts: true });
        }
    }

    /// Takes note of a QoS 2 PUBLISH of the client, which may have `most` in progress.
    pub(crate) fn receive(&mut self, epoch: u64, id: u16, most: u16) -> Receipt {
        if self.epoch != epoch {
            Receipt::Stale
        } else if self.received.contains(&id) {
            Receipt::Again
        } else if self.received.len() >= usize::from(most) {
            Receipt::TooMany
        } else {
            self.received.insert(id);
            Receipt::New
        }
    }

    /// The client is done with the id of a PUBLISH; `false` when it was not in use.
    pub(crate) fn forget(&mut self, epoch: u64, id: u16) -> bool {
        self.epoch == epoch && self.received.remove(&id)
    }

    /// What the store has to know of a session that becomes a kept one.
    fn unfinished(&self) -> Vec<StoredPacket> {
        let received = self.received.iter().copied().map(StoredPacket::Received);
        let released = self.released().into_iter().map(StoredPacket::Released);
        received.chain(released).collect()
    }

    fn occupy(&mut self, id: u16, sent: Sent) {
        let Some(index) = usize::from(id).checked_sub(1) else {
            return;
        };
        while self.slots.len() <= index {
            self.slots.push(None);
            // The one that is asked for is taken out below.
            let added = u16::try_from(self.slots.len()).unwrap_or(u16::MAX);
            self.free.push_back(added);
        }
        if self.slots[index].replace(sent).is_none() {
            self.free.retain(|free| *free != id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn opened(limit: u16) -> Packets {
        let mut packets = Packets::default();
        assert!(packets.open(0, limit));
        packets
    }

    #[test]
    fn ids_are_bounded_and_come_round_in_order() {
        let mut packets = opened(2);
        assert_eq!(packets.send(1, 1, Qos::AtLeastOnce), Some(1));
        assert_eq!(packets.send(1, 2, Qos::AtLeastOnce), Some(2));
        assert_eq!(
            (packets.send(1, 3, Qos::AtLeastOnce), packets.is_full()),
            (None, true)
        );
        assert_eq!((packets.get(0), packets.get(3)), (None, None));
        packets.finish(2);
        packets.finish(2);
        packets.finish(1);
        assert_eq!(packets.send(1, 3, Qos::AtLeastOnce), Some(2));
        assert_eq!(packets.send(1, 4, Qos::AtLeastOnce), Some(1));
        assert!(packets.is_full());
    }

    #[test]
    fn a_new_connection_gives_no_id_twice_that_the_client_may_still_know() {
        let mut packets = opened(10);
        for number in 1..=4 {
            packets.send(7, number, Qos::ExactlyOnce);
        }
        packets.release(2);
        packets.finish(3);
        let sent = packets.hand_over();
        assert_eq!(sent[&7], BTreeMap::from([(1, 1), (4, 4)]));
        packets.begin(1, None, &[1, 4]);
        assert!(!packets.open(0, 2));
        assert!(packets.open(1, 2));
        assert_eq!(packets.released(), [2]);
        assert_eq!(packets.send(7, 9, Qos::ExactlyOnce), Some(3));
        packets.send_again(1, 7, 1, Qos::ExactlyOnce);
        // What an earlier connection has sent does not count.
        assert!(packets.is_full());
        packets.finish(2);
        assert!(packets.is_full());
        packets.finish(1);
        assert!(!packets.is_full());
    }

    #[test]
    fn an_id_of_the_client_is_new_once_until_it_is_released() {
        let mut packets = opened(1);
        assert_eq!(packets.receive(0, 5, 1), Receipt::New);
        assert_eq!(packets.receive(0, 5, 1), Receipt::Again);
        assert_eq!(packets.receive(0, 6, 1), Receipt::TooMany);
        assert_eq!(packets.receive(1, 6, 1), Receipt::Stale);
        assert!(packets.forget(0, 5));
        assert!(!packets.forget(0, 5));
        assert_eq!(packets.receive(0, 5, 1), Receipt::New);
    }

    proptest! {
        #[test]
        fn an_id_is_never_in_use_twice(steps in prop::collection::vec((0..4u8, 1..40u16), 1..200)) {
            let mut packets = opened(20);
            let mut used = BTreeSet::new();
            let mut epoch = 0;
            for (number, (step, id)) in (1u64..).zip(steps) {
                match step {
                    0 | 1 => if let Some(id) = packets.send(1, number * 1000, Qos::ExactlyOnce) {
                        prop_assert!(used.insert(id), "{id} was in use");
                    },
                    2 => { packets.finish(id); used.remove(&id); }
                    _ if used.len() < 15 => {
                        let again: Vec<u16> = packets
                            .hand_over()
                            .values()
                            .flat_map(|ids| ids.values().copied())
                            .collect();
                        epoch += 1;
                        packets.begin(epoch, None, &again);
                        packets.open(epoch, 20);
                        for id in again {
                            packets.send_again(id, 1, number * 1000 + u64::from(id), Qos::ExactlyOnce);
                        }
                    }
                    _ => if used.contains(&id) { packets.release(id); },
                }
            }
        }
    }
}
