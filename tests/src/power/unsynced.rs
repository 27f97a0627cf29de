//! The writes to one file that no fsync has followed, and what a power cut leaves of them.

use rand::Rng;
use rand::rngs::StdRng;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// What becomes of unsynced writes when the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// None of them reached the disk.
    Everything,
    /// They reached the disk in order up to some point within one of them.
    Torn,
    /// Some of their sectors reached the disk, in no order: a cache may be written back in any.
    Scattered,
}

/// Bytes written at a place of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub offset: u64,
    /// What.
    pub data: Vec<u8>,
}

impl Write {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

/// Writes to one file that no fsync has followed, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unsynced {
    writes: Vec<Write>,
}

impl Unsynced {
    /// Adds a write.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if !data.is_empty() {
            self.writes.push(Write {
                offset,
                data: data.to_vec(),
            });
        }
    }

    /// Whether everything is on disk.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Bytes that are not on disk.
    pub fn bytes(&self) -> u64 {
        self.writes
            .iter()
            .map(|write| write.data.len() as u64)
            .sum()
    }

    /// The least length of a file with these writes.
    pub fn end(&self) -> u64 {
        self.writes.iter().map(Write::end).max().unwrap_or(0)
    }

    /// Lays the writes over what the disk has at `offset`.
    pub fn lay_over(&self, offset: u64, buffer: &mut [u8]) {
        let limit = offset + buffer.len() as u64;
        for write in &self.writes {
            let from = write.offset.max(offset);
            let to = write.end().min(limit);
            if from < to {
                let source = index(from - write.offset)..index(to - write.offset);
                buffer[index(from - offset)..index(to - offset)]
                    .copy_from_slice(&write.data[source]);
            }
        }
    }

    /// The file was cut off at `length`.
    pub fn truncate(&mut self, length: u64) {
        self.writes.retain_mut(|write| {
            let keep = length.saturating_sub(write.offset);
            write.data.truncate(index(keep));
            !write.data.is_empty()
        });
    }

    /// All writes, which are on disk then.
    pub fn sync(&mut self) -> Vec<Write> {
        std::mem::take(&mut self.writes)
    }

    /// The writes that had reached the disk when the power went.
    pub fn survivors(self, loss: Loss, random: &mut StdRng) -> Vec<Write> {
        match loss {
            Loss::Everything => Vec::new(),
            Loss::Torn => {
                let mut writes = self.writes;
                if writes.is_empty() {
                    return writes;
                }
                let torn = random.random_range(0..writes.len());
                writes.truncate(torn + 1);
                let write = &mut writes[torn];
                let mut keep = random.random_range(0..=write.data.len());
                if random.random() {
                    keep -= keep % SECTOR;
                }
                write.data.truncate(keep);
                writes
            }
            Loss::Scattered => {
                let mut survivors = Vec::new();
                for write in self.writes {
                    let mut offset = write.offset;
                    let mut rest = &write.data[..];
                    while !rest.is_empty() {
                        let to_next = SECTOR - index(offset % SECTOR as u64);
                        let (sector, after) = rest.split_at(to_next.min(rest.len()));
                        if random.random() {
                            survivors.push(Write {
                                offset,
                                data: sector.to_vec(),
                            });
                        }
                        offset += sector.len() as u64;
                        rest = after;
                    }
                }
                survivors
            }
        }
    }
}

/// A place within something that is in memory.
fn index(place: u64) -> usize {
    usize::try_from(place).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Write(u64, Vec<u8>),
        Truncate(u64),
        Sync,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0u64..3000, proptest::collection::vec(1u8.., 0..1200))
                .prop_map(|(offset, data)| Step::Write(offset, data)),
            1 => (0u64..3000).prop_map(Step::Truncate),
            1 => Just(Step::Sync),
        ]
    }

    fn apply(file: &mut Vec<u8>, write: &Write) {
        let end = index(write.end());
        if file.len() < end {
            file.resize(end, 0);
        }
        file[index(write.offset)..end].copy_from_slice(&write.data);
    }

    /// The file as programs see it, and as the disk has it.
    fn play(steps: &[Step]) -> (Vec<u8>, Vec<u8>, Unsynced) {
        let (mut seen, mut disk, mut unsynced) = (Vec::new(), Vec::new(), Unsynced::default());
        for step in steps {
            match step {
                Step::Write(offset, data) => {
                    unsynced.write(*offset, data);
                    if !data.is_empty() {
                        apply(
                            &mut seen,
                            &Write {
                                offset: *offset,
                                data: data.clone(),
                            },
                        );
                    }
                }
                // As the layer does it: a change of length is on disk at once.
                Step::Truncate(length) => {
                    unsynced.truncate(*length);
                    seen.resize(index(*length), 0);
                    disk.resize(index(*length), 0);
                }
                Step::Sync => unsynced
                    .sync()
                    .iter()
                    .for_each(|write| apply(&mut disk, write)),
            }
        }
        (seen, disk, unsynced)
    }

    proptest! {
        #[test]
        fn programs_read_what_they_wrote(steps in proptest::collection::vec(step(), 0..20)) {
            let (seen, disk, unsynced) = play(&steps);
            let length = index(unsynced.end()).max(disk.len());
            prop_assert_eq!(length, seen.len());
            let mut read = disk;
            read.resize(length, 0);
            unsynced.lay_over(0, &mut read);
            prop_assert_eq!(&read, &seen);
            let from = length / 3;
            let mut part = read[from..length / 2].to_vec();
            unsynced.lay_over(from as u64, &mut part);
            prop_assert_eq!(&part[..], &seen[from..length / 2]);
        }

        #[test]
        fn what_was_synced_survives_every_loss(
            synced in proptest::collection::vec(step(), 0..10),
            offset in 0u64..2000,
            lost in proptest::collection::vec(1u8.., 1..3000),
            seed: u64,
        ) {
            let (_, mut disk, mut unsynced) = play(&synced);
            unsynced.sync().iter().for_each(|write| apply(&mut disk, write));
            unsynced.write(offset, &lost);
            for loss in [Loss::Everything, Loss::Torn, Loss::Scattered] {
                let mut random = StdRng::seed_from_u64(seed);
                let mut after = disk.clone();
                for write in unsynced.clone().survivors(loss, &mut random) {
                    prop_assert!(write.offset >= offset && write.end() <= unsynced.end());
                    apply(&mut after, &write);
                }
                let untouched = disk.len().min(index(offset));
                prop_assert_eq!(&after[..untouched], &disk[..untouched]);
                if loss == Loss::Everything {
                    prop_assert_eq!(&after, &disk);
                }
            }
        }
    }
}
