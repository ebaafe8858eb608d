//! A matrix of which blocks of rows keep the same input features, with low-bit codes for them.
//!
//! Nothing is done for what is dropped. Where many rows share their inputs, a kernel takes them
//! together; where few do, the inputs of each block are gathered, and its codes are multiplied with them as those of a
//! small dense matrix.

use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, Gathered, LANES, LowBit, plane_bytes};
use onebase_tensor::{MatrixMut, MatrixRef};
use rayon::prelude::*;

/// What the codes of a matrix stand for: the weight is `factor · (2 code − twice_zero)`.
pub(crate) struct Lines {
    /// Half of the step between codes, of each row.
    pub(crate) factors: Vec<f32>,
    /// Twice the code of weight zero.
    pub(crate) twice_zero: i64,
}

impl Lines {
    /// The weight of a code.
    #[allow(clippy::cast_precision_loss)]
    fn weight(&self, row: usize, code: u8) -> f32 {
        let level = 2 * i64::from(code) - self.twice_zero;
        (self.factors[row] * level as f32).clamp(-f32::MAX, f32::MAX)
    }

    /// What is added to the odd levels `2 code − (2^bits − 1)`.
    #[allow(clippy::cast_precision_loss)]
    fn offset(&self, bits: usize) -> f32 {
        ((1i64 << bits) - 1 - self.twice_zero) as f32
    }
}

/// A delta `[out_features, in_features]` in this form.
pub(crate) struct Kept {
    shape: [usize; 2],
    bits: usize,
    lines: Lines,
    codes: Codes,
}

enum Codes {
    /// Blocks of at least as many rows as there are lanes.
    Shared(Gathered),
    Own(Planes),
}

impl Kept {
    /// `columns` are input features, `[n_blocks, n_kept]`, `codes` are below `2^bits`,
    /// `[out_features, n_kept]`, row after row, and `lines` say what they stand for.
    ///
    /// Panics when a length, an input feature or a code does not fit: who calls has checked them.
    pub(crate) fn new(
        shape: [usize; 2],
        block_rows: usize,
        bits: usize,
        columns: Vec<u32>,
        codes: impl Iterator<Item = u8>,
        lines: Lines,
    ) -> Self {
        assert_eq!(lines.factors.len(), shape[0], "lines");
        let codes = if (LANES..=Gathered::MAX_BLOCK_ROWS).contains(&block_rows) {
            Codes::Shared(Gathered::new(shape, block_rows, bits, columns, codes))
        } else {
            Codes::Own(Planes::new(shape, block_rows, bits, columns, codes))
        };
        Self { shape, bits, lines, codes }
    }
}

impl crate::DeltaLinear for Kept {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let offset = self.lines.offset(self.bits);
        match &self.codes {
            Codes::Shared(codes) => {
                backend.add_gathered(codes, &self.lines.factors, offset, x, y);
            }
            Codes::Own(codes) => codes.add_to(backend, &self.lines.factors, offset, x, y),
        }
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        for (row, out) in rows.zip(out.chunks_mut(self.shape[1].max(1))) {
            let each = |column, code| out[column] = self.lines.weight(row, code);
            match &self.codes {
                Codes::Shared(codes) => codes.visit(row, each),
                Codes::Own(codes) => codes.visit(row, each),
            }
        }
    }

    fn resident_bytes(&self) -> usize {
        let codes = match &self.codes {
            Codes::Shared(codes) => codes.resident_bytes(),
            Codes::Own(codes) => size_of_val(codes.columns.as_slice()) + codes.planes.len(),
        };
        codes + size_of_val(self.lines.factors.as_slice())
    }
}

/// Codes of blocks of few rows.
struct Planes {
    /// `[out_features, in_features]`.
    shape: [usize; 2],
    /// Rows that keep the same input features; the last block may have fewer.
    block_rows: usize,
    bits: usize,
    /// Kept weights of a row.
    n_kept: usize,
    /// `[n_blocks, n_kept]`.
    columns: Vec<u32>,
    /// `[out_features, bits, plane_bytes(n_kept)]`, as [`LowBit`] has them.
    planes: Vec<u8>,
}

/// Rows of a batch that are multiplied at a time, which bounds the products that wait
/// to be added.
const BATCH_ROWS: usize = 64;

/// Multiply-adds of one task.
const TASK_MULTIPLY_ADDS: usize = 1 << 17;

impl Planes {
    fn new(
        shape @ [n_rows, n_cols]: [usize; 2],
        block_rows: usize,
        bits: usize,
        columns: Vec<u32>,
        codes: impl Iterator<Item = u8>,
    ) -> Self {
        let n_blocks = n_rows.div_ceil(block_rows);
        let n_kept = columns.len().checked_div(n_blocks).unwrap_or(0);
        assert_eq!(columns.len(), n_blocks * n_kept, "columns");
        assert!(columns.iter().all(|column| (*column as usize) < n_cols), "columns");
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
        Self { shape, block_rows, bits, n_kept, columns, planes }
    }

    /// The input features that a block keeps.
    fn columns(&self, block: usize) -> &[u32] {
        &self.columns[block * self.n_kept..(block + 1) * self.n_kept]
    }

    /// The products of the rows of a block with each row of `x`, into `out`,
    /// `[rows of the block, n_rows]`.
    fn multiply(
        &self,
        backend: Backend,
        block: usize,
        (factors, offset): (&[f32], f32),
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
            let (x, columns) = (x.row(i), self.columns(block));
            gathered.iter_mut().zip(columns).for_each(|(to, column)| *to = x[*column as usize]);
        }
        sums.clear();
        if offset != 0.0 {
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
        let factors = &factors[first..first + n_outs];
        for (r, (factor, out)) in factors.iter().zip(out.chunks_mut(n)).enumerate() {
            for (i, out) in out.iter_mut().enumerate() {
                let sum = sums.get(i).map_or(0.0, |sum| offset * sum);
                *out = factor * (products[i * n_outs + r] + sum);
            }
        }
    }

    fn add_to(
        &self,
        backend: Backend,
        factors: &[f32],
        offset: f32,
        x: MatrixRef<'_>,
        y: &mut MatrixMut<'_>,
    ) {
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
                    let block = task * blocks_each + i;
                    self.multiply(backend, block, (factors, offset), x, work, out);
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

    /// Calls `each` with all input features that a row keeps and their codes.
    fn visit(&self, row: usize, mut each: impl FnMut(usize, u8)) {
        let plane = plane_bytes(self.n_kept);
        let codes = &self.planes[row * self.bits * plane..(row + 1) * self.bits * plane];
        for (at, column) in self.columns(row / self.block_rows).iter().enumerate() {
            let planes = codes.chunks(plane).enumerate();
            let code =
                planes.fold(0, |code, (bit, plane)| code | (plane[at / 8] >> (at % 8) & 1) << bit);
            each(*column as usize, code);
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
