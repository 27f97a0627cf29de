//! A device on the MQTT broker that keeps its side of QoS 1 and 2 over any loss of the connection, so
//! that what goes wrong is not its doing.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rumqttc::mqttbytes::v4::{
    Connect, Packet, PubAck, PubComp, PubRec, PubRel, Publish, Subscribe,
};
use rumqttc::mqttbytes::{Error, QoS};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Between attempts to connect.
const RETRY: Duration = Duration::from_millis(50);
/// Messages that wait for an answer: fewer than mosquitto takes, which ends the connection beyond it.
const WINDOW: usize = 200;
/// Silence after which the connection counts as lost: the broker answers pings.
const SILENCE: Duration = Duration::from_secs(8);
const PING: Duration = Duration::from_secs(2);

/// A message to publish, and what it is known by here.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) number: u64,
    pub(crate) topic: String,
    pub(crate) payload: Bytes,
}

/// What the device tells.
#[derive(Debug)]
pub(crate) enum News {
    /// A message was acknowledged for good.
    Acknowledged(u64),
    /// A message has arrived.
    Message(String, Bytes),
    /// It is connected and subscribed.
    Ready,
}

/// The device.
pub(crate) struct Device {
    address: SocketAddr,
    client_id: String,
    qos: QoS,
    filter: Option<String>,
    /// Sent and not answered, by packet id; `None` in place of a message that was received.
    sent: BTreeMap<u16, (u64, Option<Publish>)>,
    /// The order in which packet ids were used.
    order: Vec<u16>,
    next_id: u16,
    /// QoS 2 messages that were taken and not released.
    taken: HashSet<u16>,
    news: mpsc::Sender<News>,
    outgoing: mpsc::Receiver<Outgoing>,
}

impl Device {
    pub(crate) fn new(
        address: SocketAddr,
        client_id: &str,
        qos: u8,
        filter: Option<&str>,
        outgoing: mpsc::Receiver<Outgoing>,
        news: mpsc::Sender<News>,
    ) -> Self {
        Self {
            address,
            client_id: client_id.to_owned(),
            qos: if qos == 2 {
                QoS::ExactlyOnce
            } else {
                QoS::AtLeastOnce
            },
            filter: filter.map(str::to_owned),
            sent: BTreeMap::new(),
            order: Vec::new(),
            next_id: 0,
            taken: HashSet::new(),
            news,
            outgoing,
        }
    }

