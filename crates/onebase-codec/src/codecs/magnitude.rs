//! The largest weights of the delta, the rest zero: magnitude pruning (S. Han et al.,
//! "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
//! of a delta and without training on), the baseline of papers on delta compression.
//!
//! It is also what D-QRELO (arXiv 2604.16940, section 3.3) does with one-dimensional
//! tensors, "we select parameters for compression by magnitude at a target ratio of ρ",
//! read as keeping that share of them; the paper has no formula for it.
//!
//! One threshold holds for the whole matrix. It is found exactly, by counting magnitudes
//! by their leading and then by their trailing bits, so that the matrix is read four
//! times and never held. Papers count the values alone; where they stand costs bytes
//! too, and is stored in whichever of two ways takes fewer.

use half::bf16;
use onebase_kernels::plane_bytes;
use onebase_tensor::{
    DType, EncodedDelta, PartData, PartError, PartShapes, PartSpec, saturating_bf16,
};

use crate::largest::{Largest, magnitude};
use crate::sparse_rows::{Places, SparseRows, columns_of};
use crate::{
    Codec, DeltaLinear, DeltaSource, Error, Kind, OptionSpec, Options, Result, for_each_block,
};

/// Part `value`: `[n_kept]`, BF16, the weights that are kept, row after row. Where they
/// stand, by [`Form`]: part `mask`, `[out_features, plane_bytes]`, U8, 1 where one is
/// kept, bits as in the codec `sign`; or parts `count`, `[out_features, 4]`, U8, how many
/// each row keeps, and `index`, `[n_kept, 2]` or, for more than 65536 input features,
/// `[n_kept, 4]`, U8, their input features, ascending in each row; both little-endian.
/// How many are kept and in which form follows from the options and the shape.
pub(super) struct Magnitude;

impl Codec for Magnitude {
    fn name(&self) -> &'static str {
        "magnitude"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "the weights of largest magnitude in bf16, the rest zero"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[OptionSpec {
            name: "keep",
            doc: "share of the weights that is kept, at least one weight",
            kind: Kind::Number { min: 0.0001, max: 1.0, default: 0.125 },
        }]
    }

    fn claimed_bits(&self, options: &Options, _: [usize; 2], _: &PartShapes) -> f64 {
        16.0 * options.number("keep")
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let layout = Layout::new(options, shape);
        let value = PartSpec::new("value", DType::BF16, [layout.n_kept]);
        let places = |name| PartSpec::new(name, DType::U8, layout.places_shape());
        Some(match layout.form {
            Form::Mask => vec![value, places("mask")],
            Form::Index { .. } => {
                let count = PartSpec::new("count", DType::U8, [shape[0], COUNT_BYTES]);
                vec![value, count, places("index")]
            }
        })
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let layout = Layout::new(options, shape);
        let parts = layout.n_kept * size_of::<bf16>() + layout.places_bytes();
        // Counts, and where each row writes.
        parts + Largest::working_bytes(shape) + shape[0] * (size_of::<Row<'_>>() + COUNT_BYTES)
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let layout = Layout::new(options, delta.shape());
        let [n_rows, n_cols] = layout.shape;
        let largest = Largest::of(delta, layout.n_kept)?;
        let counts = largest.counts(delta)?;
        let mut value = vec![bf16::ZERO; layout.n_kept];
        let mut places = vec![0; layout.places_bytes()];
        // Rows keep different numbers, and write to places of their own all the same.
        let (mut values, mut bytes) = (&mut value[..], &mut places[..]);
        let mut rows = Vec::with_capacity(n_rows);
        for count in &counts {
            let (row_values, later) = values.split_at_mut(count.above + count.equal);
            values = later;
            let n_bytes = match layout.form {
                Form::Mask => plane_bytes(n_cols),
                Form::Index { width } => row_values.len() * width,
            };
            let (row_bytes, later) = bytes.split_at_mut(n_bytes);
            bytes = later;
            rows.push(Row { n_equal: count.equal, values: row_values, places: row_bytes });
        }
        for_each_block(delta, (&mut rows, 1), (&mut vec![(); n_rows], 1), |block, rows, _| {
            for (weights, row) in block.data().chunks(n_cols).zip(rows) {
                row.keep(weights, largest.threshold, layout.form);
            }
        })?;
        let value = ("value", vec![layout.n_kept], PartData::BF16(value));
        Ok(match layout.form {
            Form::Mask => {
                let mask = ("mask", layout.places_shape().to_vec(), PartData::U8(places));
                EncodedDelta::new(layout.shape, [value, mask])
            }
            Form::Index { .. } => {
                #[allow(clippy::cast_possible_truncation)]
                let counts = counts.iter().map(|count| (count.above + count.equal) as u32);
                let counts = counts.flat_map(u32::to_le_bytes).collect();
                let count = ("count", vec![n_rows, COUNT_BYTES], PartData::U8(counts));
                let index = ("index", layout.places_shape().to_vec(), PartData::U8(places));
                EncodedDelta::new(layout.shape, [value, count, index])
            }
        })
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let layout = Layout::new(options, delta.shape);
        let Layout { shape: shape @ [n_rows, n_cols], n_kept, form } = layout;
        let mut parts = delta.into_parts();
        let value = parts.take_bf16("value", &[n_kept])?;
        let (starts, places) = match form {
            Form::Mask => {
                let mask = parts.take_u8("mask", &layout.places_shape())?;
                let starts = check_mask(&mask, shape, n_kept)?;
                (starts, Places::Mask(mask))
            }
            Form::Index { width } => {
                let count = parts.take_u8("count", &[n_rows, COUNT_BYTES])?;
                let index = parts.take_u8("index", &layout.places_shape())?;
                let starts = check_counts(&count, n_kept)?;
                let index: Vec<u32> = index.chunks(width).map(little_endian).collect();
                check_index(&index, &starts, n_cols)?;
                // Two bytes are enough where two were.
                #[allow(clippy::cast_possible_truncation)]
                let places = match width {
                    2 => Places::Short(index.into_iter().map(|column| column as u16).collect()),
                    _ => Places::Long(index),
                };
                (starts, places)
            }
        };
        parts.finish()?;
        Ok(Box::new(SparseRows { shape, starts, places, value }))
    }
}

