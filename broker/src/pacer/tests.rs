#![allow(clippy::unwrap_used)]

use std::time::Instant as StdInstant;

use futures_util::FutureExt as _;
use proptest::prelude::*;

use super::control::{CEILING, FLOOR, GRANT, PROMPT, START};
use super::*;

/// Takes whatever is granted for `time`, with one measurement each tick. Returns the bytes.
fn run(
    control: &mut Control,
    clock: &mut StdInstant,
    time: Duration,
    mut lag: impl FnMut() -> Duration,
) -> usize {
    let (end, mut bytes) = (*clock + time, 0);
    while *clock < end {
        control.observe(lag(), *clock);
        while let Some(grant) = control.take(*clock) {
            bytes += grant;
        }
        *clock += TICK;
    }
    bytes
}

proptest! {
    #[test]
    fn the_rate_stays_within_its_bounds_and_grants_are_what_it_says(
        lags in proptest::collection::vec((0u64..2_000, 0u64..20), 1..400),
    ) {
        let mut control = Control::default();
        let mut clock = StdInstant::now();
        let (mut granted, mut allowed) = (0.0, START * 0.005 + GRANT.1 as f64);
        for (lag, pause) in lags {
            let before = control.rate();
            clock += Duration::from_millis(pause);
            control.observe(Duration::from_micros(lag), clock);
            let rate = control.rate();
            prop_assert!((FLOOR..=CEILING).contains(&rate));
            allowed += before.max(rate) * Duration::from_millis(pause).as_secs_f64();
            while let Some(grant) = control.take(clock) {
                prop_assert!((GRANT.0..=GRANT.1).contains(&grant));
                granted += grant as f64;
            }
            prop_assert!(granted <= allowed, "{granted} of {allowed}");
        }
    }

    #[test]
    fn everyone_is_served_however_late_the_runtime_is(lag in 501u64..1_000_000, lanes in 1usize..20) {
        let mut control = Control::default();
        let mut clock = StdInstant::now();
        let lag = || Duration::from_micros(lag);
        run(&mut control, &mut clock, Duration::from_secs(1), lag);
        prop_assert_eq!(control.rate(), FLOOR);
        let bytes = run(&mut control, &mut clock, Duration::from_secs(1), lag);
        prop_assert!(bytes as f64 >= FLOOR * 0.9 && bytes as f64 <= FLOOR * 1.1, "{bytes}");
        prop_assert!(bytes / GRANT.1 >= lanes);
    }
}

#[test]
fn what_else_runs_on_the_machine_does_not_slow_it_down() {
    let mut control = Control::default();
    let mut clock = StdInstant::now();
    let mut number = 0;
    let lag = || {
        number += 1;
        if number % 3 == 0 { PROMPT * 20 } else { PROMPT }
    };
    run(&mut control, &mut clock, Duration::from_millis(900), lag);
    assert!(control.rate() > START, "{}", control.rate());
}

#[test]
fn a_prompt_runtime_is_never_waited_for_and_a_late_one_recovers() {
    let mut control = Control::default();
    let mut clock = StdInstant::now();
    let second = Duration::from_secs(1);
    let prompt = || Duration::from_micros(50);
    let bytes = run(&mut control, &mut clock, second, prompt);
    assert!(bytes as f64 > START * 0.9, "{bytes}");
    run(&mut control, &mut clock, second / 5, || second);
    assert!(control.rate() < START / 4.0, "{}", control.rate());
    run(&mut control, &mut clock, second, prompt);
    assert!(control.rate() > FLOOR * 2.0, "{}", control.rate());
    // After a pause the past says nothing.
    run(&mut control, &mut clock, second, || second);
    clock += second * 2;
    assert!(control.take(clock).is_some());
    assert_eq!(control.rate(), START);
}

/// What an exhausted pacer has granted too much.
const DEBT: usize = 1 << 40;

/// A pacer that grants nothing until it is [relieved](relieve).
fn exhausted() -> Pacer {
    let pacer = Pacer::default();
    let now = Instant::now().into_std();
    pacer.0.state.lock().control.charge(DEBT, now);
    pacer
}

fn relieve(pacer: &Pacer) {
    pacer.0.state.lock().control.give_back(DEBT);
}

#[tokio::test]
async fn turns_come_in_the_order_in_which_they_are_asked_for() {
    let pacer = exhausted();
    let (served, mut order) = tokio::sync::mpsc::channel(100);
    for lane in 0..100 {
        let (mut turn, served) = (pacer.turn(), served.clone());
        tokio::spawn(async move {
            assert!(turn.granted().await >= GRANT.0);
            served.send(lane).await.unwrap();
        });
    }
    drop(served);
    while pacer.0.state.lock().waiting.len() < 100 {
        tokio::task::yield_now().await;
    }
    relieve(&pacer);
    for lane in 0..100 {
        assert_eq!(order.recv().await, Some(lane));
    }
    // Nobody asks any more: the probe ends.
    while pacer.0.state.lock().probing {
        tokio::time::sleep(TICK).await;
    }
}

#[tokio::test]
async fn a_wait_that_is_given_up_keeps_its_place_and_one_that_is_gone_takes_nothing() {
    let pacer = exhausted();
    let (mut first, mut second, mut third) = (pacer.turn(), pacer.turn(), pacer.turn());
    for turn in [&mut first, &mut second, &mut third] {
        assert!(turn.granted().now_or_never().is_none());
        // It waits in the queue once, however often it is asked.
        assert!(turn.granted().now_or_never().is_none());
    }
    assert_eq!(pacer.0.state.lock().waiting.len(), 3);
    drop(second);
    relieve(&pacer);
    assert!(first.granted().await > 0);
    assert!(third.granted().await > 0);
    assert!(pacer.0.state.lock().waiting.is_empty());
}

#[tokio::test]
async fn what_was_granted_to_a_lane_that_ended_is_given_back() {
    let pacer = exhausted();
    let mut turn = pacer.turn();
    assert!(turn.granted().now_or_never().is_none());
    relieve(&pacer);
    let place = Arc::clone(&turn.place);
    while place.granted.load(Ordering::Acquire) == 0 {
        tokio::time::sleep(TICK).await;
    }
    let take = |now| pacer.0.state.lock().control.take(now);
    let now = Instant::now().into_std();
    pacer.0.state.lock().control.charge(GRANT.0, now);
    while take(now).is_some() {}
    drop(place);
    assert_eq!(take(now), None);
    drop(turn);
    assert!(take(now).is_some());
}

#[tokio::test]
async fn one_turn_is_taken_at_a_time() {
    let pacer = Pacer::default();
    let (mut first, mut second) = (pacer.turn(), pacer.turn());
    assert!(
        first.granted().now_or_never().is_none(),
        "what is ready goes first"
    );
    assert!(first.granted().await >= GRANT.0);
    assert!(pacer.ask(&second.place).is_none(), "while the first works");
    second.waits = true;
    first.done();
    assert!(second.granted().now_or_never().is_some());
    drop(second);
    let mut third = pacer.turn();
    third.granted().now_or_never();
    assert!(third.granted().now_or_never().is_some(), "nobody works");
}

#[tokio::test]
async fn a_lane_that_sits_on_its_turn_holds_nobody_up() {
    let pacer = Pacer::default();
    let (mut stuck, mut next) = (pacer.turn(), pacer.turn());
    stuck.granted().await;
    let granted = tokio::time::timeout(Duration::from_secs(10), next.granted()).await;
    assert!(granted.expect("the turn of the first is over at the next tick") >= GRANT.0);
}
