//! Who answers calls: responders by service name, and the choice among them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::Rng;
use selvedge_certs::Identity;
use selvedge_proto::status::Code;
use selvedge_proto::topic::TopicName;
use tokio::sync::Notify;

pub use crate::calls::messages::MessageLink;
use crate::clock;
use crate::statistics::Statistics;

pub(crate) mod overview;

/// The services of one tenant.
#[derive(Debug, Default)]
pub struct Services {
    inner: Mutex<HashMap<TopicName, Service>>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Service {
    responders: Vec<Arc<Responder>>,
    /// When the last responder was lost with its connection rather than withdrawn.
    lost: Option<Instant>,
}

/// One registration of a service.
#[derive(Debug)]
pub struct Responder {
    /// Who, as verified.
    pub identity: Identity,
    /// Chosen by the client, unique on its connection.
    pub registration: u32,
    /// The way to it.
    pub link: Link,
    /// Calls at once; zero for no bound of its own.
    pub max_in_flight: u32,
    load: Load,
    statistics: Statistics,
}

/// How a responder is reached.
#[derive(Debug, Clone)]
pub enum Link {
    /// Each call is a stream of a connection of QUIC.
    Quic(quinn::Connection),
    /// Each call is a message to a connection of MQTT, and its answer some messages back.
    Messages(MessageLink),
}

/// Outstanding work and smoothed service time of one responder or model.
#[derive(Debug, Default)]
pub struct Load {
    outstanding: AtomicU32,
    service_us: AtomicU64,
}

impl Load {
    /// Requests in progress.
    pub fn outstanding(&self) -> u32 {
        self.outstanding.load(Ordering::Acquire)
    }

    /// Smoothed time of one request; zero while nothing is known.
    pub fn service_time(&self) -> Duration {
        Duration::from_micros(self.service_us.load(Ordering::Relaxed))
    }

    /// States a service time that was measured elsewhere.
    pub fn set_service_time(&self, time: Duration) {
        self.service_us.store(micros(time), Ordering::Relaxed);
    }

    /// Adds a measured service time to the smoothed one, with a weight of one eighth.
    pub fn record(&self, time: Duration) {
        let sample = micros(time);
        let _ = self
            .service_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                Some(if held == 0 {
                    sample.max(1)
                } else {
                    held - held / 8 + sample / 8
                })
            });
    }

    /// Counts one more request unless `limit` are outstanding; zero is no limit. Exact under any
    /// number of callers.
    pub fn try_begin(&self, limit: u32) -> bool {
        self.outstanding
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |held| {
                (limit == 0 || held < limit).then_some(held + 1)
            })
            .is_ok()
    }

    /// Counts one request less.
    pub fn end(&self) {
        self.outstanding.fetch_sub(1, Ordering::AcqRel);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What the choice looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// At the caller's site.
    pub same_site: bool,
    /// Calls in progress.
    pub outstanding: u32,
    /// Smoothed time of one call.
    pub service_time: Duration,
    /// Takes no more now.
    pub full: bool,
}

/// The better of two random candidates by expected completion, of those at the caller's site if
/// any has room, else of all with room. `pick(n)` returns a random number below `n`.
pub fn choose(candidates: &[Candidate], mut pick: impl FnMut(usize) -> usize) -> Option<usize> {
    let near: Vec<usize> = (0..candidates.len())
        .filter(|&index| candidates[index].same_site && !candidates[index].full)
        .collect();
    let pool = if near.is_empty() {
        (0..candidates.len())
            .filter(|&index| !candidates[index].full)
            .collect()
    } else {
        near
    };
    let expected = |index: usize| {
        let candidate = &candidates[index];
        candidate.service_time.max(Duration::from_micros(1)) * (candidate.outstanding + 1)
    };
    match pool.len() {
        0 => None,
        1 => Some(pool[0]),
        count => {
            let first = pick(count);
            let second = (first + 1 + pick(count - 1)) % count;
            let (first, second) = (pool[first], pool[second]);
            Some(if expected(second) < expected(first) {
                second
            } else {
                first
            })
        }
    }
}

