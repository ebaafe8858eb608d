use serde::{Deserialize, Serialize};

use crate::Digest;

/// How much of a fine-tune an artifact kept when it was measured.
///
/// Shares are from 0 to 1. A figure is absent where it was not measured or is
/// undefined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Program and version that measured.
    pub tool: String,
    /// What the fine-tune that it was compared with is called.
    pub reference: String,
    /// Seed of the intervals.
    pub seed: u64,
    /// Questions with exact answers.
    pub tasks: Vec<TaskQuality>,
    /// Mean Kullback-Leibler divergence of the next-token distribution from the
    /// fine-tune's, in nats.
    pub kl_mean: Option<f64>,
    /// Share of positions at which the likeliest token is the fine-tune's.
    pub top1_agreement: Option<f64>,
    /// Perplexity on a text.
    pub perplexity: Option<Perplexity>,
    /// Error of the deltas of the linear sites.
    pub error: Option<DeltaError>,
    /// What the error of the outputs was measured on.
    #[serde(default)]
    pub calibration: Option<CalibrationRecord>,
}

/// How a task with exact answers was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskQuality {
    /// What the task is called.
    pub name: String,
    /// Digest of its file.
    pub blake3: Digest,
    /// Questions.
    pub n: usize,
    /// Share that the base answers right.
    pub base: f64,
    /// Share that the fine-tune answers right.
    pub finetune: f64,
    /// Share that is answered right with the artifact.
    pub compressed: Option<f64>,
    /// `(compressed - base) / (finetune - base)`, where the fine-tune is better.
    pub skill_kept: Option<f64>,
    /// Its 95 % interval, by bootstrap over the questions.
    pub skill_kept_ci: Option<[f64; 2]>,
    /// Mean divergence from the fine-tune's distribution over the positions of
    /// the right answers, in nats.
    pub kl_mean: Option<f64>,
    /// Share of those positions at which the likeliest token is the fine-tune's.
    pub top1_agreement: Option<f64>,
}

/// Perplexity on a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// What the text is called.
    pub name: String,
    /// Digest of its file.
    pub blake3: Digest,
    /// Tokens that were predicted.
    pub n_tokens: usize,
    /// Tokens that were run as one document, the first of them not predicted.
    pub window_tokens: usize,
    /// The base's; absent where its vocabulary lacks a token of the text.
    pub base: Option<f64>,
    /// The fine-tune's; absent where it is no finite number.
    pub finetune: Option<f64>,
    /// With the artifact.
    pub compressed: Option<f64>,
}

/// A text on which activations were measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// What it is called.
    pub name: String,
    /// Digest of its file.
    pub blake3: Digest,
    /// Tokens.
    pub n_tokens: usize,
}

/// Relative squared error of deltas: 0 where nothing is lost, 1 where the delta
/// is left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeltaError {
    /// Of the weights, `‖Δ − Δ̂‖² / ‖Δ‖²`.
    pub weight: f64,
    /// Of the outputs for calibration inputs `x`, `Σ‖(Δ − Δ̂) x‖² / Σ‖Δ x‖²`.
    pub output: Option<f64>,
}
