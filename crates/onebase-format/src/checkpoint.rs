use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use onebase_tensor::DType;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;
use crate::safetensors_file::{MappedBytes, SafetensorsFile, TensorHeader};
use crate::stacked::unstack;
use crate::{Digest, Result, digest};

/// The model's configuration in a checkpoint folder.
pub const CONFIG_FILE: &str = "config.json";

/// Files beside the weights that belong to a model's behaviour.
pub const SIDE_FILES: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// A Hugging Face checkpoint folder, its headers checked, no weight read yet.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    files: Vec<SafetensorsFile>,
    /// Tensor name to file.
    tensors: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and `model.safetensors`, or shards with
    /// their index. Experts that lie stacked in one tensor are listed one by one.
    ///
    /// # Errors
    /// When something is missing or malformed; the error says which file.
    pub fn open(dir: &Path) -> Result<Self> {
        let not_a = |missing| Error::NotA { path: dir.to_owned(), expected: "checkpoint", missing };
        let config_path = dir.join(CONFIG_FILE);
        if !config_path.is_file() {
            return Err(not_a(CONFIG_FILE));
        }
        let config: Value = read_json(&config_path)?;
        let index_path = dir.join(INDEX_FILE);
        let mut files = Vec::new();
        // Where both are there the single file counts, as in transformers.
        if dir.join(SINGLE_FILE).is_file() {
            files.push(SafetensorsFile::open(&dir.join(SINGLE_FILE))?);
        } else if index_path.is_file() {
            let index: Index = read_json(&index_path)?;
            let mut shards: Vec<&String> = index.weight_map.values().collect();
            shards.sort();
            shards.dedup();
            for shard in shards {
                let path = dir.join(plain_name(&index_path, shard)?);
                if !path.is_file() {
                    return Err(Error::MissingShard { index: index_path, shard: shard.clone() });
                }
                files.push(SafetensorsFile::open(&path)?);
            }
            for (tensor, shard) in &index.weight_map {
                let path = dir.join(shard);
                if !files.iter().any(|f| f.path == path && f.tensors.contains_key(tensor)) {
                    return Err(Error::IndexMismatch {
                        index: index_path,
                        tensor: tensor.clone(),
                        shard: shard.clone(),
                    });
                }
            }
        } else {
            return Err(not_a(SINGLE_FILE));
        }
        let mut tensors = BTreeMap::new();
        for file in &mut files {
            unstack(file, &config)?;
        }
        for (index, file) in files.iter().enumerate() {
            for name in file.tensors.keys() {
                match tensors.entry(name.clone()) {
                    Entry::Vacant(slot) => {
                        slot.insert(index);
                    }
                    Entry::Occupied(slot) => {
                        return Err(Error::DuplicateTensor {
                            path: file.path.clone(),
                            other: files[*slot.get()].path.clone(),
                            tensor: name.clone(),
                        });
                    }
                }
            }
        }
        Ok(Self { dir: dir.to_owned(), config, files, tensors })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The parsed `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What people call it: the folder's own name.
    pub fn name(&self) -> String {
        let path = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
    }

    /// Names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// When it is missing or its type is not a weight's.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let tensor = self.stored(name)?;
        if tensor.dtype.is_float() { Ok(tensor) } else { Err(tensor.unsupported()) }
    }

    /// A tensor by name, which may be codes too.
    ///
    /// # Errors
    /// When it is missing or its type is none of [`DType`].
    pub fn stored(&self, name: &str) -> Result<Tensor<'_>> {
        let Some((name, file)) = self.tensors.get_key_value(name) else {
            return Err(Error::MissingTensor { path: self.dir.clone(), tensor: name.to_owned() });
        };
        let file = &self.files[*file];
        let header = file.header(name)?;
        let tensor = Tensor { name, dtype: DType::U8, header, file };
        match header.dtype.parse() {
            Ok(dtype) => Ok(Tensor { dtype, ..tensor }),
            Err(_) => Err(tensor.unsupported()),
        }
    }

    /// Bytes of all tensors' data.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().flat_map(|f| f.tensors.values()).map(|t| t.size_bytes() as u64).sum()
    }

    /// Number of elements in all tensors.
    pub fn n_weights(&self) -> u64 {
        let tensors = self.files.iter().flat_map(|f| f.tensors.values());
        tensors.map(|t| t.shape.iter().product::<usize>() as u64).sum()
    }

    /// The contents of a file beside the weights; `None` when it is not there.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn side_file(&self, name: &str) -> Result<Option<Vec<u8>>> {
        read_optional(&self.dir.join(name))
    }

    /// Digests of the named tensors, in the order given, computed in parallel.
    ///
    /// # Errors
    /// When one is missing or cannot be read.
    pub fn digests(&self, names: &[&str]) -> Result<Vec<Digest>> {
        names.par_iter().map(|name| self.tensor(name)?.digest()).collect()
    }
}

/// One tensor of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    name: &'a str,
    dtype: DType,
    header: &'a TensorHeader,
    file: &'a SafetensorsFile,
}

impl<'a> Tensor<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    fn unsupported(&self) -> Error {
        Error::UnsupportedDType {
            path: self.file.path.clone(),
            tensor: self.name.to_owned(),
            got: self.header.dtype.clone(),
        }
    }

    /// Its element type; codes are `U8`.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its shape, outermost dimension first.
    pub fn shape(&self) -> &'a [usize] {
        &self.header.shape
    }

    /// Number of elements.
    pub fn n_weights(&self) -> usize {
        self.header.size_bytes() / self.dtype.size_bytes()
    }

    /// Bytes of the data.
    pub fn size_bytes(&self) -> usize {
        self.header.size_bytes()
    }

    /// The file that holds it.
    pub fn path(&self) -> &'a Path {
        &self.file.path
    }

    /// The data, mapped into memory.
    pub fn bytes(&self) -> MappedBytes {
        self.file.bytes(self.header)
    }

    /// Reads bytes from `offset` into `out`, without mapping them.
    ///
    /// Panics when the range lies outside the tensor.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.file.read(self.header, offset, out)
    }

    /// The tensor's digest: BLAKE3 of its type, a space, its dimensions joined
    /// by `x`, a newline, and its bytes as stored.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn digest(&self) -> Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(tensor_head(self.dtype, self.shape()).as_bytes());
        digest::hash_blocks(hasher, self.size_bytes() as u64, |offset, block| {
            // A tensor's size is a `usize`, so is an offset into it.
            #[allow(clippy::cast_possible_truncation)]
            self.read(offset as usize, block)
        })
    }
}

/// Computes the digest that [`Tensor::digest`] would give of a tensor that is in no file.
#[derive(Debug)]
pub struct TensorHasher(blake3::Hasher);

impl TensorHasher {
    /// Of a tensor of this type and shape.
    pub fn new(dtype: DType, shape: &[usize]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(tensor_head(dtype, shape).as_bytes());
        Self(hasher)
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update_rayon(bytes);
    }

    /// The digest of all bytes.
    pub fn finish(&self) -> Digest {
        Digest::finish(&self.0)
    }
}

/// What the digest of a tensor is over before its bytes.
pub(crate) fn tensor_head(dtype: DType, shape: &[usize]) -> String {
    let shape: Vec<_> = shape.iter().map(usize::to_string).collect();
    format!("{dtype} {}\n", shape.join("x"))
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.to_owned(), source })
}

pub(crate) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}

/// The name, if it names a file in the same folder as `source`, which gave it.
pub(crate) fn plain_name<'a>(source: &Path, name: &'a str) -> Result<&'a str> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(std::path::Component::Normal(only)), None) if only == name => Ok(name),
        _ => Err(Error::UnsafeName { path: source.to_owned(), name: name.to_owned() }),
    }
}
