//! Deltas in the space of their singular vectors: pairs of vectors whose codes have a
//! width of their own.

mod blocks;
mod planes;
mod round;
#[cfg(test)]
mod tests;
mod weighing;

use half::bf16;
use onebase_kernels::thin::{GROUP, Thin};
use onebase_tensor::{EncodedDelta, saturating_bf16};
use rayon::prelude::*;

use blocks::Codes;
pub(crate) use blocks::{Blocks, Grids, Layout, MAX_WIDTH, MOST_PAIRS};
use round::{Left, Right, left, right};
use weighing::Weighing;

use crate::numerics::{
    ColumnOrder, HessianFactor, SvdMethod, Truncated, product, product_of_columns, solve_positive,
    times, transposed_times, truncated_svd, truncated_svd_bytes,
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
    /// Times that `v` is fitted to `u` again, and `u` to `v`, where that is fitted to the delta.
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

    /// The pairs of these positions, with their `u` if it is wanted.
    fn picked(self, positions: &[usize], with_u: bool) -> Self {
        let rows = |vectors: &[f32], n: usize| {
            positions.iter().flat_map(|i| &vectors[i * n..(i + 1) * n]).copied().collect()
        };
        let Self { shape, u, v, s, unit } = self;
        let s = positions.iter().map(|i| s[*i]).collect();
        let u = if with_u { rows(&u, shape[0]) } else { Vec::new() };
        Self { shape, u, v: rows(&v, shape[1]), s, unit }
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

    /// What rounding each `u` to codes of a width leaves of its squared length, `[rank]`.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn lost_of_u(&self, width: usize) -> Vec<f64> {
        let m = self.pairs.shape[0];
        let losses = right(&self.pairs.u, width, self.grids, &HessianFactor::identity(m)).1;
        // Elements are about 1, and GPTQ counts half.
        losses.iter().map(|loss| 2.0 * loss / m as f64).collect()
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
    let pairs = pairs.picked(&kept, method.target != Target::Delta);
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
    let rank = layout.rank();
    let mut next = None;
    let mut best: Option<(f64, Stored)> = None;
    // Else rounds would be fitted to one thing and judged by another.
    let sweeps = if method.target == Target::Delta { method.sweeps } else { 0 };
    for sweep in 0..=sweeps {
        let (vectors, s) = next.take().unwrap_or_else(|| (pairs.v.clone(), pairs.s.clone()));
        let right = Right::new(&vectors, s, layout, weighing)?;
        drop(vectors);
        let a = Thin::from_columns(&right.values, layout.shape[1], rank);
        let weighed = weighing.times(&a)?;
        let k = gram(&a, &weighed);
        let fitted = match method.target {
            Target::Vectors => pairs.columns_of_u(),
            Target::Kept => pairs.fitted(&weighed, &k)?,
            Target::Delta => by_groups(&times(delta, &weighed)?, &solve_positive(&k, rank, RIDGE)?),
        };
        drop(weighed);
        drop(a);
        let Left { blocks, s, values, error } =
            left(fitted, &k, &right, layout, pairs.unit, method)?;
        if sweep < sweeps {
            next = Some(next_right(delta, &values, layout.shape)?);
        }
        if best.as_ref().is_none_or(|(least, _)| error < *least) {
            let blocks = blocks.into_iter().zip(right.blocks).map(|(u, v)| [u, v]).collect();
            best = Some((error, Stored { s, blocks }));
        }
    }
    let Some((_, Stored { s, blocks })) = best else { unreachable!("there is a round at least") };
    Ok(blocks::encoded(layout, s, &blocks))
}

/// What is stored of a round.
struct Stored {
    s: Vec<bf16>,
    /// `[u, v]` of each block.
    blocks: Vec<[Codes; 2]>,
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

    /// The `u` that fits these pairs best for the values `A` of `v` whose products `G Aᵀ` and
    /// `A G Aᵀ` are given: `[out_features, rank]`.
    fn fitted(&self, weighed: &Thin, k: &[f64]) -> Result<Vec<f32>> {
        let rank = self.rank();
        let v = Thin::from_columns(&self.v, self.shape[1], rank);
        let solution = solve_positive(k, rank, RIDGE)?;
        let matrix = product(&gram(&v, weighed), &solution, [rank; 3]);
        Ok(by_groups(&Thin::from_rows(&self.columns_of_u(), self.shape[0], rank), &matrix))
    }
}

/// Groups of rows whose products one task takes.
const TASK_GROUPS: usize = 4;

/// Tasks whose products are held before they are added.
const TASKS_AT_A_TIME: usize = 4;

/// `Aᵀ B` of thin matrices `[n, rank]`, in f64: tasks' sums are added in their order.
fn gram(a: &Thin, b: &Thin) -> Vec<f64> {
    let rank = a.n_cols();
    let mut sum = vec![0.0; rank * rank];
    let firsts: Vec<usize> = (0..a.n_groups()).step_by(TASK_GROUPS).collect();
    for firsts in firsts.chunks(TASKS_AT_A_TIME) {
        let products = firsts.par_iter().map(|first| {
            let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
            for group in *first..a.n_groups().min(first + TASK_GROUPS) {
                a.widen_group(group, &mut of_a);
                b.widen_group(group, &mut of_b);
            }
            product_of_columns(&of_a, &of_b, [of_a.len() / rank, rank, rank])
        });
        for product in products.collect::<Vec<_>>() {
            sum.iter_mut().zip(product).for_each(|(sum, x)| *sum += x);
        }
    }
    sum
}

/// `X M` of a thin matrix `[n, rank]` and a matrix `[rank, rank]`, in f64: `[n, rank]`.
fn by_groups(x: &Thin, matrix: &[f64]) -> Vec<f32> {
    let rank = x.n_cols();
    let mut out = vec![0.0; x.n_rows() * rank];
    out.par_chunks_mut(GROUP * rank).enumerate().for_each(|(group, out)| {
        let mut wide = Vec::new();
        x.widen_group(group, &mut wide);
        let result = product(&wide, matrix, [wide.len() / rank, rank, rank]);
        #[allow(clippy::cast_possible_truncation)]
        out.iter_mut().zip(result).for_each(|(out, x)| *out = x as f32);
    });
    out
}

/// The `v` that fits best to `u`, `[out_features, rank]`: vectors with elements of about 1,
/// `[rank, in_features]`, and their numbers.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
fn next_right(
    delta: &dyn DeltaSource,
    u: &[f32],
    [m, n]: [usize; 2],
) -> Result<(Vec<f32>, Vec<f64>)> {
    let rank = u.len() / m;
    let u = Thin::from_rows(u, m, rank);
    let squares = gram(&u, &u);
    let inverse = solve_positive(&squares, rank, RIDGE)?;
    let fitted = by_groups(&transposed_times(delta, u)?, &inverse);
    let mut out = vec![0.0; rank * n];
    let mut s = Vec::with_capacity(rank);
    for (r, v) in out.chunks_mut(n).enumerate() {
        v.iter_mut().zip(fitted[r..].iter().step_by(rank)).for_each(|(v, x)| *v = *x);
        let power: f64 = v.iter().map(|x| f64::from(*x).powi(2)).sum();
        let of_v = (power / n as f64).sqrt().max(f64::MIN_POSITIVE);
        v.iter_mut().for_each(|x| *x = (f64::from(*x) / of_v) as f32);
        s.push(of_v * (squares[r * (rank + 1)] / m as f64).sqrt());
    }
    Ok((out, s))
}

/// The most bytes that [`encode`] holds at a time.
pub(crate) fn encode_bytes(shape: [usize; 2], candidates: usize, method: &Method) -> usize {
    const F32: usize = size_of::<f32>();
    const F64: usize = size_of::<f64>();
    let [m, n] = shape;
    let (vectors, squares) = (candidates * (m + n), candidates * candidates);
    let of_tasks = TASKS_AT_A_TIME * (squares + 2 * TASK_GROUPS * GROUP * candidates);
    let chunks = candidates.max(n) * GROUP * 64 + F64 * of_tasks;
    // All candidates, those that are kept, what is fitted and what it is made of, codes of the
    // best round and of this one; Gram matrices, inverses and factors.
    let fit = F32 * 6 * vectors + 4 * vectors + F64 * 12 * squares + chunks;
    truncated_svd_bytes(shape, candidates, method.svd).max(fit) + (16 << 20)
}

/// A number as it is stored.
#[allow(clippy::cast_possible_truncation)]
fn stored(s: f64) -> bf16 {
    saturating_bf16(s as f32)
}
