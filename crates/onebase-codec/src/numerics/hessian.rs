//! The factor of a damped second moment by which GPTQ carries errors on.

use std::ops::Range;

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::{Error, Result};

/// In which order the columns of a matrix are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColumnOrder {
    /// As they are.
    #[default]
    Index,
    /// Those with the largest inputs first: by falling elements of the diagonal of the
    /// second moment, equal ones as they are.
    Activation,
}

/// Damping, as a part of the mean of the diagonal, that GPTQ starts from; of the paper's
/// program.
pub const DAMPING: f64 = 0.01;

/// The damping that is tried last. Beyond it, what is added outweighs what was measured.
const MOST_DAMPING: f64 = 1.0;

/// The damping that is tried after none.
const LEAST_DAMPING: f64 = 1e-6;

/// The bytes that a thread keeps for products once it has computed one.
pub(super) const PRODUCT_BYTES: usize = 5 << 20;

/// Rows of a panel of the factor.
const PANEL: usize = 128;

/// A factorization of a damped second moment that every pass over the same inputs shares.
///
/// With `H + λI = R Rᵀ`, where `R` is upper triangular, `R⁻¹` is the upper Cholesky factor
/// `T` of the inverse, which GPTQ is written with: so nothing has to be inverted. Columns
/// are those of the order; the positions in it are what the methods speak of.
#[derive(Clone, Debug)]
pub struct HessianFactor {
    n: usize,
    /// The column at each position; empty when they are as they are.
    order: Vec<usize>,
    /// Whether the input of a column is always zero, by column; empty when none is.
    dead: Vec<bool>,
    /// `Rᵀ`, in panels of [`PANEL`] rows, each up to its last diagonal element, one after
    /// the other; empty of the identity.
    panels: Vec<f32>,
    /// `1 / R_jj`.
    inverse_diagonal: Vec<f32>,
    /// What the square of an error costs: `R_jj² / 2`, in the units of `H`; 0 at a column
    /// whose input is always zero.
    weight: Vec<f64>,
    damping: f64,
    lambda: f64,
}

impl HessianFactor {
    /// Factors the second moment `h` of `n` inputs, `[n, n]`, row-major, of which what is
    /// above the diagonal is not read.
    ///
    /// `λ` is `damping` times the mean of the diagonal. Where that does not make the matrix
    /// positive definite to rounding, it is ten times as much, and so on up to the mean
    /// itself: see [`HessianFactor::damping`]. Nothing depends on the unit of `h`.
    ///
    /// The weights of a column whose input is always zero, with a zero on the diagonal, are
    /// taken for zero. The paper's program puts 1 on the diagonal there, beside sums over
    /// all tokens; here such columns are the last of an order by activation, and add
    /// nothing to the mean, which is the limit for many tokens.
    ///
    /// Panics when the length is not `n · n` or `damping` is not a number ≥ 0.
    ///
    /// # Errors
    /// When an element is NaN or ∞, and when no damping makes the matrix positive definite.
    pub fn new<T>(h: &[T], n: usize, order: ColumnOrder, damping: f64) -> Result<Self>
    where
        T: Copy + Into<f64>,
    {
        assert_eq!(Some(h.len()), n.checked_mul(n), "elements of the second moment");
        assert!(damping.is_finite() && damping >= 0.0, "damping {damping}");
        if let Some(at) = h.iter().position(|x| !(*x).into().is_finite()) {
            return Err(Error::Overflow { row: at / n, column: at % n, got: h[at].into() });
        }
        let diagonal: Vec<f64> = (0..n).map(|j| h[j * (n + 1)].into()).collect();
        let mut positions: Vec<usize> = (0..n).collect();
        if order == ColumnOrder::Activation {
            positions.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
        }
        #[allow(clippy::cast_precision_loss)]
        let mean = diagonal.iter().map(|x| x / n as f64).sum::<f64>();
        // All factors are those of about this unit, so that they are in the range of f32.
        let unit = if mean > 0.0 { power_of_two(mean) } else { 1.0 };
        let mean = if mean > 0.0 { mean / unit } else { 1.0 };
        let at = |i: usize, j: usize| {
            let (a, b) = (positions[i], positions[j]);
            if diagonal[a] == 0.0 || diagonal[b] == 0.0 {
                return if a == b { mean } else { 0.0 };
            }
            h[a.max(b) * n + a.min(b)].into() / unit
        };
        let mut damping = damping;
        let mut factor = loop {
            if let Some(factor) = Self::factored(n, at, damping * mean) {
                break factor;
            }
            let next = (damping * 10.0).max(LEAST_DAMPING);
            // A little more, for what rounding adds on the way.
            if next > MOST_DAMPING * 1.000_001 {
                return Err(Error::NotPositiveDefinite { n, damping });
            }
            damping = next;
        };
        factor.damping = damping;
        factor.lambda = damping * mean * unit;
        factor.weight.iter_mut().for_each(|weight| *weight *= unit);
        if diagonal.contains(&0.0) {
            factor.dead = diagonal.iter().map(|x| *x == 0.0).collect();
            for (weight, column) in factor.weight.iter_mut().zip(&positions) {
                *weight = if factor.dead[*column] { 0.0 } else { *weight };
            }
        }
        if order == ColumnOrder::Activation {
            factor.order = positions;
        }
        Ok(factor)
    }