/// Bytes of a row's count.
const COUNT_BYTES: usize = 4;

/// How it is stored where the kept weights stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A bit for each weight.
    Mask,
    /// The input feature of each kept weight, in `width` bytes, and a count for each row.
    Index { width: usize },
}

/// Options and shape, and what follows from them.
struct Layout {
    shape: [usize; 2],
    n_kept: usize,
    form: Form,
}

impl Layout {
    /// Keeps `⌈keep · m · n⌉`, computed in f64 in this order, at least one of those that
    /// there are; the form is the one of fewer bytes, the mask where they are equal.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn new(options: &Options, shape @ [n_rows, n_cols]: [usize; 2]) -> Self {
        let n_weights = n_rows.saturating_mul(n_cols);
        let n_kept = (options.number("keep") * n_rows as f64 * n_cols as f64).ceil() as usize;
        let n_kept = n_kept.max(1).min(n_weights);
        let width = if n_cols <= 1 << 16 { 2 } else { 4 };
        let mask = n_rows.saturating_mul(plane_bytes(n_cols));
        let index = n_kept.saturating_mul(width).saturating_add(n_rows.saturating_mul(COUNT_BYTES));
        let form = if mask <= index { Form::Mask } else { Form::Index { width } };
        Self { shape, n_kept, form }
    }

    /// The shape of the part `mask` or `index`.
    fn places_shape(&self) -> [usize; 2] {
        match self.form {
            Form::Mask => [self.shape[0], plane_bytes(self.shape[1])],
            Form::Index { width } => [self.n_kept, width],
        }
    }

    fn places_bytes(&self) -> usize {
        let [n, width] = self.places_shape();
        n * width
    }
}

/// Where a row's kept weights go.
struct Row<'a> {
    /// Kept of those equal to the threshold.
    n_equal: usize,
    values: &'a mut [bf16],
    places: &'a mut [u8],
}

impl Row<'_> {
    fn keep(&mut self, weights: &[f32], threshold: u32, form: Form) {
        let (mut n, mut left) = (0, self.n_equal);
        for (column, weight) in weights.iter().enumerate() {
            let key = magnitude(*weight);
            if key < threshold || (key == threshold && left == 0) {
                continue;
            }
            left -= usize::from(key == threshold);
            // A file that is changed between two reads has other weights.
            let Some(value) = self.values.get_mut(n) else { return };
            *value = saturating_bf16(*weight);
            match form {
                Form::Mask => self.places[column / 8] |= 1 << (column % 8),
                Form::Index { width } => {
                    let place = &mut self.places[n * width..(n + 1) * width];
                    place.copy_from_slice(&column.to_le_bytes()[..width]);
                }
            }
            n += 1;
        }
    }
}

/// A number of two or four bytes.
fn little_endian(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |n, byte| n << 8 | u32::from(*byte))
}

fn wrong(part: &str, index: usize, expected: String, got: &dyn ToString) -> Error {
    let got = got.to_string();
    PartError::Value { part: part.to_owned(), index, expected, got }.into()
}

