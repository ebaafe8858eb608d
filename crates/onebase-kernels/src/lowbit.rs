//! `y += Δ x` for group-wise codes of one to eight bits.

use std::ops::Range;

use half::{bf16, f16};
use onebase_tensor::{MatrixMut, MatrixRef};

use crate::Backend;
use crate::parallel::{Output, for_each_task};
use crate::tiles::{Tiled, cover};
use crate::vector::{Kernel, LANES, Lanes, load_rows, load_tails, plane_bytes};

/// Widest code.
pub const MAX_BITS: usize = 8;

/// A matrix `[out_features, in_features]` of codes on a symmetric mid-rise grid:
/// the weight is `scale · (2 code − (2^bits − 1))`.
#[derive(Clone, Copy, Debug)]
pub struct LowBit<'a> {
    /// `[out_features, bits, plane_bytes]`: the bit planes of a row, lowest bit
    /// first; padding bits are zero.
    pub codes: &'a [u8],
    /// `[out_features, n_groups]`.
    pub scale: &'a [bf16],
    /// Bits per code, one to eight.
    pub bits: usize,
    /// Input features that share a scale, a multiple of the lanes; the last
    /// group of a row may be shorter.
    pub group_size: usize,
    /// Columns.
    pub in_features: usize,
}

/// A matrix `[out_features, in_features]` of codes on a grid with a zero point: the
/// weight is `scale · (code − zero)`.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    /// `[out_features, bits, plane_bytes]`, as [`LowBit`] has them.
    pub codes: &'a [u8],
    /// `[out_features, n_groups]`.
    pub scale: &'a [f16],
    /// The code of weight zero, `[out_features, n_groups]`.
    pub zero: &'a [u8],
    /// Bits per code, one to eight.
    pub bits: usize,
    /// Input features that share a scale and a zero point, as in [`LowBit`].
    pub group_size: usize,
    /// Columns.
    pub in_features: usize,
}

impl Backend {
    /// `y += x Δᵀ`: `x` is `[n_rows, in_features]`, `y` is
    /// `[n_rows, out_features]`.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_low_bit(self, delta: LowBit<'_>, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let LowBit { codes, scale, bits, group_size, in_features } = delta;
        let grid = Symmetric { scale };
        self.add_coded(Coded { codes, bits, group_size, in_features, grid }, x, y);
    }

    /// `y += x Δᵀ`: `x` is `[n_rows, in_features]`, `y` is
    /// `[n_rows, out_features]`.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_affine(self, delta: Affine<'_>, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let Affine { codes, scale, zero, bits, group_size, in_features } = delta;
        assert_eq!(scale.len(), zero.len(), "scales and zero points");
        let grid = Shifted { scale, zero };
        self.add_coded(Coded { codes, bits, group_size, in_features, grid }, x, y);
    }

    fn add_coded<G: Grid>(self, delta: Coded<'_, G>, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let [n_rows, in_features] = x.shape();
        let out_features = y.n_cols();
        assert_eq!(y.n_rows(), n_rows, "rows of x and y");
        assert_eq!(delta.in_features, in_features, "columns of the delta and of x");
        assert!((1..=MAX_BITS).contains(&delta.bits), "bits");
        assert!(delta.group_size > 0 && delta.group_size.is_multiple_of(LANES), "group size");
        let n_groups = in_features.div_ceil(delta.group_size);
        let row_bytes = delta.bits * plane_bytes(in_features);
        assert_eq!(Some(delta.grid.len()), out_features.checked_mul(n_groups), "scales");
        assert_eq!(Some(delta.codes.len()), out_features.checked_mul(row_bytes), "codes");
        let output = Output::new(y.data(), out_features);
        let work = out_features.saturating_mul(in_features).saturating_mul(n_rows);
        for_each_task(out_features, row_bytes, work, |outs| {
            macro_rules! run {
                ($($bits:literal)*) => {
                    match delta.bits {
                        $($bits => {
                            // SAFETY: lengths were checked above, `outs` lies within
                            // `out_features`, and no two tasks share an output feature.
                            unsafe { self.run(Product::<$bits, G> { delta, x, output, outs }) }
                        })*
                        _ => unreachable!("bits were checked"),
                    }
                };
            }
            run!(1 2 3 4 5 6 7 8);
        });
    }
}

/// Bit planes and the grid their levels are on.
#[derive(Clone, Copy)]
struct Coded<'a, G> {
    codes: &'a [u8],
    bits: usize,
    group_size: usize,
    in_features: usize,
    grid: G,
}

/// What the odd levels `2 code − (2^bits − 1)` of each group stand for.
trait Grid: Copy + Sync {
    /// Whether weights have an offset, for which inputs are summed.
    const OFFSET: bool;

    /// Groups of all rows.
    fn len(self) -> usize;

    /// The weight is `factor · level + offset`, of `[factor, offset]` for a group, where
    /// `top` is the highest level.
    fn line(self, group: usize, top: f32) -> [f32; 2];
}

#[derive(Clone, Copy)]
struct Symmetric<'a> {
    scale: &'a [bf16],
}

impl Grid for Symmetric<'_> {
    const OFFSET: bool = false;

    #[inline(always)]
    fn len(self) -> usize {
        self.scale.len()
    }

    #[inline(always)]
    fn line(self, group: usize, _: f32) -> [f32; 2] {
        [self.scale[group].to_f32(), 0.0]
    }
}

