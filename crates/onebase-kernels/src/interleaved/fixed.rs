//! Inputs as integers.

use onebase_tensor::MatrixRef;
use rayon::prelude::*;

use super::CHUNK;
use crate::bytes::{ByteKernel, Bytes, LINE, Line, bytes, bytes_mut};
use crate::vector::LANES;
use crate::{Backend, quantize};

/// Bytes of an integer.
pub(super) const DIGITS: usize = 3;

/// The largest integer: its digits are from −128 to 127.
const TOP: f32 = 8_323_072.0;

/// Numbers below which rows are not worth a second thread.
const WORTH_A_THREAD: usize = 1 << 15;

/// What the integers of a group stand for, and the sum of each digit.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    step: f32,
    sums: [i32; DIGITS],
}

/// Rows of integers; each stands for itself times the step of its group.
#[derive(Debug)]
pub(super) struct FixedRows {
    n_rows: usize,
    n_groups: usize,
    /// Columns, filled up with zeros to whole chunks.
    padded: usize,
    /// `[n_rows, DIGITS, padded]`, signed bytes, lowest digit first.
    digits: Vec<Line>,
    /// `[n_rows, n_groups]`.
    groups: Vec<Group>,
}

impl FixedRows {
    /// Rounds the rows of `x`. The step is a largest magnitude over [`TOP`]; a group with an input
    /// that is not finite has no number for a step.
    pub(super) fn new(backend: Backend, x: MatrixRef<'_>, group_size: usize) -> Self {
        let [n_rows, n_cols] = x.shape();
        let (padded, n_groups) = (n_cols.next_multiple_of(CHUNK), n_cols.div_ceil(group_size));
        let row_bytes = DIGITS * padded;
        let mut this = Self {
            n_rows,
            n_groups,
            padded,
            digits: vec![Line::ZERO; (n_rows * row_bytes).div_ceil(LINE)],
            groups: vec![Group::default(); n_rows * n_groups],
        };
        if n_cols == 0 {
            return this;
        }
        let fix = |(row, (digits, groups)): (usize, (&mut [u8], &mut [Group]))| {
            let x = x.row(row);
            // SAFETY: the kernel's conversions are of numbers that are in range.
            unsafe { backend.run_bytes(Fix { x, group_size, padded, digits, groups }) }
        };
        let digits = &mut bytes_mut(&mut this.digits)[..n_rows * row_bytes];
        if x.data().len() < WORTH_A_THREAD {
            let rows = digits.chunks_mut(row_bytes).zip(this.groups.chunks_mut(n_groups));
            rows.enumerate().for_each(fix);
        } else {
            let groups = this.groups.par_chunks_mut(n_groups);
            digits.par_chunks_mut(row_bytes).zip(groups).enumerate().for_each(fix);
        }
        this
    }

    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// A digit of all columns of a row.
    #[inline(always)]
    pub(super) fn digits(&self, row: usize, digit: usize) -> *const u8 {
        bytes(&self.digits).as_ptr().wrapping_add((row * DIGITS + digit) * self.padded)
    }

    /// The step of a group, and the sum of each digit.
    #[inline(always)]
    pub(super) fn group(&self, row: usize, group: usize) -> (f32, [i32; DIGITS]) {
        let Group { step, sums } = self.groups[row * self.n_groups + group];
        (step, sums)
    }
}

struct Fix<'a> {
    x: &'a [f32],
    group_size: usize,
    padded: usize,
    digits: &'a mut [u8],
    groups: &'a mut [Group],
}

impl ByteKernel for Fix<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Bytes>(self) {
        let Self { x, group_size, padded, digits: to, groups } = self;
        for (index, (x, group)) in x.chunks(group_size).zip(groups).enumerate() {
            let [low, high] = quantize::range(x);
            let largest = high.max(-low);
            if !largest.is_finite() {
                group.step = f32::NAN;
                continue;
            }
            group.step = (largest / TOP).max(f32::MIN_POSITIVE);
            let mut sums = [[0i32; LANES]; DIGITS];
            let mut at = index * group_size;
            let (chunks, rest) = x.as_chunks::<LANES>();
            let mut last = [0.0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            let last = (!rest.is_empty()).then_some(&last);
            for chunk in chunks.iter().chain(last) {
                let [mut low, mut middle, mut high] = [[0u8; LANES]; DIGITS];
                for (lane, x) in chunk.iter().enumerate() {
                    let value = (x / group.step).round_ties_even();
                    // SAFETY: at most one beyond `TOP`.
                    let value: i32 = unsafe { value.to_int_unchecked() };
                    // Balanced digits: what one is less than its bits, the next is more.
                    let digits =
                        [value << 24 >> 24, (value + 0x80) << 16 >> 24, (value + 0x8080) >> 16];
                    sums[0][lane] += digits[0];
                    sums[1][lane] += digits[1];
                    sums[2][lane] += digits[2];
                    // From −128 to 127.
                    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                    {
                        low[lane] = digits[0] as u8;
                        middle[lane] = digits[1] as u8;
                        high[lane] = digits[2] as u8;
                    }
                }
                for (digit, lanes) in [low, middle, high].iter().enumerate() {
                    let at = digit * padded + at;
                    to[at..at + LANES].copy_from_slice(lanes);
                }
                at += LANES;
            }
            group.sums = sums.map(|lanes| lanes.iter().sum());
        }
    }
}
