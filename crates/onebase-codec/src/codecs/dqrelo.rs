//! One bit per weight and a low-rank product for what it leaves (D-QRELO, arXiv
//! 2604.16940, section 3.3): `Δ ≈ α · sign(Δ) + U V`, with one scale
//! `α = mean |Δ|` for the matrix (equation 8), `sign(0) = −1` (equation 7), and the
//! residual's singular value decomposition truncated at rank `⌈ n m ρ₁ / (n + m) ⌉`
//! (equation 12), in 16-bit factors. The total ratio is `ρ = ρ₁ + 1/16` (equation 16);
//! the option `bits` is `16 ρ`.
//!
//! `order=low-rank-first` is the paper's ablation (table 3): the decomposition of the
//! delta first, then one bit for what that leaves. The paper does not say how the
//! decomposition is computed, in which type the scale is stored or where the
//! singular values go; here it is a random range finder by default, f32, and half of
//! each on both sides. The paper also keeps only the largest entries of
//! changed vectors (norms, biases): that is the codec `magnitude` with `keep` at the
//! ratio, for those who store vectors with it.
//!
//! As with every codec that decomposes, bytes are the same on any number of threads, on
//! processors of one kind.

use std::ops::Range;

use onebase_kernels::Backend;
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartShapes, PartSpec};

use crate::factors::Factors;
use crate::numerics::{truncated_svd, truncated_svd_bytes};
use crate::signs::{SignScale, Signs, finite_sum};
use crate::source::{Less, take};
use crate::svd_options::{SEED, SVD, svd_method};
use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Rescale, Result};

/// Parts `sign`: `[out_features, plane_bytes]`, U8, as the codec `sign` packs them;
/// `scale`: `[1]`, F32; `u`: `[out_features, rank]`, BF16; `v`: `[rank, in_features]`,
/// BF16, both only at a rank above 0. The rank follows from the options and the
/// shape, see [`rank`].
pub(super) struct Dqrelo;

impl Codec for Dqrelo {
    fn name(&self) -> &'static str {
        "dqrelo"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "one bit per weight and a low-rank product for the residual, without data"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[
            OptionSpec {
                name: "bits",
                doc: "bits per weight by the paper's formula, one of them the sign",
                kind: Kind::Number { min: 1.0, max: 33.0, default: 2.0 },
            },
            OptionSpec {
                name: "order",
                doc: "which of the two comes first, the other takes what it leaves",
                kind: Kind::Choice(&["sign-first", "low-rank-first"]),
            },
            SVD,
            SEED,
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn claimed_bits(&self, options: &Options, shape: [usize; 2], _: &PartShapes) -> f64 {
        let [m, n] = shape.map(|n| n as f64);
        1.0 + 16.0 * rank(options, shape) as f64 * (m + n) / (m * n)
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let mut parts = Signs::parts(shape, SignScale::Matrix).to_vec();
        let rank = rank(options, shape);
        if rank > 0 {
            parts.extend(Factors::parts(shape, rank));
        }
        Some(parts)
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let rank = rank(options, shape);
        let factors: usize = Factors::parts(shape, rank).iter().map(PartSpec::size_bytes).sum();
        let svd = truncated_svd_bytes(shape, rank, svd_method(options));
        Signs::working_bytes(shape) + factors + svd
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let rank = rank(options, shape);
        let method = svd_method(options);
        let factors = |of: &dyn DeltaSource| -> Result<Factors> {
            Ok(Factors::from_svd(&truncated_svd(of, rank, method)?, shape))
        };
        let (signs, factors) = if options.choice("order") == "sign-first" {
            let signs = Signs::fit(delta, SignScale::Matrix)?;
            let less = |rows, weights: &mut [f32]| signs.take_off(rows, weights);
            let factors = factors(&Less { delta, taken: &less })?;
            (signs, factors)
        } else {
            let factors = factors(delta)?;
            let less = |rows, weights: &mut [f32]| take(weights, |w| factors.write_rows(rows, w));
            let signs = Signs::fit(&Less { delta, taken: &less }, SignScale::Matrix)?;
            (signs, factors)
        };
        let [(scale_shape, scale), (sign_shape, sign)] = signs.into_data();
        let (scale, sign) = (("scale", scale_shape, scale), ("sign", sign_shape, sign));
        if rank == 0 {
            return Ok(EncodedDelta::new(shape, [scale, sign]));
        }
        let [u, v] = factors.into_data();
        let (u, v) = (("u", vec![n_rows, rank], u), ("v", vec![rank, n_cols], v));
        Ok(EncodedDelta::new(shape, [scale, sign, u, v]))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape @ [n_rows, n_cols] = delta.shape;
        let rank = rank(options, shape);
        let mut parts = delta.into_parts();
        let signs = Signs::take(shape, SignScale::Matrix, &mut parts)?;
        let (mut u, mut v) = (Vec::new(), Vec::new());
        if rank > 0 {
            u = parts.take_bf16("u", &[n_rows, rank])?;
            v = parts.take_bf16("v", &[rank, n_cols])?;
        }
        parts.finish()?;
        Ok(Box::new(DqreloDelta { shape, signs, factors: Factors::new(shape, rank, u, v) }))
    }
}

impl Rescale for Dqrelo {
    fn linear_parts(&self) -> &'static [&'static str] {
        &["scale", "u"]
    }
}

