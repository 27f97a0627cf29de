//! The bridge between a real mosquitto and a real broker of the fabric.
#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish as MqttPublish, PublishProperties};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use selvedge_bridge::{Bridge, BridgeConfig, DropReason, HOP_PROPERTY, StartError};
use selvedge_broker::policy::Policy;
use selvedge_broker::{Config, Server};
use selvedge_certs::{Authority, Credentials, IssueRequest, TrustAnchors};
use selvedge_client::{Client, Message, Options, Properties, Publish, Qos, Subscription};
use tempfile::TempDir;

use mosquitto::Mosquitto;

#[path = "../src/link/tests/mosquitto.rs"]
mod mosquitto;

const SOON: Duration = Duration::from_secs(20);
const BRIDGE: &str = "spiffe://example.test/acme/plant/bridge";

async fn soon<T>(future: impl Future<Output = T>) -> T {
    let result = tokio::time::timeout(SOON, future).await;
    result.expect("it happens within 20 seconds")
}

/// A broker of the fabric and the files of the bridge's identity.
struct Fabric {
    authority: Authority,
    dir: TempDir,
    server: Server,
    address: SocketAddr,
}

impl Fabric {
    async fn start() -> Self {
        let authority = Authority::create("example.test").unwrap();
        let dir = TempDir::new().unwrap();
        let bridge = IssueRequest::client("acme", "plant", "bridge");
        let bridge = authority.issue(&bridge).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("ca.pem", authority.ca_pem());
        write("bridge.crt", &bridge.cert_pem);
        write("bridge.key", &bridge.key_pem);
        let server = serve(&authority, ([127, 0, 0, 1], 0).into()).await;
        let address = server.addresses().quic.unwrap();
        Self {
            authority,
            dir,
            server,
            address,
        }
    }

    async fn client(&self, name: &str) -> Client {
        let request = IssueRequest::client("acme", "plant", name);
        let options = Options::new(&self.address.to_string())
            .unwrap()
            .server_name("localhost")
            .credentials(self.authority.issue(&request).unwrap().credentials())
            .trust(TrustAnchors::from_pem(self.authority.ca_pem().as_bytes()).unwrap());
        Client::connect(options).await.unwrap()
    }

    /// The configuration with these remotes.
    fn config(&self, remotes: &str) -> BridgeConfig {
        let text = format!(
            "[fabric]\nbroker = \"{}\"\nserver_name = \"localhost\"\nca = \"ca.pem\"\n\
             cert = \"bridge.crt\"\nkey = \"bridge.key\"\nsession = \"bridge\"\n{remotes}",
            self.address
        );
        BridgeConfig::parse(&text, self.dir.path()).unwrap()
    }

    async fn bridge(&self, remotes: &str) -> Bridge {
        let bridge = Bridge::start(self.config(remotes)).await.unwrap();
        soon(bridge.ready()).await;
        bridge
    }
}

async fn serve(authority: &Authority, address: SocketAddr) -> Server {
    let request = IssueRequest::server("acme", "cloud", "broker").dns("localhost");
    let credentials: Credentials = authority.issue(&request).unwrap().credentials();
    let trust = TrustAnchors::from_pem(authority.ca_pem().as_bytes()).unwrap();
    let policy = Policy::parse(
        r##"
[[rule]]
name = "everything but secrets"
identities = ["acme/*/*"]
allow = ["publish", "subscribe"]
subjects = ["#"]
[[rule]]
name = "no secrets"
identities = ["acme/*/bridge"]
deny = ["publish", "subscribe"]
subjects = ["secret/#"]
"##,
    )
    .unwrap();
    let mut config = Config::new(credentials, trust, policy);
    config.quic = Some(address);
    Server::bind(config).await.unwrap()
}

