//! Which worker answers an inference: a pure choice among candidates, with its reason.

use std::time::Duration;

use selvedge_proto::inference::{Preference, Residency, Tier};

use self::affinity::Member;
use self::health::Standing;

pub mod affinity;
pub mod budget;
pub mod health;
pub mod hedge;
pub mod waiting;

#[cfg(test)]
mod tests;

/// What the requester asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request<'a> {
    /// The requester's site.
    pub site: &'a str,
    /// Version wanted; empty for any.
    pub version: &'a str,
    /// How far the payload may travel.
    pub residency: Residency,
    /// Whom to favour.
    pub preference: Preference,
    /// Only this tier, for an escalation.
    pub tier: Option<Tier>,
    /// The fingerprint of its routing key, if it has one.
    pub affinity: Option<u64>,
    /// Size of the payload, if known; else zero.
    pub payload_bytes: u64,
    /// Time left.
    pub deadline: Duration,
}

/// What is known of one worker's model.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate<'a> {
    /// Site in the worker's certificate.
    pub site: &'a str,
    /// The fingerprint of the worker's identity.
    pub fingerprint: u64,
    /// Version it runs.
    pub version: &'a str,
    /// Its tier.
    pub tier: Tier,
    /// Requests it takes at once.
    pub slots: u32,
    /// Requests it has.
    pub outstanding: u32,
    /// Smoothed time of one request; zero while nothing is known.
    pub service_time: Duration,
    /// Round trip to it.
    pub rtt: Duration,
    /// Time that the request's payload takes on the way there, over the bandwidth that was measured; zero
    /// for one that fits a few packets.
    pub transfer: Duration,
    /// Whether it is trusted with requests.
    pub standing: Standing,
    /// Ready to answer without loading first.
    pub loaded: bool,
}

/// Why no worker is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody runs the model, or not in that version or tier.
    NotFound,
    /// Somebody does, but not where the payload may go. Trying again is pointless.
    Residency,
    /// Everybody who may is full.
    Busy {
        /// When a slot is expected.
        retry_after: Duration,
    },
    /// Nobody can finish in time.
    TooLate {
        /// Shortest expected completion.
        estimate: Duration,
    },
}

/// A choice and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Position among the candidates.
    pub index: usize,
    /// Expected time to completion.
    pub estimate: Duration,
    /// In words.
    pub reason: String,
}

