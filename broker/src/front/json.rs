//! Requests and answers of the Open Inference Protocol's REST form: JSON, and Triton's extension that
//! puts the contents of tensors after the JSON as they are in memory.

use std::fmt;
use std::io::Write as _;

use bytes::{BufMut, Bytes, BytesMut};
use selvedge_proto::elements::{BytesElements, element_size, put_bytes_element};
use selvedge_proto::inference::Tensor;
use serde::de::{DeserializeSeed, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::request::{InferRequest, InferResponse, Invalid, Parameter, Wanted};
use super::tensors::{check, refuse_unsupported};

#[cfg(test)]
mod tests;

#[derive(Deserialize)]
struct Request<'a> {
    id: Option<String>,
    parameters: Option<Map<String, Value>>,
    #[serde(borrow)]
    inputs: Vec<Input<'a>>,
    outputs: Option<Vec<Output>>,
}

#[derive(Deserialize)]
struct Input<'a> {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    parameters: Option<Map<String, Value>>,
    /// Read once the datatype is known.
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Output {
    name: String,
    parameters: Option<Map<String, Value>>,
}

/// Reads a request. `json_bytes` is the value of `Inference-Header-Content-Length`: where the JSON
/// ends and contents begin.
///
/// # Errors
/// It is no such request; in words for whoever sent it.
pub fn decode(body: &Bytes, json_bytes: Option<usize>) -> Result<InferRequest, Invalid> {
    let json_bytes = json_bytes.unwrap_or(body.len());
    if json_bytes > body.len() {
        return Err(Invalid(format!(
            "Inference-Header-Content-Length is {json_bytes}: expected at most the {} bytes of the \
             body",
            body.len()
        )));
    }
    let request: Request<'_> = serde_json::from_slice(&body[..json_bytes])
        .map_err(|error| Invalid(format!("the body is no inference request: {error}")))?;
    let mut contents = body.slice(json_bytes..);
    let mut inputs = Vec::with_capacity(request.inputs.len());
    for input in request.inputs {
        let tensor = tensor(&input, &mut contents)
            .and_then(|tensor| check(&tensor).map(|()| tensor))
            .map_err(|Invalid(why)| {
                let named = format!("tensor {:?}: ", input.name);
                Invalid(if why.starts_with(&named) {
                    why
                } else {
                    named + &why
                })
            })?;
        inputs.push(tensor);
    }
    if !contents.is_empty() {
        return Err(Invalid(format!(
            "{} bytes are left after the last binary tensor",
            contents.len()
        )));
    }
    let mut parameters = parameters(request.parameters.unwrap_or_default())?;
    let mut binary = false;
    parameters.retain(|(name, value)| {
        let taken = name == "binary_data_output";
        if taken {
            binary = *value == Parameter::Bool(true);
        }
        !taken
    });
    let mut outputs = Vec::new();
    for output in request.outputs.unwrap_or_default() {
        let parameters = output.parameters.unwrap_or_default();
        refuse_unsupported(parameters.keys().filter(|name| {
            // A classification of zero classes is how clients say that they want none.
            *name != "classification" || parameters[*name] != 0
        }))
        .map_err(|error| Invalid(format!("output {:?}: {error}", output.name)))?;
        outputs.push(Wanted {
            binary: parameters.get("binary_data").and_then(Value::as_bool),
            name: output.name,
        });
    }
    Ok(InferRequest {
        id: request.id.unwrap_or_default(),
        parameters,
        inputs,
        outputs,
        binary,
    })
}

fn tensor(input: &Input<'_>, contents: &mut Bytes) -> Result<Tensor, Invalid> {
    let parameters = input.parameters.as_ref();
    refuse_unsupported(parameters.into_iter().flat_map(Map::keys))?;
    let size = parameters.and_then(|parameters| parameters.get("binary_data_size"));
    let data = match (size, input.data) {
        (Some(_), Some(_)) => {
            return Err(Invalid::new(
                "expected data or binary_data_size, found both",
            ));
        }
        (None, None) => {
            return Err(Invalid::new(
                "expected data or binary_data_size, found neither",
            ));
        }
        (Some(size), None) => {
            let size = size.as_u64().and_then(|size| usize::try_from(size).ok());
            let size =
                size.ok_or_else(|| Invalid::new("binary_data_size: expected a number of bytes"))?;
            if size > contents.len() {
                return Err(Invalid(format!(
                    "binary_data_size is {size}, and {} bytes are left in the body",
                    contents.len()
                )));
            }
            contents.split_to(size)
        }
        (None, Some(data)) => {
            if element_size(&input.datatype)? == Some(2)
                && matches!(input.datatype.as_str(), "FP16" | "BF16")
            {
                return Err(Invalid(format!(
                    "{} has no JSON form: send it as binary data",
                    input.datatype
                )));
            }
            let mut bytes = BytesMut::new();
            let elements = Elements {
                datatype: &input.datatype,
                bytes: &mut bytes,
            };
            elements
                .deserialize(&mut serde_json::Deserializer::from_str(data.get()))
                .map_err(|error| Invalid(format!("data: {error}")))?;
            bytes.freeze()
        }
    };
    Ok(Tensor {
        name: input.name.clone(),
        datatype: input.datatype.clone(),
        shape: input.shape.clone(),
        data,
    })
}

