//! The worker's configuration file, read whole into checked types.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use selvedge_client::{Options, Tier, TopicName};
use toml::{Table, Value};

use crate::model::ConfidenceRule;
use crate::onnx::DEFAULT_LOAD_DEADLINE;
use crate::upstream::openai::OpenAi;

/// How often a server elsewhere is asked whether it is ready, unless configured otherwise.
const DEFAULT_POLL: Duration = Duration::from_secs(1);

/// Longest version of a model, in bytes.
const MAX_VERSION_BYTES: usize = 128;

/// A worker's configuration, checked.
///
/// ```toml
/// tier = "edge"
///
/// [connect]
/// broker = "gateway.plant.example:7443"
/// ca = "ca.pem"
/// cert = "worker.pem"
/// key = "worker.key"
///
/// [[model]]
/// name = "digits"
/// path = "digits-edge.onnx"
/// confidence = { output = "probabilities", kind = "max" }
/// ```
///
/// Paths are relative to the file. A key that is not documented here is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerConfig {
    /// `tier`, `"edge"` or `"cloud"`: where this worker runs. The broker places requests by it.
    pub tier: Tier,
    /// `[connect]`: the broker, and this worker's certificate.
    pub connect: ConnectConfig,
    /// `[[model]]`, at least one: what this worker runs.
    pub models: Vec<ModelConfig>,
}

/// `[connect]`: the broker, and this worker's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectConfig {
    /// `broker`: host and port of the broker; the port is 7443 when left out.
    pub broker: String,
    /// `server_name`: the name the broker's certificate must carry. Default: the host of `broker`.
    pub server_name: Option<String>,
    /// `ca`: PEM file of the authorities whose brokers are trusted.
    pub ca: PathBuf,
    /// `cert`: PEM file of this worker's certificate chain.
    pub cert: PathBuf,
    /// `key`: PEM file of this worker's private key.
    pub key: PathBuf,
}

/// `[[model]]`: one model, and how it is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    /// `name`: what requests ask for. It follows the rules of topic names.
    pub name: String,
    /// `version`. Default: `"1"`.
    pub version: String,
    /// `slots`: requests answered at once; the broker never sends more. Default: the number of
    /// cores.
    pub slots: NonZeroU32,
    /// What answers: `path`, an ONNX file, `llm`, a GGUF file, or `upstream`, a server elsewhere.
    pub source: ModelSource,
    /// `load_deadline`, such as `"30s"` or `"500ms"`: how long loading may take. Default: `"60s"`.
    pub load_deadline: Duration,
}

/// How requests are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// `max`: rows of one batch, those of all its requests together; 2 to 1,024.
    pub max: NonZeroUsize,
    /// `delay`: how long the first request of a batch waits for others; up to `"1s"`. Default: `"2ms"`.
    pub delay: Duration,
}

/// Rows of a batch at most.
const MOST_ROWS: usize = 1_024;
/// How long the first request of a batch waits unless told otherwise.
const DEFAULT_BATCH_DELAY: Duration = Duration::from_millis(2);
/// How long it may be told to wait.
const LONGEST_BATCH_DELAY: Duration = Duration::from_secs(1);

/// What answers the requests for a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// An ONNX file.
    Onnx {
        /// `path`: the file.
        path: PathBuf,
        /// `confidence`, such as `{ output = "probabilities", kind = "max" }`: how sure an answer is.
        /// Default: answers carry no confidence, and never escalate.
        confidence: Option<ConfidenceRule>,
        /// `batch`, such as `{ max = 8, delay = "2ms" }`: requests that come at nearly the same time are
        /// computed as one. Default: each by itself.
        batch: Option<Batching>,
    },
    /// `llm`: a language model of a GGUF file. Needs the feature `llm`.
    Llm(LlmConfig),
    /// `upstream.kind = "open-inference"`: a server of the Open Inference Protocol over gRPC.
    OpenInference(UpstreamConfig),
    /// `upstream.kind = "openai"`: an OpenAI-compatible server.
    OpenAi(UpstreamConfig),
}

