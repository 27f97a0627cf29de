//! Tests of the worker's configuration.

#![allow(clippy::unwrap_used)]

use super::*;

const GOOD: &str = r#"
tier = "edge"

[connect]
broker = "gateway.plant.example:7443"
ca = "pki/ca.pem"
cert = "/etc/selvedge/worker.pem"
key = "worker.key"

[[model]]
name = "digits"
path = "digits.onnx"

[[model]]
name = "line/defects"
version = "2026-05"
path = "defects.onnx"
slots = 3
confidence = { output = "probabilities", kind = "max" }
load_deadline = "500ms"
batch = { max = 8, delay = "5ms" }
"#;

fn parse(text: &str) -> Result<WorkerConfig, Vec<Problem>> {
    WorkerConfig::parse(text, Path::new("/home"), |_| true)
}

fn problems(text: &str) -> Vec<String> {
    parse(text)
        .unwrap_err()
        .iter()
        .map(Problem::to_string)
        .collect()
}

#[test]
fn a_configuration_is_read_with_its_defaults() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.tier, Tier::Edge);
    assert_eq!(
        config.connect,
        ConnectConfig {
            broker: "gateway.plant.example:7443".to_owned(),
            server_name: None,
            ca: PathBuf::from("/home/pki/ca.pem"),
            cert: PathBuf::from("/etc/selvedge/worker.pem"),
            key: PathBuf::from("/home/worker.key"),
        }
    );
    assert_eq!(
        config.models,
        [
            ModelConfig {
                name: "digits".to_owned(),
                version: "1".to_owned(),
                slots: cores(),
                source: ModelSource::Onnx {
                    path: PathBuf::from("/home/digits.onnx"),
                    confidence: None,
                    batch: None,
                },
                load_deadline: Duration::from_secs(60),
            },
            ModelConfig {
                name: "line/defects".to_owned(),
                version: "2026-05".to_owned(),
                slots: NonZeroU32::new(3).unwrap(),
                source: ModelSource::Onnx {
                    path: PathBuf::from("/home/defects.onnx"),
                    confidence: Some(ConfidenceRule::Max {
                        output: "probabilities".to_owned(),
                    }),
                    batch: Some(Batching {
                        max: NonZeroUsize::new(8).unwrap(),
                        delay: Duration::from_millis(5),
                    }),
                },
                load_deadline: Duration::from_millis(500),
            },
        ]
    );
}

const HEAD: &str = r#"
tier = "cloud"
[connect]
broker = "broker.example"
ca = "ca.pem"
cert = "worker.pem"
key = "worker.key"
"#;

#[test]
fn a_model_may_be_on_a_server_elsewhere() {
    let text = format!(
        r#"{HEAD}
[[model]]
name = "vision/defects"
[model.upstream]
kind = "open-inference"
url = "http://triton:8001"
model = "defects"
[[model]]
name = "smol"
[model.upstream]
kind = "openai"
url = "https://llm.example/v1"
ca = "llm-ca.pem"
token_file = "llm-key"
operations = ["chat.completions", "embeddings"]
poll = "500ms"
"#
    );
    let config = WorkerConfig::parse(&text, Path::new("/home"), |_| true).unwrap();
    let ModelSource::OpenInference(triton) = &config.models[0].source else {
        panic!("{config:?}");
    };
    assert_eq!(
        (triton.model.as_str(), triton.poll),
        ("defects", Duration::from_secs(1))
    );
    let ModelSource::OpenAi(llm) = &config.models[1].source else {
        panic!("{config:?}");
    };
    assert_eq!((llm.model.as_str(), llm.operations.len()), ("smol", 2));
    assert_eq!(llm.token_file.as_deref(), Some(Path::new("/home/llm-key")));
}

