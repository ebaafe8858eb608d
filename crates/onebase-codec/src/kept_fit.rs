//! What stands for the weights that a mask keeps: their values, and codes for them.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use half::bf16;
use onebase_tensor::saturating_bf16;

use crate::{Error, Result, SecondMoment};

/// What a kept weight becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    /// What changes the outputs least, given what is dropped; itself where inputs are taken
    /// for independent.
    Solved,
    /// That, times the factor of its row with which outputs keep their size: what is kept of
    /// them is then all of them on average, and errors do not add up from layer to layer.
    Unbiased,
    /// Itself times the factor of its row that changes the outputs least.
    Row,
    /// Itself times the weights of its group over those of them that are kept.
    Rescaled,
}

/// A second moment with a part of the identity: `H + λ I`, over the mean of its diagonal.
pub(crate) struct Inputs<'a> {
    moment: &'a SecondMoment,
    mean: f64,
    ridge: f64,
}

/// What is added at last where a matrix is not positive definite, as a part of the mean.
const MOST_RIDGE: f64 = 1.0;

impl<'a> Inputs<'a> {
    /// `ridge` is `λ` as a part of the mean of the diagonal. `None` where there are no inputs.
    pub(crate) fn new(moment: &'a SecondMoment, ridge: f64) -> Option<Self> {
        let mean = moment.mean_diagonal();
        (mean > 0.0).then_some(Self { moment, mean, ridge })
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        let own = f64::from(self.moment.values()[i.max(j) * self.moment.n() + i.min(j)]);
        own / self.mean + if i == j { self.ridge } else { 0.0 }
    }

    /// `Δ H` of rows of a delta, `[n_rows, in_features]`.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn times(&self, rows: &[f32]) -> Vec<f32> {
        let n = self.moment.n();
        let n_rows = rows.len() / n;
        let mut out: Vec<f32> = rows.iter().map(|w| w * self.ridge as f32).collect();
        let target = MatMut::from_row_major_slice_mut(&mut out, n_rows, n);
        let rows = MatRef::from_row_major_slice(rows, n_rows, n);
        let moment = MatRef::from_row_major_slice(self.moment.values(), n, n);
        matmul(target, Accum::Add, rows, moment, (1.0 / self.mean) as f32, Par::Seq);
        out.iter_mut().for_each(|v| *v = v.clamp(-f32::MAX, f32::MAX));
        out
    }

    /// The lower Cholesky factor of what is known of some input features, `[n, n]`, row-major.
    fn factor(&self, columns: &[u32]) -> Result<Vec<f64>> {
        let n = columns.len();
        let mut extra = 0.0;
        loop {
            let mut l = Mat::from_fn(n, n, |i, j| {
                let more = if i == j { extra } else { 0.0 };
                if i < j { 0.0 } else { self.at(columns[i] as usize, columns[j] as usize) + more }
            });
            let scratch = cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
            let mut memory = MemBuffer::new(scratch);
            let stack = MemStack::new(&mut memory);
            let done = cholesky_in_place(
                l.as_mut(),
                Default::default(),
                Par::Seq,
                stack,
                Default::default(),
            );
            if done.is_ok() && (0..n).all(|i| l[(i, i)].is_finite()) {
                let mut rows = vec![0.0; n * n];
                for (i, row) in rows.chunks_mut(n.max(1)).enumerate() {
                    row[..=i].iter_mut().enumerate().for_each(|(j, v)| *v = l[(i, j)]);
                }
                return Ok(rows);
            }
            extra = (extra * 10.0).max(1e-6);
            if extra > MOST_RIDGE * 1.000_001 {
                return Err(Error::NotPositiveDefinite { n: self.moment.n(), damping: extra });
            }
        }
    }

    /// What is known of some input features, `[n, n]`.
    #[allow(clippy::cast_possible_truncation)]
    fn of(&self, columns: &[u32]) -> Vec<f32> {
        let of_row = |i: usize| columns.iter().map(move |j| self.at(i, *j as usize) as f32);
        columns.iter().flat_map(|i| of_row(*i as usize)).collect()
    }

    /// Bytes that a block of so many rows which keep so many input features takes.
    pub(crate) fn block_bytes(n_rows: usize, n_cols: usize, n_kept: usize) -> usize {
        // Two factors and the memory to make one, or what they are of; products of all rows, and
        // of what is kept.
        3 * size_of::<f64>() * n_kept * n_kept + n_rows * (n_cols + 8 * n_kept) * size_of::<f64>()
    }
}

