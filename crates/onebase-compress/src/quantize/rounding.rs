//! Weights in 4- and 8-bit codes with a scale for each part of a row (ResQ, section 5.1;
//! its program's `WeightQuantizer` and `gptq_utils.py`).

use half::f16;
use onebase_codec::numerics::{ColumnOrder, DAMPING, Grid, HessianFactor, gptq};
use onebase_kernels::{Mixed, Parts, low_bytes, pack_low};
use rayon::prelude::*;

use crate::{Error, Result};

/// How weights are rounded, scales being those that fit the weights best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest.
    Nearest,
    /// One column after the other, those that follow making good the error of each (GPTQ).
    Gptq,
}

impl Rounding {
    /// `rtn` or `gptq`.
    pub fn name(self) -> &'static str {
        match self {
            Rounding::Nearest => "rtn",
            Rounding::Gptq => "gptq",
        }
    }
}

/// Candidates for the scale of a row: parts of that which clips nothing, down to a fifth.
const SHRINKS: usize = 80;

/// Of them to one.
const SHRINK_GRID: f32 = 100.0;

/// The largest weight of a row counts as at least this.
const LEAST: f32 = 1e-5;

/// The spacing of floats of this size is 1.
const WHOLE: f32 = 12_582_912.0;

/// Bits of codes, those of low inputs first.
const BITS: [u32; 2] = [4, 8];

/// A matrix in codes.
pub(super) struct Codes {
    parts: Parts,
    pub(super) low: Vec<u8>,
    pub(super) high: Vec<u8>,
    pub(super) low_scale: Vec<f16>,
    pub(super) high_scale: Vec<f16>,
}

impl Codes {
    /// Rounds rows `[n, n_low + n_high]`; with `factor`, of the inputs' second moment, by GPTQ.
    pub(super) fn round(rows: &[f32], parts: Parts, factor: Option<&HessianFactor>) -> Self {
        let Parts { n_low, n_high } = parts;
        let n = n_low + n_high;
        let scales: Vec<[f32; 2]> = rows
            .par_chunks(n.max(1))
            .map(|row| {
                let (low, high) = row.split_at(n_low);
                [fit_scale(low, BITS[0]), fit_scale(high, BITS[1])]
            })
            .collect();
        let codes = match factor {
            Some(factor) => {
                gptq(rows, factor, &Grid::Signed { n_low, bits: BITS, scales: &scales }).codes
            }
            None => nearest(rows, n_low, n, &scales),
        };
        let mut low = vec![0; scales.len() * low_bytes(n_low)];
        let mut high = vec![0; scales.len() * n_high];
        if n_low > 0 {
            let packed = low.par_chunks_mut(low_bytes(n_low)).zip(codes.par_chunks(n));
            packed.for_each(|(out, codes)| pack_low(&codes[..n_low], out));
        }
        if n_high > 0 {
            high.par_chunks_mut(n_high).zip(codes.par_chunks(n)).for_each(|(out, codes)| {
                // From 0 … 255 to the bytes of −128 … 127.
                out.iter_mut().zip(&codes[n_low..]).for_each(|(out, code)| *out = code ^ 0x80);
            });
        }
        let of = |part: usize, n: usize| -> Vec<f16> {
            let scales = scales.iter().map(|scales| f16::from_f32(scales[part]));
            if n == 0 { Vec::new() } else { scales.collect() }
        };
        Self { parts, low, high, low_scale: of(0, n_low), high_scale: of(1, n_high) }
    }

    /// What a product reads.
    pub(super) fn as_mixed(&self) -> Mixed<'_> {
        Mixed {
            low: &self.low,
            high: &self.high,
            low_scale: &self.low_scale,
            high_scale: &self.high_scale,
            sums: &[],
            n_low: self.parts.n_low,
            n_high: self.parts.n_high,
        }
    }
}

/// The factor of a second moment with which GPTQ rounds, columns in their own order: those of 8
/// bits, which have most of the variance, are last and make good the errors of the others.
pub(super) fn factor(moment: &[f64], n: usize) -> Result<HessianFactor> {
    HessianFactor::new(moment, n, ColumnOrder::Index, DAMPING).map_err(Error::Numerics)
}

