//! The payload of a tensor request: what is decoded survives a round trip.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use selvedge_proto::inference::{decode_tensors, encode_tensors};

fuzz_target!(|data: &[u8]| {
    let Ok(tensors) = decode_tensors(Bytes::copy_from_slice(data)) else {
        return;
    };
    for tensor in &tensors {
        if let Some(values) = tensor.as_fp32() {
            assert_eq!(values.len() * 4, tensor.data.len());
        }
    }
    let again = decode_tensors(encode_tensors(tensors.clone()));
    assert_eq!(again, Ok(tensors));
});
