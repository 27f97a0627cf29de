//! The bridge as a value: start it, look at it, stop it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::select_all;
use selvedge_client::{
    Backoff, Client, Code, ConnectError, Credentials, Options, OptionsError, Qos, Reconnect,
    ReloadableCredentials, RetainHandling, State, SubscribeError, SubscribeOptions, Subscription,
    TrustAnchors,
};
use selvedge_proto::topic::TopicFilter;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::admin;
use crate::config::{BridgeConfig, FabricConfig, RemoteConfig};
use crate::forward::{Outbound, OutwardTask, Owed};
use crate::inward::{Arrived, InwardTask};
use crate::journal::{Journal, JournalError, Space};
use crate::mapping::{Retain, Rule};
use crate::names::Names;
use crate::remote::{Handshakes, OutId, Parts, Remote};
use crate::spool::{Held, Place, Spool};
use crate::status::{Record, RemoteStatus};

/// How long the tasks of all remotes may take to stop; a little more than each gives itself.
const STOP: Duration = Duration::from_secs(7);

/// How long the fabric is tried before a bridge with a disk of its own starts without it.
const FABRIC_TIMEOUT: Duration = Duration::from_secs(5);

/// Delays between later attempts.
const FABRIC_RETRY: Reconnect = Reconnect {
    min: Duration::from_millis(500),
    max: Duration::from_secs(30),
};

