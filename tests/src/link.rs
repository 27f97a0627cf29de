//! A bad network on one machine: a UDP relay that loses, delays, reorders, cuts and is narrow, and that
//! changes its port towards the broker as a NAT does.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Datagrams held back by delay at one time. A burst beyond it is lost and counted as overflow, as in
/// any router.
const MAX_HELD: usize = 16_384;
/// Datagrams from the broker that wait for the relay; one more is lost and counted as overflow.
const MAX_RETURNS: usize = 4_096;
/// Clients behind one link; datagrams of one more are lost and counted as overflow.
const MAX_CLIENTS: usize = 1_024;
/// A datagram picked for reordering is overtaken by everything sent within this time.
const REORDER_HOLD: Duration = Duration::from_millis(20);
/// Bytes that wait where a link is narrow; a datagram that finds more is lost, as in any router.
const NARROW_BUFFER: u64 = 64 << 10;
/// The largest UDP payload.
const MAX_DATAGRAM: usize = 65_536;
/// Asked of the kernel so that the relay itself loses nothing; the kernel may grant less.
const SOCKET_BUFFER: usize = 4 << 20;

/// What the link does to the datagrams of a direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weather {
    /// The probability, 0 to 1, that a datagram is lost.
    pub loss: f64,
    /// The time that every datagram takes.
    pub delay: Duration,
    /// The largest addition to `delay`, uniformly random. Jitter alone keeps the order.
    pub jitter: Duration,
    /// The probability, 0 to 1, that a datagram is held back and overtaken.
    pub reorder: f64,
    /// Nothing passes.
    pub cut: bool,
    /// Bytes that pass in a second; datagrams wait for those before them.
    pub rate: Option<u64>,
    /// How many datagrams of each client reach the broker; those after them are lost. Counts on the
    /// way up only.
    pub uplink_quota: Option<u64>,
}

impl Weather {
    /// Everything passes at once.
    pub const FAIR: Weather = Weather {
        loss: 0.0,
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        reorder: 0.0,
        cut: false,
        rate: None,
        uplink_quota: None,
    };
}

/// What has happened on a link so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounts {
    /// Datagrams passed on to the broker.
    pub up: u64,
    /// Datagrams passed on to clients.
    pub down: u64,
    /// Datagrams lost by intent: loss, cut, quota, and rate with its buffer full.
    pub lost: u64,
    /// Datagrams lost because one of the relay's own bounds was reached.
    pub overflow: u64,
}

/// A relay between clients and one broker. Clients connect to [`UdpLink::address`]; dropping the
/// link cuts it.
#[derive(Debug)]
pub struct UdpLink {
    address: SocketAddr,
    weather: watch::Sender<BothWays>,
    commands: mpsc::Sender<Command>,
    counters: Arc<Counters>,
    _relay: AbortOnDropHandle<()>,
}

impl UdpLink {
    /// Starts a relay towards `broker`. The same seed and the same traffic meet the same fate.
    pub async fn start(broker: SocketAddr, seed: u64) -> io::Result<UdpLink> {
        let front = Arc::new(bind().await?);
        let address = front.local_addr()?;
        let (weather, weather_seen) = watch::channel(BothWays {
            up: Weather::FAIR,
            down: Weather::FAIR,
        });
        let (commands, commands_seen) = mpsc::channel(1);
        let (returns, returned) = mpsc::channel(MAX_RETURNS);
        let counters = Arc::new(Counters::default());
        let relay = Relay {
            front,
            broker,
            weather: weather_seen,
            counters: Arc::clone(&counters),
            flows: HashMap::new(),
            returns,
            held: BinaryHeap::new(),
            held_so_far: 0,
            up: Direction::new(seed),
            down: Direction::new(!seed),
        };
        Ok(UdpLink {
            address,
            weather,
            commands,
            counters,
            _relay: AbortOnDropHandle::new(tokio::spawn(relay.run(commands_seen, returned))),
        })
    }

    /// Where clients find the broker.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the weather of both directions, for datagrams that arrive from now on.
    pub fn set(&self, weather: Weather) {
        self.set_each(weather, weather);
    }

    /// Changes the weather towards the broker and towards clients, for datagrams that arrive from now
    /// on.
    pub fn set_each(&self, up: Weather, down: Weather) {
        self.weather.send_replace(BothWays { up, down });
    }

    /// Loses everything in both directions until [`UdpLink::heal`].
    pub fn cut(&self) {
        self.weather.send_modify(|weather| weather.cut(true));
    }

