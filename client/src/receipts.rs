//! Message ids that an application was given, so that it does not get the same message again.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex};

use crate::subscription::Message;
use crate::sync::lock;

/// Ids remembered for one subscription; the oldest are forgotten first. A broker that was killed may
/// deliver again all that its queue held, since acknowledgements are not waited for to be on disk.
const WINDOW: usize = 65_536;

/// Who published a message, and its id.
type Name = (Arc<str>, Box<[u8]>);

/// The ids of the messages that the application of one subscription has taken. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Receipts(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    names: HashSet<Name>,
    order: VecDeque<Name>,
}

/// Notes, when the application acknowledges a message itself, that it has taken it.
#[derive(Debug)]
pub(crate) struct Receipt(Receipts);

impl Receipts {
    /// Whether the broker delivers again what the application has taken before.
    pub(crate) fn has(&self, message: &Message) -> bool {
        let repeated = message.duplicate.then(|| name(message)).flatten();
        repeated.is_some_and(|name| lock(&self.0).names.contains(&name))
    }

    /// The application takes a message.
    pub(crate) fn add(&self, message: &Message) {
        let Some(name) = name(message) else {
            return;
        };
        let mut taken = lock(&self.0);
        if !taken.names.insert(name.clone()) {
            return;
        }
        taken.order.push_back(name);
        if taken.order.len() > WINDOW
            && let Some(oldest) = taken.order.pop_front()
        {
            taken.names.remove(&oldest);
        }
    }

    /// For a message that the application is going to acknowledge; none without an id.
    pub(crate) fn receipt(&self, message: &Message) -> Option<Receipt> {
        has_id(message).then(|| Receipt(self.clone()))
    }
}

impl Receipt {
    /// The application has acknowledged the message.
    pub(crate) fn sign(self, message: &Message) {
        self.0.add(message);
    }
}

fn has_id(message: &Message) -> bool {
    // Only what is acknowledged is delivered again.
    message.ticket.is_some() && !message.properties().message_id.is_empty()
}

/// The id is copied: it would keep all that was received with it in memory.
fn name(message: &Message) -> Option<Name> {
    let id = &message.properties().message_id;
    (!id.is_empty()).then(|| (message.publisher.clone(), id[..].into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use bytes::Bytes;
    use selvedge_proto::message::{Class, Properties, Qos};
    use selvedge_proto::topic::TopicName;

    use super::*;

    fn message(publisher: &str, id: &str, duplicate: bool) -> Message {
        Message {
            topic: TopicName::parse("a").unwrap(),
            publisher: publisher.into(),
            payload: Bytes::new(),
            qos: Qos::AtLeastOnce,
            retain: false,
            duplicate,
            class: Class::Normal,
            properties: Some(Box::new(Properties {
                message_id: Bytes::copy_from_slice(id.as_bytes()),
                ..Properties::default()
            })),
            ticket: None,
            receipt: None,
        }
    }

    #[test]
    fn a_message_is_named_by_publisher_and_id_and_known_only_as_a_duplicate() {
        let receipts = Receipts::default();
        receipts.add(&message("p", "1", false));
        receipts.add(&message("p", "", false));
        assert!(receipts.has(&message("p", "1", true)));
        // The same id again on purpose is the broker's to judge.
        assert!(!receipts.has(&message("p", "1", false)));
        assert!(!receipts.has(&message("p", "2", true)));
        assert!(!receipts.has(&message("q", "1", true)));
        assert!(!receipts.has(&message("p", "", true)));
    }

    #[test]
    fn the_oldest_ids_are_forgotten() {
        let receipts = Receipts::default();
        for number in 0..=WINDOW {
            receipts.add(&message("p", &number.to_string(), false));
            // A second time makes it neither younger nor two.
            receipts.add(&message("p", "0", true));
        }
        assert!(lock(&receipts.0).order.len() <= WINDOW);
        assert!(receipts.has(&message("p", &WINDOW.to_string(), true)));
        assert!(!receipts.has(&message("p", "1", true)));
    }
}
