//! The delivery contract, with the real binary and everything broken that can break.

use std::io::Write as _;

use selvedge_tests::checker::ledger::Violation;
use selvedge_tests::checker::plan::Fault;
use selvedge_tests::checker::{Settings, Span, check};
use selvedge_tests::power::{Fsync, Loss};

const BINARY: &str = env!("CARGO_BIN_EXE_selvedge");

/// Shown although the test passes: the harness catches what is printed.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: no power was cut: {why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_delivery_contract_holds_while_everything_breaks() {
    let seed = rand::random();
    let settings = Settings::new(BINARY, seed);
    let report = match check(&settings, |_| {}).await {
        Ok(report) => report,
        Err(error) => panic!("seed {seed}: {error}"),
    };
    assert_eq!(report.verdict.violations, [], "{report:#?}");
    assert_eq!(report.verdict.counts.owed, 0, "{report:#?}");
    if let Some(why) = &report.no_power_cuts {
        skipped(why);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_lies_about_fsync_is_found_out() {
    let settings = Settings {
        fsync: Fsync::Lying,
        span: Span::Faults(vec![Fault::Leave, Fault::PowerCut(Loss::Everything)]),
        ..Settings::new(BINARY, 1)
    };
    let report = check(&settings, |_| {}).await.unwrap();
    if let Some(why) = &report.no_power_cuts {
        return skipped(why);
    }
    let lost = |violation: &Violation| matches!(violation, Violation::Lost { .. });
    assert!(report.verdict.violations.iter().any(lost), "{report:#?}");
    if let Some(evidence) = report.evidence {
        std::fs::remove_dir_all(evidence).unwrap();
    }
}
