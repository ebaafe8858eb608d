//! The delta as it is, in f32 or rounded to bf16: the reference that every other
//! codec is compared with.
//!
//! In f32 the decoded weight is off by at most the rounding of the difference,
//! `2⁻²⁴ |Δ|`. A 16-bit fine-tune is restored to the bit, but for the rare weight
//! that is many thousand times smaller than the base's.

use std::ops::Range;

use half::bf16;
use onebase_kernels::Backend;
use onebase_tensor::{
    DType, EncodedDelta, MatrixMut, MatrixRef, PartData, PartShapes, PartSpec, WeightRef,
    saturating_bf16,
};

use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Result, for_each_block};

/// Part `delta`: `[out_features, in_features]`.
pub(super) struct Dense;

impl Codec for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "the delta itself, in f32 (the reference) or bf16"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[OptionSpec {
            name: "dtype",
            doc: "element type of the stored delta",
            kind: Kind::Choice(&["f32", "bf16"]),
        }]
    }

    fn claimed_bits(&self, options: &Options, _: [usize; 2], _: &PartShapes) -> f64 {
        if options.choice("dtype") == "bf16" { 16.0 } else { 32.0 }
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let dtype = if options.choice("dtype") == "bf16" { DType::BF16 } else { DType::F32 };
        Some(vec![PartSpec::new("delta", dtype, shape)])
    }

    fn working_bytes(&self, options: &Options, [n_rows, n_cols]: [usize; 2]) -> usize {
        let element = if options.choice("dtype") == "bf16" { 2 } else { 4 };
        element * n_rows * n_cols
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let mut rows = vec![(); n_rows];
        let data = if options.choice("dtype") == "bf16" {
            let mut data = vec![bf16::ZERO; n_rows * n_cols];
            for_each_block(delta, (&mut data, n_cols), (&mut rows, 1), |block, out, _| {
                for (o, w) in out.iter_mut().zip(block.data()) {
                    *o = saturating_bf16(*w);
                }
            })?;
            PartData::BF16(data)
        } else {
            let mut data = vec![0.0; n_rows * n_cols];
            for_each_block(delta, (&mut data, n_cols), (&mut rows, 1), |block, out, _| {
                out.copy_from_slice(block.data());
            })?;
            PartData::F32(data)
        };
        Ok(EncodedDelta::new(shape, [("delta", shape.to_vec(), data)]))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape = delta.shape;
        let mut parts = delta.into_parts();
        let data = if options.choice("dtype") == "bf16" {
            Data::BF16(parts.take_bf16("delta", &shape)?)
        } else {
            Data::F32(parts.take_f32("delta", &shape)?)
        };
        parts.finish()?;
        Ok(Box::new(DenseDelta { shape, data }))
    }
}

enum Data {
    F32(Vec<f32>),
    BF16(Vec<bf16>),
}

struct DenseDelta {
    shape: [usize; 2],
    data: Data,
}

impl DenseDelta {
    fn weight(&self) -> WeightRef<'_> {
        match &self.data {
            Data::F32(v) => WeightRef::F32(v),
            Data::BF16(v) => WeightRef::BF16(v),
        }
    }
}

impl DeltaLinear for DenseDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        backend.add_dense(self.weight(), x, y);
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let n_cols = self.shape[1];
        self.weight().slice(rows.start * n_cols..rows.end * n_cols).widen(out);
    }

    fn resident_bytes(&self) -> usize {
        self.weight().len() * self.weight().dtype().size_bytes()
    }
}
