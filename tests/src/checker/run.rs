//! One check from start to verdict.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use selvedge_client::Durability;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::book::Book;
use super::ledger::{Counts, Ledger, Verdict};
use super::plan::{Fault, Plan, Side};
use super::publisher::{Publisher, PublisherError};
use super::reader::{EXPIRY, Presence, Reader, ReaderError};
use super::site::Site;
use crate::power::Fsync;

/// How long a check goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Span {
    /// So many rounds of every kind of fault.
    Rounds(u64),
    /// Whole rounds until so much time has passed.
    For(Duration),
    /// These faults.
    Faults(Vec<Fault>),
}

/// What a check is to be.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `selvedge` binary.
    pub binary: PathBuf,
    /// Decides what is broken when. Scheduling is not in its hands, so that the same seed is the
    /// same attack and not the same run.
    pub seed: u64,
    /// How long it goes on.
    pub span: Span,
    /// Clients that publish; every second one demands disk and gives ids.
    pub publishers: usize,
    /// Topics of each publisher.
    pub topics: usize,
    /// Messages that a publisher has on their way at a time.
    pub window: usize,
    /// Clients that subscribe; the last one is away now and then.
    pub readers: usize,
    /// Messages acknowledged at disk between two faults, from and to.
    pub spacing: (u64, u64),
    /// How long a pause, cut or storm lasts, from and to.
    pub outage: (Duration, Duration),
    /// Whether the disk keeps its word.
    pub fsync: Fsync,
    /// How long everything may stand still, with everything working, before that is a failure.
    pub patience: Duration,
}

impl Settings {
    /// A short check with this binary and seed: some seconds.
    pub fn new(binary: impl Into<PathBuf>, seed: u64) -> Self {
        Self {
            binary: binary.into(),
            seed,
            span: Span::Rounds(1),
            publishers: 3,
            topics: 2,
            window: 32,
            readers: 3,
            spacing: (100, 300),
            outage: (Duration::from_millis(100), Duration::from_millis(2500)),
            fsync: Fsync::Honest,
            patience: Duration::from_secs(30),
        }
    }
}

/// How far a check is.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// What publishers and readers have seen.
    pub counts: Counts,
    /// Faults so far, by kind.
    pub faults: BTreeMap<&'static str, u64>,
}

/// What came of a check.
#[derive(Debug)]
pub struct Report {
    /// The seed it ran with.
    pub seed: u64,
    /// Whether the delivery contract was kept.
    pub verdict: Verdict,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Every fault with the number of messages acknowledged at disk before it.
    pub history: Vec<(u64, Fault)>,
    /// Bytes that power cuts caught before they were fsynced.
    pub unsynced: u64,
    /// Why power cuts were kills only, if they were.
    pub no_power_cuts: Option<String>,
    /// How long it took.
    pub took: Duration,
    /// The broker's log, configuration and store, kept if the contract was broken.
    pub evidence: Option<PathBuf>,
}

/// Why a check has no verdict, which is a failure as well.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The broker, its disk or a link cannot be handled.
    #[error("cannot go on: {0}")]
    Site(#[from] io::Error),
    /// A publisher gave up.
    #[error("a publisher gave up: {0}")]
    Publisher(#[from] PublisherError),
    /// A reader gave up.
    #[error("a reader gave up: {0}")]
    Reader(#[from] ReaderError),
    /// Nothing moves any more, although everything works.
    #[error(
        "nothing moved for {patience:?} while waiting for {what}, with {counts:?} after {history:?}"
    )]
    Stalled {
        /// How long it was waited.
        patience: Duration,
        /// For what.
        what: &'static str,
        /// How far it was.
        counts: Counts,
        /// The faults until then.
        history: Vec<(u64, Fault)>,
    },
}

