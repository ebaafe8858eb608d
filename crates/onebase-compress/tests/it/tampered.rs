//! Artifacts that were altered, whoever altered them also having updated lengths
//! and digests, and bases that are not the one: refused by all who read them.

use crate::support::{EMBEDDING, Folder, HEAD, Memory, NORM, SAME, Stored, UP, of_files};
use onebase_codec::{CODECS, Error as CodecError, Kind};
use onebase_compress::Error;
use onebase_format::Digest;
use onebase_format::Error as FileError;
use onebase_format::artifact::Artifact;
use onebase_model::{Error as ModelError, TextModel};
use onebase_tensor::{DType, PartError};
use serde_json::{Value, json};

const LINEAR: &str = "linear-00001.safetensors";
const REST: &str = "rest-00001.safetensors";

/// Every codec with its defaults and with each choice of its options.
fn codecs() -> Vec<String> {
    let mut specs = Vec::new();
    for codec in CODECS {
        specs.push(codec.name().to_owned());
        for option in codec.options() {
            if let Kind::Choice(words) = option.kind {
                let others = words[1..].iter();
                specs.extend(others.map(|w| format!("{}:{}={w}", codec.name(), option.name)));
            }
        }
    }
    assert!(specs.len() >= 5, "{specs:?}");
    specs
}

/// All readers refuse an artifact for what is in its files.
fn file_refusals(folder: &Folder, check: impl Fn(&FileError)) {
    let (verify, restore, tenant) = folder.refusals();
    check(of_files(&verify));
    check(of_files(&restore));
    let ModelError::Format(tenant) = &tenant else { panic!("{tenant:?}") };
    check(tenant);
}

/// All readers refuse an artifact for what a codec says of a tensor.
fn codec_refusals(folder: &Folder, name: &str, check: impl Fn(&CodecError)) {
    let (verify, restore, tenant) = folder.refusals();
    for error in [verify, restore] {
        let Error::Codec { path, tensor, source } = &error else { panic!("{error:?}") };
        assert_eq!((path, tensor.as_str()), (&folder.artifact(), name));
        assert_eq!(error.hint(), source.hint());
        check(source);
    }
    let ModelError::Delta { path, tensor, source } = &tenant else { panic!("{tenant:?}") };
    assert_eq!((path, tensor.as_str()), (&folder.artifact(), name));
    assert_eq!(tenant.hint(), source.hint());
    check(source);
}

#[test]
fn one_byte_of_one_tensor_makes_another_base() {
    for name in [UP, NORM, EMBEDDING, SAME] {
        let folder = Folder::compressed("llama_tied_gqa", "rtn");
        let mut other = Memory::read(&folder.base());
        let tensor = other.tensor(name);
        let middle = tensor.bytes.len() / 2;
        tensor.bytes[middle] ^= 1;
        other.write(&folder.base());
        file_refusals(&folder, |error| {
            let FileError::OtherBase { artifact, base, tensor, expected, got } = error else {
                panic!("{error:?}")
            };
            assert_eq!((artifact, base), (&folder.artifact(), &folder.base()));
            assert_eq!(tensor, name);
            assert_ne!(expected, got);
            assert!(error.hint().unwrap().contains("exact base"));
        });
    }
}

#[test]
fn the_same_values_in_another_type_make_another_base() {
    let folder = Folder::compressed("qwen2_tied", "sign");
    let mut other = Memory::read(&folder.base());
    other.tensor(UP).cast(DType::F32);
    other.write(&folder.base());
    file_refusals(&folder, |error| {
        let FileError::OtherBase { tensor, .. } = error else { panic!("{error:?}") };
        assert_eq!(tensor, UP);
    });
}

#[test]
fn a_base_of_another_shape_is_refused() {
    let folder = Folder::compressed("llama_tied_gqa", "rtn");
    Memory::fixture("qwen3").write(&folder.base());
    file_refusals(&folder, |error| {
        let FileError::OtherBase { tensor, .. } = error else { panic!("{error:?}") };
        assert_eq!(tensor, EMBEDDING);
    });
}

#[test]
fn damaged_files_are_refused() {
    let folder = Folder::compressed("llama_tied_gqa", "rtn exact");
    for file in [LINEAR, REST] {
        let path = folder.artifact().join(file);
        let whole = std::fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 0x80;
        std::fs::write(&path, &damaged).unwrap();
        file_refusals(&folder, |error| {
            let FileError::FileDigest { path: got_path, expected, got } = error else {
                panic!("{error:?}")
            };
            assert_eq!(got_path, &path);
            assert_eq!((*expected, *got), (Digest::of(&whole), Digest::of(&damaged)));
        });
        std::fs::write(&path, whole).unwrap();
    }
    folder.restore();
}

