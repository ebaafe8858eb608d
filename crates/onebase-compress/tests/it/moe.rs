//! Models with experts: from checkpoint to artifact and back, in one batch with
//! others, in both layouts of their checkpoints, and damaged.

use std::collections::BTreeMap;

use crate::support::{Folder, Memory, Stored, difference, logits, of_files, plan};
use onebase_compress::{Error, Pair, Silent, compress, verify};
use onebase_format::artifact::{Artifact, Role, Storage};
use onebase_format::{Checkpoint, Error as FileError};
use onebase_model::{
    Error as ModelError, KvCache, Logits, Model, Request, SamplingParams, Segment, Tenant, generate,
};
use serde_json::{Value, json};

const FAMILIES: [&str; 3] = ["qwen3_moe", "qwen3_moe_bf16", "mixtral"];
const TOKENS: [u32; 9] = [3, 141, 59, 26, 5, 35, 89, 79, 32];
const EXPERT: &str = "model.layers.0.mlp.experts.3.up_proj.weight";
const ROUTER: &str = "model.layers.0.mlp.gate.weight";

/// A base with fine-tunes under several codecs.
struct Family {
    model: Model,
    tenants: Vec<Tenant>,
}

impl Family {
    fn new(name: &str, codecs: &[&str]) -> Self {
        let base = Memory::fixture(name);
        let dir = tempfile::tempdir().unwrap();
        base.write(dir.path());
        let model = Model::load(Checkpoint::open(dir.path()).unwrap()).unwrap();
        let tenants = (1..).zip(codecs).map(|(seed, codec)| {
            let folder = Folder::new(&base, &base.tuned(seed));
            folder.compress(codec);
            Tenant::load(&model, &folder.open().1).unwrap()
        });
        let tenants = tenants.collect();
        Self { model, tenants }
    }

    /// The base's, then each tenant's turn.
    fn voice(&self, i: usize) -> Option<&Tenant> {
        (i % (self.tenants.len() + 1)).checked_sub(1).map(|i| &self.tenants[i])
    }
}

#[test]
fn a_mixed_batch_gives_what_each_request_gets_alone() {
    for name in FAMILIES {
        let family = Family::new(name, &["rtn:bits=4,group_size=16", "sign", "dqrelo-plus"]);
        let vocab_size = u32::try_from(family.model.config().vocab_size).unwrap();
        let prompts: Vec<Vec<u32>> = (0..9u32)
            .map(|i| (0..3 + 5 * i).map(|j| (i * 31 + j * 17) % vocab_size).collect())
            .collect();
        let alone: Vec<Vec<f32>> = (0..)
            .zip(&prompts)
            .map(|(i, prompt)| logits(&family.model, family.voice(i), prompt))
            .collect();
        for n_threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            let mut caches: Vec<KvCache> =
                prompts.iter().map(|_| KvCache::new(family.model.config())).collect();
            let mut segments: Vec<Segment<'_>> = caches
                .iter_mut()
                .enumerate()
                .map(|(i, cache)| {
                    let (tokens, tenant) = (&prompts[i][..], family.voice(i));
                    Segment { tokens, tenant, cache, logits: Logits::All }
                })
                .collect();
            let got = pool.install(|| family.model.forward(&mut segments)).unwrap();
            for (i, (got, alone)) in got.iter().zip(&alone).enumerate() {
                assert!(got == alone, "{name}, request {i}, {n_threads} threads");
            }
        }
        let requests: Vec<Request<'_>> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| Request {
                tenant: family.voice(i),
                prompt: prompt.clone(),
                max_new_tokens: 4 + 3 * i,
                sampling: SamplingParams::GREEDY,
                stop_tokens: &[],
                stop_texts: &[],
                tokenizer: None,
            })
            .collect();
        let one = |request: &Request<'_>| {
            let run = generate(&family.model, std::slice::from_ref(request), 1, |_| {});
            run.unwrap().completions.remove(0)
        };
        let alone: Vec<_> = requests.iter().map(one).collect();
        for batch_size in [2, 5, requests.len()] {
            let mixed = generate(&family.model, &requests, batch_size, |_| {}).unwrap();
            assert_eq!(mixed.completions, alone, "{name} by {batch_size}");
        }
    }
}

