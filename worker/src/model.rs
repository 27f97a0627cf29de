//! The `Model` trait, and the tensors that go in and come out, as in the Open Inference Protocol v2.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use selvedge_proto::inference as wire;

/// Something that answers inference requests: an ONNX graph, or what an application passes in.
///
/// A worker calls `infer` on a blocking thread, from at most as many threads at once as the model
/// has slots.
pub trait Model: Send + Sync + 'static {
    /// What goes in and what comes out. Registered with the broker, so it never changes.
    fn signature(&self) -> &Signature;

    /// Answers one request. An implementation that computes for long looks at `cancelled` now and
    /// then and gives up with [`ModelError::Cancelled`] when nobody waits for the answer any more.
    fn infer(&self, inputs: Vec<Tensor>, cancelled: &CancelFlag) -> Result<Inference, ModelError>;
}

/// The answer of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Inference {
    /// The output tensors, in the order of the signature.
    pub outputs: Vec<Tensor>,
    /// How sure the model is, from 0 to 1; `None` when the model has no measure of it. A request
    /// with a minimum confidence escalates below it.
    pub confidence: Option<f32>,
}

/// Why a model gave no answer.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ModelError {
    /// The caller's tensors do not fit the signature.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The caller gave up, or its deadline passed.
    #[error("the request was cancelled")]
    Cancelled,
    /// The output that the confidence is taken from holds something else than probabilities.
    #[error(
        "output `{output}` was expected to hold probabilities from 0 to 1 and holds {value}; name another output in `confidence`"
    )]
    NotAProbability {
        /// The output named by the configuration.
        output: String,
        /// The first value out of range.
        value: f64,
    },
    /// The engine failed on inputs that fit the signature.
    #[error("the model failed: {0}")]
    Failed(String),
}

/// Tells a model that nobody waits for its answer any more. Clones share one flag.
#[derive(Clone, Debug, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// A flag that is not raised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises the flag; it stays up.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// True once [`cancel`](Self::cancel) was called on any clone.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Raises the flag when what this gives is dropped, as it is with the task of a request.
    pub(crate) fn cancel_on_drop(self) -> CancelOnDrop {
        CancelOnDrop(self)
    }
}

/// Raises its flag when dropped.
pub(crate) struct CancelOnDrop(CancelFlag);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Type of a tensor's elements, under the names of the Open Inference Protocol v2.
///
/// `BYTES` is missing: its elements have no fixed size, and no engine here takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Datatype {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    Uint8,
    /// Unsigned, 16 bits.
    Uint16,
    /// Unsigned, 32 bits.
    Uint32,
    /// Unsigned, 64 bits.
    Uint64,
    /// Signed, 8 bits.
    Int8,
    /// Signed, 16 bits.
    Int16,
    /// Signed, 32 bits.
    Int32,
    /// Signed, 64 bits.
    Int64,
    /// IEEE 754 half precision.
    Fp16,
    /// IEEE 754 single precision.
    Fp32,
    /// IEEE 754 double precision.
    Fp64,
}

impl Datatype {
    /// Every datatype.
    pub const ALL: [Datatype; 12] = [
        Datatype::Bool,
        Datatype::Uint8,
        Datatype::Uint16,
        Datatype::Uint32,
        Datatype::Uint64,
        Datatype::Int8,
        Datatype::Int16,
        Datatype::Int32,
        Datatype::Int64,
        Datatype::Fp16,
        Datatype::Fp32,
        Datatype::Fp64,
    ];

    /// Size of one element in bytes.
    pub fn size(self) -> usize {
        match self {
            Datatype::Bool | Datatype::Uint8 | Datatype::Int8 => 1,
            Datatype::Uint16 | Datatype::Int16 | Datatype::Fp16 => 2,
            Datatype::Uint32 | Datatype::Int32 | Datatype::Fp32 => 4,
            Datatype::Uint64 | Datatype::Int64 | Datatype::Fp64 => 8,
        }
    }

    /// The name in the Open Inference Protocol.
    pub fn as_str(self) -> &'static str {
        match self {
            Datatype::Bool => "BOOL",
            Datatype::Uint8 => "UINT8",
            Datatype::Uint16 => "UINT16",
            Datatype::Uint32 => "UINT32",
            Datatype::Uint64 => "UINT64",
            Datatype::Int8 => "INT8",
            Datatype::Int16 => "INT16",
            Datatype::Int32 => "INT32",
            Datatype::Int64 => "INT64",
            Datatype::Fp16 => "FP16",
            Datatype::Fp32 => "FP32",
            Datatype::Fp64 => "FP64",
        }
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Datatype {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Datatype::ALL
            .into_iter()
            .find(|datatype| datatype.as_str() == name)
            .ok_or(())
    }
}

