//! What the MQTT standards demand of a broker, statement by statement, in bytes.
//!
//! A test has the number of its statement, and `docs/mqtt.md` has the table of them.

#![allow(clippy::unwrap_used)]

mod qos2;

use selvedge_broker::StoreConfig;
use selvedge_broker::config::DurabilityRules;
use selvedge_tests::{TestBroker, broker};

/// A broker with a plaintext listener, and a store if asked for.
async fn start(store: bool) -> TestBroker {
    TestBroker::with(broker::OPEN, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
        config.store = store.then(|| StoreConfig {
            folder: pki.ca_file().with_file_name("store"),
            durability: DurabilityRules::all(true),
        });
    })
    .await
}
