//! A certificate is withdrawn: who holds it is let in nowhere, and out if already in.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use selvedge_broker::Config;
use selvedge_broker::mqtt::password::{Passwords, set_user};
use selvedge_certs::{Authority, Serial};
use selvedge_client::{
    Client, Code, ConnectError, Credentials, Publish, Qos, TopicName, TrustAnchors, Will,
};
use selvedge_proto::wire::control::Frame;
use selvedge_tests::pki::SERVER_NAME;
use selvedge_tests::raw::{control_frame, hello};
use selvedge_tests::wait::{LIMIT, within};
use selvedge_tests::{
    MqttOptions, MqttPeer, MqttVersion, RawQuic, TestBroker, TestPki, broker, raw,
};

use super::pubsub::next;

const REFUSED: &str = "selvedge_refused_connections_total";
const EVICTED: &str = "selvedge_evicted_connections_total";
const BOTH: [MqttVersion; 2] = [MqttVersion::V311, MqttVersion::V5];
const MONTH: Duration = Duration::from_secs(30 * 86_400);

/// A broker on which both listeners that ask for certificates are open.
async fn plant() -> TestBroker {
    TestBroker::with(broker::OPEN, |config, _| {
        config.mqtt.tls = Some(([127, 0, 0, 1], 0).into());
    })
    .await
}

/// A certificate whose file is at hand, so that it can be withdrawn.
pub(super) struct Device {
    pub(super) credentials: Credentials,
    cert_pem: Vec<u8>,
}

impl Device {
    pub(super) fn new(pki: &TestPki, name: &str) -> Self {
        let files = pki.device_files("acme", "plant-1", name);
        Self {
            credentials: Credentials::from_files(&files.cert, &files.key).unwrap(),
            cert_pem: std::fs::read(&files.cert).unwrap(),
        }
    }

    /// As the broker names it: identity and serial number.
    fn title(&self) -> String {
        let description = self.credentials.description();
        let (title, _) = description.split_once(", valid until").unwrap();
        format!("{title})")
    }
}

/// The authority's list with these certificates on it, as a broker takes it.
fn list(pki: &TestPki, devices: &[&Device]) -> TrustAnchors {
    let ca = pki.ca_file();
    let dir = ca.parent().unwrap();
    let authority = Authority::load(dir).unwrap();
    let serials: Vec<Serial> = devices
        .iter()
        .map(|device| authority.serial_of(&device.cert_pem).unwrap().0)
        .collect();
    let written = authority.revoke(dir, &serials, MONTH).unwrap();
    pki.anchors()
        .with_revocations_of_file(&written.path)
        .unwrap()
}

/// Withdraws certificates and has the broker take that over, as SIGHUP does.
pub(super) fn revoke(broker: &mut TestBroker, devices: &[&Device]) {
    broker.config.trust = list(&broker.pki, devices);
    broker.reload_config();
}

fn mqtt(broker: &TestBroker, version: MqttVersion, device: &Device, id: &str) -> MqttOptions {
    let tls = broker.pki.tls_client(Some(&device.credentials));
    MqttOptions::new(version, broker.mqtts(), id).tls(SERVER_NAME, tls)
}

async fn counted(broker: &TestBroker, metric: &str, listener: &str, reason: &str, count: u64) {
    let labels = [("listener", listener), ("reason", reason)];
    broker.metric_reaches(metric, &labels, count).await;
    assert_eq!(broker.metric(metric, &labels).await, count);
}

#[tokio::test]
async fn a_revoked_device_is_refused_on_every_listener_and_told_why_where_that_can_be_said() {
    let mut broker = plant().await;
    let device = Device::new(&broker.pki, "press-7");
    revoke(&mut broker, &[&device]);

    let connecting = Client::connect(broker.options(device.credentials.clone()));
    match within("the refusal", connecting).await.unwrap_err() {
        ConnectError::Refused { reason } => assert_eq!(
            reason,
            format!(
                "certificate {} refused: was revoked by its authority; issue a new one",
                device.title()
            )
        ),
        other => panic!("{other:?}"),
    }
    counted(&broker, REFUSED, "quic", "revoked", 1).await;

    // All that TLS over TCP has for it is an alert.
    for version in BOTH {
        let options = mqtt(&broker, version, &device, "press-7");
        let reason = MqttPeer::connect(options).await.unwrap_err();
        assert!(reason.contains("CertificateUnknown"), "{reason}");
    }
    counted(&broker, REFUSED, "mqtts", "revoked", 2).await;
    assert_eq!(broker.metric("selvedge_sessions", &[]).await, 0);

    // It is the certificate that is revoked, not the device.
    broker.client("press-7").await;
}

