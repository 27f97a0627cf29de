#![allow(clippy::unwrap_used)]
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::ClientRequestBuilder;

use super::*;
use crate::metrics::ListenerReason;

const MAX_PACKET: usize = 64 * 1024;

/// A page that may connect.
const PANEL: &str = "https://panel.example.org";

type Client = WebSocketStream<DuplexStream>;
type Server = WebSocket<DuplexStream>;

fn report() -> Report {
    let metrics = Arc::new(Metrics::default());
    Report::new(&metrics, "ws", ([192, 0, 2, 1], 5000).into())
}

fn request() -> ClientRequestBuilder {
    ClientRequestBuilder::new("ws://broker.example.org/mqtt".parse().unwrap())
}

async fn open(
    request: ClientRequestBuilder,
) -> (Result<Client, Error>, Result<Server, UpgradeError>) {
    let (client, server) = duplex(4 * MAX_PACKET);
    let origins = Origins::parse(&[PANEL]).unwrap();
    let (client, server) = tokio::join!(
        client_async(request, client),
        accept(server, &origins, OwnOrigin::Addressed, MAX_PACKET, report()),
    );
    (client.map(|(client, _)| client), server)
}

async fn connected() -> (Client, Server) {
    let (client, server) = open(request().with_sub_protocol("mqtt")).await;
    (client.unwrap(), server.unwrap())
}

#[tokio::test]
async fn frames_are_a_stream_whatever_their_size() {
    let (mut client, mut server) = connected().await;
    for piece in [&b"ab"[..], b"", b"cdef", b"g"] {
        let frame = Message::Binary(Bytes::copy_from_slice(piece));
        client.send(frame).await.unwrap();
    }
    client
        .send(Message::Ping("still there?".into()))
        .await
        .unwrap();
    client.send(Message::Binary("h".into())).await.unwrap();
    let mut read = [0; 8];
    server.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"abcdefgh");

    let large = vec![7; 3 * WRITE / 2];
    server.write_all(&large).await.unwrap();
    server.flush().await.unwrap();
    let mut came = Vec::new();
    let mut ponged = false;
    while came.len() < large.len() {
        match client.next().await.unwrap().unwrap() {
            Message::Binary(frame) => came.extend_from_slice(&frame),
            Message::Pong(what) => ponged = what == "still there?",
            other => panic!("found {other:?}"),
        }
    }
    assert_eq!((came == large, ponged), (true, true));

    client.close(None).await.unwrap();
    assert_eq!(server.read(&mut read).await.unwrap(), 0);
}

#[tokio::test]
async fn text_and_what_is_too_large_end_the_connection() {
    for (frame, code, what) in [
        (
            Message::Text("\u{10}".into()),
            CloseCode::Unsupported,
            "a WebSocket frame of text",
        ),
        (
            Message::Binary(vec![0; MAX_PACKET + BESIDE_A_PACKET + 1].into()),
            CloseCode::Size,
            "a WebSocket frame that is too large",
        ),
    ] {
        let (mut client, mut server) = connected().await;
        client.send(frame).await.unwrap();
        let error = server.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.to_string(), what);
        match client.next().await {
            Some(Ok(Message::Close(Some(close)))) => {
                assert_eq!((close.code, close.reason.as_str()), (code, what));
            }
            other => panic!("expected a close frame, found {other:?}"),
        }
        let label = ListenerReason {
            listener: "ws",
            reason: what,
        };
        let counted = server
            .report
            .metrics
            .protocol_errors
            .get_or_create(&label)
            .get();
        assert_eq!(counted, 1);
    }
}

#[tokio::test]
async fn a_frame_that_is_too_large_is_refused_by_its_head() {
    let (client, mut server) = connected().await;
    // The head of a masked binary frame of a gigabyte, and nothing of it.
    let mut head = vec![0x82, 0xFF];
    head.extend_from_slice(&(1u64 << 30).to_be_bytes());
    head.extend_from_slice(&[0; 4]);
    let mut raw = client.into_inner();
    raw.write_all(&head).await.unwrap();
    let error = server.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.to_string(), "a WebSocket frame that is too large");
}

#[tokio::test]
async fn who_is_not_answered_yet_sends_little() {
    let (client, server) = duplex(4 * BEFORE_AN_ANSWER);
    let origins = Origins::default();
    let request = request().with_sub_protocol("mqtt");
    let (client, server) = tokio::join!(
        client_async(request, client),
        accept(server, &origins, OwnOrigin::Addressed, 16 << 20, report()),
    );
    let (mut client, mut server) = (client.unwrap().0, server.unwrap());
    let large = Message::Binary(vec![0; BEFORE_AN_ANSWER].into());
    client.send(large.clone()).await.unwrap();
    let error = server.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "more than a CONNECT before it was answered"
    );

    // The same after an answer.
    let (client, server) = duplex(4 * BEFORE_AN_ANSWER);
    let request = self::request().with_sub_protocol("mqtt");
    let (client, server) = tokio::join!(
        client_async(request, client),
        accept(server, &origins, OwnOrigin::Addressed, 16 << 20, report()),
    );
    let (mut client, mut server) = (client.unwrap().0, server.unwrap());
    server.write_all(b"CONNACK").await.unwrap();
    client.send(large).await.unwrap();
    let mut read = vec![1; BEFORE_AN_ANSWER];
    server.read_exact(&mut read).await.unwrap();
}

