use half::f16;

use crate::tests::random;
use crate::{Attention, Backend, PackedAttention, PackedFormat};

const FORMATS: [PackedFormat; 7] = [
    PackedFormat { n_low: 56, n_high: 8, low_bits: 4 },
    PackedFormat { n_low: 112, n_high: 16, low_bits: 4 },
    PackedFormat { n_low: 64, n_high: 0, low_bits: 4 },
    PackedFormat { n_low: 18, n_high: 2, low_bits: 4 },
    PackedFormat { n_low: 70, n_high: 10, low_bits: 8 },
    PackedFormat { n_low: 0, n_high: 5, low_bits: 4 },
    PackedFormat { n_low: 2, n_high: 0, low_bits: 8 },
];

#[test]
fn attention_equals_the_oracle() {
    for (head_dim, n) in [(1, 1), (8, 3), (16, 5), (20, 40), (64, 100), (80, 7)] {
        let (q, k, v) =
            (random("q", head_dim), random("k", n * head_dim), random("v", n * head_dim));
        let scores: Vec<f64> = k
            .chunks(head_dim)
            .map(|k| k.iter().zip(&q).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>())
            .map(|s| (0.3 * s).exp())
            .collect();
        let total: f64 = scores.iter().sum();
        for backend in Backend::available() {
            let mut out = vec![f32::NAN; head_dim];
            let attention = Attention { query: &q, keys: &[&k], values: &[&v], scale: 0.3 };
            backend.attend(attention, &mut Vec::new(), &mut out);
            // In chunks, to the bit.
            let at = (n / 3) * head_dim;
            let (keys, values) = (k.split_at(at), v.split_at(at));
            let (keys, values) = ([keys.0, keys.1], [values.0, values.1]);
            let mut again = vec![f32::NAN; head_dim];
            let attention = Attention { query: &q, keys: &keys, values: &values, scale: 0.3 };
            backend.attend(attention, &mut Vec::new(), &mut again);
            assert_eq!(out, again);
            for (i, got) in out.iter().enumerate() {
                let rows = v.chunks(head_dim).zip(&scores);
                let want = rows.map(|(v, s)| s * f64::from(v[i])).sum::<f64>() / total;
                assert!((f64::from(*got) - want).abs() < 2e-6, "{} {head_dim} {n}", backend.name());
            }
        }
    }
}

fn packed(format: PackedFormat, rows: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0xaa; rows.len() / format.head_dim() * format.row_bytes()];
    let out = bytes.chunks_mut(format.row_bytes());
    rows.chunks(format.head_dim()).zip(out).for_each(|(row, out)| format.pack(row, out));
    bytes
}

fn unpacked(format: PackedFormat, bytes: &[u8]) -> Vec<f32> {
    let mut rows = vec![f32::NAN; bytes.len() / format.row_bytes() * format.head_dim()];
    let out = rows.chunks_mut(format.head_dim());
    bytes.chunks(format.row_bytes()).zip(out).for_each(|(row, out)| format.unpack(row, out));
    rows
}

#[test]
fn packed_rows_are_within_half_a_step() {
    assert_eq!(FORMATS[0].row_bytes(), 28 + 8 + 6);
    for format in FORMATS {
        for (scale, shift) in [(1.0, 0.0), (1e-3, 0.5), (200.0, -50.0), (1e-9, 0.0), (0.0, 0.0)] {
            let rows: Vec<f32> =
                random("row", 9 * format.head_dim()).iter().map(|v| v * scale + shift).collect();
            let bytes = packed(format, &rows);
            let got = unpacked(format, &bytes);
            let all = rows.chunks(format.head_dim()).zip(got.chunks(format.head_dim()));
            for (row, got) in all {
                let parts =
                    [(0..format.n_low, format.low_bits), (format.n_low..format.head_dim(), 8)];
                for (columns, bits) in parts {
                    let row = &row[columns.clone()];
                    let lo = row.iter().fold(0f32, |lo, v| lo.min(*v));
                    let hi = row.iter().fold(0f32, |hi, v| hi.max(*v));
                    let top = ((1u32 << bits) - 1) as f32;
                    // A scale of f16 is up to a thousandth larger, and not below the least one;
                    // the ends of the range may be cut by half a step.
                    let step = ((hi - lo) / top * 1.002).max(f16::from_bits(1).to_f32());
                    for (v, got) in row.iter().zip(&got[columns]) {
                        let bound = 1.001 * step + 1e-6 * v.abs();
                        assert!((v - got).abs() <= bound, "{format:?} {scale}: {got} for {v}");
                    }
                }
            }
        }
    }
    let format = FORMATS[0];
    let mut row = random("row", 64);
    row[3] = f32::NAN;
    assert!(unpacked(format, &packed(format, &row)).iter().any(|v| v.is_nan()));
}

