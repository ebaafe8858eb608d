//! A quantized base computes what the base does, tenants on it what their fine-tunes do, and
//! nobody else's delta is served on it.

use std::path::Path;
use std::sync::LazyLock;

use crate::support::{FAMILIES, Folder, Memory, demo, difference, logits, plan};
use onebase_compress::{
    Error, Pair, QuantizeOptions, QuantizeText, Reference, Rounding, Silent, compress,
    open_rotated, quantize, random_tokens, verify,
};
use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use onebase_model::quantized::{Method, QUANTIZED_FILE};
use onebase_model::{KvCache, Logits, Model, ModelConfig, Segment, Tenant, TextModel};

/// What is computed is as good as the weights are.
const FULL: QuantizeOptions = QuantizeOptions {
    method: Method::Resq,
    weight_bits: 8,
    activation_bits: 16,
    kv_bits: 16,
    table_bits: 16,
    is_paper: false,
    rounding: Rounding::Nearest,
    seed: 0,
};

/// 4/8/4 with tables in 8 bits.
const USUAL: QuantizeOptions = QuantizeOptions {
    weight_bits: 4,
    activation_bits: 8,
    kv_bits: 4,
    table_bits: 8,
    rounding: Rounding::Gptq,
    ..FULL
};

/// Random tokens, as many as the moment of a fixture needs.
fn tokens(base: &Path) -> QuantizeText {
    let model = Model::load(Checkpoint::open(base).unwrap()).unwrap();
    let tokens = random_tokens(&model, 2 * model.config().hidden_size, 3);
    QuantizeText { record: None, tokens, window_tokens: 32 }
}

/// A part of the text that the demo's base was trained on.
fn demo_text() -> QuantizeText {
    let text = TextModel::from_checkpoint(&Checkpoint::open(&demo("base")).unwrap()).unwrap();
    let readme = std::fs::read_to_string(demo("../README.md")).unwrap();
    let mut tokens = text.tokenizer.encode(&readme, true).unwrap();
    tokens.truncate(2048);
    QuantizeText { record: None, tokens, window_tokens: 256 }
}

fn is_dense(family: &str) -> bool {
    !matches!(family, "mixtral" | "qwen3_moe" | "qwen3_moe_bf16")
}

fn load(dir: &Path) -> Model {
    Model::load(Checkpoint::open(dir).unwrap()).unwrap()
}

fn tenant(model: &Model, dir: &Path) -> Tenant {
    Tenant::load(model, &Artifact::open(dir).unwrap()).unwrap()
}

/// Compresses a fine-tune against a quantized base.
fn compress_on(base: &Path, fine_tune: &Path, reference: &Reference, codec: &str, out: &Path) {
    let pair = open_rotated(base, fine_tune, reference, out, &Silent).unwrap();
    compress(pair.pair(), &plan(codec), out, &Silent).unwrap();
}

/// How far logits are from others, in parts of their length.
fn relative(got: &[f32], expected: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let apart = got.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b)));
    let length: f64 = expected.iter().map(|v| square(f64::from(*v))).sum();
    (apart.sum::<f64>() / length).sqrt()
}

#[test]
fn rotating_alone_changes_no_logits() {
    for family in FAMILIES.into_iter().filter(|family| is_dense(family)) {
        let base = Memory::fixture(family);
        let folder = Folder::new(&base, &base);
        let text = tokens(&folder.base());
        for method in [Method::Resq, Method::Quarot] {
            let out = folder.dir.path().join(method.name());
            let options = QuantizeOptions { method, ..FULL };
            let text = Some(&text);
            let written = quantize(&folder.base(), &options, text, &out, &Silent).unwrap();
            let error = written.rotation_error;
            assert!(error > 0.0 && error <= 1e-5, "{family}, {method:?}: {error:e}");
            // Eight bits of each weight are left.
            let model = load(&out);
            let tokens: Vec<u32> = (0..12).collect();
            let expected = logits(&load(&folder.base()), None, &tokens);
            let error = relative(&logits(&model, None, &tokens), &expected);
            assert!(error < 0.05, "{family}, {method:?}: {error:e}");
        }
    }
}

