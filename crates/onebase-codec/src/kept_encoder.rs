//! Encodes a delta of which blocks of rows keep drawn input features: the best mask of each,
//! codes for what it keeps, and how both are best chosen.

use half::bf16;
use rayon::prelude::*;

use crate::kept::Lines;
use crate::kept_fit::{Block, Descent, Inputs, Target, Values};
use crate::masks::{Masks, Share};
use crate::source::read_finite;
use crate::{DeltaSource, Error, Result};

/// What levels codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grid {
    /// A scale for each row.
    Row,
    /// A scale for each block of rows.
    Block,
    /// Levels between extremes.
    Range,
}

/// How a matrix is encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    /// Of a code.
    pub(crate) bits: usize,
    pub(crate) grid: Grid,
    /// Input features of which an exact share is kept.
    pub(crate) group_size: usize,
    pub(crate) share: Share,
}

impl Choice {
    /// Input features of which one is kept.
    pub(crate) fn least_group(&self) -> usize {
        (self.share.of as usize).div_ceil(self.share.kept.max(1) as usize)
    }

    /// With these, of a tensor.
    pub(crate) fn masks(&self, key: u64, n_cols: usize) -> Masks {
        Masks { key, n_cols, group_size: self.group_size, share: self.share }
    }
}

/// Blocks of rows by which bits of codes and group sizes are chosen.
const SAMPLE: usize = 6;

/// Levels between extremes: the weight is `step · (code − zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Range {
    pub(crate) step: f32,
    pub(crate) zero: i32,
}

impl Range {
    /// Of `bits` between the least and the greatest value.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn of([least, greatest]: [f64; 2], bits: usize) -> Self {
        let bounded = |x: f64| x.clamp(f64::from(-f32::MAX), f64::from(f32::MAX)) as f32;
        let step = bounded((greatest - least) / f64::from((1u32 << bits) - 1));
        let zero = -(least / f64::from(step)).round();
        // Values that are all alike, to rounding, have one code; so have no values.
        if step == 0.0 || zero.abs() > f64::from(1 << 24) {
            return Self { step: bounded(least), zero: -1 };
        }
        Self { step, zero: zero as i32 }
    }

    /// As scale and twice the zero of levels `scale · (2 code − twice_zero)`.
    pub(crate) fn line(self) -> (f64, f64) {
        (f64::from(self.step) / 2.0, 2.0 * f64::from(self.zero))
    }

    /// What it says of the codes of so many rows.
    pub(crate) fn lines(self, n_rows: usize) -> Lines {
        let factors = vec![self.step / 2.0; n_rows];
        Lines { factors, twice_zero: 2 * i64::from(self.zero) }
    }
}

/// A delta being encoded.
pub(crate) struct Encoder<'a> {
    /// `[out_features, in_features]`.
    pub(crate) shape: [usize; 2],
    /// Rows that share a mask.
    pub(crate) block_rows: usize,
    /// Masks that are tried for each block.
    pub(crate) seeds: usize,
    /// Times that codes are fitted to each other one by one, at most.
    pub(crate) sweeps: usize,
    pub(crate) values: Values,
    pub(crate) delta: &'a dyn DeltaSource,
    pub(crate) inputs: Option<&'a Inputs<'a>>,
    /// Of the masks.
    pub(crate) key: u64,
}

/// A block of rows as it is stored.
pub(crate) struct Coded {
    /// Which mask was taken.
    pub(crate) candidate: u8,
    /// `[rows, n_kept]`.
    pub(crate) codes: Vec<u8>,
    /// For each row or for all; none of a range.
    pub(crate) scales: Vec<bf16>,
    /// The squared error of the outputs.
    error: f64,
}

