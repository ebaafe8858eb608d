//! Checkpoint folders that are incomplete, damaged or hostile: each refusal has
//! its own error, and nothing panics.

use std::path::Path;

use crate::support::{
    Stored, safetensors, two_tensors, with_header, write_checkpoint, write_shards,
};
use onebase_format::{Checkpoint, Digest, Error};
use onebase_tensor::DType;
use safetensors::SafeTensorError;
use serde_json::json;
use tempfile::tempdir;

/// Why a checkpoint of one file with these bytes is refused.
fn refusal(model: &[u8]) -> Error {
    let dir = tempdir().unwrap();
    write_checkpoint(dir.path(), model);
    Checkpoint::open(dir.path()).unwrap_err()
}

/// What is wrong with the header of a file with these bytes.
fn header_refusal(model: &[u8]) -> SafeTensorError {
    match refusal(model) {
        Error::Header { path, source } => {
            assert!(path.ends_with("model.safetensors"), "{}", path.display());
            source
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_folder_without_configuration_is_no_checkpoint() {
    let dir = tempdir().unwrap();
    for path in [dir.path().to_owned(), dir.path().join("absent")] {
        let error = Checkpoint::open(&path).unwrap_err();
        let Error::NotA { path: got, expected: "checkpoint", missing: "config.json" } = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!(*got, path);
        assert!(error.hint().unwrap().contains("config.json"), "{:?}", error.hint());
    }
}

#[test]
fn a_malformed_configuration_is_refused() {
    for text in ["", "{", "{\"a\": 1} x", "\u{0}"] {
        let dir = tempdir().unwrap();
        write_checkpoint(dir.path(), &safetensors(&two_tensors()));
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        let Error::Json { path, .. } = &error else { panic!("{text:?}: {error:?}") };
        assert_eq!(*path, dir.path().join("config.json"));
    }
}

#[test]
fn weights_must_be_safetensors() {
    let dir = tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), "pickle").unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::NotA { missing: "model.safetensors", .. }), "{error:?}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("pytorch_model.bin") && hint.contains("save_pretrained"), "{hint}");
}

#[test]
fn a_missing_shard_is_named() {
    let dir = tempdir().unwrap();
    let here = [Stored::f32("a", &[2])];
    write_shards(dir.path(), &[("one", &here)], &json!({"a": "one", "b": "two"}));
    let error = Checkpoint::open(dir.path()).unwrap_err();
    let Error::MissingShard { index, shard } = &error else { panic!("{error:?}") };
    assert!(index.ends_with("model.safetensors.index.json"));
    assert_eq!(shard, "two");
    assert!(error.hint().is_some());
    // A folder of that name is no shard.
    std::fs::create_dir(dir.path().join("two")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::MissingShard { .. }), "{error:?}");
}

