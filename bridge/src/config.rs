//! `bridge.toml`: read once, checked whole, every problem reported at once.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use selvedge_certs::{Credentials, TrustAnchors};
use selvedge_client::Options;
use selvedge_proto::MAX_SESSION_NAME;
use selvedge_proto::message::{Durability, Qos};
use toml::{Table, Value};

use crate::link::WINDOW;
use crate::mapping::{Direction, Retain, Rule, RuleSet, Version, check_rules};

/// How long either broker keeps the bridge's session when it is away, unless configured otherwise.
const DEFAULT_SESSION_EXPIRY: Duration = Duration::from_secs(24 * 60 * 60);
const DEFAULT_KEEP_ALIVE: Duration = Duration::from_secs(30);
const DEFAULT_RECONNECT_MAX: Duration = Duration::from_secs(30);
const DEFAULT_OUTBOX_BYTES: usize = 16 * 1024 * 1024;
const DEFAULT_INFLIGHT: u16 = WINDOW;
const DEFAULT_INFLIGHT_V311: u16 = 20;
const DEFAULT_DISK_BYTES: usize = 256 * 1024 * 1024;
const DEFAULT_MAX_PACKET: usize = selvedge_proto::DEFAULT_MAX_FRAME;
/// The longest packet of MQTT: the largest variable byte integer and the fixed header.
const MAX_PACKET: usize = 268_435_460;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct BridgeConfig {
    /// The broker of the fabric.
    pub fabric: FabricConfig,
    /// `[store] folder`: the bridge's own disk. Default: none, so nothing is kept over a restart of
    /// the bridge, QoS 2 is not carried, and nothing is taken while the other side is away.
    pub store: Option<PathBuf>,
    /// `[admin] listen`: where health, status and metrics are served. Default: nowhere.
    pub admin: Option<SocketAddr>,
    /// The remote brokers; at least one.
    pub remotes: Vec<RemoteConfig>,
}

/// `[fabric]`: the broker of the fabric, and who the bridge is there.
#[derive(Debug, Clone)]
pub struct FabricConfig {
    /// `host:port`; the port is 7443 when not given.
    pub broker: String,
    /// PEM file of the authorities whose brokers are trusted.
    pub ca: PathBuf,
    /// PEM file of the bridge's certificate chain.
    pub cert: PathBuf,
    /// PEM file of the bridge's private key.
    pub key: PathBuf,
    /// The name that the broker's certificate must carry. Default: the host of `broker`.
    pub server_name: Option<String>,
    /// The bridge's session; each remote has one of its own, `<session>/<remote>`. Default: none, so
    /// the fabric keeps nothing for the bridge while the bridge is not running.
    pub session: Option<String>,
    /// How long the fabric keeps the sessions while the bridge is away. Default: 86,400 seconds.
    pub session_expiry: Duration,
}

/// `[[remote]]`: an MQTT broker that is there already.
#[derive(Clone)]
pub struct RemoteConfig {
    /// Its name in sessions, hop lists, logs and metrics.
    pub name: String,
    /// Its host name or address.
    pub host: String,
    /// Its port. Default: 1883, with TLS 8883.
    pub port: u16,
    /// TLS, for `mqtts://`; without it the connection is in the clear.
    pub tls: Option<RemoteTls>,
    /// The MQTT version to speak. Default: 5.
    pub version: Version,
    /// The bridge's MQTT client id there.
    pub client_id: String,
    /// User name, and the file that holds the password; read again for each connection.
    pub login: Option<(String, PathBuf)>,
    /// How often an idle connection is probed; 5 to 65,535 seconds. Default: 30 seconds.
    pub keep_alive: Duration,
    /// Ask the remote to forget the bridge between connections. Default: false.
    pub clean_session: bool,
    /// How long an MQTT 5 remote keeps the session while the bridge is away. Default: 86,400 seconds.
    pub session_expiry: Duration,
    /// The longest delay between attempts to connect. Default: 30 seconds.
    pub reconnect_max: Duration,
    /// The largest MQTT packet taken from or given to the remote, in bytes. Default: 16 MiB.
    pub max_packet_bytes: usize,
    /// QoS 1 and 2 messages sent to the remote that it has not answered for, 1 to 256; an MQTT 5 remote
    /// may allow fewer. Default: 256, with MQTT 3.1.1 20, since such a remote cannot say what it takes
    /// and mosquitto takes no more.
    pub max_inflight: u16,
    /// Bytes of messages in memory in each direction. Default: 16 MiB.
    pub outbox_bytes: usize,
    /// Bytes of messages that may wait on the bridge's disk in each direction, with `[store]`.
    /// Default: 256 MiB.
    pub disk_bytes: usize,
    /// What is carried.
    pub rules: Vec<Rule>,
}

