use std::collections::BTreeMap;
use std::ops::Range;

use onebase_tensor::DType;
use serde::{Deserialize, Serialize};

use super::manifest::{
    ADDED_ROWS, BaseRecord, CodecRecord, FORMAT, FileRecord, GAINS, LINEAR_PREFIX, Manifest,
    PathNode, Role, Storage, TensorRecord, digest_of_tensors, part_name, version_for,
};
use super::reader::Sizes;
use super::writer::{Origin, settle_card};
use crate::error::Error;
use crate::statistics::StatisticsRecord;
use crate::tensor_writer::{TensorEntry, header};
use crate::{Digest, Result};

/// Data bytes after which a tensor file is closed and the next one begun.
const FILE_BYTES: usize = 1 << 28;

/// A tensor as an artifact holds it, its bytes aside.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredTensor {
    /// Its position in the fine-tune.
    pub(super) index: usize,
    pub(super) name: String,
    /// Digest of the fine-tune's tensor.
    pub(super) fine_tune: Digest,
    /// Neither the file nor the codec's position is filled in.
    pub(super) record: TensorRecord,
    /// Of a delta its codec, of a path those of its nodes.
    pub(super) codecs: Vec<CodecRecord>,
    pub(super) entries: Vec<TensorEntry>,
}

impl StoredTensor {
    /// A tensor that is the base's.
    pub fn unchanged(origin: Origin<'_>) -> Self {
        Self::new(origin, Storage::Unchanged, Vec::new(), Vec::new())
    }

    /// A tensor stored as it is.
    pub fn exact(origin: Origin<'_>) -> Self {
        let entry = TensorEntry {
            name: origin.name.to_owned(),
            dtype: origin.dtype,
            shape: origin.shape.to_vec(),
        };
        Self::new(origin, Storage::Exact { file: String::new() }, Vec::new(), vec![entry])
    }

    /// A delta in parts of these names, types and shapes, in the order of their names, and
    /// `n_added` rows past the matrix that they decode to.
    pub fn delta<'a>(
        origin: Origin<'_>,
        codec: CodecRecord,
        parts: impl Iterator<Item = (&'a str, DType, Vec<usize>)>,
        n_added: usize,
    ) -> Self {
        let mut names = Vec::new();
        let mut entries = Vec::new();
        for (part, dtype, shape) in parts {
            names.push(part.to_owned());
            entries.push(TensorEntry { name: part_name(origin.name, part), dtype, shape });
        }
        if n_added > 0 {
            let name = part_name(origin.name, ADDED_ROWS);
            let shape = vec![n_added, origin.shape[1]];
            entries.push(TensorEntry { name, dtype: origin.dtype, shape });
        }
        let file = String::new();
        let storage = Storage::Codec { codec: 0, file, parts: names, added_rows: n_added };
        Self::new(origin, storage, vec![codec], entries)
    }

    /// A sum of deltas that lie in nodes, each with the position of its file among those of
    /// the artifact, its codec and whether it has gains.
    pub fn path(origin: Origin<'_>, nodes: Vec<(usize, CodecRecord, bool)>) -> Self {
        let n_gained = nodes.iter().filter(|(_, _, gain)| *gain).count();
        let entry = TensorEntry {
            name: part_name(origin.name, GAINS),
            dtype: DType::F16,
            shape: vec![n_gained, origin.shape[0]],
        };
        let path =
            nodes.iter().map(|(node, _, gain)| PathNode { node: *node, codec: 0, gain: *gain });
        let file = (n_gained > 0).then(String::new);
        let entries = if n_gained > 0 { vec![entry] } else { Vec::new() };
        let storage = Storage::Path { file, path: path.collect() };
        let codecs = nodes.into_iter().map(|(_, codec, _)| codec).collect();
        Self::new(origin, storage, codecs, entries)
    }

    fn new(
        origin: Origin<'_>,
        storage: Storage,
        codecs: Vec<CodecRecord>,
        entries: Vec<TensorEntry>,
    ) -> Self {
        let record = TensorRecord {
            role: origin.role,
            dtype: origin.dtype.name().to_owned(),
            shape: origin.shape.to_vec(),
            base: origin.base,
            storage,
        };
        let Origin { index, name, fine_tune, .. } = origin;
        Self { index, name: name.to_owned(), fine_tune, record, codecs, entries }
    }
}

/// What an artifact is called and made by and with.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a> {
    /// Program and version that write it.
    pub tool: &'a str,
    /// What the base is called.
    pub base: &'a str,
    /// What the fine-tune is called.
    pub fine_tune: &'a str,
    /// The statistics that linear sites are encoded with.
    pub calibration: Option<&'a StatisticsRecord>,
    /// The files of nodes that its tensors name by position.
    pub nodes: &'a [FileRecord],
}

/// A tensor file that is to be written.
pub(super) struct PlannedFile {
    pub(super) name: String,
    /// Tensors of the artifact, in the order of the file.
    pub(super) tensors: Vec<usize>,
    pub(super) entries: Vec<TensorEntry>,
}

/// Which file each tensor goes to, and the manifest with the files' lengths and
/// without their digests.
pub(super) struct Layout {
    pub(super) manifest: Manifest,
    pub(super) files: Vec<PlannedFile>,
}

