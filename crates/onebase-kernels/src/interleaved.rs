//! `y += Δ x` for group-wise codes of one to eight bits, in integers.
//!
//! Lanes are rows, as in `gathered`: the codes of sixteen rows lie side by side, so that inputs are
//! repeated in all lanes and no sum over lanes is left to do. Inputs become integers of twenty-four
//! bits with a step for each group, in three digits of a byte each: an instruction multiplies four
//! times as many bytes as floats, codes need not be widened first, and sums are exact, whatever
//! their order. Rounding an input loses what f32 loses of the largest one of its group.

mod fixed;

use std::ops::Range;

use half::bf16;
use onebase_tensor::{MatrixMut, MatrixRef};
use rayon::prelude::*;

use crate::bytes::{ByteKernel, Bytes, LINE, Line};
use crate::parallel::{Output, for_each_block};
use crate::vector::{Kernel, LANES, Lanes, plane_bytes};
use crate::{Backend, MAX_BITS};
use fixed::{DIGITS, FixedRows};

/// Columns of a chunk, whose codes are whole lines of the cache at any width.
const CHUNK: usize = 32;

/// Columns whose codes are multiplied at once: the bytes of a lane.
const QUAD: usize = 4;

/// Columns of half a chunk: groups begin at its multiples.
const HALF: usize = CHUNK / 2;

/// Most columns of a group: sums of that many products of a level, at most 255, and a digit, at
/// most 128, fit 32 bits.
const MAX_GROUP: usize = 1 << 16;

/// Most blocks of output features of a tile.
const TILE: usize = 4;

/// Batch rows that are multiplied before the codes of a task are read again.
const BATCH_BLOCK: usize = 64;

/// Multiply-adds of digits that take the time of one in f32.
const DIGITS_PER_FLOAT: usize = 2;

/// Codes `[out_features, in_features]` on a symmetric mid-rise grid, as [`crate::LowBit`] has
/// them, in an order that products read fast.
#[derive(Clone, Debug)]
pub struct Interleaved {
    shape: [usize; 2],
    bits: usize,
    group_size: usize,
    /// `[blocks of 16 rows, chunks of 32 columns, bits]` lines. A chunk has for each field of
    /// its codes, see [`fields`], as many lines as the field has bits. In a line each row has four
    /// bytes; byte `j` has the fields of columns `j`, `j + 4`, … from the lowest bit up.
    codes: Vec<Line>,
    /// `[blocks of 16 rows, n_groups, 16]`.
    scale: Vec<[bf16; LANES]>,
}

/// Codes of some bits are cut into fields whose bits divide those of a byte, lowest first: for
/// each the bits, and how far up in the code.
const fn fields(bits: usize) -> &'static [(usize, usize)] {
    const FIELDS: [&[(usize, usize)]; MAX_BITS + 1] = [
        &[],
        &[(1, 0)],
        &[(2, 0)],
        &[(2, 0), (1, 2)],
        &[(4, 0)],
        &[(4, 0), (1, 4)],
        &[(4, 0), (2, 4)],
        &[(4, 0), (2, 4), (1, 6)],
        &[(8, 0)],
    ];
    FIELDS[bits]
}

