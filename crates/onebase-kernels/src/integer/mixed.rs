//! Products of codes with inputs in f32.

use std::borrow::Cow;
use std::ops::Range;

use onebase_tensor::{MatrixMut, MatrixRef};

use super::{BLOCK, Mixed, Parts, low_bytes};
use crate::Backend;
use crate::bytes::LINE;
use crate::parallel::{Output, for_each_task};
use crate::tiles::{Tiled, cover};
use crate::vector::{Kernel, LANES, Lanes, load_rows};

/// Rows from which on weights are widened before they are multiplied.
const WORTH_WIDENING: usize = 8;

/// Output features whose weights are widened together.
const OUTS: usize = 8;

/// Rows of weights that are asked for ahead: those of a tile.
const AHEAD: usize = 8;

impl Backend {
    /// `y += x Wᵀ`: `x` is `[n_rows, n_low + n_high]` in f32, `y` is `[n_rows, out_features]`.
    /// Each part is summed in units of its scale.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_mixed(self, weight: Mixed<'_>, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let out_features = y.n_cols();
        let n_rows = x.n_rows();
        assert_eq!(y.n_rows(), n_rows, "rows of x and y");
        assert_eq!(weight.parts().n_inputs(), x.n_cols(), "columns of the weights and of x");
        weight.check(out_features);
        let output = Output::new(y.data(), out_features);
        let work = out_features.saturating_mul(x.n_cols()).saturating_mul(n_rows);
        let padded = pad(x, weight.parts());
        for_each_task(out_features, weight.row_bytes(), work, |outs| {
            // SAFETY: lengths were checked above, `outs` lies within `out_features`, and no two
            // tasks share an output feature.
            unsafe { self.run(Product { weight, x: &padded, n_rows, output, outs }) }
        });
    }
}

/// Vectors of the inputs of each part, filled up.
fn vectors(parts: Parts) -> [usize; 2] {
    [parts.n_low.div_ceil(LANES), parts.n_high.div_ceil(LANES)]
}

/// Rows whose parts are whole vectors, filled up with zeros where they are not.
fn pad(x: MatrixRef<'_>, parts: Parts) -> Cow<'_, [f32]> {
    let [low, high] = vectors(parts).map(|n| n * LANES);
    if low == parts.n_low && high == parts.n_high {
        return Cow::Borrowed(x.data());
    }
    let mut out = vec![0.0; x.n_rows() * (low + high)];
    for (row, out) in out.chunks_mut(low + high).enumerate() {
        let (from_low, from_high) = x.row(row).split_at(parts.n_low);
        out[..parts.n_low].copy_from_slice(from_low);
        out[low..low + parts.n_high].copy_from_slice(from_high);
    }
    Cow::Owned(out)
}

struct Product<'a> {
    weight: Mixed<'a>,
    /// `[n_rows, vectors · LANES]`.
    x: &'a [f32],
    n_rows: usize,
    output: Output,
    outs: Range<usize>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { weight, n_rows, ref outs, .. } = self;
        if n_rows < WORTH_WIDENING {
            let tiles = Tiles { product: &self, weights: Coded(weight) };
            // SAFETY: `outs` and the rows are the product's.
            unsafe { cover::<V, _, 8, 4>(&tiles, outs.clone(), n_rows) }
            return;
        }
        let [low, high] = vectors(weight.parts());
        let mut lanes = vec![0.0; OUTS * (low + high) * LANES];
        for first in outs.clone().step_by(OUTS) {
            let outs = first..outs.end.min(first + OUTS);
            // SAFETY: `outs` and the rows are the product's, and there are lanes for them.
            unsafe {
                widen::<V>(&weight, outs.clone(), &mut lanes);
                let weights = Widened { first, vectors: [low, high], lanes: &lanes };
                cover::<V, _, 8, 4>(&Tiles { product: &self, weights }, outs, n_rows);
            }
        }
    }
}

/// Weights of one row after the other, in units of their scales, a vector at a time.
trait Weights {
    /// Quarter `quarter` of the low or high nibbles of a whole block of 128 low inputs.
    ///
    /// # Safety
    /// As for [`Lanes`]; the block exists.
    unsafe fn nibbles<V: Lanes, const HIGH: bool>(
        &self,
        out: usize,
        block: usize,
        quarter: usize,
    ) -> V;

    /// A vector of low inputs after those of whole blocks, filled up with zeros.
    ///
    /// # Safety
    /// As for [`Lanes`]; the vector exists.
    unsafe fn low_rest<V: Lanes>(&self, out: usize, index: usize) -> V;

    /// A whole vector of high inputs.
    ///
    /// # Safety
    /// As for [`Lanes`]; the vector exists.
    unsafe fn bytes<V: Lanes>(&self, out: usize, index: usize) -> V;

    /// The vector of high inputs that is not whole, filled up with zeros.
    ///
    /// # Safety
    /// As for [`Lanes`]; the vector exists.
    unsafe fn high_rest<V: Lanes>(&self, out: usize, index: usize) -> V;
}

