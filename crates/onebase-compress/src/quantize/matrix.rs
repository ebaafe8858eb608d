//! Products of f64 matrices on all threads, whose bits do not depend on the number of them.

use onebase_codec::numerics::product;
use rayon::prelude::*;

/// Rows of a product that a thread computes at a time.
const ROWS: usize = 128;

/// `a b` of `[m, k]` and `[k, n]`: `[m, n]`, row-major.
pub(super) fn times(a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    if out.is_empty() || k == 0 {
        return out;
    }
    out.par_chunks_mut(ROWS * n).zip(a.par_chunks(ROWS * k)).for_each(|(out, a)| {
        out.copy_from_slice(&product(a, b, [a.len() / k, k, n]));
    });
    out
}

/// The transpose of `a`, `[n, n]`.
pub(super) fn transposed(a: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    out.par_chunks_mut(n.max(1)).enumerate().for_each(|(j, row)| {
        for (i, to) in row.iter_mut().enumerate() {
            *to = a[i * n + j];
        }
    });
    out
}

#[allow(clippy::cast_possible_truncation)]
pub(super) fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

pub(super) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}