impl Interleaved {
    /// Takes the codes and scales of a [`crate::LowBit`] over.
    ///
    /// Panics when the shapes do not fit each other or a group has more than 65536 columns.
    pub fn new(delta: crate::LowBit<'_>, out_features: usize) -> Self {
        let crate::LowBit { codes: planes, scale, bits, group_size, in_features } = delta;
        assert!((1..=MAX_BITS).contains(&bits), "bits");
        assert!(group_size > 0 && group_size.is_multiple_of(HALF), "group size");
        let group_size = group_size.min(in_features.next_multiple_of(HALF).max(HALF));
        assert!(group_size <= MAX_GROUP, "group size");
        let plane = plane_bytes(in_features);
        let n_groups = in_features.div_ceil(group_size);
        assert_eq!(Some(planes.len()), out_features.checked_mul(bits * plane), "codes");
        assert_eq!(Some(scale.len()), out_features.checked_mul(n_groups), "scales");
        let n_blocks = out_features.div_ceil(LANES);
        let block_lines = in_features.div_ceil(CHUNK) * bits;
        let mut this = Self {
            shape: [out_features, in_features],
            bits,
            group_size,
            codes: vec![Line::ZERO; n_blocks * block_lines],
            scale: vec![[bf16::ZERO; LANES]; n_blocks * n_groups],
        };
        let rows_of = |block: usize| block * LANES..out_features.min((block + 1) * LANES);
        if block_lines > 0 {
            let blocks = this.codes.par_chunks_mut(block_lines).enumerate();
            blocks.for_each(|(block, lines)| {
                let rows = rows_of(block);
                let rows = &planes[rows.start * bits * plane..rows.end * bits * plane];
                // SAFETY: the kernel is safe code.
                unsafe { Backend::active().run(WriteBlock { rows, plane, bits, lines }) }
            });
        }
        for (block, groups) in this.scale.chunks_mut(n_groups.max(1)).enumerate() {
            for (lane, row) in rows_of(block).enumerate() {
                let scale = &scale[row * n_groups..(row + 1) * n_groups];
                groups.iter_mut().zip(scale).for_each(|(to, scale)| to[lane] = *scale);
            }
        }
        this
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Bytes in memory.
    pub fn resident_bytes(&self) -> usize {
        size_of_val(self.codes.as_slice()) + size_of_val(self.scale.as_slice())
    }

    /// Writes a row of weights, `[in_features]`.
    ///
    /// Panics when there is no such row or `out` has another length.
    pub fn write_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.shape[0], "row");
        assert_eq!(out.len(), self.shape[1], "weights of a row");
        let (block, lane) = (row / LANES, row % LANES);
        let lines = &self.codes[block * self.block_lines()..];
        let scale = &self.scale[block * self.n_groups()..];
        let chunks = out.chunks_mut(CHUNK).zip(lines.chunks_exact(self.bits));
        for (index, (out, lines)) in chunks.enumerate() {
            let mut codes = [0u8; CHUNK];
            let mut first = 0;
            for (width, up) in fields(self.bits) {
                let in_line = 8 / width;
                for (quad, codes) in codes.as_chunks_mut::<QUAD>().0.iter_mut().enumerate() {
                    let line = &lines[first + quad / in_line].0[lane * QUAD..];
                    for (code, byte) in codes.iter_mut().zip(line) {
                        let field = byte >> (quad % in_line * width) & (u8::MAX >> (8 - width));
                        *code |= field << up;
                    }
                }
                first += width;
            }
            for (half, (out, codes)) in out.chunks_mut(HALF).zip(codes.chunks(HALF)).enumerate() {
                let group = (index * CHUNK + half * HALF) / self.group_size;
                let scale = scale[group][lane].to_f32();
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = scale * f32::from(2 * i16::from(*code) - self.top());
                }
            }
        }
    }

    /// The highest level.
    fn top(&self) -> i16 {
        (1 << self.bits) - 1
    }

    fn n_groups(&self) -> usize {
        self.shape[1].div_ceil(self.group_size)
    }

    fn block_lines(&self) -> usize {
        self.shape[1].div_ceil(CHUNK) * self.bits
    }
}

/// Writes the codes of a block of rows, of bit planes, into its lines.
struct WriteBlock<'a> {
    /// Planes of the rows, which may be fewer than sixteen.
    rows: &'a [u8],
    /// Bytes of a plane.
    plane: usize,
    bits: usize,
    lines: &'a mut [Line],
}

