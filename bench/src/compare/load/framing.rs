//! Finding messages in what a server sends, with as little work as the protocol allows: a message
//! that is only counted is skipped, not looked at.

use std::io;

use selvedge_proto::frame::{self, Kind};

/// A protocol's way to tell where a message starts and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// Frames of selvedge/1, on a lane.
    Lane,
    /// Lines of NATS, and payloads.
    Nats,
    /// MQTT 3.1.1 packets.
    Mqtt,
}

/// What was found in one read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Messages that came to their end.
    pub(super) messages: u64,
    /// Acknowledgements of published messages.
    pub(super) acks: u64,
    /// Questions whether we are there.
    pub(super) pings: u64,
    /// Packet ids that want an acknowledgement.
    pub(super) ids: Vec<u16>,
    /// First eight bytes of the payloads, if they were asked for.
    pub(super) stamps: Vec<u64>,
}

impl Found {
    /// Forgets everything and keeps the memory.
    pub(super) fn clear(&mut self) {
        (self.messages, self.acks, self.pings) = (0, 0, 0);
        self.ids.clear();
        self.stamps.clear();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Message { id: Option<u16>, stamp: Option<u64> },
    Ack,
    Ping,
    Nothing,
}

#[derive(Debug, Clone, Copy)]
struct Head {
    /// Bytes of all of it.
    total: usize,
    what: What,
}

/// Splits one direction of a connection.
#[derive(Debug)]
pub(super) struct Splitter {
    framing: Framing,
    /// Whether payloads start with a stamp that is wanted.
    stamped: bool,
    /// A head that has not come whole.
    partial: Vec<u8>,
    /// What is being skipped, and how many bytes of it are still to come.
    current: Option<(What, usize)>,
}

/// Bytes that a head is looked for in at once when it came in two parts.
const STEP: usize = 64;
/// The longest head: a line of NATS that says what the server can do.
const MAX_HEAD: usize = 64 * 1024;

impl Splitter {
    pub(super) fn new(framing: Framing, stamped: bool) -> Self {
        Self {
            framing,
            stamped,
            partial: Vec::new(),
            current: None,
        }
    }

    /// Takes what was read.
    ///
    /// # Errors
    /// It is not this protocol, or the server reports an error.
    pub(super) fn feed(&mut self, mut bytes: &[u8], found: &mut Found) -> io::Result<()> {
        loop {
            if let Some((what, left)) = self.current {
                let taken = left.min(bytes.len());
                bytes = &bytes[taken..];
                if taken < left {
                    self.current = Some((what, left - taken));
                    return Ok(());
                }
                self.current = None;
                found.add(what);
            }
            if bytes.is_empty() {
                return Ok(());
            }
            if self.partial.is_empty() {
                match self.framing.head(bytes, self.stamped)? {
                    Some(head) => self.current = Some((head.what, head.total)),
                    None => {
                        self.partial.extend_from_slice(bytes);
                        return Ok(());
                    }
                }
                continue;
            }
            let held = self.partial.len();
            let step = bytes.len().min(STEP);
            self.partial.extend_from_slice(&bytes[..step]);
            match self.framing.head(&self.partial, self.stamped)? {
                // Fewer bytes held no head, so what is held is at most all of it.
                Some(head) => {
                    self.current = Some((head.what, head.total.saturating_sub(held)));
                    self.partial.clear();
                }
                None if self.partial.len() > MAX_HEAD => return Err(wrong("no end of a head")),
                None => bytes = &bytes[step..],
            }
        }
    }
}

impl Found {
    fn add(&mut self, what: What) {
        match what {
            What::Message { id, stamp } => {
                self.messages += 1;
                self.ids.extend(id);
                self.stamps.extend(stamp);
            }
            What::Ack => self.acks += 1,
            What::Ping => self.pings += 1,
            What::Nothing => {}
        }
    }
}

impl Framing {
    /// What starts here, once enough of it is there.
    fn head(self, bytes: &[u8], stamped: bool) -> io::Result<Option<Head>> {
        match self {
            Self::Lane => lane_head(bytes, stamped),
            Self::Nats => nats_head(bytes, stamped),
            Self::Mqtt => mqtt_head(bytes, stamped),
        }
    }
}

/// A message, once its stamp is there if that is wanted.
fn message(
    bytes: &[u8],
    payload: usize,
    id: Option<u16>,
    total: usize,
    stamped: bool,
) -> Option<Head> {
    let stamp = if stamped {
        let bytes = bytes.get(payload..)?.first_chunk()?;
        Some(u64::from_be_bytes(*bytes))
    } else {
        None
    };
    let what = What::Message { id, stamp };
    Some(Head { total, what })
}

fn lane_head(bytes: &[u8], stamped: bool) -> io::Result<Option<Head>> {
    let head = frame::peek(bytes, frame::MAX_FRAME).map_err(io::Error::other)?;
    let Some(head) = head else {
        return Ok(None);
    };
    if head.kind != Kind::MESSAGE {
        let (total, what) = (head.total(), What::Nothing);
        return Ok(Some(Head { total, what }));
    }
    if !stamped {
        return Ok(message(bytes, 0, None, head.total(), false));
    }
    // Flags, then the alias; our messages have no header.
    let alias = bytes.get(head.prefix + 1..).and_then(frame::varint);
    let Some((_, width)) = alias else {
        return Ok(None);
    };
    let payload = head.prefix + 1 + width;
    Ok(message(bytes, payload, None, head.total(), true))
}

fn nats_head(bytes: &[u8], stamped: bool) -> io::Result<Option<Head>> {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return Ok(None);
    };
    let line = &bytes[..end];
    let total = end + 1;
    let what = match line.first_chunk() {
        Some(b"MSG ") => {
            let size = line.trim_ascii_end().rsplit(|byte| *byte == b' ').next();
            let size = size.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
            let size: usize = size.ok_or_else(|| wrong("a message without a size"))?;
            return Ok(message(bytes, total, None, total + size + 2, stamped));
        }
        Some(b"PING") => What::Ping,
        Some(b"-ERR") => return Err(wrong(&String::from_utf8_lossy(line))),
        _ => What::Nothing,
    };
    Ok(Some(Head { total, what }))
}

