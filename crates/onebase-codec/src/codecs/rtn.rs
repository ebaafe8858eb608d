//! Round to nearest, group by group: the baseline at matched bytes.
//!
//! Each group of consecutive input features has one scale; the weight is
//! `scale · (2 code − (2^bits − 1))`, a symmetric grid without a zero point, since
//! deltas are centred on zero. Scales are fitted by least squares, not taken
//! from the extremes.

use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, LowBit, plane_bytes};
use onebase_tensor::{DType, EncodedDelta, MatrixMut, MatrixRef, PartData, PartShapes, PartSpec};

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
        let layout = Layout::new(options, shape);
        Some(vec![
            PartSpec::new("codes", DType::U8, layout.codes_shape()),
            PartSpec::new("scale", DType::BF16, layout.scale_shape()),
        ])
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let layout = Layout::new(options, shape);
        shape[0] * (layout.row_bytes() + layout.n_groups() * size_of::<bf16>())
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let layout = Layout::new(options, delta.shape());
        let backend = Backend::active();
        let [n_rows, n_cols] = layout.shape;
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
                    backend.fit_low_bit(row, layout.bits, layout.group_size, codes, scale);
                }
            },
        )?;
        Ok(EncodedDelta::new(
            layout.shape,
            [
                ("codes", layout.codes_shape().to_vec(), PartData::U8(codes)),
                ("scale", layout.scale_shape().to_vec(), PartData::BF16(scale)),
            ],
        ))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let layout = Layout::new(options, delta.shape);
        let mut parts = delta.into_parts();
        let codes = parts.take_u8("codes", &layout.codes_shape())?;
        let scale = parts.take_bf16("scale", &layout.scale_shape())?;
        parts.finish()?;
        Ok(Box::new(RtnDelta { layout, codes, scale }))
    }
}

impl Rescale for Rtn {
    fn linear_parts(&self) -> &'static [&'static str] {
        &["scale"]
    }
}

/// Options and shape, and what follows from them.
struct Layout {
    shape: [usize; 2],
    bits: usize,
    group_size: usize,
}

impl Layout {
    fn new(options: &Options, shape: [usize; 2]) -> Self {
        Self { shape, bits: options.int("bits"), group_size: options.int("group_size") }
    }

    fn n_groups(&self) -> usize {
        self.shape[1].div_ceil(self.group_size)
    }

    fn row_bytes(&self) -> usize {
        self.bits * plane_bytes(self.shape[1])
    }

    fn codes_shape(&self) -> [usize; 3] {
        [self.shape[0], self.bits, plane_bytes(self.shape[1])]
    }

    fn scale_shape(&self) -> [usize; 2] {
        [self.shape[0], self.n_groups()]
    }
}

struct RtnDelta {
    layout: Layout,
    codes: Vec<u8>,
    scale: Vec<bf16>,
}

impl DeltaLinear for RtnDelta {
    fn shape(&self) -> [usize; 2] {
        self.layout.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let delta = LowBit {
            codes: &self.codes,
            scale: &self.scale,
            bits: self.layout.bits,
            group_size: self.layout.group_size,
            in_features: self.layout.shape[1],
        };
        backend.add_low_bit(delta, x, y);
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let Layout { shape: [_, n_cols], bits, group_size } = self.layout;
        let (plane, n_groups) = (plane_bytes(n_cols), self.layout.n_groups());
        if n_cols == 0 {
            return;
        }
        for (row, out) in rows.zip(out.chunks_mut(n_cols)) {
            let codes = &self.codes[row * bits * plane..(row + 1) * bits * plane];
            let scale = &self.scale[row * n_groups..(row + 1) * n_groups];
            for (k, out) in out.iter_mut().enumerate() {
                let planes = codes.chunks(plane).enumerate();
                let code: i16 = planes.map(|(p, c)| i16::from(c[k / 8] >> (k % 8) & 1) << p).sum();
                *out = scale[k / group_size].to_f32() * f32::from(2 * code - ((1 << bits) - 1));
            }
        }
    }

    fn resident_bytes(&self) -> usize {
        self.codes.len() + self.scale.len() * size_of::<bf16>()
    }
}
