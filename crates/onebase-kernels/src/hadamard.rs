//! Orthogonal transforms of rows with few operations: an element of the result depends on all
//! inputs, as with a random rotation, but `n (K + log2(n / K))` additions compute all.

mod construct;

use rayon::prelude::*;

use crate::Backend;
use crate::vector::{Kernel, LANES, Lanes};

/// The largest order of the dense factor that [`Hadamard::new`] uses.
const MAX_ORDER: usize = 1024;

/// Additions below which rows are not worth a second thread.
const WORTH_A_THREAD: usize = 1 << 18;

/// `(M ⊗ S) / sqrt(n)`: an input of `n = K · 2^m` numbers is seen as `[K, 2^m]`, each row is
/// multiplied with Sylvester's Hadamard matrix `S`, the columns with `M`, of order `K` (QuaRot,
/// arXiv 2404.00456, section 3).
#[derive(Clone, Debug)]
pub struct Hadamard {
    /// `K`.
    order: usize,
    /// `2^m`.
    width: usize,
    /// `[K, K]`, row-major, with `M Mᵀ = K I`.
    matrix: Vec<f32>,
}

impl Hadamard {
    /// The transform of `n` inputs with the smallest `K` for which a Hadamard matrix is
    /// constructed, the same for ever; `None` where that needs one above 1024.
    pub fn new(n: usize) -> Option<Self> {
        if n == 0 {
            return None;
        }
        let odd = n >> n.trailing_zeros();
        let orders = std::iter::successors(Some(odd), |order| Some(order * 2));
        let mut orders = orders.take_while(|order| *order <= n.min(MAX_ORDER));
        let signs = orders.find_map(construct::hadamard)?;
        let matrix = signs.signs.iter().map(|sign| f32::from(*sign)).collect();
        Some(Self { order: signs.order, width: n / signs.order, matrix })
    }

    /// The transform of `n` inputs with a matrix of one's own for `M`: `block`, `[k, k]`
    /// row-major, of orthogonal rows whose squares add up to `k` each. `None` where `k` times a
    /// power of two is not `n`, the block has another length or its rows are not so, up to the
    /// rounding of f32.
    pub fn with_block(n: usize, block: &[f32], k: usize) -> Option<Self> {
        let width = n.checked_div(k)?;
        if width * k != n || !width.is_power_of_two() || k.checked_mul(k) != Some(block.len()) {
            return None;
        }
        for (index, row) in block.chunks(k).enumerate() {
            for (other_index, other) in block.chunks(k).enumerate().skip(index) {
                let terms = row.iter().zip(other).map(|(a, b)| f64::from(*a) * f64::from(*b));
                let relative = terms.sum::<f64>() / k as f64;
                let want = if index == other_index { 1.0 } else { 0.0 };
                let apart = (relative - want).abs();
                if apart.is_nan() || apart >= 1e-5 {
                    return None;
                }
            }
        }
        Some(Self { order: k, width, matrix: block.to_vec() })
    }

    /// Inputs, and outputs.
    pub fn n_inputs(&self) -> usize {
        self.order * self.width
    }

    /// Transforms a row in f64. The result does not depend on the processor.
    ///
    /// Panics when it has another length.
    pub fn apply_f64(&self, row: &mut [f64]) {
        assert_eq!(row.len(), self.n_inputs(), "inputs of a transform");
        // SAFETY: the kernel is safe code.
        unsafe { Backend::fastest().run(ApplyF64 { hadamard: self, row }) }
    }

    /// What a result is multiplied with.
    fn factor(&self) -> f64 {
        #[allow(clippy::cast_precision_loss)]
        let n = self.n_inputs() as f64;
        1.0 / n.sqrt()
    }
}

impl Backend {
    /// Transforms rows of [`Hadamard::n_inputs`] in place. With ones for the matrix, as
    /// [`Hadamard::new`] has them, the result does not depend on the backend, nor ever on the
    /// number of threads or the other rows.
    ///
    /// Panics when the length is no multiple of that.
    pub fn hadamard_rows(self, hadamard: &Hadamard, rows: &mut [f32]) {
        self.transform_rows(hadamard, rows, false);
    }

    /// The inverse of [`Backend::hadamard_rows`], which is its transpose.
    ///
    /// Panics when the length is no multiple of the inputs.
    pub fn hadamard_transposed_rows(self, hadamard: &Hadamard, rows: &mut [f32]) {
        self.transform_rows(hadamard, rows, true);
    }