#[tokio::test]
async fn a_password_does_not_make_up_for_a_revoked_certificate() {
    let mut broker = TestBroker::with(broker::OPEN, |config, pki| {
        let file = pki.ca_file().with_file_name("users.toml");
        let meter = pki.device("acme", "plant-1", "meter").identity().clone();
        set_user(&file, "meter", &meter, "water").unwrap();
        config.mqtt.tls = Some(([127, 0, 0, 1], 0).into());
        config.mqtt.passwords = Some(Passwords::load(&file).unwrap());
    })
    .await;
    let device = Device::new(&broker.pki, "press-7");
    revoke(&mut broker, &[&device]);
    let options = mqtt(&broker, MqttVersion::V5, &device, "press-7").login("meter", "water");
    let reason = MqttPeer::connect(options).await.unwrap_err();
    assert!(reason.contains("CertificateUnknown"), "{reason}");
    counted(&broker, REFUSED, "mqtts", "revoked", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connected_device_is_evicted_when_its_certificate_is_revoked_and_no_other_is() {
    let mut broker = plant().await;
    let (bad, good) = (
        Device::new(&broker.pki, "press-7"),
        Device::new(&broker.pki, "press-8"),
    );
    let config =
        |device: &Device| raw::quic_config(device.credentials.clone(), &broker.pki.anchors());
    let native = RawQuic::connect(broker.quic(), config(&bad)).await.unwrap();
    let mut control = native.greet("press-7").await.unwrap();
    let mut old = MqttPeer::connect(mqtt(&broker, MqttVersion::V311, &bad, "old"))
        .await
        .unwrap();
    let mut new = MqttPeer::connect(mqtt(&broker, MqttVersion::V5, &bad, "new"))
        .await
        .unwrap();
    let stays = broker
        .connect(broker.options(good.credentials.clone()))
        .await;
    let mut seen = stays.subscribe("a").await.unwrap();
    let mut meter = MqttPeer::connect(mqtt(&broker, MqttVersion::V5, &good, "meter"))
        .await
        .unwrap();
    meter.subscribe("a", 1).await;

    revoke(&mut broker, &[&bad]);
    let words = format!(
        "certificate revoked: {} was revoked by its authority; issue a new one",
        bad.title()
    );
    match control.read().await.unwrap() {
        Frame::Goodbye(goodbye) => {
            let status = selvedge_client::Status::from(goodbye.status.unwrap());
            assert_eq!(status.code, Code::Unauthenticated);
            assert_eq!(status.message, words);
            assert_eq!(goodbye.retry_after_ms, None);
        }
        other => panic!("{other:?}"),
    }
    match native.closed().await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            assert_eq!(
                close.error_code,
                quinn::VarInt::from_u32(Code::Unauthenticated.to_quic())
            );
            assert_eq!(close.reason, words.as_bytes());
        }
        other => panic!("{other:?}"),
    }
    old.closed().await;
    new.closed().await;
    counted(&broker, EVICTED, "quic", "revoked", 1).await;
    counted(&broker, EVICTED, "mqtts", "revoked", 2).await;

    let publish = Publish::new("a", "x").qos(Qos::AtLeastOnce);
    stays.publish_message(publish).await.unwrap();
    assert_eq!(next(&mut seen).await.payload, "x");
    assert_eq!(meter.message().await.payload, "x");
    assert_eq!(stays.stats().reconnects, 0);
    // None of them comes back.
    let options = mqtt(&broker, MqttVersion::V5, &bad, "new");
    MqttPeer::connect(options).await.unwrap_err();
    // The same list again evicts nobody.
    broker.reload_config();
    assert_eq!(broker.metric(EVICTED, &[]).await, 3);
}

