//! Small language models, run by candle in this process: a GGUF file that answers the OpenAI API.
//!
//! An answer is made on a blocking thread, token by token. Between two tokens the thread looks whether
//! anybody still waits for it. Of as many threads as the model has slots there are never more, whatever was
//! cancelled.

use std::fs::File;
use std::io::BufReader;
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use candle_core::quantized::gguf_file::{Content, Value};
use selvedge_client::{Code, Status, TensorSpec};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;

use crate::config::LlmConfig;
use crate::engine::{Answering, Capacity, Engine, JSON, OPERATION, Reply, Request};
use crate::load::{self, Unloaded, panic_message};
use crate::model::CancelFlag;

use self::answer::{Finish, Usage, Writer};
use self::request::{Asked, Message, Operation, Prompt};
use self::sampling::Sampler;
use self::template::Template;
use self::text::{Piece, Text};
use self::vocabulary::Vocabulary;
use self::weights::{Run, Weights};

mod answer;
mod request;
mod sampling;
mod template;
mod text;
mod vocabulary;
mod weights;

#[cfg(test)]
mod tests;

/// Tokens of a prompt that are read at once. More would be little quicker, and keep a cancelled request
/// longer.
const READ_AT_ONCE: usize = 32;

/// Where a file keeps the template that makes a text of a conversation.
const TEMPLATE: &str = "tokenizer.chat_template";

/// A language model that is loaded and checked.
pub struct Llm {
    loaded: Arc<Loaded>,
    operations: Vec<Operation>,
    /// One permit for each thread that may answer. A thread keeps its own until it has ended.
    threads: Arc<Semaphore>,
    capacity: Capacity,
}

/// Why a GGUF file did not become a model. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("read model {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no GGUF file, is cut short, or holds what this engine cannot run.
    #[error(
        "model {} was expected to be a GGUF file of the Llama architecture: {reason}",
        path.display()
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What was expected, and what was found.
        reason: String,
    },
    /// Loading took too long. It cannot be interrupted, so its thread goes on until it ends or the
    /// process does.
    #[error(
        "model {} was not loaded within {deadline:?}; give it a longer load_deadline or a faster disk",
        path.display()
    )]
    Deadline {
        /// The file.
        path: PathBuf,
        /// The time it had.
        deadline: Duration,
    },
}

impl Llm {
    /// Loads a model on a thread of its own and waits for it, for `deadline` at most. Blocks. It answers
    /// as many requests at once as there are `slots`.
    ///
    /// # Errors
    /// The file is no good, or loading it takes too long.
    pub fn load(
        config: &LlmConfig,
        slots: NonZeroU32,
        deadline: Duration,
    ) -> Result<Self, LoadError> {
        let wanted = config.clone();
        let loaded = load::within(deadline, move || {
            // Odd files make candle assert.
            catch_unwind(AssertUnwindSafe(|| Loaded::read(&wanted)))
                .unwrap_or_else(|panic| Err(Unread::Invalid(panic_message(panic.as_ref()))))
        });
        let path = || config.path.clone();
        let invalid = |reason: String| LoadError::Invalid {
            path: path(),
            reason,
        };
        let loaded = match loaded {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(Unread::Invalid(reason))) => return Err(invalid(reason)),
            Ok(Err(Unread::File(source))) | Err(Unloaded::Thread(source)) => {
                return Err(LoadError::Read {
                    path: path(),
                    source,
                });
            }
            Err(Unloaded::Late) => {
                return Err(LoadError::Deadline {
                    path: path(),
                    deadline,
                });
            }
            Err(Unloaded::Panicked) => {
                return Err(invalid("its loading thread panicked".to_owned()));
            }
        };
        let mut operations = vec![Operation::Completion];
        if loaded.template.is_some() {
            // The first is what a request is that does not say.
            operations.insert(0, Operation::Chat);
        }
        let threads = usize::try_from(slots.get()).unwrap_or(usize::MAX);
        Ok(Llm {
            loaded: Arc::new(loaded),
            operations,
            threads: Arc::new(Semaphore::new(threads.min(Semaphore::MAX_PERMITS))),
            capacity: Capacity {
                slots: slots.get(),
                loaded: true,
            },
        })
    }

    /// Most tokens of prompt and answer together.
    pub fn context(&self) -> usize {
        self.loaded.context
    }

    fn operation(&self, named: Option<&str>) -> Result<Operation, Status> {
        let Some(named) = named else {
            return Ok(self.operations[0]);
        };
        let mut known = self.operations.iter().copied();
        known
            .find(|operation| operation.name() == named)
            .ok_or_else(|| {
                let known: Vec<_> = self.operations.iter().map(|known| known.name()).collect();
                let known = known.join(", ");
                invalid(format!(
                    "expected one of {known}, found the operation {named:?}"
                ))
            })
    }
}

