//! The oracle: every product in f64, in the plainest order, with the sum of
//! magnitudes that its rounding error is measured against.

use onebase_tensor::{MatrixRef, WeightRef};

/// `y = x Wᵀ` of f32 weights `[out_features, in_features]`, with `Σ |w x|` for
/// each element; both are `[n_rows, out_features]`.
pub fn product(weight: MatrixRef<'_>, x: MatrixRef<'_>) -> (Vec<f64>, Vec<f64>) {
    let mut sums = Vec::with_capacity(x.n_rows() * weight.n_rows());
    let mut magnitudes = Vec::with_capacity(sums.capacity());
    for row in 0..x.n_rows() {
        for out in 0..weight.n_rows() {
            let terms = weight.row(out).iter().zip(x.row(row));
            let terms = terms.map(|(w, x)| f64::from(*w) * f64::from(*x));
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
            sums.push(sum);
            magnitudes.push(magnitude);
        }
    }
    (sums, magnitudes)
}

/// A stored weight as f32.
pub fn widen(weight: WeightRef<'_>) -> Vec<f32> {
    let mut wide = vec![0.0; weight.len()];
    weight.widen(&mut wide);
    wide
}

/// The first element of `got` further from `want` than `eps · magnitude`, as
/// `(index, got, want)`.
///
/// With lanes summed one after the other over `n` terms, `eps` of
/// `(n / 16 + 8) · 2⁻²³` bounds the rounding of every kernel here.
pub fn first_outside(
    got: &[f32],
    want: &[f64],
    magnitude: &[f64],
    eps: f64,
) -> Option<(usize, f32, f64)> {
    assert!(got.len() == want.len() && got.len() == magnitude.len(), "lengths to compare");
    got.iter()
        .zip(want)
        .zip(magnitude)
        .enumerate()
        .find(|(_, ((g, w), m))| {
            let error = (f64::from(**g) - **w).abs();
            error.is_nan() || error > eps * **m
        })
        .map(|(i, ((g, w), _))| (i, *g, *w))
}
