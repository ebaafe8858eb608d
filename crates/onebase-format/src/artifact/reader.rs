use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use onebase_tensor::{DType, EncodedDelta, Part, PartData, PartShapes, effective_bits};
use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::manifest::{
    ADDED_ROWS, BaseRecord, CodecRecord, FORMAT, FORMAT_VERSION, GAINS, LINEAR_PREFIX,
    MANIFEST_FILE, MODEL_CARD_FILE, Manifest, PathNode, Role, Storage, TensorRecord, part_name,
};
use crate::checkpoint::{plain_name, read_optional};
use crate::error::Error;
use crate::family::{check_node, open_node};
use crate::safetensors_file::{SafetensorsFile, file_digest};
use crate::{Checkpoint, Digest, Result};

/// An artifact folder: the manifest checked against the files, no part read yet.
#[derive(Debug)]
pub struct Artifact {
    dir: PathBuf,
    manifest: Manifest,
    sizes: Sizes,
    files: BTreeMap<String, SafetensorsFile>,
    /// In the manifest's order.
    nodes: Vec<SafetensorsFile>,
}

/// A node on the path of a tensor, see [`Storage::Path`].
#[derive(Clone, Debug)]
pub struct PathPart<'a> {
    /// The digest of the node's file.
    pub node: Digest,
    /// The codec that wrote its delta.
    pub codec: &'a CodecRecord,
    /// The factor of each row, `[out_features]`; 1 where there are none.
    pub gains: Option<Vec<f32>>,
    /// Position among the artifact's nodes.
    position: usize,
}

/// Bytes on disk and what they cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Bytes of every file of the folder, and of the nodes that it names.
    pub total_bytes: u64,
    /// Bytes of the files that hold linear sites, headers included, nodes as well.
    pub linear_bytes: u64,
    /// Elements of all tensors of the fine-tune.
    pub n_weights_total: u64,
    /// Elements of the linear sites' weights.
    pub n_weights_linear: u64,
}

impl Sizes {
    /// The sizes of a folder with this manifest, where the files that the
    /// manifest does not list have `other_bytes`.
    pub(super) fn new(manifest: &Manifest, other_bytes: u64) -> Self {
        // A manifest is read before its shapes are checked against anything.
        let count = |linear_only: bool| {
            let tensors = manifest.tensors.values();
            tensors
                .filter(|t| !linear_only || t.role == Role::Linear)
                .map(|t| t.shape.iter().fold(1, |n: u64, d| n.saturating_mul(*d as u64)))
                .fold(0, u64::saturating_add)
        };
        let nodes = manifest.nodes.iter().map(|f| f.bytes).fold(0, u64::saturating_add);
        let listed: u64 = manifest.files.values().map(|f| f.bytes).sum();
        let linear = manifest.files.iter().filter(|(name, _)| name.starts_with(LINEAR_PREFIX));
        Self {
            total_bytes: listed.saturating_add(other_bytes).saturating_add(nodes),
            linear_bytes: linear.map(|(_, f)| f.bytes).sum::<u64>().saturating_add(nodes),
            n_weights_total: count(false),
            n_weights_linear: count(true),
        }
    }

    /// Effective bits per weight of the whole fine-tune.
    pub fn effective_bpw_total(&self) -> f64 {
        effective_bits(self.total_bytes, self.n_weights_total)
    }

    /// Effective bits per weight of the linear sites.
    pub fn effective_bpw_linear(&self) -> f64 {
        effective_bits(self.linear_bytes, self.n_weights_linear)
    }
}