#[test]
fn a_dense_tenant_answers_as_its_fine_tune() {
    for name in FAMILIES {
        let base = Memory::fixture(name);
        let folder = Folder::new(&base, &base.tuned(4));
        folder.compress("dense");
        let (checkpoint, artifact) = folder.open();
        verify(&checkpoint, &artifact, &Silent).unwrap();
        let model = Model::load(checkpoint).unwrap();
        let tenant = Tenant::load(&model, &artifact).unwrap();
        let own = Model::load(Checkpoint::open(&folder.fine_tune()).unwrap()).unwrap();
        let want = logits(&own, None, &TOKENS);
        let error = difference(&logits(&model, Some(&tenant), &TOKENS), &want);
        assert!(error <= 1e-5, "{name}: {error:e}");
        assert!(difference(&logits(&model, None, &TOKENS), &want) > 1e-2, "{name}");
    }
}

#[test]
fn experts_are_deltas_and_routers_are_exact() {
    for name in FAMILIES {
        let base = Memory::fixture(name);
        let tuned = base.tuned(2);
        let folder = Folder::new(&base, &tuned);
        folder.compress("rtn:bits=2");
        let (checkpoint, artifact) = folder.open();
        verify(&checkpoint, &artifact, &Silent).unwrap();
        let restored = folder.restore();
        let (mut n_routers, mut n_experts) = (0, 0);
        for (tensor, record) in &artifact.manifest().tensors {
            if tensor.ends_with("mlp.gate.weight") || tensor.ends_with("moe.gate.weight") {
                assert_eq!(record.role, Role::Vector, "{tensor}");
                assert!(matches!(record.storage, Storage::Exact { .. }), "{tensor}");
                assert!(restored.tensors[tensor] == tuned.tensors[tensor], "{tensor}");
                n_routers += 1;
            } else if tensor.contains(".experts.") {
                assert_eq!(record.role, Role::Linear, "{tensor}");
                assert!(matches!(record.storage, Storage::Codec { .. }), "{tensor}");
                n_experts += 1;
            }
        }
        let model = Model::load(checkpoint).unwrap();
        let mixture = model.config().mixture.clone().unwrap();
        assert!(n_routers > 0);
        assert_eq!(n_experts, n_routers * mixture.n_experts * 3);
    }
}

#[test]
fn a_router_of_its_own_sends_only_its_tenant_elsewhere() {
    let base = Memory::fixture("qwen3_moe");
    let mut tuned = base.clone();
    let turned: Vec<f32> = base.tensors[ROUTER].widen().iter().map(|w| -w).collect();
    tuned.tensor(ROUTER).fill(&turned);
    let folder = Folder::new(&base, &tuned);
    folder.compress("dense");
    let (checkpoint, artifact) = folder.open();
    let model = Model::load(checkpoint).unwrap();
    let tenant = Tenant::load(&model, &artifact).unwrap();
    let own = Model::load(Checkpoint::open(&folder.fine_tune()).unwrap()).unwrap();
    let (want, plain) = (logits(&own, None, &TOKENS), logits(&model, None, &TOKENS));
    assert!(want != plain && logits(&model, Some(&tenant), &TOKENS) == want);
    let mut caches = [(); 2].map(|()| KvCache::new(model.config()));
    let mut segments: Vec<_> = caches
        .iter_mut()
        .zip([Some(&tenant), None])
        .map(|(cache, tenant)| Segment { tokens: &TOKENS, tenant, cache, logits: Logits::All })
        .collect();
    assert!(model.forward(&mut segments).unwrap() == [want, plain]);
}

#[test]
fn a_router_that_is_stored_as_a_delta_is_refused() {
    let folder = Folder::compressed("qwen3_moe", "rtn exact");
    folder.edit_manifest(|manifest| {
        manifest["tensors"][ROUTER]["stored"] = json!("codec");
        manifest["tensors"][ROUTER]["codec"] = json!(0);
        manifest["tensors"][ROUTER]["parts"] = json!([]);
    });
    let error = Artifact::open(&folder.artifact()).unwrap_err();
    let FileError::Manifest { entry, problem, .. } = &error else { panic!("{error:?}") };
    assert_eq!(entry, ROUTER);
    assert!(problem.contains("expected exact, got a delta"), "{problem}");
}

