//! Covering a product with tiles.

use std::ops::Range;

use crate::vector::Lanes;

/// Batch rows that are multiplied before the weights of a task are read again:
/// their activations fit the second-level cache.
const BATCH_BLOCK: usize = 64;

/// A product that is computed tile by tile.
pub(crate) trait Tiled {
    /// Adds to `R` output features from `out` of `B` rows from `row`.
    ///
    /// # Safety
    /// The lanes' instructions are available and the tile lies inside the
    /// product.
    unsafe fn tile<V: Lanes, const R: usize, const B: usize>(&self, out: usize, row: usize);
}

/// Covers the output features `outs` of all rows: four rows at a time with `FEW`
/// features, single rows with `MANY`, a multiple of it.
///
/// # Safety
/// The lanes' instructions are available, and the product has the features and
/// the rows.
#[inline(always)]
pub(crate) unsafe fn cover<V: Lanes, T: Tiled, const MANY: usize, const FEW: usize>(
    product: &T,
    outs: Range<usize>,
    n_rows: usize,
) {
    const { assert!(MANY.is_multiple_of(FEW)) };
    let mut first = 0;
    while first < n_rows {
        let last = n_rows.min(first + BATCH_BLOCK);
        let mut out = outs.start;
        while out < outs.end {
            let many = out + MANY <= outs.end;
            let mut row = first;
            while row < last {
                // SAFETY: the tiles lie within `outs` and `n_rows`.
                unsafe {
                    if many && row + 4 <= last {
                        let mut few = out;
                        while few < out + MANY {
                            product.tile::<V, FEW, 4>(few, row);
                            few += FEW;
                        }
                        row += 4;
                    } else if many {
                        product.tile::<V, MANY, 1>(out, row);
                        row += 1;
                    } else {
                        product.tile::<V, 1, 1>(out, row);
                        row += 1;
                    }
                }
            }
            out += if many { MANY } else { 1 };
        }
        first = last;
    }
}