fn mqtt_head(bytes: &[u8], stamped: bool) -> io::Result<Option<Head>> {
    let Some((prefix, body)) = mqtt_length(bytes)? else {
        return Ok(None);
    };
    let total = prefix + body;
    let what = match bytes[0] >> 4 {
        3 => {
            let Some(topic) = bytes.get(prefix..).and_then(<[u8]>::first_chunk) else {
                return Ok(None);
            };
            let mut payload = prefix + 2 + usize::from(u16::from_be_bytes(*topic));
            let mut id = None;
            if bytes[0] & 0b110 != 0 {
                let Some(field) = bytes.get(payload..).and_then(<[u8]>::first_chunk) else {
                    return Ok(None);
                };
                id = Some(u16::from_be_bytes(*field));
                payload += 2;
            }
            return Ok(message(bytes, payload, id, total, stamped));
        }
        4 => What::Ack,
        _ => What::Nothing,
    };
    Ok(Some(Head { total, what }))
}

/// Bytes before and after the end of an MQTT packet's length.
pub(super) fn mqtt_length(bytes: &[u8]) -> io::Result<Option<(usize, usize)>> {
    let mut length = 0;
    for place in 0..4 {
        let Some(byte) = bytes.get(1 + place) else {
            return Ok(None);
        };
        length |= usize::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Ok(Some((2 + place, length)));
        }
    }
    Err(wrong("a packet length of more than four bytes"))
}

fn wrong(what: &str) -> io::Error {
    io::Error::other(format!("the server sent {what}"))
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::prelude::*;
    use selvedge_proto::lane::{Flags, put_message};
    use selvedge_proto::message::Qos;

    use super::*;

    /// Two messages with stamps 1 and 2, among other things.
    fn stream(framing: Framing) -> Vec<u8> {
        let payload = |stamp: u64| [&stamp.to_be_bytes()[..], &[b'\n'; 300]].concat();
        match framing {
            Framing::Lane => {
                let mut buffer = BytesMut::new();
                frame::put_head(&mut buffer, Kind::BIND, 70);
                buffer.extend_from_slice(&[9; 70]);
                for stamp in [1, 2] {
                    let flags = Flags::new(Qos::AtMostOnce);
                    put_message(&mut buffer, flags, 300, None, &payload(stamp));
                }
                buffer.to_vec()
            }
            Framing::Nats => {
                let mut text = b"PING\r\n".to_vec();
                for stamp in [1, 2] {
                    text.extend_from_slice(b"MSG a.b 7 308\r\n");
                    text.extend_from_slice(&payload(stamp));
                    text.extend_from_slice(b"\r\n");
                }
                text
            }
            Framing::Mqtt => {
                let mut bytes = vec![0x40, 2, 0, 1];
                for stamp in [1u8, 2] {
                    // 315 bytes: topic, packet id, payload.
                    bytes.extend_from_slice(&[0x32, 0xbb, 0x02, 0, 3, b'a', b'/', b'b', 0, stamp]);
                    bytes.extend_from_slice(&payload(stamp.into()));
                }
                bytes
            }
        }
    }

    proptest! {
        #[test]
        fn messages_are_found_however_they_are_cut(
            framing in prop::sample::select(vec![Framing::Lane, Framing::Nats, Framing::Mqtt]),
            stamped: bool,
            cuts in prop::collection::vec(1usize..90, 1..40),
        ) {
            let stream = stream(framing);
            let mut splitter = Splitter::new(framing, stamped);
            let mut found = Found::default();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                splitter.feed(now, &mut found).unwrap();
                rest = later;
            }
            prop_assert_eq!(found.messages, 2);
            prop_assert_eq!(found.stamps, if stamped { vec![1, 2] } else { vec![] });
            prop_assert_eq!(found.pings, u64::from(framing == Framing::Nats));
            prop_assert_eq!(found.acks, u64::from(framing == Framing::Mqtt));
            let ids = if framing == Framing::Mqtt { vec![1, 2] } else { vec![] };
            prop_assert_eq!(found.ids, ids);
        }
    }

    #[test]
    fn a_message_counts_when_it_is_there_to_its_end() {
        let stream = stream(Framing::Nats);
        let mut splitter = Splitter::new(Framing::Nats, false);
        let mut found = Found::default();
        let (most, last) = stream.split_at(stream.len() - 1);
        splitter.feed(most, &mut found).unwrap();
        assert_eq!(found.messages, 1);
        splitter.feed(last, &mut found).unwrap();
        assert_eq!(found.messages, 2);
    }

    #[test]
    fn an_error_of_the_server_is_one() {
        let mut splitter = Splitter::new(Framing::Nats, false);
        let error = splitter.feed(b"-ERR 'Slow Consumer'\r\n", &mut Found::default());
        assert_eq!(
            error.unwrap_err().to_string(),
            "the server sent -ERR 'Slow Consumer'\r"
        );
    }
}
