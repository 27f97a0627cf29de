//! The bridge as a value: start it, look at it, stop it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use selvedge_client::{
    Client, ConnectError, Credentials, Options, OptionsError, ReloadableCredentials,
    RetainHandling, State, SubscribeError, SubscribeOptions, Subscription, TrustAnchors,
};
use selvedge_proto::topic::TopicFilter;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::config::{BridgeConfig, FabricConfig, RemoteConfig};
use crate::forward::OutwardTask;
use crate::mapping::Retain;
use crate::remote::Remote;
use crate::status::{Record, RemoteStatus};

/// How long the tasks of all remotes may take to stop; a little more than each gives itself.
const STOP: Duration = Duration::from_secs(7);

/// Why the bridge did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The bridge's certificate, key or trust anchors cannot be loaded.
    #[error(transparent)]
    Credentials(#[from] selvedge_certs::LoadError),
    /// The broker's address is not one.
    #[error(transparent)]
    Options(#[from] OptionsError),
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
    records: Vec<Record>,
    shutdown: CancellationToken,
    clients: Vec<Client>,
    remotes: Vec<AbortOnDropHandle<()>>,
    outward: Vec<AbortOnDropHandle<Subscription>>,
}

impl Bridge {
    /// Connects to the fabric, once for each remote, and subscribes there; the connections to the
    /// remotes are then made, and kept, in the background.
    ///
    /// # Errors
    /// [`StartError`] when the fabric cannot be reached or refuses something. A remote that cannot be
    /// reached is no error: see [`Self::status`].
    pub async fn start(config: BridgeConfig) -> Result<Self, StartError> {
        let credentials = Credentials::from_files(&config.fabric.cert, &config.fabric.key)?;
        let credentials = ReloadableCredentials::new(credentials);
        let trust = TrustAnchors::from_file(&config.fabric.ca)?;
        let mut bridge = Self {
            records: Vec::new(),
            shutdown: CancellationToken::new(),
            clients: Vec::new(),
            remotes: Vec::new(),
            outward: Vec::new(),
        };
        for remote in config.remotes {
            let mut options = Options::new(&config.fabric.broker)?
                .credentials(credentials.clone())
                .trust(trust.clone())
                .agent(concat!("selvedge-bridge/", env!("CARGO_PKG_VERSION")));
            options = session(options, &config.fabric, &remote);
            let client = Client::connect(options).await;
            let client = client.map_err(|source| StartError::Connect {
                broker: config.fabric.broker.clone(),
                source,
            })?;
            bridge.add(remote, client).await?;
        }
        Ok(bridge)
    }

    /// What every remote and rule is doing, in the order of the configuration.
    pub fn status(&self) -> Vec<RemoteStatus> {
        let records = self.records.iter().zip(&self.clients);
        records
            .map(|(record, client)| record.snapshot(client.state().borrow().is_connected()))
            .collect()
    }

    /// Waits until the fabric has turned the bridge away for good, and gives its reason. Nothing more
    /// will be carried then, and the bridge should be shut down.
    pub async fn closed(&self) -> Arc<str> {
        let closed = self.clients.iter().map(|client| {
            let mut state = client.state();
            Box::pin(async move {
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

    /// Waits until every remote is connected and has granted every inward rule's subscription. A remote
    /// that refuses one keeps this waiting; [`Self::status`] says why.
    pub async fn ready(&self) {
        let mut receivers: Vec<watch::Receiver<bool>> =
            self.records.iter().map(Record::ready).collect();
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
        let stopped = async {
            for remote in self.remotes {
                let _panicked = remote.await;
            }
            let mut subscriptions = Vec::new();
            for task in self.outward {
                subscriptions.extend(task.await);
            }
            subscriptions
        };
        let subscriptions = tokio::time::timeout(STOP, stopped).await;
        // Before the subscriptions are dropped, which would take them out of the sessions that the
        // fabric is to keep.
        for client in &self.clients {
            client.close().await;
        }
        drop(subscriptions);
    }

    async fn add(&mut self, config: RemoteConfig, client: Client) -> Result<(), StartError> {
        let record = Record::new(&config.name, &config.rules);
        let own_hop: Arc<str> = format!("{}#{}", client.identity().uri(), config.name).into();
        let (outbox, arrivals) = Remote::arrivals();
        let room_bytes = u32::try_from(config.outbox_bytes).unwrap_or(u32::MAX);
        let room = Arc::new(Semaphore::new(config.outbox_bytes));
        for (index, rule) in config.rules.iter().enumerate() {
            if !rule.direction().carries_out() {
                continue;
            }
            let options = SubscribeOptions {
                max_qos: rule.qos_cap,
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
                remote: config.name.clone(),
                filter: filter.clone(),
                source,
            })?;
            let task = OutwardTask {
                rule: rule.clone(),
                index,
                own_hop: Arc::clone(&own_hop),
                record: record.clone(),
                subscription,
                outbox: outbox.clone(),
                room: Arc::clone(&room),
                room_bytes,
                shutdown: self.shutdown.clone(),
            };
            self.outward
                .push(AbortOnDropHandle::new(tokio::spawn(task.run())));
        }
        let shutdown = self.shutdown.clone();
        let remote = Remote::new(
            config,
            client.clone(),
            own_hop,
            record.clone(),
            arrivals,
            shutdown,
        );
        self.remotes
            .push(AbortOnDropHandle::new(tokio::spawn(remote.run())));
        self.records.push(record);
        self.clients.push(client);
        Ok(())
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
