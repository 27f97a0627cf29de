//! A bridge between mosquitto and the real binary, while all three are killed and restarted in turn.

use std::io::Write as _;

use selvedge_tests::bridging::{Settings, mosquitto, soak};

const BINARY: &str = env!("CARGO_BIN_EXE_selvedge");

async fn keeps_its_promises(qos: u8, v5: bool) {
    let Some(mosquitto) = mosquitto() else {
        // Shown although the test passes: the harness catches what is printed.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED the bridge soak: mosquitto is not installed (Debian package mosquitto)"
        );
        return;
    };
    let seed = rand::random();
    let settings = Settings {
        v5,
        ..Settings::new(BINARY, seed, qos)
    };
    let report = match soak(&settings, &mosquitto).await {
        Ok(report) => report,
        Err(error) => panic!("seed {seed}: {error}"),
    };
    assert!(
        report.kept(),
        "seed {seed}: {:?}, {} strange, {:?}, logs in {:?}",
        report.violations,
        report.strange,
        report.faults,
        report.evidence
    );
    for flow in &report.flows {
        assert!(flow.delivered > 1000, "{} delivered", flow.delivered);
    }
    assert!(!report.faults.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_1_loses_and_loops_nothing_while_everything_is_restarted() {
    keeps_its_promises(1, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_2_comes_exactly_once_while_everything_is_restarted() {
    keeps_its_promises(2, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_2_comes_exactly_once_with_mqtt_3_1_1() {
    keeps_its_promises(2, false).await;
}
