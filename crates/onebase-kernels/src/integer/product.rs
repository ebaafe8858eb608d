//! Products of codes with codes.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;
use onebase_tensor::MatrixMut;

use super::rows::QuantizedRows;
use super::{BLOCK, Mixed, low_bytes};
use crate::Backend;
use crate::bytes::{ByteKernel, Bytes, LINE, Line};
use crate::parallel::{Output, for_each_block};

/// Output features whose weights are expanded together.
const OUTS: usize = 16;

/// Output features of a tile.
const TILE_OUTS: usize = 4;

/// Lines of rows after which another tile's are read: those of a tile's rows fit the first-level
/// cache.
const DEPTH: usize = 64;

/// Multiply-adds of bytes that take the time of one in f32.
const BYTES_PER_FLOAT: usize = 2;

impl Backend {
    /// `y += x Wᵀ` of quantized rows: `y` is `[n_rows, out_features]`. The sums of codes are
    /// exact; an element is then computed in f64, low part before high part, rounded to f32 and
    /// added. The result does not depend on the backend.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_integer(self, weight: Mixed<'_>, x: &QuantizedRows, y: &mut MatrixMut<'_>) {
        let out_features = y.n_cols();
        assert_eq!(y.n_rows(), x.n_rows(), "rows of x and y");
        assert_eq!(weight.parts(), x.parts(), "inputs of the weights and of x");
        weight.check(out_features);
        assert_eq!(weight.sums.len(), out_features, "sums of codes");
        let output = Output::new(y.data(), out_features);
        let of_row = x.parts().n_inputs().saturating_mul(x.n_rows());
        let work = out_features.saturating_mul(of_row) / BYTES_PER_FLOAT;
        let block_bytes = weight.row_bytes() * OUTS;
        for_each_block(out_features.div_ceil(OUTS), block_bytes, work, |blocks| {
            let outs = blocks.start * OUTS..out_features.min(blocks.end * OUTS);
            // SAFETY: lengths were checked above, `outs` lies within `out_features`, and no two
            // tasks share an output feature.
            unsafe { self.run_bytes(Product { weight, x, output, outs }) }
        });
    }
}

struct Product<'a> {
    weight: Mixed<'a>,
    x: &'a QuantizedRows,
    output: Output,
    outs: Range<usize>,
}

/// Sums of products of codes without sign with those of a block's low and high inputs.
type Sums = [[i32; OUTS]; 2];

impl ByteKernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Bytes>(self) {
        let alone = self.x.n_rows() == 1;
        let mut lines = match alone {
            true => Vec::new(),
            false => vec![Line::ZERO; OUTS * self.x.n_lines()],
        };
        for first in self.outs.clone().step_by(OUTS) {
            let block = Block::new(&self.weight, first..self.outs.end.min(first + OUTS));
            // SAFETY: the block's output features are the product's.
            unsafe {
                if alone {
                    let sums = self.sums_of_one::<V>(&block);
                    self.finish(&block, 0, &sums);
                } else {
                    self.expand::<V>(&block, &mut lines);
                    self.cover::<V>(&block, &lines);
                }
            }
        }
    }
}

/// What all rows share of up to [`OUTS`] output features.
struct Block {
    outs: Range<usize>,
    scales: [[f32; OUTS]; 2],
    /// Sums of weights in units of their scale.
    sums: Sums,
}

impl Block {
    #[inline(always)]
    fn new(weight: &Mixed<'_>, outs: Range<usize>) -> Self {
        let mut block = Self { outs, scales: [[0.0; OUTS]; 2], sums: [[0; OUTS]; 2] };
        for (scales, from) in block.scales.iter_mut().zip([weight.low_scale, weight.high_scale]) {
            if !from.is_empty() {
                let from: &[f16] = &from[block.outs.clone()];
                from.convert_to_f32_slice(&mut scales[..from.len()]);
            }
        }
        // At most eight times `MAX_INPUTS`.
        #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
        let middle = 8 * weight.n_low as i32;
        for (index, [low, high]) in weight.sums[block.outs.clone()].iter().enumerate() {
            block.sums[0][index] = low.wrapping_sub(middle);
            block.sums[1][index] = *high;
        }
        block
    }

    /// Output features that tiles of [`TILE_OUTS`] start at, from the block's first.
    #[inline(always)]
    fn tiles(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.outs.len()).step_by(TILE_OUTS)
    }
}

