//! The task that owns the connection: connects, restores, reconnects, closes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use selvedge_certs::explain_connection_error;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::message::{Class, Durability};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::ack::PendingAcks;
use crate::backoff::Backoff;
use crate::client::{Link, Shared};
use crate::datagram;
use crate::delivery;
use crate::exchange;
use crate::framed::FramedReader;
use crate::lane::Lane;
use crate::options::{Options, Reconnect};
use crate::state::State;
use crate::stats::count;
use crate::sync::lock;

pub(crate) use connect::MAX_INCOMING_CALLS;
use connect::{Connector, Established, Failed};

mod connect;

/// How long the application has, after it is started again on a kept session, to make the
/// subscriptions that the session has messages for.
const INHERITANCE: Duration = Duration::from_secs(30);
/// How long a client that ends waits for the broker to take what is queued.
const FLUSH_TIME: Duration = Duration::from_secs(3);
/// Why a client ends when its session lives on elsewhere.
const TAKEN_OVER: &str = "another connection has taken the session over";
/// How long a client that ends waits for the broker's goodbye.
const GOODBYE_TIME: Duration = Duration::from_secs(1);

/// Why the first connection was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Something that every client needs was not given.
    #[error("{missing} not given: {remedy}")]
    Incomplete {
        /// What is missing.
        missing: &'static str,
        /// How to give it.
        remedy: &'static str,
    },
    /// The options do not fit together.
    #[error("cannot use these options: {reason}")]
    Options {
        /// What is wrong.
        reason: String,
    },
    /// The host name has no address.
    #[error("cannot resolve {host}: {reason}")]
    Resolve {
        /// The host.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// No socket can send to that address.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// The address.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// Nobody answered in time.
    #[error("no answer from {address} within {after:?}: {last}")]
    Timeout {
        /// The address.
        address: String,
        /// How long was tried.
        after: Duration,
        /// How the last attempt failed.
        last: String,
    },
    /// This client does not accept the broker's certificate or TLS.
    #[error("this client refused the broker: {reason}")]
    Tls {
        /// What is wrong with it.
        reason: String,
    },
    /// The broker does not accept the client's certificate or TLS.
    #[error("the broker refused this client: {reason}")]
    Refused {
        /// What the broker said.
        reason: String,
    },
    /// The broker said goodbye instead of welcome.
    #[error("the broker said goodbye: {0}")]
    Goodbye(Status),
    /// The broker does not speak the protocol.
    #[error("the broker does not speak selvedge/1 as expected: {reason}")]
    Protocol {
        /// What it did.
        reason: String,
    },
    /// The connection broke before the broker's welcome.
    #[error("the connection was lost: {reason}")]
    Lost {
        /// How.
        reason: String,
    },
}

/// Makes the first connection and starts the task that keeps it.
pub(crate) async fn start(options: Options) -> Result<Arc<Shared>, ConnectError> {
    let mut connector = Connector::new(&options)?;
    let identity = connector.identity();
    let mut backoff = Backoff::new(options.reconnect);
    let until = Instant::now() + options.connect_timeout;
    let shared = Arc::new(Shared::new(options, identity));
    let mut target = shared.settings.broker.clone();
    let mut attempt = 0;
    let mut last = None;
    let established = loop {
        let left = until.saturating_duration_since(Instant::now());
        let failed = if left.is_zero() {
            None
        } else {
            attempt += 1;
            let clean = shared.settings.clean_start;
            let within = attempt_time(attempt).min(left);
            match connector.establish(&target, clean, within).await {
                Ok(established) => break established,
                Err(failed) => Some(failed),
            }
        };
        let Some(failed) = failed else {
            return Err(match last {
                // A broker that answered says more than that time is up.
                Some(error @ (ConnectError::Goodbye(_) | ConnectError::Resolve { .. })) => error,
                last => ConnectError::Timeout {
                    address: shared.settings.broker.to_string(),
                    after: shared.settings.connect_timeout,
                    last: last.map_or_else(|| "no attempt was made".to_owned(), |e| e.to_string()),
                },
            });
        };
        if failed.is_final() {
            return Err(failed.error);
        }
        tracing::debug!(error = %failed.error, attempt, "cannot connect yet");
        let delay = next_delay(&mut backoff, &failed);
        target = failed
            .alternate
            .unwrap_or_else(|| shared.settings.broker.clone());
        // What the broker answered says more than that a later attempt got no answer.
        let answered = matches!(&last, Some(ConnectError::Goodbye(_)));
        if !(answered && matches!(&failed.error, ConnectError::Timeout { .. })) {
            last = Some(failed.error);
        }
        tokio::time::sleep_until((Instant::now() + delay).min(until)).await;
    };
    if established.welcome.session_present {
        shared.control.inherit(Instant::now() + INHERITANCE);
    }
    let driver = Driver {
        shared: shared.clone(),
        connector,
        backoff,
    };
    tokio::spawn(driver.run(established));
    // The application is to find the client connected.
    let mut state = shared.state.subscribe();
    let begun = |state: &State| !matches!(state, State::Connecting { .. });
    // The sender lives as long as `shared`.
    let _ = state.wait_for(begun).await;
    Ok(shared)
}

