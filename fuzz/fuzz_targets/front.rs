//! A request over HTTP at the front door: its path, its JSON and its binary tensors.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use selvedge_broker::front::request::InferResponse;
use selvedge_broker::front::{json, read_request, tensors};
use selvedge_proto::open_inference::ModelInferRequest;

fuzz_target!(|data: &[u8]| {
    // The first byte says where the JSON ends, from the end; 255 for no binary part.
    let Some((&tail, body)) = data.split_first() else {
        return;
    };
    let end = (tail != u8::MAX).then(|| body.len().saturating_sub(usize::from(tail)));
    let body = Bytes::copy_from_slice(body);
    read_request(&String::from_utf8_lossy(&body), &body, end);
    if let Ok(request) = json::decode(&body, end) {
        // What was read is well formed, so it can be answered, in binary at least.
        let response = InferResponse {
            outputs: request.inputs,
            parameters: request.parameters,
            ..InferResponse::default()
        };
        assert!(json::encode(response.clone(), |_| true).is_ok());
        let _ = json::encode(response.clone(), |_| false);
        let proto = tensors::to_proto(response);
        assert_eq!(proto.outputs.len(), proto.raw_output_contents.len());
    }
    if let Ok(request) = ModelInferRequest::decode(body) {
        if let Ok(request) = tensors::from_proto(request) {
            for tensor in &request.inputs {
                assert_eq!(tensors::check(tensor), Ok(()));
            }
        }
    }
});