/// How to speak TLS with a remote.
#[derive(Debug, Clone)]
pub struct RemoteTls {
    /// PEM file of the authorities that the remote's certificate may come from.
    pub ca: PathBuf,
    /// PEM files of a certificate chain and its key, when the remote asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl fmt::Debug for RemoteConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteConfig")
            .field("name", &self.name)
            .field("host", &self.host)
            .field("port", &self.port)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not TOML.
    #[error("expected TOML: {0}")]
    Syntax(#[from] toml::de::Error),
    /// The configuration says something that cannot be done.
    #[error("the bridge configuration has {}:{}", count(problems), list(problems))]
    Invalid {
        /// Every problem: where, what was expected, what was found.
        problems: Vec<String>,
    },
}

fn count(problems: &[String]) -> String {
    match problems.len() {
        1 => "1 problem".to_owned(),
        n => format!("{n} problems"),
    }
}

fn list(problems: &[String]) -> String {
    let lines = problems.iter().map(|problem| format!("\n  - {problem}"));
    lines.collect()
}

impl BridgeConfig {
    /// Reads and checks a file. Relative paths in it are relative to its directory.
    ///
    /// # Errors
    /// As [`Self::parse`], and when the file cannot be read.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path.parent().unwrap_or(Path::new("")))
    }

    /// Checks a configuration whose relative paths are relative to `base`. Certificates, keys and
    /// password files it names are opened, so that a bad one is found before anything connects.
    ///
    /// # Errors
    /// [`ConfigError`], with every problem there is.
    pub fn parse(text: &str, base: &Path) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let mut root = Reader::new(String::new(), text.parse()?, &mut problems);
        let fabric = root.required("fabric", "a table", as_table);
        let store = root.optional("store", "a table", as_table);
        let admin = root.optional("admin", "a table", as_table);
        let remotes = root.required("remote", "an array of tables, [[remote]]", as_tables);
        if remotes.as_ref().is_some_and(Vec::is_empty) {
            root.problem("remote", &"expected at least one [[remote]], found none");
        }
        root.finish();

        let fabric = fabric.and_then(|table| {
            read_fabric(
                Reader::new("fabric.".to_owned(), table, &mut problems),
                base,
            )
        });
        let store = store.and_then(|table| {
            let mut reader = Reader::new("store.".to_owned(), table, &mut problems);
            let folder = reader.required_path("folder", base);
            reader.finish();
            folder
        });
        let admin = admin.and_then(|table| {
            let mut reader = Reader::new("admin.".to_owned(), table, &mut problems);
            let listen = reader.required("listen", "\"address:port\"", |value| {
                value.as_str()?.parse().ok()
            });
            reader.finish();
            listen
        });
        let mut checked = Vec::new();
        let mut rules_readable = true;
        for (index, table) in remotes.into_iter().flatten().enumerate() {
            let place = match table.get("name").and_then(Value::as_str) {
                Some(name) => format!("remote {name:?}: "),
                None => format!("remote {}: ", index + 1),
            };
            let reader = Reader::new(place, table, &mut problems);
            match read_remote(reader, base) {
                Some(remote) => checked.push(remote),
                None => rules_readable = false,
            }
        }
        for (index, remote) in checked.iter().enumerate() {
            if checked[..index]
                .iter()
                .any(|other| other.name == remote.name)
            {
                problems.push(format!(
                    "remote {:?}: expected a name of its own, found it twice; rename one",
                    remote.name
                ));
            }
        }
        let has_session = fabric
            .as_ref()
            .is_none_or(|fabric| fabric.session.is_some());
        for remote in &checked {
            problems.extend(check_exactly_once(remote, store.is_some(), has_session));
        }
        if rules_readable {
            let sets: Vec<RuleSet<'_>> = checked
                .iter()
                .map(|remote| RuleSet {
                    remote: &remote.name,
                    version: remote.version,
                    rules: &remote.rules,
                })
                .collect();
            let conflicts = check_rules(&sets);
            problems.extend(conflicts.iter().map(ToString::to_string));
        }
        match fabric {
            Some(fabric) if problems.is_empty() => Ok(Self {
                fabric,
                store,
                admin,
                remotes: checked,
            }),
            _ => Err(ConfigError::Invalid { problems }),
        }
    }
}