fn parameters(map: Map<String, Value>) -> Result<Vec<(String, Parameter)>, Invalid> {
    map.into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| {
            let value = match value {
                Value::Bool(value) => Parameter::Bool(value),
                Value::String(value) => Parameter::Text(value),
                Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                    (Some(value), _) => Parameter::Int(value),
                    (None, Some(value)) => Parameter::Uint(value),
                    (None, None) => Parameter::Double(number.as_f64().unwrap_or(f64::NAN)),
                },
                _ => {
                    return Err(Invalid(format!(
                        "parameter {name:?}: expected a string, a number, true or false"
                    )));
                }
            };
            Ok((name, value))
        })
        .collect()
}

/// Reads elements, nested or flat, into little-endian bytes: an array of a million numbers never
/// exists as a million JSON values.
struct Elements<'a> {
    datatype: &'a str,
    bytes: &'a mut BytesMut,
}

impl Elements<'_> {
    fn integer<E: serde::de::Error>(&mut self, value: i128) -> Result<(), E> {
        macro_rules! put {
            ($kind:ty) => {
                match <$kind>::try_from(value) {
                    Ok(value) => self.bytes.put_slice(&value.to_le_bytes()),
                    Err(_) => {
                        return Err(E::custom(format_args!(
                            "{value} is out of range for {}",
                            self.datatype
                        )));
                    }
                }
            };
        }
        match self.datatype {
            "BOOL" if value == 0 || value == 1 => self.bytes.put_u8(u8::from(value == 1)),
            "UINT8" => put!(u8),
            "UINT16" => put!(u16),
            "UINT32" => put!(u32),
            "UINT64" => put!(u64),
            "INT8" => put!(i8),
            "INT16" => put!(i16),
            "INT32" => put!(i32),
            "INT64" => put!(i64),
            "FP32" => self.bytes.put_f32_le(value as f32),
            "FP64" => self.bytes.put_f64_le(value as f64),
            other => return Err(E::custom(format_args!("{value} is no element of {other}"))),
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "elements of {}", self.datatype)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(()) = seq.next_element_seed(Elements {
            datatype: self.datatype,
            bytes: self.bytes,
        })? {}
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        if self.datatype != "BOOL" {
            return Err(E::custom(format_args!(
                "{value} is no element of {}",
                self.datatype
            )));
        }
        self.bytes.put_u8(u8::from(value));
        Ok(())
    }

    fn visit_i64<E: serde::de::Error>(mut self, value: i64) -> Result<(), E> {
        self.integer(value.into())
    }

    fn visit_u64<E: serde::de::Error>(mut self, value: u64) -> Result<(), E> {
        self.integer(value.into())
    }

    fn visit_f64<E: serde::de::Error>(mut self, value: f64) -> Result<(), E> {
        match self.datatype {
            "FP32" if value.abs() <= f64::from(f32::MAX) => self.bytes.put_f32_le(value as f32),
            "FP32" => return Err(E::custom(format_args!("{value} is out of range for FP32"))),
            "FP64" => self.bytes.put_f64_le(value),
            // Clients in languages with one kind of number write 1.0 for 1.
            _ if value.fract() == 0.0 && value.abs() < 9e15 => {
                return self.integer(value as i128);
            }
            other => return Err(E::custom(format_args!("{value} is no element of {other}"))),
        }
        Ok(())
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        if self.datatype != "BYTES" {
            return Err(E::custom(format_args!(
                "a string is no element of {}",
                self.datatype
            )));
        }
        put_bytes_element(self.bytes, value.as_bytes()).map_err(E::custom)
    }
}

