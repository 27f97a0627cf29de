//! The header of a load balancer: it is taken whole, and nothing behind it.
#![no_main]

use futures_util::FutureExt as _;
use libfuzzer_sys::fuzz_target;
use selvedge_broker::mqtt::proxy::{TrustedProxies, accept};

/// Prefix, version and command, family, length.
const FIXED: usize = 16;

fuzz_target!(|data: &[u8]| {
    let Ok(network) = "10.0.0.0/8".parse() else {
        return;
    };
    let trusted = TrustedProxies::new([network]);
    let balancer = ([10, 1, 2, 3], 40_000).into();
    let mut rest = data;
    let found = accept(&mut rest, balancer, &trusted).now_or_never();
    let Some(found) = found else {
        panic!("a slice never makes anybody wait");
    };
    if found.is_ok() {
        let length = usize::from(u16::from_be_bytes([data[14], data[15]]));
        assert_eq!(data.len() - rest.len(), FIXED + length);
    }
});
