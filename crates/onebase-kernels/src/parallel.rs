//! Splitting a product over output features.

use std::ops::Range;

use rayon::prelude::*;

/// Multiply-adds below which a product is not worth a second thread.
const WORTH_A_THREAD: usize = 1 << 18;

/// Weight bytes that one task reads: a part of the second-level cache.
const TASK_BYTES: usize = 1 << 17;

/// Multiply-adds of one task, where weights are few and rows many.
const TASK_MULTIPLY_ADDS: usize = 1 << 19;

/// Where a product's columns are added, shared by tasks that own disjoint
/// output features.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    data: *mut f32,
    /// Elements from one row of the batch to the next.
    stride: usize,
}

// SAFETY: tasks write disjoint elements, which `for_each_task` guarantees by
// handing out disjoint ranges of output features.
unsafe impl Send for Output {}
// SAFETY: as above; no task reads what another writes.
unsafe impl Sync for Output {}

impl Output {
    pub(crate) fn new(data: &mut [f32], stride: usize) -> Self {
        Self { data: data.as_mut_ptr(), stride }
    }

    /// # Safety
    /// `(row, out)` lies inside the matrix this was made from, the matrix is
    /// still borrowed, and no other task touches the element.
    #[inline(always)]
    pub(crate) unsafe fn add(self, row: usize, out: usize, value: f32) {
        // SAFETY: in bounds and exclusive by the caller's promise.
        unsafe { *self.data.add(row * self.stride + out) += value }
    }
}

/// Calls `task` with ranges that cover `0..out_features` once, in parallel when
/// the work is worth it. Ranges start at multiples of eight.
pub(crate) fn for_each_task(
    out_features: usize,
    row_bytes: usize,
    multiply_adds: usize,
    task: impl Fn(Range<usize>) + Sync,
) {
    split::<8>(out_features, row_bytes, multiply_adds, task);
}

/// [`for_each_task`] over blocks of output features, which may start anywhere.
pub(crate) fn for_each_block(
    n_blocks: usize,
    block_bytes: usize,
    multiply_adds: usize,
    task: impl Fn(Range<usize>) + Sync,
) {
    split::<1>(n_blocks, block_bytes, multiply_adds, task);
}

fn split<const MULTIPLE: usize>(
    n: usize,
    bytes_each: usize,
    multiply_adds: usize,
    task: impl Fn(Range<usize>) + Sync,
) {
    if multiply_adds < WORTH_A_THREAD || rayon::current_num_threads() == 1 {
        task(0..n);
        return;
    }
    let by_bytes = TASK_BYTES / bytes_each.max(1);
    let by_work = TASK_MULTIPLY_ADDS / (multiply_adds / n.max(1)).max(1);
    let per_task = by_bytes.min(by_work).clamp(MULTIPLE, 1 << 12).next_multiple_of(MULTIPLE);
    (0..n.div_ceil(per_task))
        .into_par_iter()
        .for_each(|i| task(i * per_task..n.min((i + 1) * per_task)));
}
