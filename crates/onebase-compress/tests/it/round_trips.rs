//! What comes back from an artifact: weights, side files and the bytes of the
//! artifact itself.

use std::collections::BTreeMap;

use crate::support::{
    EMBEDDING, FAMILIES, Folder, HEAD, Memory, NORM, Stored, UP, contents, demo, difference,
    fixture, logits, plan,
};
use onebase_codec::CODECS;
use onebase_compress::{Pair, Silent, compress, restore, verify};
use onebase_format::artifact::{Artifact, Storage};
use onebase_format::{Checkpoint, SIDE_FILES};
use onebase_model::{KvCache, Logits, Model, Segment, Tenant};
use onebase_tensor::DType;

/// The distance from a number to the next larger one.
fn ulp(x: f32) -> f64 {
    let x = x.abs().max(f32::MIN_POSITIVE);
    f64::from(f32::from_bits(x.to_bits() + 1)) - f64::from(x)
}

/// Checks a tensor that was restored from a delta in f32, and counts the weights
/// that are not the fine-tune's to the bit.
///
/// It is where the delta is an f32. Where it is not, one of the weights being
/// many thousand times the other, the larger one's last place is off by one;
/// rounding to a 16-bit type can double that.
fn check_restored(name: &str, base: &Stored, want: &Stored, got: &Stored) -> usize {
    assert_eq!((got.dtype, &got.shape), (want.dtype, &want.shape), "{name}");
    let slack = if want.dtype == DType::F32 { 1.0 } else { 2.0 };
    let mut n_other = 0;
    let weights = base.widen().into_iter().zip(want.widen()).zip(got.widen());
    for (i, ((base, want), got)) in weights.enumerate() {
        n_other += usize::from(got.to_bits() != want.to_bits());
        let bound = match f64::from(want - base) + f64::from(base) == f64::from(want) {
            true => 0.0,
            false => slack * ulp(base.abs().max(want.abs())),
        };
        let error = (f64::from(got) - f64::from(want)).abs();
        assert!(error <= bound, "{name}, weight {i}: {want} became {got} on {base}");
    }
    n_other
}

#[test]
fn dense_gives_back_the_fine_tune_of_every_family() {
    for family in FAMILIES {
        let base = Memory::fixture(family);
        let tuned = base.tuned(3);
        let folder = Folder::new(&base, &tuned);
        folder.compress("dense");
        let restored = folder.restore();
        assert!(restored.tensors.keys().eq(tuned.tensors.keys()), "{family}");
        for (name, want) in &tuned.tensors {
            let got = &restored.tensors[name];
            let what = format!("{family}, {name}");
            let n_other = check_restored(&what, &base.tensors[name], want, got);
            assert!(want.dtype == DType::F32 || n_other == 0, "{what}");
        }
        assert_eq!(restored.config, tuned.config);
        // It is a checkpoint that can be compressed in turn.
        Pair::open(&folder.base(), &folder.restored()).unwrap();
    }
}

#[test]
fn dense_gives_back_the_demo() {
    let base = Memory::read(&demo("base"));
    for name in ["math", "chat"] {
        let dir = tempfile::tempdir().unwrap();
        let pair = Pair::open(&demo("base"), &demo(name)).unwrap();
        compress(&pair, &plan("dense"), &dir.path().join("a"), &Silent).unwrap();
        let artifact = Artifact::open(&dir.path().join("a")).unwrap();
        assert_eq!(artifact.manifest().fine_tune, name);
        restore(pair.base(), &artifact, &dir.path().join("r"), &Silent).unwrap();
        let (want, got) = (Memory::read(&demo(name)), Memory::read(&dir.path().join("r")));
        let others = want.tensors.iter().map(|(tensor, want)| {
            check_restored(tensor, &base.tensors[tensor], want, &got.tensors[tensor])
        });
        // Of five million weights, some are next to zero where the base's is not.
        let n_other: usize = others.sum();
        assert!(n_other < 20, "{name}: {n_other} weights differ");
        let (mut want, mut got) = (contents(&demo(name)), contents(&dir.path().join("r")));
        want.remove("model.safetensors");
        got.remove("model.safetensors");
        assert!(want == got);
    }
}