impl Product<'_> {
    /// Sums for the only row, from the packed weights.
    ///
    /// # Safety
    /// As for [`Bytes`]; the block's output features exist.
    #[inline(always)]
    unsafe fn sums_of_one<V: Bytes>(&self, block: &Block) -> Sums {
        let Mixed { low, high, n_low, n_high, .. } = self.weight;
        let low_lines = 2 * n_low.div_ceil(BLOCK);
        let x: *const u8 = self.x.lines().as_ptr().cast();
        let mut sums = [[0; OUTS]; 2];
        for tile in block.tiles() {
            // SAFETY: rows are the block's own, the last one again where a tile would go past it.
            unsafe {
                let mut rows = [[low.as_ptr(), high.as_ptr()]; TILE_OUTS];
                for (index, [low, high]) in rows.iter_mut().enumerate() {
                    let out = (block.outs.start + tile + index).min(block.outs.end - 1);
                    *low = low.add(out * low_bytes(n_low));
                    *high = high.add(out * n_high);
                }
                let four = dot_low::<V>(rows.map(|[low, _]| low), n_low, x);
                sums[0][tile..tile + TILE_OUTS].copy_from_slice(&four);
                let x = x.add(low_lines * LINE);
                let four = dot_high::<V>(rows.map(|[_, high]| high), n_high, x);
                sums[1][tile..tile + TILE_OUTS].copy_from_slice(&four);
            }
        }
        sums
    }

    /// Writes a block's weights in the order of the rows' lines.
    ///
    /// # Safety
    /// As for [`Bytes`]; the block's output features exist, and `lines` has [`OUTS`] rows of them.
    #[inline(always)]
    unsafe fn expand<V: Bytes>(&self, block: &Block, lines: &mut [Line]) {
        let Mixed { low, high, n_low, n_high, .. } = self.weight;
        // SAFETY: reads lie within the rows of codes, writes within those of lines.
        unsafe {
            for (out, lines) in block.outs.clone().zip(lines.chunks_mut(self.x.n_lines().max(1))) {
                let mut to: *mut u8 = lines.as_mut_ptr().cast();
                let row = low.as_ptr().add(out * low_bytes(n_low));
                for at in (0..low_bytes(n_low)).step_by(LINE) {
                    let n = low_bytes(n_low) - at;
                    for nibbles in load_part::<V>(row.add(at), n).nibbles() {
                        nibbles.store(to);
                        to = to.add(LINE);
                    }
                }
                let row = high.as_ptr().add(out * n_high);
                for at in (0..n_high).step_by(LINE) {
                    load_part::<V>(row.add(at), n_high - at).store(to);
                    to = to.add(LINE);
                }
            }
        }
    }

    /// Multiplies all rows with the expanded weights of a block.
    ///
    /// # Safety
    /// As for [`Bytes`]; `lines` has [`OUTS`] rows.
    #[inline(always)]
    unsafe fn cover<V: Bytes>(&self, block: &Block, lines: &[Line]) {
        let n_rows = self.x.n_rows();
        let mut row = 0;
        // SAFETY: the rows exist.
        unsafe {
            while row < n_rows {
                if V::MANY_REGISTERS && row + 6 <= n_rows {
                    self.rows::<V, 6>(block, lines, row);
                    row += 6;
                } else if row + 2 <= n_rows {
                    self.rows::<V, 2>(block, lines, row);
                    row += 2;
                } else {
                    self.rows::<V, 1>(block, lines, row);
                    row += 1;
                }
            }
        }
    }

    /// Multiplies `B` rows from `row` with the expanded weights of a block.
    ///
    /// # Safety
    /// As for [`Product::cover`]; the rows exist.
    #[inline(always)]
    unsafe fn rows<V: Bytes, const B: usize>(&self, block: &Block, lines: &[Line], row: usize) {
        let stride = self.x.n_lines();
        let [low, high] = self.x.parts().lines();
        let mut sums: [Sums; B] = [[[0; OUTS]; 2]; B];
        for (part, range) in [0..low, low..low + high].into_iter().enumerate() {
            for depth in range.clone().step_by(DEPTH) {
                let n_lines = DEPTH.min(range.end - depth);
                for tile in block.tiles() {
                    // SAFETY: the lines lie within the rows of both.
                    let added = unsafe {
                        let x = self.x.lines().as_ptr().add(row * stride + depth).cast();
                        let w = lines.as_ptr().add(tile * stride + depth).cast();
                        match part {
                            0 => tile_sums::<V, B, true>(w, x, stride, n_lines),
                            _ => tile_sums::<V, B, false>(w, x, stride, n_lines),
                        }
                    };
                    for (sums, added) in sums.iter_mut().zip(added) {
                        let sums = &mut sums[part][tile..tile + TILE_OUTS];
                        sums.iter_mut()
                            .zip(added)
                            .for_each(|(sum, add)| *sum = sum.wrapping_add(add));
                    }
                }
            }
        }
        for (index, sums) in sums.iter().enumerate() {
            // SAFETY: the row and the block are the product's.
            unsafe { self.finish(block, row + index, sums) }
        }
    }

    /// Adds to a row of the output: with codes `a` of zero point `z` in the sums,
    /// `Σ (a − z) (u − 8) = Σ a u − 8 Σ a − z Σ (u − 8)` and `Σ (a − z) c = Σ a c − z Σ c`, each
    /// times both scales. What wraps on the way wraps back: the sums on the left fit.
    ///
    /// # Safety
    /// The row and the block are the product's.
    #[inline(always)]
    unsafe fn finish(&self, block: &Block, row: usize, sums: &Sums) {
        let grids = self.x.grids(row);
        let offsets = [grids[0].sum.wrapping_mul(8), 0];
        let mut values = [[0.0f64; OUTS]; 2];
        for part in 0..2 {
            let scale = f64::from(grids[part].scale);
            for out in 0..OUTS {
                let shift = grids[part].zero.wrapping_mul(block.sums[part][out]);
                let sum = sums[part][out].wrapping_sub(offsets[part]).wrapping_sub(shift);
                // The product of the scales is exact.
                let scale = scale * f64::from(block.scales[part][out]);
                values[part][out] = f64::from(sum) * scale;
            }
        }
        let mut added = [0.0f32; OUTS];
        for (out, added) in added.iter_mut().enumerate() {
            #[allow(clippy::cast_possible_truncation)]
            {
                *added = (values[0][out] + values[1][out]) as f32;
            }
        }
        for (out, added) in block.outs.clone().zip(added) {
            // SAFETY: by the caller's promise.
            unsafe { self.output.add(row, out, added) }
        }
    }
}

