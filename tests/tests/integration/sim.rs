//! Stories about time and partitions, in a simulated network.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ServerConfig, TransportConfig};
use selvedge_broker::policy::Policy;
use selvedge_broker::{Config, Server};
use selvedge_certs::{Credentials, TrustAnchors, quic_server_config};
use selvedge_client::{Call, Client, Code, Options, Publish, Qos, State, TopicName, Will};
use selvedge_proto::ALPN;
use selvedge_tests::{TestPki, broker, log, raw, sim};
use tokio::time::Instant;

const PORT: u16 = 7443;

fn network(seed: u64) -> turmoil::Sim<'static> {
    turmoil::Builder::new()
        .simulation_duration(Duration::from_secs(900))
        .min_message_latency(Duration::from_millis(10))
        .max_message_latency(Duration::from_millis(40))
        .tick_duration(Duration::from_millis(10))
        .rng_seed(seed)
        .build()
}

#[test]
fn bare_quic_survives_a_partition_of_four_seconds() {
    log::init();
    let pki = TestPki::new();
    let (server, client) = (pki.server(), pki.device("acme", "plant-1", "press-7"));
    let anchors = pki.anchors();
    let mut network = network(1);
    let tls = quic_server_config(server, &anchors, None, &[ALPN]).unwrap();
    let config = ServerConfig::with_crypto(Arc::new(tls));
    network.host("broker", move || {
        let config = config.clone();
        async move {
            let endpoint = sim::endpoint(PORT, Some(config)).await?;
            let connection = endpoint.accept().await.unwrap().await?;
            while let Ok(mut stream) = connection.accept_uni().await {
                let text = stream.read_to_end(64).await?;
                connection.open_uni().await?.write_all(&text).await?;
            }
            Ok(())
        }
    });
    network.client("press-7", async move {
        let endpoint = sim::endpoint(0, None).await?;
        let broker = SocketAddr::new(turmoil::lookup("broker"), PORT);
        let mut config = raw::quic_config(client, &anchors);
        let mut transport = TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(1)));
        config.transport_config(Arc::new(transport));
        let connection = endpoint.connect_with(config, broker, "localhost")?.await?;
        turmoil::partition("press-7", "broker");
        connection.open_uni().await?.write_all(b"held up").await?;
        let cut_at = Instant::now();
        tokio::time::sleep(Duration::from_secs(4)).await;
        turmoil::repair("press-7", "broker");
        let echo = connection.accept_uni().await?.read_to_end(64).await?;
        assert_eq!(echo, b"held up");
        assert!(cut_at.elapsed() >= Duration::from_secs(4));
        Ok(())
    });
    network.run().unwrap();
}

/// Adds a host that runs a broker, again from nothing when it is bounced.
fn add_broker(network: &mut turmoil::Sim<'static>, pki: &TestPki) {
    let policy = Policy::parse(broker::OPEN).unwrap();
    let config = Config::new(pki.server(), pki.anchors(), policy);
    network.host("broker", move || {
        let config = config.clone();
        async move {
            let endpoint = sim::endpoint(PORT, None).await?;
            let mut server = Server::bind_with_endpoint(config, endpoint).await?;
            server.join().await;
            Ok(())
        }
    });
}

/// A client on the current simulated host.
async fn connect(
    credentials: Credentials,
    anchors: TrustAnchors,
    change: impl FnOnce(Options) -> Options,
) -> turmoil::Result<Client> {
    let endpoint = sim::endpoint(0, None).await?;
    let options = Options::new(&format!("localhost:{PORT}"))?
        .resolve(SocketAddr::new(turmoil::lookup("broker"), PORT))
        .endpoint(endpoint)
        .credentials(credentials)
        .trust(anchors);
    Ok(Client::connect(change(options)).await?)
}

fn numbered(number: u32) -> Publish {
    Publish::new("line/1", number.to_string()).qos(Qos::AtLeastOnce)
}

/// Takes the numbers up to `last`, in order; one that was sent again may come again.
async fn take_until(line: &mut selvedge_client::Subscription, last: u32) {
    let mut expected = 0;
    while expected <= last {
        let message = line.next().await.unwrap();
        let number: u32 = std::str::from_utf8(&message.payload)
            .unwrap()
            .parse()
            .unwrap();
        assert!(number <= expected, "expected {expected}, found {number}");
        expected += u32::from(number == expected);
    }
}

#[test]
fn a_partition_longer_than_the_idle_timeout_loses_no_acknowledged_message() {
    log::init();
    let pki = TestPki::new();
    let mut network = network(2);
    add_broker(&mut network, &pki);
    let (panel, press) = (
        pki.device("acme", "plant-1", "panel-1"),
        pki.device("acme", "plant-1", "press-7"),
    );
    let (anchors, same) = (pki.anchors(), pki.anchors());
    network.client("panel-1", async move {
        let panel = connect(panel, anchors, |options| options).await?;
        let mut line = panel.subscribe("line/#").await?;
        take_until(&mut line, 59).await;
        Ok(())
    });
    network.client("press-7", async move {
        let press = connect(press, same, |options| options).await?;
        // The panel may not have subscribed yet: let it.
        tokio::time::sleep(Duration::from_secs(1)).await;
        for number in 0..60 {
            if number == 20 {
                turmoil::partition("press-7", "broker");
                tokio::spawn(async {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                    turmoil::repair("press-7", "broker");
                });
            }
            press.publish_message(numbered(number)).await?;
        }
        assert!(press.stats().reconnects >= 1);
        Ok(())
    });
    network.run().unwrap();
}

