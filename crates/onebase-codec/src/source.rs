use std::ops::Range;

use onebase_kernels::thin::GROUP;
use onebase_tensor::MatrixRef;
use rayon::prelude::*;

use crate::signs::finite_sum;
use crate::{Error, Result};

/// A delta `[out_features, in_features]` that can be read by rows, so that an
/// encoder need not hold a large one.
pub trait DeltaSource: Sync {
    /// `[out_features, in_features]`.
    fn shape(&self) -> [usize; 2];

    /// Reads rows into `out`, `[rows.len(), in_features]`.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()>;
}

impl DeltaSource for MatrixRef<'_> {
    fn shape(&self) -> [usize; 2] {
        MatrixRef::shape(self)
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(self.rows(rows).data());
        Ok(())
    }
}

/// Elements of a block: together with its codes it fits a second-level cache.
pub(crate) const BLOCK_WEIGHTS: usize = 1 << 16;

/// Reads a delta in blocks of rows, in parallel, checks that every weight is
/// finite, and lets `encode` write each block's share of two outputs.
///
/// `codes` has `codes_per_row` elements for each row and `scales` has
/// `scales_per_row`. The blocks depend only on the shape, and each is encoded
/// alone, so the outputs do not depend on the number of threads.
///
/// # Errors
/// When the delta cannot be read or holds NaN or ∞.
pub fn for_each_block<C: Send, S: Send>(
    delta: &dyn DeltaSource,
    (codes, codes_per_row): (&mut [C], usize),
    (scales, scales_per_row): (&mut [S], usize),
    encode: impl Fn(MatrixRef<'_>, &mut [C], &mut [S]) + Sync,
) -> Result<()> {
    let [n_rows, n_cols] = delta.shape();
    assert_eq!(codes.len(), n_rows * codes_per_row, "codes");
    assert_eq!(scales.len(), n_rows * scales_per_row, "scales");
    if n_rows == 0 || n_cols == 0 {
        return Ok(());
    }
    let block_rows = (BLOCK_WEIGHTS / n_cols).max(1);
    let codes = codes.par_chunks_mut(block_rows * codes_per_row);
    let scales = scales.par_chunks_mut(block_rows * scales_per_row);
    codes.zip(scales).enumerate().try_for_each_init(Vec::new, |buffer, (index, (codes, scales))| {
        let first = index * block_rows;
        let rows = first..n_rows.min(first + block_rows);
        buffer.resize(rows.len() * n_cols, 0.0);
        delta.read_rows(rows.clone(), buffer)?;
        check_finite(buffer, first, n_cols)?;
        let Ok(block) = MatrixRef::new(buffer, rows.len(), n_cols) else {
            unreachable!("the buffer was sized for the block")
        };
        encode(block, codes, scales);
        Ok(())
    })
}

/// Bytes that threads hold while they read a delta: blocks of weights of both sides, the
/// difference and what is taken off it, and rows that wait for a product.
pub(crate) fn reading_bytes([_, n_cols]: [usize; 2], n_threads: usize) -> usize {
    n_threads * (6 * BLOCK_WEIGHTS.max(n_cols) + GROUP * n_cols) * size_of::<f32>()
}

/// Reads rows of a delta, `[rows.len(), in_features]`.
///
/// # Errors
/// When they cannot be read or hold NaN or ∞.
pub fn read_finite(delta: &dyn DeltaSource, rows: Range<usize>) -> Result<Vec<f32>> {
    let n_cols = delta.shape()[1];
    let mut weights = vec![0.0; rows.len() * n_cols];
    delta.read_rows(rows.clone(), &mut weights)?;
    check_finite(&weights, rows.start, n_cols)?;
    Ok(weights)
}

/// [`read_finite`], widened to f64.
///
/// # Errors
/// As there.
pub fn read_wide(delta: &dyn DeltaSource, rows: Range<usize>) -> Result<Vec<f64>> {
    Ok(read_finite(delta, rows)?.into_iter().map(f64::from).collect())
}

/// What is taken off rows of a delta, `[rows.len(), in_features]`.
pub(crate) type Taken<'a> = &'a (dyn Fn(Range<usize>, &mut [f32]) + Sync);

/// A delta less what something else holds of it.
pub(crate) struct Less<'a> {
    pub(crate) delta: &'a dyn DeltaSource,
    pub(crate) taken: Taken<'a>,
}

impl DeltaSource for Less<'_> {
    fn shape(&self) -> [usize; 2] {
        self.delta.shape()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.delta.read_rows(rows.clone(), out)?;
        (self.taken)(rows, out);
        Ok(())
    }
}

/// A delta times a number.
pub(crate) struct Scaled<'a> {
    pub(crate) delta: &'a dyn DeltaSource,
    pub(crate) factor: f64,
}

impl DeltaSource for Scaled<'_> {
    fn shape(&self) -> [usize; 2] {
        self.delta.shape()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.delta.read_rows(rows, out)?;
        #[allow(clippy::cast_possible_truncation)]
        out.iter_mut().for_each(|w| *w = (f64::from(*w) * self.factor) as f32);
        Ok(())
    }
}

/// Takes off weights what `write` writes for them.
pub(crate) fn take(weights: &mut [f32], write: impl FnOnce(&mut [f32])) {
    let mut taken = vec![0.0; weights.len()];
    write(&mut taken);
    weights.iter_mut().zip(&taken).for_each(|(w, taken)| *w = finite_sum(*w, -taken));
}

/// Checks rows from `first` on.
pub(crate) fn check_finite(weights: &[f32], first: usize, n_cols: usize) -> Result<()> {
    match first_not_finite(weights) {
        None => Ok(()),
        Some(at) => {
            let (row, column) = (first + at / n_cols, at % n_cols);
            Err(Error::NotFinite { row, column, got: weights[at] })
        }
    }
}

/// The first NaN or ∞. Looks at whole chunks first, which compiles to vector code.
fn first_not_finite(weights: &[f32]) -> Option<usize> {
    let bad = |chunk: &[f32]| chunk.iter().fold(false, |bad, w| bad | !w.is_finite());
    if weights.chunks(1024).any(bad) { weights.iter().position(|w| !w.is_finite()) } else { None }
}