impl Encoder<'_> {
    fn n_blocks(&self) -> usize {
        self.shape[0].div_ceil(self.block_rows)
    }

    /// The best mask of so many for a block, and what is to be coded under it.
    fn target(&self, block: usize, choice: &Choice, seeds: usize) -> Result<(u8, Target)> {
        let [n_rows, n_cols] = self.shape;
        let first = block * self.block_rows;
        let rows = read_finite(self.delta, first..n_rows.min(first + self.block_rows))?;
        let products = self.inputs.map(|inputs| inputs.times(&rows));
        let of_block = Block { rows: &rows, products: products.as_deref(), n_cols };
        let masks = choice.masks(self.key, n_cols);
        let factors = masks.factors();
        // Where nothing is dropped, all masks are one.
        let seeds = if choice.share.of_first(n_cols) < n_cols { seeds } else { 1 };
        let mut columns = Vec::new();
        let mut best: Option<(u8, Target, f64)> = None;
        for candidate in 0..seeds.max(1) {
            masks.columns(block, candidate as u32, &mut columns);
            let values = self.values;
            let target = of_block.target(self.inputs, &columns, values, &factors)?;
            let error = target.error();
            if best.as_ref().is_none_or(|best| error < best.2) {
                best = Some((candidate as u8, target, error));
            }
        }
        let Some((candidate, target, _)) = best else {
            unreachable!("at least one mask was tried")
        };
        Ok((candidate, target))
    }

    /// Encodes a block; `line` is scale and twice the zero of a range.
    ///
    /// # Errors
    /// When rows cannot be read or hold NaN or ∞, or the second moment is not one.
    pub(crate) fn block(
        &self,
        block: usize,
        choice: &Choice,
        line: Option<(f64, f64)>,
        seeds: usize,
    ) -> Result<Coded> {
        let (candidate, target) = self.target(block, choice, seeds)?;
        let (scales, codes, error) = match (choice.grid, line) {
            (Grid::Range, Some(line)) => {
                let (codes, error) = target.round_all(choice.bits, line);
                (Vec::new(), codes, error)
            }
            (grid, _) => {
                let share = if grid == Grid::Block { self.block_rows } else { 1 };
                let mut columns = Vec::new();
                let masks = choice.masks(self.key, self.shape[1]);
                masks.columns(block, candidate.into(), &mut columns);
                let (columns, sweeps) = (&*columns, self.sweeps);
                let descent = self.inputs.map(|inputs| Descent { inputs, columns, sweeps });
                target.fit(choice.bits, share, descent)
            }
        };
        Ok(Coded { candidate, codes, scales, error })
    }

    /// The least and the greatest value that is to be coded, of some blocks or all.
    ///
    /// # Errors
    /// As [`Encoder::block`].
    pub(crate) fn extremes(&self, choice: &Choice, blocks: Option<&[usize]>) -> Result<[f64; 2]> {
        let all: Vec<usize> = (0..self.n_blocks()).collect();
        let (blocks, seeds) = blocks.map_or((&*all, self.seeds), |blocks| (blocks, 1));
        let of_block = |block: &usize| {
            let (_, target) = self.target(*block, choice, seeds)?;
            let values = target.values.iter();
            Ok(values.fold([f64::INFINITY, f64::NEG_INFINITY], |[least, most], v| {
                [least.min(*v), most.max(*v)]
            }))
        };
        let none = || [f64::INFINITY, f64::NEG_INFINITY];
        let both = |a: [f64; 2], b: [f64; 2]| Ok::<_, Error>([a[0].min(b[0]), a[1].max(b[1])]);
        let got = blocks.par_iter().map(of_block).try_reduce(none, both)?;
        Ok(if got[0] <= got[1] { got } else { [0.0; 2] })
    }

    /// The squared error of the outputs of some blocks.
    fn error(&self, choice: &Choice, blocks: &[usize]) -> Result<f64> {
        let line = match choice.grid {
            Grid::Range => {
                Some(Range::of(self.extremes(choice, Some(blocks))?, choice.bits).line())
            }
            _ => None,
        };
        let errors = blocks.par_iter().map(|block| Ok(self.block(*block, choice, line, 1)?.error));
        // In the order of the blocks, whatever the threads.
        Ok(errors.collect::<Result<Vec<f64>>>()?.iter().sum())
    }

    /// What gives the least error on some blocks of rows, of candidates with groups of one
    /// size; then, where it is to be searched, of group sizes.
    ///
    /// # Errors
    /// As [`Encoder::block`].
    pub(crate) fn choose(&self, candidates: Vec<Choice>, search: bool) -> Result<Choice> {
        let n_blocks = self.n_blocks();
        let n = SAMPLE.min(n_blocks);
        let blocks: Vec<usize> = (0..n).map(|i| i * n_blocks / n.max(1)).collect();
        let best = self.best(candidates, &blocks)?;
        let n_cols = self.shape[1];
        if !search || best.share.of_first(n_cols) >= n_cols {
            return Ok(best);
        }
        let sizes = std::iter::successors(Some(best.least_group()), |size| Some(size * 2));
        let sizes = sizes.take_while(|size| *size < n_cols).chain([n_cols]);
        self.best(sizes.map(|group_size| Choice { group_size, ..best }).collect(), &blocks)
    }

    fn best(&self, candidates: Vec<Choice>, blocks: &[usize]) -> Result<Choice> {
        let mut best: Option<(Choice, f64)> = None;
        let alone = candidates.len() == 1;
        for choice in candidates {
            let error = if alone { 0.0 } else { self.error(&choice, blocks)? };
            if best.as_ref().is_none_or(|best| error < best.1) {
                best = Some((choice, error));
            }
        }
        match best {
            Some((choice, _)) => Ok(choice),
            None => unreachable!("there are candidates"),
        }
    }
}