/// A tensor: name, datatype, shape, and row-major little-endian elements.
///
/// Its data is exactly as long as shape and datatype say, so what follows need not check again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    name: String,
    datatype: Datatype,
    shape: Vec<usize>,
    data: Bytes,
}

/// Why bytes are not a tensor. The sender is to blame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TensorError {
    /// A datatype this worker does not know.
    #[error("tensor `{name}` has the datatype `{found}`; expected one of {}", listed(&Datatype::ALL))]
    Datatype {
        /// The tensor.
        name: String,
        /// What the sender wrote.
        found: String,
    },
    /// A dimension under zero, or over what this machine can address.
    #[error(
        "tensor `{name}` has the dimension {found} on axis {axis}; expected one from 0 up to what memory holds"
    )]
    Dimension {
        /// The tensor.
        name: String,
        /// The axis, from 0.
        axis: usize,
        /// What the sender wrote.
        found: i64,
    },
    /// The shape describes more than can be addressed.
    #[error("tensor `{name}` has a shape of more elements than memory can address")]
    TooLarge {
        /// The tensor.
        name: String,
    },
    /// Shape and data disagree.
    #[error("tensor `{name}` carries {found} bytes; its shape and datatype call for {expected}")]
    Length {
        /// The tensor.
        name: String,
        /// Elements times size.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// A `BOOL` element that is neither 0 nor 1.
    #[error("tensor `{name}` is BOOL and holds the byte {found} at {offset}; expected 0 or 1")]
    Bool {
        /// The tensor.
        name: String,
        /// Position of the first such byte.
        offset: usize,
        /// The byte.
        found: u8,
    },
}

impl Tensor {
    /// A tensor of raw little-endian elements.
    pub fn new(
        name: impl Into<String>,
        datatype: Datatype,
        shape: impl Into<Vec<usize>>,
        data: impl Into<Bytes>,
    ) -> Result<Self, TensorError> {
        let (name, shape, data) = (name.into(), shape.into(), data.into());
        // A zero dimension makes the product zero, but not the other dimensions sane: engines
        // compute strides from them.
        let addressable = shape
            .iter()
            .filter(|&&dimension| dimension != 0)
            .try_fold(datatype.size(), |bytes, &dimension| {
                bytes.checked_mul(dimension)
            })
            .filter(|&bytes| isize::try_from(bytes).is_ok());
        let Some(bytes) = addressable else {
            return Err(TensorError::TooLarge { name });
        };
        let expected = if shape.contains(&0) { 0 } else { bytes };
        if data.len() != expected {
            return Err(TensorError::Length {
                name,
                expected,
                found: data.len(),
            });
        }
        if datatype == Datatype::Bool
            && let Some(offset) = data.iter().position(|&byte| byte > 1)
        {
            return Err(TensorError::Bool {
                name,
                offset,
                found: data[offset],
            });
        }
        Ok(Tensor {
            name,
            datatype,
            shape,
            data,
        })
    }

    /// An `FP32` tensor.
    pub fn from_f32(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        values: &[f32],
    ) -> Result<Self, TensorError> {
        let data: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Self::new(name, Datatype::Fp32, shape, data)
    }

    /// The elements of an `FP32` tensor; `None` for any other datatype.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        (self.datatype == Datatype::Fp32).then(|| {
            let (elements, _) = self.data.as_chunks::<4>();
            elements
                .iter()
                .map(|element| f32::from_le_bytes(*element))
                .collect()
        })
    }

    /// The name, as in the signature.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Type of the elements.
    pub fn datatype(&self) -> Datatype {
        self.datatype
    }

    /// The dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, row-major and little-endian.
    pub fn data(&self) -> &Bytes {
        &self.data
    }
}

impl TryFrom<wire::Tensor> for Tensor {
    type Error = TensorError;

