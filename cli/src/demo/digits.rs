//! The labelled images of handwritten digits, and what the models made of them when they were
//! trained.

use anyhow::{Context as _, bail};
use selvedge_client::{Bytes, Infer, Inference, Tensor};
use serde::Deserialize;

use crate::fabric::{MODEL, TEST_IMAGES};

/// Written by the script that trained the models.
const METRICS: &str = include_str!("../../../models/digits/metrics.json");

/// Values of an image of 8 by 8.
const PIXELS: usize = 64;
/// Shades from white to black, for values 0 to 16.
const SHADES: &[u8; 17] = b"  ..::--==++**##@";

/// One image and what it shows.
#[derive(Debug, Clone)]
pub(super) struct Digit {
    /// What it shows, 0 to 9.
    pub(super) label: usize,
    /// The values 0 to 16, row by row.
    pub(super) image: Bytes,
}

impl Digit {
    /// A request for what the image shows.
    pub(super) fn question(&self) -> Infer {
        let values: Vec<f32> = self.image.iter().copied().map(f32::from).collect();
        Infer::new(MODEL).tensors(vec![Tensor::fp32("input", vec![1, PIXELS as i64], &values)])
    }

    /// The image for a terminal, a line for each row.
    pub(super) fn drawn(&self) -> Vec<String> {
        let shade = |value: &u8| char::from(SHADES[usize::from(*value).min(SHADES.len() - 1)]);
        let rows = self.image.chunks(8);
        rows.map(|row| row.iter().flat_map(|value| [shade(value); 2]).collect())
            .collect()
    }
}

/// The test images: a header, then label and 64 values on each line.
pub(super) fn load() -> anyhow::Result<Vec<Digit>> {
    let lines = TEST_IMAGES.lines().skip(1);
    let digits: anyhow::Result<Vec<Digit>> = lines
        .map(|line| {
            let values: Result<Vec<u8>, _> = line.split(',').map(str::parse).collect();
            let values = values.with_context(|| format!("read the test image {line:?}"))?;
            match values.split_first() {
                Some((&label @ 0..=9, image)) if image.len() == PIXELS => Ok(Digit {
                    label: label.into(),
                    image: Bytes::copy_from_slice(image),
                }),
                _ => bail!("expected a digit and {PIXELS} values, found {line:?}"),
            }
        })
        .collect();
    digits
}

/// What the model says the image shows: the greatest of its ten probabilities.
pub(super) fn read(inference: &Inference) -> anyhow::Result<usize> {
    let tensors = inference.tensors()?;
    let probabilities = tensors.first().and_then(Tensor::as_fp32);
    let probabilities = probabilities.context("expected a tensor of probabilities")?;
    let best = probabilities
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1));
    best.map(|(digit, _)| digit)
        .context("expected ten probabilities, found none")
}

/// The accuracies that were measured when the models were trained, with another engine.
#[derive(Debug, Deserialize)]
pub(super) struct Metrics {
    /// The small model by itself.
    pub(super) edge: Accuracy,
    /// The large model by itself.
    pub(super) cloud: Accuracy,
    cascade: Vec<Cascade>,
}

/// How often a model is right.
#[derive(Debug, Deserialize)]
pub(super) struct Accuracy {
    /// Between 0 and 1.
    pub(super) accuracy: f64,
}

#[derive(Debug, Deserialize)]
struct Cascade {
    threshold: f64,
    accuracy: f64,
}

impl Metrics {
    /// Reads them.
    pub(super) fn load() -> anyhow::Result<Self> {
        serde_json::from_str(METRICS).context("read the metrics of the models")
    }

    /// Accuracy when answers below this confidence go to the large model.
    pub(super) fn cascade(&self, threshold: f64) -> anyhow::Result<f64> {
        (self.cascade.iter())
            .find(|cascade| (cascade.threshold - threshold).abs() < 1e-6)
            .map(|cascade| cascade.accuracy)
            .with_context(|| format!("expected a threshold of {threshold} in the metrics"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_and_metric_can_be_read() {
        let digits = load().unwrap();
        assert_eq!(digits.len(), 750);
        assert!((0..10).all(|label| digits.iter().any(|digit| digit.label == label)));
        assert_eq!(digits[0].drawn().len(), 8);
        let metrics = Metrics::load().unwrap();
        assert!(metrics.edge.accuracy < metrics.cascade(0.8).unwrap());
        assert!(metrics.cascade(0.8).unwrap() < metrics.cloud.accuracy);
        assert!(metrics.cascade(0.81).is_err());
    }
}
