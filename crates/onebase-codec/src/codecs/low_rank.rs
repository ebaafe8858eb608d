//! A product of two thin matrices in 16 bits: the singular value decomposition of
//! the delta, truncated (C. Eckart, G. Young, "The Approximation of One Matrix by
//! Another of Lower Rank", Psychometrika 1936: no matrix of that rank is nearer in
//! the squared error). It is the low-rank baseline of B. Ping et al.,
//! "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large
//! Language Models", NeurIPS 2024.
//!
//! How many directions are kept is said in one of three ways. `bits`: as many as fit.
//! `rank`: that many, of a smaller matrix all. `energy`: the fewest whose squared singular
//! values add up to that share of their sum, as Delta-SVD chooses them (arXiv 2508.16863;
//! the share that it uses could not be read, so none is the default), so that each
//! matrix has a rank of its own. `energy` goes before `rank`, and `rank` before `bits`:
//! 0, their default, stands for not given.
//!
//! By default the singular vectors are those of the Gram matrix of the shorter side, in f64, so
//! that a table of many rows is read by blocks and only a wide matrix is held as a
//! whole. Encoding gives the same bytes on any number of threads, on processors of one
//! kind: sums are ordered by the instruction set and the sizes of the caches, so
//! that factors written on another kind of processor may differ by rounding. Parts
//! decode to the same weights everywhere. With `svd=randomized` singular values are
//! estimates from below, so that an energy may take a few directions more than
//! the fewest.

use std::ops::Range;

use onebase_kernels::Backend;
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartShapes, PartSpec};

use crate::factors::Factors;
use crate::numerics::{
    SvdMethod, Truncated, gram_of_shorter_side, symmetric_eigenvalues, truncated_svd,
    truncated_svd_bytes,
};
use crate::svd_options::{FULL_SVD, SEED, svd_method};
use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Result, for_each_block};

/// `Δ ≈ u v`. Part `u`: `[out_features, rank]`, BF16; part `v`:
/// `[rank, in_features]`, BF16; each has the square root of the singular values.
/// The rank follows from the options and the shape, see [`rank`]; with an energy it
/// is that of the parts, at least 1 where the matrix has weights.
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
        &[
            OptionSpec {
                name: "bits",
                doc: "bits per weight that the two factors may take, at least rank 1",
                kind: Kind::Number { min: 0.01, max: 16.0, default: 1.0 },
            },
            OptionSpec {
                name: "rank",
                doc: "the rank, whatever bits it takes; 0 leaves it to bits",
                kind: Kind::Int { min: 0, max: 65535, multiple_of: 1, default: 0 },
            },
            OptionSpec {
                name: "energy",
                doc: "share of the squared singular values to keep, at the least rank; 0 \
                      leaves it to rank and bits",
                kind: Kind::Number { min: 0.0, max: 1.0, default: 0.0 },
            },
            FULL_SVD,
            SEED,
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn claimed_bits(&self, options: &Options, shape: [usize; 2], parts: &PartShapes) -> f64 {
        let [m, n] = shape.map(|n| n as f64);
        let u = parts.get(U).map_or(&[][..], Vec::as_slice);
        16.0 * stored_rank(options, shape, u) as f64 * (m + n) / (m * n)
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let known = options.number(ENERGY) == 0.0;
        known.then(|| Factors::parts(shape, rank(options, shape)).to_vec())
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let rank = match options.number(ENERGY) {
            0.0 => rank(options, shape),
            // Whatever the data asks for.
            _ => shape[0].min(shape[1]),
        };
        let factors: usize = Factors::parts(shape, rank).iter().map(PartSpec::size_bytes).sum();
        factors + truncated_svd_bytes(shape, rank, svd_method(options))
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let method = svd_method(options);
        let svd = match options.number(ENERGY) {
            0.0 => truncated_svd(delta, rank(options, shape), method)?,
            energy => svd_of_energy(delta, energy, method)?,
        };
        let rank = svd.s.len();
        let [u, v] = Factors::from_svd(&svd, shape).into_data();
        Ok(EncodedDelta::new(shape, [(U, vec![n_rows, rank], u), (V, vec![rank, n_cols], v)]))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape @ [n_rows, n_cols] = delta.shape;
        let u = delta.parts.get(U).map_or(&[][..], |part| part.shape());
        let rank = stored_rank(options, shape, u);
        let mut parts = delta.into_parts();
        let u = parts.take_bf16(U, &[n_rows, rank])?;
        let v = parts.take_bf16(V, &[rank, n_cols])?;
        parts.finish()?;
        Ok(Box::new(LowRankDelta { shape, factors: Factors::new(shape, rank, u, v) }))
    }
}

