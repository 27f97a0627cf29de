#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn read(value: &Value) -> Result<InferRequest, Invalid> {
    decode(&value.to_string().into(), None)
}

fn input(datatype: &str, shape: &[i64], data: &Value) -> Value {
    json!({"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]})
}

fn refused(value: &Value) -> String {
    read(value).unwrap_err().0
}

#[test]
fn data_may_be_flat_or_nested() {
    for data in [json!([1, 2.5, -3, 4]), json!([[1, 2.5], [-3, 4]])] {
        let request = read(&input("FP32", &[2, 2], &data)).unwrap();
        assert_eq!(request.inputs[0].as_fp32().unwrap(), [1.0, 2.5, -3.0, 4.0]);
    }
    let bools = read(&input("BOOL", &[3], &json!([true, 0, 1]))).unwrap();
    assert_eq!(bools.inputs[0].data, [1, 0, 1][..]);
    let text = read(&input("BYTES", &[1], &json!(["é"]))).unwrap();
    assert_eq!(text.inputs[0].data, b"\x02\0\0\0\xc3\xa9"[..]);
    let whole = read(&input("INT16", &[1], &json!([-2.0]))).unwrap();
    assert_eq!(whole.inputs[0].data, [0xfe, 0xff][..]);
}

#[test]
fn what_is_wrong_is_named() {
    for (value, expected) in [
        (
            input("INT8", &[1], &json!([128])),
            "tensor \"x\": data: 128 is out of range for INT8",
        ),
        (
            input("FP32", &[1], &json!(["1"])),
            "a string is no element of FP32",
        ),
        (input("FP32", &[1], &json!([1e39])), "out of range for FP32"),
        (
            input("INT32", &[1], &json!([1.5])),
            "1.5 is no element of INT32",
        ),
        (input("BOOL", &[1], &json!([2])), "2 is no element of BOOL"),
        (input("FP32", &[1], &json!([null])), "elements of FP32"),
        (input("FP32", &[1], &json!([{}])), "elements of FP32"),
        (
            input("FP32", &[2], &json!([1])),
            "tensor \"x\": expected 2 elements of 4 bytes",
        ),
        (input("FP16", &[1], &json!([1])), "FP16 has no JSON form"),
        (
            input("float", &[1], &json!([1])),
            "datatype \"float\" is not known",
        ),
        (
            json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}),
            "found neither",
        ),
        (json!({"inputs": 1}), "the body is no inference request"),
        (
            json!({"inputs": [], "parameters": {"a": []}}),
            "parameter \"a\": expected a string",
        ),
        (
            json!({"inputs": [], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}),
            "output \"y\": classification is not supported",
        ),
    ] {
        let found = refused(&value);
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn binary_contents_follow_the_json() {
    let head = json!({
        "id": "r-1",
        "parameters": {"binary_data_output": true, "timeout": 7},
        "inputs": [
            {"name": "a", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
            {"name": "b", "datatype": "UINT8", "shape": [1], "data": [9]},
            {"name": "c", "datatype": "FP16", "shape": [1], "parameters": {"binary_data_size": 2}},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": false, "classification": 0}}],
    })
    .to_string();
    let body = |contents: &[u8]| Bytes::from([head.as_bytes(), contents].concat());
    let request = decode(&body(&[1, 2, 3, 4]), Some(head.len())).unwrap();
    let data: Vec<&[u8]> = request.inputs.iter().map(|input| &input.data[..]).collect();
    assert_eq!(data, [&[1, 2][..], &[9], &[3, 4]]);
    assert!(request.binary);
    assert_eq!(
        request.parameters,
        [("timeout".to_owned(), Parameter::Int(7))]
    );
    assert_eq!(request.outputs[0].binary, Some(false));
    for (contents, expected) in [
        (
            &[1, 2, 3][..],
            "tensor \"c\": binary_data_size is 2, and 1 bytes are left",
        ),
        (
            &[1, 2, 3, 4, 5],
            "1 bytes are left after the last binary tensor",
        ),
    ] {
        let error = decode(&body(contents), Some(head.len())).unwrap_err().0;
        assert!(error.contains(expected), "{error}");
    }
    let error = decode(&body(&[]), Some(head.len() + 1)).unwrap_err().0;
    assert!(error.contains("Inference-Header-Content-Length"), "{error}");
}

#[test]
fn outputs_are_picked_by_name() {
    let output = |name: &str| Tensor::fp32(name, vec![1], &[1.0]);
    let wanted = |name: &str| Wanted {
        name: name.to_owned(),
        binary: None,
    };
    let all = || vec![output("a"), output("b")];
    assert_eq!(select(all(), &[]).unwrap(), all());
    assert_eq!(select(all(), &[wanted("b")]).unwrap(), [output("b")]);
    assert_eq!(
        select(all(), &[wanted("c")]).unwrap_err().0,
        "the model has no output \"c\": it answers a, b"
    );
}

#[test]
fn what_json_cannot_say_is_null() {
    let response = InferResponse {
        outputs: vec![Tensor::fp32("y", vec![3], &[f32::NAN, f32::INFINITY, 1.5])],
        ..InferResponse::default()
    };
    let (body, json_bytes) = encode(response, |_| false).unwrap();
    assert_eq!(json_bytes, None);
    let value: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(value["outputs"][0]["data"], json!([null, null, 1.5]));
}

/// A tensor of any datatype that has a JSON form.
fn tensor() -> impl Strategy<Value = Tensor> {
    let number = |name: &'static str, size: usize| {
        prop::collection::vec(prop::collection::vec(any::<u8>(), size), 0..20).prop_map(
            move |elements| Tensor {
                name: "x".to_owned(),
                datatype: name.to_owned(),
                shape: vec![elements.len() as i64],
                data: elements.concat().into(),
            },
        )
    };
    let text = prop::collection::vec(".{0,6}", 0..10).prop_map(|elements| {
        let mut data = BytesMut::new();
        for element in &elements {
            put_bytes_element(&mut data, element.as_bytes()).unwrap();
        }
        Tensor {
            name: "x".to_owned(),
            datatype: "BYTES".to_owned(),
            shape: vec![elements.len() as i64],
            data: data.freeze(),
        }
    });
    let floats = prop::collection::vec(any::<f32>(), 0..20).prop_map(|values| {
        let finite: Vec<f32> = values
            .into_iter()
            .filter(|value| value.is_finite())
            .collect();
        Tensor::fp32("x", vec![finite.len() as i64], &finite)
    });
    prop_oneof![
        number("UINT8", 1),
        number("INT16", 2),
        number("UINT32", 4),
        number("INT64", 8),
        number("UINT64", 8),
        text,
        floats,
    ]
}

proptest! {
    #[test]
    fn tensors_survive_json_and_binary(tensors in prop::collection::vec(tensor(), 1..4), binary in any::<bool>()) {
        let tensors: Vec<Tensor> = tensors.into_iter().enumerate().map(|(index, mut tensor)| {
            tensor.name = format!("t{index}");
            tensor
        }).collect();
        let response = InferResponse { outputs: tensors.clone(), ..InferResponse::default() };
        let (body, json_bytes) = encode(response, |name| binary && name != "t1").unwrap();
        // An answer reads as a request does, but for the name of the list.
        let end = json_bytes.unwrap_or(body.len());
        let mut value: Value = serde_json::from_slice(&body[..end]).unwrap();
        value["inputs"] = value["outputs"].take();
        value.as_object_mut().unwrap().remove("outputs");
        let json = value.to_string();
        let again = [json.as_bytes(), &body[end..]].concat();
        let read = decode(&again.into(), Some(json.len())).unwrap();
        prop_assert_eq!(read.inputs, tensors);
    }

    #[test]
    fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..200), cut in prop::option::of(0usize..300)) {
        let _ = decode(&body.into(), cut);
    }
}
