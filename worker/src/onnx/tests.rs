//! Tests of the ONNX engine on the models of this repository, and on files that are none.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::mpsc::sync_channel;

use serde_json::Value;

use super::*;
use crate::model::InputError;

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/digits");

fn path(file: &str) -> PathBuf {
    Path::new(DIGITS).join(file)
}

fn probabilities() -> Option<ConfidenceRule> {
    Some(ConfidenceRule::Max {
        output: "probabilities".to_owned(),
    })
}

fn digits(file: &str) -> OnnxModel {
    OnnxModel::load(path(file), probabilities(), DEFAULT_LOAD_DEADLINE).unwrap()
}

/// Labels, and images of 64 values.
fn test_set() -> (Vec<usize>, Vec<Vec<f32>>) {
    let text = fs::read_to_string(path("test.csv")).unwrap();
    let rows = text.lines().skip(1).map(|line| {
        let mut cells = line.split(',');
        let label: usize = cells.next().unwrap().parse().unwrap();
        (label, cells.map(|cell| cell.parse().unwrap()).collect())
    });
    rows.unzip()
}

fn metrics() -> Value {
    serde_json::from_str(&fs::read_to_string(path("metrics.json")).unwrap()).unwrap()
}

fn images(batch: &[Vec<f32>]) -> Tensor {
    Tensor::from_f32("input", [batch.len(), 64], &batch.concat()).unwrap()
}

fn infer(model: &OnnxModel, inputs: Vec<Tensor>) -> Result<Inference, ModelError> {
    model.infer(inputs, &CancelFlag::new())
}

fn guesses(answer: &Inference) -> Vec<usize> {
    let rows = answer.outputs[0].to_f32().unwrap();
    let best = |row: &[f32]| (0..10).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    rows.chunks(10).map(best).collect()
}

/// Another engine rounds otherwise, so one image may fall the other way.
fn assert_within_one(found: usize, expected: &Value) {
    let expected = usize::try_from(expected.as_u64().unwrap()).unwrap();
    assert!(
        found.abs_diff(expected) <= 1,
        "{found} instead of {expected}"
    );
}

/// A scratch directory with one file in it.
fn file_of(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.onnx");
    fs::write(&path, bytes).unwrap();
    (directory, path)
}

#[test]
fn the_signature_is_that_of_the_file() {
    for file in ["digits-edge.onnx", "digits-cloud.onnx"] {
        let spec = |name: &str, width| TensorSpec {
            name: name.to_owned(),
            datatype: Datatype::Fp32,
            shape: vec![Dim::Any("N".to_owned()), Dim::Fixed(width)],
        };
        let expected = Signature {
            inputs: vec![spec("input", 64)],
            outputs: vec![spec("probabilities", 10)],
        };
        assert_eq!(*digits(file).signature(), expected);
    }
}

#[test]
fn accuracy_is_what_the_models_were_published_with() {
    let (labels, batch) = test_set();
    for tier in ["edge", "cloud"] {
        let model = digits(&format!("digits-{tier}.onnx"));
        let answer = infer(&model, vec![images(&batch)]).unwrap();
        let right = guesses(&answer)
            .iter()
            .zip(&labels)
            .filter(|(a, b)| a == b)
            .count();
        assert_within_one(right, &metrics()[tier]["correct"]);
    }
}

#[test]
fn confidence_splits_the_test_set_as_published() {
    let (_, batch) = test_set();
    let model = digits("digits-edge.onnx");
    let confidences: Vec<f32> = batch
        .iter()
        .map(|image| {
            let answer = infer(&model, vec![images(std::slice::from_ref(image))]).unwrap();
            answer.confidence.unwrap()
        })
        .collect();
    for row in metrics()["cascade"].as_array().unwrap() {
        let threshold = row["threshold"].as_f64().unwrap() as f32;
        let escalated = confidences
            .iter()
            .filter(|&&confidence| confidence < threshold)
            .count();
        assert_within_one(escalated, &row["escalated"]);
    }
    let least = confidences.iter().copied().fold(1.0, f32::min);
    let whole = infer(&model, vec![images(&batch)])
        .unwrap()
        .confidence
        .unwrap();
    assert!(
        (whole - least).abs() < 1e-5,
        "{whole} for the batch, {least} for its worst image"
    );
}

#[test]
fn an_empty_batch_has_an_empty_answer_or_an_error_and_ends_nothing() {
    let model = digits("digits-edge.onnx");
    match infer(&model, vec![images(&[])]) {
        Ok(answer) => {
            assert_eq!(answer.outputs[0].shape(), [0, 10]);
            assert_eq!(answer.confidence, None);
        }
        Err(error) => assert!(matches!(error, ModelError::Failed(_)), "{error}"),
    }
    assert!(infer(&model, vec![images(&[vec![0.0; 64]])]).is_ok());
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let model = digits("digits-edge.onnx");
    let name = || "input".to_owned();
    let refusal = |inputs| infer(&model, inputs).unwrap_err();
    assert_eq!(
        refusal(vec![]),
        ModelError::Input(InputError::Missing {
            name: name(),
            expected: vec![name()]
        })
    );
    assert_eq!(
        refusal(vec![
            Tensor::from_f32("input", [1, 63], &[0.0; 63]).unwrap()
        ]),
        ModelError::Input(InputError::Dimension {
            name: name(),
            axis: 1,
            expected: 64,
            found: 63
        })
    );
    assert_eq!(
        refusal(vec![
            Tensor::new("input", Datatype::Uint8, [1, 64], vec![0; 64]).unwrap()
        ]),
        ModelError::Input(InputError::Datatype {
            name: name(),
            expected: Datatype::Fp32,
            found: Datatype::Uint8
        })
    );
}