/// Weights as they are stored.
struct Coded<'a>(Mixed<'a>);

impl Weights for Coded<'_> {
    #[inline(always)]
    unsafe fn nibbles<V: Lanes, const HIGH: bool>(
        &self,
        out: usize,
        block: usize,
        quarter: usize,
    ) -> V {
        let row_bytes = low_bytes(self.0.n_low);
        // SAFETY: the block has sixty-four bytes in the row. What is asked for ahead need not exist.
        unsafe {
            let at = self.0.low.as_ptr().add(out * row_bytes + block * LINE + quarter * LANES);
            if !HIGH && quarter == 0 {
                V::prefetch(at.wrapping_add(AHEAD * row_bytes));
            }
            V::load_nibbles::<HIGH>(at)
        }
    }

    #[inline(always)]
    unsafe fn low_rest<V: Lanes>(&self, out: usize, index: usize) -> V {
        let n_low = self.0.n_low;
        let row = &self.0.low[out * low_bytes(n_low)..(out + 1) * low_bytes(n_low)];
        let last = &row[n_low / BLOCK * LINE..];
        let first = index * LANES % BLOCK;
        let mut lanes = [0.0; LANES];
        for (lane, input) in lanes.iter_mut().zip(first..n_low % BLOCK) {
            let nibble = match input.checked_sub(last.len()) {
                None => last[input] & 15,
                Some(high) => last[high] >> 4,
            };
            *lane = f32::from(nibble) - 8.0;
        }
        // SAFETY: the array has a vector's length.
        unsafe { V::load(lanes.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn bytes<V: Lanes>(&self, out: usize, index: usize) -> V {
        let n_high = self.0.n_high;
        // SAFETY: the vector is whole. What is asked for ahead need not exist.
        unsafe {
            let at = self.0.high.as_ptr().add(out * n_high + index * LANES);
            if index.is_multiple_of(LINE / LANES) {
                V::prefetch(at.wrapping_add(AHEAD * n_high));
            }
            V::load_i8(at)
        }
    }

    #[inline(always)]
    unsafe fn high_rest<V: Lanes>(&self, out: usize, index: usize) -> V {
        let row = &self.0.high[out * self.0.n_high..(out + 1) * self.0.n_high];
        let mut codes = [0u8; LANES];
        let rest = &row[index * LANES..];
        codes[..rest.len()].copy_from_slice(rest);
        // SAFETY: the array has a vector's length.
        unsafe { V::load_i8(codes.as_ptr()) }
    }
}

/// Weights in f32, whose output features follow each other from `first` on.
struct Widened<'a> {
    first: usize,
    /// Of low and of high inputs.
    vectors: [usize; 2],
    lanes: &'a [f32],
}

impl Widened<'_> {
    /// # Safety
    /// As for [`Lanes`]; the vector exists.
    #[inline(always)]
    unsafe fn vector<V: Lanes>(&self, out: usize, index: usize) -> V {
        let [low, high] = self.vectors;
        // SAFETY: the caller's promise.
        unsafe {
            V::load(self.lanes.as_ptr().add(((out - self.first) * (low + high) + index) * LANES))
        }
    }
}

impl Weights for Widened<'_> {
    #[inline(always)]
    unsafe fn nibbles<V: Lanes, const HIGH: bool>(
        &self,
        out: usize,
        block: usize,
        quarter: usize,
    ) -> V {
        let index = block * (BLOCK / LANES) + usize::from(HIGH) * (LINE / LANES) + quarter;
        // SAFETY: the caller's promise.
        unsafe { self.vector(out, index) }
    }

    #[inline(always)]
    unsafe fn low_rest<V: Lanes>(&self, out: usize, index: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { self.vector(out, index) }
    }

    #[inline(always)]
    unsafe fn bytes<V: Lanes>(&self, out: usize, index: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { self.vector(out, self.vectors[0] + index) }
    }

    #[inline(always)]
    unsafe fn high_rest<V: Lanes>(&self, out: usize, index: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { self.vector(out, self.vectors[0] + index) }
    }
}

/// Writes the weights of some output features as [`Widened`] has them.
///
/// # Safety
/// As for [`Lanes`]; the output features exist, and `lanes` has room for them.
#[inline(always)]
unsafe fn widen<V: Lanes>(weight: &Mixed<'_>, outs: Range<usize>, lanes: &mut [f32]) {
    let codes = Coded(*weight);
    let [low, high] = vectors(weight.parts());
    let mut to = lanes.as_mut_ptr();
    // SAFETY: the vectors are the rows'; as many are written as there is room for.
    unsafe {
        for out in outs {
            for block in 0..weight.n_low / BLOCK {
                for quarter in 0..LINE / LANES {
                    let at = to.add(quarter * LANES);
                    codes.nibbles::<V, false>(out, block, quarter).store(at);
                    codes.nibbles::<V, true>(out, block, quarter).store(at.add(LINE));
                }
                to = to.add(BLOCK);
            }
            for index in weight.n_low / BLOCK * (BLOCK / LANES)..low {
                codes.low_rest::<V>(out, index).store(to);
                to = to.add(LANES);
            }
            for index in 0..weight.n_high / LANES {
                codes.bytes::<V>(out, index).store(to);
                to = to.add(LANES);
            }
            for index in weight.n_high / LANES..high {
                codes.high_rest::<V>(out, index).store(to);
                to = to.add(LANES);
            }
        }
    }
}

