#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

#[test]
fn a_server_is_asked_as_much_as_it_takes() {
    let mut health = Health::new(16);
    assert_eq!(health.capacity().slots, 0);
    health.see(Sign::Ready);
    assert_eq!(health.capacity().slots, 16);
    health.see(Sign::Overloaded);
    assert_eq!(health.capacity().slots, 8);
    health.see(Sign::Ready);
    assert_eq!(health.capacity().slots, 10);
    health.see(Sign::NotReady);
    assert_eq!(
        health.capacity(),
        Capacity {
            slots: 0,
            loaded: false
        }
    );
    health.see(Sign::Overloaded);
    assert_eq!(health.capacity().slots, 0);
}

proptest! {
    #[test]
    fn slots_stay_within_what_is_granted(most in 1u32..1000, signs in prop::collection::vec(0u8..3, 0..50)) {
        let mut health = Health::new(most);
        for sign in signs {
            let sign = [Sign::Ready, Sign::NotReady, Sign::Overloaded][usize::from(sign)];
            health.see(sign);
            prop_assert!(health.slots <= most);
            prop_assert_eq!(health.slots == 0, health.capacity() == Capacity { slots: 0, loaded: false });
            prop_assert!(sign != Sign::Ready || health.slots > 0);
        }
    }
}

#[test]
fn an_address_is_checked() {
    let config = |url: &str| UpstreamConfig {
        url: url.to_owned(),
        model: "m".to_owned(),
        version: String::new(),
        ca: None,
        token_file: None,
        operations: Vec::new(),
        poll: Duration::from_secs(1),
    };
    let endpoint = Endpoint::new(&config("http://[::1]:8001/v1/"), b"h2").unwrap();
    assert_eq!(
        (endpoint.authority().as_str(), endpoint.prefix.as_str()),
        ("[::1]:8001", "/v1")
    );
    for (url, expected) in [
        ("localhost", "expected http:// or https://"),
        ("ftp://host", "expected http:// or https://"),
        ("https://host", "expected a ca for https://"),
        ("http://", "expected"),
    ] {
        let error = Endpoint::new(&config(url), b"h2")
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains(expected), "{url}: {error}");
    }
}
