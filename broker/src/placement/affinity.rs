//! Requests with the same routing key go to the same worker, for what it has kept from the last one, such as
//! the cache of a prompt. By rendezvous hashing: each key ranks the workers in an order of its own, so one that
//! comes or goes moves no keys but those it takes or had. With bounded load: one that already has a quarter
//! more than the mean is passed over. Pure.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

#[cfg(test)]
mod tests;

/// Longest routing key, in bytes.
pub const MAX_ROUTING_KEY: usize = 128;

/// A worker that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// See [`fingerprint`], of its identity.
    pub fingerprint: u64,
    /// Requests it has.
    pub outstanding: u32,
}

/// What a routing key or a worker's identity is ranked by. The same for as long as the broker runs.
pub fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// The member that a key's requests go to; `None` of none.
pub fn choose(key: u64, members: &[Member]) -> Option<usize> {
    let outstanding: u64 = (members.iter())
        .map(|member| u64::from(member.outstanding))
        .sum();
    let count = members.len() as u64;
    // A quarter more than the mean, this request counted, and rounded up: somebody is always below.
    let bound = ((outstanding + 1) * 5).div_ceil((count * 4).max(1));
    let rank = |member: &Member| {
        let mut hasher = DefaultHasher::new();
        (key, member.fingerprint).hash(&mut hasher);
        hasher.finish()
    };
    (members.iter().enumerate())
        .filter(|(_, member)| u64::from(member.outstanding) < bound)
        .max_by_key(|(_, member)| rank(member))
        .map(|(place, _)| place)
}
