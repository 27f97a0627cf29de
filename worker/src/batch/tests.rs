use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::model::{Datatype, TensorSpec};

/// Doubles every number, counts how often it is asked, and fails on a 13 anywhere.
struct Doubling {
    signature: Signature,
    asked: AtomicUsize,
}

fn spec(name: &str, shape: Vec<Dim>) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        datatype: Datatype::Fp32,
        shape,
    }
}

impl Doubling {
    fn new() -> Self {
        let shape = || vec![Dim::Any("n".to_owned()), Dim::Any("width".to_owned())];
        Self {
            signature: Signature {
                inputs: vec![spec("x", shape())],
                outputs: vec![spec("y", shape())],
            },
            asked: AtomicUsize::new(0),
        }
    }
}

impl Model for Doubling {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn infer(&self, inputs: Vec<Tensor>, cancelled: &CancelFlag) -> Answer {
        if cancelled.is_cancelled() {
            return Err(ModelError::Cancelled);
        }
        self.asked.fetch_add(1, Ordering::SeqCst);
        let values = inputs[0].to_f32().unwrap();
        if values.contains(&13.0) {
            return Err(ModelError::Failed("thirteen".to_owned()));
        }
        let doubled: Vec<f32> = values.iter().map(|value| value * 2.0).collect();
        let output = Tensor::from_f32("y", inputs[0].shape(), &doubled).unwrap();
        Ok(Inference {
            outputs: vec![output],
            confidence: None,
        })
    }
}

fn batched(model: &Arc<Doubling>, max: usize, delay: Duration) -> Batched {
    let max = NonZeroUsize::new(max).unwrap();
    let model: Arc<dyn Model> = Arc::clone(model) as _;
    Batched::new(model, None, Batching { max, delay }).unwrap()
}

fn tensor(values: &[f32], width: usize) -> Tensor {
    Tensor::from_f32("x", [values.len() / width, width], values).unwrap()
}

/// Asks for all at once, each on a thread, and gives the answers in order.
fn at_once(batched: &Batched, requests: Vec<(Tensor, CancelFlag)>) -> Vec<Answer> {
    let start = Barrier::new(requests.len());
    thread::scope(|scope| {
        let asking: Vec<_> = requests
            .into_iter()
            .map(|(input, cancelled)| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    batched.infer(vec![input], &cancelled)
                })
            })
            .collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

/// Long enough for every thread to come; a full batch does not wait for it.
const LONG: Duration = Duration::from_secs(30);

#[test]
fn a_full_batch_is_computed_at_once_and_each_gets_its_rows() {
    let model = Arc::new(Doubling::new());
    let batched = batched(&model, 6, LONG);
    let requests = [1, 2, 3].map(|rows| {
        let values: Vec<f32> = (0..rows * 2)
            .map(|place| (rows * 10 + place) as f32)
            .collect();
        (tensor(&values, 2), CancelFlag::new())
    });
    let wanted: Vec<Vec<f32>> = requests
        .iter()
        .map(|(input, _)| input.to_f32().unwrap().iter().map(|x| x * 2.0).collect())
        .collect();
    let answers = at_once(&batched, requests.into());
    for (answer, wanted) in answers.into_iter().zip(wanted) {
        let output = &answer.unwrap().outputs[0];
        assert_eq!(output.shape(), [wanted.len() / 2, 2]);
        assert_eq!(output.to_f32().unwrap(), wanted);
    }
    assert_eq!(model.asked.load(Ordering::SeqCst), 1);
}

#[test]
fn one_that_fails_or_is_given_up_fails_nobody_else() {
    let model = Arc::new(Doubling::new());
    let batched = batched(&model, 3, LONG);
    let gone = CancelFlag::new();
    gone.cancel();
    let requests = vec![
        (tensor(&[1.0], 1), CancelFlag::new()),
        (tensor(&[13.0], 1), CancelFlag::new()),
        (tensor(&[2.0], 1), gone),
    ];
    let answers = at_once(&batched, requests);
    assert_eq!(
        answers[0].as_ref().unwrap().outputs[0].to_f32().unwrap(),
        [2.0]
    );
    assert!(matches!(&answers[1], Err(ModelError::Failed(why)) if why == "thirteen"));
    assert!(matches!(&answers[2], Err(ModelError::Cancelled)));
}

#[test]
fn what_does_not_fit_the_open_batch_does_not_wait_for_it() {
    let model = Arc::new(Doubling::new());
    let batched = batched(&model, 2, LONG);
    thread::scope(|scope| {
        let first = scope.spawn(|| batched.infer(vec![tensor(&[1.0], 1)], &CancelFlag::new()));
        while batched.open.lock().is_none() {
            thread::yield_now();
        }
        // Of another width, and larger than any batch.
        let wide = batched.infer(vec![tensor(&[1.0, 2.0], 2)], &CancelFlag::new());
        assert_eq!(wide.unwrap().outputs[0].shape(), [1, 2]);
        let long = batched.infer(vec![tensor(&[1.0, 2.0, 3.0], 1)], &CancelFlag::new());
        assert_eq!(long.unwrap().outputs[0].shape(), [3, 1]);
        // It fills the batch, and neither waits any longer.
        let second = batched.infer(vec![tensor(&[5.0], 1)], &CancelFlag::new());
        assert_eq!(second.unwrap().outputs[0].to_f32().unwrap(), [10.0]);
        let first = first.join().unwrap().unwrap();
        assert_eq!(first.outputs[0].to_f32().unwrap(), [2.0]);
    });
}

#[test]
fn a_request_that_stays_alone_waits_no_longer_than_the_delay() {
    let model = Arc::new(Doubling::new());
    let batched = batched(&model, 8, Duration::from_millis(1));
    let answer = batched.infer(vec![tensor(&[3.0], 1)], &CancelFlag::new());
    assert_eq!(answer.unwrap().outputs[0].to_f32().unwrap(), [6.0]);
    assert!(batched.open.lock().is_none());
}

#[test]
fn a_model_of_fixed_batches_is_refused() {
    let mut model = Doubling::new();
    model.signature.outputs[0].shape[0] = Dim::Fixed(1);
    let batching = Batching {
        max: NonZeroUsize::new(2).unwrap(),
        delay: LONG,
    };
    let error = Batched::new(Arc::new(model), None, batching).unwrap_err();
    assert_eq!((error.tensor.as_str(), error.found.as_str()), ("y", "1"));
}

proptest! {
    #[test]
    fn what_is_joined_and_split_is_what_it_was(rows in prop::collection::vec(1_usize..5, 1..6), width in 1_usize..4) {
        let requests: Vec<Vec<Tensor>> = rows
            .iter()
            .enumerate()
            .map(|(place, rows)| {
                let values: Vec<f32> = (0..rows * width).map(|n| (place * 100 + n) as f32).collect();
                vec![tensor(&values, width)]
            })
            .collect();
        let parts: Vec<&[Tensor]> = requests.iter().map(|request| &request[..]).collect();
        let joined = concatenate(&parts).unwrap();
        prop_assert_eq!(joined[0].shape(), [rows.iter().sum::<usize>(), width]);
        let apart = split(&joined, &rows).unwrap();
        prop_assert_eq!(apart.len(), requests.len());
        for (found, wanted) in apart.iter().zip(&requests) {
            prop_assert_eq!(found[0].shape(), wanted[0].shape());
            prop_assert_eq!(found[0].data(), wanted[0].data());
        }
        prop_assert!(split(&joined, &[1; 99]).is_err());
    }
}