fn remote(name: &str, port: u16, version: &str, rules: &str) -> String {
    format!(
        "[[remote]]\nname = \"{name}\"\nurl = \"mqtt://127.0.0.1:{port}\"\nversion = \"{version}\"\n\
         client_id = \"bridge\"\nreconnect_max = 1\n{rules}\n"
    )
}

fn rule(direction: &str, filter: &str, remote: &str, local: &str) -> String {
    format!(
        "[[remote.rule]]\ndirection = \"{direction}\"\nfilter = \"{filter}\"\n\
         remote_prefix = \"{remote}\"\nlocal_prefix = \"{local}\"\n"
    )
}

/// Something else that is connected to mosquitto.
struct Sensor {
    client: AsyncClient,
    events: EventLoop,
}

impl Sensor {
    async fn connect(port: u16, id: &str) -> Self {
        let options = MqttOptions::new(id, "127.0.0.1", port);
        let (client, events) = AsyncClient::new(options, 16);
        let mut sensor = Self { client, events };
        sensor
            .packet(|packet| matches!(packet, Packet::ConnAck(_)))
            .await;
        sensor
    }

    async fn subscribe(&mut self, filter: &str) {
        self.client.try_subscribe(filter, QoS::AtLeastOnce).unwrap();
        self.packet(|packet| matches!(packet, Packet::SubAck(_)))
            .await;
    }

    async fn publish(&mut self, topic: &str, payload: &str, properties: PublishProperties) {
        let (qos, payload) = (QoS::AtLeastOnce, payload.to_owned());
        self.client
            .try_publish_with_properties(topic, qos, false, payload, properties)
            .unwrap();
        self.packet(|packet| matches!(packet, Packet::PubAck(_)))
            .await;
    }

    async fn retain(&mut self, topic: &str) {
        let (qos, properties) = (QoS::AtLeastOnce, PublishProperties::default());
        self.client
            .try_publish_with_properties(topic, qos, true, "21", properties)
            .unwrap();
        self.packet(|packet| matches!(packet, Packet::PubAck(_)))
            .await;
    }

    async fn message(&mut self) -> MqttPublish {
        match self
            .packet(|packet| matches!(packet, Packet::Publish(_)))
            .await
        {
            Packet::Publish(publish) => publish,
            _ => unreachable!("only publishes were let through"),
        }
    }

    async fn packet(&mut self, wanted: impl Fn(&Packet) -> bool) -> Packet {
        soon(async {
            loop {
                match self.events.poll().await.unwrap() {
                    Event::Incoming(packet) if wanted(&packet) => return packet,
                    _ => {}
                }
            }
        })
        .await
    }
}

async fn publish(client: &Client, topic: &str, payload: &'static str) {
    let message = Publish::new(topic, payload).qos(Qos::AtLeastOnce);
    soon(client.publish_message(message)).await.unwrap();
}

async fn next(subscription: &mut Subscription) -> Message {
    soon(subscription.next()).await.unwrap()
}

