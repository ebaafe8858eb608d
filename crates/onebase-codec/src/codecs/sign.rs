//! One bit per weight: `Δ ≈ α · sign(Δ)` with `α = mean |Δ|`, which is the
//! least-squares scale (J. Liu et al., "BitDelta: Your Fine-Tune May Only Be
//! Worth One Bit", NeurIPS 2024, without its scale distillation).
//!
//! `scale=matrix` is the paper's: one α for the whole matrix; `scale=row` has one
//! for each output feature. As in the paper's text the sign of zero is −1; the
//! authors' program maps it to +1.

use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, Sign as SignMatrix, plane_bytes};
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartData, saturating_bf16};

use crate::{Codec, DeltaLinear, DeltaSource, Kind, OptionSpec, Options, Result, for_each_block};

/// Part `sign`: `[out_features, plane_bytes]`, U8, 1 where the delta is positive;
/// bit `k mod 8` of byte `k / 8` belongs to input feature `k`, rows are padded to
/// whole 16 features. Part `scale`: `[out_features]` BF16 per row, `[1]` F32 per
/// matrix.
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
            kind: Kind::Choice(&["row", "matrix"]),
        }]
    }

    fn claimed_bits(&self, _: &Options, _: [usize; 2]) -> f64 {
        1.0
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let plane = plane_bytes(n_cols);
        let backend = Backend::active();
        let mut bits = vec![0; n_rows * plane];
        let mut sums = vec![0.0; n_rows];
        for_each_block(delta, (&mut bits, plane), (&mut sums, 1), |block, bits, sums| {
            let rows = block.data().chunks(n_cols).zip(bits.chunks_mut(plane));
            for ((row, bits), sum) in rows.zip(sums) {
                *sum = backend.pack_signs(row, bits);
            }
        })?;
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        let mean = |sum: f64, n: usize| if n == 0 { 0.0 } else { (sum / n as f64) as f32 };
        let (scale_shape, scale) = if per_row(options) {
            let means = sums.iter().map(|sum| saturating_bf16(mean(*sum, n_cols)));
            (vec![n_rows], PartData::BF16(means.collect()))
        } else {
            (vec![1], PartData::F32(vec![mean(sums.iter().sum(), n_rows * n_cols)]))
        };
        Ok(EncodedDelta::new(
            shape,
            [("scale", scale_shape, scale), ("sign", vec![n_rows, plane], PartData::U8(bits))],
        ))
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        let shape @ [n_rows, n_cols] = delta.shape;
        let mut parts = delta.into_parts();
        let bits = parts.take_u8("sign", &[n_rows, plane_bytes(n_cols)])?;
        let scale = if per_row(options) {
            parts.take_bf16("scale", &[n_rows])?.into_iter().map(bf16::to_f32).collect()
        } else {
            vec![parts.take_f32("scale", &[1])?[0]; n_rows]
        };
        parts.finish()?;
        Ok(Box::new(SignDelta { shape, bits, scale }))
    }
}

fn per_row(options: &Options) -> bool {
    options.choice("scale") == "row"
}

struct SignDelta {
    shape: [usize; 2],
    bits: Vec<u8>,
    /// `[out_features]`.
    scale: Vec<f32>,
}

impl DeltaLinear for SignDelta {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let delta =
            SignMatrix { bits: &self.bits, scale: &self.scale, in_features: self.shape[1] };
        backend.add_sign(delta, x, y);
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let n_cols = self.shape[1];
        let plane = plane_bytes(n_cols);
        if n_cols == 0 {
            return;
        }
        for (row, out) in rows.zip(out.chunks_mut(n_cols)) {
            let bits = &self.bits[row * plane..(row + 1) * plane];
            let scale = self.scale[row];
            for (k, out) in out.iter_mut().enumerate() {
                *out = if bits[k / 8] >> (k % 8) & 1 == 1 { scale } else { -scale };
            }
        }
    }

    fn resident_bytes(&self) -> usize {
        self.bits.len() + self.scale.len() * size_of::<f32>()
    }
}
