//! `selvedge demo`: the whole tour, as a script sees it.

use serde_json::Value;

use crate::program::{run, selvedge};

#[test]
fn every_step_of_the_tour_goes_as_it_should() {
    let done = run(selvedge(["demo", "--json"]));
    assert_eq!(done.code, Some(0), "{}\n{}", done.stdout, done.stderr);
    // One object and nothing else; progress is on standard error.
    let [summary] = <[Value; 1]>::try_from(done.json()).expect("one line");
    assert_eq!(summary["ok"], true);
    assert!(summary["seconds"].as_f64().unwrap() > 0.0);

    let steps = summary["steps"].as_array().unwrap();
    let names: Vec<&str> = (steps.iter())
        .map(|step| step["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "broker",
            "messages",
            "inference",
            "cloud away",
            "residency",
            "MQTT sensor",
            "bridge",
            "calls",
            "denials",
            "certificates",
            "restart"
        ]
    );
    for step in steps {
        assert_eq!(step["ok"], true, "{step}");
        assert!(!step["detail"].as_str().unwrap().is_empty(), "{step}");
        assert!(step["figures"]["seconds"].is_f64(), "{step}");
        let name = step["name"].as_str().unwrap();
        assert!(done.stderr.contains(&format!("] {name}: ")), "{name}");
    }

    let figures = |name: &str| {
        let step = steps.iter().find(|step| step["name"] == name).unwrap();
        &step["figures"]
    };
    assert_eq!(figures("broker")["key_exchange"], "X25519MLKEM768");
    assert_eq!(figures("messages")["received"], 750);
    let inference = figures("inference");
    let accuracy = |run: &str| inference[run]["accuracy"].as_f64().unwrap();
    assert!(accuracy("edge_only") < accuracy("cascade"), "{inference}");
    assert!(accuracy("cascade") < accuracy("cloud_only"), "{inference}");
    for run in ["edge_only", "cascade", "cloud_only"] {
        assert_eq!(inference[run]["requests"], 750);
        assert!(inference[run]["p50_ms"].as_f64() <= inference[run]["p99_ms"].as_f64());
    }
    assert_eq!(inference["edge_only"]["sent_up"], 0.0);
    assert_eq!(inference["cloud_only"]["sent_up"], 1.0);
    assert_eq!(figures("residency")["code"], "FAILED_PRECONDITION");
    assert_eq!(
        figures("denials")["denials"][3]["rule"],
        "guests keep their hands off machines"
    );
}
