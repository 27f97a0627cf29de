//! Bad networks, lost brokers, and clients that hold on to connections without using them.

use std::net::Ipv4Addr;
use std::time::Duration;

use quinn::Endpoint;
use selvedge_client::{Client, Code, Publish, Qos, State, Subscription};
use selvedge_tests::wait::{eventually, wait_for, within};
use selvedge_tests::{RawQuic, TestBroker, UdpLink, Weather, broker, raw};
use tokio_util::task::AbortOnDropHandle;

use super::pubsub::next;

const RECONNECTS: u64 = 0;

async fn connected(client: &Client) {
    let mut state = client.state();
    wait_for(
        "the client to be connected",
        &mut state,
        State::is_connected,
    )
    .await;
}

async fn disconnected(client: &Client) {
    let mut state = client.state();
    wait_for("the client to notice", &mut state, |state| {
        !state.is_connected()
    })
    .await;
}

fn numbered(number: u32) -> Publish {
    Publish::new("line/1", number.to_string()).qos(Qos::AtLeastOnce)
}

/// The numbers from `from` on arrive in order; one that was sent again may come again.
async fn expect_numbers(subscription: &mut Subscription, numbers: std::ops::Range<u32>) {
    let mut expected = numbers.start;
    while expected < numbers.end {
        let message = next(subscription).await;
        let number: u32 = std::str::from_utf8(&message.payload)
            .unwrap()
            .parse()
            .unwrap();
        assert!(number <= expected, "expected {expected}, found {number}");
        expected += u32::from(number == expected);
    }
}

async fn echo(client: &Client, service: &str) -> AbortOnDropHandle<()> {
    let mut responder = client.serve(service).await.unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut call) = responder.next().await {
            if let Ok(request) = call.request().await {
                let _ = call.reply(request).await;
            }
        }
    }))
}

/// A client of `broker` behind a link of its own.
async fn behind_link(broker: &TestBroker, name: &str) -> (Client, UdpLink) {
    let link = UdpLink::start(broker.quic(), 7).await.unwrap();
    let options = broker.options(broker.device(name)).resolve(link.address());
    (broker.connect(options).await, link)
}

#[tokio::test]
async fn after_a_restart_of_the_broker_everything_works_again_without_a_false_not_found() {
    let mut broker = TestBroker::with(broker::OPEN, |config, _| {
        config.limits.resume_grace = Duration::from_secs(10);
    })
    .await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut line = panel.subscribe("line/#").await.unwrap();
    let _echo = echo(&press, "echo").await;
    assert_eq!(panel.call("echo", "before").await.unwrap(), "before");

    let caller = panel.clone();
    let calling = tokio::spawn(async move {
        let mut failures = Vec::new();
        loop {
            match caller.call("echo", "during").await {
                Ok(_) if failures.is_empty() => tokio::task::yield_now().await,
                Ok(_) => return failures,
                Err(error) => failures.push(error.code()),
            }
        }
    });
    broker.restart().await;
    let failures = within("calls to work again", calling).await.unwrap();
    let allowed = |code: &Code| matches!(code, Code::Unavailable | Code::Aborted);
    assert!(failures.iter().all(allowed), "{failures:?}");

    press.publish_message(numbered(0)).await.unwrap();
    expect_numbers(&mut line, 0..1).await;
    assert!(press.stats().reconnects >= 1 && panel.stats().reconnects >= 1);
}

#[tokio::test]
async fn when_the_broker_dies_without_a_word_clients_find_its_successor() {
    let mut broker = TestBroker::open().await;
    let (press, press_link) = behind_link(&broker, "press-7").await;
    let (panel, panel_link) = behind_link(&broker, "panel-1").await;
    let mut line = panel.subscribe("line/#").await.unwrap();
    press.publish_message(numbered(0)).await.unwrap();
    expect_numbers(&mut line, 0..1).await;

    // From one moment to the next the address belongs to a broker that knows nothing.
    let successor = broker.successor().await;
    for link in [&press_link, &panel_link] {
        link.redirect(successor.quic()).await;
    }
    disconnected(&panel).await;
    connected(&panel).await;
    // The subscription is acknowledged after the reconnect, so this round trip is behind it.
    panel.flush().await.unwrap();
    press.publish_message(numbered(1)).await.unwrap();
    expect_numbers(&mut line, 1..2).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_short_partition_is_ridden_out_without_a_reconnect() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line/#").await.unwrap();
    let (press, link) = behind_link(&broker, "press-7").await;
    link.cut();
    let publishing = tokio::spawn({
        let press = press.clone();
        async move { press.publish_message(numbered(0)).await }
    });
    eventually("several datagrams to be lost", || async {
        (link.counts().lost >= 3).then_some(())
    })
    .await;
    link.heal();
    within("the acknowledgement", publishing)
        .await
        .unwrap()
        .unwrap();
    expect_numbers(&mut line, 0..1).await;
    assert_eq!(press.stats().reconnects, RECONNECTS);
}

#[tokio::test]
async fn after_a_long_partition_everything_published_meanwhile_arrives_in_order() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line/#").await.unwrap();
    let (press, link) = behind_link(&broker, "press-7").await;
    press.publish_message(numbered(0)).await.unwrap();
    link.cut();
    disconnected(&press).await;
    let publishing = tokio::spawn({
        let press = press.clone();
        async move {
            let all: Vec<_> = (1..50)
                .map(|n| press.publish_message(numbered(n)))
                .collect();
            for publish in all {
                publish.await.unwrap();
            }
        }
    });
    link.heal();
    within("the acknowledgements", publishing).await.unwrap();
    expect_numbers(&mut line, 0..50).await;
    assert!(press.stats().reconnects >= 1);
}

