//! A lenient reader of the engine's journals: what is whole, and what is not.
//!
//! A journal is a row of batches, one for each commit: a start with the number of items and a
//! sequence number, the items, and an end with a checksum of the items. Zeros follow the last.

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_64;

use super::cursor::{Cursor, content_length};

/// What ends a batch.
const TRAILER: &[u8] = b"FJL\x03";

const START: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const CLEAR: u8 = 4;

/// Sequence numbers count commits, so one that is so much later than the one before is damaged.
const FAR: u64 = 1 << 32;

/// One item of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item<'a> {
    /// Number of the keyspace.
    pub(super) space: u64,
    pub(super) key: &'a [u8],
    /// Absent when the key was removed.
    pub(super) value: Option<&'a [u8]>,
}

/// One commit.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    /// Rises from batch to batch.
    pub(super) sequence: u64,
    pub(super) items: Vec<Item<'a>>,
    range: Range<usize>,
    /// The items are whole, but not what is around them.
    marred: bool,
}

/// What was found in a journal.
#[derive(Debug, Default)]
pub(super) struct Journal<'a> {
    /// The whole batches, in order.
    pub(super) batches: Vec<Batch<'a>>,
    /// Where there is damage, and whether anything is lost with it.
    pub(super) damage: Vec<(Range<usize>, Loss)>,
    /// A batch at the end that was never finished, as a crash leaves it.
    pub(super) torn: Option<Range<usize>>,
    /// Where the content ends.
    pub(super) length: usize,
}

/// Whether damage took something with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// What the bytes held cannot be read.
    Lost,
    /// It could be read all the same.
    Mended,
}

/// Reads a journal. `before` is the sequence number that the journal before it ended with.
pub(super) fn read(bytes: &[u8], before: u64) -> Journal<'_> {
    let length = content_length(bytes);
    let mut journal = Journal {
        length,
        ..Journal::default()
    };
    let mut at = 0;
    while at < length {
        if let Some(batch) = batch_at(bytes, at) {
            if batch.range.end > length {
                // Only zeros where its end should be: it was being written.
                journal.torn = Some(at..length);
                break;
            }
            if batch.marred {
                journal.damage.push((batch.range.clone(), Loss::Mended));
            }
            at = batch.range.end;
            journal.batches.push(batch);
        } else if let Some(next) = resume(bytes, at, length) {
            journal.damage.push((at..next, Loss::Lost));
            at = next;
        } else {
            let rest = at..length;
            if has_trailer(&bytes[rest.clone()]) {
                journal.damage.push((rest, Loss::Lost));
            } else {
                journal.torn = Some(rest);
            }
            break;
        }
    }
    mend_sequence(&mut journal, before);
    journal
}

/// The numbers have no checksum, but they rise: one that does not fit in is taken for the one
/// before it, which keeps the order.
fn mend_sequence(journal: &mut Journal<'_>, before: u64) {
    let found: Vec<u64> = journal.batches.iter().map(|batch| batch.sequence).collect();
    let mut last = before;
    for (index, batch) in journal.batches.iter_mut().enumerate() {
        let next = found.get(index + 1).copied();
        let too_early = batch.sequence <= last && last > 0;
        let too_late = next.is_some_and(|next| next <= batch.sequence && next > last)
            || batch.sequence.saturating_sub(last) > FAR;
        if too_early || too_late {
            journal.damage.push((batch.range.clone(), Loss::Mended));
            batch.sequence = last;
        }
        last = batch.sequence;
    }
}

fn has_trailer(bytes: &[u8]) -> bool {
    bytes.windows(TRAILER.len()).any(|window| window == TRAILER)
}

/// The batch that begins here, if its items are whole.
fn batch_at(bytes: &[u8], at: usize) -> Option<Batch<'_>> {
    let mut cursor = Cursor::new(bytes, at);
    let mut marred = cursor.u8()? != START;
    let count = cursor.u32()?;
    let sequence = cursor.u64()?;
    let from = cursor.at();
    let mut items = Vec::new();
    let mut found = 0;
    while matches!(bytes.get(cursor.at()), Some(&(ITEM | CLEAR))) {
        // The broker never clears a keyspace.
        items.push(item(&mut cursor)?);
        found += 1;
    }
    marred |= found != count;
    let to = cursor.at();
    marred |= cursor.u8()? != END;
    if xxh3_64(&bytes[from..to]) != cursor.u64()? || items.is_empty() {
        return None;
    }
    marred |= cursor.take(TRAILER.len())? != TRAILER;
    Some(Batch {
        sequence,
        items,
        range: at..cursor.at(),
        marred,
    })
}

fn item<'a>(cursor: &mut Cursor<'a>) -> Option<Item<'a>> {
    if cursor.u8()? != ITEM {
        return None;
    }
    let kind = cursor.u8()?;
    let compression = cursor.u8()?;
    let space = cursor.u64()?;
    let key_length = cursor.u16()?;
    let value_length = cursor.u32()?;
    let stored_length = cursor.u32()?;
    let key = cursor.take(usize::from(key_length))?;
    let value = cursor.take(stored_length as usize)?;
    // The engine is built without compression.
    if compression != 0 || value_length != stored_length {
        return None;
    }
    let value = match kind {
        0 => Some(value),
        1 | 2 => None,
        _ => return None,
    };
    Some(Item { space, key, value })
}