impl Kernel for WriteBlock<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { rows, plane, bits, lines } = self;
        for (chunk, lines) in lines.chunks_mut(bits).enumerate() {
            let mut planes = [[0u32; LANES]; MAX_BITS];
            for (lane, row) in rows.chunks_exact(bits * plane).enumerate() {
                for (to, plane) in planes.iter_mut().zip(row.chunks_exact(plane)) {
                    let left = &plane[chunk * CHUNK / 8..];
                    to[lane] = match (left.first_chunk::<4>(), left.first_chunk::<2>()) {
                        (Some(whole), _) => u32::from_le_bytes(*whole),
                        (None, Some(half)) => u32::from(u16::from_le_bytes(*half)),
                        (None, None) => 0,
                    };
                }
            }
            let mut first = 0;
            for (width, up) in fields(bits) {
                let (planes, lines) = (&planes[*up..], &mut lines[first..first + width]);
                match width {
                    1 => write_field::<1>(planes, lines),
                    2 => write_field::<2>(planes, lines),
                    4 => write_field::<4>(planes, lines),
                    _ => write_field::<8>(planes, lines),
                }
                first += width;
            }
        }
    }
}

/// Writes a field of `WIDTH` bits of a chunk.
#[inline(always)]
fn write_field<const WIDTH: usize>(planes: &[[u32; LANES]], lines: &mut [Line]) {
    for (index, line) in lines.iter_mut().enumerate() {
        let mut words = [0u32; LANES];
        for (bit, plane) in planes.iter().enumerate().take(WIDTH) {
            for place in 0..8 / WIDTH {
                let at = (index * (8 / WIDTH) + place) * QUAD;
                for (word, plane) in words.iter_mut().zip(plane) {
                    // Bit `j` of four goes to byte `j`.
                    let four = plane >> at & 15;
                    *word |= ((four * 0x0020_4081) & 0x0101_0101) << (place * WIDTH + bit);
                }
            }
        }
        for (to, word) in line.0.as_chunks_mut::<QUAD>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
    }
}

impl Backend {
    /// `y += x Δᵀ`: `x` is `[n_rows, in_features]`, `y` is `[n_rows, out_features]`. The result
    /// does not depend on the backend.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_interleaved(self, delta: &Interleaved, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let [out_features, in_features] = delta.shape;
        let n_rows = x.n_rows();
        assert_eq!([y.n_rows(), y.n_cols()], [n_rows, out_features], "the shape of y");
        assert_eq!(x.n_cols(), in_features, "columns of the delta and of x");
        let output = Output::new(y.data(), out_features);
        let block_bytes = delta.block_lines() * LINE;
        let n_blocks = out_features.div_ceil(LANES);
        let n_tiles = n_blocks.div_ceil(TILE);
        for first in (0..n_rows).step_by(BATCH_BLOCK) {
            let rows = first..n_rows.min(first + BATCH_BLOCK);
            let x = FixedRows::new(self, x.rows(rows.clone()), delta.group_size);
            let work = out_features.saturating_mul(in_features).saturating_mul(rows.len());
            for_each_block(n_tiles, TILE * block_bytes, work / DIGITS_PER_FLOAT, |tiles| {
                let blocks = tiles.start * TILE..n_blocks.min(tiles.end * TILE);
                macro_rules! run {
                    ($($bits:literal)*) => {
                        match delta.bits {
                            $($bits => {
                                let x = &x;
                                let product = Product::<$bits> { delta, x, first, output, blocks };
                                // SAFETY: lengths were checked above, the blocks are of the
                                // delta, and no two tasks share one.
                                unsafe { self.run_bytes(product) }
                            })*
                            _ => unreachable!("bits were checked"),
                        }
                    };
                }
                run!(1 2 3 4 5 6 7 8);
            });
        }
    }
}

struct Product<'a, const BITS: usize> {
    delta: &'a Interleaved,
    x: &'a FixedRows,
    /// The row of the output that is the first of `x`.
    first: usize,
    output: Output,
    blocks: Range<usize>,
}

