//! Pairs of checkpoints that do not belong together, and weights that cannot be
//! compressed: each refusal says where, what was expected and what was there.

use crate::support::{EMBEDDING, Folder, HEAD, Memory, NORM, SAME, UP, fixture, of_files, plan};
use onebase_compress::{Error, Pair, Silent, compress};
use onebase_format::{Checkpoint, Error as FileError};
use onebase_model::{Error as ModelError, Model, Request, SamplingParams, generate};
use onebase_tensor::DType;
use serde_json::{Value, json};

/// Why a pair is refused, the fine-tune being a tiny Llama that was altered.
fn pair_refusal(alter: impl FnOnce(&mut Memory)) -> (Error, Folder) {
    let base = Memory::fixture("llama_tied_gqa");
    let mut tuned = base.tuned(1);
    alter(&mut tuned);
    let folder = Folder::new(&base, &tuned);
    (Pair::open(&folder.base(), &folder.fine_tune()).unwrap_err(), folder)
}

#[test]
fn what_differs_between_the_models_is_said() {
    let cases: [(&str, Value, &str, &str); 9] = [
        ("hidden_size", json!(64), "48", "64"),
        ("intermediate_size", json!(96), "88", "96"),
        ("num_hidden_layers", json!(3), "2", "3"),
        ("num_attention_heads", json!(8), "4", "8"),
        ("num_key_value_heads", json!(4), "2", "4"),
        ("head_dim", json!(24), "12", "24"),
        ("tie_word_embeddings", json!(false), "true", "false"),
        ("attention_bias", json!(true), "false", "true"),
        ("mlp_bias", json!(true), "false", "true"),
    ];
    for (name, value, base, tuned) in cases {
        let (error, folder) = pair_refusal(|t| t.config[name] = value);
        let Error::Model(ModelError::OtherModel { path, field, expected, got }) = &error else {
            panic!("{name}: {error:?}")
        };
        assert_eq!(*path, folder.fine_tune());
        assert_eq!((*field, expected.as_str(), got.as_str()), (name, base, tuned));
        let text = error.to_string();
        assert!(text.ends_with(&format!("{name} is {tuned}, the base has {base}")), "{text}");
        assert!(error.hint().unwrap().contains("the base that the fine-tune was trained from"));
    }
}

#[test]
fn another_architecture_is_refused() {
    for (base, tuned, expected, got) in [
        ("llama_tied_gqa", "qwen3_tied_bf16", "LlamaForCausalLM", "Qwen3ForCausalLM"),
        ("mistral_window", "llama_bias", "MistralForCausalLM", "LlamaForCausalLM"),
    ] {
        let error = Pair::open(&fixture(base), &fixture(tuned)).unwrap_err();
        let Error::Model(ModelError::OtherModel { path, field, expected: e, got: g }) = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!((path, *field), (&fixture(tuned), "architecture"));
        assert_eq!((e.as_str(), g.as_str()), (expected, got));
    }
}

#[test]
fn a_smaller_vocabulary_is_refused() {
    let (error, _folder) = pair_refusal(|t| {
        t.config["vocab_size"] = json!(190);
        let table = t.tensor(EMBEDDING);
        table.shape[0] = 190;
        table.bytes.truncate(190 * 48 * 4);
    });
    let Error::Model(ModelError::OtherModel { field: "vocab_size", expected, got, .. }) = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!((expected.as_str(), got.as_str()), ("at least 200", "190"));
}

