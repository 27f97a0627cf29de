#![allow(clippy::unwrap_used)]

use super::*;

fn request(payload: Bytes, parameters: &[(&str, &str)]) -> Request {
    Request {
        id: "r-1".to_owned(),
        payload,
        parameters: parameters
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        deadline: Instant::now(),
        traceparent: String::new(),
    }
}

#[tokio::test]
async fn a_request_keeps_its_tensors_and_parameters() {
    let tensor = Tensor::fp32("x", vec![1, 2], &[1.0, 2.0]);
    let asked = request(
        encode_tensors(vec![tensor.clone()]),
        &[("priority", "2"), ("mode", "fast")],
    );
    let proto = to_proto("m", "3", asked).unwrap();
    assert_eq!(
        (proto.model_name.as_str(), proto.model_version.as_str()),
        ("m", "3")
    );
    assert_eq!(proto.raw_input_contents[0], tensor.data);
    let choice = |name: &str| proto.parameters[name].parameter_choice.clone().unwrap();
    assert_eq!(choice("priority"), ParameterChoice::Uint64Param(2));
    assert_eq!(
        choice("mode"),
        ParameterChoice::StringParam("fast".to_owned())
    );
    let error = to_proto("m", "", request(Bytes::from_static(&[0xff]), &[])).unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument);
}

#[test]
fn an_answer_may_be_raw_or_typed() {
    let output = |contents| oip::model_infer_response::InferOutputTensor {
        name: "y".to_owned(),
        datatype: "INT16".to_owned(),
        shape: vec![1],
        contents,
        ..Default::default()
    };
    let typed = oip::InferTensorContents {
        int_contents: vec![-2],
        ..Default::default()
    };
    let answers = [
        oip::ModelInferResponse {
            outputs: vec![output(Some(typed))],
            ..Default::default()
        },
        oip::ModelInferResponse {
            outputs: vec![output(None)],
            raw_output_contents: vec![Bytes::from_static(&[0xfe, 0xff])],
            ..Default::default()
        },
    ];
    for answer in answers {
        let tensors = decode_tensors(from_proto(answer).unwrap()).unwrap();
        assert_eq!(tensors[0].data, [0xfe, 0xff][..]);
    }
    let missing = oip::ModelInferResponse {
        outputs: vec![output(None)],
        raw_output_contents: vec![Bytes::new(), Bytes::new()],
        ..Default::default()
    };
    assert!(
        from_proto(missing)
            .unwrap_err()
            .message
            .contains("expected contents of 1 outputs")
    );
}
