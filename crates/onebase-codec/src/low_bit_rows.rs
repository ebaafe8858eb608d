use half::bf16;
use onebase_kernels::{Backend, plane_bytes};

/// Rows of weights in bit planes with a scale for each group: the parts of the codec `rtn`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowBitRows {
    pub(crate) bits: usize,
    pub(crate) group_size: usize,
    /// Input features.
    pub(crate) n_cols: usize,
}

impl LowBitRows {
    /// Scales of a row.
    pub(crate) fn n_groups(&self) -> usize {
        self.n_cols.div_ceil(self.group_size)
    }

    /// Bytes of a row's codes.
    pub(crate) fn row_bytes(&self) -> usize {
        self.bits * plane_bytes(self.n_cols)
    }

    /// Codes a row, `[in_features]`, see [`Backend::fit_low_bit`].
    pub(crate) fn fit(&self, row: &[f32], codes: &mut [u8], scale: &mut [bf16]) {
        Backend::active().fit_low_bit(row, self.bits, self.group_size, codes, scale);
    }

    /// Decodes a row into `out`, `[in_features]`.
    pub(crate) fn write(&self, codes: &[u8], scale: &[bf16], out: &mut [f32]) {
        let plane = plane_bytes(self.n_cols);
        for (k, out) in out.iter_mut().enumerate() {
            let planes = codes.chunks(plane).enumerate();
            let code: i16 = planes.map(|(p, c)| i16::from(c[k / 8] >> (k % 8) & 1) << p).sum();
            let level = f32::from(2 * code - ((1 << self.bits) - 1));
            *out = scale[k / self.group_size].to_f32() * level;
        }
    }
}
