//! The shapes of work that are compared.

use super::job::{Calls, Pace, Protocol, Service, Task, Traffic};

/// Bytes of payload that all publishers of a shape may be ahead of their subscribers, all counted.
const AHEAD: usize = 4 << 20;
/// Bounds of that for one publisher and one of its subscribers.
const AHEAD_OF_ONE: (usize, usize) = (32 << 10, 1 << 20);
/// Messages a second that are offered where latency is measured.
const RATE: u32 = 20_000;
/// Bytes of a request and of its answer.
const CALL: usize = 256;

/// What the names of shapes begin with in which everyone speaks MQTT.
const MQTT: &str = "mqtt-";

/// One kind of work.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// What it is called in results and on the command line.
    pub(super) name: String,
    /// Part of the quick run.
    pub(super) quick: bool,
    /// Everyone speaks MQTT, this project's broker too.
    pub(super) mqtt: bool,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Traffic {
        groups: usize,
        subscribers: usize,
        size: usize,
        service: Service,
        offered: bool,
        idle_connections: usize,
        idle_filters: usize,
    },
    Idle(usize),
    /// Requests on their way at any time.
    Calls(usize),
}

/// What most shapes have in common.
const PLAIN: Kind = Kind::Traffic {
    groups: 1,
    subscribers: 1,
    size: 256,
    service: Service::AtMostOnce,
    offered: false,
    idle_connections: 0,
    idle_filters: 0,
};

/// All shapes, in the order they are measured.
pub(super) fn all() -> Vec<Shape> {
    let mut shapes = Vec::new();
    let mut add = |name: String, quick: bool, kind: Kind| {
        shapes.push(Shape {
            mqtt: name.starts_with(MQTT),
            name,
            quick,
            kind,
        });
    };
    for (fan, groups, subscribers) in [("1:1", 1, 1), ("1:20", 1, 20), ("20-pairs", 20, 1)] {
        for size in [64, 256, 1024, 65_536] {
            let quick = size < 1024 || fan == "1:1";
            let kind = PLAIN.with(groups, subscribers, size, Service::AtMostOnce);
            add(format!("{fan}/{}", bytes(size)), quick, kind);
        }
    }
    for size in [64, 256, 1024] {
        let kind = PLAIN.with(1, 1000, size, Service::AtMostOnce);
        add(format!("1:1000/{}", bytes(size)), false, kind);
    }
    for (word, service) in [
        ("qos1-memory", Service::Memory),
        ("qos1-stored", Service::Stored),
        ("qos1-disk", Service::Disk),
    ] {
        let quick = service != Service::Stored;
        add(
            format!("{word}/256B"),
            quick,
            PLAIN.with(1, 1, 256, service),
        );
        let kind = PLAIN.with(20, 1, 256, service);
        add(format!("{word}-20-pairs/256B"), false, kind);
    }
    add("latency/256B".into(), true, PLAIN.offered());
    for connections in [10, 1_000, 10_000] {
        let name = format!("connections-{connections}/256B");
        add(name, false, PLAIN.among(connections, 0));
    }
    for filters in [1, 1_000, 100_000] {
        let name = format!("subscriptions-{filters}/256B");
        add(name, false, PLAIN.among(0, filters));
    }
    add("idle".into(), true, Kind::Idle(1_000));
    for (fan, groups, subscribers) in [("1:1", 1, 1), ("1:20", 1, 20), ("20-pairs", 20, 1)] {
        for (word, service) in [("", Service::AtMostOnce), ("qos1-memory-", Service::Memory)] {
            let kind = PLAIN.with(groups, subscribers, 256, service);
            add(format!("{MQTT}{word}{fan}/256B"), fan == "1:1", kind);
        }
    }
    add(format!("{MQTT}idle"), true, Kind::Idle(1_000));
    shapes
}

/// The shapes of calls, in the order they are measured.
pub(super) fn calls() -> Vec<Shape> {
    let shape = |in_flight| Shape {
        name: format!("calls-{in_flight}/{}", bytes(CALL)),
        quick: true,
        mqtt: false,
        kind: Kind::Calls(in_flight),
    };
    [1, 64].map(shape).into()
}

