//! Eigenvalues and eigenvectors of symmetric matrices, computed by the crate
//! `faer`.
//!
//! Everything runs on the calling thread, so that a result does not depend on
//! the number of threads. It does depend on the processor: `faer` orders its sums
//! by the instruction set and by the sizes of the caches, so results of two kinds
//! of processor differ by rounding.

use std::borrow::Cow;

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef, Par};

use crate::{Error, Result};

/// A decomposition `A = Vᵀ diag(values) V` of a symmetric matrix `[n, n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Eigen {
    /// The eigenvalues, `[n]`, the largest first.
    pub values: Vec<f64>,
    /// The eigenvectors, one a row in the order of the values, orthonormal: `[n, n]`.
    pub vectors: Vec<f64>,
}

/// Eigenvalues and eigenvectors of a symmetric matrix `a`, `[n, n]`.
///
/// An eigenvector is determined up to its sign: here its entry of largest
/// magnitude, the first of several, is positive. What is above the diagonal is not
/// read.
///
/// Panics when the length is not `n · n`.
///
/// # Errors
/// When an element is NaN or ∞, and when the iteration does not converge.
pub fn symmetric_eigen(a: &[f64], n: usize) -> Result<Eigen> {
    let mut vectors = Mat::zeros(n, n);
    let values = decompose(a, n, Some(&mut vectors))?;
    let rows = (0..n).rev().flat_map(|j| {
        let column = vectors.col_as_slice(j);
        let largest = |l: f64, x: &f64| if x.abs() > l.abs() { *x } else { l };
        let sign = column.iter().fold(0.0, largest).signum();
        column.iter().map(move |x| sign * x)
    });
    Ok(Eigen { values, vectors: rows.collect() })
}

/// The eigenvalues of a symmetric matrix `a`, `[n, n]`, the largest first: `[n]`.
///
/// What is above the diagonal is not read.
///
/// Panics when the length is not `n · n`.
///
/// # Errors
/// When an element is NaN or ∞, and when the iteration does not converge.
pub fn symmetric_eigenvalues(a: &[f64], n: usize) -> Result<Vec<f64>> {
    decompose(a, n, None)
}

/// The eigenvalues, the largest first, and the eigenvectors as columns, the
/// smallest value's first.
fn decompose(a: &[f64], n: usize, mut vectors: Option<&mut Mat<f64>>) -> Result<Vec<f64>> {
    let (a, scale) = moderate(a, n)?;
    if scale == 0.0 {
        // Any orthonormal vectors do; those of the identity are exact.
        if let Some(vectors) = &mut vectors {
            **vectors = Mat::identity(n, n);
        }
        return Ok(vec![0.0; n]);
    }
    let what = if vectors.is_some() { ComputeEigenvectors::Yes } else { ComputeEigenvectors::No };
    let mut values = Diag::zeros(n);
    let scratch = self_adjoint_evd_scratch::<f64>(n, what, Par::Seq, Default::default());
    self_adjoint_evd(
        MatRef::from_row_major_slice(&a, n, n),
        values.as_mut(),
        vectors.map(Mat::as_mut),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| Error::NoConvergence { decomposition: "eigenvalues", shape: [n, n] })?;
    Ok(values.column_vector().iter().rev().map(|value| value * scale).collect())
}

/// Magnitudes whose squares and products neither overflow nor underflow.
const MODERATE: std::ops::Range<f64> = 1e-100..1e100;

