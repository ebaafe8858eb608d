//! A matrix of which blocks of rows keep the same input features, with low-bit codes for them.
//!
//! The inputs that a block keeps are gathered once, and its codes are multiplied with them as
//! those of a small dense matrix: nothing is done for what is dropped.

use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, LowBit, plane_bytes};
use onebase_tensor::{MatrixMut, MatrixRef};
use rayon::prelude::*;

/// Input features, in two bytes where that is enough.
enum Columns {
    Short(Vec<u16>),
    Long(Vec<u32>),
}

/// What the codes of a row stand for: the weight is `factor · (2 code − twice_zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Line {
    /// Half of the step between codes.
    pub(crate) factor: f32,
    /// Twice the code of weight zero.
    pub(crate) twice_zero: i64,
}

impl Line {
    /// The weight of a code.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn weight(self, code: u8) -> f32 {
        let level = 2 * i64::from(code) - self.twice_zero;
        (self.factor * level as f32).clamp(-f32::MAX, f32::MAX)
    }
}

/// A delta `[out_features, in_features]` in this form.
pub(crate) struct Kept {
    shape: [usize; 2],
    /// Rows that keep the same input features; the last block may have fewer.
    block_rows: usize,
    bits: usize,
    /// Kept weights of a row.
    n_kept: usize,
    /// `[n_blocks, n_kept]`.
    columns: Columns,
    /// `[out_features, bits, plane_bytes(n_kept)]`, as [`LowBit`] has them.
    planes: Vec<u8>,
    /// `[out_features]`.
    lines: Vec<Line>,
}

/// Rows of a batch that are multiplied at a time, which bounds the products that wait
/// to be added.
const BATCH_ROWS: usize = 64;

/// Multiply-adds of one task.
const TASK_MULTIPLY_ADDS: usize = 1 << 17;

impl Kept {
    /// `columns` are input features, `[n_blocks, n_kept]`, `codes` are below `2^bits`,
    /// `[out_features, n_kept]`, row after row, and `lines` are those of each row.
    ///
    /// Panics when a length or an input feature does not fit: who calls has checked them.
    pub(crate) fn new(
        shape @ [n_rows, n_cols]: [usize; 2],
        block_rows: usize,
        bits: usize,
        columns: Vec<u32>,
        codes: impl Iterator<Item = u8>,
        lines: Vec<Line>,
    ) -> Self {
        let n_blocks = n_rows.div_ceil(block_rows);
        let n_kept = columns.len().checked_div(n_blocks).unwrap_or(0);
        assert_eq!(columns.len(), n_blocks * n_kept, "columns");
        assert!(columns.iter().all(|column| (*column as usize) < n_cols), "columns");
        assert_eq!(lines.len(), n_rows, "lines");
        let plane = plane_bytes(n_kept);
        let mut planes = vec![0; n_rows * bits * plane];
        let mut n_codes = 0;
        for (index, code) in codes.enumerate() {
            let (row, at) = (index / n_kept, index % n_kept);
            for bit in (0..bits).filter(|bit| code >> bit & 1 == 1) {
                planes[(row * bits + bit) * plane + at / 8] |= 1 << (at % 8);
            }
            n_codes += 1;
        }
        assert_eq!(n_codes, n_rows * n_kept, "codes");
        let columns = if n_cols <= 1 << 16 {
            #[allow(clippy::cast_possible_truncation)]
            Columns::Short(columns.into_iter().map(|column| column as u16).collect())
        } else {
            Columns::Long(columns)
        };
        Self { shape, block_rows, bits, n_kept, columns, planes, lines }
    }

    /// Calls `each` with the place and the input feature of all that a block keeps.
    #[inline]
    fn visit(&self, block: usize, mut each: impl FnMut(usize, usize)) {
        let of_block = block * self.n_kept..(block + 1) * self.n_kept;
        match &self.columns {
            Columns::Short(columns) => {
                let columns = columns[of_block].iter().enumerate();
                columns.for_each(|(at, column)| each(at, usize::from(*column)));
            }
            Columns::Long(columns) => {
                let columns = columns[of_block].iter().enumerate();
                columns.for_each(|(at, column)| each(at, *column as usize));
            }
        }
    }