#[test]
fn weights_of_very_different_size_are_near() {
    // The delta of such a pair has no exact f32: what comes back is off by less
    // than one unit in the last place of the larger weight.
    let pairs = [
        (1.0, 3e-30),
        (3e-30, 1.0),
        (1e30, -1.5e-30),
        (0.3, -0.0),
        (f32::MIN_POSITIVE, 1e-42),
        (-2.0, 2.0),
        (3e38, 1e38),
    ];
    let mut base = Memory::fixture("llama_tied_gqa");
    let mut tuned = base.tuned(1);
    for (column, (b, t)) in pairs.into_iter().enumerate() {
        base.tensor(UP).set(1, column, b);
        tuned.tensor(UP).set(1, column, t);
    }
    let folder = Folder::new(&base, &tuned);
    folder.compress("dense");
    let restored = folder.restore();
    check_restored(UP, &base.tensors[UP], &tuned.tensors[UP], &restored.tensors[UP]);
}

#[test]
fn the_fine_tune_keeps_its_own_type() {
    for (family, base_dtype, dtype) in [
        ("qwen2_tied", DType::F32, DType::BF16),
        ("llama_f16", DType::F32, DType::F16),
        ("qwen3_tied_bf16", DType::BF16, DType::F32),
        ("llama_f16", DType::F16, DType::BF16),
    ] {
        let mut base = Memory::fixture(family);
        let mut tuned = base.tuned(5);
        base.tensors.values_mut().for_each(|t| t.cast(base_dtype));
        tuned.tensors.values_mut().for_each(|t| t.cast(dtype));
        let folder = Folder::new(&base, &tuned);
        folder.compress("dense");
        let restored = folder.restore();
        for (name, want) in &tuned.tensors {
            check_restored(name, &base.tensors[name], want, &restored.tensors[name]);
        }
        // The tenant answers as the fine-tune does.
        let (checkpoint, artifact) = folder.open();
        verify(&checkpoint, &artifact, &Silent).unwrap();
        let model = Model::load(checkpoint).unwrap();
        let tenant = Tenant::load(&model, &artifact).unwrap();
        let own = Model::load(Checkpoint::open(&folder.fine_tune()).unwrap()).unwrap();
        let tokens = [3, 1, 4, 1, 5, 9, 2, 6];
        let error =
            difference(&logits(&model, Some(&tenant), &tokens), &logits(&own, None, &tokens));
        assert!(error <= 1e-4, "{family} {dtype}: {error:e}");
    }
}

#[test]
fn every_side_file_comes_back() {
    let mut base = Memory::fixture("llama_tied_gqa");
    let mut tuned = base.tuned(1);
    tuned.config["rope_parameters"]["rope_theta"] = serde_json::json!(500.0);
    for (i, name) in SIDE_FILES.iter().enumerate() {
        let bytes = format!("{name} of the base \u{0}\r\n").into_bytes();
        // Some are the same, some differ, some are on one side only.
        match i % 4 {
            0 => {
                base.side_files.insert((*name).into(), bytes.clone());
                tuned.side_files.insert((*name).into(), bytes);
            }
            1 => {
                base.side_files.insert((*name).into(), bytes);
                tuned.side_files.insert((*name).into(), b"of the fine-tune".to_vec());
            }
            2 => drop(tuned.side_files.insert((*name).into(), Vec::new())),
            _ => drop(base.side_files.insert((*name).into(), bytes)),
        }
    }
    let folder = Folder::new(&base, &tuned);
    std::fs::write(folder.fine_tune().join("training_args.bin"), "no part of the model").unwrap();
    folder.compress("sign");
    let (checkpoint, artifact) = folder.open();
    verify(&checkpoint, &artifact, &Silent).unwrap();
    assert_eq!(artifact.manifest().inherited.len(), 3);
    folder.restore();
    let mut want = contents(&folder.fine_tune());
    want.remove("training_args.bin");
    let mut got = contents(&folder.restored());
    assert!(want.remove("model.safetensors").is_some());
    assert!(got.remove("model.safetensors").is_some());
    assert_eq!(got, want);
}

#[test]
fn the_same_pair_gives_the_same_bytes_on_any_number_of_threads() {
    let codecs = CODECS.iter().flat_map(|c| [c.name().to_owned(), format!("{} exact", c.name())]);
    for codec in codecs {
        for family in ["llama_tied_gqa", "qwen3_tied_bf16"] {
            let base = Memory::fixture(family);
            let folder = Folder::new(&base, &base.tuned(1));
            let pair = folder.pair();
            let runs = [1, 4, 4].map(|n_threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
                pool.install(|| folder.compress(&codec));
                let artifact = contents(&folder.artifact());
                let (_, opened) = folder.open();
                pool.install(|| restore(pair.base(), &opened, &folder.restored(), &Silent))
                    .unwrap();
                let restored = contents(&folder.restored());
                std::fs::remove_dir_all(folder.artifact()).unwrap();
                std::fs::remove_dir_all(folder.restored()).unwrap();
                (artifact, restored)
            });
            assert!(runs[0] == runs[1] && runs[1] == runs[2], "{codec} on {family}");
        }
    }
}