#[test]
fn models_that_are_not_supported_are_refused() {
    let cases: [(&str, Value, &str); 9] = [
        ("architectures", json!(["GPT2LMHeadModel"]), "\"GPT2LMHeadModel\""),
        ("architectures", json!(null), "nothing"),
        ("quantization_config", json!({"bits": 4}), "{\"bits\":4}"),
        ("hidden_act", json!("gelu"), "\"gelu\""),
        ("hidden_size", json!(null), "nothing"),
        ("hidden_size", json!(0), "0"),
        ("num_hidden_layers", json!(1_000_000), "1000000"),
        ("num_key_value_heads", json!(3), "3"),
        ("vocab_size", json!("200"), "\"200\""),
    ];
    for (name, value, got) in cases {
        let (error, folder) = pair_refusal(|t| t.config[name] = value);
        let Error::Model(ModelError::Config { path, field, got: got_value, .. }) = &error else {
            panic!("{name}: {error:?}")
        };
        assert_eq!((path, *field), (&folder.fine_tune(), name));
        assert_eq!(got_value, got);
        let hint = error.hint().unwrap_or_default();
        match name {
            "architectures" => assert!(hint.contains("Qwen3")),
            "quantization_config" => assert!(hint.contains("16- or 32-bit")),
            _ => {}
        }
    }
}

#[test]
fn tensors_must_be_those_of_the_configuration() {
    let (error, folder) = pair_refusal(|t| drop(t.tensors.remove(UP)));
    let FileError::MissingTensor { path, tensor } = of_files(&error) else { panic!("{error:?}") };
    assert_eq!((path, tensor.as_str()), (&folder.fine_tune(), UP));

    for extra in ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"] {
        let (error, folder) = pair_refusal(|t| {
            let norm = t.tensor(NORM).clone();
            t.tensors.insert(extra.to_owned(), norm);
        });
        let Error::Model(ModelError::UnexpectedTensor { path, tensor }) = &error else {
            panic!("{error:?}")
        };
        assert_eq!((path, tensor.as_str()), (&folder.fine_tune(), extra));
    }

    let (error, folder) = pair_refusal(|t| t.tensor(UP).shape.reverse());
    let Error::Model(ModelError::Shape { path, tensor, expected, got }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(*path, folder.fine_tune().join("model.safetensors"));
    assert_eq!(tensor, UP);
    assert_eq!((expected.as_slice(), got.as_slice()), (&[88, 48][..], &[48, 88][..]));

    let (error, _folder) = pair_refusal(|t| {
        let up = t.tensor(UP);
        (up.dtype, up.shape) = (DType::U8, vec![88, 48]);
        up.bytes.truncate(88 * 48);
    });
    let FileError::UnsupportedDType { tensor, got, .. } = of_files(&error) else {
        panic!("{error:?}")
    };
    assert_eq!((tensor.as_str(), got.as_str()), (UP, "U8"));
}

#[test]
fn a_base_is_checked_as_a_fine_tune_is() {
    let base = Memory::fixture("llama_tied_gqa");
    let mut broken = base.clone();
    broken.tensors.remove(UP);
    let folder = Folder::new(&broken, &base.tuned(1));
    let error = Pair::open(&folder.base(), &folder.fine_tune()).unwrap_err();
    let FileError::MissingTensor { path, .. } = of_files(&error) else { panic!("{error:?}") };
    assert_eq!(*path, folder.base());
}

#[test]
fn what_follows_from_the_configuration_is_passed_over() {
    let base = Memory::fixture("llama_tied_gqa");
    let mut tuned = base.tuned(1);
    let head = tuned.tensor(EMBEDDING).clone();
    tuned.tensors.insert(HEAD.to_owned(), head);
    let buffer = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    tuned.tensors.insert(buffer.clone(), base.tensors[NORM].clone());
    let folder = Folder::new(&base, &tuned);
    folder.compress("dense");
    let restored = folder.restore();
    assert!(!restored.tensors.contains_key(HEAD) && !restored.tensors.contains_key(&buffer));
}

