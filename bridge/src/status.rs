//! What a remote and its rules are doing: connection, counters, lag.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::mapping::Rule;
use crate::properties::HopRefusal;
use crate::spool::QueueStatus;

/// Why a message was not carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// It has passed this bridge and remote before.
    Loop,
    /// It has passed too many brokers and bridges.
    TooManyHops,
    /// No rule gives its topic a name on the other side.
    Unmapped,
    /// It is larger than the other side takes.
    TooLarge,
    /// The other side refused it for good.
    Refused,
    /// Its lifetime ended on the way.
    Expired,
    /// QoS 0, and what is on its way to the fabric has reached its bound.
    Overflow,
    /// QoS 0, and the other side is not connected.
    Disconnected,
}

impl DropReason {
    /// The label of the reason in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loop => "loop",
            Self::TooManyHops => "too_many_hops",
            Self::Unmapped => "unmapped",
            Self::TooLarge => "too_large",
            Self::Refused => "refused",
            Self::Expired => "expired",
            Self::Overflow => "overflow",
            Self::Disconnected => "disconnected",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl From<HopRefusal> for DropReason {
    fn from(refusal: HopRefusal) -> Self {
        match refusal {
            HopRefusal::Loop => Self::Loop,
            HopRefusal::TooMany => Self::TooManyHops,
        }
    }
}

/// One remote at one moment.
#[derive(Debug, Clone)]
pub struct RemoteStatus {
    /// Its name in the configuration.
    pub name: String,
    /// The remote has accepted the connection.
    pub connected: bool,
    /// The fabric has accepted the remote's own connection there.
    pub fabric_connected: bool,
    /// Connected, and every inward rule's subscription is granted.
    pub ready: bool,
    /// How often the remote has accepted a connection.
    pub connections: u64,
    /// The latest thing that went wrong with the connection or a message that no rule took.
    pub last_error: Option<String>,
    /// Messages that were not carried and belong to no rule.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Messages on their way to the fabric.
    pub inward: QueueStatus,
    /// Messages on their way to the remote.
    pub outward: QueueStatus,
    /// What is wrong with the bridge's own disk, while something is: nothing is acknowledged then.
    pub store_error: Option<String>,
    /// The rules, in the order of the configuration.
    pub rules: Vec<RuleStatus>,
}

/// One rule at one moment.
#[derive(Debug, Clone)]
pub struct RuleStatus {
    /// The rule, for people.
    pub rule: String,
    /// Messages the fabric has taken from the remote.
    pub forwarded_in: u64,
    /// Messages the remote has taken from the fabric.
    pub forwarded_out: u64,
    /// Messages that were not carried.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Messages that one side or the other delivered again and that were known: they were not
    /// carried twice.
    pub repeated: u64,
    /// Messages on their way, not yet acknowledged by the other side.
    pub in_flight: u64,
    /// How long the oldest of them has been on its way, in both directions; zero when there is none.
    pub lag: Duration,
    /// The latest thing that went wrong.
    pub last_error: Option<String>,
}

/// The shared record of one remote. A cheap handle; every call is short and never waits.
#[derive(Debug, Clone)]
pub(crate) struct Record(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    ready: watch::Sender<bool>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    connected: bool,
    connections: u64,
    last_error: Option<String>,
    dropped: BTreeMap<DropReason, u64>,
    rules: Vec<RuleState>,
}

#[derive(Debug, Default)]
struct RuleState {
    label: String,
    forwarded_in: u64,
    forwarded_out: u64,
    dropped: BTreeMap<DropReason, u64>,
    repeated: u64,
    last_error: Option<String>,
}

/// Which way a message went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    In,
    Out,
}

impl Record {
    pub(crate) fn new(name: &str, rules: &[Rule]) -> Self {
        let rules = rules.iter().map(|rule| RuleState {
            label: rule.to_string(),
            ..RuleState::default()
        });
        Self(Arc::new(Inner {
            name: name.to_owned(),
            ready: watch::Sender::new(false),
            state: Mutex::new(State {
                rules: rules.collect(),
                ..State::default()
            }),
        }))
    }