#[test]
fn large_tensors_give_the_same_bytes_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(&demo("base"), &demo("math")).unwrap();
    for codec in CODECS {
        let runs = [1, 4].map(|n_threads| {
            let out = dir.path().join(format!("{}-{n_threads}", codec.name()));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            pool.install(|| compress(&pair, &plan(codec.name()), &out, &Silent)).unwrap();
            contents(&out)
        });
        assert!(runs[0] == runs[1], "{}", codec.name());
    }
}

#[test]
fn sharded_and_single_checkpoints_give_the_same_artifact() {
    let base = Memory::fixture("llama3_rope");
    let tuned = base.tuned(1);
    let single = Folder::new(&base, &tuned);
    single.compress("rtn");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("artifact");
    let pair = Pair::open(&fixture("llama3_rope"), &single.fine_tune()).unwrap();
    compress(&pair, &plan("rtn"), &out, &Silent).unwrap();
    let (one, other) = (contents(&single.artifact()), contents(&out));
    for name in ["linear-00001.safetensors", "rest-00001.safetensors"] {
        assert!(one[name] == other[name], "{name}");
    }
    let tensors = |dir: &std::path::Path| Artifact::open(dir).unwrap().manifest().tensors.clone();
    assert_eq!(tensors(&single.artifact()), tensors(&out));
}

/// A larger vocabulary than the base's: rows past it are stored as they are.
fn larger_vocabulary(family: &str, codec: &str) {
    const ADDED: usize = 7;
    let what = format!("{family}, {codec}");
    let base = Memory::fixture(family);
    let mut tuned = base.tuned(1);
    tuned.extend_vocabulary(ADDED);
    let folder = Folder::new(&base, &tuned);
    folder.compress(codec);
    let (checkpoint, artifact) = folder.open();
    verify(&checkpoint, &artifact, &Silent).unwrap();

    let restored = folder.restore();
    for name in [EMBEDDING, HEAD] {
        let Some(want) = tuned.tensors.get(name) else { continue };
        let got = &restored.tensors[name];
        assert_eq!(got.shape, want.shape, "{what}");
        let base_bytes = base.tensors[name].widen().len() * want.dtype.size_bytes();
        assert!(got.bytes[base_bytes..] == want.bytes[base_bytes..], "{what}, {name}");
        match &artifact.manifest().tensors[name].storage {
            Storage::Codec { added_rows, .. } => assert_eq!(*added_rows, ADDED),
            Storage::Exact { .. } => assert!(got == want, "{what}, {name}"),
            other => panic!("{what}: {name} is {other:?}"),
        }
    }

    // Its answers are those of the checkpoint that the artifact stands for.
    let model = Model::load(checkpoint).unwrap();
    let tenant = Tenant::load(&model, &artifact).unwrap();
    let own = Model::load(Checkpoint::open(&folder.restored()).unwrap()).unwrap();
    let vocab_size = own.config().vocab_size;
    assert_eq!(tenant.config(), own.config());
    let last = u32::try_from(vocab_size).unwrap() - 1;
    let tokens = [0, last, 5, last - 6, last - 7, 1];
    let got = logits(&model, Some(&tenant), &tokens);
    assert_eq!(got.len(), tokens.len() * vocab_size);
    let error = difference(&got, &logits(&own, None, &tokens));
    // Restored weights are rounded to the fine-tune's type, a tenant's are not.
    let bound = if base.tensors[NORM].dtype == DType::F32 { 1e-4 } else { 2e-2 };
    assert!(error <= bound, "{what}: {error:e}");
    if codec.starts_with("dense") {
        let own = Model::load(Checkpoint::open(&folder.fine_tune()).unwrap()).unwrap();
        let error = difference(&got, &logits(&own, None, &tokens));
        assert!(error <= 1e-4, "{what}: {error:e}");
    }
    // The base has no such token.
    let mut cache = KvCache::new(model.config());
    let logits = Logits::Last;
    let tokens = &[last][..];
    let segment = Segment { tokens, tenant: None, cache: &mut cache, logits };
    let error = model.forward(&mut [segment]).unwrap_err();
    let vocab_size = base.tensors[EMBEDDING].shape[0];
    let onebase_model::Error::Token { token, vocab_size: got } = error else { panic!("{error:?}") };
    assert_eq!((token, got), (last, vocab_size));
}

#[test]
fn a_larger_vocabulary_is_served_and_restored() {
    for family in ["llama_tied_gqa", "qwen3", "qwen2_tied", "llama_f16"] {
        for codec in ["dense", "dense exact", "rtn", "deltadq", "sign", "sign:scale=matrix exact"] {
            larger_vocabulary(family, codec);
        }
    }
}

