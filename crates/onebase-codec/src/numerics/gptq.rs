//! Rounding by columns where the error of each is made good by those that follow:
//! E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
//! Transformers" (ICLR 2023).
//!
//! The paper's program keeps all weights compensated: after column `j` is rounded to `q`,
//! `e_j = (c_j − q_j) / T_jj` times row `j` of `T` is taken from the columns that follow,
//! where `T` is the upper Cholesky factor of the inverse second moment. All steps together
//! are `e T = w − q`, so `e = δ R` of the errors `δ = w − q` of the original weights and
//! `R = T⁻¹`, and a column is rounded from
//!
//! ```text
//! c_j = w_j + (Σ_{i<j} δ_i R_ij) / R_jj
//! ```
//!
//! which takes products of blocks of `δ` and of `R`, and no inverse.

use std::ops::Range;

use faer::MatMut;
use half::f16;
use rayon::prelude::*;

use super::HessianFactor;
use super::hessian::PRODUCT_BYTES;

/// How a scale is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScaleFormat {
    /// As it is.
    #[default]
    F32,
    /// Rounded to the nearest f16, at most the largest. Of weights all below about 3e-8,
    /// that is 0.
    F16,
}

impl ScaleFormat {
    fn stored(self, scale: f32) -> f32 {
        match self {
            ScaleFormat::F32 => scale,
            ScaleFormat::F16 => f16::from_f32(scale.min(f16::MAX.to_f32())).to_f32(),
        }
    }
}

/// Levels that follow the range of the weights of a group of columns in a row:
/// `scale · (code − zero)`.
///
/// With `lo = min(0, least)` and `hi = max(0, largest)`, `scale = (hi − lo) / (2^bits − 1)`
/// and `zero = round(−lo / scale)`; −1 and 1 stand for a range that is only 0. Halves
/// are rounded to even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeGrid {
    /// Bits of a code, 1 to 8.
    pub bits: u32,
    /// Columns of a group; the last may have fewer. From the number of columns on, a row
    /// is one group, whose range is that of its original weights.
    pub group_size: usize,
    /// Whether the range is as wide on both sides and `zero` is `2^(bits − 1)`.
    pub symmetric: bool,
    /// Whether groups are of neighbouring columns, with ranges of original weights. If
    /// not, they are of columns that follow each other in the order of the factor, and
    /// their ranges are of weights that make good the errors before them.
    pub static_groups: bool,
    /// How scales are stored; codes are those of the stored scale.
    pub scales: ScaleFormat,
}

impl RangeGrid {
    /// Groups of `n` columns.
    pub fn n_groups(&self, n: usize) -> usize {
        n.div_ceil(self.group_size.max(1))
    }

    /// The group of a column at a position of the order.
    fn group(&self, factor: &HessianFactor, position: usize) -> usize {
        let at = if self.static_groups { factor.column(position) } else { position };
        at / self.group_size
    }

    /// Scale and zero of a group with these weights.
    fn fit(&self, weights: impl Iterator<Item = f32>) -> (f32, u8) {
        let (mut lo, mut hi) = weights.fold((0f32, 0f32), |(lo, hi), w| (lo.min(w), hi.max(w)));
        if self.symmetric {
            hi = hi.max(-lo);
            lo = if lo < 0.0 { -hi } else { lo };
        }
        if lo == 0.0 && hi == 0.0 {
            (lo, hi) = (-1.0, 1.0);
        }
        let most = most_code(self.bits);
        let scale = self.scales.stored((hi - lo) / most);
        let zero = if self.symmetric {
            f32::from(1u8 << (self.bits - 1))
        } else {
            (-lo / scale).round_ties_even().min(most)
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        (scale, zero as u8)
    }

    /// The code of a value.
    fn code(&self, value: f32, scale: f32, zero: u8) -> u8 {
        if scale == 0.0 {
            return zero;
        }
        let code = (value / scale).round_ties_even() + f32::from(zero);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let code = code.clamp(0.0, most_code(self.bits)) as u8;
        code
    }
}

/// The levels that weights are rounded to.
#[derive(Clone, Copy, Debug)]
pub enum Grid<'a> {
    /// Levels that follow the range of the weights.
    Range(RangeGrid),
    /// Given levels, symmetric and without zero:
    /// `rows[r] · columns[c] · (2 · code − (2^bits − 1))`.
    Steps {
        /// Bits of a code, 1 to 8, by column: `[C]`.
        bits: &'a [u8],
        /// Half a step, by row: `[R]`, ≥ 0.
        rows: &'a [f32],
        /// A factor of it, by column: `[C]`, ≥ 0.
        columns: &'a [f32],
    },
    /// Given scales, one for the first columns of a row and one for the others:
    /// `scale · (code − 2^(bits − 1))`.
    Signed {
        /// Columns of the first part.
        n_low: usize,
        /// Bits of a code in each part, 1 to 8.
        bits: [u32; 2],
        /// Scales of each part, by row: `[R, 2]`, > 0.
        scales: &'a [[f32; 2]],
    },
}

