//! Tests of slots and service time; the loop itself is tested against a broker.

#![allow(clippy::unwrap_used)]

use super::*;

#[tokio::test]
async fn slots_bound_what_is_in_hand_and_what_computes() {
    let slots = Slots::new(NonZeroU32::new(2).unwrap());
    let mut in_hand: Vec<_> = (0..4).map(|_| slots.admit().unwrap()).collect();
    assert!(slots.admit().is_none());
    assert_eq!(slots.waiting(), 2);
    in_hand.pop();
    assert_eq!(slots.waiting(), 1);
    assert!(slots.admit().is_some());

    let first = slots.compute().await;
    let _second = slots.compute().await;
    let third = slots.compute();
    tokio::pin!(third);
    assert!(futures_poll(third.as_mut()).is_none());
    drop(first);
    assert!(futures_poll(third.as_mut()).is_some());
}

/// Polls once.
fn futures_poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.poll(&mut context) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

#[test]
fn any_number_of_slots_is_taken() {
    let slots = Slots::new(NonZeroU32::MAX);
    assert!(slots.admit().is_some());
    assert_eq!(slots.waiting(), 0);
}

#[test]
fn service_time_is_smoothed_and_reported_when_it_moves() {
    let ms = Duration::from_millis;
    let mut service = ServiceTime::default();
    assert!(service.measure(ms(80)));
    assert!(!service.measure(ms(80)));
    assert_eq!(service.smoothed, Some(ms(80)));
    // 80 * 7/8 + 160 / 8 = 90, an eighth over 80 and no more; the next passes it.
    assert!(!service.measure(ms(160)));
    assert!(service.measure(ms(160)));
    assert!(!service.measure(ms(100)));
}

#[test]
fn a_refusal_names_the_guilty() {
    let code = |error| status(&error).code;
    let duplicate = InputError::Duplicate {
        name: "x".to_owned(),
    };
    assert_eq!(code(ModelError::Input(duplicate)), Code::InvalidArgument);
    assert_eq!(code(ModelError::Cancelled), Code::Cancelled);
    assert_eq!(code(ModelError::Failed("x".to_owned())), Code::Internal);
}

#[test]
fn a_model_stops_with_its_request() {
    let flag = CancelFlag::new();
    let guard = flag.clone().cancel_on_drop();
    assert!(!flag.is_cancelled());
    drop(guard);
    assert!(flag.is_cancelled());
}

#[cfg(not(feature = "llm"))]
#[tokio::test]
async fn a_program_without_language_models_says_so() {
    let config = crate::config::LlmConfig {
        path: PathBuf::from("smollm2.gguf"),
        context: None,
        unpack: false,
    };
    let Err(failure) = load_llm(config, NonZeroU32::MIN, Duration::ZERO).await else {
        panic!("it was loaded");
    };
    assert_eq!(
        failure.to_string(),
        "model smollm2.gguf: this program was built without language models; build it with `--features llm`"
    );
}