    /// Ends a cut.
    pub fn heal(&self) {
        self.weather.send_modify(|weather| weather.cut(false));
    }

    /// Gives every client a new source port towards the broker; the old ports are closed. Answers
    /// once the new ports are in use.
    pub async fn rebind(&self) {
        self.command(Command::Rebind).await;
    }

    /// Sends to another broker address from now on, from new ports.
    pub async fn redirect(&self, broker: SocketAddr) {
        self.command(|done| Command::Redirect(broker, done)).await;
    }

    /// What has happened so far.
    pub fn counts(&self) -> LinkCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LinkCounts {
            up: read(&self.counters.up),
            down: read(&self.counters.down),
            lost: read(&self.counters.lost),
            overflow: read(&self.counters.overflow),
        }
    }

    async fn command(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) {
        let (done, is_done) = oneshot::channel();
        let sent = self.commands.send(command(done)).await;
        sent.expect("the relay runs as long as the link lives");
        is_done.await.expect("the relay answers every command");
    }
}

/// The weather of each direction.
#[derive(Debug, Clone, Copy)]
struct BothWays {
    up: Weather,
    down: Weather,
}

impl BothWays {
    fn cut(&mut self, cut: bool) {
        self.up.cut = cut;
        self.down.cut = cut;
    }
}

#[derive(Debug)]
enum Command {
    Rebind(oneshot::Sender<()>),
    Redirect(SocketAddr, oneshot::Sender<()>),
}

#[derive(Debug, Default)]
struct Counters {
    up: AtomicU64,
    down: AtomicU64,
    lost: AtomicU64,
    overflow: AtomicU64,
}

/// The task behind a link.
struct Relay {
    /// Where clients send to.
    front: Arc<UdpSocket>,
    broker: SocketAddr,
    weather: watch::Receiver<BothWays>,
    counters: Arc<Counters>,
    /// One socket towards the broker for each client, by the client's address.
    flows: HashMap<SocketAddr, Flow>,
    /// Given to the reader of each flow.
    returns: mpsc::Sender<(SocketAddr, Bytes)>,
    /// Delayed datagrams, the next one due on top.
    held: BinaryHeap<Reverse<Parcel>>,
    /// Numbers the delayed datagrams, so that those due at the same time keep their order.
    held_so_far: u64,
    up: Direction,
    down: Direction,
}

struct Flow {
    back: Arc<UdpSocket>,
    /// Datagrams this client has sent.
    sent: u64,
    _reader: AbortOnDropHandle<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Heading {
    Up,
    Down,
}

/// A delayed datagram; ordered by its first two fields.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Parcel {
    due: Instant,
    number: u64,
    client: SocketAddr,
    heading: Heading,
    datagram: Bytes,
}

