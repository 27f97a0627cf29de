//! Inference while its workers are killed, held and cut off in turn: every request ends in time, with an answer
//! or a status, nothing goes where it may not, and no work is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use selvedge_client::{
    AnswerInfo, CallError, Client, Code, Infer, ModelRegistration, Residency, Tier,
};
use selvedge_tests::wait::eventually;
use selvedge_tests::{TestBroker, UdpLink};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

/// How long requests are made.
const TIME: Duration = Duration::from_secs(6);
/// Decides what is asked. When things happen is not in its hands.
const SEED: u64 = 7;
/// Between requests.
const PACE: Duration = Duration::from_millis(5);
/// Deadline of each.
const DEADLINE: Duration = Duration::from_millis(1_500);
/// What every request ends within after its deadline.
const AFTER: Duration = Duration::from_secs(1);
/// Between faults.
const FAULTS: Duration = Duration::from_millis(400);
/// The worker's work.
const WORK: Duration = Duration::from_millis(10);

/// A worker behind a link, and what it knows.
struct Worker {
    link: UdpLink,
    held: watch::Sender<bool>,
    seen: Arc<Seen>,
    task: Option<AbortOnDropHandle<()>>,
    path: &'static str,
    tier: Tier,
}

/// What a worker saw.
#[derive(Debug, Default)]
struct Seen {
    /// Requests that it works on now.
    running: AtomicU64,
    /// Payloads that may not leave the plant.
    private: AtomicU64,
    answered: AtomicU64,
}

/// Counts work that runs, however it ends.
struct Running(Arc<Seen>);