#[test]
fn a_vocabulary_that_only_grew_is_a_change() {
    let base = Memory::fixture("qwen3");
    let mut tuned = base.clone();
    tuned.extend_vocabulary(1);
    let folder = Folder::new(&base, &tuned);
    folder.compress("dense");
    let (_, artifact) = folder.open();
    let changed: BTreeMap<_, _> = artifact
        .manifest()
        .tensors
        .iter()
        .filter(|(_, t)| t.storage != Storage::Unchanged)
        .map(|(name, t)| (name.as_str(), t.shape[0]))
        .collect();
    assert_eq!(changed, BTreeMap::from([(EMBEDDING, 181), (HEAD, 181)]));
    assert_eq!(folder.restore().tensors, tuned.tensors);
}

/// The names of vectors of a checkpoint.
fn vectors(memory: &Memory) -> Vec<String> {
    let vectors = memory.tensors.iter().filter(|(_, tensor)| tensor.shape.len() == 1);
    vectors.map(|(name, _)| name.clone()).collect()
}

/// Norms, norms of heads and biases, each one the base's but for its largest changes.
#[test]
fn vectors_can_be_deltas_too() {
    for family in FAMILIES {
        let base = Memory::fixture(family);
        let mut tuned = base.tuned(9);
        // One stays the base's.
        tuned.tensors.insert(NORM.to_owned(), base.tensors[NORM].clone());
        let folder = Folder::new(&base, &tuned);
        folder.compress("dense vectors magnitude:keep=0.25");
        let (checkpoint, artifact) = folder.open();
        verify(&checkpoint, &artifact, &Silent).unwrap();
        assert_eq!(artifact.record(NORM).unwrap().storage, Storage::Unchanged);
        let restored = folder.restore();
        for name in vectors(&base).iter().filter(|name| *name != NORM) {
            let [base, tuned, got] = [&base, &tuned, &restored].map(|m| m.tensors[name].widen());
            assert_eq!(artifact.delta(name).unwrap().unwrap().1.shape, [1, base.len()]);
            let kept = base.iter().zip(&got).filter(|(base, got)| base != got).count();
            assert!(kept > 0 && kept <= base.len().div_ceil(4), "{family}, {name}: {kept}");
            for ((base, tuned), got) in base.iter().zip(&tuned).zip(&got) {
                let near = (got - tuned).abs() <= 0.01 * (tuned - base).abs() + 0.01 * tuned.abs();
                assert!(got == base || near, "{family}, {name}: {base} {tuned} {got}");
            }
        }
        // The tenant answers as what is restored does, and its neighbours as ever.
        let model = Model::load(checkpoint).unwrap();
        let tenant = Tenant::load(&model, &artifact).unwrap();
        let own = Model::load(Checkpoint::open(&folder.restored()).unwrap()).unwrap();
        let tokens = [3, 1, 4, 1, 5, 9, 2, 6];
        let alone = [None, Some(&tenant)].map(|tenant| logits(&model, tenant, &tokens));
        let error = difference(&alone[1], &logits(&own, None, &tokens));
        let bound = if family.contains("16") { 2e-2 } else { 1e-4 };
        assert!(error <= bound, "{family}: {error:e}");
        let mut caches = [0; 3].map(|_| KvCache::new(model.config()));
        let whose = [Some(&tenant), None, Some(&tenant)];
        let mut segments: Vec<Segment<'_>> = caches
            .iter_mut()
            .zip(whose)
            .map(|(cache, tenant)| Segment { tokens: &tokens, tenant, cache, logits: Logits::All })
            .collect();
        let together = model.forward(&mut segments).unwrap();
        assert!(together == [&alone[1][..], &alone[0], &alone[1]], "{family}");
    }
}

#[test]
fn vectors_come_back_whole_through_a_codec_that_keeps_all() {
    for family in ["llama_bias", "qwen3", "qwen2_tied"] {
        let base = Memory::fixture(family);
        let tuned = base.tuned(3);
        let folder = Folder::new(&base, &tuned);
        folder.compress("sign vectors dense");
        let restored = folder.restore();
        for name in vectors(&base) {
            let [base, want, got] = [&base, &tuned, &restored].map(|m| &m.tensors[&name]);
            check_restored(&name, base, want, got);
        }
        // Beside the same codec with exact vectors nothing else changes.
        let other = Folder::new(&base, &tuned);
        other.compress("sign");
        let exact = other.restore();
        for (name, tensor) in restored.tensors.iter().filter(|(_, t)| t.shape.len() > 1) {
            assert!(exact.tensors[name] == *tensor, "{family}, {name}");
        }
    }
}
