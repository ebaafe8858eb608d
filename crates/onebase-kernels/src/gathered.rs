//! `y += Δ x` where blocks of rows read the same few inputs.
//!
//! Lanes are rows here, not inputs. Four inputs have sixteen sums with signs; these are one
//! vector, from which each row takes its own by four bits of its codes. The vectors are made
//! once for all rows of a block, so that a weight costs a sixteenth of an instruction or so, and nothing
//! is done for inputs that no row of the block reads.

use std::ops::Range;

use onebase_tensor::{MatrixMut, MatrixRef};

use crate::parallel::{Output, for_each_block};
use crate::vector::{Kernel, LANES, Lanes};
use crate::{Backend, MAX_BITS};

/// Inputs whose bits are in one word.
const WORD: usize = u32::BITS as usize;

/// Most rows of a block.
const MAX_ROWS: usize = 256;

/// Sums with signs of four inputs, by the bits of the number of the lane.
const SIGNS: [[f32; LANES]; 4] = {
    let mut signs = [[-1.0; LANES]; 4];
    let mut at = 0;
    while at < 4 * LANES {
        let (input, lane) = (at / LANES, at % LANES);
        if lane >> input & 1 == 1 {
            signs[input][lane] = 1.0;
        }
        at += 1;
    }
    signs
};

/// Inputs by number, in two bytes where that is enough.
#[derive(Clone, Debug)]
enum Columns {
    Short(Vec<u16>),
    Long(Vec<u32>),
}

/// Codes of a matrix `[out_features, in_features]` of which each block of rows keeps some
/// columns, the same for its rows and as many for all blocks.
#[derive(Clone, Debug)]
pub struct Gathered {
    shape: [usize; 2],
    /// The last block may have fewer.
    block_rows: usize,
    bits: usize,
    n_kept: usize,
    /// `[n_blocks, n_kept]`, all below `in_features`.
    columns: Columns,
    /// Block after block `[n_words, bits, rows]`, rows filled up to whole vectors: a bit of the
    /// codes of 32 kept columns each, the first in the lowest bit.
    words: Vec<u32>,
}

impl Gathered {
    /// Most rows that may share their columns.
    pub const MAX_BLOCK_ROWS: usize = MAX_ROWS;