/// Changes a part of [`UP`] and checks what all readers say of it.
fn part_refusals(codec: &str, part: &str, edit: impl Fn(&mut Stored), check: impl Fn(&PartError)) {
    let folder = Folder::compressed("llama_tied_gqa", codec);
    let name = format!("{}.{part}", UP.strip_suffix(".weight").unwrap());
    folder.edit_parts(LINEAR, |parts| edit(parts.get_mut(&name).unwrap()));
    codec_refusals(&folder, UP, |error| {
        let CodecError::Part(error) = error else { panic!("{codec}, {part}: {error:?}") };
        check(error);
    });
}

#[test]
fn altered_parts_of_every_codec_are_refused() {
    for codec in codecs() {
        let folder = Folder::compressed("llama_tied_gqa", &codec);
        let (_, artifact) = folder.open();
        let parts = artifact.delta(UP).unwrap().unwrap().1.parts;
        assert!(!parts.is_empty());
        for (part, original) in &parts {
            let (shape, dtype) = (original.shape().to_vec(), original.dtype());
            let shortened = |stored: &mut Stored| {
                let row = stored.bytes.len() / stored.shape[0];
                stored.shape[0] -= 1;
                stored.bytes.truncate(stored.shape[0] * row);
            };
            part_refusals(&codec, part, shortened, |error| {
                match error {
                    PartError::Shape { part: name, expected, got } => {
                        assert_eq!((name, expected), (part, &shape));
                        assert_eq!(got[0] + 1, shape[0]);
                    }
                    // The length of codes by their frequencies is known from them alone.
                    PartError::Value { part: name, .. } => assert_eq!(name, part),
                    _ => panic!("{codec}, {part}: {error:?}"),
                }
            });
            let reshaped = |stored: &mut Stored| stored.shape.insert(0, 1);
            part_refusals(&codec, part, reshaped, |error| {
                assert!(matches!(error, PartError::Shape { .. }), "{codec}, {part}: {error:?}");
            });
            let other = if dtype == DType::U8 { DType::F32 } else { DType::U8 };
            let retyped = |stored: &mut Stored| {
                stored.dtype = other;
                let n: usize = stored.shape.iter().product();
                stored.bytes = vec![0; n * other.size_bytes()];
            };
            part_refusals(&codec, part, retyped, |error| {
                let PartError::DType { part: name, expected, got } = error else {
                    panic!("{codec}, {part}: {error:?}")
                };
                assert_eq!((name, *expected, *got), (part, dtype, other));
            });
            if dtype == DType::U8 {
                continue;
            }
            // All bits set is NaN in every float type.
            let not_finite = |stored: &mut Stored| {
                let size = stored.dtype.size_bytes();
                let last = stored.bytes.len() - size;
                stored.bytes[last..].fill(0xff);
            };
            part_refusals(&codec, part, not_finite, |error| {
                let PartError::NotFinite { part: name, index } = error else {
                    panic!("{codec}, {part}: {error:?}")
                };
                assert_eq!((name, index + 1), (part, shape.iter().product()));
            });
        }
    }
}

#[test]
fn dropped_and_added_parts_of_every_codec_are_refused() {
    let module = UP.strip_suffix(".weight").unwrap();
    for codec in codecs() {
        let folder = Folder::compressed("llama_tied_gqa", &codec);
        let (_, artifact) = folder.open();
        let parts: Vec<String> = artifact.delta(UP).unwrap().unwrap().1.parts.into_keys().collect();
        let first = format!("{module}.{}", parts[0]);
        // From the file alone.
        folder.edit_parts(LINEAR, |file| drop(file.remove(&first)));
        file_refusals(&folder, |error| {
            let FileError::MissingTensor { path, tensor } = error else { panic!("{error:?}") };
            assert_eq!((path, tensor), (&folder.artifact().join(LINEAR), &first));
        });
        // From the manifest too.
        folder.edit_manifest(|m| {
            m["tensors"][UP]["parts"].as_array_mut().unwrap().retain(|p| *p != json!(parts[0]));
        });
        codec_refusals(&folder, UP, |error| {
            let CodecError::Part(PartError::Missing { part }) = error else { panic!("{error:?}") };
            assert_eq!(part, &parts[0]);
        });

        let folder = Folder::compressed("llama_tied_gqa", &codec);
        folder.edit_parts(LINEAR, |file| {
            let copy = file[&first].clone();
            file.insert(format!("{module}.extra"), copy);
        });
        // Bytes that nothing names.
        file_refusals(&folder, |error| {
            let FileError::Manifest { entry, .. } = error else { panic!("{error:?}") };
            assert_eq!(*entry, format!("{module}.extra"));
        });
        folder.edit_manifest(|m| {
            m["tensors"][UP]["parts"].as_array_mut().unwrap().push(json!("extra"));
        });
        codec_refusals(&folder, UP, |error| {
            let CodecError::Part(PartError::Unexpected { part }) = error else {
                panic!("{error:?}")
            };
            assert_eq!(part, "extra");
        });
    }
}

