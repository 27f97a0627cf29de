//! Tensors of the Open Inference Protocol: their elements, and the gRPC messages that carry them.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use selvedge_proto::inference::Tensor;
use selvedge_proto::open_inference as oip;
use selvedge_proto::open_inference::infer_parameter::ParameterChoice;

use super::request::{InferRequest, InferResponse, Invalid, Parameter, Wanted};

#[cfg(test)]
mod tests;

/// Bytes of one element, or `None` for BYTES, whose elements have a length each.
///
/// # Errors
/// The datatype is not one of the protocol.
pub fn element_size(datatype: &str) -> Result<Option<usize>, Invalid> {
    Ok(Some(match datatype {
        "BOOL" | "UINT8" | "INT8" => 1,
        "UINT16" | "INT16" | "FP16" | "BF16" => 2,
        "UINT32" | "INT32" | "FP32" => 4,
        "UINT64" | "INT64" | "FP64" => 8,
        "BYTES" => return Ok(None),
        other => {
            return Err(Invalid(format!(
                "datatype {other:?} is not known: expected BOOL, UINT8 to UINT64, INT8 to INT64, \
                 FP16, BF16, FP32, FP64 or BYTES"
            )));
        }
    }))
}

/// Checks that a tensor's contents are as long as its shape and datatype say.
///
/// # Errors
/// They are not, or the datatype or a dimension is none.
pub fn check(tensor: &Tensor) -> Result<(), Invalid> {
    let invalid = |why: String| Invalid(format!("tensor {:?}: {why}", tensor.name));
    let size = element_size(&tensor.datatype).map_err(|error| invalid(error.0))?;
    let mut elements: usize = 1;
    for &dimension in &tensor.shape {
        let dimension = usize::try_from(dimension)
            .map_err(|_| invalid(format!("dimension {dimension}: expected 0 or more")))?;
        elements = elements
            .checked_mul(dimension)
            .ok_or_else(|| invalid(format!("shape {:?} has too many elements", tensor.shape)))?;
    }
    let found = tensor.data.len();
    match size {
        Some(size) => match elements.checked_mul(size) {
            Some(expected) if expected == found => Ok(()),
            _ => Err(invalid(format!(
                "expected {elements} elements of {size} bytes for shape {:?} of {}, found {found} \
                 bytes",
                tensor.shape, tensor.datatype
            ))),
        },
        None => {
            let mut counted = 0;
            for element in BytesElements(&tensor.data) {
                element.map_err(|error| invalid(error.0))?;
                counted += 1;
            }
            if counted == elements {
                Ok(())
            } else {
                Err(invalid(format!(
                    "expected {elements} elements for shape {:?}, found {counted}",
                    tensor.shape
                )))
            }
        }
    }
}

/// The elements of a BYTES tensor: a length of four bytes, little-endian, before each.
pub(crate) struct BytesElements<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for BytesElements<'a> {
    type Item = Result<&'a [u8], Invalid>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let cut = self.0.split_first_chunk::<4>().and_then(|(length, rest)| {
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            rest.split_at_checked(length)
        });
        match cut {
            Some((element, rest)) => {
                self.0 = rest;
                Some(Ok(element))
            }
            None => {
                self.0 = &[];
                Some(Err(Invalid::new("an element of BYTES is cut off")))
            }
        }
    }
}

/// Appends one element of a BYTES tensor.
pub(crate) fn put_bytes_element(buffer: &mut BytesMut, element: &[u8]) -> Result<(), Invalid> {
    let length = u32::try_from(element.len())
        .map_err(|_| Invalid::new("an element of BYTES has 4 GiB or more"))?;
    buffer.put_u32_le(length);
    buffer.put_slice(element);
    Ok(())
}

/// Reads a request.
///
/// # Errors
/// A tensor is not as it says, or something is asked for that only a server on the same machine has.
pub fn from_proto(request: oip::ModelInferRequest) -> Result<InferRequest, Invalid> {
    let raw = !request.raw_input_contents.is_empty();
    if raw && request.raw_input_contents.len() != request.inputs.len() {
        return Err(Invalid(format!(
            "expected as many raw_input_contents as inputs, found {} for {}",
            request.raw_input_contents.len(),
            request.inputs.len()
        )));
    }
    let mut contents = request.raw_input_contents.into_iter();
    let mut inputs = Vec::with_capacity(request.inputs.len());
    for input in request.inputs {
        let invalid = |why: &str| Invalid(format!("tensor {:?}: {why}", input.name));
        refuse_unsupported(input.parameters.keys()).map_err(|error| invalid(&error.0))?;
        let data = match (contents.next(), input.contents) {
            (Some(_), Some(_)) => {
                return Err(invalid(
                    "expected contents or raw_input_contents, found both",
                ));
            }
            (Some(raw), None) => raw,
            (None, contents) => from_contents(&input.datatype, contents.unwrap_or_default())
                .map_err(|error| invalid(&error.0))?,
        };
        let tensor = Tensor {
            name: input.name,
            datatype: input.datatype,
            shape: input.shape,
            data,
        };
        check(&tensor)?;
        inputs.push(tensor);
    }
    let mut outputs = Vec::with_capacity(request.outputs.len());
    for output in request.outputs {
        refuse_unsupported(output.parameters.keys())
            .map_err(|error| Invalid(format!("output {:?}: {error}", output.name)))?;
        outputs.push(Wanted {
            name: output.name,
            binary: None,
        });
    }
    Ok(InferRequest {
        id: request.id,
        parameters: from_proto_parameters(request.parameters),
        inputs,
        outputs,
        binary: true,
    })
}