/// Where each row's values begin, and the last ones end: `[out_features + 1]`.
fn check_mask(mask: &[u8], [n_rows, n_cols]: [usize; 2], n_kept: usize) -> Result<Vec<usize>> {
    let plane = plane_bytes(n_cols);
    let mut starts = Vec::with_capacity(n_rows + 1);
    let mut n = 0;
    starts.push(0);
    for (row, bits) in mask.chunks(plane.max(1)).enumerate() {
        if let Some(column) = columns_of(bits).find(|column| *column >= n_cols) {
            let expected = format!("no bit past {n_cols} input features");
            return Err(wrong("mask", row * plane + column / 8, expected, &"one"));
        }
        n += bits.iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
        starts.push(n);
    }
    starts.resize(n_rows + 1, n);
    if n == n_kept {
        return Ok(starts);
    }
    Err(wrong("mask", mask.len().saturating_sub(1), format!("{n_kept} bits in all"), &n))
}

/// As [`check_mask`].
fn check_counts(counts: &[u8], n_kept: usize) -> Result<Vec<usize>> {
    let mut starts = vec![0];
    let mut n = 0usize;
    for count in counts.chunks(COUNT_BYTES) {
        n = n.saturating_add(little_endian(count) as usize);
        starts.push(n);
    }
    if n == n_kept {
        return Ok(starts);
    }
    Err(wrong("count", starts.len() - 2, format!("{n_kept} in all"), &n))
}

