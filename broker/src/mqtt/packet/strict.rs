//! What the standards forbid and the codec lets pass, or has no name for: looked at before a packet is
//! decoded, so that each breach gets the reason code that belongs to it.

use crate::mqtt::packet::{ProtocolError, Version};
use crate::mqtt::reason::Reason;

type Checked<T = ()> = Result<T, ProtocolError>;

const fn malformed(what: &'static str) -> ProtocolError {
    ProtocolError::new(Reason::MALFORMED_PACKET, what)
}

const fn breach(what: &'static str) -> ProtocolError {
    ProtocolError::new(Reason::PROTOCOL_ERROR, what)
}

const ENDS_EARLY: ProtocolError = malformed("a packet that ends early");
const TOO_LONG: ProtocolError = malformed("a packet with bytes after its end");
const NO_ID: ProtocolError = breach("a packet id of zero");
const EMPTY: ProtocolError = breach("an empty list of filters");

/// Properties by the packet that may have them (MQTT 5.0 section 2.2.2.2).
const CONNECT: &[u8] = &[0x11, 0x15, 0x16, 0x17, 0x19, 0x21, 0x22, 0x26, 0x27];
const WILL: &[u8] = &[0x01, 0x02, 0x03, 0x08, 0x09, 0x18, 0x26];
const PUBLISH: &[u8] = &[0x01, 0x02, 0x03, 0x08, 0x09, 0x0B, 0x23, 0x26];
const ANSWER: &[u8] = &[0x1F, 0x26];
const SUBSCRIBE: &[u8] = &[0x0B, 0x26];
const UNSUBSCRIBE: &[u8] = &[0x26];
const DISCONNECT: &[u8] = &[0x11, 0x1C, 0x1F, 0x26];
const AUTH: &[u8] = &[0x15, 0x16, 0x1F, 0x26];

/// Checks one whole packet of a client: its first byte, and what follows its length. An empty client id
/// of 5.0 is made to ask for a clean start, without which the codec takes none: its session is a new
/// one in any case.
pub(super) fn check(version: Version, first: u8, body: &mut [u8]) -> Checked {
    let flags = first & 0x0F;
    let expected = match first >> 4 {
        3 => flags,
        6 | 8 | 10 => 2,
        _ => 0,
    };
    if flags != expected {
        return Err(malformed("a packet with flags that are not its own"));
    }
    let is_v5 = version == Version::V5;
    match first >> 4 {
        1 => connect(is_v5, body),
        3 => publish(is_v5, flags, body),
        4..=7 => answer(is_v5, body),
        8 => subscribe(is_v5, body),
        10 => unsubscribe(is_v5, body),
        12 if !body.is_empty() => Err(TOO_LONG),
        12 => Ok(()),
        14 => disconnect(is_v5, body),
        15 if is_v5 => auth(body),
        2 | 9 | 11 | 13 => Err(super::FROM_SERVER),
        _ => Err(malformed("an unknown packet type or flag")),
    }
}

fn connect(is_v5: bool, body: &mut [u8]) -> Checked {
    let mut rest = Rest(body);
    rest.text()?;
    rest.byte()?;
    let flags_at = body.len() - rest.0.len();
    let mut rest = Rest(&body[flags_at..]);
    let flags = rest.byte()?;
    let (will, will_qos) = (flags & 0x04 != 0, flags >> 3 & 3);
    if flags & 1 != 0 {
        return Err(malformed("a CONNECT with its reserved flag"));
    }
    if will_qos == 3 || (!will && flags & 0x38 != 0) {
        return Err(malformed("a CONNECT with flags for a will that cannot be"));
    }
    if !is_v5 && flags & 0xC0 == 0x40 {
        return Err(malformed("a password without a user name"));
    }
    rest.take(2)?;
    if is_v5 {
        let found = rest.properties(CONNECT)?;
        if found.has(0x16) && !found.has(0x15) {
            return Err(breach("authentication data without a method"));
        }
    }
    let is_nameless = rest.text()?.is_empty();
    if will {
        if is_v5 {
            rest.properties(WILL)?;
        }
        rest.text()?;
        rest.binary()?;
    }
    if flags & 0x80 != 0 {
        rest.text()?;
    }
    if flags & 0x40 != 0 {
        rest.binary()?;
    }
    rest.end()?;
    if is_v5 && is_nameless {
        body[flags_at] |= 0x02;
    }
    Ok(())
}

#[inline]
fn publish(is_v5: bool, flags: u8, body: &[u8]) -> Checked {
    let mut rest = Rest(body);
    let topic = rest.binary()?;
    let qos = flags >> 1 & 3;
    if topic.contains(&0) {
        return Err(malformed("text with U+0000"));
    }
    if qos == 3 || (qos == 0 && flags & 0x08 != 0) {
        return Err(malformed("a PUBLISH with flags that cannot be"));
    }
    if qos > 0 && rest.two()? == 0 {
        return Err(NO_ID);
    }
    if is_v5 {
        let found = if rest.0.first() == Some(&0) {
            Found::default()
        } else {
            rest.properties(PUBLISH)?
        };
        if topic.is_empty() && !found.has(0x23) {
            return Err(breach("a PUBLISH with neither a topic nor an alias"));
        }
    }
    Ok(())
}

