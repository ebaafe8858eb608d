//! Products of integers: weights of four and eight bits with inputs that are quantized as they
//! come, and the same weights with inputs in f32.
//!
//! Sums of integers are exact, so their order is free and every backend gives the same bits.

mod mixed;
mod product;
mod rows;

use half::f16;
use rayon::prelude::*;

pub use rows::QuantizedRows;

use crate::bytes::LINE;

/// Inputs of a block of low codes, two in a byte.
const BLOCK: usize = 2 * LINE;

/// Most inputs of a part: sums of as many products of bytes fit 32 bits.
const MAX_INPUTS: usize = 1 << 16;

/// What is in the high nibble of the last byte of a row with an odd number of low inputs.
const PADDING: u8 = 8;

/// Inputs of a site, those with low codes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Inputs whose weights have codes of four bits.
    pub n_low: usize,
    /// Inputs whose weights have codes of eight bits.
    pub n_high: usize,
}

impl Parts {
    /// Of both parts.
    pub fn n_inputs(self) -> usize {
        self.n_low + self.n_high
    }

    /// Lines of a row of bytes in the order that products read them in: for each block of low
    /// inputs those of the low nibbles, then those of the high ones; then the high inputs.
    fn lines(self) -> [usize; 2] {
        [2 * self.n_low.div_ceil(BLOCK), self.n_high.div_ceil(LINE)]
    }
}

/// A matrix `[out_features, n_low + n_high]` of symmetric codes with two scales a row: four bits
/// for the first `n_low` inputs, eight for the others (ResQ, arXiv 2412.14363, section 4.1).
///
/// The weight is `low_scale[out] · (u − 8)`, of codes `u` from 0 to 15, and
/// `high_scale[out] · c`, of signed bytes `c`.
#[derive(Clone, Copy, Debug)]
pub struct Mixed<'a> {
    /// `[out_features, low_bytes(n_low)]`, rows as [`pack_low`] writes them.
    pub low: &'a [u8],
    /// `[out_features, n_high]`, two's complement.
    pub high: &'a [u8],
    /// `[out_features]`; empty where there is no low input.
    pub low_scale: &'a [f16],
    /// `[out_features]`; empty where there is no high input.
    pub high_scale: &'a [f16],
    /// `[out_features]`: the sums of `u` and of `c`, see [`mixed_sums`].
    pub sums: &'a [[i32; 2]],
    /// Inputs with low codes, at most 65536.
    pub n_low: usize,
    /// Inputs with high codes, at most 65536.
    pub n_high: usize,
}

/// Bytes of a row of low codes.
pub const fn low_bytes(n_low: usize) -> usize {
    n_low.div_ceil(2)
}

/// Packs a row of codes from 0 to 15, two in a byte. A block of 128 inputs has 64 bytes: byte `i`
/// holds input `i` in its low nibble and input `i + 64` in its high one. A last block of `t`
/// inputs has `h = ceil(t / 2)`, with `i` and `i + h`; where `t` is odd, its last nibble holds 8,
/// which is weight zero.
///
/// Panics when `out` does not have [`low_bytes`] or a code is larger.
pub fn pack_low(codes: &[u8], out: &mut [u8]) {
    assert_eq!(out.len(), low_bytes(codes.len()), "bytes of low codes");
    assert!(codes.iter().all(|code| *code < 16), "low codes");
    for (codes, out) in codes.chunks(BLOCK).zip(out.chunks_mut(LINE)) {
        let (low, high) = codes.split_at(out.len());
        let high = high.iter().chain([&PADDING]);
        for ((byte, low), high) in out.iter_mut().zip(low).zip(high) {
            *byte = low | high << 4;
        }
    }
}

/// [`Mixed::sums`] of codes.
///
/// Panics when the lengths do not fit each other or a part has more than 65536 inputs.
pub fn mixed_sums(
    low: &[u8],
    high: &[u8],
    n_low: usize,
    n_high: usize,
    out_features: usize,
) -> Vec<[i32; 2]> {
    let row_bytes = check_codes(low, high, Parts { n_low, n_high }, out_features);
    let row = |out: usize| {
        let low = &low[out * row_bytes..(out + 1) * row_bytes];
        let both = low.iter().map(|byte| i32::from(byte & 15) + i32::from(byte >> 4));
        let padding = if n_low.is_multiple_of(2) { 0 } else { i32::from(low[row_bytes - 1] >> 4) };
        let high = &high[out * n_high..(out + 1) * n_high];
        let signed = high.iter().map(|byte| i32::from(byte.cast_signed()));
        [both.sum::<i32>() - padding, signed.sum()]
    };
    (0..out_features).into_par_iter().with_min_len(64).map(row).collect()
}

/// Gives the bytes of a row of low codes.
fn check_codes(low: &[u8], high: &[u8], parts: Parts, out_features: usize) -> usize {
    let row_bytes = low_bytes(parts.n_low);
    assert!(parts.n_low.max(parts.n_high) <= MAX_INPUTS, "inputs");
    assert_eq!(Some(low.len()), out_features.checked_mul(row_bytes), "low codes");
    assert_eq!(Some(high.len()), out_features.checked_mul(parts.n_high), "high codes");
    row_bytes
}

impl Mixed<'_> {
    /// Its inputs.
    pub fn parts(&self) -> Parts {
        Parts { n_low: self.n_low, n_high: self.n_high }
    }

    /// Writes a row of weights, `[n_low + n_high]`: products that are rounded once.
    ///
    /// Panics when there is no such row or `out` has another length.
    pub fn write_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.parts().n_inputs(), "weights of a row");
        let (low, high) = out.split_at_mut(self.n_low);
        if self.n_low > 0 {
            let scale = self.low_scale[row].to_f32();
            let bytes = low_bytes(self.n_low);
            let packed = &self.low[row * bytes..(row + 1) * bytes];
            for (packed, out) in packed.chunks(LINE).zip(low.chunks_mut(BLOCK)) {
                let (first, second) = out.split_at_mut(packed.len());
                for (out, byte) in first.iter_mut().zip(packed) {
                    *out = scale * (f32::from(byte & 15) - 8.0);
                }
                for (out, byte) in second.iter_mut().zip(packed) {
                    *out = scale * (f32::from(byte >> 4) - 8.0);
                }
            }
        }
        if self.n_high > 0 {
            let scale = self.high_scale[row].to_f32();
            let codes = &self.high[row * self.n_high..(row + 1) * self.n_high];
            for (out, code) in high.iter_mut().zip(codes) {
                *out = scale * f32::from(code.cast_signed());
            }
        }
    }

    fn check(&self, out_features: usize) {
        check_codes(self.low, self.high, self.parts(), out_features);
        let scales = |n_inputs: usize| if n_inputs > 0 { out_features } else { 0 };
        assert_eq!(self.low_scale.len(), scales(self.n_low), "low scales");
        assert_eq!(self.high_scale.len(), scales(self.n_high), "high scales");
    }

    /// Bytes of a row of codes.
    fn row_bytes(&self) -> usize {
        low_bytes(self.n_low) + self.n_high
    }
}