/// How codes are fitted to each other one by one.
#[derive(Clone, Copy)]
pub(crate) struct Descent<'a> {
    pub(crate) inputs: &'a Inputs<'a>,
    /// The input features that are kept.
    pub(crate) columns: &'a [u32],
    /// Times, at most.
    pub(crate) sweeps: usize,
}

/// Rows of a delta that keep the same input features.
pub(crate) struct Block<'a> {
    /// `[n_rows, in_features]`.
    pub(crate) rows: &'a [f32],
    /// [`Inputs::times`] of them.
    pub(crate) products: Option<&'a [f32]>,
    /// In features.
    pub(crate) n_cols: usize,
}

/// What is to be coded for a block under a mask.
pub(crate) struct Target {
    n_kept: usize,
    /// `[n_rows, n_kept]`.
    pub(crate) values: Vec<f64>,
    /// `L` of `H_JJ = L Lᵀ`, `[n_kept, n_kept]`; `None` of the identity.
    factor: Option<Vec<f64>>,
    /// `Δ H` at the mask, `[n_rows, n_kept]`, or Δ at it.
    products: Vec<f64>,
    /// `Δ H Δᵀ` of each row.
    powers: Vec<f64>,
    /// Whether rounding may make up for itself: only what was solved for is where the error of
    /// the outputs is least, so that its distance is all that counts.
    carries: bool,
    /// Whether scales keep the size of outputs.
    unbiased: bool,
    /// Whether scales are fitted to outputs.
    by_outputs: bool,
}

impl Block<'_> {
    /// The target for a mask, with the factor of each kept weight's group for
    /// [`Values::Rescaled`].
    ///
    /// # Errors
    /// When the second moment is not one.
    pub(crate) fn target(
        &self,
        inputs: Option<&Inputs<'_>>,
        columns: &[u32],
        values: Values,
        factors: &[f64],
    ) -> Result<Target> {
        let (n_kept, n_cols) = (columns.len(), self.n_cols.max(1));
        let gather = |from: &[f32]| -> Vec<f64> {
            let rows = from.chunks(n_cols);
            rows.flat_map(|row| columns.iter().map(|c| f64::from(row[*c as usize]))).collect()
        };
        let own = gather(self.rows);
        let products = self.products.map_or_else(|| own.clone(), gather);
        let of_row = |row: &[f32], by: &[f32]| -> f64 {
            row.iter().zip(by).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let by = self.products.unwrap_or(self.rows).chunks(n_cols);
        let powers = self.rows.chunks(n_cols).zip(by).map(|(row, by)| of_row(row, by)).collect();
        let factor = inputs.map(|inputs| inputs.factor(columns)).transpose()?;
        let mut target = Target {
            n_kept,
            values: own,
            factor,
            products,
            powers,
            carries: matches!(values, Values::Solved | Values::Unbiased),
            unbiased: values == Values::Unbiased,
            by_outputs: values != Values::Rescaled,
        };
        match values {
            Values::Solved => target.solve(),
            Values::Unbiased => {
                target.solve();
                target.unbias();
            }
            Values::Row => target.scale_rows(),
            Values::Rescaled => {
                for row in target.values.chunks_mut(n_kept.max(1)) {
                    row.iter_mut().zip(factors).for_each(|(w, factor)| *w *= factor);
                }
            }
        }
        Ok(target)
    }
}

impl Target {
    /// `H_JJ w = (H Δ)_J`.
    fn solve(&mut self) {
        let n = self.n_kept;
        let Some(l) = &self.factor else { return };
        for (w, b) in self.values.chunks_mut(n).zip(self.products.chunks(n)) {
            for i in 0..n {
                let row = &l[i * n..(i + 1) * n];
                let known: f64 = row[..i].iter().zip(&w[..i]).map(|(l, w)| l * w).sum();
                w[i] = (b[i] - known) / row[i];
            }
            for i in (0..n).rev() {
                let row = &l[i * n..(i + 1) * n];
                w[i] /= row[i];
                let solved = w[i];
                w[..i].iter_mut().zip(row).for_each(|(w, l)| *w -= l * solved);
            }
        }
    }

