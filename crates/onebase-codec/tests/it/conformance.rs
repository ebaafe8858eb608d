//! The laws that every codec obeys, run on every codec of the registry with
//! every value of its choices and the ends of its ranges. A codec that is
//! registered is tested here without a line more.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use expect_test::expect_file;
use onebase_codec::{CODECS, CodecSpec, DeltaLinear, DeltaSource, Error, Kind, Result};
use onebase_kernels::{Backend, naive};
use onebase_tensor::{
    DType, EncodedDelta, MatrixMut, MatrixRef, Part, PartData, PartSpec, effective_bits, stream,
};
use rand_distr::{Distribution, StandardNormal};
use safetensors::tensor::TensorView;
use serde_json::Map;

const SHAPES: [[usize; 2]; 9] =
    [[1, 1], [1, 40], [40, 1], [7, 15], [0, 5], [5, 0], [33, 100], [16, 128], [20, 300]];

/// Every codec with its defaults, and with each option moved alone to each of
/// its values or ends.
fn specs() -> Vec<CodecSpec> {
    let mut texts = Vec::new();
    for codec in CODECS {
        texts.push(codec.name().to_owned());
        for option in codec.options() {
            let values: Vec<String> = match option.kind {
                Kind::Int { min, max, .. } => vec![min.to_string(), max.to_string()],
                Kind::Number { min, max, .. } => vec![min.to_string(), max.to_string()],
                Kind::Choice(words) => words[1..].iter().map(|w| (*w).to_owned()).collect(),
            };
            texts.extend(values.iter().map(|v| format!("{}:{}={v}", codec.name(), option.name)));
        }
    }
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn gaussian(label: &str, n: usize, sigma: f32) -> Vec<f32> {
    let mut rng = stream(3, label, 0);
    (0..n).map(|_| sigma * Distribution::<f32>::sample(&StandardNormal, &mut rng)).collect()
}

fn encode(spec: &CodecSpec, data: &[f32], [rows, cols]: [usize; 2]) -> EncodedDelta {
    spec.encode(&MatrixRef::new(data, rows, cols).unwrap()).unwrap()
}

fn decode(delta: &dyn DeltaLinear) -> Vec<f32> {
    let [rows, cols] = delta.shape();
    let mut out = vec![f32::NAN; rows * cols];
    delta.write_rows(0..rows, &mut out);
    out
}

#[test]
fn names_are_unique_and_fit_for_disk_and_command_line() {
    let plain = |name: &str| {
        !name.is_empty()
            && name.chars().all(|c| c.is_ascii_lowercase() || "0123456789_-".contains(c))
    };
    let names: BTreeSet<_> = CODECS.iter().map(|c| c.name()).collect();
    assert_eq!(names.len(), CODECS.len());
    for codec in CODECS {
        assert!(plain(codec.name()), "{}", codec.name());
        assert!(!codec.summary().is_empty() && !codec.summary().contains('\n'));
        let options: BTreeSet<_> = codec.options().iter().map(|o| o.name).collect();
        assert_eq!(options.len(), codec.options().len(), "{}", codec.name());
        assert!(options.iter().all(|o| plain(o)), "{}", codec.name());
    }
}

#[test]
fn options_round_trip_through_text_and_manifest() {
    for spec in specs() {
        let again: CodecSpec = spec.to_string().parse().unwrap();
        assert_eq!(again.options(), spec.options(), "{spec}");
        let short: CodecSpec = spec.short().parse().unwrap();
        assert_eq!(short.to_string(), spec.to_string());
        let (name, version) = (spec.codec().name(), spec.codec().version());
        let record = CodecSpec::from_record(name, version, spec.options().to_json()).unwrap();
        assert_eq!(record.to_string(), spec.to_string());
        let newer = CodecSpec::from_record(name, version + 1, spec.options().to_json());
        assert!(matches!(newer, Err(Error::NewerParts { .. })), "{spec}");
    }
}

/// Of a number, every notation is the same option, and its value comes back from
/// text and manifest to the last bit.
#[test]
fn numbers_have_one_form() {
    for (codec, option) in CODECS.iter().flat_map(|c| c.options().iter().map(move |o| (c, o))) {
        let Kind::Number { min, max, default } = option.kind else { continue };
        assert_eq!(option.default_text(), default.to_string());
        let parse = |value: &str| {
            format!("{}:{}={value}", codec.name(), option.name).parse::<CodecSpec>().unwrap()
        };
        for whole in [min.ceil(), max.floor()].into_iter().filter(|w| (min..=max).contains(w)) {
            let number = parse(&format!("{whole:.1}"));
            assert!(number.to_string().contains(&format!("{}={whole}", option.name)), "{number}");
            assert_eq!(number.options(), parse(&format!("{whole}")).options(), "{number}");
            assert_eq!(number.options(), parse(&format!("{whole:e}")).options(), "{number}");
            #[allow(clippy::cast_possible_truncation)]
            let given = Map::from_iter([(option.name.to_owned(), (whole as i64).into())]);
            let record = CodecSpec::from_record(codec.name(), codec.version(), &given).unwrap();
            assert_eq!(record.options().to_json(), number.options().to_json());
        }
        for step in 0..1000 {
            let value = min + (max - min) * f64::from(step) / 999.7;
            let spec = parse(&value.to_string());
            assert_eq!(spec.options().number(option.name).to_bits(), value.to_bits());
            let manifest = serde_json::to_string(spec.options().to_json()).unwrap();
            let given = serde_json::from_str(&manifest).unwrap();
            let record = CodecSpec::from_record(codec.name(), codec.version(), &given).unwrap();
            assert_eq!(record.options(), spec.options(), "{manifest}");
        }
        let (below, above) = (min.next_down().to_string(), max.next_up().to_string());
        for bad in [&below, &above, "NaN", "nan", "inf", "-inf", "infinity", "1e999", "-1e999"] {
            let got = format!("{}:{}={bad}", codec.name(), option.name).parse::<CodecSpec>();
            assert!(matches!(got, Err(Error::BadOption { .. })), "{} {bad}", option.name);
        }
    }
}

#[test]
fn unknown_names_and_bad_values_are_refused() {
    for (text, meant) in [("sgin", "`sign`"), ("rnt:bits=2", "`rtn`"), ("dens", "`dense`")] {
        let error = text.parse::<CodecSpec>().unwrap_err();
        assert!(matches!(error, Error::UnknownCodec { .. }), "{text}");
        assert!(error.hint().unwrap().contains(meant), "{text}");
    }
    for codec in CODECS {
        let unknown = format!("{}:no_such_option=1", codec.name()).parse::<CodecSpec>();
        assert!(matches!(unknown, Err(Error::UnknownOption { .. })), "{}", codec.name());
        for option in codec.options() {
            let value = option.default_value();
            let pair = format!("{}={}", option.name, value.as_str().unwrap_or(&value.to_string()));
            let twice = format!("{}:{pair},{pair}", codec.name()).parse::<CodecSpec>();
            assert!(matches!(twice, Err(Error::RepeatedOption { .. })), "{pair}");
            let number = matches!(option.kind, Kind::Number { .. });
            let fraction = if number { "nan" } else { "3.5" };
            for bad in ["", "-1", "99999999", fraction, "nonsense"] {
                let got = format!("{}:{}={bad}", codec.name(), option.name).parse::<CodecSpec>();
                assert!(matches!(got, Err(Error::BadOption { .. })), "{} {bad}", option.name);
            }
        }
    }
}

#[test]
fn every_shape_comes_back_finite_and_in_shape() {
    for spec in specs() {
        for shape @ [rows, cols] in SHAPES {
            let delta = encode(&spec, &gaussian("w", rows * cols, 0.01), shape);
            assert_eq!(delta.shape, shape, "{spec}");
            for name in delta.parts.keys() {
                let reserved = ["weight", "bias", "added_rows"].contains(&name.as_str());
                assert!(!reserved && !name.contains('.'), "{spec}: part name {name}");
            }
            let prepared = spec.prepare(delta).unwrap();
            assert_eq!(prepared.shape(), shape, "{spec}");
            let decoded = decode(&*prepared);
            assert!(decoded.iter().all(|w| w.is_finite()), "{spec} {shape:?}");
            // A run of rows is the same as those rows of the whole.
            let run = rows / 3..rows - rows / 4;
            let mut part = vec![f32::NAN; run.len() * cols];
            prepared.write_rows(run.clone(), &mut part);
            assert_eq!(part, decoded[run.start * cols..run.end * cols], "{spec} {shape:?}");
        }
    }
}

#[test]
fn extreme_weights_come_back_finite() {
    for spec in specs() {
        for w in [f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            let data = [w, -w, w, 0.0, w, -w];
            let prepared = spec.prepare(encode(&spec, &data, [2, 3])).unwrap();
            assert!(decode(&*prepared).iter().all(|w| w.is_finite()), "{spec} {w:e}");
        }
    }
}

#[test]
fn a_zero_delta_comes_back_exactly_zero() {
    for spec in specs() {
        let shape = [9, 70];
        let prepared = spec.prepare(encode(&spec, &[0.0; 630], shape)).unwrap();
        assert!(decode(&*prepared).iter().all(|w| *w == 0.0), "{spec}");
        let x = gaussian("x", 70, 1.0);
        for backend in Backend::available() {
            let mut y = vec![0.5; 9];
            let x = MatrixRef::new(&x, 1, 70).unwrap();
            prepared.add_to(backend, x, &mut MatrixMut::new(&mut y, 1, 9).unwrap());
            assert_eq!(y, [0.5; 9], "{spec} {}", backend.name());
        }
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let shape = [300, 700];
    let data = gaussian("w", 300 * 700, 0.01);
    for spec in specs() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| encode(&spec, &data, shape))
        };
        assert!(on(1) == on(5), "{spec}");
    }
}

