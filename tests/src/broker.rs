//! A broker of one test: real, on free loopback ports, with an authority of its own.

use std::net::SocketAddr;
use std::time::Duration;

use selvedge_broker::policy::Policy;
use selvedge_broker::{Config, MqttConfig, Server};
use selvedge_certs::Credentials;
use selvedge_client::{Client, Options, Reconnect};

use crate::pki::{SERVER_NAME, TestPki};
use crate::wait::{eventually, within};
use crate::{log, raw};

/// Everybody may do everything within their own tenant.
pub const OPEN: &str = r##"
[[rule]]
name = "everyone"
identities = ["*/*/*"]
allow = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["#"]
"##;

/// Where the devices of most tests are.
const HOME: &str = "acme/plant-1";
/// How long the broker waits for a responder it does not know yet; short, since tests that expect
/// NOT_FOUND wait for it.
const RESUME_GRACE: Duration = Duration::from_millis(500);
/// How soon clients notice that the broker is gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// Several in an idle timeout, so that a busy machine does not end connections.
const KEEP_ALIVE: Duration = Duration::from_millis(500);

/// A running broker and the authority it trusts.
#[derive(Debug)]
pub struct TestBroker {
    /// The authority of broker and clients.
    pub pki: TestPki,
    /// What the broker runs with; a restart uses it again, on the same ports.
    pub config: Config,
    server: Option<Server>,
}

impl TestBroker {
    /// A broker with native and admin listener that allows everything within a tenant.
    pub async fn open() -> TestBroker {
        Self::with(OPEN, |_, _| {}).await
    }

    /// As [`TestBroker::open`], with this policy.
    pub async fn governed(policy: &str) -> TestBroker {
        Self::with(policy, |_, _| {}).await
    }

    /// As [`TestBroker::open`], with this policy and changes to the configuration.
    pub async fn with(policy: &str, change: impl FnOnce(&mut Config, &TestPki)) -> TestBroker {
        log::init();
        let pki = TestPki::new();
        let policy = Policy::parse(policy).expect("the policy of a test");
        let mut config = Config::new(pki.server(), pki.anchors(), policy);
        config.admin = Some(([127, 0, 0, 1], 0).into());
        config.limits.resume_grace = RESUME_GRACE;
        config.limits.idle_timeout = IDLE_TIMEOUT;
        change(&mut config, &pki);
        let mut broker = TestBroker {
            pki,
            config,
            server: None,
        };
        broker.start().await;
        broker
    }

    /// A second broker with the same authority and configuration on ports of its own, which knows
    /// nothing of what the first knew.
    pub async fn successor(&self) -> SuccessorBroker {
        let mut config = self.config.clone();
        config.quic = Some(([127, 0, 0, 1], 0).into());
        config.admin = None;
        config.mqtt = MqttConfig::default();
        let server = Server::bind(config).await.expect("free ports");
        SuccessorBroker { server }
    }

    /// Starts the broker again on the ports it had.
    pub async fn start(&mut self) {
        // The ports of a broker that was killed may take a moment to be free.
        let config = &self.config;
        let server = eventually("the broker's ports to be free", || async {
            Server::bind(config.clone()).await.ok()
        })
        .await;
        let addresses = server.addresses();
        self.config.quic = addresses.quic;
        self.config.admin = addresses.admin;
        let mqtt = &mut self.config.mqtt;
        (mqtt.tls, mqtt.wss) = (addresses.mqtts, addresses.wss);
        for (open, bound) in [
            (&mut mqtt.danger_plaintext, addresses.mqtt),
            (&mut mqtt.danger_ws, addresses.ws),
        ] {
            if let (Some(open), Some(bound)) = (open, bound) {
                open.0 = bound;
            }
        }
        self.server = Some(server);
    }

