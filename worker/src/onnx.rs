//! ONNX models, run by tract in this process.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tract_onnx::prelude::{
    DatumType, Framework, InferenceModelExt, IntoRunnable, TDim, TValue, TractResult, TypedFact,
    TypedRunnableModel,
};
use tract_onnx::tract_core;
use tract_onnx::tract_hir::infer::Factoid;

use crate::load::{self, Unloaded, panic_message};
use crate::model::{
    CancelFlag, ConfidenceRule, Datatype, Dim, Inference, Model, ModelError, Signature, Tensor,
    TensorSpec,
};

#[cfg(target_endian = "big")]
compile_error!("tensors are copied as little-endian bytes; a big-endian host needs a swap here");

/// How long a model may take to load unless configured otherwise. The largest models that an edge
/// device runs load in seconds; a minute is far over that and still ends.
pub const DEFAULT_LOAD_DEADLINE: Duration = Duration::from_secs(60);

/// An ONNX graph that is loaded, checked and optimised, ready to answer from any thread.
pub struct OnnxModel {
    signature: Signature,
    plan: Arc<TypedRunnableModel>,
    confidence: Option<ConfidenceRule>,
}

/// Why an ONNX file did not become a model. Each names the file.
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
    /// The file is not an ONNX graph, is cut short, or uses what the engine cannot run.
    #[error("model {} was expected to be an ONNX graph this engine runs: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What the engine said.
        reason: String,
    },
    /// An input or output that cannot travel: no fixed rank, or elements without a datatype here.
    #[error("model {}: `{tensor}` {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The input or output.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The configured confidence names no floating point output.
    #[error(
        "model {}: confidence was expected to name an FP32 or FP64 output and names `{output}`; the model gives {}",
        path.display(), found.join(", ")
    )]
    Confidence {
        /// The file.
        path: PathBuf,
        /// The output named.
        output: String,
        /// The outputs there are, with their datatypes.
        found: Vec<String>,
    },
    /// Loading took too long. Analysis cannot be interrupted, so its thread goes on until it ends
    /// or the process does; what follows is for the caller to decide.
    #[error(
        "model {} was not loaded within {deadline:?}; its loading thread is left behind",
        path.display()
    )]
    Deadline {
        /// The file.
        path: PathBuf,
        /// The time it had.
        deadline: Duration,
    },
}

impl OnnxModel {
    /// Loads a model on a thread of its own and waits for it, for `deadline` at most. Blocks.
    pub fn load(
        path: impl Into<PathBuf>,
        confidence: Option<ConfidenceRule>,
        deadline: Duration,
    ) -> Result<Self, LoadError> {
        let path = path.into();
        let file = path.clone();
        within(deadline, path, move || Self::load_here(&file, confidence))
    }

    fn load_here(path: &Path, confidence: Option<ConfidenceRule>) -> Result<Self, LoadError> {
        // Said here rather than by the engine, whose words for a missing file bury it.
        std::fs::File::open(path).map_err(|source| LoadError::Read {
            path: path.to_owned(),
            source,
        })?;
        let (names, plan) = catch_unwind(AssertUnwindSafe(|| analyse(path)))
            .map_err(|panic| panic_message(panic.as_ref()))
            .and_then(|result| result.map_err(|error| format!("{error:#}")))
            .map_err(|reason| LoadError::Invalid {
                path: path.to_owned(),
                reason,
            })?;

        let signature = signature(path, names, &plan)?;
        if let Some(rule) = &confidence {
            let fits = |spec: &TensorSpec| {
                spec.name == rule.output()
                    && matches!(spec.datatype, Datatype::Fp32 | Datatype::Fp64)
            };
            if !signature.outputs.iter().any(fits) {
                return Err(LoadError::Confidence {
                    path: path.to_owned(),
                    output: rule.output().to_owned(),
                    found: signature
                        .outputs
                        .iter()
                        .map(|spec| format!("{} {}", spec.datatype, spec.name))
                        .collect(),
                });
            }
        }
        Ok(OnnxModel {
            signature,
            plan,
            confidence,
        })
    }
}

impl Model for OnnxModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn infer(&self, inputs: Vec<Tensor>, cancelled: &CancelFlag) -> Result<Inference, ModelError> {
        let inputs = self.signature.arrange(inputs)?;
        // Some kernels assert on shapes, an empty batch for one. A request must not end the worker.
        let outputs = catch_unwind(AssertUnwindSafe(|| run(&self.plan, &inputs, cancelled)))
            .map_err(|panic| panic_message(panic.as_ref()))
            .and_then(|result| result.map_err(|error| format!("{error:#}")));
        if cancelled.is_cancelled() {
            return Err(ModelError::Cancelled);
        }
        let outputs = outputs
            .and_then(|values| {
                let specs = self.signature.outputs.iter();
                specs
                    .zip(values)
                    .map(|(spec, value)| from_engine(spec, &value))
                    .collect::<Result<Vec<_>, _>>()
            })
            .map_err(ModelError::Failed)?;
        let confidence = match &self.confidence {
            Some(rule) => rule.measure(&outputs)?,
            None => None,
        };
        Ok(Inference {
            outputs,
            confidence,
        })
    }
}

/// Runs `load` on its own thread and waits for it until the deadline.
fn within<T: Send + 'static>(
    deadline: Duration,
    path: PathBuf,
    load: impl FnOnce() -> Result<T, LoadError> + Send + 'static,
) -> Result<T, LoadError> {
    load::within(deadline, load).unwrap_or_else(|unloaded| {
        Err(match unloaded {
            Unloaded::Thread(source) => LoadError::Read { path, source },
            Unloaded::Late => LoadError::Deadline { path, deadline },
            Unloaded::Panicked => LoadError::Invalid {
                path,
                reason: "its loading thread panicked".to_owned(),
            },
        })
    })
}

