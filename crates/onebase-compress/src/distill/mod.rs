//! Scales fitted after encoding, so that the logits are the fine-tune's.

mod equations;
mod rewrite;
mod student;

use std::path::Path;

use onebase_codec::CodecSpec;
use onebase_codec::rqt::Rqt;
use onebase_format::artifact::{
    Artifact, ArtifactWriter, CalibrationRecord, Manifest, Role, Run, Shard, Sizes, Storage,
};
use onebase_model::Model;
use serde::Serialize;
use serde_json::Map;

use crate::verify::fine_tune_specs;
use crate::{Error, Progress, Result};
use equations::solve;
use rewrite::rewrite;
use student::Student;

/// Tokens of the text that are run as one document: those of the paper's samples.
const WINDOW_TOKENS: usize = 128;

/// One window of so many is not fitted to but judges what was.
const HELD_OUT: usize = 4;

/// The most times that the equations are set up.
const MAX_STEPS: usize = 4;

/// The most dampings that are tried with the same equations.
const MAX_TRIES: usize = 5;

/// Damping at first, relative to the equations' diagonal, and its change after a step
/// that helped or did not.
const DAMPING: [f64; 2] = [1e-3, 10.0];

/// A step that lowers the loss by a smaller share is the last.
const WORTH_A_STEP: f64 = 1e-3;

/// What scales were fitted to, and how well.
#[derive(Clone, Debug, Serialize)]
pub struct Distilled {
    /// Linear sites that got a factor.
    pub n_sites: usize,
    /// Tokens that were fitted to.
    pub n_tokens: usize,
    /// Other tokens, on which the losses are measured.
    pub n_held_out_tokens: usize,
    /// Mean squared error of a logit before.
    pub loss_before: f64,
    /// The same after.
    pub loss_after: f64,
    /// Steps that lowered it.
    pub n_steps: usize,
    /// The least and the greatest factor.
    pub factors: [f32; 2],
}

/// A text on which scales are fitted.
#[derive(Clone, Debug)]
pub struct DistillText<'a> {
    /// The fine-tune's tokens of the text.
    pub tokens: &'a [u32],
    /// What the text is, for the manifest.
    pub record: CalibrationRecord,
}

/// A writer of what will be fitted. It is written in one go, after the fit.
fn open_writer(
    target: &Path,
    artifact: &Artifact,
    text: &DistillText<'_>,
    n_tensors: usize,
) -> Result<ArtifactWriter> {
    let of = artifact.manifest();
    let run = Run {
        tool: of.tool.clone(),
        base: of.base.name.clone(),
        fine_tune: of.fine_tune.clone(),
        inputs: of.fine_tune_blake3.unwrap_or(of.base.blake3),
        options: Map::from_iter([(
            "distillation".to_owned(),
            format!("{} tokens of {}", text.record.n_tokens, text.record.blake3).into(),
        )]),
        calibration: of.calibration.clone(),
        n_tensors,
        shard: Shard::WHOLE,
    };
    Ok(ArtifactWriter::open(target, &run, true)?)
}