impl<const BITS: usize> ByteKernel for Product<'_, BITS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Bytes>(self) {
        let n_rows = self.x.n_rows();
        let mut block = self.blocks.start;
        while block < self.blocks.end {
            let left = self.blocks.end - block;
            let mut row = 0;
            // SAFETY: the blocks and the rows are the product's.
            unsafe {
                if V::MANY_REGISTERS && n_rows == 1 && left >= TILE {
                    self.tile::<V, TILE, 1>(block, 0);
                    block += TILE;
                } else if V::MANY_REGISTERS && left >= 2 {
                    while row + 4 <= n_rows {
                        self.tile::<V, 2, 4>(block, row);
                        row += 4;
                    }
                    while row < n_rows {
                        self.tile::<V, 2, 1>(block, row);
                        row += 1;
                    }
                    block += 2;
                } else {
                    while row < n_rows {
                        self.tile::<V, 1, 1>(block, row);
                        row += 1;
                    }
                    block += 1;
                }
            }
        }
    }
}

/// Sums of rows with the digits of their inputs.
type Acc<V, const O: usize, const B: usize> = [[[<V as Bytes>::Rows; DIGITS]; B]; O];

impl<const BITS: usize> Product<'_, BITS> {
    /// Adds to `O` blocks of output features from `block` of `B` rows from `row`.
    ///
    /// # Safety
    /// As for [`Bytes`]; the blocks and the rows are the product's.
    #[inline(always)]
    unsafe fn tile<V: Bytes, const O: usize, const B: usize>(&self, block: usize, row: usize) {
        let delta = self.delta;
        let [out_features, in_features] = delta.shape;
        let (n_groups, block_lines) = (delta.n_groups(), delta.block_lines());
        let n_halves = in_features.div_ceil(HALF);
        let per_group = delta.group_size / HALF;
        let mut totals = [[[0.0f32; LANES]; B]; O];
        // SAFETY: a block has the lines of its chunks; a row has the digits of as many columns.
        unsafe {
            let codes: *const u8 = delta.codes.as_ptr().add(block * block_lines).cast();
            for group in 0..n_groups {
                let halves = group * per_group..n_halves.min((group + 1) * per_group);
                let mut acc = [[[V::no_rows(); DIGITS]; B]; O];
                let mut half = halves.start;
                if half % 2 == 1 {
                    self.half::<V, O, B, 1>(&mut acc, codes, row, half / 2);
                    half += 1;
                }
                while half + 2 <= halves.end {
                    if B == 1 {
                        // Blocks of a tile are a few pages; the next tile's are asked for.
                        for line in 0..O * BITS {
                            let at =
                                (line / BITS + O) * block_lines + half / 2 * BITS + line % BITS;
                            V::prefetch(codes.wrapping_add(at * LINE));
                        }
                    }
                    self.half::<V, O, B, 0>(&mut acc, codes, row, half / 2);
                    self.half::<V, O, B, 1>(&mut acc, codes, row, half / 2);
                    half += 2;
                }
                if half < halves.end {
                    self.half::<V, O, B, 0>(&mut acc, codes, row, half / 2);
                }
                for (o, (acc, totals)) in acc.into_iter().zip(&mut totals).enumerate() {
                    let scale = &delta.scale[(block + o) * n_groups + group];
                    for (b, (acc, total)) in acc.into_iter().zip(totals).enumerate() {
                        let sums = acc.map(|acc| V::rows(acc));
                        let (step, digits) = self.x.group(row + b, group);
                        let offsets = digits.map(|sum| sum.wrapping_mul(delta.top().into()));
                        add_group(sums, offsets, step, scale, total);
                    }
                }
            }
            for (o, totals) in totals.into_iter().enumerate() {
                let outs = (block + o) * LANES..out_features.min((block + o + 1) * LANES);
                for (b, total) in totals.into_iter().enumerate() {
                    for (out, total) in outs.clone().zip(total) {
                        self.output.add(self.first + row + b, out, total);
                    }
                }
            }
        }
    }

    /// Multiplies half `H` of a chunk.
    ///
    /// # Safety
    /// As for [`Product::tile`]; the chunk exists.
    #[inline(always)]
    unsafe fn half<V: Bytes, const O: usize, const B: usize, const H: usize>(
        &self,
        acc: &mut Acc<V, O, B>,
        codes: *const u8,
        row: usize,
        chunk: usize,
    ) {
        let block_bytes = self.delta.block_lines() * LINE;
        // SAFETY: the caller's promise.
        unsafe {
            let codes = codes.add(chunk * BITS * LINE);
            let mut at = [[V::load(codes); 3]; O];
            for quad in 0..HALF / QUAD {
                let mut quads = [V::load(codes); O];
                for (o, (at, to)) in at.iter_mut().zip(&mut quads).enumerate() {
                    *to = quad_of::<V, BITS, H>(codes.add(o * block_bytes), at, quad);
                }
                for b in 0..B {
                    let column = chunk * CHUNK + H * HALF + quad * QUAD;
                    for digit in 0..DIGITS {
                        let x = V::repeat(self.x.digits(row + b, digit).add(column));
                        for (acc, codes) in acc.iter_mut().zip(quads) {
                            let to = &mut acc[b][digit];
                            *to = if BITS < MAX_BITS {
                                codes.dot_rows::<true>(x, *to)
                            } else {
                                codes.dot_rows::<false>(x, *to)
                            };
                        }
                    }
                }
            }
        }
    }
}