    /// `columns` are those that each block of `block_rows` rows keeps, `[n_blocks, n_kept]`, and
    /// `codes` those of each row, `[out_features, n_kept]`, of `bits` each.
    ///
    /// Panics when a length, a column or a code does not fit, or when blocks have more than
    /// [`Gathered::MAX_BLOCK_ROWS`] rows.
    pub fn new(
        shape @ [n_rows, n_cols]: [usize; 2],
        block_rows: usize,
        bits: usize,
        columns: Vec<u32>,
        codes: impl Iterator<Item = u8>,
    ) -> Self {
        assert!((1..=MAX_ROWS).contains(&block_rows), "rows of a block");
        assert!((1..=MAX_BITS).contains(&bits), "bits");
        let n_blocks = n_rows.div_ceil(block_rows);
        let n_kept = columns.len().checked_div(n_blocks).unwrap_or(0);
        assert_eq!(columns.len(), n_blocks * n_kept, "columns");
        assert!(columns.iter().all(|column| (*column as usize) < n_cols), "columns");
        let columns = if n_cols <= 1 << 16 {
            #[allow(clippy::cast_possible_truncation)]
            Columns::Short(columns.into_iter().map(|column| column as u16).collect())
        } else {
            Columns::Long(columns)
        };
        let mut this = Self { shape, block_rows, bits, n_kept, columns, words: Vec::new() };
        let (last, _) = this.words_of(n_blocks);
        this.words = vec![0; last];
        let mut n_codes = 0;
        for (index, code) in codes.enumerate() {
            assert!(usize::from(code) >> bits == 0, "codes");
            let (row, at) = (index / n_kept, index % n_kept);
            for plane in (0..bits).filter(|plane| code >> plane & 1 == 1) {
                let word = this.word(row, at, plane);
                this.words[word] |= 1 << (at % WORD);
            }
            n_codes += 1;
        }
        assert_eq!(n_codes, n_rows * n_kept, "codes");
        this
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Bytes in memory.
    pub fn resident_bytes(&self) -> usize {
        let columns = match &self.columns {
            Columns::Short(columns) => size_of_val(columns.as_slice()),
            Columns::Long(columns) => size_of_val(columns.as_slice()),
        };
        columns + size_of_val(self.words.as_slice())
    }

    /// Calls `each` with all columns that a row keeps and their codes.
    ///
    /// Panics when there is no such row.
    pub fn visit(&self, row: usize, mut each: impl FnMut(usize, u8)) {
        assert!(row < self.shape[0], "row");
        let first = row / self.block_rows * self.n_kept;
        for at in 0..self.n_kept {
            let column = match &self.columns {
                Columns::Short(columns) => usize::from(columns[first + at]),
                Columns::Long(columns) => columns[first + at] as usize,
            };
            let bit = |plane| self.words[self.word(row, at, plane)] >> (at % WORD) & 1;
            let code = (0..self.bits).fold(0, |code, plane| code | bit(plane) << plane);
            each(column, code.to_le_bytes()[0]);
        }
    }

    /// Where the words of a block begin, and its rows, filled up.
    fn words_of(&self, block: usize) -> (usize, usize) {
        let of_row = self.n_kept.div_ceil(WORD) * self.bits;
        let first = block * self.block_rows;
        let rows = self.block_rows.min(self.shape[0].saturating_sub(first));
        let before = match rows {
            // The end of the last block.
            0 => {
                let whole = self.shape[0] / self.block_rows;
                let rest = self.shape[0] % self.block_rows;
                whole * self.block_rows.next_multiple_of(LANES) + rest.next_multiple_of(LANES)
            }
            _ => block * self.block_rows.next_multiple_of(LANES),
        };
        (before * of_row, rows.next_multiple_of(LANES))
    }

    /// The word that has bit `plane` of the code of a row's kept column `at`.
    fn word(&self, row: usize, at: usize, plane: usize) -> usize {
        let (first, rows) = self.words_of(row / self.block_rows);
        first + (at / WORD * self.bits + plane) * rows + row % self.block_rows
    }
}

impl Backend {
    /// `y += x Δᵀ`, where the weight of a code of a row is
    /// `factor[row] · (2 code − (2^bits − 1) + offset)`: `factor` is `[out_features]`, `x` is
    /// `[n_rows, in_features]`, `y` is `[n_rows, out_features]`. The result is the same on all
    /// backends, to the bit.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_gathered(
        self,
        delta: &Gathered,
        factor: &[f32],
        offset: f32,
        x: MatrixRef<'_>,
        y: &mut MatrixMut<'_>,
    ) {
        let [out_features, in_features] = delta.shape;
        let n_rows = x.n_rows();
        assert_eq!([y.n_rows(), y.n_cols()], [n_rows, out_features], "the shape of y");
        assert_eq!(x.n_cols(), in_features, "columns of the delta and of x");
        assert_eq!(factor.len(), out_features, "factors");
        if delta.n_kept == 0 {
            return;
        }
        let output = Output::new(y.data(), out_features);
        let n_blocks = out_features.div_ceil(delta.block_rows);
        let of_block = delta.n_kept.saturating_mul(delta.block_rows);
        let work = of_block.saturating_mul(n_blocks).saturating_mul(n_rows);
        for_each_block(n_blocks, of_block * delta.bits / 8, work, |blocks| {
            // SAFETY: lengths were checked above, `blocks` are blocks of the delta, and no two
            // tasks share one.
            unsafe { self.run(Product { delta, factor, offset, x, output, blocks }) }
        });
    }
}

struct Product<'a> {
    delta: &'a Gathered,
    factor: &'a [f32],
    offset: f32,
    x: MatrixRef<'a>,
    output: Output,
    blocks: Range<usize>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        for block in self.blocks.clone() {
            for row in 0..self.x.n_rows() {
                // SAFETY: the block and the row are the product's.
                unsafe {
                    match &self.delta.columns {
                        Columns::Short(columns) => self.add::<V, _>(columns, block, row),
                        Columns::Long(columns) => self.add::<V, _>(columns, block, row),
                    }
                }
            }
        }
    }
}

