//! Artifacts that are incomplete, altered or hostile: each refusal has its own
//! error, and nothing panics.

use std::collections::BTreeMap;
use std::path::Path;

use crate::support::{
    LINEAR, REST, Stored, artifact, base_digest, contents, edit_manifest, edit_tensors,
    run_of_artifact, safetensors, tensors, write_checkpoint, written,
};
use onebase_format::artifact::{Artifact, ArtifactWriter, MANIFEST_FILE, Shard};
use onebase_format::{Checkpoint, Digest, Error, StagedFolder, TensorEntry, TensorWriter};
use onebase_tensor::{DType, PartData};
use serde_json::{Value, json};
use tempfile::tempdir;

/// Why a changed manifest is refused.
fn manifest_refusal(edit: impl FnOnce(&mut Value)) -> Error {
    let dir = written();
    edit_manifest(&dir.path().join("a"), edit);
    Artifact::open(&dir.path().join("a")).unwrap_err()
}

/// The entry and the problem of a manifest's refusal.
fn contradiction(error: Error) -> (String, String) {
    match error {
        Error::Manifest { path, entry, problem } => {
            assert!(path.ends_with(MANIFEST_FILE));
            (entry, problem)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let dir = tempdir().unwrap();
    artifact(&dir.path().join("a"));
    artifact(&dir.path().join("b"));
    let files = contents(&dir.path().join("a"));
    assert_eq!(files, contents(&dir.path().join("b")));
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["README.md", "config.json", LINEAR, "onebase.json", REST]);
}

#[test]
fn what_was_written_is_read() {
    let dir = written();
    let artifact = Artifact::open(&dir.path().join("a")).unwrap();
    artifact.check_files().unwrap();
    let (codec, delta) = artifact.delta("layer.up.weight").unwrap().unwrap();
    assert_eq!((codec.name.as_str(), delta.shape), ("one", [3, 8]));
    assert_eq!(*delta.parts["codes"].data(), PartData::U8((0..12).collect()));
    assert_eq!(*delta.parts["scale"].data(), PartData::F32(vec![0.0, 1.0, 2.0]));
    let (codec, delta) = artifact.delta("embed.weight").unwrap().unwrap();
    assert_eq!((codec.name.as_str(), delta.shape), ("two", [4, 8]));
    let added = artifact.added_rows("embed.weight").unwrap().unwrap();
    assert_eq!((added.dtype, added.shape, added.bytes), (DType::BF16, vec![2, 8], vec![9; 32]));
    assert_eq!(artifact.exact("norm.weight").unwrap().unwrap().bytes, [1; 16]);
    assert!(artifact.delta("layer.down.weight").unwrap().is_none());
    assert!(artifact.exact("layer.down.weight").unwrap().is_none());
    assert!(artifact.added_rows("layer.up.weight").unwrap().is_none());
    let sizes = artifact.sizes();
    let files = contents(&dir.path().join("a"));
    assert_eq!(sizes.total_bytes, files.values().map(|f| f.len() as u64).sum::<u64>());
    assert_eq!(sizes.linear_bytes, files[LINEAR].len() as u64);
    assert_eq!((sizes.n_weights_total, sizes.n_weights_linear), (104, 48));
    let error = artifact.record("other").unwrap_err();
    assert!(
        matches!(&error, Error::MissingTensor { tensor, .. } if tensor == "other"),
        "{error:?}"
    );
}

#[test]
fn a_folder_without_manifest_is_no_artifact() {
    let dir = tempdir().unwrap();
    for path in [dir.path().to_owned(), dir.path().join("absent")] {
        let error = Artifact::open(&path).unwrap_err();
        assert!(matches!(error, Error::NotA { missing: "onebase.json", .. }), "{error:?}");
        assert!(error.hint().unwrap().contains("onebase compress"));
    }
}

#[test]
fn a_newer_manifest_is_called_newer_and_not_malformed() {
    let error = manifest_refusal(|m| {
        m["version"] = json!(3);
        m["tensors"] = json!("a new way to say it");
    });
    assert!(matches!(error, Error::NewerFormat { newest: 2, got: 3, .. }), "{error:?}");
    assert!(error.to_string().ends_with("format version 3, this program reads up to 2"));
    assert!(error.hint().unwrap().contains("newer onebase"));
    let error = manifest_refusal(|m| m["version"] = json!(u64::MAX));
    assert!(matches!(error, Error::NewerFormat { got: u64::MAX, .. }), "{error:?}");
}

#[test]
fn another_format_is_named() {
    let error = manifest_refusal(|m| m["format"] = json!("other"));
    let Error::OtherFormat { expected: "onebase-delta", got, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(got, "other");
    for no_format in [json!(null), json!(1)] {
        let error = manifest_refusal(|m| m["format"] = no_format);
        assert!(matches!(error, Error::OtherFormat { .. }), "{error:?}");
    }
}

#[test]
fn a_malformed_manifest_is_refused() {
    let edits: [fn(&mut Value); 8] = [
        |m| m["version"] = json!("1"),
        |m| m["version"] = json!(-1),
        |m| m["files"] = json!([]),
        |m| m["files"][LINEAR]["bytes"] = json!(-1),
        |m| m["files"][LINEAR]["blake3"] = json!("00"),
        |m| m["tensors"]["norm.weight"]["stored"] = json!("otherwise"),
        |m| m["tensors"]["norm.weight"]["role"] = json!("bias"),
        |m| drop(m["tensors"]["norm.weight"].as_object_mut().unwrap().remove("base")),
    ];
    for edit in edits {
        let error = manifest_refusal(edit);
        assert!(matches!(error, Error::Json { .. }), "{error:?}");
    }
    let dir = written();
    let path = dir.path().join("a").join(MANIFEST_FILE);
    let text = std::fs::read(&path).unwrap();
    for len in [0, 1, text.len() / 2, text.len() - 2] {
        std::fs::write(&path, &text[..len]).unwrap();
        let error = Artifact::open(&dir.path().join("a")).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{len}: {error:?}");
    }
}

#[test]
fn a_file_outside_the_folder_is_refused() {
    for name in ["../up.safetensors", "/absolute", "sub/file", "..", ".", "", "./x"] {
        for list in ["files", "inherited"] {
            let error = manifest_refusal(|m| {
                let digest = Digest::of(b"").to_string();
                m[list][name] = match list {
                    "files" => json!({"bytes": 0, "blake3": digest}),
                    _ => json!(digest),
                };
            });
            let Error::UnsafeName { name: got, .. } = &error else { panic!("{name}: {error:?}") };
            assert_eq!(got, name);
        }
    }
}

#[test]
fn a_file_that_is_missing_or_of_another_length_is_refused() {
    let dir = written();
    let folder = dir.path().join("a");
    for name in [LINEAR, REST, "config.json"] {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let error = Artifact::open(&folder).unwrap_err();
        let Error::Io { action: "read", path: got, source } = &error else { panic!("{error:?}") };
        assert_eq!(*got, path);
        assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
        let mut longer = bytes.clone();
        longer.push(0);
        for other in [&bytes[..0], &bytes[..bytes.len() - 1], &longer[..]] {
            std::fs::write(&path, other).unwrap();
            let error = Artifact::open(&folder).unwrap_err();
            let Error::FileSize { path: got_path, expected, got } = &error else {
                panic!("{error:?}")
            };
            assert_eq!(*got_path, path);
            assert_eq!((*expected, *got), (bytes.len() as u64, other.len() as u64));
            assert!(error.hint().unwrap().contains("fetch it again"));
        }
        std::fs::write(&path, bytes).unwrap();
    }
    Artifact::open(&folder).unwrap();
}

#[test]
fn any_flipped_byte_is_found() {
    let dir = written();
    let folder = dir.path().join("a");
    for name in [LINEAR, REST, "config.json"] {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            std::fs::write(&path, flipped).unwrap();
            // A header may be damaged enough not to be read at all.
            let error = match Artifact::open(&folder) {
                Ok(artifact) => artifact.check_files().unwrap_err(),
                Err(error) => error,
            };
            match error {
                Error::FileDigest { path: got, expected, .. } => {
                    assert_eq!(got, path);
                    assert_eq!(expected, Digest::of(&bytes));
                }
                Error::Header { path: got, .. } => assert_eq!(got, path),
                // The name of a tensor that the manifest lists, or its type.
                Error::MissingTensor { path: got, .. } => assert_eq!(got, path),
                Error::Manifest { entry, .. } => assert_eq!(entry, "norm.weight"),
                other => panic!("{name}, byte {at}: {other:?}"),
            }
        }
        std::fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn side_files_are_checked_when_read() {
    let dir = written();
    let (folder, base_dir) = (dir.path().join("a"), dir.path().join("base"));
    write_checkpoint(&base_dir, &safetensors(&[]));
    let base = Checkpoint::open(&base_dir).unwrap();
    let artifact = Artifact::open(&folder).unwrap();
    assert_eq!(artifact.side_file(&base, "vocab.json").unwrap(), None);
    let own = artifact.side_file(&base, "config.json").unwrap();
    assert_eq!(own.unwrap(), b"{\"hidden_size\": 8}");
    // Inherited from the base, which lacks it.
    let error = artifact.side_file(&base, "tokenizer.json").unwrap_err();
    let Error::Io { path, source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*path, base_dir.join("tokenizer.json"));
    assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
    std::fs::write(base_dir.join("tokenizer.json"), "{}").unwrap();
    assert_eq!(artifact.side_file(&base, "tokenizer.json").unwrap().unwrap(), b"{}");
    // Inherited from the base, which has another one now.
    std::fs::write(base_dir.join("tokenizer.json"), "{ }").unwrap();
    let error = artifact.side_file(&base, "tokenizer.json").unwrap_err();
    let Error::FileDigest { path, expected, got } = &error else { panic!("{error:?}") };
    assert_eq!(*path, base_dir.join("tokenizer.json"));
    assert_eq!((*expected, *got), (Digest::of(b"{}"), Digest::of(b"{ }")));
    // Its own, of the same length.
    std::fs::write(folder.join("config.json"), "{\"hidden_size\": 9}").unwrap();
    let error = artifact.side_file(&base, "config.json").unwrap_err();
    let Error::FileDigest { path, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*path, folder.join("config.json"));
}

#[test]
fn records_must_agree_with_the_files() {
    let tensor = |name: &'static str, field: &'static str, value: Value| {
        contradiction(manifest_refusal(|m| m["tensors"][name][field] = value))
    };
    let (entry, problem) = tensor("norm.weight", "dtype", json!("F16"));
    assert_eq!((entry.as_str(), problem.contains("holds it as BF16 [8]")), ("norm.weight", true));
    let (_, problem) = tensor("norm.weight", "shape", json!([2, 4]));
    assert!(problem.contains("holds it as BF16 [8]"), "{problem}");
    let (_, problem) = tensor("norm.weight", "dtype", json!("F64"));
    assert!(problem.contains("unsupported element type \"F64\""), "{problem}");
    let (_, problem) = tensor("layer.down.weight", "dtype", json!("U8"));
    assert!(problem.contains("a weight of type U8"), "{problem}");
    for name in ["norm.weight", "layer.up.weight"] {
        let (entry, problem) = tensor(name, "file", json!("absent.safetensors"));
        assert_eq!(entry, name);
        assert!(problem.contains("names file \"absent.safetensors\""), "{problem}");
        // A file of the artifact that holds no tensors.
        let (_, problem) = tensor(name, "file", json!("config.json"));
        assert!(problem.contains("names file \"config.json\""), "{problem}");
    }
    let error = manifest_refusal(|m| m["tensors"]["norm.weight"]["file"] = json!(LINEAR));
    assert!(matches!(error, Error::MissingTensor { .. }), "{error:?}");
    for codec in [2, usize::MAX] {
        let (entry, problem) = tensor("layer.up.weight", "codec", json!(codec));
        assert_eq!(entry, "layer.up.weight");
        assert_eq!(problem, format!("names codec {codec}, which is not listed"));
    }
    for added in [7, usize::MAX] {
        let (entry, problem) = tensor("embed.weight", "added_rows", json!(added));
        assert_eq!(entry, "embed.weight");
        assert_eq!(problem, format!("{added} added rows in shape [6, 8]"));
    }
    for shape in [json!([]), json!([24]), json!([3, 8, 1])] {
        let (_, problem) = tensor("layer.up.weight", "shape", shape);
        assert!(problem.contains("0 added rows in shape"), "{problem}");
    }
    for (role, shape, added) in [
        ("vector", json!([6, 8]), 0),
        ("vector", json!([1, 8]), 0),
        ("vector", json!([]), 0),
        ("vector", json!([8]), 1),
        ("embedding", json!([8]), 0),
        ("head", json!([8]), 8),
    ] {
        let (entry, problem) = contradiction(manifest_refusal(|m| {
            m["tensors"]["embed.weight"]["role"] = json!(role);
            m["tensors"]["embed.weight"]["shape"] = shape.clone();
            m["tensors"]["embed.weight"]["added_rows"] = json!(added);
        }));
        assert_eq!(entry, "embed.weight");
        let expected = match (role, shape.as_array().map(Vec::len)) {
            ("vector", Some(1)) => "added rows of a vector",
            ("vector", _) => "a router, expected exact",
            _ => "added rows in shape",
        };
        assert!(problem.contains(expected), "{role} {shape}: {problem}");
    }
}

#[test]
fn shapes_that_overflow_are_refused() {
    let huge = json!([usize::MAX, 2]);
    for name in ["layer.up.weight", "layer.down.weight", "norm.weight", "embed.weight"] {
        let (entry, problem) =
            contradiction(manifest_refusal(|m| m["tensors"][name]["shape"] = huge.clone()));
        assert_eq!(entry, name);
        assert!(problem.contains("overflows"), "{problem}");
    }
    // Each can be counted, their sum cannot.
    let dir = written();
    edit_manifest(&dir.path().join("a"), |m| {
        let mut unchanged = m["tensors"]["layer.down.weight"].clone();
        unchanged["shape"] = json!([usize::MAX]);
        m["tensors"]["x"] = unchanged.clone();
        m["tensors"]["y"] = unchanged;
    });
    let artifact = Artifact::open(&dir.path().join("a")).unwrap();
    assert_eq!(artifact.sizes().n_weights_total, u64::MAX);
}

#[test]
fn what_a_re_signed_file_lacks_is_missed_when_read() {
    let dir = written();
    let folder = dir.path().join("a");
    edit_tensors(&folder, LINEAR, |list| list.retain(|t| t.name != "layer.up.scale"));
    let artifact = Artifact::open(&folder).unwrap();
    artifact.check_files().unwrap();
    let error = artifact.delta("layer.up.weight").unwrap_err();
    let Error::MissingTensor { path, tensor } = &error else { panic!("{error:?}") };
    assert!(path.ends_with(LINEAR));
    assert_eq!(tensor, "layer.up.scale");

    let dir = written();
    let folder = dir.path().join("a");
    edit_tensors(&folder, REST, |list| list.retain(|t| t.name != "embed.added_rows"));
    let artifact = Artifact::open(&folder).unwrap();
    artifact.delta("embed.weight").unwrap().unwrap();
    let error = artifact.added_rows("embed.weight").unwrap_err();
    let missing =
        matches!(&error, Error::MissingTensor { tensor, .. } if tensor == "embed.added_rows");
    assert!(missing, "{error:?}");

    // A tensor stored as it is, is looked for at once.
    edit_tensors(&folder, REST, |list| list.retain(|t| t.name != "norm.weight"));
    let error = Artifact::open(&folder).unwrap_err();
    assert!(matches!(&error, Error::MissingTensor { tensor, .. } if tensor == "norm.weight"));
}

/// Replaces a tensor of the file of embeddings and norm.
fn replaced(dir: &Path, name: &str, dtype: &str, shape: &[usize], n_bytes: usize) {
    edit_tensors(dir, REST, |list| {
        let tensor = list.iter_mut().find(|t| t.name == name).unwrap();
        *tensor = Stored::new(name, dtype, shape, vec![0; n_bytes]);
    });
}

#[test]
fn added_rows_of_another_type_or_shape_are_refused() {
    let cases: [(&str, &[usize], usize, &str); 4] = [
        ("F16", &[2, 8], 32, "embed.added_rows: expected type BF16, got F16"),
        ("BF16", &[1, 8], 16, "added rows: expected [2, 8], got [1, 8]"),
        ("BF16", &[8, 2], 32, "added rows: expected [2, 8], got [8, 2]"),
        ("BF16", &[16], 32, "added rows: expected [2, 8], got [16]"),
    ];
    for (dtype, shape, n_bytes, expected) in cases {
        let dir = written();
        let folder = dir.path().join("a");
        replaced(&folder, "embed.added_rows", dtype, shape, n_bytes);
        let artifact = Artifact::open(&folder).unwrap();
        let (entry, problem) = contradiction(artifact.added_rows("embed.weight").unwrap_err());
        assert_eq!((entry.as_str(), problem.as_str()), ("embed.weight", expected));
    }
}

#[test]
fn an_exact_tensor_of_another_type_or_shape_is_refused() {
    for (dtype, shape) in [("F16", &[8][..]), ("BF16", &[4, 2]), ("F32", &[4])] {
        let dir = written();
        let folder = dir.path().join("a");
        replaced(&folder, "norm.weight", dtype, shape, 16);
        let (entry, problem) = contradiction(Artifact::open(&folder).unwrap_err());
        assert_eq!(entry, "norm.weight");
        assert_eq!(problem, format!("{REST} holds it as {dtype} {shape:?}"));
    }
}

#[test]
fn a_part_of_a_type_that_no_part_has_is_refused() {
    let dir = written();
    let folder = dir.path().join("a");
    replaced(&folder, "embed.scale", "F64", &[4], 32);
    let error = Artifact::open(&folder).unwrap().delta("embed.weight").unwrap_err();
    let Error::UnsupportedDType { path, tensor, got } = &error else { panic!("{error:?}") };
    assert!(path.ends_with(REST));
    assert_eq!((tensor.as_str(), got.as_str()), ("embed.scale", "F64"));
    // Any other is given to the codec as it is, which knows what it wrote.
    replaced(&folder, "embed.scale", "F16", &[2, 1], 4);
    let artifact = Artifact::open(&folder).unwrap();
    let (_, delta) = artifact.delta("embed.weight").unwrap().unwrap();
    assert_eq!(delta.parts["scale"].shape(), [2, 1]);
    assert_eq!(delta.parts["scale"].dtype(), DType::F16);
}

#[test]
fn another_base_is_refused_with_the_tensor_that_differs() {
    let dir = written();
    let artifact = Artifact::open(&dir.path().join("a")).unwrap();
    let base = Path::new("base");
    let names = ["embed.weight", "layer.down.weight", "layer.up.weight", "norm.weight"];
    let mut digests: BTreeMap<&str, Digest> =
        names.into_iter().map(|name| (name, base_digest(name))).collect();
    artifact.check_base_digests(base, &digests).unwrap();
    for name in names {
        let right = digests.insert(name, Digest::of(b"other")).unwrap();
        let error = artifact.check_base_digests(base, &digests).unwrap_err();
        let Error::OtherBase { artifact: path, base: got_base, tensor, expected, got } = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!((path.as_path(), got_base.as_path()), (artifact.dir(), base));
        assert_eq!((tensor.as_str(), *expected, *got), (name, right, Digest::of(b"other")));
        assert!(error.hint().unwrap().contains("exact base"));
        digests.remove(name);
        let error = artifact.check_base_digests(base, &digests).unwrap_err();
        assert!(matches!(&error, Error::MissingTensor { tensor, .. } if tensor == name));
        digests.insert(name, right);
    }
}

#[test]
fn a_written_file_is_valid_and_aligned() {
    let dir = tempdir().unwrap();
    for n_tensors in 0..20 {
        let path = dir.path().join(format!("{n_tensors}.safetensors"));
        let mut entries = Vec::new();
        let mut expected: Vec<Stored> = Vec::new();
        for i in 0..n_tensors {
            let dtype = DType::ALL[i % 4];
            let shape = [[i, 3], [i + 1, 1]][i % 2];
            // Names that JSON must escape.
            let name = format!("tensor \"{i:02}\" ∂\n");
            let entry = TensorEntry { name: name.clone(), dtype, shape: shape.to_vec() };
            let bytes = vec![u8::try_from(i).unwrap(); entry.size_bytes()];
            entries.push(entry);
            expected.push(Stored::new(&name, dtype.name(), &shape, bytes));
        }
        let mut writer = TensorWriter::create(&path, &entries).unwrap();
        for tensor in &expected {
            let (a, b) = tensor.bytes.split_at(tensor.bytes.len() / 2);
            writer.write(a).unwrap();
            writer.write(b).unwrap();
        }
        let n_data: usize = expected.iter().map(|t| t.bytes.len()).sum();
        let (len, digest) = writer.finish().unwrap();
        let file = std::fs::read(&path).unwrap();
        assert_eq!((len, digest), (file.len() as u64, Digest::of(&file)));
        assert_eq!((file.len() - n_data) % 64, 0);
        assert_eq!(tensors(&file), expected);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 20);
}

#[test]
fn a_dropped_writer_leaves_nothing_under_the_name() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("out");
    let run = run_of_artifact(Shard::WHOLE);
    let mut writer = ArtifactWriter::open(&target, &run, false).unwrap();
    writer.put_file("config.json", b"{}").unwrap();
    assert!(matches!(ArtifactWriter::open(&target, &run, false), Err(Error::Busy { .. })));
    assert!(matches!(ArtifactWriter::open(&target, &run, true), Err(Error::Busy { .. })));
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_that_is_there_is_never_written() {
    let dir = written();
    let before = contents(&dir.path().join("a"));
    let run = run_of_artifact(Shard::WHOLE);
    let error = ArtifactWriter::open(&dir.path().join("a"), &run, true).unwrap_err();
    let Error::Exists { path } = &error else { panic!("{error:?}") };
    assert_eq!(*path, dir.path().join("a"));
    assert!(error.hint().unwrap().contains("another output"));
    assert_eq!(contents(&dir.path().join("a")), before);
    // Nor one that appears while it is written.
    let staged = StagedFolder::create(&dir.path().join("b")).unwrap();
    artifact(&dir.path().join("c"));
    std::fs::rename(dir.path().join("c"), dir.path().join("b")).unwrap();
    let error = staged.commit().unwrap_err();
    assert!(matches!(error, Error::Io { action: "rename", .. }), "{error:?}");
    assert_eq!(contents(&dir.path().join("b")), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}
