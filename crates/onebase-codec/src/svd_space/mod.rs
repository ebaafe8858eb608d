//! Deltas in the space of their singular vectors: pairs of vectors whose codes have a
//! width of their own.

mod blocks;
mod planes;
mod round;
mod weighing;

use half::bf16;
use onebase_kernels::Backend;
use onebase_kernels::thin::Thin;
use onebase_tensor::{EncodedDelta, saturating_bf16};
use rayon::prelude::*;

pub(crate) use blocks::{Blocks, Grids, Layout, MAX_WIDTH};
pub(crate) use round::relative_error;
use round::{Left, Right, left, right};
use weighing::Weighing;

use crate::numerics::{
    ColumnOrder, SvdMethod, Truncated, product, solve_positive, times, transposed_times,
    truncated_svd, truncated_svd_bytes,
};
use crate::source::Scaled;
use crate::stages::{Stage, timed};
use crate::{DeltaSource, Result, SecondMoment};

/// What `u` is fitted to once `v` has its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nothing: it stays the singular vectors.
    Vectors,
    /// The pairs that are kept, as they were: DeltaMix's correction.
    Kept,
    /// The whole delta, so that kept pairs make up for those that are not.
    Delta,
}

/// How a delta is coded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Method {
    pub(crate) svd: SvdMethod,
    pub(crate) grids: Grids,
    pub(crate) order: ColumnOrder,
    /// Of GPTQ, as a part of the mean of the diagonal.
    pub(crate) damping: f64,
    /// How much of the inputs' second moment is replaced by the identity, 0 to 1.
    pub(crate) blend: f64,
    pub(crate) target: Target,
    /// Times that `v` is fitted to `u` again, and `u` to `v`.
    pub(crate) sweeps: usize,
}

/// Added to the diagonal of least-squares problems, as a part of its mean.
const RIDGE: f64 = 1e-6;

/// Singular pairs, in units in which vectors have elements of about 1.
pub(crate) struct Pairs {
    pub(crate) shape: [usize; 2],
    /// One a row, `[rank, out_features]`.
    pub(crate) u: Vec<f32>,
    /// One a row, `[rank, in_features]`.
    pub(crate) v: Vec<f32>,
    /// `[rank]`, the largest first.
    pub(crate) s: Vec<f64>,
    /// What the delta was divided by.
    unit: f64,
}

impl Pairs {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    fn new(svd: Truncated, shape: [usize; 2]) -> Self {
        let unit = svd.s.first().copied().filter(|s| *s > 0.0).unwrap_or(1.0);
        let [of_u, of_v] = shape.map(|n| (n as f64).sqrt());
        let scaled = |mut vectors: Vec<f32>, by: f64| {
            vectors.iter_mut().for_each(|x| *x = (f64::from(*x) * by) as f32);
            vectors
        };
        Self {
            shape,
            u: scaled(svd.u, of_u),
            v: scaled(svd.v, of_v),
            s: svd.s.iter().map(|s| s / unit / (of_u * of_v)).collect(),
            unit,
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.s.len()
    }

    /// The pairs of these positions.
    fn picked(&self, positions: &[usize]) -> Self {
        let rows = |vectors: &[f32], n: usize| {
            positions.iter().flat_map(|i| &vectors[i * n..(i + 1) * n]).copied().collect()
        };
        let Self { shape, u, v, s, unit } = self;
        let s = positions.iter().map(|i| s[*i]).collect();
        Self { shape: *shape, u: rows(u, shape[0]), v: rows(v, shape[1]), s, unit: *unit }
    }
}

/// What is known when widths are chosen.
pub(crate) struct Choice<'a> {
    pub(crate) pairs: &'a Pairs,
    grids: Grids,
    weighing: &'a Weighing<'a>,
}

impl Choice<'_> {
    /// What each pair adds to the squared error of the outputs, up to a factor, if its `v`
    /// has codes of a width, or none at width 0: `s² · loss`, `[rank]`.
    pub(crate) fn losses(&self, width: usize) -> Result<Vec<f64>> {
        let factor = self.weighing.factor()?;
        let losses = match width {
            0 => crate::numerics::zero_loss(&self.pairs.v, &factor),
            _ => right(&self.pairs.v, width, self.grids, &factor).1,
        };
        Ok(losses.iter().zip(&self.pairs.s).map(|(loss, s)| loss * s * s).collect())
    }
}

