//! What the default durability is worth: the process is killed, and nothing acknowledged is lost.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use selvedge_client::{Client, Durability, Options, Publish, Qos};

use crate::program::{Running, selvedge, text};

const HOUR: Duration = Duration::from_secs(3600);
/// Longer than anything takes on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// `selvedge dev` with its defaults but for the ports. Dropping it is `kill -9`.
fn start(dir: &Path) -> (Running, String) {
    let dir = text(dir);
    let mut args = vec!["dev", "--no-workers", "--dir", &dir];
    for flag in ["--quic", "--mqtt", "--mqtts", "--admin"] {
        args.extend([flag, "127.0.0.1:0"]);
    }
    let process = Running::start(selvedge(args));
    let lines = process.lines_to("ready");
    let quic = lines.iter().find_map(|line| line.strip_prefix("quic="));
    let quic = quic.expect("dev prints where it listens").to_owned();
    (process, quic)
}

fn options(dir: &Path, quic: &str) -> Options {
    let pki = dir.join("pki");
    let admin = pki.join("dev/local/admin");
    Options::new(quic)
        .and_then(|options| {
            options.identity_files(
                &pki.join("ca.pem"),
                &admin.join("cert.pem"),
                &admin.join("key.pem"),
            )
        })
        .expect("dev made these files")
}

async fn kept(dir: &Path, quic: &str) -> Client {
    let options = options(dir, quic).session("kept").session_expiry(HOUR);
    Client::connect(options)
        .await
        .expect("dev accepts its admin")
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_at_disk_is_lost_by_kill_9() {
    tokio::time::timeout(PATIENCE, story())
        .await
        .expect("the story ends in time");
}

async fn story() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (process, quic) = start(dir);
    let reader = kept(dir, &quic).await;
    let subscription = reader.subscribe("line/1").await.unwrap();
    reader.close().await;
    drop(subscription);

    // Many publish at once; the process is killed while some wait for their acknowledgement.
    let writer = Client::connect(options(dir, &quic)).await.unwrap();
    let (acked, mut acks) = tokio::sync::mpsc::channel(1000);
    for number in 0..1000u32 {
        let (writer, acked) = (writer.clone(), acked.clone());
        tokio::spawn(async move {
            let message = Publish::new("line/1", number.to_string()).qos(Qos::AtLeastOnce);
            if let Ok(ack) = writer.publish_message(message).await {
                assert_eq!(ack.durability, Some(Durability::Disk));
                acked.send(number).await.unwrap();
            }
        });
    }
    drop(acked);
    let mut kept_numbers = BTreeSet::new();
    while kept_numbers.len() < 200 {
        kept_numbers.insert(acks.recv().await.expect("some are acknowledged"));
    }
    drop(process);
    writer.close().await;
    while let Some(number) = acks.recv().await {
        kept_numbers.insert(number);
    }

    let (_process, quic) = start(dir);
    let reader = kept(dir, &quic).await;
    let mut subscription = reader.subscribe("line/1").await.unwrap();
    let mut missing = kept_numbers.clone();
    while !missing.is_empty() {
        let message = subscription
            .next()
            .await
            .expect("the kept session has them");
        let number: u32 = std::str::from_utf8(&message.payload)
            .unwrap()
            .parse()
            .unwrap();
        missing.remove(&number);
    }
}
