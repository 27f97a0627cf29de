//! `selvedge bench compare`: one short run with everything that is on the machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::{Running, run, selvedge, text};

/// A file of the machine's programs, where Debian puts servers or a shell looks.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")])
        .any(|folder| folder.join(program).is_file())
}

/// A comparison of one shape that takes no time to speak of, with its files in this folder.
fn compare(dir: &Path, more: &[&str]) -> Command {
    let mut command = selvedge(["bench", "compare", "--dir", &text(dir)]);
    command.env_remove("SELVEDGE_BENCH_NATS").args(more);
    command
}

#[test]
fn a_quick_run_measures_every_system_and_prints_one_object() {
    let folder = tempfile::tempdir().unwrap();
    let shapes = "1:1/256B,latency";
    let mut quick = vec!["--quick", "--json", "--rounds", "1"];
    quick.extend(["--seconds", "0.2", "--shapes", shapes]);
    let done = run(compare(folder.path(), &quick));
    assert_eq!(done.code, Some(0), "{done:?}");
    let objects = done.json();
    let [object] = objects.as_slice() else {
        panic!("expected one line: {done:?}");
    };
    let mut systems = vec!["selvedge", "relay"];
    for (name, program) in [("nats", "nats-server"), ("mosquitto", "mosquitto")] {
        if is_installed(program) {
            systems.push(name);
        } else {
            assert!(done.stderr.contains(&format!("{name} is left out")));
        }
    }
    let rows = object["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * systems.len(), "{object:#}");
    for row in rows {
        assert!(systems.contains(&row["system"].as_str().unwrap()), "{row}");
        assert!(row["deliveries_per_s"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["cpu_us"].is_f64(), "{row}");
        let timed = row["shape"] == "latency/256B";
        assert_eq!(row["p50_us"].is_f64(), timed, "{row}");
        assert_eq!(row["p99_us"].is_f64(), timed, "{row}");
    }
    let ratios = object["ratios"].as_array().unwrap();
    assert_eq!(ratios.len(), 2 * (systems.len() - 1), "{object:#}");
    for ratio in ratios {
        assert_ne!(ratio["against"], "selvedge");
        assert!(ratio["deliveries"].as_f64().unwrap() > 0.0, "{ratio}");
    }
    assert_eq!(object["lost"], 0, "{object:#}");
    // Servers are gone, and their folder with them.
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_whole_run_acknowledges_and_writes_its_results() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("results");
    let stores = folder.path().join("stores");
    std::fs::create_dir(&stores).unwrap();
    let out_text = text(&out);
    let mut whole = vec!["--rounds", "1", "--seconds", "0.2", "--systems", "selvedge"];
    whole.extend([
        "--shapes",
        "qos1-memory/256B,qos1-disk/256B",
        "--out",
        &out_text,
    ]);
    let table = run(compare(&stores, &whole)).ok();
    assert!(table.contains("| qos1-disk/256B |"), "{table}");
    let mut kinds: Vec<String> = (out.read_dir().unwrap())
        .map(|file| text(&file.unwrap().path()))
        .map(|file| file.rsplit_once('.').unwrap().1.to_owned())
        .collect();
    kinds.sort();
    assert_eq!(kinds, ["json", "md", "svg", "svg"]);
}

#[test]
fn a_run_that_is_interrupted_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut long = vec!["--seconds", "0.1", "--systems", "relay"];
    long.extend(["--shapes", "1:1/256B"]);
    long.extend(["--rounds", "100000"]);
    let running = Running::start(compare(folder.path(), &long));
    running.wait_for_note("1:1/256B 1/100000 relay: ");
    let processes = std::fs::read_dir("/proc").unwrap();
    let mut relays = processes.map(|process| process.unwrap().path());
    let is_relay = |process: &PathBuf| {
        let command = std::fs::read_to_string(process.join("cmdline")).unwrap_or_default();
        command.contains("\0bench\0relay\0") && command.contains(&text(folder.path()))
    };
    let relay = relays.find(is_relay).expect("the relay runs");
    running.signal("INT");
    let (status, _) = running.wait();
    assert_eq!(status.code(), Some(130));
    assert!(!relay.exists(), "the relay still runs");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}

#[test]
fn an_unknown_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let failed = run(compare(folder.path(), &["--shapes", "2:2"])).failed();
    assert!(
        failed.contains("there is no shape \"2:2\" here: see `selvedge bench compare --help`"),
        "{failed}"
    );
}

#[test]
fn calls_are_measured_beside_nothing() {
    let done = run(selvedge([
        "bench",
        "rpc",
        "--quick",
        "--json",
        "--systems",
        "selvedge",
        "--rounds",
        "1",
        "--seconds",
        "0.2",
    ]));
    assert_eq!(done.code, Some(0), "{done:?}");
    let report = &done.json()[0];
    let rows = report["rows"].as_array().unwrap();
    let shapes: Vec<&str> = rows
        .iter()
        .map(|row| row["shape"].as_str().unwrap())
        .collect();
    assert_eq!(shapes, ["calls-1/256B", "calls-64/256B"]);
    for row in rows {
        let figure = |name: &str| row[name].as_f64().unwrap();
        assert!(figure("calls_per_s") > 0.0, "{row}");
        assert!(figure("p50_us") <= figure("p99_us"), "{row}");
    }
}

#[test]
fn inference_keeps_its_promises_in_a_short_run() {
    let done = run(selvedge([
        "bench",
        "infer",
        "--quick",
        "--json",
        "--shapes",
        "burst,residency",
    ]));
    assert_eq!(done.code, Some(0), "{done:?}");
    let report = &done.json()[0];
    assert_eq!(report["failures"], serde_json::json!([]));
    let figures = report["figures"].as_array().unwrap();
    let value = |what: &str| {
        let mut figures = figures.iter();
        let figure = figures.find(|figure| figure["what"].as_str().unwrap().contains(what));
        figure.unwrap_or_else(|| panic!("{what}: {report:#}"))["value"].as_f64()
    };
    assert_eq!(value("over-admitted"), Some(0.0));
    assert_eq!(value("not answered"), Some(0.0));
    assert_eq!(value("refused with FAILED_PRECONDITION"), Some(50.0));
    assert_eq!(value("the cloud's worker saw"), Some(0.0));
    let failed = run(selvedge(["bench", "infer", "--shapes", "speed"])).failed();
    assert!(failed.contains("there is no shape \"speed\""), "{failed}");
}

#[test]
fn placement_is_simulated_the_same_each_time() {
    let simulate = || {
        let small = ["--workers", "50", "--requests", "2000", "--json"];
        let mut command = selvedge(["bench", "placement"]);
        command.args(small);
        let done = run(command);
        assert_eq!(done.code, Some(0), "{done:?}");
        done.json()[0].clone()
    };
    let report = simulate();
    assert_eq!(
        report["outcomes"].as_array().unwrap().len(),
        5,
        "{report:#}"
    );
    assert_eq!(report, simulate());
}