#[tokio::test]
async fn only_mqtt_from_known_pages_or_none_is_upgraded() {
    for (request, refused, status) in [
        (request(), UpgradeError::Subprotocol, 400),
        (
            request().with_sub_protocol("mqttv3.1"),
            UpgradeError::Subprotocol,
            400,
        ),
        (
            request()
                .with_sub_protocol("mqtt")
                .with_header("Origin", "https://elsewhere.example.org"),
            UpgradeError::Origin,
            403,
        ),
        // A page may have its name point at this machine after it was loaded.
        (
            request()
                .with_sub_protocol("mqtt")
                .with_header("Origin", "http://broker.example.org"),
            UpgradeError::Origin,
            403,
        ),
        (
            request()
                .with_sub_protocol("mqtt")
                .with_header("Origin", "null"),
            UpgradeError::Origin,
            403,
        ),
    ] {
        let (client, server) = open(request).await;
        assert_eq!(server.unwrap_err(), refused);
        match client.unwrap_err() {
            Error::Http(answer) => assert_eq!(answer.status(), status),
            other => panic!("found {other:?}"),
        }
    }
    for request in [
        request()
            .with_sub_protocol("mqttv3.1")
            .with_sub_protocol("mqtt"),
        request()
            .with_sub_protocol("mqtt")
            .with_header("Origin", PANEL),
    ] {
        let (client, server) = open(request).await;
        assert_eq!((client.is_ok(), server.is_ok()), (true, true));
    }
}

#[tokio::test]
async fn what_is_no_upgrade_is_refused() {
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n"[..],
        b"\x10\x0c\0\x04MQTT\x05\x02\0\0\0\0\r\n\r\n",
    ] {
        let (mut client, server) = duplex(4096);
        client.write_all(bytes).await.unwrap();
        let accepted = accept(
            server,
            &Origins::default(),
            OwnOrigin::Addressed,
            MAX_PACKET,
            report(),
        )
        .await;
        assert_eq!(accepted.unwrap_err(), UpgradeError::NoUpgrade);
    }
    let (client, server) = duplex(4096);
    drop(client);
    let accepted = accept(
        server,
        &Origins::default(),
        OwnOrigin::Addressed,
        MAX_PACKET,
        report(),
    )
    .await;
    assert_eq!(accepted.unwrap_err(), UpgradeError::NoUpgrade);
    // Half of a request is waited for.
    let (mut client, server) = duplex(4096);
    client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let origins = Origins::default();
    let accepted = accept(server, &origins, OwnOrigin::Addressed, MAX_PACKET, report());
    let accepted = tokio::time::timeout(Duration::from_millis(20), accepted).await;
    assert!(accepted.is_err());
}

#[test]
fn the_listeners_own_origin_is_believed_where_no_page_can_have_it() {
    let allows = |own: OwnOrigin, origin: &str, host: &str| {
        own.allows(origin.as_bytes(), Some(host.as_bytes()))
    };
    let both = [OwnOrigin::Named, OwnOrigin::Addressed];
    for host in [
        "127.0.0.1:8083",
        "[::1]:8083",
        "localhost:8083",
        "LOCALHOST:8083",
    ] {
        for own in both {
            assert!(
                allows(own, &format!("https://{}", host.to_lowercase()), host),
                "{host}"
            );
            assert!(!allows(own, "http://localhost:3000", host), "{host}");
        }
    }
    let named = ("https://broker.example.org:8084", "broker.example.org:8084");
    assert!(allows(OwnOrigin::Named, named.0, named.1));
    assert!(!allows(OwnOrigin::Addressed, named.0, named.1));
    for own in both {
        assert!(!allows(own, "null", "null"));
        assert!(!own.allows(b"https://localhost", None));
    }
}

#[test]
fn origins_are_read_as_browsers_write_them() {
    let origins = Origins::parse(&["https://Panel.example.org", "http://[::1]:3000"]).unwrap();
    assert!(origins.allow(b"https://panel.example.org"));
    assert!(origins.allow(b"http://[::1]:3000"));
    assert!(!origins.allow(b"https://panel.example.org:8443"));
    assert!(!origins.allow(b"http://panel.example.org"));
    for bad in [
        "",
        "*",
        "null",
        "panel.example.org",
        "https://",
        "https://panel.example.org/",
        "https://panel.example.org/mqtt",
        "wss://panel.example.org",
        "https://a@panel.example.org",
    ] {
        let error = Origins::parse(&[bad]).unwrap_err();
        assert_eq!(error.found, bad);
    }
}