#[test]
fn codecs_of_another_program_are_refused() {
    let refused = |edit: fn(&mut Value), check: fn(&CodecError)| {
        let folder = Folder::compressed("llama_tied_gqa", "rtn");
        folder.edit_manifest(|m| edit(&mut m["codecs"][0]));
        codec_refusals(&folder, EMBEDDING, check);
    };
    refused(
        |codec| codec["name"] = json!("rtm"),
        |error| {
            let CodecError::UnknownCodec { got, nearest, .. } = error else { panic!("{error:?}") };
            assert_eq!((got.as_str(), *nearest), ("rtm", "rtn"));
        },
    );
    refused(
        |codec| codec["version"] = json!(u32::MAX),
        |error| {
            let CodecError::NewerParts { codec: "rtn", got, newest } = error else {
                panic!("{error:?}")
            };
            assert!(*got == u32::MAX && newest < got);
            assert!(error.hint().unwrap().contains("newer onebase"));
        },
    );
    refused(
        |codec| codec["options"]["speed"] = json!(9),
        |error| {
            let CodecError::UnknownOption { codec: "rtn", got, .. } = error else {
                panic!("{error:?}")
            };
            assert_eq!(got, "speed");
        },
    );
    for value in [json!(0), json!(9), json!(u64::MAX), json!(-4), json!(4.5), json!("4")] {
        let folder = Folder::compressed("llama_tied_gqa", "rtn");
        folder.edit_manifest(|m| m["codecs"][0]["options"]["bits"] = value.clone());
        codec_refusals(&folder, EMBEDDING, |error| {
            let CodecError::BadOption { codec: "rtn", option: "bits", got, .. } = error else {
                panic!("{error:?}")
            };
            assert_eq!(*got, value.to_string());
        });
    }
    // A valid option that the parts were not written with.
    refused(
        |codec| codec["options"]["bits"] = json!(3),
        |error| assert!(matches!(error, CodecError::Part(PartError::Shape { .. })), "{error:?}"),
    );
}

#[test]
fn inherited_files_must_be_the_base_s() {
    let mut base = Memory::fixture("llama_tied_gqa");
    let tokenizer = std::fs::read(crate::support::demo("base").join("tokenizer.json")).unwrap();
    base.side_files.insert("tokenizer.json".into(), tokenizer);
    let folder = Folder::new(&base, &base.tuned(1));
    folder.compress("sign");
    let (checkpoint, artifact) = folder.open();
    TextModel::from_artifact(&artifact, &checkpoint).unwrap();

    for file in ["tokenizer.json", "config.json"] {
        let path = folder.base().join(file);
        let whole = std::fs::read(&path).unwrap();
        let mut other = whole.clone();
        other.push(b' ');
        std::fs::write(&path, &other).unwrap();
        let check = |error: &FileError| {
            let FileError::FileDigest { path: got_path, expected, got } = error else {
                panic!("{error:?}")
            };
            assert_eq!(got_path, &path);
            assert_eq!((*expected, *got), (Digest::of(&whole), Digest::of(&other)));
        };
        if file == "config.json" {
            file_refusals(&folder, check);
        } else {
            // Weights are served without it, text is not.
            let text = TextModel::from_artifact(&artifact, &checkpoint).unwrap_err();
            let ModelError::Format(text) = &text else { panic!("{text:?}") };
            check(text);
            let silent = &onebase_compress::Silent;
            let verify = onebase_compress::verify(&checkpoint, &artifact, silent).unwrap_err();
            check(of_files(&verify));
            let restored = folder.restored();
            let restore = onebase_compress::restore(&checkpoint, &artifact, &restored, silent);
            check(of_files(&restore.unwrap_err()));
            assert!(!restored.exists());
        }
        std::fs::write(&path, whole).unwrap();
    }
    folder.restore();
}