/// `[model.llm]`: a language model of a GGUF file, answering chats and completions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlmConfig {
    /// `path`: the file.
    pub path: PathBuf,
    /// `context`: most tokens of a prompt and its answer together, each of which takes memory. Default: what
    /// the model was trained for, up to 4,096.
    pub context: Option<NonZeroU32>,
    /// `unpack`: keep the weights as 32-bit numbers, which takes up to eight times the memory. An answer is
    /// then the same however much of it was there before, so one that was cut off goes on as it would have.
    /// Default: false.
    pub unpack: bool,
}

/// `[model.upstream]`: a model server elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// `url`, such as `http://127.0.0.1:8001` or `https://llm.example/v1`. Of an OpenAI-compatible
    /// server with what comes before `/chat/completions`.
    pub url: String,
    /// `model`: the server's name for the model. Default: the name it is offered under.
    pub model: String,
    /// `version`: the server's version of the model. Default: any. Not for OpenAI.
    pub version: String,
    /// `ca`: PEM file of the authorities of the server; for https.
    pub ca: Option<PathBuf>,
    /// `token_file`: file with a bearer token, or API key, for the server.
    pub token_file: Option<PathBuf>,
    /// `operations`: `chat.completions`, `completions` and `embeddings`, or some of them. Default: the
    /// first. Only for OpenAI.
    pub operations: Vec<String>,
    /// `poll`, such as `"500ms"`: how often the server is asked whether it is ready. Default: `"1s"`.
    pub poll: Duration,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read worker configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file was read, and this is all that is wrong with it.
    #[error("worker configuration {} is refused{}", path.display(), lines(problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong, in the order of the file's sections.
        problems: Vec<Problem>,
    },
}

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, such as `model[0].slots`; empty when the file is not TOML at all.
    pub key: String,
    /// What was expected and what was found.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => f.write_str(&self.message),
            key => write!(f, "{key}: {}", self.message),
        }
    }
}

impl WorkerConfig {
    /// Reads and checks a configuration file, and that the files it names are there.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let directory = path.parent().unwrap_or(Path::new(""));
        Self::parse(&text, directory, Path::is_file).map_err(|problems| ConfigError::Invalid {
            path: path.to_owned(),
            problems,
        })
    }

    /// Checks the text of a configuration. Paths are taken relative to `directory`, and each is
    /// put to `is_file`.
    pub fn parse(
        text: &str,
        directory: &Path,
        is_file: impl Fn(&Path) -> bool,
    ) -> Result<Self, Vec<Problem>> {
        let table = text.parse::<Table>().map_err(|error| {
            let message = error.to_string().trim_end().to_owned();
            vec![Problem {
                key: String::new(),
                message,
            }]
        })?;
        let mut reader = Reader {
            directory,
            is_file: &is_file,
            problems: Vec::new(),
        };
        let config = reader.worker(table);
        match config {
            Some(config) if reader.problems.is_empty() => Ok(config),
            _ => Err(reader.problems),
        }
    }
}

/// Collects problems while it reads: each method gives `None` after adding one.
struct Reader<'a> {
    directory: &'a Path,
    is_file: &'a dyn Fn(&Path) -> bool,
    problems: Vec<Problem>,
}

/// A table that is being read: keys are taken out, and those left over are unknown.
struct Section {
    /// What stands before its keys in messages: empty, or `connect.`.
    prefix: String,
    table: Table,
    known: Vec<&'static str>,
}

