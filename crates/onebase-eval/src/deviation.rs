//! How far one distribution of the next token is from another.

use crate::sequences::{Sequence, Subject, map_rows};
use crate::{Result, Watcher};

/// The natural logarithm of the sum of the exponentials of logits, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l)));
    let sum: f64 = logits.iter().map(|l| (f64::from(*l) - max).exp()).sum();
    max + sum.ln()
}

/// The first of the likeliest tokens.
fn likeliest(logits: &[f32]) -> usize {
    let better = |best: usize, (i, l): (usize, &f32)| if *l > logits[best] { i } else { best };
    logits.iter().enumerate().fold(0, better)
}

/// Minus the log-probability of a token, in nats.
pub(crate) fn surprise(logits: &[f32], token: u32) -> f64 {
    log_sum_exp(logits) - f64::from(logits[token as usize])
}

/// `KL(p ‖ q)` in nats of two distributions over one vocabulary.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (log_p, log_q) = (log_sum_exp(p), log_sum_exp(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let log_p = f64::from(*p) - log_p;
        // A token that cannot come adds nothing, whatever the other says of it.
        if log_p == f64::NEG_INFINITY { 0.0 } else { log_p.exp() * (log_p - f64::from(*q) + log_q) }
    });
    // Never negative but for rounding.
    terms.sum::<f64>().max(0.0)
}

/// Sums over positions of how far a subject is from the fine-tune.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Deviation {
    n_positions: usize,
    divergence: f64,
    n_agreed: usize,
}

impl Deviation {
    /// Over every wanted position of some sequences; both have one vocabulary.
    pub(crate) fn measure(
        finetune: Subject<'_>,
        other: Subject<'_>,
        sequences: &[Sequence],
        watcher: &dyn Watcher,
    ) -> Result<Self> {
        let rows = map_rows(&[finetune, other], sequences, watcher, |_, _, logits| {
            let agreed = likeliest(logits[0]) == likeliest(logits[1]);
            (divergence(logits[0], logits[1]), agreed)
        })?;
        let mut total = Self::default();
        for (divergence, agreed) in rows.into_iter().flatten() {
            total.n_positions += 1;
            total.divergence += divergence;
            total.n_agreed += usize::from(agreed);
        }
        Ok(total)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.n_positions += other.n_positions;
        self.divergence += other.divergence;
        self.n_agreed += other.n_agreed;
    }

    /// The mean divergence in nats; `None` over no position.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn kl_mean(&self) -> Option<f64> {
        (self.n_positions > 0).then(|| self.divergence / self.n_positions as f64)
    }

    /// The share of positions with the same likeliest token; `None` over none.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn top1_agreement(&self) -> Option<f64> {
        (self.n_positions > 0).then(|| self.n_agreed as f64 / self.n_positions as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_known_distributions() {
        let logits = |p: &[f64]| -> Vec<f32> {
            // Any constant may be added to logits.
            #[allow(clippy::cast_possible_truncation)]
            p.iter().map(|p| (p.ln() + 3.0) as f32).collect()
        };
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]);
        let expected: f64 = p.iter().zip(&q).map(|(p, q): (&f64, &f64)| p * (p / q).ln()).sum();
        assert!((divergence(&logits(&p), &logits(&q)) - expected).abs() < 1e-6);
        assert_eq!(divergence(&logits(&p), &logits(&p)), 0.0);
        assert!((surprise(&logits(&p), 1) - 4f64.ln()).abs() < 1e-6);
        // Large logits neither overflow nor drown the small.
        assert_eq!(divergence(&[1e4, 0.0], &[1e4, 0.0]), 0.0);
        assert!((divergence(&[0.0, -1e4], &[-1e4, 0.0]) - 1e4).abs() < 1e-6);
        assert_eq!(divergence(&[0.0, f32::NEG_INFINITY], &[0.0, f32::NEG_INFINITY]), 0.0);
    }

    #[test]
    fn the_first_of_equals_is_the_likeliest() {
        assert_eq!(likeliest(&[0.0, 2.0, 1.0, 2.0]), 1);
    }
}