    /// Makes `w H Δᵀ` what `Δ H Δᵀ` is, row by row.
    fn unbias(&mut self) {
        let n = self.n_kept.max(1);
        let rows = self.values.chunks_mut(n).zip(self.products.chunks(n));
        for ((w, products), power) in rows.zip(&self.powers) {
            let along = dot(w, products);
            if along > 0.0 {
                w.iter_mut().for_each(|w| *w *= power / along);
            }
        }
    }

    fn scale_rows(&mut self) {
        let n = self.n_kept;
        for row in 0..self.powers.len() {
            let at = row * n..(row + 1) * n;
            let (own, by) = (&self.values[at.clone()], &self.products[at.clone()]);
            let square = self.square(own);
            let factor = if square > 0.0 { dot(own, by) / square } else { 1.0 };
            self.values[at].iter_mut().for_each(|w| *w *= factor);
        }
    }

    /// `w H_JJ wᵀ`.
    fn square(&self, w: &[f64]) -> f64 {
        let n = self.n_kept;
        let Some(l) = &self.factor else { return dot(w, w) };
        // Lᵀ w, row by row of L.
        let mut by = vec![0.0; n];
        for (i, w) in w.iter().enumerate().filter(|(_, w)| **w != 0.0) {
            let row = &l[i * n..=i * n + i];
            by.iter_mut().zip(row).for_each(|(by, l)| *by += l * w);
        }
        dot(&by, &by)
    }

    /// The squared error of the outputs of a row, of which such weights are kept.
    fn error_of(&self, row: usize, w: &[f64]) -> f64 {
        let products = &self.products[row * self.n_kept..(row + 1) * self.n_kept];
        self.powers[row] - 2.0 * dot(w, products) + self.square(w)
    }

    /// The squared error of the outputs of all rows.
    pub(crate) fn error(&self) -> f64 {
        let rows = self.values.chunks(self.n_kept.max(1)).enumerate();
        rows.map(|(row, w)| self.error_of(row, w)).sum()
    }