/// The factors' parts.
const U: &str = "u";
const V: &str = "v";

/// The option by which the rank follows from the data.
const ENERGY: &str = "energy";

/// Where the search for an energy in random ranges begins; each range is twice the
/// one before, so that all together cost about twice the last.
const FIRST_RANK: usize = 16;

/// The rank of parts where `u` has this shape: what the options say or, with an
/// energy, that of `u`, held to what the matrix can have, so that a part of another
/// shape is refused when it is taken.
fn stored_rank(options: &Options, shape: [usize; 2], u: &[usize]) -> usize {
    if options.number(ENERGY) == 0.0 {
        return rank(options, shape);
    }
    let most = shape[0].min(shape[1]);
    match u {
        [_, rank] => (*rank).clamp(most.min(1), most),
        _ => most.min(1),
    }
}

/// The decomposition of the least rank, at least 1 where there are weights, whose
/// squared singular values hold this share of their sum.
fn svd_of_energy(delta: &dyn DeltaSource, energy: f64, method: SvdMethod) -> Result<Truncated> {
    let [n_rows, n_cols] = delta.shape();
    let most = n_rows.min(n_cols);
    if method == SvdMethod::Full {
        // The values alone come first: vectors of every direction would be as large as
        // the matrix, on both sides.
        let (gram, n) = gram_of_shorter_side(delta)?;
        let squares: Vec<f64> =
            symmetric_eigenvalues(&gram, n)?.iter().map(|square| square.max(0.0)).collect();
        drop(gram);
        let enough = energy * squares.iter().sum::<f64>();
        let rank = least_rank(squares.into_iter(), enough).unwrap_or(most);
        return truncated_svd(delta, rank, method);
    }
    let enough = energy * sum_of_squares(delta)?;
    let mut tried = FIRST_RANK.min(most);
    loop {
        let mut svd = truncated_svd(delta, tried, method)?;
        let found = least_rank(svd.s.iter().map(|s| s * s), enough);
        if let Some(rank) = found.or((tried == most).then_some(most)) {
            svd.u.truncate(rank * n_rows);
            svd.s.truncate(rank);
            svd.v.truncate(rank * n_cols);
            return Ok(svd);
        }
        tried = (2 * tried).min(most);
    }
}

/// How many of the squares, the largest first, add up to `enough`; `None` when all
/// of them do not.
fn least_rank(squares: impl Iterator<Item = f64>, enough: f64) -> Option<usize> {
    let mut sum = 0.0;
    let mut sums = squares.map(|square| {
        sum += square;
        sum
    });
    sums.position(|sum| sum >= enough).map(|last| last + 1)
}

/// The sum of the squared weights, rows in their order.
fn sum_of_squares(delta: &dyn DeltaSource) -> Result<f64> {
    let [n_rows, n_cols] = delta.shape();
    let mut sums = vec![0.0; n_rows];
    for_each_block(delta, (&mut sums, 1), (&mut vec![(); n_rows], 1), |block, sums, _| {
        for (sum, row) in sums.iter_mut().zip(block.data().chunks(n_cols)) {
            *sum = row.iter().map(|w| f64::from(*w).powi(2)).sum();
        }
    })?;
    Ok(sums.iter().sum())
}