/// The codes of quad `quad` of half `H` of a chunk, a byte each. `at` are the lines that the
/// fields are in, moved so that the last quad's are lowest.
///
/// # Safety
/// As for [`Bytes`]; the chunk exists.
#[inline(always)]
unsafe fn quad_of<V: Bytes, const BITS: usize, const H: usize>(
    chunk: *const u8,
    at: &mut [V; 3],
    quad: usize,
) -> V {
    let number = H * (HALF / QUAD) + quad;
    // SAFETY: the caller's promise.
    unsafe {
        if BITS == 8 {
            return V::load(chunk.add(number * LINE));
        }
        let mut code = at[0];
        let mut first = 0;
        for (index, at) in at.iter_mut().enumerate() {
            let Some((width, _)) = fields(BITS).get(index) else { break };
            let in_line = 8 / width;
            if quad == 0 || number.is_multiple_of(in_line) {
                *at = V::load(chunk.add((first + number / in_line) * LINE));
                if number % in_line == 4 {
                    *at = at.shift::<4>();
                }
            } else {
                *at = match width {
                    1 => at.shift::<1>(),
                    2 => at.shift::<2>(),
                    _ => at.shift::<4>(),
                };
            }
            let field = match width {
                1 => at.low_bits::<1>(),
                2 => at.low_bits::<2>(),
                _ => at.low_bits::<4>(),
            };
            code = match first {
                0 => field,
                2 => code.or_up::<2>(field),
                4 => code.or_up::<4>(field),
                _ => code.or_up::<6>(field),
            };
            first += width;
        }
        code
    }
}

/// Adds a group's products to those of sixteen rows: `sums` are those of codes with each digit of
/// the inputs, lowest first, `offsets` the sums of the digits times the highest level.
#[inline(always)]
#[allow(clippy::cast_precision_loss)]
fn add_group(
    sums: [[i32; LANES]; DIGITS],
    offsets: [i32; DIGITS],
    step: f32,
    scale: &[bf16; LANES],
    totals: &mut [f32; LANES],
) {
    for lane in 0..LANES {
        let mut value = 0.0f32;
        for digit in (0..DIGITS).rev() {
            // What wraps wraps back: the sums of levels fit.
            let sum = sums[digit][lane].wrapping_mul(2).wrapping_sub(offsets[digit]);
            value = value * 256.0 + sum as f32;
        }
        let scale = f32::from_bits(u32::from(scale[lane].to_bits()) << 16);
        totals[lane] += (value * step) * scale;
    }
}