/// The code of a value on a grid of [`Grid::Signed`], and the value that it stands for.
fn signed(value: f32, scale: f32, bits: u32) -> (u8, f32) {
    let zero = f32::from(1u8 << (bits - 1));
    let code = ((value / scale).round_ties_even() + zero).clamp(0.0, most_code(bits));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (code as u8, scale * (code - zero))
}

/// A matrix `[R, C]` on a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// One code a weight, `[R, C]`, columns in their own order.
    pub codes: Vec<u8>,
    /// Scales of a [`Grid::Range`], `[R, groups]`; else empty.
    pub scale: Vec<f32>,
    /// The codes of zero of a [`Grid::Range`], `[R, groups]`; else empty.
    pub zero: Vec<u8>,
    /// What GPTQ returns as the loss of a row, `Σ e_j² / 2`, `[R]`. It is
    /// `½ (w − q)ᵀ (H + λI) (w − q)`.
    pub loss: Vec<f64>,
}

impl Grid<'_> {
    /// The values of a matrix that [`gptq`] rounded with this grid and this factor, `[R, C]`.
    pub fn values(&self, rounded: &Rounded, factor: &HessianFactor) -> Vec<f32> {
        let n = factor.n();
        let mut out = vec![0.0; rounded.codes.len()];
        let rows = out.chunks_mut(n.max(1)).zip(rounded.codes.chunks(n.max(1)));
        for (r, (out, codes)) in rows.enumerate() {
            for position in 0..n {
                let column = factor.column(position);
                let code = codes[column];
                out[column] = match self {
                    Grid::Range(grid) => {
                        let at = r * grid.n_groups(n) + grid.group(factor, position);
                        range_value(code, rounded.scale[at], rounded.zero[at])
                    }
                    Grid::Steps { bits, rows, columns } => {
                        rows[r] * columns[column] * odd(code, u32::from(bits[column]))
                    }
                    Grid::Signed { n_low, bits, scales } => {
                        let part = usize::from(column >= *n_low);
                        let zero = f32::from(1u8 << (bits[part] - 1));
                        scales[r][part] * (f32::from(code) - zero)
                    }
                };
            }
        }
        out
    }
}

/// Rounds `w`, `[R, C]`, so that its products with inputs change little whose second moment
/// `factor` is of, which has `C` columns. The result does not depend on the number of threads.
///
/// Panics when lengths do not fit each other, or bits are not 1 to 8, or groups are of
/// no column.
pub fn gptq(w: &[f32], factor: &HessianFactor, grid: &Grid<'_>) -> Rounded {
    let n = factor.n();
    let n_rows = w.len() / n.max(1);
    assert_eq!(w.len(), n_rows * n, "weights for {n} columns");
    let n_groups = match grid {
        Grid::Range(grid) => {
            assert!((1..=8).contains(&grid.bits), "{} bits", grid.bits);
            assert!(grid.group_size > 0, "a group has columns");
            grid.n_groups(n)
        }
        Grid::Steps { bits, rows, columns } => {
            assert!(bits.iter().all(|bits| (1..=8).contains(bits)), "bits of {bits:?}");
            assert_eq!([rows.len(), columns.len()], [n_rows, n], "steps of rows and columns");
            assert_eq!(bits.len(), n, "bits of columns");
            0
        }
        Grid::Signed { bits, scales, .. } => {
            assert!(bits.iter().all(|bits| (1..=8).contains(bits)), "bits of {bits:?}");
            assert_eq!(scales.len(), n_rows, "scales of rows");
            0
        }
    };
    let mut out = Rounded {
        codes: vec![0; w.len()],
        scale: vec![0.0; n_rows * n_groups],
        zero: vec![0; n_rows * n_groups],
        loss: vec![0.0; n_rows],
    };
    {
        let mut scales = out.scale.chunks_mut((TILE * n_groups).max(1));
        let mut zeros = out.zero.chunks_mut((TILE * n_groups).max(1));
        let rows = w.chunks((TILE * n).max(1)).zip(out.codes.chunks_mut((TILE * n).max(1)));
        let tiles: Vec<Tile<'_>> = (rows.zip(out.loss.chunks_mut(TILE)).enumerate())
            .map(|(i, ((w, codes), loss))| {
                let (scale, zero) = (scales.next(), zeros.next());
                let (scale, zero) = (scale.unwrap_or_default(), zero.unwrap_or_default());
                Tile { first: i * TILE, w, codes, scale, zero, loss }
            })
            .collect();
        tiles.into_par_iter().for_each(|tile| match grid {
            Grid::Range(grid) => tile.on_range(factor, grid),
            Grid::Steps { bits, rows, columns } => tile.on_steps(factor, bits, rows, columns),
            Grid::Signed { n_low, bits, scales } => tile.on_signed(factor, *n_low, *bits, scales),
        });
    }
    out
}

