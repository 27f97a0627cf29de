//! Which tokens are chosen, and how often.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn sampler(temperature: f64, top_p: f64, seed: u64) -> Sampler {
    let sampling = Sampling {
        temperature,
        top_p,
        seed: Some(seed),
    };
    Sampler::new(sampling, 0)
}

/// How often each of these tokens is chosen in ten thousand places.
fn counts(sampler: &Sampler, scores: &[f32]) -> Vec<usize> {
    let mut counts = vec![0; scores.len()];
    for place in 0..10_000 {
        counts[sampler.choose(scores, place).unwrap() as usize] += 1;
    }
    counts
}

fn assert_shares(counts: &[usize], shares: &[f64]) {
    for (&count, &share) in counts.iter().zip(shares) {
        let found = count as f64 / 10_000.0;
        assert!((found - share).abs() < 0.02, "{counts:?} for {shares:?}");
    }
}

#[test]
fn tokens_are_as_frequent_as_they_are_likely() {
    // ln 1, ln 2, ln 5: one, two and five eighths.
    let scores = [0.0, 2f32.ln(), 5f32.ln()];
    assert_shares(
        &counts(&sampler(1.0, 1.0, 7), &scores),
        &[0.125, 0.25, 0.625],
    );
    // At half the temperature the weights are squared: 1, 4 and 25 of 30.
    let squared = [1.0 / 30.0, 4.0 / 30.0, 25.0 / 30.0];
    assert_shares(&counts(&sampler(0.5, 1.0, 7), &scores), &squared);
    // Five eighths are not 0.7, seven eighths are.
    let two = [0.0, 2.0 / 7.0, 5.0 / 7.0];
    assert_shares(&counts(&sampler(1.0, 0.7, 7), &scores), &two);
    assert_eq!(counts(&sampler(1.0, 0.6, 7), &scores), [0, 0, 10_000]);
}

#[test]
fn what_is_no_number_is_never_chosen() {
    let scores = [f32::NAN, 1.0, f32::NEG_INFINITY, 1.0, f32::INFINITY];
    assert_eq!(sampler(0.0, 1.0, 1).choose(&scores, 0), Some(1));
    let chosen = counts(&sampler(1.0, 1.0, 1), &scores);
    assert_eq!((chosen[0], chosen[2], chosen[4]), (0, 0, 0));
    assert_eq!(sampler(1.0, 1.0, 1).choose(&[f32::NAN], 0), None);
    assert_eq!(sampler(0.0, 1.0, 1).choose(&[], 0), None);
}

#[test]
fn a_seed_is_drawn_only_where_none_is_named() {
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 1.0,
        seed: None,
    };
    let scores = [0.0; 1000];
    let choices = |sampler: Sampler| -> Vec<_> {
        (0..20)
            .map(|place| sampler.choose(&scores, place))
            .collect()
    };
    assert_ne!(
        choices(Sampler::new(sampling, 1)),
        choices(Sampler::new(sampling, 2))
    );
    let named = Sampling {
        seed: Some(3),
        ..sampling
    };
    assert_eq!(
        choices(Sampler::new(named, 1)),
        choices(Sampler::new(named, 2))
    );
}

fn scores() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-20.0f32..20.0, 1..200)
}

proptest! {
    #[test]
    fn the_choice_is_one_of_the_likeliest_that_reach_top_p(
        scores in scores(),
        temperature in 0.1f64..2.0,
        top_p in 0.01f64..1.0,
        seed: u64,
        place in 0usize..10_000,
    ) {
        let chosen = sampler(temperature, top_p, seed).choose(&scores, place).unwrap() as usize;
        // The plain way: sort them all.
        let weight = |token: usize| (f64::from(scores[token]) / temperature).exp();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
        let total: f64 = order.iter().map(|&token| weight(token)).sum();
        let likelier: f64 = order
            .iter()
            .take_while(|&&token| token != chosen)
            .map(|&token| weight(token))
            .sum();
        prop_assert!(likelier / total < top_p + 1e-9, "{likelier} of {total}");
    }

    #[test]
    fn without_temperature_the_first_of_the_likeliest_is_chosen(scores in scores(), place: usize) {
        let chosen = sampler(0.0, 1.0, 0).choose(&scores, place).unwrap() as usize;
        prop_assert!(scores[..chosen].iter().all(|&score| score < scores[chosen]));
        prop_assert!(scores[chosen..].iter().all(|&score| score <= scores[chosen]));
    }

    #[test]
    fn a_choice_follows_from_seed_and_place(scores in scores(), seed: u64, place: usize) {
        let first = sampler(0.7, 0.9, seed).choose(&scores, place);
        prop_assert_eq!(first, sampler(0.7, 0.9, seed).choose(&scores, place));
    }
}