#[test]
fn a_cancelled_request_is_given_up() {
    let cancelled = CancelFlag::new();
    cancelled.cancel();
    let answer = digits("digits-cloud.onnx").infer(vec![images(&[vec![0.0; 64]])], &cancelled);
    assert_eq!(answer, Err(ModelError::Cancelled));
}

#[test]
fn a_file_that_is_no_model_is_refused_by_name() {
    let whole = fs::read(path("digits-edge.onnx")).unwrap();
    let mut flipped = whole.clone();
    for byte in flipped.iter_mut().skip(16).step_by(7) {
        *byte ^= 0x5a;
    }
    let files = [
        b"".to_vec(),
        b"this is no protobuf".to_vec(),
        whole[..100].to_vec(),
        whole[..whole.len() / 2].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        flipped,
    ];
    for bytes in files {
        let (_directory, file) = file_of(&bytes);
        match OnnxModel::load(&file, None, DEFAULT_LOAD_DEADLINE) {
            Err(LoadError::Invalid { path, .. }) => assert_eq!(path, file),
            Err(other) => panic!("{} bytes: {other}", bytes.len()),
            Ok(_) => panic!("{} bytes were taken for a model", bytes.len()),
        }
    }
}

#[test]
fn a_file_that_is_not_there_is_refused_by_name() {
    let (_directory, file) = file_of(b"");
    let missing = file.with_extension("missing");
    let error = OnnxModel::load(&missing, None, DEFAULT_LOAD_DEADLINE)
        .err()
        .unwrap();
    assert!(matches!(error, LoadError::Read { .. }), "{error}");
    assert!(error.to_string().contains("model.missing"), "{error}");
}

#[test]
fn a_confidence_output_that_is_not_there_is_refused() {
    let rule = ConfidenceRule::Max {
        output: "scores".to_owned(),
    };
    let error = OnnxModel::load(path("digits-edge.onnx"), Some(rule), DEFAULT_LOAD_DEADLINE);
    match error.err().unwrap() {
        LoadError::Confidence { output, found, .. } => {
            assert_eq!(output, "scores");
            assert_eq!(found, ["FP32 probabilities"]);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_load_that_never_ends_is_left_behind_at_its_deadline() {
    let (release, held) = sync_channel::<()>(1);
    let deadline = Duration::from_millis(20);
    let never = move || {
        let _ = held.recv();
        Ok(())
    };
    match within(deadline, PathBuf::from("slow.onnx"), never) {
        Err(LoadError::Deadline {
            path,
            deadline: named,
        }) => {
            assert_eq!((path, named), (PathBuf::from("slow.onnx"), deadline));
        }
        other => panic!("{other:?}"),
    }
    // The loading thread was alive all along.
    release.send(()).unwrap();
}

#[test]
fn a_load_that_panics_is_an_error() {
    let panics = || -> Result<(), LoadError> { panic!("on purpose") };
    let error = within(DEFAULT_LOAD_DEADLINE, PathBuf::from("bad.onnx"), panics).unwrap_err();
    assert!(matches!(error, LoadError::Invalid { .. }), "{error}");
}

#[test]
fn digits_in_batches_are_what_they_are_one_by_one() {
    let (_, images_of) = test_set();
    let rule = ConfidenceRule::Max {
        output: "probabilities".to_owned(),
    };
    let batching = crate::config::Batching {
        max: std::num::NonZeroUsize::new(8).unwrap(),
        delay: Duration::from_secs(30),
    };
    let one_by_one = digits("digits-edge.onnx");
    let model = std::sync::Arc::new(digits("digits-edge.onnx"));
    let batched = crate::Batched::new(model, Some(rule), batching).unwrap();
    let images_of = &images_of[..8];
    let answers: Vec<Inference> = std::thread::scope(|scope| {
        let asking: Vec<_> = images_of
            .iter()
            .map(|image| {
                let batched = &batched;
                scope.spawn(move || {
                    let input = vec![images(std::slice::from_ref(image))];
                    batched.infer(input, &CancelFlag::new()).unwrap()
                })
            })
            .collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    });
    for (image, found) in images_of.iter().zip(&answers) {
        let wanted = infer(&one_by_one, vec![images(std::slice::from_ref(image))]).unwrap();
        assert_eq!(guesses(found), guesses(&wanted));
        let (found, wanted) = (found.confidence.unwrap(), wanted.confidence.unwrap());
        assert!((found - wanted).abs() < 1e-4, "{found} and {wanted}");
    }
}
