#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use proptest::prelude::*;

use super::*;

fn tensor(datatype: &str, shape: &[i64], data: &[u8]) -> Tensor {
    Tensor {
        name: "x".to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        data: Bytes::copy_from_slice(data),
    }
}

fn input(datatype: &str, shape: &[i64]) -> oip::model_infer_request::InferInputTensor {
    oip::model_infer_request::InferInputTensor {
        name: "x".to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        ..Default::default()
    }
}

fn request(
    input: oip::model_infer_request::InferInputTensor,
    raw: &[&'static [u8]],
) -> Result<InferRequest, Invalid> {
    from_proto(oip::ModelInferRequest {
        inputs: vec![input],
        raw_input_contents: raw.iter().map(|raw| Bytes::from_static(raw)).collect(),
        ..Default::default()
    })
}

#[test]
fn contents_must_fit_shape_and_datatype() {
    assert_eq!(check(&tensor("FP32", &[1, 2], &[0; 8])), Ok(()));
    assert_eq!(check(&tensor("FP32", &[], &[0; 4])), Ok(()));
    assert_eq!(check(&tensor("FP32", &[0, 7], &[])), Ok(()));
    assert_eq!(
        check(&tensor("BYTES", &[2], b"\x01\0\0\0a\0\0\0\0")),
        Ok(())
    );
    for (wrong, expected) in [
        (
            tensor("FP32", &[2], &[0; 7]),
            "expected 2 elements of 4 bytes",
        ),
        (
            tensor("FP32", &[-1], &[]),
            "dimension -1: expected 0 or more",
        ),
        (
            tensor("fp32", &[1], &[0; 4]),
            "datatype \"fp32\" is not known",
        ),
        (tensor("INT8", &[i64::MAX, 3], &[]), "too many elements"),
        (
            tensor("INT64", &[i64::MAX], &[]),
            "expected 9223372036854775807 elements of 8",
        ),
        (
            tensor("BYTES", &[1], b"\x02\0\0\0a"),
            "an element of BYTES is cut off",
        ),
        (tensor("BYTES", &[2], b"\x01\0\0\0a"), "expected 2 elements"),
    ] {
        let error = check(&wrong).unwrap_err().0;
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn typed_contents_become_little_endian_bytes() {
    let mut ints = input("INT16", &[2]);
    ints.contents = Some(oip::InferTensorContents {
        int_contents: vec![1, -2],
        ..Default::default()
    });
    assert_eq!(
        request(ints.clone(), &[]).unwrap().inputs[0].data,
        [1, 0, 0xfe, 0xff][..]
    );
    ints.datatype = "UINT8".to_owned();
    assert!(
        request(ints.clone(), &[])
            .unwrap_err()
            .0
            .contains("found 0 bytes")
    );
    ints.datatype = "INT8".to_owned();
    ints.contents = Some(oip::InferTensorContents {
        int_contents: vec![1, 128],
        ..Default::default()
    });
    assert_eq!(
        request(ints.clone(), &[]).unwrap_err().0,
        "tensor \"x\": 128 is out of range for INT8"
    );
    assert!(
        request(ints, &[&[1, 2]])
            .unwrap_err()
            .0
            .contains("found both")
    );
    let mut half = input("FP16", &[1]);
    half.contents = Some(oip::InferTensorContents::default());
    assert!(request(half, &[]).unwrap_err().0.contains("send it raw"));
}

#[test]
fn what_only_a_server_on_the_same_machine_has_is_refused() {
    let mut shared = input("FP32", &[1]);
    shared.parameters.insert(
        "shared_memory_region".to_owned(),
        to_proto_parameter(Parameter::Text("r".to_owned())),
    );
    assert_eq!(
        request(shared, &[&[0; 4]]).unwrap_err().0,
        "tensor \"x\": shared_memory_region is not supported"
    );
    let missing = request(input("FP32", &[1]), &[&[0; 4], &[0; 4]])
        .unwrap_err()
        .0;
    assert_eq!(
        missing,
        "expected as many raw_input_contents as inputs, found 2 for 1"
    );
}

proptest! {
    #[test]
    fn floats_and_bytes_survive(values in prop::collection::vec(any::<u32>(), 0..40)) {
        let floats: Vec<f32> = values.iter().map(|&bits| f32::from_bits(bits)).collect();
        let mut typed = input("FP32", &[floats.len() as i64]);
        typed.contents = Some(oip::InferTensorContents {
            fp32_contents: floats.clone(),
            ..Default::default()
        });
        let read = request(typed, &[]).unwrap();
        let expected: Vec<u8> = values.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        prop_assert_eq!(&read.inputs[0].data[..], &expected[..]);

        let elements: Vec<Bytes> = values.iter()
            .map(|value| Bytes::copy_from_slice(&value.to_le_bytes()[..(value % 5) as usize]))
            .collect();
        let mut strings = input("BYTES", &[elements.len() as i64]);
        strings.contents = Some(oip::InferTensorContents {
            bytes_contents: elements.clone(),
            ..Default::default()
        });
        let read = request(strings, &[]).unwrap();
        let back: Vec<&[u8]> = BytesElements(&read.inputs[0].data).map(Result::unwrap).collect();
        prop_assert_eq!(back, elements.iter().map(|element| &element[..]).collect::<Vec<_>>());
    }

    #[test]
    fn no_tensor_panics(
        datatype in "BOOL|INT8|FP16|FP32|BYTES|x",
        shape in prop::collection::vec(any::<i64>(), 0..5),
        data in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let _ = check(&tensor(&datatype, &shape, &data));
    }

    #[test]
    fn an_answer_carries_its_tensors_raw(
        data in prop::collection::vec(any::<u8>(), 0..64),
        flag in any::<bool>(),
    ) {
        let response = InferResponse {
            model: "m".to_owned(),
            version: "1".to_owned(),
            id: "i".to_owned(),
            parameters: vec![("escalated".to_owned(), Parameter::Bool(flag))],
            outputs: vec![tensor("UINT8", &[data.len() as i64], &data)],
        };
        let proto = to_proto(response);
        prop_assert_eq!(&proto.raw_output_contents[0][..], &data[..]);
        prop_assert_eq!(
            from_proto_parameters(proto.parameters),
            vec![("escalated".to_owned(), Parameter::Bool(flag))]
        );
    }
}
