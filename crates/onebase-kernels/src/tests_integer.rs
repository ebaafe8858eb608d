//! Codes and their products.

use half::f16;
use onebase_tensor::{MatrixMut, MatrixRef, stream};
use rand::RngExt;

use crate::{Backend, Mixed, Parts, QuantizedRows, low_bytes, mixed_sums, naive, pack_low};

/// Parts around every tile and tail: (out_features, n_low, n_high).
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 0, 1),
    (1, 1, 0),
    (3, 2, 3),
    (5, 0, 0),
    (0, 5, 5),
    (7, 15, 63),
    (9, 127, 17),
    (15, 128, 64),
    (16, 129, 65),
    (18, 201, 0),
    (33, 0, 130),
    (40, 784, 112),
    (21, 1024, 300),
    (20, 4500, 4200),
];

const BATCHES: [usize; 6] = [1, 2, 3, 7, 9, 70];

fn random(label: &str, n: usize) -> Vec<f32> {
    let mut rng = stream(7, label, 0);
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// The owner of what [`Mixed`] borrows, and its codes in the order of the inputs.
struct Owned {
    low: Vec<u8>,
    high: Vec<u8>,
    scales: [Vec<f16>; 2],
    sums: Vec<[i32; 2]>,
    parts: Parts,
    /// Codes less their zero, `[out_features, n_low + n_high]`.
    codes: Vec<i32>,
}

impl Owned {
    fn random(out_features: usize, n_low: usize, n_high: usize) -> Self {
        let mut rng = stream(7, "codes", 0);
        let mut low = vec![0; out_features * low_bytes(n_low)];
        let (mut high, mut codes) = (Vec::new(), Vec::new());
        for out in 0..out_features {
            let nibbles: Vec<u8> = (0..n_low).map(|_| rng.random::<u8>() >> 4).collect();
            let bytes: Vec<u8> = (0..n_high).map(|_| rng.random()).collect();
            pack_low(&nibbles, &mut low[out * low_bytes(n_low)..(out + 1) * low_bytes(n_low)]);
            codes.extend(nibbles.iter().map(|u| i32::from(*u) - 8));
            codes.extend(bytes.iter().map(|c| i32::from(c.cast_signed())));
            high.extend(bytes);
        }
        let scales = [("low", n_low), ("high", n_high)].map(|(label, n)| {
            let scales = random(label, if n > 0 { out_features } else { 0 });
            scales.into_iter().map(f16::from_f32).collect()
        });
        let sums = mixed_sums(&low, &high, n_low, n_high, out_features);
        Self { low, high, scales, sums, parts: Parts { n_low, n_high }, codes }
    }

    fn mixed(&self) -> Mixed<'_> {
        Mixed {
            low: &self.low,
            high: &self.high,
            low_scale: &self.scales[0],
            high_scale: &self.scales[1],
            sums: &self.sums,
            n_low: self.parts.n_low,
            n_high: self.parts.n_high,
        }
    }

    fn decoded(&self) -> Vec<f32> {
        let n = self.parts.n_inputs();
        let mut out = vec![f32::NAN; self.codes.len()];
        if n > 0 {
            let rows = out.chunks_mut(n).enumerate();
            rows.for_each(|(row, out)| self.mixed().write_row(row, out));
        }
        out
    }
}

#[test]
fn written_rows_are_scaled_codes_in_the_order_of_the_inputs() {
    for (out_features, n_low, n_high) in SHAPES {
        let owned = Owned::random(out_features, n_low, n_high);
        let n = n_low + n_high;
        for (at, got) in owned.decoded().iter().enumerate() {
            let scale = owned.scales[usize::from(at % n >= n_low)][at / n].to_f32();
            assert_eq!(*got, scale * owned.codes[at] as f32, "{at} of {n_low} + {n_high}");
        }
        for (row, sums) in owned.sums.iter().enumerate() {
            let (low, high) = owned.codes[row * n..(row + 1) * n].split_at(n_low);
            let low: i32 = low.iter().map(|code| code + 8).sum();
            assert_eq!(*sums, [low, high.iter().sum()]);
        }
    }
}

