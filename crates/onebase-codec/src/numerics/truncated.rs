//! Truncated singular value decompositions of matrices that are read by blocks of
//! rows.

use std::ops::Range;

use super::randomized::randomized_svd;
use super::{Eigen, add_gram_of_columns, gram, product, product_transposed, symmetric_eigen};
use crate::{DeltaSource, Result, read_wide};

/// The largest singular values and their vectors, none if there are none.
#[derive(Clone, Debug, PartialEq)]
pub struct Truncated {
    /// Left singular vectors, one a row: `[rank, out_features]`.
    pub u: Vec<f32>,
    /// Singular values, `[rank]`, the largest first.
    pub s: Vec<f64>,
    /// Right singular vectors, one a row: `[rank, in_features]`.
    pub v: Vec<f32>,
}

/// How a decomposition is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SvdMethod {
    /// From the eigenvectors of the Gram matrix of the shorter side, in f64.
    Full,
    /// By a random range finder with power iterations (N. Halko, P. Martinsson and J.
    /// Tropp, "Finding Structure with Randomness", SIAM Review 53(2), 2011, algorithms
    /// 4.4 and 5.1), its draws those of the seed.
    Randomized {
        /// The seed.
        seed: u64,
    },
}

/// Weights that are read at a time.
const BLOCK_WEIGHTS: usize = 1 << 20;

/// Directions past the rank that a random range has.
pub(super) const OVERSAMPLE: usize = 16;

/// The largest `rank` singular values of a delta `[out_features, in_features]` and
/// their vectors; the vector of a value of zero is zero.
///
/// A tall matrix is read by blocks; [`SvdMethod::Full`] holds one with fewer rows than
/// columns as a whole. The result does not depend on the number of threads.
///
/// Panics when the rank is above that of the shape.
///
/// # Errors
/// When the delta cannot be read, holds NaN or ∞, or the iteration does not converge.
pub fn truncated_svd(delta: &dyn DeltaSource, rank: usize, method: SvdMethod) -> Result<Truncated> {
    let [n_rows, n_cols] = delta.shape();
    assert!(rank <= n_rows.min(n_cols), "the rank of {n_rows}x{n_cols} is not {rank}");
    match method {
        // The range would be all there is.
        SvdMethod::Randomized { seed } if rank + OVERSAMPLE < n_rows.min(n_cols) => {
            randomized_svd(delta, rank, rank + OVERSAMPLE, seed)
        }
        _ if n_rows < n_cols => wide(&read_wide(delta, 0..n_rows)?, delta.shape(), rank),
        _ => tall(delta, rank),
    }
}

/// The Gram matrix of the shorter side of a delta, and its size: its eigenvalues
/// are the squared singular values. A tall delta is read by blocks; one with fewer rows
/// than columns is held as a whole.
///
/// # Errors
/// When the delta cannot be read or holds NaN or ∞.
pub fn gram_of_shorter_side(delta: &dyn DeltaSource) -> Result<(Vec<f64>, usize)> {
    let shape @ [n_rows, n_cols] = delta.shape();
    if n_rows < n_cols {
        return Ok(gram(&read_wide(delta, 0..n_rows)?, shape));
    }
    let mut sum = vec![0.0; n_cols * n_cols];
    for rows in blocks(shape) {
        let block = read_wide(delta, rows.clone())?;
        add_gram_of_columns(&block, [rows.len(), n_cols], &mut sum);
    }
    Ok((sum, n_cols))
}

/// Of a matrix with fewer rows than columns.
fn wide(delta: &[f64], shape @ [n_rows, n_cols]: [usize; 2], rank: usize) -> Result<Truncated> {
    let (gram, n) = gram(delta, shape);
    let Eigen { values, vectors } = symmetric_eigen(&gram, n)?;
    let s = roots(&values[..rank]);
    let left = &vectors[..rank * n_rows];
    let right = product(left, delta, [rank, n_rows, n_cols]);
    let u = left.iter().enumerate().map(|(i, u)| if s[i / n_rows] > 0.0 { *u } else { 0.0 });
    Ok(Truncated { u: narrow(u), v: over(&right, &s, n_cols), s })
}