/// `⌈ m n ρ₁ / (m + n) ⌉` with `ρ₁ = (bits − 1) / 16`, but no more than the shape has;
/// computed in f64 in this order.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn rank(options: &Options, shape: [usize; 2]) -> usize {
    let [m, n] = shape.map(|n| n as f64);
    let rho = (options.number("bits") - 1.0) / 16.0;
    let rank = (m * n * rho / (m + n)).ceil() as usize;
    rank.min(shape[0]).min(shape[1])
}

struct DqreloDelta {
    shape: [usize; 2],
    signs: Signs,
    factors: Factors,
}

impl DeltaLinear for DqreloDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        self.signs.add_to(backend, x, y);
        self.factors.add_to(backend, x, y);
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.factors.write_rows(rows.clone(), out);
        self.signs.visit(rows, out, |out, weight| *out = finite_sum(*out, weight));
    }

    fn resident_bytes(&self) -> usize {
        self.signs.resident_bytes() + self.factors.resident_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CodecSpec;
    use crate::numerics::{gram, symmetric_eigenvalues};
    use onebase_tensor::stream;
    use rand_distr::{Distribution, StandardNormal};

    fn spec(options: &str) -> CodecSpec {
        format!("dqrelo:{options}").parse().unwrap()
    }

    fn gaussian(n: usize) -> Vec<f32> {
        let mut rng = stream(4, "delta", 0);
        (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
    }

    fn round_trip(options: &str, data: &[f32], [rows, cols]: [usize; 2]) -> Vec<f32> {
        let spec = spec(options);
        let delta = spec.encode(&MatrixRef::new(data, rows, cols).unwrap()).unwrap();
        let mut out = vec![f32::NAN; rows * cols];
        spec.prepare(delta).unwrap().write_rows(0..rows, &mut out);
        out
    }

    fn squares(values: impl Iterator<Item = f32>) -> f64 {
        values.map(|v| f64::from(v).powi(2)).sum()
    }

    /// The worked example of the paper's figure 2.
    #[test]
    fn the_papers_example() {
        let delta = [0.6, -1.1, 0.6, -0.7, 1.0, 1.0, -0.8, 0.8, -1.4];
        // One bit alone: the signs, times a scale of 8/9.
        let got = round_trip("bits=1", &delta, [3, 3]);
        for (got, delta) in got.iter().zip(delta) {
            assert!((got - (8.0f32 / 9.0).copysign(delta)).abs() < 1e-7, "{got}");
        }
    }

    #[test]
    fn the_sign_of_zero_is_minus() {
        let got = round_trip("bits=1", &[0.0, 3.0], [1, 2]);
        assert_eq!(got, [-1.5, 1.5]);
    }

    /// Artifacts depend on these ranks, which are those of the paper's formula.
    #[test]
    fn ranks_by_the_formula() {
        let at_two = spec("bits=2");
        for (shape, expected) in [
            ([4096, 4096], 128),
            ([4096, 1024], 52),
            ([11008, 4096], 187),
            ([5120, 13824], 234),
            ([5120, 5120], 160),
            ([2048, 768], 35),
            ([128_256, 4096], 249),
        ] {
            assert_eq!(rank(at_two.options(), shape), expected, "{shape:?}");
        }
        assert_eq!(rank(spec("bits=1").options(), [4096, 4096]), 0);
        assert_eq!(rank(spec("bits=33").options(), [40, 30]), 30);
        assert_eq!(rank(at_two.options(), [0, 5]), 0);
    }

    /// Section 3.3's accounting, with the singular values in the factors: one bit and a
    /// scale of 32 bits, and 16 bits for each element of the factors.
    #[test]
    fn bytes_are_those_of_the_formula() {
        let at_two = spec("bits=2");
        for shape @ [m, n] in [[4096, 4096], [4096, 1024], [14336, 4096], [2048, 768], [96, 64]] {
            let parts = at_two.parts(shape).unwrap();
            let bits = 8 * parts.iter().map(PartSpec::size_bytes).sum::<usize>();
            assert_eq!(
                bits,
                m * n + 32 + 16 * rank(at_two.options(), shape) * (m + n),
                "{shape:?}"
            );
        }
    }

    /// What one bit leaves of a Gaussian: `1 − 2/π`.
    #[test]
    fn one_bit_leaves_the_gaussian_share() {
        let shape @ [rows, cols] = [1000, 2000];
        let data = gaussian(rows * cols);
        let got = round_trip("bits=1", &data, shape);
        let left = squares(data.iter().zip(&got).map(|(w, s)| w - s));
        let share = left / squares(data.iter().copied());
        assert!((share - (1.0 - 2.0 / std::f64::consts::PI)).abs() < 0.002, "{share}");
    }

    /// `‖R‖² = ‖Δ‖² − n m α²`, a share of `1 − 2/π` for a Gaussian, and
    /// `‖Δ − Δ̂‖² = ‖R‖² − Σ σ(R)²` over the rank.
    #[test]
    fn the_error_is_what_the_identities_say() {
        let shape @ [rows, cols] = [300, 200];
        let data = gaussian(rows * cols);
        let one_bit = round_trip("bits=1", &data, shape);
        let residual: Vec<f32> = data.iter().zip(&one_bit).map(|(w, s)| w - s).collect();
        let (energy, left) = (squares(data.iter().copied()), squares(residual.iter().copied()));
        let by_scale = (rows * cols) as f64 * f64::from(one_bit[0]).powi(2);
        assert!((left / (energy - by_scale) - 1.0).abs() < 1e-5);
        assert!((left / energy - (1.0 - 2.0 / std::f64::consts::PI)).abs() < 0.01);

        let wide: Vec<f64> = residual.iter().map(|v| f64::from(*v)).collect();
        let (gram, n) = gram(&wide, shape);
        let values = symmetric_eigenvalues(&gram, n).unwrap();
        // On a spectrum as flat as this a random range misses most.
        for (svd, slack) in [("randomized", 0.02), ("full", 1e-4)] {
            let options = format!("bits=2.5,svd={svd}");
            let rank = rank(spec(&options).options(), shape);
            let expected = left - values[..rank].iter().sum::<f64>();
            let got = round_trip(&options, &data, shape);
            let error = squares(data.iter().zip(&got).map(|(a, b)| a - b));
            assert!((error / expected - 1.0).abs() < slack, "{svd}: {error} {expected}");
        }
    }

    #[test]
    fn a_rank_of_the_whole_matrix_loses_only_rounding() {
        for shape @ [rows, cols] in [[30, 40], [32, 32], [4, 400]] {
            let data = gaussian(rows * cols);
            for order in ["sign-first", "low-rank-first"] {
                let options = format!("bits=33,order={order}");
                assert_eq!(rank(spec(&options).options(), shape), rows.min(cols));
                let got = round_trip(&options, &data, shape);
                let lost = squares(data.iter().zip(&got).map(|(a, b)| a - b));
                assert!(lost < 2e-5 * squares(data.iter().copied()), "{shape:?} {order}: {lost}");
            }
        }
    }

    /// On a delta of few strong directions the low-rank product should come first.
    #[test]
    fn the_order_matters_where_the_spectrum_is_steep() {
        let shape @ [rows, cols] = [128, 128];
        let mut data = gaussian(rows * cols);
        let spike = gaussian(rows + cols);
        for row in 0..rows {
            for col in 0..cols {
                data[row * cols + col] += 3.0 * spike[row] * spike[rows + col];
            }
        }
        let error = |order: &str| {
            let got = round_trip(&format!("bits=2,order={order}"), &data, shape);
            squares(data.iter().zip(&got).map(|(a, b)| a - b))
        };
        assert!(error("low-rank-first") < error("sign-first"));
    }
}
