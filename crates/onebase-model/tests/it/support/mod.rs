//! Checkpoints, and artifacts that change nothing but the configuration.

use std::path::{Path, PathBuf};

use onebase_format::artifact::{Artifact, ArtifactWriter, Origin, Run, Shard, StoredTensor};
use onebase_format::{Checkpoint, Digest};
use onebase_model::{
    KvCache, Logits, Model, ModelConfig, Request, SamplingParams, Segment, Tenant, TextModel,
    tensor_specs,
};
use serde_json::{Map, Value};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    root().join("fixtures/reference").join(name)
}

pub(crate) fn load(dir: &Path) -> Model {
    Model::load(Checkpoint::open(dir).unwrap()).unwrap()
}

/// The demo's base, with its tokenizer.
pub(crate) fn demo() -> (Model, TextModel) {
    let model = load(&root().join("demo/base"));
    let text = TextModel::from_checkpoint(model.checkpoint()).unwrap();
    (model, text)
}

/// A checkpoint with the weights of another and an altered configuration.
pub(crate) fn with_config(from: &Path, dir: &Path, edit: impl FnOnce(&mut Value)) {
    std::fs::create_dir_all(dir).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    let path = dir.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

/// A tenant with the base's weights and an altered configuration.
pub(crate) fn tenant(model: &Model, edit: impl FnOnce(&mut Value)) -> Tenant {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("artifact");
    let base = model.checkpoint();
    let specs = tensor_specs(model.config());
    let run = Run {
        tool: "test".into(),
        base: "base".into(),
        fine_tune: "tuned".into(),
        inputs: Digest::of(b""),
        options: Map::new(),
        calibration: None,
        n_tensors: specs.len(),
        shard: Shard::WHOLE,
    };
    let mut writer = ArtifactWriter::open(&out, &run, false).unwrap();
    for (index, spec) in specs.iter().enumerate() {
        let tensor = base.tensor(&spec.name).unwrap();
        let digest = tensor.digest().unwrap();
        let origin = Origin {
            index,
            name: &spec.name,
            role: spec.role,
            dtype: tensor.dtype(),
            shape: tensor.shape(),
            base: digest,
            fine_tune: digest,
        };
        writer.put(StoredTensor::unchanged(origin), &[]).unwrap();
    }
    let mut config = base.config().clone();
    edit(&mut config);
    writer.put_file("config.json", config.to_string().as_bytes()).unwrap();
    writer.finish(|_, _| String::new()).unwrap();
    let artifact = Artifact::open(&out).unwrap();
    assert!(ModelConfig::of_artifact(&artifact, base).is_ok());
    Tenant::load(model, &artifact).unwrap()
}

/// A greedy request without stops or text.
pub(crate) fn request<'a>(prompt: &[u32], max_new_tokens: usize) -> Request<'a> {
    Request {
        tenant: None,
        prompt: prompt.to_vec(),
        max_new_tokens,
        sampling: SamplingParams::GREEDY,
        stop_tokens: &[],
        stop_texts: &[],
        tokenizer: None,
    }
}

/// The logits of every position of a sequence.
pub(crate) fn logits(model: &Model, tenant: Option<&Tenant>, tokens: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::new(tenant.map_or(model.config(), Tenant::config));
    let segment = Segment { tokens, tenant, cache: &mut cache, logits: Logits::All };
    model.forward(&mut [segment]).unwrap().remove(0)
}
