use onebase_compress::Pair;
use onebase_format::artifact::{CalibrationRecord, DeltaError, Perplexity, Sizes, TaskQuality};
use serde::Serialize;

use crate::compare::{Encoded, linear, n_elements};
use crate::ideal::IdealBits;
use crate::site_error::{SiteError, total_error};
use crate::{Measurement, Result};

/// The base alone, as the name of a variant.
const BASE: &str = "base";

/// The result of a comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Program and version.
    pub tool: String,
    /// What the base is called.
    pub base: String,
    /// What the fine-tune is called.
    pub finetune: String,
    /// Bytes of the fine-tune's weights.
    pub finetune_bytes: u64,
    /// Elements of all tensors of the fine-tune.
    pub n_weights: u64,
    /// Elements of the linear sites' weights.
    pub n_weights_linear: u64,
    /// Seed of the intervals.
    pub seed: u64,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// Tasks, and what base and fine-tune reach.
    pub tasks: Vec<TaskLevel>,
    /// The text for perplexity.
    pub text: Option<MeasuredText>,
    /// The text of the calibration.
    pub calibration: Option<CalibrationRecord>,
    /// The linear sites, in the order of the forward pass.
    pub sites: Vec<String>,
    /// The base alone, then every codec.
    pub variants: Vec<Variant>,
    /// The limit lines.
    pub limit: LimitLines,
    /// What a code on the limit line would keep.
    pub ideal: Vec<Ideal>,
    /// How long it all took.
    pub seconds: f64,
}

/// What base and fine-tune reach on a task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskLevel {
    /// The task.
    pub name: String,
    /// Questions.
    pub n: usize,
    /// Share that the base answers right.
    pub base: f64,
    /// Share that the fine-tune answers right.
    pub finetune: f64,
}

/// A text for perplexity.
#[derive(Clone, Debug, Serialize)]
pub struct MeasuredText {
    /// What it is called.
    pub name: String,
    /// Tokens that are predicted.
    pub n_tokens: usize,
    /// Tokens that are run as one document.
    pub window_tokens: usize,
}

/// A codec with its options, and what became of the fine-tune with it.
#[derive(Clone, Debug, Serialize)]
pub struct Variant {
    /// The codec with its options, or `base`.
    pub codec: String,
    /// The same with those of its options that say something.
    pub label: String,
    /// The codec.
    pub name: String,
    /// Whether every comparison holds it.
    pub baseline: bool,
    /// Bytes of the artifact's folder, all files.
    pub bytes: u64,
    /// Bytes of the files that hold linear sites.
    pub linear_bytes: u64,
    /// Effective bits per weight of the whole fine-tune.
    pub effective_bpw_total: f64,
    /// Effective bits per weight of the linear sites.
    pub effective_bpw_linear: f64,
    /// Bits per weight of the linear sites by the formula of the method's paper.
    pub claimed_bpw: Option<f64>,
    /// The fine-tune's bits per weight over those.
    pub claimed_ratio: Option<f64>,
    /// The fine-tune's bits per weight over the effective ones of the linear sites.
    pub true_ratio_linear: Option<f64>,
    /// The fine-tune's bytes over the artifact's.
    pub true_ratio: Option<f64>,
    /// Tasks.
    pub tasks: Vec<TaskQuality>,
    /// As in [`Measurement`].
    pub kl_mean: Option<f64>,
    /// As in [`Measurement`].
    pub top1_agreement: Option<f64>,
    /// Perplexity on the text.
    pub perplexity: Option<Perplexity>,
    /// Relative squared error over all linear sites.
    pub error: DeltaError,
    /// Bits per weight of the linear sites above the limit line at equal error;
    /// absent where nothing at all is lost.
    pub above_limit: AboveLimit,
    /// The error at each site.
    pub site_errors: Vec<DeltaError>,
    /// How long compression took.
    pub encode_seconds: f64,
    /// The most resident memory of compression, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// Bits per weight above the limit line.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct AboveLimit {
    /// That of the weights' error.
    pub weight: Option<f64>,
    /// That of the outputs' error.
    pub output: Option<f64>,
}

/// The limit lines of the linear sites.
#[derive(Clone, Debug, Serialize)]
pub struct LimitLines {
    /// Of the weights' error.
    pub weight: Vec<LimitPoint>,
    /// Of the outputs' error.
    pub output: Option<Vec<LimitPoint>>,
}