/// Encodes a delta: `choose` says the width of each pair, 0 for those that are dropped.
///
/// # Errors
/// When the delta cannot be read or holds NaN or ∞, or a decomposition does not converge.
pub(crate) fn encode(
    delta: &dyn DeltaSource,
    inputs: Option<&SecondMoment>,
    method: &Method,
    candidates: usize,
    choose: &dyn Fn(&Choice<'_>) -> Result<Vec<u8>>,
) -> Result<EncodedDelta> {
    let shape = delta.shape();
    let svd = timed(Stage::Decomposition, || truncated_svd(delta, candidates, method.svd))?;
    let pairs = Pairs::new(svd, shape);
    let weighing = Weighing::new(inputs, shape[1], method);
    let widths = match pairs.rank() {
        0 => Vec::new(),
        _ => choose(&Choice { pairs: &pairs, grids: method.grids, weighing: &weighing })?,
    };
    let mut kept: Vec<usize> = (0..widths.len()).filter(|i| widths[*i] > 0).collect();
    kept.sort_by_key(|i| std::cmp::Reverse(widths[*i]));
    let widths: Vec<u8> = kept.iter().map(|i| widths[*i]).collect();
    let layout = Layout::new(shape, method.grids, &widths);
    if widths.is_empty() {
        return Ok(blocks::encoded(&layout, Vec::new(), &[]));
    }
    let pairs = pairs.picked(&kept);
    let scaled = Scaled { delta, factor: pairs.unit.recip() };
    timed(Stage::Rounding, || fit(&scaled, &pairs, &layout, &weighing, method))
}

/// Rounds `v`, then `u`, as often as the method says, and keeps what is best.
fn fit(
    delta: &dyn DeltaSource,
    pairs: &Pairs,
    layout: &Layout,
    weighing: &Weighing<'_>,
    method: &Method,
) -> Result<EncodedDelta> {
    let mut vectors = pairs.v.clone();
    let mut s = pairs.s.clone();
    let mut best: Option<(f64, Left, Right)> = None;
    for sweep in 0..=method.sweeps {
        let coded = Right::new(&vectors, &s, layout, weighing)?;
        let rank = layout.rank();
        let a = Thin::from_columns(&coded.values, layout.shape[1], rank);
        let weighed = weighing.times(&a)?;
        let k = inner(&a, &weighed);
        let reached = reach(delta, pairs, &weighed, method.target)?;
        let fitted = match method.target {
            Target::Vectors => pairs.columns_of_u(),
            Target::Kept | Target::Delta => solve(&reached, &k, rank)?,
        };
        let coded_left = left(&fitted, &reached, &k, &coded, layout, pairs.unit, method)?;
        let error = coded_left.error;
        if sweep < method.sweeps {
            (vectors, s) = next_right(delta, &coded_left, rank, layout.shape)?;
        }
        if best.as_ref().is_none_or(|(least, ..)| error < *least) {
            best = Some((error, coded_left, coded));
        }
    }
    let Some((_, left, right)) = best else { unreachable!("there is one round at least") };
    let blocks: Vec<_> = left.blocks.into_iter().zip(right.blocks).map(|(u, v)| [u, v]).collect();
    Ok(blocks::encoded(layout, left.s, &blocks))
}

impl Pairs {
    /// `u` times its numbers, as columns: `[out_features, rank]`.
    #[allow(clippy::cast_possible_truncation)]
    fn columns_of_u(&self) -> Vec<f32> {
        let [m, _] = self.shape;
        let mut out = vec![0.0; m * self.rank()];
        for (r, (u, s)) in self.u.chunks(m).zip(&self.s).enumerate() {
            let places = out[r..].iter_mut().step_by(self.rank());
            places.zip(u).for_each(|(out, u)| *out = (f64::from(*u) * s) as f32);
        }
        out
    }
}

/// `T G Aᵀ`, `[out_features, rank]`, of what `u` is fitted to: the whole delta, or the pairs
/// that are kept.
fn reach(
    delta: &dyn DeltaSource,
    pairs: &Pairs,
    weighed: &Thin,
    target: Target,
) -> Result<Vec<f32>> {
    let rank = weighed.n_cols();
    if target == Target::Delta || target == Target::Vectors {
        return Ok(rows_of(&times(delta, weighed)?));
    }
    let v = Thin::from_columns(&pairs.v, pairs.shape[1], rank);
    let inner = inner(&v, weighed);
    let u = pairs.columns_of_u();
    Ok(by_rows(&u, &inner, rank))
}

/// The columns of a thin matrix as rows of `[n_rows, n_cols]`.
fn rows_of(thin: &Thin) -> Vec<f32> {
    let mut wide = Vec::new();
    let mut out = Vec::with_capacity(thin.n_rows() * thin.n_cols());
    for group in 0..thin.n_groups() {
        wide.clear();
        thin.widen_group(group, &mut wide);
        #[allow(clippy::cast_possible_truncation)]
        out.extend(wide.iter().map(|x| *x as f32));
    }
    out
}

/// `Aᵀ B` of thin matrices `[n, rank]`, in f64.
fn inner(a: &Thin, b: &Thin) -> Vec<f64> {
    let rank = a.n_cols();
    let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
    for group in 0..a.n_groups() {
        a.widen_group(group, &mut of_a);
        b.widen_group(group, &mut of_b);
    }
    crate::numerics::product_of_columns(&of_a, &of_b, [a.n_rows(), rank, rank])
}

/// Rows that one task multiplies.
const TASK_ROWS: usize = 256;

/// `X M` of rows `[n, rank]` and a matrix `[rank, rank]`, in f64.
#[allow(clippy::cast_possible_truncation)]
fn by_rows(rows: &[f32], matrix: &[f64], rank: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len()];
    let tasks = out.par_chunks_mut(TASK_ROWS * rank).zip(rows.par_chunks(TASK_ROWS * rank));
    tasks.for_each(|(out, rows)| {
        let wide: Vec<f64> = rows.iter().map(|x| f64::from(*x)).collect();
        let result = product(&wide, matrix, [rows.len() / rank, rank, rank]);
        out.iter_mut().zip(result).for_each(|(out, x)| *out = x as f32);
    });
    out
}