/// An artifact whose own configuration is altered and re-signed.
fn with_config(folder: &Folder, edit: impl FnOnce(&mut Value)) {
    let mut config = Memory::read(&folder.base()).config;
    edit(&mut config);
    let bytes = config.to_string().into_bytes();
    std::fs::write(folder.artifact().join("config.json"), &bytes).unwrap();
    folder.edit_manifest(|m| {
        let digest = Digest::of(&bytes).to_string();
        m["files"]["config.json"] = json!({ "bytes": bytes.len(), "blake3": digest });
        m["inherited"].as_object_mut().unwrap().remove("config.json");
    });
}

#[test]
fn a_configuration_that_does_not_fit_is_refused() {
    let folder = Folder::compressed("llama_tied_gqa", "sign");
    with_config(&folder, |c| c["num_hidden_layers"] = json!(1));
    let (verify, restore, tenant) = folder.refusals();
    for error in [verify, restore, Error::Model(tenant)] {
        let Error::Model(ModelError::OtherModel { path, field, .. }) = &error else {
            panic!("{error:?}")
        };
        assert_eq!((path, *field), (&folder.artifact(), "num_hidden_layers"));
    }
    // More tokens than the embedding has rows.
    with_config(&folder, |c| c["vocab_size"] = json!(201));
    let (verify, restore, tenant) = folder.refusals();
    for error in [verify, restore, Error::Model(tenant)] {
        let Error::Model(ModelError::Shape { tensor, expected, got, .. }) = &error else {
            panic!("{error:?}")
        };
        assert_eq!(tensor, EMBEDDING);
        assert_eq!((expected.as_slice(), got.as_slice()), (&[201, 48][..], &[200, 48][..]));
    }
    with_config(&folder, |c| c["hidden_act"] = json!("gelu"));
    let (verify, restore, tenant) = folder.refusals();
    for error in [verify, restore, Error::Model(tenant)] {
        let Error::Model(ModelError::Config { field: "hidden_act", .. }) = &error else {
            panic!("{error:?}")
        };
    }
}

#[test]
fn a_tensor_that_the_manifest_lost_is_missed() {
    for name in [UP, NORM, EMBEDDING, SAME] {
        let folder = Folder::compressed("llama_tied_gqa", "sign");
        folder.edit_manifest(|m| drop(m["tensors"].as_object_mut().unwrap().remove(name)));
        // What it stored belongs to no record any more, or the base's digest covers
        // one tensor too many.
        file_refusals(&folder, |error| {
            let FileError::Manifest { entry, .. } = error else { panic!("{error:?}") };
            let module = name.strip_suffix(".weight").unwrap();
            assert!(if name == SAME { entry == "base" } else { entry.starts_with(module) });
        });
    }
}

#[test]
fn a_tensor_called_unchanged_would_answer_as_the_base_and_is_refused() {
    for name in [UP, NORM, EMBEDDING] {
        let folder = Folder::compressed("llama_tied_gqa", "sign");
        folder.edit_manifest(|m| {
            let record = &m["tensors"][name];
            m["tensors"][name] = json!({
                "role": record["role"], "dtype": record["dtype"], "shape": record["shape"],
                "base": record["base"], "stored": "unchanged",
            });
        });
        file_refusals(&folder, |error| {
            let FileError::Manifest { entry, problem, .. } = error else { panic!("{error:?}") };
            assert!(entry.starts_with(name.strip_suffix(".weight").unwrap()), "{entry}");
            assert!(problem.contains("no record does"), "{problem}");
        });
    }
}

#[test]
fn the_base_s_own_digest_counts() {
    let folder = Folder::compressed("llama_tied_gqa", "sign");
    folder.edit_manifest(|m| m["base"]["blake3"] = json!("0".repeat(64)));
    file_refusals(&folder, |error| {
        let FileError::Manifest { entry, .. } = error else { panic!("{error:?}") };
        assert_eq!(entry, "base");
    });
}

