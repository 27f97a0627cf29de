//! Who wants what: subscriptions of one tenant by topic filter, and the route of a topic.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::topic::{FilterLevel, ShareGroup, TopicName};

use crate::queue::{DeliveryQueue, Entry, Overflow, Vacancy};
use crate::session::Subscriber;

#[cfg(test)]
mod tests;

/// The subscriptions of one tenant. Every change raises the generation, which is how cached routes
/// notice.
#[derive(Debug, Default)]
pub struct Router {
    root: RwLock<Node>,
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Self>,
    plus: Option<Box<Self>>,
    here: Subscribers,
    /// Subscriptions that end in `#` at this level.
    below: Subscribers,
}

#[derive(Debug, Default)]
struct Subscribers {
    single: Vec<Arc<Subscriber>>,
    groups: Vec<(ShareGroup, Arc<Group>)>,
}

/// The members of one share group on one filter; each message goes to one of them.
#[derive(Debug, Default)]
pub struct Group {
    members: Mutex<Vec<Arc<Subscriber>>>,
    next: AtomicUsize,
    /// Messages may wait in the queues of offline members until another member has room.
    waiting: AtomicBool,
}

/// Who gets a message of a share group.
#[derive(Debug)]
pub enum Choice {
    /// A member with a connection and room.
    Member(Arc<Subscriber>),
    /// Nobody now: it waits in the kept queue of this offline member, until some member has room.
    Waits(Arc<Subscriber>),
    /// Nobody, and nobody keeps it.
    Nobody,
}

/// Where the messages of one topic from one session go.
#[derive(Debug, Default)]
pub struct Route {
    /// Generation of the router it was made from.
    pub generation: u64,
    /// One per receiving lane group.
    pub targets: Vec<Target>,
    /// One member of each gets a message.
    pub groups: Vec<Arc<Group>>,
    /// Some receiver refuses publishers when its queue is full, so they have to ask first.
    pub may_refuse: bool,
}

/// One receiver of a topic.
#[derive(Debug, Clone)]
pub struct Target {
    /// A subscription that leads there; others of the same session may, too.
    pub subscriber: Arc<Subscriber>,
    /// Highest quality of service that the matching subscriptions take.
    pub max_qos: Qos,
}

impl Router {
    /// The generation now. A route of an older one is stale.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Adds a subscription. Returns the first generation that has it.
    pub fn insert(&self, subscriber: Arc<Subscriber>) -> u64 {
        let mut root = self.root.write();
        root.insert(subscriber);
        self.generation.fetch_add(1, Ordering::Release) + 1
    }

    /// Takes a subscription out; `false` when it is not there.
    pub fn remove(&self, subscriber: &Subscriber) -> bool {
        let mut root = self.root.write();
        let removed = root.take_out(subscriber);
        if removed {
            self.generation.fetch_add(1, Ordering::Release);
        }
        removed
    }

    /// Puts a subscription in the place of another in one step: no message between them is missed
    /// and none is seen twice. Returns the first generation that has the new one.
    pub fn replace(&self, previous: &Subscriber, subscriber: Arc<Subscriber>) -> u64 {
        let mut root = self.root.write();
        root.take_out(previous);
        root.insert(subscriber);
        self.generation.fetch_add(1, Ordering::Release) + 1
    }

    /// The route of a topic published by the session with the id `publisher`.
    pub fn route(&self, topic: &TopicName, publisher: u64) -> Route {
        let root = self.root.read();
        let mut route = Route {
            generation: self.generation(),
            ..Route::default()
        };
        let refuses = |subscriber: &Arc<Subscriber>| subscriber.overflow == Overflow::Refuse;
        let levels: Vec<&str> = topic.levels().collect();
        let mut found = Vec::new();
        root.find(&levels, !topic.is_system(), &mut |subscribers| {
            found.push(subscribers);
        });
        // Position of a session's shared lanes among the targets.
        let mut shared: HashMap<u64, usize> = HashMap::new();
        for subscribers in found {
            for subscriber in &subscribers.single {
                if !is_receiver(subscriber, topic, publisher) {
                    continue;
                }
                if !subscriber.own_lane
                    && let Some(&position) = shared.get(&subscriber.session_id)
                {
                    let target: &mut Target = &mut route.targets[position];
                    target.max_qos = target.max_qos.max(subscriber.max_qos);
                    continue;
                }
                if !subscriber.own_lane {
                    shared.insert(subscriber.session_id, route.targets.len());
                }
                route.may_refuse |= refuses(subscriber);
                route.targets.push(Target {
                    subscriber: Arc::clone(subscriber),
                    max_qos: subscriber.max_qos,
                });
            }
            for (_, group) in &subscribers.groups {
                route.may_refuse |= group.members.lock().iter().any(refuses);
                route.groups.push(Arc::clone(group));
            }
        }
        route
    }