impl Engine for Llm {
    fn inputs(&self) -> Vec<TensorSpec> {
        let operations = self.operations.iter();
        operations
            .map(|operation| TensorSpec {
                name: operation.name().to_owned(),
                datatype: JSON.to_owned(),
                shape: Vec::new(),
            })
            .collect()
    }

    fn outputs(&self) -> Vec<TensorSpec> {
        self.inputs()
    }

    fn capacity(&self) -> watch::Receiver<Capacity> {
        watch::Sender::new(self.capacity).subscribe()
    }

    fn continues(&self) -> bool {
        true
    }

    fn answer(self: Arc<Self>, request: Request, reply: Reply) -> Answering {
        Box::pin(async move {
            let operation = self.operation(request.parameter(OPERATION))?;
            let permit = Arc::clone(&self.threads).acquire_owned().await;
            let permit = permit.expect("the semaphore is never closed");
            let job = Job {
                loaded: Arc::clone(&self.loaded),
                operation,
                request,
                reply,
                cancelled: CancelFlag::new(),
            };
            // Dropped with this future, the guard has the thread stop.
            let _guard = job.cancelled.clone().cancel_on_drop();
            let answered = spawn_blocking(move || {
                let _permit = permit;
                job.run()
            });
            answered.await.unwrap_or_else(|failure| {
                tracing::error!("the model panicked: {failure}");
                Err(Status::new(Code::Internal, "the model panicked"))
            })
        })
    }
}

/// What all answers share.
struct Loaded {
    weights: Weights,
    vocabulary: Vocabulary,
    /// Absent in a file that is not for conversations.
    template: Option<Template>,
    context: usize,
}

/// Why a file was not loaded.
enum Unread {
    File(std::io::Error),
    Invalid(String),
}

impl From<String> for Unread {
    fn from(reason: String) -> Self {
        Unread::Invalid(reason)
    }
}

impl Loaded {
    fn read(config: &LlmConfig) -> Result<Self, Unread> {
        let mut file = BufReader::new(File::open(&config.path).map_err(Unread::File)?);
        let content = Content::read(&mut file).map_err(|error| error.to_string())?;
        let vocabulary = Vocabulary::read(&content)?;
        let template = match content.metadata.get(TEMPLATE) {
            Some(Value::String(source)) => {
                let bos = vocabulary::written(&content, "bos")?;
                let eos = vocabulary::written(&content, "eos")?;
                let template = Template::new(source.clone(), bos, eos);
                Some(template.map_err(|error| format!("{TEMPLATE}: {error:#}"))?)
            }
            _ => None,
        };
        let weights = Weights::read(content, &mut file, vocabulary.len(), config.unpack)?;
        let most = config.context.map_or(usize::MAX, |most| {
            usize::try_from(most.get()).unwrap_or(usize::MAX)
        });
        let loaded = Loaded {
            context: weights.context().min(most),
            weights,
            vocabulary,
            template,
        };
        // What is missing or of the wrong size shows at the first token.
        let scores = loaded.weights.begin().read(&[0]);
        let scores = scores.map_err(|error| format!("trying it: {error}"))?;
        if scores.len() != loaded.vocabulary.len() {
            let (expected, found) = (loaded.vocabulary.len(), scores.len());
            return Err(Unread::Invalid(format!(
                "output.weight: expected {expected} rows, one for each token, found {found}"
            )));
        }
        Ok(loaded)
    }

    /// The tokens of a prompt, or why it is none.
    fn prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, Status> {
        let text = match (prompt, &self.template) {
            (Prompt::Text(text), _) => text.clone(),
            (Prompt::Chat { messages, begun }, Some(template)) => {
                self.look_for_controls(messages, begun.as_deref())?;
                // Each is a token at least.
                self.fits(messages.len())?;
                template
                    .render(messages, begun.as_deref())
                    .map_err(|error| invalid(format!("the model's template refuses it: {error}")))?
            }
            (Prompt::Chat { .. }, None) => {
                return Err(invalid("the model is not for conversations".to_owned()));
            }
        };
        self.fits(self.vocabulary.at_least(text.len()))?;
        let tokens = self.vocabulary.encode(&text).map_err(invalid)?;
        self.fits(tokens.len())?;
        if tokens.is_empty() {
            return Err(invalid(
                "expected a prompt, found one without tokens".to_owned(),
            ));
        }
        Ok(tokens)
    }

