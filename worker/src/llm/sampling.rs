//! The choice of the next token. Pure, down to the randomness.

#[cfg(test)]
mod tests;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sampling {
    /// 0 takes the likeliest token; 1 follows the model's probabilities; above that they are evened out.
    pub(crate) temperature: f64,
    /// Only the likeliest tokens that together reach this probability are considered.
    pub(crate) top_p: f64,
    /// What the choices follow from; `None` lets the engine draw one.
    pub(crate) seed: Option<u64>,
}

/// Chooses the tokens of one answer.
///
/// The number drawn for a token follows from the seed and the token's place in prompt and answer, and from
/// nothing else: whoever continues an answer with the same seed goes on as the one who began it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampler {
    temperature: f64,
    top_p: f64,
    seed: u64,
}

impl Sampler {
    /// Chooses as `sampling` says, with `seed` when it names none.
    pub(crate) fn new(sampling: Sampling, seed: u64) -> Self {
        Sampler {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            seed: sampling.seed.unwrap_or(seed),
        }
    }

    /// The token for this place, of one with these scores each. `None` when no score is a number.
    pub(crate) fn choose(&self, scores: &[f32], place: usize) -> Option<u32> {
        let usable = || {
            let scores = scores.iter().enumerate();
            scores.filter(|(_, score)| score.is_finite())
        };
        // Of equals the first, on every machine.
        let (best, greatest) = usable().reduce(|best, next| {
            let is_better = next.1 > best.1;
            if is_better { next } else { best }
        })?;
        let best = u32::try_from(best).ok()?;
        if self.temperature == 0.0 || self.top_p == 0.0 {
            return Some(best);
        }
        let greatest = f64::from(*greatest);
        let mut weights: Vec<(u32, f64)> = usable()
            .filter_map(|(token, &score)| {
                let weight = ((f64::from(score) - greatest) / self.temperature).exp();
                Some((u32::try_from(token).ok()?, weight))
            })
            .collect();
        let mut total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        if self.top_p < 1.0 {
            let wanted = total * self.top_p;
            // The others weigh at least `total - wanted`. If each weighs less than an equal share of that,
            // it is among them: so most tokens of a large vocabulary are never sorted.
            let share = (total - wanted) / weights.len() as f64;
            weights.retain(|&(token, weight)| weight >= share || token == best);
            weights.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            total = 0.0;
            let mut enough = weights.len();
            for (index, (_, weight)) in weights.iter().enumerate() {
                total += weight;
                if total >= wanted {
                    enough = index + 1;
                    break;
                }
            }
            weights.truncate(enough);
        }
        let mut left = uniform(self.seed, place) * total;
        for (token, weight) in &weights {
            left -= weight;
            if left < 0.0 {
                return Some(*token);
            }
        }
        // Rounding left a little over.
        Some(weights.last().map_or(best, |(token, _)| *token))
    }
}

/// A number from 0 up to 1, which follows from seed and place: one step of SplitMix64.
fn uniform(seed: u64, place: usize) -> f64 {
    let step = (place as u64).wrapping_add(1);
    let mut bits = seed.wrapping_add(step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
