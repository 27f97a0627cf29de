//! Identities as SPIFFE URIs: one that is accepted prints as it was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_certs::Identity;

fuzz_target!(|uri: &str| {
    match uri.parse::<Identity>() {
        Ok(identity) => {
            assert_eq!(identity.uri(), uri);
            let parts = (identity.trust_domain(), identity.tenant(), identity.site());
            let again = Identity::new(parts.0, parts.1, parts.2, identity.name());
            assert_eq!(again, Ok(identity));
        }
        Err(error) => drop(error.to_string()),
    }
});