    fn try_from(wire: wire::Tensor) -> Result<Self, TensorError> {
        let Ok(datatype) = wire.datatype.parse() else {
            return Err(TensorError::Datatype {
                name: wire.name,
                found: wire.datatype,
            });
        };
        let mut shape = Vec::with_capacity(wire.shape.len());
        for (axis, &found) in wire.shape.iter().enumerate() {
            let Ok(dimension) = usize::try_from(found) else {
                return Err(TensorError::Dimension {
                    name: wire.name,
                    axis,
                    found,
                });
            };
            shape.push(dimension);
        }
        Tensor::new(wire.name, datatype, shape, wire.data)
    }
}

impl From<Tensor> for wire::Tensor {
    fn from(tensor: Tensor) -> Self {
        wire::Tensor {
            name: tensor.name,
            datatype: tensor.datatype.as_str().to_owned(),
            // `Tensor::new` holds every dimension under `isize::MAX`.
            shape: tensor
                .shape
                .iter()
                .map(|&dimension| dimension as i64)
                .collect(),
            data: tensor.data,
        }
    }
}

/// What a model takes and gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The inputs, each of which a request must carry once.
    pub inputs: Vec<TensorSpec>,
    /// The outputs, in the order they are answered.
    pub outputs: Vec<TensorSpec>,
}

/// Name, datatype and shape of one input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name a tensor must carry.
    pub name: String,
    /// The datatype a tensor must have.
    pub datatype: Datatype,
    /// The dimensions a tensor must have, outermost first.
    pub shape: Vec<Dim>,
}

/// One dimension of a signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Exactly this many.
    Fixed(usize),
    /// Any number, but the same wherever one request has this name. A batch is one.
    Any(String),
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(size) => write!(f, "{size}"),
            Dim::Any(name) => f.write_str(name),
        }
    }
}

impl From<&TensorSpec> for wire::TensorSpec {
    fn from(spec: &TensorSpec) -> Self {
        wire::TensorSpec {
            name: spec.name.clone(),
            datatype: spec.datatype.as_str().to_owned(),
            shape: spec
                .shape
                .iter()
                .map(|dim| match dim {
                    Dim::Fixed(size) => i64::try_from(*size).unwrap_or(i64::MAX),
                    Dim::Any(_) => -1,
                })
                .collect(),
        }
    }
}

/// Why tensors are not an input of a model. The caller is to blame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InputError {
    /// A tensor of the request is not one.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// An input the signature names did not come.
    #[error("input `{name}` is missing; the model takes {}", listed(.expected))]
    Missing {
        /// The input.
        name: String,
        /// Every input of the model.
        expected: Vec<String>,
    },
    /// An input came that the signature does not name.
    #[error("input `{name}` is unknown; the model takes {}", listed(.expected))]
    Unknown {
        /// The input.
        name: String,
        /// Every input of the model.
        expected: Vec<String>,
    },
    /// One input came twice.
    #[error("input `{name}` came more than once")]
    Duplicate {
        /// The input.
        name: String,
    },
    /// An input of another datatype.
    #[error("input `{name}` is {found}; the model takes {expected}")]
    Datatype {
        /// The input.
        name: String,
        /// What the signature says.
        expected: Datatype,
        /// What came.
        found: Datatype,
    },
    /// An input of another number of dimensions.
    #[error("input `{name}` has {found} dimensions; the model takes {expected}")]
    Rank {
        /// The input.
        name: String,
        /// What the signature says.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// An input with a wrong fixed dimension.
    #[error("input `{name}` has {found} on axis {axis}; the model takes {expected}")]
    Dimension {
        /// The input.
        name: String,
        /// The axis, from 0.
        axis: usize,
        /// What the signature says.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// A named dimension with two sizes in one request.
    #[error(
        "input `{name}` has {found} on axis {axis}; `{dimension}` is {expected} elsewhere in this request"
    )]
    Disagreement {
        /// The input that came second.
        name: String,
        /// The axis, from 0.
        axis: usize,
        /// Name of the dimension.
        dimension: String,
        /// Its first size.
        expected: usize,
        /// Its second size.
        found: usize,
    },
}