/// The same model with the experts of each block in two tensors, as transformers 5
/// holds them.
fn stacked(model: &Memory) -> Memory {
    let mut stacked = model.clone();
    stacked.tensors.clear();
    let mut experts: BTreeMap<String, BTreeMap<(usize, usize), Stored>> = BTreeMap::new();
    for (name, tensor) in &model.tensors {
        let name = name.replace("block_sparse_moe", "mlp");
        let Some((block, expert)) = name.split_once(".experts.") else {
            stacked.tensors.insert(name, tensor.clone());
            continue;
        };
        let (number, site) = expert.split_once('.').unwrap();
        let (tensor_name, place) = match site.strip_suffix(".weight").unwrap() {
            "gate_proj" | "w1" => ("gate_up_proj", 0),
            "up_proj" | "w3" => ("gate_up_proj", 1),
            "down_proj" | "w2" => ("down_proj", 0),
            other => panic!("{other}"),
        };
        let all = experts.entry(format!("{block}.experts.{tensor_name}")).or_default();
        all.insert((number.parse().unwrap(), place), tensor.clone());
    }
    for (name, parts) in experts {
        let n_experts = parts.keys().last().unwrap().0 + 1;
        let first = parts.values().next().unwrap();
        let rows = first.shape[0] * parts.len() / n_experts;
        let shape = vec![n_experts, rows, first.shape[1]];
        let bytes = parts.values().flat_map(|t| t.bytes.clone()).collect();
        stacked.tensors.insert(name, Stored { dtype: first.dtype, shape, bytes });
    }
    stacked
}

#[test]
fn both_layouts_are_the_same_model() {
    for name in FAMILIES {
        let base = Memory::fixture(name);
        let tuned = base.tuned(1);
        let folder = Folder::new(&base, &tuned);
        folder.compress("rtn");
        let other = Folder::new(&stacked(&base), &stacked(&tuned));
        assert!(other.base().join("model.safetensors").metadata().unwrap().len() > 0);
        let checkpoint = Checkpoint::open(&other.base()).unwrap();
        let read = Memory::read(&other.base());
        assert!(read.tensors == base.tensors, "{name}");
        assert_eq!(checkpoint.size_bytes(), folder.open().0.size_bytes());
        // The artifact is the same, and made against either it fits the other.
        other.compress("rtn");
        let manifests = [&folder, &other].map(|f| f.open().1.manifest().tensors.clone());
        assert_eq!(manifests[0], manifests[1], "{name}");
        let (_, artifact) = folder.open();
        verify(&checkpoint, &artifact, &Silent).unwrap();
        let model = Model::load(checkpoint).unwrap();
        let tenant = Tenant::load(&model, &artifact).unwrap();
        let usual = Model::load(folder.open().0).unwrap();
        let usual_tenant = Tenant::load(&usual, &artifact).unwrap();
        for (tenant, usual_tenant) in [(None, None), (Some(&tenant), Some(&usual_tenant))] {
            let (got, want) =
                (logits(&model, tenant, &TOKENS), logits(&usual, usual_tenant, &TOKENS));
            assert!(got == want, "{name}");
        }
        // What is restored has the hub's layout.
        assert!(other.restore().tensors.keys().eq(tuned.tensors.keys()), "{name}");
        // One may lie in the one layout, the other in the other.
        let out = other.dir.path().join("mixed");
        let pair = Pair::open(&other.base(), &folder.fine_tune()).unwrap();
        compress(&pair, &plan("rtn"), &out, &Silent).unwrap();
        assert_eq!(Artifact::open(&out).unwrap().manifest().tensors, manifests[0], "{name}");
    }
}

