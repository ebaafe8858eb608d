//! Keys and values in codes, and attention over them.

use half::f16;

use crate::Backend;
use crate::attention::dot;
use crate::quantize::{codes, range, step, zero_point};
use crate::vector::{Kernel, LANES, Lanes};

/// Bytes of a part's scale, f16, and zero point.
const GRID_BYTES: usize = 3;

/// How a head's key or value at one position is packed.
///
/// First the codes of the low features, two 4-bit ones a byte (that of feature `i` in the low
/// half, that of `i + n_low / 2` in the high one) or one of 8 bits; then those of the high ones;
/// then, for each part that has features, its scale, f16, and its zero point, a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedFormat {
    /// Features in low codes, an even number where those have 4 bits.
    pub n_low: usize,
    /// Features in 8-bit codes, the last ones.
    pub n_high: usize,
    /// 4 or 8.
    pub low_bits: u32,
}

/// Query heads against the packed keys and values that they share.
#[derive(Clone, Copy, Debug)]
pub struct PackedAttention<'a> {
    /// `[n_queries, head_dim]`.
    pub queries: &'a [f32],
    /// The first position that each query sees, counted from the first of the chunks.
    pub firsts: &'a [usize],
    /// The position after the last that it sees.
    pub limits: &'a [usize],
    /// Whole packed rows, position after position.
    pub keys: &'a [&'a [u8]],
    /// As many rows in each chunk as the keys have.
    pub values: &'a [&'a [u8]],
    /// Of keys and values.
    pub format: PackedFormat,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl PackedFormat {
    /// Features of a head.
    pub fn head_dim(self) -> usize {
        self.n_low + self.n_high
    }

    /// Bytes of the low codes.
    fn low_bytes(self) -> usize {
        if self.low_bits == 4 { self.n_low / 2 } else { self.n_low }
    }

    /// Bytes of a packed row.
    pub fn row_bytes(self) -> usize {
        let grids = usize::from(self.n_low > 0) + usize::from(self.n_high > 0);
        self.low_bytes() + self.n_high + grids * GRID_BYTES
    }

    /// Packs a row: codes asymmetric over the range of each part and zero (ResQ, section 5.1),
    /// for the scale that is stored, which is rounded up.
    ///
    /// Panics when the lengths are not those of the format.
    pub fn pack(self, x: &[f32], out: &mut [u8]) {
        assert_eq!([x.len(), out.len()], [self.head_dim(), self.row_bytes()], "a packed row");
        let (low, high) = x.split_at(self.n_low);
        let (codes, grids) = out.split_at_mut(self.low_bytes() + self.n_high);
        let (low_codes, high_codes) = codes.split_at_mut(self.low_bytes());
        let mut grids = grids.chunks_exact_mut(GRID_BYTES);
        if self.n_low > 0
            && let Some(stored) = grids.next()
        {
            if self.low_bits == 4 {
                let mut wide = vec![0; self.n_low];
                write_codes(low, 15.0, &mut wide, stored);
                let (first, second) = wide.split_at(self.n_low / 2);
                for ((code, a), b) in low_codes.iter_mut().zip(first).zip(second) {
                    *code = a | b << 4;
                }
            } else {
                write_codes(low, 255.0, low_codes, stored);
            }
        }
        if self.n_high > 0
            && let Some(stored) = grids.next()
        {
            write_codes(high, 255.0, high_codes, stored);
        }
    }

    /// The values of a packed row.
    ///
    /// Panics when the lengths are not those of the format.
    #[inline(always)]
    pub fn unpack(self, row: &[u8], out: &mut [f32]) {
        assert_eq!([row.len(), out.len()], [self.row_bytes(), self.head_dim()], "a packed row");
        let (codes, grids) = row.split_at(self.low_bytes() + self.n_high);
        let (low_codes, high_codes) = codes.split_at(self.low_bytes());
        let (low, high) = out.split_at_mut(self.n_low);
        let mut grids = grids.chunks_exact(GRID_BYTES);
        if self.n_low > 0
            && let Some([scale, zero]) = grids.next().map(read_grid)
        {
            if self.low_bits == 4 {
                let (first, second) = low.split_at_mut(self.n_low / 2);
                for ((code, a), b) in low_codes.iter().zip(first).zip(second) {
                    *a = scale * (f32::from(code & 15) - zero);
                    *b = scale * (f32::from(code >> 4) - zero);
                }
            } else {
                for (code, v) in low_codes.iter().zip(low) {
                    *v = scale * (f32::from(*code) - zero);
                }
            }
        }
        if self.n_high > 0
            && let Some([scale, zero]) = grids.next().map(read_grid)
        {
            for (code, v) in high_codes.iter().zip(high) {
                *v = scale * (f32::from(*code) - zero);
            }
        }
    }
}