/// Refuses parameters of tensors that would change what an answer means if they were ignored.
pub(crate) fn refuse_unsupported<'a>(
    mut names: impl Iterator<Item = &'a String>,
) -> Result<(), Invalid> {
    let found = names.find(|name| name.starts_with("shared_memory") || *name == "classification");
    match found {
        Some(name) => Err(Invalid(format!("{name} is not supported"))),
        None => Ok(()),
    }
}

/// Writes an answer, contents raw.
pub fn to_proto(response: InferResponse) -> oip::ModelInferResponse {
    let mut raw_output_contents = Vec::with_capacity(response.outputs.len());
    let outputs = response
        .outputs
        .into_iter()
        .map(|tensor| {
            raw_output_contents.push(tensor.data);
            oip::model_infer_response::InferOutputTensor {
                name: tensor.name,
                datatype: tensor.datatype,
                shape: tensor.shape,
                parameters: BTreeMap::new(),
                contents: None,
            }
        })
        .collect();
    oip::ModelInferResponse {
        model_name: response.model,
        model_version: response.version,
        id: response.id,
        parameters: response
            .parameters
            .into_iter()
            .map(|(name, value)| (name, to_proto_parameter(value)))
            .collect(),
        outputs,
        raw_output_contents,
    }
}

/// Reads parameters; those without a value are left out.
fn from_proto_parameters(
    parameters: BTreeMap<String, oip::InferParameter>,
) -> Vec<(String, Parameter)> {
    parameters
        .into_iter()
        .filter_map(|(name, value)| {
            let value = match value.parameter_choice? {
                ParameterChoice::BoolParam(value) => Parameter::Bool(value),
                ParameterChoice::Int64Param(value) => Parameter::Int(value),
                ParameterChoice::StringParam(value) => Parameter::Text(value),
                ParameterChoice::DoubleParam(value) => Parameter::Double(value),
                ParameterChoice::Uint64Param(value) => Parameter::Uint(value),
            };
            Some((name, value))
        })
        .collect()
}

pub(crate) fn to_proto_parameter(value: Parameter) -> oip::InferParameter {
    oip::InferParameter {
        parameter_choice: Some(match value {
            Parameter::Bool(value) => ParameterChoice::BoolParam(value),
            Parameter::Int(value) => ParameterChoice::Int64Param(value),
            Parameter::Uint(value) => ParameterChoice::Uint64Param(value),
            Parameter::Double(value) => ParameterChoice::DoubleParam(value),
            Parameter::Text(value) => ParameterChoice::StringParam(value),
        }),
    }
}

/// Little-endian bytes of elements that came in the field for their datatype.
fn from_contents(datatype: &str, contents: oip::InferTensorContents) -> Result<Bytes, Invalid> {
    fn small<T: Copy + std::fmt::Display, U: TryFrom<T>, const N: usize>(
        datatype: &str,
        values: &[T],
        bytes: impl Fn(U) -> [u8; N],
    ) -> Result<Bytes, Invalid> {
        let mut data = BytesMut::with_capacity(values.len() * N);
        for &value in values {
            let value = U::try_from(value)
                .map_err(|_| Invalid(format!("{value} is out of range for {datatype}")))?;
            data.put_slice(&bytes(value));
        }
        Ok(data.freeze())
    }
    fn whole<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Bytes {
        values.iter().flat_map(|&value| bytes(value)).collect()
    }
    let c = contents;
    Ok(match datatype {
        "BOOL" => whole(&c.bool_contents, |value| [u8::from(value)]),
        "INT8" => small(datatype, &c.int_contents, i8::to_le_bytes)?,
        "INT16" => small(datatype, &c.int_contents, i16::to_le_bytes)?,
        "INT32" => whole(&c.int_contents, i32::to_le_bytes),
        "INT64" => whole(&c.int64_contents, i64::to_le_bytes),
        "UINT8" => small(datatype, &c.uint_contents, u8::to_le_bytes)?,
        "UINT16" => small(datatype, &c.uint_contents, u16::to_le_bytes)?,
        "UINT32" => whole(&c.uint_contents, u32::to_le_bytes),
        "UINT64" => whole(&c.uint64_contents, u64::to_le_bytes),
        "FP32" => whole(&c.fp32_contents, f32::to_le_bytes),
        "FP64" => whole(&c.fp64_contents, f64::to_le_bytes),
        "BYTES" => {
            let mut data = BytesMut::new();
            for element in &c.bytes_contents {
                put_bytes_element(&mut data, element)?;
            }
            data.freeze()
        }
        other => {
            element_size(other)?;
            return Err(Invalid(format!(
                "{other} has no contents: use raw_input_contents"
            )));
        }
    })
}