/// Names of inputs and outputs in their order: optimisation keeps the order and drops names.
struct Names {
    inputs: Vec<String>,
    outputs: Vec<String>,
}

fn analyse(path: &Path) -> TractResult<(Names, Arc<TypedRunnableModel>)> {
    let mut model = tract_onnx::onnx().model_for_path(path)?;
    let inputs: Vec<_> = model.input_outlets()?.to_vec();
    let outputs: Vec<_> = model.output_outlets()?.to_vec();
    let name = |outlet: &tract_onnx::prelude::OutletId| match model.outlet_label(*outlet) {
        Some(label) => label.to_owned(),
        None => model.node(outlet.node).name.clone(),
    };
    let names = Names {
        inputs: inputs.iter().map(name).collect(),
        outputs: outputs.iter().map(name).collect(),
    };
    // A dimension that the file leaves open without a name is one of its own.
    for outlet in inputs {
        let mut fact = model.outlet_fact(outlet)?.clone();
        let rank = fact.shape.rank().concretize().unwrap_or(0);
        for axis in 0..usize::try_from(rank)? {
            if fact
                .shape
                .dim(axis)
                .is_some_and(|dim| dim.concretize().is_none())
            {
                let symbol = model.symbols.new_with_prefix("any");
                fact.shape.set_dim(axis, TDim::from(symbol));
            }
        }
        model.set_outlet_fact(outlet, fact)?;
    }
    Ok((names, model.into_optimized()?.into_runnable()?))
}

fn signature(path: &Path, names: Names, plan: &TypedRunnableModel) -> Result<Signature, LoadError> {
    let model = plan.model();
    let unsupported = |tensor: &str, reason: String| LoadError::Unsupported {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        reason,
    };
    let specs = |names: Vec<String>, facts: TractResult<Vec<TypedFact>>| {
        let facts = facts.map_err(|error| LoadError::Invalid {
            path: path.to_owned(),
            reason: format!("{error:#}"),
        })?;
        let spec = |(name, fact): (String, TypedFact)| {
            let Some(datatype) = datatype(fact.datum_type) else {
                let reason = format!("holds {:?}, which has no fixed size here", fact.datum_type);
                return Err(unsupported(&name, reason));
            };
            let shape = fact.shape.iter().map(dimension).collect();
            Ok(TensorSpec {
                name,
                datatype,
                shape,
            })
        };
        names
            .into_iter()
            .zip(facts)
            .map(spec)
            .collect::<Result<Vec<_>, _>>()
    };
    let inputs = (0..names.inputs.len())
        .map(|index| model.input_fact(index).cloned())
        .collect();
    let outputs = (0..names.outputs.len())
        .map(|index| model.output_fact(index).cloned())
        .collect();
    Ok(Signature {
        inputs: specs(names.inputs, inputs)?,
        outputs: specs(names.outputs, outputs)?,
    })
}

fn dimension(dim: &TDim) -> Dim {
    match dim {
        TDim::Val(size) => {
            usize::try_from(*size).map_or_else(|_| Dim::Any(size.to_string()), Dim::Fixed)
        }
        symbolic => Dim::Any(symbolic.to_string()),
    }
}

fn datatype(datum: DatumType) -> Option<Datatype> {
    Some(match datum.unquantized() {
        DatumType::Bool => Datatype::Bool,
        DatumType::U8 => Datatype::Uint8,
        DatumType::U16 => Datatype::Uint16,
        DatumType::U32 => Datatype::Uint32,
        DatumType::U64 => Datatype::Uint64,
        DatumType::I8 => Datatype::Int8,
        DatumType::I16 => Datatype::Int16,
        DatumType::I32 => Datatype::Int32,
        // The engine's own type for a computed shape.
        DatumType::I64 | DatumType::TDim => Datatype::Int64,
        DatumType::F16 => Datatype::Fp16,
        DatumType::F32 => Datatype::Fp32,
        DatumType::F64 => Datatype::Fp64,
        _ => return None,
    })
}

fn run(
    plan: &Arc<TypedRunnableModel>,
    inputs: &[Tensor],
    cancelled: &CancelFlag,
) -> TractResult<Vec<TValue>> {
    let mut values = Vec::with_capacity(inputs.len());
    for (index, tensor) in inputs.iter().enumerate() {
        let datum = plan.model().input_fact(index)?.datum_type;
        let mut value = tract_onnx::prelude::Tensor::zero_dt(datum, tensor.shape())?;
        value.as_bytes_mut().copy_from_slice(tensor.data());
        values.push(value.into());
    }
    let mut state = plan.spawn()?;
    let outputs = state.run_plan_with_eval(values.into(), |context, state, node, inputs| {
        // Between operators is the finest grain at which the engine lets go.
        if cancelled.is_cancelled() {
            return Err(tract_core::internal::format_err!("cancelled"));
        }
        tract_core::plan::eval(context, state, node, inputs)
    })?;
    Ok(outputs.into_iter().collect())
}

/// An output of the engine as a tensor of the signature.
fn from_engine(spec: &TensorSpec, value: &TValue) -> Result<Tensor, String> {
    let cast;
    let plain = if value.datum_type() == DatumType::TDim {
        cast = value
            .cast_to::<i64>()
            .map_err(|error| format!("{error:#}"))?;
        cast.as_ref()
    } else {
        value
    };
    if !plain.is_plain_ram() {
        return Err(format!(
            "output `{}` is kept in a form that cannot travel",
            spec.name
        ));
    }
    let data = Bytes::copy_from_slice(plain.as_bytes());
    Tensor::new(spec.name.clone(), spec.datatype, plain.shape(), data)
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
