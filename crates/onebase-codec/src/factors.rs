use std::ops::Range;

use half::bf16;
use onebase_kernels::Backend;
use onebase_tensor::{DType, MatrixMut, MatrixRef, PartData, PartSpec, WeightRef, saturating_bf16};
use rayon::prelude::*;

use crate::numerics::Truncated;

/// A product of two thin matrices in 16 bits, `Δ ≈ u v`.
pub(crate) struct Factors {
    shape: [usize; 2],
    rank: usize,
    /// `[out_features, rank]`.
    u: Vec<bf16>,
    /// `[rank, in_features]`.
    v: Vec<bf16>,
}

/// Rows and input features that are decoded at a time: an element of `v` is
/// widened once for all the rows, and their sums stay in the first-level cache.
const TILE: [usize; 2] = [8, 256];

/// Rows of `u` that one task rounds: they stay in the first-level cache.
const TASK_ROWS: usize = 64;

impl Factors {
    /// Factors `[out_features, rank]` and `[rank, in_features]` of a matrix
    /// `[out_features, in_features]`.
    pub(crate) fn new(shape: [usize; 2], rank: usize, u: Vec<bf16>, v: Vec<bf16>) -> Self {
        debug_assert_eq!([u.len(), v.len()], [shape[0] * rank, rank * shape[1]]);
        Self { shape, rank, u, v }
    }

    /// A truncated decomposition, the root of each singular value on both sides:
    /// that keeps the factors alike in magnitude, and both far inside the range of
    /// bf16.
    pub(crate) fn from_svd(svd: &Truncated, shape: [usize; 2]) -> Self {
        let [n_rows, n_cols] = shape;
        let rank = svd.s.len();
        let roots: Vec<f64> = svd.s.iter().map(|s| s.sqrt()).collect();
        #[allow(clippy::cast_possible_truncation)]
        let round = |vector: f32, root: f64| saturating_bf16((f64::from(vector) * root) as f32);
        let mut u = vec![bf16::ZERO; n_rows * rank];
        let mut v = vec![bf16::ZERO; rank * n_cols];
        u.par_chunks_mut((TASK_ROWS * rank).max(1)).enumerate().for_each(|(task, u)| {
            for (r, root) in roots.iter().enumerate() {
                let column = &svd.u[r * n_rows + task * TASK_ROWS..];
                let places = u[r..].iter_mut().step_by(rank);
                places.zip(column).for_each(|(u, vector)| *u = round(*vector, *root));
            }
        });
        let rows = v.par_chunks_mut(n_cols.max(1)).zip(svd.v.par_chunks(n_cols.max(1)));
        rows.zip(&roots).for_each(|((v, row), root)| {
            v.iter_mut().zip(row).for_each(|(v, vector)| *v = round(*vector, *root));
        });
        Self { shape, rank, u, v }
    }

    /// What [`Factors::into_data`] gives for a matrix of this shape.
    pub(crate) fn parts([n_rows, n_cols]: [usize; 2], rank: usize) -> [PartSpec; 2] {
        [
            PartSpec::new("u", DType::BF16, [n_rows, rank]),
            PartSpec::new("v", DType::BF16, [rank, n_cols]),
        ]
    }

    /// The elements of `u` and `v`.
    pub(crate) fn into_data(self) -> [PartData; 2] {
        [PartData::BF16(self.u), PartData::BF16(self.v)]
    }

    /// `y += x Δᵀ`, as [`crate::DeltaLinear::add_to`].
    pub(crate) fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let n_rows = x.n_rows();
        let mut inner = vec![0.0; n_rows * self.rank];
        let Ok(mut inner) = MatrixMut::new(&mut inner, n_rows, self.rank) else {
            unreachable!("the buffer was sized for the product")
        };
        backend.add_dense(WeightRef::BF16(&self.v), x, &mut inner);
        backend.add_dense(WeightRef::BF16(&self.u), inner.as_ref(), y);
    }

    /// Decodes rows, as [`crate::DeltaLinear::write_rows`].
    pub(crate) fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let [_, n_cols] = self.shape;
        let u = |row: usize, r: usize| f64::from(self.u[row * self.rank + r].to_f32());
        let v = |r: usize, cols: Range<usize>, wide: &mut [f64]| {
            let row = &self.v[r * n_cols..(r + 1) * n_cols];
            wide.iter_mut().zip(&row[cols]).for_each(|(w, v)| *w = f64::from(v.to_f32()));
        };
        write_product(rows, out, [self.rank, n_cols], u, v);
    }

    /// Bytes of memory it holds.
    pub(crate) fn resident_bytes(&self) -> usize {
        (self.u.len() + self.v.len()) * size_of::<bf16>()
    }
}

/// Decodes rows of `u v` into `out`, `[rows.len(), n_cols]`: `u(row, r)` is an element
/// and `v(r, columns, out)` writes a piece of a row.
///
/// Sums in f64, where no sum of products of 16-bit numbers overflows, in ascending
/// order of the rank: the same weights on every processor.
pub(crate) fn write_product(
    rows: Range<usize>,
    out: &mut [f32],
    [rank, n_cols]: [usize; 2],
    u: impl Fn(usize, usize) -> f64,
    v: impl Fn(usize, Range<usize>, &mut [f64]),
) {
    if n_cols == 0 {
        return;
    }
    let max = f64::from(f32::MAX);
    let [tile_rows, tile_cols] = TILE;
    let mut sums = [[0.0; TILE[1]]; TILE[0]];
    let mut wide = [0.0; TILE[1]];
    for (first, out) in rows.step_by(tile_rows).zip(out.chunks_mut(tile_rows * n_cols)) {
        for from in (0..n_cols).step_by(tile_cols) {
            let cols = from..n_cols.min(from + tile_cols);
            sums.fill([0.0; TILE[1]]);
            for r in 0..rank {
                v(r, cols.clone(), &mut wide[..cols.len()]);
                for (row, sums) in (first..first + out.len() / n_cols).zip(&mut sums) {
                    let u = u(row, r);
                    for (sum, v) in sums.iter_mut().zip(&wide) {
                        *sum += u * v;
                    }
                }
            }
            for (out, sums) in out.chunks_mut(n_cols).zip(&sums) {
                #[allow(clippy::cast_possible_truncation)]
                for (out, sum) in out[cols.clone()].iter_mut().zip(sums) {
                    *out = sum.clamp(-max, max) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_any_finite_numbers_decode_to_finite_weights() {
        let (shape @ [n_rows, n_cols], rank) = ([20, 30], 12);
        let alternating = |n: usize| (0..n).map(|i| [bf16::MAX, bf16::MIN][i % 2]).collect();
        let u = vec![bf16::MAX; n_rows * rank];
        let factors = Factors::new(shape, rank, u, alternating(rank * n_cols));
        let mut out = vec![0.0; n_rows * n_cols];
        factors.write_rows(0..n_rows, &mut out);
        assert!(out.iter().all(|w| w.abs() == f32::MAX));
    }
}