/// Gaussian rows whose powers differ, as rows of real deltas do.
#[test]
fn error_and_bits_equal_the_committed_ones() {
    let shape @ [rows, cols] = [256, 512];
    let mut data = gaussian("w", rows * cols, 0.01);
    for (row, weights) in data.chunks_mut(cols).enumerate() {
        #[allow(clippy::cast_precision_loss)]
        let factor = 1.0 + row as f32 / 128.0;
        weights.iter_mut().for_each(|w| *w *= factor);
    }
    let power: f64 = data.iter().map(|w| f64::from(*w).powi(2)).sum();
    let mut table = String::from("codec: relative squared error, effective bits of the parts\n");
    for spec in specs() {
        let delta = encode(&spec, &data, shape);
        let bits = effective_bits(delta.size_bytes() as u64, (rows * cols) as u64);
        let decoded = decode(&*spec.prepare(delta).unwrap());
        let error: f64 =
            data.iter().zip(&decoded).map(|(w, d)| (f64::from(*w) - f64::from(*d)).powi(2)).sum();
        let _ = writeln!(table, "{spec}: {:.3e}, {bits:.3}", error / power);
    }
    expect_file!["../snapshots/error_and_bits.txt"].assert_eq(&table);
}

#[test]
fn size_is_the_bytes_that_are_written() {
    for spec in specs() {
        let delta = encode(&spec, &gaussian("w", 33 * 100, 0.01), [33, 100]);
        let written: usize = delta.parts.values().map(|p| p.data().to_le_bytes().len()).sum();
        assert_eq!(delta.size_bytes(), written, "{spec}");
    }
}