#[test]
fn index_and_shards_must_agree() {
    let shards: [(&str, &[Stored]); 2] =
        [("one", &[Stored::f32("a", &[2])]), ("two", &[Stored::f32("b", &[2])])];
    for (tensor, shard) in [("a", "two"), ("b", "one"), ("c", "one")] {
        let dir = tempdir().unwrap();
        let mut map = json!({"a": "one", "b": "two"});
        map[tensor] = json!(shard);
        // Both shards stay named, or the other one would not be read.
        map["z"] = json!(if shard == "one" { "two" } else { "one" });
        write_shards(dir.path(), &shards, &map);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        let Error::IndexMismatch { tensor: got, shard: got_shard, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!((got.as_str(), got_shard.as_str()), (tensor, shard));
    }
}

#[test]
fn a_shard_outside_the_folder_is_refused() {
    let dir = tempdir().unwrap();
    let outside = dir.path().join("outside.safetensors");
    std::fs::write(&outside, safetensors(&[Stored::f32("a", &[2])])).unwrap();
    let absolute = outside.to_str().unwrap();
    let names =
        ["../outside.safetensors", absolute, "sub/x", "x/", "./x", "x/../y", "..", ".", "/", ""];
    for name in names {
        let folder = dir.path().join("checkpoint");
        write_shards(&folder, &[], &json!({ "a": name }));
        let error = Checkpoint::open(&folder).unwrap_err();
        let Error::UnsafeName { path, name: got } = &error else { panic!("{name:?}: {error:?}") };
        assert!(path.ends_with("model.safetensors.index.json"));
        assert_eq!(got, name);
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let dir = tempdir().unwrap();
    let shards: [(&str, &[Stored]); 2] = [
        ("one", &[Stored::f32("a", &[2])]),
        ("two", &[Stored::f32("a", &[2]), Stored::f32("b", &[2])]),
    ];
    write_shards(dir.path(), &shards, &json!({"a": "one", "b": "two"}));
    let error = Checkpoint::open(dir.path()).unwrap_err();
    let Error::DuplicateTensor { path, other, tensor } = &error else { panic!("{error:?}") };
    assert!(path.ends_with("two") && other.ends_with("one"), "{error}");
    assert_eq!(tensor, "a");
}

#[test]
fn a_malformed_index_is_refused() {
    for text in ["", "[]", "{}", "{\"weight_map\": 1}", "{\"weight_map\": {\"a\": 1}}"] {
        let dir = tempdir().unwrap();
        write_checkpoint(dir.path(), &safetensors(&two_tensors()));
        let index = dir.path().join("model.safetensors.index.json");
        std::fs::write(&index, text).unwrap();
        // Beside a single file an index does not count.
        Checkpoint::open(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        let Error::Json { path, .. } = &error else { panic!("{text:?}: {error:?}") };
        assert_eq!(*path, index);
    }
}

#[test]
fn a_file_cut_anywhere_or_continued_is_refused() {
    let whole = safetensors(&two_tensors());
    let data_start = whole.len() - 24 - 12;
    for len in 0..whole.len() {
        let source = header_refusal(&whole[..len]);
        match source {
            SafeTensorError::HeaderTooSmall => assert!(len < 8, "{len}"),
            SafeTensorError::InvalidHeaderLength => {
                assert!((8..data_start).contains(&len), "{len}");
            }
            SafeTensorError::MetadataIncompleteBuffer => assert!(len >= data_start, "{len}"),
            other => panic!("{len}: {other:?}"),
        }
    }
    for more in [1, 4, 4096] {
        let mut longer = whole.clone();
        longer.resize(whole.len() + more, 0);
        let source = header_refusal(&longer);
        assert!(matches!(source, SafeTensorError::MetadataIncompleteBuffer), "{source:?}");
    }
    let error = refusal(&whole[..40]);
    assert!(error.to_string().ends_with("model.safetensors: bad safetensors header"), "{error}");
    assert!(error.hint().unwrap().contains("fetch it again"));
}

#[test]
fn a_header_that_lies_about_its_length_is_refused() {
    let whole = safetensors(&two_tensors());
    let with_length = |n: u64| {
        let mut file = whole.clone();
        file[..8].copy_from_slice(&n.to_le_bytes());
        file
    };
    let rest = whole.len() as u64 - 8;
    for (n, too_large) in [
        (rest + 1, false),
        (99_999_999, false),
        (100_000_001, true),
        (u64::MAX - 7, true),
        (u64::MAX, true),
    ] {
        match header_refusal(&with_length(n)) {
            SafeTensorError::HeaderTooLarge => assert!(too_large, "{n}"),
            SafeTensorError::InvalidHeaderLength => assert!(!too_large, "{n}"),
            other => panic!("{n}: {other:?}"),
        }
    }
    // Data in the header, or header in the data.
    for n in [0, 1, rest - 36 - 1, rest - 36 + 1, rest] {
        let source = header_refusal(&with_length(n));
        let malformed = matches!(
            source,
            SafeTensorError::InvalidHeaderDeserialization(_) | SafeTensorError::InvalidHeader(_)
        );
        assert!(malformed, "{n}: {source:?}");
    }
}

#[test]
fn a_header_that_is_no_json_object_is_refused() {
    let source = header_refusal(&with_header(b"{\"\xff\": 1}", &[]));
    assert!(matches!(source, SafeTensorError::InvalidHeader(_)), "{source:?}");
    for header in [
        "",
        "x",
        "[]",
        "{\"a\": 1}",
        "{\"a\": {\"dtype\": \"F32\", \"shape\": [1]}}",
        "{\"a\": {\"dtype\": \"F32\", \"shape\": [-1], \"data_offsets\": [0, 4]}}",
        "{\"a\": {\"dtype\": \"F32\", \"shape\": [1.5], \"data_offsets\": [0, 4]}}",
        "{\"a\": {\"dtype\": \"Q9\", \"shape\": [1], \"data_offsets\": [0, 4]}}",
        "{\"a\": {\"dtype\": \"F32\", \"shape\": [18446744073709551616], \"data_offsets\": [0, 4]}}",
    ] {
        let source = header_refusal(&with_header(header.as_bytes(), &[0; 4]));
        let malformed = matches!(source, SafeTensorError::InvalidHeaderDeserialization(_));
        assert!(malformed, "{header}: {source:?}");
    }
}

/// A header of U8 and other tensors given as type, shape and offsets.
fn header(tensors: &[(&str, &[usize], [usize; 2])]) -> Vec<u8> {
    let entries = tensors.iter().enumerate().map(|(i, (dtype, shape, offsets))| {
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        (format!("t{i}"), entry)
    });
    serde_json::Value::Object(entries.collect()).to_string().into_bytes()
}

#[test]
fn offsets_that_overlap_or_leave_holes_are_refused() {
    let cases: [(&str, [[usize; 2]; 2]); 6] = [
        ("overlap", [[0, 4], [2, 6]]),
        ("twice", [[0, 4], [0, 4]]),
        ("hole", [[0, 4], [5, 9]]),
        ("late start", [[1, 5], [5, 9]]),
        ("backwards", [[0, 4], [8, 4]]),
        ("far backwards", [[0, 4], [4, 0]]),
    ];
    for (what, [a, b]) in cases {
        let header = header(&[("U8", &[4], a), ("U8", &[4], b)]);
        for n_data in [4, 8, 9] {
            let source = header_refusal(&with_header(&header, &vec![0; n_data]));
            let offset = matches!(source, SafeTensorError::InvalidOffset(_));
            // A tensor that ends before it begins is also one of the wrong size.
            assert!(offset || what.contains("backwards"), "{what}: {source:?}");
        }
    }
    let beyond = header(&[("U8", &[4], [0, 4]), ("U8", &[9], [4, 13])]);
    let source = header_refusal(&with_header(&beyond, &[0; 8]));
    assert!(matches!(source, SafeTensorError::MetadataIncompleteBuffer), "{source:?}");
}

#[test]
fn sizes_that_overflow_are_refused() {
    let half = 1 << (usize::BITS / 2);
    for shape in [&[half, half][..], &[usize::MAX, 2], &[usize::MAX, usize::MAX, 0]] {
        let source = header_refusal(&with_header(&header(&[("U8", shape, [0, 0])]), &[]));
        assert!(matches!(source, SafeTensorError::ValidationOverflow), "{shape:?}: {source:?}");
    }
    // The elements can be counted, their bytes cannot.
    let source = header_refusal(&with_header(&header(&[("F32", &[1 << 62], [0, 0])]), &[]));
    assert!(matches!(source, SafeTensorError::ValidationOverflow), "{source:?}");
    // Each tensor has a size, header and data together have none.
    let n = usize::MAX / 8;
    let tensors: Vec<(&str, &[usize], [usize; 2])> =
        (0..8).map(|i| ("U8", std::slice::from_ref(&n), [i * n, (i + 1) * n])).collect();
    let source = header_refusal(&with_header(&header(&tensors), &[0; 8]));
    assert!(matches!(source, SafeTensorError::MetadataIncompleteBuffer), "{source:?}");
}

#[test]
fn a_shape_must_fill_its_bytes() {
    for (dtype, shape) in
        [("F32", &[2][..]), ("U8", &[3]), ("U8", &[]), ("U8", &[0]), ("F16", &[2, 2])]
    {
        let source = header_refusal(&with_header(&header(&[(dtype, shape, [0, 4])]), &[0; 4]));
        assert!(matches!(source, SafeTensorError::TensorInvalidInfo), "{shape:?}: {source:?}");
    }
    let source = header_refusal(&with_header(&header(&[("F4", &[3], [0, 1])]), &[0]));
    assert!(matches!(source, SafeTensorError::MisalignedSlice), "{source:?}");
}

#[test]
fn types_that_no_weight_has_are_refused_when_asked_for() {
    for (dtype, size) in [("F64", 8), ("I64", 8), ("F8_E4M3", 1), ("U8", 1), ("BOOL", 1)] {
        let dir = tempdir().unwrap();
        let odd = Stored::new("odd", dtype, &[2], vec![0; 2 * size]);
        write_checkpoint(dir.path(), &safetensors(&[odd, Stored::f32("fine", &[2])]));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.tensor("fine").unwrap().dtype(), DType::F32);
        let errors = [checkpoint.tensor("odd").err(), checkpoint.digests(&["fine", "odd"]).err()];
        for error in errors.map(Option::unwrap) {
            let Error::UnsupportedDType { path, tensor, got } = &error else { panic!("{error:?}") };
            assert!(path.ends_with("model.safetensors"));
            assert_eq!((tensor.as_str(), got.as_str()), ("odd", dtype));
            assert!(error.to_string().contains("expected BF16, F16 or F32"), "{error}");
            assert!(error.hint().is_some());
        }
    }
}

#[test]
fn a_tensor_that_is_not_there_is_named() {
    let dir = tempdir().unwrap();
    write_checkpoint(dir.path(), &safetensors(&two_tensors()));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(!checkpoint.contains("c"));
    let error = checkpoint.tensor("c").unwrap_err();
    let Error::MissingTensor { path, tensor } = &error else { panic!("{error:?}") };
    assert_eq!((path.as_path(), tensor.as_str()), (dir.path(), "c"));
}

fn digest(dir: &Path, tensor: &Stored) -> Digest {
    write_checkpoint(dir, &safetensors(std::slice::from_ref(tensor)));
    Checkpoint::open(dir).unwrap().tensor(&tensor.name).unwrap().digest().unwrap()
}

#[test]
fn a_digest_covers_bytes_type_and_shape() {
    let dir = tempdir().unwrap();
    let original = Stored::new("a", "BF16", &[2, 3], (1..13).collect());
    let mut altered: Vec<Stored> = (0..12)
        .map(|i| {
            let mut other = original.clone();
            other.bytes[i] ^= 1;
            other
        })
        .collect();
    altered.push(Stored { dtype: "F16".into(), ..original.clone() });
    altered.push(Stored { dtype: "F32".into(), shape: vec![3], ..original.clone() });
    for shape in [vec![3, 2], vec![6], vec![1, 6], vec![2, 3, 1], vec![23]] {
        let bytes = vec![7; 2 * shape.iter().product::<usize>()];
        altered.push(Stored { shape, bytes, ..original.clone() });
    }
    let mut seen: Vec<Digest> = altered.iter().map(|t| digest(dir.path(), t)).collect();
    seen.push(digest(dir.path(), &original));
    let n = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), n);
    assert_eq!(
        digest(dir.path(), &original),
        Digest::of(b"BF16 2x3\n\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c")
    );
}