    /// The products of the rows of a block with each row of `x`, into `out`,
    /// `[rows of the block, n_rows]`.
    fn multiply(
        &self,
        backend: Backend,
        block: usize,
        x: MatrixRef<'_>,
        work: &mut Work,
        out: &mut [f32],
    ) {
        let (n, n_kept) = (x.n_rows(), self.n_kept);
        let n_outs = out.len() / n;
        let first = block * self.block_rows;
        let Work { gathered, products, sums, ones } = work;
        gathered.resize(n * n_kept, 0.0);
        for (i, gathered) in gathered.chunks_mut(n_kept).enumerate() {
            let x = x.row(i);
            self.visit(block, |at, column| gathered[at] = x[column]);
        }
        let top = (1i64 << self.bits) - 1;
        let lines = &self.lines[first..first + n_outs];
        sums.clear();
        if lines.iter().any(|line| line.twice_zero != top) {
            sums.extend(gathered.chunks(n_kept).map(|x| x.iter().sum::<f32>()));
        }
        products.clear();
        products.resize(n * n_outs, 0.0);
        ones.resize(self.block_rows, bf16::ONE);
        let row_bytes = self.bits * plane_bytes(n_kept);
        let levels = LowBit {
            codes: &self.planes[first * row_bytes..(first + n_outs) * row_bytes],
            scale: &ones[..n_outs],
            bits: self.bits,
            group_size: n_kept.next_multiple_of(16),
            in_features: n_kept,
        };
        let (Ok(x), Ok(mut y)) =
            (MatrixRef::new(gathered, n, n_kept), MatrixMut::new(products, n, n_outs))
        else {
            unreachable!("the buffers were sized for the batch")
        };
        backend.add_low_bit(levels, x, &mut y);
        #[allow(clippy::cast_precision_loss)]
        for (r, (line, out)) in lines.iter().zip(out.chunks_mut(n)).enumerate() {
            let offset = (top - line.twice_zero) as f32;
            for (i, out) in out.iter_mut().enumerate() {
                let sum = sums.get(i).map_or(0.0, |sum| offset * sum);
                *out = line.factor * (products[i * n_outs + r] + sum);
            }
        }
    }
}

/// Buffers of a task.
#[derive(Default)]
struct Work {
    /// `[n_rows, n_kept]`.
    gathered: Vec<f32>,
    /// `[n_rows, rows of a block]`.
    products: Vec<f32>,
    /// Of what is gathered, `[n_rows]`.
    sums: Vec<f32>,
    ones: Vec<bf16>,
}

impl crate::DeltaLinear for Kept {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let n_outs = self.shape[0];
        if n_outs == 0 || self.n_kept == 0 {
            return;
        }
        for first in (0..x.n_rows()).step_by(BATCH_ROWS) {
            let rows = first..x.n_rows().min(first + BATCH_ROWS);
            let (x, n) = (x.rows(rows.clone()), rows.len());
            let mut products = vec![0.0; n_outs * n];
            let of_block = n * self.n_kept * self.block_rows;
            let blocks_each = (TASK_MULTIPLY_ADDS / of_block).max(1);
            let task = |work: &mut Work, (task, out): (usize, &mut [f32])| {
                for (i, out) in out.chunks_mut(self.block_rows * n).enumerate() {
                    self.multiply(backend, task * blocks_each + i, x, work, out);
                }
            };
            let of_task = blocks_each * self.block_rows * n;
            if of_task >= products.len() {
                task(&mut Work::default(), (0, &mut products));
            } else {
                let tasks = products.par_chunks_mut(of_task).enumerate();
                tasks.for_each_init(Work::default, task);
            }
            for (i, row) in rows.enumerate() {
                let products = products[i..].iter().step_by(n);
                y.row(row).iter_mut().zip(products).for_each(|(y, product)| *y += product);
            }
        }
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        let plane = plane_bytes(self.n_kept);
        for (row, out) in rows.zip(out.chunks_mut(self.shape[1].max(1))) {
            let codes = &self.planes[row * self.bits * plane..(row + 1) * self.bits * plane];
            self.visit(row / self.block_rows, |at, column| {
                let planes = codes.chunks(plane).enumerate();
                let code = planes
                    .fold(0, |code, (bit, plane)| code | (plane[at / 8] >> (at % 8) & 1) << bit);
                out[column] = self.lines[row].weight(code);
            });
        }
    }

    fn resident_bytes(&self) -> usize {
        let columns = match &self.columns {
            Columns::Short(columns) => size_of_val(columns.as_slice()),
            Columns::Long(columns) => size_of_val(columns.as_slice()),
        };
        columns + self.planes.len() + size_of_val(self.lines.as_slice())
    }
}