/// The rank of the option `rank` or, where it is 0, the greatest at which two factors
/// of 16-bit elements take no more than the bits per weight of the option `bits`:
/// `bits · m · n / (16 · (m + n))`, computed in f64 in this order. At least 1, no more
/// than the matrix has and, where it is empty, 0.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn rank(options: &Options, shape: [usize; 2]) -> usize {
    let [m, n] = shape.map(|n| n as f64);
    let rank = match options.int("rank") {
        0 => (options.number("bits") * m * n / (16.0 * (m + n))).floor() as usize,
        rank => rank,
    };
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

    /// A matrix with these singular values, along axes of its own.
    fn with_values(values: &[f32], [n_rows, n_cols]: [usize; 2]) -> Vec<f32> {
        let mut data = vec![0.0; n_rows * n_cols];
        for (i, value) in values.iter().enumerate() {
            data[(n_rows - 1 - i) * n_cols + i] = *value;
        }
        data
    }

    fn encoded(options: &str, data: &[f32], [n_rows, n_cols]: [usize; 2]) -> EncodedDelta {
        let spec: CodecSpec = format!("low-rank:{options}").parse().unwrap();
        spec.encode(&MatrixRef::new(data, n_rows, n_cols).unwrap()).unwrap()
    }

    fn rank_of(delta: &EncodedDelta) -> usize {
        let [u, v] = [U, V].map(|name| delta.parts[name].shape());
        assert_eq!(u[1], v[0]);
        u[1]
    }

    /// Squares 16, 4, 4 and 1 of 25: shares of .64, .8, .96 and 1.
    #[test]
    fn an_energy_takes_the_least_rank_that_holds_it() {
        for shape in [[30, 50], [50, 30]] {
            let data = with_values(&[4.0, 2.0, 2.0, 1.0], shape);
            for (energy, expected) in
                [("0.01", 1), ("0.63", 1), ("0.65", 2), ("0.79", 2), ("0.81", 3), ("0.97", 4)]
            {
                for svd in ["full", "randomized"] {
                    let options = format!("energy={energy},svd={svd}");
                    let delta = encoded(&options, &data, shape);
                    assert_eq!(rank_of(&delta), expected, "{shape:?} {options}");
                }
            }
        }
    }

    /// More directions than the first range has.
    #[test]
    fn random_ranges_grow_until_they_hold_the_energy() {
        let shape = [150, 140];
        let data = with_values(&[1.0; 100], shape);
        let full = rank_of(&encoded("energy=0.495", &data, shape));
        let randomized = rank_of(&encoded("energy=0.495,svd=randomized", &data, shape));
        assert_eq!(full, 50);
        assert!((50..=64).contains(&randomized), "{randomized}");
    }

    #[test]
    fn an_energy_goes_before_a_rank_and_a_rank_before_bits() {
        let shape = [40, 60];
        let data = with_values(&[4.0, 2.0, 2.0, 1.0], shape);
        assert_eq!(rank_of(&encoded("bits=16,rank=7", &data, shape)), 7);
        assert_eq!(rank_of(&encoded("bits=16,rank=7,energy=0.9", &data, shape)), 3);
    }

    /// All directions, so that only the rounding of the factors is lost.
    #[test]
    fn a_rank_above_the_matrix_keeps_everything() {
        let mut rng = stream(8, "w", 0);
        for shape @ [n_rows, n_cols] in [[20, 30], [30, 20], [1, 25]] {
            let data: Vec<f32> =
                (0..n_rows * n_cols).map(|_| StandardNormal.sample(&mut rng)).collect();
            let power: f64 = data.iter().map(|w| f64::from(*w).powi(2)).sum();
            for options in ["rank=65535", "energy=1"] {
                let delta = encoded(options, &data, shape);
                assert_eq!(rank_of(&delta), n_rows.min(n_cols));
                let spec: CodecSpec = format!("low-rank:{options}").parse().unwrap();
                let decoded = decode(&*spec.prepare(delta).unwrap());
                let lost: f64 = data
                    .iter()
                    .zip(&decoded)
                    .map(|(w, d)| (f64::from(*w) - f64::from(*d)).powi(2))
                    .sum();
                assert!(lost < 2e-5 * power, "{shape:?} {options}: {lost}");
            }
        }
    }

    #[test]
    fn no_delta_has_the_least_rank_of_any_energy() {
        for options in ["energy=0.9", "energy=1", "energy=0.9,svd=randomized"] {
            let delta = encoded(options, &[0.0; 600], [20, 30]);
            assert_eq!(rank_of(&delta), 1, "{options}");
            assert_eq!(rank_of(&encoded(options, &[], [0, 30])), 0, "{options}");
        }
    }

    /// The parts say the rank, but not any rank.
    #[test]
    fn a_rank_that_the_matrix_cannot_have_is_refused() {
        let spec: CodecSpec = "low-rank:energy=0.5".parse().unwrap();
        let of_rank = |rank: usize| {
            let zeros = |n| onebase_tensor::PartData::BF16(vec![half::bf16::ZERO; n]);
            let (u, v) = (zeros(4 * rank), zeros(rank * 6));
            EncodedDelta::new([4, 6], [(U, vec![4, rank], u), (V, vec![rank, 6], v)])
        };
        assert!((1..=4).all(|rank| spec.prepare(of_rank(rank)).is_ok()));
        assert!([0, 5, 100].into_iter().all(|rank| spec.prepare(of_rank(rank)).is_err()));
    }
}
