//! A lenient reader of the engine's tables, and of the list of those that count.
//!
//! A table is a row of blocks, each behind a header with a checksum of its own; a table of contents
//! at the end of the file says where the blocks with the records end.

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_128;

use super::cursor::Cursor;

const BLOCK: &[u8] = b"LSM\x03";
const HEADER: usize = 33;
/// Fixed part at the end of a block: where the indexes are, and how many records there are.
const BLOCK_TRAILER: usize = 31;
const ARCHIVE: &[u8] = b"SFA!";
const CONTENTS: &[u8] = b"TOC!";
const ARCHIVE_TRAILER: usize = 38;
/// Headers looked at in search of one to go on from: a payload full of them takes no longer.
const MOST_HEADERS: usize = 1 << 20;
/// What follows the last record of a block.
const NO_MORE: u8 = 255;

/// One record of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub(super) sequence: u64,
    pub(super) key: Vec<u8>,
    /// Absent when the key was removed.
    pub(super) value: Option<&'a [u8]>,
}

/// What was found in a table.
#[derive(Debug, Default)]
pub(super) struct Table<'a> {
    pub(super) records: Vec<Record<'a>>,
    /// What could not be read.
    pub(super) lost: Vec<Range<usize>>,
}

/// The checksum that the engine keeps of a whole file.
pub(super) fn checksum(bytes: &[u8]) -> u128 {
    xxh3_128(bytes)
}

/// Number of the list that counts, and its checksum.
pub(super) fn read_current(bytes: &[u8]) -> Option<(u64, u128)> {
    let mut cursor = Cursor::new(bytes, 0);
    let current = (cursor.u64()?, cursor.u128()?);
    (cursor.u8()? == 0 && bytes.len() == cursor.at()).then_some(current)
}

/// Tables of a list, with their checksums.
pub(super) fn read_list(bytes: &[u8]) -> Option<Vec<(u64, u128)>> {
    let tables = section(bytes, b"tables")?;
    let mut cursor = Cursor::new(bytes, tables.start);
    let mut found = Vec::new();
    for _level in 0..cursor.u8()? {
        for _run in 0..cursor.u8()? {
            for _table in 0..cursor.u32()? {
                let id = cursor.u64()?;
                let _kind_of_checksum = cursor.u8()?;
                found.push((id, cursor.u128()?));
                let _offset_of_sequences = cursor.u64()?;
            }
        }
    }
    (cursor.at() <= tables.end).then_some(found)
}

/// Where a part of an archive is, if its table of contents is whole.
fn section(bytes: &[u8], wanted: &[u8]) -> Option<Range<usize>> {
    let trailer = bytes.len().checked_sub(ARCHIVE_TRAILER)?;
    let mut cursor = Cursor::new(bytes, trailer);
    if cursor.take(ARCHIVE.len())? != ARCHIVE || cursor.take(2)? != [1, 0] {
        return None;
    }
    let sum = cursor.u128()?;
    let at = usize::try_from(cursor.u64()?).ok()?;
    if xxh3_128(bytes.get(at..trailer)?) != sum {
        return None;
    }
    let mut cursor = Cursor::new(bytes, at);
    if cursor.take(CONTENTS.len())? != CONTENTS {
        return None;
    }
    for _ in 0..cursor.u32()? {
        let start = usize::try_from(cursor.u64()?).ok()?;
        let length = usize::try_from(cursor.u64()?).ok()?;
        let name_length = cursor.u16()?;
        if cursor.take(usize::from(name_length))? == wanted {
            return Some(start..start.checked_add(length)?);
        }
    }
    None
}

/// Reads the records of a table that is damaged somewhere.
pub(super) fn read(bytes: &[u8]) -> Table<'_> {
    let mut table = Table::default();
    let data = section(bytes, b"data").map(|data| data.end);
    let end = data.unwrap_or(bytes.len());
    let mut at = 0;
    while at < end {
        let Some(block) = header_at(bytes, at) else {
            let next = data.and_then(|end| resume(bytes, at, end));
            table.lost.push(at..next.unwrap_or(end));
            at = next.unwrap_or(end);
            continue;
        };
        if block.kind != 0 {
            // Behind the records, when there is no table of contents to say so.
            break;
        }
        let content = bytes.get(block.content.clone());
        let whole = content.filter(|content| xxh3_128(content) == block.checksum);
        match whole.and_then(records) {
            Some(mut records) => table.records.append(&mut records),
            None => table.lost.push(at..block.content.end.min(end)),
        }
        at = block.content.end;
    }
    table
}

struct Header {
    kind: u8,
    checksum: u128,
    content: Range<usize>,
}

fn header_at(bytes: &[u8], at: usize) -> Option<Header> {
    let mut cursor = Cursor::new(bytes, at);
    let covered = cursor.take(HEADER - 4)?;
    // The engine keeps the lower half of the lower half.
    if cursor.u32()? != xxh3_128(covered) as u32 {
        return None;
    }
    let mut cursor = Cursor::new(covered, 0);
    if cursor.take(BLOCK.len())? != BLOCK {
        return None;
    }
    let kind = cursor.u8()?;
    let checksum = cursor.u128()?;
    let length = cursor.u32()? as usize;
    let start = at + HEADER;
    Some(Header {
        kind,
        checksum,
        content: start..start.checked_add(length)?,
    })
}

