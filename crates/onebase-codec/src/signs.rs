use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, LANES, Sign, plane_bytes};
use onebase_tensor::{DType, MatrixMut, MatrixRef, PartData, PartSpec, Parts, saturating_bf16};

use crate::{DeltaSource, Result, for_each_block};

/// What shares a scale of signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SignScale {
    /// A row.
    Row,
    /// The matrix.
    Matrix,
    /// The first inputs of a row, and the others, from [`border`] on.
    Parts,
}

impl SignScale {
    /// The words for an option, the usual one first.
    pub(crate) const WORDS: &[&str] = &["row", "matrix", "parts"];

    /// What a word of an option stands for.
    pub(crate) fn of(word: &str) -> Self {
        match word {
            "matrix" => Self::Matrix,
            "parts" => Self::Parts,
            _ => Self::Row,
        }
    }

    /// The scale's part for a matrix of so many rows.
    pub(crate) fn part(self, n_rows: usize) -> PartSpec {
        match self {
            Self::Matrix => PartSpec::new("scale", DType::F32, [1]),
            Self::Row => PartSpec::new("scale", DType::BF16, [n_rows]),
            Self::Parts => PartSpec::new("scale", DType::BF16, [n_rows, 2]),
        }
    }

    /// Scales of a row.
    fn count(self) -> usize {
        if self == Self::Parts { 2 } else { 1 }
    }
}

/// The first input of the last eighth, where a quantized base has its inputs of most variance
/// (ResQ, section 4.1); a multiple of the lanes.
fn border(in_features: usize) -> usize {
    (in_features - in_features / 8) / LANES * LANES
}

/// Signs of a matrix `[out_features, in_features]` and the scales that belong to
/// them: the weight is plus or minus its scale. The sign of zero is −1.
pub(crate) struct Signs {
    shape: [usize; 2],
    /// `[out_features, plane_bytes]`, 1 where the weight is positive.
    bits: Vec<u8>,
    /// `[out_features, scales of a row]`.
    scale: Vec<f32>,
    kind: SignScale,
    /// With two scales a row, to serve: the bits and scales of each part.
    parts: Option<[(Vec<u8>, Vec<f32>); 2]>,
}

impl Signs {
    /// The signs and least-squares scales of a delta: `mean |Δ|` of what shares one, of a
    /// matrix in f32, else in bf16.
    pub(crate) fn fit(delta: &dyn DeltaSource, kind: SignScale) -> Result<Self> {
        Ok(Self::fit_rows(delta, kind, |_| 0.0)?.0)
    }

    /// [`Signs::fit`], and the squared error that is left.
    pub(crate) fn fit_measured(delta: &dyn DeltaSource, kind: SignScale) -> Result<(Self, f64)> {
        Self::fit_rows(delta, kind, |row| row.iter().map(|w| f64::from(*w).powi(2)).sum())
    }

    fn fit_rows(
        delta: &dyn DeltaSource,
        kind: SignScale,
        sum_of_squares: impl Fn(&[f32]) -> f64 + Sync,
    ) -> Result<(Self, f64)> {
        let shape @ [n_rows, n_cols] = delta.shape();
        let plane = plane_bytes(n_cols);
        let backend = Backend::active();
        let n_scales = kind.count();
        let cut = if kind == SignScale::Parts { border(n_cols) } else { n_cols };
        let widths = [cut, n_cols - cut];
        let mut bits = vec![0; n_rows * plane];
        // Of what shares a scale: the sum of magnitudes and that of squares.
        let mut sums = vec![[0.0; 2]; n_rows * n_scales];
        for_each_block(delta, (&mut bits, plane), (&mut sums, n_scales), |block, bits, sums| {
            let rows = block.data().chunks(n_cols).zip(bits.chunks_mut(plane));
            for ((row, bits), sums) in rows.zip(sums.chunks_mut(n_scales)) {
                let (low, high) = row.split_at(cut);
                let (low_bits, high_bits) = bits.split_at_mut(plane_bytes(cut));
                sums[0] = [backend.pack_signs(low, low_bits), sum_of_squares(low)];
                if let Some(sums) = sums.get_mut(1) {
                    *sums = [backend.pack_signs(high, high_bits), sum_of_squares(high)];
                }
            }
        })?;
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        let mean = |sum: f64, n: usize| if n == 0 { 0.0 } else { (sum / n as f64) as f32 };
        let width = |index: usize| widths[index % n_scales];
        let scale: Vec<f32> = if kind == SignScale::Matrix {
            let sum = sums.iter().map(|s| s[0]).sum();
            vec![mean(sum, n_rows * n_cols); n_rows]
        } else {
            let means = sums.iter().enumerate().map(|(i, s)| mean(s[0], width(i)));
            means.map(|mean| saturating_bf16(mean).to_f32()).collect()
        };
        #[allow(clippy::cast_precision_loss)]
        let lost = sums.iter().zip(&scale).enumerate().map(|(i, ([magnitude, square], scale))| {
            let scale = f64::from(*scale);
            square - 2.0 * scale * magnitude + width(i) as f64 * scale * scale
        });
        let lost = lost.sum();
        Ok((Self { shape, bits, scale, kind, parts: None }, lost))
    }