impl Running {
    fn new(seen: &Arc<Seen>) -> Self {
        seen.running.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(seen))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Worker {
    async fn new(broker: &TestBroker, path: &'static str, tier: Tier, seed: u64) -> Self {
        let mut worker = Self {
            link: UdpLink::start(broker.quic(), seed).await.unwrap(),
            held: watch::Sender::new(false),
            seen: Arc::default(),
            task: None,
            path,
            tier,
        };
        worker.start(broker).await;
        worker
    }

    async fn start(&mut self, broker: &TestBroker) {
        let options = broker.options(broker.device(self.path));
        let client = broker.connect(options.resolve(self.link.address())).await;
        let (seen, held) = (Arc::clone(&self.seen), self.held.subscribe());
        let work = work(client, self.tier, seen, held);
        self.task = Some(AbortOnDropHandle::new(tokio::spawn(work)));
    }
}

/// Answers until its task is ended, which ends what it works on, as the end of a process does.
async fn work(client: Client, tier: Tier, seen: Arc<Seen>, held: watch::Receiver<bool>) {
    let registration = ModelRegistration {
        model: "digits".into(),
        version: "1".into(),
        tier,
        slots: 4,
        inputs: Vec::new(),
        outputs: Vec::new(),
        loaded: true,
        service_time: Some(WORK),
        continues: false,
    };
    let mut worker = client.work(registration).await.unwrap();
    let mut running = JoinSet::new();
    while let Some(mut inference) = worker.next().await {
        let (seen, mut held) = (Arc::clone(&seen), held.clone());
        running.spawn(async move {
            let _running = Running::new(&seen);
            let Ok(request) = inference.request().await else {
                return;
            };
            if request == "private" {
                seen.private.fetch_add(1, Ordering::Relaxed);
            }
            tokio::select! {
                () = inference.cancelled() => return,
                () = async {
                    tokio::time::sleep(WORK).await;
                    let _ = held.wait_for(|held| !held).await;
                } => {}
            }
            let info = AnswerInfo {
                confidence: Some(0.9),
                ..Default::default()
            };
            if inference.reply(info, "seven").await.is_ok() {
                seen.answered.fetch_add(1, Ordering::Relaxed);
            }
        });
        while running.try_join_next().is_some() {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_end_in_time_and_where_they_may_while_workers_come_and_go() {
    let broker = TestBroker::open().await;
    let mut random = StdRng::seed_from_u64(SEED);
    let mut workers = [
        Worker::new(&broker, "acme/plant-1/edge-1", Tier::Edge, 1).await,
        Worker::new(&broker, "acme/plant-1/edge-2", Tier::Edge, 2).await,
        Worker::new(&broker, "acme/cloud/gpu-1", Tier::Cloud, 3).await,
        Worker::new(&broker, "acme/cloud/gpu-2", Tier::Cloud, 4).await,
    ];
    let camera = broker.client("acme/plant-1/camera-3").await;
    let mut requests = JoinSet::new();
    let begun = Instant::now();
    let mut fault = begun + FAULTS;
    let mut turn = 0_usize;
    let mut pace = tokio::time::interval(PACE);
    while begun.elapsed() < TIME {
        pace.tick().await;
        let private = random.random_bool(0.3);
        let request = Infer::new("digits")
            .payload(if private { "private" } else { "public" })
            .residency(if private {
                Residency::Site
            } else {
                Residency::Any
            })
            .idempotent(random.random_bool(0.5))
            .deadline(DEADLINE);
        let camera = camera.clone();
        requests.spawn(async move {
            let begun = Instant::now();
            let ended = tokio::time::timeout(DEADLINE + AFTER, camera.infer(request)).await;
            (ended, begun.elapsed())
        });
        if Instant::now() >= fault {
            fault += FAULTS;
            // What was broken is whole again before the next is broken.
            let (mended, broken) = (turn % workers.len(), (turn + 1) % workers.len());
            let worker = &mut workers[mended];
            worker.held.send_replace(false);
            if worker.task.is_some() {
                worker.link.heal();
            } else {
                // The one that was killed has nothing more to say.
                worker.link = UdpLink::start(broker.quic(), turn as u64).await.unwrap();
                worker.start(&broker).await;
            }
            let worker = &mut workers[broken];
            match turn % 3 {
                0 => worker.link.cut(),
                1 => drop(worker.held.send_replace(true)),
                // Nothing of its end gets out, as of a process that is killed on a host that goes with it.
                _ => {
                    worker.link.cut();
                    worker.task = None;
                }
            }
            turn += 1;
        }
    }
    for worker in workers.iter().filter(|worker| worker.task.is_some()) {
        worker.link.heal();
        worker.held.send_replace(false);
    }
    let (mut answered, mut refused) = (0, 0);
    while let Some(done) = requests.join_next().await {
        let (ended, took) = done.unwrap();
        match ended.unwrap_or_else(|_| panic!("no end after {took:?}")) {
            Ok(inference) => {
                assert_eq!(inference.payload, "seven");
                answered += 1;
            }
            Err(CallError::Status(status)) => {
                let expected = [
                    Code::Unavailable,
                    Code::DeadlineExceeded,
                    Code::ResourceExhausted,
                    Code::Cancelled,
                ];
                assert!(expected.contains(&status.code), "{status}");
                refused += 1;
            }
            Err(other) => panic!("expected a status, found {other}"),
        }
    }
    assert!(
        turn > 6 && answered > refused,
        "{turn} faults, {answered} answered, {refused} refused"
    );
    for worker in &workers {
        let private = worker.seen.private.load(Ordering::Relaxed);
        assert!(
            worker.tier == Tier::Edge || private == 0,
            "{} saw {private} private payloads",
            worker.path
        );
        assert!(
            worker.seen.answered.load(Ordering::Relaxed) > 0,
            "{}",
            worker.path
        );
        eventually("no work is left", || async {
            (worker.seen.running.load(Ordering::Relaxed) == 0).then_some(())
        })
        .await;
    }
    eventually("no request is left", || async {
        (broker.metric("selvedge_calls_in_flight", &[]).await == 0).then_some(())
    })
    .await;
}
