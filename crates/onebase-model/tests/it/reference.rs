//! Logits, continuations and rendered conversations equal those of transformers
//! (`fixtures/make_reference.py`).

use std::path::{Path, PathBuf};

use onebase_format::Checkpoint;
use onebase_kernels::Backend;
use onebase_model::{
    ChatTemplate, KvCache, Logits, Model, Request, SamplingParams, Segment, generate,
};
use safetensors::SafeTensors;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Checkpoints with reference results: the random ones beside them, the trained
/// ones in `demo/` and, where it is given, in the folder `ONEBASE_ZOO`.
fn references() -> Vec<(String, PathBuf, PathBuf)> {
    let dir = root().join("fixtures/reference");
    let zoo = std::env::var_os("ONEBASE_ZOO").map(PathBuf::from);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let expected = entry.unwrap().path();
        let file = expected.file_name().unwrap().to_str().unwrap();
        let Some(name) = file.strip_suffix(".expected.safetensors") else { continue };
        let checkpoint = match name.strip_prefix("zoo-") {
            None => dir.join(name),
            Some(trained) => match root().join("demo").join(trained) {
                path if path.exists() => path,
                _ => match &zoo {
                    Some(zoo) => zoo.join(trained),
                    None => continue,
                },
            },
        };
        found.push((name.to_owned(), checkpoint, expected.clone()));
    }
    found.sort();
    assert!(found.len() >= 15, "the fixtures are there: {found:?}");
    found
}

struct Expected {
    input: Vec<u32>,
    positions: Vec<usize>,
    logits_f32: Vec<f32>,
    logits_bf16: Vec<f32>,
    greedy: Vec<u32>,
}

fn expected(path: &Path) -> Vec<Expected> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ints = |name: &str| -> Vec<u32> {
        let tensor = file.tensor(name).unwrap();
        let ids = tensor.data().chunks_exact(8);
        ids.map(|b| i64::from_le_bytes(b.try_into().unwrap()).try_into().unwrap()).collect()
    };
    let floats = |name: &str| -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    (0..2)
        .map(|i| Expected {
            input: ints(&format!("input_ids.{i}")),
            positions: ints(&format!("positions.{i}")).iter().map(|p| *p as usize).collect(),
            logits_f32: floats(&format!("logits_f32.{i}")),
            logits_bf16: floats(&format!("logits_bf16.{i}")),
            greedy: ints(&format!("greedy.{i}")),
        })
        .collect()
}

/// Runs a sequence in chunks and returns the logits of every position.
fn run(model: &Model, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut cache = KvCache::new(model.config());
    let mut all = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let segment = Segment { tokens, tenant: None, cache: &mut cache, logits: Logits::All };
        all.extend(model.forward(&mut [segment]).unwrap().remove(0));
    }
    all
}

/// Largest difference, relative to the largest logit.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let max = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0f32, |m, (g, w)| m.max((g - w).abs())) / max
}

#[test]
fn logits_equal_the_reference_on_every_backend() {
    for (name, checkpoint, path) in references() {
        for backend in Backend::available() {
            let model = Model::load(Checkpoint::open(&checkpoint).unwrap()).unwrap();
            let model = model.with_backend(backend);
            let vocab = model.config().vocab_size;
            for (index, want) in expected(&path).into_iter().enumerate() {
                let all = run(&model, &want.input, usize::MAX);
                let kept: Vec<f32> = want
                    .positions
                    .iter()
                    .flat_map(|p| all[p * vocab..(p + 1) * vocab].to_vec())
                    .collect();
                let what = format!("{name}.{index} {}", backend.name());
                let error = difference(&kept, &want.logits_f32);
                assert!(error <= 1e-4, "{what}: {error:e} from f32 arithmetic");
                // In bf16 arithmetic the reference is that far from itself; on
                // trained models that is below 2e-2.
                let own = difference(&want.logits_f32, &want.logits_bf16);
                let bound = if name.starts_with("zoo-") { 2e-2 } else { own + 1e-4 };
                let bf16_error = difference(&kept, &want.logits_bf16);
                assert!(bf16_error <= bound, "{what}: {bf16_error:e} from bf16 arithmetic");
                println!("{what}: {error:.1e} from f32, {bf16_error:.1e} from bf16 arithmetic");
            }
        }
    }
}

#[test]
fn logits_do_not_depend_on_how_a_prompt_is_split() {
    for (name, checkpoint, path) in references() {
        let model = Model::load(Checkpoint::open(&checkpoint).unwrap()).unwrap();
        let input = &expected(&path)[0].input;
        let whole = run(&model, input, usize::MAX);
        for chunk in [1, 7, 32] {
            assert!(run(&model, input, chunk) == whole, "{name} in chunks of {chunk}");
        }
    }
}

#[test]
fn greedy_continuations_equal_the_reference() {
    for (name, checkpoint, path) in references() {
        let model = Model::load(Checkpoint::open(&checkpoint).unwrap()).unwrap();
        let expected = expected(&path);
        let requests: Vec<_> = expected
            .iter()
            .map(|want| Request {
                tenant: None,
                prompt: want.input.clone(),
                max_new_tokens: want.greedy.len(),
                sampling: SamplingParams::GREEDY,
                stop_tokens: &[],
                stop_texts: &[],
                tokenizer: None,
            })
            .collect();
        let got = generate(&model, &requests, 8, |_| {}).unwrap();
        for (want, got) in expected.iter().zip(got.completions) {
            assert_eq!(got.tokens, want.greedy, "{name}");
        }
    }
}

#[test]
fn old_and_new_style_configurations_mean_the_same() {
    use onebase_model::ModelConfig;
    let dir = root().join("fixtures/reference");
    for name in ["llama3_rope", "qwen2_tied", "qwen3_moe_bf16"] {
        let read = |file: &str| {
            let path = dir.join(name).join(file);
            let value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            ModelConfig::from_json(&value, &path).unwrap()
        };
        assert_eq!(read("config.json"), read("config.v5.json"), "{name}");
    }
}

#[test]
fn chat_templates_render_as_the_reference() {
    let path = root().join("fixtures/reference/chat_templates.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let text = |field: &str| case[field].as_str().map(str::to_owned);
        let template = text("template").unwrap();
        let template =
            ChatTemplate::new(template, text("bos_token"), text("eos_token"), &path).unwrap();
        let messages = case["messages"].as_array().unwrap();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let got = template.render(messages, prompt);
        match text("expected_error") {
            Some(expected) => {
                let error = std::error::Error::source(&got.unwrap_err()).unwrap().to_string();
                assert!(error.contains(&expected), "{name}: {error}");
            }
            None => assert_eq!(got.unwrap(), text("expected").unwrap(), "{name}"),
        }
    }
}
