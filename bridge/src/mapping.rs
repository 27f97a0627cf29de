//! The pure topic mapping between a remote broker and the fabric, and the search for rules that loop.

use std::collections::HashSet;
use std::fmt;

use selvedge_proto::message::{Durability, Qos};
use selvedge_proto::topic::{FilterLevel, TopicError, TopicFilter, TopicName};

/// Which way a rule carries messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the remote broker into the fabric.
    In,
    /// From the fabric to the remote broker.
    Out,
    /// Both ways, over one mapping.
    Both,
}

impl Direction {
    /// Whether messages of the remote enter the fabric.
    pub fn carries_in(self) -> bool {
        matches!(self, Self::In | Self::Both)
    }

    /// Whether messages of the fabric leave for the remote.
    pub fn carries_out(self) -> bool {
        matches!(self, Self::Out | Self::Both)
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Both => "both",
        })
    }
}

/// What becomes of the retain flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Retain {
    /// A retained message stays one on the other side.
    #[default]
    Keep,
    /// Messages arrive on the other side unretained.
    Clear,
}

impl Retain {
    /// The flag for the other side.
    pub fn apply(self, retain: bool) -> bool {
        retain && self == Self::Keep
    }
}

/// The MQTT version spoken with a remote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Version {
    /// MQTT 3.1.1: no properties, so no hop list, and no way to refuse one's own messages.
    V311,
    /// MQTT 5.0.
    #[default]
    V5,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V311 => "3.1.1",
            Self::V5 => "5",
        })
    }
}

/// Why a rule's filter and prefixes do not make a mapping.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A prefix ends within a level.
    #[error(
        "expected {side}_prefix to be empty or to end with `/`, found {prefix:?}; \
         write {prefix:?} with a `/` at its end"
    )]
    PrefixWithinLevel {
        /// `remote` or `local`.
        side: &'static str,
        /// The prefix.
        prefix: String,
    },
    /// A prefix holds a wildcard.
    #[error(
        "expected {side}_prefix without wildcards, found {prefix:?}; put wildcards into the filter"
    )]
    PrefixWildcard {
        /// `remote` or `local`.
        side: &'static str,
        /// The prefix.
        prefix: String,
    },
    /// Prefix and filter together are no topic filter.
    #[error("{side}_prefix and filter together make {found:?}: {reason}")]
    Filter {
        /// `remote` or `local`.
        side: &'static str,
        /// The two put together.
        found: String,
        /// What is wrong with it.
        reason: TopicError,
    },
}

/// One rule: which topics are carried which way, and under which name on the other side.
///
/// The filter is relative: a topic is carried when it is `prefix + rest` on its own side with `rest`
/// in the filter, and becomes the other side's prefix with the same `rest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    direction: Direction,
    filter: Box<str>,
    remote_prefix: Box<str>,
    local_prefix: Box<str>,
    remote_filter: TopicFilter,
    local_filter: TopicFilter,
    /// The best quality of service that messages are carried with.
    pub qos_cap: Qos,
    /// What becomes of the retain flag.
    pub retain: Retain,
    /// What the fabric must have done with a message before the remote's acknowledgement.
    pub durability: Durability,
}

impl Rule {
    /// A rule that carries QoS 1 and keeps the retain flag.
    ///
    /// # Errors
    /// [`RuleError`] when prefixes and filter do not make topic filters on both sides.
    pub fn new(
        direction: Direction,
        filter: &str,
        remote_prefix: &str,
        local_prefix: &str,
    ) -> Result<Self, RuleError> {
        Ok(Self {
            direction,
            filter: filter.into(),
            remote_prefix: remote_prefix.into(),
            local_prefix: local_prefix.into(),
            remote_filter: prefixed("remote", remote_prefix, filter)?,
            local_filter: prefixed("local", local_prefix, filter)?,
            qos_cap: Qos::AtLeastOnce,
            retain: Retain::Keep,
            durability: Durability::Default,
        })
    }

    /// Which way the rule carries.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The topics on the remote's side.
    pub fn remote_filter(&self) -> &TopicFilter {
        &self.remote_filter
    }

    /// The topics on the fabric's side.
    pub fn local_filter(&self) -> &TopicFilter {
        &self.local_filter
    }

    /// The fabric's name of a remote topic; `None` when the rule does not carry it in.
    pub fn map_in(&self, topic: &TopicName) -> Option<TopicName> {
        self.direction.carries_in().then_some(())?;
        let (from, to) = (&self.remote_filter, &self.local_filter);
        map(topic, &self.remote_prefix, from, &self.local_prefix, to)
    }

    /// The remote's name of a topic of the fabric; `None` when the rule does not carry it out.
    pub fn map_out(&self, topic: &TopicName) -> Option<TopicName> {
        self.direction.carries_out().then_some(())?;
        let (from, to) = (&self.local_filter, &self.remote_filter);
        map(topic, &self.local_prefix, from, &self.remote_prefix, to)
    }

