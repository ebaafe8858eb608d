//! DARE: L. Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous
//! Models as a Free Lunch", arXiv 2311.03099.
//!
//! Every weight of the delta is dropped with the same probability, alone, and those that stay are
//! divided by the probability to stay. The method stores a dense checkpoint and counts the kept
//! values; here the mask is drawn from a key, so that the values are what is stored. The paper
//! drops weights of every tensor; which tensors a codec is given is decided elsewhere.

use half::bf16;
use onebase_tensor::{
    DType, EncodedDelta, PartData, PartError, PartShapes, PartSpec, saturating_bf16,
};
use rayon::prelude::*;

use crate::codec::DeltaLinear;
use crate::masks::{Draws, GENERATOR, key_of};
use crate::source::read_finite;
use crate::sparse_rows::{Places, SparseRows};
use crate::{Codec, DeltaSource, Error, Kind, OptionSpec, Options, Result};

/// Part `layout`, `[9]`, U8: the number of the generator, and the key of the mask in eight bytes,
/// little-endian. Part `value`, `[n_kept]`, BF16: the kept weights over `keep`, row after row. A
/// weight is kept where its number, one of 32 bits, is below `⌈keep · 2³²⌉`.
pub(super) struct Dare;

impl Codec for Dare {
    fn name(&self) -> &'static str {
        "dare"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "weights dropped at random, the others over the share that is kept, in bf16"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[
            OptionSpec {
                name: "keep",
                doc: "probability that a weight is kept",
                kind: Kind::Number { min: 0.0001, max: 1.0, default: 0.0625 },
            },
            OptionSpec {
                name: "rescale",
                doc: "whether kept weights are divided by it",
                kind: Kind::Choice(&["yes", "no"]),
            },
            OptionSpec {
                name: "seed",
                doc: "of the mask",
                kind: Kind::Int { min: 0, max: 65535, multiple_of: 1, default: 0 },
            },
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn claimed_bits(&self, _: &Options, shape: [usize; 2], parts: &PartShapes) -> f64 {
        let n_kept = parts.get("value").and_then(|shape| shape.first().copied()).unwrap_or(0);
        16.0 * n_kept as f64 / (shape[0] as f64 * shape[1] as f64)
    }

    /// How many are kept is up to chance.
    fn parts(&self, _: &Options, _: [usize; 2]) -> Option<Vec<PartSpec>> {
        None
    }

    fn most_parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        Some(vec![
            PartSpec::new("layout", DType::U8, [LAYOUT_BYTES]),
            PartSpec::new("value", DType::BF16, [most_kept(options, shape)]),
        ])
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        most_kept(options, shape) * size_of::<bf16>()
            + shape[0] * (size_of::<usize>() + size_of::<&mut [bf16]>())
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, _] = delta.shape();
        let keep = options.number("keep");
        let factor = if options.choice("rescale") == "yes" { 1.0 / keep } else { 1.0 };
        let first = read_finite(delta, 0..n_rows.min(1))?;
        let allowed = least_kept(shape)..=most_kept(options, shape);
        // A count beyond what was said before is less likely than one in 10⁹, or else the matrix
        // is tiny; another mask has another.
        let drawn = (options.int("seed") as u64..).find_map(|seed| {
            let mask = Mask::new(key_of(seed, &first), keep, shape);
            let counts = mask.counts();
            allowed.contains(&counts.iter().sum()).then_some((mask, counts))
        });
        let Some((mask, counts)) = drawn else { unreachable!("seeds do not end") };
        let mut value = vec![bf16::ZERO; counts.iter().sum()];
        let mut left = &mut value[..];
        let mut rows = Vec::with_capacity(n_rows);
        for count in counts {
            let (row, later) = left.split_at_mut(count);
            left = later;
            rows.push(row);
        }
        rows.into_par_iter().enumerate().try_for_each(|(row, values)| {
            let weights = read_finite(delta, row..row + 1)?;
            for (value, column) in values.iter_mut().zip(mask.columns(row)) {
                #[allow(clippy::cast_possible_truncation)]
                let scaled = (f64::from(weights[column as usize]) * factor)
                    .clamp(f64::from(-f32::MAX), f64::from(f32::MAX))
                    as f32;
                *value = saturating_bf16(scaled);
            }
            Ok::<(), Error>(())
        })?;
        let mut layout = vec![GENERATOR];
        layout.extend(mask.key.to_le_bytes());
        let parts = [
            ("layout", vec![LAYOUT_BYTES], PartData::U8(layout)),
            ("value", vec![value.len()], PartData::BF16(value)),
        ];
        Ok(EncodedDelta::new(shape, parts))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape @ [n_rows, n_cols] = delta.shape;
        let mut parts = delta.into_parts();
        let layout = parts.take_u8("layout", &[LAYOUT_BYTES])?;
        if layout[0] != GENERATOR {
            let expected = format!("the mask generator {GENERATOR}, the only one that is known");
            let (part, got) = ("layout".to_owned(), layout[0].to_string());
            return Err(PartError::Value { part, index: 0, expected, got }.into());
        }
        let key = layout[1..].iter().rev().fold(0, |key, byte| key << 8 | u64::from(*byte));
        let mask = Mask::new(key, options.number("keep"), shape);
        let columns: Vec<Vec<u32>> =
            (0..n_rows).into_par_iter().map(|row| mask.columns(row).collect()).collect();
        let mut starts = vec![0];
        let mut n_kept = 0;
        for row in &columns {
            n_kept += row.len();
            starts.push(n_kept);
        }
        let value = parts.take_bf16("value", &[n_kept])?;
        parts.finish()?;
        let columns = columns.into_iter().flatten();
        #[allow(clippy::cast_possible_truncation)]
        let places = if n_cols <= 1 << 16 {
            Places::Short(columns.map(|column| column as u16).collect())
        } else {
            Places::Long(columns.collect())
        };
        Ok(Box::new(SparseRows { shape, starts, places, value }))
    }
}

