//! The task that gives the fabric what was taken from a remote.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use selvedge_client::{Backoff, Client, Code, Publish, PublishError, Reconnect, TopicName};
use selvedge_proto::message::{Class, Qos};
use tokio::sync::{oneshot, watch};

use crate::bridge::Joined;
use crate::spool::record::Stored;
use crate::spool::{Spool, Waiter};
use crate::status::{DropReason, Record, Way};

/// Delays between attempts to give the fabric a message that it cannot take just now.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Messages given to the fabric that it has not answered for.
const UNDER_WAY: usize = 1024;
/// Their bytes. Below what a client holds unsent, so that no publish waits for room: two that wait
/// have no order among them.
const UNDER_WAY_BYTES: usize = 512 << 10;

/// The remote, which waits for an acknowledgement.
#[derive(Debug)]
pub(crate) struct Arrived(pub(crate) oneshot::Sender<()>);

impl Waiter for Arrived {
    fn released(self) {
        // The connection it came by may be gone.
        let _ = self.0.send(());
    }
}

/// What the task needs.
pub(crate) struct InwardTask {
    pub(crate) spool: Spool<Arrived>,
    pub(crate) fabric: watch::Receiver<Joined>,
    pub(crate) record: Record,
}

/// What became of one message.
struct Given {
    number: u64,
    rule: usize,
    bytes: usize,
    taken: Taken,
}

impl InwardTask {
    /// Runs until the client is closed for good.
    pub(crate) async fn run(mut self) {
        let client = match self
            .fabric
            .wait_for(|joined| joined.client().is_some())
            .await
        {
            Ok(joined) => joined.client().cloned(),
            Err(_) => None,
        };
        let Some(client) = client else {
            return;
        };
        let mut state = client.state();
        self.spool
            .set_away(!state.borrow_and_update().is_connected());
        let mut consumer = self.spool.consumer();
        let mut under_way = FuturesUnordered::new();
        let mut bytes = 0;
        let mut closed = false;
        loop {
            let has_room =
                under_way.len() < UNDER_WAY && (bytes < UNDER_WAY_BYTES || under_way.is_empty());
            tokio::select! {
                (number, stored) = consumer.next(), if has_room && !closed => {
                    bytes += stored.bytes();
                    let begun = begin(&client, &self, number, stored).await;
                    under_way.push(begun);
                }
                given = under_way.next(), if !under_way.is_empty() => {
                    let Some(Given { number, rule, bytes: of, taken }) = given else { continue };
                    bytes -= of;
                    match taken {
                        Taken::Yes => self.record.forwarded(rule, Way::In),
                        Taken::Dropped(reason, error) => {
                            self.record.dropped(Some(rule), reason, error);
                        }
                        Taken::No(error) => {
                            // Not settled: the remote or the journal keeps it.
                            self.record.rule_error(rule, error);
                            closed = true;
                            continue;
                        }
                    }
                    self.spool.settle(number, Vec::new()).await;
                }
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.spool.set_away(!state.borrow_and_update().is_connected());
                }
                () = std::future::ready(()), if closed && under_way.is_empty() => return,
            }
        }
    }
}

/// Hands one message to the client, which settles its place in the order.
async fn begin(
    client: &Client,
    task: &InwardTask,
    number: u64,
    stored: Stored,
) -> Pin<Box<dyn Future<Output = Given> + Send>> {
    let (rule, bytes) = (stored.rule, stored.bytes());
    let inherited = task.spool.is_inherited(number);
    let give = give_stored(client.clone(), stored, inherited, task.record.clone());
    let mut give: Pin<Box<dyn Future<Output = Taken> + Send>> = Box::pin(give);
    let at_once = poll_fn(|context| Poll::Ready(give.as_mut().poll(context))).await;
    Box::pin(async move {
        let taken = match at_once {
            Poll::Ready(taken) => taken,
            Poll::Pending => give.await,
        };
        Given {
            number,
            rule,
            bytes,
            taken,
        }
    })
}

async fn give_stored(client: Client, stored: Stored, inherited: bool, record: Record) -> Taken {
    let rule = stored.rule;
    let mut properties = stored.packet.properties.clone();
    if stored.expires.is_some() {
        let left = stored
            .expires_at()
            .map(|expires| expires.saturating_duration_since(Instant::now()));
        match left {
            Some(Duration::ZERO) => return Taken::Dropped(DropReason::Expired, None),
            left => properties.expiry = left,
        }
    }
    let topic = String::from_utf8_lossy(&stored.packet.topic);
    let Ok(topic) = TopicName::parse(&*topic) else {
        return Taken::Dropped(DropReason::Unmapped, None);
    };
    // QoS 2 is the fabric's QoS 1 with an id, by which it takes the message once.
    let qos = stored.packet.qos.min(Qos::AtLeastOnce);
    let publish = Publish::new(topic, stored.packet.payload)
        .qos(qos)
        .retain(stored.packet.retain)
        .class(Class::Normal)
        .durability(stored.durability)
        .properties(properties)
        // What makes receivers know it by its id, should the fabric have died with the id.
        .duplicate(inherited)
        .message_id(stored.name);
    give_to_fabric(client, publish, qos, rule, record).await
}

/// What the fabric made of a message.
#[derive(Debug)]
pub(crate) enum Taken {
    /// The fabric has it as safe as the rule demands.
    Yes,
    /// The fabric will never take it.
    Dropped(DropReason, Option<String>),
    /// The client is closed: somebody else must try again.
    No(String),
}

/// Gives the fabric a message, again and again while the fabric is only busy.
pub(crate) async fn give_to_fabric(
    fabric: Client,
    publish: Publish,
    qos: Qos,
    rule: usize,
    record: Record,
) -> Taken {
    let mut backoff = Backoff::new(Reconnect {
        min: RETRY_MIN,
        max: RETRY_MAX,
    });
    loop {
        let error = match fabric.publish_message(publish.clone()).await {
            Ok(_) => return Taken::Yes,
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
        return Taken::Dropped(reason, Some(message));
    }
}

/// Whether the same message may be taken later.
fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Aborted
    )
}