    /// The remote topics that this rule may publish out of what is local to `produced`.
    fn output_for(&self, produced: &TopicFilter) -> Option<TopicFilter> {
        let carried = intersection(produced, &self.local_filter)?;
        let rest = carried.as_str().strip_prefix(&*self.local_prefix)?;
        TopicFilter::parse(format!("{}{rest}", self.remote_prefix)).ok()
    }

    fn same_mapping(&self, other: &Self) -> bool {
        self.remote_prefix == other.remote_prefix && self.local_prefix == other.local_prefix
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {:?} (remote_prefix {:?}, local_prefix {:?})",
            self.direction, self.filter, self.remote_prefix, self.local_prefix
        )
    }
}

/// Both filters must hold, or `#` under a prefix would let `prefix/$SYS/x` turn into `$SYS/x`, and
/// what one direction carries would not come back by the other.
fn map(
    topic: &TopicName,
    from_prefix: &str,
    from: &TopicFilter,
    to_prefix: &str,
    to: &TopicFilter,
) -> Option<TopicName> {
    if !from.matches(topic) {
        return None;
    }
    let rest = topic.as_str().strip_prefix(from_prefix)?;
    let mapped = TopicName::parse(format!("{to_prefix}{rest}")).ok()?;
    to.matches(&mapped).then_some(mapped)
}

fn prefixed(side: &'static str, prefix: &str, filter: &str) -> Result<TopicFilter, RuleError> {
    if prefix.contains(['+', '#']) {
        return Err(RuleError::PrefixWildcard {
            side,
            prefix: prefix.to_owned(),
        });
    }
    if !prefix.is_empty() && !prefix.ends_with('/') {
        return Err(RuleError::PrefixWithinLevel {
            side,
            prefix: prefix.to_owned(),
        });
    }
    let found = format!("{prefix}{filter}");
    TopicFilter::parse(found.as_str()).map_err(|reason| RuleError::Filter {
        side,
        found,
        reason,
    })
}

/// The filter of the topics that both match; `None` when there is none.
fn intersection(left: &TopicFilter, right: &TopicFilter) -> Option<TopicFilter> {
    if !left.overlaps(right) {
        return None;
    }
    let mut levels = Vec::new();
    let (mut ours, mut theirs) = (left.levels(), right.levels());
    loop {
        match (ours.next(), theirs.next()) {
            (None | Some(FilterLevel::Rest), None) | (None, Some(FilterLevel::Rest)) => break,
            (Some(FilterLevel::Rest), Some(level)) => {
                levels.push(level);
                levels.extend(theirs);
                break;
            }
            (Some(level), Some(FilterLevel::Rest)) => {
                levels.push(level);
                levels.extend(ours);
                break;
            }
            (Some(FilterLevel::One), Some(level)) | (Some(level), Some(_)) => levels.push(level),
            // Excluded by the overlap.
            (Some(_), None) | (None, Some(_)) => return None,
        }
    }
    let text: Vec<&str> = levels
        .into_iter()
        .map(|level| match level {
            FilterLevel::Literal(text) => text,
            FilterLevel::One => "+",
            FilterLevel::Rest => "#",
        })
        .collect();
    TopicFilter::parse(text.join("/")).ok()
}

/// The rules of one remote, for [`check_rules`].
#[derive(Debug, Clone, Copy)]
pub struct RuleSet<'a> {
    /// The remote's name.
    pub remote: &'a str,
    /// The version spoken with it.
    pub version: Version,
    /// Its rules, in order.
    pub rules: &'a [Rule],
}

/// Rules that must not stand together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleConflict {
    /// Two rules would carry one message of the remote twice.
    #[error(
        "remote {remote:?}: rules {first} and {second} both carry in {overlap}, \
         so one message would arrive twice; make their topics distinct"
    )]
    Twice {
        /// The remote.
        remote: String,
        /// The first rule, with its number.
        first: String,
        /// The second rule, with its number.
        second: String,
        /// The topics they share.
        overlap: TopicFilter,
    },
    /// What one rule brings in, another sends back to where it comes from.
    #[error(
        "remote {remote:?}: rules {inward} and {outward} loop: what the first brings in, the second \
         sends to {output}, which {back} brings in again; {advice}"
    )]
    Loop {
        /// The remote.
        remote: String,
        /// The rule that brings in, with its number.
        inward: String,
        /// The rule that sends back, with its number.
        outward: String,
        /// The rule that brings in what was sent back, with its number.
        back: String,
        /// What is sent back.
        output: TopicFilter,
        /// What to do.
        advice: &'static str,
    },
    /// Rules of several remotes without hop lists feed each other in a circle.
    #[error(
        "rules {} loop: each feeds the next and the last the first, and MQTT 3.1.1 carries no hop list \
         that would stop it; use version = \"5\" for one of these remotes or distinct prefixes",
        rules.join(", ")
    )]
    Circle {
        /// The inward rules of the circle, each with its remote and number.
        rules: Vec<String>,
    },
}

const USE_V5_OR_DISTINCT: &str = "use version = \"5\" when the remote speaks it and both directions \
     have the same prefixes, or give each direction topics of its own";