#[test]
fn a_kept_session_on_the_far_side_of_a_partition_misses_nothing() {
    log::init();
    let pki = TestPki::new();
    let mut network = network(3);
    add_broker(&mut network, &pki);
    let (panel, press) = (
        pki.device("acme", "plant-1", "panel-1"),
        pki.device("acme", "plant-1", "press-7"),
    );
    let (anchors, same) = (pki.anchors(), pki.anchors());
    network.client("panel-1", async move {
        let kept = |options: Options| {
            options
                .session("panel")
                .session_expiry(Duration::from_secs(600))
        };
        let panel = connect(panel, anchors, kept).await?;
        let mut line = panel.subscribe("line/#").await?;
        take_until(&mut line, 59).await;
        let present = panel.state().borrow().clone();
        assert!(
            matches!(
                present,
                State::Connected {
                    session_present: true,
                    ..
                }
            ),
            "{present:?}"
        );
        Ok(())
    });
    network.client("press-7", async move {
        let press = connect(press, same, |options| options).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        for number in 0..60 {
            if number == 20 {
                turmoil::partition("panel-1", "broker");
            }
            press.publish_message(numbered(number)).await?;
        }
        // Long enough for both ends to have given the connection up.
        tokio::time::sleep(Duration::from_secs(60)).await;
        turmoil::repair("panel-1", "broker");
        Ok(())
    });
    network.run().unwrap();
}

#[test]
fn a_will_is_published_after_its_delay_and_not_before() {
    log::init();
    let pki = TestPki::new();
    let mut network = network(4);
    add_broker(&mut network, &pki);
    let (panel, press) = (
        pki.device("acme", "plant-1", "panel-1"),
        pki.device("acme", "plant-1", "press-7"),
    );
    let (anchors, same) = (pki.anchors(), pki.anchors());
    let (cut, cut_at) = tokio::sync::oneshot::channel();
    network.client("panel-1", async move {
        let panel = connect(panel, anchors, |options| options).await?;
        let mut wills = panel.subscribe("gone/#").await?;
        let cut_at: Instant = cut_at.await?;
        assert_eq!(wills.next().await.unwrap().payload, "press-7");
        let after = cut_at.elapsed();
        // The idle timeout of 15 s, then the will's own delay of 30 s.
        assert!(
            (Duration::from_secs(40)..Duration::from_secs(60)).contains(&after),
            "{after:?}"
        );
        Ok(())
    });
    network.client("press-7", async move {
        let will =
            Will::new(TopicName::parse("gone/press-7")?, "press-7").delay(Duration::from_secs(30));
        let press = connect(press, same, |options| {
            options.session_expiry(Duration::from_secs(600)).will(will)
        })
        .await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        turmoil::partition("press-7", "broker");
        cut.send(Instant::now()).unwrap();
        tokio::time::sleep(Duration::from_secs(120)).await;
        drop(press);
        Ok(())
    });
    network.run().unwrap();
}

#[test]
fn clients_find_a_broker_that_crashed_and_came_back() {
    log::init();
    let pki = TestPki::new();
    let mut network = network(5);
    add_broker(&mut network, &pki);
    let press = pki.device("acme", "plant-1", "press-7");
    let anchors = pki.anchors();
    let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
    network.client("press-7", async move {
        let press = connect(press, anchors, |options| options).await?;
        let mut line = press.subscribe("line/#").await?;
        press.publish_message(numbered(0)).await?;
        take_until(&mut line, 0).await;
        ready.send(())?;
        let mut state = press.state();
        state.wait_for(|state| !state.is_connected()).await?;
        state.wait_for(State::is_connected).await?;
        press.publish_message(numbered(0)).await?;
        take_until(&mut line, 0).await;
        Ok(())
    });
    while is_ready.try_recv().is_err() {
        network.step().unwrap();
    }
    network.crash("broker");
    for _ in 0..1_000 {
        network.step().unwrap();
    }
    network.bounce("broker");
    network.run().unwrap();
}

#[test]
fn deadlines_and_session_expiry_follow_the_clock_through_minutes_of_partition() {
    log::init();
    let pki = TestPki::new();
    let mut network = network(6);
    add_broker(&mut network, &pki);
    let press = pki.device("acme", "plant-1", "press-7");
    let anchors = pki.anchors();
    network.client("press-7", async move {
        let kept = |options: Options| {
            options
                .session("press")
                .session_expiry(Duration::from_secs(100))
        };
        let press = connect(press, anchors, kept).await?;
        let mut line = press.subscribe("line/#").await?;
        for (minutes, present) in [(1, true), (4, false)] {
            turmoil::partition("press-7", "broker");
            tokio::time::sleep(Duration::from_secs(60 * minutes)).await;
            turmoil::repair("press-7", "broker");
            let mut state = press.state();
            let found = state.wait_for(State::is_connected).await?.clone();
            assert!(
                matches!(found, State::Connected { session_present, .. } if session_present == present),
                "after {minutes} minutes: {found:?}"
            );
            // Answered after the subscriptions that the client has restored by itself.
            drop(press.subscribe("barrier").await?);
            press.publish_message(numbered(0)).await?;
            take_until(&mut line, 0).await;
        }
        // The deadline counts from now, not from when the broker started.
        let mut echo = press.serve("echo").await?;
        let (answer, _) = tokio::join!(press.call("echo", "x"), async {
            echo.next().await.unwrap().reply("y").await
        });
        assert_eq!(answer?, "y");
        let call = Call::new("echo").deadline(Duration::from_secs(20)).payload("x");
        let begun = Instant::now();
        let (answer, call) = tokio::join!(press.request(call), echo.next());
        assert_eq!(answer.unwrap_err().code(), Code::DeadlineExceeded);
        let after = begun.elapsed();
        assert!((Duration::from_secs(20)..Duration::from_secs(22)).contains(&after), "{after:?}");
        drop(call);
        Ok(())
    });
    network.run().unwrap();
}