/// The loss of [`Rounded`] of the rows of `w`, `[R, C]`, if all is rounded to zero: `[R]`.
/// It is `½ wᵀ (H + λI) w`.
///
/// Panics when the length is not a multiple of the columns of `factor`.
pub fn zero_loss(w: &[f32], factor: &HessianFactor) -> Vec<f64> {
    let n = factor.n();
    let n_rows = w.len() / n.max(1);
    assert_eq!(w.len(), n_rows * n, "weights for {n} columns");
    let mut out = vec![0.0; n_rows];
    let tiles = w.par_chunks((TILE * n).max(1)).zip(out.par_chunks_mut(TILE));
    tiles.for_each(|(w, loss)| {
        let mut walk = Walk::new(w, factor);
        for span in spans(0..n, BLOCK) {
            walk.start(span.clone());
            walk.blocks(span, BLOCK, |r, mut lane| {
                loss[r] += lane.round(0..lane.len(), lane.len(), |_, _| 0.0);
            });
        }
    });
    out
}

/// The most bytes that [`gptq`] of a matrix `[R, C]` with `n_groups` groups in a row holds at a
/// time on `n_threads` threads, its result included and the factor not.
pub fn gptq_bytes([n_rows, n]: [usize; 2], n_groups: usize, n_threads: usize) -> usize {
    let tile =
        TILE.min(n_rows) * size_of::<f32>() * (4 * n + BLOCK) + size_of::<f32>() * BLOCK * BLOCK;
    n_rows * (n + 5 * n_groups + 8) + n_threads * (tile + PRODUCT_BYTES)
}

/// Rows that are rounded together; of any number of threads, so that sums are the same.
const TILE: usize = 32;

/// Columns between which errors are carried on one by one.
const BLOCK: usize = 128;

/// Some rows, and where what they are rounded to goes.
struct Tile<'a> {
    first: usize,
    w: &'a [f32],
    codes: &'a mut [u8],
    scale: &'a mut [f32],
    zero: &'a mut [u8],
    loss: &'a mut [f64],
}