const SAME_PREFIXES_OR_DISTINCT: &str = "give both directions the same prefixes, or each direction topics \
     of its own";

/// Every pair of rules that would duplicate or loop messages.
///
/// With MQTT 5, a loop over one and the same mapping is allowed: the bridge's subscriptions ask the
/// remote for no copies of its own messages, and the hop list stops what comes back by a detour.
/// A loop that gives a message another name on each round is refused all the same. MQTT 3.1.1 has
/// neither means, so there every loop is refused, also one that goes through several remotes.
pub fn check_rules(sets: &[RuleSet<'_>]) -> Vec<RuleConflict> {
    let mut conflicts = Vec::new();
    for set in sets {
        check_overlaps(set, &mut conflicts);
        check_loops(set, &mut conflicts);
    }
    if conflicts.is_empty() {
        conflicts.extend(find_circle(sets));
    }
    conflicts
}

fn check_overlaps(set: &RuleSet<'_>, conflicts: &mut Vec<RuleConflict>) {
    for (index, first) in inward(set.rules) {
        for (later, second) in inward(set.rules).filter(|(later, _)| *later > index) {
            if let Some(overlap) = intersection(&first.remote_filter, &second.remote_filter) {
                conflicts.push(RuleConflict::Twice {
                    remote: set.remote.to_owned(),
                    first: numbered(index, first),
                    second: numbered(later, second),
                    overlap,
                });
            }
        }
    }
}

fn check_loops(set: &RuleSet<'_>, conflicts: &mut Vec<RuleConflict>) {
    for (index, first) in inward(set.rules) {
        for (out_index, out) in outward(set.rules) {
            if set.version == Version::V5 && first.same_mapping(out) {
                continue;
            }
            let Some(output) = out.output_for(&first.local_filter) else {
                continue;
            };
            let back = inward(set.rules).find(|(_, rule)| rule.remote_filter.overlaps(&output));
            if let Some((back_index, back)) = back {
                conflicts.push(RuleConflict::Loop {
                    remote: set.remote.to_owned(),
                    inward: numbered(index, first),
                    outward: numbered(out_index, out),
                    back: numbered(back_index, back),
                    output,
                    advice: match set.version {
                        Version::V5 => SAME_PREFIXES_OR_DISTINCT,
                        Version::V311 => USE_V5_OR_DISTINCT,
                    },
                });
            }
        }
    }
}

/// Follows "what this rule brings in is sent to a 3.1.1 remote and brought in from there" from rule
/// to rule. A remote that speaks MQTT 5 does not give the bridge its own messages, so it breaks the circle.
fn find_circle(sets: &[RuleSet<'_>]) -> Option<RuleConflict> {
    let nodes: Vec<(&RuleSet<'_>, usize, &Rule)> = sets
        .iter()
        .flat_map(|set| inward(set.rules).map(move |(index, rule)| (set, index, rule)))
        .collect();
    let successors = |from: &Rule| -> Vec<usize> {
        let mut next = Vec::new();
        for (position, (set, _, rule)) in nodes.iter().enumerate() {
            let fed = set.version == Version::V311
                && outward(set.rules)
                    .filter_map(|(_, out)| out.output_for(&from.local_filter))
                    .any(|output| rule.remote_filter.overlaps(&output));
            if fed {
                next.push(position);
            }
        }
        next
    };
    let edges: Vec<Vec<usize>> = nodes.iter().map(|(_, _, rule)| successors(rule)).collect();

    // Depth first, with the path so far; what was left behind without a circle is not walked again.
    let mut done = HashSet::new();
    for start in 0..nodes.len() {
        let mut path = vec![(start, 0)];
        while let Some((node, edge)) = path.last().copied() {
            let Some(&next) = edges[node].get(edge) else {
                done.insert(node);
                path.pop();
                continue;
            };
            if let Some(last) = path.last_mut() {
                last.1 += 1;
            }
            if let Some(begin) = path.iter().position(|(on_path, _)| *on_path == next) {
                let rules = path[begin..]
                    .iter()
                    .map(|(node, _)| {
                        let (set, index, rule) = &nodes[*node];
                        format!("{:?} {}", set.remote, numbered(*index, rule))
                    })
                    .collect();
                return Some(RuleConflict::Circle { rules });
            }
            if !done.contains(&next) {
                path.push((next, 0));
            }
        }
    }
    None
}

fn inward(rules: &[Rule]) -> impl Iterator<Item = (usize, &Rule)> {
    let rules = rules.iter().enumerate();
    rules.filter(|(_, rule)| rule.direction.carries_in())
}

fn outward(rules: &[Rule]) -> impl Iterator<Item = (usize, &Rule)> {
    let rules = rules.iter().enumerate();
    rules.filter(|(_, rule)| rule.direction.carries_out())
}

fn numbered(index: usize, rule: &Rule) -> String {
    format!("{} {rule}", index + 1)
}

#[cfg(test)]
mod tests;
