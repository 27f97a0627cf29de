//! `selvedge explain` against `selvedge dev`.

use crate::dev::Dev;

#[test]
fn it_tells_what_became_of_messages_clients_and_topics() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let worker = ["--as", "dev/local/edge-worker"];
    for _ in 0..2 {
        let publish = ["pub", "line/7", "x", "--qos", "1"];
        dev.run(&[&publish[..], &worker].concat()).failed();
    }

    // The rules that `selvedge dev` writes let its admin ask.
    let lines = |query: &[&str]| dev.run(&[&["explain"], query].concat()).ok();
    for query in ["line/7", "edge-worker", "dev/local/edge-worker"] {
        let said = lines(&[query]);
        let said: Vec<&str> = said.lines().collect();
        let heads: Vec<&str> = said[0].split_whitespace().collect();
        assert_eq!(heads, ["TIME", "WHAT", "REASON", "COUNT", "WHO", "TOPIC"]);
        let cells: Vec<&str> = said[1].split_whitespace().skip(1).collect();
        let expected = [
            "denied",
            "PERMISSION_DENIED",
            "2",
            "dev/local/edge-worker",
            "line/7",
        ];
        assert_eq!(cells, expected, "{said:?}");
        assert!(said[0].find("REASON") == said[1].find("PERMISSION"));
        assert_eq!(said[2], "  publish on \"line/7\" denied: no rule allows it");
    }

    let sub = dev.start_command(&["sub", "line/#"]);
    sub.wait_for_note("subscribed to line/#");
    dev.run(&["pub", "line/8", "x", "--qos", "1", "--retain"])
        .ok();
    sub.line();
    let said = lines(&["line/8"]);
    for expected in [
        "nothing of it was dropped or refused since ",
        "\nnow\n",
        "  line/8 goes to dev/local/admin (",
        ") by line/# at qos 1, online since ",
        "  line/8 has a retained message of ",
    ] {
        assert!(said.contains(expected), "{expected:?} is not in {said}");
    }
    let said = lines(&["admin", "--kind", "client"]);
    assert!(said.contains("    subscribes to line/# at qos 1"), "{said}");
    let json = dev.run(&["explain", "line/7", "--kind", "topic", "--json"]);
    assert_eq!(json.code, Some(0), "{json:?}");
    let record = &json.json()[0]["records"][0];
    assert_eq!(record["count"], 2);
    assert_eq!(record["matched"], "topic");

    let said = dev.run(&["explain", "nobody\u{7}"]).failed();
    assert!(
        said.contains("nothing is known about \"nobody\\u{7}\": expected the id of a message"),
        "{said}"
    );
    assert!(
        said.contains("all that it dropped or refused since 20"),
        "{said}"
    );
    let said = dev.run(&[&["explain", "line/7"][..], &worker].concat());
    let said = said.failed();
    assert!(
        said.contains("call on \"$SYS/explain\" denied: no rule allows it"),
        "{said}"
    );
    let wrong = dev.run(&["explain", "a/#/b", "--kind", "topic"]).failed();
    assert!(wrong.contains("INVALID_ARGUMENT"), "{wrong}");
    drop(sub);
    dev.process.stop();
}