#[test]
fn a_server_elsewhere_is_checked() {
    let text = format!(
        r#"{HEAD}
[[model]]
name = "m"
path = "m.onnx"
[model.upstream]
kind = "triton"
url = "http://triton:8001"
operations = ["chat"]
poll = "0s"
urk = 1
"#
    );
    let found = WorkerConfig::parse(&text, Path::new("/home"), |_| true).unwrap_err();
    let found: Vec<String> = found.iter().map(ToString::to_string).collect();
    let expected = [
        "model[0].upstream.kind: expected \"open-inference\" or \"openai\", found \"triton\"",
        "model[0].upstream.operations: expected chat.completions, completions or embeddings, found",
        "model[0].upstream.poll: expected a time over zero",
        "model[0].upstream.urk: unknown key",
        "model[0].path: unknown key",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn every_problem_is_reported_at_once() {
    let text = r#"
tier = "fog"
tears = "edge"

[connect]
broker = ":7443"
ca = 7
cert = "worker.pem"
servername = "x"

[[model]]
name = "a/#"
path = "a.onnx"
slots = 0
confidence = { output = "p", kind = "min" }
load_deadline = "soon"
batch = { max = 1, delay = "2s" }
path_ = "b.onnx"

[[model]]
name = "b"
version = ""
path = "b.onnx"
slots = -1
confidence = "max"
load_deadline = "0s"
"#;
    let found = problems(text);
    let expected = [
        r#"tier: "fog" is no tier: expected edge or cloud"#,
        r#"connect.broker: expected a broker address host or host:port, found ":7443""#,
        "connect.ca: expected a string, found a value of type integer",
        "connect.key: expected a string, found none",
        "connect.servername: unknown key; expected one of broker, server_name, ca, cert, key",
        "model[0].name: ",
        "model[0].slots: expected a number from 1 to 4294967295, found 0",
        r#"model[0].confidence.kind: expected "max", found "min""#,
        "model[0].batch.max: expected a number of rows from 2 to 1024, found 1",
        r#"model[0].batch.delay: expected a time over zero and up to 1s such as 2ms, found "2s""#,
        r#"model[0].load_deadline: expected a time over zero such as 30s or 500ms, found "soon""#,
        "model[0].path_: unknown key; expected one of name, version, upstream, slots, llm, path, confidence, batch, load_deadline",
        r#"model[1].version: expected 1 to 128 bytes of text, found """#,
        "model[1].slots: expected a number from 1 to 4294967295, found -1",
        "model[1].confidence: expected a table, found a value of type string",
        r#"model[1].load_deadline: expected a time over zero such as 30s or 500ms, found "0s""#,
        "tears: unknown key; expected one of tier, connect, model",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        // The words about names are those of the topic rules.
        assert!(
            found.starts_with(expected),
            "{found:?} instead of {expected:?}"
        );
    }
}

#[test]
fn an_empty_file_misses_everything() {
    assert_eq!(
        problems(""),
        [
            "tier: expected a string, found none",
            "connect: expected the section [connect], found none",
            "model: expected [[model]] at least once, found none",
        ]
    );
}

#[test]
fn a_model_and_version_may_stand_once() {
    let twice = GOOD.replace("line/defects", "digits");
    assert!(parse(&twice).is_ok());
    let twice = twice.replace("2026-05", "1");
    assert_eq!(
        problems(&twice),
        ["model[1]: expected each model and version once, found `digits` version `1` again"]
    );
}

#[test]
fn a_file_that_is_no_toml_says_where() {
    let found = problems("tier = \"edge\"\n[connect\n");
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("line 2"), "{found:?}");
}

#[test]
fn every_missing_file_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("worker.toml");
    fs::write(
        &path,
        GOOD.replace("/etc/selvedge/worker.pem", "worker.pem"),
    )
    .unwrap();
    fs::write(directory.path().join("worker.pem"), "").unwrap();
    let ConfigError::Invalid {
        path: named,
        problems,
    } = WorkerConfig::load(&path).unwrap_err()
    else {
        panic!("expected problems");
    };
    assert_eq!(named, path);
    let keys: Vec<&str> = problems
        .iter()
        .map(|problem| problem.key.as_str())
        .collect();
    assert_eq!(
        keys,
        [
            "connect.ca",
            "connect.key",
            "model[0].path",
            "model[1].path"
        ]
    );
}

#[test]
fn a_configuration_that_is_not_there_is_named() {
    let error = WorkerConfig::load(Path::new("/nowhere/worker.toml")).unwrap_err();
    assert!(matches!(&error, ConfigError::Read { path, .. } if path.ends_with("worker.toml")));
}

const LLM: &str = r#"
tier = "edge"
[connect]
broker = "gateway:7443"
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"
[[model]]
name = "smollm2"
slots = 2
[model.llm]
path = "smollm2.gguf"
"#;

#[test]
fn a_language_model_is_read_with_its_defaults() {
    let source = |text: &str| parse(text).unwrap().models[0].source.clone();
    let mut expected = LlmConfig {
        path: PathBuf::from("/home/smollm2.gguf"),
        context: None,
        unpack: false,
    };
    assert_eq!(source(LLM), ModelSource::Llm(expected.clone()));
    expected.context = NonZeroU32::new(1024);
    expected.unpack = true;
    assert_eq!(
        source(&format!("{LLM}context = 1024\nunpack = true")),
        ModelSource::Llm(expected)
    );
}

#[test]
fn a_language_model_that_cannot_be_meant_is_refused() {
    assert_eq!(
        problems(&format!("{LLM}context = 1\nunpack = 2\nthreads = 3")),
        [
            "model[0].llm.context: expected a number of tokens over 1, found 1",
            "model[0].llm.unpack: expected true or false, found a value of type integer",
            "model[0].llm.threads: unknown key; expected one of path, context, unpack",
        ]
    );
    let both = LLM.replace(
        "[model.llm]",
        "[model.upstream]\nkind = \"openai\"\n[model.llm]",
    );
    assert_eq!(
        problems(&both),
        ["model[0].llm: expected one of llm and upstream, found both"]
    );
}
