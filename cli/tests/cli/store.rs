//! A broker whose disk is full: it refuses what it cannot keep, goes on, and recovers by itself.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use selvedge_client::{Client, Code, Durability, Options, Publish, PublishError, Qos};

use crate::program::{Running, selvedge, text};

const HOUR: Duration = Duration::from_secs(3600);
/// Longer than anything takes on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(120);
const DISK: usize = 16 << 20;
const BALLAST: usize = 10 << 20;

/// A small disk of memory, mounted over a folder for the processes that enter its namespace.
struct SmallDisk {
    /// Holds the namespace, and with it the mount, as long as it runs.
    holder: Child,
    enter: &'static [&'static str],
    folder: PathBuf,
}

impl SmallDisk {
    /// # Errors
    /// This machine lets nobody mount, and why.
    fn mount(folder: &Path) -> Result<Self, String> {
        let mut refusals = Vec::new();
        let ways: [(&str, &[&str]); 2] = [
            ("-rm", &["-U", "-m", "--preserve-credentials"]),
            ("-m", &["-m"]),
        ];
        for (flags, enter) in ways {
            match Self::mount_with(flags, enter, folder) {
                Ok(disk) => return Ok(disk),
                Err(why) => refusals.push(format!("unshare {flags}: {why}")),
            }
        }
        Err(refusals.join("; "))
    }

    fn mount_with(
        flags: &str,
        enter: &'static [&'static str],
        folder: &Path,
    ) -> Result<Self, String> {
        let script = format!(
            "mount -t tmpfs -o size={DISK} tmpfs '{}' && echo mounted && exec cat",
            text(folder)
        );
        let mut holder = Command::new("unshare")
            .args([flags, "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("it was asked for");
        BufReader::new(stdout)
            .read_line(&mut line)
            .map_err(|error| error.to_string())?;
        if line != "mounted\n" {
            let mut why = String::new();
            let mut stderr = holder.stderr.take().expect("it was asked for");
            let _ = stderr.read_to_string(&mut why);
            let _ = holder.wait();
            return Err(why.trim().to_owned());
        }
        Ok(Self {
            holder,
            enter,
            folder: folder.to_owned(),
        })
    }

    /// A file of the disk, as this process sees it.
    fn file(&self, name: &str) -> PathBuf {
        let inside = self.folder.strip_prefix("/").expect("it is absolute");
        PathBuf::from(format!("/proc/{}/root", self.holder.id()))
            .join(inside)
            .join(name)
    }

    /// A command of the binary that sees the disk.
    fn selvedge(&self, args: &[&str]) -> Command {
        let plain = selvedge(args);
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.holder.id().to_string()])
            .args(self.enter)
            .arg("--")
            .arg(plain.get_program())
            .args(plain.get_args())
            .stdin(Stdio::null());
        for (name, _) in plain.get_envs() {
            command.env_remove(name);
        }
        command
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as well.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A broker with its store on the disk.
struct Broker {
    process: Running,
    quic: String,
    admin: String,
}

impl Broker {
    fn start(disk: &SmallDisk, config: &Path) -> Self {
        let process = Running::start(disk.selvedge(&["broker", "--config", &text(config)]));
        let lines = process.lines_to("ready");
        let value = |name: &str| {
            let found = lines.iter().find_map(|line| line.strip_prefix(name));
            found.expect("a broker prints where it listens").to_owned()
        };
        Self {
            quic: value("quic="),
            admin: value("admin="),
            process,
        }
    }

    /// The value of a metric.
    fn metric(&self, name: &str) -> String {
        let mut stream = TcpStream::connect(&self.admin).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let line = answer
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.expect("the metric is there").to_owned()
    }
}

/// The configuration and keys that `selvedge dev` makes, for ports of the system's choice.
fn configure(dir: &Path) -> PathBuf {
    let dir_text = text(dir);
    let mut args = vec!["dev", "--no-workers", "--dir", &dir_text];
    for flag in ["--quic", "--mqtt", "--mqtts", "--admin"] {
        args.extend([flag, "127.0.0.1:0"]);
    }
    let dev = Running::start(selvedge(args));
    dev.lines_to("ready");
    dev.stop();
    let made = fs::read_to_string(dir.join("broker.toml")).unwrap();
    let mut config = made;
    for port in ["7443", "8883", "1883", "9443"] {
        config = config.replace(&format!("127.0.0.1:{port}"), "127.0.0.1:0");
    }
    let file = dir.join("small-disk.toml");
    fs::write(&file, config).unwrap();
    file
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
        .expect("the broker accepts its admin")
}

/// 64 KiB that say which they are.
fn message(number: u32) -> Publish {
    let mut payload = number.to_be_bytes().to_vec();
    payload.resize(64 << 10, 0);
    Publish::new("line/1", payload).qos(Qos::AtLeastOnce)
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stderr)]
async fn a_full_disk_refuses_qos_1_and_nothing_acknowledged_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().canonicalize().unwrap();
    let config = configure(&dir);
    let disk = match SmallDisk::mount(&dir.join("store")) {
        Ok(disk) => disk,
        Err(why) => {
            eprintln!("SKIPPED: the test of a full disk needs to mount a tmpfs: {why}");
            return;
        }
    };
    tokio::time::timeout(PATIENCE, story(&dir, &config, &disk))
        .await
        .expect("the story ends in time");
}

