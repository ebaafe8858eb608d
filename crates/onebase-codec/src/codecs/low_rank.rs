//! A product of two thin matrices in 16 bits: the singular value decomposition of
//! the delta, truncated (C. Eckart, G. Young, "The Approximation of One Matrix by
//! Another of Lower Rank", Psychometrika 1936: no matrix of that rank is nearer in
//! the squared error). It is the low-rank baseline of B. Ping et al.,
//! "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large
//! Language Models", NeurIPS 2024.
//!
//! The singular vectors are those of the Gram matrix of the shorter side, in f64, so
//! that a table of many rows is read by blocks and only a wide matrix is held as a
//! whole. Encoding gives the same bytes on any number of threads, on processors of one
//! kind: sums are ordered by the instruction set and the sizes of the caches, so
//! that factors written on another kind of processor may differ by rounding. Parts
//! decode to the same weights everywhere.

use std::ops::Range;

use half::bf16;
use onebase_kernels::Backend;
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartData, WeightRef, saturating_bf16};

use crate::numerics::{Eigen, add_gram_of_columns, gram, product, symmetric_eigen};
use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Result, read_wide};

/// `Δ ≈ u v`. Part `u`: `[out_features, rank]`, BF16; part `v`:
/// `[rank, in_features]`, BF16; each has the square root of the singular values.
/// The rank follows from the options and the shape, see [`rank`].
pub(super) struct LowRank;

impl Codec for LowRank {
    fn name(&self) -> &'static str {
        "low-rank"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "truncated singular value decomposition, factors in bf16"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[OptionSpec {
            name: "bits",
            doc: "bits per weight that the two factors may take, at least rank 1",
            kind: Kind::Number { min: 0.01, max: 16.0, default: 1.0 },
        }]
    }

    #[allow(clippy::cast_precision_loss)]
    fn claimed_bits(&self, options: &Options, shape: [usize; 2]) -> f64 {
        let [m, n] = shape.map(|n| n as f64);
        16.0 * rank(options, shape) as f64 * (m + n) / (m * n)
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let rank = rank(options, shape);
        let (u, v) = if n_rows < n_cols {
            wide_factors(&read_wide(delta, 0..n_rows)?, shape, rank)?
        } else {
            tall_factors(delta, rank)?
        };
        Ok(EncodedDelta::new(
            shape,
            [
                ("u", vec![n_rows, rank], PartData::BF16(u)),
                ("v", vec![rank, n_cols], PartData::BF16(v)),
            ],
        ))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape @ [n_rows, n_cols] = delta.shape;
        let rank = rank(options, shape);
        let mut parts = delta.into_parts();
        let u = parts.take_bf16("u", &[n_rows, rank])?;
        let v = parts.take_bf16("v", &[rank, n_cols])?;
        parts.finish()?;
        Ok(Box::new(LowRankDelta { shape, rank, u, v }))
    }
}

/// The factors `u` and `v` of a matrix with fewer rows than columns.
fn wide_factors(
    delta: &[f64],
    shape @ [n_rows, n_cols]: [usize; 2],
    rank: usize,
) -> Result<(Vec<bf16>, Vec<bf16>)> {
    let (gram, n) = gram(delta, shape);
    let Eigen { values, vectors } = symmetric_eigen(&gram, n)?;
    let left = &vectors[..rank * n_rows];
    let right = product(left, delta, [rank, n_rows, n_cols]);
    let mut u = Vec::with_capacity(n_rows * rank);
    for row in 0..n_rows {
        u.extend((0..rank).map(|r| rounded(left[r * n_rows + row] * root(values[r]))));
    }
    let v = right.iter().enumerate().map(|(i, v)| over_root(*v, values[i / n_cols])).collect();
    Ok((u, v))
}

/// The factors `u` and `v` of a matrix with at least as many rows as columns, which
/// is read twice.
fn tall_factors(delta: &dyn DeltaSource, rank: usize) -> Result<(Vec<bf16>, Vec<bf16>)> {
    let [n_rows, n_cols] = delta.shape();
    let mut gram = vec![0.0; n_cols * n_cols];
    for_each_wide_block(delta, |block, n| add_gram_of_columns(block, [n, n_cols], &mut gram))?;
    let Eigen { values, vectors } = symmetric_eigen(&gram, n_cols)?;
    let right = &vectors[..rank * n_cols];
    let columns: Vec<f64> =
        (0..n_cols * rank).map(|i| right[i % rank * n_cols + i / rank]).collect();
    let mut u = Vec::with_capacity(n_rows * rank);
    for_each_wide_block(delta, |block, n| {
        let left = product(block, &columns, [n, n_cols, rank]);
        u.extend(left.iter().enumerate().map(|(i, u)| over_root(*u, values[i % rank])));
    })?;
    let v = right.iter().enumerate().map(|(i, v)| rounded(v * root(values[i / n_cols]))).collect();
    Ok((u, v))
}

/// Weights that are widened at a time.
const BLOCK_WEIGHTS: usize = 1 << 20;

/// Calls `each` with blocks of rows in their order, widened to f64, and the number
/// of rows of each.
fn for_each_wide_block(delta: &dyn DeltaSource, mut each: impl FnMut(&[f64], usize)) -> Result<()> {
    let [n_rows, n_cols] = delta.shape();
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    for first in (0..n_rows).step_by(block_rows) {
        let rows = first..n_rows.min(first + block_rows);
        each(&read_wide(delta, rows.clone())?, rows.len());
    }
    Ok(())
}

/// The root of a singular value, from its square.
fn root(square: f64) -> f64 {
    square.max(0.0).sqrt().sqrt()
}

