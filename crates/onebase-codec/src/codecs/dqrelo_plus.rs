//! One bit per weight and a low-rank product, each fitted to what the other leaves.
//!
//! It goes beyond D-QRELO (see the codec `dqrelo`); none of this is that paper's.
//! Every step can be left out, so that what each is worth can be seen:
//!
//! - `scale=row`: a scale for each row in place of one for the matrix; `parts`: two, as of the
//!   codec `sign`.
//! - `start=low-rank` and `rounds`: the decomposition first, then signs of what it leaves,
//!   then the decomposition of what these leave, and so on. With exact factors no
//!   step can raise the error, as each is the best for the other; with coded ones one
//!   can, and the best round is kept.
//! - `factors=coded` with `factor_bits`: factors of low-bit codes, one scale for each pair
//!   of vectors, which allows several times the rank in the same bytes. The signs are
//!   fitted to what the coded factors leave.
//!
//! As with every codec that decomposes, bytes are the same on any number of threads, on
//! processors of one kind.

use std::ops::Range;

use onebase_kernels::{Backend, plane_bytes};
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartData, PartShapes, PartSpec};

use crate::coded_factors::CodedFactors;
use crate::factors::Factors;
use crate::numerics::{truncated_svd, truncated_svd_bytes};
use crate::signs::{SignScale, Signs, finite_sum};
use crate::source::{Less, take};
use crate::svd_options::{SEED, SVD, svd_method};
use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Result};

/// Parts `sign` and `scale` as the codec `sign` has them. At a rank above 0, with coded
/// factors: `u`: `[out_features, factor_bits, plane_bytes(rank)]`, U8, bit planes as the
/// codec `rtn` has them; `v`: `[rank, factor_bits, plane_bytes(in_features)]`, U8;
/// `pair_scale`: `[rank]`, BF16; else `u`: `[out_features, rank]` and `v`:
/// `[rank, in_features]`, BF16. The rank follows from the options and the shape, see
/// [`Layout`].
pub(super) struct DqreloPlus;

impl Codec for DqreloPlus {
    fn name(&self) -> &'static str {
        "dqrelo-plus"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "one bit per weight and a product of low-bit factors, fitted to each other, without data"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[
            OptionSpec {
                name: "bits",
                doc: "bits per weight that all parts may take, but for the least there are",
                kind: Kind::Number { min: 1.0, max: 33.0, default: 2.0 },
            },
            OptionSpec {
                name: "scale",
                doc: "what shares a scale of the signs",
                kind: Kind::Choice(SignScale::WORDS),
            },
            OptionSpec {
                name: "start",
                doc: "which of the two is fitted first",
                kind: Kind::Choice(&["low-rank", "sign"]),
            },
            OptionSpec {
                name: "rounds",
                doc: "times that both are fitted to each other again",
                kind: Kind::Int { min: 0, max: 16, multiple_of: 1, default: 3 },
            },
            OptionSpec {
                name: "factors",
                doc: "how the factors are stored",
                kind: Kind::Choice(&["coded", "bf16"]),
            },
            OptionSpec {
                name: "factor_bits",
                doc: "bits per code of coded factors",
                kind: Kind::Int { min: 1, max: 8, multiple_of: 1, default: 4 },
            },
            SVD,
            SEED,
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn claimed_bits(&self, options: &Options, shape: [usize; 2], _: &PartShapes) -> f64 {
        let [m, n] = shape.map(|n| n as f64);
        let layout = Layout::new(options, shape);
        let element_bits = layout.factor_bits.unwrap_or(16) as f64;
        1.0 + element_bits * layout.rank as f64 * (m + n) / (m * n)
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        Some(Layout::new(options, shape).parts())
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let layout = Layout::new(options, shape);
        let parts: usize = layout.parts().iter().map(PartSpec::size_bytes).sum();
        // The best so far, the next signs and the next product.
        let fits = 3 * parts + 2 * Signs::working_bytes(shape);
        fits + truncated_svd_bytes(shape, layout.rank, svd_method(options))
    }

    fn draft(&self) -> &'static [(&'static str, usize)] {
        &[("rounds", 0)]
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape = delta.shape();
        let layout = Layout::new(options, shape);
        let method = svd_method(options);
        let product = |of: &dyn DeltaSource| -> Result<Product> {
            let svd = truncated_svd(of, layout.rank, method)?;
            Ok(match layout.factor_bits {
                Some(bits) => Product::Coded(CodedFactors::from_svd(&svd, shape, bits)),
                None => Product::Exact(Factors::from_svd(&svd, shape)),
            })
        };
        let signs = |product: &Product| {
            let less = |rows, weights: &mut [f32]| take(weights, |w| product.write_rows(rows, w));
            Signs::fit_measured(&Less { delta, taken: &less }, layout.scale)
        };
        let product_beside = |signs: &Signs| {
            let less = |rows, weights: &mut [f32]| signs.take_off(rows, weights);
            product(&Less { delta, taken: &less })
        };

        let first = if options.choice("start") == "low-rank" {
            product(delta)?
        } else {
            product_beside(&Signs::fit(delta, layout.scale)?)?
        };
        let (fitted, lost) = signs(&first)?;
        let mut best = (lost, fitted, first);
        // Nothing is to be gained where there is no product.
        let rounds = if layout.rank > 0 { options.int("rounds") } else { 0 };
        let mut beside = None;
        for _ in 0..rounds {
            let next = product_beside(beside.as_ref().unwrap_or(&best.1))?;
            let (fitted, lost) = signs(&next)?;
            if lost < best.0 {
                best = (lost, fitted, next);
                beside = None;
            } else {
                beside = Some(fitted);
            }
        }
        Ok(layout.encoded(best.1, best.2))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let layout = Layout::new(options, delta.shape);
        let Layout { shape, rank, .. } = layout;
        let [n_rows, n_cols] = shape;
        let mut parts = delta.into_parts();
        let signs = Signs::take(shape, layout.scale, &mut parts)?;
        let product = match layout.factor_bits {
            _ if rank == 0 => None,
            Some(bits) => {
                let u = parts.take_u8("u", &[n_rows, bits, plane_bytes(rank)])?;
                let v = parts.take_u8("v", &[rank, bits, plane_bytes(n_cols)])?;
                let scale = parts.take_bf16("pair_scale", &[rank])?;
                Some(Product::Coded(CodedFactors::new(shape, bits, u, v, scale)))
            }
            None => {
                let u = parts.take_bf16("u", &[n_rows, rank])?;
                let v = parts.take_bf16("v", &[rank, n_cols])?;
                Some(Product::Exact(Factors::new(shape, rank, u, v)))
            }
        };
        parts.finish()?;
        Ok(Box::new(DqreloPlusDelta { shape, signs, product }))
    }
}