    fn transform_rows(self, hadamard: &Hadamard, rows: &mut [f32], transposed: bool) {
        let n = hadamard.n_inputs();
        assert!(rows.len().is_multiple_of(n), "inputs of transforms");
        let one = |scratch: &mut Vec<f32>, row: &mut [f32]| {
            // SAFETY: the row has the transform's length.
            unsafe { self.run(Apply { hadamard, transposed, row, scratch }) }
        };
        let additions = hadamard.order + hadamard.width.ilog2() as usize;
        if rows.len() == n || rows.len().saturating_mul(additions) < WORTH_A_THREAD {
            let mut scratch = Vec::new();
            rows.chunks_exact_mut(n).for_each(|row| one(&mut scratch, row));
        } else {
            rows.par_chunks_exact_mut(n).for_each_init(Vec::new, one);
        }
    }
}

struct Apply<'a> {
    hadamard: &'a Hadamard,
    transposed: bool,
    row: &'a mut [f32],
    scratch: &'a mut Vec<f32>,
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Hadamard { order, width, .. } = *self.hadamard;
        #[allow(clippy::cast_possible_truncation)]
        let factor = self.hadamard.factor() as f32;
        for part in self.row.chunks_exact_mut(width) {
            // SAFETY: the part's length is a power of two.
            unsafe { sylvester::<V>(part) }
        }
        if order == 1 {
            self.row.iter_mut().for_each(|v| *v *= factor);
            return;
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(self.row);
        let steps = if self.transposed { [1, order] } else { [order, 1] };
        let across =
            Across { matrix: &self.hadamard.matrix, steps, order, width, x: self.scratch, factor };
        // SAFETY: the lengths are the transform's.
        unsafe { across.write::<V>(self.row) }
    }
}

/// The product with Sylvester's matrix: pairs of numbers become their sum and their difference,
/// neighbours first, then those that are twice as far apart.
///
/// # Safety
/// As for [`Lanes`]; the length is a power of two.
#[inline(always)]
unsafe fn sylvester<V: Lanes>(x: &mut [f32]) {
    let n = x.len();
    for part in x.chunks_mut(LANES) {
        let mut apart = 1;
        while apart < part.len() {
            for pair in part.chunks_exact_mut(2 * apart) {
                let (first, second) = pair.split_at_mut(apart);
                for (a, b) in first.iter_mut().zip(second) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            apart *= 2;
        }
    }
    if n <= LANES {
        return;
    }
    let at = x.as_mut_ptr();
    // SAFETY: the vectors lie within the numbers, since a power of two from sixteen on is whole
    // vectors.
    unsafe {
        let mut apart = LANES;
        while 2 * apart < n {
            for first in (0..n).step_by(4 * apart) {
                for i in (first..first + apart).step_by(LANES) {
                    four::<V>(at.add(i), apart);
                }
            }
            apart *= 4;
        }
        if apart < n {
            for i in (0..apart).step_by(LANES) {
                let [a, b] = [V::load(at.add(i)), V::load(at.add(i + apart))];
                let [sum, difference] = pair(a, b);
                sum.store(at.add(i));
                difference.store(at.add(i + apart));
            }
        }
    }
}

/// Two steps at once, of vectors `apart` from each other.
///
/// # Safety
/// As for [`Lanes`], for four vectors.
#[inline(always)]
unsafe fn four<V: Lanes>(at: *mut f32, apart: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let [a, b] = pair(V::load(at), V::load(at.add(apart)));
        let [c, d] = pair(V::load(at.add(2 * apart)), V::load(at.add(3 * apart)));
        let [a, c] = pair(a, c);
        let [b, d] = pair(b, d);
        a.store(at);
        b.store(at.add(apart));
        c.store(at.add(2 * apart));
        d.store(at.add(3 * apart));
    }
}

/// Sum and difference.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn pair<V: Lanes>(a: V, b: V) -> [V; 2] {
    // SAFETY: operations on registers.
    unsafe { [b.mul_add(V::splat(1.0), a), b.mul_add(V::splat(-1.0), a)] }
}