/// A vector of bytes of which `n` are left.
///
/// # Safety
/// As for [`Bytes`].
#[inline(always)]
unsafe fn load_part<V: Bytes>(from: *const u8, n: usize) -> V {
    // SAFETY: the caller's promise.
    unsafe { if n < LINE { V::load_first(from, n) } else { V::load(from) } }
}

/// Sums of a row's codes, line by line as in `Parts::lines`, with those of four rows of
/// low weights.
///
/// # Safety
/// As for [`Bytes`]; the rows have `n_low` codes.
#[inline(always)]
unsafe fn dot_low<V: Bytes>(
    rows: [*const u8; TILE_OUTS],
    n_low: usize,
    x: *const u8,
) -> [i32; TILE_OUTS] {
    let n = low_bytes(n_low);
    // SAFETY: the caller's promise; addresses that are asked for ahead need not exist.
    unsafe {
        let mut acc = [V::no_sums(); TILE_OUTS];
        for at in (0..n).step_by(LINE) {
            let xs = [V::load(x.add(2 * at)), V::load(x.add(2 * at + LINE))];
            for (acc, row) in acc.iter_mut().zip(rows) {
                let from = row.add(at);
                V::prefetch(from.wrapping_add(TILE_OUTS * n));
                let [low, high] = load_part::<V>(from, n - at).nibbles();
                *acc = xs[0].dot_nibbles(low, *acc);
                *acc = xs[1].dot_nibbles(high, *acc);
            }
        }
        V::add_up(acc)
    }
}

/// [`dot_low`] of high weights.
///
/// # Safety
/// As for [`Bytes`]; the rows have `n` codes.
#[inline(always)]
unsafe fn dot_high<V: Bytes>(
    rows: [*const u8; TILE_OUTS],
    n: usize,
    x: *const u8,
) -> [i32; TILE_OUTS] {
    // SAFETY: as in `dot_low`.
    unsafe {
        let mut acc = [V::no_sums(); TILE_OUTS];
        for at in (0..n).step_by(LINE) {
            let xs = V::load(x.add(at));
            for (acc, row) in acc.iter_mut().zip(rows) {
                let from = row.add(at);
                V::prefetch(from.wrapping_add(TILE_OUTS * n));
                *acc = xs.dot(load_part::<V>(from, n - at), *acc);
            }
        }
        V::add_up(acc)
    }
}

/// Sums of `B` rows of codes with four rows of expanded weights, for as many lines of each.
///
/// # Safety
/// As for [`Bytes`]; rows are `stride` lines apart, and the lines exist.
#[inline(always)]
unsafe fn tile_sums<V: Bytes, const B: usize, const LOW: bool>(
    w: *const u8,
    x: *const u8,
    stride: usize,
    n_lines: usize,
) -> [[i32; TILE_OUTS]; B] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[V::no_sums(); TILE_OUTS]; B];
        for line in 0..n_lines {
            let mut ws = [V::load(w.add(line * LINE)); TILE_OUTS];
            for (index, wv) in ws.iter_mut().enumerate().skip(1) {
                *wv = V::load(w.add((index * stride + line) * LINE));
            }
            for (index, acc) in acc.iter_mut().enumerate() {
                let xs = V::load(x.add((index * stride + line) * LINE));
                for (acc, wv) in acc.iter_mut().zip(ws) {
                    *acc = if LOW { xs.dot_nibbles(wv, *acc) } else { xs.dot(wv, *acc) };
                }
            }
        }
        let mut sums = [[0; TILE_OUTS]; B];
        for (sums, acc) in sums.iter_mut().zip(acc) {
            *sums = V::add_up(acc);
        }
        sums
    }
}
