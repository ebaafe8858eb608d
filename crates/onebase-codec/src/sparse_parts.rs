//! Sparse matrices of codes with stored input features, split by the range of the code: the
//! separate quantization of DeltaDQ (arXiv 2410.08666).
//!
//! Of `m` matrices, the `j`-th has the entries whose code is from `j · 2^k / m` on and below the
//! next, less that: its codes take `k − log₂ m` bits. Their sum is the matrix that was split.
//!
//! Part `offset`, `[m, out_features + 1, 4]`, U8: of each matrix, where the entries of each
//! row begin and the last ones end. Part `index`, `[n_entries, 2]` or, for more than 65536 input
//! features, `[n_entries, 4]`, U8: input features, matrix after matrix, row after row,
//! ascending in each. Part `value`, `[n]`, U8: the codes of all of them, packed. Numbers are
//! little-endian.

use onebase_tensor::{DType, PartData, PartError, PartSpec, Parts};

use crate::entropy::{pack, packed_bytes, unpack};
use crate::{Error, Result};

const OFFSET_BYTES: usize = 4;

/// Kept weights, as many of each row.
pub(crate) struct Entries {
    /// Input features, `[out_features, n_kept]`, ascending in each row.
    pub(crate) columns: Vec<u32>,
    /// `[out_features, n_kept]`.
    pub(crate) codes: Vec<u8>,
}

fn width(n_cols: usize) -> usize {
    if n_cols <= 1 << 16 { 2 } else { 4 }
}

/// Bits of a code in a matrix of `n_parts`.
fn value_bits(bits: usize, n_parts: usize) -> usize {
    bits.saturating_sub(n_parts.ilog2() as usize)
}

/// The parts.
pub(crate) fn specs(
    [n_rows, n_cols]: [usize; 2],
    n_kept: usize,
    bits: usize,
    n_parts: usize,
) -> [PartSpec; 3] {
    let n = n_rows * n_kept;
    [
        PartSpec::new("offset", DType::U8, [n_parts, n_rows + 1, OFFSET_BYTES]),
        PartSpec::new("index", DType::U8, [n, width(n_cols)]),
        PartSpec::new("value", DType::U8, [packed_bytes(n, value_bits(bits, n_parts))]),
    ]
}

fn wrong(part: &str, index: usize, expected: String, got: usize) -> Error {
    let got = got.to_string();
    PartError::Value { part: part.to_owned(), index, expected, got }.into()
}

