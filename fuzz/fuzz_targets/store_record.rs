//! A record of the store that a disk may have damaged: what is believed is within its bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_broker::store::StoredMessages;

fuzz_target!(|data: &[u8]| {
    let Ok(stored) = StoredMessages::from_bytes(data) else {
        return;
    };
    let payloads: usize = stored
        .messages
        .iter()
        .map(|message| message.payload.len())
        .sum();
    assert!(payloads + stored.topic.len() + stored.publisher.len() <= data.len());
});
