//! Checkpoints in memory to alter, and artifacts made from them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use onebase_compress::{Pair, Plan, Silent, TablePlan, VectorPlan, compress};
use onebase_format::artifact::{Artifact, MANIFEST_FILE};
use onebase_format::{Checkpoint, Digest};
use onebase_model::{KvCache, Logits, Model, Segment, Tenant};
use onebase_tensor::DType;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// The checkpoints of random weights.
pub(crate) const FAMILIES: [&str; 12] = [
    "llama3_rope",
    "llama_bias",
    "llama_f16",
    "llama_tied_gqa",
    "mistral_window",
    "mixtral",
    "qwen2_tied",
    "qwen2_window",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_bf16",
    "qwen3_tied_bf16",
];

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const UP: &str = "model.layers.1.mlp.up_proj.weight";
/// A site that [`Memory::tuned`] leaves as it is.
pub(crate) const SAME: &str = "model.layers.0.self_attn.o_proj.weight";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    root().join("fixtures/reference").join(name)
}

pub(crate) fn demo(name: &str) -> PathBuf {
    root().join("demo").join(name)
}

/// Type, shape and bytes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Stored {
    pub(crate) fn widen(&self) -> Vec<f32> {
        let mut wide = vec![0.0; self.bytes.len() / self.dtype.size_bytes()];
        self.dtype.widen(&self.bytes, &mut wide);
        wide
    }

    pub(crate) fn fill(&mut self, values: &[f32]) {
        self.bytes.clear();
        self.dtype.narrow(values, &mut self.bytes);
    }

    /// Puts an element, which may be NaN or ∞, at a row and a column.
    pub(crate) fn set(&mut self, row: usize, column: usize, value: f32) {
        let at = row * self.shape.get(1).unwrap_or(&0) + column;
        let size = self.dtype.size_bytes();
        let bytes = match self.dtype {
            DType::F32 => value.to_le_bytes().to_vec(),
            DType::BF16 => value.to_le_bytes()[2..].to_vec(),
            other => panic!("no test needs {other}"),
        };
        self.bytes[at * size..(at + 1) * size].copy_from_slice(&bytes);
    }

    pub(crate) fn cast(&mut self, dtype: DType) {
        let wide = self.widen();
        self.dtype = dtype;
        self.fill(&wide);
    }
}

/// A checkpoint in memory.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Stored>,
    pub(crate) side_files: BTreeMap<String, Vec<u8>>,
}

impl Memory {
    pub(crate) fn read(dir: &Path) -> Self {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let tensors = checkpoint.names().map(|name| {
            let tensor = checkpoint.tensor(name).unwrap();
            let stored = Stored {
                dtype: tensor.dtype(),
                shape: tensor.shape().to_vec(),
                bytes: tensor.bytes().to_vec(),
            };
            (name.to_owned(), stored)
        });
        let tensors = tensors.collect();
        Self { config: checkpoint.config().clone(), tensors, side_files: BTreeMap::new() }
    }

    pub(crate) fn fixture(name: &str) -> Self {
        Self::read(&fixture(name))
    }