impl Relay {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut returned: mpsc::Receiver<(SocketAddr, Bytes)>,
    ) {
        let mut buffer = vec![0; MAX_DATAGRAM];
        loop {
            let due = self.held.peek().map(|Reverse(parcel)| parcel.due);
            tokio::select! {
                // A command must not wait behind traffic; what is due goes before what is new.
                biased;
                command = commands.recv() => match command {
                    Some(Command::Rebind(done)) => {
                        self.reconnect_all().await;
                        let _ = done.send(());
                    }
                    Some(Command::Redirect(broker, done)) => {
                        self.broker = broker;
                        self.reconnect_all().await;
                        let _ = done.send(());
                    }
                    None => return,
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    if let Some(Reverse(parcel)) = self.held.pop() {
                        self.send(parcel.client, parcel.heading, &parcel.datagram).await;
                    }
                }
                Some((client, datagram)) = returned.recv() => {
                    self.accept(client, Heading::Down, datagram).await;
                }
                received = self.front.recv_from(&mut buffer) => {
                    // An error here is an ICMP answer to a client that is gone.
                    if let Ok((length, client)) = received {
                        let datagram = Bytes::copy_from_slice(&buffer[..length]);
                        self.accept_from_client(client, datagram).await;
                    }
                }
            }
        }
    }

    async fn accept_from_client(&mut self, client: SocketAddr, datagram: Bytes) {
        if !self.flows.contains_key(&client) {
            if self.flows.len() >= MAX_CLIENTS {
                count(&self.counters.overflow);
                return;
            }
            match self.connect(client).await {
                Ok(flow) => self.flows.insert(client, flow),
                Err(_) => return count(&self.counters.overflow),
            };
        }
        let flow = self.flows.get_mut(&client).expect("it was just inserted");
        flow.sent += 1;
        let quota = self.weather.borrow().up.uplink_quota;
        if quota.is_some_and(|quota| flow.sent > quota) {
            return count(&self.counters.lost);
        }
        self.accept(client, Heading::Up, datagram).await;
    }

    async fn accept(&mut self, client: SocketAddr, heading: Heading, datagram: Bytes) {
        let weather = *self.weather.borrow();
        let (direction, weather) = match heading {
            Heading::Up => (&mut self.up, &weather.up),
            Heading::Down => (&mut self.down, &weather.down),
        };
        match direction.fate(weather, datagram.len(), Instant::now()) {
            Fate::Lost => count(&self.counters.lost),
            Fate::Now => self.send(client, heading, &datagram).await,
            Fate::Later(_) if self.held.len() >= MAX_HELD => count(&self.counters.overflow),
            Fate::Later(due) => {
                self.held_so_far += 1;
                self.held.push(Reverse(Parcel {
                    due,
                    number: self.held_so_far,
                    client,
                    heading,
                    datagram,
                }));
            }
        }
    }

    async fn send(&self, client: SocketAddr, heading: Heading, datagram: &[u8]) {
        let (sent, counter) = match heading {
            Heading::Down => (
                self.front.send_to(datagram, client).await,
                &self.counters.down,
            ),
            Heading::Up => match self.flows.get(&client) {
                Some(flow) => (
                    flow.back.send_to(datagram, self.broker).await,
                    &self.counters.up,
                ),
                None => return,
            },
        };
        match sent {
            Ok(_) => count(counter),
            Err(_) => count(&self.counters.overflow),
        }
    }

    async fn connect(&self, client: SocketAddr) -> io::Result<Flow> {
        let back = Arc::new(bind().await?);
        let reader = read_returns(
            client,
            Arc::clone(&back),
            self.returns.clone(),
            Arc::clone(&self.counters),
        );
        Ok(Flow {
            back,
            sent: 0,
            _reader: AbortOnDropHandle::new(tokio::spawn(reader)),
        })
    }

    async fn reconnect_all(&mut self) {
        let clients: Vec<(SocketAddr, u64)> = self
            .flows
            .iter()
            .map(|(client, flow)| (*client, flow.sent))
            .collect();
        for (client, sent) in clients {
            if let Ok(flow) = self.connect(client).await {
                self.flows.insert(client, Flow { sent, ..flow });
            }
        }
    }
}

async fn read_returns(
    client: SocketAddr,
    back: Arc<UdpSocket>,
    returns: mpsc::Sender<(SocketAddr, Bytes)>,
    counters: Arc<Counters>,
) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // An error here is an ICMP answer: the broker is down, and may come back.
        let Ok((length, _)) = back.recv_from(&mut buffer).await else {
            continue;
        };
        match returns.try_send((client, Bytes::copy_from_slice(&buffer[..length]))) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => count(&counters.overflow),
            Err(mpsc::error::TrySendError::Closed(_)) => return,
        }
    }
}

/// What happens to one datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lost,
    Now,
    Later(Instant),
}

/// Decides the fate of the datagrams of one direction, one after the other.
struct Direction {
    rng: StdRng,
    /// When the latest datagram that was not reordered is due: jitter does not overtake it.
    latest: Option<Instant>,
    /// When everything before will have passed where the link is narrow.
    passed: Option<Instant>,
}

impl Direction {
    fn new(seed: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            latest: None,
            passed: None,
        }
    }

    fn fate(&mut self, weather: &Weather, bytes: usize, now: Instant) -> Fate {
        // Three draws each time, whatever the weather, so that the fate of the n-th datagram depends
        // only on the seed and n.
        let (loss, jitter, reorder): (f64, f64, f64) = self.rng.random();
        if weather.cut || loss < weather.loss {
            return Fate::Lost;
        }
        let passes = match weather.rate {
            None => now,
            Some(rate) => {
                let time = |bytes: u64| Duration::from_secs_f64(bytes as f64 / rate as f64);
                let begins = self.passed.map_or(now, |passed| passed.max(now));
                if begins - now > time(NARROW_BUFFER) {
                    return Fate::Lost;
                }
                let passed = begins + time(bytes as u64);
                self.passed = Some(passed);
                passed
            }
        };
        if reorder < weather.reorder {
            return Fate::Later(passes + weather.delay + weather.jitter + REORDER_HOLD);
        }
        let due = passes + weather.delay + weather.jitter.mul_f64(jitter);
        let due = self.latest.map_or(due, |latest| due.max(latest));
        self.latest = Some(due);
        if due <= now {
            Fate::Now
        } else {
            Fate::Later(due)
        }
    }
}