    /// Every subscription whose filter matches a topic, members of share groups among them, whether or
    /// not policy leaves the topic out of it.
    pub fn matching(&self, topic: &TopicName) -> Vec<Arc<Subscriber>> {
        let root = self.root.read();
        let levels: Vec<&str> = topic.levels().collect();
        let mut matching = Vec::new();
        root.find(&levels, !topic.is_system(), &mut |found: &Subscribers| {
            matching.extend(found.single.iter().cloned());
            for (_, group) in &found.groups {
                matching.extend(group.members.lock().iter().cloned());
            }
        });
        matching
    }
}

impl Group {
    /// Who gets the next message of `topic`: the members with a connection and room in turn. A
    /// message is never assigned to an offline or a full member; QoS 1 may wait in the kept queue of
    /// an offline one: [`Self::settle`] has to be called once it is there.
    pub fn choose(&self, topic: &TopicName, publisher: u64, class: Class, qos: Qos) -> Choice {
        let members = self.members.lock();
        let vacancy = |member: &Arc<Subscriber>| member.queues[class.index()].vacancy();
        for member in in_turn(&members, &self.next) {
            if vacancy(member) == Vacancy::Takes && is_receiver(member, topic, publisher) {
                return Choice::Member(Arc::clone(member));
            }
        }
        // Always the same one while it can, so that what waits stays in order.
        let keeper = members.iter().find(|member| {
            qos.min(member.max_qos) != Qos::AtMostOnce
                && vacancy(member) == Vacancy::Keeps
                && is_receiver(member, topic, publisher)
        });
        keeper.map_or(Choice::Nobody, |keeper| Choice::Waits(Arc::clone(keeper)))
    }

    /// Whether a member refuses publishers when it is full.
    pub fn refuses(&self) -> bool {
        let members = self.members.lock();
        members
            .iter()
            .any(|member| member.overflow == Overflow::Refuse)
    }

    /// Something may wait with a member that cannot take it, since the member has lost its connection
    /// or keeps it for the others: gives it to one that can, now or when there is one.
    pub fn settle(&self) {
        let members = self.members.lock();
        // Set during the search, so that a member that comes meanwhile searches after this.
        self.waiting.store(true, Ordering::Release);
        let mut left = false;
        for offline in members.iter() {
            for queue in &offline.queues {
                while let Some(entry) = queue.withdraw() {
                    if !self.assign(&members, queue, &entry) {
                        queue.put_back(entry);
                        left = true;
                        break;
                    }
                }
            }
        }
        self.waiting.store(left, Ordering::Release);
    }

    /// A member has a connection or room that it had not: gives it what waits.
    pub fn hand_on(&self) {
        if self.waiting.load(Ordering::Acquire) {
            self.settle();
        }
    }

    /// A member has ended: what it has not acknowledged goes to another.
    pub fn take_over(&self, member: &Subscriber) {
        for queue in &member.queues {
            queue.offline();
        }
        let members = self.members.lock();
        for queue in &member.queues {
            while let Some(entry) = queue.withdraw() {
                if !self.assign(&members, queue, &entry) {
                    queue.put_back(entry);
                    break;
                }
            }
        }
    }

    /// Gives an entry of one member's queue to another member with a connection and room.
    fn assign(&self, members: &[Arc<Subscriber>], from: &DeliveryQueue, entry: &Entry) -> bool {
        let flow = &entry.batch.flow;
        let class = from.class.index();
        let adopted = in_turn(members, &self.next).any(|member| {
            let batch = Arc::clone(&entry.batch).at_most(member.max_qos);
            !std::ptr::eq(Arc::as_ptr(&member.queues[class]), from)
                && is_receiver(member, &flow.topic, flow.session)
                && member.queues[class].adopt(&batch, entry.duplicate)
        });
        if adopted {
            from.forget(entry);
        }
        adopted
    }
}