/// The definition, number by number.
fn quantized(x: &[f32], bits: u32) -> (f32, f32, Vec<u8>) {
    let top = ((1u32 << bits) - 1) as f32;
    let mut low = x.iter().fold(0.0f32, |m, v| m.min(*v));
    let mut high = x.iter().fold(0.0f32, |m, v| m.max(*v));
    if low == 0.0 && high == 0.0 {
        (low, high) = (-1.0, 1.0);
    }
    let scale = (high - low) / top;
    let zero = (-low / scale).round_ties_even();
    let code = |v: &f32| ((v / scale).round_ties_even() + zero).clamp(0.0, top) as u8;
    (scale, zero, x.iter().map(code).collect())
}

#[test]
fn rows_are_quantized_by_the_definition_on_every_backend() {
    for (_, n_low, n_high) in SHAPES {
        for bits in [[4, 8], [8, 8], [2, 3]] {
            let (parts, n) = (Parts { n_low, n_high }, n_low + n_high);
            let mut x = random("x", 5 * n);
            // All positive, all negative, all zero.
            x[n..2 * n].iter_mut().for_each(|v| *v = v.abs() * 1e-3);
            x[2 * n..3 * n].iter_mut().for_each(|v| *v = -v.abs() * 1e5);
            x[3 * n..4 * n].fill(0.0);
            for backend in Backend::available() {
                let matrix = MatrixRef::new(&x, 5, n).unwrap();
                let rows = backend.quantize_rows(matrix, parts, bits);
                for (row, x) in x.chunks(n.max(1)).enumerate() {
                    let (low, high) = x.split_at(n_low);
                    let [low, high] = [quantized(low, bits[0]), quantized(high, bits[1])];
                    assert_eq!(rows.codes(row), [low.2.clone(), high.2.clone()].concat());
                    let mut values = vec![f32::NAN; n];
                    rows.write_row(row, &mut values);
                    let parts = [(low.0, low.1, low.2), (high.0, high.1, high.2)];
                    let want: Vec<f32> = parts
                        .into_iter()
                        .flat_map(|(s, z, c)| c.into_iter().map(move |c| s * (f32::from(c) - z)))
                        .collect();
                    assert_eq!(values, want, "{}", backend.name());
                }
            }
        }
    }
}

