//! Tables that a reader understands at a glance, in Markdown.

use std::fmt::Write as _;

use super::Subject;
use super::report::{Report, Row, Spread};

/// All tables of a report. Empty ones are left out.
pub(super) fn write(report: &Report) -> String {
    let mut text = String::new();
    let machine = &report.machine;
    let _ = writeln!(
        text,
        "{}, {} cores, Linux {}, store on {}, load {} at the start; {} rounds of {:.1} s.",
        machine.processor,
        machine.cores,
        machine.kernel,
        machine.file_system,
        machine.load,
        report.rounds,
        report.seconds,
    );
    if !machine.optimised {
        let _ = writeln!(
            text,
            "\n**Not an optimised build: these figures mean nothing.**"
        );
    }
    let systems = systems(&report.rows);
    let (busy, latency) = match report.subject {
        Subject::Messages => (
            "Deliveries in a second, and server CPU for each in µs (medians)",
            "Latency in µs from the moment a message was due: p50 / p99 / p99.9 (medians)",
        ),
        Subject::Calls => (
            "Calls answered in a second, and server CPU for each in µs (medians)",
            "Time from request to answer in µs: p50 / p99 / p99.9 (medians)",
        ),
    };
    section(&mut text, busy, &report.rows, &systems, |row| {
        let (rate, cpu) = (row.deliveries_per_s?, row.cpu_us?);
        let lost = if row.lost > 0 { ", **lossy**" } else { "" };
        Some(format!("{}, {:.2}{lost}", count(rate.median), cpu.median))
    });
    section(&mut text, latency, &report.rows, &systems, |row| {
        let (p50, p99, p999) = (row.p50_us?, row.p99_us?, row.p999_us?);
        let quantiles = (p50.median, p99.median, p999.median);
        Some(format!(
            "{:.0} / {:.0} / {:.0}",
            quantiles.0, quantiles.1, quantiles.2
        ))
    });
    section(
        &mut text,
        "Idle connections with one subscription: KiB of server memory each; handshakes in a second, \
         and server CPU for each in µs (medians)",
        &report.rows,
        &systems,
        |row| {
            let (kib, rate, cpu) = (row.idle_kib?, row.handshakes_per_s?, row.handshake_cpu_us?);
            Some(format!(
                "{:.1}; {}, {:.0}",
                kib.median,
                count(rate.median),
                cpu.median
            ))
        },
    );
    ratios(&mut text, report);
    for line in report.left_out.iter().chain(&report.failures) {
        let _ = writeln!(text, "\n{line}");
    }
    text
}

/// Systems in the order of their first rows.
pub(super) fn systems(rows: &[Row]) -> Vec<&str> {
    let mut systems: Vec<&str> = Vec::new();
    for row in rows {
        if !systems.contains(&row.system.as_str()) {
            systems.push(&row.system);
        }
    }
    systems
}

fn section(
    text: &mut String,
    title: &str,
    rows: &[Row],
    systems: &[&str],
    cell: impl Fn(&Row) -> Option<String>,
) {
    let mut shapes: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| cell(row).is_some()) {
        if !shapes.contains(&row.shape.as_str()) {
            shapes.push(&row.shape);
        }
    }
    if shapes.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n### {title}\n");
    let _ = writeln!(text, "| | {} |", systems.join(" | "));
    let _ = writeln!(text, "|---|{}", "---|".repeat(systems.len()));
    for shape in shapes {
        let _ = write!(text, "| {shape} |");
        for system in systems {
            let row = rows
                .iter()
                .find(|row| row.shape == shape && row.system == *system);
            let cell = row.and_then(&cell).unwrap_or_else(|| "–".into());
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
}

fn ratios(text: &mut String, report: &Report) {
    if report.ratios.is_empty() {
        return;
    }
    let counted = match report.subject {
        Subject::Messages => "deliveries",
        Subject::Calls => "calls",
    };
    let _ = writeln!(
        text,
        "\n### selvedge divided by another: median (min to max) over rounds\n\n\
         | | against | {counted} (more is better) | CPU (less is better) | other (less is better) |\n\
         |---|---|---|---|---|"
    );
    for ratio in &report.ratios {
        let others = [
            ("p50", ratio.p50),
            ("p99", ratio.p99),
            ("KiB", ratio.idle_kib),
            ("handshake CPU", ratio.handshake_cpu),
        ];
        let others: Vec<String> = others
            .iter()
            .filter(|(_, spread)| spread.is_some())
            .map(|(name, spread)| format!("{name} {}", range(*spread)))
            .collect();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            ratio.shape,
            ratio.against,
            range(ratio.deliveries),
            range(ratio.cpu),
            if others.is_empty() {
                "–".to_owned()
            } else {
                others.join(", ")
            }
        );
    }
}

fn range(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "–".to_owned(),
        |Spread { min, median, max }| format!("**{median:.2}** ({min:.2} to {max:.2})"),
    )
}

/// A count with three figures or so.
pub(super) fn count(value: f64) -> String {
    if value >= 999_500.0 {
        format!("{:.2} M", value / 1e6)
    } else if value >= 9_995.0 {
        format!("{:.0} k", value / 1e3)
    } else if value >= 999.5 {
        format!("{:.1} k", value / 1e3)
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_short() {
        for (value, text) in [
            (12.0, "12"),
            (1_234.0, "1.2 k"),
            (123_400.0, "123 k"),
            (999_900.0, "1.00 M"),
            (1_234_000.0, "1.23 M"),
        ] {
            assert_eq!(count(value), text);
        }
    }

    #[test]
    fn a_table_has_a_line_for_each_shape_and_ratio() {
        let text = write(&super::super::report::tests::report());
        assert!(
            text.contains("| 1:1/64B | 450, 625.00 | 600, 468.75 | 225, 1250.00 | 150, 1875.00 |"),
            "{text}"
        );
        assert!(
            text.contains(
                "| 1:1/64B | relay | **0.75** (0.75 to 0.75) | **1.33** (1.33 to 1.33) | – |"
            ),
            "{text}"
        );
        assert!(!text.contains("Latency"), "{text}");
    }
}
