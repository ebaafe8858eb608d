//! What is true of `deltadq` beside the laws of all codecs.

use onebase_codec::{CodecSpec, Error, SecondMoment};
use onebase_tensor::{EncodedDelta, MatrixRef, Part, PartData, effective_bits, stream};
use rand_distr::{Distribution, StandardNormal};

const PUBLISHED: &str = "storage=indexed,values=rescaled,grid=range,rows=1,seeds=1";

fn spec(options: &str) -> CodecSpec {
    format!("deltadq:{options}").parse().unwrap()
}

fn gaussian(label: &str, n: usize) -> Vec<f32> {
    let mut rng = stream(9, label, 0);
    (0..n).map(|_| Distribution::<f32>::sample(&StandardNormal, &mut rng)).collect()
}

fn encode(options: &str, data: &[f32], [rows, cols]: [usize; 2]) -> EncodedDelta {
    spec(options).encode(&MatrixRef::new(data, rows, cols).unwrap()).unwrap()
}

fn decode(options: &str, delta: EncodedDelta) -> Vec<f32> {
    let [rows, cols] = delta.shape;
    let mut out = vec![f32::NAN; rows * cols];
    spec(options).prepare(delta).unwrap().write_rows(0..rows, &mut out);
    out
}

fn bits(delta: &EncodedDelta) -> f64 {
    effective_bits(delta.size_bytes() as u64, (delta.shape[0] * delta.shape[1]) as u64)
}

/// `Σ x xᵀ` of inputs that go together, about a third as many as features.
fn moment(n: usize) -> Vec<f32> {
    let rank = n / 3;
    let basis = gaussian("basis", rank * n);
    let mut h = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            h[i * n + j] = basis.chunks(n).map(|x| x[i] * x[j]).sum::<f32>();
        }
    }
    h
}

/// The squared error of the outputs over that of no delta.
fn output_error(h: &[f32], data: &[f32], got: &[f32], n: usize) -> f64 {
    let of_row = |w: &[f32]| -> f64 {
        let times = |row: &[f32]| row.iter().zip(w).map(|(h, w)| f64::from(h * w)).sum::<f64>();
        h.chunks(n).zip(w).map(|(row, w)| f64::from(*w) * times(row)).sum()
    };
    let square = |w: &[f32]| w.chunks(n).map(of_row).sum::<f64>();
    let off: Vec<f32> = data.iter().zip(got).map(|(a, b)| a - b).collect();
    square(&off) / square(data)
}

#[test]
fn published_groups_keep_exact_counts_with_a_tail() {
    let shape @ [rows, cols] = [20, 300];
    let data: Vec<f32> = gaussian("w", rows * cols).iter().map(|w| w + 9.0).collect();
    for group in [16, 64] {
        let options = format!("{PUBLISHED},alpha=8,code_bits=8,group_size={group}");
        let out = decode(&options, encode(&options, &data, shape));
        for row in out.chunks(cols) {
            for (index, weights) in row.chunks(group).enumerate() {
                let first = index * group;
                let want = (first + weights.len()) / 8 - first / 8;
                assert_eq!(weights.iter().filter(|w| **w != 0.0).count(), want);
            }
        }
        // Kept weights are over the share of their group: sums stay what they were, about.
        let mean = out.iter().sum::<f32>() / (rows * cols) as f32;
        assert!((mean - 9.0).abs() < 0.5, "{mean}");
    }
}

#[test]
fn separate_parts_decode_to_the_floats_of_the_whole() {
    let shape = [24, 96];
    let data = gaussian("w", 24 * 96);
    for bits in 1..=8 {
        let of = |m: usize| {
            let options = format!("{PUBLISHED},alpha=4,code_bits={bits},parts={m}");
            decode(&options, encode(&options, &data, shape))
        };
        let whole = of(1);
        assert!((1..=bits).all(|log| of(1 << log) == whole), "{bits}");
        let seeded = format!("values=rescaled,grid=range,rows=1,seeds=1,alpha=4,code_bits={bits}");
        assert_eq!(decode(&seeded, encode(&seeded, &data, shape)), whole);
    }
}

/// The ratio as published, and what is on disk.
#[test]
fn claimed_and_true_ratios() {
    let shape @ [rows, cols] = [64, 1024];
    let data = gaussian("w", rows * cols);
    let published = format!("{PUBLISHED},alpha=8,code_bits=4,parts=8");
    let delta = encode(&published, &data, shape);
    let claimed = spec(&published).claimed_bits(shape, &delta.part_shapes());
    assert_eq!(16.0 / claimed, 128.0);
    let kept = rows * cols / 8;
    // Code, input feature and row offsets; then step, zero and layout.
    let want = kept / 8 + 2 * kept + 4 * 8 * (rows + 1) + 4 + 4 + 24;
    assert_eq!(delta.size_bytes(), want);
    assert!((6.0..7.0).contains(&(16.0 / bits(&delta))), "{}", 16.0 / bits(&delta));
    let seeded =
        encode("values=rescaled,grid=range,rows=1,seeds=1,alpha=8,code_bits=4", &data, shape);
    // Codes of a bell curve between extremes take less than their four bits.
    assert!(16.0 / bits(&seeded) > 40.0, "{}", 16.0 / bits(&seeded));
    // A share of a twentieth in codes of four bits, without what tells where it stands.
    let twentieth = spec(&format!("{PUBLISHED},alpha=20,code_bits=4,parts=1"));
    let delta = twentieth.encode(&MatrixRef::new(&data, rows, cols).unwrap()).unwrap();
    let claimed = 16.0 / twentieth.claimed_bits(shape, &delta.part_shapes());
    assert!((claimed / 80.0 - 1.0).abs() < 0.01, "{claimed}");
    // With the least that this takes, the entropy of the mask, it could be 33.
    assert!(16.0 / bits(&delta) < 16.0 / (0.05 * 4.0 + 0.2864), "{}", bits(&delta));
    let all = spec("alpha=8,code_bits=4,parts=16,storage=indexed");
    let delta = all.encode(&MatrixRef::new(&data, rows, cols).unwrap()).unwrap();
    assert_eq!(all.claimed_bits(shape, &delta.part_shapes()), 0.0);
}