/// Why the bridge did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The bridge's certificate, key or trust anchors cannot be loaded.
    #[error(transparent)]
    Credentials(#[from] selvedge_certs::LoadError),
    /// The broker's address is not one.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The bridge's own disk cannot be used.
    #[error(transparent)]
    Store(#[from] JournalError),
    /// The admin address cannot be listened on.
    #[error("cannot listen on {address} for admin: {source}")]
    Admin {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The fabric's broker cannot be reached, or refuses the bridge.
    #[error("cannot connect to the fabric at {broker}: {source}")]
    Connect {
        /// The broker.
        broker: String,
        /// Why.
        source: ConnectError,
    },
    /// The fabric refuses a rule's subscription.
    #[error("remote {remote:?}: cannot subscribe to {filter} in the fabric: {source}")]
    Subscribe {
        /// The remote whose rule it is.
        remote: String,
        /// The filter.
        filter: TopicFilter,
        /// Why.
        source: SubscribeError,
    },
}

/// A running bridge. Dropping it stops it at once; [`Self::shutdown`] stops it in good order.
#[derive(Debug)]
pub struct Bridge {
    sites: Arc<[Site]>,
    shutdown: CancellationToken,
    admin: Option<SocketAddr>,
    remotes: Vec<AbortOnDropHandle<()>>,
    joining: Vec<AbortOnDropHandle<()>>,
    inward: Vec<AbortOnDropHandle<()>>,
    _admin: Option<AbortOnDropHandle<()>>,
}

/// Whether a remote's client of the fabric is there.
#[derive(Debug, Clone)]
pub(crate) enum Joined {
    /// It tries to connect.
    Connecting,
    /// It has connected once, and its subscriptions are made; it restores itself.
    Yes(Client),
    /// The fabric will not have it.
    Refused(Arc<str>),
}

impl Joined {
    pub(crate) fn client(&self) -> Option<&Client> {
        match self {
            Self::Yes(client) => Some(client),
            Self::Connecting | Self::Refused(_) => None,
        }
    }
}

type Outward = Arc<Mutex<Vec<AbortOnDropHandle<Subscription>>>>;

/// What is known of one remote.
#[derive(Debug)]
pub(crate) struct Site {
    record: Record,
    fabric: watch::Receiver<Joined>,
    inward: Spool<Arrived>,
    outward: Spool<Owed>,
    /// The tasks that take messages from the fabric.
    tasks: Outward,
}

impl Site {
    pub(crate) fn status(&self) -> RemoteStatus {
        let mut status = self.record.snapshot();
        let fabric = self.fabric.borrow();
        let client = fabric.client();
        status.fabric_connected =
            client.is_some_and(|client| client.state().borrow().is_connected());
        status.inward = self.inward.status();
        status.outward = self.outward.status();
        let journal = self.outward.place().journal.as_ref();
        status.store_error = journal.and_then(Journal::trouble);
        for (index, rule) in status.rules.iter_mut().enumerate() {
            let (inward, inward_lag) = self.inward.rule_status(index);
            let (outward, outward_lag) = self.outward.rule_status(index);
            rule.in_flight = inward + outward;
            rule.lag = inward_lag.max(outward_lag);
        }
        status
    }
}

/// What the journal held of one remote.
#[derive(Default)]
struct Loaded {
    inward: Held,
    outward: Held,
    handshakes: Handshakes,
    names: Names,
}

impl Bridge {
    /// Opens the bridge's disk, connects to the fabric, once for each remote, and subscribes there;
    /// the connections to the remotes are then made, and kept, in the background. With a disk, a
    /// fabric that does not answer is tried for ever, and what comes from remotes is kept meanwhile.
    ///
    /// # Errors
    /// [`StartError`] when the fabric cannot be reached or refuses something. A remote that cannot be
    /// reached is no error: see [`Self::status`].
    pub async fn start(config: BridgeConfig) -> Result<Self, StartError> {
        let credentials = Credentials::from_files(&config.fabric.cert, &config.fabric.key)?;
        let identity = credentials.identity().uri().to_owned();
        let credentials = ReloadableCredentials::new(credentials);
        let trust = TrustAnchors::from_file(&config.fabric.ca)?;
        let (journal, loaded) = open_journal(&config).await?;
        let mut sites = Vec::new();
        let mut bridge = Self {
            sites: Arc::new([]),
            shutdown: CancellationToken::new(),
            admin: None,
            remotes: Vec::new(),
            joining: Vec::new(),
            inward: Vec::new(),
            _admin: None,
        };
        let listener = match config.admin {
            Some(address) => {
                let listener = tokio::net::TcpListener::bind(address).await;
                Some(listener.map_err(|source| StartError::Admin { address, source })?)
            }
            None => None,
        };
        for (remote, loaded) in config.remotes.into_iter().zip(loaded) {
            let mut options = Options::new(&config.fabric.broker)?
                .credentials(credentials.clone())
                .trust(trust.clone())
                .agent(concat!("selvedge-bridge/", env!("CARGO_PKG_VERSION")));
            options = session(options, &config.fabric, &remote);
            if journal.is_some() {
                options = options.connect_timeout(FABRIC_TIMEOUT);
            }
            let site = bridge.add(
                remote,
                (options, &config.fabric.broker),
                &identity,
                journal.clone(),
                loaded,
            );
            sites.push(site.await?);
        }
        bridge.sites = sites.into();
        if let Some(listener) = listener {
            bridge.admin = listener.local_addr().ok();
            let serve = admin::serve(Arc::clone(&bridge.sites), listener);
            bridge._admin = Some(AbortOnDropHandle::new(tokio::spawn(serve)));
        }
        Ok(bridge)
    }

    /// What every remote and rule is doing, in the order of the configuration.
    pub fn status(&self) -> Vec<RemoteStatus> {
        self.sites.iter().map(Site::status).collect()
    }

    /// The address of the admin listener, if there is one.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// Waits until the fabric has turned the bridge away for good, and gives its reason. Nothing more
    /// will be carried then, and the bridge should be shut down.
    pub async fn closed(&self) -> Arc<str> {
        let closed = self.sites.iter().map(|site| {
            let mut fabric = site.fabric.clone();
            Box::pin(async move {
                let joined = fabric.wait_for(|joined| !matches!(joined, Joined::Connecting));
                let client = match joined.await.as_deref() {
                    Ok(Joined::Yes(client)) => client.clone(),
                    Ok(Joined::Refused(reason)) => return Arc::clone(reason),
                    _ => return "the bridge is stopped".into(),
                };
                let mut state = client.state();
                let closed = state.wait_for(|state| matches!(state, State::Closed { .. }));
                match closed.await.as_deref() {
                    Ok(State::Closed { reason }) => Arc::clone(reason),
                    _ => "the client has ended".into(),
                }
            })
        });
        if closed.len() == 0 {
            return std::future::pending().await;
        }
        let (reason, ..) = select_all(closed).await;
        reason
    }

    /// Waits until every remote is connected and has granted every inward rule's subscription, and the
    /// fabric every outward rule's. A remote that refuses one keeps this waiting; [`Self::status`]
    /// says why.
    pub async fn ready(&self) {
        let mut receivers: Vec<watch::Receiver<bool>> =
            self.sites.iter().map(|site| site.record.ready()).collect();
        for site in &*self.sites {
            let mut fabric = site.fabric.clone();
            // The task that sends lives as long as the bridge.
            let _closed = fabric.wait_for(|joined| joined.client().is_some()).await;
        }
        loop {
            for receiver in &mut receivers {
                // The record that sends lives as long as the bridge.
                let _closed = receiver.wait_for(|ready| *ready).await;
            }
            // One may have been lost while another was awaited.
            if receivers.iter().all(|receiver| *receiver.borrow()) {
                return;
            }
        }
    }

    /// Stops in good order: takes nothing new, waits a few seconds for what is under way to be
    /// acknowledged, and says goodbye to remotes and fabric. What is not acknowledged by then stays
    /// with the side it came from.
    pub async fn shutdown(self) {
        // Rules stop taking from the fabric; remotes drain and say goodbye.
        self.shutdown.cancel();
        drop(self.joining);
        let sites = Arc::clone(&self.sites);
        let stopped = async {
            for remote in self.remotes {
                let _panicked = remote.await;
            }
            let mut subscriptions = Vec::new();
            for site in &*sites {
                let tasks = {
                    let mut tasks = site.tasks.lock().unwrap_or_else(PoisonError::into_inner);
                    std::mem::take(&mut *tasks)
                };
                for task in tasks {
                    subscriptions.extend(task.await);
                }
            }
            subscriptions
        };
        let subscriptions = tokio::time::timeout(STOP, stopped).await;
        // Before the subscriptions are dropped, which would take them out of the sessions that the
        // fabric is to keep.
        for site in &*self.sites {
            let client = site.fabric.borrow().client().cloned();
            if let Some(client) = client {
                client.close().await;
            }
        }
        drop(subscriptions);
        for task in self.inward {
            let _ended = tokio::time::timeout(Duration::from_secs(1), task).await;
        }
        // What was settled last is put down before the process ends.
        let journal = self
            .sites
            .iter()
            .find_map(|site| site.outward.place().journal.clone());
        if let Some(journal) = journal {
            let barrier = journal.commit(Vec::new()).await;
            let _elapsed = tokio::time::timeout(Duration::from_secs(1), barrier).await;
        }
    }

    async fn add(
        &mut self,
        config: RemoteConfig,
        (options, broker): (Options, &str),
        identity: &str,
        journal: Option<Journal>,
        loaded: Loaded,
    ) -> Result<Site, StartError> {
        let record = Record::new(&config.name, &config.rules);
        let own_hop: Arc<str> = format!("{identity}#{}", config.name).into();
        let limit = match journal {
            Some(_) => config.disk_bytes,
            None => config.outbox_bytes,
        };
        let place = |space| Place {
            remote: config.name.as_str().into(),
            space,
            journal: journal.clone(),
            limit,
        };
        let inward: Spool<Arrived> = Spool::new(place(Space::In), loaded.inward);
        let outward: Spool<Owed> = Spool::new(place(Space::Out), loaded.outward);
        let (passing, passed) = Remote::passing();
        let tasks = Outward::default();
        let join = Join {
            remote: config.name.clone(),
            broker: broker.to_owned(),
            options,
            rules: config.rules.clone(),
            own_hop: Arc::clone(&own_hop),
            record: record.clone(),
            outward: outward.clone(),
            names: loaded.names,
            passing,
            shutdown: self.shutdown.clone(),
            tasks: Arc::clone(&tasks),
        };
        let (fabric, joined) = watch::channel(Joined::Connecting);
        match join.attempt().await {
            Ok(client) => {
                fabric.send_replace(Joined::Yes(client));
                self.joining
                    .push(AbortOnDropHandle::new(tokio::spawn(async move {
                        // Kept, so that nobody takes it for stopped.
                        fabric.closed().await;
                    })));
            }
            Err(error) if journal.is_some() && is_passing(&error) => {
                tracing::warn!(remote = %config.name, %error, "starting without the fabric");
                record.disconnected(&error.to_string());
                let joining = tokio::spawn(join.run(fabric));
                self.joining.push(AbortOnDropHandle::new(joining));
            }
            Err(error) => return Err(error),
        }
        let task = InwardTask {
            spool: inward.clone(),
            fabric: joined.clone(),
            record: record.clone(),
        };
        self.inward
            .push(AbortOnDropHandle::new(tokio::spawn(task.run())));
        let remote = Remote::new(Parts {
            config,
            fabric: joined.clone(),
            own_hop,
            record: record.clone(),
            shutdown: self.shutdown.clone(),
            passing: passed,
            outward: outward.clone(),
            inward: inward.clone(),
            handshakes: loaded.handshakes,
        });
        self.remotes
            .push(AbortOnDropHandle::new(tokio::spawn(remote.run())));
        Ok(Site {
            record,
            fabric: joined,
            inward,
            outward,
            tasks,
        })
    }
}

/// Opens the journal, if there is to be one, and sorts what it holds.
async fn open_journal(
    config: &BridgeConfig,
) -> Result<(Option<Journal>, Vec<Loaded>), JournalError> {
    let names: Vec<Arc<str>> = config
        .remotes
        .iter()
        .map(|remote| remote.name.as_str().into())
        .collect();
    let mut loaded: Vec<Loaded> = names.iter().map(|_| Loaded::default()).collect();
    let Some(folder) = config.store.clone() else {
        return Ok((None, loaded));
    };
    let opened = tokio::task::spawn_blocking(move || {
        let journal = Journal::open(&folder, &names, |remote, space, number, value| {
            if let Err(error) = loaded[remote].add(space, number, value) {
                tracing::error!(%error, ?space, number, "a record in the store is left out");
            }
        })?;
        Ok((Some(journal), loaded))
    });
    match opened.await {
        Ok(opened) => opened,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

impl Loaded {
    fn add(&mut self, space: Space, number: u64, value: &[u8]) -> Result<(), String> {
        match space {
            Space::In => self
                .inward
                .add(number, value)
                .map_err(|error| error.to_string()),
            Space::Out => self
                .outward
                .add(number, value)
                .map_err(|error| error.to_string()),
            Space::InIds => {
                let of = value.try_into().map(u64::from_be_bytes);
                let (Ok(id), Ok(of)) = (u16::try_from(number), of) else {
                    return Err("expected a packet id and a number".to_owned());
                };
                self.inward.used(of);
                self.handshakes.in_ids.insert(id, of);
                Ok(())
            }
            Space::OutIds => {
                let id = OutId::decode(value);
                let id = id.ok_or("expected a packet id and a state")?;
                self.outward.used(number);
                self.handshakes.out_ids.insert(number, id);
                Ok(())
            }
            Space::Names => {
                self.outward.used(number);
                self.names.restore(number, value);
                Ok(())
            }
        }
    }
}

/// Connects one remote's client to the fabric and starts its outward rules.
struct Join {
    remote: String,
    broker: String,
    options: Options,
    rules: Vec<Rule>,
    own_hop: Arc<str>,
    record: Record,
    outward: Spool<Owed>,
    names: Names,
    passing: mpsc::Sender<Outbound>,
    shutdown: CancellationToken,
    tasks: Outward,
}

impl Join {
    /// Tries until it works, or can never work.
    async fn run(self, fabric: watch::Sender<Joined>) {
        let mut backoff = Backoff::new(FABRIC_RETRY);
        loop {
            tokio::time::sleep(backoff.delay(rand::random())).await;
            match self.attempt().await {
                Ok(client) => {
                    tracing::info!(remote = %self.remote, "the fabric is there");
                    fabric.send_replace(Joined::Yes(client));
                    break;
                }
                Err(error) if is_passing(&error) => {
                    tracing::warn!(remote = %self.remote, %error, "still without the fabric");
                }
                Err(error) => {
                    fabric.send_replace(Joined::Refused(error.to_string().into()));
                    break;
                }
            }
        }
        fabric.closed().await;
    }

    async fn attempt(&self) -> Result<Client, StartError> {
        let client = Client::connect(self.options.clone()).await;
        let client = client.map_err(|source| StartError::Connect {
            broker: self.broker.clone(),
            source,
        })?;
        let mut tasks = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            if !rule.direction().carries_out() {
                continue;
            }
            let options = SubscribeOptions {
                // QoS 2 is the fabric's QoS 1 with an id.
                max_qos: rule.qos_cap.min(Qos::AtLeastOnce),
                no_local: true,
                // Retained messages are for a remote that keeps them, and it keeps them already
                // when the session does.
                retain_handling: match rule.retain {
                    Retain::Keep => RetainHandling::SendIfNew,
                    Retain::Clear => RetainHandling::DoNotSend,
                },
                retain_as_published: rule.retain == Retain::Keep,
                manual_ack: true,
                ..SubscribeOptions::default()
            };
            let filter = rule.local_filter();
            let subscription = client.subscribe_with(filter.as_str(), options).await;
            let subscription = subscription.map_err(|source| StartError::Subscribe {
                remote: self.remote.clone(),
                filter: filter.clone(),
                source,
            })?;
            tasks.push(OutwardTask {
                rule: rule.clone(),
                index,
                own_hop: Arc::clone(&self.own_hop),
                record: self.record.clone(),
                subscription,
                spool: self.outward.clone(),
                names: self.names.clone(),
                passing: self.passing.clone(),
                shutdown: self.shutdown.clone(),
            });
        }
        let tasks = tasks.into_iter().map(|task| tokio::spawn(task.run()));
        let mut running = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        running.extend(tasks.map(AbortOnDropHandle::new));
        Ok(client)
    }
}

/// Whether another attempt may succeed.
fn is_passing(error: &StartError) -> bool {
    match error {
        StartError::Connect { source, .. } => match source {
            ConnectError::Goodbye(status) => matches!(
                status.code,
                Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded
            ),
            ConnectError::Resolve { .. }
            | ConnectError::Unreachable { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Lost { .. } => true,
            _ => false,
        },
        _ => false,
    }
}

fn session(mut options: Options, fabric: &FabricConfig, remote: &RemoteConfig) -> Options {
    if let Some(name) = &fabric.server_name {
        options = options.server_name(name);
    }
    if let Some(session) = &fabric.session {
        options = options
            .session(&format!("{session}/{}", remote.name))
            .session_expiry(fabric.session_expiry);
    }
    options
}