/// Of a matrix with at least as many rows as columns, which is read twice.
fn tall(delta: &dyn DeltaSource, rank: usize) -> Result<Truncated> {
    let [n_rows, n_cols] = delta.shape();
    let (gram, n) = gram_of_shorter_side(delta)?;
    let Eigen { values, vectors } = symmetric_eigen(&gram, n)?;
    let s = roots(&values[..rank]);
    let right = &vectors[..rank * n_cols];
    let mut u = vec![0.0; rank * n_rows];
    for rows in blocks(delta.shape()) {
        let block = read_wide(delta, rows.clone())?;
        let left = product_transposed(right, &block, [rank, n_cols, rows.len()]);
        let left = over(&left, &s, rows.len());
        for (all, of_block) in u.chunks_mut(n_rows.max(1)).zip(left.chunks(rows.len())) {
            all[rows.clone()].copy_from_slice(of_block);
        }
    }
    let v = right.iter().enumerate().map(|(i, v)| if s[i / n_cols] > 0.0 { *v } else { 0.0 });
    Ok(Truncated { u, v: narrow(v), s })
}

/// Runs of rows that are read together.
fn blocks([n_rows, n_cols]: [usize; 2]) -> impl Iterator<Item = Range<usize>> {
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    (0..n_rows).step_by(block_rows).map(move |first| first..n_rows.min(first + block_rows))
}

/// Singular values from their squares, which rounding may make negative.
pub(super) fn roots(squares: &[f64]) -> Vec<f64> {
    squares.iter().map(|square| square.max(0.0).sqrt()).collect()
}

/// Rows of length `n`, each over its value, or zero where that is zero.
fn over(rows: &[f64], s: &[f64], n: usize) -> Vec<f32> {
    narrow(rows.iter().enumerate().map(|(i, x)| if s[i / n] > 0.0 { x / s[i / n] } else { 0.0 }))
}

fn narrow(values: impl Iterator<Item = f64>) -> Vec<f32> {
    #[allow(clippy::cast_possible_truncation)]
    values.map(|v| v as f32).collect()
}

#[cfg(test)]
mod tests {
    use onebase_tensor::{MatrixRef, stream};
    use rand_distr::{Distribution, StandardNormal};

    use super::*;

    const METHODS: [SvdMethod; 2] = [SvdMethod::Full, SvdMethod::Randomized { seed: 1 }];

