//! The payload of a numbered message: its stream and number, and filler that both determine.

use bytes::Bytes;

use super::ledger::StreamId;

/// Beyond this a broker passes payloads on without copying them.
const LARGE: u64 = 5_000;
/// Beyond this a message fills a broker's batch alone.
const HUGE: u64 = 70_000;

/// The payload of a message.
pub(crate) fn encode(stream: StreamId, number: u64) -> Bytes {
    let mut payload = format!("{}:{number}:", stream.0).into_bytes();
    let seed = number.wrapping_mul(31).wrapping_add(stream.0 as u64);
    let length = match number {
        number if number % 997 == 500 => HUGE,
        number if number % 61 == 30 => LARGE,
        _ => seed % 200,
    };
    payload.extend((0..length).map(|place| (seed.wrapping_add(place) % 251) as u8));
    payload.into()
}

/// The stream and number of a payload, or what is wrong with it.
pub(crate) fn decode(payload: &Bytes) -> Result<(StreamId, u64), String> {
    let named = named(payload).ok_or_else(|| {
        let start = &payload[..payload.len().min(32)];
        format!("expected stream:number:, found {start:?}")
    })?;
    let expected = encode(named.0, named.1);
    if *payload == expected {
        return Ok(named);
    }
    let same = payload.iter().zip(&expected).take_while(|(a, b)| a == b);
    Err(format!(
        "{} of stream {} has {} bytes where {} were published and differs from byte {}",
        named.1,
        named.0.0,
        payload.len(),
        expected.len(),
        same.count()
    ))
}

fn named(payload: &[u8]) -> Option<(StreamId, u64)> {
    let mut parts = payload.splitn(3, |byte| *byte == b':');
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
    let stream = usize::try_from(number()?).ok()?;
    Some((StreamId(stream), number()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_payload_names_itself_and_every_change_to_it_is_seen() {
        for number in (0..100).chain([500, 1497]) {
            let payload = encode(StreamId(3), number);
            assert_eq!(decode(&payload), Ok((StreamId(3), number)));
            let mut longer = payload.to_vec();
            longer.push(0);
            decode(&longer.into()).unwrap_err();
            let mut changed = payload.to_vec();
            *changed.last_mut().unwrap() ^= 1;
            decode(&changed.into()).unwrap_err();
        }
        decode(&Bytes::new()).unwrap_err();
        decode(&Bytes::from_static(b"1:x:")).unwrap_err();
    }
}
