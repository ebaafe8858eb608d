//! Row operations that cost little beside the products: plain code, the same
//! bits on every backend.

use crate::vector::LANES;

/// `out = x / sqrt(mean(x²) + eps) · weight`, all of one length
/// (B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019).
///
/// Panics when the lengths differ.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "lengths of a norm");
    let mut lanes = [0.0f32; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in chunks.by_ref() {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v * v;
        }
    }
    for (lane, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += v * v;
    }
    #[allow(clippy::cast_precision_loss)]
    let mean = lanes.iter().sum::<f32>() / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for ((out, v), w) in out.iter_mut().zip(x).zip(weight) {
        *out = v * factor * w;
    }
}

/// `gate = silu(gate) · up`, where `silu(x) = x / (1 + e^−x)`.
///
/// Panics when the lengths differ.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "lengths of a gated product");
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + (-*g).exp()) * u;
    }
}

/// `x += by`.
///
/// Panics when the lengths differ.
pub fn add_assign(x: &mut [f32], by: &[f32]) {
    assert_eq!(x.len(), by.len(), "lengths of a sum");
    for (x, b) in x.iter_mut().zip(by) {
        *x += b;
    }
}