    /// The factor of the identity, without damping: all inputs are independent and alike.
    /// Every weight is then rounded to the nearest, and it takes no memory to speak of.
    pub fn identity(n: usize) -> Self {
        Self {
            n,
            order: Vec::new(),
            dead: Vec::new(),
            panels: Vec::new(),
            inverse_diagonal: vec![1.0; n],
            weight: vec![0.5; n],
            damping: 0.0,
            lambda: 0.0,
        }
    }

    /// Columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The column at each position of the order, `[n]`; `None` when they are as they are.
    pub fn order(&self) -> Option<&[usize]> {
        (!self.order.is_empty()).then_some(&*self.order)
    }

    /// The column at a position.
    pub fn column(&self, position: usize) -> usize {
        self.order.get(position).copied().unwrap_or(position)
    }

    /// Whether the input of a column is always zero.
    pub fn is_dead(&self, column: usize) -> bool {
        self.dead.get(column).copied().unwrap_or(false)
    }

    /// Columns whose input is always zero.
    pub fn n_dead(&self) -> usize {
        self.dead.iter().filter(|dead| **dead).count()
    }

    /// The damping that made the matrix positive definite, as a part of the mean of the
    /// diagonal.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// What was added to the diagonal, in the units of the second moment.
    pub fn lambda(&self) -> f64 {
        self.lambda
    }

    /// The bytes of a factor for `n` inputs.
    pub fn bytes(n: usize) -> usize {
        size_of::<f32>() * panel_start(n, n.div_ceil(PANEL)) + 32 * n
    }

    /// The most bytes that [`HessianFactor::new`] holds at a time, the factor included and
    /// the second moment not.
    pub fn working_bytes(n: usize) -> usize {
        size_of::<f64>() * n * n + Self::bytes(n) + PRODUCT_BYTES
    }