/// The least-squares solution `X` of `X K ≈ R`.
fn solve(right_side: &[f32], k: &[f64], rank: usize) -> Result<Vec<f32>> {
    Ok(by_rows(right_side, &solve_positive(k, rank, RIDGE)?, rank))
}

/// The `v` that fits best to `u`, as vectors with elements of about 1, and their numbers.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
fn next_right(
    delta: &dyn DeltaSource,
    left: &Left,
    rank: usize,
    [m, n]: [usize; 2],
) -> Result<(Vec<f32>, Vec<f64>)> {
    let mut columns = vec![0.0; rank * m];
    for (row, values) in left.values.chunks(rank).enumerate() {
        values.iter().enumerate().for_each(|(r, value)| columns[r * m + row] = *value);
    }
    let u = Thin::from_columns(&columns, m, rank);
    let inverse = solve_positive(&inner(&u, &u), rank, RIDGE)?;
    let mut out = vec![0.0; rank * n];
    let fitted = by_rows(&rows_of(&transposed_times(delta, u)?), &inverse, rank);
    for (column, values) in fitted.chunks(rank).enumerate() {
        values.iter().enumerate().for_each(|(r, value)| out[r * n + column] = *value);
    }
    let rms = |vector: &[f32]| {
        let power: f64 = vector.iter().map(|x| f64::from(*x).powi(2)).sum();
        (power / vector.len() as f64).sqrt()
    };
    let mut s = Vec::with_capacity(rank);
    for (v, u) in out.chunks_mut(n).zip(columns.chunks(m)) {
        let of_v = rms(v).max(f64::MIN_POSITIVE);
        v.iter_mut().for_each(|x| *x = (f64::from(*x) / of_v) as f32);
        s.push(of_v * rms(u));
    }
    Ok((out, s))
}

/// The most bytes that [`encode`] holds at a time.
pub(crate) fn encode_bytes(shape: [usize; 2], candidates: usize, method: &Method) -> usize {
    let [m, n] = shape;
    let vectors = candidates * (m + n);
    let fit = size_of::<f32>() * 12 * vectors + size_of::<f64>() * 10 * candidates * candidates;
    truncated_svd_bytes(shape, candidates, method.svd).max(fit) + 8 * vectors + (16 << 20)
}

/// A number as it is stored.
#[allow(clippy::cast_possible_truncation)]
fn stored(s: f64) -> bf16 {
    saturating_bf16(s as f32)
}

/// The processor's own.
fn backend() -> Backend {
    Backend::active()
}
