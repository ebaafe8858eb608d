//! Products of dense f64 matrices, computed by the crate `faer` on the
//! calling thread.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::{matmul, triangular};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::{Error, Result};

/// The product `a b` of row-major matrices `[m, k]` and `[k, n]`: `[m, n]`.
///
/// Panics when a length is not the product of its shape.
pub fn product(a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, k, n));
    multiply(a, b)
}

/// The product `a bᵀ` of row-major matrices `[m, k]` and `[n, k]`: `[m, n]`.
///
/// Panics when a length is not the product of its shape.
pub fn product_transposed(a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, n, k));
    multiply(a, b.transpose())
}

/// The product `aᵀ b` of row-major matrices `[n, k]` and `[n, m]`: `[k, m]`.
///
/// Panics when a length is not the product of its shape.
pub(crate) fn product_of_columns(a: &[f64], b: &[f64], [n, k, m]: [usize; 3]) -> Vec<f64> {
    let (a, b) = (MatRef::from_row_major_slice(a, n, k), MatRef::from_row_major_slice(b, n, m));
    multiply(a.transpose(), b)
}

/// The inverse of a symmetric matrix `[n, n]` without negative eigenvalues, with `ridge`
/// times the mean of its diagonal added to the diagonal, and more where that does not
/// make it positive definite to rounding.
///
/// # Errors
/// When an element is no finite number.
pub(crate) fn solve_positive(a: &[f64], n: usize, ridge: f64) -> Result<Vec<f64>> {
    const MOST: f64 = 1e3;
    if let Some(at) = a.iter().position(|x| !x.is_finite()) {
        return Err(Error::Overflow { row: at / n, column: at % n, got: a[at] });
    }
    #[allow(clippy::cast_precision_loss)]
    let mean = a.iter().step_by(n + 1).sum::<f64>() / n.max(1) as f64;
    if mean <= 0.0 {
        // The least solution of all.
        return Ok(vec![0.0; n * n]);
    }
    let mut ridge = ridge;
    while ridge < MOST {
        let mut damped = a.to_vec();
        damped.iter_mut().step_by(n + 1).for_each(|x| *x += ridge * mean);
        if let Some((inverse, _)) = inverse_of_cholesky(&damped, n) {
            return Ok(product_of_columns(&inverse, &inverse, [n; 3]));
        }
        ridge *= 10.0;
    }
    Err(Error::NotPositiveDefinite { n, damping: ridge })
}

/// The solution `x` of `A x = b` for such a matrix, as [`solve_positive`].
///
/// # Errors
/// As there.
pub(crate) fn solve_vector(a: &[f64], b: &[f64], ridge: f64) -> Result<Vec<f64>> {
    Ok(product(&solve_positive(a, b.len(), ridge)?, b, [b.len(), b.len(), 1]))
}

/// The Gram matrix of the shorter side of `a`, `[rows, cols]`, row-major: `A Aᵀ`
/// or, where there are fewer columns than rows, `Aᵀ A`; and its size. Its
/// eigenvalues are the squared singular values of `a`.
///
/// Panics when the length is not the product.
pub fn gram(a: &[f64], [n_rows, n_cols]: [usize; 2]) -> (Vec<f64>, usize) {
    let a = MatRef::from_row_major_slice(a, n_rows, n_cols);
    let n = n_rows.min(n_cols);
    (if n_rows <= n_cols { multiply(a, a.transpose()) } else { multiply(a.transpose(), a) }, n)
}

/// Adds `Aᵀ A` of `a`, `[rows, n]`, row-major, to `sum`, `[n, n]`: the Gram matrix of
/// the columns of a matrix that is read by blocks of rows.
///
/// Panics when a length is not the product of its shape.
pub(super) fn add_gram_of_columns(a: &[f64], [n_rows, n]: [usize; 2], sum: &mut [f64]) {
    let a = MatRef::from_row_major_slice(a, n_rows, n);
    let sum = MatMut::from_row_major_slice_mut(sum, n, n);
    matmul(sum, Accum::Add, a.transpose(), a, 1.0, Par::Seq);
}

/// [`add_gram_of_columns`], only what is not above the diagonal.
pub(super) fn add_half_gram_of_columns(a: &[f64], [n_rows, n]: [usize; 2], sum: &mut [f64]) {
    use triangular::BlockStructure::{Rectangular, TriangularLower};
    let a = MatRef::from_row_major_slice(a, n_rows, n);
    let sum = MatMut::from_row_major_slice_mut(sum, n, n);
    let (l, r) = (a.transpose(), a);
    let add = Accum::Add;
    triangular::matmul(sum, TriangularLower, add, l, Rectangular, r, Rectangular, 1.0, Par::Seq);
}

/// `L⁻¹`, `[n, n]`, of a positive definite matrix `L Lᵀ`, of which what is above the
/// diagonal is not read, and the largest diagonal element of `L` over the
/// smallest; `None` where a matrix is not positive definite to rounding.
pub(super) fn inverse_of_cholesky(a: &[f64], n: usize) -> Option<(Vec<f64>, f64)> {
    let mut l = Mat::from_fn(n, n, |i, j| a[i.max(j) * n + i.min(j)]);
    let scratch = cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    cholesky_in_place(l.as_mut(), Default::default(), Par::Seq, stack, Default::default()).ok()?;
    let diagonal = || (0..n).map(|i| l[(i, i)]);
    let condition = diagonal().fold(0.0, f64::max) / diagonal().fold(f64::INFINITY, f64::min);
    let mut inverse = Mat::zeros(n, n);
    invert_lower_triangular(inverse.as_mut(), l.as_ref(), Par::Seq);
    let rows = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
    let rows: Vec<f64> = rows.map(|at| if at.0 < at.1 { 0.0 } else { inverse[at] }).collect();
    rows.iter().all(|x| x.is_finite()).then_some((rows, condition))
}

fn multiply(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Vec<f64> {
    let mut out = vec![0.0; a.nrows() * b.ncols()];
    let target = MatMut::from_row_major_slice_mut(&mut out, a.nrows(), b.ncols());
    matmul(target, Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_gram_matrices_by_hand() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(product(&a, &[1.0, 0.0, -1.0], [2, 3, 1]), [-2.0, -2.0]);
        assert_eq!(product_transposed(&a, &[1.0, 0.0, -1.0], [2, 3, 1]), [-2.0, -2.0]);
        assert_eq!(gram(&a, [2, 3]), (vec![14.0, 32.0, 32.0, 77.0], 2));
        assert_eq!(gram(&a, [3, 2]), (vec![35.0, 44.0, 44.0, 56.0], 2));
        assert_eq!(gram(&[], [0, 3]), (vec![], 0));
        let mut sum = vec![0.0; 4];
        add_gram_of_columns(&a[..4], [2, 2], &mut sum);
        add_gram_of_columns(&a[4..], [1, 2], &mut sum);
        assert_eq!(sum, [35.0, 44.0, 44.0, 56.0]);
    }
}
