//! What the MQTT standards demand of a broker, statement by statement, in bytes.
//!
//! A test has the number of its statement, and the table of them in `docs/mqtt.md` is made of the
//! comments here: `UPDATE_DOCS=1 cargo test -p selvedge-tests --test conformance table` writes it.

#![allow(clippy::unwrap_used)]

mod qos2;
mod rest;
mod table;
mod v311;
mod v5;

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use selvedge_broker::StoreConfig;
use selvedge_broker::config::DurabilityRules;
use selvedge_tests::mqtt::wire::{Hello, Level, Wire};
use selvedge_tests::{TestBroker, broker};

/// Everything is allowed, but for what a test of denials needs.
const POLICY: &str = r##"
[[rule]]
name = "everyone"
identities = ["*/*/*"]
allow = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["#", "$other/#"]

[[rule]]
name = "nobody"
identities = ["*/*/*"]
deny = ["publish", "subscribe"]
subjects = ["secret/#"]
"##;

/// Largest packet that the shared broker takes.
const MAX_PACKET: usize = 70_000;

/// QoS 2 messages that a 5.0 client may have in progress there.
const RECEIVE_MAXIMUM: u16 = 20;

/// Topic aliases that a client may set there.
const ALIASES: u16 = 10;

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

/// The broker that most tests share; clients and topics of each have names of their own.
fn shared() -> SocketAddr {
    static BROKER: OnceLock<SocketAddr> = OnceLock::new();
    *BROKER.get_or_init(|| {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let broker = TestBroker::with(POLICY, |config, pki| {
                    let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
                    config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
                    config.limits.max_frame_bytes = MAX_PACKET;
                    let settings = &mut config.mqtt.settings;
                    settings.receive_maximum = RECEIVE_MAXIMUM;
                    settings.topic_alias_maximum = ALIASES;
                    settings.response_information = Some("replies/{name}/".to_owned());
                    settings.sys_interval = Duration::from_millis(50);
                })
                .await;
                sender.send(broker.mqtt()).unwrap();
                std::future::pending::<()>().await;
            });
        });
        receiver.recv().unwrap()
    })
}

/// A client with a clean session.
async fn client(level: Level, name: &str) -> Wire {
    Wire::connect(shared(), &Hello::new(level, name)).await
}

/// A client with a session that is kept for ten minutes.
async fn kept(level: Level, name: &str) -> Wire {
    Wire::connect(shared(), &Hello::new(level, name).kept(600)).await
}

/// What a connected client sends ends its connection, for this reason in 5.0, and no other.
async fn breach(level: Level, name: &str, packet: impl AsRef<[u8]>, reason: u8) {
    let mut bystander = client(level, &format!("{name}-bystander")).await;
    let mut guilty = client(level, name).await;
    guilty.send(packet).await;
    let expected = (level == Level::V5).then_some(reason);
    assert_eq!(guilty.end().await, expected);
    bystander.quiet().await;
}

/// A CONNECT is answered so, and the connection ends; zero for no answer.
async fn refused(packet: impl AsRef<[u8]>, code: u8) {
    refused_at(Level::V5, packet, code).await;
}

/// As [`refused`].
async fn refused_at(level: Level, packet: impl AsRef<[u8]>, code: u8) {
    let mut wire = Wire::open(shared(), level).await;
    wire.send(packet).await;
    let answer = wire.try_next().await;
    let found = answer.as_ref().map_or(0, |answer| answer.body[1]);
    assert_eq!(found, code, "{answer:02x?}");
    if let Some(answer) = answer {
        assert_eq!((answer.first, answer.body[0]), (0x20, 0));
        assert_eq!(wire.try_next().await, None);
    }
}
