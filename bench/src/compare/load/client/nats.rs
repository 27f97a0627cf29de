//! Clients of nats-server: the text protocol, without acknowledgements.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::framing::Framing;
use super::{Configured, Ear, Held, Listening, Publisher, Sink, Source, Subscriber, Template, Tls};
use crate::compare::job::Protocol;
use crate::compare::load::per_write;

/// The answer to a question whether we are there.
pub(super) const PONG: &[u8] = b"PONG\r\n";
/// Subscriptions that are asked for in one write.
const SUBSCRIPTIONS: usize = 1_000;

async fn connect(mut stream: TcpStream, tls: Configured) -> anyhow::Result<Tls> {
    // The server speaks first, in the clear, and then expects the handshake.
    let mut byte = [0];
    while byte != *b"\n" {
        stream
            .read_exact(&mut byte)
            .await
            .context("read the server's INFO")?;
    }
    let mut stream = super::tls(stream, tls).await?;
    let connect = "CONNECT {\"verbose\":false,\"pedantic\":false,\"tls_required\":true,\
        \"name\":\"selvedge bench\",\"lang\":\"rust\",\"version\":\"1\",\"protocol\":1,\"echo\":true}\r\n";
    stream.write_all(connect.as_bytes()).await?;
    sync(&mut stream).await?;
    Ok(stream)
}

/// Asks, and waits for the answer, which comes after all answers to what was sent before.
async fn sync(stream: &mut Tls) -> anyhow::Result<()> {
    stream.write_all(b"PING\r\n").await?;
    stream.flush().await?;
    let mut line = Vec::new();
    loop {
        let byte = stream.read_u8().await.context("wait for PONG")?;
        line.push(byte);
        if byte != b'\n' {
            continue;
        }
        match line.as_slice() {
            PONG => return Ok(()),
            b"PING\r\n" => stream.write_all(PONG).await?,
            line if line.starts_with(b"-ERR") => {
                bail!("the server sent {}", String::from_utf8_lossy(line))
            }
            _ => {}
        }
        line.clear();
    }
}

pub(super) async fn subscribe(
    stream: TcpStream,
    tls: Configured,
    filters: &[String],
) -> anyhow::Result<Subscriber> {
    let mut stream = connect(stream, tls).await?;
    let mut id = 0;
    for filters in filters.chunks(SUBSCRIPTIONS) {
        let mut text = String::new();
        for filter in filters {
            id += 1;
            text.push_str(&format!("SUB {} {id}\r\n", subject(filter)));
        }
        stream.write_all(text.as_bytes()).await?;
        sync(&mut stream).await?;
    }
    let (read, write) = tokio::io::split(stream);
    Ok(Subscriber {
        protocol: Protocol::Nats,
        acknowledges: false,
        source: Some(Source::tls(read)),
        answers: Some(Sink::Tls(write)),
        held: Held::default(),
    })
}

pub(super) async fn publish(
    stream: TcpStream,
    tls: Configured,
    topic: &str,
    size: usize,
) -> anyhow::Result<Publisher> {
    let stream = connect(stream, tls).await?;
    let (read, write) = tokio::io::split(stream);
    let head = format!("PUB {} {size}\r\n", subject(topic));
    let mut frame = head.clone().into_bytes();
    frame.resize(frame.len() + size, 0);
    frame.extend_from_slice(b"\r\n");
    let template = Template {
        frame: Bytes::from(frame),
        payload: head.len(),
        id: None,
    };
    let per_write = per_write(template.frame.len());
    Ok(Publisher {
        listening: Some(Listening(Ear::Tls(Source::tls(read), Framing::Nats))),
        ..Publisher::new(Sink::Tls(write), template, per_write)
    })
}

/// A topic or filter of MQTT as a subject of NATS.
fn subject(topic: &str) -> String {
    topic.replace('/', ".").replace('+', "*").replace('#', ">")
}