#[test]
fn sizes_are_met_and_used() {
    let shape = [256, 512];
    let data = gaussian("w", 256 * 512);
    for size in [0.125, 0.25, 0.5, 1.0, 2.0] {
        for rest in ["", ",code_bits=3,grid=row", ",rows=1,storage=indexed,parts=1"] {
            let got = bits(&encode(&format!("bits={size}{rest}"), &data, shape));
            // Offsets of rows alone take more than an eighth of a bit of a narrow matrix.
            let fits = size > 0.2 || !rest.contains("indexed");
            assert!(!fits || got <= size && got > 0.8 * size, "{size}{rest}: {got}");
        }
    }
}

#[test]
fn statistics_lower_the_error_of_outputs_step_by_step() {
    let [rows, cols] = [32, 96];
    let (data, h) = (gaussian("w", rows * cols), moment(cols));
    let inputs = SecondMoment::new(h.clone(), cols).unwrap();
    let source = MatrixRef::new(&data, rows, cols).unwrap();
    let error = |options: &str| {
        let spec = spec(options);
        let calibrated = spec.calibrated().unwrap();
        let encode = || calibrated.encode_calibrated(spec.options(), &source, &inputs).unwrap();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(encode)
        };
        let delta = on(1);
        assert!(delta == on(5), "{options}");
        output_error(&h, &data, &decode(options, delta), cols)
    };
    let rest = "alpha=4,code_bits=4,ridge=0.01";
    let published = error(&format!("{rest},values=rescaled,grid=range,rows=1,seeds=1"));
    let levels = error(&format!("{rest},values=rescaled,grid=row,rows=1,seeds=1"));
    let scaled = error(&format!("{rest},values=row,rows=1,seeds=1"));
    let seeds = error(&format!("{rest},values=row,rows=1,seeds=64"));
    let solved = error(&format!("{rest},values=solved,rows=1,seeds=1"));
    let unbiased = error(&format!("{rest},values=unbiased,rows=1,seeds=64"));
    let both = error(&format!("{rest},values=solved,rows=1,seeds=64"));
    assert!(scaled < 0.5 * published && scaled < levels, "{published} {levels} {scaled}");
    assert!(seeds < scaled && solved < scaled && both < solved, "{seeds} {solved} {both}");
    assert!(both < unbiased && unbiased < 1.3 * both, "{unbiased} {both}");
    let coarse = "alpha=2,code_bits=1,ridge=0.01,grid=block,rows=16,seeds=1";
    for values in ["solved", "unbiased"] {
        let of = |sweeps| error(&format!("{coarse},values={values},sweeps={sweeps}"));
        let [none, some] = [of(0), of(4)];
        assert!(some < 0.97 * none, "{values}: {none} {some}");
    }
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let data = gaussian("w", 8 * 64);
    let source = MatrixRef::new(&data, 8, 64).unwrap();
    let refused = |options: &str, option: &str| match spec(options).encode(&source) {
        Err(Error::BadOption { option: named, .. }) => assert_eq!(named, option),
        other => panic!("{options}: {other:?}"),
    };
    refused("alpha=16,group_size=8", "group_size");
    refused("storage=indexed,parts=3", "parts");
    refused("storage=indexed,code_bits=2,parts=8", "parts");
    assert!(spec("alpha=16,group_size=16").encode(&source).is_ok());
}

#[test]
fn layouts_that_no_encoder_writes_are_refused() {
    let data = gaussian("w", 8 * 64);
    let delta = encode("", &data, [8, 64]);
    let layout = delta.parts["layout"].data().to_le_bytes().into_owned();
    // The generator, bits, grid, coding, an empty group, a share of nothing.
    for (at, byte) in [(0, 2), (1, 0), (1, 9), (2, 2), (3, 2), (4, 0), (12, 0)] {
        let mut bytes = layout.clone();
        bytes[at] = byte;
        let mut altered = delta.clone();
        altered.parts.insert("layout".into(), Part::new(vec![24], PartData::U8(bytes)).unwrap());
        let error = spec("").prepare(altered).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Part(_)), "{at}");
        if at == 0 {
            assert!(error.to_string().contains("generator"), "{error}");
        }
    }
}