    fn gaussian(label: &str, n: usize) -> Vec<f32> {
        let mut rng = stream(9, label, 0);
        (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
    }

    /// `Σ k^-power` times random rank-one matrices: singular values fall like a power.
    fn falling(shape @ [n_rows, n_cols]: [usize; 2], power: f32) -> Vec<f32> {
        let mut out = vec![0.0; n_rows * n_cols];
        for i in 0..n_rows.min(n_cols) {
            let (u, v) = (gaussian(&format!("u{i}"), n_rows), gaussian(&format!("v{i}"), n_cols));
            #[allow(clippy::cast_precision_loss)]
            let s = ((i + 1) as f32).powf(-power);
            for (row, u) in out.chunks_mut(shape[1]).zip(&u) {
                row.iter_mut().zip(&v).for_each(|(o, v)| *o += s * u * v);
            }
        }
        out
    }

    /// The Gram matrix of vectors `[k, n]`, and `k`.
    fn sum_of_products(vectors: &[f32], k: usize, n: usize) -> (Vec<f64>, usize) {
        let wide: Vec<f64> = vectors.iter().map(|v| f64::from(*v)).collect();
        (product_transposed(&wide, &wide, [k, n, k]), k)
    }

    fn lost(data: &[f32], [n_rows, n_cols]: [usize; 2], svd: &Truncated) -> f64 {
        let mut lost: Vec<f64> = data.iter().map(|v| f64::from(*v)).collect();
        for (r, s) in svd.s.iter().enumerate() {
            for (row, lost) in lost.chunks_mut(n_cols).enumerate() {
                let u = s * f64::from(svd.u[r * n_rows + row]);
                let v = &svd.v[r * n_cols..(r + 1) * n_cols];
                lost.iter_mut().zip(v).for_each(|(l, v)| *l -= u * f64::from(*v));
            }
        }
        lost.iter().map(|l| l * l).sum()
    }

    #[test]
    fn what_is_lost_is_little_more_than_the_least() {
        for shape @ [n_rows, n_cols] in [[90, 200], [200, 90], [160, 160]] {
            for power in [0.0, 0.5, 1.5] {
                let data = falling(shape, power);
                let source = MatrixRef::new(&data, n_rows, n_cols).unwrap();
                let wide: Vec<f64> = data.iter().map(|v| f64::from(*v)).collect();
                let (gram, n) = gram(&wide, shape);
                let squares = symmetric_eigen(&gram, n).unwrap().values;
                for rank in [1, 7, 40] {
                    let least: f64 = squares[rank..].iter().sum();
                    for (method, slack) in METHODS.into_iter().zip([1e-6, 0.02]) {
                        let svd = truncated_svd(&source, rank, method).unwrap();
                        let got = lost(&data, shape, &svd) - least;
                        let bound = slack * least + 1e-6 * squares[0];
                        assert!(got.abs() <= bound, "{shape:?} {power} {rank} {method:?}: {got}");
                        assert!(svd.s.is_sorted_by(|a, b| a >= b));
                    }
                }
            }
        }
    }

    #[test]
    fn vectors_are_orthonormal() {
        let shape @ [n_rows, n_cols] = [300, 120];
        let data = falling(shape, 1.0);
        let source = MatrixRef::new(&data, n_rows, n_cols).unwrap();
        for method in METHODS {
            let svd = truncated_svd(&source, 30, method).unwrap();
            for (vectors, n) in [(&svd.u, n_rows), (&svd.v, n_cols)] {
                let (gram, k) = sum_of_products(vectors, 30, n);
                for (i, value) in gram.iter().enumerate() {
                    let expected = if i % (k + 1) == 0 { 1.0 } else { 0.0 };
                    assert!((value - expected).abs() < 1e-5, "{method:?}: {value}");
                }
            }
        }
    }

    #[test]
    fn a_seed_and_any_number_of_threads_give_the_same_bits() {
        let shape @ [n_rows, n_cols] = [700, 500];
        let data = falling(shape, 0.5);
        let on = |threads, seed| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let source = MatrixRef::new(&data, n_rows, n_cols).unwrap();
            pool.install(|| truncated_svd(&source, 20, SvdMethod::Randomized { seed }).unwrap())
        };
        assert!(on(1, 0) == on(5, 0));
        assert!(on(1, 0) != on(1, 1));
    }

    #[test]
    fn zero_and_low_rank_have_zero_vectors() {
        let shape @ [n_rows, n_cols] = [100, 60];
        for method in METHODS {
            let source = vec![0.0; n_rows * n_cols];
            let source = MatrixRef::new(&source, n_rows, n_cols).unwrap();
            let svd = truncated_svd(&source, 5, method).unwrap();
            let zero = |values: &[f32]| values.iter().all(|v| *v == 0.0);
            assert!(svd.s == [0.0; 5] && zero(&svd.u) && zero(&svd.v), "{method:?}");

            let mut data = vec![0.0; n_rows * n_cols];
            data[3 * n_cols + 4] = 2.0;
            let source = MatrixRef::new(&data, n_rows, n_cols).unwrap();
            let svd = truncated_svd(&source, 5, method).unwrap();
            assert!((svd.s[0] - 2.0).abs() < 1e-6, "{method:?}: {:?}", svd.s);
            assert!(lost(&data, shape, &svd) < 1e-9, "{method:?}");
        }
    }
}
