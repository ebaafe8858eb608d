//! Truncated singular value decompositions by a random range finder.

use std::ops::Range;

use onebase_kernels::Backend;
use onebase_kernels::thin::{GROUP, Thin, chunk_len, pack_rows};
use onebase_tensor::stream;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use super::truncated::{Truncated, roots};
use super::{
    Eigen, add_half_gram_of_columns, inverse_of_cholesky, product, product_transposed,
    symmetric_eigen,
};
use crate::source::check_finite;
use crate::{DeltaSource, Error, Result};

/// Power iterations. What one bit leaves of a delta is nearly flat, so that the range
/// must be sharpened.
const POWER_ITERATIONS: usize = 2;

/// Weights that are read before both products with them are taken.
const BLOCK_WEIGHTS: usize = 1 << 20;

/// Groups of rows that a block has at least; it has one for each thread too, which
/// changes no sum.
pub(super) const BLOCK_GROUPS: usize = 4;

/// Weights that a task reads at a time: they stay in its second-level cache.
const READ_WEIGHTS: usize = 1 << 16;

/// Groups of rows whose Gram matrix one task computes; sums over them are taken in the
/// order of the tasks.
const TASK_GROUPS: usize = 16;

/// Tasks whose matrices are held before they are summed.
const TASKS_AT_A_TIME: usize = 16;

/// Up to which condition of vectors that both products made, without an orthonormal
/// basis in between, they are as good as with one: what rounding adds to the least of
/// them stays small beside it.
const GENTLE: f64 = 1e4;

/// The same where the products between are those that the result is made of.
const GENTLE_AT_LAST: f64 = 1e3;

/// Squared lengths of vectors whose elements, and those of the vectors that they were
/// made of, are far inside the range of f32.
const MODERATE: Range<f64> = 1e-40..1e60;

/// [`super::truncated_svd`] with a random range of `k` directions.
///
/// Each power iteration is one pass over the delta: both products with a block of rows
/// are taken when it is read. In exact arithmetic an orthonormal basis between the two
/// would not change their span; where rounding makes it matter, there is one.
pub(super) fn randomized_svd(
    delta: &dyn DeltaSource,
    rank: usize,
    k: usize,
    seed: u64,
) -> Result<Truncated> {
    let [n_rows, n_cols] = delta.shape();
    let mut right = random(n_cols, k, seed);
    let mut left = Thin::zeros(n_rows, k);
    let mut condition = 1.0;
    for _ in 0..POWER_ITERATIONS {
        if condition <= GENTLE {
            let mut next = Thin::zeros(n_cols, k);
            sweep(delta, Some(&right), &mut left, Some(&mut next))?;
            condition = orthonormalise(&mut next)?;
            if condition <= GENTLE {
                right = next;
                continue;
            }
        }
        sweep(delta, Some(&right), &mut left, None)?;
        orthonormalise(&mut left)?;
        right = Thin::zeros(n_cols, k);
        sweep(delta, None, &mut left, Some(&mut right))?;
        orthonormalise(&mut right)?;
    }
    let mut projected = Thin::zeros(n_cols, k);
    if condition <= GENTLE_AT_LAST {
        sweep(delta, Some(&right), &mut left, Some(&mut projected))?;
    } else {
        sweep(delta, Some(&right), &mut left, None)?;
        // Twice is enough for orthogonality to rounding.
        orthonormalise(&mut left)?;
        orthonormalise(&mut left)?;
        sweep(delta, None, &mut left, Some(&mut projected))?;
    }
    // With `left = Q N⁻ᵀ`, what `Q` projects to is `N projectedᵀ`.
    let (n, _) = normaliser(&gram_of(&left), k)?;
    let gram = product_transposed(&product(&n, &gram_of(&projected), [k; 3]), &n, [k; 3]);
    let Eigen { values, vectors } = symmetric_eigen(&gram, k)?;
    let s = roots(&values[..rank]);
    let to_u = product(&vectors[..rank * k], &n, [rank, k, k]);
    let vector_of = |s: &f64| if *s > 0.0 { 1.0 } else { 0.0 };
    let inverse = |s: &f64| if *s > 0.0 { s.recip() } else { 0.0 };
    let u = combine(&left, &to_u, s.iter().map(vector_of)).to_columns(rank);
    let v = combine(&projected, &to_u, s.iter().map(inverse)).to_columns(rank);
    Ok(Truncated { u, s, v })
}