    /// Runs until it is aborted.
    pub(crate) async fn run(mut self) {
        loop {
            // Why is of no interest: whoever broke it knows.
            let _lost = self.connection().await;
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn connection(&mut self) -> io::Result<()> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (mut reader, mut writer) = stream.into_split();
        let mut received = BytesMut::new();
        let mut buffer = BytesMut::new();
        let mut connect = Connect::new(self.client_id.as_str());
        connect.clean_session = false;
        connect.keep_alive = 30;
        put(&mut buffer, &Packet::Connect(connect))?;
        let mut connected = false;
        let mut ping = tokio::time::interval(PING);
        let mut silent_at = tokio::time::Instant::now() + SILENCE;
        loop {
            if !buffer.is_empty() {
                let written = tokio::time::timeout(SILENCE, writer.write_all(&buffer)).await;
                written.map_err(|_| io::ErrorKind::TimedOut)??;
                buffer.clear();
            }
            tokio::select! {
                read = reader.read_buf(&mut received) => {
                    if read? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    silent_at = tokio::time::Instant::now() + SILENCE;
                    loop {
                        match Packet::read(&mut received, 1 << 24) {
                            Ok(packet) => connected |= self.packet(packet, &mut buffer).await?,
                            Err(Error::InsufficientBytes(_)) => break,
                            Err(error) => return Err(io::Error::other(error.to_string())),
                        }
                    }
                }
                Some(message) = self.outgoing.recv(), if connected && self.sent.len() < WINDOW => {
                    self.publish(message, &mut buffer)?;
                }
                _ = ping.tick(), if connected => put(&mut buffer, &Packet::PingReq)?,
                () = tokio::time::sleep_until(silent_at) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    fn publish(&mut self, message: Outgoing, buffer: &mut BytesMut) -> io::Result<()> {
        let id = loop {
            self.next_id = self.next_id % 60_000 + 1;
            if !self.sent.contains_key(&self.next_id) {
                break self.next_id;
            }
        };
        let mut publish = Publish::from_bytes(message.topic, self.qos, message.payload);
        publish.pkid = id;
        put(buffer, &Packet::Publish(publish.clone()))?;
        self.sent.insert(id, (message.number, Some(publish)));
        self.order.push(id);
        Ok(())
    }

    /// Takes a packet. `true` when the connection is accepted.
    async fn packet(&mut self, packet: Packet, buffer: &mut BytesMut) -> io::Result<bool> {
        match packet {
            Packet::ConnAck(connack) => {
                if !connack.session_present {
                    self.taken.clear();
                    // What was received is delivered; the rest is unknown and sent anew.
                    for (number, _) in self.forget(Option::is_none) {
                        self.tell(News::Acknowledged(number)).await;
                    }
                }
                for id in &self.order {
                    match self.sent.get_mut(id) {
                        Some((_, Some(publish))) => {
                            publish.dup = connack.session_present;
                            put(buffer, &Packet::Publish(publish.clone()))?;
                        }
                        Some((_, None)) => put(buffer, &Packet::PubRel(PubRel::new(*id)))?,
                        None => {}
                    }
                }
                match &self.filter {
                    Some(filter) => {
                        let mut subscribe = Subscribe::new(filter.as_str(), self.qos);
                        subscribe.pkid = u16::MAX;
                        put(buffer, &Packet::Subscribe(subscribe))?;
                    }
                    None => self.tell(News::Ready).await,
                }
                return Ok(true);
            }
            Packet::SubAck(_) => self.tell(News::Ready).await,
            Packet::PubAck(puback) => self.answered(puback.pkid).await,
            Packet::PubRec(pubrec) => {
                if let Some((_, publish)) = self.sent.get_mut(&pubrec.pkid) {
                    *publish = None;
                }
                put(buffer, &Packet::PubRel(PubRel::new(pubrec.pkid)))?;
            }
            Packet::PubComp(pubcomp) => self.answered(pubcomp.pkid).await,
            Packet::Publish(publish) => {
                let id = publish.pkid;
                let fresh = publish.qos != QoS::ExactlyOnce || self.taken.insert(id);
                let answer = match publish.qos {
                    QoS::AtMostOnce => None,
                    QoS::AtLeastOnce => Some(Packet::PubAck(PubAck::new(id))),
                    QoS::ExactlyOnce => Some(Packet::PubRec(PubRec::new(id))),
                };
                if fresh {
                    self.tell(News::Message(publish.topic, publish.payload))
                        .await;
                }
                if let Some(answer) = answer {
                    put(buffer, &answer)?;
                }
            }
            Packet::PubRel(pubrel) => {
                self.taken.remove(&pubrel.pkid);
                put(buffer, &Packet::PubComp(PubComp::new(pubrel.pkid)))?;
            }
            _ => {}
        }
        Ok(false)
    }

    async fn answered(&mut self, id: u16) {
        if let Some((number, _)) = self.sent.remove(&id) {
            self.order.retain(|other| *other != id);
            self.tell(News::Acknowledged(number)).await;
        }
    }

    fn forget(&mut self, which: impl Fn(&Option<Publish>) -> bool) -> Vec<(u64, Option<Publish>)> {
        let ids: Vec<u16> = self.sent.keys().copied().collect();
        let mut gone = Vec::new();
        for id in ids {
            if self
                .sent
                .get(&id)
                .is_some_and(|(_, publish)| which(publish))
            {
                gone.extend(self.sent.remove(&id));
                self.order.retain(|other| *other != id);
            }
        }
        gone
    }

    async fn tell(&self, news: News) {
        // Nobody listens at the end.
        let _ = self.news.send(news).await;
    }
}

fn put(buffer: &mut BytesMut, packet: &Packet) -> io::Result<()> {
    let written = packet.write(buffer, usize::MAX);
    written
        .map(drop)
        .map_err(|error| io::Error::other(error.to_string()))
}