/// Options and shape, and what follows from them.
struct Layout {
    shape: [usize; 2],
    scale: SignScale,
    /// Bits per code, where factors are coded.
    factor_bits: Option<usize>,
    /// The greatest rank at which all parts have no more than the bits allow.
    rank: usize,
}

impl Layout {
    fn new(options: &Options, shape: [usize; 2]) -> Self {
        let [n_rows, n_cols] = shape;
        let scale = SignScale::of(options.choice("scale"));
        let factor_bits =
            (options.choice("factors") == "coded").then(|| options.int("factor_bits"));
        let fixed = n_rows * plane_bytes(n_cols) + scale.part(n_rows).size_bytes();
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let allowed = (options.number("bits") * (n_rows * n_cols) as f64 / 8.0).floor() as usize;
        let size = |rank: usize| match factor_bits {
            Some(bits) => CodedFactors::size_bytes(shape, bits, rank),
            None => 2 * rank * (n_rows + n_cols),
        };
        let (mut rank, mut above) = (0, n_rows.min(n_cols) + 1);
        while above - rank > 1 {
            let middle = usize::midpoint(rank, above);
            if fixed + size(middle) <= allowed { rank = middle } else { above = middle }
        }
        Self { shape, scale, factor_bits, rank }
    }

    fn parts(&self) -> Vec<PartSpec> {
        let mut parts = Signs::parts(self.shape, self.scale).to_vec();
        match self.factor_bits {
            _ if self.rank == 0 => {}
            Some(bits) => parts.extend(CodedFactors::parts(self.shape, bits, self.rank)),
            None => parts.extend(Factors::parts(self.shape, self.rank)),
        }
        parts
    }

    fn encoded(&self, signs: Signs, product: Product) -> EncodedDelta {
        let [(scale_shape, scale), (sign_shape, sign)] = signs.into_data();
        let (scale, sign) = (("scale", scale_shape, scale), ("sign", sign_shape, sign));
        let [n_rows, n_cols] = self.shape;
        match product {
            _ if self.rank == 0 => EncodedDelta::new(self.shape, [scale, sign]),
            Product::Coded(factors) => {
                let [(u_shape, u), (v_shape, v), (pair_shape, pair)] = factors.into_data();
                let parts: [(&str, Vec<usize>, PartData); 5] = [
                    scale,
                    sign,
                    ("u", u_shape, u),
                    ("v", v_shape, v),
                    ("pair_scale", pair_shape, pair),
                ];
                EncodedDelta::new(self.shape, parts)
            }
            Product::Exact(factors) => {
                let [u, v] = factors.into_data();
                let u = ("u", vec![n_rows, self.rank], u);
                EncodedDelta::new(self.shape, [scale, sign, u, ("v", vec![self.rank, n_cols], v)])
            }
        }
    }
}

/// The low-rank product.
enum Product {
    Coded(CodedFactors),
    Exact(Factors),
}

impl Product {
    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        match self {
            Product::Coded(factors) => factors.add_to(backend, x, y),
            Product::Exact(factors) => factors.add_to(backend, x, y),
        }
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Product::Coded(factors) => factors.write_rows(rows, out),
            Product::Exact(factors) => factors.write_rows(rows, out),
        }
    }

    fn resident_bytes(&self) -> usize {
        match self {
            Product::Coded(factors) => factors.resident_bytes(),
            Product::Exact(factors) => factors.resident_bytes(),
        }
    }
}