fn answer(is_v5: bool, body: &[u8]) -> Checked {
    let mut rest = Rest(body);
    if rest.two()? == 0 {
        return Err(NO_ID);
    }
    if is_v5 && !rest.0.is_empty() {
        rest.byte()?;
        if !rest.0.is_empty() {
            rest.properties(ANSWER)?;
        }
    }
    rest.end()
}

fn subscribe(is_v5: bool, body: &[u8]) -> Checked {
    let mut rest = Rest(body);
    if rest.two()? == 0 {
        return Err(NO_ID);
    }
    if is_v5 {
        rest.properties(SUBSCRIBE)?;
    }
    if rest.0.is_empty() {
        return Err(EMPTY);
    }
    while !rest.0.is_empty() {
        rest.text()?;
        let options = rest.byte()?;
        let reserved = if is_v5 { 0xC0 } else { 0xFC };
        if options & reserved != 0 {
            return Err(malformed("subscription options with reserved bits"));
        }
        if options & 3 == 3 || options >> 4 & 3 == 3 {
            return Err(breach("subscription options that cannot be"));
        }
    }
    Ok(())
}

fn unsubscribe(is_v5: bool, body: &[u8]) -> Checked {
    let mut rest = Rest(body);
    if rest.two()? == 0 {
        return Err(NO_ID);
    }
    if is_v5 {
        rest.properties(UNSUBSCRIBE)?;
    }
    if rest.0.is_empty() {
        return Err(EMPTY);
    }
    while !rest.0.is_empty() {
        rest.text()?;
    }
    Ok(())
}

fn disconnect(is_v5: bool, body: &[u8]) -> Checked {
    let mut rest = Rest(body);
    if is_v5 && !body.is_empty() {
        let reason = rest.byte()?;
        // Those that only a server has (MQTT 5.0 section 3.14.2.1).
        if !matches!(reason, 0x00 | 0x04 | 0x80..=0x83 | 0x90 | 0x93..=0x99) {
            return Err(breach("a DISCONNECT with a reason that is not a client's"));
        }
        if !rest.0.is_empty() && rest.properties(DISCONNECT)?.has(0x1C) {
            return Err(breach("a DISCONNECT with a server reference"));
        }
    }
    rest.end()
}

fn auth(body: &[u8]) -> Checked {
    let mut rest = Rest(body);
    if !body.is_empty() {
        rest.byte()?;
        if !rest.0.is_empty() {
            rest.properties(AUTH)?;
        }
    }
    rest.end()
}

/// Which properties there are; all ids are below 64.
#[derive(Debug, Clone, Copy, Default)]
struct Found(u64);

impl Found {
    fn has(self, id: u8) -> bool {
        self.0 >> id & 1 != 0
    }
}

/// What is left of a packet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Checked<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(ENDS_EARLY)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Checked<u8> {
        Ok(self.take(1)?[0])
    }

    fn two(&mut self) -> Checked<u16> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn four(&mut self) -> Checked<u32> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn varint(&mut self) -> Checked<u32> {
        let mut value = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number of more than four bytes"))
    }

    fn binary(&mut self) -> Checked<&'a [u8]> {
        let length = self.two()?;
        self.take(length.into())
    }

    fn text(&mut self) -> Checked<&'a str> {
        let text =
            std::str::from_utf8(self.binary()?).map_err(|_| malformed("text that is not UTF-8"))?;
        if text.contains('\0') {
            return Err(malformed("text with U+0000"));
        }
        Ok(text)
    }

    fn end(&self) -> Checked {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(TOO_LONG)
        }
    }

    /// A block of properties, all of them among `allowed`.
    fn properties(&mut self, allowed: &[u8]) -> Checked<Found> {
        let length = self.varint()?;
        let mut block = Rest(self.take(length as usize)?);
        let mut found = Found::default();
        while !block.0.is_empty() {
            let id = block.byte()?;
            if !allowed.contains(&id) {
                return Err(malformed("a property that is not of its packet"));
            }
            // Only these may come more than once; of the second a client sends none in PUBLISH.
            if id != 0x26 && found.has(id) {
                return Err(breach("a property that is there twice"));
            }
            found.0 |= 1 << id;
            match id {
                0x01 | 0x17 | 0x19 => {
                    if block.byte()? > 1 {
                        return Err(breach("a property that is neither 0 nor 1"));
                    }
                }
                0x21 => {
                    if block.two()? == 0 {
                        return Err(breach("a receive maximum of zero"));
                    }
                }
                0x23 => {
                    if block.two()? == 0 {
                        let reason = Reason::TOPIC_ALIAS_INVALID;
                        return Err(ProtocolError::new(reason, "a topic alias of zero"));
                    }
                }
                0x22 => drop(block.two()?),
                0x27 => {
                    if block.four()? == 0 {
                        return Err(breach("a maximum packet size of zero"));
                    }
                }
                0x02 | 0x11 | 0x18 => drop(block.four()?),
                0x0B => {
                    if block.varint()? == 0 {
                        return Err(breach("a subscription identifier of zero"));
                    }
                }
                0x09 | 0x16 => drop(block.binary()?),
                0x26 => {
                    block.text()?;
                    block.text()?;
                }
                _ => drop(block.text()?),
            }
        }
        Ok(found)
    }
}
