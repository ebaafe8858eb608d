use onebase_tensor::{MatrixRef, PartData, stream};
use rand_distr::{Distribution, StandardNormal};

use super::*;
use crate::numerics::product_transposed;
use crate::{CodecSpec, DeltaLinear};

const SHAPE: [usize; 2] = [40, 70];

const METHOD: Method = Method {
    svd: SvdMethod::Full,
    grids: Grids::Pair,
    order: ColumnOrder::Activation,
    damping: 0.01,
    blend: 0.0,
    target: Target::Delta,
    sweeps: 0,
};

fn gaussian(label: &str, n: usize) -> Vec<f64> {
    let mut rng = stream(5, label, 0);
    (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
}

#[allow(clippy::cast_possible_truncation)]
fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// A delta of falling singular values, and correlated inputs `[200, 70]` of it.
fn example() -> (Vec<f64>, Vec<f64>) {
    let [m, n] = SHAPE;
    let mut delta = vec![0.0; m * n];
    for i in 0..m {
        let (u, v) = (gaussian(&format!("u{i}"), m), gaussian(&format!("v{i}"), n));
        let s = 1.0 / (1.0 + i as f64);
        for (row, u) in delta.chunks_mut(n).zip(&u) {
            row.iter_mut().zip(&v).for_each(|(w, v)| *w += s * u * v);
        }
    }
    let mixing = gaussian("mixing", n * n);
    (delta, product(&gaussian("inputs", 200 * n), &mixing, [200, n, n]))
}

fn moment(inputs: &[f64]) -> SecondMoment {
    let n = SHAPE[1];
    let gram = product_of_columns(inputs, inputs, [inputs.len() / n, n, n]);
    SecondMoment::new(narrow(&gram), n).unwrap()
}

/// `‖(T − U A) Xᵀ‖²`.
fn loss(target: &[f64], u: &[f64], a: &[f64], inputs: &[f64]) -> f64 {
    let [m, n] = SHAPE;
    let made = product(u, a, [m, a.len() / n, n]);
    let lost: Vec<f64> = target.iter().zip(made).map(|(t, d)| t - d).collect();
    product_transposed(&lost, inputs, [m, n, inputs.len() / n]).iter().map(|x| x * x).sum()
}

/// What is fitted to the delta, or to the pairs that are kept, is the best there is, and so
/// never worse than the singular vectors.
#[test]
fn the_corrected_target_is_the_least_squares_solution() {
    let [m, n] = SHAPE;
    let (delta, inputs) = example();
    let data = narrow(&delta);
    let source = MatrixRef::new(&data, m, n).unwrap();
    let moment = moment(&inputs);
    let weighing = Weighing::new(Some(&moment), n, &METHOD);
    for rank in [1, 6, 20] {
        let pairs = Pairs::new(truncated_svd(&source, rank, SvdMethod::Full).unwrap(), SHAPE);
        let scaled = Scaled { delta: &source, factor: pairs.unit.recip() };
        let layout = Layout::new(SHAPE, Grids::Pair, &vec![2; rank]);
        let right = Right::new(&pairs.v, pairs.s.clone(), &layout, &weighing).unwrap();
        let a = Thin::from_columns(&right.values, n, rank);
        let weighed = weighing.times(&a).unwrap();
        let k = gram(&a, &weighed);
        let to_delta =
            by_groups(&times(&scaled, &weighed).unwrap(), &solve_positive(&k, rank, 1e-9).unwrap());
        let to_kept = pairs.fitted(&weighed, &k).unwrap();
        let vectors = wide(&pairs.columns_of_u());
        let kept = product(&vectors, &wide(&pairs.v), [m, rank, n]);
        let whole: Vec<f64> = delta.iter().map(|w| w / pairs.unit).collect();
        let a = wide(&right.values);
        for (target, fitted) in [(&whole, to_delta), (&kept, to_kept)] {
            let best = loss(target, &wide(&fitted), &a, &inputs);
            assert!(best < loss(target, &vectors, &a, &inputs), "{rank}");
            for draw in 0..20 {
                let step = gaussian(&format!("step {draw}"), m * rank);
                let size = 10f64.powi(-(draw % 5)) * 0.1 / pairs.s.len() as f64;
                let off: Vec<f64> =
                    wide(&fitted).iter().zip(&step).map(|(u, d)| u + size * d).collect();
                let got = loss(target, &off, &a, &inputs);
                assert!(got > best * (1.0 - 1e-6), "{rank} {size}: {got} {best}");
            }
        }
    }
}

/// The square of what rounding `v` changes in the outputs is a sum over the pairs.
#[test]
fn losses_of_pairs_add_up() {
    let [m, n] = SHAPE;
    let (delta, inputs) = example();
    let data = narrow(&delta);
    let source = MatrixRef::new(&data, m, n).unwrap();
    let moment = moment(&inputs);
    // So little damping that it does not count.
    let method = Method { damping: 1e-6, ..METHOD };
    let weighing = Weighing::new(Some(&moment), n, &method);
    let pairs = Pairs::new(truncated_svd(&source, 12, SvdMethod::Full).unwrap(), SHAPE);
    let vectors = wide(&pairs.columns_of_u());
    let kept = product(&vectors, &wide(&pairs.v), [m, 12, n]);
    for grids in [Grids::Pair, Grids::Group(16), Grids::Group(128)] {
        let choice = Choice { pairs: &pairs, grids, weighing: &weighing };
        for width in [0, 2, 3, 5, 8] {
            // `u` has elements of about 1, so that its squared length is `m`; GPTQ counts half.
            let said = 2.0 * m as f64 * choice.losses(width).unwrap().iter().sum::<f64>();
            let a = match width {
                0 => vec![0.0; 12 * n],
                _ => {
                    let layout = Layout::new(SHAPE, grids, &[u8::try_from(width).unwrap(); 12]);
                    let right = Right::new(&pairs.v, pairs.s.clone(), &layout, &weighing);
                    wide(&right.unwrap().values)
                }
            };
            let got = loss(&kept, &vectors, &a, &inputs);
            assert!((said - got).abs() < 2e-3 * got, "{grids:?} {width}: {said} {got}");
        }
    }
}

/// A sweep more is never worse, as the best is kept.
#[test]
fn sweeps_never_lose() {
    let [m, n] = SHAPE;
    let (delta, inputs) = example();
    let data = narrow(&delta);
    let source = MatrixRef::new(&data, m, n).unwrap();
    let moment = moment(&inputs);
    for grids in [Grids::Pair, Grids::Group(16)] {
        let lost: Vec<f64> = (0..5)
            .map(|sweeps| {
                let method = Method { grids, sweeps, ..METHOD };
                let choose = |_: &Choice<'_>| Ok(vec![3u8; 10]);
                let delta_of = encode(&source, Some(&moment), &method, 10, &choose).unwrap();
                let mut out = vec![0.0; m * n];
                Blocks::new(grids, delta_of).unwrap().write_rows(0..m, &mut out);
                let identity = |at: usize| if at.is_multiple_of(n + 1) { 1.0 } else { 0.0 };
                let identity: Vec<f64> = (0..n * n).map(identity).collect();
                let lost: Vec<f64> =
                    delta.iter().zip(&out).map(|(w, d)| w - f64::from(*d)).collect();
                loss(&lost, &vec![0.0; m * n], &identity, &inputs)
            })
            .collect();
        assert!(lost.is_sorted_by(|a, b| *b <= a * (1.0 + 1e-4)), "{grids:?} {lost:?}");
        assert!(lost[4] < 0.97 * lost[0], "{grids:?} {lost:?}");
    }
}

/// The bytes are those of the formula: codes, one number for each pair and, with groups, a
/// scale and a code of zero for each group of both sides.
#[test]
fn bytes_are_those_of_the_formula() {
    let [m, n] = [64, 160];
    let widths = [8, 8, 3, 3, 3, 2, 2, 2, 2];
    let bits: usize = widths.iter().map(|width| usize::from(*width)).sum();
    let codes = bits * (m + n) / 8;
    let pair = Layout::new([m, n], Grids::Pair, &widths);
    assert_eq!(pair.size_bytes(), 16 + codes + 2 * widths.len());
    let group = Layout::new([m, n], Grids::Group(32), &widths);
    // In planes of 16 bits, of which both sides fill whole ones here but for `v`.
    let (of_u, of_v) = ([m; 3], [2 * 5, 3 * 5, 4 * 5]);
    let scales = 2 * (of_u.iter().sum::<usize>() + of_v.iter().sum::<usize>());
    let zeros: usize = [(8, of_u[0], 16), (3, of_u[1], 16), (2, of_u[2], 32)]
        .map(|(width, of_u, of_v)| width * (of_u + of_v) / 8)
        .iter()
        .sum();
    assert_eq!(group.size_bytes(), 16 + codes + 2 * widths.len() + scales + zeros);
}

/// Codes of every width come back as they were, in both orders.
#[test]
fn codes_round_trip() {
    for (n_rows, n_cols) in [(1, 1), (7, 19), (16, 32), (33, 100), (40, 8)] {
        for width in 1..=MAX_WIDTH {
            let codes: Vec<u8> =
                (0..n_rows * n_cols).map(|i| (i * 37 % (1 << width)) as u8).collect();
            let mut planes = Vec::new();
            planes::pack(&codes, width, n_cols, &mut planes);
            let turned = planes::transpose(&codes, n_rows, n_cols);
            let mut columns = Vec::new();
            planes::pack(&turned, width, n_rows, &mut columns);
            assert_eq!(blocks::rows_of(&columns, width, n_rows, n_cols), planes);
            for (row, planes) in codes.chunks(n_cols).zip(planes.chunks(planes.len() / n_rows)) {
                for first in [0, n_cols / 3] {
                    let mut out = vec![0; n_cols - first];
                    planes::unpack_bytes(planes, width, first, &mut out);
                    assert_eq!(out, row[first..]);
                }
            }
        }
    }
}

#[test]
fn bits_in_the_padding_are_refused() {
    let spec: CodecSpec = "deltamix".parse().unwrap();
    let data = narrow(&example().0);
    let delta = spec.encode(&MatrixRef::new(&data, SHAPE[0], SHAPE[1]).unwrap()).unwrap();
    for name in ["u", "v"] {
        let mut altered = delta.clone();
        let part = &altered.parts[name];
        let PartData::U8(mut bytes) = part.data().clone() else { panic!("codes are bytes") };
        // 40 and 70 elements fill planes of 48 and 80 bits.
        let last = bytes.len() - 1;
        bytes[last] |= 0x80;
        let part = onebase_tensor::Part::new(part.shape().to_vec(), PartData::U8(bytes));
        altered.parts.insert(name.to_owned(), part.unwrap());
        let error = spec.prepare(altered).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("zeros past the last element"), "{error}");
    }
}