#[test]
fn extreme_inputs_are_quantized_to_numbers_or_none() {
    let parts = Parts { n_low: 3, n_high: 2 };
    for backend in Backend::available() {
        for size in [2e38, 1e30, 1e-38, 1e-45] {
            let x = [size, -size, 0.0, -size, size];
            let rows = backend.quantize_rows(MatrixRef::new(&x, 1, 5).unwrap(), parts, [4, 8]);
            let mut values = [f32::NAN; 5];
            rows.write_row(0, &mut values);
            for (value, x) in values.iter().zip(x) {
                assert!((value - x).abs() <= size / 10.0 + 1e-38, "{size}: {value} for {x}");
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let x = [1.0, bad, 0.0, -1.0, 1.0];
            let rows = backend.quantize_rows(MatrixRef::new(&x, 1, 5).unwrap(), parts, [4, 8]);
            let mut values = [0.0; 5];
            rows.write_row(0, &mut values);
            assert!(values[..3].iter().all(|v| v.is_nan()), "{bad}");
            assert!(values[3..].iter().all(|v| (v.abs() - 1.0).abs() < 0.01), "{bad}");
        }
    }
}

/// What `add_integer` adds, in exact integers and the order that it documents.
fn integer_product(owned: &Owned, x: &QuantizedRows, codes: &[u8], row: usize, out: usize) -> f32 {
    let Parts { n_low, n_high } = owned.parts;
    let n = n_low + n_high;
    let weights = &owned.codes[out * n..(out + 1) * n];
    let grids = x.grid(row);
    let part = |range: std::ops::Range<usize>, index: usize| {
        let (scale, zero) = grids[index];
        let terms = range.map(|k| i64::from(i32::from(codes[k]) - zero) * i64::from(weights[k]));
        let sum: i64 = terms.sum();
        let scale_w = owned.scales[index].get(out).map_or(0.0, |s| s.to_f64());
        sum as f64 * (f64::from(scale) * scale_w)
    };
    (part(0..n_low, 0) + part(n_low..n, 1)) as f32
}

#[test]
fn integer_products_are_exact_on_every_backend() {
    for (out_features, n_low, n_high) in SHAPES {
        let owned = Owned::random(out_features, n_low, n_high);
        let n = n_low + n_high;
        for n_rows in BATCHES {
            let x = random("x", n_rows * n);
            let x = MatrixRef::new(&x, n_rows, n).unwrap();
            let quantized = Backend::active().quantize_rows(x, owned.parts, [8, 8]);
            let want: Vec<f32> = (0..n_rows)
                .flat_map(|row| {
                    let codes = quantized.codes(row);
                    let one = |out| integer_product(&owned, &quantized, &codes, row, out);
                    (0..out_features).map(|out| 0.5 + one(out)).collect::<Vec<_>>()
                })
                .collect();
            for backend in Backend::available() {
                let mut y = vec![0.5; n_rows * out_features];
                let mut view = MatrixMut::new(&mut y, n_rows, out_features).unwrap();
                backend.add_integer(owned.mixed(), &quantized, &mut view);
                assert_eq!(y, want, "{} {out_features}x{n_low}+{n_high}", backend.name());
                let mut y = vec![0.5; (n_rows - n_rows / 2) * out_features];
                let mut view = MatrixMut::new(&mut y, n_rows - n_rows / 2, out_features).unwrap();
                let half = quantized.rows(n_rows / 2..n_rows);
                backend.add_integer(owned.mixed(), &half, &mut view);
                assert_eq!(y, want[n_rows / 2 * out_features..], "a part of the rows");
            }
        }
    }
}

/// Codes as far from zero as they can be.
#[test]
fn integer_products_of_extreme_codes_do_not_overflow() {
    let (n_low, n_high) = (1 << 16, 1 << 16);
    for (nibble, byte, x) in [(0u8, 0x80u8, 1.0f32), (15, 0x7f, -1.0), (15, 0x7f, 1.0)] {
        let mut low = vec![0; low_bytes(n_low)];
        pack_low(&vec![nibble; n_low], &mut low);
        let high = vec![byte; n_high];
        let one = [f16::ONE];
        let sums = mixed_sums(&low, &high, n_low, n_high, 1);
        let weight = Mixed {
            low: &low,
            high: &high,
            low_scale: &one,
            high_scale: &one,
            sums: &sums,
            n_low,
            n_high,
        };
        let x = vec![x; n_low + n_high];
        for backend in Backend::available() {
            let x = MatrixRef::new(&x, 1, n_low + n_high).unwrap();
            let rows = backend.quantize_rows(x, weight.parts(), [8, 8]);
            let mut y = [0.0];
            backend.add_integer(weight, &rows, &mut MatrixMut::new(&mut y, 1, 1).unwrap());
            let weights = f64::from(nibble) - 8.0 + f64::from(byte.cast_signed());
            let want = f64::from(x.data()[0]) * weights * 65536.0;
            assert!((f64::from(y[0]) - want).abs() < 1e-6 * want.abs(), "{} {want}", y[0]);
        }
    }
}

#[test]
fn mixed_products_equal_the_oracle_whatever_the_batch() {
    for (out_features, n_low, n_high) in SHAPES {
        let owned = Owned::random(out_features, n_low, n_high);
        let n = n_low + n_high;
        let weight = owned.decoded();
        let w = MatrixRef::new(&weight, out_features, n).unwrap();
        let eps = (n as f64 / 16.0 + 12.0) * f64::from(f32::EPSILON);
        for n_rows in BATCHES {
            let x = random("x", n_rows * n);
            let x = MatrixRef::new(&x, n_rows, n).unwrap();
            let (want, magnitude) = naive::product(w, x);
            let mut first: Option<Vec<f32>> = None;
            for backend in Backend::available() {
                let what = format!("{} {out_features}x{n_low}+{n_high}", backend.name());
                let mut y = vec![0.0; n_rows * out_features];
                let mut view = MatrixMut::new(&mut y, n_rows, out_features).unwrap();
                backend.add_mixed(owned.mixed(), x, &mut view);
                assert_eq!(naive::first_outside(&y, &want, &magnitude, eps), None, "{what}");
                for row in 0..n_rows {
                    let mut alone = vec![0.0; out_features];
                    let mut view = MatrixMut::new(&mut alone, 1, out_features).unwrap();
                    backend.add_mixed(owned.mixed(), x.rows(row..row + 1), &mut view);
                    assert_eq!(alone, y[row * out_features..(row + 1) * out_features], "{what}");
                }
                if backend.name() != "portable" {
                    assert_eq!(*first.get_or_insert_with(|| y.clone()), y, "{what}");
                }
            }
        }
    }
}