/// Why no responder takes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoResponder {
    /// Nobody serves it.
    NotFound,
    /// Everybody who serves it is full.
    Full {
        /// Smoothed time of one call, as advice when to try again.
        service_time: Duration,
    },
}

/// One call counted at its responder until this is dropped.
#[derive(Debug)]
pub struct Placed {
    /// Who takes the call.
    pub responder: Arc<Responder>,
    begun: Instant,
}

impl Placed {
    /// The call has ended with this code.
    pub fn end(self, code: Code) {
        let statistics = &self.responder.statistics;
        statistics.record(code, self.begun.elapsed());
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.responder.load.record(self.begun.elapsed());
        self.responder.load.end();
    }
}

impl Services {
    /// Registers a responder.
    pub fn insert(&self, service: TopicName, responder: Responder) -> Arc<Responder> {
        let responder = Arc::new(responder);
        let mut inner = self.inner.lock();
        let entry = inner.entry(service).or_default();
        entry.responders.push(Arc::clone(&responder));
        entry.lost = None;
        drop(inner);
        self.arrived.notify_waiters();
        responder
    }

    /// Withdraws a responder. One that was lost with its connection may come back, so callers wait
    /// for it a little.
    pub fn remove(&self, service: &TopicName, responder: &Arc<Responder>, lost: Option<Instant>) {
        let mut inner = self.inner.lock();
        let Some(entry) = inner.get_mut(service) else {
            return;
        };
        entry
            .responders
            .retain(|held| !Arc::ptr_eq(held, responder));
        if entry.responders.is_empty() {
            match lost {
                Some(_) => entry.lost = lost,
                None => {
                    inner.remove(service);
                }
            }
        }
    }

    /// Places a call, waiting up to `grace` for a responder that is expected back, and no longer
    /// than `deadline`.
    ///
    /// # Errors
    /// Nobody serves it, or everybody is full.
    pub async fn place(
        &self,
        service: &TopicName,
        site: &str,
        start_grace: Duration,
        resume_grace: Duration,
        deadline: Instant,
    ) -> Result<Placed, NoResponder> {
        let begun = clock::now();
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // Registered before the look, so that an arrival between look and wait is not missed.
            arrived.as_mut().enable();
            let error = match self.try_place(service, site) {
                Ok(placed) => return Ok(placed),
                Err(error) => error,
            };
            if error != NoResponder::NotFound {
                return Err(error);
            }
            let lost = self
                .inner
                .lock()
                .get(service)
                .and_then(|service| service.lost);
            let until = lost
                .map_or(begun + start_grace, |lost| {
                    (lost + resume_grace).max(begun + start_grace)
                })
                .min(deadline);
            if until <= clock::now() {
                return Err(error);
            }
            let _ = tokio::time::timeout_at(until.into(), arrived).await;
        }
    }

    fn try_place(&self, service: &TopicName, site: &str) -> Result<Placed, NoResponder> {
        let inner = self.inner.lock();
        let responders = match inner.get(service) {
            Some(service) if !service.responders.is_empty() => &service.responders,
            _ => return Err(NoResponder::NotFound),
        };
        let mut candidates: Vec<Candidate> = responders
            .iter()
            .map(|responder| Candidate {
                same_site: responder.identity.site() == site,
                outstanding: responder.load.outstanding(),
                service_time: responder.load.service_time(),
                full: responder.max_in_flight > 0
                    && responder.load.outstanding() >= responder.max_in_flight,
            })
            .collect();
        let mut random = rand::rng();
        while let Some(chosen) = choose(&candidates, |count| random.random_range(0..count)) {
            let responder = &responders[chosen];
            if responder.load.try_begin(responder.max_in_flight) {
                return Ok(Placed {
                    responder: Arc::clone(responder),
                    begun: clock::now(),
                });
            }
            candidates[chosen].full = true;
        }
        let service_time = responders
            .iter()
            .map(|responder| responder.load.service_time())
            .min()
            .unwrap_or_default();
        Err(NoResponder::Full { service_time })
    }

    /// Forgets services whose responders were lost longer than `grace` ago. Names are the clients' to
    /// choose, so what is remembered of the lost must not grow with them.
    pub fn forget_lost(&self, now: Instant, grace: Duration) {
        self.inner.lock().retain(|_, service| {
            !service.responders.is_empty()
                || service
                    .lost
                    .is_some_and(|lost| now.saturating_duration_since(lost) < grace)
        });
    }

    /// Withdraws every responder that `keep` does not allow; returns how many.
    pub fn retain(&self, keep: impl Fn(&Identity, &TopicName) -> bool) -> usize {
        let mut removed = 0;
        self.inner.lock().retain(|name, service| {
            service.responders.retain(|responder| {
                let kept = keep(&responder.identity, name);
                removed += usize::from(!kept);
                kept
            });
            !service.responders.is_empty() || service.lost.is_some()
        });
        removed
    }

    /// Names and responder counts, for people.
    pub fn list(&self) -> Vec<(TopicName, usize)> {
        let responders = self.responders().into_iter();
        responders
            .map(|(name, responders)| (name, responders.len()))
            .collect()
    }

    /// Every service with its responders, by name.
    pub fn responders(&self) -> Vec<(TopicName, Vec<Arc<Responder>>)> {
        let inner = self.inner.lock();
        let mut list: Vec<_> = inner
            .iter()
            .filter(|(_, service)| !service.responders.is_empty())
            .map(|(name, service)| (name.clone(), service.responders.clone()))
            .collect();
        drop(inner);
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }
}