/// How long an attempt may take: little at first, since the first packet may be lost or the broker
/// just be starting, more later, since the path may be slow.
fn attempt_time(attempt: u32) -> Duration {
    match attempt {
        0 | 1 => Duration::from_secs(3),
        2 => Duration::from_secs(6),
        _ => Duration::from_secs(10),
    }
}

fn next_delay(backoff: &mut Backoff, failed: &Failed) -> Duration {
    match failed.retry_after {
        // The broker has given each client its own slot.
        Some(slot) => slot,
        None => backoff.delay(rand::random()),
    }
}

/// How a connection ended.
enum End {
    /// It broke, or either side broke the protocol.
    Lost(String),
    /// The broker said goodbye.
    Goodbye(wire::Goodbye),
    /// The application ended the client.
    Closed,
}

struct Driver {
    shared: Arc<Shared>,
    connector: Connector,
    backoff: Backoff,
}

impl Driver {
    async fn run(mut self, mut established: Established) {
        let reason: Arc<str> = loop {
            let end = self.connection(established).await;
            self.backoff.lost(std::time::Instant::now());
            let mut failed = match end {
                End::Closed => break "closed by the application".into(),
                End::Lost(reason) => Failed::lost(reason),
                End::Goodbye(goodbye) => {
                    let failed = Failed::goodbye(goodbye);
                    if failed.is_takeover() {
                        break TAKEN_OVER.into();
                    }
                    failed
                }
            };
            let Some(again) = self.reconnect(&mut failed).await else {
                break match failed.is_takeover() {
                    true => TAKEN_OVER.into(),
                    false => "closed by the application".into(),
                };
            };
            count(&self.shared.counters.reconnects, 1);
            established = again;
        };
        let shared = &self.shared;
        tracing::debug!(%reason, "the client ends");
        shared.state.send_replace(State::Closed {
            reason: reason.clone(),
        });
        for lane in &shared.lanes {
            lane.close(&reason);
        }
        shared.control.close(&reason);
        lock(&shared.marks).clear();
        shared.ended.cancel();
    }