    /// Stops the broker in good order.
    pub async fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            within("the broker to stop", server.shutdown()).await;
        }
    }

    /// Stops the broker in good order and starts it again on the same ports.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.start().await;
    }

    /// Puts another policy in force while the broker runs, with everything else as it was.
    pub fn reload(&mut self, policy: &str) {
        self.config.policy = Policy::parse(policy).expect("the policy of a test");
        self.reload_config();
    }

    /// Takes over what of the changed `config` may change while the broker runs.
    pub fn reload_config(&mut self) {
        let server = self.server.as_ref().expect("the broker runs");
        server.reload(self.config.clone());
    }

    /// Where the broker listens.
    pub fn addresses(&self) -> selvedge_broker::Addresses {
        self.server.as_ref().expect("the broker runs").addresses()
    }

    /// The address of the native listener.
    pub fn quic(&self) -> SocketAddr {
        self.config.quic.expect("every test broker has it")
    }

    /// The address of the admin listener.
    pub fn admin(&self) -> SocketAddr {
        self.config.admin.expect("every test broker has it")
    }

    /// The address of the plaintext MQTT listener.
    pub fn mqtt(&self) -> SocketAddr {
        let plaintext = self.config.mqtt.danger_plaintext.as_ref();
        plaintext.expect("a broker with plaintext MQTT").0
    }

    /// The address of the MQTT listener with TLS.
    pub fn mqtts(&self) -> SocketAddr {
        self.config.mqtt.tls.expect("a broker with MQTT over TLS")
    }

    /// The credentials of a device: `press-7` of the usual tenant and site, or
    /// `<tenant>/<site>/<name>`.
    pub fn device(&self, path: &str) -> Credentials {
        let (home, name) = path.rsplit_once('/').unwrap_or((HOME, path));
        let (tenant, site) = home.split_once('/').expect("tenant/site/name or a name");
        self.pki.device(tenant, site, name)
    }

    /// How a device connects.
    pub fn options(&self, credentials: Credentials) -> Options {
        Options::new(&format!("{SERVER_NAME}:{}", self.quic().port()))
            .expect("a host and a port")
            .resolve(self.quic())
            .credentials(credentials)
            .trust(self.pki.anchors())
            .keep_alive(KEEP_ALIVE)
            .idle_timeout(IDLE_TIMEOUT)
            .reconnect(Reconnect {
                min: Duration::from_millis(20),
                max: Duration::from_millis(200),
            })
    }

    /// A connected client; the name as in [`TestBroker::device`].
    pub async fn client(&self, path: &str) -> Client {
        self.connect(self.options(self.device(path))).await
    }

    /// A client connected with these options.
    pub async fn connect(&self, options: Options) -> Client {
        within("a client to connect", Client::connect(options))
            .await
            .expect("the broker accepts the client")
    }

    /// The body of the admin listener's answer to GET.
    pub async fn get(&self, path: &str) -> String {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let answer = raw::tcp_exchange(self.admin(), request.as_bytes())
            .await
            .expect("the admin listener answers");
        let answer = String::from_utf8_lossy(&answer);
        let (_, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        body.to_owned()
    }

    /// The sum of a metric over all series that carry every given label; 0 while there is none.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let text = self.get("/metrics").await;
        text.lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|rest| rest.starts_with(['{', ' ']))
            .filter(|rest| {
                let has =
                    |(key, value): &(&str, &str)| rest.contains(&format!("{key}=\"{value}\""));
                labels.iter().all(has)
            })
            .filter_map(|rest| rest.rsplit(' ').next()?.trim().parse::<u64>().ok())
            .sum()
    }

    /// Waits until a metric has reached `least`.
    pub async fn metric_reaches(&self, name: &str, labels: &[(&str, &str)], least: u64) {
        eventually(&format!("{name} {labels:?} to reach {least}"), || async {
            (self.metric(name, labels).await >= least).then_some(())
        })
        .await;
    }
}

/// What [`TestBroker::successor`] starts.
#[derive(Debug)]
pub struct SuccessorBroker {
    server: Server,
}

impl SuccessorBroker {
    /// The address of its native listener.
    pub fn quic(&self) -> SocketAddr {
        let quic = self.server.addresses().quic;
        quic.expect("it has no other listener")
    }
}
