//! `y += W x` for a stored weight matrix.

use std::ops::Range;

use onebase_tensor::{MatrixMut, MatrixRef, WeightRef};

use crate::Backend;
use crate::parallel::{Output, for_each_task};
use crate::tiles::{Tiled, cover};
use crate::vector::{Kernel, LANES, Lanes, Stored, load_rows, load_tails};

impl Backend {
    /// `y += x Wᵀ`: `weight` is `[out_features, in_features]`, `x` is
    /// `[n_rows, in_features]`, `y` is `[n_rows, out_features]`.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_dense(self, weight: WeightRef<'_>, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let [n_rows, in_features] = x.shape();
        let out_features = y.n_cols();
        assert_eq!(y.n_rows(), n_rows, "rows of x and y");
        assert_eq!(Some(weight.len()), out_features.checked_mul(in_features), "weights");
        let output = Output::new(y.data(), out_features);
        let row_bytes = in_features * weight.dtype().size_bytes();
        let work = out_features.saturating_mul(in_features).saturating_mul(n_rows);
        for_each_task(out_features, row_bytes, work, |outs| {
            macro_rules! run {
                ($w:expr) => {
                    // SAFETY: lengths were checked above, `outs` lies within
                    // `out_features`, and no two tasks share an output feature.
                    unsafe { self.run(Dense { weight: $w, in_features, x, output, outs }) }
                };
            }
            match weight {
                WeightRef::F32(w) => run!(w),
                WeightRef::BF16(w) => run!(w),
                WeightRef::F16(w) => run!(w),
            }
        });
    }
}

/// The product for some output features and all rows.
struct Dense<'a, W> {
    weight: &'a [W],
    in_features: usize,
    x: MatrixRef<'a>,
    output: Output,
    outs: Range<usize>,
}

impl<W: Stored> Kernel for Dense<'_, W> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: `outs` and the rows are the product's.
        unsafe { cover::<V, Self, 8, 4>(&self, self.outs.clone(), self.x.n_rows()) }
    }
}

impl<W: Stored> Tiled for Dense<'_, W> {
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const B: usize>(&self, out: usize, row: usize) {
        let n = self.in_features;
        let whole = n - n % LANES;
        // SAFETY: `out + R` and `row + B` are within the matrices, whose lengths
        // `add_dense` checked; the tail is copied into buffers of full width,
        // where zeros leave the sums as they are.
        unsafe {
            let w = self.weight.as_ptr().add(out * n);
            let x = self.x.data().as_ptr().add(row * n);
            let mut acc = [[V::splat(0.0); B]; R];
            let mut k = 0;
            while k < whole {
                let xs = load_rows::<V, B>(x.add(k), n);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let at = w.add(r * n + k);
                    if B == 1 {
                        // Rows are pages apart, which the processor's own
                        // prefetching does not cross; the next tile's are asked for.
                        V::prefetch(at.wrapping_add(R * n).cast());
                    }
                    let wv: V = W::load(at);
                    for (a, xv) in acc.iter_mut().zip(xs) {
                        *a = wv.mul_add(xv, *a);
                    }
                }
                k += LANES;
            }
            if whole < n {
                let xs = load_tails::<V, B>(self.x, row);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let mut tail = [W::ZERO; LANES];
                    let from = (out + r) * n + whole;
                    tail[..n - whole].copy_from_slice(&self.weight[from..from + n - whole]);
                    let wv: V = W::load(tail.as_ptr());
                    for (a, xv) in acc.iter_mut().zip(xs) {
                        *a = wv.mul_add(xv, *a);
                    }
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                for (b, a) in acc.into_iter().enumerate() {
                    self.output.add(row + b, out + r, a.sum());
                }
            }
        }
    }
}
