//! A client that publishes numbered messages, with some on their way at any time.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rand::Rng as _;
use rand::rngs::StdRng;
use selvedge_client::{
    Client, ConnectError, Durability, Options, Publish, PublishAck, PublishError, Qos,
};
use tokio_util::sync::CancellationToken;

use super::book::Book;
use super::ledger::StreamId;
use super::message;

/// Bytes on their way. Below what the client holds unsent, so that no publish waits for room: two
/// that wait have no order among them.
const WINDOW_BYTES: usize = 256 * 1024;
/// A refused publisher waits so long if the broker names no time.
const AFTER_REFUSAL: Duration = Duration::from_millis(20);

/// What one publisher does.
#[derive(Debug)]
pub(crate) struct Publisher {
    pub(crate) options: Options,
    pub(crate) streams: Vec<(StreamId, String)>,
    pub(crate) demand: Durability,
    /// Its messages have ids, so that the broker takes none of them twice.
    pub(crate) with_ids: bool,
    /// Messages on their way.
    pub(crate) window: usize,
    pub(crate) random: StdRng,
    pub(crate) book: Book,
    /// Nothing new is to be published, except for one last message on each stream.
    pub(crate) enough: CancellationToken,
}

/// The answer to one message.
struct Answer {
    stream: StreamId,
    number: u64,
    bytes: usize,
    answer: Result<PublishAck, PublishError>,
}

/// Why a publisher gave up.
#[derive(Debug, thiserror::Error)]
pub enum PublisherError {
    /// It cannot connect.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Its client did not do as its documentation says.
    #[error("number {number} of stream {}: {error}", stream.0)]
    Publish {
        /// Of what.
        stream: StreamId,
        /// Which.
        number: u64,
        /// What came of it.
        error: PublishError,
    },
}

impl Publisher {
    /// Publishes until there is enough and everything is answered.
    pub(crate) async fn run(mut self) -> Result<(), PublisherError> {
        let client = Client::connect(self.options.clone()).await?;
        let mut waiting = FuturesUnordered::new();
        let mut bytes = 0;
        loop {
            let stopping = self.enough.is_cancelled();
            while !stopping && waiting.len() < self.window && bytes < WINDOW_BYTES {
                let place = self.random.random_range(0..self.streams.len());
                let sent = self.publish(&client, place).await;
                bytes += sent.0;
                waiting.push(sent.1);
            }
            tokio::select! {
                answer = waiting.next() => match answer {
                    Some(answer) => {
                        bytes -= answer.bytes;
                        if let Some(pause) = self.note(answer)? {
                            tokio::time::sleep(pause).await;
                        }
                    }
                    None => break,
                },
                () = self.enough.cancelled(), if !stopping => {}
            }
        }
        for place in 0..self.streams.len() {
            // One that is refused is not the last.
            loop {
                let (_, sent) = self.publish(&client, place).await;
                match self.note(sent.await)? {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => break,
                }
            }
        }
        let reconnects = client.stats().reconnects;
        self.book.enter(|ledger| {
            for (stream, _) in &self.streams {
                ledger.publisher_reconnected(*stream, reconnects);
            }
        });
        client.close().await;
        Ok(())
    }

    /// Hands one message to the client. Answers with its bytes and what becomes of it.
    async fn publish(
        &self,
        client: &Client,
        place: usize,
    ) -> (usize, Pin<Box<dyn Future<Output = Answer> + Send>>) {
        let (stream, topic) = &self.streams[place];
        let stream = *stream;
        let number = self
            .book
            // Every reader has a kept session and the broker has a store, so its default is disk.
            .enter(|ledger| ledger.published(stream, Durability::Disk));
        let payload = message::encode(stream, number);
        let bytes = payload.len();
        let mut message = Publish::new(topic, payload)
            .qos(Qos::AtLeastOnce)
            .durability(self.demand);
        if self.with_ids {
            message = message.message_id(format!("{}:{number}", stream.0));
        }
        let client = client.clone();
        let mut answer = Box::pin(async move { client.publish_message(message).await });
        // The client takes a message when its future is first polled, which settles the order.
        let at_once = poll_fn(|context| Poll::Ready(answer.as_mut().poll(context))).await;
        let answer = async move {
            let answer = match at_once {
                Poll::Ready(answer) => answer,
                Poll::Pending => answer.await,
            };
            Answer {
                stream,
                number,
                bytes,
                answer,
            }
        };
        (bytes, Box::pin(answer))
    }

    /// Enters an answer. Says how long to wait if it is a refusal.
    fn note(&self, answer: Answer) -> Result<Option<Duration>, PublisherError> {
        let Answer { stream, number, .. } = answer;
        match answer.answer {
            Ok(ack) => {
                self.book
                    .enter(|ledger| ledger.acked(stream, number, ack.durability));
                Ok(None)
            }
            Err(PublishError::Refused(status)) => {
                self.book.enter(|ledger| ledger.refused(stream, number));
                Ok(Some(status.retry_after.unwrap_or(AFTER_REFUSAL)))
            }
            Err(error) => Err(PublisherError::Publish {
                stream,
                number,
                error,
            }),
        }
    }
}
