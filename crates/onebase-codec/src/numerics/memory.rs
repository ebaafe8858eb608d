use super::SvdMethod;

/// The most bytes that [`super::truncated_svd`] of a delta `[out_features, in_features]`
/// holds at a time, its result included, beside what reading takes.
pub fn truncated_svd_bytes(shape: [usize; 2], rank: usize, method: SvdMethod) -> usize {
    const F64: usize = size_of::<f64>();
    let [n_rows, n_cols] = shape;
    let (shorter, longer) = (n_rows.min(n_cols), n_rows.max(n_cols));
    // Blocks on their way and the pieces that tasks widen.
    const BLOCKS: usize = 48 << 20;
    let k = rank + super::OVERSAMPLE;
    if matches!(method, SvdMethod::Randomized { .. }) && k < shorter {
        // The range on both sides, the next one of the longer side in f64 and f32, and
        // the Gram matrices and eigenvectors of a small problem.
        return 3 * F64 * k * (shorter + longer) + 12 * F64 * k * k + BLOCKS;
    }
    // The Gram matrix of the shorter side, its eigenvectors and what finding them takes;
    // a wide matrix in both widths; vectors on both sides.
    let wide = if n_rows < n_cols { 2 * F64 * n_rows * n_cols } else { 0 };
    6 * F64 * shorter * shorter + wide + 2 * F64 * rank * (n_rows + n_cols) + BLOCKS
}