/// The matrix `[n, n]` divided by a power of two, which is exact, where its largest
/// magnitude is far from 1, and that power; 0 when the matrix is zero or empty.
fn moderate(a: &[f64], n: usize) -> Result<(Cow<'_, [f64]>, f64)> {
    assert_eq!(Some(a.len()), n.checked_mul(n), "elements of the matrix");
    if let Some(at) = a.iter().position(|x| !x.is_finite()) {
        #[allow(clippy::cast_possible_truncation)]
        let got = a[at] as f32;
        return Err(Error::NotFinite { row: at / n, column: at % n, got });
    }
    let largest = a.iter().fold(0.0, |l: f64, x| l.max(x.abs()));
    if largest == 0.0 {
        return Ok((a.into(), 0.0));
    }
    if MODERATE.contains(&largest) {
        return Ok((a.into(), 1.0));
    }
    // The exponent without the fraction; subnormal numbers have none.
    let power = f64::from_bits(largest.to_bits() & f64::INFINITY.to_bits()).max(f64::MIN_POSITIVE);
    Ok((a.iter().map(|x| x / power).collect(), power))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics::{gram, product};
    use onebase_tensor::stream;
    use rand_distr::{Distribution, StandardNormal};

    const SHAPES: [[usize; 2]; 6] = [[1, 1], [1, 9], [12, 12], [30, 17], [150, 140], [130, 400]];

    fn gaussian(label: &str, n: usize) -> Vec<f64> {
        let mut rng = stream(5, label, 0);
        (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).fold(0.0, |d, (a, b)| d.max((a - b).abs()))
    }

    fn identity(n: usize) -> Vec<f64> {
        (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect()
    }

    fn transposed(a: &[f64], n: usize) -> Vec<f64> {
        (0..n * n).map(|i| a[i % n * n + i / n]).collect()
    }

    /// Checks everything that a decomposition promises, to rounding of the
    /// largest eigenvalue.
    fn check(a: &[f64], n: usize) -> Eigen {
        let eigen = symmetric_eigen(a, n).unwrap();
        let Eigen { values, vectors } = &eigen;
        assert_eq!([values.len(), vectors.len()], [n, n * n]);
        assert!(values.is_sorted_by(|a, b| a >= b));
        let scale = a.iter().fold(1e-300, |m: f64, x| m.max(x.abs()));
        #[allow(clippy::cast_precision_loss)]
        let bound = 1e-14 * n as f64;
        assert!(distance(values, &symmetric_eigenvalues(a, n).unwrap()) <= bound * scale);
        let columns = transposed(vectors, n);
        assert!(distance(&product(vectors, &columns, [n, n, n]), &identity(n)) < bound);
        let scaled: Vec<f64> = vectors.iter().zip(0..).map(|(v, i)| v * values[i / n]).collect();
        let error = distance(&product(&columns, &scaled, [n, n, n]), a);
        assert!(error <= bound * scale, "{n}: {error:e}");
        for vector in vectors.chunks(n.max(1)) {
            let largest = |l: f64, x: &f64| if x.abs() > l.abs() { *x } else { l };
            assert!(vector.iter().fold(0.0, largest) > 0.0);
        }
        eigen
    }

    #[test]
    fn vectors_are_orthonormal_and_rebuild_the_matrix() {
        for shape in SHAPES {
            let (a, n) = gram(&gaussian("a", shape[0] * shape[1]), shape);
            check(&a, n);
        }
        for n in [1, 7, 200] {
            assert_eq!(check(&identity(n), n).values, vec![1.0; n]);
            check(&vec![2.5; n * n], n);
            check(&vec![0.0; n * n], n);
        }
    }

    #[test]
    fn known_values_come_out() {
        // The second difference: 2 − 2 cos(π j / (n + 1)).
        for n in [1, 2, 3, 40, 300] {
            let second = |i: usize| match (i / n).abs_diff(i % n) {
                0 => 2.0,
                1 => -1.0,
                _ => 0.0,
            };
            let a: Vec<f64> = (0..n * n).map(second).collect();
            #[allow(clippy::cast_precision_loss)]
            let angle = |j: usize| std::f64::consts::PI * j as f64 / (n + 1) as f64;
            let want: Vec<f64> = (1..=n).rev().map(|j| 2.0 - 2.0 * angle(j).cos()).collect();
            assert!(distance(&check(&a, n).values, &want) < 1e-13, "{n}");
        }
        let indefinite = symmetric_eigenvalues(&[1.0, f64::MAX, 2.0, 1.0], 2).unwrap();
        assert!(distance(&indefinite, &[3.0, -1.0]) < 1e-15);
        assert_eq!(symmetric_eigenvalues(&[], 0).unwrap(), [0.0; 0]);
        assert_eq!(symmetric_eigen(&[], 0).unwrap().vectors, [0.0; 0]);
    }

    #[test]
    fn the_same_matrix_gives_the_same_bits() {
        let (a, n) = gram(&gaussian("a", 300 * 200), [300, 200]);
        let first = symmetric_eigen(&a, n).unwrap();
        let others = std::thread::scope(|scope| {
            let run = || scope.spawn(|| symmetric_eigen(&a, n).unwrap());
            [run(), run(), run()].map(|thread| thread.join().unwrap())
        });
        assert!(others.iter().all(|other| *other == first));
    }

    #[test]
    fn magnitudes_far_from_one_change_nothing_but_the_scale() {
        let (a, n) = gram(&gaussian("a", 40 * 30), [40, 30]);
        let want = symmetric_eigen(&a, n).unwrap();
        for exponent in [-1000, -140, 140, 1000] {
            let power = 2f64.powi(exponent);
            let scaled: Vec<f64> = a.iter().map(|x| x * power).collect();
            let got = symmetric_eigen(&scaled, n).unwrap();
            let values: Vec<f64> = got.values.iter().map(|x| x / power).collect();
            assert!(distance(&values, &want.values) < 1e-12, "{exponent}");
            assert!(distance(&got.vectors, &want.vectors) < 1e-11, "{exponent}");
        }
        let least = f64::from_bits(1);
        assert_eq!(symmetric_eigenvalues(&[least, 0.0, 0.0, least], 2).unwrap(), [least; 2]);
    }

    #[test]
    fn nan_and_infinity_are_refused_where_they_are() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let got = symmetric_eigen(&[1.0, 0.0, bad, 1.0], 2).unwrap_err();
            assert!(matches!(got, Error::NotFinite { row: 1, column: 0, .. }), "{got}");
        }
    }
}
