use std::collections::BTreeMap;
use std::ops::Range;

use onebase_compress::{InputMoment, MomentRun, WINDOW_TOKENS};
use onebase_format::artifact::Role;
use onebase_model::{Model, SiteInput, TensorSpec};
use rayon::prelude::*;

use crate::{Result, Watcher};

/// Memory for second moments; blocks of the model are judged in groups that fit it.
const MOMENT_BYTES: usize = 1 << 30;

/// Bytes of an element of a second moment, in f64 and in f32.
const MOMENT_ELEMENT_BYTES: usize = 12;

/// A model and the text on which its activations are measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Calibration<'a> {
    pub(crate) model: &'a Model,
    pub(crate) tokens: &'a [u32],
}

/// `Σ x xᵀ / n` over the inputs `x` of a site, `[in_features, in_features]`, where `n`
/// is the number of tokens of the text: experts count by how often they are chosen.
#[derive(Default)]
pub(crate) struct SecondMoment {
    pub(crate) values: Vec<f64>,
    /// The same in f32, for the kernels.
    pub(crate) narrow: Vec<f32>,
}

impl From<InputMoment> for SecondMoment {
    fn from(InputMoment { values, .. }: InputMoment) -> Self {
        #[allow(clippy::cast_possible_truncation)]
        let narrow = values.iter().map(|v| *v as f32).collect();
        Self { values, narrow }
    }
}

/// Calls `each` for every linear site, in the order of the forward pass, with the
/// second moment of its inputs where there is a calibration. Sites are worked on in
/// parallel.
pub(crate) fn map_sites<T: Send>(
    specs: &[TensorSpec],
    calibration: Option<Calibration<'_>>,
    watcher: &dyn Watcher,
    each: impl Fn(&TensorSpec, Option<&SecondMoment>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let sites: Vec<&TensorSpec> = specs.iter().filter(|s| s.role == Role::Linear).collect();
    let Some(calibration) = calibration else {
        watcher.begin("errors of the sites", sites.len() as u64);
        return map_group(&sites, &Moments::default(), watcher, &each);
    };
    let config = calibration.model.config();
    let layer_elements = most_elements(&sites, config.n_layers);
    let layers_at_a_time = (MOMENT_BYTES / (layer_elements * MOMENT_ELEMENT_BYTES).max(1)).max(1);
    let mut run = MomentRun::new(calibration.model, calibration.tokens, WINDOW_TOKENS)?;
    let mut results = Vec::new();
    for first in (0..config.n_layers).step_by(layers_at_a_time) {
        let layers = first..config.n_layers.min(first + layers_at_a_time);
        watcher.begin("calibration", (calibration.tokens.len() * layers.len()) as u64);
        let moments = Moments::measure(&mut run, layers.clone(), watcher);
        let of_group = |spec: &&TensorSpec| {
            SiteInput::of_weight(&spec.name).is_some_and(|(layer, _)| layers.contains(&layer))
        };
        let group: Vec<&TensorSpec> = sites.iter().copied().filter(of_group).collect();
        watcher.begin("errors of the sites", group.len() as u64);
        results.extend(map_group(&group, &moments, watcher, &each)?);
    }
    Ok(results)
}

/// The most elements that the second moments of a block's inputs have.
fn most_elements(sites: &[&TensorSpec], n_layers: usize) -> usize {
    let width = |spec: &&TensorSpec| Some((SiteInput::of_weight(&spec.name)?, spec.shape[1]));
    let widths: BTreeMap<(usize, SiteInput), usize> = sites.iter().filter_map(width).collect();
    let first = |layer| (layer, SiteInput::Attention);
    let of_layer = |layer| widths.range(first(layer)..first(layer + 1)).map(|(_, n)| n * n).sum();
    (0..n_layers).map(of_layer).max().unwrap_or(0)
}

fn map_group<T: Send>(
    sites: &[&TensorSpec],
    moments: &Moments,
    watcher: &dyn Watcher,
    each: &(impl Fn(&TensorSpec, Option<&SecondMoment>) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    sites
        .par_iter()
        .map(|spec| {
            let result = each(spec, moments.of(&spec.name));
            watcher.advance(1);
            result
        })
        .collect()
}

/// Second moments of the inputs of some blocks.
#[derive(Default)]
struct Moments(BTreeMap<(usize, SiteInput), SecondMoment>);

impl Moments {
    /// Those of the next blocks, as many as there are in the range.
    fn measure(run: &mut MomentRun<'_>, layers: Range<usize>, watcher: &dyn Watcher) -> Self {
        let mut moments = Self::default();
        for _ in layers {
            let Some((layer, measured)) = run.next_layer(|n| watcher.advance(n as u64)) else {
                break;
            };
            let named = measured.into_inner().map(|(input, m)| ((layer, input), m.into()));
            moments.0.extend(named);
        }
        moments
    }

    fn of(&self, tensor: &str) -> Option<&SecondMoment> {
        self.0.get(&SiteInput::of_weight(tensor)?)
    }
}