    /// Codes of a row for levels `scale · (2 code − twice_zero)`, and the levels.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn round(
        &self,
        row: usize,
        bits: usize,
        (scale, twice_zero): (f64, f64),
        codes: &mut [u8],
        levels: &mut [f64],
    ) {
        let n = self.n_kept;
        let values = &self.values[row * n..(row + 1) * n];
        let top = f64::from((1u32 << bits) - 1);
        let code = |value: f64| {
            let code = if scale == 0.0 { 0.0 } else { (value / scale + twice_zero) / 2.0 };
            code.round().clamp(0.0, top)
        };
        let factor = self.factor.as_ref().filter(|_| self.carries);
        let Some(l) = factor else {
            for ((value, out), level) in values.iter().zip(codes).zip(levels) {
                let code = code(*value);
                (*out, *level) = (code as u8, 2.0 * code - twice_zero);
            }
            return;
        };
        // The last first; each makes up for the errors of those after it.
        let mut carried = vec![0.0; n];
        for i in (0..n).rev() {
            let row = &l[i * n..=i * n + i];
            let code = code(values[i] - carried[i] / row[i]);
            (codes[i], levels[i]) = (code as u8, 2.0 * code - twice_zero);
            let error = scale * levels[i] - values[i];
            carried.iter_mut().zip(row).for_each(|(carried, l)| *carried += l * error);
        }
    }

    /// Codes on given levels: `[n_rows, n_kept]`, and the squared error of the outputs.
    pub(crate) fn round_all(&self, bits: usize, line: (f64, f64)) -> (Vec<u8>, f64) {
        let mut codes = vec![0; self.values.len()];
        let mut levels = vec![0.0; self.n_kept];
        let mut error = 0.0;
        for (row, codes) in codes.chunks_mut(self.n_kept.max(1)).enumerate() {
            self.round(row, bits, line, codes, &mut levels);
            levels.iter_mut().for_each(|level| *level *= line.0);
            error += self.error_of(row, &levels);
        }
        (codes, error)
    }

    /// Codes and scales on levels `scale · (2 code − (2^bits − 1))`, a scale for every
    /// `share` rows: scales, codes, and the squared error of the outputs.
    ///
    /// A scale begins as what is best for rounding to the nearest, and is fitted to the outputs
    /// of the codes in turn with them.
    /// Where there is a descent, codes are then fitted to each other one by one.
    pub(crate) fn fit(
        &self,
        bits: usize,
        share: usize,
        descent: Option<Descent<'_>>,
    ) -> (Vec<bf16>, Vec<u8>, f64) {
        let n = self.n_kept;
        let n_rows = self.powers.len();
        let zero = f64::from((1u32 << bits) - 1);
        let mut codes = vec![0; self.values.len()];
        let (mut scales, mut total) = (Vec::new(), 0.0);
        let mut levels = vec![0.0; n];
        let descent = descent.filter(|descent| self.carries && descent.sweeps > 0);
        let moment = descent.map(|descent| descent.inputs.of(descent.columns));
        for first in (0..n_rows).step_by(share) {
            let rows = first..n_rows.min(first + share);
            let own = &self.values[rows.start * n..rows.end * n];
            let mut scale = saturating_bf16(plain_scale(own, bits));
            let mut best: Option<(bf16, Vec<u8>, f64, f64)> = None;
            for _ in 0..FITS {
                let wide = f64::from(scale.to_f32());
                let mut tried = vec![0; own.len()];
                // What is compared is the error of the outputs, or else that of the values.
                let (mut up, mut down, mut lost, mut error) = (0.0, 0.0, 0.0, 0.0);
                let mut power = 0.0;
                for (row, codes) in rows.clone().zip(tried.chunks_mut(n.max(1))) {
                    self.round(row, bits, (wide, zero), codes, &mut levels);
                    let at = row * n..(row + 1) * n;
                    let along = dot(&levels, &self.products[at.clone()]);
                    let square = self.square(&levels);
                    let of_row = self.powers[row] - 2.0 * wide * along + wide * wide * square;
                    error += of_row;
                    power += self.powers[row];
                    if self.by_outputs {
                        (up, down, lost) = (up + along, down + square, lost + of_row);
                    } else {
                        let own = &self.values[at];
                        up += dot(&levels, own);
                        down += dot(&levels, &levels);
                        let off = levels.iter().zip(own).map(|(l, w)| (wide * l - w).powi(2));
                        lost += off.sum::<f64>();
                    }
                }
                let mut factor = if down > 0.0 { up / down } else { 0.0 };
                if self.unbiased && up > 0.0 {
                    factor = power / up;
                    lost = factor * factor * down - power;
                    error = lost;
                    #[allow(clippy::cast_possible_truncation)]
                    let kept = saturating_bf16(factor as f32);
                    scale = kept;
                }
                if best.as_ref().is_some_and(|best| lost >= best.2) {
                    break;
                }
                best = Some((scale, tried, lost, error));
                #[allow(clippy::cast_possible_truncation)]
                let next = factor as f32;
                if self.unbiased {
                    continue;
                }
                let next = saturating_bf16(next);
                if next == scale {
                    break;
                }
                scale = next;
            }
            if let (Some(best), Some(moment)) = (&mut best, &moment) {
                for _ in 0..descent.map_or(0, |descent| descent.sweeps) {
                    match self.descend(rows.clone(), bits, moment, (best.0, &best.1)) {
                        Some(better) if better.2 < best.2 => *best = better,
                        _ => break,
                    }
                }
            }
            if let Some((scale, tried, _, error)) = best {
                codes[rows.start * n..rows.end * n].copy_from_slice(&tried);
                scales.push(scale);
                total += error;
            }
        }
        (scales, codes, total)
    }
}