/// Budgets are met by what a codec says before it has seen a weight.
#[test]
fn parts_are_those_that_were_said() {
    for spec in specs() {
        for shape @ [rows, cols] in SHAPES {
            let Some(said) = spec.parts(shape) else { continue };
            let delta = encode(&spec, &gaussian("w", rows * cols, 0.01), shape);
            let got: Vec<_> = delta.parts.iter().map(|(n, p)| (n.as_str(), p)).collect();
            let got = got.into_iter().map(|(n, p)| (n, p.dtype(), p.shape().to_vec()));
            let said = said.into_iter().map(|p| (p.name, p.dtype, p.shape));
            assert!(got.eq(said), "{spec} {shape:?}");
        }
    }
}

/// Of a codec whose sizes depend on the delta, all names are known and no more bytes are
/// written than was said.
#[test]
fn parts_take_no_more_than_was_said() {
    for spec in specs() {
        for shape @ [rows, cols] in SHAPES.into_iter().chain([[64, 512], [512, 64]]) {
            let Some(said) = spec.most_parts(shape) else { continue };
            let delta = encode(&spec, &gaussian("w", rows * cols, 0.01), shape);
            assert!(delta.parts.keys().eq(said.iter().map(|p| p.name)), "{spec} {shape:?}");
            let most: usize = said.iter().map(PartSpec::size_bytes).sum();
            assert!(delta.size_bytes() <= most, "{spec} {shape:?}");
            let digits = |shape: &[usize]| shape.iter().map(|n| n.to_string().len()).sum::<usize>();
            let of_delta: usize = delta.parts.values().map(|p| digits(p.shape())).sum();
            let of_said: usize = said.iter().map(|p| digits(&p.shape)).sum();
            assert!(delta.size_bytes() + of_delta <= most + of_said, "{spec} {shape:?}");
        }
    }
}