#[test]
fn stacked_experts_of_another_shape_are_refused() {
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let shapes: [&[usize]; 4] = [&[5, 80 * 48], &[400, 48], &[80, 5, 48], &[5, 80, 48, 1]];
    for shape in shapes {
        let mut model = stacked(&Memory::fixture("qwen3_moe"));
        model.tensor(name).shape = shape.to_vec();
        let dir = tempfile::tempdir().unwrap();
        model.write(dir.path());
        let error = Checkpoint::open(dir.path()).unwrap_err();
        let FileError::StackedShape { path, tensor, expected, got } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*path, dir.path().join("model.safetensors"));
        assert_eq!((tensor.as_str(), got.as_slice()), (name, shape));
        assert_eq!(*expected, "[experts, 2 × width, hidden]");
        assert!(error.hint().unwrap().contains("save_original_format=True"));
    }
    // Taken apart, it is none of the configuration's shapes.
    let mut model = stacked(&Memory::fixture("qwen3_moe"));
    model.tensor(name).shape = vec![5, 48, 80];
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    let error = Model::load(Checkpoint::open(dir.path()).unwrap()).unwrap_err();
    let ModelError::Shape { tensor, expected, got, .. } = &error else { panic!("{error:?}") };
    assert_eq!(tensor, "model.layers.0.mlp.experts.0.gate_proj.weight");
    assert_eq!((&expected[..], &got[..]), (&[40, 48][..], &[24, 80][..]));
    // Experts in both layouts.
    let mut both = stacked(&Memory::fixture("qwen3_moe"));
    both.tensors.insert(EXPERT.to_owned(), Memory::fixture("qwen3_moe").tensors[EXPERT].clone());
    both.write(dir.path());
    let error = Checkpoint::open(dir.path()).unwrap_err();
    let FileError::DuplicateTensor { tensor, .. } = &error else { panic!("{error:?}") };
    assert_eq!(tensor, EXPERT);
}

/// Why a pair is refused, the fine-tune having been altered.
fn refusal(alter: impl FnOnce(&mut Memory)) -> (Error, Folder) {
    let base = Memory::fixture("qwen3_moe");
    let mut tuned = base.tuned(1);
    alter(&mut tuned);
    let folder = Folder::new(&base, &tuned);
    (Pair::open(&folder.base(), &folder.fine_tune()).unwrap_err(), folder)
}

#[test]
fn experts_that_are_missing_or_of_another_shape_are_named() {
    for name in [EXPERT, ROUTER] {
        let (error, folder) = refusal(|tuned| drop(tuned.tensors.remove(name)));
        let FileError::MissingTensor { path, tensor } = of_files(&error) else {
            panic!("{error:?}")
        };
        assert_eq!((path, tensor.as_str()), (&folder.fine_tune(), name));
        assert!(error.hint().unwrap().contains("incomplete"), "{:?}", error.hint());
    }
    for (name, expected, got) in [(EXPERT, [40, 48], [48, 40]), (ROUTER, [5, 48], [48, 5])] {
        let (error, folder) = refusal(|tuned| tuned.tensor(name).shape.reverse());
        let Error::Model(ModelError::Shape { path, tensor, expected: e, got: g }) = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*path, folder.fine_tune().join("model.safetensors"));
        assert_eq!(tensor, name);
        assert_eq!((&e[..], &g[..]), (&expected[..], &got[..]));
        assert!(error.hint().unwrap().contains("two models"), "{:?}", error.hint());
    }
    // One more than the configuration has.
    let extra = "model.layers.0.mlp.experts.5.up_proj.weight";
    let (error, _folder) = refusal(|tuned| {
        let expert = tuned.tensor(EXPERT).clone();
        tuned.tensors.insert(extra.to_owned(), expert);
    });
    let Error::Model(ModelError::UnexpectedTensor { tensor, .. }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(tensor, extra);
}

#[test]
fn a_fine_tune_with_other_experts_is_refused() {
    let cases: [(&str, Value, &str, &str, &str); 4] = [
        ("num_local_experts", json!(6), "num_experts", "5", "6"),
        ("moe_intermediate_size", json!(48), "moe_intermediate_size", "40", "48"),
        ("mlp_only_layers", json!([0]), "the set of layers with experts", "[0, 2]", "[1, 2]"),
        ("decoder_sparse_step", json!(3), "the set of layers with experts", "[0, 2]", "[2]"),
    ];
    for (name, value, field, expected, got) in cases {
        let (error, folder) = refusal(|tuned| tuned.config[name] = value);
        let Error::Model(ModelError::OtherModel { path, field: f, expected: e, got: g }) = &error
        else {
            panic!("{name}: {error:?}")
        };
        assert_eq!((path, *f), (&folder.fine_tune(), field));
        assert_eq!((e.as_str(), g.as_str()), (expected, got));
        assert!(error.hint().is_some());
    }
}
