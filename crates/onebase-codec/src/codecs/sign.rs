//! One bit per weight: `Δ ≈ α · sign(Δ)` with `α = mean |Δ|`, which is the
//! least-squares scale (J. Liu et al., "BitDelta: Your Fine-Tune May Only Be
//! Worth One Bit", NeurIPS 2024). Its scale distillation is a fit after encoding, for
//! which the scales can be changed in the parts.
//!
//! `scale=matrix` is the paper's: one α for the whole matrix; `scale=row` has one
//! for each output feature, and `scale=parts` two, of which the second is that of the last
//! eighth of its inputs: those that a base quantized by ResQ has in more bits, in front of
//! which errors of the base outweigh what a fine-tune has changed. As in the paper's text the sign of zero is −1; the
//! authors' program maps it to +1.

use std::ops::Range;

use onebase_kernels::Backend;
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartShapes, PartSpec};

use crate::signs::{SignScale, Signs};
use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Rescale, Result};

/// Part `sign`: `[out_features, plane_bytes]`, U8, 1 where the delta is positive;
/// bit `k mod 8` of byte `k / 8` belongs to input feature `k`, rows are padded to
/// whole 16 features. Part `scale`: `[out_features]` BF16 per row, `[out_features, 2]` per
/// part of a row, `[1]` F32 per matrix.
pub(super) struct Sign;

impl Codec for Sign {
    fn name(&self) -> &'static str {
        "sign"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "one bit per weight, one scale per row or, as BitDelta, per matrix"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[OptionSpec {
            name: "scale",
            doc: "what shares a scale",
            kind: Kind::Choice(SignScale::WORDS),
        }]
    }

    fn claimed_bits(&self, _: &Options, _: [usize; 2], _: &PartShapes) -> f64 {
        1.0
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        Some(Signs::parts(shape, scale(options)).to_vec())
    }

    fn working_bytes(&self, _: &Options, shape: [usize; 2]) -> usize {
        Signs::working_bytes(shape)
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let signs = Signs::fit(delta, scale(options))?;
        let [(scale_shape, scale), (sign_shape, sign)] = signs.into_data();
        let parts = [("scale", scale_shape, scale), ("sign", sign_shape, sign)];
        Ok(EncodedDelta::new(delta.shape(), parts))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape = delta.shape;
        let mut parts = delta.into_parts();
        let signs = Signs::take(shape, scale(options), &mut parts)?;
        parts.finish()?;
        Ok(Box::new(SignDelta { shape, signs }))
    }
}

impl Rescale for Sign {
    fn linear_parts(&self) -> &'static [&'static str] {
        &["scale"]
    }
}

fn scale(options: &Options) -> SignScale {
    SignScale::of(options.choice("scale"))
}

struct SignDelta {
    shape: [usize; 2],
    signs: Signs,
}

impl DeltaLinear for SignDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        self.signs.add_to(backend, x, y);
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.signs.visit(rows, out, |out, weight| *out = weight);
    }

    fn resident_bytes(&self) -> usize {
        self.signs.resident_bytes()
    }
}
