//! Tensors as text and JSON: what a person types, and what is printed.

use selvedge_client::Tensor;
use selvedge_worker::model::Datatype;
use serde_json::{Value, json};

/// Values of one tensor that are printed for a person.
const SHOWN: usize = 32;

/// Reads `NAME:DATATYPE:[D1,D2]:v,v,…`, such as `input:FP32:[1,4]:0,0.5,1,1`.
pub(crate) fn parse(text: &str) -> Result<Tensor, String> {
    let mut parts = text.splitn(4, ':');
    let (Some(name), Some(datatype), Some(shape), Some(values)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(format!(
            "expected NAME:DATATYPE:[D1,D2]:v,v,… such as input:FP32:[1,4]:0,0.5,1,1, found {text:?}"
        ));
    };
    let shape = shape
        .strip_prefix('[')
        .and_then(|shape| shape.strip_suffix(']'))
        .ok_or_else(|| format!("expected a shape such as [1,64], found {shape:?}"))?;
    let shape: Vec<i64> = list(shape)
        .map(|dimension| {
            dimension
                .parse()
                .map_err(|_| format!("expected a dimension, found {dimension:?}"))
        })
        .collect::<Result<_, _>>()?;
    let datatype = datatype_named(datatype)?;
    let mut data = Vec::new();
    let mut count = 0;
    for value in list(values) {
        push_text(&mut data, datatype, value)?;
        count += 1;
    }
    tensor(name, datatype, shape, data, count)
}

/// Reads the inputs of an inference request of the Open Inference Protocol v2 in JSON.
pub(crate) fn inputs(request: &Value) -> Result<Vec<Tensor>, String> {
    let inputs = (request.get("inputs").and_then(Value::as_array))
        .ok_or("expected an object with the array \"inputs\"")?;
    inputs
        .iter()
        .enumerate()
        .map(|(index, input)| {
            input_of_json(input).map_err(|problem| format!("inputs[{index}]: {problem}"))
        })
        .collect()
}

fn input_of_json(input: &Value) -> Result<Tensor, String> {
    let text = |key: &str| {
        (input.get(key).and_then(Value::as_str)).ok_or_else(|| format!("expected the text {key:?}"))
    };
    let name = text("name")?;
    let datatype = datatype_named(text("datatype")?)?;
    let shape = (input.get("shape").and_then(Value::as_array))
        .ok_or("expected the array \"shape\"")?
        .iter()
        .map(|dimension| {
            (dimension.as_i64()).ok_or_else(|| format!("expected a dimension, found {dimension}"))
        })
        .collect::<Result<Vec<i64>, _>>()?;
    let values = input.get("data").ok_or("expected the array \"data\"")?;
    let mut data = Vec::new();
    let mut count = 0;
    push_json(&mut data, &mut count, datatype, values)?;
    tensor(name, datatype, shape, data, count)
}

/// Appends a value, or the values of an array however deep, in row-major order.
fn push_json(
    data: &mut Vec<u8>,
    count: &mut usize,
    datatype: Datatype,
    value: &Value,
) -> Result<(), String> {
    match value {
        Value::Array(values) => {
            for value in values {
                push_json(data, count, datatype, value)?;
            }
            Ok(())
        }
        Value::Number(_) | Value::Bool(_) => {
            *count += 1;
            push_text(data, datatype, &value.to_string())
        }
        other => Err(format!("expected numbers in \"data\", found {other}")),
    }
}

fn tensor(
    name: &str,
    datatype: Datatype,
    shape: Vec<i64>,
    data: Vec<u8>,
    count: usize,
) -> Result<Tensor, String> {
    let expected = shape.iter().try_fold(1_usize, |product, &dimension| {
        usize::try_from(dimension)
            .ok()
            .and_then(|dimension| product.checked_mul(dimension))
    });
    if expected != Some(count) {
        let expected = match expected {
            Some(expected) => expected.to_string(),
            None => "a possible number of".to_owned(),
        };
        return Err(format!(
            "expected {expected} values for the shape {shape:?} of {name:?}, found {count}"
        ));
    }
    Ok(Tensor {
        name: name.to_owned(),
        datatype: datatype.as_str().to_owned(),
        shape,
        data: data.into(),
    })
}