/// Codes of the nearest values, `2^(bits − 1)` for zero.
fn nearest(rows: &[f32], n_low: usize, n: usize, scales: &[[f32; 2]]) -> Vec<u8> {
    let mut codes = vec![0; rows.len()];
    let all = codes.par_chunks_mut(n.max(1)).zip(rows.par_chunks(n.max(1))).zip(scales);
    all.for_each(|((codes, row), scales)| {
        for (column, (code, w)) in codes.iter_mut().zip(row).enumerate() {
            let part = usize::from(column >= n_low);
            let half = half(BITS[part]);
            let rounded = (w / scales[part]).round_ties_even().clamp(-half, half - 1.0) + half;
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            {
                *code = rounded as u8;
            }
        }
    });
    codes
}

#[allow(clippy::cast_precision_loss)]
fn half(bits: u32) -> f32 {
    (1u32 << (bits - 1)) as f32
}

/// The scale of a part of a row, as f16 has it, that leaves the least `Σ |w − q|^2.4`
/// (`WeightQuantizer`: norm 2.4, grid 100, maximal shrinking .8).
fn fit_scale(weights: &[f32], bits: u32) -> f32 {
    let most = weights.iter().fold(0f32, |most, w| most.max(w.abs())).max(LEAST);
    let half = half(bits);
    let mut best = (f64::INFINITY, 0.0);
    for shrink in 0..SHRINKS {
        #[allow(clippy::cast_precision_loss)]
        let part = 1.0 - shrink as f32 / SHRINK_GRID;
        let scale = f16::from_f32((part * most / (half - 1.0)).min(f16::MAX.to_f32())).to_f32();
        if scale > 0.0
            && let Some(error) = error_below(weights, scale, half, best.0)
        {
            best = (error, scale);
        }
    }
    // The smallest of all scales where all weights are too small for any.
    if best.1 > 0.0 { best.1 } else { f16::from_bits(1).to_f32() }
}

/// `Σ |w − q|^2.4`, if it is less than `bound`.
fn error_below(weights: &[f32], scale: f32, half: f32, bound: f64) -> Option<f64> {
    const LANES: usize = 16;
    let inverse = 1.0 / scale;
    let mut sum = 0.0;
    for block in weights.chunks(16 * LANES) {
        let mut sums = [0f32; LANES];
        for lanes in block.chunks(LANES) {
            for (sum, w) in sums.iter_mut().zip(lanes) {
                // Adding and taking off rounds to whole numbers, in vectors of any processor.
                let code = (w * inverse + WHOLE) - WHOLE;
                *sum += power(w * inverse - code.clamp(-half, half - 1.0));
            }
        }
        sum += f64::from(sums.iter().sum::<f32>());
        if sum * f64::from(scale).powf(2.4) >= bound {
            return None;
        }
    }
    Some(sum * f64::from(scale).powf(2.4))
}

/// About `|x|^2.4`: `x²` times `(x²)^0.2`, the latter within a part in ten thousand.
fn power(x: f32) -> f32 {
    let square = x * x;
    // Of a float's bits, a straight line through the logarithm; two steps of Newton's for the
    // fifth root then.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let guess = f32::from_bits((square.to_bits() as f32 * 0.2 + 852_000_000.0) as u32);
    let step = |y: f32| {
        let fourth = (y * y) * (y * y);
        0.8 * y + 0.2 * square / fourth
    };
    square * step(step(guess))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_power_is_close() {
        for x in [1e-6f32, 0.001, 0.1, 0.3, 0.5, 1.0, 7.5, 130.0] {
            let (got, expected) = (f64::from(power(x)), f64::from(x).powf(2.4));
            assert!((got / expected - 1.0).abs() < 1e-4, "{x}: {got}, expected {expected}");
        }
        assert_eq!(power(0.0), 0.0);
    }

    #[test]
    fn codes_stand_for_the_nearest_values() {
        let parts = Parts { n_low: 5, n_high: 3 };
        let rows = [
            [0.7, -0.8, 0.1, 0.0, 0.35, 1.0, -1.27, 0.003],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
        .concat();
        let codes = Codes::round(&rows, parts, None);
        let mut got = vec![0.0; 8];
        for (row, expected) in rows.chunks(8).enumerate() {
            codes.as_mixed().write_row(row, &mut got);
            for (column, (got, w)) in got.iter().zip(expected).enumerate() {
                let scale = if column < 5 { codes.low_scale[row] } else { codes.high_scale[row] };
                let bound = scale.to_f32() * if *w == -0.8 { 1.5 } else { 0.501 };
                assert!((got - w).abs() <= bound, "{row}, {column}: {got} for {w}");
            }
        }
    }
}