/// Multiplies the delta of each linear site of an artifact by a factor of its own, such
/// that the logits are near the fine-tune's on a text, and writes the result as the
/// artifact `target`, which must not exist; what an interrupted process has left beside it
/// is thrown away.
///
/// This is the scale distillation of J. Liu et al., "BitDelta: Your Fine-Tune May Only Be
/// Worth One Bit", NeurIPS 2024 (section 3): the least mean of `‖Z_fine − Z(α)‖²` over the
/// scales α. The paper takes it by Adam; the factors are few, so here it is a
/// Gauss-Newton iteration with Levenberg's damping. Derivatives of the logits are
/// differences of two forward passes, which for each step takes one pass for each site.
/// A quarter of the text is held out: a step that does not lower the loss there is not
/// taken.
///
/// Bytes are the same on any number of threads, on processors of one kind. Memory: a few
/// hundred MiB of logits, and for each site a cache of 128 tokens, those of a window.
///
/// # Errors
/// When the artifact is damaged or not of this base, its codec has no scales, the text is
/// too short, the logits are no finite numbers, or the artifact cannot be written.
pub fn distill(
    base: &Model,
    fine_tune: &Model,
    artifact: &Artifact,
    text: &DistillText<'_>,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(Manifest, Sizes, Distilled)> {
    let specs = fine_tune_specs(base.checkpoint(), artifact)?;
    for spec in specs.iter().filter(|spec| spec.role == Role::Linear) {
        check_rescalable(artifact, &spec.name)?;
    }
    let mut windows = [Vec::new(), Vec::new()];
    let window_tokens = WINDOW_TOKENS.min(fine_tune.config().context_tokens).max(1);
    for (index, window) in text.tokens.chunks(window_tokens).enumerate() {
        windows[usize::from(index % HELD_OUT == HELD_OUT - 1)].push(window);
    }
    let [fitted, held_out] = windows;
    if held_out.is_empty() {
        let (n_tokens, least) = (text.tokens.len(), window_tokens * (HELD_OUT - 1) + 1);
        return Err(Error::ShortText { n_tokens, least });
    }
    let writer = open_writer(target, artifact, text, specs.len())?;
    let student = Student::load(base, fine_tune, artifact)?;
    let n_tokens = |windows: &[&[u32]]| windows.iter().map(|w| w.len()).sum::<usize>();
    let n_passes = (student.n_sites() + 2) * MAX_STEPS;
    progress.begin((n_tokens(&fitted) * n_passes) as u64);
    let mut factors = vec![1.0; student.n_sites()];
    let loss_before = student.loss(&held_out)?;
    if !loss_before.is_finite() {
        return Err(Error::LogitsNotFinite { path: artifact.dir().to_owned() });
    }
    let (mut loss_after, mut n_steps) = (loss_before, 0);
    let [mut damping, change] = DAMPING;
    while n_steps < MAX_STEPS {
        let equations = student.equations(&fitted, &factors, progress)?;
        let mut better = None;
        for _ in 0..MAX_TRIES {
            if let Some(step) = solve(&equations, factors.len(), damping) {
                #[allow(clippy::cast_possible_truncation)]
                let trial: Vec<f32> =
                    factors.iter().zip(step).map(|(f, d)| (f64::from(*f) + d) as f32).collect();
                student.set(&trial);
                let loss = student.loss(&held_out)?;
                if loss < loss_after {
                    better = Some((trial, loss));
                    break;
                }
            }
            damping *= change;
        }
        let Some((trial, loss)) = better else { break };
        let gained = 1.0 - loss / loss_after;
        (factors, loss_after) = (trial, loss);
        n_steps += 1;
        damping /= change;
        if gained < WORTH_A_STEP {
            break;
        }
    }
    let factor_of = |tensor: &str| student.position(tensor).map(|site| factors[site]);
    let (manifest, sizes) =
        rewrite(base.checkpoint(), fine_tune.checkpoint(), artifact, writer, text, &factor_of)?;
    let least = factors.iter().copied().fold(f32::INFINITY, f32::min);
    let greatest = factors.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let distilled = Distilled {
        n_sites: factors.len(),
        n_tokens: n_tokens(&fitted),
        n_held_out_tokens: n_tokens(&held_out),
        loss_before,
        loss_after,
        n_steps,
        factors: if factors.is_empty() { [1.0; 2] } else { [least, greatest] },
    };
    Ok((manifest, sizes, distilled))
}

/// Checks that the delta of a tensor, if it has one, can be rescaled.
fn check_rescalable(artifact: &Artifact, tensor: &str) -> Result<()> {
    let checked = match artifact.record(tensor)?.storage {
        Storage::Codec { codec, .. } => {
            let record = &artifact.manifest().codecs[codec];
            CodecSpec::from_record(&record.name, record.version, &record.options)
                .and_then(|spec| spec.rescalable().map(|_| ()))
        }
        // Its scales are others' too.
        Storage::Path { .. } => Err(Rqt::not_rescalable()),
        Storage::Unchanged | Storage::Exact { .. } => Ok(()),
    };
    checked.map_err(|source| Error::Codec {
        path: artifact.dir().to_owned(),
        tensor: tensor.to_owned(),
        source,
    })
}
