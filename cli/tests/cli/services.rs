//! `selvedge services` against `selvedge dev`.

use crate::dev::Dev;

#[test]
fn it_shows_who_serves_what_and_how_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let said = dev.run(&["services"]).failed();
    assert!(said.contains("nobody serves anything"), "{said}");

    let serve = dev.start_command(&["serve", "line/7/jobs", "--echo"]);
    serve.wait_for_note("serving line/7/jobs");
    for _ in 0..2 {
        dev.run(&["call", "line/7/jobs", "x"]).ok();
    }
    let said = dev.run(&["services", "line/#"]).ok();
    let mut lines = said.lines().map(|line| line.split_whitespace());
    let heads: Vec<&str> = lines.next().unwrap().collect();
    let expected = [
        "SERVICE",
        "RESPONDER",
        "IN",
        "FLIGHT",
        "CALLS",
        "ERRORS",
        "P50",
        "P90",
        "P99",
    ];
    assert_eq!(heads, expected);
    let cells: Vec<&str> = lines.next().unwrap().collect();
    assert_eq!(cells[..2], ["line/7/jobs", "dev/local/admin"], "{said}");
    assert_eq!(cells[3..5], ["2", "0"], "{said}");
    assert_eq!(lines.next().map(Iterator::count), None, "{said}");

    let json = dev.run(&["services", "--json"]);
    assert_eq!(json.json()[0]["services"][0]["responders"][0]["calls"], 2);
    let said = dev.run(&["services", "other/#"]).failed();
    assert!(said.contains("matches \"other/#\""), "{said}");
    let wrong = dev.run(&["services", "a/#/b"]).failed();
    assert!(wrong.contains("INVALID_ARGUMENT"), "{wrong}");
    let worker = ["services", "--as", "dev/local/edge-worker"];
    let denied = dev.run(&worker).failed();
    assert!(
        denied.contains("call on \"$SYS/services\" denied"),
        "{denied}"
    );
    drop(serve);
    dev.process.stop();
}
