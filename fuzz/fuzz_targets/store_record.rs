//! A record of the store that a disk may have damaged: what is believed is within its bytes. The
//! prefix is made right, or nothing would get past the checksum.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_broker::store::StoredMessages;

fuzz_target!(|data: &[u8]| {
    let mut record = vec![1];
    record.extend_from_slice(&crc32fast::hash(data).to_be_bytes());
    record.extend_from_slice(data);
    let Ok(stored) = StoredMessages::from_bytes(&record) else {
        return;
    };
    let payloads: usize = stored
        .messages
        .iter()
        .map(|message| message.payload.len())
        .sum();
    assert!(payloads + stored.topic.len() + stored.publisher.len() <= data.len());
});
