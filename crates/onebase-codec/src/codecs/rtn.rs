//! Round to nearest, group by group: the baseline at matched bytes.
//!
//! Each group of consecutive input features has one scale; the weight is
//! `scale · (2 code − (2^bits − 1))`, a symmetric grid without a zero point, since
//! deltas are centred on zero. Scales are fitted by least squares, not taken
//! from the extremes.

use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, Interleaved, LowBit, plane_bytes};
use onebase_tensor::{DType, EncodedDelta, MatrixMut, MatrixRef, PartData, PartShapes, PartSpec};

use crate::low_bit_rows::LowBitRows;
use crate::{
    Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Rescale, Result, for_each_block,
};

/// Part `codes`: `[out_features, bits, plane_bytes]`, U8, the bit planes of each
/// row, lowest bit first; bit `k mod 8` of byte `k / 8` belongs to input feature
/// `k`, rows are padded to whole 16 features. Part `scale`:
/// `[out_features, n_groups]`, BF16.
pub(super) struct Rtn;

impl Codec for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "group-wise round to nearest, 1 to 8 bits, least-squares scales"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[
            OptionSpec {
                name: "bits",
                doc: "bits per code",
                kind: Kind::Int { min: 1, max: 8, multiple_of: 1, default: 4 },
            },
            OptionSpec {
                name: "group_size",
                doc: "consecutive input features that share a scale",
                kind: Kind::Int { min: 16, max: 65536, multiple_of: 16, default: 128 },
            },
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn claimed_bits(&self, options: &Options, _: [usize; 2], _: &PartShapes) -> f64 {
        options.int("bits") as f64
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let (layout, n_rows) = (layout(options, shape), shape[0]);
        Some(vec![
            PartSpec::new("codes", DType::U8, codes_shape(&layout, n_rows)),
            PartSpec::new("scale", DType::BF16, [n_rows, layout.n_groups()]),
        ])
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let layout = layout(options, shape);
        shape[0] * (layout.row_bytes() + layout.n_groups() * size_of::<bf16>())
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let layout = layout(options, shape);
        let mut codes = vec![0; n_rows * layout.row_bytes()];
        let mut scale = vec![bf16::ZERO; n_rows * layout.n_groups()];
        for_each_block(
            delta,
            (&mut codes, layout.row_bytes()),
            (&mut scale, layout.n_groups()),
            |block, codes, scale| {
                let codes = codes.chunks_mut(layout.row_bytes());
                let scale = scale.chunks_mut(layout.n_groups());
                for ((row, codes), scale) in block.data().chunks(n_cols).zip(codes).zip(scale) {
                    layout.fit(row, codes, scale);
                }
            },
        )?;
        Ok(EncodedDelta::new(
            shape,
            [
                ("codes", codes_shape(&layout, n_rows).to_vec(), PartData::U8(codes)),
                ("scale", [n_rows, layout.n_groups()].to_vec(), PartData::BF16(scale)),
            ],
        ))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape @ [n_rows, _] = delta.shape;
        let layout = layout(options, shape);
        let mut parts = delta.into_parts();
        let codes = parts.take_u8("codes", &codes_shape(&layout, n_rows))?;
        let scale = parts.take_bf16("scale", &[n_rows, layout.n_groups()])?;
        parts.finish()?;
        let delta = LowBit {
            codes: &codes,
            scale: &scale,
            bits: layout.bits,
            group_size: layout.group_size,
            in_features: layout.n_cols,
        };
        Ok(Box::new(RtnDelta(Interleaved::new(delta, n_rows))))
    }
}

impl Rescale for Rtn {
    fn linear_parts(&self) -> &'static [&'static str] {
        &["scale"]
    }
}

fn layout(options: &Options, shape: [usize; 2]) -> LowBitRows {
    let (bits, group_size) = (options.int("bits"), options.int("group_size"));
    LowBitRows { bits, group_size, n_cols: shape[1] }
}

fn codes_shape(layout: &LowBitRows, n_rows: usize) -> [usize; 3] {
    [n_rows, layout.bits, plane_bytes(layout.n_cols)]
}

struct RtnDelta(Interleaved);

impl DeltaLinear for RtnDelta {
    fn shape(&self) -> [usize; 2] {
        self.0.shape()
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        backend.add_interleaved(&self.0, x, y);
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_mut(self.0.shape()[1].max(1))) {
            self.0.write_row(row, out);
        }
    }

    fn resident_bytes(&self) -> usize {
        self.0.resident_bytes()
    }
}
