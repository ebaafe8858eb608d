use onebase_kernels::thin::chunk_len;

use super::SvdMethod;

/// The most bytes that [`super::truncated_svd`] of a delta `[out_features, in_features]`
/// holds at a time, its result included, beside what reading takes.
pub fn truncated_svd_bytes(shape: [usize; 2], rank: usize, method: SvdMethod) -> usize {
    const F32: usize = size_of::<f32>();
    const F64: usize = size_of::<f64>();
    let [n_rows, n_cols] = shape;
    let (shorter, longer) = (n_rows.min(n_cols), n_rows.max(n_cols));
    // Blocks on their path and the pieces that tasks widen.
    const BLOCKS: usize = 16 << 20;
    let k = rank + super::OVERSAMPLE;
    if matches!(method, SvdMethod::Randomized { .. }) && k < shorter {
        // Vectors on both sides, those that replace them, and the result; Gram matrices,
        // eigenvectors and what finding them takes.
        let block = super::randomized::BLOCK_GROUPS * chunk_len(n_cols);
        return F32 * (4 * k * (shorter + longer) + block) + 28 * F64 * k * k + BLOCKS;
    }
    // The Gram matrix of the shorter side, its eigenvectors and what finding them takes;
    // a wide matrix in both widths; vectors on both sides.
    let wide = if n_rows < n_cols { 2 * F64 * n_rows * n_cols } else { 0 };
    6 * F64 * shorter * shorter + wide + 2 * F64 * rank * (n_rows + n_cols) + BLOCKS
}