    /// What is known here; the caller adds what queues and the fabric's client know.
    pub(crate) fn snapshot(&self) -> RemoteStatus {
        let ready = *self.0.ready.borrow();
        self.with(|state| RemoteStatus {
            name: self.0.name.clone(),
            connected: state.connected,
            fabric_connected: false,
            ready,
            connections: state.connections,
            last_error: state.last_error.clone(),
            dropped: state.dropped.clone(),
            inward: QueueStatus::default(),
            outward: QueueStatus::default(),
            store_error: None,
            rules: state
                .rules
                .iter()
                .map(|rule| RuleStatus {
                    rule: rule.label.clone(),
                    forwarded_in: rule.forwarded_in,
                    forwarded_out: rule.forwarded_out,
                    dropped: rule.dropped.clone(),
                    repeated: rule.repeated,
                    in_flight: 0,
                    lag: Duration::ZERO,
                    last_error: rule.last_error.clone(),
                })
                .collect(),
        })
    }

    pub(crate) fn ready(&self) -> watch::Receiver<bool> {
        self.0.ready.subscribe()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.with(|state| state.connected)
    }

    pub(crate) fn connected(&self) {
        self.with(|state| {
            state.connected = true;
            state.connections += 1;
        });
    }

    pub(crate) fn subscribed(&self) {
        self.0.ready.send_replace(true);
    }

    pub(crate) fn disconnected(&self, reason: &str) {
        self.0.ready.send_replace(false);
        self.with(|state| {
            state.connected = false;
            state.last_error = Some(reason.to_owned());
        });
    }

    pub(crate) fn rule_error(&self, rule: usize, error: String) {
        self.rule(rule, |rule| rule.last_error = Some(error));
    }

    /// Counts a message that was not carried, under its rule if it has one.
    pub(crate) fn dropped(&self, rule: Option<usize>, reason: DropReason, error: Option<String>) {
        self.with(|state| {
            let (dropped, last_error) = match rule.and_then(|rule| state.rules.get_mut(rule)) {
                Some(rule) => (&mut rule.dropped, &mut rule.last_error),
                None => (&mut state.dropped, &mut state.last_error),
            };
            *dropped.entry(reason).or_default() += 1;
            if error.is_some() {
                *last_error = error;
            }
        });
    }

    pub(crate) fn forwarded(&self, rule: usize, way: Way) {
        self.rule(rule, |rule| match way {
            Way::In => rule.forwarded_in += 1,
            Way::Out => rule.forwarded_out += 1,
        });
    }

    /// Counts a message that came again and was known.
    pub(crate) fn repeated(&self, rule: usize) {
        self.rule(rule, |rule| rule.repeated += 1);
    }

    fn rule(&self, rule: usize, change: impl FnOnce(&mut RuleState)) {
        self.with(|state| {
            if let Some(rule) = state.rules.get_mut(rule) {
                change(rule);
            }
        });
    }

    fn with<R>(&self, use_state: impl FnOnce(&mut State) -> R) -> R {
        // Counters are as good after a panic as before it.
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        use_state(&mut state)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::mapping::Direction;

    #[test]
    fn figures_follow_the_messages() {
        let rules = [Rule::new(Direction::Both, "#", "a/", "b/").unwrap()];
        let record = Record::new("plant", &rules);
        record.forwarded(0, Way::In);
        record.repeated(0);
        record.dropped(Some(0), DropReason::Loop, None);
        record.dropped(None, DropReason::Unmapped, Some("why".into()));
        let status = record.snapshot();
        assert_eq!(status.rules[0].repeated, 1);
        assert_eq!(status.rules[0].forwarded_in, 1);
        assert_eq!(status.rules[0].forwarded_out, 0);
        assert_eq!(status.rules[0].dropped[&DropReason::Loop], 1);
        assert_eq!(status.dropped[&DropReason::Unmapped], 1);
        assert_eq!(status.last_error.as_deref(), Some("why"));
    }
}