async fn bind() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let options = socket2::SockRef::from(&socket);
    options.set_recv_buffer_size(SOCKET_BUFFER)?;
    options.set_send_buffer_size(SOCKET_BUFFER)?;
    Ok(socket)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::wait::within;

    fn fates(weather: Weather, seed: u64, count: usize) -> Vec<Fate> {
        let now = Instant::now();
        let mut direction = Direction::new(seed);
        (0..count)
            .map(|_| direction.fate(&weather, 1_000, now))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_seed_meets_the_same_fate() {
        let weather = Weather {
            loss: 0.3,
            jitter: Duration::from_millis(10),
            reorder: 0.1,
            ..Weather::FAIR
        };
        assert_eq!(fates(weather, 7, 1_000), fates(weather, 7, 1_000));
        assert_ne!(fates(weather, 7, 1_000), fates(weather, 8, 1_000));
        let lost = fates(weather, 7, 1_000)
            .iter()
            .filter(|fate| **fate == Fate::Lost)
            .count();
        assert!((250..350).contains(&lost), "{lost}");
    }

    #[tokio::test(start_paused = true)]
    async fn jitter_alone_keeps_the_order() {
        let weather = Weather {
            delay: Duration::from_millis(5),
            jitter: Duration::from_millis(10),
            ..Weather::FAIR
        };
        let dues: Vec<Instant> = fates(weather, 1, 1_000)
            .into_iter()
            .map(|fate| match fate {
                Fate::Later(due) => due,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(dues.is_sorted());
    }

    #[tokio::test(start_paused = true)]
    async fn a_narrow_link_takes_its_time_and_loses_what_its_buffer_cannot_hold() {
        let weather = Weather {
            rate: Some(1_000_000),
            ..Weather::FAIR
        };
        let now = Instant::now();
        let fates = fates(weather, 1, 100);
        let through = 1 + (NARROW_BUFFER / 1_000) as usize;
        for (index, fate) in fates.into_iter().enumerate() {
            let due = now + Duration::from_millis(index as u64 + 1);
            let want = match index {
                index if index < through => Fate::Later(due),
                _ => Fate::Lost,
            };
            assert_eq!(fate, want, "{index}");
        }
    }

    async fn echo() -> (
        SocketAddr,
        AbortOnDropHandle<()>,
        watch::Receiver<SocketAddr>,
    ) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let (sender, seen) = watch::channel(address);
        let task = tokio::spawn(async move {
            let mut buffer = [0; 2_048];
            loop {
                let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
                    continue;
                };
                sender.send_replace(peer);
                socket.send_to(&buffer[..length], peer).await.unwrap();
            }
        });
        (address, AbortOnDropHandle::new(task), seen)
    }

    async fn exchange(client: &UdpSocket, link: &UdpLink, text: &[u8]) {
        client.send_to(text, link.address()).await.unwrap();
        let mut buffer = [0; 2_048];
        let (length, _) = within("the echo", client.recv_from(&mut buffer))
            .await
            .unwrap();
        assert_eq!(&buffer[..length], text);
    }

    #[tokio::test]
    async fn rebinding_changes_the_port_the_broker_sees_and_nothing_else() {
        let (broker, _task, seen) = echo().await;
        let link = UdpLink::start(broker, 1).await.unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        exchange(&client, &link, b"before").await;
        let before = *seen.borrow();
        link.rebind().await;
        exchange(&client, &link, b"after").await;
        assert_ne!(*seen.borrow(), before);
        assert_eq!((link.counts().up, link.counts().down), (2, 2));
    }

    #[tokio::test]
    async fn a_cut_and_a_used_up_quota_lose_datagrams_and_count_them() {
        let (broker, _task, _seen) = echo().await;
        let link = UdpLink::start(broker, 1).await.unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        exchange(&client, &link, b"1").await;
        link.cut();
        client.send_to(b"lost", link.address()).await.unwrap();
        within("the cut", async {
            while link.counts().lost < 1 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        link.heal();
        exchange(&client, &link, b"3").await;
        link.set(Weather {
            uplink_quota: Some(4),
            ..Weather::FAIR
        });
        exchange(&client, &link, b"4").await;
        client.send_to(b"lost", link.address()).await.unwrap();
        within("the quota", async {
            while link.counts().lost < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!((link.counts().up, link.counts().overflow), (3, 0));
    }
}