/// QoS 2 is a promise about what all three remember.
fn check_exactly_once(
    remote: &RemoteConfig,
    has_store: bool,
    has_session: bool,
) -> impl Iterator<Item = String> {
    let name = &remote.name;
    let mut rules = remote.rules.iter();
    let wanted = rules.position(|rule| rule.qos_cap == Qos::ExactlyOnce);
    let needs = [
        (!has_store, "[store] folder, where the bridge remembers"),
        (!has_session, "fabric.session, so that the fabric does"),
        (
            remote.clean_session,
            "clean_session = false, so that the remote does",
        ),
    ];
    let needs = needs
        .into_iter()
        .filter_map(|(missing, what)| missing.then_some(what));
    let problems = needs.filter_map(|what| {
        let rule = wanted? + 1;
        Some(format!(
            "remote {name:?}: rule {rule}: qos: expected {what} what was carried, \
             for qos = 2, found it missing; add it or use qos = 1"
        ))
    });
    problems.collect::<Vec<_>>().into_iter()
}

fn read_fabric(mut reader: Reader<'_>, base: &Path) -> Option<FabricConfig> {
    let broker = reader.required("broker", "\"host:port\"", as_text);
    let ca = reader.required_path("ca", base);
    let cert = reader.required_path("cert", base);
    let key = reader.required_path("key", base);
    let server_name = reader.optional("server_name", "a host name", as_text);
    let session = reader.optional("session", "a session name", as_text);
    let expiry = reader.optional("session_expiry", "a number of seconds", as_seconds);

    if let Some(Err(error)) = broker.as_deref().map(Options::new) {
        reader.problem("broker", &error);
    }
    if let Some(session) = &session
        && !(1..MAX_SESSION_NAME / 2).contains(&session.len())
    {
        let most = MAX_SESSION_NAME / 2 - 1;
        let found = session.len();
        reader.problem(
            "session",
            &format!("expected 1 to {most} bytes, found {found}; leave the key out for no session"),
        );
    }
    reader.check_files(ca.as_deref(), cert.as_deref().zip(key.as_deref()));
    reader.finish();
    Some(FabricConfig {
        broker: broker?,
        ca: ca?,
        cert: cert?,
        key: key?,
        server_name,
        session,
        session_expiry: expiry.unwrap_or(DEFAULT_SESSION_EXPIRY),
    })
}

