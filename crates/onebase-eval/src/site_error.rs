use onebase_codec::{DeltaSource, read_finite};
use onebase_compress::{Pair, prepared, quadratic_form};
use onebase_format::artifact::{Artifact, DeltaError};
use onebase_model::{Model, TensorSpec};
use serde::Serialize;

use crate::activations::{Calibration, SecondMoment, map_sites};
use crate::{Result, Watcher};

/// Weights compared at a time.
const BLOCK_WEIGHTS: usize = 1 << 18;

/// What an artifact leaves out of the delta of one linear site.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SiteError {
    /// The site: `layers.3.mlp.up_proj`.
    pub site: String,
    /// `‖Δ − Δ̂‖²`.
    pub lost: f64,
    /// `‖Δ‖²`.
    pub energy: f64,
    /// The same two of the site's outputs for calibration inputs: `Σ‖(Δ − Δ̂) x‖²`
    /// and `Σ‖Δ x‖²`, means over the inputs.
    pub output: Option<[f64; 2]>,
}

/// `lost / energy`; nothing can be lost of a delta that is zero.
fn relative(lost: f64, energy: f64) -> f64 {
    if energy > 0.0 { lost / energy } else { 0.0 }
}

impl SiteError {
    /// Its relative squared errors.
    pub fn relative(&self) -> DeltaError {
        DeltaError {
            weight: relative(self.lost, self.energy),
            output: self.output.map(|[lost, energy]| relative(lost, energy)),
        }
    }
}

/// The relative squared errors over all sites together.
pub fn total_error(sites: &[SiteError]) -> DeltaError {
    let lost = sites.iter().map(|s| s.lost).sum();
    let energy = sites.iter().map(|s| s.energy).sum();
    let output: Option<Vec<[f64; 2]>> = sites.iter().map(|s| s.output).collect();
    let output = output
        .filter(|sites| !sites.is_empty())
        .map(|sites| relative(sites.iter().map(|s| s[0]).sum(), sites.iter().map(|s| s[1]).sum()));
    DeltaError { weight: relative(lost, energy), output }
}

/// The error of an artifact at every linear site, in the order of the forward pass;
/// in output space too where the fine-tune and tokens of a calibration text are
/// given.
///
/// # Errors
/// When a delta cannot be read or the model cannot be run.
pub fn site_errors(
    pair: &Pair,
    artifact: &Artifact,
    calibration: Option<(&Model, &[u32])>,
    watcher: &dyn Watcher,
) -> Result<Vec<SiteError>> {
    let calibration = calibration.map(|(model, tokens)| Calibration { model, tokens });
    map_sites(pair.specs(), calibration, watcher, |spec, moment| {
        site_error(pair, spec, artifact, moment)
    })
}

/// The name of a site, from its weight's.
pub(crate) fn site_name(tensor: &str) -> String {
    let name = tensor.strip_prefix("model.").unwrap_or(tensor);
    name.strip_suffix(".weight").unwrap_or(name).to_owned()
}

/// The error at one site, with the second moment of its inputs for the outputs' error.
pub(crate) fn site_error(
    pair: &Pair,
    spec: &TensorSpec,
    artifact: &Artifact,
    moment: Option<&SecondMoment>,
) -> Result<SiteError> {
    let n_cols = spec.shape[1];
    let decoded = prepared(artifact, &spec.name)?;
    let mut sums = [0.0; 2];
    let mut outputs = moment.map(|_| [0.0; 2]);
    let mut lost = Vec::new();
    for_each_block(pair, spec, |first, rows| {
        lost.clear();
        lost.resize(rows.len(), 0.0);
        if let Some(decoded) = &decoded {
            decoded.write_rows(first..first + rows.len() / n_cols, &mut lost);
        }
        lost.iter_mut().zip(rows).for_each(|(lost, delta)| *lost = delta - *lost);
        for (values, sum) in [&lost[..], rows].into_iter().zip(&mut sums) {
            *sum += values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        }
        if let (Some(moment), Some(outputs)) = (moment, &mut outputs) {
            for (values, sum) in [&lost[..], rows].into_iter().zip(outputs) {
                *sum += quadratic_form(values, n_cols, &moment.narrow);
            }
        }
    })?;
    let [lost, energy] = sums;
    Ok(SiteError { site: site_name(&spec.name), lost, energy, output: outputs })
}

/// `Σ‖Δ x‖²`, mean over the inputs.
pub(crate) fn output_energy(pair: &Pair, spec: &TensorSpec, moment: &SecondMoment) -> Result<f64> {
    let mut energy = 0.0;
    for_each_block(pair, spec, |_, rows| {
        energy += quadratic_form(rows, spec.shape[1], &moment.narrow);
    })?;
    Ok(energy)
}

/// Calls `each` with blocks of rows of a site's delta, and the first row's number.
fn for_each_block(
    pair: &Pair,
    spec: &TensorSpec,
    mut each: impl FnMut(usize, &[f32]),
) -> Result<()> {
    let source = pair.delta(&spec.name)?;
    let [n_rows, n_cols] = source.shape();
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    for first in (0..n_rows).step_by(block_rows) {
        let rows = first..n_rows.min(first + block_rows);
        each(first, &read_finite(&source, rows).map_err(|e| source.explain(e))?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_weigh_sites_by_their_energy() {
        let site = |lost, energy, output| SiteError { site: "s".into(), lost, energy, output };
        let sites = [site(1.0, 2.0, Some([3.0, 4.0])), site(0.0, 6.0, Some([1.0, 4.0]))];
        assert_eq!(total_error(&sites), DeltaError { weight: 0.125, output: Some(0.5) });
        let without = [site(1.0, 2.0, None), site(0.0, 0.0, None)];
        assert_eq!(total_error(&without), DeltaError { weight: 0.5, output: None });
        assert_eq!(without[1].relative(), DeltaError { weight: 0.0, output: None });
    }
}