fn check_index(index: &[u32], starts: &[usize], n_cols: usize) -> Result<()> {
    for row in starts.windows(2) {
        let mut least = 0;
        for (at, column) in (row[0]..row[1]).zip(&index[row[0]..row[1]]) {
            let column = *column as usize;
            if !(least..n_cols).contains(&column) {
                let expected = format!("an input feature from {least} to below {n_cols}");
                return Err(wrong("index", at, expected, &column));
            }
            least = column + 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CodecSpec;
    use onebase_kernels::Backend;
    use onebase_tensor::{MatrixMut, MatrixRef, Part, stream};
    use rand_distr::{Distribution, StandardNormal};
    use std::ops::Range;

    fn spec(keep: f64) -> CodecSpec {
        format!("magnitude:keep={keep}").parse().unwrap()
    }

    fn encode(keep: f64, data: &[f32], [rows, cols]: [usize; 2]) -> EncodedDelta {
        spec(keep).encode(&MatrixRef::new(data, rows, cols).unwrap()).unwrap()
    }

    fn round_trip(keep: f64, data: &[f32], shape @ [rows, cols]: [usize; 2]) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows * cols];
        let prepared = spec(keep).prepare(encode(keep, data, shape)).unwrap();
        prepared.write_rows(0..rows, &mut out);
        out
    }

    /// Numbers that bf16 holds, many of them equal.
    fn coarse(n: usize) -> Vec<f32> {
        let mut rng = stream(6, "w", 0);
        let draw = |_| Distribution::<f32>::sample(&StandardNormal, &mut rng);
        (0..n).map(draw).map(|w: f32| (16.0 * w).round() / 16.0).collect()
    }

    #[test]
    fn exactly_the_largest_are_kept_and_of_equals_the_first() {
        for shape @ [rows, cols] in [[1, 700], [700, 1], [50, 70], [3, 70_000]] {
            let data = coarse(rows * cols);
            let mut order: Vec<usize> = (0..data.len()).collect();
            order.sort_by(|a, b| data[*b].abs().total_cmp(&data[*a].abs()).then(a.cmp(b)));
            for keep in [0.0001, 0.003, 0.05, 0.125, 0.5, 0.9, 1.0] {
                let n_kept = Layout::new(spec(keep).options(), shape).n_kept;
                let mut want = vec![0.0; data.len()];
                order[..n_kept].iter().for_each(|at| want[*at] = data[*at]);
                assert_eq!(round_trip(keep, &data, shape), want, "{shape:?} {keep}");
            }
        }
    }

    /// Magnitudes that differ in their last bit alone, which bf16 does not hold.
    #[test]
    fn the_threshold_is_exact() {
        let data: Vec<f32> = (0..1000u32).map(|i| f32::from_bits(0x3f80_0000 + i)).collect();
        let kept = round_trip(0.1, &data, [10, 100]);
        let places: Vec<usize> = (0..1000).filter(|i| kept[*i] != 0.0).collect();
        assert_eq!(places, (900..1000).collect::<Vec<_>>());
    }

    /// Artifacts depend on these.
    #[test]
    fn numbers_and_forms_that_follow_from_options_and_shape() {
        let of = |keep: f64, shape| {
            let layout = Layout::new(spec(keep).options(), shape);
            (layout.n_kept, layout.form)
        };
        assert_eq!(of(0.125, [4096, 4096]), (2_097_152, Form::Mask));
        assert_eq!(of(0.0625, [4096, 4096]), (1_048_576, Form::Mask));
        assert_eq!(of(0.06, [4096, 4096]), (1_006_633, Form::Index { width: 2 }));
        assert_eq!(of(0.03, [16, 65_536]), (31_458, Form::Index { width: 2 }));
        assert_eq!(of(0.03, [16, 65_537]), (31_458, Form::Index { width: 4 }));
        assert_eq!(of(0.04, [16, 65_537]), (41_944, Form::Mask));
        assert_eq!(of(0.125, [1, 1]), (1, Form::Mask));
        assert_eq!(of(0.125, [1, 256]), (32, Form::Mask));
        assert_eq!([of(0.5, [0, 9]), of(0.5, [9, 0])], [(0, Form::Mask); 2]);
    }

    #[test]
    fn the_smaller_form_is_the_one_written() {
        let data = coarse(64 * 512);
        for keep in [0.0001, 0.01, 0.05, 0.0625, 0.07, 0.5] {
            let delta = encode(keep, &data, [64, 512]);
            let n_kept = delta.parts["value"].shape()[0];
            let places = delta.size_bytes() - 2 * n_kept;
            assert_eq!(places, (64 * 64).min(64 * 4 + 2 * n_kept), "{keep}");
        }
    }

    #[test]
    fn rows_of_any_batch_get_what_they_get_alone() {
        let (shape @ [rows, cols], n) = ([300, 500], 150);
        let prepared = spec(0.3).prepare(encode(0.3, &coarse(rows * cols), shape)).unwrap();
        let x = coarse(n * cols);
        let on = |x: &[f32], n: usize| {
            let mut y = vec![0.5; n * rows];
            let x = MatrixRef::new(x, n, cols).unwrap();
            let mut view = MatrixMut::new(&mut y, n, rows).unwrap();
            prepared.add_to(Backend::active(), x, &mut view);
            y
        };
        let together = on(&x, n);
        for (x, y) in x.chunks(cols).zip(together.chunks(rows)) {
            assert_eq!(on(x, 1), y);
        }
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one.install(|| on(&x, n)), together);
    }

    /// What would be read or written outside the matrix, or out of order, is refused.
    #[test]
    fn places_that_no_encoder_writes_are_refused() {
        let shape = [4, 100];
        let data = coarse(400);
        let refused = |keep: f64, part: &str, at: usize, byte: u8| {
            let mut delta = encode(keep, &data, shape);
            let mut bytes = delta.parts[part].data().to_le_bytes().into_owned();
            bytes[at] ^= byte;
            let part_shape = delta.parts[part].shape().to_vec();
            let altered = Part::new(part_shape, PartData::U8(bytes)).unwrap();
            delta.parts.insert(part.to_owned(), altered);
            match spec(keep).prepare(delta).map(|_| ()) {
                Err(Error::Part(PartError::Value { part: named, .. })) => assert_eq!(named, part),
                other => panic!("{part}, byte {at}: {other:?}"),
            }
        };
        // A bit more, or one past the last feature: rows have 14 bytes.
        refused(0.125, "mask", 0, 1);
        refused(0.125, "mask", 12, 0x10);
        refused(0.125, "mask", 4 * 14 - 1, 0x80);
        // Five are kept, or four.
        refused(0.0125, "count", 0, 0x80);
        refused(0.0125, "count", 15, 0xff);
        refused(0.0125, "index", 1, 0x80);
        let rows = encode(0.01, &[1.0; 400], shape);
        assert_eq!(rows.parts["index"].data().to_le_bytes()[..], [0, 0, 1, 0, 2, 0, 3, 0]);
        let mut twice = rows;
        let index = PartData::U8(vec![0, 0, 1, 0, 1, 0, 3, 0]);
        twice.parts.insert("index".into(), Part::new(vec![4, 2], index).unwrap());
        assert!(spec(0.01).prepare(twice).is_err());
    }

    #[test]
    fn a_delta_that_changes_between_reads_is_refused() {
        struct Restless(std::sync::Mutex<f32>);
        impl DeltaSource for Restless {
            fn shape(&self) -> [usize; 2] {
                [4, 4]
            }
            fn read_rows(&self, _: Range<usize>, out: &mut [f32]) -> Result<()> {
                let mut last = self.0.lock().unwrap();
                *last += 1.0;
                out.fill(*last);
                Ok(())
            }
        }
        let got = spec(0.5).encode(&Restless(0.0.into()));
        assert!(matches!(got, Err(Error::Source(_))), "{got:?}");
    }
}