/// A point of a limit line.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LimitPoint {
    /// Bits per weight.
    pub bpw: f64,
    /// The least relative squared error.
    pub error: f64,
}

/// A simulated code on the limit line of the weights' error, and what it keeps.
#[derive(Clone, Debug, Serialize)]
pub struct Ideal {
    /// Bits per weight of the linear sites.
    pub bpw_linear: f64,
    /// Bits per weight of the whole fine-tune.
    pub bpw_total: f64,
    /// Tasks.
    pub tasks: Vec<TaskQuality>,
    /// As in [`Measurement`].
    pub kl_mean: Option<f64>,
    /// As in [`Measurement`].
    pub top1_agreement: Option<f64>,
    /// Perplexity on the text.
    pub perplexity: Option<Perplexity>,
}

impl Ideal {
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn new(
        bits: IdealBits,
        [n_linear, n_total]: [u64; 2],
        measured: Measurement,
    ) -> Self {
        Self {
            bpw_linear: bits.linear / n_linear.max(1) as f64,
            bpw_total: bits.total / n_total.max(1) as f64,
            tasks: measured.tasks,
            kl_mean: measured.kl_mean,
            top1_agreement: measured.top1_agreement,
            perplexity: measured.perplexity,
        }
    }
}

impl Variant {
    pub(crate) fn base(measurement: Measurement, has_outputs: bool) -> Self {
        Self {
            codec: BASE.to_owned(),
            label: "base alone".to_owned(),
            name: BASE.to_owned(),
            baseline: true,
            bytes: 0,
            linear_bytes: 0,
            effective_bpw_total: 0.0,
            effective_bpw_linear: 0.0,
            claimed_bpw: None,
            claimed_ratio: None,
            true_ratio_linear: None,
            true_ratio: None,
            tasks: measurement.tasks,
            kl_mean: measurement.kl_mean,
            top1_agreement: measurement.top1_agreement,
            perplexity: measurement.perplexity,
            error: DeltaError { weight: 1.0, output: has_outputs.then_some(1.0) },
            above_limit: AboveLimit { weight: Some(0.0), output: has_outputs.then_some(0.0) },
            site_errors: Vec::new(),
            encode_seconds: 0.0,
            peak_memory_bytes: None,
        }
    }

    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn new(
        pair: &Pair,
        encoded: &Encoded,
        measurement: Measurement,
        errors: &[SiteError],
    ) -> Result<Self> {
        let sizes: Sizes = encoded.artifact.sizes();
        let mut claimed = 0.0;
        for spec in linear(pair) {
            // A site that is the base's costs no formula anything.
            if let Some(parts) = encoded.artifact.part_shapes(&spec.name)? {
                let shape = [spec.shape[0], spec.shape[1]];
                claimed += encoded.spec.claimed_bits(shape, &parts) * n_elements(spec) as f64;
            }
        }
        let claimed_bpw = claimed / sizes.n_weights_linear.max(1) as f64;
        let finetune = pair.fine_tune();
        let finetune_bpw = 8.0 * finetune.size_bytes() as f64 / finetune.n_weights().max(1) as f64;
        Ok(Self {
            codec: encoded.spec.to_string(),
            label: encoded.spec.short(),
            name: encoded.spec.codec().name().to_owned(),
            baseline: encoded.baseline,
            bytes: sizes.total_bytes,
            linear_bytes: sizes.linear_bytes,
            effective_bpw_total: sizes.effective_bpw_total(),
            effective_bpw_linear: sizes.effective_bpw_linear(),
            claimed_bpw: Some(claimed_bpw),
            claimed_ratio: Some(finetune_bpw / claimed_bpw),
            true_ratio_linear: Some(finetune_bpw / sizes.effective_bpw_linear()),
            true_ratio: Some(finetune.size_bytes() as f64 / sizes.total_bytes as f64),
            tasks: measurement.tasks,
            kl_mean: measurement.kl_mean,
            top1_agreement: measurement.top1_agreement,
            perplexity: measurement.perplexity,
            error: total_error(errors),
            above_limit: AboveLimit::default(),
            site_errors: errors.iter().map(SiteError::relative).collect(),
            encode_seconds: encoded.cost.seconds,
            peak_memory_bytes: encoded.cost.peak_memory_bytes,
        })
    }
}
