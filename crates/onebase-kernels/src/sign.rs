//! `y += α (2 B x − Σ x)` for a matrix of signs.

use std::ops::Range;

use onebase_tensor::{MatrixMut, MatrixRef};

use crate::Backend;
use crate::parallel::{Output, for_each_task};
use crate::tiles::{Tiled, cover};
use crate::vector::{Kernel, LANES, Lanes, load_rows, load_tails, plane_bytes};

/// Vectors whose bits are one line of the cache.
const LINE_VECTORS: usize = 32;

/// Tiles that a single row's bits are asked for ahead.
const PREFETCH_TILES: usize = 4;

/// A sign matrix `[out_features, in_features]` with a scale per output feature:
/// the weight is `+scale` where the bit is set and `−scale` where it is not.
#[derive(Clone, Copy, Debug)]
pub struct Sign<'a> {
    /// One bit plane per row, [`plane_bytes`] each; padding bits are zero.
    pub bits: &'a [u8],
    /// `[out_features]`.
    pub scale: &'a [f32],
    /// Columns.
    pub in_features: usize,
}

impl Backend {
    /// `y += x Δᵀ`: `x` is `[n_rows, in_features]`, `y` is
    /// `[n_rows, out_features]`.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_sign(self, delta: Sign<'_>, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let [n_rows, in_features] = x.shape();
        let out_features = y.n_cols();
        assert_eq!(y.n_rows(), n_rows, "rows of x and y");
        assert_eq!(delta.in_features, in_features, "columns of the delta and of x");
        assert_eq!(delta.scale.len(), out_features, "scales");
        let row_bytes = plane_bytes(in_features);
        assert_eq!(Some(delta.bits.len()), out_features.checked_mul(row_bytes), "sign bits");
        let sums: Vec<f32> = (0..n_rows)
            // SAFETY: the kernel reads one slice.
            .map(|row| unsafe { self.run(Sum(x.row(row))) })
            .collect();
        let output = Output::new(y.data(), out_features);
        let work = out_features.saturating_mul(in_features).saturating_mul(n_rows);
        for_each_task(out_features, row_bytes, work, |outs| {
            // SAFETY: lengths were checked above, `outs` lies within
            // `out_features`, and no two tasks share an output feature.
            unsafe { self.run(Product { delta, x, sums: &sums, output, outs }) }
        });
    }
}

impl Backend {
    /// Packs the signs of a row, a bit set where the weight is positive, and
    /// returns the sum of magnitudes. `bits` has [`plane_bytes`] for the row and
    /// is overwritten. Neither depends on the backend.
    ///
    /// Panics when `bits` has another length.
    pub fn pack_signs(self, row: &[f32], bits: &mut [u8]) -> f64 {
        assert_eq!(bits.len(), plane_bytes(row.len()), "sign bits");
        // SAFETY: the kernel reads whole vectors of the row and a buffer.
        unsafe { self.run(Pack { row, bits }) }
    }
}

impl Backend {
    /// Takes `scale` off the weights of a row whose bit is set, and adds it to the
    /// others; a sum past the largest number becomes that. `bits` has
    /// [`plane_bytes`] for the row. The result does not depend on the backend.
    ///
    /// Panics when `bits` has another length.
    pub fn take_signs(self, bits: &[u8], scale: f32, row: &mut [f32]) {
        assert_eq!(bits.len(), plane_bytes(row.len()), "sign bits");
        // SAFETY: the kernel is safe code.
        unsafe { self.run(Take { bits, scale, row }) }
    }
}

struct Take<'a> {
    bits: &'a [u8],
    scale: f32,
    row: &'a mut [f32],
}

impl Kernel for Take<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let (chunks, tail) = self.row.as_chunks_mut::<LANES>();
        let (masks, last) = self.bits.as_chunks::<2>().0.split_at(chunks.len());
        for (chunk, mask) in chunks.iter_mut().zip(masks) {
            take(u16::from_le_bytes(*mask), self.scale, chunk);
        }
        if let [mask] = last {
            take(u16::from_le_bytes(*mask), self.scale, tail);
        }
    }
}

#[inline(always)]
fn take(mask: u16, scale: f32, weights: &mut [f32]) {
    for (lane, weight) in weights.iter_mut().enumerate() {
        let taken = if mask >> lane & 1 == 1 { scale } else { -scale };
        *weight = (*weight - taken).clamp(-f32::MAX, f32::MAX);
    }
}

