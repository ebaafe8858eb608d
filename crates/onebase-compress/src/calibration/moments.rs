use std::collections::BTreeMap;

use onebase_kernels::Backend;
use onebase_model::{LayerRun, Model, Observer, SiteInput};
use onebase_tensor::{MatrixMut, MatrixRef, WeightRef};
use rayon::prelude::*;

use crate::Result;

/// Tokens of a text that are run as one document, unless others are asked for.
pub const WINDOW_TOKENS: usize = 512;

/// Elements of a sum that a thread adds to at a time.
const SUM_ELEMENTS: usize = 1 << 16;

/// `Σ x xᵀ / n` over the inputs `x` of some sites, `[in_features, in_features]`, where
/// `n` is the number of tokens of the text: experts count by how often they are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct InputMoment {
    /// Input features.
    pub in_features: usize,
    /// The elements, row-major.
    pub values: Vec<f64>,
}

/// The moments of the inputs of one block. Those of experts that no token was sent to
/// are zero.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerMoments {
    by_input: BTreeMap<SiteInput, InputMoment>,
}

impl LayerMoments {
    /// Every input with its moment, in one order.
    pub fn iter(&self) -> impl Iterator<Item = (SiteInput, &InputMoment)> {
        self.by_input.iter().map(|(input, moment)| (*input, moment))
    }

    /// Every input with its moment, in the same order.
    pub fn into_inner(self) -> impl Iterator<Item = (SiteInput, InputMoment)> {
        self.by_input.into_iter()
    }
}

impl Observer for LayerMoments {
    fn observe(&mut self, _: usize, input: SiteInput, x: MatrixRef<'_>) {
        let [n_rows, n] = x.shape();
        let moment = self
            .by_input
            .entry(input)
            .or_insert_with(|| InputMoment { in_features: n, values: vec![0.0; n * n] });
        // An expert that nobody was sent to has a moment of zero.
        if n_rows == 0 {
            return;
        }
        add_moment(&mut moment.values, x);
    }
}

/// Adds `Σ x xᵀ` of rows `[n_rows, n]` to `sum`, `[n, n]`: the products of the rows in f32, their
/// sum in f64.
pub(crate) fn add_moment(sum: &mut [f64], x: MatrixRef<'_>) {
    let [n_rows, n] = x.shape();
    let mut columns = vec![0.0; n * n_rows];
    for (row, values) in x.data().chunks_exact(n.max(1)).enumerate() {
        for (column, value) in values.iter().enumerate() {
            columns[column * n_rows + row] = *value;
        }
    }
    let mut products = vec![0.0; n * n];
    let (Ok(xt), Ok(mut sums)) =
        (MatrixRef::new(&columns, n, n_rows), MatrixMut::new(&mut products, n, n))
    else {
        unreachable!("the buffers were sized for the matrices")
    };
    Backend::active().add_dense(WeightRef::F32(&columns), xt, &mut sums);
    let sums = sum.par_chunks_mut(SUM_ELEMENTS);
    sums.zip(products.par_chunks(SUM_ELEMENTS)).for_each(|(sums, products)| {
        sums.iter_mut().zip(products).for_each(|(sum, p)| *sum += f64::from(*p));
    });
}

/// Measures a model's moments on tokens, block by block.
#[derive(Debug)]
pub struct MomentRun<'a> {
    run: LayerRun<'a>,
    n_layers: usize,
    n_tokens: usize,
}

impl<'a> MomentRun<'a> {
    /// Embeds the tokens, cut into windows of `window_tokens`, at least one and at most
    /// the model's context.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub fn new(model: &'a Model, tokens: &'a [u32], window_tokens: usize) -> Result<Self> {
        let windows = tokens.chunks(held_window(model, window_tokens));
        let run = LayerRun::new(model, windows, None)?;
        Ok(Self { run, n_layers: model.config().n_layers, n_tokens: tokens.len() })
    }

    /// The moments of the next block; `None` when all were measured. `after` is told the
    /// number of tokens of each window when it is done.
    pub fn next_layer(&mut self, after: impl FnMut(usize)) -> Option<(usize, LayerMoments)> {
        let layer = self.run.next_layer();
        if layer == self.n_layers {
            return None;
        }
        let mut moments = LayerMoments::default();
        self.run.run_layer(None, &mut moments, after);
        #[allow(clippy::cast_precision_loss)]
        let n = self.n_tokens.max(1) as f64;
        for moment in moments.by_input.values_mut() {
            moment.values.iter_mut().for_each(|v| *v /= n);
        }
        Some((layer, moments))
    }
}

/// Tokens of a window that a model can run.
pub(crate) fn held_window(model: &Model, window_tokens: usize) -> usize {
    window_tokens.min(model.config().context_tokens).max(1)
}

/// `tr(R H Rᵀ)` of rows `R`, `[n, n_cols]`, and a symmetric `H`, `[n_cols, n_cols]`: the
/// squared length of the outputs of `R`, where `H` is the moment of its inputs.
pub fn quadratic_form(rows: &[f32], n_cols: usize, h: &[f32]) -> f64 {
    let n_rows = rows.len() / n_cols.max(1);
    let mut product = vec![0.0; rows.len()];
    let (Ok(r), Ok(mut y)) =
        (MatrixRef::new(rows, n_rows, n_cols), MatrixMut::new(&mut product, n_rows, n_cols))
    else {
        unreachable!("the buffers hold whole rows")
    };
    Backend::active().add_dense(WeightRef::F32(h), r, &mut y);
    let sum: f64 = rows.iter().zip(&product).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    // Never negative but for rounding.
    sum.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quadratic_form_by_hand() {
        // Rows (1, 2) and (0, 3), H = [[2, 1], [1, 4]]: 2 + 4 + 16 and 36.
        let got = quadratic_form(&[1.0, 2.0, 0.0, 3.0], 2, &[2.0, 1.0, 1.0, 4.0]);
        assert!((got - 58.0).abs() < 1e-5, "{got}");
        assert_eq!(quadratic_form(&[], 2, &[2.0, 1.0, 1.0, 4.0]), 0.0);
    }

    #[test]
    fn moments_add_up() {
        let mut moments = LayerMoments::default();
        let observed: [&[f32]; 3] = [&[1.0, 2.0, 3.0, 4.0], &[], &[0.0, -1.0]];
        for rows in observed {
            let x = MatrixRef::new(rows, rows.len() / 2, 2).unwrap();
            moments.observe(0, SiteInput::Expert(1), x);
            moments.observe(0, SiteInput::Expert(0), MatrixRef::new(&[], 0, 2).unwrap());
        }
        let got: Vec<_> = moments.into_inner().map(|(input, m)| (input, m.values)).collect();
        let expected = [vec![0.0; 4], vec![10.0, 14.0, 14.0, 21.0]];
        let [zero, sum] = expected;
        assert_eq!(got, [(SiteInput::Expert(0), zero), (SiteInput::Expert(1), sum)]);
    }
}
