//! The codes of both sides.

use half::{bf16, f16};
use onebase_kernels::thin::Thin;
use onebase_kernels::{Backend, plane_bytes};
use rayon::prelude::*;

use super::blocks::{Codes, Grids, Layout};
use super::weighing::Weighing;
use super::{Method, gram, stored};
use crate::Result;
use crate::coded_factors::WHOLE_VECTOR;
use crate::numerics::{Grid, HessianFactor, RangeGrid, Rounded, ScaleFormat, gptq, solve_vector};

/// Vectors `[rank, n]` of codes of one width: codes and grids, and GPTQ's loss of each.
pub(super) fn right(
    vectors: &[f32],
    width: usize,
    grids: Grids,
    factor: &HessianFactor,
) -> (Coded, Vec<f64>) {
    let n = factor.n();
    match grids {
        Grids::Pair => {
            let steps: Vec<f32> = vectors.par_chunks(n).map(|row| half_step(row, width)).collect();
            let grid =
                Grid::Steps { bits: &vec![narrow(width); n], rows: &steps, columns: &vec![1.0; n] };
            Coded::new(gptq(vectors, factor, &grid), &grid, factor)
        }
        Grids::Group(size) => {
            let grid = ranges(width, size);
            Coded::new(gptq(vectors, factor, &grid), &grid, factor)
        }
    }
}

/// The grid of the papers, with groups that need no order at serving.
fn ranges(width: usize, group_size: usize) -> Grid<'static> {
    Grid::Range(RangeGrid {
        bits: u32::from(narrow(width)),
        group_size,
        symmetric: false,
        static_groups: true,
        scales: ScaleFormat::F16,
    })
}

fn narrow(width: usize) -> u8 {
    match u8::try_from(width) {
        Ok(width) => width,
        Err(_) => unreachable!("codes have at most eight bits"),
    }
}

/// Half the step of the symmetric grid that fits a vector best, see
/// [`onebase_kernels::Backend::fit_low_bit`].
fn half_step(vector: &[f32], width: usize) -> f32 {
    let mut codes = vec![0; width * plane_bytes(vector.len())];
    let mut scale = [bf16::ZERO];
    Backend::active().fit_low_bit(vector, width, WHOLE_VECTOR, &mut codes, &mut scale);
    scale[0].to_f32()
}

/// Codes and what they stand for.
pub(super) struct Coded {
    codes: Codes,
    /// As the codes are.
    values: Vec<f32>,
}

impl Coded {
    fn new(rounded: Rounded, grid: &Grid<'_>, factor: &HessianFactor) -> (Self, Vec<f64>) {
        let values = grid.values(&rounded, factor);
        let scale = rounded.scale.iter().map(|scale| f16::from_f32(*scale)).collect();
        let codes = Codes { codes: rounded.codes, scale, zero: rounded.zero };
        (Self { codes, values }, rounded.loss)
    }
}

/// `v` with its codes.
pub(super) struct Right {
    pub(super) blocks: Vec<Codes>,
    /// What the codes stand for, `[rank, in_features]`.
    pub(super) values: Vec<f32>,
    /// The number of each pair, for `u` in units of about 1.
    s: Vec<f64>,
}

impl Right {
    /// Rounds vectors `[rank, in_features]`.
    pub(super) fn new(
        vectors: &[f32],
        s: Vec<f64>,
        layout: &Layout,
        weighing: &Weighing<'_>,
    ) -> Result<Self> {
        let factor = weighing.factor()?;
        let n = layout.shape[1];
        let mut out = Self { blocks: Vec::new(), values: Vec::new(), s };
        for block in layout.blocks() {
            let rows = &vectors[block.pairs.start * n..block.pairs.end * n];
            let (coded, _) = right(rows, block.width, layout.grids, &factor);
            out.blocks.push(coded.codes);
            out.values.extend(coded.values);
        }
        Ok(out)
    }
}

/// `u` with its codes.
pub(super) struct Left {
    pub(super) blocks: Vec<Codes>,
    /// What is stored of each pair.
    pub(super) s: Vec<bf16>,
    /// What the codes stand for, with the pairs' numbers: `[out_features, rank]`.
    pub(super) values: Vec<f32>,
    /// The squared error of the outputs against those of what was rounded, less what no `u`
    /// changes.
    pub(super) error: f64,
}

/// Rounds `fitted`, `[out_features, rank]`: `k` is `A G Aᵀ` for the values `A` of `right`, and
/// the delta is in units of `unit`.
pub(super) fn left(
    fitted: Vec<f32>,
    k: &[f64],
    right: &Right,
    layout: &Layout,
    unit: f64,
    method: &Method,
) -> Result<Left> {
    match layout.grids {
        Grids::Pair => pair_left(fitted, k, right, layout, unit, method),
        Grids::Group(size) => group_left(&fitted, k, right, layout, size, unit, method),
    }
}

/// `Σ‖(F − U) A‖²` over inputs, less what no `U` changes, of `Uᵀ U` and `Uᵀ F`.
fn error(squares: &[f64], products: &[f64], k: &[f64]) -> f64 {
    squares.iter().zip(products).zip(k).map(|((square, cross), k)| k * (square - 2.0 * cross)).sum()
}

/// The step of the values of a pair: what a level of `v` is in them.
fn step_of(values: &[f32], codes: &[u8], width: usize) -> f64 {
    let top = f64::from((1u16 << width) - 1);
    let levels = codes.iter().map(|code| 2.0 * f64::from(*code) - top);
    // All are the same; the first will do.
    values.iter().zip(levels).map(|(value, level)| f64::from(*value) / level).next().unwrap_or(0.0)
}

