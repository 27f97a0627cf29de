//! Stories about time and partitions, in a simulated network.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ServerConfig, TransportConfig};
use selvedge_certs::{ALPN, quic_server_config};
use selvedge_tests::{TestPki, log, raw, sim};
use tokio::time::Instant;

const PORT: u16 = 7443;

fn network(seed: u64) -> turmoil::Sim<'static> {
    turmoil::Builder::new()
        .simulation_duration(Duration::from_secs(300))
        .min_message_latency(Duration::from_millis(2))
        .max_message_latency(Duration::from_millis(8))
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