impl Responder {
    /// A responder without calls.
    pub fn new(identity: Identity, registration: u32, link: Link, max_in_flight: u32) -> Self {
        Self {
            identity,
            registration,
            link,
            max_in_flight,
            load: Load::default(),
            statistics: Statistics::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let candidate = (any::<bool>(), 0u32..50, 0u64..1000, any::<bool>()).prop_map(
            |(same_site, outstanding, ms, full)| Candidate {
                same_site,
                outstanding,
                service_time: Duration::from_millis(ms),
                full,
            },
        );
        proptest::collection::vec(candidate, 0..8)
    }

    proptest! {
        #[test]
        fn the_choice_has_room_and_is_near_when_it_can_be(candidates in candidates(), seed: u64) {
            let mut state = seed;
            let chosen = choose(&candidates, |count| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as usize % count
            });
            match chosen {
                None => prop_assert!(candidates.iter().all(|candidate| candidate.full)),
                Some(index) => {
                    prop_assert!(!candidates[index].full);
                    let near = candidates.iter().any(|candidate| candidate.same_site && !candidate.full);
                    prop_assert_eq!(candidates[index].same_site, near);
                }
            }
        }

        #[test]
        fn of_two_the_one_expected_sooner_is_chosen(a in 0u32..100, b in 0u32..100, pick: bool) {
            let candidate = |outstanding| Candidate {
                same_site: false, outstanding, service_time: Duration::from_millis(5), full: false,
            };
            let both = [candidate(a), candidate(b)];
            let chosen = choose(&both, |count| usize::from(pick) % count).unwrap();
            prop_assert_eq!(both[chosen].outstanding, a.min(b));
        }
    }

    #[test]
    fn what_was_lost_is_remembered_for_the_grace_and_no_longer() {
        let services = Services::default();
        let lost = Instant::now();
        let grace = Duration::from_secs(5);
        for number in 0..100 {
            let service = Service {
                responders: Vec::new(),
                lost: Some(lost),
            };
            let name = TopicName::parse(format!("press-{number}")).unwrap();
            services.inner.lock().insert(name, service);
        }
        services.forget_lost(lost + grace / 2, grace);
        assert_eq!(services.inner.lock().len(), 100);
        services.forget_lost(lost + grace, grace);
        assert_eq!(services.inner.lock().len(), 0);
    }

    #[test]
    fn credits_are_exact_under_contention() {
        let load = Load::default();
        let begun = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        if load.try_begin(100) {
                            begun.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(begun.into_inner(), 100);
        assert_eq!(load.outstanding(), 100);
    }
}
