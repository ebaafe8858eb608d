//! Codes with rows side by side.

use onebase_tensor::{MatrixMut, MatrixRef};

use crate::tests::{SHAPES, check, eps, fit, random};
use crate::{Backend, Interleaved, LowBit, plane_bytes};

fn product(backend: Backend, delta: &Interleaved, x: &[f32], n_rows: usize) -> Vec<f32> {
    let [out_features, in_features] = delta.shape();
    let mut y = vec![0.5; n_rows * out_features];
    let x = MatrixRef::new(x, n_rows, in_features).unwrap();
    backend.add_interleaved(delta, x, &mut MatrixMut::new(&mut y, n_rows, out_features).unwrap());
    y
}

#[test]
fn interleaved_equals_the_oracle_and_is_the_same_on_every_backend() {
    for (out_features, in_features) in SHAPES {
        for bits in 1..=8usize {
            for group_size in [16, 48, 1024] {
                let (codes, scale, decoded) =
                    fit(Backend::available()[0], out_features, in_features, bits, group_size);
                let delta = LowBit { codes: &codes, scale: &scale, bits, group_size, in_features };
                let delta = Interleaved::new(delta, out_features);
                let mut row = vec![0.0; in_features];
                for out in 0..out_features {
                    delta.write_row(out, &mut row);
                    assert_eq!(row, decoded[out * in_features..(out + 1) * in_features]);
                }
                let slack = eps(in_features);
                check(&decoded, (out_features, in_features), slack, |b, x, y| {
                    b.add_interleaved(&delta, x, y);
                });
                let x = random("x", 5 * in_features);
                let want = product(Backend::available()[0], &delta, &x, 5);
                for backend in Backend::available() {
                    assert_eq!(product(backend, &delta, &x, 5), want, "{}", backend.name());
                }
            }
        }
    }
}

#[test]
fn the_largest_sums_do_not_wrap() {
    let n = 1 << 16;
    let codes = vec![0xff; 8 * plane_bytes(n)];
    let delta = LowBit {
        codes: &codes,
        scale: &[half::bf16::ONE],
        bits: 8,
        group_size: 1 << 20,
        in_features: n,
    };
    let delta = Interleaved::new(delta, 1);
    for backend in Backend::available() {
        for x in [1.0, -1.0f32] {
            #[allow(clippy::cast_precision_loss)]
            let want = f64::from(x) * 255.0 * n as f64;
            let got = product(backend, &delta, &vec![x; n], 1)[0];
            assert!((f64::from(got) / want - 1.0).abs() < 1e-6, "{} {got} {want}", backend.name());
        }
    }
}

#[test]
fn inputs_of_any_size_keep_theirs_and_what_is_no_number_stays_so() {
    let n = 64;
    let (codes, scale, decoded) = fit(Backend::active(), 16, n, 3, 32);
    let delta = LowBit { codes: &codes, scale: &scale, bits: 3, group_size: 32, in_features: n };
    let delta = Interleaved::new(delta, 16);
    for backend in Backend::available() {
        for size in [0.0f32, 1e-36, 1e-20, 1.0, 1e20, 1e36] {
            let x: Vec<f32> = random("x", n).iter().map(|x| x * size).collect();
            let got = product(backend, &delta, &x, 1);
            for (out, got) in got.iter().enumerate() {
                let terms = decoded[out * n..(out + 1) * n].iter().zip(&x);
                let terms = terms.map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (want, magnitude) = terms.fold((0.5, 0.5), |(s, m), t| (s + t, m + t.abs()));
                assert!((f64::from(*got) - want).abs() <= 1e-6 * magnitude, "{size:e}");
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = random("x", n);
            x[40] = bad;
            let got = product(backend, &delta, &x, 1);
            assert!(got.iter().all(|y| y.is_nan()), "{} {bad}", backend.name());
        }
    }
}
