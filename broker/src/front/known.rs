//! What is known of a model, for those who may ask it.

use std::sync::Arc;

use selvedge_proto::inference::TensorSpec;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;

use super::path::Operation;
use crate::calls::Caller;
use crate::models::WorkerModel;
use crate::policy::Verb;

/// Datatype of an input that is no tensor but the JSON of an operation of the OpenAI API, which is
/// then the input's name.
pub(crate) const JSON: &str = "JSON";

/// A model with workers.
pub(crate) struct Known {
    pub(crate) name: String,
    workers: Vec<Arc<WorkerModel>>,
}

impl Known {
    /// A model that the caller may ask, and of which a worker runs the version; empty for any.
    pub(crate) fn find(caller: &Caller, model: &str, version: &str) -> Result<Self, Status> {
        let name = TopicName::parse(model)
            .map_err(|error| Status::new(Code::InvalidArgument, format!("model: {error}")))?;
        caller.allow(Verb::Infer, &name)?;
        let mut workers = caller.tenant.models.workers(&name);
        workers.retain(|worker| version.is_empty() || worker.version == version);
        if workers.is_empty() {
            let of = if version.is_empty() {
                String::new()
            } else {
                format!("version {version:?} of ")
            };
            return Err(Status::new(
                Code::NotFound,
                format!("no worker runs {of}the model {name}"),
            ));
        }
        Ok(Self {
            name: model.to_owned(),
            workers,
        })
    }

    /// Every model that the caller may ask.
    pub(crate) fn all(caller: &Caller) -> Vec<Self> {
        let policy = caller.policy.now();
        let models = caller.tenant.models.list().into_iter();
        models
            .filter(|(name, _)| policy.decide(Verb::Infer, name).is_allowed())
            .map(|(name, workers)| Self {
                name: name.as_str().to_owned(),
                workers,
            })
            .collect()
    }

    /// Whether a worker can answer now.
    pub(crate) fn is_ready(&self) -> bool {
        self.workers
            .iter()
            .any(|worker| worker.is_loaded() && worker.slots() > 0)
    }

    /// The versions that are run, in order and each once.
    pub(crate) fn versions(&self) -> Vec<String> {
        let mut versions: Vec<String> = self.workers.iter().map(|w| w.version.clone()).collect();
        versions.sort();
        versions.dedup();
        versions
    }

    /// What it takes, as the first of its workers says.
    pub(crate) fn inputs(&self) -> &[TensorSpec] {
        self.workers.first().map_or(&[], |worker| &worker.inputs)
    }

    /// What it answers.
    pub(crate) fn outputs(&self) -> &[TensorSpec] {
        self.workers.first().map_or(&[], |worker| &worker.outputs)
    }

    /// The operations of the OpenAI API that it answers.
    pub(crate) fn operations(&self) -> Vec<&str> {
        let inputs = self.inputs().iter();
        inputs
            .filter(|input| input.datatype == JSON)
            .map(|input| input.name.as_str())
            .collect()
    }

    /// Whether it says what it takes, and it is no tensors.
    pub(crate) fn refuses_tensors(&self) -> bool {
        !self.operations().is_empty()
    }

    /// Whether it says what it takes, and this is not among it.
    pub(crate) fn refuses(&self, operation: Operation) -> bool {
        !self.inputs().is_empty() && !self.operations().contains(&operation.as_str())
    }
}