fn read_remote(mut reader: Reader<'_>, base: &Path) -> Option<RemoteConfig> {
    let name = reader.required("name", "a name", as_text);
    let url = reader.required(
        "url",
        "\"mqtt://host:port\" or \"mqtts://host:port\"",
        as_text,
    );
    let version = reader.optional("version", "\"5\" or \"3.1.1\"", |value| {
        match value.as_str()? {
            "5" => Some(Version::V5),
            "3.1.1" => Some(Version::V311),
            _ => None,
        }
    });
    let client_id = reader.required("client_id", "an MQTT client id", as_text);
    let username = reader.optional("username", "a user name", as_text);
    let password_file = reader.optional_path("password_file", base);
    let ca = reader.optional_path("ca", base);
    let cert = reader.optional_path("cert", base);
    let key = reader.optional_path("key", base);
    let keep_alive = reader.optional("keep_alive", "5 to 65535 seconds", |value| {
        as_seconds(value).filter(|keep_alive| (5..=65_535).contains(&keep_alive.as_secs()))
    });
    let clean_session = reader.optional("clean_session", "true or false", as_flag);
    let session_expiry = reader.optional(
        "session_expiry",
        "a number of seconds below 4294967296",
        |value| as_seconds(value).filter(|expiry| u32::try_from(expiry.as_secs()).is_ok()),
    );
    let reconnect_max = reader.optional("reconnect_max", "1 to 86400 seconds", |value| {
        as_seconds(value).filter(|max| (1..=86_400).contains(&max.as_secs()))
    });
    let max_packet_bytes =
        reader.optional("max_packet_bytes", "1024 to 268435460 bytes", |value| {
            as_size(value).filter(|size| (1024..=MAX_PACKET).contains(size))
        });
    let max_inflight = reader.optional("max_inflight", "1 to 256 messages", |value| {
        let most = u16::try_from(value.as_integer()?).ok()?;
        (1..=WINDOW).contains(&most).then_some(most)
    });
    let outbox_bytes = reader.optional("outbox_bytes", "65536 to 4294967295 bytes", |value| {
        as_size(value).filter(|size| *size >= 65_536 && u32::try_from(*size).is_ok())
    });
    let disk_bytes = reader.optional("disk_bytes", "65536 or more bytes", |value| {
        as_size(value).filter(|size| *size >= 65_536)
    });
    let tables = reader.required("rule", "an array of tables, [[remote.rule]]", as_tables);

    if let Some(name) = &name {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > MAX_SESSION_NAME / 2 || !name.chars().all(allowed) {
            reader.problem(
                "name",
                &format!(
                    "expected 1 to {} characters of A-Z a-z 0-9 . _ -, found {name:?}",
                    MAX_SESSION_NAME / 2
                ),
            );
        }
    }
    if client_id.as_ref().is_some_and(String::is_empty) {
        reader.problem(
            "client_id",
            &"expected a name, found an empty one; the remote keeps the session under it",
        );
    }
    let url = url.and_then(|url| match parse_url(&url) {
        Ok(parsed) => Some(parsed),
        Err(problem) => {
            reader.problem("url", &problem);
            None
        }
    });
    let secure = url.as_ref().map(|(secure, ..)| *secure);
    if secure == Some(true) && ca.is_none() {
        reader.problem(
            "ca",
            &"expected a PEM file for an mqtts:// remote, found none",
        );
    }
    if secure == Some(false) && (ca.is_some() || cert.is_some() || key.is_some()) {
        reader.problem(
            "url",
            &"expected mqtts:// since ca, cert or key is given, found mqtt://; \
              without TLS they would protect nothing",
        );
    }
    if cert.is_some() != key.is_some() {
        reader.problem(
            "cert",
            &"expected cert and key together, found only one of them",
        );
    }
    let identity = cert.zip(key);
    reader.check_files(
        ca.as_deref(),
        identity
            .as_ref()
            .map(|(cert, key)| (cert.as_path(), key.as_path())),
    );
    let login = match (username, password_file) {
        (Some(username), Some(file)) => {
            if let Err(error) = std::fs::read_to_string(&file) {
                reader.problem(
                    "password_file",
                    &format!("cannot read {}: {error}", file.display()),
                );
            }
            Some((username, file))
        }
        (None, None) => None,
        _ => {
            reader.problem(
                "username",
                &"expected username and password_file together, found only one of them",
            );
            None
        }
    };
    let rules = tables.map(|tables| {
        if tables.is_empty() {
            reader.problem("rule", &"expected at least one [[remote.rule]], found none");
        }
        let tables = tables.into_iter().enumerate();
        let rules: Vec<Option<Rule>> = tables
            .map(|(index, table)| {
                let place = format!("{}rule {}: ", reader.place, index + 1);
                read_rule(Reader::new(place, table, &mut *reader.problems))
            })
            .collect();
        rules.into_iter().collect::<Option<Vec<Rule>>>()
    });
    reader.finish();

    let (_, host, port) = url?;
    Some(RemoteConfig {
        name: name?,
        host,
        port,
        tls: ca.map(|ca| RemoteTls { ca, identity }),
        max_inflight: max_inflight.unwrap_or(match version.unwrap_or_default() {
            Version::V5 => DEFAULT_INFLIGHT,
            Version::V311 => DEFAULT_INFLIGHT_V311,
        }),
        version: version.unwrap_or_default(),
        client_id: client_id?,
        login,
        keep_alive: keep_alive.unwrap_or(DEFAULT_KEEP_ALIVE),
        clean_session: clean_session.unwrap_or(false),
        session_expiry: session_expiry.unwrap_or(DEFAULT_SESSION_EXPIRY),
        reconnect_max: reconnect_max.unwrap_or(DEFAULT_RECONNECT_MAX),
        max_packet_bytes: max_packet_bytes.unwrap_or(DEFAULT_MAX_PACKET),
        outbox_bytes: outbox_bytes.unwrap_or(DEFAULT_OUTBOX_BYTES),
        disk_bytes: disk_bytes.unwrap_or(DEFAULT_DISK_BYTES),
        rules: rules??,
    })
}