/// Chooses from those that may answer and are favoured: by routing key if the request has one, else the
/// better of two random candidates by expected completion. `pick(n)` returns a random number below `n`.
///
/// # Errors
/// Nobody may answer, everybody is full, or nobody can be in time.
pub fn place(
    request: &Request<'_>,
    candidates: &[Candidate<'_>],
    mut pick: impl FnMut(usize) -> usize,
) -> Result<Choice, Refusal> {
    let runs = |candidate: &Candidate<'_>| {
        (request.version.is_empty() || request.version == candidate.version)
            && request.tier.is_none_or(|tier| tier == candidate.tier)
    };
    let may = |candidate: &Candidate<'_>| match request.residency {
        Residency::Site => candidate.site == request.site,
        // Candidates are of the requester's tenant: no other is ever looked at.
        Residency::Tenant | Residency::Any => true,
    };
    let running: Vec<usize> = (0..candidates.len())
        .filter(|&i| runs(&candidates[i]))
        .collect();
    if running.is_empty() {
        return Err(Refusal::NotFound);
    }
    let allowed: Vec<usize> = running
        .into_iter()
        .filter(|&i| may(&candidates[i]))
        .collect();
    if allowed.is_empty() {
        return Err(Refusal::Residency);
    }
    let mut trusted: Vec<usize> = allowed
        .iter()
        .copied()
        .filter(|&i| candidates[i].standing != Standing::Ejected)
        .collect();
    // Nobody is ejected when everybody would be: slots bound what a failing worker is given, and a request
    // has nowhere else to go. One of a certain tier has: the answer that is there already.
    if trusted.is_empty() && request.tier.is_none() {
        trusted.clone_from(&allowed);
    }
    let free: Vec<usize> = trusted
        .iter()
        .copied()
        .filter(|&i| candidates[i].outstanding < candidates[i].slots)
        .collect();
    if free.is_empty() {
        return Err(Refusal::Busy {
            retry_after: next_slot(trusted.iter().map(|&i| &candidates[i])),
        });
    }
    let in_time: Vec<usize> = free
        .iter()
        .copied()
        .filter(|&i| expected(&candidates[i]) <= request.deadline)
        .collect();
    if in_time.is_empty() {
        let estimate = free
            .iter()
            .map(|&i| expected(&candidates[i]))
            .min()
            .unwrap_or_default();
        return Err(Refusal::TooLate { estimate });
    }
    let favoured = |tier: Tier| -> Vec<usize> {
        in_time
            .iter()
            .copied()
            .filter(|&i| candidates[i].tier == tier)
            .collect()
    };
    let (pool, why) = match request.preference {
        _ if request.tier.is_some() => (in_time.clone(), "this tier only"),
        Preference::Fastest => (in_time.clone(), "least expected completion"),
        Preference::Edge => (favoured(Tier::Edge), "edge preferred"),
        Preference::Cheapest => (favoured(Tier::Edge), "edge is cheapest"),
        Preference::Cloud => (favoured(Tier::Cloud), "cloud preferred"),
    };
    let (pool, why) = if pool.is_empty() {
        (in_time, "the preferred tier has no free worker in time")
    } else {
        (pool, why)
    };
    let better = |a: usize, b: usize| {
        // A model in memory beats one that must be loaded first.
        let key = |i: usize| (!candidates[i].loaded, expected(&candidates[i]));
        if key(b) < key(a) { b } else { a }
    };
    let home = request
        .affinity
        .and_then(|key| at_home(key, &pool, candidates));
    let index = match (pool.len(), home) {
        (1, _) => pool[0],
        (_, Some(home)) => home,
        (count, None) => {
            let first = pick(count);
            let second = (first + 1 + pick(count - 1)) % count;
            better(pool[first], pool[second])
        }
    };
    let mut reason = format!("{why}, {} of {} workers free", free.len(), allowed.len());
    if home == Some(index) {
        reason.push_str(", by routing key");
    }
    match candidates[index].standing {
        Standing::Well => {}
        Standing::Probe => reason.push_str(", probing one that failed"),
        Standing::Ejected => reason.push_str(", all of them failing"),
    }
    Ok(Choice {
        index,
        estimate: expected(&candidates[index]),
        reason,
    })
}

/// The one of `pool` that a routing key's requests go to. One that has the model loaded, if there is one.
fn at_home(key: u64, pool: &[usize], candidates: &[Candidate<'_>]) -> Option<usize> {
    let any_loaded = pool.iter().any(|&i| candidates[i].loaded);
    let pool: Vec<usize> = (pool.iter().copied())
        .filter(|&i| candidates[i].loaded || !any_loaded)
        .collect();
    let members: Vec<Member> = (pool.iter())
        .map(|&i| Member {
            fingerprint: candidates[i].fingerprint,
            outstanding: candidates[i].outstanding,
        })
        .collect();
    affinity::choose(key, &members).map(|place| pool[place])
}

/// Time until one of these is expected to have a slot free, when all work at their usual pace: at least a
/// millisecond.
fn next_slot<'a>(workers: impl Iterator<Item = &'a Candidate<'a>>) -> Duration {
    let least = Duration::from_millis(1);
    let per_second: f64 = workers
        .map(|worker| f64::from(worker.slots) / worker.service_time.max(least).as_secs_f64())
        .sum();
    Duration::try_from_secs_f64(1.0 / per_second)
        .map_or(Duration::from_secs(1), |time| time.max(least))
}

/// Expected time to completion: the way there and back, and the work before and of this request
/// over the slots that share it.
pub fn expected(candidate: &Candidate<'_>) -> Duration {
    let rounds = candidate.outstanding / candidate.slots.max(1) + 1;
    candidate.rtt + candidate.transfer + candidate.service_time.saturating_mul(rounds)
}
