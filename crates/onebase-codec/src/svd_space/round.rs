//! The codes of both sides.

use half::{bf16, f16};
use onebase_kernels::plane_bytes;
use rayon::prelude::*;

use super::blocks::{Codes, Grids, Layout};
use super::weighing::Weighing;
use super::{Method, backend, stored};
use crate::Result;
use crate::numerics::{
    Grid, HessianFactor, RangeGrid, Rounded, ScaleFormat, gptq, product_of_columns, solve_vector,
};

/// One scale for a whole vector; a multiple of the lanes.
const WHOLE: usize = 1 << 30;

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
    backend().fit_low_bit(vector, width, WHOLE, &mut codes, &mut scale);
    scale[0].to_f32()
}

/// What rounding each of some vectors, `[k, n]`, to the nearest level of a width leaves of
/// its squared length.
pub(crate) fn relative_error(vectors: &[f32], n: usize, width: usize) -> Vec<f64> {
    let errors = vectors.par_chunks(n).map(|vector| {
        let step = f64::from(half_step(vector, width));
        let top = f64::from((1u16 << width) - 1);
        let (mut lost, mut power) = (0.0, 0.0);
        for x in vector {
            let x = f64::from(*x);
            let level = match step > 0.0 {
                true => 2.0 * ((x / step + top + 1.0) / 2.0).floor().clamp(0.0, top) - top,
                false => 0.0,
            };
            lost += (x - step * level).powi(2);
            power += x * x;
        }
        if power > 0.0 { lost / power } else { 0.0 }
    });
    errors.collect()
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
        s: &[f64],
        layout: &Layout,
        weighing: &Weighing<'_>,
    ) -> Result<Self> {
        let factor = weighing.factor()?;
        let n = layout.shape[1];
        let mut out = Self { blocks: Vec::new(), values: Vec::new(), s: s.to_vec() };
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
    /// The squared error of the outputs, less what no `u` could change.
    pub(super) error: f64,
}

/// Rounds `fitted`, `[out_features, rank]`. `reached` is `D G Aᵀ` of the same shape and `k`
/// is `A G Aᵀ`, for the values `A` of `right`; the delta is in units of `unit`.
pub(super) fn left(
    fitted: &[f32],
    reached: &[f32],
    k: &[f64],
    right: &Right,
    layout: &Layout,
    unit: f64,
    method: &Method,
) -> Result<Left> {
    let rank = layout.rank();
    let mut left = match layout.grids {
        Grids::Pair => pair_left(fitted, reached, k, right, layout, unit, method)?,
        Grids::Group(size) => group_left(fitted, k, right, layout, size, unit, method)?,
    };
    let gram = gram_of(&left.values, rank);
    let cross: f64 =
        left.values.iter().zip(reached).map(|(u, r)| f64::from(*u) * f64::from(*r)).sum();
    let square: f64 = gram.iter().zip(k).map(|(a, b)| a * b).sum();
    left.error = square - 2.0 * cross;
    Ok(left)
}

/// `Uᵀ U` of rows `[n, rank]`.
fn gram_of(rows: &[f32], rank: usize) -> Vec<f64> {
    let wide: Vec<f64> = rows.iter().map(|x| f64::from(*x)).collect();
    product_of_columns(&wide, &wide, [rows.len() / rank, rank, rank])
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
    fitted: &[f32],
    reached: &[f32],
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
            let row = r * n..(r + 1) * n;
            let own = &codes.codes[at * n..(at + 1) * n];
            of_level[r] = step_of(&right.values[row], own, block.width);
        }
    }
    let columns: Vec<Vec<f32>> =
        (0..rank).map(|r| fitted[r..].iter().step_by(rank).copied().collect()).collect();
    let steps: Vec<f32> = columns
        .par_iter()
        .zip(&widths)
        .map(|(column, width)| half_step(column, usize::from(*width)))
        .collect();
    drop(columns);
    let factor = HessianFactor::new(k, rank, method.order, method.damping)?;
    let rows = vec![1.0; m];
    let grid = Grid::Steps { bits: &widths, rows: &rows, columns: &steps };
    let rounded = gptq(fitted, &factor, &grid);
    let levels: Vec<f32> = {
        let ones = vec![1.0; rank];
        Grid::Steps { bits: &widths, rows: &rows, columns: &ones }.values(&rounded, &factor)
    };
    // The numbers that are best for these levels: min ‖D − L diag(c) A‖.
    let gram = gram_of(&levels, rank);
    let matrix: Vec<f64> = gram.iter().zip(k).map(|(a, b)| a * b).collect();
    let mut wanted = vec![0.0; rank];
    for (levels, reached) in levels.chunks(rank).zip(reached.chunks(rank)) {
        for (wanted, (level, r)) in wanted.iter_mut().zip(levels.iter().zip(reached)) {
            *wanted += f64::from(*level) * f64::from(*r);
        }
    }
    let best = solve_vector(&matrix, &wanted, super::RIDGE)?;
    let s: Vec<bf16> =
        best.iter().zip(&of_level).map(|(c, level)| stored(c * level * unit)).collect();
    let numbers: Vec<f32> = s
        .iter()
        .zip(&of_level)
        .map(|(s, level)| if *level == 0.0 { 0.0 } else { (s.to_f64() / (level * unit)) as f32 })
        .collect();
    let mut values = levels;
    for row in values.chunks_mut(rank) {
        row.iter_mut().zip(&numbers).for_each(|(value, number)| *value *= number);
    }
    let blocks = layout.blocks().into_iter().map(|block| {
        let rows = rounded.codes.chunks(rank);
        let codes = rows.flat_map(|row| &row[block.pairs.clone()]).copied().collect();
        Codes { codes, ..Codes::default() }
    });
    Ok(Left { blocks: blocks.collect(), s, values, error: 0.0 })
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
    Ok(Left { blocks, s, values, error: 0.0 })
}