impl Signature {
    /// Puts the inputs of a request into the order of the signature, or says what does not fit.
    pub fn arrange(&self, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, InputError> {
        let expected = || self.inputs.iter().map(|spec| spec.name.clone()).collect();
        let mut places: Vec<Option<Tensor>> = self.inputs.iter().map(|_| None).collect();
        for tensor in inputs {
            let Some(index) = self.inputs.iter().position(|spec| spec.name == tensor.name) else {
                return Err(InputError::Unknown {
                    name: tensor.name,
                    expected: expected(),
                });
            };
            if places[index].is_some() {
                return Err(InputError::Duplicate { name: tensor.name });
            }
            places[index] = Some(tensor);
        }

        let mut sizes = HashMap::new();
        let mut arranged = Vec::with_capacity(places.len());
        for (spec, place) in self.inputs.iter().zip(places) {
            let Some(tensor) = place else {
                return Err(InputError::Missing {
                    name: spec.name.clone(),
                    expected: expected(),
                });
            };
            spec.check(&tensor, &mut sizes)?;
            arranged.push(tensor);
        }
        Ok(arranged)
    }
}

impl TensorSpec {
    /// Holds a tensor against this spec; `sizes` carries the named dimensions seen so far.
    fn check<'a>(
        &'a self,
        tensor: &Tensor,
        sizes: &mut HashMap<&'a str, usize>,
    ) -> Result<(), InputError> {
        let name = || self.name.clone();
        if tensor.datatype != self.datatype {
            let (expected, found) = (self.datatype, tensor.datatype);
            return Err(InputError::Datatype {
                name: name(),
                expected,
                found,
            });
        }
        if tensor.shape.len() != self.shape.len() {
            let (expected, found) = (self.shape.len(), tensor.shape.len());
            return Err(InputError::Rank {
                name: name(),
                expected,
                found,
            });
        }
        for (axis, (dim, &found)) in self.shape.iter().zip(&tensor.shape).enumerate() {
            match dim {
                Dim::Fixed(expected) if *expected != found => {
                    let expected = *expected;
                    return Err(InputError::Dimension {
                        name: name(),
                        axis,
                        expected,
                        found,
                    });
                }
                Dim::Fixed(_) => {}
                Dim::Any(dimension) => {
                    let expected = *sizes.entry(dimension.as_str()).or_insert(found);
                    if expected != found {
                        let (name, dimension) = (name(), dimension.clone());
                        return Err(InputError::Disagreement {
                            name,
                            axis,
                            dimension,
                            expected,
                            found,
                        });
                    }
                }
            }
        }
        Ok(())
    }
}

/// How the confidence of an answer is read from its outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfidenceRule {
    /// The greatest value along the last axis of this output, which holds probabilities; over a
    /// batch the least of these, so that one doubtful row makes the whole answer doubtful.
    Max {
        /// Name of the output, `FP32` or `FP64`.
        output: String,
    },
}

/// Rounding may carry a probability this far out of 0 to 1.
const PROBABILITY_SLACK: f64 = 1e-3;

impl ConfidenceRule {
    /// Name of the output the confidence is read from.
    pub fn output(&self) -> &str {
        let ConfidenceRule::Max { output } = self;
        output
    }

    /// The confidence of an answer, or `None` when it has no such output or no element in it.
    pub fn measure(&self, outputs: &[Tensor]) -> Result<Option<f32>, ModelError> {
        let ConfidenceRule::Max { output } = self;
        let Some(tensor) = outputs.iter().find(|tensor| tensor.name == *output) else {
            return Ok(None);
        };
        let values: Vec<f64> = match tensor.datatype {
            Datatype::Fp32 => {
                let (elements, _) = tensor.data.as_chunks::<4>();
                elements
                    .iter()
                    .map(|element| f64::from(f32::from_le_bytes(*element)))
                    .collect()
            }
            Datatype::Fp64 => {
                let (elements, _) = tensor.data.as_chunks::<8>();
                elements
                    .iter()
                    .map(|element| f64::from_le_bytes(*element))
                    .collect()
            }
            _ => return Ok(None),
        };
        let allowed = -PROBABILITY_SLACK..=1.0 + PROBABILITY_SLACK;
        if let Some(&value) = values.iter().find(|value| !allowed.contains(value)) {
            return Err(ModelError::NotAProbability {
                output: output.clone(),
                value,
            });
        }
        if values.is_empty() {
            return Ok(None);
        }
        let row = tensor.shape.last().copied().unwrap_or(1);
        let least = values
            .chunks(row)
            .map(|row| row.iter().copied().fold(0.0, f64::max))
            .fold(1.0, f64::min);
        Ok(Some(least as f32))
    }
}

/// `a`, `b`, `c`: names for an error message.
fn listed(names: &[impl fmt::Display]) -> String {
    names
        .iter()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests;