impl Reader<'_> {
    fn worker(&mut self, table: Table) -> Option<WorkerConfig> {
        let mut root = Section::new("", table);
        let tier = self
            .text(&mut root, "tier")
            .and_then(|tier| self.tier(&tier));
        let connect = match root.take("connect") {
            Some(value) => self
                .table("connect", value)
                .and_then(|table| self.connect(table)),
            None => self.problem("connect", "expected the section [connect], found none"),
        };
        let models = match root.take("model") {
            Some(Value::Array(values)) if !values.is_empty() => Some(self.models(values)),
            Some(other) => self.problem(
                "model",
                format!(
                    "expected [[model]] at least once, found {}",
                    kind_name(&other)
                ),
            ),
            None => self.problem("model", "expected [[model]] at least once, found none"),
        };
        self.finish(&root);
        Some(WorkerConfig {
            tier: tier?,
            connect: connect?,
            models: models?,
        })
    }

    fn connect(&mut self, table: Table) -> Option<ConnectConfig> {
        let mut section = Section::new("connect.", table);
        let broker =
            self.text(&mut section, "broker")
                .and_then(|broker| match Options::new(&broker) {
                    Ok(_) => Some(broker),
                    Err(error) => self.problem("connect.broker", error.to_string()),
                });
        let server_name = self.optional_text(&mut section, "server_name");
        let ca = self.file(&mut section, "ca");
        let cert = self.file(&mut section, "cert");
        let key = self.file(&mut section, "key");
        self.finish(&section);
        Some(ConnectConfig {
            broker: broker?,
            server_name,
            ca: ca?,
            cert: cert?,
            key: key?,
        })
    }

    /// The models that could be read; the problems of the others are noted.
    fn models(&mut self, values: Vec<Value>) -> Vec<ModelConfig> {
        let mut models = Vec::with_capacity(values.len());
        let mut seen = HashSet::new();
        for (index, value) in values.into_iter().enumerate() {
            let at = format!("model[{index}]");
            let Some(table) = self.table(&at, value) else {
                continue;
            };
            let Some(model) = self.model(&at, table) else {
                continue;
            };
            if !seen.insert((model.name.clone(), model.version.clone())) {
                let (name, version) = (&model.name, &model.version);
                let message = format!(
                    "expected each model and version once, found `{name}` version `{version}` again"
                );
                self.problem::<()>(&at, message);
            }
            models.push(model);
        }
        models
    }

    fn model(&mut self, at: &str, table: Table) -> Option<ModelConfig> {
        let mut section = Section::new(format!("{at}."), table);
        let name = self.text(&mut section, "name").and_then(|name| {
            match TopicName::parse(name.as_str()) {
                Ok(_) => Some(name),
                Err(error) => self.problem(&section.key("name"), error.to_string()),
            }
        });
        let version = match self.optional_text(&mut section, "version") {
            None => Some("1".to_owned()),
            Some(version)
                if (1..=MAX_VERSION_BYTES).contains(&version.len())
                    && !version.contains(char::is_control) =>
            {
                Some(version)
            }
            Some(version) => self.problem(
                &section.key("version"),
                format!("expected 1 to {MAX_VERSION_BYTES} bytes of text, found {version:?}"),
            ),
        };
        let upstream = section.take("upstream");
        let slots = match section.take("slots") {
            None => Some(cores()),
            Some(value) => match value.as_integer().map(u32::try_from) {
                Some(Ok(slots)) if slots > 0 => NonZeroU32::new(slots),
                _ => self.problem(
                    &section.key("slots"),
                    format!("expected a number from 1 to {}, found {value}", u32::MAX),
                ),
            },
        };
        let source = match (upstream, section.take("llm")) {
            (None, None) => self.onnx(&mut section),
            (Some(value), None) => {
                let at = section.key("upstream");
                let table = self.table(&at, value);
                table.and_then(|table| self.upstream(&at, table, name.as_deref()))
            }
            (None, Some(value)) => {
                let at = section.key("llm");
                let table = self.table(&at, value);
                table.and_then(|table| self.llm(&at, table))
            }
            (Some(_), Some(_)) => {
                let message = "expected one of llm and upstream, found both";
                self.problem(&section.key("llm"), message)
            }
        };
        let load_deadline = match self.optional_text(&mut section, "load_deadline") {
            None => Some(DEFAULT_LOAD_DEADLINE),
            Some(text) => match duration(&text) {
                Some(deadline) => Some(deadline),
                None => self.problem(
                    &section.key("load_deadline"),
                    format!("expected a time over zero such as 30s or 500ms, found {text:?}"),
                ),
            },
        };
        self.finish(&section);
        Some(ModelConfig {
            name: name?,
            version: version?,
            slots: slots?,
            source: source?,
            load_deadline: load_deadline?,
        })
    }

    fn onnx(&mut self, section: &mut Section) -> Option<ModelSource> {
        let path = self.file(section, "path");
        let confidence = match section.take("confidence") {
            None => Some(None),
            Some(value) => {
                let at = section.key("confidence");
                let table = self.table(&at, value);
                table
                    .and_then(|table| self.confidence(&at, table))
                    .map(Some)
            }
        };
        let batch = match section.take("batch") {
            None => Some(None),
            Some(value) => {
                let at = section.key("batch");
                let table = self.table(&at, value);
                table.and_then(|table| self.batch(&at, table)).map(Some)
            }
        };
        Some(ModelSource::Onnx {
            path: path?,
            confidence: confidence?,
            batch: batch?,
        })
    }

    fn batch(&mut self, at: &str, table: Table) -> Option<Batching> {
        let mut section = Section::new(format!("{at}."), table);
        let max = match section.take("max") {
            Some(value) => match value.as_integer().map(usize::try_from) {
                Some(Ok(rows)) if (2..=MOST_ROWS).contains(&rows) => NonZeroUsize::new(rows),
                _ => self.problem(
                    &section.key("max"),
                    format!("expected a number of rows from 2 to {MOST_ROWS}, found {value}"),
                ),
            },
            None => {
                let message =
                    format!("expected a number of rows from 2 to {MOST_ROWS}, found none");
                self.problem(&section.key("max"), message)
            }
        };
        let delay = match self.optional_text(&mut section, "delay") {
            None => Some(DEFAULT_BATCH_DELAY),
            Some(text) => match duration(&text).filter(|delay| *delay <= LONGEST_BATCH_DELAY) {
                Some(delay) => Some(delay),
                None => self.problem(
                    &section.key("delay"),
                    format!("expected a time over zero and up to 1s such as 2ms, found {text:?}"),
                ),
            },
        };
        self.finish(&section);
        Some(Batching {
            max: max?,
            delay: delay?,
        })
    }

    fn llm(&mut self, at: &str, table: Table) -> Option<ModelSource> {
        let mut section = Section::new(format!("{at}."), table);
        let path = self.file(&mut section, "path");
        let context = match section.take("context") {
            None => Some(None),
            Some(value) => match value.as_integer().map(u32::try_from) {
                Some(Ok(tokens)) if tokens > 1 => Some(NonZeroU32::new(tokens)),
                _ => self.problem(
                    &section.key("context"),
                    format!("expected a number of tokens over 1, found {value}"),
                ),
            },
        };
        let unpack = match section.take("unpack") {
            None => Some(false),
            Some(Value::Boolean(unpack)) => Some(unpack),
            Some(other) => self.problem(
                &section.key("unpack"),
                format!("expected true or false, found {}", kind_name(&other)),
            ),
        };
        self.finish(&section);
        Some(ModelSource::Llm(LlmConfig {
            path: path?,
            context: context?,
            unpack: unpack?,
        }))
    }

    fn upstream(&mut self, at: &str, table: Table, name: Option<&str>) -> Option<ModelSource> {
        let mut section = Section::new(format!("{at}."), table);
        let kind = self.text(&mut section, "kind").and_then(|kind| {
            let source: fn(UpstreamConfig) -> ModelSource = match kind.as_str() {
                "open-inference" => ModelSource::OpenInference,
                "openai" => ModelSource::OpenAi,
                other => {
                    return self.problem(
                        &section.key("kind"),
                        format!("expected \"open-inference\" or \"openai\", found {other:?}"),
                    );
                }
            };
            Some(source)
        });
        let url = self.text(&mut section, "url");
        let model = self.optional_text(&mut section, "model");
        let version = self.optional_text(&mut section, "version");
        let ca = self.optional_file(&mut section, "ca");
        let token_file = self.optional_file(&mut section, "token_file");
        let mut operations = Vec::new();
        match section.take("operations") {
            None => {}
            Some(Value::Array(values)) => {
                for value in values {
                    match value.as_str().filter(|name| OpenAi::knows(name)) {
                        Some(operation) => operations.push(operation.to_owned()),
                        None => {
                            let message = format!(
                                "expected chat.completions, completions or embeddings, found {value}"
                            );
                            self.problem::<()>(&section.key("operations"), message);
                        }
                    }
                }
            }
            Some(other) => {
                let message = format!("expected an array, found {}", kind_name(&other));
                self.problem::<()>(&section.key("operations"), message);
            }
        }
        let poll = match self.optional_text(&mut section, "poll") {
            None => Some(DEFAULT_POLL),
            Some(text) => match duration(&text) {
                Some(poll) => Some(poll),
                None => self.problem(
                    &section.key("poll"),
                    format!("expected a time over zero such as 1s or 500ms, found {text:?}"),
                ),
            },
        };
        self.finish(&section);
        let config = UpstreamConfig {
            url: url?,
            model: model.or_else(|| name.map(str::to_owned))?,
            version: version.unwrap_or_default(),
            ca,
            token_file,
            operations,
            poll: poll?,
        };
        Some(kind?(config))
    }

    fn confidence(&mut self, at: &str, table: Table) -> Option<ConfidenceRule> {
        let mut section = Section::new(format!("{at}."), table);
        let output = self.text(&mut section, "output");
        let kind = self
            .text(&mut section, "kind")
            .and_then(|kind| match kind.as_str() {
                "max" => Some(()),
                _ => self.problem(
                    &section.key("kind"),
                    format!("expected \"max\", found {kind:?}"),
                ),
            });
        self.finish(&section);
        kind.and(output)
            .map(|output| ConfidenceRule::Max { output })
    }

    fn tier(&mut self, tier: &str) -> Option<Tier> {
        match tier.parse() {
            Ok(tier) => Some(tier),
            Err(error) => self.problem("tier", format!("{error}")),
        }
    }

    fn table(&mut self, at: &str, value: Value) -> Option<Table> {
        match value {
            Value::Table(table) => Some(table),
            other => self.problem(at, format!("expected a table, found {}", kind_name(&other))),
        }
    }

    fn text(&mut self, section: &mut Section, key: &'static str) -> Option<String> {
        if !section.table.contains_key(key) {
            section.known.push(key);
            return self.problem(&section.key(key), "expected a string, found none");
        }
        self.optional_text(section, key)
    }

    fn optional_text(&mut self, section: &mut Section, key: &'static str) -> Option<String> {
        match section.take(key)? {
            Value::String(text) => Some(text),
            other => self.problem(
                &section.key(key),
                format!("expected a string, found {}", kind_name(&other)),
            ),
        }
    }

    fn optional_file(&mut self, section: &mut Section, key: &'static str) -> Option<PathBuf> {
        if section.table.contains_key(key) {
            self.file(section, key)
        } else {
            section.known.push(key);
            None
        }
    }

    fn file(&mut self, section: &mut Section, key: &'static str) -> Option<PathBuf> {
        let path = self.directory.join(self.text(section, key)?);
        if !(self.is_file)(&path) {
            let message = format!("expected a file, found none at {}", path.display());
            return self.problem(&section.key(key), message);
        }
        Some(path)
    }

    /// Refuses what nobody took: a misspelt key must not pass for one that was left out.
    fn finish(&mut self, section: &Section) {
        for key in section.table.keys() {
            let known = section.known.join(", ");
            self.problem::<()>(
                &section.key(key),
                format!("unknown key; expected one of {known}"),
            );
        }
    }

    fn problem<T>(&mut self, key: &str, message: impl Into<String>) -> Option<T> {
        self.problems.push(Problem {
            key: key.to_owned(),
            message: message.into(),
        });
        None
    }
}

impl Section {
    fn new(prefix: impl Into<String>, table: Table) -> Self {
        Section {
            prefix: prefix.into(),
            table,
            known: Vec::new(),
        }
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.table.remove(key)
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

/// Number of cores this process may use; the default of `slots`.
pub(crate) fn cores() -> NonZeroU32 {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cores)
        .ok()
        .and_then(NonZeroU32::new)
        .unwrap_or(NonZeroU32::MIN)
}

fn duration(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit);
    let number: u32 = number.parse().ok().filter(|&number| number > 0)?;
    match unit {
        "ms" => Some(Duration::from_millis(number.into())),
        "s" => Some(Duration::from_secs(number.into())),
        "m" => Some(Duration::from_secs(u64::from(number) * 60)),
        _ => None,
    }
}

fn kind_name(value: &Value) -> String {
    match value {
        Value::Array(values) if values.is_empty() => "an empty array".to_owned(),
        value => format!("a value of type {}", value.type_str()),
    }
}

fn lines(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(|problem| format!("\n  {problem}"))
        .collect()
}

#[cfg(test)]
mod tests;