/// Codes of a part, and its grid as it is stored.
fn write_codes(x: &[f32], top: f32, out: &mut [u8], stored: &mut [u8]) {
    let ends = range(x);
    let scale = round_up(step(ends, top));
    let step = scale.to_f32();
    let zero = zero_point(ends, step, top);
    codes(x, step, zero, top, out);
    stored[..2].copy_from_slice(&scale.to_le_bytes());
    // From 0 to `top`, at most 255.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    {
        stored[2] = zero as u8;
    }
}

/// The least f16 that is no smaller, but neither zero nor ∞; not a number where it is none.
fn round_up(step: f32) -> f16 {
    let nearest = f16::from_f32(step);
    if nearest.is_nan() {
        return nearest;
    }
    let bits = if nearest.to_f32() < step { nearest.to_bits() + 1 } else { nearest.to_bits() };
    f16::from_bits(bits.clamp(1, f16::MAX.to_bits()))
}

/// The scale and the zero point of a part.
#[inline(always)]
fn read_grid(stored: &[u8]) -> [f32; 2] {
    [f16::from_le_bytes([stored[0], stored[1]]).to_f32(), f32::from(stored[2])]
}

impl Backend {
    /// For each query, what [`Backend::attend`] gives with the values of the packed rows that it
    /// sees, to the bit: a row is expanded once for all queries. `out` is
    /// `[n_queries, head_dim]`, overwritten. `scratch` grows as needed.
    ///
    /// Panics when the shapes do not fit each other, or a query sees no position or one that is
    /// not there.
    pub fn attend_packed(
        self,
        attention: PackedAttention<'_>,
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let PackedAttention { queries, firsts, limits, keys, values, format, .. } = attention;
        let (head_dim, row_bytes) = (format.head_dim(), format.row_bytes());
        assert!(head_dim > 0 && out.len() == queries.len(), "head size");
        assert_eq!(queries.len(), firsts.len() * head_dim, "queries");
        assert_eq!(firsts.len(), limits.len(), "positions");
        assert_eq!(keys.len(), values.len(), "chunks");
        let mut n_positions = 0;
        for (keys, values) in keys.iter().zip(values) {
            assert!(keys.len().is_multiple_of(row_bytes), "keys");
            assert_eq!(keys.len(), values.len(), "keys and values");
            n_positions += keys.len() / row_bytes;
        }
        let seen = |(first, limit): (&usize, &usize)| first < limit && *limit <= n_positions;
        assert!(firsts.iter().zip(limits).all(seen), "positions of the queries");
        // SAFETY: the lengths were checked.
        unsafe { self.run(AttendPacked { attention, n_positions, scratch, out }) }
    }
}

struct AttendPacked<'a> {
    attention: PackedAttention<'a>,
    n_positions: usize,
    scratch: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl Kernel for AttendPacked<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let PackedAttention { queries, firsts, limits, keys, values, format, scale } =
            self.attention;
        let (head_dim, row_bytes) = (format.head_dim(), format.row_bytes());
        let (n, n_queries) = (self.n_positions, firsts.len());
        self.scratch.clear();
        self.scratch.resize(n_queries * n + head_dim, 0.0);
        let (scores, row) = self.scratch.split_at_mut(n_queries * n);
        // Loops and not closures, as in `load_rows`.
        let mut position = 0;
        for keys in keys {
            for key in keys.chunks_exact(row_bytes) {
                format.unpack(key, row);
                for (query, values) in queries.chunks_exact(head_dim).enumerate() {
                    if firsts[query] <= position && position < limits[query] {
                        // SAFETY: both slices have `head_dim` elements.
                        scores[query * n + position] = scale * unsafe { dot::<V>(values, row) };
                    }
                }
                position += 1;
            }
        }
        let mut norms = Vec::with_capacity(n_queries);
        for query in 0..n_queries {
            let scores = &mut scores[query * n + firsts[query]..query * n + limits[query]];
            let max = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
            let mut total = 0.0;
            for score in scores.iter_mut() {
                *score = (*score - max).exp();
                total += *score;
            }
            norms.push(1.0 / total);
        }
        self.out.fill(0.0);
        let whole = head_dim - head_dim % LANES;
        let mut position = 0;
        for values in values {
            for value in values.chunks_exact(row_bytes) {
                format.unpack(value, row);
                for (query, out) in self.out.chunks_exact_mut(head_dim).enumerate() {
                    if position < firsts[query] || position >= limits[query] {
                        continue;
                    }
                    let p = scores[query * n + position];
                    for at in (0..whole).step_by(LANES) {
                        // SAFETY: `at + LANES` is within `row` and `out`.
                        unsafe {
                            let out = out.as_mut_ptr().add(at);
                            V::load(row.as_ptr().add(at))
                                .mul_add(V::splat(p), V::load(out))
                                .store(out);
                        }
                    }
                    for at in whole..head_dim {
                        out[at] += row[at] * p;
                    }
                }
                position += 1;
            }
        }
        for (out, norm) in self.out.chunks_exact_mut(head_dim).zip(norms) {
            out.iter_mut().for_each(|out| *out *= norm);
        }
    }
}
