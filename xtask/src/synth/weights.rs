//! The numbers: one tensor of the base and of the fine-tunes, row by row.

use half::bf16;
use onebase_tensor::stream;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use super::Options;
use super::shape::{Role, TensorSpec};

/// Share of a delta's energy in its low-rank part.
const LOW_RANK_ENERGY: f64 = 0.5;
/// The delta of a vector relative to that of a matrix. Norms are near one, where bf16 rounds most
/// of a matrix's delta away; here some elements of every vector must differ.
const VECTOR_DELTA: f64 = 4.0;
/// Ranks that are added in one pass over a row.
const RANKS_PER_PASS: usize = 4;

/// The rows of one tensor in all models.
///
/// The base is Gaussian. A delta is Gaussian noise plus, in a matrix, the product of two
/// Gaussian factors, scaled to the mean absolute value that was asked for. Fine-tunes have noise
/// of their own and the product in common.
pub(super) struct RowPairs<'a> {
    seed: u64,
    name: &'a str,
    n_rows: usize,
    n_cols: usize,
    base_mean: f32,
    base_std: f32,
    noise_std: f32,
    /// The rank, rounded up to whole passes with zeros.
    padded_rank: usize,
    /// `[n_rows, padded_rank]`, scaled.
    left: Vec<f32>,
    /// `[padded_rank, n_cols]`, of unit variance.
    right: Vec<f32>,
}

/// Room for a row of the base and a row of the delta.
pub(super) struct Scratch {
    base: Vec<f32>,
    delta: Vec<f32>,
}

impl<'a> RowPairs<'a> {
    /// Draws the factors of the delta.
    pub(super) fn new(tensor: &'a TensorSpec, options: &Options) -> Self {
        let mean_abs = f64::from(options.mean_abs_delta);
        let (n_rows, n_cols, rank, mean_abs) = match tensor.shape[..] {
            [n_rows, n_cols] => (n_rows, n_cols, options.rank, mean_abs),
            _ => (1, tensor.shape.iter().product(), 0, VECTOR_DELTA * mean_abs),
        };
        let (base_mean, base_std) = match tensor.role {
            Role::Embedding => (0.0, 0.02),
            Role::Linear => (0.0, 1.0 / (n_cols as f32).sqrt()),
            Role::Norm => (1.0, 0.05),
            Role::Bias => (0.0, 0.1),
        };
        let (seed, name) = (options.seed, tensor.name.as_str());
        let padded_rank = rank.next_multiple_of(RANKS_PER_PASS);

        let mut right = vec![0.0; padded_rank * n_cols];
        let label = format!("{name}/right");
        right.par_chunks_exact_mut(n_cols).take(rank).enumerate().for_each(|(row, out)| {
            draw_normal(seed, &label, row, out);
        });
        let mut left = vec![0.0; n_rows * padded_rank];
        let label = format!("{name}/left");
        if rank > 0 {
            left.par_chunks_exact_mut(padded_rank).enumerate().for_each(|(row, out)| {
                draw_normal(seed, &label, row, &mut out[..rank]);
            });
        }

        // Given its row of the left factor, an element is Gaussian with the variance
        // `low · |left|² / rank + noise`, and the mean absolute value of a Gaussian is
        // √(2/π) of its deviation.
        let low = if rank > 0 { LOW_RANK_ENERGY / rank as f64 } else { 0.0 };
        let noise = if rank > 0 { 1.0 - LOW_RANK_ENERGY } else { 1.0 };
        let mean_std = if rank > 0 {
            let row_std = |row: &[f32]| {
                let energy: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
                (low * energy + noise).sqrt()
            };
            left.chunks_exact(padded_rank).map(row_std).sum::<f64>() / n_rows as f64
        } else {
            noise.sqrt()
        };
        let scale = mean_abs / (mean_std * std::f64::consts::FRAC_2_PI.sqrt());
        let left_scale = (scale * low.sqrt()) as f32;
        left.par_iter_mut().for_each(|x| *x *= left_scale);
        Self {
            seed,
            name,
            n_rows,
            n_cols,
            base_mean,
            base_std,
            noise_std: (scale * noise.sqrt()) as f32,
            padded_rank,
            left,
            right,
        }
    }