fn datatype_named(name: &str) -> Result<Datatype, String> {
    let datatype = name.parse().ok();
    datatype
        .filter(|datatype| *datatype != Datatype::Fp16)
        .ok_or_else(|| {
            let known = Datatype::ALL
                .iter()
                .filter(|datatype| **datatype != Datatype::Fp16);
            let known: Vec<&str> = known.map(|datatype| datatype.as_str()).collect();
            format!("expected one of {}, found {name:?}", known.join(", "))
        })
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    let text = text.trim();
    (!text.is_empty())
        .then(|| text.split(',').map(str::trim))
        .into_iter()
        .flatten()
}

fn push_text(data: &mut Vec<u8>, datatype: Datatype, value: &str) -> Result<(), String> {
    macro_rules! push {
        ($type:ty) => {
            data.extend_from_slice(&parsed::<$type>(datatype, value)?.to_le_bytes())
        };
    }
    match datatype {
        Datatype::Bool => match value {
            "true" | "1" => data.push(1),
            "false" | "0" => data.push(0),
            _ => return Err(format!("expected true or false, found {value:?}")),
        },
        Datatype::Uint8 => push!(u8),
        Datatype::Uint16 => push!(u16),
        Datatype::Uint32 => push!(u32),
        Datatype::Uint64 => push!(u64),
        Datatype::Int8 => push!(i8),
        Datatype::Int16 => push!(i16),
        Datatype::Int32 => push!(i32),
        Datatype::Int64 => push!(i64),
        Datatype::Fp32 => push!(f32),
        Datatype::Fp64 => push!(f64),
        Datatype::Fp16 => return Err("half precision cannot be written as text".to_owned()),
    }
    Ok(())
}

fn parsed<T: std::str::FromStr>(datatype: Datatype, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("expected a value of type {datatype}, found {value:?}"))
}

/// A tensor's values as JSON numbers; `None` for a datatype without text form, or bytes that do
/// not fit it.
fn values(tensor: &Tensor) -> Option<Vec<Value>> {
    let datatype: Datatype = tensor.datatype.parse().ok()?;
    if !tensor.data.len().is_multiple_of(datatype.size()) {
        return None;
    }
    macro_rules! read {
        ($type:ty) => {
            (tensor.data)
                .chunks_exact(size_of::<$type>())
                .map(|value| {
                    let value = value.try_into().expect("chunks have that size");
                    Value::from(<$type>::from_le_bytes(value))
                })
                .collect()
        };
    }
    Some(match datatype {
        Datatype::Bool => tensor
            .data
            .iter()
            .map(|value| (*value != 0).into())
            .collect(),
        Datatype::Uint8 => read!(u8),
        Datatype::Uint16 => read!(u16),
        Datatype::Uint32 => read!(u32),
        Datatype::Uint64 => read!(u64),
        Datatype::Int8 => read!(i8),
        Datatype::Int16 => read!(i16),
        Datatype::Int32 => read!(i32),
        Datatype::Int64 => read!(i64),
        // By way of their shortest text, so that 0.1 does not come out as 0.10000000149011612.
        Datatype::Fp32 => (tensor.data.as_chunks::<4>().0.iter())
            .map(|value| {
                let text = f32::from_le_bytes(*value).to_string();
                text.parse::<f64>().map_or(Value::Null, Value::from)
            })
            .collect(),
        Datatype::Fp64 => read!(f64),
        Datatype::Fp16 => return None,
    })
}

/// A tensor as the Open Inference Protocol v2 has it in JSON.
pub(crate) fn json(tensor: &Tensor) -> Value {
    let mut object = json!({
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": tensor.shape,
    });
    match values(tensor) {
        Some(values) => object["data"] = values.into(),
        None => object["data_hex"] = crate::output::hex(&tensor.data).into(),
    }
    if let Some((index, _)) = argmax(tensor) {
        object["argmax"] = index.into();
    }
    object
}