#[derive(Clone, Copy)]
struct Shifted<'a> {
    scale: &'a [f16],
    zero: &'a [u8],
}

impl Grid for Shifted<'_> {
    const OFFSET: bool = true;

    #[inline(always)]
    fn len(self) -> usize {
        self.scale.len()
    }

    /// `code − zero` is `level / 2 + (top / 2 − zero)`. Halves of small integers times a
    /// number of eleven bits: both results are exact.
    #[inline(always)]
    fn line(self, group: usize, top: f32) -> [f32; 2] {
        let scale = self.scale[group].to_f32();
        [scale * 0.5, scale * (top * 0.5 - f32::from(self.zero[group]))]
    }
}

struct Product<'a, const BITS: usize, G> {
    delta: Coded<'a, G>,
    x: MatrixRef<'a>,
    output: Output,
    outs: Range<usize>,
}

impl<const BITS: usize, G: Grid> Kernel for Product<'_, BITS, G> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: `outs` and the rows are the product's.
        unsafe { cover::<V, Self, 4, 2>(&self, self.outs.clone(), self.x.n_rows()) }
    }
}

impl<const BITS: usize, G: Grid> Product<'_, BITS, G> {
    /// The highest level; small integers are exact in f32.
    #[allow(clippy::cast_precision_loss)]
    const TOP: f32 = ((1usize << BITS) - 1) as f32;

    /// The odd levels of vector `i` of a row whose planes start at `planes`.
    ///
    /// # Safety
    /// `planes` has `BITS` planes of `plane` bytes, each longer than `2 i + 1`.
    #[inline(always)]
    unsafe fn levels<V: Lanes>(planes: *const u8, plane: usize, i: usize) -> V {
        // Small integers, exact in f32 whatever the order.
        #[allow(clippy::cast_precision_loss)]
        // SAFETY: within the planes by the caller's promise.
        unsafe {
            let mut w = V::splat(-Self::TOP);
            for p in 0..BITS {
                let mask = planes.add(p * plane + 2 * i).cast::<u16>().read_unaligned();
                w = w.mask_add(u16::from_le(mask), V::splat((2usize << p) as f32));
            }
            w
        }
    }

    /// Adds the products of vector `i` of `R` rows and `B` vectors of `x`, and these
    /// to their sums where weights have an offset.
    ///
    /// # Safety
    /// As [`Product::levels`], for `R` consecutive rows.
    #[inline(always)]
    unsafe fn step<V: Lanes, const R: usize, const B: usize>(
        acc: &mut [[V; B]; R],
        sums: &mut [V; B],
        planes: *const u8,
        plane: usize,
        i: usize,
        xs: [V; B],
    ) {
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller's promise, row by row.
            unsafe {
                let w: V = Self::levels(planes.add(r * BITS * plane), plane, i);
                for (a, xv) in acc.iter_mut().zip(xs) {
                    *a = w.mul_add(xv, *a);
                }
            }
        }
        if G::OFFSET {
            for (sum, xv) in sums.iter_mut().zip(xs) {
                // SAFETY: an operation on registers.
                *sum = unsafe { sum.mask_add(u16::MAX, xv) };
            }
        }
    }
}

impl<const BITS: usize, G: Grid> Tiled for Product<'_, BITS, G> {
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const B: usize>(&self, out: usize, row: usize) {
        let Coded { codes, group_size, in_features: n, grid, .. } = self.delta;
        let plane = plane_bytes(n);
        let n_groups = n.div_ceil(group_size);
        let per_group = group_size / LANES;
        let whole = n / LANES;
        // SAFETY: `out + R` and `row + B` are within the matrices, whose lengths
        // `add_coded` checked; a plane has two bytes for every vector of `x`.
        // Past the row's end `x` is zero, so the padding's level adds nothing.
        unsafe {
            let planes = codes.as_ptr().add(out * BITS * plane);
            let x = self.x.data().as_ptr().add(row * n);
            let mut total = [[V::splat(0.0); B]; R];
            for group in 0..n_groups {
                let mut acc = [[V::splat(0.0); B]; R];
                let mut sums = [V::splat(0.0); B];
                for i in group * per_group..whole.min((group + 1) * per_group) {
                    let xs = load_rows::<V, B>(x.add(i * LANES), n);
                    Self::step(&mut acc, &mut sums, planes, plane, i, xs);
                }
                if group + 1 == n_groups && whole * LANES < n {
                    let xs = load_tails::<V, B>(self.x, row);
                    Self::step(&mut acc, &mut sums, planes, plane, whole, xs);
                }
                for (r, (total, acc)) in total.iter_mut().zip(acc).enumerate() {
                    let [factor, offset] = grid.line((out + r) * n_groups + group, Self::TOP);
                    let factor = V::splat(factor);
                    for (t, a) in total.iter_mut().zip(acc) {
                        *t = a.mul_add(factor, *t);
                    }
                    if G::OFFSET {
                        let offset = V::splat(offset);
                        for (t, sum) in total.iter_mut().zip(sums) {
                            *t = sum.mul_add(offset, *t);
                        }
                    }
                }
            }
            for (r, total) in total.into_iter().enumerate() {
                for (b, t) in total.into_iter().enumerate() {
                    self.output.add(row + b, out + r, t.sum());
                }
            }
        }
    }
}
