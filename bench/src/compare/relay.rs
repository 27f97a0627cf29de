//! A bare QUIC relay: what a publisher's stream brings is copied to the streams of its group. Only the
//! lengths of frames are looked at, so that no message is cut in two. It is the limit of what a broker
//! over quinn can reach, with the broker's own endpoint and transport settings.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use quinn::{Connection, Endpoint, RecvStream};
use selvedge_broker::{Limits, quic};
use selvedge_certs::{Credentials, ReloadableCredentials, TrustAnchors};
use selvedge_proto::frame::{self, Kind};
use tokio::sync::mpsc;

/// Parts of a stream that are read at once, as in the broker.
const CHUNKS: usize = 64;
/// Reads of the publisher that wait for one subscriber; when there are more the publisher waits.
const QUEUE: usize = 64;

/// The first bytes of a client's stream: its role and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Greeting {
    Publish(u32),
    Subscribe(u32),
}

impl Greeting {
    const BYTES: usize = 5;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let (role, group) = match self {
            Self::Publish(group) => (0, group),
            Self::Subscribe(group) => (1, group),
        };
        let mut bytes = [role, 0, 0, 0, 0];
        bytes[1..].copy_from_slice(&group.to_be_bytes());
        bytes
    }

    fn decode([role, group @ ..]: [u8; Self::BYTES]) -> anyhow::Result<Self> {
        let group = u32::from_be_bytes(group);
        match role {
            0 => Ok(Self::Publish(group)),
            1 => Ok(Self::Subscribe(group)),
            other => bail!("expected role 0 or 1, found {other}"),
        }
    }
}

/// Who is in which group.
type Groups = Arc<Mutex<HashMap<u32, Vec<mpsc::Sender<Bytes>>>>>;

/// Opens the relay on a free port of the loopback interface, with packets of the broker's size unless
/// told otherwise.
///
/// # Errors
/// The certificates cannot be read, or the port not opened.
pub fn bind(
    cert: &Path,
    key: &Path,
    trust: &Path,
    packet_bytes: Option<u16>,
) -> anyhow::Result<Endpoint> {
    let credentials = Credentials::from_files(cert, key)?;
    let trust = TrustAnchors::from_file(trust)?;
    let mut limits = Limits::default();
    limits.packet_bytes = packet_bytes.unwrap_or(limits.packet_bytes);
    quic::bind(
        ([127, 0, 0, 1], 0).into(),
        &ReloadableCredentials::new(credentials),
        &trust,
        &limits,
        &[selvedge_proto::ALPN],
    )
    .context("open the relay")
}

/// Serves until the process ends.
pub async fn serve(endpoint: Endpoint) {
    let groups = Groups::default();
    while let Some(incoming) = endpoint.accept().await {
        let groups = Arc::clone(&groups);
        tokio::spawn(async move {
            if let Ok(connection) = incoming.await {
                serve_connection(connection, &groups).await;
            }
        });
    }
}

async fn serve_connection(connection: Connection, groups: &Groups) {
    while let Ok(stream) = connection.accept_uni().await {
        let (connection, groups) = (connection.clone(), Arc::clone(groups));
        // A client that goes away ends its streams, and what it sent is of no use then.
        tokio::spawn(async move { serve_stream(connection, stream, &groups).await.ok() });
    }
}

async fn serve_stream(
    connection: Connection,
    mut stream: RecvStream,
    groups: &Groups,
) -> anyhow::Result<()> {
    let mut greeting = [0; Greeting::BYTES];
    stream.read_exact(&mut greeting).await?;
    match Greeting::decode(greeting)? {
        Greeting::Publish(group) => copy(stream, group, groups).await,
        Greeting::Subscribe(group) => deliver(&connection, group, groups).await,
    }
}

/// Copies whole frames to everyone in the group.
async fn copy(mut stream: RecvStream, group: u32, groups: &Groups) -> anyhow::Result<()> {
    let members = locked(groups).get(&group).cloned().unwrap_or_default();
    let mut chunks = [const { Bytes::new() }; CHUNKS];
    let mut buffer = BytesMut::new();
    // Bytes at the start of the buffer that are known to be whole frames.
    let mut whole = 0;
    while let Some(count) = stream.read_chunks(&mut chunks).await? {
        buffer.reserve(chunks[..count].iter().map(Bytes::len).sum());
        for chunk in &mut chunks[..count] {
            buffer.extend_from_slice(chunk);
            *chunk = Bytes::new();
        }
        while let Some(head) = frame::peek(&buffer[whole..], frame::MAX_FRAME)? {
            if buffer.len() - whole < head.total() {
                break;
            }
            whole += head.total();
        }
        if whole == 0 {
            continue;
        }
        let frames = if whole == buffer.len() {
            std::mem::take(&mut buffer).freeze()
        } else {
            let rest = BytesMut::from(&buffer[whole..]);
            let mut frames = std::mem::replace(&mut buffer, rest).freeze();
            frames.truncate(whole);
            frames
        };
        whole = 0;
        for member in &members {
            // One that has gone gets nothing more; the others do.
            let _ = member.send(frames.clone()).await;
        }
    }
    Ok(())
}

/// Writes what comes for one subscriber, all that waits at once.
async fn deliver(connection: &Connection, group: u32, groups: &Groups) -> anyhow::Result<()> {
    let mut stream = connection.open_uni().await?;
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    locked(groups)
        .entry(group)
        .or_default()
        .push(sender.clone());
    // An empty frame tells the client that it is in the group.
    stream.write_chunk(frame::head(Kind::LANE, 0)).await?;
    let mut waiting = Vec::new();
    loop {
        tokio::select! {
            count = receiver.recv_many(&mut waiting, QUEUE) => if count == 0 { break },
            _ = connection.closed() => break,
        }
        if stream.write_all_chunks(&mut waiting).await.is_err() {
            break;
        }
        waiting.clear();
    }
    let mut groups = locked(groups);
    if let Some(members) = groups.get_mut(&group) {
        members.retain(|member| !member.same_channel(&sender));
        if members.is_empty() {
            groups.remove(&group);
        }
    }
    Ok(())
}

fn locked(groups: &Groups) -> std::sync::MutexGuard<'_, HashMap<u32, Vec<mpsc::Sender<Bytes>>>> {
    groups.lock().expect("nothing panics while it is locked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_survives() {
        for greeting in [Greeting::Publish(7), Greeting::Subscribe(1_000_000)] {
            assert_eq!(Greeting::decode(greeting.encode()).unwrap(), greeting);
        }
        let error = Greeting::decode([2, 0, 0, 0, 0]).unwrap_err();
        assert_eq!(error.to_string(), "expected role 0 or 1, found 2");
    }
}
