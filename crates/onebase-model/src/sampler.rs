use onebase_tensor::{Stream, stream};
use rand::RngExt;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token always.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities reach `top_p`; 1 for all.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl SamplingParams {
    /// The most likely token, always.
    pub const GREEDY: SamplingParams =
        SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
}

/// Chooses the tokens of one sequence.
///
/// Its draws depend on its own seed alone, so a request gets the same tokens in
/// every batch.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    draws: Stream,
    candidates: Vec<(f64, u32)>,
}

impl Sampler {
    /// A sampler at its first draw.
    pub fn new(params: SamplingParams) -> Self {
        Self { params, draws: stream(params.seed, "sampler", 0), candidates: Vec::new() }
    }

    /// The next token from its logits, which are not empty.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let SamplingParams { temperature, top_k, top_p, .. } = self.params;
        if temperature <= 0.0 {
            return argmax(logits);
        }
        // Temperature, then top-k, then top-p, as transformers orders them.
        let candidates = &mut self.candidates;
        candidates.clear();
        let scaled = logits.iter().map(|l| f64::from(*l) / f64::from(temperature));
        candidates.extend(scaled.zip(0u32..));
        let by_logit =
            |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_logit);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(by_logit);
        let max = candidates[0].0;
        let mut total = 0.0;
        for (logit, _) in candidates.iter_mut() {
            *logit = (*logit - max).exp();
            total += *logit;
        }
        if top_p < 1.0 {
            let mut sum = 0.0;
            let reach = f64::from(top_p) * total;
            let kept = candidates.iter().position(|(p, _)| {
                sum += p;
                sum >= reach
            });
            candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
            total = candidates.iter().map(|(p, _)| p).sum();
        }
        let mut left = self.draws.random::<f64>() * total;
        for (p, token) in candidates.iter() {
            left -= p;
            if left < 0.0 {
                return *token;
            }
        }
        candidates[candidates.len() - 1].1
    }
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (logit, token) in logits.iter().zip(0u32..) {
        if *logit > best.0 {
            best = (*logit, token);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(params: SamplingParams, logits: &[f32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params);
        let mut counts = vec![0; logits.len()];
        (0..n).for_each(|_| counts[sampler.sample(logits) as usize] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(counts(SamplingParams::GREEDY, &[0.0, 2.0, 2.0], 3), [0, 3, 0]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let params = SamplingParams { temperature: 2.0, ..SamplingParams::GREEDY };
        // Probabilities 1/6, 2/6, 3/6 at temperature 2.
        let logits = [0.0, 2.0 * 2f32.ln(), 2.0 * 3f32.ln()];
        let counts = counts(params, &logits, 60_000);
        for (got, want) in counts.iter().zip([10_000, 20_000, 30_000]) {
            assert!(got.abs_diff(want) < 500, "{counts:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [3.0, 2.0, 1.0, 0.0];
        let warm = SamplingParams { temperature: 1.0, ..SamplingParams::GREEDY };
        let top_k = counts(SamplingParams { top_k: 2, ..warm }, &logits, 2000);
        assert!(top_k[0] > 0 && top_k[1] > 0 && top_k[2] == 0 && top_k[3] == 0, "{top_k:?}");
        // The first alone has .64, the first two .88.
        let top_p = counts(SamplingParams { top_p: 0.6, ..warm }, &logits, 100);
        assert_eq!(top_p, [100, 0, 0, 0]);
        let top_p = counts(SamplingParams { top_p: 0.7, ..warm }, &logits, 2000);
        assert!(top_p[1] > 0 && top_p[2] == 0, "{top_p:?}");
    }

    #[test]
    fn the_seed_decides() {
        let draw = |seed| {
            let params = SamplingParams { temperature: 1.0, seed, ..SamplingParams::GREEDY };
            let mut sampler = Sampler::new(params);
            (0..20).map(|_| sampler.sample(&[0.0; 50])).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