/// The bytes an MQTT client reads from CONNECT to the end of its connection.
fn read_to_the_end(
    broker: std::net::SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    connect: &[u8],
    connected: impl FnOnce(),
) -> Vec<u8> {
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let connection = rustls::ClientConnection::new(tls, name).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, TcpStream::connect(broker).unwrap());
    stream.sock.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(connect).unwrap();
    let mut head = [0; 2];
    stream.read_exact(&mut head).unwrap();
    let mut rest = vec![0; head[1].into()];
    stream.read_exact(&mut rest).unwrap();
    assert_eq!((head[0], rest[1]), (0x20, 0), "CONNACK, Success");
    connected();
    let mut read = Vec::new();
    stream.read_to_end(&mut read).unwrap();
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn mqtt_5_is_told_why_it_is_evicted_and_3_1_1_has_no_word_for_it() {
    let mut broker = plant().await;
    let device = Device::new(&broker.pki, "press-7");
    let tls = broker.pki.tls_client(Some(&device.credentials));
    let v311 = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01a";
    let v5 = b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x01b";
    let (ready, mut readies) = tokio::sync::mpsc::channel(2);
    let mut peers = [&v311[..], &v5[..]].map(|connect| {
        let (ready, tls, address) = (ready.clone(), tls.clone(), broker.mqtts());
        tokio::task::spawn_blocking(move || {
            read_to_the_end(address, tls, connect, || ready.blocking_send(()).unwrap())
        })
    });
    for _ in 0..2 {
        within("both to be connected", readies.recv())
            .await
            .unwrap();
    }
    revoke(&mut broker, &[&device]);
    let [old, new] = &mut peers;
    assert_eq!(within("the end", old).await.unwrap(), b"");
    let disconnect = within("the end", new).await.unwrap();
    let words = format!(
        "certificate revoked: {} was revoked by its authority; issue a new one",
        device.title()
    );
    // DISCONNECT, Not authorized (0x87), with nothing but a reason string (0x1F). A length from 0x80
    // to 0xff is written as itself and 1.
    let length = u8::try_from(words.len()).unwrap();
    let block = length + 3;
    assert!((0x80..0xfd).contains(&block), "{block}");
    let mut expected = vec![0xE0, block + 3, 1, 0x87, block, 1, 0x1F, 0, length];
    expected.extend_from_slice(words.as_bytes());
    assert_eq!(disconnect, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wills_of_evicted_devices_are_published_at_once_or_after_their_delay() {
    let mut broker = plant().await;
    let bad = Device::new(&broker.pki, "press-7");
    let watcher = broker.client("watcher").await;
    let mut wills = watcher.subscribe("gone/#").await.unwrap();
    let delay = Duration::from_secs(1);
    let will = |topic: &str| Will::new(topic.parse().unwrap(), "x").qos(Qos::AtLeastOnce);
    let options = broker
        .options(bad.credentials.clone())
        .session_expiry(MONTH)
        .will(will("gone/late").delay(delay));
    let late = broker.connect(options).await;
    let soon = broker.options(bad.credentials.clone());
    let soon = broker.connect(soon.will(will("gone/soon"))).await;
    let meter = mqtt(&broker, MqttVersion::V5, &bad, "meter").will("gone/mqtt", "x");
    let meter = MqttPeer::connect(meter).await.unwrap();

    let began = Instant::now();
    revoke(&mut broker, &[&bad]);
    let mut first = [next(&mut wills).await, next(&mut wills).await].map(|will| will.topic);
    first.sort();
    assert_eq!(
        first.each_ref().map(TopicName::as_str),
        ["gone/mqtt", "gone/soon"]
    );
    let last = next(&mut wills).await;
    assert_eq!(last.topic.as_str(), "gone/late");
    assert!(began.elapsed() >= delay, "{:?}", began.elapsed());
    drop((late, soon, meter));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_not_said_hello_yet_gets_no_session() {
    let mut broker = plant().await;
    let bad = Device::new(&broker.pki, "press-7");
    let config = raw::quic_config(bad.credentials.clone(), &broker.pki.anchors());
    let native = RawQuic::connect(broker.quic(), config).await.unwrap();
    let labels = [("listener", "quic")];
    broker
        .metric_reaches("selvedge_accepted_connections_total", &labels, 1)
        .await;
    revoke(&mut broker, &[&bad]);
    let (mut send, _receive) = native.connection.open_bi().await.unwrap();
    send.write_all(&control_frame(hello("press-7")))
        .await
        .unwrap();
    match native.closed().await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            assert!(
                close.reason.starts_with(b"certificate revoked: "),
                "{close:?}"
            );
        }
        other => panic!("{other:?}"),
    }
    counted(&broker, REFUSED, "quic", "revoked", 1).await;
    assert_eq!(broker.metric(EVICTED, &[]).await, 0);
    assert_eq!(broker.metric("selvedge_sessions", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_is_no_longer_trusted_takes_its_devices_with_it() {
    let mut broker = plant().await;
    let other = TestPki::new();
    let both = [broker.pki.ca_file(), other.ca_file()].map(|file| std::fs::read(file).unwrap());
    broker.config.trust = TrustAnchors::from_pem(&both.concat()).unwrap();
    broker.reload_config();
    let stays = broker.client("press-7").await;
    let config = raw::quic_config(
        other.device("acme", "plant-1", "press-8"),
        &broker.pki.anchors(),
    );
    let goes = RawQuic::connect(broker.quic(), config).await.unwrap();
    let mut control = goes.greet("press-8").await.unwrap();

    broker.config.trust = broker.pki.anchors();
    broker.reload_config();
    match control.read().await.unwrap() {
        Frame::Goodbye(goodbye) => {
            let status = goodbye.status.unwrap();
            assert!(
                status.message.starts_with(
                    "certificate no longer accepted: spiffe://test.example/acme/plant-1/press-8 "
                ),
                "{status:?}"
            );
        }
        other => panic!("{other:?}"),
    }
    counted(&broker, EVICTED, "quic", "certificate_refused_here", 1).await;
    stays.flush().await.unwrap();
    assert_eq!(stays.stats().reconnects, 0);
}

#[tokio::test]
async fn a_client_with_a_list_refuses_a_revoked_broker() {
    let mut broker = TestBroker::open().await;
    let files = broker.pki.server_files();
    let revoked = Device {
        credentials: Credentials::from_files(&files.cert, &files.key).unwrap(),
        cert_pem: std::fs::read(&files.cert).unwrap(),
    };
    broker.config.credentials = revoked.credentials.clone();
    broker.reload_config();
    let options = broker
        .options(broker.device("press-7"))
        .trust(list(&broker.pki, &[&revoked]));
    match within("the refusal", Client::connect(options))
        .await
        .unwrap_err()
    {
        ConnectError::Tls { reason } => assert_eq!(
            reason,
            format!(
                "certificate {} refused: was revoked by its authority; issue a new one",
                revoked.title()
            )
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_configured_list_must_be_there_whole_and_of_a_trusted_authority() {
    let pki = TestPki::new();
    let files = pki.server_files();
    let dir = pki.ca_file().parent().unwrap().to_owned();
    let text = |path: &Path| path.display().to_string();
    std::fs::write(dir.join("policy.toml"), broker::OPEN).unwrap();
    let config = format!(
        "[identity]\ncert = {:?}\nkey = {:?}\ntrust = \"ca.pem\"\ncrl = \"crl.pem\"\n\
         [policy]\nfile = \"policy.toml\"\n[listen]\nquic = \"127.0.0.1:0\"\n",
        text(&files.cert),
        text(&files.key)
    );
    let problem = || {
        let errors = Config::parse(&config, &dir).unwrap_err();
        let [problem] = &errors.0[..] else {
            panic!("{errors}")
        };
        assert_eq!(problem.key, "identity.crl");
        problem.problem.clone()
    };
    let crl = dir.join("crl.pem");
    assert!(problem().starts_with(&format!("cannot read {}: ", text(&crl))));
    list(&pki, &[]);
    assert_eq!(Config::parse(&config, &dir).unwrap().trust.revoked(), 0);
    list(&pki, &[&Device::new(&pki, "press-7")]);
    assert_eq!(Config::parse(&config, &dir).unwrap().trust.revoked(), 1);

    let whole = std::fs::read_to_string(&crl).unwrap();
    std::fs::write(&crl, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(
        problem(),
        format!(
            "{} is not valid PEM: a section has no END line; export it again",
            text(&crl)
        )
    );
    let stranger = TestPki::new();
    list(&stranger, &[]);
    std::fs::copy(stranger.ca_file().with_file_name("crl.pem"), &crl).unwrap();
    assert_eq!(
        problem(),
        format!(
            "{} cannot be used as revocation list: it is signed by nobody who is trusted here (issuer \
             CN=Selvedge authority of test.example); expected a list of one of the trust anchors",
            text(&crl)
        )
    );
}