    /// Number of rows; one for a vector.
    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Number of columns.
    pub(super) fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// What [`RowPairs::draw`] needs, for one thread.
    pub(super) fn scratch(&self) -> Scratch {
        Scratch { base: vec![0.0; self.n_cols], delta: vec![0.0; self.n_cols] }
    }

    /// Draws a row and writes it as bf16: the base's first, then each fine-tune's.
    pub(super) fn draw(&self, row: usize, scratch: &mut Scratch, out: &mut [&mut [u8]]) {
        let [base_out, fine_tunes_out @ ..] = out else { return };
        draw_normal(self.seed, &format!("{}/base", self.name), row, &mut scratch.base);
        for (x, out) in scratch.base.iter_mut().zip(base_out.chunks_exact_mut(2)) {
            let base = bf16::from_f32(self.base_mean + self.base_std * *x);
            out.copy_from_slice(&base.to_le_bytes());
            *x = base.to_f32();
        }
        for (index, out) in fine_tunes_out.iter_mut().enumerate() {
            self.draw_fine_tune(row, index, scratch, out);
        }
    }

    fn draw_fine_tune(&self, row: usize, index: usize, scratch: &mut Scratch, out: &mut [u8]) {
        let Scratch { base, delta } = scratch;
        let label = match index {
            0 => format!("{}/noise", self.name),
            _ => format!("{}/noise {index}", self.name),
        };
        draw_normal(self.seed, &label, row, delta);
        for x in delta.iter_mut() {
            *x *= self.noise_std;
        }
        if self.padded_rank > 0 {
            let left = self.left[row * self.padded_rank..][..self.padded_rank]
                .chunks_exact(RANKS_PER_PASS);
            let right = self.right.chunks_exact(RANKS_PER_PASS * self.n_cols);
            for (left, right) in left.zip(right) {
                add_products(delta, left, right);
            }
        }
        // The delta is what is added to the stored base, not to what was drawn.
        for ((x, d), out) in base.iter().zip(delta.iter()).zip(out.chunks_exact_mut(2)) {
            out.copy_from_slice(&bf16::from_f32(x + d).to_le_bytes());
        }
    }
}

/// Fills a row with independent normal numbers of its own stream.
fn draw_normal(seed: u64, label: &str, row: usize, out: &mut [f32]) {
    let mut rng = stream(seed, label, row as u64);
    for x in out {
        *x = StandardNormal.sample(&mut rng);
    }
}

/// `out += left · right` for [`RANKS_PER_PASS`] rows of `right`.
fn add_products(out: &mut [f32], left: &[f32], right: &[f32]) {
    let n = out.len();
    let (ab, cd) = right.split_at(2 * n);
    let ((a, b), (c, d)) = (ab.split_at(n), cd.split_at(n));
    let right = a.iter().zip(b).zip(c.iter().zip(d));
    for (x, ((a, b), (c, d))) in out.iter_mut().zip(right) {
        *x += (left[0] * a + left[1] * b) + (left[2] * c + left[3] * d);
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape::SHAPES;
    use super::*;

    #[test]
    fn half_of_the_energy_is_low_rank() {
        let tensor = TensorSpec { name: "w".into(), shape: vec![400, 500], role: Role::Linear };
        for rank in [1, 4, 16, 17] {
            let options = Options {
                shape: SHAPES[0],
                seed: 0,
                mean_abs_delta: 0.01,
                rank,
                n_fine_tunes: 1,
                max_shard_bytes: u64::MAX,
            };
            let pairs = RowPairs::new(&tensor, &options);
            assert_eq!(pairs.right.iter().filter(|x| **x != 0.0).count(), rank * 500);
            let mut energy = 0.0;
            for left in pairs.left.chunks_exact(pairs.padded_rank) {
                for col in 0..500 {
                    let right = pairs.right[col..].iter().step_by(500);
                    let x: f32 = left.iter().zip(right).map(|(l, r)| l * r).sum();
                    energy += f64::from(x).powi(2);
                }
            }
            let share = energy / (energy + f64::from(pairs.noise_std).powi(2) * 200_000.0);
            assert!((0.45..0.55).contains(&share), "rank {rank}: {share}");
        }
    }
}