async fn story(dir: &Path, config: &Path, disk: &SmallDisk) {
    fs::write(disk.file("ballast"), vec![1; BALLAST]).unwrap();
    let broker = Broker::start(disk, config);
    let reader = kept(dir, &broker.quic).await;
    let subscription = reader.subscribe("line/1").await.unwrap();
    reader.close().await;
    drop(subscription);

    let writer = Client::connect(options(dir, &broker.quic)).await.unwrap();
    let mut acked = BTreeSet::new();
    let refused = loop {
        let number = acked.len() as u32;
        match writer.publish_message(message(number)).await {
            Ok(ack) => {
                assert_eq!(ack.durability, Some(Durability::Disk));
                acked.insert(number);
            }
            Err(error) => break error,
        }
        assert!(acked.len() * (64 << 10) < DISK, "more than the disk holds");
    };
    let PublishError::Refused(status) = refused else {
        panic!("{refused}");
    };
    assert_eq!(status.code, Code::ResourceExhausted);
    assert_eq!(
        status.message,
        "the store failed: No space left on device (os error 28)"
    );
    assert!(!acked.is_empty());
    assert_eq!(broker.metric("selvedge_store_failing"), "1");

    // It goes on, and QoS 0 needs no disk.
    let live = Client::connect(options(dir, &broker.quic)).await.unwrap();
    let mut news = live.subscribe("news").await.unwrap();
    writer
        .publish_message(Publish::new("news", "still here"))
        .await
        .unwrap();
    assert_eq!(news.next().await.unwrap().payload, "still here");
    let again = writer.publish_message(message(u32::MAX)).await.unwrap_err();
    assert!(
        matches!(&again, PublishError::Refused(status) if status.code == Code::ResourceExhausted
            && status.message.starts_with("the store failed: ")
            && status.retry_after == Some(Duration::from_secs(1))),
        "{again:?}"
    );

    fs::remove_file(disk.file("ballast")).unwrap();
    tokio::task::block_in_place(|| broker.process.wait_for_note("the store works again"));
    for _ in 0..10 {
        let number = acked.len() as u32;
        let ack = writer.publish_message(message(number)).await.unwrap();
        assert_eq!(ack.durability, Some(Durability::Disk));
        acked.insert(number);
    }
    assert_eq!(broker.metric("selvedge_store_failing"), "0");
    writer.close().await;
    live.close().await;
    // Dropping the process is `kill -9`.
    drop(broker);

    let broker = Broker::start(disk, config);
    assert_eq!(broker.metric("selvedge_store_left_out_total"), "0");
    let reader = kept(dir, &broker.quic).await;
    let mut subscription = reader.subscribe("line/1").await.unwrap();
    let mut missing = acked;
    while !missing.is_empty() {
        let message = subscription
            .next()
            .await
            .expect("the kept session has them");
        let number = message.payload.first_chunk().expect("it has a number");
        missing.remove(&u32::from_be_bytes(*number));
    }
    broker.process.stop();
}