fn read_rule(mut reader: Reader<'_>) -> Option<Rule> {
    let direction = reader.required(
        "direction",
        "\"in\", \"out\" or \"both\"",
        |value| match value.as_str()? {
            "in" => Some(Direction::In),
            "out" => Some(Direction::Out),
            "both" => Some(Direction::Both),
            _ => None,
        },
    );
    let filter = reader.required("filter", "a topic filter relative to the prefixes", as_text);
    let remote_prefix = reader.optional("remote_prefix", "topic levels ending with /", as_text);
    let local_prefix = reader.optional("local_prefix", "topic levels ending with /", as_text);
    let qos = reader.optional("qos", "0, 1 or 2", |value| match value.as_integer()? {
        0 => Some(Qos::AtMostOnce),
        1 => Some(Qos::AtLeastOnce),
        2 => Some(Qos::ExactlyOnce),
        _ => None,
    });
    let retain = reader.optional("retain", "\"keep\" or \"clear\"", |value| {
        match value.as_str()? {
            "keep" => Some(Retain::Keep),
            "clear" => Some(Retain::Clear),
            _ => None,
        }
    });
    let durability = reader.optional(
        "durability",
        "\"default\", \"memory\", \"disk\" or \"replicated\"",
        |value| match value.as_str()? {
            "default" => Some(Durability::Default),
            "memory" => Some(Durability::Memory),
            "disk" => Some(Durability::Disk),
            "replicated" => Some(Durability::Replicated),
            _ => None,
        },
    );
    let rule = match (direction, filter) {
        (Some(direction), Some(filter)) => {
            let remote_prefix = remote_prefix.unwrap_or_default();
            let local_prefix = local_prefix.unwrap_or_default();
            match Rule::new(direction, &filter, &remote_prefix, &local_prefix) {
                Ok(rule) => Some(rule),
                Err(error) => {
                    reader.problem("filter", &error);
                    None
                }
            }
        }
        _ => None,
    };
    reader.finish();
    rule.map(|mut rule| {
        rule.qos_cap = qos.unwrap_or(Qos::AtLeastOnce);
        rule.retain = retain.unwrap_or_default();
        rule.durability = durability.unwrap_or_default();
        rule
    })
}