/// Picks the outputs that are wanted, in the order they are wanted.
///
/// # Errors
/// One that is wanted was not answered.
pub fn select(outputs: Vec<Tensor>, wanted: &[Wanted]) -> Result<Vec<Tensor>, Invalid> {
    if wanted.is_empty() {
        return Ok(outputs);
    }
    wanted
        .iter()
        .map(|wanted| {
            let found = outputs.iter().find(|output| output.name == wanted.name);
            found.cloned().ok_or_else(|| {
                let names: Vec<&str> = outputs.iter().map(|output| &*output.name).collect();
                Invalid(format!(
                    "the model has no output {:?}: it answers {}",
                    wanted.name,
                    names.join(", ")
                ))
            })
        })
        .collect()
}

/// Writes an answer: the body, and where its JSON ends when contents follow. `is_binary` says which
/// outputs are to follow.
///
/// # Errors
/// An output has no JSON form, or is not as its shape and datatype say.
pub fn encode(
    response: InferResponse,
    is_binary: impl Fn(&str) -> bool,
) -> Result<(Bytes, Option<usize>), Invalid> {
    let mut body = BytesMut::new().writer();
    let text = |text: &str| Value::from(text).to_string();
    let parameters: Map<String, Value> = response
        .parameters
        .into_iter()
        .map(|(name, value)| (name, json(value)))
        .collect();
    // Writing to memory does not fail.
    let _ = write!(
        body,
        r#"{{"model_name":{},"model_version":{},"id":{},"parameters":{},"outputs":["#,
        text(&response.model),
        text(&response.version),
        text(&response.id),
        Value::from(parameters),
    );
    let mut contents = Vec::new();
    for (index, output) in response.outputs.into_iter().enumerate() {
        check(&output)?;
        if index > 0 {
            let _ = body.write_all(b",");
        }
        let _ = write!(
            body,
            r#"{{"name":{},"datatype":{},"shape":{:?},"#,
            text(&output.name),
            text(&output.datatype),
            output.shape,
        );
        if is_binary(&output.name) {
            let size = output.data.len();
            let _ = write!(body, r#""parameters":{{"binary_data_size":{size}}}}}"#);
            contents.push(output.data);
        } else {
            let _ = body.write_all(br#""data":["#);
            write_elements(&mut body, &output)?;
            let _ = body.write_all(b"]}");
        }
    }
    let _ = body.write_all(b"]}");
    let mut body = body.into_inner();
    if contents.is_empty() {
        return Ok((body.freeze(), None));
    }
    let json_bytes = body.len();
    for data in contents {
        body.extend_from_slice(&data);
    }
    Ok((body.freeze(), Some(json_bytes)))
}

fn write_elements(body: &mut impl std::io::Write, tensor: &Tensor) -> Result<(), Invalid> {
    let invalid = |why: &str| Invalid(format!("output {:?}: {why}", tensor.name));
    let mut first = true;
    let mut write = |value: fmt::Arguments<'_>| {
        let comma = if std::mem::take(&mut first) { "" } else { "," };
        let _ = write!(body, "{comma}{value}");
    };
    macro_rules! whole {
        ($kind:ty) => {
            for element in tensor.data.as_chunks().0 {
                write(format_args!("{}", <$kind>::from_le_bytes(*element)));
            }
        };
    }
    macro_rules! float {
        ($kind:ty) => {
            for element in tensor.data.as_chunks().0 {
                let value = <$kind>::from_le_bytes(*element);
                // JSON knows no infinity and no NaN; null is what most writers of JSON put there.
                if value.is_finite() {
                    write(format_args!("{value:?}"));
                } else {
                    write(format_args!("null"));
                }
            }
        };
    }
    match tensor.datatype.as_str() {
        "BOOL" => {
            for &byte in &tensor.data {
                write(format_args!("{}", byte != 0));
            }
        }
        "UINT8" => whole!(u8),
        "UINT16" => whole!(u16),
        "UINT32" => whole!(u32),
        "UINT64" => whole!(u64),
        "INT8" => whole!(i8),
        "INT16" => whole!(i16),
        "INT32" => whole!(i32),
        "INT64" => whole!(i64),
        "FP32" => float!(f32),
        "FP64" => float!(f64),
        "BYTES" => {
            for element in BytesElements(&tensor.data) {
                let text = std::str::from_utf8(element?)
                    .map_err(|_| invalid("not UTF-8: ask for it as binary data"))?;
                write(format_args!("{}", Value::from(text)));
            }
        }
        other => {
            return Err(invalid(&format!(
                "{other} has no JSON form: ask for it as binary data"
            )));
        }
    }
    Ok(())
}

fn json(value: Parameter) -> Value {
    match value {
        Parameter::Bool(value) => value.into(),
        Parameter::Int(value) => value.into(),
        Parameter::Uint(value) => value.into(),
        Parameter::Double(value) => value.into(),
        Parameter::Text(value) => value.into(),
    }
}
