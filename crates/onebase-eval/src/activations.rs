use std::collections::BTreeMap;
use std::ops::Range;

use onebase_format::artifact::Role;
use onebase_kernels::Backend;
use onebase_model::{KvCache, Logits, Model, Observer, Segment, SiteInput, TensorSpec};
use onebase_tensor::{MatrixMut, MatrixRef, WeightRef};
use rayon::prelude::*;

use crate::{Result, Watcher};

/// Memory for second moments; blocks of the model are calibrated in groups that
/// fit it, the text being run once for each group.
const MOMENT_BYTES: usize = 1 << 30;

/// Bytes of an element of a second moment, in f64 and in f32.
const MOMENT_ELEMENT_BYTES: usize = 12;

/// Tokens of the calibration text that are run as one document, and together.
const WINDOW_TOKENS: usize = 512;

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
    let mut results = Vec::new();
    for first in (0..config.n_layers).step_by(layers_at_a_time) {
        let layers = first..config.n_layers.min(first + layers_at_a_time);
        let moments = Moments::measure(calibration, layers.clone(), watcher)?;
        let group: Vec<&TensorSpec> = sites
            .iter()
            .copied()
            .filter(|spec| input_of(&spec.name).is_some_and(|(layer, _)| layers.contains(&layer)))
            .collect();
        watcher.begin("errors of the sites", group.len() as u64);
        results.extend(map_group(&group, &moments, watcher, &each)?);
    }
    Ok(results)
}

/// The most elements that the second moments of a block's inputs have.
fn most_elements(sites: &[&TensorSpec], n_layers: usize) -> usize {
    let width = |spec: &&TensorSpec| Some((input_of(&spec.name)?, spec.shape[1]));
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

/// The block of a linear site and what it reads, from its weight's name.
fn input_of(tensor: &str) -> Option<(usize, SiteInput)> {
    let (layer, module) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, SiteInput::of(module.strip_suffix(".weight")?)?))
}

/// Second moments of the inputs of some blocks.
#[derive(Default)]
struct Moments {
    layers: Range<usize>,
    by_input: BTreeMap<(usize, SiteInput), SecondMoment>,
}

impl Moments {
    fn measure(
        calibration: Calibration<'_>,
        layers: Range<usize>,
        watcher: &dyn Watcher,
    ) -> Result<Self> {
        watcher.begin("calibration", calibration.tokens.len() as u64);
        let mut moments = Self { layers, by_input: BTreeMap::new() };
        let window_tokens = WINDOW_TOKENS.min(calibration.model.config().context_tokens);
        for tokens in calibration.tokens.chunks(window_tokens) {
            let mut cache = KvCache::new(calibration.model.config());
            let segment = Segment { tokens, tenant: None, cache: &mut cache, logits: Logits::None };
            calibration.model.forward_observed(&mut [segment], &mut moments)?;
            watcher.advance(tokens.len() as u64);
        }
        #[allow(clippy::cast_precision_loss)]
        let n = calibration.tokens.len() as f64;
        for moment in moments.by_input.values_mut() {
            moment.values.iter_mut().for_each(|v| *v /= n);
            #[allow(clippy::cast_possible_truncation)]
            let narrow = moment.values.iter().map(|v| *v as f32);
            moment.narrow = narrow.collect();
        }
        Ok(moments)
    }

    fn of(&self, tensor: &str) -> Option<&SecondMoment> {
        self.by_input.get(&input_of(tensor)?)
    }
}

impl Observer for Moments {
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>) {
        if !self.layers.contains(&layer) {
            return;
        }
        let [n_rows, n] = x.shape();
        let moment = self.by_input.entry((layer, input)).or_insert_with(|| SecondMoment {
            values: vec![0.0; n * n],
            ..SecondMoment::default()
        });
        // An expert that nobody was sent to has a moment of zero.
        if n_rows == 0 {
            return;
        }
        let mut columns = vec![0.0; n * n_rows];
        for (row, values) in x.data().chunks_exact(n).enumerate() {
            for (column, value) in values.iter().enumerate() {
                columns[column * n_rows + row] = *value;
            }
        }
        // A window's products are summed in f32, the windows in f64.
        let mut products = vec![0.0; n * n];
        let (Ok(xt), Ok(mut sums)) =
            (MatrixRef::new(&columns, n, n_rows), MatrixMut::new(&mut products, n, n))
        else {
            unreachable!("the buffers were sized for the matrices")
        };
        Backend::active().add_dense(WeightRef::F32(&columns), xt, &mut sums);
        moment.values.iter_mut().zip(&products).for_each(|(sum, product)| {
            *sum += f64::from(*product);
        });
    }
}