    /// There is room for one token of an answer at least.
    fn fits(&self, tokens: usize) -> Result<(), Status> {
        if tokens < self.context {
            return Ok(());
        }
        Err(invalid(format!(
            "expected a prompt of fewer tokens than the context, which is {}, found {tokens} or more: shorten it",
            self.context
        )))
    }

    fn look_for_controls(&self, messages: &[Message], begun: Option<&str>) -> Result<(), Status> {
        let contents = messages.iter().map(|message| message.content.as_str());
        for (index, content) in contents.chain(begun).enumerate() {
            if let Some(control) = self.vocabulary.control_in(content) {
                return Err(invalid(format!(
                    "messages[{index}] holds {control}, which separates messages for this model: leave it out"
                )));
            }
        }
        Ok(())
    }
}

/// The seed of a request that names none, the same in every worker: FNV-1a over its id.
fn seed_of(id: &str) -> u64 {
    id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// One answer.
struct Job {
    loaded: Arc<Loaded>,
    operation: Operation,
    request: Request,
    reply: Reply,
    cancelled: CancelFlag,
}

impl Job {
    /// Answers, on a thread that may block.
    fn run(self) -> Result<(), Status> {
        let asked = Asked::read(self.operation, &self.request.payload)
            .map_err(|unfit| invalid(unfit.to_string()))?;
        let prompt = self.loaded.prompt(&asked.prompt)?;
        let room = self.loaded.context - prompt.len();
        let most = asked.most.map_or(room, |most| most.min(room));
        let sampler = Sampler::new(asked.sampling, seed_of(&self.request.id));
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let created = since.map_or(0, |since| since.as_secs());
        let mut writer = Writer::new(self.operation, self.request.id.clone(), &asked, created);

        let mut usage = Usage {
            prompt: prompt.len(),
            answer: 0,
        };
        let mut run = self.loaded.weights.begin();
        let mut scores = Vec::new();
        for tokens in prompt.chunks(READ_AT_ONCE) {
            scores = self.read(&mut run, tokens)?;
        }
        let mut text = Text::new(asked.stops.clone());
        let mut whole = String::new();
        let finish = loop {
            let token = sampler.choose(&scores, run.tokens()).ok_or_else(|| {
                Status::new(Code::Internal, "the model failed: no score is a number")
            })?;
            if self.loaded.vocabulary.ends(token) {
                break Finish::Stop;
            }
            usage.answer += 1;
            let (piece, is_last) = match text.push(self.loaded.vocabulary.bytes(token)) {
                Piece::More(piece) => (piece, false),
                Piece::Last(piece) => (piece, true),
            };
            if asked.stream.is_none() || is_last {
                whole.push_str(&piece);
            } else if !piece.is_empty() {
                self.reply.blocking_send(writer.part(&piece, usage))?;
            }
            if is_last {
                // Nothing is held back that belongs to the answer.
                text = Text::new(Vec::new());
                break Finish::Stop;
            }
            if usage.answer == most {
                break Finish::Length;
            }
            scores = self.read(&mut run, &[token])?;
        };
        whole.push_str(&text.finish());
        if asked.stream.is_none() {
            return Ok(self
                .reply
                .blocking_send(writer.whole(&whole, finish, usage))?);
        }
        self.reply
            .blocking_send(writer.end(&whole, finish, usage))?;
        if let Some(last) = writer.usage(usage) {
            self.reply.blocking_send(last)?;
        }
        Ok(())
    }

    /// Has the model read tokens, unless nobody waits for the answer any more.
    fn read(&self, run: &mut Run, tokens: &[u32]) -> Result<Vec<f32>, Status> {
        if self.cancelled.is_cancelled() {
            return Err(Status::new(Code::Cancelled, "the request was cancelled"));
        }
        if tokio::time::Instant::now() >= self.request.deadline {
            let message = "the model was not done by the deadline";
            return Err(Status::new(Code::DeadlineExceeded, message));
        }
        run.read(tokens)
            .map_err(|error| Status::new(Code::Internal, format!("the model failed: {error}")))
    }
}

fn invalid(message: String) -> Status {
    Status::new(Code::InvalidArgument, message)
}