    /// Tries until it works. `None` when the client is to end.
    async fn reconnect(&mut self, failed: &mut Failed) -> Option<Established> {
        let shared = self.shared.clone();
        let mut attempt = 0;
        loop {
            let delay = next_delay(&mut self.backoff, failed);
            tracing::debug!(reason = %failed.error, ?delay, "disconnected");
            shared.state.send_replace(State::Disconnected {
                reason: failed.error.to_string().into(),
                retry_in: delay,
            });
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = shared.closing.cancelled() => return None,
            }
            attempt += 1;
            shared.state.send_replace(State::Connecting { attempt });
            let target = failed.alternate.take();
            let target = target.unwrap_or_else(|| shared.settings.broker.clone());
            let within = attempt_time(attempt);
            tokio::select! {
                result = self.connector.establish(&target, false, within) => match result {
                    Ok(established) => return Some(established),
                    Err(next) if next.is_takeover() => {
                        *failed = next;
                        return None;
                    }
                    Err(next) => *failed = next,
                },
                () = shared.closing.cancelled() => return None,
            }
        }
    }

    /// Runs one connection to its end.
    async fn connection(&mut self, established: Established) -> End {
        let Established {
            connection,
            control_send,
            mut control_frames,
            welcome,
        } = established;
        let shared = &self.shared;
        let max_frame = match welcome.max_frame_bytes as usize {
            0 => selvedge_proto::DEFAULT_MAX_FRAME,
            limit => limit.clamp(selvedge_proto::MIN_MAX_FRAME, frame::MAX_FRAME),
        };
        if let Some(advice) = &welcome.reconnect {
            self.backoff.advise(Reconnect {
                min: Duration::from_millis(advice.min_ms.into()),
                max: Duration::from_millis(advice.max_ms.into()),
            });
        }
        self.backoff.connected(std::time::Instant::now());

        let acks = Arc::new(PendingAcks::new(shared.control.wake().clone()));
        shared.control.connected(welcome.session_present);
        for lane in &shared.lanes {
            if !lane.connected(welcome.max_aliases, max_frame) {
                // Marks may have gone with what was queued.
                lock(&shared.marks).clear();
            }
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(write_control(shared.clone(), control_send, acks.clone()));
        for index in 0..shared.lanes.len() {
            let (shared, connection) = (shared.clone(), connection.clone());
            tasks.spawn(async move {
                shared.control.restored().await;
                shared.lanes[index].write(&connection).await
            });
        }
        tasks.spawn(delivery::accept(shared.clone(), connection.clone(), acks));
        tasks.spawn(datagram::read(shared.clone(), connection.clone()));
        tasks.spawn({
            let (shared, connection) = (shared.clone(), connection.clone());
            async move {
                shared.control.restored().await;
                shared.datagrams.write(&connection).await
            }
        });
        shared.datagrams.connected(connection.clone());
        tasks.spawn(exchange::accept(
            shared.clone(),
            connection.clone(),
            max_frame,
        ));
        shared.link.send_replace(Some(Link {
            connection: connection.clone(),
            max_frame,
        }));
        let connected = State::Connected {
            session_present: welcome.session_present,
            broker: welcome.broker.into(),
            identity: welcome
                .identity
                .parse()
                .unwrap_or_else(|_| shared.identity.clone()),
            key_exchange: welcome.key_exchange.into(),
        };
        let announced = async {
            shared.control.restored().await;
            shared.state.send_replace(connected);
            std::future::pending::<End>().await
        };

        // Control frames go first, so that a goodbye is read before the loss that follows it.
        let end = tokio::select! {
            biased;
            end = read_control(shared, &mut control_frames) => end,
            end = announced => end,
            Some(ended) = tasks.join_next() => End::Lost(match ended {
                Ok(Ok(())) => "a task of the connection ended early".to_owned(),
                Ok(Err(reason)) => reason,
                Err(error) => error.to_string(),
            }),
            error = connection.closed() => End::Lost(explain_connection_error(&error)),
            () = shared.closing.cancelled() => {
                tokio::select! {
                    () = say_goodbye(shared) => {}
                    _ = read_control(shared, &mut control_frames) => {}
                }
                End::Closed
            }
        };
        let end = match end {
            // What QUIC says about the end of a connection is better than what a stream says.
            End::Lost(reason) => match connection.close_reason() {
                Some(quinn::ConnectionError::ApplicationClosed(close)) => {
                    End::Goodbye(wire::Goodbye {
                        status: Some(connect::status_of_close(&close).into()),
                        ..wire::Goodbye::default()
                    })
                }
                Some(error) => End::Lost(explain_connection_error(&error)),
                None => {
                    tracing::warn!(%reason, "closing the connection");
                    let code = Code::InvalidArgument.to_quic().into();
                    connection.close(code, reason.as_bytes());
                    End::Lost(reason)
                }
            },
            end => end,
        };
        shared.link.send_replace(None);
        connection.close(Code::Ok.to_quic().into(), b"goodbye");
        // The lanes' writers must be gone before what is queued counts for the next connection.
        tasks.shutdown().await;
        for lane in &shared.lanes {
            lane.disconnected();
        }
        shared.datagrams.disconnected();
        shared.control.disconnected();
        lock(&shared.marks).clear();
        end
    }
}

