//! One measured value beside its goal.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// One measured value beside its goal.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured, in words.
    pub what: String,
    /// How much.
    pub value: f64,
    /// Of what; empty for a count.
    pub unit: &'static str,
    /// The most that it may be, if there is a goal.
    pub goal: Option<f64>,
}

impl Figure {
    pub(super) fn new(what: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self {
            what: what.into(),
            value,
            unit,
            goal: None,
        }
    }

    pub(super) fn count(what: impl Into<String>, count: usize) -> Self {
        Self::new(what, count as f64, "")
    }

    pub(super) fn ms(what: impl Into<String>, time: Duration) -> Self {
        Self::new(what, time.as_secs_f64() * 1e3, "ms")
    }

    #[must_use]
    pub(super) fn at_most(self, goal: f64) -> Self {
        Self {
            goal: Some(goal),
            ..self
        }
    }

    /// Whether the goal is reached; `None` without one.
    pub fn is_met(&self) -> Option<bool> {
        self.goal.map(|goal| self.value <= goal)
    }

    /// Its row of the table.
    pub(super) fn row(&self) -> String {
        let met = match self.is_met() {
            None => "",
            Some(true) => "met",
            Some(false) => "**missed**",
        };
        let goal = self.goal.map(|goal| format!("≤ {}", self.with_unit(goal)));
        let value = self.with_unit(self.value);
        let goal = goal.unwrap_or_default();
        format!("| {} | {value} | {goal} | {met} |\n", self.what)
    }

    fn with_unit(&self, value: f64) -> String {
        let digits = match self.unit {
            "" => 0,
            "ms" if value.abs() < 10.0 => 3,
            _ => 1,
        };
        format!("{value:.digits$} {}", self.unit)
            .trim_end()
            .to_owned()
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.what, self.with_unit(self.value))
    }
}

/// The time that this share of the times is within; zero of none.
pub(super) fn quantile(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    let place = (share * last as f64).round() as usize;
    times.get(place).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_one_of_the_times() {
        let mut times: Vec<_> = (1..=101).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&mut times, 0.5), Duration::from_millis(51));
        assert_eq!(quantile(&mut times, 0.99), Duration::from_millis(100));
        assert_eq!(quantile(&mut times, 1.0), Duration::from_millis(101));
        assert_eq!(quantile(&mut [], 0.5), Duration::ZERO);
    }

    #[test]
    fn a_row_says_whether_the_goal_is_met() {
        let figure = Figure::ms("p50", Duration::from_micros(250)).at_most(0.3);
        assert_eq!(figure.row(), "| p50 | 0.250 ms | ≤ 0.300 ms | met |\n");
        let figure = Figure::count("over", 1).at_most(0.0);
        assert_eq!(figure.row(), "| over | 1 | ≤ 0 | **missed** |\n");
        assert_eq!(Figure::count("all", 7).row(), "| all | 7 |  |  |\n");
    }
}
