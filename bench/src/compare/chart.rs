//! Bar charts of a report, as SVG. Every shape has a scale of its own, since they are far apart; a line
//! over each bar goes from the least to the largest of the rounds.

use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Text};

use super::report::{Report, Row, Spread};
use super::table;

const WIDTH: f64 = 860.0;
/// Where bars start; names are before it.
const LEFT: f64 = 190.0;
/// Where the longest bar ends; its value is after it.
const RIGHT: f64 = 720.0;
const BAR: f64 = 14.0;
const TOP: f64 = 76.0;
/// Space between shapes.
const GAP: f64 = 14.0;
/// Colours that people who cannot tell red from green can tell apart, and that show on black and white.
const COLOURS: [&str; 8] = [
    "#0072b2", "#8c8c8c", "#009e73", "#56b4e9", "#d55e00", "#cc79a7", "#e69f00", "#7a5cc0",
];
/// Readable on black and on white.
const INK: &str = "#7a7a7a";

/// The charts of a report, with a word for each.
pub(super) fn draw(report: &Report) -> Vec<(&'static str, String)> {
    let charts = [
        (
            "deliveries",
            "Deliveries in a second (longer is better)",
            bars(report, |row| {
                row.deliveries_per_s.filter(|_| row.p99_us.is_none())
            }),
        ),
        (
            "cpu",
            "Server CPU for each delivery, in µs (shorter is better)",
            bars(report, |row| row.cpu_us),
        ),
        (
            "latency",
            "99th percentile of the latency at 20,000 messages/s, in µs (shorter is better)",
            bars(report, |row| row.p99_us),
        ),
        (
            "idle",
            "Server memory for an idle connection with one subscription, in KiB (shorter is better)",
            bars(report, |row| row.idle_kib),
        ),
    ];
    let systems = table::systems(&report.rows);
    charts
        .into_iter()
        .filter(|(_, _, bars)| !bars.is_empty())
        .map(|(name, title, bars)| (name, chart(title, &systems, &bars)))
        .collect()
}

/// One bar: shape, system, values.
type Bar<'a> = (&'a str, &'a str, Spread);

fn bars(report: &Report, value: impl Fn(&Row) -> Option<Spread>) -> Vec<Bar<'_>> {
    let mut bars = Vec::new();
    for row in &report.rows {
        bars.extend(value(row).map(|spread| (row.shape.as_str(), row.system.as_str(), spread)));
    }
    bars
}

fn chart(title: &str, systems: &[&str], bars: &[Bar<'_>]) -> String {
    let mut content = Group::new()
        .set("font-family", "sans-serif")
        .set("font-size", 12);
    content = content.add(text(title, 12.0, 24.0, "start").set("font-size", 15));
    let mut x = 12.0;
    for (place, system) in systems.iter().enumerate() {
        content = content.add(rectangle(x, 42.0, 12.0, 12.0, place)).add(text(
            system,
            x + 17.0,
            52.0,
            "start",
        ));
        x += 40.0 + 7.5 * system.len() as f64;
    }
    let mut y = TOP;
    for group in bars.chunk_by(|(shape, ..), (next, ..)| shape == next) {
        let largest = group.iter().map(|(.., spread)| spread.max);
        let largest = largest.fold(f64::MIN_POSITIVE, f64::max);
        let at = |value: f64| LEFT + (RIGHT - LEFT) * value / largest;
        let middle = y + BAR * group.len() as f64 / 2.0 + 4.0;
        let shape = group.first().map_or("", |(shape, ..)| shape);
        content = content.add(text(shape, LEFT - 10.0, middle, "end"));
        for (_, system, spread) in group {
            let place = systems.iter().position(|other| other == system);
            let value = if spread.median < 100.0 {
                format!("{:.2}", spread.median)
            } else {
                table::count(spread.median)
            };
            let line = Line::new()
                .set("x1", round(at(spread.min)))
                .set("x2", round(at(spread.max)))
                .set("y1", round(y + BAR / 2.0))
                .set("y2", round(y + BAR / 2.0))
                .set("stroke", INK)
                .set("stroke-width", 2);
            let length = (at(spread.median) - LEFT).max(1.0);
            content = content
                .add(rectangle(
                    LEFT,
                    y + 1.0,
                    length,
                    BAR - 2.0,
                    place.unwrap_or(0),
                ))
                .add(line)
                .add(text(&value, at(spread.max) + 8.0, y + BAR - 3.0, "start"));
            y += BAR;
        }
        y += GAP;
    }
    Document::new()
        .set("viewBox", (0, 0, WIDTH, round(y)))
        .set("role", "img")
        .set("aria-label", title)
        .add(content)
        .to_string()
}

fn text(content: &str, x: f64, y: f64, anchor: &str) -> Text {
    Text::new(content)
        .set("x", round(x))
        .set("y", round(y))
        .set("text-anchor", anchor)
        .set("fill", INK)
}

fn rectangle(x: f64, y: f64, width: f64, height: f64, colour: usize) -> Rectangle {
    Rectangle::new()
        .set("x", round(x))
        .set("y", round(y))
        .set("width", round(width))
        .set("height", round(height))
        .set("fill", COLOURS[colour % COLOURS.len()])
}

/// A tenth of a unit is more than an eye sees.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_shows_every_system_and_its_value() {
        let charts = draw(&super::super::report::tests::report());
        let names: Vec<&str> = charts.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["deliveries", "cpu"]);
        let (_, deliveries) = &charts[0];
        for part in [
            "selvedge",
            "relay",
            "nats-2.15",
            "1:1/64B",
            ">\n450\n<",
            ">\n600\n<",
        ] {
            assert!(deliveries.contains(part), "{part} is not in {deliveries}");
        }
    }
}
