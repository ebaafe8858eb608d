/// Effective bits per weight: `8 x bytes on disk / weights covered`.
///
/// Bytes are all the bytes a file system would count: scales, indices, headers
/// and metadata included. No weights cost no bits.
#[allow(clippy::cast_precision_loss)]
pub fn effective_bits(size_bytes: u64, n_weights: u64) -> f64 {
    if n_weights == 0 { 0.0 } else { 8.0 * size_bytes as f64 / n_weights as f64 }
}