/// The root of a singular value on both sides keeps the factors alike in
/// magnitude, and both far inside the range of bf16. Of a product with a singular
/// vector, which has the value itself, it is what is left over the root.
fn over_root(product: f64, square: f64) -> bf16 {
    let root = root(square);
    if root > 0.0 { rounded(product / root) } else { bf16::ZERO }
}

fn rounded(value: f64) -> bf16 {
    #[allow(clippy::cast_possible_truncation)]
    saturating_bf16(value as f32)
}

/// The greatest rank at which two factors of 16-bit elements take no more than
/// the bits per weight of the option, but at least 1 and, where the matrix is
/// empty, 0: `bits · m · n / (16 · (m + n))`, computed in f64 in this order.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn rank(options: &Options, shape: [usize; 2]) -> usize {
    let [m, n] = shape.map(|n| n as f64);
    let rank = (options.number("bits") * m * n / (16.0 * (m + n))).floor() as usize;
    rank.max(1).min(shape[0]).min(shape[1])
}

struct LowRankDelta {
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

impl DeltaLinear for LowRankDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let n_rows = x.n_rows();
        let mut inner = vec![0.0; n_rows * self.rank];
        let Ok(mut inner) = MatrixMut::new(&mut inner, n_rows, self.rank) else {
            unreachable!("the buffer was sized for the product")
        };
        backend.add_dense(WeightRef::BF16(&self.v), x, &mut inner);
        backend.add_dense(WeightRef::BF16(&self.u), inner.as_ref(), y);
    }

    /// Sums in f64, where no sum of products of bf16 numbers overflows, in
    /// ascending order of the rank: the same weights on every processor.
    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let n_cols = self.shape[1];
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
                for (r, v) in self.v.chunks(n_cols).enumerate() {
                    for (wide, v) in wide.iter_mut().zip(&v[cols.clone()]) {
                        *wide = f64::from(v.to_f32());
                    }
                    for (row, sums) in (first..first + out.len() / n_cols).zip(&mut sums) {
                        let u = f64::from(self.u[row * self.rank + r].to_f32());
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

    fn resident_bytes(&self) -> usize {
        (self.u.len() + self.v.len()) * size_of::<bf16>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CodecSpec;
    use onebase_tensor::stream;
    use rand_distr::{Distribution, StandardNormal};

    fn decode(delta: &dyn DeltaLinear) -> Vec<f32> {
        let [n_rows, n_cols] = delta.shape();
        let mut out = vec![f32::NAN; n_rows * n_cols];
        delta.write_rows(0..n_rows, &mut out);
        out
    }

    /// Artifacts depend on these ranks.
    #[test]
    fn ranks_are_the_greatest_that_fit() {
        let of = |bits: &str, shape| {
            let spec: CodecSpec = format!("low-rank:bits={bits}").parse().unwrap();
            rank(spec.options(), shape)
        };
        assert_eq!(of("1", [4096, 4096]), 128);
        assert_eq!(of("1", [4096, 4095]), 127);
        assert_eq!(of("0.1", [3200, 3200]), 10);
        assert_eq!(of("16", [4096, 4096]), 2048);
        assert_eq!(of("16", [7, usize::MAX]), 7);
        assert_eq!(of("0.01", [4096, 1]), 1);
        assert_eq!([of("1", [0, 9]), of("1", [9, 0]), of("1", [0, 0])], [0; 3]);
    }

    /// What is lost is what the truncated singular values hold, and the rounding.
    #[test]
    fn the_error_is_that_of_the_best_matrix_of_its_rank() {
        for shape in [[90, 200], [200, 90]] {
            check_error(shape);
        }
    }

    fn check_error(shape @ [n_rows, n_cols]: [usize; 2]) {
        let mut rng = stream(7, "w", 0);
        let data: Vec<f32> =
            (0..n_rows * n_cols).map(|_| StandardNormal.sample(&mut rng)).collect();
        let wide: Vec<f64> = data.iter().copied().map(f64::from).collect();
        let (gram, n) = gram(&wide, shape);
        let squares = symmetric_eigen(&gram, n).unwrap().values;
        for bits in [0.3, 1.0, 4.0, 12.0] {
            let spec: CodecSpec = format!("low-rank:bits={bits}").parse().unwrap();
            let best: f64 = squares[rank(spec.options(), shape)..].iter().sum();
            let delta = spec.encode(&MatrixRef::new(&data, n_rows, n_cols).unwrap()).unwrap();
            let decoded = decode(&*spec.prepare(delta).unwrap());
            let loss = |(w, d): (&f64, &f32)| (w - f64::from(*d)).powi(2);
            let error: f64 = wide.iter().zip(&decoded).map(loss).sum();
            let power: f64 = squares.iter().sum();
            assert!((error - best).abs() < 1e-4 * power, "{bits}: {error} {best}");
        }
    }

    #[test]
    fn parts_of_any_finite_numbers_decode_to_finite_weights() {
        let spec: CodecSpec = "low-rank:bits=16".parse().unwrap();
        let shape @ [n_rows, n_cols] = [20, 30];
        let rank = rank(spec.options(), shape);
        assert!(rank > 1);
        let alternating = |n: usize| (0..n).map(|i| [bf16::MAX, bf16::MIN][i % 2]).collect();
        let parts = [
            ("u", vec![n_rows, rank], PartData::BF16(vec![bf16::MAX; n_rows * rank])),
            ("v", vec![rank, n_cols], PartData::BF16(alternating(rank * n_cols))),
        ];
        let prepared = spec.prepare(EncodedDelta::new(shape, parts)).unwrap();
        assert!(decode(&*prepared).iter().all(|w| w.abs() == f32::MAX));
    }
}