    /// The factor of a matrix, given by its elements on and below the diagonal, plus
    /// `lambda` on the diagonal; `None` when that is not positive definite.
    fn factored(n: usize, at: impl Fn(usize, usize) -> f64, lambda: f64) -> Option<Self> {
        // The lower factor of the matrix backwards is the upper one of the matrix.
        let mut l = Mat::from_fn(n, n, |i, j| {
            let damping = if i == j { lambda } else { 0.0 };
            if i < j { 0.0 } else { at(n - 1 - i, n - 1 - j) + damping }
        });
        let scratch = cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
        let mut memory = MemBuffer::new(scratch);
        let stack = MemStack::new(&mut memory);
        cholesky_in_place(l.as_mut(), Default::default(), Par::Seq, stack, Default::default())
            .ok()?;
        let mut panels = Vec::with_capacity(panel_start(n, n.div_ceil(PANEL)));
        for first in (0..n).step_by(PANEL) {
            let end = n.min(first + PANEL);
            for j in first..end {
                let row = (0..end).map(|i| if i > j { 0.0 } else { l[(n - 1 - i, n - 1 - j)] });
                #[allow(clippy::cast_possible_truncation)]
                panels.extend(row.map(|x| x as f32));
            }
        }
        let diagonal = || (0..n).rev().map(|i| l[(i, i)]);
        #[allow(clippy::cast_possible_truncation)]
        let inverse_diagonal: Vec<f32> = diagonal().map(|x| (1.0 / x) as f32).collect();
        let weight: Vec<f64> = diagonal().map(|x| x * x / 2.0).collect();
        let finite = inverse_diagonal.iter().chain(&panels).all(|x| x.is_finite());
        let none = Self::identity(0);
        finite.then_some(Self { n, panels, inverse_diagonal, weight, ..none })
    }

    pub(super) fn is_identity(&self) -> bool {
        self.panels.is_empty()
    }

    /// `1 / R_jj` by position.
    pub(super) fn inverse_diagonal(&self) -> &[f32] {
        &self.inverse_diagonal
    }

    /// What the square of an error costs, by position.
    pub(super) fn weight(&self) -> &[f64] {
        &self.weight
    }

    /// Adds `a[:, depth] R[depth, span]` to `sum`, `[rows, span]`, where `a` is `[rows, n]`
    /// and the end of `depth` is at most the start of the span.
    pub(super) fn add_product(
        &self,
        a: &[f32],
        depth: Range<usize>,
        span: Range<usize>,
        sum: MatMut<'_, f32>,
    ) {
        if self.is_identity() || depth.is_empty() {
            return;
        }
        let a = MatRef::from_row_major_slice(a, a.len() / self.n, self.n);
        let a = a.subcols(depth.start, depth.len());
        let mut rest = sum;
        for (panel, rows) in self.panels_of(span) {
            let r = panel.submatrix(rows.start, depth.start, rows.len(), depth.len());
            let (of_panel, others) = rest.split_at_col_mut(rows.len());
            matmul(of_panel, Accum::Add, a, r.transpose(), 1.0, Par::Seq);
            rest = others;
        }
    }

    /// `R[block, block]`, row-major; empty of the identity.
    pub(super) fn corner(&self, block: Range<usize>, out: &mut Vec<f32>) {
        out.clear();
        if self.is_identity() {
            return;
        }
        out.resize(block.len() * block.len(), 0.0);
        let mut j = 0;
        for (panel, rows) in self.panels_of(block.clone()) {
            for row in rows {
                for i in 0..=j {
                    out[i * block.len() + j] = panel[(row, block.start + i)];
                }
                j += 1;
            }
        }
    }

    /// The panels that hold rows of `Rᵀ`, each with its own numbers of these rows.
    fn panels_of(
        &self,
        rows: Range<usize>,
    ) -> impl Iterator<Item = (MatRef<'_, f32>, Range<usize>)> {
        (rows.start / PANEL..rows.end.div_ceil(PANEL)).map(move |index| {
            let (first, end) = (index * PANEL, self.n.min((index + 1) * PANEL));
            let values = &self.panels[panel_start(self.n, index)..panel_start(self.n, index + 1)];
            let panel = MatRef::from_row_major_slice(values, end - first, end);
            (panel, rows.start.max(first) - first..rows.end.min(end) - first)
        })
    }
}

/// Elements before a panel.
fn panel_start(n: usize, index: usize) -> usize {
    let full = index.min(n / PANEL);
    let elements = PANEL * PANEL * full * (full + 1) / 2;
    if index > full { elements + (n - full * PANEL) * n } else { elements }
}

/// The largest power of two that is at most `x`; for a subnormal number, the least normal
/// one.
fn power_of_two(x: f64) -> f64 {
    f64::from_bits(x.to_bits() & f64::INFINITY.to_bits()).max(f64::MIN_POSITIVE)
}