#[tokio::test]
async fn a_client_whose_nat_gives_it_another_port_stays_connected() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line/#").await.unwrap();
    let (press, link) = behind_link(&broker, "press-7").await;
    let mut orders = press.subscribe("orders").await.unwrap();
    for round in 0..3 {
        link.rebind().await;
        press.publish_message(numbered(round)).await.unwrap();
        expect_numbers(&mut line, round..round + 1).await;
        panel.publish("orders", "faster").await.unwrap();
        assert_eq!(next(&mut orders).await.payload, "faster");
    }
    assert_eq!(press.stats().reconnects, RECONNECTS);
}

#[tokio::test]
async fn loss_jitter_and_reordering_change_neither_order_nor_number() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line/#").await.unwrap();
    let (press, link) = behind_link(&broker, "press-7").await;
    link.set(Weather {
        loss: 0.05,
        delay: Duration::from_millis(2),
        jitter: Duration::from_millis(3),
        reorder: 0.05,
        ..Weather::FAIR
    });
    let publishing = tokio::spawn(async move {
        for number in 0..400 {
            press.publish_message(numbered(number)).await.unwrap();
        }
        press.stats().reconnects
    });
    for number in 0..400 {
        assert_eq!(next(&mut line).await.payload, number.to_string());
    }
    assert_eq!(publishing.await.unwrap(), RECONNECTS);
    assert!(link.counts().lost > 0);
}

#[tokio::test]
async fn the_same_identity_takes_its_session_over_and_another_cannot() {
    let broker = TestBroker::open().await;
    let device = broker.device("press-7");
    let session = |device| broker.options(device).session("main");
    let first = broker.connect(session(device.clone())).await;
    let stranger = broker.connect(session(broker.device("press-8"))).await;
    assert!(first.state().borrow().is_connected());

    let second = broker.connect(session(device)).await;
    let mut state = first.state();
    let ended = wait_for("the takeover", &mut state, |state| {
        matches!(state, State::Closed { .. })
    })
    .await;
    let reason = "another connection has taken the session over".into();
    assert_eq!(ended, State::Closed { reason });
    for client in [&second, &stranger] {
        client.publish_message(numbered(0)).await.unwrap();
        assert_eq!(client.stats().reconnects, RECONNECTS);
    }
}

/// Peers that connect and never open a stream.
async fn idle_peers(broker: &TestBroker, count: usize) -> Vec<RawQuic> {
    let config = raw::quic_config(broker.device("idle"), &broker.pki.anchors());
    let mut peers = Vec::new();
    for _ in 0..count {
        peers.push(
            RawQuic::connect(broker.quic(), config.clone())
                .await
                .unwrap(),
        );
    }
    peers
}

/// Peers of which the broker sees the first `quota` datagrams and nothing after.
async fn stalled_peers(
    broker: &TestBroker,
    count: u64,
    quota: u64,
) -> (UdpLink, Vec<(Endpoint, quinn::Connecting)>) {
    let link = UdpLink::start(broker.quic(), 7).await.unwrap();
    link.set(Weather {
        uplink_quota: Some(quota),
        ..Weather::FAIR
    });
    let config = raw::quic_config(broker.device("stalled"), &broker.pki.anchors());
    let mut peers = Vec::new();
    for _ in 0..count {
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let connecting = endpoint
            .connect_with(config.clone(), link.address(), "localhost")
            .unwrap();
        peers.push((endpoint, connecting));
    }
    eventually("the broker to have the datagrams", || async {
        (link.counts().up >= count * quota).then_some(())
    })
    .await;
    (link, peers)
}

#[tokio::test]
async fn peers_that_stop_in_mid_handshake_or_open_nothing_delay_nobody() {
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        // Nobody is to be given up while the test looks, and nobody asked to come again.
        config.limits.handshake_timeout = Duration::from_secs(60);
        config.limits.idle_timeout = Duration::from_secs(60);
        config.limits.handshakes_before_retry = 1_000;
    })
    .await;
    let idle = idle_peers(&broker, 100).await;
    let half_a_hello = stalled_peers(&broker, 50, 1).await;
    let a_hello = stalled_peers(&broker, 50, 2).await;

    let press = broker.client("press-7").await;
    press.publish_message(numbered(0)).await.unwrap();

    let refused = broker
        .metric("selvedge_refused_connections_total", &[])
        .await;
    assert_eq!(refused, 0, "all of them still wait");
    assert!(
        idle.iter()
            .all(|peer| peer.connection.close_reason().is_none())
    );
    let accepted = broker
        .metric("selvedge_accepted_connections_total", &[])
        .await;
    assert_eq!(accepted, 101, "none of the stalled came through");
    drop((half_a_hello, a_hello));
}

#[tokio::test]
async fn with_many_handshakes_in_progress_a_newcomer_proves_its_address_and_is_let_in() {
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        config.limits.handshake_timeout = Duration::from_secs(60);
        config.limits.idle_timeout = Duration::from_secs(60);
        config.limits.handshakes_before_retry = 4;
    })
    .await;
    let _stalled = stalled_peers(&broker, 8, 2).await;
    let (press, link) = behind_link(&broker, "press-7").await;
    press.publish_message(numbered(0)).await.unwrap();
    assert!(link.counts().down > 0);
}

#[tokio::test]
async fn peers_that_open_nothing_are_let_go_in_time() {
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        config.limits.handshake_timeout = Duration::from_millis(500);
    })
    .await;
    let idle = idle_peers(&broker, 3).await;
    for peer in &idle {
        let reason = peer.closed().await.to_string();
        assert!(reason.contains("no Hello arrived in time"), "{reason}");
    }
    let labels = [("listener", "quic"), ("reason", "hello_timeout")];
    assert_eq!(
        broker
            .metric("selvedge_refused_connections_total", &labels)
            .await,
        3
    );
}
