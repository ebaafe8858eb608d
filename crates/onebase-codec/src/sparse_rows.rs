//! A matrix of few weights, in memory: which they are, and where they stand.

use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, plane_bytes};
use onebase_tensor::{MatrixMut, MatrixRef};
use rayon::prelude::*;

use crate::DeltaLinear;

/// The set bits of a row's mask, ascending.
pub(crate) fn columns_of(mask: &[u8]) -> impl Iterator<Item = usize> {
    mask.chunks(8).enumerate().flat_map(|(index, bytes)| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let mut left = u64::from_le_bytes(word);
        std::iter::from_fn(move || {
            let bit = (left != 0).then_some(left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(64 * index + bit)
        })
    })
}

/// Where the kept weights stand, in memory.
pub(crate) enum Places {
    /// `[out_features, plane_bytes]`.
    Mask(Vec<u8>),
    /// `[n_kept]`.
    Short(Vec<u16>),
    /// `[n_kept]`.
    Long(Vec<u32>),
}

/// A delta `[out_features, in_features]`, most of whose weights are zero.
pub(crate) struct SparseRows {
    pub(crate) shape: [usize; 2],
    /// Where each row's values begin, and the last ones end: `[out_features + 1]`.
    pub(crate) starts: Vec<usize>,
    pub(crate) places: Places,
    /// `[n_kept]`.
    pub(crate) value: Vec<bf16>,
}

/// Partial sums of a product's element: its kept weights take turns, so that additions
/// need not wait for each other, and the sums are added in their order.
const SUMS: usize = 8;

/// Rows of a batch that are multiplied at a time, which bounds the products that wait
/// to be added.
const BATCH_ROWS: usize = 64;

/// Multiply-adds of one task.
const TASK_MULTIPLY_ADDS: usize = 1 << 16;

impl SparseRows {
    /// Calls `each` with every kept weight of a row and its input feature, ascending.
    fn visit(&self, row: usize, mut each: impl FnMut(usize, f32)) {
        let kept = self.starts[row]..self.starts[row + 1];
        let values = self.value[kept.clone()].iter().map(|v| v.to_f32());
        match &self.places {
            Places::Mask(mask) => {
                let plane = plane_bytes(self.shape[1]);
                let columns = columns_of(&mask[row * plane..(row + 1) * plane]);
                columns.zip(values).for_each(|(column, value)| each(column, value));
            }
            Places::Short(index) => {
                let columns = index[kept].iter().map(|column| usize::from(*column));
                columns.zip(values).for_each(|(column, value)| each(column, value));
            }
            Places::Long(index) => {
                let columns = index[kept].iter().map(|column| *column as usize);
                columns.zip(values).for_each(|(column, value)| each(column, value));
            }
        }
    }

    /// The products of one row of Δ with each row of `x`, into `out`, `[n_rows]`.
    fn multiply(&self, row: usize, x: MatrixRef<'_>, kept: &mut Kept, out: &mut [f32]) {
        kept.clear();
        self.visit(row, |column, value| kept.push((column, value)));
        for (i, out) in out.iter_mut().enumerate() {
            let x = x.row(i);
            let mut sums = [0.0; SUMS];
            for kept in kept.chunks(SUMS) {
                for (sum, (column, value)) in sums.iter_mut().zip(kept) {
                    *sum += x[*column] * value;
                }
            }
            *out = sums.iter().sum();
        }
    }
}

/// Input features and weights.
type Kept = Vec<(usize, f32)>;

impl DeltaLinear for SparseRows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, _: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let n_outs = self.shape[0];
        if n_outs == 0 || self.value.is_empty() {
            return;
        }
        for first in (0..x.n_rows()).step_by(BATCH_ROWS) {
            let rows = first..x.n_rows().min(first + BATCH_ROWS);
            let (x, n) = (x.rows(rows.clone()), rows.len());
            let mut products = vec![0.0; n_outs * n];
            let outs_each = (TASK_MULTIPLY_ADDS * n_outs / (n * self.value.len())).max(1);
            let task = |kept: &mut Kept, (task, out): (usize, &mut [f32])| {
                for (i, out) in out.chunks_mut(n).enumerate() {
                    self.multiply(task * outs_each + i, x, kept, out);
                }
            };
            if outs_each >= n_outs {
                task(&mut Vec::new(), (0, &mut products));
            } else {
                let tasks = products.par_chunks_mut(outs_each * n).enumerate();
                tasks.for_each_init(Vec::new, task);
            }
            for (i, row) in rows.enumerate() {
                let products = products[i..].iter().step_by(n);
                y.row(row).iter_mut().zip(products).for_each(|(y, product)| *y += product);
            }
        }
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        let n_cols = self.shape[1];
        for (row, out) in rows.zip(out.chunks_mut(n_cols.max(1))) {
            self.visit(row, |column, value| out[column] = value);
        }
    }

    fn resident_bytes(&self) -> usize {
        let places = match &self.places {
            Places::Mask(mask) => mask.len(),
            Places::Short(index) => size_of_val(index.as_slice()),
            Places::Long(index) => size_of_val(index.as_slice()),
        };
        places + size_of_val(self.starts.as_slice()) + size_of_val(self.value.as_slice())
    }
}