impl Tile<'_> {
    fn on_steps(self, factor: &HessianFactor, bits: &[u8], rows: &[f32], columns: &[f32]) {
        let n = factor.n();
        let mut walk = Walk::new(self.w, factor);
        for span in spans(0..n, BLOCK) {
            walk.start(span.clone());
            walk.blocks(span, BLOCK, |r, mut lane| {
                let first = lane.first;
                self.loss[r] += lane.round(0..lane.len(), lane.len(), |j, value| {
                    let column = factor.column(first + j);
                    // No level is zero, which others are taken for whose input is always zero:
                    // the nearest does no harm.
                    let value = if factor.is_dead(column) { self.w[r * n + column] } else { value };
                    let step = rows[self.first + r] * columns[column];
                    let bits = u32::from(bits[column]);
                    let most = most_code(bits);
                    // Codes are as far apart as two steps; a tie goes up, as the sign of zero
                    // does. A step of 0 gives any code.
                    let code = ((value / step + most + 1.0) / 2.0).floor().clamp(0.0, most);
                    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                    let code = code as u8;
                    self.codes[r * n + column] = code;
                    step * odd(code, bits)
                });
            });
        }
    }

    fn on_signed(self, factor: &HessianFactor, n_low: usize, bits: [u32; 2], scales: &[[f32; 2]]) {
        let n = factor.n();
        let mut walk = Walk::new(self.w, factor);
        for span in spans(0..n, BLOCK) {
            walk.start(span.clone());
            walk.blocks(span, BLOCK, |r, mut lane| {
                let first = lane.first;
                self.loss[r] += lane.round(0..lane.len(), lane.len(), |j, value| {
                    let column = factor.column(first + j);
                    let part = usize::from(column >= n_low);
                    let (code, value) = signed(value, scales[self.first + r][part], bits[part]);
                    self.codes[r * n + column] = code;
                    value
                });
            });
        }
    }

    fn on_range(mut self, factor: &HessianFactor, grid: &RangeGrid) {
        let n = factor.n();
        let n_groups = grid.n_groups(n);
        let group_size = grid.group_size;
        let moving = !grid.static_groups && group_size < n;
        if !moving {
            self.fit_originals(factor, grid);
        }
        // No group that moves is in two blocks, or in two spans.
        let (span_len, block_len) = match moving {
            true if group_size <= BLOCK => (BLOCK / group_size * group_size, BLOCK),
            true => (group_size, BLOCK),
            false => (BLOCK, BLOCK),
        };
        let mut walk = Walk::new(self.w, factor);
        for span in spans(0..n, span_len) {
            walk.start(span.clone());
            if moving && group_size > BLOCK {
                let group = span.start / group_size;
                let mut ranges = vec![[0f32; 2]; self.loss.len()];
                let before = walk.z.clone();
                walk.blocks(span.clone(), block_len, |r, mut lane| {
                    let [lo, hi] = &mut ranges[r];
                    lane.round(0..lane.len(), lane.len(), |_, value| {
                        (*lo, *hi) = (lo.min(value), hi.max(value));
                        value
                    });
                });
                walk.z = before;
                for (r, range) in ranges.into_iter().enumerate() {
                    let at = r * n_groups + group;
                    (self.scale[at], self.zero[at]) = grid.fit(range.into_iter());
                }
            }
            walk.blocks(span, block_len, |r, mut lane| {
                let first = lane.first;
                let piece_len = if moving { group_size.min(BLOCK) } else { BLOCK };
                for piece in spans(0..lane.len(), piece_len) {
                    if moving && group_size <= BLOCK {
                        let at = r * n_groups + (first + piece.start) / group_size;
                        let mut range = [0f32; 2];
                        lane.look_ahead(piece.clone(), |value| {
                            range = [range[0].min(value), range[1].max(value)];
                        });
                        (self.scale[at], self.zero[at]) = grid.fit(range.into_iter());
                    }
                    self.loss[r] += lane.round(piece, lane.len(), |j, value| {
                        let at = r * n_groups + grid.group(factor, first + j);
                        let (scale, zero) = (self.scale[at], self.zero[at]);
                        let code = grid.code(value, scale, zero);
                        self.codes[r * n + factor.column(first + j)] = code;
                        range_value(code, scale, zero)
                    });
                }
            });
        }
    }

    /// Scales and zeros of original weights.
    fn fit_originals(&mut self, factor: &HessianFactor, grid: &RangeGrid) {
        let n = factor.n();
        let n_groups = grid.n_groups(n);
        for (r, row) in self.w.chunks(n).enumerate() {
            for group in 0..n_groups {
                let columns = group * grid.group_size..n.min((group + 1) * grid.group_size);
                // As in the paper's program, a row that is one group is looked at before its
                // columns without input are taken for zero.
                let kept = |column: &usize| n_groups == 1 || !factor.is_dead(*column);
                let weights = columns.filter(kept).map(|column| row[column]);
                let at = r * n_groups + group;
                (self.scale[at], self.zero[at]) = grid.fit(weights);
            }
        }
    }
}

/// The way through the columns of some rows, in the order of a factor.
struct Walk<'a> {
    factor: &'a HessianFactor,
    n_rows: usize,
    /// The weights, `[rows, n]`, by position.
    w: Vec<f32>,
    /// `w − q` of what has been rounded.
    delta: Vec<f32>,
    /// `Σ_i δ_i R_ij` of the columns of a span, `[rows, span]`, over all `i` before it and
    /// those that have been rounded in the block at hand.
    z: Vec<f32>,
    corner: Vec<f32>,
}