#[test]
fn sizes_without_a_hadamard_matrix_are_rotated_at_random() {
    let mut base = Memory::fixture("llama_tied_gqa");
    let n = 14;
    let old = base.config["intermediate_size"].as_u64().unwrap() as usize;
    base.config["intermediate_size"] = n.into();
    for (name, tensor) in &mut base.tensors {
        let is_down = name.ends_with("down_proj.weight");
        if !is_down && !name.contains(".mlp.") {
            continue;
        }
        let wide = tensor.widen();
        let (kept, shape) = if is_down {
            let rows = wide.chunks(old).flat_map(|row| row[..n].to_vec()).collect();
            (rows, vec![tensor.shape[0], n])
        } else {
            let width = wide.len() / old;
            (wide[..n * width].to_vec(), [&[n], &tensor.shape[1..]].concat())
        };
        tensor.shape = shape;
        tensor.fill(&kept);
    }
    let folder = Folder::new(&base, &base.tuned(2));
    let out = folder.dir.path().join("quantized");
    let text = tokens(&folder.base());
    let written = quantize(&folder.base(), &FULL, Some(&text), &out, &Silent).unwrap();
    assert_eq!(written.random_sizes, [n]);
    assert!(written.rotation_error <= 1e-5, "{}", written.rotation_error);
    let config = Checkpoint::open(&out).unwrap().config().clone();
    assert_eq!(config["quantization_config"]["hadamard_block"], 7);
    let delta = folder.dir.path().join("delta");
    compress_on(&out, &folder.fine_tune(), &Reference::Quantized, "dense", &delta);
    let tokens: Vec<u32> = (0..12).collect();
    let model = load(&out);
    let got = logits(&model, Some(&tenant(&model, &delta)), &tokens);
    let error = relative(&got, &logits(&load(&folder.fine_tune()), None, &tokens));
    assert!(error < 2e-5, "{error:e}");
}

#[test]
fn a_delta_of_everything_makes_the_fine_tune() {
    // Norms and biases of the fine-tune too are others than the base's.
    for family in FAMILIES.into_iter().filter(|family| is_dense(family)) {
        let base = Memory::fixture(family);
        let folder = Folder::new(&base, &base.tuned(5));
        let quantized = folder.dir.path().join("quantized");
        let text = tokens(&folder.base());
        let options = QuantizeOptions { weight_bits: 4, table_bits: 8, ..FULL };
        quantize(&folder.base(), &options, Some(&text), &quantized, &Silent).unwrap();
        let tokens: Vec<u32> = (0..12).collect();
        let expected = logits(&load(&folder.fine_tune()), None, &tokens);
        let model = load(&quantized);
        let out = folder.dir.path().join("delta");
        compress_on(&quantized, &folder.fine_tune(), &Reference::Quantized, "dense", &out);
        let got = logits(&model, Some(&tenant(&model, &out)), &tokens);
        let error = relative(&got, &expected);
        assert!(error < 2e-5, "{family}: {error:e}");
        // Taken against the full base, what quantizing has changed stays.
        let out = folder.dir.path().join("full delta");
        let full = Reference::Full(folder.base());
        compress_on(&quantized, &folder.fine_tune(), &full, "dense", &out);
        let of_base =
            relative(&logits(&model, None, &tokens), &logits(&load(&folder.base()), None, &tokens));
        let got = logits(&model, Some(&tenant(&model, &out)), &tokens);
        let error = relative(&got, &expected);
        assert!(error > 1e-4 && error < 2.0 * of_base, "{family}: {error:e}, {of_base:e}");
    }
}

/// The demo's base in 4/8/4, and both of its fine-tunes on it.
struct Demo {
    dir: tempfile::TempDir,
    model: Model,
}

static DEMO: LazyLock<Demo> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    quantize(&demo("base"), &USUAL, Some(&demo_text()), &base, &Silent).unwrap();
    for (fine_tune, codec) in [("math", "deltamix"), ("chat", "rtn")] {
        let out = dir.path().join(fine_tune);
        compress_on(&base, &demo(fine_tune), &Reference::Quantized, codec, &out);
    }
    let model = load(&base);
    Demo { dir, model }
});

