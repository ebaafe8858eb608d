//! Asymmetric grids of a few bits for numbers that are known only when they come: activations,
//! keys and values (ResQ, arXiv 2412.14363, section 5.1, with the range of per-token quantizers
//! in its code).
//!
//! Plain code that kernels inline: its results are the same on every backend.

use crate::vector::LANES;

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
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (to, to_rest) = codes.split_at_mut(chunks.len() * LANES);
    for (chunk, to) in chunks.iter().zip(to.as_chunks_mut::<LANES>().0) {
        for (v, to) in chunk.iter().zip(to) {
            *to = code(*v, step, zero, top);
        }
    }
    for (v, to) in rest.iter().zip(to_rest) {
        *to = code(*v, step, zero, top);
    }
}

#[inline(always)]
fn code(x: f32, step: f32, zero: f32, top: f32) -> u8 {
    let code = ((x / step).round_ties_even() + zero).clamp(0.0, top);
    // At most 255 by the clamp, and what is not a number becomes zero.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    {
        code as i32 as u8
    }
}