/// One scale for each pair, all columns rounded together.
#[allow(clippy::cast_possible_truncation)]
fn pair_left(
    fitted: Vec<f32>,
    k: &[f64],
    right: &Right,
    layout: &Layout,
    unit: f64,
    method: &Method,
) -> Result<Left> {
    let [m, n] = layout.shape;
    let rank = layout.rank();
    let mut widths = vec![0u8; rank];
    let mut of_level = vec![0.0; rank];
    for (block, codes) in layout.blocks().iter().zip(&right.blocks) {
        for (at, r) in block.pairs.clone().enumerate() {
            widths[r] = narrow(block.width);
            let own = &codes.codes[at * n..(at + 1) * n];
            of_level[r] = step_of(&right.values[r * n..(r + 1) * n], own, block.width);
        }
    }
    let column = |(r, width): (usize, &u8)| {
        let column: Vec<f32> = fitted[r..].iter().step_by(rank).copied().collect();
        half_step(&column, usize::from(*width))
    };
    let steps: Vec<f32> = widths.par_iter().enumerate().map(column).collect();
    let factor = HessianFactor::new(k, rank, method.order, method.damping)?;
    let (rows, ones) = (vec![1.0; m], vec![1.0; rank]);
    let grid = Grid::Steps { bits: &widths, rows: &rows, columns: &steps };
    let rounded = gptq(&fitted, &factor, &grid);
    let grid = Grid::Steps { bits: &widths, rows: &rows, columns: &ones };
    let mut values = grid.values(&rounded, &factor);
    // The numbers that are best for these levels: min ‖(F − L diag(c)) A‖.
    let (squares, products) = {
        let levels = Thin::from_rows(&values, m, rank);
        (gram(&levels, &levels), gram(&levels, &Thin::from_rows(&fitted, m, rank)))
    };
    drop(fitted);
    let matrix: Vec<f64> = squares.iter().zip(k).map(|(a, b)| a * b).collect();
    let wanted: Vec<f64> = products
        .chunks(rank)
        .zip(k.chunks(rank))
        .map(|(products, k)| products.iter().zip(k).map(|(a, b)| a * b).sum())
        .collect();
    let best = solve_vector(&matrix, &wanted, super::RIDGE)?;
    let s: Vec<bf16> =
        best.iter().zip(&of_level).map(|(c, level)| stored(c * level * unit)).collect();
    let in_values = |(s, level): (&bf16, &f64)| {
        if *level == 0.0 { 0.0 } else { s.to_f64() / (level * unit) }
    };
    let numbers: Vec<f64> = s.iter().zip(&of_level).map(in_values).collect();
    for row in values.chunks_mut(rank) {
        let of_row = row.iter_mut().zip(&numbers);
        of_row.for_each(|(value, number)| *value = (f64::from(*value) * number) as f32);
    }
    let scaled = |(at, x): (usize, f64), both: bool| {
        let number = numbers[at / rank];
        x * number * if both { numbers[at % rank] } else { 1.0 }
    };
    let squares: Vec<f64> = squares.into_iter().enumerate().map(|x| scaled(x, true)).collect();
    let products: Vec<f64> = products.into_iter().enumerate().map(|x| scaled(x, false)).collect();
    let blocks = layout.blocks().into_iter().map(|block| {
        let rows = rounded.codes.chunks(rank);
        let codes = rows.flat_map(|row| &row[block.pairs.clone()]).copied().collect();
        Codes { codes, ..Codes::default() }
    });
    let error = error(&squares, &products, k);
    Ok(Left { blocks: blocks.collect(), s, values, error })
}

/// Ranges for each row and group of a block, block by block.
#[allow(clippy::cast_possible_truncation)]
fn group_left(
    fitted: &[f32],
    k: &[f64],
    right: &Right,
    layout: &Layout,
    size: usize,
    unit: f64,
    method: &Method,
) -> Result<Left> {
    let rank = layout.rank();
    let s: Vec<bf16> = right.s.iter().map(|s| stored(s * unit)).collect();
    let numbers: Vec<f64> = s.iter().map(|s| s.to_f64() / unit).collect();
    let mut values = vec![0.0; fitted.len()];
    let mut blocks = Vec::new();
    for block in layout.blocks() {
        let pairs = block.pairs.clone();
        let own: Vec<f32> = fitted
            .chunks(rank)
            .flat_map(|row| row[pairs.clone()].iter().zip(&numbers[pairs.clone()]))
            .map(|(u, s)| if *s == 0.0 { 0.0 } else { (f64::from(*u) / s) as f32 })
            .collect();
        let of_block: Vec<f64> = pairs
            .clone()
            .flat_map(|i| pairs.clone().map(move |j| (i, j)))
            .map(|(i, j)| numbers[i] * k[i * rank + j] * numbers[j])
            .collect();
        let factor = HessianFactor::new(&of_block, pairs.len(), method.order, method.damping)?;
        let grid = ranges(block.width, size);
        let (coded, _) = Coded::new(gptq(&own, &factor, &grid), &grid, &factor);
        let rows = values.chunks_mut(rank).zip(coded.values.chunks(pairs.len()));
        for (row, own) in rows {
            let of_row = row[pairs.clone()].iter_mut().zip(own.iter().zip(&numbers[pairs.clone()]));
            of_row.for_each(|(value, (u, s))| *value = (f64::from(*u) * s) as f32);
        }
        blocks.push(coded.codes);
    }
    let u = Thin::from_rows(&values, layout.shape[0], rank);
    let products = gram(&u, &Thin::from_rows(fitted, layout.shape[0], rank));
    let error = error(&gram(&u, &u), &products, k);
    Ok(Left { blocks, s, values, error })
}