/// A column's number.
trait Column: Copy {
    fn index(self) -> usize;
}

impl Column for u16 {
    #[inline(always)]
    fn index(self) -> usize {
        usize::from(self)
    }
}

impl Column for u32 {
    #[inline(always)]
    fn index(self) -> usize {
        self as usize
    }
}

impl Product<'_> {
    /// Adds the products of a block with a row of `x`.
    ///
    /// # Safety
    /// The lanes' instructions are available, the block and the row exist, and no other task
    /// adds to the block's output features.
    #[inline(always)]
    unsafe fn add<V: Lanes, C: Column>(&self, columns: &[C], block: usize, row: usize) {
        let Gathered { shape, block_rows, bits, n_kept, ref words, .. } = *self.delta;
        let x = self.x.row(row);
        let columns = &columns[block * n_kept..(block + 1) * n_kept];
        let (first, padded) = self.delta.words_of(block);
        let n_vectors = padded / LANES;
        let n_words = n_kept.div_ceil(WORD);
        let mut words = words[first..first + n_words * bits * padded].as_ptr();
        // SAFETY: columns are below the length of `x`, as `Gathered::new` and `add_gathered`
        // checked; the words are as many as are walked over; the output features are of the
        // block.
        unsafe {
            let mut totals = [V::splat(0.0); MAX_ROWS / LANES];
            let mut sum = V::splat(0.0);
            for columns in columns.chunks(WORD) {
                let mut inputs = [0.0; WORD];
                if let Ok(columns) = <&[C; WORD]>::try_from(columns) {
                    for (input, column) in inputs.iter_mut().zip(columns) {
                        *input = *x.get_unchecked(column.index());
                    }
                } else {
                    for (input, column) in inputs.iter_mut().zip(columns) {
                        *input = *x.get_unchecked(column.index());
                    }
                }
                if self.offset != 0.0 {
                    sum = sum.mask_add(u16::MAX, V::load(inputs.as_ptr()));
                    sum = sum.mask_add(u16::MAX, V::load(inputs.as_ptr().add(LANES)));
                }
                let sums = signed_sums::<V>(&inputs);
                let mut power = 1.0;
                for _ in 0..bits {
                    let power_vector = V::splat(power);
                    for total in &mut totals[..n_vectors] {
                        // A power of two: the product is exact.
                        *total = V::choose(&sums, words).mul_add(power_vector, *total);
                        words = words.add(LANES);
                    }
                    power *= 2.0;
                }
            }
            let shift = if self.offset == 0.0 { 0.0 } else { self.offset * sum.sum() };
            let outs = block * block_rows..shape[0].min((block + 1) * block_rows);
            for (total, out) in totals[..n_vectors].iter().zip(outs.clone().step_by(LANES)) {
                let mut lanes = [0.0; LANES];
                total.store(lanes.as_mut_ptr());
                for (out, lane) in (out..outs.end).zip(lanes) {
                    self.output.add(row, out, self.factor[out] * (lane + shift));
                }
            }
        }
    }
}

/// For each four inputs in turn, their sixteen sums with signs.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn signed_sums<V: Lanes>(inputs: &[f32; WORD]) -> [V; WORD / 4] {
    // SAFETY: the rows of signs have a vector's length.
    unsafe {
        let mut signs = [V::splat(0.0); 4];
        for (signs, from) in signs.iter_mut().zip(&SIGNS) {
            *signs = V::load(from.as_ptr());
        }
        let mut sums = [V::splat(0.0); WORD / 4];
        for (sum, four) in sums.iter_mut().zip(inputs.as_chunks::<4>().0) {
            for (signs, input) in signs.iter().zip(four) {
                *sum = signs.mul_add(V::splat(*input), *sum);
            }
        }
        sums
    }
}
