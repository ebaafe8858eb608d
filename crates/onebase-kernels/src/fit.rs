//! Least-squares scales and codes for one row.

use half::bf16;
use onebase_tensor::saturating_bf16;

use crate::Backend;
use crate::lowbit::MAX_BITS;
use crate::vector::{Kernel, LANES, Lanes, plane_bytes};

/// Half the step of the uniform mid-rise quantizer with `2^bits` levels that is
/// best for a unit Gaussian, bits one to eight (J. Max, "Quantizing for minimum
/// distortion", IRE Trans. Inf. Theory 1960, table II; continued for more
/// levels by the same minimisation).
const GAUSSIAN_HALF_STEP: [f32; MAX_BITS] =
    [0.797_9, 0.497_8, 0.293_0, 0.167_6, 0.094_1, 0.052_0, 0.028_4, 0.015_4];

/// Fractions of the largest magnitude that the outermost level is started from.
const CLIPS: [f32; 3] = [1.0, 0.85, 0.7];

/// Times that scale and codes are fitted to each other from each start.
const ROUNDS: usize = 5;

impl Backend {
    /// Codes a row of `in_features` weights in groups: the grid of
    /// [`crate::LowBit`], each group's scale fitted to its weights by least
    /// squares.
    ///
    /// For given codes the best scale is `Σ level·w / Σ level²`, for a given
    /// scale the best code is the nearest: from each of several starts (the best
    /// grid for a Gaussian of the group's power, and clipped ranges) the two are
    /// alternated, and the start that ends at the smallest squared error is
    /// kept. The scale is then rounded to bf16 and the codes taken for the
    /// rounded one. The bytes do not depend on the backend.
    ///
    /// `codes` is `[bits, plane_bytes(in_features)]`, `scale` is
    /// `[ceil(in_features / group_size)]`; both are overwritten. Panics when
    /// they have other lengths.
    pub fn fit_low_bit(
        self,
        row: &[f32],
        bits: usize,
        group_size: usize,
        codes: &mut [u8],
        scale: &mut [bf16],
    ) {
        assert!((1..=MAX_BITS).contains(&bits), "bits");
        assert!(group_size > 0 && group_size.is_multiple_of(LANES), "group size");
        assert_eq!(codes.len(), bits * plane_bytes(row.len()), "codes");
        assert_eq!(scale.len(), row.len().div_ceil(group_size), "scales");
        // SAFETY: the kernel is safe code.
        unsafe { self.run(Fit { row, grid: Grid::new(bits), group_size, codes, scale }) }
    }
}

struct Fit<'a> {
    row: &'a [f32],
    grid: Grid,
    group_size: usize,
    codes: &'a mut [u8],
    scale: &'a mut [bf16],
}

impl Kernel for Fit<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let plane = plane_bytes(self.row.len());
        self.codes.fill(0);
        for (index, group) in self.row.chunks(self.group_size).enumerate() {
            let mut scale = saturating_bf16(self.grid.best_scale(group));
            if !(scale.to_f32() * self.grid.top).is_finite() {
                // Rounded up past what the outermost level can hold.
                scale = bf16::from_bits(scale.to_bits() - 1);
            }
            self.scale[index] = scale;
            let first_byte = index * self.group_size / 8;
            let per_step = self.grid.per_step(scale.to_f32());
            for (chunk_index, chunk) in group.chunks(LANES).enumerate() {
                let mut planes = [0u16; MAX_BITS];
                for (lane, w) in chunk.iter().enumerate() {
                    // At most 255 by the clamp.
                    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                    let code = self.grid.code(*w, per_step) as u16;
                    for (p, bits) in planes.iter_mut().enumerate() {
                        *bits |= (code >> p & 1) << lane;
                    }
                }
                let at = first_byte + chunk_index * (LANES / 8);
                for (p, bits) in planes.iter().take(self.grid.bits).enumerate() {
                    let at = p * plane + at;
                    self.codes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
                }
            }
        }
    }
}

/// A symmetric mid-rise grid: codes `0 ..= top`, levels `2 code − top`.
#[derive(Clone, Copy)]
struct Grid {
    bits: usize,
    top: f32,
    middle: f32,
}

impl Grid {
    #[allow(clippy::cast_precision_loss)]
    fn new(bits: usize) -> Self {
        Self { bits, top: ((1u32 << bits) - 1) as f32, middle: (1u32 << (bits - 1)) as f32 }
    }

    /// The factor from a weight to steps of the grid; zero for a scale so small
    /// that the factor would not be finite.
    #[inline(always)]
    fn per_step(self, scale: f32) -> f32 {
        let factor = 0.5 / scale;
        if factor.is_finite() { factor } else { 0.0 }
    }

    #[inline(always)]
    fn code(self, weight: f32, per_step: f32) -> f32 {
        ((weight * per_step).floor() + self.middle).clamp(0.0, self.top)
    }

    #[inline(always)]
    fn level(self, weight: f32, per_step: f32) -> f32 {
        2.0 * self.code(weight, per_step) - self.top
    }

    /// The least-squares scale for the codes that `scale` gives.
    #[inline(always)]
    fn refit(self, group: &[f32], scale: f32) -> f32 {
        let per_step = self.per_step(scale);
        let [dot, square] = lane_sums(group, |w| {
            let level = self.level(w, per_step);
            [level * w, level * level]
        });
        if square > 0.0 { dot / square } else { 0.0 }
    }

    #[inline(always)]
    fn squared_error(self, group: &[f32], scale: f32) -> f32 {
        let per_step = self.per_step(scale);
        let [error, _] = lane_sums(group, |w| {
            let residual = w - scale * self.level(w, per_step);
            [residual * residual, 0.0]
        });
        error
    }

    #[inline(always)]
    fn best_scale(self, group: &[f32]) -> f32 {
        let max = group.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        if max == 0.0 {
            return 0.0;
        }
        // Relative to the largest, so that no square under- or overflows.
        let [power, _] = lane_sums(group, |w| [(w / max) * (w / max), 0.0]);
        #[allow(clippy::cast_precision_loss)]
        let rms = max * (power / group.len() as f32).sqrt();
        // What stays where the weights are so large that their squares overflow.
        let mut best = (f32::INFINITY, max / self.top);
        let starts = CLIPS.map(|clip| clip * max / self.top);
        for start in starts.into_iter().chain([GAUSSIAN_HALF_STEP[self.bits - 1] * rms]) {
            let mut scale = start;
            for _ in 0..ROUNDS {
                scale = self.refit(group, scale);
            }
            let error = self.squared_error(group, scale);
            if error < best.0 {
                best = (error, scale);
            }
        }
        best.1
    }
}

/// Two sums over a group, each in sixteen lanes that are then added in order.
#[inline(always)]
fn lane_sums(group: &[f32], term: impl Fn(f32) -> [f32; 2]) -> [f32; 2] {
    let mut lanes = [[0.0f32; LANES]; 2];
    let mut chunks = group.chunks_exact(LANES);
    for chunk in chunks.by_ref() {
        for (i, w) in chunk.iter().enumerate() {
            let [a, b] = term(*w);
            lanes[0][i] += a;
            lanes[1][i] += b;
        }
    }
    for (i, w) in chunks.remainder().iter().enumerate() {
        let [a, b] = term(*w);
        lanes[0][i] += a;
        lanes[1][i] += b;
    }
    lanes.map(|lane| lane.iter().sum())
}