struct Pack<'a> {
    row: &'a [f32],
    bits: &'a mut [u8],
}

impl Kernel for Pack<'_> {
    type Output = f64;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> f64 {
        let mut sums = [0.0f64; LANES];
        for (chunk, bits) in self.row.chunks(LANES).zip(self.bits.chunks_exact_mut(2)) {
            let mut tail = [0.0; LANES];
            let lanes: &[f32; LANES] = match chunk.try_into() {
                Ok(whole) => whole,
                Err(_) => {
                    tail[..chunk.len()].copy_from_slice(chunk);
                    &tail
                }
            };
            // SAFETY: the array has a vector's length.
            let positive = unsafe { V::load(lanes.as_ptr()).positive() };
            bits.copy_from_slice(&positive.to_le_bytes());
            for (sum, w) in sums.iter_mut().zip(lanes) {
                *sum += f64::from(w.abs());
            }
        }
        sums.iter().sum()
    }
}

/// The sum of a row in the order of the lanes.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> f32 {
        // SAFETY: whole vectors lie within the slice, the tail within a buffer.
        unsafe {
            let mut acc = V::splat(0.0);
            let mut chunks = self.0.chunks_exact(LANES);
            for chunk in chunks.by_ref() {
                acc = acc.mask_add(u16::MAX, V::load(chunk.as_ptr()));
            }
            let mut tail = [0.0; LANES];
            tail[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
            acc.mask_add(u16::MAX, V::load(tail.as_ptr())).sum()
        }
    }
}

struct Product<'a> {
    delta: Sign<'a>,
    x: MatrixRef<'a>,
    /// Sum of each row of `x`.
    sums: &'a [f32],
    output: Output,
    outs: Range<usize>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: `outs` and the rows are the product's.
        unsafe { cover::<V, Self, 8, 4>(&self, self.outs.clone(), self.x.n_rows()) }
    }
}

impl Tiled for Product<'_> {
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const B: usize>(&self, out: usize, row: usize) {
        let n = self.delta.in_features;
        let row_bytes = plane_bytes(n);
        let whole = n / LANES;
        // SAFETY: `out + R` and `row + B` are within the matrices, whose lengths
        // `add_sign` checked; a plane has two bytes for every vector of `x`, the
        // last one padded.
        unsafe {
            let bits = self.delta.bits.as_ptr().add(out * row_bytes);
            let x = self.x.data().as_ptr().add(row * n);
            let mut acc = [[V::splat(0.0); B]; R];
            for i in 0..whole {
                let xs = load_rows::<V, B>(x.add(i * LANES), n);
                for (r, acc) in acc.iter_mut().enumerate() {
                    if B == 1 && i % LINE_VECTORS == 0 {
                        // A tile's rows are few bytes; those of some tiles on are asked for.
                        V::prefetch(
                            bits.wrapping_add((r + PREFETCH_TILES * R) * row_bytes + 2 * i),
                        );
                    }
                    let m = mask(bits, row_bytes, r, i);
                    for (a, xv) in acc.iter_mut().zip(xs) {
                        *a = a.mask_add(m, xv);
                    }
                }
            }
            if whole * LANES < n {
                let xs = load_tails::<V, B>(self.x, row);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let m = mask(bits, row_bytes, r, whole);
                    for (a, xv) in acc.iter_mut().zip(xs) {
                        *a = a.mask_add(m, xv);
                    }
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                for (b, a) in acc.into_iter().enumerate() {
                    let twice = 2.0 * a.sum() - self.sums[row + b];
                    self.output.add(row + b, out + r, self.delta.scale[out + r] * twice);
                }
            }
        }
    }
}

/// The bits of vector `i` of row `r`.
///
/// # Safety
/// `bits` has rows of `row_bytes`, more than `r`, each longer than `2 i + 1`.
#[inline(always)]
unsafe fn mask(bits: *const u8, row_bytes: usize, r: usize, i: usize) -> u16 {
    // SAFETY: within the rows by the caller's promise.
    u16::from_le(unsafe { bits.add(r * row_bytes + 2 * i).cast::<u16>().read_unaligned() })
}