const LAYOUT_BYTES: usize = 9;

/// Masks of fewer are drawn again: a delta without a weight is none.
fn least_kept(shape: [usize; 2]) -> usize {
    usize::from(!shape.contains(&0))
}

/// More than this are not kept: six standard deviations above the mean.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn most_kept(options: &Options, [n_rows, n_cols]: [usize; 2]) -> usize {
    let (n, keep) = (n_rows as f64 * n_cols as f64, options.number("keep"));
    let most = keep * n + 6.0 * (keep * (1.0 - keep) * n).sqrt();
    (most.ceil() as usize).clamp(1, (n_rows * n_cols).max(1)).min(n_rows * n_cols)
}

/// A mask of a matrix, drawn weight by weight.
struct Mask {
    key: u64,
    /// `⌈keep · 2³²⌉`.
    below: u64,
    shape: [usize; 2],
}

impl Mask {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn new(key: u64, keep: f64, shape: [usize; 2]) -> Self {
        Self { key, below: (keep * 2.0f64.powi(32)).ceil() as u64, shape }
    }

    /// The input features that a row keeps, ascending.
    #[allow(clippy::cast_possible_truncation)]
    fn columns(&self, row: usize) -> impl Iterator<Item = u32> {
        let mut draws = Draws::new(self.key, [0, row as u32, 0]);
        let below = self.below;
        (0..self.shape[1] as u32).filter(move |_| u64::from(draws.next()) < below)
    }

    fn counts(&self) -> Vec<usize> {
        (0..self.shape[0]).into_par_iter().map(|row| self.columns(row).count()).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::CodecSpec;
    use onebase_tensor::MatrixRef;

    #[test]
    fn kept_weights_are_a_share_and_unbiased() {
        let (rows, cols, keep) = (300, 700, 0.1);
        let data = vec![0.5; rows * cols];
        let spec: CodecSpec = format!("dare:keep={keep}").parse().unwrap();
        let delta = spec.encode(&MatrixRef::new(&data, rows, cols).unwrap()).unwrap();
        let mut out = vec![0.0; rows * cols];
        spec.prepare(delta).unwrap().write_rows(0..rows, &mut out);
        let kept = out.iter().filter(|w| **w != 0.0).count() as f64;
        assert!(out.iter().all(|w| *w == 0.0 || *w == 5.0));
        let (n, p) = ((rows * cols) as f64, keep);
        assert!((kept - n * p).abs() < 4.0 * (n * p * (1.0 - p)).sqrt(), "{kept}");
    }

    #[test]
    fn an_unknown_generator_is_refused() {
        let spec: CodecSpec = "dare".parse().unwrap();
        let mut delta = spec.encode(&MatrixRef::new(&[1.0; 400], 4, 100).unwrap()).unwrap();
        let mut bytes = delta.parts["layout"].data().to_le_bytes().into_owned();
        bytes[0] = 2;
        let data = onebase_tensor::PartData::U8(bytes);
        let part = onebase_tensor::Part::new(vec![9], data).unwrap();
        delta.parts.insert("layout".into(), part);
        let error = spec.prepare(delta).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("generator"), "{error}");
    }
}