/// The members, beginning with the one whose turn it is.
fn in_turn<'a>(
    members: &'a [Arc<Subscriber>],
    next: &AtomicUsize,
) -> impl Iterator<Item = &'a Arc<Subscriber>> {
    let start = next.fetch_add(1, Ordering::Relaxed) % members.len().max(1);
    members[start..].iter().chain(&members[..start])
}

/// Whether a subscription that matches the topic's levels gets what this session publishes there.
pub fn is_receiver(subscriber: &Subscriber, topic: &TopicName, publisher: u64) -> bool {
    let own = subscriber.no_local && subscriber.session_id == publisher;
    let denied = subscriber
        .residual
        .iter()
        .any(|filter| filter.matches(topic));
    !own && !denied
}

impl Node {
    fn insert(&mut self, subscriber: Arc<Subscriber>) {
        let mut node = self;
        let filter = subscriber.target.filter.clone();
        let mut below = false;
        for level in filter.levels() {
            match level {
                FilterLevel::Literal(literal) => {
                    if !node.children.contains_key(literal) {
                        node.children.insert(literal.into(), Self::default());
                    }
                    node = node
                        .children
                        .get_mut(literal)
                        .expect("it was just inserted");
                }
                FilterLevel::One => node = node.plus.get_or_insert_default(),
                FilterLevel::Rest => below = true,
            }
        }
        let subscribers = if below {
            &mut node.below
        } else {
            &mut node.here
        };
        subscribers.insert(subscriber);
    }

    fn take_out(&mut self, subscriber: &Subscriber) -> bool {
        let levels: Vec<FilterLevel<'_>> = subscriber.target.filter.levels().collect();
        self.remove(&levels, subscriber)
    }

    fn find<'a>(
        &'a self,
        levels: &[&str],
        wildcards: bool,
        found: &mut impl FnMut(&'a Subscribers),
    ) {
        if wildcards {
            found(&self.below);
        }
        let Some((&level, rest)) = levels.split_first() else {
            found(&self.here);
            return;
        };
        if let Some(child) = self.children.get(level) {
            child.find(rest, true, found);
        }
        if wildcards && let Some(plus) = &self.plus {
            plus.find(rest, true, found);
        }
    }

    fn remove(&mut self, levels: &[FilterLevel<'_>], subscriber: &Subscriber) -> bool {
        match levels.split_first() {
            None => self.here.remove(subscriber),
            Some((FilterLevel::Rest, _)) => self.below.remove(subscriber),
            Some((FilterLevel::One, rest)) => {
                let Some(plus) = &mut self.plus else {
                    return false;
                };
                let removed = plus.remove(rest, subscriber);
                if plus.is_empty() {
                    self.plus = None;
                }
                removed
            }
            Some((FilterLevel::Literal(literal), rest)) => {
                let Some(child) = self.children.get_mut(*literal) else {
                    return false;
                };
                let removed = child.remove(rest, subscriber);
                if child.is_empty() {
                    self.children.remove(*literal);
                }
                removed
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.children.is_empty()
            && self.plus.is_none()
            && self.here.is_empty()
            && self.below.is_empty()
    }
}

impl Subscribers {
    fn insert(&mut self, subscriber: Arc<Subscriber>) {
        let Some(share) = &subscriber.target.share else {
            self.single.push(subscriber);
            return;
        };
        let group = match self.groups.iter().find(|(name, _)| name == share) {
            Some((_, group)) => group,
            None => {
                self.groups.push((share.clone(), Arc::default()));
                &self.groups[self.groups.len() - 1].1
            }
        };
        let _ = subscriber.group.set(Arc::downgrade(group));
        group.members.lock().push(subscriber);
    }

    fn remove(&mut self, subscriber: &Subscriber) -> bool {
        let is_it = |held: &Arc<Subscriber>| std::ptr::eq(&raw const **held, subscriber);
        let Some(share) = &subscriber.target.share else {
            let position = self.single.iter().position(is_it);
            return position
                .map(|position| self.single.swap_remove(position))
                .is_some();
        };
        let Some(place) = self.groups.iter().position(|(name, _)| name == share) else {
            return false;
        };
        let mut members = self.groups[place].1.members.lock();
        let position = members.iter().position(is_it);
        let removed = position
            .map(|position| members.swap_remove(position))
            .is_some();
        let empty = members.is_empty();
        drop(members);
        if empty {
            self.groups.swap_remove(place);
        }
        removed
    }

    fn is_empty(&self) -> bool {
        self.single.is_empty() && self.groups.is_empty()
    }
}
