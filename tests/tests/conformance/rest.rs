//! What no single statement says: settings, wills over a restart, the broker's own topics.

use selvedge_tests::mqtt::wire::{Fields, Hello, Level, Wire};
use selvedge_tests::{TestBroker, broker};

use super::{client, start};

#[tokio::test]
async fn the_numbers_of_the_tenant_are_there_for_dashboards() {
    let mut reader = client(Level::V5, "dashboard").await;
    // The shared policy has no rule for them.
    assert_eq!(reader.subscribe(&[("$SYS/#", 0)]).await, [0x87]);
    let policy = format!(
        "{}\n[[rule]]\nname = 'figures'\nidentities = ['*/*/*']\nallow = ['publish', 'subscribe']\nsubjects = ['$SYS/#']\n",
        broker::OPEN
    );
    let broker = TestBroker::with(&policy, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
        config.mqtt.settings.sys_interval = std::time::Duration::from_millis(30);
    })
    .await;
    let mut sender = Wire::connect(broker.mqtt(), &Hello::new(Level::V5, "sender")).await;
    for id in 1..=3 {
        sender.publish_and_wait(1, "plant/a", id, "x").await;
    }
    let mut reader = Wire::connect(broker.mqtt(), &Hello::new(Level::V5, "reader")).await;
    reader
        .subscribe(&[
            ("$SYS/broker/+/+/+", 0),
            ("$SYS/broker/clients/+", 0),
            ("$SYS/broker/version", 0),
        ])
        .await;
    let mut seen = std::collections::HashMap::new();
    let expected = [
        ("$SYS/broker/publish/messages/received", "3"),
        ("$SYS/broker/clients/connected", "2"),
        ("$SYS/broker/clients/total", "2"),
    ];
    while !expected
        .iter()
        .all(|(topic, value)| seen.get(*topic).is_some_and(|held| held == value))
        || !seen.contains_key("$SYS/broker/version")
    {
        let message = reader.delivery().await;
        seen.insert(message.topic.clone(), message.text().to_owned());
    }
    // Nobody else says so.
    sender.publish(0x02, "$SYS/broker/version", 9, "mine").await;
    assert_eq!(sender.answer(0x40, 9).await.reason(), 0x87);
    // Another tenant has numbers of its own.
    let other = broker.client("globex/plant-9/panel").await;
    let received = "$SYS/broker/publish/messages/received";
    let mut figures = other.subscribe(received).await.unwrap();
    assert_eq!(&figures.next().await.unwrap().payload[..], b"0");
}

#[tokio::test]
async fn a_will_outlives_the_broker() {
    for expiry in [0, 3600] {
        let mut broker = start(true).await;
        let mut reader =
            Wire::connect(broker.mqtt(), &Hello::new(Level::V5, "reader").kept(3600)).await;
        reader.subscribe(&[("last/#", 1)]).await;
        let hello = Hello::new(Level::V5, "mortal");
        let hello =
            hello
                .kept(expiry)
                .will(0x08, Fields::new().byte(0x18).four(1), "last/words", "gone");
        let mortal = Wire::connect(broker.mqtt(), &hello).await;
        broker.stop().await;
        drop(mortal);
        broker.start().await;
        let mut reader =
            Wire::connect(broker.mqtt(), &Hello::new(Level::V5, "reader").kept(3600)).await;
        assert_eq!(reader.take().await.text(), "gone");
        reader.quiet().await;
    }
}

#[tokio::test]
async fn a_client_is_told_where_else_to_go_when_the_broker_stops() {
    for (for_good, reason) in [(false, 0x9c), (true, 0x9d)] {
        let mut broker = TestBroker::with(broker::OPEN, |config, pki| {
            let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
            config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
            config.mqtt.settings.server_reference =
                Some(selvedge_broker::mqtt::settings::ServerReference {
                    address: "other.example:8883".to_owned(),
                    for_good,
                });
        })
        .await;
        let mut wire = Wire::connect(broker.mqtt(), &Hello::new(Level::V5, "x")).await;
        let stopping = async {
            let told = wire.next().await;
            drop(wire);
            told
        };
        let ((), told) = tokio::join!(broker.stop(), stopping);
        assert_eq!((told.first, told.reason()), (0xe0, reason));
        assert_eq!(told.property(0x1c).unwrap(), b"other.example:8883");
    }
}

#[tokio::test]
async fn a_client_is_told_a_shorter_keep_alive() {
    let broker = TestBroker::with(broker::OPEN, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
        config.mqtt.settings.server_keep_alive = Some(std::time::Duration::from_secs(1));
    })
    .await;
    let (mut wire, answer) = Wire::greet(broker.mqtt(), &Hello::new(Level::V5, "x")).await;
    assert_eq!(answer.property(0x13).unwrap(), [0, 1]);
    assert_eq!(wire.end().await, Some(0x8d));
    let mut old = Wire::connect(broker.mqtt(), &Hello::new(Level::V311, "y")).await;
    old.quiet().await;
}

#[tokio::test]
async fn every_cut_of_every_packet_ends_its_connection_at_most() {
    let packets: Vec<Vec<u8>> = vec![
        Fields::new()
            .text("a/b")
            .two(5)
            .block(&Fields::new())
            .raw("x")
            .packet(0x32),
        Fields::new()
            .two(5)
            .byte(0)
            .block(&Fields::new())
            .packet(0x40),
        Fields::new()
            .two(5)
            .byte(0)
            .block(&Fields::new())
            .packet(0x62),
        Fields::new()
            .two(5)
            .block(&Fields::new())
            .text("a/#")
            .byte(1)
            .packet(0x82),
        Fields::new()
            .two(5)
            .block(&Fields::new())
            .text("a/#")
            .packet(0xa2),
        Fields::new()
            .byte(0)
            .block(&Fields::new().byte(0x11).four(1))
            .packet(0xe0),
    ];
    let mut bystander = client(Level::V5, "bystander").await;
    for packet in packets {
        for cut in 2..packet.len() {
            // Cut short, with a length that says so.
            let mut short = packet[..cut].to_vec();
            short[1] = u8::try_from(cut - 2).unwrap();
            let mut wire = client(Level::V5, "cutter").await;
            wire.send(&short).await;
            wire.send([0xc0, 0]).await;
            while let Some(answer) = wire.try_next().await {
                if answer.first == 0xd0 {
                    break;
                }
                if answer.first == 0xe0 {
                    assert!(
                        [0x81, 0x82].contains(&answer.reason()),
                        "{short:02x?} {answer:02x?}"
                    );
                }
            }
        }
    }
    bystander.quiet().await;
}