/// Where to read on behind a damaged header: the first place from which the blocks end where the
/// records do. A payload that looks like blocks does not, and so is never taken for them.
fn resume(bytes: &[u8], damaged: usize, end: usize) -> Option<usize> {
    let mut at = damaged;
    let mut seen = 0;
    loop {
        let rest = bytes.get(at + 1..end)?;
        at += 1 + rest
            .windows(BLOCK.len())
            .position(|window| window == BLOCK)?;
        let mut next = at;
        while next < end
            && let Some(block) = header_at(bytes, next)
        {
            next = block.content.end;
            seen += 1;
        }
        if next == end {
            return Some(at);
        }
        if seen > MOST_HEADERS {
            return None;
        }
    }
}

/// The records of a block that is whole.
fn records(block: &[u8]) -> Option<Vec<Record<'_>>> {
    let trailer = block.len().checked_sub(BLOCK_TRAILER)?;
    let interval = usize::from(*block.get(trailer)?);
    let count = Cursor::new(block, block.len() - 4).u32()? as usize;
    let mut cursor = Cursor::new(block, 0);
    let mut records = Vec::new();
    let mut base: &[u8] = &[];
    while cursor.at() < trailer {
        let kind = cursor.u8()?;
        if kind == NO_MORE {
            break;
        }
        let sequence = cursor.varint()?;
        // Every so often a key is whole; those after it leave out what they share with it.
        let whole = records.len() % interval.max(1) == 0;
        let shared = if whole {
            &[]
        } else {
            base.get(..usize::try_from(cursor.varint()?).ok()?)?
        };
        let length = usize::try_from(cursor.varint()?).ok()?;
        let rest = cursor.take(length)?;
        if whole {
            base = rest;
        }
        let value = match kind {
            0 => {
                let length = usize::try_from(cursor.varint()?).ok()?;
                Some(cursor.take(length)?)
            }
            1 | 2 => None,
            _ => return None,
        };
        records.push(Record {
            sequence,
            key: [shared, rest].concat(),
            value,
        });
    }
    (records.len() == count).then_some(records)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(content: &[u8]) -> Vec<u8> {
        let mut header = BLOCK.to_vec();
        header.push(0);
        header.extend(xxh3_128(content).to_le_bytes());
        header.extend((content.len() as u32).to_le_bytes());
        header.extend((content.len() as u32).to_le_bytes());
        header.extend((xxh3_128(&header) as u32).to_le_bytes());
        header.extend(content);
        header
    }

    /// One record with a whole key, as the engine writes it.
    fn one_record(key: &[u8], value: &[u8]) -> Vec<u8> {
        let mut content = vec![0, 7, key.len() as u8];
        content.extend(key);
        let mut length = value.len();
        while length >= 0x80 {
            content.push(length as u8 | 0x80);
            length >>= 7;
        }
        content.push(length as u8);
        content.extend(value);
        content.push(NO_MORE);
        content.push(16);
        content.extend([0; BLOCK_TRAILER - 5]);
        content.extend(1u32.to_le_bytes());
        block(&content)
    }

    fn table(blocks: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = blocks.concat();
        let end = bytes.len() as u64;
        let mut contents = CONTENTS.to_vec();
        contents.extend(1u32.to_le_bytes());
        contents.extend(0u64.to_le_bytes());
        contents.extend(end.to_le_bytes());
        contents.extend(4u16.to_le_bytes());
        contents.extend(b"data");
        bytes.extend(&contents);
        bytes.extend(ARCHIVE);
        bytes.extend([1, 0]);
        bytes.extend(xxh3_128(&contents).to_le_bytes());
        bytes.extend(end.to_le_bytes());
        bytes.extend((contents.len() as u64).to_le_bytes());
        bytes
    }

    #[test]
    fn a_payload_that_looks_like_blocks_is_not_believed_behind_damage() {
        let forged = one_record(b"forged", b"x").repeat(3);
        let first = one_record(b"a", b"whole");
        let damaged = first.len();
        let bytes = table(&[first, one_record(b"b", &forged), one_record(b"c", b"after")]);
        for at in damaged..damaged + HEADER {
            let mut bytes = bytes.clone();
            bytes[at] ^= 4;
            let found = read(&bytes);
            let keys: Vec<&[u8]> = found.records.iter().map(|record| &record.key[..]).collect();
            assert_eq!(keys, [b"a", b"c"], "byte {at}");
            assert_eq!(found.lost.len(), 1);
        }
    }

    proptest! {
        #[test]
        fn one_flipped_bit_costs_one_block_at_most(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let blocks: Vec<_> = (b'a'..=b'f').map(|key| one_record(&[key], &[key; 300])).collect();
            let records = blocks.concat().len();
            let mut bytes = table(&blocks);
            let at = at.index(records);
            bytes[at] ^= 1 << bit;
            let found = read(&bytes);
            prop_assert_eq!(found.records.len(), 5);
            prop_assert_eq!(found.lost.len(), 1);
            for record in &found.records {
                prop_assert_eq!(record.value, Some(&[record.key[0]; 300][..]));
            }
        }

        #[test]
        fn hostile_tables_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
            let _ = read_list(&bytes);
            let _ = read_current(&bytes);
            let _ = read(&block(&bytes));
            let _ = read(&table(&[block(&bytes)]));
        }
    }
}