/// A tensor for a person: a line that names it, one with its values, one with the greatest.
pub(crate) fn text(tensor: &Tensor) -> String {
    let mut text = format!(
        "{} {} {:?}",
        crate::output::escaped(&tensor.name),
        crate::output::escaped(&tensor.datatype),
        tensor.shape
    );
    let Some(values) = values(tensor) else {
        text.push_str(&format!("\n  {} bytes", tensor.data.len()));
        return text;
    };
    let shown: Vec<String> = values.iter().take(SHOWN).map(short).collect();
    text.push_str(&format!("\n  {}", shown.join(" ")));
    if values.len() > SHOWN {
        text.push_str(&format!(" … {} more", values.len() - SHOWN));
    }
    if let Some((index, greatest)) = argmax(tensor) {
        text.push_str(&format!("\n  greatest: {index} ({})", short(&greatest)));
    }
    text
}

fn short(value: &Value) -> String {
    match value.as_f64() {
        Some(number) if value.is_f64() => format!("{number:.4}"),
        _ => value.to_string(),
    }
}

/// Which value of a `[1,N]` tensor is the greatest, and that value.
fn argmax(tensor: &Tensor) -> Option<(usize, Value)> {
    if !matches!(tensor.shape.as_slice(), [1, width] if *width > 1) {
        return None;
    }
    let mut greatest: Option<(usize, f64, Value)> = None;
    for (index, value) in values(tensor)?.into_iter().enumerate() {
        let number = value.as_f64()?;
        if greatest
            .as_ref()
            .is_none_or(|(_, least, _)| number > *least)
        {
            greatest = Some((index, number, value));
        }
    }
    greatest.map(|(index, _, value)| (index, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_make_the_same_tensor() {
        let expected = Tensor::fp32("input", vec![2, 2], &[0.0, 0.5, -1.0, 1e3]);
        assert_eq!(parse("input:FP32:[2,2]:0,0.5,-1,1e3"), Ok(expected.clone()));
        let request = json!({ "inputs": [{
            "name": "input", "datatype": "FP32", "shape": [2, 2], "data": [[0, 0.5], [-1, 1000.0]],
        }]});
        assert_eq!(inputs(&request), Ok(vec![expected]));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let table = [
            ("x", "expected NAME:DATATYPE:[D1,D2]:v,v,…"),
            ("x:FP32:1,2:1", "expected a shape such as [1,64]"),
            ("x:FP32:[a]:1", "expected a dimension, found \"a\""),
            ("x:BYTES:[1]:1", "expected one of BOOL, UINT8"),
            ("x:FP16:[1]:1", "expected one of BOOL, UINT8"),
            (
                "x:UINT8:[1]:256",
                "expected a value of type UINT8, found \"256\"",
            ),
            (
                "x:FP32:[1,3]:1,2",
                "expected 3 values for the shape [1, 3] of \"x\", found 2",
            ),
            ("x:FP32:[-1]:1", "expected a possible number of values"),
            ("x:BOOL:[1]:yes", "expected true or false"),
        ];
        for (text, expected) in table {
            let error = parse(text).expect_err(text);
            assert!(error.starts_with(expected), "{text}: {error}");
        }
        let request =
            json!({ "inputs": [{ "name": "x", "datatype": "FP32", "shape": [1], "data": "1" }] });
        assert_eq!(
            inputs(&request).unwrap_err(),
            "inputs[0]: expected numbers in \"data\", found \"1\""
        );
    }

    #[test]
    fn outputs_name_the_greatest_of_a_row() {
        let tensor = Tensor::fp32("p", vec![1, 3], &[0.1, 0.7, 0.2]);
        assert_eq!(
            text(&tensor),
            "p FP32 [1, 3]\n  0.1000 0.7000 0.2000\n  greatest: 1 (0.7000)"
        );
        assert_eq!(
            json(&tensor),
            json!({ "name": "p", "datatype": "FP32", "shape": [1, 3], "data": [0.1, 0.7, 0.2], "argmax": 1 })
        );
        let rows = Tensor::fp32("p", vec![2, 2], &[0.1, 0.7, 0.2, 0.3]);
        assert_eq!(json(&rows).get("argmax"), None);
        let odd = Tensor {
            data: vec![1, 2, 3].into(),
            ..tensor
        };
        assert_eq!(json(&odd)["data_hex"], "010203");
        assert_eq!(text(&odd), "p FP32 [1, 3]\n  3 bytes");
    }
}
