use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, Sign, plane_bytes};
use onebase_tensor::{DType, MatrixMut, MatrixRef, PartData, PartSpec, saturating_bf16};

use crate::{DeltaSource, Result, for_each_block};

/// Signs of a matrix `[out_features, in_features]` and the scales that belong to
/// them: the weight is plus or minus its row's scale. The sign of zero is −1.
pub(crate) struct Signs {
    shape: [usize; 2],
    /// `[out_features, plane_bytes]`, 1 where the weight is positive.
    bits: Vec<u8>,
    /// `[out_features]`.
    scale: Vec<f32>,
    /// One for the matrix.
    shared: bool,
}

impl Signs {
    /// The signs and least-squares scales of a delta: `mean |Δ|` of each row in bf16
    /// or, `shared`, of the whole in f32.
    pub(crate) fn fit(delta: &dyn DeltaSource, shared: bool) -> Result<Self> {
        Ok(Self::fit_rows(delta, shared, |_| 0.0)?.0)
    }

    /// [`Signs::fit`], and the squared error that is left.
    pub(crate) fn fit_measured(delta: &dyn DeltaSource, shared: bool) -> Result<(Self, f64)> {
        Self::fit_rows(delta, shared, |row| row.iter().map(|w| f64::from(*w).powi(2)).sum())
    }

    fn fit_rows(
        delta: &dyn DeltaSource,
        shared: bool,
        sum_of_squares: impl Fn(&[f32]) -> f64 + Sync,
    ) -> Result<(Self, f64)> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let plane = plane_bytes(n_cols);
        let backend = Backend::active();
        let mut bits = vec![0; n_rows * plane];
        // Of each row: the sum of magnitudes and that of squares.
        let mut sums = vec![[0.0; 2]; n_rows];
        for_each_block(delta, (&mut bits, plane), (&mut sums, 1), |block, bits, sums| {
            let rows = block.data().chunks(n_cols).zip(bits.chunks_mut(plane));
            for ((row, bits), [magnitude, square]) in rows.zip(sums) {
                *magnitude = backend.pack_signs(row, bits);
                *square = sum_of_squares(row);
            }
        })?;
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        let mean = |sum: f64, n: usize| if n == 0 { 0.0 } else { (sum / n as f64) as f32 };
        let scale: Vec<f32> = if shared {
            let sum = sums.iter().map(|s| s[0]).sum();
            vec![mean(sum, n_rows * n_cols); n_rows]
        } else {
            sums.iter().map(|s| saturating_bf16(mean(s[0], n_cols)).to_f32()).collect()
        };
        #[allow(clippy::cast_precision_loss)]
        let lost = sums.iter().zip(&scale).map(|([magnitude, square], scale)| {
            let scale = f64::from(*scale);
            square - 2.0 * scale * magnitude + n_cols as f64 * scale * scale
        });
        let lost = lost.sum();
        Ok((Self { shape, bits, scale, shared }, lost))
    }

    /// What [`Signs::into_data`] gives for a matrix of this shape.
    pub(crate) fn parts([n_rows, n_cols]: [usize; 2], shared: bool) -> [PartSpec; 2] {
        let scale = if shared {
            PartSpec::new("scale", DType::F32, [1])
        } else {
            PartSpec::new("scale", DType::BF16, [n_rows])
        };
        [scale, PartSpec::new("sign", DType::U8, [n_rows, plane_bytes(n_cols)])]
    }

    /// Bytes that fitting signs holds: bits, two sums and a scale for each row, and the
    /// scales that are stored.
    pub(crate) fn working_bytes([n_rows, n_cols]: [usize; 2]) -> usize {
        n_rows * (plane_bytes(n_cols) + 2 * size_of::<f64>() + 2 * size_of::<f32>())
    }

    /// Signs with a scale for each row.
    pub(crate) fn with_row_scales(shape: [usize; 2], bits: Vec<u8>, scale: &[bf16]) -> Self {
        let scale = scale.iter().map(|s| s.to_f32()).collect();
        Self { shape, bits, scale, shared: false }
    }

    /// Signs with one scale.
    pub(crate) fn with_shared_scale(shape: [usize; 2], bits: Vec<u8>, scale: f32) -> Self {
        Self { shape, bits, scale: vec![scale; shape[0]], shared: true }
    }

    /// The scales, `[out_features]` in bf16 or `[1]` in f32, and the bits,
    /// `[out_features, plane_bytes]`, with their shapes.
    pub(crate) fn into_data(self) -> [(Vec<usize>, PartData); 2] {
        let [n_rows, n_cols] = self.shape;
        let scale = if self.shared {
            (vec![1], PartData::F32(vec![self.scale.first().copied().unwrap_or(0.0)]))
        } else {
            let scale = self.scale.into_iter().map(bf16::from_f32).collect();
            (vec![n_rows], PartData::BF16(scale))
        };
        [scale, (vec![n_rows, plane_bytes(n_cols)], PartData::U8(self.bits))]
    }

    /// Calls `each` for every weight of rows in `weights`, `[rows.len(), in_features]`,
    /// with what is stored for it.
    pub(crate) fn visit(
        &self,
        rows: Range<usize>,
        weights: &mut [f32],
        each: impl Fn(&mut f32, f32),
    ) {
        let n_cols = self.shape[1];
        let plane = plane_bytes(n_cols);
        if n_cols == 0 {
            return;
        }
        for (row, weights) in rows.zip(weights.chunks_mut(n_cols)) {
            let bits = &self.bits[row * plane..(row + 1) * plane];
            let scale = self.scale[row];
            for (k, weight) in weights.iter_mut().enumerate() {
                let positive = bits[k / 8] >> (k % 8) & 1 == 1;
                each(weight, if positive { scale } else { -scale });
            }
        }
    }

    /// Takes what is stored off weights of rows, `[rows.len(), in_features]`.
    pub(crate) fn take_off(&self, rows: Range<usize>, weights: &mut [f32]) {
        let n_cols = self.shape[1];
        let plane = plane_bytes(n_cols);
        let backend = Backend::active();
        for (row, weights) in rows.zip(weights.chunks_mut(n_cols.max(1))) {
            let bits = &self.bits[row * plane..(row + 1) * plane];
            backend.take_signs(bits, self.scale[row], weights);
        }
    }

    /// `y += x Δᵀ`, as [`crate::DeltaLinear::add_to`].
    pub(crate) fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let signs = Sign { bits: &self.bits, scale: &self.scale, in_features: self.shape[1] };
        backend.add_sign(signs, x, y);
    }

    /// Bytes of memory it holds.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.bits.len() + self.scale.len() * size_of::<f32>()
    }
}

/// `a + b`, kept finite.
pub(crate) fn finite_sum(a: f32, b: f32) -> f32 {
    (a + b).clamp(-f32::MAX, f32::MAX)
}