/// The product of a matrix with columns, times a factor.
struct Across<'a> {
    matrix: &'a [f32],
    /// Elements of the matrix from one result to the next, and from one term to the next.
    steps: [usize; 2],
    order: usize,
    width: usize,
    /// `[order, width]`.
    x: &'a [f32],
    factor: f32,
}

impl Across<'_> {
    /// Overwrites `out`, `[order, width]`. The terms of an element are added in ascending order.
    ///
    /// # Safety
    /// As for [`Lanes`]; the lengths are those of the shapes.
    #[inline(always)]
    unsafe fn write<V: Lanes>(&self, out: &mut [f32]) {
        if self.width < LANES {
            for (at, out) in out.iter_mut().enumerate() {
                let first = at / self.width * self.steps[0];
                let column = self.x[at % self.width..].iter().step_by(self.width);
                let weights = self.matrix[first..].iter().step_by(self.steps[1]);
                let sum = weights.zip(column).fold(0.0, |sum, (w, x)| sum + w * x);
                *out = sum * self.factor;
            }
            return;
        }
        let to = out.as_mut_ptr();
        // SAFETY: the tiles lie within the shapes: widths are powers of two from sixteen on.
        unsafe {
            let mut col = 0;
            while col < self.width {
                if V::MANY_REGISTERS && self.width >= 4 * LANES {
                    self.panel::<V, 4>(col, to);
                    col += 4 * LANES;
                } else if !V::MANY_REGISTERS || self.width == LANES {
                    self.panel::<V, 1>(col, to);
                    col += LANES;
                } else {
                    self.panel::<V, 2>(col, to);
                    col += 2 * LANES;
                }
            }
        }
    }

    /// `N` vectors of columns from `col`.
    ///
    /// # Safety
    /// As for [`Across::write`].
    #[inline(always)]
    unsafe fn panel<V: Lanes, const N: usize>(&self, col: usize, to: *mut f32) {
        let mut row = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while row + 4 <= self.order {
                self.tile::<V, 4, N>(row, col, to);
                row += 4;
            }
            while row < self.order {
                self.tile::<V, 1, N>(row, col, to);
                row += 1;
            }
        }
    }

    /// # Safety
    /// As for [`Across::write`].
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const N: usize>(
        &self,
        row: usize,
        col: usize,
        to: *mut f32,
    ) {
        let [next_result, next_term] = self.steps;
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[V::splat(0.0); N]; R];
            let mut weights = self.matrix.as_ptr().add(row * next_result);
            let mut x = self.x.as_ptr().add(col);
            for _ in 0..self.order {
                let mut xs = [V::splat(0.0); N];
                for (n, xv) in xs.iter_mut().enumerate() {
                    *xv = V::load(x.add(n * LANES));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let weight = V::splat(*weights.add(r * next_result));
                    for (a, xv) in acc.iter_mut().zip(xs) {
                        *a = xv.mul_add(weight, *a);
                    }
                }
                weights = weights.wrapping_add(next_term);
                x = x.wrapping_add(self.width);
            }
            let factor = V::splat(self.factor);
            for (r, acc) in acc.into_iter().enumerate() {
                for (n, a) in acc.into_iter().enumerate() {
                    let at = to.add((row + r) * self.width + col + n * LANES);
                    a.mul_add(factor, V::splat(0.0)).store(at);
                }
            }
        }
    }
}

struct ApplyF64<'a> {
    hadamard: &'a Hadamard,
    row: &'a mut [f64],
}

impl Kernel for ApplyF64<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Hadamard { order, width, ref matrix } = *self.hadamard;
        let mut apart = 1;
        while apart < width {
            for pair in self.row.chunks_exact_mut(2 * apart) {
                let (first, second) = pair.split_at_mut(apart);
                for (a, b) in first.iter_mut().zip(second) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            apart *= 2;
        }
        let factor = self.hadamard.factor();
        if order == 1 {
            self.row.iter_mut().for_each(|v| *v *= factor);
            return;
        }
        let x = self.row.to_vec();
        let outs = self.row.chunks_exact_mut(width);
        for (out, weights) in outs.zip(matrix.chunks_exact(order)) {
            for (first, out) in out.chunks_mut(LANES).enumerate() {
                let mut sums = [0.0; LANES];
                for (weight, x) in weights.iter().zip(x.chunks_exact(width)) {
                    let x = &x[first * LANES..];
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum += f64::from(*weight) * x;
                    }
                }
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * factor);
            }
        }
    }
}