impl Demo {
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn rows_of_a_quantized_batch_are_those_of_each_alone() {
    let Demo { model, .. } = &*DEMO;
    let tenants = ["math", "chat"].map(|name| tenant(model, &DEMO.path(name)));
    let who = [None, Some(&tenants[0]), Some(&tenants[1]), Some(&tenants[0])];
    let tokens: Vec<u32> = (40..117).collect();
    let alone: Vec<Vec<f32>> = who[..3].iter().map(|who| logits(model, *who, &tokens)).collect();
    assert_ne!(alone[0], alone[1]);
    // In chunks, all in one batch.
    let mut caches = who.map(|_| KvCache::new(model.config()));
    let mut got = vec![Vec::new(); who.len()];
    let mut rest = &tokens[..];
    for size in [1, 35, 2, 39] {
        let (tokens, after) = rest.split_at(size);
        rest = after;
        let mut segments: Vec<Segment<'_>> = caches
            .iter_mut()
            .zip(who)
            .map(|(cache, tenant)| Segment { tokens, tenant, cache, logits: Logits::All })
            .collect();
        for (got, logits) in got.iter_mut().zip(model.forward(&mut segments).unwrap()) {
            got.extend(logits);
        }
    }
    assert!(rest.is_empty());
    for (got, expected) in got.iter().zip([&alone[0], &alone[1], &alone[2], &alone[1]]) {
        assert!(got == expected, "{}", difference(got, expected));
    }
    // Pages of a prefix are shared, and what follows is each sequence's own.
    let mut one = caches[0].prefix(40);
    let mut other = caches[0].prefix(40);
    let next = |cache: &mut KvCache, tokens: &[u32]| {
        let segment = Segment { tokens, tenant: None, cache, logits: Logits::All };
        model.forward(&mut [segment]).unwrap().concat()
    };
    let vocab_size = model.config().vocab_size;
    let first = next(&mut one, &tokens[40..60]);
    next(&mut other, &[7, 8, 9]);
    let second = next(&mut one, &tokens[60..]);
    assert!([first, second].concat() == alone[0][40 * vocab_size..]);
}

#[test]
fn backends_agree_on_a_quantized_base() {
    let tokens: Vec<u32> = (40..80).collect();
    let expected = logits(&DEMO.model, None, &tokens);
    for backend in onebase_kernels::Backend::available() {
        let model = load(&DEMO.path("base")).with_backend(backend);
        let error = relative(&logits(&model, None, &tokens), &expected);
        // Where a sum in f32 is rounded otherwise, a code may be another.
        assert!(error < 0.02, "{}: {error:e}", backend.name());
    }
}

#[test]
fn every_codec_serves_on_a_quantized_base() {
    let Demo { model, .. } = &*DEMO;
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (40..80).collect();
    let expected = logits(&load(&demo("chat")), None, &tokens);
    let full = load(&demo("base"));
    for codec in onebase_codec::CODECS {
        let [out, plain] =
            ["", " plain"].map(|of| dir.path().join(format!("{}{of}", codec.name())));
        compress_on(&DEMO.path("base"), &demo("chat"), &Reference::Quantized, codec.name(), &out);
        let artifact = Artifact::open(&out).unwrap();
        verify(model.checkpoint(), &artifact, &Silent).unwrap();
        let error = relative(&logits(model, Some(&tenant(model, &out)), &tokens), &expected);
        let pair = Pair::open(&demo("base"), &demo("chat")).unwrap();
        compress(&pair, &plan(codec.name()), &plain, &Silent).unwrap();
        let of_full = relative(&logits(&full, Some(&tenant(&full, &plain)), &tokens), &expected);
        let bound = 1.25 * of_full + 0.1;
        assert!(error < bound, "{}: {error}, on the full base {of_full}", codec.name());
    }
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let again = dir.path().join("base");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| quantize(&demo("base"), &USUAL, Some(&demo_text()), &again, &Silent)).unwrap();
    for name in ["model.safetensors", "config.json", QUANTIZED_FILE] {
        let [a, b] = [&again, &DEMO.path("base")].map(|d| std::fs::read(d.join(name)).unwrap());
        assert!(a == b, "{name}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn deltas_of_another_quantization_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other");
    let options = QuantizeOptions { seed: 1, ..USUAL };
    quantize(&demo("base"), &options, Some(&demo_text()), &other, &Silent).unwrap();
    let full = dir.path().join("full");
    compress_on(&DEMO.path("base"), &demo("chat"), &Reference::Full(demo("base")), "rtn", &full);
    tenant(&DEMO.model, &full);
    let plain = dir.path().join("plain");
    let pair = Pair::open(&demo("base"), &demo("chat")).unwrap();
    compress(&pair, &plan("rtn"), &plain, &Silent).unwrap();
    let bases = [(load(&other), "other"), (load(&demo("base")), "plain")];
    for (artifact, base) in [
        (DEMO.path("chat"), &bases[0]),
        (DEMO.path("chat"), &bases[1]),
        (full.clone(), &bases[0]),
        (full, &bases[1]),
        (plain.clone(), &bases[0]),
    ] {
        let opened = Artifact::open(&artifact).unwrap();
        let error = Tenant::load(&base.0, &opened).expect_err("another base");
        let error = format!("{error} {:?}", error.hint());
        assert!(error.contains("base"), "{} on {}: {error}", artifact.display(), base.1);
        verify(base.0.checkpoint(), &opened, &Silent).expect_err("another base");
    }
    // Of another model than the one that was quantized.
    let reference = Reference::Full(demo("math"));
    let error = open_rotated(&DEMO.path("base"), &demo("chat"), &reference, &plain, &Silent);
    assert!(matches!(error, Err(Error::OtherFull { .. })), "{error:?}");
    assert!(!dir.path().join(".plain.rotated").exists());
}

#[test]
fn altered_codes_are_no_base_for_a_delta() {
    let dir = tempfile::tempdir().unwrap();
    let altered = dir.path().join("base");
    std::fs::create_dir(&altered).unwrap();
    for entry in std::fs::read_dir(DEMO.path("base")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, altered.join(path.file_name().unwrap())).unwrap();
    }
    let path = altered.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let artifact = Artifact::open(&DEMO.path("chat")).unwrap();
    let error = Tenant::load(&load(&altered), &artifact).expect_err("altered codes");
    assert!(matches!(error, onebase_model::Error::OtherCodes { .. }), "{error:?}");
}