impl Shape {
    /// Whether a name given on the command line is this shape's, or that of a family it belongs to.
    pub(super) fn is_called(&self, wanted: &str) -> bool {
        self.name == wanted || self.name.split('/').next() == Some(wanted)
    }

    /// Whether something that speaks this can do it at all.
    pub(super) fn suits(&self, protocol: Protocol) -> bool {
        if self.mqtt {
            return matches!(protocol, Protocol::Selvedge | Protocol::Mqtt);
        }
        match (self.kind, protocol) {
            (Kind::Traffic { service, .. }, Protocol::Relay | Protocol::Nats)
                if service.acknowledged() =>
            {
                false
            }
            (Kind::Calls(_), protocol) => {
                matches!(protocol, Protocol::Selvedge | Protocol::Nats)
            }
            // It has groups and no filters.
            (Kind::Traffic { idle_filters, .. }, Protocol::Relay) => idle_filters == 0,
            _ => true,
        }
    }

    /// Whether it measures what connections cost that do nothing.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.kind, Kind::Idle(_))
    }

    /// Files that a process needs which has all its connections.
    pub(super) fn files(&self) -> u64 {
        let connections = match self.kind {
            Kind::Idle(connections) => connections,
            Kind::Calls(_) => 2,
            Kind::Traffic {
                groups,
                subscribers,
                idle_connections,
                ..
            } => groups * (subscribers + 1) + idle_connections,
        };
        connections as u64 + 100
    }

    /// The work, with this much time to warm up and to measure.
    pub(super) fn task(&self, warm_up: f64, seconds: f64) -> Task {
        match self.kind {
            Kind::Idle(connections) => Task::Idle { connections },
            Kind::Calls(in_flight) => Task::Calls(Calls {
                in_flight,
                size: CALL,
                warm_up,
                seconds,
            }),
            Kind::Traffic {
                groups,
                subscribers,
                size,
                service,
                offered,
                idle_connections,
                idle_filters,
            } => {
                let (least, most) = AHEAD_OF_ONE;
                let window = (AHEAD / (groups * subscribers)).clamp(least, most);
                Task::Traffic(Traffic {
                    groups,
                    subscribers,
                    size,
                    service,
                    pace: if offered {
                        Pace::Offered { rate: RATE }
                    } else {
                        Pace::Closed { window }
                    },
                    idle_connections,
                    idle_filters,
                    warm_up,
                    seconds,
                })
            }
        }
    }
}

impl Kind {
    fn with(mut self, count: usize, each: usize, bytes: usize, wanted: Service) -> Self {
        if let Self::Traffic {
            groups,
            subscribers,
            size,
            service,
            ..
        } = &mut self
        {
            (*groups, *subscribers, *size, *service) = (count, each, bytes, wanted);
        }
        self
    }

    fn offered(mut self) -> Self {
        if let Self::Traffic { offered, .. } = &mut self {
            *offered = true;
        }
        self
    }

    fn among(mut self, connections: usize, filters: usize) -> Self {
        if let Self::Traffic {
            idle_connections,
            idle_filters,
            ..
        } = &mut self
        {
            (*idle_connections, *idle_filters) = (connections, filters);
        }
        self
    }
}

fn bytes(size: usize) -> String {
    if size.is_multiple_of(1024) {
        format!("{}KiB", size / 1024)
    } else {
        format!("{size}B")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_names_of_their_own_and_families() {
        let shapes = all();
        let mut names: Vec<&str> = shapes.iter().map(|shape| shape.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), shapes.len());
        let family = shapes.iter().filter(|shape| shape.is_called("1:1"));
        let family: Vec<&str> = family.map(|shape| shape.name.as_str()).collect();
        assert_eq!(family, ["1:1/64B", "1:1/256B", "1:1/1KiB", "1:1/64KiB"]);
    }

    #[test]
    fn nobody_is_more_than_the_window_ahead() {
        let window = |name: &str| {
            let shape = all().into_iter().find(|shape| shape.name == name).unwrap();
            match shape.task(0.0, 1.0) {
                Task::Traffic(Traffic {
                    pace: Pace::Closed { window },
                    ..
                }) => window,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(window("1:1/256B"), 1 << 20);
        assert_eq!(window("1:20/256B"), (4 << 20) / 20);
        assert_eq!(window("1:1000/256B"), 32 << 10);
    }
}