impl<'a> Walk<'a> {
    fn new(rows: &[f32], factor: &'a HessianFactor) -> Self {
        let n = factor.n();
        let by_position = rows.chunks(n).flat_map(|row| {
            (0..n).map(|position| {
                let column = factor.column(position);
                if factor.is_dead(column) { 0.0 } else { row[column] }
            })
        });
        let w: Vec<f32> = by_position.collect();
        let delta = vec![0.0; w.len()];
        Self { factor, n_rows: rows.len() / n, w, delta, z: Vec::new(), corner: Vec::new() }
    }

    /// Takes what all columns before a span add to it.
    fn start(&mut self, span: Range<usize>) {
        self.z.clear();
        self.z.resize(self.n_rows * span.len(), 0.0);
        let z = MatMut::from_row_major_slice_mut(&mut self.z, self.n_rows, span.len());
        self.factor.add_product(&self.delta, 0..span.start, span, z);
    }

    /// Calls `visit` with each row and block of a span, block after block.
    fn blocks(
        &mut self,
        span: Range<usize>,
        block_len: usize,
        mut visit: impl FnMut(usize, Lane<'_>),
    ) {
        let n = self.factor.n();
        for block in spans(span.clone(), block_len) {
            let in_span = block.start - span.start..block.end - span.start;
            let z = MatMut::from_row_major_slice_mut(&mut self.z, self.n_rows, span.len());
            let z = z.subcols_mut(in_span.start, in_span.len());
            self.factor.add_product(&self.delta, span.start..block.start, block.clone(), z);
            self.factor.corner(block.clone(), &mut self.corner);
            for r in 0..self.n_rows {
                visit(
                    r,
                    Lane {
                        first: block.start,
                        w: &self.w[r * n..][block.clone()],
                        delta: &mut self.delta[r * n..][block.clone()],
                        z: &mut self.z[r * span.len()..][in_span.clone()],
                        corner: &self.corner,
                        inverse_diagonal: &self.factor.inverse_diagonal()[block.clone()],
                        weight: &self.factor.weight()[block.clone()],
                    },
                );
            }
        }
    }
}

/// The columns of a block in one row; their numbers are those in the block.
struct Lane<'a> {
    first: usize,
    w: &'a [f32],
    delta: &'a mut [f32],
    z: &'a mut [f32],
    corner: &'a [f32],
    inverse_diagonal: &'a [f32],
    weight: &'a [f64],
}

impl Lane<'_> {
    fn len(&self) -> usize {
        self.w.len()
    }

    /// Rounds columns by `round`, of a column and the value that makes good the errors before
    /// it, which are carried on up to the column `until`. Returns the loss.
    fn round(
        &mut self,
        columns: Range<usize>,
        until: usize,
        mut round: impl FnMut(usize, f32) -> f32,
    ) -> f64 {
        let n = self.len();
        let mut loss = 0.0;
        for j in columns {
            let value = self.w[j] + self.z[j] * self.inverse_diagonal[j];
            let rounded = round(j, value);
            loss += self.weight[j] * f64::from(value - rounded).powi(2);
            let delta = self.w[j] - rounded;
            self.delta[j] = delta;
            if !self.corner.is_empty() {
                let z = self.z[j + 1..until].iter_mut();
                z.zip(&self.corner[j * n + j + 1..]).for_each(|(z, r)| *z += delta * r);
            }
        }
        loss
    }

    /// Calls `see` with the values of columns that make good all errors before them, as they
    /// are before any of them is rounded.
    fn look_ahead(&mut self, columns: Range<usize>, mut see: impl FnMut(f32)) {
        let mut before = [0.0; BLOCK];
        let before = &mut before[..columns.len()];
        before.copy_from_slice(&self.z[columns.clone()]);
        // A column that is not rounded adds no error of its own.
        self.round(columns.clone(), columns.end, |_, value| {
            see(value);
            value
        });
        self.z[columns].copy_from_slice(before);
    }
}

/// Runs of `len` numbers, the last perhaps shorter.
fn spans(all: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    all.clone().step_by(len).map(move |start| start..all.end.min(start + len))
}

fn most_code(bits: u32) -> f32 {
    f32::from(u8::MAX >> (8 - bits))
}

fn range_value(code: u8, scale: f32, zero: u8) -> f32 {
    scale * (f32::from(code) - f32::from(zero))
}

fn odd(code: u8, bits: u32) -> f32 {
    2.0 * f32::from(code) - most_code(bits)
}