    /// What [`Signs::into_data`] gives for a matrix of this shape.
    pub(crate) fn parts([n_rows, n_cols]: [usize; 2], kind: SignScale) -> [PartSpec; 2] {
        [kind.part(n_rows), PartSpec::new("sign", DType::U8, [n_rows, plane_bytes(n_cols)])]
    }

    /// Bytes that fitting signs holds: bits, two sums and a scale for each part of a row, and
    /// the scales that are stored.
    pub(crate) fn working_bytes([n_rows, n_cols]: [usize; 2]) -> usize {
        n_rows * (plane_bytes(n_cols) + 2 * (2 * size_of::<f64>() + 2 * size_of::<f32>()))
    }

    /// Takes signs and scales that a codec has written under the names of [`Signs::parts`].
    ///
    /// # Errors
    /// When one is missing or of another shape or type.
    pub(crate) fn take(shape: [usize; 2], kind: SignScale, parts: &mut Parts) -> Result<Self> {
        let [n_rows, n_cols] = shape;
        let bits = parts.take_u8("sign", &[n_rows, plane_bytes(n_cols)])?;
        if kind == SignScale::Matrix {
            let scale = vec![parts.take_f32("scale", &[1])?[0]; n_rows];
            return Ok(Self { shape, bits, scale, kind, parts: None });
        }
        let stored = parts.take_bf16("scale", &kind.part(n_rows).shape)?;
        let scale: Vec<f32> = stored.iter().map(|s| s.to_f32()).collect();
        let split = (kind == SignScale::Parts).then(|| {
            let (plane, cut) = (plane_bytes(n_cols), plane_bytes(border(n_cols)));
            [0..cut, cut..plane].map(|range| {
                let rows = bits.chunks(plane.max(1));
                rows.flat_map(|row| row[range.clone()].to_vec()).collect::<Vec<u8>>()
            })
        });
        let parts = split.map(|[low, high]| {
            let of = |part: usize| scale.iter().skip(part).step_by(2).copied().collect();
            [(low, of(0)), (high, of(1))]
        });
        Ok(Self { shape, bits, scale, kind, parts })
    }

    /// The scales, `[out_features]` or `[out_features, 2]` in bf16 or `[1]` in f32, and the bits,
    /// `[out_features, plane_bytes]`, with their shapes.
    pub(crate) fn into_data(self) -> [(Vec<usize>, PartData); 2] {
        let [n_rows, n_cols] = self.shape;
        let data = if self.kind == SignScale::Matrix {
            PartData::F32(vec![self.scale.first().copied().unwrap_or(0.0)])
        } else {
            PartData::BF16(self.scale.into_iter().map(bf16::from_f32).collect())
        };
        let scale = (self.kind.part(n_rows).shape, data);
        [scale, (vec![n_rows, plane_bytes(n_cols)], PartData::U8(self.bits))]
    }

    /// The scales of a row, and the first column of the second.
    fn scales(&self, row: usize) -> ([f32; 2], usize) {
        match self.kind {
            SignScale::Parts => {
                ([self.scale[2 * row], self.scale[2 * row + 1]], border(self.shape[1]))
            }
            SignScale::Row | SignScale::Matrix => ([self.scale[row]; 2], self.shape[1]),
        }
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
            let (scales, cut) = self.scales(row);
            for (k, weight) in weights.iter_mut().enumerate() {
                let positive = bits[k / 8] >> (k % 8) & 1 == 1;
                let scale = scales[usize::from(k >= cut)];
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
            let (scales, cut) = self.scales(row);
            let bits = &self.bits[row * plane..(row + 1) * plane];
            let (low_bits, high_bits) = bits.split_at(plane_bytes(cut));
            let (low, high) = weights.split_at_mut(cut);
            backend.take_signs(low_bits, scales[0], low);
            backend.take_signs(high_bits, scales[1], high);
        }
    }

    /// `y += x Δᵀ`, as [`crate::DeltaLinear::add_to`].
    pub(crate) fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let Some(parts) = &self.parts else {
            let signs = Sign { bits: &self.bits, scale: &self.scale, in_features: self.shape[1] };
            backend.add_sign(signs, x, y);
            return;
        };
        let (n_rows, n_cols, cut) = (x.n_rows(), x.n_cols(), border(x.n_cols()));
        for ((bits, scale), columns) in parts.iter().zip([0..cut, cut..n_cols]) {
            let in_features = columns.len();
            let rows = (0..n_rows).flat_map(|row| x.row(row)[columns.clone()].to_vec());
            let rows: Vec<f32> = rows.collect();
            if let Ok(x) = MatrixRef::new(&rows, n_rows, in_features) {
                backend.add_sign(Sign { bits, scale, in_features }, x, y);
            }
        }
    }

    /// Bytes of memory it holds.
    pub(crate) fn resident_bytes(&self) -> usize {
        let copies = if self.parts.is_some() { 2 } else { 1 };
        copies * (self.bits.len() + size_of_val(self.scale.as_slice()))
    }
}

/// `a + b`, kept finite.
pub(crate) fn finite_sum(a: f32, b: f32) -> f32 {
    (a + b).clamp(-f32::MAX, f32::MAX)
}