/// The claim counts a part of the bytes that are written, never more.
#[test]
fn claimed_bits_are_not_above_the_bits_of_the_parts() {
    for spec in specs() {
        for shape @ [rows, cols] in SHAPES.into_iter().chain([[64, 512], [512, 64]]) {
            let delta = encode(&spec, &gaussian("w", rows * cols, 0.01), shape);
            let claimed = spec.claimed_bits(shape, &delta.part_shapes());
            let bits = effective_bits(delta.size_bytes() as u64, (rows * cols) as u64);
            assert!(claimed >= 0.0 && claimed <= bits * (1.0 + 1e-9), "{spec} {shape:?}");
            assert_eq!(claimed == 0.0, rows * cols == 0, "{spec} {shape:?}");
        }
    }
}

#[test]
fn nan_and_infinity_are_refused_where_they_are() {
    for spec in specs() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut data = vec![0.1; 30 * 20];
            data[17 * 20 + 5] = bad;
            let got = spec.encode(&MatrixRef::new(&data, 30, 20).unwrap());
            assert!(matches!(got, Err(Error::NotFinite { row: 17, column: 5, .. })), "{spec}");
        }
    }
}

#[test]
fn a_source_that_fails_fails_the_encoding() {
    struct Broken;
    impl DeltaSource for Broken {
        fn shape(&self) -> [usize; 2] {
            [4, 4]
        }
        fn read_rows(&self, _: Range<usize>, _: &mut [f32]) -> Result<()> {
            Err(Error::Source("the disk is gone".into()))
        }
    }
    for spec in specs() {
        assert!(matches!(spec.encode(&Broken), Err(Error::Source(_))), "{spec}");
    }
}

#[test]
fn the_operator_is_the_decoded_matrix() {
    for spec in specs() {
        for shape @ [rows, cols] in SHAPES {
            let delta = encode(&spec, &gaussian("w", rows * cols, 0.01), shape);
            let prepared = spec.prepare(delta).unwrap();
            let decoded = decode(&*prepared);
            let matrix = MatrixRef::new(&decoded, rows, cols).unwrap();
            for n_rows in [1, 3, 64] {
                let x = gaussian("x", n_rows * cols, 1.0);
                let x = MatrixRef::new(&x, n_rows, cols).unwrap();
                let (want, mut magnitude) = naive::product(matrix, x);
                // What was in `y` before takes part in the rounding.
                magnitude.iter_mut().for_each(|m| *m += 0.5);
                let want: Vec<f64> = want.iter().map(|w| w + 0.5).collect();
                for backend in Backend::available() {
                    let mut y = vec![0.5; n_rows * rows];
                    let mut y_view = MatrixMut::new(&mut y, n_rows, rows).unwrap();
                    prepared.add_to(backend, x, &mut y_view);
                    #[allow(clippy::cast_precision_loss)]
                    let eps = 4.0 * (cols as f64 / 16.0 + 10.0) * f64::from(f32::EPSILON);
                    let outside = naive::first_outside(&y, &want, &magnitude, eps);
                    assert_eq!(outside, None, "{spec} {shape:?} {n_rows} {}", backend.name());
                }
            }
        }
    }
}

