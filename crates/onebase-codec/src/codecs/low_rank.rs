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

use onebase_kernels::Backend;
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartSpec};

use crate::factors::Factors;
use crate::numerics::{SvdMethod, truncated_svd, truncated_svd_bytes};
use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Result};

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

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        Some(Factors::parts(shape, rank(options, shape)).to_vec())
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let rank = rank(options, shape);
        let factors: usize = Factors::parts(shape, rank).iter().map(PartSpec::size_bytes).sum();
        factors + truncated_svd_bytes(shape, rank, SvdMethod::Full)
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let rank = rank(options, shape);
        let svd = truncated_svd(delta, rank, SvdMethod::Full)?;
        let [u, v] = Factors::from_svd(&svd, shape).into_data();
        Ok(EncodedDelta::new(shape, [("u", vec![n_rows, rank], u), ("v", vec![rank, n_cols], v)]))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape @ [n_rows, n_cols] = delta.shape;
        let rank = rank(options, shape);
        let mut parts = delta.into_parts();
        let u = parts.take_bf16("u", &[n_rows, rank])?;
        let v = parts.take_bf16("v", &[rank, n_cols])?;
        parts.finish()?;
        Ok(Box::new(LowRankDelta { shape, factors: Factors::new(shape, rank, u, v) }))
    }
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
    factors: Factors,
}

impl DeltaLinear for LowRankDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        self.factors.add_to(backend, x, y);
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.factors.write_rows(rows, out);
    }

    fn resident_bytes(&self) -> usize {
        self.factors.resident_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CodecSpec;
    use crate::numerics::{gram, symmetric_eigen};
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
}
