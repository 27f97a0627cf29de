//! A QUIC datagram: what is read is what writing it again gives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_proto::datagram::DatagramRef;
use selvedge_proto::message::Properties;

fuzz_target!(|data: &[u8]| {
    let Ok(Some(datagram)) = DatagramRef::parse(data) else {
        return;
    };
    assert!(data.ends_with(datagram.payload));
    let _ = datagram.header.map(Properties::decode);
    let again = datagram.encode();
    assert_eq!(again.len(), datagram.encoded_len());
    assert_eq!(DatagramRef::parse(&again), Ok(Some(datagram)));
});