/// `Δ X` of a thin matrix `[in_features, k]`: `[out_features, k]`.
///
/// # Errors
/// When the delta cannot be read or holds NaN or ∞.
pub(crate) fn times(delta: &dyn DeltaSource, x: &Thin) -> Result<Thin> {
    let mut out = Thin::zeros(delta.shape()[0], x.n_cols());
    sweep(delta, Some(x), &mut out, None)?;
    Ok(out)
}

/// `Δᵀ X` of a thin matrix `[out_features, k]`: `[in_features, k]`.
///
/// # Errors
/// As [`times`].
pub(crate) fn transposed_times(delta: &dyn DeltaSource, mut x: Thin) -> Result<Thin> {
    let mut out = Thin::zeros(delta.shape()[1], x.n_cols());
    sweep(delta, None, &mut x, Some(&mut out))?;
    Ok(out)
}

/// One pass over the delta `Δ`: `left = Δ right` where `right` is given, then
/// `next += Δᵀ left` where `next` is.
fn sweep(
    delta: &dyn DeltaSource,
    right: Option<&Thin>,
    left: &mut Thin,
    mut next: Option<&mut Thin>,
) -> Result<()> {
    let [n_rows, n_cols] = delta.shape();
    let k = left.n_cols();
    let backend = Backend::fastest();
    let len = chunk_len(n_cols);
    let at_least = BLOCK_GROUPS.max(rayon::current_num_threads());
    let n_chunks = (BLOCK_WEIGHTS / len).max(at_least).min(left.n_groups());
    let mut block = vec![0.0; n_chunks * len];
    for first in (0..left.n_groups()).step_by(n_chunks) {
        let chunks = block.par_chunks_mut(len).zip(left.par_groups_mut(first)).enumerate();
        chunks.try_for_each_init(Vec::new, |buffer, (index, (chunk, group))| {
            let row = (first + index) * GROUP;
            read_chunk(delta, row..n_rows.min(row + GROUP), buffer, chunk)?;
            if let Some(right) = right {
                group.fill(0.0);
                backend.add_chunk_product(chunk, right, group);
            }
            Ok::<(), Error>(())
        })?;
        if let Some(next) = &mut next {
            next.par_groups_mut(0).enumerate().for_each(|(index, sum)| {
                for (chunk, group) in block.chunks(len).zip(left.groups(first)) {
                    backend.add_chunk_transposed(chunk, index, group, k, sum);
                }
            });
        }
    }
    Ok(())
}

/// Reads rows of a delta into a chunk; the chunk's other rows become zero.
fn read_chunk(
    delta: &dyn DeltaSource,
    rows: Range<usize>,
    buffer: &mut Vec<f32>,
    chunk: &mut [f32],
) -> Result<()> {
    let n_cols = delta.shape()[1];
    if rows.len() < GROUP {
        chunk.fill(0.0);
    }
    let step = (READ_WEIGHTS / n_cols).clamp(1, GROUP);
    for first in rows.clone().step_by(step) {
        let piece = first..rows.end.min(first + step);
        buffer.resize(piece.len() * n_cols, 0.0);
        delta.read_rows(piece, buffer)?;
        check_finite(buffer, first, n_cols)?;
        pack_rows(buffer, n_cols, first - rows.start, chunk);
    }
    Ok(())
}