/// Sends what is queued, then the goodbye, and gives the broker a moment to answer it.
async fn say_goodbye(shared: &Shared) {
    if let Ok(Err(error)) = timeout(FLUSH_TIME, shared.flush()).await {
        tracing::debug!(%error, "closing");
    }
    shared.control.send(Frame::Goodbye(wire::Goodbye {
        status: Some(Status::ok().into()),
        ..wire::Goodbye::default()
    }));
    tokio::time::sleep(GOODBYE_TIME).await;
}

/// Writes control frames and delivery acknowledgements; those that gather while a write is under
/// way go together.
async fn write_control(
    shared: Arc<Shared>,
    mut stream: quinn::SendStream,
    acks: Arc<PendingAcks>,
) -> Result<(), String> {
    loop {
        let mut outgoing = shared.control.take_outgoing();
        acks.drain_into(&mut outgoing);
        if outgoing.is_empty() {
            shared.control.wake().notified().await;
            continue;
        }
        stream
            .write_chunk(outgoing.freeze())
            .await
            .map_err(|error| format!("control stream: {error}"))?;
    }
}

/// Reads control frames until the end of the connection. Giving it up loses nothing.
async fn read_control(shared: &Shared, frames: &mut FramedReader) -> End {
    loop {
        let frame = match frames.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return End::Lost("the broker ended the control stream".to_owned()),
            Err(error) => return End::Lost(format!("control stream: {error}")),
        };
        if frame.kind != Kind::CONTROL {
            continue;
        }
        let control: wire::Control = match frame::decode("control", frame.body) {
            Ok(control) => control,
            Err(error) => return End::Lost(error.to_string()),
        };
        match control.frame {
            Some(Frame::Reply(reply)) => shared.control.answered(reply),
            Some(Frame::PublishAck(ack)) => {
                if let Some(lane) = lane(shared, ack.lane) {
                    let durability = Durability::from(ack.durability());
                    lane.acknowledged(ack.first, ack.last, durability);
                }
            }
            Some(Frame::PublishRefused(refused)) => publish_refused(shared, refused),
            Some(Frame::Pong(pong)) => {
                if let Some(flush) = lock(&shared.marks).remove(&pong.token) {
                    // Nobody waits when the flush was given up.
                    let _ = flush.send(());
                }
            }
            Some(Frame::Ping(ping)) => {
                let token = ping.token;
                shared.control.send(Frame::Pong(wire::Pong { token }));
            }
            Some(Frame::Goodbye(goodbye)) => return End::Goodbye(goodbye),
            // Frames of a later revision.
            _ => {}
        }
    }
}

fn lane(shared: &Shared, number: u32) -> Option<&Lane> {
    let index = number.checked_sub(1)?;
    shared.lanes.get(index as usize)
}

fn publish_refused(shared: &Shared, refused: wire::PublishRefused) {
    let status = refused.status.map(Status::from);
    let status = status.unwrap_or_else(|| Status::new(Code::Unknown, "no reason given"));
    // Datagrams are on no lane; what is refused of them counts for the lane they would be on.
    let lane = match refused.lane {
        0 => Some(shared.lane(Class::Normal)),
        number => lane(shared, number),
    };
    let Some(lane) = lane else {
        return;
    };
    if refused.number > 0 {
        if refused.lane > 0 {
            lane.refused(refused.number, &status);
        }
        return;
    }
    let refusals = &shared.counters.refused;
    refusals.fetch_add(refused.count.max(1), Ordering::Relaxed);
    *lock(&shared.refused) = Some(status.clone());
    if let Ok(topic) = TopicName::parse(refused.topic)
        && lane.refused_topic(topic.clone(), status.clone(), std::time::Instant::now())
    {
        tracing::warn!(%topic, %status, "the broker refuses messages");
    }
}