#[test]
fn what_cannot_be_quantized_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |base: &Path, options: &QuantizeOptions, text: Option<&QuantizeText>| {
        let error = quantize(base, options, text, &out, &Silent).expect_err("a refusal");
        assert!(!out.exists() && !dir.path().join(".out.partial").exists());
        error
    };
    let short = QuantizeText { tokens: vec![1; 100], ..demo_text() };
    let error = refused(&demo("base"), &FULL, Some(&short));
    assert!(matches!(error, Error::ShortText { n_tokens: 100, least: 256 }), "{error:?}");
    let error = refused(&demo("base"), &FULL, None);
    assert!(matches!(error, Error::ShortText { n_tokens: 0, .. }), "{error:?}");
    let error = refused(&DEMO.path("base"), &FULL, Some(&demo_text()));
    assert!(matches!(error, Error::AlreadyQuantized { .. }), "{error:?}");
    let mixture = Memory::fixture("mixtral");
    let folder = Folder::new(&mixture, &mixture);
    let error = refused(&folder.base(), &FULL, Some(&tokens(&folder.base())));
    assert!(matches!(error, Error::QuantizedExperts { .. }), "{error:?}");
    let error = open_rotated(&demo("base"), &demo("chat"), &Reference::Quantized, &out, &Silent);
    assert!(matches!(error, Err(Error::NotQuantized { .. })), "{error:?}");
    let error =
        open_rotated(&DEMO.path("base"), &folder.base(), &Reference::Quantized, &out, &Silent);
    assert!(matches!(error, Err(Error::Model(onebase_model::Error::OtherModel { .. }))));
    let error = onebase_compress::restore(
        DEMO.model.checkpoint(),
        &Artifact::open(&DEMO.path("chat")).unwrap(),
        &out,
        &Silent,
    );
    assert!(matches!(error, Err(Error::RestoreOnQuantized { .. })), "{error:?}");
}

#[test]
fn malformed_quantizations_name_the_field() {
    let config = Checkpoint::open(&DEMO.path("base")).unwrap().config().clone();
    let read = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut config = config.clone();
        edit(&mut config["quantization_config"]);
        ModelConfig::from_json(&config, Path::new("here"))
    };
    read(&|_| ()).unwrap();
    for (field, value) in [
        ("quant_method", serde_json::json!("gptq")),
        ("version", serde_json::json!(2)),
        ("method", serde_json::json!("awq")),
        ("weight_bits", serde_json::json!(3)),
        ("activation_bits", serde_json::json!(2)),
        ("kv_bits", serde_json::json!(5)),
        ("table_bits", serde_json::json!(4)),
        ("high_hidden", serde_json::json!(257)),
        ("high_head", serde_json::json!(7)),
        ("hadamard_block", serde_json::json!(5)),
    ] {
        let error = read(&|fields| fields[field] = value.clone()).expect_err(field).to_string();
        assert!(error.contains("quantization_config"), "{field}: {error}");
    }
    read(&|fields| fields["weight_bits"] = serde_json::Value::Null).expect_err("a missing field");
}