/// Waits until the figures of the bridge are as wanted; there is no event for them.
async fn until(bridge: &Bridge, wanted: impl Fn(&selvedge_bridge::RemoteStatus) -> bool) {
    soon(async {
        while !wanted(&bridge.status()[0]) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_go_both_ways_with_their_properties() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let rules =
        rule("in", "sensors/#", "", "plant/") + &rule("out", "commands/#", "hall/", "plant/");
    let bridge = fabric
        .bridge(&remote("mosquitto", mosquitto.port, "5", &rules))
        .await;
    let app = fabric.client("app").await;
    let mut readings = app.subscribe("plant/sensors/#").await.unwrap();
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;
    sensor.subscribe("hall/#").await;

    let properties = PublishProperties {
        content_type: Some("text/plain".into()),
        user_properties: vec![("unit".into(), "C".into())],
        message_expiry_interval: Some(600),
        ..PublishProperties::default()
    };
    sensor.publish("sensors/7", "21", properties).await;
    let reading = next(&mut readings).await;
    assert_eq!(reading.topic.as_str(), "plant/sensors/7");
    assert_eq!(
        (&*reading.payload, reading.qos),
        (&b"21"[..], Qos::AtLeastOnce)
    );
    assert_eq!(&*reading.publisher, BRIDGE);
    let properties = reading.properties();
    assert_eq!(properties.content_type, "text/plain");
    assert_eq!(properties.user, [("unit".to_owned(), "C".to_owned())]);
    assert_eq!(properties.hops, [format!("{BRIDGE}#mosquitto")]);
    assert!(properties.expiry.unwrap() > Duration::from_secs(500));

    let command = Publish::new("plant/commands/stop", "now")
        .qos(Qos::AtLeastOnce)
        .properties(Properties {
            response_topic: "plant/answers".into(),
            correlation_data: "7".into(),
            ..Properties::default()
        });
    soon(app.publish_message(command)).await.unwrap();
    let command = sensor.message().await;
    assert_eq!(
        (&*command.topic, &*command.payload),
        (&b"hall/commands/stop"[..], &b"now"[..])
    );
    let properties = command.properties.unwrap();
    assert_eq!(properties.response_topic.as_deref(), Some("plant/answers"));
    assert_eq!(properties.correlation_data.as_deref(), Some(&b"7"[..]));
    assert_eq!(
        properties.user_properties,
        [(HOP_PROPERTY.to_owned(), format!("{BRIDGE}#mosquitto"))]
    );

    until(&bridge, |remote| {
        remote.rules.iter().all(|rule| rule.in_flight == 0)
    })
    .await;
    let status = bridge.status().remove(0);
    assert_eq!(
        (status.rules[0].forwarded_in, status.rules[1].forwarded_out),
        (1, 1)
    );
    assert!(status.connected && status.ready && status.fabric_connected);
    soon(bridge.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_remote_is_bridged_both_ways() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let rules = rule("in", "sensors/#", "", "plant/") + &rule("out", "commands/#", "", "plant/");
    let _bridge = fabric
        .bridge(&remote("old", mosquitto.port, "3.1.1", &rules))
        .await;
    let app = fabric.client("app").await;
    let mut readings = app.subscribe("plant/sensors/#").await.unwrap();
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;
    sensor.subscribe("commands/#").await;
    sensor
        .publish("sensors/7", "21", PublishProperties::default())
        .await;
    assert_eq!(&*next(&mut readings).await.payload, b"21");
    publish(&app, "plant/commands/stop", "now").await;
    assert_eq!(&*sensor.message().await.payload, b"now");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_mapping_both_ways_makes_no_echo() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let rules = rule("both", "+/#", "", "plant/");
    let bridge = fabric
        .bridge(&remote("mosquitto", mosquitto.port, "5", &rules))
        .await;
    let app = fabric.client("app").await;
    let mut local = app.subscribe("plant/#").await.unwrap();
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;
    let mut listener = Sensor::connect(mosquitto.port, "listener").await;
    listener.subscribe("#").await;

    sensor
        .publish("a", "from the remote", PublishProperties::default())
        .await;
    assert_eq!(&*next(&mut local).await.payload, b"from the remote");
    assert_eq!(&*listener.message().await.payload, b"from the remote");
    publish(&app, "plant/a", "from the fabric").await;
    assert_eq!(&*next(&mut local).await.payload, b"from the fabric");
    assert_eq!(&*listener.message().await.payload, b"from the fabric");
    // An echo of either would have come before these, on the same topic and connection.
    sensor
        .publish("a", "last", PublishProperties::default())
        .await;
    assert_eq!(&*next(&mut local).await.payload, b"last");
    assert_eq!(&*listener.message().await.payload, b"last");

    // One that comes back by a detour is told by its hop list.
    let looped = PublishProperties {
        user_properties: vec![(HOP_PROPERTY.into(), format!("{BRIDGE}#mosquitto"))],
        ..PublishProperties::default()
    };
    sensor.publish("a", "looped", looped).await;
    until(&bridge, |remote| {
        remote.rules[0].dropped.get(&DropReason::Loop) == Some(&1)
    })
    .await;
    sensor
        .publish("a", "after the loop", PublishProperties::default())
        .await;
    assert_eq!(&*next(&mut local).await.payload, b"after the loop");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_remote_reaches_another_through_the_fabric() {
    if !mosquitto::is_installed() {
        return;
    }
    let (left, right) = (Mosquitto::start(""), Mosquitto::start(""));
    let fabric = Fabric::start().await;
    let rules = rule("both", "#", "site/", "shared/");
    let remotes =
        remote("left", left.port, "5", &rules) + &remote("right", right.port, "5", &rules);
    let _bridge = fabric.bridge(&remotes).await;
    let mut listener = Sensor::connect(right.port, "listener").await;
    listener.subscribe("site/#").await;
    let mut sensor = Sensor::connect(left.port, "sensor").await;
    let mut home = Sensor::connect(left.port, "home").await;
    home.subscribe("site/#").await;
    for payload in ["one", "two"] {
        sensor
            .publish("site/a", payload, PublishProperties::default())
            .await;
        assert_eq!(&*listener.message().await.payload, payload.as_bytes());
        assert_eq!(&*home.message().await.payload, payload.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_fabric_has_not_taken_is_not_acknowledged_to_the_remote() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let rules = rule("in", "sensors/#", "", "plant/");
    let remotes = remote("mosquitto", mosquitto.port, "5", &rules);
    let bridge = fabric.bridge(&remotes).await;
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;

    // The fabric goes away, a reading comes, and the bridge dies without having delivered it.
    let Fabric {
        authority,
        dir,
        server,
        address,
    } = fabric;
    soon(server.shutdown()).await;
    sensor
        .publish("sensors/7", "21", PublishProperties::default())
        .await;
    until(&bridge, |remote| remote.rules[0].in_flight == 1).await;
    assert_eq!(bridge.status()[0].rules[0].forwarded_in, 0);
    drop(bridge);

    // A new fabric and a new bridge: the remote still has the reading.
    let server = soon(serve(&authority, address)).await;
    let fabric = Fabric {
        authority,
        dir,
        server,
        address,
    };
    let app = fabric.client("app").await;
    let mut readings = app.subscribe("plant/#").await.unwrap();
    let _bridge = fabric.bridge(&remotes).await;
    let reading = next(&mut readings).await;
    assert_eq!(
        (reading.topic.as_str(), &*reading.payload),
        ("plant/sensors/7", &b"21"[..])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_that_was_away_gets_what_it_missed_and_is_subscribed_again() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let port = mosquitto.port;
    let rules = rule("in", "sensors/#", "", "plant/") + &rule("out", "commands/#", "", "plant/");
    let bridge = fabric.bridge(&remote("mosquitto", port, "5", &rules)).await;
    let app = fabric.client("app").await;
    let mut readings = app.subscribe("plant/sensors/#").await.unwrap();
    drop(mosquitto);
    until(&bridge, |remote| !remote.connected).await;
    assert!(bridge.status()[0].last_error.is_some());
    for _ in 0..3 {
        publish(&app, "plant/commands/stop", "now").await;
    }
    until(&bridge, |remote| remote.rules[1].in_flight == 3).await;

    let _mosquitto = Mosquitto::start_on(port, "").expect("the port is free again");
    until(&bridge, |remote| remote.rules[1].forwarded_out == 3).await;
    soon(bridge.ready()).await;
    assert_eq!(bridge.status()[0].connections, 2);
    let mut sensor = Sensor::connect(port, "sensor").await;
    sensor
        .publish("sensors/7", "21", PublishProperties::default())
        .await;
    assert_eq!(&*next(&mut readings).await.payload, b"21");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_while_the_bridge_was_stopped_is_carried_afterwards() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let rules = rule("in", "sensors/#", "", "plant/") + &rule("out", "commands/#", "", "plant/");
    let remotes = remote("mosquitto", mosquitto.port, "5", &rules);
    let bridge = fabric.bridge(&remotes).await;
    soon(bridge.shutdown()).await;

    let app = fabric.client("app").await;
    let mut readings = app.subscribe("plant/sensors/#").await.unwrap();
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;
    sensor.subscribe("commands/#").await;
    publish(&app, "plant/commands/stop", "now").await;
    sensor
        .publish("sensors/7", "21", PublishProperties::default())
        .await;

    let _bridge = fabric.bridge(&remotes).await;
    assert_eq!(&*sensor.message().await.payload, b"now");
    assert_eq!(&*next(&mut readings).await.payload, b"21");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_rule_stops_the_start_and_a_denied_message_does_not_hold_up_others() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let denied = remote("m", mosquitto.port, "5", &rule("out", "#", "", "secret/"));
    let error = Bridge::start(fabric.config(&denied)).await.unwrap_err();
    assert!(
        matches!(&error, StartError::Subscribe { remote, filter, .. }
            if remote == "m" && filter.as_str() == "secret/#"),
        "{error}"
    );

    let rules = rule("in", "+/#", "", "");
    let bridge = fabric
        .bridge(&remote("m", mosquitto.port, "5", &rules))
        .await;
    let app = fabric.client("app").await;
    let mut open = app.subscribe("open/#").await.unwrap();
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;
    sensor
        .publish("secret/a", "1", PublishProperties::default())
        .await;
    sensor
        .publish("open/a", "2", PublishProperties::default())
        .await;
    assert_eq!(&*next(&mut open).await.payload, b"2");
    until(&bridge, |remote| {
        remote.rules[0].dropped.get(&DropReason::Refused) == Some(&1)
    })
    .await;
    let error = bridge.status()[0].rules[0].last_error.clone().unwrap();
    assert!(error.contains("no secrets"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_arrives_whole_and_in_order() {
    if !mosquitto::is_installed() {
        return;
    }
    const MESSAGES: usize = 5000;
    let (mosquitto, fabric) = (
        Mosquitto::start("max_queued_messages 0\n"),
        Fabric::start().await,
    );
    let rules = rule("in", "in/#", "", "plant/") + &rule("out", "out/#", "", "plant/");
    let _bridge = fabric
        .bridge(&remote("m", mosquitto.port, "5", &rules))
        .await;
    let app = fabric.client("app").await;
    let mut local = app.subscribe("plant/in/#").await.unwrap();
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;
    sensor.subscribe("out/#").await;

    let publisher = app.clone();
    let published = tokio::spawn(async move {
        for number in 0..MESSAGES {
            let message = Publish::new("plant/out/a", number.to_string()).qos(Qos::AtLeastOnce);
            publisher.publish_message(message).await.unwrap();
        }
    });
    let feeder = sensor.client.clone();
    let fed = tokio::spawn(async move {
        for number in 0..MESSAGES {
            feeder
                .publish("in/a", QoS::AtLeastOnce, false, number.to_string())
                .await
                .unwrap();
        }
    });
    let received = tokio::spawn(async move {
        for number in 0..MESSAGES {
            assert_eq!(sensor.message().await.payload, number.to_string());
        }
        sensor
    });
    for number in 0..MESSAGES {
        assert_eq!(next(&mut local).await.payload, number.to_string());
    }
    soon(published).await.unwrap();
    // The event loop must go on until everything is fed.
    let mut sensor = soon(received).await.unwrap();
    tokio::select! {
        fed = soon(fed) => fed.unwrap(),
        _ = sensor.message() => panic!("nothing more should come"),
    }
}

/// Starts a bridge on the store of one that has just ended.
async fn start_again(fabric: &Fabric, remotes: &str) -> Bridge {
    soon(async {
        loop {
            match Box::pin(Bridge::start(fabric.config(remotes))).await {
                // Its thread is about to let go of the folder.
                Err(StartError::Store(_)) => tokio::task::yield_now().await,
                started => return started.unwrap(),
            }
        }
    })
    .await
}

async fn get(address: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: bridge\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_takes_over_while_the_fabric_is_away_and_outlives_the_bridge() {
    if !mosquitto::is_installed() {
        return;
    }
    let (mosquitto, fabric) = (Mosquitto::start(""), Fabric::start().await);
    let rules = rule("in", "sensors/#", "", "plant/") + "qos = 2\n";
    let remotes = "[store]\nfolder = \"store\"\n[admin]\nlisten = \"127.0.0.1:0\"\n".to_owned()
        + &remote("mosquitto", mosquitto.port, "5", &rules);
    let bridge = fabric.bridge(&remotes).await;
    let admin = bridge.admin().unwrap();
    assert!(get(admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    let mut sensor = Sensor::connect(mosquitto.port, "sensor").await;

    let Fabric {
        authority,
        dir,
        server,
        address,
    } = fabric;
    soon(server.shutdown()).await;
    for number in 1..=3 {
        sensor.retain(&format!("sensors/{number}")).await;
    }
    until(&bridge, |remote| remote.inward.kept == 3).await;
    assert!(get(admin, "/readyz").await.starts_with("HTTP/1.1 503"));
    let line = r#"selvedge_bridge_queued_messages{remote="mosquitto",direction="in"} 3"#;
    let metrics = get(admin, "/metrics").await;
    assert!(metrics.contains(line), "{metrics}");
    drop(bridge);

    // It comes back before the fabric does, and takes a message meanwhile.
    let there = Fabric {
        server: soon(serve(&authority, ([127, 0, 0, 1], 0).into())).await,
        authority,
        dir,
        address,
    };
    let bridge = start_again(&there, &remotes).await;
    sensor.retain("sensors/4").await;
    until(&bridge, |remote| remote.inward.messages == 4).await;
    assert!(!bridge.status()[0].fabric_connected);
    let Fabric { authority, dir, .. } = there;
    let fabric = Fabric {
        server: soon(serve(&authority, address)).await,
        authority,
        dir,
        address,
    };
    let app = fabric.client("app").await;
    let mut readings = app.subscribe("plant/#").await.unwrap();
    soon(bridge.ready()).await;
    // Whether live or retained: each once.
    let mut seen = Vec::new();
    for _ in 1..=4 {
        seen.push(next(&mut readings).await.topic.to_string());
    }
    seen.sort();
    let expected: Vec<String> = (1..=4)
        .map(|number| format!("plant/sensors/{number}"))
        .collect();
    assert_eq!(seen, expected);
    until(&bridge, |remote| remote.inward.messages == 0).await;
    soon(bridge.shutdown()).await;
}

#[test]
fn the_guide_shows_a_configuration_that_is_one() {
    let guide = include_str!("../../docs/bridge.md");
    let (_, rest) = guide.split_once("```toml\n").unwrap();
    let (text, _) = rest.split_once("```").unwrap();
    let authority = Authority::create("example.test").unwrap();
    let issued = authority
        .issue(&IssueRequest::client("acme", "plant-7", "bridge"))
        .unwrap();
    let dir = TempDir::new().unwrap();
    let write =
        |name: &str, text: &str| std::fs::write(Path::join(dir.path(), name), text).unwrap();
    write("ca.pem", authority.ca_pem());
    write("plant-7-ca.pem", authority.ca_pem());
    write("bridge-plant-7.crt", &issued.cert_pem);
    write("bridge-plant-7.key", &issued.key_pem);
    write("mosquitto.password", "secret\n");
    let config = BridgeConfig::parse(text, dir.path()).unwrap();
    assert_eq!(config.remotes[0].rules.len(), 2);
}