#[test]
fn the_base_itself_is_no_fine_tune() {
    let base = Memory::fixture("qwen2_tied");
    let mut folder = Folder::new(&base, &base);
    for codec in ["dense", "rtn exact"] {
        let error = folder.try_compress(codec).unwrap_err();
        let Error::NoChange { path } = &error else { panic!("{error:?}") };
        assert_eq!(*path, folder.fine_tune());
        assert!(error.hint().unwrap().contains("no delta to store"));
        assert_eq!(std::fs::read_dir(folder.dir.path()).unwrap().count(), 2);
    }
    // One changed weight is enough.
    let mut tuned = base.clone();
    tuned.tensor(NORM).set(0, 3, 0.25);
    folder = Folder::new(&base, &tuned);
    folder.compress("sign");
    assert_eq!(folder.restore().tensors, tuned.tensors);
}

/// Where a weight that is not finite was found.
fn not_finite(folder: &Folder, codec: &str) -> (std::path::PathBuf, String, [usize; 2], f32) {
    let error = folder.try_compress(codec).unwrap_err();
    let left = std::fs::read_dir(folder.dir.path()).unwrap().count();
    assert_eq!(left, 2, "nothing is left beside base and fine-tune");
    assert!(error.hint().unwrap().contains("diverged"), "{:?}", error.hint());
    match error {
        Error::NotFinite { path, tensor, row, column, got } => (path, tensor, [row, column], got),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_weight_that_is_not_finite_is_found() {
    let codecs = ["dense", "dense:dtype=bf16", "rtn", "sign", "sign:scale=matrix", "rtn exact"];
    for family in ["llama_tied_gqa", "qwen3_tied_bf16"] {
        let base = Memory::fixture(family);
        for (i, value) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
            for (in_base, tensor, [row, column]) in [
                (false, UP, [7, 11]),
                (true, UP, [0, 0]),
                (false, EMBEDDING, [199, 47]),
                (false, NORM, [0, 5]),
            ] {
                let (mut broken, mut tuned) = (base.clone(), base.tuned(1));
                let side = if in_base { &mut broken } else { &mut tuned };
                side.tensor(tensor).set(row, column, value);
                let folder = Folder::new(&broken, &tuned);
                let dir = if in_base { folder.base() } else { folder.fine_tune() };
                let codec = codecs[(i + row) % codecs.len()];
                let (path, name, place, got) = not_finite(&folder, codec);
                assert_eq!((path, name.as_str()), (dir.join("model.safetensors"), tensor));
                assert_eq!(place, [row, column], "{codec}");
                assert!(got == value || (got.is_nan() && value.is_nan()), "{got}");
            }
        }
    }
}

#[test]
fn a_shard_with_a_weight_that_is_not_finite_is_named() {
    // The fixture's second shard has layer 0's feed-forward network.
    let source = fixture("llama3_rope");
    let base = Memory::read(&source);
    let folder = Folder::new(&base, &base);
    std::fs::remove_dir_all(folder.fine_tune()).unwrap();
    std::fs::create_dir(folder.fine_tune()).unwrap();
    for (name, bytes) in crate::support::contents(&source) {
        std::fs::write(folder.fine_tune().join(name), bytes).unwrap();
    }
    let shard = folder.fine_tune().join("model-00002-of-00004.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let tensor = "model.layers.0.mlp.gate_proj.weight";
    let at = {
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.tensor(tensor).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    let at = at + (2 * 48 + 9) * 4;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&shard, bytes).unwrap();
    let (path, name, place, _) = not_finite(&folder, "rtn");
    assert_eq!((path, name.as_str(), place), (shard, tensor, [2, 9]));
}

#[test]
fn an_added_row_that_is_not_finite_is_found() {
    for family in ["llama_tied_gqa", "qwen3"] {
        let base = Memory::fixture(family);
        let mut tuned = base.tuned(1);
        tuned.extend_vocabulary(5);
        let row = tuned.tensor(EMBEDDING).shape[0] - 2;
        tuned.tensor(EMBEDDING).set(row, 13, f32::INFINITY);
        let folder = Folder::new(&base, &tuned);
        for codec in ["dense", "sign", "rtn exact"] {
            let (path, name, place, got) = not_finite(&folder, codec);
            assert_eq!(path, folder.fine_tune().join("model.safetensors"));
            assert_eq!((name.as_str(), place, got), (EMBEDDING, [row, 13], f32::INFINITY));
        }
    }
}

#[test]
fn a_delta_that_overflows_is_refused() {
    let mut base = Memory::fixture("llama_tied_gqa");
    let mut tuned = base.tuned(1);
    base.tensor(UP).set(3, 4, -3e38);
    tuned.tensor(UP).set(3, 4, 3e38);
    let folder = Folder::new(&base, &tuned);
    let error = folder.try_compress("dense").unwrap_err();
    let Error::Codec { path, tensor, source } = &error else { panic!("{error:?}") };
    assert_eq!(*path, folder.fine_tune().join("model.safetensors"));
    assert_eq!(tensor, UP);
    let onebase_codec::Error::NotFinite { row: 3, column: 4, got } = source else {
        panic!("{source:?}")
    };
    assert_eq!(*got, f32::INFINITY);
}

#[test]
fn a_folder_that_is_there_is_not_written() {
    let folder = Folder::compressed("llama_tied_gqa", "sign");
    let before = crate::support::contents(&folder.artifact());
    let error = compress(&folder.pair(), &plan("dense"), &folder.artifact(), &Silent).unwrap_err();
    let FileError::Exists { path } = of_files(&error) else { panic!("{error:?}") };
    assert_eq!(*path, folder.artifact());
    let (base, artifact) = folder.open();
    let error = onebase_compress::restore(&base, &artifact, &folder.base(), &Silent).unwrap_err();
    assert!(matches!(of_files(&error), FileError::Exists { .. }), "{error:?}");
    assert_eq!(crate::support::contents(&folder.artifact()), before);
}

#[test]
fn what_a_fine_tune_leaves_is_recorded_as_the_base_s() {
    let folder = Folder::compressed("llama_tied_gqa", "sign");
    let (_, artifact) = folder.open();
    let unchanged: Vec<&str> = artifact
        .manifest()
        .tensors
        .iter()
        .filter(|(_, t)| t.storage == onebase_format::artifact::Storage::Unchanged)
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(unchanged, [SAME]);
}

#[test]
fn a_head_of_its_own_under_tied_embeddings_is_refused() {
    let with_head = |model: &mut Memory, value: Option<f32>| {
        let mut head = model.tensors[EMBEDDING].clone();
        value.into_iter().for_each(|v| head.set(0, 0, v));
        model.tensors.insert(HEAD.to_owned(), head);
    };
    let (error, folder) = pair_refusal(|tuned| with_head(tuned, Some(0.5)));
    let Error::Model(ModelError::UntiedHead { path }) = &error else { panic!("{error:?}") };
    assert_eq!(*path, folder.fine_tune().join("model.safetensors"));
    assert!(error.hint().unwrap().contains("tie_word_embeddings"));
    // A copy of the embedding says nothing new.
    let base = Memory::fixture("llama_tied_gqa");
    let mut tuned = base.tuned(1);
    with_head(&mut tuned, None);
    Folder::new(&base, &tuned).compress("sign");
}

#[test]
fn a_model_without_finite_logits_gives_no_answer() {
    let mut broken = Memory::fixture("llama_tied_gqa");
    broken.tensor(NORM).set(0, 0, f32::NAN);
    let folder = Folder::new(&broken, &broken.tuned(1));
    let model = Model::load(Checkpoint::open(&folder.base()).unwrap()).unwrap();
    let request = Request {
        tenant: None,
        prompt: vec![1, 2, 3],
        max_new_tokens: 4,
        sampling: SamplingParams::GREEDY,
        stop_tokens: &[],
        stop_texts: &[],
        tokenizer: None,
    };
    let error = generate(&model, &[request], 1, |_| {}).unwrap_err();
    assert!(matches!(error, ModelError::NotFinite { n_tokens: 3 }), "{error:?}");
}