impl Target {
    /// Moves each code of some rows with one scale, twice, to the level with which the outputs
    /// are nearest those of the values, given the other codes; then fits the scale. Scale,
    /// codes, and what is lost, as [`Target::fit`] compares it; `None` where codes stand for
    /// nothing.
    fn descend(
        &self,
        rows: std::ops::Range<usize>,
        bits: usize,
        moment: &[f32],
        (scale, codes): (bf16, &[u8]),
    ) -> Option<(bf16, Vec<u8>, f64, f64)> {
        let n = self.n_kept.max(1);
        let top = f64::from((1u32 << bits) - 1);
        let level = |code: u8| 2.0 * f64::from(code) - top;
        let mut levels: Vec<f64> = codes.iter().map(|code| level(*code)).collect();
        let sums = |levels: &[f64]| {
            let of_rows = rows.clone().zip(levels.chunks(n));
            of_rows.fold((0.0, 0.0), |(up, down), (row, levels)| {
                let along = dot(levels, &self.products[row * n..(row + 1) * n]);
                (up + along, down + self.square(levels))
            })
        };
        let scale = f64::from(scale.to_f32());
        if scale == 0.0 {
            return None;
        }
        // What the outputs of the values are over those of the levels, in steps of the scale.
        let mut left = vec![0.0; n];
        for (row, levels) in rows.clone().zip(levels.chunks_mut(n)) {
            let values = &self.values[row * n..(row + 1) * n];
            left.fill(0.0);
            for ((own, value), moment) in levels.iter().zip(values).zip(moment.chunks(n)) {
                take(&mut left, own - value / scale, moment);
            }
            for i in (0..n).chain(0..n) {
                let of_input = &moment[i * n..(i + 1) * n];
                let best = levels[i] + left[i] / f64::from(of_input[i]);
                let best = 2.0 * ((best + top) / 2.0).round().clamp(0.0, top) - top;
                let moved = best - levels[i];
                if moved != 0.0 {
                    take(&mut left, moved, of_input);
                    levels[i] = best;
                }
            }
        }
        let (up, down) = sums(&levels);
        if up <= 0.0 || down <= 0.0 {
            return None;
        }
        let power: f64 = self.powers[rows].iter().sum();
        let factor = if self.unbiased { power / up } else { up / down };
        #[allow(clippy::cast_possible_truncation)]
        let scale = saturating_bf16(factor as f32);
        let wide = f64::from(scale.to_f32());
        let error = power - 2.0 * wide * up + wide * wide * down;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let codes = levels.iter().map(|level| ((level + top) / 2.0) as u8).collect();
        // What `fit` compares where outputs keep their size.
        let lost = if self.unbiased { factor * factor * down - power } else { error };
        Some((scale, codes, lost, lost))
    }
}

/// Takes so many times a row off what is left.
fn take(left: &mut [f64], times: f64, row: &[f32]) {
    left.iter_mut().zip(row).for_each(|(left, h)| *left -= times * f64::from(*h));
}

/// Times that codes and scale are fitted to each other.
const FITS: usize = 4;

/// The scale of least squared error of rounding to the nearest, about.
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
fn plain_scale(values: &[f64], bits: usize) -> f32 {
    /// Half the step of the uniform quantizer that is best for a normal variable of variance
    /// 1, by bits (J. Max, "Quantizing for Minimum Distortion", 1960, up to five).
    const OF_NORMAL: [f64; 8] = [0.798, 0.498, 0.293, 0.168, 0.094, 0.052, 0.0285, 0.0154];
    let n = values.len().max(1) as f64;
    let largest = values.iter().fold(0.0, |most: f64, w| most.max(w.abs()));
    if largest == 0.0 {
        return 0.0;
    }
    let root = (values.iter().map(|w| (w / largest).powi(2)).sum::<f64>() / n).sqrt();
    let mut scale = OF_NORMAL[bits - 1] * root;
    let top = f64::from((1u32 << bits) - 1);
    for _ in 0..8 {
        let (mut up, mut down) = (0.0, 0.0);
        for w in values {
            let code = ((w / largest / scale + top) / 2.0).round().clamp(0.0, top);
            let level = 2.0 * code - top;
            up += level * w / largest;
            down += level * level;
        }
        if down == 0.0 || up <= 0.0 {
            break;
        }
        scale = up / down;
    }
    (scale * largest) as f32
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