/// Inputs that the calibration never had are stored like any others, and with a part of the
/// identity they count.
#[test]
fn inputs_that_were_never_seen_are_kept() {
    let [m, n] = SHAPE;
    let (delta, mut inputs) = example();
    let unseen = |column: usize| column.is_multiple_of(8);
    inputs.chunks_mut(n).for_each(|row| {
        row.iter_mut().enumerate().filter(|(c, _)| unseen(*c)).for_each(|(_, x)| *x = 0.0);
    });
    let moment = moment(&inputs);
    let data = narrow(&delta);
    let source = MatrixRef::new(&data, m, n).unwrap();
    for blend in [0.0, 0.5] {
        let method = Method { blend, ..METHOD };
        let choose = |_: &Choice<'_>| Ok(vec![8u8; 30]);
        let encoded = encode(&source, Some(&moment), &method, 30, &choose).unwrap();
        let mut out = vec![0.0; m * n];
        Blocks::new(Grids::Pair, encoded).unwrap().write_rows(0..m, &mut out);
        let [mut lost, mut all] = [0.0; 2];
        for (at, (w, d)) in delta.iter().zip(&out).enumerate().filter(|(at, _)| unseen(at % n)) {
            assert!(d.is_finite(), "{at}");
            lost += (w - f64::from(*d)).powi(2);
            all += w * w;
        }
        assert!(lost < if blend > 0.0 { 0.01 } else { 0.3 } * all, "{blend}: {}", lost / all);
    }
}

#[test]
fn more_pairs_than_a_matrix_has_are_refused() {
    let spec: CodecSpec = "deltamix".parse().unwrap();
    let data = narrow(&example().0);
    let mut delta = spec.encode(&MatrixRef::new(&data, SHAPE[0], SHAPE[1]).unwrap()).unwrap();
    let ranks = onebase_tensor::Part::new(vec![8, 2], PartData::U8(vec![0xff; 16]));
    delta.parts.insert("ranks".to_owned(), ranks.unwrap());
    let error = spec.prepare(delta).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("at most 40 pairs"), "{error}");
}