/// Whether TLS is wanted, host and port.
fn parse_url(url: &str) -> Result<(bool, String, u16), String> {
    let expected =
        |found: &str| format!("expected mqtt://host:port or mqtts://host:port, found {found:?}");
    let (secure, rest) = match url.split_once("://") {
        Some(("mqtt", rest)) => (false, rest),
        Some(("mqtts", rest)) => (true, rest),
        // Not quoted whole: it may hold a password.
        _ => return Err(expected(url.split(':').next().unwrap_or_default())),
    };
    if rest.contains('@') {
        return Err(
            "expected no user or password in the url; use username and password_file".into(),
        );
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let default_port = if secure { 8883 } else { 1883 };
    let (host, port) = match rest.strip_prefix('[') {
        Some(v6) => {
            let (address, port) = v6.split_once(']').ok_or_else(|| expected(url))?;
            if secure {
                return Err(format!(
                    "expected a host name for mqtts://, found the address {address:?}; \
                     the name is what the remote's certificate is checked for"
                ));
            }
            let port = match port {
                "" => None,
                port => Some(port.strip_prefix(':').ok_or_else(|| expected(url))?),
            };
            (format!("[{address}]"), port)
        }
        None => match rest.split_once(':') {
            Some((host, port)) => (host.to_owned(), Some(port)),
            None => (rest.to_owned(), None),
        },
    };
    let port = match port {
        None => default_port,
        Some(port) => port.parse().map_err(|_| expected(url))?,
    };
    if host.is_empty() || host.contains(['/', '?', '#']) || port == 0 {
        return Err(expected(url));
    }
    Ok((secure, host, port))
}

/// Takes keys out of a table and notes everything that is wrong; what is left over is unknown.
struct Reader<'a> {
    place: String,
    table: Table,
    problems: &'a mut Vec<String>,
    known: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    fn new(place: String, table: Table, problems: &'a mut Vec<String>) -> Self {
        Self {
            place,
            table,
            problems,
            known: Vec::new(),
        }
    }

    fn problem(&mut self, key: &str, problem: &dyn fmt::Display) {
        self.problems
            .push(format!("{}{key}: {problem}", self.place));
    }

    fn optional<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        self.known.push(key);
        let value = self.table.remove(key)?;
        let result = read(&value);
        if result.is_none() {
            let found = match value {
                Value::Table(_) => "a table".to_owned(),
                Value::Array(_) => "an array".to_owned(),
                value => value.to_string(),
            };
            self.problem(key, &format!("expected {expected}, found {found}"));
        }
        result
    }

    fn required<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        if !self.table.contains_key(key) {
            self.known.push(key);
            self.problem(
                key,
                &format!("expected {expected}, found no such key; add it"),
            );
            return None;
        }
        self.optional(key, expected, read)
    }

    fn optional_path(&mut self, key: &'static str, base: &Path) -> Option<PathBuf> {
        let path = self.optional(key, "the path of a file", as_text)?;
        Some(base.join(path))
    }

    fn required_path(&mut self, key: &'static str, base: &Path) -> Option<PathBuf> {
        let path = self.required(key, "the path of a file", as_text)?;
        Some(base.join(path))
    }

    fn check_files(&mut self, ca: Option<&Path>, identity: Option<(&Path, &Path)>) {
        if let Some(Err(error)) = ca.map(TrustAnchors::from_file) {
            self.problem("ca", &error);
        }
        if let Some(Err(error)) = identity.map(|(cert, key)| Credentials::from_files(cert, key)) {
            self.problem("cert", &error);
        }
    }

    fn finish(self) {
        for key in self.table.keys() {
            self.problems.push(format!(
                "{}{key}: expected one of {}, found this key; remove or correct it",
                self.place,
                self.known.join(", ")
            ));
        }
    }
}

fn as_text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn as_flag(value: &Value) -> Option<bool> {
    value.as_bool()
}

fn as_seconds(value: &Value) -> Option<Duration> {
    let seconds = u64::try_from(value.as_integer()?).ok()?;
    Some(Duration::from_secs(seconds))
}

fn as_size(value: &Value) -> Option<usize> {
    usize::try_from(value.as_integer()?).ok()
}

fn as_table(value: &Value) -> Option<Table> {
    value.as_table().cloned()
}

fn as_tables(value: &Value) -> Option<Vec<Table>> {
    value.as_array()?.iter().map(as_table).collect()
}

#[cfg(test)]
mod tests;