    /// Writes it as one file.
    pub(crate) fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        let views = self.tensors.iter().map(|(name, t)| {
            let dtype = match t.dtype {
                DType::U8 => Dtype::U8,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                DType::F32 => Dtype::F32,
            };
            (name, TensorView::new(dtype, t.shape.clone(), &t.bytes).unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(dir.join("model.safetensors"), file).unwrap();
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        for (name, bytes) in &self.side_files {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("there is a tensor {name}"))
    }

    /// A fine-tune: each weight changed a little, but those of [`SAME`].
    pub(crate) fn tuned(&self, seed: u64) -> Self {
        let mut tuned = self.clone();
        let mut noise = Noise(seed);
        for (_, tensor) in tuned.tensors.iter_mut().filter(|(name, _)| *name != SAME) {
            let values: Vec<f32> = tensor.widen().iter().map(|w| w + 0.02 * noise.next()).collect();
            tensor.fill(&values);
        }
        tuned
    }

    /// Adds rows to the vocabulary.
    pub(crate) fn extend_vocabulary(&mut self, n_rows: usize) {
        let vocab_size = self.config["vocab_size"].as_u64().unwrap();
        self.config["vocab_size"] = json!(vocab_size + n_rows as u64);
        let mut noise = Noise(n_rows as u64);
        for name in [EMBEDDING, HEAD] {
            let Some(table) = self.tensors.get_mut(name) else { continue };
            let values: Vec<f32> =
                (0..n_rows * table.shape[1]).map(|_| 0.3 * noise.next()).collect();
            table.shape[0] += n_rows;
            table.dtype.narrow(&values, &mut table.bytes);
        }
    }
}

/// Numbers from −1 to 1 that depend on the seed alone (splitmix64).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A plan with one codec for everything but vectors; `exact` tables where the text ends
/// so; a codec for vectors after ` vectors `.
pub(crate) fn plan(codec: &str) -> Plan {
    let (codec, vectors) = codec.split_once(" vectors ").unwrap_or((codec, "exact"));
    let (codec, tables) = match codec.strip_suffix(" exact") {
        Some(codec) => (codec, "exact"),
        None => (codec, codec),
    };
    Plan::new(
        codec.parse().unwrap(),
        tables.parse::<TablePlan>().unwrap(),
        vectors.parse::<VectorPlan>().unwrap(),
    )
}

/// A base, a fine-tune and a place for what is made from them.
pub(crate) struct Folder {
    pub(crate) dir: tempfile::TempDir,
}

impl Folder {
    pub(crate) fn new(base: &Memory, fine_tune: &Memory) -> Self {
        let folder = Self { dir: tempfile::tempdir().unwrap() };
        base.write(&folder.base());
        fine_tune.write(&folder.fine_tune());
        folder
    }

    /// A pair of a family, compressed.
    pub(crate) fn compressed(family: &str, codec: &str) -> Self {
        let base = Memory::fixture(family);
        let folder = Self::new(&base, &base.tuned(1));
        folder.compress(codec);
        folder
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.dir.path().join("base")
    }

    pub(crate) fn fine_tune(&self) -> PathBuf {
        self.dir.path().join("tuned")
    }

    pub(crate) fn artifact(&self) -> PathBuf {
        self.dir.path().join("artifact")
    }

    pub(crate) fn restored(&self) -> PathBuf {
        self.dir.path().join("restored")
    }

    pub(crate) fn pair(&self) -> Pair {
        Pair::open(&self.base(), &self.fine_tune()).unwrap()
    }

    pub(crate) fn try_compress(&self, codec: &str) -> Result<(), onebase_compress::Error> {
        compress(&self.pair(), &plan(codec), &self.artifact(), &Silent).map(|_| ())
    }

    pub(crate) fn compress(&self, codec: &str) {
        self.try_compress(codec).unwrap();
    }

    pub(crate) fn open(&self) -> (Checkpoint, Artifact) {
        (Checkpoint::open(&self.base()).unwrap(), Artifact::open(&self.artifact()).unwrap())
    }

    /// Restores the fine-tune and reads it.
    pub(crate) fn restore(&self) -> Memory {
        let (base, artifact) = self.open();
        onebase_compress::restore(&base, &artifact, &self.restored(), &Silent).unwrap();
        Memory::read(&self.restored())
    }

    /// Changes the artifact's manifest.
    pub(crate) fn edit_manifest(&self, edit: impl FnOnce(&mut Value)) {
        let path = self.artifact().join(MANIFEST_FILE);
        let mut manifest = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut manifest);
        std::fs::write(&path, manifest.to_string()).unwrap();
    }

    /// Changes the tensors of a file of the artifact, and its length and digest
    /// in the manifest.
    pub(crate) fn edit_parts(&self, file: &str, edit: impl FnOnce(&mut BTreeMap<String, Stored>)) {
        let path = self.artifact().join(file);
        let bytes = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
        let stored = tensors.into_iter().map(|(name, t)| {
            let dtype = t.dtype().to_string().parse().unwrap();
            (name, Stored { dtype, shape: t.shape().to_vec(), bytes: t.data().to_vec() })
        });
        let mut tensors = stored.collect();
        edit(&mut tensors);
        // The weights of a checkpoint are written the same way.
        let side = tempfile::tempdir().unwrap();
        Memory { config: json!({}), tensors, side_files: BTreeMap::new() }.write(side.path());
        let bytes = std::fs::read(side.path().join("model.safetensors")).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        self.edit_manifest(|manifest| {
            let digest = Digest::of(&bytes).to_string();
            manifest["files"][file] = json!({ "bytes": bytes.len(), "blake3": digest });
        });
    }

    /// The errors of all who read an artifact: verify, restore (which leaves
    /// nothing) and a tenant.
    pub(crate) fn refusals(
        &self,
    ) -> (onebase_compress::Error, onebase_compress::Error, onebase_model::Error) {
        let (base, artifact) = self.open();
        let verify = onebase_compress::verify(&base, &artifact, &Silent);
        let restore = onebase_compress::restore(&base, &artifact, &self.restored(), &Silent);
        assert!(!self.restored().exists());
        assert!(!self.dir.path().join(".restored.partial").exists());
        let model = Model::load(base).unwrap();
        let tenant = Tenant::load(&model, &artifact);
        (
            verify.expect_err("verify refuses"),
            restore.expect_err("restore refuses"),
            tenant.expect_err("a tenant is not loaded"),
        )
    }
}

/// The error of the files in an error.
pub(crate) fn of_files(error: &onebase_compress::Error) -> &onebase_format::Error {
    match error {
        onebase_compress::Error::Format(error)
        | onebase_compress::Error::Model(onebase_model::Error::Format(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// The files of a folder by name.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

/// The logits of every position of a sequence.
pub(crate) fn logits(model: &Model, tenant: Option<&Tenant>, tokens: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::new(tenant.map_or(model.config(), Tenant::config));
    let segment = Segment { tokens, tenant, cache: &mut cache, logits: Logits::All };
    model.forward(&mut [segment]).unwrap().remove(0)
}

/// Largest difference, relative to the largest value.
pub(crate) fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let max = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0f32, |m, (g, w)| m.max((g - w).abs())) / max
}
