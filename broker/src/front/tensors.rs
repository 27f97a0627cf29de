//! Tensors of the Open Inference Protocol: their elements, and the gRPC messages that carry them.

use std::collections::BTreeMap;

use selvedge_proto::elements::{BytesElements, ElementError, element_size, from_contents};
use selvedge_proto::inference::Tensor;
use selvedge_proto::open_inference as oip;
use selvedge_proto::open_inference::infer_parameter::ParameterChoice;

use super::request::{InferRequest, InferResponse, Invalid, Parameter, Wanted};

#[cfg(test)]
mod tests;

impl From<ElementError> for Invalid {
    fn from(error: ElementError) -> Self {
        Self(error.to_string())
    }
}

/// Checks that a tensor's contents are as long as its shape and datatype say.
///
/// # Errors
/// They are not, or the datatype or a dimension is none.
pub fn check(tensor: &Tensor) -> Result<(), Invalid> {
    let invalid = |why: String| Invalid(format!("tensor {:?}: {why}", tensor.name));
    let size = element_size(&tensor.datatype).map_err(|error| invalid(error.to_string()))?;
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
                element.map_err(|error| invalid(error.to_string()))?;
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
        refuse_unsupported(input.parameters.keys()).map_err(|error| invalid(&error.to_string()))?;
        let data = match (contents.next(), input.contents) {
            (Some(_), Some(_)) => {
                return Err(invalid(
                    "expected contents or raw_input_contents, found both",
                ));
            }
            (Some(raw), None) => raw,
            (None, contents) => from_contents(&input.datatype, contents.unwrap_or_default())
                .map_err(|error| invalid(&error.to_string()))?,
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