struct DqreloPlusDelta {
    shape: [usize; 2],
    signs: Signs,
    /// At a rank above 0.
    product: Option<Product>,
}

impl DeltaLinear for DqreloPlusDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        self.signs.add_to(backend, x, y);
        if let Some(product) = &self.product {
            product.add_to(backend, x, y);
        }
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match &self.product {
            Some(product) => product.write_rows(rows.clone(), out),
            None => out.fill(0.0),
        }
        self.signs.visit(rows, out, |out, weight| *out = finite_sum(*out, weight));
    }

    fn resident_bytes(&self) -> usize {
        self.signs.resident_bytes() + self.product.as_ref().map_or(0, Product::resident_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CodecSpec;
    use onebase_tensor::stream;
    use rand_distr::{Distribution, StandardNormal};

    /// A delta with a few strong directions in noise, as fine-tunes have.
    fn delta([rows, cols]: [usize; 2]) -> Vec<f32> {
        let mut rng = stream(6, "delta", 0);
        let mut draw =
            |n: usize| -> Vec<f32> { (0..n).map(|_| StandardNormal.sample(&mut rng)).collect() };
        let mut data = draw(rows * cols);
        for _ in 0..12 {
            let (u, v) = (draw(rows), draw(cols));
            for (row, u) in data.chunks_mut(cols).zip(&u) {
                row.iter_mut().zip(&v).for_each(|(w, v)| *w += 0.4 * u * v);
            }
        }
        data
    }

    /// The relative squared error and the bits of the parts.
    fn measure(options: &str, data: &[f32], [rows, cols]: [usize; 2]) -> [f64; 2] {
        let spec: CodecSpec = format!("dqrelo-plus:{options}").parse().unwrap();
        let encoded = spec.encode(&MatrixRef::new(data, rows, cols).unwrap()).unwrap();
        #[allow(clippy::cast_precision_loss)]
        let bits = 8.0 * encoded.size_bytes() as f64 / (rows * cols) as f64;
        let mut out = vec![f32::NAN; rows * cols];
        spec.prepare(encoded).unwrap().write_rows(0..rows, &mut out);
        let square = |v: f32| f64::from(v).powi(2);
        let lost: f64 = data.iter().zip(&out).map(|(a, b)| square(a - b)).sum();
        [lost / data.iter().map(|v| square(*v)).sum::<f64>(), bits]
    }

    #[test]
    fn the_bits_are_kept() {
        for shape in [[256, 256], [96, 300], [300, 96]] {
            let data = delta(shape);
            for bits in [1.2, 1.5, 2.0, 3.0] {
                for factors in ["coded", "bf16"] {
                    let options = format!("bits={bits},factors={factors},rounds=0");
                    let [_, got] = measure(&options, &data, shape);
                    assert!(got <= bits && got > bits - 0.35, "{shape:?} {options}: {got}");
                }
            }
        }
    }

    #[test]
    fn each_step_helps_on_a_delta_of_few_strong_directions() {
        let shape = [256, 256];
        let data = delta(shape);
        let error = |options: &str| measure(&format!("bits=2,{options}"), &data, shape)[0];
        let paper = error("scale=matrix,start=sign,rounds=0,factors=bf16");
        let alternated = error("scale=matrix,start=sign,factors=bf16");
        let started = error("scale=matrix,factors=bf16");
        let coded = error("scale=matrix");
        assert!(alternated < 0.95 * paper, "{alternated} {paper}");
        assert!(started <= alternated * 1.01, "{started} {alternated}");
        assert!(coded < 0.8 * started, "{coded} {started}");
    }

    #[test]
    fn row_scales_help_where_rows_differ() {
        let shape @ [rows, cols] = [128, 512];
        let mut data = delta(shape);
        for (row, weights) in data.chunks_mut(cols).enumerate() {
            #[allow(clippy::cast_precision_loss)]
            let power = 1.0 + 4.0 * row as f32 / rows as f32;
            weights.iter_mut().for_each(|w| *w *= power);
        }
        let error = |scale: &str| measure(&format!("scale={scale}"), &data, shape)[0];
        assert!(error("row") < 0.9 * error("matrix"), "{} {}", error("row"), error("matrix"));
    }

    #[test]
    fn more_rounds_are_never_worse() {
        let shape = [64, 80];
        let data = delta(shape);
        for factors in ["coded,factor_bits=2", "coded", "bf16"] {
            let errors: Vec<f64> = (0..6)
                .map(|rounds| {
                    measure(&format!("factors={factors},rounds={rounds}"), &data, shape)[0]
                })
                .collect();
            assert!(errors.is_sorted_by(|a, b| a * (1.0 + 1e-6) >= *b), "{factors}: {errors:?}");
        }
    }
}