struct Tiles<'a, W> {
    product: &'a Product<'a>,
    weights: W,
}

impl<W: Weights> Tiles<'_, W> {
    /// Adds up the low inputs, block by block.
    ///
    /// # Safety
    /// As for [`Tiled::tile`]; `x` is where the inputs of the first row begin.
    #[inline(always)]
    unsafe fn low<V: Lanes, const R: usize, const B: usize>(
        &self,
        out: usize,
        x: *const f32,
        stride: usize,
    ) -> [[V; B]; R] {
        let n_low = self.product.weight.n_low;
        let whole = n_low / BLOCK;
        // SAFETY: the blocks and the vectors are those of the rows.
        unsafe {
            let mut acc = [[V::splat(0.0); B]; R];
            for block in 0..whole {
                let x = x.add(block * BLOCK);
                for quarter in 0..LINE / LANES {
                    let xs = load_rows::<V, B>(x.add(quarter * LANES), stride);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let wv = self.weights.nibbles::<V, false>(out + r, block, quarter);
                        add(acc, wv, xs);
                    }
                }
                for quarter in 0..LINE / LANES {
                    let xs = load_rows::<V, B>(x.add(LINE + quarter * LANES), stride);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let wv = self.weights.nibbles::<V, true>(out + r, block, quarter);
                        add(acc, wv, xs);
                    }
                }
            }
            for index in whole * (BLOCK / LANES)..n_low.div_ceil(LANES) {
                let xs = load_rows::<V, B>(x.add(index * LANES), stride);
                for (r, acc) in acc.iter_mut().enumerate() {
                    add(acc, self.weights.low_rest::<V>(out + r, index), xs);
                }
            }
            acc
        }
    }

    /// Adds up the high inputs.
    ///
    /// # Safety
    /// As for [`Tiles::low`].
    #[inline(always)]
    unsafe fn high<V: Lanes, const R: usize, const B: usize>(
        &self,
        out: usize,
        x: *const f32,
        stride: usize,
    ) -> [[V; B]; R] {
        let n_high = self.product.weight.n_high;
        // SAFETY: the vectors are those of the rows.
        unsafe {
            let mut acc = [[V::splat(0.0); B]; R];
            for index in 0..n_high / LANES {
                let xs = load_rows::<V, B>(x.add(index * LANES), stride);
                for (r, acc) in acc.iter_mut().enumerate() {
                    add(acc, self.weights.bytes::<V>(out + r, index), xs);
                }
            }
            for index in n_high / LANES..n_high.div_ceil(LANES) {
                let xs = load_rows::<V, B>(x.add(index * LANES), stride);
                for (r, acc) in acc.iter_mut().enumerate() {
                    add(acc, self.weights.high_rest::<V>(out + r, index), xs);
                }
            }
            acc
        }
    }
}

/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn add<V: Lanes, const B: usize>(acc: &mut [V; B], wv: V, xs: [V; B]) {
    for (a, xv) in acc.iter_mut().zip(xs) {
        // SAFETY: an operation on registers.
        *a = unsafe { wv.mul_add(xv, *a) };
    }
}

impl<W: Weights> Tiled for Tiles<'_, W> {
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const B: usize>(&self, out: usize, row: usize) {
        let Product { ref weight, x, output, .. } = *self.product;
        let [low, high] = vectors(weight.parts());
        let stride = (low + high) * LANES;
        // SAFETY: `out + R` and `row + B` are within the product.
        unsafe {
            let x = x.as_ptr().add(row * stride);
            let mut totals = [[V::splat(0.0); B]; R];
            for (n, scales, high_part) in
                [(weight.n_low, weight.low_scale, false), (weight.n_high, weight.high_scale, true)]
            {
                if n == 0 {
                    continue;
                }
                let acc: [[V; B]; R] = match high_part {
                    false => self.low(out, x, stride),
                    true => self.high(out, x.add(low * LANES), stride),
                };
                for (r, (totals, acc)) in totals.iter_mut().zip(acc).enumerate() {
                    let scale = V::splat(scales[out + r].to_f32());
                    for (total, a) in totals.iter_mut().zip(acc) {
                        *total = a.mul_add(scale, *total);
                    }
                }
            }
            for (r, totals) in totals.into_iter().enumerate() {
                for (b, total) in totals.into_iter().enumerate() {
                    output.add(row + b, out + r, total.sum());
                }
            }
        }
    }
}