/// Runs a check. `watch` is told of it after every fault.
///
/// # Errors
/// It came to no verdict. The folder with the broker's log is kept then and named on the error's way.
pub async fn check(
    settings: &Settings,
    mut on_progress: impl FnMut(&Progress),
) -> Result<Report, CheckError> {
    let started = Instant::now();
    let folder = tempfile::Builder::new().prefix("soak-").tempdir()?;
    let mut random = StdRng::seed_from_u64(settings.seed);
    let mut site = Site::start(
        &settings.binary,
        folder.path(),
        settings.fsync,
        settings.seed,
        StdRng::seed_from_u64(random.random()),
    )
    .await?;
    let no_power_cuts = site.no_power_cuts().map(str::to_owned);
    let mut cast = Cast::enter(settings, &site, &mut random).await?;
    let mut history = Vec::new();
    let attacked = attack(
        settings,
        &mut site,
        &mut cast,
        &mut history,
        &mut on_progress,
    )
    .await;
    let verdict = match attacked {
        Ok(()) => cast.leave(settings, &history).await,
        Err(error) => Err(error),
    };
    let unsynced = site.unsynced;
    let stopped = match &verdict {
        Ok(_) => site.stop().await.map_err(CheckError::from),
        Err(_) => {
            drop(site);
            Ok(())
        }
    };
    let broken = !matches!(&verdict, Ok(verdict) if verdict.violations.is_empty());
    let evidence = (broken || stopped.is_err()).then(|| TempDir::keep(folder));
    stopped?;
    Ok(Report {
        seed: settings.seed,
        verdict: verdict?,
        faults: by_kind(&history),
        history,
        unsynced,
        no_power_cuts,
        took: started.elapsed(),
        evidence,
    })
}

/// Lets faults happen, a number of messages apart.
async fn attack(
    settings: &Settings,
    site: &mut Site,
    cast: &mut Cast,
    history: &mut Vec<(u64, Fault)>,
    on_progress: &mut impl FnMut(&Progress),
) -> Result<(), CheckError> {
    let begun = Instant::now();
    let (shortest, longest) = settings.outage;
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let mut plan = Plan::new(
        settings.seed,
        settings.spacing.0..=settings.spacing.1,
        milliseconds(shortest)..=milliseconds(longest),
    );
    let mut given = match &settings.span {
        Span::Faults(faults) => faults.clone().into_iter(),
        _ => Vec::new().into_iter(),
    };
    loop {
        let next = match &settings.span {
            Span::Faults(_) => given.next().map(|fault| (settings.spacing.1, fault)),
            Span::Rounds(rounds) if plan.at_end_of_round() && plan.rounds() >= *rounds => None,
            Span::For(time) if plan.at_end_of_round() && begun.elapsed() >= *time => None,
            _ => plan.next(),
        };
        let Some((acks, fault)) = next else {
            return Ok(());
        };
        let reached = cast.book.counts().acked_disk + acks;
        let enough = |book: &Book| book.counts().acked_disk >= reached;
        cast.wait(settings, "acknowledgements at disk", history, enough)
            .await?;
        site.check()?;
        let counts = cast.book.counts();
        history.push((counts.acked_disk, fault));
        match fault {
            Fault::Leave => cast.absentee(settings, Presence::Away, history).await?,
            Fault::Return => cast.absentee(settings, Presence::Here, history).await?,
            other => site.suffer(other).await?,
        }
        on_progress(&Progress {
            counts: cast.book.counts(),
            faults: by_kind(history),
        });
    }
}

/// Publishers and readers.
struct Cast {
    book: Book,
    enough: CancellationToken,
    publishers: JoinSet<Result<(), PublisherError>>,
    readers: JoinSet<Result<(), ReaderError>>,
    /// Of each reader, what it is to be and what it is. The last one is the absentee.
    presence: Vec<(watch::Sender<Presence>, watch::Receiver<Presence>)>,
}

impl Cast {
    /// Readers first, so that they are owed everything.
    async fn enter(
        settings: &Settings,
        site: &Site,
        random: &mut StdRng,
    ) -> Result<Self, CheckError> {
        let mut cast = Self {
            book: Book::new(),
            enough: CancellationToken::new(),
            publishers: JoinSet::new(),
            readers: JoinSet::new(),
            presence: Vec::new(),
        };
        // Some over each link, some straight.
        let routes = [Some(Side::A), Some(Side::B), None];
        let route = |index: usize| routes[index % routes.len()];
        for index in 0..settings.readers {
            let name = format!("reader-{index}");
            let (wanted, is_wanted) = watch::channel(Presence::Here);
            let (reached, is_reached) = watch::channel(Presence::Away);
            let reader = Reader {
                id: cast.book.enter(|ledger| ledger.reader(&name)),
                options: site
                    .options(&name, route(index))
                    .session("kept")
                    .session_expiry(EXPIRY),
                filter: "soak/#".to_owned(),
                manual_ack: index % 2 == 0,
                book: cast.book.clone(),
                wanted: is_wanted,
                reached,
            };
            cast.readers.spawn(reader.run());
            cast.presence.push((wanted, is_reached));
        }
        for place in 0..cast.presence.len() {
            cast.reached(settings, place, Presence::Here, &[]).await?;
        }
        for index in 0..settings.publishers {
            let name = format!("publisher-{index}");
            let streams = (0..settings.topics).map(|topic| {
                let topic = format!("soak/{index}/{topic}");
                let stream = cast
                    .book
                    .enter(|ledger| ledger.stream(&Site::identity(&name), &topic));
                (stream, topic)
            });
            let publisher = Publisher {
                streams: streams.collect(),
                options: site.options(&name, route(index)),
                demand: if index % 2 == 0 {
                    Durability::Default
                } else {
                    Durability::Disk
                },
                with_ids: index % 2 == 1,
                window: settings.window,
                random: StdRng::seed_from_u64(random.random()),
                book: cast.book.clone(),
                enough: cast.enough.clone(),
            };
            cast.publishers.spawn(publisher.run());
        }
        Ok(cast)
    }