#[test]
fn a_site_stored_as_it_is_would_answer_as_the_base_and_is_refused() {
    let folder = Folder::compressed("llama_tied_gqa", "sign exact");
    let up = Memory::read(&folder.fine_tune()).tensors[UP].clone();
    folder.edit_parts(REST, |rest| drop(rest.insert(UP.to_owned(), up)));
    let module = UP.strip_suffix("weight").unwrap();
    folder.edit_parts(LINEAR, |linear| linear.retain(|name, _| !name.starts_with(module)));
    folder.edit_manifest(|m| {
        let record = &m["tensors"][UP];
        m["tensors"][UP] = json!({
            "role": "linear", "dtype": record["dtype"], "shape": record["shape"],
            "base": record["base"], "stored": "exact", "file": REST,
        });
    });
    let error = Artifact::open(&folder.artifact()).unwrap_err();
    let FileError::Manifest { entry, problem, .. } = &error else { panic!("{error:?}") };
    assert_eq!(entry, UP);
    assert!(problem.contains("expected a delta, got exact"), "{problem}");
    // Nor does it help to call it something else.
    for role in ["embedding", "head", "vector"] {
        folder.edit_manifest(|m| m["tensors"][UP]["role"] = json!(role));
        file_refusals(&folder, |error| {
            let FileError::Manifest { entry, problem, .. } = error else { panic!("{error:?}") };
            assert_eq!(entry, UP);
            assert!(problem.contains("expected role Linear"), "{problem}");
        });
    }
}

#[test]
fn the_base_s_tensor_must_fill_what_is_unchanged() {
    // A type that the base's bytes do not have.
    let folder = Folder::compressed("llama_tied_gqa", "sign");
    folder.edit_manifest(|m| m["tensors"][SAME]["dtype"] = json!("F16"));
    let (base, artifact) = folder.open();
    let silent = &onebase_compress::Silent;
    let verify = onebase_compress::verify(&base, &artifact, silent).unwrap_err();
    let restore = onebase_compress::restore(&base, &artifact, &folder.restored(), silent);
    for error in [verify, restore.unwrap_err()] {
        let FileError::Manifest { entry, problem, .. } = of_files(&error) else {
            panic!("{error:?}")
        };
        assert_eq!(entry, SAME);
        assert!(problem.contains("F16") && problem.contains("F32"), "{problem}");
    }
    // Rows that the base does not have.
    for (family, table) in [("llama_tied_gqa", EMBEDDING), ("qwen3", HEAD)] {
        let base = Memory::fixture(family);
        let mut tuned = base.clone();
        tuned.tensor(UP).set(0, 0, 0.0);
        let folder = Folder::new(&base, &tuned);
        folder.compress("sign");
        let rows = base.tensors[table].shape[0] + 1;
        with_config(&folder, |c| c["vocab_size"] = json!(rows));
        folder.edit_manifest(|m| {
            for name in [EMBEDDING, HEAD] {
                if let Some(record) = m["tensors"].get_mut(name) {
                    record["shape"][0] = json!(rows);
                }
            }
        });
        let (verify, restore, tenant) = folder.refusals();
        for error in [verify, restore, Error::Model(tenant)] {
            let Error::Model(ModelError::Shape { tensor, expected, got, .. }) = &error else {
                panic!("{error:?}")
            };
            assert_eq!(tensor, EMBEDDING);
            assert_eq!((expected[0] + 1, got[0]), (rows, rows));
        }
    }
}

#[test]
fn altered_deltas_of_vectors_are_refused() {
    let codec = "rtn vectors magnitude:keep=0.25";
    let module = NORM.strip_suffix(".weight").unwrap();
    let value = format!("{module}.value");
    // Fewer kept than the options say.
    let folder = Folder::compressed("llama_tied_gqa", codec);
    folder.edit_parts(REST, |parts| {
        let value = parts.get_mut(&value).unwrap();
        value.shape[0] -= 1;
        value.bytes.truncate(value.bytes.len() - value.dtype.size_bytes());
    });
    codec_refusals(&folder, NORM, |error| {
        assert!(matches!(error, CodecError::Part(PartError::Shape { .. })), "{error:?}");
    });
    // Places that no encoder writes.
    let folder = Folder::compressed("llama_tied_gqa", codec);
    folder.edit_parts(REST, |parts| {
        parts.get_mut(&format!("{module}.mask")).unwrap().bytes.fill(0xff);
    });
    codec_refusals(&folder, NORM, |error| {
        assert!(matches!(error, CodecError::Part(PartError::Value { .. })), "{error:?}");
    });
    // A vector of another length than the model's.
    let folder = Folder::compressed("llama_tied_gqa", codec);
    folder.edit_manifest(|m| {
        let n = m["tensors"][NORM]["shape"][0].as_u64().unwrap();
        m["tensors"][NORM]["shape"][0] = json!(n + 1);
    });
    let (verify, restore, tenant) = folder.refusals();
    for error in [verify, restore] {
        assert!(matches!(error, Error::Model(ModelError::Shape { .. })), "{error:?}");
    }
    assert!(matches!(tenant, ModelError::Shape { .. }), "{tenant:?}");
}
