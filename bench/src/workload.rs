//! The broker's storage workload: group commits of queue entries, with the acknowledgement of half.

use std::hash::{DefaultHasher, Hash, Hasher};

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Queues that take turns, each one lane of a session.
const QUEUES: usize = 64;
/// Entries that one acknowledgement covers; as many again stay in the queue.
const ACKNOWLEDGED: u64 = 8;
/// Values are slices of this many random bytes, so that no engine can compress them.
const POOL: usize = 1 << 20;

/// A session and one of its lanes.
pub type Queue = [u8; 9];

/// The key of an entry: its queue, then its sequence number, big-endian.
pub type Key = [u8; 17];

/// One group commit.
#[derive(Debug, Default)]
pub struct Commit {
    /// Entries to add.
    pub appended: Vec<(Key, Vec<u8>)>,
    /// What receivers are done with.
    pub acknowledged: Vec<Acknowledged>,
}

/// A run of entries of one queue that can go.
#[derive(Debug, Clone, Copy)]
pub struct Acknowledged {
    /// Queue of the entries.
    pub queue: Queue,
    /// First sequence number.
    pub from: u64,
    /// Sequence number after the last.
    pub to: u64,
}

/// What a store holds, in a form that two stores with the same entries agree on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holding {
    /// Number of entries.
    pub entries: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// Sum of the hashes of the entries, whatever their order.
    pub digest: u64,
}

/// All commits of one run, the same for every engine.
#[derive(Debug)]
pub struct Workload {
    /// The commits in order.
    pub commits: Vec<Commit>,
    /// What is left in the end.
    pub left: Holding,
}

impl Workload {
    /// `commits` group commits of `size` entries each.
    pub fn new(commits: usize, size: usize) -> Self {
        let mut random = StdRng::seed_from_u64(7);
        let mut pool = vec![0; POOL];
        random.fill_bytes(&mut pool);
        let queues: Vec<Queue> = (0..QUEUES)
            .map(|_| {
                let mut queue = Queue::default();
                random.fill_bytes(&mut queue);
                queue[8] %= 4;
                queue
            })
            .collect();
        let mut lengths: Vec<Vec<usize>> = vec![Vec::new(); QUEUES];
        let mut workload = Self {
            commits: Vec::with_capacity(commits),
            left: Holding::default(),
        };
        let value = |queue: usize, sequence: u64, length: usize| {
            let start = (queue * 7919 + sequence as usize * 1031) % (POOL - 1024);
            &pool[start..start + length]
        };
        for position in 0..commits {
            let mut commit = Commit::default();
            for entry in position * size..(position + 1) * size {
                let queue = entry % QUEUES;
                let sequence = (entry / QUEUES) as u64;
                let length = random.random_range(64..=1024);
                lengths[queue].push(length);
                let appended = value(queue, sequence, length).to_vec();
                workload.left.add(&key(&queues[queue], sequence), &appended);
                commit
                    .appended
                    .push((key(&queues[queue], sequence), appended));
                let count = sequence + 1;
                if count.is_multiple_of(2 * ACKNOWLEDGED) {
                    let (from, to) = (count / 2 - ACKNOWLEDGED, count / 2);
                    for gone in from..to {
                        let length = lengths[queue][gone as usize];
                        workload
                            .left
                            .remove(&key(&queues[queue], gone), value(queue, gone, length));
                    }
                    commit.acknowledged.push(Acknowledged {
                        queue: queues[queue],
                        from,
                        to,
                    });
                }
            }
            workload.commits.push(commit);
        }
        workload
    }

    /// Number of entries appended in all.
    pub fn entries(&self) -> usize {
        self.commits
            .iter()
            .map(|commit| commit.appended.len())
            .sum()
    }

    /// Bytes of the keys and values appended in all.
    pub fn bytes(&self) -> usize {
        let appended = self.commits.iter().flat_map(|commit| &commit.appended);
        appended.map(|(key, value)| key.len() + value.len()).sum()
    }
}

impl Acknowledged {
    /// The keys of the run.
    pub fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        let queue = self.queue;
        (self.from..self.to).map(move |sequence| key(&queue, sequence))
    }

    /// The key of the first entry, and the one after the last.
    pub fn bounds(&self) -> (Key, Key) {
        (key(&self.queue, self.from), key(&self.queue, self.to))
    }
}

impl Holding {
    /// Counts an entry.
    pub fn add(&mut self, key: &[u8], value: &[u8]) {
        self.entries += 1;
        self.bytes += (key.len() + value.len()) as u64;
        self.digest = self.digest.wrapping_add(digest(key, value));
    }

    fn remove(&mut self, key: &[u8], value: &[u8]) {
        self.entries -= 1;
        self.bytes -= (key.len() + value.len()) as u64;
        self.digest = self.digest.wrapping_sub(digest(key, value));
    }
}

fn key(queue: &Queue, sequence: u64) -> Key {
    let mut key = Key::default();
    key[..9].copy_from_slice(queue);
    key[9..].copy_from_slice(&sequence.to_be_bytes());
    key
}

fn digest(key: &[u8], value: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, value).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_what_was_appended_is_left() {
        let workload = Workload::new(64, 64);
        assert_eq!(workload.commits.len(), 64);
        assert_eq!(workload.left.entries, 64 * 64 / 2);
    }
}
