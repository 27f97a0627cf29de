//! A subscriber with a kept session that wants every message, and that may go away and come back.

use std::time::Duration;

use selvedge_client::{
    Client, ConnectError, Message, Options, SubscribeError, SubscribeOptions, Subscription,
};
use tokio::sync::watch;

use super::book::Book;
use super::ledger::{Delivery, ReaderId};
use super::message;

/// How long a session is kept: longer than any check.
pub(crate) const EXPIRY: Duration = Duration::from_secs(24 * 3600);

/// Whether a reader is to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// It reads.
    Here,
    /// It is gone, and its session is not.
    Away,
    /// It is gone for good.
    Done,
}

/// What one reader does.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) id: ReaderId,
    pub(crate) options: Options,
    pub(crate) filter: String,
    /// It acknowledges what it has entered, instead of what it has taken.
    pub(crate) manual_ack: bool,
    pub(crate) book: Book,
    /// What it is to be.
    pub(crate) wanted: watch::Receiver<Presence>,
    /// What it is.
    pub(crate) reached: watch::Sender<Presence>,
}

/// Why a reader gave up.
#[derive(Debug, thiserror::Error)]
pub enum ReaderError {
    /// It cannot connect.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It cannot subscribe.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
    /// Its subscription has ended, which nobody asked for.
    #[error("the subscription ended: {why}")]
    Ended {
        /// The broker's reason, if it gave one.
        why: String,
    },
}

impl Reader {
    /// Reads whenever it is to be there.
    pub(crate) async fn run(mut self) -> Result<(), ReaderError> {
        let mut first = true;
        loop {
            let wanted = *self.wanted.borrow_and_update();
            match wanted {
                Presence::Here => {}
                Presence::Away => {
                    // The sender outlives the readers.
                    let _ = self.wanted.changed().await;
                    continue;
                }
                Presence::Done => return Ok(()),
            }
            let client = Client::connect(self.options.clone()).await?;
            if !first {
                self.book
                    .enter(|ledger| ledger.reader_reconnected(self.id, 1));
            }
            first = false;
            let options = SubscribeOptions {
                manual_ack: self.manual_ack,
                ..SubscribeOptions::default()
            };
            let subscription = client.subscribe_with(&self.filter, options).await?;
            self.reached.send_replace(Presence::Here);
            self.read(subscription, &client).await?;
            self.reached.send_replace(*self.wanted.borrow());
        }
    }

    /// Reads until it is to go.
    async fn read(
        &mut self,
        mut subscription: Subscription,
        client: &Client,
    ) -> Result<(), ReaderError> {
        let ended = loop {
            tokio::select! {
                message = subscription.next() => match message {
                    Some(message) => self.enter(message),
                    None => break true,
                },
                _ = self.wanted.changed() => break false,
            }
        };
        let reconnects = client.stats().reconnects;
        self.book
            .enter(|ledger| ledger.reader_reconnected(self.id, reconnects));
        // Closed before the subscription is dropped, so that the session keeps it.
        client.close().await;
        if ended {
            let why = subscription.end();
            let why = why.map_or_else(|| "no reason given".to_owned(), |why| why.to_string());
            return Err(ReaderError::Ended { why });
        }
        Ok(())
    }

    fn enter(&self, mut message: Message) {
        let (publisher, topic) = (&*message.publisher, message.topic.as_str());
        match message::decode(&message.payload) {
            Ok((stream, number)) => {
                let delivery = Delivery {
                    stream,
                    number,
                    publisher,
                    topic,
                    duplicate: message.duplicate,
                };
                self.book
                    .enter(|ledger| ledger.delivered(self.id, &delivery));
            }
            Err(why) => self
                .book
                .enter(|ledger| ledger.damaged(self.id, publisher, topic, &why)),
        }
        if self.manual_ack {
            message.ack();
        }
    }
}