#[test]
fn every_altered_part_is_refused() {
    for spec in specs() {
        let delta = encode(&spec, &gaussian("w", 33 * 100, 0.01), [33, 100]);
        let refused = |what: &str, change: &dyn Fn(&mut EncodedDelta)| {
            let mut altered = delta.clone();
            change(&mut altered);
            assert!(
                matches!(spec.prepare(altered), Err(Error::Part(_))),
                "{spec}: {what} must be refused"
            );
        };
        refused("an extra part", &|d| {
            let part = Part::new(vec![1], PartData::U8(vec![0])).unwrap();
            d.parts.insert("extra".into(), part);
        });
        for (name, part) in &delta.parts {
            refused(&format!("{name} dropped"), &|d| {
                d.parts.remove(name);
            });
            refused(&format!("{name} shortened"), &|d| {
                let bytes = part.data().to_le_bytes();
                let shorter = &bytes[..bytes.len() - part.dtype().size_bytes()];
                let data = PartData::from_le_bytes(part.dtype(), shorter).unwrap();
                d.parts.insert(name.clone(), Part::new(vec![data.len()], data).unwrap());
            });
            refused(&format!("{name} of another shape"), &|d| {
                let mut shape = part.shape().to_vec();
                shape.insert(0, 1);
                let same = Part::new(shape, part.data().clone()).unwrap();
                d.parts.insert(name.clone(), same);
            });
            for dtype in DType::ALL.into_iter().filter(|t| *t != part.dtype()) {
                refused(&format!("{name} as {dtype}"), &|d| {
                    let zeros = vec![0; part.data().len() * dtype.size_bytes()];
                    let data = PartData::from_le_bytes(dtype, &zeros).unwrap();
                    d.parts.insert(name.clone(), Part::new(part.shape().to_vec(), data).unwrap());
                });
            }
            if part.dtype().is_float() {
                refused(&format!("{name} with NaN"), &|d| {
                    let nan = vec![0xff; part.size_bytes()];
                    let data = PartData::from_le_bytes(part.dtype(), &nan).unwrap();
                    d.parts.insert(name.clone(), Part::new(part.shape().to_vec(), data).unwrap());
                });
            }
        }
    }
}

/// Parts written by every released version decode to the same weights for ever.
///
/// Today's parts of every spec get a file when they have none; a file that is
/// there is never rewritten, whatever the encoder does by then.
#[test]
fn golden_files_decode_as_they_did() {
    let shape @ [rows, cols] = [12, 40];
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for spec in specs() {
        let name = spec.to_string().replace([':', ',', '='], "-");
        let path = dir.join(format!("{name}-v{}.safetensors", spec.codec().version()));
        if !path.exists() {
            assert!(std::env::var_os("CI").is_none(), "{} is not committed", path.display());
            let delta = encode(&spec, &gaussian("golden", rows * cols, 0.01), shape);
            let decoded = decode(&*spec.prepare(delta.clone()).unwrap());
            write_golden(&path, &spec, &delta, &decoded);
        }
    }
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let record = header.metadata().clone().unwrap();
        let written: CodecSpec = record["spec"].parse().unwrap();
        let version = record["version"].parse().unwrap();
        let (name, options) = (written.codec().name(), written.options().to_json());
        let spec = CodecSpec::from_record(name, version, options).unwrap();

        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut delta = EncodedDelta { shape, parts: BTreeMap::new() };
        let mut want = Vec::new();
        for (name, view) in file.iter() {
            let dtype: DType = view.dtype().to_string().parse().unwrap();
            match (name, PartData::from_le_bytes(dtype, view.data()).unwrap()) {
                ("decoded", PartData::F32(values)) => want = values,
                (name, data) => {
                    let part = Part::new(view.shape().to_vec(), data).unwrap();
                    delta.parts.insert(name.to_owned(), part);
                }
            }
        }
        assert_eq!(decode(&*spec.prepare(delta).unwrap()), want, "{}", path.display());
    }
}

fn write_golden(path: &Path, spec: &CodecSpec, delta: &EncodedDelta, decoded: &[f32]) {
    let mut parts = delta.parts.clone();
    let data = PartData::F32(decoded.to_vec());
    parts.insert("decoded".into(), Part::new(delta.shape.to_vec(), data).unwrap());
    let bytes: Vec<_> = parts
        .iter()
        .map(|(name, part)| {
            let dtype = match part.dtype() {
                DType::U8 => safetensors::Dtype::U8,
                DType::F16 => safetensors::Dtype::F16,
                DType::BF16 => safetensors::Dtype::BF16,
                DType::F32 => safetensors::Dtype::F32,
            };
            (name, dtype, part.shape().to_vec(), part.data().to_le_bytes())
        })
        .collect();
    let views = bytes.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let record = HashMap::from([
        ("spec".to_owned(), spec.to_string()),
        ("version".to_owned(), spec.codec().version().to_string()),
    ]);
    std::fs::write(path, safetensors::serialize(views, Some(record)).unwrap()).unwrap();
}
