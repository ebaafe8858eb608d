use rayon::prelude::*;

use crate::source::{BLOCK_WEIGHTS, read_finite};
use crate::{DeltaSource, Result};

/// Partial sums of an inner product: enough that the compiler keeps them in registers.
const LANES: usize = 16;

/// Inner products `⟨D_i, D_j⟩` of the deltas of `n` models, `[n, n]`, symmetric.
#[derive(Clone, Debug, PartialEq)]
pub struct Gram {
    n: usize,
    values: Vec<f64>,
}

impl Gram {
    /// That of `n` deltas without weights.
    pub fn zeros(n: usize) -> Self {
        Self { n, values: vec![0.0; n * n] }
    }

    /// Reads deltas of one shape once, in blocks of rows, and multiplies each by each.
    /// The result does not depend on the number of threads.
    ///
    /// # Errors
    /// When one cannot be read or holds NaN or ∞; then its position comes with the error.
    pub fn of(deltas: &[&dyn DeltaSource]) -> Result<Self, (usize, crate::Error)> {
        let n = deltas.len();
        let mut sum = Self::zeros(n);
        let Some([n_rows, n_cols]) = deltas.first().map(|delta| delta.shape()) else {
            return Ok(sum);
        };
        let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
        let blocks: Vec<Self> = (0..n_rows.div_ceil(block_rows))
            .into_par_iter()
            .map(|block| {
                let rows = block * block_rows..n_rows.min((block + 1) * block_rows);
                let read = |(i, delta): (usize, &&dyn DeltaSource)| {
                    read_finite(*delta, rows.clone()).map_err(|error| (i, error))
                };
                let rows = deltas.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
                Ok(Self::of_rows(&rows, &vec![1.0; n]))
            })
            .collect::<Result<_, _>>()?;
        // In the order of the rows.
        blocks.iter().for_each(|block| sum.add(block));
        Ok(sum)
    }

    /// That of rows at hand, each model's times its factor.
    pub(super) fn of_rows(rows: &[impl AsRef<[f32]>], factors: &[f64]) -> Self {
        let mut gram = Self::zeros(rows.len());
        for i in 0..gram.n {
            for j in 0..=i {
                let value = factors[i] * factors[j] * dot(rows[i].as_ref(), rows[j].as_ref());
                gram.values[i * gram.n + j] = value;
                gram.values[j * gram.n + i] = value;
            }
        }
        gram
    }

    /// Models.
    pub fn n(&self) -> usize {
        self.n
    }

    /// `⟨D_i, D_j⟩`.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.n + j]
    }

    /// The elements, `[n, n]`.
    pub(super) fn values(&self) -> &[f64] {
        &self.values
    }

    /// Adds that of other weights of the same models.
    pub fn add(&mut self, other: &Self) {
        self.values.iter_mut().zip(&other.values).for_each(|(sum, value)| *sum += value);
    }

    /// `⟨s_i D_i, s_j D_j⟩`.
    pub fn scaled(&self, factors: &[f64]) -> Self {
        let at =
            |index: usize| factors[index / self.n] * factors[index % self.n] * self.values[index];
        Self { n: self.n, values: (0..self.values.len()).map(at).collect() }
    }

    /// That of some of the models, by their positions.
    pub fn of_members(&self, members: &[usize]) -> Self {
        let rows = members.iter();
        let values = rows.flat_map(|i| members.iter().map(|j| self.at(*i, *j))).collect();
        Self { n: members.len(), values }
    }

    /// `a · u uᵀ` taken off.
    pub(super) fn less_outer(&self, a: f64, u: &[f64]) -> Self {
        let at = |index: usize| self.values[index] - a * u[index / self.n] * u[index % self.n];
        Self { n: self.n, values: (0..self.values.len()).map(at).collect() }
    }

    /// The sum of the squared norms.
    pub fn trace(&self) -> f64 {
        (0..self.n).map(|i| self.at(i, i)).sum()
    }

    /// The cosine of two deltas; 0 where one is zero.
    pub fn cosine(&self, i: usize, j: usize) -> f64 {
        let norms = (self.at(i, i) * self.at(j, j)).sqrt();
        if norms > 0.0 { self.at(i, j) / norms } else { 0.0 }
    }
}

/// `⟨a, b⟩`, summed in f64.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    let rest: f64 = rest.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    for (a, b) in a.zip(b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f64::from(*a) * f64::from(*b);
        }
    }
    lanes.iter().sum::<f64>() + rest
}
