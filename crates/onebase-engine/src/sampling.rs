use std::collections::BTreeMap;

use onebase_model::{Sampler, SamplingParams};

use crate::request::{Penalties, TokenLogprobs};
use crate::{Constraint, Error, Result};

/// Chooses the tokens of one answer.
pub(crate) struct Chooser {
    sampler: Sampler,
    penalties: Penalties,
    bias: Vec<(u32, f32)>,
    constraint: Option<Box<dyn Constraint>>,
    /// How often tokens are in prompt and answer; only kept where it matters.
    counts: BTreeMap<u32, Counts>,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    in_prompt: bool,
    in_answer: u32,
}

impl Chooser {
    pub(crate) fn new(
        sampling: SamplingParams,
        penalties: Penalties,
        bias: Vec<(u32, f32)>,
        constraint: Option<Box<dyn Constraint>>,
        prompt: &[u32],
    ) -> Self {
        let mut counts = BTreeMap::new();
        if penalties.repetition != 1.0 {
            let known = Counts { in_prompt: true, in_answer: 0 };
            counts.extend(prompt.iter().map(|token| (*token, known)));
        }
        let sampler = Sampler::new(sampling);
        Self { sampler, penalties, bias, constraint, counts }
    }

    /// The next token, and whether the constraint says that the answer is complete.
    pub(crate) fn choose(&mut self, logits: &mut [f32]) -> Result<(u32, bool)> {
        self.penalise(logits);
        for (token, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        let constraint = |problem| Error::Constraint { problem };
        if let Some(c) = &mut self.constraint {
            c.restrict(logits).map_err(constraint)?;
            if logits.iter().all(|l| *l == f32::NEG_INFINITY) {
                return Err(constraint("no token may come next".to_owned()));
            }
        }
        let token = self.sampler.sample(logits);
        let complete = match &mut self.constraint {
            Some(c) => c.accept(token).map_err(constraint)?,
            None => false,
        };
        if self.penalties != Penalties::NONE {
            self.counts.entry(token).or_default().in_answer += 1;
        }
        Ok((token, complete))
    }

    fn penalise(&self, logits: &mut [f32]) {
        let Penalties { presence, frequency, repetition } = self.penalties;
        for (token, counts) in &self.counts {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            if counts.in_prompt || counts.in_answer > 0 {
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
            if counts.in_answer > 0 {
                #[allow(clippy::cast_precision_loss)]
                let times = counts.in_answer as f32;
                *logit -= presence + frequency * times;
            }
        }
    }
}

/// How likely a token is, with the `n_top` likeliest ones, from logits that are finite.
pub(crate) fn logprobs_of(logits: &[f32], token: u32, n_top: usize) -> TokenLogprobs {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    let total: f64 = logits.iter().map(|l| f64::from(*l - max).exp()).sum();
    let norm = f64::from(max) + total.ln();
    let of = |token: u32| f64::from(logits[token as usize]) - norm;
    let mut order: Vec<u32> = (0u32..).take(logits.len()).collect();
    let likelier = |a: &u32, b: &u32| {
        logits[*b as usize].total_cmp(&logits[*a as usize]).then_with(|| a.cmp(b))
    };
    let n_top = n_top.min(order.len());
    if n_top > 0 && n_top < order.len() {
        order.select_nth_unstable_by(n_top - 1, likelier);
    }
    order.truncate(n_top);
    order.sort_unstable_by(likelier);
    let top = order.into_iter().map(|token| (token, of(token))).collect();
    TokenLogprobs { logprob: of(token), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chooser(penalties: Penalties, bias: Vec<(u32, f32)>, prompt: &[u32]) -> Chooser {
        Chooser::new(SamplingParams::GREEDY, penalties, bias, None, prompt)
    }

    #[test]
    fn logprobs_are_the_softmax() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let got = logprobs_of(&logits, 1, 2);
        assert!((got.logprob - 0.25f64.ln()).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [2, 1]);
        assert!((got.top[0].1 - 0.625f64.ln()).abs() < 1e-6);
        assert_eq!(logprobs_of(&logits, 0, 0).top, []);
        assert_eq!(logprobs_of(&logits, 0, 9).top.len(), 3);
    }

    #[test]
    fn penalties_count_the_answer_and_repetition_the_prompt_too() {
        let pick = |c: &mut Chooser, logits: [f32; 3]| c.choose(&mut { logits }).unwrap().0;
        let mut frequency = chooser(Penalties { frequency: 0.6, ..Penalties::NONE }, vec![], &[0]);
        let logits = [1.0, 0.9, 0.2];
        assert_eq!([0; 5].map(|_| pick(&mut frequency, logits)), [0, 1, 0, 1, 2]);
        let mut presence = chooser(Penalties { presence: 0.5, ..Penalties::NONE }, vec![], &[1]);
        assert_eq!([0; 3].map(|_| pick(&mut presence, logits)), [0, 1, 0]);
        let repetition = Penalties { repetition: 2.0, ..Penalties::NONE };
        assert_eq!(pick(&mut chooser(repetition, vec![], &[0]), logits), 1);
        assert_eq!(pick(&mut chooser(repetition, vec![], &[0, 1]), [-0.1, -0.2, -0.3]), 0);
    }

    #[test]
    fn bias_moves_a_logit() {
        let mut biased = chooser(Penalties::NONE, vec![(2, 5.0), (9, 1.0)], &[0]);
        assert_eq!(biased.choose(&mut [1.0, 0.0, 0.0]).unwrap(), (2, false));
    }
}
