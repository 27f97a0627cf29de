//! An MQTT client that is nothing but bytes: it says what a test has it say, and shows what comes back.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::wait::within;

/// Long enough for a busy machine; a test that passes waits for it only where it says so.
const PATIENCE: Duration = Duration::from_secs(20);

/// A version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// 3.1.
    V31,
    /// 3.1.1.
    V311,
    /// 5.0.
    V5,
}

/// Fields of a packet, in the order they are put.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(pub Vec<u8>);

impl Fields {
    /// No fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// One byte.
    #[must_use]
    pub fn byte(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    /// Two bytes.
    #[must_use]
    pub fn two(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// Four bytes.
    #[must_use]
    pub fn four(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// A number of variable length.
    #[must_use]
    pub fn varint(mut self, value: usize) -> Self {
        put_varint(&mut self.0, value);
        self
    }

    /// Bytes with their length before them.
    #[must_use]
    pub fn text(mut self, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        let length = u16::try_from(value.len()).expect("tests use short texts");
        self.0.extend(length.to_be_bytes());
        self.0.extend(value);
        self
    }

    /// Bytes as they are.
    #[must_use]
    pub fn raw(mut self, value: impl AsRef<[u8]>) -> Self {
        self.0.extend(value.as_ref());
        self
    }

    /// A block of properties, with its length before it.
    #[must_use]
    pub fn block(self, properties: &Self) -> Self {
        self.varint(properties.0.len()).raw(&properties.0)
    }

    /// A packet of these fields.
    pub fn packet(&self, first: u8) -> Vec<u8> {
        let mut packet = vec![first];
        put_varint(&mut packet, self.0.len());
        packet.extend(&self.0);
        packet
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

/// What a CONNECT says.
#[derive(Debug, Clone)]
pub struct Hello {
    /// The version.
    pub level: Level,
    /// The client id.
    pub client_id: String,
    /// Clean session, or clean start.
    pub clean: bool,
    /// In seconds.
    pub keep_alive: u16,
    /// Properties; not in 3.1.1.
    pub properties: Fields,
    /// Flags of the will, and its properties, topic and payload.
    pub will: Option<(u8, Fields, String, Vec<u8>)>,
}

impl Hello {
    /// A clean session without anything else.
    pub fn new(level: Level, client_id: &str) -> Self {
        Self {
            level,
            client_id: client_id.to_owned(),
            clean: true,
            keep_alive: 0,
            properties: Fields::new(),
            will: None,
        }
    }

    /// A session that is kept for `seconds`; 3.1.1 has no time.
    #[must_use]
    pub fn kept(mut self, seconds: u32) -> Self {
        self.clean = false;
        if self.level == Level::V5 {
            self.properties = self.properties.byte(0x11).four(seconds);
        }
        self
    }

    /// With these properties.
    #[must_use]
    pub fn with(mut self, properties: Fields) -> Self {
        self.properties.0.extend(properties.0);
        self
    }

    /// A will; `flags` has its quality of service at bit 3 and retain at bit 5.
    #[must_use]
    pub fn will(mut self, flags: u8, properties: Fields, topic: &str, payload: &str) -> Self {
        self.will = Some((flags, properties, topic.to_owned(), payload.into()));
        self
    }

    /// The bytes.
    pub fn packet(&self) -> Vec<u8> {
        let will = self.will.as_ref().map_or(0, |(flags, ..)| flags | 0x04);
        self.packet_with_flags(will | u8::from(self.clean) << 1)
    }

    /// The bytes, with other flags than belong to it.
    pub fn packet_with_flags(&self, flags: u8) -> Vec<u8> {
        let (name, level) = match self.level {
            Level::V31 => ("MQIsdp", 3),
            Level::V311 => ("MQTT", 4),
            Level::V5 => ("MQTT", 5),
        };
        let mut fields = Fields::new()
            .text(name)
            .byte(level)
            .byte(flags)
            .two(self.keep_alive);
        if self.level == Level::V5 {
            fields = fields.block(&self.properties);
        }
        fields = fields.text(&self.client_id);
        if let Some((_, properties, topic, payload)) = &self.will {
            if self.level == Level::V5 {
                fields = fields.block(properties);
            }
            fields = fields.text(topic).text(payload);
        }
        fields.packet(0x10)
    }
}

/// A packet from the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Kind and flags.
    pub first: u8,
    /// What follows the length.
    pub body: Vec<u8>,
}

/// A PUBLISH from the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivered {
    /// Sent before.
    pub duplicate: bool,
    /// 0, 1 or 2.
    pub qos: u8,
    /// The retain flag.
    pub retain: bool,
    /// The topic; empty when only an alias names it.
    pub topic: String,
    /// Zero at QoS 0.
    pub id: u16,
    /// The block of properties, without its length.
    pub properties: Vec<u8>,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Received {
    /// The packet id of an acknowledgement.
    pub fn id(&self) -> u16 {
        u16::from_be_bytes([self.body[0], self.body[1]])
    }

    /// The reason code of an acknowledgement or a DISCONNECT of 5.0; zero where it is left out.
    pub fn reason(&self) -> u8 {
        let at = match self.first >> 4 {
            14 => 0,
            2 => 1,
            _ => 2,
        };
        self.body.get(at).copied().unwrap_or(0)
    }

    /// The properties of CONNACK, SUBACK, UNSUBACK, an acknowledgement or a DISCONNECT of 5.0.
    pub fn properties(&self) -> Vec<(u8, Vec<u8>)> {
        let at = match self.first >> 4 {
            14 => 1,
            9 | 11 | 2 => 2,
            _ => 3,
        };
        let Some(rest) = self.body.get(at..) else {
            return Vec::new();
        };
        let (length, used) = varint(rest);
        split_properties(&rest[used..used + length])
    }

    /// The value of one property.
    pub fn property(&self, id: u8) -> Option<Vec<u8>> {
        let mut properties = self.properties().into_iter();
        properties.find(|(found, _)| *found == id).map(|(_, v)| v)
    }

    /// The reason codes of a SUBACK or UNSUBACK.
    pub fn codes(&self, level: Level) -> Vec<u8> {
        let rest = &self.body[2..];
        if level != Level::V5 {
            return rest.to_vec();
        }
        let (length, used) = varint(rest);
        rest[used + length..].to_vec()
    }

    /// The PUBLISH that it is.
    pub fn delivered(&self, level: Level) -> Delivered {
        assert_eq!(self.first >> 4, 3, "expected PUBLISH, found {self:02x?}");
        let mut rest = &self.body[..];
        let length = rest.get_u16() as usize;
        let topic = String::from_utf8(rest[..length].to_vec()).expect("a topic is UTF-8");
        rest.advance(length);
        let qos = self.first >> 1 & 3;
        let id = if qos > 0 { rest.get_u16() } else { 0 };
        let mut properties = Vec::new();
        if level == Level::V5 {
            let (length, used) = varint(rest);
            properties = rest[used..used + length].to_vec();
            rest.advance(used + length);
        }
        Delivered {
            duplicate: self.first & 8 != 0,
            qos,
            retain: self.first & 1 != 0,
            topic,
            id,
            properties,
            payload: rest.to_vec(),
        }
    }
}

impl Delivered {
    /// The payload as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.payload).expect("tests send text")
    }

    /// The values of one property, in order.
    pub fn property(&self, id: u8) -> Vec<Vec<u8>> {
        split_properties(&self.properties)
            .into_iter()
            .filter(|(found, _)| *found == id)
            .map(|(_, value)| value)
            .collect()
    }
}

/// A number of variable length, and how many bytes it has.
fn varint(bytes: &[u8]) -> (usize, usize) {
    let mut value = 0;
    for (index, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return (value, index + 1);
        }
    }
    panic!("no number of variable length: {bytes:02x?}");
}

/// Properties by id, the value as it was written, texts without their length.
fn split_properties(mut rest: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    while rest.has_remaining() {
        let id = rest.get_u8();
        let take = |rest: &mut &[u8], count: usize| {
            let value = rest[..count].to_vec();
            rest.advance(count);
            value
        };
        let text = |rest: &mut &[u8]| {
            let length = rest.get_u16() as usize;
            take(rest, length)
        };
        let value = match id {
            0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2a => take(&mut rest, 1),
            0x13 | 0x21 | 0x22 | 0x23 => take(&mut rest, 2),
            0x02 | 0x11 | 0x18 | 0x27 => take(&mut rest, 4),
            0x0b => {
                let (value, used) = varint(rest);
                rest.advance(used);
                (value as u32).to_be_bytes().to_vec()
            }
            0x26 => {
                let name = text(&mut rest);
                let value = text(&mut rest);
                [name, b"=".to_vec(), value].concat()
            }
            _ => text(&mut rest),
        };
        found.push((id, value));
    }
    found
}

/// A connection.
#[derive(Debug)]
pub struct Wire {
    /// The version that the packets of its methods are written in.
    pub level: Level,
    stream: TcpStream,
    buffer: BytesMut,
    /// Packets that came before the one that was asked for.
    passed: VecDeque<Received>,
}

impl Wire {
    /// A connection that has said nothing.
    pub async fn open(broker: SocketAddr, level: Level) -> Self {
        let stream = TcpStream::connect(broker)
            .await
            .expect("the broker listens");
        stream.set_nodelay(true).expect("a socket takes it");
        Self {
            level,
            stream,
            buffer: BytesMut::new(),
            passed: VecDeque::new(),
        }
    }

    /// A connection that has said hello, and the answer.
    pub async fn greet(broker: SocketAddr, hello: &Hello) -> (Self, Received) {
        let mut wire = Self::open(broker, hello.level).await;
        wire.send(hello.packet()).await;
        let answer = wire.next().await;
        assert_eq!(answer.first, 0x20, "expected CONNACK, found {answer:02x?}");
        (wire, answer)
    }

    /// A connection that was let in.
    pub async fn connect(broker: SocketAddr, hello: &Hello) -> Self {
        let (wire, answer) = Self::greet(broker, hello).await;
        assert_eq!(answer.body[1], 0, "expected to be let in: {answer:02x?}");
        wire
    }

    /// Writes bytes as they are. A broker that has closed the connection does not mind.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref()).await;
    }

    /// The next packet, or `None` when the connection is over.
    pub async fn try_next(&mut self) -> Option<Received> {
        match self.passed.pop_front() {
            Some(passed) => Some(passed),
            None => self.read().await,
        }
    }

    /// The next acknowledgement of this kind for this id; what comes before it stays.
    pub async fn answer(&mut self, first: u8, id: u16) -> Received {
        let is_it = |packet: &Received| packet.first == first && packet.id() == id;
        if let Some(at) = self.passed.iter().position(is_it) {
            return self.passed.remove(at).expect("it was just found");
        }
        loop {
            let packet = self.read().await.expect("the connection is open");
            if is_it(&packet) {
                return packet;
            }
            self.passed.push_back(packet);
        }
    }

    async fn read(&mut self) -> Option<Received> {
        let next = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(packet) = self.cut() {
                    return Some(packet);
                }
                match self.stream.read_buf(&mut self.buffer).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        });
        next.await.expect("a packet, or the end, in time")
    }

    fn cut(&mut self) -> Option<Received> {
        let rest = self.buffer.get(1..)?;
        let end = rest.iter().take(4).position(|byte| byte & 0x80 == 0)?;
        let (length, used) = varint(&rest[..=end]);
        if rest.len() < used + length {
            return None;
        }
        let packet = self.buffer.split_to(1 + used + length);
        Some(Received {
            first: packet[0],
            body: packet[1 + used..].to_vec(),
        })
    }

    /// The next packet.
    pub async fn next(&mut self) -> Received {
        self.try_next().await.expect("the connection is open")
    }

    /// The next packet, which is a PUBLISH.
    pub async fn delivery(&mut self) -> Delivered {
        let level = self.level;
        self.next().await.delivered(level)
    }

    /// The reason code of the DISCONNECT that ends the connection; `None` when it just ends.
    pub async fn end(&mut self) -> Option<u8> {
        let mut reason = None;
        while let Some(packet) = self.try_next().await {
            if packet.first == 0xe0 {
                reason = Some(packet.reason());
            }
        }
        reason
    }

    /// Makes sure that nothing has come and that the connection is open.
    pub async fn quiet(&mut self) {
        self.send([0xc0, 0]).await;
        let next = self.next().await;
        assert_eq!(next.first, 0xd0, "expected nothing, found {next:02x?}");
    }

    /// Writes a PUBLISH; `flags` are those of the first byte.
    pub async fn publish(&mut self, flags: u8, topic: &str, id: u16, payload: &str) {
        let properties = Fields::new();
        self.publish_with(flags, topic, id, &properties, payload)
            .await;
    }

    /// Writes a PUBLISH with properties.
    pub async fn publish_with(
        &mut self,
        flags: u8,
        topic: &str,
        id: u16,
        properties: &Fields,
        payload: &str,
    ) {
        let mut fields = Fields::new().text(topic);
        if flags & 0x06 != 0 {
            fields = fields.two(id);
        }
        if self.level == Level::V5 {
            fields = fields.block(properties);
        }
        self.send(fields.raw(payload).packet(0x30 | flags)).await;
    }

    /// Writes a PUBLISH of QoS 1 or 2 and sees it through.
    pub async fn publish_and_wait(&mut self, qos: u8, topic: &str, id: u16, payload: &str) {
        self.publish(qos << 1, topic, id, payload).await;
        if qos == 2 {
            self.answer(0x50, id).await;
            self.ack(0x62, id).await;
            self.answer(0x70, id).await;
        } else {
            self.answer(0x40, id).await;
        }
    }

    /// Writes an acknowledgement of two bytes.
    pub async fn ack(&mut self, first: u8, id: u16) {
        self.send(Fields::new().two(id).packet(first)).await;
    }

    /// Takes the next message and answers it as its quality of service asks.
    pub async fn take(&mut self) -> Delivered {
        let message = self.delivery().await;
        match message.qos {
            0 => {}
            1 => self.ack(0x40, message.id).await,
            _ => {
                self.ack(0x50, message.id).await;
                self.answer(0x62, message.id).await;
                self.ack(0x70, message.id).await;
            }
        }
        message
    }

    /// Subscribes and returns the codes.
    pub async fn subscribe(&mut self, filters: &[(&str, u8)]) -> Vec<u8> {
        self.subscribe_with(&Fields::new(), filters).await
    }

    /// Subscribes with properties and returns the codes.
    pub async fn subscribe_with(&mut self, properties: &Fields, filters: &[(&str, u8)]) -> Vec<u8> {
        let mut fields = Fields::new().two(77);
        if self.level == Level::V5 {
            fields = fields.block(properties);
        }
        for (filter, options) in filters {
            fields = fields.text(filter).byte(*options);
        }
        self.send(fields.packet(0x82)).await;
        let answer = self.next().await;
        assert_eq!((answer.first, answer.id()), (0x90, 77), "{answer:02x?}");
        answer.codes(self.level)
    }

    /// Unsubscribes and returns the answer.
    pub async fn unsubscribe(&mut self, filters: &[&str]) -> Received {
        let mut fields = Fields::new().two(78);
        if self.level == Level::V5 {
            fields = fields.block(&Fields::new());
        }
        for filter in filters {
            fields = fields.text(filter);
        }
        self.send(fields.packet(0xa2)).await;
        let answer = self.next().await;
        assert_eq!((answer.first, answer.id()), (0xb0, 78), "{answer:02x?}");
        answer
    }

    /// Says goodbye and waits for the end.
    pub async fn leave(mut self) {
        self.send([0xe0, 0]).await;
        within("the end of the connection", self.end()).await;
    }

    /// Ends the connection without a word.
    pub fn drop_dead(self) {}
}
