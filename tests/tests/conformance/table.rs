//! The table of statements in the documentation is the one of the tests.

const BEGIN: &str = "<!-- statements: made by the conformance tests -->\n";
const END: &str = "<!-- statements end -->";

/// The statements of one file: number, and what it says.
fn statements(source: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut says: Vec<&str> = Vec::new();
    for line in source.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("/// ") {
            says.push(text);
            continue;
        }
        let name = line.strip_prefix("async fn ").unwrap_or(line);
        if let Some(rest) = name.strip_prefix("mqtt_") {
            let end = rest
                .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .unwrap();
            let numbers: Vec<&str> = rest[..end].split('_').take(4).collect();
            let [chapter, section, part, number] = numbers[..] else {
                panic!("{line:?} has no number of a statement");
            };
            assert!(!says.is_empty(), "{line:?} has no comment");
            let number = format!("MQTT-{chapter}.{section}.{part}-{number}");
            found.push((number, says.join(" ")));
        }
        if !line.starts_with("#[") {
            says.clear();
        }
    }
    found
}

fn key(number: &str) -> Vec<u32> {
    number
        .trim_start_matches("MQTT-")
        .split(['.', '-'])
        .map(|part| part.parse().unwrap())
        .collect()
}

#[test]
fn the_table_in_the_documentation_is_what_the_tests_show() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/mqtt.md");
    let docs = std::fs::read_to_string(path).unwrap();
    let mut table = String::new();
    for (version, source) in [
        ("5.0", include_str!("v5.rs")),
        ("3.1.1", include_str!("v311.rs")),
    ] {
        let mut found = statements(source);
        found.sort_by_key(|(number, _)| key(number));
        let mut numbers: Vec<&str> = found.iter().map(|(number, _)| number.as_str()).collect();
        numbers.dedup();
        table += &format!(
            "\n{} tests of {} statements of {version}:\n\n| statement | what the broker is seen to do |\n|---|---|\n",
            found.len(),
            numbers.len()
        );
        for (number, says) in found {
            table += &format!("| {number} | {says} |\n");
        }
    }
    let (before, rest) = docs.split_once(BEGIN).expect("the beginning of the table");
    let (held, after) = rest.split_once(END).expect("the end of the table");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, format!("{before}{BEGIN}{table}\n{END}{after}")).unwrap();
        return;
    }
    assert!(
        held.trim() == table.trim(),
        "docs/mqtt.md has another table: run this test with UPDATE_DOCS=1"
    );
}
