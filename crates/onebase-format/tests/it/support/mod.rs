//! Safetensors files, folders and artifacts to damage.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use onebase_format::Digest;
use onebase_format::artifact::{
    ArtifactWriter, CodecRecord, MANIFEST_FILE, Manifest, Origin, Role, Run, Shard, Sizes,
    StoredTensor,
};
use onebase_tensor::{DType, EncodedDelta, PartData};
use serde_json::{Map, Value, json};
use tempfile::{TempDir, tempdir};

/// The files that [`artifact`] writes.
pub(crate) const LINEAR: &str = "linear-00001.safetensors";
pub(crate) const REST: &str = "rest-00001.safetensors";

/// A tensor of a file: name, type as in the header, shape, bytes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Stored {
    pub(crate) fn new(name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) -> Self {
        Self { name: name.to_owned(), dtype: dtype.to_owned(), shape: shape.to_vec(), bytes }
    }

    /// An f32 tensor whose elements count up.
    pub(crate) fn f32(name: &str, shape: &[usize]) -> Self {
        let n: usize = shape.iter().product();
        let bytes = (0..n).flat_map(|i| (i as f32 / 8.0).to_le_bytes()).collect();
        Self::new(name, "F32", shape, bytes)
    }
}

/// A file with this header, whatever it says.
pub(crate) fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend_from_slice(data);
    file
}

/// Two tensors of different types.
pub(crate) fn two_tensors() -> Vec<Stored> {
    let bytes = (0..12).collect();
    vec![Stored::f32("a", &[2, 3]), Stored::new("b", "BF16", &[6], bytes)]
}

/// A valid safetensors file.
pub(crate) fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for tensor in tensors {
        let end = data.len() + tensor.bytes.len();
        let entry = json!({
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [data.len(), end],
        });
        header.insert(tensor.name.clone(), entry);
        data.extend_from_slice(&tensor.bytes);
    }
    with_header(Value::Object(header).to_string().as_bytes(), &data)
}

/// The tensors of a valid safetensors file.
pub(crate) fn tensors(file: &[u8]) -> Vec<Stored> {
    let file = safetensors::SafeTensors::deserialize(file).unwrap();
    let mut list: Vec<Stored> = file
        .tensors()
        .into_iter()
        .map(|(name, t)| Stored::new(&name, &t.dtype().to_string(), t.shape(), t.data().to_vec()))
        .collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// A checkpoint folder of one file with these bytes.
pub(crate) fn write_checkpoint(dir: &Path, model: &[u8]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), "{}").unwrap();
    std::fs::write(dir.join("model.safetensors"), model).unwrap();
}

/// A checkpoint folder of shards with an index.
pub(crate) fn write_shards(dir: &Path, shards: &[(&str, &[Stored])], weight_map: &Value) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), "{}").unwrap();
    for (name, tensors) in shards {
        std::fs::write(dir.join(name), safetensors(tensors)).unwrap();
    }
    let index = json!({ "weight_map": weight_map }).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
}

/// The digest that [`artifact`] records for each base tensor.
pub(crate) fn base_digest(tensor: &str) -> Digest {
    Digest::of(tensor.as_bytes())
}

/// What [`put_artifact`] writes.
pub(crate) fn run_of_artifact(shard: Shard) -> Run {
    Run {
        tool: "test 1".into(),
        base: "base".into(),
        fine_tune: "tuned".into(),
        inputs: Digest::of(b"inputs"),
        options: Map::new(),
        calibration: None,
        n_tensors: 4,
        shard,
    }
}

/// An artifact with a tensor stored in each way and a file of each kind: a
/// linear site and embeddings with two added rows as deltas, a norm as it is, a
/// second linear site of the base.
pub(crate) fn artifact(dir: &Path) {
    let mut writer = ArtifactWriter::open(dir, &run_of_artifact(Shard::WHOLE), false).unwrap();
    put_artifact(&mut writer, |_| true, true);
    writer.finish(card).unwrap();
}

pub(crate) fn card(_: &Manifest, _: &Sizes) -> String {
    "a card\n".to_owned()
}

/// Puts the tensors at some positions of that artifact, and the files if they are wanted
/// and not there.
pub(crate) fn put_artifact(
    writer: &mut ArtifactWriter,
    is_ours: impl Fn(usize) -> bool,
    files: bool,
) {
    let codec = |name: &str| CodecRecord { name: name.into(), version: 1, options: Map::new() };
    let origin = |index, name, role, shape| Origin {
        index,
        name,
        role,
        dtype: DType::BF16,
        shape,
        base: base_digest(name),
        fine_tune: Digest::of(b"tuned"),
    };
    let delta = |rows: usize| {
        let codes = PartData::U8((0..rows as u8 * 4).collect());
        let scale = PartData::F32((0..rows).map(|i| i as f32).collect());
        EncodedDelta::new(
            [rows, 8],
            [("codes", vec![rows, 4], codes), ("scale", vec![rows], scale)],
        )
    };
    if is_ours(0) {
        let up = origin(0, "layer.up.weight", Role::Linear, &[3, 8]);
        writer.put_delta(up, codec("one"), &delta(3), &[]).unwrap();
    }
    if is_ours(1) {
        let down = origin(1, "layer.down.weight", Role::Linear, &[8, 3]);
        writer.put(StoredTensor::unchanged(down), &[]).unwrap();
    }
    if is_ours(2) {
        let embedding = origin(2, "embed.weight", Role::Embedding, &[6, 8]);
        writer.put_delta(embedding, codec("two"), &delta(4), &[9; 2 * 8 * 2]).unwrap();
    }
    if is_ours(3) {
        let norm = origin(3, "norm.weight", Role::Vector, &[8]);
        writer.put(StoredTensor::exact(norm), &[1; 16]).unwrap();
    }
    if files && !writer.has_file("config.json") {
        writer.put_file("config.json", b"{\"hidden_size\": 8}").unwrap();
    }
    if files && !writer.has_file("tokenizer.json") {
        writer.inherit_file("tokenizer.json", b"{}").unwrap();
    }
}

/// Changes an artifact's manifest.
pub(crate) fn edit_manifest(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join(MANIFEST_FILE);
    let mut manifest = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut manifest);
    std::fs::write(&path, manifest.to_string()).unwrap();
}

/// Replaces a file of an artifact, its length and digest in the manifest too.
pub(crate) fn resign(dir: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(dir.join(name), bytes).unwrap();
    edit_manifest(dir, |manifest| {
        let digest = Digest::of(bytes).to_string();
        manifest["files"][name] = json!({ "bytes": bytes.len(), "blake3": digest });
    });
}

/// Changes the tensors of a file of an artifact and re-signs it.
pub(crate) fn edit_tensors(dir: &Path, name: &str, edit: impl FnOnce(&mut Vec<Stored>)) {
    let mut list = tensors(&std::fs::read(dir.join(name)).unwrap());
    edit(&mut list);
    resign(dir, name, &safetensors(&list));
}

/// The files of a folder by name.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

/// A folder with the artifact `a` to damage.
pub(crate) fn written() -> TempDir {
    // Copied, since the writer waits for the disk.
    static FILES: LazyLock<BTreeMap<String, Vec<u8>>> = LazyLock::new(|| {
        let dir = tempdir().unwrap();
        artifact(&dir.path().join("a"));
        contents(&dir.path().join("a"))
    });
    let dir = tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a")).unwrap();
    for (name, bytes) in &*FILES {
        std::fs::write(dir.path().join("a").join(name), bytes).unwrap();
    }
    dir
}
