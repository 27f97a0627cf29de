//! The packets of an MQTT client: the same ones however they are chunked.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_broker::mqtt::read_packets;

/// Small, so that inputs reach it.
const MAX_PACKET: usize = 1024;

fuzz_target!(|data: &[u8]| {
    let Some((&piece, stream)) = data.split_first() else {
        return;
    };
    let whole = read_packets(stream, usize::MAX, MAX_PACKET);
    let pieces = read_packets(stream, usize::from(piece), MAX_PACKET);
    assert_eq!(whole, pieces);
});