/// Where to read on behind damage: the first place from which every batch is whole up to the end.
/// A payload that looks like batches, which anyone can publish, does not end where the journal
/// does, and so is never taken for them.
fn resume(bytes: &[u8], damaged: usize, length: usize) -> Option<usize> {
    let mut at = damaged;
    loop {
        let rest = bytes.get(at..length)?;
        at += rest
            .windows(TRAILER.len())
            .position(|window| window == TRAILER)?
            + TRAILER.len();
        let mut next = at;
        while next < length
            && let Some(batch) = batch_at(bytes, next)
        {
            next = batch.range.end;
        }
        let whole = next >= length || !has_trailer(&bytes[next..length]);
        if next > at && whole {
            return Some(at);
        }
        // What begins within those batches ends where they do.
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A batch as the engine writes it.
    fn encode(sequence: u64, items: &[Item<'_>]) -> Vec<u8> {
        let mut body = Vec::new();
        for Item { space, key, value } in items {
            body.extend([ITEM, u8::from(value.is_none()), 0]);
            body.extend(space.to_le_bytes());
            body.extend((key.len() as u16).to_le_bytes());
            let value = value.unwrap_or_default();
            body.extend((value.len() as u32).to_le_bytes());
            body.extend((value.len() as u32).to_le_bytes());
            body.extend(*key);
            body.extend(value);
        }
        let mut bytes = vec![START];
        bytes.extend((items.len() as u32).to_le_bytes());
        bytes.extend(sequence.to_le_bytes());
        bytes.extend(&body);
        bytes.push(END);
        bytes.extend(xxh3_64(&body).to_le_bytes());
        bytes.extend(TRAILER);
        bytes
    }

    fn item<'a>(space: u64, key: &'a [u8], value: Option<&'a [u8]>) -> Item<'a> {
        Item { space, key, value }
    }

    fn journal(batches: u64, zeros: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (1..=batches)
            .flat_map(|number| {
                let value = [number as u8; 40];
                encode(
                    number,
                    &[item(3, b"key", Some(&value)), item(3, b"gone", None)],
                )
            })
            .collect();
        bytes.resize(bytes.len() + zeros, 0);
        bytes
    }

    fn sequences(journal: &Journal<'_>) -> Vec<u64> {
        journal.batches.iter().map(|batch| batch.sequence).collect()
    }

    #[test]
    fn a_payload_that_looks_like_batches_is_not_believed_behind_damage() {
        let forged: Vec<u8> = (1..50)
            .flat_map(|sequence| encode(sequence, &[item(1, b"forged", Some(b"x"))]))
            .collect();
        let mut bytes = encode(1, &[item(3, b"key", Some(b"whole"))]);
        let damaged = bytes.len();
        bytes.extend(encode(2, &[item(3, b"key", Some(&forged))]));
        bytes.extend(encode(3, &[item(3, b"key", Some(b"after"))]));
        for at in damaged..damaged + 40 {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << bit;
                for batch in read(&bytes, 0).batches {
                    assert!(batch.items.iter().all(|item| item.key == b"key"));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn one_flipped_bit_costs_one_batch_at_most_and_is_seen(
            batches in 1u64..8, zeros in 0usize..9000, at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let whole = journal(batches, zeros);
            let content = whole.len() - zeros;
            prop_assert_eq!(sequences(&read(&whole, 0)), (1..=batches).collect::<Vec<_>>());
            prop_assert!(read(&whole, 0).damage.is_empty() && read(&whole, 0).torn.is_none());
            let mut bytes = whole.clone();
            let at = at.index(content);
            bytes[at] ^= 1 << bit;
            let found = read(&bytes, 0);
            prop_assert!(found.batches.len() as u64 >= batches - 1);
            // Only the number of the first or the last may change unseen, and the order holds.
            let last = content - content / batches as usize;
            let number = (5..13).contains(&at) || (last + 5..last + 13).contains(&at);
            prop_assert!(!found.damage.is_empty() || number);
            let order = sequences(&found);
            prop_assert!(order.is_sorted());
            for batch in &found.batches {
                prop_assert_eq!(batch.items[0].key, b"key");
                prop_assert_eq!(batch.items[1].value, None);
            }
        }

        #[test]
        fn a_torn_end_is_no_damage(batches in 1u64..5, cut in 1usize..60, zeros in 0usize..100) {
            let mut bytes = journal(batches, 0);
            bytes.truncate(bytes.len() - cut);
            let content = bytes.len();
            bytes.resize(content + zeros, 0);
            let found = read(&bytes, 0);
            prop_assert_eq!(found.batches.len() as u64, batches - 1);
            prop_assert!(found.damage.is_empty());
            prop_assert!(found.torn.is_some());
        }

        #[test]
        fn hostile_journals_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes, 0);
            let mut journal = journal(2, 0);
            journal.extend(&bytes);
            prop_assert_eq!(read(&journal, 0).batches.len(), 2);
        }
    }
}
