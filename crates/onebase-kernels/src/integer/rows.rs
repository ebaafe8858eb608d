//! Inputs that are quantized as they come.

use std::ops::Range;

use onebase_tensor::MatrixRef;
use rayon::prelude::*;

use super::{BLOCK, MAX_INPUTS, Parts};
use crate::Backend;
use crate::bytes::{ByteKernel, Bytes, LINE, Line, bytes, bytes_mut};
use crate::quantize;

/// Numbers below which rows are not worth a second thread.
const WORTH_A_THREAD: usize = 1 << 15;

/// The grid of one part of a row, and the sum of its codes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Grid {
    pub(super) scale: f32,
    pub(super) zero: i32,
    pub(super) sum: i32,
}

/// Rows of inputs as codes without sign, each part of a row with a scale and a zero point of its
/// own: the value is `scale · (code − zero)`.
#[derive(Clone, Debug)]
pub struct QuantizedRows {
    parts: Parts,
    /// `[n_rows, lines]`, filled up with zeros.
    lines: Vec<Line>,
    /// `[n_rows]`, low and high.
    grids: Vec<[Grid; 2]>,
}

impl QuantizedRows {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.grids.len()
    }

    /// The inputs of a row.
    pub fn parts(&self) -> Parts {
        self.parts
    }

    /// The codes of a row, in the order of its inputs.
    ///
    /// Panics when there is no such row.
    pub fn codes(&self, row: usize) -> Vec<u8> {
        let Parts { n_low, n_high } = self.parts;
        let [low, high] = self.lines_of(row);
        let mut out = Vec::with_capacity(n_low + n_high);
        for (index, block) in bytes(low).chunks(BLOCK).enumerate() {
            let n = BLOCK.min(n_low - index * BLOCK);
            out.extend_from_slice(&block[..n.div_ceil(2)]);
            out.extend_from_slice(&block[LINE..LINE + n / 2]);
        }
        out.extend_from_slice(&bytes(high)[..n_high]);
        out
    }

    /// Writes the values of a row, `[n_low + n_high]`.
    ///
    /// Panics when there is no such row or `out` has another length.
    pub fn write_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.parts.n_inputs(), "inputs of a row");
        let codes = self.codes(row);
        for (at, (out, code)) in out.iter_mut().zip(codes).enumerate() {
            let Grid { scale, zero, .. } = self.grids[row][usize::from(at >= self.parts.n_low)];
            // A small integer.
            #[allow(clippy::cast_precision_loss)]
            let steps = (i32::from(code) - zero) as f32;
            *out = scale * steps;
        }
    }

    /// Scale and zero point of the low and of the high inputs of a row.
    ///
    /// Panics when there is no such row.
    pub fn grid(&self, row: usize) -> [(f32, i32); 2] {
        self.grids[row].map(|grid| (grid.scale, grid.zero))
    }

    /// A copy of some rows.
    ///
    /// Panics when there are fewer.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let n = self.n_lines();
        Self {
            parts: self.parts,
            lines: self.lines[rows.start * n..rows.end * n].to_vec(),
            grids: self.grids[rows].to_vec(),
        }
    }

    /// Lines of a row.
    pub(super) fn n_lines(&self) -> usize {
        let [low, high] = self.parts.lines();
        low + high
    }

    /// The lines of all rows.
    pub(super) fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub(super) fn grids(&self, row: usize) -> [Grid; 2] {
        self.grids[row]
    }

    fn lines_of(&self, row: usize) -> [&[Line]; 2] {
        let n = self.n_lines();
        let (low, high) = self.lines[row * n..(row + 1) * n].split_at(self.parts.lines()[0]);
        [low, high]
    }
}

impl Backend {
    /// Quantizes the rows of `x`, `[n_rows, n_low + n_high]`, to codes of `bits` for the low and
    /// for the high inputs. With `low = min(x, 0)` and `high = max(x, 0)` over a part of a row,
    /// the scale is `(high − low) / (2^bits − 1)`, the zero point `round(−low / scale)`, the code
    /// `round(x / scale) + zero`, all in f32 and rounded half to even (ResQ, arXiv 2412.14363,
    /// section 5.1). The result does not depend on the backend. A part with an input that is not
    /// finite has values that are no numbers.
    ///
    /// Panics when the columns are not those of the parts, a part has more than 65536 or bits are
    /// not from two to eight.
    pub fn quantize_rows(self, x: MatrixRef<'_>, parts: Parts, bits: [u32; 2]) -> QuantizedRows {
        assert_eq!(x.n_cols(), parts.n_inputs(), "columns");
        assert!(parts.n_low.max(parts.n_high) <= MAX_INPUTS, "inputs");
        assert!(bits.iter().all(|bits| (2..=8).contains(bits)), "bits");
        let [low, high] = parts.lines();
        let mut rows = QuantizedRows {
            parts,
            lines: vec![Line::ZERO; x.n_rows() * (low + high)],
            grids: vec![[Grid::default(); 2]; x.n_rows()],
        };
        let quantize = |(row, (lines, grids)): (usize, (&mut [Line], &mut [Grid; 2]))| {
            let (low, high) = x.row(row).split_at(parts.n_low);
            let (low_lines, high_lines) = lines.split_at_mut(parts.lines()[0]);
            // SAFETY: the kernel is safe code.
            *grids = unsafe {
                [
                    self.run_bytes(Quantize { x: low, bits: bits[0], lines: low_lines, low: true }),
                    self.run_bytes(Quantize {
                        x: high,
                        bits: bits[1],
                        lines: high_lines,
                        low: false,
                    }),
                ]
            };
        };
        let n_lines = (low + high).max(1);
        if x.data().len() < WORTH_A_THREAD {
            let rows = rows.lines.chunks_mut(n_lines).zip(&mut rows.grids);
            rows.enumerate().for_each(quantize);
        } else {
            let rows = rows.lines.par_chunks_mut(n_lines).zip(&mut rows.grids);
            rows.enumerate().for_each(quantize);
        }
        rows
    }
}

/// Quantizes one part of a row.
struct Quantize<'a> {
    x: &'a [f32],
    bits: u32,
    lines: &'a mut [Line],
    /// Whether the last block is in halves, as that of low inputs.
    low: bool,
}

impl ByteKernel for Quantize<'_> {
    type Output = Grid;

    #[inline(always)]
    unsafe fn run<V: Bytes>(self) -> Grid {
        let n = self.x.len();
        let top = f32::from(u8::MAX >> (u8::BITS - self.bits));
        let range = quantize::range(self.x);
        let scale = quantize::step(range, top);
        let zero = quantize::zero_point(range, scale, top);
        let codes = bytes_mut(self.lines);
        quantize::codes(self.x, scale, zero, top, &mut codes[..n]);
        let sum = codes[..n].iter().map(|code| i32::from(*code)).sum();
        let in_last = n % BLOCK;
        if self.low && in_last > 0 {
            let half = in_last.div_ceil(2);
            let last = &mut codes[n - in_last..];
            last.copy_within(half..in_last, LINE);
            last[half..LINE].fill(0);
            last[LINE + in_last / 2..].fill(0);
        }
        // From 0 to 255.
        #[allow(clippy::cast_possible_truncation)]
        Grid { scale, zero: zero as i32, sum }
    }
}
