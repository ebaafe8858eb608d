use half::{bf16, f16};
use onebase_tensor::{MatrixMut, MatrixRef, WeightRef, stream};
use rand::RngExt;

use crate::{Affine, Backend, Gathered, LowBit, Sign, naive, plane_bytes};

/// Shapes around every tile and tail: (out_features, in_features).
pub(crate) const SHAPES: [(usize, usize); 11] = [
    (1, 1),
    (1, 40),
    (7, 15),
    (8, 16),
    (9, 17),
    (5, 0),
    (0, 5),
    (33, 100),
    (64, 256),
    (130, 777),
    (600, 1024),
];

const BATCHES: [usize; 5] = [1, 3, 4, 9, 70];

pub(crate) fn random(label: &str, n: usize) -> Vec<f32> {
    let mut rng = stream(7, label, 0);
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

pub(crate) fn eps(in_features: usize) -> f64 {
    #[allow(clippy::cast_precision_loss)]
    let terms = in_features as f64 / 16.0 + 10.0;
    terms * f64::from(f32::EPSILON)
}

/// Checks a product against the oracle, its rows one by one against the batch,
/// and the vector backends against each other.
pub(crate) fn check(
    weight: &[f32],
    shape: (usize, usize),
    extra_eps: f64,
    product: impl Fn(Backend, MatrixRef<'_>, &mut MatrixMut<'_>),
) {
    check_terms(weight, weight, shape, extra_eps, product);
}

/// [`check`] of a kernel that adds up terms as large as those of the weights `terms`,
/// which cancel to those of `weight`.
fn check_terms(
    weight: &[f32],
    terms: &[f32],
    (out_features, in_features): (usize, usize),
    extra_eps: f64,
    product: impl Fn(Backend, MatrixRef<'_>, &mut MatrixMut<'_>),
) {
    for n_rows in BATCHES {
        let x = random("x", n_rows * in_features);
        let x = MatrixRef::new(&x, n_rows, in_features).unwrap();
        let w = MatrixRef::new(weight, out_features, in_features).unwrap();
        let (want, _) = naive::product(w, x);
        let terms = MatrixRef::new(terms, out_features, in_features).unwrap();
        let (_, mut magnitude) = naive::product(terms, x);
        // The kernels add to what is there.
        let want: Vec<f64> = want.iter().map(|v| v + 1.0).collect();
        magnitude.iter_mut().for_each(|m| *m += 1.0);
        let mut vector_result: Option<Vec<f32>> = None;
        for backend in Backend::available() {
            let what = format!("{} {out_features}x{in_features} batch {n_rows}", backend.name());
            let mut y = vec![1.0; n_rows * out_features];
            product(backend, x, &mut MatrixMut::new(&mut y, n_rows, out_features).unwrap());
            let outside = naive::first_outside(&y, &want, &magnitude, eps(in_features) + extra_eps);
            assert_eq!(outside, None, "{what}");
            for row in 0..n_rows {
                let mut alone = vec![1.0; out_features];
                let mut alone_view = MatrixMut::new(&mut alone, 1, out_features).unwrap();
                product(backend, x.rows(row..row + 1), &mut alone_view);
                let together = &y[row * out_features..(row + 1) * out_features];
                assert_eq!(alone, together, "{what}: row {row} alone");
            }
            if backend.name() != "portable" {
                let first = vector_result.get_or_insert_with(|| y.clone());
                assert_eq!(*first, y, "{what}: vector backends agree");
            }
        }
    }
}

#[test]
fn dense_equals_the_oracle_for_every_type() {
    for shape in SHAPES {
        let w = random("w", shape.0 * shape.1);
        check(&w, shape, 0.0, |b, x, y| b.add_dense(WeightRef::F32(&w), x, y));
        let half: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        let weight = WeightRef::BF16(&half);
        check(&naive::widen(weight), shape, 0.0, |b, x, y| b.add_dense(weight, x, y));
        let half: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
        let weight = WeightRef::F16(&half);
        check(&naive::widen(weight), shape, 0.0, |b, x, y| b.add_dense(weight, x, y));
    }
}

#[test]
fn sign_equals_the_oracle() {
    for (out_features, in_features) in SHAPES {
        let w = random("w", out_features * in_features);
        let scale: Vec<f32> = random("scale", out_features);
        let plane = plane_bytes(in_features);
        let mut bits = vec![0u8; out_features * plane];
        let mut decoded = vec![0.0; w.len()];
        for out in 0..out_features {
            for k in 0..in_features {
                let positive = w[out * in_features + k] > 0.0;
                bits[out * plane + k / 8] |= u8::from(positive) << (k % 8);
                decoded[out * in_features + k] = if positive { scale[out] } else { -scale[out] };
            }
        }
        let delta = Sign { bits: &bits, scale: &scale, in_features };
        // `2 B x − Σ x` adds up to three magnitudes where the oracle adds one.
        let slack = 2.0 * eps(in_features);
        check(&decoded, (out_features, in_features), slack, |b, x, y| b.add_sign(delta, x, y));
    }
}

#[test]
fn packed_signs_and_magnitudes_are_exact_on_every_backend() {
    for n in [0, 1, 15, 16, 17, 300] {
        let mut row = random("w", n);
        row.iter_mut().step_by(5).for_each(|w| *w = 0.0);
        let want_sum: f64 = row.iter().map(|w| f64::from(w.abs())).sum();
        let mut want = vec![0u8; plane_bytes(n)];
        for (k, w) in row.iter().enumerate() {
            want[k / 8] |= u8::from(*w > 0.0) << (k % 8);
        }
        let mut first = None;
        for backend in Backend::available() {
            let mut bits = vec![0xff; plane_bytes(n)];
            let sum = backend.pack_signs(&row, &mut bits);
            assert_eq!(bits, want, "{} {n}", backend.name());
            assert!((sum - want_sum).abs() <= 1e-12 * want_sum, "{} {n}", backend.name());
            assert_eq!(*first.get_or_insert(sum), sum, "{} {n}", backend.name());
        }
    }
}

#[test]
fn signs_are_taken_off_exactly_on_every_backend() {
    for n in [0, 1, 15, 16, 17, 300] {
        let mut row = random("w", n);
        row.iter_mut().step_by(7).for_each(|w| *w = f32::MAX.copysign(*w));
        let others = random("other", n);
        let mut bits = vec![0u8; plane_bytes(n)];
        for (k, w) in others.iter().enumerate() {
            bits[k / 8] |= u8::from(*w > 0.0) << (k % 8);
        }
        for scale in [0.0, 0.7, f32::MAX] {
            let pairs = row.iter().zip(&others);
            let want: Vec<f32> = pairs
                .map(|(w, other)| if *other > 0.0 { w - scale } else { w + scale })
                .map(|w| w.clamp(f32::MIN, f32::MAX))
                .collect();
            for backend in Backend::available() {
                let mut got = row.clone();
                backend.take_signs(&bits, scale, &mut got);
                assert_eq!(got, want, "{} {n} {scale}", backend.name());
            }
        }
    }
}

#[test]
fn low_bit_equals_the_oracle_for_every_width() {
    for (out_features, in_features) in SHAPES {
        for bits in 1..=8usize {
            for group_size in [16, 64, 1024] {
                let (codes, scale, decoded) =
                    fit(Backend::available()[0], out_features, in_features, bits, group_size);
                let delta = LowBit { codes: &codes, scale: &scale, bits, group_size, in_features };
                let slack = eps(in_features);
                check(&decoded, (out_features, in_features), slack, |b, x, y| {
                    b.add_low_bit(delta, x, y);
                });
            }
        }
    }
}

#[test]
fn affine_equals_the_oracle_for_every_width() {
    for (out_features, in_features) in SHAPES {
        for bits in 1..=8usize {
            for group_size in [16, 64, 1024] {
                let mut rng = stream(7, "affine", 0);
                let plane = plane_bytes(in_features);
                let n_groups = in_features.div_ceil(group_size);
                let mut codes = vec![0u8; out_features * bits * plane];
                let scale: Vec<f16> = random("scale", out_features * n_groups)
                    .into_iter()
                    .map(f16::from_f32)
                    .collect();
                let mut zero = vec![0u8; scale.len()];
                rng.fill(&mut zero[..]);
                // Inside the grid as codecs have them, and anywhere.
                zero.iter_mut().step_by(2).for_each(|z| *z >>= 8 - bits);
                let (mut decoded, mut terms) = (Vec::new(), Vec::new());
                for out in 0..out_features {
                    for k in 0..in_features {
                        let code = rng.random::<u8>() >> (8 - bits);
                        for p in 0..bits {
                            codes[(out * bits + p) * plane + k / 8] |= (code >> p & 1) << (k % 8);
                        }
                        let group = out * n_groups + k / group_size;
                        let (scale, zero) = (scale[group].to_f32(), f32::from(zero[group]));
                        let (code, half) =
                            (f32::from(code), f32::from(u8::MAX >> (8 - bits)) / 2.0);
                        decoded.push(scale * (code - zero));
                        terms.push(scale * ((code - half).abs() + (half - zero).abs()));
                    }
                }
                let (codes, scale, zero) = (&codes[..], &scale[..], &zero[..]);
                let delta = Affine { codes, scale, zero, bits, group_size, in_features };
                let (shape, slack) = ((out_features, in_features), eps(in_features));
                check_terms(&decoded, &terms, shape, slack, |b, x, y| b.add_affine(delta, x, y));
            }
        }
    }
}

#[test]
fn gathered_equals_the_oracle_and_is_the_same_on_every_backend() {
    for (out_features, in_features) in SHAPES {
        for (block_rows, kept, of) in [(1, 1, 3), (16, 1, 1), (64, 1, 2), (50, 1, 9), (256, 1, 4)] {
            let bits = 1 + (out_features + block_rows) % 4;
            let n_kept = (in_features * kept).div_ceil(of);
            let n_blocks = out_features.div_ceil(block_rows);
            let mut rng = stream(7, "gathered", 0);
            let mut columns: Vec<u32> = Vec::new();
            for _ in 0..n_blocks {
                // A run of neighbours with a stride, anywhere.
                let first = rng.random_range(0..=(in_features - n_kept.min(in_features)));
                columns.extend((0..n_kept).map(|i| (first + i) as u32));
            }
            let codes: Vec<u8> =
                (0..out_features * n_kept).map(|_| rng.random::<u8>() >> (8 - bits)).collect();
            let shape = [out_features, in_features];
            let each = codes.iter().copied();
            let delta = Gathered::new(shape, block_rows, bits, columns.clone(), each);
            let factor = random("factor", out_features);
            for offset in [0.0, -3.0] {
                let mut decoded = vec![0.0; out_features * in_features];
                let mut terms = decoded.clone();
                for out in 0..out_features {
                    let mut index = 0;
                    delta.visit(out, |column, code| {
                        assert_eq!(column, columns[out / block_rows * n_kept + index] as usize);
                        assert_eq!(code, codes[out * n_kept + index]);
                        index += 1;
                        let level = 2.0 * f32::from(code) - f32::from(u8::MAX >> (8 - bits));
                        let at = out * in_features + column;
                        decoded[at] = factor[out] * (level + offset);
                        terms[at] = factor[out] * (level.abs() + offset.abs());
                    });
                    assert_eq!(index, n_kept);
                }
                let product = |b: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>| {
                    b.add_gathered(&delta, &factor, offset, x, y);
                };
                // Terms of a code are added for each of its bits.
                let slack = eps(in_features);
                check_terms(&decoded, &terms, (out_features, in_features), slack, product);
                let x = random("x", 3 * in_features);
                let x = MatrixRef::new(&x, 3, in_features).unwrap();
                let on = |backend| {
                    let mut y = vec![0.5; 3 * out_features];
                    product(backend, x, &mut MatrixMut::new(&mut y, 3, out_features).unwrap());
                    y
                };
                let [first, rest @ ..] = &Backend::available()[..] else { unreachable!() };
                rest.iter().for_each(|backend| assert_eq!(on(*backend), on(*first)));
            }
        }
    }
}

/// Columns that need more than two bytes.
#[test]
fn gathered_reads_wide_rows() {
    let n = (1 << 16) + 5;
    let columns: Vec<u32> = (0..40).map(|i| n - 1 - 1600 * i).rev().collect();
    let codes = (0..20 * 40u32).map(|i| (i * 7 % 4) as u8);
    let delta = Gathered::new([20, n as usize], 20, 2, columns, codes);
    let x: Vec<f32> = (0..n).map(|i| (i % 13) as f32).collect();
    for backend in Backend::available() {
        let mut y = vec![0.0; 20];
        let x = MatrixRef::new(&x, 1, n as usize).unwrap();
        backend.add_gathered(
            &delta,
            &[1.0; 20],
            3.0,
            x,
            &mut MatrixMut::new(&mut y, 1, 20).unwrap(),
        );
        for (row, y) in y.iter().enumerate() {
            let mut want = 0.0;
            delta.visit(row, |column, code| want += 2.0 * f32::from(code) * (column % 13) as f32);
            assert_eq!(*y, want);
        }
    }
}

pub(crate) fn fit(
    backend: Backend,
    out_features: usize,
    in_features: usize,
    bits: usize,
    group_size: usize,
) -> (Vec<u8>, Vec<bf16>, Vec<f32>) {
    let w = random("w", out_features * in_features);
    let plane = plane_bytes(in_features);
    let n_groups = in_features.div_ceil(group_size);
    let mut codes = vec![0; out_features * bits * plane];
    let mut scale = vec![bf16::ZERO; out_features * n_groups];
    let mut decoded = Vec::new();
    for out in 0..out_features {
        let codes = &mut codes[out * bits * plane..(out + 1) * bits * plane];
        let scale = &mut scale[out * n_groups..(out + 1) * n_groups];
        let row = &w[out * in_features..(out + 1) * in_features];
        backend.fit_low_bit(row, bits, group_size, codes, scale);
        for k in 0..in_features {
            let code: i32 =
                (0..bits).map(|p| i32::from(codes[p * plane + k / 8] >> (k % 8) & 1) << p).sum();
            #[allow(clippy::cast_precision_loss)]
            decoded.push(scale[k / group_size].to_f32() * (2 * code - (1 << bits) + 1) as f32);
        }
    }
    (codes, scale, decoded)
}

#[test]
fn fitted_codes_have_the_same_bytes_on_every_backend() {
    for bits in 1..=8 {
        let [first, rest @ ..] = &Backend::available()[..] else { unreachable!() };
        let want = fit(*first, 9, 300, bits, 64);
        for backend in rest {
            assert_eq!(fit(*backend, 9, 300, bits, 64), want, "{bits} bits");
        }
    }
}

/// Squared error of Gaussian weights relative to their power, per width.
#[test]
fn fitted_scales_reach_the_known_error_of_a_gaussian() {
    use rand_distr::{Distribution, StandardNormal};
    let n = 1 << 16;
    let mut rng = stream(1, "gaussian", 0);
    let w: Vec<f32> = (0..n).map(|_| StandardNormal.sample(&mut rng)).collect();
    let power: f64 = w.iter().map(|v| f64::from(*v).powi(2)).sum();
    // Uniform mid-rise optimum of Max 1960, table II: 2, 4, 8, 16 and 32 levels.
    for (bits, known) in [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154), (5, 0.00349)] {
        let plane = plane_bytes(n);
        let mut codes = vec![0; bits * plane];
        let mut scale = vec![bf16::ZERO; 1];
        let backend = Backend::active();
        backend.fit_low_bit(&w, bits, n, &mut codes, &mut scale);
        let s = scale[0].to_f64();
        let error: f64 = (0..n)
            .map(|k| {
                let code: i32 = (0..bits)
                    .map(|p| i32::from(codes[p * plane + k / 8] >> (k % 8) & 1) << p)
                    .sum();
                (f64::from(w[k]) - s * f64::from(2 * code - (1 << bits) + 1)).powi(2)
            })
            .sum();
        let relative = error / power;
        assert!((relative / known - 1.0).abs() < 0.03, "{bits} bits: {relative} vs {known}");
    }
}

#[test]
fn extreme_weights_are_coded_finitely() {
    for w in [f32::MAX, f32::MIN_POSITIVE, 1e-45, 0.0] {
        let row = [w, -w, w, w];
        let mut codes = [0; 4];
        let mut scale = [bf16::ZERO];
        for backend in Backend::available() {
            backend.fit_low_bit(&row, 2, 16, &mut codes, &mut scale);
            assert!(scale[0].is_finite(), "{w:e}");
        }
    }
}

#[test]
fn huge_weights_keep_their_size() {
    for bits in 1..=8 {
        for w in [3e20f32, 1e30, f32::MAX] {
            let row = [w, -w, w, w];
            let mut codes = [0; 16];
            let mut scale = [bf16::ZERO];
            let backend = Backend::active();
            backend.fit_low_bit(&row, bits, 16, &mut codes[..2 * bits], &mut scale);
            #[allow(clippy::cast_precision_loss)]
            let outermost = scale[0].to_f32() * ((1 << bits) - 1) as f32;
            assert!(outermost.is_finite() && outermost > 0.9 * w, "{bits} bits: {w:e}");
        }
    }
}