/// The codes of a part, its scale and its zero point, by the formula.
fn grid(x: &[f32], bits: u32) -> (Vec<f32>, f32, f32) {
    let lo = x.iter().fold(0f32, |lo, v| lo.min(*v));
    let hi = x.iter().fold(0f32, |hi, v| hi.max(*v));
    let top = ((1u32 << bits) - 1) as f32;
    let step = (hi - lo) / top;
    let near = f16::from_f32(step);
    let scale = if near.to_f32() < step { f16::from_bits(near.to_bits() + 1) } else { near };
    let scale = scale.to_f32();
    let zero = (-lo / scale).round_ties_even();
    let code = |v: &f32| ((v / scale).round_ties_even() + zero).clamp(0.0, top);
    (x.iter().map(code).collect(), scale, zero)
}

#[test]
fn codes_come_back_as_they_were_put() {
    for format in FORMATS {
        for row in random("row", 20 * format.head_dim()).chunks(format.head_dim()) {
            let got = unpacked(format, &packed(format, row));
            let parts = [(0..format.n_low, format.low_bits), (format.n_low..format.head_dim(), 8)];
            for (columns, bits) in parts.into_iter().filter(|(columns, _)| !columns.is_empty()) {
                let (codes, scale, zero) = grid(&row[columns.clone()], bits);
                let values: Vec<f32> = codes.iter().map(|code| scale * (code - zero)).collect();
                assert_eq!(got[columns], values, "{format:?}");
            }
        }
    }
}

#[test]
fn packed_attention_is_that_of_the_values() {
    for format in FORMATS {
        let (head_dim, n, n_queries) = (format.head_dim(), 75, 6);
        let keys = packed(format, &random("k", n * head_dim));
        let values = packed(format, &random("v", n * head_dim));
        let [wide_keys, wide_values] = [&keys, &values].map(|bytes| unpacked(format, bytes));
        let queries = random("q", n_queries * head_dim);
        let (firsts, limits) = ([0, 0, 3, 40, 74, 0], [75, 1, 9, 75, 75, 32]);
        let cut = 32 * format.row_bytes();
        let (keys, values) = (keys.split_at(cut), values.split_at(cut));
        let (keys, values) = ([keys.0, keys.1], [values.0, values.1]);
        for backend in Backend::available() {
            let mut out = vec![f32::NAN; n_queries * head_dim];
            let attention = PackedAttention {
                queries: &queries,
                firsts: &firsts,
                limits: &limits,
                keys: &keys,
                values: &values,
                format,
                scale: 0.3,
            };
            backend.attend_packed(attention, &mut Vec::new(), &mut out);
            for (index, out) in out.chunks(head_dim).enumerate() {
                let seen = firsts[index] * head_dim..limits[index] * head_dim;
                let mut want = vec![f32::NAN; head_dim];
                let attention = Attention {
                    query: &queries[index * head_dim..(index + 1) * head_dim],
                    keys: &[&wide_keys[seen.clone()]],
                    values: &[&wide_values[seen]],
                    scale: 0.3,
                };
                backend.attend(attention, &mut Vec::new(), &mut want);
                let apart = out.iter().zip(&want).map(|(a, b)| (a - b).abs());
                let apart = apart.fold(0.0, f32::max);
                let whole = head_dim - head_dim % crate::LANES;
                assert_eq!(out[..whole], want[..whole], "{} {format:?}", backend.name());
                assert!(apart < 1e-6, "{} {format:?}: {apart}", backend.name());
            }
        }
    }
}