impl Entries {
    /// As parts of these shapes.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn into_parts(
        self,
        shape @ [n_rows, n_cols]: [usize; 2],
        n_kept: usize,
        bits: usize,
        n_parts: usize,
    ) -> Vec<(&'static str, Vec<usize>, PartData)> {
        let value_bits = value_bits(bits, n_parts);
        let (mut offsets, mut index) = (Vec::new(), Vec::with_capacity(2 * self.columns.len()));
        let mut values = Vec::with_capacity(self.codes.len());
        for part in 0..n_parts {
            let mut n = 0u32;
            offsets.extend(n.to_le_bytes());
            for row in 0..n_rows {
                let at = row * n_kept..(row + 1) * n_kept;
                for (column, code) in self.columns[at.clone()].iter().zip(&self.codes[at]) {
                    if usize::from(*code) >> value_bits == part {
                        index.extend_from_slice(&column.to_le_bytes()[..width(n_cols)]);
                        values.push((u32::from(*code) & ((1 << value_bits) - 1)) as u8);
                        n += 1;
                    }
                }
                offsets.extend(n.to_le_bytes());
            }
        }
        let data = [offsets, index, pack(values.into_iter(), value_bits)];
        let specs = specs(shape, n_kept, bits, n_parts).into_iter().zip(data);
        specs.map(|(spec, bytes)| (spec.name, spec.shape, PartData::U8(bytes))).collect()
    }

    /// What was split, from its parts.
    ///
    /// # Errors
    /// When a part is missing or of another shape, or the entries are not as many of each
    /// row, at different input features.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn take(
        parts: &mut Parts,
        shape @ [n_rows, n_cols]: [usize; 2],
        n_kept: usize,
        bits: usize,
        n_parts: usize,
    ) -> Result<Self> {
        if !n_parts.is_power_of_two() || n_parts > 1 << bits {
            let expected = format!("a power of two up to {}", 1 << bits);
            return Err(wrong("offset", 0, expected, n_parts));
        }
        let specs = specs(shape, n_kept, bits, n_parts);
        let [offsets, index, values] = specs.each_ref().map(|s| parts.take_u8(s.name, &s.shape));
        let (offsets, index, values) = (offsets?, index?, values?);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
        let offsets: Vec<usize> = offsets.chunks(OFFSET_BYTES).map(number).collect();
        let value_bits = value_bits(bits, n_parts);
        let n = n_rows * n_kept;
        let mut codes = unpack(&values, value_bits, n);
        let mut places = index.chunks(width(n_cols)).map(number);
        let mut rows: Vec<Vec<(u32, u8)>> = vec![Vec::with_capacity(n_kept); n_rows];
        let mut n_read = 0;
        for (part, offsets) in offsets.chunks(n_rows + 1).enumerate() {
            let mut last = 0;
            for (at, (offset, row)) in offsets[1..].iter().zip(&mut rows).enumerate() {
                let at = part * (n_rows + 1) + at + 1;
                let count = offset.checked_sub(last).filter(|_| offsets[0] == 0);
                let Some(count) = count.filter(|count| row.len() + count <= n_kept) else {
                    let expected = format!("at most {n_kept} entries of a row, ascending from 0");
                    return Err(wrong("offset", at, expected, *offset));
                };
                for _ in 0..count {
                    let (Some(column), Some(code)) = (places.next(), codes.next()) else {
                        return Err(wrong("offset", at, format!("{n} in all"), n_read));
                    };
                    if column >= n_cols {
                        let expected = format!("an input feature below {n_cols}");
                        return Err(wrong("index", n_read, expected, column));
                    }
                    row.push((column as u32, (part << value_bits) as u8 | code));
                    n_read += 1;
                }
                last = *offset;
            }
        }
        if n_read != n {
            return Err(wrong("offset", offsets.len() - 1, format!("{n} in all"), n_read));
        }
        let (mut all_columns, mut all_codes) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for (at, mut row) in rows.into_iter().enumerate() {
            row.sort_unstable();
            if let Some(twice) = row.windows(2).find(|pair| pair[0].0 == pair[1].0) {
                let expected = "different input features of a row".to_owned();
                return Err(wrong("index", at * n_kept, expected, twice[0].0 as usize));
            }
            all_columns.extend(row.iter().map(|entry| entry.0));
            all_codes.extend(row.iter().map(|entry| entry.1));
        }
        Ok(Self { columns: all_columns, codes: all_codes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onebase_tensor::EncodedDelta;

    /// All numbers of parts of all codes come back as they were, and no entry is lost.
    #[test]
    fn separate_parts_are_the_whole() {
        let (shape, n_kept) = ([9, 50], 13);
        let columns: Vec<u32> = (0..9).flat_map(|r| (0..13).map(move |i| 3 * i + r % 4)).collect();
        for bits in 1..=8usize {
            let top = (1u32 << bits) - 1;
            let codes: Vec<u8> = (0..9 * 13u32).map(|i| (i * i * 7 % 257).min(top) as u8).collect();
            for n_parts in (0..=bits).map(|log| 1 << log) {
                let entries = Entries { columns: columns.clone(), codes: codes.clone() };
                let mut delta = EncodedDelta { shape, parts: Default::default() };
                for part in entries.into_parts(shape, n_kept, bits, n_parts) {
                    delta.parts.append(&mut EncodedDelta::new(shape, [part]).parts);
                }
                let mut parts = delta.into_parts();
                let got = Entries::take(&mut parts, shape, n_kept, bits, n_parts).unwrap();
                parts.finish().unwrap();
                assert_eq!((got.columns, got.codes), (columns.clone(), codes.clone()));
            }
        }
    }
}
