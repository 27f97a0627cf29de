//! The header of a message: what is decoded survives a round trip.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_proto::message::Properties;

fuzz_target!(|data: &[u8]| {
    let Ok(properties) = Properties::decode(data) else {
        return;
    };
    match properties.encode() {
        Some(encoded) => assert_eq!(Properties::decode(&encoded), Ok(properties)),
        None => assert!(properties.is_empty()),
    }
});