#[test]
fn a_digest_depends_on_neither_name_nor_place() {
    let dir = tempdir().unwrap();
    // Longer than what is read at a time, and no whole number of it.
    let large = Stored::f32("large", &[1, 300_001]);
    let alone = digest(&dir.path().join("alone"), &large);
    let shards: [(&str, &[Stored]); 2] = [
        ("one", &[Stored::f32("b", &[5]), Stored { name: "c".into(), ..large.clone() }]),
        ("two", &[Stored::f32("a", &[2])]),
    ];
    let map = json!({"a": "two", "b": "one", "c": "one"});
    write_shards(&dir.path().join("shards"), &shards, &map);
    let checkpoint = Checkpoint::open(&dir.path().join("shards")).unwrap();
    let digests = checkpoint.digests(&["a", "c"]).unwrap();
    assert_eq!(digests[1], alone);
    let mut text = b"F32 1x300001\n".to_vec();
    text.extend_from_slice(&large.bytes);
    assert_eq!(alone, Digest::of(&text));
    // Both ways to read give the same bytes.
    let tensor = checkpoint.tensor("c").unwrap();
    let mut read = vec![0; 1000];
    tensor.read(999, &mut read).unwrap();
    assert_eq!(read, large.bytes[999..1999]);
    assert_eq!(&*tensor.bytes(), &large.bytes[..]);
}