impl Layout {
    /// Places tensors, in the order of the forward pass.
    pub(super) fn new(names: Names<'_>, tensors: &[&StoredTensor]) -> Result<Self> {
        let digests = tensors.iter().map(|t| (t.name.as_str(), t.record.base));
        let of_fine_tune = tensors.iter().map(|t| (t.name.as_str(), t.fine_tune));
        let mut manifest = Manifest {
            format: FORMAT.to_owned(),
            version: version_for(!names.nodes.is_empty()),
            tool: names.tool.to_owned(),
            base: BaseRecord::new(names.base, digests),
            fine_tune: names.fine_tune.to_owned(),
            fine_tune_blake3: Some(digest_of_tensors(of_fine_tune)),
            codecs: Vec::new(),
            files: BTreeMap::new(),
            nodes: names.nodes.to_vec(),
            inherited: BTreeMap::new(),
            tensors: BTreeMap::new(),
            calibration: names.calibration.cloned(),
            distillation: None,
            quality: None,
        };
        let mut files = Vec::new();
        for (linear, prefix) in [(true, LINEAR_PREFIX), (false, "rest-")] {
            let of_kind = |t: &&StoredTensor| (t.record.role == Role::Linear) == linear;
            let ours = tensors.iter().enumerate().filter(|(_, t)| of_kind(t));
            let ours: Vec<usize> =
                ours.filter(|(_, t)| !t.entries.is_empty()).map(|(i, _)| i).collect();
            let sizes: Vec<usize> = ours
                .iter()
                .map(|i| tensors[*i].entries.iter().map(TensorEntry::size_bytes).sum())
                .collect();
            for (n, run) in runs(&sizes).into_iter().enumerate() {
                let members = ours[run].to_vec();
                let entries =
                    members.iter().flat_map(|i| tensors[*i].entries.iter().cloned()).collect();
                let name = format!("{prefix}{:05}.safetensors", n + 1);
                files.push(PlannedFile { name, tensors: members, entries });
            }
        }
        let mut place = vec![String::new(); tensors.len()];
        for file in &files {
            let data: usize = file.entries.iter().map(TensorEntry::size_bytes).sum();
            let header = header(&file.entries)
                .map_err(|source| Error::Header { path: file.name.clone().into(), source })?;
            let bytes = (header.len() + data) as u64;
            manifest.files.insert(file.name.clone(), FileRecord { bytes, blake3: Digest::of(b"") });
            file.tensors.iter().for_each(|i| place[*i].clone_from(&file.name));
        }
        for (tensor, place) in tensors.iter().zip(place) {
            let mut record = tensor.record.clone();
            match &mut record.storage {
                Storage::Unchanged => {}
                Storage::Exact { file } => *file = place,
                Storage::Codec { codec, file, .. } => {
                    *file = place;
                    for own in &tensor.codecs {
                        *codec = position(&mut manifest.codecs, own);
                    }
                }
                Storage::Path { file, path } => {
                    if let Some(file) = file {
                        *file = place;
                    }
                    for (node, codec) in path.iter_mut().zip(&tensor.codecs) {
                        node.codec = position(&mut manifest.codecs, codec);
                    }
                }
            }
            manifest.tensors.insert(tensor.name.clone(), record);
        }
        Ok(Self { manifest, files })
    }
}

/// Where a codec is among those in use, added if it is not.
fn position(codecs: &mut Vec<CodecRecord>, codec: &CodecRecord) -> usize {
    codecs.iter().position(|c| c == codec).unwrap_or_else(|| {
        codecs.push(codec.clone());
        codecs.len() - 1
    })
}

/// Runs of consecutive tensors that share a file.
fn runs(sizes: &[usize]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut held = 0;
    for (i, size) in sizes.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if held < FILE_BYTES => run.end = i + 1,
            _ => {
                runs.push(i..i + 1);
                held = 0;
            }
        }
        held += size;
    }
    runs
}

/// The sizes of an artifact that would hold these tensors, in the order of the
/// forward pass, and files beside them: a listed one with its length, an inherited one
/// without. `model_card` makes the text of the model card.
///
/// # Errors
/// When the tensors do not fit a file.
pub fn predicted_sizes(
    names: Names<'_>,
    tensors: &[&StoredTensor],
    side_files: &[(&str, Option<u64>)],
    model_card: impl Fn(&Manifest, &Sizes) -> String,
) -> Result<Sizes> {
    let mut manifest = Layout::new(names, tensors)?.manifest;
    let blake3 = Digest::of(b"");
    for (name, bytes) in side_files {
        match bytes {
            Some(bytes) => {
                let record = FileRecord { bytes: *bytes, blake3 };
                manifest.files.insert((*name).to_owned(), record);
            }
            None => {
                manifest.inherited.insert((*name).to_owned(), blake3);
            }
        }
    }
    let json = manifest
        .to_json()
        .map_err(|source| Error::Json { path: super::MANIFEST_FILE.into(), source })?;
    Ok(settle_card(&manifest, json.len(), |sizes| model_card(&manifest, sizes)).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_closed_when_it_is_full() {
        let ends = |sizes: &[usize]| -> Vec<usize> { runs(sizes).iter().map(|r| r.end).collect() };
        assert!(ends(&[]).is_empty());
        assert_eq!(ends(&[1, 2, 3]), [3]);
        let full = FILE_BYTES;
        assert_eq!(ends(&[full, 1, full - 1, 5]), [1, 3, 4]);
        assert_eq!(ends(&[1, full, 1]), [2, 3]);
    }
}