/// A tensor stored as it is.
#[derive(Clone, Debug)]
pub struct ExactTensor {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

impl ExactTensor {
    /// The elements as f32.
    pub fn widen(&self) -> Vec<f32> {
        let mut wide = vec![0.0; self.bytes.len() / self.dtype.size_bytes()];
        self.dtype.widen(&self.bytes, &mut wide);
        wide
    }
}

impl Artifact {
    /// Opens a folder written by [`super::ArtifactWriter`].
    ///
    /// # Errors
    /// When the manifest is missing, malformed, of another format or newer, or
    /// a file it lists is missing or of another length.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        if !path.is_file() {
            return Err(Error::NotA {
                path: dir.to_owned(),
                expected: "delta artifact",
                missing: MANIFEST_FILE,
            });
        }
        let (manifest, _): (Manifest, Digest) = read_versioned(&path, FORMAT, FORMAT_VERSION)?;
        let mut files = BTreeMap::new();
        for name in manifest.inherited.keys() {
            plain_name(&path, name)?;
        }
        for (name, record) in &manifest.files {
            let file = dir.join(plain_name(&path, name)?);
            let metadata = std::fs::metadata(&file).map_err(Error::io("read", &file))?;
            if metadata.len() != record.bytes {
                let (expected, got) = (record.bytes, metadata.len());
                return Err(Error::FileSize { path: file, expected, got });
            }
            if name.ends_with(".safetensors") {
                files.insert(name.clone(), SafetensorsFile::open(&file)?);
            }
        }
        let mut other_bytes = 0;
        for name in [MANIFEST_FILE, MODEL_CARD_FILE] {
            other_bytes += std::fs::metadata(dir.join(name)).map_or(0, |m| m.len());
        }
        let nodes = manifest.nodes.iter().map(|record| open_node(dir, record));
        let nodes = nodes.collect::<Result<_>>()?;
        let sizes = Sizes::new(&manifest, other_bytes);
        let artifact = Self { dir: dir.to_owned(), manifest, sizes, files, nodes };
        for (tensor, record) in &artifact.manifest.tensors {
            artifact.check_record(tensor, record)?;
        }
        Ok(artifact)
    }

    fn bad(&self, entry: &str, problem: String) -> Error {
        Error::Manifest { path: self.dir.join(MANIFEST_FILE), entry: entry.to_owned(), problem }
    }

    /// What a later read relies on.
    fn check_record(&self, tensor: &str, record: &TensorRecord) -> Result<()> {
        let dtype: DType = record.dtype.parse().map_err(|e| self.bad(tensor, format!("{e}")))?;
        if !dtype.is_float() {
            return Err(self.bad(tensor, format!("a weight of type {dtype}")));
        }
        if record.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).is_none() {
            return Err(self.bad(tensor, format!("shape {:?} overflows", record.shape)));
        }
        match &record.storage {
            Storage::Unchanged | Storage::Path { .. } => {}
            Storage::Exact { .. } if record.role == Role::Linear => {
                return Err(self.bad(tensor, "a linear site, expected a delta, got exact".into()));
            }
            Storage::Exact { file } => {
                let header = self.file(tensor, file)?.header(tensor)?;
                if header.dtype != record.dtype || header.shape != record.shape {
                    let got = format!("{} {:?}", header.dtype, header.shape);
                    return Err(self.bad(tensor, format!("{file} holds it as {got}")));
                }
            }
            Storage::Codec { codec, file, added_rows, .. } => {
                self.file(tensor, file)?;
                if *codec >= self.manifest.codecs.len() {
                    return Err(
                        self.bad(tensor, format!("names codec {codec}, which is not listed"))
                    );
                }
                if record.delta_shape().is_none() {
                    let TensorRecord { role, shape, .. } = record;
                    let problem = match (role, &shape[..]) {
                        (Role::Vector, [_]) => format!("{added_rows} added rows of a vector"),
                        (Role::Vector, _) => "a router, expected exact, got a delta".to_owned(),
                        _ => format!("{added_rows} added rows in shape {shape:?}"),
                    };
                    return Err(self.bad(tensor, problem));
                }
            }
        }
        if let Storage::Path { file, path } = &record.storage {
            self.check_path(tensor, record, file.as_deref(), path)?;
        }
        if let Storage::Exact { file }
        | Storage::Codec { file, .. }
        | Storage::Path { file: Some(file), .. } = &record.storage
            && file.starts_with(LINEAR_PREFIX) != (record.role == Role::Linear)
        {
            return Err(self.bad(tensor, format!("a {:?} tensor in {file}", record.role)));
        }
        Ok(())
    }

    fn check_path(
        &self,
        tensor: &str,
        record: &TensorRecord,
        file: Option<&str>,
        path: &[PathNode],
    ) -> Result<()> {
        let [out_features, _] = record.shape[..] else {
            return Err(self.bad(tensor, format!("a path of shape {:?}", record.shape)));
        };
        if record.role != Role::Linear {
            return Err(self.bad(tensor, format!("a {:?} tensor, expected no path", record.role)));
        }
        for PathNode { node, codec, .. } in path {
            if *node >= self.manifest.nodes.len() {
                return Err(self.bad(tensor, format!("names node {node}, which is not listed")));
            }
            if *codec >= self.manifest.codecs.len() {
                return Err(self.bad(tensor, format!("names codec {codec}, which is not listed")));
            }
        }
        let n_gained = path.iter().filter(|node| node.gain).count();
        let Some(file) = file else {
            let problem = || self.bad(tensor, format!("gains of {n_gained} nodes in no file"));
            return if n_gained == 0 { Ok(()) } else { Err(problem()) };
        };
        let header = self.file(tensor, file)?.header(&part_name(tensor, GAINS))?;
        if header.dtype != DType::F16.name() || header.shape != [n_gained, out_features] {
            let got = format!("{} {:?}", header.dtype, header.shape);
            let expected = format!("F16 {:?}", [n_gained, out_features]);
            return Err(self.bad(tensor, format!("gains: expected {expected}, got {got}")));
        }
        Ok(())
    }

    fn file(&self, tensor: &str, name: &str) -> Result<&SafetensorsFile> {
        self.files.get(name).ok_or_else(|| self.bad(tensor, format!("names file {name:?}")))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The digest of all that the manifest says but how good the artifact is: two artifacts
    /// with one digest are the same delta of the same base, to the byte.
    ///
    /// # Errors
    /// When the manifest has no text.
    pub fn digest(&self) -> Result<Digest> {
        let manifest = Manifest { quality: None, ..self.manifest.clone() };
        let text = manifest
            .to_json()
            .map_err(|source| Error::Json { path: self.dir.join(MANIFEST_FILE), source })?;
        Ok(Digest::of(text.as_bytes()))
    }

    /// Bytes on disk and what they cover.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// A file beside the weights, the artifact's own or, where inherited, the
    /// base's; `None` when the fine-tune has none.
    ///
    /// # Errors
    /// When it cannot be read or is not what was there at compression.
    pub fn side_file(&self, base: &Checkpoint, name: &str) -> Result<Option<Vec<u8>>> {
        let (path, expected) = if let Some(record) = self.manifest.files.get(name) {
            (self.dir.join(name), record.blake3)
        } else if let Some(digest) = self.manifest.inherited.get(name) {
            (base.dir().join(name), *digest)
        } else {
            return Ok(None);
        };
        let Some(bytes) = read_optional(&path)? else {
            return Err(Error::Io {
                action: "read",
                path,
                source: std::io::ErrorKind::NotFound.into(),
            });
        };
        let got = Digest::of(&bytes);
        if got != expected {
            return Err(Error::FileDigest { path, expected, got });
        }
        Ok(Some(bytes))
    }

    /// A tensor's record.
    ///
    /// # Errors
    /// When the fine-tune has no such tensor.
    pub fn record(&self, tensor: &str) -> Result<&TensorRecord> {
        self.manifest.tensors.get(tensor).ok_or_else(|| Error::MissingTensor {
            path: self.dir.join(MANIFEST_FILE),
            tensor: tensor.to_owned(),
        })
    }

    /// The record of a tensor that the model uses for `role`.
    ///
    /// # Errors
    /// When the fine-tune has no such tensor or it is for something else.
    pub fn record_for(&self, tensor: &str, role: Role) -> Result<&TensorRecord> {
        let record = self.record(tensor)?;
        if record.role == role {
            return Ok(record);
        }
        Err(self.bad(tensor, format!("expected role {role:?}, got {:?}", record.role)))
    }

    /// The encoded delta of a tensor and the codec that wrote it; `None` when
    /// the tensor is not stored as one.
    ///
    /// # Errors
    /// When a part is missing or malformed.
    pub fn delta(&self, tensor: &str) -> Result<Option<(&CodecRecord, EncodedDelta)>> {
        let record = self.record(tensor)?;
        let (Storage::Codec { codec, file, parts, .. }, Some(shape)) =
            (&record.storage, record.delta_shape())
        else {
            return Ok(None);
        };
        let file = self.file(tensor, file)?;
        let names = parts.iter().map(|part| (part.clone(), part_name(tensor, part)));
        let delta = EncodedDelta { shape, parts: self.parts(tensor, file, names)? };
        Ok(Some((&self.manifest.codecs[*codec], delta)))
    }

    /// Parts, by what they are called and their names in a file.
    fn parts(
        &self,
        tensor: &str,
        file: &SafetensorsFile,
        names: impl Iterator<Item = (String, String)>,
    ) -> Result<BTreeMap<String, Part>> {
        let mut by_name = BTreeMap::new();
        for (part, name) in names {
            let header = file.header(&name)?;
            let dtype: DType = header.dtype.parse().map_err(|_| Error::UnsupportedDType {
                path: file.path.clone(),
                tensor: name,
                got: header.dtype.clone(),
            })?;
            let read = PartData::from_le_bytes(dtype, &file.bytes(header))
                .and_then(|data| Part::new(header.shape.clone(), data));
            let Some(read) = read else {
                return Err(self.bad(tensor, format!("part {part} does not fill its shape")));
            };
            by_name.insert(part, read);
        }
        Ok(by_name)
    }

    /// The nodes on the path of a tensor, in the order in which they are added; `None` when
    /// it is not stored as a path.
    ///
    /// # Errors
    /// When the gains are missing or malformed.
    pub fn path(&self, tensor: &str) -> Result<Option<Vec<PathPart<'_>>>> {
        let record = self.record(tensor)?;
        let Storage::Path { file, path } = &record.storage else { return Ok(None) };
        let mut gains = Vec::new();
        if let Some(file) = file {
            let file = self.file(tensor, file)?;
            let bytes = file.bytes(file.header(&part_name(tensor, GAINS))?);
            gains.resize(bytes.len() / DType::F16.size_bytes(), 0.0);
            DType::F16.widen(&bytes, &mut gains);
        }
        let mut gains = gains.chunks(record.shape[0].max(1));
        let part = |node: &PathNode| PathPart {
            node: self.manifest.nodes[node.node].blake3,
            codec: &self.manifest.codecs[node.codec],
            gains: node.gain.then(|| gains.next().unwrap_or_default().to_vec()),
            position: node.node,
        };
        Ok(Some(path.iter().map(part).collect()))
    }

    /// The delta of a tensor in a node on its path.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub fn node_delta(&self, tensor: &str, part: &PathPart<'_>) -> Result<EncodedDelta> {
        let Some(shape) = self.record(tensor)?.delta_shape() else {
            return Err(self.bad(tensor, "has no path".into()));
        };
        let Some(file) = self.nodes.get(part.position) else {
            return Err(self.bad(tensor, format!("has no node {}", part.position)));
        };
        let names = file.tensors.keys().filter_map(|name| {
            let part = name.strip_prefix(&part_name(tensor, ""))?;
            (!part.contains('.')).then(|| (part.to_owned(), name.clone()))
        });
        Ok(EncodedDelta { shape, parts: self.parts(tensor, file, names)? })
    }

    /// The shapes of the parts of a tensor's delta, without reading them; `None` when
    /// the tensor is not stored as one.
    ///
    /// # Errors
    /// When a part is missing.
    pub fn part_shapes(&self, tensor: &str) -> Result<Option<PartShapes>> {
        let Storage::Codec { file, parts, .. } = &self.record(tensor)?.storage else {
            return Ok(None);
        };
        let file = self.file(tensor, file)?;
        let shape = |part: &String| {
            Ok((part.clone(), file.header(&part_name(tensor, part))?.shape.clone()))
        };
        parts.iter().map(shape).collect::<Result<_>>().map(Some)
    }

    /// A tensor stored as it is; `None` when it is not.
    ///
    /// # Errors
    /// When it is missing from its file.
    pub fn exact(&self, tensor: &str) -> Result<Option<ExactTensor>> {
        let record = self.record(tensor)?;
        match &record.storage {
            Storage::Exact { file } => self.stored(tensor, record, file, tensor).map(Some),
            _ => Ok(None),
        }
    }

    /// The rows of a tensor past the base's, `[added, in_features]`; `None` when
    /// there are none.
    ///
    /// # Errors
    /// When they are missing or of another shape than the record says.
    pub fn added_rows(&self, tensor: &str) -> Result<Option<ExactTensor>> {
        let record = self.record(tensor)?;
        let Storage::Codec { file, added_rows, .. } = &record.storage else { return Ok(None) };
        if *added_rows == 0 {
            return Ok(None);
        }
        let rows = self.stored(tensor, record, file, &part_name(tensor, ADDED_ROWS))?;
        let expected = [*added_rows, record.shape[1]];
        if rows.shape != expected {
            let got = rows.shape;
            return Err(self.bad(tensor, format!("added rows: expected {expected:?}, got {got:?}")));
        }
        Ok(Some(rows))
    }

    fn stored(
        &self,
        tensor: &str,
        record: &TensorRecord,
        file: &str,
        name: &str,
    ) -> Result<ExactTensor> {
        let file = self.file(tensor, file)?;
        let header = file.header(name)?;
        if header.dtype != record.dtype {
            let (expected, got) = (&record.dtype, &header.dtype);
            return Err(self.bad(tensor, format!("{name}: expected type {expected}, got {got}")));
        }
        let dtype = record.dtype.parse().map_err(|e| self.bad(tensor, format!("{e}")))?;
        Ok(ExactTensor { dtype, shape: header.shape.clone(), bytes: file.bytes(header).to_vec() })
    }

    /// Reads every listed file and compares its digest, and checks that the
    /// manifest accounts for every stored tensor and for the base's digest.
    ///
    /// # Errors
    /// When a file has changed or the manifest contradicts itself.
    pub fn check_files(&self) -> Result<()> {
        self.manifest.files.par_iter().try_for_each(|(name, record)| {
            let path = self.dir.join(name);
            let got = file_digest(&path)?;
            if got == record.blake3 {
                Ok(())
            } else {
                Err(Error::FileDigest { path, expected: record.blake3, got })
            }
        })?;
        self.manifest
            .nodes
            .par_iter()
            .zip(&self.nodes)
            .try_for_each(|(record, file)| check_node(&self.dir, record, &file.path))?;
        let tensors = &self.manifest.tensors;
        let claimed: BTreeSet<String> =
            tensors.iter().flat_map(|(tensor, record)| record.stored_names(tensor)).collect();
        for file in self.files.values() {
            if let Some(name) = file.tensors.keys().find(|name| !claimed.contains(*name)) {
                let problem = format!("{} holds it, no record does", file.path.display());
                return Err(self.bad(name, problem));
            }
        }
        let base = &self.manifest.base;
        let digests = tensors.iter().map(|(name, record)| (name.as_str(), record.base));
        if BaseRecord::new(&base.name, digests) != *base {
            return Err(self.bad("base", "is not the digest of the tensors' bases".into()));
        }
        Ok(())
    }

    /// Digests the base's tensors and compares each with the one the delta was
    /// made against.
    ///
    /// # Errors
    /// When one differs or is missing.
    pub fn check_base(&self, base: &Checkpoint) -> Result<()> {
        let names: Vec<&str> = self.manifest.tensors.keys().map(String::as_str).collect();
        let digests = base.digests(&names)?;
        self.check_base_digests(base.dir(), &names.into_iter().zip(digests).collect())
    }

    /// [`Artifact::check_base`] for digests that are known already.
    ///
    /// # Errors
    /// When one differs or is missing.
    pub fn check_base_digests(&self, base: &Path, digests: &BTreeMap<&str, Digest>) -> Result<()> {
        for (tensor, record) in &self.manifest.tensors {
            let got = digests.get(tensor.as_str()).ok_or_else(|| Error::MissingTensor {
                path: base.to_owned(),
                tensor: tensor.clone(),
            })?;
            if *got != record.base {
                return Err(Error::OtherBase {
                    artifact: self.dir.clone(),
                    base: base.to_owned(),
                    tensor: tensor.clone(),
                    expected: record.base,
                    got: *got,
                });
            }
        }
        Ok(())
    }
}

/// Reads a manifest, and the digest of its bytes; its format and version before anything
/// else, so that a newer one is called newer and not malformed.
pub(crate) fn read_versioned<T: DeserializeOwned>(
    path: &Path,
    expected: &'static str,
    newest: u32,
) -> Result<(T, Digest)> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let bad = |source| Error::Json { path: path.to_owned(), source };
    let value: Value = serde_json::from_slice(&bytes).map_err(bad)?;
    let format = value.get("format").and_then(Value::as_str).unwrap_or_default();
    if format != expected {
        let got = format.to_owned();
        return Err(Error::OtherFormat { path: path.to_owned(), expected, got });
    }
    if let Some(got) = value.get("version").and_then(Value::as_u64)
        && got > u64::from(newest)
    {
        return Err(Error::NewerFormat { path: path.to_owned(), newest, got });
    }
    Ok((serde_json::from_value(value).map_err(bad)?, Digest::of(&bytes)))
}
