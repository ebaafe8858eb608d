//! Asymmetric grids of a few bits for numbers that are known only when they come: activations,
//! keys and values (ResQ, arXiv 2412.14363, section 5.1, with the range of per-token quantizers
//! in its code).
//!
//! Plain code that kernels inline: its results are the same on every backend.

use crate::vector::LANES;

/// From here on the numbers of f32 are one apart.
const WHOLE: f32 = 8_388_608.0;

/// The range of numbers and zero. Neither end is a number when one of them is not finite.
#[inline(always)]
pub(crate) fn range(x: &[f32]) -> [f32; 2] {
    let mut low = [0.0f32; LANES];
    let mut high = [0.0f32; LANES];
    // Zero, unless there is an infinity or no number.
    let mut poison = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    for chunk in chunks.iter().chain([&last]) {
        for (lane, v) in chunk.iter().enumerate() {
            low[lane] = if *v < low[lane] { *v } else { low[lane] };
            high[lane] = if *v > high[lane] { *v } else { high[lane] };
            poison[lane] += v * 0.0;
        }
    }
    let poison: f32 = poison.iter().sum();
    let low = low.iter().fold(0.0, |all: f32, v| all.min(*v));
    let high = high.iter().fold(0.0, |all: f32, v| all.max(*v));
    [low + poison, high + poison]
}

/// The step of `top + 1` codes over a range; that of the range `[−1, 1]` where it is empty.
#[inline(always)]
pub(crate) fn step([low, high]: [f32; 2], top: f32) -> f32 {
    let [low, high] = if low == 0.0 && high == 0.0 { [-1.0, 1.0] } else { [low, high] };
    let width = high - low;
    let step = if width == f32::INFINITY { high / top - low / top } else { width / top };
    // Below the smallest normal number quotients by the step lose what makes them fit.
    if step < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { step }
}

/// The code of zero for a step of a range.
#[inline(always)]
pub(crate) fn zero_point([low, high]: [f32; 2], step: f32, top: f32) -> f32 {
    let low = if low == 0.0 && high == 0.0 { -1.0 } else { low };
    let zero = (-low / step).round_ties_even();
    // Not `clamp`, which keeps what is not a number.
    zero.max(0.0).min(top)
}

/// Codes of numbers: `round(x / step) + zero`, from 0 to `top`.
#[inline(always)]
pub(crate) fn codes(x: &[f32], step: f32, zero: f32, top: f32, codes: &mut [u8]) {
    for (v, to) in x.iter().zip(codes) {
        let code = (v / step).round_ties_even() + zero;
        // What is not a number becomes zero.
        let code = if code > 0.0 { code } else { 0.0 };
        let code = if code < top { code } else { top };
        // The lowest bits of a sum with a power of two that leaves no fraction.
        #[allow(clippy::cast_possible_truncation)]
        {
            *to = (code + WHOLE).to_bits() as u8;
        }
    }
}