/// `[n, k]` of standard normal draws.
fn random(n: usize, k: usize, seed: u64) -> Thin {
    let mut columns = vec![0.0; k * n];
    columns.par_chunks_mut(n).enumerate().for_each(|(i, column)| {
        let mut rng = stream(seed, "range finder", i as u64);
        column.iter_mut().for_each(|x| *x = StandardNormal.sample(&mut rng));
    });
    Thin::from_columns(&columns, n, k)
}

/// The Gram matrix `[k, k]` of the columns of vectors `[n, k]`, in f64.
fn gram_of(vectors: &Thin) -> Vec<f64> {
    let k = vectors.n_cols();
    let mut sum = vec![0.0; k * k];
    let starts: Vec<usize> = (0..vectors.n_groups()).step_by(TASK_GROUPS).collect();
    for starts in starts.chunks(TASKS_AT_A_TIME) {
        let sums: Vec<Vec<f64>> = starts
            .par_iter()
            .map(|first| {
                let mut wide = Vec::new();
                for group in *first..vectors.n_groups().min(first + TASK_GROUPS) {
                    vectors.widen_group(group, &mut wide);
                }
                let mut sum = vec![0.0; k * k];
                add_half_gram_of_columns(&wide, [wide.len() / k, k], &mut sum);
                sum
            })
            .collect();
        for task in sums {
            sum.iter_mut().zip(task).for_each(|(sum, value)| *sum += value);
        }
    }
    for i in 0..k {
        for j in 0..i {
            sum[j * k + i] = sum[i * k + j];
        }
    }
    sum
}

/// A matrix `N`, `[k, k]`, that makes vectors of a Gram matrix orthonormal, `V Nᵀ`, and
/// about what their condition is: ∞ where it is not small. A direction that they
/// lack, to rounding, becomes zero.
fn normaliser(gram: &[f64], k: usize) -> Result<(Vec<f64>, f64)> {
    let squares = gram.iter().step_by(k + 1);
    let moderate = squares.clone().all(|square| MODERATE.contains(square));
    if let Some((inverse, condition)) = inverse_of_cholesky(gram, k).filter(|_| moderate)
        && condition <= GENTLE
    {
        return Ok((inverse, condition));
    }
    if !gram.iter().all(|value| value.is_finite()) {
        // Too large for vectors that both products made; what makes them one by one
        // will see.
        return Ok((vec![0.0; k * k], f64::INFINITY));
    }
    let Eigen { values, mut vectors } = symmetric_eigen(gram, k)?;
    let floor = values.first().copied().unwrap_or(0.0) * f64::from(f32::EPSILON).powi(2);
    for (vector, value) in vectors.chunks_mut(k).zip(&values) {
        let inverse = if *value > floor { value.sqrt().recip() } else { 0.0 };
        vector.iter_mut().for_each(|x| *x *= inverse);
    }
    Ok((vectors, f64::INFINITY))
}

/// Makes vectors `[n, k]` orthonormal, the span kept; what [`normaliser`] says of them.
fn orthonormalise(vectors: &mut Thin) -> Result<f64> {
    let (n, condition) = normaliser(&gram_of(vectors), vectors.n_cols())?;
    *vectors = combine(vectors, &n, std::iter::repeat(1.0));
    Ok(condition)
}

/// `V (diag(scale) A)ᵀ` of vectors `V`, `[n, k]`, and `A`, `[m, k]`: `[n, m]`.
fn combine(vectors: &Thin, a: &[f64], scale: impl Iterator<Item = f64>) -> Thin {
    let k = vectors.n_cols();
    let rows = a.chunks(k).zip(scale);
    #[allow(clippy::cast_possible_truncation)]
    let columns: Vec<f32> =
        rows.flat_map(|(row, scale)| row.iter().map(move |x| (scale * x) as f32)).collect();
    let a = Thin::from_columns(&columns, k, columns.len() / k);
    Backend::fastest().thin_product(vectors, &a)
}