    /// Waits for something that the ledger shows. Ends early with whoever gives up.
    async fn wait(
        &mut self,
        settings: &Settings,
        what: &'static str,
        history: &[(u64, Fault)],
        done: impl Fn(&Book) -> bool,
    ) -> Result<(), CheckError> {
        let book = self.book.clone();
        tokio::select! {
            moved = book.until(settings.patience, done) => {
                if moved {
                    return Ok(());
                }
                Err(CheckError::Stalled {
                    patience: settings.patience,
                    what,
                    counts: book.counts(),
                    history: history.to_vec(),
                })
            }
            error = self.gives_up() => Err(error),
        }
    }

    /// Resolves when an actor fails.
    async fn gives_up(&mut self) -> CheckError {
        loop {
            let failed: Option<CheckError> = tokio::select! {
                Some(ended) = self.publishers.join_next() => {
                    ended.expect("publishers do not panic").err().map(Into::into)
                }
                Some(ended) = self.readers.join_next() => {
                    ended.expect("readers do not panic").err().map(Into::into)
                }
                else => return std::future::pending().await,
            };
            if let Some(error) = failed {
                return error;
            }
        }
    }

    /// Sends the absentee away, or calls it back.
    async fn absentee(
        &mut self,
        settings: &Settings,
        presence: Presence,
        history: &[(u64, Fault)],
    ) -> Result<(), CheckError> {
        let place = self.presence.len() - 1;
        self.presence[place].0.send_replace(presence);
        self.reached(settings, place, presence, history).await
    }

    async fn reached(
        &mut self,
        settings: &Settings,
        place: usize,
        presence: Presence,
        history: &[(u64, Fault)],
    ) -> Result<(), CheckError> {
        let mut reached = self.presence[place].1.clone();
        let reached = async move {
            // A reader that gave up is seen below.
            if reached.wait_for(|found| *found == presence).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            in_time = tokio::time::timeout(settings.patience, reached) => in_time.map_err(|_| {
                CheckError::Stalled {
                    patience: settings.patience,
                    what: "a reader to come or go",
                    counts: self.book.counts(),
                    history: history.to_vec(),
                }
            }),
            error = self.gives_up() => Err(error),
        }
    }

    /// Everything works again: publishers finish, readers get what they are owed, and that is that.
    async fn leave(
        mut self,
        settings: &Settings,
        history: &[(u64, Fault)],
    ) -> Result<Verdict, CheckError> {
        self.absentee(settings, Presence::Here, history).await?;
        // A reader that lost its session must have subscribed again before the last messages.
        let lengths = self.book.read(Ledger::lengths);
        let in_touch = |book: &Book| book.read(|ledger| ledger.all_read_beyond(&lengths));
        self.wait(settings, "every reader to be in touch", history, in_touch)
            .await?;
        self.enough.cancel();
        let book = self.book.clone();
        // A publisher that never gets its answers is in the verdict, as is what never arrives.
        let finished = async {
            while let Some(ended) = self.publishers.join_next().await {
                ended.expect("publishers do not panic")?;
            }
            Ok::<(), CheckError>(())
        };
        tokio::select! {
            finished = finished => finished?,
            _ = book.until(settings.patience, |_| false) => {}
        }
        let arrived = |book: &Book| book.read(Ledger::ends_delivered);
        tokio::select! {
            _ = book.until(settings.patience, arrived) => {}
            error = self.gives_up() => return Err(error),
        }
        for (wanted, _) in &self.presence {
            wanted.send_replace(Presence::Done);
        }
        while let Some(ended) = self.readers.join_next().await {
            ended.expect("readers do not panic")?;
        }
        Ok(self.book.read(Ledger::verdict))
    }
}

fn by_kind(history: &[(u64, Fault)]) -> BTreeMap<&'static str, u64> {
    let mut kinds = BTreeMap::new();
    for (_, fault) in history {
        *kinds.entry(fault.kind()).or_default() += 1;
    }
    kinds
}
